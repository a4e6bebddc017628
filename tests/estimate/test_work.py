"""What is counted exactly: FLOPs against a count by hand, the state's bytes against the program's own shardings."""

import math
from typing import Any

import jax
import pytest

from maxi import mesh, objectives, params, program
from maxi.errors import ConfigError
from maxi.estimate.memory import memory
from maxi.estimate.work import Layout, layout_of
from maxi.sections import ComputeConfig, FullConfig, IA3Config, LoraConfig, MeshConfig, OptimConfig
from tests.estimate.models import model, work


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_a_count_by_hand(tied: bool) -> None:
    """A grouped-query model, every matmul of one token written out; the lookup of an embedding is none."""
    hidden, heads, key_heads, head, inner, layers, vocabulary, rows = 64, 8, 2, 16, 192, 4, 1024, 512
    q = 2 * hidden * heads * head
    k = v = 2 * hidden * key_heads * head
    o = 2 * heads * head * hidden
    mlp = 2 * hidden * inner + 2 * hidden * inner + 2 * inner * hidden  # gate, up, down
    keys = sum(i + 1 for i in range(rows)) / rows  # that a token of a row sees on average
    scores = values = 2 * heads * head * keys
    logits = 2 * hidden * vocabulary
    forward = layers * (q + k + v + o + mlp + scores + values) + logits
    counted = work(width=rows, tie_word_embeddings=tied)
    assert counted.flops_per_token == 3 * forward == 3 * (4 * (16384 + 8192 + 16384 + 73728 + 131328.0) + 131072)
    assert counted.layer_flops + counted.head_flops + counted.attention_flops == pytest.approx(forward)
    assert counted.head_flops == logits and counted.attention_flops == pytest.approx(layers * (scores + values))


@pytest.mark.parametrize(
    ("optim", "axes"),
    [
        (OptimConfig(), {"fsdp": 8}),
        (OptimConfig(name="muon"), {"fsdp": 4, "tensor": 2}),
        (OptimConfig(ema=0.9), {"replica": 2, "fsdp": 2, "tensor": 2}),
        (OptimConfig(), {"fsdp": 4, "context": 2}),
    ],
    ids=str,
)
def test_the_state_takes_what_its_shardings_say(optim: OptimConfig, axes: dict[str, Any]) -> None:
    devices = mesh.build(MeshConfig(**({"fsdp": 1} | axes)))
    built = program.build(model(), objectives.build("pretrain"), ComputeConfig(), optim, devices, 10, 1)
    state = built.abstract_state()

    def held(tree: Any) -> int:
        return sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))

    found = memory(work(optim=optim), Layout(**axes))
    assert found.parameters == held(state.params)
    assert 0 < held(state) - (found.parameters + found.optimizer) < 32  # counters, and Muon's coefficients


@pytest.mark.parametrize(
    ("adapter", "freeze"),
    [
        (LoraConfig(rank=8), ()),
        (LoraConfig(rank=8, quantise="nf4", dora=True), ()),
        (IA3Config(), ()),
        (LoraConfig(rank=8, init="pissa"), ()),
        (FullConfig(), ("*", "!model.layers.[23].*")),
    ],
    ids=str,
)
def test_adapters_take_what_their_shardings_say(adapter: Any, freeze: tuple[str, ...]) -> None:
    axes: Any = {"fsdp": 8}
    devices = mesh.build(MeshConfig(**axes))
    parts = (objectives.build("pretrain"), ComputeConfig(dtype="bfloat16"), OptimConfig(), devices, 10, 1)
    built = program.build(model(), *parts, adapter, freeze)
    found = memory(counted := work(tuning=built.tuning), Layout(**axes))
    state, frozen = built.abstract_state(), built.abstract_frozen()

    def held(tree: Any) -> int:
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    whole = 8 * 1024 if "nf4" in str(adapter) else 0  # scales of groups are on every device
    assert found.parameters == pytest.approx(held(state.params) + held(frozen), abs=whole)
    assert found.optimizer == held(state.opt_state) - 8 and found.gradients == held(state.params)
    everything = 3 * params.matmul_flops_per_token(model().table)
    spared = model().train_flops_per_token(512) - counted.flops_per_token
    assert 0 < spared <= everything / 3 and built.train_flops_per_token(512) == counted.flops_per_token


def test_a_configs_layout_is_that_of_its_run() -> None:
    full, counted = ComputeConfig(), work()
    assert layout_of(MeshConfig(), counted, 16, 1, 4, full) == Layout(fsdp=16, micro_batches=4)
    assert layout_of(MeshConfig(replica=-1, fsdp=4), counted, 16, 1, 1, ComputeConfig(remat="dots")).remat == "dots"
    assert layout_of(MeshConfig(), counted, 16, 2, 1, full) == Layout(replica=2, fsdp=8)
    assert layout_of(MeshConfig(), counted, 128, 1, 1, full) == Layout(fsdp=64, context=2)  # 64 rows
    assert layout_of(MeshConfig(), counted, 8, 1, 1, full, on_cpu=True).remat == "none"
    with pytest.raises(ConfigError, match="needs 3 devices but there are 16"):
        layout_of(MeshConfig(fsdp=3), counted, 16, 1, 1, full)
    for asked in (MeshConfig(), MeshConfig(tensor=2), MeshConfig(replica=2, context=2)):
        assert mesh.build(asked, rows=64, seq_len=512).shape == layout_of(asked, counted, 8, 1, 1, full).mesh


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(fsdp=128), "batch_size 64 does not divide into 128"),
        (Layout(fsdp=8, micro_batches=16), "batch_size 64 does not divide into 128"),
        (Layout(context=512), "rows of 512 do not divide into 1024"),
        (Layout(tensor=4), "key/value heads 2 does not divide over tensor 4"),
    ],
    ids=lambda value: value.describe() if isinstance(value, Layout) else None,
)
def test_layouts_that_cannot_be_are_refused(layout: Layout, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        work().check(layout)
    work().check(Layout(fsdp=8, tensor=2, micro_batches=4))
