"""A run's weights as a Hugging Face folder, with a model card that says how they were made."""

import json
from pathlib import Path

from maxi import config as configs
from maxi import hf
from maxi.hf import Loaded
from maxi.hf.card import default_card
from maxi.pretrained import open_model
from maxi.run import Run


def export(
    run_dir: str | Path, out: str | Path, *, step: int | None = None, dtype: str | None = None, force: bool = False
) -> Path:
    """Writes the checkpoint of `step` (default: the newest) to the folder `out`; `dtype` defaults to the run's choice.

    Raises ModelFolderError for a folder that is no run, a step it does not have, or an `out` that exists and not `force`.
    """
    target = hf.check_target(out, force)
    return write(Run(run_dir), open_model(run_dir, step), target, dtype=dtype, force=force)


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
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()] if run.metrics.is_file() else []
    evals = [line for line in lines if "eval/loss" in line]
    rows = "\n".join(
        f"| {line['step']:,} | {line['eval/loss']:.4f} | {line.get('eval/bits_per_byte', float('nan')):.4f} |" for line in evals
    )
    results = f"\n| step | held-out loss (nats/token) | bits per byte |\n|---:|---:|---:|\n{rows}\n" if rows else ""
    return f"\n## Training\n{results}\n```yaml\n{configs.to_yaml(config)}```\n"
