"""Attention over rows that are split over devices: keys and values travel round the mesh axis `context`.

Every device keeps its queries and meets the keys of one device after the other, the way of Liu et al., arXiv:2310.01889;
what they add is merged by running maximum and sum. In the backward pass the gradients of keys and values travel with
them. Memory is linear in the tokens of a device: scores exist for one block of queries and one of keys at a time.

Positions, segments and contexts alone decide what a query sees, and positions and segments travel with their keys, so
tokens may stand in any order. Pairs of blocks in which no query sees a key are left out, row by row, at run time: what
a device does depends on its documents. So that causal attention is the same work everywhere, rows are laid out by
`zigzag` (Llama 3, arXiv:2407.21783, section 3.3.2) on the way into the model and back on the way out: the order is
nobody else's matter, and only integers and log-probabilities [B, T] are moved for it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxi.kernels.attention.reference import MASKED, visible
from maxi.kernels.attention.spans import NEVER
from maxi.sharding import constrain, local, shards

AXIS = "context"

BLOCK = 512
"""At most this many queries meet as many keys at once: scores of 1 MiB a head, whatever the length of the row."""

NARROW = 8
"""Columns of ones that sum weights; one column XLA would turn back into a sum."""

Places = tuple[jax.Array, ...]
"""Positions and segments, of queries also contexts where there are any."""
Keys = tuple[jax.Array, jax.Array, Places]
"""Blocks of keys, their values, and where they stand: what travels."""


def why_not(call: Any) -> str | None:
    parts = shards("T")
    if parts == 1:
        return "rows are whole on every device, mesh.context is 1"
    if call.T != call.S:
        return f"it needs as many queries as keys, not {call.T} and {call.S}"
    if call.T % parts or call.B % shards("B"):
        return f"{call.B} rows of {call.T} tokens do not divide over the mesh"
    return None


def zigzag(a_BT: jax.Array) -> jax.Array:
    """Rows [B, T] as `context` devices hold them: of 2n chunks of a row device i of n has chunks i and 2n - 1 - i.

    As it was where rows are not split, or do not divide into so many chunks.
    """
    B, T = a_BT.shape
    n = shards("T")
    if n == 1 or T % (2 * n):
        return a_BT
    halves = a_BT.reshape(B, 2, n, -1)
    return constrain(jnp.stack([halves[:, 0], halves[:, 1, ::-1]], 2).reshape(B, T), "BT")


def straight(a_BT: jax.Array) -> jax.Array:
    """The inverse of `zigzag`."""
    B, T = a_BT.shape
    n = shards("T")
    if n == 1 or T % (2 * n):
        return a_BT
    pairs = a_BT.reshape(B, n, 2, -1)
    return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], 1).reshape(B, T)


def run(q_BTNH, k_BSKH, v_BSKH, q_positions, k_positions, q_segments, k_segments, *, q_contexts, window, scale, prepared):
    """See `maxi.kernels.attention.attention`."""
    del k_positions, k_segments, prepared  # T == S: queries and keys are the same tokens
    places = (q_positions, q_segments) if q_contexts is None else (q_positions, q_segments, q_contexts)
    return _attention(window, scale, q_BTNH, k_BSKH, v_BSKH, places)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(window, scale, q_BTNH, k_BTKH, v_BTKH, places):
    return _fwd(window, scale, q_BTNH, k_BTKH, v_BTKH, places)[0]


def _fwd(window, scale, q_BTNH, k_BTKH, v_BTKH, places):
    inputs = ["BTNH", "BTKH", "BTKH", *["BT"] * len(places)]
    out_BTNH, norm_BTN = local(partial(_forward, window, scale), inputs, ("BTNH", "BTN"))(q_BTNH, k_BTKH, v_BTKH, *places)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, places, out_BTNH, norm_BTN)


def _bwd(window, scale, saved, dout_BTNH):
    *arrays, places, out_BTNH, norm_BTN = saved
    # rowsum(dO * O) equals rowsum(P * dP): Dao, arXiv:2307.08691, algorithm 2, line 4
    delta_BTN = jnp.einsum("BTNH,BTNH->BTN", dout_BTNH.astype(jnp.float32), out_BTNH.astype(jnp.float32))
    inputs = ["BTNH", "BTKH", "BTKH", "BTNH", "BTN", "BTN", *["BT"] * len(places)]
    backward = local(partial(_backward, window, scale), inputs, ("BTNH", "BTKH", "BTKH"))
    return *backward(*arrays, dout_BTNH, norm_BTN, delta_BTN, *places), None


_attention.defvjp(_fwd, _bwd)


def _forward(window, scale, q_BTNH, k_BTKH, v_BTKH, *places) -> tuple[jax.Array, jax.Array]:
    """On one device: the attended values of its queries, and their log-normalisers [B, T, N]."""
    B, T, N, H = q_BTNH.shape
    q_CTKGH, k_CSKH, v_CSKH, blocked = _in_blocks(q_BTNH, k_BTKH, v_BTKH, places)
    C, size, K, G, _ = q_CTKGH.shape
    keys: Keys = k_CSKH, v_CSKH, blocked[:2]
    found = jnp.zeros((C, K, G, size, H), jnp.float32), jnp.full((C, K, G, size), MASKED), jnp.zeros((C, K, G, size))
    meet = partial(_meet, window, scale, B, q_CTKGH, blocked)

    def step(carry, _):
        keys, found = carry
        return (_pass_on(keys), meet(keys, found)), None  # the next keys come while these are met

    (keys, found), _ = jax.lax.scan(step, (keys, found), length=jax.lax.axis_size(AXIS) - 1)
    out_CKGTH, peak_CKGT, total_CKGT = meet(keys, found)
    total_CKGT = jnp.maximum(total_CKGT, 1e-30)
    out = (out_CKGTH / total_CKGT[..., None]).transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)
    norm = (peak_CKGT + jnp.log(total_CKGT)).transpose(0, 3, 1, 2).reshape(B, -1, N)
    return out[:, :T].astype(q_BTNH.dtype), norm[:, :T]


def _meet(window, scale, B, q_CTKGH, q_places: Places, keys: Keys, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Weighted sums of values, running maximum and sum of weights of each query, with these keys added to `found`."""
    k_CSKH, v_CSKH, k_places = keys
    pairs, count = _pairs(window, B, q_places, k_places)

    def pair(number, found):
        c, s = pairs[0][number], pairs[1][number]
        out_KGTH, peak_KGT, total_KGT = _at(c, found)
        scores = _scores(window, scale, q_CTKGH[c], k_CSKH[s], _at(c, q_places), _at(s, k_places))
        highest = jnp.maximum(peak_KGT, scores.max(-1))
        weights = jnp.where(scores > MASKED, jnp.exp(scores - highest[..., None]), 0.0)
        shrink = jnp.exp(peak_KGT - highest)
        v = v_CSKH[s]
        weigh = partial(jnp.einsum, "KGTS,SKH->KGTH", weights.astype(v.dtype), preferred_element_type=jnp.float32)
        # summed by the matrix unit: on a TPU the sum itself would take as long as all the rest together
        sums_KGT = weigh(jnp.ones((*v.shape[:2], NARROW), v.dtype))[..., 0]
        return _put(c, found, (out_KGTH * shrink[..., None] + weigh(v), highest, total_KGT * shrink + sums_KGT))

    return jax.lax.fori_loop(0, count, pair, found)


