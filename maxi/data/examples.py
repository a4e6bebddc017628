"""Conversations as content of a cache: rendered by the chat template, tokenised, cut by policy, and audited on the way.

    sft        one part: the conversation up to its last learned token; weights say which ids are targets
    dpo        three parts: the ids that both answers begin with, and the rest of each
    kto        two parts and a label: the ids before the answer, and the answer

The audit does not trust the spans of `chat_template.py`: it looks for the words of every message in the rendered text and
counts which of their tokens are targets, so that a mask that misses half of the answers cannot go unseen.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from maxi.config import ChatConfig, Source
from maxi.data import documents, messages
from maxi.data.cache import Counts, Item, TokenCache
from maxi.data.chat_template import ChatTemplate, Rendered
from maxi.data.documents import Budget
from maxi.data.messages import Conversation, Labelled, Message, Preference
from maxi.data.rows import Rows
from maxi.data.sample_rows import PairRows, SampleRows
from maxi.data.tokenizer import Tokenizer
from maxi.errors import DataError

Kind = Literal["conversations", "preferences", "labels"]

SHOWN = 5
"""How many dropped rows are remembered by name for each reason."""
AT_ONCE = 128
"""Conversations that are tokenised together."""

READERS = {
    "conversations": messages.conversation_of,
    "preferences": messages.preference_of,
    "labels": messages.labelled_of,
}


class Sample(NamedTuple):
    """A tokenised conversation: ids int32 [n], weights float32 [n] of each id as a target, offsets [n, 2] into the text;
    `wanted` are the messages that are meant to be learned."""

    conversation: Conversation
    rendered: Rendered
    wanted: frozenset[int]
    ids: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray


class _Drop(Exception):
    """Why a row is left out: the name of a count."""


class Examples:
    """See `maxi.data.cache.Content`; `template` renders what `tokenizer` then encodes."""

    has_weights = True

    def __init__(self, kind: Kind, tokenizer: Tokenizer, template: ChatTemplate, chat: ChatConfig, seq_len: int):
        self.kind, self.vocab_size, self.has_labels = kind, tokenizer.vocab_size, kind == "labels"
        self.noun = {"conversations": "conversations", "preferences": "pairs", "labels": "answers"}[kind]
        self._tokenizer, self._template, self._chat, self._seq_len = tokenizer, template, chat, seq_len

    def identity(self, source: Source) -> Any:
        chat = {name: value for name, value in asdict(self._chat).items() if name not in ("pack", "share_prompt", "template")}
        return {
            "kind": self.kind,
            "fields": source.fields,
            "tokenizer": self._tokenizer.fingerprint(),
            "template": self._template.text,
            "chat": chat,
            "seq_len": self._seq_len,
        }

    def rows(self, cache: TokenCache, keep_partial: bool) -> Rows:  # noqa: ARG002
        if self.kind == "conversations":
            return SampleRows(cache, self._seq_len, pack=self._chat.pack)
        return PairRows(cache, self._seq_len, pack=self._chat.pack, share_prompt=self._chat.share_prompt)

    def items(self, source: Source, budget: Budget, counts: Counts) -> Iterator[Item]:
        tally = Counter(dict.fromkeys(COUNTS, 0))
        gone: dict[str, list[str]] = {}
        read = documents.records(source, lambda record, where: self._read(record, where, source), budget)
        while group := list(islice(read, AT_ONCE)):
            tally["rows"] += len(group)
            samples = iter(self._encode([conversation for _, row in group for conversation in row]))
            for whole, row in group:
                mine = list(islice(samples, len(row)))
                try:
                    item = self._item(whole, mine, tally)
                except _Drop as drop:
                    tally[str(drop)] += 1
                    gone.setdefault(str(drop), []).append(mine[0].conversation.where)
                    continue
                tally["kept"] += 1
                yield item
        counts.update(tally)
        counts["dropped"] = {reason: where[:SHOWN] for reason, where in gone.items()}
        self._check_dropped(tally, source)

    def describe(self, meta: dict[str, Any]) -> list[str]:
        return describe(meta["counts"])

    def samples(self, source: Source, budget: Budget) -> Iterator[Sample]:
        """The tokenised conversations of a source as training would see them but for length, for showing to a person."""
        for _, row in documents.records(source, lambda record, where: self._read(record, where, source), budget):
            yield from self._encode(row)

    def _read(self, record: Any, where: str, source: Source) -> tuple[Any, list[tuple[Conversation, Rendered, int]]]:
        """A row as it is, and each conversation in it with its text and the first message that is learned from."""
        whole = READERS[self.kind](record, where, source.fields, self._chat.system_by)
        if isinstance(whole, Conversation):
            parts, first = [whole], 0
        elif isinstance(whole, Preference):
            parts, first = [whole.chosen, whole.rejected], whole.prompt
        else:
            parts, first = [whole.conversation], whole.prompt
        read = []
        for part in parts:
            with_system = self._with_system(part, key=parts[0])
            shift = len(with_system.messages) - len(part.messages)
            rendered = self._template.render(with_system.messages, with_system.tools, where)
            read.append((with_system, rendered, first + shift if first else 0))
        return whole, read

    def _with_system(self, conversation: Conversation, key: Conversation) -> Conversation:
        """The system prompt that the policy gives; `key` decides for both conversations of a pair."""
        chat = self._chat
        if conversation.messages[0]["role"] == "system" or not (chat.system or chat.system_prompts):
            return conversation
        first = next(m for m in key.messages if m["role"] != "system")
        drawn = int.from_bytes(hashlib.blake2b(_text([first]), digest_size=8).digest(), "big") / 2.0**64
        text = chat.system if drawn < chat.system_share and chat.system else None
        text = text or chat.system_prompts.get(conversation.category or "")
        if text is None:
            return conversation
        system: Message = {"role": "system", "content": text}
        return replace(conversation, messages=(system, *conversation.messages), weights=(None, *conversation.weights))

    def _encode(self, read: Sequence[tuple[Conversation, Rendered, int]]) -> list[Sample]:
        encoded = encode(self._tokenizer, [rendered for _, rendered, _ in read])
        samples = []
        for (conversation, rendered, first), (ids, offsets) in zip(read, encoded, strict=True):
            wanted = self._wanted(conversation, first)
            weights = np.full(len(ids), float(self._chat.train_on_prompt and self.kind == "conversations"), np.float32)
            for turn in rendered.turns:
                said = conversation.weights[turn.message]
                if turn.message in wanted or said is not None:
                    weights[_inside(offsets, turn.start, turn.end)] = 1.0 if said is None else said
            samples.append(Sample(conversation, rendered, wanted, ids, weights, offsets))
        return samples

    def _wanted(self, conversation: Conversation, first: int) -> frozenset[int]:
        """The messages to learn, from what the row and the policy say alone."""
        said = conversation.weights
        answers = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant" and i >= first]
        policy = answers[-1:] if self._chat.train_on == "last" else answers
        return frozenset(i for i in answers if (said[i] if said[i] is not None else float(i in policy)))

    def _item(self, whole: Any, samples: list[Sample], tally: Counter[str]) -> Item:
        """Raises _Drop when nothing is left to learn, or too much."""
        samples = self._fit(samples, tally)
        for sample in samples:
            if not (sample.weights[1:] > 0).any():
                raise _Drop("dropped_nothing_to_learn")
        tally.update(audit(samples, self._template.end_token_id))
        first = samples[0].conversation
        where, text = first.where, _text([*whole_messages(whole)])
        ids = [sample.ids[: int(np.flatnonzero(sample.weights)[-1]) + 1] for sample in samples]
        weights = [sample.weights[: len(part)] for sample, part in zip(samples, ids, strict=True)]
        tally["tokens"] += sum(map(len, ids))
        tally["trained_tokens"] += sum(int((part > 0).sum()) for part in weights)
        if self.kind == "conversations":
            return Item(ids, text, where, weights)
        split = min(int(np.flatnonzero(part[1:])[0]) + 1 for part in weights)
        if len(ids) == 2:
            shorter = min(map(len, ids))
            differ = np.flatnonzero(ids[0][:shorter] != ids[1][:shorter])
            split = min(split, int(differ[0]) if len(differ) else shorter)
            if not split or split == shorter:
                raise _Drop("dropped_nothing_to_learn")  # the answers differ in nothing that is rendered
        label = int(whole.label) if isinstance(whole, Labelled) else None
        silent = np.zeros(split, np.float32)
        parts, part_weights = [ids[0][:split], *(part[split:] for part in ids)], [silent, *(w[split:] for w in weights)]
        return Item(parts, text, where, part_weights, label)

    def _fit(self, samples: list[Sample], tally: Counter[str]) -> list[Sample]:
        """The samples within seq_len, by the policy. Raises _Drop."""
        limit, policy = self._seq_len + 1, self._chat.too_long
        if all(len(_needed(sample)) <= limit for sample in samples):
            return samples
        if policy == "drop":
            raise _Drop("dropped_too_long")
        if policy == "truncate_right":
            tally["cut_right"] += 1
            return [s._replace(ids=s.ids[:limit], weights=s.weights[:limit], offsets=s.offsets[:limit]) for s in samples]
        tally["cut_left"] += 1
        while any(len(_needed(sample)) > limit for sample in samples):
            samples = self._encode([self._without_oldest(sample) for sample in samples])
        return samples

    def _without_oldest(self, sample: Sample) -> tuple[Conversation, Rendered, int]:
        """The conversation without its oldest exchange (a user's turn and all before the next one). Raises _Drop."""
        conversation = sample.conversation
        system = int(conversation.messages[0]["role"] == "system")
        users = [i for i, message in enumerate(conversation.messages) if message["role"] == "user"]
        learned = sorted(sample.wanted)
        if len(users) < 2 or not learned or users[1] > learned[-1] or (learned[0] < users[1] and self.kind != "conversations"):
            raise _Drop("dropped_answer_lost")
        gone = slice(system, users[1])
        kept_messages, kept_weights = list(conversation.messages), list(conversation.weights)
        del kept_messages[gone], kept_weights[gone]
        shorter = replace(conversation, messages=tuple(kept_messages), weights=tuple(kept_weights))
        rendered = self._template.render(shorter.messages, shorter.tools, shorter.where)
        return shorter, rendered, 0 if self.kind == "conversations" else learned[0] - (users[1] - system)

    def _check_dropped(self, tally: Mapping[str, int], source: Source) -> None:
        lost = tally["dropped_nothing_to_learn"] + tally["dropped_answer_lost"]
        if tally["rows"] and (lost > self._chat.max_dropped * tally["rows"] or not tally["kept"]):
            what = f"of {tally['rows']} rows {lost} have nothing to learn and {tally['dropped_too_long']} are over seq_len"
            fix = "raise seq_len, set chat.too_long, look at `maxi check`, or raise chat.max_dropped"
            raise DataError(what, source.path, fix)


COUNTS = (
    *("rows", "kept", "dropped_too_long", "dropped_answer_lost", "dropped_nothing_to_learn", "cut_left", "cut_right"),
    *(
        "tokens",
        "trained_tokens",
        "answer_tokens",
        "trained_answer_tokens",
        "turns",
        "ended_turns",
        "cut_turns",
        "excluded_turns",
    ),
    *("leaked_tokens", "altered_turns", "other_prefix"),
)
"""What is counted of a source: rows, tokens, and the audit's findings (see `audit`)."""


def audit(samples: Sequence[Sample], end_token_id: int) -> Counter[str]:
    """Counts over the assistant turns that are meant to be learned.

    answer_tokens: tokens that overlap the turn's content where it stands in the text; trained_answer_tokens: those with
    weight. turns, ended_turns: whose end token is there and has weight. cut_turns: whose end truncate_right took.
    leaked_tokens: tokens with weight inside another role's content. altered_turns: whose content is not in the text word
    for word. excluded_turns: left out by policy or by the row. other_prefix: turns that serving begins after another text.
    """
    found: Counter[str] = Counter()
    for sample in samples:
        turns = {turn.message: turn for turn in sample.rendered.turns}
        everything = sample.weights[0] > 0  # the first token is a target under train_on_prompt alone
        at, text = 0, sample.rendered.text
        for number, message in enumerate(sample.conversation.messages):
            content = str(message.get("content") or "").strip()
            bound = next((turn.start for turn in sample.rendered.turns if turn.message > number), len(text))
            start = text.find(content, at, bound) if content else -1
            at = start + len(content) if start >= 0 else at
            overlaps = _inside(sample.offsets, start, at) if start >= 0 else np.zeros(len(sample.ids), bool)
            trained = sample.weights > 0
            if message["role"] != "assistant":
                found["leaked_tokens"] += 0 if everything else int((trained & overlaps).sum())
            elif number not in sample.wanted:
                found["excluded_turns"] += 1
            elif number in turns and turns[number].end > sample.offsets[-1, 1]:
                found["cut_turns"] += 1
            else:
                found["turns"] += 1
                found["altered_turns"] += int(bool(content) and start < 0)
                found["answer_tokens"] += int(overlaps.sum())
                found["trained_answer_tokens"] += int((overlaps & trained).sum())
                if number in turns:
                    last = int(np.flatnonzero(_inside(sample.offsets, turns[number].start, turns[number].end))[-1])
                    found["ended_turns"] += int(sample.ids[last] == end_token_id and trained[last])
                    found["other_prefix"] += int(not turns[number].prefix_ok)
    return found


def describe(counts: Mapping[str, int]) -> list[str]:
    """The counts of a source as phrases."""
    share = counts["trained_answer_tokens"] / max(counts["answer_tokens"], 1)
    lines = [f"{share:.2%} of {counts['answer_tokens']:,} answer tokens trained, {counts['trained_tokens']:,} tokens in all"]
    lines += [f"{counts['ended_turns']:,} of {counts['turns']:,} answers with their end token"]
    words = {
        "dropped_too_long": "rows dropped, over seq_len",
        "dropped_answer_lost": "rows dropped, their answer does not fit seq_len",
        "dropped_nothing_to_learn": "rows dropped, nothing in them is learned",
        "cut_left": "rows cut on the left",
        "cut_right": "rows cut on the right",
        "cut_turns": "answers cut, so not learned to their end",
        "excluded_turns": "assistant turns not learned, as asked",
        "altered_turns": "answers that the template changes",
        "other_prefix": "answers after another text than is served",
        "leaked_tokens": "tokens of other roles trained",
    }
    return lines + [f"{counts[name]:,} {text}" for name, text in words.items() if counts[name]]


def wrong_mask(counts: Mapping[str, int]) -> str | None:
    """What is wrong with the mask of a source, or None."""
    if counts["leaked_tokens"]:
        return f"{counts['leaked_tokens']:,} tokens of users, tools or the system are trained"
    if counts["trained_answer_tokens"] < counts["answer_tokens"]:
        missing = counts["answer_tokens"] - counts["trained_answer_tokens"]
        return f"{missing:,} of {counts['answer_tokens']:,} answer tokens are not trained"
    if counts["ended_turns"] < counts["turns"]:
        return f"{counts['turns'] - counts['ended_turns']:,} of {counts['turns']:,} answers are trained without their end token"
    return None


def encode(tokenizer: Tokenizer, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 [n], offsets int64 [n, 2]) of each text.

    A token that would run across the beginning of an answer (a line break of the template and one of the answer, say)
    is cut there, because serving ends the prompt at that place: the text is then encoded in pieces.
    """
    found = []
    for text, encoding in zip(rendered, _offsets(tokenizer, [text.text for text in rendered]), strict=True):
        starts = [turn.start for turn in text.turns]
        if any(_crosses(encoding[1], start) for start in starts):
            cuts = [0, *starts, len(text.text)]
            pieces = [text.text[a:b] for a, b in pairwise(cuts)]
            parts = _offsets(tokenizer, pieces)
            ids = np.concatenate([part[0] for part in parts])
            # a tokenizer that marks the beginning of every text cannot encode in pieces
            if tokenizer.decode(ids) == tokenizer.decode(encoding[0]):
                shifted = [part[1] + cut for part, cut in zip(parts, cuts, strict=False)]
                encoding = ids, np.concatenate(shifted)
        found.append(encoding)
    return found


def _offsets(tokenizer: Tokenizer, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    encodings = tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)
    return [(np.asarray(e.ids, np.int32), np.asarray(e.offsets, np.int64).reshape(-1, 2)) for e in encodings]


def _crosses(offsets: np.ndarray, place: int) -> bool:
    return bool(((offsets[:, 0] < place) & (offsets[:, 1] > place)).any())


def _inside(offsets: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Which tokens have text in [start, stop)."""
    return (offsets[:, 0] < stop) & (offsets[:, 1] > start)


def _needed(sample: Sample) -> np.ndarray:
    """The ids up to the last one that is learned."""
    learned = np.flatnonzero(sample.weights)
    return sample.ids[: int(learned[-1]) + 1 if len(learned) else 0]


def whole_messages(whole: Conversation | Preference | Labelled) -> Iterator[Message]:
    """All messages of a row, whatever its kind."""
    if isinstance(whole, Preference):
        yield from whole.chosen.messages
        yield from whole.rejected.messages
    else:
        yield from (whole if isinstance(whole, Conversation) else whole.conversation).messages


def _text(given: Sequence[Message]) -> bytes:
    return json.dumps(given, sort_keys=True, ensure_ascii=False).encode()
