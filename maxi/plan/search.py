"""The best layout of a step on one topology: all are counted, the best few are compiled."""

import time
from collections.abc import Callable

from maxi.config import Config
from maxi.errors import ConfigError
from maxi.estimate.layouts import layouts, ranked
from maxi.estimate.work import Layout
from maxi.hardware import Topology
from maxi.plan.compiled import Estimate, compiled, counted, why_not_compiled
from maxi.plan.run import Run

COMPILED = 4
"""Layouts that are compiled: the config's own, where it can run, and the best by the model."""
BUDGET_S = 600.0
"""No compilation begins that would end later than this, by how long the last one took."""
SHOWN = 8
"""Layouts of a ranking."""
Say = Callable[[str], None]


def search(config: Config, run: Run, own: Layout | None, topology: Topology, say: Say) -> list[Estimate]:
    """Layouts, the fastest first, those that fit before those that do not. Raises ConfigError where none fits.

    `own` is the config's layout, None where it cannot run there. `say` gets a line for each thing done.
    """
    work, started = run.work, time.monotonic()
    total = sum(1 for _ in layouts(work, topology))
    best = ranked(work, topology)
    say(f"search: {total:,} layouts counted, {len(best)} of them fit (of each mesh and remat only the best micro_batches)")
    if not best:
        raise ConfigError(f"no layout of this model fits {topology.name}", "--topology", "take more chips, or larger ones")
    found = {layout: counted(work, layout, topology) for layout in best[: 2 * SHOWN]}
    if own is not None:
        found.setdefault(own, counted(work, own, topology))
    if reason := why_not_compiled(topology):
        say(f"compiled: nothing, {reason}; all figures are the model's (analytic)")
        return _by_speed(found)[:SHOWN]
    first = [own] if own is not None and found[own].fits else []
    chosen = (first + [layout for layout in best if layout not in first])[:COMPILED]
    took = 0.0
    for number, layout in enumerate(chosen, 1):
        spent = time.monotonic() - started
        if spent + took > BUDGET_S:
            say(f"compiled: {number - 1} of {len(chosen)}, the rest would take longer than {BUDGET_S:.0f} s together")
            break
        whose = "the config's own" if layout == own else "by the model among the best"
        say(f"compiling {number} of {len(chosen)}: {layout.describe()} ({whose})")
        found[layout] = compiled(config, work, layout, topology)
        took = time.monotonic() - started - spent
        seconds, held = found[layout].seconds, found[layout].memory.total / 2**30
        fit = "" if found[layout].fits else ", does not fit"
        say(f"    {seconds.step if seconds else 0:.3f} s a step, {held:.2f} GiB a device{fit} ({took:.0f} s)")
    return _by_speed(found)[: max(SHOWN, COMPILED)]


def _by_speed(found: dict[Layout, Estimate]) -> list[Estimate]:
    """Compiled ones first: what is only counted is not better known than they are."""

    def key(e: Estimate) -> tuple[bool, bool, float]:
        return not e.fits, e.seconds_by != "compiled" and e.memory_by != "compiled", e.seconds.step if e.seconds else 0.0

    return sorted(found.values(), key=key)
