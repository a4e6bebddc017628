"""`make breakages`: seven ways to lose a run that nobody would see, each put into a copy of maxi, must turn a test red.

    python -m tests.breakages [NAME ...]

It runs the tests that are named beside each breakage, first as maxi is (they pass), then broken (one fails). Ends with a
table, and with exit code 1 if a breakage went unseen.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Breakage:
    """In `file`, `right` becomes `wrong`; `tests` are those that should see it; `also`: more of (file, right, wrong)."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str
    also: tuple[tuple[str, str, str], ...] = ()

    @property
    def changes(self) -> tuple[tuple[str, str, str], ...]:
        return ((self.file, self.right, self.wrong), *self.also)


BREAKAGES = (
    Breakage(
        "random numbers are not keyed by the step",
        "maxi/data/loader.py",
        "seeds = np.random.SeedSequence(seed).generate_state(",
        "seeds = np.random.SeedSequence().generate_state(",
        "tests/data/test_loader.py::test_resuming_is_dropping_what_was_read",
    ),
    Breakage(
        "a checkpoint is saved before the metrics are flushed",
        "maxi/saving.py",
        "(self._flush(), self._checkpoints.save(step, state))",
        "(self._checkpoints.save(step, state), self._flush())",
        "tests/test_resume.py::test_records_are_down_before_a_checkpoint_says_so",
        also=(
            ("maxi/metrics.py", "        self.drain()\n        begin = time.monotonic()", "        begin = time.monotonic()"),
        ),
    ),
    Breakage(
        "a run goes on at the wrong step",
        "maxi/train.py",
        "batches = job.batches.iterate(start, *steps.share(job.devices))",
        "batches = job.batches.iterate(start - 1 if start else 0, *steps.share(job.devices))",
        "tests/test_resume.py::test_a_damaged_checkpoint_costs_its_steps_and_nothing_else",
    ),
    Breakage(
        "the optimizer's state is dropped",
        "maxi/train.py",
        "if resume.reset_optimizer and reset_at(job.run, config, start):",
        "if True:",
        "tests/test_resume.py::test_a_damaged_checkpoint_costs_its_steps_and_nothing_else",
    ),
    Breakage(
        "micro-batches count alike, whatever is in them",
        "maxi/step.py",
        "        return sums, grads\n\n    return _summed(one, micros)",
        "        mean = Sums(sums.loss / sums.weight, sums.weight / sums.weight, sums.metrics)\n"
        "        return mean, jax.tree.map(lambda g: g / sums.weight, grads)\n\n    return _summed(one, micros)",
        "tests/test_step.py::test_accumulated_is_whole",
    ),
    Breakage(
        "the manifest is not looked at",
        "maxi/manifest.py",
        "    try:\n        mark = json.loads((folder / COMMIT).read_text",
        "    return None\n    try:\n        mark = json.loads((folder / COMMIT).read_text",
        "tests/test_checkpoint.py::test_any_damage_is_found_and_passed_over",
    ),
    Breakage(
        "hosts take turns with rows instead of parts of a batch",
        "maxi/data/loader.py",
        "        return self._mix.batch(self.batch_size // shards, drop_remainder=True, batch_fn=stack)",
        "        import grain\n\n"
        "        mix, whole, own = self._mix, self.batch_size, self.batch_size // shards\n"
        "        rows = grain.MapDataset.range(1 << 40)\n"
        "        rows = rows.map(lambda i: mix[i // whole * whole + i % own * shards + i % whole // own])\n"
        "        return rows.batch(own, drop_remainder=True, batch_fn=stack)",
        "tests/data/test_loader.py::test_any_number_of_shards_reads_the_same_global_batches",
    ),
)


def main() -> int:
    chosen = [b for b in BREAKAGES if not sys.argv[1:] or b.name in sys.argv[1:]]
    unseen = 0
    with tempfile.TemporaryDirectory(prefix="maxi-breakages-") as folder:
        for breakage in chosen:
            copy = Path(folder) / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir()
            for part in ("maxi", "tests"):
                shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", copy)
            well = run(copy, breakage.tests)
            for file, right, wrong in breakage.changes:
                text = (copy / file).read_text("utf-8")
                assert text.count(right) == 1, f"{breakage.name}: {file} has changed"
                (copy / file).write_text(text.replace(right, wrong), "utf-8")
            broken = run(copy, breakage.tests)
            seen = well == 0 and broken == 1  # pytest's codes: 0 passed, 1 some failed, others: it did not get that far
            unseen += not seen
            print(f"{'seen' if seen else 'UNSEEN':6} {breakage.name} (as it is: {well}, broken: {broken}; {breakage.tests})")
            sys.stdout.flush()
    return 1 if unseen else 0


def run(copy: Path, tests: str) -> int:
    """pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
