"""Where results go, and what each says of its origin."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jmoe import cpu_kernels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def device_name() -> str:
    """``h200``, or for a CPU ``cpu-amd-epyc-2-cores``: jax calls every CPU "cpu".

    ``cpu-amd-epyc-avx2-2-cores`` where our kernels do not find AVX-512: a virtual machine may hide it.
    """
    device = jax.devices()[0]
    words = device.device_kind.removeprefix("NVIDIA ")
    if device.platform == "cpu":
        isa = cpu_kernels.isa() or ""
        words = f"cpu {_cpu_model()} {'' if isa.startswith('avx512') else isa} {cores()} cores"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


def cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@functools.cache
def origin() -> dict[str, str]:
    """The fields of every row: what code ran on what."""
    return {"commit": _commit(), "jax": jax.__version__, "xla_flags": os.environ.get("XLA_FLAGS", "")}


def _commit() -> str:
    # A machine that was sent the files alone is told the commit.
    if told := os.environ.get("JMOE_COMMIT"):
        return told

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Results and README are written after a measurement: they do not make the code another.
        changed = git("status", "--porcelain", "--", "jmoe", "pallas_kernels", "metal_bridge")
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(name: str, rows: Sequence[dict[str, Any]], keys: Sequence[str], folder: Path = RESULTS, **about: Any) -> Path:
    """``<folder>/<name>.json`` with ``rows``, and an earlier run's rows that no new one has the same ``keys`` as."""
    path = folder / f"{name}.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {tuple(row[key] for key in keys): row for row in (*earlier, *rows)}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": name, **about, "rows": list(merged.values())}, indent=1) + "\n")
    return path
