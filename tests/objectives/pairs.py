"""Packed rows of pairs, made by hand: what the data hands to DPO and KTO, with log-probabilities instead of a model."""

import operator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PAIRS_OF_ROW = (1, 2, 3, 2, 1, 0)
B, T, P = len(PAIRS_OF_ROW), 72, 3
GRID = 1 / 1024
"""Log-probabilities are multiples of it, so that float32 adds them up exactly and only the loss is left to round."""
OFFSETS = (0.01, -0.3, 2.0, -25.0, 250.0, -250.0)
"""By how much policy and reference differ: margins that are rounding, those that teach, and hopeless ones."""

Batch = dict[str, Any]


def make(seed: int, offsets: tuple[float, ...] = OFFSETS) -> tuple[np.ndarray, Batch]:
    """Log-probabilities, float32 [B, T], and a batch. Places without a pair are padding."""
    rng = np.random.default_rng(seed)
    logprob = _on_grid(-rng.gamma(1.0, 1.5, (B, T)) - GRID)
    branches, weight = np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
    real = np.zeros((B, P), np.float32)
    refs = {name: np.zeros((B, P), np.float32) for name in ("ref_first", "ref_second")}
    for b in range(B):
        t = 0
        for p in range(PAIRS_OF_ROW[b]):
            real[b, p] = 1
            t += int(rng.integers(1, 4))  # a prompt
            for branch, ref in enumerate(refs.values()):
                length = int(rng.integers(1, 8))
                branches[b, t : t + length + 1] = 1 + 2 * p + branch
                weight[b, t : t + length] = 1  # and one target of the branch that does not count
                ref[b, p] = logprob[b, t : t + length].sum() + _on_grid(rng.normal() * rng.choice(offsets))
                t += length + 1
        assert t <= T
    labels = (rng.random((B, P)) < 0.5).astype(np.float32)
    labels[0, 0], labels[1, 0] = 1, 0
    return logprob, {"branches": branches, "loss_weight": weight, "pair_weight": real, "labels": labels, **refs}


def _on_grid(values: Any) -> Any:
    return np.float32(np.round(values / GRID) * GRID)


def junk(logprob_BT: np.ndarray, batch: Batch) -> tuple[np.ndarray, Batch]:
    """The same with nonsense wherever nothing counts."""
    nothing_BP = batch["pair_weight"] == 0
    logprob_BT = np.where(batch["loss_weight"] == 0, np.float32(-np.inf), logprob_BT)
    refs = {name: np.where(nothing_BP, np.float32(np.nan), batch[name]) for name in ("ref_first", "ref_second")}
    return logprob_BT, batch | refs


def sums(objective: Any, logprob_BT: Any, batch: Batch, totals: Any = None) -> tuple[Any, np.ndarray]:
    """Sums of a batch that is whole, or whose totals are given, and the gradient of the loss."""
    (_, found), grad = _gradient(objective)(jnp.asarray(logprob_BT), jax.tree.map(jnp.asarray, batch), totals)
    return found, np.asarray(grad)


def in_halves(objective: Any, logprob_BT: np.ndarray, batch: Batch) -> tuple[Any, np.ndarray]:
    """What `sums` gives, from two micro-batches whose totals were added up before."""
    parts = slice(0, B // 2), slice(B // 2, None)
    halves = [(logprob_BT[part], {name: value[part] for name, value in batch.items()}) for part in parts]
    totals = _added(*(objective.totals(lambda params, _: (params, None), *half) for half in halves))
    found, grads = zip(*(sums(objective, *half, totals) for half in halves), strict=True)
    return _added(*found), np.concatenate(grads)


def means(found: Any) -> dict[str, float]:
    """What the step makes of sums: the loss, and metrics."""
    divided = {"loss": (found.loss, found.weight), **found.metrics}
    return {name: float(total) / max(float(count), 1) for name, (total, count) in divided.items()}


def _added(one: Any, other: Any) -> Any:
    return jax.tree.map(operator.add, one, other)


@cache
def _gradient(objective: Any) -> Any:
    def logprobs(params: Any, _: Any) -> Any:
        return params, None

    def loss(logprob_BT: jax.Array, batch: Batch, totals: Any) -> Any:
        known = objective.totals(logprobs, logprob_BT, batch) if totals is None else totals
        found = objective.loss(logprobs, logprob_BT, {**batch, "totals": jax.lax.stop_gradient(known)})
        return found.loss, found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))
