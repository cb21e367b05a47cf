"""ONE table of named shapes, for tests and benchmarks, and makers of valid packed stacks and inputs for them.

Bytes are random, so every code and every bit of the scales occurs; the blocks' scales are set so that a weight has a
standard deviation of about 1/sqrt(D): then the hidden activations of x of rms 1 stay O(1), in any shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import oracle

from jmoe import FORMATS, ExpertStack, QuantTensor

PROJECTIONS = ("gate", "up", "down")
DENSE = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """A layer's sizes and the format of each projection: a name of ``FORMATS``, or a float dtype where dense."""

    name: str
    hidden_size: int
    expert_intermediate: int
    num_experts: int
    top_k: int
    gate: str
    up: str
    down: str

    def format(self, projection: str) -> str:
        return getattr(self, projection)

    def shape(self, projection: str) -> tuple[int, int, int]:
        """``(E, O, D)``"""
        inner, hidden = self.expert_intermediate, self.hidden_size
        return (self.num_experts, *((hidden, inner) if projection == "down" else (inner, hidden)))


def _case(name: str, hidden: int, inner: int, experts: int, top_k: int, gate_up: str, down: str) -> Case:
    return Case(name, hidden, inner, experts, top_k, gate_up, gate_up, down)


# Small: what the tests compute with.
_SMALL = (
    _case("tiny", 256, 256, 4, 2, "q4_k", "q6_k"),
    # Depths of 3 and 5 blocks of 32, odd ones: the last block of a row has no partner in Q4_K's order.
    Case("ragged", 96, 160, 31, 3, "q5_0", "q4_0", "q8_0"),
    # Three different formats, one of them in super-blocks; I of one block only.
    Case("mixed", 256, 32, 8, 2, "q5_k", "mxfp4", "q5_0"),
    _case("one-expert", 256, 256, 1, 1, "q5_k", "q5_k"),
    _case("all-chosen", 256, 256, 8, 8, "q4_k", "q4_k"),
    _case("many-experts", 32, 32, 257, 6, "q4_0", "q8_0"),
    _case("dense-down", 256, 96, 5, 2, "q4_k", "bfloat16"),
    Case("dense", 64, 48, 5, 2, "float32", "float16", "float32"),
    # As Gemma-4-26B: a down whose depth is 11 * 64 and no multiple of 256.
    _case("gemma-like", 256, 704, 8, 2, "q4_k", "q5_0"),
)

# One case a format, all three projections in it.
_FORMATS = tuple(
    _case(name, *((256, 512) if f.block_weights == 256 else (96, 160)), 8, 2, name, name) for name, f in FORMATS.items()
)

# Real models; types as llama.cpp's Q4_K_M gives them. "-q4" is a layer of the half whose down stays Q4_K.
_REAL = (
    _case("qwen3-30b-a3b", 2048, 768, 128, 8, "q4_k", "q6_k"),
    _case("qwen3-30b-a3b-q4", 2048, 768, 128, 8, "q4_k", "q4_k"),
    _case("qwen3-235b-a22b", 4096, 1536, 128, 8, "q4_k", "q6_k"),
    _case("qwen3-coder-480b", 6144, 2560, 160, 8, "q4_k", "q6_k"),
    _case("qwen3-next-80b", 2048, 512, 512, 10, "q4_k", "q6_k"),
    _case("qwen3.5-35b-a3b", 2048, 512, 256, 8, "q4_k", "q6_k"),
    _case("gpt-oss-20b", 2880, 2880, 32, 4, "mxfp4", "mxfp4"),
    _case("gpt-oss-120b", 2880, 2880, 128, 4, "mxfp4", "mxfp4"),
    _case("gemma-4-26b-a4b", 2816, 704, 128, 8, "q4_k", "q8_0"),
    _case("gemma-4-26b-a4b-q5", 2816, 704, 128, 8, "q4_k", "q5_0"),
    _case("mixtral-8x7b", 4096, 14336, 8, 2, "q4_k", "q6_k"),
    _case("mixtral-8x7b-q4", 4096, 14336, 8, 2, "q4_k", "q4_k"),
    _case("deepseek-v3", 7168, 2048, 256, 8, "q4_k", "q6_k"),
    _case("deepseek-v3-q4", 7168, 2048, 256, 8, "q4_k", "q4_k"),
    _case("kimi-k2", 7168, 2048, 384, 8, "q4_k", "q6_k"),
    _case("deepseek-v2-lite", 2048, 1408, 64, 6, "q4_k", "q8_0"),
    _case("glm-4.5-air", 4096, 1408, 128, 8, "q4_k", "q8_0"),
    _case("minimax-m2", 3072, 1536, 256, 8, "q4_k", "q6_k"),
    _case("olmoe-1b-7b", 2048, 1024, 64, 8, "q4_k", "q6_k"),
)

