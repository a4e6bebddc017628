"""What a step on CPU devices really takes in memory, beside what its compiled program says: prints both as JSON.

Runs by itself, `python -m tests.plan.resident DEVICES`: Linux's high-water mark of resident pages is a process's. The
program is compiled and run once before anything is measured, so that threads and the compiler are not in it.
"""

import ctypes
import gc
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

SIZES = {
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
TREE: dict[str, Any] = {"run_dir": "none", "steps": 10, "batch_size": 32, "seq_len": 128, "tokenizer": "none"}


def _status(field: str) -> int:
    """Bytes, by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _settle() -> int:
    """Gives back what is free, sets the high-water mark down to what is resident now, and says how much that is."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def main(devices: int) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax

    from maxi import aot, mesh
    from maxi import step as steps
    from maxi.config import from_tree
    from maxi.data.loader import stack
    from maxi.made_up import made_up
    from maxi.params import init
    from maxi.plan.parts import allocated

    config = from_tree(TREE | {"data": {"train": [{"path": "none"}]}, "model": {"config": SIZES}}, "test")
    built = aot.program_of(config, mesh.build(config.mesh))
    rows = stack(made_up(config, built.objective.rows, built.model.vocab_size, 64, config.batch_size))
    new = jax.jit(partial(init, built.model.table), out_shardings=built.where.params)

    def first() -> tuple[Any, Any]:
        with jax.set_mesh(built.devices):
            return jax.block_until_ready((built.new_state(new(jax.random.key(0))), steps.put(rows, built.devices)))

    state, batch = first()
    done = aot.compile_step(built, state, batch, {})
    jax.block_until_ready(done.executable(state, batch, {}))
    del state, batch
    before = _settle()
    state, batch = first()
    _settle()
    after = jax.block_until_ready(done.executable(state, batch, {}))
    del after
    print(json.dumps({"measured": _status("VmHWM") - before, "said": devices * allocated(done.memory)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
