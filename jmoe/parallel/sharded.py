"""An expert stack cut along its expert axis, and along I where wanted, over the axes of a mesh."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..activations import Activation
from ..checks import check_stack
from ..devices import check_process
from ..stack import ExpertStack, Formats, QuantTensor, depth_step, describe


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class ShardedStack:
    """The experts of a layer, ``experts_per_device`` of them on each device along the mesh axis ``expert_axis``.

    Device d holds experts ``[d * n, (d + 1) * n)``, n = experts_per_device; the last ones are empty where the axis does
    not divide ``num_experts``, and no id reaches them. Along ``tensor_axis`` each device holds a part of I. A leading
    layer axis [L, E, ...] stays whole. Made by :func:`shard_experts` and :func:`load_experts`.
    """

    stack: ExpertStack  # leaves [..., n * devices, ...], sharded
    # Static: no leaf can tell empty experts from others.
    num_experts: int = field(metadata={"static": True})
    mesh: Mesh = field(metadata={"static": True})
    expert_axis: str = field(metadata={"static": True})
    tensor_axis: str | None = field(metadata={"static": True})

    @property
    def experts_per_device(self) -> int:
        return self.stack.num_experts // self.mesh.shape[self.expert_axis]

    @property
    def hidden_size(self) -> int:
        return self.stack.hidden_size

    @property
    def expert_intermediate(self) -> int:
        return self.stack.expert_intermediate

    @property
    def formats(self) -> Formats:
        return self.stack.formats

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves on all devices, empty experts included, replicas not."""
        return self.stack.nbytes

    def __repr__(self) -> str:
        over = ", ".join(f"{axis!r}: {self.mesh.shape[axis]}" for axis in (self.expert_axis, self.tensor_axis) if axis)
        return f"ShardedStack({self.num_experts} experts over {{{over}}}, up={describe(self.stack.up)})"


def _written(num_experts: int, mesh: Mesh, *axes: str | None) -> bytes:
    axis_types = [kind.name for kind in mesh.axis_types]
    ids = [device.id for device in mesh.devices.flat]
    return json.dumps([num_experts, mesh.axis_names, mesh.devices.shape, axis_types, ids, *axes]).encode()


def _read(static: bytes) -> tuple[int, Mesh, str, str | None]:
    """The mesh is of this process's devices with the same ids."""
    num_experts, names, shape, axis_types, ids, *axes = json.loads(static)
    here = {device.id: device for device in jax.devices()}
    if missing := set(ids) - set(here):
        raise ValueError(
            f"the artefact's mesh has {len(ids)} devices, of which this process does not see the ids"
            f" {sorted(missing)}: read it where jax.devices() has them"
        )
    devices = np.array([here[i] for i in ids]).reshape(shape)
    return num_experts, Mesh(devices, names, axis_types=tuple(AxisType[kind] for kind in axis_types)), *axes


# For jax.export: an artefact names the type, so the name stays what it is.
jax.export.register_pytree_node_serialization(
    ShardedStack,
    serialized_name="jmoe.ShardedStack",
    serialize_auxdata=lambda static: _written(*static),
    deserialize_auxdata=_read,
)


def shard_experts(
    stack: ExpertStack, mesh: Mesh, *, expert_axis: str = "expert", tensor_axis: str | None = None
) -> ShardedStack:
    """The stack's leaves spread over ``mesh``: experts along ``expert_axis``, I along ``tensor_axis``.

    In many processes each one gives the same whole stack; :func:`load_experts` reads what a process needs instead.
    Raises TypeError or ValueError for what is no stack or mesh, for axes that the mesh does not have, and where I does
    not split into whole blocks of down's format.
    """
    check_process()
    _check_any_stack(stack)
    check_axes(mesh, expert_axis, tensor_axis)
    check_split(stack, mesh, tensor_axis)
    num_experts, devices = stack.num_experts, mesh.shape[expert_axis]
    empty = -num_experts % devices

    def placed(leaf: Any, spec: PartitionSpec) -> jax.Array:
        if empty:
            xp = jnp if isinstance(leaf, jax.Array) else np
            widths = [(0, empty if axis == expert_axis else 0) for axis in (*spec, *(None,) * (leaf.ndim - len(spec)))]
            leaf = xp.pad(leaf, widths)
        sharding = NamedSharding(mesh, spec)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: host[index])

    leaves = jax.tree.map(placed, stack, partition_specs(stack, expert_axis, tensor_axis))
    return ShardedStack(leaves, num_experts, mesh, expert_axis, tensor_axis)


