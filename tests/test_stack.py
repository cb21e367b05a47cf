"""QuantTensor and ExpertStack are plain pytrees: what JAX does to their leaves, their sizes and views follow."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, ONE_FORMAT, PROJECTIONS, SMALL, Case, ExpertBlocks, random_routing, random_stack

from jmoe import FORMATS, ExpertStack, QuantTensor, moe_forward

TINY, RAGGED, MIXED = CASES["tiny"], CASES["ragged"], CASES["mixed"]
STACK_CASES = [CASES[name] for name in (*SMALL, *ONE_FORMAT)]


def assert_same(left: object, right: object) -> None:
    """Same tree, same static fields, same bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", STACK_CASES, ids=lambda case: case.name)
def test_sizes_formats_and_bytes_come_from_the_leaves(case: Case):
    stack = random_stack(case)
    assert (stack.num_experts, stack.hidden_size, stack.expert_intermediate) == (
        case.num_experts,
        case.hidden_size,
        case.expert_intermediate,
    )
    assert stack.formats == (case.gate, case.up, case.down)
    assert stack.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(stack))
    for name in PROJECTIONS:
        projection = getattr(stack, name)
        assert projection.shape == case.shape(name)
        packed = projection if case.format(name) in FORMATS else None
        assert getattr(stack, f"{name}_stacked") is packed
        if packed is not None:
            assert packed.nbytes == sum(plane.nbytes for plane in packed.planes)


@pytest.mark.parametrize("case", STACK_CASES, ids=lambda case: case.name)
def test_leaves_are_arrays_and_integers_where_packed(case: Case):
    stack = random_stack(case)
    for name in PROJECTIONS:
        kind = jnp.integer if case.format(name) in FORMATS else jnp.floating
        for leaf in jax.tree.leaves(getattr(stack, name)):
            assert isinstance(leaf, jax.Array)
            assert jnp.issubdtype(leaf.dtype, kind)


@pytest.mark.parametrize("case", STACK_CASES, ids=lambda case: case.name)
def test_views_of_one_expert_are_its_dequantised_rows_gate_first(case: Case):
    stack, views = random_stack(case), jax.jit(lambda stack, e: (stack.gate_up(e), stack.down_of(e)))
    for expert in {0, case.num_experts - 1}:
        gate, up, down = (
            oracle.dequantise(ExpertBlocks(case, name)[expert], case.format(name)) for name in PROJECTIONS
        )
        gate_up, down_of = views(stack, expert)
        np.testing.assert_array_equal(gate_up, np.concatenate([gate, up]))
        np.testing.assert_array_equal(down_of, down)


def test_views_outside_jit_are_the_same():
    stack = random_stack(TINY)
    gate_up, down = jax.jit(lambda s, e: (s.gate_up(e), s.down_of(e)))(stack, 3)
    np.testing.assert_array_equal(gate_up, stack.gate_up(3))
    np.testing.assert_array_equal(down, stack.down_of(3))


def test_gate_up_of_a_stack_without_a_gate_is_up_alone():
    stack = dataclasses.replace(random_stack(TINY), gate=None)
    np.testing.assert_array_equal(stack.gate_up(1), random_stack(TINY).up[1].dequantise())
    assert stack.formats.gate is None
    assert stack.gate_stacked is None


@pytest.mark.parametrize("name", FORMATS)
def test_indexing_and_dequantising_commute(name):
    tensor = random_stack(CASES[name]).gate
    dequantise = jax.jit(QuantTensor.dequantise)
    everything = np.asarray(dequantise(tensor))
    for index in (2, -1, slice(1, 3), (0,), np.array([3, 0, 3])):
        part = tensor[index]
        assert part.shape == everything[index].shape
        np.testing.assert_array_equal(dequantise(part), everything[index])


def test_rows_and_weights_of_a_packed_tensor_cannot_be_indexed():
    tensor = random_stack(TINY).up
    assert tensor.ndim == 3
    with pytest.raises(IndexError, match=r"first 1 axes only, got \(0, 1\).*Dequantise an expert first"):
        tensor[0, 1]


