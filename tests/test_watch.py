"""Signs that preferences go wrong: each is said once, and nothing is said of a healthy run."""

import math
from collections.abc import Iterable

from maxi.watch import WINDOW, Watch, too_small_for_bf16


def said(steps: Iterable[tuple[float, float, float]]) -> list[str]:
    watch = Watch()
    metrics = ({"train/loss": a, "rewards/chosen": b, "rewards/margins": c} for a, b, c in steps)
    return [line for values in metrics for line in watch.step(values)]


def test_a_loss_that_stays_at_log_2_is_said_once() -> None:
    lines = said([(math.log(2), 0.0, 0.0)] * 10 * WINDOW)
    assert len(lines) == 1 and "0.693" in lines[0] and "optim.lr" in lines[0]


def test_chosen_answers_that_fall_while_the_margin_grows_are_said_once() -> None:
    lines = said((0.69 - 0.001 * i, -0.01 * i, 0.005 * i) for i in range(10 * WINDOW))
    assert len(lines) == 1 and "less likely" in lines[0] and "objective.rpo_alpha" in lines[0]


def test_a_healthy_run_and_other_objectives_hear_nothing() -> None:
    assert said((0.69 - 0.001 * i, 0.01 * i, 0.02 * i) for i in range(10 * WINDOW)) == []
    assert said((0.60, -0.5 + 0.1 * (i % 3), 0.2) for i in range(10 * WINDOW)) == []
    assert Watch().step({"train/loss": 2.0}) == []


def test_a_learning_rate_that_bfloat16_cannot_show() -> None:
    assert "export_dtype" in (too_small_for_bf16(1e-6, 0.02) or "")
    assert too_small_for_bf16(1e-3, 0.02) is None


def test_a_gradient_of_0_is_said_once() -> None:
    watch = Watch()
    still = {"train/loss": 2.0, "optim/grad_norm": 0.0}
    first, *others = [watch.step(still) for _ in range(3)]
    assert len(first) == 1 and "the gradient is 0" in first[0] and others == [[], []]
    watch = Watch()
    assert [watch.step(values) for values in ({**still, "optim/grad_norm": 0.1}, still)] == [[], []], "only the first step"