def check_axes(mesh: Any, expert_axis: Any, tensor_axis: Any) -> None:
    """Both are axes of ``mesh``, and not the same one."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}. jax.make_mesh makes one.")
    for name, axis in (("expert_axis", expert_axis), ("tensor_axis", tensor_axis)):
        if axis not in mesh.axis_names and not (axis is None and name == "tensor_axis"):
            raise ValueError(f"{name} must be one of the mesh's axes {mesh.axis_names}, got {axis!r}")
    if expert_axis == tensor_axis:
        raise ValueError(f"expert_axis and tensor_axis must differ, got {expert_axis!r} for both")


def check_split(stack: ExpertStack, mesh: Mesh, tensor_axis: str | None) -> None:
    """ValueError where I does not split over ``tensor_axis`` between blocks of down."""
    parts = 1 if tensor_axis is None else mesh.shape[tensor_axis]
    inner, step = stack.expert_intermediate, depth_step(stack.down)
    if parts > 1 and inner % (parts * step):
        possible = [n for n in range(1, inner // step + 1) if inner % (n * step) == 0] or [1]
        raise ValueError(
            f"expert_intermediate {inner} does not split over the {parts} devices of mesh axis {tensor_axis!r}: rows of"
            f" down ({stack.formats.down}) can be cut every {step} weights only, between blocks, which allows"
            f" {', '.join(map(str, possible))} equal parts. Give the tensor axis one of these sizes, and the other"
            " devices to the expert axis."
        )


def partition_specs(stack: ExpertStack, expert_axis: str, tensor_axis: str | None) -> ExpertStack:
    """The stack with a PartitionSpec for every leaf; gate and up are cut along O = I, down along D = I."""

    def spec(rank: int, expert_at: int, split_at: int | None) -> PartitionSpec:
        axes: list[str | None] = [None] * rank
        axes[expert_at] = expert_axis
        if split_at is not None:
            axes[split_at] = tensor_axis
        return PartitionSpec(*axes)

    def projection(leaf: Any, split_at: int) -> Any:
        if not isinstance(leaf, QuantTensor):
            return None if leaf is None else spec(leaf.ndim, -3, split_at)
        # A column plane has its two axes the other way round.
        places = (split_at if plane.by_row else -3 - split_at for plane in leaf.spec.layout)
        planes = (spec(len(plane.shape), -3, at) for plane, at in zip(leaf.planes, places, strict=True))
        return QuantTensor(leaf.format, type(leaf.planes)(*planes))

    def vector(leaf: Any, expert_at: int, split_at: int | None) -> Any:
        return None if leaf is None else spec(len(leaf.shape), expert_at, split_at)

    return replace(
        stack,
        gate=projection(stack.gate, -2),
        up=projection(stack.up, -2),
        down=projection(stack.down, -1),
        gate_bias=vector(stack.gate_bias, -2, -1),
        up_bias=vector(stack.up_bias, -2, -1),
        down_bias=vector(stack.down_bias, -2, None),
        down_scale=vector(stack.down_scale, -1, None),
    )


def _check_any_stack(stack: Any) -> None:
    gateless = getattr(stack, "gate", 0) is None
    layered = getattr(getattr(stack, "up", None), "ndim", 3) > 3
    check_stack(stack, 0 if layered else None, Activation("relu2" if gateless else "silu"))
