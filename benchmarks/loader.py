"""Images/s per core of every method's data set, against the same pipeline in torchvision's v1 transforms on PIL images,
as in the released codes; then how long a list of ImageNet's length takes to open, and what its loader processes hold
for themselves.

    OMP_NUM_THREADS=1 python benchmarks/loader.py                       # both tables, 3 minutes
    python benchmarks/loader.py --methods soco dupr --images FOLDER --rounds 9 --list 0
    python benchmarks/loader.py --large --per_round 8 --list 0          # of 12 megapixels, and without reduced copies

CPU time of one thread, draws anew in every round, files in the page cache. Proposals are read from a store (ours) or
from memory (baseline, where the released codes have them in files); DETReg's released loader searches them while it
loads, so its row `online search` has that in it.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import interleave, machine, median, peak_mib, ratios, report, spread  # first: it finds the project's files

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T
from torchvision.transforms import functional as F

import data
import detreg
import dupr
import finetune
import proposals
import run
import siamese_detr
import soco
import updetr
from annotations import open_detection

SCRIPTS = {"detreg": detreg, "updetr": updetr, "siamese_detr": siamese_detr, "soco": soco, "dupr": dupr,
           "finetune": finetune}

# ==== 1. The baselines ====


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def colours(saturation: float = 0.4, blur: float = 0.5, solarize: float = 0.0) -> list:
    return [T.RandomApply([T.ColorJitter(0.4, 0.4, saturation, 0.1)], 0.8),
            T.RandomGrayscale(0.2), T.RandomApply([blurred], blur),
            T.RandomApply([functools.partial(ImageOps.solarize, threshold=128)], solarize)]


RNG = np.random.default_rng(0)
NORMAL = [T.ToTensor(), T.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)]
PLAIN = T.Compose(NORMAL)
PATCH = T.Compose([T.Resize((128, 128)), *colours()[:3], *NORMAL])


def resize(image: Image.Image, boxes: torch.Tensor, size: int, max_size: int | None
           ) -> tuple[Image.Image, torch.Tensor]:
    hw = data.resized_hw((image.height, image.width), size, max_size)
    return F.resize(image, list(hw)), data.resize_boxes(boxes, (image.height, image.width), hw)


def detr_transform(image: Image.Image, boxes: torch.Tensor, cfg, crop: bool = True, flip: bool = True
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """DETR's: flip, then one resize, or in half of the cases resize, crop, resize."""
    if flip and random.random() < 0.5:
        image = F.hflip(image)
        boxes = data.flip_boxes(boxes, image.width)
    if crop and random.random() < 0.5:
        image, boxes = resize(image, boxes, random.choice(cfg.crop_scales), None)
        low, high = cfg.crop_range
        region = T.RandomCrop.get_params(image, [random.randint(min(low, side), min(side, high))
                                                 for side in (image.height, image.width)])
        image = F.crop(image, *region)
        boxes = data.crop_boxes(boxes, region)[0]
    image, boxes = resize(image, boxes, random.choice(cfg.scales), cfg.max_size)
    return PLAIN(image), data.normalized_cxcywh(boxes, (image.height, image.width))


def patches(image: Image.Image, boxes: torch.Tensor) -> torch.Tensor:
    return torch.stack([PATCH(image.crop(tuple(box))) for box in boxes.tolist()])


def detreg_baseline(path: Path, cfg, found: Callable) -> tuple:
    image = Image.open(path).convert("RGB")
    boxes = torch.from_numpy(found(image)[:cfg.max_prop])
    return patches(image, boxes), detr_transform(image, boxes, cfg)


def online_search(image: Image.Image) -> np.ndarray:
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.resize(np.array(image), (128, 128)))
    search.switchToSelectiveSearchFast()
    boxes = search.process().astype(np.float32) / 128 * np.float32([image.width, image.height] * 2)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def updetr_baseline(path: Path, cfg) -> tuple:
    image = Image.open(path).convert("RGB")
    boxes = torch.from_numpy(updetr.draw_patches(RNG, (image.height, image.width), cfg.num_patches)).float()
    return patches(image, boxes), detr_transform(image, boxes, cfg, crop=False, flip=False)


