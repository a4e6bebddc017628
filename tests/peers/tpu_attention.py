"""Attention on TPU, maxi's kernel beside jax's splash: what the compiler's schedules cost, without a TPU.

    pip install libtpu
    python tests/peers/tpu_attention.py [--chip v5e] [--shapes qwen3 qwen2.5] [--keep DIR]

Both are compiled for a chip that this machine does not have, forward and backward. From the schedule that the compiler
leaves (bundles of instructions, one a cycle as far as nothing stalls) every part of a kernel is counted as often as it
runs: maxi's by the flags of its work lists, splash's by its blocks up to the diagonal. Rows are one document, or filled
with documents of lognormal length. B is 8 at 4,096 tokens: with less, operands stay in vector memory and copies vanish
from the schedule.
Memory is the compiler's buffer assignment for the forward and backward pass together.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SHAPES = {"qwen3": (16, 8, 128), "qwen2.5": (14, 2, 64)}
WORK = {
    "one document": (8, 4096, None),
    "mean 512": (8, 4096, 512),
    "mean 2048": (8, 4096, 2048),
    "a training step, 4 x 2048": (4, 2048, None),
    "32k, mean 512": (1, 32768, 512),
    "32k, one document": (1, 32768, None),
}
SPREAD, SEEDS = 1.0, 4
"""Standard deviation of the logarithm of lengths; rows drawn anew so many times."""
SPLASH_BLOCK = 512
"""Costs splash less than 1024 at 4,096 tokens on v5e, by 6 %, and 3 % more at 32,768."""
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


class Part(NamedTuple):
    """Bundles that run when (flags & mask) == value, or, with `value` None, when it is not 0; always with mask 0."""

    bundles: int
    mask: int
    value: int | None
    matmuls: bool


def parts(text: str) -> list[Part]:
    """The parts of a kernel's loop: its `pl.when`s by the flags they test (mask -1 where they test something else), and the
    rest, which runs every step."""
    lines: list[tuple[int, str, str]] = []
    for line in text.splitlines():
        if match := re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w)?\s*:(.*)", line):
            lines.append((int(match[1], 16), match[2] or "", match[3]))
        elif lines:
            lines[-1] = (*lines[-1][:2], lines[-1][2] + line)
    ends = {name: at for at, _, code in lines for name in re.findall(r"(?:Start/End empty region|End region) (\d+)", code)}
    begin = next(at for at, label, _ in lines if label == "LB")
    defined: dict[str, str] = {}
    found: list[Part] = []
    inside = 0
    for at, _, code in lines:
        defined.update(re.findall(r"%(\w+) = (s\w+\.\S+ [^;}]*)", code))
        branch = re.search(r"sbr\.rel \(%(\w+)\) target = \$region(\d+)", code)
        if at < max(begin, inside) or not branch or branch[2] not in ends:
            continue
        end = ends[branch[2]]
        body = [code for place, _, code in lines if at < place < end]
        if any("sbr.rel" in code for code in body) or not any("vst" in code for code in body):
            continue  # around others, or starts and awaits copies: taken to run every step
        test = re.match(r"scmp\.(eq|ne)\.s32\S* %(\w+), (\d+)", defined.get(branch[1], ""))
        flags = re.match(r"sand\.u32 (?:%\w+, )?(\d+)", defined.get(test[2], "")) if test else None
        value = int(test[3]) if test and (test[1], test[3]) != ("eq", "0") else None
        matmuls = any("vmatmul" in code for code in body)
        found.append(Part(end - at - 4, int(flags[1]) if flags else -1, value, matmuls))
        inside = end
    rest = next((at for at, label, _ in reversed(lines) if label == "PF"), lines[-1][0]) - begin
    return [*found, Part(rest - sum(part.bundles for part in found), 0, 0, False)]


def ours(text: str, flags: np.ndarray) -> int:
    """Bundles of one sweep over a work list with these flags."""
    total = 0
    for part in parts(text):
        if part.mask < 0:
            raise ValueError(f"a part of {part.bundles} bundles tests no flag")
        masked = flags & part.mask
        total += part.bundles * int((masked != 0 if part.value is None else masked == part.value).sum())
    return total


def splashs(text: str, T: int) -> int:
    """Bundles for one head and row: steps and matmuls for blocks up to the diagonal, as if its grid had no others, and what
    begins and ends a block once each."""
    blocks = T // SPLASH_BLOCK
    visits = blocks * (blocks + 1) // 2
    return sum(part.bundles * (visits if part.matmuls or not part.mask else blocks) for part in parts(text))


def rows(B: int, T: int, mean: int | None, seed: int) -> np.ndarray:
    """Segments of full rows; the last document of a row is cut off."""
    rng = np.random.default_rng(seed)
    out = np.ones((B, T), np.int32)
    if mean is None:
        return out
    for row in out:
        sizes = np.maximum(rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, T).astype(int), 1)
        row[:] = np.repeat(np.arange(T), sizes)[:T] + 1
    return out


def positions(segments: np.ndarray) -> np.ndarray:
    begins = np.concatenate([np.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)
    place = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    return (place - np.maximum.accumulate(np.where(begins, place, 0), 1)).astype(np.int32)


class Compiled(NamedTuple):
    """Schedules by kernel, and MiB of temporary memory and results."""

    schedules: list[str]
    mib: int


def _compile(dump: Path, names: tuple[str, ...], function: Any, *arrays: Any) -> Compiled:
    import jax

    shutil.rmtree(dump, ignore_errors=True)
    memory = jax.jit(function).lower(*arrays).compile().memory_analysis()
    assert memory is not None
    found = []
    for name in names:
        match = [path for path in dump.iterdir() if name in path.name and re.search(r"-\d+-final_bundles", path.name)]
        if len(match) != 1:
            raise FileNotFoundError(f"{len(match)} schedules of {name} in {dump}")
        found.append(match[0].read_text("utf-8"))
    return Compiled(found, (memory.temp_size_in_bytes + memory.output_size_in_bytes) >> 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, default="v5e")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--blocks", type=int, nargs=4, help="instead of the table's: queries, keys forward; the same backward")
    parser.add_argument("--keep", type=Path, help="a folder for the compiler's files")
    options = parser.parse_args()
    folder = (options.keep or Path(tempfile.mkdtemp())).resolve()
    flags = (f"--xla_jf_dump_to={folder}", "--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_pass_label_regex=.*final.*")
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags)
    results = []
    for shape in options.shapes:
        compiled: dict[int, Any] = {}
        for name in options.work:
            line = measure(folder, options, shape, name, compiled)
            results.append(line)
            print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    print(json.dumps(results))
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, options: argparse.Namespace, shape: str, name: str, compiled: dict[int, Any]) -> dict[str, Any]:
    """One line of the table; programs depend on T alone and are kept in `compiled`."""
    (N, K, H), (B, T, mean) = SHAPES[shape], WORK[name]
    if T not in compiled:
        sizes, heads, mine = _ours(folder, options, B, T, N, K, H)
        compiled[T] = (sizes, heads, mine, _splash(folder, options.chip, B, T, N, K, H))
    sizes, heads, mine, theirs = compiled[T]
    import jax

    from maxi.kernels.attention import tpu

    cost = []
    for seed in range(SEEDS if mean else 1):
        segments = rows(B, T, mean, seed)
        ready = jax.jit(partial(tpu._prepare, sizes, None, contexts_BT=None))(positions(segments), segments)
        lists = [np.asarray(todo.step)[: int(todo.size)] & 0xFF for todo in (ready.forward, ready.backward)]
        sweeps = [K // n * ours(text, flags) for n, text, flags in zip(heads, mine.schedules, lists, strict=True)]
        cost.append(sweeps)
    forward, backward = np.mean(cost, 0)
    splash = [B * N * splashs(text, T) for text in theirs.schedules]
    return {
        "shape": shape,
        "rows": name,
        "blocks": tuple(sizes.blocks),
        "chunk": sizes.chunk,
        "heads": heads,
        "Mbundles": round(float(forward + backward) / 1e6, 2),
        "splash": round(sum(splash) / 1e6, 2),
        "share": round(float(forward + backward) / sum(splash), 3),
        "forward": round(float(forward) / splash[0], 3),
        "backward": round(float(backward) / sum(splash[1:]), 3),
        "MiB": mine.mib,
        "splash MiB": theirs.mib,
    }


def _arrays(chip: str, *shapes: tuple[Any, tuple[int, ...]]) -> list[Any]:
    import jax
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    where = jax.sharding.SingleDeviceSharding(device)
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for dtype, shape in shapes]


def _ours(folder: Path, options: argparse.Namespace, B: int, T: int, N: int, K: int, H: int) -> tuple[Any, Any, Compiled]:
    import jax
    import jax.numpy as jnp

    from maxi.kernels.attention import tpu, tpu_blocks

    sizes = tpu_blocks.choose(tpu.Shape(B, T, N, K, H, jnp.bfloat16), options.chip, options.blocks)
    assert sizes is not None, (B, T)
    plan = tpu.plan(sizes, H**-0.5, N // K, K, False)

    def gradients(q, k, v, dout, positions, segments):
        ready = tpu._prepare(sizes, None, positions, segments, None)
        return jax.vjp(lambda q, k, v: tpu._attention(plan, q, k, v, ready), q, k, v)[1](dout)

    many, few = (jnp.bfloat16, (B, K, N // K, T, H)), (jnp.bfloat16, (B, K, T, H))
    arrays = _arrays(options.chip, many, few, few, many, (jnp.int32, (B, T)), (jnp.int32, (B, T)))
    return sizes, plan.heads, _compile(folder, ("attention_forward", "attention_backward"), gradients, *arrays)


def _splash(folder: Path, chip: str, B: int, T: int, N: int, K: int, H: int) -> Compiled:
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    size = SPLASH_BLOCK
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    blocks = splash.BlockSizes(**dict.fromkeys(names, size), block_kv_compute=size, block_kv_dkv_compute=size)
    causal = masks.MultiHeadMask([masks.CausalMask((T, T))] * N)
    kernel = splash.make_splash_mha(causal, block_sizes=blocks, head_shards=1, q_seq_shards=1)

    def gradients(q, k, v, dout, segments):
        def values(q, k, v):
            return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids)))(q * H**-0.5, k, v, segments)

        return jax.vjp(values, q, k, v)[1](dout)

    many, few = (jnp.bfloat16, (B, N, T, H)), (jnp.bfloat16, (B, K, T, H))
    arrays = _arrays(chip, many, few, few, many, (jnp.int32, (B, T)))
    return _compile(folder, ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"), gradients, *arrays)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
