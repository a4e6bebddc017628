"""`maxi check` from its command: what it prints, writes and answers, for every objective; and that it only looks."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import pytest

from maxi.__main__ import main
from maxi.data import bpe
from maxi.data.chat_template import ChatTemplate

END = "<|im_end|>"
HOSTILE = "a <script>alert('b')</script> & \x1b[31mred <tool_call>"  # the last is one token
TALKS = [
    {"messages": [{"role": "user", "content": "the sea?"}, {"role": "assistant", "content": "calm\n\nand dark"}]},
    {"question": HOSTILE, "answer": HOSTILE},
    {"question": "the bread?", "answer": "home " * 150},
    {"question": "the wind?", "answer": "rain"},
    {
        "question": "half?",
        "messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c", "loss_weight": 0.5}],
    },
]
PAIRS = [{"prompt": f"{word}?", "chosen": f"the {word}", "rejected": "no"} for word in ("sea", "rain", "wind")]
LABELS = [{"prompt": "the sea?", "completion": word, "label": word == "calm"} for word in ("calm", "no", "dark")]
TEXTS = [{"text": f"the sea was calm {n}"} for n in range(30)]
ROWS = {"pretrain": TEXTS, "sft": TALKS, "dpo": PAIRS, "kto": LABELS}

Check = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a config.json, and no weights."""
    folder = tmp_path_factory.mktemp("check") / "model"
    bpe.train(["the sea was calm and the rain was dark over home and bread in the wind " * 20], 300, folder)
    fields = {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps({**fields, **heads, "vocab_size": 300}))
    return folder


