"""The commands do what they say; wrong use is one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import gguf_builder
import layer_files
import numpy as np
import oracle
import pytest
import tolerances
from gguf import GGMLQuantizationType

from jmoe import FORMATS, MoELayer, cpu_kernels
from jmoe.cli import main
from jmoe.gguf_file import GgufFile

DATA = Path(__file__).parent / "data"
QWEN = str(DATA / "qwen3moe-Q4_K_M.gguf")
MIXTRAL = str(DATA / "mixtral-Q6_K.gguf")


def jmoe(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "jmoe", *map(str, args)], env=env, capture_output=True, text=True
    )


def error_of(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line on stderr of a call that must exit with 2."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("jmoe: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def made_file(path: Path, types: dict[str, GGMLQuantizationType], **counts: int) -> str:
    """A file of one layer, E = 4, I = 32, H = 64 or both 256, whose projections have the given types."""
    rng = np.random.default_rng(0)
    large = any(gguf.GGML_QUANT_SIZES[t][0] == 256 for t in types.values())
    inner, hidden = (256, 256) if large else (32, 64)
    shapes = {"gate": (4, inner, hidden), "up": (4, inner, hidden), "down": (4, hidden, inner)}
    tensors = {
        f"blk.3.ffn_{kind}_exps.weight": gguf_builder.random_tensor(rng, types.get(kind, types["all"]), shape)
        for kind, shape in shapes.items()
    }
    pairs = [gguf_builder.key_value("general.architecture", gguf_builder.STRING, "olmoe")]
    pairs += [gguf_builder.key_value(f"olmoe.{key}", gguf_builder.U32, value) for key, value in counts.items()]
    path.write_bytes(gguf_builder.good_file(tensors, pairs))
    return str(path)


def on_cpu() -> str:
    """The backend of packed stacks here."""
    return "jnp" if cpu_kernels.why_unavailable(tokens=1) else "cpu"


def test_demo_passes_and_prints_errors_backend_and_reason(capsys):
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    for word in ("q4_k", "q6_k", "float32", "bfloat16", "<= 1e-", f"backend {on_cpu()}: ", "first call", "MB"):
        assert word in printed
    assert printed.endswith("passed\n")


def test_demo_exits_with_1_where_an_output_misses_its_bound(capsys, monkeypatch):
    from jmoe.cli import demo

    right = demo.moe_forward
    monkeypatch.setattr(demo, "moe_forward", lambda *args: right(*args) * 1.01)
    assert main(["demo"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_demo_file_is_the_fixture_and_small_enough_for_the_package():
    packaged = Path(__file__).parents[1] / "jmoe" / "data"
    assert (packaged / "qwen3moe-Q4_K_M.gguf").read_bytes() == Path(QWEN).read_bytes()
    assert sum(path.stat().st_size for path in packaged.iterdir()) <= 3 << 20


def test_json_of_inspect_has_its_schema(capsys):
    assert main(["inspect", QWEN, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {key: report[key] for key in ("path", "architecture", "version", "tensors", "moe_layers")} == {
        "path": QWEN,
        "architecture": "qwen3moe",
        "version": 3,
        "tensors": 27,
        "moe_layers": [0, 1],
    }
    assert report["metadata"]["expert_used_count"] == 2
    assert report["expert_file_bytes"] == sum(layer["file_bytes"] for layer in report["layers"])
    assert report["expert_held_bytes"] == sum(layer["held_bytes"] for layer in report["layers"])
    layer = report["layers"][1]
    assert (layer["layer"], layer["num_experts"], layer["hidden_size"], layer["expert_intermediate"]) == (
        1,
        8,
        256,
        256,
    )
    assert layer["projections"]["down"] == {
        "tensors": ["blk.1.ffn_down_exps.weight"],
        "type": "Q6_K",
        "shape": [8, 256, 256],
        "file_bytes": 430080,
        "packed": True,
        "held_as": "q6_k",
        "held_bytes": 430080,
    }
    assert layer["projections"]["gate"]["held_bytes"] == 8 * 256 * 256 * 4.625 / 8


def test_inspect_says_what_becomes_dense_and_what_cannot_load(capsys, tmp_path):
    mixed = made_file(
        tmp_path / "mixed.gguf",
        {"all": GGMLQuantizationType.Q4_0, "up": GGMLQuantizationType.TQ1_0, "down": GGMLQuantizationType.F16},
    )
    assert main(["inspect", mixed]) == 0
    lines = capsys.readouterr().out.splitlines()
    for kind, held in (("gate", "packed as q4_0"), ("up", "dense float32"), ("down", "dense float16")):
        assert held in next(line for line in lines if line.split()[:1] == [kind])
    unknown = made_file(tmp_path / "unknown.gguf", {"all": GGMLQuantizationType.I8})
    assert main(["inspect", unknown]) == 1
    assert "layer 3: cannot be loaded" in capsys.readouterr().out


def test_inspect_of_odd_metadata_shows_it_and_does_not_steer_the_terminal(capsys, tmp_path):
    pairs = [gguf_builder.key_value("general.architecture", gguf_builder.STRING, "a\x1b[2J")]
    pairs += [gguf_builder.key_value("a\x1b[2J.expert_count", gguf_builder.STRING, "many")]
    pairs += [gguf_builder.key_array("a\x1b[2J.expert_feed_forward_length", gguf_builder.U32, [3, 4])]
    tensor = gguf_builder.random_tensor(np.random.default_rng(0), GGMLQuantizationType.F32, (2, 2, 2))
    path = tmp_path / b"odd\xff.gguf".decode(errors="surrogateescape")
    path.write_bytes(gguf_builder.good_file({"blk.0.ffn_up_exps.weight": tensor}, pairs))
    assert main(["inspect", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "expert_count 'many', expert_feed_forward_length [3, 4]" in printed
    assert "layer 0: cannot be loaded" in printed


def test_inspect_of_a_file_without_experts_says_so(capsys, tmp_path):
    path = tmp_path / "dense.gguf"
    path.write_bytes(gguf_builder.good_file({}, [gguf_builder.key_value("general.architecture", 8, "llama")]))
    assert main(["inspect", str(path)]) == 0
    assert "no MoE layers" in capsys.readouterr().out


@pytest.fixture
def huge_file(tmp_path) -> str:
    """A sparse file of 3.6 GB: Q4_0, 18 bytes for 32 weights, E = 1024, I = 1024, H = 2048."""
    projections = (("gate", [2048, 1024, 1024]), ("up", [2048, 1024, 1024]), ("down", [1024, 2048, 1024]))
    size = 1024 * 1024 * 2048 // 32 * 18
    entries = [
        gguf_builder.tensor_entry(f"blk.0.ffn_{kind}_exps.weight", dims, int(GGMLQuantizationType.Q4_0), index * size)
        for index, (kind, dims) in enumerate(projections)
    ]
    pairs = [gguf_builder.key_value("general.architecture", gguf_builder.STRING, "qwen3moe")]
    path = tmp_path / "huge.gguf"
    path.write_bytes(gguf_builder.assemble(pairs, entries))
    os.truncate(path, (path.stat().st_size + 31) // 32 * 32 + 3 * size)
    return str(path)


def test_inspect_starts_no_jax_backend(huge_file):
    # A platform that does not exist fails any start.
    done = jmoe("inspect", huge_file, JAX_PLATFORMS="no_such_platform")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,208.0 MB" in done.stdout


def test_inspect_reads_no_tensor_data(huge_file, monkeypatch):
    monkeypatch.setattr(GgufFile, "read_into", None)
    assert main(["inspect", huge_file]) == 0


def test_run_writes_what_the_file_s_router_and_experts_give(capsys, tmp_path):
    """Layer 0 of Mixtral on llama.cpp's activations: its logits and top-k follow from the file alone."""
    recorded = np.load(DATA / "mixtral-Q6_K.npz")
    x = recorded["ffn_norm-0"]
    np.save(tmp_path / "x.npy", x)
    output = tmp_path / "y.npy"
    assert main(["run", MIXTRAL, "--layer", "0", "--input", str(tmp_path / "x.npy"), "--output", str(output)]) == 0
    assert "the file's router" in capsys.readouterr().out
    y = np.load(output)
    tensors = oracle.read_gguf(MIXTRAL)
    gate, up, down = (tensors[f"blk.0.ffn_{kind}_exps.weight"] for kind in ("gate", "up", "down"))
    exact = oracle.moe(oracle.Layer(gate, up, down), x, recorded["ffn_moe_topk-0"], recorded["ffn_moe_weights_norm-0"])
    # llama.cpp's router computes in f32, too, but rounds otherwise.
    assert oracle.nmse(y, exact) <= tolerances.KERNEL_F32.nmse
    assert y.dtype == np.float32


