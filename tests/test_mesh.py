"""Meshes: -1 fills, auto follows its rule, products are checked, slices lie outermost, known devices have a peak."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from maxi import mesh, program
from maxi.errors import ConfigError
from maxi.models import from_hf_config
from maxi.sections import MeshConfig
from tests.test_step import SIZES


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


@dataclass(frozen=True)
class Fake:
    """A device as jax describes one of several slices, with nothing behind it."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def slices(count: int, each: int) -> list[Any]:
    return [Fake(number, number // each, number // 4) for number in reversed(range(count * each))]


@pytest.mark.parametrize(
    ("axes", "count", "rows", "sizes", "why"),
    [
        ({}, 1, 64, (1, 8, 1, 1), "fsdp takes what is left"),
        ({}, 4, 64, (4, 8, 1, 1), "a replica on each of 4 slices or nodes, fsdp takes what is left"),
        ({"replica": 1}, 4, 64, (1, 32, 1, 1), "fsdp takes what is left"),
        ({"fsdp": 8}, 4, 64, (4, 8, 1, 1), "a replica on each of 4 slices or nodes"),
        ({"tensor": 2}, 2, 64, (2, 4, 1, 2), "a replica on each of 2 slices or nodes, fsdp takes what is left"),
        ({"fsdp": 32}, 4, 64, (1, 32, 1, 1), "leave no room for a replica on each of 4"),
        ({}, 2, 4, (2, 2, 4, 1), "each row in 4 parts, since 4 rows are too few for 16 devices"),
        ({"context": 1}, 2, 4, (2, 8, 1, 1), "a replica"),
        ({"context": 2, "tensor": 2, "fsdp": 4}, 1, 1, None, ""),
    ],
    ids=str,
)
def test_the_layout_that_auto_chooses(
    axes: dict[str, int], count: int, rows: int, sizes: tuple[int, ...] | None, why: str
) -> None:
    if sizes is None:
        with pytest.raises(ConfigError, match=r"mesh 1x4x2x2 .* needs 16 devices but there are 8"):
            mesh.choose(MeshConfig(**axes), slices(count, 8), rows, 64)
        return
    layout = mesh.choose(MeshConfig(**axes), slices(count, 8), rows, 64)
    assert layout.sizes == sizes and why in layout.why


@pytest.mark.parametrize(
    ("axes", "outer"), [({}, 0), ({"replica": 4}, 0), ({"replica": 1}, 1), ({"replica": 1, "fsdp": 1, "tensor": -1}, 3)]
)
def test_slices_meet_on_the_outermost_axis_that_can(axes: dict[str, int], outer: int, caplog: pytest.LogCaptureFixture) -> None:
    """Along every other axis, neighbours are of one slice."""
    with caplog.at_level("WARNING", logger="maxi"):
        grid = mesh.build(MeshConfig(**axes), slices(2, 8)).devices
    where = np.vectorize(lambda device: device.slice_index)(grid)
    assert sorted(device.id for device in grid.flat) == list(range(16))
    for axis in range(4):
        across = (np.diff(where, axis=axis) != 0).sum()
        assert across == (16 // grid.shape[axis] if axis == outer else 0)
    assert ("over the slow network" in caplog.text) == (outer == 3)


def test_slices_of_two_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="the slices or nodes have 4 to 8 devices"):
        mesh.choose(MeshConfig(), slices(2, 8)[4:])


@pytest.mark.parametrize(
    ("axes", "sizes", "words"),
    [
        ({"tensor": 8}, {"num_attention_heads": 4}, "query heads 4 does not divide over tensor 8"),
        ({"tensor": 4}, {"num_key_value_heads": 2}, "key/value heads 2 does not divide over tensor 4"),
        (
            {"tensor": 4},
            {"num_key_value_heads": 4, "intermediate_size": 50},
            "intermediate_size 50 does not divide over tensor 4",
        ),
        ({"tensor": 2}, {"vocab_size": 97}, "vocab_size 97 does not divide over tensor 2"),
        ({"fsdp": 8}, {"hidden_size": 36, "vocab_size": 97}, "vocab_size 97 x hidden_size 36 does not divide over fsdp 8"),
        ({"replica": 2}, {"batch_size": 4}, "batch_size 4 does not divide into 8, mesh.replica x mesh.fsdp x micro_batches"),
        ({}, {"batch_size": 8, "micro_batches": 2}, "batch_size 8 does not divide into 16"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_compiled(
    axes: dict[str, int], sizes: dict[str, int], words: str
) -> None:
    fields = SIZES | {"num_attention_heads": 8} | sizes
    batch, micro = fields.pop("batch_size", 8), fields.pop("micro_batches", 1)
    with pytest.raises(ConfigError, match=words):
        program.check_sizes(from_hf_config(fields), mesh.build(MeshConfig(**axes)), batch, 64, micro)


@pytest.mark.parametrize(
    ("kind", "tflops"), [("NVIDIA H100 80GB HBM3", 989), ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459), ("cpu", None)]
)
def test_peak(kind: str, tflops: float | None) -> None:
    four: Any = SimpleNamespace(devices=SimpleNamespace(flat=[SimpleNamespace(device_kind=kind)]), size=4)
    assert mesh.peak_flops(four) == (None if tflops is None else 4 * tflops * 1e12)
