"""Texts that are checked in and compared whole, so that a change shows in the diff of a review."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "goldens"


def check(name: str, text: str) -> None:
    """Compares `text` with goldens/`name`; writes it there instead when MAXI_UPDATE_GOLDENS is set."""
    path = FOLDER / name
    text = text.rstrip("\n") + "\n"
    if os.environ.get("MAXI_UPDATE_GOLDENS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8", newline="\n")
    assert path.is_file(), f"{path} is missing: run with MAXI_UPDATE_GOLDENS=1"
    assert path.read_text("utf-8") == text, f"{path} has changed: run with MAXI_UPDATE_GOLDENS=1 and read the diff"


def check_numbers(name: str, rows: list[dict[str, float]], rel: float) -> None:
    """The same for rows of numbers, to a relative tolerance: the last digits differ between processors."""
    text = "\n".join(" ".join(f"{key} {value!r}" for key, value in row.items()) for row in rows)
    if os.environ.get("MAXI_UPDATE_GOLDENS") or not (FOLDER / name).is_file():
        check(name, text)
    words = (FOLDER / name).read_text("utf-8").split(), text.split()
    assert len(words[0]) == len(words[1]), f"{name} has changed"
    for old, new in zip(*words, strict=True):
        same = old == new or abs(float(old) - float(new)) <= rel * abs(float(old))
        assert same, f"{name} has changed, {old} -> {new}: run with MAXI_UPDATE_GOLDENS=1 and read the diff"
