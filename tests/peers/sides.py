"""One run of either side, measured: seconds and counts of each step behind the warm-up, peak memory, the reference's time,
and what it says of the samples of maxi's first step before that step.

Of maxi it is `maxi.train.train`, read from its perf.jsonl; of TRL the trainer's `train()` with its own batches, collator,
optimizer and sampler. How a trainer is made stands in `sft.py` and `dpo.py`.
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rows import OPTIMIZER, Job, Sample, maxi_config

Trainer = Any
MakeTrainer = Callable[[Job, Sequence[Sample], Mapping[str, Any]], Trainer]
"""The trainer of these samples with these of TRL's options, not started."""
SameRows = Callable[[Trainer, Sequence[Sample]], dict[str, Any]]
"""What a trainer says of its first samples before its first step, by maxi's names; `note`: what else there is to say."""


def maxi(objective: str, job: Job) -> dict[str, Any]:
    """A run of maxi. Its peak memory is that of its last step: TRL does not write the checkpoint that follows."""
    from maxi import references
    from maxi.train import train

    shutil.rmtree(Path(job.work) / "ids" / "references", ignore_errors=True)  # every run computes them
    attach, spent = references.attach, []

    def timed(*args: Any, **options: Any) -> None:
        begin = time.perf_counter()
        attach(*args, **options)
        spent.append(time.perf_counter() - begin)

    references.attach = timed
    run_dir = Path(job.work) / f"run{job.number}"
    train(maxi_config(objective, job, str(run_dir), job.rows))
    perf, metrics = (_lines(run_dir / f"{name}.jsonl") for name in ("perf", "metrics"))
    shutil.rmtree(run_dir)
    return {
        "seconds": [line["perf/step_s"] for line in perf if line["step"] > job.warmup],
        "counts": job.counts,
        "memory": perf[-1]["perf/memory_gib"],
        "reference": sum(spent),
        "same": {name: value for name, value in metrics[0].items() if name == "train/loss" or name.startswith("logps/")},
    }


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def trl(make: MakeTrainer, same_rows: SameRows, job: Job) -> dict[str, Any]:
    """A run of TRL. A step lasts from the end of the one before it to its own, with collating and logging."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(job.threads)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    of_steps = json.loads((Path(job.work) / "samples.json").read_text("utf-8"))
    trainer = make(job, [sample for step in of_steps for sample in step], job.variant)
    same = same_rows(trainer, of_steps[0])
    trainer._metrics["train"].clear()
    ends: list[float] = []
    counts: list[dict[str, int]] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    collate = trainer.data_collator

    def counting(examples: Any) -> Any:
        batch = collate(examples)
        counts.append(_count(batch))
        return batch

    trainer.data_collator = counting
    trainer.add_callback(Clock())
    trainer.train()
    return {
        "seconds": [after - before for before, after in pairwise(ends)][job.warmup - 1 :],
        "counts": counts[job.warmup : job.warmup + job.steps],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30,
        "reference": getattr(trainer, "reference_seconds", 0.0),
        "same": same,
    }


def trl_options(job: Job) -> dict[str, Any]:
    """What every trainer is told to do as maxi does; all else are TRL's defaults."""
    names = {"lr": "learning_rate", "b1": "adam_beta1", "b2": "adam_beta2", "eps": "adam_epsilon", "clip_norm": "max_grad_norm"}
    return {
        "output_dir": f"{job.work}/trl",
        "max_length": job.seq_len,
        "max_steps": job.warmup + job.steps,
        "lr_scheduler_type": "constant",
        "bf16": job.dtype == "bfloat16",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **{names[name]: value for name, value in OPTIMIZER.items()},
    }


def trl_inputs(job: Job, samples: Sequence[Sample]) -> dict[str, Any]:
    """Model, rows and tokenizer of a trainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = f"{job.work}/model"
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "train_dataset": Dataset.from_list(list(samples)),
        "processing_class": AutoTokenizer.from_pretrained(folder),
    }


def _count(batch: Mapping[str, Any]) -> dict[str, int]:
    """Targets that count, places that are not padding, places. Without an attention mask rows lie end to end."""
    trained = batch["completion_mask"] if "completion_mask" in batch else batch["labels"] != -100
    computed = batch["input_ids"].numel()
    real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else computed
    return {"answer": int(trained[:, 1:].sum()), "real": real, "computed": computed}
