"""What of a model is trained, and what stays: full fine-tuning, parts of it, or an adapter beside it.

    weight.py      a frozen weight with something learned beside it, and how a projection applies it
    lora.py        LoRA, rsLoRA, LoRA+, PiSSA, DoRA
    adalora.py     AdaLoRA
    ia3.py         (IA)3
    virtual.py     virtual tokens before each document; prompt.py, as embeddings; prefix.py, as keys and values
    quantised.py   frozen weights in 4 or 8 bits
    partial.py     some of the model's own weights
    targets.py     which weights

A `Tuning` is a transform of the base's table: `table` is what is trained, and all that follows from a table (first values,
shardings, decay, the optimizer's state, checkpoints) follows from that one. The base is beside it: no optimizer state, no
gradient, no copy. `join` puts both together into the tree that the decoder reads, without computing anything.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxi import optim
from maxi.adapters import adalora, prefix
from maxi.adapters.adalora import AdaLora
from maxi.adapters.ia3 import IA3
from maxi.adapters.lora import Lora
from maxi.adapters.partial import Partial
from maxi.adapters.prefix import FromNetwork, Prefix
from maxi.adapters.prompt import Prompt
from maxi.adapters.quantised import Quantised, block_of
from maxi.adapters.targets import check_pattern, chosen, projections
from maxi.adapters.weight import Kind
from maxi.adapters.weights import START, OnWeights
from maxi.errors import ConfigError
from maxi.params import Param, Table, Tree, abstract, get, matmul_flops_per_token, shardings
from maxi.sharding import axes_of, weight_spec

__all__ = ["Full", "OnWeights", "Partial", "Tuning", "around", "build", "frozen_bytes", "frozen_shardings", "spared_flops"]


KINDS: Mapping[str, Callable[..., Kind]] = {
    "lora": Lora,
    "adalora": adalora.build,
    "ia3": IA3,
    "prompt": Prompt,
    "prefix": Prefix,
}
"""Name in the config -> what stands beside weights; its fields are the adapter's options."""


class Tuning(Protocol):
    """See the module. Trees named `frozen` are what `fix` made of the base."""

    @property
    def about(self) -> str:
        """What it is, in a few words."""
        ...

    @property
    def table(self) -> Table:
        """What is trained."""
        ...

    @property
    def whole(self) -> Table:
        """The model's own weights, as its layers read them."""
        ...

    @property
    def needs_base(self) -> bool:
        """Whether there is a base that stays, which every start has to read."""
        ...

    @property
    def starts_from_base(self) -> bool:
        """Whether first values come from the base's weights as they are read."""
        ...

    @property
    def needs_noise(self) -> bool:
        """Whether a training step needs noise."""
        ...

    @property
    def keeps_start(self) -> bool:
        """Whether what is frozen holds the adapter's first values too."""
        ...

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens stand before each document; where there are some, `merged` cannot be had."""
        ...

    @property
    def base(self) -> Table:
        """The model's own weights, as they are read and exported."""
        ...

    def first(self, key: jax.Array, base: Tree) -> Tree:
        """First values of what is trained."""
        ...

    def keep(self, path: str, weight: Any) -> Any:
        """A weight of the base as it is kept while training; one that is kept already stays as it is."""
        ...

    def fix(self, base: Tree) -> Tree:
        """What stays of the base, from its weights as they were read or as `keep` made them."""
        ...

    def join(self, params: Tree, frozen: Tree, noise: Any = None) -> Tree:
        """The tree that the decoder reads; noise uint32 [B, 2], the keys of the rows, in a training step that needs it."""
        ...

    def merged(self, params: Tree, frozen: Tree) -> Tree:
        """Weights of the base's table in which what was learned is part of them."""
        ...

    def off(self, first: Callable[[], Tree], frozen: Tree) -> Tree:
        """The tree before anything was learned, which preferences are compared with; `first` gives the first values."""
        ...


@dataclass(frozen=True)
class Full:
    """Everything is trained. See `Tuning`."""

    base: Table

    needs_base = False
    about = "all weights"
    starts_from_base = True
    needs_noise = False
    keeps_start = False
    virtual_tokens = 0

    @property
    def table(self) -> Table:
        return self.base

    @property
    def whole(self) -> Table:
        return self.base

    def first(self, key: jax.Array, base: Tree) -> Tree:
        del key
        return base

    def keep(self, path: str, weight: Any) -> Any:
        del path
        return weight

    def fix(self, base: Tree) -> Tree:
        del base
        return {}

    def join(self, params: Tree, frozen: Tree, noise: Any = None) -> Tree:
        del frozen, noise
        return params

    def merged(self, params: Tree, frozen: Tree) -> Tree:
        del frozen
        return params

    def off(self, first: Callable[[], Tree], frozen: Tree) -> Tree:
        del frozen
        return first()


