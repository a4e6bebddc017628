"""Greedy decoding: maxi beside transformers' `generate`, on a CPU.

    python tests/peers/decode.py [--batches 1 8] [--new 128] [--prompt 32] [--rounds 5] [--dtypes float32 bfloat16]

Both load one folder of random weights (Qwen3's shape, 26 M parameters) and continue the same prompts, each side a process
of its own with all cores, in turns. A figure is the median over rounds of the median of three runs, prompts included and
compiling not. In float32 both sides have to make the same tokens, or the script exits with 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from rows import MODEL

RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--role", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        side, folder, dtype, batch = options.role.split(",")
        print(json.dumps((_maxi if side == "maxi" else _transformers)(options, folder, dtype, _prompts(options, int(batch)))))
        return
    differ = False
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        _prepare(folder)
        for dtype in options.dtypes:
            for batch in options.batches:
                found: dict[str, list[dict[str, Any]]] = {"transformers": [], "maxi": []}
                for _ in range(options.rounds):
                    for side, runs in found.items():
                        runs.append(_run(f"{side},{folder},{dtype},{batch}"))
                rates = {side: batch * options.new / statistics.median(run["s"] for run in found[side]) for side in found}
                same = found["maxi"][0]["tokens"] == found["transformers"][0]["tokens"]
                differ |= dtype == "float32" and not same
                sides = ", ".join(f"{side} {rate:.0f}" for side, rate in rates.items())
                times = rates["maxi"] / rates["transformers"]
                print(f"{dtype}, batch {batch}: tokens/s: {sides}: {times:.2f} times; {'the same' if same else 'other'} tokens")
    sys.exit(differ)


def _prompts(options: argparse.Namespace, batch: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(0, MODEL["vocab_size"], (batch, options.prompt)).tolist()


def _prepare(folder: str) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**MODEL, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)


def _run(role: str) -> dict[str, Any]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *sys.argv, "--role", role], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{role} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measured(run: Callable[[], list[list[int]]]) -> dict[str, Any]:
    tokens, taken = run(), []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return {"s": statistics.median(taken), "tokens": tokens}


def _transformers(options: argparse.Namespace, folder: str, dtype: str, prompts: list[list[int]]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor(prompts)

    def run() -> list[list[int]]:
        with torch.no_grad():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new, do_sample=False)
        return made[:, options.prompt :].tolist()

    return _measured(run)


def _maxi(options: argparse.Namespace, folder: str, dtype: str, prompts: list[list[int]]) -> dict[str, Any]:
    from maxi.runtime import set_up

    set_up()
    import numpy as np

    from maxi import generation
    from maxi.hf import load_hf
    from maxi.models.sampling import Sampling

    loaded = generation.unstacked(load_hf(folder, dtype))
    sampling = Sampling(max_new_tokens=options.new)

    def run() -> list[list[int]]:
        return np.stack(list(generation.stream_tokens(loaded.model, loaded.params, prompts, sampling)), 1).tolist()

    return _measured(run)


if __name__ == "__main__":
    main()
