"""Time `route` and its two ways of choosing, and write results/routing-<device>.json.

    python benchmarks/routing.py [--experts ...] [--tokens ...]

Wall time of 32 routings in one jit (8 of more than 1024 tokens), each waiting for the weights of the one before it, by
the routing: `route` as it chooses on this platform, by counting ranks, and by `lax.top_k`. All must give the same ids
first; else the program exits with 1. Where there are far more comparisons than `route` would ever make, ranks are not
counted (null); where it would make none anywhere, `route` is `lax.top_k`, and timed once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import report

from jmoe import RouterConfig, route, routing

KEYS = ("router", "experts", "top_k", "tokens", "xla_flags")
ROUTERS = {
    "softmax": {"gating": "softmax"},
    "sigmoid, 4 of 8 groups": {"gating": "sigmoid", "group_count": 8, "groups_used": 4, "scale": 2.5},
}
WAYS = {"us": routing._choose, "rank_us": routing._choose_by_rank, "top_k_us": routing._choose_by_top_k}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", nargs="+", type=int, default=[32, 128, 256, 512])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512, 8192])
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    args = parser.parse_args(argv)
    for router, fields in ROUTERS.items():
        for experts in args.experts:
            for tokens in args.tokens:
                row = measure(args, RouterConfig(args.top_k, **fields), experts, tokens)
                if row is None:
                    print(f"REFUSED {router}, {tokens} of {experts}: the ways choose differently", file=sys.stderr)
                    return 1
                print(f"{router}, T {tokens}, E {experts}: {[row[way] for way in WAYS]} us", flush=True)
                report.write(f"routing-{report.device_name()}", [{"router": router, **row}], KEYS, args.results)
    return 0


def measure(args: argparse.Namespace, config: RouterConfig, experts: int, tokens: int) -> dict[str, Any] | None:
    """The row, or None where the ways choose differently."""
    logits = jnp.asarray(np.random.default_rng(tokens).standard_normal((tokens, experts), np.float32))
    comparisons, calls = tokens * experts**2, 32 if tokens <= 1024 else 8
    most = {"rank_us": 4 * routing._MOST_COMPARISONS, "top_k_us": routing._MOST_COMPARISONS}
    chosen, us, compiled = [], {}, cast(Any, routing._route)
    for name in (name for name in WAYS if comparisons <= most.get(name, comparisons)):
        routing._choose = WAYS[name]
        compiled.clear_cache()
        run = chained(config, calls)
        chosen.append(np.asarray(run(logits)[0]))
        warm_up(run, logits)
        seconds = statistics.median(seconds_of(run, logits) for _ in range(args.rounds))
        us[name] = round(seconds * 1e6 / calls, 2)
    if not all(np.array_equal(ids, chosen[0]) for ids in chosen):
        return None
    row = {"experts": experts, "top_k": config.top_k, "tokens": tokens, "rank_us": None, "top_k_us": us["us"]}
    return {**row, **us, **report.origin()}


def chained(config: RouterConfig, calls: int) -> Any:
    """A new program, of the last call's ids and weights: the way of choosing is read when it is traced."""

    @jax.jit
    def run(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids, weights = (jnp.zeros((logits.shape[0], config.top_k), dtype) for dtype in (jnp.int32, jnp.float32))
        for _ in range(calls):
            # Too small to change a logit, but XLA does not know.
            ids, weights = route(logits + weights[:, :1] * 1e-30, config)
        return ids, weights

    return run


def warm_up(run: Any, logits: jax.Array, seconds: float = 0.3) -> None:
    """An idle device's clocks are low at first."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        jax.block_until_ready(run(logits))


def seconds_of(run: Any, logits: jax.Array, repeats: int = 4) -> float:
    """Of one of ``repeats`` calls, queued one behind the other."""
    start = time.perf_counter()
    for _ in range(repeats):
        last = run(logits)
    jax.block_until_ready(last)
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    sys.exit(main())
