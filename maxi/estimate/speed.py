"""Seconds that a step takes, by what takes them: a roofline with efficiencies that were read off compiled programs.

Matmuls run at a share of the chip's peak, everything between them at the speed of the chip's memory, and collectives at
that of its links; those that run beside the computation cost only what is longer than it. Rows count as one document each,
so attention over shorter documents takes less. Input, checkpoints and evaluations are not in it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from maxi.estimate.work import STATE_BYTES, Layout, Work
from maxi.hardware import Chip, Topology

MATMUL = {"v5e": 0.9, "v5p": 0.72, "v6e": 0.6, "h100": 0.6, "h200": 0.6, "a100": 0.75}
"""Share of the peak that matmuls reach by themselves. TPUs: fitted to what libtpu estimates; GPUs: assumed, not measured."""
ATTENTION = {"tpu": 0.72, "gpu": 0.5}
"""Of attention with heads of 128, by its kernel's schedule (tpu: 92 Mcycles for 28 layers, LOG.md; gpu: assumed)."""
RING = 4.5
"""How much longer attention takes over split rows: a pair of blocks costs three times splash's, our kernel 0.65 (LOG.md)."""
FULL_HEAD = 128
"""Smaller heads leave a part of the matrix unit idle."""
TRAFFIC = (8, 3, 3.5)
"""Elements that a layer reads and writes a token and pass outside matmuls, as multiples of D, N H + 2 K H and F."""
BACKWARD = 2
"""Passes that the backward pass counts for; what is computed again counts once more."""
RECOMPUTED = {"full": 1.0, "dots": 0.0, "none": 0.0}
"""Share of a layer's matmuls that the backward pass repeats."""
PASSES = {"full": 1.0, "dots": 5.0, "none": 8.0}
"""Traffic beside one forward and the backward pass: computing again, or writing down and reading what was kept."""
PARTITIONED = 0.13
"""What the partitioner's copies add to everything but attention where it splits layers or rows."""
WEIGHTS = 6
"""How often a micro-batch writes or reads whole weights or their gradients: gathered, multiplied, sent."""
BLOCKING, BLOCKING_IN_GROUPS = 0.15, 0.5
"""Share of the bytes that nothing runs beside although collectives may: of all devices together, and of groups of them."""

WAITS, AS_SUMS = ("v5p", "v6e"), 64
"""Chips whose compiled steps wait for every gather; devices of fsdp from which these are compiled as sums (seen on v5p)."""


@dataclass(frozen=True)
class Seconds:
    """Of one step on every device. They add up to `step`: what is hidden behind the computation is left out."""

    matmuls: float
    """At the chip's peak: what is left is lost to everything else."""
    attention: float
    traffic: float
    """What computing takes beyond `matmuls`: memory bandwidth, layouts, vector units."""
    links: float
    """Collectives within a slice or node that nothing hides."""
    network: float
    """The same between slices or nodes."""

    @property
    def step(self) -> float:
        return self.matmuls + self.attention + self.traffic + self.links + self.network

    @property
    def bound(self) -> str:
        """What a step mostly waits for."""
        groups = {
            "compute": self.matmuls + self.attention,
            "memory bandwidth (HBM)": self.traffic,
            "links between chips (ICI, NVLink)": self.links,
            "the network between slices or nodes (DCN)": self.network,
        }
        return max(groups, key=lambda name: groups[name])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "step": self.step, "bound": self.bound}


@dataclass(frozen=True)
class Sending:
    """Seconds of collectives: those that run beside the computation, and those that it waits for."""

    hidden: float
    blocking: float

    def beyond(self, computing: float) -> float:
        """What they add to so many seconds of computing."""
        return max(0.0, self.hidden - computing) + self.blocking


def seconds(work: Work, layout: Layout, topology: Topology) -> Seconds:
    """Of a layout that `Work.check` has let pass, on chips that are known."""
    chip = topology.chip
    assert chip is not None, "nothing is known of the speed of a CPU"
    matmuls = matmul_flops(work, layout) / chip.peak
    attention = attention_seconds(work, layout, chip)
    traffic = matmuls * (1 / MATMUL[chip.name] - 1) + traffic_bytes(work, layout) / chip.bandwidth
    if layout.tensor * layout.context > 1:
        traffic += PARTITIONED * (matmuls + traffic)
    links, network = collective_seconds(work, layout, topology)
    computing = matmuls + attention + traffic
    return Seconds(matmuls, attention, traffic, links.beyond(computing), network.beyond(computing))


