"""The sections of a configuration, as typed, frozen dataclasses; a key's docstring is its documentation.

pydantic checks types and ranges strictly. Whoever needs a section takes it from here; `config.py` puts them together.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from maxi.paths import well_formed

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

PathText = Annotated[str, AfterValidator(well_formed)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Axis = Annotated[int, Field(ge=-1)]
AutoAxis = Axis | Literal["auto"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """Which model, and where its first weights come from."""

    init_from: PathText | None = None
    """A Hugging Face folder or a run folder whose weights (and tokenizer, unless named) to start from."""
    reference: PathText | None = None
    """dpo, kto: a folder of that kind whose log-probabilities to compare with; default: the weights the run starts from."""
    config: PathText | dict[str, Any] | None = None
    """A Hugging Face config.json (path), or its fields inline; with init_from, fields to change in its config."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Source:
    """One place documents come from."""

    path: PathText
    """A .txt, .json(l) or .parquet file (or .gz, .zst), a folder, a glob, a dataset saved on disk, hf://name, python-docs,
    python-docs-preferences."""
    weight: Positive = 1.0
    """Share of rows drawn from this source, relative to the others."""
    field: str = "text"
    """The column or JSON field that holds the text."""
    limit: Count | None = None
    """Read this many documents or rows from its beginning, and no more."""
    fields: dict[str, str] = Field(default_factory=dict)
    """For conversations: what the usual fields are called here, e.g. {question: q, answer: a}; common layouts need none."""


