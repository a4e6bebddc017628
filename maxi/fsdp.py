"""Fully sharded data parallelism by hand: weights gathered whole when they are needed, gradients summed where they arise.

Left to the partitioner, a sharded weight may become a windowed matmul, a blocking all-reduce or a gather too late. Here
the step runs inside a `jax.shard_map` that takes the axes `replica` and `fsdp` by hand (`by_rows`): every device sees
its own rows and its own part of every weight, and only these functions move anything between devices. The axes
`tensor` and `context` stay automatic inside, so the same code composes with them. ZeRO-3: Rajbhandari et al.,
arXiv:1910.02054.

Outside such a region (one device, evaluation) everything here leaves weights as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import PartitionSpec

from maxi.sharding import axes_of, restricted

AXIS = "fsdp"
ROWS = ("replica", AXIS)
GATHERED = "gathered"
"""Name of whole weights, for remat policies: they are never kept for the backward pass."""

Tree = Any
Axes = Any
"""A tree like the weights' with the axis each is split along, -1 where every device holds it whole."""
How = tuple[tuple[int, ...], Any]
"""The leaves of such a tree, and the dtype in which weights travel."""


def by_hand() -> bool:
    """Whether the code being traced runs inside a region that `by_rows` made."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def parts() -> int:
    """Number of devices that a weight is split over, seen from inside a region."""
    return jax.sharding.get_abstract_mesh().shape[AXIS]


def by_rows(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on each device's rows and parts of weights; itself where the mesh in scope splits neither.

    Specs are trees of `PartitionSpec`; only what they say of the two axes counts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["replica"] * mesh.shape[AXIS] == 1:
        return function
    only = partial(jax.tree.map, partial(restricted, to=ROWS), is_leaf=lambda s: isinstance(s, PartitionSpec))
    return jax.shard_map(function, in_specs=only(in_specs), out_specs=only(out_specs), axis_names=set(ROWS), check_vma=False)


def split_axis(spec: PartitionSpec) -> int:
    """Along which axis a weight with this sharding is split, or -1."""
    return next((i for i, entry in enumerate(spec) if AXIS in axes_of(entry)), -1)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def whole(weight: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """The whole of a weight that is split along `axis`, in `dtype`, as which it travels. The gradient, summed over the
    devices' rows in float32, is split again."""
    return gathered(weight, axis, dtype)


