"""Devices into a mesh with the axes of `dims.MESH_AXES`.

Contract: `build` returns a mesh whose sizes multiply to the number of devices, or raises ConfigError before anything
is compiled. The axes are of jax's Auto type on purpose: models carry no shardings, `sharding.einsum` constrains them.
What is split over which axis is `sharding.py`'s matter.

Devices that a fast network joins make an island: a TPU slice, a node of GPUs. The outermost axes that can go between
islands do, so that only they use the slow network.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from maxi.dims import MESH_AXES
from maxi.errors import ConfigError
from maxi.hardware import chip_of
from maxi.sections import MeshConfig

log = logging.getLogger("maxi")


@dataclass(frozen=True)
class Layout:
    """The size of every axis, in the order of `MESH_AXES`, and why those that were left to maxi are what they are."""

    sizes: tuple[int, ...]
    why: str


def build(
    config: MeshConfig, devices: Sequence[Any] | None = None, rows: int | None = None, seq_len: int | None = None
) -> Mesh:
    """A mesh of all `devices` (default: all that jax sees); says why it is laid out as it is where there was a choice.

    `rows` of `seq_len` tokens each go through it at once, if that is known. Raises ConfigError if the sizes do not fit.
    """
    devices = jax.devices() if devices is None else devices
    layout = choose(config, devices, rows, seq_len)
    if len(devices) > 1:
        log.info("mesh: %s: %s", ", ".join(map(" ".join, zip(MESH_AXES, map(str, layout.sizes), strict=True))), layout.why)
    return _arrange(layout.sizes, devices)


def choose(config: MeshConfig, devices: Sequence[Any], rows: int | None = None, seq_len: int | None = None) -> Layout:
    """The sizes that `config` asks for. What is `auto` is decided by one rule.

    `replica` is the number of islands, so that only gradients cross the slow network, once a step. `context` is 1
    unless there are fewer rows than devices to take them, then the least that gives every device a part of one.
    The axis that is -1 takes the rest. Raises ConfigError if that does not come to the number of devices.
    """
    sizes: dict[str, Any] = {axis: getattr(config, axis) for axis in MESH_AXES}
    islands, why = len(_islands(devices)), []
    filler = next((axis for axis, size in sizes.items() if size == -1), None)

    def left() -> int:
        """What the axes that are known leave to the others; 0 where they do not divide the devices."""
        taken = math.prod(size for size in sizes.values() if isinstance(size, int) and size != -1)
        return len(devices) // taken if len(devices) % taken == 0 else 0

    if sizes["replica"] == "auto":
        fits = left() % islands == 0 and (filler or left() == islands)
        sizes["replica"] = islands if fits else 1
        if islands > 1:
            room = f"a replica on each of {islands} slices or nodes"
            why.append(room if fits else f"one replica, since the other axes leave no room for {room}")
    if sizes["context"] == "auto":
        sizes["context"] = _context(left(), sizes["replica"], rows, seq_len) if filler == "fsdp" else 1
        if sizes["context"] > 1:
            why.append(f"each row in {sizes['context']} parts, since {rows} rows are too few for {len(devices)} devices")
    product, taken = "x".join(map(str, sizes.values())), math.prod(size for size in sizes.values() if size != -1)
    if filler and left():
        sizes[filler] = left()
        why.append(f"{filler} takes what is left")
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh {product} ({' x '.join(MESH_AXES)}) needs {taken} devices but there are {len(devices)}",
            "mesh",
            "make the product equal the devices, or set one axis to -1",
        )
    return Layout(tuple(sizes.values()), ", ".join(why) or "as configured")


def _context(room: int, replicas: int, rows: int | None, seq_len: int | None) -> int:
    """Into how many parts to split rows, so that `room` devices of each replica have as much of them as any other."""
    if not rows or not seq_len:
        return 1
    fit = (c for c in range(1, room + 1) if room % c == 0 and rows % (replicas * (room // c)) == 0)
    parts = next(fit, 1)
    return parts if parts == 1 or seq_len % (2 * parts) == 0 else 1


def _islands(devices: Sequence[Any]) -> list[list[Any]]:
    """Devices by slice (jax counts a node of GPUs as one), in order."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    sizes = sorted({len(members) for members in found.values()})
    if len(sizes) > 1:
        what = f"the slices or nodes have {sizes[0]} to {sizes[-1]} devices"
        raise ConfigError(what, "mesh", "use slices or nodes of one size")
    return [found[number] for number in sorted(found)]


def _arrange(sizes: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
    """The devices in such an order that neighbours on the inner axes are neighbours in the network."""
    types, left = (AxisType.Auto,) * len(sizes), len(_islands(devices))
    if left == 1:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices)
    between = []
    for size in sizes:
        between.append(math.gcd(left, size))
        left //= between[-1]
    inside = [size // outer for size, outer in zip(sizes, between, strict=True)]
    if crossing := [
        axis for axis, outer in zip(MESH_AXES, between, strict=True) if outer > 1 and axis in ("context", "tensor")
    ]:
        log.warning("warning: mesh.%s goes between slices or nodes, over the slow network", crossing[0])
    # v5e has no torus that an axis would have to follow, so jax splits its physical axes there and so do we
    split = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")
    grid = mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=split)
    return Mesh(np.asarray(grid), MESH_AXES, axis_types=types)


def describe(mesh: Mesh) -> str:
    """One line: the axes, and on what."""
    sizes = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in MESH_AXES)
    first = mesh.devices.flat[0]
    return f"{mesh.size} x {first.device_kind} ({sizes})"


def peak_flops(mesh: Mesh) -> float | None:
    """Peak bfloat16 FLOP/s of all devices together; None where the kind is not known (no CPU is)."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return chip.peak * mesh.size if chip else None


def memory_in_use(mesh: Mesh) -> float | None:
    """Largest memory in use on a device so far, in bytes; None where the device does not say (CPU)."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    return max((s["peak_bytes_in_use"] for s in stats if s), default=None)
