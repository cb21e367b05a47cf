"""Small files of every architecture, and what their layers compute in float64. Imports nothing of jmoe.

The table of cases is written from the semantics of llama.cpp's models, not from jmoe's own table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
import oracle
import router_oracle
from gguf import GGMLQuantizationType as Type
from gguf_builder import BOOL, F32, U32, Sizes, Tensor, good_file, moe_pairs

SIZES = Sizes(num_experts=8, hidden_size=64, expert_intermediate=32)
EXPERT_TYPE = Type.Q8_0


@dataclass(frozen=True)
class Case:
    """An architecture's layer: ``router`` are router_oracle.route's arguments, ``keys`` its file's own metadata."""

    arch: str
    router: dict[str, Any]
    keys: dict[str, Any] = field(default_factory=dict)
    shared: int = 0  # width of the shared experts
    shared_gate: bool = False
    bias: bool = False  # exp_probs_b
    router_bias: bool = False
    expert_biases: bool = False
    down_scale: bool = False
    fused: bool = False
    one_tensor_an_expert: bool = False
    activation: str = "silu"
    weight_on: str = "output"
    latent: int = 0

    @property
    def gated(self) -> bool:
        return self.activation != "relu2"


def gating(code: int) -> dict[str, Any]:
    return {"expert_gating_func": (U32, code)}


NORM, NO_NORM = {"expert_weights_norm": (BOOL, True)}, {"expert_weights_norm": (BOOL, False)}


def scale(value: float) -> dict[str, Any]:
    return {"expert_weights_scale": (F32, value)}


def groups(count: int, used: int) -> dict[str, Any]:
    return {"expert_group_count": (U32, count), "expert_group_used_count": (U32, used)}


OWN_LENGTH = {"expert_feed_forward_length": None, "feed_forward_length": (U32, SIZES.expert_intermediate)}
SOFTMAX, PLAIN = {"normalise": True}, {"normalise": False}
SIGMOID = {"gating": "sigmoid", "normalise": True}

CASES = {
    "mixtral": Case("llama", SOFTMAX, OWN_LENGTH),
    "mixtral-old": Case("llama", SOFTMAX, OWN_LENGTH, one_tensor_an_expert=True),
    "qwen2moe": Case("qwen2moe", PLAIN, shared=96, shared_gate=True),
    "qwen3moe": Case("qwen3moe", SOFTMAX),
    "qwen3vlmoe": Case("qwen3vlmoe", SOFTMAX),
    "qwen3next": Case("qwen3next", SOFTMAX, shared=32, shared_gate=True),
    "qwen35moe": Case("qwen35moe", SOFTMAX, shared=32, shared_gate=True, fused=True),
    "olmoe": Case("olmoe", PLAIN),
    "deepseek-v2": Case("deepseek2", PLAIN | {"scale": 16.0}, scale(16.0) | NO_NORM, shared=64),
    "deepseek-v3": Case(
        "deepseek2",
        SIGMOID | {"scale": 2.5, "group_count": 4, "groups_used": 2},
        gating(2) | NORM | scale(2.5) | groups(4, 2),
        shared=32,
        bias=True,
    ),
    "glm4moe": Case("glm4moe", SIGMOID | {"scale": 1.5}, NORM | scale(1.5) | groups(1, 1), shared=32, bias=True),
    "gpt-oss": Case(
        "gpt-oss",
        {"gating": "softmax_top_k", "normalise": False},
        router_bias=True,
        expert_biases=True,
        activation="swiglu_oai",
    ),
    "llama4": Case(
        "llama4",
        {"gating": "sigmoid", "normalise": False, "select_on": "logits"},
        {"interleave_moe_layer_step": (U32, 1)},
        shared=48 * 2,
        weight_on="input",
    ),
    "minimax-m2": Case("minimax-m2", SIGMOID, gating(2), bias=True),
    "gemma4": Case("gemma4", SOFTMAX, activation="gelu_tanh", fused=True, down_scale=True),
    "granitemoe": Case("granitemoe", SOFTMAX | {"scale": 0.5}, OWN_LENGTH | scale(0.5)),
    "granitemoe-shared": Case("granitemoe", SOFTMAX, OWN_LENGTH, shared=64),
    "ernie4_5-moe": Case("ernie4_5-moe", SOFTMAX, shared=64, bias=True),
    "lfm2moe": Case("lfm2moe", SIGMOID, gating(2), bias=True),
    "nemotron_h_moe": Case(
        "nemotron_h_moe",
        SIGMOID | {"scale": 2.5},
        NORM | scale(2.5) | groups(1, 1),
        shared=64,
        bias=True,
        activation="relu2",
    ),
    "nemotron-super": Case(
        "nemotron_h_moe",
        SIGMOID | {"scale": 5.0},
        NORM | scale(5.0) | {"moe_latent_size": (U32, 32), "embedding_length": (U32, 64)},
        shared=64,
        bias=True,
        activation="relu2",
        latent=32,
    ),
}
TOP_K = 2


def quantised(rng: np.random.Generator, ggml_type: Type, shape: tuple[int, ...], size: float = 0.2) -> Tensor:
    """A tensor of normal weights, quantised by gguf-py."""
    weights = rng.normal(0, size, shape).astype(np.float32)
    if ggml_type == Type.F32:
        return Tensor(ggml_type, weights.view(np.uint8))
    return Tensor(ggml_type, gguf.quants.quantize(weights, ggml_type).view(np.uint8))


