"""How fast a layer loads, and with how much memory: write results/load-<device>.json.

    python benchmarks/load.py [--formats ...] [--shape ...]

For each format a GGUF file with one random layer is written, read once (so that the page cache is warm), and loaded
by a fresh process: the rate is the file bytes of the layer over the median wall time of `open_and_load`, the extra
memory is the process's peak resident size after the first load, less what it was before, less the planes themselves.
What reading costs against mapping: every other load takes its bytes from a memory map, without a copy of its own, as
no loader of files that may change should. Compared is processor time, the least of each: other work on the machine
disturbs it little.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

# This checkout's jmoe, installed or not: the rows name its commit.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gguf
import jax
import numpy as np
import report

from jmoe import FORMATS, ExpertStack, GgufFile
from jmoe.gguf_file import planes
from jmoe.gguf_file.names import Source
from jmoe.synthetic import MODELS, ModelShape, layer_blocks

KEYS = ("shape", "format")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--shape", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the results")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        print(json.dumps(_measure(args.measure, args.repeats)))
        return 0
    rows = []
    for name in args.formats:
        model = MODELS[args.shape]._replace(gate=name, down=name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.gguf"
            largest = write_layer(path, model)
            measured = _in_fresh_process(path, args.repeats)
        rows.append(_row(args.shape, name, measured, largest))
        print(_as_text(rows[-1]), flush=True)
    print(report.write(f"load-{report.device_name()}", rows, KEYS, args.results))
    return 0


def write_layer(path: Path, model: ModelShape) -> int:
    """A GGUF file of one layer; returns the bytes of its largest tensor."""
    blocks = layer_blocks(np.random.default_rng(0), model)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for kind, name, data in zip(("gate", "up", "down"), (model.gate, model.gate, model.down), blocks, strict=True):
        writer.add_tensor(f"blk.0.ffn_{kind}_exps.weight", data, raw_dtype=FORMATS[name].ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return max(data.nbytes for data in blocks)


def _in_fresh_process(path: Path, repeats: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(path), "--repeats", str(repeats)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _measure(path: Path, repeats: int) -> dict[str, Any]:
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    # What jax itself takes belongs to the baseline.
    jax.block_until_ready(jax.device_put(np.zeros(1 << 10, np.uint8)))
    before = _peak_bytes()
    seconds, cpu, mapped_cpu, peak, plane_bytes = [], [], [], 0, 0
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        stack = jax.block_until_ready(ExpertStack.open_and_load(path, 0))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
        peak = peak or _peak_bytes()
        plane_bytes = stack.nbytes
        del stack
        with mock.patch.object(planes, "_read_rows", _mapped_rows(path)):
            cpu_start = time.process_time()
            jax.block_until_ready(ExpertStack.open_and_load(path, 0))
            mapped_cpu.append(time.process_time() - cpu_start)
    return {
        "seconds": seconds,
        "cpu_over_mapped": min(cpu) / min(mapped_cpu),
        "peak_bytes": peak - before,
        "plane_bytes": plane_bytes,
    }


def _mapped_rows(path: Path) -> Callable[[GgufFile, Source, slice, slice], np.ndarray]:
    """The loader's ``_read_rows`` of stacked tensors over a memory map of the file, made anew for each load."""
    whole = np.memmap(path, np.uint8, "r")

    def read_rows(gguf: GgufFile, source: Source, experts: slice, rows: slice) -> np.ndarray:
        name, first = source.locate(experts.start, rows.start)
        info, shape = gguf.info(name), (experts.stop - experts.start, rows.stop - rows.start)
        start, count = info.offset + first * info.row_bytes, shape[0] * shape[1] * info.row_bytes
        return np.asarray(whole[start : start + count]).reshape(*shape, info.row_bytes)

    return read_rows


def _peak_bytes() -> int:
    # Linux hands ru_maxrss of a parent down to its child, and the parent held the blocks; VmHWM starts anew.
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _row(shape: str, name: str, measured: dict[str, Any], largest: int) -> dict[str, Any]:
    model = MODELS[shape]
    weights = 3 * model.num_experts * model.hidden_size * model.expert_intermediate
    file_bytes = weights // FORMATS[name].block_weights * FORMATS[name].block_bytes
    seconds = sorted(measured["seconds"])
    return {
        "shape": shape,
        "format": name,
        "file_bytes": file_bytes,
        "plane_bytes": measured["plane_bytes"],
        "planes_over_file": round(measured["plane_bytes"] / file_bytes, 4),
        "gb_per_s": round(file_bytes / 1e9 / seconds[len(seconds) // 2], 3),
        "cpu_over_mapped": round(measured["cpu_over_mapped"], 3),
        "first_gb_per_s": round(file_bytes / 1e9 / measured["seconds"][0], 3),
        "extra_bytes": measured["peak_bytes"] - measured["plane_bytes"],
        "extra_over_largest_tensor": round((measured["peak_bytes"] - measured["plane_bytes"]) / largest, 3),
        **report.origin(),
    }


def _as_text(row: dict[str, Any]) -> str:
    return (
        f"{row['format']:6} {row['gb_per_s']:6.2f} GB/s  processor time / mapped {row['cpu_over_mapped']:.2f}"
        f"  planes / file {row['planes_over_file']:.4f}  extra memory {row['extra_bytes'] / 1e6:7.1f} MB,"
        f" {row['extra_over_largest_tensor']:.2f} of a tensor"
    )


if __name__ == "__main__":
    sys.exit(main())
