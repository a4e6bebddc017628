"""How jax is set up in this process: compiled programs are kept on disk, so that a second start takes seconds, and on
a CPU memory is kept between steps."""

import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("maxi")

ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")
"""What the devices of TPUs and GPUs are called in /dev."""

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's mallopt, from its malloc.h."""


LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""How libtpu is to behave where there is no TPU: not to ask a cloud's metadata server about one, nor to complain."""


def has_tpu() -> bool:
    """Whether /dev has one."""
    return any(any(Path("/dev").glob(name)) for name in ACCELERATORS[:2])


def expect_no_tpu() -> None:
    """Where /dev has no TPU, keeps an installed libtpu (it compiles for TPUs elsewhere) from looking for one for a minute
    whenever jax starts. What the environment says goes first."""
    if not has_tpu():
        for name, value in LIBTPU.items():
            os.environ.setdefault(name, value)


def set_up(programs: Path | None = None) -> None:
    """Both of what this module does; to be called before jax has looked for devices. `programs`: where to keep them, if
    nobody said where."""
    keep_memory()
    keep_compiled_programs(programs)


def keep_memory() -> None:
    """On a machine without accelerators, glibc keeps freed memory for the next step instead of giving it back.

    XLA:CPU asks for all of a step's memory at its beginning and frees it at its end. By default that is a new mapping
    every time, whose pages the kernel clears one by one: 170,000 page faults and a sixth of the time of a step of a
    26 M model. Threads that run already keep a heap of their own, for which this would come too late.
    """
    if not sys.platform.startswith("linux") or not _is_cpu_only():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def _is_cpu_only() -> bool:
    import jax

    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    return platforms == "cpu" if platforms else not any(any(Path("/dev").glob(name)) for name in ACCELERATORS)


def keep_compiled_programs(folder: Path | None = None) -> None:
    """Uses the folder that jax was told (JAX_COMPILATION_CACHE_DIR), else `folder`, else maxi/xla under $XDG_CACHE_HOME or
    ~/.cache.

    All programs are kept, also the many that compile in less than the second from which jax keeps them by itself:
    together they are most of a second start.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        cache = folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maxi" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    log.info("compiled programs: %s", jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]


@contextmanager
def without_cache() -> Iterator[None]:
    """Programs are neither read from jax's cache of compiled ones nor put there."""
    import jax

    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
