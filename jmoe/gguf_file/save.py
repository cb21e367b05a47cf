"""Write expert stacks to a GGUF file: the tensors that ``load`` reads, byte for byte as the file had them.

The container is gguf-py's ``GGUFWriter``; an expert's planes are joined to blocks one expert at a time. The file is
written beside its place, read back as far as its header goes, and only then moved there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from jax.core import Tracer

from ..activations import Activation
from ..checks import check_stack
from ..devices import check_process
from ..formats import FORMATS
from ..stack import ExpertStack, QuantTensor
from .cursor import StringArray
from .errors import GgufError
from .file import GgufFile
from .header import BLOCK_SIZES
from .names import find_expert_layer
from .shards import StrPath
from .stacking import StackedLayers

Stacks = ExpertStack | Mapping[int, ExpertStack] | Iterable[StackedLayers]

_TENSORS = {
    "gate": "ffn_gate_exps.weight",
    "up": "ffn_up_exps.weight",
    "down": "ffn_down_exps.weight",
    "gate_bias": "ffn_gate_exps.bias",
    "up_bias": "ffn_up_exps.bias",
    "down_bias": "ffn_down_exps.bias",
    "down_scale": "ffn_down_exps.scale",
}
_DENSE = {
    np.dtype(np.float32): GGMLQuantizationType.F32,
    np.dtype(np.float16): GGMLQuantizationType.F16,
    np.dtype(jnp.bfloat16): GGMLQuantizationType.BF16,
}
# What says how another file was laid out.
_LAYOUT_KEYS = ("general.architecture", "general.alignment", "split.no", "split.count", "split.tensors.count")


class _Tensor(NamedTuple):
    """A tensor to be written; ``index``: the layer of a leaf with a leading layer axis, else ()."""

    ggml_type: GGMLQuantizationType
    shape: tuple[int, ...]
    leaf: Any
    index: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        block_weights, block_bytes = BLOCK_SIZES[self.ggml_type]
        return prod(self.shape) // block_weights * block_bytes

    def pieces(self) -> Iterator[np.ndarray]:
        """Its bytes in order: an expert, or a row, at a time."""
        # An array as index: of a Python number a new slice would be compiled for each expert.
        for entry in range(self.shape[0]):
            index = tuple(jnp.asarray(i, jnp.int32) for i in (*self.index, entry))
            piece = jax.device_get(self.leaf[index])
            yield FORMATS[piece.format].join(piece.planes) if isinstance(piece, QuantTensor) else piece


def save_gguf(
    path: StrPath,
    stacks: Stacks,
    *,
    architecture: str,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> None:
    """``blk.N.ffn_{gate,up,down}_exps.weight`` and the biases and scales there are: the inverse of loading.

    ``stacks``: one layer's stack (layer 0), stacks by layer index, or what ``load_expert_stacks`` gives, stacked or
    not. Packed projections become the bytes that they were read from, dense ones F32, F16 or BF16 by their dtype; so
    what was loaded with a DenseFallbackWarning is written as F32. Gate and up of one fused tensor are written as two.

    ``architecture`` names the keys: sizes are written as ``{architecture}.expert_count`` and so on, ``metadata`` adds
    or replaces keys (numbers, booleans, text, and lists or arrays of one kind; a GgufFile's ``metadata`` will do), such
    as ``{architecture}.expert_used_count``. ``tensors`` adds dense f32, f16 or bf16 arrays by their names in the file,
    such as the router's matrix ``blk.0.ffn_gate_inp.weight`` [E, H].

    An existing file is replaced in one step when all is written, and stays as it was where that fails. Raises TypeError
    or ValueError for arguments that cannot be written (formats that no file has, layers of different E or H, arrays
    of other processes, names given twice), GgufError where jmoe could not read the file back, OSError where the
    system refuses. Source: gguf.md of ggml; names as in llama.cpp.
    """
    check_process()
    if not isinstance(architecture, str) or not architecture:
        raise TypeError(f"architecture must be a name such as 'qwen3moe', got {architecture!r}")
    layers = _layers(stacks)
    table = {f"blk.{i}.{name}": tensor for i, layer in layers.items() for name, tensor in _tensors(i, *layer).items()}
    for name, array in (tensors or {}).items():
        if name in table:
            raise ValueError(f"tensors[{name!r}] is a tensor of the stacks already: leave it out")
        table[name] = _dense_tensor(f"tensors[{name!r}]", array)
    keys = {**_sizes(architecture, layers), **(metadata or {})}
    if (other := keys.get("general.architecture", architecture)) != architecture:
        raise ValueError(f"metadata says general.architecture is {other!r}, but architecture={architecture!r}")

    path = os.path.abspath(os.fsdecode(path))
    # Beside the file, for a move across file systems is no single step; a directory, so that whatever fails is cleared.
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix=".jmoe-save-") as directory:
        written = os.path.join(directory, "model.gguf")
        _write(written, architecture, keys, table)
        try:
            with GgufFile(written) as gguf:
                for layer_idx in layers:
                    find_expert_layer(gguf, layer_idx)
        except GgufError as error:
            raise GgufError(str(error).replace(written, path)) from None
        os.replace(written, path)


def _write(path: str, architecture: str, keys: Mapping[str, Any], table: Mapping[str, _Tensor]) -> None:
    writer = GGUFWriter(path, architecture)
    try:
        for key, value in keys.items():
            if key not in _LAYOUT_KEYS:
                _add_key(writer, key, value)
        for name, tensor in table.items():
            # Of bytes the writer would want the shape in bytes.
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.ggml_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (out,) = writer.fout
        writer.write_padding(out, out.tell())
        for tensor in table.values():
            for piece in tensor.pieces():
                out.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
            writer.write_padding(out, tensor.nbytes)
        out.flush()
        os.fsync(out.fileno())
    finally:
        writer.close()


def _layers(stacks: Any) -> dict[int, tuple[ExpertStack, tuple[int, ...]]]:
    """Layer index -> its stack, and its place in the stack's layer axis where there is one; ascending."""
    if isinstance(stacks, ExpertStack):
        stacks = {0: stacks}
    if isinstance(stacks, Mapping):
        found = [(layer, stack, ()) for layer, stack in stacks.items()]
    else:
        stacks = tuple(stacks)
        if wrong := next((s for s in stacks if not isinstance(s, StackedLayers)), None):
            raise TypeError(f"stacks must be an ExpertStack, a mapping of them or StackedLayers, got {type(wrong)}")
        found = [(layer, s.stack, (place,)) for s in stacks for place, layer in enumerate(s.layers)]
    layers: dict[int, tuple[ExpertStack, tuple[int, ...]]] = {}
    for layer, stack, index in found:
        if type(layer) is not int or not 0 <= layer < 10**6:
            raise ValueError(f"layers are numbered from 0 to 999999, got {layer!r}")
        if layer in layers:
            raise ValueError(f"layer {layer} comes twice")
        # Either activation: whether the layer has a gate is the stack's own affair.
        gateless = getattr(stack, "gate", 0) is None
        check_stack(stack, index[0] if index else None, Activation("relu2" if gateless else "silu"))
        layers[layer] = stack, index
    if not layers:
        raise ValueError("there is no stack to save")
    for what in ("num_experts", "hidden_size"):
        sizes = {layer: getattr(stack, what) for layer, (stack, _) in layers.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the layers of a file have one {what}, got {sizes} by layer: save them to several files")
    return dict(sorted(layers.items()))


def _tensors(layer_idx: int, stack: ExpertStack, index: tuple[int, ...]) -> dict[str, _Tensor]:
    """By the names behind ``blk.N.``."""
    table = {}
    for field, name in _TENSORS.items():
        leaf, what = getattr(stack, field), f"{field} of layer {layer_idx}"
        if isinstance(leaf, QuantTensor):
            if leaf.format not in FORMATS:
                raise ValueError(
                    f"{what} is in {leaf.format}, which no file has: save the stack as it was before jmoe.for_mps"
                )
            jax.tree.map(lambda plane, what=what: _require_here(what, plane), leaf.planes)
            table[name] = _Tensor(FORMATS[leaf.format].ggml_type, leaf.shape[len(index) :], leaf, index)
        elif leaf is not None:
            table[name] = _dense_tensor(what, leaf, index)
    return table


def _dense_tensor(what: str, array: Any, index: tuple[int, ...] = ()) -> _Tensor:
    _require_here(what, array)
    if array.dtype not in _DENSE or not 1 <= len(array.shape) - len(index) <= 4 or 0 in array.shape:
        raise TypeError(f"{what} must be f32, f16 or bf16 with one to four axes, got {array.dtype}{list(array.shape)}")
    return _Tensor(_DENSE[array.dtype], array.shape[len(index) :], array, index)


def _require_here(what: str, array: Any) -> None:
    if isinstance(array, Tracer) or not isinstance(array, jax.Array | np.ndarray):
        raise TypeError(f"{what} must be an array with values, got {type(array).__name__}: save outside jit")
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            f"{what} lies on devices of other processes too: gather it first, or save it with orbax, which writes"
            " what each process has"
        )


def _sizes(architecture: str, layers: Mapping[int, tuple[ExpertStack, Any]]) -> dict[str, Any]:
    """The keys that the tensors' shapes imply."""
    inner = {layer: stack.expert_intermediate for layer, (stack, _) in layers.items()}
    stack, same = next(iter(layers.values()))[0], len(set(inner.values())) == 1
    keys = {
        "expert_count": stack.num_experts,
        "embedding_length": stack.hidden_size,
        # An array has an entry for each layer up to the last, 0 where it has no experts.
        "expert_feed_forward_length": (
            stack.expert_intermediate if same else [inner.get(layer, 0) for layer in range(max(layers) + 1)]
        ),
    }
    # Of single layers out of a model the file does not know how many the model has.
    if list(layers) == list(range(len(layers))):
        keys["block_count"] = len(layers)
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def _add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.name.upper() in GGUFValueType.__members__:
        kind, value = GGUFValueType[value.dtype.name.upper()], value.tolist()
    elif isinstance(value, StringArray | tuple | list):
        value = list(value)
        kinds = {_value_type(key, item) for item in value}
        if not kinds:  # the format has no word for an empty list of nothing
            return
        if len(kinds) > 1:
            raise TypeError(f"metadata[{key!r}] must be of one kind, got {', '.join(sorted(k.name for k in kinds))}")
        (kind,) = kinds
    else:
        kind = _value_type(key, value)
    if not isinstance(value, list):
        writer.add_key_value(key, value, kind)
    elif value:
        writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)


def _value_type(key: str, value: Any) -> GGUFValueType:
    """u32 for what fits, as llama.cpp wants its sizes, and f32."""
    match value:
        case bool():
            return GGUFValueType.BOOL
        case str():
            return GGUFValueType.STRING
        case float():
            return GGUFValueType.FLOAT32
        case int() if 0 <= value < 1 << 32:
            return GGUFValueType.UINT32
        case int() if -(1 << 63) <= value < 1 << 63:
            return GGUFValueType.INT64
    raise TypeError(f"metadata[{key!r}] must be a number of 64 bits, a boolean, text or a list of one kind: {value!r}")
