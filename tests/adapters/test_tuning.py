"""What of a model is trained: where an adapter begins, that nothing else moves, and that devices do not matter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxi import adapters, mesh, objectives, optim, program, step
from maxi.adapters.weight import linear
from maxi.errors import ConfigError
from maxi.generation import logits
from maxi.hf import Loaded
from maxi.models import Model, from_hf_config
from maxi.models.model import restacked
from maxi.params import count, get, init
from maxi.sections import ComputeConfig, LoraConfig, MeshConfig, OptimConfig
from tests.test_step import SIZES, make_batch

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12)).tolist()


def model() -> Model:
    return from_hf_config(SIZES | {"tie_word_embeddings": False})


@pytest.fixture(scope="module")
def base() -> Any:
    return init(model().table, jax.random.key(3))


def scores(of: Model, tree: Any) -> np.ndarray:
    return logits(Loaded(of, tree, Path()), TOKENS)


@pytest.mark.parametrize(
    "options", [{"init": "pissa", "targets": ["q_proj"]}, {"targets": ["all", "lm_head", "embed_tokens"]}], ids=str
)
def test_it_begins_as_the_base_exactly(options: dict[str, Any], base: Any) -> None:
    tuning = adapters.build(model().table, kind="lora", rank=4, alpha=8.0, **options)
    first = tuning.first(jax.random.key(0), base)
    frozen = tuning.fix(base) | ({"start": first} if tuning.keeps_start else {})
    np.testing.assert_array_equal(scores(model(), tuning.join(first, frozen)), scores(model(), base))
    np.testing.assert_array_equal(scores(model(), tuning.off(dict, frozen)), scores(model(), base))


def test_dora_begins_as_the_base_to_rounding(base: Any) -> None:
    tuning = adapters.build(model().table, kind="lora", rank=4, alpha=8.0, dora=True, targets=["o_proj", "down_proj"])
    first = tuning.first(jax.random.key(0), base)
    np.testing.assert_allclose(scores(model(), tuning.join(first, tuning.fix(base))), scores(model(), base), atol=1e-5)


def test_pissa_starts_from_the_largest_singular_values(base: Any) -> None:
    tuning = adapters.build(model().table, kind="lora", rank=3, alpha=6.0, init="pissa")
    first = tuning.first(jax.random.key(0), base)
    for name, shape in {"w_q": (32, 64), "w_o": (64, 32), "w_down": (48, 32)}.items():
        weight = np.asarray(base["layers"][name][1], np.float64).reshape(shape)
        u, s, v = np.linalg.svd(weight)
        parts = (first["layers"][name][part][1] for part in "ab")
        a, b = next(parts).reshape(shape[0], 3), next(parts).reshape(3, shape[1])
        np.testing.assert_allclose(2.0 * a @ b, (u[:, :3] * s[:3]) @ v[:3], atol=1e-5, err_msg=name)


def train(base: Any, adapter: Any = program.FULL, freeze: tuple[str, ...] = (), steps: int = 2, **how: Any) -> Any:
    """A few steps: the losses, the program, and final state and base."""
    over = mesh.build(MeshConfig(**how.get("axes", {})), jax.devices()[: how.get("devices", 1)])
    compute = ComputeConfig(remat=how.get("remat", "none"), layers="scan", attention="reference")  # compiles sooner
    parts = (objectives.build("pretrain"), compute, OptimConfig(lr=1e-2, schedule="constant"), over, steps)
    built = program.build(model(), *parts, how.get("micro", 1), adapter, freeze, seed=5)
    with jax.set_mesh(over):
        first = built.tuning.first(jax.random.key(1), base)
        frozen = built.tuning.fix(base) | ({"start": first} if built.tuning.keeps_start else {})
        frozen = jax.device_put(frozen, built.frozen_where)
        state, take, losses = built.new_state(first), built.step(), []
        for number in range(steps):
            state, metrics = take(state, step.put(make_batch(number), over), frozen)
            losses.append(float(metrics["train/loss"]))
    return losses, built, jax.device_get(state), frozen


NOISY = LoraConfig(rank=4, alpha=8.0, dropout=0.2, targets=("q_proj", "down_proj"))
WAYS: dict[str, dict[str, Any]] = {
    "fsdp, tensor and micro-batches": {"devices": 4, "axes": {"tensor": 2}, "micro": 2},
    "fsdp, gathered ahead": {"devices": 4, "remat": "full"},
}


@pytest.fixture(scope="module")
def single(base: Any) -> Any:
    return train(base, NOISY)


@pytest.mark.parametrize("way", WAYS)
def test_other_devices_and_micro_batches_change_nothing(way: str, single: Any, base: Any) -> None:
    """With dropout: a row's draws are its own."""
    losses, _, state, _ = train(base, NOISY, **WAYS[way])
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    for got, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(single[2].params), strict=True):
        np.testing.assert_allclose(got, wanted, atol=3e-4)


