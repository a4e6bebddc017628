"""Prefix tuning: keys and values that are learned, before every document and in every layer (Li and Liang, arXiv:2101.00190).

They stand at the positions before the first token and are used as they are, without norm or rotary embedding, as peft
and transformers use a cache that was filled beforehand. Layout and name are peft's: one tensor for all layers, of each
first the keys, then the values.

`FromNetwork` learns a small network that gives them instead (section 4.3 there), which trains more steadily; what it gives
is what is kept of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxi.adapters.virtual import Virtual
from maxi.adapters.weights import OnWeights
from maxi.params import Param, Table, Tree, get, put

NETWORK = "prefix"
"""Where what the layers share of a network is among what is trained."""
TARGETS = ("w_k", "w_v")
"""The projections beside which they are kept, in the order of peft's tensor."""


@dataclass(frozen=True)
class Prefix(Virtual):
    """`virtual` [L, S, K, H] beside the projection of keys, and of values. First values: normal of standard deviation 1 as
    in peft, or zero."""

    virtual_tokens: int
    init: Literal["random", "zero"] = "random"

    takes_embeddings = starts_from_base = False

    def parts(self, path: str, param: Param) -> dict[str, Param]:
        del path
        first = "zeros" if self.init == "zero" else "normal"
        return {"virtual": Param("LSKH", param.hf.removesuffix(".weight") + ".prefix", "S (K H)", first)}


@dataclass(frozen=True)
class FromNetwork(OnWeights):
    """A prefix that a network of two layers gives: of `tokens` [S, K, H] through tanh, `width` numbers, to all layers.

    As peft's PrefixEncoder with prefix_projection. See `maxi.adapters.Tuning`.
    """

    width: int = 1

    @cached_property
    def _table(self) -> Table:
        last = "zeros" if getattr(self.kind, "init", None) == "zero" else "uniform"
        params = {
            f"{NETWORK}.tokens": Param("SKH", "embedding.weight", "S (K H)"),
            f"{NETWORK}.w_in": Param("KHC", "transform.0.weight", "C (K H)", "uniform"),
            f"{NETWORK}.b_in": Param("C", "transform.0.bias", "C", "zeros"),
        }
        for path in self.targets:
            params[f"{path}.out"] = Param("LCKH", f"transform.2.{path}.{{L}}.weight", "(K H) C", last)
            params[f"{path}.b_out"] = Param("LKH", f"transform.2.{path}.{{L}}.bias", "(K H)", "zeros")
        return replace(self.plain.table, params=params, sizes={**self.plain.table.sizes, "C": self.width})

    @cached_property
    def plain(self) -> OnWeights:
        """The prefix by itself, which `given` are values of."""
        return OnWeights(self.base, self.targets, self.kind, self.dtype, self.precision)

    def given(self, params: Tree) -> Tree:
        """What the network gives, as `plain` trains it."""
        network, exact = params[NETWORK], partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        inner_SC = jnp.tanh(exact("SKH,KHC->SC", network["tokens"], network["w_in"]) + network["b_in"])
        tree: Tree = {}
        for path in self.targets:
            last = get(params, path)
            value_LSKH = exact("SC,LCKH->LSKH", inner_SC, last["out"]) + last["b_out"][:, None]
            tree = put(tree, f"{path}.virtual", value_LSKH)
        return tree

    def join(self, params: Tree, frozen: Tree, noise: Any = None) -> Tree:
        return self.plain.join(self.given(params), frozen, noise)


def targets(base: Table) -> tuple[str, ...]:
    """The projections of all layers that give keys and values."""
    return tuple(path for path in base.params if path.split(".")[-1] in TARGETS)


def flat(table: Table, params: Tree) -> np.ndarray:
    """peft's tensor [S, layers * 2 * K * H], float32."""
    layers = _layers(table, lambda path, number: np.asarray(get(params, path)[number], np.float32))
    S = table.sizes["S"]
    return np.ascontiguousarray(np.stack(layers, 1).reshape(S, -1))


def apart(table: Table, stored: np.ndarray) -> Tree:
    """The tree of what `flat` gives."""
    S, K, H = (table.sizes[letter] for letter in "SKH")
    tree: Tree = {}
    for path in table.params:
        tree = put(tree, path, np.zeros(table.shape(path), np.float32))
    parts = iter(stored.reshape(S, -1, K, H).swapaxes(0, 1))

    def fill(path: str, number: int) -> None:
        get(tree, path)[number] = next(parts)

    _layers(table, fill)
    return tree


def _layers(table: Table, of: Callable[[str, int], Any]) -> list[Any]:
    """`of(path, index along L)` of keys, then values, of every layer in order."""
    stacks: Mapping[str, tuple[int, ...]] = {path.split(".")[0]: table.stacks[path.split(".")[0]] for path in table.params}
    homes = {layer: (stack, index) for stack, layers in stacks.items() for index, layer in enumerate(layers)}
    return [of(f"{homes[layer][0]}.{name}.virtual", homes[layer][1]) for layer in sorted(homes) for name in TARGETS]
