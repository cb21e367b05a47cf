"""Whole MoE layers of a file: router, experts and shared experts, found by name, checked and loaded.

blk.N.ffn_gate_inp.weight  [E, H]    blk.N.ffn_gate_inp.bias  [E]        blk.N.exp_probs_b.bias  [E]
blk.N.ffn_{gate,up,down}_shexp.weight  [O, D]                            blk.N.ffn_gate_inp_shexp.weight  [H]
blk.N.ffn_latent_down.weight  [L, H]  blk.N.ffn_latent_up.weight  [H, L]    where experts work in a narrower space
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ..activations import GATED, Activation, as_activation
from ..checks import WEIGHT_ON
from ..routing import RouterConfig
from .architectures import architectures
from .errors import GgufError
from .file import GgufFile
from .load import read_experts
from .metadata import shortened
from .names import ExpertLayer, ExpertNames, Source, expert_names, find_expert_layer, known_architecture, squeezed
from .placing import Placement, deleted_on_error, out_of_memory_explained
from .planes import layer_specs, projection_spec, read_optional, read_projection
from .router_keys import read_router_config
from .shards import StrPath

if TYPE_CHECKING:
    from ..layer import MoELayer


@dataclass(frozen=True)
class LayerSemantics:
    """How a layer's arrays are to be read: the static fields of a MoELayer."""

    router_config: RouterConfig
    activation: Activation
    weight_on: str


@dataclass(frozen=True)
class LayerTensors:
    """The checked tensors of a whole MoE layer. ``vectors``: leaf -> (tensor, shape) of what is loaded as f32."""

    experts: ExpertLayer
    shared: ExpertLayer | None
    latent: dict[str, Source]
    vectors: dict[str, tuple[str, tuple[int, ...]]]
    semantics: LayerSemantics


def load_moe_layer(
    gguf: GgufFile,
    layer_idx: int,
    *,
    router_config: RouterConfig | None = None,
    activation: str | Activation | None = None,
    weight_on: str | None = None,
    device: Any = None,
    sharding: Any = None,
    check_finite: bool = True,
) -> MoELayer:
    """One whole MoE layer of an open file; ``MoELayer.load_from_gguf`` says what the arguments are."""
    tensors = find_moe_layer(gguf, layer_idx, _semantics(gguf, router_config, activation, weight_on))
    return _load_all(gguf, [tensors], Placement(device, sharding), check_finite, progress=False)[layer_idx]


def load_moe_layers(
    path: StrPath,
    layers: Iterable[int] | None = None,
    *,
    router_config: RouterConfig | None = None,
    activation: str | Activation | None = None,
    weight_on: str | None = None,
    progress: bool = True,
    device: Any = None,
    sharding: Any = None,
    check_finite: bool = True,
) -> dict[int, MoELayer]:
    """All MoE layers of the file at ``path``, or those in ``layers``: layer index -> layer, in the order given.

    Dense layers are skipped; one that ``layers`` names is a GgufError. ``progress`` shows a bar. The other arguments,
    warnings and errors are those of :meth:`jmoe.MoELayer.load_from_gguf`.
    """
    with GgufFile(path) as gguf:
        names = expert_names(gguf.tensors)
        if not names:
            raise GgufError(f"{gguf.path}: the file has no MoE layers: no tensor is named blk.N.ffn_up_exps.weight")
        semantics = _semantics(gguf, router_config, activation, weight_on)
        wanted = dict.fromkeys(names if layers is None else layers)
        found = [find_moe_layer(gguf, layer, semantics, names) for layer in wanted]
        return _load_all(gguf, found, Placement(device, sharding), check_finite, progress)


def _semantics(
    gguf: GgufFile, config: RouterConfig | None, activation: str | Activation | None, weight_on: str | None
) -> LayerSemantics:
    """What is given, else what the file and the table of architectures say."""
    if not isinstance(config, RouterConfig | None):
        raise TypeError(f"router_config must be a RouterConfig, got {type(config).__name__}")
    if weight_on is not None and weight_on not in WEIGHT_ON:
        raise ValueError(f"weight_on must be one of {', '.join(map(repr, WEIGHT_ON))}, got {weight_on!r}")
    known = known_architecture(gguf)
    if known is None and config is None:
        raise GgufError(
            f"{gguf.path}: the router of architecture {shortened(gguf.architecture)} is not known, and a guess would"
            f" give garbage: give router_config= (and activation=). Known are {', '.join(architectures())}"
        )
    return LayerSemantics(
        config or read_router_config(gguf, known),  # pyright: ignore[reportArgumentType]
        as_activation(activation or (known.activation if known else "silu")),
        weight_on or (known.weight_on if known else "output"),
    )


