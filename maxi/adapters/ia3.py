"""(IA)3: what a projection gives is scaled, each output by a factor of its own (Liu et al., arXiv:2205.05638, section 3.3).

The MLP's last projection has its inputs scaled instead. All factors are one at first. A bias is scaled with its output.
Layouts and names are peft's.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maxi.adapters.lora import PREFIX
from maxi.adapters.weight import Beside, Parts, frozen
from maxi.params import Param

FEEDFORWARD = "down_proj"
"""Whose inputs are scaled."""


@dataclass(frozen=True)
class IA3(Beside):
    """One factor for each output, or input, of a weight."""

    takes_embeddings = False
    starts_from_base = False

    def sizes(self) -> dict[str, int]:
        return {}

    def parts(self, path: str, param: Param) -> dict[str, Param]:
        """`out` [L, *outputs], or `into` [L, *inputs]."""
        del path
        module, depth = param.hf.removesuffix(".weight"), param.dims.removesuffix(param.letters)
        of_inputs = module.endswith(FEEDFORWARD)
        letters = "".join(param.dims[axis] for axis in param.matrix_axes[0 if of_inputs else 1])
        group = f"({' '.join(letters)})" if len(letters) > 1 else letters
        name, layout = ("into", f"1 {group}") if of_inputs else ("out", f"{group} 1")
        return {name: Param(f"{depth}{letters}", f"{PREFIX}{module}.ia3_l", layout, "ones")}

    def linear(self, pattern: str, x: jax.Array, base: Any, parts: Parts) -> jax.Array:
        if "into" in parts:
            return frozen(pattern, x * parts["into"].astype(x.dtype), base)
        return frozen(pattern, x, base) * parts["out"].astype(x.dtype)

    def bias(self, bias: jax.Array, parts: Parts) -> jax.Array:
        return bias * parts["out"] if "out" in parts else bias

    def merged(self, path: str, param: Param, base: jax.Array, parts: Parts) -> jax.Array:
        del path
        side = 1 if "into" in parts else 0
        axes = tuple(axis - len(param.dims) + base.ndim for axis in param.matrix_axes[side])
        return base * jnp.expand_dims(parts["into" if side else "out"], axes)
