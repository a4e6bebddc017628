"""The alphabet: one letter per tensor dimension, the same in names, einsum strings, parameter tables and shardings.

A tensor is named `what_LETTERS` (`q_BTNH`), an einsum string is made of these letters, a `Param` declares its
dimensions with them, and `sharding.py` says which mesh axis a letter is split over. Words are mesh axes, letters
are dimensions. `tests/test_dims.py` holds the source to it.
"""

DIMS: dict[str, str] = {
    "B": "batch (sequences)",
    "T": "query or token position",
    "S": "key/value position",
    "D": "hidden_size",
    "F": "intermediate_size",
    "V": "vocab_size",
    "L": "layers of one kind, stacked",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads per key/value head, N // K",
    "H": "head_dim",
    "M": "micro-batches",
    "C": "chunks or blocks",
    "P": "pairs of answers in a row",
    "R": "rank of an adapter",
}

MESH_AXES: tuple[str, ...] = ("replica", "fsdp", "context", "tensor")
"""Mesh axes, slowest network first: whole copies, sharded copies (ZeRO-3), split sequences, split layers (Megatron)."""
