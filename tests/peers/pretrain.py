"""A pretraining step: maxi beside transformers, on a CPU, in float32 and in bfloat16.

    python tests/peers/pretrain.py [--shape 26m|0.5b] [--rows 2] [--tokens 512] [--rounds 5] [--steps 4]

Each side is a process of its own with all cores, run in turns; a figure is the median over rounds of the median step.
transformers: eager attention by its default (sdpa), fused AdamW, clipping, bfloat16 by autocast. maxi: the step that
`maxi train` takes, with the same optimizer and clipping. Both count whole rows of one document.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from rows import MODEL

SHAPES: dict[str, dict[str, Any]] = {
    "26m": {**MODEL, "model_type": "qwen3"},
    "0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
}
DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="26m")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--role", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        side, dtype = options.role.split(",")
        print(json.dumps((_maxi if side == "maxi" else _transformers)(options, dtype)))
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for dtype in options.dtypes:
            for side in ("transformers", "maxi"):
                found.setdefault((side, dtype), []).append(_run(f"{side},{dtype}"))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    print(f"{options.shape}, {options.rows} x {options.tokens} tokens, seconds a step (peak GiB)")
    for dtype in options.dtypes:
        seconds = {side: statistics.median(r["s"] for r in found[side, dtype]) for side in ("transformers", "maxi")}
        memory = {side: max(r["GiB"] for r in found[side, dtype]) for side in seconds}
        sides = ", ".join(f"{side} {seconds[side]:.3f} ({memory[side]:.2f})" for side in seconds)
        print(f"{dtype}: {sides}: {seconds['transformers'] / seconds['maxi']:.2f} times as fast")


def _run(role: str) -> dict[str, float]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *sys.argv, "--role", role], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{role} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measured(step: Any, steps: int) -> dict[str, float]:
    """Median seconds of `step()`, which waits for its end, after two steps that do not count; and this process's peak."""
    taken = []
    for number in range(steps + 2):
        start = time.perf_counter()
        step()
        if number >= 2:
            taken.append(time.perf_counter() - start)
    return {"s": statistics.median(taken), "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def _transformers(options: argparse.Namespace, dtype: str) -> dict[str, float]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(SHAPES[options.shape])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> None:
        ids = torch.randint(0, config.vocab_size, (options.rows, options.tokens + 1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().view(-1, config.vocab_size), ids[:, 1:].reshape(-1))
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return _measured(step, options.steps)


def _maxi(options: argparse.Namespace, dtype: str) -> dict[str, float]:
    from maxi.runtime import set_up

    set_up()
    import jax
    import numpy as np

    from maxi import mesh, objectives, program
    from maxi import step as steps
    from maxi.models import from_hf_config
    from maxi.params import init
    from maxi.sections import ComputeConfig, MeshConfig, OptimConfig

    model = from_hf_config(SHAPES[options.shape])
    compute = ComputeConfig(dtype=dtype)  # type: ignore[arg-type]
    optim = OptimConfig(lr=1e-4, weight_decay=0.0)
    devices = mesh.build(MeshConfig())
    built = program.build(model, objectives.build("pretrain"), compute, optim, devices, 1000, 1)
    rng = np.random.default_rng(0)
    shape = (options.rows, options.tokens)
    places = {
        "positions": np.tile(np.arange(options.tokens, dtype=np.int32), (options.rows, 1)),
        "segments": np.ones(shape, np.int32),
        "loss_weight": np.ones(shape, np.float32),
    }
    with jax.set_mesh(devices):
        first = jax.jit(lambda key: init(model.table, key))(jax.random.key(0))
        state = built.new_state(first, consume=True)
        take, settle = built.step(), steps.Settle()

        def step() -> None:
            nonlocal state
            ids = {name: rng.integers(0, model.vocab_size, shape, np.int32) for name in ("tokens", "targets")}
            batch = steps.put(ids | places, devices)
            settle(state)
            state, metrics = take(state, batch)
            float(metrics["train/loss"])

        return _measured(step, options.steps)


if __name__ == "__main__":
    main()