def _backward(window, scale, q_BTNH, k_BTKH, v_BTKH, dout_BTNH, norm_BTN, delta_BTN, *places) -> tuple[jax.Array, ...]:
    """On one device: the gradients of its queries, keys and values."""
    B, T, N, H = q_BTNH.shape
    q_CTKGH, k_CSKH, v_CSKH, blocked = _in_blocks(q_BTNH, k_BTKH, v_BTKH, places)
    C, size, K, G, _ = q_CTKGH.shape
    dout_CTKGH = _blocks(dout_BTNH, size).reshape(q_CTKGH.shape)
    norm_CKGT, delta_CKGT = (_blocks(a, size).reshape(C, size, K, G).transpose(0, 2, 3, 1) for a in (norm_BTN, delta_BTN))
    queries = q_CTKGH, dout_CTKGH, norm_CKGT, delta_CKGT
    keys: Keys = k_CSKH, v_CSKH, blocked[:2]
    dq_CTKGH = jnp.zeros(q_CTKGH.shape, jnp.float32)
    meet = partial(_meet_again, window, scale, B, queries, blocked)

    def step(carry, _):
        keys, dq_CTKGH, dkeys = carry
        dq_CTKGH, added = meet(keys, dq_CTKGH)
        # gradients travel one step behind their keys, so that nothing waits for what is computed here
        return (_pass_on(keys), dq_CTKGH, jax.tree.map(jnp.add, _pass_on(dkeys), added)), None

    nothing = jnp.zeros(k_CSKH.shape, jnp.float32), jnp.zeros(v_CSKH.shape, jnp.float32)
    carry, _ = jax.lax.scan(step, (keys, dq_CTKGH, nothing), length=jax.lax.axis_size(AXIS) - 1)
    keys, dq_CTKGH, dkeys = carry
    dq_CTKGH, added = meet(keys, dq_CTKGH)
    dk_CSKH, dv_CSKH = _pass_on(jax.tree.map(jnp.add, _pass_on(dkeys), added))
    dq = dq_CTKGH.reshape(B, -1, N, H)[:, :T].astype(q_BTNH.dtype)
    dk, dv = (d.reshape(B, -1, K, H)[:, :T] for d in (dk_CSKH, dv_CSKH))
    return dq, dk.astype(k_BTKH.dtype), dv.astype(v_BTKH.dtype)


