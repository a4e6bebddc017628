"""One small trained tokenizer for all tests of this folder, and the text it was trained on."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from maxi.data import bpe
from maxi.data.tokenizer import Tokenizer

WORDS = [
    *("the", "sea", "was", "calm", "and", "every", "lamp", "on", "board", "shone", "over", "dark", "water", "while"),
    *("sailors", "sang", "of", "home", "rain", "wind", "bread"),
]

Prose = Callable[[int, int], str]


def _prose(words: int, seed: int) -> str:
    pick = random.Random(seed)
    return " ".join(pick.choice(WORDS) + ("\n\n" if pick.random() < 0.02 else "") for _ in range(words))


@pytest.fixture(scope="session")
def prose() -> Prose:
    """prose(words, seed): words in a random order, in paragraphs."""
    return _prose


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    out: Path = tmp_path_factory.mktemp("tokenizer") / "tiny"
    return bpe.train([_prose(3000, 0), "Ωμέγα 日本語 🎉"], 300, out)
