"""Norm and rotation of heads: the TPU's form against the reference, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxi.errors import ConfigError
from maxi.kernels.platform import compiling_for
from maxi.kernels.rotary import rotary


def _inputs(H: int, dtype: str = "bfloat16"):
    rng = np.random.default_rng(H)
    x = jnp.asarray(3 * rng.normal(size=(2, 9, 3, H)), dtype)
    angles = rng.normal(size=(2, 9, H // 2)) * 5
    angles = np.concatenate([angles, angles], -1)
    weight = jnp.asarray(1 + 0.3 * rng.normal(size=H), jnp.float32)
    return x, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32), weight


@pytest.mark.parametrize("H", [64, 96, 128])
@pytest.mark.parametrize("normed", [False, True])
def test_the_tpu_form_errs_no_more_than_the_reference(H: int, normed: bool) -> None:
    x, cos, sin, weight = _inputs(H)
    weight = weight if normed else None
    mix = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def both(backend: str, dtype):
        def loss(x, weight):
            return (mix * rotary(x, cos, sin, weight, 1e-6, backend).astype(jnp.float32)).sum()

        out = rotary(x.astype(dtype), cos, sin, weight, 1e-6, backend)
        grads = jax.grad(loss, (0, 1) if normed else 0)(x.astype(dtype), weight)
        return [np.asarray(a, np.float32) for a in jax.tree.leaves((out, grads))]

    exact = both("reference", jnp.float32)
    rounded = both("reference", jnp.bfloat16)
    with compiling_for("tpu"):
        got = both("tpu", jnp.bfloat16)
    for a, b, c in zip(got, rounded, exact, strict=True):
        assert np.abs(a - c).max() <= 2 * np.abs(b - c).max()


def test_it_says_why_it_cannot_run() -> None:
    x, cos, sin, _ = _inputs(64, "float32")
    with pytest.raises(ConfigError, match="made for TPU"):
        rotary(x, cos, sin, backend="tpu")
    with compiling_for("tpu"), pytest.raises(ConfigError, match="exact for bfloat16"):
        rotary(x, cos, sin, backend="tpu")
