"""Virtual tokens, as prompts and as prefixes: they are peft's, and no row, device or cache can tell them from tokens."""

import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft as theirs
import pytest
import torch

from maxi import adapters, mesh, objectives, program
from maxi import step as steps
from maxi.__main__ import main
from maxi.adapters import virtual
from maxi.adapters.prefix import FromNetwork
from maxi.config import load
from maxi.data.cache import TokenCache
from maxi.data.loader import stack
from maxi.data.sample_rows import PairRows, SampleRows
from maxi.data.windows import cut, packed
from maxi.errors import ConfigError, ModelFolderError
from maxi.generation import logits, stream_tokens
from maxi.hf import peft
from maxi.models import decoder, from_hf_config
from maxi.models.decoder import Compute
from maxi.models.sampling import Sampling
from maxi.objectives.branches import branch_logprobs
from maxi.params import get, init
from maxi.pretrained import open_model, open_trained
from maxi.sections import ComputeConfig, MeshConfig, OptimConfig, PrefixConfig, PromptConfig
from tests import tiny
from tests.adapters import sides
from tests.adapters import test_runs as runs
from tests.adapters.sides import TOKENS
from tests.adapters.test_runs import home as home
from tests.test_pairs import SMALL

N = 3
"""Virtual tokens."""
SMALLEST = SMALL | {"num_hidden_layers": 1}
PEFT: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "prefix": ("qwen3", theirs.PrefixTuningConfig(num_virtual_tokens=5), {"head_dim": 16}),
    "prefix, made by a network, and windows": (
        "qwen2",
        theirs.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=24),
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
}


@pytest.mark.parametrize("case", PEFT)
def test_logits_and_text_are_those_of_peft_both_ways(case: str, tmp_path: Path) -> None:
    family, config, fields = PEFT[case]
    config.task_type = "CAUSAL_LM"
    both = sides.build(tmp_path, family, config, **fields)
    wanted = tiny.logits(both.theirs, TOKENS)[:, -TOKENS.shape[1] :]
    with both.theirs.disable_adapter():
        assert np.abs(wanted - tiny.logits(both.theirs, TOKENS)).max() > 0.1
    opened = open_model(both.adapter)
    np.testing.assert_allclose(logits(opened, TOKENS.tolist()), wanted, atol=1e-4)
    out = peft.write(both.tuning, both.params, both.frozen, tmp_path / "out", base_name=str(both.base))
    again = sides.loaded_by_peft(both.base, out)
    np.testing.assert_allclose(tiny.logits(again, TOKENS)[:, -TOKENS.shape[1] :], wanted, atol=1e-4)
    with torch.no_grad():
        said = again.generate(input_ids=torch.tensor(TOKENS), max_new_tokens=6, do_sample=False, eos_token_id=None)
    ours = np.stack(list(stream_tokens(opened.model, opened.params, TOKENS.tolist(), Sampling(max_new_tokens=6))), 1)
    np.testing.assert_array_equal(ours, said[:, -6:].numpy())


def values_of(theirs: Any, adapter: Any) -> dict[str, Any]:
    """The values of peft's prompt encoder as maxi trains them, for 3 layers, 2 key heads of 8."""
    values = {name: weight.detach().numpy().copy() for name, weight in theirs.prompt_encoder["default"].named_parameters()}
    if isinstance(adapter, PromptConfig):
        return {"embed": {"virtual": jnp.asarray(values["embedding.weight"])}}
    network = {"tokens": values["embedding.weight"].reshape(4, 2, 8), "b_in": values["transform.0.bias"]}
    out, bias = (values[f"transform.2.{name}"].reshape(3, 2, 2, 8, -1) for name in ("weight", "bias"))
    tree: dict[str, Any] = {"prefix": {**network, "w_in": values["transform.0.weight"].T.reshape(2, 8, 24)}, "layers": {}}
    for part, name in enumerate(("w_k", "w_v")):
        tree["layers"][name] = {"out": out[:, part].transpose(0, 3, 1, 2), "b_out": bias[:, part, :, :, 0]}
    return jax.tree.map(jnp.asarray, tree)


