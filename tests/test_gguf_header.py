"""Every bad header gives a GgufError that names the file and what is wrong, quickly; good and huge ones load."""

from __future__ import annotations

import os
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import gguf_builder as b
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from jmoe.gguf_file import GgufError, GgufFile, cursor
from jmoe.gguf_file.cursor import HEADER_BUDGET, StringArray

DATA = Path(__file__).parent / "data"
F32_ROW = bytes(32)


def one_tensor(
    name: str | bytes = "w", dims=(8,), code: int = int(T.F32), offset: int = 0, data: bytes = F32_ROW
) -> bytes:
    return b.assemble([], [b.tensor_entry(name, dims, code, offset)], data)


def two_tensors(second: int, data: bytes = bytes(64)) -> bytes:
    entries = [b.tensor_entry("first", (8,), 0, 0), b.tensor_entry("second", (8,), 0, second)]
    return b.assemble([], entries, data)


def one_pair(pair: bytes) -> bytes:
    return b.assemble([pair])


def swapped_file() -> bytes:
    """A whole big-endian file, with one pair and one tensor."""
    pair = struct.pack(">Q", 1) + b"k" + struct.pack(">II", b.U32, 7)
    entry = struct.pack(">Q", 1) + b"w" + struct.pack(">IQIQ", 1, 8, 0, 0)
    head = b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + pair + entry
    return head + bytes(-len(head) % 32) + F32_ROW


