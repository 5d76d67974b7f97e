"""docs/cluster.md: its scripts run here as they stand, on stand-ins for SLURM's commands (slurm.py)."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, flags
from test_docs import blocks

import slurm
from test_survive import RUNS, load, same_run, start, unbroken  # noqa: F401  (fixtures)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SLURM is Linux, and so is /proc")
everything = pytest.mark.skipif("CLUSTER" not in os.environ, reason="CLUSTER=1 runs it: minutes of starting torchruns")


def script(name: str) -> str:
    """A batch script of the page."""
    found, = (block for block in blocks((ROOT / "docs/cluster.md").read_text())
              if block.startswith("#!/bin/bash") and f"--job-name={name} " in block)
    return found


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
        (home / "train.sh").write_text(text.replace("\n", f"\n{before}\n", 1))
        with socket.socket() as s:  # the script's port is 20000 + job % 10000
            while not s.getsockname()[1]:
                try:
                    s.bind(("127.0.0.1", port := 20000 + int.from_bytes(os.urandom(2), "little") % 10000))
                except OSError:
                    continue
        self.number, self.attempt = str(10**6 + port % 10000), 0

    def submit(self, **env: str) -> None:
        env = {**os.environ, **env, "PATH": f"{self.home}:{os.environ['PATH']}", "SLURM_JOB_ID": self.number,
               "SLURM_NNODES": str(self.nodes), "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1",
               "OMP_NUM_THREADS": "1"} | ({"SLURM_RESTART_COUNT": str(self.attempt)} if self.attempt else {})
        self.attempt += 1
        with open(self.home / f"output{self.attempt}.txt", "w") as file:
            self.shell = subprocess.Popen(["bash", "train.sh"], cwd=self.home, env=env, stdout=file, stderr=file)

    def send(self, number: int, shell: bool = False) -> None:
        """As SLURM: to every process of the steps; not to the batch shell, or to that too."""
        slurm.send(number, slurm.processes(self.number, step=True) + [self.shell.pid] * shell)

    def end(self, timeout: float = 60) -> tuple[int, bool, str]:
        """(exit code, whether it was queued again, what it printed); nothing of it lives on."""
        try:
            code = self.shell.wait(timeout)
        finally:
            left = slurm.processes(self.number)
            slurm.send(signal.SIGKILL, left)
        printed = (self.home / f"output{self.attempt}.txt").read_text()
        assert not left, printed
        requeued = self.home / "requeued.txt"
        again = requeued.exists() and requeued.read_text() == f"{self.number}\n"
        requeued.unlink(missing_ok=True)
        return code, again, printed

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 60
        while not all((self.home / name).exists() for name in names):
            assert self.shell.poll() is None and time.monotonic() < deadline, (
                self.home / f"output{self.attempt}.txt").read_text()
            time.sleep(0.02)


# ==== The batch script, torchrun a stand-in ====


# What torchrun does: what the run writes to ended.txt, and torchrun's exit code; the job's exit code; is it queued again?
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

# The training script of the batch script: a small run, which waits in a step until it may go on.
WORKER = f"""
import json, os, sys, time
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import detreg, test_survive
step, calls, pause = detreg.train_step, 0, int(os.environ["PAUSE"])
def train_step(*args):
    global calls
    calls += 1
    if calls == pause:
        Path(f"paused{{os.environ['RANK']}}").touch()
        while not Path("go").exists():
            time.sleep(0.01)
    return step(*args)
detreg.train_step = train_step
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
faults = [tuple(fault) for fault in json.loads(os.environ["FAULTS"])] if first else []
test_survive.child("detreg", json.loads(os.environ["VALUES"]), faults)
"""


def cluster(home: Path, nodes: int = 2) -> Job:
    (home / "detreg.py").write_text(WORKER)
    return Job(home, f'exec {sys.executable} -m torch.distributed.run "$@"', nodes)


def submit(job: Job, pause: int = 0, faults: tuple = (), **values) -> None:
    for file in (*job.home.glob("paused*"), *job.home.glob("go")):
        file.unlink()
    argv = flags({**RUNS["detreg"], "out": job.home / "run", **values})
    job.submit(PAUSE=str(pause), FAULTS=json.dumps(faults), VALUES=json.dumps(argv))


def test_time_is_over(start, unbroken, tmp_path):  # noqa: F811
    """SIGUSR1, in the third step, to torchruns, training and loader processes: no step is lost, and the job continues
    as if nothing had been."""
    job = cluster(tmp_path)
    submit(job, pause=3, num_workers=1)
    job.wait_for("paused0", "paused1")
    job.send(signal.SIGUSR1)
    (tmp_path / "go").touch()
    code, again, printed = job.end()
    assert (code, again) == (75, True) and "stopped by SIGUSR1 after step 3, which is saved" in printed, printed
    assert load(tmp_path / "run")["step"] == 3
    assert start("detreg", tmp_path / "run", world=2)[0] == [0, 0]
    same_run(tmp_path / "run", unbroken("detreg", 2))
