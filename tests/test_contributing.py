"""CONTRIBUTING.md holds: its recipes run as they stand and leave nothing behind, the tests and files it names exist."""

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from maxi import models, objectives
from maxi.data import formats
from maxi.kernels import attention

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
RECIPES = dict(re.findall(r"^### (Add .*?)\n(.*?)(?=^### |\Z)", TEXT, re.DOTALL | re.MULTILINE))
ADDED = "added to "


def blocks(recipe: str) -> list[tuple[str, str]]:
    """(what its first line says, code) of each block of Python."""
    found = re.findall(r"^```python\n# ([^\n]+)\n(.*?)^```$", RECIPES[recipe], re.DOTALL | re.MULTILINE)
    assert len(found) == RECIPES[recipe].count("```python") == 2, "a file and its tests"
    return found


def run(place: str, code: str) -> ModuleType:
    """The module that `place` names, with the code run in it; a new one is put into sys.modules."""
    name = place.removeprefix(ADDED).removesuffix(".py").replace("/", ".")
    if place.startswith(ADDED):
        module = importlib.import_module(name)
    else:
        assert not (ROOT / place).exists(), f"{place} is there already"
        module = sys.modules[name] = ModuleType(name)
        parent, _, own = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], own, module)
    exec(compile(code, place, "exec"), module.__dict__)
    return module


@contextmanager
def nothing_stays(places: list[str]) -> Iterator[None]:
    """Removes the modules of `places`, and from modules that were there before what was added."""
    names = [place.removeprefix(ADDED).removesuffix(".py").replace("/", ".") for place in places]
    homes = {name.rpartition(".")[0] for name in names} | set(names)
    before = {home: dict(vars(sys.modules[home])) for home in homes if home in sys.modules}
    known = set(sys.modules)
    try:
        yield
    finally:
        for name in names:
            if name not in known:
                sys.modules.pop(name, None)
        for home, contents in before.items():
            for added in set(vars(sys.modules[home])) - set(contents):
                delattr(sys.modules[home], added)


def _is_test_of(module: ModuleType, function: Any) -> bool:
    return function.__name__.startswith("test_") and function.__module__ == module.__name__


def registries() -> list[Any]:
    return [dict(models.FAMILIES), dict(objectives.OBJECTIVES), attention.BACKENDS, dict(formats.READERS)]


def test_there_are_four() -> None:
    assert list(RECIPES) == ["Add a model family", "Add an objective", "Add a kernel backend", "Add a data source"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs(recipe: str, tmp_path: Path) -> None:
    importlib.import_module("tests.models.test_parity")  # packages of tests that recipes add to
    importlib.import_module("tests.kernels.test_attention")
    before = registries()
    places = blocks(recipe)
    with nothing_stays([place for place, _ in places]):
        last = [run(place, code) for place, code in places][-1]
        tests = [test for test in vars(last).values() if inspect.isfunction(test) and _is_test_of(last, test)]
        assert tests
        for number, test in enumerate(tests):
            folder = tmp_path / str(number)
            for part in ("", "logits", "export"):
                (folder / part).mkdir()
            test(*([folder] if "tmp_path" in inspect.signature(test).parameters else []))
    assert registries() == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_formatted_and_linted(recipe: str, tmp_path: Path) -> None:
    files = []
    for number, (place, code) in enumerate(blocks(recipe)):
        if place.startswith(ADDED):
            code = (ROOT / place.removeprefix(ADDED)).read_text("utf-8") + "\n\n" + code
        files.append(tmp_path / f"block_{number}.py")
        files[-1].write_text(code, "utf-8")
    for command in (["format", "--check"], ["check"]):
        ours = 'lint.isort.known-first-party = ["maxi", "tests"]'  # the new file is not there to be found
        words = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), "--config", ours]
        done = subprocess.run([*words, *map(str, files)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_tests_of_the_laws_exist() -> None:
    laws = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", TEXT)
    assert len(laws) > 15
    for path, name in laws:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.MULTILINE), f"{path}::{name}"


def test_the_files_it_names_exist() -> None:
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"`((?:maxi|tests)/[^`:]*|pyproject\.toml)", prose)
    assert len(named) > 20
    for path in named:
        assert (ROOT / path).exists(), path
