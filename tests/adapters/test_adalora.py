"""AdaLoRA: ranks, weights and files are peft's, on any devices, and a run that was stopped knows where it stood."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft as theirs
import pytest
import torch
from safetensors.numpy import load_file

from maxi import adapters, mesh, objectives, program
from maxi import step as steps
from maxi.__main__ import main
from maxi.data.cache import TokenCache
from maxi.data.loader import stack
from maxi.data.sample_rows import SampleRows
from maxi.generation import logits
from maxi.hf import peft
from maxi.models import decoder, from_hf_config
from maxi.params import get, init
from maxi.pretrained import open_model
from maxi.sections import AdaLoraConfig, ComputeConfig, MeshConfig, OptimConfig
from tests import tiny
from tests.adapters import sides
from tests.adapters import test_runs as runs
from tests.adapters.test_runs import home as home
from tests.test_pairs import SMALL

TOTAL, RATE, CLIP = 7, 2e-3, 0.5
SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "beta1": 0.8, "beta2": 0.7, "orth_reg_weight": 0.3}
TARGETS = ("q_proj", "o_proj")
OURS = AdaLoraConfig(**SCHEDULE, alpha=8.0, delta_t=2, targets=TARGETS)
THEIRS = theirs.AdaLoraConfig(
    **SCHEDULE, lora_alpha=8, deltaT=2, total_step=TOTAL, target_modules=list(TARGETS), task_type="CAUSAL_LM"
)
ROWS = np.random.default_rng(5).integers(0, tiny.SIZES["vocab_size"], (TOTAL, 2, 16))


CACHE = TokenCache(ROWS[0].reshape(-1), np.array([16, 32]), None, None, {}, "", True)


def _orthogonal_term(inner: Any) -> Any:
    grams = [
        weight @ weight.T if "lora_A" in name else weight.T @ weight
        for name, weight in inner.named_parameters()
        if "lora_A" in name or "lora_B" in name
    ]
    return OURS.orth_reg_weight * torch.stack([torch.dist(gram, torch.eye(len(gram))) for gram in grams]).mean()


def by_peft(both: sides.Sides) -> tuple[list[float], list[Any]]:
    """The losses of peft's steps, and the ranks that each left."""
    trained = [weight for weight in both.theirs.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    inner, losses, ranks = both.theirs.base_model, [], []
    for number, rows in enumerate(ROWS):
        ids = torch.tensor(rows)
        loss = both.theirs(ids, labels=ids).loss
        losses.append((loss - _orthogonal_term(inner)).item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        inner.update_and_allocate(number)
        optimizer.zero_grad()
        ranks.append({name: (weight != 0).flatten().tolist() for name, weight in inner.named_parameters() if "lora_E" in name})
    return losses, ranks


def test_steps_and_ranks_are_those_of_peft_on_any_devices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    both = sides.build(tmp_path, "qwen2", THEIRS)
    devices = mesh.build(MeshConfig(), jax.devices()[:4])
    optim = OptimConfig(lr=RATE, schedule="constant", clip_norm=CLIP, weight_decay=0.0, eps=1e-6)
    compute = ComputeConfig(layers="scan")
    built = program.build(both.model, objectives.build("pretrain"), compute, optim, devices, TOTAL, 2, OURS)
    assert isinstance(built.tuning, adapters.OnWeights) and built.tuning.table == both.tuning.table
    losses, ranks = by_peft(both)
    with jax.set_mesh(devices):
        state, take, frozen = built.new_state(both.params), built.step(), jax.device_put(both.frozen, built.frozen_where)
        for number, ids in enumerate(ROWS):
            rows = SampleRows(replace(CACHE, tokens=ids.reshape(-1)), 15, pack=False)
            batch = stack([rows[0], rows[1], *[rows.blank()] * 6])
            state, metrics = take(state, steps.put(batch, devices), frozen)
            assert float(metrics["train/loss"]) == pytest.approx(losses[number], rel=1e-5)
            for name, path, layer in built.tuning.table.hf_tensors():
                if path.endswith(".e"):
                    named = f"{name.removeprefix('base_model.')}.default"
                    assert (np.asarray(get(state.params, path))[layer] != 0).tolist() == ranks[number][named], (number, name)
    left = [sum(sum(kept) for kept in found.values()) for found in ranks]
    assert left[0] == left[1] == left[3] == 4 * 6 and left[2] < 4 * 6 and left[-2] == left[-1] == 2 * 6
    both.theirs.save_pretrained(tmp_path / "after")
    ours = peft.write(built.tuning, state.params, both.frozen, tmp_path / "ours", base_name=str(both.base), steps=TOTAL)
    wanted, got = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "after", ours))
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(got[name], tensor, atol=2e-5, err_msg=name)
    known, written = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "after", ours))
    assert set(written) - set(known) == set()
    differing = {name for name in written if written[name] != known[name]} - {"target_modules", "base_model_name_or_path"}
    assert not differing
    text = ROWS[0]
    np.testing.assert_allclose(
        tiny.logits(sides.loaded_by_peft(both.base, ours), text), tiny.logits(both.theirs, text), atol=1e-4
    )
    np.testing.assert_allclose(logits(open_model(tmp_path / "after"), text.tolist()), tiny.logits(both.theirs, text), atol=1e-4)


