"""The CPU kernels without Python around them: under address and undefined-behaviour sanitizers, and as NEON code."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import cases
import numpy as np
import oracle
import pytest
import tolerances

from jmoe import Activation, cpu_kernels
from jmoe.activations import sigmoid_gate

pytestmark = pytest.mark.slow

SOURCES = Path(cpu_kernels.__file__).parent
DRIVER = Path(__file__).parent / "cpu_kernels_driver.cc"
# Line numbers, for what a sanitizer reports: all of -g takes a third longer to compile.
BASE = ("-std=c++17", "-O1", "-g1", "-ffp-contract=fast", "-pthread", f"-I{SOURCES}")
X86 = {
    "avx2.cc": ("-mavx2", "-mfma", "-mf16c"),
    "avx512vnni.cc": (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512vnni",
        "-mavx2",
        "-mfma",
        "-mf16c",
    ),
}
ARM = {"neon.cc": ("-march=armv8.2-a+dotprod",)}


def compile_driver(compiler: str, folder: Path, own_flags: dict[str, tuple[str, ...]], *flags: str) -> Path:
    objects = []
    for source in (DRIVER, *(SOURCES / name for name in ("layouts.cc", "portable.cc", *own_flags))):
        target = folder / f"{source.stem}.o"
        subprocess.run(
            [compiler, *BASE, *flags, *own_flags.get(source.name, ()), "-c", source, "-o", target], check=True
        )
        objects.append(target)
    program = folder / "driver"
    subprocess.run([compiler, *flags, "-pthread", *objects, "-o", program], check=True)
    return program


def check(command: list[str | Path], isa: str, folder: Path) -> None:
    """All formats and ragged mixes, exact and not, for one token and for many, in one run of the driver; then the
    activations, with biases and scales."""
    rng, expected = np.random.default_rng(9), {}
    silu = Activation("silu")
    others = (*map(Activation, ("gelu_tanh", "swiglu_oai", "relu2")), Activation("swiglu_clamped", 1.5))
    plain = [(name, silu) for name in (*cpu_kernels.FORMATS, "ragged", "mixed", "gemma-like")]
    for name, activation in (*plain, *(("gemma-like", activation) for activation in others)):
        case, leaves, gated = cases.CASES[name], {}, activation.gated
        stack, layer = cases.random_stack(case), cases.oracle_layer(case, decoded=True)
        if activation != silu:
            leaves = cases.random_leaves(case, gated=gated)
            layer = replace(layer, **leaves) if gated else replace(layer, gate=None, **leaves)
        projections = cases.PROJECTIONS if gated else cases.PROJECTIONS[1:]
        for tokens, exact in ((1, 0), (7, 1), (150, 0)):
            x = np.asarray(cases.random_inputs(rng, tokens, case.hidden_size))
            ids, weights = cases.random_routing(rng, tokens, case)
            ids[0, 0] = case.num_experts
            on_input = bool(leaves)
            sizes = (tokens, case.hidden_size, case.expert_intermediate, case.num_experts, case.top_k, exact)
            formats = [cpu_kernels.FORMATS.index(case.format(projection)) for projection in projections]
            header = np.array([*sizes, on_input, bool(leaves), *([] if gated else [-1]), *formats], np.int64)
            gate = sigmoid_gate(activation)
            numbers = np.array([*gate[:3], np.inf if gate.limit is None else gate.limit], np.float32)
            planes = (plane for projection in projections for plane in getattr(stack, projection).planes)
            parts = (header, numbers, x, ids, weights, *map(np.asarray, planes), *leaves.values())
            path = folder / f"{isa}-{name}-{activation.name}-{tokens}"
            path.write_bytes(b"".join(part.tobytes() for part in parts))
            of = {"limit": activation.limit, "weight_on": "input" if on_input else "output"}
            expected[path] = oracle.moe(layer, x, ids, weights, activation.name, **of), exact
    done = subprocess.run([*command, isa, *expected], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for path, (y, exact) in expected.items():
        got = np.fromfile(f"{path}.y", np.float32).reshape(y.shape)
        oracle.assert_within(got, y, tolerances.LAYER["float32"] if exact else tolerances.KERNEL_F32)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
def test_sanitizers_find_nothing(tmp_path):
    program = compile_driver(
        os.environ.get("CXX", "c++"), tmp_path, X86, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    )
    flags = set(Path("/proc/cpuinfo").read_text().split())
    vnni = {"avx512_vnni", "avx512bw", "avx512vl"}
    sets = {"portable": set(), "avx2": {"avx2", "fma", "f16c"}, "avx512vnni": vnni, "avx512vnni-halved": vnni}
    for isa, needed in sets.items():
        if needed <= flags:
            check([program], isa, tmp_path)


@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64",
)
def test_neon_meets_the_contract_in_an_emulator(tmp_path):
    program = compile_driver("aarch64-linux-gnu-g++", tmp_path, ARM, "-static")
    for isa in ("neon", "portable"):
        check(["qemu-aarch64", program], isa, tmp_path)
