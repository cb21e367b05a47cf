"""Find the expert tensors of a layer by name, and check them against one another and the metadata.

    blk.N.ffn_{gate,up,down}_exps.weight    [E, O, D]
    blk.N.ffn_gate_up_exps.weight           [E, 2I, H]    rows [0, I) gate, [I, 2I) up
    blk.N.ffn_{gate,up,down}.e.weight       [O, D]        old files: one tensor an expert
    blk.N.ffn_{gate,up,down}_exps.bias      [E, O]        blk.N.ffn_down_exps.scale  [E]

Sizes come from the tensors; a number of the metadata is compared with them and never looped over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType

from .architectures import Architecture, architectures
from .errors import GgufError
from .file import GgufFile
from .sizes import check_metadata

# At most six digits and no leading zero: one spelling for every index, and none that int() is slow on.
_INDEX = r"(0|[1-9][0-9]{0,5})"
_STACKED = re.compile(rf"blk\.{_INDEX}\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale)", re.ASCII)
_ONE_EXPERT = re.compile(rf"blk\.{_INDEX}\.ffn_(gate|up|down)\.{_INDEX}\.weight", re.ASCII)
_OPTIONAL = {"gate_bias": "gate.bias", "up_bias": "up.bias", "down_bias": "down.bias", "down_scale": "down.scale"}


class Source(NamedTuple):
    """Where a projection of ``shape`` (E, O, D) stands: in one stacked tensor, or in one tensor an expert.

    In a stacked tensor expert e's rows start at ``e * expert_rows + first_row``; expert_rows is 2I where gate
    and up are fused, first_row is I for their up.
    """

    names: tuple[str, ...]
    ggml_type: GGMLQuantizationType
    shape: tuple[int, int, int]
    expert_rows: int
    first_row: int = 0

    def locate(self, expert: int, row: int) -> tuple[str, int]:
        """The tensor that holds this row of this expert, and the row's number within that tensor."""
        if len(self.names) == 1:
            return self.names[0], expert * self.expert_rows + self.first_row + row
        return self.names[expert], row

    def of_experts(self, start: int, stop: int) -> Source:
        """Where experts ``start`` to ``stop`` stand."""
        shape = (stop - start, *self.shape[1:])
        if len(self.names) == 1:
            return self._replace(shape=shape, first_row=self.first_row + start * self.expert_rows)
        return self._replace(shape=shape, names=self.names[start:stop])

    def __str__(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} to {self.names[-1]}"


@dataclass(frozen=True)
class ExpertLayer:
    """The checked expert tensors of one layer: gate (None where the architecture has none), up and down, and the
    names of the optional tensors that are present."""

    layer_idx: int
    gate: Source | None
    up: Source
    down: Source
    optional: Mapping[str, str]

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.up.shape[2]

    @property
    def expert_intermediate(self) -> int:
        return self.up.shape[1]


class _LayerNames(NamedTuple):
    stacked: dict[str, str]  # "gate.weight", "gate_up.weight", "down.scale" ... -> tensor name
    one_expert: dict[str, dict[int, str]]  # "gate" -> expert -> tensor name


ExpertNames = Mapping[int, _LayerNames]


def expert_names(tensors: Iterable[str]) -> ExpertNames:
    """Expert tensor names by layer, ascending; a name with another spelling of an index is no expert tensor."""
    layers: dict[int, _LayerNames] = {}
    for name in tensors:
        if match := _STACKED.fullmatch(name):
            layer = layers.setdefault(int(match[1]), _LayerNames({}, {}))
            layer.stacked[f"{match[2]}.{match[3]}"] = name
        elif match := _ONE_EXPERT.fullmatch(name):
            layer = layers.setdefault(int(match[1]), _LayerNames({}, {}))
            layer.one_expert.setdefault(match[2], {})[int(match[3])] = name
    return dict(sorted(layers.items()))


def moe_layers(gguf: GgufFile) -> tuple[int, ...]:
    """The indices of the layers that hold expert tensors, ascending."""
    return tuple(expert_names(gguf.tensors))


def known_architecture(gguf: GgufFile) -> Architecture | None:
    """What the table says of the file's architecture; None where it names none or one that is not known."""
    name = gguf.metadata.get("general.architecture")
    return architectures().get(name) if isinstance(name, str) else None


