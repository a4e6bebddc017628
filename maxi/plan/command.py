"""`maxi plan CONFIG`: does it fit, how long does it take, what does it cost, and which layout or hardware is better.

Contract: reads the config and the model's config, and nothing else; nothing is trained. Each choice is printed with its
reason, each figure with how it is known. Raises ConfigError for what cannot be planned, before anything is compiled.
"""

import math
from pathlib import Path
from typing import Any

import jax

from maxi import hardware
from maxi.config import Config
from maxi.errors import ConfigError, EnvironmentFault
from maxi.estimate.layouts import ranked, smallest_change
from maxi.estimate.memory import memory
from maxi.estimate.work import Layout, layout_of
from maxi.figures import check_writable, keep, write
from maxi.hardware import Topology, sold
from maxi.plan import goals, report
from maxi.plan.compiled import Estimate, compiled, counted, why_not_compiled
from maxi.plan.goals import Goal
from maxi.plan.report import say
from maxi.plan.run import Outcome, Run, outcome, run_of
from maxi.plan.search import search as search_layouts
from maxi.runtime import without_cache


def plan(
    config: Config,
    *,
    topology: str | None = None,
    search: bool = False,
    goal: str | None = None,
    budget: float | None = None,
    price: float | None = None,
    tokens: float | None = None,
    json_out: str | None = None,
    dump_hlo: str | None = None,
) -> Outcome:
    """Plans a config's run and prints it; returns what is said of the layout that is chosen.

    `topology`: the hardware, by default the CPU here, or with `goal` (hours=24) or `budget` (dollars) the cheapest that
    meets them. `search` looks for the best layout. `price`: dollars a chip and hour. `tokens`: how many the data has, for
    configs with epochs. The figures go to the file `json_out` too, the program and its memory to the folder `dump_hlo`.
    """
    wanted = goals.parse(goal, budget)
    check_writable(json_out)
    _check(wanted, topology, price, search)
    target = hardware.parse(topology) if topology is not None else Topology(None, 1)
    run = run_of(config, target.chip is None and not wanted, tokens)
    report.about(config, run)
    met: list[Outcome] = []
    reason, own_only = ("--topology" if topology else "the default; --topology names others"), not search
    if wanted and topology is None:
        cheapest, met = goals.choose(run, wanted)
        report.offers(met)
        target, own_only = cheapest.estimate.topology, False
        reason = f"the cheapest of {len(met)} that do it in {wanted.describe()}"
    if target.chip is None:
        target = Topology(None, len(jax.devices("cpu")))
    report.about_topology(target, reason)
    with without_cache():
        if search:
            chosen, others = _searched(config, run, target, price)
        else:
            chosen, others = _one(config, run, target, price, own_only), []
    _conclude(config, run, chosen, wanted, price)
    _keep(chosen, others, met, run, json_out, dump_hlo)
    return chosen


def _check(wanted: Goal, topology: str | None, price: float | None, search: bool) -> None:
    """What cannot be asked together. Raises ConfigError."""
    if price is not None and not (0 < price < math.inf):
        raise ConfigError(f"a price of {price:g}", "--price", "give dollars a chip and hour, above 0")
    if price is not None and topology in (None, "cpu"):
        raise ConfigError("a price is of one kind of chip", "--price", "name it with --topology")
    if topology in (None, "cpu") and (search and not wanted):
        what = "how fast a CPU is with a layout is not known"
        raise ConfigError(what, "--search", "name chips with --topology, such as v5e:4x4")
    if topology == "cpu" and wanted:
        raise ConfigError("how long a run takes on a CPU is not known", "--goal, --budget", "leave out --topology")


def _own_layout(config: Config, run: Run, target: Topology) -> Layout:
    """The layout that the config asks for there. Raises ConfigError where it cannot be."""
    shape = (target.chips, target.slices, config.micro_batches, config.compute)
    layout = layout_of(config.mesh, run.work, *shape, on_cpu=target.chip is None)
    run.work.check(layout)
    return layout


