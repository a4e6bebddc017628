"""XLA's optimized program as text, read into computations of instructions. What anything in it costs is `meter.py`'s matter.

Contract: `read` takes what `Compiled.as_text()` or XLA's dumps hold. Shapes stay text until `arrays` is asked for them.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16}
"""Of element types that do not say it in their name."""
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^\s+(ROOT )?%([^\s=]+) = ")
_OPENS = re.compile(r"^(ENTRY )?%?([^\s(]+) .*\{$")
_PAIRS = {"(": ")", "{": "}", "[": "]"}


@dataclass(frozen=True)
class Instruction:
    """`%name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([^\s,()]+)", self.arguments)

    @property
    def source(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def called(self, key: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{key}=%([^\s,}}]+)", self.attributes)
        return found.group(1) if found else None

    def number(self, key: str) -> int | None:
        """An attribute's number, written key=1 or "key":"1"."""
        found = re.search(rf'\b{key}"?\s*[=:]\s*"?(\d+)', self.attributes)
        return int(found.group(1)) if found else None


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Module:
    """A program for `devices` devices."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    def instruction(self, name: str) -> Instruction | None:
        """By its name, which is unique in a program."""
        return next((found[name] for found in self.computations.values() if name in found), None)


def read(text: str) -> Module:
    """A module from its text. A text without an entry computation is no module: ValueError."""
    computations: dict[str, Computation] = {}
    entry, here, pending = "", None, ""
    for line in text.splitlines():
        opens = _OPENS.match(line) if here is None else None
        if opens and not line.startswith("HloModule"):
            here = computations.setdefault(opens.group(2), {})
            entry = opens.group(2) if opens.group(1) else entry
        elif here is not None and (_HEAD.match(line) or line == "}"):
            if pending:
                found = _instruction(pending)
                here[found.name] = found
            pending = line if line != "}" else ""
            here = here if line != "}" else None
        elif here is not None and pending:
            pending += line  # an instruction that goes on in the next line
    if not entry:
        raise ValueError("the text holds no HLO module")
    counts = [re.search(rf"\b{key}=(\d+)", text[:20_000]) for key in ("num_partitions", "replica_count")]
    return Module(computations, entry, math.prod(int(found.group(1)) if found else 1 for found in counts))


def _instruction(line: str) -> Instruction:
    head = _HEAD.match(line)
    assert head, line
    rest = line[head.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    return Instruction(head.group(2), shape, rest[:opened], rest[opened + 1 : closed - 1], rest[closed:], bool(head.group(1)))


def _closing(text: str, start: int) -> int:
    """Just behind the bracket that closes the one at `start`."""
    opened, closed, depth = text[start], _PAIRS[text[start]], 0
    for place in range(start, len(text)):
        depth += (text[place] == opened) - (text[place] == closed)
        if not depth:
            return place + 1
    return len(text)


class Array(NamedTuple):
    """An array in a shape's text: its element type and sizes, and whether it lies in memory on the chip itself (VMEM)."""

    kind: str
    sizes: tuple[int, ...]
    on_chip: bool


def arrays(shape: str) -> list[Array]:
    """Every array in a shape's text."""
    return [
        Array(kind, tuple(int(size) for size in sizes.split(",") if size), "S(1)" in layout)
        for kind, sizes, layout in _ARRAY.findall(shape)
    ]


def size(shape: str) -> float:
    """Bytes of all arrays in a shape's text, without padding."""
    return sum(_bits(array.kind) / 8 * math.prod(array.sizes) for array in arrays(shape))


def _bits(kind: str) -> int:
    if kind in BITS:
        return BITS[kind]
    found = re.match(r"[a-z]+(\d+)", kind)
    return int(found.group(1)) if found else 0  # token[] and the like hold nothing
