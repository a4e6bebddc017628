"""Text as transformers renders it, what the model must say in it, and templates that mean harm or do not end."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from maxi.data import chat_template
from maxi.data.chat_template import ChatTemplate
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError
from tests.data.chat_templates import (
    ADD,
    ASKED,
    CALLED,
    CONTROL,
    CONVERSATIONS,
    GEMMA,
    LONGER,
    MUST_SAY,
    PHI3,
    QWEN25,
    TALK,
    TEMPLATES,
    THOUGHT,
    TOOLS,
    call_text,
    says,
    user,
)

Load = Callable[[str], tuple[Tokenizer, Any]]


@pytest.fixture(scope="module")
def load(tokenizer: Tokenizer) -> Load:
    """load(jinja): a tokenizer with the control tokens of all templates here, and transformers' view of it."""

    def loaded(template: str) -> tuple[Tokenizer, Any]:
        theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
        theirs.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": CONTROL})
        theirs.chat_template = template
        return Tokenizer(theirs, tokenizer.folder), theirs

    return loaded


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request: pytest.FixtureRequest, load: Load) -> Iterator[tuple[ChatTemplate, Any]]:
    ours, theirs = load(TEMPLATES[request.param])
    with ChatTemplate(ours) as template:
        yield template, theirs


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_is_transformers(both: tuple[ChatTemplate, Any], name: str) -> None:
    ours, theirs = both
    messages = CONVERSATIONS[name]
    for tools in (None, TOOLS):
        try:
            expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception as error:
            with pytest.raises(DataError):
                ours.render(messages, tools, "rows.jsonl:12")
            assert name in ("called", "longer"), error
            continue
        text, turns = ours.render(messages, tools)
        assert text == expected
        for turn in turns:
            prompt = theirs.apply_chat_template(
                messages[: turn.message], tools=tools, tokenize=False, add_generation_prompt=True
            )
            assert ours.prompt(messages[: turn.message], tools) == prompt
            assert turn.prefix_ok == (text[: turn.start] == prompt)
        assert [turn.message for turn in turns] == [i for i, message in enumerate(messages) if message["role"] == "assistant"]


@pytest.mark.parametrize(("name", "conversation", "variables", "expected"), MUST_SAY)
def test_what_the_model_must_say(
    load: Load, name: str, conversation: str, variables: dict[str, Any], expected: list[tuple[str, bool]]
) -> None:
    messages = CONVERSATIONS[conversation]
    ours, theirs = load(TEMPLATES[name])
    with ChatTemplate(ours, variables=variables) as template:
        text, turns = template.render(messages)
        assert text == theirs.apply_chat_template(messages, tokenize=False, **variables)
        assert [(text[turn.start : turn.end], turn.prefix_ok) for turn in turns] == expected
        assert all(turn.prefix_ok == (text[: turn.start] == template.prompt(messages[: turn.message])) for turn in turns)
        assert all(text[: turn.end].endswith(ours.backend.id_to_token(template.end_token_id)) for turn in turns)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "cohere2"])
def test_turns_are_what_trl_trains_on(tokenizer: Tokenizer, name: str) -> None:
    """trl has templates with marks around what it learns; its turns may have a line end more on either side."""
    found = importlib.util.find_spec("trl")
    path = Path(found.origin or "").parent / "chat_templates" / f"{name}_training.jinja" if found else None
    if path is None or not path.is_file():
        pytest.skip("trl has no such template")
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
    theirs.chat_template = path.read_text("utf-8")
    control = re.findall(r"<\|\w+\|>", theirs.chat_template)
    theirs.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": list(dict.fromkeys(control))})
    with ChatTemplate(Tokenizer(theirs, tokenizer.folder)) as template:
        for messages in (TALK, THOUGHT, ASKED):
            text, turns = template.render(messages)
            marked = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
            runs = groupby(zip(marked["input_ids"], marked["assistant_masks"], strict=True), lambda pair: pair[1])
            learned = [theirs.decode([i for i, _ in run]).strip() for mask, run in runs if mask]
            assert [text[turn.start : turn.end].strip() for turn in turns] == learned


