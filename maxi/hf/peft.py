"""Adapters in peft's format: a folder of adapter_config.json and adapter_model.safetensors, in and out, without peft.

Names and layouts of the tensors stand in the table of what is trained (`maxi.adapters`), but for those of virtual tokens
(`peft_virtual.py`). Where modules have ranks of their own, a smaller one is filled up on the way in and cut off on the way
out. Written for peft 0.21.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from maxi import processes
from maxi.adapters import OnWeights
from maxi.adapters.adalora import AdaLora
from maxi.adapters.ia3 import FEEDFORWARD, IA3
from maxi.adapters.lora import PREFIX, Lora
from maxi.adapters.prefix import FromNetwork, Prefix
from maxi.adapters.prompt import Prompt
from maxi.adapters.targets import module
from maxi.adapters.weights import START
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, ModelFolderError, NumericsError
from maxi.hf import peft_adalora, peft_virtual
from maxi.hf.exporter import check_target, in_place_of, write_json
from maxi.hf.folder import ADAPTER, ADAPTER_WEIGHTS, DTYPES, Stored, read_json, tensors_in
from maxi.params import Table, Tree, from_hf, get, put, to_hf
from maxi.sharding import fetch

PICKLED = "adapter_model.bin"
_PLAIN = re.compile(r"[A-Za-z0-9_.]{1,200}")
_UNSUPPORTED = ("lora_bias", "use_qalora", "use_bdlora", "modules_to_save", "layer_replication", "target_parameters")
"""Fields of adapter_config.json that would change what is computed."""
KINDS = ("LORA", "ADALORA", "IA3", *peft_virtual.KINDS)
"""The peft_type of what can be read."""
OWN: Mapping[type, Mapping[str, str]] = {
    Lora: {name: name for name in ("rank", "alpha", "rslora", "dora", "rank_pattern", "alpha_pattern")},
    AdaLora: {"init_r": "rank", "alpha": "alpha"},
    Prompt: {"virtual_tokens": "virtual_tokens"},
    Prefix: {"virtual_tokens": "virtual_tokens"},
}
"""What a configuration has to say of an adapter as it is: key -> the kind's name for it."""


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says, and the tensors beside it."""

    folder: Path
    fields: Mapping[str, Any]
    stored: Mapping[str, Stored]

    @property
    def base(self) -> str | None:
        """The model it belongs to, as it was called where it was trained."""
        return self.fields.get("base_model_name_or_path")


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder).expanduser() / ADAPTER).is_file()


def open_adapter(folder: str | Path) -> Settings:
    """Reads the config and the names of the tensors. Raises ModelFolderError for what is damaged or not supported."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ModelFolderError("no such adapter folder", str(path), f"give the folder that holds {ADAPTER}")
    fields = read_json(path, ADAPTER)
    kind = fields.get("peft_type")
    if kind not in KINDS:
        raise ModelFolderError(f"unsupported: peft_type {kind!r}", str(path / ADAPTER), f"{', '.join(KINDS)} can be read")
    for name in _UNSUPPORTED:
        if fields.get(name):
            raise ModelFolderError(f"unsupported: {name} {fields[name]!r}", str(path / ADAPTER), "train it without")
    if fields.get("bias", "none") != "none":
        raise ModelFolderError(f"unsupported: bias {fields['bias']!r}", str(path / ADAPTER), "train it without")
    if not (path / ADAPTER_WEIGHTS).exists() and (path / PICKLED).exists():
        fix = "save it with peft: model.save_pretrained(folder)"
        raise ModelFolderError(f"safetensors only, not pickled weights such as {PICKLED}", str(path), fix)
    stored = {name: tensor for name, tensor in tensors_in(path, ADAPTER_WEIGHTS).items() if ".base_layer." not in name}
    if not stored:
        raise ModelFolderError(f"there is nothing in {ADAPTER_WEIGHTS}", str(path), "the adapter is damaged")
    return Settings(path, fields, stored)


