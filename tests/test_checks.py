"""Every wrong argument gives one error that names the argument, what was wanted, what came and the fix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, random_stack

from jmoe import Choice, ExpertStack, QuantTensor, moe_forward, which_backend

CASE = CASES["tiny"]
H, I, E, K, T = CASE.hidden_size, CASE.expert_intermediate, CASE.num_experts, CASE.top_k, 5


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    """Arguments that fit."""
    return {
        "stack": random_stack(CASE),
        "x": jnp.ones((T, H)),
        "topk_ids": jnp.zeros((T, K), jnp.int32),
        "topk_weights": jnp.ones((T, K)),
    }


def layers(stack: ExpertStack, count: int = 3) -> ExpertStack:
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * count), stack)


def with_(**changes: Any) -> Callable[[ExpertStack], dict[str, Any]]:
    return lambda stack: {"stack": dataclasses.replace(stack, **changes)}


def with_plane(**changes: Any) -> Callable[[ExpertStack], dict[str, Any]]:
    def change(stack: ExpertStack) -> dict[str, Any]:
        planes = stack.up.planes._replace(**{name: f(getattr(stack.up.planes, name)) for name, f in changes.items()})
        return {"stack": dataclasses.replace(stack, up=QuantTensor(stack.up.format, planes))}

    return change


def cut_down(stack: ExpertStack) -> dict[str, Any]:
    return {"stack": dataclasses.replace(stack, down=stack.down[:3])}


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    # x
    "x of another hidden size": (
        {"x": jnp.ones((T, H - 1))},
        AssertionError,
        rf"x must be .*\[\?,{H}\], got float32\[{T},{H - 1}\]\. .*hidden_size \({H}\)",
    ),
    "x without a token axis": ({"x": jnp.ones(H)}, AssertionError, rf"x must be .* got float32\[{H}\]"),
    "x with a batch axis": ({"x": jnp.ones((1, T, H))}, AssertionError, rf"x must be .* got float32\[1,{T},{H}\]"),
    "x of integers": (
        {"x": jnp.ones((T, H), jnp.int32)},
        AssertionError,
        r"x must be float32 or bfloat16 or float16\[.*got int32\[",
    ),
    "x in float64": ({"x": np.ones((T, H))}, AssertionError, r"x must be .*got float64\["),
    "x of swapped bytes": ({"x": np.ones((T, H), ">f4")}, AssertionError, r"x must be float32.*got >f4\["),
    "x a list": ({"x": [[0.0] * H]}, TypeError, r"x must be an array, got list\. x holds one row"),
    # topk_ids
    "ids of other tokens": (
        {"topk_ids": jnp.zeros((T - 1, K), jnp.int32)},
        AssertionError,
        rf"topk_ids must be integer\[{T},\?\], got int32\[{T - 1},{K}\]\. Route the same tokens as x",
    ),
    "ids without a slot axis": (
        {"topk_ids": jnp.zeros(T, jnp.int32)},
        AssertionError,
        rf"topk_ids must be .* got int32\[{T}\]",
    ),
    "ids of floats": (
        {"topk_ids": jnp.zeros((T, K))},
        AssertionError,
        rf"topk_ids must be integer.* got float32\[{T},{K}\]",
    ),
    "ids of bools": ({"topk_ids": np.zeros((T, K), bool)}, AssertionError, r"topk_ids must be integer.* got bool\["),
    "ids of swapped bytes": (
        {"topk_ids": np.zeros((T, K), ">i8")},
        AssertionError,
        r"topk_ids must be integer.*got >i8\[",
    ),
    "ids None": ({"topk_ids": None}, TypeError, r"topk_ids must be an array, got NoneType"),
    # topk_weights
    "weights of other slots": (
        {"topk_weights": jnp.ones((T, K + 1))},
        AssertionError,
        rf"topk_weights must be .*\[{T},{K}\], got float32\[{T},{K + 1}\]\. Give one weight for each chosen expert",
    ),
    "weights of other tokens": (
        {"topk_weights": jnp.ones((T + 1, K))},
        AssertionError,
        rf"topk_weights must be .*\[{T},{K}\], got float32\[{T + 1},{K}\]",
    ),
    "weights of integers": (
        {"topk_weights": jnp.ones((T, K), jnp.int32)},
        AssertionError,
        rf"topk_weights must be float32 or bfloat16 or float16\[{T},{K}\], got int32\[{T},{K}\]",
    ),
    "ids and weights swapped": (
        {"topk_ids": jnp.ones((T, K)), "topk_weights": jnp.zeros((T, K), jnp.int32)},
        AssertionError,
        r"topk_ids must be integer",
    ),
    # names
    "an unknown activation": (
        {"activation": "relu"},
        ValueError,
        r"activation must be one of 'silu'.*, got 'relu'",
    ),
    "an unknown backend": (
        {"backend": "cuda"},
        ValueError,
        r"backend must be one of None, 'jnp'.*, got 'cuda'",
    ),
    "an activation that is no name": (
        {"activation": np.ones(2)},
        ValueError,
        r"activation must be one of 'silu', .*, got",
    ),
    "an unknown precision": (
        {"precision": "high"},
        ValueError,
        r"precision must be one of None, 'highest', got 'high'",
    ),
    # the stack
    "no stack": ({"stack": {"gate": 1}}, TypeError, r"stack must be an ExpertStack, got dict"),
    "no gate": (with_(gate=None), ValueError, r"stack\.gate is None.*'silu' multiplies by a gate.*or the gate"),
    "down of fewer experts": (
        cut_down,
        ValueError,
        rf"stack\.down must be \[{E}, {H}, {I}\] to fit stack\.up \[{E}, {I}, {H}\], got \[3, {H}, {I}\]",
    ),
    "gate of another width": (
        with_(gate=jnp.zeros((E, I, H + 1))),
        ValueError,
        rf"stack\.gate must be \[{E}, {I}, {H}\].*got \[{E}, {I}, {H + 1}\]\..*down is \[E, H, I\]",
    ),
    "down lying on its side": (
        with_(up=jnp.zeros((E, 32, H)), gate=jnp.zeros((E, 32, H)), down=jnp.zeros((E, 32, H))),
        ValueError,
        rf"stack\.down must be \[{E}, {H}, 32\].*got \[{E}, 32, {H}\]",
    ),
    "a bias of another length": (
        with_(down_bias=jnp.zeros((E, H - 1))),
        ValueError,
        rf"stack\.down_bias must be \[{E}, {H}\].*got \[{E}, {H - 1}\]",
    ),
    "a scale for every row": (with_(down_scale=jnp.ones((E, H))), ValueError, rf"stack\.down_scale must be \[{E}\]"),
    "dense weights of integers": (
        with_(up=jnp.zeros((E, I, H), jnp.int8)),
        AssertionError,
        rf"stack\.up must be float32 or bfloat16 or float16.*got int8\[{E},{I},{H}\]",
    ),
    "a plane of fewer experts than the codes": (
        with_plane(scales=lambda plane: plane[:3]),
        ValueError,
        rf"stack\.up\.planes\.scales must be uint8\[{E}, 8, {I}\] to fit the codes .*got uint8\[3, 8, {I}\]",
    ),
    "planes cast to float": (
        with_plane(codes=lambda plane: plane.astype(jnp.bfloat16)),
        ValueError,
        r"stack\.up\.planes\.codes must be uint8.*got bfloat16.*never cast",
    ),
    "an unknown format": (
        lambda stack: {"stack": dataclasses.replace(stack, up=QuantTensor("q3_x", stack.up.planes))},
        ValueError,
        r"format must be one of q4_k, .*got 'q3_x'",
    ),
    "a format that is no name": (
        lambda stack: {"stack": dataclasses.replace(stack, up=QuantTensor(["q4_k"], stack.up.planes))},  # pyright: ignore
        ValueError,
        r"format must be one of q4_k, .*got \['q4_k'\]",
    ),
    "the planes of another format": (
        lambda stack: {"stack": dataclasses.replace(stack, down=QuantTensor("q4_k", stack.down.planes))},
        TypeError,
        r"stack\.down\.planes must be Q4KPlanes, as 'q4_k' has them, got Q6KPlanes",
    ),
    "planes in a list": (
        lambda stack: {"stack": dataclasses.replace(stack, up=QuantTensor("q4_k", list(stack.up.planes)))},
        TypeError,
        r"stack\.up\.planes must be Q4KPlanes.*got list",
    ),
    "a plane that is none": (
        with_plane(mins=lambda plane: None),
        TypeError,
        r"stack\.up\.planes\.mins must be an array, got NoneType",
    ),
    "a projection that is none": (with_(up=None), TypeError, r"stack\.up must be an array, got NoneType"),
    "a projection in a list": (with_(down=[[0.0]]), TypeError, r"stack\.down must be an array, got list"),
    "a projection of two axes": (
        with_(gate=jnp.zeros((I, H)), up=jnp.zeros((I, H))),
        ValueError,
        rf"stack\.up must be \[E, I, H\] with one expert or more, got \[{I}, {H}\]",
    ),
    "no experts": (
        lambda stack: {"stack": jax.tree.map(lambda leaf: leaf[:0], stack)},
        ValueError,
        rf"stack\.up must be \[E, I, H\] with one expert or more, got \[0, {I}, {H}\]",
    ),
    "a bias in a list": (with_(up_bias=[0.0] * I), TypeError, r"stack\.up_bias must be an array, got list"),
    "a bias of integers": (
        with_(up_bias=jnp.zeros((E, I), jnp.int32)),
        AssertionError,
        rf"stack\.up_bias must be float32 or bfloat16 or float16\[{E},{I}\], got int32",
    ),
    # layer
    "layers without layer=": (
        lambda stack: {"stack": layers(stack)},
        ValueError,
        rf"leading axes \[3\] before its experts \(up \[3, {E}, {I}, {H}\]\)\. Say which layer with layer=l, or vmap",
    ),
    "layer= without layers": ({"layer": 0}, ValueError, r"layer= wants one layer axis .*got 0 axes.*leave layer out"),
    "layer= of two layer axes": (
        lambda stack: {"stack": layers(layers(stack, 2), 2), "layer": 0},
        ValueError,
        r"layer= wants one layer axis .*got 2 axes",
    ),
    "layer past the last": (
        lambda stack: {"stack": layers(stack), "layer": 3},
        ValueError,
        r"layer=3 is outside the stack's 3 layers",
    ),
    "layer before the first": (
        lambda stack: {"stack": layers(stack), "layer": -1},
        ValueError,
        r"layer=-1 is outside the stack's 3 layers",
    ),
    "layer past the last in jax": (
        lambda stack: {"stack": layers(stack), "layer": jnp.int32(7)},
        ValueError,
        r"layer=7 is outside the stack's 3 layers",
    ),
    "layer a float": (
        lambda stack: {"stack": layers(stack), "layer": 1.0},
        TypeError,
        r"layer must be an integer scalar, got 1\.0",
    ),
    "layer a bool": (
        lambda stack: {"stack": layers(stack), "layer": True},
        TypeError,
        r"layer must be an integer scalar, got True",
    ),
    "layer an array": (
        lambda stack: {"stack": layers(stack), "layer": jnp.arange(2)},
        TypeError,
        r"layer must be an integer scalar",
    ),
    "layer a string": (
        lambda stack: {"stack": layers(stack), "layer": "1"},
        TypeError,
        r"layer must be an integer scalar, got '1'",
    ),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_named_with_what_came_and_the_fix(what, jit, good):
    changes, error, message = WRONG[what]
    arguments = good | (changes if isinstance(changes, dict) else changes(good["stack"]))
    if not jit:
        with pytest.raises(error, match=message):
            moe_forward(**arguments)
        return
    # Under jit the same words, where the argument can pass jit's door at all.
    names = ("x", "topk_ids", "topk_weights")
    # jit makes f32 of a float64 array before jmoe sees it.
    passes = lambda array: getattr(array, "dtype", np.dtype(">f8")) not in (np.float64, ">f4", ">i8", ">f8")  # noqa: E731
    traced = {n: arguments.pop(n) for n in names if passes(arguments[n])}
    with pytest.raises(error, match=message):
        jax.jit(lambda traced: moe_forward(**arguments, **traced))(traced)


def test_what_fits_raises_nothing(good):
    assert moe_forward(**good).shape == (T, H)
    assert moe_forward(**{**good, "stack": layers(good["stack"])}, layer=2).shape == (T, H)
    assert moe_forward(**good, precision="highest", backend="jnp", activation="silu").shape == (T, H)


def test_a_backend_that_cannot_run_raises_with_the_reason(good):
    choice = which_backend(good["stack"], good["x"], platform="cpu")
    with pytest.raises(ValueError, match=r"backend='pallas' cannot run this call: .*Leave backend=None") as error:
        moe_forward(**good, backend="pallas")
    if jax.default_backend() == "cpu":
        assert choice.why in str(error.value)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "gpu", "rocm", "tpu", "mps", "METAL", None])
def test_which_backend_names_one_that_runs_and_says_why(platform, good):
    choice = which_backend(good["stack"], good["x"], good["topk_ids"], platform=platform)
    assert isinstance(choice, Choice)
    assert choice.name in ("jnp", "pallas", "cpu", "mps")
    assert len(choice.why) > 10
    if platform in ("rocm", "tpu"):
        assert choice.name == "jnp"
        assert platform in choice.why


def test_which_backend_looks_at_shapes_only(good):
    shapes = jax.eval_shape(lambda **arguments: arguments, **good)
    assert which_backend(shapes["stack"], shapes["x"]) == which_backend(good["stack"], good["x"])


def test_which_backend_refuses_unknown_names(good):
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'tanh'"):
        which_backend(good["stack"], good["x"], activation="tanh")
    with pytest.raises(ValueError, match=r"precision must be one of .* got 'low'"):
        which_backend(good["stack"], good["x"], precision="low")
