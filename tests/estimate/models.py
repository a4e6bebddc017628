"""Small models for counting: grouped heads, tied and untied."""

from typing import Any

from maxi.adapters import Tuning
from maxi.estimate.work import Work, work_of
from maxi.models import Model, from_hf_config
from maxi.sections import OptimConfig

SIZES = {
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def model(**fields: Any) -> Model:
    return from_hf_config(SIZES | fields)


def work(
    rows: int = 64,
    width: int = 512,
    dtype_bytes: int = 2,
    optim: OptimConfig | None = None,
    tuning: Tuning | None = None,
    **fields: Any,
) -> Work:
    size: Any = {"batch_size": rows, "width": width, "dtype_bytes": dtype_bytes, "sums_tokens": True}
    return work_of(model(**fields), optim or OptimConfig(), **size, tuning=tuning)
