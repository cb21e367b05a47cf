"""Which backend computes a call, and why: the only importer of pallas_kernels, metal_bridge and cpu_kernels."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

import metal_bridge
import pallas_kernels

from . import checks, cpu_kernels
from .activations import Activation, as_activation, sigmoid_gate
from .folding import fold
from .formats.mlx import MLX_FORMATS, MLXPlanes, as_f32
from .gathered import can_gather, moe_gathered
from .reference import moe_jnp
from .stack import ExpertStack, QuantTensor, format_name


class Choice(NamedTuple):
    """A backend's name, and the reason for it."""

    name: str
    why: str


LEAVES = ("gate_bias", "up_bias", "down_bias", "down_scale")

# What jax calls a platform, and what its lowering rules call it.
_LOWERING_NAME = {"gpu": "cuda"}


def which_backend(
    stack: ExpertStack,
    x: Any,
    topk_ids: Any = None,
    *,
    activation: str | Activation = "silu",
    weight_on: str = "output",
    precision: str | None = None,
    platform: str | None = None,
) -> Choice:
    """What ``moe_forward`` runs for these arguments on ``platform``, and why.

    | platform        | runs                                                                                       |
    |-----------------|--------------------------------------------------------------------------------------------|
    | cuda            | "pallas" where ``pallas_kernels`` takes formats, shapes and tokens; why names the kernel   |
    | cpu             | "cpu" where ``jmoe.cpu_kernels`` was built and all projections are packed                  |
    | mps             | "mps" where :func:`jmoe.for_mps` converted a projection: MLX's quantised product           |
    | cuda, cpu, mps  | "jnp" for all others, through XLA                                                          |
    | METAL           | "jnp": what runs of the abandoned jax-metal                                                |
    | all others      | "jnp"                                                                                      |

    ``platform`` defaults to that of ``jax.default_backend()``. Only shapes and dtypes are looked at.
    """
    checks.check_options(weight_on, precision, None)
    as_activation(activation)
    platform = platform or jax.default_backend()
    platform = _LOWERING_NAME.get(platform, platform)
    kernels = {"cuda": ("pallas", _why_no_pallas), "cpu": ("cpu", _why_no_cpu_kernels)}.get(platform)
    if kernels is not None:
        name, why_none = kernels
        why_not = _why_not_elsewhere(stack) or why_none(stack, x, topk_ids, weight_on)
        if why_not is not None:
            why = f"{platform}, but {why_not}: dequantise an expert, then matmul, in XLA"
            return Choice("jnp", why + _why_no_mac_gpu(platform))
        on = f"{platform} ({cpu_kernels.isa()})" if name == "cpu" else platform
        formats = ", ".join(map(format_name, _projections(stack).values()))
        kernel = _which_pallas(stack, x, topk_ids, weight_on) if name == "pallas" else ""
        return Choice(name, f"{on}, {formats}, {x.shape[0]} tokens{kernel}")
    if platform == "mps":
        why_not = _why_no_quantised_product(stack)
        if why_not is not None:
            return Choice("jnp", f"mps, but {why_not}: dequantise an expert, then matmul")
        return Choice("mps", f"mps, {', '.join(map(str, stack.formats))}: MLX's product where mlx, others dequantised")
    why = f"platform {platform} has no kernels of its own: dequantise an expert, then matmul, in XLA"
    return Choice("jnp", why + _why_no_mac_gpu(platform))


def _why_no_mac_gpu(platform: str) -> str:
    """In brackets, for a user of a Mac whose GPU JAX cannot use."""
    why_not = None
    if platform == "METAL" or (platform == "cpu" and sys.platform == "darwin"):
        why_not = metal_bridge.why_unavailable()
    return f" ({why_not})" if why_not else ""


def _why_no_quantised_product(stack: ExpertStack) -> str | None:
    formats = [name for name in stack.formats if name is not None]
    if not any(name in MLX_FORMATS for name in formats):
        convertible = sorted({name for name in formats if name in metal_bridge.BITS})
        if convertible:
            return f"{', '.join(convertible)} must be converted once, by jmoe.for_mps(stack)"
        return f"none of {', '.join(sorted(set(formats)))} is an MLX format"
    # Elsewhere a call may be lowered for a Mac, of whose software nothing is known.
    return metal_bridge.why_unavailable() if jax.default_backend() == "mps" else None


