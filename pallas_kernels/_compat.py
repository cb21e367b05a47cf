"""The only module that touches unstable names: jax.experimental.pallas.mosaic_gpu and the MLIR dialects under it.

``Any`` on purpose: their types are not public, and change between the versions of jax that jmoe supports.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

pl: Any = import_module("jax.experimental.pallas")
plgpu: Any = import_module("jax.experimental.pallas.mosaic_gpu")
mgpu: Any = import_module("jax.experimental.mosaic.gpu")
mosaic_utils: Any = import_module("jax.experimental.mosaic.gpu.utils")
ir: Any = import_module("jax._src.lib.mlir").ir
_dialects: Any = import_module("jax._src.lib.mlir.dialects")
arith, gpu, llvm, memref = _dialects.arith, _dialects.gpu, _dialects.llvm, _dialects.memref
nvvm, scf, vector = _dialects.nvvm, _dialects.scf, _dialects.vector
