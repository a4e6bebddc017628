"""The audit: right masks are right whatever the words are, and wrong ones are seen, though the spans they come from are
all that it is told of where turns are."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from maxi.data.audit import Sample, audit, wrong_mask
from maxi.data.chat_template import ChatTemplate
from maxi.data.documents import Budget
from maxi.data.examples import Examples
from maxi.data.tokenizer import Tokenizer
from maxi.sections import ChatConfig, Source
from tests.data.chat_templates import ADD, CONTROL, CONVERSATIONS, TEMPLATES, says, user

END = "<|im_end|>"
TALK = [{"role": "system", "content": "Be brief."}, user("the sea?"), says("calm"), user("the wind?"), says("dark\n\nrain")]
SHORT = [user("b, e or n?"), says("e"), user("n"), says("n"), user("|"), says("start"), user("im"), says("user")]
ECHO = [user("say home"), says("home"), user("home"), says("say home"), user("say home"), says("home")]
CALLED = [user("1+1?"), says("", tool_calls=[ADD]), {"role": "tool", "content": "add"}, says("add, a"), user("a"), says("<é>")]

POLICIES: list[dict[str, Any]] = [{}, {"train_on": "last"}, {"train_on_prompt": True}]

Make = Callable[..., Sample]


@pytest.fixture(scope="module")
def chatml(tokenizer: Tokenizer) -> Iterator[ChatTemplate]:
    with ChatTemplate(tokenizer, "chatml") as template:
        yield template


@pytest.fixture
def make(tokenizer: Tokenizer, chatml: ChatTemplate, tmp_path: Path) -> Make:
    """make(messages, **chat): a conversation as it is before anything is cut."""

    def made(messages: list[dict[str, Any]], **chat: Any) -> Sample:
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"messages": messages}))
        examples = Examples("conversations", tokenizer, chatml, ChatConfig(**chat), 500)
        return next(examples.samples(Source(path=str(path)), Budget()))[0]

    return made


@pytest.fixture
def verdict(chatml: ChatTemplate) -> Callable[[Sample], str]:
    """verdict(sample): what is wrong with it, or nothing."""
    return lambda found: wrong_mask(audit([found], chatml.end_token_id, ())) or ""


def weighing(found: Sample, start: int, stop: int, weight: float) -> Sample:
    """The sample with another weight on what is in text[start:stop]."""
    weights = found.weights.copy()
    weights[found.inside(start, stop)] = weight
    assert (weights != found.weights).any()
    return found._replace(weights=weights)


def spanning(found: Sample, number: int, start: int, end: int) -> Sample:
    """The sample as it would be had its turn `number` been taken for text[start:end]."""
    turns = list(found.rendered.turns)
    turns[number] = turns[number]._replace(start=start, end=end)
    weights = np.zeros_like(found.weights)
    for turn in turns:
        weights[found.inside(turn.start, turn.end)] = 1
    return found._replace(rendered=found.rendered._replace(turns=tuple(turns)), weights=weights)


@pytest.mark.parametrize("chat", POLICIES, ids=str)
@pytest.mark.parametrize("messages", [TALK, SHORT, ECHO, CALLED], ids=["talk", "short", "echo", "called"])
def test_a_right_mask_is_right(make: Make, verdict: Any, chatml: ChatTemplate, messages: Any, chat: dict[str, Any]) -> None:
    """Also of words that stand in headers, control tokens, questions and calls as well."""
    found = make(messages, **chat)
    counts = audit([found], chatml.end_token_id, ())
    assert verdict(found) == "" and counts["answer_tokens"] == counts["trained_answer_tokens"] > 0
    answers = sum(message["role"] == "assistant" for message in messages)
    excluded = answers - 1 if "train_on" in chat else 0
    assert counts["turns"] == counts["ended_turns"] == answers - excluded and counts["excluded_turns"] == excluded
    assert not counts["altered_turns"] + counts["cut_turns"] + counts["other_prefix"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_right_masks_of_many_templates(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Some change what was said, show the system's message elsewhere, or end a call with a token of its own."""
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
    theirs.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": CONTROL})
    theirs.chat_template = TEMPLATES[name]
    ours, path = Tokenizer(theirs, tokenizer.folder), tmp_path / "a.jsonl"
    talks = [talk for which, talk in CONVERSATIONS.items() if (name, which) not in (("llama2", "called"), ("llama2", "longer"))]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    with ChatTemplate(ours) as template:
        for policy in POLICIES:
            counts: dict[str, Any] = {}
            content = Examples("conversations", ours, template, ChatConfig(**policy), 900)
            assert len(list(content.items(Source(path=str(path)), Budget(), counts))) == len(talks)
            assert wrong_mask(counts) is None and counts["answer_tokens"] > 0 and counts["wrong_rows"] == []
            assert counts["turns"] + counts["excluded_turns"] == sum(m["role"] == "assistant" for talk in talks for m in talk)