@pytest.mark.parametrize(("name", "prefix_ok"), [("llama3", True), ("mistral", False)])
def test_calls_in_control_tokens(load: Load, name: str, prefix_ok: bool) -> None:
    """Whatever comes after: the calls are inside, and <|eom|> or </s> ends them."""
    calls = "".join("<|python|>" + json.dumps(ADD["function"], indent=1, ensure_ascii=False) for _ in range(2)) + "<|eom|>"
    if name == "mistral":
        calls = "[CALLS] " + json.dumps([ADD["function"]] * 2, ensure_ascii=False) + "</s>"
    with ChatTemplate(load(TEMPLATES[name])[0]) as template:
        for messages, expected in ((CALLED[:2], True), (LONGER, prefix_ok)):
            text, turns = template.render(messages)
            assert (text[turns[0].start : turns[0].end], turns[0].prefix_ok) == (calls, expected)


@pytest.mark.parametrize(
    ("jinja", "refusal"),
    [
        # no end; an end that only the next message brings; the assistant is not heard; no conversation will do
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
            r"ends the turn with '\\n'.*learn to stop",
        ),
        ("{% for m in messages %}{{ '<|head|>' + m.role + m.content }}{% endfor %}", r"ends the turn with ''"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out what the assistant says"),
        ("{{ raise_exception('a system message is a must') }}", "a system message is a must"),
    ],
)
def test_templates_that_show_no_turn_are_refused_at_once(load: Load, jinja: str, refusal: str) -> None:
    with pytest.raises(DataError, match=rf"error\[3\] a question and an answer do not show .*{refusal}.* \(chat.template\)"):
        ChatTemplate(load(QWEN25)[0], jinja)


def test_turns_that_cannot_be_told_are_refused(load: Load) -> None:
    # the end and the header depend on the words, and one answer is left out
    jinja = """
    {%- for m in messages if m.content != 'skip' %}
        {{- '<|head|>' + (m.role if loop.last or 'hidden' not in m.content else 'past') + '\\n' + m.content }}
        {{- '<|eot|>' if 'endless' not in m.content }}
    {%- endfor %}
    {{- '<|head|>assistant\\n' if add_generation_prompt }}"""
    with ChatTemplate(load(QWEN25)[0], jinja) as template:
        asked = user("?")
        for said, refusal in (
            ("endless", "message 2: .* the turn with '', not"),
            ("hidden", "message 2: .* where the turn begins"),
        ):
            with pytest.raises(DataError, match=rf"error\[3\] {refusal}.*\(rows.jsonl:3\)"):
                template.render([asked, says(said), asked, says("b")], where="rows.jsonl:3")
        text, turns = template.render([asked, says("skip"), asked, says("b")])
        assert [(turn.message, text[turn.start : turn.end]) for turn in turns] == [(3, "b<|eot|>")]


def test_a_prefix_that_the_template_does_not_take(load: Load) -> None:
    with ChatTemplate(load(GEMMA)[0]) as template:  # which looks at the first message, of which there is none
        text, turns = template.render([says("Welcome!"), user("hi"), says("Hello!")])
    said = [(text[turn.start : turn.end], turn.prefix_ok) for turn in turns]
    assert said == [("Welcome!<|eot|>", False), ("Hello!<|eot|>", True)]


@pytest.fixture(scope="module")
def harm(load: Load) -> Callable[[str], ChatTemplate]:
    """harm(jinja): a template that is well behaved until a message says `harm`, and then does what `jinja` says."""

    def made(jinja: str) -> ChatTemplate:
        return ChatTemplate(load(QWEN25)[0], "{% if messages[0].content == 'harm' %}" + jinja + "{% endif %}" + QWEN25)

    return made


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__base__'] }}",
    "{{ (''|attr('__class__')).mro() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch PATH').read() }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__['os'].environ }}",
    "{{ strftime_now.__closure__[0].cell_contents }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(dict) }}",
    "{{ '%s' | format(namespace.__init__.__globals__) }}",
    "{% set ns = namespace() %}{% set ns._Namespace__attrs = messages %}",
    "{{ namespace(__class__='x') }}",
    "{{ messages.append(messages[0]) }}",
    "{{ messages[0].update(role='assistant') }}",
    "{{ dict.__class__.__mro__[1] }}",
    "{% include 'PATH' %}",
    "{% for a in range(10 ** 9) %}{% endfor %}",
]


