"""Which hardware to rent: every topology of the price list counted with its best layout, the cheapest that will do."""

from collections.abc import Sequence
from dataclasses import dataclass

from maxi.errors import ConfigError
from maxi.estimate.layouts import ranked
from maxi.hardware import Topology, sold
from maxi.plan.compiled import counted
from maxi.plan.run import Outcome, Run, outcome


@dataclass(frozen=True)
class Goal:
    """At most so many hours, at most so many dollars at list price; None: no matter."""

    hours: float | None = None
    dollars: float | None = None

    def __bool__(self) -> bool:
        return self.hours is not None or self.dollars is not None

    def describe(self) -> str:
        hours = f"{self.hours:g} hours" if self.hours is not None else ""
        dollars = f"${self.dollars:g}" if self.dollars is not None else ""
        return " and ".join(filter(None, (hours, dollars)))

    def met(self, by: Outcome) -> bool:
        """Whether an outcome is in time and within the budget. What has no price is in no budget."""
        in_time = self.hours is None or (by.hours is not None and by.hours <= self.hours)
        return in_time and (self.dollars is None or (by.dollars is not None and by.dollars <= self.dollars))


def parse(goal: str | None, budget: float | None) -> Goal:
    """From `--goal hours=24` and `--budget 200`. Raises ConfigError."""
    hours = None
    if goal is not None:
        name, equals, value = goal.partition("=")
        hours = _number(value)
        if name != "hours" or not equals or hours is None:
            raise ConfigError(f"no goal {goal!r}", "--goal", "write hours=24, or give a --budget")
    if budget is not None and not 0 < budget < float("inf"):
        raise ConfigError(f"a budget of {budget:g} dollars buys nothing", "--budget", "give a number above 0")
    return Goal(hours, budget)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def options(run: Run, topologies: Sequence[Topology] | None = None) -> list[Outcome]:
    """What the run comes to on each topology (default: all that are sold) that it fits, the cheapest first."""
    found = []
    for topology in sold() if topologies is None else topologies:
        if best := ranked(run.work, topology):
            found.append(outcome(run, counted(run.work, best[0], topology)))
    return sorted(found, key=lambda o: (o.dollars if o.dollars is not None else float("inf"), o.hours or 0.0))


def choose(run: Run, goal: Goal) -> tuple[Outcome, list[Outcome]]:
    """The cheapest that meets a goal, and all that do. Raises ConfigError, saying how near others come."""
    if run.steps is None:
        raise ConfigError("how long the run is only its data can tell", "epochs", "give --tokens, how many the data has")
    every = options(run)
    met = [o for o in every if goal.met(o)]
    if met:
        return met[0], met
    if not every:
        raise ConfigError("this model fits no topology that has a price", "model", "see --topology for larger ones")
    cheapest, fastest = every[0], min(every, key=lambda o: o.hours or float("inf"))
    near = " and ".join(
        f"{word} is {o.estimate.topology.name}, {o.hours:,.1f} hours for ${o.dollars:,.0f}"
        for word, o in (("the cheapest", cheapest), ("the fastest", fastest))
    )
    raise ConfigError(f"nothing does it in {goal.describe()}, {near}", "--goal, --budget", "ask for less, or shorten the run")
