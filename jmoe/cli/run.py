"""``jmoe run FILE --layer N``: one layer of a file, computed for random or given activations."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..dispatch import Choice, which_backend
from ..gguf_file import GgufFile
from ..gguf_file.architectures import Architecture
from ..gguf_file.names import find_expert_layer, known_architecture
from ..gguf_file.router_keys import read_router_config
from ..layer import MoELayer, moe_layer_forward
from ..moe import moe_forward
from ..routing import RouterConfig, route
from ..stack import ExpertStack
from ._common import UsageError, duration, integer, megabytes, printable

NAME = "run"
SUMMARY = "Compute one MoE layer of a GGUF file and write its output as .npy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="a GGUF file, or any shard of one")
    add("--layer", type=integer(0), required=True, metavar="N", help="the layer's number in the file")
    add("--input", metavar="X.npy", help="activations [T, H], float16, 32 or 64 (as 32); random where left out")
    add("--tokens", type=integer(0), metavar="T", help="random tokens (default 4)")
    add("--seed", type=integer(0), default=0, metavar="S", help="of everything random (default 0)")
    add("--output", default="y.npy", metavar="Y.npy", help="where to write y [T, H] (default y.npy)")
    add("--top-k", type=integer(1), metavar="K", help="experts a token (default: the file's expert_used_count)")


def execute(args: argparse.Namespace) -> int:
    if args.input is not None and args.tokens is not None:
        raise UsageError("give --input or --tokens, not both: the input has its own number of tokens")
    rng = np.random.default_rng(args.seed)
    with GgufFile(args.file) as gguf:
        known = known_architecture(gguf)
        if known is not None and f"blk.{args.layer}.ffn_gate_inp.weight" in gguf.tensors:
            y = _run_layer(args, gguf, known, rng)
        else:
            y = _run_experts(args, gguf, known, rng)
    with open(args.output, "wb") as file:
        np.save(file, y)
    rms = float(np.sqrt(np.mean(np.square(y.astype(np.float64))))) if y.size else 0.0
    nonfinite = np.count_nonzero(~np.isfinite(y))
    print(f"wrote    {args.output}: {y.dtype}{list(y.shape)}, rms {rms:.4g}, {nonfinite} not finite")
    return 0


def _run_layer(args: argparse.Namespace, gguf: GgufFile, known: Architecture, rng: np.random.Generator) -> np.ndarray:
    """The whole layer, as the file and its architecture say."""
    config = read_router_config(gguf, known, _top_k(gguf, args, find_expert_layer(gguf, args.layer).num_experts))
    start = time.perf_counter()
    layer = jax.block_until_ready(MoELayer.load_from_gguf(gguf, args.layer, router_config=config))
    _say_loaded(args, layer, start)
    x = _x(args, rng, layer.hidden_size)
    print(f"routed   {_to(x, config.top_k, layer.num_experts)} by the file's router: {config}")
    inside = jax.ShapeDtypeStruct((x.shape[0], layer.experts.hidden_size), x.dtype)
    choice = which_backend(layer.experts, inside, activation=layer.activation, weight_on=layer.weight_on)
    return _computed(lambda: moe_layer_forward(layer, x), choice)


def _run_experts(
    args: argparse.Namespace, gguf: GgufFile, known: Architecture | None, rng: np.random.Generator
) -> np.ndarray:
    """The routed experts alone, for random logits: of a file without a router, or of one that is not known."""
    config = RouterConfig(_top_k(gguf, args, find_expert_layer(gguf, args.layer).num_experts))
    start = time.perf_counter()
    stack = jax.block_until_ready(ExpertStack.load_from_gguf(gguf, args.layer))
    _say_loaded(args, stack, start)
    lacks = (
        f"neither router nor activation of {printable(gguf.architecture)} is known"
        if known is None
        else f"the file has no blk.{args.layer}.ffn_gate_inp.weight"
    )
    activation = known.activation if known else "silu"
    print(f"jmoe: {lacks}: random routing and {activation}, so y is not what the model computes", file=sys.stderr)
    x = _x(args, rng, stack.hidden_size)
    logits = jnp.asarray(rng.standard_normal((x.shape[0], stack.num_experts), np.float32))
    print(f"routed   {_to(x, config.top_k, stack.num_experts)} by random logits: {config}")
    topk_ids, topk_weights = route(logits, config)
    choice = which_backend(stack, x, topk_ids, activation=activation)
    return _computed(lambda: moe_forward(stack, x, topk_ids, topk_weights, activation=activation), choice)


def _say_loaded(args: argparse.Namespace, loaded: MoELayer | ExpertStack, start: float) -> None:
    print(f"loaded   layer {args.layer} in {duration(time.perf_counter() - start)}, {megabytes(loaded.nbytes)}")
    print(f"         {loaded}")


def _to(x: jax.Array, top_k: int, num_experts: int) -> str:
    return f"{x.shape[0]} tokens to {top_k} of {num_experts} experts each"


def _computed(compute: Callable[[], jax.Array], choice: Choice) -> np.ndarray:
    start = time.perf_counter()
    y = np.asarray(compute())
    print(f"computed in {duration(time.perf_counter() - start)}, compiling included, by {choice.name}: {choice.why}")
    return y


def _x(args: argparse.Namespace, rng: np.random.Generator, hidden_size: int) -> jax.Array:
    if args.input:
        return _given_x(args.input, hidden_size)
    return jnp.asarray(rng.standard_normal((4 if args.tokens is None else args.tokens, hidden_size), np.float32))


def _given_x(path: str, hidden_size: int) -> jax.Array:
    try:
        x = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"{path}: not a .npy array ({error})") from None
    if not isinstance(x, np.ndarray) or x.dtype not in (np.float16, np.float32, np.float64):
        raise UsageError(f"{path}: x must be float16, float32 or float64, got {getattr(x, 'dtype', 'an .npz archive')}")
    if x.ndim != 2 or x.shape[1] != hidden_size:
        raise UsageError(f"{path}: x must be [T, {hidden_size}], the layer's hidden size, got {list(x.shape)}")
    return jnp.asarray(x.astype(np.float32) if x.dtype == np.float64 else x)


def _top_k(gguf: GgufFile, args: argparse.Namespace, num_experts: int) -> int:
    key = f"{gguf.architecture}.expert_used_count"
    top_k: Any = gguf.metadata.get(key) if args.top_k is None else args.top_k
    if top_k is None:
        raise UsageError(f"{gguf.path} has no {key}: say how many experts a token takes with --top-k")
    if top_k > num_experts:
        raise UsageError(f"--top-k {top_k} is more than the layer's {num_experts} experts")
    return top_k
