"""The same base with the same adapter in peft and in maxi."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel, get_peft_model

from maxi import pretrained
from maxi.adapters import OnWeights
from maxi.hf import Loaded, peft
from maxi.models import Model
from maxi.params import Tree
from tests import tiny


class Sides(NamedTuple):
    """peft's model, and maxi's of the same folders."""

    theirs: Any
    base: Path
    adapter: Path
    model: Model
    tuning: OnWeights
    params: Tree
    frozen: Tree

    @property
    def joined(self) -> Loaded:
        return Loaded(self.model, self.tuning.join(self.params, self.frozen), self.base)

    @property
    def merged(self) -> Loaded:
        return Loaded(self.model, self.tuning.merged(self.params, self.frozen), self.base)


def build(folder: Path, family: str, config: Any, **fields: Any) -> Sides:
    """A tiny random model and an adapter of peft's, all of whose values are random too, saved and read by maxi."""
    base, adapter = folder / "base", folder / "adapter"
    theirs: Any = get_peft_model(tiny.save(base, family, **fields), copy.deepcopy(config)).eval()
    theirs.peft_config["default"].base_model_name_or_path = str(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted(theirs.named_parameters()):
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    theirs.save_pretrained(adapter)
    opened, settings = pretrained.open_model(base), peft.open_adapter(adapter)
    tuning = peft.tuning_of(settings, opened.model.table)
    return Sides(theirs, base, adapter, opened.model, tuning, peft.read(settings, tuning), tuning.fix(opened.params))


def loaded_by_peft(base: Path, adapter: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)).eval()


TOKENS = np.random.default_rng(0).integers(0, tiny.SIZES["vocab_size"], (2, 16))
