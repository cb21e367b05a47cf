"""Random packed stacks at the sizes of models that people run, for timing and for checks without a model file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from gguf.quants import dequantize

from .formats import FORMATS
from .gguf_file.planes import aligned_empty
from .selfcheck import LayerWeights, weights_in_blocks
from .stack import ExpertStack, QuantTensor


class ModelShape(NamedTuple):
    """Sizes and formats of a model's MoE layers; ``gate`` names up's format too."""

    hidden_size: int
    expert_intermediate: int
    num_experts: int
    top_k: int
    gate: str
    down: str


# As llama.cpp's Q4_K_M gives them. "-q4": a layer of the half whose down stays Q4_K; "-q5": one whose I is no multiple
# of 256 and whose down is Q5_0 instead.
MODELS = {
    "tiny": ModelShape(256, 256, 4, 2, "q4_k", "q6_k"),
    "qwen3-30b-a3b": ModelShape(2048, 768, 128, 8, "q4_k", "q6_k"),
    "qwen3-30b-a3b-q4": ModelShape(2048, 768, 128, 8, "q4_k", "q4_k"),
    "qwen3-235b-a22b": ModelShape(4096, 1536, 128, 8, "q4_k", "q6_k"),
    "qwen3-coder-480b": ModelShape(6144, 2560, 160, 8, "q4_k", "q6_k"),
    "qwen3-next-80b": ModelShape(2048, 512, 512, 10, "q4_k", "q6_k"),
    "qwen3.5-35b-a3b": ModelShape(2048, 512, 256, 8, "q4_k", "q6_k"),
    "gpt-oss-20b": ModelShape(2880, 2880, 32, 4, "mxfp4", "mxfp4"),
    "gpt-oss-120b": ModelShape(2880, 2880, 128, 4, "mxfp4", "mxfp4"),
    "gemma-4-26b-a4b": ModelShape(2816, 704, 128, 8, "q4_k", "q8_0"),
    "gemma-4-26b-a4b-q5": ModelShape(2816, 704, 128, 8, "q4_k", "q5_0"),
    "mixtral-8x7b": ModelShape(4096, 14336, 8, 2, "q4_k", "q6_k"),
    "mixtral-8x7b-q4": ModelShape(4096, 14336, 8, 2, "q4_k", "q4_k"),
    "deepseek-v3": ModelShape(7168, 2048, 256, 8, "q4_k", "q6_k"),
    "deepseek-v3-q4": ModelShape(7168, 2048, 256, 8, "q4_k", "q4_k"),
    "kimi-k2": ModelShape(7168, 2048, 384, 8, "q4_k", "q6_k"),
    "deepseek-v2-lite": ModelShape(2048, 1408, 64, 6, "q4_k", "q8_0"),
    "glm-4.5-air": ModelShape(4096, 1408, 128, 8, "q4_k", "q8_0"),
    "minimax-m2": ModelShape(3072, 1536, 256, 8, "q4_k", "q6_k"),
    "olmoe-1b-7b": ModelShape(2048, 1024, 64, 8, "q4_k", "q6_k"),
}

# Byte offset and relative size of the f16 scales of a block. The mins' scale is the mean code: weights of mean zero.
_HALF_SCALES = {
    "q4_k": ((0, 1.0), (2, 7.5)),
    "q5_k": ((0, 1.0), (2, 15.5)),
    "q6_k": ((208, 1.0),),
    "q5_0": ((0, 1.0),),
    "q8_0": ((0, 1.0),),
    "q4_0": ((0, 1.0),),
    "q3_k": ((108, 1.0),),
    "q2_k": ((80, 1.0), (82, 1.5)),
    "q5_1": ((0, 1.0), (2, -15.5)),
    "q4_1": ((0, 1.0), (2, -7.5)),
    "iq4_nl": ((0, 1.0),),
    "iq4_xs": ((0, 1.0),),
}


def layer_bytes(model: ModelShape) -> int:
    """Bytes that a file spends on one layer's experts."""
    return sum(FORMATS[name].file_bytes(shape) for name, shape in _projections(model))


def random_blocks(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """u8[..., O, bytes of a row] of format ``name`` for weights ``shape = (..., O, D)`` of mean 0 and variance 1 / D.

    Codes and sub-block scales are random bytes, so every bit is in use; only the f16 (or E8M0) scales are chosen.
    """
    fmt = FORMATS[name]
    count = math.prod(shape) // fmt.block_weights
    blocks = rng.integers(0, 256, (count, fmt.block_bytes), np.uint8)
    sample = blocks[:1024].copy()
    _set_scales(rng, name, sample, 1.0)
    _set_scales(rng, name, blocks, shape[-1] ** -0.5 / float(dequantize(sample, fmt.ggml_type).std()))
    return blocks.reshape(*shape[:-1], fmt.row_bytes(shape[-1]))


def _set_scales(rng: np.random.Generator, name: str, blocks: np.ndarray, scale: float) -> None:
    if name == "mxfp4":
        # A byte e stands for 2^(e - 128); two neighbouring ones, so that it varies.
        blocks[:, 0] = 128 + round(math.log2(scale)) - rng.integers(0, 2, len(blocks), np.uint8)
        return
    d = rng.uniform(0.5 * scale, 1.5 * scale, len(blocks))
    for offset, relative in _HALF_SCALES[name]:
        blocks[:, offset : offset + 2] = (d * relative).astype("<f2")[:, None].view(np.uint8)


def layer_blocks(rng: np.random.Generator, model: ModelShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random blocks of one layer's gate, up and down, as a file would hold them."""
    gate, up, down = (random_blocks(rng, name, shape) for name, shape in _projections(model))
    return gate, up, down


def stack_of(model: ModelShape, blocks: Sequence[np.ndarray]) -> ExpertStack:
    """The packed stack of a layer's blocks, on the default device; on a CPU in memory as the loader asks for it."""
    pairs = zip(_projections(model), blocks, strict=True)
    planes = ((name, jax.tree.map(_as_loaded, FORMATS[name].split(part))) for (name, _), part in pairs)
    return ExpertStack(*(QuantTensor(name, jax.device_put(part)) for name, part in planes))


def _as_loaded(plane: np.ndarray) -> np.ndarray:
    out = aligned_empty(plane.shape, plane.dtype)
    out[...] = plane
    return out


def weights_of(model: ModelShape, blocks: Sequence[np.ndarray]) -> LayerWeights:
    """The same blocks for :func:`jmoe.selfcheck.moe_float64`."""
    pairs = zip(_projections(model), blocks, strict=True)
    return LayerWeights(*(weights_in_blocks(FORMATS[name].ggml_type, part) for (name, _), part in pairs))


def _projections(model: ModelShape) -> tuple[tuple[str, tuple[int, int, int]], ...]:
    inner, hidden, experts = model.expert_intermediate, model.hidden_size, model.num_experts
    wide, tall = (experts, inner, hidden), (experts, hidden, inner)
    return (model.gate, wide), (model.gate, wide), (model.down, tall)
