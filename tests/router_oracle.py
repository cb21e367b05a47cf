"""The float64 reference of every router, token by token in plain Python and NumPy. Imports nothing of jmoe.

p = gating(logits);  s = p + bias;  groups: all but the best by the sum of their two largest s are out
ids = the top_k largest s, ties to the smaller index;  w = p[ids];  w /= max(sum w, 2^-14);  w *= scale
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def softmax(z: np.ndarray) -> np.ndarray:
    exp = np.exp(z - z.max())
    return exp / exp.sum()


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.array([1 / (1 + np.exp(-v)) if v >= 0 else np.exp(v) / (1 + np.exp(v)) for v in z])


def sqrt_softplus(z: np.ndarray) -> np.ndarray:
    return np.sqrt(np.logaddexp(z, 0.0))


GATINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "softmax_top_k": lambda z: z,
    "sqrt_softplus": sqrt_softplus,
}


def largest(values: np.ndarray, count: int) -> list[int]:
    """Indices by descending value; Python's sort is stable, so ties go to the smaller one."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def route(
    logits: Any,
    top_k: int,
    *,
    gating: str = "softmax",
    normalise: bool = True,
    scale: float = 1.0,
    group_count: int = 1,
    groups_used: int = 1,
    select_on: str = "probs",
    bias: Any = None,
    ids: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """ids [T, K] and f64 weights [T, K]; ``ids`` replaces the choice."""
    rows = [np.asarray(row).astype(np.float64) for row in np.asarray(logits)]
    chosen, weights = [], []
    for t, z in enumerate(rows):
        p = GATINGS[gating](z)
        s = z if select_on == "logits" else p if bias is None else p + np.asarray(bias).astype(np.float64)
        if group_count > 1:
            groups = s.reshape(group_count, -1)
            scores = np.array([sum(sorted(group)[-2:]) for group in groups])
            out = set(range(group_count)) - set(largest(scores, groups_used))
            size = groups.shape[1]
            s = np.array([-np.inf if e // size in out else value for e, value in enumerate(s)])
        picked = largest(s, top_k) if ids is None else list(np.asarray(ids)[t])
        w = p[picked]
        if gating == "softmax_top_k":
            w = softmax(w)
        if normalise:
            w = w / max(w.sum(), 6.103515625e-5)
        if scale not in (0, 1):
            w = w * scale
        chosen.append(picked)
        weights.append(w)
    return np.array(chosen).reshape(-1, top_k), np.array(weights).reshape(-1, top_k)