def gathered(weight: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """`whole` without a gradient; integers travel as they are."""
    travels = weight.astype(dtype) if jnp.issubdtype(weight.dtype, jnp.floating) else weight
    return lax.all_gather(travels, AXIS, axis=axis, tiled=True)


def scattered(gradient: jax.Array, axis: int) -> jax.Array:
    """Float32 sum over the devices of this device's part along `axis`.

    The parts travel as they are and are added up in float32 where they belong: half the bytes of a reduction in
    float32 and better rounding than one in bfloat16; on a TPU it also runs beside the computation, where a
    reduce-scatter over 16 devices compiles to a blocking all-reduce.
    """
    if axis < 0:
        return gradient.astype(jnp.float32)
    n, shape = parts(), gradient.shape
    pieces = gradient.reshape(*shape[:axis], n, shape[axis] // n, *shape[axis + 1 :])
    return lax.all_to_all(pieces, AXIS, axis, axis).astype(jnp.float32).sum(axis)


def _whole_fwd(weight: jax.Array, axis: int, dtype: Any) -> tuple[jax.Array, None]:
    return gathered(weight, axis, dtype), None


def _whole_bwd(axis: int, dtype: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    del dtype
    return (scattered(gradient, axis),)


whole.defvjp(_whole_fwd, _whole_bwd)


def all_whole(weights: Tree, axes: Axes, dtype: Any) -> Tree:
    """`whole` of every leaf of float32 weights, named `GATHERED`; the weights themselves outside a region."""
    if not by_hand():
        return weights
    return jax.tree.map(lambda w, axis: checkpoint_name(whole(w, axis, dtype), GATHERED) if axis >= 0 else w, weights, axes)


def scan_ahead(
    layer: Callable[[jax.Array, Tree, Any], jax.Array], weights: Tree, axes: Axes, x: jax.Array, extras: Any, dtype: Any
) -> jax.Array:
    """`layer(x, weights, extras)` for every slice of `weights` along their first axis, the next slice's weights
    travelling while this one computes, forward and backward.

    Only the x between layers is kept for the backward pass, which computes each layer again. `axes` are those of one
    slice; `extras` are any arrays that have no gradient; split weights travel in `dtype`. Weights that nobody asks the
    gradient of get none.
    """
    return _scan_ahead(layer, (tuple(jax.tree.leaves(axes)), dtype), weights, x, extras)


def _at(weights: Tree, i: jax.Array) -> Tree:
    return jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, i, 0, keepdims=False), weights)


def _gather(weights: Tree, i: jax.Array, how: How) -> list[jax.Array]:
    """The split leaves of slice `i`, whole."""
    axes, dtype = how
    leaves = jax.tree.leaves(_at(weights, i))
    return [gathered(leaf, axis, dtype) for leaf, axis in zip(leaves, axes, strict=True) if axis >= 0]


def _merge(weights: Tree, i: jax.Array, how: How, travelled: list[jax.Array]) -> Tree:
    axes, _ = how
    leaves, treedef = jax.tree.flatten(_at(weights, i))
    arrived = iter(travelled)
    return treedef.unflatten([next(arrived) if axis >= 0 else leaf for leaf, axis in zip(leaves, axes, strict=True)])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan_ahead(layer, how, weights, x, extras):
    return _ahead(layer, how, weights, x, extras)[0]


def _ahead(layer, how, weights, x, extras):
    depth = jax.tree.leaves(weights)[0].shape[0]

    def body(carry, i):
        x, here = carry
        ahead = _gather(weights, jnp.minimum(i + 1, depth - 1), how)
        return (layer(x, _merge(weights, i, how, here), extras), ahead), x

    (out, last), kept = lax.scan(body, (x, _gather(weights, jnp.int32(0), how)), jnp.arange(depth))
    return out, (weights, kept, extras, last)


@flax.struct.dataclass
class _Learned:
    """Which leaves of the weights get a gradient, as a constant among what is kept for the backward pass."""

    flags: tuple[bool, ...] = flax.struct.field(pytree_node=False)


def _ahead_fwd(layer, how, *arguments):
    weights, x, extras = jax.tree.map(lambda a: a.value, arguments, is_leaf=_is_primal)
    learned = _Learned(tuple(a.perturbed for a in jax.tree.leaves(arguments[0], is_leaf=_is_primal)))
    out, saved = _ahead(layer, how, weights, x, extras)
    return out, (*saved, learned)


def _is_primal(node: Any) -> bool:
    return isinstance(node, CustomVJPPrimal)


def _ahead_bwd(layer, how, saved, dout):
    weights, kept, extras, last, learned = saved
    leaves, treedef = jax.tree.flatten(weights)
    depth = leaves[0].shape[0]
    axes = [axis for axis, is_learned in zip(how[0], learned.flags, strict=True) if is_learned]

    def body(carry, i_x):
        (dx, here), (i, x) = carry, i_x
        ahead = _gather(weights, jnp.maximum(i - 1, 0), how)
        now = jax.tree.leaves(_merge(weights, i, how, here))

        def of_learned(x, some):
            left = iter(some)
            all_of_them = [next(left) if flag else w for flag, w in zip(learned.flags, now, strict=True)]
            return layer(x, treedef.unflatten(all_of_them), extras)

        some = [w for flag, w in zip(learned.flags, now, strict=True) if flag]
        dx, dsome = jax.vjp(of_learned, x, some)[1](dx)
        return (dx, ahead), [scattered(g, axis) for g, axis in zip(dsome, axes, strict=True)]

    (dx, _), grads = lax.scan(body, (dout, last), (jnp.arange(depth), kept), reverse=True)
    left = iter(grads)
    return treedef.unflatten([next(left) if flag else None for flag in learned.flags]), dx, None


_scan_ahead.defvjp(_ahead_fwd, _ahead_bwd, symbolic_zeros=True)


def summed(sums: Tree, axes: Axes | None = None) -> Tree:
    """Every leaf added up over the devices that hold other rows; itself outside a region. `axes`: of gradients, whose
    split leaves have been added up over `fsdp` where they arose."""
    if not by_hand():
        return sums
    if axes is None:
        return lax.psum(sums, ROWS)
    rest = ("replica",) if jax.sharding.get_abstract_mesh().shape["replica"] > 1 else ()
    return jax.tree.map(lambda total, axis: lax.psum(total, ROWS if axis < 0 else rest), sums, axes)
