"""Texts to ids on all cores, in order.

The first IN_PROCESS bytes are encoded here, so that a small input never pays for starting processes; only what is left
after that goes to workers. Results come back in the order of the texts, whatever the number of workers. Workers ignore
SIGINT and SIGTERM, which are the parent's to handle, and end when the parent is gone.
"""

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from maxi.data.tokenizer import Tokenizer
from maxi.data.tokenizer import encode as encode_texts
from maxi.errors import EnvironmentFault

IN_PROCESS = 4 << 20
BATCH = 1 << 18
"""Characters that are handed to a worker at once."""

HUNG = 600.0
"""Seconds without an answer after which a worker counts as dead."""
RESTARTS = 1
"""How often the workers are started again when one of them dies. Their texts are still here, so nothing is lost."""

log = logging.getLogger("maxi")

Encoded = tuple[np.ndarray, np.ndarray]

_backend: Any = None


def encode(texts: Iterable[str], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Yields (ids int32 [n], lengths int64 [texts]) for one stretch of `texts` after the other.

    workers: processes; 0 for one per core. Raises EnvironmentFault when one of them is killed, or hangs, a second time.
    """
    batches = _batched(texts)
    for batch in _first(batches):
        yield _join(tokenizer.backend, batch)
    rest = next(batches, None)
    if rest is None:
        return
    batches = itertools.chain([rest], batches)
    workers = workers or cores()
    if workers == 1:
        yield from (_join(tokenizer.backend, batch) for batch in batches)
        return
    yield from _in_parallel(batches, tokenizer.backend.to_str(), workers)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_parallel(batches: Iterable[list[str]], backend: str, workers: int) -> Iterator[Encoded]:
    pool = _pool(backend, workers)
    waiting: deque[tuple[list[str], Future[Encoded]]] = deque()
    died = 0
    try:
        for batch in itertools.chain(batches, [None]):
            if batch is not None:
                waiting.append((batch, _submit(pool, batch)))
            while waiting and (batch is None or len(waiting) > 2 * workers):
                try:
                    found = waiting[0][1].result(HUNG)
                except (BrokenProcessPool, TimeoutError) as error:
                    died += 1
                    if died > RESTARTS:
                        raise _gave_up(error, workers) from None
                    log.warning("warning: a tokenising process %s; all are started again", _how(error))
                    _abandon(pool)
                    pool = _pool(backend, workers)
                    waiting = deque((texts, _submit(pool, texts)) for texts, _ in waiting)
                    continue
                waiting.popleft()
                yield found
    finally:
        _abandon(pool)


def _pool(backend: str, workers: int) -> ProcessPoolExecutor:
    # spawn: this process runs threads (the tokenizer's own, maybe a device runtime's), which a fork would freeze
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (backend,))


def _submit(pool: ProcessPoolExecutor, batch: list[str]) -> Future[Encoded]:
    try:
        return pool.submit(_work, batch)
    except BrokenProcessPool as error:  # it broke meanwhile: whoever asks for the result is told
        failed: Future[Encoded] = Future()
        failed.set_exception(error)
        return failed


def _abandon(pool: ProcessPoolExecutor) -> None:
    """Ends a pool, even one whose processes hang."""
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(cancel_futures=True)


def _how(error: BaseException) -> str:
    return "died, often for lack of memory" if isinstance(error, BrokenProcessPool) else f"gave no answer for {HUNG:g} s"


def _gave_up(error: BaseException, workers: int) -> EnvironmentFault:
    fix = "lower data.workers; if a script of yours starts the run, guard it with if __name__ == '__main__'"
    return EnvironmentFault(f"a tokenising process {_how(error)}", f"{workers} workers", fix)


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _first(batches: Iterator[list[str]]) -> Iterator[list[str]]:
    size = 0
    while size < IN_PROCESS and (batch := next(batches, None)) is not None:
        size += sum(map(len, batch))
        yield batch


def _join(backend: Any, texts: list[str]) -> Encoded:
    found = encode_texts(backend, texts)
    lengths = np.fromiter(map(len, found), np.int64, len(found))
    return np.fromiter(itertools.chain.from_iterable(found), np.int32, int(lengths.sum())), lengths


def _start(backend: str) -> None:
    global _backend
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    from tokenizers import Tokenizer as Backend

    _backend = Backend.from_str(backend)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(texts: list[str]) -> Encoded:
    return _join(_backend, texts)
