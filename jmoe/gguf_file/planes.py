"""Read a layer's tensors from the file into host arrays in the layout of the pytrees.

A projection is read in pieces, some rows of one expert or all rows of a few, each by one thread: pread, split into
planes, copy to its place. So the memory beside the planes is a few pieces, whatever an expert's size, and every core
works.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from ..formats import FORMATS, format_of_type
from ..stack import ExpertStack, QuantTensor
from .errors import DenseFallbackWarning, GgufError
from .file import GgufFile
from .header import BLOCK_SIZES
from .names import ExpertLayer, Source

# Bytes a piece, in the file or as dense floats. Measured on 2 cores, Q4_K from a warm page cache: 1.5 GB/s with 256 KiB
# (threads wait for the GIL between short NumPy calls), 3 to 4 GB/s from 1 MiB on.
_PIECE = 2 << 20

_DENSE = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(jnp.bfloat16),
}


def layer_specs(gguf: GgufFile, layer: ExpertLayer) -> ExpertStack:
    """The layer's stack with a ``jax.ShapeDtypeStruct`` for every leaf, from the header alone.

    Raises GgufError where a tensor's type can neither stay packed nor be dequantised.
    """
    experts, inner, hidden = layer.up.shape
    shapes = {"gate_bias": (inner,), "up_bias": (inner,), "down_bias": (hidden,), "down_scale": ()}
    return ExpertStack(
        gate=None if layer.gate is None else projection_spec(gguf, layer.gate),
        up=projection_spec(gguf, layer.up),
        down=projection_spec(gguf, layer.down),
        **{leaf: jax.ShapeDtypeStruct((experts, *shapes[leaf]), np.float32) for leaf in layer.optional},
    )


def read_projection(gguf: GgufFile, source: Source, executor: Executor, check_finite: bool) -> Any:
    """The projection's host arrays: a QuantTensor of planes, or a dense array [E, O, D].

    Raises GgufError where scales or dense weights are NaN or infinite, unless ``check_finite`` is False.
    """
    spec = projection_spec(gguf, source)
    _warn_if_fallback(gguf, source, spec)
    out = jax.tree.map(lambda leaf: aligned_empty(leaf.shape, leaf.dtype), spec)
    # No closure over ``out``: it would live as long as an error that passed its frame, cleared or not.
    read = partial(_read_packed if isinstance(spec, QuantTensor) else _read_dense, gguf, source, out, check_finite)
    nonfinite = sum(executor.map(read, *zip(*_pieces(source, _row_bytes(gguf, source, spec)), strict=True)))
    if nonfinite:
        what = "scales" if isinstance(spec, QuantTensor) else "weights"
        raise GgufError(
            f"{gguf.path}: tensor {source} has {nonfinite} {what} that are NaN or infinite: the file is damaged. Load"
            " it with check_finite=False to have them nevertheless"
        )
    return out


def read_optional(
    gguf: GgufFile, name: str, shape: tuple[int, ...], check_finite: bool, *, first: int = 0
) -> np.ndarray:
    """The bias or scale tensor ``name`` as f32 of ``shape``, whose first axis begins at expert ``first``."""
    info = gguf.info(name)
    _require_dequantisable(gguf, name, info.ggml_type)
    block_weights, block_bytes = BLOCK_SIZES[info.ggml_type]
    blocks, straddling = divmod(math.prod(shape[1:]), block_weights)
    if straddling:  # scales in a quantised type: experts share blocks
        values = _dequantise(gguf.read(name), info.ggml_type).reshape(-1, *shape[1:])[first : first + shape[0]]
    else:
        raw = np.empty((shape[0], blocks * block_bytes), np.uint8)
        gguf.read_into(info, first * blocks * block_bytes, raw)
        values = _dequantise(raw, info.ggml_type)
    out = aligned_empty(shape, np.dtype(np.float32))
    out[...] = values.reshape(shape)
    if check_finite and (nonfinite := np.count_nonzero(~np.isfinite(out))):
        raise GgufError(f"{gguf.path}: tensor {name!r} has {nonfinite} NaN or infinite values: the file is damaged")
    return out


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary: what jax's CPU backend takes over without a copy, and so in the
    2 MiB pages that NumPy asks Linux for."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + 63, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def projection_spec(gguf: GgufFile, source: Source) -> Any:
    """``jax.ShapeDtypeStruct`` for the projection's array, or for each of its planes; GgufError for unknown types."""
    packed = format_of_type(source.ggml_type)
    if packed is not None:
        return QuantTensor(packed.name, packed.plane_specs(source.shape))
    if source.ggml_type not in _DENSE:
        _require_dequantisable(gguf, source.names[0], source.ggml_type)
    return jax.ShapeDtypeStruct(source.shape, _DENSE.get(source.ggml_type, np.dtype(np.float32)))


