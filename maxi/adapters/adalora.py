"""AdaLoRA: a weight's change as P diag(e) Q, whose ranks go where they matter (Zhang et al., arXiv:2303.10512).

All weights share a budget of ranks, which falls from `init_r` to `target_r` a weight. A rank's importance is that of its
entry of e and of its vectors: each number's sensitivity |w dL/dw| times how much that varies, both smoothed over steps
(equations 8 to 11). Ranks without a budget have their e set to zero; they may come back until the last allocation. P and Q
are held near orthogonal by a term of the loss (equation 4).

Names, layouts, schedule and arithmetic are those of peft's `AdaLoraModel` and `RankAllocator` (0.21). The term and the
allocation are part of the optimizer (`allocating`), once a step for all devices and micro-batches; so its state is saved
with the optimizer's, and the term is not in the losses that are shown.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maxi.adapters.lora import Lora
from maxi.adapters.weight import Parts
from maxi.errors import ConfigError
from maxi.params import Param, Table, Tree, get, put

EPS = 1e-5
"""Added to the rank that divides alpha, by peft."""


@dataclass(frozen=True)
class Schedule:
    """Steps before the first allocation, steps after the last, steps between two; how importance is smoothed; and the
    weight of the term that holds P and Q orthogonal."""

    target_r: int
    tinit: int
    tfinal: int
    delta_t: int
    beta1: float
    beta2: float
    orth_reg_weight: float


@dataclass(frozen=True)
class AdaLora(Lora):
    """Lora's A and B with `e` [L, R] between them, which is zero at first; `rank` is that of the beginning."""

    schedule: Schedule | None = None

    init_std = 0.02

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + EPS)

    @property
    def takes_embeddings(self) -> bool:
        return False

    def parts(self, path: str, param: Param) -> dict[str, Param]:
        """`a` [L, *inputs, R], `b` [L, R, *outputs], `e` [L, R]."""
        found = super().parts(path, param)
        a, b = (replace(part, hf=part.hf.removesuffix(".weight"), init="normal") for part in (found["a"], found["b"]))
        depth = param.dims.removesuffix(param.letters)
        return {"a": a, "b": b, "e": Param(f"{depth}R", a.hf.removesuffix("A") + "E", "R 1", "zeros")}

    def linear(self, pattern: str, x: jax.Array, base: Any, parts: Parts) -> jax.Array:
        return super().linear(pattern, x, base, _with_e(parts))

    def merged(self, path: str, param: Param, base: jax.Array, parts: Parts) -> jax.Array:
        return super().merged(path, param, base, _with_e(parts))


def build(*, init_r: int, alpha: float, dropout: float, **schedule: Any) -> AdaLora:
    """The kind that the section `adapter` asks for."""
    return AdaLora(init_r, alpha, dropout, schedule=Schedule(**schedule))


def _with_e(parts: Parts) -> Parts:
    """The parts as Lora's, e in A."""
    a, e = parts["a"], parts["e"]
    return {**parts, "a": a * e.reshape(*e.shape[:-1], *[1] * (a.ndim - e.ndim), e.shape[-1])}


class Allocation(NamedTuple):
    """`step` updates done, smoothed sensitivity and uncertainty of every number, and 1 in `kept` for the ranks that the last
    allocation left, trees like the weights; and the states of what comes before and after the gradient is looked at."""

    step: jax.Array
    sensitivity: Tree
    uncertainty: Tree
    kept: Tree
    before: Any
    after: Any


