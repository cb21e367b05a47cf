"""Time a vmapped moe_forward beside the same work in one flat call, and write results/vmap-<device>.json.

    python benchmarks/vmap.py [--shape ...] [--tokens ...] [--members ...]

``tokens``: a batch of members over one stack, flat [B * T, H]. ``population``: a stack for each member, flat
[P * E, ...] with the experts' indices moved beforehand. Wall time of 8 calls chained through the residual in one jit,
by the call; both take turns. Before they are timed, one call of each must give the same bits; else the program exits
with 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu
import jax
import jax.numpy as jnp
import numpy as np
import report

from jmoe import ExpertStack, moe_forward, selfcheck, which_backend
from jmoe.synthetic import MODELS
from jmoe.timing import random_routing

KEYS = ("shape", "mapped", "members", "tokens", "x_dtype", "xla_flags")
CALLS = 8


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--members", nargs="+", type=int, default=[4])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 64], help="of each member")
    parser.add_argument("--x-dtype", choices=gpu.DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    args = parser.parse_args(argv)
    refused = 0
    for members in args.members:
        population = gpu.random_stack(jax.random.key(0), MODELS[args.shape], members)
        for mapped in ("tokens", "population"):
            for tokens in args.tokens:
                row = measure(args, mapped, population, members, tokens)
                refused += row is None
                if row is not None:
                    print(f"{row['mapped']:10} {members} x {tokens}: {row['us']} us, flat {row['flat_us']}", flush=True)
                    report.write(f"vmap-{report.device_name()}", [row], KEYS, args.results)
    return 1 if refused else 0


def measure(
    args: argparse.Namespace, mapped: str, population: ExpertStack, members: int, tokens: int
) -> dict[str, Any] | None:
    """The row, or None where the two differ."""
    model, rng = MODELS[args.shape], np.random.default_rng(tokens)
    x = jnp.asarray(selfcheck.outlier_x(rng, members * tokens, model.hidden_size), gpu.DTYPES[args.x_dtype]) / 50
    ids, weights = random_routing(rng, CALLS, members * tokens, model.num_experts, model.top_k)
    over = lambda array: array.reshape(*array.shape[:-2], members, tokens, array.shape[-1])  # noqa: E731
    if mapped == "tokens":
        axes, stack = (None, 0, 0, 0), jax.tree.map(lambda leaf: leaf[0], population)
        flat_stack, flat_ids = stack, ids
    else:
        axes, stack = (0, 0, 0, 0), population
        flat_stack = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), population)
        flat_ids = (over(ids) + model.num_experts * jnp.arange(members)[:, None, None]).reshape(ids.shape)
    batched = jax.vmap(moe_forward, in_axes=axes)
    y = batched(stack, over(x), over(ids[0]), over(weights[0])).reshape(x.shape)
    if not np.array_equal(y, moe_forward(flat_stack, x, flat_ids[0], weights[0])):
        print(f"REFUSED {mapped}, {members} x {tokens}: vmap and the flat call differ", file=sys.stderr)
        return None
    vmapped = chained(batched), (stack, over(x), over(ids), over(weights))
    flat = chained(moe_forward), (flat_stack, x, flat_ids, weights)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.rounds):
        for contender, measured in zip((vmapped, flat), seconds, strict=True):
            measured.append(seconds_of(*contender))
    us, flat_us = (statistics.median(measured) * 1e6 / CALLS for measured in seconds)
    return {
        "shape": args.shape,
        "mapped": mapped,
        "members": members,
        "tokens": tokens,
        "x_dtype": x.dtype.name,
        "backend": which_backend(flat_stack, x).name,
        "us": round(us, 1),
        "flat_us": round(flat_us, 1),
        **report.origin(),
    }


def chained(layer: Callable[..., jax.Array]) -> Any:
    """``x = x + layer(stack, x, ids, weights)``, ``CALLS`` times."""

    @jax.jit
    def run(stack: ExpertStack, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        for call in range(CALLS):
            x = x + layer(stack, x, ids[call], weights[call])
        return x

    return run


def seconds_of(run: Any, arguments: tuple[Any, ...], repeats: int = 4) -> float:
    """Of one of ``repeats`` calls, queued one behind the other."""
    start = time.perf_counter()
    for _ in range(repeats):
        last = run(*arguments)
    jax.block_until_ready(last)
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    sys.exit(main())
