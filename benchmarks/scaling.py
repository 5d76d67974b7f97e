"""Weak scaling: the same batch per process on 1, 2, ... processes under torchrun, and what --accumulate costs.

    python benchmarks/scaling.py [--method detreg] [--processes 1 2] [--rounds 3] [--steps 40] [any flag of the script]

Each run is the script itself with one thread per process (CPU) or one GPU per process; its images/s is the median of
its log after the first quarter. Efficiency of N processes = their images/s / (N x those of one), round by round.
`alone x N`: N runs of one process at the same time, what this machine gives N processes that say nothing to each other,
the most that any N could reach. Accumulation: two micro-batches per step against one.
"""
from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure  # first: it finds the project's files

import torch

import common
import run

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("detreg", "updetr", "siamese_detr", "soco", "dupr")


def start(method: str, flags: list[str], processes: int, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               str(ROOT / f"{method}.py")]
    command += ["--preset", "demo", "--probe_images", "0", "--log_every", "1", "--save_every", "1000000",
                "--out", str(out), *flags]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def images_per_s(process: subprocess.Popen, out: Path) -> float:
    _, errors = process.communicate()
    if process.returncode:
        raise common.UserError(f"{' '.join(process.args[4:])} ended with {process.returncode}: {errors[-800:]}")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_s"] for line in lines[len(lines) // 4:])


def main() -> None:
    parser = run.Parser(description=__doc__)
    parser.add_argument("--method", default="detreg", choices=METHODS)
    parser.add_argument("--processes", type=run.Processes, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=run.Count, default=3)
    parser.add_argument("--steps", type=run.Count, default=40)
    args, flags = parser.parse_known_args()
    flags += ["--max_steps", str(args.steps), "--epochs", "100000", "--num_workers", "1", "--synthetic_images", "128"]
    batch = importlib.import_module(args.method).PRESETS["demo"]["batch_size"]
    most = max(args.processes)
    found: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for n in args.processes:
                out = Path(folder) / f"{n}"
                process = start(args.method, ["--batch_size", str(batch * n), *flags], n, out)
                found.setdefault(f"{n} process{'es' if n > 1 else ''}", []).append(images_per_s(process, out))
            outs = [Path(folder) / f"alone{i}" for i in range(most)]
            alone = [start(args.method, ["--batch_size", str(batch), *flags], 1, out) for out in outs]
            found.setdefault(f"alone x {most}", []).append(sum(map(images_per_s, alone, outs)))
            if args.method != "soco":  # its BatchNorm sees the whole batch: it does not accumulate
                out = Path(folder) / "accumulate"
                process = start(args.method, ["--batch_size", str(2 * batch), "--accumulate", "2", *flags], 1, out)
                found.setdefault("1 process, accumulate 2", []).append(images_per_s(process, out))
    one = found[next(iter(found))]
    rows = []
    for name, values in found.items():
        n = most if "alone" in name else int(name.split()[0])
        rows.append([name, measure.spread(values), measure.spread([v / (n * first) for v, first in zip(values, one)])])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure.report(f"{args.method}, {batch} images per process and micro-batch",
                   ["run", "images/s", "per process / one alone"], rows,
                   measure.machine(device, rounds=args.rounds, steps=args.steps))


if __name__ == "__main__":
    run.cli(main)
