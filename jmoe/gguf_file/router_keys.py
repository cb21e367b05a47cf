"""The router of a file: its metadata read as the table of architectures says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..routing import RouterConfig
from .architectures import Architecture
from .errors import GgufError
from .file import GgufFile
from .metadata import shortened

# enum llama_expert_gating_func_type; 0 stands for none stated.
_GATING_FUNCS = {1: "softmax", 2: "sigmoid", 3: "softmax_top_k", 4: "sqrt_softplus"}

# Of float32.
_LARGEST = 3.4e38


def read_router_config(gguf: GgufFile, architecture: Architecture, top_k: int | None = None) -> RouterConfig:
    """The config that the file's keys and its architecture's defaults make; GgufError names the key that is wrong.

    ``top_k`` replaces the file's.
    """
    top_k = top_k or _read(gguf, "expert_used_count", _is_count, "an integer from 1 on", None)
    if not top_k:
        raise GgufError(f"{gguf.path}: no {gguf.architecture}.expert_used_count: give router_config=, which says top_k")
    groups = _read(gguf, "expert_group_count", _is_integer, "an integer from 0 on", 0) or 1
    used = _read(gguf, "expert_group_used_count", _is_integer, "an integer from 0 on", groups) or groups
    normalise, scale = architecture.normalise, 0.0
    if normalise == "key":
        normalise = _read(gguf, "expert_weights_norm", lambda value: isinstance(value, bool), "a boolean", False)
    if architecture.scale == "key":
        scale = _read(gguf, "expert_weights_scale", _is_finite, "a finite float32", 0.0)
    if used > groups:
        raise GgufError(
            f"{gguf.path}: {gguf.architecture}.expert_group_used_count is {used}, but there are {groups} groups"
        )
    return RouterConfig(
        top_k=top_k,
        normalise=bool(normalise),
        gating=_gating(gguf, architecture),
        scale=float(scale) or 1.0,
        # One group, or all of them: no choice among them.
        group_count=groups if used < groups else 1,
        groups_used=used if used < groups else 1,
        select_on=architecture.select_on,
    )


def _gating(gguf: GgufFile, architecture: Architecture) -> str:
    keyed, _, otherwise = architecture.gating.partition(", else ")
    if keyed != "key":
        return keyed
    known = ", ".join(f"{code} ({name})" for code, name in _GATING_FUNCS.items())
    is_known = lambda value: _is_integer(value) and value in (0, *_GATING_FUNCS)  # noqa: E731
    code = _read(gguf, "expert_gating_func", is_known, f"one of {known}", 0)
    if not code and not otherwise:
        raise GgufError(
            f"{gguf.path}: no {gguf.architecture}.expert_gating_func, wanted one of {known}: give router_config="
        )
    if not code and _is_glm_flash(gguf):
        return "sigmoid"
    return _GATING_FUNCS.get(code, otherwise)


def _is_glm_flash(gguf: GgufFile) -> bool:
    """Whether the file is GLM-4.7-Flash's, by the sizes that llama.cpp's deepseek2.cpp knows it by."""
    embedding = gguf.tensors.get("token_embd.weight")
    words = gguf.metadata.get("deepseek2.vocab_size", embedding.shape[0] if embedding else None)
    return words == 154_880 and gguf.metadata.get("deepseek2.block_count") in (47, 48)


def _read(gguf: GgufFile, key: str, fits: Callable[[Any], bool], wanted: str, absent: Any) -> Any:
    name = f"{gguf.architecture}.{key}"
    value = gguf.metadata.get(name, absent)
    if name in gguf.metadata and not fits(value):
        raise GgufError(f"{gguf.path}: {name} must be {wanted}, got {shortened(value)}")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
