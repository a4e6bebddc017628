"""Direct preference optimisation: maxi beside TRL's DPOTrainer. See README.md; `side_by_side.py` holds what both scripts share."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from side_by_side import OPTIMIZER, Comparison, Job, Sample, main

VARIANTS: dict[str, dict[str, Any]] = {
    "default (reference in the step, checkpointing)": {},
    "without checkpointing": {"gradient_checkpointing": False},
    "reference precomputed, without checkpointing": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
}


def trainer(job: Job, samples: Sequence[Sample], options: Mapping[str, Any]) -> Any:
    """A DPOTrainer of tokenised pairs, with as many of them a step as maxi has on average."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class OfIds(DPOTrainer):
        """Told that its rows are ids already; `reference_seconds` is how long computing the reference beforehand took."""

        reference_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any) -> Any:
            begin = time.perf_counter()
            found = super()._precompute_ref_logps(*args)
            self.reference_seconds = time.perf_counter() - begin
            return found

    config = DPOConfig(
        output_dir=f"{job.work}/trl",
        max_length=job.seq_len,
        max_steps=job.warmup + job.steps,
        per_device_train_batch_size=job.batch,
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **OPTIMIZER,
        **options,
    )
    return OfIds(
        model=AutoModelForCausalLM.from_pretrained(f"{job.work}/model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(list(samples)),
        processing_class=AutoTokenizer.from_pretrained(f"{job.work}/model"),
    )


def same_rows(trainer: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """The loss, which is log 2 for every pair before the first step, and the log-probabilities of the answers."""
    import torch

    pairs = [trainer.train_dataset[i] for i in range(len(samples))]  # they stand first, with their reference
    trainer.model.train()
    with torch.no_grad():
        found = {"train/loss": float(trainer.compute_loss(trainer.model, trainer.data_collator(pairs)))}
    metrics = trainer._metrics["train"]
    return found | {name: metrics[name][-1] for name in ("logps/chosen", "logps/rejected")}


if __name__ == "__main__":
    main(Comparison("dpo", "python-docs-preferences", True, VARIANTS, trainer, same_rows))
