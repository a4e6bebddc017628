"""What a model says, on the terminal: continuations of prompts (`maxi generate`) and a conversation (`maxi chat`).

Everything a model or a user says is written `visible`. Lines that begin with `--- ` are maxi's own. Where a terminal is
read, lines can be edited; elsewhere each line is a message, and the answers are all there is to see. How a conversation
becomes ids is the model's chat template's matter (`maxi.data.chat_template`), how they go on `generation.py`'s.
"""

import io
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from maxi.errors import ConfigError, DataError
from maxi.generation import complete_each, conversation, open_chat, stream_ids, stream_text, tokenizer_of, unstacked, visible
from maxi.models.sampling import Sampling
from maxi.pretrained import open_model
from maxi.signals import StopRequest

if TYPE_CHECKING:
    from maxi.data.chat_template import ChatTemplate
    from maxi.hf import Loaded

HELP = """\
--- /reset         forget what was said
--- /system TEXT   instruct the model, and forget what was said; without TEXT, instruct it no more
--- /help          these lines
--- /quit          leave, as Ctrl-D does
--- Ctrl-C         end an answer, and keep what it said; at the prompt, leave
"""


def run_generate(
    model_path: str | Path,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    chat: bool = False,
    system: str | None = None,
    out: TextIO,
) -> None:
    """`maxi generate`: prompt and continuation of MODEL to `out`; one prompt as it comes, several in order when done.

    With `chat` a prompt is what a user says (to a model that `system` instructs), its continuation the answer. Raises as
    `open_model` and `complete` do, ConfigError for `system` without `chat` and where the model has no chat template.
    """
    if system is not None and not chat:
        raise ConfigError("--system needs --chat", "generate", "a plain prompt has no system message")
    loaded = open_model(model_path)
    with open_chat(loaded) if chat else nullcontext() as template:
        asked = [conversation(prompt, system) for prompt in prompts] if chat else prompts
        heads = [visible(f"> {prompt}\n" if chat else prompt) for prompt in prompts]
        if len(prompts) == 1:
            pieces = stream_text(loaded, asked[0], sampling, chat=template)
            out.write(heads[0])
            for piece in pieces:
                out.write(visible(piece))
                out.flush()
            out.write("\n")
            return
        waiting: dict[int, str] = {}
        shown = 0
        for row, made in complete_each(loaded, asked, sampling, chat=template):
            waiting[row] = visible(made.text)
            while shown in waiting:
                out.write(f"--- {shown + 1} of {len(prompts)}\n{heads[shown]}{waiting.pop(shown)}\n")
                out.flush()
                shown += 1


class Chat:
    """A conversation that fits what the model was made for: its oldest turns go when the next answer needs their room.

    `system`: the instruction or None; `turns`: messages, a user's and the answer to it; `cut`: whether the newest answer
    met the length limit. `sampling.max_new_tokens` is at most half of the model's max_position_embeddings, so that there
    is room for a question. An answer's draws depend on the seed and the number of answers before it, /reset or not.
    """

    def __init__(self, loaded: "Loaded", template: "ChatTemplate", sampling: Sampling, system: str | None = None):
        self._loaded, self._template, self._tokenizer = loaded, template, tokenizer_of(loaded)
        self._most = loaded.model.rope.max_position
        self.sampling = replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, self._most // 2)))
        self.system, self.cut = system, False
        self.turns: list[list[dict[str, Any]]] = []
        self._ids: list[int] = []  # of the conversation up to where the answer begins
        self._answers = 0

    def ask(self, text: str) -> int:
        """Adds a user's message; returns how many of the oldest turns were dropped for it and for its answer.

        Raises ConfigError when the message fits in by no means, DataError when the template refuses the conversation (say,
        for a control token that is spelled out), and then changes nothing.
        """
        kept = [*self.turns, conversation(text)]
        room = self._most - self.sampling.max_new_tokens
        while len(ids := self._rendered(kept)) > room:
            if len(kept) == 1:
                what = f"the message comes to {len(ids)} tokens, and there is room for {room}"
                raise ConfigError(what, "chat", "shorten it, or lower --max-new-tokens")
            del kept[0]
        dropped = len(self.turns) + 1 - len(kept)
        self.turns, self._ids = kept, ids
        return dropped

    def answer(self, enough: Callable[[], bool]) -> Iterator[str]:
        """The answer to the newest message, as it grows; it ends early once `enough()`, and what was said is kept."""
        made: list[int] = []
        try:
            yield from self._tokenizer.stream(self._made(made, enough), skip_special_tokens=True)
        finally:
            text = self._tokenizer.decode(made, skip_special_tokens=True)
            self.turns[-1].append({"role": "assistant", "content": text})
            self.cut = len(made) == self.sampling.max_new_tokens
            self._answers += 1

    def reset(self, system: str | None) -> None:
        """Forgets what was said, and instructs the model anew."""
        self.system, self.turns = system, []

    def _made(self, made: list[int], enough: Callable[[], bool]) -> Iterator[int]:
        """Ids of the answer, each appended to `made` before it is handed on."""
        sampling = replace(self.sampling, seed=(self.sampling.seed + self._answers) % (1 << 32))
        for i in takewhile(lambda _: not enough(), stream_ids(self._loaded, self._ids, sampling, chat=self._template)):
            made.append(i)
            yield i

    def _rendered(self, turns: list[list[dict[str, Any]]]) -> list[int]:
        instruction = [] if self.system is None else [{"role": "system", "content": self.system}]
        text = self._template.prompt([*instruction, *chain.from_iterable(turns)], where="chat")
        return self._tokenizer.encode([text])[0].tolist()


