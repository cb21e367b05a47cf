"""GGUF files: open and check them, find the expert tensors, load them as pytrees.

``load`` is not imported here: opening and inspecting a file needs neither jax nor a device.
"""

from .errors import DenseFallbackWarning as DenseFallbackWarning
from .errors import GgufError as GgufError
from .file import GgufFile as GgufFile
from .header import TensorInfo as TensorInfo
from .names import moe_layers as moe_layers
