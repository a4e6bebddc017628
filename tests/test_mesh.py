"""Meshes: -1 fills, products are checked, known devices have a peak."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from maxi import mesh
from maxi.errors import ConfigError
from maxi.sections import MeshConfig


@pytest.mark.parametrize(
    ("axes", "devices", "shape"),
    [
        ({}, 8, (1, 8, 1, 1)),
        ({"tensor": 2}, 8, (1, 4, 1, 2)),
        ({"replica": -1, "fsdp": 2, "tensor": 2}, 8, (2, 2, 1, 2)),
        ({"context": 4}, 8, (1, 2, 4, 1)),
        ({"fsdp": 1}, 1, (1, 1, 1, 1)),
    ],
    ids=str,
)
def test_sizes(axes: dict[str, int], devices: int, shape: tuple[int, ...]) -> None:
    assert tuple(mesh.build(MeshConfig(**axes), jax.devices()[:devices]).shape.values()) == shape


@pytest.mark.parametrize("axes", [{"fsdp": 3}, {"tensor": 16}, {"fsdp": 4, "tensor": 4}, {"context": 3}], ids=str)
def test_products_that_do_not_fit(axes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"mesh .* needs \d+ devices but there are 8"):
        mesh.build(MeshConfig(**axes), jax.devices())


@pytest.mark.parametrize(
    ("kind", "tflops"), [("NVIDIA H100 80GB HBM3", 989), ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459), ("cpu", None)]
)
def test_peak(kind: str, tflops: float | None) -> None:
    four: Any = SimpleNamespace(devices=SimpleNamespace(flat=[SimpleNamespace(device_kind=kind)]), size=4)
    assert mesh.peak_flops(four) == (None if tflops is None else 4 * tflops * 1e12)
