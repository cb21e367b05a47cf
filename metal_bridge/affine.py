"""GGUF formats as MLX's affine format: ``w = scale * q + bias`` for groups of 32 weights, exact in f32.

| format | bits | code q   | scale     | bias           |
|--------|-----:|----------|-----------|----------------|
| q4_k   |    4 | q        | d * sc    | -dmin * m      |
| q5_k   |    5 | q        | d * sc    | -dmin * m      |
| q4_0   |    4 | q        | d         | -8 d           |
| q4_1   |    4 | q        | d         | m              |
| q5_0   |    5 | q        | d         | -16 d          |
| q5_1   |    5 | q        | d         | m              |
| q8_0   |    8 | q + 128  | d         | -128 d         |
| mxfp4  |    5 | v + 12   | 2^(e-128) | -12 * 2^(e-128)|

scale * q has at most 22 significant bits, and so has bias: each is exact in f32, and the sum rounds once where the bias
is a min of its own (as gguf-py's does) and not at all for the others. With f16 scales, as MLX's own models have, d * sc
would round. Only a zero may have the other sign; an infinite scale gives NaN where the weight may have been infinite;
MXFP4 blocks with e < 2, whose scale f32 holds as a subnormal, become zero.

Q6_K, Q3_K and Q2_K have groups of 16 weights, which MLX refuses; IQ4's sixteen values would take eight bits. MXFP4's
values v (0 1 2 3 4 6 8 12 and their negatives) take five bits as integers; MLX has a mode of its own for it, in four,
that jax-mps does not expose (``metal_bridge.mlx`` does).

Groups of 32 weights with two f32 numbers take 2 bits a weight beside the codes: 6, 7 and 10 bits a weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

GROUP = 32

# The largest E8M0 byte whose block stays finite as scale * q + bias: 24 * 2^(e - 128) < 2^128.
_MXFP4_LARGEST = 251


class Affine(NamedTuple):
    """``w = scales * codes + biases`` of a projection [..., O, D], what MLX calls w, scales and biases."""

    words: np.ndarray  # u32 [..., O, D/32 * bits]  codes one after the other, from the low bits of each word
    scales: np.ndarray  # f32 [..., O, D/32]
    biases: np.ndarray  # f32 [..., O, D/32]


def to_affine(format_name: str, planes: Any) -> Affine:
    """jmoe's planes of a format in ``BITS`` -> the same weights as MLX's affine format, a few experts at a time.

    ``planes``: the format's NamedTuple of arrays [..., O, ...], read by field name. Raises ValueError for a format that
    has no affine form, and for MXFP4 weights so large (2^127) that scale * q would overflow.
    """
    if format_name not in BITS:
        raise ValueError(f"{format_name} has no MLX affine form; {', '.join(BITS)} have one")
    bits, read = _READERS[format_name]
    planes = type(planes)(*map(np.asarray, planes))
    *lead, rows, entries = planes.codes.shape
    # An s8 holds one code, a byte of the other formats two.
    groups = entries * (1 if planes.codes.dtype == np.int8 else 2) // GROUP
    out = Affine(
        np.empty((*lead, rows, groups * bits), np.uint32),
        np.empty((*lead, rows, groups), np.float32),
        np.empty((*lead, rows, groups), np.float32),
    )

    def convert(index: tuple[int, ...]) -> None:
        # Scales that are no numbers, which the loader lets in on request, make weights that are none.
        with np.errstate(invalid="ignore"):
            codes, scales, biases = read(type(planes)(*(plane[index] for plane in planes)))
        out.words[index] = pack(codes, bits)
        out.scales[index], out.biases[index] = scales.T, biases.T

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as executor:
        list(executor.map(convert, np.ndindex(*lead)))
    return out


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """u8[..., D] codes -> u32[..., D * bits / 32], code i in bits [i * bits, (i + 1) * bits) of the row, low first."""
    # Two, four, then eight codes side by side: eight fill `bits` whole bytes.
    joined = codes
    for width, kind in ((bits, "<u2"), (2 * bits, "<u4"), (4 * bits, "<u8")):
        joined = joined[..., ::2].astype(kind) | joined[..., 1::2].astype(kind) << np.array(width, kind)
    used = np.ascontiguousarray(joined[..., None].view(np.uint8)[..., :bits])
    return used.reshape(*codes.shape[:-1], -1).view("<u4").astype(np.uint32, copy=False)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """u8[O, D/2] in Q4_K's order -> u8[O, D].

    Each 32 bytes hold 64 weights, j low and j + 32 high; an odd last block is 16 bytes of (i, i + 16).
    """
    rows, nbytes = codes.shape
    even = nbytes - nbytes % 32
    halves = [(codes[:, :even], 32), (codes[:, even:], 16)]
    parts = [np.stack([c & 15, c >> 4], axis=-2) for c in (part.reshape(rows, -1, width) for part, width in halves)]
    return np.concatenate([part.reshape(rows, -1) for part in parts], axis=-1)


def half(bits: np.ndarray) -> np.ndarray:
    """u16 f16 bits -> f32, exact."""
    return bits.view(np.float16).astype(np.float32)


# Each reader: one expert's planes -> (u8 codes [O, D], f32 scales [D/32, O], f32 biases [D/32, O]).
_Read = tuple[np.ndarray, np.ndarray, np.ndarray]


def _k_scales(planes: Any) -> tuple[np.ndarray, np.ndarray]:
    scales = np.repeat(half(planes.d), 8, axis=0) * planes.scales.astype(np.float32)
    return scales, -np.repeat(half(planes.dmin), 8, axis=0) * planes.mins.astype(np.float32)


def _q4_k(planes: Any) -> _Read:
    return nibbles(planes.codes), *_k_scales(planes)


def _q5_k(planes: Any) -> _Read:
    rows = planes.high.shape[0]
    # Bit s of byte j of 32 is the fifth bit of weight j of sub-block s.
    high = planes.high.reshape(rows, -1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return nibbles(planes.codes) | high.reshape(rows, -1) << 4, *_k_scales(planes)


def _q4_0(planes: Any) -> _Read:
    d = half(planes.d)
    return nibbles(planes.codes), d, -8 * d


def _q4_1(planes: Any) -> _Read:
    return nibbles(planes.codes), half(planes.d), half(planes.m)


def _q5_0(planes: Any) -> _Read:
    d = half(planes.d)
    return _with_fifth_bits(planes), d, -16 * d


def _q5_1(planes: Any) -> _Read:
    return _with_fifth_bits(planes), half(planes.d), half(planes.m)


def _with_fifth_bits(planes: Any) -> np.ndarray:
    high = (planes.high.T[..., None] >> np.arange(32, dtype=np.uint32) & 1).astype(np.uint8)
    return nibbles(planes.codes) | high.reshape(planes.codes.shape[0], -1) << 4


def _q8_0(planes: Any) -> _Read:
    d = half(planes.d)
    # s8 + 128 is the byte with its sign bit flipped.
    return planes.codes.view(np.uint8) ^ 128, d, -128 * d


def _mxfp4(planes: Any) -> _Read:
    if np.max(planes.e, initial=0) > _MXFP4_LARGEST:
        raise ValueError(
            f"an MXFP4 block has the exponent byte {np.max(planes.e)}, at most {_MXFP4_LARGEST} fits MLX's affine"
            " format: leave this projection as it is"
        )
    m = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
    # A GPU may flush a subnormal scale and keep the bias, which is none: so both are zero.
    scales = np.where(planes.e < 2, 0, np.ldexp(np.float32(1), planes.e.astype(np.int32) - 128)).astype(np.float32)
    return (np.concatenate([m, -m]) + 12).astype(np.uint8)[nibbles(planes.codes)], scales, -12 * scales


_READERS: dict[str, tuple[int, Callable[[Any], _Read]]] = {
    "q4_k": (4, _q4_k),
    "q5_k": (5, _q5_k),
    "q5_0": (5, _q5_0),
    "q8_0": (8, _q8_0),
    "q4_0": (4, _q4_0),
    "mxfp4": (5, _mxfp4),
    "q5_1": (5, _q5_1),
    "q4_1": (4, _q4_1),
}

BITS = {name: bits for name, (bits, _) in _READERS.items()}