def test_fields_cannot_be_assigned():
    stack = random_stack(TINY)
    for pytree, field in ((stack, "gate"), (stack.up, "format"), (stack.up, "planes")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(pytree, field, None)


@pytest.mark.parametrize("copied", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy])
@pytest.mark.parametrize("case", [MIXED, CASES["dense-down"]], ids=lambda case: case.name)
def test_a_pickled_or_copied_stack_has_the_same_bits_and_formats(case: Case, copied):
    stack = random_stack(case)
    other = copied(stack)
    assert other is not stack
    assert_same(other, stack)
    assert other.formats == stack.formats


def test_flatten_and_unflatten_through_jit_give_the_same_stack():
    stack = random_stack(MIXED)
    assert_same(jax.jit(lambda s: s)(stack), stack)
    leaves, structure = jax.tree.flatten(stack)
    assert_same(jax.tree.unflatten(structure, leaves), stack)


def test_formats_are_part_of_the_structure():
    # Q4_0 and Q8_0 have planes of one name each; another format must not be taken for the same program.
    structures = {jax.tree.structure(random_stack(CASES[name])) for name in FORMATS}
    assert len(structures) == len(FORMATS)


def test_paths_of_leaves_are_readable():
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(random_stack(TINY))}
    assert {".gate.planes.codes", ".gate.planes.dmin", ".down.planes.high"} <= paths


def test_tree_map_may_hold_anything():
    stack = random_stack(TINY)
    axes = jax.tree.map(lambda _: 0, stack)
    assert isinstance(axes, ExpertStack)
    assert jax.tree.structure(axes) == jax.tree.structure(stack)
    assert repr(axes).startswith("ExpertStack(gate=Q4KPlanes(codes=0, scales=0,")
    assert repr(axes.up) == "QuantTensor(Q4KPlanes(codes=0, scales=0, mins=0, d=0, dmin=0))"
    assert jax.tree.leaves(jax.tree.map(lambda _: None, stack)) == []


def test_shapes_alone_have_the_same_sizes():
    stack = random_stack(RAGGED)
    shapes = jax.eval_shape(lambda s: s, stack)
    assert shapes.nbytes == stack.nbytes
    assert shapes.formats == stack.formats
    assert repr(shapes) == repr(stack)


@pytest.mark.parametrize("case", [TINY, RAGGED, CASES["dense-down"]], ids=lambda case: case.name)
def test_sizes_inside_vmap_are_those_of_one_element(case: Case):
    stacks = [random_stack(case, seed) for seed in (1, 2, 3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacks)
    assert batch.num_experts == case.num_experts
    assert batch.up.shape == (3, *case.shape("up"))
    seen = []

    def down_of_last(stack: ExpertStack) -> jax.Array:
        seen.append((stack.num_experts, stack.hidden_size, stack.expert_intermediate, stack.nbytes))
        return stack.down_of(stack.num_experts - 1)

    downs = jax.vmap(down_of_last)(batch)
    assert seen == [(case.num_experts, case.hidden_size, case.expert_intermediate, stacks[0].nbytes)]
    np.testing.assert_array_equal(downs, [s.down_of(case.num_experts - 1) for s in stacks])


def test_vmap_over_the_experts_of_a_packed_tensor():
    tensor = random_stack(TINY).down
    np.testing.assert_array_equal(jax.vmap(lambda expert: expert.dequantise())(tensor), tensor.dequantise())


def test_scan_over_a_layer_axis_sees_one_layer_a_step():
    stacks = [random_stack(MIXED, seed) for seed in (1, 2)]
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacks)

    def step(carry: int, stack: ExpertStack) -> tuple[int, jax.Array]:
        assert stack.num_experts == MIXED.num_experts
        return carry, stack.gate_up(0)

    _, gate_up = jax.lax.scan(step, 0, layers)
    np.testing.assert_array_equal(gate_up, [s.gate_up(0) for s in stacks])


