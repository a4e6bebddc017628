"""Continuations are those of transformers; a row depends on nothing but its prompt; filters keep the same tokens."""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from maxi import generation, hf, mesh
from maxi.data import bpe
from maxi.errors import ConfigError, ModelFolderError, NumericsError
from maxi.generation import complete, conversation, generate, logits, open_chat, stream_text, stream_tokens
from maxi.hf import Loaded
from maxi.models.sampling import Sampling, penalize, warp
from maxi.params import Tree, shardings
from maxi.sections import MeshConfig
from tests import tiny

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama": ("llama", {"num_key_value_heads": 1}),
}
RAGGED = [[5, 17, 3], [9], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57], [1, 2, 3, 4, 5, 6]]


def made(loaded: Loaded, prompts: Sequence[Sequence[int]], eos_ids: Sequence[int] = (), **settings: Any) -> list[list[int]]:
    """All tokens of each row, the -1 of finished rows too."""
    tokens = stream_tokens(loaded.model, loaded.params, prompts, Sampling(**settings), eos_ids)
    return np.stack(list(tokens), axis=1).tolist()


def theirs(model: Any, prompt: Sequence[int], **settings: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **settings)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Loaded]:
    """(transformers' model, ours) with the same weights."""
    family, fields = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny.save(folder, family, num_hidden_layers=2, eos_token_id=None, bos_token_id=None, **fields)
    return model, hf.load_hf(folder)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model alone, for what does not depend on the family."""
    folder = tmp_path_factory.mktemp("qwen3")
    tiny.save(folder, "qwen3", head_dim=8, num_hidden_layers=2)
    return hf.load_hf(folder)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Loaded]:
    """(transformers' model, ours) with a tokenizer and its chat template."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    text = "the cat sat on the mat and the dog sat on the log; naïve café 猫 🙂 " * 20
    tokenizer = bpe.train([text], bpe.MIN_VOCAB + 20, folder)
    fields = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id, "max_position_embeddings": 128}
    return tiny.save(folder, "qwen2", num_hidden_layers=2, **fields), hf.load_hf(folder)


@pytest.fixture(scope="module")
def spoken(talker: tuple[Any, Loaded]) -> Loaded:
    """A model with a tokenizer."""
    return talker[1]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_that_of_transformers(pair: tuple[Any, Loaded], penalty: float) -> None:
    """Prompts of different lengths in one batch, each against transformers alone."""
    model, ours = pair
    got = made(ours, RAGGED, max_new_tokens=30, repetition_penalty=penalty)
    assert got == [theirs(model, prompt, max_new_tokens=30, repetition_penalty=penalty) for prompt in RAGGED]


def test_end_of_sequence_is_that_of_transformers(pair: tuple[Any, Loaded]) -> None:
    model, ours = pair
    free = made(ours, RAGGED, max_new_tokens=16)
    ends = [free[0][4], free[2][7]]
    expected = [theirs(model, prompt, max_new_tokens=16, eos_token_id=ends) for prompt in RAGGED]
    got = made(ours, RAGGED, ends, max_new_tokens=16)
    assert [[token for token in row if token != -1] for row in got] == expected
    assert len(got[0]) == max(map(len, expected)), "stops when the last row has ended"
    assert min(map(len, expected)) < len(got[0]), "some row had to wait"


def decoded(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, count: int) -> tuple[np.ndarray, list[list[int]]]:
    """The logits [T, B, V] that each step chose from, and what it chose."""
    seen: list[np.ndarray] = []
    choose = generation._choose

    def spy(how: Any, eos_ids: Any, logits_BV: Any, rows: Any) -> Any:
        seen.append(np.asarray(logits_BV))
        return choose(how, eos_ids, logits_BV, rows)

    monkeypatch.setattr(generation, "_choose", spy)
    got = made(loaded, RAGGED, max_new_tokens=count)
    return np.stack(seen), got


