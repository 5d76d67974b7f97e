"""docs/cluster.md: its scripts run here as they stand, on stand-ins for SLURM's commands (slurm.py)."""
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, flags
from test_docs import blocks, wrong_flags

import data
import slurm
from test_survive import RUNS, load, logged, same_run, start, unbroken  # noqa: F401  (fixtures)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SLURM is Linux, and so is /proc")
everything = pytest.mark.skipif("CLUSTER" not in os.environ, reason="CLUSTER=1 runs it: minutes of starting torchruns")


def script(name: str) -> str:
    """A batch script of the page."""
    found, = (block for block in blocks((ROOT / "docs/cluster.md").read_text())
              if block.startswith("#!/bin/bash") and f"--job-name={name} " in block)
    return found


def free_port() -> int:
    """One of 20000..29999."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port := random.randrange(20000, 30000)))
            return port


class Job:
    """A batch job in the folder `home`, in which torchrun, or what stands for it, and the training script lie."""

    def __init__(self, home: Path, torchrun: str, nodes: int = 2, before: str = ""):
        self.home, self.nodes = home, nodes
        commands = {"srun": f'exec {sys.executable} -S {slurm.__file__} srun "$@"', "torchrun": torchrun,
                    "scontrol": f'exec {sys.executable} -S {slurm.__file__} scontrol "$@"'}
        for name, text in commands.items():
            (home / name).write_text(f"#!/bin/bash\n{text}\n")
            (home / name).chmod(0o755)
        text, found = re.subn(r"^out=.*$", f"out={home / 'run'}", script("detreg"), flags=re.M)
        assert found == 1
        text, found = re.subn("--max-restarts=3", "--max-restarts=1", text)  # sooner over
        assert found == 1
        (home / "train.sh").write_text(text.replace("\n", f"\n{before}\n", 1))
        self.number, self.attempt = str(10**6 + free_port() % 10000), 0  # the script's port: 20000 + number % 10000

    def submit(self, **env: str) -> None:
        env = {**os.environ, **env, "PATH": f"{self.home}:{os.environ['PATH']}", "SLURM_JOB_ID": self.number,
               "SLURM_NNODES": str(self.nodes), "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1",
               "OMP_NUM_THREADS": "1"} | ({"SLURM_RESTART_COUNT": str(self.attempt)} if self.attempt else {})
        self.attempt += 1
        with open(self.home / f"output{self.attempt}.txt", "w") as file:
            self.shell = subprocess.Popen(["bash", "train.sh"], cwd=self.home, env=env, stdout=file, stderr=file)

    def send(self, number: int, shell: bool = False) -> None:
        """As SLURM: to every process of the steps; not to the batch shell, or to that too. SIGKILL: to all of the job.
        """
        steps = slurm.processes(self.number, step=number != signal.SIGKILL)
        slurm.send(number, steps + [self.shell.pid] * shell)

    def end(self, timeout: float = 180) -> tuple[int, bool, str]:
        """(exit code, whether it was queued again, what it printed); nothing of it lives on for longer than 10 s."""
        try:
            code = self.shell.wait(timeout)
            deadline = time.monotonic() + 10
            while (left := slurm.processes(self.number)) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            slurm.send(signal.SIGKILL, slurm.processes(self.number))
        printed = (self.home / f"output{self.attempt}.txt").read_text()
        assert not left, printed
        requeued = self.home / "requeued.txt"
        again = requeued.exists() and requeued.read_text() == f"{self.number}\n"
        requeued.unlink(missing_ok=True)
        return code, again, printed

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 180
        while not all((self.home / name).exists() for name in names):
            assert self.shell.poll() is None and time.monotonic() < deadline, (
                self.home / f"output{self.attempt}.txt").read_text()
            time.sleep(0.02)


# ==== The batch script, torchrun a stand-in ====


# What the run writes to ended.txt, torchrun's exit code, then the job's, and whether it is queued again.
ENDS = {
    "finished": (None, 0, 0, False),
    "time is over": ("75 process 0: stopped by SIGUSR1 after step 3, which is saved", 1, 75, True),
    "cancelled": ("75 process 0: stopped by SIGTERM after step 3, which is saved", 1, 75, False),
    "wrong input": ("2 process 1: x.png: broken", 1, 2, False),
    "not finite": ("3 process 1: step 2: loss nan", 1, 3, False),
    "not begun": (None, 1, 1, False)}


@pytest.mark.parametrize("before", ["", "set -euo pipefail"])
@pytest.mark.parametrize("end", ENDS)
def test_batch_script_ends_as_the_run(tmp_path, end, before):
    """Whatever the attempt before has left there; also with the line that many put first."""
    text, torchrun, code, again = ENDS[end]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ended.txt").write_text("75 process 0: stopped by SIGUSR1")
    job = Job(tmp_path, (f"printf '{text}' > run/ended.txt; " if text else "") + f"exit {torchrun}", before=before)
    job.submit()
    assert job.end()[:2] == (code, again)


@pytest.mark.parametrize(("number", "shell"), [(signal.SIGUSR1, False), (signal.SIGUSR1, True), (signal.SIGTERM, True)])
def test_batch_shell_outlives_the_signal(tmp_path, number, shell):
    """Of the time limit, sent to the steps, or to the shell too; of preemption, sent to both."""
    job = Job(tmp_path, f"trap \"sleep 0.1; echo '75 process 0: stopped by {number.name}' > run/ended.txt; exit 1\" "
                        "USR1 TERM; touch ready$SLURM_NODEID; while :; do sleep 0.02; done")
    job.submit()
    job.wait_for("ready0", "ready1")
    job.send(number, shell)
    assert job.end()[:2] == (75, number == signal.SIGUSR1)


def test_a_node_that_fails_ends_the_others(tmp_path):
    job = Job(tmp_path, "((SLURM_NODEID)) && exit 1; sleep 600")
    began = time.monotonic()
    job.submit()
    assert job.end()[:2] == (128 + signal.SIGKILL, False) and time.monotonic() - began < 10


# ==== Two torchruns as two nodes ====

# The training script of the batch script: a small run. In the steps PAUSE, [attempt of torchrun, its step], it waits
# until it may go on. It writes down the images of each step.
WORKER = f"""
import json, os, sys, time
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import detreg, run, test_survive
step, seed_step, steps = detreg.train_step, run.seed_step, []
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"]
def note_step(seed, number):
    steps.append(number)
    seed_step(seed, number)