def siamese_baseline(path: Path, cfg, found: Callable) -> tuple:
    image = Image.open(path).convert("RGB")
    image, boxes = resize(image, torch.from_numpy(found(image)), random.choice(cfg.scales), cfg.max_size)
    if random.random() < 0.5:
        image = F.hflip(image)
        boxes = data.flip_boxes(boxes, image.width)
    top, left, h, w = T.RandomResizedCrop.get_params(image, (0.5, 1.0), (3 / 4, 4 / 3))
    views = siamese_detr.view_boxes((left, top, left + w, top + h), cfg.view_iou, random.random(),
                                    random.random(), random.random() < 0.5)
    usable = siamese_detr.usable_regions(boxes.double(), views, (h, w), cfg.min_area)
    if not len(usable[0]):
        usable = tuple(siamese_detr.to_view(views[2][None], v, (h, w)) for v in views[:2])
    regions = siamese_detr.choose_regions(usable, views, (h, w), cfg.num_regions,
                                          torch.randn(cfg.num_regions, 4, dtype=torch.float64))
    pictures = [F.resize(image.crop(tuple(v.tolist())), [h, w]) for v in views[:2]]
    view = T.Compose([*colours()[:3], *NORMAL])
    return [patches(p, r) for p, r in zip(pictures, regions)], [view(p) for p in pictures]


def soco_baseline(path: Path, cfg, found: Callable) -> tuple:
    image = Image.open(path).convert("RGB")
    boxes = soco.usable_boxes(found(image), image.size, cfg)
    crops = [(0, 0, image.height, image.width),
             *(T.RandomResizedCrop.get_params(image, cfg.crop_area, (3 / 4, 4 / 3)) for _ in range(2))]
    rects = [(x, y, x + w, y + h) for y, x, h, w in crops]
    flips = [random.random() < 0.5 for _ in crops]
    targets = []
    for rect, flip, side in zip(rects[1:], flips[1:], (224, 112)):
        draw = soco.draw_pair(RNG, len(soco.overlapping(boxes, rect)), cfg)
        both = soco.pair_boxes(boxes, rects[0], rect, draw, cfg.num_boxes)
        levels = [soco.assign_levels(soco.resize_boxes(b, r, s), cfg.level_sizes)
                  for b, r, s in zip(both, (rects[0], rect), (224, side))]
        targets.append([soco.relative_boxes(both[0], rects[0], flips[0]), soco.relative_boxes(both[1], rect, flip),
                        soco.correspondence(both[0][:, 4], both[1][:, 4], *levels, 4)])
    views = []
    for region, flip, side, first in zip(crops, flips, (224, 224, 112), (True, False, False)):
        view = F.resized_crop(image, *region, [side, side])
        view = F.hflip(view) if flip else view
        views.append(T.Compose([*colours(0.2, 1.0 if first else 0.1, 0.0 if first else 0.2), *NORMAL])(view))
    return views, targets


def dupr_baseline(path: Path, cfg) -> tuple:
    image = Image.open(path).convert("RGB")
    views = []
    transform = T.Compose(colours()[:3])
    for _ in range(2):
        region = T.RandomResizedCrop.get_params(image, cfg.crop_area, (3 / 4, 4 / 3))
        view = transform(F.resized_crop(image, *region, [cfg.image_size] * 2))
        flip = random.random() < 0.5
        views.append((PLAIN(F.hflip(view) if flip else view), region, flip))
    rects = [(x, y, x + w, y + h) for _, (y, x, h, w), _ in views]
    return torch.stack([v[0] for v in views]), dupr.overlap_boxes(rects, [v[2] for v in views], cfg.image_size)


# ==== 2. Images per second ====


def labels_file(folder: Path, source: data.ImageFiles) -> Path:
    """A COCO json with 5 boxes in every image."""
    sizes = [source.load(i).size for i in range(len(source))]
    images = [{"id": i, "width": w, "height": h, "file_name": source.key(i)} for i, (w, h) in enumerate(sizes)]
    annotations = [{"id": 5 * i + k, "image_id": i, "category_id": 1, "bbox": [w * k / 10, h * k / 10, w / 2, h / 2],
                    "iscrowd": 0} for i, (w, h) in enumerate(sizes) for k in range(5)]
    (folder / "boxes.json").write_text(json.dumps({"images": images, "annotations": annotations,
                                                   "categories": [{"id": 1, "name": "thing"}]}))
    return folder / "boxes.json"


