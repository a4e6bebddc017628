"""How an operation picks its backend.

`auto` takes the first backend whose `why_not` has nothing to say, and logs the choice with the reasons against those
before it, once per distinct choice. A backend asked for by name that cannot run raises with its reason: there is no
silent fallback.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from maxi.errors import ConfigError

log = logging.getLogger("maxi")


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation. `why_not(...)`, given the call, is None or the reason it cannot run.

    `prepare(...)` makes what is the same for every layer of a step, where there is any such thing.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    prepare: Callable[..., Any] | None = None


def choose(operation: str, wanted: str, backends: Sequence[Backend], *args: Any, **kwargs: Any) -> Backend:
    """The backend for this call. Raises ConfigError when `wanted` is named and unknown or cannot run."""
    reasons: list[str] = []
    for backend in backends:
        if wanted in ("auto", backend.name):
            reason = backend.why_not(*args, **kwargs)
            if reason is None:
                if wanted == "auto":
                    _say_once(operation, backend.name, "; ".join(reasons) or "first choice")
                return backend
            reasons.append(f"not {backend.name}, {reason}")
    known = ", ".join(backend.name for backend in backends)
    raise ConfigError(
        f"{operation} {wanted!r} cannot run: {'; '.join(reasons) or 'unknown'}",
        f"compute.{operation}",
        f"use auto or one of {known}",
    )


@functools.cache
def _say_once(operation: str, name: str, reason: str) -> None:
    log.info("%s: %s (%s)", operation, name, reason)
