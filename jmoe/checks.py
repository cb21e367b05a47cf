"""The contract of the public functions, in one place: shapes and dtypes by chex, names by ValueError.

Everything here looks at shapes and dtypes only, so it costs nothing after tracing. Devices: devices.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .activations import Activation, as_activation
from .stack import ExpertStack, QuantTensor

if TYPE_CHECKING:
    from .routing import RouterConfig

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
PROJECTIONS = ("gate", "up", "down")
WEIGHT_ON = ("output", "input")
BACKENDS = ("jnp", "pallas", "cpu", "mps")
PRECISIONS = (None, "highest")


def check_logits(logits: Any, config: RouterConfig, selection_bias: Any, topk_ids: Any) -> None:
    """``route``'s door: logits float[T, E], of which top_k can be chosen; selection_bias float[E], ids [T, K]."""
    _expect("logits", logits, (None, None), FLOATS, "Give router logits [T, E], one row a token.")
    tokens, experts = logits.shape
    if config.top_k > experts:
        raise ValueError(
            f"top_k={config.top_k} experts cannot be chosen from logits {show(logits)}, which hold {experts} experts a"
            " token. Lower RouterConfig.top_k."
        )
    if experts % config.group_count:
        raise ValueError(
            f"group_count={config.group_count} must divide the {experts} experts of logits {show(logits)}. Groups are"
            " equally large."
        )
    if config.top_k > (most := experts // config.group_count * config.groups_used):
        raise ValueError(
            f"top_k={config.top_k} experts cannot be chosen from groups_used={config.groups_used} of group_count="
            f"{config.group_count} groups, which hold {most} of {experts} experts. Raise RouterConfig.groups_used."
        )
    if selection_bias is not None:
        _expect("selection_bias", selection_bias, (experts,), FLOATS, "Give one number an expert.")
        if config.select_on == "logits":
            raise ValueError('select_on="logits" ranks the raw logits: selection_bias must be None, got one.')
    if topk_ids is not None:
        shape = (tokens, config.top_k)
        _expect("topk_ids", topk_ids, shape, (jnp.integer,), "Give top_k ids for each token of logits.")
        if selection_bias is not None:
            raise ValueError("topk_ids is the choice already: selection_bias must be None, got one.")


def check_forward(
    stack: Any,
    x: Any,
    topk_ids: Any,
    topk_weights: Any,
    *,
    activation: str | Activation,
    weight_on: str,
    precision: str | None,
    backend: str | None,
    layer: Any,
) -> None:
    """``moe_forward``'s door. AssertionError names the argument, what came and the fix."""
    check_options(weight_on, precision, backend)
    check_stack(stack, layer, as_activation(activation))
    hidden = stack.hidden_size
    _expect("x", x, (None, hidden), FLOATS, f"x holds one row of the stack's hidden_size ({hidden}) a token.")
    tokens = x.shape[0]
    _expect(
        "topk_ids",
        topk_ids,
        (tokens, None),
        (jnp.integer,),
        "Route the same tokens as x.",
    )
    _expect(
        "topk_weights",
        topk_weights,
        tuple(topk_ids.shape),
        FLOATS,
        "Give one weight for each chosen expert, as route() does.",
    )


def check_moe_layer(layer: Any, x: Any, router_input: Any, topk_ids: Any, topk_weights: Any, index: Any = None) -> None:
    """``moe_layer_forward``'s door, as far as ``route`` and ``moe_forward`` behind it do not look."""
    if index is not None:
        _check_layer(layer.experts.up.shape[:-3], index, "index")
        layer = _one_of(layer)
    if topk_weights is not None and topk_ids is None:
        raise ValueError("topk_weights came without topk_ids: give the ids that they weigh, or neither.")
    experts = layer.experts.num_experts
    _expect("layer.router", layer.router, (experts, None), FLOATS, "The router's matrix is [E, H].")
    hidden = layer.hidden_size
    _expect("x", x, (None, hidden), FLOATS, f"x holds one row of the layer's hidden_size ({hidden}) a token.")
    if router_input is not None:
        shape = (x.shape[0], hidden)
        _expect("router_input", router_input, shape, FLOATS, "The router sees one row for each token of x.")
    for name, wanted in (("router_bias", (experts,)), ("shared_gate", (hidden,))):
        leaf = getattr(layer, name)
        if leaf is not None:
            _expect(f"layer.{name}", leaf, wanted, FLOATS, "Leave it None where the layer has none.")
    if (layer.latent_down is None) != (layer.latent_up is None):
        raise ValueError("layer.latent_down and layer.latent_up come together: one of them is None.")
    if layer.shared is None and layer.shared_gate is not None:
        raise ValueError("layer.shared_gate is there, but layer.shared is None. Leave it None too.")


def _one_of(layers: Any) -> Any:
    """The shapes of one layer of a stack of them."""
    count = layers.experts.up.shape[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
        if leaf.shape[:1] != (count,):
            raise ValueError(
                f"index= wants the axis of {count} layers that layer.experts.up has in front of every leaf, got"
                f" {show(leaf)} at layer{jax.tree_util.keystr(path)}. Stack whole layers: jax.tree.map(stack, *layers)."
            )
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), layers)


