"""Several processes in one run: how they find each other, what they tell each other, and what the loss of one does.

Every process computes the same and sees the same run folder; the first (number 0) alone writes records, models and
reports. Which process this is the environment says:

    JAX_COORDINATOR_ADDRESS=host:port  JAX_NUM_PROCESSES=N  JAX_PROCESS_ID=i     said by whoever starts them; goes first
    SLURM, Open MPI                                                              a step of more than one task
    TPU VMs                                                                      jax asks the cloud, all slices included

Without any of them there is one process, for which everything here does nothing. What is exchanged here is small and
goes through jax's coordination service, which process 0 runs; arrays are jax's own matter.

A process that is lost takes the others with it: jax ends a process as soon as it hears of the loss, through a dropped
connection or the silence of `heartbeat_s`, by `abort`; here that becomes exit code 75, so that whoever started them
starts them again. What libraries write to the terminal by themselves on the way goes to a file in the run folder.
"""

import ctypes
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from maxi.errors import ConfigError, EnvironmentFault, MaxiError, ProcessLost, first_line
from maxi.runtime import has_tpu

log = logging.getLogger("maxi")

ADDRESS, NUMBER, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

PATIENCE_MS = 7 * 86_400_000
"""How long to wait for a process that is alive: what it does may take days (making rows of a large corpus)."""

_FATAL = b"JAX distributed service detected fatal errors"
"""What jax says before it aborts because of another process (xla/pjrt/distributed/client.h)."""
_LOST = ("gloo", "nccl", "coordination", "barrier", "heartbeat", "connection", "unavailable", "deadline_exceeded")
"""Words of the errors that operations between processes end with when one of them is gone."""

_exchanges = 0
_terminal: dict[str, Any] = {}


def start(folder: Path, start_timeout_s: int, heartbeat_s: int) -> None:
    """Joins the other processes of the run, if there are any; to be called before jax has looked for devices.

    `folder` is the run folder. Raises ConfigError for an environment that says half of what it should, EnvironmentFault
    when the others have not come after `start_timeout_s` seconds.
    """
    who = _who()
    if who is None or count() > 1:
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax's would take SIGTERM from us, and stop only those who ask it
    jax.config.update("jax_enable_preemption_service", False)
    late = EnvironmentFault(
        f"the other processes did not come within {start_timeout_s} s", "processes.start_timeout_s", "see that all of them run"
    )
    if who:
        _take_over(folder / "processes", late)
    try:
        jax.distributed.initialize(**who, initialization_timeout=start_timeout_s, heartbeat_timeout_seconds=heartbeat_s)
    except ValueError as error:
        if not who:  # a TPU, but nobody to ask: it stands alone
            return
        raise EnvironmentFault(f"cannot join the other processes, {first_line(error)}", ADDRESS, "check it") from None
    except RuntimeError as error:
        log.debug("%s", error)
        raise late from None
    if count() > 1:
        if not who:
            _take_over(folder / "processes", late)
        _joined()
        if not is_first():
            log.setLevel(logging.ERROR)  # it would say what the first says
        log.info("processes: %d, heartbeat %d s", count(), heartbeat_s)


def expected() -> bool:
    """Whether the environment speaks of several processes. Raises ConfigError as `start` does."""
    return bool(_who())


