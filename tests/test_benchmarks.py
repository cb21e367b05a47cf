"""The benchmark programs measure what passes its check, refuse what does not, and write what the README reads."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = {"shape", "tokens", "gate", "down", "x_dtype", "precision", "us_per_layer", "kernel_us", "floor_us", "nmse"}
ROW |= {"max_over_rms", "backend", "xla_flags", "commit", "jax"}


# The programs run this checkout's jmoe, which has the CPU kernels where they were built in place.
KERNELS = ["cpu"] if any((ROOT / "jmoe" / "cpu_kernels").glob("_kernels*.so")) else []


# Runs a program with given ceilings: measuring them takes some 10 s, and the first test below does.
GIVEN_CEILINGS = """
import runpy, sys
sys.path.insert(0, "benchmarks")
import ceilings
ceilings.measure = lambda: ceilings.Ceilings(1e10, 1e11, 1e10, 1e11)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def benchmark(*args: str, xla_flags: str = "") -> subprocess.CompletedProcess[str]:
    # Tables name flags, so those of the tests' own process stay out.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_rows_have_their_keys_and_hold_what_passed_its_check(tmp_path):
    command = ["benchmarks/run.py", "--shapes", "tiny", "--rounds", "1", "--seconds", "0.01", "--tokens", "1", "3"]
    done = benchmark(*command, "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert path.stem == results["device"]
    assert all(set(row) == ROW for row in results["rows"])
    ours = [row for row in results["rows"] if not row["backend"].startswith("llama.cpp")]
    contenders = [*KERNELS, "jnp", "naive"]
    assert [(row["backend"], row["tokens"]) for row in ours] == [
        (name, tokens) for tokens in (1, 3) for name in contenders
    ]
    assert all(row["us_per_layer"] > 0 for row in ours)
    assert all(row["nmse"] <= (1e-7 if row["backend"] == "cpu" else 1e-10) for row in ours)


@pytest.mark.slow
def test_gpu_rows_are_written_where_there_is_no_gpu_too(tmp_path):
    command = ["benchmarks/gpu.py", "--shapes", "tiny", "--tokens", "2", "--rivals", "--results", str(tmp_path)]
    done = benchmark("-c", GIVEN_CEILINGS, *command)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    (row,) = json.loads(path.read_text())["rows"]
    assert set(row) == ROW | {"compile_s", "layers", "ragged_dot_us", "sustained_us_per_layer"}
    assert row["nmse"] <= 6e-5
    assert (row["backend"], row["kernel_us"]) == ([*KERNELS, "jnp"][0], {})


def test_one_wrong_token_among_many_is_found(rng, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    exact = rng.standard_normal((4096, 64))
    exact[7] *= 100  # an outlier, whose rms hides the others' errors
    y = exact * (1 + 1e-3 * rng.standard_normal(exact.shape))
    bound = gpu.selfcheck.Errors(6e-5, 5e-2)
    assert gpu.worst_token(y, exact).within(bound)
    y[9] = 0
    assert not gpu.worst_token(y, exact).within(bound)
    y[9] = float("nan")
    assert not gpu.worst_token(y, exact).within(bound)


def test_a_second_run_replaces_its_own_rows_and_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = importlib.import_module("report")
    report.write("device", [{"tokens": 1, "us": 5}, {"tokens": 2, "us": 6}], ["tokens"], tmp_path)
    path = report.write("device", [{"tokens": 2, "us": 7}, {"tokens": 3, "us": 8}], ["tokens"], tmp_path, about="it")
    written = json.loads(path.read_text())
    assert [(row["tokens"], row["us"]) for row in written["rows"]] == [(1, 5), (2, 7), (3, 8)]
    assert (written["device"], written["about"]) == ("device", "it")


@pytest.mark.slow
def test_vmap_is_timed_beside_the_same_bits_in_one_flat_call(tmp_path, monkeypatch):
    command = ["benchmarks/vmap.py", "--shape", "tiny", "--members", "2", "--tokens", "3", "--rounds", "1"]
    done = benchmark(*command, "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert [(row["mapped"], row["members"], row["tokens"]) for row in results["rows"]] == [
        ("tokens", 2, 3),
        ("population", 2, 3),
    ]
    assert all(row["us"] > 0 and row["flat_us"] > 0 for row in results["rows"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = "\n".join(importlib.import_module("readme_table")._vmap(results))
    assert "| tiny | population | 2 | 3 | bfloat16 |" in table


@pytest.mark.slow
def test_layers_over_devices_are_timed_where_they_give_what_one_gives(tmp_path, monkeypatch):
    command = ["benchmarks/parallel.py", "--shape", "tiny", "--devices", "1", "4", "--tokens", "1", "8"]
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    done = benchmark(*command, "--rounds", "1", "--results", str(tmp_path), xla_flags=flags)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    # One token does not divide over four devices.
    ways = [(row["devices"], row["tokens"], row["way"], row["exchange"]) for row in results["rows"]]
    both = [(1, t, way, exchange) for t in (1, 8) for way, exchange in (("replicated", ""), ("split", "dense"))]
    assert ways == [*both, (4, 1, "replicated", ""), (4, 8, "replicated", ""), (4, 8, "split", "dense")]
    assert all(row["us"] > 0 and row["nmse"] <= 6e-5 for row in results["rows"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = "\n".join(importlib.import_module("readme_table")._parallel(results))
    assert "| split dense | 4 | 8 | bfloat16 |" in table
    assert [line.split("|")[7].strip() != "" for line in table.splitlines()[4:]] == [True] * len(ways)


def test_the_modelled_costs_of_the_readme_are_those_of_the_formula(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    program = importlib.import_module("parallel")
    model = program.MODELS["deepseek-v3"]
    assert "\n".join(program.cost_table(model)) in (ROOT / "README.md").read_text()
    # All experts of one device: a token travels nowhere; with as many devices as experts, to each of its K.
    assert program.costs(model, 1, 64)[2:] == (0, 0, 0)
    a_token = 2 * 7168 + 8 * 8 + 4 * 7168
    many = program.costs(model, 256, 256)
    assert many.ragged == pytest.approx(255 * 8 / 256 * a_token)
    assert many.held == pytest.approx(program.costs(model, 1, 1).held / 256)


@pytest.mark.slow
def test_routing_is_timed_by_both_ways_of_choosing(tmp_path, monkeypatch):
    """What `route` never counts is not counted; it is `lax.top_k` there."""
    command = ["benchmarks/routing.py", "--experts", "16", "--tokens", "1", "3", "65537", "--rounds", "1"]
    done = benchmark(*command, "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert [row["tokens"] for row in results["rows"]] == [1, 3, 65537] * 2
    for row in results["rows"]:
        assert row["us"] > 0
        assert row["top_k_us"] > 0
        assert row["rank_us"] is None if row["tokens"] == 65537 else row["rank_us"] > 0
    assert results["rows"][2]["us"] == results["rows"][2]["top_k_us"]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = "\n".join(importlib.import_module("readme_table")._routing(results))
    assert "| softmax | 16 | 8 | 3 |" in table
    [many] = [line for line in table.splitlines() if line.startswith("| softmax | 16 | 8 | 65537 |")]
    assert many.split(" | ")[5] == ""


def test_a_wrong_output_is_refused(tmp_path):
    wrong = """
import jmoe
right = jmoe.moe_forward
jmoe.moe_forward = lambda *args, **options: right(*args, **options) * 1.01
"""
    command = ["benchmarks/run.py", "--shapes", "tiny", "--tokens", "1", "--rounds", "1", "--seconds", "0.01"]
    done = benchmark("-c", wrong + GIVEN_CEILINGS, *command, "--results", str(tmp_path))
    assert done.returncode == 1
    (path,) = tmp_path.iterdir()
    timed = {row["backend"] for row in json.loads(path.read_text())["rows"]}
    for backend in (*KERNELS, "jnp"):
        assert f"REFUSED {backend} at 1 tokens" in done.stderr
        assert backend not in timed


def test_load_measures_rate_memory_and_plane_bytes(tmp_path):
    command = ["benchmarks/load.py", "--shape", "tiny", "--formats", "q4_k", "mxfp4", "--repeats", "2"]
    done = benchmark(*command, "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    rows = {row["format"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["q4_k"]["planes_over_file"] == round(4.625 / 4.5, 4)
    assert rows["mxfp4"]["planes_over_file"] == 1.0
    assert all(row["gb_per_s"] > 0 and row["file_bytes"] > 0 for row in rows.values())
    assert all(0.1 < row["cpu_over_mapped"] < 10 for row in rows.values())
