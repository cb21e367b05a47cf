"""Put host arrays on devices: memory asked for beforehand, one clear error and nothing left behind when it fails."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ..devices import check_process
from .budget import require_host_bytes
from .errors import GgufError

_FIX = "load fewer layers, or spread them over more devices with sharding="


class Placement:
    """Where the leaves of a stack go: a device, or a sharding of the leaves' axes [E, ...].

    A ``NamedSharding`` is cut to the leaf's rank, and moved behind the layer axis of stacked layers.
    """

    def __init__(self, device: Any = None, sharding: Any = None):
        check_process()
        if device is not None and sharding is not None:
            raise ValueError("give device or sharding, not both: a sharding names its devices")
        for name, given in (("device", device), ("sharding", sharding)):
            if not isinstance(given, jax.Device | Sharding | None):
                raise TypeError(f"{name} must be a jax.Device or a jax.sharding.Sharding, got {given!r}")
        # An array tells the default device, however jax was configured.
        self._target = sharding or device or next(iter(jax.device_put(np.uint8(0)).devices()))

    def sharding(self, rank: int, *, stacked: bool = False) -> Any:
        """The sharding of one leaf of ``rank`` axes, the layer axis included where ``stacked``."""
        target = self._target
        if isinstance(target, jax.Device):
            return SingleDeviceSharding(target)
        if isinstance(target, NamedSharding):
            axes = (None, *target.spec) if stacked else tuple(target.spec)
            return NamedSharding(target.mesh, PartitionSpec(*axes[:rank]), memory_kind=target.memory_kind)
        if stacked and not isinstance(target, SingleDeviceSharding):
            raise ValueError(f"stacked=True needs a NamedSharding, to be moved behind the layer axis, got {target}")
        return target

    @property
    def replicated(self) -> Placement:
        """The same devices, each with all of an array: for what has no axis of experts."""
        target = self._target
        if isinstance(target, NamedSharding):
            return Placement(sharding=NamedSharding(target.mesh, PartitionSpec(), memory_kind=target.memory_kind))
        return self

    @property
    def devices(self) -> list[Any]:
        """Those of this process, in order."""
        target = self._target
        devices = [target] if isinstance(target, jax.Device) else target.addressable_devices
        return sorted(devices, key=lambda device: device.id)

    def require_bytes(self, layers: Sequence[Any], what: str, *, stacked: bool = False) -> None:
        """GgufError where these layers' specs need more than a device, or the host, has free.

        The host holds one layer on its way to the devices; so do the devices beside the ``stacked`` ones.
        """
        largest = max(layers, key=lambda specs: specs.nbytes)
        needed: dict[Any, int] = {}
        for leaf in jax.tree.leaves([*layers, largest] if stacked else layers):
            sharding = self.sharding(len(leaf.shape))
            for device in sharding.addressable_devices:
                shard = prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                needed[device] = needed.get(device, 0) + shard
        require_room(needed, largest.nbytes, what)

    def put(self, host: Any) -> Any:
        """``host``'s arrays on their devices, leaf by leaf; what was placed is deleted when one fails."""
        leaves, tree = jax.tree.flatten(host)
        placed: list[jax.Array] = []
        with deleted_on_error(placed):
            for leaf in leaves:
                placed.append(jax.device_put(leaf, self.sharding(leaf.ndim)))
            # A failed transfer shows only here on an accelerator; and the host arrays are free after it.
            jax.block_until_ready(placed)
        return jax.tree.unflatten(tree, placed)


def require_room(needed: Mapping[Any, int], on_the_way: int, what: str) -> None:
    """GgufError where the devices have not the bytes ``needed`` free, or the host those of what is on its way there."""
    on_host = all(device.platform == "cpu" for device in needed)
    require_host_bytes(sum(needed.values()) if on_host else on_the_way, what, _FIX)
    for device, nbytes in needed.items():
        free = free_bytes(device)
        if free is not None and nbytes > free:
            raise GgufError(f"{what} needs {nbytes} bytes on {device}, but {free} are free: {_FIX}")


@contextmanager
def out_of_memory_explained(what: str, nbytes: int, devices: Iterable[Any]) -> Iterator[None]:
    """Turn a refusal of memory, by a device or by the host, into a GgufError: bytes needed and free, ways out."""
    try:
        yield
    except MemoryError as error:
        raise GgufError(f"{what} needs {nbytes} bytes, and the host has no more memory to give: {_FIX}") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # What was placed is deleted by now: this is what another attempt will find.
        free = {device: free_bytes(device) for device in devices}
        shown = ", ".join(f"{'unknown' if n is None else n} on {device}" for device, n in free.items())
        raise GgufError(
            f"{what} needs {nbytes} bytes on its devices, which are out of memory (bytes free now: {shown}):"
            f" {_FIX}. {str(error).splitlines()[0]}"
        ) from error


def free_bytes(device: Any) -> int | None:
    """Free bytes by the device's own account, or None where it keeps none (the CPU)."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


@contextmanager
def deleted_on_error(trees: Any) -> Iterator[None]:
    """Delete all arrays of ``trees``, a container that may grow meanwhile, where the body raises."""
    try:
        yield
    except BaseException as error:
        for leaf in jax.tree.leaves(trees):
            leaf.delete()
        # Else whoever keeps the error keeps the host arrays of the frames that it passed.
        traceback.clear_frames(error.__traceback__)
        raise
