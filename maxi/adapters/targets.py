"""Which weights: names as users and peft write them, to paths of the table."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from maxi.errors import ConfigError
from maxi.params import Table

T = TypeVar("T")


def module(table: Table, path: str) -> str:
    """The name by which peft knows a weight: q_proj, embed_tokens."""
    return table.params[path].hf.removesuffix(".weight").split(".")[-1]


def of_module(pattern: Sequence[tuple[str, T]], name: str, default: T) -> T:
    """What a pattern says of a module: the first of its names that is the module's, or the end of it after a dot, decides."""
    return next((value for key, value in pattern if name == key or name.endswith(f".{key}")), default)


def check_pattern(table: Table, paths: Sequence[str], pattern: Sequence[tuple[str, Any]], where: str) -> None:
    """Raises ConfigError for a name in a pattern that no target has."""
    depth = 1 + max((layer for layers in table.stacks.values() for layer in layers), default=0)
    names = {table.params[path].hf.removesuffix(".weight").format(L=layer) for path in paths for layer in range(depth)}
    for key, _ in pattern:
        if not any(name == key or name.endswith(f".{key}") for name in names):
            close = difflib.get_close_matches(key, sorted({name.split(".")[-1] for name in names}), 1)
            raise ConfigError(f"no target is called {key!r}", where, f"did you mean {close[0]}?" if close else "name a target")


def projections(table: Table) -> list[str]:
    """The matrices inside the layers, which `all` stands for."""
    return [path for path, param in table.params.items() if param.stacked and param.is_matrix]


def chosen(table: Table, wanted: Sequence[str], where: str) -> tuple[str, ...]:
    """Paths of the matrices named in `wanted`, in the table's order; `all` names every projection of the layers.

    Raises ConfigError for a name that no matrix has, and for a tied embedding: what is added to it would be added to the head.
    """
    matrices = [path for path, param in table.params.items() if param.is_matrix]
    known = {module(table, path) for path in matrices}
    for name in wanted:
        if name in ("lm_head", "embed_tokens") and "lm_head" not in known:
            what = f"{name} cannot be a target, the head of this model is its embedding"
            raise ConfigError(what, where, "leave it out, or set model.config.tie_word_embeddings")
        if name != "all" and name not in known:
            close = difflib.get_close_matches(name, sorted(known), 1)
            fix = f"did you mean {close[0]}?" if close else f"use all, or some of {', '.join(sorted(known))}"
            raise ConfigError(f"there is no target {name!r} in this model", where, fix)
    inside = projections(table) if "all" in wanted else []
    found = tuple(path for path in matrices if path in inside or module(table, path) in wanted)
    if not found:
        raise ConfigError("there are no targets", where, "write all, or names such as q_proj")
    return found


def frozen(table: Table, patterns: Sequence[str], where: str) -> set[str]:
    """Hugging Face names of the tensors that `patterns` freeze: the last that matches decides, one with ! in front frees.

    Raises ConfigError for a pattern that matches nothing, and when nothing or everything is frozen.
    """
    names = [name for name, _, _ in table.hf_tensors()]
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern.removeprefix("!"))}
        if not matched:
            close = difflib.get_close_matches(pattern.removeprefix("!"), names, 1, 0.3)
            fix = f"names look like {(close or names)[0]}; * stands for anything"
            raise ConfigError(f"no weight is called {pattern!r}", where, fix)
        found = found - matched if pattern.startswith("!") else found | matched
    if found == set(names):
        raise ConfigError("every weight is frozen", where, 'free some with a pattern such as "!*norm*"')
    return found
