"""Layers of one signature as one stack with a leading layer axis, filled in place on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..stack import ExpertStack
from .placing import Placement, deleted_on_error


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedLayers:
    """Layers of one signature: ``stack``'s leaves are [L, E, ...], its entry i is the file's layer ``layers[i]``.

    ``moe_forward(stacked.stack, ..., layer=i)`` computes entry i.
    """

    layers: tuple[int, ...] = field(metadata={"static": True})
    stack: ExpertStack


class LayerStacker:
    """Takes the layers of ``specs`` (layer index -> stack of ``jax.ShapeDtypeStruct``) one by one.

    Layers with the same formats, shapes and optional leaves share a stack, in the order of ``specs``. ``stacks``
    holds the device arrays so far.
    """

    def __init__(self, specs: Mapping[int, ExpertStack], placement: Placement):
        self._placement = placement
        groups: dict[Any, int] = {}
        self._group_of = {layer: groups.setdefault(_signature(spec), len(groups)) for layer, spec in specs.items()}
        self._places: list[dict[int, int]] = [{} for _ in groups]
        for layer, group in self._group_of.items():
            self._places[group][layer] = len(self._places[group])
        self.stacks: dict[int, ExpertStack] = {}

    def add(self, layer_idx: int, stack: ExpertStack) -> None:
        """Write the layer's stack to its place; the caller may drop it afterwards."""
        group = self._group_of[layer_idx]
        places = self._places[group]
        with deleted_on_error(stack):
            if group not in self.stacks:
                self.stacks[group] = self._empty(stack, len(places))
            self.stacks[group] = _write_layer(self.stacks[group], stack, places[layer_idx])
            # Else the next layer would be placed while this one is still in memory.
            jax.block_until_ready(self.stacks[group])

    def result(self) -> tuple[StackedLayers, ...]:
        """All stacks; every layer must have been added."""
        return tuple(StackedLayers(tuple(places), self.stacks[group]) for group, places in enumerate(self._places))

    def _empty(self, stack: ExpertStack, count: int) -> ExpertStack:
        shardings = jax.tree.map(lambda leaf: self._placement.sharding(leaf.ndim + 1, stacked=True), stack)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), stack)
        zeros = jax.jit(lambda: jax.tree.map(jnp.zeros_like, shapes), out_shardings=shardings)
        return zeros()


def _signature(specs: ExpertStack) -> Any:
    leaves, tree = jax.tree.flatten(specs)
    return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@partial(jax.jit, donate_argnums=0)
def _write_layer(stacks: ExpertStack, stack: ExpertStack, place: jax.Array | int) -> ExpertStack:
    """``stacks[place] = stack``, in place: ``stacks`` is donated."""
    return jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, place, 0), stacks, stack)
