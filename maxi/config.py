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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

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
    reference: str | None = None
    """dpo, kto: a folder of that kind whose log-probabilities to compare with; default: the weights the run starts from."""
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
    limit: Count | None = None
    """Read this many documents or rows from its beginning, and no more."""
    fields: dict[str, str] = Field(default_factory=dict)
    """For conversations: what the usual fields are called here, e.g. {question: q, answer: a}; common layouts need none."""


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
class ChatConfig:
    """How conversations become tokens, for every objective but pretrain."""

    template: str | None = None
    """The chat template: chatml (maxi's own) or a .jinja file; default: the tokenizer's own. It goes into the export."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the template, e.g. {enable_thinking: false}."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are learned; a row's own train, weight or loss_weight goes before."""
    train_on_prompt: bool = False
    """Learn all other tokens too (sft only)."""
    too_long: Literal["drop", "truncate_left", "truncate_right"] = "drop"
    """What is over seq_len: drop it, take whole turns from the left of its history, or cut it on the right; counted."""
    max_dropped: Share = 0.05
    """The largest share of rows that may be dropped because nothing of them is left to learn."""
    system: str | None = None
    """A system prompt for rows without one."""
    system_share: Share = 1.0
    """The share of rows without a system prompt that get it, chosen by their hash."""
    system_by: str | None = None
    """A column whose value picks a prompt from system_prompts, for the rows that did not get `system`."""
    system_prompts: dict[str, str] = Field(default_factory=dict)
    """Value of the column system_by -> system prompt."""
    pack: bool = True
    """Several samples in a row, each with attention and positions of its own; false: one sample a row, padded."""
    share_prompt: bool = True
    """Compute the common prompt of a pair once (dpo, kto); false: each answer with its own copy of the prompt."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PretrainConfig:
    """Predict the next token of every document."""

    name: Literal["pretrain"] = "pretrain"
    """What is learned. `objective: dpo` is short for `objective: {name: dpo}`."""
    z_loss: NonNegative = 0.0
    """Weight of the squared log-normaliser (PaLM, arXiv:2204.02311, section 5), which keeps logits small."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SFTConfig:
    """Predict the assistant's turns of every conversation."""

    name: Literal["sft"] = "sft"
    """What is learned."""
    z_loss: NonNegative = 0.0
    """Weight of the squared log-normaliser (PaLM, arXiv:2204.02311, section 5), which keeps logits small."""


DPOLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "simpo",
    "orpo",
]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DPOConfig:
    """Prefer chosen answers to rejected ones."""

    name: Literal["dpo"] = "dpo"
    """What is learned."""
    loss_type: Annotated[tuple[DPOLoss, ...], Field(min_length=1)] = ("sigmoid",)
    """One or more of TRL's: sigmoid (DPO), sigmoid_norm, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard,
    apo_zero, apo_down, discopop, sft; and the reference-free simpo and orpo."""
    loss_weights: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    """Weights of the losses in loss_type; default: 1 each."""
    beta: Positive = 0.1
    """How closely the policy is held to the reference; for ipo its tau, for orpo its lambda."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference is the wrong way round: sigmoid (then cDPO), sigmoid_norm, simpo, robust, exo_pair."""
    rpo_alpha: NonNegative = 0.0
    """Weight of the negative log-likelihood of chosen answers (RPO, arXiv:2404.19733)."""
    simpo_gamma: NonNegative = 0.5
    """simpo: the margin to reach."""
    discopop_tau: Positive = 0.05
    """discopop: the temperature of its blend."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class KTOConfig:
    """Learn from answers labelled good or bad, without pairs."""

    name: Literal["kto"] = "kto"
    """What is learned."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """As TRL names them."""
    beta: Positive = 0.1
    """How closely the policy is held to the reference."""
    desirable_weight: NonNegative = 1.0
    """Weight of answers labelled good."""
    undesirable_weight: NonNegative = 1.0
    """Weight of answers labelled bad."""


ObjectiveConfig = Annotated[PretrainConfig | SFTConfig | DPOConfig | KTOConfig, Field(discriminator="name")]


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
    """Texts that are continued greedily at every evaluation, or answered as a user's turn where conversations are learned."""
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
    chat: ChatConfig = Field(default_factory=ChatConfig)
    objective: ObjectiveConfig = Field(default_factory=PretrainConfig)
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
    elif isinstance(tree.get("objective"), dict):
        tree["objective"] = {"name": "pretrain", **tree["objective"]}
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
        if info.discriminator:
            yield from _document_kinds(get_args(section), name)
            continue
        default = "required" if info.is_required() else _show(info.get_default(call_default_factory=True))
        yield name, default, info.description or ""
        if info.annotation == tuple[Source, ...]:
            yield from ((f"{name}[].{n}", d, t) for n, d, t in _document(Source, "") if field.name == "train")


def _document_kinds(kinds: Sequence[Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Each key of several classes once, saying which of them have it; the first is the default."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for kind in kinds:
        own = kind.__pydantic_fields__["name"].get_default()
        for key, default, text in _document(kind, prefix + "."):
            if key != prefix + ".name":
                found.setdefault((key, default, text), []).append(own)
    names = [f"{kind.__pydantic_fields__['name'].get_default()}: {kind.__doc__}" for kind in kinds]
    yield prefix + ".name", kinds[0].__pydantic_fields__["name"].get_default(), " ".join(names)
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
    loc = list(first["loc"])
    if loc[:1] == ["objective"] and len(loc) > 2:
        del loc[1]  # which of the objectives pydantic was reading
    key = ".".join(str(part) for part in loc)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    if first["type"] == "unexpected_keyword_argument":
        known = [name for name, _, _ in documentation()] + [f.name for f in dataclasses.fields(Config)]
        close = difflib.get_close_matches(key, known, 1, 0.5) or [n for n in known if n.split(".")[-1] == key.split(".")[-1]]
        fix = f"did you mean {close[0]!r}?" if close else "`maxi config --help` lists every key"
        return ConfigError(f"unknown key {key!r}{more}", where, fix)
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return ConfigError(f"the key {key!r} is missing{more}", where, f"add {key.split('.')[-1]}: ...")
    if first["type"] == "union_tag_invalid":
        what, known = f"{key}.name: there is no objective {first['ctx']['tag']!r}", first["ctx"]["expected_tags"]
        return ConfigError(what, where, f"use one of {known}")
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
    _check_objective(config, refuse)
    optim = config.optim
    if optim.warmup_steps is not None and optim.warmup_ratio is not None:
        refuse("optim.warmup_steps and optim.warmup_ratio are both given", "keep one")
    if config.steps is not None and (optim.warmup_steps or 0) > config.steps:
        refuse(f"optim.warmup_steps {optim.warmup_steps} is over steps {config.steps}", "lower it")
    if sum(axis == -1 for axis in (config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)) > 1:
        refuse("more than one mesh axis is -1", "give all but one of mesh.replica, mesh.fsdp, mesh.tensor")
    if 0 in (config.mesh.replica, config.mesh.fsdp, config.mesh.tensor):
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
