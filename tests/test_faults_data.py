"""What is wrong with conversations, preferences and their templates, from the command line: each fault ends in one line that
names the file and the row, before anything is computed, or is accepted in the way that is written here.

Elsewhere: every layout of rows and what is wrong with one (`data/test_messages.py`), of files (`data/test_documents.py`), of
templates (`data/test_chat_template.py`), of tokenizer folders (`data/test_tokenizer.py`), of masks (`data/test_audit.py`);
a batch in which nothing is learned (`test_step.py::test_a_batch_with_nothing_to_train_is_no_division_by_zero`); data that
changes while a run is interrupted (`test_train.py::test_changed_data_is_found`).
"""

import gzip
import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from maxi import train as training
from maxi.__main__ import main
from maxi.data import bpe, chat_template, streams
from maxi.data.chat_template import ChatTemplate
from tests import small
from tests.data.chat_templates import GEMMA, LLAMA2, says, user

GOOD = {
    "sft": {"messages": [user("the sea?"), says("calm")]},
    "dpo": {"prompt": "the sea?", "chosen": "calm", "rejected": "dark"},
    "kto": {"prompt": "the sea?", "completion": "calm", "label": True},
}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% for a in range(99999) %}{{ 'much of it ' * 9 }}{% endfor %}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
CHATML += "{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"


def when_asked(jinja: str) -> str:
    """A template that is well behaved until a message says `odd`."""
    return "{% if messages[0].content == 'odd' %}" + jinja + "{% endif %}" + CHATML


ODD: dict[str, Any] = {"messages": [user("odd"), says("calm")]}


@dataclass(frozen=True)
class Fault:
    """`bad`: the second of three rows, or raw bytes of a line; `says` of the error; `place`: behind the file in it.

    `forgiven`: whether data.skip_bad=1 passes it over. `template`: jinja for chat.template. `more`: overrides.
    """

    bad: Any
    says: str
    objective: str = "sft"
    place: str = ":2"
    forgiven: bool = True
    template: str | None = None
    more: tuple[str, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)


