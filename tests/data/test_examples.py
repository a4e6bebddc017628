"""Conversations as ids and weights: against transformers' masks and by hand; what is cut, dropped and counted; and what
another cache is made for. Whether masks are right is `test_audit.py`'s."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from maxi.data import bpe
from maxi.data.audit import wrong_mask
from maxi.data.cache import Item
from maxi.data.chat_template import ChatTemplate
from maxi.data.documents import Budget
from maxi.data.examples import SHOWN, Examples, Kind
from maxi.data.tokenizer import Tokenizer
from maxi.errors import DataError
from maxi.sections import ChatConfig, Source
from tests.data.chat_templates import QWEN3, says, user

END = "<|im_end|>"
TOLD = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 4}}}
SHOWN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 4}}\n</tool_call>'
TALK = [TOLD, user("the sea?"), says("calm"), user("the wind?"), says("dark\n\nrain")]


def turn(role: str, text: str) -> str:
    """A turn as chatml writes it."""
    return f"<|im_start|>{role}\n{text}{END}\n"


@dataclass(frozen=True)
class Made:
    """What became of rows."""

    items: list[Item]
    counts: dict[str, Any]
    tokenizer: Tokenizer

    def arrays(self, item: int = 0) -> list[tuple[list[int], list[float]]]:
        """(ids, weights) of each part of an item."""
        weights = self.items[item].weights
        assert weights is not None
        return [(a.tolist(), b.tolist()) for a, b in zip(self.items[item].parts, weights, strict=True)]

    def learned(self, item: int = 0) -> list[tuple[str, float]]:
        """What has weight in an item, as runs of (text, weight)."""
        pairs = [pair for ids, weights in self.arrays(item) for pair in zip(ids, weights, strict=True)]
        runs = groupby(pairs, lambda pair: pair[1])
        return [(self.tokenizer.decode(i for i, _ in run), weight) for weight, run in runs if weight]

    def text(self, item: int = 0) -> str:
        return self.tokenizer.decode(np.concatenate(self.items[item].parts))


Make = Callable[..., Made]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, prose: Callable[[int, int], str]) -> Tokenizer:
    """One that has a token for two line breaks and one for three."""
    texts = [prose(3000, 0), "the\n\nsea\n\n\nwas" * 500, "Ωμέγα 日本語 🎉"]
    made = bpe.train(texts, 320, tmp_path_factory.mktemp("tokenizer") / "tiny")
    assert [len(made.encode([text])[0]) for text in ("\n\n", "\n\n\n")] == [1, 1]
    return made


@pytest.fixture(scope="module")
def chatml(tokenizer: Tokenizer) -> Iterator[ChatTemplate]:
    with ChatTemplate(tokenizer, "chatml") as template:
        yield template


@pytest.fixture
def make(tokenizer: Tokenizer, chatml: ChatTemplate, tmp_path: Path) -> Make:
    """make(rows, kind, seq_len, tokenizer, template, **chat): the rows of a file through Examples."""

    def made(
        rows: list[dict[str, Any]],
        kind: Kind = "conversations",
        seq_len: int = 500,
        tokenizer: Tokenizer = tokenizer,
        template: ChatTemplate = chatml,
        **chat: Any,
    ) -> Made:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        counts: dict[str, Any] = {}
        content = Examples(kind, tokenizer, template, ChatConfig(**chat), seq_len)
        items = list(content.items(Source(path=str(path)), Budget(), counts))
        return Made(items, counts, tokenizer)

    return made


def size(tokenizer: Tokenizer, text: str) -> int:
    """The seq_len that a text needs, its last id being only a target."""
    return len(tokenizer.encode([text])[0]) - 1


# --- ids and weights ---

MARKED = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- m.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}"""


