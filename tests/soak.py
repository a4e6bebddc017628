"""`make soak`: a run dies a hundred times, in every way there is, and must end bit for bit where an undisturbed one ends.

    python -m tests.soak [--lives 100] [--seed 0] [--folder DIR]

A life is `maxi train` on two devices, which one process has or two; how one of them ends is drawn from ENDS: killed, told to
stop, told twice, frozen, its disk full, killed or told at one of the named points of `maxi/faults.py`, or the newest checkpoint
damaged behind its back. The number of tokenising processes changes between lives too. When a run is through it is compared
with the golden one, of one process, and the next begins. Ends with a table, and with exit code 1 if one byte differed or a
life printed what it should not.
"""

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from maxi import faults, runtime
from tests import small

STEPS, EVERY = 60, 3
DEVICES, HOSTS = 2, (1, 1, 2)
"""Two numbers add up to the same bits in either order, so processes may come and go; of four devices that is not so."""
LIMIT = 180.0
"""Seconds that a life may take."""
WHOLE = ("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "manifest.0.json", "commit.json", "exported.json")
POINTS = [*(p for p in faults.POINTS if not p.startswith(("reference", "cache"))),
          *(f"{name}.{moment}" for name in WHOLE for moment in ("write", "rename", "renamed"))]  # fmt: skip


class Soak:
    """One soak in `home`; `life` is the number of the present life."""

    def __init__(self, home: Path, seed: int):
        self.home, self.rng, self.life = home, random.Random(seed), 0
        self.ends: Counter[str] = Counter()
        self.codes: Counter[int] = Counter()
        self.hosts: Counter[int] = Counter()
        self.lost, self.wrong, self.fallbacks = 0, 0, 0
        small.prepare(home)
        self.golden = self.begin("golden")
        done = small.start_with(small.environment(DEVICES), self.golden)
        _, error = done.communicate()
        assert done.returncode == 0, error

    def begin(self, name: str) -> Path:
        config = small.configure(self.home, self.home / name, STEPS)
        text = config.read_text().replace("checkpoint: {every: 2}", f"checkpoint: {{every: {EVERY}, grace: 60}}")
        config.write_text(text.replace("eval: {every: 4", "eval: {every: 10"))
        return config

    def run(self, lives: int) -> bool:
        """As many runs as it takes for so many lives; whether every one was right."""
        rounds = 0
        while self.life < lives:
            rounds += 1
            config = self.begin(f"run-{rounds}")
            while not self.live(config, calm=self.life >= lives):
                pass
            self.compare(config.with_name("run"))
            shutil.rmtree(config.parent)
        self.report(rounds)
        return not self.wrong

    def live(self, config: Path, calm: bool) -> bool:
        """One life; whether the run is through."""
        self.life += 1
        run, end = config.with_name("run"), "none" if calm else self.rng.choice(list(ENDS))
        before = self.logged(run)
        more = (ENDS[end](self, run) or {}) if end in PREPARED else {}
        everyone = small.members(self.rng.choice(HOSTS))
        victim = self.rng.randrange(len(everyone))
        everyone[victim] |= more
        words = (f"data.workers={self.rng.choice([0, 1, 2])}", "processes.heartbeat_s=10", "processes.start_timeout_s=40")
        own = small.environment(DEVICES // len(everyone))
        running = [small.start_with({**own, **one}, config, *words) for one in everyone]
        if end not in PREPARED and end != "none":
            ENDS[end](self, run, running[victim], before)
        said = [self.see_out(end, process, len(running) > 1) for process in running]
        self.ends[end] += 1
        self.hosts[len(running)] += 1
        resumed = next((int(line.split()[4]) for line in said[0].splitlines() if line.startswith("state: resumed")), None)
        if resumed is not None:
            self.lost = max(self.lost, before - resumed)
        self.fallbacks += "corrupt: " in said[0]
        codes = [process.returncode for process in running]
        print(f"life {self.life:3}: {end:12} {more.get('MAXI_FAULT', ''):32} exit {codes}, "
              f"{before} -> {self.logged(run)} of {STEPS} steps", flush=True)  # fmt: skip
        return codes == [0] * len(codes)

    def see_out(self, end: str, process: subprocess.Popen[str], several: bool) -> str:
        """Waits for the end of a process, and complains if it is not as it should be; what it said on stdout."""
        try:
            out, error = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            out, error = process.communicate()
            self.complain(end, f"took more than {LIMIT:.0f} s", out + error)
        self.codes[process.returncode] += 1
        allowed = error.count("\n") <= 1 and "Traceback" not in out + error
        # Python itself dies of a SIGTERM in its first moments and in its last
        expected = (0, 6, 75, 130, -signal.SIGKILL, *((-signal.SIGTERM,) if end in ("term", "twice") else ()))
        if process.returncode not in expected or not allowed:
            self.complain(end, f"{'one of two' if several else 'it'} ended with {process.returncode}", out + error)
        return out

    def compare(self, run: Path) -> None:
        try:
            small.assert_same_run(run, self.golden.with_name("run"))
            print(f"         equal to the golden run, {sum(f.stat().st_size for f in run.rglob('*') if f.is_file()):,} bytes")
        except AssertionError as error:
            kept = shutil.copytree(run, self.home / f"wrong-{self.life}")
            self.complain("compare", f"not the golden run, kept in {kept}", str(error))

    def complain(self, end: str, what: str, text: str) -> None:
        self.wrong += 1
        print(f"WRONG in life {self.life} ({end}): {what}\n{text}", flush=True)

    def logged(self, run: Path) -> int:
        """The last step that metrics.jsonl knows."""
        path = run / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except ValueError:
                continue
        return 0

    def await_steps(self, run: Path, process: subprocess.Popen[str], more: int, before: int) -> None:
        """Until the process has come so many steps further, or has ended; now and then it is not that far yet."""
        until = time.monotonic() + (self.rng.uniform(0, 8) if self.rng.random() < 0.25 else 60)
        while process.poll() is None and self.logged(run) < min(before + more, STEPS) and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(self.rng.uniform(0, 0.15))

    def report(self, rounds: int) -> None:
        ends = ", ".join(f"{name} {count}" for name, count in self.ends.most_common())
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(self.codes.items()))
        print(f"{self.life} lives in {rounds} runs of {STEPS} steps; ends: {ends}; of two processes "
              f"{self.hosts[2]}; exit codes: {codes}; steps lost at most "
              f"{self.lost} (a checkpoint every {EVERY}); fell back from a damaged checkpoint {self.fallbacks} times; "
              f"wrong: {self.wrong}")  # fmt: skip


def kill(soak: Soak, run: Path, process: subprocess.Popen[str], before: int) -> None:
    soak.await_steps(run, process, soak.rng.randint(1, 12), before)
    process.kill()


def term(soak: Soak, run: Path, process: subprocess.Popen[str], before: int) -> None:
    soak.await_steps(run, process, soak.rng.randint(1, 12), before)
    process.send_signal(soak.rng.choice([signal.SIGTERM, signal.SIGINT]))


def twice(soak: Soak, run: Path, process: subprocess.Popen[str], before: int) -> None:
    term(soak, run, process, before)
    time.sleep(1.1)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)