STEPS: dict[str, tuple[Any, Any, dict[str, int], int]] = {
    "prompt": (theirs.PromptTuningConfig(num_virtual_tokens=4), PromptConfig(virtual_tokens=4), {"tensor": 2, "context": 2}, 2),
    "prefix, made by a network": (
        theirs.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=24),
        PrefixConfig(virtual_tokens=4, projection=True, encoder_hidden_size=24),
        {},
        1,
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_is_that_of_peft_on_any_devices(case: str, tmp_path: Path) -> None:
    config, adapter, axes, micro = STEPS[case]
    config.task_type = "CAUSAL_LM"
    both = sides.build(tmp_path, "qwen2", config)
    before, ids = values_of(both.theirs, adapter), torch.tensor(TOKENS)
    optimizer = torch.optim.AdamW(both.theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    labels = torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], 1)  # nothing predicts a first token
    loss = both.theirs(ids, labels=labels).loss
    loss.backward()
    optimizer.step()

    devices = mesh.build(MeshConfig(**axes))
    optim = OptimConfig(lr=1e-2, schedule="constant", clip_norm=0.0, weight_decay=0.0, eps=1e-4)
    compute = ComputeConfig(layers="scan", remat="full")
    built = program.build(both.model, objectives.build("pretrain"), compute, optim, devices, 1, micro, adapter)
    cache = TokenCache(TOKENS.reshape(-1), np.array([16, 32]), None, None, {}, "", True)
    rows = SampleRows(cache, 20, pack=False, virtual=4)
    with jax.set_mesh(devices):
        batch = steps.put(stack([rows[0], rows[1], *[rows.blank()] * 6]), devices)
        state, metrics = built.step()(built.new_state(before), batch, jax.device_put(both.frozen, built.frozen_where))
    assert float(metrics["train/loss"]) == pytest.approx(loss.item(), rel=1e-5)
    after, moved = values_of(both.theirs, adapter), []
    for path in built.tuning.table.params:
        np.testing.assert_allclose(get(state.params, path), get(after, path), atol=2e-5, err_msg=path)
        moved.append(float(jnp.abs(get(after, path) - get(before, path)).max()))
    assert min(moved) > 3e-3


def learned(kind: str, family: Any, seed: int = 0) -> tuple[Any, Any]:
    """A tree with virtual tokens that matter, and the tree of its base."""
    base = init(family.table, jax.random.key(seed))
    tuning = adapters.build(family.table, kind=kind, virtual_tokens=N, init="random")
    return tuning.join(tuning.first(jax.random.key(1), base), tuning.fix(base)), base


def test_a_prompt_begins_as_words() -> None:
    table = from_hf_config(SMALL).table
    base = init(table, jax.random.key(0))
    for init_of, ids in (("text", (7, 3)), ("vocab", ())):
        tuning = adapters.build(table, kind="prompt", virtual_tokens=5, init=init_of, ids=ids)
        first = tuning.first(jax.random.key(2), base)["embed"]["virtual"]
        found = [int(np.flatnonzero((base["embed"] == row).all(-1))[0]) for row in np.asarray(first)]
        assert found == [7, 3, 7, 3, 7] if ids else len(set(found)) > 2


def documents(lengths: list[int], weights: bool) -> TokenCache:
    rng = np.random.default_rng(3)
    ids, ends = rng.integers(1, 96, sum(lengths)), np.cumsum(lengths)
    counted = (rng.random(len(ids)) < 0.7).astype(np.float32) if weights else None
    return TokenCache(ids, ends, counted, None, {}, "", True)


def scored(found: Any, family: Any, tree: Any, attention: str = "reference") -> dict[tuple[int, ...], list[float]]:
    """Of every document of these rows its text and the log-probability of each of its targets that counts."""
    batch = stack([found[n] for n in range(len(found))])
    score = jax.jit(partial(decoder.logprobs, family, compute=Compute(attention=attention)))
    logprobs = score(tree, {name: jnp.asarray(a) for name, a in batch.items()})[0]
    said = {}
    for row, values in zip(range(len(found)), np.asarray(logprobs), strict=True):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = (batch["segments"][row] == segment) & (batch["positions"][row] >= N)
            counts = here & (batch["loss_weight"][row] > 0)
            said[tuple(batch["tokens"][row][here])] = values[counts].tolist()
    return said


