"""maxi and one of TRL's trainers on the same rows: the command line of a comparison, its rounds and its table.

Every run is a process of its own, one after the other: A B C D, A B C D. What they read is made once, by `rows.py`; how
a run is measured stands in `sides.py`. This process imports nothing large until it has become one of the others: Linux
counts the peak memory of a parent as its child's.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sides import MakeTrainer, SameRows

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}
"""How far apart losses on the same rows may be; of log-probabilities, which are sums over answers, as a share."""

QUIET = 0.03
"""The share of the machine that others may take without spoiling a measurement."""

MAXI = "maxi"
Found = dict[str, Any]
Round = dict[str, Found]
"""What came of each side, by its name, in the order they ran."""


@dataclass(frozen=True)
class Comparison:
    """objective: maxi's; source, batch: what is trained on unless told otherwise, and how much of it a step; noun: what
    that is called; variants: TRL's options by the name of the variant, its defaults first."""

    objective: str
    source: str
    batch: int
    noun: str
    variants: Mapping[str, Mapping[str, Any]]
    make: "MakeTrainer"
    same_rows: "SameRows"

    @property
    def has_reference(self) -> bool:
        return self.objective == "dpo"


def main(comparison: Comparison) -> None:
    """Prints the machine, the plan, each run, and a table. Exits with 1 when the two sides disagree on the same rows."""
    options = _options(comparison)
    if options.role:
        _be(options.role, comparison, Path(options.job))
        return
    print(_machine(options.threads), flush=True)
    with tempfile.TemporaryDirectory(prefix="peers-") as work:
        job = {**vars(options), "work": work}
        job |= _run("prepare", job)
        print(_plan(comparison, job), flush=True)
        rounds = list(_rounds(comparison, job))
    print(f"\n{_table(comparison, rounds)}\n")
    first = rounds[0]
    tolerance = TOLERANCE[options.dtype]
    differ = [name for name, found in first.items() if not _agree(found["same"], first[MAXI]["same"], tolerance)]
    for line in _verdict(comparison, job, rounds, differ):
        print(line)
    sys.exit(bool(differ))


