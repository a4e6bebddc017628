"""Supervised fine-tuning: maxi beside TRL's SFTTrainer. See README.md; `side_by_side.py` holds the command line.

TRL's variants are its default (every conversation padded to the longest of its batch, layers recomputed in the backward
pass), the same without recomputing, and packed as TRL recommends (`packing_strategy` bfd), without recomputing too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rows import Job, Sample
from side_by_side import Comparison, main
from sides import trl_inputs, trl_options

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "no checkpointing, packed": {"gradient_checkpointing": False, "packing": True, "packing_strategy": "bfd"},
}

SEEN = 1e-3
"""A difference of logits that is no rounding."""


def make(job: Job, samples: Sequence[Sample], options: Mapping[str, Any]) -> Any:
    """An SFTTrainer; a step has as many conversations as maxi's on average, or packed, as many rows."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    size = job.rows if options.get("packing") else job.batch
    return SFTTrainer(
        args=SFTConfig(per_device_train_batch_size=size, **trl_options(job), **options), **trl_inputs(job, samples)
    )


def same_rows(trainer: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """The loss; packed, also whether samples that share a row see each other."""
    import torch
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    rows, is_packed = Dataset.from_list(list(samples)), trainer.args.packing
    if is_packed:
        rows = pack_dataset(rows, trainer.args.max_length, trainer.args.packing_strategy)
    batch = trainer.data_collator(list(rows))
    trainer.model.train()
    with torch.no_grad():
        note = {"note": _note(trainer.model, batch)} if is_packed else {}
        return {"train/loss": float(trainer.compute_loss(trainer.model, batch)), **note}


def _note(model: Any, batch: Mapping[str, Any]) -> str:
    """Compares the logits of the last sample in a batch of packed rows with those it has when it is alone."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    packed = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
    start = int((batch["position_ids"][0] == 0).nonzero()[-1])
    alone = model(input_ids=batch["input_ids"][:, start:]).logits[0]
    apart = float((packed[start:] - alone).abs().max())
    flash = "with" if is_flash_attn_2_available() else "without"
    see = "see" if apart > SEEN else "do not see"
    return f"TRL, packed, {flash} flash attention: samples of a row {see} each other (logits apart from alone: {apart:.0e})"


if __name__ == "__main__":
    main(Comparison("sft", "python-docs", 16, "conversations", VARIANTS, make, same_rows))
