"""A source tokenised once: two flat streams of ids (train and held-out), memory-mapped ever after.

A cache is a folder named by the fingerprint of everything that decides its content:

    train.ids, eval.ids              every document's ids and then EOS; uint16 where the vocabulary fits, else uint32
    train.ends.npy, eval.ends.npy    int64, one past each document's EOS
    meta.json                        counts, the hash of the content, and what the fingerprint was made of

It is written aside and renamed, so a folder with this name is whole: an interrupted build leaves nothing in the way, and
of two builds at once both succeed. Which documents are held out is decided by the hash of their text, so the same text
is never on both sides, in whatever file or order it stands.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maxi.config import Source
from maxi.data import documents, workers
from maxi.data.documents import Budget, Document
from maxi.data.tokenizer import Tokenizer
from maxi.errors import DataError, EnvironmentFault

FORMAT = 1
"""Raised when the same inputs would give another cache."""

HASHED_BYTES = 64 << 20
"""Files are known by the hash of their content up to this many bytes a source, by size and time of change beyond."""

Split = Literal["train", "eval", "all"]


@dataclass(frozen=True)
class TokenCache:
    """tokens: uint16 or uint32 [n]; ends: int64 [documents], one past each EOS; meta: documents, tokens, text_bytes,
    files, skipped; fingerprint: sha256 of the ids and ends; built: whether this call tokenised."""

    tokens: np.ndarray
    ends: np.ndarray
    meta: dict[str, Any]
    fingerprint: str
    built: bool


def default_dir() -> Path:
    """maxi/rows under $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxi" / "rows"


def build(
    source: Source,
    tokenizer: Tokenizer,
    *,
    split: Split = "all",
    eval_share: float = 0.0,
    cache_dir: str | Path | None = None,
    workers: int = 0,
    skip_bad: int = 0,
    log: Callable[[str], None],
) -> TokenCache:
    """The ids of a source, from the cache or tokenised into it.

    split: "train" and "eval" are the two sides of eval_share, both written in one pass; "all" ignores eval_share.
    skip_bad: bad records forgiven in this source. The held-out side may be empty. Raises DataError for sources that cannot be
    read or leave nothing to train on, EnvironmentFault when the cache cannot be written.
    """
    share = 0.0 if split == "all" else eval_share
    identity = _identity(source, tokenizer, share)
    folder = Path(cache_dir or default_dir()).expanduser() / _hash(identity)
    side = "eval" if split == "eval" else "train"
    found = _open(folder, side, skip_bad)
    if found is None:
        try:
            _build(source, tokenizer, share, folder, identity, workers, skip_bad, log)
        except OSError as error:
            fix = "free space, or name another place with data.cache_dir"
            raise EnvironmentFault(f"cannot write the token cache, {error.strerror or error}", str(folder), fix) from None
        found = _open(folder, side, skip_bad, built=True)
        assert found is not None  # just written, and checked by the same rules
    if side == "train" and not len(found.ends):
        raise DataError(
            "every document fell into the held-out share", source.path, "lower data.eval_share, or give more documents"
        )
    return found


def _identity(source: Source, tokenizer: Tokenizer, share: float) -> dict[str, Any]:
    if source.path == documents.PYTHON_DOCS:
        content: Any = ["python", sys.version]
    else:
        files = documents.files(source)
        sizes = [file.stat().st_size for file in files]
        content = []
        for file, size in zip(files, sizes, strict=True):
            entry = [str(file.absolute()), size]
            content.append([*entry, _hash_file(file) if sum(sizes) <= HASHED_BYTES else file.stat().st_mtime_ns])
    field = source.field
    return {
        "format": FORMAT,
        "files": content,
        "field": field,
        "tokenizer": tokenizer.fingerprint(),
        "eos": tokenizer.eos_id,
        "eval_share": share,
    }


