"""What a run starts from: first values of what it trains, and what stays of its base."""

from dataclasses import asdict, replace
from functools import partial

import jax

from maxi import adapters, pretrained
from maxi.adapters import OnWeights, Tuning
from maxi.adapters.prompt import Prompt
from maxi.config import Config
from maxi.errors import ConfigError
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


def first_values(config: Config, program: Program, run: Run, adapter: peft.Settings | None) -> tuple[Tree, Tree]:
    """First values of what is trained, those of a finished `adapter` where there is one; and what stays beside them."""
    tuning, key = program.tuning, jax.random.key(config.seed)
    if not tuning.needs_base:
        return tuning.first(key, _full(config, program)), {}
    as_read = tuning.starts_from_base and adapter is None
    base = pretrained.open_base(config.model.init_from, run, program.devices, None if as_read else tuning.keep)
    if adapter is None:
        first = _knowing_text(config, tuning).first(key, base)
    else:
        assert isinstance(tuning, OnWeights)
        first = jax.device_put(peft.read(adapter, tuning), program.where.params)
    return first, pretrained.with_start(tuning, tuning.fix(base), run, program.devices, first)


def _knowing_text(config: Config, tuning: Tuning) -> Tuning:
    """The tuning with the ids of the text that it begins with, where there is one."""
    if not (text := getattr(config.adapter, "init_text", None)):
        return tuning
    assert isinstance(tuning, OnWeights) and isinstance(tuning.kind, Prompt)
    tokenizer = pretrained.open_tokenizer(config.tokenizer, config.model.init_from)
    ids = tuple(tokenizer.encode([text])[0].tolist())
    if not ids:
        raise ConfigError("the text has no tokens", "adapter.init_text", "write some words")
    return replace(tuning, kind=replace(tuning.kind, ids=ids))


def _full(config: Config, program: Program) -> Tree:
    """The weights that full fine-tuning starts from."""
    if config.model.init_from:
        return pretrained.open_plain(config.model.init_from, program.devices).params
    new = jax.jit(partial(init, program.model.table), out_shardings=program.where.params)
    return new(jax.random.key(config.seed))
