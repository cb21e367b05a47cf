"""Expert tensors are found under every spelling, and shapes, types and metadata must agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf_builder as b
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from jmoe.gguf_file import GgufError, GgufFile, moe_layers
from jmoe.gguf_file.names import find_expert_layer

SMALL = b.Sizes(num_experts=3, hidden_size=64, expert_intermediate=32)
GATE, UP, DOWN = (f"blk.0.ffn_{kind}_exps.weight" for kind in ("gate", "up", "down"))


def tensors_of(rng: np.random.Generator, layer: int = 0, sizes: b.Sizes = SMALL) -> dict[str, b.Tensor]:
    return b.moe_tensors(rng, layer, sizes, T.Q8_0, T.Q4_0)


def opened(tmp_path: Path, tensors: dict[str, b.Tensor], pairs: Sequence[bytes] | None = None) -> GgufFile:
    return GgufFile(
        b.write(tmp_path / "m.gguf", b.good_file(tensors, b.moe_pairs(sizes=SMALL) if pairs is None else pairs))
    )


def test_stacked_tensors_are_found_in_any_order_among_others(tmp_path, rng):
    tensors = {
        "blk.10.ffn_gate_shexp.weight": b.random_tensor(rng, T.F32, (4, 8)),
        "blk.3.ffn_gate.weight": b.random_tensor(rng, T.F32, (4, 8)),
        **dict(reversed(tensors_of(rng, 12).items())),
        **tensors_of(rng, 7),
        "output.weight": b.random_tensor(rng, T.F16, (4, 8)),
    }
    with opened(tmp_path, tensors, b.moe_pairs(sizes=SMALL, block_count=None)) as file:
        assert moe_layers(file) == (7, 12)
        layer = find_expert_layer(file, 12)
        assert layer.gate is not None
        assert (layer.gate.names, layer.gate.ggml_type) == (("blk.12.ffn_gate_exps.weight",), T.Q8_0)
        assert (layer.num_experts, layer.hidden_size, layer.expert_intermediate) == SMALL
        assert layer.down.shape == (3, 64, 32)
        assert find_expert_layer(file, np.int64(7)).layer_idx == 7  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "index",
    ["01", "-1", "+1", "1234567", str(2**63), "\N{ARABIC-INDIC DIGIT ONE}", "0x1", " 1", "1_0", ""],
    ids=lambda index: repr(index),
)
def test_an_index_in_another_spelling_makes_no_expert_tensor(index, tmp_path, rng):
    bad = {name.replace("blk.0.", f"blk.{index}."): tensor for name, tensor in tensors_of(rng).items()}
    with opened(tmp_path, {**bad, f"blk.0.ffn_up.{index}.weight": b.random_tensor(rng, T.F32, (4, 8))}) as file:
        assert moe_layers(file) == ()
        with pytest.raises(GgufError, match="the file has no MoE layers"):
            find_expert_layer(file, 1)


@pytest.mark.parametrize("layer_idx", [1, -1, 2**63, 10**4999], ids=["1", "-1", "2^63", "5000 digits"])
def test_a_layer_that_is_not_there_lists_those_that_are(layer_idx, tmp_path, rng):
    words = r"holds no expert tensors; its MoE layers are 0, 2$"
    tensors = {**tensors_of(rng, 0), **tensors_of(rng, 2)}
    with opened(tmp_path, tensors, []) as file, pytest.raises(GgufError, match=words):
        find_expert_layer(file, layer_idx)


@pytest.mark.parametrize("layer_idx", [True, 0.0, "0", None, np.bool_(True)])
def test_a_layer_index_that_is_no_integer_is_refused(layer_idx, tmp_path, rng):
    with opened(tmp_path, tensors_of(rng)) as file, pytest.raises(TypeError, match="layer_idx must be an int"):
        find_expert_layer(file, layer_idx)


def test_axes_of_one_that_llama_quantize_drops_are_put_back(tmp_path, rng):
    one = b.Sizes(1, 64, 32)
    tensors = {k: b.Tensor(t.ggml_type, t.blocks[0]) for k, t in tensors_of(rng, sizes=one).items()}
    tensors["blk.0.ffn_down_exps.bias"] = b.random_tensor(rng, T.F32, (64,))
    with opened(tmp_path, tensors, b.moe_pairs(sizes=one, expert_used_count=(b.U32, 1))) as file:
        assert file.tensors[UP].shape == (32, 64)
        assert find_expert_layer(file, 0).up.shape == (1, 32, 64)


def without(*names: str) -> Any:
    return lambda tensors, rng: [tensors.pop(name) for name in names]


def replaced(name: str, ggml_type: T, shape: tuple[int, ...]) -> Any:
    def change(tensors: dict[str, b.Tensor], rng: np.random.Generator) -> None:
        tensors[name] = b.random_tensor(rng, ggml_type, shape)

    return change


INCONSISTENT = {
    "no gate": (without(GATE), "no tensor ffn_gate_exps.weight"),
    "no up": (without(UP), "no tensor ffn_up_exps.weight"),
    "no down": (without(DOWN), "no tensor ffn_down_exps.weight"),
    "only a bias": (
        lambda t, r: [t.clear(), replaced("blk.0.ffn_up_exps.bias", T.F32, (3, 32))(t, r)],
        "no tensor ffn_gate_exps.weight",
    ),
    "experts differ": (
        replaced(DOWN, T.F32, (4, 64, 32)),
        r"ffn_down_exps.weight has shape \[4, 64, 32\].*\[3, 64, 32\]",
    ),
    "gate differs": (replaced(GATE, T.F32, (3, 31, 64)), r"ffn_gate_exps.weight has shape \[3, 31, 64\]"),
    "down not transposed": (replaced(DOWN, T.F32, (3, 32, 64)), r"ffn_down_exps.weight has shape \[3, 32, 64\]"),
    "four axes": (
        replaced(UP, T.F32, (2, 3, 32, 64)),
        r"ffn_up_exps.weight' has shape \[2, 3, 32, 64\], wanted 3 axes",
    ),
    "bias of another length": (
        replaced("blk.0.ffn_up_exps.bias", T.F32, (3, 64)),
        r"ffn_up_exps.bias' has shape \[3, 64\]",
    ),
    "scale of another length": (replaced("blk.0.ffn_down_exps.scale", T.F32, (4,)), "ffn_down_exps.scale' has shape"),
    "unsupported scale": (replaced("blk.0.ffn_gate_exps.scale", T.F32, (3,)), "ffn_gate_exps.scale' is not supported"),
    "fused and separate": (replaced("blk.0.ffn_gate_up_exps.weight", T.F32, (3, 64, 64)), "both .*a separate gate"),
    "stacked and single": (replaced("blk.0.ffn_up.0.weight", T.F32, (32, 64)), "has both .*ffn_up_exps.*ffn_up.0"),
}


@pytest.mark.parametrize("row", INCONSISTENT)
def test_tensors_that_do_not_fit_together_are_refused(row, tmp_path, rng):
    change, words = INCONSISTENT[row]
    tensors = tensors_of(rng)
    change(tensors, rng)
    with opened(tmp_path, tensors) as file, pytest.raises(GgufError, match=words) as caught:
        find_expert_layer(file, 0)
    assert str(tmp_path) in str(caught.value)
    assert "layer 0" in str(caught.value) or "blk.0" in str(caught.value)


def test_fused_rows_are_gate_then_up_and_their_number_must_be_even(tmp_path, rng):
    tensors = tensors_of(rng)
    del tensors[GATE], tensors[UP]
    tensors["blk.0.ffn_gate_up_exps.weight"] = b.random_tensor(rng, T.Q8_0, (3, 64, 64))
    with opened(tmp_path, tensors) as file:
        layer = find_expert_layer(file, 0)
        assert layer.gate is not None
        assert layer.gate.locate(2, 5) == ("blk.0.ffn_gate_up_exps.weight", 2 * 64 + 5)
        assert layer.up.locate(2, 5) == ("blk.0.ffn_gate_up_exps.weight", 2 * 64 + 32 + 5)
    tensors["blk.0.ffn_gate_up_exps.weight"] = b.random_tensor(rng, T.Q8_0, (3, 63, 64))
    with opened(tmp_path, tensors) as file, pytest.raises(GgufError, match="63 rows an expert"):
        find_expert_layer(file, 0)


def one_tensor_an_expert(rng: np.random.Generator) -> dict[str, b.Tensor]:
    return {
        f"blk.0.ffn_{kind}.{e}.weight": b.random_tensor(rng, T.Q8_0, shape)
        for e in (2, 0, 1)
        for kind, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32)))
    }


def test_one_tensor_an_expert_is_ordered_by_expert(tmp_path, rng):
    with opened(tmp_path, one_tensor_an_expert(rng)) as file:
        assert moe_layers(file) == (0,)
        assert find_expert_layer(file, 0).down.names == tuple(f"blk.0.ffn_down.{e}.weight" for e in range(3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("blk.0.ffn_up.1.weight"), "expert 1 of ffn_up is missing, but expert 2 is there"),
        (without("blk.0.ffn_up.2.weight"), r"has shape \[3, 32, 64\].*must be \[2, 32, 64\]"),
        (replaced("blk.0.ffn_up.1.weight", T.Q4_0, (32, 64)), r"ffn_up.1.weight' is Q4_0\[32, 64\].*Q8_0\[32, 64\]"),
        (replaced("blk.0.ffn_up.1.weight", T.Q8_0, (16, 64)), r"ffn_up.1.weight' is Q8_0\[16, 64\]"),
        (replaced("blk.0.ffn_up.999999.weight", T.Q8_0, (32, 64)), "expert 3 of ffn_up is missing, but expert 999999"),
    ],
)
def test_experts_that_are_missing_or_unlike_are_refused(change, words, tmp_path, rng):
    tensors = one_tensor_an_expert(rng)
    change(tensors, rng)
    with opened(tmp_path, tensors) as file, pytest.raises(GgufError, match=words):
        find_expert_layer(file, 0)


def test_only_the_architecture_without_a_gate_may_lack_it(tmp_path, rng):
    tensors = tensors_of(rng)
    del tensors[GATE]
    with opened(tmp_path, tensors, b.moe_pairs("nemotron_h_moe", SMALL)) as file:
        assert find_expert_layer(file, 0).gate is None


WRONG_METADATA = {
    "expert_count differs": ({"expert_count": (b.U32, 4)}, "expert_count is 4, but .*ffn_up_exps.weight.* says 3"),
    "expert_count 0": ({"expert_count": (b.U32, 0)}, "expert_count must be an integer from 1 on, got 0"),
    "expert_count negative": ({"expert_count": (b.I32, -3)}, "expert_count must be .* got -3"),
    "expert_count a string": ({"expert_count": (b.STRING, "3")}, "expert_count must be .* got '3'"),
    "expert_count a float": ({"expert_count": (b.F32, 3.0)}, "expert_count must be .* got 3.0"),
    "expert_count a bool": ({"expert_count": (b.BOOL, True)}, "expert_count must be .* got True"),
    "expert_count an array": ({"expert_count": (b.U32, [3])}, "expert_count must be "),
    "used over count": ({"expert_used_count": (b.U32, 4)}, "expert_used_count is 4, but .* has 3 experts"),
    "used 0": ({"expert_used_count": (b.U32, 0)}, "expert_used_count must be "),
    "block_count 2^32-1": ({"block_count": (b.U32, 2**32 - 1)}, "block_count is 4294967295"),
    "block_count 2^63": ({"block_count": (b.U64, 1 << 63)}, "block_count is 9223372036854775808"),
    "block_count a string": ({"block_count": (b.STRING, "1")}, "block_count must be "),
    "embedding_length differs": ({"embedding_length": (b.U32, 65)}, "embedding_length is 65, but .* says 64"),
    "latent size an array": ({"moe_latent_size": (b.U32, [])}, r"moe_latent_size must be .* got array\(\["),
    "latent size a float": ({"moe_latent_size": (b.F32, 0.0)}, "moe_latent_size must be .* got 0.0"),
    "latent size differs": ({"moe_latent_size": (b.U32, 32)}, "moe_latent_size is 32, but .* says 64"),
    "length differs": ({"expert_feed_forward_length": (b.U32, 33)}, "expert_feed_forward_length is 33, but .* says 32"),
    "length of the layer differs": ({"expert_feed_forward_length": (b.U32, [33])}, "expert_feed_forward_length is 33"),
    "no length for the layer": (
        {"expert_feed_forward_length": (b.U32, [])},
        "expert_feed_forward_length has 0 entries, but there is a layer 0",
    ),
    "lengths are floats": ({"expert_feed_forward_length": (b.F32, [32.0])}, "expert_feed_forward_length must be "),
    "own length comes first": (
        {"expert_feed_forward_length": (b.U32, 33), "feed_forward_length": (b.U32, 32)},
        "expert_feed_forward_length is 33",
    ),
    "feed_forward_length differs": (
        {"expert_feed_forward_length": None, "feed_forward_length": (b.U32, 96)},
        "feed_forward_length is 96, but .* says 32",
    ),
}


@pytest.mark.parametrize("row", WRONG_METADATA)
def test_metadata_that_contradicts_the_tensors_is_refused(row, tmp_path, rng):
    changes, words = WRONG_METADATA[row]
    pairs = b.moe_pairs(sizes=SMALL, **changes)
    with (
        opened(tmp_path, tensors_of(rng), pairs) as file,
        pytest.raises(GgufError, match=rf"m.gguf: qwen3moe\.{words}"),
    ):
        find_expert_layer(file, 0)


@pytest.mark.parametrize(
    "changes",
    [
        dict.fromkeys(
            ("block_count", "expert_count", "expert_used_count", "embedding_length", "expert_feed_forward_length")
        ),
        {"expert_count": (b.U64, 3), "expert_used_count": (b.I16, 3)},
        {"expert_feed_forward_length": (b.I32, [32, 0, 7])},
        {"expert_feed_forward_length": (b.U32, 32), "feed_forward_length": (b.U32, 1000)},
        {"expert_feed_forward_length": None, "feed_forward_length": (b.U32, 32)},
        {"expert_feed_forward_length": None, "feed_forward_length": (b.U32, [32, 5])},
        # Old qwen2moe: the length of all used experts together.
        {"expert_feed_forward_length": None, "feed_forward_length": (b.U32, 64)},
        {"embedding_length": (b.U32, 4096), "moe_latent_size": (b.U32, 64)},
        {"moe_latent_size": (b.U32, 0)},
    ],
)
def test_metadata_that_agrees_or_is_absent_is_accepted(changes, tmp_path, rng):
    with opened(tmp_path, tensors_of(rng), b.moe_pairs(sizes=SMALL, **changes)) as file:
        assert find_expert_layer(file, 0).expert_intermediate == 32


def test_a_file_without_an_architecture_opens_and_says_so_when_asked(tmp_path, rng):
    with opened(tmp_path, tensors_of(rng), []) as file:
        assert find_expert_layer(file, 0).num_experts == 3
        with pytest.raises(GgufError, match=r"general\.architecture must be a string, got None"):
            _ = file.architecture
    for pair, came in (
        (b.key_value("general.architecture", b.U32, 3), "3"),
        (b.key_array("general.architecture", b.U32, [3, 4]), r"array\("),
        (b.key_array("general.architecture", b.STRING, ["qwen3moe"]), r"StringArray\(1 strings"),
    ):
        words = rf"general\.architecture must be a string, got {came}"
        with opened(tmp_path, tensors_of(rng), [pair]) as file, pytest.raises(GgufError, match=words):
            find_expert_layer(file, 0)


@pytest.mark.parametrize("key", ["general.architecture", "qwen3moe.expert_count"])
def test_a_message_quotes_a_little_of_a_long_or_unprintable_text(key, tmp_path, rng):
    pairs = [b.key_value(key, b.STRING, "\x1b[2J" * 1_000_000)]
    if key != "general.architecture":
        pairs.append(b.key_value("general.architecture", b.STRING, "qwen3moe"))
    else:
        pairs.append(b.key_value("\x1b[2J" * 1_000_000 + ".expert_count", b.U32, 4))
    with opened(tmp_path, tensors_of(rng), pairs) as file, pytest.raises(GgufError) as caught:
        find_expert_layer(file, 0)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()
