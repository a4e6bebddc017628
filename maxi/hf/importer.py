"""Import: a Hugging Face folder's weights, straight into (sharded) arrays.

Contract: names, shapes and dtypes are checked against the family's table, all together, before a byte of weights is
read. Then one tensor at a time is mapped from its file, brought into our layout and put where its shards belong; a
stack is allocated on the devices and filled layer by layer. The host never holds more than a couple of tensors.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxi.errors import ConfigError, ModelFolderError
from maxi.hf.folder import CONFIG, DTYPES, Stored, model_folder, read_json, tensors
from maxi.models import Model, from_hf_config
from maxi.params import Table, Tree, from_hf, get, shardings

_TIED_HEAD = "lm_head.weight"
_COMPUTED = ".rotary_emb.inv_freq"
"""Old Llama folders store the rotary frequencies, which config.json determines."""


def read_config(folder: str | Path) -> Model:
    """The `Model` that a folder's config.json describes; weights are not looked at. Raises ModelFolderError."""
    folder = model_folder(folder)
    return from_hf_config(read_json(folder, CONFIG), str(folder / CONFIG))


def read(
    folder: str | Path, *, dtype: Any = None, mesh: Mesh | None = None, each: Callable[[str, jax.Array], Any] | None = None
) -> tuple[Model, Tree]:
    """The model and its weights, in the shapes of `model.table`; or what `each(path, weight)` makes of every weight as soon as
    it is read, so that they need never be in memory all together.

    `dtype` (float32, bfloat16, float16) casts on the way; None keeps each weight as it is stored. With `mesh` weights
    are sharded as the table says, and each process reads only its own part.

    Raises ModelFolderError for a damaged or incomplete folder, one that is not of a known family, and weights that are
    not finite; ConfigError for sizes that the mesh does not divide.
    """
    folder = model_folder(folder)
    model = read_config(folder)
    table, wanted = model.table, None if dtype is None else float_dtype(dtype)
    where = NamedSharding(mesh, PartitionSpec()) if mesh else None
    targets = shardings(table, mesh) if mesh else None
    stored = tensors(folder)
    _check(model, stored, folder)
    if model.tied:
        _check_tied_head(model, stored, folder)
    layers: dict[str, list[Stored]] = {}
    for name, path, _ in table.hf_tensors():
        layers.setdefault(path, []).append(stored[name])
    if wanted is None:
        _check_one_dtype(layers.values(), folder)

    def made(path: str, _: Any) -> Any:
        weight = _leaf(table, layers, wanted, path, get(targets, path) if targets else where)
        return weight if each is None else each(path, weight)

    return model, table.map(made)


def float_dtype(dtype: Any) -> np.dtype:
    """float32, bfloat16 or float16, by name or by type. Raises ConfigError."""
    try:
        found = np.dtype(jnp.dtype(dtype))
    except TypeError:
        found = np.dtype(object)
    if found not in DTYPES.values():
        raise ConfigError(f"unknown dtype {dtype!r}", "dtype", "use float32, bfloat16 or float16")
    return found


def _leaf(
    table: Table, layers: dict[str, list[Stored]], dtype: np.dtype | None, path: str, sharding: NamedSharding | None
) -> jax.Array:
    """One weight of the tree: [*letters], or [L, *letters] filled layer by layer."""
    dtype = dtype or DTYPES[layers[path][0].dtype]
    param = table.params[path]
    if not param.stacked:
        return _put(layers[path][0], table, path, dtype, sharding)
    each = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])) if sharding else None
    stack = jnp.zeros(table.shape(path), dtype, device=sharding)
    for number, tensor in enumerate(layers[path]):
        # Waiting for each layer keeps the next one's host copy from being made before this one's is freed.
        stack = jax.block_until_ready(_insert(stack, _put(tensor, table, path, dtype, each), np.int32(number)))
    return stack


@partial(jax.jit, donate_argnums=0)
def _insert(stack: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)


def _put(tensor: Stored, table: Table, path: str, dtype: np.dtype, sharding: NamedSharding | None) -> jax.Array:
    """A stored tensor in our layout, on its devices; each shard is read from the file by itself."""
    view = from_hf(table, table.params[path], tensor.open())

    def part(index: Any) -> np.ndarray:
        with np.errstate(over="ignore"):  # an overflow is found, and named, below
            copy = np.array(view[index], dtype, order="C")
        if not np.isfinite(copy).all():
            kept = np.isfinite(view[index]).all()
            what = f"{tensor.name} holds values that {dtype.name} cannot" if kept else f"{tensor.name} holds NaN or Inf"
            raise ModelFolderError(what, str(tensor.file), "read it as bfloat16" if kept else "the weights are damaged")
        return copy

    if sharding is None:
        return jnp.asarray(part((slice(None),)))
    return jax.make_array_from_callback(view.shape, sharding, part)


def _check(model: Model, stored: dict[str, Stored], folder: Path) -> None:
    """Raises one ModelFolderError that says all that is missing, unexpected or of a wrong shape or dtype."""
    table = model.table
    expected = {name: table.hf_shape(table.params[path]) for name, path, _ in table.hf_tensors()}
    known = set(expected) | ({_TIED_HEAD} if model.tied else set())
    extra = [name for name in stored if name not in known and not name.endswith(_COMPUTED)]
    both = [name for name in expected if name in stored]
    faults = (
        ("missing", [name for name in expected if name not in stored]),
        ("unexpected", extra),
        ("wrong shape", [_shapes(stored[n], expected[n]) for n in both if stored[n].shape != expected[n]]),
        ("unsupported dtype", [f"{n} {stored[n].dtype}" for n in both if stored[n].dtype not in DTYPES]),
    )
    said = [f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}" for kind, names in faults if names]
    if said:
        raise ModelFolderError(f"the weights do not fit config.json; {'; '.join(said)}", str(folder), _fix(faults[0][1]))


def _shapes(tensor: Stored, expected: tuple[int, ...]) -> str:
    return f"{tensor.name} {list(tensor.shape)} instead of {list(expected)}"


def _fix(missing: list[str]) -> str:
    if missing == [_TIED_HEAD]:
        return "if the head is the embedding, set tie_word_embeddings to true"
    return "use the config.json that belongs to these weights"


def _check_tied_head(model: Model, stored: dict[str, Stored], folder: Path) -> None:
    """A head that is stored although it is tied must be the embedding. Raises ModelFolderError."""
    head, embed = stored.get(_TIED_HEAD), stored[model.table.params["embed"].hf]
    if head is None:
        return
    same = head.shape == embed.shape and head.dtype in DTYPES
    if same:
        a, b, rows = head.open(), embed.open(), 4096
        same = all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))
    if not same:
        what = "tie_word_embeddings is true, but lm_head.weight differs from the embedding"
        raise ModelFolderError(what, str(folder), "set tie_word_embeddings to false, or remove lm_head.weight")


def _check_one_dtype(leaves: Iterable[list[Stored]], folder: Path) -> None:
    for layers in leaves:
        for tensor in layers:
            if tensor.dtype != layers[0].dtype:
                what = f"{tensor.name} is {tensor.dtype} but {layers[0].name} is {layers[0].dtype}"
                raise ModelFolderError(what, str(folder), "layers of one kind need one dtype; read them with dtype=float32")
