"""Weights gathered and gradients scattered by hand: the same numbers as without, and nothing moved that need not move."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maxi import fsdp, mesh, objectives, program
from maxi.errors import ConfigError
from maxi.models import from_hf_config
from maxi.params import shardings
from maxi.sections import ComputeConfig, MeshConfig, OptimConfig
from tests.test_step import SIZES, make_batch

DEPTH, WIDTH, ROWS = 5, 8, 4


def _layer(x: jax.Array, w: Any, extras: Any) -> jax.Array:
    return x + jnp.tanh(x @ w["in"]) @ w["out"] * w["scale"] + extras


def _by_hand(x: jax.Array, weights: Any, extras: jax.Array) -> tuple[jax.Array, Any]:
    """A sum over all rows and its gradients, every device with its own rows."""
    axes = {"in": 0, "out": 1, "scale": -1}

    def total(weights: Any) -> jax.Array:
        return (fsdp.scan_ahead(_layer, weights, axes, x, extras, jnp.float32) ** 2).sum()

    value, grads = jax.value_and_grad(total)(weights)
    return fsdp.summed(value), fsdp.summed(grads, {name: axis + 1 if axis >= 0 else -1 for name, axis in axes.items()})


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "replica": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_layers_gathered_ahead_are_the_layers(axes: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    x, extras = (jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32) for _ in range(2))
    shapes = {"in": (DEPTH, WIDTH, 6), "out": (DEPTH, 6, WIDTH), "scale": (DEPTH, WIDTH)}
    weights = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) / 3 for name, shape in shapes.items()}

    def plain(weights: Any) -> jax.Array:
        out = jax.lax.scan(lambda x, w: (_layer(x, w, extras), None), x, weights)[0]
        return (out**2).sum()

    wanted, wanted_grads = jax.value_and_grad(plain)(weights)
    specs = {"in": PartitionSpec(None, "fsdp"), "out": PartitionSpec(None, None, "fsdp"), "scale": PartitionSpec()}
    rows = PartitionSpec(("replica", "fsdp"))
    with jax.set_mesh(mesh.build(MeshConfig(**axes), jax.devices()[:4])):
        value, grads = jax.jit(fsdp.by_rows(_by_hand, (rows, specs, rows), (PartitionSpec(), specs)))(x, weights, extras)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, wanted_grads[name], rtol=1e-4, atol=1e-4)


def test_gradients_are_summed_in_float32() -> None:
    """Eight pieces whose sum bfloat16 cannot hold on the way: 256 + 1 is 256 there."""
    pieces = jnp.asarray([256, 1, 1, 1, 1, 1, 1, 1], jnp.bfloat16)[:, None] * jnp.ones((8, 8), jnp.bfloat16)
    rows = PartitionSpec("fsdp")
    with jax.set_mesh(mesh.build(MeshConfig(), jax.devices()[:8])):
        got = jax.jit(fsdp.by_rows(lambda mine: fsdp.scattered(mine[0], 0), (rows,), rows))(pieces)
    np.testing.assert_array_equal(got, np.full(8, 263.0, np.float32))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_step_reduces_nothing_that_can_be_scattered(remat: str) -> None:
    """The only all-reduces of a compiled step are of norms and scalars; matrices are gathered and scattered."""
    model = from_hf_config(SIZES | {"tie_word_embeddings": True})
    over = mesh.build(MeshConfig(), jax.devices()[:4])
    compute = ComputeConfig(remat=remat, layers="scan")  # type: ignore[arg-type]
    built = program.build(model, objectives.build("pretrain"), compute, OptimConfig(lr=1e-3), over, 10, 1)
    with jax.set_mesh(over):
        batch = built.abstract_batch({name: a[0] for name, a in make_batch(0).items()}, 8)
        text = built.step().lower(built.abstract_state(), batch).compile().as_text()
    reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    shapes = [dims for line in reduced for dims in re.findall(r"\[([\d,]*)\]", line)]
    sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in shapes]
    vectors = SIZES["num_hidden_layers"] * SIZES["hidden_size"]
    assert sizes and max(sizes) <= vectors
    assert "all-gather" in text and "all-to-all" in text


def test_each_matrix_is_split_along_its_first_whole_dimension() -> None:
    model = from_hf_config(SIZES | {"tie_word_embeddings": True})
    where = shardings(model.table, mesh.build(MeshConfig(), jax.devices()[:4]))
    assert where["layers"]["w_q"].spec == PartitionSpec(None, "fsdp", None, None)
    assert where["layers"]["w_o"].spec == PartitionSpec(None, "fsdp", None, None)
    assert where["embed"].spec == PartitionSpec("fsdp", None)
    assert where["layers"]["attn_norm"].spec == PartitionSpec(None, None)
    where = shardings(model.table, mesh.build(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]))
    assert where["layers"]["w_o"].spec == PartitionSpec(None, "tensor", "fsdp", None)
    assert where["embed"].spec == PartitionSpec("tensor", "fsdp")


def test_what_cannot_be_split_is_said() -> None:
    odd = from_hf_config(SIZES | {"vocab_size": 97, "hidden_size": 30, "tie_word_embeddings": True})
    words = r"vocab_size 97 x hidden_size 30 does not divide over fsdp 8 \(mesh\): change mesh.fsdp"
    with pytest.raises(ConfigError, match=words):
        shardings(odd.table, mesh.build(MeshConfig(), jax.devices()[:8]))
