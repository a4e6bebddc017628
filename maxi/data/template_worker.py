"""Renders chat templates and finds what the model must say in them: the side that runs in a child process.

A chat template is a program that came with a model, so `chat_template.py` runs `serve` in a process of its own, which it
may kill at any moment. `serve` gives up what a program needs to do harm (memory, writing files), then answers requests on
stdin, each one frame: eight bytes of length and that much JSON. The sandbox of jinja2 keeps a template from reaching
Python's objects; the limits are for what that sandbox lets through.

Templates are shown what transformers shows them (filters, tags, functions, variables, messages), so that text here is
text there. jinja2 is all that is imported, which makes for a start in a tenth of a second.
What is guaranteed, limits of time, and errors that name a file and a row are the parent's.
"""

import json
import re
import signal
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

EXTRA = 1 << 20
"""Characters that a rendering may have beyond twice the bytes of the request."""
MEMORY = 1 << 30
"""Bytes of address space that rendering may take beyond what the process starts with."""
_ORPHANED = 10
"""Seconds after which a request ends this process, should the parent, whose limit is shorter, be gone."""

Messages = list[dict[str, Any]]
Turn = tuple[int, int, int, bool]
"""`chat_template.Turn` as it travels."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_PROBE = [("user", "One and one?"), ("assistant", "Two."), ("user", "Really?")]


class Refusal(Exception):
    """What a template does that training cannot use, in one line."""


class Broken(Exception):
    """The template does not compile."""


class _Fault(Refusal):
    """The template raised."""


class _Raised(jinja2.TemplateError):
    """raise_exception(...) in a template."""


class Renderer:
    """A compiled template. `end` is the token that ends a turn of the assistant, as a conversation of one turn shows it.

    variables: what a template is told besides; named: tokens by their names, such as `bos_token`; control: the texts of
    all control tokens; ends: of those that end a generation. Raises Broken when the template does not compile, Refusal
    when that conversation shows no token that ends a turn.
    """

    def __init__(
        self, template: str, variables: dict[str, Any], named: dict[str, str], control: Iterable[str], ends: Iterable[str]
    ):
        self.variables, self._named = variables, named
        self._now = datetime.now()
        try:
            self._template = _environment(lambda form: self._now.strftime(form)).from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise Broken(f"line {error.lineno}: {error.message}") from None
        except Exception as error:  # what Python's own compiler makes of it
            raise Broken(_described(error)) from None
        # longest first: an alternation takes the first that fits, tokenizers the longest
        tokens = sorted(filter(None, control), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self.ends, self.end, self.header = set(ends), "", ""
        self._probe()

    def answer(self, messages: Sequence[Any], tools: Any, prompt: bool, limit: int | None = None) -> dict[str, Any]:
        """{"text", "turns"} of a conversation; with `prompt` only the text that a server renders before the next turn,
        where `variables` are unknown; {"refused"} and why. `limit`: the most characters of one rendering; None: any.
        """
        self._now = datetime.now()  # one moment for all renderings of a conversation: midnight must not part them
        shown = _shown(messages)
        try:
            text = self._text(limit, tools, shown, prompt, served=prompt)
            return {"text": text} if prompt else {"text": text, "turns": self._spans(limit, tools, shown, text).turns()}
        except Refusal as refusal:
            return {"refused": str(refusal)}

    def _probe(self) -> None:
        asked, answered, again = ({"role": role, "content": content} for role, content in _PROBE)
        text = self._text(None, None, [asked, answered])
        spans = self._spans(None, None, [asked, answered], text)
        turns = spans.turns()
        said = text.find(answered["content"], turns[0][1], turns[0][2]) if turns else -1
        if said < 0:
            raise Refusal("the chat template leaves out what the assistant says")
        tokens = list(self.control.finditer(text, said))
        # some templates close a turn with two tokens, some the whole conversation with one more
        always = _common(text, spans.attempt([asked, answered, again]) or "")
        closing = [token for token in tokens if token.end() <= always] or tokens[:1]
        self.end = next((token for token in closing if token.group() in self.ends), closing[-1]).group()
        self.ends |= {self.end}
        self.header = spans.header(1)

    def _spans(self, limit: int | None, tools: Any, messages: Messages, text: str) -> "_Spans":
        return _Spans(self, text, messages, partial(self._text, limit, tools))

    def _text(self, limit: int | None, tools: Any, messages: Messages, prompt: bool = False, served: bool = False) -> str:
        variables = {} if served else self.variables
        known = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            return _bounded(self._template.generate(known | self._named | variables), limit)
        except Refusal:
            raise
        except MemoryError:
            raise Refusal(f"the chat template wants more than {MEMORY >> 20} MiB of memory") from None
        except _Raised as error:
            raise _Fault(f"the chat template does not take this conversation: {str(error)[:300]}") from None
        except Exception as error:  # a template fails as any program does
            raise _Fault(f"the chat template fails, {_described(error)}") from None


class _Marked(NamedTuple):
    """The conversation with a mark for the words of one message: its text; the mark's place there; up to where it is the
    same as the full text; from where on the full text goes on as it does."""

    text: str
    at: int
    same: int
    rest: int


class _Spans:
    """The turns of one conversation, whose rendering is `full`; render(messages, prompt=, served=) renders others."""

    def __init__(self, renderer: Renderer, full: str, messages: Messages, render: Callable[..., str]):
        self._renderer, self._full, self._messages, self._render = renderer, full, messages, render
        self._fault = ""

    def turns(self) -> list[Turn]:
        found: list[Turn] = []
        for i, message in enumerate(self._messages):
            turn = self._turn(i, found[-1][2] if found else 0) if message.get("role") == "assistant" else None
            if turn is not None:
                found.append(turn)
        return found

    def header(self, i: int) -> str:
        """What the template writes to open message i, as far as a prompt shows it.

        A template without a generation prompt opens a turn by closing the message before, with its last word.
        """
        prompt, without = (self.attempt(self._messages[:i], prompt=asked) for asked in (True, False))
        if prompt is None or without is None or not prompt.strip():
            return self._renderer.header
        return prompt[_common(prompt, without) :] or prompt[prompt.rindex(prompt.split()[-1]) :]

    def attempt(self, messages: Messages, prompt: bool = False, served: bool = False) -> str | None:
        """The rendering of other messages, or None where the template raises, which it may for a part of a conversation."""
        try:
            return self._render(messages, prompt=prompt, served=served)
        except _Fault as fault:
            self._fault = f"; shown a part, {fault}"
            return None

    def _turn(self, i: int, floor: int) -> Turn | None:
        """Message i, which begins at `floor` or later; None when the template leaves it out."""
        prompt, marked = self.attempt(self._messages[:i], prompt=True), None
        served = self.attempt(self._messages[:i], prompt=True, served=True) if self._renderer.variables else prompt
        start = next((len(shown) for shown in (prompt, served) if shown is not None and self._full.startswith(shown)), None)
        if start is None:
            marked = self._marked(i)
            start = self._start(i, marked, floor) if marked else None
        end = None if start is None else self._end(i, start, marked)
        if start is None or end is None:
            return None
        if start < floor:
            raise Refusal(f"message {i + 1}: the chat template begins the turn before the one ahead of it has ended")
        return i, start, end, self._full[:start] == served

    def _marked(self, i: int) -> _Marked | None:
        """The conversation with a mark for the words of message i, or None when they change nothing: it is left out.

        Its thinking and its calls go too, except that calls stay, with a mark for a name, where the template needs them
        (for the answers of tools) or writes no words beside them.
        """
        message = self._messages[i]
        mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in self._full)
        bare = {key: value for key, value in message.items() if key not in ("tool_calls", *_REASONING)} | {"content": mark}
        others, calls, text = [bare], message.get("tool_calls"), None
        if isinstance(calls, list) and calls:
            others.append(bare | {"tool_calls": [_renamed(call, mark) for call in calls]})
        for other in others:
            text = self.attempt([*self._messages[:i], other, *self._messages[i + 1 :]])
            if text is not None and mark in text:
                same = _common(self._full, text)
                alike = _common(self._full[same:][::-1], text[same:][::-1])
                return _Marked(text, text.index(mark), same, len(self._full) - alike)
        if text == self._full:
            return None
        raise Refusal(f"message {i + 1}: the chat template does not show where the turn's words stand{self._fault}")

    def _start(self, i: int, marked: _Marked, floor: int) -> int | None:
        """Where message i begins in a text that does not begin with its prompt: behind the nearest header.

        Of a header that is not there as a whole (a prompt may open the thinking, or close it, where the turn does not)
        that part counts which is, if nothing stands between it and the message's words, or else the part's whole lines.
        None when the words would have brought the header along: the template leaves the message out.
        """
        header, text, before = self.header(i), marked.text, marked.text[floor : marked.at]
        length = bisect(range(1, len(header) + 1), False, key=lambda n: header[:n] not in before)
        at = text.rfind(header[:length], floor, marked.at)
        length = min(length, max(0, marked.same - at))
        if length < len(header) and text[at + length : marked.at].strip():
            length = header.rfind("\n", 0, length) + 1
        if header[:length].strip():
            return at + length
        if not self._full[marked.same : marked.rest].strip():
            return None
        raise Refusal(f"message {i + 1}: the chat template does not show where the turn begins{self._fault}")

    def _end(self, i: int, start: int, marked: _Marked | None) -> int | None:
        """The end of the token that ends message i; None when the template leaves the message out.

        Of several tokens it is the first one behind the message's words that ends turns: thinking and calls have tokens
        of their own, and some templates close a conversation with one more.
        """
        full, said = self._full, str(self._messages[i].get("content", "")).strip()
        first = self._renderer.control.search(full, start)
        if first and first.group() == self._renderer.end and full[start : first.start()].strip() == said != "":
            return first.end()  # nothing but the words: as nearly always, and it spares a rendering
        closed = full if i + 1 == len(self._messages) else self.attempt(self._messages[: i + 1])
        bound = len(closed) if closed is not None and full.startswith(closed) else None
        if bound is not None and not full[start:bound].strip():
            return None
        tokens = list(self._renderer.control.finditer(full, start, len(full) if bound is None else bound))
        if bound is not None and len(tokens) == 1 and not full[tokens[0].end() : bound].strip():
            return tokens[0].end()
        marked = marked or self._marked(i)
        rest = marked.rest if marked else start
        # a token may begin in the words and end in what is alike, as <|eom_id|> where others have <|eot_id|>
        tokens = [token for token in tokens if token.end() > rest]
        if bound is None:  # the next message follows: only tokens in a row can be this one's
            gaps = [full[one.end() : other.start()] for one, other in pairwise(tokens)]
            tokens = tokens[: 1 + next((n for n, gap in enumerate(gaps) if gap.strip()), len(gaps))]
        ending = [token for token in tokens if token.group() in self._renderer.ends]
        if ending or (tokens and bound is not None):
            return (ending or tokens)[0].end()
        what = f"message {i + 1}: the chat template ends the turn with {full[rest:bound][:30]!r}, not with a control token"
        raise Refusal(what + " that ends turns, so the model would never learn to stop")


def _shown(messages: Sequence[Any]) -> Messages:
    """Messages as transformers shows them: nothing that is null, and thinking under each name that templates look for."""
    shown = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for i, message in enumerate(shown):
        thinking = next((message[key] for key in _REASONING if key in message), None)
        if thinking is not None:
            shown[i] = {"thinking": thinking, **message, "reasoning_content": thinking}
    return shown


def _renamed(call: Any, name: str) -> Any:
    """A tool call to `name`, in either of the two spellings."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return call | {"function": call["function"] | {"name": name}}
    return call | {"name": name} if isinstance(call, dict) else call


