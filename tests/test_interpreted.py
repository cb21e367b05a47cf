"""Roles, rings and schedule of the kernel for few tokens, by Pallas' GPU interpreter with its race detection."""

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
PROGRAM = Path(__file__).with_name("interpreted_kernel.py")


def interpreted(*arguments: str) -> str:
    """The program's last word; a kernel that waits for ever is a failure."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "16", "PYTHONPATH": str(PROGRAM.parents[1])}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("case", ["by depth", "by rows", "formats differ", "no gate"])
def test_each_stage_is_read_whole_and_between_its_copies(case: str) -> None:
    assert interpreted(case) == "no races"


@pytest.mark.parametrize("fault", ["h is not waited for", "stages are free before they are read"])
def test_a_fault_is_found(fault: str) -> None:
    assert interpreted("by depth", fault) == "races"
