"""A model folder's files, trusted with nothing: which tensors it holds, and where their bytes lie.

Contract: whatever a folder holds, the answer is a dict of `Stored` tensors or one ModelFolderError that names the file.
Files are reached by plain names only; a link may lead within the folder or, in a Hugging Face cache, to the `blobs`
of the same repository. Sizes are capped before anything is parsed. Only safetensors is read: pickles run code.
What the tensors mean is `importer.py`'s matter.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from maxi.errors import ModelFolderError
from maxi.paths import inside, read_file

CONFIG, GENERATION = "config.json", "generation_config.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors header (the format's own limit) and of the index, which says the same about many files."""

DTYPES: dict[str, np.dtype] = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(jnp.bfloat16)}
"""Weights are in one of these; a quantised or integer tensor would need its scales, and is refused."""

_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file, its data at byte `start`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def open(self) -> np.ndarray:
        """The tensor, mapped from the file read-only: only what is touched is read. Its dtype must be in `DTYPES`."""
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.start, self.shape)


def model_folder(folder: str | Path) -> Path:
    """The folder, if there is one. Raises ModelFolderError."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "the model is a file, not a folder" if path.exists() else "no such model folder"
        raise ModelFolderError(what, str(path), "give the folder that holds config.json")
    return path


def locate(folder: Path, name: str) -> Path:
    """The real path of a file of the folder. Raises ModelFolderError where it is missing or leads out of the folder."""
    try:
        return inside(folder, name)
    except ValueError as error:
        fix = "copy the file to where the link is" if "link" in str(error) else "complete the download"
        raise ModelFolderError(str(error), str(folder), fix) from None


def read_json(folder: Path, name: str, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a file of the folder. Raises ModelFolderError, also for keys that occur twice."""
    target = locate(folder, name)
    try:
        raw = read_file(target, max_bytes)
    except OSError as error:
        raise ModelFolderError(f"cannot read {name}, {error.strerror}", str(folder), "check the file") from None
    return parse_json(raw, name, str(folder))


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder by name, whether in one file or in shards.

    Raises ModelFolderError for a folder without safetensors weights, a damaged file, or an index that does not agree
    with its shards.
    """
    if _present(folder / SINGLE):
        return tensors_in(folder, SINGLE)
    if _present(folder / INDEX):
        return _sharded(folder)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        fix = "convert it with transformers: model.save_pretrained(folder)"
        raise ModelFolderError(f"safetensors only, not pickled weights such as {pickles[0]}", str(folder), fix)
    raise ModelFolderError(f"no weights, neither {SINGLE} nor {INDEX}", str(folder), "complete the download")


def tensors_in(folder: Path, name: str) -> dict[str, Stored]:
    """Every tensor of one safetensors file of the folder. Raises ModelFolderError where it is missing or damaged."""
    return {tensor.name: tensor for tensor in _header(folder, name)}


def _present(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a dangling link is a missing file, not an absent one


def _sharded(folder: Path) -> dict[str, Stored]:
    shard_of = read_json(folder, INDEX, MAX_HEADER_BYTES).get("weight_map")

    def fault(what: str) -> ModelFolderError:
        return ModelFolderError(what, str(folder / INDEX), "download the folder again; the index and its shards disagree")

    if not isinstance(shard_of, dict) or not shard_of:
        raise fault("the index has no weight_map")
    shards = sorted({str(shard) for shard in shard_of.values()})
    for shard in shards:
        if not _SHARD.fullmatch(shard):
            raise fault(f"the index names {shard[:80]!r}, which is not a plain safetensors file name")
    if strays := sorted({path.name for path in folder.glob("model-*-of-*.safetensors")} - set(shards)):
        raise fault(f"{strays[0]} is not in the index")
    found: dict[str, Stored] = {}
    for shard in shards:
        for tensor in _header(folder, shard):
            expected = shard_of.get(tensor.name)
            if expected != shard:
                says = "does not list it" if expected is None else f"says {expected}"
                raise fault(f"tensor {tensor.name} is in {shard} but the index {says}")
            found[tensor.name] = tensor
    if absent := [name for name in shard_of if name not in found]:
        raise fault(f"the index lists {absent[0]} in {shard_of[absent[0]]}, which does not hold it")
    return found


def _header(folder: Path, name: str) -> list[Stored]:
    """What a safetensors file says it holds. The library checks that tensors fill the file and do not overlap."""
    target = locate(folder, name)

    def fault(what: str) -> ModelFolderError:
        return ModelFolderError(f"{name} is damaged, {what}", str(folder), "download the file again")

    try:
        size = target.stat().st_size
        with target.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise fault("it ends within its header")
            if length > MAX_HEADER_BYTES:
                raise fault(f"its header is over {MAX_HEADER_BYTES / 1e6:.0f} MB")
            tree = parse_json(file.read(length), name, str(folder))
        with safe_open(target, framework="numpy"):
            pass
    except OSError as error:
        raise fault(error.strerror or str(error)) from None
    except ModelFolderError:
        raise
    except Exception as error:  # SafetensorError, which not every version exports
        raise fault(str(error).removeprefix("Error while deserializing header: ")) from None
    return [
        Stored(key, target, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for key, entry in tree.items()
        if key != "__metadata__"
    ]


def parse_json(raw: bytes, name: str, where: str) -> dict[str, Any]:
    """Strict JSON: UTF-8, no key twice, no NaN. Readers differ in which of two equal keys they take. Raises ModelFolderError,
    which says the file's `name`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            raise ValueError(f"key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} occurs twice")
        return tree

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else refuse(text[:20])

    try:
        tree = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{name} is not valid JSON, {str(error)[:200]}", where, "download it again") from None
    if not isinstance(tree, dict):
        raise ModelFolderError(f"{name} is a {type(tree).__name__}, not an object", where, "download it again")
    return tree
