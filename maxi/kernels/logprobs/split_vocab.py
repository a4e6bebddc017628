"""The head where every device has part of the vocabulary: rows travel to the weights, and not the weights to the rows.

Inside a region of `maxi.fsdp` whose head is split by vocabulary, C slices of every device's rows are gathered one after
the other, the next while one computes. A device finds the logits of all gathered rows over its own vocabulary; only
log-normalisers, one float a row and device, and the gradients of rows travel back. Sums over the vocabulary are exact
for any logits: each device subtracts its own largest, and log-normalisers are added up as such.

Of 8,192 tokens a device and a vocabulary of 151,936 x 1024 over 16, whole weights would be 311 MB in bfloat16 with a
gradient of 622 MB in float32; here it is 19 and 39.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxi import fsdp

EXPONENT = 60.0
"""Logits within plus and minus this are summed without subtracting the largest: V exp(70) and exp(-60) are float32."""


class _Rows(NamedTuple):
    """Rows of all devices, and what is known of each."""

    h_BD: jax.Array
    targets_B: jax.Array
    weight_B: jax.Array


def _all(rows: _Rows) -> _Rows:
    """The rows of all devices from this device's."""
    return _Rows(*(lax.all_gather(a, fsdp.AXIS, axis=0, tiled=True) for a in rows))


def _hits(targets_B: jax.Array, w_VD: jax.Array) -> jax.Array:
    """Boolean [B, V]: where a row's target is in this device's part of the vocabulary."""
    first = lax.axis_index(fsdp.AXIS) * w_VD.shape[0]
    return (targets_B - first)[:, None] == lax.broadcasted_iota(jnp.int32, (1, w_VD.shape[0]), 1)


