"""How far a run goes, and what an estimate of a step makes of it: tokens a second, hours, money."""

from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp

from maxi import adapters
from maxi.aot import model_of
from maxi.config import Config
from maxi.errors import ConfigError
from maxi.estimate.work import STATE_BYTES, Work, work_of
from maxi.plan.compiled import Estimate

TOKEN_SUMS = ("pretrain", "sft")
"""Objectives whose loss is a sum over tokens: their head finds its gradient with its value."""
PAIRS = ("dpo", "kto")
"""Objectives whose rows are two seq_len wide."""


@dataclass(frozen=True)
class Run:
    """What is computed from the first step to the last. `steps` is None where only data could tell."""

    work: Work
    steps: int | None

    @property
    def tokens(self) -> float | None:
        """Of all steps, padding included."""
        return self.steps * self.work.tokens if self.steps else None


@dataclass(frozen=True)
class Outcome:
    """An estimate and what follows from it. None: not known."""

    estimate: Estimate
    tokens_per_s: float | None
    mfu: float | None
    hours: float | None
    dollars: float | None
    spot_dollars: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        e, chip = self.estimate, self.estimate.topology.chip
        return {
            "topology": e.topology.name,
            "sold_as": e.topology.sold_as,
            "chips": e.topology.chips,
            "layout": e.layout.settings(),
            "fits": e.fits if chip else None,
            "memory": e.memory.as_dict(),
            "memory_of_device": chip.memory if chip else None,
            "memory_by": e.memory_by,
            "seconds": e.seconds.as_dict() if e.seconds else None,
            "seconds_by": e.seconds_by if e.seconds else None,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "hours": self.hours,
            "dollars": self.dollars,
            "spot_dollars": self.spot_dollars,
            "notes": list(e.notes),
        }


def run_of(config: Config, on_cpu: bool, tokens: float | None) -> Run:
    """A config's run; `tokens` is how many its data has, for those that say epochs. Raises ConfigError."""
    if tokens is not None and (config.steps is not None or not tokens > 0):
        fix = "leave it out: the config says steps" if config.steps is not None else "give a number above 0"
        raise ConfigError(f"--tokens {tokens:g} means nothing", "command line", fix)
    dtype = config.compute.dtype
    width = (2 if config.objective.name in PAIRS else 1) * config.seq_len
    model, dtype_bytes = model_of(config), 4 if dtype == "float32" or (dtype == "auto" and on_cpu) else 2
    matrices = jnp.float32 if dtype_bytes == STATE_BYTES else jnp.bfloat16
    work = work_of(
        model,
        config.optim,
        batch_size=config.batch_size,
        width=width,
        dtype_bytes=dtype_bytes,
        sums_tokens=config.objective.name in TOKEN_SUMS,
        tuning=adapters.build(model.table, config.freeze, dtype=matrices, **asdict(config.adapter)),
    )
    steps = config.steps
    if steps is None and tokens is not None and config.epochs is not None:
        steps = max(1, int(config.epochs * tokens / work.tokens))
    return Run(work, steps)


def outcome(run: Run, estimate: Estimate, price: float | None = None) -> Outcome:
    """What an estimate comes to; `price` in dollars a chip and hour goes before the list's."""
    chip, seconds = estimate.topology.chip, estimate.seconds
    if chip is None or seconds is None:
        return Outcome(estimate, None, None, None, None, None)
    speed = run.work.tokens / seconds.step
    hours = run.steps * seconds.step / 3600 if run.steps else None

    def money(an_hour: float | None) -> float | None:
        return None if hours is None or an_hour is None else hours * estimate.topology.chips * an_hour

    return Outcome(
        estimate=estimate,
        tokens_per_s=speed,
        mfu=speed * run.work.flops_per_token / (chip.peak * estimate.topology.chips),
        hours=hours,
        dollars=money(chip.price if price is None else price),
        spot_dollars=money(chip.spot) if price is None else None,
    )