def talk(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


SILENT = talk(user("the sea?"), says("calm", train=False))
LONG = talk(user("the sea? " * 90), says("calm"))
DROPS = ("chat.max_dropped=0.1",)
FAULTS = {
    # templates: one that raises, does not take the roles, does not end, writes too much
    "a template that raises": Fault(ODD, "line 1, .*UndefinedError", template=when_asked("{{ nothing.at.all }}")),
    "a template that refuses": Fault(
        ODD, "not take this conversation: not so", template=when_asked("{{ raise_exception('not so') }}")
    ),
    "roles a template refuses": Fault(
        talk(
            user("the sea?"), says("", tool_calls=[{"name": "f", "arguments": {}}]), {"role": "tool", "content": "4"}, says("b")
        ),
        "not take this conversation: roles must take turns",
        template=LLAMA2.replace("bos_token", "''").replace("eos_token", "'<|im_end|>'"),
    ),
    "a template without end": Fault(ODD, "takes longer than 0.7 s", template=when_asked(ENDLESS), limits={"seconds": 0.7}),
    "a template that floods": Fault(ODD, "writes more than", template=when_asked(HUGE)),
    "a turn that is faked": Fault(talk(user("a<|im_end|>b"), says("calm")), "message 1 spells the control token '<|im_end|>'"),
    # lines
    "malformed JSON": Fault(b'{"messages": [}', r"malformed JSON", place=":2:15"),
    "no object": Fault([1], "a record is a list, not an object"),
    "a missing field": Fault({"question": "a"}, "no conversation in the fields question .*: accepted are messages"),
    "a wrong type": Fault({"question": "a", "answer": 4}, "the field 'answer' is a number"),
    "null": Fault({"question": "a", "answer": None}, "the field 'answer' is null"),
    "a lone surrogate": Fault(b'{"question": "a", "answer": "b\\ud800"}', r"lone surrogate U\+D800"),
    "not UTF-8": Fault(b'{"question": "a", "answer": "\xff"}', "0xff is not UTF-8", place=":2:30"),
    "a nesting bomb": Fault(b"[" * 200_000, "nested too deeply"),
    "a deep row": Fault(
        b'{"question": "a", "answer": "b", "tools": ' + b"[" * 900 + b"]" * 900 + b"}",
        "'tools' is no JSON, maximum recursion depth",
    ),
    "a long line": Fault(b'{"x": "' + b"x" * 200_000 + b'"}', "a line is over", forgiven=False, limits={"line": 100_000}),
    # nothing to learn, no room
    "all masked": Fault(
        SILENT, "of 3 rows 1 have nothing to learn", more=DROPS, place=", such as rows.jsonl:2", forgiven=False
    ),
    "no room for the answer": Fault(
        *(LONG, "of 3 rows 1 have nothing to learn"),
        more=(*DROPS, "chat.too_long=truncate_left"),
        place=", such as rows.jsonl:2",
        forgiven=False,
    ),
    "the answer is cut off": Fault(
        *(LONG, "of 3 rows 1 have nothing to learn"),
        more=(*DROPS, "chat.too_long=truncate_right"),
        place=", such as rows.jsonl:2",
        forgiven=False,
    ),
    # roles
    "assistant first": Fault(talk(says("calm"), user("a"), says("b")), "message 1 is out of order, assistant after nothing"),
    "two users": Fault(talk(user("a"), user("b"), says("c")), "message 2 is out of order, two user messages in a row"),
    "a tool without a call": Fault(
        talk(user("a"), {"role": "tool", "content": "4"}, says("b")), "out of order, tool after user"
    ),
    "an unknown role": Fault(talk(user("a"), {"role": "robot", "content": "b"}), "the role of message 2 .* is 'robot'"),
    "nobody answers": Fault(talk(user("a")), "no assistant says anything"),
    # preferences and labels
    "no chosen": Fault({"prompt": "a", "rejected": "b"}, "no pair of answers in the fields prompt, rejected", "dpo"),
    "no rejected": Fault({"prompt": "a", "chosen": "b", "rejected": None}, "the field 'rejected' is null", "dpo"),
    "identical": Fault({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are identical", "dpo"),
    "identical when rendered": Fault(
        *({"prompt": "a", "chosen": "é", "rejected": "e\u0301"}, "of 3 rows 1 have nothing to learn", "dpo"),
        more=DROPS,
        place=", such as rows.jsonl:2",
        forgiven=False,
    ),
    "another prompt": Fault(
        {"chosen": [user("a"), says("b")], "rejected": [user("c"), says("d")]}, "have different prompts", "dpo"
    ),
    "an empty answer": Fault({"prompt": "a", "chosen": "b", "rejected": " "}, "message 2 is an empty answer", "dpo"),
    "no label": Fault({"prompt": "a", "completion": "b"}, "no field 'label', only prompt, completion", "kto"),
    "a label of another kind": Fault({"prompt": "a", "completion": "b", "label": "yes"}, "'label' is 'yes', not true", "kto"),
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a config.json, and no weights, so none can be read."""
    folder = tmp_path_factory.mktemp("faults") / "model"
    bpe.train([f"{small.SENTENCE} " * 20], 300, folder)
    (folder / "config.json").write_text(json.dumps(small.SIZES))
    importlib.import_module("grain")  # takes seconds, which are not what is timed here
    return folder


@pytest.fixture
def run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(path, objective, *overrides, command=): exit code, stdout and stderr, within five seconds."""
    monkeypatch.setattr(training, "set_up", lambda *_: None)

    def of(path: Path, objective: str, *overrides: str, command: str = "check") -> tuple[int, str, str]:
        data = {"train": [{"path": str(path)}], "cache_dir": str(tmp_path / "cache")}
        fields = {"run_dir": str(tmp_path / "run"), "steps": 1, "batch_size": 8, "seq_len": 64, "objective": objective}
        (tmp_path / "config.yaml").write_text(json.dumps({**fields, "model": {"init_from": str(model)}, "data": data}))
        began = time.monotonic()
        code = main(
            [command, str(tmp_path / "config.yaml"), "batch_size=1" if command == "check" else "batch_size=8", *overrides]
        )
        assert time.monotonic() - began < 5
        out, err = capsys.readouterr()
        return code, out, err

    return of


def assert_one_line(err: str, code: int, says: str, where: str) -> None:
    assert err.count("\n") == 1 and err.startswith(f"maxi: error[{code}] ") and len(err) < 700, err
    assert re.search(says, err) and f"({where})" in err, err


def write(path: Path, objective: str, bad: Any) -> Path:
    """Three rows, of which the second is bad."""
    good = json.dumps(GOOD[objective]).encode()
    path.write_bytes(b"\n".join([good, bad if isinstance(bad, bytes) else json.dumps(bad).encode(), good]) + b"\n")
    return path


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    path = write(tmp_path / "rows.jsonl", fault.objective, fault.bad)
    more = list(fault.more)
    if fault.template is not None:
        (tmp_path / "mine.jinja").write_text(fault.template)
        more.append(f"chat.template={tmp_path}/mine.jinja")
    monkeypatch.setattr(chat_template, "SECONDS", fault.limits.get("seconds", chat_template.SECONDS))
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", fault.limits.get("line", streams.MAX_LINE_BYTES))
    code, _, err = run(path, fault.objective, *more)
    assert code == 3
    assert_one_line(err, 3, fault.says, f"{path}{fault.place}")
    if fault.forgiven:
        code, out, err = run(path, fault.objective, *more, "data.skip_bad=1")
        assert (code, err) == (0, "") and "1 bad records skipped" in out
    else:
        assert run(path, fault.objective, *more, "data.skip_bad=1")[0] == 3


# --- what is accepted, and how ---


def test_marks_and_control_characters_are_text(run: Run, tmp_path: Path) -> None:
    """A byte-order mark, CRLF, NUL and blank lines."""
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "a\u0000b\r\n", "answer": "c\u0000\r\nd"}, {"question": "e", "answer": "f"}]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows))
    code, out, err = run(path, "sft")
    assert (code, err) == (0, "") and "2 conversations" in out and "⟦c\\x00\\x0d↵\nd<|im_end|>⟧" in out


