"""The launchers, against stand-ins for the vendors' command lines first on PATH: what they call, and what exit codes and the
loss of a slice make them do."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from maxi.data import bpe
from maxi.events import read_events
from maxi.yaml_file import read_yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
COMMANDS = [path for path in SCRIPTS if path.name not in ("lib.sh", "tpu_worker.sh")]

RECORD = 'printf "%s %s\\n" "${0##*/}" "$*" >>"$WORLD/calls"\n'
# plays the next line of the script: an exit code, and before it perhaps a step to write a checkpoint of
MAXI = """
if [ "$1" = config ]; then exit 0; fi
for word; do case $word in run_dir=*) run=${word#run_dir=} ;; esac; done
exec 9>"$WORLD/lock" && flock 9
read -r code step <"$WORLD/play" || code=0
sed -i 1d "$WORLD/play"
exec 9>&-
if [ -n "$step" ]; then mkdir -p "$run/checkpoints/$step" && echo "weights of $step" >"$run/checkpoints/$step/weights"; fi
echo "life ends with $code"
if [ "$code" = taken ]; then echo SUSPENDED >"$WORLD/state"; exec /bin/sleep 2; fi
exit "${code:-0}"
"""
STAND_INS = {
    "maxi": MAXI,
    "sleep": "exec /bin/sleep 0.05",
    "tail": 'exec /usr/bin/tail -s 0.05 "$@"',
    "nvidia-smi": 'cat "$WORLD/gpus"',
    "srun": 'while [ "$1" != bash ]; do shift; done\n"$@"',
    "squeue": 'cat "$WORLD/job"',
    "scontrol": "",
    "kubectl": 'cat >"$WORLD/applied"',
    # slices live in $WORLD: their state, and the home of each of two workers
    "gcloud": """
shift 2
group=$1 verb=$2 state=$(cat "$WORLD/state")
shift 2
worker=0 command="" last=""
for word; do
  case $last in --worker) worker=$word ;; --command) command=$word ;; esac
  last=$word
done
workers=$worker
[ "$worker" != all ] || workers="0 1"
case $group.$verb in
  queued-resources.create)
    rm -rf "$WORLD"/worker?
    mkdir "$WORLD/worker0" "$WORLD/worker1"
    echo WAITING_FOR_RESOURCES >"$WORLD/state" ;;
  queued-resources.delete) echo absent >"$WORLD/state" ;;
  queued-resources.describe)
    [ "$state" != absent ] || { echo "ERROR: NOT_FOUND: it is not there" >&2; exit 1; }
    if [ "$state" = WAITING_FOR_RESOURCES ]; then echo ACTIVE >"$WORLD/state"; fi
    echo "$state" ;;
  tpu-vm.describe) echo READY ;;
  tpu-vm.scp)
    [ "$state" = ACTIVE ] || exit 1
    for number in $workers; do
      for word; do case $word in *:) break ;; *) cp "$word" "$WORLD/worker$number/" ;; esac; done
    done ;;
  tpu-vm.ssh)
    [ "$state" = ACTIVE ] || exit 255
    for number in $workers; do (cd "$WORLD/worker$number" && HOME=$PWD NUMBER=$number bash -c "$command") || exit; done ;;
esac
""",
    "curl": """
case $* in
  *worker-network-endpoints*) echo "unknown:unknown:10.0.0.7,unknown:unknown:10.0.0.8" ;;
  *agent-worker-number*) echo "$NUMBER" ;;
esac
""",
    "uv": """
