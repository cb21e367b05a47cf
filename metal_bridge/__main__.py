"""``python -m metal_bridge``: does the Apple path compute what it should on this machine? Prints what an issue needs.

Every packed format, as the file has it and as ``jmoe.for_mps`` converts it, for one token and for many, under vmap and
grad, against float64; and where MLX has a GPU, the hand-written kernels. Exit status 1 where an error is too large.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import FORMATS, for_mps, moe_forward, selfcheck, which_backend
from jmoe.cli._common import duration, table
from jmoe.synthetic import ModelShape, layer_blocks, stack_of, weights_of

from . import mlx
from .gemv import FORMATS as KERNEL_FORMATS
from .plugin import installed_version, why_unavailable

PACKAGES = ("jmoe", "jax", "jaxlib", "jax-mps", "jax-metal", "mlx", "numpy")
# Qwen3-30B-A3B's sizes with a quarter of its experts; and the smallest with super-blocks, more than one a row.
SHAPE, SMALL = (2048, 768, 32, 8), (512, 256, 8, 2)
FEW, MANY, REPEATS = 1, 33, 5


class Row(NamedTuple):
    format: str
    computed: str
    backend: str
    errors: selfcheck.Errors
    bound: selfcheck.Errors
    first: float  # seconds, compiling included
    later: float  # seconds, the median
    raised: str = ""

    @property
    def verdict(self) -> str:
        return self.raised or ("ok" if self.errors.within(self.bound) else "FAILED")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m metal_bridge", description="Self-test of jmoe on Apple GPUs.")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="which to run (all)")
    parser.add_argument("--small", action="store_true", help="tiny layers: quick, and times that say nothing")
    args = parser.parse_args(argv)
    print("\n".join(heading()) + "\n")
    rows: list[Row] = []
    for name in args.formats:
        model = ModelShape(*(SMALL if args.small else SHAPE), gate=name, down=name)
        rows += check_layer(model)
        if name in KERNEL_FORMATS and mlx.why_no_metal() is None:
            rows += check_kernel(model)
    print(report(rows))
    if why := mlx.why_no_metal():
        print(f"Metal kernels for MLX ({', '.join(KERNEL_FORMATS)}): not run, {why}")
    failed = sum(row.verdict != "ok" for row in rows)
    print(f"FAILED: {failed} of {len(rows)} checks" if failed else f"passed: {len(rows)} checks")
    return 1 if failed else 0


def heading() -> list[str]:
    device = jax.devices()[0]
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    return [
        "metal_bridge self-test",
        f"Python {platform.python_version()}, {system}, {platform.machine()}",
        ", ".join(f"{package} {installed_version(package) or 'not installed'}" for package in PACKAGES),
        f"platform {device.platform} ({device.device_kind}); Apple GPU through JAX: {why_unavailable() or 'available'}",
    ]


def report(rows: Sequence[Row]) -> str:
    cells = [
        (
            row.format,
            row.computed,
            row.backend,
            f"{row.errors.nmse:.1e} <= {row.bound.nmse:.0e}",
            f"{row.errors.max_over_rms:.1e} <= {row.bound.max_over_rms:.0e}",
            duration(row.first),
            duration(row.later),
            row.verdict,
        )
        for row in rows
    ]
    return table(("format", "computed", "by", "NMSE", "max error / rms", "first call", "later", ""), cells)


def check_layer(model: ModelShape) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    blocks = layer_blocks(rng, model)
    packed, exact_weights = stack_of(model, blocks), weights_of(model, blocks)
    converted = for_mps(packed)
    stacks = {model.gate: packed, f"{model.gate} as {converted.formats.up}": converted}
    if converted.formats == packed.formats:
        stacks = {model.gate: packed}
    for name, stack in stacks.items():
        for tokens in (FEW, MANY):
            x = selfcheck.outlier_x(rng, tokens, model.hidden_size)
            ids = rng.random((tokens, model.num_experts)).argsort(axis=-1)[:, : model.top_k].astype(np.int32)
            routing = ids, rng.dirichlet([9.0] * model.top_k, tokens).astype(np.float32)
            y = selfcheck.moe_float64(exact_weights, x, *routing)
            runs: dict[str, tuple[Any, tuple[Any, ...], np.ndarray]] = {"forward": (moe_forward, (x, *routing), y)}
            if tokens == FEW:
                twice = tuple(np.stack([array, array]) for array in (x, *routing))
                in_a_batch = jax.vmap(moe_forward, in_axes=(None, 0, 0, 0))
                runs["vmap"] = in_a_batch, twice, np.stack([y, y])
                by = rng.standard_normal(x.shape).astype(np.float32)
                runs["grad"] = gradient, (x, *routing, by), gradient_float64(exact_weights, x, *routing, by)
            choice = which_backend(stack, x, ids)
            bound = selfcheck.bound(x.dtype, choice.name, jax.default_backend())
            for what, (run, args, exact) in runs.items():
                # Batches and derivatives go through XLA.
                by_backend = choice.name if what == "forward" else "jnp"
                computed = check(partial(jax.jit(run), stack, *args), exact, bound)
                yield Row(name, f"{what}, T={tokens}", by_backend, *computed)


def gradient(stack: Any, x: Any, topk_ids: Any, topk_weights: Any, by: Any) -> jax.Array:
    """``d sum(y * by) / dx``, f32[T, H]."""
    return jax.grad(lambda x: jnp.sum(moe_forward(stack, x, topk_ids, topk_weights) * by))(x)


def gradient_float64(
    weights: selfcheck.LayerWeights, x: np.ndarray, topk_ids: np.ndarray, topk_weights: np.ndarray, by: np.ndarray
) -> np.ndarray:
    """The same in f64."""
    assert weights.gate is not None
    out = np.zeros(x.shape)
    for token, slot in np.ndindex(topk_ids.shape):
        gate, up, down = (of(int(topk_ids[token, slot])) for of in (weights.gate, weights.up, weights.down))
        g, u = gate @ x[token], up @ x[token]
        sigmoid = 0.5 + 0.5 * np.tanh(0.5 * g)
        to_h = topk_weights[token, slot] * (by[token] @ down)
        out[token] += (to_h * u * sigmoid * (1 + g * (1 - sigmoid))) @ gate + (to_h * g * sigmoid) @ up
    return out


def check_kernel(model: ModelShape) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    blocks = layer_blocks(rng, model)[1]
    planes = mlx.to_mlx(FORMATS[model.gate].split(blocks))
    x = selfcheck.outlier_x(rng, FEW, model.hidden_size)
    ids = rng.integers(0, model.num_experts, (FEW, model.top_k))
    of_expert = selfcheck.weights_in_blocks(FORMATS[model.gate].ggml_type, blocks)
    exact = np.stack([of_expert(int(e)) @ x[0].astype(np.float64) for e in ids[0]])
    run = lambda: np.array(mlx.gathered_gemv(model.gate, planes, x, ids))[0]  # noqa: E731
    yield Row(model.gate, "gathered gemv", "MLX", *check(run, exact, selfcheck.bound(x.dtype, "mlx", "mps")))


def check(run: Callable[[], Any], exact: np.ndarray, bound: selfcheck.Errors) -> tuple[Any, ...]:
    """What a Row has from ``errors`` on. What raises is reported like what is wrong, and the next one is tried."""
    result, seconds = None, []
    try:
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            result = np.asarray(jax.block_until_ready(run()))
            seconds.append(time.perf_counter() - start)
    except Exception as error:
        raised = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return selfcheck.Errors(np.nan, np.nan), bound, np.nan, np.nan, raised
    return selfcheck.errors(result, exact), bound, seconds[0], float(np.median(seconds[1:]))


if __name__ == "__main__":
    sys.exit(main())
