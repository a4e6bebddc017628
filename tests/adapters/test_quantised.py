"""Frozen weights in 4 and 8 bits: the nearest codes, few bits, and training beside them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxi import adapters
from maxi.adapters.quantised import NF4, quantise
from maxi.errors import ConfigError
from maxi.models import from_hf_config
from maxi.params import init
from maxi.sections import LoraConfig
from tests.adapters.test_tuning import model, train
from tests.test_step import SIZES


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    """Two layers whose blocks have scales of their own, and one block of zeros."""
    rng = np.random.default_rng(0)
    made = rng.normal(size=(2, 24, 256)) * rng.lognormal(size=(2, 24, 1))
    made[0, 3, 64:128] = 0
    return made.astype(np.float32)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_every_weight_is_the_nearest_level_of_its_block(precision: Any, weight: np.ndarray) -> None:
    """Against float64: each level is a code times the block's largest magnitude, to what 8 bits of scale lose."""
    kept = quantise(jnp.asarray(weight), precision, stacked=True)
    got = np.asarray(jax.vmap(lambda layer: layer.expand(jnp.float32))(kept), np.float64)
    blocks = weight.astype(np.float64).reshape(2, 24, 4, 64)
    absmax = np.abs(blocks).max(-1, keepdims=True)
    levels = np.array(NF4, np.float64) if precision == "nf4" else np.arange(-127, 128) / 127
    shares = np.divide(blocks, absmax, out=np.zeros_like(blocks), where=absmax > 0)
    nearest = levels[np.abs(shares[..., None] - levels).argmin(-1)] * absmax
    spread = np.abs(absmax - absmax.mean((1, 2), keepdims=True)).max((1, 2), keepdims=True) / 254  # half a step of a scale
    apart = np.abs(got.reshape(blocks.shape) - blocks) - np.abs(nearest - blocks)
    assert (apart <= spread + 1e-6 * absmax).all()
    assert (got.reshape(blocks.shape)[0, 3, 1] == 0).all()
    bits = 8 * sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(kept)) / weight.size
    assert bits < (4.2 if precision == "nf4" else 8.2)


def test_an_int8_weight_is_closer_than_an_nf4_one(weight: np.ndarray) -> None:
    errors = []
    for precision in ("int8", "nf4"):
        kept = quantise(jnp.asarray(weight), precision, stacked=True)  # type: ignore[arg-type]
        got = jax.vmap(lambda layer: layer.expand(jnp.float32))(kept)
        errors.append(float(np.linalg.norm(got - weight) / np.linalg.norm(weight)))
    assert errors[0] < 0.01 and 0.05 < errors[1] < 0.12


QLORA = LoraConfig(rank=4, alpha=8.0, quantise="nf4", targets=("q_proj", "down_proj"))


def test_training_beside_it_is_training_beside_what_it_expands_to() -> None:
    base = init(model().table, jax.random.key(3))
    losses, built, state, frozen = train(base, QLORA, devices=4, remat="full")
    expanded = built.tuning.merged(built.tuning.first(jax.random.key(9), base), frozen)  # b is 0: the base as it is kept
    plain, _, other, _ = train(expanded, replace(QLORA, quantise="none"))
    np.testing.assert_allclose(losses, plain, rtol=1e-5)
    for got, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(got, wanted, atol=3e-4)
    assert np.abs(expanded["layers"]["w_up"] - base["layers"]["w_up"]).max() > 1e-3


def test_what_cannot_be_quantised_is_said() -> None:
    odd = from_hf_config(SIZES | {"intermediate_size": 49}).table
    with pytest.raises(ConfigError, match=r"layers\.w_gate cannot be quantised, its last dimension is 49"):
        adapters.build(odd, kind="lora", rank=4, alpha=8.0, quantise="nf4")
