"""`maxi train --verify-step N`: step N once more, from the same state, compared bit for bit.

A machine that computes wrong without a word (arXiv:2102.11245) shows in no metric. Step N is replayed twice from the state
before it, and what comes of it is compared with itself, with the checkpoint of step N where there is one, and the steps on
the way with metrics.jsonl. Nothing is written.
"""

import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxi import step as steps
from maxi.checkpoint import Checkpoints
from maxi.errors import ConfigError, EnvironmentFault
from maxi.metrics import plain
from maxi.params import Tree
from maxi.program import Program
from maxi.run import Run, facts_of
from maxi.step import State

log = logging.getLogger("maxi")


def verify_step(
    number: int,
    run: Run,
    program: Program,
    checkpoints: Checkpoints,
    first: Callable[[], State],
    frozen: Tree,
    batches: Callable[[int], Iterator[Any]],
) -> None:
    """Replays step `number`; `first()` is the state before step 1, `frozen` what stays beside it, and `batches(n)` what the
    steps after n read.

    Raises EnvironmentFault naming the machine when bits differ, ConfigError when the run has not come that far.
    """
    recorded = {line["step"]: line for line in run.lines() if "train/loss" in line}
    saved = checkpoints.steps()
    if number < 1 or number > max([0, *saved, *recorded]):
        raise ConfigError(f"the run has not come to step {number}", "--verify-step", f"it is at {max([0, *saved, *recorded])}")
    base = checkpoints.newest(before=number - 1) or 0
    state = program.with_losses(checkpoints.restore(base, program.abstract_state())) if base else first()
    take, read, compared = program.step(), batches(base), 0
    where = f"step {number} on {socket.gethostname()}"
    for at in range(base + 1, number + 1):
        batch = steps.put(next(read), program.devices)
        if at == number:
            again, of_again = take(jax.tree.map(jnp.copy, state), batch, frozen)
            fix = "take this machine out: the same computation gave two results"
            state, metrics = take(state, batch, frozen)
            _same(again, state, "computed twice", where, fix)
            _same(of_again, metrics, "computed twice", where, fix)
        else:
            state, metrics = take(state, batch, frozen)
        if at in recorded:
            compared += 1
            _same_record(plain(metrics), recorded[at], at, run)
    whole = number in saved and checkpoints.damage(number) is None
    if whole:
        fix = "one of the two machines computes wrong, or code, libraries or devices changed in between"
        before = checkpoints.restore(number, program.abstract_state())
        _same(before, state, f"as {_hosts(run)} saved it and as it is computed here", where, fix)
    beside = "its checkpoint and " if whole else ""
    log.info("verified: step %d, replayed twice from step %d; %s%d records: the same bits", number, base, beside, compared)


def differing(one: Any, other: Any) -> list[str]:
    """The paths of leaves that do not hold the same bits, of what this process can see of them."""
    found = []
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        parts = [{str(s.index): np.asarray(s.data) for s in leaf.addressable_shards} for leaf in (a, b)]
        if any(x.tobytes() != parts[1][index].tobytes() for index, x in parts[0].items()):
            found.append(jax.tree_util.keystr(path))
    return found


def _same(one: Any, other: Any, how: str, where: str, fix: str) -> None:
    if found := differing(one, other):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise EnvironmentFault(f"{how}, bits differ in {found[0]}{more}", where, fix)


def _same_record(metrics: dict[str, Any], line: dict[str, Any], number: int, run: Run) -> None:
    now = json.loads(json.dumps(metrics))
    wrong = [name for name, value in now.items() if line.get(name) != value]
    if wrong:
        what = f"{wrong[0]} is {now[wrong[0]]} here and was {line.get(wrong[0])} on {_hosts(run)}"
        fix = "one of the machines computes wrong, or code, libraries or devices changed in between"
        raise EnvironmentFault(what, f"step {number} on {socket.gethostname()}", fix)


def _hosts(run: Run) -> str:
    """The machines that the run was on."""
    found = dict.fromkeys(entry["host"] for entry in facts_of(run).get("history", []) if "host" in entry)
    return ", ".join(found) or Path(run.folder).name
