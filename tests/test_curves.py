"""Curves: numbers read from records and tables as they are, thinned without losing a spike, smoothed as numpy would."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxi import curves
from maxi.curves import Curves, Series, charts_of, read_csv, read_jsonl, running_mean, thinned
from maxi.errors import DataError

CONFIGS = Path(__file__).parent.parent / "configs"


def test_records_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not finite, an evaluation between two steps, a remark, and a last line that a kill cut short."""
    monkeypatch.setattr(curves, "_READ_AT_ONCE", 40)  # several stretches
    path = tmp_path / "metrics.jsonl"
    rows: list[dict[str, Any]] = [
        {"step": 10, "train/loss": 3.5, "optim/lr": 1e-3},
        {"step": 20, "train/loss": "nan", "optim/lr": 2e-3, "note": "后"},
        {"step": 20, "eval/loss": 3.25},
        {"step": 30, "train/loss": "-inf", "optim/lr": 10**400},
    ]
    path.write_bytes(
        "\n".join([*(json.dumps(row, ensure_ascii=False) for row in rows), '{"step": 40, "note": "后'])[:-1].encode()
    )
    series = read_jsonl(path)
    assert series["train/loss"].steps.tolist() == [10, 20, 30] and series["eval/loss"].values.tolist() == [3.25]
    np.testing.assert_array_equal(series["train/loss"].values, [3.5, np.nan, -np.inf])
    np.testing.assert_array_equal(series["optim/lr"].values, [1e-3, 2e-3, np.nan])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.jsonl", '{"step": 1, "a": 1}\n{"step": 2, "a"\n{"step": 3, "a": 1}\n', "not a JSON object (m.jsonl:2)"),
        ("m.jsonl", '{"step": 1, "a": 1}\n\n[1, 2]\n', "not a JSON object (m.jsonl:3)"),
        ("m.jsonl", '{"step": 1, "a": 1}\n{"a": 2}\n', "no step (m.jsonl:2)"),
        ("m.jsonl", '{"step": "soon", "a": 1}\n', "no step (m.jsonl:1)"),
        ("m.csv", "# a remark\nepoch,train/loss\n1,2\n", "needs a column step, and no name twice (m.csv:2)"),
        ("m.csv", "step,a,a\n1,2,3\n", "needs a column step, and no name twice (m.csv:1)"),
        ("m.csv", "step,a\n1,2\n\n2,3,4\n", "3 cells under a header of 2 (m.csv:4)"),
        ("m.csv", "step,a\n1,two\n", "could not convert string to float: 'two' (m.csv:2)"),
        ("m.csv", "step,a\n,2\n", "not a number"),
        ("m.csv", "step,a\nnan,2\n", "the step is not finite (m.csv:2)"),
        ("m.csv", 'step,a\n1,"2\n', "malformed csv"),
        ("m.csv", b"step,a\n1,\xff\n", "not UTF-8 (m.csv:2)"),
        ("m.csv", "", "needs a column step"),
    ],
)
def test_malformed_lines_are_named(name: str, text: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=re.escape(words)):
        read_csv(Path(name)) if name == "m.csv" else read_jsonl(Path(name))


def test_a_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufeff# from a paper\nstep, "train/loss",eval/loss\r\n\n20,2.5,\n10,1e1,nan\n', "utf-8")
    series = read_csv(path)
    assert series["train/loss"].steps.tolist() == [10, 20] and series["train/loss"].values.tolist() == [10, 2.5]
    np.testing.assert_array_equal(series["eval/loss"].values, [np.nan])


def test_the_published_losses_are_those_that_the_config_quotes() -> None:
    header = (CONFIGS / "mini_qwen_1b_pretrain.yaml").read_text("utf-8")
    quoted = re.search(r"loss (\S+) at step (\d+), (\S+) at step (\d+), (\S+) at the end", header)
    steps = re.search(r"^steps: (\d+)", header, re.M)
    assert quoted and steps
    loss = read_csv(CONFIGS / "mini_qwen_1b_pretrain.losses.csv")["train/loss"]
    assert list(zip(*loss, strict=True)) == [
        (float(quoted[2]), float(quoted[1])),
        (float(quoted[4]), float(quoted[3])),
        (float(steps[1]), float(quoted[5])),
    ]


def test_no_spike_is_lost() -> None:
    values = np.random.default_rng(0).normal(size=100_003)
    values[[7, 50_000, 100_002]] = 90, -80, 70
    values[60_000:60_100] = np.nan
    kept = thinned(Series(np.arange(len(values)), values))
    assert len(kept.steps) <= 2 * curves.STRETCHES and (np.diff(kept.steps) > 0).all()
    assert {(7.0, 90.0), (50_000.0, -80.0), (100_002.0, 70.0)} <= set(zip(*kept, strict=True))
    np.testing.assert_array_equal(values[kept.steps.astype(int)], kept.values)


def test_running_mean_is_numpys() -> None:
    """A window of 2 x (1000 // 50 // 2) + 1 points; a value that is not finite counts as none."""
    values = np.random.default_rng(0).normal(size=1000)
    values[500] = np.nan
    mean = running_mean(Series(np.arange(1000) * 10, values))
    for step, value in zip(*mean, strict=True):
        if 100 <= step < 9900:
            np.testing.assert_allclose(value, np.nanmean(values[int(step) // 10 - 10 : int(step) // 10 + 11]), rtol=1e-12)
    ramp = running_mean(Series(np.arange(1000), -np.arange(1000.0)))  # as steep at its ends as a loss at its first steps
    assert abs(ramp.values[0]) <= 2 and abs(ramp.values[-1] + 999) <= 2


def test_every_metric_has_its_chart() -> None:
    def series(*values: float) -> Series:
        return Series(np.arange(len(values)), np.array(values))

    names = ["train/loss", "rewards/rejected", "rewards/chosen", "eval/stopped", "kl", "eval/loss/code", "eval/loss/math"]
    run = Curves("a", {name: series(1, 2) for name in names} | {"train/skipped": series(0, 0), "note": series(np.nan)})
    charts = [chart.names for chart in charts_of([run])]
    assert charts == [
        ("train/loss",),
        ("rewards/chosen", "rewards/rejected"),
        ("eval/stopped",),
        ("eval/loss/code", "eval/loss/math"),
        ("kl",),
    ]
    skipped = Curves("b", {"train/skipped": series(0, 1)})
    assert [chart.names for chart in charts_of([run, skipped])][-3] == ("train/skipped",)
