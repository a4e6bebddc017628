"""What a run writes down: metrics.jsonl, perf.jsonl, samples.jsonl, TensorBoard, trackers, and the terminal.

metrics.jsonl and samples.jsonl hold only what the computation decides, so an interrupted run ends with the same bytes;
times go to perf.jsonl. Steps may be recorded before the device has finished them: values are read one step late, which
keeps it busy.
"""

import importlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from maxi import faults, processes
from maxi.errors import EnvironmentFault, NumericsError
from maxi.events import Events
from maxi.lines import Lines
from maxi.sections import LogConfig

GIVE_UP_AFTER = 5
"""Consecutive steps without a finite loss and gradient after which a run ends."""

Values = Mapping[str, Any]


class Recorder:
    """Writes the records of one run, from step `start` to `total`.

    `tokens_per_s -> MFU` is `mfu`, or None where the device's peak is not known. `memory` gives bytes. `watch` sees the
    metrics of every step and gives the warnings to show. `events` keeps account of the time. Of several processes only
    the first writes anything.
    """

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        run_config: Values,
        start: int,
        total: int,
        mfu: Callable[[float], float] | None,
        memory: Callable[[], float],
        watch: Callable[[Values], list[str]] = lambda _: [],
        events: Events | None = None,
    ):
        self._events = events or Events(None, config.every)
        self._every, self._total, self._mfu, self._memory, self._watch = config.every, total, mfu, memory, watch
        writes = processes.is_first()
        places = {name: folder / f"{name}.jsonl" if writes else Path(os.devnull) for name in ("metrics", "perf", "samples")}
        self._files = {name: Lines(path) for name, path in places.items()}
        self._pending: tuple[int, Values, float] | None = None
        self._first, self._skipped, self._skipped_in_all, self._window = True, 0, 0, _Window()
        self._trackers = [_tracker(name, config.project, folder, run_config) for name in config.to if writes]
        self._trackers += [_tensorboard(folder / "tensorboard", start)] if writes else []
        self._screen = _Screen(start, total, silent=not writes)
        self.tokens_per_s: list[float] = []

    def begin(self) -> None:
        """Steps come next, and the first of them compiles."""
        self._events.stepping()

    def step(self, step: int, metrics: Values, data_wait: float) -> None:
        """Takes the metrics of step `step` (device scalars); writes those of the step before.

        Raises NumericsError after GIVE_UP_AFTER skipped steps in a row.
        """
        self.drain()
        self._pending = step, metrics, data_wait
        self._events.stepped(step, data_wait)

    def drain(self) -> None:
        """Waits for the pending step and writes it."""
        if self._pending is None:
            return
        step, values, data_wait = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in values.items()}
        if self._first:  # it compiled, which is no measure of speed
            self._first, self._window = False, _Window()
        else:
            self._window.add(metrics["train/tokens"], data_wait)
        self._count_skipped(step, metrics)
        if step % self._every == 0 or step == self._total:
            perf = self._window.rates()
            self._window = _Window()
            self.tokens_per_s.append(perf["perf/tokens_per_s"])
            if self._mfu:
                perf["perf/mfu"] = self._mfu(perf["perf/tokens_per_s"])
            perf["perf/memory_gib"] = self._memory() / 2**30
            self._write("metrics", step, metrics)
            self._write("perf", step, perf)
            self._track(step, {**metrics, **perf})
            self._screen.line(step, {**metrics, **perf})
        for line in self._watch(metrics):
            self.say(f"warning at step {step}: {line}")
        self._screen.advance(step)

    def _count_skipped(self, step: int, metrics: Values) -> None:
        if not metrics["train/skipped"]:
            self._skipped = 0
            return
        self._skipped, self._skipped_in_all = self._skipped + 1, self._skipped_in_all + 1
        spike = metrics.get("train/spike")
        why = f"its loss {metrics['train/loss']:.4g} is a spike" if spike else "its loss or gradient is not finite"
        self.say(
            f"warning: step {step} changed nothing, {why} ({self._skipped} in a row, {self._skipped_in_all} since the start)"
        )
        if self._skipped >= GIVE_UP_AFTER:
            self.flush()
            raise NumericsError(
                f"{'the loss was a spike' if spike else 'loss or gradient was not finite'} {GIVE_UP_AFTER} times in a row",
                f"step {step}",
                "go back with --rewind R:S, lower optim.lr with --allow-change optim.lr, or look at the data of these steps",
            )

    @contextmanager
    def paused(self, what: str, step: int) -> Iterator[None]:
        """Time spent inside (on an evaluation, a checkpoint) is left out of tokens per second."""
        self.drain()
        begin = time.monotonic()
        with self._events.phase(what, step=step):
            yield
        self._window.begin += time.monotonic() - begin

    def evaluation(self, step: int, values: Values, samples: list[dict[str, Any]]) -> None:
        """Writes an evaluation and the generations shown with it (prompt, text and what else is known of each)."""
        self.drain()
        metrics = {f"eval/{name}": value for name, value in values.items() if value is not None}
        if not metrics and not samples:
            return
        self._write("metrics", step, metrics)
        self._track(step, metrics)
        self.say("  ".join([f"eval at step {step}", *(f"{k.removeprefix('eval/')} {v:.4g}" for k, v in metrics.items())]))
        for sample in samples:
            self._write("samples", step, sample)
            self.say(f"  {sample['prompt']!r} -> {sample['text']!r}{'' if sample['stopped'] else ' ...'}")

    def say(self, line: str) -> None:
        self._screen.say(line)

    def flush(self) -> None:
        """All that was recorded is in the files; called before a checkpoint says that these steps are done.

        Raises OSError when it cannot be written; it is kept then, and written as soon as that is possible.
        """
        self.drain()
        faults.at("records.flush")
        for file in self._files.values():
            file.flush()
        faults.at("records.flushed")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.close()
        for tracker in self._trackers:
            tracker(None, {})
        for file in self._files.values():
            file.close()

    def _write(self, name: str, step: int, values: Values) -> None:
        self._files[name].add(json.dumps({"step": step, **_finite(values)}, ensure_ascii=False))

    def _track(self, step: int, values: Values) -> None:
        for tracker in self._trackers:
            tracker(step, values)