def test_an_answer_may_quote_what_the_template_shows_otherwise(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What a tool said stands in the text as JSON, so its words are found in the answer alone."""
    path, said = tmp_path / "a.jsonl", '{"n": 4}'
    path.write_text(json.dumps({"messages": [*CALLED[:2], {"role": "tool", "content": said}, says(f"It says {said}.")]}))
    written = TEMPLATES["qwen25"].replace("+ message.content +", "+ (message.content | tojson) +")
    with ChatTemplate(tokenizer, written) as template:
        counts: dict[str, Any] = {}
        list(Examples("conversations", tokenizer, template, ChatConfig(), 500).items(Source(path=str(path)), Budget(), counts))
    assert wrong_mask(counts) is None and counts["turns"] == 2


def test_weights_that_are_wrong_are_seen(make: Make, verdict: Any) -> None:
    found = make(TALK)
    text = found.rendered.text
    # all before the last line break of an answer is masked, as masks that go by lines do
    assert verdict(weighing(found, text.index("dark"), text.index("rain"), 0)).endswith("answer tokens are not trained")
    assert verdict(weighing(found, text.index("calm"), text.index("calm") + 4, 0)).endswith("answer tokens are not trained")
    assert verdict(weighing(found, text.rindex(END), len(text), 0)) == "1 of 2 answers are trained without their end token"
    for words in ("brief", "the sea?", "wind"):
        leaked = weighing(found, text.index(words), text.index(words) + len(words), 1)
        assert verdict(leaked).endswith("tokens of users, tools, the system or answers to leave out are trained")
    both = make(TALK, train_on="last")._replace(weights=found.weights)
    assert verdict(both).endswith("answers to leave out are trained")
    forbidden = [*TALK[:2], TALK[2] | {"train": False}, *TALK[3:]]
    everything = make(forbidden, train_on_prompt=True)
    assert verdict(everything) == ""
    everything.weights[:] = 1
    assert verdict(everything).endswith("answers to leave out are trained")


def test_spans_that_are_wrong_are_seen(make: Make, verdict: Any) -> None:
    found = make(TALK)
    text, (first, last) = found.rendered.text, found.rendered.turns
    assert verdict(spanning(found, 0, first.start, first.end)) == ""
    for start in (text.index("the wind?"), text.index("wind")):
        assert verdict(spanning(found, 1, start, last.end)).endswith("are trained")
    assert verdict(spanning(found, 0, first.start, last.start)).endswith("are trained")
    assert verdict(spanning(found, 1, text.index("rain"), last.end)).endswith("answer tokens are not trained")
    assert verdict(spanning(found, 1, last.start, text.index("\n\nrain"))).endswith("answer tokens are not trained")
    assert verdict(spanning(found, 1, last.start, last.end - len(END))).endswith("without their end token")
    question = text.index("the sea?")
    assert verdict(spanning(found, 0, question, question + len("the sea?") + len(END))).endswith("are trained")
    overlooked = found._replace(rendered=found.rendered._replace(turns=found.rendered.turns[1:]))
    assert verdict(weighing(overlooked, first.start, first.end, 0)).endswith("answer tokens are not trained")


def test_a_right_mask_of_a_cut_answer_is_right(make: Make, verdict: Any, chatml: ChatTemplate) -> None:
    found = make(TALK)
    cut = found._replace(ids=found.ids[:-3], weights=found.weights[:-3], offsets=found.offsets[:-3])
    counts = audit([cut], chatml.end_token_id, ())
    assert verdict(cut) == "" and (counts["cut_turns"], counts["turns"]) == (1, 1)
    assert counts["answer_tokens"] == counts["trained_answer_tokens"] > 0
    assert verdict(weighing(cut, cut.rendered.text.index("dark"), len(cut.rendered.text), 0)).endswith("are not trained")