def find_moe_layer(
    gguf: GgufFile, layer_idx: int, semantics: LayerSemantics | None = None, names: ExpertNames | None = None
) -> LayerTensors:
    """Layer ``layer_idx``'s tensors and semantics, checked, from the header alone.

    Raises TypeError where ``layer_idx`` is no integer, GgufError for a dense layer, an unknown architecture, a missing
    tensor, or shapes and metadata that disagree.
    """
    experts = find_expert_layer(gguf, layer_idx, names)
    semantics = semantics or _semantics(gguf, None, None, None)
    known, prefix = known_architecture(gguf), f"blk.{experts.layer_idx}."
    where = f"{gguf.path}: layer {experts.layer_idx}"
    count, hidden = experts.num_experts, experts.hidden_size
    latent = _latent(gguf, prefix, hidden, where)
    if latent:
        hidden = latent["latent_down"].shape[-1]
    wanted = {
        "router": ("ffn_gate_inp.weight", (count, hidden), True),
        "router_bias": ("ffn_gate_inp.bias", (count,), False),
        "selection_bias": ("exp_probs_b.bias", (count,), known is not None and known.selection_bias),
        "shared_gate": ("ffn_gate_inp_shexp.weight", (hidden,), known is not None and known.shared == "gated"),
    }
    vectors = {}
    for leaf, (name, shape, required) in wanted.items():
        if prefix + name in gguf.tensors:
            _check_shape(gguf, prefix + name, shape)
            vectors[leaf] = (prefix + name, shape)
        elif required:
            raise GgufError(f"{where} has no tensor {name}: is a shard or a part of the file missing?")
    shared = _shared(gguf, experts.layer_idx, hidden, semantics.activation, where)
    if shared is None and (needs := _needs_shared(gguf)):
        raise GgufError(f"{where} has no tensor ffn_up_shexp.weight, but {needs}: is a part of the file missing?")
    if shared is None and "shared_gate" in vectors:
        raise GgufError(f"{where} has {vectors['shared_gate'][0]!r}, but no ffn_up_shexp.weight: is a part missing?")
    _check_router(semantics.router_config, count, where, biased="selection_bias" in vectors)
    return LayerTensors(experts, shared, latent, vectors, semantics)


def _needs_shared(gguf: GgufFile) -> str | None:
    """Why the layer must have shared experts, in words."""
    known = known_architecture(gguf)
    if known is None:
        return None
    stated = gguf.metadata.get(f"{gguf.architecture}.expert_shared_count")
    # llama.cpp makes their width of the count: none stated as 0.
    if known.shared in ("required", "gated") and stated != 0:
        return f"{gguf.architecture} has shared experts"
    for key in ("expert_shared_count", "expert_shared_feed_forward_length"):
        value = gguf.metadata.get(f"{gguf.architecture}.{key}")
        if known.shared == "optional" and isinstance(value, int) and value > 0:
            return f"{gguf.architecture}.{key} is {value}"
    return None


def _shared(gguf: GgufFile, layer_idx: int, hidden: int, activation: Activation, where: str) -> ExpertLayer | None:
    """The shared experts as a layer of one expert; None where the layer has none."""
    kinds = ("gate", "up", "down") if activation.name in GATED else ("up", "down")
    names = {kind: f"blk.{layer_idx}.ffn_{kind}_shexp.weight" for kind in ("gate", "up", "down")}
    if not any(name in gguf.tensors for name in names.values()):
        return None
    for kind, name in names.items():
        if (name in gguf.tensors) != (kind in kinds):
            raise GgufError(
                f"{where} has {'no' if kind in kinds else 'a'} tensor ffn_{kind}_shexp.weight beside its other shared"
                f" ones, wanted {', '.join(kinds)} for the activation {activation}"
            )
    found = {kind: _matrix(gguf, names[kind]) for kind in kinds}
    inner = found["up"].shape[1]
    for kind, source in found.items():
        shape = (1, hidden, inner) if kind == "down" else (1, inner, hidden)
        if source.shape != shape:
            raise GgufError(f"{where}: tensor {source} has shape {list(source.shape[1:])}, wanted {list(shape[1:])}")
    return ExpertLayer(layer_idx, found.get("gate"), found["up"], found["down"], {})


