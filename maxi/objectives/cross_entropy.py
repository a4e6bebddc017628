"""Cross-entropy over tokens: the loss that pretraining and supervised fine-tuning share."""

from typing import Any

from maxi.objectives.sums import Sums


def cross_entropy(logprobs: Any, params: Any, batch: Any, z_loss: float) -> Sums:
    """-log p of each target plus `z_loss` times its squared log-normaliser, weighted by `loss_weight` [B, T].

    `train/loss` excludes the z-loss (PaLM, arXiv:2204.02311, section 5), which is `train/z`.
    """
    weight = batch["loss_weight"].sum()
    total, nll, z = logprobs.cross_entropy(params, batch, z_loss)
    metrics = {"train/loss": (nll, weight)}
    if z_loss:
        metrics["train/z"] = (z, weight)
    return Sums(total, weight, metrics)