def _why_not_elsewhere(stack: ExpertStack) -> str | None:
    for name, projection in _projections(stack).items():
        if format_name(projection) in MLX_FORMATS:
            return f"{name} is in {projection.format}, which is for platform mps"
    return None


def _projections(stack: ExpertStack) -> dict[str, Any]:
    """Those that are there: gate may be None."""
    named = {name: getattr(stack, name) for name in ("gate", "up", "down")}
    return {name: projection for name, projection in named.items() if projection is not None}


def _why_no_pallas(stack: ExpertStack, x: Any, topk_ids: Any, weight_on: str) -> str | None:
    formats = {name: (format_name(p), p.shape[-2:]) for name, p in _projections(stack).items()}
    return pallas_kernels.why_unavailable(formats, tokens=x.shape[0], top_k=_top_k(topk_ids), weight_on=weight_on)


def _which_pallas(stack: ExpertStack, x: Any, topk_ids: Any, weight_on: str) -> str:
    """Which of the GPU's kernels, in words; nothing where that is up to how many experts a token chooses."""
    formats = list(map(format_name, _projections(stack).values()))
    call = {"experts": stack.num_experts, "tokens": x.shape[0], "dtype": x.dtype, "weight_on": weight_on}
    found = {
        pallas_kernels.takes_few(formats, top_k=top_k, **call)
        for top_k in ([topk_ids.shape[1]] if topk_ids is not None else [1, stack.num_experts])
    }
    return "" if len(found) > 1 else f", by the kernel for {'few' if found.pop() else 'many'} tokens"


def _why_no_cpu_kernels(stack: ExpertStack, x: Any, topk_ids: Any, weight_on: str) -> str | None:
    formats = {}
    for name, projection in _projections(stack).items():
        if not isinstance(projection, QuantTensor):
            return f"{name} is dense"
        formats[name] = projection.format
    return cpu_kernels.why_unavailable(formats, tokens=x.shape[0], top_k=_top_k(topk_ids))


def _top_k(topk_ids: Any) -> int | None:
    return None if topk_ids is None else topk_ids.shape[1]


def force(name: str, stack: ExpertStack, x: Any, topk_ids: Any, **options: Any) -> None:
    """Raises ValueError where a backend that the caller insists on cannot run."""
    choice = which_backend(stack, x, topk_ids, **options)
    if name not in ("jnp", choice.name):
        why = (name == "mps" and metal_bridge.why_unavailable()) or choice.why
        raise ValueError(f"backend={name!r} cannot run this call: {why}. Leave backend=None to take what can.")