def train_step(*args):
    if [attempt, len(steps)] in json.loads(os.environ["PAUSE"]):
        Path(f"paused{{rank}}").touch()
        while not Path("go").exists():
            time.sleep(0.01)
    terms = step(*args)
    with open(f"images{{rank}}.txt", "a") as file:
        print(steps[-1], *(int(i) for batch in args[-2] for i in batch["index"]), file=file)
    return terms
detreg.train_step, run.seed_step = train_step, note_step
faults = [] if attempt else [tuple(fault) for fault in json.loads(os.environ["FAULTS"])]
test_survive.child("detreg", json.loads(os.environ["VALUES"]), faults)
"""


def cluster(home: Path, nodes: int = 2) -> Job:
    (home / "detreg.py").write_text(WORKER)
    return Job(home, f'exec {sys.executable} -m torch.distributed.run "$@"', nodes)


def variables(home: Path, pause: tuple = (), faults: tuple = (), **values) -> dict[str, str]:
    """The environment of WORKER."""
    for file in (*home.glob("paused*"), *home.glob("go"), *home.glob("images*")):
        file.unlink()
    argv = flags({**RUNS["detreg"], "out": home / "run", **values})
    return {"PAUSE": json.dumps(pause), "FAULTS": json.dumps(faults), "VALUES": json.dumps(argv)}


def images(home: Path) -> dict[int, list[int]]:
    """{step: its images, of all processes, sorted}, since variables()."""
    found: dict[int, list[int]] = {}
    for file in home.glob("images*.txt"):
        for line in file.read_text().splitlines():
            step, *numbers = map(int, line.split())
            found[step] = sorted(found.get(step, []) + numbers)
    return found


def test_time_is_over(start, unbroken, tmp_path):  # noqa: F811
    """SIGUSR1, in the third step, to torchruns, training and loader processes: no step is lost, and the job continues
    as if nothing had been."""
    job = cluster(tmp_path)
    job.submit(**variables(tmp_path, pause=((0, 3),), num_workers=1))
    job.wait_for("paused0", "paused1")
    job.send(signal.SIGUSR1)
    (tmp_path / "go").touch()
    code, again, printed = job.end()
    assert (code, again) == (75, True) and "stopped by SIGUSR1 after step 3, which is saved" in printed, printed
    assert load(tmp_path / "run")["step"] == 3
    assert start("detreg", tmp_path / "run", world=2)[0] == [0, 0]
    same_run(tmp_path / "run", unbroken("detreg", 2))


@everything
def test_killed_restarted_killed_and_queued_again(unbroken, tmp_path):  # noqa: F811
    """One job's life: a process that dies is restarted by torchrun; the grace is over before a step is; a torchrun is
    killed; then it finishes. Checkpoints are due every second step."""
    job = cluster(tmp_path)
    job.submit(**variables(tmp_path, pause=((1, 2),), faults=(("kill", 4, 1),)))
    job.wait_for("paused0", "paused1")
    assert load(tmp_path / "run")["step"] == 2
    job.send(signal.SIGUSR1)
    time.sleep(1)
    job.send(signal.SIGKILL)
    code, again, printed = job.end()
    assert (code, again) == (-signal.SIGKILL, False) and "continuing the run in" in printed and "at step 2\n" in printed
    assert load(tmp_path / "run")["step"] == 2
    for node in (0, 1):
        job.submit(**variables(tmp_path, pause=((0, 1),)))
        job.wait_for("paused0", "paused1")
        killed = [pid for pid in slurm.processes(job.number, step=True)
                  if f"SLURM_NODEID={node}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                  and b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        slurm.send(signal.SIGKILL, killed)
        began = time.monotonic()
        assert len(killed) == 1 and job.end()[:2] == (128 + signal.SIGKILL, False) and time.monotonic() - began < 10
    job.submit(**variables(tmp_path))
    code, again, printed = job.end()
    assert (code, again) == (0, False) and "at step 2\n" in printed
    same_run(tmp_path / "run", unbroken("detreg", 2))
    job.submit(**variables(tmp_path, lr=3e-4))
    code, again, printed = job.end()
    assert (code, again) == (2, False) and "holds a run with another configuration (lr: " in printed


# Nothing in it depends on how a batch is split.
WHOLE = {"backbone_norm": "frozen", "dropout": 0}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("whole") / "run"
    assert start("detreg", out, world=2, **WHOLE)[0] == [0, 0]
    return out


def same_losses(one: Path, two: Path) -> None:
    for a, b in zip(logged(one), logged(two), strict=True):
        assert b["step"] == a["step"] and b["loss"] == pytest.approx(a["loss"], rel=1e-3)


def batches(*steps: int) -> dict[int, list[int]]:
    """The images of these steps of RUNS, two an epoch."""
    orders = {step: data.StepSampler(10, 4, 5, seed=3).epoch_order(step // 2)[1] for step in steps}
    return {step: sorted(order[step % 2 * 4:][:4].tolist()) for step, order in orders.items()}


@everything
def test_one_node_rather_than_two(whole, tmp_path):
    """Cancelled (SIGTERM) and submitted again with one node: the same batches in the same order. Its only process says
    why it ended, too."""
    job = cluster(tmp_path)
    job.submit(**variables(tmp_path, pause=((0, 3),), **WHOLE))
    job.wait_for("paused0", "paused1")
    job.send(signal.SIGTERM)
    (tmp_path / "go").touch()
    assert job.end()[:2] == (75, False) and images(tmp_path) == batches(0, 1, 2)
    job.nodes = 1
    job.submit(**variables(tmp_path, pause=((0, 1),), **WHOLE))
    job.wait_for("paused0")
    job.send(signal.SIGUSR1)
    (tmp_path / "go").touch()
    code, again, printed = job.end()
    assert (code, again) == (75, True) and "with 1 processes rather than 2: the same batches" in printed
    assert images(tmp_path) == batches(3) and load(tmp_path / "run")["step"] == 4
    job.submit(**variables(tmp_path, **WHOLE))
    assert job.end()[:2] == (0, False) and images(tmp_path) == batches(4)
    same_losses(whole, tmp_path / "run")


# ==== Kubernetes ====


def pod_command() -> tuple[dict[str, str], list[str]]:
    """(variables, command) of a pod of the page's Job, whose service and pods must be named as the command says."""
    text, = blocks((ROOT / "docs/cluster.md").read_text(), "yaml")
    service, job = yaml.safe_load_all(text)
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    container, = pod["containers"]
    assert service["spec"]["selector"] == {"job-name": name} and service["metadata"]["name"] == pod["subdomain"]
    assert f"--rdzv_endpoint={name}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}" in container["command"]
    assert f"--nnodes={job['spec']['parallelism']}" in container["command"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    return variables, container["command"]


def test_pods_command():
    _, command = pod_command()
    assert not wrong_flags("detreg", command[command.index("detreg.py") + 1:])


@everything
def test_evicted_pod(whole, tmp_path):
    """With one pod or two: SIGTERM to the torchrun of the pod without rank 0, whose process tells it; rank 0 saves and
    all end; one goes on alone until the other is there again. No step is lost or done twice."""
    (tmp_path / "detreg.py").write_text(WORKER)
    (given, command), port = pod_command(), free_port()
    changes = {"--nnodes=4": "--nnodes=1:2", "--nproc_per_node=8": "--nproc_per_node=1",
               "--rdzv_conf=join_timeout=3600": "--rdzv_conf=last_call_timeout=3",
               "--rdzv_endpoint=detreg-0.detreg:29500": f"--rdzv_endpoint=127.0.0.1:{port}"}
    assert changes.keys() <= set(command)
    command = [sys.executable, "-m", "torch.distributed.run", *(changes.get(a, a) for a in command[1:])]
    env = {**os.environ, **given, **variables(tmp_path, pause=((0, 3), (1, 1)), **WHOLE), "OMP_NUM_THREADS": "1"}

    def pod(name: str, **values: str) -> subprocess.Popen:
        with open(tmp_path / f"{name}.txt", "w") as file:
            return subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file,
                                    env={**env, **values, "SLURM_JOB_ID": name})

    def wait_for(*names: str, text: str = "") -> None:
        deadline = time.monotonic() + 180
        while not all((tmp_path / name).exists() and text in (tmp_path / name).read_text() for name in names):
            assert time.monotonic() < deadline, [file.read_text() for file in tmp_path.glob("pod*.txt")]
            time.sleep(0.02)

    pods = {"pod0": pod("pod0")}
    try:
        deadline = time.monotonic() + 180
        with socket.socket() as s:
            while s.connect_ex(("127.0.0.1", port)):  # the first pod, too, has the processes' meeting point
                assert time.monotonic() < deadline
                time.sleep(0.1)
        pods["pod1"] = pod("pod1")
        wait_for("paused0", "paused1")
        assert any(b"RANK=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                   for pid in slurm.processes("pod0"))
        pods["pod1"].terminate()
        wait_for("run/stop.txt")
        (tmp_path / "go").touch()
        assert pods["pod1"].wait(180) == 1 and not slurm.processes("pod1")
        for name in ("go", "paused0"):
            (tmp_path / name).unlink()
        assert load(tmp_path / "run")["step"] == 3
        wait_for("paused0")
        pods["again"] = pod("again")
        wait_for("pod0.txt", text="SIGTERM: ends when the running step")
        (tmp_path / "go").touch()
        assert [pods[name].wait(180) for name in ("pod0", "again")] == [0, 0]
    finally:
        for name in pods:
            slurm.send(signal.SIGKILL, slurm.processes(name))
    printed = (tmp_path / "pod0.txt").read_text()
    assert all(f"stopped by SIGTERM after step {step}, which is saved" in printed for step in (3, 4))
    assert "with 1 processes rather than 2" in printed and images(tmp_path) == batches(0, 1, 2, 3, 4)
    same_losses(whole, tmp_path / "run")
