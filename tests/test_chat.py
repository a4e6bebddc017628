"""A chat says what its conversation makes a model say; commands, interrupts and a full context leave it whole."""

import io
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from maxi import __main__ as cli
from maxi import chat as terminal
from maxi import hf, runtime
from maxi.chat import Chat, run_chat, run_generate
from maxi.data import bpe
from maxi.data.chat_template import ChatTemplate
from maxi.errors import ConfigError
from maxi.generation import complete, conversation, open_chat, unstacked, visible
from maxi.hf import Loaded
from maxi.models.sampling import Sampling
from tests import tiny

HELD = 160
"""The model's max_position_embeddings."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("talker") / "model"
    tokenizer = bpe.train(["the cat sat on the mat and the dog sat on the log " * 20], bpe.MIN_VOCAB + 10, folder)
    fields = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id, "max_position_embeddings": HELD}
    tiny.save(folder, "qwen3", num_hidden_layers=2, head_dim=8, **fields)
    return unstacked(hf.load_hf(folder))


@pytest.fixture(scope="module")
def template(loaded: Loaded) -> Iterator[ChatTemplate]:
    with open_chat(loaded) as opened:
        yield opened


@pytest.fixture(autouse=True)
def opened(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model as `open_model` would find it, but with its compiled steps."""
    monkeypatch.setattr(terminal, "open_model", lambda _: loaded)
    monkeypatch.setattr(terminal, "unstacked", lambda same: same)


def talk(loaded: Loaded, lines: str, system: str | None = None, **settings: Any) -> str:
    out = io.StringIO()
    run_chat(loaded.folder, Sampling(**settings), system=system, source=io.StringIO(lines), out=out)
    return out.getvalue()


def said(loaded: Loaded, template: ChatTemplate, messages: Sequence[dict[str, Any]], **settings: Any) -> str:
    return complete(loaded, [messages], Sampling(**settings), chat=template)[0].text


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_answers_follow_the_conversation(loaded: Loaded, template: ChatTemplate) -> None:
    """Whole, blank lines and all; the first answer is part of what the second is an answer to."""
    system = {"role": "system", "content": "bark"}
    first = said(loaded, template, [system, *conversation("the cat")], max_new_tokens=10)
    second = said(loaded, template, [system, *turn("the cat", first), *conversation("again")], max_new_tokens=10)
    cut = "--- cut at 10 tokens\n"
    shown = talk(loaded, "the cat\n\n   again", system="bark", max_new_tokens=10)
    assert shown == f"{visible(first)}\n{cut}{visible(second)}\n{cut}"
    assert first != second


def test_reset_and_system_start_anew(loaded: Loaded, template: ChatTemplate) -> None:
    how: dict[str, Any] = {"max_new_tokens": 6}
    plain = said(loaded, template, conversation("the cat"), **how)
    barking = said(loaded, template, conversation("the cat", system="bark loudly"), **how)
    shown = talk(loaded, "the cat\n/reset\nthe cat\n/system bark loudly\nthe cat\n/reset\nthe cat\n/system\nthe cat\n", **how)
    answers = [line for line in shown.split("--- cut at 6 tokens\n") if line]
    notes = ("", "--- forgotten\n", "--- forgotten; instructed anew\n", "--- forgotten\n", "--- forgotten; no instruction\n")
    expected = zip(notes, (plain, plain, barking, barking, plain), strict=True)
    assert answers == [f"{note}{visible(answer)}\n" for note, answer in expected]
    assert plain != barking


def test_help_quit_and_what_is_no_command(loaded: Loaded) -> None:
    shown = talk(loaded, "/help\n/frob \x1b[31m\n/quit\nthe cat\n")
    assert shown == terminal.HELP + "--- there is no command /frob; /help lists them\n"


def test_the_same_lines_give_the_same_answers_and_another_try_others(loaded: Loaded) -> None:
    how: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0}
    shown = talk(loaded, "the cat\n/reset\nthe cat\n", seed=3, **how)
    assert shown == talk(loaded, "the cat\n/reset\nthe cat\n", seed=3, **how)
    first, second = shown.split("--- forgotten\n")
    assert first != second


class Interrupting(io.StringIO):
    """Presses Ctrl-C, or sends another signal, when `pieces` pieces have been written."""

    def __init__(self, pieces: int, number: signal.Signals = signal.SIGINT):
        super().__init__()
        self.left, self.number = pieces, number

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)
        return super().write(text)


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(loaded: Loaded, template: ChatTemplate) -> None:
    how: dict[str, Any] = {"max_new_tokens": 40}
    whole = said(loaded, template, conversation("the cat"), **how)
    out = Interrupting(3)
    run_chat(loaded.folder, Sampling(**how), source=io.StringIO("the cat\nagain\n"), out=out)
    first, rest = out.getvalue().split("\n", 1)
    assert visible(whole).startswith(first) and 0 < len(first) < len(visible(whole))
    kept = next(whole[:end] for end in range(len(whole)) if visible(whole[:end]) == first)
    again = said(loaded, template, [*turn("the cat", kept), *conversation("again")], **how)
    assert rest == f"{visible(again)}\n--- cut at 40 tokens\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_request_to_terminate_is_passed_on(loaded: Loaded) -> None:
    """It ends the answer first, then does what it would have done at once."""
    out, got = Interrupting(2, signal.SIGTERM), []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append(out.getvalue()))
    try:
        run_chat(loaded.folder, Sampling(max_new_tokens=40), source=io.StringIO("the cat\n"), out=out)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [out.getvalue()] and out.getvalue().endswith("\n") and "cut" not in out.getvalue()


