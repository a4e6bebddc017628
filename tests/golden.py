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
