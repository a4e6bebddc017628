"""A source made into ids once: two sides (train and held-out), memory-mapped ever after.

What an item is (a document, a conversation, a pair of answers) its `Content` knows; the store only keeps its parts one
after the other. A cache is a folder named by the fingerprint of everything that decides what is in it:

    SIDE.ids          the ids of every part; uint16 where the vocabulary fits, else uint32
    SIDE.weights      float32, how much each id counts as a target; only for content that says so
    SIDE.labels       uint8, one an item; only for content with labels
    SIDE.ends.npy     int64, one past each part
    meta.json         counts, the hash of the content, and what the fingerprint was made of

It is written aside and renamed, so a folder with this name is whole: an interrupted build leaves nothing in the way, and
of two builds at once both succeed. Which items are held out is decided by the hash of their text, so the same text is
never on both sides, in whatever file or order it stands.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from maxi import faults
from maxi.data import documents
from maxi.data.documents import Budget
from maxi.data.rows import Rows
from maxi.errors import DataError, EnvironmentFault
from maxi.paths import open_file
from maxi.sections import Source

FORMAT = 2
"""Raised when the same inputs would give another cache."""

HASHED_BYTES = 64 << 20
"""Files are known by the hash of their content up to this many bytes a source, by size and time of change beyond."""

Split = Literal["train", "eval", "all"]
Counts = dict[str, Any]
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Item:
    """One document, conversation or pair: the ids of its parts (int32 [n] each), its text as bytes (which decides the
    side it falls on), where it came from, the weights of its parts (float32 [n] each), and its label."""

    parts: Sequence[np.ndarray]
    text: bytes
    where: str
    weights: Sequence[np.ndarray] | None = None
    label: int | None = None


@dataclass(frozen=True)
class TokenCache:
    """tokens: uint16 or uint32 [n]; ends: int64 [parts], one past each; weights: float32 [n] and labels: uint8 [items], or
    None; meta: items, tokens, text_bytes, files, skipped and the content's own counts; fingerprint: sha256 of all
    arrays; built: whether this call tokenised."""

    tokens: np.ndarray
    ends: np.ndarray
    weights: np.ndarray | None
    labels: np.ndarray | None
    meta: dict[str, Any]
    fingerprint: str
    built: bool


class Content(Protocol):
    """What a source is made into. `noun`: what its items are called; `vocab_size` bounds the ids; `has_weights` and
    `has_labels` say which arrays there are."""

    noun: str
    vocab_size: int
    has_weights: bool
    has_labels: bool

    def identity(self, source: Source) -> Any:
        """All that decides the items besides the files: JSON."""
        ...

    def items(self, source: Source, budget: Budget, counts: Counts) -> Iterator[Item]:
        """The items of a source, in order; what it counts on the way goes into `counts`. Raises DataError."""
        ...

    def rows(self, cache: TokenCache, keep_partial: bool) -> Rows:
        """What training reads; `keep_partial`: every token, even if a last row is short."""
        ...

    def describe(self, meta: dict[str, Any]) -> list[str]:
        """What there is to say of a cache beyond its size: a phrase each."""
        ...


def default_dir() -> Path:
    """maxi/rows under $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxi" / "rows"


def build(
    source: Source,
    content: Content,
    *,
    split: Split = "all",
    eval_share: float = 0.0,
    cache_dir: str | Path | None = None,
    skip_bad: int = 0,
    log: Log,
) -> TokenCache:
    """A source as `content` makes it, from the cache or made now.

    split: "train" and "eval" are the two sides of eval_share, both written in one pass; "all" ignores eval_share.
    skip_bad: bad records forgiven in this source. The held-out side may be empty. Raises DataError for sources that cannot be
    read or leave nothing to train on, EnvironmentFault when the cache cannot be written.
    """
    share = 0.0 if split == "all" else eval_share
    identity = _identity(source, content, share)
    folder = Path(cache_dir or default_dir()).expanduser() / _hash(identity)
    side = "eval" if split == "eval" else "train"
    found = _open(folder, side, skip_bad)
    if found is None:
        try:
            _build(source, content, share, folder, identity, skip_bad, log)
        except OSError as error:
            fix = "free space, or name another place with data.cache_dir"
            raise EnvironmentFault(f"cannot write the token cache, {error.strerror or error}", str(folder), fix) from None
        found = _open(folder, side, skip_bad, built=True)
        assert found is not None  # just written, and checked by the same rules
    if side == "train" and not len(found.ends):
        raise DataError(
            f"all {content.noun} fell into the held-out share", source.path, "lower data.eval_share, or give more documents"
        )
    return found


def _identity(source: Source, content: Content, share: float) -> dict[str, Any]:
    if source.path in documents.EMBEDDED:
        files: Any = ["python", source.path, sys.version]
    else:
        try:
            files = _stamps(documents.files(source))
        except OSError as error:
            what = f"cannot read the file, {error.strerror or error}"
            raise DataError(what, str(error.filename or source.path), "check its rights and the disk") from None
    made = {"content": content.identity(source), "limit": source.limit, "eval_share": share}
    return {"format": FORMAT, "files": files, **made}


