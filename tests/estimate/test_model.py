"""The model of memory and time: near what libtpu compiled, and right in which way it moves."""

from typing import Any

import pytest

from maxi.aot import model_of
from maxi.config import load
from maxi.errors import ConfigError
from maxi.estimate.layouts import choose, fits, layouts, ranked, smallest_change
from maxi.estimate.memory import by_vocabulary, memory
from maxi.estimate.speed import Seconds, collective_seconds, seconds
from maxi.estimate.work import Layout, Work, work_of
from maxi.hardware import GIB, parse
from tests.estimate.models import work

MINI, QWEN = "configs/mini_qwen_1b_pretrain.yaml", "configs/qwen3_0.6b_pretrain.yaml"
COMPILED: list[tuple[str, str, dict[str, Any], float, float, float]] = [
    # config, topology, layout; GiB at the peak, seconds of XLA's operations and seconds of collectives that block, as
    # libtpu 0.0.52 compiled them (2026-11-22, LOG.md)
    (MINI, "v5e:4x4", {"fsdp": 16, "micro_batches": 12}, 2.24, 4.385, 0.117),
    (MINI, "v5e:4x4", {"replica": 4, "fsdp": 4, "micro_batches": 12}, 5.97, 4.489, 0.437),
    (MINI, "v5e:4x4", {"fsdp": 8, "tensor": 2, "micro_batches": 12}, 3.15, 5.244, 1.532),
    (MINI, "v5e:4x4", {"fsdp": 8, "context": 2, "micro_batches": 12}, 4.05, 4.994, 0.637),
    (MINI, "v5e:4x4", {"fsdp": 16, "micro_batches": 12, "remat": "dots"}, 10.94, 4.558, 0.104),
    (MINI, "v5p:2x2x4", {"fsdp": 16, "micro_batches": 12}, 2.31, 1.959, 0.246),
    (MINI, "v6e:4x4", {"fsdp": 16, "micro_batches": 12}, 2.29, 1.649, 0.246),
    (QWEN, "v5e:4x4", {"fsdp": 16}, 1.45, 0.285, 0.007),
]


def of_config(path: str) -> Work:
    config = load(path)
    size: Any = {"batch_size": config.batch_size, "width": config.seq_len}
    return work_of(model_of(config), config.optim, **size, dtype_bytes=2, sums_tokens=True)


@pytest.mark.parametrize(("path", "topology", "axes", "gib", "operations", "blocking"), COMPILED, ids=str)
def test_it_is_near_what_was_compiled(
    path: str, topology: str, axes: dict[str, Any], gib: float, operations: float, blocking: float
) -> None:
    counted, layout = of_config(path), Layout(**axes)
    took = seconds(counted, layout, parse(topology))
    assert memory(counted, layout).total / GIB == pytest.approx(gib, rel=0.15)
    assert took.matmuls + took.traffic == pytest.approx(operations, rel=0.15)
    assert took.links == pytest.approx(blocking, rel=0.3, abs=0.02)
    assert took.step == pytest.approx(took.matmuls + took.traffic + took.attention + took.links)


def test_what_saves_memory_saves_it() -> None:
    counted, v5e = of_config(MINI), parse("v5e:4x4")
    whole, parts = Layout(fsdp=16, micro_batches=1), Layout(fsdp=16, micro_batches=12)
    assert memory(counted, parts).total < 0.3 * memory(counted, whole).total
    by_remat = [memory(counted, Layout(fsdp=16, micro_batches=12, remat=r)).total for r in ("none", "dots", "full")]
    assert by_remat == sorted(by_remat, reverse=True)
    assert seconds(counted, parts, v5e).step > seconds(counted, whole, v5e).step


def test_the_vocabulary_is_split_where_it_divides() -> None:
    counted = of_config(MINI)  # 151,936 = 128 x 1187
    assert by_vocabulary(counted, Layout(fsdp=128)) and not by_vocabulary(counted, Layout(fsdp=256))
    assert not by_vocabulary(counted, Layout(replica=16))


def test_what_crosses_slices_costs_what_their_network_does() -> None:
    counted = of_config(QWEN)
    one, two = parse("v5e:8x8"), parse("2xv5e:4x8")
    copies, spread = Layout(replica=2, fsdp=32), Layout(fsdp=64)
    assert seconds(counted, copies, one).network == 0 < seconds(counted, copies, two).network
    assert collective_seconds(counted, spread, one)[1].blocking == 0 < collective_seconds(counted, spread, two)[1].blocking
    assert seconds(counted, spread, two).step > seconds(counted, spread, one).step
    half = parse("2xh100:8")  # NCCL's streams hide it, as far as there is something to hide it behind
    assert collective_seconds(counted, Layout(fsdp=16), half)[1].hidden > 0


def test_what_takes_longest_bounds_a_step() -> None:
    assert Seconds(1.0, 0.5, 1.4, 0.0, 0.0).bound == "compute"
    assert Seconds(1.0, 0.0, 1.4, 0.3, 0.0).bound == "memory bandwidth (HBM)"
    assert Seconds(0.1, 0.1, 0.1, 0.3, 0.2).as_dict()["bound"] == "links between chips (ICI, NVLink)"
    assert Seconds(0.1, 0.1, 0.1, 0.3, 0.4).bound == "the network between slices or nodes (DCN)"


def test_every_layout_fits_together_and_none_is_there_twice() -> None:
    counted, topology = work(), parse("v5e:2x4")
    found = list(layouts(counted, topology))
    assert len(set(found)) == len(found) > 50
    for layout in found:
        counted.check(layout)
        assert layout.devices == 8
    assert {layout.tensor for layout in found} == {1, 2}  # two key heads
    assert {layout.context for layout in found} == {1}  # rows of 512
    two = list(layouts(work(width=2048), parse("2xv5e:2x2")))
    assert {layout.tensor * layout.context for layout in two} == {1, 2, 4} and all(layout.devices == 8 for layout in two)


def test_the_best_come_first_and_fit() -> None:
    counted, topology = of_config(MINI), parse("v5e:4x4")
    best = ranked(counted, topology)
    times = [seconds(counted, layout, topology).step for layout in best]
    assert times == sorted(times) and all(fits(counted, layout, topology) for layout in best)
    assert len({(*layout.mesh.values(), layout.remat) for layout in best}) == len(best)
    assert choose(counted, topology) == best[0]
    assert choose(counted, topology, lambda layout: layout.tensor == 2) == next(layout for layout in best if layout.tensor == 2)
    with pytest.raises(ConfigError, match="no layout of this model fits v5e:1x1"):
        choose(counted, parse("v5e:1x1"))


def test_the_smallest_change_is_looked_for_in_order() -> None:
    counted, v5e = of_config(MINI), parse("v5e:4x4")
    for layout, wanted in (
        (Layout(fsdp=16, micro_batches=12), {}),
        (Layout(fsdp=16, micro_batches=12, remat="none"), {"micro_batches": 36}),
        (Layout(replica=16, micro_batches=72), {"mesh.replica": 1, "mesh.fsdp": 16, "micro_batches": 1}),
    ):
        found = smallest_change(counted, layout, v5e)
        assert found is not None and memory(counted, found).total <= 15.75 * GIB
        own = layout.settings()
        assert {key: value for key, value in found.settings().items() if own[key] != value} == wanted
    assert smallest_change(counted, Layout(), parse("v5e:1x1")) is None
