"""Prompt tuning: embeddings that are learned, before every document (Lester et al., arXiv:2104.08691).

They stand where tokens would: at the positions before the first token, seen by all that follows in the document. Layout
and name are peft's.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from maxi.adapters.virtual import Virtual
from maxi.adapters.weight import Parts
from maxi.params import Param

NAME = "prompt_embeddings"
"""What peft calls virtual tokens, of either kind."""


@dataclass(frozen=True)
class Prompt(Virtual):
    """`virtual` [S, D] beside the embedding. First values: normal of standard deviation 1 as in peft, embeddings of tokens
    drawn from the vocabulary, or those of a text's tokens, from the beginning again where it is short. Whoever begins a run
    with a text gives its `ids`; without them (a benchmark) tokens are drawn."""

    virtual_tokens: int
    init: Literal["vocab", "random", "text"] = "vocab"
    ids: tuple[int, ...] = ()

    takes_embeddings = True

    @property
    def starts_from_base(self) -> bool:
        return self.init != "random"

    def parts(self, path: str, param: Param) -> dict[str, Param]:
        del path, param
        return {"virtual": Param("SD", NAME, "S D")}

    def start(self, path: str, param: Param, base: Any, parts: Parts) -> Parts:
        del path, param
        if self.init == "random":
            return parts
        if self.ids:
            ids = jnp.resize(jnp.asarray(self.ids, jnp.int32), (self.virtual_tokens,))
        else:
            V = base.shape[0]
            shares = jax.scipy.stats.norm.cdf(parts["virtual"][:, 0])  # of normal draws: uniform ones
            ids = jnp.minimum((shares * V).astype(jnp.int32), V - 1)
        return {"virtual": base[ids].astype(jnp.float32)}
