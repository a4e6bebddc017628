"""Conversations to text, as a model's chat template writes them, and which parts of that text the model must say.

    with ChatTemplate(tokenizer) as template:
        text, turns = template.render(messages)

Guaranteed: the text is what transformers' `apply_chat_template` gives for the same messages, tools and variables. A turn
is all that the template writes for a message of the assistant (its thinking and its calls too), from the end of the
generation prompt to the end of the token that ends the turn; where the template has no generation prompt, the model
must say the header of its turn too. Turns come in order and do not overlap; a message that the template leaves out has
none. `{% generation %}` tags count for nothing: few templates have them, and those that have do not agree on whether
the end token is inside.

Refused with DataError, so that nothing wrong is ever learned: messages that spell a control token, which would fake a
turn; a turn that no control token ends; a turn whose place the template does not show; and what the template raises for.

Every template but maxi's own runs in a child process with bounded memory that writes no files (`template_worker.py`); it
is killed when a conversation takes longer than SECONDS, and started again for the next one. A template that writes the
date writes today's: pass it as a variable where that matters. What a conversation is stands in `messages.py`; ids and
masks are made of the turns in `examples.py`.
"""

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError, EnvironmentFault
from maxi.paths import read_file

CHATML = "chatml"
"""The word for maxi's own template."""
SECONDS = 2.0
"""How long one conversation may take to render."""
MAX_TEMPLATE_BYTES = 1 << 20
_START_SECONDS = 60.0

