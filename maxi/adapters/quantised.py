"""Frozen weights in 4 or 8 bits: NormalFloat4 and int8 by blocks, the blocks' scales quantised once more (QLoRA,
arXiv:2305.14314, section 3).

A weight lies in its own shape, two codes of 4 bits to a byte along its last dimension, so it is split over devices as the
weight itself would be. `BLOCK` neighbours along that dimension share a scale; the scales, less their mean, are int8 with
one float32 for `GROUP` of them: 4.13 or 8.13 bits a weight. A matmul expands one weight at a time and keeps none.
"""

from itertools import pairwise
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

BLOCK, GROUP = 64, 256
"""Those of the paper."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (the paper's appendix E)."""

Precision = Literal["int8", "nf4"]


@flax.struct.dataclass
class Quantised:
    """A weight [L, ...] or one layer's: codes, its blocks' int8 scales [..., blocks], and what these are scaled by."""

    codes: Any
    scales: Any
    group_scales: Any
    mean: Any
    precision: Precision = flax.struct.field(pytree_node=False)

    @property
    def dtype(self) -> Any:
        """What it is expanded to where nobody says: what it came from."""
        return jnp.dtype(jnp.float32)

    def expand(self, dtype: Any) -> jax.Array:
        """The weight in `dtype`; one layer's, without L."""
        spread = self.scales.reshape(-1).astype(jnp.float32) / 127
        group_scales = jnp.repeat(self.group_scales, GROUP)[: spread.size]
        absmax = (spread * group_scales + self.mean).reshape(self.scales.shape)
        if self.precision == "nf4":
            pairs = np.array([[NF4[code & 15], NF4[code >> 4]] for code in range(256)], np.float32)
            values = jnp.asarray(pairs)[self.codes].reshape(*self.codes.shape[:-1], -1)
        else:
            values = self.codes.astype(jnp.float32) / 127
        blocks = values.reshape(*absmax.shape, -1) * absmax[..., None]
        return blocks.reshape(values.shape).astype(dtype)


def block_of(width: int) -> int | None:
    """How many neighbours share a scale where the last dimension is `width`; None where it cannot be done (odd)."""
    return next((size for size in range(min(BLOCK, width), 1, -1) if width % size == 0 and size % 2 == 0), None)


def quantise(weight: jax.Array, precision: Precision, stacked: bool) -> Quantised:
    """A weight with L in front (`stacked`) or without, rounded to the nearest codes. Its last dimension is even."""
    return _quantise_layers(weight, precision) if stacked else _quantise(weight, precision)


def _quantise_layers(weight: jax.Array, precision: Precision) -> Quantised:
    # layer by layer: what is on the way to a code takes several times the weight's memory
    return jax.lax.map(lambda layer: _quantise(layer, precision), weight)


def _quantise(weight: jax.Array, precision: Precision) -> Quantised:
    block = block_of(weight.shape[-1])
    assert block is not None, weight.shape
    blocks = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, block)
    absmax = jnp.abs(blocks).max(-1)
    mean = absmax.mean()
    rest = (absmax - mean).reshape(-1)
    groups = jnp.pad(rest, (0, -rest.size % GROUP)).reshape(-1, GROUP)
    group_scales = jnp.abs(groups).max(-1)
    divisor = jnp.where(group_scales == 0, 1, group_scales)[:, None]
    scales = jnp.round(groups / divisor * 127).astype(jnp.int8).reshape(-1)[: rest.size].reshape(absmax.shape)
    # rounded against the scales as they will be read, of which a block's own maximum may lie a little beyond
    known = Quantised(jnp.full((*weight.shape[:-1], weight.shape[-1]), 127, jnp.int8), scales, group_scales, mean, "int8")
    unit = known.expand(jnp.float32)
    shares = jnp.clip(jnp.where(unit == 0, 0, weight / jnp.where(unit == 0, 1, unit)), -1, 1)
    if precision == "int8":
        return Quantised(jnp.round(shares * 127).astype(jnp.int8), scales, group_scales, mean, "int8")
    over = [shares > np.float32((low + high) / 2) for low, high in pairwise(NF4)]  # a search is ten times as slow on CPU
    codes = sum(one.astype(jnp.uint8) for one in over).reshape(*shares.shape[:-1], -1, 2)  # type: ignore[union-attr]
    return Quantised(codes[..., 0] | codes[..., 1] << 4, scales, group_scales, mean, "nf4")
