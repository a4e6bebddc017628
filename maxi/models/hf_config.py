"""A Hugging Face config.json, read strictly: every field is understood, known to be harmless, or refused by name.

Sizes are bounded before anything is allocated, so an absurd or hostile file costs one line, not the machine.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from maxi.errors import ModelFolderError

Value = TypeVar("Value", int, float, bool)

# What these say is about tokenizers, generation, saving or training elsewhere, not about this model's maths.
_HARMLESS = frozenset(
    (
        *("_name_or_path", "architectures", "model_type", "transformers_version", "transformers.js_config", "_commit_hash"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class", "prefix"),
        *("torch_dtype", "dtype", "torchscript", "use_cache", "return_dict", "use_return_dict", "chunk_size_feed_forward"),
        *("output_attentions", "output_hidden_states", "attn_implementation", "_attn_implementation_autoset"),
        *("finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "pretraining_tp"),
        *("is_decoder", "is_encoder_decoder", "initializer_range", "keys_to_ignore_at_inference", "is_llama_config"),
        *("max_length", "min_length", "do_sample", "num_return_sequences", "bad_words_ids"),
        *("unsloth_version", "unsloth_fixed"),
    )
)
_MUST_BE_OFF = ("attention_dropout", "hidden_dropout", "resid_pdrop", "add_cross_attention", "cross_attention_hidden_size")


class HfConfig:
    """Fields are taken one by one; `finish` refuses what nobody took."""

    def __init__(self, fields: Mapping[str, Any], where: str = "config.json"):
        self.fields, self.where = dict(fields), where
        self._left = {name for name, value in fields.items() if name not in _HARMLESS and value is not None}
        for danger in ("auto_map", "custom_pipelines", "quantization_config", "_remote_code"):
            if danger in self._left:
                raise ModelFolderError(
                    f"unsupported: {danger}", where, "maxi runs no code and no quantised weights from model folders"
                )

    def refuse(self, what: str, fix: str = "take it out of the config if the model does not need it") -> ModelFolderError:
        return ModelFolderError(f"unsupported: {what}", self.where, fix)

    def get(self, name: str, default: Any = None) -> Any:
        """A field of any type, marked as understood."""
        self._left.discard(name)
        value = self.fields.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None, at_most: int = 1 << 20) -> int:
        """A positive integer up to `at_most`."""
        value = self.get(name, default)
        if value is None:
            raise ModelFolderError(f"{name} is missing", self.where, f"add {name} to the model's config")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= at_most:
            raise ModelFolderError(f"{name} is {value!r}", self.where, f"it must be an integer from 1 to {at_most}")
        return value

    def number(self, name: str, default: float | None = None, least: float = 0.0) -> float:
        """A finite number above `least`."""
        return check_number(self.get(name, default), name, self.where, least)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ModelFolderError(f"{name} is {value!r}", self.where, "it must be true or false")
        return value

    def finish(self) -> None:
        """Raises ModelFolderError for anything that was given, is not harmless, and nobody understood."""
        for name in _MUST_BE_OFF:
            if self.get(name, 0):
                raise self.refuse(f"{name} {self.fields[name]!r}")
        act = self.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise self.refuse(f"hidden_act {act!r}")
        unknown = sorted(name for name in self._left if self.fields[name] not in (False, 0, [], {}, ""))
        if unknown:
            raise self.refuse(", ".join(unknown))


def check_number(value: Any, name: str, where: str, least: float = 0.0) -> float:
    """`value` as a finite float above `least`. Raises ModelFolderError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < 1e30:
        raise ModelFolderError(f"{name} is {value!r}", where, f"it must be a number above {least:g}")
    return float(value)


def read_sizes(config: HfConfig, head_dim: int | None = None) -> tuple[dict[str, int], int]:
    """Letters -> sizes that every decoder has, and the number of layers. `head_dim`: the family's own default.

    Raises ModelFolderError for a missing or absurd size, and for query heads that key/value heads do not divide.
    """
    heads = config.size("num_attention_heads", at_most=4096)
    hidden = config.size("hidden_size")
    sizes = {
        "D": hidden,
        "F": config.size("intermediate_size", at_most=1 << 22),
        "V": config.size("vocab_size", at_most=1 << 24),
        "N": heads,
        "K": config.size("num_key_value_heads", heads, at_most=4096),
        "H": config.size("head_dim", head_dim or hidden // heads, at_most=4096),
    }
    if heads % sizes["K"]:
        raise ModelFolderError(
            f"{heads} heads do not divide into {sizes['K']} key/value heads",
            config.where,
            "num_key_value_heads must divide num_attention_heads",
        )
    if sizes["H"] % 2:
        raise ModelFolderError(f"head_dim {sizes['H']} is odd", config.where, "rotary embeddings rotate pairs")
    return sizes, config.size("num_hidden_layers", at_most=1024)


def read_windows(config: HfConfig, depth: int) -> tuple[int | None, ...]:
    """Each layer's attention window, as Qwen2 and Qwen3 say it: `layer_types`, or all layers from `max_window_layers`."""
    used = config.flag("use_sliding_window", False)
    window = config.get("sliding_window", None if "sliding_window" in config.fields else 4096)  # null means none
    first = config.get("max_window_layers", 28)
    if not isinstance(first, int) or isinstance(first, bool):
        raise ModelFolderError(f"max_window_layers is {first!r}", config.where, "it must be an integer")
    types = config.get("layer_types")
    if types is None:
        types = ["sliding_attention" if used and window and number >= first else "full_attention" for number in range(depth)]
    if not isinstance(types, list) or len(types) != depth:
        raise ModelFolderError(f"layer_types does not name {depth} layers", config.where, "one entry a layer")
    if unknown := sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"}):
        raise config.refuse(f"layer type {unknown[0]!r}")
    if not (used and window):  # transformers drops the window when it is switched off, whatever layer_types say
        return (None,) * depth
    size = config.size("sliding_window", 4096, at_most=1 << 30)
    return tuple(size if kind == "sliding_attention" else None for kind in types)
