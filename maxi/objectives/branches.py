"""Answers in packed rows: what the tokens of each branch add up to.

A row holds up to P pairs of branches. `branches` [B, T] names the branch that a target belongs to: 1 + 2p is the first
of pair p, 2 + 2p its second, 0 is none (prompts, padding). `pair_weight` [B, P] is 1 where there is a pair and 0 where
there is none; whatever stands in such a place, its sums are 0. How rows are made is the business of `maxi.data`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Pairs(NamedTuple):
    """A number for either branch of every pair, float32 [B, P]."""

    first_BP: jax.Array
    second_BP: jax.Array


def branch_sums(values_BT: jax.Array, branches_BT: jax.Array, P: int) -> Pairs:
    """Sums of `values_BT` by branch, in float32.

    Neither scatter nor matmul: the one adds in no fixed order on a GPU, the other rounds to the device's matmul
    precision. Selecting and adding does neither, and never leaves the row, so that B may be split.
    """
    first_P = 1 + 2 * jnp.arange(P, dtype=branches_BT.dtype)

    def of(branch_P: jax.Array) -> jax.Array:
        return jnp.where(branches_BT[:, :, None] == branch_P, values_BT[:, :, None], 0).sum(1, dtype=jnp.float32)

    return Pairs(of(first_P), of(first_P + 1))


def branch_logprobs(logprob_BT: jax.Array, batch: Any) -> Pairs:
    """Log-probability of each branch: the sum over its counted targets, from that of each target, [B, T]."""
    weight_BT = batch["loss_weight"]
    return _of_pairs(jnp.where(weight_BT > 0, logprob_BT * weight_BT, 0), batch)


def branch_lengths(batch: Any) -> Pairs:
    """How many targets of each branch count."""
    return _of_pairs(batch["loss_weight"], batch)


def _of_pairs(values_BT: jax.Array, batch: Any) -> Pairs:
    real_BP = batch["pair_weight"] > 0
    sums = branch_sums(values_BT, batch["branches"], real_BP.shape[1])
    return Pairs(*(jnp.where(real_BP, sums_BP, 0) for sums_BP in sums))
