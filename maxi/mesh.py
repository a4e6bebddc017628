"""Devices into a mesh with the axes of `dims.MESH_AXES`.

Contract: `build` returns a mesh whose sizes multiply to the number of devices, or raises ConfigError before anything
is compiled. The axes are of jax's Auto type on purpose: models carry no shardings, `sharding.einsum` constrains them.
What is split over which axis is `sharding.py`'s matter.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from maxi.config import MeshConfig
from maxi.dims import MESH_AXES
from maxi.errors import ConfigError


def build(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (default: all that jax sees). Raises ConfigError if the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if -1 in sizes or math.prod(sizes) != len(devices):
        product = "x".join(str(size) for size in sizes)
        raise ConfigError(
            f"mesh {product} (replica x fsdp x tensor) needs {fixed} devices but there are {len(devices)}",
            "mesh",
            "make the product equal the devices, or set one axis to -1",
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def describe(mesh: Mesh) -> str:
    """One line: the axes, and on what."""
    sizes = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in MESH_AXES)
    first = mesh.devices.flat[0]
    return f"{mesh.size} x {first.device_kind} ({sizes})"
