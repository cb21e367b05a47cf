"""Time moe_forward on this machine and write results/<device>.json: on a GPU as gpu.py does, else as cpu.py does.

`python benchmarks/run.py [--shapes ...] [--tokens ...]`; `--help` names what that program takes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax


def main(argv: Sequence[str] | None = None) -> int:
    if jax.default_backend() == "gpu":
        import gpu as program
    else:
        import cpu as program
    return program.main(argv)


if __name__ == "__main__":
    sys.exit(main())
