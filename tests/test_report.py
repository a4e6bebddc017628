"""The report: one file that asks for nothing, what a model wrote stays text, and every refusal is one line."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from maxi.__main__ import main
from maxi.config import from_tree, to_yaml
from maxi.report import SAMPLES_SHOWN, report

HOSTILE = "</td></table><script>alert('x')</script><img src=x onerror=\"y\"> &lt; \x1b[31m人工智能"
VOID = {"meta", "br", "img", "input", "link", "hr"}


def write_run(folder: Path, steps: int = 4, seed: int = 0, more: dict[str, float] | None = None) -> Path:
    """A run folder as training leaves it, killed in the middle of a line."""
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {"run_dir": "r", "steps": 10, "seed": seed, "tokenizer": "t", "model": {"config": {"a": 1}}}
    config = from_tree(settings | {"data": {"train": [{"path": "a.txt"}, {"path": "b.txt", "weight": 2.0}]}}, "test")
    (folder / "config.yaml").write_text(to_yaml(config), "utf-8")
    facts = {"fingerprints": {"data": "0123abcd"}, "versions": {"maxi": "9.8.7"}, "data": ["train: <b>7</b> documents"]}
    (folder / "run.json").write_text(json.dumps(facts))
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "perf.jsonl").open("w") as perf:
        metrics.write(json.dumps({"step": 0, "eval/loss": 8.5, "eval/bits_per_byte": 3.25}) + "\n")
        for step in range(1, steps + 1):
            values = {"train/loss": 8.0 - 6 * step / steps, "train/skipped": 0.0} | (more or {})
            metrics.write(json.dumps({"step": step} | values) + "\n")
            perf.write(json.dumps({"step": step, "perf/step_s": 30.0}) + "\n")
        metrics.write(json.dumps({"step": steps, "eval/loss": 2.125, "eval/bits_per_byte": 0.75}) + "\n" + '{"step": 99, "tr')
    return folder


def write_samples(run: Path, *samples: dict[str, Any]) -> None:
    (run / "samples.jsonl").write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), "utf-8")


class Page(HTMLParser):
    """The page as a browser reads it: its tags, closed in order, its texts and the cells of its tables."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        self.text += data

    def charts(self) -> dict[str, str]:
        """Title -> <svg>, each well-formed by itself."""
        found = dict(re.findall(r'<figure role=img aria-label="([^"]*)">(<svg.*?</svg>)', self.source, re.DOTALL))
        for svg in found.values():
            ElementTree.fromstring(svg)
        return found


def test_the_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", more={"rewards/chosen": 1.0, "rewards/rejected": -1.0})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    fields = {"model_type": "qwen2", "vocab_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True, **sizes}
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text(json.dumps(fields))
    assert report([run]) == run / "report.html"
    page = Page(run / "report.html")
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "xlink:href")]
    assert addresses and all(str(address).startswith("#") for address in addresses)
    assert not re.search(r"url\((?!#)|@import", page.source)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {str(address)[1:] for address in addresses} <= set(ids)
    parameters = 96 * 32 + (32 * 32 + 32) + 2 * (32 * 16 + 16) + 32 * 32 + 3 * 32 * 48 + 3 * 32
    for words in (
        "4 of 10 steps",
        f"{parameters:,} parameters",
        "8.5000 → 2.1250",
        "0.7500 bits per byte",
        "2 min in training",
    ):
        assert words in page.text, words
    assert list(page.charts()) == [
        *("Training loss", "Held-out loss", "Held-out bits per byte", "Rewards"),
        "Seconds per step, and of them waiting for data",
    ]
    assert ["fingerprints data", "0123abcd"] in page.rows and ["data", "train: <b>7</b> documents"] in page.rows
    assert "path: b.txt" in page.text
    pictures = sorted(path.name for path in (run / "report_files").iterdir())
    assert pictures == ["eval_bits_per_byte.png", "eval_loss.png", "perf_step_s.png", "rewards_chosen.png", "train_loss.png"]
    assert all((run / "report_files" / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for name in pictures)


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("a", "b"):
        report([run], tmp_path / name / "r.html", png=tmp_path / name / "curves")
    one, other = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in ("a", "b"))
    assert one == other and Path("curves/train_loss.png") in one


