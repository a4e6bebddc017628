"""A MODEL argument, which everywhere may be a Hugging Face folder, a run folder or an adapter in peft's format, to weights
in memory. Of what trained an adapter beside a base, or part of it, the base is read from where the run took it, and the
result is whole: weights of the base's shapes with what was learned in them, or with virtual tokens beside them."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from maxi import adapters, hf, processes
from maxi.adapters import Tuning, virtual
from maxi.adapters.weight import cast
from maxi.adapters.weights import START
from maxi.checkpoint import Checkpoints, abstract_state
from maxi.config import load
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, ModelFolderError
from maxi.hf import Loaded, peft
from maxi.hf.folder import MAX_CONFIG_BYTES, parse_json
from maxi.models import Model, from_hf_config
from maxi.params import Tree, abstract, fingerprint, get, shardings
from maxi.paths import read_file
from maxi.run import Run, remember, remembered
from maxi.sharding import fetch
from maxi.whole import write_whole

log = logging.getLogger("maxi")

_ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters"}


def model_folder(path: str | Path) -> Path:
    """Where config.json and the tokenizer of a MODEL are. Raises ModelFolderError when `path` is neither kind."""
    folder = Path(path).expanduser()
    if Run.is_run(folder):
        return Run(folder).model
    if peft.is_adapter(folder) and not (folder / "config.json").is_file():
        return model_folder(_base_name(peft.open_adapter(folder)))
    if not (folder / "config.json").is_file():
        what = "there is no such folder" if not folder.is_dir() else "neither a run folder nor a Hugging Face model"
        raise ModelFolderError(what, str(path), "name a folder with config.json, or one that `maxi train` made")
    return folder


def open_tokenizer(tokenizer: str | None, init_from: str | None, allow_other: bool = False) -> Tokenizer:
    """The tokenizer of a run: the one named, or that of the MODEL it starts from.

    Raises ConfigError when both are given and are not the same, unless `allow_other`; ModelFolderError when there is none.
    """
    source = model_folder(init_from) if init_from else None
    found = Tokenizer.load(tokenizer or source or "")
    if tokenizer and source and Tokenizer.load(source).fingerprint() != found.fingerprint():
        what = f"{tokenizer} is not the tokenizer of {init_from}"
        if not allow_other:
            fix = "leave out tokenizer, or train with --allow-change tokenizer"
            raise ConfigError(f"{what}, whose weights know its ids alone", "tokenizer", fix)
        log.warning("warning: %s, which --allow-change allows", what)
    return found


def read_model(path: str | Path) -> Model:
    """The `Model` of a MODEL, without weights."""
    return hf.read_config(model_folder(path))


def open_model(path: str | Path, step: int | None = None, dtype: Any = "float32", mesh: Mesh | None = None) -> Loaded:
    """Model, weights (the moving average where the run kept one) and folder of a MODEL.

    `step` picks a run's checkpoint, by default the newest that is whole; weights go to `mesh`, by default to one device.
    `dtype` None keeps what is stored. Raises ModelFolderError for a folder or step that cannot be used.
    """
    folder = model_folder(path)
    if not Run.is_run(path):
        if step is not None:
            raise ModelFolderError("a Hugging Face folder has no steps", str(path), "leave out --step")
        if peft.is_adapter(path):
            return _open_adapter(peft.open_adapter(path), dtype, mesh)
        model, params = hf.read(folder, dtype=dtype, mesh=mesh)
        return Loaded(model, params, folder)
    trained = open_trained(path, step, mesh)
    params = _together(trained.tuning, trained.params, trained.frozen, dtype)
    return Loaded(trained.model, params, folder)


def open_plain(path: str | Path, mesh: Mesh | None = None) -> Loaded:
    """A MODEL, float32, whose weights are all there is to it: to start from, or to compare with. Raises as `open_model`
    does, and ModelFolderError for one with virtual tokens."""
    opened = open_model(path, mesh=mesh)
    if virtual.count(opened.params):
        fix = "name the model that it was trained on"
        raise ModelFolderError("a model with virtual tokens cannot be started from or compared with", str(path), fix)
    return opened


def _together(tuning: Tuning, params: Tree, frozen: Tree, dtype: Any) -> Tree:
    """Whole weights with what was learned in them; virtual tokens, which are no part of weights, beside them."""
    if tuning.virtual_tokens:
        joined = tuning.join(params, frozen)
        return joined if dtype is None else cast(joined, dtype)
    merged = tuning.merged(params, frozen)
    return merged if dtype is None else jax.tree.map(lambda w: w.astype(dtype), merged)


class Trained(NamedTuple):
    """What a run's checkpoint of `step` holds, and what stayed beside it; `model` is of the base's table."""

    model: Model
    tuning: Tuning
    params: Tree
    frozen: Tree
    step: int


def open_trained(path: str | Path, step: int | None = None, mesh: Mesh | None = None) -> Trained:
    """What a run has learned at `step`, and its base. Raises ModelFolderError, as `open_model` does."""
    run, model = Run(path), read_model(path)
    config = load(run.config)
    tuning = adapters.build(model.table, config.freeze, **asdict(config.adapter))
    checkpoints = Checkpoints(run.checkpoints, read_only=True)
    found, one = _chosen(checkpoints, step, path), SingleDeviceSharding(jax.devices()[0])
    where = shardings(tuning.table, mesh) if mesh else tuning.table.map(lambda *_: one)
    params = checkpoints.restore_weights(found, abstract_state(abstract(tuning.table), where))
    checkpoints.close()
    return Trained(model, tuning, params, open_frozen(tuning, config.model.init_from, run, mesh), found)


def open_frozen(tuning: Tuning, init_from: str | None, run: Run, mesh: Mesh | None = None) -> Tree:
    """What stayed of the base of a run that has begun. Raises as `open_base` does."""
    if not tuning.needs_base:
        return {}
    return with_start(tuning, tuning.fix(open_base(init_from, run, mesh, tuning.keep)), run, mesh)


def open_base(
    init_from: str | None, run: Run, mesh: Mesh | None = None, each: Callable[[str, jax.Array], Any] | None = None
) -> Tree:
    """The weights that a run keeps beside what it trains, float32, or what `each(path, weight)` makes of them one by one; a run
    remembers which they are.

    Raises ModelFolderError when they are gone or not the same any more.
    """
    assert init_from is not None
    prints: dict[str, str] = {}

    def seen(path: str, weight: jax.Array) -> Any:
        prints[path] = fingerprint({path: weight})
        return weight if each is None else each(path, weight)

    base = _open_each(init_from, mesh, seen)
    known, found = remembered(run, "base"), hashlib.sha256(repr(sorted(prints.items())).encode()).hexdigest()
    if known is not None and known != found:
        what = f"{init_from} is not the base any more that this run was trained on"
        raise ModelFolderError(what, str(run.folder), "restore it")
    remember(run, "base", found)
    return base


def _open_each(path: str, mesh: Mesh | None, each: Callable[[str, jax.Array], Any]) -> Tree:
    """`open_plain`'s weights, float32, passed through `each`; those of a folder are read one by one."""
    if not Run.is_run(path) and not peft.is_adapter(path):
        return hf.read(model_folder(path), dtype="float32", mesh=mesh, each=each)[1]
    opened = open_plain(path, mesh)
    return opened.model.table.map(lambda name, _: each(name, get(opened.params, name)))


