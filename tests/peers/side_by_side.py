"""maxi and one of TRL's trainers on the same rows: what both comparisons share.

    prepare      rows, a tokenizer and a model of random weights, made once and read by both sides
    rounds       every side in a process of its own, one after the other, A B C D A B C D
    table        medians over the rounds, and whether both sides see the same loss on the same rows

Both sides are given the same token ids: those that maxi's batches hold. TRL's own rendering of a conversation would also
train on the line break behind every end token. What is measured of TRL is its `train()`, with its own batches, collator,
optimizer and sampler; of maxi it is `maxi.train.train`, read from its perf.jsonl. How TRL is set up stands in `sft.py` and
`dpo.py`. The process that starts the others imports nothing large: Linux hands the peak memory of a parent on to its child.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
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

OPTIMIZER = {"learning_rate": 1e-5, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0}
"""Plain AdamW at a constant rate, without weight decay, as TRL spells it."""

TOLERANCE = 1e-4
"""How far apart losses on the same rows may be; of log-probabilities, which are sums over answers, as a share."""

POOL = 4
"""As many rows are tokenised as are needed, times this: some are longer than `--seq-len`."""

MAXI = "maxi"
Sample = dict[str, list[int]]
Job = Any
"""What a process is told: `Options` of the command line and what `prepare` found, as attributes."""


@dataclass(frozen=True)
class Comparison:
    """objective: maxi's; source: the rows when none are given; pairs: whether two sequences make one sample.

    variants: TRL's options by the name of the variant, the first being TRL's defaults. trainer(job, samples, options) is
    the trainer, not started; same_rows(trainer, samples) what it says of those samples before its first step, by
    maxi's names, with "note" for what there is to say besides.
    """

    objective: str
    source: str
    pairs: bool
    variants: Mapping[str, Mapping[str, Any]]
    trainer: Callable[[Job, Sequence[Sample], Mapping[str, Any]], Any]
    same_rows: Callable[[Any, Sequence[Sample]], dict[str, Any]]

    @property
    def noun(self) -> str:
        return "pairs" if self.pairs else "conversations"


def main(comparison: Comparison) -> None:
    """The command line of a comparison. Exits with 1 when the losses of the same rows differ."""
    options = _options(comparison)
    if options.role:
        job = SimpleNamespace(**json.loads(Path(options.job).read_text("utf-8")))
        _use_threads(job.threads)
        found = {"prepare": _prepare, "maxi": _maxi, "trl": _trl}[options.role](comparison, job)
        Path(job.out).write_text(json.dumps(found), "utf-8")
        return
    print(_machine(options.threads), flush=True)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        base = {**vars(options), "work": folder}
        job = base | _run("prepare", base)
        print(_plan(comparison, job), flush=True)
        rounds = list(_rounds(comparison, job))
    print("\n" + _table(comparison, job, rounds))
    differ = [name for name, runs in _by_name(rounds).items() if not _agree(runs[0], rounds[0][MAXI])]
    print("\n" + _verdict(comparison, rounds, differ))
    sys.exit(bool(differ))


def _options(comparison: Comparison) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"maxi's {comparison.objective} beside TRL's, on this machine's CPU.")
    parser.add_argument("--data", default=comparison.source, help="a file or folder of rows; default: %(default)s")
    parser.add_argument(
        "--seq-len", type=int, default=256, help="tokens of the longest sample, and of a packed row (%(default)s)"
    )
    size = 8 if comparison.pairs else 16
    parser.add_argument("--batch", type=int, default=size, help=f"{comparison.noun} a step, about (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that are not (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of either side (%(default)s)")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- processes ---


def _run(role: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """What a process of this script found. Exits with the end of its stderr when it fails."""
    work = Path(job["work"])
    told, out = work / "job.json", work / "out.json"
    told.write_text(json.dumps({**job, "out": str(out)}), "utf-8")
    command = [sys.executable, sys.argv[0], "--role", role, "--job", str(told)]
    done = subprocess.run(command, env=_environment(work, job["threads"]), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{role} failed with {done.returncode}:\n" + "\n".join(done.stderr.splitlines()[-30:]))
    return json.loads(out.read_text("utf-8"))


def _environment(work: Path, threads: int) -> dict[str, str]:
    """Caches in the work folder, so that nothing is left behind and nothing from before counts."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    own = {"HF_DATASETS_CACHE": "hf", "JAX_COMPILATION_CACHE_DIR": "xla", "XDG_CACHE_HOME": "cache"}
    offline = {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **counts, **offline, **{name: str(work / folder) for name, folder in own.items()}}


