"""Time moe_forward on a GPU as a user has it, beside its kernels' own times, and write results/<device>.json.

    python benchmarks/gpu.py [--shapes ...] [--tokens ...]

Wall time of ``moe_forward`` in one jit over 16 layers (--layers; fewer where memory is short) with distinct weights,
fresh random experts per token and layer, chained through the residual, divided by the layers. Calls follow each other
as decoding steps do: each takes the last one's x, and none is waited for until the last of a burst of some 50 ms. A
chip that has rested runs at its full clock for so long; sustained_us_per_layer is a burst's after two seconds of them,
when the power that the chip may take sets the clock. Before a row is timed the first layer's output is compared: of one
token with float64, of all of them with the jnp backend in float32. A row of which any token misses the numerics
contract is refused, and the program exits with 1. A row names the XLA_FLAGS that it ran under;
--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL lets one CUDA graph hold the kernels, and launches
cost less.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ceilings
import dense_rivals
import jax
import jax.numpy as jnp
import numpy as np
import report

from jmoe import FORMATS, ExpertStack, QuantTensor, moe_forward, selfcheck, which_backend
from jmoe.gguf_file.placing import free_bytes
from jmoe.synthetic import MODELS, ModelShape, layer_bytes, random_blocks
from jmoe.timing import Routing, random_routing

KEYS = ("shape", "tokens", "gate", "down", "x_dtype", "precision", "layers", "backend", "xla_flags")
PRODUCTS = ("moe_few_tokens", "moe_hidden", "moe_gate", "moe_down")
KERNELS = (*PRODUCTS, "moe_prepare", "moe_sort", "moe_gather")
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}
DISPATCH_FROM = 1024  # tokens from which on dispatch and combine are measured alone
BURSTS = 5
BURST_S = 0.05
REST_S = 1.0
ROUTINGS = 32  # of as many calls, then they come again
ROUTINGS_OF_MANY = 8  # tokens touch most experts in each
MANY = 128  # tokens
# Of the device's free memory, for all layers together: the fewer, the more of what a call costs the host is in each.
WEIGHTS_SHARE = 0.6


class State(NamedTuple):
    """What a call leaves to the next."""

    x: jax.Array
    call: jax.Array  # i32[], calls before


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=["qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--x-dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--precision", choices=("none", "highest"), default="none")
    parser.add_argument("--formats", nargs=2, metavar=("GATE_UP", "DOWN"), help="instead of the model's own")
    parser.add_argument(
        "--rivals", action="store_true", help="ragged_dot, and torch._grouped_mm where it is, beside it"
    )
    parser.add_argument("--layers", type=int, default=16, help="in one call, where memory holds as many")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    args = parser.parse_args(argv)
    top = ceilings.measure()
    print(
        f"{report.device_name()}: reads {top.bytes_per_s / 1e12:.2f} TB/s, {top.flops / 1e12:.0f} TFLOP/s,"
        f" {top.sustained_bytes_per_s / 1e12:.2f} and {top.sustained_flops / 1e12:.0f} after two seconds",
        flush=True,
    )
    refused = 0
    for name in args.shapes:
        model = MODELS[name]
        if args.formats:
            model = model._replace(gate=args.formats[0], down=args.formats[1])
        layers = _layers_held(model, args.layers)
        stack = jax.block_until_ready(random_stack(jax.random.key(0), model, layers))
        for tokens in args.tokens:
            precision = None if args.precision == "none" else args.precision
            row = measure(name, model, stack, tokens, DTYPES[args.x_dtype], precision, top)
            refused += row is None
            if row is not None and args.rivals:
                rng = np.random.default_rng(0)
                row |= dense_rivals.measure(model, tokens, np.array(_one_routing(rng, tokens, model).topk_ids))
            if row is not None:  # written at once: a lent machine may end before the last row
                report.write(report.device_name(), [row], KEYS, args.results, ceilings=top._asdict())
        del stack
    return 1 if refused else 0


def _layers_held(model: ModelShape, most: int) -> int:
    """Two to ``most``; ``most`` where the device does not tell its memory (a CPU)."""
    free = free_bytes(jax.devices()[0])
    return most if free is None else min(most, max(2, int(WEIGHTS_SHARE * free / layer_bytes(model))))


def random_stack(key: jax.Array, model: ModelShape, layers: int) -> ExpertStack:
    """[L, E, ...]: random planes made on the device, each entry drawn from those of a small tensor that the host made.

    One stack for all layers, as ``load_expert_stacks(..., stacked=True)`` gives it: jax looks at each argument of each
    call, and 16 stacks are over 200.
    """
    wide = (layers, model.num_experts, model.expert_intermediate, model.hidden_size)
    tall = (layers, model.num_experts, model.hidden_size, model.expert_intermediate)
    keys = jax.random.split(key, 3)
    parts = ((model.gate, wide), (model.gate, wide), (model.down, tall))
    return ExpertStack(*(random_tensor(k, name, shape) for k, (name, shape) in zip(keys, parts, strict=True)))


def random_tensor(key: jax.Array, name: str, shape: tuple[int, ...]) -> QuantTensor:
    sample = FORMATS[name].split(random_blocks(np.random.default_rng(0), name, (64, shape[-1])))
    specs = FORMATS[name].plane_specs(shape)
    keys = jax.random.split(key, len(specs))
    planes = (_draw(k, jnp.asarray(entries), spec.shape) for k, entries, spec in zip(keys, sample, specs, strict=True))
    return QuantTensor(name, FORMATS[name].planes(*planes))


@partial(jax.jit, static_argnames="shape")
def _draw(key: jax.Array, entries: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # A layer at a time: the random numbers take more memory than what they choose.
    keys = jax.random.split(key, shape[0])
    return jax.lax.map(lambda key: jax.random.choice(key, entries.reshape(-1), shape[1:]), keys)


def measure(
    name: str,
    model: ModelShape,
    stack: ExpertStack,
    tokens: int,
    dtype: Any,
    precision: str | None,
    top: ceilings.Ceilings,
) -> dict[str, Any] | None:
    """The row, or None where the output misses the contract."""
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(selfcheck.outlier_x(rng, tokens, model.hidden_size), dtype)
    backend = which_backend(stack, x, precision=precision).name
    layers = stack.up.shape[0]
    forward = partial(moe_forward, precision=precision)
    ids, weights = _one_routing(rng, tokens, model)
    few = np.array([tokens - 1])
    y = np.asarray(forward(stack, x, ids, weights, layer=0).astype(jnp.float32))
    errors = selfcheck.errors(y[few], float64_output(stack, x[few], ids[few], weights[few]))
    by_jnp = partial(moe_forward, backend="jnp", precision="highest")
    worst = worst_token(y, np.asarray(by_jnp(stack, x.astype(jnp.float32), ids, weights, layer=0)))
    bound = selfcheck.bound(x.dtype, backend, jax.default_backend(), precision)
    for found in (errors, worst):
        if not found.within(bound):
            print(f"REFUSED {name} at {tokens} tokens: {found}; the contract is {bound}", file=sys.stderr)
            return None

    def step(stack: ExpertStack, state: State, routings: Routing) -> State:
        x = _rescaled(state.x)
        # XLA makes all layers' ids in one launch and weights in another: arrays of their own, as a router leaves them.
        routing = jax.tree.map(lambda calls: calls[state.call % len(calls)], routings)
        for i in range(layers):
            x = x + forward(stack, x, routing.topk_ids[i], routing.topk_weights[i], layer=i)
        return State(x, state.call + 1)

    distinct = ROUTINGS if tokens < MANY else ROUTINGS_OF_MANY
    of_calls = [random_routing(rng, layers, tokens, model.num_experts, model.top_k) for _ in range(distinct)]
    routings = Routing(*map(jnp.stack, zip(*of_calls, strict=True)))
    # The state's buffers are reused: a CUDA graph whose arrays stay where they are is launched as it is.
    run = jax.jit(step, donate_argnums=1)
    start = time.perf_counter()
    state = jax.block_until_ready(run(stack, State(x + 0, jnp.int32(0)), routings))
    compile_s = time.perf_counter() - start

    def burst(calls: int) -> float:
        """Seconds a call, behind one that wakes host and GPU."""
        nonlocal state
        state = jax.block_until_ready(run(stack, state, routings))
        start = time.perf_counter()
        for _ in range(calls):
            state = run(stack, state, routings)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / calls

    bursts = partial(burst, max(2, math.ceil(BURST_S / burst(4))))
    rested = [_rested(bursts) for _ in range(BURSTS)]
    sustained = ceilings.after(ceilings.WARM_S, bursts)
    if not bool(jnp.all(jnp.isfinite(state.x) & jnp.any(state.x, axis=-1, keepdims=True))):
        raise FloatingPointError(f"{name} at {tokens} tokens: x became zero or infinite, which is no row's workload")
    kernels = kernel_us(jax.jit(step), layers, stack, state, routings)
    alone = _dispatch_combine_us(forward, stack, x, of_calls[1]) if tokens >= DISPATCH_FROM else {}
    touched = np.mean([len(np.unique(ids)) for ids in np.asarray(routings.topk_ids).reshape(distinct * layers, -1)])
    touched /= model.num_experts
    flops = 2 * 3 * tokens * model.top_k * model.hidden_size * model.expert_intermediate
    floor = 1e6 * max(touched * layer_bytes(model) / top.bytes_per_s, flops / top.flops)
    us, sustained_us = (1e6 * seconds / layers for seconds in (statistics.median(rested), sustained))
    print(
        f"{name:15} {model.gate}/{model.down} T={tokens:<4} {x.dtype.name} {backend:6} {us:8.1f} us/layer  sustained"
        f" {sustained_us:8.1f}  floor {floor:7.1f} ({us / floor:.2f}x)  kernels {sum(kernels.values()):7.1f}"
        f"  NMSE {errors.nmse:.1e}  compile {compile_s:.1f} s  {top_kernels(kernels | alone)}",
        flush=True,
    )
    return {
        "shape": name,
        "tokens": tokens,
        "gate": model.gate,
        "down": model.down,
        "x_dtype": x.dtype.name,
        "precision": precision,
        "us_per_layer": round(us, 1),
        "sustained_us_per_layer": round(sustained_us, 1),
        "kernel_us": {kernel: round(value, 1) for kernel, value in kernels.items()},
        **alone,
        "floor_us": round(floor, 1),
        "nmse": float(f"{errors.nmse:.2e}"),
        "max_over_rms": float(f"{errors.max_over_rms:.2e}"),
        "compile_s": round(compile_s, 1),
        "layers": layers,
        "backend": backend,
        **report.origin(),
    }


def _rested(measured: Callable[[], float]) -> float:
    time.sleep(REST_S)
    return measured()


def _rescaled(x: jax.Array) -> jax.Array:
    """Each token to an rms of 1/50: the residual grows from layer to layer, and that of a large token by more.

    With one factor for all tokens, one of Mixtral's eight would leave the others 1e-3 of its rms after 60 calls, and in
    the end zeros, which take less power.
    """
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True)) / 50).astype(x.dtype)


def _dispatch_combine_us(forward: Any, stack: ExpertStack, x: jax.Array, routing: Routing) -> dict[str, float]:
    """Time per layer of all kernels that are not products: sorting pairs by expert and summing over a token's pairs.

    Of layers that are not chained, where XLA has no residual to add in the kernel that sums. Rows of x are gathered by
    the kernel of gate and up beside its products; their time is not told apart.
    """

    layers = stack.up.shape[0]
    of_layers = [Routing(routing.topk_ids[i], routing.topk_weights[i]) for i in range(layers)]

    @jax.jit
    def apart(stack: ExpertStack, x: jax.Array, routings: Sequence[Routing]) -> list[jax.Array]:
        return [forward(stack, x, *routing, layer=i) for i, routing in enumerate(routings)]

    kernels = kernel_us(apart, layers, stack, _rescaled(x), of_layers)
    return {"dispatch_combine_us": round(sum(us for name, us in kernels.items() if name not in PRODUCTS), 1)}


def _one_routing(rng: np.random.Generator, tokens: int, model: ModelShape) -> Routing:
    """Of one layer: ids and weights [T, K]."""
    return jax.tree.map(lambda leaf: leaf[0], random_routing(rng, 1, tokens, model.num_experts, model.top_k))


def float64_output(stack: ExpertStack, x: jax.Array, ids: jax.Array, weights: jax.Array) -> np.ndarray:
    """Layer 0's formula in float64, over the chosen experts' weights as jmoe dequantises them."""
    xs = np.asarray(x.astype(jnp.float32), np.float64)
    y = np.zeros_like(xs)
    for t, k in np.ndindex(*ids.shape):
        gate, up, down = (
            np.asarray(p[0, ids[t, k]].dequantise(), np.float64) for p in (stack.gate, stack.up, stack.down)
        )
        g = gate @ xs[t]
        y[t] += float(weights[t, k]) * (down @ (g / (1 + np.exp(-g)) * (up @ xs[t])))
    return y


def worst_token(y: np.ndarray, exact: np.ndarray) -> selfcheck.Errors:
    """Each error of the token that has most of it, over that token's own squares and rms; NaN where any has."""
    of_tokens = [selfcheck.errors(*token) for token in zip(y, exact, strict=True)]
    return selfcheck.Errors(*np.max(of_tokens, axis=0).tolist())


def kernel_us(run: Any, layers: int, *arguments: Any) -> dict[str, float]:
    """Time per layer of each kernel in one call, by name, as CUPTI sees it; nothing where there is no GPU."""
    if jax.default_backend() != "gpu":
        return {}
    # Mosaic's profiler module also imports a tool that only its other functions use.
    for module in (
        "",
        ".cli",
        ".cli.tools",
        ".cli.tools.get_kernel_stats_tool",
        ".convert",
        ".convert.raw_to_tool_data",
    ):
        sys.modules.setdefault(f"xprof{module}", types.ModuleType(f"xprof{module}"))
    from jax.experimental.mosaic.gpu import profiler

    _, times = profiler.measure(run, aggregate=False)(*arguments)
    total: dict[str, float] = defaultdict(float)
    for kernel, milliseconds in times:
        ours = next((name for name in KERNELS if kernel.startswith(name)), "others")
        total[ours] += milliseconds * 1e3 / layers
    return dict(total)


def top_kernels(kernels: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in kernels.items())


if __name__ == "__main__":
    sys.exit(main())
