"""Sums by branch are numpy's, and stay on the device that holds the row."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxi.objectives.branches import branch_lengths, branch_logprobs, branch_sums
from tests.objectives import pairs


def test_sums_and_lengths() -> None:
    logprob, batch = pairs.make(0)
    first, second = (np.zeros((pairs.B, pairs.P)) for _ in "12")
    lengths = np.zeros((2, pairs.B, pairs.P))
    for b, t in np.ndindex(batch["branches"].shape):
        if branch := batch["branches"][b, t]:
            pair, counts = divmod(branch - 1, 2), batch["loss_weight"][b, t]
            (second if pair[1] else first)[b, pair[0]] += logprob[b, t] * counts
            lengths[pair[1], b, pair[0]] += counts
    np.testing.assert_array_equal(branch_logprobs(jnp.asarray(logprob), batch), (first, second))
    np.testing.assert_array_equal(branch_lengths(batch), lengths)


def test_rows_stay_where_they_are() -> None:
    rows = NamedSharding(Mesh(np.array(jax.devices()[:4]), "d"), PartitionSpec("d"))
    values, branches = jnp.ones((8, 64)), jnp.ones((8, 64), jnp.int32)

    def gradient(values_BT: jax.Array, branches_BT: jax.Array) -> jax.Array:
        return jax.grad(lambda values_BT: (branch_sums(values_BT, branches_BT, 5).first_BP ** 2).sum())(values_BT)

    compiled = jax.jit(gradient).lower(*(jax.device_put(a, rows) for a in (values, branches))).compile().as_text()
    assert compiled and not any(word in compiled for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
