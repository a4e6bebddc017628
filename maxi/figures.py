"""Where figures go: tables for people, one JSON object for programs."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from maxi.errors import ConfigError
from maxi.whole import write_whole


def console() -> Console:
    """Where tables are drawn: as wide as the terminal, and in a file as wide as they need."""
    found = Console(highlight=False, markup=False, soft_wrap=True)
    return found if found.is_terminal else Console(highlight=False, markup=False, soft_wrap=True, width=160)


def check_writable(path: str | None) -> None:
    """Raises ConfigError, before anything is computed, where `keep` could not write."""
    if path is not None and not Path(path).expanduser().parent.is_dir():
        raise ConfigError("the folder of --json does not exist", path, "create it first")


def keep(figures: Any, path: str | Path) -> None:
    """Writes figures as JSON, whole or not at all."""
    write(path, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def write(path: str | Path, text: str) -> None:
    """Writes a file and its folder. Raises ConfigError."""
    file = Path(path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    except OSError as error:
        raise ConfigError(f"cannot write {file.name}, {error.strerror}", str(path), "name another file") from None
