"""Our logits are transformers' logits, on the same random weights, for every feature that config.json can ask for."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxi import hf
from maxi.models import Model
from maxi.models.decoder import Compute, hidden, logits
from maxi.params import Tree
from tests import tiny

TOLERANCE = 2e-5
"""Of the largest logit; ten times tighter than what is promised (2e-4)."""

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiling is nearly all the time these tests take."""

_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_YARN = {"rope_type": "yarn", "factor": 4.0}
_ALTERNATING = ["sliding_attention", "full_attention"] * 3
_WINDOW = {"use_sliding_window": True, "sliding_window": 7}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-mha": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-mqa": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2-gqa7": ("qwen2", {"hidden_size": 56, "num_attention_heads": 14}),
    "qwen2-theta": ("qwen2", {"rope_theta": 1e6, "rms_norm_eps": 1e-5}),
    "qwen2-head-dim": ("qwen2", {"head_dim": 16}),
    "qwen2-window": ("qwen2", {**_WINDOW, "max_window_layers": 0}),
    "qwen2-max-window-layers": ("qwen2", {**_WINDOW, "max_window_layers": 2, "num_hidden_layers": 5}),
    "qwen2-layer-types": ("qwen2", {**_WINDOW, "layer_types": _ALTERNATING, "num_hidden_layers": 6}),
    "qwen2-irregular-layer-types": (
        "qwen2",
        {**_WINDOW, "layer_types": _ALTERNATING[:4] + ["full_attention"] * 3, "num_hidden_layers": 7},
    ),
    "qwen2-window-off": ("qwen2", {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {**_YARN, "original_max_position_embeddings": 16, "rope_theta": 1e4}}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3-window": ("qwen3", {"head_dim": 16, **_WINDOW, "layer_types": _ALTERNATING, "num_hidden_layers": 6}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 20}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-dynamic-short": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "llama-dynamic-long": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 16},
    ),
    "llama-llama3": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3}, "head_dim": 32}),
    "llama-yarn": ("llama", {"rope_parameters": {**_YARN, "rope_theta": 1e4}}),
    "llama-yarn-attention-factor": (
        "llama",
        {"rope_parameters": {**_YARN, "attention_factor": 1.3, "original_max_position_embeddings": 16, "rope_theta": 1e4}},
    ),
    "llama-yarn-mscale": (
        "llama",
        {
            "rope_parameters": {
                **_YARN,
                "mscale": 0.7,
                "mscale_all_dim": 1.1,
                "original_max_position_embeddings": 16,
                "rope_theta": 1e4,
            }
        },
    ),
    "llama-yarn-betas": (
        "llama",
        {
            "rope_parameters": {
                **_YARN,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            },
            "head_dim": 32,
        },
    ),
}


def our_logits(model: Model, params: Tree, tokens: np.ndarray, segments: Any = None, positions: Any = None, **how: Any):
    compute = Compute(**how)
    segments = np.ones_like(tokens) if segments is None else segments
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions

    def run(params: Tree, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        return logits(params, hidden(model, params, tokens, positions, segments, compute), compute)

    return np.asarray(
        jax.jit(run, compiler_options=QUICK)(
            params, *(jnp.asarray(array, jnp.int32) for array in (tokens, positions, segments))
        )
    )


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= TOLERANCE, error


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, fields = CASES[name]
    theirs = tiny.save(tmp_path, family, **fields)
    model, params = hf.read(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 37))
    expected = tiny.logits(theirs, tokens)
    assert_close(our_logits(model, params, tokens), expected)
    if "rope_parameters" not in fields:  # rotary embeddings do not know how layers are run
        assert_close(our_logits(model, params, tokens, unroll=True, attention="reference"), expected)


def test_windows_matter() -> None:
    """The cases above would be worth nothing if the window did not change the logits."""
    tokens = np.random.default_rng(0).integers(0, 96, (1, 37))
    fields = {"use_sliding_window": True, "max_window_layers": 0}
    narrow, wide = (tiny.logits(tiny.build("qwen2", **fields, sliding_window=w), tokens) for w in (7, 64))
    assert np.abs(narrow - wide).max() > 0.01 * np.abs(wide).max()


@pytest.mark.parametrize("length", [1, 2, 129, 257])
def test_any_length(length: int, tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}
    theirs = tiny.save(tmp_path, "qwen2", max_position_embeddings=512, **window)
    model, params = hf.read(tmp_path)
    tokens = np.random.default_rng(length).integers(0, 96, (1, length))
    assert_close(our_logits(model, params, tokens), tiny.logits(theirs, tokens))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(side: str, tmp_path: Path) -> None:
    theirs = tiny.save(tmp_path, "qwen3", head_dim=16)
    model, params = hf.read(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 96, (3, 20))
    lengths = np.array([[20], [13], [5]])
    real = np.arange(20) < lengths if side == "right" else np.arange(20) >= 20 - lengths
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    expected = tiny.logits(theirs, tokens, real.astype(int))
    ours = our_logits(model, params, tokens, segments=real.astype(int), positions=positions)
    assert_close(ours[real], expected[real])


@pytest.mark.parametrize("name", ["qwen2-layer-types", "qwen3", "llama-llama3"])
@pytest.mark.parametrize("how", [{}, {"unroll": True}, {"attention": "reference"}], ids=["scan", "unroll", "reference"])
def test_packed_documents_do_not_see_each_other(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    family, fields = CASES[name]
    tiny.save(tmp_path, family, **fields)
    model, params = hf.read(tmp_path)
    rng = np.random.default_rng(2)
    lengths = (11, 1, 19, 6)
    documents = np.zeros((4, 19), int)
    real = np.arange(19) < np.array(lengths)[:, None]
    documents[real] = rng.integers(0, 96, sum(lengths))
    packed = documents[real][None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    segments = np.repeat([1, 2, 3, 4], lengths)[None]
    alone = our_logits(model, params, documents, real, **how)[real]
    assert_close(our_logits(model, params, packed, segments, positions, **how)[0], alone)
