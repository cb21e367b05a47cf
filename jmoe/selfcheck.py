"""The float64 reference that programs compare an output with: NumPy over the file's own blocks, no JAX in it.

    y[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t]),   e = topk_ids[t, k]

It decodes with gguf-py and multiplies in float64, so it shares neither planes nor code with what it judges.
(The tests have an oracle of their own.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from .gguf_file import GgufError, GgufFile
from .gguf_file.names import Source, find_expert_layer

# One expert's weights of a projection: e -> f64[O, D].
ExpertWeights = Callable[[int], np.ndarray]


class LayerWeights(NamedTuple):
    """How to get the weights of one expert of a layer; gate is None where the architecture has none."""

    gate: ExpertWeights | None
    up: ExpertWeights
    down: ExpertWeights


class Errors(NamedTuple):
    """Of an output against the exact one; as a bound, what each may at most be."""

    nmse: float  # sum (y - exact)^2 / sum exact^2
    max_over_rms: float  # max |y - exact| / rms(exact)

    def within(self, bound: Errors) -> bool:
        """False for NaN too."""
        return self.nmse <= bound.nmse and self.max_over_rms <= bound.max_over_rms

    def __str__(self) -> str:
        return f"NMSE {self.nmse:.1e}, max error / rms {self.max_over_rms:.1e}"


def weights_in_file(gguf: GgufFile, layer_idx: int) -> LayerWeights:
    """Layer ``layer_idx`` of an open file, read one expert at a time.

    GgufError as for loading it, and for a layer with biases or scales, which the formula does not have.
    """
    layer = find_expert_layer(gguf, layer_idx)
    if layer.optional:
        raise GgufError(f"{gguf.path}: the float64 reference does not know {', '.join(layer.optional.values())}")
    gate = None if layer.gate is None else _from_source(gguf, layer.gate)
    return LayerWeights(gate, _from_source(gguf, layer.up), _from_source(gguf, layer.down))


def weights_in_blocks(ggml_type: GGMLQuantizationType, blocks: np.ndarray) -> ExpertWeights:
    """A projection as a file holds it, u8[E, O, bytes of a row]."""
    return lambda expert: dequantize(blocks[expert], ggml_type).astype(np.float64)


def _from_source(gguf: GgufFile, source: Source) -> ExpertWeights:
    _, rows, _ = source.shape

    def read(expert: int) -> np.ndarray:
        name, first = source.locate(expert, 0)
        info = gguf.info(name)
        blocks = np.empty((rows, info.row_bytes), np.uint8)
        gguf.read_into(info, first * info.row_bytes, blocks)
        return dequantize(blocks, source.ggml_type).astype(np.float64)

    return read


def moe_float64(
    weights: LayerWeights, x: Any, topk_ids: Any, topk_weights: Any, num_experts: int | None = None
) -> np.ndarray:
    """f64[T, H] of the formula above, on x as given; ids outside [0, num_experts) contribute nothing."""
    if weights.gate is None:
        raise ValueError("silu multiplies by a gate, and these weights have none")
    x, topk_ids = np.asarray(x).astype(np.float64), np.asarray(topk_ids)
    topk_weights = np.asarray(topk_weights).astype(np.float64)
    y = np.zeros(x.shape)
    for expert in np.unique(topk_ids):
        if expert < 0 or (num_experts is not None and expert >= num_experts):
            continue
        token, slot = np.nonzero(topk_ids == expert)
        u = x[token] @ weights.up(expert).T  # f64[P, I]
        g = x[token] @ weights.gate(expert).T
        # silu(g) = g * sigmoid(g); tanh keeps the sigmoid from overflowing.
        h = g * (0.5 + 0.5 * np.tanh(0.5 * g)) * u
        np.add.at(y, token, topk_weights[token, slot][:, None] * (h @ weights.down(expert).T))
    return y


def errors(y: Any, exact: np.ndarray) -> Errors:
    """NMSE and max error over rms of y[T, H] against f64[T, H]; both 0 where y equals it."""
    difference = np.asarray(y).astype(np.float64) - exact
    if not difference.any():
        return Errors(0.0, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.mean(exact**2)
        return Errors(float(np.mean(difference**2) / scale), float(np.max(np.abs(difference)) / np.sqrt(scale)))


def bound(x_dtype: Any, backend: str, platform: str, precision: str | None = None) -> Errors:
    """What the README's numerics contract promises for x of this dtype."""
    if np.dtype(x_dtype) != np.float32:
        return Errors(6e-5, 5e-2)
    if precision is not None:
        return Errors(1e-10, 1e-4) if platform == "cpu" else Errors(1e-9, 5e-4)
    return Errors(1e-10, 1e-4) if backend == "jnp" else Errors(1e-7, 5e-3)


def outlier_x(rng: np.random.Generator, tokens: int, hidden_size: int) -> np.ndarray:
    """f32[T, H] with what gaussians lack and real activations have: a mean shift, and outlier channels (x50)."""
    x = rng.standard_normal((tokens, hidden_size), np.float32) + np.float32(0.5)
    x[:, rng.choice(hidden_size, max(1, hidden_size // 256), replace=False)] *= 50
    return x
