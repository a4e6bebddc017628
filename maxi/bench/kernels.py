"""`maxi bench kernels`: every operation by every backend that can run here, beside jax's own.

Times are of one device and one call, medians of rounds in which all ways of a case take turns. Memory is what the
compiled forward and backward pass takes beside its arguments, by XLA's account. Errors are relative, by norm, to the
definition in float32 at the highest precision: of results, and the worst of the gradients. They are found at one row
of at most `CHECKED` tokens, since the definition holds all scores at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from maxi import mesh
from maxi.bench.operations import OPERATIONS, Operation, Sizes, Way
from maxi.bench.timing import Timing, about_this_machine, interleaved
from maxi.errors import ConfigError, first_line
from maxi.figures import check_writable, console, keep
from maxi.kernels.platform import platform
from maxi.runtime import without_cache
from maxi.sections import MeshConfig

CHECKED = 1024
"""Tokens at which errors are found."""
ON_CPU = Sizes(B=1, T=1024, N=8, K=2, H=64, D=512, F=1408, V=8_192)
ON_ACCELERATORS = Sizes()


def cases(operation: str, on_cpu: bool) -> list[Sizes]:
    """At which sizes an operation is measured: layers of Qwen3-0.6B on accelerators, a small model's on CPU."""
    base = ON_CPU if on_cpu else ON_ACCELERATORS
    if operation == "head":  # all logits of Qwen3's 8 x 4096 tokens would be 20 GB
        return [replace(base, T=base.T // 2, B=max(1, base.B // 2))]
    if operation != "attention":
        return [base]
    packed = replace(base, documents=base.T // 8)
    return [base, packed] if on_cpu else [base, packed, replace(packed, N=14, K=2, H=64), replace(packed, B=1, T=32_768)]


@dataclass
class Measured:
    """A way, its compiled programs and what was found. `both` is forward and backward. Errors are None where the
    definition does not fit into memory."""

    way: Way
    given: Any = ()
    forward: Callable[[], Any] | None = None
    both: Callable[[], Any] | None = None
    forward_s: Timing | None = None
    both_s: Timing | None = None
    prepare_s: Timing | None = None
    memory_bytes: int | None = None
    error: float | None = None
    gradient_error: float | None = None
    why_not: str | None = None


def bench_kernels(
    *,
    only: Sequence[str] | None = None,
    shape: Sequence[str] | None = None,
    dtype: str | None = None,
    json_out: str | None = None,
) -> list[dict[str, Any]]:
    """Measures, and prints a table for every operation; the figures, which are returned, go to the file `json_out` too.

    `only`: names of operations. `shape`: LETTER=SIZE, which make one case of each operation instead of its own. `dtype`
    default: bfloat16, on CPU float32. Raises ConfigError.
    """
    check_writable(json_out)
    if unknown := sorted(set(only or ()) - set(OPERATIONS)):
        raise ConfigError(f"there is no operation {', '.join(unknown)}", "--only", f"take some of {', '.join(OPERATIONS)}")
    changes = _changes(shape or ())
    device, results, out = jax.devices()[0], [], console()
    with jax.set_mesh(mesh.build(MeshConfig(), [device])), without_cache():  # programs of no use to anybody else
        on_cpu = platform() == "cpu"
        dtype = dtype or ("float32" if on_cpu else "bfloat16")
        out.print(f"device: {device.device_kind}, {dtype}; medians in ms; * is what auto takes")
        for name in only or OPERATIONS:
            sizes = [replace(cases(name, on_cpu)[0], **changes)] if changes else cases(name, on_cpu)
            _check(sizes)
            found = [entry for each in sizes for entry in _results(name, each, dtype)]
            _print(out, name, found)
            results += found
    if json_out is not None:
        keep(about_this_machine([device]) | {"dtype": dtype, "results": results}, json_out)
    return results


def _changes(shape: Sequence[str]) -> dict[str, int]:
    """LETTER=SIZE as fields of `Sizes`. Raises ConfigError."""
    known = [field.name for field in fields(Sizes)]
    changes = {}
    for text in shape:
        letter, _, size = text.partition("=")
        if letter not in known or not size.isdigit() or (int(size) == 0 and letter != "documents"):
            raise ConfigError(f"{text!r} is no size", "--shape", f"write LETTER=SIZE with one of {', '.join(known)}")
        changes[letter] = int(size)
    return changes


def _check(sizes: Sequence[Sizes]) -> None:
    for each in sizes:
        if each.N % each.K or each.H % 2:
            what = f"{each.N} heads over {each.K} key/value heads of {each.H}"
            raise ConfigError(what, "--shape", "make N a multiple of K, and H even")


def _results(name: str, sizes: Sizes, dtype: str) -> list[dict[str, Any]]:
    """All ways of an operation at some sizes, measured."""
    small = replace(sizes, B=1, T=min(sizes.T, CHECKED))
    found = []
    make = OPERATIONS[name]
    for operation, checked in zip(*(make(s, dtype, np.random.default_rng(0)) for s in (sizes, small)), strict=True):
        measured = [_compiled(operation, way) for way in operation.ways]
        running = [m for m in measured if m.why_not is None]
        for m, timing in zip(running, interleaved([m.forward for m in running]), strict=True):  # type: ignore[misc]
            m.forward_s = timing
        for m, timing in zip(running, interleaved([m.both for m in running]), strict=True):  # type: ignore[misc]
            m.both_s = timing
        _find_errors(checked, running, same=sizes == small)
        best = _best_of_jax(running)
        found += [_entry(operation, sizes, m, best) for m in measured]
    return found


def _compiled(operation: Operation, way: Way) -> Measured:
    """A way, ready to be timed, or the reason why it cannot be."""
    if way.run is None:
        return Measured(way, why_not=way.why_not)
    found = Measured(way, operation.given)
    try:
        if way.prepare is not None:
            prepare = jax.jit(way.prepare)
            found.given = prepare(operation.given)
            found.prepare_s = interleaved([partial(prepare, operation.given)])[0]
        arguments = (operation.arguments, found.given)
        forward = jax.jit(way.run).lower(*arguments).compile()
        cotangent = _cotangent(forward(*arguments))
        both = jax.jit(partial(_with_backward, way.run)).lower(*arguments, cotangent).compile()
        both(*arguments, cotangent)
    except Exception as error:
        return Measured(way, why_not=_reason(error, way))
    found.forward, found.both = partial(forward, *arguments), partial(both, *arguments, cotangent)
    memory = both.memory_analysis()
    found.memory_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else None
    return found


def _reason(error: Exception, way: Way) -> str:
    """Why a way that should run does not: memory, or, of jax's own, whatever it says. Raises what is a fault of ours."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory"
    if not way.name.startswith("jax:"):
        raise error
    return first_line(error, 120)


def _with_backward(run: Callable[[Any, Any], Any], arguments: Any, given: Any, cotangent: Any) -> tuple[Any, Any]:
    out, pull = jax.vjp(lambda arguments: run(arguments, given), arguments)
    return out, pull(cotangent)[0]


def _cotangent(out: Any) -> Any:
    """Gradients to begin with: random, and for a scalar 1."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) if a.ndim else 1.0, a.dtype), out)


def _find_errors(checked: Operation, measured: Sequence[Measured], same: bool) -> None:
    """Errors of all ways, at the sizes of `checked`; `same`: those are the sizes that were timed."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(jnp.float32), tree)

    arguments, given = checked.arguments, checked.given
    cotangent = _cotangent(jax.eval_shape(checked.exact, arguments, given))
    ways = {way.name: way for way in checked.ways}  # made for these sizes
    try:
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(partial(_with_backward, checked.exact))(wide(arguments), given, wide(cotangent))
            jax.block_until_ready(exact)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return
    for m in measured:
        assert m.both
        found = m.both() if same else _smaller(ways[m.way.name], arguments, given, cotangent)
        m.error, m.gradient_error = (_error(a, b) for a, b in zip(found, exact, strict=True))


def _smaller(way: Way, arguments: Any, given: Any, cotangent: Any) -> Any:
    assert way.run
    given = jax.jit(way.prepare)(given) if way.prepare else given
    return jax.jit(partial(_with_backward, way.run))(arguments, given, cotangent)


def _error(found: Any, exact: Any) -> float:
    """The largest relative error of any array; NaN if there is one."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    errors = [jnp.linalg.norm(jnp.ravel(a.astype(jnp.float32) - b)) / jnp.linalg.norm(jnp.ravel(b)) for a, b in pairs]
    return float(jnp.max(jnp.stack(errors)))


def _best_of_jax(measured: Sequence[Measured]) -> float | None:
    """Seconds forward and backward of the fastest that is jax's own; where there is none, of the definition."""
    times = {m.way.name: m.both_s.median for m in measured if m.both_s}
    own = [seconds for name, seconds in times.items() if name.startswith("jax:")]
    return min(own) if own else times.get("reference")


def _entry(operation: Operation, sizes: Sizes, m: Measured, best: float | None) -> dict[str, Any]:
    """What is known of a way, as JSON."""
    entry = {"operation": operation.name, "shape": operation.shape, "sizes": asdict(sizes), "way": m.way.name}
    if m.why_not is not None or m.forward_s is None or m.both_s is None:
        return entry | {"why_not": m.why_not}
    return entry | {
        "auto": m.way.chosen,
        "forward_s": m.forward_s._asdict(),
        "forward_and_backward_s": m.both_s._asdict(),
        "prepare_s": m.prepare_s and m.prepare_s._asdict(),
        "speed_to_best_of_jax": best and best / m.both_s.median,
        "memory_bytes": m.memory_bytes,
        "error": _finite(m.error),
        "gradient_error": _finite(m.gradient_error),
    }


def _finite(error: float | None) -> float | str | None:
    """JSON has no NaN."""
    return error if error is None or math.isfinite(error) else str(error)


def _print(out: Any, name: str, results: Sequence[dict[str, Any]]) -> None:
    """A table of what ran, and a line for what did not."""
    table = Table(title=name, title_justify="left", title_style="bold")
    for column in ("case", "way"):
        table.add_column(column)
    for column in ("forward", "and backward", "speed, jax = 1", "prepare", "memory MiB", "error", "of gradients"):
        table.add_column(column, justify="right")
    last, absent = None, []
    for r in results:
        if "why_not" in r:
            absent.append(f"not {r['way']}: {r['why_not']}" + (f" ({r['shape']})" if r["why_not"] == "out of memory" else ""))
            continue
        case = f"{r['operation']}: {r['shape']}" if r["operation"] != name else r["shape"]
        table.add_row(
            *("" if case == last else case, f"{r['way']} *" if r["auto"] else r["way"]),
            *(_ms(r["forward_s"]), _ms(r["forward_and_backward_s"])),
            f"{r['speed_to_best_of_jax']:.2f}" if r["speed_to_best_of_jax"] else "",
            _ms(r["prepare_s"]) if r["prepare_s"] else "",
            f"{r['memory_bytes'] / 2**20:,.1f}" if r["memory_bytes"] is not None else "",
            *(_shown(r["error"]), _shown(r["gradient_error"])),
        )
        last = case
    out.print(table)
    for line in dict.fromkeys(absent):
        out.print(f"  {line}")


def _ms(timing: dict[str, float]) -> str:
    return f"{1e3 * timing['median']:.3f}"


def _shown(error: float | str | None) -> str:
    return "" if error is None else error if isinstance(error, str) else f"{error:.1e}"