def test_packed_is_unpacked() -> None:
    """Each document of a row has all virtual tokens and nobody else's, in the kernels that training takes."""
    family = from_hf_config(SMALLEST)
    tree, base = learned("prompt", family)
    cache = documents([9, 4, 30, 2, 17, 12], weights=True)
    plain = scored(SampleRows(cache, 40, pack=False, virtual=N), family, tree)
    rows = SampleRows(cache, 40, virtual=N)
    assert len(rows) < len(plain) == 6 and rows.real_tokens == 74 - 6
    for attention in ("reference", "blockwise"):
        got = scored(rows, family, tree, attention)
        assert got.keys() == plain.keys()
        for text, values in plain.items():
            np.testing.assert_allclose(got[text], values, atol=1e-5)
    other = scored(rows, family, base)
    assert max(abs(a - b) for text in plain for a, b in zip(plain[text], other[text], strict=True)) > 1e-2


def test_long_documents_stand_in_several_rows() -> None:
    rows = SampleRows(documents([50, 1, 5, 13], weights=False), 12, virtual=N)
    batch = stack([rows[n] for n in range(len(rows))])
    text = batch["positions"] >= N
    assert batch["loss_weight"].sum() == 49 + 4 + 12 == (text & (batch["segments"] > 0)).sum() == rows.real_tokens
    assert (batch["loss_weight"] == text * (batch["segments"] > 0)).all() and not batch["tokens"][~text].any()
    ours = {tuple(row) for row in zip(batch["tokens"][text], batch["targets"][text], strict=True)}
    ids = documents([50, 1, 5, 13], weights=False).tokens
    joints = {50, 51, 56}
    assert ours == {(a, b) for n, (a, b) in enumerate(pairwise(ids), 1) if n not in joints}
    windows = [window for n, part in enumerate(np.split(ids, [50, 51, 56])) for window in cut(n, part, 12 - N)]
    for evaluated in packed(windows, 12, 4, N):
        assert ((evaluated["documents"] >= 0) == (evaluated["positions"] >= N)).all()


def test_pairs_share_prompt_and_virtual_tokens() -> None:
    """Shared and packed is two padded copies; and what a reference reads of such rows is what it reads without."""
    family = from_hf_config(SMALLEST)
    tree, base = learned("prefix", family)
    rng = np.random.default_rng(0)
    lengths = [1, 5, 9, 8, 3, 3, 12, 1, 7]  # a prompt of one token too
    ids = rng.integers(1, 96, sum(lengths))
    weights = np.concatenate([np.full(length, n % 3 > 0) for n, length in enumerate(lengths)]).astype(np.float32)
    cache = TokenCache(ids, np.cumsum(lengths), weights, None, {}, "", True)

    def branches(tree: Any, strip: int = 0, **layout: Any) -> np.ndarray:
        found = PairRows(cache, 25, **layout)
        batch = stack([found[n] for n in range(len(found))])
        read = virtual.without({name: jnp.asarray(a) for name, a in batch.items()}, strip)
        both = np.stack(branch_logprobs(jax.jit(partial(decoder.logprobs, family))(tree, read)[0], read), -1)
        order = [int(item) for n in range(len(found)) for item in found.items(n)]
        return both[batch["pair_weight"] > 0][np.argsort(order)]

    wanted = branches(tree, pack=False, share_prompt=False, virtual=N)
    np.testing.assert_allclose(branches(tree, virtual=N), wanted, atol=1e-5)
    np.testing.assert_allclose(branches(base, strip=N, virtual=N), branches(base), atol=1e-5)
    assert np.abs(wanted - branches(base)).max() > 1e-2


def configure(home: Path, folder: Path, name: str, objective: str, adapter: str) -> str:
    path = Path(runs.configure(home, folder, name, objective))
    lines = [line if not line.startswith("adapter:") else f"adapter: {{{adapter}}}" for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines).replace("pack: false", "pack: true"))
    return str(path)