def test_decoding_gives_the_logits_of_one_pass(pair: tuple[Any, Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    """decode = prefill, in f32: what the steps chose from is what the whole sequence at once says."""
    _, ours = pair
    decoded_TBV, got = decoded(ours, monkeypatch, 20)
    for row, prompt in enumerate(RAGGED):
        whole = logits(ours, [[*prompt, *got[row][:-1]]])[0, len(prompt) - 1 :]
        np.testing.assert_allclose(decoded_TBV[:, row], whole, atol=2e-5 * np.abs(whole).max())


def test_decoding_in_bfloat16_errs_no_more_than_one_pass(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """decode = prefill, in bf16: both are the float32 logits of the same weights, but for rounding."""
    low = dataclasses.replace(loaded, params=jax.tree.map(lambda w: w.astype(jnp.bfloat16), loaded.params))
    high = dataclasses.replace(loaded, params=jax.tree.map(lambda w: w.astype(jnp.float32), low.params))
    decoded_TBV, got = decoded(low, monkeypatch, 8)
    for row, prompt in enumerate(RAGGED):
        ids = [[*prompt, *got[row][:-1]]]
        exact, whole = (logits(each, ids)[0, len(prompt) - 1 :] for each in (high, low))
        error, allowed = (np.square(each - exact).mean() ** 0.5 for each in (decoded_TBV[:, row], whole))
        assert 0 < error <= 2 * allowed, (row, error, allowed)


def test_logits_are_those_of_transformers(pair: tuple[Any, Loaded]) -> None:
    model, ours = pair
    tokens = np.random.default_rng(0).integers(0, 96, (2, 21))
    expected = tiny.logits(model, tokens)
    got = logits(ours, tokens.tolist())
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_chunks_of_a_long_prompt_change_nothing(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [np.random.default_rng(n).integers(0, 96, n).tolist() for n in (33, 7, 16, 17)]
    whole = made(loaded, prompts, max_new_tokens=12, temperature=1.0)
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 16)
    assert made(loaded, prompts, max_new_tokens=12, temperature=1.0) == whole


def test_rounding_lengths_up_changes_nothing(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = made(loaded, RAGGED, max_new_tokens=12)
    monkeypatch.setattr(generation, "_width", lambda length: length)
    monkeypatch.setattr(generation, "CACHE_STEP", 1)
    assert made(loaded, RAGGED, max_new_tokens=12) == expected


def test_a_row_does_not_depend_on_the_others(loaded: Loaded) -> None:
    how: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "top_k": 20, "repetition_penalty": 1.1, "seed": 3}
    together = made(loaded, RAGGED, **how)
    assert made(loaded, RAGGED[:1], **how)[0] == together[0]
    others = [[7] * 30, [8], RAGGED[2], [9, 9]]
    assert made(loaded, others, **how)[2] == together[2]


def test_seeds(loaded: Loaded) -> None:
    how: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0}
    twice = [made(loaded, [[5, 6]] * 4, seed=1, **how) for _ in range(2)]
    assert twice[0] == twice[1]
    assert len({tuple(row) for row in twice[0]}) == 4, "the same prompt again is drawn anew"
    assert made(loaded, [[5, 6]] * 4, seed=2, **how) != twice[0]


def test_draws_follow_the_probabilities(loaded: Loaded) -> None:
    """Pearson's chi-squared over 1,000 first tokens; the bound is the 99.99th percentile for 4 kept tokens."""
    rows, how = 1000, Sampling(max_new_tokens=1, temperature=0.7, top_k=4)
    tokens = next(iter(stream_tokens(loaded.model, loaded.params, [[11, 12]] * rows, how)))
    p_V = np.asarray(jax.nn.softmax(warp(jnp.asarray(logits(loaded, [[11, 12]])[:, -1]), how)))[0]
    kept = p_V > 0
    counts = np.bincount(tokens, minlength=len(p_V))
    assert kept.sum() == 4
    assert counts[~kept].sum() == 0
    assert ((counts - rows * p_V)[kept] ** 2 / (rows * p_V[kept])).sum() < 21.1


FILTERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 7},
    "top-k-1": {"top_k": 1},
    "top-k-over-vocabulary": {"top_k": 1000},
    "top-p": {"top_p": 0.83},
    "top-p-0": {"top_p": 0.0},
    "min-p": {"min_p": 0.05},
    "min-p-1": {"min_p": 1.0},
    "all": {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_what_transformers_keeps(name: str) -> None:
    settings: dict[str, Any] = {"temperature": 1.0} | FILTERS[name]
    logits_BV = (3 * np.random.default_rng(4).standard_normal((64, 301))).astype(np.float32)
    scores: Any = torch.tensor(logits_BV)
    warpers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper}
    warpers |= {"top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    for key, value in settings.items():
        scores = warpers[key](value)(None, scores)
    got = np.asarray(warp(jnp.asarray(logits_BV), Sampling(**settings)))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(scores.numpy()))
    np.testing.assert_allclose(got, scores.numpy(), rtol=1e-6)


def test_top_k_keeps_ties_as_transformers_does() -> None:
    logits_BV = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    expected = TopKLogitsWarper(2)(None, torch.tensor(logits_BV)).numpy()  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.asarray(warp(jnp.asarray(logits_BV), Sampling(temperature=1.0, top_k=2))), expected)