def _hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:32]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(folder: Path, side: str, skip_bad: int, built: bool = False) -> TokenCache | None:
    """The cache in a folder; None when it is not there, not whole, or forgave more bad records than allowed now."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta["skipped"] > skip_bad:
            return None
        mine = {**meta, **meta["sides"][side]}
        ends = np.load(folder / f"{side}.ends.npy", mmap_mode="r")
        path, dtype = folder / f"{side}.ids", np.dtype(meta["dtype"])
        if path.stat().st_size != mine["tokens"] * dtype.itemsize or len(ends) != mine["documents"]:
            return None
        tokens = np.memmap(path, dtype, "r") if mine["tokens"] else np.zeros(0, dtype)  # an empty file cannot be mapped
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    return TokenCache(tokens, ends, mine, mine["sha256"], built)


def _build(
    source: Source,
    tokenizer: Tokenizer,
    share: float,
    folder: Path,
    identity: Any,
    processes: int,
    skip_bad: int,
    log: Callable[[str], None],
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    log(f"tokenising {source.path}")
    start, budget = time.monotonic(), Budget(skip_bad)
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        sides = [_Side(aside, side, dtype, tokenizer) for side in ("train", "eval")]
        texts = documents.read(source, budget)
        _fill(texts, sides, tokenizer, share, processes)
        totals = {side.name: side.close() for side in sides}
        if identity != _identity(source, tokenizer, share):
            raise DataError("a file changed while it was read", source.path, "run again when nothing writes to it")
        if not any(total["documents"] for total in totals.values()):
            raise DataError("the source has no documents", source.path, "check the files and the field")
        meta = {
            "sides": totals,
            "skipped": budget.skipped,
            "dtype": dtype.name,
            "files": len(identity["files"]),
            "identity": identity,
        }
        (aside / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
        _publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    skipped = f", {budget.skipped} bad records skipped" if budget.skipped else ""
    tokens = sum(total["tokens"] for total in totals.values())
    log(f"tokenised {source.path}: {tokens} tokens in {time.monotonic() - start:.1f} s{skipped}")


class _Side:
    """Writes one of the two streams, and counts and hashes what it writes."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, tokenizer: Tokenizer):
        self.name, self._folder, self._dtype, self._tokenizer = name, folder, dtype, tokenizer
        self._file = (folder / f"{name}.ids").open("wb")
        self._ends: list[int] = []
        self._sha, self._tokens, self._bytes = hashlib.sha256(), 0, 0

    def write(self, ids: np.ndarray, text_bytes: int, where: str) -> None:
        """Appends one document (int32 [n]) and EOS."""
        if len(ids) and int(ids.max()) >= self._tokenizer.vocab_size:
            raise DataError(f"the token id {ids.max()} is outside the vocabulary", where, "check the tokenizer folder")
        raw = np.append(ids, self._tokenizer.eos_id).astype(self._dtype).tobytes()
        self._file.write(raw)
        self._sha.update(raw)
        self._tokens += len(ids) + 1
        self._bytes += text_bytes
        self._ends.append(self._tokens)

    def close(self) -> dict[str, Any]:
        self._file.close()
        ends = np.asarray(self._ends, np.int64)
        np.save(self._folder / f"{self.name}.ends.npy", ends)
        self._sha.update(ends.tobytes())
        return {"documents": len(ends), "tokens": self._tokens, "text_bytes": self._bytes, "sha256": self._sha.hexdigest()}


def _fill(read: Iterator[Document], sides: list[_Side], tokenizer: Tokenizer, share: float, processes: int) -> None:
    """Every document to its side. Texts go ahead to the workers; what else is known of them waits in `marks`."""
    marks: list[tuple[_Side, int, str]] = []

    def texts() -> Iterator[str]:
        for document in read:
            raw = document.text.encode()
            marks.append((sides[_is_held_out(raw, share)], len(raw), document.where))
            yield document.text

    for ids, lengths in workers.encode(texts(), tokenizer, processes):
        stops = np.cumsum(lengths).tolist()
        for start, stop, (side, size, where) in zip([0, *stops], stops, marks, strict=False):
            side.write(ids[start:stop], size, where)
        del marks[: len(stops)]


def _is_held_out(raw: bytes, share: float) -> bool:
    return share > 0 and int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") < share * 2.0**64


def _publish(aside: Path, folder: Path) -> None:
    """Renames a finished cache into place, over nothing but a damaged one; another process may have been first."""
    for _ in range(2):
        try:
            aside.rename(folder)
            return
        except OSError:
            if not folder.is_dir():
                raise
            if all(_open(folder, side, sys.maxsize) for side in ("train", "eval")):
                return
            shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Removes what builds that were killed left behind a day ago or longer."""
    for left in parent.glob(".building-*"):
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)
