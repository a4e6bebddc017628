"""What every query sees, as two spans of keys in its own row: the form of the mask that kernels work with.

By the contract of training rows (see `maxi.kernels.attention`) a query sees at most two contiguous spans of its row:
from some token of its own segment up to itself, and some last part of its context. Windows only move the beginnings.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEVER = 1 << 30
"""The beginning of what is empty: no place, position or segment is as large."""


class Spans(NamedTuple):
    """int32 [B, T], places in the row. A query at t sees keys [first, t] and, where some query has a context,
    [context_first, context_last]; empty spans begin at `NEVER` and end at -1."""

    first: jax.Array
    context_first: jax.Array | None = None
    context_last: jax.Array | None = None


def spans(
    positions_BT: jax.Array, segments_BT: jax.Array, contexts_BT: jax.Array | None = None, window: int | None = None
) -> Spans:
    """The spans of rows that keep the contract; padding sees nothing."""
    T = segments_BT.shape[1]
    place = jnp.arange(T, dtype=jnp.int32)[None]
    begins = jnp.concatenate([jnp.ones_like(segments_BT[:, :1], bool), segments_BT[:, 1:] != segments_BT[:, :-1]], 1)
    start = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    first = start if window is None else jnp.maximum(start, place - (window - 1))
    own = Spans(jnp.where(segments_BT != 0, first, NEVER))
    if contexts_BT is None:
        return own
    # the last run of the context's segment that ends before the query: contexts stand before what sees them
    ends = jnp.concatenate([begins[:, 1:], jnp.ones_like(begins[:, :1])], 1)
    is_context = contexts_BT[:, :, None] == segments_BT[:, None, :]
    last = jnp.where(is_context & ends[:, None, :], place[:, None, :], -1).max(-1)
    at = jnp.maximum(last, 0)
    first = jnp.take_along_axis(start, at, 1)
    if window is not None:
        reach = jnp.take_along_axis(positions_BT, at, 1) - (positions_BT - (window - 1))
        first = jnp.maximum(first, last - reach)
    seen = (contexts_BT != 0) & (segments_BT != 0) & (last >= 0) & (first <= last)
    return own._replace(context_first=jnp.where(seen, first, NEVER), context_last=jnp.where(seen, last, -1))


def pad(seen: Spans, T: int) -> Spans:
    """The spans of rows made `T` long: what is added sees nothing."""
    more = ((0, 0), (0, T - seen.first.shape[1]))

    def longer(x: jax.Array | None, empty: int) -> jax.Array | None:
        return None if x is None else jnp.pad(x, more, constant_values=empty)

    first = jnp.pad(seen.first, more, constant_values=NEVER)
    return Spans(first, longer(seen.context_first, NEVER), longer(seen.context_last, -1))
