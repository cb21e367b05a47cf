"""The CPU kernels: a whole layer of packed experts in one call of XLA's FFI. Optional: built where a compiler is.

    y[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t]),   e = topk_ids[t, k]

The C++ is described in README.md beside this file, and built by ``build.py``.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TARGET = "jmoe_cpu_moe_layer"


@functools.cache
def _load() -> tuple[str | None, str | None]:
    """(instruction set, None) of the library, which is registered with XLA; or (None, why it cannot be used)."""
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        return None, "the CPU kernels were not built (no C++ compiler at installation?)"
    try:
        library = ctypes.CDLL(str(found[0]))
        library.jmoe_cpu_isa.restype = ctypes.c_char_p
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.jmoe_cpu_moe_layer), platform="cpu")
    except Exception as error:
        return None, f"the CPU kernels cannot be loaded: {error}"
    isa = library.jmoe_cpu_isa()
    if isa is None:
        return None, "JMOE_CPU_ISA names an instruction set that this machine or build does not have"
    return isa.decode(), None


def isa() -> str | None:
    """The instruction set in use: the best that the machine has, or the one that JMOE_CPU_ISA names."""
    return _load()[0]


def why_unavailable(*, tokens: int, top_k: int | None = None) -> str | None:
    """Why the kernels do not take a call on packed projections, or None where they do; ``top_k`` None if not known."""
    if tokens == 0 or top_k == 0:
        return "this call has no pair of a token and an expert"
    return _load()[1]


def moe_layer(
    gate: Any,
    up: Any,
    down: Any,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: Any,
    *,
    exact: bool,
) -> jax.Array:
    """f32[T, H]; projections are ``(format, planes)`` with a leading layer axis where ``layer`` is an index."""
    experts, inner = up[1][0].shape[-3:-1]
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(x.shape, jnp.float32))
    return call(
        x.astype(jnp.float32),
        topk_ids,
        topk_weights.astype(jnp.float32),
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        *(plane for _, planes in (gate, up, down) for plane in planes),
        gate=gate[0],
        up=up[0],
        down=down[0],
        experts=np.int64(experts),
        inner=np.int64(inner),
        exact=exact,
    )
