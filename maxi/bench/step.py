"""`maxi bench step CONFIG`: the training step of a config, timed on made-up rows, or only compiled.

It is the step that `maxi train` takes: same model, objective, optimizer, kernels, mesh and compiler options. No data,
tokenizer or weights are read. With a topology nothing runs: the step is compiled for TPUs that need not be here, which
says what memory it takes there and gives the optimized program to whoever reads it.
"""

import itertools
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxi import aot, mesh
from maxi import step as steps
from maxi.adapters.weights import START
from maxi.bench.timing import Timing, about_this_machine, clock
from maxi.config import Config
from maxi.data.loader import stack
from maxi.errors import ConfigError
from maxi.figures import check_writable, keep, write
from maxi.made_up import made_up
from maxi.metrics import process_memory
from maxi.params import count, init, shardings
from maxi.program import Program
from maxi.runtime import without_cache

WARM_UP = 2
"""Steps before the clock starts: the first ones allocate."""
BATCHES = 4
"""Different batches that the steps take in turns: where attention skips by document, no two cost the same."""


def bench_step(
    config: Config,
    *,
    timed_steps: int = 10,
    document_tokens: int = 512,
    topology: str | None = None,
    dump_hlo: str | None = None,
    json_out: str | None = None,
) -> None:
    """Compiles the step of `config`, times `timed_steps` of them, and prints the figures.

    `document_tokens`: mean length of documents, conversations or pairs. `topology`, such as v5e:4x4: only compile, for
    these TPUs. The figures go to the file `json_out` too; the optimized program and XLA's account of its memory to the
    folder `dump_hlo`. Raises ConfigError, EnvironmentFault, and what reading the model's config raises.
    """
    if timed_steps < 1 or document_tokens < 2:
        what = f"--steps {timed_steps} with --document-tokens {document_tokens}"
        raise ConfigError(what, "command line", "take at least 1 step, and documents of at least 2 tokens")
    check_writable(json_out)
    target = nullcontext() if topology is None else aot.tpus(topology)
    with without_cache(), target as found:  # how long compiling takes is one of the figures
        rows = config.batch_size // config.micro_batches
        built = aot.program_of(config, mesh.build(config.mesh, found, rows, config.seq_len))
        report = _about(config, built, document_tokens)
        if topology is None:
            report |= _run(config, built, document_tokens, timed_steps, dump_hlo)
        else:
            report |= _compile(built, *aot.arguments(config, built, document_tokens), dump_hlo)[1]
    if json_out is not None:
        keep(report, json_out)


def _about(config: Config, built: Program, document_tokens: int) -> dict[str, Any]:
    """What is going to be compiled."""
    compute, model = built.compute, built.model
    report = about_this_machine(list(built.devices.devices.flat)) | {
        "mesh": dict(built.devices.shape),
        "family": model.family,
        "parameters": count(model.table),
        "trained_parameters": count(built.tuning.table),
        "objective": config.objective.name,
        "batch_size": config.batch_size,
        "seq_len": config.seq_len,
        "micro_batches": config.micro_batches,
        "document_tokens": document_tokens,
        "dtype": jnp.dtype(compute.dtype).name,
        "remat": compute.remat,
    }
    print(f"devices: {mesh.describe(built.devices)}")
    layers = f"{len(model.layers)} layers ({'unrolled' if compute.unroll else 'scanned'})"
    print(f"model: {model.family}, {report['parameters']:,} parameters, {layers}, vocabulary {model.vocab_size:,}")
    if built.tuning.needs_base:
        print(f"trained: {report['trained_parameters']:,} parameters, {built.tuning.about}")
    print(f"compute: {report['dtype']}, remat {compute.remat}, {config.optim.name}")
    size = f"{config.batch_size} rows of {config.seq_len} in {config.micro_batches} micro-batches"
    print(f"batch: {size}, made up for {config.objective.name}, items of {document_tokens} tokens on average")
    return report


