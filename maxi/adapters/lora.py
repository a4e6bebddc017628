"""LoRA: a weight's change as a product of two thin matrices; and what has grown from it.

y = x W + s (x A) B, with s = alpha / rank (Hu et al., arXiv:2106.09685), or alpha / sqrt(rank) (rsLoRA, Kalajdzievski,
arXiv:2312.03732). B may learn at a rate of its own (LoRA+, Hayou et al., arXiv:2402.12354). PiSSA (Meng et al.,
arXiv:2404.02948) starts from the largest singular values of W; what it starts from is taken off again on the same side, so
that W stays what it was, and exports need no other base. DoRA (Liu et al., arXiv:2402.09353) learns the length of each
output's weights beside their direction; the length that divides has no gradient (its section 4.3).

Layouts and names are peft's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxi.adapters.targets import of_module
from maxi.adapters.weight import Beside, Parts, frozen, whole
from maxi.kernels.linear import linear as kernel
from maxi.params import Param

PREFIX = "base_model.model."
"""What peft puts before the names of the model it wraps."""


@dataclass(frozen=True)
class Lora(Beside):
    """The change of a weight, of `rank`. `dropout` acts on what A reads, where parts bring noise; `lr_ratio` is LoRA+'s."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    lr_ratio: float = 1.0
    init: Literal["default", "pissa"] = "default"
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    @property
    def scale(self) -> float:
        return self._scale(self.alpha, self.rank)

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def width(self) -> int:
        """The most that a rank is: smaller ones are filled up, with what is multiplied by zero."""
        return max([self.rank, *(rank for _, rank in self.rank_pattern)])

    def rank_of(self, name: str) -> int:
        """Of a module, by its Hugging Face name."""
        return of_module(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """The same of its scale."""
        return self._scale(of_module(self.alpha_pattern, name, self.alpha), self.rank_of(name))

    @property
    def takes_embeddings(self) -> bool:
        return not self.dora

    @property
    def starts_from_base(self) -> bool:
        return self.dora or self.init == "pissa"

    def sizes(self) -> dict[str, int]:
        return {"R": self.width}

    def parts(self, path: str, param: Param) -> dict[str, Param]:
        """`a` [L, *inputs, R], `b` [L, R, *outputs], and DoRA's `m` [L, *outputs]. An embedding's inputs are tokens."""
        module, depth = PREFIX + param.hf.removesuffix(".weight"), param.dims.removesuffix(param.letters)
        outputs, inputs = groups = _groups_of(path, param)
        names = ("lora_embedding_A", "lora_embedding_B") if path == "embed" else ("lora_A.weight", "lora_B.weight")
        out, into = (f"({' '.join(group)})" if len(group) > 1 else group for group in groups)
        parts = {
            "a": Param(f"{depth}{inputs}R", f"{module}.{names[0]}", f"R {into}", "uniform"),
            "b": Param(f"{depth}R{outputs}", f"{module}.{names[1]}", f"{out} R", "zeros", self.lr_ratio),
        }
        if self.dora:
            parts["m"] = Param(f"{depth}{outputs}", f"{module}.lora_magnitude_vector", out, "ones")
        return parts

    def constants(self, path: str, param: Param, layers: Sequence[int | None]) -> Parts:
        """Where modules have ranks and scales of their own: `scale` [L, R], 0 beyond a rank, so nothing is learned there."""
        del path
        if not self.rank_pattern and not self.alpha_pattern:
            return {}
        names = [param.hf.removesuffix(".weight").format(L=layer) for layer in layers]
        scales = np.zeros((len(names), self.width), np.float32)
        for row, name in zip(scales, names, strict=True):
            row[: self.rank_of(name)] = self.scale_of(name)
        return {"scale": jnp.asarray(scales if param.stacked else scales[0])}

    def start(self, path: str, param: Param, base: Any, parts: Parts) -> Parts:
        if self.init == "pissa":
            parts = {**parts, **self._principal(path, param, base, parts)}
        if self.dora:
            axes = param.matrix_axes[0]
            parts = {**parts, "m": jnp.sqrt((base.astype(jnp.float32) ** 2).sum(axes))}
        return parts

    def _principal(self, path: str, param: Param, base: jax.Array, parts: Parts) -> Parts:
        """A and B whose product, scaled, is the best approximation of the weight of that rank."""
        outputs, inputs = _groups_of(path, param)
        turned = jnp.einsum(f"{param.dims}->{param.dims.removesuffix(param.letters)}{inputs}{outputs}", base)
        stacked = turned if param.stacked else turned[None]
        width = math.prod(stacked.shape[1 : 1 + len(inputs)])

        def of_layer(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            u, s, v = jnp.linalg.svd(weight.reshape(width, -1).astype(jnp.float32), full_matrices=False)
            root = jnp.sqrt(s[: self.rank] / self.scale)
            return u[:, : self.rank] * root, root[:, None] * v[: self.rank]

        a, b = jax.lax.map(of_layer, stacked)
        return {"a": a.reshape(parts["a"].shape), "b": b.reshape(parts["b"].shape)}

    def linear(self, pattern: str, x: jax.Array, base: Any, parts: Parts) -> jax.Array:
        y, read = frozen(pattern, x, base), self._dropped(x, parts)
        change = self._change(pattern, read, parts["a"], parts["b"], parts)
        if "a0" in parts:
            change = change - self._change(pattern, read, parts["a0"], parts["b0"], parts)
        if not self.dora:
            return y + change
        gain = (parts["m"] / jax.lax.stop_gradient(self._norm(pattern, base, parts))).astype(y.dtype)
        of_read = y if read is x else frozen(pattern, read, base)  # as peft does it under dropout
        return y + (gain - 1) * of_read + gain * change

    def _change(self, pattern: str, x: jax.Array, a: jax.Array, b: jax.Array, parts: Parts) -> jax.Array:
        of_x, inputs, outputs, out = _letters(pattern)
        rows = of_x.removesuffix(inputs)
        low = kernel(f"{of_x},{inputs}R->{rows}R", x, a)
        return kernel(f"{rows}R,R{outputs}->{out}", (low * parts.get("scale", self.scale)).astype(low.dtype), b)

    def _dropped(self, x: jax.Array, parts: Parts) -> jax.Array:
        """x with a share of it zero, drawn for each row by itself, so that neither devices nor micro-batches matter."""
        if not self.dropout or "noise" not in parts:
            return x
        keep = 1 - self.dropout
        draw = jax.vmap(lambda key: jax.random.bernoulli(jax.random.wrap_key_data(key), keep, x.shape[1:]))
        return jnp.where(draw(parts["noise"]), x / keep, 0).astype(x.dtype)

    def _norm(self, pattern: str, base: Any, parts: Parts) -> jax.Array:
        """Lengths [*outputs] of the changed weight, float32, from inner products: the changed weight is not formed."""
        _, inputs, outputs, _ = _letters(pattern)
        w, b = whole(base, jnp.float32), parts["b"].astype(jnp.float32)
        a = parts["a"].astype(jnp.float32) * parts.get("scale", self.scale)
        w_a = jnp.einsum(f"{inputs}{outputs},{inputs}R->R{outputs}", w, a)
        a_a = jnp.einsum(f"{inputs}R,{inputs}C->RC", a, a)
        own = (w**2).sum(range(len(inputs)))
        return jnp.sqrt(own + 2 * (w_a * b).sum(0) + (jnp.einsum(f"RC,C{outputs}->R{outputs}", a_a, b) * b).sum(0))

    def rows(self, tokens: jax.Array, base: jax.Array, parts: Parts, dtype: Any) -> jax.Array:
        """Rows of an adapted embedding [V, D]."""
        low = parts["a"].astype(dtype)[tokens] * parts.get("scale", self.scale)
        return base.astype(dtype)[tokens] + low.astype(dtype) @ parts["b"].astype(dtype)

    def merged(self, path: str, param: Param, base: jax.Array, parts: Parts) -> jax.Array:
        known = self.parts(path, param)
        pattern = f"{known['a'].dims},{known['b'].dims}->{param.dims}"
        if base.ndim < len(param.dims):
            pattern = pattern.replace("L", "")
        scale = jnp.asarray(parts.get("scale", self.scale))
        if scale.ndim == 2:  # with L in front
            scale = scale.reshape(len(scale), *[1] * (parts["a"].ndim - 2), -1)
        product = jnp.einsum(pattern, parts["a"] * scale, parts["b"])
        if "a0" in parts:
            product = product - jnp.einsum(pattern, parts["a0"] * scale, parts["b0"])
        changed = base + product
        if not self.dora:
            return changed
        axes = tuple(axis - len(param.dims) + base.ndim for axis in param.matrix_axes[0])
        norm = jnp.sqrt((changed**2).sum(axes, keepdims=True))
        return changed * (jnp.expand_dims(parts["m"], axes) / norm)


def _groups_of(path: str, param: Param) -> tuple[str, str]:
    """Letters of what a weight produces, and of what it reads."""
    inputs, outputs = ("".join(param.dims[axis] for axis in axes) for axes in param.matrix_axes)
    return (inputs, outputs) if path == "embed" else (outputs, inputs)


def _letters(pattern: str) -> tuple[str, str, str, str]:
    """Letters of x, of what is summed over, of what is new, and of the result."""
    x, w, out = pattern.replace("->", ",").split(",")
    inputs = "".join(letter for letter in w if letter in x)
    return x, inputs, "".join(letter for letter in w if letter not in x), out
