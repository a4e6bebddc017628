"""A frozen weight with something learned beside it, and how a projection applies it.

In the tree of a model that trains an adapter a weight is an `Adapted` node where it is adapted, and `Quantised` where it
is kept so. `linear` is what the decoder applies weights with: arrays go to the kernel, a node to its kind. All is done to
the activations: the sum of a weight and its change is never formed, so a step holds neither that nor its gradient.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import flax.struct
import jax

from maxi import fsdp
from maxi.adapters.quantised import Quantised
from maxi.kernels.linear import linear as kernel
from maxi.params import Param, Table, Tree, get
from maxi.sharding import weight_spec

Parts = dict[str, Any]


class Kind(Protocol):
    """How a weight is adapted. Immutable, and equal to one that computes the same."""

    @property
    def takes_embeddings(self) -> bool:
        """Whether it can be beside an embedding or the head."""
        ...

    def parts(self, path: str, param: Param) -> dict[str, Param]:
        """What is learned beside the weight at `path`, by name."""
        ...

    @property
    def starts_from_base(self) -> bool:
        """Whether `start` reads the weight."""
        ...

    def sizes(self) -> dict[str, int]:
        """Sizes of the letters that are the adapter's own."""
        ...

    def constants(self, path: str, param: Param, layers: Sequence[int | None]) -> Parts:
        """What is beside the learned parts and is not learned, [L, ...] for these layers or without L for None."""
        ...

    def start(self, path: str, param: Param, base: Any, parts: Parts) -> Parts:
        """First values, from the weight [L, ...] (None where it is not read) and those that the table would give."""
        ...

    def linear(self, pattern: str, x: jax.Array, base: Any, parts: Parts) -> jax.Array:
        """What `maxi.kernels.linear.linear` would compute with the changed weight."""
        ...

    def bias(self, bias: jax.Array, parts: Parts) -> jax.Array:
        """What is added to the projection, given what was."""
        ...

    def merged(self, path: str, param: Param, base: jax.Array, parts: Parts) -> jax.Array:
        """The changed weight, whole; base and parts may have L in front."""
        ...


class Beside:
    """What most kinds do where they do nothing of their own, see `Kind`."""

    def constants(self, path: str, param: Param, layers: Sequence[int | None]) -> Parts:
        del path, param, layers
        return {}

    def start(self, path: str, param: Param, base: Any, parts: Parts) -> Parts:
        del path, param, base
        return parts

    def bias(self, bias: jax.Array, parts: Parts) -> jax.Array:
        del parts
        return bias


@flax.struct.dataclass
class Adapted:
    """A frozen weight (an array or `Quantised`) and what belongs to it; L stands in front of all of them or of none."""

    base: Any
    parts: Parts
    kind: Any = flax.struct.field(pytree_node=False)
    path: str = flax.struct.field(pytree_node=False)
    param: Param = flax.struct.field(pytree_node=False)

    @property
    def dtype(self) -> Any:
        return self.base.dtype


def linear(pattern: str, x: jax.Array, w: Any) -> jax.Array:
    """`maxi.kernels.linear.linear` for every leaf of a tree of weights."""
    if isinstance(w, Adapted):
        return w.kind.linear(pattern, x, w.base, w.parts)
    return frozen(pattern, x, w) if isinstance(w, Quantised) else kernel(pattern, x, w)


def frozen(pattern: str, x: jax.Array, w: Any) -> jax.Array:
    """`linear` with a weight that gets no gradient: nothing is kept for the backward pass but the weight as it is."""
    return _frozen(pattern, x, w)  # type: ignore[return-value]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen(pattern: str, x: jax.Array, w: Any) -> jax.Array:
    return kernel(pattern, x, whole(w, x.dtype))


def _frozen_fwd(pattern: str, x: jax.Array, w: Any) -> tuple[jax.Array, Any]:
    return kernel(pattern, x, whole(w, x.dtype)), w


def _frozen_bwd(pattern: str, w: Any, dout: jax.Array) -> tuple[jax.Array, None]:
    x, weight, out = pattern.replace("->", ",").split(",")
    return kernel(f"{out},{weight}->{x}", dout, whole(w, dout.dtype)), None


_frozen.defvjp(_frozen_fwd, _frozen_bwd)


def whole(w: Any, dtype: Any) -> jax.Array:
    """One layer's weight as an array in `dtype`: expanded, and with its change where it has one."""
    if isinstance(w, Adapted):
        return w.kind.merged(w.path, w.param, whole(w.base, dtype), {k: p.astype(dtype) for k, p in w.parts.items()})
    return w.expand(dtype) if isinstance(w, Quantised) else w.astype(dtype)


def rows(w: Any, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Rows of an embedding that may be adapted."""
    return w.kind.rows(tokens, w.base, w.parts, dtype) if isinstance(w, Adapted) else w.astype(dtype)[tokens]


def cast(tree: Tree, dtype: Any) -> Tree:
    """The weights of a tree in `dtype`; codes of quantised ones stay codes."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, Quantised) else leaf.astype(dtype), tree, is_leaf=_is_quantised)


def _is_quantised(node: Any) -> bool:
    return isinstance(node, Quantised)


def split_axes(table: Table, tree: Tree) -> Tree:
    """`maxi.params.split_axes` of a tree whose leaves may be adapted or quantised."""
    return table.map(lambda path, param: _axes(param, table.sizes, path, get(tree, path)))


def _axes(param: Param, sizes: Any, path: str, leaf: Any) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if isinstance(leaf, Adapted):
        known, own = leaf.kind.parts(path, param), {**sizes, **leaf.kind.sizes()}
        known |= {f"{name}0": part for name, part in known.items()}  # first values lie as those that are trained
        parts = {name: _axes(known[name], own, path, part) if name in known else -1 for name, part in leaf.parts.items()}
        return replace(leaf, base=_axes(param, sizes, path, leaf.base), parts=parts)
    axis = -1 if mesh.empty else fsdp.split_axis(weight_spec(param.dims, sizes, mesh))
    return replace(leaf, codes=axis, scales=axis, group_scales=-1, mean=-1) if isinstance(leaf, Quantised) else axis
