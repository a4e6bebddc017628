"""Checkpoints: every damage is found and passed over, nobody else's folders are touched, a full disk costs one line."""

import errno
import logging
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxi import checkpoint_table, faults, manifest, mesh, shelf
from maxi.checkpoint import Checkpoints, abstract_state
from maxi.errors import EnvironmentFault, ModelFolderError, NumericsError
from maxi.health import Health, weights_of
from maxi.saving import FAILURES, Saver
from maxi.sections import MeshConfig
from maxi.step import State

ADAM = optax.adam(1e-3)
DEVICES = mesh.build(MeshConfig(replica=2), jax.devices()[:4])


def state(step: int, seed: int = 0, size: int = 8) -> State:
    params = {"w": jax.random.normal(jax.random.key(seed + step), (size, 4)), "b": jnp.full(4, step, jnp.float32)}
    made = State(jnp.int32(step), params, ADAM.init(params), None)  # type: ignore[call-arg]
    return jax.device_put(made, where(made))


def where(like: Any) -> Any:
    whole = jax.sharding.NamedSharding(DEVICES, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(DEVICES, jax.sharding.PartitionSpec("fsdp"))
    return jax.tree.map(lambda leaf: split if leaf.ndim == 2 else whole, like)


def asked(like: State) -> State:
    return abstract_state(like, where(like))


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.fixture(autouse=True)
def nothing_armed() -> Iterator[None]:
    yield
    faults.arm(None)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints 1, 2 and 3, each of another state."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    checkpoints.close()
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": flip,
    "removed": Path.unlink,
    "emptied": lambda path: os.truncate(path, 0),
    "renamed": lambda path: path.rename(path.with_name(path.name + ".old")),
}
FILES = (
    "commit.json",
    "manifest.0.json",
    "_CHECKPOINT_METADATA",
    "params/_METADATA",
    "params/_sharding",
    "params/manifest.ocdbt",
    "params/array_metadatas/process_0",
    "params/d/*",
    "params/ocdbt.process_0/d/*",
    "rest/_METADATA",
    "rest/ocdbt.process_0/d/*",
    "rest/ocdbt.process_0/manifest.ocdbt",
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_any_damage_is_found_and_passed_over(file: str, damage: str, folder: Path, caplog: Any) -> None:
    DAMAGES[damage](sorted((folder / "3").glob(file))[0])
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.newest() == 2
    (line,) = [record.getMessage() for record in caplog.records]
    if file == "commit.json" and damage in ("removed", "renamed"):
        assert line == "warning: step 3 has no commit.json and is passed over"
    else:
        assert line.startswith("warning: step 3 corrupt: ") and line.endswith("; using 2") and "\n" not in line
    if damage == "flipped":
        assert "sha256 of" in line or "cannot be read" in line


def test_what_is_restored_is_what_was_saved_on_any_mesh(folder: Path) -> None:
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.newest() == 3 and same(checkpoints.restore(3, asked(state(3))), state(3))
    elsewhere = jax.sharding.SingleDeviceSharding(jax.devices()[7])
    other = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=elsewhere), state(3))
    assert same(checkpoints.restore(3, other), state(3))


def test_without_the_check_orbax_would_load_it(folder: Path) -> None:
    """Why there is a manifest: a flipped bit of the data comes back as a number."""
    flipped = [path for path in (folder / "3" / "params").rglob("d/*") if path.stat().st_size > 100]
    for path in flipped:
        raw = bytearray(path.read_bytes())
        raw[-8] ^= 1
        path.write_bytes(raw)
    assert manifest.damage(folder / "3", 3) is not None
    assert manifest.damage(folder / "3", 3, items=("rest",)) is None, "the optimizer is whole, and asked for alone"


def test_none_is_left_to_trust(folder: Path) -> None:
    for step in (1, 2, 3):
        flip(folder / str(step) / "params" / "_METADATA")
    with pytest.raises(ModelFolderError, match=r"step 3 corrupt: .*; step 2 corrupt: .*; step 1 corrupt"):
        Checkpoints(folder, read_only=True).newest()


