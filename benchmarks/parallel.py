"""Time jmoe.parallel on 1, 2, ... devices, check it against float64, and write results/parallel-<device>.json.

    python benchmarks/parallel.py [--devices 1 2] [--shape deepseek-v3] [--tokens 1 64 1024] [--exchanges dense ragged]
    python benchmarks/parallel.py --costs            # the README's modelled table, of no measurement

Wall time of 8 calls chained through the residual in one scan with fresh random experts for every token, by the call.
Tokens lie on every device ("replicated"), or are split over them and exchanged ("split"), where the devices divide
them; one device exchanges nothing, whatever the exchange's name. Before a row is timed the output is compared with
float64 on a few tokens and with one device's on all of them; a row that misses the numerics contract is refused, and
the program exits with 1.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu
import jax
import jax.numpy as jnp
import numpy as np
import report
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jmoe import FORMATS, ExpertStack, moe_forward, parallel, selfcheck, which_backend
from jmoe.parallel.exchange import EXCHANGES
from jmoe.synthetic import MODELS, ModelShape
from jmoe.timing import Routing, random_routing

KEYS = ("shape", "way", "exchange", "devices", "tokens", "x_dtype", "xla_flags")
CALLS = 8


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, default="deepseek-v3")
    parser.add_argument("--devices", nargs="+", type=int, help="all powers of two that there are")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 1024, 4096])
    parser.add_argument("--x-dtype", choices=gpu.DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--exchanges", nargs="*", choices=EXCHANGES, default=["dense"], help="of tokens that are split")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--costs", action="store_true", help="print what the model of costs says, and measure nothing")
    args = parser.parse_args(argv)
    if args.costs:
        print("\n".join(cost_table(MODELS[args.shape])))
        return 0
    counts = args.devices or [2**n for n in range(jax.device_count().bit_length())]
    layers = gpu.random_stack(jax.random.key(0), MODELS[args.shape], 1)
    inputs = [inputs_of(args, layers, tokens) for tokens in args.tokens]
    whole, refused = jax.tree.map(lambda leaf: leaf[0], layers), 0
    for devices in counts:
        mesh = jax.make_mesh((devices,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        sharded = jax.block_until_ready(parallel.shard_experts(whole, mesh))
        for given in inputs:
            tokens = len(given.x)
            exchanges = args.exchanges[: 1 if devices == 1 else None] if tokens % devices == 0 else []
            for exchange in (None, *exchanges):
                row = measure(args, given, sharded, exchange)
                refused += row is None
                if row is not None:
                    print(
                        f"{row['way']:10} {exchange or '':6} {devices} device(s), T={tokens}: {row['us']} us,"
                        f" NMSE {row['nmse']:.1e}",
                        flush=True,
                    )
                    report.write(f"parallel-{report.device_name()}", [row], KEYS, args.results)
    return 1 if refused else 0


class Inputs(NamedTuple):
    """Tokens, their experts in each call, and what one device and float64 make of the first call's."""

    x: jax.Array
    routing: Routing
    alone: np.ndarray
    some: np.ndarray  # the tokens that exact is of
    exact: np.ndarray


