"""Logits to the next token: what may be drawn, and how.

Repetition penalty, temperature, top-k, top-p and min-p mean what they mean in transformers and act in its order, so
that settings copied from a model card do what its authors saw.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maxi.errors import ConfigError

NOTHING = -1
"""The token of a row that has ended."""
NOT_FINITE = -2
"""The token of a row whose logits are infinite or not numbers."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many. Raises ConfigError for a value out of range.

    `repetition_penalty` (1: off) acts on the tokens of prompt and continuation (Keskar et al., arXiv:1909.05858);
    `temperature` 0 takes the most likely token, and then no filter below matters; `top_k` (0: off); `top_p` (1: off;
    Holtzman et al., arXiv:1904.09751); `min_p` (0: off; arXiv:2407.01082). The draw for a token is a function of
    `seed`, the number of its prompt in the call, and its position.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (1 <= self.max_new_tokens <= 1 << 20, "from 1 to 1048576"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (the most likely token) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 <= self.top_p <= 1, "from 0 to 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0 (1: off)"),
            "seed": (0 <= self.seed < 1 << 32, "from 0 to 4294967295"),
        }
        for name, (fits, allowed) in ranges.items():
            if not fits:
                raise ConfigError(f"{name} is {getattr(self, name)}", "sampling", f"it must be {allowed}")


def row_keys(seed: int, rows: int) -> jax.Array:
    """One key a row, fold_in(key(seed), row): what a row draws does not depend on how many rows there are."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Logits [B, V] of tokens already seen (bool [B, V]) divided by `penalty` where positive, else multiplied by it."""
    penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def warp(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] after temperature (which must be above 0), top-k, top-p and min-p; what they drop is -inf.

    Tokens of equal logits are kept or dropped together (where transformers' top-p cuts among equals is arbitrary).
    """
    scores_BV = logits_BV / sampling.temperature
    V = scores_BV.shape[-1]
    if 0 < sampling.top_k < V:
        least = jax.lax.top_k(scores_BV, sampling.top_k)[0][:, -1:]
        scores_BV = jnp.where(scores_BV < least, -jnp.inf, scores_BV)
    if sampling.top_p < 1:
        ascending_BV = jnp.sort(scores_BV, axis=-1)
        dropped_BV = jnp.cumsum(jax.nn.softmax(ascending_BV, axis=-1), axis=-1) <= 1 - sampling.top_p
        first = jnp.minimum(dropped_BV.sum(-1, keepdims=True), V - 1)  # the most likely token always stays
        scores_BV = jnp.where(scores_BV < jnp.take_along_axis(ascending_BV, first, axis=-1), -jnp.inf, scores_BV)
    if sampling.min_p > 0:
        p_BV = jax.nn.softmax(scores_BV, axis=-1)
        scores_BV = jnp.where(p_BV < sampling.min_p * p_BV.max(-1, keepdims=True), -jnp.inf, scores_BV)
    return scores_BV


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array | None, keys_B: jax.Array, positions_B: jax.Array, sampling: Sampling
) -> jax.Array:
    """The next token of each row, int32 [B], NOT_FINITE where a row's logits are not.

    logits float32 [B, V]; seen bool [B, V], or None without a repetition penalty; keys from `row_keys`; positions
    int32 [B] of the tokens to be chosen.
    """
    scores_BV = logits_BV
    if seen_BV is not None:
        scores_BV = penalize(scores_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        tokens_B = jnp.argmax(scores_BV, axis=-1)
    else:
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, warp(scores_BV, sampling))
    return jnp.where(jnp.isfinite(logits_BV).all(-1), tokens_B, NOT_FINITE).astype(jnp.int32)