def tuning_of(settings: Settings, base: Table, dtype: Any = jnp.float32) -> OnWeights:
    """The adapter that a folder holds, for a base of this table. Raises ModelFolderError where it does not fit."""
    if settings.fields["peft_type"] in peft_virtual.KINDS:
        return peft_virtual.tuning_of(str(settings.folder), settings.fields, base, dtype)
    fields, modules = settings.fields, {_module_of(name) for name in settings.stored}
    known = {name.removesuffix(".weight"): path for name, path, _ in base.hf_tensors()}
    if strangers := sorted(modules - set(known)):
        what = f"the adapter is of another model, this one has no {strangers[0]}"
        raise ModelFolderError(what, str(settings.folder), f"use its own base, {settings.base}")
    paths = tuple(path for path in base.params if path in {known[name] for name in modules})
    if fields["peft_type"] == "IA3":
        return OnWeights(base, paths, IA3(), dtype)
    if fields["peft_type"] == "ADALORA":
        return OnWeights(base, paths, peft_adalora.kind_of(str(settings.folder), fields), dtype)
    return OnWeights(base, paths, _lora(settings), dtype)


def _lora(settings: Settings) -> Lora:
    fields = settings.fields
    numbers = {name: fields.get(name) for name in ("r", "lora_alpha")}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 16:
            raise ModelFolderError(f"{name} is {value!r}", str(settings.folder / ADAPTER), "the file is damaged")
    rank, alpha = int(fields["r"]), float(fields["lora_alpha"])
    ranks = tuple((key, int(value)) for key, value in _pattern(settings, "rank_pattern").items())
    patterns = {"rank_pattern": ranks, "alpha_pattern": tuple(_pattern(settings, "alpha_pattern").items())}
    made = Lora(rank, alpha, 0.0, bool(fields.get("use_rslora")), bool(fields.get("use_dora")), **patterns)
    for name, tensor in settings.stored.items():
        wanted, inside = made.rank_of(_module_of(name)), "_A" in name.split("lora")[-1]
        if inside and tensor.shape[:1] != (wanted,):
            what = f"the rank is {wanted} in {ADAPTER}, and {tensor.shape[0] if tensor.shape else 0} in {ADAPTER_WEIGHTS}"
            raise ModelFolderError(what, str(settings.folder), "the files do not belong together")
    return made


def check_same(settings: Settings, wanted: OnWeights) -> None:
    """Raises ConfigError unless a configuration's adapter is the one in the folder, so that it can go on from there."""
    found = tuning_of(settings, wanted.base)
    if type(found.kind) is not type(wanted.kind):
        what = f"the adapter is {settings.fields['peft_type']}, not {type(wanted.kind).__name__}"
        raise ConfigError(what, str(settings.folder), "set adapter.kind to its own")
    for name, field in OWN.get(type(wanted.kind), {}).items():
        theirs, ours = getattr(found.kind, field), getattr(wanted.kind, field)
        if theirs != ours:
            ours, theirs = (_shown(value) for value in (ours, theirs))
            what = f"adapter.{name} is {ours}, but that of the adapter is {theirs}"
            raise ConfigError(what, str(settings.folder), f"set adapter.{name}={theirs}")
    if found.targets != wanted.targets:
        names = ", ".join(dict.fromkeys(module(found.base, path) for path in found.targets))
        raise ConfigError(
            f"adapter.targets are not those of the adapter, {names}", str(settings.folder), f"set adapter.targets=[{names}]"
        )


