"""What has to be computed at every step, whatever the layout, and the layouts it may be computed in."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Literal

import jax
import optax
from jax.sharding import AbstractMesh

from maxi import adapters, mesh, optim
from maxi.adapters import Tuning
from maxi.dims import MESH_AXES
from maxi.errors import ConfigError
from maxi.models import Model
from maxi.models.model import restacked
from maxi.params import Table, init, matmul_flops_per_token
from maxi.sections import ComputeConfig, MeshConfig, OptimConfig
from maxi.sharding import axes_of, weight_spec

Remat = Literal["none", "dots", "full"]
REMATS: tuple[Remat, ...] = ("none", "dots", "full")
"""From the most memory to the most work."""
ANY_STEPS = 1 << 30
"""How many steps a run takes, where only what it keeps is asked for."""
STATE_BYTES = 4
"""Weights and moments are float32."""


@dataclass(frozen=True)
class Layout:
    """How a step is split: sizes of mesh axes (all others are 1), parts of a batch, and what is computed again."""

    replica: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    micro_batches: int = 1
    remat: Remat = "full"

    @property
    def mesh(self) -> dict[str, int]:
        """Every mesh axis and its size."""
        return {axis: getattr(self, axis, 1) for axis in MESH_AXES}

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def rows(self) -> int:
        """Over how many devices the rows of a batch are split."""
        return self.replica * self.fsdp

    def settings(self) -> dict[str, Any]:
        """The config keys that it stands for."""
        fixed = {f"mesh.{axis}": size for axis, size in self.mesh.items()}
        return {**fixed, "micro_batches": self.micro_batches, "compute.remat": self.remat}

    def describe(self) -> str:
        """One line, without the axes that split nothing."""
        sizes = [f"{axis} {size}" for axis, size in self.mesh.items() if size > 1] or ["one device"]
        parts = f"{self.micro_batches} micro-batch{'es' * (self.micro_batches > 1)}"
        return f"{', '.join(sizes)}, {parts}, remat {self.remat}"


@dataclass(frozen=True)
class Held:
    """A device's part: of each of the model's weights, and of the state, in elements."""

    shares: Mapping[str, int]
    parameters: int
    """Of what is trained."""
    state: int
    frozen: float
    """Bytes of what is only read."""


@dataclass(frozen=True)
class Work:
    """A step's work. `rows` rows of `width` tokens make a batch; the model's layers are in the stacks of `tuning.whole`."""

    model: Model
    tuning: Tuning
    arrays: Mapping[str, int]
    """Trained weight -> how many float32 arrays of its shape the state holds: itself, moments, a moving average."""
    rows: int
    width: int
    dtype_bytes: int
    """Of activations and matmul operands."""
    gradient_with_value: bool
    """Whether the head finds its gradient together with its value; else it computes logits once more."""
    _held: "dict[tuple[int, ...], Held]" = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """Of a batch, padding included."""
        return self.rows * self.width

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Weight -> its elements."""
        return {path: math.prod(self.model.table.shape(path)) for path in self.model.table.params}

    @cached_property
    def matrices(self) -> int:
        """Elements of all weights that are split and travel."""
        return sum(size for path, size in self.sizes.items() if self.model.table.params[path].is_matrix)

    @cached_property
    def flops_per_token(self) -> float:
        """See `Model.train_flops_per_token`, less what frozen weights spare."""
        return self.model.train_flops_per_token(self.width) - adapters.spared_flops(self.tuning)

    @cached_property
    def layer_flops(self) -> float:
        """Of a token, forward, by the matmuls of all layers."""
        return matmul_flops_per_token(self.model.table) - self.head_flops

    @cached_property
    def head_flops(self) -> float:
        """Of a token, forward, by the head."""
        sizes = self.model.table.sizes
        return 2.0 * sizes["V"] * sizes["D"]

    @cached_property
    def attention_flops(self) -> float:
        """Of a token, forward, as if every row were one document: what the model's FLOPs count beside matmuls."""
        return self.model.train_flops_per_token(self.width) / 3 - matmul_flops_per_token(self.model.table)

    @cached_property
    def head_spared(self) -> float:
        """FLOPs a token that a head without a gradient of its own spares."""
        head = "lm_head" if "lm_head" in self.model.table.params else "embed"
        return 0.0 if head in self.tuning.table.params else self.head_flops

    @cached_property
    def layers_spared(self) -> float:
        """The same of the layers, less what adapters take; negative where they take more."""
        return adapters.spared_flops(self.tuning) - self.head_spared

    @cached_property
    def frozen(self) -> dict[str, int]:
        """Frozen weight -> the bytes it is kept in."""
        return adapters.frozen_bytes(self.tuning)

    @property
    def sparing(self) -> bool:
        """Whether memory counts for more than time, see `maxi.program.choose_compute`."""
        return getattr(self.tuning, "precision", None) is not None

    def held(self, layout: Layout) -> "Held":
        """What a device has of the state. Raises ConfigError where a size does not divide."""
        sizes = tuple(layout.mesh.values())
        if sizes not in self._held:
            devices = AbstractMesh(sizes, tuple(layout.mesh))
            shares, trained = _shares(self.model.table, devices), _shares(self.tuning.table, devices)
            state = sum(self.arrays[path] * share for path, share in trained.items())
            frozen = sum(size * shares[path] / self.sizes[path] for path, size in self.frozen.items())
            if self.tuning.keeps_start:
                frozen += STATE_BYTES * sum(trained.values())
            self._held[sizes] = Held(shares, sum(trained.values()), state, frozen)
        return self._held[sizes]

    def check(self, layout: Layout) -> None:
        """Raises ConfigError where sizes do not fit each other, as a run would."""
        parts = layout.rows * layout.micro_batches
        if self.rows % parts:
            what = f"batch_size {self.rows} does not divide into {parts}, mesh.replica x mesh.fsdp x micro_batches"
            raise ConfigError(what, "batch_size", f"make it a multiple of {parts}")
        chunks = 2 * layout.context
        if layout.context > 1 and self.width % chunks:
            what = f"rows of {self.width} do not divide into {chunks}, 2 x mesh.context"
            raise ConfigError(what, "seq_len", f"make it a multiple of {chunks}")
        self.held(layout)


