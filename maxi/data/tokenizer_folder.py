"""Writing a tokenizer so that every reader of Hugging Face folders understands it.

Source files are copied byte for byte; what readers trip over is mended: `tokenizer.json` is always there (vLLM, Ollama),
`tokenizer_class` is a name that transformers 4 knows too (`TokenizersBackend` is 5's), and the chat template stands
both in its own file (new readers) and in tokenizer_config.json (old readers, llama.cpp), the same to the byte.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from maxi.errors import ModelFolderError

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_COPIED = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    CONFIG,
)


def save(source: Path, target: Path, backend: Any, chat_template: str | None, eos_id: int) -> None:
    """Writes into `target` (made if need be) what `source` holds, completed from `backend` (a `tokenizers.Tokenizer`).

    Raises ModelFolderError when tokenizer_config.json is damaged.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / "tokenizer.json").is_file():
        (target / "tokenizer.json").write_text(backend.to_str(pretty=True), "utf-8", newline="\n")
    config = _read(target / CONFIG)
    mended = mend(config, backend.id_to_token(eos_id), chat_template)
    if mended != config:
        (target / CONFIG).write_text(json.dumps(mended, indent=2, ensure_ascii=False) + "\n", "utf-8", newline="\n")
    if chat_template is not None:
        (target / TEMPLATE).write_text(chat_template, "utf-8", newline="")


def mend(config: dict[str, Any], eos_token: str, chat_template: str | None) -> dict[str, Any]:
    """tokenizer_config.json as every reader takes it; unchanged when it already is so."""
    mended = dict(config)
    mended.setdefault("eos_token", eos_token)
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        mended["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 5 writes a list where 4 expects a mapping
        del mended["extra_special_tokens"]
        mended.setdefault("additional_special_tokens", extra)
    if chat_template is not None:
        mended["chat_template"] = chat_template
    return mended


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise ModelFolderError(f"{CONFIG} is damaged, {error}", str(path), "mend it") from None
    if not isinstance(found, dict):
        raise ModelFolderError(f"{CONFIG} is not an object", str(path), "mend it")
    return found
