"""llama.cpp's own CPU kernels as a rival: one MoE layer through ggml, and the time it takes.

    y[t] = sum_k topk_weights[t,k] * down_e(silu(gate_e x[t]) * up_e x[t]),   e = topk_ids[t,k]

The graph is the one llama.cpp builds after routing (build_moe_ffn in src/llama-graph.cpp: the same operations in the
same order), run by ggml's CPU backend. ggml comes as shared libraries inside the PyPI package llama-cpp-python and is
called through ctypes. The package is optional: without it the functions return None. For a fair rival build it for the
machine: `CMAKE_ARGS=-DGGML_NATIVE=on pip install --no-binary llama-cpp-python llama-cpp-python`.

Weights lie where llama.cpp puts them: it rewrites some types (Q4_K on AVX2, say) into an interleaved layout at load.
`repack=False` is its `--no-repack`. Which one is faster depends on the type and on the number of tokens: time both.
"""

import ctypes
import functools
import importlib.metadata
import itertools
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray


class Shape(NamedTuple):
    hidden_size: int
    expert_intermediate: int
    num_experts: int
    top_k: int


SHAPES = {"qwen3-30b-a3b": Shape(2048, 768, 128, 8), "mixtral-8x7b": Shape(4096, 14336, 8, 2)}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


# Functions used of ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h: result, arguments, names.
_SIGNATURES = (
    (c_size_t, (), "ggml_tensor_overhead ggml_graph_overhead"),
    (c_void_p, (), "ggml_backend_cpu_reg ggml_backend_cpu_init ggml_backend_cpu_buffer_type"),
    (c_void_p, (_InitParams,), "ggml_init"),
    (c_void_p, (c_void_p,), "ggml_new_graph ggml_gallocr_new"),
    (c_void_p, (c_void_p, c_size_t), "ggml_backend_reg_dev_get"),
    (c_void_p, (c_void_p, c_char_p), "ggml_backend_reg_get_proc_address"),
    (c_void_p, (c_void_p, c_void_p), "ggml_cont ggml_backend_alloc_ctx_tensors_from_buft"),
    (c_void_p, (c_void_p,) * 3, "ggml_add ggml_mul ggml_swiglu_split"),
    (c_void_p, (c_void_p,) * 4, "ggml_mul_mat_id"),
    (c_void_p, (c_void_p, c_int, c_int, ctypes.POINTER(c_int64)), "ggml_new_tensor"),
    (c_void_p, (c_void_p, c_void_p, c_int64, c_int64, c_int64), "ggml_reshape_3d"),
    (c_void_p, (c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t), "ggml_view_2d"),
    (c_bool, (c_void_p, c_void_p), "ggml_gallocr_alloc_graph ggml_backend_dev_supports_op"),
    (c_int, (c_void_p, c_void_p), "ggml_backend_graph_compute"),
    (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p), "ggml_quantize_chunk"),
    (None, (c_void_p,), "ggml_free ggml_gallocr_free ggml_backend_free ggml_backend_buffer_free"),
    (None, (c_void_p, c_void_p), "ggml_build_forward_expand"),
    (None, (c_void_p, c_int), "ggml_backend_cpu_set_n_threads"),
    (None, (c_void_p, c_void_p, c_size_t, c_size_t), "ggml_backend_tensor_set ggml_backend_tensor_get"),
)


