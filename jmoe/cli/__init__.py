"""The command line: ``jmoe demo | inspect | run | bench``, one file a command.

Exit status: 0 done; 1 a check failed; 2 wrong use, said in one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from ..gguf_file import DenseFallbackWarning, GgufError
from . import bench, demo, inspect, run
from ._common import UsageError, own_version

COMMANDS = (demo, inspect, run, bench)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first: the one line that matters is what was wrong.
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jmoe", description="Packed Mixture-of-Experts layers of GGUF files, computed by JAX.")
    parser.add_argument("--version", action="version", version=f"jmoe {own_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        summary = module.SUMMARY
        sub = commands.add_parser(module.NAME, help=summary[0].lower() + summary[1:], description=summary + ".")
        module.add_arguments(sub)
        sub.set_defaults(execute=module.execute)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        # A path need not be text, nor the terminal speak Unicode.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", DenseFallbackWarning)
        try:
            args = build_parser().parse_args(argv)
            status = args.execute(args)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            # `jmoe inspect FILE | head`: the reader has what it wanted. Python flushes stdout once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (UsageError, GgufError, OSError) as error:
            print(f"jmoe: error: {_one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130


def _one_line(message: object) -> str:
    if isinstance(message, OSError) and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"
    # A file's own words must not steer the terminal.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(message).splitlines()))


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"jmoe: {category.__name__}: {_one_line(message)}", file=sys.stderr)
