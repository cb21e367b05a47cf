"""What the kernels make of a tile's words, bit for bit, without a GPU: decode.py on NumPy (register_model.py)."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import register_model as model

import pallas_kernels
from jmoe import FORMATS

pytestmark = pytest.mark.skipif(
    not pallas_kernels.MIN_JAX <= jax.__version_info__ < pallas_kernels.BELOW_JAX,
    reason="the kernels need another jax, and say so",
)


def planes_of(name: str, blocks: np.ndarray) -> list[Any]:
    of_row = [plane.by_row for plane in FORMATS[name].layout]
    planes = FORMATS[name].split(blocks)
    return [
        model.RowPlane(plane) if by_row else model.ColumnPlane(plane)
        for plane, by_row in zip(planes, of_row, strict=True)
    ]


@pytest.mark.parametrize("name", sorted(pallas_kernels.DEPTHS))
def test_the_words_of_a_tile_become_the_weights_that_gguf_py_gives(name: str, rng: np.random.Generator) -> None:
    import tile_decoder

    from pallas_kernels import decode, registers

    blocks = cases.random_blocks(rng, name, (tile_decoder.ROWS, decode.CHUNK))
    with model.replaced(decode, registers):
        tile_format, planes = decode.TILE_FORMATS[name], planes_of(name, blocks)
        tile = tile_format.decode(*planes)
        values = np.concatenate([np.asarray(block.values) for block in tile.sub_blocks], axis=1)
        shifts = np.array([[block.shift] * tile_decoder.ROWS for block in tile.sub_blocks], np.float32)
        scales = np.array([block.scale for block in tile.sub_blocks])
        d = np.ones(tile_decoder.ROWS) if tile.d is None else tile.d
        factors, offsets = np.zeros((1, tile_decoder.ROWS, 16)), np.zeros(tile_decoder.ROWS)
        if tile.offset is not None:
            factors = np.array([f.astype(jnp.float32) for f in tile.offset.factors()])
            offsets = np.ones(tile_decoder.ROWS) if tile.offset.scale is None else tile.offset.scale
            # The other form of the same: an offset for each sub-block.
            by_row = np.array([tile.offset.row(b) for b in range(len(tile.sub_blocks))])
            np.testing.assert_array_equal(np.repeat(by_row.T, tile_format.weights // 16, axis=1), factors.sum(0))
        rows = np.arange(tile_decoder.ROWS)
        weights = tile_decoder.weights_of(name, values, shifts, scales, d, factors, offsets, rows)
        np.testing.assert_array_equal(weights, oracle.dequantise(blocks, name))

        # Part by part it is the same.
        parts = [tile_format.decode(*planes, parts=(part,)) for part in decode.ALL]
        pieces = [block for part in parts for block in part.sub_blocks]
        for piece, block in zip(pieces, tile.sub_blocks, strict=True):
            assert piece.shift == block.shift
            for one, other in ((piece.values, block.values), (piece.scale, block.scale)):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("name", sorted(pallas_kernels.DEPTHS))
def test_operands_are_the_weights_that_gguf_py_gives_to_8_bits_a_term(
    name: str, terms: int, rng: np.random.Generator
) -> None:
    from pallas_kernels import decode, operands, registers
    from pallas_kernels.x_tiles import X_SCALE

    blocks = cases.random_blocks(rng, name, (64, decode.CHUNK))
    exact = oracle.dequantise(blocks, name).astype(np.float64)
    with model.replaced(decode, operands, registers):
        planes = planes_of(name, blocks)
        factors = [operands.factors(name, planes, (part,)) for part in decode.ALL]
        parts = [operands.part(name, planes, factors[part], part, terms) for part in decode.ALL]
    assert {len(numbers) for numbers in factors} == {operands.stored_factors(name, whole=False)}
    found = [np.concatenate([np.asarray(part[i], np.float64) for part in parts], axis=1) for i in range(terms)]
    got = sum(found) * X_SCALE
    # With one term the neighbour that shares a register adds up to 2^-16 of itself; offsets are rounded to f32.
    step = np.abs(exact).max() * 2.0 ** (-14 if terms == 1 else -22)
    assert (np.abs(got - model.x_order(exact)) <= np.abs(model.x_order(exact)) * 2.0 ** (-8 * terms) + step).all()


# Where a block has d.
WHOLE = {"q2_k": 80, "q3_k": 108, "q4_k": 0, "q5_k": 0, "q6_k": 208}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("d", ["random", "zero"])
def test_operands_of_whole_scales_are_the_weights_rounded_once(name: str, d: str, rng: np.random.Generator) -> None:
    """In units of d, and beside them what is left of the mins, for the sums of x."""
    from pallas_kernels import decode, operands, registers
    from pallas_kernels.x_tiles import X_SCALE

    assert operands.has_whole_scales(name)
    blocks = cases.random_blocks(rng, name, (64, decode.CHUNK))
    if d == "zero":  # mins stay
        blocks[..., WHOLE[name] : WHOLE[name] + 2] = 0
    exact = oracle.dequantise(blocks, name).astype(np.float64)
    with model.replaced(decode, operands, registers):
        planes = planes_of(name, blocks)
        factors = operands.whole_factors(name, planes, decode.ALL)
        count = operands.stored_factors(name, whole=True)
        parts = [
            operands.whole_part(name, planes, factors.words[part * count : (part + 1) * count], part)
            for part in decode.ALL
        ]
    unit = np.asarray(factors.unit, np.float64)[:, None]
    np.testing.assert_allclose(unit[:, 0] * np.asarray(factors.inverse), 1, rtol=1e-6)
    got = np.concatenate([np.asarray(part, np.float64) for part in parts], axis=1) * X_SCALE * unit
    want = model.x_order(exact)
    rests = np.zeros((64, 16))
    if operands.has_mins(name):
        # Two of a word: of sixteens 32 weights apart, where x_rows.py has their sums 1 apart.
        words = np.stack([np.asarray(word) for word in factors.rests], axis=1)
        halves = np.ascontiguousarray(words).view(jnp.bfloat16).astype(np.float64) * X_SCALE * unit
        if halves.shape[1] == 8:
            rests = np.repeat(halves, 2, axis=1)
        else:
            rests = halves.reshape(64, 4, 2, 2).swapaxes(2, 3).reshape(64, 16)
    got += np.repeat(rests, 16, axis=1)
    # A weight's rounding is of what the tensor core multiplies, the rest apart.
    step = np.abs(exact).max() * 2.0**-15
    assert (np.abs(got - want) <= np.abs(want) * 2.0**-8 + step).all()
    assert np.square(got - want).sum() <= 1e-5 * np.square(want).sum()


@pytest.mark.parametrize("name", sorted(pallas_kernels.DEPTHS))
def test_a_tile_s_planes_are_those_of_the_format(name: str) -> None:
    from pallas_kernels.decode import TILE_FORMATS

    found = [(np.dtype(plane.dtype), plane.per, plane.by_row) for plane in TILE_FORMATS[name].planes]
    assert found == [(np.dtype(plane.dtype), plane.per, plane.by_row) for plane in FORMATS[name].layout]


def test_there_is_a_kernel_for_every_format() -> None:
    assert set(pallas_kernels.DEPTHS) == set(FORMATS)
