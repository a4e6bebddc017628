"""AdaLoRA in peft's format: ranks that were given up are not in the tensors, and `rank_pattern` says which they were."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from maxi.adapters import OnWeights
from maxi.adapters.adalora import AdaLora, Schedule
from maxi.adapters.lora import PREFIX
from maxi.errors import ModelFolderError
from maxi.hf.folder import ADAPTER


def kind_of(where: str, fields: Mapping[str, Any]) -> AdaLora:
    """The kind that adapter_config.json describes. Raises ModelFolderError for numbers that are none."""
    for name in ("init_r", "lora_alpha"):
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 16:
            raise ModelFolderError(f"{name} is {value!r}", f"{where}/{ADAPTER}", "the file is damaged")
    return AdaLora(int(fields["init_r"]), float(fields["lora_alpha"]))


def without_idle(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, list[bool]] | None]:
    """The tensors without the ranks whose entry of E is zero, and peft's `rank_pattern`, None where there are none."""
    pattern = {name: (tensors[name][:, 0] != 0).tolist() for name in tensors if name.endswith("lora_E")}
    if all(all(kept) for kept in pattern.values()):
        return dict(tensors), None
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        kept = np.array(pattern[f"{name.removesuffix(name[-1])}E"])
        found[name] = np.ascontiguousarray(tensor[:, kept] if name.endswith("lora_B") else tensor[kept])
    return found, {name.removeprefix(PREFIX): kept for name, kept in pattern.items()}


def fields(tuning: OnWeights, steps: int, pattern: Mapping[str, list[bool]] | None) -> dict[str, Any]:
    """What adapter_config.json says of AdaLoRA alone; `steps` are those of the run."""
    kind = tuning.kind
    assert isinstance(kind, AdaLora)
    schedule = kind.schedule or Schedule(kind.rank, 0, 0, 1, 0.85, 0.85, 0.5)
    return {
        "peft_type": "ADALORA",
        "r": 8,  # peft warns of any other, since it means init_r
        "init_r": kind.rank,
        "target_r": schedule.target_r,
        "tinit": schedule.tinit,
        "tfinal": schedule.tfinal,
        "deltaT": schedule.delta_t,
        "beta1": schedule.beta1,
        "beta2": schedule.beta2,
        "orth_reg_weight": schedule.orth_reg_weight,
        "total_step": max(steps, schedule.tinit + schedule.tfinal + 1),  # peft refuses less, of a run that was stopped too
        "rank_pattern": pattern,
    }
