"""Signs that a run goes wrong, most of them for preferences, with their cause and what to do next, each said once.

It reads the metrics of every step and knows nothing of models or optimizers. Means are taken over WINDOW steps, because a
batch of a few pairs says little.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

WINDOW = 20
"""Steps whose means are compared."""
STUCK = 2e-3
"""Nats from log 2 within which the loss counts as not having moved."""
SLIDING = 3
"""Windows in a row in which chosen answers lose while the margin grows."""

NO_GRADIENT = "the gradient is 0, so nothing is learned: look which tokens are trained (`maxi check`)"
NO_CHANGE = "the first step changed no weight: look at optim.lr, or at what is said of its gradient"

BF16_HALF_STEP = 2.0**-9
"""Half of bfloat16's relative spacing: a smaller change of a weight is rounded away."""


class Watch:
    """`step(metrics)` for every step of a run, in order; it returns what there is to say, usually nothing."""

    def __init__(self) -> None:
        self._window: list[tuple[float, float, float]] = []
        self._means: list[tuple[float, float, float]] = []
        self._said: set[str] = set()
        self._first_seen = False

    def step(self, metrics: Mapping[str, Any]) -> list[str]:
        """`metrics` of one step as numbers."""
        still = [] if self._first_seen or metrics.get("optim/grad_norm") != 0 else [NO_GRADIENT]
        self._first_seen = True
        return still + self._of_preferences(metrics)

    def _of_preferences(self, metrics: Mapping[str, Any]) -> list[str]:
        names = ("train/loss", "rewards/chosen", "rewards/margins")
        if not all(name in metrics for name in names):
            return []
        self._window.append((float(metrics[names[0]]), float(metrics[names[1]]), float(metrics[names[2]])))
        if len(self._window) < WINDOW:
            return []
        self._means.append(tuple(sum(column) / WINDOW for column in zip(*self._window, strict=True)))  # type: ignore[arg-type]
        self._window = []
        found = [text for text in (self._stuck(), self._sliding()) if text and text.split(" (")[0] not in self._said]
        self._said.update(text.split(" (")[0] for text in found)
        return found

    def _stuck(self) -> str | None:
        loss, _, margin = self._means[-1]
        # the first window may be the warm-up's; much later a loss may come back to log 2 for other reasons
        if len(self._means) != 2 or abs(loss - math.log(2)) > STUCK or abs(margin) > STUCK:
            return None
        what = f"the policy has not left the reference (loss {loss:.4f}, log 2 = 0.693; margin {margin:.4f}): "
        return what + "raise optim.lr, or look whether chosen and rejected answers differ (`maxi check`)"

    def _sliding(self) -> str | None:
        last = self._means[-SLIDING - 1 :]
        steps = list(pairwise(last))
        if len(steps) < SLIDING or last[-1][1] >= 0 or not all(b[1] < a[1] and b[2] > a[2] for a, b in steps):
            return None
        (_, chosen, margin), (_, chosen_now, margin_now) = last[0], last[-1]
        return (
            f"chosen answers become less likely (rewards/chosen {chosen:.3f} -> {chosen_now:.3f}) while the margin still grows "
            f"({margin:.3f} -> {margin_now:.3f}), so the model unlearns both answers: lower optim.lr, raise objective.beta, "
            "or set objective.rpo_alpha to 0.1 or more"
        )


def too_small_for_bf16(total_rate: float, weight_rms: float) -> str | None:
    """What to say when a whole run cannot move a typical weight by as much as bfloat16 shows.

    total_rate: the sum of the learning rate over all steps, which bounds what AdamW moves one weight. weight_rms: root mean
    square of the matrices.
    """
    if total_rate >= BF16_HALF_STEP * weight_rms:
        return None
    return (
        f"all steps together move a weight by at most {total_rate:.1e}, and bfloat16 holds {weight_rms:.1e} to "
        f"{BF16_HALF_STEP * weight_rms:.1e} only: the export will hardly differ. Raise optim.lr or steps, or set "
        "export_dtype=float32"
    )
