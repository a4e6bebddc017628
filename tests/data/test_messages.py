"""Every layout of rows that is understood, what it becomes, and every row that is refused, with the place it names."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maxi.data import documents
from maxi.data.documents import Budget
from maxi.data.messages import FIELDS, Conversation, conversation_of, labelled_of, preference_of
from maxi.errors import ConfigError, DataError
from maxi.sections import Source

Row = dict[str, Any]
USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": " hello\n"}
CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}

TOOLS = [{"type": "function", "function": {"name": "now"}}, {"name": "sun", "parameters": {"type": "object"}}]


def said(conversation: Conversation) -> list[str]:
    """Each message in short, as in `u:hi`."""
    return [f"{message['role'][0]}:{message['content']}" for message in conversation.messages]


LAYOUTS: dict[str, tuple[Row, list[str]]] = {
    "messages": ({"messages": [{"role": "developer", "content": "s"}, USER, BOT]}, ["s:s", "u:hi", "a: hello\n"]),
    "conversations": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["u:q", "a:a"]),
    "conversation": ({"conversation": [USER, BOT], "system": "s"}, ["s:s", "u:hi", "a: hello\n"]),
    "instruction": ({"instruction": "do", "input": "this", "output": " a"}, ["u:do\nthis", "a: a"]),
    "instruction, no input": ({"instruction": "do", "input": "", "output": "a", "system": ""}, ["u:do", "a:a"]),
    "history": (
        {"instruction": "c", "input": None, "output": "d", "history": [["a", "b"]], "system": "s"},
        ["s:s", "u:a", "a:b", "u:c", "a:d"],
    ),
    "completion": ({"prompt": "p", "completion": "c"}, ["u:p", "a:c"]),
    "completion of messages": ({"prompt": [USER], "completion": [BOT]}, ["u:hi", "a: hello\n"]),
    "response": ({"prompt": "p", "response": "r", "system": "s"}, ["s:s", "u:p", "a:r"]),
    "question": ({"question": "q", "answer": "a", "id": 3}, ["u:q", "a:a"]),
    "first layout wins": ({"prompt": "p", "completion": "c", "messages": [USER, BOT]}, ["u:hi", "a: hello\n"]),
    "null columns are passed over": ({"messages": None, "prompt": "p", "response": "r"}, ["u:p", "a:r"]),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}, BOT]},
        ["u:ab", "a: hello\n"],
    ),
    "what nobody answers": ({"messages": [USER, BOT, {"role": "user", "content": "bye"}]}, ["u:hi", "a: hello\n"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    record, expected = LAYOUTS[name]
    found = conversation_of(record, "a.jsonl:1")
    assert said(found) == expected and len(found.weights) == len(expected) and found.where == "a.jsonl:1"


def test_fields_are_mapped_and_come_first() -> None:
    row = {"messages": [USER, BOT], "q": "q", "a": "a", "question": "another", "n": 3, "kind": None}
    assert said(conversation_of(row, "", {"question": "q", "answer": "a"})) == ["u:q", "a:a"]
    spoken = {"dialog": [{"who": "bot", "text": "a"}, {"who": "human", "text": "q"}][::-1]}
    assert said(conversation_of(spoken, "", {"messages": "dialog", "role": "who", "content": "text"})) == ["u:q", "a:a"]
    with pytest.raises(DataError, match="no conversation in the fields question, answer"):
        conversation_of({"question": "q", "answer": "a"}, "", {"question": "q"})
    assert conversation_of(row, "", category_field="n").category == "3"
    assert conversation_of(row, "", category_field="kind").category is None
    with pytest.raises(DataError, match=r"no field 'cat', only messages, q.*\(a:1\)"):
        conversation_of(row, "a:1", category_field="cat")
    with pytest.raises(DataError, match="the field 'n' is a number, not a list"):
        conversation_of(row, "", {"question": "n", "answer": "a"})
    with pytest.raises(ConfigError, match="nothing is called 'questoin'"):
        conversation_of(row, "", {"questoin": "q"})
    assert {"messages", "prompt", "chosen", "label", "tools", "content"} <= FIELDS


def test_tool_calls_have_one_shape_however_they_were_written() -> None:
    text = json.dumps(CALL["function"] | {"arguments": '{"zone": "UTC"}'})
    by_hand = (
        {"from": "function_call", "value": text},
        {"from": "observation", "value": "12"},
        {"from": "gpt", "value": "Noon."},
    )
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": json.loads(text)}]}
    openai = called, {"role": "tool", "tool_call_id": "1", "content": "12"}, {"role": "assistant", "content": "Noon."}
    a = conversation_of({"conversations": [USER, *by_hand], "tools": json.dumps(TOOLS)}, "")
    b = conversation_of({"messages": [USER, *openai], "tools": TOOLS}, "")
    assert said(a) == said(b) == ["u:hi", "a:", "t:12", "a:Noon."] and a.tools == b.tools == TOOLS
    assert a.messages[1]["tool_calls"] == [CALL] and b.messages[1]["tool_calls"] == [{"id": "1", **CALL}]
    assert b.messages[2]["tool_call_id"] == "1"
    assert conversation_of({"messages": [USER, BOT], "tools": "[]"}, "").tools is None


def test_weights_are_what_the_row_says() -> None:
    row = {
        "prompt": [{**USER, "weight": 1}, {**BOT}, USER, {**BOT, "train": True}, USER],
        "completion": [{**BOT, "loss_weight": 0.5}],
    }
    assert conversation_of(row, "").weights == (1.0, 0.0, None, 1.0, None, 0.5)
    assert conversation_of({"messages": [USER, {**BOT, "train": False}, USER, BOT]}, "").weights == (None, 0.0, None, None)


def test_parquet_and_json_give_the_same(tmp_path: Path) -> None:
    """Parquet fills every message with the keys of all messages."""
    called = {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Which zone?", "weight": 0}
    rows = [
        {"messages": [USER, called, {"role": "tool", "content": "12", "name": "now"}, BOT], "tools": TOOLS},
        {"messages": [USER, {**BOT, "reasoning_content": ""}], "system": "s"},
        {"question": "q", "answer": "\n a \0"},
        {"question": "q", "answer": " "},
    ]
    names = {name for row in rows for name in row}
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = []
    for name in ("a.parquet", "a.jsonl"):
        budget = Budget(1)
        both.append(list(documents.records(Source(path=str(tmp_path / name)), conversation_of, budget)))
        assert budget.skipped == 1
    for a, b in zip(*both, strict=True):
        assert (a.messages, a.weights, a.tools) == (b.messages, b.weights, b.tools)
    assert both[0][0].messages[1] == {key: value for key, value in called.items() if key != "weight"}
    assert [found.where.removeprefix(str(tmp_path)) for found in both[0]] == [f"/a.parquet, row {n}" for n in (1, 2, 3)]


def turns(roles: str) -> Row:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": names[role], "content": "x"} for role in roles]}


FAULTS: dict[str, tuple[Any, str]] = {
    "no object": ([1], "a record is a list, not an object"),
    "no layout": ({"text": "a", "id": 1}, "no conversation in the fields text, id .*: accepted are messages, .*question"),
    "null answer": ({"question": "a", "answer": None}, "the field 'answer' is null"),
    "number": ({"question": "a", "answer": 3}, "the field 'answer' is a number, not a list"),
    "text for messages": ({"messages": "a"}, "the field 'messages' is str, not a list"),
    "empty": ({"messages": []}, "the field 'messages' has no messages"),
    "no message": ({"messages": ["a"]}, "message 1 of 'messages' is str, not an object"),
    "null content": (
        {"messages": [USER, {**BOT, "content": None}]},
        "the content of message 2 of 'messages' is null, not text",
    ),
    "content missing": ({"messages": [USER, {"role": "assistant"}]}, "the content of message 2 of 'messages' is null"),
    "content a number": ({"messages": [{**USER, "content": 3}, BOT]}, "the content of message 1 .* is a number, not text"),
    "an image": ({"messages": [{**USER, "content": [{"type": "image_url"}]}, BOT]}, "a part that is no text, 'image_url'"),
    "no role": ({"messages": [{"content": "a"}]}, "the role of message 1 of 'messages' is null"),
    "unknown role": ({"messages": [USER, {**BOT, "role": "robot"}]}, "the role of message 2 .* is 'robot'"),
    "surrogate": ({"question": "a", "answer": "ab\ud800"}, r"lone surrogate U\+D800 at character 2"),
    "surrogate in a call": (
        {"messages": [USER, {"role": "function_call", "content": '{"name": "a\\ud800", "arguments": {}}'}]},
        r"lone surrogate U\+D800",
    ),
    "nobody answers": (turns("u"), "no assistant says anything"),
    "empty answer": ({"question": "a", "answer": " \n"}, "message 2 is an empty answer"),
    "system late": (turns("usa"), "message 2 is out of order, system after user"),
    "two systems": (turns("ssua"), "message 2 is out of order, two system messages in a row"),
    "assistant first": (turns("au"), "message 1 is out of order, assistant after nothing"),
    "assistant after system": (turns("sau"), "message 2 is out of order, assistant after system"),
    "two users": (turns("uua"), "message 2 is out of order, two user messages in a row"),
    "two assistants": (turns("uaa"), "message 3 is out of order, two assistant messages in a row"),
    "tool without a call": (turns("uta"), "message 2 is out of order, tool after user"),
    "call is no JSON": ({"messages": [USER, {"role": "tool_call", "content": "{now"}]}, "the call in message 2 .* is no JSON"),
    "arguments missing": (
        {"messages": [USER, {**BOT, "tool_calls": [{"function": {"name": "now"}}]}]},
        "the arguments of 'now' in message 2 .* are null, not an object",
    ),
    "user calls": ({"messages": [{**USER, "tool_calls": [CALL]}, BOT]}, "message 1 .* calls a tool"),
    "tools": ({"messages": [USER, BOT], "tools": ["now"]}, "the field 'tools' is not a list of objects"),
    "history": ({"instruction": "a", "output": "b", "history": [["a"]]}, "'history' is not a list of .* pairs"),
    "history a number": ({"instruction": "a", "output": "b", "history": 3}, "'history' is not a list of .* pairs"),
    "negative weight": ({"messages": [USER, {**BOT, "loss_weight": -1}]}, "the loss_weight of message 2 .* is -1, not"),
    "half a weight": ({"messages": [USER, {**BOT, "weight": 0.5}]}, "the weight of message 2 .* is 0.5, not 0 or 1"),
    "train in words": ({"messages": [USER, {**BOT, "train": "no"}]}, "the train of message 2 .* is 'no', not true or false"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_conversation_is_named(name: str) -> None:
    record, what = FAULTS[name]
    with pytest.raises(
        DataError, match=rf"error\[3\] .*{what}.*\(a.jsonl:7\)|error\[3\] .*\(a.jsonl:7\): .*{what}|{what}"
    ) as found:
        conversation_of(record, "a.jsonl:7")
    assert found.value.where == "a.jsonl:7" and found.value.fix


@pytest.mark.parametrize("roles", ["ua", "sua", "uaua", "uatatua", "uatta", "uatua"])
def test_these_orders_are_fine(roles: str) -> None:
    assert len(conversation_of(turns(roles), "").messages) == len(roles)


YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
MORE, SYSTEM = {"role": "user", "content": "more"}, {"role": "system", "content": "s"}
CALLED = [{"role": "tool_call", "content": json.dumps(CALL["function"])}, {"role": "tool", "content": "12"}]
PAIRS: dict[str, tuple[Row, int]] = {
    "texts": ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, 1),
    "system": ({"system": "s", "question": "hi", "chosen": "yes", "rejected": "no"}, 2),
    "lists": ({"prompt": [USER, BOT, MORE], "chosen": [YES], "rejected": [NO]}, 3),
    "the prompt is in both": ({"prompt": "hi", "chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER, YES]}, 1),
    "the prompt is the last of both": (
        {"prompt": "more", "chosen": [USER, BOT, MORE, YES], "rejected": [USER, BOT, MORE, NO]},
        3,
    ),
    "system before both": ({"system": "s", "chosen": [USER, YES], "rejected": [USER, NO]}, 2),
    "nothing but both": ({"chosen": [USER, BOT, MORE, YES], "rejected": [USER, BOT, MORE, NO]}, 3),
    "prompt without system": ({"prompt": [USER], "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]}, 2),
    "one has more turns": ({"chosen": [USER, YES, MORE, NO], "rejected": [USER, NO]}, 1),
    "objects": (
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        1,
    ),
    "instruction": ({"instruction": "a", "input": "b", "chosen": "yes", "rejected": "no"}, 1),
    "other names": ({"chosen_messages": [USER, YES], "rejected_messages": [USER, NO]}, 1),
    "after a tool": ({"prompt": "hi", "chosen": [*CALLED, YES], "rejected": [*CALLED, NO]}, 3),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    record, prompt = PAIRS[name]
    found = preference_of(record, "a:1")
    a, b = found.chosen.messages, found.rejected.messages
    assert (
        found.prompt == prompt
        and a[:prompt] == b[:prompt]
        and a[prompt : prompt + 1] == (YES,)
        and b[prompt : prompt + 1] == (NO,)
    )


BAD_PAIRS: dict[str, tuple[Row, str]] = {
    "no rejected": ({"prompt": "hi", "chosen": "yes"}, "no pair of answers in the fields prompt, chosen"),
    "null": ({"prompt": "hi", "chosen": "yes", "rejected": None}, "the field 'rejected' is null"),
    "no prompt": ({"chosen": "yes", "rejected": "no"}, "no prompt in the fields chosen, rejected"),
    "identical": ({"prompt": "hi", "chosen": "yes", "rejected": "yes"}, "chosen and rejected are identical"),
    "empty": ({"prompt": "hi", "chosen": "yes", "rejected": " "}, "message 2 is an empty answer"),
    "prompts differ": ({"chosen": [USER, YES], "rejected": [MORE, NO]}, "different prompts, from message 1 on"),
    "one goes on": ({"chosen": [USER, YES], "rejected": [USER, YES, MORE, NO]}, "different prompts, from message 3 on"),
    "a user differs": ({"chosen": [USER, BOT, USER, YES], "rejected": [USER, BOT, MORE, NO]}, "from message 3 on"),
    "tools differ": (
        {"chosen": [USER, *CALLED, YES], "rejected": [USER, CALLED[0], {"role": "tool", "content": "13"}, NO]},
        "from message 3 on",
    ),
    "another prompt": ({"prompt": "ho", "chosen": [USER, YES], "rejected": [USER, NO]}, "'prompt' is not what"),
    "another list": ({"prompt": [MORE], "chosen": [USER, YES], "rejected": [USER, NO]}, "'prompt' is not what"),
    "answered prompt": ({"prompt": [USER, BOT], "chosen": "yes", "rejected": "no"}, "two assistant messages in a row"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_what_is_no_pair_is_named(name: str) -> None:
    record, what = BAD_PAIRS[name]
    with pytest.raises(DataError, match=what) as found:
        preference_of(record, "a.jsonl:7")
    assert found.value.where == "a.jsonl:7"


def test_labels() -> None:
    of = partial(labelled_of, where="a:1")
    found = of({"prompt": "hi", "completion": "yes", "label": 0, "system": "s"})
    assert (found.prompt, found.label, said(found.conversation)) == (2, False, ["s:s", "u:hi", "a:yes"])
    assert (of({**turns("uatuata"), "label": True}).prompt, of({**turns("uatuatau"), "label": 1}).label) == (4, True)
    assert of({"prompt": "hi", "completion": "yes", "good": True}, fields={"label": "good"}).label
    for label, what in ((None, "null"), (2, "2"), ("yes", "'yes'"), (1.0, "1.0")):
        with pytest.raises(DataError, match=f"'label' is {what}, not true or false"):
            of({"question": "q", "answer": "a", "label": label})
    with pytest.raises(DataError, match="no field 'label', only question, answer"):
        of({"question": "q", "answer": "a"})
    with pytest.raises(DataError, match="message 3 does not answer the prompt"):
        of({"prompt": [USER, BOT], "completion": [USER, BOT], "label": 1})
