"""A run so small that whole ones fit into a test: one layer, sixteen letters of state, text made by hand."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxi.data import bpe

CONFIG = """
run_dir: {folder}/run
steps: {steps}
batch_size: 4
seq_len: 32
tokenizer: {home}/tokenizer
model:
  config: {{model_type: qwen3, vocab_size: 300, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8, max_position_embeddings: 64}}
data: {{train: [{{path: {home}/text.jsonl}}], eval_share: 0.1, cache_dir: {home}/cache}}
optim: {{lr: 1.0e-2, warmup_ratio: 0.1, ema: 0.5}}
checkpoint: {{every: 2}}
eval: {{every: 4, max_rows: 4, prompts: [the file], max_new_tokens: 4}}
log: {{every: 1}}
export_dtype: float32
"""
SIZES = {
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
"""config.json of a model for whoever needs only that there is one."""
SENTENCE = "the sea was calm and the rain was dark over home and bread in the wind"
WORDS = ["the", "file", "object", "has", "a", "name", "and", "can", "be", "read", "line", "by", "until", "it", "ends", "first"]


def prepare(home: Path) -> Path:
    """Text and a tokenizer in `home`, which any number of runs may share."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(20, 60))) + "." for _ in range(60)]
    home.mkdir(parents=True, exist_ok=True)
    (home / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    bpe.train(texts, 300, home / "tokenizer")
    return home


def configure(home: Path, folder: Path, steps: int = 8) -> Path:
    """A config for a run in `folder`/run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(home=home, folder=folder, steps=steps))
    return path


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Of a process with so many CPU devices; the suite's own has eight."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **more}


def start(config: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    """`maxi train` in a process of its own, with one device."""
    return start_with(environment(1, **more), config, *words)


def start_with(env: dict[str, str], config: Path, *words: str) -> subprocess.Popen[str]:
    """The same with an `environment`."""
    command = [sys.executable, "-m", "maxi", "train", str(config), *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def members(number: int) -> list[dict[str, str]]:
    """What the environments of so many processes of one run say; nothing for one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{found.getsockname()[1]}"
    common = {"JAX_COORDINATOR_ADDRESS": where, "JAX_NUM_PROCESSES": str(number)}
    return [common | {"JAX_PROCESS_ID": str(i)} for i in range(number)] if number > 1 else [{}]


def arrays(run: Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint with its bytes, read by Orbax without maxi."""
    import orbax.checkpoint as ocp

    found = {}
    for item in sorted(path for path in (run / "checkpoints" / str(step)).iterdir() if path.is_dir()):
        handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        tree = handler.metadata(item.absolute()).item_metadata.tree  # type: ignore[union-attr]
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        made = handler.restore(item.absolute(), args=ocp.args.PyTreeRestore(restore_args=how))
        for path, leaf in jax.tree_util.tree_leaves_with_path(made):
            found[item.name + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return found


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def assert_same_run(one: Path, other: Path, but: Sequence[str] = ()) -> None:
    """The same records, the same export, the same newest checkpoint, byte by byte."""
    for name in ("metrics.jsonl", "samples.jsonl", "hf/model.safetensors", "hf/config.json"):
        if name not in but:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert steps_of(one) == steps_of(other)
    last = steps_of(one)[-1]
    mine, theirs = arrays(one, last), arrays(other, last)
    assert mine.keys() == theirs.keys() and len(mine) > 10
    assert not [name for name in mine if mine[name] != theirs[name]]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
