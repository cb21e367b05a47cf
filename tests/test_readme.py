"""What the README says is so: its commands, quickstart, tables and links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tolerances

import metal_bridge
from jmoe import FORMATS
from jmoe.cli import COMMANDS
from jmoe.formats import LAYOUTS
from jmoe.gguf_file.architectures import architectures

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README has no section {title!r}"
    return found[1]


def code(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section(title), re.MULTILINE | re.DOTALL)


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table's body."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def python(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)


def test_the_two_commands_stand_where_ci_looks_for_them():
    assert code("Install and run", "bash") == [
        "pip install . && python -m jmoe demo\npip install '.[test]' && pytest\n"
    ]


def test_quickstart_runs_and_has_at_most_15_lines():
    (program,) = code("Quickstart", "python")
    assert len(program.strip().splitlines()) <= 15
    done = python("-W", "error", "-c", program)
    assert (done.returncode, done.stderr) == (0, "")
    assert "(5, 256) float32" in done.stdout
    assert "Choice(name=" in done.stdout


def test_commands_are_those_of_the_program():
    assert [cells[0].strip("`").split()[0] for cells in rows(section("Quickstart"))] == [c.NAME for c in COMMANDS]


def test_format_table_is_that_of_the_formats():
    table = {cells[0].strip("`"): cells[1:] for cells in rows(section("Formats"))}
    assert list(table) == list(FORMATS)
    for name, (weights, in_file, in_planes, formula) in table.items():
        spec = FORMATS[name]
        assert int(weights) == spec.block_weights
        assert float(in_file) == 8 * spec.block_bytes / spec.block_weights
        shape = (1, 256)
        nbytes = sum(p.size * p.dtype.itemsize for p in spec.plane_specs(shape))
        assert float(in_planes) == 8 * nbytes / 256
        assert float(in_planes) <= tolerances.PLANE_BYTES * float(in_file)
        # The format's own file opens with the same formula.
        assert formula.strip("`") in (sys.modules[spec.split.__module__].__doc__ or "")


def test_apple_table_is_that_of_the_conversion():
    bits = lambda spec: 8 * sum(p.size * p.dtype.itemsize for p in spec.plane_specs((1, 256))) / 256  # noqa: E731
    table = {row[0].strip("`"): row[1:] for row in rows(section("Apple GPUs").split("| what |")[0])}
    assert list(table) == list(FORMATS)
    for name, (becomes, before, after) in table.items():
        converted = f"mlx{metal_bridge.BITS[name]}" if name in metal_bridge.BITS else name
        assert becomes.strip("`") == ("stays" if converted == name else converted)
        assert (float(before), float(after)) == (bits(LAYOUTS[name]), bits(LAYOUTS[converted]))


def test_contract_is_what_the_tests_hold_the_backends_to():
    (first, second) = rows(section("Numerics"))
    show = "{0.nmse:.0e}, {0.max_over_rms:.0e}".format
    for cells, name in ((first, "float32"), (second, "bfloat16")):
        # 1e-10, 1e-04 is written 1e-10, 1e-4.
        assert cells[1] == re.sub(r"e-0", "e-", show(tolerances.LAYER[name]))
    assert first[2] == re.sub(r"e-0", "e-", show(tolerances.KERNEL_F32))
    assert re.sub(r"e-0", "e-", show(tolerances.HIGHEST_ON_GPU)) in first[3]


def test_table_of_routers_is_that_of_the_architectures():
    table = {row[0].strip("`"): row[1:] for row in rows(section("What the file does not say"))}
    assert list(table) == list(architectures())
    words = {True: "yes", False: "no", "key": "key", "gated": "sigmoid-gated", "required": "yes"}
    for name, (gating, normalise, scale, shared, notes) in table.items():
        entry = architectures()[name]
        assert gating == entry.gating
        assert normalise == words[entry.normalise]
        assert (scale or "none", shared or "none") == (entry.scale, words.get(entry.shared, entry.shared))
        assert (entry.activation == "silu") or f"`{entry.activation}`" in notes
        assert ("`exp_probs_b`" in notes) >= entry.selection_bias


def test_measured_tables_are_those_of_the_results():
    done = python("benchmarks/readme_table.py", "--check")
    assert done.returncode == 0, f"run `python benchmarks/readme_table.py`\n{done.stderr}"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_local_links_exist(link):
    assert link.startswith("https://") or (ROOT / link).exists()


def test_it_names_no_place_of_the_machine_it_was_written_on():
    assert not re.search(r"/(home|root|work|tmp|Users)/|localhost|127\.0\.0\.1", README)