CASES: dict[str, Case] = {case.name: case for case in (*_SMALL, *_FORMATS, *_REAL)}
SMALL: tuple[str, ...] = tuple(case.name for case in _SMALL)
ONE_FORMAT: tuple[str, ...] = tuple(case.name for case in _FORMATS)
REAL: tuple[str, ...] = tuple(case.name for case in _REAL)

# Where a block holds its f16 scales: d, and dmin where it has one.
HALVES: dict[str, tuple[int, ...]] = {
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "q5_0": (0,),
    "q8_0": (0,),
    "q4_0": (0,),
    "mxfp4": (),
    "q3_k": (108,),
    "q2_k": (80, 82),
    "q5_1": (0, 2),
    "q4_1": (0, 2),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
}


def with_experts(case: Case, num_experts: int, top_k: int | None = None) -> Case:
    """The case with another number of experts, such as a real model's cut down to what a test can hold."""
    return replace(case, num_experts=num_experts, top_k=min(top_k or case.top_k, num_experts))


@dataclass(frozen=True)
class ExpertBlocks(Sequence):
    """The blocks of every expert of one projection, made when asked for: the same bytes each time."""

    case: Case
    projection: str
    seed: int = 0

    def __len__(self) -> int:
        return self.case.num_experts

    def __getitem__(self, expert: Any) -> Any:
        if not 0 <= expert < len(self):
            raise IndexError(f"expert {expert} of {len(self)}")
        rng = np.random.default_rng((self.seed, PROJECTIONS.index(self.projection), expert))
        return random_blocks(rng, self.case.format(self.projection), self.case.shape(self.projection)[1:])


def random_stack(case: Case, seed: int = 0) -> ExpertStack:
    """The packed stack of ``ExpertBlocks(case, projection, seed)``; memory: its planes and one expert's blocks."""
    return ExpertStack(**{name: _projection(ExpertBlocks(case, name, seed)) for name in PROJECTIONS})


