"""The parameter table: every weight declared once, everything else derived.

A family declares `Param`s (dimensions, Hugging Face name and layout, initialiser). From the table come the
parameter tree, its shapes and first values, weight decay, counts and FLOPs here; shardings in `sharding.py`; the
optimizer's view in `optim.py`; and Hugging Face import and export, which read one pattern in both directions, in
`hf/`.

The tree: `{"embed": [V, D], "layers": {"w_q": [L, D, N, H], ...}, "final_norm": [D]}`. Layers whose weights have the
same shapes form one *stack*, stacked along L; a model with layers of several kinds has several stacks.
"""

import hashlib
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, NamedSharding

from maxi.sharding import fetch, weight_spec

Tree = dict[str, Any]
"""A pytree of nested dicts whose leaves follow a table."""


@dataclass(frozen=True)
class Param:
    """One weight. `dims` are letters of the alphabet, a leading L stacks the layers that have it.

    `hf` is its name in a Hugging Face folder, with {L} for the layer's number; `layout` its dimensions there, an
    einops pattern without L such as "(N H) D".
    """

    dims: str
    hf: str
    layout: str
    init: Literal["normal", "ones", "zeros", "uniform"] = "normal"
    rate: float = 1.0
    """Its learning rate, as a multiple of everybody's."""

    @property
    def stacked(self) -> bool:
        return self.dims.startswith("L")

    @property
    def letters(self) -> str:
        """The dimensions of one layer's weight."""
        return self.dims.removeprefix("L")

    @property
    def matrix_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Axes of the array that a matmul contracts, and those it produces (Hugging Face lays out output, then input)."""
        output, inputs = (group.strip("()").split() for group in _groups(self.layout))
        return tuple(map(self.dims.index, inputs)), tuple(map(self.dims.index, output))

    @property
    def is_matrix(self) -> bool:
        """Whether it takes part in a matmul (or is an embedding), and so decays; norms and biases do not."""
        return sum(group != "1" for group in _groups(self.layout)) == 2


@dataclass(frozen=True)
class Table:
    """All weights of one model: path ("embed", "layers.w_q") -> Param, with the sizes that make it concrete."""

    params: Mapping[str, Param]
    sizes: Mapping[str, int]
    stacks: Mapping[str, tuple[int, ...]]
    """Stack -> the numbers of its layers in the model, in order."""
    init_std: float

    def shape(self, path: str) -> tuple[int, ...]:
        param = self.params[path]
        depth = (len(self.stacks[path.split(".")[0]]),) if param.stacked else ()
        return depth + tuple(self.sizes[letter] for letter in param.letters)

    def map(self, make: Callable[[str, Param], Any]) -> Tree:
        """The tree with `make(path, param)` at every leaf."""
        tree: Tree = {}
        for path, param in self.params.items():
            *parents, name = path.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = make(path, param)
        return tree

    def hf_shape(self, param: Param) -> tuple[int, ...]:
        """Shape of one layer's tensor in a Hugging Face folder."""
        groups = [group.strip("()").split() for group in _groups(param.layout)]
        return tuple(math.prod(1 if letter == "1" else self.sizes[letter] for letter in group) for group in groups)

    def only(self, paths: Collection[str]) -> "Table":
        """The table of these weights alone."""
        return replace(self, params={path: param for path, param in self.params.items() if path in paths})

    def hf_tensors(self) -> Iterator[tuple[str, str, int | None]]:
        """(Hugging Face name, path, index along L or None) of every tensor, layer by layer."""
        for path, param in self.params.items():
            if not param.stacked:
                yield param.hf, path, None
        depth = max((layer for layers in self.stacks.values() for layer in layers), default=-1) + 1
        for number in range(depth):
            for path, param in self.params.items():
                layers = self.stacks.get(path.split(".")[0], ())
                if param.stacked and number in layers:
                    yield param.hf.format(L=number), path, layers.index(number)


def _groups(layout: str) -> list[str]:
    """'(N H) D' -> ['(N H)', 'D']."""
    groups: list[str] = []
    for word in layout.split():
        if groups and groups[-1].startswith("(") and not groups[-1].endswith(")"):
            groups[-1] += " " + word
        else:
            groups.append(word)
    return groups


