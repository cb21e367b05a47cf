"""``moe_forward`` over a mesh: every device its own experts, inside ``jax.shard_map``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .. import checks, devices, dispatch
from ..activations import Activation, as_activation
from ..stack import ExpertStack
from .exchange import EXCHANGES, RAGGED_PLATFORMS
from .sharded import ShardedStack, partition_specs


def moe_forward(
    stack: ShardedStack,
    x: Any,
    topk_ids: Any,
    topk_weights: Any,
    *,
    split_tokens: str | tuple[str, ...] = (),
    exchange: str | None = None,
    activation: str | Activation = "silu",
    weight_on: str = "output",
    precision: str | None = None,
    backend: str | None = None,
    layer: Any = None,
) -> jax.Array:
    """``y[t] = sum_k topk_weights[t, k] * down_e(act(gate_e x[t], up_e x[t]))``, e = topk_ids[t, k], over a mesh.

    Shapes, dtypes and the options from ``activation`` on are those of :func:`jmoe.moe_forward`, and so is the result:
    arrays are global, of all tokens and experts. An id outside [0, num_experts) contributes exactly nothing.

    ``split_tokens``: the mesh axes that cut the tokens, into equal parts. Without the stack's ``expert_axis`` each
    device computes its experts' share for all the tokens that it has, and a sum over the axis (``psum``, f32) completes
    them: few tokens, as in decoding. With it tokens travel to the devices of their experts, and their outputs (f32)
    travel back; no token is dropped, whatever the router does. Other axes among them are data parallel. ``exchange``:
    "dense" sends every token to every device, "ragged" to those of its experts alone; None takes "ragged" on TPUs and
    "dense" elsewhere. XLA's kernel for the ragged one takes up to eight GPUs of one process; CPUs have none. An axis of
    one device exchanges nothing.

    Jitted, differentiable and vmappable like its namesake. Arguments are resharded as needed, on Auto and Explicit axes
    alike. Raises what it raises, and ValueError for axes that the mesh does not have or that do not divide the tokens.
    """
    if not isinstance(stack, ShardedStack):
        raise TypeError(f"stack must be a ShardedStack, got {type(stack).__name__}. parallel.shard_experts makes one.")
    checks.check_forward(
        stack.stack,
        x,
        topk_ids,
        topk_weights,
        activation=activation,
        weight_on=weight_on,
        precision=precision,
        backend=backend,
        layer=layer,
    )
    split = (split_tokens,) if isinstance(split_tokens, str) else tuple(split_tokens)
    _check_split(stack, split, x.shape[0])
    exchange = _exchange(stack, split, exchange, x.shape[0])
    devices.check_process()
    arguments = {"x": x, "topk_ids": topk_ids, "topk_weights": topk_weights, "layer": layer}
    devices.check_devices(stack.stack, explicit_axes=True, **arguments)
    topk_ids = checks.narrow_ids(topk_ids, stack.num_experts)
    options = {"activation": as_activation(activation), "weight_on": weight_on, "precision": precision}
    return _forward(stack, x, topk_ids, topk_weights, layer, split=split, exchange=exchange, backend=backend, **options)


def _check_split(stack: ShardedStack, split: tuple[str, ...], tokens: int) -> None:
    mesh = stack.mesh
    unknown = [axis for axis in split if axis not in mesh.axis_names]
    if unknown or len(set(split)) < len(split) or stack.tensor_axis in split:
        raise ValueError(
            f"split_tokens must name different axes of the mesh {mesh.axis_names}, without the tensor axis"
            f" {stack.tensor_axis!r}, got {split}"
        )
    parts = prod(mesh.shape[axis] for axis in split)
    if tokens % parts:
        raise ValueError(
            f"{tokens} tokens do not divide over the {parts} devices of split_tokens={split}. Pad x with rows whose"
            " topk_ids are -1, which cost nothing."
        )


def _exchange(stack: ShardedStack, split: tuple[str, ...], exchange: str | None, tokens: int) -> str | None:
    """None where every device of the expert axis has the same tokens: also where it is the only one, or has none."""
    if exchange is not None and exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of None, {', '.join(map(repr, EXCHANGES))}, got {exchange!r}")
    if stack.expert_axis not in split:
        if exchange is not None:
            raise ValueError(
                f"exchange={exchange!r} needs tokens that are split over the expert axis: give"
                f" split_tokens={stack.expert_axis!r}, or leave exchange=None"
            )
        return None
    if stack.mesh.shape[stack.expert_axis] == 1 or tokens == 0:
        return None
    platform = stack.mesh.devices.flat[0].platform
    return exchange or ("ragged" if platform in RAGGED_PLATFORMS else "dense")


@partial(jax.jit, static_argnames=("split", "exchange", "activation", "weight_on", "precision", "backend"))
def _forward(
    stack: ShardedStack,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: Any,
    *,
    split: tuple[str, ...],
    exchange: str | None,
    **options: Any,
) -> jax.Array:
    ids = topk_ids.astype(jnp.int32)
    # From here on every id is an expert's, or -1: also those of the empty experts.
    ids = jnp.where((ids >= 0) & (ids < stack.num_experts), ids, -1)
    rows = PartitionSpec(split or None)
    operands = (stack.stack, x, ids, topk_weights.astype(jnp.float32), layer)
    specs = (
        partition_specs(stack.stack, stack.expert_axis, stack.tensor_axis),
        *(rows,) * 3,
        None if layer is None else PartitionSpec(),
    )
    # Of a device's pairs of a token and a slot, where experts are chosen evenly.
    options["live_share"] = stack.experts_per_device / stack.num_experts
    run = jax.shard_map(
        partial(_on_device, stack.expert_axis, stack.tensor_axis, exchange, options),
        mesh=stack.mesh,
        in_specs=specs,
        out_specs=rows,
        # Kernels tell jax nothing of what varies over the mesh.
        check_vma=False,
    )
    placed = jax.tree.map(partial(_resharded, stack.mesh), operands, specs)
    return run(*placed).astype(x.dtype)


def _on_device(
    expert_axis: str,
    tensor_axis: str | None,
    exchange: str | None,
    options: dict[str, Any],
    stack: ExpertStack,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: Any,
) -> jax.Array:
    """f32[T, H] of the tokens that this device has, from the stack's part that it has."""
    if tensor_axis is not None and stack.down_bias is not None:
        # Each part of I gives an output, and the bias is to be added once.
        first = lax.axis_index(tensor_axis) == 0
        stack = replace(stack, down_bias=jnp.where(first, stack.down_bias, 0))
    experts = stack.num_experts
    if (backend := options["backend"]) is not None:
        semantics = {name: options[name] for name in ("activation", "weight_on", "precision")}
        dispatch.force(backend, stack, x, topk_ids, **semantics)

    def compute(x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array) -> jax.Array:
        own = topk_ids - lax.axis_index(expert_axis) * experts
        own = jnp.where((topk_ids >= 0) & (own >= 0) & (own < experts), own, -1)
        return dispatch.compute(stack, x, own, topk_weights, layer, **options)

    if exchange is None:
        axes = (expert_axis,) if tensor_axis is None else (expert_axis, tensor_axis)
        return lax.psum(compute(x, topk_ids, topk_weights), axes)
    received, back = EXCHANGES[exchange](x, topk_ids, topk_weights, experts, expert_axis)
    y = back(compute(*received))
    return y if tensor_axis is None else lax.psum(y, tensor_axis)


def _resharded(mesh: Mesh, operand: Any, spec: PartitionSpec) -> Any:
    """``operand`` as shard_map wants it: on Auto axes that is XLA's affair, on Explicit ones ours."""
    explicit = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not explicit:
        return operand

    def kept(entry: Any) -> Any:
        axes = tuple(axis for axis in ((entry,) if isinstance(entry, str) else entry or ()) if axis in explicit)
        return axes or None

    return jax.sharding.reshard(operand, NamedSharding(mesh, PartitionSpec(*map(kept, spec))))
