"""The run folder: all the state there is of a run, and who may write to it.

config.yaml      the resolved configuration
run.json         fingerprints of data, tokenizer and reference, versions, what was read
model/           config.json and the tokenizer
checkpoints/     see checkpoint.py
metrics.jsonl    what training and evaluation computed; the same bytes whether a run was interrupted or not
samples.jsonl    continuations of the fixed prompts
perf.jsonl       what depends on the machine: times, tokens per second, memory
events.jsonl     what every start spent its time on, see events.py
stacks-P.txt     where the threads of process P were when a step took far too long, see watchdog.py
tensorboard/     both of them as TensorBoard events
hf/              the export
exported.json    which step it is of
processes/       of several processes, what libraries wrote by themselves
xla/             of several processes, compiled programs
lock             held while a process trains here
"""

import fcntl
import hashlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from maxi import processes
from maxi.config import Config, load, to_tree, to_yaml
from maxi.errors import ConfigError, DataError, EnvironmentFault

RESUMABLE = (
    "run_dir",
    "steps",
    "epochs",
    "micro_batches",
    "mesh.",
    "processes.",
    "compute.",
    "checkpoint.",
    "eval.",
    "log.",
    "export_",
    "data.workers",
    "data.cache_dir",
)
"""Keys that may change when a run goes on: they say how far and how fast to go and what to show.

More steps also stretch the learning-rate schedule from here on.
"""


class Run:
    """Paths of a run folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config, self.facts = self.folder / "config.yaml", self.folder / "run.json"
        self.exported = self.folder / "exported.json"
        self.model, self.hf = self.folder / "model", self.folder / "hf"
        self.checkpoints, self.tensorboard = self.folder / "checkpoints", self.folder / "tensorboard"
        self.metrics, self.samples, self.perf = (self.folder / f"{name}.jsonl" for name in ("metrics", "samples", "perf"))
        self.events = self.folder / "events.jsonl"

    def stacks(self, process: int) -> Path:
        return self.folder / f"stacks-{process}.txt"

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that measure held-out text, in order of steps."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []
        return [values for values in map(json.loads, lines) if "eval/loss" in values]

    @staticmethod
    def is_run(folder: str | Path) -> bool:
        return (Path(folder) / "config.yaml").is_file() and (Path(folder) / "run.json").is_file()


@contextmanager
def claim(config: Config) -> Iterator[Run]:
    """The run folder, made if need be, and nobody else's while the context lasts; of several processes the first locks it.

    Raises ConfigError when it cannot be written or holds a run with other settings, EnvironmentFault when another
    process is training in it.
    """
    run = Run(config.run_dir)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = (run.folder / "lock").open("a+")
    except OSError as error:
        fix = "set run_dir to a folder you may write"
        raise ConfigError(f"cannot write the run folder, {error.strerror}", str(run.folder), fix) from None
    if not processes.is_first():
        lock.close()
        yield run
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
        except OSError:
            lock.seek(0)
            what = f"another process trains here, {lock.read().strip() or 'unknown'}"
            raise EnvironmentFault(what, str(run.folder), "wait for it, or set another run_dir") from None
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        if Run.is_run(run.folder):
            _refuse_changes(run, config)
        yield run


def record(run: Run, config: Config, fingerprints: dict[str, str], data: Sequence[str]) -> None:
    """Writes config.yaml and run.json, or on a second start checks that data and tokenizer are still the same.

    `data` are lines that describe what is read. Raises DataError when a fingerprint changed, ConfigError when processes
    of one run differ.
    """
    processes.require_same(config=hashlib.sha256(to_yaml(config).encode()).hexdigest(), **fingerprints, version=version("maxi"))
    if not processes.is_first():
        return
    if not run.facts.is_file():
        versions = {"maxi": version("maxi"), "python": sys.version.split()[0]}
        facts = {"fingerprints": {}, "versions": versions, "data": list(data)}
        write_whole(run.facts, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    for name, value in fingerprints.items():
        remember(run, name, value)
    write_whole(run.config, to_yaml(config))


def remember(run: Run, name: str, fingerprint: str) -> None:
    """Adds a fingerprint to run.json. Raises DataError when another one of that name stands there."""
    if not processes.is_first():
        return
    facts = json.loads(run.facts.read_text(encoding="utf-8"))
    known = facts["fingerprints"].setdefault(name, fingerprint)
    if known != fingerprint:
        raise DataError(f"the {name} changed since this run began", str(run.folder), "restore it, or set another run_dir")
    write_whole(run.facts, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def remembered(run: Run, name: str) -> str | None:
    """The fingerprint of that name in run.json."""
    return json.loads(run.facts.read_text(encoding="utf-8"))["fingerprints"].get(name)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is at every moment either the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(path)


def truncate_after(path: Path, step: int) -> None:
    """Drops the lines of a .jsonl that are later than `step`, and a last line that a kill cut short."""
    if not processes.is_first() or not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    write_whole(path, "".join(kept))


def _refuse_changes(run: Run, config: Config) -> None:
    old, new = (_flat(to_tree(c)) for c in (load(run.config), config))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key) and not key.startswith(RESUMABLE)]
    if changed:
        shown = ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"this run began with other settings, {shown}{more}", str(run.folder), "change them back, or set another run_dir"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value for name, node in tree.items() for key, value in _flat(node, f"{prefix}.{name}" if prefix else name).items()
    }