def _one(config: Config, run: Run, target: Topology, price: float | None, own_only: bool) -> Outcome:
    """The config's own layout, or without `own_only` the best by the model, compiled where that can be."""
    if own_only:
        try:
            layout = _own_layout(config, run, target)
        except ConfigError as error:
            best = ranked(run.work, target)[:1] if target.chip else []
            hint = " ".join(f"{key}={value}" for layout in best for key, value in layout.settings().items())
            fix = f"{error.fix}; this fits {target.name}: {hint}" if hint else error.fix
            raise ConfigError(error.what, error.where, fix) from None
        whose = "the config's own; --search looks for better ones" if target.chip else "the config's own"
    else:
        layout = ranked(run.work, target)[0]
        whose = "the best by the model"
    say(f"layout: {layout.describe()} ({whose})")
    if reason := why_not_compiled(target):
        say(f"compiled: no, {reason}; all figures are the model's (analytic)")
        return outcome(run, counted(run.work, layout, target), price)
    say("compiling the step (a minute or two on one core for TPUs) ...")
    return outcome(run, compiled(config, run.work, layout, target), price)


def _searched(config: Config, run: Run, target: Topology, price: float | None) -> tuple[Outcome, list[Outcome]]:
    try:
        own = _own_layout(config, run, target)
        say(f"layout: {own.describe()} is the config's own")
    except ConfigError as error:
        own = None
        say(f"layout: the config's own cannot run there, {error.what}")
    found = [outcome(run, e, price) for e in search_layouts(config, run, own, target, say)]
    report.ranking(found)
    best = found[0]
    known = "compiled" if best.estimate.seconds_by == "compiled" else "analytic"
    say(f"chosen: {best.estimate.layout.describe()}, the fastest that fits ({known})")
    report.paste(config, best.estimate.layout)
    return best, found


def _conclude(config: Config, run: Run, chosen: Outcome, wanted: Goal, price: float | None) -> None:
    """What is said of the layout that was chosen."""
    del config
    found = chosen.estimate
    report.estimate(chosen, price=price)
    change = larger = None
    if not found.fits:
        scale = found.memory.total / memory(run.work, found.layout).total
        change = smallest_change(run.work, found.layout, found.topology, scale)
        larger = None if change else _larger(run, found)
    report.fit(found, change, larger)
    if wanted:
        verdict = "meets" if wanted.met(chosen) else "misses"
        say(f"goal: {found.topology.name} {verdict} {wanted.describe()} ({found.seconds_by})")


def _larger(run: Run, found: Estimate) -> Topology | None:
    """The smallest topology of the same chips that some layout fits."""
    same = [t for t in sold() if t.chip == found.topology.chip and t.chips > found.topology.chips]
    return next((topology for topology in sorted(same, key=lambda t: t.chips) if ranked(run.work, topology)), None)


def _keep(
    chosen: Outcome, others: list[Outcome], met: list[Outcome], run: Run, json_out: str | None, dump_hlo: str | None
) -> None:
    """The figures and the program, where they were asked for. Raises EnvironmentFault where there is no program."""
    if json_out is not None:
        figures: dict[str, Any] = {
            "flops_per_token": run.work.flops_per_token,
            "tokens_per_step": run.work.tokens,
            "steps": run.steps,
            "prices_of": hardware.PRICES_OF,
            "plan": chosen.as_dict(),
            "ranking": [o.as_dict() for o in others],
            "topologies": [o.as_dict() for o in met],
        }
        keep(figures, json_out)
        say(f"figures: {json_out}")
    if dump_hlo is None:
        return
    if chosen.estimate.text is None:
        raise EnvironmentFault("no program was compiled", "--dump-hlo", "see above why; leave it out")
    write(Path(dump_hlo) / "step.hlo.txt", chosen.estimate.text)
    keep(chosen.estimate.account, Path(dump_hlo) / "memory.json")
    say(f"program: {Path(dump_hlo) / 'step.hlo.txt'}")
