"""Pretraining, SFT, DPO and KTO one after the other from the command line: killed and resumed bit for bit, exported with
the template that was trained, and answering in transformers as in maxi."""

import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from maxi import shelf
from maxi.data import bpe
from maxi.data.documents import Budget, records
from maxi.sections import Source
from tests import golden
from tests.test_train import assert_same_run, environment, maxi, steps_logged

MODEL = """
model:
  config: {{model_type: qwen3, vocab_size: 512, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
           num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 256}}
tokenizer: {folder}/tokenizer
data: {{train: [{{path: {folder}/text.jsonl, field: answer}}], cache_dir: {folder}/cache}}
"""
STAGE = """
model: {{init_from: {folder}/{before}}}
data: {{train: [{{path: {folder}/{rows}.jsonl}}], eval_share: 0.1, cache_dir: {folder}/cache}}
objective: {name}
eval: {{every: 4, max_rows: 4, prompts: ["What does `abs` do?"], max_new_tokens: 8}}
"""
COMMON = """
run_dir: {folder}/{name}
steps: {steps}
batch_size: 4
seq_len: 128
micro_batches: 2
optim: {{lr: 1.0e-2, warmup_ratio: 0.1}}
checkpoint: {{every: {every}}}
log: {{every: 1}}
export_dtype: float32
"""
STEPS, CHECKPOINT_EVERY = 8, 3
BEFORE = {"sft": "pretrain", "dpo": "sft", "kto": "sft"}


def write(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def configure(folder: Path, name: str, home: Path | None = None) -> Path:
    """The config of a stage in `folder`; what stands in `home` is only read."""
    part = MODEL if name == "pretrain" else STAGE
    home = home or folder
    text = part.format(folder=home, name=name, before=BEFORE.get(name), rows=name)
    path = folder / f"{name}.yaml"
    path.write_text(COMMON.format(folder=folder, name=name, steps=STEPS, every=CHECKPOINT_EVERY) + text)
    return path


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a tokenizer, and the runs pretrain and sft."""
    folder = tmp_path_factory.mktemp("stages")
    read = records(Source(path="python-docs-preferences"), lambda record, _: record, Budget())
    pairs = list(islice(read, 240))
    answers = [{"question": pair["prompt"], "answer": pair["chosen"]} for pair in pairs]
    write(folder / "text.jsonl", answers)
    write(folder / "sft.jsonl", answers)
    write(folder / "dpo.jsonl", pairs)
    sides = [(pair, ("chosen", "rejected")[n % 2]) for n, pair in enumerate(pairs)]
    write(
        folder / "kto.jsonl", [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"} for p, side in sides]
    )
    bpe.train([f"{row['question']} {row['answer']}" for row in answers], 512, folder / "tokenizer")
    for name in ("pretrain", "sft"):
        maxi("train", configure(folder, name))
    return folder


def kill_after(config: Path, run: Path, least: int) -> None:
    """Starts the run and kills it some time after `least` steps are written down, and the checkpoint before them is."""
    due = least > CHECKPOINT_EVERY
    command = [sys.executable, "-m", "maxi", "train", str(config)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (steps_logged(run) < least or (due and not shelf.steps(run / "checkpoints"))):
        time.sleep(0.01)
    process.kill()
    process.communicate()


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_sft_learns_and_what_it_writes(stages: Path) -> None:
    lines = metrics(stages / "sft")
    evals = [line for line in lines if "eval/loss" in line]
    assert evals[-1]["eval/loss"] < evals[0]["eval/loss"] - 0.3
    assert {"eval/stopped", "eval/repeated_4grams", "eval/distinct_2", "eval/longest_loop"} <= evals[-1].keys()
    sample = json.loads((stages / "sft" / "samples.jsonl").read_text().splitlines()[-1])
    assert sample["prompt"] == "What does `abs` do?" and {"text", "stopped", "repeated_4grams"} <= sample.keys()
    read = json.loads((stages / "sft" / "run.json").read_text())["data"]
    assert any("100.00% of" in line and "answer tokens trained" in line for line in read)


def test_the_export_answers_in_transformers_as_in_maxi(stages: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf, question = stages / "sft" / "hf", "What does `abs` do?"
    tokenizer = AutoTokenizer.from_pretrained(hf)
    model: Any = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    given = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
    theirs = tokenizer.decode(out, skip_special_tokens=True)
    ours = maxi("generate", stages / "sft", "--chat", "--prompt", question, "--temperature", 0, "--max-new-tokens", 12).stdout
    assert theirs.strip() in ours
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_killed_and_started_again_is_the_undisturbed_run(name: str, stages: Path, tmp_path: Path) -> None:
    """SIGKILL after the first steps and after a checkpoint; then the end is the same, bit for bit."""
    undisturbed = stages / name
    if not undisturbed.is_dir():
        maxi("train", configure(stages, name))
    config = configure(tmp_path, name, stages)
    for least in (1, 5) if name != "kto" else (5,):
        kill_after(config, tmp_path / name, least)
    out = maxi("train", config).stdout
    assert "resumed from step" in out
    assert_same_run(tmp_path / name, undisturbed)
    names = sorted({key for line in metrics(undisturbed) for key in line})
    golden.check(f"metric_names_{name}.txt", "\n".join(names))
    if name != "sft":
        first = metrics(undisturbed)[0]
        assert first["eval/rewards/margins"] == pytest.approx(0, abs=1e-5)
        assert first["eval/loss"] == pytest.approx(0.5 if name == "kto" else 0.693147, abs=1e-5)
        assert "from the cache" in out and "computed in" not in out


def test_a_lost_reference_cache_is_made_again_from_the_same_weights(stages: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, "dpo", stages)
    overrides = [f"data.cache_dir={tmp_path}/cache"]
    kill_after(config, tmp_path / "dpo", 4)
    maxi("train", config, *overrides)
    assert list((tmp_path / "cache" / "references").glob("*.npy"))
    assert_same_run(tmp_path / "dpo", stages / "dpo")


def test_rows_too_long_to_hold_an_answer_are_one_line(stages: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, "sft", stages)
    assert "have nothing to learn" in maxi("train", config, "seq_len=8", expect=3).stderr
