"""A run's weights as a Hugging Face folder, or its adapter in peft's format, with a model card that says how they were made."""

import json
import logging
from pathlib import Path

from maxi import config as configs
from maxi import hf, processes
from maxi.adapters import OnWeights, Tuning
from maxi.errors import ModelFolderError
from maxi.hf import Loaded, peft
from maxi.hf.card import default_card
from maxi.models.model import restacked
from maxi.params import Tree
from maxi.pretrained import Trained, open_trained
from maxi.run import Run, exported_step
from maxi.whole import write_whole

log = logging.getLogger("maxi")


def export(
    run_dir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    adapter: bool = False,
    force: bool = False,
) -> Path:
    """Writes the checkpoint of `step` (default: the newest) to the folder `out`; `dtype` defaults to the run's choice.

    What an adapter learned becomes part of the weights; with `adapter` it alone is written, in peft's format. Raises
    ModelFolderError for a folder that is no run, a step it does not have, or an `out` that exists and not `force`.
    """
    target = hf.check_target(out, force)
    if not Run.is_run(run_dir):
        raise ModelFolderError("not a run folder", str(run_dir), "`maxi convert` takes Hugging Face folders")
    run = Run(run_dir)
    trained = open_trained(run_dir, step)
    if adapter:
        return write_adapter(run, trained, target, force=force)
    params = merged(trained.tuning, trained.params, trained.frozen)
    return write(run, Loaded(trained.model, params, run.model), target, dtype=dtype, force=force)


def merged(tuning: Tuning, params: Tree, frozen: Tree) -> Tree:
    """Weights of the base's table with what was learned in them; says so where the base is not what it was.

    Raises ModelFolderError where it is no part of weights.
    """
    if tuning.virtual_tokens:
        what = f"{tuning.virtual_tokens} virtual tokens before each text are no part of the weights and cannot be merged"
        raise ModelFolderError(what, "export", "export the adapter, with --adapter")
    if isinstance(tuning, OnWeights) and tuning.precision:
        log.warning("export: merged into the base as %s keeps it, not as it was before", tuning.precision)
    return tuning.merged(params, frozen)


def write_adapter(run: Run, trained: Trained, out: Path, *, force: bool = False) -> Path:
    """The adapter by itself. Raises ModelFolderError for a run that trained none."""
    config, tuning = configs.load(run.config), trained.tuning
    if not isinstance(tuning, OnWeights):
        raise ModelFolderError("the run trained no adapter", str(run.folder), "leave out --adapter")
    assert config.model.init_from is not None
    base = str(Run(config.model.init_from).hf if Run.is_run(config.model.init_from) else config.model.init_from)
    tokenizer = Loaded(trained.model, {}, run.model).tokenizer
    card = _how_it_was_trained(run, config)
    return peft.write(
        tuning,
        trained.params,
        trained.frozen,
        out,
        base_name=base,
        tokenizer=tokenizer,
        card=card,
        steps=max(config.steps or 0, trained.step),
        force=force,
    )


def finish(run: Run, trained: Trained) -> None:
    """hf/ and adapter/ of a run that is at its last step, unless they are already of this one."""
    config, tuning, step = configs.load(run.config), trained.tuning, trained.step
    has_adapter = isinstance(tuning, OnWeights)
    has_weights = config.export_hf and not tuning.virtual_tokens
    wanted = [run.hf] * has_weights + [run.adapter] * has_adapter
    done = exported_step(run) == step and all(folder.is_dir() for folder in wanted)
    if not wanted or processes.exchange(done)[0]:
        return
    if has_adapter:
        write_adapter(run, trained, run.adapter.resolve(), force=True)
        log.info("export: %s (step %d, the adapter)", run.adapter, step)
    if has_weights:
        params = merged(tuning, trained.params, trained.frozen)
        model = restacked(trained.model, tuning.base)
        write(run, Loaded(model, params, run.model), run.hf.resolve(), force=True)
        log.info("export: %s (step %d, %s)", run.hf, step, config.export_dtype)
    if processes.is_first():
        write_whole(run.exported, json.dumps({"step": step}) + "\n")


def write(run: Run, loaded: Loaded, out: Path, *, dtype: str | None = None, force: bool = False) -> Path:
    """The export of weights that are in memory; see `export`."""
    config = configs.load(run.config)
    dtype = dtype or config.export_dtype
    card = default_card(loaded.model, dtype, out.name) + _how_it_was_trained(run, config)
    return hf.write(
        loaded.model,
        loaded.params,
        out,
        dtype=dtype,
        tokenizer=loaded.tokenizer,
        card=card,
        generation=loaded.generation,
        force=force,
    )


def _how_it_was_trained(run: Run, config: configs.Config) -> str:
    rows = "\n".join(
        f"| {line['step']:,} | {line['eval/loss']:.4f} | {line.get('eval/bits_per_byte', float('nan')):.4f} |"
        for line in run.evaluations()
    )
    results = f"\n| step | held-out loss (nats/token) | bits per byte |\n|---:|---:|---:|\n{rows}\n" if rows else ""
    return f"\n## Training\n{results}\n```yaml\n{configs.to_yaml(config)}```\n"