def _shown(value: Any) -> str:
    """As it is written in a config."""
    if isinstance(value, tuple):
        return "{" + ", ".join(f"{key}: {found:g}" for key, found in value) + "}"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def read(settings: Settings, tuning: OnWeights) -> Tree:
    """The values of an adapter, float32, for `tuning_of` or one that `check_same` has passed.

    Raises ModelFolderError for tensors that are missing, not finite or of another shape than the base asks for.
    """
    if tuning.virtual_tokens:
        return peft_virtual.read(str(settings.folder), settings.stored, tuning)
    table, kind = tuning.table, tuning.kind
    tree: Tree = {}
    for path, param in table.params.items():  # what a layer without a tensor has changes nothing, and zeros learn nothing
        tree = put(tree, path, np.full(table.shape(path), param.init == "ones", np.float32))
    given = set(settings.stored)
    for name, path, number in table.hf_tensors():
        if name not in given:
            continue
        given.remove(name)
        value = _fitting(settings, settings.stored[name], table, path)
        leaf = get(tree, path)
        leaf[() if number is None else number] = from_hf(table, table.params[path], value)
    if given:
        raise ModelFolderError(f"unexpected tensor {sorted(given)[0]}", str(settings.folder), "the adapter is of another kind")
    gaps = [name for name, _, _ in table.hf_tensors() if name not in settings.stored]
    if gaps and getattr(kind, "dora", False):
        raise ModelFolderError(f"{gaps[0]} is missing", str(settings.folder), "it is read for all layers or none")
    return tree


def _fitting(settings: Settings, tensor: Stored, table: Table, path: str) -> np.ndarray:
    """A tensor with its rank filled up to the table's."""
    wanted, param = table.hf_shape(table.params[path]), table.params[path]
    ranks = [index for index, group in enumerate(param.layout.replace("(", "").replace(")", "").split()) if group == "R"]
    axis = None if not ranks else 0 if param.layout.startswith("R ") else len(wanted) - 1
    same = len(tensor.shape) == len(wanted) and all(
        have == want or (i == axis and have < want) for i, (have, want) in enumerate(zip(tensor.shape, wanted, strict=True))
    )
    if not same or tensor.dtype not in DTYPES:
        what = f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, this model and rank need {list(wanted)}"
        raise ModelFolderError(what, str(settings.folder), f"use the adapter's own base, {settings.base}")
    value = np.asarray(tensor.open(), np.float32)
    if not np.isfinite(value).all():
        raise ModelFolderError(f"{tensor.name} holds NaN or Inf", str(settings.folder), "the adapter is damaged")
    return np.pad(value, [(0, want - have) for have, want in zip(value.shape, wanted, strict=True)])


def _pattern(settings: Settings, field: str) -> dict[str, Any]:
    """rank_pattern or alpha_pattern; peft takes regular expressions, of which only plain names are read here."""
    found = settings.fields.get(field) or {}
    fine = isinstance(found, dict) and all(
        _PLAIN.fullmatch(key) and isinstance(value, int | float) and value > 0 for key, value in found.items()
    )
    if not fine:
        what = f"unsupported: {field} {str(found)[:80]}"
        raise ModelFolderError(what, str(settings.folder / ADAPTER), "name whole modules, such as q_proj")
    return found


def _module_of(name: str) -> str:
    """model.layers.0.self_attn.q_proj, of the name of a tensor in an adapter."""
    return re.split(r"\.lora_|\.ia3_l", name.removeprefix(PREFIX))[0]


