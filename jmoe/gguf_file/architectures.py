"""What files do not say of their MoE layers: the table of architectures.toml, which explains its columns."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from ..activations import GATED


class Architecture(NamedTuple):
    """One table of architectures.toml."""

    gating: str
    normalise: bool | str
    scale: str
    shared: str
    selection_bias: bool
    activation: str
    weight_on: str
    select_on: str

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate projection."""
        return self.activation in GATED


@cache
def architectures() -> dict[str, Architecture]:
    """Every architecture that is known, by the name that files give it."""
    tables = tomllib.loads((files("jmoe.gguf_file") / "architectures.toml").read_text(encoding="utf-8"))
    defaults = tables.pop("defaults")
    return {name: Architecture(**defaults | table) for name, table in tables.items()}