@pytest.mark.parametrize(
    "messages",
    [
        TALK,
        [user("Ωμέγα 日本語?"), says("🎉 e\u0301 日本 ")],
        [user("the\n\n"), says("a"), user("a"), says(" e  the  n\n")],
        [user("user"), says("user\n assistant"), user("\n"), says("im_end")],
    ],
)
def test_ids_and_weights_are_those_of_transformers(make: Make, tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> None:
    """Their mask comes from marks in the template, ours from chatml without marks."""
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
    marked = theirs.apply_chat_template(messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True)
    made = make([{"messages": messages}])
    ((ids, weights),) = made.arrays()
    end = len(marked["assistant_masks"]) - marked["assistant_masks"][::-1].index(1)
    assert ids == marked["input_ids"][:end] and weights == marked["assistant_masks"][:end]
    assert made.counts["answer_tokens"] == made.counts["trained_answer_tokens"]
    assert made.counts["trained_tokens"] == sum(marked["assistant_masks"])


@pytest.mark.parametrize("answer", ["\nthe", "\n\nthe", "\n \n日", " the"])
def test_an_answer_never_begins_inside_a_token_of_the_prompt(
    make: Make, tokenizer: Tokenizer, chatml: ChatTemplate, answer: str
) -> None:
    asked = [user("the sea?"), says("calm"), user("the wind?")]
    made = make([{"messages": [*asked, says(answer)]}])
    served = tokenizer.encode([chatml.prompt(asked)])[0].tolist()
    ((ids, weights),) = made.arrays()
    assert ids[: len(served)] == served and set(weights[len(served) :]) == {1} and not weights[len(served) - 1]
    assert made.learned() == [(f"calm{END}", 1), (f"{answer}{END}", 1)]
    if answer.startswith("\n"):  # or this shows nothing
        assert tokenizer.encode([made.text()])[0].tolist() != ids


A, B = (f"calm{END}", 1.0), (f"dark\n\nrain{END}", 1.0)


def weighted(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    return [*TALK[:2], TALK[2] | first, TALK[3], TALK[4] | second]


@pytest.mark.parametrize(
    ("messages", "chat", "expected"),
    [
        (TALK, {}, [A, B]),
        (TALK, {"train_on": "last"}, [B]),
        (weighted({"train": True}, {"train": False}), {"train_on": "last"}, [A]),
        (weighted({"weight": 0}, {"weight": 1}), {}, [B]),
        (weighted({"loss_weight": 0.5}, {"loss_weight": 2}), {}, [(A[0], 0.5), (B[0], 2.0)]),
        (weighted({"loss_weight": 0.0}, {}), {"train_on": "all"}, [B]),
    ],
)
def test_what_is_learned(make: Make, messages: list[dict[str, Any]], chat: dict[str, Any], expected: list[Any]) -> None:
    made = make([{"messages": messages}], **chat)
    assert made.learned() == expected and wrong_mask(made.counts) is None
    assert made.counts["excluded_turns"] == 2 - len(expected)


def test_all_is_learned_but_the_first_id_and_what_the_row_forbids(make: Make, tokenizer: Tokenizer) -> None:
    made = make([{"messages": TALK}], train_on_prompt=True)
    text = "".join(turn(message["role"], message["content"]) for message in TALK)
    assert made.learned() == [(text, 1)]
    assert made.counts["tokens"] == size(tokenizer, text) + 1 == made.counts["trained_tokens"] + 1
    assert made.counts["answer_tokens"] == made.counts["trained_answer_tokens"] and not made.counts["leaked_tokens"]
    forbidden = make([{"messages": weighted({"train": False}, {"loss_weight": 3})}], train_on_prompt=True)
    before = text.index("calm")
    middle = text[before + len(A[0]) : text.index("dark")]
    assert forbidden.learned() == [(text[:before], 1), (middle, 1), (B[0], 3), ("\n", 1)]
    assert forbidden.counts["excluded_turns"] == 1


def test_calls_are_learned_and_what_tools_say_is_not(make: Make) -> None:
    messages = [user("2+2"), says("", tool_calls=[CALL]), {"role": "tool", "content": "4"}, says("4")]
    made = make([{"messages": messages}])
    assert made.learned() == [(SHOWN_CALL + END, 1), (f"4{END}", 1)]
    assert made.counts["turns"] == made.counts["ended_turns"] == 2 and wrong_mask(made.counts) is None


# --- too long ---

FIRST = [user("2+2"), says("", tool_calls=[CALL]), {"role": "tool", "content": "4"}, says("4")]
SECOND = [user("the rain"), says("the dark")]
THIRD = [user("the bread"), says("home")]
TOOL_TEXT = turn("user", "2+2") + turn("assistant", SHOWN_CALL)
TOOL_TEXT += f"<|im_start|>user\n<tool_response>\n4\n</tool_response>{END}\n" + turn("assistant", "4")
SECOND_TEXT = turn("user", "the rain") + turn("assistant", "the dark")
THIRD_TEXT = turn("user", "the bread") + turn("assistant", "home")[:-1]


def test_too_long_is_dropped_and_counted(make: Make, tokenizer: Tokenizer) -> None:
    rows = [{"messages": SECOND + THIRD}, {"messages": THIRD}] * (SHOWN + 1)
    made = make(rows, seq_len=size(tokenizer, THIRD_TEXT))
    assert [made.text(n) for n in range(len(made.items))] == [THIRD_TEXT] * (SHOWN + 1)
    assert made.counts["dropped_too_long"] == SHOWN + 1 == made.counts["kept"] and made.counts["rows"] == 2 * (SHOWN + 1)
    named = [Path(where).name for where in made.counts["dropped"]["dropped_too_long"]]
    assert named == [f"rows.jsonl:{line}" for line in range(1, 2 * SHOWN, 2)]
    assert made.counts["turns"] == SHOWN + 1  # nothing of dropped rows is counted
    with pytest.raises(DataError, match=r"of 12 rows 0 have nothing to learn and 12 are over seq_len .*such as rows.jsonl:1"):
        make(rows, seq_len=size(tokenizer, THIRD_TEXT) - 1)


@pytest.mark.parametrize("told", [[], [TOLD]])
def test_whole_exchanges_go_from_the_left(make: Make, tokenizer: Tokenizer, told: list[dict[str, Any]]) -> None:
    """The oldest first, its tools with it; the system's message stays."""
    head = "".join(turn("system", message["content"]) for message in told)
    whole = head + TOOL_TEXT + SECOND_TEXT + THIRD_TEXT
    rows = [{"messages": [*told, *FIRST, *SECOND, *THIRD]}]
    expected = {size(tokenizer, whole): whole, size(tokenizer, whole) - 1: head + SECOND_TEXT + THIRD_TEXT}
    expected[size(tokenizer, head + SECOND_TEXT + THIRD_TEXT) - 1] = head + THIRD_TEXT
    for number, (seq_len, text) in enumerate(expected.items()):
        made = make(rows, seq_len=seq_len, too_long="truncate_left")
        assert made.text() == text and made.counts["cut_left"] == min(number, 1)
        assert made.learned()[-1] == (f"home{END}", 1) and len(made.learned()) == [4, 2, 1][number]
        assert made.counts["turns"] == made.counts["ended_turns"] and not made.counts["leaked_tokens"]
    lost = [*rows, {"messages": [*THIRD[:1], says("a")]}]
    made = make(lost, seq_len=size(tokenizer, head + THIRD_TEXT) - 1, too_long="truncate_left", max_dropped=0.5)
    assert made.counts["dropped_answer_lost"] == 1 and not made.counts["cut_left"] and made.learned() == [(f"a{END}", 1)]


def test_what_the_right_cut_takes_is_counted(make: Make, tokenizer: Tokenizer) -> None:
    """An answer loses its end; an answer that is gone altogether takes its row with it."""
    rows = [{"messages": SECOND}, {"messages": [user("the rain " * 9), says("a")]}]
    made = make(rows, seq_len=size(tokenizer, SECOND_TEXT) - 2, too_long="truncate_right", max_dropped=0.5)
    assert [made.text(n) for n in range(len(made.items))] == [SECOND_TEXT[: -len(END) - 1]]
    assert made.learned() == [("the dark", 1)]
    counted = ("rows", "kept", "cut_right", "cut_turns", "dropped_answer_lost")
    assert {name: made.counts[name] for name in counted} == dict(zip(counted, (2, 1, 1, 1, 1), strict=True))
    assert not made.counts["turns"] and made.counts["answer_tokens"] == made.counts["trained_answer_tokens"] > 0
    with pytest.raises(DataError, match=r"of 2 rows 1 have nothing to learn .*such as rows.jsonl:2\): raise seq_len"):
        make(rows, seq_len=size(tokenizer, SECOND_TEXT) - 2, too_long="truncate_right", max_dropped=0.49)


def test_a_pair_is_cut_on_both_sides_or_dropped(make: Make, tokenizer: Tokenizer) -> None:
    row = {"prompt": [TOLD, *SECOND, THIRD[0]], "chosen": "home", "rejected": "the dark rain"}
    longer = turn("system", "Be brief.") + SECOND_TEXT + turn("user", "the bread") + turn("assistant", "the dark rain")[:-1]
    assert make([row], "preferences", size(tokenizer, longer)).counts["kept"] == 1
    with pytest.raises(DataError, match="1 are over seq_len"):
        make([row], "preferences", size(tokenizer, longer) - 1)
    left = make([row], "preferences", size(tokenizer, longer) - 1, too_long="truncate_left")
    prompt, chosen, rejected = (tokenizer.decode(part) for part in left.items[0].parts)
    shared = turn("system", "Be brief.") + turn("user", "the bread")
    assert (prompt + chosen, prompt + rejected) == tuple(
        shared + turn("assistant", answer)[:-1] for answer in ("home", "the dark rain")
    )
    right = make([row], "preferences", size(tokenizer, longer) - 1, too_long="truncate_right")
    assert right.learned() == [(f"home{END}the dark rain", 1)] and right.counts["cut_turns"] == 1
    assert right.counts["turns"] == right.counts["ended_turns"] == 1


# --- system prompts ---


def system_of(made: Made, item: int) -> str | None:
    text = made.text(item)
    start = "<|im_start|>system\n"
    return text[len(start) : text.index(END)] if text.startswith(start) else None


def test_rows_without_a_system_prompt_get_one(make: Make) -> None:
    rows = [{"messages": SECOND}, {"messages": [TOLD, *SECOND]}, {"messages": SECOND, "kind": "a"}]
    assert [system_of(make(rows, system="sing"), n) for n in range(3)] == ["sing", "Be brief.", "sing"]
    assert [system_of(make(rows), n) for n in range(3)] == [None, "Be brief.", None]
    by_kind = {"system_by": "kind", "system_prompts": {"a": "of a", "b": "of b"}}
    rows = [{**row, "kind": kind} for row, kind in zip(rows, ("b", "a", None), strict=True)]
    assert [system_of(make(rows, **by_kind), n) for n in range(3)] == ["of b", "Be brief.", None]
    assert system_of(make(rows[:1], system="sing", **by_kind), 0) == "sing"
    with pytest.raises(DataError, match=r"no field 'sort', only .*rows.jsonl:1"):
        make(rows, system_by="sort")


def test_a_share_of_rows_is_drawn_once_and_for_all(make: Make, prose: Callable[[int, int], str]) -> None:
    rows = [{"prompt": prose(4, n), "chosen": f"the {prose(2, n)}", "rejected": f"a {prose(2, n)}"} for n in range(100)]
    chat = {"system": "sing", "system_share": 0.3, "system_by": "kind", "system_prompts": {"a": "of a"}}
    rows = [{**row, "kind": "a"} for row in rows]
    made, backwards = make(rows, "preferences", **chat), make(rows[::-1], "preferences", **chat)
    drawn = [system_of(made, n) for n in range(100)]
    assert drawn == [system_of(backwards, n) for n in range(100)][::-1]
    assert set(drawn) == {"sing", "of a"} and 15 < drawn.count("sing") < 45
    for item in made.items:  # both answers follow the same one
        assert all(made.tokenizer.decode(part).count("<|im_start|>") == 0 for part in item.parts[1:])
        assert made.tokenizer.decode(item.parts[0]).count("<|im_start|>") == 3
    answers = [{"prompt": row["prompt"], "completion": row["rejected"], "kind": "a"} for row in rows]
    alone = make(answers, **chat)
    assert drawn == [system_of(alone, n) for n in range(100)]


# --- pairs and labels ---


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("the sea", "bread"), ("the sea", "the rain"), ("", "the rain"), ("\n\nthe", "\nthe"), ("a", "a b")],
)
def test_the_prompt_of_a_pair_is_what_is_served(
    make: Make, tokenizer: Tokenizer, chatml: ChatTemplate, chosen: str, rejected: str
) -> None:
    """Though both answers begin alike; and whatever the row says of the turns before."""
    first = chosen or [says("", tool_calls=[CALL])]
    rows = [{"prompt": [user("hi"), says("go on", weight=1), user("and?")], "chosen": first, "rejected": rejected}]
    made = make(rows, "preferences")
    prompt, one, other = made.items[0].parts
    asked = chatml.prompt([user("hi"), says("go on"), user("and?")])
    assert prompt.tolist() == tokenizer.encode([asked])[0].tolist()
    expected = [text + END for text in (chosen or SHOWN_CALL, rejected)]
    assert [tokenizer.decode(one), tokenizer.decode(other)] == expected
    assert [set(weights) for _, weights in made.arrays()] == [{0}, {1}, {1}]
    assert made.counts["turns"] == made.counts["ended_turns"] == 2 and wrong_mask(made.counts) is None