@pytest.mark.parametrize("penalty", [1.4, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    rng = np.random.default_rng(5)
    logits_BV, ids = rng.standard_normal((8, 50)).astype(np.float32), rng.integers(0, 50, (8, 12))
    seen_BV = np.zeros((8, 50), bool)
    np.put_along_axis(seen_BV, ids, True, axis=1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), torch.tensor(logits_BV))  # type: ignore[arg-type]
    np.testing.assert_allclose(
        np.asarray(penalize(jnp.asarray(logits_BV), jnp.asarray(seen_BV), penalty)), expected.numpy(), rtol=1e-6
    )


def test_nothing_is_compiled_twice(loaded: Loaded) -> None:
    how: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.9}
    compiled: list[Any] = [generation._prefill, generation._step, generation._choose]
    made(loaded, [[1, 2, 3]], seed=1, **how)
    sizes = [function._cache_size() for function in compiled]
    made(loaded, [[4] * 9], seed=2, **how)
    how["max_new_tokens"] = 50
    made(loaded, [[4] * 9], seed=2, **how)
    assert [function._cache_size() for function in compiled] == sizes


def test_sharded_is_single_device(loaded: Loaded) -> None:
    """Three prompts over four data shards and two tensor shards; one row only fills the mesh."""
    expected = made(loaded, RAGGED[:3], max_new_tokens=8)
    devices = mesh.build(MeshConfig(fsdp=4, tensor=2))
    params: Tree = jax.device_put(loaded.params, shardings(loaded.model.table, devices))
    with jax.set_mesh(devices):
        assert made(Loaded(loaded.model, params, loaded.folder), RAGGED[:3], max_new_tokens=8) == expected


def test_beyond_the_trained_length_it_warns(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    stream_tokens(loaded.model, loaded.params, [[1] * 10], Sampling(max_new_tokens=54))
    assert not caplog.records
    stream_tokens(loaded.model, loaded.params, [[1] * 10], Sampling(max_new_tokens=55))
    assert "max_position_embeddings is 64" in caplog.text


BAD_SETTINGS = [
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"top_k": -1},
    {"top_p": 1.1},
    {"min_p": -0.1},
    {"repetition_penalty": 0.0},
    {"max_new_tokens": 0},
    {"seed": -1},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=lambda settings: f"{settings}")
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"error\[2\] {next(iter(settings))} is .*it must be"):
        Sampling(**settings)


@pytest.mark.parametrize("prompts", [[], [[1], []], [[96]], [[-1]]])
def test_prompts_that_cannot_be(loaded: Loaded, prompts: list[list[int]]) -> None:
    for call in (partial(stream_tokens, loaded.model, loaded.params, prompts, Sampling()), partial(logits, loaded, prompts)):
        with pytest.raises(ConfigError, match=r"^maxi: error\[2\] [^\n]*$"):
            call()


def test_rows_of_logits_must_be_equally_long(loaded: Loaded) -> None:
    with pytest.raises(ConfigError, match="rows of 1 to 2 tokens"):
        logits(loaded, [[1], [1, 2]])


def test_weights_that_are_not_numbers(loaded: Loaded) -> None:
    broken = loaded.params | {"final_norm": loaded.params["final_norm"] * np.nan}
    with pytest.raises(NumericsError, match="not finite"):
        made(Loaded(loaded.model, broken, loaded.folder), [[1, 2]])


def test_text(spoken: Loaded) -> None:
    tokenizer, prompts = spoken.tokenizer, ["the cat", "on the mat and"]
    assert tokenizer is not None
    ids = [tokenizer.encode([prompt])[0].tolist() for prompt in prompts]
    rows = [[token for token in row if token not in (-1, tokenizer.eos_id)] for row in made(spoken, ids, [tokenizer.eos_id])]
    expected = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert generate(spoken, prompts) == expected
    assert "".join(stream_text(spoken, prompts[0], Sampling())) == expected[0]


