"""Model families: config.json in, a `Model` out; and the decoder that runs any of them.

    model.py      what a model is: table, layer kinds, period
    decoder.py    the forward pass, with and without a key/value cache
    rope.py       rotary embeddings and their scalings
    sampling.py   logits to the next token
    hf_config.py  config.json, read strictly
    qwen2.py qwen3.py llama.py   one family each

A new family is one file with `from_hf_config` and one line in `FAMILIES`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from maxi.errors import ModelFolderError
from maxi.models import llama, qwen2, qwen3
from maxi.models.model import Model

FAMILIES: dict[str, Callable[[Mapping[str, Any], str], Model]] = {
    "llama": llama.from_hf_config,
    "qwen2": qwen2.from_hf_config,
    "qwen3": qwen3.from_hf_config,
}
"""Hugging Face model_type -> reader."""


def from_hf_config(fields: Mapping[str, Any], where: str = "config.json") -> Model:
    """A `Model` from config.json's fields; `where` names their origin in errors.

    Raises ModelFolderError for an unknown model_type and whatever the family refuses.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelFolderError(f"unsupported: model_type {kind!r}", where, f"one of {', '.join(FAMILIES)}")
    return FAMILIES[kind](fields, where)
