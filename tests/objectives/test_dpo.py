"""DPO's losses, metrics and gradients are TRL's; what is known of them holds; padding and micro-batches change nothing."""

from typing import Any

import numpy as np
import pytest

from maxi.objectives.dpo import DPO, LOSSES, REFERENCE_FREE, WITH_NLL
from tests.objectives import pairs, trl_side

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
SMOOTHED = {"exo_pair": 1e-3, "robust": 0.2}
ALONE = (*LOSSES, "sft")
MPO: dict[str, Any] = {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)}


def alone(name: str) -> DPO:
    return DPO((name,), beta=0.5, label_smoothing=SMOOTHED.get(name, 0.0))


def assert_same(ours: tuple[Any, np.ndarray], theirs: trl_side.Answer, metrics: tuple[str, ...] = METRICS) -> None:
    (found, grad), (loss, wanted, wanted_grad) = ours, theirs
    got = pairs.means(found)
    assert got["train/loss"] == got["loss"] == pytest.approx(loss, rel=1e-5)
    for name in metrics:
        assert got[name] == pytest.approx(wanted[name], rel=1e-5), name
    grad = grad / float(found.weight)
    np.testing.assert_allclose(grad, wanted_grad, rtol=1e-5, atol=1e-6 * np.abs(wanted_grad).max())


@pytest.mark.parametrize("name", [name for name in ALONE if name not in REFERENCE_FREE])
def test_each_loss_is_trls(name: str) -> None:
    objective = alone(name)
    for seed in range(3):
        logprob, batch = pairs.make(seed)
        theirs = trl_side.dpo(logprob, batch, (name,), beta=objective.beta, label_smoothing=objective.label_smoothing)
        assert_same(pairs.sums(objective, logprob, batch), theirs)


@pytest.mark.parametrize(
    "options",
    [MPO, {"loss_type": ("sigmoid", "apo_down", "robust"), "loss_weights": (1.0, 0.0, 2.0)}, {"loss_type": ("ipo", "hinge")}],
    ids=str,
)
def test_combined_losses_are_trls(options: dict[str, Any]) -> None:
    logprob, batch = pairs.make(3)
    assert_same(pairs.sums(DPO(**options), logprob, batch), trl_side.dpo(logprob, batch, **options))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_is_that_of_trls_cpo(smoothing: float) -> None:
    options: dict[str, Any] = {"beta": 2.0, "simpo_gamma": 1.4, "label_smoothing": smoothing}
    logprob, batch = pairs.make(4)
    ours = pairs.sums(DPO(loss_type=("simpo",), rpo_alpha=0.3, **options), logprob, batch)
    assert_same(ours, trl_side.cpo(logprob, batch, "simpo", cpo_alpha=0.3, **options), (*METRICS, "nll_loss"))


def test_orpo_is_trls() -> None:
    logprob, batch = pairs.make(5)
    logprob = np.where(np.arange(pairs.T) % 2, logprob, logprob / 100)  # odds of certain and of unlikely answers
    ours = pairs.sums(DPO(loss_type=("orpo",), beta=0.7), logprob, batch)
    assert_same(ours, trl_side.orpo(logprob, batch, beta=0.7), (*METRICS, "nll_loss"))


def test_smoothed_sigmoid_is_trls_conservative_loss() -> None:
    """DPOTrainer has lost cDPO; CPOTrainer's sigmoid loss on log-ratios is its formula."""
    logprob, batch = pairs.make(6)
    ours = pairs.sums(DPO(label_smoothing=0.1), logprob, batch)
    assert_same(ours, trl_side.cpo(logprob, batch, "sigmoid", ratios=True, label_smoothing=0.1), METRICS[:4])


def test_rpo_alpha_is_a_weighted_sft_loss() -> None:
    logprob, batch = pairs.make(7)
    ours = pairs.sums(DPO(rpo_alpha=0.25), logprob, batch)
    assert_same(ours, trl_side.dpo(logprob, batch, ("sigmoid", "sft"), (1.0, 0.25)))


KNOWN = {
    "sigmoid": np.log(2),
    "sigmoid_norm": np.log(2),
    "robust": np.log(2),
    "exo_pair": -np.log(2) - 0.5 * np.log(1e-3 * (1 - 1e-3)),
    "nca_pair": 2 * np.log(2),
    "bco_pair": 2 * np.log(2),
    "hinge": 1.0,
    "ipo": 1.0,
    "sppo_hard": 2.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * np.log(2) + 0.5,
}
"""Losses at the reference, with beta 0.5."""


@pytest.mark.parametrize("name", KNOWN)
def test_at_the_reference(name: str) -> None:
    logprob, batch = pairs.make(8, offsets=(0.0,))
    found, grad = pairs.sums(alone(name), logprob, batch)
    got = pairs.means(found)
    assert got["loss"] == pytest.approx(KNOWN[name], rel=1e-6)
    assert got["rewards/margins"] == got["rewards/chosen"] == got["rewards/accuracies"] == 0, "a tie is no accuracy"
    assert (grad[batch["loss_weight"] > 0] != 0).any() and not grad[batch["loss_weight"] == 0].any()


@pytest.mark.parametrize("name", ALONE)
def test_padding_and_extreme_answers_are_harmless(name: str) -> None:
    logprob, batch = pairs.make(9)
    found, grad = pairs.sums(alone(name), logprob, batch)
    again, grad_again = pairs.sums(alone(name), *pairs.junk(logprob, batch))
    assert pairs.means(again) == pairs.means(found)
    np.testing.assert_array_equal(grad_again, grad)
    for value in (0.0, -1e4):  # certain, impossible
        found, grad = pairs.sums(alone(name), np.full_like(logprob, value), batch)
        assert np.isfinite(float(found.loss)) and np.isfinite(grad).all()


def test_micro_batches_add_up_to_the_whole() -> None:
    """Exactly: answers differ in length between the halves, so a mean of means would not."""
    objective = DPO(("sigmoid", "sft", "orpo"), (0.8, 1.0, 0.5), rpo_alpha=0.3)
    logprob, batch = pairs.make(10)
    whole, grad = pairs.sums(objective, logprob, batch)
    added, grads = pairs.in_halves(objective, logprob, batch)
    assert pairs.means(added) == pytest.approx(pairs.means(whole), rel=1e-6)
    np.testing.assert_allclose(grads, grad, rtol=1e-6)


def test_what_needs_a_reference() -> None:
    needs = {name: DPO((name,)).needs_reference for name in (*LOSSES, "sft")}
    assert {name for name, needed in needs.items() if not needed} == {"simpo", "orpo"}
    assert DPO(("simpo", "sigmoid")).needs_reference
    assert not DPO(("simpo", "sft")).needs_reference
    assert set(LOSSES) | {"sft"} >= WITH_NLL
    logprob, batch = pairs.make(11)
    bare = {name: value for name, value in batch.items() if not name.startswith("ref_")}
    assert float(pairs.sums(DPO(("simpo", "orpo", "sft")), logprob, bare)[0].loss) > 0
