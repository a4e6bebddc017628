"""What a run depends on besides its config and its data: versions of the code and its libraries, and environment variables.

They are written into run.json. A run that goes on with others says so and keeps both; under `compute.deterministic` other
environment variables are refused.
"""

import hashlib
import os
import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from maxi.errors import ConfigError

LIBRARIES = ("maxi", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")

NUMERIC = re.compile(
    r"XLA_FLAGS|LIBTPU_INIT_ARGS|NVIDIA_TF32_OVERRIDE|TF_CUDNN_DETERMINISTIC|"
    r"JAX_(ENABLE_X64|DISABLE_JIT|DEFAULT_MATMUL_PRECISION|DEFAULT_PRNG_IMPL|THREEFRY_PARTITIONABLE|RANDOM_SEED_OFFSET)"
)
"""Names of variables that may change what is computed."""

HARMLESS = re.compile(r"--xla_(force_host_platform_device_count|dump_\w+)(=|$)")
"""Of XLA's flags, those that do not: how many devices there are is the mesh's matter."""

BREAKING = {
    "XLA_FLAGS": re.compile(
        r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)=(false|0)\b|--xla_cpu_enable_fast_math(=(true|1)\b|\s|$)"
    ),
    "TF_CUDNN_DETERMINISTIC": re.compile(r"^(0|false)$"),
    "JAX_DEFAULT_PRNG_IMPL": re.compile(r"rbg"),  # other numbers on other devices and with other versions
    "JAX_DISABLE_JIT": re.compile(r"^(1|true|on)$", re.IGNORECASE),
}
"""Settings under which the same computation need not give the same bits."""


def versions() -> dict[str, str]:
    """Of Python, of the libraries that compute, and a digest of maxi's own code."""
    found = {"python": sys.version.split()[0], "code": _code()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def environment() -> dict[str, str]:
    """The variables that may change what is computed, as they are set."""
    found = {name: value for name, value in sorted(os.environ.items()) if NUMERIC.fullmatch(name)}
    if "XLA_FLAGS" in found:
        flags = sorted(flag for flag in found.pop("XLA_FLAGS").split() if not HARMLESS.match(flag))
        found |= {"XLA_FLAGS": " ".join(flags)} if flags else {}
    return found


def refuse_breaking() -> None:
    """Raises ConfigError for a variable under which a run cannot be reproduced."""
    for name, pattern in BREAKING.items():
        if match := pattern.search(os.environ.get(name, "")):
            what = f"{name} has {match.group().strip()!r}, which compute.deterministic forbids"
            raise ConfigError(what, "environment", f"unset {name}, or set compute.deterministic=false")


def changes(old: dict[str, str], new: dict[str, str]) -> dict[str, list[str]]:
    """{name: [old, new]} of what differs; what is missing is empty."""
    names = sorted({*old, *new})
    return {name: [old.get(name, ""), new.get(name, "")] for name in names if old.get(name, "") != new.get(name, "")}


@cache
def _code() -> str:
    """12 hex digits that change with any module of maxi."""
    home, sha = Path(__file__).parent, hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        sha.update(path.relative_to(home).as_posix().encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]
