"""What a packed format is to jmoe: a name, its planes and how to read them; of a GGUF type, its blocks too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
from gguf import GGMLQuantizationType


class Plane(NamedTuple):
    """One integer array of a packed projection ``[..., E, O, D]``.

    ``per`` weights share an entry. A row plane is ``[..., E, O, D / per]`` (bytes run along D, as wgmma and
    a CPU's vector loads want them); a column plane is ``[..., E, D / per, O]`` (a kernel loads the scales of
    one sub-block for many rows at once). ``per`` is a fraction where weights straddle entries.
    """

    dtype: Any
    per: int | Fraction
    by_row: bool


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A format that a QuantTensor may have.

    ``decode``: ``Planes -> f32[..., O, N, n]``, the weights with each row's ``D = N * n`` cut as the format reads best,
    traceable, bit-identical to gguf-py's dequantisation.
    ``layout``: the format's NamedTuple of planes, with a :class:`Plane` for every array.
    """

    name: str
    block_weights: int
    layout: Any
    decode: Callable[[Any], jax.Array]

    def dequantise(self, planes: Any) -> jax.Array:
        """``Planes -> f32[..., O, D]``."""
        pieces = self.decode(planes)
        return pieces.reshape(*pieces.shape[:-2], pieces.shape[-2] * pieces.shape[-1])

    @property
    def planes(self) -> type:
        """The NamedTuple class of this format's planes."""
        return type(self.layout)

    def plane_shapes(self, shape: tuple[int, ...]) -> Any:
        """The shape of every plane of a projection of ``shape = (..., O, D)``, in the planes' NamedTuple."""
        *lead, rows, depth = shape
        if depth % self.block_weights:
            raise ValueError(f"{self.name}: depth must be a multiple of {self.block_weights} weights, got {depth}")
        return self.planes(
            *((*lead, rows, depth // p.per) if p.by_row else (*lead, depth // p.per, rows) for p in self.layout)
        )

    def plane_specs(self, shape: tuple[int, ...]) -> Any:
        """Planes of ``jax.ShapeDtypeStruct`` for a projection of ``shape = (..., O, D)``."""
        shapes = self.plane_shapes(shape)
        return self.planes(*(jax.ShapeDtypeStruct(s, p.dtype) for s, p in zip(shapes, self.layout, strict=True)))

    def shape_of(self, planes: Any) -> tuple[int, ...]:
        """``(..., O, D)`` of the projection that the planes hold; every format's first plane is a row plane."""
        *lead, rows, entries = planes[0].shape
        return (*lead, rows, int(entries * self.layout[0].per))


@dataclass(frozen=True, kw_only=True)
class Format(Packed):
    """A GGUF type that stays packed.

    ``split``: NumPy ``blocks u8[..., O, bytes_of_a_row] -> Planes`` (arrays of the file's own bits, re-ordered).
    ``join``: its inverse, NumPy planes to the file's bytes: ``join(split(blocks))`` is ``blocks``, bit for bit.
    """

    ggml_type: GGMLQuantizationType
    block_bytes: int
    split: Callable[[np.ndarray], Any]
    join: Callable[[Any], np.ndarray]
    count_nonfinite: Callable[[Any], int]

    def row_bytes(self, depth: int) -> int:
        """Bytes that the file spends on one row of ``depth`` weights."""
        return depth // self.block_weights * self.block_bytes

    def file_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that the file spends on a projection of ``shape = (..., O, D)``."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])
