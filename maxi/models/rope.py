"""Rotary position embeddings and their scalings, with transformers' numbers.

RoPE: Su et al., arXiv:2104.09864. linear: Chen et al., arXiv:2306.15595. dynamic: NTK-aware base change, growing with
the sequence. yarn: Peng et al., arXiv:2309.00071, equations 14-22. llama3: Llama 3.1's smoothed interpolation.
Pairs are (i, i + H/2), as in Hugging Face's weights.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxi.errors import ModelFolderError
from maxi.kernels.cpu import computed_once
from maxi.models.hf_config import HfConfig, check_number

_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL = {
    "llama3": ("original_max_position_embeddings",),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "linear": ("original_max_position_embeddings",),
    "dynamic": ("original_max_position_embeddings",),
}


@dataclass(frozen=True)
class Rope:
    """`kind` is Hugging Face's rope_type; `settings` its other keys; `max_position` what the model was trained to."""

    kind: str
    theta: float
    head_dim: int
    max_position: int
    settings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_hf(cls, config: HfConfig, head_dim: int, max_position: int) -> "Rope":
        """Reads `rope_theta`, `rope_scaling` (transformers 4) and `rope_parameters` (5). Raises ModelFolderError."""
        new, old = (config.get(name, {}) for name in ("rope_parameters", "rope_scaling"))
        where = config.where
        if not isinstance(new, dict) or not isinstance(old, dict):
            raise ModelFolderError("rope parameters are not a mapping", where, "write {rope_type: ..., ...}")
        top = {} if config.get("rope_theta") is None else {"rope_theta": config.get("rope_theta")}
        merged: dict[str, Any] = {}
        for part in (top, old, new):
            for key, value in part.items():
                key = "rope_type" if key == "type" else key
                if value is not None and merged.setdefault(key, value) != value:
                    # transformers 4 and 5 each read other places, so they would see two different models
                    what = f"{key} is {merged[key]!r} in one place and {value!r} in another"
                    raise ModelFolderError(what, where, "rope_theta, rope_scaling and rope_parameters must agree")
        kind = str(merged.pop("rope_type", "default"))
        if kind not in _KEYS:
            raise config.refuse(f"rope_type {kind!r}", f"one of {', '.join(_KEYS)}")
        theta = check_number(merged.pop("rope_theta", 10_000.0), "rope_theta", where, 1.0)
        if merged.pop("partial_rotary_factor", 1.0) != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
            raise config.refuse("partial_rotary_factor")
        known = _KEYS[kind] + _OPTIONAL.get(kind, ())
        if unknown := [key for key, value in merged.items() if key not in known and value is not None]:
            raise config.refuse(f"rope parameter {unknown[0]!r} with rope_type {kind!r}")
        if missing := [key for key in _KEYS[kind] if merged.get(key) is None]:
            raise ModelFolderError(f"rope_type {kind!r} needs {missing[0]!r}", where, "add it to rope_scaling")
        settings = {k: check_number(v, k, where) if not isinstance(v, bool) else v for k, v in merged.items() if v is not None}
        return cls(kind, theta, head_dim, max_position, settings)

    def to_hf(self) -> dict[str, Any]:
        """`rope_parameters` of transformers 5; without rope_theta it is transformers 4's `rope_scaling`.

        The original length is written out where it matters: transformers 4 does without for yarn, but not for llama3.
        """
        original = {"original_max_position_embeddings": self.max_position} if self.kind in ("llama3", "yarn") else {}
        settings: dict[str, Any] = original | self.settings
        if (length := settings.get("original_max_position_embeddings")) is not None and length == int(length):
            settings["original_max_position_embeddings"] = int(length)  # transformers 4 wants an integer
        return {"rope_type": self.kind, "rope_theta": self.theta, **settings}


def cos_sin(rope: Rope, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, H] in float32 for integer positions [B, T], both halves of H alike."""
    inverse, scale = _inverse_frequencies(rope, positions_BT)
    angles = positions_BT[..., None].astype(jnp.float32) * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)
    return computed_once(jnp.cos(angles) * scale), computed_once(jnp.sin(angles) * scale)


def _inverse_frequencies(rope: Rope, positions_BT: jax.Array) -> tuple[Any, float]:
    """Inverse frequencies [H/2] and the factor on cosines and sines."""
    dim, theta, settings = rope.head_dim, rope.theta, rope.settings
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    if rope.kind == "dynamic":
        # transformers: the base grows once the sequence is longer than the model was trained for
        length = jnp.maximum(positions_BT.max() + 1, rope.max_position).astype(jnp.float32)
        stretch = settings["factor"] * length / rope.max_position - (settings["factor"] - 1)
        return 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponents, 1.0
    plain = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(settings["factor"]), 1.0
    if rope.kind == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    return plain, 1.0


def _llama3(plain: np.ndarray, rope: Rope) -> np.ndarray:
    """Long wavelengths are interpolated, short ones kept, those between blended."""
    factor, low, high = (rope.settings[key] for key in _KEYS["llama3"])
    turns = rope.settings.get("original_max_position_embeddings", rope.max_position) * plain / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * plain / factor + blend * plain).astype(np.float32)


def _yarn(plain: np.ndarray, rope: Rope) -> tuple[np.ndarray, float]:
    """A ramp over dimensions between interpolation and extrapolation, and a temperature on the attention logits."""
    settings, dim = rope.settings, rope.head_dim
    factor = settings["factor"]
    original = settings.get("original_max_position_embeddings", rope.max_position)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(settings.get("beta_fast") or 32), dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high if high != low else high + 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequencies = (plain / factor * ramp + plain * (1 - ramp)).astype(np.float32)

    def temperature(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = settings.get("attention_factor")
    if scale is None:
        mscale, mscale_all = settings.get("mscale"), settings.get("mscale_all_dim")
        scale = temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature()
    return frequencies, float(scale)
