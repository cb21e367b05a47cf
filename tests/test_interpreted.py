"""Roles, rings and schedules of the kernels, by Pallas' GPU interpreter with its race detection (interpreted.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import pallas_kernels

pytestmark = pytest.mark.skipif(
    not pallas_kernels.MIN_JAX <= jax.__version_info__ < pallas_kernels.BELOW_JAX,
    reason="the kernels need another jax",
)
TESTS = Path(__file__).parent
FEW = ["by depth", "by rows", "formats differ", "no gate"]
MANY = ["h, x by parts", "h, x by chunks", "y, two terms and widths", "y, two products"]


def first_always(cases: list[str]) -> list:
    return [cases[0], *(pytest.param(case, marks=pytest.mark.slow) for case in cases[1:])]


def interpreted(program: str, *arguments: str) -> str:
    """The program's last word, once its output was right. A kernel that waits for ever is a failure."""
    # jax's CPU needs a thread for each of the kernel's that waits.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "16", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / program), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("case", first_always(FEW))
def test_few_tokens_read_each_stage_whole_and_between_its_copies(case: str) -> None:
    assert interpreted("interpreted_few.py", case) == "no races"


@pytest.mark.parametrize("case", first_always(MANY))
def test_many_tokens_read_each_stage_whole_and_between_its_copies(case: str) -> None:
    assert interpreted("interpreted_many.py", case) == "no races"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "case", "fault"),
    [
        ("interpreted_few.py", FEW[0], "h is not waited for"),
        ("interpreted_few.py", FEW[0], "stages are free before they are read"),
        ("interpreted_many.py", MANY[0], "stages of x are free while they are multiplied"),
    ],
)
def test_a_fault_is_found(program: str, case: str, fault: str) -> None:
    assert interpreted(program, case, fault) == "races"
