"""Hardware: topologies are read as people write them, everything else is refused in one line."""

import pytest

from maxi.errors import ConfigError
from maxi.hardware import CHIPS, chip_of, parse, sold, topology_of


@pytest.mark.parametrize(
    ("text", "name", "sold_as", "chips", "slices"),
    [
        ("v5e:4x4", "v5e:4x4", "v5e-16", 16, 1),
        ("v5e-16", "v5e:4x4", "v5e-16", 16, 1),
        ("v5litepod-256", "v5e:16x16", "v5e-256", 256, 1),
        ("v5p-128", "v5p:4x4x4", "v5p-128", 64, 1),
        ("v5p:8x8x8", "v5p:8x8x8", "v5p-1024", 512, 1),
        ("v6e-8", "v6e:2x4", "v6e-8", 8, 1),
        ("2xv5e:16x16", "2xv5e:16x16", "2 x v5e-256", 512, 2),
        ("h100:8", "h100:8", "8 x H100", 8, 1),
        ("H100-4", "h100:4", "4 x H100", 4, 1),
        ("2xh100:8", "h100:16", "16 x H100", 16, 2),
        ("h100:64", "h100:64", "64 x H100", 64, 8),
        ("cpu", "cpu", "the CPU here", 1, 1),
    ],
    ids=lambda value: str(value),
)
def test_topologies(text: str, name: str, sold_as: str, chips: int, slices: int) -> None:
    found = parse(text)
    assert (found.name, found.sold_as, found.chips, found.slices) == (name, sold_as, chips, slices)
    assert parse(found.name) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5e:3x4", "v5e comes as 1x1, 2x2"),
        ("v5e:4x4x4", "v5e comes as"),
        ("v5p-7", "there are v5p-8, v5p-16"),
        ("v9:2", "write cpu, or one of v5e"),
        ("v4:2x2x1", "write cpu, or one of v5e"),
        ("h100:12", "h100:N with N up to 8, or a multiple of it"),
        ("h100:0", "h100:N"),
        ("h100:2x2", "h100:N"),
        ("0xv5e:4x4", "no topology"),
        ("", "no topology ''"),
        ("v5e:", "no topology"),
    ],
)
def test_others_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(text)


def test_what_is_sold_has_a_price_and_its_source() -> None:
    topologies = sold()
    assert len({topology.name for topology in topologies}) == len(topologies) > 30
    for topology in topologies:
        assert topology.chip and topology.chip.price and topology.chip.source and parse(topology.name) == topology
        assert topology.chip.spot is None or topology.chip.spot < topology.chip.price


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v4", "v4"), ("cpu", None)]
)
def test_chips_are_known_by_what_jax_calls_them(kind: str, name: str | None) -> None:
    assert chip_of(kind) == (CHIPS[name] if name else None)


def test_devices_that_are_here_make_a_topology() -> None:
    assert topology_of("TPU v5 lite", 16) == parse("v5e:4x4") and topology_of("TPU v5", 128, 2) == parse("2xv5p-128")
    assert topology_of("NVIDIA H100 80GB HBM3", 16, 2) == parse("2xh100:8")
    assert topology_of("cpu", 8) is None and topology_of("TPU v5 lite", 7, 2) is None
