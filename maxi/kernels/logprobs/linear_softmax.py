"""Matmul with the head, log-softmax and pick of the target in C slices of T, with one hand-written backward pass.

With logits z = h w^T, p = softmax(z), outputs l = z[target] - logsumexp(z) and n = logsumexp(z), and cotangents dl, dn:
dz = dl (onehot(target) - p) + dn p. C = 1 keeps z for the backward pass; C > 1 recomputes each slice of it.
"""

from functools import partial

import jax
import jax.numpy as jnp

from maxi.sharding import einsum


def _logits(h_BTD: jax.Array, w_VD: jax.Array) -> jax.Array:
    return einsum("BTD,VD->BTV", h_BTD, w_VD, preferred_element_type=jnp.float32)


def _onehot(targets_BT: jax.Array, V: int) -> jax.Array:
    # compared rather than gathered: a vocabulary split over devices then needs no gather of logits
    return targets_BT[..., None] == jax.lax.broadcasted_iota(jnp.int32, (1, 1, V), 2)


def _outputs(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    norm_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.where(_onehot(targets_BT, logits_BTV.shape[-1]), logits_BTV, 0.0).sum(-1)
    return target_BT - norm_BT, norm_BT


def _gradients(logits_BTV, h_BTD, w_VD, targets_BT, norm_BT, dlogprob_BT, dnorm_BT):
    p_BTV = jnp.exp(logits_BTV - norm_BT[..., None])
    dz = (dnorm_BT - dlogprob_BT)[..., None] * p_BTV
    dz_BTV = jnp.where(_onehot(targets_BT, w_VD.shape[0]), dz + dlogprob_BT[..., None], dz).astype(h_BTD.dtype)
    dh_BTD = einsum("BTV,VD->BTD", dz_BTV, w_VD, preferred_element_type=jnp.float32)
    dw_VD = jnp.einsum("BTV,BTD->VD", dz_BTV, h_BTD, preferred_element_type=jnp.float32)
    return dh_BTD.astype(h_BTD.dtype), dw_VD


def _slices(C: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, ...] -> [C, B, T / C, ...]."""
    return tuple(a.reshape(a.shape[0], C, a.shape[1] // C, *a.shape[2:]).swapaxes(0, 1) for a in arrays)


def _joined(a: jax.Array) -> jax.Array:
    """The inverse of `_slices`."""
    return a.swapaxes(0, 1).reshape(a.shape[1], a.shape[0] * a.shape[2], *a.shape[3:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(C: int, h_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `maxi.kernels.logprobs.token_logprobs`; `C` slices, which T must divide into."""
    return _fwd(C, h_BTD, w_VD, targets_BT)[0]


def _fwd(C, h_BTD, w_VD, targets_BT):
    if C == 1:
        logits_BTV = _logits(h_BTD, w_VD)
        out = _outputs(logits_BTV, targets_BT)
        return out, (h_BTD, w_VD, targets_BT, out[1], logits_BTV)
    slices = _slices(C, h_BTD, targets_BT)
    logprob, norm = jax.lax.map(lambda s: _outputs(_logits(s[0], w_VD), s[1]), slices)
    out = _joined(logprob), _joined(norm)
    return out, (h_BTD, w_VD, targets_BT, out[1], None)


def _bwd(C, saved, cotangents):
    h_BTD, w_VD, targets_BT, norm_BT, logits_BTV = saved
    if C == 1:
        dh_BTD, dw_VD = _gradients(logits_BTV, h_BTD, w_VD, targets_BT, norm_BT, *cotangents)
        return dh_BTD, dw_VD.astype(w_VD.dtype), None

    def one(dw_VD, slice_):
        h, targets, norm, dlogprob, dnorm = slice_
        dh, dw = _gradients(_logits(h, w_VD), h, w_VD, targets, norm, dlogprob, dnorm)
        return dw_VD + dw, dh

    slices = _slices(C, h_BTD, targets_BT, norm_BT, *cotangents)
    dw_VD, dh = jax.lax.scan(one, jnp.zeros(w_VD.shape, jnp.float32), slices)
    return _joined(dh), dw_VD.astype(w_VD.dtype), None


run.defvjp(_fwd, _bwd)
