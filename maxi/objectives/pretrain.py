"""Next-token prediction: the mean over all trained tokens of -log p(token | what came before in its document)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from maxi.objectives.cross_entropy import cross_entropy
from maxi.objectives.sums import Sums


@dataclass(frozen=True)
class Pretrain:
    """Cross-entropy, with PaLM's z-loss (arXiv:2204.02311, section 5) at weight `z_loss`, usually 1e-4, or 0."""

    rows: ClassVar[str] = "documents"

    z_loss: float = 0.0

    @property
    def needs_reference(self) -> bool:
        return False

    def loss(self, logprobs: Any, params: Any, batch: Any) -> Sums:
        """See `maxi.objectives`. Weights are the batch's `loss_weight` [B, T]; `train/loss` excludes the z-loss."""
        return cross_entropy(logprobs, params, batch, self.z_loss)