def test_repr_names_formats_shapes_and_bytes():
    stack = random_stack(TINY)
    assert repr(stack.up) == f"QuantTensor(q4_k[4, 256, 256] {stack.up.nbytes / 1e6:.1f} MB)"
    assert repr(stack).startswith("ExpertStack(gate=q4_k[4, 256, 256] ")
    assert "down=q6_k[4, 256, 256]" in repr(stack)
    assert "bias" not in repr(stack)
    assert "down_bias=float32[4, 256]" in repr(dataclasses.replace(stack, down_bias=jnp.zeros((4, 256))))


def test_grad_with_respect_to_a_packed_stack_is_refused(rng):
    stack = random_stack(TINY)
    ids, weights = random_routing(rng, 2, TINY)
    with pytest.raises(TypeError, match="uint8"):
        jax.grad(lambda s: moe_forward(s, jnp.ones((2, TINY.hidden_size)), ids, weights).sum())(stack)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, np.float16])
def test_from_dense_stacks_takes_flat_and_shaped_arrays(dtype, rng):
    sizes = {"num_experts": 3, "hidden_size": 8, "expert_intermediate": 5}
    gate, up = (rng.standard_normal((3, 5, 8)).astype(dtype) for _ in range(2))
    down = rng.standard_normal((3, 8, 5)).astype(dtype)
    shaped = ExpertStack.from_dense_stacks(gate, up, down, **sizes)
    flat = ExpertStack.from_dense_stacks(*(jnp.asarray(a).reshape(-1) for a in (gate, up, down)), **sizes)
    assert_same(shaped, flat)
    assert (shaped.num_experts, shaped.hidden_size, shaped.expert_intermediate) == (3, 8, 5)
    assert set(shaped.formats) == {jnp.dtype(dtype).name}
    assert shaped.gate_stacked is shaped.up_stacked is shaped.down_stacked is None
    np.testing.assert_array_equal(shaped.gate_up(2), np.concatenate([gate[2], up[2]]).astype(np.float32))
    np.testing.assert_array_equal(shaped.down_of(0), down[0].astype(np.float32))
    assert ExpertStack.from_dense_stacks(None, up, down, **sizes).gate is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 9}, r"gate must be \[3, 5, 9\] or flat with 135 elements, got \[3, 5, 8\].*Check num_experts"),
        ({"down": np.zeros((3, 5, 8), np.float32)}, r"down must be \[3, 8, 5\] or flat with 120 .* got \[3, 5, 8\]"),
        ({"up": np.zeros(119, np.float32)}, r"up must be \[3, 5, 8\] or flat with 120 elements, got \[119\]"),
        ({"up": np.zeros((3, 40), np.float32)}, r"up must be .* got \[3, 40\]"),
        ({"gate": np.zeros((3, 5, 8), np.int8)}, r"gate must be a floating-point array, got int8\[3, 5, 8\]"),
    ],
)
def test_from_dense_stacks_refuses_what_does_not_fit(change, message):
    wide, tall = np.zeros((3, 5, 8), np.float32), np.zeros((3, 8, 5), np.float32)
    arguments = {"gate": wide, "up": wide, "down": tall, "num_experts": 3, "hidden_size": 8, "expert_intermediate": 5}
    with pytest.raises(ValueError, match=message):
        ExpertStack.from_dense_stacks(**{**arguments, **change})


def test_a_quant_tensor_is_built_from_split_planes(rng):
    blocks = np.stack(list(ExpertBlocks(TINY, "down")))
    tensor = QuantTensor("q6_k", jax.tree.map(jnp.asarray, FORMATS["q6_k"].split(blocks)))
    assert_same(tensor, random_stack(TINY).down)
    np.testing.assert_array_equal(tensor.dequantise(), oracle.dequantise(blocks, "q6_k"))
