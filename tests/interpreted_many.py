"""A launch for many tokens, interpreted (interpreted.py): `interpreted_many.py CASE [FAULT]` says if there were races.

A product reads its stage of x when it is waited for, not when it is begun: that is as late as the tensor core may.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import interpreted
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import by_row, hidden
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import many_tokens, product, sorted_pairs, tiling
from pallas_kernels.decode import PART, TILE_FORMATS
from pallas_kernels.product import PARTS, TILE, Product, column_blocks
from pallas_kernels.semantics import Semantics
from pallas_kernels.tiling import Pipeline

WEIGHTS_FREE, X_FULL, X_FREE, UNIT_FREE = 1, 2, 3, 5  # of the kernel's barriers, by number


class Case(NamedTuple):
    makes: str
    formats: tuple[str, ...]
    outputs: int
    depth: int
    terms: int
    widths: tuple[int, ...]
    warpgroups: int
    pipeline: Pipeline
    groups: tuple[int, ...] = (9, 0, 21, 3)  # rows of x of each expert
    most_columns: int = sorted_pairs.MOST_COLUMNS  # of one product
    weighted: bool = False

    @property
    def rows(self) -> int:
        return sorted_pairs.rounded_up(sum(self.groups))

    @property
    def product(self) -> Product:
        numbers = self.makes, self.formats, self.outputs, self.depth, self.rows, self.terms
        return Product(*numbers, self.widths, self.warpgroups, weighted=self.weighted)


CASES = {
    "h, x by chunks": Case("h", ("q8_0", "q8_0"), 128, 768, 1, (16,), 4, Pipeline(2, 8, 4, True)),
    "h, x by parts": Case("h", ("q5_0", "q5_0"), 64, 768, 1, (24,), 2, Pipeline(2, 8, 4)),
    "y, two terms and widths": Case("out", ("q8_0",), 256, 512, 2, (24, 16), 2, Pipeline(3, 6, 1)),
    # A tile of two products; two of one each; one of two beside one of one.
    "y, two products": Case(
        "out", ("q8_0",), 128, 512, 1, (24,), 2, Pipeline(2, 5, 1), (20, 0, 27, 3, 36), 16, weighted=True
    ),
}
FREE_TOO_EARLY = "stages of x are free while they are multiplied"


class Call:
    """Random small integers in the places of one launch's operands, and the kernel over them."""

    def __init__(self, case: Case, rng: np.random.Generator):
        self.case, self.shape = case, case.product
        shape, groups = self.shape, case.groups
        self.x = rng.integers(0, 4, (shape.terms, case.rows, shape.depth)).astype(jnp.bfloat16)
        self.pair_weights = rng.integers(1, 4, case.rows).astype(np.float32)
        kinds = TILE_FORMATS[shape.formats[0]].planes
        self.planes = [
            interpreted.random_planes(kinds, len(groups), shape.outputs, shape.depth, rng) for _ in shape.formats
        ]
        self.last = np.cumsum(groups)

    def output(self) -> np.ndarray:
        """What the kernel should give of rows that are of a group."""
        terms = [j for _, j in many_tokens._term_products(self.shape.terms)]
        x = self.x[terms].astype(np.int64).sum(0)
        expert = np.repeat(np.arange(len(self.case.groups)), self.case.groups)
        kinds = TILE_FORMATS[self.shape.formats[0]].planes
        sums = []
        for planes in self.planes:
            each = zip(kinds, planes, strict=True)
            weights = _by_weight(kinds, [by_row(kind, array).astype(np.int64) for kind, array in each])
            sums.append(np.stack([weights[e] @ x[row] for row, e in enumerate(expert)]))
        if self.shape.makes == "h":
            return hidden(sums)
        return sums[0] * self.pair_weights[: len(expert), None] if self.shape.weighted else sums[0]

    def run(self, patch: pytest.MonkeyPatch, fault: str) -> np.ndarray:
        groups = self.case.groups
        for module in (sorted_pairs, product, many_tokens):
            patch.setattr(module, "MOST_COLUMNS", self.case.most_columns)
        _Block(self.shape, fault).replace(patch, self.case.pipeline)
        kernel = many_tokens.grouped_matmul(self.shape, Semantics(), (), 1)
        first, last = jnp.asarray(self.last - groups, jnp.int32), jnp.asarray(self.last, jnp.int32)
        most = sorted_pairs.most_tiles(self.case.rows, len(groups), self.shape.width)
        tiles = sorted_pairs.cut(first, last, jnp.int32(0), most, self.shape.width)
        planes = [jnp.asarray(plane) for planes in self.planes for plane in planes]
        extras = [jnp.asarray(self.pair_weights)] * self.shape.weighted
        [out] = kernel(*tiles, jnp.asarray(self.x), *planes, *extras)
        out = np.asarray(out).astype(np.float32)
        return (out[-1] if self.shape.makes == "h" else out)[: sum(groups)]


class _X(NamedTuple):
    """x's stages, and what of them a product multiplies."""

    ref: Any
    place: tuple[Any, ...] = ()

    @property
    def at(self) -> Any:
        return _At(lambda place: self._replace(place=place))

    @property
    def T(self) -> _X:
        return self


