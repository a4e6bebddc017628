"""The run folder: all the state there is of a run, and what may change when it goes on.

config.yaml      the resolved configuration
run.json         fingerprints of data, tokenizer, reference and base, versions, environment, what was read, and the history:
                 every start, and what was allowed to change at it
model/           config.json and the tokenizer
checkpoints/     see checkpoint.py
metrics.jsonl    what training and evaluation computed; the same bytes whether a run was interrupted or not
samples.jsonl    continuations of the fixed prompts
perf.jsonl       what depends on the machine: times, tokens per second, memory
events.jsonl     what every start spent its time on, see events.py
stacks-P.txt     where the threads of process P were when a step took far too long, see watchdog.py
tensorboard/     both of them as TensorBoard events
hf/              the export
adapter/         the adapter by itself, in peft's format
adapter_start.safetensors  what PiSSA started from, which exports take off again
exported.json    which step it is of
processes/       of several processes, what libraries wrote by themselves
xla/             of several processes, compiled programs
lock             see lock.py
"""

import errno
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxi import lock, processes, shelf, surroundings
from maxi.config import Config, documentation, load, to_tree, to_yaml
from maxi.errors import ConfigError, DataError, ModelFolderError
from maxi.whole import write_whole

log = logging.getLogger("maxi")

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
    "data.skip_batches",  # the run's own go on to hold, see rewind.py
)
"""Keys that may change when a run goes on: they say how far and how fast to go and what to show.

More steps also stretch the learning-rate schedule from here on.
"""

DECIDES_DATA = ("data", "chat", "objective", "seed", "seq_len", "tokenizer", "model.init_from")
"""Keys whose allowed change lets the fingerprint of the data change too."""


@dataclass(frozen=True)
class Resume:
    """How a run is to go on, as the command line says it: keys (or sections) that may change, a rewind `R[:S]`, and whether
    the optimizer begins anew."""

    allow_change: tuple[str, ...] = ()
    rewind: str | None = None
    reset_optimizer: bool = False

    @property
    def allowed(self) -> tuple[str, ...]:
        return (*self.allow_change, *(("optim",) if self.reset_optimizer else ()))


AS_BEFORE = Resume()
"""Nothing changes."""


