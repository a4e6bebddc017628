"""Rows to conversations: which fields of a record hold one, who speaks in it, and which are refused.

Pure and without a tokenizer: what a template makes of the messages, and which tokens are learned, is decided elsewhere.
The layouts in use (messages, ShareGPT's conversations, Alpaca's instruction, prompts with completions, questions with
answers, pairs of a chosen and a rejected answer) are told apart by the names of their fields alone; `fields` maps other
names to these. What an assistant says is kept byte for byte. Whatever does not fit is a `DataError` that says which
message of which row; None counts as absent, because parquet fills in what a row does not have.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maxi.data.records import kind, not_an_object, shown, surrogate
from maxi.errors import ConfigError, DataError

Message = dict[str, Any]
"""role (system, user, assistant, tool) and content (text); perhaps tool_calls, reasoning_content, name, tool_call_id."""

_Turn = tuple[Message, float | None]  # a message, and what the row said of its weight in the loss


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
    return prompt < len(messages) and messages[prompt]["role"] == "assistant"  # who only follows users and tools


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
        found = [names for names in layouts if all(map(self._has, names))]
        if found:
            return max(found, key=lambda names: sum(name in self._fields for name in names))
        if there := [names for names in layouts if all(name in self._values for name in names)]:
            names = max(there, key=lambda names: sum(self._has(name) for name in names))
            null = next(name for name in names if not self._has(name))
            raise self.fault(f"the field {self._called(null)!r} is null")
        accepted = ", ".join(" + ".join(names) for names in layouts)
        what = f"there is no {what} in the fields {shown(list(self._record))}"
        raise self.fault(what, f"accepted are {accepted}; other names are mapped with fields")

    def opening(self, name: str) -> list[_Turn]:
        """The system's message and what the field `name` says before the answer."""
        if name == "instruction":
            asked = filter(None, map(self._field, (name, "input")))
            return [*self.system(), *self._history(), _says("user", "\n".join(asked))]
        turns = self.messages(name, "user" if name in ("prompt", "question") else None)
        if name == "prompt":
            turns = [(m, 0.0 if weight is None and m["role"] == "assistant" else weight) for m, weight in turns]
        return [*self.system(), *turns]

    def answer(self, names: tuple[str, ...]) -> list[_Turn]:
        """What the second field of a layout says, if there is one."""
        return [turn for name in names[1:] for turn in self.messages(name, "assistant")]

    def system(self) -> list[_Turn]:
        text = self._field("system")
        return [_says("system", text)] if text else []

    def label(self) -> bool:
        if "label" not in self._values:
            raise self._absent(self._called("label"))
        label = self._values["label"]
        if not isinstance(label, int) or label not in (0, 1):
            raise self.fault(f"the field {self._called('label')!r} is {_seen(label)}, not true or false")
        return bool(label)

    def messages(self, name: str, role: str | None) -> list[_Turn]:
        """What a field says, at least one message. With a role, a text is what it says, and an object is one message."""
        value, field = self._values[name], f"the field {self._called(name)!r}"
        if role and isinstance(value, str):
            return [_says(role, self._text(value, field))]
        if role and isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list | tuple):
            raise self.fault(f"{field} is {kind(value)}, not a list of messages")
        if not value:
            raise self.fault(f"{field} has no messages")
        return [self._turn(message, f"message {number} of {self._called(name)!r}") for number, message in enumerate(value, 1)]

    def check_prompt(self, common: Sequence[Message]) -> None:
        """Raises DataError when the field `prompt`, redundant beside whole conversations, is not what they begin with."""
        if not self._has("prompt"):
            return
        told = [message for message, _ in self.messages("prompt", "user")]
        if isinstance(self._values["prompt"], str):
            same = told[0]["content"] == [message["content"] for message in common if message["role"] == "user"][-1]
        else:
            common = common[1:] if common[0]["role"] == "system" != told[0]["role"] else common
            same = list(common[: len(told)]) == told
        if not same:
            raise self.fault("the field 'prompt' is not what chosen and rejected answer")

    def conversation(self, turns: list[_Turn]) -> Conversation:
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

    def _absent(self, name: str) -> DataError:
        return self.fault(f"there is no field {name!r}, only {shown(list(self._record))}", "name another, or add it to the row")

    def _called(self, name: str) -> str:
        return self._fields.get(name, name)

    def _has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def _field(self, name: str) -> str:
        return self._text(self._values[name], f"the field {self._called(name)!r}") if self._has(name) else ""

    def _history(self) -> Iterable[_Turn]:
        history = self._values["history"] if self._has("history") else []
        for pair in history if isinstance(history, list) else [history]:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise self.fault("the field 'history' is not a list of [user, assistant] pairs")
            for role, text in zip(("user", "assistant"), pair, strict=True):
                yield _says(role, self._text(text, "a text in 'history'"))

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
            raise self._absent(self._category)
        value = self._record[self._category]
        if not isinstance(value, str | int | None):
            raise self.fault(f"the category {self._category!r} is {kind(value)}, not text")
        return None if value is None else self._text(str(value), f"the category {self._category!r}")

    # --- messages ---

    def _turn(self, raw: Any, place: str) -> _Turn:
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
        return said.get(self._called(name), said.get(other))

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
                fits = (
                    isinstance(value, int | float)
                    and 0 <= value <= sys.float_info.max
                    and (name == "loss_weight" or value in (0, 1))
                )
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


def _says(role: str, content: str) -> _Turn:
    return {"role": role, "content": content}, None


def _pruned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _pruned(item) for name, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list | tuple) else value


def _seen(value: Any) -> str:
    return kind(value) if value is None or isinstance(value, list | Mapping) else repr(value)[:40]