def plain(metrics: Values) -> dict[str, Any]:
    """Metrics of a step (device scalars) as metrics.jsonl has them."""
    return _finite({name: float(value) for name, value in metrics.items()})


def _finite(values: Values) -> dict[str, Any]:
    """JSON knows neither NaN nor infinity."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class _Window:
    """Time and tokens since the last logged step."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self._steps, self._tokens, self._wait = 0, 0.0, 0.0

    def add(self, tokens: float, data_wait: float) -> None:
        self._steps, self._tokens, self._wait = self._steps + 1, self._tokens + tokens, self._wait + data_wait

    def rates(self) -> dict[str, float]:
        seconds, steps = max(time.monotonic() - self.begin, 1e-9), max(self._steps, 1)
        return {
            "perf/tokens_per_s": self._tokens / seconds,
            "perf/step_s": seconds / steps,
            "perf/data_wait_s": self._wait / steps,
        }


class _Screen:
    """A progress bar with the time left on a terminal, plain lines elsewhere."""

    def __init__(self, start: int, total: int, silent: bool):
        self._console = Console(highlight=False, markup=False, soft_wrap=True, quiet=silent)
        self._begin, self._start, self._total = time.monotonic(), start, total
        self._bar: Progress | None = None
        if self._console.is_terminal and not silent:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeRemainingColumn(compact=True),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=total, completed=start, text="")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def line(self, step: int, values: Values) -> None:
        mfu = f"  mfu {values['perf/mfu']:.1%}" if "perf/mfu" in values else ""
        text = (
            f"loss {values['train/loss']:.4f}  lr {values['optim/lr']:.2e}  grad {values['optim/grad_norm']:.2f}  "
            f"{values['perf/tokens_per_s']:,.0f} tokens/s{mfu}"
        )
        if self._bar:
            self._bar.update(self._task, text=text)
            return
        left = (time.monotonic() - self._begin) / max(step - self._start, 1) * (self._total - step)
        self.say(f"step {step}/{self._total}  {text}  {left // 60:.0f}:{left % 60:02.0f} left")

    def say(self, line: str) -> None:
        try:
            self._console.print(line)
        except BrokenPipeError:
            raise
        except OSError:
            return  # what is printed goes to a file on a full disk: no reason to end a run

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


Tracker = Callable[[int | None, Values], None]
"""Takes the values of a step; a step of None means that the run is over."""


def _tensorboard(folder: Path, start: int) -> Tracker:
    from maxi.tensorboard import EventFiles

    files = EventFiles(folder, start)

    def track(step: int | None, values: Values) -> None:
        if step is None:
            files.close()
        else:
            files.write(step, values)

    return track


def _tracker(name: str, project: str, folder: Path, run_config: Values) -> Tracker:
    """Weights & Biases or Trackio, which share an interface. Raises EnvironmentFault when it is not installed."""
    try:
        library = importlib.import_module(name)
    except ImportError:
        raise EnvironmentFault(f"{name} is not installed", "log.to", f'pip install "maxi[{name}]"') from None
    library.init(project=project, name=folder.name, config=dict(run_config))

    def track(step: int | None, values: Values) -> None:
        library.log(dict(values), step=step) if step is not None else library.finish()

    return track


def process_memory() -> float:
    """Largest resident memory of this process so far, in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
