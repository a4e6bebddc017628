"""Adapters as peft has them: its files are read, what is written it reads, and a step is its step."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft as theirs
import pytest
import torch
from safetensors.numpy import load_file

from maxi import mesh, objectives, program
from maxi import step as steps
from maxi.generation import logits
from maxi.hf import peft
from maxi.params import get
from maxi.pretrained import open_model
from maxi.sections import ComputeConfig, LoraConfig, MeshConfig, OptimConfig
from tests import tiny
from tests.adapters import sides
from tests.adapters.sides import TOKENS


def lora(**fields: Any) -> Any:
    return theirs.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields})


CASES: dict[str, tuple[str, Any]] = {
    "dora": ("qwen2", lora(use_dora=True)),
    "ranks and scales of their own": (
        "qwen2",
        lora(rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 3}, alpha_pattern={"o_proj": 3}),
    ),
    "rslora in one layer": ("qwen3", lora(target_modules=["v_proj", "down_proj"], layers_to_transform=[1], use_rslora=True)),
    "ia3": (
        "qwen2",
        theirs.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    ),
    "embedding and head": ("llama", lora(target_modules=["embed_tokens", "lm_head", "v_proj"])),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft_both_ways(case: str, tmp_path: Path) -> None:
    """peft's adapter gives peft's logits here, beside the base and merged; written again it gives them in peft."""
    both = sides.build(tmp_path, *CASES[case])
    wanted = tiny.logits(both.theirs, TOKENS)
    assert np.abs(wanted - tiny.logits(both.theirs.unload(), TOKENS)).max() > 0.1
    np.testing.assert_allclose(logits(both.joined, TOKENS.tolist()), wanted, atol=1e-4)
    np.testing.assert_allclose(logits(both.merged, TOKENS.tolist()), wanted, atol=1e-4)
    for got, same in zip(*map(jax.tree.leaves, (open_model(both.adapter).params, both.merged.params)), strict=True):
        np.testing.assert_array_equal(got, same)
    out = peft.write(both.tuning, both.params, both.frozen, tmp_path / "out", base_name=str(both.base))
    np.testing.assert_allclose(tiny.logits(sides.loaded_by_peft(both.base, out), TOKENS), wanted, atol=1e-4)


@pytest.mark.parametrize("case", ["dora", "ranks and scales of their own"])
def test_names_shapes_and_bytes_are_those_of_peft(case: str, tmp_path: Path) -> None:
    both = sides.build(tmp_path, *CASES[case])
    out = peft.write(both.tuning, both.params, both.frozen, tmp_path / "out", base_name=str(both.base))
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (both.adapter, out))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    written, known = (json.loads((folder / "adapter_config.json").read_text()) for folder in (out, both.adapter))
    assert set(written["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    differing = {name for name in written if written[name] != known[name]} - {"target_modules"}
    assert differing <= {"base_model_name_or_path"}


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_a_step_is_that_of_peft_and_adamw(case: str, tmp_path: Path) -> None:
    targets = ("q_proj", "down_proj")
    both = sides.build(tmp_path, "qwen2", lora(target_modules=list(targets), use_dora=case == "dora"))
    rate, decay = 1e-3, 0.1
    ids = torch.tensor(TOKENS)
    trained = [(name, weight) for name, weight in both.theirs.named_parameters() if weight.requires_grad]
    matrices = [weight for name, weight in trained if "magnitude" not in name]
    vectors = [weight for name, weight in trained if "magnitude" in name]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    # with eps 1e-8 a gradient that is next to nothing, and so its rounding, decides a whole step
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-6)
    loss = both.theirs(ids, labels=ids).loss
    loss.backward()
    optimizer.step()

    devices = mesh.build(MeshConfig(), jax.devices()[:1])
    optim = OptimConfig(lr=rate, schedule="constant", clip_norm=0.0, weight_decay=decay, eps=1e-6)
    adapter = LoraConfig(rank=4, alpha=8.0, dora=case == "dora", targets=targets)
    built = program.build(both.model, objectives.build("pretrain"), ComputeConfig(), optim, devices, 1, 1, adapter)
    assert built.tuning == both.tuning
    tokens = TOKENS.astype(np.int32)
    positions = np.broadcast_to(np.arange(15, dtype=np.int32), (2, 15))
    ones = np.ones((2, 15), np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segments": ones}
    batch["loss_weight"] = ones.astype(np.float32)
    with jax.set_mesh(devices):
        state, metrics = built.step()(built.new_state(both.params), steps.put(batch, devices), both.frozen)
    assert float(metrics["train/loss"]) == pytest.approx(loss.item(), rel=1e-5)
    both.theirs.save_pretrained(tmp_path / "after")
    settings = peft.open_adapter(tmp_path / "after")
    after = peft.read(settings, both.tuning)  # type: ignore[arg-type]
    for path in both.tuning.table.params:
        wanted, got = get(after, path), get(state.params, path)
        assert np.abs(wanted - get(both.params, path)).max() > rate / 2, path
        np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=path)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(both.params))