def _use_threads(threads: int) -> None:
    """XLA makes a thread for every core that it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _rounds(comparison: Comparison, job: Mapping[str, Any]) -> Iterator[dict[str, dict[str, Any]]]:
    """Of each round what every side came to, in the order they ran."""
    sides = [("trl", f"TRL, {name}", dict(options)) for name, options in comparison.variants.items()] + [("maxi", MAXI, {})]
    for number in range(1, job["rounds"] + 1):
        found = {}
        for role, name, options in sides:
            load, begin = os.getloadavg()[0], time.monotonic()
            found[name] = _rates(_run(role, {**job, "variant": options, "number": number}))
            rate, seconds = found[name]["answer"], time.monotonic() - begin
            line = f"round {number} of {job['rounds']}: {name}: {rate:,.0f} answer tokens/s"
            print(f"{line} ({seconds:.0f} s in all, load before {load:.2f})", flush=True)
        yield found


def _rates(found: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second from the counts and times of the measured steps."""
    seconds = sum(found["seconds"])
    totals = {name: sum(counts[name] for counts in found["counts"]) for name in ("answer", "real", "computed")}
    rates = {"answer": totals["answer"] / seconds, "real": totals["real"] / seconds}
    return {**found, **rates, "share": totals["real"] / totals["computed"]}


# --- what both sides read ---