def test_the_prompt_ends_before_ids_that_differ(make: Make, tokenizer: Tokenizer) -> None:
    """What is not learned may differ too: a call that the rows leave out, and so all behind it is each answer's own."""
    words = ("the sea", "the rain")
    branches = [[says(text, weight=0), user("so?"), says("so")] for text in words]
    made = make([{"prompt": "hi", "chosen": branches[0], "rejected": branches[1]}], "preferences")
    texts = [
        turn("user", "hi") + turn("assistant", text) + turn("user", "so?") + turn("assistant", "so")[:-1] for text in words
    ]
    one, other = (ids.tolist() for ids in tokenizer.encode(texts))
    common = next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    assert tokenizer.decode(one[:common]).endswith("assistant\nthe ")
    assert [part.tolist() for part in made.items[0].parts] == [one[:common], one[common:], other[common:]]
    assert made.learned() == [(f"so{END}", 1)] * 2


def test_answers_that_are_rendered_alike_are_dropped(make: Make) -> None:
    """Unicode has two spellings of é, and the tokenizer one."""
    rows = [{"prompt": "hi", "chosen": "e\u0301", "rejected": "é"}, {"prompt": "hi", "chosen": "the", "rejected": "a"}]
    made = make(rows, "preferences", max_dropped=0.5)
    assert len(made.items) == 1 and [Path(w).name for w in made.counts["dropped"]["dropped_nothing_to_learn"]] == [
        "rows.jsonl:1"
    ]
    assert made.counts["turns"] == 2 and made.counts["tokens"] == sum(map(len, made.items[0].parts)) + len(
        made.items[0].parts[0]
    )
    with pytest.raises(DataError, match="1 have nothing to learn"):
        make(rows, "preferences")


