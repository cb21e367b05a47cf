"""The GGUF types that jmoe keeps packed, one file each. ``FORMATS`` maps a format's name to all that is known of it.

``LAYOUTS`` has what else a QuantTensor may hold: the formats for Apple GPUs, which no file has.
"""

from __future__ import annotations

from gguf import GGMLQuantizationType

from ._format import Format as Format
from ._format import Packed as Packed
from ._format import Plane as Plane
from .iq4_nl import IQ4_NL
from .iq4_xs import IQ4_XS
from .mlx import MLX_FORMATS as MLX_FORMATS
from .mxfp4 import MXFP4
from .q2_k import Q2_K
from .q3_k import Q3_K
from .q4_0 import Q4_0
from .q4_1 import Q4_1
from .q4_k import Q4_K
from .q5_0 import Q5_0
from .q5_1 import Q5_1
from .q5_k import Q5_K
from .q6_k import Q6_K
from .q8_0 import Q8_0

_GGUF = (Q4_K, Q5_K, Q6_K, Q5_0, Q8_0, Q4_0, MXFP4, Q3_K, Q2_K, Q5_1, Q4_1, IQ4_NL, IQ4_XS)

FORMATS: dict[str, Format] = {f.name: f for f in _GGUF}
LAYOUTS: dict[str, Packed] = {**FORMATS, **MLX_FORMATS}

_BY_TYPE = {f.ggml_type: f for f in FORMATS.values()}


def format_of_type(ggml_type: GGMLQuantizationType) -> Format | None:
    """The packed format of a GGUF type, or None where jmoe keeps it dense."""
    return _BY_TYPE.get(ggml_type)
