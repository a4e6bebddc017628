"""Qwen3 (arXiv:2505.09388): each head of q and k has its RMSNorm, head_dim is given and need not be hidden/heads."""

from collections.abc import Mapping
from typing import Any

from maxi.models.hf_config import HfConfig, read_sizes, read_windows
from maxi.models.model import LayerKind, Model, decoder_table
from maxi.models.rope import Rope


def from_hf_config(fields: Mapping[str, Any], where: str = "config.json") -> Model:
    """A `Model` from config.json's fields. Raises ModelFolderError for what is missing, absurd or unsupported."""
    config = HfConfig(fields, where)
    sizes, depth = read_sizes(config, head_dim=128)
    bias = config.flag("attention_bias", False)
    model = Model(
        family="qwen3",
        table=decoder_table(
            sizes,
            {"layers": tuple(range(depth))},
            init_std=config.number("initializer_range", 0.02),
            tied=config.flag("tie_word_embeddings", False),
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=True,
        ),
        layers=tuple(LayerKind(window=window) for window in read_windows(config, depth)),
        rope=Rope.from_hf(config, sizes["H"], config.size("max_position_embeddings", 32_768, at_most=1 << 30)),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        hf_config=dict(fields),
    )
    config.finish()
    return model