def tensors_of(case: Case, layer: int = 0, seed: int = 7) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    experts, hidden, inner = SIZES
    width = case.latent or hidden
    made: dict[str, Tensor] = {}

    def add(name: str, shape: tuple[int, ...], ggml_type: Type = Type.F32, size: float = 0.2) -> None:
        made[f"blk.{layer}.{name}"] = quantised(rng, ggml_type, shape, size)

    add("ffn_gate_inp.weight", (experts, hidden))
    kinds = [("up", (inner, width)), ("down", (width, inner))]
    if case.fused:
        add("ffn_gate_up_exps.weight", (experts, 2 * inner, width), EXPERT_TYPE)
        kinds = kinds[1:]
    elif case.gated:
        kinds.append(("gate", (inner, width)))
    for kind, shape in kinds:
        if case.one_tensor_an_expert:
            for e in range(experts):
                add(f"ffn_{kind}.{e}.weight", shape, EXPERT_TYPE)
        else:
            add(f"ffn_{kind}_exps.weight", (experts, *shape), EXPERT_TYPE)
        if case.expert_biases:
            add(f"ffn_{kind}_exps.bias", (experts, shape[0]))
    if case.down_scale:
        add("ffn_down_exps.scale", (experts,), size=1.0)
    if case.bias:
        add("exp_probs_b.bias", (experts,))
    if case.router_bias:
        add("ffn_gate_inp.bias", (experts,))
    if case.latent:
        add("ffn_latent_down.weight", (case.latent, hidden), Type.Q8_0)
        add("ffn_latent_up.weight", (hidden, case.latent), Type.F16)
    if case.shared:
        # Types of their own, as in files: one packed, one dense.
        add("ffn_up_shexp.weight", (case.shared, hidden), Type.Q5_0)
        add("ffn_down_shexp.weight", (hidden, case.shared), Type.Q8_0)
        if case.gated:
            add("ffn_gate_shexp.weight", (case.shared, hidden), Type.BF16)
    if case.shared_gate:
        add("ffn_gate_inp_shexp.weight", (hidden,))
    return made


def file_of(
    case: Case, tensors: dict[str, Tensor] | None = None, blocks: int = 1, arch: str = "", **keys: Any
) -> bytes:
    """The bytes of a file of one layer; ``tensors`` replaces its own, ``keys`` adds to its metadata."""
    stated: dict[str, Any] = {"expert_used_count": (U32, TOP_K), **case.keys, **keys}
    pairs = moe_pairs(arch or case.arch, SIZES, blocks, **stated)
    return good_file(tensors_of(case) if tensors is None else tensors, pairs)


def forward(case: Case, tensors: dict[str, Tensor], x: Any, layer: int = 0, **given: Any) -> np.ndarray:
    """f64[T, H] of the layer in the tensors; ``given``: router_input, ids."""
    x = oracle.as_f64(x)
    held = {
        name.removeprefix(f"blk.{layer}."): oracle.dequantise(t.blocks, t.ggml_type.name).astype(np.float64)
        for name, t in tensors.items()
        if name.startswith(f"blk.{layer}.")
    }

    def weights(kind: str) -> np.ndarray | None:
        if f"ffn_{kind}.0.weight" in held:
            return np.stack([held[f"ffn_{kind}.{e}.weight"] for e in range(SIZES.num_experts)])
        if case.fused and kind != "down":
            both = np.split(held["ffn_gate_up_exps.weight"], 2, axis=1)
            return both[kind == "up"]
        return held.get(f"ffn_{kind}_exps.weight")

    seen = oracle.as_f64(given.get("router_input", x))
    logits = seen @ held["ffn_gate_inp.weight"].T + held.get("ffn_gate_inp.bias", 0.0)
    bias = held.get("exp_probs_b.bias") if given.get("ids") is None else None
    ids, topk_weights = router_oracle.route(logits, TOP_K, bias=bias, ids=given.get("ids"), **case.router)
    dense = lambda array: None if array is None else oracle.Weight("float64", array)  # noqa: E731
    up, down = dense(weights("up")), dense(weights("down"))
    assert up is not None
    assert down is not None
    experts = oracle.Layer(
        dense(weights("gate")) if case.gated else None,
        up,
        down,
        **{f"{kind}_bias": held.get(f"ffn_{kind}_exps.bias") for kind in ("gate", "up", "down")},
        down_scale=held.get("ffn_down_exps.scale"),
    )
    inside = x @ held["ffn_latent_down.weight"].T if case.latent else x
    y = oracle.moe(experts, inside, ids, topk_weights, case.activation, weight_on=case.weight_on)
    if case.latent:
        y = y @ held["ffn_latent_up.weight"].T
    if case.shared:
        gate = (x @ held["ffn_gate_shexp.weight"].T,) if case.gated else ()
        h = oracle.ACTIVATIONS[case.activation](*gate, x @ held["ffn_up_shexp.weight"].T)
        shared = h @ held["ffn_down_shexp.weight"].T
        if case.shared_gate:
            shared = shared * oracle.sigmoid(x @ held["ffn_gate_inp_shexp.weight"])[:, None]
        y = y + shared
    return y
