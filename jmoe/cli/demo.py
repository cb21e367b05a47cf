"""``jmoe demo``: a packaged model that llama.cpp quantised, loaded, routed, computed and checked."""

from __future__ import annotations

import argparse
import time
from importlib.resources import as_file, files

import jax
import jax.numpy as jnp
import numpy as np

from .. import selfcheck
from ..dispatch import Choice, which_backend
from ..gguf_file import GgufFile, moe_layers
from ..moe import moe_forward
from ..routing import RouterConfig, route
from ..stack import ExpertStack
from ._common import duration, heading, table

NAME = "demo"
SUMMARY = "Load, route and compute the layers of a small packaged GGUF file and compare them with float64"

MODEL = "qwen3moe-Q4_K_M.gguf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def execute(args: argparse.Namespace) -> int:
    del args
    with as_file(files("jmoe") / "data" / MODEL) as path, GgufFile(path) as gguf:
        return check_layers(gguf, tokens=17)


def check_layers(gguf: GgufFile, tokens: int) -> int:
    """Compute every MoE layer of an open file for random tokens; 1 where one misses the numerics contract."""
    top_k = gguf.metadata[f"{gguf.architecture}.expert_used_count"]
    device = jax.devices()[0]
    print(heading(device))
    print(f"{MODEL}: {gguf.architecture}, quantised by llama.cpp, {tokens} tokens to {top_k} experts each\n")
    rng = np.random.default_rng(0)
    choices: dict[Choice, None] = {}
    passed = [_check_layer(gguf, layer_idx, tokens, top_k, rng, choices) for layer_idx in moe_layers(gguf)]
    for choice in choices:
        print(f"backend {choice.name}: {choice.why}")
    print("errors: against float64 on the file's own blocks; x has outlier channels and a mean shift")
    print("passed" if all(passed) else "FAILED: an output is outside the numerics contract of the README")
    return 0 if all(passed) else 1


def _check_layer(
    gguf: GgufFile, layer_idx: int, tokens: int, top_k: int, rng: np.random.Generator, choices: dict[Choice, None]
) -> bool:
    start = time.perf_counter()
    stack = jax.block_until_ready(ExpertStack.load_from_gguf(gguf, layer_idx))
    print(f"layer {layer_idx} in {duration(time.perf_counter() - start)}: {stack}")
    logits = rng.standard_normal((tokens, stack.num_experts), np.float32)
    topk_ids, topk_weights = route(logits, RouterConfig(top_k, normalise=True))
    activations = selfcheck.outlier_x(rng, tokens, stack.hidden_size)
    weights = selfcheck.weights_in_file(gguf, layer_idx)
    rows, passed = [], True
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(activations, dtype)
        y, first, later = _timed(stack, x, topk_ids, topk_weights)
        errors = selfcheck.errors(y, selfcheck.moe_float64(weights, x, topk_ids, topk_weights))
        choice = which_backend(stack, x, topk_ids)
        bound = selfcheck.bound(x.dtype, choice.name, jax.default_backend())
        choices[choice] = None
        passed &= errors.within(bound)
        rows.append(
            (
                f"  {x.dtype.name}",
                choice.name,
                duration(first),
                duration(later),
                f"{errors.nmse:.1e} <= {bound.nmse:.0e}",
                f"{errors.max_over_rms:.1e} <= {bound.max_over_rms:.0e}",
                "ok" if errors.within(bound) else "FAILED",
            )
        )
    print(table(("  x", "backend", "first call", "later", "NMSE", "max error / rms", ""), rows) + "\n")
    return passed


def _timed(
    stack: ExpertStack, x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array
) -> tuple[jax.Array, float, float]:
    """y, the seconds of the first call (which compiles), and the median of five later ones."""
    seconds = []
    y = None
    for _ in range(6):
        start = time.perf_counter()
        y = jax.block_until_ready(moe_forward(stack, x, topk_ids, topk_weights))
        seconds.append(time.perf_counter() - start)
    assert y is not None
    return y, seconds[0], float(np.median(seconds[1:]))