def to_hf(param: Param, array: Any) -> Any:
    """One layer's weight [*letters] in Hugging Face's layout; numpy in, numpy out."""
    return rearrange(array, f"{' '.join(param.letters)} -> {param.layout}")


def from_hf(table: Table, param: Param, array: Any) -> Any:
    """The inverse of `to_hf`: the same pattern, read backwards."""
    sizes = {letter: table.sizes[letter] for letter in param.letters}
    return rearrange(array, f"{param.layout} -> {' '.join(param.letters)}", **sizes)


def get(tree: Tree, path: str) -> Any:
    """The leaf of a parameter tree at a dotted path."""
    for part in path.split("."):
        tree = tree[part]
    return tree


def abstract(table: Table, dtype: Any = jnp.float32) -> Tree:
    """The tree of `jax.ShapeDtypeStruct`s."""
    return table.map(lambda path, _: jax.ShapeDtypeStruct(table.shape(path), dtype))


def init(table: Table, key: jax.Array, dtype: Any = jnp.float32) -> Tree:
    """First weights: normal of standard deviation `table.init_std` as in transformers, norms one, biases zero, the first
    matrices of adapters uniform up to 1 / sqrt(inputs) either way, which is torch's default for a linear layer.

    Each weight's randomness depends on `key` and its path alone, so that neither the order of the table nor the
    devices it is sharded over change a number.
    """

    def make(path: str, param: Param) -> jax.Array:
        shape = table.shape(path)
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        if param.init == "normal":
            return table.init_std * jax.random.normal(leaf_key, shape, dtype)
        if param.init == "uniform":
            most = math.prod(shape[axis] for axis in param.matrix_axes[0]) ** -0.5
            return jax.random.uniform(leaf_key, shape, dtype, -most, most)
        return (jnp.ones if param.init == "ones" else jnp.zeros)(shape, dtype)

    return table.map(make)


def shardings(table: Table, mesh: Mesh) -> Tree:
    """The tree of `NamedSharding`s. Raises ConfigError where a size does not divide into its mesh axis."""
    return table.map(lambda _, param: NamedSharding(mesh, weight_spec(param.dims, table.sizes, mesh)))


def put(tree: Tree, path: str, leaf: Any) -> Tree:
    """The tree with another leaf at a dotted path; what is not on the way to it is shared."""
    first, _, rest = path.partition(".")
    return {**tree, first: put(tree.get(first, {}), rest, leaf) if rest else leaf}


def decay_mask(table: Table, embeddings: bool) -> Tree:
    """True where weight decay acts: matrices, and `embed` and `lm_head` if `embeddings`."""
    return table.map(lambda _, param: param.is_matrix and (embeddings or "V" not in param.dims))


def count(table: Table) -> int:
    """Number of parameters; tied weights count once."""
    return sum(math.prod(table.shape(path)) for path in table.params)


def matmul_flops_per_token(table: Table) -> int:
    """FLOPs of all weight matmuls for one token, forward only: two per weight; the head counts, the lookup does not."""
    weights = sum(math.prod(table.shape(p)) for p, param in table.params.items() if param.is_matrix)
    lookup_only = math.prod(table.shape("embed")) if "lm_head" in table.params else 0
    return 2 * (weights - lookup_only)


def fingerprint(params: Tree) -> str:
    """sha256 (hex) of all weights, in the order of their paths, one in memory at a time."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype}{leaf.shape}".encode())
        sha.update(fetch(leaf).reshape(-1).view("uint8").data)
    return sha.hexdigest()


def describe(table: Table) -> str:
    """The table as text, one line a weight: path, dims, shape, Hugging Face name and layout, initialiser."""
    rows = [
        f"{path:<18} {param.dims:<5} {table.shape(path)!s:<22} {param.hf} [{param.layout}] {param.init}"
        for path, param in table.params.items()
    ]
    return "\n".join([*rows, f"{count(table):,} parameters"])
