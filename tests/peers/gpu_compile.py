"""maxi's attention kernels as machine code of a GPU that is not here: registers, spills, shared memory, loop lengths.

    make gpu-compile

Needs Python 3.12, jax[cuda13] 0.12 and no GPU: XLA compiles for the chip that `maxi/plan/h100.txtpb` describes. XLA calls the
ptxas of the pip packages; a script stands in its place that asks it to be verbose and keeps what it makes. jax's own
Triton kernel is compiled beside ours, with keys and values repeated for every query head, as it wants them.

    registers     of a thread
    spilled       bytes that a thread stores because registers did not suffice; of ours more than 64 is an error
    shared KiB    of a program, as XLA launches it
    loop          instructions of the loop over blocks, of jax's backward kernel of both (needs nvidia-cuda-nvdisasm)
    a tile        those, times warps, over four schedulers: cycles to issue them for 64 x 64 scores
    temporary     MiB that the whole program allocates beside arguments and results, forward and backward
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

CHIP = Path(__file__).parents[2] / "maxi/plan/h100.txtpb"
B, T = 8, 4096
SPILLED = 64
SHAPES = ((16, 8, 128, "bfloat16"), (14, 2, 64, "bfloat16"), (8, 8, 96, "bfloat16"), (8, 2, 256, "bfloat16"))
SHAPES += tuple((16, 8, H, "float32") for H in (64, 128, 256))

PTXAS = """#!/bin/sh
{real} --verbose "$@" 2>> {log} || exit $?
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then cp "$2" {kept}/$$.cubin; fi; shift; done
"""


class Kernel(NamedTuple):
    registers: int
    spilled: int
    shared: int
    loop: int | None


class Toolkit:
    """A folder that looks like the CUDA of the pip packages and remembers what ptxas did."""

    def __init__(self, folder: Path):
        found = importlib.util.find_spec("nvidia.cu13")
        if found is None or not found.submodule_search_locations:
            sys.exit('this needs CUDA 13 from pip: pip install "jax[cuda13]" (Python 3.12 or later)')
        self._real, self._folder = Path(found.submodule_search_locations[0]), folder
        (folder / "bin").mkdir()
        for part in self._real.iterdir():
            if part.name != "bin":
                (folder / part.name).symlink_to(part)
        for tool in (self._real / "bin").iterdir():
            (folder / "bin" / tool.name).symlink_to(tool)
        wrapper, self._log = folder / "bin" / "ptxas", folder / "ptxas.log"
        wrapper.unlink()
        wrapper.write_text(PTXAS.format(real=self._real / "bin" / "ptxas", log=self._log, kept=folder))
        wrapper.chmod(0o755)
        os.environ["CUDA_ROOT"] = str(folder)

    def forget(self) -> None:
        for kept in (self._log, *self._folder.glob("*.cubin"), *self._folder.glob("*thunk_sequence.txt")):
            kept.unlink(missing_ok=True)

    def kernels(self) -> dict[str, Kernel]:
        """What was compiled since `forget`, by name."""
        said = self._log.read_text()
        thunks = "".join(path.read_text() for path in self._folder.glob("*thunk_sequence.txt"))
        loops = dict(filter(None, map(self._loop, self._folder.glob("*.cubin"))))
        found = {}
        pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        for name, spilled, registers in re.findall(pattern, said, re.DOTALL):
            if shared := re.search(rf"\b{name} grid.*shared_memory: (\d+)", thunks):
                found[name] = Kernel(int(registers), int(spilled), int(shared[1]), loops.get(name))
        return found

    def _loop(self, cubin: Path) -> tuple[str, int] | None:
        """(kernel, instructions of its innermost loops that multiply matrices)."""
        tool = self._real / "bin" / "nvdisasm"
        if not tool.exists():
            return None
        text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
        name, labels, code = re.search(r"\.text\.(\w+):", text), {}, []
        for line in map(str.strip, text.splitlines()):
            if label := re.match(r"\.(L_x_\w+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*)", line):
                code.append(instruction[1])
        loops = []
        for at, instruction in enumerate(code):
            target = re.search(r"BRA.*`\(\.(L_x_\w+)\)", instruction)
            if target and (start := labels.get(target[1], len(code))) <= at and any("MMA" in step for step in code[start:at]):
                loops.append((start, at))
        inner = [(a, z) for a, z in loops if not any(a <= b and y <= z for b, y in loops if (b, y) != (a, z))]
        return (name[1], sum(z - a + 1 for a, z in inner)) if name and inner else None


def compiled(program: Callable[..., Any], heads: tuple[int, int, int], dtype: str, rows: tuple[int, int], mesh: Any) -> float:
    """Compiles the gradient of `program(q, k, v, places)` for the mesh's devices; MiB of temporary memory."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from maxi.kernels import platform

    N, K, H = heads

    def array(shape: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(q, k, v, *places):
        return program(q, k, v, places).sum(dtype=jnp.float32)

    arguments = [array((*rows, n, H), dtype) for n in (N, K, K)] + [array(rows, jnp.int32)] * 3
    with platform.compiling_for("gpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        made = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile()
    memory = made.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / 2**20


def ours(q, k, v, places, backend: str = "gpu", contexts: bool = True):
    from maxi.kernels.attention import attention

    positions, segments, shared = places
    known = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}
    return attention(q, k, v, **known, q_contexts=shared if contexts else None, backend=backend)


def jaxs(q, k, v, places):
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu.attention import mha

    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    return mha(q, k, v, places[1], sm_scale=q.shape[-1] ** -0.5, causal=True)


def _line(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def _table(toolkit: Toolkit, mesh: Any) -> int:
    """Prints it; how many of our kernels spill."""
    from maxi.kernels.attention.gpu import Tile, tiles_of

    _line(
        "heads, dtype",
        "kernel",
        "queries x keys",
        "warps, stages",
        "registers",
        "spilled",
        "shared KiB",
        "loop",
        "a tile",
        "temporary",
    )
    _line(*["---"] * 10)
    spills = 0
    for N, K, H, dtype in SHAPES:
        what, tiles = f"{N}/{K} of {H}, {dtype}", tiles_of(dtype, H, T)
        theirs = {"mha_forward": Tile(128, 128, 4 if H <= 64 else 8, 2), "mha_backward": Tile(32, 32, 4, 2)}
        known = {f"{name}_kernel": tile for name, tile in tiles._asdict().items()}
        for program, ran in ((ours, known), (jaxs, theirs)):
            if program is jaxs and dtype == "float32":
                continue
            toolkit.forget()
            try:
                memory = f"{compiled(program, (N, K, H), dtype, (B, T), mesh):.0f}"
            except Exception as error:
                if program is ours:
                    raise
                _line(what, "jax's", str(error).splitlines()[0][:120], *[""] * 7)
                continue
            kernels = toolkit.kernels()
            for name, tile in ran.items():
                kernel = kernels[name]
                cost = "" if kernel.loop is None else round(kernel.loop * tile.warps * 1024 / (tile.queries * tile.keys))
                size, shared = f"{tile.queries} x {tile.keys}", f"{kernel.shared / 1024:.0f}"
                numbers = (kernel.registers, kernel.spilled, shared, kernel.loop or "", cost)
                _line(what, name, size, f"{tile.warps}, {tile.stages}", *numbers, memory)
                spills += program is ours and kernel.spilled > SPILLED
    return spills


def _shares(toolkit: Toolkit, mesh: Any) -> None:
    """Issue cycles of a tile times tiles visited, forward and backward, over those of jax's kernels."""
    import jax.numpy as jnp
    import numpy as np

    from maxi.kernels import platform
    from maxi.kernels.attention import prepare
    from maxi.kernels.attention.gpu import tiles_of

    heads, dtype = (16, 8, 128), "bfloat16"
    tiles = tiles_of(dtype, heads[2], T)
    toolkit.forget()
    compiled(partial(ours, contexts=False), heads, dtype, (B, T), mesh)
    compiled(jaxs, heads, dtype, (B, T), mesh)
    loops = {name: kernel.loop or 0 for name, kernel in toolkit.kernels().items()}
    triangle = [sum(range(1, T // size + 1)) * B for size in (128, 32)]
    theirs = loops["mha_forward"] * 8 * triangle[0] + loops["mha_backward"] * 4 * triangle[1]
    print("\ninstructions times tiles visited, as a share of jax's, 16/8 heads of 128, no contexts:")
    rng = np.random.default_rng(0)
    for mean in (None, 2048, 512):
        sizes = [[T]] * B if mean is None else rng.lognormal(np.log(mean) - 0.5, 1.0, (B, T)).astype(int).clip(16)
        segments = jnp.asarray(np.stack([np.repeat(np.arange(1, len(row) + 1), row)[:T] for row in sizes]), jnp.int32)
        starts = np.stack([np.concatenate([np.arange(n) for n in row])[:T] for row in sizes])
        with platform.compiling_for("gpu"):
            ready = prepare(heads, dtype, jnp.asarray(starts, jnp.int32), segments, backend="gpu")
        mine = 0
        for name, tile in tiles._asdict().items():
            mine += loops[f"{name}_kernel"] * tile.warps * int(getattr(ready, name)[..., 1].sum())
        print(f"  documents of {mean or T}{'' if mean is None else ', lognormal'}: {mine / theirs:.2f}", flush=True)


def _memory(mesh: Any) -> None:
    print("\ntemporary MiB of one row, 16/8 heads of 128, bfloat16:")
    for length in (4096, 8192, 32768, 131072):
        print(f"  {length:7} tokens: {compiled(ours, (16, 8, 128), 'bfloat16', (1, length), mesh):.1f}", flush=True)


def _cudnn(mesh: Any) -> None:
    def program(q, k, v, places):
        return ours(q, k, v, places, "cudnn", contexts=False)

    memory = compiled(program, (16, 8, 128), "bfloat16", (B, T), mesh)
    print(f"\ncuDNN, 16/8 heads of 128, bfloat16: compiles (a call, planned on the device only); temporary {memory:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", type=Path, default=CHIP, help="XLA's description of the GPU")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    with tempfile.TemporaryDirectory() as folder:
        toolkit = Toolkit(Path(folder))
        by_subprocess = "--xla_gpu_enable_libnvptxcompiler=false --xla_gpu_enable_libnvjitlink=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {by_subprocess} --xla_dump_to={folder}"
        os.environ["JAX_PLATFORMS"] = "cpu"

        import jax
        import numpy as np
        from jax.experimental import topologies

        from maxi.dims import MESH_AXES

        description = chosen.chip.read_text("utf-8")
        gpu = topologies.get_topology_desc("h100", platform="cuda", target_config=description, topology="1x1x1").devices[0]
        mesh = jax.sharding.Mesh(np.array([gpu]).reshape((1,) * len(MESH_AXES)), MESH_AXES)
        print(f"jax {jax.__version__}, for {gpu.device_kind}; {B} rows of {T} tokens\n")
        spills = _table(toolkit, mesh)
        _shares(toolkit, mesh)
        _memory(mesh)
        _cudnn(mesh)
    if spills:
        sys.exit(f"{spills} of maxi's kernels spill registers")


if __name__ == "__main__":
    main()
