"""One training step: micro-batches, one division, one update, all in one jitted function that owns its state.

The step knows neither the config nor the model: it gets a loss that returns sums, an optimizer and a table to read
shardings from. Gradients of micro-batches are summed in float32 and divided once by the global weight, so that
accumulation is exact and tokens count alike on every device.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxi import compiler, fsdp
from maxi.errors import ConfigError
from maxi.kernels.platform import platform
from maxi.objectives import Sums
from maxi.params import Table, Tree, init, shardings
from maxi.sharding import activation_spec, constrain

Batch = dict[str, jax.Array]
Loss = Callable[[Tree, Batch], Sums]
Totals = Callable[[Tree, Batch], dict[str, jax.Array]]
Metrics = dict[str, jax.Array]
Join = Callable[[Tree, Tree, Any], Tree]

GIVEN_BACK_S = 2e-3
"""How long XLA:CPU's thread may take to give back a step's memory once its results are there; 1 ms was seen."""


def _alone(params: Tree, frozen: Tree, noise_B: Any) -> Tree:
    del frozen, noise_B
    return params


@flax.struct.dataclass
class State:
    """All that training changes. `ema` is a moving average of `params`, or None. `spikes` are the last losses, float32
    [window] (loss k at k modulo window, NaN where there is none), where steps are skipped by them; else None."""

    step: jax.Array
    params: Tree
    opt_state: Any
    ema: Tree | None
    spikes: jax.Array | None = None


@dataclass(frozen=True)
class Spikes:
    """A step is skipped when its loss is over the mean of the last `window` losses by `zscore` of their standard deviations.

    As OLMo-core's SkipStepOptimizer does, with 6 over 128 losses. Every finite loss joins the window, a skipped step's too,
    so that a loss that stays high is taken for what it is.
    """

    zscore: float
    window: int

    def is_spike(self, losses: jax.Array, loss: jax.Array) -> jax.Array:
        """Whether `loss` is one after `losses`; never before the window is full."""
        return loss > losses.mean() + self.zscore * losses.std()  # NaN in the window: comparing with NaN is false


def state_shardings(
    table: Table, optimizer: optax.GradientTransformation, mesh: Mesh, ema: bool, spikes: Spikes | None = None
) -> State:
    """A `State` of shardings: optimizer moments lie as their parameters do, counters on every device."""
    params, whole = shardings(table, mesh), NamedSharding(mesh, PartitionSpec())
    shape = jax.eval_shape(lambda: optimizer.init(init(table, jax.random.key(0))))
    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: leaf if _masked(leaf) else sharding,
        shape,
        params,
        transform_non_params=lambda _: whole,
        is_leaf=_masked,
    )
    average, losses = params if ema else None, whole if spikes else None
    return State(step=whole, params=params, opt_state=opt_state, ema=average, spikes=losses)  # type: ignore[arg-type]


def _masked(node: Any) -> bool:
    """Where `optax.partition` leaves a parameter to another optimizer."""
    return isinstance(node, optax.MaskedNode)


def make_state(params: Tree, optimizer: optax.GradientTransformation, ema: bool, spikes: Spikes | None = None) -> State:
    """The state before the first step, with float32 weights. Traceable: `jax.eval_shape` gives its shapes."""
    params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    average = jax.tree.map(jnp.copy, params) if ema else None
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), average, no_losses(spikes))  # type: ignore[call-arg]


def no_losses(spikes: Spikes | None) -> jax.Array | None:
    """`State.spikes` before the first step."""
    return jnp.full(spikes.window, jnp.nan, jnp.float32) if spikes else None


def new_state(
    params: Tree,
    optimizer: optax.GradientTransformation,
    where: State,
    ema: bool,
    spikes: Spikes | None = None,
    consume: bool = False,
) -> State:
    """`make_state`, each leaf built where it belongs. With `consume`, `params` that are float32 and there already become
    its weights instead of being copied (they are donated)."""

    def fits(weight: Any, there: NamedSharding) -> bool:
        on_device = isinstance(weight, jax.Array) and weight.sharding.is_equivalent_to(there, weight.ndim)
        return on_device and weight.dtype == jnp.float32

    donated = (0,) if consume and jax.tree.all(jax.tree.map(fits, params, where.params)) else ()
    make = jax.jit(lambda params: make_state(params, optimizer, ema, spikes), out_shardings=where, donate_argnums=donated)
    return make(params)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Where every array [B, ...] of a batch lies."""
    return NamedSharding(mesh, activation_spec("B"))