def test_it_begins_as_the_base_exactly() -> None:
    family = from_hf_config(SMALL | {"num_hidden_layers": 1})
    base = init(family.table, jax.random.key(3))
    tuning = adapters.build(family.table, **asdict(OURS))
    first = tuning.first(jax.random.key(0), base)
    frozen = tuning.fix(base)
    batch = {name: jnp.asarray(a[None, :20]) for name, a in SampleRows(CACHE, 20)[0].items()}
    both = jax.jit(lambda *trees: [decoder.logprobs(family, tree, batch)[0] for tree in trees])
    np.testing.assert_array_equal(*both(tuning.join(first, frozen), base))
    assert float(jnp.std(first["layers"]["w_q"]["a"])) == pytest.approx(0.02, rel=0.2)


def test_a_run_that_was_stopped_knows_its_ranks(home: Path, tmp_path: Path, capsys: Any) -> None:
    """Ranks were given up before the stop and are after it; the adapter is bit for bit that of the undisturbed run."""
    config = Path(runs.configure(home, tmp_path, "run"))
    lines = [line for line in config.read_text().splitlines() if not line.startswith("adapter:")]
    lines += ["adapter: {kind: adalora, init_r: 4, target_r: 2, alpha: 8.0, targets: [q_proj, down_proj], tfinal: 1}"]
    config.write_text("\n".join(lines))
    assert main(["train", str(config)]) == 0
    run, values = tmp_path / "run", runs.values(tmp_path / "run")
    assert sum(len(value) for name, value in values.items() if name.endswith("lora_E")) == 2 * 4
    before = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints" / "4")
    shutil.rmtree(run / "adapter")
    assert main(["train", str(config)]) == 0
    assert "resumed from step 2" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before
    for name, value in runs.values(run).items():
        np.testing.assert_array_equal(values[name], value)
    assert main(["train", str(config), "steps=1", f"run_dir={tmp_path}/other"]) == 2
    assert "steps 1 leave none between adapter.tinit 0 and adapter.tfinal 1" in capsys.readouterr().err
    assert main(["train", str(config), f"run_dir={tmp_path}/other", "adapter.target_r=4"]) == 2
    assert "adapter.target_r 4 is not below adapter.init_r 4" in capsys.readouterr().err
    wanted = [f"adapter.init_from={run}/adapter", f"run_dir={tmp_path}/other", "adapter.init_r=5"]
    assert main(["train", str(config), *wanted]) == 2
    assert "adapter.init_r is 5, but that of the adapter is 4" in capsys.readouterr().err
