"""The float64 reference that tests compare with: NumPy over gguf-py's own dequantisation. Imports nothing of jmoe.

    y[t] = sum_k topk_weights[t, k] * (down_e h + down_bias_e) * down_scale_e,   e = topk_ids[t, k]
    h = act(gate_e x[t] + gate_bias_e, up_e x[t] + up_bias_e)

Llama 4 multiplies x[t] by the weight instead; without a gate act sees up alone. An e outside [0, E) contributes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np


@dataclass(frozen=True)
class Weight:
    """A projection as the file holds it: ``blocks[e]`` is u8[O, row bytes] of GGUF type ``type_name``.

    Where dense (float64, float32, float16, bfloat16) ``blocks[e]`` is the [O, D] array itself. Any sequence will do,
    such as one that makes an expert's bytes when asked.
    """

    type_name: str
    blocks: Sequence[np.ndarray] | np.ndarray

    def __len__(self) -> int:
        return len(self.blocks)

    def dequantise(self, expert: int) -> np.ndarray:
        """f64[O, D] of one expert; exact, because f32 is what gguf-py decodes to."""
        return dequantise(self.blocks[expert], self.type_name).astype(np.float64)


@dataclass(frozen=True)
class Layer:
    """The experts of one layer; biases and scales are None where the layer has none."""

    gate: Weight | None
    up: Weight
    down: Weight
    gate_bias: np.ndarray | None = None  # [E, I]
    up_bias: np.ndarray | None = None  # [E, I]
    down_bias: np.ndarray | None = None  # [E, H]
    down_scale: np.ndarray | None = None  # [E]


def dequantise(blocks: np.ndarray, type_name: str) -> np.ndarray:
    """f32[..., D] of u8[..., row bytes]; a dense array is returned as f32, or f64 where it is that."""
    if type_name in ("float64", "float32", "float16", "bfloat16"):
        return np.asarray(blocks).astype(np.promote_types(np.float32, blocks.dtype))
    # Random bytes decode to inf * 0 and the like, which is what the comparison is about.
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type_name.upper()])


def read_gguf(path: Any) -> dict[str, Weight]:
    """Every tensor of a file that is trusted, through gguf-py's reader."""
    dense = {"F32": "float32", "F16": "float16"}
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: Weight(dense.get(t.tensor_type.name, t.tensor_type.name), np.array(t.data)) for t in tensors}


def sigmoid(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-z))


def silu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate * sigmoid(gate) * up


def gelu_tanh(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return gate * (1 + np.tanh(inner)) / 2 * up


def swiglu_oai(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate, up = np.where(gate > 7, 7, gate), np.clip(up, -7, 7)
    return gate * sigmoid(1.702 * gate) * (1 + up)


def swiglu_clamped(limit: float, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return silu(np.where(gate > limit, limit, gate), np.clip(up, -limit, limit))


def relu2(up: np.ndarray) -> np.ndarray:
    return np.where(up > 0, up, 0 * up) ** 2


ACTIVATIONS: dict[str, Callable[..., np.ndarray]] = {
    "silu": silu,
    "gelu_tanh": gelu_tanh,
    "swiglu_oai": swiglu_oai,
    "swiglu_clamped": swiglu_clamped,
    "relu2": relu2,
}


def moe(
    layer: Layer,
    x: Any,
    topk_ids: Any,
    topk_weights: Any,
    activation: str = "silu",
    *,
    limit: float | None = None,
    weight_on: str = "output",
) -> np.ndarray:
    """f64[T, H] of the formula above, on x as given."""
    x, topk_weights = as_f64(x), as_f64(topk_weights)
    topk_ids = np.asarray(topk_ids)
    y = np.zeros(x.shape)
    for expert in range(len(layer.up)):
        token, slot = np.nonzero(topk_ids == expert)
        if token.size:
            weight, rows = topk_weights[token, slot, None], x[token]
            if weight_on == "input":
                out = expert_output(layer, expert, weight * rows, activation, limit)
            else:
                out = weight * expert_output(layer, expert, rows, activation, limit)
            # add.at: a token may hold the expert twice.
            np.add.at(y, token, out)
    return y


def expert_output(
    layer: Layer, expert: int, x: np.ndarray, activation: str = "silu", limit: float | None = None
) -> np.ndarray:
    """f64[P, H]: what one expert makes of f64[P, H], before the router's weight."""

    def affine(x: np.ndarray, weight: Weight, bias: np.ndarray | None) -> np.ndarray:
        y = x @ weight.dequantise(expert).T
        return y if bias is None else y + as_f64(bias[expert])

    limits = () if limit is None else (limit,)
    gate = () if layer.gate is None else (affine(x, layer.gate, layer.gate_bias),)
    up = affine(x, layer.up, layer.up_bias)
    y = affine(ACTIVATIONS[activation](*limits, *gate, up), layer.down, layer.down_bias)
    return y if layer.down_scale is None else y * float(layer.down_scale[expert])


def as_f64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def nmse(y: Any, reference: Any) -> float:
    """``sum((y - r)^2) / sum(r^2)``; 0 where y is r, infinite where r is zero and y is not."""
    y, reference = as_f64(y), as_f64(reference)
    return _ratio(np.sum(np.square(y - reference)), np.sum(np.square(reference)))


def max_over_rms(y: Any, reference: Any) -> float:
    """``max|y - r| / rms(r)``; 0 where y is r, infinite where r is zero and y is not."""
    y, reference = as_f64(y), as_f64(reference)
    return _ratio(np.max(np.abs(y - reference), initial=0.0), np.sqrt(np.sum(np.square(reference)) / max(1, y.size)))


def assert_within(y: Any, reference: Any, bound: tuple[float, float]) -> None:
    """Same shape, finite, and both measures within ``bound = (nmse, max_over_rms)``, as a whole and row by row."""
    y, reference = as_f64(y), as_f64(reference)
    assert y.shape == reference.shape
    assert np.isfinite(y).all(), f"{np.count_nonzero(~np.isfinite(y))} of {y.size} elements are not finite"
    rows = zip(y, reference, strict=True) if y.ndim > 1 else ()
    for where, got, want in (("the whole", y, reference), *((f"row {t}", *row) for t, row in enumerate(rows))):
        measured = nmse(got, want), max_over_rms(got, want)
        # Not "all <=": a NaN must fail.
        assert measured[0] <= bound[0], f"{where}: NMSE {measured[0]:.2e} > {bound[0]:.0e}"
        assert measured[1] <= bound[1], f"{where}: max/rms {measured[1]:.2e} > {bound[1]:.0e}"


def _ratio(error: float, scale: float) -> float:
    if error == 0:
        return 0.0
    return float(error / scale) if scale else float("inf")
