"""Text to ids and back, over any fast tokenizer that transformers can load from a folder.

`Tokenizer.load` lets transformers decide what the folder means (so that training sees the ids that users of the model
will see), then keeps to the Rust backend: no tokens are added around a text, and none are hidden. Text that spells a
special token (`<|im_end|>`) becomes that token. Nothing is downloaded and no code from the folder is run.
transformers takes seconds to import, so that happens inside `load`, once for each content of a folder (`tokenizer_memory`).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxi.data import tokenizer_folder, tokenizer_memory, tokenizer_trial
from maxi.errors import ConfigError, DataError, ModelFolderError, is_fault

# An unfinished UTF-8 character lacks at most three bytes, and every token brings at least one.
_MAX_PENDING = 4


class Tokenizer:
    """A fast tokenizer: `folder`, `vocab_size` (highest id + 1), `eos_id`, `eos_ids` (all that end a generation),
    `pad_id` (eos when there is none), `chat_template`, and `backend`, the `tokenizers.Tokenizer` behind it.

    `special_tokens`: text -> id of the tokens that are not text (flagged special, or ending a generation);
    `named_tokens`: what chat templates know as `bos_token`, `eos_token` and the like -> text.
    """

    def __init__(self, tokenizer: Any, folder: Path):
        """`tokenizer`: a fast one of transformers, or a Memory of it. Raises ConfigError when it has no end of sequence."""
        self.folder = folder
        self._fingerprint: str | None = None
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
        if tokenizer.eos_token_id is None:
            fix = 'add "eos_token" to tokenizer_config.json'
            raise ConfigError("the tokenizer has no end-of-sequence token", str(folder), fix)
        self.eos_id = int(tokenizer.eos_token_id)
        self.eos_ids = _eos_ids(folder, self.eos_id)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        added = self.backend.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in sorted(added.items()) if t.special or i in self.eos_ids}
        self.named_tokens: dict[str, str] = dict(tokenizer.special_tokens_map)
        template = tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if not isinstance(template, str | None):
            raise ModelFolderError("the chat template is no text", str(folder), "mend tokenizer_config.json")
        self.chat_template: str | None = template

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer in a Hugging Face folder.

        Raises ModelFolderError when the folder is missing, holds no (fast) tokenizer or a damaged one, ConfigError
        when the tokenizer has no end-of-sequence token.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise ModelFolderError(
                "the tokenizer folder does not exist", str(folder), "check the path; `maxi tokenizer` trains one"
            )
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
            raise ModelFolderError(
                "the folder holds no tokenizer", str(folder), "it needs tokenizer.json, or vocab.json and merges.txt"
            )
        tokenizer_trial.check_files(folder)
        if (memory := tokenizer_memory.recall(folder)) is not None:
            return cls(memory, folder)
        file = folder / "tokenizer.json"
        tried = tokenizer_trial.begin(file) if file.is_file() else None
        from transformers import AutoTokenizer

        if tried is not None:
            tried()
        try:
            found = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except BaseException as error:  # a damaged folder raises whatever its parser raises
            if not is_fault(error):
                raise
            what = f"transformers cannot load the tokenizer, {type(error).__name__}: {str(error)[:200]}"
            raise ModelFolderError(what, str(folder), "check tokenizer.json and tokenizer_config.json") from None
        if getattr(found, "backend_tokenizer", None) is None:
            raise ModelFolderError("the tokenizer has no fast form", str(folder), "convert it to tokenizer.json")
        tokenizer_memory.remember(folder, found)
        return cls(found, folder)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of ids a text, nothing added at either end."""
        return [np.asarray(ids, np.int32) for ids in encode(self.backend, list(texts))]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, ids: Iterable[int], skip_special_tokens: bool = False) -> Iterator[str]:
        """The same text as it grows, a piece at a time: a character that spans several ids is held until it is whole."""
        context: list[int] = []  # decoded before, and needed because a decoder may treat the first id as a text's start
        pending: list[int] = []
        for i in ids:
            pending.append(int(i))
            shown = self.decode(context, skip_special_tokens)
            text = self.decode(context + pending, skip_special_tokens)
            if text.endswith("\ufffd") and len(pending) < _MAX_PENDING:
                continue
            if len(text) > len(shown):
                yield text[len(shown) :]
            context, pending = pending, []
        if pending:
            yield self.decode(context + pending, skip_special_tokens)[len(self.decode(context, skip_special_tokens)) :]

    def token_bytes(self) -> np.ndarray | None:
        """How many bytes of UTF-8 text each id stands for: int32 [vocab_size], 0 for special tokens and unused ids.

        Summed over the ids of a text this is the text's length, up to Unicode normalisation (and, for
        SentencePiece-like vocabularies, a space that is added in front); which makes loss per byte comparable between
        tokenizers. None when the vocabulary is of another kind and bytes cannot be told.
        """
        tree = json.loads(self.backend.to_str())
        kinds = _kinds(tree.get("decoder")) | _kinds(tree.get("pre_tokenizer"))
        sizes = np.zeros(self.vocab_size, np.int32)
        if "ByteLevel" in kinds:
            size = len  # each character of such a token stands for one byte
        elif kinds & {"ByteFallback", "Metaspace"}:
            size = _sentencepiece_size
        else:
            return None
        vocab = tree["model"]["vocab"]
        pairs = vocab.items() if isinstance(vocab, dict) else ((piece, i) for i, (piece, _) in enumerate(vocab))
        for token, i in pairs:
            sizes[i] = size(token)
        for token in tree["added_tokens"]:
            sizes[token["id"]] = 0 if token["special"] else len(token["content"].encode())
        return sizes

    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides ids: vocabulary, merges, added tokens, normaliser, pre-tokeniser.

        Spellings that differ between versions of the libraries but mean the same do not change it.
        """
        if self._fingerprint is None:
            tree = json.loads(self.backend.to_str())
            parts = {key: tree.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
            model = parts["model"]
            bulk = [model.pop("vocab"), [pair if isinstance(pair, str) else " ".join(pair) for pair in model.pop("merges", [])]]
            self._fingerprint = hashlib.sha256(json.dumps([_canonical(parts), bulk], sort_keys=True).encode()).hexdigest()
        return self._fingerprint

    def save(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Writes the tokenizer's files into a folder, for transformers 4 and 5, vLLM, llama.cpp and Ollama alike.

        `chat_template` takes the place of the tokenizer's own, so that what was trained with is served with.
        """
        template = self.chat_template if chat_template is None else chat_template
        tokenizer_folder.save(self.folder, Path(folder), self.backend, template, self.eos_id)