[ "$1" = venv ] || exit 0
mkdir -p .venv/bin
ln -s "$STAND_INS/maxi" .venv/bin/maxi
cp /bin/true .venv/bin/python
""",
    "sudo": '[ "$1" != tee ] || cat >"$WORLD/exports"',
    "exportfs": "",
    "gcsfuse": "",
    "mountpoint": "exit 1",
    "mount.nfs4": "",
}


class World:
    """The stand-ins, what they play and what they were called with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.here = folder / "here"
        (self.here / "configs").mkdir(parents=True)
        (self.here / "configs/a.yaml").write_text("run_dir: runs/a\nsteps: 4\n")
        tools = folder / "stand_ins"
        tools.mkdir()
        for name, text in STAND_INS.items():
            (tools / name).write_text("#!/bin/bash\n" + RECORD + text)
            (tools / name).chmod(0o755)
        (tools / "python").symlink_to(sys.executable)
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MAXI", "XLA_", "JAX_", "CUDA_"))
        }
        self.environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "WORLD": str(folder), "STAND_INS": str(tools)}
        for name, text in {
            "state": "absent",
            "job": "RUNNING",
            "gpus": "0, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 4",
        }.items():
            (folder / name).write_text(text + "\n")

    def run(
        self,
        script: str,
        *args: str,
        play: str = "",
        expect: int = 0,
        environment: Mapping[str, str] = MappingProxyType({}),
        timeout: int = 60,
    ) -> str:
        """Runs a launcher; `play` is what happens to the runs, life by life. Returns its output, both streams."""
        (self.folder / "play").write_text(play)
        done = subprocess.run(
            ["bash", str(LAUNCH / script), *args],
            cwd=self.here,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == expect, done.stdout
        return done.stdout

    def calls(self, *names: str) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [line for line in lines if line.split()[0] in names]

    def ssh(self) -> list[str]:
        """What the workers were asked for, by verb and worker, without looks and logs; and what happened to the slice."""
        found = []
        for line in self.calls("gcloud"):
            if " ssh " in line and not re.search(r" (status|log) ", line):
                worker, verb = re.search(r"--worker (\w+) --command bash .*?tpu_worker.sh (\w+)", line).groups()  # type: ignore[union-attr]
                found.append(f"{verb} {worker}")
            elif " scp " in line:
                found.append(f"scp {re.search(r'--worker (.*?) ', line).group(1)}")  # type: ignore[union-attr]
            elif match := re.search(r"queued-resources (create|delete)", line):
                found.append(match.group(1))
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def load(path: Path) -> Any:
    return read_yaml(path.read_text(), str(path))


# ---- all of them ----


def test_scripts_are_clean() -> None:
    """By shellcheck; with what stands in skypilot.yaml."""
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, "-x", *SCRIPTS], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    task: Any = load(LAUNCH / "skypilot.yaml")
    for part in ("setup", "run"):
        done = subprocess.run([checker, "-s", "bash", "-"], input=task[part], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_help_refusals_and_no_hyper_parameters(script: Path, world: World) -> None:
    text = world.run(script.name, "--help")
    assert "--dry-run" in text and "CONFIG" in text and "set -e" not in text and "#" not in text
    assert "unknown option --frobnicate" in world.run(script.name, "--frobnicate", expect=2)
    assert "which config?" in world.run(script.name, expect=2)
    assert not re.search(r"optim|batch_size|seq_len|steps=|lr=", script.read_text())
    assert world.calls(*STAND_INS) == []


def test_the_readme_shows_every_way() -> None:
    text = (ROOT / "README.md").read_text("utf-8").split("## Run it somewhere")[1].split("\n## ")[0]
    for path in (*COMMANDS, LAUNCH / "skypilot.yaml", LAUNCH / "gke_jobset.yaml", LAUNCH / "Dockerfile"):
        assert f"launch/{path.name}" in text, path.name


@pytest.mark.parametrize("script", ["local.sh", "gpu_host.sh", "slurm.sbatch"])
def test_a_run_dir_is_needed(script: str, world: World) -> None:
    (world.here / "configs/a.yaml").write_text("steps: 4\n")
    assert "error[2] no run_dir" in world.run(script, "configs/a.yaml", expect=2)
    assert "no such config" in world.run(script, "configs/b.yaml", "run_dir=x", expect=2)


# ---- one machine ----


def test_local_says_what_it_would_do(world: World) -> None:
    assert (
        world.run("local.sh", "--dry-run", "configs/a.yaml", "steps=2") == "maxi train configs/a.yaml steps=2 run_dir=runs/a\n"
    )
    both = world.run("local.sh", "-n", "2", "--port", "1234", "--dry-run", "configs/a.yaml", "run_dir=x y")
    start = "env JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS=localhost:1234 JAX_NUM_PROCESSES=2"
    assert both.splitlines() == [f"{start} JAX_PROCESS_ID={i} maxi train configs/a.yaml run_dir=x\\ y" for i in (0, 1)]
    assert world.calls(*STAND_INS) == []


def test_local_runs_again_until_done(world: World) -> None:
    """After 75, 6, 1 and a kill; the pause grows while there is no progress and starts anew with it."""
    out = world.run("local.sh", "configs/a.yaml", play="75 10\n6\n1\n137 20\n0\n")
    assert world.calls("maxi") == ["maxi train configs/a.yaml run_dir=runs/a"] * 5
    assert world.calls("sleep") == [f"sleep {seconds}" for seconds in (5, 15, 30, 5)]
    assert "exit code 75, the newest checkpoint is of step 10: running again in 5 s" in out


@pytest.mark.parametrize("code", [2, 3, 4, 5, 130])
def test_local_stops_at_what_another_run_would_not_mend(code: int, world: World) -> None:
    world.run("local.sh", "configs/a.yaml", play=f"{code}\n", expect=code)
    assert len(world.calls("maxi")) == 1 and world.calls("sleep") == []


def test_local_gives_up_without_progress(world: World) -> None:
    out = world.run("local.sh", "--tries", "2", "configs/a.yaml", play="6 1\n6\n6\n0\n", expect=6)
    assert "2 runs in a row without a new checkpoint: giving up" in out and len(world.calls("maxi")) == 3


def test_the_code_of_several_processes_is_that_of_the_one_that_tells_why(world: World) -> None:
    """One finds the data wrong; the other, which lost its peer, would have run again."""
    out = world.run("local.sh", "-n", "2", "configs/a.yaml", play="75\n3\n", expect=3)
    assert len(world.calls("maxi")) == 2 and "life ends with" in out and "[1] life ends with" in out


def test_local_passes_a_signal_on_and_ends_with_its_code(world: World) -> None:
    """The run saves and ends with 75, which here is no reason to run again."""
    slow = 'trap "exit 75" TERM\necho up\nwhile :; do /bin/sleep 0.05; done\n'
    (world.folder / "stand_ins/maxi").write_text("#!/bin/bash\n" + RECORD + slow)
    with subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "-n", "2", "configs/a.yaml"],
        cwd=world.here,
        env=world.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout and {process.stdout.readline(), process.stdout.readline()} == {"up\n", "[1] up\n"}
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 75 and len(world.calls("maxi")) == 2


