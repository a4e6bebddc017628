"""What transformers made of a tokenizer's folder, remembered on disk: importing transformers, and torch with it where that
is installed, takes seconds at every start, and the same files give the same tokenizer every time.

A memory belongs to the bytes of every file that transformers may read there (of a model's config.json to the fields that
matter, or every model would be another tokenizer) and to the versions of both libraries, and is checked by its own
sha256; anything else about it that is wrong means that transformers is asked again. It lies in maxi/tokenizers under
$XDG_CACHE_HOME or ~/.cache, and can be removed at any time.
"""

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from maxi.whole import write_whole

MOST = 16
"""Memories kept, those that were used last; one of a vocabulary of 150,000 has 10 MB."""
_READ = {".json", ".txt", ".model", ".jinja"}
_LARGEST = 200_000_000
"""Bytes of all those files: a folder with more is somebody's data, not to be read whole for a tokenizer."""
_OF_MODELS = ("model_type", "tokenizer_class", "auto_map", "architectures", "transformers_version")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Memory:
    """The part of a fast transformers tokenizer that `Tokenizer` asks for, under the same names."""

    backend_tokenizer: Any
    eos_token_id: int | None
    pad_token_id: int | None
    special_tokens_map: dict[str, str]
    chat_template: Any


def recall(folder: Path) -> Memory | None:
    """What is remembered of a folder with just these files, or None."""
    try:
        path = _place(folder)
        content = path.read_bytes() if path else b""
        digest, _, text = content.partition(b"\n")
        if not path or hashlib.sha256(text).hexdigest().encode() != digest:
            return None
        from tokenizers import Tokenizer

        kept = json.loads(text)
        with suppress(OSError):
            os.utime(path)
        return Memory(Tokenizer.from_str(kept.pop("backend_tokenizer")), **kept)
    except OSError:
        return None


def remember(folder: Path, found: Any) -> None:
    """Keeps what transformers made of a folder, if the library reads back just what it writes."""
    from tokenizers import Tokenizer

    backend = found.backend_tokenizer.to_str()
    if Tokenizer.from_str(backend).to_str() != backend:
        return
    kept = {name: getattr(found, name) for name in ("eos_token_id", "pad_token_id", "chat_template")}
    kept |= {"backend_tokenizer": backend, "special_tokens_map": dict(found.special_tokens_map)}
    try:
        text, path = json.dumps(kept).encode(), _place(folder)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        used = sorted(path.parent.glob("*.json"), key=lambda other: other.stat().st_mtime, reverse=True)
        for old in used[MOST:]:
            old.unlink(missing_ok=True)
    except (OSError, TypeError, ValueError) as error:  # no place for it, or a template or names that JSON does not know
        log.debug("what transformers made of %s is not remembered: %s", folder, error)


def _place(folder: Path) -> Path | None:
    """Where the memory of a folder lies; None for a folder that is not to be remembered."""
    digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
    within = sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*")))
    files = [path for path in within if path.suffix in _READ and path.is_file() and path.name != "generation_config.json"]
    if sum(path.stat().st_size for path in files) > _LARGEST:
        return None
    for path in files:
        content = _about_models(path.read_bytes()) if path.name == "config.json" else path.read_bytes()
        digest.update(json.dumps([str(path.relative_to(folder)), len(content)]).encode() + content)
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "maxi" / "tokenizers" / f"{digest.hexdigest()}.json"


def _about_models(content: bytes) -> bytes:
    """What a config.json says that may decide how the tokenizer beside it is read; all of it where that cannot be told."""
    try:
        found = json.loads(content)
        return json.dumps([found.get(name) for name in _OF_MODELS]).encode()
    except (ValueError, AttributeError, RecursionError):
        return content