def share(mesh: Mesh) -> tuple[int, int]:
    """(shard, shards): which part of every batch this process reads, see `put`.

    Processes that hold the same rows (where `tensor` or `context` goes between them) read the same part. Raises
    ConfigError where the mesh gives processes parts of different sizes.
    """
    parts = [_groups(mesh, process) for process in range(jax.process_count())]
    distinct = sorted(set(parts))
    held = [group for part in distinct for group in part]
    if len(held) != len(set(held)) or len({len(part) for part in distinct}) > 1:
        what = (
            f"{jax.process_count()} processes do not share {mesh.shape['replica'] * mesh.shape['fsdp']} parts of a batch evenly"
        )
        raise ConfigError(what, "mesh", "let mesh.tensor and mesh.context divide the devices of a process, or be multiples")
    return distinct.index(parts[jax.process_index()]), len(distinct)


def _groups(mesh: Mesh, process: int) -> tuple[int, ...]:
    """Which of the replica x fsdp parts of a batch lie on the devices of a process."""
    of_part = mesh.devices.reshape(mesh.shape["replica"] * mesh.shape["fsdp"], -1)
    return tuple(g for g, devices in enumerate(of_part) if any(device.process_index == process for device in devices))


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This process's `share` of a global batch, [B / shards, ...] numpy, onto the devices that hold it.

    A process holds the parts that its devices have in the mesh, wherever they stand in it: which rows share a device
    is nothing that a step depends on.
    """
    rows, own = rows_sharding(mesh), _groups(mesh, jax.process_index())
    groups = mesh.shape["replica"] * mesh.shape["fsdp"]

    def placed(value: np.ndarray) -> jax.Array:
        size = len(value) // len(own)

        def part(index: Any) -> np.ndarray:
            at = own.index((index[0].start or 0) // size) * size
            return value[at : at + size]

        return jax.make_array_from_callback((groups * size, *value.shape[1:]), rows, part)

    return {name: placed(value) for name, value in batch.items()}


def put_whole(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """A global batch that every process has whole, onto the devices, its rows in their order."""
    rows = rows_sharding(mesh)
    return {n: jax.make_array_from_callback(v.shape, rows, lambda index, v=v: v[index]) for n, v in batch.items()}


class Settle:
    """To be called with the state before the next step is taken. On a CPU it returns when the memory of the last one is free.

    XLA:CPU takes a step's memory when it begins, and the thread that gives it back may get to that only when the next step
    has begun, which then took as much again: 2.3 instead of 1.3 GiB for a model of 26 M.
    """

    def __init__(self) -> None:
        self._since = time.monotonic()

    def __call__(self, state: State) -> None:
        if platform() != "cpu":
            return
        jax.block_until_ready(state.step)
        took = time.monotonic() - self._since
        time.sleep(min(GIVEN_BACK_S, took / 100))  # in short steps there is little to win
        self._since = time.monotonic()


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    where: State,
    *,
    totals: Totals | None = None,
    micro_batches: int = 1,
    ema: float = 0.0,
    spikes: Spikes | None = None,
    deterministic: bool = False,
    join: Join = _alone,
    frozen_where: Tree | None = None,
    noise: int | None = None,
) -> Callable[..., tuple[State, Metrics]]:
    """The jitted `step(state, batch, frozen) -> (state, metrics)`; it consumes (donates) the state it is given.

    Where less than the whole model is trained, `frozen` is the rest (its shardings `frozen_where`), which is only read,
    and `join` makes of both the tree that the loss takes; else it is left out. With the seed `noise` every row gets a key,
    uint32 [B, 2], from the step and its place in the batch, which `join` is given too.

    `batch` arrays are [B, ...]; metrics are float32 scalars. `totals` gives sums that the loss has to know of the whole
    batch beforehand; added up over the micro-batches they are the loss's `batch["totals"]`. When loss or gradient is
    not finite, or the loss is one of `spikes`, the state stays as it was but for the step count (and the last losses), and
    `train/skipped` is 1; `train/spike` is 1 in the second case.
    """

    def sums_and_gradient(params: Tree, batch: Batch, frozen: Tree) -> tuple[Sums, Tree]:
        def joined(function: Any) -> Any:
            return function and (lambda params, batch: function(join(params, frozen, batch.get("noise")), batch))

        sums, grads = _accumulate(joined(loss), joined(totals), params, batch, micro_batches)
        return fsdp.summed(sums), fsdp.summed(grads, axes)

    specs, frozen_specs = (jax.tree.map(lambda sharding: sharding.spec, tree) for tree in (where.params, frozen_where or {}))
    axes = jax.tree.map(lambda sharding: fsdp.split_axis(sharding.spec), where.params)

    def step(state: State, batch: Batch, frozen: Tree | None = None) -> tuple[State, Metrics]:
        by_rows = fsdp.by_rows(sums_and_gradient, (specs, activation_spec("B"), frozen_specs), (PartitionSpec(), specs))
        keys = {} if noise is None else {"noise": _noise(noise, state.step, len(batch["tokens"]))}
        sums, grads = by_rows(state.params, {**batch, **keys}, frozen or {})
        weight = jnp.maximum(sums.weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        fine = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = None
        if state.ema is not None:
            average = jax.tree.map(lambda old, new: ema * old + (1 - ema) * new, state.ema, params)
        mean, losses = sums.loss / weight, state.spikes
        spike = spikes.is_spike(losses, mean) if spikes and losses is not None else jnp.bool(False)
        if spikes and losses is not None:
            at = state.step % spikes.window
            losses = losses.at[at].set(jnp.where(jnp.isfinite(mean), mean, losses[at]))
        fine &= ~spike
        changed = State(state.step, params, opt_state, average, state.spikes)  # type: ignore[arg-type]
        kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), changed, state)
        metrics = {
            **{name: total / jnp.maximum(count, 1.0) for name, (total, count) in sums.metrics.items()},
            "train/tokens": (batch["segments"] != 0).sum().astype(jnp.float32),
            "train/skipped": 1.0 - fine,
            **({"train/spike": spike.astype(jnp.float32)} if spikes else {}),
            "optim/grad_norm": norm,
            "optim/lr": jnp.asarray(rate(state.step), jnp.float32),
        }
        return kept.replace(step=state.step + 1, spikes=losses), metrics

    options = compiler.options(platform(), jax.sharding.get_abstract_mesh().shape, deterministic)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None), compiler_options=options)


def _noise(seed: int, step: jax.Array, B: int) -> jax.Array:
    """A key for every row of a step's batch, uint32 [B, 2]."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), B)
    return constrain(jax.random.key_data(keys), "BC")


