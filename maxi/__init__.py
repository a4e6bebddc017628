"""maxi: raw text in, a Hugging Face model out.

The notebook API, four functions (each documented where it lives):

    import maxi

    model = maxi.load_hf("path/to/hf_folder")                # -> maxi.hf.Loaded(model, params, ...)
    maxi.logits(model, [[1, 2, 3]])                          # -> f32 [B, T, V]
    maxi.generate(model, ["Once upon"], max_new_tokens=20)   # -> list[str]
    maxi.save_hf(model, "path/to/out")                       # -> the folder written

Importing this package imports neither jax nor transformers: the names above are looked up on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maxi.generation import generate, logits
    from maxi.hf import load_hf, save_hf

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "load_hf", "logits", "save_hf"]

_HOME = {"load_hf": "maxi.hf", "save_hf": "maxi.hf", "generate": "maxi.generation", "logits": "maxi.generation"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'maxi' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
