"""Compare what the metadata says of a layer's experts with the sizes of its tensors. Nothing loops over a number
of the metadata: a hostile one only fails to match."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import GgufError
from .file import GgufFile
from .metadata import shortened


def check_metadata(gguf: GgufFile, layer_idx: int, tensor: str, shape: tuple[int, int, int]) -> None:
    """GgufError where a key contradicts the up projection ``tensor`` of shape (E, I, H), or is no positive integer.

    Keys that are absent are not missed: the tensors say it all.
    """
    if "general.architecture" not in gguf.metadata:
        return
    keys = _Keys(gguf, layer_idx)
    experts, inner, hidden = shape
    blocks = keys.scalar("block_count")
    if blocks is not None and not layer_idx < blocks <= len(gguf.tensors):
        raise GgufError(
            f"{gguf.path}: {keys.shown('block_count')} is {blocks}, but there is a layer {layer_idx}, and each block"
            f" holds at least one of the file's {len(gguf.tensors)} tensors"
        )
    used = keys.scalar("expert_used_count")
    if used is not None and used > experts:
        raise GgufError(f"{gguf.path}: {keys.shown('expert_used_count')} is {used}, but {tensor} has {experts} experts")
    # Nemotron 3 Super's experts work in a narrower latent space; 0 or absent where they do not.
    latent = gguf.metadata.get(keys.name("moe_latent_size"), 0)
    width = "embedding_length" if isinstance(latent, int) and latent == 0 else "moe_latent_size"
    stated = {"expert_count": (keys.scalar("expert_count"), experts), width: (keys.scalar(width), hidden)}
    # Where the experts' own length is absent, feed_forward_length is it; old qwen2moe files state the length of
    # all used experts together (llama.cpp: n_ff / n_expert_used).
    if keys.present("expert_feed_forward_length"):
        stated["expert_feed_forward_length"] = (keys.per_layer("expert_feed_forward_length"), inner)
    elif (together := keys.per_layer("feed_forward_length")) != inner * (used or 1):
        stated["feed_forward_length"] = (together, inner)
    for key, (value, size) in stated.items():
        if value is not None and value != size:
            raise GgufError(
                f"{gguf.path}: {keys.shown(key)} is {value}, but {tensor} of shape {list(shape)} says {size}"
            )


class _Keys:
    """The keys of the file's architecture, as positive integers."""

    def __init__(self, gguf: GgufFile, layer_idx: int):
        self._gguf = gguf
        self._layer_idx = layer_idx

    def name(self, key: str) -> str:
        return f"{self._gguf.architecture}.{key}"

    def shown(self, key: str) -> str:
        """The name for a message; an architecture need not be a word."""
        name = self.name(key)
        return name if len(name) <= 80 and name.isprintable() else shortened(name)

    def present(self, key: str) -> bool:
        return self.name(key) in self._gguf.metadata

    def scalar(self, key: str) -> int | None:
        """The value, or None where the key is absent."""
        return self._positive(key, self._gguf.metadata.get(self.name(key)))

    def per_layer(self, key: str) -> int | None:
        """The same for a key that may be an array of one entry a layer."""
        value = self._gguf.metadata.get(self.name(key))
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            if self._layer_idx >= len(value):
                raise GgufError(
                    f"{self._gguf.path}: {self.shown(key)} has {len(value)} entries, but there is a layer"
                    f" {self._layer_idx}"
                )
            value = int(value[self._layer_idx])
        return self._positive(key, value)

    def _positive(self, key: str, value: Any) -> int | None:
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        raise GgufError(f"{self._gguf.path}: {self.shown(key)} must be an integer from 1 on, got {shortened(value)}")
