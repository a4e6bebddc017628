"""Hugging Face folders in and out, without torch.

    folder.py       which tensors a folder holds, and where; files are trusted with nothing
    importer.py     import: folder -> model and (sharded) weights
    exporter.py     export: model and weights -> folder, whole or not at all
    config_json.py  the config.json and generation_config.json of an export
    card.py         its README.md

Names and layouts are declared once, in the family's table (`maxi.params.Param`); import and export read the same
pattern in opposite directions, so a round trip returns the same bytes.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maxi.data.tokenizer import Tokenizer
from maxi.hf.exporter import check_target, write
from maxi.hf.folder import GENERATION, read_json
from maxi.hf.importer import read, read_config
from maxi.models import Model
from maxi.params import Tree

__all__ = ["Loaded", "check_target", "convert", "load_hf", "read", "read_config", "save_hf", "write"]


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, and the folder they came from."""

    model: Model
    params: Tree
    folder: Path

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer, loaded on first use; None if it has none. Raises ModelFolderError for a damaged one."""
        names = ("tokenizer.json", "vocab.json", "tokenizer.model")
        return Tokenizer.load(self.folder) if any((self.folder / name).is_file() for name in names) else None

    @property
    def generation(self) -> dict[str, Any] | None:
        """The fields of the folder's generation_config.json, if it has one."""
        return read_json(self.folder, GENERATION) if (self.folder / GENERATION).exists() else None


def load_hf(folder: str | Path, dtype: Any = "float32") -> Loaded:
    """The model in a Hugging Face folder, on one device, its weights in `dtype` (None: as they are stored).

    Raises ModelFolderError, as `maxi.hf.importer.read` does.
    """
    model, params = read(folder, dtype=dtype)
    return Loaded(model, params, Path(folder).expanduser())


def save_hf(loaded: Loaded, out: str | Path, *, dtype: Any = None, force: bool = False) -> Path:
    """Writes a folder that `transformers` loads, with the tokenizer and generation settings of the source; returns it.

    `dtype` casts the weights (None: as they are). Raises as `maxi.hf.exporter.write` does.
    """
    check_target(out, force)
    tokenizer, generation = loaded.tokenizer, loaded.generation
    return write(loaded.model, loaded.params, out, dtype=dtype, tokenizer=tokenizer, generation=generation, force=force)


def convert(folder: str | Path, out: str | Path, *, force: bool = False) -> Path:
    """Import, then export: every tensor keeps its bytes and dtype; returns `out`.

    What changes is what readers trip over: config.json is completed (`config_json.py`), the tokenizer's files are
    mended (`maxi.data.tokenizer_folder`), and a tied head that was stored all the same is left out.
    """
    check_target(out, force)
    return save_hf(load_hf(folder, dtype=None), out, force=force)
