"""Export: a model and its weights into a Hugging Face folder that is either complete or not there.

Contract: everything is written into a hidden folder beside the target (`.NAME.partial`), flushed to disk, and renamed;
whatever interrupts that, the target is untouched, and what a killed process left behind is removed by the next one.
Weights are fetched from the devices, cast and written one tensor at a time, so files are made by hand: a safetensors
file is the length of a JSON header (8 bytes, little-endian), the header, and the tensors' bytes one after the other
(https://huggingface.co/docs/safetensors). Of several processes the first writes; all of them hand over their parts.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from maxi import faults, processes
from maxi.data.tokenizer import Tokenizer
from maxi.errors import EnvironmentFault, ModelFolderError, NumericsError
from maxi.hf.card import default_card
from maxi.hf.config_json import config_fields, generation_fields
from maxi.hf.folder import ADAPTER, CONFIG, DTYPES, GENERATION, INDEX, SINGLE
from maxi.hf.importer import float_dtype
from maxi.models import Model
from maxi.params import Table, Tree, get, to_hf
from maxi.sharding import fetch

SHARD_BYTES = 5 << 30
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Planned:
    """A tensor to be written: its Hugging Face name, where it is in the tree, and as what."""

    name: str
    path: str
    number: int | None
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write(
    model: Model,
    params: Tree,
    out: str | Path,
    *,
    dtype: Any = None,
    tokenizer: Tokenizer | None = None,
    card: str | None = None,
    generation: dict[str, Any] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> Path:
    """Writes weights, config.json, generation_config.json, README.md and the tokenizer's files into the folder `out`.

    `params` is a tree of `model.table`'s shapes; `dtype` casts (None keeps each weight's own). `card` is the README's
    text and `generation` the fields of generation_config.json, which by default say what the model and the tokenizer
    do. Files of weights hold at most `max_shard_bytes` unless one tensor alone is larger. Returns `out`.

    Raises ModelFolderError if `out` exists and not `force`, or is no model folder; NumericsError for weights that are
    not finite (in `dtype`); EnvironmentFault where the disk fails or is full.
    """
    plan = _plan(model.table, params, None if dtype is None else float_dtype(dtype))
    if not processes.is_first():
        for shard in _shards(plan, max_shard_bytes):
            deque(_fetch(model.table, params, shard), maxlen=0)
        processes.barrier()
        return Path(out).expanduser().resolve()
    out = check_target(out, force)
    with in_place_of(out, "the model") as hidden:
        _write_weights(model.table, params, plan, max_shard_bytes, hidden)
        stored = _main_dtype(plan)
        config = config_fields(model, stored, tokenizer)
        write_json(hidden / CONFIG, config)
        if generation := generation_fields(config, tokenizer, generation):
            write_json(hidden / GENERATION, generation)
        if tokenizer is not None:
            tokenizer.save(hidden)
        (hidden / "README.md").write_text(card or default_card(model, stored, out.name), "utf-8", newline="\n")
    processes.barrier()
    return out


def check_target(out: str | Path, force: bool) -> Path:
    """The absolute path to write to. Raises ModelFolderError if something is there that may not be replaced.

    An empty folder may always be, a model folder or an adapter only with `force`, and anything else never.
    """
    out = Path(out).expanduser().resolve()
    old = _old(out)
    if old.exists() and not out.exists():  # killed between the two renames of `_publish`
        old.rename(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return out
    if not any((out / name).is_file() for name in (CONFIG, ADAPTER)):
        raise ModelFolderError("the target exists and is no model folder", str(out), "choose another path")
    if not force:
        raise ModelFolderError("the target exists", str(out), "choose another path, or --force to replace it")
    return out


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def _plan(table: Table, params: Tree, dtype: np.dtype | None) -> list[_Planned]:
    planned = []
    for name, path, number in table.hf_tensors():
        weight = get(params, path)
        assert weight.shape == table.shape(path), (path, weight.shape, table.shape(path))
        shape = table.hf_shape(table.params[path])
        planned.append(_Planned(name, path, number, shape, dtype or float_dtype(weight.dtype)))
    return planned


def _main_dtype(plan: list[_Planned]) -> str:
    """The dtype that most bytes are stored in."""
    sizes = dict.fromkeys((tensor.dtype.name for tensor in plan), 0)
    for tensor in plan:
        sizes[tensor.dtype.name] += tensor.size
    return max(sizes, key=sizes.__getitem__)


def _shards(plan: list[_Planned], max_bytes: int) -> list[list[_Planned]]:
    """Consecutive tensors, as many as fit; within a file wide dtypes come first, so that all data is aligned."""
    shards: list[list[_Planned]] = [[]]
    room = max_bytes
    for tensor in plan:
        if shards[-1] and tensor.size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _write_weights(table: Table, params: Tree, plan: list[_Planned], max_shard_bytes: int, folder: Path) -> None:
    shards = _shards(plan, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            _write_header(file, shard)
            for data in _fetch(table, params, shard):
                file.write(data)
    if len(shards) > 1:
        shard_of = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.size for tensor in plan)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))})


def _write_header(file: IO[bytes], shard: list[_Planned]) -> None:
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard:
        offsets = [start, start + tensor.size]
        tree[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        start += tensor.size
    header = json.dumps(tree, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)


def _fetch(table: Table, params: Tree, shard: list[_Planned]) -> Iterator[memoryview]:
    """Each tensor's bytes in Hugging Face's layout."""
    for tensor in shard:
        weight = get(params, tensor.path)
        host = fetch(weight if tensor.number is None else _layer(weight, tensor.number))
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(to_hf(table.params[tensor.path], host.astype(tensor.dtype, copy=False)))
        if not np.isfinite(data).all():
            kept = np.isfinite(host).all()
            what = f"holds values that {tensor.dtype.name} cannot" if kept else "holds NaN or Inf"
            fix = "export as bfloat16 or float32" if kept else "export an earlier checkpoint"
            raise NumericsError(f"{tensor.name} {what}", tensor.path, fix)
        yield data.reshape(-1).view(np.uint8).data


def _layer(stack: Any, number: int) -> Any:
    # A traced index: one compilation a shape, where `stack[number]` would compile once a layer.
    return stack[number] if isinstance(stack, np.ndarray) else _take(stack, np.int32(number))


@jax.jit
def _take(stack: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """An object as the JSON files of model folders are written."""
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8", newline="\n")


@contextmanager
def in_place_of(out: Path, what: str) -> Iterator[Path]:
    """A hidden folder to write `what` into, which becomes `out` at the end of the context or leaves nothing.

    Raises EnvironmentFault where the disk fails or is full.
    """
    hidden = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        yield hidden
        _publish(hidden, out)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {what}, {error.strerror}", str(out), "check space and rights") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _publish(hidden: Path, out: Path) -> None:
    """Flushes the finished folder and puts it in the target's place; an old one is removed only after that."""
    faults.at("export.write")
    for path in (*hidden.iterdir(), hidden):
        _flush(path)
    old = _old(out)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    faults.at("export.rename")
    try:
        hidden.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _flush(out.parent)
    faults.at("export.renamed")
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