def peak_bytes() -> int:
    """The most memory that this process ever held; macOS counts it in bytes, Linux in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# (row of the table of bad inputs, what it is) -> (the file, what its message must say)
BAD: dict[str, tuple[bytes | Callable[[], bytes], list[str]]] = {
    "1 empty": (b"", ["empty", "incomplete download"]),
    "1 below 24 bytes": (b"GGUF" + b.u32(3) + b.u64(0), ["24 bytes", "16", "incomplete download"]),
    "1 wrong magic": (b"GGUX" + bytes(40), ["b'GGUX", "b'GGUF'"]),
    "1 LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", ["git lfs pull"]),
    "1 HTML": (b"\n<!DOCTYPE html><html>log in</html>", ["HTML"]),
    "1 HTML without doctype": (b"<html><body>", ["HTML"]),
    "1 safetensors": (b.u64(20) + b'{"__metadata__": {}}', ["safetensors"]),
    "1 zip": (b"PK\x03\x04" + bytes(40), ["zip"]),
    "1 GGML": (b"tjgg" + bytes(40), ["older than GGUF"]),
    "1 leading bytes": (b"abcd" + one_tensor(), ["offset 4", "4 bytes were put before"]),
    "2 version 0": (b.assemble(version=0), ["version 0", "2 or 3"]),
    "2 version 1": (b.assemble(version=1), ["version 1", "2 or 3"]),
    "2 version 4": (b.assemble(version=4), ["version 4", "2 or 3"]),
    "2 version swapped": (b.assemble(version=3 << 24), ["big-endian"]),
    "2 big-endian file": (swapped_file, ["big-endian", "gguf_convert_endian"]),
    "3 tensor count": (b.assemble(n_tensors=1), ["1 tensors", "hold at most 0"]),
    "3 tensor count 2^63": (b.assemble(n_tensors=1 << 63), [f"{1 << 63} tensors"]),
    "3 key count": (b.assemble(n_kv=2**64 - 1), [f"{2**64 - 1} metadata keys"]),
    "4 key length": (one_pair(b.u64(1 << 40) + b"k" * 40), ["metadata key 0", str(1 << 40), "incomplete download"]),
    "4 value length": (one_pair(b.string("k") + b.u32(b.STRING) + b.u64(99)), ["'k'", "99", "incomplete download"]),
    "4 name length": (b.assemble([], [b.u64(2**64 - 1) + bytes(60)]), ["tensor 0", str(2**64 - 1)]),
    "5 key empty": (one_pair(b.key_value("", b.U32, 1)), ["metadata key 0", "empty"]),
    "5 key twice": (b.assemble([b.key_value("k", b.U8, 1)] * 2), ["'k'", "twice"]),
    "5 key twice for ggml": (
        b.assemble([b.key_value("k", b.U8, 1), b.key_value("k\0x", b.U8, 2)]),
        [r"'k\x00x'", "NUL byte"],
    ),
    "5 alignment for ggml alone": (one_pair(b.key_value("general.alignment\0", b.U32, 64)), ["NUL byte"]),
    "5 name twice for ggml": (
        b.assemble([], [b.tensor_entry("w\0x", (8,), 0, 0), b.tensor_entry("w", (8,), 0, 32)], bytes(64)),
        [r"'w\x00x'", "NUL byte"],
    ),
    "5 key not UTF-8": (one_pair(b.key_value(b"k\xff", b.U8, 1)), ["metadata key 0", "not UTF-8"]),
    "5 name of 64 bytes": (one_tensor("n" * 64), ["tensor 0", "64 bytes", "nnnn"]),
    "5 name not UTF-8": (one_tensor(b"\xc3("), ["tensor 0", "not UTF-8"]),
    "5 name twice": (
        b.assemble([], [b.tensor_entry("w", (8,), 0, 0), b.tensor_entry("w", (8,), 0, 32)], bytes(64)),
        ["'w'", "twice"],
    ),
    "6 value type 13": (one_pair(b.string("k") + b.u32(13) + bytes(8)), ["'k'", "value type 13"]),
    "6 array of arrays": (
        one_pair(b.string("k") + b.u32(b.ARRAY) + b.u32(b.ARRAY) + b.u64(1) + bytes(20)),
        ["'k'", "array of arrays"],
    ),
    "6 unknown element": (one_pair(b.string("k") + b.u32(b.ARRAY) + b.u32(99) + b.u64(0)), ["'k'", "value type 99"]),
    "7 number array": (one_pair(b.key_array("k", b.F64, [], count=1 << 61)), ["'k'", str(1 << 64)]),
    "7 string array": (one_pair(b.key_array("k", b.STRING, [], count=1 << 60)), ["'k'", str(1 << 63)]),
    "7 string in an array": (
        one_pair(b.key_array("k", b.STRING, ["a"], count=1)[:-9] + b.u64(2**64 - 1) + b"a"),
        ["'k'", "incomplete download"],
    ),
    "9 alignment 0": (one_pair(b.key_value("general.alignment", b.U32, 0)), ["general.alignment is 0", "power of two"]),
    "9 alignment 48": (one_pair(b.key_value("general.alignment", b.U32, 48)), ["general.alignment is 48"]),
    "9 alignment 2 MiB": (one_pair(b.key_value("general.alignment", b.U32, 1 << 21)), [str(1 << 21), str(1 << 20)]),
    "9 alignment not UINT32": (one_pair(b.key_value("general.alignment", b.U64, 32)), ["value type 10", "UINT32"]),
    "10 no dimensions": (one_tensor(dims=()), ["'w'", "0 dimensions", "1 to 4"]),
    "10 five dimensions": (one_tensor(dims=(1,) * 5), ["'w'", "5 dimensions"]),
    "10 2^32-1 dimensions": (b.assemble([], [b.string("w") + b.u32(2**32 - 1) + bytes(40)]), ["'w'", str(2**32 - 1)]),
    "11 dimension 0": (one_tensor(dims=(8, 0)), ["'w'", "[0, 8]"]),
    "11 product over 2^63": (one_tensor(dims=(1 << 32, 1 << 31)), ["'w'", "2^63"]),
    "11 bytes over file": (one_tensor(dims=(1 << 40,)), ["'w'", str(1 << 42), "incomplete download"]),
    **{
        f"12 type {code}": (one_tensor(code=code), ["'w'", f"type id {code}"])
        for code in (4, 5, 31, 32, 33, 36, 37, 38, 999, 2**32 - 1)
    },
    # Three blocks take 108 bytes in ggml, 120 by gguf-py's older table; padded to 8 they differ.
    "12 Q8_1 of an older size": (
        b.assemble(
            [b.key_value("general.alignment", b.U32, 8)],
            [b.tensor_entry("q", (96,), int(T.Q8_1), 0), b.tensor_entry("w", (8,), 0, 120)],
            bytes(160),
            alignment=8,
        ),
        ["'w'", "120", "wanted 112"],
    ),
    "13 depth for Q4_K": (one_tensor(dims=(128,), code=int(T.Q4_K), data=bytes(144)), ["'w'", "128", "Q4_K", "256"]),
    "13 depth for Q8_0": (one_tensor(dims=(48,), code=int(T.Q8_0), data=bytes(68)), ["'w'", "48", "Q8_0", "32"]),
    "14 offset not aligned": (two_tensors(33, bytes(96)), ["'second'", "33", "wanted 32"]),
    "15 offset after the end": (two_tensors(1 << 40), ["'second'", str(1 << 40)]),
    "15 offset 'negative'": (one_tensor(offset=2**64 - 32), ["'w'", str(2**64 - 32), "wanted 0"]),
    "16 overlap": (two_tensors(0), ["'second'", "starts at 0", "wanted 32"]),
    "17 gap": (two_tensors(64, bytes(96)), ["'second'", "starts at 64", "without gap"]),
    "17 gap before the first": (one_tensor(offset=32, data=bytes(64)), ["'w'", "wanted 0"]),
    "18 last tensor cut": (two_tensors(32, bytes(63)), ["'second'", "needs 32 bytes", "incomplete download"]),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_header_gives_an_error_that_names_it_and_leaves_no_descriptor(row, tmp_path):
    raw, words = BAD[row]
    path = b.write(tmp_path / "bad.gguf", raw if isinstance(raw, bytes) else raw())
    before = b.open_descriptors()
    start = time.perf_counter()
    with pytest.raises(GgufError) as caught:
        GgufFile(path)
    assert time.perf_counter() - start < 2
    assert b.open_descriptors() == before
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_every_truncation_of_a_real_file_is_an_error_that_suspects_the_download(tmp_path):
    whole = (DATA / "qwen3moe-Q4_K_M.gguf").read_bytes()
    with GgufFile(DATA / "qwen3moe-Q4_K_M.gguf") as good:
        first, last = min(t.offset for t in good.tensors.values()), max(good.tensors.values(), key=lambda t: t.offset)
    rng = np.random.default_rng(0)
    cuts = {0, 3, 4, 23, 24, first - 1, first, last.offset, last.offset + last.nbytes - 1}
    cuts |= {int(cut) for cut in rng.integers(0, first, 150)} | {
        int(cut) for cut in rng.integers(first, last.offset, 50)
    }
    path = tmp_path / "cut.gguf"
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(GgufError) as caught:
            GgufFile(path)
        assert str(path) in str(caught.value), cut
        # Less than the magic is a file of another kind, for all that one can tell.
        assert cut in range(1, 4) or "incomplete download" in str(caught.value), cut
    with pytest.raises(GgufError, match=f"tensor '{last.name}' needs {last.nbytes} bytes"):
        GgufFile(b.write(path, whole[: last.offset + last.nbytes - 1]))


def test_no_changed_byte_of_a_header_raises_anything_but_gguf_error(tmp_path):
    pairs = [*b.moe_pairs(), b.key_array("tokens", b.STRING, ["a", "bc", ""]), b.key_array("scores", b.F32, [0.5, 1])]
    rng = np.random.default_rng(1)
    whole = b.good_file({"w": b.random_tensor(rng, T.Q8_0, (3, 64)), "v": b.random_tensor(rng, T.F32, (5,))}, pairs)
    path = tmp_path / "changed.gguf"
    outcomes = {"opened": 0, "refused": 0}
    for position in range(whole.index(b"tokens") + 200):
        for value in (0xFF, whole[position] ^ 1):
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            try:
                GgufFile(path).close()
                outcomes["opened"] += 1
            except GgufError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes


def test_metadata_values_of_every_type_read_back(tmp_path):
    scalars = {
        b.U8: 200, b.I8: -7, b.U16: 60000, b.I16: -300, b.U32: 1 << 31, b.I32: -(1 << 30), b.F32: 0.5, b.BOOL: True,
        b.STRING: "héllo", b.U64: 1 << 63, b.I64: -(1 << 62), b.F64: 0.1,
    }  # fmt: skip
    pairs = [b.key_value(f"scalar.{code}", code, value) for code, value in scalars.items()]
    pairs += [b.key_array(f"array.{code}", code, [value, value]) for code, value in scalars.items()]
    pairs += [b.key_array("array.none", b.F32, []), b.key_array("strings.none", b.STRING, [])]
    with GgufFile(b.write(tmp_path / "values.gguf", b.assemble(pairs))) as file:
        for code, value in scalars.items():
            assert file.metadata[f"scalar.{code}"] == value
            assert type(file.metadata[f"scalar.{code}"]) is type(value)
            array = file.metadata[f"array.{code}"]
            assert list(array) == [value, value]
            if code != b.STRING:
                assert isinstance(array, np.ndarray)
                assert not array.flags.writeable
        assert len(file.metadata["array.none"]) == len(list(file.metadata["strings.none"])) == 0
        with pytest.raises(TypeError):
            file.metadata["new"] = 1  # pyright: ignore[reportIndexIssue]


def test_text_that_is_not_utf8_is_replaced_in_values(tmp_path):
    pairs = [b.key_value("k", b.STRING, b"a\xff"), b.key_array("a", b.STRING, [b"\xfe", "b"])]
    with GgufFile(b.write(tmp_path / "latin.gguf", b.assemble(pairs))) as file:
        assert file.metadata["k"] == "a�"
        assert list(file.metadata["a"]) == ["�", "b"]


def test_vocabulary_of_150_000_tokens_opens_in_under_a_second(tmp_path):
    tokens = [f"token{i}é" for i in range(150_000)]
    pairs = [
        b.key_array("tokenizer.ggml.tokens", b.STRING, tokens),
        b.key_array("tokenizer.ggml.merges", b.STRING, (f"{t} x" for t in tokens)),
        b.key_array("tokenizer.ggml.token_type", b.I32, [1] * len(tokens)),
    ]
    path = b.write(tmp_path / "vocabulary.gguf", b.assemble(pairs))
    start = time.perf_counter()
    with GgufFile(path) as file:
        assert time.perf_counter() - start < 1
        vocabulary = file.metadata["tokenizer.ggml.tokens"]
        assert isinstance(vocabulary, StringArray)
        assert len(vocabulary) == len(tokens)
        assert list(vocabulary) == tokens
        assert file.metadata["tokenizer.ggml.token_type"].dtype == np.int32


@pytest.mark.parametrize("what", ["2 million strings", "64 MiB of numbers", "100,000 keys", "40,000 tensors"])
def test_honest_huge_headers_load_in_bounded_time_and_memory(what, tmp_path):
    pairs, entries, data = [], [], b""
    if what == "2 million strings":
        pairs = [b.string("k") + b.u32(b.ARRAY) + b.u32(b.STRING) + b.u64(2_000_000) + b.string("abcd") * 2_000_000]
    elif what == "64 MiB of numbers":
        pairs = [b.string("k") + b.u32(b.ARRAY) + b.u32(b.I32) + b.u64(1 << 24) + bytes(1 << 26)]
    elif what == "100,000 keys":
        pairs = [b.key_value(f"key{i}", b.U32, i) for i in range(100_000)]
    else:
        entries = [b.tensor_entry(f"t{i}", (8,), 0, 32 * i) for i in range(40_000)]
        data = bytes(32 * 40_000)
    path = b.write(tmp_path / "huge.gguf", b.assemble(pairs, entries, data))
    before = peak_bytes()
    start = time.perf_counter()
    with GgufFile(path) as file:
        assert time.perf_counter() - start < 5
        assert (len(file.metadata), len(file.tensors)) == (len(pairs), len(entries))
    assert peak_bytes() - before < 1 << 30


@pytest.mark.parametrize("kind", [b.U8, b.STRING])
def test_header_over_the_budget_is_refused_before_it_is_read(kind, tmp_path):
    path = b.write(tmp_path / "over.gguf", one_pair(b.key_array("big.key", kind, [], count=HEADER_BUDGET)))
    os.truncate(path, 16 * HEADER_BUDGET)
    start = time.perf_counter()
    with pytest.raises(GgufError, match=rf"'big.key' .*limit of {HEADER_BUDGET} bytes"):
        GgufFile(path)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("counts", "words"), [({"n_tensors": 1 << 19}, "tensors"), ({"n_kv": 1 << 21}, "metadata keys")]
)
def test_counts_that_fit_the_file_but_no_model_are_refused(counts, words, tmp_path):
    path = b.write(tmp_path / "many.gguf", b.assemble(**counts))
    os.truncate(path, 1 << 30)
    with pytest.raises(GgufError, match=rf"counts {next(iter(counts.values()))} {words}, over the limit"):
        GgufFile(path)


def test_strings_of_all_arrays_together_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(cursor, "MAX_STRINGS", 5)
    arrays = [b.key_array(f"names.{count}", b.STRING, ["a"] * count) for count in (2, 3, 1)]
    with GgufFile(b.write(tmp_path / "five.gguf", b.assemble(arrays[:2]))) as file:
        assert list(file.metadata["names.3"]) == ["a"] * 3
    with pytest.raises(GgufError, match=r"'names\.1' counts 1 strings: .* the limit of 5"):
        GgufFile(b.write(tmp_path / "six.gguf", b.assemble(arrays)))


def test_a_nul_byte_in_a_name_that_nothing_else_has_is_a_byte_like_any(tmp_path):
    pair, entry = b.key_value("a\0b", b.U8, 7), b.tensor_entry("w\0", (8,), 0, 0)
    with GgufFile(b.write(tmp_path / "nul.gguf", b.assemble([pair], [entry], F32_ROW))) as file:
        assert file.metadata["a\0b"] == 7
        assert file.read("w\0").tobytes() == F32_ROW


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
@pytest.mark.parametrize("final_padding", [True, False])
def test_tensors_read_back_whatever_the_version_alignment_and_order(version, alignment, final_padding, tmp_path, rng):
    tensors = {
        "odd": b.random_tensor(rng, T.F32, (3,)),
        "blk.0.w": b.random_tensor(rng, T.Q6_K, (5, 3, 512)),
        "x" * 63: b.random_tensor(rng, T.F16, (1, 2, 3, 5)),
    }
    for order in (list(tensors), list(tensors)[::-1]):
        raw = b.good_file(
            {name: tensors[name] for name in order}, version=version, alignment=alignment, final_padding=final_padding
        )
        with GgufFile(b.write(tmp_path / "good.gguf", raw + b"trailing" * final_padding)) as file:
            assert (file.version, file.alignment, list(file.tensors)) == (version, alignment, order)
            for name, tensor in tensors.items():
                np.testing.assert_array_equal(file.read(name), tensor.blocks)
                assert file.tensors[name].shape == tuple(reversed(tensor.dims))
                assert file.tensors[name].ggml_type is tensor.ggml_type


def test_our_parser_and_gguf_py_read_the_same_from_a_file_that_llama_cpp_wrote():
    for path in sorted(DATA.glob("*.gguf")):
        theirs = gguf.GGUFReader(path)
        with GgufFile(path) as ours:
            assert list(ours.tensors) == [t.name for t in theirs.tensors]
            for tensor in theirs.tensors:
                info = ours.tensors[tensor.name]
                assert (info.offset, info.nbytes, info.ggml_type) == (
                    tensor.data_offset, tensor.n_bytes, tensor.tensor_type,
                )  # fmt: skip
                assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
            for key in ours.metadata:
                field, value = theirs.get_field(key), ours.metadata[key]
                assert field is not None
                expected = field.contents()
                assert (list(value) if isinstance(value, np.ndarray | StringArray) else value) == expected
