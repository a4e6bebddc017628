"""Checkpoints of a run, through Orbax: written aside, renamed when whole, the newest few kept.

A checkpoint has two items: `params` (with `ema` where there is one), which is all that generating needs, and `rest`
(optimizer state and step). Each leaf is restored straight onto the mesh that asks for it, whatever mesh saved it.
"""

import logging
from pathlib import Path
from typing import Any

import jax

from maxi.errors import ModelFolderError
from maxi.step import State

log = logging.getLogger("maxi")


class Checkpoints:
    """The checkpoints under `folder`; `keep` of the newest stay. Never more than one save is under way."""

    def __init__(self, folder: Path, keep: int = 1, background: bool = True, read_only: bool = False):
        import orbax.checkpoint as ocp  # most of a second: only for those who save or restore

        self._ocp, self.folder = ocp, folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            enable_async_checkpointing=background and not read_only,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        handlers = {item: ocp.StandardCheckpointHandler() for item in ("params", "rest")}
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State) -> None:
        """Begins to save (and first waits for the save before it). The state may be donated afterwards."""
        ocp = self._ocp
        weights = {"params": state.params} if state.ema is None else {"params": state.params, "ema": state.ema}
        rest = {"step": state.step, "opt_state": state.opt_state}
        items = ocp.args.Composite(params=ocp.args.StandardSave(weights), rest=ocp.args.StandardSave(rest))
        self._manager.save(step, args=items)

    def restore(self, step: int, where: State) -> State:
        """The state of that step; `where` is a `State` of `jax.ShapeDtypeStruct`s with shardings.

        Raises ModelFolderError when the checkpoint holds another tree, shape or dtype.
        """
        weights = {"params": where.params} if where.ema is None else {"params": where.params, "ema": where.ema}
        rest = {"step": where.step, "opt_state": where.opt_state}
        found = self._restore(step, params=weights, rest=rest)
        return State(found["rest"]["step"], found["params"]["params"], found["rest"]["opt_state"], found["params"].get("ema"))  # type: ignore[call-arg]

    def restore_weights(self, step: int, params: Any) -> Any:
        """The weights alone, the moving average where there is one; `params` as in `restore`."""
        stored = self._metadata(step, "params")
        name = "ema" if "ema" in stored else "params"
        wanted = dict.fromkeys(stored, params)
        return self._restore(step, params=wanted)["params"][name]

    def wait(self) -> None:
        """Returns when nothing is being written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        for name, wanted in items.items():
            self._check(step, name, wanted)
        args = {name: self._ocp.args.StandardRestore(wanted) for name, wanted in items.items()}
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(**args))
        except (ValueError, KeyError, OSError) as error:
            first = str(error).strip().splitlines()[0][:200]
            raise ModelFolderError(f"cannot restore step {step}, {first}", str(self.folder), "use another step") from error

    def _metadata(self, step: int, item: str) -> Any:
        try:
            return self._manager.item_metadata(step)[item].tree
        except (AttributeError, KeyError, ValueError, OSError) as error:
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
            raise ModelFolderError(
                f"step {step} is of another model or optimizer, {shown}", str(self.folder), "use the config it was trained with"
            )


def abstract_state(state: Any, where: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with shardings, from a tree of arrays or shapes and a tree of shardings."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, where)


def _leaves(tree: Any) -> dict[str, str]:
    """Path -> "dtype[shape]" with the key spelling that both Orbax's metadata and pytrees can be brought to."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda n: hasattr(n, "dtype")):
        if hasattr(leaf, "dtype"):
            key = ".".join(str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part)))) for part in path)
            found[key] = f"{leaf.dtype}{list(leaf.shape)}"
    return found