def find_expert_layer(gguf: GgufFile, layer_idx: int, names: ExpertNames | None = None) -> ExpertLayer:
    """Layer ``layer_idx``'s expert tensors, checked. ``names`` saves indexing the file again for every layer.

    Raises TypeError where ``layer_idx`` is no integer, GgufError where the layer has no experts, lacks a tensor,
    or where shapes, types and metadata disagree.
    """
    if isinstance(layer_idx, bool) or not isinstance(layer_idx, int | np.integer):
        raise TypeError(f"layer_idx must be an int, got {layer_idx!r}")
    names = expert_names(gguf.tensors) if names is None else names
    if layer_idx not in names:
        # Python refuses to print an integer of thousands of digits.
        shown = layer_idx if abs(layer_idx) < 1 << 64 else f"2^{int(layer_idx).bit_length() - 1} or more"
        dense = f"blk.{shown}.ffn_up.weight" in gguf.tensors
        raise GgufError(
            f"{gguf.path}: layer {shown} {'is dense: it ' * dense}holds no expert tensors; {_list_layers(tuple(names))}"
        )
    layer_idx = int(layer_idx)
    where = f"{gguf.path}: layer {layer_idx}"
    found = names[layer_idx]
    for kind in ("gate.scale", "up.scale", "gate_up.scale", "gate_up.bias"):
        if kind in found.stacked:
            raise GgufError(
                f"{where}: tensor {found.stacked[kind]!r} is not supported, and without it the layer would compute"
                " wrong values"
            )
    if "gate_up.weight" in found.stacked:
        gate, up = _fused(gguf, found, where)
    else:
        known = known_architecture(gguf)
        gateless = known is not None and not known.gated
        gate = _source(gguf, found, "gate", where) if gateless else _required(gguf, found, "gate", where)
        up = _required(gguf, found, "up", where)
    down = _required(gguf, found, "down", where)
    experts, inner, hidden = up.shape
    for source, wanted in ((gate, up.shape), (down, (experts, hidden, inner))):
        if source is not None and source.shape != wanted:
            raise GgufError(
                f"{where}: {source} has shape {list(source.shape)}, but with {up} of shape {list(up.shape)} it must"
                f" be {list(wanted)}"
            )
    layer = ExpertLayer(layer_idx, gate, up, down, _optional(gguf, found, up.shape, where))
    check_metadata(gguf, layer_idx, str(up), up.shape)
    return layer


def _list_layers(layers: tuple[int, ...]) -> str:
    if not layers:
        return "the file has no MoE layers"
    shown = ", ".join(map(str, layers[:100]))
    return f"its MoE layers are {shown}{', ...' if len(layers) > 100 else ''}"


def squeezed(gguf: GgufFile, name: str, rank: int) -> tuple[int, ...]:
    # llama-quantize drops slowest axes of 1 (one expert), other writers keep or add them.
    shape = gguf.tensors[name].shape
    while shape[0] == 1 and len(shape) > 1:
        shape = shape[1:]
    if len(shape) > rank:
        raise GgufError(f"{gguf.path}: tensor {name!r} has shape {list(gguf.tensors[name].shape)}, wanted {rank} axes")
    return (1,) * (rank - len(shape)) + shape


def _source(gguf: GgufFile, found: _LayerNames, kind: str, where: str) -> Source | None:
    stacked, single = found.stacked.get(f"{kind}.weight"), found.one_expert.get(kind)
    if stacked is None:
        return None if single is None else _one_tensor_an_expert(gguf, kind, single, where)
    if single:
        raise GgufError(f"{where} has both {stacked!r} and {next(iter(single.values()))!r}: one of them is wanted")
    experts, rows, depth = squeezed(gguf, stacked, 3)
    return Source((stacked,), gguf.tensors[stacked].ggml_type, (experts, rows, depth), rows)


def _required(gguf: GgufFile, found: _LayerNames, kind: str, where: str) -> Source:
    source = _source(gguf, found, kind, where)
    if source is None:
        raise GgufError(f"{where} has no tensor ffn_{kind}_exps.weight: is a shard or a part of the file missing?")
    return source


def _one_tensor_an_expert(gguf: GgufFile, kind: str, single: dict[int, str], where: str) -> Source:
    numbers = sorted(single)
    if numbers != list(range(len(numbers))):
        missing = next(e for e in range(len(numbers)) if e not in single)
        raise GgufError(f"{where}: expert {missing} of ffn_{kind} is missing, but expert {numbers[-1]} is there")
    names = tuple(single[e] for e in numbers)
    infos = [gguf.tensors[name] for name in names]
    rows, depth = squeezed(gguf, names[0], 2)
    for info in infos:
        if (info.ggml_type, info.shape) != (infos[0].ggml_type, infos[0].shape):
            raise GgufError(
                f"{where}: {info.name!r} is {info.ggml_type.name}{list(info.shape)}, but {names[0]!r} is"
                f" {infos[0].ggml_type.name}{list(infos[0].shape)}: a layer's experts must be alike"
            )
    return Source(names, infos[0].ggml_type, (len(names), rows, depth), rows)


def _fused(gguf: GgufFile, found: _LayerNames, where: str) -> tuple[Source, Source]:
    name = found.stacked["gate_up.weight"]
    for kind in ("gate", "up"):
        if f"{kind}.weight" in found.stacked or kind in found.one_expert:
            raise GgufError(f"{where} has both {name!r} and a separate {kind}: one of them is wanted")
    experts, rows, depth = squeezed(gguf, name, 3)
    if rows % 2:
        raise GgufError(f"{where}: {name!r} has {rows} rows an expert: gate and up are not equally tall")
    ggml_type, shape = gguf.tensors[name].ggml_type, (experts, rows // 2, depth)
    return Source((name,), ggml_type, shape, rows), Source((name,), ggml_type, shape, rows, rows // 2)


def _optional(gguf: GgufFile, found: _LayerNames, up_shape: tuple[int, int, int], where: str) -> dict[str, str]:
    experts, inner, hidden = up_shape
    wanted = {
        "gate_bias": (experts, inner),
        "up_bias": (experts, inner),
        "down_bias": (experts, hidden),
        "down_scale": (experts,),
    }
    present = {leaf: found.stacked[key] for leaf, key in _OPTIONAL.items() if key in found.stacked}
    for leaf, name in present.items():
        if (shape := squeezed(gguf, name, len(wanted[leaf]))) != wanted[leaf]:
            raise GgufError(f"{where}: tensor {name!r} has shape {list(shape)}, wanted {list(wanted[leaf])}")
    return present
