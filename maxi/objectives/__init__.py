"""Objectives: what is learned, one file each.

An objective is a frozen dataclass with

    loss(logprobs, params, batch) -> Sums

pure, and summing rather than averaging: the step divides once, over all devices and micro-batches, so that an
accumulated batch gives exactly the whole batch's loss. `logprobs(params, batch)` is the model: log-probability of each
target and log-normaliser, float32 [B, T]. Objectives do not import each other.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from maxi.objectives.pretrain import Pretrain
from maxi.objectives.sums import Sums
from maxi.params import Tree

__all__ = ["OBJECTIVES", "Logprobs", "Objective", "Sums", "build"]

Batch = dict[str, jax.Array]
Logprobs = Callable[[Tree, Batch], tuple[jax.Array, jax.Array]]


class Objective(Protocol):
    def loss(self, logprobs: Logprobs, params: Tree, batch: Batch) -> Sums: ...


OBJECTIVES: Mapping[str, Callable[..., Objective]] = {"pretrain": Pretrain}
"""Name in the config -> dataclass; its fields are the objective's options."""


def build(name: str, **options: Any) -> Objective:
    """The objective of that name; the config has checked both."""
    return OBJECTIVES[name](**options)
