"""Block sizes of the TPU attention kernel, by chip and shape, with where each number comes from."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxi import sharding
from maxi.kernels.attention.work import most
from maxi.kernels.platform import device, platform

LANES = 128
"""All blocks are multiples of this."""
CHIPS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
VMEM_MIB = {"v5e": 64, "v5p": 48, "v6e": 64, "tpu7x": 48}
"""What the kernels may take of a core's vector memory (128, 64, 128 and 64 MiB)."""
LEAST_MIB = 14
"""And of that of other chips (16 MiB)."""
HEADS, STACKED = 4, 4096
"""Most key heads in a step, and most queries times query heads."""
SMEM_BYTES = 768 << 10
"""What a work list may take of a core's scalar memory (1 MiB on all of them)."""


class Blocks(NamedTuple):
    """Queries and keys in a tile, forward and backward."""

    q_forward: int
    k_forward: int
    q_backward: int
    k_backward: int


class Sizes(NamedTuple):
    """What is chosen for a call: `T` with its padding, how many queries the backward pass takes at once (`chunk`), the
    most entries that work lists can have, bytes of vector memory, and the cores of the chip."""

    blocks: Blocks
    T: int
    chunk: int
    entries_forward: int
    entries_backward: int
    vmem: int
    cores: int


TABLE = {
    ("v5e", 2, 128): Blocks(256, 512, 256, 256),
    ("v5p", 2, 128): Blocks(256, 512, 256, 256),
    ("v6e", 2, 128): Blocks(256, 512, 256, 512),
    ("v5e", 7, 64): Blocks(256, 256, 256, 256),
    ("v5p", 7, 64): Blocks(256, 256, 256, 256),
    ("v6e", 7, 64): Blocks(256, 512, 256, 256),
}
"""By chip, G and H. Every entry has the least product of scheduled bundles over rows of 4,096 tokens that are one document,
documents of mean 512 and of mean 2,048, of blocks of 128, 256 and 512 queries with 256, 512 and 1,024 keys, counted as
`tests/peers/tpu_attention.py` does with libtpu 0.0.52; none was timed on a chip."""


def _wanted(name: str, G: int, H: int) -> Blocks:
    """Without an entry: what is best or next to it on v5e, counted the same way, for heads of 128 and G of 1, 4 and 8."""
    other = Blocks(min(256, max(LANES, 512 // G)), 512, 512 if G == 1 else 256, 256)
    return TABLE.get((name, G, H), other)


def chip() -> tuple[str, int]:
    """Short name of the TPU that is being compiled for ("" for one that is not known), and its cores."""
    found = device()
    if found is None and platform() == jax.default_backend() == "tpu":
        found = jax.devices()[0]
    return CHIPS.get(getattr(found, "device_kind", ""), ""), getattr(found, "num_cores", None) or 1


def _even(length: int, block: int) -> int:
    """The block of at most `block` that cuts `length` into its fewest blocks with the least padding."""
    count = -(-length // block)
    return -(-length // count // LANES) * LANES


def _divisor(length: int, block: int, unit: int) -> int:
    """The largest multiple of `unit` that divides `length` and is at most `block`; `unit` if none is."""
    return max((size for size in range(unit, block + 1, unit) if length % size == 0), default=unit)


def choose(call: Any, name: str | None = None, blocks: Sequence[int] | None = None) -> Sizes | None:
    """Sizes for `maxi.kernels.attention.Call`, for the chip and with the blocks given or else found; None where no work list
    that fits is possible.

    They depend on N / K and not on either, so they are the same for the whole model and for a device's heads.
    """
    found, cores = chip()
    name = found if name is None else name
    wanted = Blocks(*blocks) if blocks else _wanted(name, call.N // call.K, call.H)
    G, B = call.N // call.K, call.B // sharding.shards("B")
    vmem = VMEM_MIB.get(name, LEAST_MIB) << 20
    for grown in (1, 2, 4):
        keys = _even(call.T, max(wanted.k_forward, wanted.k_backward) * grown)
        T = -(-call.T // keys) * keys
        k_forward, k_backward = (_divisor(T, k * grown, LANES) for k in (wanted.k_forward, wanted.k_backward))
        q_forward, q_backward = (_divisor(T, q * grown, LANES) for q in (wanted.q_forward, wanted.q_backward))
        blocks = Blocks(q_forward, k_forward, q_backward, k_backward)
        forward, backward = (B * most(T, q, k) for q, k in ((q_forward, k_forward), (q_backward, k_backward)))
        if 8 * max(forward, backward) <= SMEM_BYTES:
            chunk = _chunk(G, call.H, call.dtype, blocks, T, vmem)
            return Sizes(blocks, T, chunk, forward, backward, vmem, cores)
    return None


def _most_heads(stacked: int, vmem: int) -> int:
    return max(1, min(HEADS, STACKED // stacked)) if vmem >= 32 << 20 else 1


def heads(stacked: int, K: int, sizes: Sizes) -> int:
    """How many of a device's K key heads one step does, with tiles of `stacked` queries: no more than is worth its code, and
    some left for every core."""
    most = min(_most_heads(stacked, sizes.vmem), max(1, K // sizes.cores))
    return max(n for n in range(1, most + 1) if K % n == 0)


def _chunk(G: int, H: int, dtype: Any, blocks: Blocks, T: int, vmem: int) -> int:
    """As many queries as have room for their gradients, float32 and, twice, as they are written; whole blocks, all equal."""
    width = _most_heads(G * blocks.q_backward, vmem) * G * -(-H // LANES) * LANES
    room = vmem // 2 // (width * (4 + 2 * jnp.dtype(dtype).itemsize))
    return _divisor(T, room, math.lcm(blocks.q_backward, blocks.k_backward))