class _Sums(NamedTuple):
    """A warpgroup's accumulator, or the columns of one product; whoever reads it waits for all products."""

    ref: Any
    block: Any

    @property
    def at(self) -> Any:
        # Each product's columns are known by its number.
        return _At(lambda _: self)

    def __getitem__(self, _: Any) -> Any:
        self.block.free_too_early()
        self.block.finish(self.ref, 0)
        return self.ref[...]


class _At(NamedTuple):
    made: Any

    def __getitem__(self, place: Any) -> Any:
        return self.made(place)


class _Block(interpreted.Block):
    x: Any  # its stages
    # Each thread's accumulator; of a part that is begun its weights, its stage of x, whether there is one, and whether
    # with its second product.
    sums: Any
    weights: Any
    pending: Any

    def __init__(self, shape: Product, fault: str):
        super().__init__(shape.warpgroups, len(shape.formats) + 1)
        self.shape, self.fault = shape, fault
        self.begun: list[tuple] = []
        self.is_wide: Any = False
        self.part = 0

    def replace(self, patch: pytest.MonkeyPatch, pipeline: Pipeline) -> None:
        """many_tokens.py's names for what the interpreter does not know."""
        self.pipeline = pipeline
        replaced = self.modules()
        replaced["barriers"].fill = fill_x
        pallas, scopes = replaced["plgpu"], interpreted.namespace(pl)
        pallas.ACC, pallas.wgmma, pallas.wgmma_wait = lambda shape: shape, self.wgmma, self.wgmma_wait
        scopes.run_scoped = self.run_scoped
        operands = interpreted.namespace(many_tokens.operands)
        epilogues = interpreted.namespace(many_tokens.tile_epilogues)
        operands.part = self.operand
        epilogues.hidden, epilogues.output = (lambda *_: self.hidden_epilogue), (lambda *_: self.output_epilogue)
        replaced |= {
            "pl": scopes,
            "operands": operands,
            "tile_epilogues": epilogues,
            "View": lambda ref, *_: ref,
            "_write": _write,
            "_second_product": self.second_product,
        }
        for name, value in replaced.items():
            patch.setattr(many_tokens, name, value)
        patch.setattr(product, "tiled", lambda shape, dtype, _: plgpu.SMEM(shape, dtype))
        patch.setattr(Product, "packed", property(lambda _: False))  # no tables of factors
        patch.setattr(Product, "pipeline", lambda *_: pipeline)
        patch.setattr(tiling, "claim_registers", lambda *_: None)

    def kernel(self, body: Any, **options: Any) -> Any:
        planes, scratch = len(self.shape.planes), list(options["scratch_types"])
        own = [
            plgpu.SMEM((self.threads, TILE, self.shape.width), jnp.float32),
            plgpu.SMEM((self.threads, self.shape.terms, TILE, PART), jnp.float32),
            plgpu.SMEM((self.threads, 3), jnp.int32),
        ]

        def run(*refs):
            *refs, self.sums, self.weights, self.pending = refs
            at = len(refs) - len(scratch) + planes + self.shape.weighted
            self.x = refs[at]
            body(*refs[:at], _X(refs[at]), *refs[at + 1 :])

        return super().kernel(run, **options | {"scratch_types": [*scratch, *own]})

    def arrivals(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        shape, all_ = self.shape, self.shape.warpgroups
        blocks = len(column_blocks(shape.width))
        copies = len(shape.formats) * len(shape.planes), shape.terms * blocks, 1 + shape.weighted * blocks
        return list(zip((copies[0], all_, copies[1], all_, copies[2], all_, 1, 1), counts, strict=True))

    def awaited(self) -> list[tuple[int, Any, Any]]:
        thread, copies_x = lax.axis_index("warpgroup"), self.threads - 1
        multiplies, is_source = thread < self.copies, (thread >= self.copies) & (thread < copies_x)
        ours = [(kind, multiplies, thread == copies_x) for kind in (X_FREE, UNIT_FREE)]
        return [(WEIGHTS_FREE, multiplies, is_source), *ours]

    def wait(self, barriers: Any, place: Any, parity: Any) -> None:
        """Pallas' are waited for once, x of a whole chunk too."""
        if self.kind_of(barriers) == X_FULL and self.part % self.pipeline.span:
            return
        super().wait(barriers, place, parity)

    def run_scoped(self, function: Any, shape: tuple[int, int]) -> Any:
        ref = self.sums.at[lax.axis_index("warpgroup"), :, pl.ds(0, shape[1])]
        ref[...] = jnp.zeros(shape, jnp.float32)
        self.part = 0
        return function(_Sums(ref, self))

    def operand(self, name: str, planes: Sequence[Any], factors: Any, part: int, terms: int) -> list:
        """The weights of this warpgroup's rows, of each source one behind the other, once a term."""
        kinds, rows = TILE_FORMATS[name].planes, self.shape.rows.features
        mine = pl.ds(lax.axis_index("warpgroup") * rows, rows)
        arrays = []
        for plane, ref in zip(kinds, planes, strict=True):
            entries = pl.ds(part * PART // plane.per, max(PART // plane.per, 1))
            array = ref.at[(slice(None), mine, entries) if plane.by_row else (slice(None), entries, mine)][...]
            arrays.append(by_row(plane, array).astype(jnp.float32))
        return [_by_weight(kinds, arrays).reshape(TILE, PART)] * terms

    def arrive(self, barriers: Any, place: Any) -> None:
        if self.fault != FREE_TOO_EARLY or self.kind_of(barriers) != X_FREE:
            super().arrive(barriers, place)

    def free_too_early(self) -> None:
        """The fault: the stage of the part before, which is not multiplied yet."""
        thread = lax.axis_index("warpgroup")
        if self.fault == FREE_TOO_EARLY:
            is_begun = self.pending[thread, 1] == 1
            pl.when(is_begun)(lambda: interpreted.arrive(self.barriers[X_FREE], self.pending[thread, 0]))

    def second_product(self, is_wide: Any, add_product: Any) -> None:
        """Whether there is one is asked when it is multiplied."""
        self.is_wide = is_wide
        add_product()

    def wgmma(self, sums: _Sums, weights: Any, x: _X) -> None:
        if not self.begun:
            self.free_too_early()
        self.begun = [*self.begun, (sums.ref, weights, x.place)]

    def wgmma_wait(self, products: int) -> None:
        """For all products but this part's."""
        assert products == len(self.begun)
        self.finish(self.begun[0][0], self.part)
        thread = lax.axis_index("warpgroup")
        terms = [i for i, _ in many_tokens._term_products(self.shape.terms)]
        of_terms = self.begun[:: len(self.begun) // len(terms)]
        for i, (_, weights, (stage, *_)) in zip(terms, of_terms, strict=True):
            self.weights[thread, i] = weights
            self.pending[thread, 0] = jnp.int32(stage)
        self.pending[thread, 1] = jnp.int32(1)
        self.pending[thread, 2] = jnp.int32(self.is_wide)
        self.begun = []
        self.part = (self.part + 1) % PARTS

    def finish(self, sums: Any, part: int) -> None:
        """The products of the part before."""
        thread = lax.axis_index("warpgroup")
        depth = pl.ds((part - 1) % PARTS % self.pipeline.span * PART, PART)

        @pl.when(self.pending[thread, 1] == 1)
        def _():
            stage, columns = self.pending[thread, 0], sums.shape[1]
            for i, j in many_tokens._term_products(self.shape.terms):
                x = self.x[stage, j, pl.ds(0, columns), depth].astype(jnp.float32)
                multiplied = (jnp.arange(columns) < product.MOST_COLUMNS) | (self.pending[thread, 2] == 1)
                sums[...] = sums[...] + jnp.where(multiplied, self.weights[thread, i] @ x.T, 0.0)
            self.pending[thread, 1] = jnp.int32(0)

    def hidden_epilogue(self, sums, columns, expert, feature, h_ref, gate_ref, biases) -> None:
        h = hidden(list(sums.reshape(2, -1, sums.shape[1])))
        for term in range(self.shape.terms):
            self.store(h, columns, feature, h_ref.at[term])

    def output_epilogue(self, sums, columns, expert, feature, out_ref, bias_ref, scale_ref, weights_ref) -> None:
        if weights_ref is not None:
            sums = sums * weights_ref[pl.ds(0, sums.shape[1])]
        self.store(sums, columns, feature, out_ref)

    def store(self, values: Any, columns: Any, feature: Any, ref: Any) -> None:
        """Of the tile's own columns."""
        rows, width = values.shape
        features = pl.ds(feature + lax.axis_index("warpgroup") * rows, rows)

        def one(column, _):
            row = columns.begin + column

            @pl.when((row >= columns.first) & (row < columns.last))
            def _():
                ref[row, features] = lax.dynamic_index_in_dim(values, column, 1, keepdims=False).astype(ref.dtype)

        lax.fori_loop(0, width, one, None)


def fill_x(full: Any, place: Any, copies: Sequence[Any]) -> None:
    refs = [getattr(copy.target, "ref", copy.target) for copy in copies]
    interpreted.fill(full, place, [copy._replace(target=ref) for copy, ref in zip(copies, refs, strict=True)])


def _by_weight(kinds: Sequence[Any], arrays: Sequence[Any]) -> Any:
    """Planes [..., O, entries], added up for each weight."""
    repeat = np.repeat if isinstance(arrays[0], np.ndarray) else jnp.repeat
    each = zip(kinds, arrays, strict=True)
    return sum(number * repeat(array, plane.per, -1) for number, (plane, array) in enumerate(each, 1))


def _write(ref: Any, unit: Any) -> None:
    for i, word in enumerate(unit):
        ref[i] = jnp.int32(word)


def main(case: str, fault: str = "") -> None:
    call = Call(CASES[case], np.random.default_rng(0))
    with pytest.MonkeyPatch.context() as patch:
        out = call.run(patch, fault)
    interpreted.report(out, call.output(), fault)


if __name__ == "__main__":
    main(*sys.argv[1:])
