"""A kernel that only decodes a tile of 64 rows and 256 weights, and writes out what decode.py makes of the planes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import FORMATS
from pallas_kernels import decode, few_tokens, matrices, views
from pallas_kernels._compat import pl, plgpu
from pallas_kernels.registers import LHS, ROW, tiled

ROWS = 64


def decoder(name: str) -> Any:
    """``planes -> (values bf16[64, 256], shifts f32[B, 64], scales f32[B, 64], d f32[64], factors bf16[2, 64, 16],
    offsets f32[64])``; ones and zeros where a format has none."""
    tile_format = decode.TILE_FORMATS[name]
    blocks = decode.CHUNK // tile_format.weights
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    out_type = [bf16(ROWS, decode.CHUNK), f32(blocks, ROWS), f32(blocks, ROWS)]
    out_type += [f32(ROWS), bf16(2, ROWS, 16), f32(ROWS)]

    def body(*refs):
        count = len(tile_format.planes)
        planes_g, outputs = refs[:count], refs[count : count + len(out_type)]
        scratch = refs[count + len(out_type) :]
        planes_s, outputs_s, barrier = scratch[:count], scratch[count:-1], scratch[-1]
        for plane, origin, target in zip(tile_format.planes, planes_g, planes_s, strict=True):
            place = target if plane.by_row else target.at[0, pl.ds(0, decode.CHUNK // plane.per)]
            plgpu.copy_gmem_to_smem(origin, place, barrier)
        plgpu.barrier_wait(barrier)
        tile = tile_format.decode(*_as_read(name, tile_format.planes, planes_s))
        values, shifts, scales, d, factors, offsets = outputs_s
        filled = lambda value: plgpu.layout_cast(jnp.full(ROWS, value, jnp.float32), ROW)  # noqa: E731
        for i, block in enumerate(tile.sub_blocks):
            values.at[:, pl.ds(i * tile_format.weights, tile_format.weights)][...] = block.values
            shifts.at[i][...] = filled(block.shift)
            scales.at[i][...] = block.scale
        d[...] = filled(1.0) if tile.d is None else tile.d
        if tile.offset is None or tile.offset.scale is None:
            offsets[...] = filled(float(tile.offset is not None))
        else:
            offsets[...] = tile.offset.scale
        terms = [] if tile.offset is None else tile.offset.factors()
        for i in range(2):
            none = plgpu.layout_cast(jnp.zeros((ROWS, 16), jnp.bfloat16), LHS)
            factors.at[i][...] = terms[i] if i < len(terms) else none
        plgpu.commit_smem()
        for origin, target in zip(outputs_s, outputs, strict=True):
            plgpu.copy_smem_to_gmem(origin, target)
        plgpu.wait_smem_to_gmem(0)

    scratch = []
    for plane in tile_format.planes:
        entries, itemsize = decode.CHUNK // plane.per, jnp.dtype(plane.dtype).itemsize
        if plane.by_row:
            scratch.append(tiled((ROWS, entries), plane.dtype, min(128, entries * itemsize)))
        else:
            rows = few_tokens.column_rows(entries, ROWS, plane.dtype)
            scratch.append(plgpu.SMEM((1, rows, ROWS), plane.dtype))
    return plgpu.kernel(
        body,
        out_type=tuple(out_type),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        scratch_types=[
            *scratch,
            *(plgpu.SMEM(out.shape, out.dtype) for out in out_type),
            plgpu.Barrier(num_arrivals=len(tile_format.planes)),
        ],
    )


def _as_read(name: str, planes: Any, refs: Any) -> list[Any]:
    """The stage's planes as the few-token kernel reads them."""
    if not matrices.readable(name):
        return refs
    return [
        views.View(ref, matrices.row_of, min(128, ref.shape[1]))
        if plane.by_row
        else matrices.ColumnMatrix(ref.at[:, pl.ds(0, decode.CHUNK // plane.per)])
        for plane, ref in zip(planes, refs, strict=True)
    ]


def weights_of(
    name: str, values: Any, shifts: Any, scales: Any, d: Any, factors: Any, offsets: Any, rows: Any = None
) -> np.ndarray:
    """f32[64, 256]: the formula of decode.py for x one-hot, in float64, rounded once.

    ``rows``: of the result, which row a row of the planes is; else as the few-token kernel reads the format.
    """
    tile_format = decode.TILE_FORMATS[name]
    as_f64 = lambda array: np.asarray(array).astype(np.float64)  # noqa: E731
    if name == "mxfp4":
        codes, factor = as_f64(values) * 2.0**126, 2.0**-decode.E8M0_SHIFT
    else:
        codes, factor = as_f64(np.asarray(values).view(np.uint16)), 1.0
    if rows is None:
        rows = matrices.place_of_row(np.arange(ROWS)) if matrices.readable(name) else np.arange(ROWS)
    # And where a depth is.
    codes = codes[rows][:, np.argsort(_depths())]
    shifts, scales = (np.asarray(array)[:, rows] for array in (shifts, scales))
    d, factors, offsets = (as_f64(array) for array in (d, factors, offsets))
    d, factors, offsets = d[rows], factors.sum(0)[rows], offsets[rows]
    shifts, scales = (np.repeat(as_f64(array).T, tile_format.weights, axis=1) for array in (shifts, scales))
    column = lambda array: as_f64(array).reshape(-1, 1)  # noqa: E731
    each = np.repeat(factors, 16, axis=1)
    bias = 0 if each.any() else tile_format.bias
    weights = column(d) * scales * factor * (codes / 2.0**shifts - bias) + column(offsets) * each
    return weights.astype(np.float32)


def _depths() -> np.ndarray:
    """The depth of each place in a row of a tile: of sixteen, lane q's pairs (2q, 2q + 1) and (2q + 8, 2q + 9) hold
    depths 4q, 4q + 2 and 4q + 1, 4q + 3 (registers.py)."""
    within = np.array([4 * (p % 8 // 2) + 2 * (p % 2) + p // 8 for p in range(16)])
    return (16 * np.arange(decode.CHUNK // 16)[:, None] + within).reshape(-1)


def plane_specs(name: str) -> Any:
    return FORMATS[name].plane_specs((ROWS, decode.CHUNK))
