"""A kernel in Pallas' GPU interpret mode: a block's threads at the same time, and their races.

The interpreter knows no code in MLIR. So roles, rings, schedule and the order of what is awaited are the kernel's own;
a warp's barriers and copies become Pallas' (a copy is an arrival there, and a barrier knows how often each thread has
waited), warps that copy become threads, and what is computed is replaced by sums of small integers: any byte of weights
or x that is read at the wrong time, or of the wrong place, changes them. The interpreter runs one block after another,
and blocks wait for each other: so there is one. jax's CPU needs a thread for each one that waits: ``NPROC`` says how
many it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.barriers import Turn
from pallas_kernels.x_tiles import GROUP


class Block:
    """One block's threads: stand-ins for ``barriers``, ``plgpu`` and ``lax`` in a kernel's module."""

    barriers: list[Any]
    counts: list[int]

    def __init__(self, roles: int, copying: int):
        self.copies = roles  # the first thread that copies; those before it are warpgroups
        self.threads = roles + copying

    def modules(self) -> dict[str, Any]:
        barriers = SimpleNamespace(
            WARPS=1,
            scratch=self.scratch,
            initialised=self.initialised,
            wait=self.wait,
            arrive=self.arrive,
            refill=self.refill,
            fill=fill,
            warp_of_warpgroup=lambda: lax.axis_index("warpgroup") - self.copies,
        )
        pallas, loops = namespace(plgpu), namespace(lax)
        pallas.kernel, pallas.set_max_registers = self.kernel, lambda *_, **__: None
        loops.axis_index = self.axis_index
        return {"barriers": barriers, "plgpu": pallas, "lax": loops}

    def kernel(self, body: Any, **options: Any) -> Any:
        def run(*refs):
            body(*refs)
            self.drain()

        options["num_threads"] = self.threads
        return plgpu.kernel(run, **options, interpret=plgpu.InterpretGPUParams(detect_races=True))

    def axis_index(self, name: str) -> Any:
        """Threads that copy are warps of one warpgroup."""
        index = lax.axis_index(name)
        return jnp.minimum(index, self.copies) if name == "warpgroup" else index

    def arrivals(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        """(how many, how many barriers) of each kind."""
        raise NotImplementedError

    def awaited(self) -> list[tuple[int, Any, Any]]:
        """(kind of barrier by which something is free, whether this thread frees it, whether it waits for that)."""
        raise NotImplementedError

    def scratch(self, counts: Sequence[int]) -> list:
        return [plgpu.Barrier(num_arrivals=n, num_barriers=count) for n, count in self.arrivals(counts)]

    def initialised(self, refs: Sequence[Any], counts: Sequence[int], arrivals: Any, warpgroups: int) -> list:
        """Pallas' barriers have no completion behind them: all that is free is freed once."""
        self.barriers, self.counts = list(refs), [count for _, count in self.arrivals(counts)]
        for kind, frees, _ in self.awaited():
            pl.when(frees)(lambda kind=kind: self.each(kind, arrive))
        return self.barriers[: len(counts)]

    def drain(self) -> None:
        """The interpreter wants a thread that waited for a barrier to have seen all of its completions."""
        for kind, _, waits in self.awaited():
            pl.when(waits)(lambda kind=kind: self.each(kind, wait))

    def each(self, kind: int, visit: Callable[[Any, int], None]) -> None:
        for place in range(self.counts[kind]):
            visit(self.barriers[kind], place)

    def kind_of(self, barriers: Any) -> int:
        return next(i for i, one in enumerate(self.barriers) if one is barriers)

    def wait(self, barriers: Any, place: Any, parity: Any) -> None:
        wait(barriers, place)

    def arrive(self, barriers: Any, place: Any) -> None:
        arrive(barriers, place)

    def refill(self, full: Any, free: Any, turn: Turn, copies: Sequence[Any]) -> Turn:
        wait(free, turn.place)
        fill(full, turn.place, copies)
        return turn.next(self.counts[self.kind_of(full)])


def wait(barriers: Any, place: Any) -> None:
    plgpu.barrier_wait(barriers.at[place])


def arrive(barriers: Any, place: Any) -> None:
    """The interpreter wants a fence before a copy writes what a thread has read; on the chip the barrier is enough."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(barriers.at[place])


def fill(full: Any, place: Any, copies: Sequence[Any]) -> None:
    def dynamic(rows: Any) -> Any:
        return pl.ds(rows.start, rows.stop - rows.start) if isinstance(rows, slice) else rows

    for copy in copies:
        source = copy.origin.at[tuple(pl.ds(*w) if isinstance(w, tuple) else w for w in copy.window)]
        plgpu.copy_gmem_to_smem(source, copy.target.at[tuple(map(dynamic, copy.place))], full.at[place])


def namespace(module: Any) -> SimpleNamespace:
    return SimpleNamespace(**{name: getattr(module, name) for name in dir(module) if not name.startswith("__")})


def random_planes(kinds: Sequence[Any], experts: int, outputs: int, depth: int, rng: np.random.Generator) -> list:
    """0 to 3, exact in any of their dtypes."""
    shapes = [(outputs, depth // p.per) if p.by_row else (depth // p.per, outputs) for p in kinds]
    return [
        rng.integers(0, 4, (experts, *shape)).astype(plane.dtype) for plane, shape in zip(kinds, shapes, strict=True)
    ]


def by_row(plane: Any, array: Any) -> Any:
    """[..., O, entries], of a column plane too."""
    return array if plane.by_row else array.swapaxes(-1, -2)


def entries_by_group(array: Any, per: int) -> Any:
    """[..., D / per] -> [..., D / 32]: a group's sum; what more than a group shares counts in its first."""
    if per <= GROUP:
        return array.reshape(*array.shape[:-1], -1, GROUP // per).sum(-1)
    pad = np.pad if isinstance(array, np.ndarray) else jnp.pad
    return pad(array[..., None], [(0, 0)] * array.ndim + [(0, per // GROUP - 1)]).reshape(*array.shape[:-1], -1)


def hidden(sums: list) -> Any:
    return sum(number * part for number, part in enumerate(sums, 1)) % 5


def report(found: np.ndarray, wanted: np.ndarray, fault: str) -> None:
    """What a program says. A fault may give anything."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    if not fault:
        np.testing.assert_array_equal(found, wanted)
    print("races" if interpreter.get_races().races_found else "no races")
