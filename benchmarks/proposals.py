"""Proposals: CPU time per image, and recall at IoU 0.5 of the first 30, 100 and 1000 boxes, on labelled images and on
synthetic scenes; then what a second process brings to the build of a store.

    python benchmarks/proposals.py [--rounds 5] [--images 72] [--seeds 3] [--data ../shared/data/bccd]
                                   [--time_data ../shared/data/imagenet_sample]

CPU time counts decoding, proposals and ranking in one thread. `speed`: against the released setting on the same images,
median over rounds. Recall of settings with a draw is the mean over --seeds seeds, @100 with its least and largest.
ImageNet-1k: 1,281,167 images; at original size a lower bound where the pictures that are timed are smaller than
ImageNet's (about 500 x 375). Rows at original size on a larger set use fewer images: `found on`.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import measure  # before the project's own files: it puts them first on the path
import cv2
import numpy as np
import torch
from torchvision.ops import box_iou

import proposals
import run
from annotations import open_detection
from data import SyntheticScenes, open_images

assert Path(proposals.__file__).resolve() != Path(__file__).resolve()
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CPU = torch.device("cpu")
IMAGENET = 1_281_167  # images of ImageNet-1k
SETTINGS = {"selective search fast 128": {},
            "quality 128": {"mode": "quality"},
            "quick 128": {"mode": "quick"},
            "fast 224": {"grid": 224},
            "fast original size": {"grid": None},
            "quick original size": {"grid": None, "mode": "quick"},
            "edge boxes 224": {"method": "edge_boxes", "grid": 224, "max_boxes": 300},
            "edge boxes original size": {"method": "edge_boxes", "grid": None, "max_boxes": 300},
            "random boxes": {"method": "random", "grid": None}}
RELEASED = ("selective search fast 128", "own")
FEW = 12  # images per labelled set for selective search at original size


def found_at(boxes: np.ndarray, truth: torch.Tensor) -> np.ndarray:
    """[objects]: the rank of the first box with IoU >= 0.5; past all ranks where there is none."""
    hit = box_iou(truth, torch.from_numpy(boxes)) >= 0.5
    return np.where(hit.any(1), hit.int().argmax(1) if len(boxes) else 0, 10**9)


def recalls(settings: dict[str, Any], labelled: Any, images: int, seeds: int) -> dict[str, dict[int, list[float]]]:
    """{order: {k: recall of the first k boxes, per seed}}."""
    generator = proposals.Generator(**settings)
    ranks = {}
    for i in range(images):
        image, target = labelled.load(i)
        truth = target["boxes_xyxy"][~target["ignore"]]
        hw = image.height, image.width
        for seed in range(seeds):
            drawn = proposals.image_seed(seed, i)
            if generator.method != "edge_boxes" or not seed:
                boxes = generator(image, drawn)
            ordered = {"own": boxes, "nms": proposals.rank_nms(boxes, hw, np.random.default_rng(drawn))}
            for order, some in ordered.items():
                ranks.setdefault(order, [[] for _ in range(seeds)])[seed].append(found_at(some, truth))
    return {order: {k: [float((np.concatenate(r) < k).mean()) for r in per_seed] for k in (30, 100, 1000)}
            for order, per_seed in ranks.items()}


def settings_table(args: argparse.Namespace, pictures: Any, labelled: dict[str, Any]) -> None:
    chosen = np.linspace(0, len(pictures) - 1, min(args.time_images, len(pictures))).astype(int)
    shown = {name: settings for name, settings in SETTINGS.items() if args.only in name or name == RELEASED[0]}
    generators = {(name, order): proposals.Generator(**settings, rank="nms" if order == "nms" else "opencv")
                  for name, settings in shown.items() for order in ("own", "nms")
                  if (name, order) != ("random boxes", "nms")}
    counts = {}

    def work(way: tuple[str, str]) -> None:
        counts[way] = [len(generators[way](pictures.load(int(i)), proposals.image_seed(0, i))) for i in chosen]

    seconds = measure.interleave({way: lambda way=way: work(way) for way in generators}, args.rounds, CPU,
                                 clock=time.process_time)
    columns = ["setting", "order", "CPU ms/image", "images/s", "speed", "boxes", "ImageNet-1k core-hours"]
    columns += [f"{name} @{k}" for name in labelled for k in (30, 100, 1000)] + ["found on"]
    rows = []
    for name, settings in shown.items():
        few = FEW if name in ("fast original size", "quick original size") else 10**9
        size = {data: min(len(s), args.images, 10**9 if data == "scenes" else few) for data, s in labelled.items()}
        found = {data: recalls(settings, s, size[data], args.seeds) for data, s in labelled.items()}
        for order in ("own", "nms"):
            if (way := (name, order)) not in generators:
                continue
            each = measure.median(seconds[way]) / len(chosen)
            rows.append([name, order, measure.spread(seconds[way], 1e3 / len(chosen)), 1 / each,
                         measure.spread(measure.ratios(seconds, RELEASED, way)),
                         float(np.mean(counts[way])), IMAGENET * each / 3600])
            for data in labelled:
                at = found[data][order]
                rows[-1] += [float(np.mean(at[30])), measure.spread(at[100]), float(np.mean(at[1000]))]
            rows[-1].append("/".join(map(str, size.values())))
    facts = measure.machine(CPU, opencv=cv2.__version__, rounds=args.rounds, timed_images=len(chosen),
                            timed_on=pictures.name, seeds=args.seeds)
    measure.report("proposals: cost of a setting and what it finds (IoU 0.5)", columns, rows, facts)


class Watched(proposals.Generator):
    """Leaves behind, per process, the seconds it has run and those it has waited for a core that others had (Linux)."""
    folder = ""

    def rects(self, image: np.ndarray, seed: int) -> np.ndarray:
        found = super().rects(image, seed)
        Path(self.folder, str(os.getpid())).write_text(Path("/proc/self/schedstat").read_text())
        return found


def scaling_table(args: argparse.Namespace, pictures: Any) -> None:
    """build_store with 0, 1, 2 workers, and two builds that know nothing of each other: what this machine can give at
    that moment. Where others compute too, wall time says little. `wants a core`: the part of the wall time that a
    worker ran, or waited for a core and not for work. From it and from what an image costs in CPU time follows the
    speed on cores that nobody else uses: processes x wants a core x cost alone / cost here."""
    def build(workers: int, out: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            proposals.build_store(out, pictures, Watched(mode=args.store_mode), workers=workers,
                                  limit=args.store_images, progress=False)

    def side_by_side(out: str) -> None:
        both = [multiprocessing.get_context("fork").Process(target=build, args=(0, f"{out}/{k}")) for k in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join()

    def watched(name: str) -> None:
        def cpu() -> float:
            return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

        with tempfile.TemporaryDirectory() as folder:
            Watched.folder = folder
            before, began = cpu(), time.perf_counter()
            ways[name][2](f"{folder}/store")
            wall = time.perf_counter() - began
            used[name].append(cpu() - before)
            seen = [sum(map(int, file.read_text().split()[:2])) / 1e9 for file in Path(folder).iterdir()
                    if file.is_file()]
            wants[name].append(sum(seen) / len(seen) / wall)

    # processes, stores made, work
    ways = {"0 workers": (1, 1, lambda out: build(0, out)), "1 worker": (1, 1, lambda out: build(1, out)),
            "2 workers": (2, 1, lambda out: build(2, out)), "two builds side by side": (2, 2, side_by_side)}
    used = {name: [] for name in ways}
    wants = {name: [] for name in ways}
    cv2.setNumThreads(0)  # before any fork
    seconds = measure.interleave({name: lambda name=name: watched(name) for name in ways}, args.rounds, CPU)
    rows = []
    for name, (processes, stores, _) in ways.items():
        cpu = used[name][-args.rounds:]
        want = wants[name][-args.rounds:]
        wall = [[stores * r for r in measure.ratios(seconds, base, name)] for base in ("0 workers", "1 worker")]
        busy = [c / (processes * s) for c, s in zip(cpu, seconds[name])]
        free = [processes * w * a / (c / stores) for w, a, c in zip(want, used["0 workers"][-args.rounds:], cpu)]
        rows.append([name, stores * args.store_images / measure.median(seconds[name]),
                     *map(measure.spread, (*wall, busy)), measure.median(cpu) / stores / args.store_images * 1e3])
        rows[-1] += [None, None] if name == "0 workers" else map(measure.spread, (want, free))
    columns = ["way", "images/s", "wall: speed / 0 workers", "/ 1 worker", "CPU time / (processes x wall)",
               "CPU ms/image", "wants a core", "on free cores / 0 workers"]
    measure.report(f"build_store, {args.store_mode}", columns, rows,
                   measure.machine(CPU, rounds=args.rounds, images=args.store_images, source=pictures.name))


def main() -> None:
    parser = run.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=run.Count, default=5)
    parser.add_argument("--images", type=run.Images, default=72, help="per labelled set, for recall")
    parser.add_argument("--seeds", type=run.Count, default=3, help="draws of the order, for recall")
    parser.add_argument("--data", default=str(SHARED / "bccd"), help="labelled set whose test images are searched")
    parser.add_argument("--time_data", default=str(SHARED / "imagenet_sample"), help="images that are timed")
    parser.add_argument("--time_images", type=run.Images, default=8)
    parser.add_argument("--store_images", type=run.Images, default=96)
    parser.add_argument("--store_mode", default="fast", choices=["fast", "quality", "quick"])
    parser.add_argument("--only", default="", help="settings whose name has this in it, beside the released one")
    parser.add_argument("--part", default="both", choices=["both", "settings", "scaling"])
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    labelled = {"scenes": open_detection("synthetic", None, "test", synthetic_images=args.images)}
    if Path(args.data).exists():
        labelled = {Path(args.data).name: open_detection(args.data, None, "test"), **labelled}
    pictures = open_images(args.time_data, None) if Path(args.time_data).exists() else SyntheticScenes(400)
    for path in (args.data, args.time_data):
        if not Path(path).exists():
            print(f"{path} is not there: synthetic scenes alone take its place")
    if args.part != "scaling":
        settings_table(args, pictures, labelled)
    if args.part != "settings":
        scaling_table(args, pictures)


if __name__ == "__main__":
    main()
