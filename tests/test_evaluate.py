"""The loss is transformers' loss, however documents are packed; bits per byte are what a hand count says."""

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from maxi import evaluate as evaluation
from maxi import hf
from maxi.data import bpe
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError, MaxiError, ModelFolderError, NumericsError
from maxi.evaluate import eval_step, evaluate, measure, run_eval, table
from maxi.hf import Loaded
from maxi.models.decoder import Compute
from tests import tiny

WORDS = [*("the", "sea", "was", "calm", "and", "every", "lamp", "on", "board", "shone", "naïve", "café", "猫", "🙂")]


def _prose(words: int, seed: int) -> str:
    pick = random.Random(seed)
    return " ".join(pick.choice(WORDS) for _ in range(words))


TEXTS = [_prose(words, words) for words in (3, 40, 1, 17, 90, 8, 25)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Loaded]:
    """(transformers' model, ours) with the same weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("evaluated") / "model"
    tokenizer = bpe.train([_prose(2000, 0)], bpe.MIN_VOCAB + 20, folder)
    fields = {"vocab_size": tokenizer.vocab_size + 3, "num_hidden_layers": 2, "max_position_embeddings": 256}
    model = tiny.save(folder, "qwen2", eos_token_id=tokenizer.eos_id, **fields)
    return model, hf.load_hf(folder)


@pytest.fixture
def loaded(pair: tuple[Any, Loaded]) -> Loaded:
    return pair[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "other": text[:2]}) + "\n" for text in TEXTS))
    return str(path)


def tokenizer_of(loaded: Loaded) -> Tokenizer:
    assert loaded.tokenizer is not None
    return loaded.tokenizer


def nats_by_transformers(model: Any, ids: np.ndarray, seq_len: int) -> np.ndarray:
    """Of every id but the first, in windows of seq_len inputs."""
    nats = []
    for first in range(0, len(ids) - 1, seq_len):
        window = torch.tensor(ids[first : first + seq_len + 1]).long()
        with torch.no_grad():
            scores = model(window[None, :-1]).logits[0]
        nats.append(torch.nn.functional.cross_entropy(scores, window[1:], reduction="none").double().numpy())
    return np.concatenate(nats)


def documents(loaded: Loaded) -> list[np.ndarray]:
    tokenizer = tokenizer_of(loaded)
    return [np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode(TEXTS)]


@pytest.mark.parametrize("seq_len", [None, 32, 7])
def test_each_document_has_the_loss_that_transformers_gives(pair: tuple[Any, Loaded], corpus: str, seq_len: int | None) -> None:
    """Long documents are cut; the token after a window's last is predicted by that window."""
    model, loaded = pair
    report = evaluate(loaded, [corpus], seq_len=seq_len, batch_size=2, rows=True)
    sizes = tokenizer_of(loaded).token_bytes()
    assert sizes is not None
    every: list[np.ndarray] = []
    for number, (ids, row) in enumerate(zip(documents(loaded), report["rows"], strict=True)):
        nats = nats_by_transformers(model, ids, seq_len or 256)
        n_bytes = sizes[ids[1:]]
        assert row["where"].endswith(f"texts.jsonl:{number + 1}")
        assert row["tokens"] == len(ids) - 1
        assert row["loss"] == pytest.approx(nats.mean(), rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-4)
        if n_bytes.sum():
            assert row["bits_per_byte"] == pytest.approx(nats[n_bytes > 0].sum() / n_bytes.sum() / math.log(2), rel=1e-5)
        every.append(nats)
    whole = np.concatenate(every)
    assert report["loss"] == pytest.approx(whole.mean(), rel=1e-5)
    assert (report["tokens"], report["documents"]) == (len(whole), len(TEXTS))


def test_bytes_are_those_of_the_text_without_each_first_token(loaded: Loaded, corpus: str) -> None:
    sizes, starts = tokenizer_of(loaded).token_bytes(), [ids[0] for ids in documents(loaded)]
    assert sizes is not None
    expected = sum(len(text.encode()) for text in TEXTS) - sum(int(sizes[start]) for start in starts)
    assert evaluate(loaded, [corpus])["bytes"] == expected