_BOOT = "import sys; sys.path += sys.argv[1:]; from maxi.data.template_worker import serve; "
_BOOT += "serve(sys.stdin.buffer, sys.stdout.buffer)"
_JSON = json.JSONEncoder(ensure_ascii=False)
_ENVIRONMENT = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""Variables that the child sees: for the date, and for the libraries of Python itself."""

_RESERVED = ("messages", "tools", "add_generation_prompt")
_FIX_ROW = "mend or remove the row"
_FIX_TEMPLATE = f"mend the template, or set chat.template: {CHATML}"


class Turn(NamedTuple):
    """text[start:end] is what the model must say as messages[message]: from the end of the generation prompt to the end
    of the token that ends the turn, inclusive; in characters.

    prefix_ok: text[:start] is `prompt(messages[:message])`, what serving renders before the turn. It is False where a
    template rewrites what went before (past turns that lose their thinking), and where `variables` change the prompt.
    """

    message: int
    start: int
    end: int
    prefix_ok: bool


class Rendered(NamedTuple):
    text: str
    turns: tuple[Turn, ...]


class ChatTemplate:
    """A chat template at work. `text`: the jinja in use; `end_token_id`: of the token that ends a turn of the assistant.

    template: `chatml`, a path to a .jinja file, or jinja; None: the tokenizer's own. variables: what the template is
    told besides, such as {"enable_thinking": False}; servers do not know them, so `prompt` is rendered without them.

    Raises ConfigError when there is no template, it is no jinja, or the tokenizer lacks the tokens of chatml; DataError
    when a question and its answer do not show what the model must say; EnvironmentFault when the child does not start.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, variables: Mapping[str, Any] = MappingProxyType({})):
        try:
            from maxi.data.template_worker import Renderer
        except ImportError as error:
            raise ConfigError(f"chat templates need jinja2, {error}", "chat", "pip install jinja2") from None
        chatml = resources.files("maxi.data").joinpath("chatml.jinja").read_text("utf-8")
        self.text, name = _found(tokenizer, template, chatml)
        control = tokenizer.special_tokens | (_chatml_tokens(tokenizer) if self.text == chatml else {})
        tokens = sorted(filter(None, control), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        setup = {
            "template": self.text,
            "variables": _checked(variables),
            "named": tokenizer.named_tokens,
            "control": tokens,
            "ends": [token for token in tokens if control[token] in tokenizer.eos_ids],
        }
        self._child: _Child | None = None
        if self.text == chatml:  # known to do no harm, and to end
            renderer = Renderer(**setup)
            end = renderer.end
            self._ask: Callable[..., dict[str, Any]] = renderer.answer
        else:
            self._child = _Child(setup)
            end = self._started(self._child, name)
            self._ask = self._child.ask
        self.end_token_id = control[end]

    def __enter__(self) -> "ChatTemplate":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child; a later call would start it again."""
        if self._child is not None:
            self._child.stop()

    def render(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None, where: str = "") -> Rendered:
        """A whole conversation and the turns of the assistant in it. `where` it is from stands in the DataError."""
        answer = self._answer(messages, tools, False, where)
        return Rendered(answer["text"], tuple(Turn(*turn) for turn in answer["turns"]))

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None, where: str = "") -> str:
        """What a server gives to the model to have these messages answered: it ends with the generation prompt."""
        return self._answer(messages, tools, True, where)["text"]

    def _answer(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool, where: str) -> dict[str, Any]:
        try:
            self._refuse_fakes(messages, tools, where)
            answer = self._ask(messages=list(messages), tools=tools, prompt=prompt)
        except RecursionError:
            raise DataError("the conversation is nested too deep", where, _FIX_ROW) from None
        except _Failed as failure:
            raise DataError(str(failure), where, _FIX_ROW) from None
        if "refused" in answer:
            raise DataError(answer["refused"], where, _FIX_ROW)
        return answer

    def _refuse_fakes(self, messages: Sequence[Mapping[str, Any]], tools: Any, where: str) -> None:
        for number, part in enumerate([*messages, tools], 1):
            token = _spelled(part, self._control)
            if token is not None:
                whose = "the tools spell" if number > len(messages) else f"message {number} spells"
                raise DataError(f"{whose} the control token {token!r}, which would fake a turn", where, _FIX_ROW)

    def _started(self, child: "_Child", name: str) -> str:
        try:
            answer = child.start()
        except _Failed as failure:
            raise DataError(str(failure), name, _FIX_TEMPLATE) from None
        if "end" in answer:
            return answer["end"]
        child.stop()
        if "broken" in answer:
            raise ConfigError(f"the chat template is no jinja, {answer['broken']}", name, _FIX_TEMPLATE)
        what = f"a question and an answer do not show what the model must say, {answer['refused']}"
        raise DataError(what, name, _FIX_TEMPLATE)


class _Failed(Exception):
    """The child gave no answer; it has ended. In one line."""


class _Child:
    """The process that renders. One request at a time; it is started when it is asked and not there."""

    def __init__(self, setup: dict[str, Any]):
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(self) -> dict[str, Any]:
        """Starts the process and gives it the template. Raises EnvironmentFault when it does not start, else as `ask`."""
        # -I and no site: nothing of the user's runs in it; where Python looks for modules is told, not found out again
        paths = [str(Path(__file__).parents[2]), *(str(Path(path).absolute()) for path in sys.path if path)]
        command = [sys.executable, "-I", "-S", "-B", "-c", _BOOT, *paths]
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, cwd="/"
            )
            self._exchange(None, _START_SECONDS)
        except (OSError, _Failed) as error:
            what = f"the process that renders chat templates does not start, {error}"
            raise EnvironmentFault(what, sys.executable or "python", "check that this Python runs by itself") from None
        return self._exchange(_JSON.encode(self._setup).encode("utf-8", "surrogatepass"), SECONDS)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request (see `template_worker.serve`). Raises _Failed when none comes in time."""
        with self._lock:
            if self._process is None and "end" not in self.start():
                raise _Failed("the chat template does not compile a second time")
            try:
                content = _JSON.encode(request).encode("utf-8", "surrogatepass")
            except (TypeError, ValueError) as error:
                raise _Failed(f"the conversation holds what JSON cannot, {error}") from None
            return self._exchange(content, SECONDS)

    def stop(self) -> None:
        """Kills the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _exchange(self, content: bytes | None, seconds: float) -> Any:
        """Sends a frame, if any, and awaits one. Whatever goes wrong, an interrupt too, ends the process: a late answer
        must not be taken for the next one's."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        until = time.monotonic() + seconds
        try:
            if content is not None:
                process.stdin.write(len(content).to_bytes(8, "big") + content)
                process.stdin.flush()
            size = int.from_bytes(_read(process.stdout.fileno(), 8, until), "big")
            return json.loads(_read(process.stdout.fileno(), size, until)) if size else None
        except BaseException as error:
            self.stop()
            if isinstance(error, TimeoutError):
                raise _Failed(f"the chat template takes longer than {seconds:g} s") from None
            if isinstance(error, EOFError | BrokenPipeError):
                raise _Failed(f"the chat template ended its process (status {process.returncode})") from None
            raise


def _read(pipe: int, size: int, until: float) -> bytes:
    """`size` bytes. Raises TimeoutError when they are not there at `until`, EOFError when they never will be."""
    found = bytearray()
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    while len(found) < size:
        left = until - time.monotonic()
        if left <= 0 or not ready.poll(1000 * left):
            raise TimeoutError
        piece = os.read(pipe, size - len(found))
        if not piece:
            raise EOFError
        found += piece
    return bytes(found)


def _found(tokenizer: Tokenizer, template: str | None, chatml: str) -> tuple[str, str]:
    """The jinja that `template` stands for, and what to call it."""
    if template is None:
        if not tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template", str(tokenizer.folder), f"set chat.template: {CHATML}")
        return tokenizer.chat_template, str(tokenizer.folder)
    if template == CHATML:
        return chatml, CHATML
    if any(mark in template for mark in ("{{", "{%", "{#")):
        return template, "chat.template"
    try:
        return read_file(Path(template).expanduser(), MAX_TEMPLATE_BYTES).decode("utf-8-sig").replace("\r\n", "\n"), template
    except (OSError, ValueError) as error:
        fix = f"name a .jinja file, or write {CHATML}"
        raise ConfigError(f"the chat template cannot be read, {error}", "chat.template", fix) from None


def _chatml_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    found = {token: tokenizer.backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>")}
    for token, i in found.items():
        if i is None or tokenizer.encode([token])[0].tolist() != [i]:
            fix = "leave chat.template out, or take a tokenizer with this token"
            raise ConfigError(f"the tokenizer has no token {token}, which {CHATML} needs", str(tokenizer.folder), fix)
    return found


def _checked(variables: Mapping[str, Any]) -> dict[str, Any]:
    where = "chat.template_kwargs"
    taken = [name for name in _RESERVED if name in variables]
    if taken:
        raise ConfigError(f"{taken[0]} is no variable of a chat template's own", where, "remove it")
    try:
        return json.loads(json.dumps(dict(variables)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a variable of the chat template is no JSON, {error}", where, "write plain values") from None


def _spelled(value: Any, control: re.Pattern[str]) -> str | None:
    """A control token that a message's text or a part of it spells."""
    if isinstance(value, str):
        found = control.search(value)
        return found.group() if found else None
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    parts = value if isinstance(value, list | tuple) else ()
    return next((token for part in parts if (token := _spelled(part, control)) is not None), None)
