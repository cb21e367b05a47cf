"""``out[p, o] = sum_d w[ids[p], o, d] * x[p // (P / X), d]``: the Metal kernels in ``kernels/``, and their launch.

``metal_bridge.mlx`` does so; this module needs no MLX.
"""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

FORMATS = ("q4_k", "q6_k")

# Outputs of a simdgroup, which share their reads of x, and simdgroups of a threadgroup. Not tuned: no Mac to time on.
ROWS, SIMDGROUPS = 4, 2
LANES = 32


class Launch(NamedTuple):
    """Arguments of ``mlx.core.fast.metal_kernel`` and of the kernel that it makes."""

    name: str
    input_names: tuple[str, ...]
    source: str
    template: tuple[tuple[str, int], ...]
    grid: tuple[int, int, int]  # threads
    threadgroup: tuple[int, int, int]
    output_shape: tuple[int, int]


def launch(format_name: str, fields: tuple[str, ...], codes: tuple[int, ...], vectors: int, pairs: int) -> Launch:
    """For planes ``fields`` with ``codes`` of shape u8[E, O, D/2], x [vectors, D] and ids [pairs]."""
    experts, rows, nbytes = codes
    if format_name not in FORMATS:
        raise ValueError(f"there are kernels for {' and '.join(FORMATS)}, not for {format_name}")
    if vectors == 0 or pairs % vectors:
        raise ValueError(f"x must have a row for each of the {pairs} ids, or for equal runs of them, got {vectors}")
    name = f"gemv_{format_name}"
    sizes = {"E": experts, "O": rows, "D": 2 * nbytes, "SHARE": pairs // vectors, "ROWS": ROWS}
    threads = LANES * SIMDGROUPS
    groups = -(-rows // (ROWS * SIMDGROUPS))
    return Launch(
        name=name,
        input_names=(*fields, "x", "ids"),
        source=(files("metal_bridge") / "kernels" / f"{name}.metal").read_text(encoding="utf-8"),
        template=tuple(sizes.items()),
        grid=(threads * groups, pairs, 1),
        threadgroup=(threads, 1, 1),
        output_shape=(pairs, rows),
    )