def test_labels(make: Make, tokenizer: Tokenizer, chatml: ChatTemplate) -> None:
    rows = [{"prompt": [TOLD, user("hi")], "completion": text, "label": text == "the"} for text in ("the", "a")]
    made = make(rows, "labels")
    served = tokenizer.encode([chatml.prompt([TOLD, user("hi")])])[0].tolist()
    assert [item.label for item in made.items] == [1, 0]
    assert [item.parts[0].tolist() for item in made.items] == [served] * 2
    assert [tokenizer.decode(item.parts[1]) for item in made.items] == [f"the{END}", f"a{END}"]
    assert [set(weights) for item in range(2) for _, weights in made.arrays(item)] == [{0}, {1}] * 2


# --- templates that drop what was thought ---

THOUGHT = [user("hi"), says("the sea", reasoning_content="who?"), user("and?"), says("home", reasoning_content="so\nso")]


def test_thinking_is_learned_where_the_template_shows_it(make: Make, tokenizer: Tokenizer) -> None:
    with ChatTemplate(tokenizer, QWEN3) as template:
        made = make([{"messages": THOUGHT}], template=template)
        assert made.learned() == [(f"the sea{END}", 1), (f"<think>\nso\nso\n</think>\n\nhome{END}", 1)]
        assert not made.counts["other_prefix"] and not made.counts["altered_turns"]
        inline = [THOUGHT[0], says("<think>\nwho?\n</think>\n\nthe sea"), *THOUGHT[2:]]
        same = make([{"messages": inline}], template=template)
        assert same.learned() == made.learned() and same.counts["altered_turns"] == 1
        assert same.counts["answer_tokens"] == same.counts["trained_answer_tokens"] > made.counts["answer_tokens"]
        cut = size(tokenizer, made.text()) - 1
        left = make([{"messages": THOUGHT}], template=template, seq_len=cut, too_long="truncate_left")
        assert left.learned() == made.learned()[1:] and left.text().startswith("<|im_start|>user\nand?")