@functools.cache
def _load_ggml() -> Any | None:
    # Found through its metadata: `import llama_cpp` would find this very file when a program in benchmarks/ runs.
    try:
        package = importlib.metadata.distribution("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(package.locate_file("llama_cpp/lib")))
    ggml = ctypes.CDLL(str(next(path for path in folder.glob("libggml.*") if path.suffix in (".so", ".dylib"))))
    for result, arguments, names in _SIGNATURES:
        for name in names.split():
            function = getattr(ggml, name)
            function.restype, function.argtypes = result, arguments
            if result is c_void_p:
                function.errcheck = _refuse_null
    return ggml


def _refuse_null(result: int | None, function: Any, _arguments: Any) -> int:
    if result is None:
        raise MemoryError(f"{function.__name__} returned NULL, wanted memory. Use fewer layers or tokens.")
    return result


class _MoeGraph:
    """Chained MoE layers in ggml: weights, inputs, and the graph that computes them."""

    def __init__(
        self, shape: Shape, tokens: int, types: Sequence[str], layers: int, threads: int, repack: bool
    ) -> None:
        self.ggml = ggml = _load_ggml()
        self.shape, self.tokens, self.stack = shape, tokens, ExitStack()
        hidden, intermediate, experts, top_k = shape
        host = ggml.ggml_backend_cpu_buffer_type()
        buffer_types = [*(_repacking_buffer_types(ggml) if repack else ()), host]
        # ggml lists the fastest dimension first: a projection [E, O, D] is (D, O, E).
        packed = [(hidden, intermediate, experts)] * 2 + [(intermediate, hidden, experts)]
        self.x = self._new_tensor(self.stack, host, "f32", hidden, 1, tokens)
        self.topk_ids = [self._new_tensor(self.stack, host, "i32", top_k, tokens) for _ in range(layers)]
        self.topk_weights = [self._new_tensor(self.stack, host, "f32", 1, top_k, tokens) for _ in range(layers)]
        self.weights = [
            [self._new_weight(buffer_types, name, sizes) for name, sizes in zip(types, packed, strict=True)]
            for _ in range(layers)
        ]
        context = self._new_context(self.stack, tensors=2048)
        self.graph = ggml.ggml_new_graph(context)
        self.y = self.x
        for layer in zip(self.weights, self.topk_ids, self.topk_weights, strict=True):
            self.y = self._add_layer(context, self.y, *layer)
        activations = ggml.ggml_gallocr_new(host)
        self.stack.callback(ggml.ggml_gallocr_free, activations)
        if not ggml.ggml_gallocr_alloc_graph(activations, self.graph):
            raise MemoryError(f"ggml could not allocate the activations of {tokens} tokens. Use fewer.")
        self.backend = ggml.ggml_backend_cpu_init()
        self.stack.callback(ggml.ggml_backend_free, self.backend)
        ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)

    def _new_context(self, stack: ExitStack, tensors: int) -> int:
        size = tensors * self.ggml.ggml_tensor_overhead() + self.ggml.ggml_graph_overhead()
        context = self.ggml.ggml_init(_InitParams(size, None, True))
        stack.callback(self.ggml.ggml_free, context)
        return context

    def _new_tensor(self, stack: ExitStack, buffer_type: int, type_name: str, *sizes: int) -> int:
        context = self._new_context(stack, tensors=1)
        number = GGMLQuantizationType[type_name.upper()]
        tensor = self.ggml.ggml_new_tensor(context, number, len(sizes), (c_int64 * len(sizes))(*sizes))
        buffer = self.ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        stack.callback(self.ggml.ggml_backend_buffer_free, buffer)
        return tensor

    def _new_weight(self, buffer_types: Sequence[int], type_name: str, sizes: tuple[int, int, int]) -> int:
        """A weight in the first buffer type that has a kernel for it, as llama.cpp's loader chooses."""
        device = self.ggml.ggml_backend_reg_dev_get(self.ggml.ggml_backend_cpu_reg(), 0)
        for buffer_type in buffer_types:
            with ExitStack() as attempt:
                weight = self._new_tensor(attempt, buffer_type, type_name, *sizes)
                x = self._new_tensor(attempt, buffer_types[-1], "f32", sizes[0], 1, 1)
                topk_ids = self._new_tensor(attempt, buffer_types[-1], "i32", 1, 1)
                product = self.ggml.ggml_mul_mat_id(self._new_context(attempt, tensors=1), weight, x, topk_ids)
                if self.ggml.ggml_backend_dev_supports_op(device, product):
                    self.stack.push(attempt.pop_all())
                    return weight
        raise ValueError(f"ggml has no CPU kernel for {type_name} of sizes {sizes}. Use a type that llama.cpp runs.")

    def _add_layer(self, context: int, x: int, weights: Sequence[int], topk_ids: int, topk_weights: int) -> int:
        ggml, (hidden, _, _, top_k) = self.ggml, self.shape
        gate, up, down = weights
        x = ggml.ggml_reshape_3d(context, x, hidden, 1, self.tokens)
        u = ggml.ggml_mul_mat_id(context, up, x, topk_ids)  # f32[T, K, I]
        g = ggml.ggml_mul_mat_id(context, gate, x, topk_ids)  # f32[T, K, I]
        h = ggml.ggml_swiglu_split(context, g, u)  # f32[T, K, I]
        y = ggml.ggml_mul_mat_id(context, down, h, topk_ids)  # f32[T, K, H]
        y = ggml.ggml_mul(context, y, topk_weights)
        row = hidden * np.float32().itemsize
        slots = [ggml.ggml_view_2d(context, y, hidden, self.tokens, top_k * row, k * row) for k in range(top_k)]
        # The views before the adds: llama.cpp's order, on which the reuse of activation memory depends.
        for slot in slots:
            ggml.ggml_build_forward_expand(self.graph, slot)
        y = functools.reduce(functools.partial(ggml.ggml_add, context), slots)  # f32[T, H]
        y = y if top_k > 1 else ggml.ggml_cont(context, y)
        ggml.ggml_build_forward_expand(self.graph, y)
        return y

    def write(self, tensor: int, values: NDArray[Any]) -> None:
        values = np.ascontiguousarray(values)
        self.ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)

    def compute(self) -> None:
        if status := self.ggml.ggml_backend_graph_compute(self.backend, self.graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}, wanted 0 (GGML_STATUS_SUCCESS)")

    def read_y(self) -> NDArray[np.float32]:
        y = np.empty((self.tokens, self.shape.hidden_size), np.float32)
        self.ggml.ggml_backend_tensor_get(self.y, y.ctypes.data, 0, y.nbytes)
        return y

    def close(self) -> None:
        self.stack.close()


