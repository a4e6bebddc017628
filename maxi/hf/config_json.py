"""Export: the config.json and generation_config.json that every reader of Hugging Face folders understands.

transformers 4 takes `rope_theta` and `rope_scaling`, 5 takes `rope_parameters`; 4 silently assumes a base of 10,000
where it finds only the latter. So both are written, and every size is, even where the source left it to a default.
"""

from typing import Any

from maxi.data.tokenizer import Tokenizer
from maxi.errors import ModelFolderError
from maxi.models import Model


def config_fields(model: Model, dtype: str, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """config.json of a model stored in `dtype`: the one it came from, completed.

    `torch_dtype` is what transformers before 4.56 (and vLLM, llama.cpp) read, `dtype` what later ones do; those that
    know both take either without complaint.
    """
    sizes, rope = model.table.sizes, model.rope.to_hf()
    fields = dict(model.hf_config) | {
        "architectures": ["".join(part.capitalize() for part in model.family.split("_")) + "ForCausalLM"],
        "model_type": model.family,
        "vocab_size": sizes["V"],
        "hidden_size": sizes["D"],
        "intermediate_size": sizes["F"],
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": sizes["N"],
        "num_key_value_heads": sizes["K"],
        "head_dim": sizes["H"],
        "hidden_act": "silu",
        "max_position_embeddings": model.rope.max_position,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    fields.pop("rope_scaling", None)
    if model.rope.kind != "default":
        fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    fields.setdefault("use_cache", True)
    ends = _ends(fields)
    if tokenizer is not None and not (ends and ends <= set(tokenizer.eos_ids)):
        # They are another tokenizer's. None is written out: a missing field means the family's own id, Llama's 1 and 2.
        fields |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return fields


def generation_fields(
    config: dict[str, Any], tokenizer: Tokenizer | None, given: dict[str, Any] | None
) -> dict[str, Any] | None:
    """generation_config.json: what is `given`, with all ids that end a generation. None where nothing is known."""
    fields = dict(given or {})
    known = _ends(fields)
    ends = tokenizer.eos_ids if tokenizer else sorted(known or _ends(config))
    if ends and not known.issuperset(ends):  # a turn's end token may be new to a base model's list
        fields["eos_token_id"] = list(dict.fromkeys([*ends, *sorted(known)]))
    if fields.get("pad_token_id") is None and tokenizer is not None:
        fields["pad_token_id"] = tokenizer.pad_id
    return fields or None


def _ends(fields: dict[str, Any]) -> set[int]:
    """Raises ModelFolderError for what is no id."""
    found = fields.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int for i in ids):
        what = f"eos_token_id is {str(found)[:80]}"
        raise ModelFolderError(what, "config.json or generation_config.json", "it must be an id or a list of ids")
    return set(ids)
