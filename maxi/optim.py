"""The optimizer and its learning rate, from optax's parts; what decays and what Muon takes is read from the table."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from maxi.params import Param, Table, Tree, decay_mask
from maxi.sections import OptimConfig

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2
"""Muon's updates are scaled to AdamW's usual root mean square, so one learning rate serves both
(Moonlight, arXiv:2502.16982, section 2.2)."""


Around = Callable[[optax.GradientTransformation, optax.GradientTransformation], optax.GradientTransformation]


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate at each step from 0: linear warm-up from 0, then the configured shape, ending at step `steps`."""
    warmup = config.warmup_steps if config.warmup_steps is not None else round((config.warmup_ratio or 0) * steps)
    rest, end = max(steps - warmup, 1), config.lr * config.min_lr_ratio
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, rest, config.min_lr_ratio)
    elif config.schedule == "linear":
        after = optax.linear_schedule(config.lr, end, rest)
    elif config.schedule == "wsd":
        decay = min(rest, max(1, round(config.decay_ratio * steps)))
        after = optax.linear_schedule(config.lr, end, decay, rest - decay)
    else:
        after = optax.constant_schedule(config.lr)
    if not warmup:
        return after
    # The first update would be lost at a rate of 0, so the ramp starts one step in.
    ramp = optax.linear_schedule(config.lr / warmup, config.lr, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def optimizer(
    config: OptimConfig, table: Table, rate: optax.Schedule, around: Around | None = None
) -> optax.GradientTransformation:
    """Clipping, AdamW (arXiv:1711.05101) or Muon (Jordan et al., 2024) with AdamW, weight decay, learning rate.

    `around` puts clipping and the rest together where something stands before, between and after them.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "muon":
        labels = table.map(lambda _, param: "muon" if _is_muon(param) else "adam")
        direction = optax.partition({"muon": _muon(table), "adam": adam}, labels)
    else:
        direction = adam
    clip = [_clip(config.clip_norm)] if config.clip_norm else []
    parts = [direction]
    if config.weight_decay:
        parts += [optax.add_decayed_weights(config.weight_decay, decay_mask(table, config.decay_embeddings))]
    if any(param.rate != 1 for param in table.params.values()):
        rates = table.map(lambda _, param: param.rate)
        parts += [optax.stateless(lambda updates, _: jax.tree.map(operator.mul, updates, rates))]
    parts += [optax.scale_by_learning_rate(rate)]
    return around(optax.chain(*clip), optax.chain(*parts)) if around else optax.chain(*clip, *parts)


def _clip(most: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by a factor, which XLA applies wherever it reads an update. Dividing by the norm it joins
    with the division by the tokens before, and then keeps the gradients from before both beside those in between."""

    def clipped(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        factor = jnp.minimum(1.0, most / optax.tree.norm(updates))
        return jax.tree.map(lambda update: update * factor, updates)

    return optax.stateless(clipped)


def _muon(table: Table) -> optax.GradientTransformation:
    """Muon on every matrix inside the layers, each layer's by itself, heads flattened into the matrix they are."""

    def of_muon(make: Callable[[Param], Any]) -> Tree:
        # `optax.partition` hides the other leaves behind MaskedNode, and trees beside it must match
        return table.map(lambda _, param: make(param) if _is_muon(param) else optax.MaskedNode())

    def axes(param: Param) -> contrib.MuonDimensionNumbers:
        rows, columns = param.matrix_axes
        return contrib.MuonDimensionNumbers(reduction_axis=rows, output_axis=columns)

    scales = of_muon(lambda param: MUON_RMS * math.sqrt(max(table.hf_shape(param))))
    return optax.chain(
        contrib.scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=of_muon(axes)),
        optax.stateless(lambda updates, _: jax.tree.map(operator.mul, updates, scales)),
    )


def _is_muon(param: Param) -> bool:
    return param.is_matrix and param.stacked
