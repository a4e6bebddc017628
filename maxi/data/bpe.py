"""Training a byte-level BPE tokenizer that is Qwen2's in everything but its vocabulary.

Same normaliser, same split pattern and same special tokens in the same order after the merges, so that whatever reads
a Qwen2.5 tokenizer reads this one. The end of a document is `<|endoftext|>`, as in Qwen2.5's base models.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from maxi.data.tokenizer import Tokenizer
from maxi.data.tokenizer_folder import CONFIG, TEMPLATE
from maxi.errors import ConfigError, DataError

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with at most one sign or space before it
    r"|\p{N}"  # every digit by itself
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # line ends; spaces, the last of which goes to the next word
)
"""How Qwen2 cuts text before merging (Qwen2 technical report, arXiv:2407.10671, section 2.1; its tokenizer.json)."""

END = "<|endoftext|>"

SPECIAL = (
    *(END, "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *(
        "<|quad_start|>",
        "<|quad_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
)
"""Tokens that are not text: hidden when special tokens are skipped."""

MARKERS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
"""Tokens that are one id each but stay visible."""

MIN_VOCAB = 256 + len(SPECIAL) + len(MARKERS) + 1
MODEL_MAX_LENGTH = 131072


def train(texts: Iterable[str], vocab_size: int, out: str | Path, force: bool = False) -> Tokenizer:
    """Trains on `texts` and writes a Hugging Face folder; the same texts give the same bytes.

    `vocab_size` counts everything: bytes, merges, special tokens. Raises ConfigError when it is under MIN_VOCAB or
    `out` already holds something (unless `force`), DataError when the texts have too few different words for it.
    """
    out = Path(out).expanduser()
    if vocab_size < MIN_VOCAB:
        raise ConfigError(f"a vocabulary of {vocab_size} is too small", "vocab_size", f"take at least {MIN_VOCAB}, e.g. 8192")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "tokenizer.json").is_file():
            raise ConfigError("there is something else than a tokenizer", str(out), "name another folder")
        if not force:
            raise ConfigError("the tokenizer folder already exists", str(out), "name another, or pass --force")
    backend = _train(texts, vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        aside.chmod(0o755)
        _write(backend, aside / "new")
        if out.exists():
            out.rename(aside / "old")
        (aside / "new").rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Tokenizer.load(out)


def _sweep(out: Path) -> None:
    """Removes what trainings that were killed left behind a day ago or longer."""
    for left in out.parent.glob(f".{out.name}.????????"):
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)


def _train(texts: Iterable[str], vocab_size: int) -> Any:
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    wanted = vocab_size - len(SPECIAL) - len(MARKERS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=wanted, initial_alphabet=alphabet, show_progress=False))
    found = backend.get_vocab_size()
    if found < wanted:
        most = found + vocab_size - wanted
        raise DataError(
            f"the texts support a vocabulary of {most}, not {vocab_size}", "tokenizer", "give more text, or lower it"
        )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKERS])
    return backend


def _write(backend: Any, folder: Path) -> None:
    folder.mkdir()
    tree = json.loads(backend.to_str())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]]
    template = resources.files("maxi.data").joinpath("chatml.jinja").read_text("utf-8")
    texts = {
        "tokenizer.json": backend.to_str(pretty=True),
        "vocab.json": json.dumps(dict(sorted(tree["model"]["vocab"].items(), key=lambda pair: pair[1])), ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        CONFIG: json.dumps(_config(tree["added_tokens"], template), indent=2, ensure_ascii=False) + "\n",
        TEMPLATE: template,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8", newline="")


def _config(added: list[dict[str, Any]], template: str) -> dict[str, Any]:
    decoder = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": END,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
