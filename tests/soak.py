"""Every demo preset in turn, killed with SIGKILL at random moments and started again: python tests/soak.py --minutes 20

Reports, per script: kills survived, steps lost to them (a checkpoint is written every 20 steps), and memory and open
files of the process and its loader processes in the middle and the last third of the longest stretch without a kill:
the median, and the least number of files (every tensor on its way from a loader process is one). Exit code 1: a run did
not continue, its log has a gap, or it grew.
Not part of the tests. Linux (/proc).
"""
import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("detreg", "updetr", "siamese_detr", "soco", "dupr", "finetune")


def usage(pid: int) -> tuple[float, int]:
    """(memory in MiB, open files) of a process and its children.
    Shared pages are counted once for all who share them (Pss)."""
    memory = files = 0
    for p in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        try:
            memory += int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{p}/smaps_rollup").read_text(), re.M)[1]) / 1024
            files += len(os.listdir(f"/proc/{p}/fd"))
        except (OSError, TypeError):                                      # it has just ended
            continue
    return memory, files


def steps_logged(out: Path) -> list[int]:
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    steps = []
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except json.JSONDecodeError:                                      # cut by the kill
            break
    return steps


def soak(script: str, seconds: float, rng: random.Random, folder: Path) -> tuple[str, bool]:
    """One line of the table, and whether all went well."""
    end, run, kills, lost, longest, fine = time.monotonic() + seconds, 0, 0, [], [], True
    while time.monotonic() < end:
        out = folder / f"{script}{run}"
        before = steps_logged(out)
        command = [sys.executable, f"{script}.py", "--preset", "demo", "--out", out, "--save_every", "20",
                   "--log_every", "1", "--seed", run]
        with open(folder / "output.txt", "w") as output:
            process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=output, stderr=output,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
            started, span, samples, anywhere = time.time(), rng.uniform(2, 60), [], rng.random() < 0.2
            stop = time.monotonic() + span
            while process.poll() is None and time.monotonic() < min(stop, end):
                time.sleep(0.5)
                if ((out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_mtime > started
                    and process.poll() is None):  # it trains
                    samples.append(usage(process.pid))
                elif not anywhere:                                        # most kills are to hit the training
                    stop = time.monotonic() + span
            if process.poll() is None:
                process.kill()
                kills += 1
            code = process.wait()
        printed = (folder / "output.txt").read_text()
        found = re.search(r"at step (\d+)\n", printed)
        if before and (found or samples):
            lost.append(before[-1] + 1 - (int(found[1]) if found else 0))
        steps = steps_logged(out)
        if code not in (0, -9) or steps != list(range(len(steps))):
            print(f"{script}: exit code {code}, steps {steps[:1]}..{steps[-1:]} ({len(steps)})\n{printed[-3000:]}",
                  flush=True)
            fine = False
        run += code == 0  # a finished run: the next one has another seed
        longest = max(longest, samples, key=len)
    third = len(longest) // 3 or 1
    middle, last = (list(zip(*part)) if part else [(0,), (0,)]
                    for part in (longest[third:2 * third], longest[2 * third:]))
    (memory, memory_end), (files, files_end) = ([statistics.median(part[0]) for part in (middle, last)],
                                                [min(part[1]) for part in (middle, last)])
    # one batch more may be on its way
    fine &= len(longest) < 40 or memory_end < 1.2 * memory and files_end < 1.1 * files + 32
    losses, grown = (f"{sum(lost)} (at most {max(lost, default=0)})",
                     f"{memory:>10.0f} -> {memory_end:<6.0f}{files:>8} -> {files_end:<6}")
    return (f"{script:<14}{kills:>6}{run:>10}{losses:>22}{grown}{len(longest) / 2:>7.0f}"
            + "   too short" * (len(longest) < 40), fine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20, help="for all scripts together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    args = parser.parse_args()
    rng, fine = random.Random(args.seed), True
    print(f"{'':<14}{'kills':>6}{'finished':>10}{'steps lost':>22}{'memory MiB':>18}{'open files':>16}{'over s':>9}",
          flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for script in args.scripts:
            line, well = soak(script, args.minutes * 60 / len(args.scripts), rng, Path(folder))
            fine &= well
            print(line + ("" if well else "   FAILED"), flush=True)
    sys.exit(not fine)


if __name__ == "__main__":
    main()
