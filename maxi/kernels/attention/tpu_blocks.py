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
STACKED, KEYS = 512, 512
"""Queries times heads of a group, and keys, in a tile where the table has no entry."""
CHIPS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
VMEM_MIB = {"v5e": 64, "v5p": 48, "v6e": 64}
"""What the kernels may take of a core's vector memory (128, 64 and 128 MiB); other chips are taken to have `LEAST_MIB`."""
LEAST_MIB = 14
HEADS = 4
"""Most key heads in a step."""
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


TABLE: dict[tuple[str, int, int], Blocks] = {}
"""By chip, G and H."""


def chip() -> tuple[str, int]:
    """Short name of the TPU that is being compiled for ("" for one that is not known), and its cores."""
    found = device()
    if found is None and platform() == jax.default_backend() == "tpu":
        found = jax.devices()[0]
    return CHIPS.get(getattr(found, "device_kind", ""), ""), getattr(found, "num_cores", None) or 1


def _wanted(name: str, G: int, H: int) -> Blocks:
    queries = max(LANES, STACKED // G // LANES * LANES)
    return TABLE.get((name, G, H), Blocks(queries, KEYS, queries, KEYS))


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
        entries = [B * most(T, q, k) for q, k in ((q_forward, k_forward), (q_backward, k_backward))]
        if 8 * max(entries) <= SMEM_BYTES:
            return Sizes(blocks, T, _chunk(G, call.H, call.dtype, blocks, T, vmem), *entries, vmem, cores)
    return None


def _most_heads(blocks: Blocks, G: int) -> int:
    return max(1, min(HEADS, HEADS * STACKED // (G * max(blocks.q_forward, blocks.q_backward))))


def heads(sizes: Sizes, G: int, K: int) -> int:
    """How many of a device's K key heads one step does: no more than is worth its code, and some for every core."""
    most = min(_most_heads(sizes.blocks, G), max(1, K // sizes.cores))
    return max(n for n in range(1, most + 1) if K % n == 0)


def _chunk(G: int, H: int, dtype: Any, blocks: Blocks, T: int, vmem: int) -> int:
    """As many queries as have room for their gradients, float32 and, twice, as they are written; whole blocks, all equal."""
    width = _most_heads(blocks, G) * G * -(-H // LANES) * LANES
    room = vmem // 2 // (width * (4 + 2 * jnp.dtype(dtype).itemsize))
    return _divisor(T, room, math.lcm(blocks.q_backward, blocks.k_backward))
