"""The TPU attention kernel: its work lists, its backward pass by chunks, broken rows, races, and that it compiles for chips.

Its numbers over all kinds of rows are in `test_attention.py`, with the other backends'.
"""

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from maxi.dims import MESH_AXES
from maxi.kernels.attention import attention, prepare, tpu, tpu_blocks, work
from maxi.kernels.attention.spans import spans
from maxi.kernels.attention.tpu_blocks import Blocks, Sizes
from maxi.kernels.platform import compiling_for, interpreting

Places = tuple[np.ndarray, np.ndarray, np.ndarray]


def _places(B: int, *runs: tuple[int, int, int]) -> Places:
    """Positions, segments and contexts of rows made of runs: length, segment, context."""
    lengths = {segment: length for length, segment, _ in runs}
    positions = np.concatenate([np.arange(n) + (lengths[context] if context else 0) for n, _, context in runs])
    columns = [np.repeat([run[i] for run in runs], [run[0] for run in runs]) for i in (1, 2)]
    first, second, third = (np.broadcast_to(x, (B, x.size)).astype(np.int32) for x in (positions, *columns))
    return first, second, third


PACKED = _places(2, (100, 1, 0), (150, 2, 0), (30, 0, 0), (104, 3, 0))
BRANCHED = _places(1, (60, 1, 0), (120, 2, 1), (100, 3, 1), (20, 0, 0), (10, 4, 0), (74, 5, 4))


def _sizes(B: int, T: int, blocks: Blocks, chunk: int) -> Sizes:
    most = [B * work.most(T, *blocks[at : at + 2]) for at in (0, 2)]
    return Sizes(blocks, T, chunk, most[0], most[1], 32 << 20, 1)


def _arrays(B: int, T: int, N: int, K: int, H: int, dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K, N)]


def _seen(places: Places, window: int | None) -> np.ndarray:
    """Boolean [B, T, T], from the words of the definition."""
    positions, segments, contexts = places
    ahead = positions[:, :, None] - positions[:, None]
    same = (segments[:, :, None] == segments[:, None]) | (contexts[:, :, None] == segments[:, None])
    return same & (segments[:, None] != 0) & (segments[:, :, None] != 0) & (ahead >= 0) & (ahead < (window or 1 << 30))