def make_large(source: data.ImageFiles, folder: Path, grain: float) -> data.ImageFiles:
    """The pictures resized to 12 megapixels, with noise of a standard deviation of `grain` grey levels."""
    folder.mkdir()
    for i in range(len(source)):
        image = source.load(i)
        side = (4000, 3000) if image.width >= image.height else (3000, 4000)
        array = np.asarray(image.resize(side, Image.Resampling.BICUBIC)) + RNG.normal(0, grain, (side[1], side[0], 1))
        Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04d}.jpg", quality=90)
    return data.open_images(str(folder), None)


def without_pyramid(way: Callable, position: int, epoch: int) -> dict:
    kept, data.reduction = data.reduction, lambda *sizes: 1
    try:
        return way(position, epoch)
    finally:
        data.reduction = kept


def ways_of(method: str, source: data.ImageFiles, work: Path, large: bool = False, random_boxes: bool = False
            ) -> dict[str, Callable]:
    """-> {way: (position, epoch) -> a sample}, ours first. Proposals are computed here. large: searched on a small copy
    whatever the method, and one way more, which decodes every picture whole."""
    ways = _ways_of(method, source, work, large, random_boxes)
    return ways | ({"ours, decoded whole": functools.partial(without_pyramid, ways["ours"])} if large else {})


def _ways_of(method: str, source: data.ImageFiles, work: Path, large: bool, random_boxes: bool) -> dict[str, Callable]:
    cfg = SCRIPTS[method].Config()
    everything = np.arange(len(source))
    paths = [source.root / key for key in source.keys]
    if method in ("updetr", "dupr"):
        ours, baseline = {"updetr": (updetr.PatchDataset, updetr_baseline),
                          "dupr": (dupr.TwoCropsDataset, dupr_baseline)}[method]
        ours = ours(cfg, source, everything)
        return {"ours": lambda i, epoch: ours[epoch, i], "baseline": lambda i, epoch: baseline(paths[i], cfg)}
    if method == "finetune":
        labelled = open_detection(str(labels_file(work, source)), str(source.root), "train")
        ours = finetune.LabelledDataset(cfg, labelled)
        boxes = [torch.from_numpy(record.boxes) for record in labelled.records]
        return {"ours": lambda i, epoch: ours[epoch, i],
                "baseline": lambda i, epoch: detr_transform(Image.open(paths[i]).convert("RGB"), boxes[i], cfg)}
    generator = (proposals.Generator("random") if random_boxes else proposals.Generator() if large
                 else proposals.Proposals(cfg).generator)
    store = proposals.build_store(work / method, source, generator, progress=False)
    found = [store.boxes(i, Image.open(path).size[::-1]) for i, path in enumerate(paths)]
    if method == "soco":  # its file holds x, y, w, h in whole pixels
        found = [np.rint(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)).astype(np.int64)
                 for boxes in found]
    ours, baseline = {"detreg": (detreg.RegionDataset, detreg_baseline),
                      "siamese_detr": (siamese_detr.TwoViewDataset, siamese_baseline),
                      "soco": (soco.ObjectViewsDataset, soco_baseline)}[method]
    ours = ours(cfg, source, everything, proposals.Proposals(cfg, store))
    ways = {"ours": lambda i, epoch: ours[epoch, i],
            "baseline": lambda i, epoch: baseline(paths[i], cfg, lambda image: found[i])}
    if method == "detreg" and not random_boxes:
        ways["baseline, online search"] = lambda i, epoch: baseline(paths[i], cfg, online_search)
    return ways


def speed(args, source: data.ImageFiles, work: Path) -> None:
    rows = []
    epochs = itertools.count(1)
    device = torch.device("cpu")
    for method in args.methods:
        ways = {name: lambda way=way: [way(i, next(epochs)) for i in range(len(source))]
                for name, way in ways_of(method, source, work, args.large, args.random_boxes).items()}
        seconds = interleave(ways, args.rounds, device, clock=time.process_time)
        per_s = {name: len(source) / median(s) for name, s in seconds.items()}
        rows += [[method, name, per_s["ours"], per_s[name], spread(ratios(seconds, name, "ours"))]
                 for name in ways if name != "ours"]
    report("images/s per core (CPU time), full-size configuration; ratio: ours over the baseline, "
           "median (least..most) over rounds", ["method", "against", "ours", "baseline", "ratio"], rows,
           machine(device, images=len(source), rounds=args.rounds,
                   median_px=int(np.median([source.load(i).width for i in range(len(source))]))))


