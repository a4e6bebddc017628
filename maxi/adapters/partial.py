"""Partial training: some weights learn, the others stay, chosen by name.

Layers of one stack of which only some learn become two stacks, so that every array is frozen or trained as a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from maxi.adapters import targets
from maxi.params import Table, Tree, get


@dataclass(frozen=True)
class Partial:
    """What `freeze` names stays, the rest is trained. See `maxi.adapters.Tuning`."""

    base: Table
    freeze: tuple[str, ...]

    needs_base = True
    about = "all but those that freeze names"
    starts_from_base = True
    needs_noise = False
    keeps_start = False
    virtual_tokens = 0

    @cached_property
    def _frozen(self) -> set[str]:
        return targets.frozen(self.base, self.freeze, "freeze")

    @property
    def whole(self) -> Table:
        """The base's weights in stacks of which each is frozen or trained as a whole, weight by weight."""
        return self._whole

    @property
    def table(self) -> Table:
        return self._table

    @cached_property
    def _whole(self) -> Table:
        stacks: dict[str, tuple[int, ...]] = {}
        params = {path: param for path, param in self.base.params.items() if not param.stacked}
        for stack, layers in self.base.stacks.items():
            names = [path.split(".", 1)[1] for path in self.base.params if path.startswith(f"{stack}.")]
            groups: dict[tuple[bool, ...], list[int]] = {}
            for layer in layers:
                groups.setdefault(tuple(self._is_frozen(f"{stack}.{name}", layer) for name in names), []).append(layer)
            for number, of_group in enumerate(groups.values()):
                part = stack if len(groups) == 1 else f"{stack}_{number}"
                stacks[part] = tuple(of_group)
                params |= {f"{part}.{name}": self.base.params[f"{stack}.{name}"] for name in names}
        order = [path for path in params if path.split(".")[0] in stacks]
        rest = [path for path in params if path not in order]
        return replace(self.base, params={path: params[path] for path in [*rest[:1], *order, *rest[1:]]}, stacks=stacks)

    @cached_property
    def _table(self) -> Table:
        return self.whole.only([path for path in self.whole.params if not self._stays(path)])

    def _is_frozen(self, path: str, layer: int | None) -> bool:
        return self.base.params[path].hf.format(L=layer) in self._frozen

    def _stays(self, path: str) -> bool:
        layers = self.whole.stacks.get(path.split(".")[0], (None,))
        return self.whole.params[path].hf.format(L=layers[0]) in self._frozen

    def first(self, key: jax.Array, base: Tree) -> Tree:
        del key
        return self.table.map(lambda path, _: self._part(base, path))

    def keep(self, path: str, weight: Any) -> Any:
        del path
        return weight

    def fix(self, base: Tree) -> Tree:
        stay = self.whole.only([path for path in self.whole.params if self._stays(path)])
        return stay.map(lambda path, _: self._part(base, path))

    def _part(self, base: Tree, path: str) -> jax.Array:
        """A weight of the split table, from a tree of the base's."""
        stack, _, name = path.partition(".")
        if stack in base:
            return get(base, path)
        home = next(s for s, layers in self.base.stacks.items() if self.whole.stacks[stack][0] in layers)
        numbers = [self.base.stacks[home].index(layer) for layer in self.whole.stacks[stack]]
        weight = base[home][name]
        begin, end = numbers[0], numbers[-1] + 1
        return weight[begin:end] if numbers == list(range(begin, end)) else weight[jnp.asarray(numbers)]

    def join(self, params: Tree, frozen: Tree, noise: Any = None) -> Tree:
        del noise
        trained = self.table.params
        return self.whole.map(lambda path, _: get(params if path in trained else frozen, path))

    def merged(self, params: Tree, frozen: Tree) -> Tree:
        joined = self.join(params, frozen)

        def of_base(path: str, param: Any) -> jax.Array:
            stack, _, name = path.partition(".")
            if not param.stacked or stack in self.whole.stacks:
                return get(joined, path)
            order = self.base.stacks[stack]
            parts = [part for part, layers in self.whole.stacks.items() if layers[0] in order]
            found = jnp.concatenate([joined[part][name] for part in parts])
            numbers = [layer for part in parts for layer in self.whole.stacks[part]]
            return found if numbers == list(order) else found[jnp.asarray([numbers.index(layer) for layer in order])]

        return self.base.map(of_base)

    def off(self, first: Callable[[], Tree], frozen: Tree) -> Tree:
        return self.join(first(), frozen)
