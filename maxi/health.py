"""Whether weights are fit to be saved: one pass over them says if all are finite and if all copies of each are the same.

A weight that is split over some mesh axes has copies along the others, which must hold the same bits for ever. Each device
sums what it holds, as integers with a multiplier by place, so that one flipped bit anywhere changes the sum; sums of copies
are then compared on the host. The pass reads every weight once and moves a few numbers.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

_ODD = 2654435761
"""Knuth's multiplicative hash (TAOCP 6.4): odd, so that multiplying by it loses nothing modulo 2^32."""


@dataclass(frozen=True)
class Findings:
    """`finite`: all weights are; `differing`: each weight whose copies are not the same, with the devices in the minority;
    `digest`: changes when any weight does."""

    finite: bool
    differing: tuple[str, ...]
    digest: bytes


def weights_of(state: Any) -> dict[str, Any]:
    """What is looked at of a state, or of its shardings: the weights, and their moving average where there is one."""
    return {"params": state.params} | ({} if state.ema is None else {"ema": state.ema})


class Health:
    """`health(weights) -> Findings` for a tree of arrays over `mesh`; `weights` have the shardings `where`."""

    def __init__(self, mesh: Mesh, where: Any):
        self._mesh, self._where = mesh, where
        specs = jax.tree.map(lambda sharding: sharding.spec, where)
        sums = jax.shard_map(
            partial(_of_device, tuple(mesh.axis_names)),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=PartitionSpec(),
            check_vma=False,  # gathered sums are the same everywhere, which is not seen of them
        )
        self._sums = jax.jit(sums)

    def __call__(self, weights: Any) -> Findings:
        found = np.asarray(jax.device_get(self._sums(weights)))  # [devices, leaves, 2]
        by_leaf = found.transpose(1, 0, 2)
        leaves = jax.tree_util.tree_leaves_with_path(weights)
        places = jax.tree.leaves(self._where)
        devices = list(self._mesh.devices.flat)
        differing = []
        for (path, leaf), sharding, sums in zip(leaves, places, by_leaf[:, :, 0], strict=True):
            copies: dict[str, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
            parts = sharding.devices_indices_map(leaf.shape)
            for device, value in zip(devices, sums, strict=True):
                copies[str(parts[device])][int(value)].append(device)
            for values in (values for values in copies.values() if len(values) > 1):
                fewest = min(map(len, values.values()))  # of two copies that differ, both
                those = (device for group in values.values() if len(group) == fewest for device in group)
                names = ", ".join(f"{device.platform}:{device.id} of process {device.process_index}" for device in those)
                differing.append(f"{jax.tree_util.keystr(path)} on {names}")
        return Findings(bool(by_leaf[:, :, 1].all()), tuple(differing), by_leaf[:, :, 0].tobytes())


def _of_device(axes: tuple[str, ...], weights: Any) -> jax.Array:
    """uint32 [devices, leaves, 2], of what each device holds of each leaf: its sum, and whether it is finite."""
    each = [jnp.stack([_sum(leaf), jnp.isfinite(leaf).all().astype(jnp.uint32)]) for leaf in jax.tree.leaves(weights)]
    return jax.lax.all_gather(jnp.stack(each), axes)


def _sum(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).reshape(-1)
    place = jax.lax.iota(jnp.uint32, bits.size)
    return jnp.sum(bits * (place * jnp.uint32(_ODD) | jnp.uint32(1)), dtype=jnp.uint32)
