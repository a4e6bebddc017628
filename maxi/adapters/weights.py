"""An adapter on some weights of a frozen base: LoRA and its kind."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from maxi.adapters.quantised import Precision, Quantised, quantise
from maxi.adapters.targets import module
from maxi.adapters.virtual import virtual_tokens
from maxi.adapters.weight import Adapted, Kind
from maxi.errors import ConfigError
from maxi.params import Param, Table, Tree, get, init, put

START = "start"
"""Where a frozen tree keeps the first values of an adapter that are taken off again (PiSSA)."""


@dataclass(frozen=True)
class OnWeights:
    """`kind` beside each weight of `targets`; the base's matrices are kept in `dtype`, or those of the layers in
    `precision`. See `maxi.adapters.Tuning`."""

    base: Table
    targets: tuple[str, ...]
    kind: Kind
    dtype: Any = jnp.float32
    precision: Precision | None = None

    needs_base = True

    def __post_init__(self) -> None:
        outside = [path for path in self.targets if not self.base.params[path].stacked]
        if outside and not self.kind.takes_embeddings:
            names = ", ".join(module(self.base, path) for path in outside)
            raise ConfigError(f"{names} can only be a target of plain LoRA", "adapter.targets", "leave it out")

    @property
    def about(self) -> str:
        names = dict.fromkeys(module(self.base, path) for path in self.targets)
        base = f"weights in {self.precision}" if self.precision else "frozen weights"
        return f"{type(self.kind).__name__} beside {base}: {', '.join(names)}"

    @property
    def whole(self) -> Table:
        return self.base

    @property
    def needs_noise(self) -> bool:
        return bool(getattr(self.kind, "dropout", 0))

    @property
    def starts_from_base(self) -> bool:
        return self.kind.starts_from_base

    @property
    def keeps_start(self) -> bool:
        return getattr(self.kind, "init", None) == "pissa"

    @property
    def virtual_tokens(self) -> int:
        return virtual_tokens(self.kind)

    @property
    def table(self) -> Table:
        return self._table

    @cached_property
    def _table(self) -> Table:
        parts = {
            f"{path}.{name}": part
            for path in self.targets
            for name, part in self.kind.parts(path, self.base.params[path]).items()
        }
        init_std = getattr(self.kind, "init_std", self.base.init_std)
        return replace(self.base, params=parts, sizes={**self.base.sizes, **self.kind.sizes()}, init_std=init_std)

    def first(self, key: jax.Array, base: Tree) -> Tree:
        def make(key: jax.Array, weights: dict[str, Any]) -> Tree:
            tree = init(self.table, key)
            for path, param in self._targets():
                tree = put(tree, path, self.kind.start(path, param, weights.get(path), get(tree, path)))
            return tree

        return jax.jit(make)(key, {path: get(base, path) for path in self.targets if self.starts_from_base})

    def keep(self, path: str, weight: Any) -> Any:
        """Matrices in their dtype, those of the layers in `precision`; norms and biases as they are."""
        param = self.base.params[path]
        if isinstance(weight, Quantised) or not param.is_matrix:
            return weight
        return _quantised(weight, self.precision) if self.precision and param.stacked else weight.astype(self.dtype)

    def fix(self, base: Tree) -> Tree:
        return self.base.map(lambda path, _: self.keep(path, get(base, path)))

    def join(self, params: Tree, frozen: Tree, noise: Any = None) -> Tree:
        tree, start = _base_of(frozen), frozen.get(START)
        for path, param in self._targets():
            layers = self.base.stacks.get(path.split(".")[0], (None,))
            parts = {**get(params, path), **self.kind.constants(path, param, layers)}
            if start is not None:
                parts |= {f"{name}0": part for name, part in get(start, path).items()}
            if noise is not None and self.needs_noise:
                parts["noise"] = _noise(noise, path, self.base.shape(path)[0] if param.stacked else None)
            tree = put(tree, path, Adapted(get(tree, path), parts, self.kind, path, param))
            bias = path.replace(".w_", ".b_")
            if bias != path and bias in self.base.params:
                tree = put(tree, bias, self.kind.bias(get(tree, bias), parts))
        return tree

    def merged(self, params: Tree, frozen: Tree) -> Tree:
        assert not self.virtual_tokens, "they are no part of a weight"
        merge = jax.jit(lambda tree: self.base.map(lambda path, _: _merged(get(tree, path))))
        return merge(self.join(params, frozen))

    def off(self, first: Callable[[], Tree], frozen: Tree) -> Tree:
        del first
        return _base_of(frozen)

    def _targets(self) -> Iterator[tuple[str, Param]]:
        return ((path, self.base.params[path]) for path in self.targets)


def _base_of(frozen: Tree) -> Tree:
    return {name: leaf for name, leaf in frozen.items() if name != START}


@partial(jax.jit, static_argnums=1)
def _quantised(weight: jax.Array, precision: Precision) -> Quantised:
    return quantise(weight, precision, stacked=True)


def _merged(leaf: Any) -> jax.Array:
    if isinstance(leaf, Adapted):
        return leaf.kind.merged(leaf.path, leaf.param, _merged(leaf.base), leaf.parts)
    if isinstance(leaf, Quantised):
        return jax.lax.map(lambda layer: layer.expand(jnp.float32), leaf)
    return leaf.astype(jnp.float32)


def _noise(noise_B: Any, path: str, depth: int | None) -> jax.Array:
    """Keys of one weight's layers and rows, [L, B, 2]; without L for a weight that has none."""
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(path.encode())))(jax.random.wrap_key_data(noise_B))
    if depth is None:
        return jax.random.key_data(keys_B)
    layers = jnp.arange(depth)
    return jax.random.key_data(jax.vmap(lambda layer: jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys_B))(layers))