def _options(comparison: Comparison) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"maxi's {comparison.objective} beside TRL's, on this machine's CPU")
    parser.add_argument("--data", default=comparison.source, help="a source of rows as in data.train[].path (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of the longest sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=comparison.batch, help=f"{comparison.noun} a step, about (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least 1 (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs (%(default)s)")
    what = "what both compute in; bfloat16 is TRL's default, by autocast (%(default)s)"
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help=what)
    parser.add_argument("--threads", type=int, default=2, help="threads of either side (%(default)s)")
    names = list(comparison.variants)
    parser.add_argument("--variants", nargs="+", choices=names, default=names, help="of TRL's options, to take less time (all)")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.seq_len, options.batch, options.steps, options.warmup, options.rounds, options.threads) < 1:
        parser.error("all numbers must be at least 1")
    return options


def _be(role: str, comparison: Comparison, file: Path) -> None:
    """What the process of a role does: reads its job and writes what it found."""
    import rows
    import sides

    job = SimpleNamespace(**json.loads(file.read_text("utf-8")))
    if hasattr(os, "sched_setaffinity"):  # XLA makes a thread for every core that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    if role == "prepare":
        found = rows.prepare(comparison.objective, job)
    elif role == "maxi":
        found = sides.maxi(comparison.objective, job)
    else:
        found = sides.trl(comparison.make, comparison.same_rows, job)
    Path(job.out).write_text(json.dumps(found), "utf-8")


def _run(role: str, job: Mapping[str, Any]) -> Found:
    """What a process of this script found. Exits with the end of its stderr when it fails."""
    work = Path(job["work"])
    file, out = work / "job.json", work / "out.json"
    file.write_text(json.dumps({**job, "out": str(out)}), "utf-8")
    command = [sys.executable, sys.argv[0], "--role", role, "--job", str(file)]
    done = subprocess.run(command, env=_environment(work, job["threads"]), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{role} ended with {done.returncode}:\n" + "\n".join(done.stderr.splitlines()[-30:]))
    return json.loads(out.read_text("utf-8"))


def _environment(work: Path, threads: int) -> dict[str, str]:
    """CPU only, offline, and all caches in the work folder: nothing from before counts, and nothing is left behind."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    caches = {"HF_DATASETS_CACHE": "hf", "JAX_COMPILATION_CACHE_DIR": "xla", "XDG_CACHE_HOME": "cache"}
    where = {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **counts, **where, **{name: str(work / folder) for name, folder in caches.items()}}


def _rounds(comparison: Comparison, job: Mapping[str, Any]) -> Iterator[Round]:
    variants = {name: comparison.variants[name] for name in job["variants"]}
    runs = [("trl", f"TRL, {name}", options) for name, options in variants.items()] + [("maxi", MAXI, {})]
    for number in range(1, job["rounds"] + 1):
        found: Round = {}
        for role, name, variant in runs:
            begin, busy = time.monotonic(), _others_seconds()
            found[name] = _with_rates(_run(role, {**job, "variant": variant, "number": number}))
            seconds = time.monotonic() - begin
            found[name]["others"] = (_others_seconds() - busy) / seconds / (os.cpu_count() or 1)
            line = f"round {number} of {job['rounds']}: {name}: {found[name]['answer']:,.0f} answer tokens/s"
            print(f"{line} ({seconds:.0f} s in all, {found[name]['others']:.0%} of the machine for others)", flush=True)
        yield found


def _others_seconds() -> float:
    """Processor time that all but our own finished processes have taken so far; 0 where the system does not say."""
    file, own = Path("/proc/stat"), os.times()
    if not file.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, file.read_text("ascii").split("\n", 1)[0].split()[1:9])
    taken = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return taken - own.user - own.system - own.children_user - own.children_system


def _with_rates(found: Found) -> Found:
    """Tokens per second from the counts and times of the measured steps."""
    assert len(found["seconds"]) == len(found["counts"]), "a time and the counts of every measured step"
    answer, real, computed = (sum(step[name] for step in found["counts"]) for name in ("answer", "real", "computed"))
    seconds = sum(found["seconds"])
    return {**found, "answer": answer / seconds, "real": real / seconds, "share": real / computed}


def _agree(theirs: Mapping[str, Any], ours: Mapping[str, float], tolerance: float) -> bool:
    return all(
        math.isclose(theirs[name], value, abs_tol=tolerance, rel_tol=tolerance if name.startswith("logps/") else 0)
        for name, value in ours.items()
    )


def _machine(threads: int) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("maxi", "jax", "trl", "transformers", "torch")]
    cores = f"{os.cpu_count()} cores of which {threads} are used, load {os.getloadavg()[0]:.2f} before"
    return f"{cpu}, {cores}, {memory:.0f} GiB, {platform.system()}\nPython {platform.python_version()}, {', '.join(versions)}"


def _plan(comparison: Comparison, job: Mapping[str, Any]) -> str:
    real = sum(step["real"] for step in job["counts"]) / len(job["counts"])
    return (
        f"model: Qwen3 shape, {job['parameters'] / 1e6:.1f} M random parameters; {job['dtype']}, AdamW\n"
        f"rows: {job['samples']} {comparison.noun} of {job['data']}, none over {job['seq_len']} tokens; "
        f"{job['batch']} a step, {job['warmup']} steps to warm up, {job['steps']} measured\n"
        f"packed: {job['rows']} x {job['width']} tokens a step, of which maxi's rows fill {real:.0f}"
    )


def _table(comparison: Comparison, rounds: Sequence[Round]) -> str:
    """Medians over the rounds in Markdown, but the largest peak."""
    heads = ["", "answer tokens/s", "lowest to highest", "of the first line", "real tokens/s", "real", "peak GiB"]
    heads += ["reference, s"] * comparison.has_reference
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    base = None
    for name in rounds[0]:
        runs = [each[name] for each in rounds]
        answer, real, share, reference = (
            statistics.median(run[key] for run in runs) for key in ("answer", "real", "share", "reference")
        )
        base = base or answer
        spread = f"{min(run['answer'] for run in runs):,.0f} to {max(run['answer'] for run in runs):,.0f}"
        cells = [name, f"{answer:,.0f}", spread, f"{answer / base:.2f}", f"{real:,.0f}", f"{share:.1%}"]
        cells += [f"{max(run['memory'] for run in runs):.2f}"]
        cells += [f"{reference:.1f}" if reference else "in the step"] * comparison.has_reference
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(comparison: Comparison, job: Mapping[str, Any], rounds: Sequence[Round], differ: Sequence[str]) -> Iterator[str]:
    """What the sides say of the same rows, and what there is to note."""
    others = max(found["others"] for each in rounds for found in each.values())
    yield f"other programs took up to {others:.0%} of the machine in a run{', so measure again' if others > QUIET else ''}"
    if comparison.has_reference:
        yield f"reference: once, of all {job['samples']} pairs; maxi's time includes compiling or loading it"
    yield f"before the first step, on the {comparison.noun} of maxi's first step:"
    first = rounds[0]
    for name, found in first.items():
        said = ", ".join(f"{what} {found['same'][what]:.6f}" for what in first[MAXI]["same"])
        yield f"  {name}: {said}{' DIFFERS from maxi' if name in differ else ''}"
    yield from (found["same"]["note"] for found in first.values() if "note" in found["same"])
