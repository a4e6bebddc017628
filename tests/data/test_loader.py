"""Batches as a function of the step: resuming, shards, epochs, mixing; and the evaluation rows."""

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from maxi.data import loader
from maxi.data.loader import Batches, EvalRows
from maxi.data.texts import Texts
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError
from maxi.sections import DataConfig, Source

Prose = Callable[[int, int], str]
T, B = 16, 4


@pytest.fixture
def paths(tmp_path: Path, prose: Prose) -> list[str]:
    for seed, name, count in ((0, "a", 40), (1000, "b", 12)):
        lines = [json.dumps({"text": f"{name} {prose(30, seed + i)}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def data(paths: list[str], tmp_path: Path, **more: object) -> DataConfig:
    options: dict = {"train": tuple(Source(path=path) for path in paths), "cache_dir": str(tmp_path / "cache"), **more}
    return DataConfig(**options)


def opened(config: DataConfig, tokenizer: Tokenizer, **more: int) -> tuple[Batches, EvalRows | None]:
    options = {"seq_len": T, "batch_size": B, "seed": 7, **more}
    content = Texts(tokenizer, seq_len=options.pop("seq_len"), across_documents=config.across_documents)
    return loader.open_data(config, content, log=lambda _: None, **options)


def same(a: loader.Batch, b: loader.Batch) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def keys(batch: loader.Batch) -> list[bytes]:
    return [row.tobytes() for row in batch["tokens"]]


def test_shapes(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    batch = opened(data(paths, tmp_path), tokenizer)[0].batch(0)
    names = ("tokens", "targets", "positions", "segments", "loss_weight")
    assert {name: (batch[name].shape, batch[name].dtype.name) for name in batch} == {
        name: ((B, T), "float32" if name == "loss_weight" else "int32") for name in names
    }


def test_resuming_is_dropping_what_was_read(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    batches, _ = opened(data(paths, tmp_path), tokenizer)
    whole = list(islice(batches.iterate(), 60))
    for start in (1, 17, 53):
        resumed = list(islice(opened(data(paths, tmp_path), tokenizer)[0].iterate(start), 60 - start))
        assert all(same(a, b) for a, b in zip(whole[start:], resumed, strict=True))
    assert all(same(batches.batch(step), whole[step]) for step in (0, 5, 59))
    far = 10**9
    assert same(next(batches.iterate(far)), batches.batch(far))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_any_number_of_shards_reads_the_same_global_batches(
    shards: int, paths: list[str], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    batches, _ = opened(data(paths, tmp_path), tokenizer)
    parts = [list(islice(batches.iterate(3, shard, shards), 20)) for shard in range(shards)]
    for step, mine in enumerate(zip(*parts, strict=True), 3):
        assert same({name: np.concatenate([part[name] for part in mine]) for name in mine[0]}, batches.batch(step))
        assert same(mine[-1], batches.batch(step, shards - 1, shards))


def test_every_epoch_covers_every_row_once_in_a_new_order(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    batches, _ = opened(data(paths[:1], tmp_path), tokenizer)
    rows = batches.rows_per_epoch
    assert rows % B  # epochs do not end with a batch
    stream = [key for batch in islice(batches.iterate(), 3 * rows // B + 3) for key in keys(batch)]
    orders = [stream[epoch * rows : (epoch + 1) * rows] for epoch in range(3)]
    expected = Counter(batches.opened[0].rows[i]["tokens"].tobytes() for i in range(rows))
    assert all(Counter(order) == expected for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_seed_and_neighbouring_seeds(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    def order(seed: int, epoch: int) -> list[bytes]:
        batches, _ = opened(data(paths[:1], tmp_path), tokenizer, seed=seed, batch_size=1)
        rows = batches.rows_per_epoch
        return [keys(batches.batch(epoch * rows + step))[0] for step in range(30)]

    assert order(1, 0) == order(1, 0) != order(2, 0)
    assert order(1, 1) != order(2, 0)  # Grain alone would make these the same


def test_mixing_follows_the_weights_and_repeats_the_short(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = (Source(path=paths[0], weight=1.0), Source(path=paths[1], weight=3.0))
    batches, _ = opened(data([], tmp_path, train=sources), tokenizer)
    mine = [{entry.rows[i]["tokens"].tobytes() for i in range(len(entry.rows))} for entry in batches.opened]
    seen = [key for batch in islice(batches.iterate(), 200) for key in keys(batch)]
    assert not mine[0] & mine[1]
    assert abs(sum(key in mine[1] for key in seen) / len(seen) - 0.75) < 0.01
    assert len(seen) * 0.75 > 2 * len(batches.opened[1].rows)  # b was read more than twice
    assert batches.rows_per_epoch == sum(map(len, (entry.rows for entry in batches.opened)))


def test_fingerprint_follows_what_is_read(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    base = data(paths, tmp_path)
    first = opened(base, tokenizer)[0].fingerprint
    assert opened(base, tokenizer)[0].fingerprint == first
    moved = [Path(path).rename(tmp_path / f"moved_{Path(path).name}") for path in paths]
    assert opened(data(list(map(str, moved)), tmp_path), tokenizer)[0].fingerprint == first  # the same text elsewhere
    again = data(list(map(str, moved)), tmp_path)
    others = [opened(again, tokenizer, seed=8), opened(again, tokenizer, seq_len=8)]
    others.append(opened(data([str(moved[0])], tmp_path), tokenizer))
    others.append(opened(data(list(map(str, moved)), tmp_path, across_documents=True), tokenizer))
    moved[0].write_text(moved[0].read_text().replace("sea", "see"))
    others.append(opened(again, tokenizer))
    assert len({first, *(batches.fingerprint for batches, _ in others)}) == 6


def test_too_little_data(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = data(paths, tmp_path)
    with pytest.raises(DataError, match=r"error\[3\] .* rows of 16 tokens do not fill a batch of 100000 .*a.jsonl"):
        opened(config, tokenizer, batch_size=100_000)
    with pytest.raises(DataError, match=r"less than one row of 100000 .*a.jsonl"):
        opened(config, tokenizer, seq_len=100_000)
    with pytest.raises(ConfigError, match="does not divide into 3 shards"):
        opened(config, tokenizer)[0].batch(0, 0, 3)


def test_describe(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    first, _ = opened(data(paths[:1], tmp_path), tokenizer)
    counts = rf"train .*a.jsonl: 1 file, 40 documents, {first.tokens:,} tokens, {first.rows_per_epoch:,} rows"
    (line,) = first.describe()
    assert line == counts.replace("train .*a.jsonl", f"train {paths[0]}") + " (tokenised now)"
    assert opened(data(paths[:1], tmp_path), tokenizer)[0].describe()[0].endswith("(from the cache)")


def test_no_evaluation_unless_asked(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert opened(data(paths, tmp_path), tokenizer)[1] is None


def test_eval_rows_are_fixed_evenly_spaced_and_padded(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, rows = opened(data(paths[:1], tmp_path, eval=tuple(Source(path=p) for p in paths)), tokenizer)
    assert rows is not None and len(rows) > 50
    full = list(rows.batches(10**6))
    assert len(full) == -(-len(rows) // B) and all(batch["tokens"].shape == (B, T) for batch in full)
    weight = sum(batch["loss_weight"].sum() for batch in full)
    assert weight == sum(int(e.cache.meta["tokens"]) - int(e.cache.meta["items"]) for e in rows.opened)  # nothing is lost
    some = [row for batch in rows.batches(10) for row in batch["tokens"]]
    picked = [rows[i * len(rows) // 10]["tokens"] for i in range(10)]
    assert np.array_equal(some[:10], picked) and len(some) == 12
    last = list(rows.batches(10))[-1]
    assert (last["segments"][2:] == 0).all() and (last["loss_weight"][2:] == 0).all()
    halves = [list(rows.batches(10, shard, 2)) for shard in range(2)]
    for whole, *parts in zip(rows.batches(10), *halves, strict=True):
        assert same({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


def test_held_out_rows_come_from_the_same_sources(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    batches, rows = opened(data(paths, tmp_path, eval_share=0.25), tokenizer)
    assert rows is not None and [line.split()[0] for line in rows.describe()] == ["held-out", "held-out"]
    documents = [int(e.cache.meta["items"]) for e in (*batches.opened, *rows.opened)]
    assert sum(documents) == 52 and all(documents)
    with pytest.raises(DataError, match="no documents fell into the held-out share"):
        opened(data(paths[:1], tmp_path, eval_share=1e-9), tokenizer)


def test_reading_threads_end_with_the_iterator(paths: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    batches, _ = opened(data(paths, tmp_path), tokenizer)
    iterator = batches.iterate()
    next(iterator)
    assert any("grain" in thread.name for thread in threading.enumerate())
    iterator.close()  # type: ignore[attr-defined]
    for thread in [thread for thread in threading.enumerate() if "grain" in thread.name]:
        thread.join(5)
        assert not thread.is_alive()


def test_imports_stay_light() -> None:
    heavy = "{'jax', 'grain', 'transformers', 'tokenizers', 'pyarrow', 'datasets'}"
    code = f"import sys, maxi.data.loader, maxi.data.bpe; print({heavy} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_stdout_stays_clean(paths: list[str], tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    batches, _ = opened(data(paths, tmp_path), tokenizer)
    next(batches.iterate())
    assert capfd.readouterr().out == ""
