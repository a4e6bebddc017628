"""Tiny random models built by transformers, the ground truth that imports and logits are compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def build(family: str, seed: int = 0, **fields: Any) -> Any:
    """A transformers model in f32 whose every weight is random, norms and biases too (ones and zeros hide mistakes)."""
    config_class, model_class = _CLASSES[family]
    model = model_class(config_class(**(SIZES | fields))).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise if name.endswith("bias") else 0.15 * noise)
    return model


def save(folder: Path, family: str, dtype: str = "float32", shard: str = "5GB", **fields: Any) -> Any:
    """Builds a model and saves it into `folder` by transformers; returns it."""
    model = build(family, **fields).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def logits(model: Any, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """transformers' logits in f32 [B, T, V]."""
    with torch.no_grad():
        attention_mask = None if mask is None else torch.tensor(mask)
        return model(torch.tensor(tokens), attention_mask=attention_mask).logits.float().numpy()
