"""One layout of a config on one topology: counted, or compiled for hardware that is not here.

TPU programs are compiled by libtpu and say memory by part and the time the compiler expects. GPU programs are compiled
where jax's CUDA plugin is installed and say memory; their time stays the model's. For the CPU it is the memory alone.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from maxi import aot, mesh
from maxi.config import Config
from maxi.errors import EnvironmentFault
from maxi.estimate import speed
from maxi.estimate.memory import Memory
from maxi.estimate.memory import memory as count_memory
from maxi.estimate.speed import Seconds
from maxi.estimate.work import Layout, Work
from maxi.hardware import GIB, Topology
from maxi.plan import meter, parts
from maxi.sections import ComputeConfig, MeshConfig

DESCRIPTIONS = {"h100": Path(__file__).parent / "h100.txtpb"}
"""GPUs that XLA can compile for without having one, and its description of each (`GpuTargetConfigProto`)."""
DOCUMENT_TOKENS = 512
"""Of the made-up rows whose shapes a step is compiled for; shapes do not depend on it."""


@dataclass(frozen=True)
class Estimate:
    """What a layout takes and how that is known: "analytic" or "compiled"."""

    topology: Topology
    layout: Layout
    memory: Memory
    seconds: Seconds | None
    memory_by: str = "analytic"
    seconds_by: str = "analytic"
    notes: tuple[str, ...] = ()
    text: str | None = None
    account: dict[str, int] | None = None

    @cached_property
    def over(self) -> float:
        """Bytes a device that are missing; 0 or less: it fits. Of the CPU nothing is known."""
        return self.memory.total - self.topology.chip.memory if self.topology.chip else 0.0

    @property
    def fits(self) -> bool:
        return self.over <= 0


def counted(work: Work, layout: Layout, topology: Topology, *notes: str) -> Estimate:
    """By the model alone."""
    seconds = speed.seconds(work, layout, topology) if topology.chip else None
    return Estimate(topology, layout, count_memory(work, layout), seconds, notes=notes)


def why_not_compiled(topology: Topology) -> str | None:
    """Why no program can be compiled for a topology on this machine; None where one can."""
    chip = topology.chip
    if chip is None:
        return None
    if topology.slices > 1:
        return "programs for several slices or nodes are not compiled"
    if chip.platform == "gpu" and chip.name not in DESCRIPTIONS:
        return f"there is no description of a {chip.name} to compile for"
    try:
        with _target(topology):
            return None
    except EnvironmentFault as fault:
        return f"{fault.what} ({fault.fix})"


def compiled(config: Config, work: Work, layout: Layout, topology: Topology) -> Estimate:
    """By compiling the real step; where it does not fit, by the model and what the compiler says is missing."""
    chosen = with_layout(config, layout)
    try:
        with _target(topology) as devices:
            built = aot.program_of(chosen, mesh.build(chosen.mesh, devices))
            done = aot.compile_step(built, *aot.arguments(chosen, built, DOCUMENT_TOKENS), keep_text=True)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(counted(work, layout, topology), str(error))
    if done.text is not None and done.alive is not None:
        memory = parts.from_program(work, layout, done.text, done.alive, done.memory)
    else:
        memory = parts.from_account(work, layout, done.memory)
    found = replace(counted(work, layout, topology), memory=memory, memory_by="compiled", text=done.text, account=done.memory)
    if topology.chip is None or not topology.chip.clock:
        return found
    cost = meter.measure(done.text or "")
    endless = f"{cost.endless} loops are as long as the data wants (attention over split rows), their time is the model's"
    notes = (endless,) if cost.endless else ()
    return replace(found, seconds=_seconds(work, layout, topology, cost), seconds_by="compiled", notes=notes)


def with_layout(config: Config, layout: Layout) -> Config:
    """The config with a layout in place of its own."""
    axes = {**vars(config.mesh), **layout.mesh}
    compute = {**vars(config.compute), "remat": layout.remat}
    names = MeshConfig.__dataclass_fields__, ComputeConfig.__dataclass_fields__
    return replace(
        config,
        mesh=MeshConfig(**{name: axes[name] for name in names[0]}),
        compute=ComputeConfig(**{name: compute[name] for name in names[1]}),
        micro_batches=layout.micro_batches,
    )


@contextmanager
def _target(topology: Topology) -> Iterator[Sequence[Any] | None]:
    """Devices of a topology to compile for; None stands for the CPU's own."""
    chip = topology.chip
    if chip is None:
        yield jax.devices("cpu")
    elif chip.platform == "tpu":
        with aot.tpus(topology.name) as devices:
            yield devices
    else:
        with aot.gpus(chip.name, 1, topology.chips, DESCRIPTIONS[chip.name].read_text("utf-8")) as devices:
            yield devices


def _too_large(guess: Estimate, error: str) -> Estimate:
    """An estimate of what a compiler refused: its own figure of what it takes, in the model's proportions."""
    used = re.search(r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)", error)
    if used is None:
        what = (error.splitlines() or [""])[0][:160]
        return replace(guess, notes=(f"the compiler says that it does not fit: {what}",))
    scale = {"K": 1 << 10, "M": 1 << 20, "G": GIB}
    takes = float(used.group(1)) * scale[used.group(2)]
    has = float(used.group(3)) * scale[used.group(4)]
    assert guess.topology.chip
    missing = takes - has + guess.topology.chip.memory - guess.memory.total
    memory = replace(guess.memory, other=guess.memory.other + missing)
    return replace(guess, memory=memory, memory_by="compiled", notes=("the compiler refused it, so its time is the model's",))


def _seconds(work: Work, layout: Layout, topology: Topology, cost: meter.Cost) -> Seconds:
    chip = topology.chip
    assert chip
    matmuls = speed.matmul_flops(work, layout) / chip.peak
    operations, attention = cost.cycles / chip.clock, speed.attention_seconds(work, layout, chip)
    links = speed.Sending((cost.sent - cost.sent_blocking) / chip.link, cost.sent_blocking / chip.link)
    return Seconds(
        matmuls=min(matmuls, operations),
        attention=attention,
        traffic=max(0.0, operations - matmuls),
        links=links.beyond(operations + attention),
        network=0.0,
    )
