"""Stand-ins for SLURM's commands, whose "nodes" are processes of this machine: tests/test_cluster.py puts them on PATH.

    slurm.py srun [--kill-on-bad-exit=1] COMMAND...    slurm.py scontrol requeue JOB

srun starts COMMAND once per node ($SLURM_NNODES), passes the signals that it gets on to every process of the step, as
slurmstepd does, and ends with the highest exit code. With --kill-on-bad-exit the first that fails ends the step by
SIGKILL. A process belongs to a job, or its step, if its environment says so: the part of SLURM's cgroups here.
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

OPTIONS = {"--kill-on-bad-exit=1"}


def processes(job: str, step: bool = False) -> list[int]:
    """Pids of a job, the batch shell among them; step: only those that srun has started."""
    wanted, found = {f"SLURM_JOB_ID={job}".encode()} | ({b"SLURM_STEP_ID=0"} if step else set()), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                found.append(int(entry.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def send(number: int, pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def srun(arguments: list[str]) -> int:
    options = set()
    while arguments[0].startswith("-"):
        options.add(arguments.pop(0))
    if unknown := options - OPTIONS:
        sys.exit(f"srun: unrecognized option {unknown}")
    job = os.environ["SLURM_JOB_ID"]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: send(number, processes(job, step=True)))
    tasks = [subprocess.Popen(arguments, env={**os.environ, "SLURM_STEP_ID": "0", "SLURM_NODEID": str(node)})
             for node in range(int(os.environ["SLURM_NNODES"]))]
    while any(task.poll() is None for task in tasks):
        time.sleep(0.02)
        if options and any(task.poll() for task in tasks):
            send(signal.SIGKILL, processes(job, step=True))
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


if __name__ == "__main__":
    if sys.argv[1] == "srun":
        sys.exit(srun(sys.argv[2:]))
    if sys.argv[1:3] != ["scontrol", "requeue"]:
        sys.exit(f"slurm.py: no such command {sys.argv[1:]}")
    with open("requeued.txt", "a") as file:
        file.write(sys.argv[3] + "\n")
