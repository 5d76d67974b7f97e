"""What grows with the images and with the GPUs.

    python benchmarks/growth.py store [--images 9000000] [--boxes 30] [--folder FOLDER]
    python benchmarks/growth.py steps [--methods detreg ...] [--gpus 8 64] [--tflops 40] [--gb_per_s 20]

store: a proposal store of that many images, random boxes in place of proposals, otherwise written, opened and read by
proposals.py; the names of its images as a source holds them; each in a fresh process. It needs 4 bytes per box (uint8
on a grid of 128) and 8 per image, all on the disk. Names are made up: walking a tree of files is not in it
(benchmarks/loader.py).
steps: an estimate from what is counted here: floating-point operations of one full-size training step of each method,
bytes of its gradient, and its checkpoint. --tflops and --gb_per_s are what a GPU is taken to compute and a node to send
and receive: assumptions, not measurements.
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from measure import machine, median, report  # first: it finds the project's files

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import proposals
import run
import train_step

GPUS_PER_NODE = 8
LOADER = {"detreg": 36.1, "updetr": 89.1, "siamese_detr": 31.4, "soco": 150, "dupr": 198}  # images/s per core, speed.md

# ==== 1. A store of millions of images ====


def made_up_names(count: int) -> list[str]:
    """As long as ImageNet's."""
    return [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(count)]


def rss_mib(kind: str = "Rss") -> float:
    """What of this process is in memory, MiB. Kinds: Rss; Private: its alone; Pss: shared pages in equal parts."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def random_rects(boxes: int) -> Callable[..., Iterator[list]]:
    """In place of proposals.compute_rects: about `boxes` random boxes per image."""
    def compute(source: Any, generator: Any, dtype: str, todo: range, workers: int) -> Iterator[list]:
        rng = np.random.default_rng(0)
        for first in range(todo.start, todo.stop, 4096):
            counts = rng.integers(boxes - boxes // 2, boxes + boxes // 2 + 1, min(4096, todo.stop - first))
            corners = np.sort(rng.integers(0, 128, (counts.sum(), 2, 2), dtype=np.uint8), axis=1)
            rects = np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0] + 1], 1)
            yield [(part, "") for part in np.split(rects, np.cumsum(counts)[:-1])]

    return compute


def build(folder: Path, images: int, boxes: int) -> list:
    """-> [bytes of the store, seconds, peak MiB of this process]"""
    source, begin = data.ImageFiles("made up", "/", made_up_names(images)), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts here
    with mock.patch.object(proposals, "compute_rects", random_rects(boxes)):
        proposals.build_store(folder, source, proposals.Generator(), progress=False)
    seconds = time.perf_counter() - begin
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return [sum(f.stat().st_size for f in folder.iterdir()), seconds, float(peak.split()[1]) / 1024]


def forget_pages(folder: Path) -> None:
    """The store's files leave the page cache: the next reads come from the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(store: proposals.ProposalStore, count: int, seed: int) -> list[float]:
    """Microseconds of so many reads at random places: median and 99th percentile."""
    seconds = []
    for i in np.random.default_rng(seed).integers(0, len(store), count).tolist():
        begin = time.perf_counter()
        store.boxes(i, (375, 500))
        seconds.append(time.perf_counter() - begin)
    return [1e6 * median(seconds), 1e6 * float(np.quantile(seconds, 0.99))]


class Boxes(torch.utils.data.Dataset):
    """Of a store, as a loader process reads them; each sample ends with what the process holds alone."""

    def __init__(self, store: proposals.ProposalStore, source: data.ImageFiles):
        self.store, self.source, self.indices = store, source, np.arange(len(source))

    def __getitem__(self, key: tuple[int, int]) -> float:
        index = int(self.indices[key[1]])
        self.source.key(index)
        self.store.boxes(index, (375, 500))
        return 0.0


