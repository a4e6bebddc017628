"""Whether the mask of tokenised conversations is right: what is learned, against the words that the rows hold.

It does not trust the spans of `chat_template.py`, which the mask is made of: it looks for the words of every message in
the rendered text and counts which of their ids are targets, so that a mask that misses half of the answers cannot go
unseen. Words may stand in several places (an answer `a` in `<|im_start|>`, a tool's `4` in the call that asked for it);
of these the one counts that speaks for the mask, because a wrong mask is wrong for other messages too.
"""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from maxi.data.chat_template import Rendered, Turn
from maxi.data.messages import Conversation, Message


class Sample(NamedTuple):
    """A tokenised conversation: ids int32 [n], weights float32 [n] of each id as a target, offsets [n, 2] into the text;
    `wanted` are the messages that are meant to be learned."""

    conversation: Conversation
    rendered: Rendered
    wanted: frozenset[int]
    ids: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray

    @property
    def learns(self) -> bool:
        """Whether any id is a target; the first one never is, as nothing comes before it."""
        return bool((self.weights[1:] > 0).any())

    def inside(self, start: int, stop: int) -> slice:
        """The ids that have text in [start, stop)."""
        first = np.searchsorted(self.offsets[:, 1], start, "right")
        return slice(int(first), max(int(first), int(np.searchsorted(self.offsets[:, 0], stop))))


COUNTS = (
    *("answer_tokens", "trained_answer_tokens", "turns", "ended_turns", "cut_turns", "excluded_turns"),
    *("leaked_tokens", "altered_turns", "other_prefix"),
)
"""What `audit` counts."""


def audit(samples: Sequence[Sample], end_token_id: int, control: Container[int]) -> Counter[str]:
    """Counts over the assistant turns that are meant to be learned; `control` are the ids of tokens that are no text.

    answer_tokens: those of the turn's words, or of the whole turn where it has none, or not as they are;
    trained_answer_tokens: of these, those with weight. turns, ended_turns: whose end token is there and has weight.
    cut_turns: whose end was cut off. leaked_tokens: tokens with weight in the words of other messages. altered_turns: whose
    words are not in the text as they are. excluded_turns: left out by policy or by the row. other_prefix: turns that
    serving begins after another text.
    """
    found: Counter[str] = Counter()
    for sample in samples:
        said: list[range] = []  # where the words of what is learned stand
        for number in sorted(sample.wanted):
            said += _learned(found, sample, number, said[-1].stop if said else 0, end_token_id, control)
        for number in range(len(sample.conversation.messages)):
            if number not in sample.wanted:
                _not_learned(found, sample, number, said)
    return found


def wrong_mask(counts: Mapping[str, int]) -> str | None:
    """What is wrong with the mask that was counted, or None."""
    if counts["leaked_tokens"]:
        return f"{counts['leaked_tokens']:,} tokens of users, tools, the system or answers to leave out are trained"
    if counts["trained_answer_tokens"] < counts["answer_tokens"]:
        missing = counts["answer_tokens"] - counts["trained_answer_tokens"]
        return f"{missing:,} of {counts['answer_tokens']:,} answer tokens are not trained"
    if counts["ended_turns"] < counts["turns"]:
        return f"{counts['turns'] - counts['ended_turns']:,} of {counts['turns']:,} answers are trained without their end token"
    return None


def _learned(
    found: Counter[str], sample: Sample, number: int, at: int, end_token_id: int, control: Container[int]
) -> list[range]:
    """Counts a message whose words stand behind `at`; returns where they do."""
    message, trained = sample.conversation.messages[number], sample.weights > 0
    _, own, after = _around(sample, number)
    places = _places(sample, number, at, after.start if after else len(sample.rendered.text))
    here = min(places, key=lambda place: (~trained[sample.inside(place.start, place.stop)]).sum(), default=None)
    found["altered_turns"] += int(here is None and bool(_words(message)))
    if own is None:
        if here is not None:  # it is in the text, but nobody learns it
            found.update(turns=1, answer_tokens=len(sample.ids[sample.inside(here.start, here.stop)]))
        return []
    whole = sample.inside(own.start, own.end)
    cut = own.end > sample.offsets[-1, 1]
    tokens = trained[whole if cut or here is None else sample.inside(here.start, here.stop)]
    found.update(answer_tokens=len(tokens), trained_answer_tokens=int(tokens.sum()))
    if cut:
        found["cut_turns"] += 1
    else:
        last = int(sample.ids[whole][-1])
        ended = last == end_token_id or ("tool_calls" in message and last in control)  # a call may end in its own way
        found.update(turns=1, ended_turns=int(ended and trained[whole][-1]), other_prefix=int(not own.prefix_ok))
    return [here] if here else []


def _not_learned(found: Counter[str], sample: Sample, number: int, said: Sequence[range]) -> None:
    """Counts a message of another role, or an answer that was left out; what is learned may well repeat its words."""
    message, trained = sample.conversation.messages[number], sample.weights > 0
    # the first id has weight where all that the row does not forbid is learned, and nowhere else
    if trained[0] and not (message["role"] == "assistant" and sample.conversation.weights[number] == 0):
        return
    found["excluded_turns"] += int(message["role"] == "assistant")
    before, own, after = _around(sample, number)
    # some templates show the system's message with the last question
    stop = after.end if after and message["role"] != "system" else len(sample.rendered.text)
    places = _places(sample, number, before.start if before else 0, stop)
    places = [place for place in places if not any(p.start <= place.start and place.stop <= p.stop for p in said)]
    if not places and own:
        places = [range(own.start, own.end)]
    found["leaked_tokens"] += min((int(trained[sample.inside(p.start, p.stop)].sum()) for p in places), default=0)


def _around(sample: Sample, number: int) -> tuple[Turn | None, Turn | None, Turn | None]:
    """The turn before message `number`, its own, and the one after it."""
    before = own = None
    for turn in sample.rendered.turns:
        if turn.message > number:
            return before, own, turn
        before, own = (turn, own) if turn.message < number else (before, turn)
    return before, own, None


def _words(message: Message) -> str:
    return str(message.get("content") or "").strip()


def _places(sample: Sample, number: int, start: int, stop: int) -> list[range]:
    """Where in text[start:stop] the words of a message stand; nowhere when it has none."""
    text, words, found = sample.rendered.text, _words(sample.conversation.messages[number]), []
    at = text.find(words, start, stop) if words else -1
    while at >= 0:
        found.append(range(at, at + len(words)))
        at = text.find(words, at + 1, stop)
    return found
