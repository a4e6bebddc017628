"""Going back: `maxi train --rewind R[:S]` takes a run R steps back and lets it go on without the next S batches.

PaLM's answer to a loss that does not recover (arXiv:2204.02311, section 5.1). The batches left out stand in the run's
config.yaml as `data.skip_batches`, so that the same run from its beginning, with that config, gives the same bits. What was
asked is written into run.json first and done afterwards, so a kill in between is finished by the next start.
Checkpoints that the run goes back behind are kept in a folder of their own.
"""

import dataclasses
import logging
import re
from collections.abc import Sequence

from maxi import manifest, processes, shelf
from maxi.config import Config, load, to_yaml
from maxi.data.skipping import Skips, skipping
from maxi.errors import ConfigError, ModelFolderError
from maxi.run import Run, facts_of, truncate_after, update
from maxi.whole import write_whole

log = logging.getLogger("maxi")


def settle(run: Run, config: Config, asked: str | None) -> Config:
    """The config with the batches that the run leaves out, once what `--rewind` asks is done.

    Raises ConfigError when there is nothing to go back to, or the config leaves out other batches than the run.
    """
    is_run = processes.exchange(Run.is_run(run.folder))[0]
    if asked and not is_run:
        raise ConfigError("there is no run yet to go back in", "--rewind", "leave it out")
    if is_run and processes.is_first():
        _finish(run)
        if asked and not _done_already(run, asked):
            _begin(run, asked)
            _finish(run)
    processes.barrier()
    return _with_skips(run, config) if is_run else config


def _begin(run: Run, asked: str) -> None:
    back, left_out = _parse(asked)
    last = _last_step(run)
    target = last - back
    steps = shelf.steps(run.checkpoints)
    if target < 0 or (target > 0 and not any(step <= target for step in steps)):
        what = f"{back} steps before step {last} there is no checkpoint, only of {', '.join(map(str, steps)) or 'none'}"
        raise ConfigError(what, f"--rewind {asked}", "go back less, and raise checkpoint.keep for the next time")
    reasons = {step: manifest.damage(run.checkpoints / str(step), step) for step in steps if step <= target}
    if target > 0 and all(reasons.values()):
        step, reason = max(reasons.items())
        fix = "go back further, if there is an earlier one"
        raise ModelFolderError(f"step {step} corrupt: {reason}", str(run.checkpoints), fix)
    skips = skipping(target, left_out, load(run.config).data.skip_batches)
    update(run, rewinding={"rewind": asked, "from": last, "to": target, "skip_batches": skips})


def _finish(run: Run) -> None:
    """Does what was written down; any part of it may be done already."""
    facts = facts_of(run)
    plan = facts.get("rewinding")
    if not plan:
        return
    aside = shelf.set_aside(run.checkpoints, after=plan["to"])
    old = load(run.config)
    skips = tuple((int(first), int(count)) for first, count in plan["skip_batches"])
    write_whole(run.config, to_yaml(_replaced(old, skips)))
    run.exported.unlink(missing_ok=True)
    for records in (run.metrics, run.samples, run.perf):
        truncate_after(records, plan["to"])
    update(run, history=[*facts.get("history", []), plan], rewinding=None)
    kept = f"; later checkpoints are in {aside}" if aside else ""
    log.info("rewind: from step %d back to %d, without the batches %s%s", plan["from"], plan["to"], _shown(skips), kept)


def _done_already(run: Run, asked: str) -> bool:
    """A scheduler starts the same command again and again: what it asks is done once, until the run is past that again."""
    done = [entry for entry in facts_of(run).get("history", []) if "rewind" in entry]
    if not done or done[-1]["rewind"] != asked or _last_step(run) >= done[-1]["from"]:
        return False
    log.info("rewind: done already; the run is not past step %d again", done[-1]["from"])
    return True


def _with_skips(run: Run, config: Config) -> Config:
    own = load(run.config).data.skip_batches
    wanted = config.data.skip_batches
    if wanted != own[: len(wanted)]:
        what = f"this run leaves out the batches {_shown(own)}, not {_shown(wanted)}"
        raise ConfigError(what, "data.skip_batches", "take it out of the config: a run remembers its own")
    return _replaced(config, own)


def _replaced(config: Config, skips: Skips) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, skip_batches=skips))


def _last_step(run: Run) -> int:
    """How far the run has come: its newest checkpoint, or what is written down of later steps."""
    return max([0, *shelf.steps(run.checkpoints)[-1:], *(line["step"] for line in run.lines()[-1:])])


def _parse(asked: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", asked)
    if not match or not int(match[1]):
        raise ConfigError(f"cannot read {asked!r}", "--rewind", "write R or R:S, steps to go back and batches to leave out")
    return int(match[1]), int(match[2]) if match[2] else int(match[1])


def _shown(skips: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{first} to {first + count - 1}" for first, count in skips) or "none"
