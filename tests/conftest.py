"""Eight CPU devices for every test, set before jax starts; long files first; maxi's log as it is at a start."""

import logging
import os

import pytest

# Tiny programs: compiling is all the time there is, so it is done quickly rather than well.
FLAGS = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ["HF_HUB_OFFLINE"] = "1"

LONG = ("train", "stages", "step", "processes", "resume", "pairs", "layouts", "attention", "launch", "fuzz", "trainers")
"""Of the files named test_..., those that take longest, in order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker takes whole files: the long ones first, or one worker ends alone with them."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True)
def log_as_at_the_start() -> None:
    """The command line takes maxi's log for itself, and tests call it in this process."""
    log = logging.getLogger("maxi")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)
