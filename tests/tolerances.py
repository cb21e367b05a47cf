"""Error bounds by dtype, and where each comes from (measured: README's numerics contract).

NMSE = sum((y - r)^2) / sum(r^2) catches what is wrong on average; max|y - r| / rms(r) catches one wrong element, which
NMSE over a thousand others would forgive (one row of 4096 is 2.4e-4). A result must meet both.

    f32    An f32 dot product over depth D, whatever its order, lies at NMSE 5e-14 (D = 256) to 5e-12 (D = 14336) of the
           exact one and at max/rms 1.7e-5; gate, up and down in a row at 7e-14 to 5e-12. The gates are 20 times that.
           TF32 or f16 operands give 9e-8, bf16 weights 3e-6: each fails the f32 gate by three orders or more.
    bf16   x is exact as given and all sums are f32, so what remains is the rounding of y: u = 2^-8 is the worst
           relative error of an element, u^2/6 = 2.5e-6 the mean of its square, 3e-6 the most that was measured. A
           backend may also hold weights and hidden activations in bf16 (2.4e-5): the contract's gate is 6e-5.
    f16    u = 2^-11, 64 times less in the square; held to bf16's gate, because a backend may compute in bf16.
    int8   llama.cpp quantises activations to 8 bits per block: exact arithmetic lies at 3e-4 to 4e-4 of its results.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Bound(NamedTuple):
    """The largest NMSE, and the largest error of one element over the rms of the reference."""

    nmse: float
    max_over_rms: float


# moe_forward's y against the float64 oracle on x as given: the jnp backend, and precision="highest" on a CPU.
LAYER = {
    "float32": Bound(1e-10, 1e-4),
    "bfloat16": Bound(6e-5, 5e-2),
    "float16": Bound(6e-5, 5e-2),
}

# The same in f32 on every other backend (split products; 16-bit integers: 1e-9 to 1e-8, a single row up to 8e-8), and
# with precision="highest" on a GPU, where the largest error of an element goes with the root of the NMSE: two bf16
# terms give 2e-10 to 4e-10 and, of 1.4 million elements, 1.9e-4.
KERNEL_F32 = Bound(1e-7, 5e-3)
HIGHEST_ON_GPU = Bound(1e-9, 5e-4)
# Decode on a GPU, 16-bit x, before y is rounded.
DECODE_BEFORE_ROUNDING = Bound(1e-5, 5e-2)

# llama.cpp's own activations; one element of 17 * 256 may lie further out, and the oracle's gates catch that.
LLAMA_CPP_NMSE = 1e-3

# softmax in f32 of logits z within 30 of their maximum: rounding z - max costs 30 * 2^-24 relative in the exponential,
# and exp, the sum over E and the two quotients a few 2^-24 each.
ROUTER_WEIGHT_RTOL = 64 * 2.0**-24

# Gradients are sums of f32 products like y itself. The reference is a central difference of the float64 oracle with
# step h = 1e-4: its own error is h^2 / 6 of the third derivative and 1e-16 |y| / h, both below 1e-8 relative.
GRADIENT = Bound(1e-10, 1e-4)

# A plane must not take more than this times the file's bytes (Q4_K's unpacked 6-bit scales take 1.028).
PLANE_BYTES = 1.05


def of_kernels(dtype: Any) -> Bound:
    """A layer's by a GPU's kernels, x in ``dtype``."""
    name = np.dtype(dtype).name
    return KERNEL_F32 if name == "float32" else LAYER[name]