def write(
    tuning: OnWeights,
    params: Tree,
    frozen: Tree,
    out: str | Path,
    *,
    base_name: str,
    tokenizer: Tokenizer | None = None,
    card: str = "",
    steps: int = 0,
    force: bool = False,
) -> Path:
    """Writes the adapter as peft does, float32, with the tokenizer's files; `base_name` is what peft will load it onto, and
    `steps` are those of the run.

    Of several processes the first writes; all of them hand over their parts. Raises as `maxi.hf.write` does.
    """
    if isinstance(tuning, FromNetwork):
        tuning, params = tuning.plain, jax.jit(tuning.given)(params)
    params, start = jax.tree.map(fetch, (params, frozen.get(START)))
    if not processes.is_first():
        processes.barrier()
        return Path(out).expanduser().resolve()
    out = check_target(out, force)
    if tuning.keeps_start:
        tuning, params = _doubled(tuning, params, start)
    found = peft_virtual.tensors(tuning, params) if tuning.virtual_tokens else _tensors(tuning, params)
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise NumericsError(f"{name} holds NaN or Inf", base_name, "export an earlier checkpoint")
    own: dict[str, Any] = {}
    if isinstance(tuning.kind, AdaLora):
        found, pattern = peft_adalora.without_idle(found)
        own = peft_adalora.fields(tuning, steps, pattern)
    with in_place_of(out, "the adapter") as hidden:
        save_file(found, hidden / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(hidden / ADAPTER, _fields(tuning, base_name) | own)
        if tokenizer is not None:
            tokenizer.save(hidden)
        (hidden / "README.md").write_text(_card(out.name, base_name) + card, "utf-8", newline="\n")
    processes.barrier()
    return out


def _tensors(tuning: OnWeights, params: Tree) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, path, number in tuning.table.hf_tensors():
        leaf = get(params, path)
        value = np.asarray(leaf if number is None else leaf[number], np.float32)
        found[name] = np.ascontiguousarray(_cut(tuning, name, path, to_hf(tuning.table.params[path], value)))
    return found


def _cut(tuning: OnWeights, name: str, path: str, value: np.ndarray) -> np.ndarray:
    """A tensor in peft's layout without the zeros that its rank was filled up with."""
    if type(tuning.kind) is not Lora or path.endswith(".m"):
        return value
    rank = tuning.kind.rank_of(_module_of(name))
    return value[:rank] if path.endswith(".a") else value[:, :rank]


def _doubled(tuning: OnWeights, params: Tree, start: Tree) -> tuple[OnWeights, Tree]:
    """PiSSA's change, less what it started from, as LoRA of twice the rank on the base as it is."""
    kind = tuning.kind
    assert isinstance(kind, Lora)
    alpha = kind.scale * ((2 * kind.rank) ** 0.5 if kind.rslora else 2 * kind.rank)
    wide = replace(tuning, kind=replace(kind, rank=2 * kind.rank, alpha=alpha, init="default"))
    tree: Tree = {}
    for path, param in wide.table.params.items():
        new, old = np.asarray(get(params, path)), np.asarray(get(start, path))
        tree = put(tree, path, np.concatenate([new, -old if path.endswith(".b") else old], param.dims.index("R")))
    return wide, tree


def _fields(tuning: OnWeights, base_name: str) -> dict[str, Any]:
    """adapter_config.json."""
    kind, modules = tuning.kind, list(dict.fromkeys(module(tuning.base, path) for path in tuning.targets))
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True}
    shared |= {"modules_to_save": None, "revision": None}
    if tuning.virtual_tokens:
        return peft_virtual.fields(tuning, shared)
    shared |= {"target_modules": modules, "fan_in_fan_out": False}
    if isinstance(kind, IA3):
        into = [name for name in modules if name == FEEDFORWARD]
        return {"peft_type": "IA3", **shared, "feedforward_modules": into, "init_ia3_weights": True}
    assert isinstance(kind, Lora)
    return {
        "peft_type": "LORA",
        **shared,
        "r": kind.rank,
        "lora_alpha": int(kind.alpha) if kind.alpha == int(kind.alpha) else kind.alpha,
        "lora_dropout": kind.dropout,
        "use_rslora": kind.rslora,
        "use_dora": kind.dora,
        "rank_pattern": dict(kind.rank_pattern),
        "alpha_pattern": dict(kind.alpha_pattern),
        "bias": "none",
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
    }


def _card(name: str, base_name: str) -> str:
    return f"""---
library_name: peft
base_model: {base_name}
tags:
- maxi
---

# {name}

An adapter of {base_name}. Written by maxi, a JAX trainer.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base_name}"), "{name}")
```
"""