@pytest.mark.parametrize("places, window", [(PACKED, None), (BRANCHED, 90)])
def test_work_lists_hold_every_pair_of_blocks_in_which_something_is_seen_once(places: Places, window: int | None) -> None:
    q_block, k_block, chunk = 32, 64, 4
    B, T = places[0].shape
    seen = jax.jit(partial(spans, window=window))(*map(jnp.asarray, places))
    meets = jax.jit(work.seen_blocks, static_argnums=(1, 2))(seen, q_block, k_block)
    wanted = _seen(places, window).reshape(B, T // q_block, q_block, T // k_block, k_block).any((2, 4))
    assert (np.asarray(meets) == wanted).all()
    length = B * work.most(T, q_block, k_block)
    faults = jnp.arange(B) == B - 1

    def entries(todo: work.Work) -> list[tuple[int, int, int, int]]:
        pairs = zip(np.asarray(todo.place), np.asarray(todo.step), strict=True)
        every = [(work.row(p), work.query_block(p), work.key_block(s), int(s) & 0xFF) for p, s in pairs]
        return [(int(b), int(i), int(j), flags) for b, i, j, flags in every[: int(todo.size)]]

    listed = jax.jit(work.by_key, static_argnums=(1, 2))(meets, chunk, length)
    forward = entries(jax.jit(work.by_query, static_argnums=2)(meets, faults, length))
    backward = entries(listed)
    for found in (forward, backward):
        did = [(row, i, j) for row, i, j, flags in found if flags & work.SEEN]
        assert sorted(did) == [tuple(at) for at in np.argwhere(wanted)]
        assert len(found) <= length
    for row, i, j, flags in forward:
        others = [(b, a, c) for b, a, c, _ in forward if (b, a) == (row, i)]
        assert bool(flags & work.FIRST) == (others[0] == (row, i, j))
        assert bool(flags & work.LAST) == (others[-1] == (row, i, j))
        assert bool(flags & work.BROKEN) == (row == B - 1)
    assert {(row, i) for row, i, _, _ in forward} == {(row, i) for row in range(B) for i in range(T // q_block)}
    assert {(row, j) for row, _, j, _ in backward} == {(row, j) for row in range(B) for j in range(T // k_block)}
    assert {(row, i // chunk) for row, i, _, _ in backward} == {
        (row, c) for row in range(B) for c in range(T // q_block // chunk)
    }
    for at, (row, i, j, flags) in enumerate(backward):
        part = [(a // chunk, c) for b, a, c, _ in backward if b == row]
        here = (i // chunk, j)
        edge = {-1: at == 0, 1: at == len(backward) - 1}
        near = {side: None if end else backward[at + side] for side, end in edge.items()}
        for side, flag in ((-1, work.FIRST), (1, work.LAST)):
            beside = near[side]
            assert bool(flags & flag) == (beside is None or (beside[0], beside[1] // chunk, beside[2]) != (row, *here))
        for side, flag in ((-1, work.CHUNK_FIRST), (1, work.CHUNK_LAST)):
            beside = near[side]
            assert bool(flags & flag) == (beside is None or (beside[0], beside[1] // chunk) != (row, here[0]))
        assert bool(flags & work.RESUMES) == any(c == j and other < here[0] for other, c in part)
        assert bool(flags & work.PAUSES) == any(c == j and other > here[0] for other, c in part)


CHUNKED = {
    "branched, group of 7": (BRANCHED, (7, 1, 96), None, Blocks(128, 128, 128, 128), 128),
    "unequal blocks, window": (_places(1, (10, 0, 0), (502, 1, 0)), (4, 2, 64), 200, Blocks(128, 256, 256, 128), 256),
}


@pytest.mark.parametrize("case", CHUNKED)
def test_values_and_gradients_by_chunks(case: str) -> None:
    places, (N, K, H), window, blocks, chunk = CHUNKED[case]
    B, T = places[0].shape
    q, k, v, dout = _arrays(B, T, N, K, H)
    positions, segments, contexts = map(jnp.asarray, places)
    static = {"window": window, "scale": H**-0.5, "sizes": _sizes(B, T, blocks, chunk), "interpret": True}
    mine = partial(tpu.kernel, places=(positions, segments, contexts), **static)
    theirs = partial(_reference, positions, segments, q_contexts=contexts, window=window)
    for a, b in zip(_both(mine, q, k, v, dout), _both(theirs, q, k, v, dout), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def _reference(positions: jax.Array, segments: jax.Array, q: Any, k: Any, v: Any, **masks: Any) -> jax.Array:
    same = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}
    return attention(q, k, v, **same, **masks, backend="reference")


def _both(function: Any, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> list[jax.Array]:
    """Values and the gradients of q, k and v."""

    @jax.jit
    def run(q, k, v, dout):
        out, pull = jax.vjp(function, q, k, v)
        return [out, *pull(dout)]

    return run(q, k, v, dout)


def _changed(places: Places, **changes: tuple[slice, Any]) -> tuple[jax.Array, ...]:
    """The places with some of the last row's entries replaced."""
    arrays = {name: np.array(array) for name, array in zip(("positions", "segments", "contexts"), places, strict=True)}
    for name, (at, value) in changes.items():
        arrays[name][-1, at] = value
    return tuple(jnp.asarray(array) for array in arrays.values())


BROKEN = {
    "a segment in two pieces": {"segments": (slice(300, None), 1)},
    "positions that stand still": {"positions": (slice(120, 122), 20)},
    "positions that jump": {"positions": (slice(50, 100), np.arange(51, 101))},
    "a context behind what sees it": {"contexts": (slice(0, 100), 2)},
    "a context that counts too far": {"contexts": (slice(100, 250), 1)},
}


def test_rows_that_break_the_contract_are_found() -> None:
    def found(places: Any) -> jax.Array:
        positions, segments, contexts = places
        return work.broken(positions, segments, contexts, spans(positions, segments, contexts))

    check = jax.jit(found)
    assert not check(tuple(map(jnp.asarray, PACKED))).any() and not check(tuple(map(jnp.asarray, BRANCHED))).any()
    for fault, changes in BROKEN.items():
        assert check(_changed(PACKED, **changes)).tolist() == [False, True], fault


def test_broken_rows_come_out_as_nan_and_others_do_not() -> None:
    places = _changed(PACKED, **BROKEN["a segment in two pieces"])
    q, k, v, _ = _arrays(2, 384, 2, 2, 32)
    sizes = _sizes(2, 384, Blocks(128, 128, 128, 128), 384)
    out = jax.jit(partial(tpu.kernel, places=places, window=None, scale=1.0, sizes=sizes, interpret=True))(q, k, v)
    assert bool(jnp.isfinite(out[0]).all()) and bool(jnp.isnan(out[1]).all())


def test_no_races() -> None:
    """Copies are simulated and every read and write is checked against them, sums in HBM included."""
    positions, segments, _ = map(jnp.asarray, _places(1, (40, 1, 0), (216, 2, 0)))
    q, k, v, dout = _arrays(1, 256, 2, 2, 32)
    how = pltpu.InterpretParams(detect_races=True)
    sizes = _sizes(1, 256, Blocks(128, 128, 128, 128), 128)
    mine = partial(tpu.kernel, places=(positions, segments), window=None, scale=0.2, sizes=sizes, interpret=how)
    theirs = partial(_reference, positions, segments, scale=0.2)
    for a, b in zip(_both(mine, q, k, v, dout), _both(theirs, q, k, v, dout), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def _call(arrays: list[Any], places: tuple[Any, ...], prepared: Any = None) -> jax.Array:
    positions, segments = places
    same = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}
    return attention(*arrays, **same, prepared=prepared, backend="tpu")


def test_rows_split_over_a_mesh_give_what_one_device_gives() -> None:
    places = tuple(jnp.asarray(np.tile(x, (2, 1))) for x in PACKED[:2])
    q, k, v, dout = _arrays(4, 384, 4, 2, 32)
    mesh = jax.make_mesh((1, 2, 1, 2), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)

    def both(q, k, v):
        ready = prepare((4, 2, 32), q.dtype, places[0], places[1], backend="tpu")
        out, pull = jax.vjp(lambda q, k, v: _call([q, k, v], places, ready), q, k, v)
        return out, pull(dout)

    with interpreting():
        alone = jax.jit(both)(q, k, v)
        with jax.set_mesh(mesh):
            split = jax.jit(both)(q, k, v)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_sizes_cover_the_row_fit_memory_and_grow_where_lists_would_not() -> None:
    shape = tpu.Shape(1, 4096, 16, 8, 128, jnp.bfloat16)
    for T in (1, 128, 300, 1152, 4096, 5000, 33000, 131072):
        sizes = tpu_blocks.choose(shape._replace(T=T), "v5e")
        assert sizes is not None and T <= sizes.T < T + 1024
        assert all(sizes.T % block == 0 and block % 128 == 0 for block in sizes.blocks)
        assert sizes.T % sizes.chunk == 0 and sizes.chunk % sizes.blocks.k_backward == 0
        assert 8 * max(sizes.entries_forward, sizes.entries_backward) <= tpu_blocks.SMEM_BYTES
    assert tpu_blocks.choose(shape._replace(B=512, T=131072)) is None


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_chips_under_a_mesh(topology: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward with chunks, heads of 64 in groups of 7 over `fsdp` and `tensor`: what a chip cannot run fails."""
    from jax.experimental import topologies

    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    axes = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, 2, 1, 2), MESH_AXES, axis_types=axes)
    B, T, N, K, H = 2, 4096, 14, 2, 64

    def spec(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        split = jax.sharding.PartitionSpec("fsdp", None, "tensor") if len(shape) == 4 else jax.sharding.PartitionSpec("fsdp")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, split))

    def gradients(q, k, v, *places):
        return jax.grad(lambda q, k, v: _call([q, k, v], places).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    arrays = (spec(B, T, N, H), spec(B, T, K, H), spec(B, T, K, H), spec(B, T, dtype=jnp.int32), spec(B, T, dtype=jnp.int32))
    with jax.set_mesh(mesh), compiling_for("tpu"):
        assert tpu_blocks.chip()[0] == topology[:3]
        text = jax.jit(gradients).lower(*arrays).compile().as_text()
    assert text is not None and "attention_forward" in text and "attention_backward" in text
    assert "all-gather" not in text and "all-reduce" not in text