def check_ids(topk_ids: Any) -> None:
    """The statistics' door: topk_ids integer[T, K]."""
    _expect("topk_ids", topk_ids, (None, None), (jnp.integer,), "Give route()'s ids, or vmap over further axes.")


def check_options(weight_on: str, precision: str | None, backend: str | None) -> None:
    """Names among the ones known."""
    for name, value, known in (
        ("weight_on", weight_on, WEIGHT_ON),
        ("precision", precision, PRECISIONS),
        ("backend", backend, (None, *BACKENDS)),
    ):
        if not isinstance(value, str | None) or value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_stack(stack: Any, layer: Any, activation: Activation) -> None:
    """gate, up [E, I, H] and down [E, H, I] agree (behind a layer axis where ``layer`` is given); a gate is there
    where the activation has one, and only there."""
    if not isinstance(stack, ExpertStack):
        raise TypeError(f"stack must be an ExpertStack, got {type(stack).__name__}")
    if activation.gated != (stack.gate is not None):
        came = "None, and" if activation.gated else "there, but"
        wants = "multiplies by a gate" if activation.gated else "has none"
        raise ValueError(
            f"stack.gate is {came} activation {activation.name!r} {wants}. Give the architecture's own activation=, or"
            f" {'the gate' if activation.gated else 'gate=None'}."
        )
    if stack.gate is None and stack.gate_bias is not None:
        raise ValueError("stack.gate_bias is there, but stack.gate is None. Leave it None too.")
    for name in stack.__dataclass_fields__:
        _check_kind(name, getattr(stack, name))
    if len(stack.up.shape) < 3 or 0 in stack.up.shape:
        raise ValueError(f"stack.up must be [E, I, H] with one expert or more, got {list(stack.up.shape)}.")
    lead = stack.up.shape[:-3]
    if layer is None and lead:
        raise ValueError(
            f"stack has leading axes {list(lead)} before its experts (up {list(stack.up.shape)}). Say which layer with"
            " layer=l, or vmap over them."
        )
    if layer is not None:
        _check_layer(lead, layer)
    _check_leaves(stack, (*lead, stack.num_experts, stack.expert_intermediate, stack.hidden_size))


def _check_layer(lead: tuple[int, ...], layer: Any, name: str = "layer") -> None:
    if len(lead) != 1:
        raise ValueError(
            f"{name}= wants one layer axis [L, E, O, D] on the stack's leaves, got {len(lead)} axes before the experts."
            f" Stack the layers (load_expert_stacks(..., stacked=True)) or leave {name} out."
        )
    # A Python int, or any array of rank 0 (NumPy's scalars have a shape too); bool is neither.
    scalar = type(layer) is int or getattr(layer, "shape", None) == ()
    if not scalar or not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
        raise TypeError(f"{name} must be an integer scalar, got {layer!r}")
    if not isinstance(layer, Tracer) and not 0 <= int(layer) < lead[0]:
        raise ValueError(f"{name}={int(layer)} is outside the stack's {lead[0]} layers")


