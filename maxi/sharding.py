"""What is split over which mesh axis: two dicts, one for weights and one for activations.

Both map letters of the alphabet to mesh axes; a letter in neither stays whole. `einsum` reads its own pattern and
constrains its result, so models carry no annotations. Without a mesh in scope (`jax.set_mesh`) nothing is
constrained, which is how one device and the notebook API run. Inside a `jax.shard_map` that took some axes by hand,
arrays are split over those already and only the others count.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from maxi.dims import DIMS, MESH_AXES
from maxi.errors import ConfigError

WEIGHTS: dict[str, str] = {"N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
ACTIVATIONS: dict[str, str | tuple[str, ...]] = {
    "B": ("replica", "fsdp"),
    "T": "context",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
}


def weight_spec(dims: str, sizes: Mapping[str, int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a weight with these dimensions is split: letters over their axes as `WEIGHTS` says, and one letter over fsdp.

    That letter is the first that its axis leaves whole and that divides: parts of the outermost dimension lie together
    in memory, whole tiles of them. Vectors (norms, biases) stay whole: splitting them would cost a collective and save
    nothing. Raises ConfigError where a size does not divide.
    """
    letters = dims.removeprefix("L")
    axes: dict[str, str] = {}
    for letter in letters:
        axis = WEIGHTS.get(letter)
        if axis is not None and mesh.shape[axis] > 1:
            if sizes[letter] % mesh.shape[axis]:
                raise _does_not_divide(f"{DIMS[letter]} {sizes[letter]}", axis, mesh)
            axes[letter] = axis
    parts = mesh.shape["fsdp"]
    if "D" in letters and len(letters) > 1 and parts > 1:
        free = [letter for letter in letters if letter not in axes and sizes[letter] % parts == 0]
        if not free:
            raise _does_not_divide(" x ".join(f"{DIMS[letter]} {sizes[letter]}" for letter in letters), "fsdp", mesh)
        axes[free[0]] = "fsdp"
    return PartitionSpec(*(axes.get(letter) for letter in dims))


def _does_not_divide(what: str, axis: str, mesh: Mesh | AbstractMesh) -> ConfigError:
    return ConfigError(f"{what} does not divide over {axis} {mesh.shape[axis]}", "mesh", f"change mesh.{axis}")


def activation_spec(dims: str) -> PartitionSpec:
    """How an activation with these dimensions is split, over the axes that nobody took by hand."""
    left = set(MESH_AXES) - set(jax.sharding.get_abstract_mesh().manual_axes)
    return restricted(PartitionSpec(*map(ACTIVATIONS.get, dims)), left)


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one dimension is split over, by its entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def restricted(spec: PartitionSpec, to: Collection[str]) -> PartitionSpec:
    """What a spec says of the axes in `to`."""

    def keep(entry: Any) -> Any:
        left = tuple(axis for axis in axes_of(entry) if axis in to)
        return left if len(left) > 1 else left[0] if left else None

    return PartitionSpec(*map(keep, spec))


def constrain(array: jax.Array, dims: str) -> jax.Array:
    """`array` with the sharding its letters ask for, under the mesh in scope; itself without one.

    A dimension that does not divide, such as the one token of a decoding step over `context`, stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or len(mesh.manual_axes) == len(mesh.axis_names):
        return array
    divided = zip(array.shape, dims, activation_spec(dims), strict=True)
    spec = PartitionSpec(*(axes if size % shards(letter) == 0 else None for size, letter, axes in divided))
    return jax.lax.with_sharding_constraint(array, spec)


def einsum(pattern: str, *operands: jax.Array, preferred_element_type: Any = None) -> jax.Array:
    """`jnp.einsum` whose result is sharded by its own letters."""
    out = jnp.einsum(pattern, *operands, preferred_element_type=preferred_element_type)
    return constrain(out, pattern.split("->")[1])


def local(function: Callable[..., Any], inputs: Sequence[str], outputs: str | Sequence[str]) -> Callable[..., Any]:
    """`function` on every device's own part of its arguments: how code that no compiler can split runs under a mesh.

    `inputs` and `outputs` name the letters of each array, "" for one that every device holds whole. Without a mesh, or
    when all its axes were taken by hand already, that is `function` itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if mesh.empty or mesh.size == 1 or not free:
        return function
    out_specs = activation_spec(outputs) if isinstance(outputs, str) else tuple(map(activation_spec, outputs))
    in_specs = tuple(map(activation_spec, inputs))
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False)


def shards(letter: str) -> int:
    """Over how many devices the mesh in scope still splits arrays along this letter; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[axis] for axis in axes_of(activation_spec(letter)[0]))


def fetch(array: Any) -> np.ndarray:
    """The whole of an array in this process' memory. Where several processes hold it, all must ask for it; until it is
    here, every device holds all of it."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(_whole_on(array.sharding.mesh)(array))  # type: ignore[attr-defined]


@functools.cache
def _whole_on(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))