def with_totals(totals: Totals | None, params: Tree, batch: Batch) -> Batch:
    """The batch as the loss takes it when it is the whole batch."""
    return batch if totals is None else _knowing(batch, totals(params, batch))


def _knowing(batch: Batch, sums: dict[str, jax.Array]) -> Batch:
    """The batch with what the loss has to know of all devices' rows, given this device's."""
    return {**batch, "totals": jax.lax.stop_gradient(fsdp.summed(sums))}  # type: ignore[dict-item]


def _accumulate(loss: Loss, totals: Totals | None, params: Tree, batch: Batch, micro_batches: int) -> tuple[Sums, Tree]:
    """Sums and their gradient over all micro-batches, the gradient in float32."""

    def total(params: Tree, batch: Batch) -> tuple[jax.Array, Sums]:
        sums = loss(params, batch)
        return sums.loss, sums

    gradient = jax.value_and_grad(total, has_aux=True)
    if micro_batches == 1:
        (_, sums), grads = gradient(params, with_totals(totals, params, batch))
        return sums, grads

    def split(a: jax.Array) -> jax.Array:
        # every device keeps its own rows: micro-batch m takes rows m, m + M, m + 2M, ...
        micros = a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1)
        return constrain(micros, "MBT"[: micros.ndim])

    micros = jax.tree.map(split, batch)
    known = _knowing({}, _summed(lambda micro: totals(params, micro), micros)) if totals else {}

    def one(micro: Batch) -> tuple[Sums, Tree]:
        (_, sums), grads = gradient(params, {**micro, **known})
        return sums, grads

    return _summed(one, micros)


def _summed(one: Callable[[Batch], Any], micros: Batch) -> Any:
    """The sum of `one(micro)` over the leading axis of `micros`, one after the other."""
    shape = jax.eval_shape(one, jax.tree.map(lambda a: a[0], micros))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    return jax.lax.scan(lambda carry, micro: (jax.tree.map(jnp.add, carry, one(micro)), None), zeros, micros)[0]
