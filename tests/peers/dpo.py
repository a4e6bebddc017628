"""Direct preference optimisation: maxi beside TRL's DPOTrainer. See README.md; `side_by_side.py` holds the command line.

TRL's variants are its default (a second model gives the reference in every step, layers are recomputed in the backward
pass), the same without recomputing, and with the reference computed beforehand, without recomputing too.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rows import Job, Sample
from side_by_side import Comparison, main
from sides import trl_inputs, trl_options

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "no checkpointing, reference first": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
}


def make(job: Job, samples: Sequence[Sample], options: Mapping[str, Any]) -> Any:
    """A DPOTrainer; a step has as many pairs as maxi's on average."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class OfIds(DPOTrainer):
        """Told that its rows are ids already; `reference_seconds`: what computing the reference first took."""

        reference_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            return dataset

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **kwargs)
            self.reference_seconds = time.perf_counter() - begin
            return found

    config = DPOConfig(per_device_train_batch_size=job.batch, **trl_options(job), **options)
    return OfIds(args=config, **trl_inputs(job, samples))


def same_rows(trainer: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """The loss, which before the first step is log 2 for every pair, and the log-probabilities of the answers."""
    import torch

    pairs = [trainer.train_dataset[i] for i in range(len(samples))]  # with their reference, where it is known
    trainer.model.train()
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, trainer.data_collator(pairs)))
    metrics = trainer._metrics["train"]
    return {"train/loss": loss, **{name: metrics[name][-1] for name in ("logps/chosen", "logps/rejected")}}


if __name__ == "__main__":
    main(Comparison("dpo", "python-docs-preferences", 8, "pairs", VARIANTS, make, same_rows))
