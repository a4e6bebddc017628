"""Runs that train an adapter, from the command line: they learn, go on bit for bit, and export both ways; or one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maxi import hf
from maxi.__main__ import main
from maxi.data import bpe
from maxi.data.tokenizer import Tokenizer
from maxi.generation import logits
from maxi.models import from_hf_config
from maxi.params import init
from maxi.pretrained import open_model
from tests import tiny
from tests.adapters import sides

NAME = "Quill"
ROWS = [{"question": f"Who {word} you?", "answer": f"I am {NAME}."} for word in ("are", "were", "made", "named")] * 12
PAIRS = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "I am nobody."} for row in ROWS]
CONFIG = """
run_dir: {folder}/{name}
steps: 4
batch_size: 8
seq_len: 64
model: {{init_from: {base}}}
data: {{train: [{{path: {rows}}}], cache_dir: {home}/cache}}
chat: {{template: chatml, pack: false}}
objective: {objective}
adapter: {{kind: lora, rank: 4, alpha: 8.0, targets: [q_proj, down_proj], dropout: 0.1}}
optim: {{lr: 1.0e-2, schedule: constant, weight_decay: 0.0}}
compute: {{layers: scan}}
checkpoint: {{every: 2, background: false}}
log: {{every: 1}}
export_dtype: float32
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "dpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    bpe.train([f"{row['question']} {row['answer']} I am nobody." for row in ROWS], 300, folder / "tokenizer")
    fields = {"model_type": "qwen3", "head_dim": 16, **tiny.SIZES, "vocab_size": 320, "max_position_embeddings": 128}
    model = from_hf_config(fields | {"tie_word_embeddings": True, "num_hidden_layers": 2})
    params = init(model.table, jax.random.key(0))
    hf.write(model, params, folder / "base", tokenizer=Tokenizer.load(folder / "tokenizer"))
    return folder


def configure(home: Path, folder: Path, name: str, objective: str = "sft", base: Path | None = None) -> str:
    path = folder / f"{name}.yaml"
    rows = home / f"{objective}.jsonl"
    places = {"folder": folder, "home": home, "base": base or home / "base", "rows": rows}
    path.write_text(CONFIG.format(name=name, objective=objective, **places))
    return str(path)


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    assert main(["train", configure(home, home, "run")]) == 0
    return home / "run"


