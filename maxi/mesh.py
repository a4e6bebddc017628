"""Devices into a mesh with the axes of `dims.MESH_AXES`.

Contract: `build` returns a mesh whose sizes multiply to the number of devices, or raises ConfigError before anything
is compiled. The axes are of jax's Auto type on purpose: models carry no shardings, `sharding.einsum` constrains them.
What is split over which axis is `sharding.py`'s matter.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from maxi.dims import MESH_AXES
from maxi.errors import ConfigError
from maxi.sections import MeshConfig


def build(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all `devices` (default: all that jax sees). Raises ConfigError if the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if -1 in sizes or math.prod(sizes) != len(devices):
        product = "x".join(str(size) for size in sizes)
        raise ConfigError(
            f"mesh {product} ({' x '.join(MESH_AXES)}) needs {fixed} devices but there are {len(devices)}",
            "mesh",
            "make the product equal the devices, or set one axis to -1",
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def describe(mesh: Mesh) -> str:
    """One line: the axes, and on what."""
    sizes = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in MESH_AXES)
    first = mesh.devices.flat[0]
    return f"{mesh.size} x {first.device_kind} ({sizes})"


_PEAK_TFLOPS = {
    # dense bfloat16 per jax device, from the vendors' data sheets
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "NVIDIA A100": 312,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
}


def peak_flops(mesh: Mesh) -> float | None:
    """Peak bfloat16 FLOP/s of all devices together; None where the kind is not known (no CPU is)."""
    kind = mesh.devices.flat[0].device_kind
    known = [name for name in _PEAK_TFLOPS if kind.startswith(name)]
    return _PEAK_TFLOPS[max(known, key=len)] * 1e12 * mesh.size if known else None


def memory_in_use(mesh: Mesh) -> float | None:
    """Largest memory in use on a device so far, in bytes; None where the device does not say (CPU)."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    return max((s["peak_bytes_in_use"] for s in stats if s), default=None)