def _compile(built: Program, state: Any, batch: Any, frozen: Any, dump_hlo: str | None) -> tuple[Any, dict[str, Any]]:
    """The compiled step, and what there is to say of it."""
    done = aot.compile_step(built, state, batch, frozen, keep_text=dump_hlo is not None)
    memory = done.memory
    print(f"compile: {done.trace_s + done.compile_s:.1f} s, of which tracing {done.trace_s:.1f}")
    arguments, temporary = memory["argument_size_in_bytes"], memory["temp_size_in_bytes"]
    results = memory["output_size_in_bytes"] - memory["alias_size_in_bytes"]  # the new state takes the place of the old
    parts = f"arguments {_size(arguments)}, temporary {_size(temporary)}, results {_size(results)}"
    peak = (
        f", at most {_size(memory['peak_memory_in_bytes'])} at a time"
        if built.devices.devices.flat[0].platform != "cpu"
        else ""
    )
    print(f"memory of the program, a device: {parts}{peak}")  # on CPU XLA's peak leaves out what is temporary
    if dump_hlo is not None:
        write(Path(dump_hlo) / "step.hlo.txt", done.text or "")
        keep(memory, Path(dump_hlo) / "memory.json")
        print(f"program: {Path(dump_hlo) / 'step.hlo.txt'}")
    return done.executable, {"trace_s": done.trace_s, "compile_s": done.compile_s, "memory_analysis": memory}


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"


def _run(config: Config, built: Program, document_tokens: int, timed_steps: int, dump_hlo: str | None) -> dict[str, Any]:
    """Compiles and times."""
    different = min(BATCHES, timed_steps)
    rows = made_up(config, built.objective.rows, built.model.vocab_size, document_tokens, config.batch_size * different)
    stacked = [stack(rows[i::different]) for i in range(different)]
    tokens = [int((batch["segments"] != 0).sum()) for batch in stacked]
    with jax.set_mesh(built.devices):
        state, frozen = _new(built, config.seed)
        batches = [steps.put(batch, built.devices) for batch in stacked]
        compiled, report = _compile(built, state, batches[0], frozen, dump_hlo)

        def take(batch: Any) -> Any:
            nonlocal state
            state, metrics = compiled(state, batch, frozen)
            return state, metrics

        seconds = [clock(partial(take, batch)) for batch in itertools.islice(itertools.cycle(batches), WARM_UP + timed_steps)]
    timing = Timing.of(seconds[WARM_UP:])
    return report | _speed(config, built, timing, sum(tokens) / different)


def _new(built: Program, seed: int) -> tuple[Any, Any]:
    """A state of random weights, and what stays beside it."""
    tuning = built.tuning
    where = shardings(tuning.base, built.devices)
    base = jax.jit(partial(init, tuning.base), out_shardings=where)(jax.random.key(seed))
    first = tuning.first(jax.random.key(seed), base)
    frozen = tuning.fix(base) | ({START: first} if tuning.keeps_start else {})
    return built.new_state(first), jax.device_put(frozen, built.frozen_where)


def _speed(config: Config, built: Program, timing: Timing, tokens: float) -> dict[str, Any]:
    width = 2 * config.seq_len if built.objective.rows in ("preferences", "labels") else config.seq_len
    tokens_per_s, peak = tokens / timing.median, mesh.peak_flops(built.devices)
    mfu = tokens_per_s * built.train_flops_per_token(width) / peak if peak else None
    used, whose = mesh.memory_in_use(built.devices), "a device"
    if used is None:
        used, whose = process_memory(), "the process"
    print(f"step: {timing.median:.4f} s, the median of {timing.runs} ({timing.least:.4f} to {timing.most:.4f})")
    print(f"speed: {tokens_per_s:,.0f} tokens/s" + (f", {mfu:.1%} of the peak (MFU)" if mfu is not None else ""))
    print(f"memory in use at most: {_size(used)}, {whose}")
    return {
        "step_s": timing._asdict(),
        "tokens_per_step": tokens,
        "tokens_per_s": tokens_per_s,
        "mfu": mfu,
        "memory_in_use": used,
        "memory_in_use_of": whose,
    }
