"""The English that every CPython carries: its language reference topics and the docstrings of its standard library.

A corpus for first runs and for tests: megabytes of real prose without a download. Modules are read as source and
parsed with `ast`, never imported and never run. It is not the same text for every Python version, which the cache
knows. Tests, bundled packages and demos are left out, and a docstring that was already shown is not shown again.
"""

import ast
import importlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from maxi.data.records import Document

_SKIPPED = {
    *(
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "turtledemo",
        "site-packages",
        "dist-packages",
        "ensurepip",
        "pydoc_data",
    ),
    *("__pycache__", "_pyrepl", "lib-dynload", "msilib"),
}

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> Iterator[Document]:
    """One document per language topic, then one per module with docstrings, both sorted by name."""
    for name, text in sorted(_topics().items()):
        if text.strip():
            yield Document(f"{name}\n\n{text.strip()}\n", f"python-docs:topic {name}")
    seen: set[str] = set()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts) or parts[0].startswith("config-"):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = _module(name, path, seen)
        if text:
            yield Document(text, f"python-docs:module {name}")


def _topics() -> dict[str, str]:
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except (ImportError, AttributeError, TypeError, ValueError):  # some distributions leave it out
        return {}


def _module(name: str, path: Path, seen: set[str]) -> str:
    """The docstrings of one module as readable text, empty when it has none that is new."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return ""
    parts = [f"{title}\n\n{doc}" for title, doc in _entries(tree, name, "") if doc not in seen and not seen.add(doc)]
    return "\n\n\n".join(parts) + "\n" if parts else ""


def _entries(node: ast.Module | Definition, name: str, prefix: str) -> Iterator[tuple[str, str]]:
    """(title, docstring) of a node and of the classes and functions directly inside modules and classes."""
    doc = ast.get_docstring(node)
    if doc:
        title = f"Module {name}" if isinstance(node, ast.Module) else _title(node, prefix)
        yield title, doc.encode(errors="ignore").decode()  # a docstring may hold the escape of a lone surrogate
    if isinstance(node, ast.Module | ast.ClassDef):
        inner = f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else ""
        for child in node.body:
            if isinstance(child, Definition):
                yield from _entries(child, name, inner)


def _title(node: Definition, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}" + (f"({bases})" if bases else "")
    return f"{prefix}{node.name}({ast.unparse(node.args)})"
