"""``MoELayer``: router, experts and shared experts of one layer, and the function that computes it whole."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from . import checks, devices
from .activations import Activation
from .moe import moe_forward
from .routing import RouterConfig, route
from .stack import ExpertStack, describe
from .stack import dense as dequantised

if TYPE_CHECKING:
    from .gguf_file import GgufFile


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class MoELayer:
    """One Mixture-of-Experts layer: ``y = routed(x) + sigmoid(shared_gate . x) * shared(x)``.

    ``experts`` are what the router chooses from. ``shared`` is a stack of one expert that every token takes; None where
    there is none, and ``shared_gate`` None where it is not weighed. ``selection_bias`` is the file's ``exp_probs_b``.
    ``latent_down`` and ``latent_up`` take the routed experts' x to a narrower space and their sum back (Nemotron 3
    Super). Nothing is validated here: the loaders and :func:`moe_layer_forward` check.
    """

    router: Any  # [E, H]
    experts: ExpertStack
    router_config: RouterConfig = field(metadata={"static": True})
    activation: Activation = field(default=Activation("silu"), metadata={"static": True})
    weight_on: str = field(default="output", metadata={"static": True})
    router_bias: Any = None  # [E]
    selection_bias: Any = None  # [E]
    shared: ExpertStack | None = None  # E = 1
    shared_gate: Any = None  # [H]
    latent_down: Any = None  # [1, L, H], packed or dense
    latent_up: Any = None  # [1, H, L]

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def hidden_size(self) -> int:
        """The model's width, which x has; the experts' own may be narrower."""
        return self.router.shape[-1]

    @property
    def expert_intermediate(self) -> int:
        return self.experts.expert_intermediate

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @classmethod
    def load_from_gguf(
        cls,
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
        """Layer ``layer_idx`` of an open file: its tensors, and what the file and its architecture say of them.

        ``router_config``, ``activation`` and ``weight_on`` replace what is known of the architecture; of one that is
        not known the first must be given. ``device`` or ``sharding`` goes to ``jax.device_put``; a sharding is that of
        the experts' axes [E, ...], everything else lies whole on each of its devices.

        Raises ``GgufError`` for a dense layer, an unknown architecture, missing tensors, a malformed or inconsistent
        file, or non-finite scales unless ``check_finite=False``.
        """
        from .gguf_file.moe_layer import load_moe_layer

        return load_moe_layer(
            gguf,
            layer_idx,
            router_config=router_config,
            activation=activation,
            weight_on=weight_on,
            device=device,
            sharding=sharding,
            check_finite=check_finite,
        )

    @classmethod
    def open_and_load(cls, path: str | os.PathLike[str], layer_idx: int, **options: Any) -> MoELayer:
        """:meth:`load_from_gguf` of the file at ``path``, which is closed again."""
        from .gguf_file import GgufFile

        with GgufFile(path) as gguf:
            return cls.load_from_gguf(gguf, layer_idx, **options)

    def __repr__(self) -> str:
        present = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        show = lambda leaf: str(leaf) if isinstance(leaf, ExpertStack | RouterConfig | str) else describe(leaf)  # noqa: E731
        words = {"router_config": str(self.router_config), "activation": str(self.activation)}
        parts = ", ".join(f"{name}={words.get(name) or show(leaf)}" for name, leaf in present if leaf is not None)
        return f"MoELayer({parts})"


# For jax.export: an artefact names the type, so the name stays what it is.
jax.export.register_pytree_node_serialization(
    MoELayer,
    serialized_name="jmoe.MoELayer",
    serialize_auxdata=lambda static: json.dumps([asdict(static[0]), *static[1:]]).encode(),
    deserialize_auxdata=lambda static: _static(*json.loads(static)),
)


def _static(config: dict[str, Any], activation: list[Any], weight_on: str) -> tuple[RouterConfig, Activation, str]:
    return RouterConfig(**config), Activation(*activation), weight_on


def moe_layer_forward(
    layer: MoELayer,
    x: Any,
    router_input: Any = None,
    *,
    topk_ids: Any = None,
    topk_weights: Any = None,
    precision: str | None = None,
    backend: str | None = None,
    index: Any = None,
) -> jax.Array:
    """``y[t] = sum_k topk_weights[t, k] * expert_e(x[t]) + shared(x[t])``: what a block adds to its residual.

    Shapes: ``x`` [T, H] in f32, bf16 or f16, after the block's norm; ``router_input`` [T, H] is what the router's
    matrix multiplies, x itself where left out (Gemma 4 norms the two differently). Returns ``y`` [T, H] in x's dtype.
    Logits are f32. ``topk_ids`` [T, K] replaces the router's choice, with its weights for them, or with
    ``topk_weights``. ``precision`` and ``backend`` are :func:`jmoe.moe_forward`'s, for the routed experts; shared ones
    take ``backend="jnp"`` too, else what they can. ``index`` (may be traced) picks one of a stack of layers, whose
    leaves have an axis more in front: for ``lax.scan`` over the index, which copies no layer's experts.

    Pure and jitted; differentiable in x, router_input and every float leaf. Raises what :func:`jmoe.route` and
    :func:`jmoe.moe_forward` raise, and TypeError for what is no layer. Semantics: llama.cpp's build_moe_ffn, and what
    its models add to it.
    """
    if not isinstance(layer, MoELayer):
        raise TypeError(f"layer must be a MoELayer, got {type(layer).__name__}")
    checks.check_options(layer.weight_on, precision, backend)
    checks.check_moe_layer(layer, x, router_input, topk_ids, topk_weights, index)
    devices.check_process()
    devices.check_devices(layer.experts, x=x, router_input=router_input, layer=layer)
    if topk_ids is not None:
        topk_ids = checks.narrow_ids(topk_ids, layer.num_experts)
    return _moe_layer(layer, x, router_input, topk_ids, topk_weights, index, precision=precision, backend=backend)


@partial(jax.jit, static_argnames=("precision", "backend"))
def _moe_layer(
    layer: MoELayer,
    x: jax.Array,
    router_input: jax.Array | None,
    topk_ids: jax.Array | None,
    topk_weights: jax.Array | None,
    index: Any,
    *,
    precision: str | None,
    backend: str | None,
) -> jax.Array:
    options = {"activation": layer.activation, "precision": precision, "layer": index}
    if index is not None:
        layer = _but_experts_at(index, layer)
    ids, weights = topk_ids, topk_weights
    if ids is None or weights is None:
        logits = _product(x if router_input is None else router_input, layer.router)  # f32[T, E]
        if layer.router_bias is not None:
            logits = logits + layer.router_bias.astype(jnp.float32)[None]
        bias = layer.selection_bias if ids is None else None
        ids, weights = route(logits, layer.router_config, bias, topk_ids=ids)
    inside = x if layer.latent_down is None else _product(x, dequantised(layer.latent_down)[0])  # [T, L]
    y = moe_forward(layer.experts, inside, ids, weights, weight_on=layer.weight_on, backend=backend, **options)
    y = y.astype(jnp.float32) if layer.latent_up is None else _product(y, dequantised(layer.latent_up)[0])
    if layer.shared is not None:
        share = jnp.ones((x.shape[0], 1), jnp.float32)
        if layer.shared_gate is not None:
            share = jax.nn.sigmoid(_product(x, layer.shared_gate[None]))
        none_but_one = jnp.zeros((x.shape[0], 1), jnp.int32)
        of_shared = "jnp" if backend == "jnp" else None
        shared = moe_forward(layer.shared, x, none_but_one, share, backend=of_shared, **options)
        y = y + shared.astype(jnp.float32)
    return y.astype(x.dtype)


def _but_experts_at(index: Any, layers: MoELayer) -> MoELayer:
    """One of a stack of layers: slices of what is small; the stacks stay whole, for ``layer=``."""
    stacks = {"experts": layers.experts, "shared": layers.shared}
    rest = replace(layers, **dict.fromkeys(stacks))
    rest = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), rest)
    return replace(rest, **stacks)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """f32[T, O] of x [T, D] and a matrix [O, D], in f32 whatever their dtypes."""
    return jnp.matmul(x.astype(jnp.float32), matrix.astype(jnp.float32).T, precision=lax.Precision.HIGHEST)
