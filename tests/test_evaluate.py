"""The loss is transformers' loss, however documents are packed; bits per byte are what a hand count says."""

import io
import json
import math
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from maxi import evaluate as evaluation
from maxi import hf, scores
from maxi.data import bpe, windows
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError, MaxiError, ModelFolderError, NumericsError
from maxi.evaluate import eval_step, evaluate, measure, measure_sums, run_eval, score_prompts, table
from maxi.generation import Prompt, complete, conversation, open_chat
from maxi.hf import Loaded
from maxi.models.decoder import Compute
from maxi.models.sampling import Sampling
from maxi.objectives import Sums
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
    monkeypatch.setattr(windows, "POOL_ROWS", pool)
    monkeypatch.setattr(windows, "best_fit", lambda lengths, _: [[index] for index in range(len(lengths))])
    alone = evaluate(loaded, [corpus], seq_len=32, batch_size=2, rows=True)
    for one, other in zip([packed, *packed["rows"]], [alone, *alone["rows"]], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-6)
        assert one["tokens"] == other["tokens"]


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


def test_sums_of_batches_are_divided_once() -> None:
    """Against float64 by hand; a mean of means, or sums in float32, would be off."""
    rng = np.random.default_rng(2)
    loss, weight, right = rng.normal(1e4, 1.0, 300), rng.integers(1, 9, 300), rng.integers(0, 5, 300)

    def step_fn(params: Any, batch: Any) -> Sums:
        at, pairs = int(batch["at"]), jnp.float32(params)
        metrics = {"train/accuracy": (jnp.float32(right[at]), pairs), "kl": (jnp.float32(0), jnp.float32(0))}
        return Sums(jnp.float32(loss[at]), jnp.float32(weight[at]), metrics)

    batches = [{"at": np.array(at)} for at in range(300)]
    placed: list[int] = []
    found = measure_sums(step_fn, 7.0, batches, place=lambda b: placed.append(1) or b)  # type: ignore[arg-type]
    assert found == {
        "loss": pytest.approx(np.float32(loss).astype(np.float64).sum() / weight.sum(), rel=1e-12),
        "accuracy": pytest.approx(right.sum() / 2100, rel=1e-12),
        "kl": 0.0,
    }
    assert len(placed) == 300


def test_sums_name_the_loss_as_training_does() -> None:
    """`train/loss` is what an objective calls its loss, which may leave out what is added to it."""
    one, sums = jnp.float32(1), Sums(jnp.float32(5), jnp.float32(2), {"train/loss": (jnp.float32(4), jnp.float32(2))})
    assert measure_sums(lambda *_: sums, {}, [{"x": np.zeros(1)}]) == {"loss": 2.0}
    with pytest.raises(DataError, match="nothing to measure"):
        measure_sums(lambda *_: Sums(one, one * 0, {}), {}, [{"x": np.zeros(1)}])


PROMPTS: list[tuple[str, Prompt]] = [("a.txt:1", "the sea"), ("a.txt:2", "every lamp on board"), ("a.txt:5", "calm")]


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_greedy_completions(loaded: Loaded, chat: bool) -> None:
    """Each alone, however many go together; with chat, what a user says."""
    with open_chat(loaded) if chat else nullcontext() as template:
        made = []
        for _, prompt in PROMPTS:
            asked = conversation(str(prompt)) if chat else prompt
            made += complete(loaded, [asked], Sampling(max_new_tokens=24), chat=template)
        report = score_prompts(loaded, PROMPTS, max_new_tokens=24, chat=template, batch_size=2, rows=True)
    expected = scores.summary((one.ids, one.stopped) for one in made)
    assert {name: report[name] for name in expected} == expected
    assert (report["prompts"], report["max_new_tokens"]) == (3, 24)
    for (where, prompt), one, row in zip(PROMPTS, made, report["generations"], strict=True):
        assert row == {"where": where, "prompt": prompt, "text": one.text, "tokens": len(one.ids)} | scores.score(
            one.ids, one.stopped
        )


def test_a_prompt_that_cannot_be_is_named(loaded: Loaded) -> None:
    with pytest.raises(ConfigError, match=r"needs a chat template \(b.jsonl:7\): pass --chat"):
        score_prompts(loaded, [*PROMPTS, ("b.jsonl:7", conversation("hello"))], max_new_tokens=4)


def test_scores_on_the_terminal_and_as_json(
    loaded: Loaded, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "open_model", lambda _: loaded)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": conversation("calm \x1b[31m")}) + "\n")
    how: dict[str, Any] = {"chat": True, "max_new_tokens": 4, "json_out": tmp_path / "report.json", "rows": True}
    out = io.StringIO()
    run_eval(loaded.folder, [corpus], prompts=["the sea"], prompts_file=str(rows), out=out, **how)
    report, shown = json.loads((tmp_path / "report.json").read_text()), out.getvalue()
    assert [row["where"] for row in report["generations"]] == ["--prompt 1", f"{rows}:1"]
    assert report["documents"] == len(TEXTS) and report["loss"] > 0
    assert f"loss           {report['loss']:.4f} nats per token\n" in shown
    assert f"stopped           {report['stopped']:.4f} of 2 within 4 tokens\n" in shown
    assert f"longest loop      {report['longest_loop']:.1f} tokens\n" in shown
    assert "--- --prompt 1: 4 tokens, cut, repeated 4-grams 0.0000, longest loop " in shown
    assert "calm \\x1b[31m\n--> " in shown
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)
    alone = io.StringIO()
    run_eval(loaded.folder, prompts=["the sea"], max_new_tokens=4, out=alone)
    assert alone.getvalue().startswith("repeated 4-grams  ") and "nats" not in alone.getvalue()


def test_an_evaluation_of_nothing(corpus: str) -> None:
    """Said before a model is looked for."""
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        run_eval("nowhere", out=io.StringIO())
    with pytest.raises(ConfigError, match="--chat is about prompts"):
        run_eval("nowhere", [corpus], chat=True, out=io.StringIO())


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
