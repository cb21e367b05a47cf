"""``y = x @ w^T`` with w in MLX's affine format, by the custom call ``mps.quantized_matmul`` of jax-mps.

The call exists since jax-mps 0.10.9 and hands its operands to ``mlx::core::quantized_matmul`` in mode "affine". It is
written here as jax-mps's own Python op writes it, which takes 4 and 8 bits only and does not exist where jax-mps is not
installed. It can be traced anywhere and lowered for ``mps``; it runs there and nowhere else, and it has no batching or
differentiation rule of its own (``vmap_method`` gives it the former).
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp

from .affine import GROUP


def quantized_matmul(x: Any, words: Any, scales: Any, biases: Any) -> jax.Array:
    """``y[..., o] = sum_d x[..., d] * (scales * q + biases)[..., o, d]``, f32[..., M, O]; sums and products in f32.

    ``x`` f32[..., M, D]; ``words`` u32[..., O, D/32 * bits], ``scales`` and ``biases`` f32[..., O, D/32], with the same
    leading axes. The bits are those that D and the words make.
    """
    bits = words.shape[-1] // scales.shape[-1]
    # In the string form of the attribute: jax-mps reads nothing else, and would take its defaults (groups of 64).
    config = json.dumps({"transpose": 1, "group_size": GROUP, "bits": bits})
    call = jax.ffi.ffi_call(
        "mps.quantized_matmul",
        jax.ShapeDtypeStruct((*x.shape[:-1], words.shape[-2]), jnp.float32),
        custom_call_api_version=1,
        legacy_backend_config=config,
        vmap_method="broadcast_all",
    )
    return call(x, words, scales, biases)
