"""One conformance suite over all attention backends: values against float64 numpy, gradients against the reference's.

Kernels made for an accelerator run in Pallas' interpreter. Rows of one case differ, so that few programs are compiled.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxi.errors import ConfigError
from maxi.kernels import platform
from maxi.kernels.attention import BACKENDS, attention

ELSEWHERE = ("ring", "cudnn", "decode")
"""They need a mesh, a library that only a GPU has, or a cache: test_attention_ring.py, test_attention_gpu.py, and below."""
HERE = [backend.name for backend in BACKENDS if backend.name not in ELSEWHERE]

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiles in half the time; what is computed here is small."""

IN_FLOAT32 = "bfloat16 in float32"
"""The numbers that bfloat16 can hold, computed with in float32."""

Run = int | tuple[int, int]
"""A segment's length; negative: padding; a pair: a segment that also sees the run of that number, counted from 1."""

PACKED: list[list[Run]] = [[170], [1, 62, 2, 64, 1, 40], [-170], [110, -60], [-3, 97, -30, 40]]
SHARED: list[list[Run]] = [[60, (20, 1), (30, 1), 20, (1, 4), (29, 4), -10], [170], [-7, 80, 3, (40, 2), (15, 2), -25]]
# N, K, H, window, rows
CASES: dict[str, tuple[int, int, int, int | None, list[list[Run]]]] = {
    "packed": (2, 2, 64, None, PACKED),
    "groups of 2, heads of 96, window": (4, 2, 96, 17, PACKED),
    "groups of 8, heads of 128, shared prompts": (8, 1, 128, None, SHARED),
    "groups of 7, shared prompts, long window": (7, 1, 16, 130, [[80, (140, 1), (70, 1), -10], [3, 140, (156, 2), 1], [300]]),
    "window of one": (2, 1, 8, 1, [[20], [7, 1, -12]]),
    "single token": (2, 1, 8, None, [[1], [-1]]),
}


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    places: tuple[jax.Array, ...]
    """Positions, segments and, where there are any, contexts."""
    window: int | None


def _places(runs: list[Run]) -> list[np.ndarray]:
    sizes = [run[0] if isinstance(run, tuple) else abs(run) for run in runs]
    seen = [run[1] if isinstance(run, tuple) else 0 for run in runs]
    numbers = [0 if isinstance(run, int) and run < 0 else i + 1 for i, run in enumerate(runs)]
    positions = [np.arange(n) + (sizes[c - 1] if c else 0) for n, c in zip(sizes, seen, strict=True)]
    return [np.concatenate(positions), np.repeat(numbers, sizes), np.repeat(seen, sizes)]


def _inputs(name: str, dtype: str = "float32") -> Inputs:
    N, K, H, window, rows = CASES[name]
    positions, segments, contexts = (jnp.asarray(np.stack(a), jnp.int32) for a in zip(*map(_places, rows), strict=True))
    B, T = segments.shape
    rng = np.random.default_rng(sum(map(ord, name)))
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, T, N, H), (B, T, K, H), (B, T, K, H)))
    places = (positions, segments, contexts) if bool((contexts != 0).any()) else (positions, segments)
    return Inputs(q, k, v, places, window)


def _call(q, k, v, places, window, backend):
    positions, segments, *contexts = places
    return attention(
        q,
        k,
        v,
        q_positions=positions,
        k_positions=positions,
        q_segments=segments,
        k_segments=segments,
        q_contexts=contexts[0] if contexts else None,
        window=window,
        backend=backend,
    )


@cache
def _computed(case: str, backend: str, dtype: str = "float32") -> list[np.ndarray]:
    """The output, and the gradients of q, k and v for one weighting of it, in float64 for comparison."""
    inputs = _inputs(case, dtype.split(" ")[0])
    if dtype == IN_FLOAT32:
        inputs = inputs._replace(q=inputs.q.astype("float32"), k=inputs.k.astype("float32"), v=inputs.v.astype("float32"))
    weight = np.random.default_rng(1).normal(size=inputs.q.shape).astype(np.float32)

    def loss(q, k, v):
        out = _call(q, k, v, inputs.places, inputs.window, backend)
        return (weight * out).sum(), out

    with platform.interpreting():
        program = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)).lower(*inputs[:3]).compile(QUICK)
    (_, out), gradients = program(*inputs[:3])
    return [np.asarray(a, np.float64) for a in (out, *gradients)]


@cache
def _by_hand(case: str) -> np.ndarray:
    """Loops in float64, from the words of the docstring."""
    *arrays, places, window = _inputs(case)
    q, k, v = (np.asarray(a, np.float64) for a in arrays)
    positions, segments, *others = (np.asarray(a) for a in places)
    contexts = others[0] if others else np.zeros_like(segments)
    B, T, N, H = q.shape
    out = np.zeros_like(q)
    for b in range(B):
        for t in range(T):
            distance = positions[b, t] - positions[b]
            mine = (segments[b] == segments[b, t]) | (segments[b] == contexts[b, t])
            seen = mine & (segments[b] != 0) & (distance >= 0)
            if window is not None:
                seen &= distance < window
            if not seen.any():
                continue
            for n in range(N):
                head = n // (N // k.shape[2])
                scores = k[b, seen, head] @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, head]
    return out


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_definition(case: str, backend: str) -> None:
    np.testing.assert_allclose(_computed(case, backend)[0], _by_hand(case), atol=3e-6)


@pytest.mark.parametrize("backend", [name for name in HERE if name != "reference"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_reference(case: str, backend: str) -> None:
    for got, wanted in zip(_computed(case, backend)[1:], _computed(case, "reference")[1:], strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, wanted, atol=3e-5)


@pytest.mark.parametrize("backend", [name for name in HERE if name != "reference"])
@pytest.mark.parametrize("case", ["groups of 7, shared prompts, long window"])
def test_bf16_errs_at_most_twice_the_reference(case: str, backend: str) -> None:
    """Values and gradients, against float32 on the same numbers."""
    exact = _computed(case, "reference", IN_FLOAT32)
    for got, low, wanted in zip(
        _computed(case, backend, "bfloat16"), _computed(case, "reference", "bfloat16"), exact, strict=True
    ):
        assert np.abs(got - wanted).max() <= 2 * np.abs(low - wanted).max()
        assert np.square(got - wanted).mean() <= 4 * np.square(low - wanted).mean()


@pytest.mark.parametrize("backend", ["decode", "reference"])
def test_keys_in_another_order_and_number_than_queries(backend: str) -> None:
    """T != S, as in decoding: what a query sees is decided by positions and segments, not by slots."""
    q, k, v, (positions, segments), _ = _inputs("packed")
    order = np.random.default_rng(0).permutation(q.shape[1])
    part = slice(120, 127)
    got = attention(
        q[:, part],
        k[:, order],
        v[:, order],
        q_positions=positions[:, part],
        k_positions=positions[:, order],
        q_segments=segments[:, part],
        k_segments=segments[:, order],
        backend=backend,
    )
    whole = _call(q, k, v, (positions, segments), None, "reference")
    np.testing.assert_allclose(got, whole[:, part], atol=2e-6)


def test_a_named_backend_that_cannot_run_says_why() -> None:
    q, k, v, (positions, segments), _ = _inputs("packed")
    with pytest.raises(ConfigError, match="as many queries as keys"):
        attention(
            q[:, :4],
            k,
            v,
            q_positions=positions[:, :4],
            k_positions=positions,
            q_segments=segments[:, :4],
            k_segments=segments,
            backend="blockwise",
        )
    with pytest.raises(ConfigError, match="unknown"):
        _call(q, k, v, (positions, segments), None, "flash")
