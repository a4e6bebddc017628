"""Attention over split rows: equal to the reference on every mesh, the same work on every device, none that is not needed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxi import mesh
from maxi.errors import ConfigError
from maxi.kernels.attention import ring
from maxi.kernels.attention.reference import visible
from maxi.sections import MeshConfig
from tests.kernels.test_attention import Run, _call, _places

AXES = {
    "context 2": {"fsdp": 1, "context": 2},
    "context 4": {"fsdp": 1, "context": 4},
    "with tensor": {"fsdp": 1, "context": 2, "tensor": 2},
    "with replica": {"replica": 2, "fsdp": 1, "context": 4},
}
T = 260  # 65 tokens for each of 4 devices: not a whole number of blocks
PACKED: list[list[Run]] = [[1, 127, 2, 100, 30], [260], [130, -130], [-3, 97, -60, 100]]
SHARED: list[list[Run]] = [[100, (40, 1), (60, 1), 30, (1, 4), (19, 4), -10], [-7, 103, 30, (70, 2), (20, 2), -30]]


def build(name: str) -> Any:
    axes = AXES[name]
    return mesh.build(MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])


def inputs(rows: list[list[Run]], N: int, K: int, dtype: str = "float32") -> Any:
    """q, k and v, and positions, segments and contexts."""
    rng = np.random.default_rng(0)
    shapes = [(len(rows), T, heads, 16) for heads in (N, K, K)]
    places = [jnp.asarray(np.stack(a), jnp.int32) for a in zip(*map(_places, rows), strict=True)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes], places


def attend(arrays: Any, places: Any, window: int | None, backend: str) -> jax.Array:
    q, k, v = arrays
    return _call(q, k, v, places, window, backend)


@pytest.mark.parametrize(
    ("name", "rows", "N", "K", "window"),
    [
        ("context 2", SHARED, 7, 1, None),
        ("context 4", SHARED, 4, 2, 90),
        ("with tensor", PACKED, 4, 2, 1),
        ("with replica", PACKED, 2, 1, 40),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_is_the_reference(name: str, rows: list[list[Run]], N: int, K: int, window: int | None) -> None:
    """Values and gradients, of tokens in no order at all."""
    arrays, places = inputs(rows, N, K)
    order = np.random.default_rng(1).permutation(T)
    arrays, places = ([a[:, order] for a in group] for group in (arrays, places))
    weight = jnp.asarray(np.random.default_rng(2).normal(size=arrays[0].shape), jnp.float32)

    def of(backend: str) -> Any:
        def loss(*arrays: jax.Array) -> Any:
            out = attend(arrays, places, window, backend)
            return (weight * out).sum(), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)

    wanted = of("reference")
    with jax.set_mesh(build(name)):
        got = of("ring")
    np.testing.assert_allclose(got[1], wanted[1], atol=2e-6)
    for a, b in zip(got[0], wanted[0], strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_bf16_errs_at_most_twice_the_reference() -> None:
    arrays, places = inputs(PACKED, 4, 2, "bfloat16")
    exact, low = (
        np.asarray(attend([a.astype(dtype) for a in arrays], places, None, "reference"), np.float64)
        for dtype in ("float32", "bfloat16")
    )
    with jax.set_mesh(build("context 4")):
        got = jax.jit(lambda *arrays: attend(arrays, places, None, "ring"))(*arrays)
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float64) - exact).max() <= 2 * np.abs(low - exact).max()


def test_zigzag_is_undone_and_gives_each_device_an_early_and_a_late_chunk() -> None:
    a_BT = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    with jax.set_mesh(build("context 4")):
        spread = ring.zigzag(a_BT)
        np.testing.assert_array_equal(spread[0].reshape(4, 4), [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]])
        np.testing.assert_array_equal(ring.straight(spread), a_BT)
        odd = jnp.arange(20).reshape(2, 10)
        assert ring.zigzag(odd) is odd and ring.straight(odd) is odd
    assert ring.zigzag(a_BT) is a_BT and ring.straight(a_BT) is a_BT


def work(positions: Any, segments: Any, window: int | None = None, contexts: Any = None, size: int = 16) -> np.ndarray:
    """How many pairs of blocks of one row each of 4 devices has to compute, at each of the 4 steps of the ring; the row is
    laid out by zigzag. Checks that none is missing in which a query sees a key."""
    with jax.set_mesh(build("context 4")):
        laid = [np.asarray(ring.zigzag(jnp.asarray(a)[None])).reshape(4, -1, size) for a in (positions, segments)]
        seen_in = [np.asarray(ring.zigzag(jnp.asarray(contexts)[None])).reshape(4, -1, size)] if contexts is not None else []
    pairs = jax.jit(ring._pairs, static_argnums=(0, 1))
    counts = np.zeros((4, 4), int)
    for device in range(4):
        for step in range(4):
            queries = [jnp.asarray(a[device]) for a in (*laid, *seen_in)]
            keys = [jnp.asarray(a[device - step]) for a in laid]
            (of_q, of_k), count = pairs(window, 1, tuple(queries), tuple(keys))
            counts[device, step] = count
            found = set(zip(np.asarray(of_q)[: int(count)].tolist(), np.asarray(of_k)[: int(count)].tolist(), strict=True))
            q_positions, q_segments, *q_contexts = (a.reshape(1, -1) for a in queries)
            k_positions, k_segments = (a.reshape(1, -1) for a in keys)
            context = q_contexts[0] if q_contexts else None
            mask: Any = visible(q_positions, k_positions, q_segments, k_segments, context, window)
            needed = mask.reshape(len(queries[0]), size, len(keys[0]), size).any((1, 3))
            assert set(zip(*(at.tolist() for at in needed.nonzero()), strict=True)) <= found
    return counts


def test_one_document_is_the_same_work_for_every_device() -> None:
    counts = work(np.arange(512), np.ones(512, int))
    assert (counts == counts[0]).all() and counts.sum() == 32 * 33 // 2  # and causal: half of all 32 x 32 pairs
    assert work(np.arange(512), np.ones(512, int), window=33).sum() == 32 + 31 + 30  # a block sees itself and two before


def test_documents_cost_what_they_are_long() -> None:
    runs = [100, 28, 300, 4, 16, 64]
    positions, segments = np.concatenate([np.arange(n) for n in runs]), np.repeat(np.arange(1, 7), runs)
    last = segments == 6
    counts = work(np.where(last, 0, positions), np.where(last, 0, segments))  # the last is padding
    covers = [(sum(runs[:i]) // 16, (sum(runs[: i + 1]) - 1) // 16) for i in range(5)]
    pairs = {(q, k) for first, end in covers for q in range(first, end + 1) for k in range(first, q + 1)}
    assert counts.sum() == len(pairs)


def test_branches_see_their_prompt_and_not_each_other() -> None:
    runs, seen_in = [128, 128, 128, 128], [0, 1, 1, 0]
    segments, contexts = np.repeat([1, 2, 3, 4], runs), np.repeat(seen_in, runs)
    positions = np.concatenate([np.arange(n) + (128 if c else 0) for n, c in zip(runs, seen_in, strict=True)])
    counts = work(positions, segments, contexts=contexts)
    assert counts.sum() == 4 * (8 * 9 // 2) + 2 * 8 * 8


def test_it_says_why_it_cannot_run() -> None:
    arrays, places = inputs(PACKED, 2, 1)
    with pytest.raises(ConfigError, match=r"rows are whole on every device, mesh\.context is 1"):
        attend(arrays, places, None, "ring")
    with jax.set_mesh(build("context 4")):
        with pytest.raises(ConfigError, match="4 rows of 259 tokens do not divide over the mesh"):
            attend([a[:, 1:] for a in arrays], [a[:, 1:] for a in places], None, "ring")
        with pytest.raises(ConfigError, match="it needs whole rows, not rows split over 4 devices"):
            attend(arrays, places, None, "blockwise")