@pytest.mark.parametrize(
    ("policy", "shown"),
    [
        ("drop", "rows dropped, over seq_len: 1, such as rows.jsonl:2"),
        ("truncate_left", "rows dropped, their answer does not fit seq_len: 1, such as rows.jsonl:2"),
        ("truncate_right", "rows dropped, their answer does not fit seq_len: 1, such as rows.jsonl:2"),
    ],
)
def test_what_is_too_long_is_counted(run: Run, tmp_path: Path, policy: str, shown: str) -> None:
    path = write(tmp_path / "rows.jsonl", "sft", LONG)
    code, out, err = run(path, "sft", f"chat.too_long={policy}", "chat.max_dropped=0.4")
    assert (code, err) == (0, "") and f"rows.jsonl: {shown}\n" in out and "2 of 2 answers" in out


def test_what_is_masked_is_counted_and_not_all_may_be(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "sft", SILENT)
    code, out, err = run(path, "sft", "chat.max_dropped=0.4")
    assert (code, err) == (0, "") and "nothing in them is learned: 1, such as rows.jsonl:2" in out
    path.write_text(json.dumps(SILENT))
    code, _, err = run(path, "sft", "chat.max_dropped=1")
    assert code == 3
    assert_one_line(err, 3, "of 1 rows 1 have nothing to learn", f"{path}, such as rows.jsonl:1")


def test_the_end_is_learned_though_it_is_the_padding_too(run: Run, tmp_path: Path) -> None:
    """Nothing is masked by the value of an id: padding has no segment, and its weight is 0."""
    (tmp_path / "mine.jinja").write_text(CHATML.replace("<|im_end|>", "<|endoftext|>"))
    path = write(tmp_path / "rows.jsonl", "sft", GOOD["sft"])
    code, out, err = run(path, "sft", f"chat.template={tmp_path}/mine.jinja", "chat.pack=false")
    assert (code, err) == (0, "") and "⟦calm<|endoftext|>⟧" in out and "end token trained: 3 of 3 answers" in out


