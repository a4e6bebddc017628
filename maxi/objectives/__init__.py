"""Objectives: what is learned, one file each.

An objective is a frozen dataclass with

    rows                 what its data must be: documents, conversations, preferences or labels (a class attribute)
    needs_reference      whether batches must bring a reference model's log-probabilities
    loss(logprobs, params, batch) -> Sums

pure, and summing rather than averaging: the step divides once, over all devices and micro-batches, so that an
accumulated batch gives exactly the whole batch's loss. `logprobs(params, batch)` is the model: log-probability of each
target and log-normaliser, float32 [B, T]; `logprobs.cross_entropy(params, batch, z_loss)` is their sum weighted by
`loss_weight`, for objectives that are one, and costs less. What a loss must know of the whole global batch before it
can be computed, an objective says in

    totals(logprobs, params, batch) -> dict of scalars

sums without gradient, which the step adds up over devices and micro-batches and hands to `loss` as `batch["totals"]`.
Objectives do not import each other.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax

from maxi.objectives.dpo import DPO
from maxi.objectives.kto import KTO
from maxi.objectives.pretrain import Pretrain
from maxi.objectives.sft import SFT
from maxi.objectives.sums import Sums
from maxi.params import Tree

__all__ = ["OBJECTIVES", "Logprobs", "Objective", "Sums", "build"]

Batch = dict[str, jax.Array]


class Logprobs(Protocol):
    """The model as an objective sees it, see `maxi.models.decoder.Logprobs`."""

    def __call__(self, params: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]: ...

    def cross_entropy(self, params: Tree, batch: Batch, z_loss: float) -> tuple[jax.Array, jax.Array, jax.Array]: ...


class Objective(Protocol):
    rows: ClassVar[str]

    @property
    def needs_reference(self) -> bool: ...

    def loss(self, logprobs: Logprobs, params: Tree, batch: Batch) -> Sums: ...


OBJECTIVES: Mapping[str, Callable[..., Objective]] = {"pretrain": Pretrain, "sft": SFT, "dpo": DPO, "kto": KTO}
"""Name in the config -> dataclass; its fields are the objective's options."""


def build(name: str, **options: Any) -> Objective:
    """The objective of that name; the config has checked both."""
    return OBJECTIVES[name](**options)