def _common(one: str, other: str) -> int:
    """The length of what both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _bounded(pieces: Iterable[str], limit: int | None) -> str:
    kept, size = [], 0
    for piece in pieces:
        size += len(piece)
        if limit is not None and size > limit:
            raise Refusal(f"the chat template writes more than {limit} characters, far more than the conversation has")
        kept.append(piece)
    return "".join(kept)


def _described(error: Exception) -> str:
    """An exception with the line of the template that raised it, which jinja2 puts into the traceback."""
    line, frame = 0, error.__traceback__
    while frame is not None:
        line = frame.tb_lineno if frame.tb_frame.f_code.co_filename == "<template>" else line
        frame = frame.tb_next
    return f"{f'line {line}, ' if line else ''}{type(error).__name__}: {str(error)[:300]}"


def _environment(strftime_now: Callable[[str], str]) -> ImmutableSandboxedEnvironment:
    """What transformers 5 gives to chat templates."""
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _raise, "strftime_now": strftime_now, "dict": _Dict(), "namespace": _Namespace}
    return made


def _tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    # jinja2's own escapes < and & for pages of HTML
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> NoReturn:
    raise _Raised(str(message))


class _Dict:
    """`dict` without the attributes of a type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace`, in which no name with an underscore in front can be set: such names lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may well call a variable `self`
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            _Namespace.__setitem__(args[0], name, value)

    def __setitem__(self, name: Any, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")
        Namespace.__setitem__(self, name, value)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what stands between, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answers requests until stdin ends. An empty frame says that this process is ready; the first request makes the
    Renderer and is answered with {"end"}, {"refused"} or {"broken"}."""
    _confine()
    _send(stdout, b"")
    renderer: Renderer | None = None
    while len(head := stdin.read(8)) == 8:
        request = stdin.read(int.from_bytes(head, "big"))
        signal.setitimer(signal.ITIMER_REAL, _ORPHANED)
        asked = json.loads(request)
        if renderer is not None:
            answer = renderer.answer(**asked, limit=2 * len(request) + EXTRA)
        else:
            try:
                renderer = Renderer(**asked)
                answer = {"end": renderer.end}
            except Broken as error:
                answer = {"broken": str(error)}
            except Refusal as error:
                answer = {"refused": str(error)}
        _send(stdout, json.dumps(answer).encode())
        signal.setitimer(signal.ITIMER_REAL, 0)


def _send(stdout: BinaryIO, content: bytes) -> None:
    stdout.write(len(content).to_bytes(8, "big") + content)
    stdout.flush()


def _confine() -> None:
    import resource

    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even from inside one endless operation
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    sizes = Path("/proc/self/statm")
    if sizes.is_file():  # other systems do not hold a process to RLIMIT_AS
        limits[resource.RLIMIT_AS] = int(sizes.read_text().split()[0]) * resource.getpagesize() + MEMORY
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