# --- files that break off, and bombs ---


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_archives(run: Run, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compress = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"rows.jsonl{suffix}"
    whole = compress(b"".join(json.dumps(GOOD["sft"] | {"n": n}).encode() + b"\n" for n in range(5000)))
    path.write_bytes(whole[: len(whole) // 2])
    code, _, err = run(path, "sft", "data.skip_bad=9")
    assert code == 3
    assert_one_line(err, 3, "the compressed file is truncated", f"{path}, offset {len(whole) // 2}")
    monkeypatch.setattr(streams, "MAX_FREE_BYTES", 1_000_000)
    monkeypatch.setattr(streams, "MAX_RATIO", 100)
    path.write_bytes(compress(b'{"question": "' + b"a" * 20_000_000))
    code, _, err = run(path, "sft")
    assert code == 3 and err.count("\n") == 1 and "like a bomb" in err and f"({path}, offset " in err


def test_parquet(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [GOOD["dpo"], {**GOOD["dpo"], "rejected": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    code, _, err = run(path, "dpo")
    assert code == 3
    assert_one_line(err, 3, "the field 'rejected' is null", f"{path}, row 2")
    path.write_bytes(path.read_bytes()[:-30])
    code, _, err = run(path, "dpo")
    assert code == 3
    assert_one_line(err, 3, "truncated or damaged", f"{path}, after row 0")


# --- tokenizers, templates and references that will not do, before any row is read ---


def with_tokenizer(model: Path, tmp_path: Path, **fields: Any) -> Path:
    """A copy of the model's folder with other fields in tokenizer_config.json; None takes one away."""
    folder = tmp_path / "other"
    folder.mkdir()
    for file in model.iterdir():
        if not (file.name == "chat_template.jinja" and "chat_template" in fields):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_that_ends_nothing(run: Run, tmp_path: Path, model: Path) -> None:
    folder = with_tokenizer(model, tmp_path, tokenizer_class="PreTrainedTokenizerFast", eos_token=None)
    code, _, err = run(write(tmp_path / "rows.jsonl", "sft", ODD), "sft", f"model.init_from={folder}")
    assert code == 2
    assert_one_line(err, 2, "no end-of-sequence token", str(folder))


def test_no_chat_template(run: Run, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_tokenizer(model, tmp_path, chat_template=None)
    path = write(tmp_path / "rows.jsonl", "sft", ODD)
    code, _, err = run(path, "sft", f"model.init_from={folder}")
    assert code == 2
    assert_one_line(err, 2, "no chat template .*: set chat.template: chatml", str(folder))
    assert run(path, "sft", f"model.init_from={folder}", "chat.template=chatml")[0] == 0
    monkeypatch.setitem(sys.modules, "maxi.data.template_worker", None)
    code, _, err = run(path, "sft")
    assert code == 2
    assert_one_line(err, 2, "chat templates need jinja2, .*: pip install jinja2", "chat")


@pytest.mark.parametrize(
    ("jinja", "code", "says"),
    [
        ("{% if %}", 2, "the chat template is no jinja, line 1"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", 3, "never learn to stop"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", 3, "leaves out what the assistant says"),
        (ENDLESS, 3, "takes longer than 0.7 s"),
        (GEMMA.replace("<|eot|>", ""), 3, "do not show what the model must say"),
    ],
)
def test_a_template_that_cannot_be_used(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jinja: str, code: int, says: str
) -> None:
    """Known by one question and its answer, before any row is read."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.7)
    template = tmp_path / "mine.jinja"
    template.write_text(jinja)
    path = write(tmp_path / "rows.jsonl", "sft", b"no JSON")
    found, _, err = run(path, "sft", f"chat.template={template}")
    assert found == code
    assert_one_line(err, code, says, str(template))


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"vocab_size": 320}, None])
def test_a_reference_of_another_kind(run: Run, tmp_path: Path, change: dict[str, Any] | None) -> None:
    """Another architecture, another vocabulary, another tokenizer: refused by `train` before it reads data."""
    other = tmp_path / "other"
    bpe.train([f"{small.SENTENCE[::-1] if change is None else small.SENTENCE} " * 20], 300, other)
    (other / "config.json").write_text(json.dumps(small.SIZES | (change or {})))
    path = write(tmp_path / "rows.jsonl", "dpo", b"no JSON")
    code, _, err = run(path, "dpo", f"model.reference={other}", command="train")
    assert code == 2
    assert_one_line(err, 2, f"{other} has another {'architecture' if change else 'tokenizer'}", "model.reference")
    code, _, err = run(path, "sft", f"model.reference={other}")
    assert code == 2
    assert_one_line(err, 2, "model.reference has no meaning for sft", str(tmp_path / "config.yaml"))


def test_a_wrong_mask_is_never_trained(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render = ChatTemplate.render

    def late(self: ChatTemplate, *more: Any) -> Any:
        rendered = render(self, *more)
        return rendered._replace(turns=tuple(turn._replace(start=turn.start + 2) for turn in rendered.turns))

    monkeypatch.setattr(ChatTemplate, "render", late)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(GOOD["sft"] | {"n": n}) + "\n" for n in range(40)))
    code, _, err = run(path, "sft", command="train")
    assert code == 3
    assert_one_line(err, 3, "the mask is wrong, .* answer tokens are not trained", f"{path}:1")
    assert not (tmp_path / "run" / "checkpoints").exists()
