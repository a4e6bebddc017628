"""What SFT and pretraining are made of; that it is TRL's loss is shown in `test_trainers.py`."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from maxi import objectives
from tests.objectives import pairs


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_cross_entropy_and_z_loss_over_trained_tokens(name: str) -> None:
    rng = np.random.default_rng(0)
    logprob, norm = (rng.normal(size=(2, 5)).astype(np.float32) for _ in "12")
    weight = np.array([[0, 1, 1, 0, 0], [0.5, 0, 0, 1, 1]], np.float32)

    def cross_entropy(_: Any, batch: Any, z_loss: float) -> Any:
        nll, z = -(batch["loss_weight"] * logprob).sum(), (batch["loss_weight"] * norm**2).sum()
        return nll + z_loss * z, nll, z

    logprobs: Any = SimpleNamespace(cross_entropy=cross_entropy)
    found = objectives.build(name, z_loss=0.1).loss(logprobs, {}, {"loss_weight": jnp.asarray(weight)})
    nll, z = (np.average(a, weights=weight) for a in (-logprob, norm**2))
    assert pairs.means(found) == pytest.approx({"loss": nll + 0.1 * z, "train/loss": nll, "train/z": z}, rel=1e-6)


def test_every_objective_says_what_it_needs() -> None:
    found = {name: objectives.build(name) for name in objectives.OBJECTIVES}
    assert {name: one.rows for name, one in found.items()} == {
        "pretrain": "documents",
        "sft": "conversations",
        "dpo": "preferences",
        "kto": "labels",
    }
    assert {name for name, one in found.items() if one.needs_reference} == {"dpo", "kto"}
