"""Learning from preferences: direct preference optimisation and the losses of its family, one pair at a time.

`loss_type` names are TRL's (1.16), and so are the definitions, their sources beside them; `simpo` and `orpo` are those
of TRL's CPO and ORPO trainers, and need no reference. A pair's loss depends on that pair alone, which is why TRL's
`aot` losses, which sort a batch, are not here. Where reference log-probabilities come from is not decided here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from maxi.objectives.branches import Pairs, branch_lengths, branch_logprobs
from maxi.objectives.sums import Sums

REFERENCE_FREE = frozenset({"simpo", "orpo"})
WITH_NLL = frozenset({"sft", "orpo"})
"""Losses that add the negative log-likelihood of chosen answers."""
NEARLY_CERTAIN = -1e-7
"""The largest mean log-probability whose odds are taken: above, 1 - p is float32 rounding, and at 0 the odds are infinite."""


@dataclass(frozen=True)
class DPO:
    """The sum of `loss_weights` (1 each) times the losses of `loss_type`, as a mean over the pairs of the global batch.

    `label_smoothing` is the probability that a label is wrong: it acts on sigmoid, sigmoid_norm and simpo (conservative
    DPO), on robust (below 0.5) and on exo_pair (above 0). `rpo_alpha` weighs the negative log-likelihood of the chosen
    answers (RPO, arXiv:2404.19733), their tokens averaged over the global batch; it is the same as `sft`.
    """

    rows: ClassVar[str] = "preferences"

    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05

    @property
    def needs_reference(self) -> bool:
        """Whether losses or rewards are relative to a reference; `sft` goes with what it is combined with."""
        others = set(self.loss_type) - {"sft"}
        return not others or not others <= REFERENCE_FREE

    def totals(self, logprobs: Any, params: Any, batch: Any) -> dict[str, jax.Array]:  # noqa: ARG002
        """Pairs and tokens of chosen answers, if the loss has a part that averages over tokens."""
        if not self._nll_weight:
            return {}
        return {"pairs": batch["pair_weight"].sum(), "tokens": branch_lengths(batch).first_BP.sum()}

    def loss(self, logprobs: Any, params: Any, batch: Any) -> Sums:
        """See `maxi.objectives`; the weight is the number of pairs.

        Rewards are beta times the log-ratio to the reference; without a reference, beta times the mean log-probability
        of a token, and then logps are such means too. A tie is no accuracy.
        """
        logprob_BT, _ = logprobs(params, batch)
        real_BP = batch["pair_weight"]
        logp, terms = self._terms(logprob_BT, batch)
        loss_BP = jnp.zeros_like(real_BP)
        for name, weight in self._weighted:
            if name in LOSSES:
                loss_BP += weight * LOSSES[name](self, terms)
        loss, pairs = (loss_BP * real_BP).sum(), real_BP.sum()
        metrics = self._metrics(logp, terms, real_BP)
        if self._nll_weight:
            nll, totals = -logp.first_BP.sum(), batch["totals"]
            # the step divides by pairs what is to be divided by tokens
            loss += self._nll_weight * nll * totals["pairs"] / jnp.maximum(totals["tokens"], 1)
            metrics["nll_loss"] = nll, branch_lengths(batch).first_BP.sum()
        return Sums(loss, pairs, {"train/loss": (loss, pairs)} | metrics)

    @property
    def _weighted(self) -> list[tuple[str, float]]:
        return list(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))

    @property
    def _nll_weight(self) -> float:
        return self.rpo_alpha + sum(weight for name, weight in self._weighted if name in WITH_NLL)

    def _terms(self, logprob_BT: jax.Array, batch: Any) -> tuple[Pairs, "_Terms"]:
        """Log-probability of each answer, and what losses are made of."""
        ratio = logp = branch_logprobs(logprob_BT, batch)
        if self.needs_reference:
            real_BP, refs = batch["pair_weight"] > 0, (batch["ref_first"], batch["ref_second"])
            ratio = Pairs(*(jnp.where(real_BP, a_BP - b_BP, 0) for a_BP, b_BP in zip(logp, refs, strict=True)))
        lengths = Pairs(*(jnp.maximum(length_BP, 1) for length_BP in branch_lengths(batch)))
        return logp, _Terms(ratio, _over(ratio, lengths), _over(logp, lengths))

    def _metrics(self, logp: Pairs, terms: "_Terms", real_BP: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        score, shown = (terms.ratio, logp) if self.needs_reference else (terms.mean, terms.mean)
        chosen_BP, rejected_BP = (self.beta * score_BP for score_BP in score)
        values = {
            "rewards/chosen": chosen_BP,
            "rewards/rejected": rejected_BP,
            "rewards/margins": chosen_BP - rejected_BP,
            "rewards/accuracies": chosen_BP > rejected_BP,
            "logps/chosen": shown.first_BP,
            "logps/rejected": shown.second_BP,
        }
        return {name: ((value_BP * real_BP).sum(), real_BP.sum()) for name, value_BP in values.items()}


class _Terms(NamedTuple):
    """What losses are made of: log-ratios to the reference, the same per token, and log-probabilities per token."""

    ratio: Pairs
    mean_ratio: Pairs
    mean: Pairs

    @property
    def margin_BP(self) -> jax.Array:
        return self.ratio.first_BP - self.ratio.second_BP


def _over(sums: Pairs, lengths: Pairs) -> Pairs:
    return Pairs(sums.first_BP / lengths.first_BP, sums.second_BP / lengths.second_BP)


def _logistic(z: jax.Array, smoothing: float) -> jax.Array:
    """Cross-entropy of "chosen is better", which is true with probability 1 - smoothing."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(z) - smoothing * jax.nn.log_sigmoid(-z)