@pytest.fixture
def check(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """check(objective, *arguments, rows=): exit code, stdout and stderr; the rows are in rows.jsonl."""

    def run(objective: str, *arguments: str, rows: list[dict[str, Any]] | None = None) -> tuple[int, str, str]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[objective]))
        config = {"run_dir": str(tmp_path / "run"), "steps": 1, "batch_size": 1, "seq_len": 128, "objective": objective}
        config |= {
            "model": {"init_from": str(model)},
            "data": {"train": [{"path": str(path)}], "cache_dir": str(tmp_path / "cache")},
        }
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        code = main(["check", str(tmp_path / "config.yaml"), *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


class Page(HTMLParser):
    """The texts of a page: each as (heading, [(words, class)])."""

    def __init__(self, page: Path):
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[tuple[str, list[tuple[str, str]]]] = []
        self._open, self._kind = "", ""
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._open, self._kind = tag, str(dict(attrs).get("class", ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag != "span" else "pre"

    def handle_data(self, data: str) -> None:
        if self._open == "h3":
            self.texts.append((data, []))
        elif self._open == "span":
            self.texts[-1][1].append((data, self._kind))

    def words(self, number: int, *kinds: str) -> str:
        """What stands in a text in these classes, in any without them."""
        return "".join(words for words, kind in self.texts[number][1] if kind in kinds or not kinds)


def test_what_is_learned_is_marked_where_there_are_no_colours(check: Check, tmp_path: Path) -> None:
    code, out, err = check("sft", "--rows", "5")
    assert (code, err) == (0, "")
    assert f"<|im_start|>user↵\nthe sea?{END}↵\n<|im_start|>assistant↵\n⟦calm↵\n↵\nand dark{END}⟧↵\n" in out
    assert "\x1b" not in out and "\\x1b[31mred" in out and out.count("⟦") == out.count("⟧") == 5
    assert [line for line in out.splitlines() if line.startswith(str(tmp_path / "rows.jsonl:"))] == [
        f"{tmp_path}/rows.jsonl:{line}" for line in range(1, 6)
    ]
    assert check("sft")[1].count("⟦") == 2


def test_the_verdict(check: Check) -> None:
    """Figures of all rows, under the file's name; rows that are dropped with their reason."""
    _, out, _ = check("sft", "chat.max_dropped=0")
    lines = out[out.rindex("and dark") :].splitlines()
    verdict = [line for line in lines if line.startswith("rows.jsonl: ")]
    (fill,) = re.findall(r"rows, ([\d.]+%) of them real tokens", out)
    assert verdict == [
        "rows.jsonl: answer tokens trained: 100.00%",
        "rows.jsonl: end token trained: 4 of 4 answers",
        "rows.jsonl: text before the answer as it will be served: 4 of 4",
        f"rows.jsonl: real tokens in rows: {fill}",
        "rows.jsonl: rows dropped, over seq_len: 1, such as rows.jsonl:3",
        "rows.jsonl: the mask is right",
    ]


def test_files_of_one_name_are_told_apart(check: Check, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "rows.jsonl"
    other.write_text(json.dumps(TALKS[0]))
    _, out, _ = check("sft", f"data.eval=[{{path: {other}}}]", "data.eval_share=0.3")
    assert {line.split(": ")[0] for line in out.splitlines() if line.endswith("the mask is right")} == {
        str(tmp_path / "rows.jsonl"),
        str(other),
    }


@pytest.mark.parametrize(
    ("objective", "learned"),
    [
        ("pretrain", [f" sea was calm {n}<|endoftext|>" for n in range(4)]),
        ("sft", [f"calm\n\nand dark{END}"]),
        ("dpo", [f"the sea{END}", f"no{END}"]),
        ("kto", [f"calm{END}"]),
    ],
)
def test_every_objective(check: Check, objective: str, learned: list[str], tmp_path: Path) -> None:
    code, out, err = check(objective, "--rows", "1")
    assert (code, err) == (0, "") and "rows.jsonl: real tokens in rows: " in out
    shown = [text.replace("↵\n", "\n") for text in re.findall("⟦(.*?)⟧", out, re.DOTALL)]
    page = Page(tmp_path / "run" / "check.html")
    if objective == "pretrain":
        assert shown[:4] == learned and page.words(0, "t").startswith("".join(learned))
        return
    assert shown == learned
    assert [page.words(number, "t") for number in range(len(learned))] == learned
    if objective == "dpo":
        assert [heading.removeprefix(f"{tmp_path}/") for heading, _ in page.texts[:3]] == [
            "rows.jsonl:1, chosen",
            "rows.jsonl:1, rejected",
            "rows.jsonl:2, chosen",
        ]


def test_the_page_shows_words_and_runs_nothing(check: Check, tmp_path: Path) -> None:
    assert f"page: {tmp_path}/shown.html" in check("sft", "--html", str(tmp_path / "shown.html"))[1]
    page = Page(tmp_path / "shown.html")
    shown = HOSTILE.replace("\x1b", "\\x1b")
    assert not {"script", "tool_call"} & page.tags and len(page.texts) == 5
    assert page.words(1) == f"<|im_start|>user\n{shown}{END}\n<|im_start|>assistant\n{shown}{END}\n"
    assert page.words(1, "t") == f"{shown}{END}" and page.words(4, "w") == f"c{END}" and not page.words(4, "t")


def test_json(check: Check, tmp_path: Path) -> None:
    code, out, err = check("sft", "--json", "-")
    report = json.loads(out)
    assert (code, err) == (0, "") and (report["objective"], report["seq_len"]) == ("sft", 128)
    (source,) = report["sources"]
    assert (source["path"], source["side"], source["items"]) == (str(tmp_path / "rows.jsonl"), "train", 4)
    assert source["answer_tokens_trained"] == 1 and source["wrong"] is None and 0 < source["real_tokens"] <= 1
    assert source["counts"]["dropped"] == {"dropped_too_long": [f"{tmp_path}/rows.jsonl:3"]}
    assert "the mask is right" in check("sft", "--json", str(tmp_path / "out" / "figures.json"))[1]
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == report


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
@pytest.mark.parametrize("arguments", [(), ("--json", "-")], ids=str)
def test_a_wrong_mask_is_shown_and_refused(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, arguments: tuple[str, ...]
) -> None:
    render = ChatTemplate.render

    def late(self: ChatTemplate, *more: Any) -> Any:
        """Every answer is learned from its second half on."""
        text, turns = rendered = render(self, *more)
        said = [text[turn.start : turn.end - len(END)] for turn in turns]
        late = [turn._replace(start=turn.start + len(words) // 2) for turn, words in zip(turns, said, strict=True)]
        return rendered._replace(turns=tuple(late))

    monkeypatch.setattr(ChatTemplate, "render", late)
    code, out, err = check(objective, *arguments)
    assert code == 3 and err.count("\n") == 1
    assert re.match(rf"maxi: error\[3\] the mask is wrong, .* not trained \({tmp_path}/rows.jsonl:1\): set chat.template", err)
    if arguments:
        assert "not trained" in json.loads(out)["sources"][0]["wrong"]
    else:
        assert re.search(r"rows.jsonl: WRONG: .* answer tokens are not trained, such as in rows.jsonl:1", out)
        assert (tmp_path / "run" / "check.html").is_file()


def test_nothing_is_compiled_and_training_finds_the_cache(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's folder has no weights, so none can be read."""
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
    assert check("dpo")[0] == 0
    assert not [event for event in events if "compile" in event]
    jax.jit(lambda x: x * 3.5)(1.0)
    assert [event for event in events if "compile" in event]  # so it would have been heard
    assert "(from the cache)" in check("dpo")[1]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["check.html"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "⟦" not in (coloured := check("dpo")[1]) and "\x1b[" in coloured


def test_a_page_that_cannot_be_written(check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = check("sft", "--html", str(tmp_path / "file" / "check.html"))
    assert code == 2 and err.count("\n") == 1 and "cannot write check.html" in err
