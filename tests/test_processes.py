"""Several processes in one run, for real: gloo processes on this machine train as one does, go on from each other's
checkpoints, stop together, and end with 75 when one of them is lost, whether it dies or hangs."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from maxi import processes
from maxi.data import bpe
from maxi.data.documents import Budget, read
from maxi.errors import ConfigError
from maxi.sections import Source
from tests import small

STEPS = 24
CONFIG = """
run_dir: {folder}/run
steps: {steps}
batch_size: 4
seq_len: 64
tokenizer: {home}/tokenizer
model:
  config: {{model_type: qwen3, vocab_size: 512, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
           num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 128}}
data: {{train: [{{path: {home}/text.jsonl}}], eval_share: 0.1, cache_dir: {folder}/cache}}
optim: {{lr: 1.0e-3, schedule: constant}}
checkpoint: {{every: 4}}
eval: {{every: 24, max_rows: 6, prompts: [the list], max_new_tokens: 4}}
processes: {{heartbeat_s: 10, start_timeout_s: 120}}
log: {{every: 1}}
export_dtype: float32
"""
Ended = list[tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, a tokenizer, and compiled programs that all processes share."""
    folder = tmp_path_factory.mktemp("processes")
    documents = [
        document.text[:1500] for document, _ in zip(read(Source(path="python-docs"), Budget(0)), range(60), strict=False)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), "utf-8")
    bpe.train(documents, 512, folder / "tokenizer")
    return folder


def configure(home: Path, folder: Path, steps: int = STEPS) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(home=home, folder=folder, steps=steps))
    return path


def start(
    number: int, config: Path, *overrides: str, of: int | None = None, more: dict[int, dict[str, str]] | None = None
) -> list[subprocess.Popen[str]]:
    """`number` processes of one run (that waits for `of`), each with one device; `more`: what else the n-th one's
    environment says."""
    shared = {**small.environment(), "JAX_COMPILATION_CACHE_DIR": str(config.parent.parent / "xla")}
    envs = [{**shared, **one, **(more or {}).get(i, {})} for i, one in enumerate(small.members(of or number)[:number])]
    return [small.start_with(env, config, *overrides) for env in envs]


def ended(running: list[subprocess.Popen[str]]) -> Ended:
    """Exit code, stdout and stderr of each."""
    found = []
    for process in running:
        out, error = process.communicate(timeout=240)
        found.append((process.returncode, out, error))
    return found


def run(number: int, config: Path, *overrides: str) -> str:
    """Runs to the end; what the first process said. The others say nothing."""
    found = ended(start(number, config, *overrides))
    assert [code for code, _, _ in found] == [0] * number, found
    assert all(not error for _, _, error in found) and all(not out for _, out, _ in found[1:]), found
    return found[0][1]


def values(run: Path, name: str) -> dict[int, float]:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
    return {line["step"]: line[name] for line in lines if name in line}


def assert_same_losses(run: Path, wanted: Path) -> None:
    for name in ("train/loss", "eval/loss", "eval/bits_per_byte"):
        found, expected = values(run, name), values(wanted, name)
        assert found.keys() >= expected.keys()
        for step, value in expected.items():
            assert found[step] == pytest.approx(value, rel=5e-6), (name, step)


@pytest.fixture(scope="module")
def alone(home: Path) -> Path:
    """The run of one process that the others must equal."""
    config = configure(home, home / "alone")
    run(1, config)
    return config.with_name("run")


def until(running: list[subprocess.Popen[str]], run: Path, step: int) -> None:
    while all(process.poll() is None for process in running) and step not in values(run, "train/loss"):
        time.sleep(0.02)


def gone(code: int, error: str) -> None:
    """A process ended because another one had."""
    assert code == 75 and error.count("\n") == 1 and "another process of this run is gone" in error, error