def matmul_flops(work: Work, layout: Layout) -> float:
    """Of a step, a device: forward, backward, and what is computed again."""
    layers = work.layer_flops * (3 + RECOMPUTED[layout.remat]) - work.layers_spared
    head = work.head_flops * (3 if work.gradient_with_value else 4) - work.head_spared
    return work.tokens * (layers + head) / layout.devices


def attention_seconds(work: Work, layout: Layout, chip: Chip) -> float:
    """Of a step: two matmuls forward, five backward; the forward pass again unless all is kept."""
    passes = (2 * (1 + (layout.remat != "none")) + 5) / 2
    share = ATTENTION[chip.platform] * min(1.0, work.model.table.sizes["H"] / FULL_HEAD)
    slower = RING if layout.context > 1 else 1.0
    return slower * work.tokens * work.attention_flops * passes / layout.devices / (chip.peak * share)


def traffic_bytes(work: Work, layout: Layout) -> float:
    """What a device's memory moves outside matmuls: between them, and for the optimizer."""
    sizes = work.model.table.sizes
    hidden, heads, inner = TRAFFIC
    split = inner * sizes["F"] + heads * (sizes["N"] + 2 * sizes["K"]) * sizes["H"]
    token = len(work.model.layers) * (hidden * sizes["D"] + split / layout.tensor)
    passes = 1 + BACKWARD + PASSES[layout.remat]
    tokens = work.tokens / (layout.rows * layout.context)
    held = work.held(layout)
    weights = 2 * held.state + (2 + 2 * layout.micro_batches) * held.parameters
    travels = WEIGHTS * layout.micro_batches * work.matrices / layout.tensor * (layout.fsdp > 1)
    return (tokens * token * passes + travels) * work.dtype_bytes + weights * STATE_BYTES


def collective_seconds(work: Work, layout: Layout, topology: Topology) -> tuple[Sending, Sending]:
    """Of a step: collectives within slices or nodes, and those between them."""
    chip = topology.chip
    assert chip is not None
    sizes = work.model.table.sizes
    layers, tokens = len(work.model.layers), work.tokens / (layout.rows * layout.context)
    weights = work.dtype_bytes * work.matrices / layout.tensor * (layout.fsdp - 1) / layout.fsdp * layout.micro_batches
    gathers = weights * (2 if layout.remat != "none" else 1.5)
    hidden, blocking = _weights(gathers, weights, layout, chip)
    across = max(1, min(topology.slices, layout.replica))
    crossing = Sending(0.0, 0.0)
    if topology.slices > across:  # fsdp itself spans slices or nodes, whose chips share the way between them
        far = (gathers + weights) * (topology.slices - 1) / topology.slices / min(topology.within, layout.fsdp)
        crossing = Sending(far / chip.network, 0.0) if chip.platform == "gpu" else Sending(0.0, far / chip.network)
    if layout.context > 1:  # keys and values go round: forward, again, and backward with float32 gradients
        turns = 1 + (layout.remat != "none") + 3
        heads = 2 * sizes["K"] * sizes["H"] / layout.tensor
        hidden += turns * (layout.context - 1) * layers * tokens * heads * work.dtype_bytes
    if layout.tensor > 1:  # sums of activations behind attention and MLP: forward, again and backward
        sums = (6 + 2 * (layout.remat == "full")) * layers * tokens * sizes["D"] * work.dtype_bytes
        blocking += 2 * sums * (layout.tensor - 1) / layout.tensor
    gradients = 2 * STATE_BYTES * work.held(layout).parameters
    inside = layout.replica // across
    blocking += gradients * (inside - 1) / inside
    crossing = Sending(crossing.hidden, crossing.blocking + gradients * (across - 1) / across / chip.network)
    return Sending(hidden / chip.link, blocking / chip.link), crossing


def _weights(gathers: float, scatters: float, layout: Layout, chip: Chip) -> tuple[float, float]:
    """Bytes of weights and gradients under fsdp that travel beside the computation, and that it waits for: what compiled
    steps do (LOG.md), on GPUs what NCCL's streams allow."""
    if chip.name in WAITS:  # and over many devices gathers become sums, which send twice as much
        return scatters, gathers * (2 if layout.fsdp >= AS_SUMS else 1)
    share = BLOCKING if layout.devices == layout.fsdp else BLOCKING_IN_GROUPS
    if chip.platform == "tpu" and layout.devices != layout.fsdp:  # see maxi/compiler.py
        return gathers * (1 - share), gathers * share + scatters
    return (gathers + scatters) * (1 - share), (gathers + scatters) * share
