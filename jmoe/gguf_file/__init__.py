"""GGUF files: open and check them, find the expert tensors, load them as pytrees.

`load` is not imported here: opening and inspecting a file needs neither jax nor a device.
"""

from jmoe.gguf_file.errors import DenseFallbackWarning as DenseFallbackWarning
from jmoe.gguf_file.errors import GgufError as GgufError
from jmoe.gguf_file.file import GgufFile as GgufFile
from jmoe.gguf_file.header import TensorInfo as TensorInfo
from jmoe.gguf_file.names import moe_layers as moe_layers
