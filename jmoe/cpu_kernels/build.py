"""Compiles the kernels: setuptools runs this (pyproject.toml) without importing jmoe. Optional, hence never fatal."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# What a source may use beyond its architecture's baseline: it runs only where the processor has it. On other
# architectures the source is empty.
FLAGS_OF = {
    "avx2.cc": ("x86_64", ("-mavx2", "-mfma", "-mf16c")),
    "avx512vnni.cc": (
        "x86_64",
        ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"),
    ),
    "neon.cc": ("arm64", ("-march=armv8.2-a+dotprod",)),
}


def include_dir() -> str:
    """The folder of XLA's FFI headers, as jax.ffi.include_dir() names it: found without importing jaxlib."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        raise CompileError("jaxlib is not here, which has the headers of XLA's FFI")
    return str(Path(spec.origin).parent / "include")


def flags_of(source: str, platform: str) -> list[str]:
    """Those of one source for a platform such as ``linux-x86_64``, ``linux-aarch64`` or ``macosx-11.0-universal2``."""
    architecture, flags = FLAGS_OF.get(Path(source).name, ("", ()))
    if platform.startswith("macosx"):
        # One call may compile for both of Apple's architectures.
        return [word for flag in flags for word in (f"-Xarch_{architecture}", flag)]
    built_for = platform.rpartition("-")[2].replace("aarch64", "arm64")
    return list(flags) if architecture == built_for else []


class BuildKernels(build_ext):
    """Like build_ext, but each source has its own flags."""

    def build_extension(self, ext: Extension) -> None:
        path = self.get_ext_fullpath(ext.name)
        if not (self.force or newer_group([*ext.sources, *ext.depends], path)):
            return
        objects = []
        for source in ext.sources:
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=[include_dir()],
                extra_postargs=[*FLAGS, *flags_of(source, self.plat_name)],
                depends=ext.depends,
            )
        self.compiler.link_shared_object(
            objects, path, target_lang="c++", extra_postargs=["-pthread"] if sys.platform == "linux" else []
        )
