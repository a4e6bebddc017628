"""What the reference model says of every answer: computed once before training, kept on disk, put into the rows.

Training then never holds a second model. A file is named by all that decides its numbers: the reference's weights and
architecture, the ids and weights of the answers (so also tokenizer, template and policies), how long they may be, and the
dtype of the computation. Under another name it cannot be found, and a run remembers which weights it began with, so a
stale one is refused; it ends with its own checksum, so a damaged one is computed again.
"""

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maxi import faults, processes
from maxi.adapters import virtual
from maxi.data import cache
from maxi.data.loader import Opened, stack
from maxi.data.sample_rows import PairRows
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError, EnvironmentFault
from maxi.hf import Loaded
from maxi.models import Model, decoder
from maxi.models.decoder import Compute
from maxi.objectives.branches import branch_logprobs
from maxi.params import Tree, fingerprint
from maxi.pretrained import model_folder, read_model
from maxi.run import Run, remember, remembered
from maxi.sharding import fetch
from maxi.step import Batch, put_whole

log = logging.getLogger("maxi")

FORMAT = 2
"""Raised when the same inputs would give other numbers."""

_CHECKSUM = hashlib.sha256().digest_size

SAY_EVERY = 30.0
"""Seconds between lines that tell how far it is."""


def check(name: str, policy: Model, tokenizer: Tokenizer) -> None:
    """Raises ConfigError unless a MODEL to compare with has the policy's tokenizer and architecture; reads no weights."""
    found = Loaded(read_model(name), {}, model_folder(name))
    same = found.tokenizer is None or found.tokenizer.fingerprint() == tokenizer.fingerprint()
    if not same or _architecture(found.model) != _architecture(policy):
        what = f"{name} has another {'architecture' if same else 'tokenizer'} than the model that is trained"
        raise ConfigError(what, "model.reference", "name a model of the same shape, or leave it out")


def _architecture(model: Model) -> str:
    """All that decides what weights compute."""
    return repr([sorted(model.table.params), sorted(model.table.sizes.items()), model.layers, model.rope, model.norm_eps])


def attach_for_run(opened: list[Opened], run: Run, params: Callable[[], Tree], model: Model, *, new: bool, **how: Any) -> None:
    """`attach` for a run, which remembers the reference it began with; `new`: it begins now.

    A run that goes on asks for the weights only when the cache was lost, and raises DataError when they are not the
    same any more.
    """
    known = remembered(run, "reference")
    weights = fingerprint(params()) if new or known is None else known
    remember(run, "reference", weights)

    def same() -> Tree:
        found = params()
        if fingerprint(found) != weights:
            fix = "restore it, or set another run_dir"
            raise DataError("the reference model changed since this run began", str(run.folder), fix)
        return found

    attach(opened, weights, same, model, **how)


def attach(
    opened: list[Opened],
    weights: str,
    params: Callable[[], Tree],
    model: Model,
    *,
    compute: Compute,
    devices: Mesh,
    batch_size: int,
    cache_dir: str | None,
) -> None:
    """Gives the rows of every source their reference log-probabilities, from disk or computed now.

    weights: the fingerprint of the reference; params: its weights, asked for only when something has to be computed.
    batch_size: rows at a time. Of virtual tokens, where rows have places for them, the reference knows nothing. Raises
    EnvironmentFault when the folder cannot be written, DataError when a log-probability is not finite.
    """
    folder = Path(cache_dir).expanduser() / "references" if cache_dir else cache.default_dir().parent / "references"
    found: Tree | None = None
    # rows of all sources have one shape, so it compiles once
    of_batch = jax.jit(partial(_of_batch, model, compute), static_argnames="virtual_tokens")
    for entry in opened:
        rows = entry.rows
        assert isinstance(rows, PairRows)
        file = folder / f"{_key(entry, rows, weights, model, compute)}.npy"
        rows.reference = _read(file, len(rows.sizes))
        if not all(processes.exchange(rows.reference is not None)):  # one of them cannot compute it alone
            rows.reference = None
        if rows.reference is not None:
            log.info("reference: %s, %d pairs from the cache", entry.source.path, len(rows.sizes))
            continue
        found = params() if found is None else found
        rows.reference = _compute(entry, rows, partial(of_batch, found, virtual_tokens=rows.virtual), devices, batch_size)
        _write(file, rows.reference)


def _key(entry: Opened, rows: PairRows, weights: str, model: Model, compute: Compute) -> str:
    made_of = [weights, _architecture(model), entry.cache.fingerprint, rows.width, jnp.dtype(compute.dtype).name]
    made_of += [rows.virtual] if rows.virtual else []  # they leave answers of other rows (KTO) less room
    return hashlib.sha256(json.dumps([FORMAT, *made_of]).encode()).hexdigest()[:32]


def _read(file: Path, items: int) -> np.ndarray | None:
    """None when it is not there or not as it was written."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[:-_CHECKSUM]).digest() != content[-_CHECKSUM:]:
        return None
    found = np.load(io.BytesIO(content[:-_CHECKSUM]))
    return found if found.shape == (items, 2) and np.isfinite(found).all() else None


def _write(file: Path, values: np.ndarray) -> None:
    """`.npy`, and the sha256 of all of it behind, which readers of `.npy` pass over."""
    content = io.BytesIO()
    np.save(content, values)
    aside = file.with_name(f".{file.name}.{time.time_ns()}-{processes.index()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content.getvalue() + hashlib.sha256(content.getvalue()).digest())
        faults.at("reference.rename")
        aside.replace(file)
        faults.at("reference.renamed")
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        fix = "free space, or name another place with data.cache_dir"
        raise EnvironmentFault(f"cannot keep the reference, {error.strerror}", str(file.parent), fix) from None


def _compute(
    entry: Opened, rows: PairRows, of_batch: Callable[[Batch], jax.Array], devices: Mesh, batch_size: int
) -> np.ndarray:
    """Float32 [items, 2]: the log-probability of both branches of every item."""
    values = np.zeros((len(rows.sizes), 2), np.float32)
    said = begin = time.monotonic()
    for start in range(0, len(rows), batch_size):
        numbers = range(start, min(start + batch_size, len(rows)))
        batch = stack([rows[number] for number in numbers] + [rows.blank()] * (batch_size - len(numbers)))
        both = fetch(of_batch(put_whole(batch, devices)))
        for number, pairs_of_row in zip(numbers, both, strict=False):
            items = rows.items(number)
            values[items] = pairs_of_row[: len(items)]
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            log.info("reference: %s, %d of %d rows", entry.source.path, numbers.stop, len(rows))
    if not np.isfinite(values).all():
        fix = "the reference model is damaged, or its dtype overflows"
        raise DataError("a reference log-probability is not finite", entry.source.path, fix)
    log.info("reference: %s, %d pairs computed in %.1f s", entry.source.path, len(values), time.monotonic() - begin)
    return values


def _of_batch(model: Model, compute: Compute, params: Tree, batch: Batch, virtual_tokens: int) -> jax.Array:
    batch = virtual.without(batch, virtual_tokens)
    return jnp.stack(branch_logprobs(decoder.logprobs(model, params, batch, compute)[0], batch), -1)