def test_run_with_a_seed_is_repeatable_and_keeps_float16(capsys, tmp_path):
    outputs = []
    for name in ("a.npy", "b.npy"):
        assert (
            main(["run", QWEN, "--layer", "1", "--tokens", "3", "--seed", "7", "--output", str(tmp_path / name)]) == 0
        )
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]
    np.save(tmp_path / "half.npy", np.ones((2, 256), np.float16))
    command = ["run", QWEN, "--layer", "0", "--input", str(tmp_path / "half.npy"), "--top-k", "1"]
    assert main([*command, "--output", str(tmp_path / "y.npy")]) == 0
    assert np.load(tmp_path / "y.npy").dtype == np.float16
    assert "to 1 of 8 experts" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["qwen2moe", "gpt-oss", "llama4", "nemotron-super"])
def test_inspect_and_run_know_whole_layers(capsys, tmp_path, name):
    case, path = layer_files.CASES[name], tmp_path / "layer.gguf"
    path.write_bytes(layer_files.file_of(case))
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    said = {
        "qwen2moe": (
            "top 2 of softmax, not normalised",
            "96 wide, gate bfloat16, up q5_0, down q8_0, gated by a sigmoid",
        ),
        "gpt-oss": ("softmax_top_k", "activation: swiglu_oai"),
        "llama4": ("sigmoid, chosen by logits", "weight: on the experts' input"),
        "nemotron-super": ("times 5, selection biased", "latent space: 32 wide", "activation: relu2"),
    }
    for words in (*said[name], "whole layer: 0.", "whole layers: 0."):
        assert words in printed
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    whole = report["layers"][0]["whole"]
    assert (whole["router"]["top_k"], whole["activation"], whole["weight_on"]) == (2, case.activation, case.weight_on)
    assert whole["shared_intermediate"] == (case.shared or None)
    assert whole["held_bytes"] == MoELayer.open_and_load(path, 0).nbytes == report["layer_held_bytes"]
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    command = [
        "run",
        str(path),
        "--layer",
        "0",
        "--input",
        str(tmp_path / "x.npy"),
        "--output",
        str(tmp_path / "y.npy"),
    ]
    assert main(command) == 0
    expected = layer_files.forward(case, layer_files.tensors_of(case), x)
    oracle.assert_within(np.load(tmp_path / "y.npy"), expected, tolerances.KERNEL_F32)


