"""What a compiled step holds in memory, by part: the values that are alive when most of it is used, each sorted by what it is.

XLA writes those values down for TPUs. The state is known exactly; other values are told by their shapes: float32 of a
weight's part is a gradient, the matmuls' dtype of a weight or its part is a copy, what has the vocabulary beside rows
is logits, and all the rest are activations. What is allocated beyond that (padding, gaps, the batch, code) is `other`.
"""

import math
import re
from collections import Counter

from maxi.estimate.memory import Memory
from maxi.estimate.memory import memory as expected
from maxi.estimate.work import STATE_BYTES, Layout, Work
from maxi.plan import hlo
from maxi.plan.hlo import Array

_ALIVE = re.compile(r"^\s+(\S+?)\{([\d, ]*)\}: (\d+) bytes", re.MULTILINE)
ARGUMENTS = ("state", "batch", "frozen")
"""What a step is called with."""


def allocated(account: dict[str, int]) -> int:
    """Bytes a device that a program takes: arguments, temporaries, results that take no argument's place, and code."""
    results = account["output_size_in_bytes"] - account["alias_size_in_bytes"]
    code = account["generated_code_size_in_bytes"]
    return account["argument_size_in_bytes"] + account["temp_size_in_bytes"] + max(0, results) + code


def from_program(work: Work, layout: Layout, text: str, alive: str, account: dict[str, int]) -> Memory:
    """By part, of a program whose compiler wrote down its live ranges."""
    module = hlo.read(text)
    sorted_out: Counter[str] = Counter()
    for name, index, size in _ALIVE.findall(alive[alive.rindex("Live ranges at") :]):
        found = module.instruction(name)
        if found is None or (found.opcode == "parameter" and found.source.startswith(ARGUMENTS)):
            continue
        shapes = hlo.arrays(found.shape)
        place = int(index.split(",")[0]) if index.strip() else 0
        if place < len(shapes) and not shapes[place].on_chip:
            sorted_out[_part(work, layout, shapes[place])] += int(size)
    state = expected(work, layout)
    known = {"parameters": state.parameters, "optimizer": state.optimizer}
    known |= {name: float(sorted_out[name]) for name in ("gradients", "weights", "activations", "logits")}
    return Memory(**known, other=max(0.0, allocated(account) - sum(known.values())))


def from_account(work: Work, layout: Layout, account: dict[str, int]) -> Memory:
    """By part, where the compiler says no more than how much there is: temporaries in the proportions of the model."""
    model = expected(work, layout)
    beside = account["temp_size_in_bytes"]
    scale = beside / max(1.0, model.gradients + model.weights + model.activations + model.logits)
    return Memory(
        parameters=model.parameters,
        optimizer=model.optimizer,
        gradients=scale * model.gradients,
        weights=scale * model.weights,
        activations=scale * model.activations,
        logits=scale * model.logits,
        other=max(0.0, allocated(account) - beside - model.parameters - model.optimizer),
    )


def _part(work: Work, layout: Layout, array: Array) -> str:
    count, table, layers = math.prod(array.sizes), work.model.table, len(work.model.layers)
    if array.kind in ("f32", "bf16", "f16") and len(array.sizes) > 1:
        is_wide = array.kind == "f32" or work.dtype_bytes == STATE_BYTES
        shares = work.held(layout).shares
        if count in {shares[path] for path, param in table.params.items() if param.is_matrix}:
            return "gradients" if is_wide else "weights"
        if count in {size // (layers if "." in path else 1) // layout.tensor for path, size in work.sizes.items()}:
            return "weights"
        if {work.model.vocab_size // parts for parts in (1, layout.tensor, layout.fsdp * layout.tensor)} & set(array.sizes):
            return "logits"
    return "activations"