@pytest.mark.parametrize("pool", [1, 64])
def test_packing_changes_nothing(loaded: Loaded, corpus: str, pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against rows that hold one window each."""
    packed = evaluate(loaded, [corpus], seq_len=32, batch_size=2, rows=True)
    monkeypatch.setattr(evaluation, "POOL_ROWS", pool)
    monkeypatch.setattr(evaluation, "_first_fit", lambda windows, _: [[window] for window in windows])
    alone = evaluate(loaded, [corpus], seq_len=32, batch_size=2, rows=True)
    for one, other in zip([packed, *packed["rows"]], [alone, *alone["rows"]], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-6)
        assert one["tokens"] == other["tokens"]


@pytest.mark.parametrize("pool", [1, 3, 64])
def test_every_window_is_packed_once(pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "POOL_ROWS", pool)
    rng = np.random.default_rng(0)
    windows = [(n, rng.integers(0, 99, rng.integers(2, 34)).astype(np.int32)) for n in range(200)]
    batches = list(evaluation._packed(iter(windows), 32, 4))
    assert {batch["tokens"].shape for batch in batches[:-1]} == {(4, 32)}
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segments"][row].max() + 1):
                at = np.flatnonzero(batch["segments"][row] == segment)
                assert (np.diff(at) == 1).all()
                assert (batch["positions"][row, at] == np.arange(len(at))).all()
                ids = np.append(batch["tokens"][row, at], batch["targets"][row, at[-1]])
                assert (batch["targets"][row, at] == ids[1:]).all()
                (document,) = set(batch["documents"][row, at].tolist())
                found.append((document, ids.tolist()))
    assert sorted(found) == [(n, ids.tolist()) for n, ids in windows]
    real = sum((batch["segments"] > 0).sum() for batch in batches)
    assert pool < 64 or real / sum(batch["segments"].size for batch in batches) > 0.95


def test_measure_respects_loss_weights(loaded: Loaded) -> None:
    """Halves count half, in the loss and in bits per byte; a token of no bytes counts in the loss alone."""
    rng = np.random.default_rng(1)
    weight = np.array([[1, 0.5, 0, 1], [0, 0, 1, 0.5]], np.float32)
    batch: dict[str, Any] = {name: rng.integers(1, 90, (2, 4)).astype(np.int32) for name in ("tokens", "targets")}
    batch |= {"positions": np.tile(np.arange(4, dtype=np.int32), (2, 1)), "segments": np.ones((2, 4), np.int32)}
    batch["loss_weight"] = weight
    sizes = np.full(loaded.model.vocab_size, 3, np.int32)
    sizes[batch["targets"][0, 0]] = 0
    step_fn = eval_step(loaded.model, Compute())
    nats = -np.asarray(step_fn(loaded.params, {name: jnp.asarray(array) for name, array in batch.items()}), np.float64)
    text = weight * (sizes[batch["targets"]] > 0)
    placed: list[int] = []
    found = measure(step_fn, loaded.params, [batch, batch], sizes, place=lambda b: placed.append(1) or b)
    assert found["loss"] == pytest.approx((nats * weight).sum() / weight.sum(), rel=1e-9)
    assert found["bits_per_byte"] == pytest.approx((nats * text).sum() / (3 * text.sum()) / math.log(2), rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["tokens"] == 10
    assert len(placed) == 2
    assert measure(step_fn, loaded.params, [batch], None)["bits_per_byte"] is None


def test_measure_of_nothing(loaded: Loaded) -> None:
    with pytest.raises(DataError, match="no token to predict"):
        measure(eval_step(loaded.model, Compute()), loaded.params, [], None)


def test_terminal_and_json(loaded: Loaded, corpus: str, tmp_path: Path) -> None:
    out, path = io.StringIO(), tmp_path / "report.json"
    run_eval(loaded.folder, [corpus], json_out=path, rows=True, out=out)
    report = json.loads(path.read_text())
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    assert (report["model"], report["data"]) == (str(loaded.folder), [corpus])
    assert len(report["rows"]) == len(TEXTS)
    shown = out.getvalue()
    assert f"loss           {report['loss']:.4f} nats per token\n" in shown
    assert f"bits per byte  {report['bits_per_byte']:.4f}\n" in shown
    assert all(row["where"] in shown for row in report["rows"])
    plain = {key: value for key, value in report.items() if key != "rows"} | {"bits_per_byte": None, "bytes": None}
    assert table(plain).splitlines()[2] == "bits per byte  -"


def test_another_field(loaded: Loaded, corpus: str) -> None:
    assert evaluate(loaded, [corpus, corpus], field="other")["documents"] == 2 * len(TEXTS)


def refused(code: int, error: type[MaxiError], *args: Any, **kwargs: Any) -> str:
    """The one line that `evaluate` says."""
    with pytest.raises(error) as caught:
        evaluate(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"maxi: error[{code}] ")
    return line


def test_faults_are_one_line(loaded: Loaded, corpus: str, tmp_path: Path) -> None:
    assert "no file matches" in refused(3, DataError, loaded, [str(tmp_path / "none.jsonl")])
    (tmp_path / "empty.txt").write_text("")
    refused(3, DataError, loaded, [str(tmp_path / "empty.txt")])
    assert "no field 'body'" in refused(3, DataError, loaded, [corpus], field="body")
    assert "at least 1" in refused(2, ConfigError, loaded, [corpus], seq_len=0)
    assert "no tokenizer" in refused(4, ModelFolderError, Loaded(loaded.model, loaded.params, tmp_path), [corpus])
    broken = loaded.params | {"final_norm": loaded.params["final_norm"] * np.nan}
    assert "not finite" in refused(5, NumericsError, Loaded(loaded.model, broken, loaded.folder), [corpus])


def test_a_tokenizer_with_more_ids_than_the_model(loaded: Loaded, corpus: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2", num_hidden_layers=1)
    tokenizer_of(loaded).save(tmp_path)
    assert "ids but the model 96" in refused(2, ConfigError, hf.load_hf(tmp_path), [corpus])


def test_a_report_that_cannot_be_written(loaded: Loaded, corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder of --json does not exist"):
        run_eval(loaded.folder, [corpus], json_out=tmp_path / "none" / "report.json", out=io.StringIO())
