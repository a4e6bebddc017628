"""Matmul with the head, log-softmax and pick of the target in C slices of T, with one hand-written backward pass.

With logits z = h w^T, p = softmax(z), outputs l = z[target] - logsumexp(z) and n = logsumexp(z), and cotangents dl, dn:
dz = dl (onehot(target) - p) + dn p. C = 1 keeps z for the backward pass; C > 1 recomputes each slice of it.
"""

from functools import partial

import jax
import jax.numpy as jnp

from maxi.kernels.cpu import product, product_of_rows
from maxi.sharding import shards


def _logits(h_BTD: jax.Array, w_VD: jax.Array) -> jax.Array:
    return product("BTD,VD->BTV", h_BTD, w_VD)


def _onehot(targets_BT: jax.Array, V: int) -> jax.Array:
    # compared rather than gathered: a vocabulary split over devices then needs no gather of logits
    return targets_BT[..., None] == jax.lax.broadcasted_iota(jnp.int32, (1, 1, V), 2)


def _outputs(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    norm_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.where(_onehot(targets_BT, logits_BTV.shape[-1]), logits_BTV, 0.0).sum(-1)
    return target_BT - norm_BT, norm_BT


def _gradients(n, logits_BTV, h_BTD, w_VD, targets_BT, norm_BT, dlogprob_BT, dnorm_BT):
    """Of h and w; that of w is in `n` parts, one for each device that T is split over (see `_nothing`)."""
    p_BTV = jnp.exp(logits_BTV - norm_BT[..., None])
    dz = (dnorm_BT - dlogprob_BT)[..., None] * p_BTV
    dz_BTV = jnp.where(_onehot(targets_BT, w_VD.shape[0]), dz + dlogprob_BT[..., None], dz).astype(h_BTD.dtype)
    dh_BTD = product("BTV,VD->BTD", dz_BTV, w_VD)
    if n == 1:
        dw = product_of_rows(dz_BTV, h_BTD)
    else:
        dz_BCTV, h_BCTD = (a.reshape(a.shape[0], n, -1, a.shape[-1]) for a in (dz_BTV, h_BTD))
        dw = jnp.einsum("BCTV,BCTD->CVD", dz_BCTV, h_BCTD, preferred_element_type=jnp.float32)
    return dh_BTD.astype(h_BTD.dtype), dw


def _nothing(n: int, w_VD: jax.Array) -> jax.Array:
    """The gradient of w before the first slice. With T split over n > 1 devices it is [n, V, D], so that they are added
    up over the devices once and not slice by slice."""
    return jnp.zeros(w_VD.shape if n == 1 else (n, *w_VD.shape), jnp.float32)


def _whole(dw: jax.Array, w_VD: jax.Array) -> jax.Array:
    return (dw if dw.ndim == 2 else dw.sum(0)).astype(w_VD.dtype)


def parts(a_BT: jax.Array) -> int:
    """Over how many devices T is split; 1 where it does not divide."""
    n = shards("T")
    return n if a_BT.shape[1] % n == 0 else 1


def _slices(C: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, ...] -> [C, B, T / C, ...]; each slice has an equal share of every device's part of T."""
    split = (a.reshape(a.shape[0], parts(a), C, -1, *a.shape[2:]) for a in arrays)
    return tuple(jnp.moveaxis(a, 2, 0).reshape(C, a.shape[0], -1, *a.shape[4:]) for a in split)


def _joined(n: int, a: jax.Array) -> jax.Array:
    """The inverse of `_slices` where T is split over `n` devices."""
    C, B, T, *rest = a.shape
    return jnp.moveaxis(a.reshape(C, B, n, T // n, *rest), 0, 2).reshape(B, C * T, *rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(C: int, h_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `maxi.kernels.logprobs.token_logprobs`; `C` slices, which the part of T that a device has must divide into."""
    return _fwd(C, h_BTD, w_VD, targets_BT)[0]


def _fwd(C, h_BTD, w_VD, targets_BT):
    if C == 1:
        logits_BTV = _logits(h_BTD, w_VD)
        out = _outputs(logits_BTV, targets_BT)
        return out, (h_BTD, w_VD, targets_BT, out[1], logits_BTV)
    slices = _slices(C, h_BTD, targets_BT)
    logprob, norm = jax.lax.map(lambda s: _outputs(_logits(s[0], w_VD), s[1]), slices)
    out = _joined(parts(h_BTD), logprob), _joined(parts(h_BTD), norm)
    return out, (h_BTD, w_VD, targets_BT, out[1], None)


def _bwd(C, saved, cotangents):
    h_BTD, w_VD, targets_BT, norm_BT, logits_BTV = saved
    if C == 1:
        dh_BTD, dw = _gradients(1, logits_BTV, h_BTD, w_VD, targets_BT, norm_BT, *cotangents)
        return dh_BTD, _whole(dw, w_VD), None
    n = parts(h_BTD)

    def one(total, slice_):
        h, targets, norm, dlogprob, dnorm = slice_
        dh, dw = _gradients(n, _logits(h, w_VD), h, w_VD, targets, norm, dlogprob, dnorm)
        return total + dw, dh

    slices = _slices(C, h_BTD, targets_BT, norm_BT, *cotangents)
    dw, dh = jax.lax.scan(one, _nothing(n, w_VD), slices)
    return _joined(n, dh), _whole(dw, w_VD), None


run.defvjp(_fwd, _bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cross_entropy(
    C: int, z_loss: float, h_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weight_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `maxi.kernels.logprobs.cross_entropy`; `C` slices as in `run`. The gradient is found together with the value,
    slice by slice, so that no logit is kept or computed twice."""
    (logprob_BT, norm_BT), _ = _fwd(C, h_BTD, w_VD, targets_BT)
    return _sums(z_loss, logprob_BT, norm_BT, weight_BT)


def _sums(z_loss, logprob_BT, norm_BT, weight_BT):
    nll, z = -(logprob_BT * weight_BT).sum(), (norm_BT**2 * weight_BT).sum()
    return nll + z_loss * z, nll, z


def _cross_entropy_fwd(C, z_loss, h_BTD, w_VD, targets_BT, weight_BT):
    n = parts(h_BTD) if C > 1 else 1

    def one(total, slice_):
        h, targets, weight = slice_
        logits = _logits(h, w_VD)
        logprob, norm = _outputs(logits, targets)
        dh, dw = _gradients(n, logits, h, w_VD, targets, norm, -weight, 2 * z_loss * norm * weight)
        return total + dw, (dh, logprob, norm)

    slices = _slices(C, h_BTD, targets_BT, weight_BT)
    if C == 1:
        dw, outs = one(jnp.zeros((), jnp.float32), tuple(a[0] for a in slices))
        dh_BTD, logprob_BT, norm_BT = outs
    else:
        dw, outs = jax.lax.scan(one, _nothing(n, w_VD), slices)
        dh_BTD, logprob_BT, norm_BT = (_joined(n, a) for a in outs)
    return _sums(z_loss, logprob_BT, norm_BT, weight_BT), (dh_BTD, _whole(dw, w_VD))


def _cross_entropy_bwd(C, z_loss, saved, cotangents):
    del C, z_loss
    return *((gradient * cotangents[0]).astype(gradient.dtype) for gradient in saved), None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
