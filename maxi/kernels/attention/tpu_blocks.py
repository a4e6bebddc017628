"""Block sizes of the TPU attention kernel, by chip and shape, with where each number comes from."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxi import sharding
from maxi.kernels.attention.work import most
from maxi.kernels.platform import device, platform

LANES = 128
"""Key blocks, and query blocks times the heads of a group, are multiples of this."""
STACKED, KEYS = 512, 512
"""Queries times heads of a group, and keys, in a tile where the table has no entry."""
CHIPS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
VMEM_MIB = {"v5e": 64, "v5p": 48, "v6e": 64}
"""What the kernels may take of a core's vector memory (128, 64 and 128 MiB); other chips are taken to have `LEAST_MIB`."""
LEAST_MIB = 14
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


def _even(length: int, block: int) -> int:
    """The block of at most `block` that cuts `length` into its fewest blocks with the least padding."""
    count = -(-length // block)
    return -(-length // count // LANES) * LANES


def _divisor(length: int, block: int, unit: int) -> int:
    """The largest multiple of `unit` that divides `length` and is at most `block`; `unit` if none is."""
    return max((size for size in range(unit, block + 1, unit) if length % size == 0), default=unit)


def _entries(call: Any) -> tuple[Blocks, str, int]:
    name, cores = chip()
    G = call.N // call.K
    queries = max(LANES // math.gcd(G, LANES), STACKED // G)
    return TABLE.get((name, G, call.H), Blocks(queries, KEYS, queries, KEYS)), name, cores


def choose(call: Any) -> Sizes | None:
    """Sizes for `maxi.kernels.attention.Call`; None where no work list that fits is possible."""
    wanted, name, cores = _entries(call)
    G, B = call.N // call.K, call.B // sharding.shards("B")
    vmem = VMEM_MIB.get(name, LEAST_MIB) << 20
    for grown in (1, 2, 4):
        keys = _even(call.T, max(wanted.k_forward, wanted.k_backward) * grown)
        T = -(-call.T // keys) * keys
        unit = max(16, LANES // math.gcd(G, LANES))
        k_forward, k_backward = (_divisor(T, k * grown, LANES) for k in (wanted.k_forward, wanted.k_backward))
        q_forward, q_backward = (_divisor(T, q * grown, unit) for q in (wanted.q_forward, wanted.q_backward))
        blocks = Blocks(q_forward, k_forward, q_backward, k_backward)
        entries = [B * most(T, q, k) for q, k in ((q_forward, k_forward), (q_backward, k_backward))]
        if 8 * max(entries) <= SMEM_BYTES:
            return Sizes(blocks, T, _chunk(call, blocks, T, vmem), *entries, vmem, cores)
    return None


def _chunk(call: Any, blocks: Blocks, T: int, vmem: int) -> int:
    """As many queries as have room for their gradients, float32 and, twice, as they are written; whole blocks, all equal."""
    unit = math.lcm(blocks.q_backward, blocks.k_backward)
    width = -(-call.H // LANES) * LANES * call.N // call.K
    room = vmem // 2 // (width * (4 + 2 * jnp.dtype(call.dtype).itemsize))
    return _divisor(T, room, unit)
