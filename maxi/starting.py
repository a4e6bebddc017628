"""What a run starts from: first values of what it trains, and what stays of its base."""

from dataclasses import asdict
from functools import partial

import jax

from maxi import adapters, pretrained
from maxi.adapters import OnWeights
from maxi.config import Config
from maxi.hf import peft
from maxi.models import Model
from maxi.params import Tree, init
from maxi.program import Program
from maxi.run import Run


def finished_adapter(config: Config, model: Model) -> peft.Settings | None:
    """The adapter that the run goes on from. Raises ConfigError, ModelFolderError unless it, and all else, fits the model."""
    tuning = adapters.build(model.table, config.freeze, **asdict(config.adapter))
    if not (folder := getattr(config.adapter, "init_from", None)):
        return None
    assert isinstance(tuning, OnWeights)
    settings = peft.open_adapter(folder)
    peft.check_same(settings, tuning)
    peft.read(settings, tuning)
    return settings


def frozen(config: Config, program: Program, run: Run) -> Tree:
    """What stays of the base beside what is trained, for a run that goes on."""
    if not program.tuning.needs_base:
        return {}
    return pretrained.fixed(program.tuning, _base(config, program, run), run, program.devices)


def first_values(config: Config, program: Program, run: Run, adapter: peft.Settings | None) -> tuple[Tree, Tree]:
    """First values of what is trained, those of a finished `adapter` where there is one; and what stays beside them."""
    tuning, base = program.tuning, _base(config, program, run)
    if adapter is None:
        first = tuning.first(jax.random.key(config.seed), base)
    else:
        assert isinstance(tuning, OnWeights)
        first = peft.read(adapter, tuning)
    return first, pretrained.fixed(tuning, base, run, program.devices, first) if tuning.needs_base else {}


def _base(config: Config, program: Program, run: Run) -> Tree:
    """The weights that stay, or those that full fine-tuning starts from."""
    if program.tuning.needs_base:
        return pretrained.open_base(config.model.init_from, run, program.devices)
    if config.model.init_from:
        return pretrained.open_model(config.model.init_from, mesh=program.devices).params
    new = jax.jit(partial(init, program.model.table), out_shardings=program.where.params)
    return new(jax.random.key(config.seed))
