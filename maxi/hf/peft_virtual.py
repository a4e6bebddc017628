"""Virtual tokens in peft's format: one tensor, `prompt_embeddings`, and the fields of adapter_config.json beside it."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxi.adapters import OnWeights, prefix
from maxi.adapters.prefix import Prefix
from maxi.adapters.prompt import NAME, Prompt
from maxi.errors import ModelFolderError
from maxi.hf.folder import ADAPTER, DTYPES, Stored
from maxi.params import Table, Tree, get

KINDS: dict[str, type[Prompt] | type[Prefix]] = {"PROMPT_TUNING": Prompt, "PREFIX_TUNING": Prefix}
"""peft_type -> kind."""


def tuning_of(where: str, fields: Mapping[str, Any], base: Table, dtype: Any) -> OnWeights:
    """The adapter that a folder holds. Raises ModelFolderError for a number of virtual tokens that is none."""
    count = fields.get("num_virtual_tokens")
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < 1 << 16:
        raise ModelFolderError(f"num_virtual_tokens is {count!r}", f"{where}/{ADAPTER}", "the file is damaged")
    if fields["peft_type"] == "PROMPT_TUNING":
        return OnWeights(base, ("embed",), Prompt(count), dtype)
    return OnWeights(base, prefix.targets(base), Prefix(count), dtype)


def read(where: str, stored: Mapping[str, Stored], tuning: OnWeights) -> Tree:
    """The values, float32. Raises ModelFolderError for what is missing, not finite or of another shape."""
    table = tuning.table
    if set(stored) != {NAME}:
        raise ModelFolderError(f"it holds {', '.join(sorted(stored))[:200] or 'nothing'}, not {NAME}", where, "train it again")
    tensor, wanted = stored[NAME], _shape(tuning)
    if list(tensor.shape) != wanted or tensor.dtype not in DTYPES:
        what = f"{NAME} is {tensor.dtype} {list(tensor.shape)}, this model needs {wanted}"
        raise ModelFolderError(what, where, "use the adapter's own base")
    value = np.asarray(tensor.open(), np.float32)
    if not np.isfinite(value).all():
        raise ModelFolderError(f"{NAME} holds NaN or Inf", where, "the adapter is damaged")
    if isinstance(tuning.kind, Prompt):
        return table.map(lambda *_: jnp.asarray(value))
    tree = prefix.apart(table, value)
    return table.map(lambda path, _: jnp.asarray(get(tree, path)))


def tensors(tuning: OnWeights, params: Tree) -> dict[str, np.ndarray]:
    """What adapter_model.safetensors holds, float32."""
    if isinstance(tuning.kind, Prompt):
        return {NAME: np.asarray(params["embed"]["virtual"], np.float32)}
    return {NAME: prefix.flat(tuning.table, params)}


def fields(tuning: OnWeights, shared: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json; `shared` are the fields of every kind."""
    sizes, layers = tuning.base.sizes, sum(map(len, tuning.base.stacks.values()))
    common = {**shared, "num_virtual_tokens": tuning.virtual_tokens, "num_layers": layers, "num_transformer_submodules": 1}
    if isinstance(tuning.kind, Prompt):
        own: dict[str, Any] = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_kwargs": None}
        own |= {"tokenizer_name_or_path": None, "token_dim": sizes["D"], "num_attention_heads": sizes["N"]}
        return {"peft_type": "PROMPT_TUNING", **common, **own}
    width = sizes["K"] * sizes["H"]
    own = {"prefix_projection": False, "init_weights": None, "encoder_hidden_size": width}
    return {"peft_type": "PREFIX_TUNING", **common, **own, "token_dim": width, "num_attention_heads": sizes["K"]}


def _shape(tuning: OnWeights) -> list[int]:
    sizes, count = tuning.base.sizes, tuning.virtual_tokens
    if isinstance(tuning.kind, Prompt):
        return [count, sizes["D"]]
    return [count, sum(map(len, tuning.base.stacks.values())) * 2 * sizes["K"] * sizes["H"]]