def gpu_packages(world: World, cuda: int) -> dict[str, str]:
    """As if jax's plugin for this CUDA were installed."""
    folder = world.folder / f"site/jax_cuda{cuda}_plugin-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: jax-cuda{cuda}-plugin\nVersion: 1\n")
    return {"PYTHONPATH": str(world.folder / "site")}


def test_gpu_host_checks_and_sets_what_several_gpus_want(world: World) -> None:
    (world.folder / "gpus").write_text("".join(f"{i}, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 4\n" for i in range(2)))
    out = world.run("gpu_host.sh", "--dry-run", "configs/a.yaml", "run_dir=x", environment=gpu_packages(world, 13))
    said, *lines = out.splitlines()
    assert said == "gpu_host.sh: 2 x NVIDIA H100 80GB HBM3, driver 580.65.06, CUDA 13"
    assert [shlex.split(line) for line in lines] == [
        ["export", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"],
        ["export", "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true "],
        ["maxi", "train", "configs/a.yaml", "run_dir=x"],
    ]
    assert world.calls("maxi") == [] and len(world.calls("nvidia-smi")) == 1


def test_gpu_host_runs_again(world: World) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0", **gpu_packages(world, 12)}
    world.run("gpu_host.sh", "configs/a.yaml", play="75 1\n0\n", environment=environment)
    assert len(world.calls("maxi")) == 2
    assert world.calls("nvidia-smi")[0].endswith("--format=csv,noheader,nounits --id=0")


@pytest.mark.parametrize(
    ("gpus", "cuda", "words"),
    [
        ("0, NVIDIA A100, 550.54, 81559, 4", 13, "driver 550.54 is too old for CUDA 13, which needs 580"),
        ("0, NVIDIA A100, 580.1, 81559, 40000", 13, "GPU 0 (NVIDIA A100) has 40000 of 81559 MiB in use"),
        ("", 13, "nvidia-smi sees no GPU"),
        ("0, NVIDIA A100, 580.1, 81559, 4", 0, "jax has no CUDA here"),
    ],
)
def test_gpu_host_refuses_in_one_line(gpus: str, cuda: int, words: str, world: World) -> None:
    (world.folder / "gpus").write_text(gpus + "\n" * bool(gpus))
    if not cuda and any(found.metadata["Name"].lower().startswith("jax-cuda") for found in distributions()):
        pytest.skip("jax has CUDA here")
    packages = gpu_packages(world, cuda) if cuda else {}
    out = world.run("gpu_host.sh", "configs/a.yaml", expect=6, environment=packages)
    assert words in out and out.count("\n") == 1 and world.calls("maxi") == []
    if "in use" in words:
        world.run("gpu_host.sh", "--busy", "configs/a.yaml", environment=packages)


# ---- Slurm ----


def slurm(world: World, *args: str, play: str, expect: int = 0) -> str:
    return world.run(
        "slurm.sbatch", *args, play=play, expect=expect, environment={"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    )


def test_slurm_asks_for_what_it_needs(world: World) -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    asked = re.findall(r"^#SBATCH (.*)$", text, re.M)
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append", "--ntasks-per-node=1"} <= set(asked)
    assert text.index("#SBATCH") < text.index("\nset -e")  # Slurm reads no further than the first command
    line = shlex.split(world.run("slurm.sbatch", "--dry-run", "configs/a.yaml", "run_dir=x"))
    assert line[:4] == ["srun", "--kill-on-bad-exit=0", "--wait=120", "bash"]
    assert line[-4:] == ["maxi", "train", "configs/a.yaml", "run_dir=x"]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (5, False), (6, True), (75, True), (137, True)])
def test_slurm_queues_again_as_the_exit_code_says(code: int, requeued: bool, world: World) -> None:
    slurm(world, "configs/a.yaml", play=f"{code}\n", expect=code)
    assert world.calls("scontrol") == ["scontrol requeue 7"] * requeued
    assert world.calls("maxi") == ["maxi train configs/a.yaml run_dir=runs/a"]


def test_slurm_gives_up_without_progress_over_lives(world: World) -> None:
    for play in ("75 1\n", "6\n", "75\n"):
        slurm(world, "configs/a.yaml", play=play, expect=int(play.split()[0]))
    assert "giving up" in slurm(world, "configs/a.yaml", play="75\n", expect=75)
    assert len(world.calls("scontrol")) == 3


def test_a_cancelled_job_does_not_come_back(world: World) -> None:
    (world.folder / "job").write_text("COMPLETING\n")
    assert "not queued again" in slurm(world, "configs/a.yaml", play="75 1\n", expect=75)
    assert world.calls("scontrol") == []


# ---- Cloud TPU ----

POD = ("--name", "n", "--zone", "z", "--type", "v5litepod-8", "--spot")


def test_tpu_pod_says_what_it_would_do(world: World) -> None:
    out = world.run(
        "tpu_pod.sh", *POD, "--project", "p", "--dry-run", "configs/a.yaml", "run_dir=runs/b", "data.train.0.path=x y"
    )
    lines = [shlex.split(line) for line in out.splitlines()]
    assert lines[0][0] == "tar" and {"maxi", "launch", "configs/a.yaml"} <= set(lines[0])
    assert all(
        line[:3] == ["gcloud", "compute", "tpus"] and line[-5:] == ["--zone", "z", "--project", "p", "--quiet"]
        for line in lines[1:]
    )
    assert lines[1][3:-5] == [
        *("queued-resources", "create", "n", "--node-id", "n", "--accelerator-type", "v5litepod-8"),
        *("--runtime-version", "v2-alpha-tpuv5-lite", "--spot"),
    ]
    asked = [line[7:9] + line[line.index("--command") + 1 : -5] for line in lines if "ssh" in line]
    there = "bash ~/maxi/launch/tpu_worker.sh"
    assert [words[-1] for words in asked] == [
        "bash tpu_worker.sh install maxi.tgz",
        f"{there} share runs/b",
        f"{there} share runs/b",
        f"{there} start runs/b configs/a.yaml data.train.0.path=x\\ y",
        f"{there} log +1",
        f"{there} status runs/b",
        f"{there} status runs/b",
        f"{there} pack runs/b",
    ]
    assert lines[-1][3:7] == ["queued-resources", "delete", "n", "--force"] and world.calls("gcloud") == []


def test_tpu_pod_goes_on_after_75_and_after_the_slice_was_taken(world: World) -> None:
    """Both workers play a line each, whoever comes first. The slice is taken in the second life, with a checkpoint of step 20
    of which nobody else has a copy; the new one gets that of step 10 back, which was fetched."""
    play = 2 * "75 10\n" + 2 * "taken 20\n" + 2 * "0 30\n"
    out = world.run("tpu_pod.sh", *POD, "configs/a.yaml", "run_dir=runs/b", "seed=1", play=play)
    ready = ["scp all", "install all", "share 0", "share all"]
    assert world.ssh() == [
        *("create", *ready, "start all", "pack 0"),
        *(*ready, "start all", "delete"),
        *("create", *ready, "scp 0", "unpack 0", "start all", "pack 0", "delete"),
    ]
    assert "exit code 75, the newest checkpoint is of step 10" in out and "the slice was taken away" in out
    assert "life ends with 75" in out and "life ends with 0" in out  # worker 0's log
    assert sorted(path.name for path in (world.here / "runs/b/checkpoints").iterdir()) == ["10", "30"]
    assert (world.here / "runs/b/checkpoints/30/weights").read_text() == "weights of 30\n"
    assert (world.folder / "worker0/maxi/runs/b/checkpoints/10/weights").is_file()  # put back
    assert world.calls("maxi")[-1] == f"maxi train configs/a.yaml seed=1 run_dir={world.folder}/worker1/maxi/runs/b"
    mounted = [call for call in world.calls("sudo") if " mount " in call]
    folder = f"{world.folder}/worker1/maxi/runs/b"
    assert mounted[0] == f"sudo mount -t nfs4 -o lookupcache=none,actimeo=0 10.0.0.7:{folder} {folder}"
    assert (world.folder / "exports").read_text().startswith(f"{world.folder}/worker0/maxi/runs/b 10.0.0.0/8(rw,sync,")


def test_tpu_pod_stops_and_deletes_at_a_fault_of_the_data(world: World) -> None:
    """Worker 1 finds it; worker 0 only loses its peer."""
    world.run("tpu_pod.sh", *POD, "configs/a.yaml", "run_dir=runs/b", play="75\n3\n", expect=3)
    assert world.ssh()[-3:] == ["start all", "pack 0", "delete"]


def test_tpu_pod_with_a_bucket_fetches_nothing_and_keeps(world: World) -> None:
    world.run("tpu_pod.sh", *POD, "--keep", "configs/a.yaml", "run_dir=gs://bucket/runs/b", play="0 5\n0\n")
    assert world.ssh() == ["create", "scp all", "install all", "share 0", "share all", "start all"]
    assert world.calls("gcsfuse")[0].endswith(f"bucket {world.folder}/worker0/maxi-buckets/bucket")
    assert (world.folder / "worker0/maxi-buckets/bucket/runs/b/checkpoints/5").is_dir()
    out = world.run("tpu_pod.sh", *POD[:4], "--delete", "configs/a.yaml", "run_dir=gs://bucket/runs/b")
    assert world.ssh()[-2:] == ["stop all", "delete"], out


def test_tpu_pod_gives_up_where_slices_are_taken_before_a_checkpoint(world: World) -> None:
    out = world.run("tpu_pod.sh", *POD, "--tries", "2", "configs/a.yaml", "run_dir=runs/b", play="taken\ntaken\n" * 2, expect=6)
    assert "2 runs in a row without a new checkpoint: giving up" in out and world.ssh().count("create") == 2
    assert (world.folder / "state").read_text() == "absent\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--zone", "z", "configs/a.yaml"), "--name and --zone"),
        ((*POD[:4], "configs/a.yaml"), "--type says"),
        ((*POD, "configs/a.yaml", "run_dir=/abs"), "/abs is not below this folder"),
        ((*POD, "configs/a.yaml", "run_dir=a/../../b"), "not below this folder"),
        ((*POD, "--copy", "none", "configs/a.yaml"), "there is no none"),
        ((*POD, "--env", "NO_SUCH", "configs/a.yaml"), "NO_SUCH is not set"),
        ((*POD, "--tries", "0", "configs/a.yaml"), "numbers from 1"),
        ((*POD, "configs/a.yaml", "--copy"), ""),
    ],
)
def test_tpu_pod_refuses_before_anything_costs(args: tuple[str, ...], words: str, world: World) -> None:
    if not words:
        (world.folder / "stand_ins/maxi").write_text("#!/bin/bash\necho 'maxi: error[2] no such key' >&2\nexit 2\n")
    assert (words or "no such key") in world.run("tpu_pod.sh", *args, expect=2)
    assert world.calls("gcloud") == []