def _logits(rows: _Rows, w_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """This device's logits [B, V] of the rows of all, and their log-normaliser [B] over the whole vocabulary."""
    logits_BV = jnp.einsum("BD,VD->BV", rows.h_BD, w_VD, preferred_element_type=jnp.float32)
    return logits_BV, jax.nn.logsumexp(lax.all_gather(_log_sum(logits_BV), fsdp.AXIS), axis=0)


def _log_sum(logits_BV: jax.Array) -> jax.Array:
    """log sum exp over the last dimension, exact for any logits.

    As long as every sum stays within e^-60 and e^60, float32 holds it without subtracting the largest logit first, and
    the sum is a by-product of the matmul that makes the logits. Only beyond that are they read once more.
    """
    peak_B = logits_BV.max(-1)
    sum_B = jnp.exp(jnp.minimum(logits_BV, EXPONENT + 10.0)).sum(-1)
    is_held = (peak_B < EXPONENT) & (peak_B > -EXPONENT)

    def again() -> jax.Array:
        with jax.named_scope("rarely"):  # what reads a program's time off it (`maxi plan`) leaves this branch out
            return peak_B + jnp.log(jnp.exp(logits_BV - peak_B[:, None]).sum(-1))

    return lax.cond(is_held.all(), lambda: jnp.log(sum_B), again)


def _gradients(dz_BV: jax.Array, rows: _Rows, w_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of this device's rows, in their dtype, and of its part of the weight, float32."""
    dz_BV = dz_BV.astype(w_VD.dtype)
    dw_VD = jnp.einsum("BV,BD->VD", dz_BV, rows.h_BD, preferred_element_type=jnp.float32)
    dh_BD = jnp.einsum("BV,VD->BD", dz_BV, w_VD, preferred_element_type=jnp.float32)
    return fsdp.scattered(dh_BD.astype(rows.h_BD.dtype), 0).astype(rows.h_BD.dtype), dw_VD


def _own(a_B: jax.Array) -> jax.Array:
    """This device's rows of what is known of all."""
    size = a_B.shape[0] // fsdp.parts()
    return lax.dynamic_slice_in_dim(a_B, lax.axis_index(fsdp.AXIS) * size, size)


def _slices(C: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(a.reshape(C, -1, *a.shape[2:]) for a in arrays)


def _ahead(C: int, rows: _Rows, carry, body):
    """Scans `body(carry, all devices' rows of a slice, slice number)`, the next slice's rows travelling meanwhile."""

    def at(c):
        return _all(_Rows(*(lax.dynamic_index_in_dim(a, c, 0, keepdims=False) for a in rows)))

    def step(carry_here, c):
        carry, here = carry_here
        following = at(jnp.minimum(c + 1, C - 1))
        carry, out = body(carry, here, c)
        return (carry, following), out

    (carry, _), out = lax.scan(step, (carry, at(jnp.int32(0))), jnp.arange(C))
    return carry, out


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cross_entropy(
    C: int, z_loss: float, h_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weight_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `maxi.kernels.logprobs.cross_entropy`; sums over this device's rows, which divide into `C` slices. The
    gradient is found together with the value, so that no logit is computed twice."""
    return _cross_entropy(C, z_loss, h_BTD, w_VD, targets_BT, weight_BT)[0]


def _cross_entropy(C, z_loss, h_BTD, w_VD, targets_BT, weight_BT):
    def body(carry, rows, _):
        (nll, z, dw_VD) = carry
        logits_BV, norm_B = _logits(rows, w_VD)
        hits_BV = _hits(rows.targets_B, w_VD)
        # the targets' logits are summed over all devices' parts by the sum over devices that the step ends with
        own_B = _own(rows.weight_B * norm_B)
        nll += own_B.sum() - jnp.where(hits_BV, logits_BV * rows.weight_B[:, None], 0.0).sum()
        z += (own_B * _own(norm_B)).sum()
        scale_B = rows.weight_B * (1 + 2 * z_loss * norm_B)
        p_BV = jnp.exp(logits_BV - norm_B[:, None]) * scale_B[:, None]
        dh_BD, dw = _gradients(jnp.where(hits_BV, p_BV - rows.weight_B[:, None], p_BV), rows, w_VD)
        return (nll, z, dw_VD + dw), dh_BD

    zero = jnp.zeros((), jnp.float32)
    rows = _Rows(*_slices(C, h_BTD, targets_BT, weight_BT))
    (nll, z, dw_VD), dh = _ahead(C, rows, (zero, zero, jnp.zeros(w_VD.shape, jnp.float32)), body)
    return (nll + z_loss * z, nll, z), (dh.reshape(h_BTD.shape), dw_VD)


def _cross_entropy_bwd(C, z_loss, saved, cotangents):
    del C, z_loss
    dh_BTD, dw_VD = saved
    scale = cotangents[0]
    return (dh_BTD * scale).astype(dh_BTD.dtype), dw_VD * scale, None, None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(C: int, h_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `maxi.kernels.logprobs.token_logprobs`, of this device's rows, which divide into `C` slices."""
    return _fwd(C, h_BTD, w_VD, targets_BT)[0]


def _fwd(C, h_BTD, w_VD, targets_BT):
    def body(carry, rows, _):
        logits_BV, norm_B = _logits(rows, w_VD)
        target_B = jnp.where(_hits(rows.targets_B, w_VD), logits_BV, 0.0).sum(-1)
        return carry, (fsdp.scattered(target_B, 0), _own(norm_B), norm_B)

    rows = _Rows(*_slices(C, h_BTD, targets_BT, jnp.zeros(targets_BT.shape)))
    _, (target, norm, norms_CB) = _ahead(C, rows, None, body)
    norm_BT = norm.reshape(targets_BT.shape)
    return (target.reshape(targets_BT.shape) - norm_BT, norm_BT), (h_BTD, w_VD, targets_BT, norms_CB)


def _bwd(C, saved, cotangents):
    h_BTD, w_VD, targets_BT, norms_CB = saved
    dlogprob, dnorm = _slices(C, *cotangents)

    def body(dw_VD, rows, c):
        dlogprob_B, dnorm_B = (lax.all_gather(a[c], fsdp.AXIS, axis=0, tiled=True) for a in (dlogprob, dnorm))
        logits_BV = jnp.einsum("BD,VD->BV", rows.h_BD, w_VD, preferred_element_type=jnp.float32)
        dz_BV = (dnorm_B - dlogprob_B)[:, None] * jnp.exp(logits_BV - norms_CB[c][:, None])
        dz_BV = jnp.where(_hits(rows.targets_B, w_VD), dz_BV + dlogprob_B[:, None], dz_BV)
        dh_BD, dw = _gradients(dz_BV, rows, w_VD)
        return dw_VD + dw, dh_BD

    rows = _Rows(*_slices(C, h_BTD, targets_BT, jnp.zeros(targets_BT.shape)))
    dw_VD, dh = _ahead(C, rows, jnp.zeros(w_VD.shape, jnp.float32), body)
    return dh.reshape(h_BTD.shape), dw_VD, None


run.defvjp(_fwd, _bwd)