def test_inspect_says_why_a_layer_is_not_whole(capsys, tmp_path):
    path = tmp_path / "layer.gguf"
    path.write_bytes(layer_files.file_of(layer_files.CASES["qwen3moe"], arch="newmoe"))
    assert main(["inspect", str(path)]) == 0
    assert "as a whole layer: cannot be loaded" in capsys.readouterr().out


def test_run_says_where_routing_and_activation_are_not_the_model_s(capsys, tmp_path):
    path = Path(made_file(tmp_path / "a.gguf", {"all": GGMLQuantizationType.Q8_0}, expert_used_count=2))
    path.write_bytes(path.read_bytes().replace(b"olmoe", b"other"))
    assert main(["run", str(path), "--layer", "3", "--output", str(tmp_path / "y.npy")]) == 0
    captured = capsys.readouterr()
    assert "random logits" in captured.out
    assert "not what the model computes" in captured.err


def test_a_warning_of_the_loader_is_one_line(capsys, tmp_path):
    path = made_file(tmp_path / "iq3.gguf", {"all": GGMLQuantizationType.IQ3_S}, expert_used_count=2)
    assert main(["run", path, "--layer", "3", "--output", str(tmp_path / "y.npy")]) == 0
    *lines, note = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("jmoe: DenseFallbackWarning: ") for line in lines)
    assert note.startswith("jmoe: the file has no blk.3.ffn_gate_inp.weight: random routing")


