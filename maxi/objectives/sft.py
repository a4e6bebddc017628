"""Supervised fine-tuning: the mean over all trained tokens of -log p(token | the conversation so far).

The maths is pretraining's. What differs lies in the rows: they are conversations, and `loss_weight` marks what the
assistant says.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from maxi.objectives.cross_entropy import cross_entropy
from maxi.objectives.sums import Sums


@dataclass(frozen=True)
class SFT:
    """Cross-entropy, with PaLM's z-loss (arXiv:2204.02311, section 5) at weight `z_loss`, or 0.

    Every trained token of the global batch counts the same, in a long answer as in a short one.
    """

    rows: ClassVar[str] = "conversations"

    z_loss: float = 0.0

    @property
    def needs_reference(self) -> bool:
        return False

    def loss(self, logprobs: Any, params: Any, batch: Any) -> Sums:
        """See `maxi.objectives`. Weights are the batch's `loss_weight` [B, T]; `train/loss` excludes the z-loss."""
        return cross_entropy(logprobs, params, batch, self.z_loss)
