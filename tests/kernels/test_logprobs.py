"""Token log-probabilities: against float64 numpy, gradients against autodiff of the plain form, chunks against the whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maxi import fsdp, mesh
from maxi.kernels import logprobs as op
from maxi.kernels.logprobs import cross_entropy, linear_softmax, token_logprobs
from maxi.sections import MeshConfig


def _inputs(B: int = 2, T: int = 12, D: int = 16, V: int = 37, dtype: str = "float32"):
    rng = np.random.default_rng(0)
    h, w = jnp.asarray(rng.normal(size=(B, T, D)), dtype), jnp.asarray(rng.normal(size=(V, D)), dtype)
    return h, w, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def _plain(h, w, targets):
    z = jnp.einsum("BTD,VD->BTV", h, w)
    norm = jax.nn.logsumexp(z, -1)
    return jnp.take_along_axis(z, targets[..., None], -1)[..., 0] - norm, norm


@pytest.mark.parametrize("backend", ["full", "chunked"])
@pytest.mark.parametrize("shape", [(2, 12, 16, 37), (1, 7, 8, 5), (3, 64, 4, 128)])
def test_values_and_gradients(backend: str, shape: tuple[int, int, int, int]) -> None:
    h, w, targets = _inputs(*shape)
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.normal(size=targets.shape), jnp.float32) for _ in range(2))

    def loss(h, w, function):
        logprob, norm = function(h, w, targets)
        return (a * logprob).sum() + (b * norm**2).sum()

    logprob, norm = token_logprobs(h, w, targets, backend)
    z = np.einsum("BTD,VD->BTV", np.asarray(h, np.float64), np.asarray(w, np.float64))
    exact = np.log(np.exp(z).sum(-1))
    np.testing.assert_allclose(norm, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logprob, np.take_along_axis(z, np.asarray(targets)[..., None], -1)[..., 0] - exact, atol=2e-5)
    got = jax.grad(loss, (0, 1))(h, w, lambda h, w, t: token_logprobs(h, w, t, backend))
    wanted = jax.grad(loss, (0, 1))(h, w, _plain)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-4)


def test_logits_of_a_thousand_stay_finite() -> None:
    h, w, targets = _inputs()
    logprob, norm = token_logprobs(300 * h, w, targets, "full")
    assert bool(jnp.isfinite(logprob).all()) and bool(jnp.isfinite(norm).all()) and float(norm.max()) > 1000


def test_auto_goes_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, targets = _inputs(T=16)
    chunks: list[int] = []
    monkeypatch.setattr(linear_softmax, "run", lambda C, *args: chunks.append(C) or _plain(*args))
    token_logprobs(h, w, targets)
    monkeypatch.setattr(op, "FULL_AT_MOST", 4 * 2 * 16 * 37 // 4)
    token_logprobs(h, w, targets)
    assert chunks == [1, 4]


@pytest.mark.parametrize("T", [12, 13])
def test_chunked_never_holds_all_logits(T: int) -> None:
    h, w, targets = _inputs(B=1, T=T, V=4096)

    def loss(h, w):
        return token_logprobs(h, w, targets, "chunked")[0].sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(h, w).as_text()
    assert f"x{T}x4096x" not in text and "x4096x" in text


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_cross_entropy_and_a_split_vocabulary(scale: float, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and gradients of every form against autodiff of the plain one: whole, in chunks, and with the vocabulary over
    four devices, for logits that stay small, overflow exp, and do so by far."""
    h, w, targets = _inputs(B=4, T=12, D=16, V=36)
    h = scale * h
    if z_loss:
        monkeypatch.setattr(op, "SPLIT_AT_MOST", 4 * 12 * 36 // 3)
    weight = jnp.asarray(np.random.default_rng(2).random(targets.shape), jnp.float32)
    mix = jnp.asarray(np.random.default_rng(3).normal(size=(2, *targets.shape)), jnp.float32)

    def plain(h, w):
        logprob, norm = _plain(h, w, targets)
        return -(weight * logprob).sum() + z_loss * (weight * norm**2).sum()

    def plain_tokens(h, w):
        logprob, norm = _plain(h, w, targets)
        return (mix[0] * logprob + mix[1] * norm).sum()

    def of_device(h, w, targets, weight, mix):
        def sums(h, w):
            return cross_entropy(h, w, targets, weight, z_loss, by_vocabulary=True)[0]

        def tokens(h, w):
            logprob, norm = token_logprobs(h, w, targets, by_vocabulary=True)
            return (mix[0] * logprob + mix[1] * norm).sum()

        values = jax.value_and_grad(sums, (0, 1))(h, w), jax.value_and_grad(tokens, (0, 1))(h, w)
        return [(fsdp.summed(value), *grads) for value, grads in values]

    over = mesh.build(MeshConfig(fsdp=4), jax.devices()[:4])
    with jax.set_mesh(over):
        rows, parts = PartitionSpec("fsdp"), PartitionSpec("fsdp")
        one = (PartitionSpec(), rows, parts)
        split = fsdp.by_rows(of_device, (rows, parts, rows, rows, PartitionSpec(None, "fsdp")), [one, one])
        split = jax.jit(split)(h, w, targets, weight, mix)
    found = [(split[0], plain), (split[1], plain_tokens)]
    for backend in ("full", "chunked"):
        whole = partial(cross_entropy, targets_BT=targets, weight_BT=weight, z_loss=z_loss, backend=backend)
        (value, _), grads = jax.value_and_grad(lambda h, w, whole=whole: (whole(h, w)[0], None), (0, 1), has_aux=True)(h, w)
        found.append(((value, *grads), plain))
    for (value, *grads), function in found:
        wanted, wanted_grads = jax.value_and_grad(function, (0, 1))(h, w)
        np.testing.assert_allclose(value, wanted, rtol=2e-5)
        for a, b in zip(grads, wanted_grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(b).max()))