def test_foreign_names_are_passed_over_and_stay(folder: Path, caplog: Any) -> None:
    strangers = ["9", "010", "notes", "4.orbax-checkpoint-tmp-1", "-5"]
    for name in strangers:
        (folder / name).mkdir()
    (folder / "12").write_text("a file")
    shutil.copytree(folder / "3", folder / "7")
    for leftover in (".saving-4", ".saving-4.orbax-checkpoint-tmp", ".replaced-2"):
        shutil.copytree(folder / "2", folder / leftover)
    checkpoints = Checkpoints(folder, keep=1)
    assert checkpoints.newest() == 3
    assert "step 7 corrupt: commit.json is that of step 3; using 3" in caplog.text
    checkpoints.save(9, state(9))
    checkpoints.close()
    names = {path.name for path in folder.iterdir()}
    assert names == {"9", "9.foreign-1", "12", *strangers}, "what killed runs left is gone, what is not ours is here"
    assert checkpoints.newest() == 9


def test_retention_keeps_the_last_good_one(folder: Path) -> None:
    shelf.retain(folder, keep=1, damaged=(2, 3))
    assert shelf.steps(folder) == [1, 2, 3], "a damaged one goes only when a good one follows"
    shelf.retain(folder, keep=2, damaged=(2,))
    assert shelf.steps(folder) == [1, 3]
    shelf.retain(folder, keep=1)
    assert shelf.steps(folder) == [3]


def test_a_damaged_step_is_written_anew(folder: Path) -> None:
    flip(folder / "3" / "params" / "_METADATA")
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.newest() == 2
    checkpoints.save(3, state(3, seed=5))
    checkpoints.close()
    again = Checkpoints(folder, read_only=True)
    assert again.newest() == 3 and shelf.steps(folder) == [2, 3] and same(again.restore(3, asked(state(3))), state(3, seed=5))


def test_another_tree_shape_or_dtype_is_refused(folder: Path) -> None:
    checkpoints = Checkpoints(folder, read_only=True)
    params = state(3).params
    shape = {**params, "w": jnp.zeros((8, 5))}
    for wrong, words in (
        (shape, r"of another model, params.w: float32\[8, 4\] saved, float32\[8, 5\] asked for"),
        ({**params, "b": jnp.zeros(4, jnp.bfloat16)}, r"params.b: float32\[4\] saved, bfloat16\[4\] asked for"),
        ({f"n{n}": jnp.zeros(2) for n in range(4)}, "and 3 more"),
    ):
        made = State(jnp.int32(3), wrong, ADAM.init(params), None)  # type: ignore[call-arg]
        with pytest.raises(ModelFolderError, match=words):
            checkpoints.restore(3, asked(made))
    other = State(jnp.int32(3), params, optax.sgd(0.1, 0.9).init(params), None)  # type: ignore[call-arg]
    with pytest.raises(ModelFolderError, match=r"of another optimizer, .*--reset-optimizer"):
        checkpoints.restore(3, asked(other))


def run_around(folder: Path) -> str:
    """The same folder as part of something that looks like a run."""
    for name in ("config.yaml", "run.json"):
        (folder.parent / name).write_text("")
    return str(folder.parent)


def test_list_and_verify(folder: Path, capsys: Any) -> None:
    run = run_around(folder)
    flip(folder / "2" / "rest" / "_METADATA")
    checkpoint_table.list_checkpoints(run, sys.stdout)
    assert capsys.readouterr().out.count("whole when written") == 3
    with pytest.raises(ModelFolderError, match="1 damaged: step 2"):
        checkpoint_table.verify_checkpoints(run, sys.stdout)
    out = capsys.readouterr().out
    assert out.count("verified") == 2 and "corrupt: sha256 of rest/_METADATA differs" in out
    with pytest.raises(ModelFolderError, match="not a run folder"):
        checkpoint_table.list_checkpoints(str(folder), sys.stdout)


def test_checkpoints_of_an_earlier_version_are_adopted_or_refused(folder: Path, capsys: Any) -> None:
    for step in (1, 2, 3):
        (folder / str(step) / "commit.json").unlink()
        (folder / str(step) / "manifest.0.json").unlink()
    with pytest.raises(ModelFolderError, match=r"\(1, 2, 3\) have no commit.json.*maxi checkpoint adopt"):
        Checkpoints(folder, read_only=True).newest()
    checkpoint_table.adopt_checkpoints(run_around(folder), sys.stdout)
    assert capsys.readouterr().out.count("adopted as it is") == 3
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.newest() == 3 and same(checkpoints.restore(3, asked(state(3))), state(3))


