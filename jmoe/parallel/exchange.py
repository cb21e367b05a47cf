"""Tokens to the devices of their experts and their outputs back: each token once a device, none dropped.

    packed rows, on the device that has the tokens:   | for device 0 | for device 1 | ... |        start, size
    received rows, on the device of the experts:      | from device 0 | from device 1 | ... |

The dense exchange (``all_to_all``) sends every device as many rows as there could be: what every backend can do, and as
many bytes as gathering all tokens. The ragged one (``ragged_all_to_all``) sends the rows that there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Where XLA has ragged_all_to_all: not on CPUs.
RAGGED_PLATFORMS = ("gpu", "tpu")


class Plan(NamedTuple):
    """What one of n devices, which has T tokens, sends; R = T * min(n, K) rows at most."""

    token: jax.Array  # i32[R]     the packed rows' tokens: by device, ascending within one
    start: jax.Array  # i32[n]     where a device's packed rows begin
    size: jax.Array  # i32[n]     how many there are
    device: jax.Array  # i32[T, m]  the devices that a token goes to, m = min(n, K)
    row: jax.Array  # i32[T, m]  its packed row for that device
    live: jax.Array  # bool[T, m]  whether there is such a device


def plan(topk_ids: jax.Array, devices: int, experts_per_device: int) -> Plan:
    """For i32[T, K] ids, -1 where a slot is empty; expert e is on device ``e // experts_per_device``."""
    tokens, top_k = topk_ids.shape
    most = min(devices, top_k)
    home = jnp.where(topk_ids >= 0, topk_ids // experts_per_device, devices)  # i32[T, K]
    goes = jnp.any(home[:, :, None] == lax.iota(jnp.int32, devices)[None, None], axis=1)  # bool[T, n]
    size = jnp.sum(goes, axis=0, dtype=jnp.int32)
    start = jnp.cumsum(size, dtype=jnp.int32) - size
    order = jnp.argsort(~goes.T.reshape(-1), stable=True)[: tokens * most].astype(jnp.int32)
    within = jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1  # i32[T, n]
    device = jnp.argsort(~goes, axis=1, stable=True)[:, :most].astype(jnp.int32)
    of_token = lambda table: jnp.take_along_axis(table, device, axis=1)  # noqa: E731
    return Plan(order % max(tokens, 1), start, size, device, of_token(start[None] + within), of_token(goes))


Rows = tuple[jax.Array, ...]


def dense(send: Plan, rows: Rows, empty: tuple[int, ...], axis: str) -> tuple[Rows, Callable[[jax.Array], jax.Array]]:
    """``rows`` ([T, ...] each) as received, [n * T, ...] with ``empty`` where no row came; and the way back.

    The way back takes f32[n * T, H], a row for each received one, to f32[T, m, H] on the devices of the tokens; what
    ``send.live`` excludes may hold anything.
    """
    devices, tokens = send.size.shape[0], rows[0].shape[0]
    place = lax.iota(jnp.int32, tokens)[None]
    live = place < send.size[:, None]  # bool[n, T]
    token = send.token.at[send.start[:, None] + place].get(mode="clip")  # i32[n, T]

    def exchanged(blocks: jax.Array) -> jax.Array:
        return lax.all_to_all(blocks, axis, 0, 0, tiled=True)

    def there(table: jax.Array, fill: int) -> jax.Array:
        blocks = jnp.where(live.reshape(*live.shape, *(1,) * (table.ndim - 1)), table[token], fill)
        return exchanged(blocks.astype(table.dtype)).reshape(devices * tokens, *table.shape[1:])

    def back(y: jax.Array) -> jax.Array:
        blocks = exchanged(y.reshape(devices, tokens, y.shape[1]))
        own = send.row - send.start[send.device]
        return blocks.at[send.device, own].get(mode="clip")

    return tuple(map(there, rows, empty)), back


def ragged(send: Plan, rows: Rows, empty: tuple[int, ...], axis: str) -> tuple[Rows, Callable[[jax.Array], jax.Array]]:
    """The same; only rows that exist travel."""
    devices, tokens = send.size.shape[0], rows[0].shape[0]
    me = lax.axis_index(axis)
    sizes = lax.all_gather(send.size, axis)  # i32[n, n]: from, to
    starts = jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes  # in the sender's packed rows
    places = jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes  # in the receiver's rows
    sent, received = sizes[me], sizes[:, me]

    def there(table: jax.Array, fill: int) -> jax.Array:
        into = jnp.full((devices * tokens, *table.shape[1:]), fill, table.dtype)
        return lax.ragged_all_to_all(table[send.token], into, starts[me], sent, places[me], received, axis_name=axis)

    def back(y: jax.Array) -> jax.Array:
        into = jnp.zeros((send.token.shape[0], y.shape[1]), y.dtype)
        packed = lax.ragged_all_to_all(y, into, places[:, me], received, starts[:, me], sent, axis_name=axis)
        return packed.at[send.row].get(mode="clip")

    return tuple(map(there, rows, empty)), back


EXCHANGES = {"dense": dense, "ragged": ragged}