def _prepare(comparison: Comparison, job: Job) -> dict[str, Any]:
    """Writes model/ (weights and tokenizer), rows.jsonl, and samples.json: of each of maxi's steps its samples as ids."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from maxi.data import bpe, python_docs

    work, steps = Path(job.work), job.warmup + job.steps
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**MODEL)).float()
    model.save_pretrained(work / "model")
    tokenizer = bpe.train((document.text for document in python_docs.documents()), MODEL["vocab_size"], work / "tokenizer")
    tokenizer.save(work / "model")

    samples = _choose_rows(comparison, job, tokenizer, steps * job.batch)
    mean = sum(map(_size, samples)) / len(samples)
    width = job.seq_len * (2 if comparison.pairs else 1)  # maxi's rows hold both answers of a pair
    rows = max(1, round(job.batch * mean / width))
    read = _maxi_batches(comparison, job, tokenizer, rows, steps)
    of_steps = [(_pairs_of if comparison.pairs else _conversations_of)(batch) for batch in read]
    (work / "samples.json").write_text(json.dumps(of_steps), "utf-8")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": rows,
        "width": read[0]["tokens"].shape[1],
        "batch": max(1, round(sum(map(len, of_steps)) / steps)),
        "samples": sum(map(len, of_steps)),
        "counts": [_count(batch) for batch in read[job.warmup :]],
    }


def _choose_rows(comparison: Comparison, job: Job, tokenizer: Any, count: int) -> list[list[Any]]:
    """`count` rows by chance, or all there are, none longer than `seq_len`, into rows.jsonl. Gives the conversations of
    each, tokenised."""
    from maxi.config import ChatConfig, Source
    from maxi.data import documents, messages
    from maxi.data.documents import Budget
    from maxi.data.examples import Examples
    from maxi.data.loader import open_template

    read: Any = messages.preference_of if comparison.pairs else messages.conversation_of
    found = list(documents.records(Source(path=job.data), read, Budget(0)))
    random.Random(0).shuffle(found)

    def row(whole: Any) -> dict[str, Any]:
        parts = {"chosen": whole.chosen, "rejected": whole.rejected} if comparison.pairs else {"messages": whole}
        tools = next(iter(parts.values())).tools
        return {name: part.messages for name, part in parts.items()} | ({"tools": tools} if tools else {})

    rows, file = [row(whole) for whole in found[: POOL * count]], Path(job.work) / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    kind = "preferences" if comparison.pairs else "conversations"
    with open_template(kind, ChatConfig(), tokenizer) as template:
        assert template is not None
        content = Examples(kind, tokenizer, template, ChatConfig(), job.seq_len)
        each = iter(content.samples(Source(path=str(file)), Budget(0)))
        samples = list(zip(each, each, strict=True)) if comparison.pairs else [(one,) for one in each]
    fitting = [i for i, parts in enumerate(samples) if all(len(part.ids) <= job.seq_len for part in parts)][:count]
    if not fitting:
        sys.exit(f"no row of {job.data} is as short as {job.seq_len} tokens: raise --seq-len")
    file.write_text("".join(json.dumps(rows[i]) + "\n" for i in fitting), "utf-8")
    return [list(samples[i]) for i in fitting]


def _size(parts: Sequence[Any]) -> int:
    """The places that a sample takes in a packed row; a prompt that two answers share counts once."""
    if len(parts) == 1:
        return len(parts[0].ids) - 1
    ends = [len(part.ids) for part in parts]
    first = next(i for i, pair in enumerate(zip(*(part.ids for part in parts), strict=False)) if pair[0] != pair[1])
    return sum(ends) - first


def _maxi_config(comparison: Comparison, job: Job, run_dir: str, rows: int, steps: int) -> Any:
    from maxi.config import from_tree

    names = {"learning_rate": "lr", "adam_beta1": "b1", "adam_beta2": "b2", "adam_epsilon": "eps", "max_grad_norm": "clip_norm"}
    optim = {names[name]: value for name, value in OPTIMIZER.items()}
    tree = {
        "run_dir": run_dir,
        "steps": steps,
        "batch_size": rows,
        "seq_len": job.seq_len,
        "model": {"init_from": f"{job.work}/model"},
        "data": {"train": [{"path": f"{job.work}/rows.jsonl"}], "cache_dir": f"{job.work}/ids"},
        "objective": comparison.objective,
        "optim": {"name": "adamw", "schedule": "constant", "weight_decay": 0.0, **optim},
        "compute": {"dtype": "float32"},
        "log": {"every": 1},
        "export_hf": False,
    }
    return from_tree(tree, "peers")


def _maxi_batches(comparison: Comparison, job: Job, tokenizer: Any, rows: int, steps: int) -> list[dict[str, Any]]:
    """The batches that a run of maxi will train on: numpy arrays, as they are fed."""
    from maxi import objectives
    from maxi.data.loader import content_of, open_data, open_template

    config = _maxi_config(comparison, job, f"{job.work}/none", rows, steps)
    kind = objectives.OBJECTIVES[comparison.objective]().rows
    with open_template(kind, config.chat, tokenizer) as template:
        content = content_of(kind, config.data, config.chat, tokenizer, template, config.seq_len)
        batches, _ = open_data(config.data, content, batch_size=rows, seed=config.seed, log=lambda _: None)
    return [batches.batch(step) for step in range(steps)]


def _count(batch: Mapping[str, Any]) -> dict[str, int]:
    """Targets that count, places that are not padding, places."""
    return {
        "answer": int((batch["loss_weight"] > 0).sum()),
        "real": int((batch["segments"] > 0).sum()),
        "computed": batch["tokens"].size,
    }


def _conversations_of(batch: Mapping[str, Any]) -> list[Sample]:
    """What stands in the rows, as TRL takes it: input_ids, and labels of which -100 are no targets."""
    found = []
    for tokens, targets, segments, weights in zip(
        *(batch[name] for name in ("tokens", "targets", "segments", "loss_weight")), strict=True
    ):
        for segment in range(1, int(segments.max()) + 1):
            here = segments == segment
            labels = [t if w > 0 else -100 for t, w in zip(targets[here].tolist(), weights[here], strict=True)]
            found.append({"input_ids": [*tokens[here].tolist(), int(targets[here][-1])], "labels": [-100, *labels]})
    return found


def _pairs_of(batch: Mapping[str, Any]) -> list[Sample]:
    """What stands in the rows, as TRL takes it: prompt_ids, and the ids of both answers."""
    found = []
    for b, p in zip(*batch["pair_weight"].nonzero(), strict=True):
        row = {name: batch[name][b] for name in ("tokens", "targets", "segments", "contexts", "branches")}
        chosen, rejected = (row["branches"] == 1 + 2 * p + branch for branch in (0, 1))
        context = row["segments"] == row["contexts"][chosen][0]
        found.append(
            {
                "prompt_ids": [*row["tokens"][context].tolist(), int(row["tokens"][chosen][0])],
                "chosen_ids": row["targets"][chosen].tolist(),
                "rejected_ids": row["targets"][rejected].tolist(),
            }
        )
    return found


# --- the two sides ---


def _maxi(comparison: Comparison, job: Job) -> dict[str, Any]:
    """A run of maxi. Its peak memory is that of its last step, before the checkpoint that TRL does not write."""
    import shutil

    from maxi import references
    from maxi.train import train

    shutil.rmtree(Path(job.work) / "ids" / "references", ignore_errors=True)  # every run computes them
    spent = _timed(references, "attach")
    run_dir, steps = Path(job.work) / f"run{job.number}", job.warmup + job.steps
    train(_maxi_config(comparison, job, str(run_dir), job.rows, steps))
    perf, metrics = (
        [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("perf", "metrics")
    )
    shutil.rmtree(run_dir)
    return {
        "seconds": [line["perf/step_s"] for line in perf if line["step"] > job.warmup],
        "counts": job.counts,
        "memory": perf[-1]["perf/memory_gib"],
        "reference": sum(spent),
        "same": {name: value for name, value in metrics[0].items() if name == "train/loss" or name.startswith("logps/")},
    }


def _trl(comparison: Comparison, job: Job) -> dict[str, Any]:
    """A run of TRL. A step lasts from the end of the one before to its own, with collating and logging."""
    import datasets
    import torch
    import transformers
    from transformers import TrainerCallback

    torch.set_num_threads(job.threads)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    of_steps = json.loads((Path(job.work) / "samples.json").read_text("utf-8"))
    trainer = comparison.trainer(job, [sample for step in of_steps for sample in step], job.variant)
    same = comparison.same_rows(trainer, of_steps[0])
    trainer._metrics["train"].clear()
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    collate, counts = trainer.data_collator, []

    def counting(examples: Any) -> Any:
        batch = collate(examples)
        counts.append(_count_of_trl(batch))
        return batch

    trainer.data_collator = counting
    trainer.add_callback(Clock())
    trainer.train()
    between = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    return {
        "seconds": between[job.warmup - 1 :],
        "counts": counts[job.warmup : job.warmup + job.steps],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30,
        "reference": getattr(trainer, "reference_seconds", 0.0),
        "same": same,
    }


def _count_of_trl(batch: Mapping[str, Any]) -> dict[str, int]:
    """As `_count`. Without an attention mask rows lie end to end, without padding."""
    trained = batch["completion_mask"] if "completion_mask" in batch else batch["labels"] != -100
    computed = batch["input_ids"].numel()
    real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else computed
    return {"answer": int(trained[:, 1:].sum()), "real": real, "computed": computed}


def _timed(module: Any, name: str) -> list[float]:
    """The list that from now on gets the seconds of every call of `module.name`."""
    inner, spent = getattr(module, name), []

    def outer(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - begin)

    setattr(module, name, outer)
    return spent


# --- what is said ---


def _machine(threads: int) -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.is_file()
        else []
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("maxi", "jax", "trl", "transformers", "torch")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    first = f"{cpu}, {os.cpu_count()} cores of which {threads} are used, {memory:.0f} GiB, {platform.system()}"
    return f"{first}\nPython {platform.python_version()}, {', '.join(versions)}"


def _plan(comparison: Comparison, job: Mapping[str, Any]) -> str:
    real = sum(counts["real"] for counts in job["counts"]) / len(job["counts"])
    return (
        f"model: Qwen3 shape, {job['parameters'] / 1e6:.1f} M parameters, random; float32, AdamW\n"
        f"rows: {job['samples']} {comparison.noun} of {job['data']}, none over {job['seq_len']} tokens; "
        f"{job['batch']} a step, {job['warmup']} + {job['steps']} steps\n"
        f"maxi: {job['rows']} packed rows of {job['width']} a step, {real:.0f} real tokens in them"
    )


def _by_name(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [found[name] for found in rounds] for name in rounds[0]}


def _table(comparison: Comparison, job: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    heads = [
        "",
        "answer tokens/s",
        "lowest, highest",
        "of TRL's default",
        "real tokens/s",
        "real",
        "peak GiB",
        "loss, same rows",
    ]
    heads += ["reference, s"] * comparison.pairs
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" + "---:|" * (len(heads) - 1)]
    base = None
    for name, runs in _by_name(rounds).items():
        middle = {key: statistics.median(run[key] for run in runs) for key in ("answer", "real", "share", "reference")}
        base = base or middle["answer"]
        lowest, highest = (pick(run["answer"] for run in runs) for pick in (min, max))
        cells = [name, f"{middle['answer']:,.0f}", f"{lowest:,.0f}, {highest:,.0f}", f"{middle['answer'] / base:.2f}"]
        cells += [f"{middle['real']:,.0f}", f"{middle['share']:.1%}", f"{max(run['memory'] for run in runs):.2f}"]
        cells += [f"{runs[0]['same']['train/loss']:.6f}"]
        cells += [f"{middle['reference']:.1f}" if middle["reference"] else "in the step"] * comparison.pairs
        lines.append("| " + " | ".join(cells) + " |")
    about = f"Medians of {job['rounds']} rounds of {job['steps']} steps"
    return "\n".join([*lines, "", about + (f"; reference: all {job['samples']} pairs, once." if comparison.pairs else ".")])


def _agree(run: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether a side says of the samples of maxi's first step what maxi says."""
    return all(
        math.isclose(run["same"][name], value, rel_tol=TOLERANCE * name.startswith("logps/"), abs_tol=TOLERANCE)
        for name, value in ours["same"].items()
    )


def _verdict(comparison: Comparison, rounds: Sequence[Mapping[str, Any]], differ: Sequence[str]) -> str:
    ours = rounds[0][MAXI]["same"]
    what = ", ".join(f"{name} {value:.6g}" for name, value in ours.items())
    notes = Counter(run["same"]["note"] for run in rounds[0].values() if "note" in run["same"])
    same = f"NOT THE SAME on the same rows: {', '.join(differ)}" if differ else "both sides say the same"
    first = f"the {comparison.noun} of maxi's first step, before it: {what}; {same} (within {TOLERANCE:g})"
    return "\n".join([first, *notes])
