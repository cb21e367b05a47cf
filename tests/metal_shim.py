"""Runs a launch of a Metal kernel body on the CPU, compiled as C++ behind metal_shim.h."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from metal_bridge.gemv import Launch

SHIM = Path(__file__).parent / "metal_shim.h"
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
TYPES = {"uint8": "uint8_t", "int8": "int8_t", "uint16": "uint16_t", "uint32": "uint32_t", "int32": "int32_t"}

needs_compiler = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux",
    reason="the shim needs a C++ compiler and Linux; a Mac runs the kernels",
)


def program(how: Launch, inputs: Sequence[np.ndarray]) -> str:
    """C++ that reads the inputs from stdin, runs every simdgroup of the launch and writes the output to stdout."""
    named = list(zip(how.input_names, inputs, strict=True))
    kinds = {name: TYPES.get(array.dtype.name, "float") for name, array in named}
    size = how.output_shape[0] * how.output_shape[1]
    return "\n".join(
        [
            f'#include "{SHIM}"',
            *(f"constexpr int {name} = {value};" for name, value in how.template),
            *(f"static Buffer<{kind}> {name};" for name, kind in kinds.items()),
            f'static Buffer<float> out{{"out", std::vector<float>({size}, -1e30f)}};',
            "void body(uint3 thread_position_in_grid, uint thread_index_in_simdgroup) {",
            how.source,
            "}",
            "int main() {",
            *(f'{name} = read<{kinds[name]}>("{name}", {array.size});' for name, array in named),
            f"for (uint y = 0; y < {how.grid[1]}; ++y)",
            f"for (uint x = 0; x < {how.grid[0]}; x += LANES) run_simdgroup(x, y);",
            f"return std::fwrite(out.data.data(), 4, {size}, stdout) != {size};",
            "}",
        ]
    )


def run_launch(how: Launch, inputs: Sequence[np.ndarray], folder: Path) -> np.ndarray:
    source, binary = folder / "kernel.cpp", folder / "kernel"
    source.write_text(program(how, inputs))
    subprocess.run([str(COMPILER), "-std=c++17", "-O1", str(source), "-o", str(binary)], check=True)
    done = subprocess.run([binary], input=b"".join(array.tobytes() for array in inputs), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.float32).reshape(how.output_shape)
