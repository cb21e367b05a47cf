"""Every packed format reads back gguf-py's dequantisation, bit for bit, from planes no larger than promised."""

from __future__ import annotations

from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances
from cases import HALVES, random_blocks, set_halves

from jmoe import FORMATS
from jmoe.formats import format_of_type

DATA = Path(__file__).parent / "data"
SMALLEST_NORMAL = np.finfo(np.float32).tiny

# Odd numbers of 32-weight blocks, one block only, and depths that real files hold (704, 1408: no multiple of 256).
DEPTHS = {32: (32, 96, 704), 256: (256, 768)}
NAME_AND_DEPTH = [(name, depth) for name, f in FORMATS.items() for depth in DEPTHS[f.block_weights]]

# Every kind of f16: subnormals, the smallest normal, the largest, zeros, and what is not finite.
EXTREME_HALVES = (2.0**-24, -(2.0**-15), 2.0**-14, 65504.0, -65504.0, -0.37, 0.0, -0.0, np.nan, np.inf, -np.inf)


def every_bit_random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """u8[..., O, row bytes] with no care for what the bytes mean."""
    return rng.integers(0, 256, (*shape[:-1], FORMATS[name].row_bytes(shape[-1])), np.uint8)


def assert_reads_back(name: str, blocks: np.ndarray, *, jit: bool = True) -> None:
    """dequantise(split(blocks)) has gguf-py's bits; NaN where gguf-py has NaN."""
    spec, expected = FORMATS[name], oracle.dequantise(blocks, name)
    dequantise = jax.jit(spec.dequantise) if jit else spec.dequantise
    weights = np.asarray(dequantise(jax.tree.map(jnp.asarray, spec.split(blocks))))
    assert weights.dtype == np.float32
    assert weights.shape == expected.shape
    if name == "mxfp4":
        weights, expected = flushed(weights), flushed(expected)
    np.testing.assert_array_equal(bits(weights), bits(expected))


def bits(weights: np.ndarray) -> np.ndarray:
    """u32; all NaN alike, since which payload survives a product is nobody's promise."""
    return np.where(np.isnan(weights), np.float32(np.nan), weights).view(np.uint32)


def flushed(weights: np.ndarray) -> np.ndarray:
    """What XLA's CPU backend makes of subnormal f32: zero. They occur for MXFP4 exponents below 2 only."""
    return np.where(np.abs(weights) < SMALLEST_NORMAL, np.float32(0), weights)


@pytest.mark.parametrize(("name", "depth"), NAME_AND_DEPTH)
def test_random_bytes_decode_to_the_bits_that_gguf_py_gives(name, depth, rng):
    rows = 4096 // depth + 3
    assert_reads_back(name, every_bit_random(rng, name, (3, rows, depth)))


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_without_jit_gives_the_same_bits(name, rng):
    assert_reads_back(name, every_bit_random(rng, name, (8, 3 * FORMATS[name].block_weights)), jit=False)


@pytest.mark.parametrize(("name", "offset"), [(name, offset) for name in FORMATS for offset in HALVES[name]])
def test_extreme_scales_decode_to_the_bits_that_gguf_py_gives(name, offset, rng):
    spec = FORMATS[name]
    blocks = random_blocks(rng, name, (len(EXTREME_HALVES), 5, 2 * spec.block_weights))
    for row, value in zip(blocks, EXTREME_HALVES, strict=True):
        set_halves(row.reshape(-1, spec.block_bytes), offset, value)
    assert_reads_back(name, blocks)


def test_every_mxfp4_exponent_with_every_code(rng):
    blocks = np.empty((256, 17), np.uint8)
    blocks[:, 0] = np.arange(256)
    blocks[:, 1:] = rng.permuted(np.tile(np.arange(16, dtype=np.uint8) * 17, (256, 1)), axis=-1)
    assert_reads_back("mxfp4", blocks)


