"""The step of a config compiled ahead of time, for the devices that are here or for hardware that is not.

`maxi bench step` times what this compiles; `maxi plan` reads what it costs. No data, tokenizer or weights are read: a
batch's shapes are those of made-up rows. Compiling for TPUs takes libtpu, for NVIDIA GPUs jax's CUDA plugin; neither
needs the hardware.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from maxi import objectives, pretrained, program, runtime
from maxi.config import Config
from maxi.errors import ConfigError, EnvironmentFault, first_line
from maxi.kernels.platform import compiling_for, platform
from maxi.made_up import made_up
from maxi.models import Model
from maxi.program import Program

ANY_LENGTH = 10_000
"""Steps of a run of so many epochs, which only data could tell; the schedule of the learning rate needs a number."""
UNSAID = 1
"""Stands for a vocabulary that the config leaves to its tokenizer."""
DUMP = {"xla_dump_hlo_as_text": True, "xla_dump_hlo_as_proto": False}
"""Asks XLA to write down what it compiles, which libtpu 0.0.52 can also for the chips whose programs `as_text` cannot print."""


@dataclass(frozen=True)
class Compiled:
    """A compiled step and what there is to say of it."""

    executable: Any
    memory: dict[str, int]
    """XLA's account: every number of bytes in it, a device."""
    trace_s: float
    compile_s: float
    text: str | None = None
    """The optimized program, where it was asked for."""
    alive: str | None = None
    """What is in memory when most of it is used, as XLA's live ranges say it; None where the compiler does not write them."""


@contextmanager
def tpus(topology: str, slices: int = 1) -> Iterator[Sequence[Any]]:
    """The TPUs of a topology such as v5e:4x4, to compile for. Raises ConfigError, and EnvironmentFault without libtpu."""
    if find_spec("libtpu") is None:
        raise EnvironmentFault("libtpu, TPU's compiler, is not installed", "--topology", "pip install libtpu")
    for name, value in runtime.LIBTPU.items():
        os.environ.setdefault(name, value)
    more = {} if slices == 1 else {"num_slices": slices}
    with _devices("tpu", topology, f"no TPU topology {topology!r}", "write one such as v5e:4x4", **more) as found:
        yield found


@contextmanager
def gpus(name: str, nodes: int, each: int, description: str) -> Iterator[Sequence[Any]]:
    """`nodes` x `each` NVIDIA GPUs that XLA's `description` (a GpuTargetConfigProto as text) is of, to compile for.

    Raises EnvironmentFault without jax's CUDA plugin.
    """
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise EnvironmentFault("jax's CUDA plugin is not installed", "--topology", 'pip install "jax[cuda13]"')
    more = {"target_config": description, "topology": f"1x{nodes}x{each}"}
    with _devices("cuda", name, "the CUDA plugin has no such GPUs", "leave them to the analytic model", **more) as found:
        yield found


@contextmanager
def _devices(kind: str, name: str, what: str, fix: str, **more: Any) -> Iterator[Sequence[Any]]:
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so devices that are here can stay with whoever has them
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform=kind, topology_name=name, **more).devices
    except Exception as error:  # jax raises whatever the plugin does
        raise ConfigError(f"{what}, {first_line(error)}", "--topology", fix) from None
    with compiling_for("gpu" if kind == "cuda" else kind):
        yield devices


def model_of(config: Config) -> Model:
    """The model of a config. Raises ConfigError where it leaves the vocabulary to a tokenizer, ModelFolderError."""
    model = pretrained.resolve_config(config.model.init_from, config.model.config, UNSAID, {})
    if model.vocab_size == UNSAID:
        raise ConfigError("the model's vocabulary is not said", "model.config.vocab_size", "set it: no tokenizer is read here")
    return model


def program_of(config: Config, devices: Any) -> Program:
    """What a config computes at every step on a mesh of `devices`. Raises ConfigError for sizes that do not fit."""
    objective = objectives.build(**asdict(config.objective))
    model = model_of(config)
    program.check_sizes(model, devices, config.batch_size, config.seq_len, config.micro_batches)
    total = config.steps or ANY_LENGTH
    parts = (objective, config.compute, config.optim, devices, total, config.micro_batches)
    return program.build(model, *parts, adapter=config.adapter, freeze=config.freeze, seed=config.seed)


def arguments(config: Config, built: Program, document_tokens: int) -> tuple[Any, Any, Any]:
    """Shapes of the state, of a batch, whose items have `document_tokens` tokens on average, and of what is only read."""
    row = made_up(config, built.objective.rows, built.model.vocab_size, document_tokens, 1)[0]
    return built.abstract_state(), built.abstract_batch(row, config.batch_size), built.abstract_frozen()


def compile_step(built: Program, state: Any, batch: Any, frozen: Any, *, keep_text: bool = False) -> Compiled:
    """The compiled step for its arguments, or for their shapes; with its program where `keep_text`.

    Raises what the compiler does, RESOURCE_EXHAUSTED where it does not fit.
    """
    start = time.perf_counter()
    with jax.set_mesh(built.devices), tempfile.TemporaryDirectory() as folder:
        lowered = built.step().lower(state, batch, frozen)
        traced = time.perf_counter()
        written = keep_text and platform() == "tpu"
        executable = lowered.compile({"xla_dump_to": folder, **DUMP} if written else None)
        done = time.perf_counter()
        text = alive = None
        if written:
            text, alive = _written(Path(folder), "after_codegen"), _written(Path(folder), "after_optimizations-live-range")
        elif keep_text:
            text = executable.as_text()
    return Compiled(executable, memory_analysis(executable), traced - start, done - traced, text, alive)


def _written(folder: Path, stage: str) -> str:
    """What XLA wrote down of the largest program at a stage."""
    files = sorted(folder.glob(f"*.{stage}.txt"), key=lambda file: file.stat().st_size)
    if not files:
        raise EnvironmentFault(f"the compiler did not write its program ({stage})", "--dump-hlo", "leave it out")
    return files[-1].read_text("utf-8")


def memory_analysis(executable: Any) -> dict[str, int]:
    """XLA's account of a compiled program: every number of bytes in it."""
    found = executable.memory_analysis()
    return {name: int(getattr(found, name)) for name in dir(found) if name.endswith("_in_bytes")}
