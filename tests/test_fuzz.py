"""Random, damaged and ill-meant inputs (`fuzzing.py`) in one process of their own: never a traceback, never a hang, never much
memory; and what searches with other seeds have found, one by one.

`python -m tests.fuzzing --random 7 --examples 5000 rows` searches on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maxi.errors import ConfigError
from tests import fuzzing


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """What came of each target."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "RUST_BACKTRACE": "0", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    env["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing"], cwd=root, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {found["target"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("target", fuzzing.EXAMPLES)
def test_no_input_hangs_swells_or_surprises(target: str, outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes[target]
    assert found["fault"] is None, found["fault"]
    assert found["grown"] < fuzzing.MEMORY
    assert found["inputs"] > 0.5 * fuzzing.EXAMPLES[target]  # hypothesis may run out of different ones


def test_a_hang_a_surprise_and_a_wrong_line_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs() -> None:
        while True:
            pass

    def surprises() -> None:
        raise KeyError

    def wrong() -> None:
        raise ConfigError("what")

    monkeypatch.setattr(fuzzing, "SECONDS", 0.05)
    with pytest.raises(fuzzing.Hang), fuzzing.bounded(0.05):
        hangs()
    for read, kind in ((surprises, KeyError), (wrong, AssertionError)):
        with pytest.raises(kind):
            fuzzing.accepted_or_refused(read, 3)
    fuzzing.accepted_or_refused(wrong, 2)
