"""What a config computes at every step: model, objective, optimizer and the jitted step, without data or records.

`train` runs it on rows; `bench` times it on made-up ones, or compiles it for hardware that is not here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from maxi import adapters, optim
from maxi import step as steps
from maxi.adapters import Tuning
from maxi.adapters.weights import START
from maxi.checkpoint import abstract_state
from maxi.errors import ConfigError
from maxi.kernels.platform import platform
from maxi.models import Model, decoder
from maxi.models.decoder import UNROLL_AT_MOST, Compute
from maxi.models.model import restacked
from maxi.objectives import Objective
from maxi.params import abstract, init, shardings
from maxi.sections import AdapterConfig, ComputeConfig, FullConfig, OptimConfig
from maxi.step import State

FULL = FullConfig()


@dataclass(frozen=True)
class Program:
    """The pieces of a step, put together. `rate` is the learning rate by step, `where` the shardings of the state."""

    model: Model
    objective: Objective
    compute: Compute
    devices: Mesh
    rate: optax.Schedule
    optimizer: optax.GradientTransformation
    where: State
    micro_batches: int
    ema: float
    tuning: Tuning
    frozen_where: Any
    seed: int
    spikes: steps.Spikes | None = None
    deterministic: bool = False

    def loss(self) -> tuple[steps.Loss, steps.Totals | None]:
        """The objective over the model, and its totals where it has any."""
        logprobs = decoder.Logprobs(self.model, self.compute)
        totals = getattr(self.objective, "totals", None)
        return partial(self.objective.loss, logprobs), partial(totals, logprobs) if totals else None

    def step(self) -> Any:
        """The jitted step, see `maxi.step.make_step`."""
        loss, totals = self.loss()
        return steps.make_step(
            loss,
            self.optimizer,
            self.rate,
            self.where,
            totals=totals,
            micro_batches=self.micro_batches,
            ema=self.ema,
            spikes=self.spikes,
            deterministic=self.deterministic,
            join=self.tuning.join,
            frozen_where=self.frozen_where,
            noise=self.seed if self.tuning.needs_noise else None,
        )

    def train_flops_per_token(self, width: int) -> float:
        """See `Model.train_flops_per_token`, less what frozen weights spare."""
        return self.model.train_flops_per_token(width) - adapters.spared_flops(self.tuning)

    def new_state(self, params: Any, consume: bool = False) -> State:
        """The state before the first step, see `maxi.step.new_state`."""
        return steps.new_state(params, self.optimizer, self.where, bool(self.ema), self.spikes, consume)

    def restarted(self, step: Any, params: Any, ema: Any) -> State:
        """The state of a run that goes on at `step` with a new optimizer; the schedule goes on as well."""
        state = self.new_state(params)

        def on(node: Any) -> Any:
            return node._replace(count=jnp.copy(step)) if _is_schedule(node) else node

        opt_state = jax.tree.map(on, state.opt_state, is_leaf=_is_schedule)
        average = state.ema if ema is None or state.ema is None else ema
        return state.replace(step=step, opt_state=opt_state, ema=average)  # type: ignore[attr-defined]

    def with_losses(self, state: State) -> State:
        """A run that begins to look at its last losses has none yet."""
        if state.spikes is not None or self.spikes is None:
            return state
        losses = jax.device_put(np.asarray(steps.no_losses(self.spikes)), self.where.spikes)
        return state.replace(spikes=losses)  # type: ignore[attr-defined]

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state."""

        def make() -> State:
            return steps.make_state(init(self.tuning.table, jax.random.key(0)), self.optimizer, bool(self.ema), self.spikes)

        return abstract_state(jax.eval_shape(make), self.where)

    def abstract_frozen(self) -> Any:
        """Shapes, dtypes and shardings of what stays beside the state."""
        kept = jax.eval_shape(self.tuning.fix, abstract(self.tuning.base))
        if self.tuning.keeps_start:
            kept |= {START: abstract(self.tuning.table)}
        return abstract_state(kept, self.frozen_where)

    def abstract_batch(self, arrays: Mapping[str, Any], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a global batch of `rows` rows like this one, given by its arrays."""
        lie = steps.rows_sharding(self.devices)
        return {name: jax.ShapeDtypeStruct((rows, *a.shape), a.dtype, sharding=lie) for name, a in arrays.items()}


def build(
    model: Model,
    objective: Objective,
    compute: ComputeConfig,
    optimizer: OptimConfig,
    devices: Mesh,
    total: int,
    micro_batches: int,
    adapter: AdapterConfig = FULL,
    freeze: Sequence[str] = (),
    seed: int = 0,
) -> Program:
    """The program of a run of `total` steps on a mesh of `devices`, every `auto` decided; `seed` is that of dropout.

    Raises ConfigError for an adapter or patterns that do not fit the model.
    """
    chosen = choose_compute(compute, model, getattr(adapter, "quantise", "none") != "none")
    tuning = adapters.build(model.table, freeze, dtype=chosen.dtype, **asdict(adapter))
    rate = optim.schedule(optimizer, total)
    update = optim.optimizer(optimizer, tuning.table, rate, adapters.around(tuning, total))
    spikes = steps.Spikes(optimizer.spike_zscore, optimizer.spike_window) if optimizer.spike_zscore else None
    return Program(
        model=restacked(model, tuning.whole),
        objective=objective,
        compute=chosen,
        devices=devices,
        rate=rate,
        optimizer=update,
        where=steps.state_shardings(tuning.table, update, devices, bool(optimizer.ema), spikes),
        micro_batches=micro_batches,
        ema=optimizer.ema,
        tuning=tuning,
        frozen_where=adapters.frozen_shardings(tuning, devices),
        seed=seed,
        spikes=spikes,
        deterministic=compute.deterministic,
    )


def check_sizes(model: Model, devices: Mesh, batch_size: int, seq_len: int, micro_batches: int) -> None:
    """Sizes that must fit each other. Raises ConfigError."""
    if seq_len > model.rope.max_position:
        what = f"seq_len {seq_len} is over the model's max_position_embeddings {model.rope.max_position}"
        raise ConfigError(what, "seq_len", "lower it, or set model.config.max_position_embeddings (and rope_scaling)")
    parts = devices.shape["replica"] * devices.shape["fsdp"] * micro_batches
    if batch_size % parts:
        what = f"batch_size {batch_size} does not divide into {parts}, mesh.replica x mesh.fsdp x micro_batches"
        raise ConfigError(what, "batch_size", f"make it a multiple of {parts}")
    chunks = 2 * devices.shape["context"]
    if chunks > 2 and seq_len % chunks:
        what = f"seq_len {seq_len} does not divide into {chunks}, 2 x mesh.context"
        raise ConfigError(what, "seq_len", f"make it a multiple of {chunks}")
    shardings(model.table, devices)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def choose_compute(wanted: ComputeConfig, model: Model, sparing: bool = False) -> Compute:
    """The compute section, every `auto` decided by what the program is compiled for; `sparing`: memory counts for more than
    time, as where weights are quantised."""
    on_cpu = platform() == "cpu"
    auto = jnp.float32 if on_cpu else jnp.bfloat16
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "auto": auto}[wanted.dtype]
    remat = wanted.remat if wanted.remat != "auto" else "none" if on_cpu and not sparing else "full"
    unroll = wanted.layers == "unroll" or (wanted.layers == "auto" and on_cpu and len(model.layers) <= UNROLL_AT_MOST)
    return Compute(dtype, remat, unroll, wanted.attention, wanted.head)
