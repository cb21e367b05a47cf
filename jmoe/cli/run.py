"""``jmoe run FILE --layer N``: one layer of a file, computed for random or given activations."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from ..dispatch import which_backend
from ..gguf_file import GgufError, GgufFile
from ..moe import moe_forward
from ..routing import RouterConfig, route
from ..stack import ExpertStack
from ._common import UsageError, duration, integer, megabytes, printable

NAME = "run"
SUMMARY = "Compute one MoE layer of a GGUF file and write its output as .npy"

# Architectures whose router and activation this version computes, and whether their weights are normalised, which
# the file does not say (llama.cpp, src/models: the arguments of build_moe_ffn).
NORMALISES = {"llama": True, "qwen3moe": True, "qwen3vlmoe": True, "qwen2moe": False, "olmoe": False}


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
        start = time.perf_counter()
        stack = jax.block_until_ready(ExpertStack.load_from_gguf(gguf, args.layer))
        print(f"loaded   layer {args.layer} in {duration(time.perf_counter() - start)}, {megabytes(stack.nbytes)}")
        print(f"         {stack}")
        if stack.gate is None:
            raise UsageError(f"{gguf.architecture} has experts without a gate, which this version cannot compute")
        x = _given_x(args.input, stack.hidden_size) if args.input else _random_x(rng, args.tokens, stack.hidden_size)
        topk_ids, topk_weights, source = _route(gguf, args.layer, x, stack.num_experts, args.top_k, rng)
        if f"blk.{args.layer}.ffn_up_shexp.weight" in gguf.tensors:
            print("jmoe: this version does not add the layer's shared experts", file=sys.stderr)
    print(f"routed   {x.shape[0]} tokens to {topk_ids.shape[1]} of {stack.num_experts} experts each by {source}")
    start = time.perf_counter()
    y = np.asarray(moe_forward(stack, x, topk_ids, topk_weights))
    choice = which_backend(stack, x, topk_ids)
    print(f"computed in {duration(time.perf_counter() - start)}, compiling included, by {choice.name}: {choice.why}")
    with open(args.output, "wb") as file:
        np.save(file, y)
    rms = float(np.sqrt(np.mean(np.square(y.astype(np.float64))))) if y.size else 0.0
    nonfinite = np.count_nonzero(~np.isfinite(y))
    print(f"wrote    {args.output}: {y.dtype}{list(y.shape)}, rms {rms:.4g}, {nonfinite} not finite")
    return 0


def _random_x(rng: np.random.Generator, tokens: int | None, hidden_size: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal((4 if tokens is None else tokens, hidden_size), np.float32))


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


def _route(
    gguf: GgufFile, layer_idx: int, x: jax.Array, num_experts: int, top_k: int | None, rng: np.random.Generator
) -> tuple[jax.Array, jax.Array, str]:
    """topk_ids, topk_weights and in words how: by the file's own router where this version knows it."""
    top_k = _top_k(gguf, top_k, num_experts)
    normalise = NORMALISES.get(gguf.architecture)
    if normalise is None:
        print(
            f"jmoe: this version knows neither router nor activation of {printable(gguf.architecture)}: random routing"
            " and silu, so y is not what the model computes",
            file=sys.stderr,
        )
    router = None if normalise is None else _router_weight(gguf, layer_idx, (num_experts, x.shape[1]))
    if router is None:
        logits, source = jnp.asarray(rng.standard_normal((x.shape[0], num_experts), np.float32)), "random logits"
    else:
        logits = jnp.matmul(x.astype(jnp.float32), router.T, precision=jax.lax.Precision.HIGHEST)
        source = "the file's router"
    config = RouterConfig(top_k, normalise=normalise is not False)
    words = "normalised weights" if config.normalise else "weights as they are"
    return *route(logits, config), f"{source}, {words}"


def _top_k(gguf: GgufFile, given: int | None, num_experts: int) -> int:
    key = f"{gguf.architecture}.expert_used_count"
    top_k: Any = gguf.metadata.get(key) if given is None else given
    if top_k is None:
        raise UsageError(f"{gguf.path} has no {key}: say how many experts a token takes with --top-k")
    if top_k > num_experts:
        raise UsageError(f"--top-k {top_k} is more than the layer's {num_experts} experts")
    return top_k


def _router_weight(gguf: GgufFile, layer_idx: int, shape: tuple[int, int]) -> jax.Array | None:
    name = f"blk.{layer_idx}.ffn_gate_inp.weight"
    info = gguf.tensors.get(name)
    if info is None or info.ggml_type != GGMLQuantizationType.F32:
        return None
    if info.shape != shape:
        raise GgufError(f"{gguf.path}: tensor {name!r} must be {list(shape)}, got {list(info.shape)}")
    return jnp.asarray(gguf.read(name).view(np.dtype("<f4")))
