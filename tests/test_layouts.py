"""Every layout of the mesh takes the same step as one device, for pretraining, SFT and DPO, and exports the same folder."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from maxi import hf, mesh, objectives, program, step
from maxi.models import Model, decoder, from_hf_config
from maxi.models.decoder import Compute
from maxi.params import init, shardings
from maxi.sections import ComputeConfig, MeshConfig, OptimConfig
from tests import test_pairs
from tests.test_step import SIZES, make_batch

LAYOUTS = {
    "fsdp 8": {"fsdp": 8},
    "fsdp 2, tensor 4": {"fsdp": 2, "tensor": 4},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "tensor 2": {"fsdp": 1, "tensor": 2},
    "context 2": {"fsdp": 1, "context": 2},
    "replica 2, fsdp 4": {"replica": 2, "fsdp": 4},
}
FIELDS = SIZES | {"num_hidden_layers": 1, "num_key_value_heads": 4, "tie_word_embeddings": False}


@cache
def family() -> Model:
    return from_hf_config(FIELDS)


@cache
def weights(seed: int) -> Any:
    return jax.device_get(init(family().table, jax.random.key(seed)))


@cache
def batches(name: str) -> list[dict[str, np.ndarray]]:
    """Packed documents, then conversations of which half the tokens count; or packed pairs, the reference of other weights."""
    if name == "dpo":
        return [test_pairs.batch_of(test_pairs.rows(), weights(1), family(), size=8)]
    text, said = make_batch(0), make_batch(1)
    return [text, said | {"loss_weight": said["loss_weight"] * (said["positions"] % 2)}]


def stepped(name: str, axes: dict[str, int]) -> tuple[list[dict[str, float]], Any]:
    """Metrics of the steps of a real program, and the weights. Its Adam is nearly SGD: it would blow rounding up."""
    over = mesh.build(MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])
    compute = ComputeConfig(attention="ring" if "context" in axes else "reference")
    optimizer = OptimConfig(lr=1.0, eps=1e3, clip_norm=1e9)
    built = program.build(family(), objectives.build(name), compute, optimizer, over, 10, 1)
    history = []
    with jax.set_mesh(over):
        state = built.new_state(jax.device_put(weights(0), built.where.params))
        take = built.step()
        for batch in batches(name):
            state, metrics = take(state, step.put(batch, over))
            history.append({key: float(value) for key, value in metrics.items()})
        return history, jax.device_get(state.params)


@pytest.fixture(scope="module", params=["sft", "dpo"])
def single(request: pytest.FixtureRequest) -> Any:
    """One device. Pretraining and SFT differ in their rows alone (below), so one program takes both."""
    return request.param, stepped(request.param, {"fsdp": 1})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_is_that_of_one_device(single: Any, layout: str) -> None:
    name, (wanted, whole) = single
    history, params = stepped(name, LAYOUTS[layout])
    for metrics, expected in zip(history, wanted, strict=True):
        for key, value in expected.items():
            assert metrics[key] == pytest.approx(value, rel=5e-6, abs=2e-6), key
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(weights(0)), strict=True)]
    apart = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True)]
    assert min(moved) > 0 and all(a < 1e-4 * max(moved) + 1e-7 for a in apart), (moved, apart)


def test_pretraining_and_sft_are_one_program() -> None:
    batch: Any = batches("sft")[1]
    logprobs = decoder.Logprobs(family(), Compute(attention="reference"))
    traced = [
        str(jax.make_jaxpr(lambda params, name=name: objectives.build(name).loss(logprobs, params, batch))(weights(0)))
        for name in ("pretrain", "sft")
    ]
    assert traced[0] == traced[1]


def test_every_layout_exports_the_same_folder(tmp_path: Path) -> None:
    def exported(name: str, axes: dict[str, int]) -> dict[str, bytes]:
        over = mesh.build(MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])
        with jax.set_mesh(over):
            params = jax.device_put(weights(0), shardings(family().table, over))
            hf.write(family(), params, tmp_path / name / "hf", dtype="bfloat16")
        return {file.name: file.read_bytes() for file in (tmp_path / name / "hf").iterdir()}

    wanted = exported("one device", {"fsdp": 1})
    assert {"model.safetensors", "config.json", "README.md"} <= wanted.keys()
    for name, axes in LAYOUTS.items():
        assert exported(name, axes) == wanted, name
