"""A model saved by transformers and loaded by maxi: from token ids on, our losses and metrics are those of TRL's trainers.

The ids are the same on both sides; TRL collates and pads its own way, ours lie in hand-made rows of two copies a pair.
"""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from maxi import hf
from maxi.models import decoder
from maxi.objectives.branches import branch_logprobs
from maxi.objectives.dpo import DPO
from maxi.objectives.kto import KTO
from maxi.objectives.sft import SFT
from tests import tiny
from tests.objectives import pairs, trl_side

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of trl and transformers to each other

T, P, N = 64, 2, 6
Rows = list[dict[str, Any]]
COMMON: dict[str, Any] = {"bf16": False, "use_cpu": True, "report_to": "none"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The policy and its reference, different random models."""
    policy, reference = (tmp_path_factory.mktemp(name) for name in ("policy", "reference"))
    tiny.build("qwen2", seed=1).save_pretrained(policy)
    tiny.build("qwen2", seed=2).save_pretrained(reference)
    return policy, reference


def make_rows(prompt: int | None = None) -> Rows:
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(3, 96, n).tolist()  # noqa: E731
    return [{"prompt": ids(prompt or rng.integers(2, 6)), "answers": [ids(rng.integers(1, 9)) for _ in "12"]} for _ in range(N)]


def batch_of(rows: Rows, labels: list[bool] | None = None) -> pairs.Batch:
    """Two pairs a row, each answer behind its own copy of the prompt; the rest is padding."""
    names = ("tokens", "targets", "positions", "segments", "branches")
    batch: pairs.Batch = {name: np.zeros((N // P, T), np.int32) for name in names}
    batch |= {"loss_weight": np.zeros((N // P, T), np.float32), "pair_weight": np.ones((N // P, P), np.float32)}
    for b in range(N // P):
        t = 0
        for p, row in enumerate(rows[b * P : (b + 1) * P]):
            for branch, answer in enumerate(row["answers"]):
                text = [*row["prompt"], *answer]
                here, counted = slice(t, t + len(text) - 1), slice(t + len(row["prompt"]) - 1, t + len(text) - 1)
                batch["tokens"][b, here], batch["targets"][b, here] = text[:-1], text[1:]
                batch["positions"][b, here], batch["segments"][b, here] = np.arange(len(text) - 1), 1 + 2 * p + branch
                batch["branches"][b, here], batch["loss_weight"][b, counted] = 1 + 2 * p + branch, 1
                t = here.stop
    if labels is not None:
        batch["labels"] = np.array(labels, np.float32).reshape(N // P, P)
    return batch


def ours(objective: Any, folders: tuple[Path, Path], batch: pairs.Batch) -> dict[str, float]:
    policy, reference = map(hf.load_hf, folders)
    logprobs = decoder.Logprobs(policy.model)
    batch = jax.tree.map(jnp.asarray, batch)
    if objective.needs_reference:
        refs = branch_logprobs(logprobs(reference.params, batch)[0], batch)
        batch |= {"ref_first": refs.first_BP, "ref_second": refs.second_BP}
    if hasattr(objective, "totals"):
        batch["totals"] = objective.totals(logprobs, policy.params, batch)
    return pairs.means(objective.loss(logprobs, policy.params, batch))


@cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(96)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), eos_token="w1", pad_token="w2")


def theirs(trainer_class: Any, config: Any, rows: Rows, folders: tuple[Path, Path], **extra: Any) -> dict[str, float]:
    """Loss and metrics of a real trainer on one batch of all rows."""
    from datasets import Dataset
    from transformers import Qwen2ForCausalLM

    policy, reference = (Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    if "ref_model" in extra:
        extra["ref_model"] = reference
    trainer = trainer_class(
        model=policy, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **extra
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, batch))
    (metrics,) = filter(None, trainer._metrics.values())
    return {"loss": loss, **{name: value[-1] for name, value in metrics.items()}}


def given(trainer_class: Any) -> Any:
    """The trainer, told that its rows are ids already."""
    return type("Given", (trainer_class,), {"_prepare_dataset": lambda _, dataset, *__: dataset})


def assert_same(got: dict[str, float], wanted: dict[str, float], names: tuple[str, ...]) -> None:
    for name in ("loss", *names):
        assert got[name] == pytest.approx(wanted[name], rel=1e-5), name


PREFERENCES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
LABELS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl")


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft"])
def test_dpo(loss_type: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    rows = make_rows()
    named = [{"prompt_ids": r["prompt"], "chosen_ids": r["answers"][0], "rejected_ids": r["answers"][1]} for r in rows]
    config = DPOConfig(str(tmp_path), loss_type=[loss_type], **COMMON)
    wanted = theirs(given(DPOTrainer), config, named, folders, ref_model=None)
    assert_same(ours(DPO((loss_type,)), folders, batch_of(rows)), wanted, PREFERENCES)


@pytest.mark.parametrize("clamped", [True, False])
def test_kto(clamped: bool, folders: tuple[Path, Path], tmp_path: Path) -> None:
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    rows, labels = make_rows(), [True, False, True, True, False, True]
    for row, last in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        row["answers"][1] = last["answers"][0]  # mismatched as TRL mismatches
    named = [
        {"prompt_ids": r["prompt"], "completion_ids": r["answers"][0], "KL_completion_ids": r["answers"][1], "label": label}
        for r, label in zip(rows, labels, strict=True)
    ]
    folders = folders if clamped else (folders[1], folders[0])
    config = KTOConfig(str(tmp_path), desirable_weight=1.5, **COMMON)
    wanted = theirs(given(KTOTrainer), config, named, folders, ref_model=None)
    got = ours(KTO(desirable_weight=1.5), folders, batch_of(rows, labels))
    assert (got["kl"] == 0) == clamped
    assert_same(got, wanted, LABELS)


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_without_a_reference(loss_type: str, folders: tuple[Path, Path]) -> None:
    """TRL's forward passes too. Its ORPO adds the NLL of the prompt: that of a prompt of one token is nothing."""
    from transformers import Qwen2ForCausalLM

    rows = make_rows(prompt=1)
    model = Qwen2ForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    loss, metrics = trl_side.without_reference(loss_type, model, [(row["prompt"], row["answers"]) for row in rows])
    objective = DPO((loss_type,), beta=0.5, rpo_alpha=0.2 if loss_type == "simpo" else 0.0)
    assert_same(ours(objective, folders, batch_of(rows)), {"loss": loss, **metrics}, (*PREFERENCES, "nll_loss"))


def test_sft_is_trls_assistant_only_loss(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rng = np.random.default_rng(3)
    lengths = (20, 9, 31)
    texts = [rng.integers(3, 96, n) for n in lengths]
    masks = [(np.arange(n) % 7 > 3).astype(int) for n in lengths]  # several turns of the assistant
    rows = [{"input_ids": text.tolist(), "assistant_masks": mask.tolist()} for text, mask in zip(texts, masks, strict=True)]
    wanted = theirs(SFTTrainer, SFTConfig(str(tmp_path), max_length=64, **COMMON), rows, folders)

    packed = {
        "tokens": np.concatenate([text[:-1] for text in texts]),
        "targets": np.concatenate([text[1:] for text in texts]),
        "positions": np.concatenate([np.arange(n - 1) for n in lengths]),
        "segments": np.repeat([1, 2, 3], [n - 1 for n in lengths]),
    }
    batch: pairs.Batch = {name: value[None].astype(np.int32) for name, value in packed.items()}
    batch["loss_weight"] = np.concatenate([mask[1:] for mask in masks])[None].astype(np.float32)
    assert_same(ours(SFT(), folders, batch), wanted, ())