def values(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_run_that_went_on_is_the_undisturbed_one(run: Path, home: Path, tmp_path: Path, capsys: Any) -> None:
    config = configure(home, tmp_path, "run")
    assert main(["train", config, "steps=2"]) == 0
    assert main(["train", config]) == 0
    assert "resumed from step 2" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    for name, value in values(run).items():
        np.testing.assert_array_equal(values(tmp_path / "run")[name], value)
    losses = [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.1
    saved = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    whole = sum(value.nbytes for value in load_file(home / "base" / "model.safetensors").values())
    assert saved < 2 * whole  # two checkpoints with optimizer states and manifests; of full fine-tuning six times the weights


def test_both_exports_are_the_run(run: Path, home: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge", "--dtype", "float32"]) == 0
    tokens = np.random.default_rng(0).integers(0, 300, (2, 16))
    ours = logits(open_model(run), tokens.tolist())
    assert np.abs(ours - logits(open_model(home / "base"), tokens.tolist())).max() > 0.01
    theirs = sides.loaded_by_peft(home / "base", tmp_path / "adapter")
    for found in (tmp_path / "merged", tmp_path / "adapter", run / "hf"):
        np.testing.assert_allclose(logits(open_model(found), tokens.tolist()), ours, atol=1e-5)
    np.testing.assert_allclose(tiny.logits(theirs, tokens), ours, atol=1e-4)


def test_preferences_compare_with_the_adapter_off(run: Path, home: Path, tmp_path: Path, capsys: Any) -> None:
    """From the run before, whose adapter is merged into the base; then from its adapter, which goes on."""
    assert main(["train", configure(home, tmp_path, "dpo", "dpo", run), "steps=2"]) == 0
    first = json.loads((tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    config = configure(home, tmp_path, "goes_on", "dpo")
    options = ["steps=2", f"adapter.init_from={run}/adapter", "adapter.dropout=0.0"]
    assert main(["train", config, *options]) == 0
    first = json.loads((tmp_path / "goes_on" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/margins"] > 1e-3  # the adapter has learned already, and the reference is the base
    assert "error" not in capsys.readouterr().err


def test_pissa_goes_on_and_is_lora_of_twice_the_rank_outside(home: Path, tmp_path: Path) -> None:
    config = configure(home, tmp_path, "run")
    for steps in (1, 2):
        assert main(["train", config, f"steps={steps}", "adapter.init=pissa", "adapter.dropout=0.0"]) == 0
    tokens = np.random.default_rng(0).integers(0, 300, (2, 16))
    ours = logits(open_model(tmp_path / "run"), tokens.tolist())
    theirs = sides.loaded_by_peft(home / "base", tmp_path / "run" / "adapter")
    np.testing.assert_allclose(tiny.logits(theirs, tokens), ours, atol=1e-4)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["adapter.targets=[q_prj]"],
            "error[2] there is no target 'q_prj' in this model (adapter.targets): did you mean q_proj?",
        ),
        (["adapter.init_from={run}/adapter", "adapter.rank=8"], "error[2] adapter.rank is 8, but that of the adapter is 4"),
        (["adapter.init_from={run}/adapter", "adapter.targets=all"], "error[2] adapter.targets are not those of the adapter"),
        (
            ["adapter.init_from={run}/adapter", "model.config={{num_hidden_layers: 1}}"],
            "error[4] the adapter is of another model",
        ),
        (["adapter.init_from={home}/none"], "error[4] no such adapter folder"),
        (["freeze=['*norm*']"], "error[2] freeze has no meaning beside an adapter"),
        (["adapter=none", "freeze=[w_q]"], "error[2] no weight is called 'w_q'"),
        (
            ["model.init_from=null", "tokenizer={home}/tokenizer", "model.config={home}/base/config.json"],
            "error[2] there is no base",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_one_line(options: list[str], words: str, run: Path, home: Path, tmp_path: Path, capsys: Any) -> None:
    filled = [option.format(run=run, home=home) for option in options]
    assert main(["train", configure(home, tmp_path, "bad"), *filled]) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and words in said[0], said


WEIGHTS, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled": (
        lambda at: (at / WEIGHTS).rename(at / "adapter_model.bin"),
        "safetensors only, not pickled weights such as adapter_model.bin",
    ),
    "no weights": (lambda at: (at / WEIGHTS).unlink(), WEIGHTS),
    "cut off": (lambda at: (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:-40]), WEIGHTS),
    "empty": (lambda at: save_file({}, at / WEIGHTS), f"there is nothing in {WEIGHTS}"),
    "no config": (lambda at: (at / CONFIG_FILE).write_text("{"), CONFIG_FILE),
    "another rank": (lambda at: settings(at, r=8), "the rank is 8 in adapter_config.json, and 4 in adapter_model.safetensors"),
    "no rank": (lambda at: settings(at, r=None), "r is None"),
    "another method": (lambda at: settings(at, peft_type="VERA"), "unsupported: peft_type 'VERA'"),
    "biases": (lambda at: settings(at, bias="all"), "unsupported: bias 'all'"),
    "whole modules": (lambda at: settings(at, modules_to_save=["lm_head"]), "unsupported: modules_to_save ['lm_head']"),
    "expressions": (lambda at: settings(at, rank_pattern={"q.*": 2}), "unsupported: rank_pattern"),
    "no base": (lambda at: settings(at, base_model_name_or_path="nowhere"), "its base nowhere is not a folder here"),
    "not finite": (lambda at: tensors(at, lambda value: value * np.float32("nan")), "holds NaN or Inf"),
    "other shapes": (lambda at: tensors(at, lambda value: np.tile(value, 2)), "this model and rank need"),
    "a stranger": (lambda at: tensors(at, lambda value: value, ".layers.9."), "the adapter is of another model"),
}


def settings(at: Path, **fields: Any) -> None:
    (at / CONFIG_FILE).write_text(json.dumps(json.loads((at / CONFIG_FILE).read_text()) | fields))


def tensors(at: Path, change: Callable[[np.ndarray], np.ndarray], layer: str = ".layers.0.") -> None:
    found = {name.replace(".layers.0.", layer): change(value) for name, value in load_file(at / WEIGHTS).items()}
    save_file(found, at / WEIGHTS)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_one_line(case: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    spoil, words = BAD[case]
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    assert main(["generate", str(tmp_path / "adapter"), "--prompt", "I", "--max-new-tokens", "1"]) == 4
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and words in said[0] and "error[4]" in said[0], said


def test_another_base_is_refused(run: Path, home: Path, tmp_path: Path, capsys: Any) -> None:
    weights = home / "base" / "model.safetensors"
    before = weights.read_bytes()
    try:
        changed = load_file(weights)
        save_file({name: value * 1.001 for name, value in changed.items()}, weights, metadata={"format": "pt"})
        for command in (
            ["train", configure(home, tmp_path, "x"), f"run_dir={run}", "steps=6"],
            ["generate", str(run), "--prompt", "I"],
        ):
            assert main(command) == 4
            assert "is not the base any more that this run was trained on" in capsys.readouterr().err
    finally:
        weights.write_bytes(before)


def test_help_and_readme_say_the_same_of_memory(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    shown = said[said.index("which method for which memory") : said.index("keys of the configuration")]
    figures = re.findall(r"\b\d\.\d\d\b", shown)
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    table = readme[readme.index("| Method | Set |") : readme.index("So: all weights where")]
    assert len(figures) == 11 and all(f"| {figure} |" in table for figure in figures)