def build(
    base: Table,
    freeze: Sequence[str] = (),
    *,
    kind: str = "none",
    targets: Sequence[str] | str = "all",
    quantise: str = "none",
    dtype: Any = jnp.float32,
    init_from: str | None = None,
    init_text: str | None = None,
    projection: bool = False,
    encoder_hidden_size: int | None = None,
    **options: Any,
) -> Tuning:
    """The tuning that the sections `adapter` and `freeze` ask for; `dtype` is that of the computation. Raises ConfigError."""
    del init_from, init_text  # say which values it begins with, not what it is
    if freeze:
        return Partial(base, tuple(freeze))
    if kind == "none":
        return Full(base)
    if quantise != "none" and (odd := [path for path in projections(base) if block_of(base.shape(path)[-1]) is None]):
        what = f"{odd[0]} cannot be quantised, its last dimension is {base.shape(odd[0])[-1]}"
        raise ConfigError(what, "adapter.quantise", "set it to none")
    for name in ("rank_pattern", "alpha_pattern"):
        if options.get(name):
            check_pattern(base, _targets(base, targets), tuple(options[name].items()), f"adapter.{name}")
            options = {**options, name: tuple(options[name].items())}
        else:
            options.pop(name, None)
    made: Kind = KINDS[kind](**options)
    precision: Any = None if quantise == "none" else quantise
    if isinstance(made, Prompt):
        return OnWeights(base, ("embed",), made, dtype, precision)
    if isinstance(made, Prefix) and projection:
        width = encoder_hidden_size or base.sizes["K"] * base.sizes["H"]
        return FromNetwork(base, prefix.targets(base), made, dtype, precision, width)
    if isinstance(made, Prefix):
        return OnWeights(base, prefix.targets(base), made, dtype, precision)
    return OnWeights(base, _targets(base, targets), made, dtype, precision)


def _targets(base: Table, targets: Sequence[str] | str) -> tuple[str, ...]:
    return chosen(base, [targets] if isinstance(targets, str) else targets, "adapter.targets")


def around(tuning: Tuning, total: int) -> optim.Around | None:
    """What stands around the optimizer's parts in a run of `total` steps, see `maxi.optim.optimizer`. Raises ConfigError."""
    kind = getattr(tuning, "kind", None)
    if not isinstance(kind, AdaLora):
        return None
    schedule = kind.schedule
    assert schedule is not None
    return lambda before, after: adalora.allocating(schedule, tuning.table, total, before, after)


def spared_flops(tuning: Tuning) -> int:
    """FLOPs a token by which a step takes less than one that trains the model whole: a frozen weight needs no gradient of its
    own, as much as its forward pass; what is beside the weights takes three of its passes."""
    whole, trained = tuning.whole, tuning.table
    looked_up = {"embed"} if "lm_head" in whole.params else set()
    stay = [path for path in whole.params if path not in trained.params and path not in looked_up]
    beside = [path for path in trained.params if path not in whole.params]
    return matmul_flops_per_token(whole.only(stay)) - 3 * matmul_flops_per_token(trained.only(beside))


def frozen_bytes(tuning: Tuning) -> dict[str, int]:
    """Weight -> the bytes of what is kept of it beside the trained ones."""
    kept, found = jax.eval_shape(tuning.fix, abstract(tuning.base)), {}
    for path in tuning.whole.params:
        if path not in tuning.table.params:
            found[path] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(get(kept, path)))
    return found


def frozen_shardings(tuning: Tuning, mesh: Mesh) -> Tree:
    """The tree of `NamedSharding`s of what `fix` gives: each weight as its table says, whatever it is kept as."""
    stay = tuning.whole.only([path for path in tuning.whole.params if path not in tuning.table.params])
    kept = jax.eval_shape(tuning.fix, abstract(tuning.base))

    def where(path: str, param: Param) -> Any:
        leaf, spec = get(kept, path), NamedSharding(mesh, weight_spec(param.dims, stay.sizes, mesh))
        if not isinstance(leaf, Quantised):
            return spec
        for shape in (leaf.codes.shape, leaf.scales.shape):
            if any(size % parts for size, parts in zip(shape, _parts(spec), strict=True)):
                what = f"{path}, quantised, does not divide over the mesh"
                raise ConfigError(what, "mesh", "split it less, or set adapter.quantise to none")
        alone = NamedSharding(mesh, PartitionSpec())
        return replace(leaf, codes=spec, scales=spec, group_scales=alone, mean=alone)

    return stay.map(where) | ({START: shardings(tuning.table, mesh)} if tuning.keeps_start else {})


def _parts(spec: NamedSharding) -> list[int]:
    """Into how many parts each dimension is split."""
    return [math.prod(spec.mesh.shape[axis] for axis in axes_of(entry)) for entry in spec.spec]