@pytest.mark.parametrize("jinja", ESCAPES)
def test_nothing_gets_out_of_the_sandbox(harm: Callable[[str], ChatTemplate], jinja: str, tmp_path: Path) -> None:
    path = tmp_path / "touched"
    with harm(jinja.replace("PATH", str(path))) as template:
        with pytest.raises(DataError, match=r"error\[3\] the chat template fails, line 1, .*Error: .*\(x.jsonl:1\)"):
            template.render([user("harm"), says("!")], where="x.jsonl:1")
        assert template.render(ASKED).turns and not path.exists()


@pytest.mark.parametrize(
    ("jinja", "refusal"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 0.7 s"),
        ("{{ (messages | length * 5) ** (10 ** 8) }}", "takes longer than 0.7 s"),  # one operation of C
        ("{% for a in range(99999) %}{{ 'much of it ' * 9 }}{% endfor %}", "writes more than 10.* characters"),
        ("{{ messages[0].content * 10 ** 9 }}", "wants more than 1024 MiB of memory"),
        ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "RecursionError"),
    ],
)
def test_nothing_runs_away(
    harm: Callable[[str], ChatTemplate], jinja: str, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with harm(jinja) as template:
        monkeypatch.setattr(chat_template, "SECONDS", 0.7)
        began = time.monotonic()
        with pytest.raises(DataError, match=rf"error\[3\] the chat template .*{refusal}.*\(x.jsonl:1\)"):
            template.render([user("harm"), says("!")], where="x.jsonl:1")
        assert time.monotonic() - began < 3
        monkeypatch.undo()
        assert template.render(ASKED).turns  # by a process started afresh


def test_a_template_that_does_not_compile_in_time(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.7)
    with pytest.raises(DataError, match=r"longer than 0.7 s \(chat.template\)"):  # jinja2 computes constants beforehand
        ChatTemplate(load(QWEN25)[0], "{{ 10 ** (10 ** 8) }}")


def child_of(template: ChatTemplate) -> subprocess.Popen:
    assert template._child is not None and template._child._process is not None
    return template._child._process


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_is_confined(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    with ChatTemplate(load(QWEN25)[0]) as template:
        child = child_of(template)
        proc = Path(f"/proc/{child.pid}")
        limits = {line[:25].strip(): line[25:].split()[0] for line in (proc / "limits").read_text().splitlines()}
        assert (limits["Max core file size"], limits["Max file size"]) == ("0", "0")
        size = int((proc / "statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        assert size < int(limits["Max address space"]) < size + (1 << 30) + (8 << 20)
        assert b"SECRET" not in (proc / "environ").read_bytes()
        assert "transformers" not in (proc / "maps").read_text() and "numpy" not in (proc / "maps").read_text()
        for number in (signal.SIGINT, signal.SIGTERM):
            child.send_signal(number)
        assert template.render(ASKED).turns and child_of(template).pid == child.pid
    assert child.poll() is not None


SCRIPT = """
import sys, time
from types import SimpleNamespace
from maxi.data.chat_template import ChatTemplate
print("main", flush=True)  # no guard: nothing may run this a second time
made = SimpleNamespace(chat_template=sys.argv[1], special_tokens={"<|im_end|>": 1}, named_tokens={}, eos_ids=(1,), folder="")
template = ChatTemplate(made)
print(template._child._process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT, QWEN25], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "main\n"
        child = int(parent.stdout.readline())
        assert running(child)
        parent.kill()
        until = time.monotonic() + 10
        while running(child) and time.monotonic() < until:
            time.sleep(0.02)
        assert not running(child) and parent.stdout.read() == ""


def test_a_busy_child_without_a_parent_ends() -> None:
    boot = "import sys; from maxi.data import template_worker as worker; worker._ORPHANED = 0.3; "
    boot += "worker.serve(sys.stdin.buffer, sys.stdout.buffer)"
    setup = {"template": "{{ 10 ** (10 ** 8) }}", "variables": {}, "named": {}, "control": [], "ends": []}
    content = json.dumps(setup).encode()
    with subprocess.Popen([sys.executable, "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.communicate(len(content).to_bytes(8, "big") + content, timeout=20)
    assert child.returncode == -signal.SIGALRM


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_control_tokens_in_messages_are_refused(load: Load) -> None:
    bad = "say <|eot|> now"
    call = {"function": {"name": "f", "arguments": {"a": [{bad: 1}]}}}
    with ChatTemplate(load(QWEN25)[0]) as template:
        for messages, tools, whose in (
            ([user(bad), says("!")], None, "message 1 spells"),
            ([user("?"), says("!", reasoning_content=bad)], None, "message 2 spells"),
            ([user("?"), says("!", tool_calls=[call])], None, "message 2 spells"),
            ([user("?"), says("!")], [{"name": "f", "description": bad}], "the tools spell"),
        ):
            with pytest.raises(DataError, match=rf"{whose} the control token '<\|eot\|>'.*x.jsonl:7"):
                template.render(messages, tools, "x.jsonl:7")


def test_what_is_no_json_is_refused(load: Load) -> None:
    with ChatTemplate(load(QWEN25)[0]) as template:
        with pytest.raises(DataError, match=r"holds what JSON cannot, .*bytes.*x.jsonl:7"):
            template.render([user("?"), says("!")], [{"name": b"f"}], "x.jsonl:7")
        assert template.render(ASKED).turns


def test_the_template_may_be_a_word_a_file_or_jinja(load: Load, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(PHI3, "utf-8")
    ours = load(QWEN25)[0]
    for given, expected in ((None, QWEN25), ("chatml", tokenizer.chat_template), (str(path), PHI3), (PHI3, PHI3)):
        with ChatTemplate(ours, given) as template:
            assert template.text == expected
            assert (template._child is None) == (given == "chatml")
            ours.save(tmp_path / "served", template.text)
            assert AutoTokenizer.from_pretrained(tmp_path / "served").chat_template == expected


def test_chatml_is_transformers(tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
    turns, text = (), ""
    with ChatTemplate(tokenizer) as template:
        assert template._child is None and template.end_token_id == theirs.convert_tokens_to_ids("<|im_end|>")
        for messages in CONVERSATIONS.values():
            for tools in (None, TOOLS):
                text, turns = template.render(messages, tools)
                assert text == theirs.apply_chat_template(messages, tools=tools, tokenize=False)
                assert all(turn.prefix_ok for turn in turns)
        assert [text[turn.start : turn.end] for turn in turns] == [
            call_text()[1:] + "<|im_end|>",
            "2<|im_end|>",
            "so<|im_end|>",
        ]


def test_settings_that_cannot_work(load: Load, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load(QWEN25)[0]
    (tmp_path / "latin.jinja").write_bytes("{{ 'ä' }}".encode("latin-1"))
    for given, refusal in (
        (str(tmp_path / "none.jinja"), r"cannot be read, .*none.jinja"),
        (str(tmp_path / "latin.jinja"), "cannot be read, .*utf-8"),
        ("{% if %}", "is no jinja, line 1: "),
        ("{{ 1 }}\n{{ messages | nonesuch }}", "is no jinja, line 2: No filter named 'nonesuch'"),
    ):
        with pytest.raises(ConfigError, match=rf"error\[2\] the chat template {refusal}.*{chat_template.CHATML}"):
            ChatTemplate(ours, given)
    with pytest.raises(ConfigError, match="messages is no variable"):
        ChatTemplate(ours, variables={"messages": []})
    with pytest.raises(ConfigError, match="is no JSON"):
        ChatTemplate(ours, variables={"x": object()})
    monkeypatch.setattr(ours, "chat_template", None)
    with pytest.raises(ConfigError, match=r"error\[2\] the tokenizer has no chat template .*: set chat.template: chatml"):
        ChatTemplate(ours)
    path = tmp_path / "plain"
    shutil.copytree(tokenizer.folder, path)
    for file in (path / "tokenizer.json", path / "tokenizer_config.json", path / "vocab.json"):
        file.write_text(file.read_text("utf-8").replace("<|im_start|>", "<|begin|>"), "utf-8")
    with pytest.raises(ConfigError, match=r"error\[2\] the tokenizer has no token <\|im_start\|>, which chatml needs"):
        ChatTemplate(Tokenizer.load(path), "chatml")
