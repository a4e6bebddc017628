"""`maxi plan` from the command line: compiled for TPUs once, counted for the rest, faults in one line."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from maxi.__main__ import main
from maxi.config import load
from maxi.hardware import GIB, parse
from maxi.plan import compiled, goals, hlo
from maxi.plan.compiled import with_layout
from maxi.plan.parts import allocated
from maxi.plan.run import run_of
from maxi.yaml_file import read_yaml
from tests.estimate.models import SIZES

MINI = "configs/mini_qwen_1b_pretrain.yaml"
TREE: dict[str, Any] = {"run_dir": "none", "steps": 1000, "batch_size": 8, "seq_len": 64, "tokenizer": "none"}
TREE |= {"data": {"train": [{"path": "none.txt"}]}, "compute": {"remat": "full", "head": "auto"}}


def config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.yaml"
    tree = TREE | {"model": {"config": SIZES | {"num_hidden_layers": 2}}} | changes
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))  # JSON is YAML
    return file


class Planned(NamedTuple):
    said: str
    figures: dict[str, Any]
    folder: Path


def planned(folder: Path, capsys: Any, *argv: str) -> Planned:
    assert main(["plan", *argv, "--json", str(folder / "plan.json")]) == 0
    return Planned(capsys.readouterr().out, json.loads((folder / "plan.json").read_text()), folder)


@pytest.fixture(scope="module")
def tpu(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """The one step that these tests compile for TPUs."""
    pytest.importorskip("libtpu")
    folder = tmp_path_factory.mktemp("plan")
    argv = [sys.executable, "-m", "maxi", "plan", str(config(folder)), "--topology", "v5e:2x2"]
    argv += ["--json", str(folder / "plan.json"), "--dump-hlo", str(folder / "hlo")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return Planned(done.stdout, json.loads((folder / "plan.json").read_text()), folder)


def test_a_step_for_tpus_is_compiled(tpu: Planned) -> None:
    found = tpu.figures["plan"]
    assert (found["memory_by"], found["seconds_by"], found["fits"], found["chips"]) == ("compiled", "compiled", True, 4)
    assert found["layout"]["mesh.fsdp"] == 4 and found["notes"] == []
    for words in ("fsdp 4, 1 micro-batch, remat full (the config's own", "compiled)", "fits:", "to the end:", "check yours"):
        assert words in tpu.said


def test_memory_by_part_is_the_compilers(tpu: Planned) -> None:
    parts = tpu.figures["plan"]["memory"]
    account = json.loads((tpu.folder / "hlo/memory.json").read_text())
    assert parts["total"] == pytest.approx(allocated(account), rel=0.01)
    assert parts["total"] == pytest.approx(sum(size for name, size in parts.items() if name != "total"))
    counted = run_of(load(tpu.folder / "config.yaml"), False, None).work
    held = counted.held(compiled.Layout(fsdp=4))
    assert parts["parameters"] == 4 * held.parameters and parts["optimizer"] == 2 * parts["parameters"]
    assert parts["activations"] > 0 and parts["other"] > 0


def test_time_is_read_from_the_program(tpu: Planned) -> None:
    seconds, module = tpu.figures["plan"]["seconds"], hlo.read((tpu.folder / "hlo/step.hlo.txt").read_text())
    assert module.devices == 4
    assert seconds["step"] == pytest.approx(sum(v for name, v in seconds.items() if name not in ("step", "bound")))
    assert 0 < seconds["matmuls"] < seconds["step"] and seconds["traffic"] > 0 and seconds["network"] == 0
    assert tpu.figures["plan"]["hours"] == pytest.approx(1000 * seconds["step"] / 3600)


def test_memory_on_cpus_is_within_a_tenth_of_a_real_run() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.plan.resident", "8"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["said"] == pytest.approx(found["measured"], rel=0.1), found


def test_on_the_cpu_only_memory_is_known(tmp_path: Path, capsys: Any) -> None:
    found = planned(tmp_path, capsys, str(config(tmp_path, batch_size=16)))
    assert found.figures["plan"]["memory_by"] == "compiled" and found.figures["plan"]["seconds"] is None
    assert "8 CPU devices of this machine (the default; --topology names others)" in found.said
    assert "speed: not known of a CPU" in found.said and "to the end" not in found.said


def test_gpus_are_counted_where_nothing_compiles_for_them(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.aot, "find_spec", lambda _: None)
    found = planned(tmp_path, capsys, MINI, "--topology", "h100:8", "--search")
    best = found.figures["plan"]
    assert (best["memory_by"], best["seconds_by"]) == ("analytic", "analytic")
    assert "compiled: nothing, jax's CUDA plugin is not installed" in found.said and "compiled)" not in found.said
    steps = [o["seconds"]["step"] for o in found.figures["ranking"]]
    assert steps == sorted(steps) and found.figures["ranking"][0] == best and len(steps) > 4
    tokens = found.figures["tokens_per_step"]
    assert (found.figures["steps"], tokens) == (13523, 1152 * 1024)
    assert best["tokens_per_s"] == pytest.approx(tokens / steps[0])
    assert best["mfu"] == pytest.approx(best["tokens_per_s"] * found.figures["flops_per_token"] / (8 * 989e12))
    assert best["dollars"] == pytest.approx(best["hours"] * 8 * 3.99)
    assert [found.said.count(words) for words in ("layouts, best first", "in place of the config's own keys")] == [1, 1]


def test_the_lines_to_paste_load(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.aot, "find_spec", lambda _: None)
    found = planned(tmp_path, capsys, str(config(tmp_path)), "--topology", "a100:8", "--search")
    lines = found.said.split("in place of the config's own keys:\n\n")[1].split("\n\n")[0]
    tree = json.loads((tmp_path / "config.yaml").read_text()) | read_yaml(lines, "pasted")
    (tmp_path / "pasted.yaml").write_text(json.dumps(tree))
    overrides = re.search(r"or on the command line: (.*)", found.said)
    assert overrides
    pasted, overridden = load(tmp_path / "pasted.yaml"), load(tmp_path / "config.yaml", overrides.group(1).split())
    chosen = found.figures["plan"]["layout"]
    assert pasted == overridden and pasted.mesh.fsdp == chosen["mesh.fsdp"] and pasted.compute.remat == chosen["compute.remat"]


def test_what_does_not_fit_is_told_with_the_way_out(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.aot, "find_spec", lambda _: None)
    said = planned(tmp_path, capsys, MINI, "compute.remat=none", "micro_batches=1", "--topology", "h100:8").said
    assert re.search(r"does not fit: [\d.]+ of 75.00 GiB a device, [\d.]+ GiB too much \(analytic\)", said)
    assert re.search(r"smallest change that makes it fit: micro_batches=\d+ \(analytic\)", said)
    wide = "model.config.num_hidden_layers=1000"
    said = planned(tmp_path, capsys, MINI, wide, "--topology", "h100:1").said
    assert "no layout makes it fit these chips; the smallest h100 that it fits is h100:" in said


def test_the_cheapest_in_time_is_found(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "why_not_compiled", lambda _: "this is a test")
    monkeypatch.setattr("maxi.plan.command.why_not_compiled", lambda _: "this is a test")
    found = planned(tmp_path, capsys, MINI, "--goal", "hours=24").figures
    met = found["topologies"]
    assert found["plan"]["topology"] == met[0]["topology"] and all(o["hours"] <= 24 for o in met)
    dollars = [o["dollars"] for o in met]
    assert dollars == sorted(dollars) and len({o["topology"].split(":")[0] for o in met}) >= 4
    within = planned(tmp_path, capsys, MINI, "--goal", "hours=24", "--budget", str(dollars[3]))
    assert [o["topology"] for o in within.figures["topologies"]] == [o["topology"] for o in met[:4]]
    assert f"meets 24 hours and ${dollars[3]:g}" in within.said


def test_a_price_and_the_number_of_tokens_can_be_given(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.aot, "find_spec", lambda _: None)
    path = str(config(tmp_path, steps=None, epochs=2))
    found = planned(tmp_path, capsys, path, "--topology", "h200:8", "--price", "2.5", "--tokens", "512000")
    assert found.figures["steps"] == 2000 and "at $2.5 a chip and hour (--price)" in found.said
    assert found.figures["plan"]["dollars"] == pytest.approx(found.figures["plan"]["hours"] * 8 * 2.5)
    said = planned(tmp_path, capsys, path, "--topology", "h200:8").said
    assert "2 epochs of data that is not read: --tokens says how many it has" in said and "to the end" not in said


def test_what_the_compiler_refuses_is_told_by_its_own_figures(tmp_path: Path) -> None:
    run = run_of(load(config(tmp_path)), False, None)
    guess = compiled.counted(run.work, compiled.Layout(fsdp=4), parse("v5e:2x2"))
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, temporaries (20.25G) exceeds available HBM (15.75G). HLO module: x"
    found = compiled._too_large(guess, message)
    assert found.over == pytest.approx(4.5 * GIB) and not found.fits and found.memory_by == "compiled"
    assert "does not fit" in compiled._too_large(guess, "RESOURCE_EXHAUSTED: something else").notes[0]


def test_a_layout_goes_into_a_config(tmp_path: Path) -> None:
    before = load(config(tmp_path))
    layout = compiled.Layout(fsdp=2, tensor=2, micro_batches=2, remat="dots")
    after = with_layout(before, layout)
    assert (after.mesh.fsdp, after.mesh.tensor, after.micro_batches, after.compute.remat) == (2, 2, 2, "dots")
    assert after.compute.head == before.compute.head and after.optim == before.optim


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--topology", "v5e:3x3"], "no topology 'v5e:3x3' (--topology): v5e comes as"),
        (["--topology", "h100:12"], "no topology 'h100:12'"),
        (["--goal", "days=1"], "no goal 'days=1' (--goal): write hours=24"),
        (["--goal", "hours=soon"], "no goal 'hours=soon'"),
        (["--goal", "hours=-1"], "no goal 'hours=-1'"),
        (["--budget", "-5"], "a budget of -5 dollars buys nothing"),
        (["--budget", "much"], "--budget"),
        (["--budget", "0.001"], "nothing does it in $0.001, the cheapest is"),
        (["--price", "cheap", "--topology", "v5e:4x4"], "--price"),
        (["--price", "nan", "--topology", "v5e:4x4"], "a price of nan"),
        (["--price", "3"], "a price is of one kind of chip"),
        (["--search"], "name chips with --topology"),
        (["--topology", "cpu", "--goal", "hours=1"], "how long a run takes on a CPU is not known"),
        (["--tokens", "5"], "--tokens 5 means nothing (command line): leave it out"),
        (["mesh.fsdp=3", "--topology", "v5e:4x4"], "needs 3 devices but there are 16"),
        (["mesh.tensor=16", "--topology", "v5e:4x4"], "key/value heads 4 does not divide over tensor 16"),
        (["mesh.context=1", "--topology", "v5e:16x16"], "batch_size 1152 does not divide into 3072"),
        (["--topology", "h100:8", "--json", "{tmp}/none/x.json"], "the folder of --json does not exist"),
    ],
    ids=" ".join,
)
def test_faults_are_one_line(argv: list[str], words: str, tmp_path: Path, capsys: Any) -> None:
    overrides = [text for text in argv if re.match(r"[a-z]+\.", text)]
    rest = [text.replace("{tmp}", str(tmp_path)) for text in argv if text not in overrides]
    assert main(["plan", MINI, *overrides, *rest]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("maxi: error[2] ") and words in err, err


def test_a_layout_that_fits_is_named_where_the_configs_does_not(capsys: Any) -> None:
    assert main(["plan", MINI, "mesh.context=1", "--topology", "v5e:16x16"]) == 2
    hint = re.search(r"this fits v5e:16x16: (.*)", capsys.readouterr().err)
    assert hint
    changed = load(MINI, hint.group(1).split())
    assert math.prod((changed.mesh.replica, changed.mesh.fsdp, changed.mesh.context, changed.mesh.tensor)) == 256


def test_a_program_that_was_not_compiled_is_not_written(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.aot, "find_spec", lambda _: None)
    assert main(["plan", MINI, "--topology", "h100:8", "--dump-hlo", str(tmp_path)]) == 6
    assert "no program was compiled (--dump-hlo)" in capsys.readouterr().err


def test_goals_are_met_by_both_measures() -> None:
    run = run_of(load(MINI), False, None)
    o = goals.options(run, [goals.sold()[3]])[0]
    assert o.hours is not None and o.dollars is not None
    for hours, dollars, met in ((1.0, None, True), (None, 1.0, True), (1.0, 0.9, False), (0.9, 1.0, False)):
        wanted = goals.Goal(hours and hours * o.hours, dollars and dollars * o.dollars)
        assert wanted.met(o) == met and bool(wanted)
    assert not goals.Goal()