def _check_kind(name: str, leaf: Any) -> None:
    """A projection is a QuantTensor with its format's planes, or an array; the others are arrays, or None."""
    if name not in PROJECTIONS:
        if leaf is not None:
            _require_array(f"stack.{name}", leaf, "Leave it None where the layer has none.")
    elif name == "gate" and leaf is None:
        return
    elif not isinstance(leaf, QuantTensor):
        _require_array(f"stack.{name}", leaf, "Give a QuantTensor or a dense array.")
    elif not isinstance(leaf.planes, leaf.spec.planes):
        raise TypeError(
            f"stack.{name}.planes must be {leaf.spec.planes.__name__}, as {leaf.format!r} has them, got"
            f" {type(leaf.planes).__name__}."
        )
    else:
        for field, plane in leaf.planes._asdict().items():
            _require_array(f"stack.{name}.planes.{field}", plane, "Planes come from a loader.")


def _check_leaves(stack: ExpertStack, shape: tuple[int, ...]) -> None:
    *lead, experts, inner, hidden = shape
    wanted = {
        "gate": (*lead, experts, inner, hidden),
        "down": (*lead, experts, hidden, inner),
        "gate_bias": (*lead, experts, inner),
        "up_bias": (*lead, experts, inner),
        "down_bias": (*lead, experts, hidden),
        "down_scale": (*lead, experts),
    }
    for name, expected in wanted.items():
        leaf = getattr(stack, name)
        if leaf is not None and tuple(leaf.shape) != expected:
            raise ValueError(
                f"stack.{name} must be {list(expected)} to fit stack.up {list(shape)}, got {list(leaf.shape)}."
                " gate and up are [E, I, H], down is [E, H, I]."
            )
    for name in ("up", *wanted):
        leaf = getattr(stack, name)
        if isinstance(leaf, QuantTensor):
            _check_planes(f"stack.{name}", leaf)
        elif leaf is not None:
            _expect(f"stack.{name}", leaf, leaf.shape, FLOATS, "What is not packed is f32, bf16 or f16.")


def _check_planes(name: str, tensor: QuantTensor) -> None:
    """All planes belong together and have their own integer dtypes: a gather would clamp to what is there."""
    shapes = tensor.spec.plane_shapes(tensor.shape)
    for field, plane, shape, layout in zip(shapes._fields, tensor.planes, shapes, tensor.spec.layout, strict=True):
        if plane.shape != shape or plane.dtype != layout.dtype:
            raise ValueError(
                f"{name}.planes.{field} must be {np.dtype(layout.dtype)}{list(shape)} to fit the codes of"
                f" {tensor.format}{list(tensor.shape)}, got {plane.dtype}{list(plane.shape)}. Planes are integers,"
                " never cast or cut by themselves: index the QuantTensor."
            )


def narrow_ids(topk_ids: Any, num_experts: int) -> Any:
    """i32 ids, judged before they are narrowed: 2^32 + 1 must become -1 (an empty slot), not expert 1.

    NumPy's are judged here, because jit would narrow them at its door where x64 is off.
    """
    if topk_ids.dtype == np.int32:
        return topk_ids
    xp = np if isinstance(topk_ids, np.ndarray) else jnp
    narrow = topk_ids.astype(xp.int32)
    if topk_ids.dtype.itemsize < 4:
        return narrow
    return xp.where((topk_ids >= 0) & (topk_ids < num_experts), narrow, xp.int32(-1))


def _expect(name: str, array: Any, shape: tuple[int | None, ...], dtypes: tuple[Any, ...], fix: str) -> None:
    """One chex assertion a property, each with our own words."""
    _require_array(name, array, fix)
    letters = ",".join("?" if size is None else str(size) for size in shape)
    kinds = " or ".join(getattr(d, "__name__", str(d)) for d in dtypes)
    message = f"{name} must be {kinds}[{letters}], got {show(array)}. {fix}"
    own_words = {"custom_message": message, "include_default_message": False}
    chex.assert_shape(array, shape, **own_words)
    # jax knows no swapped bytes.
    if not any(jnp.issubdtype(array.dtype, d) for d in dtypes) or not np.dtype(array.dtype).isnative:
        raise AssertionError(message)


def _require_array(name: str, array: Any, fix: str) -> None:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}. {fix}")


def show(array: Any) -> str:
    """``float32[4,2]``"""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