def _sigmoid(o: DPO, t: _Terms) -> jax.Array:
    """DPO, arXiv:2305.18290, equation 7; smoothed: cDPO, E. Mitchell's note on noisy preferences (2023)."""
    return _logistic(o.beta * t.margin_BP, o.label_smoothing)


def _sigmoid_norm(o: DPO, t: _Terms) -> jax.Array:
    """DPO with log-ratios per token: Tulu 3, arXiv:2411.15124."""
    return _logistic(o.beta * (t.mean_ratio.first_BP - t.mean_ratio.second_BP), o.label_smoothing)


def _hinge(o: DPO, t: _Terms) -> jax.Array:
    """SLiC, arXiv:2305.10425, on DPO's margin (RSO, arXiv:2309.06657)."""
    return jax.nn.relu(1 - o.beta * t.margin_BP)


def _ipo(o: DPO, t: _Terms) -> jax.Array:
    """IPO, arXiv:2310.12036, equation 17, with beta for tau; log-ratios per token, as its authors do."""
    return (t.mean_ratio.first_BP - t.mean_ratio.second_BP - 1 / (2 * o.beta)) ** 2


def _exo_pair(o: DPO, t: _Terms) -> jax.Array:
    """EXO, arXiv:2402.00856, equation 16: KL of the policy's preference from the smoothed label."""
    z = o.beta * t.margin_BP
    right = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - math.log1p(-o.label_smoothing))
    return right + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - math.log(o.label_smoothing))


def _nca_pair(o: DPO, t: _Terms) -> jax.Array:
    """NCA, arXiv:2402.05369, for one chosen and one rejected answer."""
    chosen, rejected = o.beta * t.ratio.first_BP, o.beta * t.ratio.second_BP
    return -jax.nn.log_sigmoid(chosen) - 0.5 * jax.nn.log_sigmoid(-chosen) - 0.5 * jax.nn.log_sigmoid(-rejected)


def _robust(o: DPO, t: _Terms) -> jax.Array:
    """Robust DPO, arXiv:2403.00409: unbiased under labels flipped with probability `label_smoothing`."""
    z, flipped = o.beta * t.margin_BP, o.label_smoothing
    return (flipped * jax.nn.log_sigmoid(-z) - (1 - flipped) * jax.nn.log_sigmoid(z)) / (1 - 2 * flipped)


def _bco_pair(o: DPO, t: _Terms) -> jax.Array:
    """BCO, arXiv:2404.04656, of pairs and without the running shift of rewards."""
    return -jax.nn.log_sigmoid(o.beta * t.ratio.first_BP) - jax.nn.log_sigmoid(-o.beta * t.ratio.second_BP)


def _sppo_hard(o: DPO, t: _Terms) -> jax.Array:
    """SPPO, arXiv:2405.00675, equation 4.7, where the chosen answer wins with probability 1."""
    return (t.ratio.first_BP - 0.5 / o.beta) ** 2 + (t.ratio.second_BP + 0.5 / o.beta) ** 2


def _apo_zero(o: DPO, t: _Terms) -> jax.Array:
    """APO, arXiv:2408.06266, equation 7: chosen answers that are better than the model's."""
    return jax.nn.sigmoid(-o.beta * t.ratio.first_BP) + jax.nn.sigmoid(o.beta * t.ratio.second_BP)


def _apo_down(o: DPO, t: _Terms) -> jax.Array:
    """APO, arXiv:2408.06266, equation 8: chosen answers that are worse than the model's."""
    return jax.nn.sigmoid(o.beta * t.ratio.first_BP) + jax.nn.sigmoid(-o.beta * t.margin_BP)


def _discopop(o: DPO, t: _Terms) -> jax.Array:
    """DiscoPOP, arXiv:2406.08414, equation 5: from logistic to exponential as the margin grows."""
    z = o.beta * t.margin_BP
    # exp(-z) sigmoid(z / tau) in one exponent: apart, they are infinity times 0 for a badly wrong pair
    exponential = jnp.exp(jax.nn.log_sigmoid(z / o.discopop_tau) - z)
    return -jax.nn.log_sigmoid(z) * jax.nn.sigmoid(-z / o.discopop_tau) + exponential


def _simpo(o: DPO, t: _Terms) -> jax.Array:
    """SimPO, arXiv:2405.14734, equation 6."""
    return _logistic(o.beta * (t.mean.first_BP - t.mean.second_BP) - o.simpo_gamma, o.label_smoothing)


def _orpo(o: DPO, t: _Terms) -> jax.Array:
    """ORPO, arXiv:2403.07691, equation 7: the log-ratio of odds, per token, with beta for lambda."""
    chosen, rejected = (jnp.minimum(mean_BP, NEARLY_CERTAIN) for mean_BP in t.mean)
    log_odds = chosen - rejected - (jnp.log(-jnp.expm1(chosen)) - jnp.log(-jnp.expm1(rejected)))
    return -o.beta * jax.nn.log_sigmoid(log_odds)


LOSSES: Mapping[str, Callable[[DPO, _Terms], jax.Array]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "simpo": _simpo,
    "orpo": _orpo,
}
"""Name -> loss of each pair, [B, P]. `sft` has none of its own: it is negative log-likelihood alone."""
