"""Whole runs from the command line: text in, a Hugging Face folder out; killed and resumed bit for bit; refused in one line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from maxi import manifest, shelf
from maxi.data import bpe
from maxi.data.documents import Budget, read
from maxi.goodput import goodput
from maxi.run import Run
from maxi.sections import Source
from tests import golden, small

STEPS = 24
CONFIG = """
run_dir: {run}
steps: {steps}
batch_size: 4
seq_len: 64
tokenizer: {tokenizer}
model:
  config: {{model_type: qwen3, vocab_size: 512, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
           num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 128,
           tie_word_embeddings: true}}
data: {{train: [{{path: {text}}}], eval_share: 0.1, cache_dir: {cache}}}
optim: {{lr: 2.0e-2, warmup_ratio: 0.1, ema: 0.5}}
checkpoint: {{every: 5}}
eval: {{every: 8, max_rows: 8, prompts: [the list], max_new_tokens: 8}}
log: {{every: 1}}
export_dtype: float32
"""


def environment(devices: int = 1) -> dict[str, str]:
    """One CPU device (the suite's own process has eight), and no more threads than the machine has."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def maxi(*args: Any, devices: int = 1, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end; a refusal must be one line without a traceback."""
    command = [sys.executable, "-m", "maxi", *map(str, args)]
    done = subprocess.run(command, env=environment(devices), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    if expect:
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"maxi: error[{expect}] "), done.stderr
    return done


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real corpus: a hundred documents of Python's own documentation."""
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    documents = (document.text[:2000] for document in read(Source(path="python-docs"), Budget(0)))
    chosen = [json.dumps({"text": text}) for text, _ in zip(documents, range(100), strict=False)]
    path.write_text("\n".join(chosen) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(text: Path) -> Path:
    folder = text.with_name("tokenizer")
    bpe.train((document.text for document in read(Source(path=str(text)), Budget(0))), 512, folder)
    return folder


@pytest.fixture(scope="module")
def configure(text: Path, tokenizer: Path):
    def write(folder: Path, **fields: Any) -> Path:
        places = {"run": folder / "run", "text": text, "tokenizer": tokenizer, "cache": text.with_name("cache"), "steps": STEPS}
        path = folder / "config.yaml"
        path.write_text(CONFIG.format(**{**places, **fields}))
        return path

    return write


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, configure: Any) -> Path:
    """The run that the others must equal."""
    config = configure(tmp_path_factory.mktemp("undisturbed"))
    maxi("train", config)
    return config.with_name("run")


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (one / name).read_text() == (other / name).read_text()
    assert (one / "hf" / "model.safetensors").read_bytes() == (other / "hf" / "model.safetensors").read_bytes()
    last = small.steps_of(one)[-1]  # those before it may be where a stop saved
    assert last == small.steps_of(other)[-1]
    mine, theirs = small.arrays(one, last), small.arrays(other, last)
    assert mine.keys() == theirs.keys() and not [name for name in mine if mine[name] != theirs[name]]


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len([line for line in path.read_text().splitlines() if "train/loss" in line]) if path.is_file() else 0


def test_text_in_model_out(undisturbed: Path) -> None:
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    evals = [line for line in lines if "eval/loss" in line]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5
    assert [line["step"] for line in evals] == [0, 8, 16, 24] and evals[-1]["eval/loss"] < evals[0]["eval/loss"] - 0.5
    assert 0 < evals[-1]["eval/bits_per_byte"] < evals[0]["eval/bits_per_byte"]
    names = sorted({name for line in lines for name in line})
    perf = sorted(json.loads((undisturbed / "perf.jsonl").read_text().splitlines()[0]))
    golden.check("metric_names.txt", "\n".join(names + perf))
    assert list((undisturbed / "tensorboard").iterdir())
    card = (undisturbed / "hf" / "README.md").read_text()
    assert "held-out loss" in card and "hidden_size" in card


def test_transformers_generates_from_the_export_what_maxi_does(undisturbed: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "Return a new"
    ours = maxi("generate", undisturbed, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 12).stdout
    tokenizer = AutoTokenizer.from_pretrained(undisturbed / "hf")
    model: Any = AutoModelForCausalLM.from_pretrained(undisturbed / "hf", dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    assert tokenizer.decode(out, skip_special_tokens=True).strip() in ours


def test_killed_and_started_again_is_the_undisturbed_run(undisturbed: Path, tmp_path: Path, configure: Any) -> None:
    """SIGKILL five times and SIGTERM once, at random moments; then records, weights and optimizer are the same, bit for bit."""
    config, rng, codes = configure(tmp_path), random.Random(6), []
    run = config.with_name("run")
    ends = rng.sample([signal.SIGKILL] * 5 + [signal.SIGTERM], 6)
    for life, end in enumerate(ends):
        process = subprocess.Popen(
            [sys.executable, "-m", "maxi", "train", str(config)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # one of them some time before its first step, the others a step or two beyond what the one before came to
        least = 0 if life == 2 else steps_logged(run) + rng.randint(1, 2)
        while process.poll() is None and steps_logged(run) < least:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 3) if life == 2 else rng.uniform(0, 0.2))
        process.send_signal(end)
        error = process.communicate(timeout=120)[1]
        codes.append(process.returncode)
        assert "Traceback" not in error, error
        assert not list(run.glob("checkpoints/*/*.tmp")) and verified(run), "whatever is marked is whole"
    assert codes.count(-signal.SIGKILL) >= 4, codes  # unless a life was quicker than we are
    maxi("train", config)
    assert_same_run(run, undisturbed)
    told = goodput(run)
    assert (told["steps"], told["stalls"]) == (STEPS, 0)
    assert len(ends) - 1 <= told["lives"] <= len(ends) + 1, "one or two may have ended before they could say that they lived"
    assert all(
        told["seconds"][kind] > 0 for kind in ("steps", "start-up", "compile", "evaluation", "checkpoint", "export", "down")
    )


def verified(run: Path) -> bool:
    folder = run / "checkpoints"
    return not folder.is_dir() or all(manifest.damage(folder / str(step), step) is None for step in shelf.steps(folder))


def test_sigterm_saves_and_exits_75(undisturbed: Path, tmp_path: Path, configure: Any) -> None:
    config = configure(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "maxi", "train", str(config)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and steps_logged(config.with_name("run")) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    if process.returncode == 75:  # unless it was quicker than we are
        assert error.count("\n") == 1 and "all is saved" in error
    assert process.returncode in (0, 75)
    maxi("train", config)
    assert_same_run(config.with_name("run"), undisturbed)


def test_the_same_command_again_says_that_it_is_done(undisturbed: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    out = maxi("train", undisturbed / "config.yaml").stdout
    assert "all done" in out and "done: 24 steps" in out
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
    assert "at step 24 already, past steps 9" in maxi("train", undisturbed / "config.yaml", "steps=9", expect=2).stderr


def test_resumes_on_more_devices_and_with_more_steps(tmp_path: Path, configure: Any) -> None:
    config = configure(tmp_path, steps=10)
    maxi("train", config, "optim.schedule=constant")
    changes = ("optim.schedule=constant", "steps=14", "micro_batches=2", "mesh.tensor=2", "mesh.context=2")
    out = maxi("train", config, *changes, devices=8).stdout
    assert "resumed from step 10" in out and "8 x cpu (replica 1, fsdp 2, context 2, tensor 2)" in out
    assert "attention: ring (" in out, out

    straight = configure(tmp_path, steps=14, run=tmp_path / "straight")
    maxi("train", straight, "optim.schedule=constant")
    one, other = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("run", "straight"))
    for name, weight in one.items():
        np.testing.assert_allclose(weight, other[name], atol=1e-4)
    of_each = [list(map(json.loads, (tmp_path / name / "metrics.jsonl").open())) for name in ("run", "straight")]
    for key in ("train/loss", "eval/loss"):
        got, wanted = ({line["step"]: line[key] for line in lines if key in line} for lines in of_each)
        np.testing.assert_allclose([got[step] for step in wanted], list(wanted.values()), rtol=1e-4)
    assert len(got) >= 3


def test_a_second_stage_starts_from_a_run(undisturbed: Path, tmp_path: Path, configure: Any) -> None:
    config = configure(tmp_path, steps=2)
    out = maxi("train", config, f"model.init_from={undisturbed}", "model.config=null", "tokenizer=null").stdout
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    last = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"weights of {undisturbed}" in out and first["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)


def test_export_of_a_step_and_its_refusals(undisturbed: Path, tmp_path: Path) -> None:
    maxi("export", undisturbed, tmp_path / "out", "--step", 20, "--dtype", "bfloat16")
    assert (tmp_path / "out" / "config.json").is_file()
    assert "exists" in maxi("export", undisturbed, tmp_path / "out", expect=4).stderr
    assert "not a run folder" in maxi("export", tmp_path / "out", tmp_path / "none", expect=4).stderr
    assert "no checkpoint of step 7" in maxi("export", undisturbed, tmp_path / "none", "--step", 7, expect=4).stderr


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["seed=1"], 2, "this run began with other settings, seed 0 -> 1"),
        (["data.train.0.path=none.txt", "run_dir={tmp}/r"], 3, "none.txt"),
        (["mesh.fsdp=3", "run_dir={tmp}/r"], 2, "needs 3 devices but there are 1"),
        (["seq_len=256", "run_dir={tmp}/r"], 2, "max_position_embeddings 128"),
        (["batch_size=4096", "run_dir={tmp}/r"], 3, "do not fill a batch"),
        (["model.config.vocab_size=300", "run_dir={tmp}/r"], 2, "512 ids but the model 300"),
        (["model.config.num_key_value_heads=3", "run_dir={tmp}/r"], 2, "do not divide"),
        (["model.config.alibi=true", "run_dir={tmp}/r"], 2, "unsupported: alibi"),
        (["tokenizer=nowhere", "run_dir={tmp}/r"], 4, "nowhere"),
        (["run_dir=/proc/nowhere"], 2, "cannot write the run folder"),
        (["log.to=[trackio]", "run_dir={tmp}/r"], 6, "trackio is not installed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_are_one_line(overrides: list[str], code: int, words: str, undisturbed: Path, tmp_path: Path) -> None:
    overrides = [override.format(tmp=tmp_path) for override in overrides]
    done = maxi("train", undisturbed / "config.yaml", *overrides, expect=code)
    assert words in done.stderr


def test_two_writers_are_kept_apart(undisturbed: Path) -> None:
    import fcntl

    with Run(undisturbed).folder.joinpath("lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process trains here" in maxi("train", undisturbed / "config.yaml", expect=6).stderr


def test_changed_data_is_found(tmp_path: Path, configure: Any, text: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(text.read_bytes())
    config = configure(tmp_path, text=mine, steps=2)
    maxi("train", config)
    lines = mine.read_text().splitlines()
    mine.write_text("\n".join([*lines[1:], json.dumps({"text": "something else, " * 40})]) + "\n")
    assert "the data changed" in maxi("train", config, "steps=4", expect=3).stderr
