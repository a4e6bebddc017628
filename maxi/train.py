"""A run from its config to the exported model: the one picture of how the pieces meet.

    config -> run folder -> devices -> tokenizer, model, data -> state: resume | from weights | new -> steps -> export

The same call resumes an interrupted run where its newest checkpoint stands, and says so when all steps are done.
Nothing here depends on the objective, the family or the number of devices.
"""

import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maxi import __version__, evaluate, mesh, objectives, pretrained, processes, program, references, rewind, scores, starting
from maxi import export as exports
from maxi import step as steps
from maxi.checkpoint import Checkpoints
from maxi.config import Config, to_tree
from maxi.data import cache
from maxi.data.audit import wrong_mask
from maxi.data.chat_template import ChatTemplate
from maxi.data.loader import Batches, EvalRows, content_of, open_data, open_template
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError, StoppedTogether
from maxi.events import Events
from maxi.generation import complete, conversation
from maxi.health import Health, weights_of
from maxi.hf import Loaded, peft
from maxi.hf.config_json import config_fields, generation_fields
from maxi.metrics import Recorder, process_memory
from maxi.models import Model
from maxi.models.sampling import Sampling
from maxi.objectives import Objective
from maxi.params import Tree, count
from maxi.pretrained import Trained
from maxi.program import Program
from maxi.replay import verify_step
from maxi.run import AS_BEFORE, Resume, Run, claim, exported_step, record, reset_at, truncate_after
from maxi.runtime import set_up
from maxi.saving import Saver
from maxi.signals import StopRequest
from maxi.step import State
from maxi.watch import NO_CHANGE, Watch, too_small_for_bf16
from maxi.watchdog import Watchdog
from maxi.whole import write_whole

log = logging.getLogger("maxi")


@dataclass(frozen=True)
class Summary:
    """What a run came to. `before` and `after` are the evaluations before the first step and after the last, by name
    (without eval/): loss, and what else the objective measures; empty without evaluation rows."""

    run_dir: str
    steps: int
    parameters: int
    before: dict[str, float]
    after: dict[str, float]
    tokens_per_s: float | None
    export: str | None


@dataclass(frozen=True)
class Job:
    """The pieces of a run, put together and checked, before anything is computed."""

    config: Config
    run: Run
    devices: Mesh
    tokenizer: Tokenizer
    batches: Batches
    eval_rows: EvalRows | None
    prompts: list[list[int]]
    total: int
    program: Program
    adapter: peft.Settings | None
    """A finished adapter to go on from."""

    @property
    def model(self) -> Model:
        return self.program.model

    @property
    def objective(self) -> Objective:
        return self.program.objective


def train(config: Config, resume: Resume = AS_BEFORE) -> Summary:
    """Trains as configured, resuming if the run folder holds a checkpoint; `resume` says how.

    Raises a MaxiError for whatever the user can mend; Preempted, once all is saved, when a signal asked to stop.
    """
    processes.start(Path(config.run_dir), config.processes.start_timeout_s, config.processes.heartbeat_s)
    with (
        StopRequest(config.checkpoint.grace, config.run_dir) as stop,
        claim(config, resume) as run,
        Events(run.events if processes.is_first() else None, config.log.every, _life(), _shares()) as events,
        processes.together(),
    ):
        config = rewind.settle(run, config, resume.rewind)
        job = _prepare(config, run, resume)
        opened = Checkpoints(run.checkpoints, config.checkpoint.keep, config.checkpoint.background)
        with jax.set_mesh(job.devices), closing(opened) as checkpoints:
            with events.phase("state"):
                state, frozen, start = _begin(job, checkpoints, resume)
            events.resumed(start)
            if job.objective.needs_reference:
                with events.phase("reference"):
                    _attach_reference(job, frozen, state if start == 0 else None)
            with _recorder(job, start, events) as recorder, _watchdog(job, events, recorder):
                state = _steps(job, state, frozen, start, recorder, checkpoints, stop)
        with events.phase("export"):
            params = state.params if state.ema is None else state.ema
            exports.finish(run, Trained(job.model, job.program.tuning, params, frozen, job.total))
        return _summary(job, recorder)


