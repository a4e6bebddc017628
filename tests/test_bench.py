"""`maxi bench`: made-up rows are like real ones, figures are all there and mean what they say, faults are one line."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from maxi import aot, made_up, runtime
from maxi.__main__ import main
from maxi.bench import kernels, step, timing
from maxi.bench.operations import OPERATIONS
from maxi.config import Config, load
from maxi.data.loader import stack
from maxi.kernels import norm

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL = {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, **SIZES}
NO_VOCABULARY = {name: value for name, value in MODEL.items() if name != "vocab_size"}
SHAPE = ["B=1", "T=16", "N=4", "K=2", "H=8", "D=16", "F=24", "V=40", "documents=6"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    tree = {"run_dir": "runs/none", "steps": 10, "batch_size": 8, "seq_len": 32, "tokenizer": "none"}
    tree |= {"model": {"config": MODEL}, "data": {"train": [{"path": "none.txt"}]}}
    file.write_text(json.dumps(tree))  # JSON is YAML
    return file


@pytest.mark.parametrize("kind", ["documents", "conversations", "preferences", "labels"])
def test_made_up_rows_are_packed_and_full(path: Path, kind: str) -> None:
    config = replace(load(path), seq_len=256)
    batch = stack(made_up.made_up(config, kind, 96, 40, 12))
    pairs = kind in ("preferences", "labels")
    real = batch["segments"] != 0
    assert batch["tokens"].shape == (12, 512 if pairs else 256) and real.mean() > 0.8
    assert batch["tokens"].max() < 96 and len(np.unique(batch["tokens"])) > 90
    assert batch["loss_weight"][real].mean() > (0.4 if pairs else 0.9)  # of pairs not the prompt
    items = batch["segments"].max(1).mean() / (3 if pairs else 1)
    assert 3 < items < 20  # 256 / 40, or 512 / 60: each has a second answer
    assert ("ref_first" in batch) == pairs and ("labels" in batch) == (kind == "labels")


def test_lengths_have_their_mean() -> None:
    drawn = made_up.lengths(np.random.default_rng(0), 300, 3_000_000, 1 << 20)
    assert abs(drawn.mean() - 300) < 15 and drawn.sum() >= 3_000_000 > drawn[:-1].sum()
    assert made_up.lengths(np.random.default_rng(0), 300, 10_000, 64).max() == 64


def test_a_step_is_timed(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "step.json", tmp_path / "hlo"
    argv = ["bench", "step", str(path), "objective=dpo", "--steps", "3", "--document-tokens", "12"]
    assert main([*argv, "--json", str(out), "--dump-hlo", str(folder)]) == 0
    found = json.loads(out.read_text())
    assert found["devices"] == 8 and found["mesh"]["fsdp"] == 8 and found["parameters"] == 10_880
    assert found["step_s"]["runs"] == 3 and 0 < found["step_s"]["least"] <= found["step_s"]["median"] <= found["step_s"]["most"]
    assert 256 < found["tokens_per_step"] <= 512
    assert found["tokens_per_s"] == pytest.approx(found["tokens_per_step"] / found["step_s"]["median"])
    assert found["memory_analysis"] == json.loads((folder / "memory.json").read_text())
    assert found["memory_analysis"]["argument_size_in_bytes"] > 3 * 4 * 10_880 / 8  # weights and two moments, an eighth each
    assert (folder / "step.hlo.txt").read_text().startswith("HloModule")
    said = capsys.readouterr().out
    assert all(f"\n{word}: " in said for word in ("compile", "step", "speed")) and "MFU" not in said


def test_mfu_is_of_the_known_peak(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(path)
    built = aot.program_of(config, step.mesh.build(config.mesh))
    monkeypatch.setattr(step.mesh, "peak_flops", lambda _: 1e9)
    found = step._speed(config, built, timing.Timing.of([0.5, 0.25, 1.0]), 256)
    assert found["mfu"] == pytest.approx(512 * built.model.train_flops_per_token(32) / 1e9)
    assert f"{found['mfu']:.1%} of the peak" in capsys.readouterr().out


def test_a_step_is_compiled_for_tpus_that_are_not_here(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    out = tmp_path / "step.json"
    assert main(["bench", "step", str(path), "--topology", "v5e:2x2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["platform"], found["devices"], found["dtype"], found["remat"]) == ("tpu", 4, "bfloat16", "full")
    assert "step_s" not in found and found["memory_analysis"]["temp_size_in_bytes"] > 0
    assert jax.default_backend() == "cpu"


def test_every_operation_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "MOST", 5)
    out = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--shape", *SHAPE, "--json", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert {r["operation"].split(",")[0] for r in results} == set(OPERATIONS)
    ran = [r for r in results if "why_not" not in r]
    for case in {(r["operation"], r["shape"]) for r in results}:
        mine = [r for r in ran if (r["operation"], r["shape"]) == case]
        assert [r["auto"] for r in mine].count(True) == 1, case
    for r in ran:
        assert r["error"] < 1e-5 and r["gradient_error"] < 1e-5, r
        assert r["forward_s"]["median"] > 0 and r["forward_and_backward_s"]["median"] > 0 and r["memory_bytes"] > 0
    assert {r["way"] for r in ran} >= {"blockwise", "full", "chunked", "cpu", "reference", "jax: log_softmax", "jax: einsum"}
    assert all(r["why_not"] for r in results if "why_not" in r)
    said = capsys.readouterr().out
    assert "not tpu: it is made for TPU, not cpu" in said and "blockwise *" in said


def test_every_folder_of_kernels_is_an_operation() -> None:
    folders = {path.parent.name for path in Path("maxi/kernels").glob("*/__init__.py")}
    assert {"logprobs" if name == "head" else name for name in OPERATIONS} == folders


def test_a_wrong_kernel_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right, reference = norm.BACKENDS
    wrong = replace(right, run=lambda *args: 1.01 * right.run(*args))
    broken = replace(right, name="broken", run=lambda *args: right.run(*args) * jax.numpy.nan)
    monkeypatch.setattr(norm, "BACKENDS", (wrong, broken, reference))
    found = {r["way"]: r["error"] for r in kernels.bench_kernels(only=["norm"], shape=SHAPE)}
    assert found["cpu"] == pytest.approx(0.01, rel=1e-3) and found["broken"] == "nan" and found["reference"] < 1e-6


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 20 GB")

    cpu, reference = norm.BACKENDS
    monkeypatch.setattr(norm, "BACKENDS", (replace(cpu, run=too_large), reference))
    found = {r["way"]: r.get("why_not") for r in kernels.bench_kernels(only=["norm"], shape=SHAPE)}
    assert found == {"cpu": "out of memory", "reference": None}
    monkeypatch.setattr(norm, "BACKENDS", (replace(cpu, run=lambda *_: 1 / 0), reference))
    with pytest.raises(ZeroDivisionError):
        kernels.bench_kernels(only=["norm"], shape=SHAPE)


def test_calls_take_turns() -> None:
    order: list[int] = []
    timings = timing.interleaved([lambda i=i: order.append(i) for i in range(3)])
    runs = timings[0].runs
    assert [t.runs for t in timings] == [runs] * 3 and order == [0, 1, 2] * (len(order) // 3) and runs >= timing.FEWEST
    assert timing.Timing.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0, 3)
    assert all(math.isfinite(t.median) for t in timings)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["kernels", "--only", "atention"], 2, "no operation atention"),
        (["kernels", "--shape", "Q=3"], 2, "'Q=3' is no size"),
        (["kernels", "--shape", "T=0"], 2, "'T=0' is no size"),
        (["kernels", "--shape", "N=3", "K=2"], 2, "3 heads over 2 key/value heads"),
        (["kernels", "--json", "{tmp}/none/x.json"], 2, "the folder of --json does not exist"),
        (["step", "{config}", "--steps", "0"], 2, "--steps 0"),
        (["step", "{config}", "batch_size=12", "mesh.context=1"], 2, "batch_size 12 does not divide into 8"),
        (["step", "{config}", "seq_len=100000"], 2, "seq_len 100000 is over the model's max_position_embeddings"),
        (["step", "{config}", "model.config=" + json.dumps(NO_VOCABULARY)], 2, "the model's vocabulary is not said"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_faults_are_one_line(argv: list[str], code: int, words: str, path: Path, tmp_path: Path, capsys: Any) -> None:
    places = {"{tmp}": str(tmp_path), "{config}": str(path)}
    for name, place in places.items():
        argv = [part.replace(name, place) for part in argv]
    assert main(["bench", *argv]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"maxi: error[{code}] ") and words in err, err


def test_without_libtpu_there_is_no_topology(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(aot, "find_spec", lambda _: None)
    assert main(["bench", "step", str(path), "--topology", "v5e:4x4"]) == 6
    assert "libtpu, TPU's compiler, is not installed (--topology): pip install libtpu" in capsys.readouterr().err


def test_unknown_topologies_are_refused(path: Path, capsys: Any) -> None:
    pytest.importorskip("libtpu")
    assert main(["bench", "step", str(path), "--topology", "v5e:3x17"]) == 2
    assert "no TPU topology 'v5e:3x17'" in capsys.readouterr().err


def test_programs_are_not_cached() -> None:
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    with runtime.without_cache():
        assert not jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    assert jax.config.jax_enable_compilation_cache == before  # type: ignore[attr-defined]


def test_the_config_is_the_shape_of_qwen3() -> None:
    config: Config = load("configs/qwen3_0.6b_pretrain.yaml")
    assert step.count(aot.model_of(config).table) == 596_049_920