def inputs_of(args: argparse.Namespace, layers: ExpertStack, tokens: int) -> Inputs:
    model, rng = MODELS[args.shape], np.random.default_rng(tokens)
    x = jnp.asarray(selfcheck.outlier_x(rng, tokens, model.hidden_size), gpu.DTYPES[args.x_dtype])
    routing = random_routing(rng, CALLS, tokens, model.num_experts, model.top_k)
    ids, weights = routing.topk_ids[0], routing.topk_weights[0]
    some = np.unique([0, tokens // 2, tokens - 1])
    exact = gpu.float64_output(layers, x[some], ids[some], weights[some])
    return Inputs(x, routing, _wide(moe_forward(layers, x, ids, weights, layer=0)), some, exact)


def measure(
    args: argparse.Namespace, given: Inputs, sharded: parallel.ShardedStack, exchange: str | None
) -> dict[str, Any] | None:
    """The row, or None where the output misses the contract; ``exchange`` None where tokens lie on every device."""
    x, routing, mesh = given.x, given.routing, sharded.mesh
    split = {} if exchange is None else {"split_tokens": "expert", "exchange": exchange}
    rows = PartitionSpec(split.get("split_tokens"))

    def placed(array: jax.Array, *lead: None) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*lead, *rows)))

    y = _wide(parallel.moe_forward(sharded, *map(placed, (x, routing.topk_ids[0], routing.topk_weights[0])), **split))
    backend = which_backend(sharded.stack, x).name
    bound = selfcheck.bound(x.dtype, backend, jax.default_backend())
    errors, beside = selfcheck.errors(y[given.some], given.exact), selfcheck.errors(y, given.alone)
    # Each may lie as far from the exact one as the contract says.
    twice = selfcheck.Errors(4 * bound.nmse, 2 * bound.max_over_rms)
    way = "split" if split else "replicated"
    if not (errors.within(bound) and beside.within(twice)):
        print(
            f"REFUSED {way} {exchange or ''} at {len(x)} tokens: {errors}, beside one device's {beside}; {bound}",
            file=sys.stderr,
        )
        return None

    @jax.jit
    def run(sharded: parallel.ShardedStack, x: jax.Array, routing: Routing) -> jax.Array:
        def step(x: jax.Array, chosen: Routing) -> tuple[jax.Array, None]:
            return x + parallel.moe_forward(sharded, x, *chosen, **split), None

        return jax.lax.scan(step, x, routing)[0]

    operands = sharded, placed(x / 50), jax.tree.map(lambda leaf: placed(leaf, None), routing)
    jax.block_until_ready(run(*operands))
    seconds = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(*operands))
        seconds.append((time.perf_counter() - start) / CALLS)
    return {
        "shape": args.shape,
        "way": way,
        "exchange": exchange or "",
        "devices": mesh.size,
        "tokens": len(x),
        "x_dtype": x.dtype.name,
        "backend": backend,
        "us": round(statistics.median(seconds) * 1e6, 1),
        "nmse": float(f"{errors.nmse:.2e}"),
        "max_over_rms": float(f"{errors.max_over_rms:.2e}"),
        **report.origin(),
    }


def _wide(y: jax.Array) -> np.ndarray:
    return np.asarray(y.astype(jnp.float32), np.float64)


class Costs(NamedTuple):
    """Bytes of one device of n, for one layer: held, read, and sent to others. Experts are chosen evenly."""

    held: float
    read: float
    psum: float
    ragged: float
    dense: float


def costs(model: ModelShape, devices: int, tokens: int, x_bytes: int = 2) -> Costs:
    """By formula, with T tokens, K of E experts each, H wide, and n devices:

    held    planes of E / n experts
    read    planes of E / n * (1 - (1 - K / E)^T) experts: those that some token chose, once each
    psum    2 (n - 1) / n * T * 4 H: a ring's share of the f32 sum of all tokens
    ragged  p (n - 1) * T / n * (x_bytes H + 8 K + 4 H), p = 1 - C(E - E / n, K) / C(E, K): a token, its ids and weights
            to each other device that has one of its experts, and f32 back
    dense   the same with p = 1, sums coming back
    """
    experts, top_k, hidden = model.num_experts, model.top_k, model.hidden_size
    wide = (experts, model.expert_intermediate, hidden)
    tall = (experts, hidden, model.expert_intermediate)
    nbytes = sum(
        math.prod(plane.shape) * np.dtype(plane.dtype).itemsize
        for name, shape in ((model.gate, wide), (model.gate, wide), (model.down, tall))
        for plane in FORMATS[name].plane_specs(shape)
    )
    there_and_back = (devices - 1) * tokens / devices * (x_bytes * hidden + 8 * top_k + 4 * hidden)
    visited = 1 - math.comb(experts - experts // devices, top_k) / math.comb(experts, top_k)
    return Costs(
        held=nbytes / devices,
        read=nbytes / devices * (1 - (1 - top_k / experts) ** tokens),
        psum=2 * (devices - 1) / devices * tokens * 4 * hidden,
        ragged=visited * there_and_back,
        dense=there_and_back,
    )


def cost_table(model: ModelShape) -> Iterator[str]:
    yield "| GPUs | T | experts held, MB | read, MB | sent by psum, MB | by the ragged exchange | by the dense one |"
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    for devices in (1, 2, 8, 64):
        for tokens in (64, 4096):
            row = (f"{nbytes / 1e6:,.1f}" for nbytes in costs(model, devices, tokens))
            yield f"| {devices} | {tokens:,} | {' | '.join(row)} |"


if __name__ == "__main__":
    sys.exit(main())
