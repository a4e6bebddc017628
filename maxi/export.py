"""A run's weights as a Hugging Face folder, with a model card that says how they were made."""

from pathlib import Path

from maxi import config as configs
from maxi import hf
from maxi.errors import ModelFolderError
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
    if not Run.is_run(run_dir):
        raise ModelFolderError("not a run folder", str(run_dir), "`maxi convert` takes Hugging Face folders")
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
    rows = "\n".join(
        f"| {line['step']:,} | {line['eval/loss']:.4f} | {line.get('eval/bits_per_byte', float('nan')):.4f} |"
        for line in run.evaluations()
    )
    results = f"\n| step | held-out loss (nats/token) | bits per byte |\n|---:|---:|---:|\n{rows}\n" if rows else ""
    return f"\n## Training\n{results}\n```yaml\n{configs.to_yaml(config)}```\n"