def test_mxfp4_loses_no_weight_that_is_normal(rng):
    # Exponent bytes 0 and 1 scale by subnormal powers of two, but times 12 a weight may be normal again.
    blocks = np.zeros((2, 17), np.uint8)
    blocks[:, 0], blocks[:, 1:] = (0, 1), 0x76
    weights = np.asarray(FORMATS["mxfp4"].dequantise(jax.tree.map(jnp.asarray, FORMATS["mxfp4"].split(blocks))))
    expected = oracle.dequantise(blocks, "mxfp4")
    assert np.all(np.abs(expected) >= SMALLEST_NORMAL)
    np.testing.assert_array_equal(weights, expected)


@pytest.mark.parametrize("file", sorted(path.name for path in DATA.glob("*.gguf")))
def test_tensors_that_llama_cpp_quantised_decode_to_the_bits_that_gguf_py_gives(file):
    experts = [weight for name, weight in oracle.read_gguf(DATA / file).items() if "_exps" in name]
    assert len(experts) >= 3
    for weight in experts:
        assert_reads_back(weight.type_name.lower(), np.asarray(weight.blocks))


@pytest.mark.parametrize(("name", "depth"), NAME_AND_DEPTH)
def test_planes_are_integers_as_plane_specs_says_and_hardly_larger_than_the_file(name, depth, rng):
    spec, shape = FORMATS[name], (2, 3, 16, depth)
    blocks = every_bit_random(rng, name, shape)
    planes = spec.split(blocks)
    assert isinstance(planes, spec.planes)
    for plane, expected in zip(planes, spec.plane_specs(shape), strict=True):
        assert np.issubdtype(plane.dtype, np.integer)
        assert (plane.shape, plane.dtype) == (expected.shape, expected.dtype)
        assert plane.flags.c_contiguous
    assert spec.shape_of(planes) == shape
    assert spec.file_bytes(shape) == blocks.nbytes
    assert blocks.nbytes <= sum(plane.nbytes for plane in planes) <= tolerances.PLANE_BYTES * blocks.nbytes


@pytest.mark.parametrize(("name", "depth"), NAME_AND_DEPTH)
def test_join_gives_back_the_bytes_that_were_split(name, depth, rng):
    blocks = every_bit_random(rng, name, (2, 3, 7, depth))
    joined = FORMATS[name].join(FORMATS[name].split(blocks))
    assert joined.dtype == np.uint8
    np.testing.assert_array_equal(joined, blocks)


@pytest.mark.parametrize(("name", "depth"), NAME_AND_DEPTH)
def test_split_takes_views_and_any_leading_axes(name, depth, rng):
    # As a loader does with the gate half of a fused gate_up tensor.
    spec, blocks = FORMATS[name], every_bit_random(rng, name, (2, 6, depth))
    half = blocks[:, 3:]
    half.flags.writeable = False
    for plane, copied, alone in zip(spec.split(half), spec.split(half.copy()), spec.split(half[1].copy()), strict=True):
        np.testing.assert_array_equal(plane, copied)
        np.testing.assert_array_equal(plane[1], alone)


def test_q4_k_codes_are_the_bytes_of_the_file(rng):
    blocks = every_bit_random(rng, "q4_k", (5, 768))
    codes = FORMATS["q4_k"].split(blocks).codes
    np.testing.assert_array_equal(codes, blocks.reshape(5, 3, 144)[..., 16:].reshape(5, -1))


# What a weight of a nibble is, with a scale of 1: the value, less what is subtracted from it, modulo 16.
SUBTRACTED = {"q4_0": 8, "q5_0": 16, "q6_k": 32, "q4_1": 0, "q5_1": 0}
VALUES = {
    "mxfp4": gguf.quants.MXFP4.kvalues,
    "iq4_nl": gguf.quants.IQ4_NL.kvalues,
    "iq4_xs": gguf.quants.IQ4_NL.kvalues,
}


