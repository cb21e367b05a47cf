"""Each item of the surface that jmoe promises, and what stands for it: names, arguments and defaults."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import CASES, random_stack

import jmoe

SIZES: dict[str, Any] = {"num_experts": None, "hidden_size": None, "expert_intermediate": None}
PLACING: dict[str, Any] = {"device": None, "sharding": None, "check_finite": True}
SEMANTICS: dict[str, Any] = {"router_config": None, "activation": None, "weight_on": None}
REQUIRED = inspect.Parameter.empty


class Call(NamedTuple):
    """Something to call: what comes by position, in this order, and what by name, with its default."""

    path: str
    positional: tuple[str, ...]
    named: dict[str, Any] = {}  # noqa: RUF012


CALLS = [
    Call(
        "jmoe.moe_forward",
        ("stack", "x", "topk_ids", "topk_weights"),
        {"activation": "silu", "weight_on": "output", "precision": None, "backend": None, "layer": None},
    ),
    Call(
        "jmoe.which_backend",
        ("stack", "x", "topk_ids"),
        {"activation": "silu", "weight_on": "output", "precision": None, "platform": None},
    ),
    Call("jmoe.Activation", ("name", "limit")),
    Call("jmoe.route", ("logits", "config", "selection_bias"), {"topk_ids": None}),
    Call(
        "jmoe.RouterConfig",
        ("top_k",),
        {
            "normalise": True,
            "gating": "softmax",
            "scale": 1.0,
            "group_count": 1,
            "groups_used": 1,
            "select_on": "probs",
        },
    ),
    Call(
        "jmoe.moe_layer_forward",
        ("layer", "x", "router_input"),
        {"topk_ids": None, "topk_weights": None, "precision": None, "backend": None},
    ),
    Call(
        "jmoe.MoELayer",
        ("router", "experts", "router_config"),
        {"activation": ("silu", None), "weight_on": "output", "selection_bias": None, "shared": None},
    ),
    Call("jmoe.MoELayer.load_from_gguf", ("gguf", "layer_idx"), {**SEMANTICS, **PLACING}),
    Call("jmoe.MoELayer.open_and_load", ("path", "layer_idx")),
    Call("jmoe.load_moe_layers", ("path", "layers"), {"progress": True, **SEMANTICS, **PLACING}),
    Call("jmoe.tokens_per_expert", ("topk_ids", "num_experts")),
    Call("jmoe.load_imbalance", ("tokens_per_expert",)),
    Call("jmoe.co_activation", ("topk_ids", "num_experts")),
    Call("jmoe.plot.expert_utilisation", ("tokens_per_expert",), {"ax": None}),
    Call("jmoe.Choice", ("name", "why")),
    Call("jmoe.QuantTensor", ("format", "planes")),
    Call("jmoe.QuantTensor.dequantise", ("self",)),
    Call(
        "jmoe.ExpertStack",
        ("gate", "up", "down"),
        {"gate_bias": None, "up_bias": None, "down_bias": None, "down_scale": None},
    ),
    Call("jmoe.ExpertStack.gate_up", ("self", "expert")),
    Call("jmoe.ExpertStack.down_of", ("self", "expert")),
    Call("jmoe.ExpertStack.from_dense_stacks", ("gate", "up", "down"), dict.fromkeys(SIZES, REQUIRED)),
    Call("jmoe.ExpertStack.load_from_gguf", ("gguf", "layer_idx"), {**SIZES, **PLACING}),
    # What else load_from_gguf takes, open_and_load hands on.
    Call("jmoe.ExpertStack.open_and_load", ("path", "layer_idx"), SIZES),
    Call("jmoe.gguf_file.load.load_expert_stacks", ("path", "layers"), {"progress": True, "stacked": False, **PLACING}),
    Call("jmoe.gguf_file.GgufFile", ("path",)),
    Call(
        "jmoe.parallel.moe_forward",
        ("stack", "x", "topk_ids", "topk_weights"),
        {"split_tokens": (), "exchange": None, "activation": "silu", "weight_on": "output", "layer": None},
    ),
    Call("jmoe.parallel.shard_experts", ("stack", "mesh"), {"expert_axis": "expert", "tensor_axis": None}),
    Call(
        "jmoe.parallel.load_experts",
        ("file", "layer_idx", "mesh"),
        {"expert_axis": "expert", "tensor_axis": None, "check_finite": True},
    ),
    Call("jmoe.save_gguf", ("path", "stacks"), {"architecture": REQUIRED, "metadata": None, "tensors": None}),
]

PROPERTIES = {
    "jmoe.ExpertStack": (
        "num_experts",
        "hidden_size",
        "expert_intermediate",
        "nbytes",
        "formats",
        "gate_stacked",
        "up_stacked",
        "down_stacked",
    ),
    "jmoe.QuantTensor": ("shape", "ndim", "nbytes"),
    "jmoe.MoELayer": ("num_experts", "hidden_size", "expert_intermediate", "nbytes"),
}

ERRORS = {"jmoe.gguf_file.GgufError": ValueError, "jmoe.gguf_file.DenseFallbackWarning": UserWarning}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.path)
def test_a_call_takes_the_promised_arguments_by_the_promised_names(call: Call):
    parameters = inspect.signature(pkgutil.resolve_name(call.path)).parameters
    first = list(parameters.values())[: len(call.positional)]
    assert tuple(p.name for p in first) == call.positional
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in first)
    for name, default in call.named.items():
        assert parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY
        assert parameters[name].default is default or parameters[name].default == default, name
    # What was added since must be optional.
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    known = {*call.positional, *call.named}
    assert all(p.default is not REQUIRED for p in parameters.values() if p.name not in known and p.kind not in variadic)


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in PROPERTIES.items() for name in names])
def test_a_size_or_view_is_a_property(owner, name):
    assert isinstance(inspect.getattr_static(pkgutil.resolve_name(owner), name), property)


@pytest.mark.parametrize(("path", "base"), ERRORS.items())
def test_an_error_is_of_the_promised_kind(path, base):
    assert issubclass(pkgutil.resolve_name(path), base)


def test_which_backend_answers_with_a_name_and_a_reason():
    choice = jmoe.which_backend(random_stack(CASES["tiny"]), np.ones((1, 256), np.float32))
    assert choice == (choice.name, choice.why)
    assert choice._fields == ("name", "why")


def test_the_packed_formats_are_the_promised_ones():
    assert {
        *("q4_k", "q5_k", "q6_k", "q5_0", "q8_0", "q4_0", "mxfp4"),
        *("q3_k", "q2_k", "q5_1", "q4_1", "iq4_nl", "iq4_xs"),
    } <= set(jmoe.FORMATS)


@pytest.mark.parametrize("path", ["jmoe.ExpertStack", "jmoe.QuantTensor", "jmoe.RouterConfig", "jmoe.MoELayer"])
def test_what_holds_data_is_a_frozen_dataclass(path):
    cls = pkgutil.resolve_name(path)
    assert dataclasses.is_dataclass(cls)
    assert inspect.getattr_static(cls, "__dataclass_params__").frozen


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.path)
def test_what_is_public_says_what_it_does(call: Call):
    assert inspect.getdoc(pkgutil.resolve_name(call.path))
