"""Virtual tokens: learned places at the beginning of every document, before its first token.

Each document of a row, of a batch of prompts or of a cache brings the places: the tokens at positions 0 to n - 1 of it are
virtual, whatever their ids, and what is read begins at position n. That makes a virtual token a token like others for
packing, attention and caches, so every kernel and every layout of rows serves. Who makes rows leaves the places free
(`maxi.data`); what stands in them is decided here: `prompt.py` replaces the embedding, `prefix.py` keys and values.

A model without virtual tokens reads such rows as they would be without the places (`without`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from maxi.adapters.weight import Adapted, Beside, Parts, frozen
from maxi.params import Param

_PATTERNS = {3: "BTS,SD->BTD", 4: "BTS,SKH->BTKH"}


class Virtual(Beside):
    """What the kinds share: they change no weight, and each has a part `virtual` [S, ...]."""

    virtual_tokens: int
    init_std = 1.0

    def sizes(self) -> dict[str, int]:
        return {"S": self.virtual_tokens}

    def linear(self, pattern: str, x: jax.Array, base: Any, parts: Parts) -> jax.Array:
        del parts
        return frozen(pattern, x, base)

    def merged(self, path: str, param: Param, base: jax.Array, parts: Parts) -> jax.Array:
        del path, param, parts
        return base


def count(tree: Any) -> int:
    """How many virtual tokens a tree of weights puts before each document."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Adapted))
    return max((virtual_tokens(node.kind) for node in nodes if isinstance(node, Adapted)), default=0)


def virtual_tokens(kind: Any) -> int:
    """How many virtual tokens a kind of adapter learns."""
    return getattr(kind, "virtual_tokens", 0)


def apart(w: Any) -> tuple[Any, jax.Array | None]:
    """A weight as it is multiplied with, and the virtual tokens that are learned beside it."""
    if isinstance(w, Adapted) and virtual_tokens(w.kind):
        return w.base, w.parts["virtual"]
    return w, None


def put(x: jax.Array, virtual: jax.Array | None, positions_BT: jax.Array) -> jax.Array:
    """x [B, T, ...] with virtual [S, ...] at the first S positions of each document."""
    if virtual is None:
        return x
    at_BTS = positions_BT[..., None] == jnp.arange(len(virtual))
    # a product with ones and zeros: exact, in a fixed order backwards, and split over devices like any other
    taken = jnp.einsum(_PATTERNS[x.ndim], at_BTS.astype(x.dtype), virtual.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
    return jnp.where(at_BTS.any(-1).reshape(*positions_BT.shape, *[1] * (x.ndim - 2)), taken, x)


def without(batch: dict[str, Any], n: int) -> dict[str, Any]:
    """The batch as a model without virtual tokens reads it: the n places are padding, positions count from 0."""
    if not n:
        return batch
    text = batch["positions"] >= n
    positions = jnp.where(text, batch["positions"] - n, 0)
    return {**batch, "positions": positions, "segments": jnp.where(text, batch["segments"], 0)}