def test_dropout_is_drawn_for_each_row_and_layer_and_only_in_training(base: Any) -> None:
    tuning = adapters.build(model().table, kind="lora", rank=4, alpha=8.0, dropout=0.25)
    first, frozen = tuning.first(jax.random.key(0), base), tuning.fix(base)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2))
    node = tuning.join(first, frozen, keys)["layers"]["w_gate"]
    assert len({tuple(key) for key in np.asarray(node.parts["noise"]).reshape(-1, 2).tolist()}) == 4 * 2
    layer = jax.tree.map(lambda leaf: leaf[1], node)
    layer.parts["b"] = jnp.ones_like(layer.parts["b"])
    x_BTD = jnp.ones((2, 64, 32))
    with_noise = linear("BTD,DF->BTF", x_BTD, layer)
    silent = layer.replace(parts={name: part for name, part in layer.parts.items() if name != "noise"})
    without = linear("BTD,DF->BTF", x_BTD, silent)
    assert np.ptp(without, axis=1).max() < 1e-5 < np.ptp(with_noise, axis=1).min()
    assert np.abs(with_noise[0] - with_noise[1]).max() > 1e-3
    kept = layer.kind._dropped(jnp.ones((2, 64, 320)), layer.parts)
    assert float((kept == 0).mean()) == pytest.approx(0.25, abs=0.01) and float(kept.mean()) == pytest.approx(1, abs=0.02)


def test_b_learns_faster_with_lora_plus(base: Any) -> None:
    updates = []
    for ratio in (1.0, 16.0):
        tuning = adapters.build(model().table, kind="lora", rank=4, alpha=8.0, lr_ratio=ratio, targets="q_proj")
        optimizer = optim.optimizer(OptimConfig(), tuning.table, optax.constant_schedule(1e-2))
        first = tuning.first(jax.random.key(0), base)
        grads = jax.tree.map(jnp.ones_like, first)
        update: Any = jax.jit(lambda first, grads, of=optimizer: of.update(grads, of.init(first), first)[0])(first, grads)
        updates.append(update["layers"]["w_q"])
    np.testing.assert_allclose(updates[1]["b"], 16 * updates[0]["b"], rtol=1e-6)
    np.testing.assert_array_equal(updates[1]["a"], updates[0]["a"])


@pytest.mark.parametrize(
    ("freeze", "learns"),
    [
        (("*", "!*norm*"), lambda name: "norm" in name),
        (("model.embed_tokens.*", "lm_head.*", "*.0.mlp.*_proj*"), lambda name: ".layers." in name and ".0.mlp." not in name),
    ],
    ids=["norms", "all but"],
)
def test_names_say_what_is_frozen(freeze: tuple[str, ...], learns: Callable[[str], bool]) -> None:
    tuning = adapters.build(model().table, freeze)
    inside = {name for name, _, _ in tuning.table.hf_tensors()}
    assert inside == {name for name, _, _ in model().table.hf_tensors() if learns(name) or name == "model.norm.weight"}


def test_what_is_frozen_stays(base: Any) -> None:
    """The last two layers alone learn, on four devices; the layers of one stack lie in two."""
    _, built, state, frozen = train(base, freeze=("*", "!model.layers.[23].*"), steps=1, devices=4, remat="full")
    merged = built.tuning.merged(state.params, frozen)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    names = [(name, path, number) for name, path, number in model().table.hf_tensors()]
    moved = {
        name
        for name, path, number in names
        if not np.array_equal(*(np.asarray(get(tree, path))[() if number is None else number] for tree in (merged, base)))
    }
    assert moved == {name for name, _, _ in names if "layers.2" in name or "layers.3" in name}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * count(built.tuning.table) < 2 * count(model().table)
    whole = built.tuning.join(state.params, frozen)
    np.testing.assert_allclose(scores(restacked(model(), built.tuning.whole), whole), scores(model(), merged), atol=1e-6)


def test_what_is_frozen_has_no_gradient_anywhere(base: Any) -> None:
    """Of the size of a stack of base weights nothing is computed in a step of LoRA, as it is in one of all weights."""
    over = mesh.build(MeshConfig(), jax.devices()[:1])
    parts = (objectives.build("pretrain"), ComputeConfig(layers="scan"), OptimConfig(lr=1e-2), over, 1, 1)
    stacks = {leaf.shape for leaf in base["layers"].values() if leaf.ndim > 2}
    for adapter, wanted in ((LoraConfig(rank=4), set()), (program.FULL, stacks)):
        built = program.build(model(), *parts, adapter)
        with jax.set_mesh(over):
            batch = built.abstract_batch({name: a[0] for name, a in make_batch(0).items()}, 8)
            traced = built.step().trace(built.abstract_state(), batch, built.abstract_frozen())
        assert made_in(traced.jaxpr.jaxpr) & stacks == wanted


def made_in(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of all that a program computes."""
    found = {getattr(var.aval, "shape", ()) for eqn in jaxpr.eqns for var in eqn.outvars}
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda node: hasattr(node, "jaxpr")):
            inside = getattr(inner, "jaxpr", inner)
            found |= made_in(inside) if hasattr(inside, "eqns") else set()
    return found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["q_prj"]}, "no target 'q_prj' in this model.*did you mean q_proj"),
        ({"targets": ["norm"]}, "no target 'norm'"),
        ({"targets": ["lm_head"], "tied": True}, "the head of this model is its embedding"),
        ({"targets": ["embed_tokens"], "tied": True}, "the head of this model is its embedding"),
        ({"targets": ["lm_head"], "dora": True}, "lm_head can only be a target of plain LoRA"),
        ({"freeze": ("model.layer.*",)}, "no weight is called 'model.layer.*'.*names look like model"),
        ({"freeze": ("*",)}, "every weight is frozen"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(options: dict[str, Any], words: str) -> None:
    table = from_hf_config(SIZES | {"tie_word_embeddings": options.pop("tied", False)}).table
    fields = {} if "freeze" in options else {"kind": "lora", "rank": 4, "alpha": 8.0}
    with pytest.raises(ConfigError, match=words):
        assert adapters.build(table, **fields, **options).table
