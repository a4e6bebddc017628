"""What both sides read, made once: a tokenizer, a model of random weights, and the rows of maxi's steps as token ids.

TRL is given the ids that maxi's batches hold, read back from the batches themselves, so both sides train the same targets.
TRL's own rendering of a conversation would also train the line break that chatml writes behind every end token.
"""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODEL = {
    "vocab_size": 6400,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
"""Qwen3's shape, 26 M parameters."""

OPTIMIZER = {"lr": 1e-5, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip_norm": 1.0}
"""Plain AdamW at a constant rate, without weight decay; maxi's names."""

POOL = 4
"""As many rows are tokenised as are needed, times this: some are longer than `--seq-len`."""

Job = Any
"""What a process is told, as attributes: the options of the command line, `work` (a folder), and what `prepare` found."""
Sample = dict[str, list[int]]
"""input_ids and labels of a conversation (-100: no target), or prompt_ids, chosen_ids and rejected_ids of a pair."""


def prepare(objective: str, job: Job) -> dict[str, Any]:
    """Writes into `job.work` model/ (weights and tokenizer), rows.jsonl, and samples.json: the samples of each of maxi's
    steps. Gives sizes, and the counts of the measured steps."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from maxi.data import bpe, python_docs

    work, steps, is_pairs = Path(job.work), job.warmup + job.steps, objective == "dpo"
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**MODEL)).float()
    model.save_pretrained(work / "model")
    tokenizer = bpe.train((document.text for document in python_docs.documents()), MODEL["vocab_size"], work / "tokenizer")
    tokenizer.save(work / "model")

    places = _choose(is_pairs, job, tokenizer, steps * job.batch)
    width = job.seq_len * (2 if is_pairs else 1)  # maxi's rows have room for both answers of a pair
    rows = max(1, round(job.batch * sum(places) / len(places) / width))
    batches = _batches(objective, job, tokenizer, rows, steps)
    samples = [(_pairs if is_pairs else _conversations)(batch) for batch in batches]
    (work / "samples.json").write_text(json.dumps(samples), "utf-8")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": rows,
        "width": batches[0]["tokens"].shape[1],
        "batch": max(1, round(sum(map(len, samples)) / steps)),
        "samples": sum(map(len, samples)),
        "counts": [_count(batch) for batch in batches[job.warmup :]],
    }


def maxi_config(objective: str, job: Job, run_dir: str, rows: int) -> Any:
    """The run of maxi: `rows` packed rows a step, a line in perf.jsonl every step, nothing evaluated or exported."""
    from maxi.config import from_tree

    tree = {
        "run_dir": run_dir,
        "steps": job.warmup + job.steps,
        "batch_size": rows,
        "seq_len": job.seq_len,
        "model": {"init_from": f"{job.work}/model"},
        "data": {"train": [{"path": f"{job.work}/rows.jsonl"}], "cache_dir": f"{job.work}/ids"},
        "objective": objective,
        "optim": {"name": "adamw", "schedule": "constant", "weight_decay": 0.0, **OPTIMIZER},
        "compute": {"dtype": job.dtype},
        "log": {"every": 1},
        "export_hf": False,
    }
    return from_tree(tree, "peers")


def _choose(is_pairs: bool, job: Job, tokenizer: Any, count: int) -> list[int]:
    """`count` rows by chance, or all there are, none longer than `seq_len`, into rows.jsonl. Gives the places that each
    takes in a packed row."""
    from maxi.config import ChatConfig, Source
    from maxi.data import documents, messages
    from maxi.data.documents import Budget
    from maxi.data.examples import Examples
    from maxi.data.loader import open_template

    read: Any = messages.preference_of if is_pairs else messages.conversation_of
    found = list(documents.records(Source(path=job.data), read, Budget(0)))
    random.Random(0).shuffle(found)
    rows, file = [_row(whole) for whole in found[: POOL * count]], Path(job.work) / "rows.jsonl"

    def write(chosen: Sequence[Mapping[str, Any]]) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in chosen), "utf-8")

    write(rows)
    kind = "preferences" if is_pairs else "conversations"
    with open_template(kind, ChatConfig(), tokenizer) as template:
        assert template is not None
        content = Examples(kind, tokenizer, template, ChatConfig(), job.seq_len)
        parts = [[part.ids.tolist() for part in row] for row in content.samples(Source(path=str(file)), Budget(0))]
    fitting = [i for i, each in enumerate(parts) if max(map(len, each)) <= job.seq_len][:count]
    if not fitting:
        sys.exit(f"no row of {job.data} is as short as {job.seq_len} tokens: raise --seq-len")
    write([rows[i] for i in fitting])
    return [_places(*parts[i]) for i in fitting]


def _row(whole: Any) -> dict[str, Any]:
    """A conversation or a preference as a record that maxi reads again."""
    first, *_ = parts = [whole.chosen, whole.rejected] if hasattr(whole, "chosen") else [whole]
    names = ("chosen", "rejected") if len(parts) == 2 else ("messages",)
    tools = {"tools": first.tools} if first.tools else {}
    return {name: part.messages for name, part in zip(names, parts, strict=True)} | tools


def _places(first: list[int], second: list[int] | None = None) -> int:
    """The last id is only a target; what two answers begin with is there once."""
    if second is None:
        return len(first) - 1
    same = [a == b for a, b in zip(first, second, strict=False)]
    return len(first) + len(second) - (same.index(False) if False in same else len(same))


def _batches(objective: str, job: Job, tokenizer: Any, rows: int, steps: int) -> list[dict[str, Any]]:
    """The batches that the run of maxi will train on: numpy arrays, as they are fed."""
    from maxi import objectives
    from maxi.data.loader import content_of, open_data, open_template

    config = maxi_config(objective, job, f"{job.work}/none", rows)
    kind = objectives.OBJECTIVES[objective]().rows
    with open_template(kind, config.chat, tokenizer) as template:
        content = content_of(kind, config.data, config.chat, tokenizer, template, config.seq_len)
        batches, _ = open_data(config.data, content, batch_size=rows, seed=config.seed, log=lambda _: None)
    return [batches.batch(step) for step in range(steps)]


def _count(batch: Mapping[str, Any]) -> dict[str, int]:
    """Targets that count, places that are not padding, places."""
    answer, real = (int((batch[name] > 0).sum()) for name in ("loss_weight", "segments"))
    return {"answer": answer, "real": real, "computed": batch["tokens"].size}


def _conversations(batch: Mapping[str, Any]) -> list[Sample]:
    found = []
    for b, segments in enumerate(batch["segments"]):
        tokens, targets, weights = (batch[name][b] for name in ("tokens", "targets", "loss_weight"))
        for segment in range(1, int(segments.max()) + 1):
            here = segments == segment
            labels = [t if w > 0 else -100 for t, w in zip(targets[here].tolist(), weights[here], strict=True)]
            found.append({"input_ids": [*tokens[here].tolist(), int(targets[here][-1])], "labels": [-100, *labels]})
    return found


def _pairs(batch: Mapping[str, Any]) -> list[Sample]:
    found = []
    for b, p in zip(*batch["pair_weight"].nonzero(), strict=True):
        row = {name: batch[name][b] for name in ("tokens", "targets", "segments", "contexts", "branches")}
        chosen, rejected = (row["branches"] == 1 + 2 * p + branch for branch in (0, 1))
        before = row["segments"] == row["contexts"][chosen][0]
        prompt = [*row["tokens"][before].tolist(), int(row["tokens"][chosen][0])]
        answers = {"chosen_ids": row["targets"][chosen].tolist(), "rejected_ids": row["targets"][rejected].tolist()}
        found.append({"prompt_ids": prompt, **answers})
    return found