def allocating(
    schedule: Schedule, table: Table, total: int, before: optax.GradientTransformation, after: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An optimizer of a run of `total` steps that adds the orthogonal term's gradient, does `before` (clipping) and `after`
    (all else), and then sets ranks to zero. Raises ConfigError where the steps leave no time for an allocation."""
    if schedule.tinit >= total - schedule.tfinal:
        what = f"of {total} steps adapter.tinit {schedule.tinit} and adapter.tfinal {schedule.tfinal} leave none between"
        raise ConfigError(what, "adapter", "lower them, or raise steps")
    weights = [path.removesuffix(".e") for path in table.params if path.endswith(".e")]
    modules = sum(table.shape(f"{path}.e")[0] for path in weights)
    last = total - schedule.tfinal

    def init(params: Any) -> Allocation:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731  (no buffer twice: a state is donated whole)
        kept: Tree = {}
        for path in weights:
            kept = put(kept, path, jnp.ones(table.shape(f"{path}.e"), jnp.float32))
        return Allocation(jnp.zeros((), jnp.int32), zeros(), zeros(), kept, before.init(params), after.init(params))

    def update(grads: Any, state: Allocation, params: Any = None) -> tuple[Tree, Allocation]:
        term = jax.grad(lambda params: schedule.orth_reg_weight * orthogonality(params, weights))(params)
        updates: Any
        grads, done_before = before.update(jax.tree.map(jnp.add, grads, term), state.before, params)
        updates, done_after = after.update(grads, state.after, params)
        step = state.step
        # importance is that of the moved weights and the gradient that moved them, as peft is to be called
        moved: Any = optax.apply_updates(params, updates)
        seen = _importance(schedule, state, moved, grads)
        sensitivity, uncertainty = jax.tree.map(
            lambda new, old: jnp.where(step < last, new, old), seen, (state.sensitivity, state.uncertainty)
        )
        budgets = _budgets(schedule, modules * table.sizes["R"], modules * schedule.target_r, total)
        budget = jnp.asarray(budgets)[jnp.minimum(step, total - 1)]
        chosen = _most_important(_triplets(jax.tree.map(jnp.multiply, sensitivity, uncertainty), weights), budget)
        allocates = (step > schedule.tinit) & ((step % schedule.delta_t == 0) & (step < last) | (step == last))
        kept = jax.tree.map(lambda new, old: jnp.where(allocates, new, old), chosen, state.kept)
        for path in weights:
            gone = (allocates | (step > last)) & (get(kept, path) == 0)
            change = jnp.where(gone, -get(params, f"{path}.e"), get(updates, f"{path}.e"))
            updates = put(updates, f"{path}.e", change)
        return updates, Allocation(step + 1, sensitivity, uncertainty, kept, done_before, done_after)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _budgets(schedule: Schedule, first: int, target: int, total: int) -> np.ndarray:
    """Ranks of all weights together that each step's allocation leaves, int32 [total]: they fall as the cube of the time."""
    last = total - schedule.tfinal

    def of(step: int) -> int:
        left = 1 - (step - schedule.tinit) / (last - schedule.tinit)
        return first if step <= schedule.tinit else target if step > last else int((first - target) * left**3 + target)

    return np.array([of(step) for step in range(total)], np.int32)


def orthogonality(params: Tree, weights: list[str]) -> jax.Array:
    """The mean over all P and Q of the Frobenius norm of their Gram matrix less one, a scalar."""
    norms = []
    for path in weights:
        for flat_LRD in (_vectors(params, f"{path}.a", -1), _vectors(params, f"{path}.b", 1)):
            gram_LRC = jnp.einsum("LRD,LCD->LRC", flat_LRD, flat_LRD, precision=jax.lax.Precision.HIGHEST)
            squares_L = ((gram_LRC - jnp.eye(flat_LRD.shape[1])) ** 2).sum((1, 2))
            norms.append(jnp.sqrt(jnp.maximum(squares_L, 1e-12)))  # the root has no gradient at zero
    return jnp.concatenate(norms).mean()


def _vectors(tree: Tree, path: str, axis: int) -> jax.Array:
    """[L, R, all other dimensions]; the ranks are along `axis`."""
    leaf = jnp.moveaxis(get(tree, path), axis, 1)
    return leaf.reshape(*leaf.shape[:2], -1)


def _importance(schedule: Schedule, state: Allocation, params: Tree, grads: Tree) -> tuple[Tree, Tree]:
    """Sensitivity and uncertainty of every number, smoothed."""
    beta1, beta2 = schedule.beta1, schedule.beta2
    now = jax.tree.map(lambda w, g: jnp.abs(w * g), params, grads)
    mean = jax.tree.map(lambda old, new: beta1 * old + (1 - beta1) * new, state.sensitivity, now)
    spread = jax.tree.map(lambda old, new, mean: beta2 * old + (1 - beta2) * jnp.abs(new - mean), state.uncertainty, now, mean)
    return mean, spread


def _triplets(scores: Tree, weights: list[str]) -> Tree:
    """Importance of every rank, [L, R] a weight: that of its e, and the means of its vectors'."""
    found: Tree = {}
    for path in weights:
        vectors = _vectors(scores, f"{path}.a", -1).mean(-1) + _vectors(scores, f"{path}.b", 1).mean(-1)
        found = put(found, path, get(scores, f"{path}.e") + vectors)
    return found


def _most_important(triplets: Tree, budget: jax.Array) -> Tree:
    """1 for the `budget` most important ranks of all, else 0."""
    ordered = jnp.sort(jnp.concatenate([scores.reshape(-1) for scores in jax.tree.leaves(triplets)]))
    threshold = ordered[jnp.maximum(len(ordered) - budget - 1, 0)]
    return jax.tree.map(lambda scores: (scores > threshold).astype(jnp.float32), triplets)
