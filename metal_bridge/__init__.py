"""The Apple path: GGUF planes as MLX's affine format, its product in JAX, and Metal kernels for MLX users.

Imports jax, numpy and the standard library only; ``metal_bridge.mlx``, for users of MLX, imports MLX when it is called.
``python -m metal_bridge`` checks a Mac and prints what can be pasted into an issue.
"""

from __future__ import annotations

from .affine import BITS as BITS
from .affine import Affine as Affine
from .affine import to_affine as to_affine
from .plugin import why_unavailable as why_unavailable
from .product import quantized_matmul as quantized_matmul
