"""Every layout of a step that fits together on so many chips, and the best of them by the model."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from maxi.errors import ConfigError
from maxi.estimate.memory import memory
from maxi.estimate.speed import seconds
from maxi.estimate.work import REMATS, Layout, Work
from maxi.hardware import Topology

Allowed = Callable[[Layout], bool]
"""Which layouts may be chosen: all, or those that leave alone what somebody has settled."""
MOST_TENSOR = 8
"""More devices would share a layer's heads than have fast links in most machines, and few models have more key heads."""
SHORTEST = 512
"""Tokens of a row that a device has at least where rows are split."""
ROOM = 0.92
"""Share of a device's memory that the model may fill: its error, and what a compiler pads."""


def divisors(number: int) -> list[int]:
    """All, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def meshes(work: Work, topology: Topology) -> Iterator[Layout]:
    """Layouts with one micro-batch and full remat, one for every mesh that the sizes allow.

    Layers and rows are split within slices or nodes only.
    """
    chips = topology.chips
    for tensor in (n for n in divisors(chips) if n <= MOST_TENSOR):
        for context in (n for n in divisors(chips // tensor) if n == 1 or work.width // n >= SHORTEST):
            for fsdp in divisors(chips // tensor // context):
                layout = Layout(chips // tensor // context // fsdp, fsdp, context, tensor)
                if topology.within % (tensor * context):
                    continue
                try:
                    work.check(layout)
                except ConfigError:
                    continue
                yield layout


def layouts(work: Work, topology: Topology) -> Iterator[Layout]:
    """All of them: meshes times parts of the batch times what is computed again."""
    for mesh in meshes(work, topology):
        for micro_batches in divisors(work.rows // mesh.rows):
            for remat in REMATS:
                yield replace(mesh, micro_batches=micro_batches, remat=remat)


def fits(work: Work, layout: Layout, topology: Topology) -> bool:
    """By the model, with room for its error."""
    assert topology.chip
    return memory(work, layout).total <= ROOM * topology.chip.memory


def ranked(work: Work, topology: Topology, allowed: Allowed = lambda _: True) -> list[Layout]:
    """Layouts that fit and are allowed, the fastest first; of each mesh and remat only the best number of micro-batches."""
    best: dict[tuple[object, ...], tuple[float, Layout]] = {}
    for layout in filter(allowed, layouts(work, topology)):
        if not fits(work, layout, topology):
            continue
        key, took = (*layout.mesh.values(), layout.remat), seconds(work, layout, topology).step
        if key not in best or took < best[key][0]:
            best[key] = took, layout
    return [layout for _, layout in sorted(best.values(), key=lambda found: found[0])]


def choose(work: Work, topology: Topology, allowed: Allowed = lambda _: True) -> Layout:
    """The fastest allowed layout that fits, for whoever leaves the choice to the machine. Raises ConfigError if none does."""
    found = ranked(work, topology, allowed)
    if not found:
        raise ConfigError(f"no layout of this model fits {topology.name}", "mesh", "take more chips, or chips with more memory")
    return found[0]


def smallest_change(work: Work, layout: Layout, topology: Topology, scale: float = 1.0) -> Layout | None:
    """The layout nearest to this one that fits: first more micro-batches, then more remat, then another mesh.

    `scale` is by how much the model errs here: what a compiler found over what the model says. None: nothing fits.
    """
    chip = topology.chip
    assert chip

    def enough(candidate: Layout) -> bool:
        try:
            work.check(candidate)
        except ConfigError:
            return False
        return scale * memory(work, candidate).total <= chip.memory

    def parts(of: Layout) -> Iterator[Layout]:
        for micro_batches in divisors(work.rows // of.rows):
            if micro_batches >= of.micro_batches:
                yield replace(of, micro_batches=micro_batches)

    more_remat = [replace(layout, remat=remat) for remat in REMATS[REMATS.index(layout.remat) :]]
    for candidates in (parts(layout), *map(parts, more_remat)):
        if (found := next(filter(enough, candidates), None)) is not None:
            return found
    return next((other for other in ranked(work, topology) if enough(other)), None)