# ---- Kubernetes and SkyPilot ----


def fields(what: Any, *known: str) -> Any:
    assert isinstance(what, Mapping) and set(what) <= set(known), set(what) - set(known)
    return what


def test_gke_fills_in_a_job_set(world: World, tmp_path: Path) -> None:
    """Its fields are those of JobSet v1alpha2 and batch/v1, and the command is what was asked for, whatever stands in it."""
    base = ("--name", "n", "--image", "i:1", "--accelerator", "tpu-v6e-slice", "--topology", "4x8", "--slices", "3")
    word = 'chat.system=a "b" & \\c ${NAME}'
    world.run("gke.sh", *base, "--spot", "configs/a.yaml", "run_dir=gs://b/runs/c", word)
    assert world.calls("kubectl") == ["kubectl apply -f -"]
    job_set: Any = load(world.folder / "applied")
    fields(job_set, "apiVersion", "kind", "metadata", "spec")
    assert (job_set["apiVersion"], job_set["kind"], job_set["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet", "n")
    spec = fields(job_set["spec"], "ttlSecondsAfterFinished", "failurePolicy", "replicatedJobs")
    policy = fields(spec["failurePolicy"], "maxRestarts", "rules")
    assert policy["maxRestarts"] == 20
    fields(policy["rules"][0], "name", "action", "onJobFailureReasons")
    replicated = fields(spec["replicatedJobs"][0], "name", "replicas", "template")
    job = replicated["template"]["spec"]
    fields(job, "parallelism", "completions", "completionMode", "backoffLimit", "podFailurePolicy", "template")
    assert (replicated["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (3, 8, 8, 0)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3, 4, 5]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120  # the first as podFailurePolicy asks
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and len(pod["tolerations"]) == 1
    (container,) = pod["containers"]
    assert container["command"] == ["maxi", "train", "configs/a.yaml", word, "run_dir=/bucket/runs/c"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"

    (tmp_path / "plain.yaml").write_text(world.run("gke.sh", *base, "--dry-run", "configs/a.yaml", "run_dir=gs://b/runs/c"))
    plain: Any = load(tmp_path / "plain.yaml")
    pod = plain["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "tolerations" not in pod and len(pod["nodeSelector"]) == 2
    assert "run_dir has to be gs://" in world.run("gke.sh", *base, "configs/a.yaml", expect=2)


def test_skypilot_recovers_and_ends_in_the_same_line(world: World) -> None:
    task: Any = load(LAUNCH / "skypilot.yaml")
    fields(task, "name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run")
    resources = fields(task["resources"], "accelerators", "use_spot", "disk_size", "job_recovery")
    recovery = fields(resources["job_recovery"], "strategy", "max_restarts_on_errors", "recover_on_exit_codes")
    assert resources["use_spot"] is True and recovery["recover_on_exit_codes"] == [75]
    (world.here / "launch").symlink_to(LAUNCH)
    (world.here / ".venv/bin").mkdir(parents=True)
    for name in ("maxi", "python"):
        (world.here / ".venv/bin" / name).symlink_to((world.folder / "stand_ins" / name).resolve())
    (world.folder / "play").write_text("75 1\n0\n")
    given = {"CONFIG": "configs/a.yaml", "RUN": "r", "OVERRIDES": "seed=1 log.every=2", "SKYPILOT_NUM_NODES": "2"}
    given |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    script = task["run"].replace("/bucket", str(world.folder / "bucket")) + "\n"
    (world.folder / "stand_ins/maxi").write_text("#!/bin/bash\n" + RECORD + 'env | grep ^JAX_ | sort >"$WORLD/seen"\n' + MAXI)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=world.here,
        env=world.environment | given | gpu_packages(world, 13),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert world.calls("maxi") == [f"maxi train configs/a.yaml seed=1 log.every=2 run_dir={world.folder}/bucket/r"] * 2
    assert (world.folder / "seen").read_text().split() == [
        *("JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"),
    ]
    assert json.dumps(task)  # plain values throughout


# ---- for real ----


def test_two_processes_really_train(world: World) -> None:
    """`local.sh -n 2` with maxi itself: one run, of which both processes told their times, that ends with an export."""
    (world.folder / "stand_ins/maxi").write_text(f'#!/bin/bash\nexec {sys.executable} -m maxi "$@"\n')
    texts = [f"number {i} is followed by number {i + 1}, which is odd or even. " * 4 for i in range(200)]
    (world.here / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    bpe.train(texts, 300, world.here / "tokenizer")
    (world.here / "configs/a.yaml").write_text(
        "{run_dir: runs/a, steps: 4, batch_size: 4, seq_len: 32, tokenizer: tokenizer, model: {config: {model_type: qwen3, "
        "vocab_size: 300, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2, head_dim: 8}}, "
        "data: {train: [{path: text.jsonl}], cache_dir: cache}, log: {every: 2}}"
    )
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    environment = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "XDG_CACHE_HOME": str(world.folder / "cache")}
    out = world.run("local.sh", "-n", "2", "configs/a.yaml", "run_dir=runs/b", environment=environment, timeout=240)
    run = world.here / "runs/b"
    assert "2 x cpu" in out and "done: 4 steps" in out
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if "train/loss" in line] == [2, 4] and (run / "hf/model.safetensors").is_file()
    steps = [event for event in read_events(run / "events.jsonl") if event["event"] == "steps"]
    assert steps and all(len(event["hosts"]["step_s"]) == 2 for event in steps)