def freeze(soak: Soak, run: Path, process: subprocess.Popen[str], before: int) -> None:
    soak.await_steps(run, process, soak.rng.randint(1, 8), before)
    process.send_signal(signal.SIGSTOP)
    time.sleep(soak.rng.uniform(0.1, 2))
    if soak.rng.random() < 0.5:
        process.kill()
    process.send_signal(signal.SIGCONT)
    kill(soak, run, process, before + 4)


def full(soak: Soak, run: Path, process: subprocess.Popen[str], before: int) -> None:
    """No file may grow any more, for a while or for good."""
    soak.await_steps(run, process, soak.rng.randint(1, 6), before)
    hard = resource.RLIM_INFINITY
    try:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))
        time.sleep(soak.rng.uniform(0.05, 1.5))
        if soak.rng.random() < 0.5:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    except ProcessLookupError:
        return
    kill(soak, run, process, before + 12)


def point(soak: Soak, run: Path) -> dict[str, str]:
    del run
    what = soak.rng.choice(["kill", "kill", "kill", "term", "full"])
    return {"MAXI_FAULT": f"{soak.rng.choice(POINTS)}:{soak.rng.randint(1, 4)}:{what}"}


def damage(soak: Soak, run: Path) -> dict[str, str]:
    """A bit of the newest checkpoint, if another one is left."""
    steps = small.steps_of(run) if (run / "checkpoints").is_dir() else []
    if len(steps) > 1:
        files = sorted(path for path in (run / "checkpoints" / str(steps[-1])).rglob("*") if path.is_file())
        path = soak.rng.choice([path for path in files if path.stat().st_size and path.name != "commit_success.txt"])
        raw = bytearray(path.read_bytes())
        raw[soak.rng.randrange(len(raw))] ^= 1 << soak.rng.randrange(8)
        path.write_bytes(raw)
    return point(soak, run)


ENDS: dict[str, Callable[..., dict[str, str] | None]] = {
    "kill": kill,
    "term": term,
    "twice": twice,
    "freeze": freeze,
    "full disk": full,
    "point": point,
    "damage": damage,
}
PREPARED = ("point", "damage")
"""Those that are decided before the process starts."""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lives", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--folder", type=Path, help="default: a new one, removed at the end")
    chosen = options.parse_args()
    runtime.expect_no_tpu()
    os.environ["JAX_PLATFORMS"] = "cpu"
    logging.getLogger("absl").setLevel(logging.ERROR)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="maxi-soak-") as folder:
        fine = Soak(chosen.folder or Path(folder), chosen.seed).run(chosen.lives)
    print(f"{time.monotonic() - begin:.0f} s")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
