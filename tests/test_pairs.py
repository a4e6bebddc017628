"""The laws of pairs through a whole model: shared and packed = two padded copies, accumulated = whole, sharded = single,
and at the reference DPO is log 2."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxi import mesh, objectives, optim, step
from maxi.data.cache import TokenCache
from maxi.data.loader import stack
from maxi.data.sample_rows import PairRows
from maxi.models import decoder, from_hf_config
from maxi.models.decoder import Compute
from maxi.objectives.branches import branch_logprobs
from maxi.params import init
from maxi.sections import MeshConfig, OptimConfig
from tests.test_step import SIZES, WINDOWS

SEQ, PAIRS = 80, 13
SMALL = SIZES | {"num_hidden_layers": 2, "tie_word_embeddings": True}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": ("sigmoid",), "rpo_alpha": 0.3},
    "ipo": {"loss_type": ("ipo",)},
    "simpo": {"loss_type": ("simpo", "orpo"), "loss_weights": (1.0, 0.5)},
    "kto": {},
}


def rows(labels: bool = False, **layout: bool) -> PairRows:
    """Pairs of all sizes: prompts and answers of 1 to 40 ids."""
    rng = np.random.default_rng(3)
    parts = [rng.integers(1, 96, rng.integers(1, 40)) for _ in range(PAIRS * (2 if labels else 3))]
    weights = [np.zeros(len(p)) if n % (2 if labels else 3) == 0 else np.ones(len(p)) for n, p in enumerate(parts)]
    marks = (rng.random(PAIRS) < 0.5).astype(np.uint8) if labels else None
    ends = np.cumsum([len(part) for part in parts])
    return PairRows(
        TokenCache(np.concatenate(parts), ends, np.concatenate(weights).astype(np.float32), marks, {}, "", True), SEQ, **layout
    )


def batch_of(found: PairRows, params: Any, family: Any, size: int = 0) -> dict[str, np.ndarray]:
    """All rows as one batch, padded to `size` rows, with the log-probabilities of `params` as the reference."""
    batch = stack([found[n] for n in range(len(found))] + [found.blank()] * (size - len(found)))
    logprob_BT, _ = jax.jit(partial(decoder.logprobs, family))(params, {k: jnp.asarray(v) for k, v in batch.items()})
    first, second = (np.asarray(part) for part in branch_logprobs(logprob_BT, batch))
    return batch | {"ref_first": first, "ref_second": second}


def evaluate(name: str, family: Any, params: Any, batch: Any, attention: str = "reference") -> tuple[Any, Any]:
    """Metrics and the gradient of the mean loss."""
    objective = objectives.build("kto" if name == "kto" else "dpo", **OBJECTIVES[name])
    logprobs = decoder.Logprobs(family, Compute(attention=attention))
    totals = partial(objective.totals, logprobs)  # type: ignore[attr-defined]

    def mean(params: Any) -> Any:
        sums = objective.loss(logprobs, params, step.with_totals(totals, params, batch))
        return sums.loss / sums.weight, {key: n / jnp.maximum(d, 1) for key, (n, d) in sums.metrics.items()}

    (_, metrics), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return metrics, grads


@pytest.mark.parametrize(("name", "fields"), [("dpo", {}), ("dpo", WINDOWS), ("ipo", {}), ("simpo", {}), ("kto", {})])
def test_shared_and_packed_is_two_padded_copies(name: str, fields: dict[str, Any]) -> None:
    family = from_hf_config(SMALL | fields)
    params, reference = (init(family.table, jax.random.key(seed)) for seed in (0, 1))
    shared = rows(name == "kto")
    plain = rows(name == "kto", pack=False, share_prompt=False)
    assert len(shared) < len(plain) / 2 and shared.real_tokens < plain.real_tokens
    wanted = evaluate(name, family, params, batch_of(plain, reference, family))
    for attention in ("reference", "blockwise"):
        got = evaluate(name, family, params, batch_of(shared, reference, family), attention)
        for key, value in wanted[0].items():
            np.testing.assert_allclose(got[0][key], value, rtol=1e-5, atol=1e-5, err_msg=key)
        scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted[1]))
        for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_at_the_reference_dpo_is_log_2() -> None:
    family = from_hf_config(SMALL)
    params = init(family.table, jax.random.key(0))
    objective = objectives.build("dpo")
    logprobs = decoder.Logprobs(family, Compute(attention="blockwise"))
    found = rows()
    # the reference from rows in another order and another kernel, as a cache of an earlier run would bring it
    batch = batch_of(found, params, family)
    sums = objective.loss(logprobs, params, {k: jnp.asarray(v) for k, v in batch.items()})
    assert abs(float(sums.loss / sums.weight) - math.log(2)) < 1e-6 and float(sums.weight) == PAIRS


@pytest.mark.parametrize(("name", "devices", "micro"), [("dpo", 1, 4), ("kto", 4, 2)])
def test_accumulated_and_sharded_are_whole(name: str, devices: int, micro: int) -> None:
    """The totals that a loss needs of the whole batch make this exact for a KL over the batch and a mean over tokens."""

    def trained(devices: int, micro: int) -> tuple[Any, Any]:
        family = from_hf_config(SMALL)
        over = mesh.build(MeshConfig(), jax.devices()[:devices])
        config = OptimConfig(lr=1e-2)
        rate = optim.schedule(config, 2)
        optimizer = optim.optimizer(config, family.table, rate)
        objective = objectives.build(name, **OBJECTIVES[name])
        logprobs = decoder.Logprobs(family)
        batch = batch_of(rows(name == "kto"), init(family.table, jax.random.key(1)), family, size=8)
        with jax.set_mesh(over):
            where = step.state_shardings(family.table, optimizer, over, False)
            params = jax.jit(partial(init, family.table), out_shardings=where.params)(jax.random.key(0))
            state = step.new_state(params, optimizer, where, False)
            totals = partial(objective.totals, logprobs)  # type: ignore[attr-defined]
            loss = partial(objective.loss, logprobs)
            take = step.make_step(loss, optimizer, rate, where, totals=totals, micro_batches=micro)
            state, metrics = take(state, step.put(batch, over))
            return {key: float(value) for key, value in metrics.items()}, jax.tree.map(np.asarray, state.params)

    (metrics, params), (wanted, whole) = trained(devices, micro), trained(1, 1)
    for key, value in wanted.items():
        np.testing.assert_allclose(metrics[key], value, rtol=2e-5, atol=2e-5, err_msg=key)
    assert float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, params, whole))) < 5e-3 * float(optax.tree.norm(whole))