def _shares(table: Table, devices: AbstractMesh) -> dict[str, int]:
    """Weight -> a device's elements of it. Raises ConfigError where a size does not divide."""
    found = {}
    for path, param in table.params.items():
        spec = weight_spec(param.dims, table.sizes, devices)
        parts = math.prod(devices.shape[axis] for entry in spec for axis in axes_of(entry))
        found[path] = math.prod(table.shape(path)) // parts
    return found


def work_of(
    model: Model,
    optimizer: OptimConfig,
    *,
    batch_size: int,
    width: int,
    dtype_bytes: int,
    sums_tokens: bool,
    tuning: Tuning | None = None,
) -> Work:
    """The work of a run. `sums_tokens`: the objective is a weighted sum over tokens, as pretraining and SFT are; `tuning` says
    what of the model is trained, by default all."""
    tuning = tuning or adapters.Full(model.table)
    whole, arrays = restacked(model, tuning.whole), state_arrays(tuning.table, optimizer, adapters.around(tuning, ANY_STEPS))
    return Work(whole, tuning, arrays, batch_size, width, dtype_bytes, sums_tokens)


def state_arrays(table: Table, config: OptimConfig, around: optim.Around | None = None) -> dict[str, int]:
    """Weight -> how many arrays of its shape the state of a run holds, by asking the optimizer."""
    update = optim.optimizer(config, table, optim.schedule(config, 1), around)
    shapes = jax.eval_shape(lambda: update.init(init(table, jax.random.key(0))))
    moments: Counter[str] = Counter()

    def note(leaf: Any, path: str) -> Any:
        if not isinstance(leaf, optax.MaskedNode):
            moments[path] += 1
        return leaf

    paths = table.map(lambda path, _: path)
    optax.tree.map_params(update, note, shapes, paths, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    return {path: 1 + moments[path] + bool(config.ema) for path in table.params}


def layout_of(
    asked: MeshConfig, work: Work, chips: int, slices: int, micro_batches: int, compute: ComputeConfig, on_cpu: bool = False
) -> Layout:
    """The layout that a config asks for on so many chips in so many slices or nodes, by the rule that a run lays out its mesh.

    Raises ConfigError where the mesh does not fit them.
    """
    devices = [SimpleNamespace(slice_index=number * slices // chips) for number in range(chips)]
    sizes = mesh.choose(asked, devices, work.rows // micro_batches, work.width).sizes
    known = {axis: size for axis, size in zip(MESH_AXES, sizes, strict=True) if axis in Layout.__dataclass_fields__}
    remat: Remat = compute.remat if compute.remat != "auto" else "none" if on_cpu and not work.sparing else "full"
    return Layout(**known, micro_batches=micro_batches, remat=remat)
