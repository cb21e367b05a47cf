"""``moe_forward``: check, choose a backend, run. The one public entry to the computation."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from . import checks, devices, dispatch
from .activations import Activation, as_activation
from .stack import ExpertStack


def moe_forward(
    stack: ExpertStack,
    x: Any,
    topk_ids: Any,
    topk_weights: Any,
    *,
    activation: str | Activation = "silu",
    weight_on: str = "output",
    precision: str | None = None,
    backend: str | None = None,
    layer: Any = None,
) -> jax.Array:
    """``y[t] = sum_k topk_weights[t, k] * down_e(act(gate_e x[t], up_e x[t]))``, e = topk_ids[t, k].

    Shapes: ``x`` [T, H] in f32, bf16 or f16; ``topk_ids`` integer [T, K]; ``topk_weights`` float [T, K]. Returns
    ``y`` [T, H] in x's dtype, accumulated in f32. Any T from 0. An id outside [0, E) contributes exactly nothing,
    a repeated id adds up, and a NaN in a token of x stays in its row.

    gate_e, up_e and down_e add the stack's biases, and down_scale[e] multiplies what down_e gives, where it has them.
    ``activation``: a name of :data:`jmoe.activations.NAMES`, "silu" meaning ``act(g, u) = silu(g) * u``, or an
    :class:`jmoe.Activation` with its limit. ``weight_on="input"`` multiplies the expert's x by the weight instead of
    its output (Llama 4). ``precision``: None, or "highest" for f32-class arithmetic throughout (the README's numerics
    contract). ``backend``: None takes what :func:`jmoe.which_backend` says for the platform the call is compiled for; a
    name insists on it. ``layer``: index (may be traced) into a stack whose leaves have a leading layer axis.

    Pure and jitted; differentiable in x, topk_weights and dense projections (packed leaves are integers). Raises
    AssertionError for shapes and dtypes that do not fit (the message names argument, wanted, got and fix), ValueError
    or TypeError for wrong names, stacks and layers, ValueError for concrete arrays on different devices or sharded by
    Explicit mesh axes, RuntimeError in a forked process. Semantics: llama.cpp's build_moe_ffn without the router.
    """
    checks.check_forward(
        stack,
        x,
        topk_ids,
        topk_weights,
        activation=activation,
        weight_on=weight_on,
        precision=precision,
        backend=backend,
        layer=layer,
    )
    options = {"activation": as_activation(activation), "weight_on": weight_on, "precision": precision}
    devices.check_process()
    platform = devices.check_devices(stack, x=x, topk_ids=topk_ids, topk_weights=topk_weights, layer=layer)
    if backend is not None:
        dispatch.force(backend, stack, x, topk_ids, platform=platform, **options)
    topk_ids = checks.narrow_ids(topk_ids, stack.num_experts)
    return _moe_forward(stack, x, topk_ids, topk_weights, layer, backend=backend, **options)


@partial(jax.jit, static_argnames=("activation", "weight_on", "precision", "backend"))
def _moe_forward(
    stack: ExpertStack, x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array, layer: Any, **options: Any
) -> jax.Array:
    weights = topk_weights.astype(jnp.float32)
    return dispatch.compute(stack, x, topk_ids.astype(jnp.int32), weights, layer, **options).astype(x.dtype)
