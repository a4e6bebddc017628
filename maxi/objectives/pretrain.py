"""Next-token prediction: the mean over all trained tokens of -log p(token | what came before in its document)."""

from dataclasses import dataclass
from typing import Any

from maxi.objectives.sums import Sums


@dataclass(frozen=True)
class Pretrain:
    """Cross-entropy, with PaLM's z-loss (arXiv:2204.02311, section 5) at weight `z_loss`, usually 1e-4, or 0."""

    z_loss: float = 0.0

    def loss(self, logprobs: Any, params: Any, batch: Any) -> Sums:
        """See `maxi.objectives`. Weights are the batch's `loss_weight` [B, T]; `train/loss` excludes the z-loss."""
        logprob_BT, norm_BT = logprobs(params, batch)
        weight_BT = batch["loss_weight"]
        weight = weight_BT.sum()
        nll = -(logprob_BT * weight_BT).sum()
        total = nll
        metrics = {"train/loss": (nll, weight)}
        if self.z_loss:
            z = (norm_BT**2 * weight_BT).sum()
            total = total + self.z_loss * z
            metrics["train/z"] = (z, weight)
        return Sums(total, weight, metrics)
