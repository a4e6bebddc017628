"""The laws of the step: accumulated = whole, sharded = single, remat = none, scanned = unrolled, and what it updates."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxi import compiler, mesh, objectives, optim, step
from maxi.errors import ConfigError
from maxi.models import decoder, from_hf_config
from maxi.models.decoder import Compute
from maxi.objectives.sums import Sums
from maxi.params import init
from maxi.sections import MeshConfig, OptimConfig
from tests import golden

SIZES = {
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 20}
B, T, STEPS = 8, 136, 3


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Packed rows: three documents and in some rows padding."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[np.ndarray]] = {"segments": [], "positions": []}
    for _ in range(B):
        cuts = np.sort(rng.choice(np.arange(1, T), 3, replace=False))
        runs = np.diff([0, *cuts, T])
        last = 0 if rng.random() < 0.5 else 4
        rows["segments"].append(np.repeat([1, 2, 3, last], runs))
        rows["positions"].append(np.concatenate([np.arange(run) for run in runs]))
    batch = {name: np.stack(value).astype(np.int32) for name, value in rows.items()}
    batch |= {name: rng.integers(0, 96, (B, T)).astype(np.int32) for name in ("tokens", "targets")}
    return batch | {"loss_weight": (batch["segments"] > 0).astype(np.float32)}


def train(
    steps: int = STEPS,
    devices: int = 1,
    micro: int = 1,
    opt: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    axes: dict[str, int] | None = None,
    z_loss: float = 1e-4,
    batches: Any = make_batch,
    spikes: step.Spikes | None = None,
    **compute: Any,
) -> tuple[list[dict[str, float]], Any]:
    """A few steps; the losses, gradient norms and final parameters."""
    family = from_hf_config(SIZES | {"tie_word_embeddings": True} | (model or {}))
    config = OptimConfig(**({"lr": 1e-2, "warmup_steps": 2, "ema": 0.9} | (opt or {})))
    over = mesh.build(MeshConfig(**(axes or {})), jax.devices()[:devices])
    rate = optim.schedule(config, steps)
    optimizer = optim.optimizer(config, family.table, rate)
    loss = partial(objectives.build("pretrain", z_loss=z_loss).loss, decoder.Logprobs(family, Compute(**compute)))
    with jax.set_mesh(over):
        where = step.state_shardings(family.table, optimizer, over, bool(config.ema), spikes)
        params = jax.jit(partial(init, family.table), out_shardings=where.params)(jax.random.key(0))
        state = step.new_state(params, optimizer, where, bool(config.ema), spikes)
        take = step.make_step(loss, optimizer, rate, where, micro_batches=micro, ema=config.ema, spikes=spikes)
        history = []
        for number in range(steps):
            state, metrics = take(state, step.put(batches(number), over))
            history.append({name: float(value) for name, value in metrics.items()})
    return history, jax.device_get(state)


def assert_same(one: Any, other: Any, tolerance: float) -> None:
    for a, b in zip(one[0], other[0], strict=True):
        for name in ("train/loss", "optim/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=tolerance)
    # Adam divides by the root of a tiny second moment, which blows rounding up: compare weights more loosely
    for x, y in zip(jax.tree.leaves(one[1].ema), jax.tree.leaves(other[1].ema), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-3)


@pytest.fixture(scope="module")
def single():
    return train()


@pytest.mark.parametrize("micro", [2, 8])
def test_accumulated_is_whole(single, micro: int) -> None:
    assert_same(single, train(micro=micro), 5e-6)


@pytest.mark.parametrize(
    ("devices", "axes"),
    [
        (4, {"replica": 2}),
        (8, {"replica": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_sharded_is_single(single, devices: int, axes: dict[str, int]) -> None:
    assert_same(single, train(devices=devices, axes=axes), 1e-5)


@pytest.mark.parametrize("consume", [False, True])
def test_first_weights_stay_unless_given_away(consume: bool) -> None:
    """Who benches an adapter keeps what it starts from beside the state."""
    family = from_hf_config(SIZES)
    optimizer = optax.adam(1e-3)
    over = mesh.build(MeshConfig(), jax.devices()[:1])
    where = step.state_shardings(family.table, optimizer, over, ema=False)
    params = jax.jit(partial(init, family.table), out_shardings=where.params)(jax.random.key(0))
    before = jax.tree.map(np.array, params)
    state = step.new_state(params, optimizer, where, ema=False, consume=consume)
    assert {weight.is_deleted() for weight in jax.tree.leaves(params)} == {consume}
    jax.tree.map(np.testing.assert_array_equal, before, state.params)


@pytest.mark.parametrize("head", ["full", "chunked"])
def test_a_head_by_name_is_taken_under_fsdp_too(single, head: str) -> None:
    assert_same(single, train(devices=4, head=head), 1e-5)


def test_a_head_that_nothing_splits_is_refused() -> None:
    with pytest.raises(ConfigError, match="'split' cannot run: not split, the head is not split by vocabulary over fsdp"):
        train(head="split")


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_sharded_accumulated_untied_with_windows(opt: str) -> None:
    model = WINDOWS | {"model_type": "qwen2", "tie_word_embeddings": False, "max_window_layers": 2}
    settings: dict[str, Any] = {"model": model, "opt": {"name": opt}}
    assert_same(train(**settings), train(devices=4, axes={"tensor": 2}, micro=2, **settings), 1e-5)


@pytest.mark.parametrize("compute", [{"remat": "full"}, {"remat": "dots"}, {"unroll": True}, {"attention": "reference"},
                                     {"head": "chunked"}], ids=str)  # fmt: skip
def test_other_ways_to_compute_change_nothing(single, compute: dict[str, Any]) -> None:
    assert_same(single, train(**compute), 1e-5)


@pytest.mark.parametrize("types", [[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]], ids=str)
def test_layers_of_two_kinds_scanned_and_unrolled(types: list[int]) -> None:
    kinds = [("full_attention", "sliding_attention")[kind] for kind in types]
    model = WINDOWS | {"layer_types": kinds}
    assert_same(train(model=model), train(model=model, unroll=True), 1e-6)


def test_bfloat16_is_near_float32_and_keeps_float32_masters(single) -> None:
    history, state = train(dtype=jnp.bfloat16)
    assert history[-1]["train/loss"] == pytest.approx(single[0][-1]["train/loss"], rel=5e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def test_adamw_is_optax_on_one_flat_mean() -> None:
    """Loss and update by hand: mean over all trained tokens, then optax.adamw with the mask written out."""
    family = from_hf_config(SIZES | {"tie_word_embeddings": True})
    batch = {name: jnp.asarray(value) for name, value in make_batch(0).items()}

    @jax.jit
    def mean(params):
        logprob, _ = decoder.logprobs(family, params, batch)
        return -(logprob * batch["loss_weight"]).sum() / batch["loss_weight"].sum()

    params = init(family.table, jax.random.key(0))
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in str(path[-1]), params)
    adamw = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, 0.9, 0.95, 1e-3, weight_decay=0.1, mask=mask))
    updates, _ = adamw.update(jax.grad(mean)(params), adamw.init(params), params)
    wanted = optax.apply_updates(params, updates)
    opt = {"schedule": "constant", "warmup_steps": 0, "clip_norm": 0.1, "ema": 0.0, "eps": 1e-3}
    history, state = train(steps=1, opt=opt, z_loss=0.0)
    assert history[0]["train/loss"] == pytest.approx(float(mean(params)), rel=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), state.params, wanted)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    def poisoned(number: int) -> dict[str, np.ndarray]:
        batch = make_batch(number)
        return batch | {"loss_weight": batch["loss_weight"] * np.float32(np.inf if number == 1 else 1)}

    history, state = train(batches=poisoned)
    assert [h["train/skipped"] for h in history] == [0.0, 1.0, 0.0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))

    clean = train(batches=lambda number: make_batch(0 if number == 0 else 2))[1]
    assert state.step == clean.step == 3
    assert int(state.opt_state[1].count) == 2  # Adam saw two updates


def test_a_spike_changes_nothing_but_what_is_known_of_losses() -> None:
    """By hand: a loss over mean + z * standard deviation of the window, never before the window is full."""
    spikes = step.Spikes(zscore=0.5, window=3)
    history, state = train(steps=9, spikes=spikes, z_loss=0.0)
    losses = [h["train/loss"] for h in history]
    by_hand = [bool(n >= 3 and losses[n] > np.mean(losses[n - 3 : n]) + np.std(losses[n - 3 : n]) / 2) for n in range(9)]
    assert [bool(h["train/spike"]) for h in history] == by_hand and 0 < sum(by_hand) < 6, losses
    assert int(state.opt_state[1].count) == 9 - sum(by_hand)
    np.testing.assert_allclose(state.spikes, [losses[n] for n in (6, 7, 8)], rtol=1e-6)


def test_what_a_gpu_is_told_for_the_same_bits_every_time_is_an_option_that_xla_knows() -> None:
    told = compiler.options("gpu", {}, deterministic=True)
    assert told and compiler.options("gpu", {}) is None
    assert jax.jit(lambda a: a + 1, compiler_options=told)(1) == 2  # an unknown one is refused, on any platform


def test_a_batch_with_nothing_to_train_is_no_division_by_zero() -> None:
    history, state = train(batches=lambda number: make_batch(number) | {"loss_weight": np.zeros((B, T), np.float32)})
    assert [h["train/loss"] for h in history] == [0.0] * 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_packed_is_unpacked() -> None:
    """Documents in one row give each token what they give one by one."""
    family = from_hf_config(SIZES | WINDOWS | {"max_window_layers": 1})
    params = init(family.table, jax.random.key(1))
    batch = make_batch(3)
    logprobs = jax.jit(partial(decoder.logprobs, family))
    packed, _ = logprobs(params, {k: jnp.asarray(v) for k, v in batch.items()})
    for row in range(2):
        for segment in (1, 2, 3):
            here = batch["segments"][row] == segment
            alone = {k: jnp.asarray(v[row][here][None]) for k, v in batch.items()}
            logprob, _ = logprobs(params, alone)
            np.testing.assert_allclose(packed[row][here], logprob[0], atol=2e-5)


def test_moments_are_updated_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU XLA copies both of every weight by itself (see `maxi.compiler`)."""

    def loss(params: Any, batch: Any) -> Sums:
        product = params["w"] @ jnp.sin(params["w"] @ params["w"])  # a gradient that no update can compute by itself
        return Sums(product.sum(), batch["segments"].sum().astype(jnp.float32), {})

    def copies() -> int:
        over, rate = mesh.build(MeshConfig(), jax.devices()[:1]), optax.constant_schedule(1e-2)
        optimizer = optim.optimizer(OptimConfig(weight_decay=0.0), from_hf_config(SIZES).table, rate)
        state = jax.eval_shape(lambda: step.make_state({"w": jnp.zeros((64, 64))}, optimizer, ema=False))
        where = jax.tree.map(lambda _: jax.NamedSharding(over, jax.P()), state)
        with jax.set_mesh(over):
            take: Any = step.make_step(loss, optimizer, rate, where)
            program = take.lower(state, {"segments": jax.ShapeDtypeStruct((1, 8), jnp.int32)}).compile().as_text()
        return sum("f32[64,64]" in line and " copy(" in line for line in program.splitlines())

    assert copies() == 0
    monkeypatch.setattr(step.compiler, "options", lambda *_: None)
    assert copies() == 2


def test_golden_losses() -> None:
    """Ten steps. A refactor leaves these as they are; a change of maths says so."""
    history = train(steps=10)[0]
    golden.check_numbers("step_losses.txt", [{key: row[key] for key in ("train/loss", "optim/lr")} for row in history], 2e-5)
    golden.check_numbers("step_grad_norms.txt", [{"optim/grad_norm": row["optim/grad_norm"]} for row in history], 1e-3)
