"""``jmoe bench``: the time of a layer on this machine, on random packed weights or on a file's own."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np

from .. import selfcheck
from ..dispatch import which_backend
from ..gguf_file import GgufFile, moe_layers
from ..gguf_file.budget import require_host_bytes
from ..moe import moe_forward
from ..routing import RouterConfig, route
from ..selfcheck import LayerWeights
from ..stack import ExpertStack
from ..synthetic import MODELS, layer_blocks, layer_bytes, stack_of, weights_of
from ..timing import chained, layer_seconds
from ._common import UsageError, heading, integer, megabytes, table

NAME = "bench"
SUMMARY = "Time a layer on this machine, checked against float64 first (exit 1: the check failed)"

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", default="qwen3-30b-a3b", metavar="NAME|FILE", help=f"a GGUF file, or one of {', '.join(MODELS)}")
    add("--tokens", type=integer(1), nargs="+", default=[1, 16, 256], metavar="T", help="default 1 16 256")
    add("--layers", type=integer(1), default=4, metavar="L", help="distinct layers in a row (default 4)")
    add("--repeats", type=integer(1), default=11, metavar="R", help="calls, of which the median counts (default 11)")
    add("--dtype", choices=DTYPES, default="f32", help="of x and y (default f32)")
    add("--seed", type=integer(0), default=0, metavar="S")


def execute(args: argparse.Namespace) -> int:
    rng = np.random.default_rng(args.seed)
    with ExitStack() as opened:
        if args.shape in MODELS:
            stacks, weights, top_k = _random_layers(args.shape, args.layers, rng)
        elif os.path.exists(args.shape):
            stacks, weights, top_k = _layers_of(opened.enter_context(GgufFile(args.shape)), args.layers)
        else:
            raise UsageError(f"--shape {args.shape}: neither a file nor one of {', '.join(MODELS)}")
        return _time(args, stacks, weights, top_k, rng)


def _time(
    args: argparse.Namespace, stacks: list[ExpertStack], weights: LayerWeights, top_k: int, rng: np.random.Generator
) -> int:
    device = jax.devices()[0]
    print(heading(device))
    print(f"{args.shape}: {len(stacks)} x {megabytes(stacks[0].nbytes)}, the first {stacks[0]}")
    rows, choices, run = [], {}, chained()
    for tokens in args.tokens:
        x = jnp.asarray(selfcheck.outlier_x(rng, tokens, stacks[0].hidden_size), DTYPES[args.dtype])
        choice = which_backend(stacks[0], x)
        choices[choice] = None
        errors = _check(stacks[0], weights, x, top_k, rng)
        if not errors.within(selfcheck.bound(x.dtype, choice.name, device.platform)):
            print(f"FAILED at {tokens} tokens: {errors}, outside the numerics contract of the README; not timed")
            return 1
        seconds = float(np.median(layer_seconds(run, stacks, x, rng, top_k, args.repeats)))
        microseconds, rate = f"{seconds * 1e6:,.0f}", f"{tokens / seconds:,.0f}"
        rows.append((tokens, x.dtype.name, choice.name, microseconds, rate, f"{errors.nmse:.1e}"))
    print(table(("tokens", "x", "backend", "us/layer", "tokens/s", "NMSE"), rows))
    for choice in choices:
        print(f"backend {choice.name}: {choice.why}")
    return 0


def _check(
    stack: ExpertStack, weights: LayerWeights, x: jax.Array, top_k: int, rng: np.random.Generator
) -> selfcheck.Errors:
    """Errors of the first tokens, computed among all of them: float64 on many would take longer than the timing."""
    logits = rng.standard_normal((x.shape[0], stack.num_experts), np.float32)
    topk_ids, topk_weights = route(logits, RouterConfig(top_k))
    y = moe_forward(stack, x, topk_ids, topk_weights)
    few = slice(0, 2)
    return selfcheck.errors(y[few], selfcheck.moe_float64(weights, x[few], topk_ids[few], topk_weights[few]))


def _random_layers(name: str, layers: int, rng: np.random.Generator) -> tuple[list[ExpertStack], LayerWeights, int]:
    model = MODELS[name]
    # The planes of all layers, and the blocks of one beside those of the next.
    needed = (layers + 2) * layer_bytes(model)
    require_host_bytes(needed, f"bench of {layers} layers of {name}", "take fewer --layers or a smaller --shape")
    blocks = layer_blocks(rng, model)
    stacks = [stack_of(model, blocks), *(stack_of(model, layer_blocks(rng, model)) for _ in range(layers - 1))]
    return stacks, weights_of(model, blocks), model.top_k


def _layers_of(gguf: GgufFile, layers: int) -> tuple[list[ExpertStack], LayerWeights, int]:
    """The file's first MoE layers; where it has fewer, all of them."""
    indices = moe_layers(gguf)[:layers]
    top_k = gguf.metadata.get(f"{gguf.architecture}.expert_used_count")
    if not indices or not isinstance(top_k, int):
        raise UsageError(f"{gguf.path}: no MoE layers, or no {gguf.architecture}.expert_used_count: see `jmoe inspect`")
    weights = selfcheck.weights_in_file(gguf, indices[0])
    if weights.gate is None:
        raise UsageError(f"{gguf.path}: experts without a gate, which this version cannot compute")
    return [ExpertStack.load_from_gguf(gguf, index) for index in indices], weights, top_k