def _who() -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; empty: jax is to find them; None: this process is alone."""
    given = {name: os.environ[name] for name in (ADDRESS, NUMBER, ID) if os.environ.get(name)}
    if NUMBER in given or ID in given:
        try:
            number, own = int(given[NUMBER]), int(given.get(ID, 0 if given[NUMBER] == "1" else ""))
        except (KeyError, ValueError):
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ConfigError(f"the environment names no process ({said})", NUMBER, f"set {ADDRESS}, {NUMBER}, {ID}") from None
        if number == 1:
            return None
        if not 0 <= own < number or ":" not in given.get(ADDRESS, ""):
            what = f"process {own} of {number} at {given.get(ADDRESS, 'no address')} cannot be"
            raise ConfigError(what, ID, f"{ID} counts from 0, {ADDRESS} is host:port")
        return {"coordinator_address": given[ADDRESS], "num_processes": number, "process_id": own, "local_device_ids": []}
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        # jax gives a task one GPU, which is wrong where a node has one task
        alone = os.environ.get("SLURM_NTASKS") == os.environ.get("SLURM_STEP_NUM_NODES")
        return {"cluster_detection_method": "slurm", **({"local_device_ids": []} if alone else {})}
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return {"cluster_detection_method": "ompi"}
    return {} if has_tpu() and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu") else None


def _state() -> Any:
    from jax._src.distributed import global_state  # what Orbax uses too: jax shows the client nowhere else

    return global_state


def count() -> int:
    """Number of processes."""
    return _state().num_processes if "jax" in sys.modules else 1


def index() -> int:
    """The number of this one, from 0."""
    return _state().process_id if "jax" in sys.modules else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return index() == 0


def exchange(value: Any) -> list[Any]:
    """What every process gave, in their order; all must call this, at the same place. JSON, and little of it."""
    global _exchanges
    if count() == 1:
        return [value]
    _exchanges += 1
    name = f"maxi/{_exchanges}"
    client = _state().client
    client.key_value_set(f"{name}/{index():06d}", json.dumps(value))
    client.wait_at_barrier(name, PATIENCE_MS)
    found = sorted(client.key_value_dir_get(f"{name}/"))
    client.wait_at_barrier(f"{name}/read", PATIENCE_MS)
    if is_first():
        client.key_value_delete(f"{name}/")
    return [json.loads(text) for _, text in found]


def latest(value: list[float]) -> list[list[float]]:
    """What every process said last, without waiting for any; 0 where one has said nothing yet. Any may call it at any time."""
    if count() == 1:
        return [value]
    client = _state().client
    client.key_value_set(f"maxi/latest/{index()}", json.dumps(value), allow_overwrite=True)
    said = {name.rpartition("/")[2]: json.loads(text) for name, text in client.key_value_dir_get("maxi/latest/")}
    return [said.get(str(number), [0.0] * len(value)) for number in range(count())]


def barrier() -> None:
    """Returns when all processes are here."""
    exchange(None)


def require_same(**values: Any) -> None:
    """Raises ConfigError in every process if one has another value of that name than the first."""
    for other, theirs in enumerate(everyone := exchange(values)):
        for name, value in theirs.items():
            if value != everyone[0][name]:
                what = f"process {other} has another {name} than process 0"
                raise ConfigError(what, name, "give all processes the same files, versions and command")


def require_shared(folder: Path) -> None:
    """Raises ConfigError in every process unless all see the same `folder`."""
    if count() == 1:
        return
    token = folder / f".shared-{exchange(os.urandom(8).hex())[0]}"
    if is_first():
        token.touch()
    barrier()
    try:
        os.listdir(folder)  # noqa: PTH208  (has a network file system look again)
        blind = [number for number, sees in enumerate(exchange(token.exists())) if not sees]
    finally:
        if is_first():
            token.unlink(missing_ok=True)
    if blind:
        what = f"process {blind[0]} does not see the run folder of process 0"
        raise ConfigError(what, str(folder), "set run_dir to a folder on a file system that all share")


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """What is made in `folder` is made once: of the processes that see the same one, the first goes ahead, and the others
    follow when it is through. Where every host has its own, each host makes its own, all at the same time."""
    if count() == 1:
        yield
        return
    token = exchange(os.urandom(8).hex())[0]
    mark = folder / f".here-{token}-{index()}"
    with suppress(OSError):  # whoever makes something there will say what is wrong
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    barrier()
    ahead = min((int(other.name.rpartition("-")[2]) for other in folder.glob(f".here-{token}-*")), default=index())
    barrier()
    mark.unlink(missing_ok=True)
    if ahead != index():
        barrier()
    yield
    if ahead == index():
        barrier()


class Vote:
    """Whether any process asks for something, known to all of them at the same step, without waiting for it."""

    def __init__(self, mesh: Any):
        self._mesh, self._asked, self._any = mesh, None, None

    def any(self, asked: bool) -> bool:
        """Takes part in this step's vote and gives the outcome of the last one (alone: of this one)."""
        if count() == 1:
            return asked
        import jax
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        if self._any is None:
            self._any = jax.jit(lambda asked: asked.max(), out_shardings=NamedSharding(self._mesh, PartitionSpec()))
        each = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        own = jax.make_array_from_callback((self._mesh.size,), each, lambda _: np.array([asked], np.int32))
        before, self._asked = self._asked, self._any(own)
        return before is not None and bool(before)


@contextmanager
def together() -> Iterator[None]:
    """Names the errors that mean nothing but that another process is gone. Raises ProcessLost for those."""
    try:
        yield
    except MaxiError:
        raise
    except Exception as error:
        if count() > 1 and any(word in str(error).lower() for word in _LOST):
            raise _lost() from error
        raise


def leave(code: int) -> None:
    """Ends this process at once if it is one of several: at a normal end it would wait for the others, which wait for it."""
    if count() > 1:
        _exit(code)


def _lost() -> ProcessLost:
    where = f"process {index()} of {count()}"
    return ProcessLost("another process of this run is gone", where, "run the same command on all to go on")


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _take_over(folder: Path, late: MaxiError) -> None:
    """Has libraries write into a file of `folder` instead of the terminal, and turns jax's abort for a lost process into an
    error line and code: `late` until all have joined, then ProcessLost."""
    file = folder / f"{socket.gethostname()}-{os.getpid()}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND, 0o644)
    except OSError:  # the run folder will be asked for again, and refused
        return
    before = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}
    for number, name in ((1, "stdout"), (2, "stderr")):
        getattr(sys, name).flush()
        stream = os.fdopen(os.dup(number), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        os.dup2(handle, number)
        setattr(sys, name, stream)
    for handler in log.handlers:
        if isinstance(handler, logging.StreamHandler) and id(handler.stream) in before:
            handler.setStream(getattr(sys, before[id(handler.stream)]))
    os.close(handle)

    # Python's own handlers run between bytecodes of the main thread, which an abort never returns to
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)
    _terminal.update(file=file, fault=late, handler=handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _joined() -> None:
    """The file gets the number of this process, and from now on an abort means something else."""
    if "file" in _terminal:
        _terminal["file"] = _terminal["file"].rename(_terminal["file"].with_name(f"{index()}.log"))
        _terminal["fault"] = _lost()


def _aborted(_: int) -> None:
    """What SIGABRT does: the error line if another process is why, else all that was said; then the abort goes on."""
    said = _terminal["file"].read_bytes()[-20_000:]
    if _FATAL not in said:
        print(said.decode(errors="replace"), file=sys.stderr)
        return
    print(_terminal["fault"].line(), file=sys.stderr)
    _exit(_terminal["fault"].code)
