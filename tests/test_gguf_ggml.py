"""ggml's own reader, gguf_init_from_file, opens every file that jmoe's opens, and finds the same tensors in it.

Slow, and needs llama-cpp-python (``pip install '.[test,bench]'``) for ggml; it runs in a process of its own, for it may
abort. What jmoe refuses beyond ggml is listed below: each class with its reason.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from test_gguf_fuzz import BATCH, CASE, CASES, changed, result_or_error

from jmoe.gguf_file import GgufError, GgufFile

# Words of jmoe's error -> why jmoe refuses what ggml opens.
STRICTER = {
    "incomplete download": "ggml's header says nothing of the file's size; llama.cpp compares them later",
    "is not UTF-8": "names are text; ggml takes any bytes",
    "NUL byte": "ggml would find the first of two names that differ behind a NUL",
    "has 0 dimensions": "ggml reads a scalar; no writer makes one",
    "wanted dimensions from 1 on": "a tensor without weights",
    "general.alignment is": "over 1 MiB",
    "unknown or was removed": "a type that ggml knows and the gguf package does not yet (Q2_0)",
    "siblings cannot be found": "a shard alone; llama.cpp looks for the others too",
    "must be an integer from 0 on": "split.count that is no count",
}

CHILD = """
import ctypes, json, sys

class Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

ggml = ctypes.CDLL(sys.argv[1])
ggml.gguf_init_from_file.restype, ggml.gguf_init_from_file.argtypes = ctypes.c_void_p, (ctypes.c_char_p, Params)
ggml.gguf_free.argtypes = (ctypes.c_void_p,)
for name, result in (("n_tensors", ctypes.c_int64), ("data_offset", ctypes.c_size_t)):
    function = getattr(ggml, "gguf_get_" + name)
    function.restype, function.argtypes = result, (ctypes.c_void_p,)
of_tensor = {"name": ctypes.c_char_p, "type": ctypes.c_int, "offset": ctypes.c_size_t, "size": ctypes.c_size_t}
for name, result in of_tensor.items():
    function = getattr(ggml, "gguf_get_tensor_" + name)
    function.restype, function.argtypes = result, (ctypes.c_void_p, ctypes.c_int64)
silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
ggml.ggml_log_set(silent, None)

for line in sys.stdin:
    context = ggml.gguf_init_from_file(line.rstrip().encode(), Params(True, None))
    tensors = None
    if context:
        start = ggml.gguf_get_data_offset(context)
        tensors = [
            (
                ggml.gguf_get_tensor_name(context, i).decode(errors="replace"),
                ggml.gguf_get_tensor_type(context, i),
                start + ggml.gguf_get_tensor_offset(context, i),
                ggml.gguf_get_tensor_size(context, i),
            )
            for i in range(ggml.gguf_get_n_tensors(context))
        ]
        ggml.gguf_free(context)
    print(json.dumps(tensors), flush=True)
"""


class Ggml:
    """A process that opens files with ggml, started again where ggml ends it."""

    def __init__(self, library: Path):
        self._command = [sys.executable, "-c", CHILD, str(library)]
        self._child: Any = None

    def tensors(self, path: Path) -> Any:
        """[name, type, offset in the file, bytes] of each tensor; None where ggml refuses; "aborted" where it ends."""
        if self._child is None:
            self._child = subprocess.Popen(self._command, stdin=-1, stdout=-1, text=True)
        self._child.stdin.write(f"{path}\n")
        self._child.stdin.flush()
        if answer := self._child.stdout.readline():
            return json.loads(answer)
        self.close()
        return "aborted"

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.communicate()


@pytest.fixture
def ggml():
    packages = importlib.metadata.distributions(name="llama-cpp-python")
    found = [lib for p in packages for lib in Path(str(p.locate_file("llama_cpp/lib"))).glob("libggml-base.*")]
    if not found:
        pytest.skip("needs llama-cpp-python: pip install '.[bench]'")
    reader = Ggml(found[0])
    yield reader
    reader.close()


@pytest.mark.slow
def test_jmoe_opens_what_ggml_opens_and_nothing_that_it_refuses(ggml, tmp_path):
    path, outcomes = tmp_path / "changed.gguf", collections.Counter[str]()

    def compare(raw: bytes) -> None:
        path.write_bytes(raw)
        theirs, ours = ggml.tensors(path), result_or_error(lambda: GgufFile(path))
        if isinstance(ours, GgufError):
            classes = [words for words in STRICTER if re.search(words, str(ours))]
            assert theirs is None or theirs == "aborted" or classes, ours
            outcomes["both refuse" if not isinstance(theirs, list) else f"jmoe alone refuses: {classes[0]}"] += 1
            return
        with ours:
            # Up to a NUL, as ggml holds names.
            mine = [[t.name.partition("\0")[0], t.ggml_type, t.offset, t.nbytes] for t in ours.tensors.values()]
        assert theirs == mine
        outcomes["both open"] += 1

    for batch in range(-(-CASES // BATCH)):
        settings = hypothesis.settings(
            max_examples=BATCH, derandomize=False, suppress_health_check=[hypothesis.HealthCheck.too_slow]
        )
        # Other seeds than the fuzz test's.
        given = hypothesis.seed(10_000 + batch)(settings(hypothesis.given(CASE)(lambda case: compare(changed(*case)))))
        given()
    # One byte of a header, everywhere; and the end.
    whole = changed(1, [], [])
    for at in range(2000):
        compare(whole[:at])
        for value in {0, 9, 42, 128, 255, whole[at] ^ 1} - {whole[at]}:
            compare(whole[:at] + bytes([value]) + whole[at + 1 :])
    print(f"\n{sum(outcomes.values())} files: {dict(outcomes.most_common())}")
    assert min(outcomes["both open"], outcomes["both refuse"]) > CASES // 10
