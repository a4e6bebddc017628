"""One conformance suite over all attention backends: against float64 numpy, and their gradients against the reference's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxi.errors import ConfigError
from maxi.kernels.attention import BACKENDS, attention

# B, T, N, K, H, window, segment runs of every row (negative: padding; a pair: a run that also sees the run of that number)
CASES = {
    "one document": (1, 64, 4, 4, 16, None, [64]),
    "several blocks": (2, 300, 4, 2, 16, None, [300]),
    "group of 7": (1, 130, 14, 2, 8, None, [130]),
    "one key head": (2, 140, 6, 1, 32, None, [100, 40]),
    "packed": (2, 260, 4, 2, 16, None, [1, 127, 2, 100, 30]),
    "padding": (1, 150, 4, 2, 16, None, [100, -50]),
    "all padding": (1, 32, 2, 2, 8, None, [-32]),
    "window": (1, 300, 4, 2, 16, 17, [300]),
    "window, packed": (2, 280, 4, 2, 16, 130, [140, 60, -80]),
    "window of one": (1, 20, 2, 1, 8, 1, [20]),
    "single token": (1, 1, 2, 1, 8, None, [1]),
    "shared prompts": (2, 300, 4, 2, 16, None, [100, (40, 1), (60, 1), 30, (1, 4), (59, 4), -10]),
    "shared prompts, window": (1, 420, 4, 2, 16, 90, [80, (200, 1), (100, 1), -40]),
}


def _inputs(name: str, dtype: str = "float32"):
    B, T, N, K, H, window, runs = CASES[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H))
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    sizes = [run[0] if isinstance(run, tuple) else abs(run) for run in runs]
    seen = [run[1] if isinstance(run, tuple) else 0 for run in runs]
    numbers = [0 if isinstance(run, int) and run < 0 else i + 1 for i, run in enumerate(runs)]
    segments, contexts = np.repeat(numbers, sizes), np.repeat(seen, sizes)
    positions = np.concatenate([np.arange(n) + (sizes[c - 1] if c else 0) for n, c in zip(sizes, seen, strict=True)])
    arrays = (positions, segments, contexts) if any(seen) else (positions, segments)
    places = tuple(jnp.asarray(np.broadcast_to(a, (B, T)), jnp.int32) for a in arrays)
    return q, k, v, places, window


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


def _by_hand(q, k, v, places, window) -> np.ndarray:
    """Loops in float64, from the words of the docstring."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
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


@pytest.mark.parametrize("backend", [backend.name for backend in BACKENDS])
@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_definition(case: str, backend: str) -> None:
    q, k, v, places, window = _inputs(case)
    got = np.asarray(_call(q, k, v, places, window, backend), np.float64)
    np.testing.assert_allclose(got, _by_hand(q, k, v, places, window), atol=2e-6)


@pytest.mark.parametrize("backend", [backend.name for backend in BACKENDS if backend.name != "reference"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_reference(case: str, backend: str) -> None:
    q, k, v, places, window = _inputs(case)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def loss(q, k, v, backend):
        return (weight * _call(q, k, v, places, window, backend)).sum()

    wanted = jax.grad(partial(loss, backend="reference"), (0, 1, 2))(q, k, v)
    got = jax.grad(partial(loss, backend=backend), (0, 1, 2))(q, k, v)
    for a, b in zip(got, wanted, strict=True):
        assert bool(jnp.isfinite(a).all())
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("backend", [backend.name for backend in BACKENDS])
@pytest.mark.parametrize("case", ["several blocks", "packed", "window"])
def test_bf16_errs_at_most_twice_the_reference(case: str, backend: str) -> None:
    q, k, v, places, window = _inputs(case, "bfloat16")
    exact = _by_hand(q, k, v, places, window)
    error = np.abs(np.asarray(_call(q, k, v, places, window, backend), np.float64) - exact).max()
    reference = np.abs(np.asarray(_call(q, k, v, places, window, "reference"), np.float64) - exact).max()
    assert error <= 2 * reference


def test_keys_in_another_order_and_number_than_queries() -> None:
    """T != S, as in decoding: what a query sees is decided by positions and segments, not by slots."""
    q, k, v, (positions, segments), _ = _inputs("packed")
    order = np.random.default_rng(0).permutation(q.shape[1])
    part = slice(200, 207)
    got = attention(
        q[:, part],
        k[:, order],
        v[:, order],
        q_positions=positions[:, part],
        k_positions=positions[:, order],
        q_segments=segments[:, part],
        k_segments=segments[:, order],
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