def compute(
    stack: ExpertStack,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: Any,
    *,
    activation: Activation,
    weight_on: str,
    precision: str | None,
    backend: str | None,
    live_share: float = 1.0,
) -> jax.Array:
    """f32[T, H]: what the platform that the call is lowered for has for it, XLA everywhere else.

    ``live_share``, up to 1: of the pairs of a token and a slot, those to expect to lead to an expert. For speed alone.
    """
    semantics = {"activation": activation, "weight_on": weight_on}

    def xla(stack, x, topk_ids, topk_weights, layer):
        return moe_jnp(stack, x, topk_ids, topk_weights, **semantics, layer=layer)

    def pallas(stack, x, topk_ids, topk_weights, layer):
        leaves = pallas_kernels.Leaves(*(getattr(stack, name) for name in LEAVES))
        semantics = pallas_kernels.Semantics(*sigmoid_gate(activation), weight_on=weight_on)
        exact = precision == "highest"
        operands = *_packed(stack), x, topk_ids, topk_weights, layer, leaves
        return pallas_kernels.moe_layer(*operands, semantics, exact, live_share)

    def native(stack, x, topk_ids, topk_weights, layer):
        leaves = [getattr(stack, name) for name in LEAVES]
        options = {"activation": sigmoid_gate(activation), "weight_on": weight_on, "exact": precision == "highest"}
        return cpu_kernels.moe_layer(*_packed(stack), x, topk_ids, topk_weights, layer, leaves, **options)

    def mlx(stack, x, topk_ids, topk_weights, layer):
        moe = moe_gathered if can_gather(stack, topk_ids.size, _MLX_PRODUCTS) else moe_jnp
        return moe(stack, x, topk_ids, topk_weights, **semantics, layer=layer, products=_MLX_PRODUCTS)

    operands = (stack, x, topk_ids, topk_weights, layer)

    def chosen(platform: str) -> str:
        choice = which_backend(stack, x, topk_ids, **semantics, precision=precision, platform=platform)
        return "jnp" if backend == "jnp" else choice.name

    own = {p: run for p, run in (("cuda", pallas), ("cpu", native), ("mps", mlx)) if chosen(p) != "jnp"}

    @custom_vmap
    def batchable(*operands):
        return lax.platform_dependent(*operands, **own, default=xla) if own else xla(*operands)

    # Kernels have no batching rule, and XLA's would decode an expert for each member in each branch of a tile's switch.
    @batchable.def_vmap
    def batched(axis_size, in_batched, *operands):
        options = {**semantics, "precision": precision, "backend": backend, "live_share": live_share}
        y = compute(*fold(axis_size, in_batched, *operands), **options)
        return y.reshape(axis_size, y.shape[0] // axis_size, y.shape[1]), True

    run = jax.custom_jvp(batchable)

    # Nor has one a differentiation rule: derivatives go through XLA.
    @run.defjvp
    def differentiated(primals, tangents):
        _, tangent = jax.jvp(xla, primals, tangents)
        return run(*primals), tangent

    return run(*operands)


def _packed(stack: ExpertStack) -> tuple[Any, Any, Any]:
    """(format, planes) of gate, up and down, (dtype, (array,)) of a dense one; None for a gate that is not there."""

    def packed(projection: Any) -> Any:
        if isinstance(projection, QuantTensor):
            return projection.format, projection.planes
        return projection if projection is None else (format_name(projection), (projection,))

    return packed(stack.gate), packed(stack.up), packed(stack.down)


def _mlx_product(planes: MLXPlanes, x: jax.Array) -> jax.Array:
    return metal_bridge.quantized_matmul(x, planes.words, as_f32(planes.scales), as_f32(planes.biases))


_MLX_PRODUCTS = dict.fromkeys(MLX_FORMATS, _mlx_product)


def for_mps(stack: ExpertStack, formats: Collection[str] | None = None) -> ExpertStack:
    """The same experts with MLX's affine planes, for ``moe_forward`` on Apple GPUs; to be done once, after loading.

    Q4_K, Q4_0 and Q4_1 become ``mlx4`` (6 bits a weight), Q5_K, Q5_0, Q5_1 and MXFP4 ``mlx5`` (7), Q8_0 ``mlx8`` (10):
    the weights are the same numbers. Other formats and dense projections stay, and so does what is converted already.
    ``formats`` names the formats to convert, where memory is short: what stays packed is dequantised as it is needed.

    The stack may have a leading layer axis. Works on the host and puts a projection where its planes were, so that
    memory holds one projection twice; the result computes on every platform. Raises ValueError where ``formats`` names
    one that has no MLX form, and for MXFP4 blocks with exponent bytes above 251, which do not fit.
    """
    wanted = metal_bridge.BITS.keys() if formats is None else set(formats)
    if unknown := set(wanted) - set(metal_bridge.BITS):
        raise ValueError(
            f"formats must be among {', '.join(metal_bridge.BITS)}, got {', '.join(sorted(unknown))}:"
            " the others have no MLX form"
        )

    def converted(projection: Any) -> Any:
        if not isinstance(projection, QuantTensor) or projection.format not in wanted:
            return projection
        affine = metal_bridge.to_affine(projection.format, projection.planes)
        planes = MLXPlanes(affine.words, affine.scales.view(np.uint32), affine.biases.view(np.uint32))
        name = f"mlx{metal_bridge.BITS[projection.format]}"
        return QuantTensor(name, jax.device_put(planes, getattr(projection.planes.codes, "sharding", None)))

    return replace(stack, gate=converted(stack.gate), up=converted(stack.up), down=converted(stack.down))
