"""``jmoe inspect FILE``: what a file holds and how jmoe would hold it, from the header alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import numpy as np

from ..gguf_file import GgufError, GgufFile
from ..gguf_file.moe_layer import find_moe_layer, moe_layer_specs
from ..gguf_file.names import ExpertLayer, Source, expert_names, find_expert_layer
from ..gguf_file.planes import layer_specs
from ..stack import QuantTensor, format_name
from ._common import megabytes, printable, table

NAME = "inspect"
SUMMARY = "Show a GGUF file's MoE layers, types, bytes, routers and what stays packed (exit 1: experts cannot load)"

_KEYS = ("block_count", "embedding_length", "expert_count", "expert_used_count", "expert_feed_forward_length")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a GGUF file, or any shard of one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    with GgufFile(args.file) as gguf:
        report = describe_file(gguf)
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 1 if any("error" in layer for layer in report["layers"]) else 0


def describe_file(gguf: GgufFile) -> dict[str, Any]:
    """What ``--json`` prints: plain types only. Reads no tensor data and initialises no JAX backend."""
    names = expert_names(gguf.tensors)
    layers = [_describe_layer(gguf, index, names) for index in names]
    metadata = {key: gguf.metadata.get(f"{gguf.architecture}.{key}") for key in _KEYS}
    return {
        "path": gguf.path,
        "architecture": gguf.architecture,
        "version": gguf.version,
        "metadata": {key: _plain(value) for key, value in metadata.items()},
        "tensors": len(gguf.tensors),
        "file_bytes": sum(info.nbytes for info in gguf.tensors.values()),
        "moe_layers": list(names),
        "expert_file_bytes": sum(layer.get("file_bytes", 0) for layer in layers),
        "expert_held_bytes": sum(layer.get("held_bytes", 0) for layer in layers),
        "layer_held_bytes": sum(layer.get("whole", {}).get("held_bytes", 0) for layer in layers),
        "layers": layers,
    }


def _plain(value: Any) -> Any:
    """Numbers and their arrays as JSON has them; anything else, which only a damaged file holds, in words."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value if value is None or isinstance(value, int) else repr(value)


def _describe_layer(gguf: GgufFile, index: int, names: Any) -> dict[str, Any]:
    try:
        layer = find_expert_layer(gguf, index, names)
        specs = layer_specs(gguf, layer)
    except GgufError as error:
        return {"layer": index, "error": str(error)}
    projections = {
        kind: _describe_projection(gguf, source, getattr(specs, kind))
        for kind, source in (("gate", layer.gate), ("up", layer.up), ("down", layer.down))
        if source is not None
    }
    return {
        "layer": index,
        "num_experts": layer.num_experts,
        "hidden_size": layer.hidden_size,
        "expert_intermediate": layer.expert_intermediate,
        "projections": projections,
        "optional": dict(layer.optional),
        "file_bytes": sum(p["file_bytes"] for p in projections.values()) + _optional_bytes(gguf, layer),
        "held_bytes": specs.nbytes,
        "whole": _describe_whole(gguf, index, names),
    }


def _describe_whole(gguf: GgufFile, index: int, names: Any) -> dict[str, Any]:
    """The layer as a MoELayer, or why it cannot be one: its experts may load by themselves."""
    try:
        tensors = find_moe_layer(gguf, index, names=names)
        specs = moe_layer_specs(gguf, tensors)
    except GgufError as error:
        return {"error": str(error)}
    return {
        "router": asdict(specs.router_config),
        "router_in_words": f"{specs.router_config}{', selection biased' * (specs.selection_bias is not None)}",
        "activation": specs.activation.name,
        "weight_on": specs.weight_on,
        "shared": None if specs.shared is None else specs.shared.formats._asdict(),
        "shared_intermediate": None if specs.shared is None else specs.shared.expert_intermediate,
        "shared_gated": specs.shared_gate is not None,
        "latent_size": None if specs.latent_down is None else specs.experts.hidden_size,
        "held_bytes": specs.nbytes,
    }


