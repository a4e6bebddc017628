"""KTO's losses, metrics and gradients are TRL's; its KL is that of the whole batch; padding changes nothing."""

from typing import Any

import numpy as np
import pytest

from maxi.objectives.kto import KTO
from tests.objectives import pairs, trl_side

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.4)])
def test_loss_metrics_and_gradient_are_trls(loss_type: str, weights: tuple[float, float]) -> None:
    options: dict[str, Any] = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
    options |= {"loss_type": loss_type, "beta": 0.3}
    signs = set()
    for seed in range(6):
        logprob, batch = pairs.make(seed, offsets=(0.01, 2.0, -40.0))
        found, grad = pairs.sums(KTO(**options), logprob, batch)
        loss, wanted, wanted_grad = trl_side.kto(logprob, batch, **options)
        got = pairs.means(found)
        assert got["train/loss"] == got["loss"] == pytest.approx(loss, rel=1e-5)
        for name in METRICS:
            assert got[name] == pytest.approx(wanted[name], rel=1e-5), name
        assert got.get("kl", 0.0) == pytest.approx(wanted["kl"], rel=1e-5)
        signs.add(wanted["kl"] > 0)
        grad = grad / float(found.weight)
        np.testing.assert_allclose(grad, wanted_grad, rtol=1e-5, atol=1e-6 * np.abs(wanted_grad).max())
    assert signs == ({True, False} if loss_type == "kto" else {False}), "a KL above 0 and one that is clamped"


def test_padding_and_extreme_answers_are_harmless() -> None:
    logprob, batch = pairs.make(1)
    found, grad = pairs.sums(KTO(), logprob, batch)
    again, grad_again = pairs.sums(KTO(), *pairs.junk(logprob, batch))
    assert pairs.means(again) == pairs.means(found)
    np.testing.assert_array_equal(grad_again, grad)
    for value in (0.0, -1e4):  # certain, impossible
        found, grad = pairs.sums(KTO(), np.full_like(logprob, value), batch)
        assert np.isfinite(float(found.loss)) and np.isfinite(grad).all()


def test_micro_batches_add_up_to_the_whole() -> None:
    """The KL is that of the whole: of one half it would be another, and clamped at another place."""
    made = map(pairs.make, range(20))
    logprob, batch = next(pair for pair in made if pairs.means(pairs.sums(KTO(), *pair)[0])["kl"] > 0)
    whole, grad = pairs.sums(KTO(), logprob, batch)
    added, grads = pairs.in_halves(KTO(), logprob, batch)
    assert pairs.means(added) == pytest.approx(pairs.means(whole), rel=1e-6)
    np.testing.assert_allclose(grads, grad, rtol=1e-6)


def test_a_batch_of_one_kind_has_no_margin() -> None:
    logprob, batch = pairs.make(2)
    got = pairs.means(pairs.sums(KTO(), logprob, batch | {"labels": np.ones_like(batch["labels"])})[0])
    assert got["rewards/margins"] == got["rewards/rejected"] == 0 != got["rewards/chosen"]