def test_each_process_answers_for_its_own_files(tmp_path: Path) -> None:
    for name in ("params/ocdbt.process_0/d/a", "params/ocdbt.process_1/d/b", "params/array_metadatas/process_1", "params/d/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    manifest.write(tmp_path, 0)
    with pytest.raises(TimeoutError, match=r"manifest.1.json did not appear"):
        manifest.commit(tmp_path, 5, processes=2, wait=0.1)
    late = threading.Timer(0.2, lambda: manifest.write(tmp_path, 1))
    late.start()
    manifest.commit(tmp_path, 5, processes=2, wait=10)
    late.join()
    assert "process_1" not in (tmp_path / "manifest.0.json").read_text()
    assert (tmp_path / "manifest.1.json").read_text().count("process_1") == 2
    flip(tmp_path / "params/ocdbt.process_1/d/b")
    found = [manifest.damage(tmp_path, 5, share=(n, 2)) for n in range(2)]
    assert sorted(map(str, found)) == ["None", "sha256 of params/ocdbt.process_1/d/b differs"]


def test_saves_never_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO")
    checkpoints, go, most = Checkpoints(tmp_path / "c", keep=5), threading.Event(), []
    write = manifest.write

    def slow(folder: Path, process: int | None) -> None:
        go.wait(20)
        most.append(len(list(folder.parent.glob(".saving-*"))))
        write(folder, process)

    monkeypatch.setattr(manifest, "write", slow)
    monkeypatch.setattr("maxi.checkpoint.SLOW", 0.05)
    checkpoints.save(1, state(1))
    threading.Timer(0.3, go.set).start()
    checkpoints.save(2, state(2))
    checkpoints.close()
    assert checkpoints.steps() == [1, 2] and most == [1, 1]
    assert "checkpoint: step 2 waits for that of step 1, which is still being written" in caplog.text


def saver(folder: Path, background: bool = True) -> tuple[Saver, Checkpoints, list[str]]:
    said: list[str] = []
    checkpoints = Checkpoints(folder, keep=2, background=background)
    health = Health(DEVICES, where(weights_of(state(0))))
    return Saver(checkpoints, health, lambda: None, said.append, "run"), checkpoints, said


@pytest.mark.parametrize("point", ["save.begin", "save.written", "manifest.0.json.rename", "commit.json.write", "save.rename"])
def test_a_full_disk_costs_one_line(point: str, tmp_path: Path) -> None:
    saves, checkpoints, said = saver(tmp_path / "c")
    saves.save(1, state(1))
    checkpoints.wait()
    faults.arm(f"{point}:1:full")
    saves.save(2, state(2))
    saves.save(3, state(3))
    saves.finish("all is computed")
    assert checkpoints.steps() == [1, 3] and not list((tmp_path / "c").glob(".*"))
    (line,) = said
    assert line.startswith("warning: the checkpoint of step 2 could not be written, No space left on device; the run goes on")
    assert f"last saved: step 1 (1 of {FAILURES})" in line


def test_a_disk_that_takes_no_more_is_given_up(tmp_path: Path) -> None:
    """The real thing: files may not grow over 20 kB, which Orbax reports in its own way, in the background."""
    saves, checkpoints, said = saver(tmp_path / "c")
    saves.save(1, state(1))
    saves.poll(wait=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        for step in range(2, 1 + FAILURES):
            saves.save(step, state(step, size=8 << 10))
            saves.poll(wait=True)
            assert len(said) == step - 1 and os.strerror(errno.EFBIG) in said[-1] and "\n" not in said[-1], said
            assert not list((tmp_path / "c").glob(".*")), "leftovers are removed"
        saves.save(9, state(9, size=8 << 10))
        with pytest.raises(EnvironmentFault, match=f"{FAILURES} times in a row; last saved: step 1") as fault:
            saves.poll(wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fault.value.code == 6 and "\n" not in fault.value.line() and len(fault.value.line()) < 400
    assert checkpoints.newest() == 1


def test_a_folder_that_turns_read_only_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the system says of it, since root may write everywhere."""
    saves, checkpoints, said = saver(tmp_path / "c")
    saves.save(1, state(1))
    checkpoints.wait()

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._orbax, "save", lambda *_, **__: refuse())
        saves.save(2, state(2))
    (line,) = said
    assert "step 2 could not be written, Read-only file system; the run goes on, last saved: step 1 (1 of 3)" in line
    saves.save(3, state(3))
    saves.finish("all is computed")
    assert checkpoints.steps() == [1, 3]


def test_the_newest_is_the_highest_step_whatever_the_clock_says(folder: Path) -> None:
    for step, when in ((1, 3e9), (2, 0), (3, 1e9)):
        for path in (folder / str(step)).rglob("*"):
            os.utime(path, (when, when))
        os.utime(folder / str(step), (when, when))
    assert Checkpoints(folder, read_only=True).newest() == 3
    shelf.retain(folder, keep=2)
    assert shelf.steps(folder) == [2, 3]


def test_what_fails_late_is_neither_printed_nor_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When one write failed, others still fail behind the error that was told."""
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    checkpoints = Checkpoints(tmp_path / "c")
    for error in (RuntimeError("Event loop is closed"), RuntimeError("something else")):
        sys.unraisablehook(SimpleNamespace(exc_type=type(error), exc_value=error))  # type: ignore[arg-type]
    assert [str(late.exc_value) for late in told] == ["something else"]

    def refuse() -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(checkpoints._orbax, "close", refuse)
    checkpoints.close()
    assert sys.unraisablehook == told.append
    for late in (OSError(errno.EFBIG, "File too large"), RuntimeError("news")):
        logging.getLogger("asyncio").error("Future exception was never retrieved", exc_info=late)
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["news"]


def test_a_save_that_succeeds_starts_the_count_anew(tmp_path: Path) -> None:
    saves, _, said = saver(tmp_path / "c", background=False)
    for step in range(1, 8):
        faults.arm("save.written:1:full" if step % FAILURES else None)
        saves.save(step, state(step))
    assert len(said) == 5
    with pytest.raises(EnvironmentFault, match="computed, but the disk did not take it; last saved: step 6"):
        saves.finish("all is computed")


def test_an_error_of_the_background_shows_at_the_next_step(tmp_path: Path) -> None:
    saves, checkpoints, said = saver(tmp_path / "c")
    faults.arm("save.written:1:full")
    saves.save(1, state(1))
    assert checkpoints._under_way
    checkpoints._under_way[1].exception(20)
    assert not said
    saves.poll()
    assert len(said) == 1 and "last saved: nothing" in said[0]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    saves, checkpoints, _ = saver(tmp_path / "c", background=False)
    saves.save(1, state(1))
    for bad in (jnp.nan, jnp.inf):
        broken = state(2)
        broken.params["w"] = broken.params["w"].at[5, 2].set(bad)
        with pytest.raises(NumericsError, match="the weights are not finite; last saved: step 1"):
            saves.save(2, broken)
    assert checkpoints.steps() == [1]


def test_copies_that_differ_are_found_and_the_device_is_named(tmp_path: Path) -> None:
    saves, checkpoints, _ = saver(tmp_path / "c", background=False)
    good = state(1)
    parts = [np.asarray(shard.data).copy() for shard in good.params["b"].addressable_shards]
    parts[2].view(np.uint32)[1] ^= 1 << 7
    placed = [
        jax.device_put(part, shard.device) for part, shard in zip(parts, good.params["b"].addressable_shards, strict=True)
    ]
    good.params["b"] = jax.make_array_from_single_device_arrays((4,), good.params["b"].sharding, placed)
    with pytest.raises(
        EnvironmentFault, match=r"different bits, \['params'\]\['b'\] on cpu:2 of process 0; last saved: nothing"
    ):
        saves.save(1, good)
    assert checkpoints.steps() == []


def test_the_digest_changes_with_any_bit() -> None:
    health, first = Health(DEVICES, where(weights_of(state(0)))), state(1)
    digest = health(weights_of(first)).digest
    assert digest == health(weights_of(state(1))).digest
    for row in range(8):
        changed = state(1)
        changed.params["w"] = changed.params["w"].at[row, row % 4].multiply(1 + 2e-7)
        assert health(weights_of(changed)).digest != digest
