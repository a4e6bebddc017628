"""Whole runs that are damaged, changed, rewound, replayed or told to stop: what goes on goes on bit for bit."""

import errno
import json
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from maxi import evaluate, faults, mesh
from maxi.__main__ import main
from maxi.checkpoint import Checkpoints
from maxi.program import Program
from tests import small
from tests.test_checkpoint import flip

Maxi = Callable[..., str]


@pytest.fixture(autouse=True)
def nothing_armed() -> Iterator[None]:
    yield
    faults.arm(None)


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """Programs for one device are compiled faster than for the suite's eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "build", partial(mesh.build, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.prepare(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Path:
    """Eight steps, with the checkpoints of all even ones."""
    config = small.configure(home, home / "undisturbed")
    assert main(["train", str(config), "checkpoint.keep=9"]) == 0
    return home / "undisturbed" / "run"


@pytest.fixture
def train(home: Path, tmp_path: Path, capfd: Any) -> Maxi:
    """Trains in tmp_path/run; gives what was printed, and of a refusal its one line."""
    config = small.configure(home, tmp_path)

    def call(*words: str, expect: int = 0) -> str:
        capfd.readouterr()
        code = main(["train", str(config), "checkpoint.keep=9", *words])
        out, err = capfd.readouterr()
        assert code == expect, out + err
        if not expect:
            return out
        assert err.count("\n") == 1 and err.startswith(f"maxi: error[{expect}] "), err
        return out + err

    return call


@pytest.fixture
def run(undisturbed: Path, tmp_path: Path) -> Path:
    """The undisturbed run, in a folder of its own."""
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def history(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "run.json").read_text())["history"]


def cut_to(run: Path, step: int) -> None:
    """The run as it would be, had it been killed behind the checkpoint of that step."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(train: Maxi, run: Path, undisturbed: Path) -> None:
    flip(run / "checkpoints/8/params/_METADATA")
    flip(run / "checkpoints/6/commit.json")
    out = train()
    assert "warning: step 8 corrupt: sha256 of params/_METADATA differs; using 4" in out and "step 6 corrupt: " in out
    assert "resumed from step 4 of 8" in out
    small.assert_same_run(run, undisturbed)
    assert main(["checkpoint", "verify", str(run)]) == 0


