"""Conversations as content of a cache: rendered by the chat template, tokenised, cut by policy, and counted on the way.

    sft        one part: the conversation up to its last learned token; weights say which ids are targets
    dpo        three parts: the ids that both answers begin with, and the rest of each
    kto        two parts and a label: the ids before the answer, and the answer

What a row holds is decided in `messages.py`, what a template makes of it in `chat_template.py`; whether the weights are
right is checked by `audit.py`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maxi.data import audit, documents, messages
from maxi.data.audit import Sample
from maxi.data.cache import Counts, Item, TokenCache
from maxi.data.chat_template import ChatTemplate, Rendered
from maxi.data.documents import Budget
from maxi.data.messages import Conversation, Labelled, Message, Preference
from maxi.data.rows import Rows
from maxi.data.sample_rows import PairRows, SampleRows
from maxi.data.tokenizer import Tokenizer, or_data_error
from maxi.errors import DataError
from maxi.sections import ChatConfig, Source

Kind = Literal["conversations", "preferences", "labels"]

FORMAT = 1
"""Raised when the same rows would give other items or counts."""
SHOWN = 5
"""How many rows are remembered by name for each reason to drop them, and for a wrong mask."""
AT_ONCE = 128
"""Conversations that are tokenised together."""

READERS = {
    "conversations": messages.conversation_of,
    "preferences": messages.preference_of,
    "labels": messages.labelled_of,
}


class _Drop(Exception):
    """Why a row is left out: the name of a count."""


class Examples:
    """See `maxi.data.cache.Content`; `template` renders what `tokenizer` then encodes. `virtual` places of the `seq_len` are
    left to virtual tokens, which stand before every conversation."""

    has_weights = True

    def __init__(
        self, kind: Kind, tokenizer: Tokenizer, template: ChatTemplate, chat: ChatConfig, seq_len: int, virtual: int = 0
    ):
        self.kind, self.vocab_size, self.has_labels = kind, tokenizer.vocab_size, kind == "labels"
        self.noun = {"conversations": "conversations", "preferences": "pairs", "labels": "answers"}[kind]
        self._tokenizer, self._template, self._chat, self._virtual = tokenizer, template, chat, virtual
        self._seq_len = seq_len - virtual
        self._control = frozenset(tokenizer.special_tokens.values())

    def identity(self, source: Source) -> Any:
        chat = {name: value for name, value in asdict(self._chat).items() if name not in ("pack", "share_prompt", "template")}
        return {
            "format": FORMAT,
            "kind": self.kind,
            "fields": source.fields,
            "tokenizer": self._tokenizer.fingerprint(),
            "template": [self._template.text, self._tokenizer.named_tokens, self._tokenizer.eos_ids],
            "chat": chat,
            "seq_len": self._seq_len,
        }

    def rows(self, cache: TokenCache, keep_partial: bool) -> Rows:  # noqa: ARG002
        width, virtual, pack = self._seq_len + self._virtual, self._virtual, self._chat.pack
        if self.kind == "conversations":
            return SampleRows(cache, width, pack=pack, virtual=virtual)
        return PairRows(cache, width, pack=pack, share_prompt=self._chat.share_prompt, virtual=virtual)

    def items(self, source: Source, budget: Budget, counts: Counts) -> Iterator[Item]:
        tally = Counter(dict.fromkeys(COUNTS, 0))
        dropped: dict[str, list[str]] = {}
        wrong: list[str] = []
        read = documents.records(source, lambda record, where: self._read(record, where, source), budget)
        while group := list(islice(read, AT_ONCE)):
            tally["rows"] += len(group)
            samples = iter(self._encode([conversation for _, row in group for conversation in row]))
            for whole, row in group:
                mine = list(islice(samples, len(row)))
                try:
                    item, found = self._item(whole, mine)
                except _Drop as drop:
                    tally[str(drop)] += 1
                    _remember(dropped.setdefault(str(drop), []), mine[0].conversation.where)
                    continue
                tally.update(found, kept=1)
                if audit.wrong_mask(found):
                    _remember(wrong, item.where)
                yield item
        counts.update(tally, dropped=dropped, wrong_rows=wrong)
        self._check_dropped(counts, source)

    def describe(self, meta: dict[str, Any]) -> list[str]:
        return describe(meta["counts"])

    def samples(self, source: Source, budget: Budget) -> Iterator[list[Sample]]:
        """The tokenised conversations of each row as training would see them but for length, for showing to a person."""
        for _, row in documents.records(source, lambda record, where: self._read(record, where, source), budget):
            yield self._encode(row)

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
            with_system = self._with_system(part)
            shift = len(with_system.messages) - len(part.messages)
            rendered = self._template.render(with_system.messages, with_system.tools, where)
            read.append((with_system, rendered, first + shift if first else 0))
        return whole, read

    def _with_system(self, conversation: Conversation) -> Conversation:
        """The system prompt that the policy gives; by the first message, so the same one to both sides of a pair."""
        chat = self._chat
        if conversation.messages[0]["role"] == "system" or not (chat.system or chat.system_prompts):
            return conversation
        first = _text(conversation.messages[:1])
        drawn = int.from_bytes(hashlib.blake2b(first, digest_size=8).digest(), "big") / 2.0**64
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
            sample = Sample(conversation, rendered, wanted, ids, weights, offsets)
            for turn in rendered.turns:
                said = conversation.weights[turn.message]
                if turn.message in wanted:
                    weights[sample.inside(turn.start, turn.end)] = 1.0 if said is None else said
                elif said is not None:  # which is 0, or of a turn that both answers of a pair follow
                    weights[sample.inside(turn.start, turn.end)] = 0.0
            samples.append(sample)
        return samples

    def _wanted(self, conversation: Conversation, first: int) -> frozenset[int]:
        """The messages to learn, from what the row and the policy say alone."""
        said = conversation.weights
        answers = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant" and i >= first]
        policy = answers[-1:] if self._chat.train_on == "last" else answers
        return frozenset(i for i in answers if (said[i] if said[i] is not None else float(i in policy)))

    def _item(self, whole: Any, samples: list[Sample]) -> tuple[Item, Counter[str]]:
        """The item and what is counted of it. Raises _Drop when nothing is left to learn, or too much."""
        if not all(sample.learns for sample in samples):
            raise _Drop("dropped_nothing_to_learn")
        samples, found = self._fit(samples)
        found.update(audit.audit(samples, self._template.end_token_id, self._control))
        where, text = samples[0].conversation.where, _text([*whole_messages(whole)])
        ids = [_needed(sample) for sample in samples]
        weights = [sample.weights[: len(part)] for sample, part in zip(samples, ids, strict=True)]
        found.update(tokens=sum(map(len, ids)), trained_tokens=sum(int((part[1:] > 0).sum()) for part in weights))
        if self.kind == "conversations":
            return Item(ids, text, where, weights), found
        split = min(int(np.flatnonzero(part[1:])[0]) + 1 for part in weights)
        if len(ids) == 2:
            shorter = min(map(len, ids))
            differ = np.flatnonzero(ids[0][:shorter] != ids[1][:shorter])
            if not len(differ) or not differ[0]:
                raise _Drop("dropped_nothing_to_learn")  # the answers differ in nothing that is rendered
            split = min(split, int(differ[0]))
        label = int(whole.label) if isinstance(whole, Labelled) else None
        silent = np.zeros(split, np.float32)
        parts, part_weights = [ids[0][:split], *(part[split:] for part in ids)], [silent, *(w[split:] for w in weights)]
        return Item(parts, text, where, part_weights, label), found

    def _fit(self, samples: list[Sample]) -> tuple[list[Sample], Counter[str]]:
        """The samples within seq_len, and what the policy did for that. Raises _Drop."""
        limit, policy = self._seq_len + 1, self._chat.too_long
        if all(len(_needed(sample)) <= limit for sample in samples):
            return samples, Counter()
        if policy == "drop":
            raise _Drop("dropped_too_long")
        if policy == "truncate_right":
            samples = [s._replace(ids=s.ids[:limit], weights=s.weights[:limit], offsets=s.offsets[:limit]) for s in samples]
            if not all(sample.learns for sample in samples):
                raise _Drop("dropped_answer_lost")
            return samples, Counter(cut_right=1)
        while any(len(_needed(sample)) > limit for sample in samples):
            samples = self._encode([self._without_oldest(sample) for sample in samples])
        return samples, Counter(cut_left=1)

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

    def _check_dropped(self, counts: Counts, source: Source) -> None:
        lost = counts["dropped_nothing_to_learn"] + counts["dropped_answer_lost"]
        if counts["rows"] and (lost > self._chat.max_dropped * counts["rows"] or not counts["kept"]):
            what = f"of {counts['rows']} rows {lost} have nothing to learn and {counts['dropped_too_long']} are over seq_len"
            some = [where for rows in counts["dropped"].values() for where in rows][:SHOWN]
            fix = "raise seq_len, set chat.too_long, look at `maxi check`, or raise chat.max_dropped"
            raise DataError(what, f"{source.path}, such as {'; '.join(Path(where).name for where in some)}", fix)


COUNTS = (
    *("rows", "kept", "dropped_too_long", "dropped_answer_lost", "dropped_nothing_to_learn", "cut_left", "cut_right"),
    *("tokens", "trained_tokens", *audit.COUNTS),
)
"""What is counted of a source: rows, tokens, and the audit's findings."""

PHRASES = {
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
"""What is said of a count when it is not 0."""


def describe(counts: Mapping[str, int]) -> list[str]:
    """The counts of a source as phrases."""
    share = counts["trained_answer_tokens"] / max(counts["answer_tokens"], 1)
    lines = [f"{share:.2%} of {counts['answer_tokens']:,} answer tokens trained, {counts['trained_tokens']:,} tokens in all"]
    lines += [f"{counts['ended_turns']:,} of {counts['turns']:,} answers with their end token"]
    return lines + [f"{counts[name]:,} {text}" for name, text in PHRASES.items() if counts[name]]


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
    encodings = or_data_error(tokenizer.backend.encode_batch, list(texts))
    return [(np.asarray(e.ids, np.int32), np.asarray(e.offsets, np.int64).reshape(-1, 2)) for e in encodings]


def _crosses(offsets: np.ndarray, place: int) -> bool:
    return bool(((offsets[:, 0] < place) & (offsets[:, 1] > place)).any())


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


def _remember(rows: list[str], where: str) -> None:
    if len(rows) < SHOWN:
        rows.append(where)


def _text(given: Sequence[Message]) -> bytes:
    return json.dumps(given, sort_keys=True, ensure_ascii=False).encode()
