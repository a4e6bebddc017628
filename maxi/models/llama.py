"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783) and all of that shape: TinyLlama, DeepSeek-Coder, SmolLM2."""

from collections.abc import Mapping
from typing import Any

from maxi.models.hf_config import HfConfig, read_sizes
from maxi.models.model import LayerKind, Model, decoder_table
from maxi.models.rope import Rope


def from_hf_config(fields: Mapping[str, Any], where: str = "config.json") -> Model:
    """A `Model` from config.json's fields. Raises ModelFolderError for what is missing, absurd or unsupported."""
    config = HfConfig(fields, where)
    sizes, depth = read_sizes(config)
    attention_bias = config.flag("attention_bias", False)
    model = Model(
        family="llama",
        table=decoder_table(
            sizes,
            {"layers": tuple(range(depth))},
            init_std=config.number("initializer_range", 0.02),
            tied=config.flag("tie_word_embeddings", False),
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            mlp_bias=config.flag("mlp_bias", False),
        ),
        layers=(LayerKind(),) * depth,
        rope=Rope.from_hf(config, sizes["H"], config.size("max_position_embeddings", 2048, at_most=1 << 30)),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        hf_config=dict(fields),
    )
    config.finish()
    return model