def store_facts(folder: Path) -> dict[str, Any]:
    """Of opening and reading a finished store and its source, in a fresh process."""
    before, begin = rss_mib(), time.perf_counter()
    store = proposals.ProposalStore.open(folder)
    facts = {"opening the store, ms": 1e3 * (time.perf_counter() - begin), "MiB": rss_mib() - before}
    facts["a read from the disk, us: median, 99 %"] = read(store, 2000, 1)
    read(store, 10**5, 2)
    facts["a read from the page cache, us: median, 99 %"] = read(store, 10**5, 2)
    facts["MiB mapped after these reads (page cache, shared by all processes)"] = rss_mib() - before
    before, begin = rss_mib("Private"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")
    held = rss_mib()
    names = made_up_names(len(store))
    facts["names made up, s"], begin = time.perf_counter() - begin, time.perf_counter()
    source = data.ImageFiles("made up", "/", names)
    facts["the source from its names, s"] = time.perf_counter() - begin
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    facts["MiB at most meanwhile, the names with it"] = float(peak.split()[1]) / 1024 - held
    del names
    facts["MiB that stay"], begin = rss_mib("Private") - before, time.perf_counter()
    proposals.ProposalStore.open(folder, source)
    facts["opening the store, checked against the source, s"] = time.perf_counter() - begin
    sampler = data.StepSampler(len(store), 1024, 100)
    before, begin = rss_mib("Private"), time.perf_counter()
    batches = iter(sampler)
    next(batches)
    facts["an epoch's order, s"] = time.perf_counter() - begin
    facts["an epoch's order, MiB"] = rss_mib("Private") - before
    loader = data.make_loader(Boxes(store, source), sampler, num_workers=2,
                              collate=lambda samples: (os.getpid(), rss_mib("Private")))
    facts["MiB of a loader process alone, after 50,000 reads"] = max(dict(loader).values())
    return facts


def store_part(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = Path(folder) / "store"
        command = [sys.executable, __file__, "store", "--images", str(args.images), "--boxes", str(args.boxes)]
        child = subprocess.run([*command, "--fill", store], stdout=subprocess.PIPE, check=True, text=True)
        size, seconds, peak = json.loads(child.stdout.splitlines()[-1])
        forget_pages(store)
        child = subprocess.run([*command, "--open", store], stdout=subprocess.PIPE, check=True, text=True)
        facts = {"size, GB": size / 1e9, "writing it, s": seconds, "writing it, MiB at most": peak}
        rows = [[name, " ".join(f"{v:.3g}" for v in np.ravel(value))]
                for name, value in (facts | json.loads(child.stdout.splitlines()[-1])).items()]
    report(f"a proposal store of {args.images:,} images, {args.boxes} boxes each", ["what", "value"], rows,
           machine(torch.device("cpu"), images=args.images, boxes=args.boxes))


# ==== 2. Steps on many GPUs ====


def count_step(method: str, folder: str) -> tuple[float, float, float, float, int]:
    """-> (floating-point operations per image, MB of gradient, MB of the checkpoint, s to write it, the recipe's
    batch): one step, full size, with images as large as open_data's."""
    cfg, dataset, collate = train_step.open_data(method, [], folder)
    step = train_step.Step(method, cfg, torch.device("cpu"))
    batch = next(iter(data.make_loader(dataset, data.StepSampler(len(dataset), cfg.batch_size, 9), num_workers=0,
                                       collate=collate)))
    with train_step.plain_forms(), FlopCounterMode(display=False) as counter:
        step(batch)
    model, optimizer = step.arguments[1], step.arguments[-1]
    gradient = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    begin, path = time.perf_counter(), Path(folder) / "last.pt"
    run.save_checkpoint(path, model, optimizer, 1, cfg)
    seconds = time.perf_counter() - begin
    recipe = importlib.import_module(method).Config().batch_size
    return (counter.get_total_flops() / cfg.batch_size, gradient / 1e6, path.stat().st_size / 1e6, seconds, recipe)


def steps_part(args: argparse.Namespace) -> None:
    rows = []
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            flops, gradient, checkpoint, seconds, recipe = count_step(method, folder)
        for gpus in args.gpus:
            compute = flops * recipe / gpus / args.tflops / 1e12
            nodes = -(-gpus // GPUS_PER_NODE)
            # a ring between nodes: each sends and receives its share twice; within a node NVLink is not what limits
            reduce = 2 * (nodes - 1) / nodes * gradient / args.gb_per_s / 1e3
            rows.append([method, gpus, recipe if recipe % gpus == 0 else f"{recipe}: cannot be cut", flops / 1e9,
                         1e3 * compute, gradient, 1e3 * reduce, reduce / compute,
                         recipe / max(compute, reduce) / nodes / LOADER[method], checkpoint, seconds])
    report(f"an estimate, not a measurement: {args.tflops} TFLOP/s per GPU, {args.gb_per_s} GB/s between nodes",
           ["method", "GPUs", "batch", "GFLOP per image", "compute, ms", "gradient, MB", "all-reduce, ms",
            "all-reduce / compute", "loader cores per node", "checkpoint, MB", "written here, s"], rows,
           machine(torch.device("cpu"), tflops=args.tflops, gb_per_s=args.gb_per_s))


# ==== 3. Main ====


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(description=__doc__)
    parser.add_argument("part", choices=["store", "steps"])
    parser.add_argument("--images", type=run.Images, default=9_000_000)
    parser.add_argument("--boxes", type=run.Count, default=30, help="per image, in the mean")
    parser.add_argument("--folder", help="where the store is written, and removed; default: that of temporary files")
    parser.add_argument("--methods", nargs="+", default=list(LOADER), choices=list(LOADER))
    parser.add_argument("--gpus", type=run.Count, nargs="+", default=[8, 64])
    parser.add_argument("--tflops", type=run.Positive, default=40.0, help="that a GPU sustains (assumed)")
    parser.add_argument("--gb_per_s", type=run.Positive, default=20.0, help="each way, of a node's network (assumed)")
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.fill:
        print(json.dumps(build(args.fill, args.images, args.boxes)))
    elif args.open:
        print(json.dumps(store_facts(args.open)))
    else:
        {"store": store_part, "steps": steps_part}[args.part](args)


if __name__ == "__main__":
    run.cli(main)
