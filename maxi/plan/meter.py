"""How long a step takes by the compiler's own estimates, read from the optimized program of a TPU.

XLA writes the cycles that it expects of every instruction into the program. They are added up here, loops times how
often they run, together with the bytes that collectives send. `cost_analysis()` cannot be used instead: it counts a loop
once. What runs without an estimate: Pallas kernels (their runs are counted, by name), copies and collectives.

Estimates of the compiler compare programs; they are no promise of time.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from maxi.plan import hlo
from maxi.plan.hlo import Computation, Instruction, Module

RARELY = "rarely"
"""The `jax.named_scope` of branches that a run hardly ever takes."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_MOVES = ("copy", "bitcast", "copy-start", "copy-done", "convert", "reshape")
"""What hands a constant on."""


@dataclass(frozen=True)
class Collective:
    """One collective as it stands in a program: bytes that a device sends each time, how often, and whether beside others."""

    kind: str
    sent: float
    runs: float
    is_async: bool


@dataclass
class Cost:
    """What a computation costs when it runs once, a device."""

    cycles: float = 0.0
    kernels: Counter[str] = field(default_factory=Counter)
    """Pallas kernel -> runs."""
    collectives: dict[tuple[str, ...], Collective] = field(default_factory=dict)
    endless: int = 0
    """Loops of whose length nothing is known; they count once."""

    def add(self, other: "Cost", runs: float = 1.0, *, cycles: bool = True, is_async: bool = False) -> None:
        """Adds another computation that runs so often; without its cycles where its caller's stand for them."""
        self.cycles += runs * other.cycles * cycles
        self.endless += other.endless
        for name, count in other.kernels.items():
            self.kernels[name] += count * runs  # type: ignore[assignment]
        for key, found in other.collectives.items():
            total = runs * found.runs
            if before := self.collectives.get(key):  # pieces of one collective, in a chain, are one
                total = max(before.runs, total) if key[0] == "chain" else before.runs + total
            self.collectives[key] = Collective(found.kind, found.sent, total, is_async or found.is_async)

    @property
    def sent(self) -> float:
        """Bytes, by collectives of both kinds."""
        return sum(c.runs * c.sent for c in self.collectives.values())

    @property
    def sent_blocking(self) -> float:
        """Bytes, by collectives that nothing else runs beside."""
        return sum(c.runs * c.sent for c in self.collectives.values() if not c.is_async)


def measure(text: str) -> Cost:
    """What one run of a program costs."""
    module = hlo.read(text)
    return _Meter(module).cost(module.entry)


class _Meter:
    def __init__(self, module: Module):
        self.module = module
        self.known: dict[str, Cost] = {}

    def cost(self, name: str) -> Cost:
        """Of a computation; each is looked at once."""
        if name not in self.known:
            total = Cost()
            for instruction in self.module.computations[name].values():
                self._count(instruction, name, total)
            self.known[name] = total
        return self.known[name]

    def _count(self, i: Instruction, where: str, total: Cost) -> None:
        comp = self.module.computations[where]
        if i.opcode == "while":
            trips = trip_count(self.module, i, comp)
            total.endless += trips is None
            total.add(self.cost(i.called("body") or ""), trips or 1)
            return
        if i.opcode == "conditional":
            if costs := [self.cost(name) for name in self._branches(i)]:
                total.add(max(costs, key=lambda cost: cost.cycles))
            return
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            key, found = self._collective(i, kind, where, comp)
            total.add(Cost(collectives={key: found}))
        elif i.opcode == "custom-call" and "tpu_custom_call" in i.attributes:
            total.kernels[_kernel(i)] += 1
        called = i.called("calls") or i.called("async_wrapped") or (i.called("to_apply") if i.opcode == "call" else None)
        if called in self.module.computations:
            # a fusion's cycles are written on it, not in it
            total.add(self.cost(called), cycles=i.opcode != "fusion", is_async=i.opcode == "async-start")
        cycles = i.number("estimated_cycles") or 0
        total.cycles += cycles if cycles < 1 << 62 else 0  # that is how it writes "unknown"

    def _branches(self, i: Instruction) -> Iterator[str]:
        """The branches of a condition, without those that hardly ever run."""
        named = [name for key in ("true_computation", "false_computation") if (name := i.called(key))]
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
        for name in named or (re.findall(r"%([^\s,}]+)", listed.group(1)) if listed else []):
            if not any(f"/{RARELY}/" in inner.source for inner in self.module.computations[name].values()):
                yield name

    def _collective(self, i: Instruction, kind: str, where: str, comp: Computation) -> tuple[tuple[str, ...], Collective]:
        if kind == "all-reduce" and "reduce-scatter" in where:  # on TPU an all-reduce fused with a slice
            kind = "reduce-scatter"
        given = sum(hlo.size(comp[name].shape) for name in i.operands if name in comp)
        n = max(_group(i.attributes, self.module.devices), 1)
        share = (n - 1) / n
        sent = {
            "all-gather": given * (n - 1),
            "all-reduce": 2 * given * share,
            "reduce-scatter": given * share,
            "all-to-all": given * share,
        }.get(kind, given)
        channel = i.number("channel_id")
        in_chain = "chain_id" in i.attributes and channel is not None
        key = ("chain", str(channel)) if in_chain else (where, i.name)
        return key, Collective(kind, sent, 1, in_chain or i.opcode.endswith("-start"))