class Typed(io.StringIO):
    """A terminal, of which only `input` reads."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("leaving", [EOFError, KeyboardInterrupt])
def test_at_a_terminal(leaving: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["", "/reset"])

    def typed(prompt: str) -> str:
        assert prompt == "> "
        if (line := next(lines, None)) is None:
            raise leaving
        return line

    monkeypatch.setattr("builtins.input", typed)
    out = io.StringIO()
    run_chat("some/model", Sampling(), source=Typed(), out=out)
    assert out.getvalue() == "--- some/model; /help lists the commands\n--- forgotten\n\n"


def test_the_oldest_turns_go_when_there_is_no_room(loaded: Loaded, template: ChatTemplate) -> None:
    """What is sent is always the instruction and whole turns, as many of the newest as fit beside an answer."""
    chat = Chat(loaded, template, Sampling(max_new_tokens=30), system="bark")
    theirs = AutoTokenizer.from_pretrained(loaded.folder)

    def size(questions: list[list[dict[str, Any]]]) -> int:
        messages = [{"role": "system", "content": "bark"}, *(message for one in questions for message in one)]
        return len(theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    all_turns: list[list[dict[str, Any]]] = []
    dropped = 0
    for number in range(8):
        dropped += chat.ask(f"the cat {number}")
        all_turns.append(conversation(f"the cat {number}"))
        assert chat.turns == all_turns[dropped:]
        assert size(chat.turns) <= HELD - 30
        assert not dropped or size(all_turns[dropped - 1 :]) > HELD - 30
        text = "".join(chat.answer(lambda: False))
        all_turns[-1].append({"role": "assistant", "content": text})
    assert dropped >= 2
    shown = talk(loaded, "".join(f"the cat {number}\n" for number in range(8)), system="bark", max_new_tokens=30)
    assert shown.count("--- forgotten to make room: the 1 oldest of ") >= 2


@pytest.mark.parametrize(
    ("message", "note"),
    [("x y " * 100, f"and there is room for {HELD - 20}"), ("<|im_end|>", "<|im_end|>")],
    ids=["too long", "a control token"],
)
def test_a_message_that_cannot_be_sent(loaded: Loaded, template: ChatTemplate, message: str, note: str) -> None:
    """It is taken back, and the conversation goes on without it."""
    answer = said(loaded, template, conversation("the cat"), max_new_tokens=20)
    after = said(loaded, template, [*turn("the cat", answer), *conversation("on")], max_new_tokens=20)
    shown = talk(loaded, f"the cat\n{message}\non\n", max_new_tokens=20)
    (line,) = (line for line in shown.splitlines() if line.startswith("--- not sent: "))
    assert note in line
    assert shown.endswith(f"{visible(after)}\n--- cut at 20 tokens\n")


def test_answers_leave_room_for_a_question(loaded: Loaded) -> None:
    shown = talk(loaded, "the cat\n", max_new_tokens=512)
    assert shown.startswith(f"--- answers end at {HELD // 2} tokens, half of the {HELD} that the model was made for\n")
    assert shown.endswith(f"--- cut at {HELD // 2} tokens\n")


def test_without_a_chat_template(loaded: Loaded, tmp_path: Path) -> None:
    assert loaded.tokenizer is not None
    loaded.tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    with pytest.raises(ConfigError, match="chat template"):
        open_chat(Loaded(loaded.model, loaded.params, tmp_path))


def test_generate(loaded: Loaded) -> None:
    how = Sampling(max_new_tokens=8)
    out, several = io.StringIO(), io.StringIO()
    run_generate(loaded.folder, ["the cat"], how, out=out)
    assert out.getvalue() == visible("the cat" + complete(loaded, ["the cat"], how)[0].text) + "\n"
    run_generate(loaded.folder, ["the cat", "a\x1b[31m\tb"], how, out=several)
    assert several.getvalue().startswith(f"--- 1 of 2\n{out.getvalue()}--- 2 of 2\na\\x1b[31m\tb")
    assert not any(ord(c) < 32 and c not in "\n\t" for c in several.getvalue())


def test_generate_answers(loaded: Loaded, template: ChatTemplate) -> None:
    out, several = io.StringIO(), io.StringIO()
    answer = said(loaded, template, conversation("the cat", "bark"), max_new_tokens=8)
    run_generate(loaded.folder, ["the cat"], Sampling(max_new_tokens=8), chat=True, system="bark", out=out)
    assert out.getvalue() == f"> the cat\n{visible(answer)}\n"
    run_generate(loaded.folder, ["the cat", "dog"], Sampling(max_new_tokens=8), chat=True, system="bark", out=several)
    assert several.getvalue().startswith(f"--- 1 of 2\n{out.getvalue()}--- 2 of 2\n> dog\n")
    with pytest.raises(ConfigError, match="--system needs --chat"):
        run_generate(loaded.folder, ["the cat"], Sampling(), system="bark", out=out)


def test_the_command(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes that are not UTF-8 come as U+FFFD; the end of the input is a good end."""
    monkeypatch.setattr(runtime, "set_up", lambda *_, **__: None)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    assert cli.main(["chat", str(loaded.folder), "--max-new-tokens", "4", "--temperature", "0", "--system", "bark"]) == 0
    assert capsys.readouterr().out == talk(loaded, "caf\ufffd\n", system="bark", max_new_tokens=4)
