"""Hidden states to the log-probability of each target token, without holding more logits than asked for.

One operation serves every objective: it returns the target's log-probability and the log-normaliser per token, and
differentiates with respect to both, so losses over tokens, over sequences and z-loss are all plain functions of it.
"""

import jax

from maxi.kernels.dispatch import Backend, choose
from maxi.kernels.logprobs import linear_softmax
from maxi.sharding import shards

FULL_AT_MOST = 512 << 20
"""Bytes of float32 logits per device that `auto` holds at once; at mini_qwen's vocabulary, 880 tokens."""


def _full(h_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return linear_softmax.run(1, h_BTD, w_VD, targets_BT)


def _chunked(h_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    T = h_BTD.shape[1]
    wanted = max(2, -(-_logit_bytes(h_BTD, w_VD) // FULL_AT_MOST))
    return linear_softmax.run(next((c for c in range(wanted, T) if T % c == 0), T), h_BTD, w_VD, targets_BT)


def _logit_bytes(h_BTD: jax.Array, w_VD: jax.Array) -> int:
    B, T, _ = h_BTD.shape
    return 4 * B * T * w_VD.shape[0] // (shards("B") * shards("T") * shards("V"))


def _full_why_not(h_BTD: jax.Array, w_VD: jax.Array, wanted: str) -> str | None:
    size = _logit_bytes(h_BTD, w_VD)
    if wanted == "auto" and size > FULL_AT_MOST:
        return f"logits would take {size >> 20} MiB a device, over {FULL_AT_MOST >> 20}"
    return None


def _chunked_why_not(h_BTD: jax.Array, w_VD: jax.Array, wanted: str) -> str | None:  # noqa: ARG001
    return None


BACKENDS = (Backend("full", _full, _full_why_not), Backend("chunked", _chunked, _chunked_why_not))


def token_logprobs(
    h_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, backend: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """log softmax(h w^T)[target] and logsumexp(h w^T), both float32 [B, T].

    h [B, T, D] and w [V, D] in one dtype (the head, or the embedding when tied), targets int32 [B, T] in [0, V).
    Products accumulate in float32. `backend`: full holds [B, T, V] logits, chunked one slice of T at a time and
    recomputes it in the backward pass.
    """
    chosen = choose("head", backend, BACKENDS, h_BTD, w_VD, backend)
    return chosen.run(h_BTD, w_VD, targets_BT)
