"""The pytrees: a packed projection, and the expert stack of one layer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from .formats import LAYOUTS, Packed

if TYPE_CHECKING:
    from .gguf_file import GgufFile

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class QuantTensor:
    """A packed projection ``[..., E, O, D]``: integer planes, read as ``formats.LAYOUTS[format]`` says.

    All leaves are integers, so ``jax.grad`` and optimisers take them for data. ``format`` is the only static
    field; every size is read off the leaves, so a vmapped, sliced or stacked QuantTensor stays consistent.
    """

    format: str = field(metadata={"static": True})
    planes: Any  # the format's NamedTuple of integer arrays

    @property
    def spec(self) -> Packed:
        if not isinstance(self.format, str) or self.format not in LAYOUTS:
            raise ValueError(f"format must be one of {', '.join(LAYOUTS)}, got {self.format!r}")
        return LAYOUTS[self.format]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., E, O, D)`` in weights."""
        return self.spec.shape_of(self.planes)

    @property
    def ndim(self) -> int:
        return len(self.planes[0].shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(_nbytes(plane) for plane in self.planes)

    def dequantise(self) -> Array:
        """f32[..., E, O, D]. All of it: meant for one expert (``tensor[e].dequantise()``) and for tests."""
        return self.spec.dequantise(self.planes)

    def __getitem__(self, index: Any) -> QuantTensor:
        """Index the leading axes (before O and D), as NumPy would: ``tensor[e]``, ``tensor[layer, e]``."""
        leading = self.ndim - 2
        if (len(index) if isinstance(index, tuple) else 1) > leading:
            raise IndexError(
                f"a QuantTensor of shape {list(self.shape)} can be indexed on its first {leading} axes only, got"
                f" {index!r}: rows and weights are packed. Dequantise an expert first."
            )
        return QuantTensor(self.format, jax.tree.map(lambda plane: plane[index], self.planes))

    def __repr__(self) -> str:
        return f"QuantTensor({describe(self)})"


Projection = QuantTensor | Array


class Formats(NamedTuple):
    """The format's name, or the dtype's where dense, of each projection; None for an absent gate."""

    gate: str | None
    up: str
    down: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class ExpertStack:
    """The experts of one Mixture-of-Experts layer: ``expert_e(x) = down_e(act(gate_e x) * up_e x)``.

    Each projection is a :class:`QuantTensor` or a dense float array; a leading layer axis ``[L, E, ...]`` on every
    leaf makes it a stack of layers, read with ``moe_forward(..., layer=l)``. Nothing is validated here, so that
    ``vmap``, ``tree.map`` and ``in_axes`` trees may hold what they like: the loaders and ``moe_forward`` check.
    """

    gate: Any  # [..., E, I, H], or None where the architecture has no gate
    up: Any  # [..., E, I, H]
    down: Any  # [..., E, H, I]
    gate_bias: Any = None  # f32[..., E, I]
    up_bias: Any = None  # f32[..., E, I]
    down_bias: Any = None  # f32[..., E, H]
    down_scale: Any = None  # f32[..., E]

    @property
    def num_experts(self) -> int:
        return self.up.shape[-3]

    @property
    def hidden_size(self) -> int:
        return self.up.shape[-1]

    @property
    def expert_intermediate(self) -> int:
        return self.up.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(_nbytes(leaf) for leaf in jax.tree.leaves(self))

    @property
    def formats(self) -> Formats:
        return Formats(
            None if self.gate is None else format_name(self.gate), format_name(self.up), format_name(self.down)
        )

    @property
    def gate_stacked(self) -> QuantTensor | None:
        """The packed gate projection [E, I, H], or None where it is dense or absent."""
        return _packed(self.gate)

    @property
    def up_stacked(self) -> QuantTensor | None:
        """The packed up projection [E, I, H], or None where it is dense."""
        return _packed(self.up)

    @property
    def down_stacked(self) -> QuantTensor | None:
        """The packed down projection [E, H, I], or None where it is dense."""
        return _packed(self.down)

    def gate_up(self, expert: Any) -> Array:
        """f32[2I, H]: one expert's gate rows, then its up rows, dequantised ([I, H] where there is no gate)."""
        parts = [dense(window(p, (expert,))) for p in (self.gate, self.up) if p is not None]
        return jnp.concatenate(parts, axis=-2)

    def down_of(self, expert: Any) -> Array:
        """f32[H, I]: one expert's down projection, dequantised."""
        return dense(window(self.down, (expert,)))

    @classmethod
    def from_dense_stacks(
        cls,
        gate: Any,
        up: Any,
        down: Any,
        *,
        num_experts: int,
        hidden_size: int,
        expert_intermediate: int,
    ) -> ExpertStack:
        """A dense stack from arrays that are flat or already ``[E, I, H]`` (gate, up) and ``[E, H, I]`` (down).

        Floating-point arrays keep their dtype (f32, bf16 or f16); gate may be None. Raises ValueError where the
        number of elements or the shape does not fit the sizes.
        """
        wide = (num_experts, expert_intermediate, hidden_size)
        tall = (num_experts, hidden_size, expert_intermediate)
        return cls(
            gate=None if gate is None else _shaped("gate", gate, wide),
            up=_shaped("up", up, wide),
            down=_shaped("down", down, tall),
        )

    @classmethod
    def load_from_gguf(
        cls,
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
        """The experts of layer ``layer_idx`` of an open file, packed as the file holds them.

        Sizes that are given must match the file's. ``device`` or ``sharding`` goes to ``jax.device_put``. Raises
        ``GgufError`` for a malformed or inconsistent file, or non-finite scales unless ``check_finite=False``.
        """
        from .gguf_file.load import load_expert_stack

        return load_expert_stack(
            gguf,
            layer_idx,
            num_experts,
            hidden_size,
            expert_intermediate,
            device=device,
            sharding=sharding,
            check_finite=check_finite,
        )

    @classmethod
    def open_and_load(
        cls,
        path: str | os.PathLike[str],
        layer_idx: int,
        num_experts: int | None = None,
        hidden_size: int | None = None,
        expert_intermediate: int | None = None,
        **options: Any,
    ) -> ExpertStack:
        """:meth:`load_from_gguf` of the file at ``path``, which is closed again."""
        from .gguf_file import GgufFile

        with GgufFile(path) as gguf:
            return cls.load_from_gguf(gguf, layer_idx, num_experts, hidden_size, expert_intermediate, **options)

    def __repr__(self) -> str:
        present = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        parts = ", ".join(f"{name}={describe(leaf)}" for name, leaf in present if leaf is not None)
        return f"ExpertStack({parts})"


# For jax.export: artefacts name these types, so the names stay what they are.
for _node in (QuantTensor, ExpertStack):
    jax.export.register_pytree_node_serialization(
        _node,
        serialized_name=f"jmoe.{_node.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=lambda static: tuple(json.loads(static)),
    )
for _planes in dict.fromkeys(layout.planes for layout in LAYOUTS.values()):
    jax.export.register_namedtuple_serialization(_planes, serialized_name=f"jmoe.{_planes.__name__}")


def window(leaf: Any, index: tuple[Any, ...], axis: int | None = None, part: Any = 0, parts: int = 1) -> Any:
    """``leaf[index]``, of its ``axis`` (-2: rows O, -1: depth D) only the ``part``-th of ``parts`` equal parts.

    Indices may be traced. One slice: of two, XLA would lift the layer's out of the loop over experts and copy it.
    """
    if isinstance(leaf, QuantTensor):
        axes = (axis if axis is None or plane.by_row else -3 - axis for plane in leaf.spec.layout)
        planes = (window(plane, index, at, part, parts) for plane, at in zip(leaf.planes, axes, strict=True))
        return QuantTensor(leaf.format, type(leaf.planes)(*planes))
    picked = dict(enumerate(index))
    if axis is not None:
        cut = leaf.ndim + axis
        leaf = leaf.reshape(*leaf.shape[:cut], parts, leaf.shape[cut] // parts, *leaf.shape[cut + 1 :])
        picked[cut] = part
    starts = [jnp.asarray(picked.get(at, 0), jnp.int32) for at in range(leaf.ndim)]
    sizes = [1 if at in picked else size for at, size in enumerate(leaf.shape)]
    return jnp.squeeze(lax.dynamic_slice(leaf, starts, sizes), tuple(picked))


def depth_step(projection: Any) -> int:
    """Between how many weights a row may be cut: whole blocks, and 64 at least, where two sub-blocks share bytes."""
    return max(64, projection.spec.block_weights) if isinstance(projection, QuantTensor) else 1


def dense(projection: Projection) -> Array:
    """f32 weights of a projection, packed or not."""
    if isinstance(projection, QuantTensor):
        return projection.dequantise()
    return projection.astype(jnp.float32)


def format_name(projection: Any) -> str:
    """``"q4_k"`` for a packed projection, ``"bfloat16"`` and its like for a dense one."""
    return projection.format if isinstance(projection, QuantTensor) else str(jnp.dtype(projection.dtype))


def describe(leaf: Any) -> str:
    """``q4_k[128, 768, 2048] 113.2 MB``; falls back to ``repr`` for what a tree.map put in a leaf's place."""
    try:
        return f"{format_name(leaf)}{list(leaf.shape)} {_nbytes(leaf) / 1e6:.1f} MB"
    except (AttributeError, TypeError):
        return repr(leaf.planes if isinstance(leaf, QuantTensor) else leaf)


def _nbytes(leaf: Any) -> int:
    # Not leaf.nbytes: a tracer or a jax.ShapeDtypeStruct has a shape and a dtype only.
    if isinstance(leaf, QuantTensor):
        return leaf.nbytes
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def _packed(projection: Any) -> QuantTensor | None:
    return projection if isinstance(projection, QuantTensor) else None


def _shaped(name: str, value: Any, shape: Sequence[int]) -> Array:
    array = jnp.asarray(value)
    wanted = tuple(shape)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating-point array, got {array.dtype}{list(array.shape)}")
    if array.shape != wanted and array.shape != (math.prod(wanted),):
        raise ValueError(
            f"{name} must be {list(wanted)} or flat with {math.prod(wanted)} elements, got {list(array.shape)}."
            " Check num_experts, hidden_size and expert_intermediate; GGUF lists dims fastest first."
        )
    return array.reshape(wanted)
