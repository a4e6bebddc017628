"""Rows to conversations: which fields of a record hold one, who speaks in it, and which are refused.

Pure and without a tokenizer: what a template makes of the messages, and which tokens are learned, is decided elsewhere.
The layouts in use (messages, ShareGPT's conversations, Alpaca's instruction, prompts with completions, questions with
answers, pairs of a chosen and a rejected answer) are told apart by the names of their fields alone; `fields` maps other
names to these. What an assistant says is kept byte for byte. Whatever does not fit is a `DataError` that says which
message of which row; None counts as absent, because parquet fills in what a row does not have.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maxi.data.records import kind, missing, not_an_object, shown, surrogate
from maxi.errors import ConfigError, DataError

Message = dict[str, Any]
"""role (system, user, assistant, tool) and content (text); perhaps tool_calls, reasoning_content, name, tool_call_id."""

Turn = tuple[Message, float | None]
"""A message, and what the row said of its weight in the loss."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """At most one system message, then users, assistants and tools by turns; the last message is an assistant's.

    where: such as `rows.jsonl:12`; weights: one a message, None where the row said nothing; category: the value of the
    column that `category_field` names.
    """

    messages: tuple[Message, ...]
    where: str
    weights: tuple[float | None, ...]
    tools: list[Any] | None = None
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Preference:
    """Two different ways to go on after the same messages: the first `prompt` are common to both."""

    chosen: Conversation
    rejected: Conversation
    prompt: int


@dataclass(frozen=True, slots=True)
class Labelled:
    """One way to go on after the first `prompt` messages, and whether it was wanted."""

    conversation: Conversation
    prompt: int
    label: bool


_CONVERSATIONS = (
    ("messages",),
    ("conversations",),
    ("conversation",),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
_PAIRS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
_PROMPTS = (("prompt",), ("conversations",), ("messages",), ("conversation",), ("instruction",), ("question",))
_TOGETHER = ("input", "history", "system", "tools", "label")
_OF_MESSAGES = ("role", "content")

FIELDS = frozenset((*(name for names in (*_CONVERSATIONS, *_PAIRS) for name in names), *_TOGETHER, *_OF_MESSAGES))
"""The names that `fields` may map; role and content are those of each message."""

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
}
_CALLERS = ("function_call", "tool_call")
_MAY_FOLLOW = {
    "system": (None,),
    "user": (None, "system", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_MEND = "mend it, or allow for it with data.skip_bad"


def conversation_of(record: Any, where: str, fields: Mapping[str, str] = {}, category_field: str | None = None) -> Conversation:
    """The conversation in a record. `fields` maps maxi's names (FIELDS) to the record's, as in {"question": "q"}.

    A prompt's own assistant messages have weight 0 unless they say otherwise; what follows the last assistant message
    is dropped. Raises DataError for what is no conversation, ConfigError for an unknown name in `fields`.
    """
    row = _Row(record, where, fields, category_field)
    names = row.layout(_CONVERSATIONS, "conversation")
    return row.conversation([*row.opening(names[0]), *row.answer(names)])


def preference_of(record: Any, where: str, fields: Mapping[str, str] = {}, category_field: str | None = None) -> Preference:
    """The chosen and the rejected conversation in a record; else as `conversation_of`.

    Each is a text, a message or a list of messages. What begins with an assistant follows the record's prompt; what begins
    otherwise contains it, and a field `prompt` beside it must say the same.
    """
    row = _Row(record, where, fields, category_field)
    answers = [row.messages(name, "assistant") for name in row.layout(_PAIRS, "pair of answers")]
    whole = [messages[0][0]["role"] != "assistant" for messages in answers]
    opening = [] if all(whole) else row.opening(row.layout(_PROMPTS, "prompt")[0])
    turns = [[*(row.system() if has else opening), *messages] for has, messages in zip(whole, answers, strict=True)]
    chosen, rejected = map(row.conversation, turns)
    if chosen.messages == rejected.messages:
        raise row.fault("chosen and rejected are identical")
    same = [a == b for a, b in zip(chosen.messages, rejected.messages, strict=False)]
    prompt = same.index(False) if False in same else len(same)
    if not all(_is_answered(branch.messages, prompt) for branch in (chosen, rejected)):
        raise row.fault(f"chosen and rejected have different prompts, from message {prompt + 1} on")
    if any(whole):
        row.check_prompt(chosen.messages[:prompt])
    return Preference(chosen, rejected, prompt)


def labelled_of(record: Any, where: str, fields: Mapping[str, str] = {}, category_field: str | None = None) -> Labelled:
    """The conversation in a record and its `label` (true or 1: wanted); else as `conversation_of`.

    Where the answer has no field of its own, it is all that follows the last user's message, tools included.
    """
    row = _Row(record, where, fields, category_field)
    names = row.layout(_CONVERSATIONS, "conversation")
    opening = row.opening(names[0])
    conversation = row.conversation([*opening, *row.answer(names)])
    roles = [message["role"] for message in conversation.messages]
    prompt = len(opening) if len(names) > 1 else len(roles) - roles[::-1].index("user")
    if not _is_answered(conversation.messages, prompt):
        raise row.fault(f"message {prompt + 1} does not answer the prompt")
    return Labelled(conversation, prompt, row.label())


def _is_answered(messages: Sequence[Message], prompt: int) -> bool:
    if not 0 < prompt < len(messages):
        return False
    return messages[prompt - 1]["role"] in ("user", "tool") and messages[prompt]["role"] == "assistant"


class _Row:
    """One record under maxi's own names. Whatever is wrong with it becomes a DataError that names its place."""

    def __init__(self, record: Any, where: str, fields: Mapping[str, str], category_field: str | None):
        if not isinstance(record, Mapping):
            raise not_an_object(record, where, '{"messages": [...]}')
        if unknown := fields.keys() - FIELDS:
            raise ConfigError(f"nothing is called {min(unknown)!r}", f"fields of {where}", f"map {', '.join(sorted(FIELDS))}")
        self._record, self._where, self._fields, self._category = record, where, fields, category_field
        renamed = {*fields, *fields.values()}  # a name that was mapped means nothing else any more
        self._values = {name: value for name, value in record.items() if name not in renamed}
        self._values |= {ours: record[theirs] for ours, theirs in fields.items() if theirs in record}

    def fault(self, what: str, fix: str = _MEND) -> DataError:
        return DataError(what, self._where, fix)

    # --- fields ---

    def layout(self, layouts: Sequence[tuple[str, ...]], what: str) -> tuple[str, ...]:
        """The first whose fields are all there, those that were mapped before others."""
        found = [names for names in layouts if all(self._values.get(name) is not None for name in names)]
        if found:
            return max(found, key=lambda names: sum(name in self._fields for name in names))
        accepted = ", ".join(" + ".join(names) for names in layouts)
        for names in layouts:
            if all(name in self._values for name in names):
                null = next(name for name in names if self._values[name] is None)
                raise self.fault(f"the field {self._fields.get(null, null)!r} is null")
        what = f"there is no {what} in the fields {shown(list(self._record))}"
        raise self.fault(what, f"accepted are {accepted}; other names are mapped with fields")

    def opening(self, name: str) -> list[Turn]:
        """The system's message and what the field `name` says before the answer."""
        if name == "instruction":
            asked = [self._text(self._values[part], f"the field {part!r}") for part in (name, "input") if self._has(part)]
            return [*self.system(), *self._history(), _turn("user", "\n".join(part for part in asked if part))]
        turns = self.messages(name, "user" if name in ("prompt", "question") else None)
        if name == "prompt":
            turns = [(m, 0.0 if weight is None and m["role"] == "assistant" else weight) for m, weight in turns]
        return [*self.system(), *turns]

    def answer(self, names: tuple[str, ...]) -> list[Turn]:
        """What the second field of a layout says, if there is one."""
        return [turn for name in names[1:] for turn in self.messages(name, "assistant")]

    def system(self) -> list[Turn]:
        text = self._text(self._values["system"], "the field 'system'") if self._has("system") else ""
        return [_turn("system", text)] if text else []

    def label(self) -> bool:
        if "label" not in self._values:
            raise missing(self._fields.get("label", "label"), list(self._record), self._where)
        label = self._values["label"]
        if not isinstance(label, int) or label not in (0, 1):
            raise self.fault(f"the field 'label' is {_seen(label)}, not true or false")
        return bool(label)

    def messages(self, name: str, role: str | None) -> list[Turn]:
        """What a field says, at least one message. With a role, a text is what it says, and an object is one message."""
        value = self._values[name]
        if role and isinstance(value, str):
            return [_turn(role, self._text(value, f"the field {name!r}"))]
        if role and isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list | tuple):
            raise self.fault(f"the field {name!r} is {kind(value)}, not a list of messages")
        if not value:
            raise self.fault(f"the field {name!r} has no messages")
        return [self._turn(message, f"message {number} of {name!r}") for number, message in enumerate(value, 1)]

    def check_prompt(self, common: Sequence[Message]) -> None:
        """Raises DataError when the field `prompt`, redundant beside whole conversations, is not what they begin with."""
        if not self._has("prompt"):
            return
        told = [message for message, _ in self.messages("prompt", "user")]
        if isinstance(self._values["prompt"], str):
            same = told[0]["content"] == [message["content"] for message in common if message["role"] == "user"][-1]
        else:
            start = common[0]["role"] == "system" != told[0]["role"]
            same = list(common[start : start + len(told)]) == told
        if not same:
            raise self.fault("the field 'prompt' is not what chosen and rejected answer")

    def conversation(self, turns: list[Turn]) -> Conversation:
        """The turns in a checked order, without those that no assistant answers."""
        before = None
        for number, (message, _) in enumerate(turns, 1):
            role = message["role"]
            if before not in _MAY_FOLLOW[role]:
                again = f"two {role} messages in a row" if role == before else f"{role} after {before or 'nothing'}"
                raise self.fault(f"message {number} is out of order, {again}")
            if role == "assistant" and not message["content"].strip() and "tool_calls" not in message:
                raise self.fault(f"message {number} is an empty answer")
            before = role
        end = max((number for number, (message, _) in enumerate(turns, 1) if message["role"] == "assistant"), default=0)
        if not end:
            raise self.fault("no assistant says anything")
        messages, weights = zip(*turns[:end], strict=True)
        return Conversation(messages, self._where, weights, self._tools(), self._category_value())

    def _has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def _history(self) -> Iterable[Turn]:
        for pair in self._values.get("history") or ():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise self.fault("the field 'history' is not a list of [user, assistant] pairs")
            for role, text in zip(("user", "assistant"), pair, strict=True):
                yield _turn(role, self._text(text, "a text in 'history'"))

    def _tools(self) -> list[Any] | None:
        given = self._values.get("tools")
        tools = [] if given in (None, "") else self._structure(given, "the field 'tools'")
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise self.fault("the field 'tools' is not a list of objects")
        return tools or None

    def _category_value(self) -> str | None:
        if self._category is None:
            return None
        if self._category not in self._record:
            raise missing(self._category, list(self._record), self._where)
        value = self._record[self._category]
        if not isinstance(value, str | int | None):
            raise self.fault(f"the category {self._category!r} is {kind(value)}, not text")
        return None if value is None else self._text(str(value), f"the category {self._category!r}")

    # --- messages ---

    def _turn(self, raw: Any, place: str) -> Turn:
        if not isinstance(raw, Mapping):
            raise self.fault(f"{place} is {kind(raw)}, not an object")
        said = {name: value for name, value in raw.items() if value is not None}
        speaker, content = self._first(said, "role", "from"), self._first(said, "content", "value")
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise self.fault(f"the role of {place} is {_seen(speaker)}", f"use one of {', '.join(_ROLES)}")
        message: Message = {"role": _ROLES[speaker]}
        given, content = (content, "") if speaker in _CALLERS else (said.get("tool_calls"), content)
        calls = self._calls(given, place) if given or speaker in _CALLERS else []
        if calls and message["role"] != "assistant":
            raise self.fault(f"{place} calls a tool, but is not an assistant's")
        message["content"] = self._content("" if content is None and calls else content, place)
        if calls:
            message["tool_calls"] = calls
        for name in ("reasoning_content", "name", "tool_call_id"):
            if name in said:
                message[name] = self._text(said[name], f"the {name} of {place}")
        return message, self._weight(said, place)

    def _first(self, said: Mapping[str, Any], name: str, other: str) -> Any:
        name = self._fields.get(name, name)
        return said[name] if name in said else said.get(other)

    def _content(self, content: Any, place: str) -> str:
        if not isinstance(content, list):
            return self._text(content, f"the content of {place}")
        for part in content:
            sort = part.get("type") if isinstance(part, Mapping) else kind(part)
            if sort != "text" or not isinstance(part.get("text"), str):
                raise self.fault(f"the content of {place} has a part that is no text, {_seen(sort)}")
        return self._text("".join(part["text"] for part in content), f"the content of {place}")

    def _calls(self, given: Any, place: str) -> list[Any]:
        """Calls in the shape {type, function: {name, arguments}}, arguments an object: templates write it as JSON."""
        calls, found = self._structure(given, f"the call in {place}"), []
        for call in calls if isinstance(calls, list) else [calls]:
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise self.fault(f"a call in {place} names no function")
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                arguments = self._structure(arguments, f"the arguments of {function['name']!r} in {place}")
            if not isinstance(arguments, Mapping):
                raise self.fault(f"the arguments of {function['name']!r} in {place} are {kind(arguments)}, not an object")
            known = {"id": call["id"]} if "id" in call and call is not function else {}
            found.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
        return found

    def _weight(self, said: Mapping[str, Any], place: str) -> float | None:
        for name, means in (("loss_weight", "a number of at least 0"), ("weight", "0 or 1"), ("train", "true or false")):
            if (value := said.get(name)) is None:
                continue
            if name == "train":
                fits = isinstance(value, bool)
            else:
                fits = isinstance(value, int | float) and 0 <= value < math.inf and (name == "loss_weight" or value in (0, 1))
            if not fits:
                raise self.fault(f"the {name} of {place} is {_seen(value)}, not {means}")
            return float(value)
        return None

    # --- values ---

    def _text(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            raise self.fault(f"{what} is {kind(value)}, not text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise surrogate(error, self._where) from None
        return value

    def _structure(self, value: Any, what: str) -> Any:
        """JSON text parsed; anything else without what is None in its objects."""
        try:
            found = json.loads(value) if isinstance(value, str) else _pruned(value)
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise surrogate(error, self._where) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise self.fault(f"{what} is no JSON, {str(error)[:80]}") from None
        return found


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}, None


def _pruned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _pruned(item) for name, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list | tuple) else value


def _seen(value: Any) -> str:
    return kind(value) if value is None or isinstance(value, list | Mapping) else repr(value)[:40]