# ==== 3. Start-up on a long list ====


class Keys(torch.utils.data.Dataset):
    """What a method's data set holds per image, without its pictures: the source and the indices."""

    def __init__(self, source: data.ImageFiles):
        self.source, self.indices = source, np.arange(len(source))

    def __getitem__(self, key: tuple[int, int]) -> int:
        return len(self.source.key(int(self.indices[key[1]])))


def private_mib() -> tuple[int, float]:
    """-> (process id, MiB that this process alone holds)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return os.getpid(), sum(float(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def open_and_load(path: str) -> list:
    """-> [files, seconds to open, MiB of the peak, MiB per worker], of two loader processes that look up 100,000 keys
    each. In a fresh process."""
    opened, seconds = [], []

    def work():
        start = time.perf_counter()
        opened.append(data.open_images(path, None))
        opened[0].fingerprint()
        seconds.append(time.perf_counter() - start)

    mib = peak_mib(work, torch.device("cpu"))
    source = opened[0]
    sampler = data.StepSampler(len(source), min(1000, len(source)), 200)
    loader = data.make_loader(Keys(source), sampler, num_workers=2, collate=lambda lengths: private_mib())
    return [len(source), seconds[0], mib, max(dict(loader).values())]


def start_up(files: int, folder: Path) -> None:
    rows = []
    for count in (1000, files):
        root = folder / str(count)
        names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(count)]
        for name in names[:1000]:
            (root / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        for name in names:
            os.close(os.open(root / "tree" / name, os.O_CREAT | os.O_WRONLY))
        random.Random(0).shuffle(names)
        (root / "list.txt").write_text("".join(f"tree/{name}\n" for name in names))
        for kind, path in (("folder", root / "tree"), ("list", root / "list.txt")):
            child = subprocess.run([sys.executable, __file__, "--open", path], stdout=subprocess.PIPE, check=True)
            rows.append([kind, *json.loads(child.stdout)])
    report("opening a source with its fingerprint, in a fresh process; memory beyond its imports at most, "
           "and of each of two loader processes alone", ["source", "files", "s", "peak MiB", "MiB per worker"], rows,
           machine(torch.device("cpu"), loader=multiprocessing.get_start_method()))


# ==== 4. Main ====


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", nargs="*", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--images",
                        help="folder of pictures (default: ../shared/data/imagenet_sample, else drawn scenes)")
    parser.add_argument("--rounds", type=run.Count, default=5)
    parser.add_argument("--per_round", type=run.Images, default=24, help="images in a round, spread over the folder")
    parser.add_argument("--large", action="store_true", help="the pictures resized to 12 megapixels")
    parser.add_argument("--grain", type=run.NonNegative, default=0.0,
                        help="with --large: standard deviation of noise on them, grey levels")
    parser.add_argument("--random_boxes", action="store_true", help="in the store: no search, which needs OpenCV's "
                        "contrib modules")
    parser.add_argument("--list", type=run.Natural, default=1_281_167, help="files of the long list; 0: no such part")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.open:
        print(json.dumps(open_and_load(args.open)))
        return
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        if args.methods:
            folder = Path(args.images or Path(__file__).resolve().parents[2] / "shared/data/imagenet_sample")
            if not args.images and not folder.is_dir():
                folder = Path(work) / "scenes"
                folder.mkdir()
                scenes = data.SyntheticScenes(args.per_round, 400)
                for i in range(len(scenes)):
                    scenes.load(i).save(folder / f"{i:04d}.jpg", quality=95)
            everything = data.open_images(str(folder), None)
            chosen = data.evenly_spread(len(everything), args.per_round)
            source = data.ImageFiles(folder.name, everything.root, [everything.key(i) for i in chosen])
            speed(args, make_large(source, Path(work) / "large", args.grain) if args.large else source, Path(work))
    if args.list:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            start_up(args.list, Path(folder))


if __name__ == "__main__":
    run.cli(main)
