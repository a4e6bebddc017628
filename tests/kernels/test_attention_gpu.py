"""The GPU's attention without a GPU: what its kernels walk over, that they lower for CUDA, meshes, and cuDNN's rows.

Their numbers are checked by the conformance suite, in Pallas' interpreter; `make gpu-compile` makes machine code of them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from maxi.dims import MESH_AXES
from maxi.errors import ConfigError
from maxi.kernels import platform
from maxi.kernels.attention import BACKENDS, attention, cudnn, gpu, prepare, reference
from maxi.kernels.attention.gpu import Tile, Tiles

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")


def _places(rows: list[list[tuple[int, int, int]]]) -> list[jax.Array]:
    """Positions, segments and contexts [B, T] of rows of (length, segment, context)."""
    positions, segments, contexts = [], [], []
    for runs in rows:
        sizes = {segment: length for length, segment, _ in runs}
        positions.append(np.concatenate([np.arange(n) + (sizes[c] if c else 0) for n, _, c in runs]))
        segments.append(np.concatenate([np.full(n, s) for n, s, _ in runs]))
        contexts.append(np.concatenate([np.full(n, c) for n, _, c in runs]))
    return [jnp.asarray(np.stack(a), jnp.int32) for a in (positions, segments, contexts)]


def _attend(q, k, v, positions, segments, contexts=None, **more):
    places = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}
    return attention(q, k, v, **places, q_contexts=contexts, **more)


def _random(B: int, T: int, N: int, K: int, H: int, dtype: str = "float32") -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K))


ROWS = [
    [(512, 1, 0)],
    [(100, 1, 0), (40, 2, 1), (120, 3, 1), (90, 4, 0), (2, 5, 0), (50, 6, 4), (110, 7, 0)],
    [(20, 0, 0), (300, 1, 0), (60, 0, 0), (100, 2, 1), (32, 0, 0)],
    [(512, 0, 0)],
]


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("tile", [Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)])
def test_walks_visit_what_is_seen_and_little_else(tile: Tile, window: int | None) -> None:
    places = _places(ROWS)
    positions, segments, contexts = places
    prepared = gpu._prepare(Tiles(tile, tile, tile), window, positions, segments, contexts)
    seen = np.asarray(reference.visible(positions, positions, segments, segments, contexts, window))
    tiles = (512 // tile.queries, 512 // tile.keys)
    wanted = seen.reshape(len(ROWS), tiles[0], tile.queries, tiles[1], tile.keys).any((2, 4))

    def visits(walk: jax.Array, others: int) -> np.ndarray:
        counts = np.zeros((*walk.shape[:2], others), int)
        for walked, count in zip(np.asarray(walk).reshape(-1, 4), counts.reshape(-1, others), strict=True):
            for first, number in walked.reshape(2, 2):
                count[first : first + number] += 1
                assert first + number <= others
        return counts

    by_queries = visits(prepared.forward, tiles[1])
    by_keys = visits(prepared.dkv, tiles[0]).transpose(0, 2, 1)
    np.testing.assert_array_equal(visits(prepared.dq, tiles[1]), by_queries)
    for counts in (by_queries, by_keys):
        assert counts.max() == 1
        assert counts[wanted].all()
        # between a block's ranges nothing is visited, inside one only what lies between two contexts
        assert counts.sum() <= 1.15 * wanted.sum()
        assert counts[3].sum() == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("N", "K", "H"), [(14, 2, 64), (4, 4, 96), (16, 8, 128), (4, 1, 256)])
def test_forward_and_backward_lower_for_cuda(N: int, K: int, H: int, dtype: str) -> None:
    """One kernel forward and two backward, in Triton's form; nothing else touches arrays of q's size but the loss."""
    B, T = 2, 1000
    place = jax.ShapeDtypeStruct((B, T), jnp.int32)
    arrays = [jax.ShapeDtypeStruct((B, T, heads, H), dtype) for heads in (N, K, K)]

    def loss(q, k, v, positions, segments, contexts):
        return _attend(q, k, v, positions, segments, contexts, backend="gpu").sum(dtype=jnp.float32)

    mesh = AbstractMesh((1,) * 4, MESH_AXES, axis_types=(AxisType.Auto,) * 4, abstract_device=H100)
    call = "__gpu$xla.gpu.triton"
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(call)]
    with platform.compiling_for("gpu"), use_abstract_mesh(mesh):
        program = jax.jit(jax.grad(loss, (0, 1, 2)))
        text = jax.export.export(program, platforms=["cuda"], disabled_checks=unchecked)(
            *arrays, place, place, place
        ).mlir_module()
    assert text.count(f"custom_call @{call}") == 3
    assert "stablehlo.dot_general" not in text
    assert f"tensor<{B}x{T}x{N}x{T}" not in text


def test_under_a_mesh_every_device_attends_to_its_own_rows_and_heads() -> None:
    """With what is prepared made outside (batch whole) and inside (batch split)."""
    q, k, v = _random(4, 40, 4, 2, 16)
    places = _places([[(30, 1, 0), (10, 0, 0)], [(10, 1, 0), (15, 2, 1), (15, 3, 1)], [(40, 1, 0)], [(20, 1, 0), (20, 2, 0)]])
    weight = _random(4, 40, 4, 2, 16)[0]

    def loss(q, k, v, backend):
        return (weight * _attend(q, k, v, *places, backend=backend)).sum()

    wanted = jax.jit(jax.grad(partial(loss, backend="reference"), (0, 1, 2)))(q, k, v)
    for shape in ((1, 2, 1, 2), (1, 1, 1, 2)):
        devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
        with jax.set_mesh(jax.sharding.Mesh(devices, MESH_AXES)), platform.interpreting():
            got = jax.jit(jax.grad(partial(loss, backend="gpu"), (0, 1, 2)))(q, k, v)
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_is_prepared_once_is_used_and_rows_that_break_the_contract_are_nan() -> None:
    q, k, v = _random(3, 40, 2, 1, 16)
    places = _places([[(40, 1, 0)], [(10, 1, 0), (20, 2, 0), (10, 1, 0)], [(15, 1, 0), (25, 2, 0)]])[:2]
    with platform.interpreting():
        ready = prepare((2, 1, 16), q.dtype, places[0], places[1], backend="gpu")
        nothing = jax.tree.map(jnp.zeros_like, ready)
        out, unready, other = (
            np.asarray(jax.jit(partial(_attend, backend="gpu"))(q, k, v, *places, prepared=p)) for p in (ready, None, nothing)
        )
    np.testing.assert_array_equal(out, unready)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()
    assert not other.any()


@pytest.mark.parametrize("window", [None, 9])
def test_cudnn_takes_rows_of_one_document_and_refuses_the_others(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but cuDNN itself: jax's own implementation of the same call stands in for it."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    q, k, v = _random(5, 40, 4, 2, 16, "bfloat16")
    packed = [[(10, 1, 0), (30, 2, 0)], [(5, 0, 0), (35, 1, 0)]]
    places = _places([[(40, 1, 0)], [(30, 7, 0), (10, 0, 0)], [(40, 0, 0)], *packed])[:2]
    with platform.compiling_for("gpu"):
        out = np.asarray(_attend(q, k, v, *places, window=window, backend="cudnn"), np.float32)
    wanted = np.asarray(_attend(q, k, v, *places, window=window, backend="reference"), np.float32)
    np.testing.assert_allclose(out[:3], wanted[:3], atol=2e-2)
    assert not out[1, 30:].any()
    assert not out[2].any()
    assert np.isnan(out[3:]).all()


def test_cudnn_is_never_chosen_but_by_name() -> None:
    names = [backend.name for backend in BACKENDS]
    assert names.index("reference") < names.index("cudnn")
    q, k, v = _random(1, 8, 2, 1, 16)
    positions, segments, contexts = _places([[(4, 1, 0), (4, 2, 1)]])
    with platform.compiling_for("gpu"):
        with pytest.raises(ConfigError, match="contexts"):
            _attend(q, k, v, positions, segments, contexts, backend="cudnn")
        with pytest.raises(ConfigError, match="not float32"):
            _attend(q, k, v, positions, segments, backend="cudnn")
    for name in ("gpu", "cudnn"):
        with pytest.raises(ConfigError, match="made for GPU, not cpu"):
            _attend(q, k, v, positions, segments, backend=name)
