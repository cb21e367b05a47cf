"""Which backend computes a call, and why: the only importer of pallas_kernels, metal_bridge and cpu_kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

import metal_bridge
import pallas_kernels

from . import checks, cpu_kernels
from .reference import moe_jnp
from .stack import ExpertStack, QuantTensor


class Choice(NamedTuple):
    """A backend's name, and the reason for it."""

    name: str
    why: str


# What jax calls a platform, and what its lowering rules call it.
_LOWERING_NAME = {"gpu": "cuda"}


def which_backend(
    stack: ExpertStack,
    x: Any,
    topk_ids: Any = None,
    *,
    activation: str = "silu",
    precision: str | None = None,
    platform: str | None = None,
) -> Choice:
    """What ``moe_forward`` runs for these arguments on ``platform``, and why.

    | platform        | runs                                                                                       |
    |-----------------|--------------------------------------------------------------------------------------------|
    | cuda            | "pallas" where ``pallas_kernels`` takes the formats, the shapes and the number of tokens   |
    | cpu             | "cpu" where ``jmoe.cpu_kernels`` was built and all projections are packed                  |
    | cuda, cpu       | "jnp" for all others, through XLA                                                          |
    | mps, METAL      | "jnp"                                                                                      |
    | all others      | "jnp"                                                                                      |

    ``platform`` defaults to that of ``jax.default_backend()``. Only shapes and dtypes are looked at.
    """
    checks.check_options(activation, precision, None)
    platform = platform or jax.default_backend()
    platform = _LOWERING_NAME.get(platform, platform)
    kernels = {"cuda": ("pallas", _why_no_pallas), "cpu": ("cpu", _why_no_cpu_kernels)}.get(platform)
    if kernels is not None:
        name, why_none = kernels
        why_not = _why_no_kernel(stack, activation) or why_none(stack, x, topk_ids)
        if why_not is not None:
            return Choice("jnp", f"{platform}, but {why_not}: dequantise an expert, then matmul, in XLA")
        on = f"{platform} ({cpu_kernels.isa()})" if name == "cpu" else platform
        return Choice(name, f"{on}, {', '.join(map(str, stack.formats))}, {x.shape[0]} tokens")
    if platform in ("mps", "METAL"):
        return Choice("jnp", f"{platform}, but {metal_bridge.why_unavailable()}")
    return Choice("jnp", f"platform {platform} has no kernels of its own: dequantise an expert, then matmul, in XLA")


def _why_no_kernel(stack: ExpertStack, activation: str) -> str | None:
    """What no kernel takes."""
    for name in ("gate", "up", "down"):
        projection = getattr(stack, name)
        if not isinstance(projection, QuantTensor):
            return f"{name} is {'absent' if projection is None else 'dense'}"
    for name in ("gate_bias", "up_bias", "down_bias", "down_scale"):
        if getattr(stack, name) is not None:
            return f"the kernels do not take {name}"
    return None if activation == "silu" else f"the kernels do not take activation {activation!r}"


def _why_no_pallas(stack: ExpertStack, x: Any, topk_ids: Any) -> str | None:
    formats = {name: (getattr(stack, name).format, getattr(stack, name).shape[-2:]) for name in ("gate", "up", "down")}
    return pallas_kernels.why_unavailable(formats, tokens=x.shape[0], top_k=_top_k(topk_ids))


def _why_no_cpu_kernels(stack: ExpertStack, x: Any, topk_ids: Any) -> str | None:
    return cpu_kernels.why_unavailable(tokens=x.shape[0], top_k=_top_k(topk_ids))


def _top_k(topk_ids: Any) -> int | None:
    return None if topk_ids is None else topk_ids.shape[1]


def force(name: str, stack: ExpertStack, x: Any, topk_ids: Any, **options: Any) -> None:
    """Raises ValueError where a backend that the caller insists on cannot run."""
    choice = which_backend(stack, x, topk_ids, **options)
    if name not in ("jnp", choice.name):
        raise ValueError(f"backend={name!r} cannot run this call: {choice.why}. Leave backend=None to take what can.")


def compute(
    stack: ExpertStack,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: Any,
    *,
    activation: str,
    precision: str | None,
    backend: str | None,
) -> jax.Array:
    """f32[T, H]: the kernels of the platform that the call is lowered for, where they take it; XLA everywhere else."""
    options = {"activation": activation, "precision": precision, "backend": backend}

    def xla(stack, x, topk_ids, topk_weights, layer):
        return moe_jnp(stack, x, topk_ids, topk_weights, activation=activation, layer=layer)

    def pallas(stack, x, topk_ids, topk_weights, layer):
        return pallas_kernels.moe_few_tokens(*_packed(stack), x, topk_ids, topk_weights, layer)

    def native(stack, x, topk_ids, topk_weights, layer):
        exact = precision == "highest"
        return cpu_kernels.moe_layer(*_packed(stack), x, topk_ids, topk_weights, layer, exact=exact)

    def takes(platform: str) -> bool:
        choice = which_backend(stack, x, topk_ids, activation=activation, precision=precision, platform=platform)
        return choice.name != "jnp"

    operands = (stack, x, topk_ids, topk_weights, layer)
    kernels = {name: run for name, run in (("cuda", pallas), ("cpu", native)) if backend != "jnp" and takes(name)}
    if not kernels:
        return xla(*operands)

    @custom_vmap
    def batchable(*operands):
        return lax.platform_dependent(*operands, **kernels, default=xla)

    # A kernel has no batching rule: a batch of tokens is more tokens, and one of stacks goes through XLA.
    @batchable.def_vmap
    def batched(axis_size, in_batched, *operands):
        if any(jax.tree.leaves((in_batched[0], in_batched[4]))):
            axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
            return jax.vmap(xla, in_axes=tuple(axes), axis_size=axis_size)(*operands), True
        stack, *per_token, layer = operands
        x, topk_ids, topk_weights = (
            (array if is_batched else jnp.broadcast_to(array, (axis_size, *array.shape))).reshape(-1, array.shape[-1])
            for array, is_batched in zip(per_token, in_batched[1:4], strict=True)
        )
        y = compute(stack, x, topk_ids, topk_weights, layer, **options)
        return y.reshape(axis_size, -1, y.shape[-1]), True

    run = jax.custom_jvp(batchable)

    # Nor a differentiation rule: derivatives go through XLA.
    @run.defjvp
    def differentiated(primals, tangents):
        stack, x, topk_ids, topk_weights, layer = primals
        of_x_and_weights = lambda x, w: xla(stack, x, topk_ids, w, layer)  # noqa: E731
        _, tangent = jax.jvp(of_x_and_weights, (x, topk_weights), (tangents[1], tangents[3]))
        return run(*primals), tangent

    return run(*operands)


def _packed(stack: ExpertStack) -> tuple[Any, Any, Any]:
    gate, up, down = ((p.format, p.planes) for p in (stack.gate, stack.up, stack.down))
    return gate, up, down