def run_chat(model_path: str | Path, sampling: Sampling, *, system: str | None = None, source: TextIO, out: TextIO) -> None:
    """`maxi chat`: reads lines from `source`, each a message or a command, until its end; writes the answers to `out`.

    Ctrl-C ends the answer under way, pressed twice the program; at the prompt it ends the chat as Ctrl-D does. A
    message that cannot be answered is taken back. Raises as `open_model` does, ConfigError where there is no chat template.
    """
    loaded = unstacked(open_model(model_path))
    with open_chat(loaded) as template:
        chat = Chat(loaded, template, sampling, system)
        if source.isatty():
            out.write(f"--- {model_path}; /help lists the commands\n")
        if (limit := chat.sampling.max_new_tokens) < sampling.max_new_tokens:
            held = loaded.model.rope.max_position
            out.write(f"--- answers end at {limit} tokens, half of the {held} that the model was made for\n")
        for line in _lines(source, out):
            word, _, rest = line.partition(" ")
            if word == "/quit":
                return
            if word.startswith("/"):
                _command(chat, word, rest.strip(), out)
            elif line:
                _exchange(chat, line, out)


def _lines(source: TextIO, out: TextIO) -> Iterator[str]:
    """Lines without the blanks around them, until the end of `source` or Ctrl-C."""
    edited = source.isatty()
    if edited:
        with suppress(ImportError):  # not in every Python
            import readline  # noqa: F401 (gives `input` its editing and its history)
    elif isinstance(source, io.TextIOWrapper):
        source.reconfigure(errors="replace")
    try:
        while line := f"{input('> ')}\n" if edited else source.readline():
            yield line.strip()
    except (EOFError, KeyboardInterrupt):
        if edited:
            out.write("\n")


def _command(chat: Chat, word: str, rest: str, out: TextIO) -> None:
    if word == "/help":
        out.write(HELP)
    elif word == "/reset":
        chat.reset(chat.system)
        out.write("--- forgotten\n")
    elif word == "/system":
        chat.reset(rest or None)
        out.write(f"--- forgotten; {'instructed anew' if rest else 'no instruction'}\n")
    else:
        out.write(visible(f"--- there is no command {word}; /help lists them\n"))
    out.flush()


def _exchange(chat: Chat, text: str, out: TextIO) -> None:
    """A message and its answer."""
    with StopRequest() as stop:
        stop.ready()
        try:
            dropped = chat.ask(text)
        except (ConfigError, DataError) as error:
            out.write(visible(f"--- not sent: {error.what}\n"))
            return
        if dropped:
            out.write(f"--- forgotten to make room: the {dropped} oldest of {dropped + len(chat.turns) - 1} answers\n")
        for piece in chat.answer(lambda: bool(stop.asked)):
            out.write(visible(piece))
            out.flush()
        out.write(f"\n--- cut at {chat.sampling.max_new_tokens} tokens\n" if chat.cut else "\n")
        out.flush()
    if stop.asked == "SIGTERM":
        signal.raise_signal(signal.SIGTERM)