def test_what_a_model_wrote_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<i>run", more={"</svg><script>": 1.0, "\ud800": 2.0})
    scores = {"stopped": True, "repeated_4grams": 0.123456}
    write_samples(run, *({"step": step, "prompt": HOSTILE, "text": f"\n {step}{HOSTILE}", **scores} for step in (4, 0)))
    page = Page(report([run]))
    assert not {"script", "img", "i", "b"} & {tag for tag, _ in page.tags}
    shown = HOSTILE.replace("\x1b", "␛")
    assert [row for row in page.rows if row[-2:] == ["true", "0.1235"]] == [
        [str(step), f"\n {step}{shown}", "true", "0.1235"] for step in (0, 4)
    ]
    assert shown in page.text and "<i>run" in page.text and "</svg><script>" in page.text


def test_many_samples_are_thinned(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_samples(run, *({"step": step, "prompt": "p", "text": f"t{step}"} for step in range(1001)))
    page = Page(report([run]))
    texts = [row[1] for row in page.rows if row[1:2] and row[1].startswith("t") and row[1][1:].isdigit()]
    assert len(texts) == SAMPLES_SHOWN and texts[0] == "t0" and texts[-1] == "t1000"
    assert f"{SAMPLES_SHOWN} of 1,001 are shown" in page.text


def test_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one name, and somebody's numbers, which take part in charts alone."""
    monkeypatch.chdir(tmp_path)
    for folder, seed in (("a/x/run", 3), ("a/y/run", 4)):
        write_samples(write_run(Path(folder), seed=seed), {"step": 4, "prompt": "p", "text": f"of {seed}"})
    Path("theirs.csv").write_text("# arXiv:0000.00000, table 1\nstep,train/loss\n2,7.5\n8,4\n")
    assert main(["report", "a/x/run", "a/y/run", "a/x/../x/run", "theirs.csv"]) == 0
    page = Page(Path("report.html"))
    loss, held_out = page.charts()["Training loss"], page.charts()["Held-out loss"]
    assert all(f"> {name}</text>" in loss for name in ("x/run", "y/run", "theirs.csv")) and "theirs.csv" not in held_out
    assert "stroke-dasharray" in loss and "stroke-dasharray" not in held_out
    assert ["key", "x/run", "y/run"] in page.rows and ["seed", "3", "4"] in page.rows
    assert not [row for row in page.rows if row[0] in ("steps", "data.train.1.path")]
    assert [row for row in page.rows if row[0] == "4"] == [["4", "x/run", "of 3"], ["4", "y/run", "of 4"]]
    assert "arXiv:0000.00000, table 1" in page.text and Path("report_files/train_loss.png").is_file()


def test_a_long_run_is_a_small_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=100_000)
    page = Page(report([run]))
    assert len(page.source) < 500_000 and "100,000 steps" in page.text


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["nowhere"], 4, "there is no such file or folder (nowhere)"),
        (["empty"], 4, "neither a run folder nor a .csv or .jsonl file (empty)"),
        (["run/config.yaml"], 4, "neither a run folder nor"),
        (["run", "young"], 4, "this run has no metrics yet (young)"),
        (["run", "bad.csv"], 3, "(bad.csv:2)"),
        (["header.csv"], 3, "there are no numbers in it (header.csv)"),
        (["damaged"], 3, "this line is not a JSON object (damaged/metrics.jsonl:1)"),
        (["run", "--out", "empty"], 2, "--out is a folder (empty)"),
        (["run", "--out", "run/lock/report.html"], 2, "a file where a folder should be (run/lock"),
    ],
)
def test_refusals_are_one_line(
    argv: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("run", "young", "damaged"):
        write_run(Path(name))
    Path("run/lock").touch()
    Path("young/metrics.jsonl").write_text('{"step": 0}\n{"st')
    Path("young/perf.jsonl").unlink()
    Path("damaged/metrics.jsonl").write_text('{"step": 0, "a": 1\n{"step": 1, "a": 1}\n')
    Path("bad.csv").write_text("step,train/loss\n1,2,3\n")
    Path("header.csv").write_text("step,train/loss\n")
    assert main(["report", *argv]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"maxi: error[{code}] ") and words in err, err
    assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob("*.png"))


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert main(["report", str(write_run(tmp_path / "run"))]) == 6
    assert 'pip install "maxi[report]"' in capsys.readouterr().err
