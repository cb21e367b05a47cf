"""llama.cpp's own CPU kernels as a rival: one MoE layer through ggml, and the time it takes.

    y[t] = sum_k topk_weights[t,k] * down_e(silu(gate_e x[t]) * up_e x[t]),   e = topk_ids[t,k]

ggml's CPU backend runs the graph that llama.cpp builds after routing (build_moe_ffn in src/llama-graph.cpp: the same
operations in the same order), through ctypes and the shared libraries of the PyPI package llama-cpp-python, which is
compiled here for a fair race: `CMAKE_ARGS=-DGGML_NATIVE=on pip install --no-binary llama-cpp-python llama-cpp-python`.
ggml makes activations 8-bit: expect NMSE up to 1e-3. Its threads spin: beside other work its times mean nothing.
"""

import functools
import importlib.metadata
import itertools
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from ctypes import CDLL, CFUNCTYPE, POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

Array = np.ndarray
Shape = tuple[int, int, int, int]  # H, I, E, K
SHAPES: dict[str, Shape] = {"qwen3-30b-a3b": (2048, 768, 128, 8), "mixtral-8x7b": (4096, 14336, 8, 2)}


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


# Functions used of ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h: result, arguments, names.
_SIGNATURES = (
    (c_void_p, (), "ggml_backend_cpu_init ggml_backend_cpu_buffer_type"),
    (c_void_p, (_InitParams,), "ggml_init"),
    (c_void_p, (c_void_p,), "ggml_new_graph ggml_gallocr_new ggml_backend_get_device ggml_backend_dev_backend_reg"),
    (c_void_p, (c_void_p, c_char_p), "ggml_backend_reg_get_proc_address"),
    (c_void_p, (c_void_p, c_void_p), "ggml_cont ggml_backend_alloc_ctx_tensors_from_buft"),
    (c_void_p, (c_void_p,) * 3, "ggml_add ggml_mul ggml_swiglu_split"),
    (c_void_p, (c_void_p,) * 4, "ggml_mul_mat_id"),
    (c_void_p, (c_void_p, c_int, c_int, POINTER(c_int64)), "ggml_new_tensor"),
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
def _load_ggml() -> Any:
    # Found by metadata: `import llama_cpp` would find this very file when a program in benchmarks/ runs.
    packages = importlib.metadata.distributions(name="llama-cpp-python")
    libraries = [lib for p in packages for lib in Path(str(p.locate_file("llama_cpp/lib"))).glob("libggml.*")]
    if not libraries:
        return None
    ggml = CDLL(str(libraries[0]))
    for result, arguments, names in _SIGNATURES:
        for name in names.split():
            function = getattr(ggml, name)
            function.restype, function.argtypes = result, arguments
    return ggml


class _MoeGraph:
    """Chained MoE layers: weights, inputs, and the ggml graph that computes y. Closing `stack` frees their memory."""

    def __init__(self, stack: ExitStack, x: Array, types: Sequence[str], threads: int, repack: bool) -> None:
        self.ggml, self.stack, self.types = (ggml := _load_ggml()), stack, types
        # Contexts for headers only: 4 MiB hold those of 10,000 tensors.
        self.tensors, self.nodes = (ggml.ggml_init(_InitParams(4 << 20, None, True)) for _ in range(2))
        self.backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.device = ggml.ggml_backend_get_device(self.backend)
        self.graph, self.host = ggml.ggml_new_graph(self.nodes), ggml.ggml_backend_cpu_buffer_type()
        self.buffer_types = [*(_repacking_buffer_types(ggml, self.device) if repack else ()), self.host]
        self.activations = ggml.ggml_gallocr_new(self.host)
        stack.callback(ggml.ggml_free, self.tensors)
        stack.callback(ggml.ggml_free, self.nodes)
        stack.callback(ggml.ggml_backend_free, self.backend)
        stack.callback(ggml.ggml_gallocr_free, self.activations)
        self.y, self.topk_ids, self.hidden_size = self._put(x), list[int](), x.shape[1]

    def add_layer(self, blocks: Iterable[Array], topk_ids: Array, topk_weights: Array) -> None:
        """Make y the layer of y. blocks: gate, up, down, each u8[E, O, bytes of a row]."""
        ggml, nodes, (tokens, top_k), hidden = self.ggml, self.nodes, topk_ids.shape, self.hidden_size
        gate, up, down = (self._put_weight(*weight) for weight in zip(self.types, blocks, strict=True))
        ids = self._put(topk_ids)
        x = ggml.ggml_reshape_3d(nodes, self.y, hidden, 1, tokens)
        u = ggml.ggml_mul_mat_id(nodes, up, x, ids)  # f32[T, K, I]
        g = ggml.ggml_mul_mat_id(nodes, gate, x, ids)  # f32[T, K, I]
        h = ggml.ggml_swiglu_split(nodes, g, u)  # f32[T, K, I]
        y = ggml.ggml_mul_mat_id(nodes, down, h, ids)  # f32[T, K, H]
        y = ggml.ggml_mul(nodes, y, self._put(topk_weights[:, :, None]))
        slots = [ggml.ggml_view_2d(nodes, y, hidden, tokens, 4 * top_k * hidden, 4 * k * hidden) for k in range(top_k)]
        # llama.cpp orders the views before the adds.
        for slot in slots:
            ggml.ggml_build_forward_expand(self.graph, slot)
        y = functools.reduce(functools.partial(ggml.ggml_add, nodes), slots)  # f32[T, H]
        self.y = y if top_k > 1 else ggml.ggml_cont(nodes, y)
        ggml.ggml_build_forward_expand(self.graph, self.y)
        self.topk_ids.append(ids)

    def compute(self) -> float:
        """Compute y; the seconds it took."""
        self.ggml.ggml_gallocr_alloc_graph(self.activations, self.graph)
        start = time.perf_counter()
        if status := self.ggml.ggml_backend_graph_compute(self.backend, self.graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}, wanted 0 (GGML_STATUS_SUCCESS)")
        return time.perf_counter() - start

    def write(self, tensor: int, array: Array) -> None:
        array = np.ascontiguousarray(array)
        self.ggml.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)

    def _allocate(self, buffer_type: int, number: int, *sizes: int) -> int:
        """A tensor of ggml's type number. Sizes in ggml's order, the fastest dimension first: [E, O, D] is D, O, E."""
        tensor = self.ggml.ggml_new_tensor(self.tensors, number, len(sizes), (c_int64 * len(sizes))(*sizes))
        # Gives memory to every tensor of the context that has none: this one.
        buffer = self.ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.tensors, buffer_type)
        self.stack.callback(self.ggml.ggml_backend_buffer_free, buffer)
        return tensor

    def _put(self, array: Array) -> int:
        number = {"float32": GGMLQuantizationType.F32, "int32": GGMLQuantizationType.I32}[array.dtype.name]
        tensor = self._allocate(self.host, number, *reversed(array.shape))
        self.write(tensor, array)
        return tensor

    def _put_weight(self, type_name: str, blocks: Array) -> int:
        """Blocks in the first buffer type that has a kernel for them, as llama.cpp's loader chooses."""
        number, (experts, outputs, row_bytes) = GGMLQuantizationType[type_name.upper()], blocks.shape
        block_weights, block_bytes = GGML_QUANT_SIZES[number]
        depth = row_bytes // block_bytes * block_weights
        x, topk_ids = self._put(np.zeros((1, 1, depth), np.float32)), self._put(np.zeros((1, 1), np.int32))
        for buffer_type in self.buffer_types:
            # One that is refused takes addresses and no memory: nobody writes to it.
            weight = self._allocate(buffer_type, number, depth, outputs, experts)
            product = self.ggml.ggml_mul_mat_id(self.nodes, weight, x, topk_ids)
            if self.ggml.ggml_backend_dev_supports_op(self.device, product):
                self.write(weight, blocks)
                return weight
        raise ValueError(f"ggml has no CPU kernel for {type_name} {blocks.shape}. Use a type that llama.cpp runs.")


