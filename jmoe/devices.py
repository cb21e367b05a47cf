"""Where concrete arrays lie, checked at the doors: on the same devices, whole, in a process that can compute.

Tracers are left to jax. A call costs a few microseconds for each leaf of the stack, and nothing under jit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from .stack import ExpertStack

_FIX_AXES = (
    "jmoe leaves partitioning to XLA: make the mesh with axis_types=(jax.sharding.AxisType.Auto, ...), or call inside"
    " jax.shard_map(..., check_vma=False), or take jmoe.parallel, which does."
)


def check_devices(stack: ExpertStack, *, explicit_axes: bool = False, **arguments: Any) -> str | None:
    """ValueError where arrays were put on different devices, or are sharded by Explicit axes of a mesh.

    ``explicit_axes``: whether the caller sees to those. Returns the platform that they were put on; None where jax may
    still choose.
    """
    stack_leaves = {f"stack.{name}": getattr(stack, name) for name in stack.__dataclass_fields__}
    first: tuple[str, tuple[Any, ...]] | None = None
    for name, array in _concrete({**stack_leaves, **arguments}):
        if not explicit_axes and (axis := next(filter(None, _explicit_axes(array)), None)):
            raise ValueError(f"{name} is sharded by the Explicit mesh axis {axis!r}. {_FIX_AXES}")
        if not array.committed:
            continue
        devices = _devices(array)
        first = first or (name, devices)
        if devices != first[1]:
            raise ValueError(
                f"{name} is on {_shown(devices)}, but {first[0]} on {_shown(first[1])}. Put all arguments on the same"
                " devices, in the same order: jax.device_put(x, device or sharding)."
            )
    return first[1][0].platform if first else None


def check_rows(array: Any, name: str) -> None:
    """ValueError where an Explicit axis of a mesh shards an array along another axis than its first."""
    for _, concrete in _concrete({name: array}):
        if axis := next(filter(None, _explicit_axes(concrete)[1:]), None):
            raise ValueError(f"the rows of {name} are sharded by the Explicit mesh axis {axis!r}. {_FIX_AXES}")


_first_pid: int | None = None


def check_process() -> None:
    """RuntimeError in a process that was forked from one that had loaded or computed: jax would hang in it."""
    global _first_pid
    _first_pid = _first_pid or os.getpid()
    if _first_pid != os.getpid():
        raise RuntimeError(
            f"process {os.getpid()} was forked from process {_first_pid}, which had loaded or computed with jmoe. JAX"
            " does not survive a fork: computing here would hang. Start processes with"
            ' multiprocessing.get_context("spawn").'
        )


def _concrete(arguments: dict[str, Any]) -> Iterator[tuple[str, jax.Array]]:
    for name, argument in arguments.items():
        for leaf in jax.tree.leaves(argument):
            if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
                yield name, leaf


def _explicit_axes(array: jax.Array) -> list[str | None]:
    """For each axis of the array the Explicit mesh axis that shards it, or None."""
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        return []
    mesh = sharding.mesh
    explicit = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in sharding.spec]
    return [next((axis for axis in axes if axis in explicit), None) for axes in entries]


def _devices(array: jax.Array) -> tuple[Any, ...]:
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        return tuple(np.ravel(sharding.mesh.devices))
    return tuple(sorted(sharding.device_set, key=lambda device: device.id))


def _shown(devices: tuple[Any, ...]) -> str:
    more = f" and {len(devices) - 8} more" if len(devices) > 8 else ""
    return ", ".join(map(str, devices[:8])) + more
