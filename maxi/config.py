"""YAML to one typed, frozen `Config`, checked before anything is compiled.

Contract: `load(path, overrides)` returns a `Config` or raises `ConfigError` naming the key, the line and the fix.
`yaml_file.py` reads the file; pydantic checks types and ranges strictly. What a combination of keys means (does the
batch fit the mesh?) is decided where the other half is known: `mesh.py`, `train.py`. Only entry files name `Config`;
everything below takes its own section, from `sections.py`.
"""

import dataclasses
import difflib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML

from maxi.dims import MESH_AXES
from maxi.errors import ConfigError
from maxi.sections import (
    STRICT,
    AdaLoraConfig,
    AdapterConfig,
    ChatConfig,
    CheckpointConfig,
    ComputeConfig,
    Count,
    DataConfig,
    DPOConfig,
    EvalConfig,
    FullConfig,
    KTOConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    Natural,
    ObjectiveConfig,
    OptimConfig,
    PathText,
    Positive,
    PrefixConfig,
    PretrainConfig,
    ProcessesConfig,
    PromptConfig,
    Source,
)
from maxi.yaml_file import read_text, read_yaml


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """One run. The resolved form is kept in the run folder as config.yaml."""

    run_dir: PathText
    """The folder that holds all state of the run; the same command again resumes it."""
    seed: Natural = 0
    """Seed of the first weights and of the order of the data."""
    steps: Count | None = None
    """Optimizer steps; or give epochs."""
    epochs: Positive | None = None
    """Passes over the training rows; or give steps."""
    batch_size: Count = 32
    """Sequences per optimizer step, over all devices and micro-batches."""
    seq_len: Count = 1024
    """Tokens per sequence."""
    micro_batches: Count = 1
    """Parts a batch is computed in, gradients summed in float32; exact, saves memory."""
    tokenizer: PathText | None = None
    """A folder with a tokenizer; default: the one of model.init_from."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    chat: ChatConfig = Field(default_factory=ChatConfig)
    objective: ObjectiveConfig = Field(default_factory=PretrainConfig)
    adapter: AdapterConfig = Field(default_factory=FullConfig)
    freeze: tuple[str, ...] = ()
    """Without an adapter: which weights stay, by their Hugging Face names, e.g. ["*", "!*norm*"]; the last pattern that matches
    decides, one that begins with ! frees."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    processes: ProcessesConfig = Field(default_factory=ProcessesConfig)
    compute: ComputeConfig = Field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    export_hf: bool = True
    """Write the Hugging Face folder hf/ into the run at the end."""
    export_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the exported weights."""


_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)

KINDS = {"objective": ("name", "pretrain"), "adapter": ("kind", "none")}
"""Sections of several kinds -> the key that says which, and the default. The section may be just that word."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `dotted.key=value` overrides (values are YAML too).

    Raises ConfigError for a missing, oversized, non-UTF-8 or malformed file, an unknown key (naming the closest),
    a wrong type or range.
    """
    tree = read_yaml(read_text(Path(path)), str(path))
    if not isinstance(tree, dict):
        what = "the config is empty" if tree is None else f"the config is a {type(tree).__name__}, not a mapping"
        raise ConfigError(what, str(path), "write keys such as run_dir: runs/first")
    for override in overrides:
        _apply_override(tree, override)
    return from_tree(tree, str(path))


def from_tree(tree: dict[str, Any], where: str) -> Config:
    """A `Config` from plain dicts and lists; `where` names their origin in errors. Raises ConfigError."""
    tree = dict(tree)
    for section, (key, default) in KINDS.items():
        if isinstance(tree.get(section), str):
            tree[section] = {key: tree[section]}
        elif isinstance(tree.get(section), dict):
            tree[section] = {key: default, **tree[section]}
    try:
        text = json.dumps(tree, default=str)  # strict JSON: mappings and lists, no other coercion
    except (TypeError, ValueError) as error:  # a key that is a list, a number of thousands of digits
        raise ConfigError(f"the config is nothing that JSON could hold, {str(error)[:80]}", where, "write plain keys") from None
    try:
        config = _ADAPTER.validate_json(text)
    except ValidationError as error:
        raise _explain(error, where) from None
    _check_together(config, where)
    return config


def to_tree(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars: the inverse of `from_tree`."""
    return _ADAPTER.dump_python(config, mode="json")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal `Config`."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 4096
    out = io.StringIO()
    yaml.dump(to_tree(config), out)
    return out.getvalue()


def documentation() -> list[tuple[str, str, str]]:
    """Every key as (dotted name, default, description), in the order of the dataclasses."""
    return list(_document(Config, ""))


