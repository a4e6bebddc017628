"""The model card (README.md) of an exported folder, where the caller has none of its own."""

from maxi.models import Model
from maxi.params import count

_SHAPE = (
    ("hidden_size", "D"),
    ("intermediate_size", "F"),
    ("num_attention_heads", "N"),
    ("num_key_value_heads", "K"),
    ("head_dim", "H"),
    ("vocab_size", "V"),
)


def default_card(model: Model, dtype: str, name: str) -> str:
    """Markdown with Hugging Face's YAML front matter: what the model is, its shape, and how to load it."""
    rows = [("num_hidden_layers", len(model.layers))] + [(key, model.table.sizes[letter]) for key, letter in _SHAPE]
    rows += [("max_position_embeddings", model.rope.max_position)]
    table = "\n".join(f"| {key} | {value:,} |" for key, value in rows)
    head = "the embedding is the output head" if model.tied else "the output head has weights of its own"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- maxi
- {model.family}
---

# {name}

A {model.family} language model of {count(model.table):,} parameters, stored in {dtype}; {head}.
Written by maxi, a JAX trainer.

| | |
|---|---:|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""
