"""The token cache: what is in it, when it is used again, and what interruption, races and changes do to it."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxi.data import cache, workers
from maxi.data.cache import TokenCache
from maxi.data.texts import Texts
from maxi.data.tokenizer import Tokenizer
from maxi.errors import DataError, EnvironmentFault
from maxi.sections import Source

Prose = Callable[[int, int], str]


def die(_: list[str]) -> None:
    """Stands in for a worker that the system kills."""
    os._exit(9)


def fail_once(texts: list[str]) -> workers.Encoded:
    """A worker that is killed, or hangs, at the first texts that any of them gets."""
    mark = Path(os.environ["FAIL_ONCE"])
    try:
        mark.open("x").close()
    except FileExistsError:
        return workers._join(workers._backend, texts)
    if mark.name == "hung":
        time.sleep(60)
    os._exit(9)


@pytest.fixture
def source(tmp_path: Path, prose: Prose) -> Source:
    write(tmp_path / "in" / "a.jsonl", [prose(5 + i % 40, i) for i in range(300)])
    return Source(path=str(tmp_path / "in"))


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def build(source: Source, tokenizer: Tokenizer, tmp_path: Path, **more: object) -> TokenCache:
    options: dict = {"cache_dir": tmp_path / "cache", "log": lambda _: None, **more}
    return cache.build(source, Texts(tokenizer, seq_len=16, processes=options.pop("workers", 0)), **options)


def docs(found: TokenCache, tokenizer: Tokenizer) -> list[str]:
    starts = [0, *found.ends[:-1].tolist()]
    return [tokenizer.decode(found.tokens[a : b - 1]) for a, b in zip(starts, found.ends.tolist(), strict=True)]


def test_holds_every_document_and_its_end(source: Source, tokenizer: Tokenizer, tmp_path: Path, prose: Prose) -> None:
    found = build(source, tokenizer, tmp_path)
    texts = [prose(5 + i % 40, i) for i in range(300)]
    assert docs(found, tokenizer) == texts and found.built
    assert found.tokens.dtype == np.uint16 and isinstance(found.tokens, np.memmap)
    assert (found.tokens[found.ends - 1] == tokenizer.eos_id).all() and found.ends[-1] == len(found.tokens)
    counts = {"items": 300, "tokens": len(found.tokens), "text_bytes": sum(map(len, texts)), "files": 1, "skipped": 0}
    assert {key: found.meta[key] for key in counts} == counts


def test_second_open_is_a_hit_and_any_change_is_not(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = build(source, tokenizer, tmp_path)
    again = build(source, tokenizer, tmp_path)
    assert not again.built and again.fingerprint == first.fingerprint
    path = Path(source.path) / "a.jsonl"
    os.utime(path, (1, 1))
    assert not build(source, tokenizer, tmp_path).built  # touched, not changed
    stat, raw = path.stat(), path.read_text()
    path.write_text(raw.replace("sea", "see"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = build(source, tokenizer, tmp_path)
    assert changed.built and changed.fingerprint != first.fingerprint  # same size, same time, other content
    path.write_text(raw)
    assert not build(source, tokenizer, tmp_path).built
    (path.parent / "b.txt").write_text("one more")
    assert build(source, tokenizer, tmp_path).built


def test_a_limit_reads_the_first_and_is_another_cache(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = docs(build(source, tokenizer, tmp_path), tokenizer)
    some = build(dataclasses.replace(source, limit=7), tokenizer, tmp_path)
    assert some.built and docs(some, tokenizer) == whole[:7]


def test_large_files_are_known_by_size_and_time(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "HASHED_BYTES", 10)
    assert build(source, tokenizer, tmp_path).built and not build(source, tokenizer, tmp_path).built
    os.utime(Path(source.path) / "a.jsonl", (1, 1))
    assert build(source, tokenizer, tmp_path).built


def test_parallel_gives_the_same_bytes_as_serial(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(source, tokenizer, tmp_path / "1", eval_share=0.2, split="train")
    monkeypatch.setattr(workers, "BATCH", 500)
    monkeypatch.setattr(workers, "IN_PROCESS", 2000)
    parallel = build(source, tokenizer, tmp_path / "2", eval_share=0.2, split="train", workers=2)
    assert parallel.built and parallel.fingerprint == whole.fingerprint
    assert (parallel.tokens == whole.tokens).all() and (parallel.ends == whole.ends).all()


def test_killed_worker_is_one_error(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BATCH", 500)
    monkeypatch.setattr(workers, "IN_PROCESS", 0)
    monkeypatch.setattr(workers, "_work", die)
    with pytest.raises(EnvironmentFault, match=r"error\[6\] a tokenising process died"):
        build(source, tokenizer, tmp_path, workers=2)
    assert not list((tmp_path / "cache").iterdir())
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("how", ["died", "hung"])
def test_a_worker_that_fails_once_is_started_again(
    how: str, source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    whole = build(source, tokenizer, tmp_path / "1")
    monkeypatch.setenv("FAIL_ONCE", str(tmp_path / how))
    for name, value in {"BATCH": 500, "IN_PROCESS": 0, "HUNG": 5.0 if how == "hung" else 600, "_work": fail_once}.items():
        monkeypatch.setattr(workers, name, value)
    again = build(source, tokenizer, tmp_path / "2", workers=2)
    assert again.fingerprint == whole.fingerprint and caplog.text.count("all are started again") == 1
    assert {"died": "died, often", "hung": "no answer for 5 s"}[how] in caplog.text


def test_held_out_never_overlaps_train(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = Path(source.path)
    shutil.copy(path / "a.jsonl", path / "b.jsonl")  # every text twice
    train, held = (build(source, tokenizer, tmp_path, split=split, eval_share=0.3) for split in ("train", "eval"))
    assert train.built and not held.built  # one pass writes both
    a, b = docs(train, tokenizer), docs(held, tokenizer)
    assert len(a) + len(b) == 600 and not set(a) & set(b) and 0.2 < len(b) / 600 < 0.4
    assert sorted(a + b) == sorted(docs(build(source, tokenizer, tmp_path), tokenizer))


def test_skipped_records_are_counted_and_the_budget_holds_on_a_hit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", ["one", "", "two"])
    source = Source(path=str(tmp_path / "in"))
    assert build(source, tokenizer, tmp_path, skip_bad=1).meta["skipped"] == 1
    assert not build(source, tokenizer, tmp_path, skip_bad=1).built
    with pytest.raises(DataError, match=r"a.jsonl:2"):
        build(source, tokenizer, tmp_path)


def test_an_interrupted_build_leaves_nothing(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(source, tokenizer, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_cache_is_built_again(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = build(source, tokenizer, tmp_path)
    folder = next((tmp_path / "cache").iterdir())
    for name, raw in (("train.ids", b"xx"), ("meta.json", b"{"), ("train.ends.npy", b""), ("meta.json", b"[]")):
        (folder / name).write_bytes(raw)
        again = build(source, tokenizer, tmp_path)
        assert again.built and again.fingerprint == first.fingerprint


def test_two_builds_at_once_both_succeed(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found: list[TokenCache] = []
    meet = threading.Barrier(3)

    def run() -> None:
        meet.wait()
        found.append(build(source, tokenizer, tmp_path))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({entry.fingerprint for entry in found}) == 1 and len(found) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_file_that_changes_meanwhile_is_refused(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def items(*args: Any) -> Any:
        yield from real(*args)
        write(Path(source.path) / "a.jsonl", ["other"])

    real = Texts.items
    monkeypatch.setattr(Texts, "items", items)
    with pytest.raises(DataError, match="changed while it was read"):
        build(source, tokenizer, tmp_path)


def test_ids_outside_the_vocabulary_name_their_document(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "vocab_size", 40)
    with pytest.raises(DataError, match=r"token id .* is outside the vocabulary .*a.jsonl:1\)"):
        build(source, tokenizer, tmp_path)


def test_empty_and_unwritable(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", [])
    with pytest.raises(DataError, match="no documents"):
        build(Source(path=str(tmp_path / "in")), tokenizer, tmp_path)
    write(tmp_path / "in" / "a.jsonl", ["one"])
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write the token cache"):
        build(Source(path=str(tmp_path / "in")), tokenizer, tmp_path, cache_dir=tmp_path / "file" / "x")


def test_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_dir() == tmp_path / "maxi" / "rows"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_dir() == Path.home() / ".cache" / "maxi" / "rows"