def _stamps(paths: Sequence[Path]) -> list[list[Any]]:
    """What each file is known by. Raises OSError."""
    sizes = [file.stat().st_size for file in paths]
    files = []
    for file, size in zip(paths, sizes, strict=True):
        entry = [str(file.absolute()), size]
        files.append([*entry, _hash_file(file) if sum(sizes) <= HASHED_BYTES else file.stat().st_mtime_ns])
    return files


def _hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:32]


def _hash_file(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(folder: Path, side: str, skip_bad: int, built: bool = False) -> TokenCache | None:
    """The cache in a folder; None when it is not there, not whole, or forgave more bad records than allowed now."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta["skipped"] > skip_bad:
            return None
        mine = {**meta, **meta["sides"][side]}
        ends = np.load(folder / f"{side}.ends.npy", mmap_mode="r")
        tokens = _map(folder / f"{side}.ids", meta["dtype"], mine["tokens"])
        weights = _map(folder / f"{side}.weights", "float32", mine["tokens"]) if meta["has_weights"] else None
        labels = _map(folder / f"{side}.labels", "uint8", mine["items"]) if meta["has_labels"] else None
        if len(ends) != mine["parts"]:
            return None
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    return TokenCache(tokens, ends, weights, labels, mine, mine["sha256"], built)


def _map(path: Path, kind: str, count: int) -> np.ndarray:
    """Raises ValueError when the file has another size."""
    dtype = np.dtype(kind)
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(path)
    return np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)  # an empty file cannot be mapped


def _build(source: Source, content: Content, share: float, folder: Path, identity: Any, skip_bad: int, log: Log) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    log(f"tokenising {source.path}")
    start, budget = time.monotonic(), Budget(skip_bad)
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        sides = [_Side(aside, side, content) for side in ("train", "eval")]
        counts: Counts = {}
        for item in content.items(source, budget, counts):
            sides[_is_held_out(item.text, share)].write(item)
        totals = {side.name: side.close() for side in sides}
        if identity != _identity(source, content, share):
            raise DataError("a file changed while it was read", source.path, "run again when nothing writes to it")
        if not any(total["items"] for total in totals.values()):
            raise DataError(f"the source has no {content.noun}", source.path, "check the files and the field")
        meta = {
            "sides": totals,
            "skipped": budget.skipped,
            "dtype": sides[0].dtype.name,
            "has_weights": content.has_weights,
            "has_labels": content.has_labels,
            "files": len(identity["files"]),
            "counts": counts,
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
    """Writes one of the two sides, and counts and hashes what it writes."""

    def __init__(self, folder: Path, name: str, content: Content):
        self.name, self._folder, self._content = name, folder, content
        self.dtype = np.dtype(np.uint16 if content.vocab_size <= 1 << 16 else np.uint32)
        streams = ["ids"] + ["weights"] * content.has_weights + ["labels"] * content.has_labels
        self._files = {stream: (folder / f"{name}.{stream}").open("wb") for stream in streams}
        self._ends: list[int] = []
        self._sha, self._items, self._tokens, self._bytes = hashlib.sha256(), 0, 0, 0

    def write(self, item: Item) -> None:
        """Raises DataError when an id is outside the vocabulary."""
        for part in item.parts:
            if len(part) and int(part.max()) >= self._content.vocab_size:
                what = f"the token id {part.max()} is outside the vocabulary"
                raise DataError(what, item.where, "check the tokenizer folder")
            self._append("ids", part.astype(self.dtype))
            self._tokens += len(part)
            self._ends.append(self._tokens)
        for part in item.weights or ():
            self._append("weights", part.astype(np.float32))
        if item.label is not None:
            self._append("labels", np.uint8(item.label))
        self._items += 1
        self._bytes += len(item.text)

    def close(self) -> dict[str, Any]:
        for file in self._files.values():
            file.close()
        ends = np.asarray(self._ends, np.int64)
        np.save(self._folder / f"{self.name}.ends.npy", ends)
        self._sha.update(ends.tobytes())
        counts = {"items": self._items, "parts": len(ends), "tokens": self._tokens, "text_bytes": self._bytes}
        return {**counts, "sha256": self._sha.hexdigest()}

    def _append(self, stream: str, values: Any) -> None:
        raw = values.tobytes()
        self._files[stream].write(raw)
        self._sha.update(raw)


def _is_held_out(raw: bytes, share: float) -> bool:
    return share > 0 and int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") < share * 2.0**64


def _publish(aside: Path, folder: Path) -> None:
    """Renames a finished cache into place, over nothing but a damaged one; another process may have been first."""
    for _ in range(2):
        try:
            faults.at("cache.rename")
            aside.rename(folder)
            faults.at("cache.renamed")
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
