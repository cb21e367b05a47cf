"""The same layer from dense bf16 weights, as others compute it: jax.lax.ragged_dot, and torch._grouped_mm where it is.

us per layer, wall time; the weights of one layer, twice: [2, E, ...] in one jit, more than the L2 cache holds.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.synthetic import ModelShape

LAYERS = 2
REPEATS = 5


def measure(model: ModelShape, tokens: int, ids: np.ndarray) -> dict[str, float]:
    """us per layer by rival's name, of those that are installed and whose weights fit; ``ids`` i32[T, K]."""
    found = {"ragged_dot_us": _timed(*_with_ragged_dot(model, tokens, ids))}
    if importlib.util.find_spec("torch") is not None:
        torch: Any = importlib.import_module("torch")
        if torch.cuda.is_available() and hasattr(torch, "_grouped_mm"):
            found["torch_grouped_mm_us"] = _with_torch(model, tokens, ids)
    return {name: round(us, 1) for name, us in found.items()}


def _with_ragged_dot(model: ModelShape, tokens: int, ids: np.ndarray) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    hidden, inner, experts, top_k = model[:4]
    wide, tall = (LAYERS, experts, hidden, 2 * inner), (LAYERS, experts, inner, hidden)
    keys = jax.random.split(jax.random.key(0), 3)
    gate_up, down, x = (
        jax.random.normal(key, shape, jnp.bfloat16) / 32
        for key, shape in zip(keys, (wide, tall, (tokens, hidden)), strict=True)
    )

    @jax.jit
    def run(gate_up, down, x, ids):
        order = jnp.argsort(ids.reshape(-1))
        sizes = jnp.bincount(ids.reshape(-1), length=experts)
        for layer in range(LAYERS):
            g, u = jnp.split(jax.lax.ragged_dot(x[order // top_k], gate_up[layer], sizes), 2, axis=1)
            out = jax.lax.ragged_dot((jax.nn.silu(g) * u).astype(jnp.bfloat16), down[layer], sizes)
            x = x + jnp.zeros_like(out).at[order].set(out).reshape(tokens, top_k, hidden).mean(1)
        return x

    return run, (gate_up, down, x, jnp.asarray(ids))


def _timed(run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    jax.block_until_ready(run(*arguments))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append((time.perf_counter() - start) / LAYERS)
    return statistics.median(seconds) * 1e6


def _with_torch(model: ModelShape, tokens: int, ids: np.ndarray) -> float:
    torch: Any = importlib.import_module("torch")
    hidden, inner, experts, top_k = model[:4]
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / 32  # noqa: E731
    gate_up, down = make(LAYERS, experts, hidden, 2 * inner), make(LAYERS, experts, inner, hidden)
    start_x, flat = make(tokens, hidden), torch.as_tensor(ids, device="cuda").flatten()

    def run() -> None:
        x = start_x
        order = torch.argsort(flat)
        ends = torch.bincount(flat, minlength=experts).cumsum(0).to(torch.int32)
        for layer in range(LAYERS):
            rows = torch._grouped_mm(x[order // top_k], gate_up[layer], ends)
            g, u = rows.chunk(2, dim=1)
            out = torch._grouped_mm(torch.nn.functional.silu(g) * u, down[layer], ends)
            x = x + torch.zeros_like(out).index_copy(0, order, out).view(tokens, top_k, hidden).mean(1)

    run()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / LAYERS)
    return statistics.median(seconds) * 1e6