def _latent(gguf: GgufFile, prefix: str, width: int, where: str) -> dict[str, Source]:
    """The projections to the experts' ``width`` and back; empty where they work in the model's own."""
    names = {f"latent_{way}": f"{prefix}ffn_latent_{way}.weight" for way in ("down", "up")}
    present = [name for name in names.values() if name in gguf.tensors]
    size = gguf.metadata.get(f"{gguf.metadata.get('general.architecture')}.moe_latent_size", 0)
    if not present and not size:
        return {}
    if len(present) < 2:
        missing = next(name for name in names.values() if name not in gguf.tensors)
        raise GgufError(f"{where} has no tensor {missing!r}, which its experts of a latent space need")
    sources = {leaf: _matrix(gguf, name) for leaf, name in names.items()}
    hidden = sources["latent_down"].shape[2]
    for leaf, shape in (("latent_down", (1, width, hidden)), ("latent_up", (1, hidden, width))):
        if sources[leaf].shape != shape:
            came = list(sources[leaf].shape[1:])
            raise GgufError(f"{where}: tensor {sources[leaf]} has shape {came}, wanted {list(shape[1:])}")
    return sources


def _matrix(gguf: GgufFile, name: str) -> Source:
    rows, depth = squeezed(gguf, name, 2)
    return Source((name,), gguf.tensors[name].ggml_type, (1, rows, depth), rows)


def _check_shape(gguf: GgufFile, name: str, shape: tuple[int, ...]) -> None:
    if (came := squeezed(gguf, name, len(shape))) != shape:
        raise GgufError(f"{gguf.path}: tensor {name!r} has shape {list(came)}, wanted {list(shape)}")


def _check_router(config: RouterConfig, experts: int, where: str, *, biased: bool) -> None:
    """What ``route`` would refuse at the first call."""
    if config.top_k > experts:
        raise GgufError(f"{where}: the router takes {config.top_k} experts a token, but there are {experts}")
    if experts % config.group_count or config.top_k > experts // config.group_count * config.groups_used:
        raise GgufError(
            f"{where}: {config.top_k} of {experts} experts cannot be chosen from the best {config.groups_used} of"
            f" {config.group_count} equal groups"
        )
    if biased and config.select_on == "logits":
        raise GgufError(f"{where} has exp_probs_b, which a router that selects on logits cannot add")


def moe_layer_specs(gguf: GgufFile, tensors: LayerTensors) -> MoELayer:
    """The layer with a ``jax.ShapeDtypeStruct`` for every leaf, from the header alone."""
    from ..layer import MoELayer

    return MoELayer(
        experts=layer_specs(gguf, tensors.experts),
        shared=None if tensors.shared is None else layer_specs(gguf, tensors.shared),
        **{leaf: projection_spec(gguf, source) for leaf, source in tensors.latent.items()},
        **{leaf: jax.ShapeDtypeStruct(shape, np.float32) for leaf, (_, shape) in tensors.vectors.items()},
        **vars(tensors.semantics),
    )


def _load_all(
    gguf: GgufFile, found: list[LayerTensors], placement: Placement, check_finite: bool, progress: bool
) -> dict[int, MoELayer]:
    specs = [moe_layer_specs(gguf, tensors) for tensors in found]
    if not specs:
        return {}
    indices = ", ".join(str(tensors.experts.layer_idx) for tensors in found[:100])
    what = f"{gguf.path}: layer{'s' * (len(found) > 1)} {indices}"
    placement.require_bytes([spec.experts for spec in specs], what)
    placement.replicated.require_bytes([replace(spec, experts=None) for spec in specs], what)
    layers: dict[int, MoELayer] = {}
    with (
        out_of_memory_explained(what, sum(spec.nbytes for spec in specs), placement.devices),
        deleted_on_error(layers),
    ):
        plan = zip(found, specs, strict=True)
        if progress:
            from tqdm import tqdm  # here, so that `import jmoe` stays light

            plan = tqdm(plan, "loading layers", len(found), unit="layer")
        for tensors, spec in plan:
            layers[tensors.experts.layer_idx] = _read(gguf, tensors, spec, placement, check_finite)
    return layers


def _read(gguf: GgufFile, tensors: LayerTensors, specs: MoELayer, placement: Placement, check_finite: bool) -> MoELayer:
    from ..layer import MoELayer

    leaves: dict[str, Any] = {}
    everywhere = placement.replicated
    with deleted_on_error(leaves):
        leaves["experts"] = read_experts(gguf, tensors.experts, specs.experts, placement, check_finite)
        if tensors.shared is not None and specs.shared is not None:
            leaves["shared"] = read_experts(gguf, tensors.shared, specs.shared, everywhere, check_finite)
        with ThreadPoolExecutor(1) as executor:
            for leaf, source in tensors.latent.items():
                leaves[leaf] = everywhere.put(read_projection(gguf, source, executor, check_finite))
        for leaf, (name, shape) in tensors.vectors.items():
            leaves[leaf] = everywhere.put(read_optional(gguf, name, shape, check_finite))
        gguf.check_unchanged()
    return MoELayer(**leaves, **vars(tensors.semantics))
