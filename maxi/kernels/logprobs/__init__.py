"""Hidden states to the log-probability of each target token, without holding more logits than asked for.

`token_logprobs` serves every objective: it returns the target's log-probability and the log-normaliser per token, and
differentiates with respect to both, so losses over tokens, over sequences and z-loss are all plain functions of it.
`cross_entropy` is the sum of those that are weighted token by token: its gradient is found together with its value, with
a quarter less work.

    linear_softmax.py   C slices of the sequence, all of the vocabulary
    split_vocab.py      the vocabulary split over the devices of fsdp
"""

from typing import Any

import jax

from maxi.kernels.dispatch import Backend, choose
from maxi.kernels.logprobs import linear_softmax, split_vocab
from maxi.sharding import shards

FULL_AT_MOST = 512 << 20
"""Bytes of float32 logits per device that `auto` holds at once; at mini_qwen's vocabulary, 880 tokens."""
SPLIT_AT_MOST = 160 << 20
"""The same where the vocabulary is split: more would only take memory, a slice's rows are of all devices."""


def _full(operation: str, options: tuple[Any, ...], *arrays: jax.Array) -> Any:
    return getattr(linear_softmax, operation)(1, *options, *arrays)


def _chunked(operation: str, options: tuple[Any, ...], *arrays: jax.Array) -> Any:
    h_BTD, w_VD = arrays[:2]
    T = h_BTD.shape[1] // linear_softmax.parts(h_BTD)
    C = _divisor(T, max(2, -(-_logit_bytes(h_BTD, w_VD) // FULL_AT_MOST)))
    return getattr(linear_softmax, operation)(C, *options, *arrays)


def _split(operation: str, options: tuple[Any, ...], *arrays: jax.Array) -> Any:
    B, T, _ = arrays[0].shape
    C = _divisor(B * T, -(-_logit_bytes(arrays[0], arrays[1]) * split_vocab.fsdp.parts() // SPLIT_AT_MOST))
    return getattr(split_vocab, operation)(C, *options, *arrays)


def _divisor(size: int, least: int) -> int:
    """The smallest divisor of `size` that is at least `least`."""
    return next((c for c in range(least, size) if size % c == 0), size)


def _logit_bytes(h_BTD: jax.Array, w_VD: jax.Array) -> int:
    B, T, _ = h_BTD.shape
    return 4 * B * T * w_VD.shape[0] // (shards("B") * shards("T") * shards("V"))


def _split_why_not(h_BTD: jax.Array, w_VD: jax.Array, wanted: str, by_vocabulary: bool) -> str | None:  # noqa: ARG001
    return None if by_vocabulary else "the head is not split by vocabulary over fsdp"


def _full_why_not(h_BTD: jax.Array, w_VD: jax.Array, wanted: str, by_vocabulary: bool) -> str | None:
    size = _logit_bytes(h_BTD, w_VD)
    if by_vocabulary:
        return "each device has part of the vocabulary"
    if wanted == "auto" and size > FULL_AT_MOST:
        return f"logits would take {size >> 20} MiB a device, over {FULL_AT_MOST >> 20}"
    return None


def _chunked_why_not(h_BTD: jax.Array, w_VD: jax.Array, wanted: str, by_vocabulary: bool) -> str | None:  # noqa: ARG001
    return "each device has part of the vocabulary" if by_vocabulary else None


BACKENDS = (
    Backend("split", _split, _split_why_not),
    Backend("full", _full, _full_why_not),
    Backend("chunked", _chunked, _chunked_why_not),
)


def token_logprobs(
    h_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, backend: str = "auto", by_vocabulary: bool = False
) -> tuple[jax.Array, jax.Array]:
    """log softmax(h w^T)[target] and logsumexp(h w^T), both float32 [B, T].

    h [B, T, D] and w [V, D] in one dtype (the head, or the embedding when tied), targets int32 [B, T] in [0, V).
    Products accumulate in float32. `backend`: full holds [B, T, V] logits, chunked one slice of T at a time and
    recomputes it in the backward pass. `by_vocabulary`: w is this device's part of it (see `maxi.fsdp`), which only
    split can compute with, in slices too.
    """
    chosen = choose("head", backend, BACKENDS, h_BTD, w_VD, backend, by_vocabulary)
    return chosen.run("run", (), h_BTD, w_VD, targets_BT)


def cross_entropy(
    h_BTD: jax.Array,
    w_VD: jax.Array,
    targets_BT: jax.Array,
    weight_BT: jax.Array,
    z_loss: float = 0.0,
    backend: str = "auto",
    by_vocabulary: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """sum(weight (nll + z_loss norm^2)), sum(weight nll) and sum(weight norm^2), float32 scalars, where nll and norm are
    -log softmax(h w^T)[target] and logsumexp(h w^T). Only the first has a gradient, towards h and w.

    Arguments as in `token_logprobs`; weight float32 [B, T]. With `by_vocabulary` the sums are right once they are added
    up over the devices; a device's own mean nothing.
    """
    chosen = choose("head", backend, BACKENDS, h_BTD, w_VD, backend, by_vocabulary)
    return chosen.run("cross_entropy", (z_loss,), h_BTD, w_VD, targets_BT, weight_BT)
