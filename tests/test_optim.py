"""Learning rates against numbers by hand; Muon against optax's own; what decays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from maxi import optim
from maxi.models import from_hf_config
from maxi.params import init
from maxi.sections import OptimConfig

MODEL = from_hf_config(
    {
        "model_type": "qwen3",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": False,
    }
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, {0: 1.0, 50: 1.0, 99: 1.0}),
        ({"schedule": "constant", "warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 99: 1.0}),
        ({"schedule": "linear", "warmup_ratio": 0.2}, {0: 0.05, 19: 1.0, 20: 1.0, 60: 0.5, 100: 0.0}),
        ({"schedule": "cosine", "warmup_steps": 20, "min_lr_ratio": 0.1}, {19: 1.0, 60: 0.55, 100: 0.1}),
        ({"schedule": "wsd", "warmup_steps": 10, "decay_ratio": 0.2}, {9: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
        ({"schedule": "wsd", "decay_ratio": 1.0}, {0: 1.0, 50: 0.5}),
    ],
    ids=str,
)
def test_schedules(settings: dict, expected: dict[int, float]) -> None:
    rate: Any = optim.schedule(OptimConfig(lr=2.0, **settings), 100)
    for step, share in expected.items():
        assert float(rate(step)) == pytest.approx(2.0 * share, abs=1e-6), step


def _update(config: OptimConfig, grads: Any, params: Any) -> Any:
    optimizer = optim.optimizer(config, MODEL.table, optax.constant_schedule(1.0))
    return optimizer.update(grads, optimizer.init(params), params)[0]


@pytest.fixture(scope="module")
def params() -> Any:
    return init(MODEL.table, jax.random.key(0))


@pytest.fixture(scope="module")
def grads(params: Any) -> Any:
    return jax.tree.map(lambda w: jax.random.normal(jax.random.key(w.size), w.shape), params)


@pytest.mark.parametrize("embeddings", [True, False])
def test_norms_never_decay_and_embeddings_by_choice(embeddings: bool, params: Any) -> None:
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = _update(OptimConfig(weight_decay=0.5, decay_embeddings=embeddings), zeros, params)
    for name, update in updates["layers"].items():
        decayed = -0.5 * params["layers"][name]
        np.testing.assert_allclose(update, 0 if name.endswith("norm") else decayed, atol=1e-7, err_msg=name)
    for name in ("embed", "lm_head"):
        np.testing.assert_allclose(updates[name], -0.5 * params[name] if embeddings else 0, atol=1e-7)
    np.testing.assert_array_equal(updates["final_norm"], 0)


def test_muon_takes_each_layer_as_the_matrix_it_is(params: Any, grads: Any) -> None:
    """Against optax.contrib.muon on that one [out, in] matrix, heads flattened, with the same scaling to AdamW."""
    updates = _update(OptimConfig(name="muon", weight_decay=0.0, clip_norm=0.0), grads, params)
    shapes = {"w_q": (16, 32), "w_o": (32, 16), "w_k": (16, 16), "w_down": (24, 16), "w_up": (16, 24)}
    for name, shape in shapes.items():
        for layer in range(3):
            matrix = grads["layers"][name][layer].reshape(shape)
            alone: Any = contrib.muon(1.0, consistent_rms=optim.MUON_RMS)
            wanted = alone.update({"w": matrix}, alone.init({"w": matrix}), {"w": matrix})[0]["w"]
            np.testing.assert_allclose(updates["layers"][name][layer].reshape(shape), wanted, atol=2e-5, err_msg=name)


def test_muon_leaves_embeddings_and_norms_to_adamw(params: Any, grads: Any) -> None:
    muon, adamw = (_update(OptimConfig(name=name, clip_norm=0.0), grads, params) for name in ("muon", "adamw"))
    for name in ("embed", "lm_head", "final_norm"):
        np.testing.assert_array_equal(muon[name], adamw[name])
    np.testing.assert_array_equal(muon["layers"]["q_norm"], adamw["layers"]["q_norm"])
    assert not np.allclose(muon["layers"]["w_q"], adamw["layers"]["w_q"], atol=1e-3)