@pytest.mark.parametrize(
    ("name", "depth"),
    [(n, d) for n in (*SUBTRACTED, *VALUES) for d in ((64, 96) if FORMATS[n].block_weights == 32 else (512,))],
)
def test_repacked_low_nibbles_lie_in_the_order_of_q4_k(name, depth, rng):
    """Byte j of 32 holds weight j low and j + 32 high; the 16 bytes of an odd last block hold (i, i + 16)."""
    spec = FORMATS[name]
    blocks = every_bit_random(rng, name, (4, depth))
    by_block = blocks.reshape(4, -1, spec.block_bytes)
    if name == "mxfp4":
        by_block[..., 0] = 128
    for offset, half in zip(HALVES[name], (1.0, 0.0), strict=False):
        set_halves(by_block, offset, half)
    if name == "q6_k":
        by_block[..., 192:208] = 1
    if name == "iq4_xs":  # 32 + 1: of each, the high two bits and the low four
        by_block[..., 2:4], by_block[..., 4:8] = 0b10101010, 0x11
    weights = oracle.dequantise(blocks, name)
    codes = spec.split(blocks).codes
    even = depth // 64 * 64
    groups = codes[:, : even // 2].reshape(4, -1, 32)
    tail = codes[:, even // 2 :]
    low_nibbles = np.concatenate(
        [np.stack([groups & 15, groups >> 4], axis=-2).reshape(4, -1), tail & 15, tail >> 4], axis=-1
    )
    if name in VALUES:
        np.testing.assert_array_equal(np.array(VALUES[name])[low_nibbles], weights)
    else:
        np.testing.assert_array_equal(low_nibbles, (weights + SUBTRACTED[name]) % 16)


@pytest.mark.parametrize("name", FORMATS)
def test_count_nonfinite_counts_every_bad_scale_and_no_good_one(name, rng):
    spec = FORMATS[name]
    blocks = random_blocks(rng, name, (7, 4 * spec.block_weights)).reshape(7, 4, spec.block_bytes)
    count = lambda: spec.count_nonfinite(spec.split(blocks.reshape(7, -1)))  # noqa: E731
    if not HALVES[name]:
        blocks[..., 0] = 254
        assert count() == 0
        blocks[(0, 3), (1, 2), 0] = 255
        assert count() == 2
        return
    for offset in HALVES[name]:
        set_halves(blocks, offset, 65504.0)
    assert count() == 0
    for number, (offset, value) in enumerate((offset, v) for offset in HALVES[name] for v in (np.nan, np.inf, -np.inf)):
        set_halves(blocks[number : number + 1, 2], offset, value)
        assert count() == number + 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_agrees_with_ggml_about_its_block_and_is_found_by_its_type(name):
    spec = FORMATS[name]
    assert spec.name == name == spec.ggml_type.name.lower()
    assert gguf.GGML_QUANT_SIZES[spec.ggml_type] == (spec.block_weights, spec.block_bytes)
    assert format_of_type(spec.ggml_type) is spec


def test_types_without_a_packed_path_have_no_format():
    packed = {spec.ggml_type for spec in FORMATS.values()}
    assert {t for t in gguf.GGMLQuantizationType if format_of_type(t) is not None} == packed


@pytest.mark.parametrize("name", FORMATS)
def test_split_and_plane_specs_refuse_what_is_no_whole_number_of_blocks(name):
    spec = FORMATS[name]
    with pytest.raises(ValueError, match=rf"n \* {spec.block_bytes}\].*got uint8\[2, {spec.block_bytes + 1}\]"):
        spec.split(np.zeros((2, spec.block_bytes + 1), np.uint8))
    with pytest.raises(ValueError, match="got int8"):
        spec.split(np.zeros((2, spec.block_bytes), np.int8))
    with pytest.raises(ValueError, match=rf"{name}: depth must be a multiple of {spec.block_weights}"):
        spec.plane_specs((4, spec.block_weights + 16))
