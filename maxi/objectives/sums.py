"""What an objective returns: sums, never means."""

from typing import NamedTuple

import jax


class Sums(NamedTuple):
    """Scalars of one micro-batch. The step's loss is the sum of `loss` over the sum of `weight`.

    `metrics` maps a name to its own (numerator, denominator), divided just as late.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]
