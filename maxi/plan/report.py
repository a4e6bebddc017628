"""A plan as people read it: lines and tables, each figure with how it is known."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from maxi.config import Config
from maxi.estimate.memory import Memory
from maxi.estimate.speed import Seconds
from maxi.estimate.work import Layout
from maxi.figures import console
from maxi.hardware import GIB, PRICES_OF, Topology
from maxi.params import count
from maxi.plan.compiled import Estimate
from maxi.plan.run import Outcome, Run

MEMORY = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "weights": "weights gathered or cast",
    "activations": "activations",
    "logits": "logits",
    "other": "padding, gaps, code",
}
SECONDS = {
    "matmuls": "matmuls at the chip's peak",
    "attention": "attention",
    "traffic": "memory traffic (HBM), vector units",
    "links": "collectives over ICI or NVLink that nothing hides",
    "network": "collectives between slices or nodes",
}


def say(text: str) -> None:
    """A line, at once: plans take minutes."""
    print(text, flush=True)


def about(config: Config, run: Run) -> None:
    """What is planned."""
    model, work = run.work.model, run.work
    layers = f"{len(model.layers)} layers, vocabulary {model.vocab_size:,}"
    say(f"model: {model.family}, {count(model.table):,} parameters, {layers}; {work.flops_per_token / 1e9:.3f} GFLOPs a token")
    if work.tuning.needs_base:
        say(f"trained: {count(work.tuning.table):,} parameters, {work.tuning.about}")
    batch = f"{work.rows:,} rows of {work.width:,} tokens a step"
    if run.steps is None or run.tokens is None:
        say(f"run: {batch}, {config.epochs:g} epochs of data that is not read: --tokens says how many it has")
    else:
        say(f"run: {run.steps:,} steps, {batch}: {run.tokens / 1e9:,.2f} B tokens")


def about_topology(topology: Topology, reason: str) -> None:
    """The hardware."""
    chip = topology.chip
    if chip is None:
        say(f"topology: {topology.chips} CPU device{'s' * (topology.chips > 1)} of this machine ({reason})")
        return
    each = f"{chip.memory / GIB:.2f} GiB and {chip.peak / 1e12:.0f} TFLOP/s each"
    say(f"topology: {topology.name} ({topology.sold_as}), {topology.chips} chips, {each} ({reason})")


def estimate(o: Outcome, *, price: float | None) -> None:
    """One estimate in full."""
    found = o.estimate
    console().print(_table("memory a device at its peak, GiB", MEMORY, found.memory, GIB, found.memory_by))
    if found.seconds is not None:
        title = f"a step, ms: bound by {found.seconds.bound}"
        console().print(_table(title, SECONDS, found.seconds, 1e-3, found.seconds_by))
        assert o.tokens_per_s and o.mfu
        say(f"speed: {found.seconds.step:.3f} s a step, {o.tokens_per_s:,.0f} tokens/s, {o.mfu:.1%} of the peak (MFU)")
    else:
        say("speed: not known of a CPU, `maxi bench step` measures it")
    for note in found.notes:
        say(f"note: {note}")
    money(o, price)


def money(o: Outcome, price: float | None) -> None:
    """Hours and dollars to the end of the run."""
    chip, chips = o.estimate.topology.chip, o.estimate.topology.chips
    if o.hours is None or chip is None:
        return
    line = f"to the end: {o.hours:,.1f} hours"
    if price is not None:
        line += f", ${o.dollars:,.0f} at ${price:g} a chip and hour (--price)"
    elif o.dollars is not None:
        line += f", ${o.dollars:,.0f} at ${chip.price:g} a chip and hour"
        line += f", ${o.spot_dollars:,.0f} at spot prices (${chip.spot:g})" if o.spot_dollars is not None else ""
        line += f" [{chip.source}; read {PRICES_OF}, check yours]"
    else:
        line += f"; no price is known for {chip.name}: --price X, dollars a chip and hour ({chips} chips)"
    say(line)


def _table(title: str, names: dict[str, str], parts: Memory | Seconds, unit: float, by: str) -> Table:
    values: dict[str, Any] = {name: getattr(parts, name) for name in names}
    total = sum(values.values())
    table = Table(title=f"{title} ({by})", title_justify="left")
    table.add_column("part")
    table.add_column("GiB" if unit == GIB else "ms", justify="right")
    table.add_column("share", justify="right")
    digits = 2 if unit == GIB else 1
    for name, label in names.items():
        table.add_row(label, f"{values[name] / unit:,.{digits}f}", f"{values[name] / total:.0%}")
    table.add_section()
    table.add_row("together", f"{total / unit:,.{digits}f}", "")
    return table


def ranking(outcomes: Sequence[Outcome]) -> None:
    """Layouts in order."""
    table = Table(title="layouts, best first", title_justify="left")
    for name in ("", "layout", "GiB", "s a step", "MFU", "bound by", "hours", "$", "known by"):
        table.add_column(name, justify="left" if name in ("layout", "bound by", "known by") else "right")
    for place, o in enumerate(outcomes, 1):
        found, seconds = o.estimate, o.estimate.seconds
        table.add_row(
            str(place),
            found.layout.describe(),
            f"{found.memory.total / GIB:.2f}" + (" too much" if not found.fits else ""),
            f"{seconds.step:.3f}" if seconds else "",
            f"{o.mfu:.1%}" if o.mfu else "",
            seconds.bound if seconds else "",
            _figure(o.hours, 1),
            _figure(o.dollars, 0),
            found.seconds_by,
        )
    console().print(table)


def offers(outcomes: Sequence[Outcome], most: int = 12) -> None:
    """Topologies, the cheapest first."""
    table = Table(title=f"topologies that meet it, the cheapest first (analytic; prices of {PRICES_OF})", title_justify="left")
    for name in ("topology", "sold as", "hours", "$", "$ spot", "MFU", "layout"):
        table.add_column(name, justify="left" if name in ("topology", "sold as", "layout") else "right")
    for o in outcomes[:most]:
        found = o.estimate
        cells = (found.topology.name, found.topology.sold_as, _figure(o.hours, 1), _figure(o.dollars, 0))
        table.add_row(*cells, _figure(o.spot_dollars, 0), f"{o.mfu:.1%}" if o.mfu else "", found.layout.describe())
    console().print(table)
    if len(outcomes) > most:
        say(f"... and {len(outcomes) - most} more")


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def paste(config: Config, layout: Layout) -> None:
    """The layout as YAML, and as overrides."""
    say("in place of the config's own keys:\n")
    say(yaml(config, layout))
    say("or on the command line: " + " ".join(f"{key}={value}" for key, value in layout.settings().items()))


def yaml(config: Config, layout: Layout) -> str:
    """Lines of a config that set a layout; what else its `compute` section says is kept."""
    axes = ", ".join(f"{axis}: {size}" for axis, size in layout.mesh.items())
    compute = {**{name: value for name, value in vars(config.compute).items() if value != "auto"}, "remat": layout.remat}
    rest = ", ".join(f"{name}: {value}" for name, value in compute.items() if not name.startswith("__"))
    return f"mesh: {{{axes}}}\nmicro_batches: {layout.micro_batches}\ncompute: {{{rest}}}\n"


def fit(o: Estimate, change: Layout | None, larger: Topology | None) -> None:
    """Whether it fits, by how much, and what would make it."""
    chip = o.topology.chip
    if chip is None:
        return
    room = f"{o.memory.total / GIB:.2f} of {chip.memory / GIB:.2f} GiB a device"
    if o.fits:
        say(f"fits: {room}, {-o.over / GIB:.2f} are left ({o.memory_by})")
        return
    say(f"does not fit: {room}, {o.over / GIB:.2f} GiB too much ({o.memory_by})")
    if change is not None:
        own = o.layout.settings()
        changed = " ".join(f"{key}={value}" for key, value in change.settings().items() if own[key] != value)
        say(f"smallest change that makes it fit: {changed} (analytic)")
    elif larger is not None:
        say(f"no layout makes it fit these chips; the smallest {chip.name} that it fits is {larger.name} (analytic)")
    else:
        say("no layout makes it fit any number of these chips: take chips with more memory, or a smaller model (analytic)")