def test_text_ends_before_the_end_of_sequence(spoken: Loaded, tmp_path: Path) -> None:
    tokenizer, prompts = spoken.tokenizer, ["the cat", "on the mat"]
    assert tokenizer is not None
    ids = [tokenizer.encode([prompt])[0].tolist() for prompt in prompts]
    free = made(spoken, ids, max_new_tokens=8)
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[0][3]]}))
    ending = Loaded(spoken.model, spoken.params, tmp_path)
    cut = free[0][: free[0].index(free[0][3])]
    assert generate(ending, prompts, max_new_tokens=8)[0] == tokenizer.decode(cut, skip_special_tokens=True)
    assert "".join(stream_text(ending, prompts[0], Sampling())) == tokenizer.decode(cut, skip_special_tokens=True)


def test_a_conversation_is_continued_as_by_transformers(talker: tuple[Any, Loaded]) -> None:
    """Also when the end of a turn is among what is said: a token of a free continuation is made the one that ends turns."""
    model, ours = talker
    theirs_of = AutoTokenizer.from_pretrained(ours.folder)
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "on?"}]
    asked = [said, conversation("the dog", system="bark")]
    ids = [theirs_of.apply_chat_template(one, add_generation_prompt=True, return_dict=True)["input_ids"] for one in asked]
    with open_chat(ours) as chat:
        assert chat.end_token_id == theirs_of.convert_tokens_to_ids("<|im_end|>")
        free = [made.ids for made in complete(ours, asked, Sampling(max_new_tokens=20), chat=chat)]
        assert free == [theirs(model, prompt, max_new_tokens=20) for prompt in ids]
        end = max(free[0], key=free[0].index)  # the last to come up
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(chat, "end_token_id", end)
            ended, other = complete(ours, asked, Sampling(max_new_tokens=20), chat=chat)
            given, _ = complete(ours, ids, Sampling(max_new_tokens=20), chat=chat)
            plain = complete(ours, ids, Sampling(max_new_tokens=20))
    assert (ended.ids, ended.stopped) == (free[0][: free[0].index(end)], True)
    cut = free[1].index(end) if end in free[1] else None
    assert (other.ids, other.stopped) == (free[1][:cut], cut is not None)
    assert given == ended, "ids are continued as they are"
    assert [(made.ids, made.stopped) for made in plain] == [(row, False) for row in free], "without chat nothing ends there"
    assert ended.text == theirs_of.decode(ended.ids, skip_special_tokens=True)


def test_the_last_token_may_be_the_end(talker: tuple[Any, Loaded], tmp_path: Path) -> None:
    """Ended within the limit means: the end is among the `max_new_tokens`."""
    _, ours = talker
    tokenizer = ours.tokenizer
    assert tokenizer is not None
    free = complete(ours, ["the cat"], Sampling(max_new_tokens=9))[0].ids
    at = next(i for i in range(4, 9) if free[i] not in free[:i])
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[at]]}))
    ending = Loaded(ours.model, ours.params, tmp_path)
    for limit, stopped in ((at + 1, True), (at, False)):
        made = complete(ending, ["the cat"], Sampling(max_new_tokens=limit))[0]
        assert (made.ids, made.stopped) == (free[:at], stopped)


def test_special_tokens_are_no_text(talker: tuple[Any, Loaded]) -> None:
    _, ours = talker
    tokenizer = ours.tokenizer
    assert tokenizer is not None
    special = tokenizer.encode(["<|im_start|>"])[0][0]
    head = ours.params["lm_head"]
    loud = ours.params | {"lm_head": jnp.zeros_like(head).at[special].set(1.0)}
    scores = logits(Loaded(ours.model, loud, ours.folder), [[1, 2, 3]])[0, -1]
    if scores[special] < 0:
        loud["lm_head"] = -loud["lm_head"]
    made = complete(Loaded(ours.model, loud, ours.folder), [[1, 2, 3]], Sampling(max_new_tokens=4))[0]
    assert special in made.ids and "im_start" not in made.text


def test_messages_need_a_template(talker: tuple[Any, Loaded]) -> None:
    with pytest.raises(ConfigError, match=r"needs a chat template \(prompt 2\)"):
        complete(talker[1], ["text", conversation("hello")], Sampling())


def test_bytes_that_are_no_text(talker: tuple[Any, Loaded]) -> None:
    """As Python hands over an argument that is not UTF-8."""
    with pytest.raises(ConfigError, match=r"not UTF-8 \(prompt 1\)"):
        generate(talker[1], ["caf\udce9"])


def test_without_a_tokenizer(loaded: Loaded) -> None:
    with pytest.raises(ModelFolderError, match="no tokenizer"):
        generate(loaded, ["text"])


def test_an_empty_prompt(spoken: Loaded) -> None:
    with pytest.raises(ConfigError, match="prompt 2 has no tokens"):
        generate(spoken, ["text", ""])
