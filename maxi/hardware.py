"""Chips, what they are bought in, and what that costs: numbers from data sheets and price lists, each with its source.

Contract: `parse` reads a topology as people write it (v5e:4x4, v5e-16, v5p-128, 2xv5e:16x16, h100:8) or raises
ConfigError. Nothing here asks a network, a cloud or a device; prices are of `PRICES_OF` and `--price` goes before them.
How fast a program gets on a chip is not here but in `maxi/estimate`.
"""

import math
import re
from dataclasses import dataclass

from maxi.errors import ConfigError

GIB = 1 << 30
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""Slices of v5e and v6e."""
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
"""Slices of v5p up to 4,096 chips."""
PRICES_OF = "2026-11-22"
"""When the prices below were read. They change, and differ by region and contract: check yours."""
GOOGLE = "Google's list price for us-central1, as SkyPilot's catalog of it says (v8, gcp/vms.csv)"
LAMBDA = "Lambda's list price of instances of eight (lambda.ai/instances, read 2026-09-20)"


@dataclass(frozen=True)
class Chip:
    """One chip as jax sees it, or for GPUs one GPU. Bandwidths are bytes a second, prices dollars an hour."""

    name: str
    kinds: tuple[str, ...]
    """How jax's `device_kind` begins."""
    platform: str
    peak: float
    """Dense bfloat16 FLOP/s of a jax device."""
    memory: float
    """Bytes that programs can have: what the chip has less what the runtime keeps."""
    bandwidth: float
    """Of the chip's memory."""
    link: float
    """Of collectives within a slice or node: a TPU's links along one axis of the torus in both directions, a GPU's NVLink."""
    network: float
    """Of the network between slices or nodes, a chip's share of it."""
    per_host: int
    shapes: tuple[str, ...] = ()
    """What a TPU comes in as a slice; a v4's two cores are devices by themselves to libtpu, so it is not planned for."""
    clock: float = 0.0
    """Cycles a second, for estimates in cycles; 0: its compiler makes none."""
    cores: int = 1
    """What vendors count in names such as v5p-128: cores, two a chip."""
    price: float | None = None
    spot: float | None = None
    source: str = ""


CHIPS = {
    chip.name: chip
    for chip in (
        # cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: peak, memory, bandwidth of memory, interconnect and data centre's network.
        # Links at 90 % of an axis: 2 x 50 GB/s (v5e), 2 x 100 (v5p, v6e). Memory as libtpu's messages say is left of it.
        Chip(
            name="v5e",
            kinds=("TPU v5 lite", "TPU v5e"),
            platform="tpu",
            peak=197e12,
            memory=15.75 * GIB,
            bandwidth=8.19e11,
            link=9e10,
            network=3.1e9,
            per_host=4,
            shapes=FLAT,
            clock=1.5e9,
            price=1.20,
            spot=0.245,
            source=GOOGLE,
        ),
        Chip(
            name="v6e",
            kinds=("TPU v6 lite", "TPU v6e"),
            platform="tpu",
            peak=918e12,
            memory=31.25 * GIB,
            bandwidth=1.638e12,
            link=1.8e11,
            network=1.25e10,
            per_host=4,
            shapes=FLAT,
            clock=1.75e9,
            price=2.70,
            spot=0.544,
            source=GOOGLE,
        ),
        Chip(
            name="v5p",
            kinds=("TPU v5p", "TPU v5"),
            platform="tpu",
            peak=459e12,
            memory=95.74 * GIB,
            bandwidth=2.765e12,
            link=1.8e11,
            network=6.2e9,
            per_host=4,
            shapes=CUBES,
            clock=1.75e9,
            cores=2,
            price=4.20,
            spot=0.836,
            source=GOOGLE,
        ),
        Chip(
            name="v4",
            kinds=("TPU v4",),
            platform="tpu",
            peak=275e12,
            memory=30.75 * GIB,
            bandwidth=1.2e12,
            link=9e10,
            network=6.2e9,
            per_host=4,
        ),
        # NVIDIA's data sheets (SXM). NVLink at 80 % of one direction, 400 Gbit/s of network a GPU (A100: 200) at 90 %; memory
        # less 6 %: context, NCCL's buffers.
        Chip(
            name="h100",
            kinds=("NVIDIA H100",),
            platform="gpu",
            peak=989e12,
            memory=75 * GIB,
            bandwidth=3.35e12,
            link=3.6e11,
            network=4.5e10,
            per_host=8,
            price=3.99,
            source=LAMBDA,
        ),
        Chip(
            name="h200",
            kinds=("NVIDIA H200",),
            platform="gpu",
            peak=989e12,
            memory=132 * GIB,
            bandwidth=4.8e12,
            link=3.6e11,
            network=4.5e10,
            per_host=8,
        ),
        Chip(
            name="a100",
            kinds=("NVIDIA A100",),
            platform="gpu",
            peak=312e12,
            memory=75 * GIB,
            bandwidth=2.04e12,
            link=2.4e11,
            network=2.25e10,
            per_host=8,
            price=2.79,
            source=LAMBDA,
        ),
    )
}

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
"""GPUs: parts of a node of eight, and nodes."""