@pytest.mark.parametrize("shape", ["tiny", MIXTRAL])
def test_bench_times_a_shape_and_a_file(capsys, shape):
    assert main(["bench", "--shape", shape, "--tokens", "1", "3", "--layers", "2", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "us/layer" in printed
    assert f"backend {on_cpu()}: " in printed


def test_bench_does_not_time_what_is_wrong(capsys, monkeypatch):
    from jmoe.cli import bench

    right = bench.moe_forward
    monkeypatch.setattr(bench, "moe_forward", lambda *args: right(*args) * 1.01)
    assert main(["bench", "--shape", "tiny", "--tokens", "1", "--repeats", "1"]) == 1
    assert "not timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["inspect"], "required: FILE"),
        (["inspect", "{tmp}/none.gguf"], "none.gguf: No such file or directory"),
        (["inspect", "{tmp}"], "Is a directory"),
        (["inspect", "{tmp}/text.gguf"], "not a GGUF file"),
        (["run", QWEN], "required: --layer"),
        (["run", QWEN, "--layer", "2"], "its MoE layers are 0, 1"),
        (["run", QWEN, "--layer", "-1"], "wanted an integer from 0 on, got '-1'"),
        (["run", QWEN, "--layer", "x"], "wanted an integer from 0 on, got 'x'"),
        (["run", QWEN, "--layer", "0", "--top-k", "9"], "more than the layer's 8 experts"),
        (["run", QWEN, "--layer", "0", "--input", "{tmp}/x.npy", "--tokens", "1"], "not both"),
        (["run", QWEN, "--layer", "0", "--input", "{tmp}/text.gguf"], "not a .npy array"),
        (["run", QWEN, "--layer", "0", "--input", "{tmp}/wide.npy"], "must be [T, 256]"),
        (["run", QWEN, "--layer", "0", "--input", "{tmp}/int.npy"], "got int64"),
        (["run", QWEN, "--layer", "0", "--input", "{tmp}/two.npz"], ".npz archive"),
        (["run", QWEN, "--layer", "0", "--input", "{tmp}/object.npy"], "not a .npy array"),
        (["run", QWEN, "--layer", "0", "--output", "{tmp}/none/y.npy"], "No such file or directory"),
        (["bench", "--shape", "gpt-5"], "neither a file nor one of tiny, "),
        (["bench", "--shape", "{tmp}/text.gguf"], "not a GGUF file"),
        (["bench", "--tokens", "0"], "wanted an integer from 1 on, got '0'"),
        (["bench", "--shape", "kimi-k2", "--layers", "100000"], "bytes of host memory"),
    ],
)
def test_wrong_use_is_one_line_and_exit_status_2(capsys, tmp_path, args, words):
    (tmp_path / "text.gguf").write_text("# nothing of the kind\n")
    np.save(tmp_path / "wide.npy", np.zeros((2, 512), np.float32))
    np.save(tmp_path / "int.npy", np.zeros((2, 256), np.int64))
    np.savez(tmp_path / "two.npz", np.zeros(2), np.zeros(3))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    assert words in error_of(capsys, *(arg.format(tmp=tmp_path) for arg in args))


def test_without_an_expert_count_run_asks_for_top_k(capsys, tmp_path):
    path = made_file(tmp_path / "a.gguf", {"all": GGMLQuantizationType.Q8_0})
    assert "--top-k" in error_of(capsys, "run", path, "--layer", 3)


def test_the_module_exits_with_main_s_status():
    done = jmoe("inspect", "no/such/file.gguf")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "jmoe: error: no/such/file.gguf: No such file or directory\n"


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m jmoe inspect {QWEN} --json | head -c 1"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


def test_help_of_every_command_names_its_options(capsys):
    for command, option in (("demo", "-h"), ("inspect", "--json"), ("run", "--top-k"), ("bench", "--tokens")):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert option in capsys.readouterr().out


def test_every_format_of_the_bench_shapes_is_packed():
    from jmoe.synthetic import MODELS

    assert {name for model in MODELS.values() for name in (model.gate, model.down)} <= set(FORMATS)
