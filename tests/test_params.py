"""The parameter table and what is derived from it."""

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxi import mesh, params
from maxi.config import load
from maxi.errors import ConfigError
from maxi.models import Model, from_hf_config
from maxi.models.model import LayerKind, blocks
from maxi.params import Param, Table
from maxi.sections import MeshConfig
from tests import golden

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MINI_QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 4864,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
GOLDEN = {
    "qwen2": MINI_QWEN,
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 8},
    "llama": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
}


def small(family: str = "qwen2", **fields: object) -> Model:
    return from_hf_config({"model_type": family, **SMALL, **fields})


@pytest.mark.parametrize("family", GOLDEN)
def test_table_is_the_golden_one(family: str) -> None:
    golden.check(f"table_{family}.txt", params.describe(from_hf_config(GOLDEN[family]).table))


def test_mini_qwen_has_its_published_size() -> None:
    model = from_hf_config(MINI_QWEN)
    assert params.count(model.table) == 998_810_624
    assert model.tied


def test_count_is_that_of_the_tree_and_tying_saves_one_embedding() -> None:
    for family in GOLDEN:
        table = small(family).table
        assert params.count(table) == sum(leaf.size for leaf in jax.tree.leaves(params.abstract(table)))
    untied, tied = small().table, small(tie_word_embeddings=True).table
    assert params.count(untied) - params.count(tied) == 64 * 16


def test_flops_count_every_matmul_weight_twice_and_the_head_once() -> None:
    layers = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24)
    assert params.matmul_flops_per_token(small().table) == 2 * (layers + 64 * 16)
    assert params.matmul_flops_per_token(small(tie_word_embeddings=True).table) == 2 * (layers + 64 * 16)


@pytest.mark.parametrize("family", GOLDEN)
def test_from_hf_inverts_to_hf(family: str) -> None:
    table = small(family, tie_word_embeddings=False).table
    rng = np.random.default_rng(0)
    for path, param in table.params.items():
        ours = rng.normal(size=[table.sizes[letter] for letter in param.letters])
        theirs = params.to_hf(param, ours)
        assert theirs.shape == table.hf_shape(param), path
        assert np.array_equal(params.from_hf(table, param, theirs), ours), path


def test_linear_layers_are_transposed_and_heads_are_split_in_order() -> None:
    table = small().table
    theirs = np.arange(16 * 16).reshape(16, 16)  # q_proj.weight, [heads x head_dim, hidden]
    ours = params.from_hf(table, table.params["layers.w_q"], theirs)
    assert ours.shape == (16, 4, 4)
    assert ours[5, 2, 3] == theirs[2 * 4 + 3, 5]


def test_hf_tensors_name_every_layer_once() -> None:
    table = small().table
    names = [name for name, _, _ in table.hf_tensors()]
    assert len(names) == len(set(names)) == 3 + 2 * 12
    assert ("model.layers.1.mlp.up_proj.weight", "layers.w_up", 1) in table.hf_tensors()


def test_stacks_may_hold_any_layers() -> None:
    param = Param("LD", "model.layers.{L}.w", "D")
    table = Table({"a.w": param, "b.w": param}, {"D": 4}, {"a": (0, 2), "b": (1,)}, 0.02)
    assert list(table.hf_tensors()) == [
        ("model.layers.0.w", "a.w", 0),
        ("model.layers.1.w", "b.w", 0),
        ("model.layers.2.w", "a.w", 1),
    ]
    assert table.shape("a.w") == (2, 4)


def test_norms_and_biases_never_decay_and_embeddings_by_choice() -> None:
    table = small().table
    with_embeddings = params.decay_mask(table, embeddings=True)
    without = params.decay_mask(table, embeddings=False)
    assert with_embeddings["embed"] and with_embeddings["lm_head"]
    assert not without["embed"] and not without["lm_head"]
    for mask in (with_embeddings, without):
        assert {name for name, decays in mask["layers"].items() if decays} == {
            f"w_{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")
        }
        assert not mask["final_norm"]


def test_first_weights_depend_on_the_path_not_on_the_order() -> None:
    whole = small().table
    paths = ("embed", "layers.w_gate", "layers.w_up")
    first, second = (
        params.init(Table({path: whole.params[path] for path in order}, whole.sizes, whole.stacks, 0.02), jax.random.key(3))
        for order in (paths, paths[::-1])
    )
    for path in paths:
        assert np.array_equal(params.get(first, path), params.get(second, path)), path
    assert not np.array_equal(first["layers"]["w_gate"], first["layers"]["w_up"])


def test_first_weights_have_transformers_distribution() -> None:
    whole = small(initializer_range=0.05).table
    few = {path: whole.params[path] for path in ("embed", "layers.attn_norm", "layers.b_q")}
    first = params.init(Table(few, whole.sizes, whole.stacks, whole.init_std), jax.random.key(0))
    assert abs(float(jnp.std(first["embed"])) - 0.05) < 0.005
    assert (first["layers"]["attn_norm"] == 1).all() and (first["layers"]["b_q"] == 0).all()


def test_shardings_refuse_sizes_that_do_not_divide() -> None:
    devices = mesh.build(MeshConfig(fsdp=2, tensor=4))
    with pytest.raises(ConfigError) as caught:
        params.shardings(small().table, devices)
    assert str(caught.value) == ("maxi: error[2] key/value heads 2 does not divide over tensor 4 (mesh): change mesh.tensor")
    params.shardings(small(num_key_value_heads=4).table, devices)


F, W = LayerKind(), LayerKind(window=8)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([F, F, F], [((F,), 3)]),
        ([F, F, F, W, W], [((F,), 3), ((W,), 2)]),
        ([W, F, W, F], [((W, F), 2)]),
        ([F], [((F,), 1)]),
        ([W, W, W, F] * 3, [((W, W, W, F), 3)]),
    ],
)
def test_blocks_find_the_period(kinds: list[LayerKind], expected: list[tuple[tuple[LayerKind, ...], int]]) -> None:
    found = [(block.kinds, block.repeats) for block in blocks(tuple(kinds))]
    assert found == expected


def test_blocks_are_the_layers_whatever_they_are() -> None:
    rng = random.Random(0)
    for _ in range(300):
        layers = tuple(rng.choice([F, W, LayerKind(stack="other")][: rng.randint(1, 3)]) for _ in range(rng.randint(1, 24)))
        found = blocks(layers)
        assert sum((block.kinds * block.repeats for block in found), ()) == layers
        assert [block.start for block in found] == [
            sum(len(before.kinds) * before.repeats for before in found[:i]) for i in range(len(found))
        ]


def test_a_periodic_model_is_one_block() -> None:
    rng = random.Random(1)
    for _ in range(50):
        period = tuple(rng.choice([F, W]) for _ in range(rng.randint(1, 5)))
        repeats = rng.randint(2, 6)
        (block,) = blocks(period * repeats)
        assert len(block.kinds) <= len(period)


def test_the_mini_qwen_config_is_its_model_to_the_parameter() -> None:
    config = load(Path(__file__).parent.parent / "configs" / "mini_qwen_1b_pretrain.yaml")
    assert isinstance(config.model.config, dict)
    assert params.count(from_hf_config(config.model.config).table) == 998_810_624
    assert config.batch_size * config.seq_len == 1152 * 1024 and config.steps == 13523