def _kernel(i: Instruction) -> str:
    found = re.search(r'kernel_name["=: ]+\\?"?(\w+)', i.attributes)
    return re.sub(r"[.\d]+$", "", found.group(1) if found else i.name)


def _group(attributes: str, devices: int) -> int:
    """How many devices take part in a collective."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        return math.prod(sizes.get(axis, 1) for axis in re.findall(r"'([^']+)'", named.group(2)))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(tiled.group(2))
    if listed := re.search(r"replica_groups=\{\{([0-9,]*)\}", attributes):
        return listed.group(1).count(",") + 1
    return devices


def trip_count(module: Module, loop: Instruction, where: Computation) -> int | None:
    """How often a loop runs: the bound that its condition compares a counter with, over the counter's step."""
    if known := re.search(r"known_trip_count\D*(\d+)", loop.attributes):
        return int(known.group(1))
    condition = module.computations[loop.called("condition") or ""]
    body = module.computations[loop.called("body") or ""]
    start = where[loop.operands[0]]
    compared = _compared(module, condition)
    if compared is None:
        return None
    direction, sides = compared
    bound = counter = None
    for side in sides:
        index = _element(condition, side) if isinstance(side, str) else None
        value = _constant(condition, side) if isinstance(side, str) else side
        if value is None and index is not None and start.opcode == "tuple" and not _steps(body, index):
            value = _constant(where, start.operands[index])  # handed round the loop unchanged
        if value is not None:
            bound = value
        elif index is not None:
            counter = index
    if bound is None or counter is None:
        return None
    first = (_constant(where, start.operands[counter]) if start.opcode == "tuple" else None) or 0
    is_inclusive = direction in ("LE", "GE")
    return max(0, math.ceil((abs(bound - first) + is_inclusive) / (_steps(body, counter) or 1)))


def _compared(module: Module, condition: Computation) -> tuple[str, Sequence[str | int | None]] | None:
    """The direction of a condition's comparison, and what it compares: names there, or constants."""
    root = next((i for i in condition.values() if i.is_root), None)
    inner, sides = condition, list[str | int | None]()
    if root is not None and root.opcode == "fusion":
        outer, inner = root, module.computations[root.called("calls") or ""]
        root = next((i for i in inner.values() if i.is_root), None)
        if root is None or root.opcode != "compare":
            return None
        for name in root.operands:
            parameter = inner[name].opcode == "parameter"
            sides.append(outer.operands[int(inner[name].arguments)] if parameter else _constant(inner, name))
    elif root is None or root.opcode != "compare":
        return None
    else:
        sides += root.operands
    direction = re.search(r"direction=(\w+)", root.attributes)
    return (direction.group(1) if direction else "LT"), sides


def _element(condition: Computation, name: str) -> int | None:
    """Which element of the loop's tuple a value of its condition is."""
    found = condition.get(name)
    return found.number("index") if found is not None and found.opcode == "get-tuple-element" else None


def _steps(body: Computation, index: int) -> int:
    """By how much a loop's body raises an element of its tuple; 0 where it does not."""
    root = next((i for i in body.values() if i.is_root), None)
    if root is None or root.opcode != "tuple" or index >= len(root.operands):
        return 0
    found = body.get(root.operands[index])
    if found is None or found.opcode not in ("add", "subtract"):
        return 0
    return next((abs(value) for name in found.operands if (value := _constant(body, name))), 0)


def _constant(comp: Computation, name: str, depth: int = 0) -> int | None:
    """The whole number that a value of a computation is, if it is one."""
    found = comp.get(name)
    if found is None or depth > 6:
        return None
    if found.opcode == "constant":
        return int(found.arguments) if re.fullmatch(r"-?\d+", found.arguments.strip()) else None
    return _constant(comp, found.operands[0], depth + 1) if found.opcode in _MOVES and found.operands else None
