"""The CPU kernels: a whole layer of packed experts in one call of XLA's FFI. Optional: built where a compiler is.

    y[t] = sum_k topk_weights[t, k] * down_e(act(gate_e x[t], up_e x[t])),   e = topk_ids[t, k]

README.md beside this file describes the C++; build.py compiles it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..activations import SigmoidGate

TARGET = "jmoe_cpu_moe_layer"
FORCED_ISA = "JMOE_CPU_ISA"
FORMATS = (
    *("q4_k", "q5_k", "q6_k", "q5_0", "q8_0", "q4_0", "mxfp4"),
    *("q3_k", "q2_k", "q5_1", "q4_1", "iq4_nl", "iq4_xs"),
)


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernels, registered with XLA, or why they cannot be used."""
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        return "the CPU kernels were not built: install jmoe again where a C++17 compiler is"
    try:
        library = ctypes.CDLL(str(found[0]))
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.jmoe_cpu_moe_layer_2), platform="cpu")
    except Exception as error:  # a build of an older jmoe; a processor, libstdc++ or jaxlib older than the build's
        reason = str(error).strip().splitlines()[-1]
        return f"the CPU kernels do not load: {reason}. Build them here: pip install --no-build-isolation"
    library.jmoe_cpu_isa.restype = ctypes.c_char_p
    return library


def isa() -> str | None:
    """The instruction set in use: the best that this machine has, or the one that JMOE_CPU_ISA names; None if none."""
    library = _library()
    name = None if isinstance(library, str) else library.jmoe_cpu_isa(_forced_isa().encode())
    return None if name is None else name.decode()


def why_unavailable(
    formats: Mapping[str, str] = MappingProxyType({}), *, tokens: int, top_k: int | None = None
) -> str | None:
    """Why the kernels do not take a call, or None where they do.

    ``formats``: projection name -> format; ``top_k`` None where it is not known yet.
    """
    for name, format_name in formats.items():
        if format_name not in FORMATS:
            return f"there is no kernel for {name}'s format {format_name}"
    if tokens == 0 or top_k == 0:
        return "this call has no pair of a token and an expert"
    library = _library()
    if isinstance(library, str):
        return library
    if isa() is None:
        return f"{FORCED_ISA}={_forced_isa()!r} is no instruction set of this machine and build"
    return None


def _forced_isa() -> str:
    return os.environ.get(FORCED_ISA, "")


def moe_layer(
    gate: Any,
    up: Any,
    down: Any,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: Any,
    leaves: Sequence[Any],
    *,
    activation: SigmoidGate,
    weight_on: str,
    exact: bool,
) -> jax.Array:
    """f32[T, H] of the formula above.

    Projections are ``(format, planes)``, gate None where there is none (``activation`` says nothing then, and act is
    relu(up)^2). ``leaves`` are gate_bias, up_bias, down_bias and down_scale, or None for each. Planes and leaves have a
    leading layer axis where ``layer`` is an index. x and h are 16-bit integers times a scale for each 32 of them, or
    f32 where ``exact``.
    """
    experts, inner = up[1][0].shape[-3:-1]
    # Made by an operation: an array of jax's own would be a constant that shard_map passes to its body, and XLA's
    # partitioner crashes over inputs without elements (jax 0.11.2).
    absent = jnp.zeros((0,), jnp.float32)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(x.shape, jnp.float32))
    return call(
        x.astype(jnp.float32),
        topk_ids,
        topk_weights.astype(jnp.float32),
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        *(plane for projection in (gate, up, down) if projection for plane in projection[1]),
        *(absent if leaf is None else leaf.astype(jnp.float32) for leaf in leaves),
        gate=gate[0] if gate else "",
        up=up[0],
        down=down[0],
        isa=_forced_isa(),
        experts=np.int64(experts),
        inner=np.int64(inner),
        exact=exact,
        weight_on_input=weight_on == "input",
        slope=np.float32(activation.slope),
        cubic=np.float32(activation.cubic),
        shift=np.float32(activation.shift),
        limit=np.float32(math.inf if activation.limit is None else activation.limit),
    )
