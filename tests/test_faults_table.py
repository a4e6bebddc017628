"""FAULTS.md has a row for each of the 82 faults, and every test that it names is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", (ROOT / "tests" / "FAULTS.md").read_text("utf-8"), re.MULTILINE)


@cache
def names_in(path: str) -> frozenset[str]:
    return frozenset(
        node.name for node in ast.parse((ROOT / path).read_text("utf-8")).body if isinstance(node, ast.FunctionDef)
    )


def test_there_is_a_row_for_each_fault() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 83))


@pytest.mark.parametrize(("number", "tests"), [pytest.param(row[0], row[3], id=row[0]) for row in ROWS])
def test_each_row_names_tests_that_exist(number: str, tests: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", tests)
    assert named, f"fault {number} has no test"
    for path, test in named:
        assert test in names_in(path) if test else (ROOT / path).is_file(), (number, path, test)
    assert not re.sub(r"`[^`]*`", "", tests).count("::"), f"fault {number} names a test outside of quotes"


def test_the_readme_links_it() -> None:
    assert "(tests/FAULTS.md)" in (ROOT / "README.md").read_text("utf-8")
