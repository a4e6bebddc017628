"""The platform that programs are being traced for: what a kernel's `why_not` goes by, and whether kernels are interpreted.

That is what the mesh in scope is made of, or else jax's default backend, unless programs for another are compiled on this
machine (`jax.experimental.topologies`, `jax.export`) or kernels made for an accelerator run here, in Pallas' interpreter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

_TARGET: ContextVar[str | None] = ContextVar("target", default=None)
_INTERPRET: ContextVar[Any] = ContextVar("interpret", default=False)


def device() -> Any:
    """What kind of device the mesh in scope is made of (`device_kind`, `num_cores`, `platform`); None where none says so."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def platform() -> str:
    """cpu, gpu or tpu."""
    return _TARGET.get() or getattr(device(), "platform", None) or jax.default_backend()


def interpret() -> Any:
    """What kernels give `pallas_call` as `interpret`: False, True, or a platform's own interpreter parameters."""
    return _INTERPRET.get()


def runs_on(target: str) -> bool:
    """Whether a kernel made for `target` can run in what is being traced: there, or interpreted anywhere."""
    return bool(interpret()) or platform() == target


@contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """What is traced in here is for `target` (cpu, gpu, tpu), whatever devices this process has."""
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)


@contextmanager
def interpreting(how: Any = True) -> Iterator[None]:
    """Pallas kernels that are traced in here run interpreted, on whatever platform: slow, for tests of their numbers."""
    token = _INTERPRET.set(how)
    try:
        yield
    finally:
        _INTERPRET.reset(token)
