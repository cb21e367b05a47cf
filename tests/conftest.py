"""Strict JAX settings for every test, seeded randomness, and which tests run where."""

from __future__ import annotations

import gc
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
import tolerances

from jmoe import cpu_kernels, moe_forward

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Deterministic examples: a failure in CI is the same failure here. Compiling makes the first example slow.
hypothesis.settings.register_profile("jmoe", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("jmoe")


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> None:
    """The programs in jax's caches are millions of objects: after some modules a collection takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every run and every test."""
    return np.random.default_rng(20260)


@pytest.fixture(params=["jnp", "cpu"], scope="module")
def each_backend(request: Any) -> Any:
    """The module's ``moe_forward`` with jnp and its bound, then as a CPU takes it, with the kernels' bound."""
    if request.param == "cpu" and (why := cpu_kernels.why_unavailable(tokens=1)):
        pytest.skip(why)

    def forward(*args: Any, **options: Any) -> jax.Array:
        return moe_forward(*args, **({"backend": "jnp"} if request.param == "jnp" else {}) | options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request.module, "moe_forward", forward)
        if request.param == "cpu":
            patch.setitem(tolerances.LAYER, "float32", tolerances.KERNEL_F32)
        yield request.param


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """``slow`` tests run only where -m names them; ``gpu`` tests are skipped where there is no Hopper."""
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    # Asking initialises the backend: only where somebody wants it.
    if on_gpu and (why := _why_no_hopper()):
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=why))


def _why_no_hopper() -> str | None:
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability != "9.0":
        return f"needs an NVIDIA GPU of compute capability 9.0, got {device.platform} {capability or ''}".rstrip()
    return None
