"""jmoe: packed Mixture-of-Experts stacks from GGUF files, as JAX pytrees and one pure function."""

from __future__ import annotations

from .dispatch import Choice as Choice
from .dispatch import which_backend as which_backend
from .formats import FORMATS as FORMATS
from .moe import moe_forward as moe_forward
from .routing import RouterConfig as RouterConfig
from .routing import route as route
from .stack import ExpertStack as ExpertStack
from .stack import QuantTensor as QuantTensor
