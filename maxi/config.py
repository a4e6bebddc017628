"""YAML to typed, frozen dataclasses, checked before anything is compiled.

Contract: `load(path, overrides)` returns a `Config` or raises `ConfigError` naming the key, the line and the fix.
`yaml_file.py` reads the file; pydantic checks types and ranges strictly. What a combination of keys means (does the
batch fit the mesh?) is decided where the other half is known: `mesh.py`, `train.py`. Only entry files name `Config`;
everything below takes its own section.
"""

import dataclasses
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML

from maxi.errors import ConfigError
from maxi.yaml_file import read_text, read_yaml

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Axis = Annotated[int, Field(ge=-1)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """Which model, and where its first weights come from."""

    init_from: str | None = None
    """A Hugging Face folder or a run folder whose weights (and tokenizer, unless named) to start from."""
    config: str | dict[str, Any] | None = None
    """A Hugging Face config.json (path), or its fields inline; with init_from, fields to change in its config."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Source:
    """One place documents come from."""

    path: str
    """A .txt, .json(l) or .parquet file (or .gz, .zst), a folder, a glob, a dataset saved on disk, hf://name, python-docs."""
    weight: Positive = 1.0
    """Share of rows drawn from this source, relative to the others."""
    field: str = "text"
    """The column or JSON field that holds the text."""


Sources = tuple[Source, ...]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """What the model reads."""

    train: Sources = ()
    """Training sources, a list of {path, weight, field}."""
    eval: Sources = ()
    """Evaluation sources; never trained on as long as their documents are not in train."""
    eval_share: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of training documents, chosen by the hash of their text, that is held out for evaluation instead."""
    across_documents: bool = False
    """Let attention (and positions) run on across the documents packed into one row."""
    cache_dir: str | None = None
    """Where tokenised rows are kept; default: maxi/rows under $XDG_CACHE_HOME or ~/.cache."""
    workers: Natural = 1
    """Processes that tokenise, each with threads on all cores: more pay where reading is the slow part; 0: one per core."""
    skip_bad: Natural = 0
    """How many unreadable records to skip (each is counted) before giving up."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ObjectiveConfig:
    """What is learned. `objective: pretrain` is short for `objective: {name: pretrain}`."""

    name: Literal["pretrain"] = "pretrain"
    """pretrain: predict the next token of every document."""
    z_loss: NonNegative = 0.0
    """Weight of the squared log-normaliser (PaLM, arXiv:2204.02311, section 5), which keeps logits small."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimConfig:
    """How the weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for matrices inside the layers, with adamw for the rest."""
    lr: NonNegative = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd: constant, then linear decay over the last decay_ratio of the steps."""
    warmup_steps: Natural | None = None
    """Steps of linear warm-up from 0."""
    warmup_ratio: Share | None = None
    """The same as a share of all steps; give one of the two (neither: no warm-up)."""
    min_lr_ratio: Share = 0.0
    """Final learning rate over the peak, for cosine, linear and wsd."""
    decay_ratio: Share = 0.2
    """wsd: the share of all steps that decays."""
    b1: Beta = 0.9
    """Decay of adamw's first moment; muon's own momentum is always 0.95."""
    b2: Beta = 0.95
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay; norms and biases never decay."""
    decay_embeddings: bool = True
    """Whether embeddings (and an untied head) decay."""
    clip_norm: NonNegative = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    ema: Beta = 0.0
    """Decay of an exponential moving average of the weights, used for evaluation and export; 0: none."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MeshConfig:
    """How devices are arranged; one axis may be -1, which takes what the others leave."""

    replica: Axis = 1
    """Whole copies of the model, gradients averaged between them."""
    fsdp: Axis = -1
    """Weights, gradients and optimizer state split over this many devices, and the batch with them."""
    tensor: Axis = 1
    """Heads, intermediate_size and vocabulary split over this many devices."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ComputeConfig:
    """How the step is computed; none of it changes what is learned beyond rounding."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations and matmul operands; auto: bfloat16 on accelerators, float32 on CPU. Masters stay float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matmuls, or every layer whole."""
    layers: Literal["auto", "scan", "unroll"] = "auto"
    """Compile one layer and scan it, or every layer by itself; auto: unroll up to 12 layers on CPU, else scan."""
    attention: Literal["auto", "reference", "blockwise"] = "auto"
    """Attention kernel of training and evaluation; auto takes the first that can run here and says why."""
    head: Literal["auto", "full", "chunked"] = "auto"
    """Whether all logits of a micro-batch are held at once; auto decides by their size."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointConfig:
    """What is saved on the way."""

    every: Count = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = 2
    """How many of the newest to keep."""
    background: bool = True
    """Write while training goes on."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvalConfig:
    """What is measured on the way; the first and the last step are always evaluated."""

    every: Count = 500
    """Steps between evaluations."""
    max_rows: Count = 512
    """At most this many rows of seq_len per evaluation, always the same ones."""
    prompts: tuple[str, ...] = ()
    """Texts that are continued greedily at every evaluation."""
    max_new_tokens: Count = 48
    """Length of those continuations."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LogConfig:
    """What is written down."""

    every: Count = 10
    """Steps between lines in metrics.jsonl, on the terminal and in TensorBoard; each tells of its step alone."""
    to: tuple[Literal["wandb", "trackio"], ...] = ()
    """Trackers beside TensorBoard; each needs the extra of its name."""
    project: str = "maxi"
    """Project name at those trackers."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """One run. The resolved form is kept in the run folder as config.yaml."""

    run_dir: str
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
    tokenizer: str | None = None
    """A folder with a tokenizer; default: the one of model.init_from."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    compute: ComputeConfig = Field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    export_hf: bool = True
    """Write the Hugging Face folder hf/ into the run at the end."""
    export_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the exported weights."""


_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


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
    if isinstance(tree.get("objective"), str):
        tree["objective"] = {"name": tree["objective"]}
    try:
        config = _ADAPTER.validate_json(json.dumps(tree, default=str))  # strict JSON: mappings and lists, no other coercion
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
        default = "required" if info.is_required() else _show(info.get_default(call_default_factory=True))
        yield name, default, info.description or ""
        if info.annotation == tuple[Source, ...]:
            yield from ((f"{name}[].{n}", d, t) for n, d, t in _document(Source, "") if field.name == "train")


def _show(value: Any) -> str:
    return "[]" if value == () else "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


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
            elif part == "objective" and isinstance(node[part], str):
                node[part] = {"name": node[part]}
            node = node[part]
        else:
            node = node[_index(node, part, where)]
    if isinstance(node, dict):
        node[last] = value
    else:
        node[_index(node, last, where)] = value


def _index(node: Any, part: str, where: str) -> int:
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return int(part)
    raise ConfigError(f"there is nothing at {part!r}", where, "name an existing key or list index")


def _explain(error: ValidationError, where: str) -> ConfigError:
    """The first of pydantic's findings, as one line."""
    found = error.errors(include_url=False)
    first = next((e for e in found if e["type"] == "unexpected_keyword_argument"), found[0])
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    if first["type"] == "unexpected_keyword_argument":
        known = [name for name, _, _ in documentation()] + [f.name for f in dataclasses.fields(Config)]
        close = difflib.get_close_matches(key, known, 1, 0.5) or [n for n in known if n.split(".")[-1] == key.split(".")[-1]]
        fix = f"did you mean {close[0]!r}?" if close else "`maxi config --help` lists every key"
        return ConfigError(f"unknown key {key!r}{more}", where, fix)
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return ConfigError(f"the key {key!r} is missing{more}", where, f"add {key.split('.')[-1]}: ...")
    given = first["input"]
    got = f"{given!r} ({type(given).__name__})" if not isinstance(given, dict | list) else f"a {type(given).__name__}"
    return ConfigError(f"{key}: {first['msg']}, not {got[:80]}{more}", where, f"`maxi config --help` describes {key}")


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
    optim = config.optim
    if optim.warmup_steps is not None and optim.warmup_ratio is not None:
        refuse("optim.warmup_steps and optim.warmup_ratio are both given", "keep one")
    if config.steps is not None and (optim.warmup_steps or 0) > config.steps:
        refuse(f"optim.warmup_steps {optim.warmup_steps} is over steps {config.steps}", "lower it")
    if sum(axis == -1 for axis in (config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)) > 1:
        refuse("more than one mesh axis is -1", "give all but one of mesh.replica, mesh.fsdp, mesh.tensor")
    if 0 in (config.mesh.replica, config.mesh.fsdp, config.mesh.tensor):
        refuse("a mesh axis is 0", "use 1 for an axis that is not split, -1 for the rest of the devices")
