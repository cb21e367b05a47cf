"""Write the README's measured tables from benchmarks/results: `python benchmarks/readme_table.py` after a measurement.

`--check` writes nothing and exits with 1 where the README differs.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
START, END = "<!-- measured: written by benchmarks/readme_table.py -->", "<!-- end of measured -->"
# What the README tells GPU users to set.
COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL"
RIVALS = ("naive", "llama.cpp", "llama.cpp, repacked")


def tables() -> str:
    """Everything between the README's two marks."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        results = json.loads(path.read_text())
        kind = path.name.partition("-")[0]
        parts.append(
            "\n".join(
                {"load": _load, "vmap": _vmap, "routing": _routing, "parallel": _parallel}.get(kind, _layers)(results)
            )
        )
    return "\n\n".join(parts) or "No measurements yet."


def _layers(results: dict[str, Any]) -> Iterator[str]:
    rows, ceilings = results["rows"], results.get("ceilings")
    device = "floors not measured"
    if ceilings:
        reads, multiplies = _rate(ceilings, "bytes_per_s", "GB/s"), _rate(ceilings, "flops", "GFLOP/s")
        device = f"reads {reads}, multiplies at {multiplies}"
    yield f"**{results['device']}** ({device}; {_origin(rows)}), us per layer:\n"
    # On a GPU, where the wall shows more than them.
    kernels = any(row.get("kernel_us") for row in rows)
    sustained = any("sustained_us_per_layer" in row for row in rows)
    of_gpus = [*["after two seconds"] * sustained, *["its kernels"] * kernels]
    columns = ("its NMSE", "floor", "naive", "llama.cpp", "its NMSE", "ratio")
    yield from _head("shape", "gate/up, down", "x", "T", "jmoe", *of_gpus, *columns)
    for own in rows:
        if own["backend"] in RIVALS:
            continue
        same = [row for row in rows if row["backend"] in RIVALS and all(row[k] == own[k] for k in _ALIKE)]
        naive = next((row for row in same if row["backend"] == "naive"), None)
        # Whichever of its two weight layouts is faster.
        llama = min((row for row in same if row is not naive), key=lambda row: row["us_per_layer"], default=None)
        precision = f", {own['precision']}" if own["precision"] else ""
        yield _line(
            own["shape"] + _depth(own) + _flags(own["xla_flags"]),
            f"{own['gate']}, {own['down']}",
            own["x_dtype"] + precision,
            own["tokens"],
            f"{own['us_per_layer']:,.0f} ({own['backend']})",
            *[f"{own['sustained_us_per_layer']:,.0f}" if "sustained_us_per_layer" in own else ""] * sustained,
            *[f"{math.fsum(own['kernel_us'].values()):,.0f}" if own.get("kernel_us") else ""] * kernels,
            f"{own['nmse']:.0e}",
            "" if own["floor_us"] is None else f"{own['floor_us']:,.0f}",
            f"{naive['us_per_layer']:,.0f}" if naive else "",
            f"{llama['us_per_layer']:,.0f}" if llama else "",
            f"{llama['nmse']:.0e}" if llama else "",
            f"{llama['us_per_layer'] / own['us_per_layer']:.2f}" if llama else "",
        )


def _rate(ceilings: dict[str, float], name: str, unit: str) -> str:
    sustained = ceilings.get(f"sustained_{name}")
    after = "" if sustained is None else f" ({sustained / 1e9:,.0f} after two seconds)"
    return f"{ceilings[name] / 1e9:,.0f} {unit}{after}"


def _depth(row: dict[str, Any]) -> str:
    """Where a call has more layers than the sixteen of other rows."""
    layers = row.get("layers", 0)
    return f", {layers} layers" if layers > 16 else ""


def _flags(flags: str) -> str:
    if not flags:
        return ""
    return ", command buffers" if flags == COMMAND_BUFFERS else f", XLA_FLAGS={flags}"


_ALIKE = ("shape", "tokens", "gate", "down", "x_dtype", "precision", "xla_flags")


def _load(results: dict[str, Any]) -> Iterator[str]:
    rows, device = results["rows"], results["device"].removeprefix("load-")
    yield f"**Loading on {device}** ({_origin(rows)}), one layer of {rows[0]['shape']}:\n"
    yield from _head("format", "file, MB", "planes / file", "GB/s of the file", "memory beside the planes, MB")
    for row in rows:
        yield _line(
            row["format"],
            f"{row['file_bytes'] / 1e6:.0f}",
            f"{row['planes_over_file']:.3f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['extra_bytes'] / 1e6:.0f}",
        )


def _vmap(results: dict[str, Any]) -> Iterator[str]:
    rows, device = results["rows"], results["device"].removeprefix("vmap-")
    yield f"**vmap on {device}** ({_origin(rows)}), us per call, beside the same work in one flat call:\n"
    yield from _head("shape", "mapped over", "members", "T of each", "x", "vmap", "flat", "flat / vmap")
    for row in rows:
        yield _line(
            row["shape"] + _flags(row["xla_flags"]),
            row["mapped"],
            row["members"],
            row["tokens"],
            row["x_dtype"],
            f"{row['us']:,.0f} ({row['backend']})",
            f"{row['flat_us']:,.0f}",
            f"{row['flat_us'] / row['us']:.2f}",
        )


def _parallel(results: dict[str, Any]) -> Iterator[str]:
    rows, device = results["rows"], results["device"].removeprefix("parallel-")
    yield f"**jmoe.parallel on {device}** ({_origin(rows)}), us per layer:\n"
    yield from _head("shape", "tokens are", "devices", "T", "x", "us", "one device over it")
    for row in rows:
        alike = ("shape", "tokens", "x_dtype", "xla_flags")
        # Whichever of its rows is faster: it exchanges nothing.
        ones = (r for r in rows if r["devices"] == 1 and all(r[k] == row[k] for k in alike))
        one = min(ones, key=lambda r: r["us"], default=None)
        yield _line(
            row["shape"] + _flags(row["xla_flags"]),
            " ".join(filter(None, (row["way"], row["exchange"]))),
            row["devices"],
            row["tokens"],
            row["x_dtype"],
            f"{row['us']:,.0f} ({row['backend']})",
            f"{one['us'] / row['us']:.2f}" if one else "",
        )


def _routing(results: dict[str, Any]) -> Iterator[str]:
    rows, device = results["rows"], results["device"].removeprefix("routing-")
    yield f"**Routing on {device}** ({_origin(rows)}), us per call of `route`, and with either way of choosing:\n"
    yield from _head("router", "E", "K", "T", "route", "counting ranks", "lax.top_k")
    for row in rows:
        yield _line(
            row["router"] + _flags(row["xla_flags"]),
            row["experts"],
            row["top_k"],
            row["tokens"],
            *("" if row[key] is None else f"{row[key]:,.1f}" for key in ("us", "rank_us", "top_k_us")),
        )


def _origin(rows: Sequence[dict[str, Any]]) -> str:
    commits, versions = (", ".join(sorted({row[key] for row in rows})) for key in ("commit", "jax"))
    return f"commit {commits}, jax {versions}"


def _head(*names: str) -> Iterator[str]:
    yield _line(*names)
    yield "|" + "".join(
        "---|" if name in ("shape", "gate/up, down", "x", "format", "mapped over", "router") else "--:|"
        for name in names
    )


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def with_tables(readme: str) -> str:
    """The README's text with the tables of today's results."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{tables()}\n{END}{after}"


def main(argv: Iterable[str]) -> int:
    readme = README.read_text()
    wanted = with_tables(readme)
    if "--check" in argv:
        return int(wanted != readme)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