def _repacking_buffer_types(ggml: Any) -> list[int]:
    registry = ggml.ggml_backend_cpu_reg()
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    list_buffer_types = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
    null_terminated = list_buffer_types(ggml.ggml_backend_reg_dev_get(registry, 0))
    return list(itertools.takewhile(bool, map(null_terminated.__getitem__, itertools.count())))


def random_blocks(rng: np.random.Generator, type_name: str, weights: int, deviation: float) -> NDArray[np.uint8]:
    """Blocks of so many weights, u8[blocks, bytes of a block]: random picks from 4096 quantised gaussian ones.

    To quantise a whole stack would take minutes, and no kernel's time depends on the values.
    """
    number = GGMLQuantizationType[type_name.upper()]
    block_weights, block_bytes = GGML_QUANT_SIZES[number]
    gaussians = rng.normal(0, deviation, 4096 * block_weights).astype(np.float32)
    pool = np.empty((4096, block_bytes), np.uint8)
    ggml = _load_ggml()
    ggml.ggml_quantize_chunk(number, gaussians.ctypes.data, pool.ctypes.data, 0, 1, gaussians.size, None)
    return pool[rng.integers(4096, size=weights // block_weights)]


def moe_layer_us(
    shape: str | Shape,
    tokens: int,
    gate_type: str,
    up_type: str,
    down_type: str,
    *,
    threads: int,
    layers: int = 4,
    repeats: int = 21,
    repack: bool = True,
) -> float | None:
    """Median wall time of a chain of layers, divided by their number, in microseconds. None without llama-cpp-python.

    shape: a name in SHAPES, or sizes; types: names such as "q4_k". Each layer has its own weights and every repeat
    routes anew: decoding then reads its experts from memory and not from a cache, as in a real model.
    """
    if _load_ggml() is None:
        return None
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    hidden, intermediate, experts, top_k = shape
    types = (gate_type, up_type, down_type)
    # Keeps the activations near 1 along the chain: silu(g) * u has rms 0.6, and K slots are averaged.
    deviations = (hidden**-0.5, hidden**-0.5, (top_k / intermediate) ** 0.5 / 0.6)
    rng = np.random.default_rng(0)
    with closing(_MoeGraph(shape, tokens, types, layers, threads, repack)) as graph:
        for weights in graph.weights:
            for weight, type_name, deviation in zip(weights, types, deviations, strict=True):
                graph.write(weight, random_blocks(rng, type_name, experts * hidden * intermediate, deviation))
        graph.write(graph.x, rng.standard_normal((tokens, hidden), np.float32))
        for topk_weights in graph.topk_weights:
            graph.write(topk_weights, rng.dirichlet([9] * top_k, tokens).astype(np.float32))
        seconds: list[float] = []
        for _ in range(repeats + 2):
            for topk_ids in graph.topk_ids:
                graph.write(topk_ids, rng.random((tokens, experts)).argsort(axis=1)[:, :top_k].astype(np.int32))
            start = time.perf_counter()
            graph.compute()
            seconds.append(time.perf_counter() - start)
    # The first two touch fresh memory and start the threads.
    return statistics.median(seconds[2:]) / layers * 1e6


def moe_layer_output(
    weights: Sequence[NDArray[np.uint8]],
    types: Sequence[str],
    x: NDArray[np.float32],
    topk_ids: NDArray[np.int32],
    topk_weights: NDArray[np.float32],
    *,
    threads: int = 2,
    repack: bool = True,
) -> NDArray[np.float32] | None:
    """y f32[T,H] of one layer, or None without llama-cpp-python; NMSE up to 1e-3, as activations become 8-bit.

    weights and types: gate, up, down as blocks in a GGUF file, u8[E, O, bytes of a row]. x f32[T,H].
    """
    if _load_ggml() is None:
        return None
    experts, intermediate = weights[0].shape[:2]
    shape = Shape(x.shape[1], intermediate, experts, topk_ids.shape[1])
    with closing(_MoeGraph(shape, x.shape[0], types, layers=1, threads=threads, repack=repack)) as graph:
        values = (*weights, x.astype(np.float32), topk_ids.astype(np.int32), topk_weights.astype(np.float32))
        tensors = (*graph.weights[0], graph.x, *graph.topk_ids, *graph.topk_weights)
        for tensor, value in zip(tensors, values, strict=True):
            graph.write(tensor, value)
        graph.compute()
        return graph.read_y()
