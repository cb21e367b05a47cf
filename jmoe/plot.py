"""Pictures of what a router does, with matplotlib: ``pip install 'jmoe[plot]'``."""

from __future__ import annotations

from typing import Any

import numpy as np


def expert_utilisation(tokens_per_expert: Any, *, ax: Any = None, rows: str = "layer") -> Any:
    """A heat map of ``n[r, e] / mean_e n[r, e]``: each expert's load over an even share, a row a layer or step.

    ``tokens_per_expert`` [R, E] or [E], as :func:`jmoe.tokens_per_expert` counts them; ``rows`` labels the first axis.
    White is an even load, blue less, red more, up to four times; rows without tokens stay white. Draws on ``ax`` or
    a new figure, and returns the Axes. Raises ImportError where matplotlib is missing, ValueError for other shapes.
    """
    counts = np.asarray(tokens_per_expert, np.float64)
    if counts.ndim not in (1, 2) or 0 in counts.shape:
        raise ValueError(
            f"tokens_per_expert must be [R, E] or [E], got {list(counts.shape)}. Stack the counts of layers or steps."
        )
    try:
        import matplotlib.pyplot as plt
        from matplotlib.colors import TwoSlopeNorm
    except ImportError as error:
        raise ImportError("jmoe.plot needs matplotlib: pip install 'jmoe[plot]'") from error
    counts = np.atleast_2d(counts)
    mean = counts.mean(axis=1, keepdims=True)
    share = np.divide(counts, mean, out=np.ones_like(counts), where=mean > 0)
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    image = ax.imshow(share, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1, 0, 4), interpolation="nearest")
    ax.set(xlabel="expert", ylabel=rows)
    ax.figure.colorbar(image, ax=ax, label="tokens / even share", extend="max")
    return ax
