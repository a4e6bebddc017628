"""The reference's log-probabilities: those of the model by hand, kept and found again, and refused when they are stale."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxi import mesh, references
from maxi import train as training
from maxi.__main__ import main
from maxi.data import bpe
from maxi.data.chat_template import ChatTemplate
from maxi.data.examples import Kind
from maxi.data.loader import Opened, content_of, open_data
from maxi.data.sample_rows import PairRows
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError
from maxi.hf import Loaded, save_hf
from maxi.models import Model, decoder, from_hf_config
from maxi.models.decoder import Compute
from maxi.params import init
from maxi.sections import ChatConfig, DataConfig, MeshConfig, Source
from tests import small

SEQ = 64


@pytest.fixture(scope="module")
def model() -> Model:
    return from_hf_config(small.SIZES)


@pytest.fixture(scope="module")
def params(model: Model) -> Any:
    """Large weights, so that the wrong context cannot pass for the right one."""
    return jax.tree.map(lambda w: 8 * w, init(model.table, jax.random.key(0)))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, model: Model, params: Any) -> Path:
    """A model's folder, `home`, beside rows of pairs and of labels."""
    folder = tmp_path_factory.mktemp("references")
    bpe.train([f"{small.SENTENCE} " * 20], 300, folder / "tokenizer")
    save_hf(Loaded(model, params, folder / "tokenizer"), folder / "home")
    words, rows = small.SENTENCE.split(), range(11)
    pairs = [{"prompt": " ".join(words[: n % 4 + 1]), "chosen": words[n], "rejected": " ".join(words[n : n + 3])} for n in rows]
    labels = [{"prompt": row["prompt"], "completion": row["rejected"], "label": n % 2} for n, row in enumerate(pairs)]
    for name, made in (("preferences", pairs), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


@pytest.fixture(scope="module")
def template(home: Path) -> Iterator[ChatTemplate]:
    with ChatTemplate(Tokenizer.load(home / "tokenizer")) as opened:
        yield opened


Open = Callable[..., list[Opened]]


@pytest.fixture
def opened(home: Path, template: ChatTemplate, tmp_path: Path) -> Open:
    """opened(kind, rows, **chat): a source and its rows."""

    def of(kind: Kind = "preferences", path: Path | None = None, **chat: Any) -> list[Opened]:
        data = DataConfig(train=(Source(path=str(path or home / f"{kind}.jsonl")),), cache_dir=str(tmp_path / "cache"))
        content = content_of(kind, data, ChatConfig(**chat), Tokenizer.load(home / "tokenizer"), template, SEQ)
        batches, _ = open_data(data, content, batch_size=1, seed=0, log=lambda _: None)
        return list(batches.opened)

    return of


def attach(found: list[Opened], model: Model, params: Callable[[], Any], tmp_path: Path, weights: str = "w", **how: Any) -> Any:
    """The values that the only source gets."""
    devices = mesh.build(MeshConfig(), jax.devices()[:1])
    how = {"compute": Compute(), "devices": devices, "batch_size": 4, "cache_dir": str(tmp_path / "cache"), **how}
    with jax.set_mesh(devices):
        references.attach(found, weights, params, model, **how)
    return rows_of(found).reference


def rows_of(found: list[Opened]) -> PairRows:
    rows = found[0].rows
    assert isinstance(rows, PairRows)
    return rows


@pytest.fixture(scope="module")
def by_hand(model: Model, params: Any) -> Callable[[np.ndarray, np.ndarray], float]:
    """by_hand(prompt, answer): the sum of an answer's log-probabilities, alone in a row."""
    run = jax.jit(lambda batch: decoder.logprobs(model, params, batch)[0])

    def of(prompt: np.ndarray, answer: np.ndarray) -> float:
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        row = {name: np.zeros((1, SEQ), np.int32) for name in ("tokens", "targets", "positions", "segments")}
        count = len(ids) - 1
        row["tokens"][0, :count], row["targets"][0, :count] = ids[:-1], ids[1:]
        row["positions"][0, :count], row["segments"][0, :count] = np.arange(count), 1
        return float(np.asarray(run(row))[0, len(prompt) - 1 : count].sum())

    return of


LAYOUTS = [{"pack": pack, "share_prompt": share} for pack in (True, False) for share in (True, False)]


@pytest.mark.parametrize(("kind", "layout"), [*(("preferences", layout) for layout in LAYOUTS), ("labels", LAYOUTS[0])])
def test_values_are_those_of_the_model(
    opened: Open, model: Model, params: Any, by_hand: Any, tmp_path: Path, kind: Kind, layout: dict[str, bool]
) -> None:
    found = opened(kind, **layout)
    rows, cache = rows_of(found), found[0].cache
    values = attach(found, model, lambda: params, tmp_path)
    parts = np.split(cache.tokens, cache.ends[:-1])
    size = 3 if kind == "preferences" else 2
    items = [parts[start : start + size] for start in range(0, len(parts), size)]
    answers = [(item[1], item[2] if size == 3 else items[n - 1][1]) for n, item in enumerate(items)]
    expected = [[by_hand(item[0], answer) for answer in both] for item, both in zip(items, answers, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert np.std(values) > 1
    seen = 0
    for number in range(len(rows)):  # and where they stand in the rows
        of_row = rows.items(number)
        seen += len(of_row)
        assert (rows[number]["ref_first"][: len(of_row)] == values[of_row, 0]).all()
        assert (rows[number]["ref_second"][: len(of_row)] == values[of_row, 1]).all()
    assert seen == 11
    assert len(rows) < 11 if layout["pack"] else len(rows) == 11


# --- the cache; what a model says is made up here ---


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items were computed, each time that any were."""
    counts: list[int] = []

    def compute(_: Opened, rows: PairRows, *__: Any) -> np.ndarray:
        counts.append(len(rows.sizes))
        return np.arange(2 * len(rows.sizes), dtype=np.float32).reshape(-1, 2)

    monkeypatch.setattr(references, "_compute", compute)
    return counts


def forbidden() -> Any:
    raise AssertionError("weights that are not needed were read")


def test_what_is_computed_is_found_again(opened: Open, model: Model, tmp_path: Path, computed: list[int]) -> None:
    first = attach(opened(), model, dict, tmp_path)
    again = attach(opened(), model, forbidden, tmp_path)
    assert computed == [11] and (first == again).all()
    assert (attach(opened(pack=False, share_prompt=False), model, forbidden, tmp_path) == first).all()
    (file,) = (tmp_path / "cache" / "references").iterdir()
    assert (np.load(file) == first).all()


def test_another_reference_or_other_rows_are_another_file(
    opened: Open, model: Model, tmp_path: Path, home: Path, computed: list[int]
) -> None:
    attach(opened(), model, dict, tmp_path)
    attach(opened(), model, dict, tmp_path, weights="other weights")
    attach(opened(), from_hf_config({**small.SIZES, "rope_theta": 500.0}), dict, tmp_path)
    attach(
        opened(),
        from_hf_config({**small.SIZES, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}),
        dict,
        tmp_path,
    )
    attach(opened(), model, dict, tmp_path, compute=Compute(dtype=jnp.bfloat16))
    attach(opened(system="sing"), model, dict, tmp_path)  # other ids, as another tokenizer or template would give
    attach(opened("labels"), model, dict, tmp_path)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join((home / "preferences.jsonl").read_text().splitlines()[1:]))
    attach(opened(path=fewer), model, dict, tmp_path)
    assert computed == [11] * 7 + [10] and len(list((tmp_path / "cache" / "references").iterdir())) == 8


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "not finite", "of other rows"])
def test_a_damaged_file_is_not_used(opened: Open, model: Model, tmp_path: Path, computed: list[int], damage: str) -> None:
    first = attach(opened(), model, dict, tmp_path)
    (file,) = (tmp_path / "cache" / "references").iterdir()
    content = file.read_bytes()
    if damage in ("not finite", "of other rows"):
        references._write(file, np.full_like(first, np.inf) if damage == "not finite" else first[1:])
    else:
        flipped = content[:150] + bytes([content[150] ^ 1]) + content[151:]
        file.write_bytes({"cut": content[:-5], "flipped": flipped, "empty": b""}[damage])
    assert (attach(opened(), model, dict, tmp_path) == first).all() and computed == [11, 11]
    assert file.read_bytes() == content and [file] == list(file.parent.iterdir())


def test_log_probabilities_that_are_not_finite(opened: Open, model: Model, params: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"error\[3\] a reference log-probability is not finite .*preferences.jsonl"):
        attach(opened(), model, lambda: jax.tree.map(lambda w: w * jnp.nan, params), tmp_path)
    assert not (tmp_path / "cache" / "references").exists()


# --- whose reference it may be, and whose it stays ---


def test_a_reference_of_another_kind_is_refused(home: Path, model: Model, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(home / "home")
    references.check(str(home / "home"), model, tokenizer)
    other = tmp_path / "other"
    shutil.copytree(home / "home", other)
    (other / "model.safetensors").unlink()
    references.check(str(other), model, tokenizer)  # which reads no weights
    fields = json.loads((other / "config.json").read_text())
    for change in ({"vocab_size": 320}, {"hidden_size": 32}, {"rope_theta": 500.0, "rope_parameters": None}):
        (other / "config.json").write_text(json.dumps({**fields, **change}))
        with pytest.raises(ConfigError, match=r"error\[2\] .*other has another architecture .*\(model.reference\)"):
            references.check(str(other), model, tokenizer)
    (other / "config.json").write_text(json.dumps(fields))
    shutil.rmtree(other)
    bpe.train([f"{small.SENTENCE[::-1]} " * 20], 300, other)
    (other / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"error\[2\] .*other has another tokenizer .*\(model.reference\)"):
        references.check(str(other), model, tokenizer)


def test_a_run_keeps_its_reference(
    home: Path, model: Model, params: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on while the values are kept or can be computed again, and not from another reference."""
    monkeypatch.setattr(training, "set_up", lambda *_: None)
    shutil.copytree(home / "home", tmp_path / "first")
    config = {
        "run_dir": str(tmp_path / "run"),
        "steps": 1,
        "batch_size": 8,
        "seq_len": SEQ,
        "objective": "dpo",
        "model": {"init_from": str(tmp_path / "first")},
        "data": {"train": [{"path": str(home / "preferences.jsonl")}], "cache_dir": str(tmp_path / "cache")},
        "chat": {"pack": False},
        "export_hf": False,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))

    def train(*overrides: str) -> tuple[int, str, str]:
        code = main(["train", str(tmp_path / "config.yaml"), *overrides])
        out, err = capsys.readouterr()
        return code, out, err

    code, out, err = train()
    assert (code, err) == (0, "") and "11 pairs computed" in out
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["train/loss"] == pytest.approx(np.log(2), abs=1e-5)  # the policy is the reference still
    shutil.rmtree(tmp_path / "cache" / "references")
    other = jax.tree.map(lambda w: w + 0.01, params)
    save_hf(Loaded(model, other, home / "tokenizer"), tmp_path / "first", force=True)
    code, _, err = train("steps=2")
    assert code == 3 and err.count("\n") == 1
    assert f"the reference model changed since this run began ({tmp_path}/run): restore it" in err
    shutil.rmtree(tmp_path / "first")
    shutil.copytree(home / "home", tmp_path / "first")
    code, out, err = train("steps=2")
    assert (code, err) == (0, "") and "11 pairs computed" in out and "resumed from step 1" in out