def test_one_run_of_2_1_and_4_processes_stopped_killed_and_hung(home: Path, alone: Path) -> None:
    """Six lives of one run, each from the checkpoint of the one before it; in the end it is the run of one process."""
    config = configure(home, home / "together")
    mine, endless = config.with_name("run"), ("steps=500", "eval.every=500")

    # SIGTERM to one of two: both stop at the same step, saved
    running = start(2, config, *endless)
    until(running, mine, 2)
    running[1].send_signal(signal.SIGTERM)
    found = ended(running)
    stopped = [re.search(r"at step (\d+) of 500, all is saved", error) for _, _, error in found]
    assert [code for code, _, _ in found] == [75, 75] and stopped[0] and stopped[1], found
    step = int(stopped[0][1])
    assert stopped[1][1] == stopped[0][1] and (mine / "checkpoints" / str(step)).is_dir()
    assert "SIGTERM" in found[1][2] and "another process was stopped" in found[0][2] and not found[1][1]
    assert "processes: 2" in found[0][1]
    samples = [(folder / "samples.jsonl").read_text().splitlines()[0] for folder in (mine, alone)]
    assert samples[0] == samples[1]

    # one goes on alone, then two again, of which the first is killed
    quick = ("eval.prompts=[]", "export_hf=false")
    assert f"resumed from step {step}" in run(1, config, *quick, f"steps={step + 1}")
    running = start(2, config, *endless, *quick)
    until(running, mine, step + 2)
    running[0].kill()
    code, _, error = ended(running)[1]
    gone(code, error)

    # one of two hangs: the heartbeat of 10 s ends the other, on a machine that may be busy
    running = start(2, config, *endless, *quick)
    until(running, mine, step + 3)
    running[1].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    error = running[0].communicate(timeout=120)[1]
    waited = time.monotonic() - begun
    running[1].kill()
    running[1].communicate()
    gone(running[0].returncode, error)
    assert waited < 40

    # the disk of the second is full: it says so and ends, and the first does not wait for its part
    running = start(2, config, *endless, *quick, more={1: {"MAXI_FAULT": "save.written:1:full"}})
    found = ended(running)
    assert found[1][0] == 6 and re.search(r"checkpoint of step \d+ could not be written, No space left", found[1][2]), found
    gone(found[0][0], found[0][2])

    # four finish what is left and export it
    last = max(int(folder.name) for folder in (mine / "checkpoints").iterdir() if folder.name.isdigit())
    assert step < last < STEPS
    out = run(4, config, "eval.prompts=[]")
    assert f"resumed from step {last}" in out and "replica 1, fsdp 4, context 1, tensor 1" in out
    assert_same_losses(mine, alone)
    files = [{file.name for file in (folder / "hf").iterdir()} for folder in (mine, alone)]
    assert files[0] == files[1]
    for name, weight in load_file(alone / "hf" / "model.safetensors").items():
        np.testing.assert_allclose(load_file(mine / "hf" / "model.safetensors")[name], weight, atol=1e-4)


def test_a_process_that_nobody_joins_gives_up(home: Path) -> None:
    config = configure(home, home / "late")
    ((code, out, error),) = ended(start(1, config, "processes.start_timeout_s=2", of=2))
    assert code == 6 and not out, error
    assert error.startswith("maxi: error[6] the other processes did not come within 2 s") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "names no process"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "no address"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, "process 2 of 2"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES=two"),
        ({"JAX_PROCESS_ID": "1"}, "names no process"),
    ],
    ids=str,
)
def test_an_environment_that_says_half_is_refused(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        processes.start(Path("nowhere"), 10, 10)


def test_who_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "has_tpu", lambda: False)
    assert processes._who() is None
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert processes._who() is None
    monkeypatch.delenv("JAX_NUM_PROCESSES")
    slurm = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert processes._who() == {"cluster_detection_method": "slurm", "local_device_ids": []}
    monkeypatch.setenv("SLURM_NTASKS", "16")
    assert processes._who() == {"cluster_detection_method": "slurm"}
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert processes._who() is None
    monkeypatch.setattr(processes, "has_tpu", lambda: True)
    assert processes._who() is None  # JAX_PLATFORMS is cpu here
    monkeypatch.delenv("JAX_PLATFORMS")
    assert processes._who() == {}
