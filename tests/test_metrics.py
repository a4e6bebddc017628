"""Records of a run: what lands in which file, when it gives up, and what trackers are told."""

import errno
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maxi.errors import EnvironmentFault, NumericsError
from maxi.metrics import GIVE_UP_AFTER, Recorder
from maxi.run import truncate_after
from maxi.sections import LogConfig

METRICS = {"train/loss": 2.0, "train/tokens": 64.0, "train/skipped": 0.0, "optim/lr": 1e-3, "optim/grad_norm": 1.0}


def recorder(folder: Path, mfu: Any = None, total: int = 10, watch: Any = lambda _: [], **log: Any) -> Recorder:
    return Recorder(folder, LogConfig(**log), {"seed": 0}, 0, total, mfu, lambda: 2**31, watch)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_nth_step_and_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorder(tmp_path, every=4, mfu=lambda tokens_per_s: tokens_per_s / 1e9) as records:
        for step in range(1, 11):
            records.step(step, METRICS | {"train/loss": 10.0 - step}, 0.0)
        records.flush()
        assert [(line["step"], line["train/loss"]) for line in lines(tmp_path / "metrics.jsonl")] == [
            (4, 6.0),
            (8, 2.0),
            (10, 0.0),
        ]
    perf = lines(tmp_path / "perf.jsonl")
    assert all(line["perf/tokens_per_s"] > 0 and line["perf/memory_gib"] == 2 and line["perf/mfu"] > 0 for line in perf)
    assert "step 4/10  loss 6.0000" in capsys.readouterr().out


def test_metrics_hold_nothing_that_depends_on_the_machine(tmp_path: Path) -> None:
    with recorder(tmp_path, every=1) as records:
        records.step(1, METRICS, 0.5)
        records.evaluation(1, {"loss": 3.0, "bits_per_byte": None}, [{"prompt": "a", "text": "b", "stopped": 1.0}])
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, **METRICS}, {"step": 1, "eval/loss": 3.0}]
    assert lines(tmp_path / "samples.jsonl") == [{"step": 1, "prompt": "a", "text": "b", "stopped": 1.0}]


def test_warnings_are_shown_with_their_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorder(tmp_path, watch=lambda metrics: ["too hot"] if metrics["train/loss"] > 5 else []) as records:
        for step in range(1, 11):
            records.step(step, METRICS | {"train/loss": float(step == 3) * 9}, 0.0)
    assert capsys.readouterr().out.count("warning at step 3: too hot") == 1


def test_a_terminal_on_a_full_disk_is_no_reason_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise fault

    with recorder(tmp_path, every=1) as records:
        monkeypatch.setattr(records._screen._console, "print", refuse)
        fault: OSError = OSError(errno.ENOSPC, "No space left on device")
        records.step(1, METRICS, 0.0)
        records.flush()
        assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, **METRICS}]
        fault = BrokenPipeError()  # nobody reads any more, as behind `| head`
        with pytest.raises(BrokenPipeError):
            records.say("hello")


def test_gives_up_after_several_steps_that_are_not_finite(tmp_path: Path) -> None:
    bad = METRICS | {"train/skipped": 1.0, "train/loss": float("nan")}
    with recorder(tmp_path, every=1, total=100) as records:
        for step in range(1, GIVE_UP_AFTER):
            records.step(step, bad, 0.0)
        records.step(GIVE_UP_AFTER, METRICS, 0.0)  # one good step begins the count anew
        with pytest.raises(NumericsError, match=f"{GIVE_UP_AFTER} times in a row"):
            for step in range(GIVE_UP_AFTER + 1, 3 * GIVE_UP_AFTER):
                records.step(step, bad, 0.0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["train/loss"] == "nan"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = SimpleNamespace(
        init=lambda **about: calls.append(about),
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("end"),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    with recorder(tmp_path / ".", every=1, to=(name,), project="p") as records:
        records.step(1, METRICS, 0.0)
        records.drain()
    assert calls[0] == {"project": "p", "name": tmp_path.name, "config": {"seed": 0}}
    assert calls[1][0] == 1 and calls[1][1]["train/loss"] == 2.0 and calls[-1] == "end"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentFault, match=rf"{name} is not installed.*maxi\[{name}\]"):
        recorder(tmp_path, to=(name,))


def test_records_of_steps_that_are_lost_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    truncate_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate_after(tmp_path / "none.jsonl", 2)
