"""GgufFile against the operating system: paths, special files, shards, changing files, threads, descriptors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf_builder as b
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from jmoe.gguf_file import GgufError, GgufFile

DATA = Path(__file__).parent / "data"
REAL = DATA / "qwen3moe-Q4_K_M.gguf"


@pytest.fixture
def small(tmp_path, rng) -> Path:
    """A file of two tensors."""
    tensors = {"a": b.random_tensor(rng, T.Q8_0, (6, 2, 64)), "b": b.random_tensor(rng, T.F32, (40,))}
    return b.write(tmp_path / "small.gguf", b.good_file(tensors))


def test_tensors_read_whole_and_by_leading_rows(small):
    with GgufFile.open(small) as file:
        whole = file.read("a")
        assert (whole.shape, whole.dtype) == ((6, 2, 68), np.uint8)
        np.testing.assert_array_equal(file.read_rows("a", 2, 5), whole[2:5])
        assert file.read_rows("a", 3, 3).shape == (0, 2, 68)
        assert file.read("b").shape == (160,)
        assert whole.flags.writeable
        assert whole.flags.owndata


@pytest.mark.parametrize(("name", "start", "stop"), [("a", 0, 7), ("a", -1, 2), ("a", 4, 3), ("b", 0, 1), ("c", 0, 1)])
def test_rows_that_are_not_there_are_refused(small, name, start, stop):
    with GgufFile(small) as file, pytest.raises(GgufError, match=f"'{name}'"):
        file.read_rows(name, start, stop)


def test_reading_a_closed_file_is_refused_even_when_its_descriptor_number_is_in_use_again(small):
    file = GgufFile(small)
    file.close()
    file.close()
    assert file.closed
    with open(REAL, "rb"):
        for use in (lambda: file.read("a"), file.check_unchanged):
            with pytest.raises(ValueError, match="closed"):
                use()


def test_a_forgotten_file_closes_itself(small):
    before = b.open_descriptors()
    file = GgufFile(small)
    assert b.open_descriptors() == before + 1
    del file
    assert b.open_descriptors() == before


def test_the_operating_systems_own_errors_pass_unchanged(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = b.open_descriptors()
    for path, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "missing.gguf", FileNotFoundError),
        (tmp_path / "loop", OSError),
        (tmp_path / ("x" * 5000), OSError),
    ):
        with pytest.raises(error) as caught:
            GgufFile(path)
        assert not isinstance(caught.value, GgufError)
        assert caught.value.errno
    assert b.open_descriptors() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_a_permission_error(small):
    small.chmod(0)
    with pytest.raises(PermissionError):
        GgufFile(small)


@pytest.mark.parametrize(("path", "error"), [("a\0b", ValueError), (None, TypeError), (1.5, TypeError), (3, TypeError)])
def test_what_is_no_path_is_refused_as_open_refuses_it(path, error):
    with pytest.raises(error):
        GgufFile(path)


def test_special_files_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # A socket's path may be no longer than 100 bytes.
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        before = b.open_descriptors()
        for path, words in (("fifo", "FIFO"), ("socket", "socket"), ("/dev/zero", "character device")):
            start = time.perf_counter()
            with pytest.raises(GgufError, match=f"{path}: .*{words}.*regular file"):
                GgufFile(path)
            assert time.perf_counter() - start < 0.5
        assert b.open_descriptors() == before


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_a_file_of_proc_that_claims_no_bytes_is_empty():
    with pytest.raises(GgufError, match="/proc/self/status: the file is empty"):
        GgufFile("/proc/self/status")


def test_any_kind_of_path_opens(small):
    (small.parent / "link.gguf").symlink_to(small)
    for path in (small, str(small), os.fsencode(small), small.parent / "link.gguf"):
        with GgufFile(path) as file:
            assert list(file.tensors) == ["a", "b"]
    # Not every file system takes a name that is no UTF-8.
    if sys.platform == "linux":
        odd = os.fsencode(small.parent) + b"/\xff.gguf"
        os.link(small, odd)
        with GgufFile(odd) as file:
            assert os.fsencode(file.path) == odd


def test_opening_and_listing_layers_initialise_no_backend():
    # A platform that does not exist: any use of a device would raise.
    program = (
        "import jax, jmoe.gguf_file as f\n"
        f"with f.GgufFile({str(REAL)!r}) as g:\n"
        "    print(f.moe_layers(g), g.architecture)\n"
        "try: jax.devices()\n"
        "except RuntimeError: print('the trap works')\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(0, 1) qwen3moe", "the trap works"]


def test_a_file_that_shrinks_after_opening_gives_an_error_and_spares_what_was_read(small):
    with GgufFile(small) as file:
        kept = file.read("a")
        copy = kept.copy()
        os.truncate(small, file.tensors["b"].offset + 4)
        with pytest.raises(GgufError, match=r"'b' ends after 4 of 160 bytes.*changed during load"):
            file.read("b")
        os.truncate(small, 100)
        with pytest.raises(GgufError, match="'a' ends after"):
            file.read("a")
        with pytest.raises(GgufError, match="changed during load"):
            file.check_unchanged()
    np.testing.assert_array_equal(kept, copy)


def test_a_file_that_shrinks_while_its_header_is_read_gives_an_error(small, monkeypatch):
    status = os.stat_result((*os.stat(small)[:6], 1 << 30, *os.stat(small)[7:]))
    monkeypatch.setattr("jmoe.gguf_file.shards.os.fstat", lambda _: status)
    with pytest.raises(GgufError, match=r"shrank.*changed during load"):
        GgufFile(small)


def test_a_file_that_is_rewritten_in_place_is_noticed_and_one_that_is_replaced_is_harmless(small):
    with GgufFile(small) as file:
        original = file.read("a")
        # As a download does it: a new file under the old name. The open one stays as it was.
        new = b.write(small.with_suffix(".part"), bytes(small.stat().st_size))
        os.replace(new, small)
        file.check_unchanged()
        np.testing.assert_array_equal(file.read("a"), original)
    small.write_bytes(b.good_file({"a": b.Tensor(T.I8, np.zeros(8, np.uint8))}))
    with GgufFile(small) as file:
        time.sleep(0.02)  # Coarser than any kernel's clock of modification times.
        small.write_bytes(small.read_bytes())
        with pytest.raises(GgufError, match="changed during load"):
            file.check_unchanged()


def test_eight_threads_read_what_one_reads():
    with GgufFile(REAL) as file:
        expected = {name: file.read(name) for name in file.tensors}
        names = list(expected) * 8
        with ThreadPoolExecutor(8) as executor:
            for name, got in zip(names, executor.map(file.read, names), strict=True):
                np.testing.assert_array_equal(got, expected[name])


def test_a_large_read_is_refused_before_it_allocates(tmp_path):
    path = b.write(tmp_path / "sparse.gguf", b.assemble([], [b.tensor_entry("w", (1 << 20, 1 << 20), int(T.I8), 0)]))
    os.truncate(path, 1 << 41)
    with GgufFile(path) as file:
        with pytest.raises(GgufError, match=rf"'w' needs {1 << 40} bytes of host memory.*fewer rows"):
            file.read("w")
        assert not file.read_rows("w", 1000, 1001).any()


# Shards


def split_files(folder: Path, rng: np.random.Generator, *, no=(0, 1, 2), count=3, total=3, names=("a", "b", "c")):
    """Three shards of one tensor each, as gguf-split writes them; the keyword arguments make them wrong."""
    tensors = {name: b.random_tensor(rng, T.Q4_0, (2, 32 * (i + 1))) for i, name in enumerate("abc")}
    for index, name in enumerate(names):
        pairs = [
            b.key_value("split.no", b.U16, no[index]),
            b.key_value("split.count", b.U16, count),
            b.key_value("split.tensors.count", b.I32, total),
        ]
        if index == 0:
            pairs.append(b.key_value("general.architecture", b.STRING, "qwen3moe"))
        path = folder / f"m-{index + 1:05}-of-00003.gguf"
        b.write(path, b.good_file({name: tensors["abc"[index]]}, pairs))
    return tensors


@pytest.mark.parametrize("given", [1, 2, 3])
def test_any_shard_opens_the_whole_model(given, tmp_path, rng):
    tensors = split_files(tmp_path, rng)
    before = b.open_descriptors()
    with GgufFile(tmp_path / f"m-{given:05}-of-00003.gguf") as file:
        assert file.architecture == "qwen3moe"
        assert file.path.endswith("m-00001-of-00003.gguf")
        assert [info.shard for info in file.tensors.values()] == [0, 1, 2]
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.read(name), tensor.blocks)
        os.utime(tmp_path / "m-00003-of-00003.gguf", ns=(0, 0))
        with pytest.raises(GgufError, match=r"m-00003-of-00003\.gguf: the file changed"):
            file.check_unchanged()
    assert b.open_descriptors() == before


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"total": 4}, "split.tensors.count is 4, but the 3 shards hold 3 tensors"),
        ({"names": ("a", "b", "a")}, "m-00003-of-00003.gguf: tensor 'a' stands in .*m-00001-of-00003.gguf too"),
        ({"no": (0, 1, 1)}, r"m-00003-of-00003.gguf: split.no and split.count are \(1, 3\), wanted \(2, 3\)"),
        ({"no": (1, 1, 2)}, "shard 2 of 3, but its name does not end in -00002-of-00003.gguf"),
        ({"count": 2}, "shard 1 of 2, but its name"),
        ({"count": 65535}, "shard 1 of 65535, but its name"),
    ],
)
def test_shards_that_do_not_fit_together_are_refused(wrong, words, tmp_path, rng):
    split_files(tmp_path, rng, **wrong)
    before = b.open_descriptors()
    with pytest.raises(GgufError, match=words):
        GgufFile(tmp_path / "m-00001-of-00003.gguf")
    assert b.open_descriptors() == before


def test_a_missing_shard_is_named(tmp_path, rng):
    split_files(tmp_path, rng)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    before = b.open_descriptors()
    with pytest.raises(
        GgufError, match=r"m-00003-of-00003.gguf is one shard of 3, but shard 2, .*m-00002-of-00003.gguf"
    ):
        GgufFile(tmp_path / "m-00003-of-00003.gguf")
    assert b.open_descriptors() == before


def test_a_damaged_shard_is_named(tmp_path, rng):
    split_files(tmp_path, rng)
    b.write(tmp_path / "m-00002-of-00003.gguf", b"")
    with pytest.raises(GgufError, match=r"m-00002-of-00003.gguf: the file is empty"):
        GgufFile(tmp_path / "m-00001-of-00003.gguf")


def test_a_renamed_shard_says_what_name_it_needs(tmp_path, rng):
    split_files(tmp_path, rng)
    os.rename(tmp_path / "m-00001-of-00003.gguf", tmp_path / "model.gguf")
    with pytest.raises(GgufError, match=r"shard 1 of 3, .*-00001-of-00003.gguf"):
        GgufFile(tmp_path / "model.gguf")


@pytest.mark.parametrize(("code", "value"), [(b.STRING, "3"), (b.F32, 3.0), (b.I32, -1), (b.BOOL, True)])
def test_a_shard_count_that_is_no_count_is_refused(code, value, tmp_path):
    path = b.write(tmp_path / "m.gguf", b.assemble([b.key_value("split.count", code, value)]))
    with pytest.raises(GgufError, match=r"split\.count must be an integer"):
        GgufFile(path)
