"""Numbers as TensorBoard events. They are a copy of metrics.jsonl and perf.jsonl, so a disk that is full costs only them."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class EventFiles:
    """Writes event files into `folder`. `start` is the step that a run goes on from: what an interrupted run wrote beyond it
    is hidden.

    tensorboardX's own writer has a thread that a full disk ends and a queue that then blocks for ever, so only its format
    is taken from it.
    """

    def __init__(self, folder: Path, start: int):
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self._event_pb2: Any = event_pb2
        self._summary_pb2: Any = summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.time_ns()}")
        if start:
            log = self._event_pb2.SessionLog
            self._write(step=start + 1, session_log=log(status=log.START))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One event with all numbers of a step."""
        made = self._summary_pb2.Summary
        numbers = [(name, value) for name, value in values.items() if isinstance(value, int | float)]
        self._write(step=step, summary=made(value=[made.Value(tag=name, simple_value=value) for name, value in numbers]))

    def close(self) -> None:
        with suppress(OSError):
            self._writer.close()

    def _write(self, **fields: Any) -> None:
        with suppress(OSError):
            self._writer.write_event(self._event_pb2.Event(wall_time=time.time(), **fields))
            self._writer.flush()


@contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX imports torch where it finds it, which takes 2 s, and does as well without."""
    here = "torch" in sys.modules
    if not here:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not here:
            del sys.modules["torch"]
