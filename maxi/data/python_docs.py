"""The English that every CPython carries: its language reference topics and the docstrings of its standard library.

A corpus for first runs and for tests: megabytes of real prose without a download. The same docstrings are questions with
answers (what is this for?), and pairs of a right and a wrong answer. Modules are read as source and parsed with `ast`,
never imported and never run. It is not the same text for every Python version, which the cache knows. Tests, bundled
packages and demos are left out, and a docstring that was already shown is not shown again.
"""

import ast
import hashlib
import importlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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

_ASKED = {
    "module": (
        "What is the module `{}` for?",
        "What does the Python module `{}` offer?",
        "Describe the module `{}`.",
        "I found `import {}` in a program. What is that module?",
    ),
    "class": (
        "What is the class `{}`?",
        "What is `{}` for?",
        "Describe the class `{}`.",
        "What does an instance of `{}` stand for?",
    ),
    "function": (
        "What does `{}` do?",
        "What happens when I call `{}`?",
        "Explain `{}`.",
        "Tell me what `{}` does.",
    ),
}
_SHORTEST, _LONGEST = 20, 400
"""Characters of an answer: less says nothing, more is a manual."""

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Record = tuple[dict[str, str], str]


class _Asked(NamedTuple):
    kind: str
    question: str
    answer: str
    where: str


def documents() -> Iterator[Document]:
    """One document per language topic, then one per module with docstrings, both sorted by name."""
    for name, text in sorted(_topics().items()):
        if text.strip():
            yield Document(f"{name}\n\n{text.strip()}\n", f"python-docs:topic {name}")
    seen: set[str] = set()
    for name, tree in _modules():
        new = [(node, path, doc) for node, path, doc in _entries(tree, "") if doc not in seen and not seen.add(doc)]
        if new:
            parts = [f"{_title(node, path or name)}\n\n{doc}" for node, path, doc in new]
            yield Document("\n\n\n".join(parts) + "\n", f"python-docs:module {name}")


def questions() -> Iterator[Record]:
    """({question, answer}, where) for each public module, class and function whose docstring begins with a short paragraph.

    That paragraph is the answer, on one line; no answer and no question comes twice.
    """
    for asked in _asked():
        yield {"question": asked.question, "answer": asked.answer}, asked.where


def preferences() -> Iterator[Record]:
    """({prompt, chosen, rejected}, where): `questions`, each with its answer and with that to another of the same kind.

    Every answer is chosen once and rejected once, so that none gives away which it is: one must know the question.
    """
    everything = list(_asked())
    wrong: dict[str, str] = {}
    for kind in _ASKED:
        ring = sorted((asked for asked in everything if asked.kind == kind), key=lambda asked: _number(asked.question))
        wrong |= {asked.question: other.answer for asked, other in zip(ring, ring[1:] + ring[:1], strict=True)}
    for asked in everything:
        yield {"prompt": asked.question, "chosen": asked.answer, "rejected": wrong[asked.question]}, asked.where


def _asked() -> Iterator[_Asked]:
    seen: set[str] = set()
    for module, tree in _modules():
        for node, path, doc in _entries(tree, ""):
            name = f"{module}.{path}" if path else module
            answer = _answer(doc)
            if name in seen or answer in seen or not answer or any(part.startswith("_") for part in name.split(".")):
                continue
            seen.update((name, answer))
            kind = "module" if not path else "class" if isinstance(node, ast.ClassDef) else "function"
            forms = _ASKED[kind]
            question = forms[_number(name) % len(forms)].format(name)
            yield _Asked(kind, question, answer, f"python-docs:{kind} {name}")


def _answer(doc: str) -> str:
    """The first paragraph on one line, empty when it is no sentence of a fitting length."""
    answer = " ".join(doc.split("\n\n")[0].split())
    answer += "" if answer.endswith((".", "!", "?", ":", ",")) else "."
    is_sentence = answer[0].isupper() and answer[-1] not in ":," and ">>>" not in answer
    return answer if is_sentence and _SHORTEST <= len(answer) <= _LONGEST else ""


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _topics() -> dict[str, str]:
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except (ImportError, AttributeError, TypeError, ValueError):  # some distributions leave it out
        return {}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """(name, syntax tree) of the modules, sorted by path; those that cannot be parsed are passed over."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts) or parts[0].startswith("config-"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError, RecursionError):
            continue
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), tree


def _entries(node: ast.Module | Definition, path: str) -> Iterator[tuple[ast.Module | Definition, str, str]]:
    """(node, path inside its module, docstring) of a node and of the classes and functions directly inside modules and
    classes; the path of a module is empty."""
    doc = ast.get_docstring(node)
    if doc:
        yield node, path, doc.encode(errors="ignore").decode()  # a docstring may hold the escape of a lone surrogate
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, Definition):
                yield from _entries(child, f"{path}.{child.name}" if path else child.name)


def _title(node: ast.Module | Definition, name: str) -> str:
    if isinstance(node, ast.Module):
        return f"Module {name}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}" + (f"({bases})" if bases else "")
    return f"{name}({ast.unparse(node.args)})"
