"""What is split over which mesh axis: two dicts, one for weights and one for activations.

Both map letters of the alphabet to mesh axes; a letter in neither stays whole. `einsum` reads its own pattern and
constrains its result, so models carry no annotations. Without a mesh in scope (`jax.set_mesh`) nothing is
constrained, which is how one device and the notebook API run.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

WEIGHTS: dict[str, str] = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
ACTIVATIONS: dict[str, str | tuple[str, ...]] = {
    "B": ("replica", "fsdp"),
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
}


def weight_spec(dims: str) -> PartitionSpec:
    """How a weight with these dimensions is split.

    Vectors over D (norms) stay whole on every device: splitting them would cost a collective and save nothing.
    """
    letters = dims.removeprefix("L")
    if letters == "D":
        return PartitionSpec()
    return PartitionSpec(*(WEIGHTS.get(letter) for letter in dims))


def activation_spec(dims: str) -> PartitionSpec:
    """How an activation with these dimensions is split."""
    return PartitionSpec(*(ACTIVATIONS.get(letter) for letter in dims))


def constrain(array: jax.Array, dims: str) -> jax.Array:
    """`array` with the sharding its letters ask for, under the mesh in scope; itself without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, activation_spec(dims))


def einsum(pattern: str, *operands: jax.Array, preferred_element_type: Any = None) -> jax.Array:
    """`jnp.einsum` whose result is sharded by its own letters."""
    out = jnp.einsum(pattern, *operands, preferred_element_type=preferred_element_type)
    return constrain(out, pattern.split("->")[1])


def data_shards() -> int:
    """Over how many devices a batch is split under the mesh in scope; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["replica"] * mesh.shape["fsdp"]
