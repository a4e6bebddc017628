"""Checkpoints of a run, through Orbax: written aside, hashed, marked as whole, renamed; the newest few kept.

A checkpoint has up to three items: `params` (with `ema` where there is one), which is all that generating needs, `rest`
(optimizer state and step) and `spikes` (the last losses, where steps are skipped by them). Each leaf is restored straight
onto the mesh that asks for it, whatever mesh saved it. What is restored was hashed before: Orbax itself loads flipped bits,
casts and drops without a word. `manifest.py` has the hashes and the mark, `shelf.py` the folders, `saving.py` what a save
that fails comes to.
"""

import logging
import sys
import time
from collections.abc import Iterable
from concurrent import futures
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxi import faults, manifest, processes, shelf
from maxi.errors import ModelFolderError, first_line
from maxi.step import State

log = logging.getLogger("maxi")

SLOW = 1.0
"""Seconds that a save may wait for the one before it without a word."""

ITEMS = ("params", "rest", "spikes")


class Checkpoints:
    """The checkpoints under `folder`; `keep` of the newest stay. Never more than one save is under way.

    All processes call the same methods in the same order; the first one renames and removes. `read_only` changes nothing
    on disk.
    """

    def __init__(self, folder: Path, keep: int = 1, background: bool = True, read_only: bool = False):
        import orbax.checkpoint as ocp  # most of a second: only for those who save or restore

        self._ocp, self.folder, self._keep, self._background = ocp, folder.absolute(), keep, background
        self._process, self._processes = processes.index(), processes.count()
        handlers: dict[str, Any] = {item: ocp.StandardCheckpointHandler() for item in ITEMS}
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._under_way: tuple[int, futures.Future[None]] | None = None
        self._damaged: dict[int, str] = {}
        self.saved: int | None = None
        """The last step that this process knows to be saved."""
        self._hook = sys.unraisablehook
        if not read_only:
            sys.unraisablehook = _hush_closed_loops(self._hook)
            logging.getLogger("asyncio").addFilter(_is_news)  # for good: they may be collected long after
            if self._process == 0:
                self.folder.mkdir(exist_ok=True)
                shelf.sweep(self.folder)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint with its mark, ascending; whether it is damaged is not known yet."""
        return shelf.steps(self.folder)

    def newest(self, before: int | None = None, items: Iterable[str] = ()) -> int | None:
        """The newest step (up to `before`) whose files are as they were written, None when there never was a checkpoint.

        Says what it passes over. Raises ModelFolderError when there are checkpoints but none can be trusted: starting anew
        is nobody's intention then.
        """
        marked = [step for step in reversed(processes.exchange(self.steps())[0]) if before is None or step <= before]
        bare = [step for step in shelf.unmarked(self.folder) if shelf.looks_written(self.folder, step)]
        for step in bare:
            if not marked or step > marked[0]:
                log.warning("warning: step %d has no %s and is passed over", step, manifest.COMMIT)
        found = next((step for step in marked if self.damage(step, items) is None), None)
        bad = [f"step {step} corrupt: {self._damaged[step]}" for step in marked if step in self._damaged]
        if found is None and bad:
            raise ModelFolderError("; ".join(bad), str(self.folder), "restore the folder from a copy, or set another run_dir")
        if found is None and bare and before is None:
            what = f"the checkpoints ({', '.join(map(str, bare))}) have no {manifest.COMMIT}: an earlier version's, or damaged"
            raise ModelFolderError(what, str(self.folder), "`maxi checkpoint adopt RUN` trusts them as they are")
        for line in bad:
            log.warning("warning: %s; using %d", line, found)
        return found

    def damage(self, step: int, items: Iterable[str] = ()) -> str | None:
        """What is wrong with a checkpoint, None when nothing is; see `manifest.damage`. Each process looks at its share."""
        if step not in self._damaged:
            reason = manifest.damage(self.folder / str(step), step, items, (self._process, self._processes))
            reason = next(filter(None, processes.exchange(reason)), None)
            if reason is None:
                return None
            self._damaged[step] = reason
        return self._damaged[step]

    def save(self, step: int, state: State) -> None:
        """Begins to save (and first waits for the save before it). The state may be donated afterwards.

        Raises what went wrong in the save before or in the beginning of this one: OSError, or what Orbax makes of it.
        """
        self.wait(before=step)
        faults.at("save.begin")
        args = self._ocp.args
        items = {name: args.StandardSave(tree) for name, tree in _items(state).items()}
        self._orbax.save(shelf.saving(self.folder, step), args=args.Composite(**items), force=True)
        self._under_way = step, self._thread.submit(self._finish, step)
        if not self._background:
            self.wait()

    def poll(self) -> None:
        """Raises what went wrong in the background, if something did."""
        if self._under_way and self._under_way[1].done():
            self.wait()

    def wait(self, before: int | None = None) -> None:
        """Returns when nothing is being written. Raises as `poll` does. `before`: the step whose save has to wait."""
        task, self._under_way = self._under_way, None
        if task is None:
            return
        if before is not None and not futures.wait([task[1]], SLOW).done:
            log.info("checkpoint: step %d waits for that of step %d, which is still being written", before, task[0])
        task[1].result()
        self.saved = task[0]

    def tidy(self) -> None:
        """Removes what a save that failed left behind."""
        if self._process == 0:
            shelf.sweep(self.folder)

    def restore(self, step: int, where: State) -> State:
        """The state of that step; `where` is a `State` of `jax.ShapeDtypeStruct`s with shardings.

        The last losses are taken where both have them: a run may begin or cease to look at them. Raises ModelFolderError
        when the checkpoint holds another tree, shape or dtype.
        """
        wanted = _items(where)
        if "spikes" in wanted and not (self.folder / str(step) / "spikes").is_dir():
            del wanted["spikes"]
        found = self._restore(step, **wanted)
        weights, rest = found["params"], found["rest"]
        made = State(rest["step"], weights["params"], rest["opt_state"], weights.get("ema"))  # type: ignore[call-arg]
        return replace(made, spikes=found["spikes"]["losses"] if "spikes" in wanted else None)

    def restore_weights(self, step: int, params: Any) -> Any:
        """The weights alone, the moving average where there is one; `params` as in `restore`."""
        found = self._weights(step, params)
        return found.get("ema", found["params"])

    def restore_but_optimizer(self, step: int, where: State) -> tuple[Any, Any, Any]:
        """(step, weights, moving average or None) for a run that goes on with another optimizer."""
        found = self._weights(step, where.params)
        counter = jax.device_put(np.int32(step), where.step.sharding)
        return counter, found["params"], found.get("ema")

    def close(self) -> None:
        """Waits, and lets go of the threads. What went wrong and was not asked for yet is lost."""
        self._thread.shutdown()
        with suppress(OSError, ValueError, RuntimeError):
            self._orbax.close()
        sys.unraisablehook = self._hook

    def _finish(self, step: int) -> None:
        """All that follows once the arrays are on the host; in the background."""
        self._orbax.wait_until_finished()
        faults.at("save.written")
        partial = shelf.saving(self.folder, step)
        manifest.write(partial, self._process)
        if self._process == 0:
            manifest.commit(partial, step, self._processes)
            shelf.publish(self.folder, step)
            self._damaged.pop(step, None)
            shelf.retain(self.folder, self._keep, self._damaged)
            return
        until = time.monotonic() + manifest.WAIT
        while not manifest.is_committed(self.folder / str(step)):
            if time.monotonic() > until:
                raise TimeoutError(None, f"the first process did not mark step {step}", str(self.folder))
            time.sleep(0.05)

    def _weights(self, step: int, params: Any) -> Any:
        return self._restore(step, params=dict.fromkeys(self._metadata(step, "params"), params))["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        for name, wanted in items.items():
            self._check(step, name, wanted)
        args = {name: self._ocp.args.StandardRestore(wanted) for name, wanted in items.items()}
        try:
            return self._orbax.restore(self.folder / str(step), args=self._ocp.args.Composite(**args))
        except (ValueError, KeyError, OSError) as error:
            what = f"cannot restore step {step}, {first_line(error)}"
            raise ModelFolderError(what, str(self.folder), "use another step") from error

    def _metadata(self, step: int, item: str) -> Any:
        try:
            return self._orbax.metadata(self.folder / str(step)).item_metadata[item].tree  # type: ignore[union-attr, index]
        except (AttributeError, KeyError, ValueError, OSError, TypeError) as error:
            raise ModelFolderError(f"step {step} has no readable {item}", str(self.folder), "use another step") from error

    def _check(self, step: int, item: str, wanted: Any) -> None:
        """Orbax casts and drops silently, so the trees are compared first."""
        stored = _leaves(self._metadata(step, item))
        asked = _leaves(wanted)
        differences = [
            f"{path}: {stored.get(path, 'absent')} saved, {asked.get(path, 'none')} asked for"
            for path in sorted({*stored, *asked})
            if stored.get(path) != asked.get(path)
        ]
        if differences:
            shown = "; ".join(differences[:3]) + (f" and {len(differences) - 3} more" if len(differences) > 3 else "")
            what = f"step {step} is of another {'optimizer' if item == 'rest' else 'model'}, {shown}"
            fix = "use the config it was trained with" + (", or --reset-optimizer" if item == "rest" else "")
            raise ModelFolderError(what, str(self.folder), fix)


def abstract_state(state: Any, where: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with shardings, from a tree of arrays or shapes and a tree of shardings."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, where)


def _hush_closed_loops(hook: Any) -> Any:
    """When one of many writes fails, tensorstore prints a traceback for each of the others that comes too late to tell."""

    def quiet(unraisable: Any) -> None:
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    return quiet


def _is_news(record: logging.LogRecord) -> bool:
    """Of many writes that the disk refuses one is raised; asyncio would report the others when they are collected."""
    return not (record.exc_info and isinstance(record.exc_info[1], OSError))


def _items(state: State) -> dict[str, Any]:
    weights = {"params": state.params} if state.ema is None else {"params": state.params, "ema": state.ema}
    items: dict[str, Any] = {"params": weights, "rest": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.spikes is None else {**items, "spikes": {"losses": state.spikes}}


def _leaves(tree: Any) -> dict[str, str]:
    """Path -> "dtype[shape]" with the key spelling that both Orbax's metadata and pytrees can be brought to."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda n: hasattr(n, "dtype")):
        if hasattr(leaf, "dtype"):
            key = ".".join(str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part)))) for part in path)
            found[key] = f"{leaf.dtype}{list(leaf.shape)}"
    return found
