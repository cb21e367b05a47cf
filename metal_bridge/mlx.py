"""jmoe's packed planes for users of MLX, evaluated eagerly.

    planes = jmoe.ExpertStack.open_and_load("model.gguf", 0).up.planes  # Q4_K
    up = metal_bridge.mlx.gathered_gemv("q4_k", planes, x, topk_ids)  # a hand-written Metal kernel, on a Mac
    words, how = metal_bridge.mlx.quantized("q4_k", planes)  # for MLX's own functions, anywhere
    up = mx.gather_qmm(x[:, None, None], words, **how, rhs_indices=topk_ids)

MLX is imported when a function is called.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .affine import BITS, GROUP, nibbles, pack, to_affine
from .gemv import launch


def to_mlx(planes: Any) -> Any:
    """The same NamedTuple of planes as ``mlx.core`` arrays: a copy, to be made once."""
    return type(planes)(*map(_array, planes))


def why_no_metal() -> str | None:
    """Why the kernels cannot run here, or None where they can."""
    try:
        return None if _core().metal.is_available() else "MLX has no GPU here"
    except ImportError:
        return "MLX is not installed"


def _core() -> Any:
    import mlx.core  # pyright: ignore[reportMissingImports]

    return mlx.core


def _array(value: Any) -> Any:
    mx = _core()
    return value if isinstance(value, mx.array) else mx.array(np.asarray(value))


def quantized(format_name: str, planes: Any) -> tuple[Any, dict[str, Any]]:
    """``w``, and the keywords with which ``mx.quantized_matmul``, ``mx.gather_qmm`` and ``mx.dequantize`` take it.

    ``planes`` [E, O, ...] of a format that has an MLX form (affine.py; else ValueError). MXFP4 in MLX's own mode,
    4.25 bits a weight; the others as affine groups of 32 with f32 scales: 6, 7 or 10 bits a weight.
    """
    mx = _core()
    if format_name == "mxfp4":
        planes = type(planes)(*map(np.asarray, planes))
        lead, (rows, nbytes) = planes.codes.shape[:-2], planes.codes.shape[-2:]
        codes = nibbles(planes.codes.reshape(-1, nbytes)).reshape(*lead, rows, 2 * nbytes)
        scales = np.ascontiguousarray(np.swapaxes(planes.e, -1, -2))
        how = {"scales": mx.array(scales), "group_size": GROUP, "bits": 4, "mode": "mxfp4"}
        return mx.array(pack(codes, 4)), how
    words, scales, biases = map(mx.array, to_affine(format_name, planes))
    return words, {"scales": scales, "biases": biases, "group_size": GROUP, "bits": BITS[format_name]}


def gathered_gemv(format_name: str, planes: Any, x: Any, topk_ids: Any) -> Any:
    """``out[..., o] = sum_d w[topk_ids[...], o, d] * x[..., d]``, f32[..., O], by a Metal kernel; Q4_K and Q6_K.

    ``planes`` [E, O, ...] of one projection as jmoe holds them (best as ``to_mlx`` makes them), ``topk_ids`` integer
    [T, K]; ``x`` [T, D] for gate and up, or [T, K, D], a row for each id, for down. Sums in f32. An id outside [0, E)
    gives zeros. Raises ValueError for other formats and sizes, RuntimeError where MLX has no Metal.
    """
    mx = _core()
    planes, x, ids = to_mlx(planes), _array(x).astype(mx.float32), _array(topk_ids).astype(mx.int32)
    depth = 2 * planes.codes.shape[-1]
    if x.shape[-1] != depth or tuple(x.shape[:-1]) not in (tuple(ids.shape), tuple(ids.shape[:-1])):
        raise ValueError(
            f"x must be [{', '.join(map(str, ids.shape[:-1]))}, {depth}], or have a row for each of the ids"
            f" {list(ids.shape)}, got {list(x.shape)}"
        )
    if ids.size == 0:
        return mx.zeros((*ids.shape, planes.codes.shape[-2]))
    how = launch(format_name, planes._fields, tuple(planes.codes.shape), x.size // depth, ids.size)
    if why := why_no_metal():
        raise RuntimeError(f"{why}; mx.gather_qmm with what metal_bridge.mlx.quantized() gives runs everywhere")
    # Bytes that a lane reads four at a time.
    words = [
        p.view(mx.uint32) if name in ("codes", "high") else p for name, p in zip(planes._fields, planes, strict=True)
    ]
    kernel = mx.fast.metal_kernel(
        name=how.name, input_names=list(how.input_names), output_names=["out"], source=how.source
    )
    (out,) = kernel(
        inputs=[*words, x.reshape(-1, depth), ids.reshape(-1)],
        template=list(how.template),
        grid=how.grid,
        threadgroup=how.threadgroup,
        output_shapes=[how.output_shape],
        output_dtypes=[mx.float32],
    )
    return out.reshape(*ids.shape, how.output_shape[-1])
