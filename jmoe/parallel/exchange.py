"""Tokens to the devices of their experts and their outputs back, none dropped.

The dense exchange gives every device all tokens (``all_gather``) and brings sums back (``psum_scatter``): what every
backend has, and as many bytes as there could be. The ragged one (``ragged_all_to_all``) sends a token once to each
device that has one of its experts:

    packed rows, on the device that has the tokens:   | for device 0 | for device 1 | ... |        start, size
    received rows, on the device of the experts:      | from device 0 | from device 1 | ... |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Where ragged_all_to_all is the default. CPUs do not have it. For GPUs XLA has a kernel of its own, for up to eight of
# one process (ragged_all_to_all_thunk.cc); what there is beyond depends on XLA's flags, and may be an error. Two GPUs
# send hardly fewer bytes by it, eight two thirds.
RAGGED_PLATFORMS = ("tpu",)

# That kernel has a block of 128 threads for each update, which copies 2.4 GB/s (measured on an H100): a peer's rows
# travel as so many updates that all peers' are UPDATES, or as fewer that have UPDATE_BYTES each.
UPDATES, UPDATE_BYTES = 512, 16 * 1024
MOST_PEERS = 8

Back = Callable[[jax.Array], jax.Array]
Received = tuple[jax.Array, jax.Array, jax.Array]


def dense(
    x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array, experts_per_device: int, axis: str
) -> tuple[Received, Back]:
    """x, ids and weights of the received rows, ids -1 where a row leads nowhere; and the way back, from f32[rows, H] of
    this device's experts to f32[T, H] of all of them. Expert e is on device ``e // experts_per_device``."""
    del experts_per_device

    def everyone_s(table: jax.Array) -> jax.Array:
        return lax.all_gather(table, axis, tiled=True)

    def back(y: jax.Array) -> jax.Array:
        return lax.psum_scatter(y, axis, tiled=True)

    return (everyone_s(x), everyone_s(topk_ids), everyone_s(topk_weights)), back


def ragged(
    x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array, experts_per_device: int, axis: str
) -> tuple[Received, Back]:
    """The same; only rows that exist travel."""
    devices, tokens = lax.axis_size(axis), x.shape[0]
    send = plan(topk_ids, devices, experts_per_device)
    me = lax.axis_index(axis)
    sizes = lax.all_gather(send.size, axis)  # i32[n, n]: from, to
    starts = jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes  # in the sender's packed rows
    places = jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes  # in the receiver's rows
    there, here = sizes[me], sizes[:, me]

    def sent(
        table: jax.Array, into: jax.Array, start: jax.Array, size: jax.Array, place: jax.Array, received: jax.Array
    ) -> jax.Array:
        count = updates(devices, tokens * table[:1].nbytes)
        (begin, rows), (target, _) = cut(start, size, count), cut(place, size, count)
        return lax.ragged_all_to_all(table, into, begin, rows, target, cut(place, received, count)[1], axis_name=axis)

    def received(table: jax.Array, fill: int) -> jax.Array:
        into = jnp.full((devices * tokens, *table.shape[1:]), fill, table.dtype)
        return sent(table[send.token], into, starts[me], there, places[me], here)

    def back(y: jax.Array) -> jax.Array:
        into = jnp.zeros((send.token.shape[0], y.shape[1]), y.dtype)
        packed = sent(y, into, places[:, me], here, starts[:, me], there)
        outputs = packed.at[send.row].get(mode="clip")  # f32[T, m, H]
        return jnp.sum(jnp.where(send.live[..., None], outputs, 0), axis=1)

    return (received(x, 0), received(topk_ids, -1), received(topk_weights, 0)), back


EXCHANGES = {"dense": dense, "ragged": ragged}


class Plan(NamedTuple):
    """What one of n devices, which has T tokens, sends by the ragged exchange; R = T * min(n, K) rows at most."""

    token: jax.Array  # i32[R]     the packed rows' tokens: by device, ascending within one
    size: jax.Array  # i32[n]     how many rows are for a device
    row: jax.Array  # i32[T, m]  a token's packed rows, for the m = min(n, K) devices that it may go to
    live: jax.Array  # bool[T, m]  whether it goes there


def plan(topk_ids: jax.Array, devices: int, experts_per_device: int) -> Plan:
    """For i32[T, K] ids, -1 where a slot is empty."""
    tokens, top_k = topk_ids.shape
    most = min(devices, top_k)
    home = jnp.where(topk_ids >= 0, topk_ids // experts_per_device, devices)  # i32[T, K]
    goes = jnp.any(home[:, :, None] == lax.iota(jnp.int32, devices)[None, None], axis=1)  # bool[T, n]
    size = jnp.sum(goes, axis=0, dtype=jnp.int32)
    start = jnp.cumsum(size, dtype=jnp.int32) - size
    order = jnp.argsort(~goes.T.reshape(-1), stable=True)[: tokens * most].astype(jnp.int32)
    row = start[None] + jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1  # i32[T, n]
    device = jnp.argsort(~goes, axis=1, stable=True)[:, :most].astype(jnp.int32)
    of_token = lambda table: jnp.take_along_axis(table, device, axis=1)  # noqa: E731
    return Plan(order % max(tokens, 1), size, of_token(row), of_token(goes))


def updates(devices: int, nbytes: int) -> int:
    """Pieces to send a peer's rows in, of ``nbytes`` at most: a power of two, which the kernel's blocks share evenly.

    Beyond ``MOST_PEERS`` it is not the kernel, and each might be a message of its own.
    """
    if devices > MOST_PEERS:
        return 1
    wanted = max(1, min(UPDATES // devices, nbytes // UPDATE_BYTES))
    return 1 << (wanted.bit_length() - 1)


def cut(start: jax.Array, size: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """``start`` and ``size`` i32[n] of slices, each cut into ``count`` that are equal but for the last: i32[n * count]
    both."""
    each = (size + (count - 1)) // count
    first = jnp.minimum(lax.iota(jnp.int32, count)[None] * each[:, None], size[:, None])
    return (start[:, None] + first).reshape(-1), jnp.minimum(each[:, None], size[:, None] - first).reshape(-1)