def with_start(tuning: Tuning, frozen: Tree, run: Run, mesh: Mesh | None = None, first: Tree | None = None) -> Tree:
    """What `fix` gave, on its devices, and the first values that stay with it; `first` are those of a run that begins, which
    keeps them."""
    if tuning.keeps_start:
        if first is not None:
            flat = {path: fetch(get(first, path)) for path in tuning.table.params}
            if processes.is_first():
                write_whole(run.start, save(flat))
            processes.barrier()
        try:
            flat = load_file(run.start)
            start = tuning.table.map(lambda path, _: flat[path])
        except (OSError, KeyError, SafetensorError):
            fix = "restore it from a copy, or set another run_dir"
            raise ModelFolderError("what the adapter started from is lost", str(run.start), fix) from None
        frozen = {**frozen, START: start if mesh else jax.tree.map(jnp.asarray, start)}
    return jax.device_put(frozen, adapters.frozen_shardings(tuning, mesh)) if mesh else frozen


def _open_adapter(settings: peft.Settings, dtype: Any, mesh: Mesh | None) -> Loaded:
    """A base with an adapter in peft's format, merged."""
    base = open_plain(_base_name(settings), mesh)
    tuning = peft.tuning_of(settings, base.model.table)
    params = _together(tuning, peft.read(settings, tuning), tuning.fix(base.params), dtype)
    tokenizer = settings.folder if any(settings.folder.glob("tokenizer*.json")) else base.folder
    return Loaded(base.model, params, tokenizer)


def _base_name(settings: peft.Settings) -> str:
    if not settings.base or not Path(settings.base).expanduser().is_dir():
        what = f"its base {settings.base} is not a folder here"
        raise ModelFolderError(what, str(settings.folder), "set base_model_name_or_path in adapter_config.json")
    return settings.base


def _chosen(checkpoints: Checkpoints, step: int | None, path: str | Path) -> int:
    """The step to take, its weights as they were written."""
    steps = checkpoints.steps()
    if step is None:
        newest = checkpoints.newest(items=("params",))
        if newest is None:
            raise ModelFolderError("the run has no checkpoint yet", str(path), "train it further")
        return newest
    if step not in steps:
        raise ModelFolderError(f"the run has no checkpoint of step {step}", str(path), f"it has {', '.join(map(str, steps))}")
    if reason := checkpoints.damage(step, items=("params",)):
        raise ModelFolderError(f"step {step} corrupt: {reason}", str(path), f"it has {', '.join(map(str, steps))}")
    return step


def resolve_config(
    init_from: str | None, config: str | dict[str, Any] | None, vocab_size: int, special: dict[str, Any]
) -> Model:
    """The model that a run's `model` section asks for.

    `config` (a path or fields) is read over the config of `init_from`. `vocab_size` is taken when neither gives one;
    `special` are token ids of the tokenizer, taken unless given. Raises ModelFolderError, ConfigError for fields of the
    run's own config.
    """
    fields: dict[str, Any] = {}
    where, given = init_from or "model.config", config
    if init_from is not None:
        fields |= read_model(init_from).hf_config
    if isinstance(config, str):
        where = config
        try:
            raw = read_file(Path(config).expanduser(), MAX_CONFIG_BYTES)
        except OSError as error:
            what = f"cannot read the model's config, {error.strerror}"
            raise ModelFolderError(what, where, "name a config.json") from None
        config = parse_json(raw, "the model's config", where)
    changes = config or {}
    if not _ROPE_FIELDS.isdisjoint(changes):  # these say the same thing: what is given replaces all of them but the base
        theta = fields.get("rope_theta") or (fields.get("rope_parameters") or {}).get("rope_theta")
        fields = {name: value for name, value in fields.items() if name not in _ROPE_FIELDS}
        if theta is not None and "rope_theta" not in (changes.get("rope_parameters") or {}):
            fields["rope_theta"] = theta
    fields |= changes
    try:
        return from_hf_config({"vocab_size": vocab_size, **special, **fields}, where)
    except ModelFolderError as error:
        if isinstance(given, dict):
            raise ConfigError(error.what, "model.config", error.fix) from None
        raise