def test_when_none_is_left_nothing_is_touched(train: Maxi, run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    for step in small.steps_of(run):
        flip(run / f"checkpoints/{step}/rest/_METADATA")
    assert "step 8 corrupt: sha256 of rest/_METADATA differs; step 6 corrupt" in train(expect=4)
    assert (run / "metrics.jsonl").read_bytes() == before
    for step in small.steps_of(run):
        (run / f"checkpoints/{step}/commit.json").unlink()
    assert "maxi checkpoint adopt" in train(expect=4)


def test_changed_settings_are_listed_and_may_be_allowed(train: Maxi, run: Path) -> None:
    changes = ("optim.lr=0.02", "optim.b1=0.8", "eval.max_rows=2", "steps=9")
    line = train(*changes, expect=2)
    assert "other settings, optim.b1 0.9 -> 0.8, optim.lr 0.01 -> 0.02 " in line and "--allow-change optim.b1" in line
    assert "optim.b1 0.9 -> 0.8 (" in train(*changes, "--allow-change", "optim.lr", expect=2)
    assert "there is no key 'optim.ls'" in train("--allow-change", "optim.ls", expect=2)
    train(*changes, "--allow-change", "optim")
    assert history(run)[-1] | {"host": ""} == {
        "step": 8,
        "host": "",
        "changed": {"optim.b1": [0.9, 0.8], "optim.lr": [0.01, 0.02]},
    }
    train(*changes)  # from now on that is what the run has


def test_other_versions_and_variables_are_said_and_noted(train: Maxi, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads((run / "run.json").read_text())
    facts["versions"]["optax"] = "0.0.1"
    (run / "run.json").write_text(json.dumps(facts))
    monkeypatch.setenv("JAX_RANDOM_SEED_OFFSET", "7")
    refused = train("compute.deterministic=true", expect=2)
    assert "JAX_RANDOM_SEED_OFFSET is '7' and was '' when this run began" in refused
    out = train()
    assert "goes on with other versions, so its bits may differ: optax 0.0.1 -> " in out
    assert "goes on with other environment variables, so its bits may differ: JAX_RANDOM_SEED_OFFSET none -> 7" in out
    assert history(run)[-1]["versions"]["optax"][0] == "0.0.1"
    assert "goes on with other" not in train()
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    assert "XLA_FLAGS has '--xla_gpu_deterministic_ops=false'" in train("compute.deterministic=true", expect=2)


def test_a_new_optimizer_is_asked_for(train: Maxi, run: Path) -> None:
    muon = ("optim.name=muon", "steps=10")
    assert "optim.name adamw -> muon" in train(*muon, expect=2)
    assert "of another optimizer" in train(*muon, "--allow-change", "optim.name", expect=4)
    assert "new optimizer from step 8 on" in train(*muon, "--reset-optimizer")
    assert small.lines(run)[-2]["step"] == 10
    assert "was reset at step 8 already" in train(*muon, "--reset-optimizer")


def test_a_rewind_can_be_replayed(train: Maxi, run: Path, undisturbed: Path, home: Path, tmp_path: Path) -> None:
    assert "there is no checkpoint" in train("--rewind", "7:1", expect=2)
    assert "cannot read '3-4'" in train("--rewind", "3-4", expect=2)
    out = train("--rewind", "3:2")
    assert "rewind: from step 8 back to 5, without the batches 5 to 6; later checkpoints are in" in out
    assert "resumed from step 4 of 8" in out
    assert sorted(path.name for path in (run / "checkpoints/rewound-1").iterdir()) == ["6", "8"]
    assert "leaves out the batches 5 to 6, not 1 to 1" in train("data.skip_batches=[[1, 1]]", expect=2)
    fresh = small.configure(home, tmp_path / "fresh")
    assert main(["train", str(fresh), "checkpoint.keep=9", "data.skip_batches=[[5, 2]]"]) == 0
    small.assert_same_run(run, tmp_path / "fresh/run")
    assert small.lines(run)[-1] != small.lines(undisturbed)[-1]


@pytest.mark.usefixtures("run")
def test_a_rewind_is_done_once_and_finished_by_the_next_start(train: Maxi) -> None:
    faults.arm("config.yaml.write:1:full")
    assert "no space left on device" in train("--rewind", "4:3", expect=6)
    faults.arm("records.flushed:1:term")
    out = train("--rewind", "4:3", expect=75)
    assert "rewind: from step 8 back to 4, without the batches 4 to 6" in out
    assert "rewind: done already; the run is not past step 8 again" in out and "resumed from step 4" in out
    assert "rewind: done already" in train("--rewind", "4:3")
    assert "rewind: from step 8 back to 4, without the batches 4 to 6, 7 to 9" in train("--rewind", "4:3")


def test_a_step_is_verified_bit_for_bit(train: Maxi, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in sorted((run / "checkpoints").rglob("*")) if path.is_file()}
    out = train("--verify-step", "6")
    assert "verified: step 6, replayed twice from step 4; its checkpoint and 2 records: the same bits" in out
    assert "verified: step 1, replayed twice from step 0; 1 records" in train("--verify-step", "1")
    assert "has not come to step 9" in train("--verify-step", "9", expect=2)
    assert before == {path: path.read_bytes() for path in sorted((run / "checkpoints").rglob("*")) if path.is_file()}

    made = Program.step

    def wrong_once(program: Program) -> Any:
        take, calls = made(program), []

        def step(state: Any, batch: Any, frozen: Any) -> Any:
            calls.append(1)
            state, metrics = take(state, batch, frozen)
            if len(calls) != 3:
                return state, metrics
            weight = state.params["embed"]
            bits = jax.lax.bitcast_convert_type(weight, jnp.uint32).at[3, 3].add(1)
            flipped = jax.device_put(jax.lax.bitcast_convert_type(bits, jnp.float32), weight.sharding)
            return state.replace(params={**state.params, "embed": flipped}), metrics

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Program, "step", wrong_once)
        line = train("--verify-step", "6", expect=6)
        assert f"computed twice, bits differ in .params['embed'] (step 6 on {socket.gethostname()})" in line
    text = (run / "metrics.jsonl").read_text().splitlines()
    wrong = json.loads(text[6]) | {"train/loss": 1.5}
    (run / "metrics.jsonl").write_text("\n".join([*text[:6], json.dumps(wrong), *text[7:]]) + "\n")
    assert f"was 1.5 on {socket.gethostname()}" in train("--verify-step", "6", expect=6)


def test_a_stop_during_an_evaluation_saves_first(train: Maxi, undisturbed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """In the middle, and behind the last step."""
    measure, calls = evaluate.measure, []

    def told(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) in (2, 4):
            signal.raise_signal(signal.SIGTERM)
        return measure(*args, **kwargs)

    monkeypatch.setattr(evaluate, "measure", told)
    line = train(expect=75)
    assert "SIGTERM at step 4 of 8, all is saved" in line and "which may take 120 s" in line
    assert [entry["step"] for entry in small.lines(tmp_path / "run") if "eval/loss" in entry] == [0]
    assert "SIGTERM at step 8 of 8, all is saved" in train(expect=75)
    train()
    small.assert_same_run(tmp_path / "run", undisturbed)


def test_a_stop_before_the_first_step_loses_nothing(train: Maxi, undisturbed: Path, tmp_path: Path) -> None:
    faults.arm("config.yaml.renamed:1:int")
    assert "SIGINT before the first step, nothing was lost" in train(expect=75)
    faults.arm("records.flushed:2:term")
    assert "SIGTERM at step 5 of 8, all is saved" in train(expect=75)
    train()
    shutil.rmtree(tmp_path / "run/checkpoints/5")  # which the undisturbed run has no reason to save
    small.assert_same_run(tmp_path / "run", undisturbed)


def test_records_are_down_before_a_checkpoint_says_so(train: Maxi, tmp_path: Path, monkeypatch: Any) -> None:
    save, seen = Checkpoints.save, []

    def looks(checkpoints: Checkpoints, step: int, state: Any) -> None:
        seen.append((step, small.lines(tmp_path / "run")[-1]["step"]))
        save(checkpoints, step, state)

    monkeypatch.setattr(Checkpoints, "save", looks)
    train("eval.every=100", "steps=4")
    assert seen == [(2, 2), (4, 4)]


def test_a_full_disk_at_every_other_save_changes_nothing(train: Maxi, undisturbed: Path, tmp_path: Path) -> None:
    faults.arm("save.written:2:full")
    out = train()
    assert out.count("warning: the checkpoint of step 4 could not be written, No space left on device; the run goes on") == 1
    assert small.steps_of(tmp_path / "run") == [2, 6, 8]
    shutil.copytree(undisturbed / "checkpoints/4", tmp_path / "run/checkpoints/4")
    small.assert_same_run(tmp_path / "run", undisturbed)


def test_records_wait_for_room(train: Maxi, undisturbed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from maxi import lines

    write, refused = lines.os.write, []

    def full(handle: int, data: Any) -> int:
        if (b'"train/loss"' in bytes(data) and len(refused) < 8) or 0 < len(refused) < 8:
            refused.append(1)
            if len(data) > 20:
                write(handle, data[:20])  # what a disk does that has a little room left
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    monkeypatch.setattr(lines.os, "write", full)
    out = train()
    assert "could not be written, No space left on device" in out
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes()


def test_weights_that_overflow_end_the_run_and_the_last_good_ones_stay(train: Maxi, tmp_path: Path) -> None:
    line = train("optim.lr=1e38", "optim.clip_norm=0", "optim.warmup_ratio=0", "checkpoint.every=1", expect=5)
    assert "--rewind" in line and "--allow-change optim.lr" in line
    assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 0


def test_spikes_are_skipped_and_a_resumed_run_knows_the_last_losses(train: Maxi, home: Path, tmp_path: Path) -> None:
    on = ("optim.spike_zscore=0.5", "optim.spike_window=2", "optim.lr=3.0", "optim.clip_norm=0")
    out = train(*on)
    skipped = [line["step"] for line in small.lines(tmp_path / "run") if line.get("train/spike")]
    assert skipped and all(step > 2 for step in skipped) and f"warning: step {skipped[0]} changed nothing, its loss" in out
    fresh = small.configure(home, tmp_path / "fresh")
    words = ["train", str(fresh), "checkpoint.keep=9", *on]
    faults.arm("records.flushed:2:term")
    assert main(words) == 75 and main(words) == 0
    shutil.rmtree(tmp_path / "fresh/run/checkpoints/5")
    small.assert_same_run(tmp_path / "fresh/run", tmp_path / "run")
    assert any(name.startswith("spikes") for name in small.arrays(tmp_path / "run", 8))


def test_a_run_that_learns_nothing_is_told_so(train: Maxi) -> None:
    out = train("optim.lr=0", "steps=2")
    assert out.count("warning at step 1: the first step changed no weight") == 1
