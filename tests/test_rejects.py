"""What maxi refuses, from the command line and in one process: paths, settings and folders that are missing, of the wrong kind,
damaged or made to do harm. Each ends within five seconds in one line on stderr with the right code, and nothing else.

Elsewhere: what is wrong with rows and templates (`test_faults_data.py`), with the weights of a model folder
(`test_hf_faults.py`), with settings one by one (`test_config.py`), and random inputs (`test_fuzz.py`).
"""

import errno
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maxi import runtime
from maxi import train as training
from maxi.__main__ import main
from maxi.data import bpe, tokenizer_trial
from maxi.errors import DataError, Preempted, escaped
from tests import small, tiny

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config that trains, what it needs, and one of each kind of thing that is no use."""
    here = tmp_path_factory.mktemp("rejects")
    bpe.train([f"{small.SENTENCE} " * 20], 300, here / "tok")
    tiny.save(here / "model", "qwen3", vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(here / "tok" / name, here / "model" / name)
    (here / "text.txt").write_text(f"{small.SENTENCE}\n" * 50)
    (here / "empty").touch()
    (here / "garbage").write_bytes(bytes(range(256)) * 40)
    (here / "dir").mkdir()
    os.mkfifo(here / "fifo")
    (here / "loop").symlink_to("loop")
    config = {"steps": 1, "batch_size": 8, "seq_len": 16, "model": {"config": small.SIZES}, "tokenizer": str(here / "tok")}
    data = {"train": [{"path": str(here / "text.txt")}], "cache_dir": str(here / "cache")}
    (here / "c.yaml").write_text(json.dumps({**config, "run_dir": str(here / "run"), "data": data}))
    return here


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this process is set up for training."""
    monkeypatch.setattr(runtime, "set_up", lambda *_, **__: None)
    monkeypatch.setattr(training, "set_up", lambda *_, **__: None)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """refused(argv, code, says=, where=): the error line, after looking at it."""

    def of(argv: list[Any], code: int, *says: str) -> str:
        began = time.monotonic()
        found = main([str(part) for part in argv])
        seconds = time.monotonic() - began
        err = capfd.readouterr().err
        assert found == code and seconds < 5, (found, seconds, err)
        return one_line(err, code, *says)

    return of