@dataclass(frozen=True)
class Topology:
    """`slices` times the same slice of TPUs, or nodes of GPUs; or the CPU that is here."""

    chip: Chip | None
    """None: the CPU."""
    chips: int
    """Altogether."""
    shape: str = ""
    """A TPU slice's, such as 4x4."""
    slices: int = 1
    """TPU slices, or nodes of GPUs: what a slower network connects."""

    @property
    def name(self) -> str:
        if self.chip is None:
            return "cpu"
        if not self.shape:
            return f"{self.chip.name}:{self.chips}"
        return f"{self.slices}x" * (self.slices > 1) + f"{self.chip.name}:{self.shape}"

    @property
    def sold_as(self) -> str:
        """What a cloud calls it, such as v5p-128; chips times two where it counts cores."""
        if self.chip is None:
            return "the CPU here"
        if not self.shape:
            return f"{self.chips} x {self.chip.name.upper()}"
        each = self.chips // self.slices
        return f"{self.slices} x " * (self.slices > 1) + f"{self.chip.name}-{each * self.chip.cores}"

    @property
    def within(self) -> int:
        """Chips that the fast network connects."""
        return self.chips // self.slices


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls so; None for one that is not known, such as a CPU."""
    found = [(kind, chip) for chip in CHIPS.values() for kind in chip.kinds if device_kind.startswith(kind)]
    return max(found, key=lambda kind_chip: len(kind_chip[0]))[1] if found else None


def topology_of(device_kind: str, count: int, slices: int = 1) -> Topology | None:
    """The topology of `count` devices that jax calls so, in `slices` slices (TPUs) or nodes; None for chips not known."""
    chip = chip_of(device_kind)
    if chip is None or count % slices:
        return None
    each = count // slices
    shape = next((shape for shape in chip.shapes if math.prod(map(int, shape.split("x"))) == each), "")
    return Topology(chip, count, shape, slices)


def parse(text: str) -> Topology:
    """A topology from what a user writes. Raises ConfigError with the ones there are."""
    if text == "cpu":
        return Topology(None, 1)
    found = re.fullmatch(r"(?:(\d{1,3})x)?([a-z]\w*?)[:-](\d+(?:x\d+)*)", text.strip().lower().replace("v5litepod", "v5e"))
    known = {name: chip for name, chip in CHIPS.items() if chip.shapes or chip.platform == "gpu"}
    chip = known.get(found.group(2)) if found else None
    if found is None or chip is None:
        raise _unknown(f"no topology {text!r}", f"write cpu, or one of {', '.join(known)} such as v5e:4x4, v5p-128 or h100:8")
    slices, size = int(found.group(1) or 1), found.group(3)
    if chip.platform == "gpu":
        return _gpus(chip, slices, size, text)
    shapes = {math.prod(map(int, shape.split("x"))): shape for shape in chip.shapes}
    if "x" not in size:  # a name such as v5p-128
        if int(size) % chip.cores or int(size) // chip.cores not in shapes:
            raise _unknown(f"no {chip.name}-{size}", f"there are {', '.join(f'{chip.name}-{n * chip.cores}' for n in shapes)}")
        size = shapes[int(size) // chip.cores]
    if size not in shapes.values() or slices < 1:
        raise _unknown(f"no topology {text!r}", f"{chip.name} comes as {', '.join(shapes.values())}")
    return Topology(chip, slices * math.prod(map(int, size.split("x"))), size, slices)


def _gpus(chip: Chip, nodes: int, size: str, text: str) -> Topology:
    each = int(size) if size.isdigit() else 0
    count = nodes * each
    if not count or (count > chip.per_host and count % chip.per_host) or (nodes > 1 and each % chip.per_host):
        raise _unknown(f"no topology {text!r}", f"write {chip.name}:N with N up to {chip.per_host}, or a multiple of it")
    return Topology(chip, count, slices=max(1, count // chip.per_host))


def _unknown(what: str, fix: str) -> ConfigError:
    return ConfigError(what, "--topology", fix)


def sold() -> list[Topology]:
    """Every topology of one slice that has a price, and nodes of GPUs: what `--goal` and `--budget` choose from."""
    found: list[Topology] = []
    for chip in CHIPS.values():
        if chip.price is None:
            continue
        sizes = [str(n) for n in NODES] if chip.platform == "gpu" else list(chip.shapes)
        found += [parse(f"{chip.name}:{size}") for size in sizes]
    return found
