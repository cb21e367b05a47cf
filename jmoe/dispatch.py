"""Which backend computes a call, and why: the only importer of pallas_kernels and metal_bridge."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_batching import custom_vmap

import metal_bridge
import pallas_kernels

from . import checks
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
    | cuda            | "jnp" for all others, through XLA                                                          |
    | mps, METAL      | "jnp"                                                                                      |
    | cpu, all others | "jnp"                                                                                      |

    ``platform`` defaults to that of ``jax.default_backend()``. Only shapes and dtypes are looked at.
    """
    checks.check_options(activation, precision, None)
    platform = platform or jax.default_backend()
    platform = _LOWERING_NAME.get(platform, platform)
    if platform == "cuda":
        why_not = _why_no_kernel(stack, x, topk_ids, activation)
        if why_not is not None:
            return Choice("jnp", f"cuda, but {why_not}: dequantise an expert, then matmul, in XLA")
        return Choice("pallas", f"cuda, {', '.join(map(str, stack.formats))}, {x.shape[0]} tokens")
    if platform in ("mps", "METAL"):
        return Choice("jnp", f"{platform}, but {metal_bridge.why_unavailable()}")
    return Choice("jnp", f"platform {platform} has no kernels of its own: dequantise an expert, then matmul, in XLA")


def _why_no_kernel(stack: ExpertStack, x: Any, topk_ids: Any, activation: str) -> str | None:
    projections = {"gate": stack.gate, "up": stack.up, "down": stack.down}
    for name, projection in projections.items():
        if not isinstance(projection, QuantTensor):
            return f"{name} is {'absent' if projection is None else 'dense'}"
    for name in ("gate_bias", "up_bias", "down_bias", "down_scale"):
        if getattr(stack, name) is not None:
            return f"the kernels do not take {name}"
    if activation != "silu":
        return f"the kernels do not take activation {activation!r}"
    formats = {name: (p.format, p.shape[-2:]) for name, p in projections.items()}
    top_k = None if topk_ids is None else topk_ids.shape[1]
    return pallas_kernels.why_unavailable(formats, tokens=x.shape[0], top_k=top_k)


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
    """f32[T, H]: the kernels where the call is lowered for CUDA and they take it, XLA everywhere else."""

    def xla(stack, x, topk_ids, topk_weights, layer):
        return moe_jnp(stack, x, topk_ids, topk_weights, activation=activation, layer=layer)

    operands = (stack, x, topk_ids, topk_weights, layer)
    choice = which_backend(stack, x, topk_ids, activation=activation, precision=precision, platform="cuda")
    if backend == "jnp" or choice.name != "pallas":
        return xla(*operands)

    def kernels(stack, x, topk_ids, topk_weights, layer):
        gate, up, down = ((p.format, p.planes) for p in (stack.gate, stack.up, stack.down))
        return pallas_kernels.moe_few_tokens(gate, up, down, x, topk_ids, topk_weights, layer)

    @custom_vmap
    def batchable(*operands):
        return lax.platform_dependent(*operands, cuda=kernels, default=xla)

    # A kernel has neither a batching nor a differentiation rule: those transformations go through XLA.
    @batchable.def_vmap
    def batched(axis_size, in_batched, *operands):
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
        return jax.vmap(xla, in_axes=tuple(axes), axis_size=axis_size)(*operands), True

    run = jax.custom_jvp(batchable)

    @run.defjvp
    def differentiated(primals, tangents):
        stack, x, topk_ids, topk_weights, layer = primals
        of_x_and_weights = lambda x, w: xla(stack, x, topk_ids, w, layer)  # noqa: E731
        _, tangent = jax.jvp(of_x_and_weights, (x, topk_weights), (tangents[1], tangents[3]))
        return run(*primals), tangent

    return run(*operands)