def test_rows_with_a_wrong_mask_are_named(make: Make, monkeypatch: pytest.MonkeyPatch, chatml: ChatTemplate) -> None:
    render = chatml.render

    def late(messages: Any, *more: Any) -> Any:
        text, turns = rendered = render(messages, *more)
        return rendered if "rain" not in text else (rendered._replace(turns=[t._replace(start=t.start + 4) for t in turns]))

    monkeypatch.setattr(chatml, "render", late)
    made = make([{"messages": THIRD}, {"messages": SECOND}])
    assert [Path(where).name for where in made.counts["wrong_rows"]] == ["rows.jsonl:2"]
    assert "answer tokens are not trained" in (wrong_mask(made.counts) or "")


# --- what makes a cache another one ---


def test_the_identity_is_all_that_decides_the_items(tokenizer: Tokenizer, chatml: ChatTemplate) -> None:
    def identity(
        kind: Kind = "conversations", template: Any = chatml, seq_len: int = 64, question: str = "q", **chat: Any
    ) -> str:
        content = Examples(kind, tokenizer, template, ChatConfig(**chat), seq_len)
        return json.dumps(content.identity(Source(path="x", fields={"question": question})), sort_keys=True)

    first = identity()
    assert first == identity(pack=False, share_prompt=False)
    policies = [
        {"train_on": "last"},
        {"train_on_prompt": True},
        {"too_long": "truncate_left"},
        {"max_dropped": 0.5},
        {"system": "sing"},
        {"system": "sing", "system_share": 0.5},
        {"system_by": "kind"},
        {"system_by": "kind", "system_prompts": {"a": "of a"}},
        {"template_kwargs": {"date": "today"}},
    ]
    others = [identity(**chat) for chat in policies]
    with ChatTemplate(tokenizer, QWEN3) as other:
        others += [identity(template=other), identity("preferences"), identity(seq_len=65), identity(question="asked")]
    assert len({first, *others}) == 1 + len(policies) + 4