def verify(config: Config, number: int) -> None:
    """Computes step `number` of a run again and compares every bit, see `maxi.replay`; trains nothing."""
    processes.start(Path(config.run_dir), config.processes.start_timeout_s, config.processes.heartbeat_s)
    with StopRequest(config.checkpoint.grace, config.run_dir), claim(config) as run, processes.together():
        job = _prepare(rewind.settle(run, config, None), run, AS_BEFORE)
        with jax.set_mesh(job.devices), closing(Checkpoints(run.checkpoints, read_only=True)) as checkpoints:
            frozen = pretrained.open_frozen(job.program.tuning, config.model.init_from, run, job.devices)
            if job.objective.needs_reference:
                _attach_reference(job, frozen, None)
            share = steps.share(job.devices)
            iterate = partial(job.batches.iterate, shard=share[0], shards=share[1])
            verify_step(number, run, job.program, checkpoints, lambda: _first_state(job)[0], frozen, iterate)


def _prepare(config: Config, run: Run, resume: Resume) -> Job:
    """All pieces; everything that can be known to fail without compiling fails here."""
    objective = objectives.build(**asdict(config.objective))
    set_up(run.folder / "xla" if processes.count() > 1 else None)
    processes.require_shared(run.folder)
    devices = mesh.build(config.mesh, rows=config.batch_size // config.micro_batches, seq_len=config.seq_len)
    log.info("devices: %s", mesh.describe(devices))
    # of a run that has begun, `record` knows the tokenizer
    allow_other = "tokenizer" in resume.allow_change or Run.is_run(run.folder)
    tokenizer, model = _tokenizer_and_model(config, allow_other)
    _check_fit(config, tokenizer, model, devices)
    adapter = starting.finished_adapter(config, model)
    if config.model.reference:
        references.check(config.model.reference, model, tokenizer)

    with open_template(objective.rows, config.chat, tokenizer) as template:
        virtual = getattr(config.adapter, "virtual_tokens", 0)
        content = content_of(objective.rows, config.data, config.chat, tokenizer, template, config.seq_len, virtual)
        with processes.in_turn(Path(config.data.cache_dir or cache.default_dir()).expanduser()):
            data = open_data(config.data, content, batch_size=config.batch_size, seed=config.seed, log=log.info)
        batches, eval_rows = data
        prompts = _prompts(config, tokenizer, template)
    _check_masks(batches, eval_rows)
    total = config.steps or max(1, math.floor((config.epochs or 1) * batches.rows_per_epoch / config.batch_size))
    read = batches.describe() + (eval_rows.describe() if eval_rows else [])
    record(run, config, {"data": batches.fingerprint, "tokenizer": tokenizer.fingerprint()}, read, resume)
    if processes.is_first():
        _keep_model_files(run, config, model, tokenizer)
    processes.barrier()

    parts = (objective, config.compute, config.optim, devices, total, config.micro_batches)
    built = program.build(model, *parts, adapter=config.adapter, freeze=config.freeze, seed=config.seed)
    job = Job(config, run, devices, tokenizer, batches, eval_rows, prompts, total, built, adapter)
    _announce(job)
    return job


def _begin(job: Job, checkpoints: Checkpoints, resume: Resume) -> tuple[State, Tree, int]:
    """The state to go on from (resumed, from other weights, or new), what stays beside it, and the steps behind it."""
    config, saved = job.config, checkpoints.newest()
    start = saved or 0
    if start > job.total:
        raise ConfigError(f"the run is at step {start} already, past steps {job.total}", "steps", "raise it")
    for records in (job.run.metrics, job.run.samples, job.run.perf):
        truncate_after(records, start if saved else -1)
    if processes.is_first() and exported_step(job.run) > start:
        job.run.exported.unlink()
    if saved:
        log.info("state: resumed from step %d of %d%s", start, job.total, ", all done" if start >= job.total else "")
        frozen = pretrained.open_frozen(job.program.tuning, config.model.init_from, job.run, job.devices)
        if resume.reset_optimizer and reset_at(job.run, config, start):
            log.info("state: new optimizer from step %d on", start)
            parts = checkpoints.restore_but_optimizer(start, job.program.abstract_state())
            return job.program.restarted(*parts), frozen, start
        return job.program.with_losses(checkpoints.restore(start, job.program.abstract_state())), frozen, start
    state, frozen = _first_state(job)
    if config.model.init_from and not frozen and config.export_dtype == "bfloat16" and config.optim.name == "adamw":
        matrices = [weight for weight in jax.tree.leaves(state.params) if weight.ndim >= 2]
        rms = math.sqrt(sum(float(jnp.vdot(w, w)) for w in matrices) / sum(w.size for w in matrices))
        if text := too_small_for_bf16(float(np.sum(jax.vmap(job.program.rate)(jnp.arange(job.total)))), rms):
            log.warning("warning: %s", text)
    return state, frozen, 0


def _first_state(job: Job) -> tuple[State, Tree]:
    """The state before the first step, and what stays beside it."""
    if job.config.model.init_from:
        log.info("state: weights of %s, new optimizer", job.config.model.init_from)
    else:
        log.info("state: new weights from seed %d", job.config.seed)
    first, frozen = starting.first_values(job.config, job.program, job.run, job.adapter)
    return job.program.new_state(first, consume=True), frozen


def _steps(
    job: Job, state: State, frozen: Tree, start: int, recorder: Recorder, checkpoints: Checkpoints, stop: StopRequest
) -> State:
    """Steps `start` to `total`. What a checkpoint says is done is in the records before it is written."""
    config, vote = job.config, processes.Vote(job.devices)
    take_step = job.program.step()
    examine = _examiner(job, frozen, stop)
    health = Health(job.devices, weights_of(job.program.where))
    saver = Saver(checkpoints, health, recorder.flush, recorder.say, config.run_dir)
    if start == 0 or (_evaluates(job, start) and not _evaluated(job, start)):  # a stop saves first and leaves it to us
        with recorder.paused("evaluation", start):
            recorder.evaluation(start, *examine(state))
    untouched = health(weights_of(state)).digest if start == 0 else None
    batches = job.batches.iterate(start, *steps.share(job.devices))
    settle = steps.Settle()
    stop.ready()
    recorder.begin()
    for done in range(start + 1, job.total + 1):
        asked_at = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - asked_at
        batch = steps.put(batch, job.devices)
        settle(state)
        state, metrics = take_step(state, batch, frozen)
        recorder.step(done, metrics, waited)
        saver.poll()
        if done == 1 and health(weights_of(state)).digest == untouched:
            recorder.say(f"warning at step 1: {NO_CHANGE}")
        last, left, stopping = done == job.total, False, vote.any(bool(stop.asked))
        if _evaluates(job, done):
            with recorder.paused("evaluation", done):
                try:
                    recorder.evaluation(done, *examine(state))
                except Stopping:
                    left = True
        if last or done % config.checkpoint.every == 0 or stopping or left:
            with recorder.paused("checkpoint", done):
                saver.save(done, state)
        if left or (stopping and not last):
            what = f"{stop.asked or 'another process was stopped'} at step {done} of {job.total}"
            recorder.say(f"{what}: saving, which may take {config.checkpoint.grace:g} s")
            with recorder.paused("checkpoint", done):
                saver.finish(what)
            raise StoppedTogether(f"{what}, all is saved", config.run_dir, "run the same command to go on")
    with recorder.paused("checkpoint", job.total):
        saver.finish(f"all {job.total} steps are computed")
    return state


def _evaluates(job: Job, done: int) -> bool:
    """Whether there is an evaluation behind step `done`."""
    return done == job.total or done % job.config.eval.every == 0


def _evaluated(job: Job, done: int) -> bool:
    there = any(line["step"] == done and any(name.startswith("eval/") for name in line) for line in job.run.lines())
    return processes.exchange(there)[0]


def _attach_reference(job: Job, frozen: Tree, first: State | None) -> None:
    """The reference's log-probabilities, into the rows. `first` is the state before the first step, None when that is
    over and the reference has to come from where the run took it."""
    config = job.config

    def weights() -> Any:
        if config.model.reference:
            return pretrained.open_plain(config.model.reference, job.devices).params
        start = partial(starting.first_values, config, job.program, job.run, job.adapter)
        return job.program.tuning.off(lambda: first.params if first else start()[0], frozen)

    references.attach_for_run(
        [*job.batches.opened, *(job.eval_rows.opened if job.eval_rows else ())],
        job.run,
        weights,
        job.model,
        new=first is not None,
        compute=job.program.compute,
        devices=job.devices,
        batch_size=config.batch_size // config.micro_batches,
        cache_dir=config.data.cache_dir,
    )


class Stopping(Exception):
    """An evaluation was left because the run is to stop; it is made up for when the run goes on."""


def _examiner(job: Job, frozen: Tree, stop: StopRequest) -> Callable[[State], tuple[dict[str, Any], list[dict[str, Any]]]]:
    """What an evaluation does: metrics on the evaluation rows, and continuations of the fixed prompts with their scores.

    Raises Stopping when a stop was asked for.
    """
    config, place = job.config.eval, partial(steps.put_whole, mesh=job.devices)
    leaves = processes.count() == 1  # one of several may not do other than the others
    if job.objective.rows in ("documents", "conversations"):
        predict, token_bytes = evaluate.eval_step(job.model, job.program.compute), job.tokenizer.token_bytes()
        measure = partial(evaluate.measure, predict, token_bytes=token_bytes)
    else:
        loss, totals = job.program.loss()
        whole = jax.jit(lambda params, batch: loss(params, steps.with_totals(totals, params, batch)))
        measure = partial(evaluate.measure_sums, whole)

    def unless_stopped(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if leaves and stop.asked:
                raise Stopping
            yield batch

    def examine(state: State) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        params = job.program.tuning.join(state.params if state.ema is None else state.ema, frozen)
        values: dict[str, Any] = {}
        if job.eval_rows is not None:
            rows = job.eval_rows.batches(config.max_rows)
            values = measure(params, batches=unless_stopped(rows), place=place)
        if leaves and stop.asked:
            raise Stopping
        if not config.prompts:
            return values, []
        loaded = Loaded(job.model, params, job.run.model)
        made = complete(loaded, job.prompts, Sampling(max_new_tokens=config.max_new_tokens, temperature=0.0))
        values |= scores.summary((each.ids, each.stopped) for each in made)
        shown = [
            {"prompt": prompt, "text": each.text, **scores.score(each.ids, each.stopped)}
            for prompt, each in zip(config.prompts, made, strict=True)
        ]
        return values, shown

    return examine


def _tokenizer_and_model(config: Config, allow_other: bool) -> tuple[Tokenizer, Model]:
    init_from = config.model.init_from
    tokenizer = pretrained.open_tokenizer(config.tokenizer, init_from, allow_other)
    special = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "bos_token_id": None}
    return tokenizer, pretrained.resolve_config(init_from, config.model.config, tokenizer.vocab_size, special)


def _prompts(config: Config, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[list[int]]:
    """The ids of `eval.prompts`: as they are, or what is served when a user says them."""
    texts = list(config.eval.prompts)
    if template is not None:
        texts = [template.prompt(conversation(text, config.chat.system), where="eval.prompts") for text in texts]
    return [ids.tolist() for ids in tokenizer.encode(texts)]


def _check_masks(batches: Batches, eval_rows: EvalRows | None) -> None:
    """Raises DataError when anything but what should be is trained."""
    for entry in (*batches.opened, *(eval_rows.opened if eval_rows else ())):
        counts = entry.cache.meta["counts"]
        if entry.content.has_weights and (wrong := wrong_mask(counts)):
            what = f"the mask is wrong, {wrong}"
            raise DataError(what, counts["wrong_rows"][0], "`maxi check` shows it; set chat.template")


def _check_fit(config: Config, tokenizer: Tokenizer, model: Model, devices: Mesh) -> None:
    """Sizes that must fit each other. Raises ConfigError."""
    if tokenizer.vocab_size > model.vocab_size:
        what = f"the tokenizer has {tokenizer.vocab_size:,} ids but the model {model.vocab_size:,}"
        raise ConfigError(what, "model.config.vocab_size", "raise it, or take the model's own tokenizer")
    program.check_sizes(model, devices, config.batch_size, config.seq_len, config.micro_batches)


def _announce(job: Job) -> None:
    """What was chosen, and what will be done."""
    for line in job.batches.describe() + (job.eval_rows.describe() if job.eval_rows else []):
        log.info("data: %s", line)
    config, model, compute, rows = job.config, job.model, job.program.compute, job.batches.rows_per_epoch
    log.info(
        "model: %s, %s parameters, %d layers (%s), vocabulary %s of which the tokenizer uses %s",
        *(model.family, f"{count(model.table):,}", len(model.layers), "unrolled" if compute.unroll else "scanned"),
        *(f"{model.vocab_size:,}", f"{job.tokenizer.vocab_size:,}"),
    )
    if job.program.tuning.needs_base:
        trained = count(job.program.tuning.table)
        share = 100 * trained / count(model.table)
        log.info("trained: %s parameters (%.2f %% as many), %s", f"{trained:,}", share, job.program.tuning.about)
    log.info("compute: %s, remat %s", jnp.dtype(compute.dtype).name, compute.remat)
    size = f"{config.batch_size} x {job.batches.width} tokens in {config.micro_batches} micro-batches"
    each = f" (about {config.batch_size * job.batches.items / rows:.0f} items)" if job.objective.rows != "documents" else ""
    log.info("plan: %d steps of %s%s, %.2f epochs", job.total, size, each, job.total * config.batch_size / rows)


def _keep_model_files(run: Run, config: Config, model: Model, tokenizer: Tokenizer) -> None:
    """config.json, generation_config.json and the tokenizer, which make the run folder a MODEL by itself."""
    if (run.model / "config.json").is_file():
        return
    run.model.mkdir(exist_ok=True)
    tokenizer.save(run.model)
    fields = config_fields(model, "float32", tokenizer)
    source = config.model.init_from
    given = Loaded(model, {}, pretrained.model_folder(source)).generation if source else None
    if generation := generation_fields(fields, tokenizer, given):
        write_whole(run.model / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    write_whole(run.model / "config.json", json.dumps(fields, indent=2) + "\n")


def _recorder(job: Job, start: int, events: Events) -> Recorder:
    peak = mesh.peak_flops(job.devices)
    flops = job.program.train_flops_per_token(job.batches.width)
    return Recorder(
        job.run.folder,
        job.config.log,
        to_tree(job.config),
        start,
        job.total,
        mfu=(lambda tokens_per_s: tokens_per_s * flops / peak) if peak else None,
        memory=lambda: mesh.memory_in_use(job.devices) or process_memory(),
        watch=Watch().step,
        events=events,
    )


def _watchdog(job: Job, events: Events, recorder: Recorder) -> Watchdog:
    log_config, stacks = job.config.log, job.run.stacks(jax.process_index())
    return Watchdog(events, stacks, log_config.stall_factor, log_config.stall_seconds, recorder.say)


def _shares() -> Callable[[list[float]], list[list[float]]] | None:
    """How processes tell each other their times, if there are several."""
    return processes.latest if processes.count() > 1 else None


def _life() -> dict[str, Any]:
    """What is said of this start in events.jsonl."""
    return {"maxi": __version__, "host": socket.gethostname(), "pid": os.getpid()}


def _summary(job: Job, recorder: Recorder) -> Summary:
    evals = [
        {name.removeprefix("eval/"): value for name, value in values.items() if name != "step"}
        for values in job.run.evaluations()
    ]
    rates = sorted(recorder.tokens_per_s)
    return Summary(
        run_dir=str(job.run.folder),
        steps=job.total,
        parameters=count(job.model.table),
        before=evals[0] if evals else {},
        after=evals[-1] if evals else {},
        tokens_per_s=rates[len(rates) // 2] if rates else None,
        export=str(job.run.hf) if job.config.export_hf and not job.program.tuning.virtual_tokens else None,
    )