def test_a_prompt_from_the_command_line(home: Path, tmp_path: Path, capsys: Any) -> None:
    """It begins as a text, learns, goes on, and is measured; it leaves as peft's, and as nothing else."""
    config = configure(home, tmp_path, "run", "sft", "kind: prompt, virtual_tokens: 4, init: text, init_text: Who am I")
    assert main(["train", config, "steps=2"]) == 0
    assert main(["train", config]) == 0
    run = tmp_path / "run"
    losses = [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert not (run / "hf").exists()
    assert main(["export", str(run), str(tmp_path / "adapter"), "--adapter"]) == 0
    ours = logits(open_model(run), TOKENS.tolist())
    theirs = sides.loaded_by_peft(home / "base", tmp_path / "adapter")
    np.testing.assert_allclose(tiny.logits(theirs, TOKENS)[:, 4:], ours, atol=1e-4)
    opened = open_model(tmp_path / "adapter")
    np.testing.assert_array_equal(
        virtual.apart(opened.params["embed"])[1], theirs.prompt_encoder["default"].embedding.weight.detach()
    )
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge"]) == 4
    assert "4 virtual tokens before each text are no part of the weights" in capsys.readouterr().err
    assert main(["train", configure(home, tmp_path, "x", "sft", "kind: lora"), f"model.init_from={run}"]) == 4
    assert "cannot be started from" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("Who are you? I am Quill.")
    assert main(["eval", str(run), "--data", str(tmp_path / "text.txt"), "--seq-len", "8"]) == 0
    assert main(["eval", str(run), "--data", str(tmp_path / "text.txt"), "--seq-len", "4"]) == 2
    assert "no room beside 4 virtual tokens" in capsys.readouterr().err


def test_preferences_compare_with_the_base(home: Path, tmp_path: Path) -> None:
    """A prefix of zeros takes a share of the attention, and the reference has none: the margin is not 0, nor much.

    The prefix comes of a network, which is not exported.
    """
    config = configure(home, tmp_path, "run", "dpo", "kind: prefix, virtual_tokens: 4, init: zero, projection: true")
    assert main(["train", config, "steps=1"]) == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0 < abs(first["rewards/margins"]) < 0.1
    trained, settings = open_trained(tmp_path / "run"), peft.open_adapter(tmp_path / "run" / "adapter")
    assert isinstance(trained.tuning, FromNetwork)
    written = peft.read(settings, peft.tuning_of(settings, trained.model.table))
    for got, wanted in zip(*map(jax.tree.leaves, (written, trained.tuning.given(trained.params))), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["adapter={kind: prefix, virtual_tokens: 63}"], "seq_len 64 has no room beside 63 virtual tokens"),
        (["adapter={kind: prompt, init: text}"], "adapter.init text and adapter.init_text go together"),
        (["adapter={kind: prompt, init: zero}"], "adapter.init: Input should be 'vocab', 'random' or 'text'"),
        (["adapter={kind: prefix, projection: true, init_from: x}"], "adapter.init_from holds what a network gave"),
        (["adapter={kind: prefix, encoder_hidden_size: 8}"], "adapter.encoder_hidden_size is that of a network"),
        (["adapter={kind: prefix, rank: 4}"], "unknown key 'adapter.rank'"),
        (["adapter=prefix", "data.across_documents=true"], "data.across_documents has no meaning with virtual tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(options: list[str], words: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(runs.configure(home, tmp_path, "bad"), options)


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    both = sides.build(tmp_path, "qwen2", theirs.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    table = both.model.table
    for wanted, words in (
        ({"kind": "prompt", "virtual_tokens": 6}, "adapter.virtual_tokens is 6, but that of the adapter is 5"),
        ({"kind": "prefix", "virtual_tokens": 5}, "the adapter is PROMPT_TUNING, not Prefix"),
    ):
        with pytest.raises(ConfigError, match=words):
            peft.check_same(peft.open_adapter(both.adapter), adapters.build(table, **wanted))  # type: ignore[arg-type]
    wider = from_hf_config(SMALL | {"hidden_size": 64}).table
    settings = peft.open_adapter(both.adapter)
    with pytest.raises(ModelFolderError, match=r"prompt_embeddings is F32 \[5, 32\], this model needs \[5, 64\]"):
        peft.read(settings, peft.tuning_of(settings, wider))
