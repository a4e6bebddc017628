"""Supervised fine-tuning: maxi beside TRL's SFTTrainer. See README.md; `side_by_side.py` holds what both scripts share."""

from collections.abc import Mapping, Sequence
from typing import Any

from side_by_side import OPTIMIZER, Comparison, Job, Sample, main

VARIANTS: dict[str, dict[str, Any]] = {
    "default (padded, checkpointing)": {},
    "without checkpointing": {"gradient_checkpointing": False},
    "packed (bfd), without checkpointing": {"gradient_checkpointing": False, "packing": True},
}


def trainer(job: Job, samples: Sequence[Sample], options: Mapping[str, Any]) -> Any:
    """An SFTTrainer of tokenised samples, with as many of them a step as maxi has on average; packed, with as many rows."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=f"{job.work}/trl",
        max_length=job.seq_len,
        max_steps=job.warmup + job.steps,
        per_device_train_batch_size=job.rows if options.get("packing") else job.batch,
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **OPTIMIZER,
        **options,
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(f"{job.work}/model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(list(samples)),
        processing_class=AutoTokenizer.from_pretrained(f"{job.work}/model"),
    )


def same_rows(trainer: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """The loss, and where samples share a row, whether they see each other there."""
    import torch
    from datasets import Dataset
    from trl import pack_dataset

    rows, packed = Dataset.from_list(list(samples)), trainer.args.packing
    if packed:
        rows = pack_dataset(rows, trainer.args.max_length, trainer.args.packing_strategy)
    batch = trainer.data_collator(list(rows))
    trainer.model.train()
    with torch.no_grad():
        found: dict[str, Any] = {"train/loss": float(trainer.compute_loss(trainer.model, dict(batch)))}
        if packed:
            found["note"] = _note(trainer.model, batch)
    return found


def _note(model: Any, batch: Mapping[str, Any]) -> str:
    """Compares the logits of the last sample in a batch of packed rows with those it has when it is alone."""
    from transformers.utils import is_flash_attn_2_available

    together = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
    start = int((batch["position_ids"][0] == 0).nonzero()[-1])
    alone = model(input_ids=batch["input_ids"][:, start:]).logits[0]
    apart = float((together[start:] - alone).abs().max())
    flash = "with" if is_flash_attn_2_available() else "without"
    see = "see each other" if apart > 1e-3 else "do not see each other"
    return f"TRL, packed: {flash} flash attention, samples of a row {see} (logits differ by {apart:.1g} from those alone)"


if __name__ == "__main__":
    main(Comparison("sft", "python-docs", False, VARIANTS, trainer, same_rows))