def encode(backend: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts by a `tokenizers.Tokenizer`, nothing added. Raises DataError for a text that it fails on."""
    return [encoding.ids for encoding in or_data_error(backend.encode_batch_fast, texts)]


def or_data_error(encode_batch: Any, texts: list[str]) -> list[Any]:
    """What a backend's method makes of texts. Raises DataError where it fails."""
    try:
        return encode_batch(texts, add_special_tokens=False)
    except BaseException as error:
        if not is_fault(error):
            raise
        what = f"the tokenizer fails on a text, {type(error).__name__}: {str(error)[:200]}"
        where = f"one of {len(texts)} that begin with {texts[0][:40]!r}" if texts else ""
        raise DataError(what, where, "mend the tokenizer, or remove the text") from None


def _eos_ids(folder: Path, eos_id: int) -> tuple[int, ...]:
    """generation_config.json knows all ids that end a turn; without it, the tokenizer's own."""
    path = folder / "generation_config.json"
    try:
        found = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.is_file() else None
        found = [found] if isinstance(found, int) else found or []
        if not isinstance(found, list) or not all(type(i) is int and 0 <= i < 1 << 31 for i in found):
            raise ValueError(f"eos_token_id is {str(found)[:80]!r}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelFolderError(f"generation_config.json is damaged, {error}", str(path), "mend or remove it") from None
    return tuple(dict.fromkeys([*found, eos_id]))


def _kinds(part: Any) -> set[str]:
    """The types in a (nested) component of tokenizer.json."""
    if isinstance(part, dict):
        return {str(part.get("type"))}.union(*map(_kinds, part.values()))
    return set().union(*map(_kinds, part)) if isinstance(part, list) else set()


def _sentencepiece_size(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode())


def _canonical(part: Any) -> Any:
    if isinstance(part, dict):
        return {
            key: _canonical(value) for key, value in part.items() if key != "trim_offsets" and value not in (None, "", False)
        }
    return [_canonical(entry) for entry in part] if isinstance(part, list) else part