def one_line(err: str, code: int, *says: str) -> str:
    assert err.startswith(f"maxi: error[{code}] ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and escaped(err) == err and len(err) < 2000, err
    assert code != 1  # nothing here is unforeseen
    for text in says:
        assert text in err, (text, err)
    return err


# --- paths ---

READS = {
    "config": (2, "config {}"),
    "train": (2, "train {}"),
    "check": (2, "check {}"),
    "quickstart": (2, "quickstart {}"),
    "bench step": (2, "bench step {}"),
    "eval": (4, "eval {} --prompt a"),
    "generate": (4, "generate {} --prompt a"),
    "chat": (4, "chat {}"),
    "export": (4, "export {} {out}"),
    "convert": (4, "convert {} {out}"),
    "report": (4, "report {}"),
    "tokenizer": (3, "tokenizer {} --vocab-size 300 --out {out}"),
    "eval --data": (3, "eval {model} --data {}"),
    "eval --prompts": (3, "eval {model} --prompts {}"),
    "tokenizer:": (4, "train {c} tokenizer={}"),
    "model.init_from": (4, "train {c} tokenizer=null model.init_from={}"),
    "model.config": (4, "train {c} model.config={}"),
    "model.reference": (4, "train {c} objective=dpo model.reference={}"),
    "data.train": (3, "train {c} data.train.0.path={}"),
    "chat.template": (2, "train {c} objective=sft chat.template={}"),
}
"""Everything that names something to read, and the code when it is none."""

NOT_THERE = ("none", "empty", "garbage", "dir", "fifo", "loop", "empty/x")
DEVICES = ("/dev/zero", "/dev/null")
NO_PATHS = {"": "empty", "a\0b": "NUL", "a" * 300: "name too long", "~nobody-here/x": "no home folder", "a\udcff": "not UTF-8"}


@pytest.mark.parametrize("what", [*NOT_THERE, *DEVICES])
@pytest.mark.parametrize("command", READS)
def test_what_cannot_be_read(command: str, what: str, here: Path, tmp_path: Path, refused: Refused) -> None:
    code, line = READS[command]
    path = what if what in DEVICES else str(here / what)
    if what == "loop":
        code = 2  # no file can be called so
    elif (command, what) in (("chat.template", "empty"), ("chat.template", "/dev/null")):
        code = 3 if what == "empty" else 2  # a template that says nothing
    argv = [part.format(path, c=here / "c.yaml", model=here / "model", out=tmp_path / "out") for part in line.split()]
    refused(argv, code)
    assert not (tmp_path / "out").exists() and not (here / "run" / "checkpoints").exists()


@pytest.mark.parametrize("what", NO_PATHS)
@pytest.mark.parametrize(
    "command", ["config", "report", "tokenizer", "eval --data", "model.config", "data.train", "model.init_from"]
)
def test_what_no_file_can_be_called(command: str, what: str, here: Path, tmp_path: Path, refused: Refused) -> None:
    path = json.dumps(what) if "=" in READS[command][1] else what
    argv = [
        part.format(path, c=here / "c.yaml", model=here / "model", out=tmp_path / "out") for part in READS[command][1].split()
    ]
    refused(argv, 2, NO_PATHS[what])


WRITES = {
    "run_dir": "train {c} run_dir={}",
    "data.cache_dir": "train {c} data.cache_dir={}",
    "convert": "convert {model} {}",
    "convert --force": "convert {model} {} --force",
    "tokenizer": "tokenizer {text} --vocab-size 280 --out {}",
    "tokenizer --force": "tokenizer {text} --vocab-size 280 --out {} --force",
    "report --out": "report {model} --out {}",
}


@pytest.mark.parametrize("what", ["garbage", "garbage/x", "loop", "fifo", "precious"])
@pytest.mark.parametrize("command", WRITES)
def test_what_is_never_written_over(command: str, what: str, here: Path, tmp_path: Path) -> None:
    """A file where a folder should be, below a file, a pipe; and a folder that is not maxi's, whatever is forced."""
    shutil.copytree(here / "dir", tmp_path / "precious")
    (tmp_path / "precious" / "letter").write_text("dear")
    if what == "precious" and command in ("run_dir", "data.cache_dir", "report --out"):
        pytest.skip("files of other names are left alone there")
    path = tmp_path / what if what == "precious" else here / what
    argv = [p.format(path, c=here / "c.yaml", model=here / "model", text=here / "text.txt") for p in WRITES[command].split()]
    found = main(argv)
    assert found in (2, 4, 6)
    assert (tmp_path / "precious" / "letter").read_text() == "dear" and (here / "garbage").stat().st_size == 256 * 40


@pytest.mark.parametrize("command", ["config", "model.config", "data.train", "chat.template"])
@pytest.mark.parametrize("error", [errno.EACCES, errno.ENOENT])
def test_what_cannot_be_opened(
    command: str, error: int, here: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No right to read it; gone between being listed and being opened."""
    code, line = READS[command]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}')
    opened = os.open

    def fails(name: Any, *more: Any, **options: Any) -> int:
        if str(name) == str(path):
            raise OSError(error, os.strerror(error), str(name))
        return opened(name, *more, **options)

    monkeypatch.setattr(os, "open", fails)
    refused([part.format(path, c=here / "c.yaml") for part in line.split()], code, os.strerror(error))


# --- what others wrote, in our line ---


def test_nothing_in_an_error_line_steers_a_terminal(here: Path, tmp_path: Path, refused: Refused) -> None:
    odd = tmp_path / "a\n\x1b[31mred\u202e.jsonl"
    line = refused(["train", here / "c.yaml", f"data.train.0.path={json.dumps(str(odd))}"], 3, r"a \x1b[31mred\u202e.jsonl")
    assert "\x1b" not in line
    odd.write_bytes(b'{"\\u001b[2J\\n\\u2028":1}\n')
    refused(["train", here / "c.yaml", f"data.train.0.path={tmp_path}"], 3, r"only \x1b[2J", r"\x1b[31mred\u202e.jsonl:1")
    folder = tmp_path / "model"
    shutil.copytree(here / "model", folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"\x1b]0;owned\x07": 1}))
    refused(["convert", folder, tmp_path / "out"], 4, r"unsupported: \x1b]0;owned\x07")
    refused(["config", here / "c.yaml", "\x1b[31m.a=1"], 2, r"\x1b[31m")
    refused(["\x1b[31m"], 2, r"\x1b[31m")


def test_lines_of_others_are_bounded_and_travel() -> None:
    error = DataError("a" * 100_000, "b" * 100_000 + ":7", "\ud800 Ⅷ 👩‍👩")
    assert len(error.line()) < 1900 and ":7)" in error.line() and r"\ud800 Ⅷ 👩‍👩" in error.line()
    again = type(error)(*error.__reduce__()[1])
    assert again.line() == error.line() and again.code == 3


def test_log_lines_are_escaped_too(here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "\x1b[31mred.txt"
    shutil.copy(here / "text.txt", odd)
    main(["bench", "step", str(here / "c.yaml"), f"model.config.model_type={json.dumps('x')}"])  # sets logging up
    logging.getLogger("maxi").info("data: %s\nmore", odd)
    out = capfd.readouterr().out
    assert "\x1b" not in out and r"\x1b[31mred.txt" in out and "\nmore" in out


# --- settings ---


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: !!python/object/apply:os.system ['true']", "tags are not allowed"),
        ("!<tag:yaml.org,2002:python/name:os.system> a: 1", "tags are not allowed"),
        ("a: &x [1]\nb: [*x, *x]", "aliases are not allowed"),
        ("<<: {a: 1}\nsteps: 2", "unknown key"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("a: 1\n'a': 2", "'a' is given twice"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ("? [1, 2]\n: 3", ""),
        ("? {a: 1}\n: 3", ""),
        ("1: 2", "unknown key '1'"),
        ("null: 2", "unknown key"),
        ("steps: " + "9" * 5000, ""),
        ("steps: 1e999", "steps"),
        ("steps: 0x" + "f" * 6000, ""),
        ("steps: 1:30:00", "steps"),
        ("steps: 2026-01-01", "steps"),
        ("seed: .inf", "seed"),
        ("a: " + "[" * 33 + "]" * 33, "nested too deeply"),
        ("a: " + "{b: " * 33 + "1" + "}" * 33, "nested too deeply"),
        ("- " * 40 + "1", "nested too deeply"),
        ("a: 'x", "malformed YAML"),
        ("\ta: 1", "malformed YAML"),
        ("a: \x00", "malformed YAML"),
        ("%YAML 9.9\n---\na: 1", ""),
        ("%TAG ! tag:x,2026:\n---\na: !b 1", "tags are not allowed"),
        ("---\na: 1\n---\nb: 2", ""),
        ("steps: yes", "steps"),
        ("run_dir: 5", "run_dir"),
        ('run_dir: "a\\0b"', "NUL"),
        ("data: {train: [{path: x, weight: -1}]}", "weight"),
        ("data: {train: {path: x}}", "data.train"),
        ("data: {train: [[]]}", "data.train"),
        ("objective: [dpo]", "objective"),
        ("objective: {name: {a: 1}}", "objective"),
        ("model: {config: {vocab_size: .nan}}", ""),
        ("chat: {template_kwargs: {messages: 1}}", ""),
    ],
)
def test_settings(text: str, says: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "c.yaml").write_text(text)
    refused(["train", tmp_path / "c.yaml"], 2, *filter(None, [says]))


@pytest.mark.parametrize(
    "override",
    [
        *("a", "=", "=1", ".=1", "a.=1", ".a=1", "steps.x=1", "data.train.-1.path=x", "data.train.1e9.path=x"),
        *("data.train.٣.path=x", "data.train.²=x", "data.train.0=5", "data.train=5", "optim=5"),
        *("steps=!!python/name:os.system", "steps=&a 1", "steps={a: 1, a: 2}", "steps=" + "9" * 5000),
        *("steps=" + "[" * 5000, "steps='", "steps=\x00", "data.train." + "9" * 5000 + ".path=x"),
        *("steps=\ud800", "model.config={a: .nan}", "mesh.tensor=-2", "mesh.fsdp=3", "optim.lr=" + "1" * 400),
        *("seq_len=65", "model.config.num_key_value_heads=3", "model.config.vocab_size=1e9"),
        *("model.config.num_hidden_layers=1000000000", "model.config.rope_theta=" + "1" * 400),
        "a" * 100_000 + "=1",
    ],
)  # fmt: skip
def test_overrides(override: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["train", str(here / "c.yaml"), override])
    assert code in (2, 4)
    one_line(capfd.readouterr().err, code)


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["mesh.fsdp=3"], 2, "needs 3 devices but there are 8"),
        (["batch_size=9", "micro_batches=2"], 2, "batch_size 9 does not divide into 2 micro_batches"),
        (["batch_size=7", "mesh={replica: 8, fsdp: 1}"], 2, "batch_size 7 does not divide into 8"),
        (["mesh.tensor=8"], 2, "does not divide over tensor 8"),
        (["mesh.tensor=4", "model.config.num_attention_heads=4"], 2, "key/value heads 1 does not divide over tensor 4"),
        (["mesh.context=4", "seq_len=12"], 2, "seq_len 12 does not divide into 8"),
        (["seq_len=65"], 2, "seq_len 65 is over the model's max_position_embeddings 64"),
        (["model.config.num_attention_heads=3", "model.config.num_key_value_heads=2"], 2, "3 heads do not divide into 2"),
    ],
)
def test_sizes_that_do_not_fit(overrides: list[str], code: int, says: str, here: Path, refused: Refused) -> None:
    refused(["train", here / "c.yaml", *overrides], code, says)


# --- tokenizers ---


def with_tokenizer(here: Path, folder: Path, **files: Any) -> Path:
    """A copy of the tokenizer with other bytes, or with other fields, in its files; `__` stands for the dot."""
    shutil.copytree(here / "tok", folder)
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        old = json.loads(file.read_text()) if file.is_file() and isinstance(content, dict) else {}
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(old | content).encode())
    return folder


SPLIT = {"type": "Split", "pattern": {"Regex": "(?:x+x+)+y"}, "behavior": "Isolated", "invert": False}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 40}
NORMALIZERS = {"type": "Sequence", "normalizers": [REPLACE] * 4}
TOKENIZERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "an expression that backtracks": ({"tokenizer__json": {"pre_tokenizer": SPLIT}}, 4, "retry-limit-in-match"),
    "a text that multiplies": (
        {"tokenizer__json": {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 3}}},
        4,
        "characters become",
    ),
    "a panic": ({"tokenizer__json": {"pre_tokenizer": {"type": "FixedLength", "length": 0}}}, 4, "must be non-zero"),
    "no JSON": ({"tokenizer__json": b"\xff"}, 4, "the tokenizer cannot be used"),
    "nesting": ({"tokenizer__json": b'{"model":' * 100_000}, 4, "the tokenizer cannot be used"),
    "another program": (
        {"tokenizer_config__json": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}},
        4,
        "cannot load the tokenizer",
    ),
    "nested settings": ({"tokenizer_config__json": b"[" * 100_000}, 4, "cannot load the tokenizer"),
    "a token of another kind": ({"tokenizer_config__json": {"eos_token": {"a": 1}}}, 4, "cannot load the tokenizer"),
    "ends that are no ids": ({"generation_config__json": {"eos_token_id": ["x"]}}, 4, "generation_config.json is damaged"),
    "ends beyond all ids": ({"generation_config__json": {"eos_token_id": 10**30}}, 4, "generation_config.json is damaged"),
    "ids beyond the model": ({"tokenizer_config__json": {"eos_token": "a new one"}}, 2, "301 ids but the model 300"),
    "pickles": ({"tokenizer__model": b"\x80\x04cos\nsystem\n", "tokenizer__json": b""}, 4, "the tokenizer cannot be used"),
    "settings over 16 MB": ({"tokenizer_config__json": b" " * 16_000_001}, 4, "tokenizer_config.json is over 16 MB"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name: str, here: Path, tmp_path: Path, refused: Refused) -> None:
    files, code, says = TOKENIZERS[name]
    folder = with_tokenizer(here, tmp_path / "other", evil__py=b"open('ran', 'w')\nclass Evil: pass\n", **files)
    refused(["train", here / "c.yaml", f"tokenizer={folder}"], code, says)
    assert not Path("ran").exists() and "evil" not in sys.modules


def test_a_tokenizer_that_does_not_end(here: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 0.3)
    folder = with_tokenizer(here, tmp_path / "other", tokenizer__json={"normalizer": NORMALIZERS})
    refused(["train", here / "c.yaml", f"tokenizer={folder}"], 4, "takes longer than 0.3 s")


@pytest.mark.parametrize("name", ["merges.txt", "special_tokens_map.json", "chat_template.jinja", "tokenizer.json"])
def test_links_out_of_a_tokenizer_folder(name: str, here: Path, tmp_path: Path, refused: Refused) -> None:
    """They would come to stand, as copies, in what is exported."""
    folder = with_tokenizer(here, tmp_path / "other")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/etc/hostname")
    refused(["train", here / "c.yaml", f"tokenizer={folder}"], 4, f"{name} is a link out of the folder")


def test_a_text_that_a_tokenizer_fails_on(here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A trial cannot try every text: what fails later is said, with no traceback."""
    split = SPLIT | {"pattern": {"Regex": "(\U0001f600+)+$"}}
    own = {"tokenizer_class": "PreTrainedTokenizerFast"}  # of Qwen2's class transformers knows the expression itself
    files = {"tokenizer__json": {"pre_tokenizer": split}, "tokenizer_config__json": own}
    folder = with_tokenizer(here, tmp_path / "other", **files)
    (tmp_path / "text.txt").write_text("\U0001f600" * 40 + "b")
    code = main(["train", str(here / "c.yaml"), f"tokenizer={folder}", f"data.train.0.path={tmp_path}/text.txt"])
    err = capfd.readouterr().err  # Rust says on stderr that it panics, and we cannot keep it from that
    assert code == 3 and "Traceback" not in err
    one_line(err[err.index("maxi: ") :], 3, "the tokenizer fails on a text", "retry-limit-in-match")


def test_another_tokenizer_than_the_models(
    here: Path, tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ids would mean other words than those that the weights have learned."""
    bpe.train([f"{small.SENTENCE[::-1]} " * 20], 300, tmp_path / "other")
    stage = ["train", here / "c.yaml", "model.config=null", f"model.init_from={here / 'model'}", f"run_dir={tmp_path / 'run'}"]
    stage += [f"tokenizer={tmp_path / 'other'}"]
    refused(stage, 2, "is not the tokenizer of")

    def stop(*_: object) -> None:
        raise Preempted("here")

    monkeypatch.setattr(training, "_begin", stop)
    for more in ["--allow-change", "tokenizer"], []:  # what has begun so goes on so
        assert main(list(map(str, [*stage, *more]))) == 75
        assert "which --allow-change allows" in capfd.readouterr().out


def test_a_model_that_lacks_its_tokenizers_ids(here: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(here / "model", tmp_path / "model")
    bpe.train([f"{small.SENTENCE} " * 20], 301, tmp_path / "tok")
    shutil.copy(tmp_path / "tok" / "tokenizer.json", tmp_path / "model" / "tokenizer.json")
    refused(["generate", tmp_path / "model", "--prompt", "a"], 2, "the tokenizer has 301 ids but the model 300")


def test_a_padded_vocabulary_is_said(here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's models have more rows than its tokenizer has ids, for the sake of divisors."""

    def stop(*_: object) -> None:
        raise Preempted("here")

    monkeypatch.setattr(training, "_begin", stop)
    assert main(["train", str(here / "c.yaml"), "model.config.vocab_size=320", f"run_dir={here / 'padded'}"]) == 75
    assert "vocabulary 320 of which the tokenizer uses 300" in capfd.readouterr().out


# --- model folders ---


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": True},
        {"hidden_size": 1e3},
        {"vocab_size": -1},
        {"head_dim": [8]},
        {"head_dim": 2**70},
        {"rms_norm_eps": "1e-6"},
        {"rope_theta": 10**400},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": []}},
        {"rope_scaling": {"type": {"a": 1}}},
        {"layer_types": {"a": 1}},
        {"model_type": ["qwen3"]},
        {"model_type": {"a": 1}},
        {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
        {"tie_word_embeddings": "yes"},
        {"hidden_act": ["silu"]},
        {"max_position_embeddings": 10**18},
        {"quantization_config": {"quant_method": "fp8"}},
        {"sliding_window": "x", "use_sliding_window": True},
        {"attention_dropout": "\x1b[31m\n"},
        {"eos_token_id": [{"a": 1}]},
        {"eos_token_id": "</s>"},
    ],
)
def test_config_json(fields: dict[str, Any], here: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(here / "model", tmp_path / "model")
    tree = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(tree | fields))
    (tmp_path / "model" / "evil.py").write_text("open('ran', 'w')\nclass Evil: pass\n")
    refused(["convert", tmp_path / "model", tmp_path / "out"], 4)
    assert not (tmp_path / "out").exists() and not Path("ran").exists()


def test_foreign_code_is_never_asked_about(
    here: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks on stdin whether to run it, unless told."""

    def asked(*_: Any) -> str:
        raise AssertionError("somebody asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "stdin", None)
    shutil.copytree(here / "model", tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "config.json").read_text()) | {"auto_map": {"AutoConfig": "evil.Evil"}}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(here / "tok" / name, tmp_path / "model" / name)
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    for command in (["generate", tmp_path / "model", "--prompt", "a"], ["eval", tmp_path / "model", "--prompt", "a"]):
        refused(command, 4, "unsupported: auto_map")
