"""jmoe: packed Mixture-of-Experts stacks from GGUF files, as JAX pytrees and one pure function."""

from __future__ import annotations

from .activations import Activation as Activation
from .dispatch import Choice as Choice
from .dispatch import for_mps as for_mps
from .dispatch import which_backend as which_backend
from .formats import FORMATS as FORMATS
from .gguf_file import DenseFallbackWarning as DenseFallbackWarning
from .gguf_file import GgufError as GgufError
from .gguf_file import GgufFile as GgufFile
from .gguf_file.load import StackedLayers as StackedLayers
from .gguf_file.load import load_expert_stacks as load_expert_stacks
from .gguf_file.moe_layer import load_moe_layers as load_moe_layers
from .gguf_file.save import save_gguf as save_gguf
from .layer import MoELayer as MoELayer
from .layer import moe_layer_forward as moe_layer_forward
from .moe import moe_forward as moe_forward
from .routing import RouterConfig as RouterConfig
from .routing import route as route
from .stack import ExpertStack as ExpertStack
from .stack import QuantTensor as QuantTensor
from .statistics import co_activation as co_activation
from .statistics import load_imbalance as load_imbalance
from .statistics import tokens_per_expert as tokens_per_expert