Sources = tuple[Source, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
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
    cache_dir: PathText | None = None
    """Where tokenised rows are kept; default: maxi/rows under $XDG_CACHE_HOME or ~/.cache."""
    workers: Natural = 1
    """Processes that tokenise, each with threads on all cores: more pay where reading is the slow part; 0: one per core."""
    skip_bad: Natural = 0
    """How many unreadable records to skip (each is counted) before giving up."""
    skip_batches: tuple[tuple[Natural, Count], ...] = ()
    """Batches never to train on, as [first, how many], the first of all being 0; `--rewind` adds to those of its run."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PretrainConfig:
    """Predict the next token of every document."""

    name: Literal["pretrain"] = "pretrain"
    """What is learned. `objective: dpo` is short for `objective: {name: dpo}`."""
    z_loss: NonNegative = 0.0
    """Weight of the squared log-normaliser (PaLM, arXiv:2204.02311, section 5), which keeps logits small."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FullConfig:
    """No adapter: the weights themselves are trained."""

    kind: Literal["none"] = "none"
    """What is learned beside the weights, which then stay. `adapter: lora` is short for `adapter: {kind: lora}`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Low-rank changes of weights."""

    kind: Literal["lora"] = "lora"
    """What is learned beside the weights."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """The rank of each change."""
    alpha: Positive = 32.0
    """Changes are scaled by alpha / rank."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=4096)]] = Field(default_factory=dict)
    """Ranks of their own: name (q_proj, or layers.3.self_attn.q_proj) -> rank; the first name that fits decides."""
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    """The same for alpha."""
    targets: str | Annotated[tuple[str, ...], Field(min_length=1)] = "all"
    """Which weights: all (every projection of the layers), or a list such as [q_proj, v_proj, embed_tokens, lm_head]."""
    dropout: Beta = 0.0
    """The share of inputs to the change that a training step zeroes."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Learn each output's length beside its direction (DoRA, arXiv:2402.09353)."""
    lr_ratio: Positive = 1.0
    """The learning rate of B over that of A (LoRA+, arXiv:2402.12354); 16 is usual there."""
    init: Literal["default", "pissa"] = "default"
    """First values: random and zero; or of the largest singular values of the weight (PiSSA, arXiv:2404.02948)."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """How the frozen projections are kept: as they are computed with, in 8 or in 4 bits (QLoRA, arXiv:2305.14314)."""
    init_from: str | None = None
    """A folder with an adapter that peft or maxi wrote, to go on from; rank, alpha, targets and the like must be its own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaLoraConfig:
    """Low-rank changes whose ranks go where they matter (AdaLoRA, arXiv:2303.10512)."""

    kind: Literal["adalora"] = "adalora"
    """What is learned beside the weights."""
    init_r: Annotated[int, Field(ge=1, le=4096)] = 12
    """The rank of each change at the beginning; half as much again as target_r is usual."""
    target_r: Count = 8
    """The mean rank at the end."""
    alpha: Positive = 32.0
    """Changes are scaled by alpha / init_r."""
    targets: str | Annotated[tuple[str, ...], Field(min_length=1)] = "all"
    """Which projections: all, or a list such as [q_proj, v_proj]."""
    dropout: Beta = 0.0
    """The share of inputs to the change that a training step zeroes."""
    tinit: Natural = 0
    """Steps before ranks begin to fall."""
    tfinal: Natural = 0
    """Steps at the end in which ranks stay."""
    delta_t: Count = 1
    """Steps between two allocations of ranks."""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of a number's sensitivity."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of how much that varies."""
    orth_reg_weight: NonNegative = 0.5
    """Weight of the term that holds the vectors of a change orthogonal; it is not in the losses that are shown."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """How the frozen projections are kept: as they are computed with, in 8 or in 4 bits (QLoRA, arXiv:2305.14314)."""
    init_from: str | None = None
    """A folder with an adapter that peft or maxi wrote, to go on from; init_r, alpha and targets must be its own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class IA3Config:
    """Factors on what projections give (IA3, arXiv:2205.05638)."""

    kind: Literal["ia3"] = "ia3"
    """What is learned beside the weights."""
    targets: str | Annotated[tuple[str, ...], Field(min_length=1)] = ("k_proj", "v_proj", "down_proj")
    """Which projections: all, or a list; of down_proj the inputs are scaled."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """How the frozen projections are kept: as they are computed with, in 8 or in 4 bits (QLoRA, arXiv:2305.14314)."""
    init_from: str | None = None
    """A folder with an adapter that peft or maxi wrote, to go on from; targets must be its own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PromptConfig:
    """Embeddings before every document (prompt tuning, arXiv:2104.08691)."""

    kind: Literal["prompt"] = "prompt"
    """What is learned beside the weights."""
    virtual_tokens: Count = 20
    """How many, before every document or conversation; they take their places from seq_len."""
    init: Literal["vocab", "random", "text"] = "vocab"
    """First values: embeddings of tokens drawn from the vocabulary, random numbers, or the embeddings of init_text."""
    init_text: str | None = None
    """The text for init text, from its beginning again where it has fewer tokens."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """How the frozen projections are kept: as they are computed with, in 8 or in 4 bits (QLoRA, arXiv:2305.14314)."""
    init_from: str | None = None
    """A folder with an adapter that peft or maxi wrote, to go on from; virtual_tokens must be its own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrefixConfig:
    """Keys and values before every document, in every layer (prefix tuning, arXiv:2101.00190)."""

    kind: Literal["prefix"] = "prefix"
    """What is learned beside the weights."""
    virtual_tokens: Count = 20
    """How many, before every document or conversation; they take their places from seq_len."""
    init: Literal["random", "zero"] = "random"
    """First values."""
    projection: bool = False
    """Learn a network that gives them, steadier and larger; what it gives is exported, and the network is not."""
    encoder_hidden_size: Count | None = None
    """Its width; default: that of a layer's keys."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """How the frozen projections are kept: as they are computed with, in 8 or in 4 bits (QLoRA, arXiv:2305.14314)."""
    init_from: str | None = None
    """A folder with an adapter that peft or maxi wrote, to go on from; virtual_tokens must be its own."""


AdapterConfig = Annotated[
    FullConfig | LoraConfig | AdaLoraConfig | IA3Config | PromptConfig | PrefixConfig, Field(discriminator="kind")
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
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
    spike_zscore: NonNegative = 0.0
    """Skip a step whose loss is over the mean of the last ones by this many standard deviations, e.g. 6; 0: never."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """How many losses spike_zscore looks back on; nothing is skipped before there are that many."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """How devices are arranged; one axis may be -1, which takes what the others leave."""

    replica: AutoAxis = "auto"
    """Whole copies of the model, gradients added up between them; auto: one a TPU slice or node of GPUs."""
    fsdp: Axis = -1
    """Weights, gradients and optimizer state split over this many devices, and the batch with them."""
    context: AutoAxis = "auto"
    """Every sequence split over this many devices, keys and values travelling between them, for rows too long for one;
    auto: 1 unless a micro-batch has fewer rows than there are devices for them."""
    tensor: Axis = 1
    """Heads, intermediate_size and vocabulary split over this many devices."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProcessesConfig:
    """How several processes of one run wait for each other; which they are, the environment says."""

    start_timeout_s: Count = 1800
    """Seconds that the first to come waits for the last; machines of a cluster may start half an hour apart."""
    heartbeat_s: Annotated[int, Field(ge=10)] = 60
    """Seconds of silence after which a process counts as lost and the others end with code 75 (a connection that drops
    tells them at once). Longer than the pause of a machine that is moved while it runs."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ComputeConfig:
    """How the step is computed; none of it changes what is learned beyond rounding."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations and matmul operands; auto: bfloat16 on accelerators, float32 on CPU. Masters stay float32."""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """What the backward pass recomputes: nothing, all but matmuls, or every layer whole; auto: nothing on CPU, unless
    adapter.quantise is set, else full."""
    layers: Literal["auto", "scan", "unroll"] = "auto"
    """Compile one layer and scan it, or every layer by itself; auto: unroll up to 12 layers on CPU, else scan."""
    attention: Literal["auto", "tpu", "gpu", "blockwise", "ring", "reference", "cudnn"] = "auto"
    """Attention kernel of training and evaluation; auto takes the first that can run here and says why."""
    head: Literal["auto", "split", "full", "chunked"] = "auto"
    """The vocabulary split over fsdp, all logits of a micro-batch held at once, or slices of them; auto: the first that can,
    full up to 512 MiB of logits a device."""
    deterministic: bool = False
    """Refuse an environment that breaks bitwise reproduction or is not that of the run's beginning; on GPU, only kernels
    that always give the same bits."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """What is saved on the way."""

    every: Count = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = 2
    """How many of the newest to keep."""
    background: bool = True
    """Write while training goes on."""
    grace: Positive = 120.0
    """Seconds that a stop (SIGTERM, Ctrl-C) may take to finish the step and save; after that it ends with what is saved."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    """What is written down."""

    every: Count = 10
    """Steps between lines in metrics.jsonl, on the terminal and in TensorBoard; each tells of its step alone."""
    to: tuple[Literal["wandb", "trackio"], ...] = ()
    """Trackers beside TensorBoard; each needs the extra of its name."""
    project: str = "maxi"
    """Project name at those trackers."""
    stall_factor: NonNegative = 10.0
    """A step that takes this many times the median of those before it is reported, with the stacks of all threads; 0: never."""
    stall_seconds: Positive = 10.0
    """What takes less is no stall, however long it is by the factor."""