def random_leaves(case: Case, *, gated: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """f32 biases and scales by expert, of the size of what they are added to and multiply."""
    rng = np.random.default_rng((seed, len(PROJECTIONS)))
    experts, inner, hidden = case.num_experts, case.expert_intermediate, case.hidden_size
    sizes = {"gate_bias": (inner,), "up_bias": (inner,), "down_bias": (hidden,), "down_scale": ()}
    draw = {name: rng.standard_normal((experts, *size), np.float32) for name, size in sizes.items()}
    return draw if gated else {name: leaf for name, leaf in draw.items() if name != "gate_bias"}


def specs(case: Case, tokens: int, lead: tuple[int, ...] = (), dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """Shapes and dtypes of moe_forward's arguments, the stack's behind ``lead`` axes: compiling needs no data."""
    of = jax.ShapeDtypeStruct

    def projection(name: str) -> Any:
        kind, shape = case.format(name), (*lead, *case.shape(name))
        return of(shape, jnp.dtype(kind)) if kind in DENSE else QuantTensor(kind, FORMATS[kind].plane_specs(shape))

    routing = (tokens, case.top_k)
    stack = ExpertStack(*map(projection, PROJECTIONS))
    return stack, of((tokens, case.hidden_size), dtype), of(routing, jnp.int32), of(routing, jnp.float32)


def oracle_layer(case: Case, seed: int = 0, *, decoded: bool = False) -> oracle.Layer:
    """What ``random_stack(case, seed)`` holds, for the oracle; ``decoded`` dequantises once, for repeated calls."""

    def weight(name: str) -> oracle.Weight:
        blocks, type_name = ExpertBlocks(case, name, seed), case.format(name)
        if not decoded:
            return oracle.Weight(type_name, blocks)
        return oracle.Weight("float32", [oracle.dequantise(expert, type_name) for expert in blocks])

    return oracle.Layer(weight("gate"), weight("up"), weight("down"))


def random_blocks(rng: np.random.Generator, format_name: str, shape: tuple[int, ...]) -> np.ndarray:
    """u8[..., O, row bytes] for weights ``shape = (..., O, D)``: random bytes, scales for a std of 1/sqrt(D).

    Each block's scale is off by its own factor between 1/2 and 2 and has a random sign. A dense format gives
    gaussian weights [..., O, D] of that dtype.
    """
    depth = shape[-1]
    if format_name in DENSE:
        return (rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(depth))).astype(jnp.dtype(format_name))
    spec = FORMATS[format_name]
    rows = np.frombuffer(rng.bytes(math.prod(shape[:-1]) * spec.row_bytes(depth)), np.uint8).copy()
    blocks = rows.reshape(-1, spec.block_bytes)
    if format_name == "mxfp4":
        middle = round(math.log2(1 / math.sqrt(depth) / _STD["mxfp4"])) + 128
        blocks[:, 0] = rng.integers(middle - 1, middle + 2, len(blocks))
    else:
        spread = np.exp2(rng.uniform(-1, 1, len(blocks))) * rng.choice([-1.0, 1.0], len(blocks)) / _SPREAD_RMS
        scale = spread / math.sqrt(depth) / _STD[format_name]
        set_halves(blocks, HALVES[format_name][0], scale)
        if format_name in _CODE_MEAN:
            set_halves(blocks, HALVES[format_name][1], scale * _CODE_MEAN[format_name])
    return rows.reshape(*shape[:-1], spec.row_bytes(depth))


def set_halves(blocks: np.ndarray, offset: int, values: Any) -> None:
    """Write f16 values at a byte offset of u8[..., block bytes], in place."""
    halves = np.broadcast_to(np.asarray(values).astype("<f2"), blocks.shape[:-1])
    blocks[..., offset : offset + 2] = np.ascontiguousarray(halves)[..., None].view(np.uint8)


def random_inputs(
    rng: np.random.Generator, tokens: int, hidden_size: int, dtype: Any = jnp.float32, outliers: float = 50.0
) -> jax.Array:
    """``x[T, H]`` of rms 1, as behind an RMS norm: a mean shift, and one channel in 256 larger by ``outliers``."""
    channels = np.ones(hidden_size)
    channels[rng.choice(hidden_size, -(-hidden_size // 256), replace=False)] = outliers
    x = (rng.standard_normal((tokens, hidden_size)) + 0.5) * channels
    x /= np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))
    return jnp.asarray(x, dtype)


def random_routing(rng: np.random.Generator, tokens: int, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """``topk_ids i32[T, K]``, distinct within a token, and ``topk_weights f32[T, K]`` that sum to 1."""
    scores = rng.random((tokens, case.num_experts))
    ids = np.argsort(scores, axis=-1)[:, : case.top_k].astype(np.int32)
    weights = rng.dirichlet(np.ones(case.top_k), tokens).astype(np.float32)
    return ids, weights.reshape(tokens, case.top_k)


def random_call(
    case: Case, tokens: int, dtype: Any, rng: np.random.Generator
) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """x, topk_ids and topk_weights of ``random_inputs`` and ``random_routing``."""
    x = random_inputs(rng, tokens, case.hidden_size)
    return jnp.asarray(x, dtype), *random_routing(rng, tokens, case)


def _projection(blocks: ExpertBlocks) -> QuantTensor | jax.Array:
    name, shape = blocks.case.format(blocks.projection), blocks.case.shape(blocks.projection)
    if name in DENSE:
        return jnp.stack([jnp.asarray(blocks[e]) for e in range(shape[0])])
    spec = FORMATS[name]
    planes = [np.empty(plane.shape, plane.dtype) for plane in spec.plane_specs(shape)]
    for expert in range(shape[0]):
        for whole, part in zip(planes, spec.split(blocks[expert]), strict=True):
            whole[expert] = part
    return QuantTensor(name, spec.planes(*map(jnp.asarray, planes)))


def _uniform_square(low: int, high: int) -> float:
    """The mean of n^2 over the integers low..high."""
    return float(np.mean(np.square(np.arange(low, high + 1.0))))


# The rms of 2^u, u uniform in [-1, 1].
_SPREAD_RMS = math.sqrt((4 - 1 / 4) / (2 * math.log(4)))

# The mean of codes from 0 on: dmin is that times d (and m minus that), so that weights have mean zero.
_CODE_MEAN = {"q4_k": 7.5, "q5_k": 15.5, "q2_k": 1.5, "q4_1": -7.5, "q5_1": -15.5}


def _k_std(high: int, highest_scale: int = 63) -> float:
    # Var(sc q - mean(q) m) of independent, uniform sc, m in 0..highest_scale and q in 0..high.
    mean, square = high / 2, _uniform_square(0, high)
    return math.sqrt(_uniform_square(0, highest_scale) * (square + mean**2) - 2 * (highest_scale / 2 * mean) ** 2)


def _iq4_square() -> float:
    """The mean of v^2."""
    return float(np.mean(np.square(gguf.quants.IQ4_NL.kvalues)))


# The standard deviation of a weight of random codes in a block whose scale is 1 (mxfp4: whose exponent is 2^(128-128)).
_STD = {
    "q4_k": _k_std(15),
    "q5_k": _k_std(31),
    "q6_k": math.sqrt(_uniform_square(-128, 127) * _uniform_square(-32, 31)),
    "q5_0": math.sqrt(_uniform_square(-16, 15)),
    "q4_0": math.sqrt(_uniform_square(-8, 7)),
    "q8_0": math.sqrt(_uniform_square(-128, 127)),
    "mxfp4": math.sqrt((1 + 4 + 9 + 16 + 36 + 64 + 144) / 8),
    "q3_k": math.sqrt(_uniform_square(-32, 31) * _uniform_square(-4, 3)),
    "q2_k": _k_std(3, 15),
    "q5_1": math.sqrt(_uniform_square(0, 31) - 15.5**2),
    "q4_1": math.sqrt(_uniform_square(0, 15) - 7.5**2),
    "iq4_nl": math.sqrt(_iq4_square()),
    "iq4_xs": math.sqrt(_uniform_square(-32, 31) * _iq4_square()),
}
