"""Save a packed stack and a router in training with orbax, and restore them onto every device that there is.

    python examples/checkpoint.py tests/data/qwen3moe-Q4_K_M.gguf

The stack stays packed on disk and on the way back: an orbax checkpoint holds its integer planes, and each device reads
its own experts. Orbax stores arrays by name and knows nothing of formats: they stand beside, and make the template.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jmoe import FORMATS, ExpertStack, QuantTensor, RouterConfig, moe_forward, route

CONFIG = RouterConfig(top_k=2)


def template(formats: list[str], shape: list[int]) -> ExpertStack:
    """The stack's shapes and dtypes, from the formats of gate, up and down and up's (E, I, H): no array is made."""
    experts, inner, hidden = shape
    shapes = (experts, inner, hidden), (experts, inner, hidden), (experts, hidden, inner)

    def projection(name: str, shape: tuple[int, int, int]) -> QuantTensor | jax.ShapeDtypeStruct:
        packed = FORMATS.get(name)
        return QuantTensor(name, packed.plane_specs(shape)) if packed else jax.ShapeDtypeStruct(shape, jnp.dtype(name))

    return ExpertStack(*map(projection, formats, shapes))


def save(directory: Path, state: dict[str, Any]) -> None:
    about = {"formats": state["experts"].formats, "shape": state["experts"].up.shape}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items: Any = {"state": ocp.args.StandardSave(state), "about": ocp.args.JsonSave(about)}  # type: ignore[call-arg]
        checkpointer.save(directory, ocp.args.Composite(**items))


def restore(directory: Path) -> dict[str, Any]:
    """The experts spread over all devices, as far as they divide; the router on each of them."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        about = checkpointer.restore(directory, ocp.args.Composite(about=ocp.args.JsonRestore())).about
        experts, _, hidden = about["shape"]
        devices = max(n for n in range(1, jax.device_count() + 1) if experts % n == 0)
        mesh = jax.make_mesh((devices,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

        def placed(spec: jax.ShapeDtypeStruct, *axes: str) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

        wanted = {
            "experts": jax.tree.map(lambda spec: placed(spec, "expert"), template(**about)),
            "router": placed(jax.ShapeDtypeStruct((experts, hidden), jnp.float32)),
        }
        read: Any = ocp.args.StandardRestore(wanted)  # type: ignore[call-arg]
        return checkpointer.restore(directory, ocp.args.Composite(state=read)).state


def main(path: str, directory: str | None = None) -> tuple[ExpertStack, ExpertStack]:
    stack = ExpertStack.open_and_load(path, 0)
    router = jax.random.normal(jax.random.key(0), (stack.num_experts, stack.hidden_size)) / 16
    x = jax.random.normal(jax.random.key(1), (5, stack.hidden_size))

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(directory or temporary).absolute() / "step_0"
        save(place, {"experts": stack, "router": router})
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        state = restore(place)

    y = moe_forward(stack, x, *route(x @ router.T, CONFIG))
    restored = state["experts"]
    again = moe_forward(restored, x, *route(x @ state["router"].T, CONFIG))
    error = float(np.abs(np.asarray(y) - np.asarray(again)).max())
    print(f"{restored} on {len(restored.up.planes[0].devices())} device(s): {size / 1e6:.1f} MB on disk, for")
    print(f"{stack.nbytes / 1e6:.1f} MB of planes; the layer's outputs differ by at most {error:.1e}")
    return stack, restored


if __name__ == "__main__":
    main(sys.argv[1])