def _repacking_buffer_types(ggml: Any, device: int) -> list[int]:
    registry = ggml.ggml_backend_dev_backend_reg(device)
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    null_terminated = CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
    return list(itertools.takewhile(bool, map(null_terminated.__getitem__, itertools.count())))


def random_projection(rng: np.random.Generator, type_name: str, sizes: tuple[int, int, int]) -> Array:
    """Blocks u8[E, O, bytes of a row] that keep an input's variance: random picks of 4096 quantised gaussian blocks."""
    # To quantise a whole stack would take minutes, and no kernel's time depends on the values.
    number, (experts, outputs, depth) = GGMLQuantizationType[type_name.upper()], sizes
    block_weights, block_bytes = GGML_QUANT_SIZES[number]
    gaussians = rng.normal(0, depth**-0.5, 4096 * block_weights).astype(np.float32)
    pool = np.empty((4096, block_bytes), np.uint8)
    _load_ggml().ggml_quantize_chunk(number, gaussians.ctypes.data, pool.ctypes.data, 0, 1, gaussians.size, None)
    return pool[rng.integers(4096, size=(experts, outputs, depth // block_weights))].reshape(experts, outputs, -1)


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
    routes anew, so that decoding reads its experts from memory. llama.cpp interleaves the rows of some types at load
    (Q4_K on AVX2, say); repack=False is its `--no-repack`. Either may be faster: time both.
    """
    if _load_ggml() is None:
        return None
    hidden, intermediate, experts, top_k = SHAPES[shape] if isinstance(shape, str) else shape
    types, rng = (gate_type, up_type, down_type), np.random.default_rng(0)
    sizes = [(experts, intermediate, hidden)] * 2 + [(experts, hidden, intermediate)]
    # They keep the activations near 1 along the chain: silu(g) * u has rms 0.6, and K independent slots are added.
    topk_weights = np.full((tokens, top_k), top_k**-0.5 / 0.6, np.float32)
    with ExitStack() as stack:
        graph = _MoeGraph(stack, rng.standard_normal((tokens, hidden), np.float32), types, threads, repack)
        for _ in range(layers):
            blocks = (random_projection(rng, *weight) for weight in zip(types, sizes, strict=True))
            graph.add_layer(blocks, np.zeros((tokens, top_k), np.int32), topk_weights)
        seconds: list[float] = []
        for _ in range(repeats + 2):
            for topk_ids in graph.topk_ids:
                graph.write(topk_ids, rng.random((tokens, experts)).argsort(axis=1)[:, :top_k].astype(np.int32))
            seconds.append(graph.compute())
    # The first two touch fresh memory and start the threads.
    return float(np.median(seconds[2:])) / layers * 1e6


def moe_layer_output(
    blocks: Sequence[Array], types: Sequence[str], x: Array, topk_ids: Array, topk_weights: Array, repack: bool = True
) -> Array | None:
    """y f32[T,H] of one layer; blocks: gate, up, down as in a file, u8[E, O, row bytes]. None without the package."""
    if _load_ggml() is None:
        return None
    y = np.empty(x.shape, np.float32)
    with ExitStack() as stack:
        graph = _MoeGraph(stack, x, types, threads=2, repack=repack)
        graph.add_layer(blocks, topk_ids, topk_weights)
        graph.compute()
        graph.ggml.ggml_backend_tensor_get(graph.y, y.ctypes.data, 0, y.nbytes)
    return y
