"""From an open file to pytrees: one layer, or all MoE layers, apart or stacked.

A layer is read projection by projection, each put on its device before the next is read; on the CPU backend the
arrays take over the host buffers without a copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, overload

from ..stack import ExpertStack
from .errors import GgufError
from .file import GgufFile
from .names import ExpertLayer, expert_names, find_expert_layer
from .placing import Placement, deleted_on_error, out_of_memory_explained
from .planes import layer_specs, read_optional, read_projection
from .shards import StrPath
from .stacking import LayerStacker
from .stacking import StackedLayers as StackedLayers


def load_expert_stack(
    gguf: GgufFile,
    layer_idx: int,
    num_experts: int | None = None,
    hidden_size: int | None = None,
    expert_intermediate: int | None = None,
    *,
    device: Any = None,
    sharding: Any = None,
    check_finite: bool = True,
) -> ExpertStack:
    """The experts of one layer of an open file, packed as the file holds them.

    Sizes that are given must match the file's. ``device`` or ``sharding`` (of the axes [E, ...]) says where the
    arrays go. Types without a packed path become dense float32 with a DenseFallbackWarning.

    Raises TypeError where ``layer_idx`` is no int, GgufError for a layer without experts, sizes that differ, a
    malformed or changing file, non-finite scales (unless ``check_finite=False``), or too little memory.
    """
    layer = find_expert_layer(gguf, layer_idx)
    _check_sizes(gguf, layer, num_experts, hidden_size, expert_intermediate)
    placement = Placement(device, sharding)
    specs = layer_specs(gguf, layer)
    what = f"{gguf.path}: layer {layer.layer_idx}"
    placement.require_bytes([specs], what)
    with out_of_memory_explained(what, specs.nbytes, placement.devices):
        return read_experts(gguf, layer, specs, placement, check_finite)


@overload
def load_expert_stacks(
    path: StrPath,
    layers: Iterable[int] | None = None,
    *,
    stacked: Literal[False] = False,
    progress: bool = True,
    device: Any = None,
    sharding: Any = None,
    check_finite: bool = True,
) -> dict[int, ExpertStack]: ...
@overload
def load_expert_stacks(
    path: StrPath,
    layers: Iterable[int] | None = None,
    *,
    stacked: Literal[True],
    progress: bool = True,
    device: Any = None,
    sharding: Any = None,
    check_finite: bool = True,
) -> tuple[StackedLayers, ...]: ...
def load_expert_stacks(
    path: StrPath,
    layers: Iterable[int] | None = None,
    *,
    stacked: bool = False,
    progress: bool = True,
    device: Any = None,
    sharding: Any = None,
    check_finite: bool = True,
) -> dict[int, ExpertStack] | tuple[StackedLayers, ...]:
    """All MoE layers of the file at ``path``, or those in ``layers``: layer index -> stack, in the order given.

    With ``stacked=True`` one StackedLayers for each signature (formats, shapes, optional leaves), in the order in
    which the signatures first occur; never more than one layer beside them is held. ``progress`` shows a bar.
    The other arguments, warnings and errors are those of ``load_expert_stack``.
    """
    with GgufFile(path) as gguf:
        names = expert_names(gguf.tensors)
        if not names:
            raise GgufError(f"{gguf.path}: the file has no MoE layers: no tensor is named blk.N.ffn_up_exps.weight")
        found = [find_expert_layer(gguf, layer, names) for layer in (names if layers is None else layers)]
        plan = {layer.layer_idx: (layer, layer_specs(gguf, layer)) for layer in found}
        if not plan:
            return () if stacked else {}
        specs_of = {index: specs for index, (_, specs) in plan.items()}
        what, nbytes = f"{gguf.path}: loading {len(plan)} layer(s)", sum(specs.nbytes for specs in specs_of.values())
        placement = Placement(device, sharding)
        placement.require_bytes(list(specs_of.values()), what, stacked=stacked)
        from tqdm import tqdm  # here, so that `import jmoe` stays light

        stacker = LayerStacker(specs_of if stacked else {}, placement)
        stacks: dict[int, ExpertStack] = {}
        keep = stacker.add if stacked else stacks.__setitem__
        with out_of_memory_explained(what, nbytes, placement.devices), deleted_on_error((stacks, stacker.stacks)):
            for layer, specs in tqdm(plan.values(), "loading experts", unit="layer", disable=not progress):
                # Not named here: a name would hold this layer while the next one is loaded.
                keep(layer.layer_idx, read_experts(gguf, layer, specs, placement, check_finite))
        return stacker.result() if stacked else stacks


def _check_sizes(
    gguf: GgufFile, layer: ExpertLayer, num_experts: int | None, hidden_size: int | None, inner: int | None
) -> None:
    for name, given, found in (
        ("num_experts", num_experts, layer.num_experts),
        ("hidden_size", hidden_size, layer.hidden_size),
        ("expert_intermediate", inner, layer.expert_intermediate),
    ):
        if given is not None and given != found:
            raise GgufError(
                f"{gguf.path}: {name}={given} was given, but layer {layer.layer_idx} has {found} ({layer.up} of shape"
                f" {list(layer.up.shape)}): leave it out to take the file's"
            )


def read_experts(
    gguf: GgufFile, layer: ExpertLayer, specs: ExpertStack, placement: Placement, check_finite: bool
) -> ExpertStack:
    """The layer's stack on its devices; ``specs`` are its ``layer_specs``."""
    leaves: dict[str, Any] = {}
    with deleted_on_error(leaves), ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as executor:
        for kind, source in (("gate", layer.gate), ("up", layer.up), ("down", layer.down)):
            if source is not None:
                leaves[kind] = placement.put(read_projection(gguf, source, executor, check_finite))
        for leaf, name in layer.optional.items():
            shape = getattr(specs, leaf).shape
            leaves[leaf] = placement.put(read_optional(gguf, name, shape, check_finite))
        gguf.check_unchanged()
    return ExpertStack(**{"gate": None, **leaves})