class Run:
    """Paths of a run folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config, self.facts = self.folder / "config.yaml", self.folder / "run.json"
        self.exported = self.folder / "exported.json"
        self.model, self.hf, self.adapter = self.folder / "model", self.folder / "hf", self.folder / "adapter"
        self.start = self.folder / "adapter_start.safetensors"
        self.checkpoints, self.tensorboard = self.folder / "checkpoints", self.folder / "tensorboard"
        self.metrics, self.samples, self.perf = (self.folder / f"{name}.jsonl" for name in ("metrics", "samples", "perf"))
        self.events = self.folder / "events.jsonl"

    def stacks(self, process: int) -> Path:
        return self.folder / f"stacks-{process}.txt"

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that measure held-out text, in order of steps."""
        return [values for values in self.lines() if "eval/loss" in values]

    def lines(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, up to one that a kill cut short."""
        return [values for _, values in _whole_lines(self.metrics)]

    @staticmethod
    def is_run(folder: str | Path) -> bool:
        return (Path(folder) / "config.yaml").is_file() and (Path(folder) / "run.json").is_file()


@contextmanager
def claim(config: Config, resume: Resume = AS_BEFORE) -> Iterator[Run]:
    """The run folder, made if need be, and nobody else's while the context lasts; of several processes the first locks it.

    Raises ConfigError when it cannot be written or holds a run with other settings that may not change, EnvironmentFault
    when another process is training in it.
    """
    run = Run(config.run_dir)
    _refuse_unknown(resume.allow_change)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        probe = run.folder / f".probe-{socket.gethostname()}-{os.getpid()}"  # every process of a run makes its own
        write_whole(probe, "")
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        fix = "set run_dir to a folder you may write"
        raise ConfigError(f"cannot write the run folder, {error.strerror}", str(run.folder), fix) from None
    if not processes.is_first():
        yield run
        return
    with lock.held(run.folder / "lock"):
        if Run.is_run(run.folder):
            _refuse_changes(run, config, resume.allowed)
        yield run


def record(run: Run, config: Config, fingerprints: dict[str, str], data: Sequence[str], resume: Resume = AS_BEFORE) -> None:
    """Writes config.yaml and run.json; on a second start it checks that data and tokenizer are still the same, and adds to
    the history what is not as it was.

    `data` are lines that describe what is read. Raises DataError when a fingerprint changed, ConfigError when
    `compute.deterministic` and the environment has, or when processes of one run differ.
    """
    same = hashlib.sha256(to_yaml(config).encode()).hexdigest()
    versions, environment = surroundings.versions(), surroundings.environment()
    processes.require_same(config=same, **fingerprints, version=versions["code"])
    if config.compute.deterministic:
        surroundings.refuse_breaking()
    if not processes.is_first():
        return
    new = not run.facts.is_file()
    facts = {"fingerprints": {}, "versions": versions, "environment": environment, "data": list(data)} if new else facts_of(run)
    started: dict[str, Any] = {"step": next(reversed(shelf.steps(run.checkpoints)), 0), "host": socket.gethostname()}
    if not new:
        known = {name: value for name, value in versions.items() if name in facts["versions"]}
        others = {
            "versions": surroundings.changes(facts["versions"], known),
            "environment": surroundings.changes(facts.get("environment", environment), environment),
        }
        if config.compute.deterministic and (changed := others["environment"]):
            name, (old, now) = next(iter(changed.items()))
            what = f"{name} is {now!r} and was {old!r} when this run began, which compute.deterministic forbids"
            raise ConfigError(what, "environment", "set it back, or set compute.deterministic=false")
        for kind, changed in ((kind, changed) for kind, changed in others.items() if changed):
            shown = ", ".join(f"{name} {old or 'none'} -> {now or 'none'}" for name, (old, now) in changed.items())
            what = "versions" if kind == "versions" else "environment variables"
            log.warning("warning: this run goes on with other %s, so its bits may differ: %s", what, shown)
            started[kind] = changed
        if run.config.is_file() and (allowed := changed_keys(run, config, allowed_only=resume.allowed)):
            started["changed"] = allowed
        facts |= {"versions": versions, "environment": environment}
    for name, value in fingerprints.items():
        keys = DECIDES_DATA if name == "data" else (name,)
        replaced = any(_covers(key, wanted) or _covers(wanted, key) for key in keys for wanted in resume.allow_change)
        _compare(run, facts, name, value, replaced)
    facts.setdefault("history", []).append(started)
    _write_facts(run, facts)
    write_whole(run.config, to_yaml(config))


def remember(run: Run, name: str, fingerprint: str) -> None:
    """Adds a fingerprint to run.json. Raises DataError when another one of that name stands there."""
    if not processes.is_first():
        return
    facts = facts_of(run)
    _compare(run, facts, name, fingerprint, replaced=False)
    _write_facts(run, facts)


def remembered(run: Run, name: str) -> str | None:
    """The fingerprint of that name in run.json."""
    return facts_of(run)["fingerprints"].get(name)


def facts_of(run: Run) -> dict[str, Any]:
    """What run.json says. Raises ModelFolderError when it cannot be read."""
    try:
        facts = json.loads(run.facts.read_text(encoding="utf-8"))
        if not isinstance(facts["fingerprints"], dict) or not isinstance(facts["versions"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        fix = "restore it from a copy, or set another run_dir"
        raise ModelFolderError("run.json is damaged", str(run.facts), fix) from None
    return facts


def update(run: Run, **facts: Any) -> None:
    """Sets entries of run.json; None removes one."""
    new = {name: value for name, value in (facts_of(run) | facts).items() if value is not None}
    _write_facts(run, new)


def exported_step(run: Run) -> int:
    """The step that hf/ is of; -1 when that is not known."""
    try:
        return int(json.loads(run.exported.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def reset_at(run: Run, config: Config, step: int) -> bool:
    """Whether the optimizer is to begin anew at this step, as `--reset-optimizer` asks; notes it down.

    A scheduler repeats its command: what was asked is done once, until the optimizer's settings change again.
    """
    facts, settings = facts_of(run), to_tree(config)["optim"]
    done = [entry for entry in facts.get("history", []) if "reset_optimizer" in entry]
    if done and done[-1]["optim"] == settings and done[-1]["reset_optimizer"] < step:
        log.info("state: the optimizer was reset at step %d already", done[-1]["reset_optimizer"])
        return False
    update(run, history=[*facts.get("history", []), {"reset_optimizer": step, "optim": settings}])
    return True


def truncate_after(path: Path, step: int) -> None:
    """Drops the lines of a .jsonl that are later than `step`, and a last line that a kill cut short."""
    if processes.is_first() and path.is_file():
        write_whole(path, "".join(f"{line}\n" for line, values in _whole_lines(path) if values["step"] <= step))


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a .jsonl and what it says, up to the first that is none of ours."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.split("\n"):  # not splitlines: texts may hold other line ends
        try:
            values = json.loads(line)
            if not isinstance(values["step"], int):
                return
        except (ValueError, KeyError, TypeError):
            return
        yield line, values


def changed_keys(run: Run, config: Config, allowed_only: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """{key: [old, new]} of what is not as the run has it and may not change by itself; with `allowed_only`, of these keys."""
    old, new = (_flat(to_tree(c)) for c in (load(run.config), config))
    changed = {key: [old.get(key), new.get(key)] for key in sorted({*old, *new}) if old.get(key) != new.get(key)}
    if allowed_only is not None:
        return {key: both for key, both in changed.items() if any(_covers(wanted, key) for wanted in allowed_only)}
    return {key: both for key, both in changed.items() if not key.startswith(RESUMABLE)}


def _compare(run: Run, facts: dict[str, Any], name: str, value: str, replaced: bool) -> None:
    known = facts["fingerprints"].setdefault(name, value)
    if known == value:
        return
    if not replaced:
        fix = "restore it, set another run_dir, or go on all the same with --allow-change"
        raise DataError(f"the {name} changed since this run began", str(run.folder), f"{fix} {name}")
    log.warning("warning: the %s changed since this run began, which --allow-change allows", name)
    facts["fingerprints"][name] = value


def _write_facts(run: Run, facts: Mapping[str, Any]) -> None:
    if processes.is_first():
        write_whole(run.facts, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def _refuse_changes(run: Run, config: Config, allowed: Sequence[str]) -> None:
    changed = {
        key: both for key, both in changed_keys(run, config).items() if not any(_covers(wanted, key) for wanted in allowed)
    }
    if changed:
        shown = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in list(changed.items())[:10])
        more = f" and {len(changed) - 10} more" if len(changed) > 10 else ""
        fix = f"change them back, set another run_dir, or go on all the same with --allow-change {next(iter(changed))}"
        raise ConfigError(f"this run began with other settings, {shown}{more}", str(run.folder), fix)


def _refuse_unknown(keys: Sequence[str]) -> None:
    known = [name.replace("[]", "") for name, _, _ in documentation()]
    for key in keys:
        if not any(_covers(key, name) or _covers(name, key) for name in known):
            raise ConfigError(f"there is no key {key!r}", "--allow-change", "`maxi config --help` lists every key")


def _covers(wanted: str, key: str) -> bool:
    """Whether a key is the wanted one or inside the wanted section."""
    return key == wanted or key.startswith(f"{wanted}.")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value for name, node in tree.items() for key, value in _flat(node, f"{prefix}.{name}" if prefix else name).items()
    }
