"""Learning from single labelled answers: Kahneman-Tversky optimisation (Ethayarajh et al., arXiv:2402.01306).

A pair is a completion and a mismatched one: its prompt with the completion of another row. The first is judged by its
label; the second only serves to estimate how far the policy is from the reference, and gets no gradient. How rows are
mismatched, and where reference log-probabilities come from, is not decided here.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maxi.objectives.branches import branch_lengths, branch_logprobs
from maxi.objectives.sums import Sums


@dataclass(frozen=True)
class KTO:
    """The mean over completions of weight * sigmoid(beta * (KL - log-ratio)), with the signs reversed for undesirable ones.

    kto: equation 7 of the paper, with the KL estimated over the whole global batch and no less than 0.
    apo_zero_unpaired: APO-zero (arXiv:2408.06266, equation 7) for answers that come singly, which is the same without KL.
    """

    rows: ClassVar[str] = "labels"

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def needs_reference(self) -> bool:
        return True

    def totals(self, logprobs: Any, params: Any, batch: Any) -> dict[str, jax.Array]:
        """How many completions are desirable and undesirable, and for `kto` the sum and count behind the KL."""
        real_BP, label_BP = batch["pair_weight"], batch["labels"]
        totals = {"desirable": (real_BP * label_BP).sum(), "undesirable": (real_BP * (1 - label_BP)).sum()}
        if self.loss_type == "kto":
            logprob_BT, _ = logprobs(params, batch)
            there_BP = branch_lengths(batch).second_BP > 0
            ratio_BP = branch_logprobs(logprob_BT, batch).second_BP - batch["ref_second"]
            totals["kl"] = jax.lax.stop_gradient(jnp.where(there_BP, ratio_BP, 0).sum())
            totals["mismatched"] = there_BP.sum().astype(jnp.float32)
        return totals

    def loss(self, logprobs: Any, params: Any, batch: Any) -> Sums:
        """See `maxi.objectives`; the weight is the number of completions.

        Rewards are beta times the log-ratio to the reference; "chosen" is desirable, "rejected" undesirable. A batch that
        lacks one of the two has margin 0.
        """
        logprob_BT, _ = logprobs(params, batch)
        real_BP, totals = batch["pair_weight"], batch["totals"]
        logp_BP = branch_logprobs(logprob_BT, batch).first_BP
        ratio_BP = jnp.where(real_BP > 0, logp_BP - batch["ref_first"], 0)
        kl = jnp.maximum(totals["kl"] / jnp.maximum(totals["mismatched"], 1), 0) if self.loss_type == "kto" else 0.0
        good_BP = batch["labels"] > 0
        sign_BP = jnp.where(good_BP, 1.0, -1.0)
        weight_BP = real_BP * jnp.where(good_BP, self.desirable_weight, self.undesirable_weight)
        loss = (weight_BP * jax.nn.sigmoid(-sign_BP * self.beta * (ratio_BP - kl))).sum()
        pairs = real_BP.sum()
        metrics = {"train/loss": (loss, pairs)}
        reward_BP = self.beta * jax.lax.stop_gradient(ratio_BP)
        for name, mask_BP in (("chosen", real_BP * good_BP), ("rejected", real_BP * ~good_BP)):
            metrics[f"rewards/{name}"] = (reward_BP * mask_BP).sum(), mask_BP.sum()
            metrics[f"logps/{name}"] = (logp_BP * mask_BP).sum(), mask_BP.sum()
        metrics["rewards/margins"] = self._margin(metrics, totals), pairs
        if self.loss_type == "kto":
            metrics["kl"] = kl * pairs, pairs
        return Sums(loss, pairs, metrics)

    def _margin(self, metrics: Any, totals: Any) -> jax.Array:
        """A share of the difference of two means over the global batch, times its completions, which divide it later."""
        good, bad = totals["desirable"], totals["undesirable"]
        chosen = metrics["rewards/chosen"][0] / jnp.maximum(good, 1)
        rejected = metrics["rewards/rejected"][0] / jnp.maximum(bad, 1)
        return jnp.where((good > 0) & (bad > 0), (chosen - rejected) * (good + bad), 0)