def _meet_again(window, scale, B, queries, q_places: Places, keys: Keys, dq_CTKGH) -> tuple[jax.Array, Any]:
    """The gradient of the queries with what comes from these keys, and the gradients of these keys and values."""
    k_CSKH, v_CSKH, k_places = keys
    pairs, count = _pairs(window, B, q_places, k_places)

    def pair(number, carry):
        dq_CTKGH, dkeys = carry
        c, s = pairs[0][number], pairs[1][number]
        (q, dout, norm, delta), (k, v) = _at(c, queries), _at(s, (k_CSKH, v_CSKH))
        scores = _scores(window, scale, q, k, _at(c, q_places), _at(s, k_places))
        weights = jnp.where(scores > MASKED, jnp.exp(scores - norm[..., None]), 0.0)
        dweights = jnp.einsum("TKGH,SKH->KGTS", dout, v, preferred_element_type=jnp.float32)
        dscores = (weights * (dweights - delta[..., None]) * scale).astype(q.dtype)
        dq = jnp.einsum("KGTS,SKH->TKGH", dscores, k, preferred_element_type=jnp.float32)
        dk = jnp.einsum("KGTS,TKGH->SKH", dscores, q, preferred_element_type=jnp.float32)
        dv = jnp.einsum("KGTS,TKGH->SKH", weights.astype(q.dtype), dout, preferred_element_type=jnp.float32)
        dk_SKH, dv_SKH = _at(s, dkeys)
        return _put(c, dq_CTKGH, dq_CTKGH[c] + dq), _put(s, dkeys, (dk_SKH + dk, dv_SKH + dv))

    nothing = jnp.zeros(k_CSKH.shape, jnp.float32), jnp.zeros(v_CSKH.shape, jnp.float32)
    return jax.lax.fori_loop(0, count, pair, (dq_CTKGH, nothing))


def _scores(window, scale, q_TKGH, k_SKH, q_places: Places, k_places: Places) -> jax.Array:
    q_positions, q_segments, *contexts = (a[None] for a in q_places)
    k_positions, k_segments = (a[None] for a in k_places)
    mask = visible(q_positions, k_positions, q_segments, k_segments, contexts[0] if contexts else None, window)
    scores = jnp.einsum("TKGH,SKH->KGTS", q_TKGH, k_SKH, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores * scale, MASKED)


def _pass_on(arrays: Any) -> Any:
    """What the device before this one has."""
    n = jax.lax.axis_size(AXIS)
    return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, [(i, (i + 1) % n) for i in range(n)]), arrays)


def _in_blocks(q_BTNH, k_BTKH, v_BTKH, places: Places) -> tuple[jax.Array, jax.Array, jax.Array, Places]:
    """Everything in blocks [C, size, ...], those of the first row first, the queries' heads by the keys' they go with."""
    _, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    chunk = -(-T // 2)  # of zigzag: a block across two of them would see more than it has to
    size = -(-chunk // -(-chunk // BLOCK))
    q_CTNH, k_CSKH, v_CSKH, *blocked = (_blocks(a, size) for a in (q_BTNH, k_BTKH, v_BTKH, *places))
    return q_CTNH.reshape(-1, size, K, N // K, H), k_CSKH, v_CSKH, tuple(blocked)


def _blocks(a: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [C, size, ...], rows filled up with zeros, which are padding."""
    a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % size), *[(0, 0)] * (a.ndim - 2)])
    return a.reshape(-1, size, *a.shape[2:])


def _at(index: jax.Array, arrays: Any) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), arrays)


def _put(index: jax.Array, arrays: Any, values: Any) -> Any:
    return jax.tree.map(lambda a, value: jax.lax.dynamic_update_index_in_dim(a, value, index, 0), arrays, values)


class _Extent(NamedTuple):
    """Of each block the first segment but 0 and the lowest position in it, the last segment and its highest position."""

    first: jax.Array
    low: jax.Array
    last: jax.Array
    high: jax.Array


def _extent(positions: jax.Array, segments: jax.Array) -> _Extent:
    first = jnp.where(segments != 0, segments, NEVER).min(-1)
    last = jnp.where(segments != 0, segments, -1).max(-1)
    low = jnp.where(segments == first[..., None], positions, NEVER).min(-1)
    return _Extent(first, low, last, jnp.where(segments == last[..., None], positions, -1).max(-1))


def _pairs(window: int | None, B: int, q_places: Places, k_places: Places) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Numbers of the blocks of queries and of keys that meet, and how many pairs they are; behind these is filling.

    No pair in which a query sees a key is left out, whatever the order of tokens. Where a segment is contiguous and its
    positions ascend, as in training rows, hardly one is kept without need.
    """
    q_positions, *q_segments = (a.reshape(B, -1, 1, a.shape[-1]) for a in q_places)
    keys = _extent(*(a.reshape(B, 1, -1, a.shape[-1]) for a in k_places))
    seen = jnp.zeros((), bool)
    for segments in q_segments:  # a context is a second segment
        queries = _extent(q_positions, segments)
        before = (keys.first < queries.last) | ((keys.first == queries.last) & (keys.low <= queries.high))
        after = keys.last >= queries.first
        if window is not None:
            after &= (keys.last > queries.first) | (keys.high > queries.low - window)
        seen |= before & after
    (pairs,) = jnp.nonzero(seen.ravel(), size=seen.size, fill_value=0)
    row, query, key = jnp.unravel_index(pairs, seen.shape)
    return (row * seen.shape[1] + query, row * seen.shape[2] + key), seen.sum()
