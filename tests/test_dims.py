"""The alphabet holds in the source: tensor suffixes, einsum strings and parameter tables use its letters only."""

import ast
import re
from pathlib import Path

import pytest

from maxi.dims import DIMS, MESH_AXES
from maxi.sharding import ACTIVATIONS, WEIGHTS

SOURCE = Path(__file__).parent.parent / "maxi"
SUFFIX = re.compile(r"^[a-z][a-z_0-9]*?_([A-Z]+)$")


def _files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_names_and_einsums_use_the_alphabet(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else None
        if name and (match := SUFFIX.match(name)):
            assert set(match.group(1)) <= set(DIMS), f"{path.name}: {name}"
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "einsum":
            pattern = node.args[0]
            if isinstance(pattern, ast.Constant):
                letters = set(re.sub(r"[^A-Za-z]", "", str(pattern.value)))
                assert letters <= set(DIMS), f"{path.name}: {pattern.value}"


def test_the_check_sees_einsums_and_suffixes() -> None:
    text = "\n".join(path.read_text("utf-8") for path in _files())
    assert len(re.findall(r'einsum\("[A-Z,]+->', text)) > 10
    assert len(re.findall(r"\b[a-z]+_BT[A-Z]*\b", text)) > 50


def test_shardings_map_letters_to_mesh_axes() -> None:
    for rules in (WEIGHTS, ACTIVATIONS):
        assert set(rules) <= set(DIMS)
        for axes in rules.values():
            assert set([axes] if isinstance(axes, str) else axes) <= set(MESH_AXES)
