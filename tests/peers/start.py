"""From the start of a process to the end of its first training step: maxi beside transformers, on a CPU.

    python tests/peers/start.py [--rounds 5] [--rows 2] [--tokens 512]

What `pretrain.py` measures, with two differences: one step, and the time of the whole process, imports included. maxi's
compiled programs are on disk after a first run that does not count; how long that one took is printed too.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEP = """
import argparse, sys
sys.path.insert(0, {folder!r})
import pretrain
pretrain._measured = lambda step, steps: step()
pretrain._{side}(argparse.Namespace(**{options}), "float32")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    given = {"shape": "26m", "rows": options.rows, "tokens": options.tokens, "steps": 1}
    taken: dict[str, list[float]] = {"transformers": [], "maxi": []}
    with tempfile.TemporaryDirectory(prefix="peers-") as cache:
        cold = _seconds("maxi", given, cache)
        for _ in range(options.rounds):
            for side, runs in taken.items():
                runs.append(_seconds(side, given, cache))
    medians = {side: statistics.median(runs) for side, runs in taken.items()}
    sides = ", ".join(f"{side} {seconds:.2f} s" for side, seconds in medians.items())
    share = medians["maxi"] / medians["transformers"]
    print(f"{sides}: {share:.2f} of transformers'; maxi without compiled programs {cold:.1f} s")


def _seconds(side: str, options: dict[str, object], cache: str) -> float:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env["JAX_COMPILATION_CACHE_DIR"] = cache
    code = STEP.format(folder=str(Path(__file__).parent), side=side, options=options)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