def _document(cls: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    fields = cls.__pydantic_fields__
    for field in dataclasses.fields(cls):
        info, name = fields[field.name], prefix + field.name
        section = info.annotation
        if dataclasses.is_dataclass(section):
            yield from _document(section, name + ".")
            continue
        if info.discriminator:
            yield from _document_kinds(get_args(section), name, str(info.discriminator))
            continue
        default = "required" if info.is_required() else _show(info.get_default(call_default_factory=True))
        yield name, default, info.description or ""
        if info.annotation == tuple[Source, ...]:
            yield from ((f"{name}[].{n}", d, t) for n, d, t in _document(Source, "") if field.name == "train")


def _document_kinds(kinds: Sequence[Any], prefix: str, said_by: str) -> Iterator[tuple[str, str, str]]:
    """Each key of several classes once, saying which of them have it; the first is the default."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for kind in kinds:
        own = kind.__pydantic_fields__[said_by].get_default()
        for key, default, text in _document(kind, prefix + "."):
            if key != f"{prefix}.{said_by}":
                found.setdefault((key, default, text), []).append(own)
    names = [f"{kind.__pydantic_fields__[said_by].get_default()}: {kind.__doc__}" for kind in kinds]
    yield f"{prefix}.{said_by}", kinds[0].__pydantic_fields__[said_by].get_default(), " ".join(names)
    for (key, default, text), owners in found.items():
        yield key, default, f"({', '.join(owners)}) {text}"


def _show(value: Any) -> str:
    return (
        "{}"
        if value == {}
        else "[]"
        if value == ()
        else "none"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"cannot read the override {override!r}", "command line", "write dotted.key=value")
    value, where = read_yaml(text, f"override {key}"), f"override {override}"
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            elif node is tree and part in KINDS and isinstance(node[part], str):
                node[part] = {KINDS[part][0]: node[part]}
            node = node[part]
        else:
            node = node[_index(node, part, where)]
    if isinstance(node, dict):
        node[last] = value
    else:
        node[_index(node, last, where)] = value


def _index(node: Any, part: str, where: str) -> int:
    if isinstance(node, list) and part.isascii() and part.isdigit() and len(part) < 10 and int(part) < len(node):
        return int(part)
    raise ConfigError(f"there is nothing at {part!r}", where, "name an existing key or list index")


def _explain(error: ValidationError, where: str) -> ConfigError:
    """The first of pydantic's findings, as one line."""
    found = error.errors(include_url=False)
    first = next((e for e in found if e["type"] == "unexpected_keyword_argument"), found[0])
    loc = list(first["loc"])
    if len(loc) > 2 and loc[0] in KINDS:
        del loc[1]  # which of the kinds pydantic was reading
    key = ".".join(str(part) for part in loc)
    if first["type"] == "json_invalid":  # YAML can spell half surrogate pairs, which no file can hold
        return ConfigError("a text in the config is not UTF-8", where, "write its characters out")
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    if first["type"] == "unexpected_keyword_argument":
        known = [name for name, _, _ in documentation()] + [f.name for f in dataclasses.fields(Config)]
        close = difflib.get_close_matches(key, known, 1, 0.5) or [n for n in known if n.split(".")[-1] == key.split(".")[-1]]
        fix = f"did you mean {close[0]!r}?" if close else "`maxi config --help` lists every key"
        return ConfigError(f"unknown key {key!r}{more}", where, fix)
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return ConfigError(f"the key {key!r} is missing{more}", where, f"add {key.split('.')[-1]}: ...")
    if first["type"] == "union_tag_invalid":
        found = first.get("ctx", {})
        what = f"{key}.{KINDS[key][0]}: there is no {found.get('tag')!r}"
        return ConfigError(what, where, f"use one of {found.get('expected_tags')}")
    given = first["input"]
    got = f"{given!r} ({type(given).__name__})" if not isinstance(given, dict | list) else f"a {type(given).__name__}"
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{key}: {message}, not {got[:80]}{more}", where, f"`maxi config --help` describes {key}")


def _check_together(config: Config, where: str) -> None:
    """Rules between keys that need nothing but the config."""

    def refuse(what: str, fix: str) -> None:
        raise ConfigError(what, where, fix)

    if (config.steps is None) == (config.epochs is None):
        refuse("give either steps or epochs" + (", not both" if config.steps else ""), "e.g. steps: 1000")
    if config.batch_size % config.micro_batches:
        refuse(
            f"batch_size {config.batch_size} does not divide into {config.micro_batches} micro_batches", "change one of them"
        )
    if config.model.init_from is None and config.model.config is None:
        refuse("there is no model", "give model.init_from (a folder) or model.config (config.json or its fields)")
    if config.tokenizer is None and config.model.init_from is None:
        refuse("there is no tokenizer", "give tokenizer: FOLDER (`maxi tokenizer` trains one)")
    if not config.data.train:
        refuse("data.train is empty", "give data.train: [{path: FILE}]")
    _check_objective(config, refuse)
    _check_adapter(config, refuse)
    optim = config.optim
    if optim.warmup_steps is not None and optim.warmup_ratio is not None:
        refuse("optim.warmup_steps and optim.warmup_ratio are both given", "keep one")
    if config.steps is not None and (optim.warmup_steps or 0) > config.steps:
        refuse(f"optim.warmup_steps {optim.warmup_steps} is over steps {config.steps}", "lower it")
    axes = [getattr(config.mesh, axis) for axis in MESH_AXES]
    if axes.count(-1) > 1:
        refuse("more than one mesh axis is -1", f"give all but one of {', '.join(f'mesh.{axis}' for axis in MESH_AXES)}")
    if 0 in axes:
        refuse("a mesh axis is 0", "use 1 for an axis that is not split, -1 for the rest of the devices")


def _check_objective(config: Config, refuse: Callable[[str, str], None]) -> None:
    objective, chat = config.objective, config.chat
    if isinstance(objective, DPOConfig):
        if objective.loss_weights is not None and len(objective.loss_weights) != len(objective.loss_type):
            refuse("objective.loss_weights and objective.loss_type differ in length", "give one weight a loss")
        if "exo_pair" in objective.loss_type and not objective.label_smoothing:
            refuse("exo_pair needs objective.label_smoothing above 0", "set it to 0.001 or so")
    if config.model.reference and not isinstance(objective, DPOConfig | KTOConfig):
        refuse(f"model.reference has no meaning for {objective.name}", "remove it, or set objective: dpo")
    if chat.train_on_prompt and objective.name != "sft":
        refuse(f"chat.train_on_prompt has no meaning for {objective.name}", "remove it, or set objective: sft")
    if chat.system_prompts and chat.system_by is None:
        refuse("chat.system_prompts needs the column that picks from it", "set chat.system_by")


def _check_adapter(config: Config, refuse: Callable[[str, str], None]) -> None:
    adapter = config.adapter
    if config.model.init_from is None and (config.freeze or adapter.kind != "none"):
        refuse("there is no base to keep", "set model.init_from, or leave out adapter and freeze")
    if adapter.kind == "none":
        return
    if config.freeze:
        refuse("freeze has no meaning beside an adapter, which freezes all weights", "remove one of them")
    if isinstance(adapter, AdaLoraConfig) and adapter.target_r >= adapter.init_r:
        refuse(f"adapter.target_r {adapter.target_r} is not below adapter.init_r {adapter.init_r}", "lower it")
    if isinstance(adapter, AdaLoraConfig) and config.steps and adapter.tinit + adapter.tfinal >= config.steps:
        what = f"steps {config.steps} leave none between adapter.tinit {adapter.tinit} and adapter.tfinal {adapter.tfinal}"
        refuse(what, "lower them, or raise steps")
    if isinstance(adapter, PromptConfig | PrefixConfig):
        _check_virtual(config, adapter.virtual_tokens, refuse)
    if isinstance(adapter, PrefixConfig) and adapter.projection and adapter.init_from:
        refuse("adapter.init_from holds what a network gave, and not the network", "set adapter.projection to false")
    if isinstance(adapter, PrefixConfig) and adapter.encoder_hidden_size and not adapter.projection:
        refuse("adapter.encoder_hidden_size is that of a network", "set adapter.projection, or leave it out")
    if isinstance(adapter, PromptConfig) and (adapter.init == "text") != (adapter.init_text is not None):
        refuse("adapter.init text and adapter.init_text go together", "give both or neither")
    if isinstance(adapter, LoraConfig) and adapter.init == "pissa":
        if adapter.rank_pattern or adapter.alpha_pattern:
            refuse("adapter.init pissa has one rank and one alpha", "remove adapter.rank_pattern and adapter.alpha_pattern")
        if adapter.quantise != "none":
            refuse("adapter.init pissa needs the weights as they are", "set adapter.quantise to none")
        if adapter.dora or adapter.init_from:
            refuse(f"adapter.init pissa cannot be had with {'dora' if adapter.dora else 'init_from'}", "remove one of them")


def _check_virtual(config: Config, virtual_tokens: int, refuse: Callable[[str, str], None]) -> None:
    if virtual_tokens + 2 > config.seq_len:
        refuse(f"seq_len {config.seq_len} has no room beside {virtual_tokens} virtual tokens", "raise it")
    if config.data.across_documents:
        refuse("data.across_documents has no meaning with virtual tokens, which begin every document", "remove it")
