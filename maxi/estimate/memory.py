"""Bytes that a device holds at once, by part, counted from shapes.

What the state takes is exact, but for what a compiler pads. What a step takes beside it is a model of what `maxi/step.py`,
`maxi/fsdp.py` and the head do, with constants fitted to programs compiled for TPUs (LOG.md has both side by side).
"""

from dataclasses import asdict, dataclass
from typing import Any

from maxi.estimate.work import STATE_BYTES, Layout, Work
from maxi.kernels.logprobs import FULL_AT_MOST, SPLIT_AT_MOST

KEPT = {"full": (1, 0, 0), "dots": (4, 2, 2), "none": (12, 6, 8)}
"""Elements that a layer keeps of a token for the backward pass, as multiples of D, of N H + 2 K H and of F."""
WORKING = (6, 2, 4)
"""The same of the layer that is being computed backward, beside what it keeps."""
LOGITS = 1.5
"""A slice of logits in float32, and once more in the dtype of the matmul that follows."""
SCATTERED = {True: 1, False: 4}
"""Copies of the whole embedding's gradient on its way to the devices that own its parts, if those are by vocabulary or not."""


@dataclass(frozen=True)
class Memory:
    """Bytes a device at the moment of the peak; what is not known by part is in `other`."""

    parameters: float
    optimizer: float
    gradients: float
    weights: float
    """Copies of weights: gathered from other devices, or in the dtype of the matmuls."""
    activations: float
    logits: float
    other: float = 0.0

    @property
    def total(self) -> float:
        whole = self.parameters + self.optimizer + self.gradients
        return whole + self.weights + self.activations + self.logits + self.other

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "total": self.total}


def memory(work: Work, layout: Layout) -> Memory:
    """Of a layout that `Work.check` has let pass."""
    table, held = work.model.table, work.held(layout)
    trained, state = STATE_BYTES * held.parameters, STATE_BYTES * held.state
    kept = len(work.model.layers) * layer_elements(work, layout, KEPT[layout.remat]) * work.dtype_bytes
    copies = float(work.dtype_bytes * held.parameters) if work.dtype_bytes < STATE_BYTES else 0.0
    # At its peak a step is at one of four places, and needs one of these beside the state, the gradients and the copies.
    embedding = _whole(work, layout, ("embed",))
    layer = 2 * _whole(work, layout, tuple(path for path in table.params if "." in path)) / len(work.model.layers)
    computing = layer_elements(work, layout, WORKING) * work.dtype_bytes
    places = (
        (embedding, kept, 0.0),
        (layer, kept + computing, 0.0),
        (0.0, kept, LOGITS * logit_bytes(work, layout)),
        (
            SCATTERED[by_vocabulary(work, layout)] * embedding,
            0.0,
            0.0,
        ),  # the gradient of the embedding, when all layers are done
    )
    gathered, activations, logits = max(places, key=sum)
    return Memory(
        parameters=trained + held.frozen,
        optimizer=state - trained,
        gradients=trained * (2 if layout.micro_batches > 1 else 1),  # those of a micro-batch beside their sum
        weights=copies + gathered,
        activations=activations,
        logits=logits,
    )


def tokens_at_once(work: Work, layout: Layout) -> float:
    """Of a micro-batch, on a device."""
    return work.tokens / (layout.rows * layout.context * layout.micro_batches)


def layer_elements(work: Work, layout: Layout, multiples: tuple[int, int, int]) -> float:
    """Elements of a layer's tensors on a device, as multiples of D, N H + 2 K H and F."""
    sizes = work.model.table.sizes
    hidden, heads, inner = multiples
    split = inner * sizes["F"] + heads * (sizes["N"] + 2 * sizes["K"]) * sizes["H"]
    return tokens_at_once(work, layout) * (hidden * sizes["D"] + split / layout.tensor)


def logit_bytes(work: Work, layout: Layout) -> float:
    """Of the logits that the head holds at once, in float32."""
    everything = 4 * tokens_at_once(work, layout) * work.model.vocab_size / layout.tensor
    is_split = by_vocabulary(work, layout) and layout.context == 1
    return min(everything, SPLIT_AT_MOST if is_split else FULL_AT_MOST)


def by_vocabulary(work: Work, layout: Layout) -> bool:
    """Whether the devices of fsdp have parts of the vocabulary, and not of the hidden size: see `sharding.weight_spec`."""
    return layout.fsdp > 1 and layout.tensor == 1 and work.model.vocab_size % layout.fsdp == 0


def _whole(work: Work, layout: Layout, paths: tuple[str, ...]) -> float:
    """Bytes of weights gathered from all devices of fsdp, as they travel."""
    if layout.fsdp == 1:
        return 0.0
    matrices = sum(work.sizes[path] for path in paths if work.model.table.params[path].is_matrix)
    return work.dtype_bytes * matrices / layout.tensor
