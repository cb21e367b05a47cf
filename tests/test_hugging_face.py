"""Hugging Face transformers' own MoE blocks, in float64 on torch's CPU, as a second oracle (the extra ``hf``).

Each block gets random weights, which are written to a GGUF file as llama.cpp's converter would name them; the file says
what the block's config says, and nothing else tells jmoe how to compute it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tolerances
from gguf import GGMLQuantizationType
from gguf_builder import BOOL, F32, U32, Sizes, Tensor, good_file, moe_pairs

from jmoe import MoELayer, moe_layer_forward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
# transformers' imports warn of what is deprecated elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore")

E, H, I, K = 8, 64, 32, 2
SIZES = Sizes(E, H, I)


@dataclass(frozen=True)
class Block:
    """A model's block: its module and class, the config's fields, and the file's architecture and keys."""

    module: str
    name: str
    config: str
    fields: dict[str, Any]
    arch: str
    keys: dict[str, Any] = field(default_factory=dict)


QWEN = {"num_experts": E, "moe_intermediate_size": I, "num_experts_per_tok": K}
DEEPSEEK = {"num_experts_per_tok": K, "moe_intermediate_size": I, "n_group": 4, "topk_group": 2}
BLOCKS = [
    Block(
        "mixtral",
        "MixtralSparseMoeBlock",
        "MixtralConfig",
        {"num_local_experts": E, "intermediate_size": I, "num_experts_per_tok": K},
        "llama",
    ),
    Block(
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        "Qwen2MoeConfig",
        QWEN | {"shared_expert_intermediate_size": 96, "norm_topk_prob": False},
        "qwen2moe",
    ),
    Block("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", QWEN | {"norm_topk_prob": True}, "qwen3moe"),
    Block(
        "olmoe",
        "OlmoeSparseMoeBlock",
        "OlmoeConfig",
        {"num_experts": E, "intermediate_size": I, "num_experts_per_tok": K, "norm_topk_prob": False},
        "olmoe",
    ),
    Block(
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3Config",
        DEEPSEEK | {"n_routed_experts": E, "n_shared_experts": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        "deepseek2",
        {
            "expert_gating_func": (U32, 2),
            "expert_weights_norm": (BOOL, True),
            "expert_weights_scale": (F32, 2.5),
            "expert_group_count": (U32, 4),
            "expert_group_used_count": (U32, 2),
        },
    ),
    Block(
        "gpt_oss",
        "GptOssMLP",
        "GptOssConfig",
        {"num_local_experts": E, "intermediate_size": I, "num_experts_per_tok": K},
        "gpt-oss",
    ),
]

KINDS = ("gate", "up", "down")
# A module's parameter -> the file's tensor.
NAMES = {
    "gate.weight": "ffn_gate_inp.weight",
    "gate.e_score_correction_bias": "exp_probs_b.bias",
    "router.weight": "ffn_gate_inp.weight",
    "router.bias": "ffn_gate_inp.bias",
    "experts.down_proj": "ffn_down_exps.weight",
    "experts.down_proj_bias": "ffn_down_exps.bias",
    "shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    **{f"shared_expert{s}.{kind}_proj.weight": f"ffn_{kind}_shexp.weight" for s in ("", "s") for kind in KINDS},
}


def tensors_of(arch: str, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state as the converter writes it: gate and up apart; gpt-oss's lie transposed, gate and up in turns."""
    made: dict[str, np.ndarray] = {}
    for name, value in state.items():
        if arch == "gpt-oss" and name.startswith("experts.") and not name.endswith("bias"):
            value = np.swapaxes(value, 1, 2)
        if "gate_up_proj" in name:
            halves = (value[:, ::2], value[:, 1::2]) if arch == "gpt-oss" else np.split(value, 2, axis=1)
            kind = "bias" if name.endswith("bias") else "weight"
            made |= {f"ffn_{half}_exps.{kind}": part for half, part in zip(("gate", "up"), halves, strict=True)}
        else:
            made[NAMES[name]] = value.reshape(-1) if name == "shared_expert_gate.weight" else value
    return made


def file_of(block: Block, state: dict[str, np.ndarray]) -> bytes:
    tensors = {
        f"blk.0.{name}": Tensor(GGMLQuantizationType.F32, np.ascontiguousarray(value, np.float32).view(np.uint8))
        for name, value in tensors_of(block.arch, state).items()
    }
    keys = {"expert_used_count": (U32, K), **block.keys}
    return good_file(tensors, moe_pairs(block.arch, SIZES, **keys))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_file_of_the_block_s_weights_computes_what_the_block_does(block: Block, tmp_path: Path, rng):
    config = getattr(transformers, block.config)(hidden_size=H, **block.fields)
    modeling = importlib.import_module(f"transformers.models.{block.module}.modeling_{block.module}")
    module = getattr(modeling, block.name)(config).eval()
    state = {name: rng.normal(0, 0.2, value.shape).astype(np.float32) for name, value in module.state_dict().items()}
    module.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    x = rng.standard_normal((17, H)).astype(np.float32)
    with torch.no_grad():
        y = module.double()(torch.from_numpy(x).double()[None])
    y = (y[0] if isinstance(y, tuple) else y).numpy().reshape(x.shape)
    path = tmp_path / "block.gguf"
    path.write_bytes(file_of(block, state))
    layer = MoELayer.open_and_load(path, 0)
    oracle.assert_within(moe_layer_forward(layer, x), y, tolerances.LAYER["float32"])
