"""Time moe_forward on a CPU, layer by layer, beside what a user could have instead, and write results/<device>.json.

    python benchmarks/cpu.py [--shapes ...] [--tokens ...] [--x-dtype ...]

Wall time of four distinct layers chained through the residual inside one jit, with fresh random experts for each token,
layer and call, divided by four: as jmoe runs it by itself, and by the jnp backend. Before a row is timed its output for
some tokens is compared with float64; a row that misses the numerics contract is refused, and the program exits with 1.
The rivals are the naive form (naive.py) where its memory allows, and llama.cpp's own CPU kernels (llama_cpp.py) where
llama-cpp-python is installed; all take turns, so that a busy moment of the machine hits each alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# This checkout's jmoe, installed or not: the rows name its commit.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ceilings
import jax
import jax.numpy as jnp
import llama_cpp
import naive
import numpy as np
import report

from jmoe import ExpertStack, moe_forward, selfcheck, which_backend
from jmoe.synthetic import MODELS, ModelShape, layer_blocks, stack_of, weights_of
from jmoe.timing import Layer, chained, layer_seconds, random_routing

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}
KEYS = ("shape", "tokens", "gate", "down", "x_dtype", "precision", "backend", "xla_flags")


class Contender(NamedTuple):
    backend: str
    errors: selfcheck.Errors
    round: Callable[[], Sequence[float]]  # seconds per layer of some calls


class Layers(NamedTuple):
    """Four layers of a shape; the first one's blocks for the checks."""

    model: ModelShape
    stacks: list[ExpertStack]
    blocks: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def random(cls, model: ModelShape, rng: np.random.Generator, layers: int = 4) -> Layers:
        blocks = layer_blocks(rng, model)
        others = (stack_of(model, layer_blocks(rng, model)) for _ in range(layers - 1))
        return cls(model, [stack_of(model, blocks), *others], blocks)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=["qwen3-30b-a3b", "qwen3-30b-a3b-q4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--x-dtype", nargs="+", choices=DTYPES, default=["f32"])
    parser.add_argument("--precision", nargs="+", choices=("none", "highest"), default=["none"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="a contender's turn in a round, at least three calls"
    )
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    top = ceilings.measure()
    print(
        f"{report.device_name()}: reads {top.bytes_per_s / 1e9:.1f} GB/s, multiplies at {top.flops / 1e9:,.0f} GFLOP/s"
    )
    refused = 0
    for shape in args.shapes:
        layers = Layers.random(MODELS[shape], rng)
        for tokens in args.tokens:
            for dtype in args.x_dtype:
                for precision in args.precision:
                    x = jnp.asarray(selfcheck.outlier_x(rng, tokens, layers.model.hidden_size), DTYPES[dtype])
                    chosen = None if precision == "none" else precision
                    contenders, missed = _contenders(layers, x, chosen, args.seconds, rng)
                    refused += missed
                    rows = _rows(shape, layers, x, chosen, contenders, args.rounds, top)
                    report.write(report.device_name(), rows, KEYS, args.results, ceilings=top._asdict())
                    print(*map(_as_text, rows), sep="\n", flush=True)
    return 1 if refused else 0


def _contenders(
    layers: Layers, x: jax.Array, precision: str | None, seconds: float, rng: np.random.Generator
) -> tuple[list[Contender], int]:
    """Those whose output is right, and how many of ours are not."""
    forward = partial(moe_forward, precision=precision)
    ours: list[tuple[str, Layer]] = [(which_backend(layers.stacks[0], x, precision=precision).name, forward)]
    if ours[0][0] != "jnp":
        ours.append(("jnp", partial(forward, backend="jnp")))
    if naive.fits(layers.model, x.shape[0]):
        ours.append(("naive", naive.moe_naive))
    contenders, missed = [], 0
    routing = random_routing(rng, 1, x.shape[0], layers.model.num_experts, layers.model.top_k)
    ids, weights = routing.topk_ids[0], routing.topk_weights[0]
    # Float64 on all tokens would take longer than the timing.
    few = np.unique([0, x.shape[0] - 1])
    exact = selfcheck.moe_float64(weights_of(layers.model, layers.blocks), x[few], ids[few], weights[few])
    for backend, layer in ours:
        errors = selfcheck.errors(jax.jit(layer)(layers.stacks[0], x, ids, weights)[few], exact)
        bound = selfcheck.bound(x.dtype, "jnp" if backend == "naive" else backend, jax.default_backend(), precision)
        if errors.within(bound):
            contenders.append(Contender(backend, errors, _our_round(layers, layer, x, seconds, rng)))
        else:
            missed += 1
            print(f"REFUSED {backend} at {x.shape[0]} tokens: {errors}; the contract is {bound}", file=sys.stderr)
    return contenders + _llama_cpp(layers, x, ids, weights, few, exact), missed


def _our_round(
    layers: Layers, layer: Layer, x: jax.Array, seconds: float, rng: np.random.Generator
) -> Callable[[], Sequence[float]]:
    run = chained(layer)

    def one_round() -> Sequence[float]:
        time_calls = partial(layer_seconds, run, layers.stacks, x, rng, layers.model.top_k)
        start = time.perf_counter()
        time_calls(1)
        call = (time.perf_counter() - start) / 3
        return time_calls(int(np.clip(seconds / call, 3, 51)))

    return one_round


def _llama_cpp(
    layers: Layers, x: jax.Array, ids: jax.Array, weights: jax.Array, few: np.ndarray, exact: np.ndarray
) -> list[Contender]:
    """llama.cpp with and without its repacking of weights: either may be faster."""
    if jax.default_backend() != "cpu" or x.dtype != jnp.float32:
        return []
    model, found = layers.model, []
    types = (model.gate, model.gate, model.down)
    for repack in (True, False):
        y = llama_cpp.moe_layer_output(layers.blocks, types, *map(np.asarray, (x, ids, weights)), repack=repack)
        if y is None:
            return []
        one_round = partial(_llama_cpp_round, model, x.shape[0], types, repack)
        name = "llama.cpp, repacked" if repack else "llama.cpp"
        found.append(Contender(name, selfcheck.errors(y[few], exact), one_round))
    return found


def _llama_cpp_round(model: ModelShape, tokens: int, types: tuple[str, str, str], repack: bool) -> list[float]:
    median = llama_cpp.moe_layer_us(model[:4], tokens, *types, threads=report.cores(), repack=repack)
    assert median is not None, "moe_layer_output found the package, so it is there"
    return [median / 1e6]


def _rows(
    shape: str,
    layers: Layers,
    x: jax.Array,
    precision: str | None,
    contenders: Sequence[Contender],
    rounds: int,
    top: ceilings.Ceilings,
) -> list[dict[str, Any]]:
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, measured in zip(contenders, seconds, strict=True):
            measured.extend(contender.round())
    return [
        {
            "shape": shape,
            "tokens": x.shape[0],
            "gate": layers.model.gate,
            "down": layers.model.down,
            "x_dtype": x.dtype.name,
            "precision": precision,
            "us_per_layer": round(statistics.median(measured) * 1e6, 1),
            "kernel_us": None,
            "floor_us": round(ceilings.floor_us(layers.model, x.shape[0], top), 1),
            "nmse": float(f"{contender.errors.nmse:.2e}"),
            "max_over_rms": float(f"{contender.errors.max_over_rms:.2e}"),
            "backend": contender.backend,
            **report.origin(),
        }
        for contender, measured in zip(contenders, seconds, strict=True)
    ]


def _as_text(row: dict[str, Any]) -> str:
    return (
        f"{row['shape']:20} T={row['tokens']:<5} {row['x_dtype']:9} {row['backend']:20}"
        f" {row['us_per_layer']:12,.1f} us/layer  floor {row['floor_us']:10,.1f}  NMSE {row['nmse']:.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