def _describe_projection(gguf: GgufFile, source: Source, held: Any) -> dict[str, Any]:
    experts, rows, _ = source.shape
    return {
        "tensors": list(dict.fromkeys(source.names)),
        "type": source.ggml_type.name,
        "shape": list(source.shape),
        # Gate and up of a fused tensor are half of it each.
        "file_bytes": experts * rows * gguf.info(source.names[0]).row_bytes,
        "packed": isinstance(held, QuantTensor),
        "held_as": format_name(held),
        "held_bytes": held.nbytes if isinstance(held, QuantTensor) else held.size * held.dtype.itemsize,
    }


def _optional_bytes(gguf: GgufFile, layer: ExpertLayer) -> int:
    return sum(gguf.info(name).nbytes for name in layer.optional.values())


def as_text(report: dict[str, Any]) -> str:
    """The report for a reader: layers that are alike share their lines."""
    lines = [
        f"{report['path']}: {printable(report['architecture'])}, GGUF v{report['version']},"
        f" {report['tensors']} tensors, {megabytes(report['file_bytes'])}",
    ]
    if not report["moe_layers"]:
        return "\n".join([*lines, "no MoE layers: no tensor is named blk.N.ffn_up_exps.weight"])
    stated = {key: value for key, value in report["metadata"].items() if value is not None}
    lines.append("metadata: " + (", ".join(f"{key} {value}" for key, value in stated.items()) or "no sizes"))
    alike: dict[str, list[dict[str, Any]]] = {}
    for layer in report["layers"]:
        alike.setdefault(_signature(layer), []).append(layer)
    plural = "s" * (len(alike) > 1)
    lines.append(f"MoE layers: {len(report['layers'])} ({_ranges(report['moe_layers'])}), {len(alike)} kind{plural}")
    for layers in alike.values():
        lines += ["", *_kind(layers)]
    held = megabytes(report["expert_held_bytes"])
    lines += ["", f"experts: {megabytes(report['expert_file_bytes'])} in the file, {held} held"]
    if report["layer_held_bytes"]:
        lines.append(f"whole layers: {megabytes(report['layer_held_bytes'])} held")
    return "\n".join(lines)


def _signature(layer: dict[str, Any]) -> str:
    if "error" in layer:
        return f"error {layer['layer']}"
    projections = {kind: (p["type"], p["shape"]) for kind, p in layer["projections"].items()}
    whole = {key: value for key, value in layer["whole"].items() if key != "error"}
    return repr((projections, sorted(layer["optional"]), whole or layer["layer"]))


def _kind(layers: list[dict[str, Any]]) -> list[str]:
    first, indices = layers[0], _ranges([layer["layer"] for layer in layers])
    title = f"layer {indices}" if len(layers) == 1 else f"layers {indices}"
    if "error" in first:
        return [f"{title}: cannot be loaded", f"  {first['error']}"]
    rows = [
        (
            f"  {kind}",
            p["type"],
            str(p["shape"]),
            megabytes(p["file_bytes"]),
            f"packed as {p['held_as']}" if p["packed"] else f"dense {p['held_as']}",
            megabytes(p["held_bytes"]),
        )
        for kind, p in first["projections"].items()
    ]
    header = ("  projection", "type", "[E, O, D]", "in the file", "held", "bytes held")
    lines = [title + (", per layer:" if len(layers) > 1 else ":"), table(header, rows)]
    if first["optional"]:
        lines.append(f"  also {', '.join(first['optional'])}")
    return [*lines, *_whole(first["whole"])]


def _whole(whole: dict[str, Any]) -> list[str]:
    if "error" in whole:
        return [f"  as a whole layer: cannot be loaded: {whole['error']}"]
    lines = [f"  router: {whole['router_in_words']}", f"  activation: {whole['activation']}"]
    if whole["weight_on"] == "input":
        lines.append("  weight: on the experts' input")
    if whole["latent_size"]:
        lines.append(f"  latent space: {whole['latent_size']} wide")
    if whole["shared"]:
        held = ", ".join(f"{kind} {name}" for kind, name in whole["shared"].items() if name)
        gated = ", gated by a sigmoid" * whole["shared_gated"]
        lines.append(f"  shared experts: {whole['shared_intermediate']} wide, {held}{gated}")
    return [*lines, f"  whole layer: {megabytes(whole['held_bytes'])} held"]


def _ranges(numbers: list[int]) -> str:
    """``0-2, 5, 7-9``"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