def _warn_if_fallback(gguf: GgufFile, source: Source, spec: Any) -> None:
    if isinstance(spec, QuantTensor) or source.ggml_type in _DENSE:
        return
    file_bytes = math.prod(source.shape[:-1]) * gguf.info(source.names[0]).row_bytes
    dense_bytes = math.prod(spec.shape) * spec.dtype.itemsize
    warnings.warn(
        f"{gguf.path}: tensor {source} of type {source.ggml_type.name} has no packed path: dequantised to float32, it"
        f" takes {dense_bytes} bytes instead of {file_bytes}",
        DenseFallbackWarning,
        stacklevel=5,
    )


def _row_bytes(gguf: GgufFile, source: Source, spec: Any) -> int:
    """Of one row in the file, or as dense floats where those are more."""
    in_file = gguf.info(source.names[0]).row_bytes
    return in_file if isinstance(spec, QuantTensor) else max(in_file, source.shape[-1] * spec.dtype.itemsize)


def _pieces(source: Source, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """(experts, rows): some rows of one expert, or all rows of some, so that tiny experts are not a piece each."""
    experts, rows, _ = source.shape
    step = max(1, _PIECE // row_bytes)
    together = max(1, step // rows)
    for first in range(0, experts, together):
        for start in range(0, rows, step):
            yield slice(first, min(first + together, experts)), slice(start, min(start + step, rows))


def _read_packed(
    gguf: GgufFile, source: Source, out: QuantTensor, check_finite: bool, experts: slice, rows: slice
) -> int:
    """Fill a piece of ``out``'s planes; the number of its scales that are not finite."""
    spec = FORMATS[out.format]
    planes = spec.split(_read_rows(gguf, source, experts, rows))
    for plane, whole, piece in zip(spec.layout, out.planes, planes, strict=True):
        target = whole[experts, rows] if plane.by_row else whole[experts, :, rows]
        target[...] = piece
    return spec.count_nonfinite(planes) if check_finite else 0


def _read_dense(
    gguf: GgufFile, source: Source, out: np.ndarray, check_finite: bool, experts: slice, rows: slice
) -> int:
    """Fill a piece of ``out``; the number of its weights that are not finite."""
    blocks = _read_rows(gguf, source, experts, rows)
    target = out[experts, rows]
    # Of a signalling NaN some versions of NumPy and ml_dtypes warn.
    with np.errstate(invalid="ignore"):
        target[...] = blocks.view(out.dtype) if source.ggml_type in _DENSE else _dequantise(blocks, source.ggml_type)
        return int(np.count_nonzero(~np.isfinite(target))) if check_finite else 0


def _read_rows(gguf: GgufFile, source: Source, experts: slice, rows: slice) -> np.ndarray:
    """These rows of these experts, u8[experts, rows, row bytes]; of several experts all rows."""
    count, height = experts.stop - experts.start, rows.stop - rows.start
    name, first = source.locate(experts.start, rows.start)
    row_bytes = gguf.info(name).row_bytes
    if len(source.names) > 1:
        blocks = np.empty((count, height, row_bytes), np.uint8)
        for expert, block in zip(range(experts.start, experts.stop), blocks, strict=True):
            name, first = source.locate(expert, rows.start)
            gguf.read_into(gguf.info(name), first * row_bytes, block)
        return blocks
    # One read, over the other half of a fused tensor too: it is as near as the next expert.
    stride = height if count == 1 else source.expert_rows
    blocks = np.empty((count, stride, row_bytes), np.uint8)
    wanted = ((count - 1) * stride + height) * row_bytes
    gguf.read_into(gguf.info(name), first * row_bytes, blocks.reshape(-1)[:wanted])
    return blocks[:, :height]


def _dequantise(rows: np.ndarray, ggml_type: GGMLQuantizationType) -> np.ndarray:
    # NaN scales make NumPy warn; whether they are an error is decided by counting them.
    with np.errstate(all="ignore"):
        return dequantize(rows, ggml_type)


@lru_cache
def _can_dequantise(ggml_type: GGMLQuantizationType) -> bool:
    # gguf-py has no public list. One block also makes it build its lookup tables, which threads must not race for.
    try:
        _dequantise(np.zeros((1, BLOCK_SIZES[ggml_type][1]), np.uint8), ggml_type)
    except NotImplementedError:
        return False
    return True


def _require_dequantisable(gguf: GgufFile, name: str, ggml_type: GGMLQuantizationType) -> None:
    if not _can_dequantise(ggml_type):
        raise GgufError(
            f"{gguf.path}: tensor {name!r} has type {ggml_type.name}, which can neither stay packed nor be"
            " dequantised: quantise the model to another type, such as Q4_K_M"
        )
