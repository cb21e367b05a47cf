"""The only module that touches unstable names: jax.experimental.pallas.mosaic_gpu and the MLIR dialects under it."""

from __future__ import annotations

from jax._src.lib.mlir import ir as ir
from jax._src.lib.mlir.dialects import arith as arith
from jax._src.lib.mlir.dialects import gpu as gpu
from jax._src.lib.mlir.dialects import llvm as llvm
from jax._src.lib.mlir.dialects import memref as memref
from jax._src.lib.mlir.dialects import scf as scf
from jax._src.lib.mlir.dialects import vector as vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["arith", "gpu", "ir", "llvm", "memref", "mgpu", "mosaic_utils", "pl", "plgpu", "scf", "vector"]
