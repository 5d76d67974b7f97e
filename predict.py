"""Prediction: a detector -> boxes on new pictures, drawn and as files.

Run:
    python predict.py out/finetune-own-cards PHOTOS                  # a run's folder, or a file; a folder of pictures
    python predict.py CHECKPOINT A.jpg B.png LIST.txt --threshold 0.3 --out found
    python predict.py CHECKPOINT image_info_test.json                # a COCO json without annotations: its image ids
    python predict.py CHECKPOINT AERIAL --tile 800                   # pictures far larger than those of the training
    torchrun --nproc_per_node=8 predict.py CHECKPOINT PHOTOS

From Python:
    import predict
    detect = predict.load("out/finetune-own-cards")
    found = detect(Image.open("photo.jpg"))  # or a uint8 array [h, w, 3] RGB or [h, w], or a list of pictures
    found["boxes_xyxy"], found["names"], found["scores"]

Classes, image size and score thresholds are those of the checkpoint. Boxes are in pixels of the picture as it is shown
(turned by its EXIF entry). The files that are written, and how tiles are merged: docs/predict.md
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import csv
import dataclasses
import io
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch import Tensor, nn

import convert
import data
import evaluation
import finetune
import rcnn
import run
from common import UserError
from formats import coco_folders, find_files, id_order, image_name, json_id
from run import Images, Pixels, Processes, Share

Crop = tuple[int, int, int, int]  # x1, y1, x2, y2 of a picture, px
KNOBS = {"threshold": Share | None, "tile": Annotated[int, run.Range(32, 2**14)] | None,
         "overlap": Annotated[float, run.Range(0, 0.9)], "eval_size": Pixels | None, "max_size": Pixels | None,
         "batch_size": Images, "num_workers": Processes}
OVERLAP_IOU = 0.5  # of two boxes of one class and two passes: more, and the better one stands for both
COVERED = 0.7  # share of a cut box that lies in another one of its class: more, and it is a part of that
EDGE = 0.01  # share of a tile: a box this near to an inner edge is cut by it
PIXELS_AHEAD = 1e8  # decoded pictures in memory that wait for the model, or to be drawn, px in all; one may be larger

# ==== 1. The detector ====


@dataclass
class Picture:
    """A picture on its way through the detector."""
    key: Any
    image: Image.Image  # RGB
    crops: list[Crop]  # one pass of the detector each; the first is the whole
    views: Iterable[Tensor]  # what it sees of each, [3, h, w]
    passes: list[dict[str, Tensor]] = field(default_factory=list)  # what it finds in each
    found: dict[str, Tensor] = field(default_factory=dict)  # in all: boxes_xyxy, labels, scores and masks [n, 1, S, S]

    def masks(self) -> Iterator[np.ndarray]:
        """Of each box: bool [h, w]. One at a time: a hundred of a large picture are gigabytes."""
        for mask, box in zip(self.found["masks"], self.found["boxes_xyxy"]):
            yield rcnn.paste_masks(mask[None], box[None], (self.image.height, self.image.width))[0].numpy()


@dataclass
class Predictor:
    """What load() gives. `categories`: [{"id", "name"}], in whose order labels count; `names`: theirs, no two alike;
    `thresholds`: of each, float64 [K]."""
    model: nn.Module
    cfg: finetune.Config
    label_map: list[int]  # of each row of the class head the label, -1: none
    softmax: bool
    categories: list[dict]
    names: list[str]
    thresholds: Tensor
    device: torch.device
    tile: int
    overlap: float
    batch_size: int

    def __call__(self, images: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """A PIL image, or a uint8 array [h, w, 3] RGB or [h, w] -> boxes_xyxy float32 [n, 4] px, labels int64 [n],
        names, scores float32 [n], best first; of a Mask R-CNN also masks bool [n, h, w]. Of a list: a list."""
        several = isinstance(images, (list, tuple))
        pictures = (self.prepare(None, to_picture(image)) for image in (images if several else [images]))
        results = []
        for picture in self.stream(pictures):
            result = picture.found | {"names": [self.names[i] for i in picture.found["labels"].tolist()]}
            if "masks" in result:
                shape = len(result["masks"]), picture.image.height, picture.image.width
                masks = np.fromiter(picture.masks(), np.dtype((bool, shape[1:])), shape[0])
                result["masks"] = torch.from_numpy(masks)
            results.append(result)
        return results if several else results[0]

    def prepare(self, key: Any, image: Image.Image) -> Picture:
        """`key` is the caller's own. A single view is made here, which may be another thread; tiles when their turn
        comes."""
        crops = tile_crops(image.size, self.tile, self.overlap)
        views = (evaluation.evaluation_view(image if i == 0 else image.crop(crop), self.cfg.eval_size,
                                            self.cfg.max_size) for i, crop in enumerate(crops))
        return Picture(key, image, crops, views if len(crops) > 1 else list(views))

    def stream(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        """The pictures, in order, with what is found. Views of one size that follow each other share a batch, so that
        nothing is padded: what is found in a picture does not depend on the others."""
        waiting: deque[Picture] = deque()
        batch: list[tuple[Picture, Crop, Tensor]] = []

        def run_batch() -> None:
            for (picture, *_), found in zip(batch, self.detect([v for *_, v in batch], [c for _, c, _ in batch])):
                picture.passes.append(found)
            batch.clear()

        def finished() -> Iterator[Picture]:
            while waiting and len(waiting[0].passes) == len(waiting[0].crops):
                picture = waiting.popleft()
                picture.found = join_passes(picture.passes, picture.crops)
                picture.passes = []
                yield picture

        for picture in pictures:
            waiting.append(picture)
            for crop, view in zip(picture.crops, picture.views):
                if batch and (len(batch) == self.batch_size or batch[0][2].shape != view.shape):
                    run_batch()
                batch.append((picture, crop, view))
            if len(batch) == self.batch_size or sum(math.prod(p.image.size) for p in waiting) > PIXELS_AHEAD:
                run_batch()
            yield from finished()
        if batch:
            run_batch()
        yield from finished()

    @torch.no_grad()
    def detect(self, views: list[Tensor], crops: list[Crop]) -> list[dict[str, Tensor]]:
        """Of views [3, h, w] of one size, which show these crops: what is found in each, in pixels of the picture."""
        images = torch.stack(views).to(self.device)
        sides = torch.tensor([[y2 - y1, x2 - x1] for x1, y1, x2, y2 in crops])
        if rcnn.is_rcnn(self.cfg.detector):
            scale = sides.flip(1).repeat(1, 2) / torch.tensor(images.shape[:1:-1] * 2)
            found = [{k: v.cpu() for k, v in one.items()} for one in self.model(list(images))]
            found = [one | {"boxes_xyxy": one.pop("boxes") * by,
                            "labels": one["labels"] - rcnn.first_label(self.cfg.detector)}
                     for one, by in zip(found, scale)]
        else:
            outputs = self.model(images, images.new_zeros(images[:, 0].shape, dtype=torch.bool))
            boxes = common.boxes_to_pixels(outputs["pred_boxes"].cpu(), sides)
            found = [self.best(*one) for one in zip(outputs["pred_logits"].cpu(), boxes)]
        return [self.chosen(one, crop) for one, crop in zip(found, crops)]

    def best(self, logits: Tensor, boxes_xyxy: Tensor) -> dict[str, Tensor]:
        """The detections of one view by the DETR family, as finetune.py evaluates them; labels are rows of the head."""
        if self.cfg.class_agnostic:  # row 1 of a pretext head is "object"
            scores = logits.softmax(-1)[:, :-1] if self.softmax else logits.sigmoid()
            scores, order = scores[:, min(1, scores.shape[1] - 1)].sort(descending=True, stable=True)
            return {"scores": scores[:100], "labels": order[:100] * 0, "boxes_xyxy": boxes_xyxy[order[:100]]}
        best = common.top_detections(logits, boxes_xyxy, self.cfg.detections_per_image, focal=not self.softmax)
        return {"scores": best["scores"], "labels": best["labels"], "boxes_xyxy": best["boxes"]}

    def chosen(self, found: dict[str, Tensor], crop: Crop) -> dict[str, Tensor]:
        """Those of a class and above its threshold, moved from the crop to its picture and clipped to the crop."""
        labels = torch.tensor(self.label_map)[found["labels"]]
        keep = (labels >= 0) & (found["scores"].double() >= self.thresholds[labels])
        found = {k: v[keep] for k, v in (found | {"labels": labels}).items()}
        first, last = (torch.tensor(corner * 2, dtype=torch.float32) for corner in (crop[:2], crop[2:]))
        return found | {"boxes_xyxy": (found["boxes_xyxy"].float() + first).clamp(first, last)}


def to_picture(image: Any) -> Image.Image:
    """What a user calls a picture -> PIL RGB. UserError: what is taken."""
    taken = ("give a PIL image, or a uint8 array [height, width, 3] in RGB order or [height, width] in grey, "
             "or a list of these")
    if isinstance(image, Image.Image):
        try:
            if 0 in image.size:
                raise ValueError("it has no pixels")
            return data.to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # as data.decode_image
            raise UserError(f"a picture cannot be decoded ({type(error).__name__}: {error})") from error
    if not isinstance(image, np.ndarray):
        raise UserError(f"a {type(image).__name__} is no picture; {taken}")
    if image.dtype != np.uint8 or not (image.ndim == 2 or image.ndim == 3 and image.shape[2] == 3) or not image.size:
        raise UserError(f"an array of {image.dtype} {list(image.shape)} is no picture; {taken}")
    return Image.fromarray(image).convert("RGB")


def load(checkpoint: str | Path, device: str = "auto", threshold: float | None = None, tile: int | None = 0,
         overlap: float = 0.2, *, batch_size: int = 8, eval_size: int | None = None, max_size: int | None = None
         ) -> Predictor:
    """The detector of a checkpoint: a file, a run's folder or hf:FOLDER. threshold: of all classes, rather than the
    checkpoint's; tile: side of the tiles of larger pictures, px, 0 = whole pictures; eval_size, max_size: short and
    longest side of what the detector sees, rather than the checkpoint's. UserError: it is no detector, or of classes
    that nothing names."""
    tile = tile or None
    knobs = locals()
    run.check_ranges({k: v for k, v in knobs.items() if k in KNOBS}, KNOBS)
    device = common.find_device(device, common.world_size() > 1)
    init, cfg = open_detector(str(checkpoint))
    sizes = {"eval_size": 800, "max_size": 1333} | finetune.image_sizes(init)
    sizes |= {name: knobs[name] for name in sizes if knobs[name]}
    cfg = dataclasses.replace(cfg, **sizes)
    head = None if rcnn.is_rcnn(cfg.detector) else finetune.class_head(init, cfg.detector)
    cfg.class_agnostic = bool(head and head.pretext)
    categories = [{"id": 1, "name": "object"}] if cfg.class_agnostic else categories_of(init, head and head.rows)
    model, label_map = finetune.build_model(cfg, init, categories)
    if not all(v.isfinite().all() for v in model.state_dict().values()):
        raise UserError(f"{checkpoint}: has weights that are not finite, so it finds nothing; give an earlier "
                        "checkpoint of its run")
    names = evaluation.distinct_names(categories)
    thresholds, said = thresholds_of(init.content.get("thresholds"), names, threshold)
    run.print_rank0(f"image size {cfg.eval_size}, at most {cfg.max_size}; {said}")
    if cfg.class_agnostic:
        label_map = [0] * len(label_map)
    return Predictor(model.to(device).eval(), cfg, label_map, bool(head and head.softmax), categories, names,
                     thresholds, device, tile or 0, overlap, batch_size)


def open_detector(checkpoint: str) -> tuple[convert.Checkpoint, finetune.Config]:
    """(checkpoint, configuration of its model as finetune.py evaluates it). UserError: it holds no detector."""
    init = convert.open_checkpoint(checkpoint)
    if not init.rcnn and convert.DECODER not in init.state:
        detector = "" if init.family == "detector" else " --detector faster_rcnn_fpn"
        raise UserError(f"{checkpoint}: {init.what}: no detector whose classes are known, only what one starts from; "
                        f"fine-tune it first (python finetune.py --data LABELLED --init_from {checkpoint}{detector}) "
                        "and give the checkpoint of that run")
    knobs = {f.name for f in dataclasses.fields(finetune.Config)}
    own = init.config if init.content.get("script") == "finetune" else {}
    values = {k: v for k, v in own.items() if k in knobs} | ({} if init.rcnn else init.architecture())
    values |= {"init_from": checkpoint, "eval_only": True, "freeze_detector": False}
    return init, dataclasses.replace(finetune.Config(), **values)


def categories_of(init: convert.Checkpoint, rows: int | None) -> list[dict]:
    """The categories that the rows of its class head stand for, those of "N/A" left out. UserError: nothing says it."""
    known = {91: [{"id": i, "name": name} for i, name in convert.COCO_NAMES.items()],
             21: [{"id": i + 1, "name": name} for i, name in convert.VOC_NAMES.items()]}  # released heads (F1)
    categories = init.content.get("categories") or known.get(rows, [])
    categories = [{"id": c["id"], "name": c["name"]} for c in categories if c["name"] != "N/A"]
    if not categories:
        raise UserError(f"{init.path}: its class head has {rows} rows, and nothing says which classes they are; "
                        "fine-tune it on your labelled images first (finetune.py), whose checkpoints hold the names")
    return categories


def thresholds_of(chosen: Any, names: list[str], given: float | None) -> tuple[Tensor, str]:
    """(score threshold of each class, float64, a sentence on them): the given one, or those that finetune.py chose on
    its validation set."""
    if given is not None or not isinstance(chosen, dict):
        number = evaluation.DEFAULT_THRESHOLD if given is None else given
        why = " (--threshold)" * (given is not None) or ", as the checkpoint holds none: --threshold T for another"
        return torch.full((len(names),), number, dtype=torch.float64), f"score threshold {number:g}{why}"
    numbers = evaluation.class_thresholds(chosen, names)
    shown = finetune.listed([f"{name} {number:.2f}" for name, number in zip(names, numbers)])
    return torch.tensor(numbers, dtype=torch.float64), f"score thresholds of the checkpoint: {shown}"


# ==== 2. Tiles ====


def tile_crops(size: tuple[int, int], tile: int, overlap: float) -> list[Crop]:
    """The passes over a picture of size (width, height) px: the whole and, where a side is longer than `tile` > 0, then
    tiles of that side, evenly spread, neighbours sharing at least the share `overlap` of theirs."""
    def starts(length: int) -> list[int]:
        rest = max(0, length - tile)
        steps = math.ceil(rest / (tile * (1 - overlap)))
        return [round(i * rest / max(steps, 1)) for i in range(steps + 1)]

    w, h = size
    whole = [(0, 0, w, h)]
    if not tile or max(size) <= tile:
        return whole
    return whole + [(x, y, min(x + tile, w), min(y + tile, h)) for y in starts(h) for x in starts(w)]


def join_passes(passes: list[dict[str, Tensor]], crops: list[Crop]) -> dict[str, Tensor]:
    """What is found in a picture, best first: of one pass all, of several what merge_passes() keeps."""
    found = {k: torch.cat([one[k] for one in passes]) for k in passes[0]}
    if len(passes) > 1:
        number = torch.cat([torch.full((len(one["scores"]),), i) for i, one in enumerate(passes)])
        cut = torch.cat([is_cut(one["boxes_xyxy"], crop, crops[0]) for one, crop in zip(passes, crops)])
        keep = merge_passes(found["boxes_xyxy"], found["scores"], found["labels"], number, cut)
        found = {k: v[keep] for k, v in found.items()}
    order = found["scores"].sort(descending=True, stable=True).indices
    return {k: v[order] for k, v in found.items()}


def is_cut(boxes_xyxy: Tensor, crop: Crop, whole: Crop) -> Tensor:
    """bool [n]: the boxes that end at an edge of their tile which is none of the picture."""
    first, last, end = (torch.tensor(corner) for corner in (crop[:2], crop[2:], whole[2:]))
    near = EDGE * (last - first)
    left_or_top = (boxes_xyxy[:, :2] < first + near) & (first > 0)
    right_or_bottom = (boxes_xyxy[:, 2:] > last - near) & (last < end)
    return (left_or_top | right_or_bottom).any(1)


def merge_passes(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, passes: Tensor, cut: Tensor) -> Tensor:
    """Which boxes [n, 4] stay where passes over a picture overlap, in order. passes [n]: number of the pass; cut bool
    [n]: a tile's inner edge runs through the object.

    Within a class, and never between boxes of one pass: a cut box gives way to one that covers more than COVERED of it,
    and is whole or larger; then the usual NMS: of two with an IoU above OVERLAP_IOU the better one stays.
    """
    boxes = boxes_xyxy.double().numpy()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    scores, labels, passes, cut = (t.numpy() for t in (scores, labels, passes, cut))

    def greedy(order: np.ndarray, may_go: np.ndarray, share: Callable[[np.ndarray, int, np.ndarray], np.ndarray],
               limit: float) -> np.ndarray:
        """Those that no earlier one, itself kept, drives out."""
        alive = np.ones(len(order), bool)
        for k, i in enumerate(order):
            if alive[k]:
                rest = order[k + 1:]
                sides = np.minimum(boxes[i, 2:], boxes[rest, 2:]) - np.maximum(boxes[i, :2], boxes[rest, :2])
                goes = share(sides.clip(0).prod(1), i, rest) > limit
                alive[k + 1:] &= ~(goes & may_go[rest] & (passes[rest] != passes[i]))
        return order[alive]

    kept = []
    for label in np.unique(labels):
        here = np.flatnonzero(labels == label)
        here = here[np.lexsort((-areas[here], cut[here]))]  # whole ones first, then by size
        here = greedy(here, cut, lambda inter, i, rest: inter / np.maximum(areas[rest], 1e-9), COVERED)
        here = here[np.argsort(-scores[here], kind="stable")]
        kept.append(greedy(here, np.ones_like(cut), lambda inter, i, rest: inter / np.maximum(
            areas[i] + areas[rest] - inter, 1e-9), OVERLAP_IOU))
    return torch.from_numpy(np.sort(np.concatenate([np.zeros(0, np.int64), *kept])))


# ==== 3. Pictures in ====


@dataclass
class Source:
    """A picture to read."""
    path: str
    name: str  # as the files of the output call it
    drawn: Path  # where it is drawn
    id: int | str


def open_sources(inputs: list[str], data_root: str | None, out: Path) -> tuple[list[Source], list[dict]]:
    """(the pictures of files, folders, .txt lists or one COCO json, each once, sorted by name; the categories that the
    json lists). UserError: an input that is not there, or in which no picture is; one that lies where is drawn."""
    if any(given.lower().endswith(".json") for given in inputs):
        if len(inputs) > 1:
            raise UserError(f"{' '.join(inputs)}: a json brings its own image ids; give it alone")
        listed, categories = read_json(Path(inputs[0]).expanduser(), data_root)
    else:
        listed, categories = list_files(inputs), []
    real_folders: dict[str, str] = {}
    below = os.path.realpath(out / "pictures") + os.sep
    sources, taken = [], {}
    for path, name, place, image_id in listed:
        folder = os.path.dirname(path)
        real = real_folders.setdefault(folder, os.path.realpath(folder) + os.sep)
        if real.startswith(below):
            raise UserError(f"{path}: lies in {out / 'pictures'}, where the pictures are drawn; give another --out, or "
                            "remove that folder if it is left over from an interrupted run")
        if Path(place).suffix.lower() not in (".jpg", ".jpeg"):
            place += ".jpg"
        while taken.setdefault(place, path) != path:  # a.png beside a.png.jpg
            place += ".jpg"
        sources.append(Source(path, name, out / "pictures" / place, len(sources) + 1 if image_id is None else image_id))
    return sources, categories


def list_files(inputs: list[str]) -> list[tuple[str, str, str, None]]:
    """(path, name, name, None) of every picture, sorted; names are relative to what all inputs have in common."""
    files: dict[tuple[str, str], str] = {}  # by the folder behind all links, and the name in it
    folders, real = [], {}
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            some = data.ImageFiles(given, path, data.find_images(path))
        elif path.suffix.lower() == ".txt":
            some = data.open_list(path)
        elif path.exists():
            some = data.ImageFiles(given, path.parent, [path.name])
        else:
            raise UserError(f"{given}: no such file or folder; give pictures, folders, .txt lists, or one COCO json")
        if not len(some):
            raise UserError(f"{given}: no pictures in it" + (f" or below it; looked for {' '.join(data.EXTENSIONS)}"
                                                             if path.is_dir() else ""))
        folders.append(os.path.abspath(some.root))
        for key in some.keys:
            file = os.path.abspath(some.root / key)
            folder, name = os.path.split(file)
            files.setdefault((real.setdefault(folder, os.path.realpath(folder)), name), file)
    root = os.path.commonpath([*folders, *map(os.path.dirname, files.values())])
    names = sorted((Path(file).relative_to(root).as_posix(), file) for file in files.values())
    return [(file, name, name, None) for name, file in names]


def read_json(path: Path, data_root: str | None) -> tuple[list[tuple[str, str, str, int | str]], list[dict]]:
    """((path, file name as it says, place below its folder, id) of each image, sorted by id, and the categories) of a
    COCO json, whose annotations play no part."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        images = [(json_id(i["id"]), image_name(i)) for i in content["images"]]
        by_url = not all(i.get("file_name") for i in content["images"])
        images.sort(key=lambda image: id_order(image[0]))
        categories = [{"id": json_id(c["id"]), "name": str(c["name"])} for c in content.get("categories") or []]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Give an existing COCO json.") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is no COCO json: {type(error).__name__} {error}. It needs images (id, file_name or "
                        "coco_url), and may have categories (id, name).") from error
    if not images or len({i for i, _ in images}) < len(images):
        raise UserError(f"{path}: {'an image id occurs twice' if images else 'lists no images'}")
    # image_info_test2017.json is what COCO calls a json without annotations
    folders = coco_folders(path.with_name(path.name.removeprefix("image_info_")), data_root)
    folder, found, notes = find_files([name for _, name in images], folders, path, by_url)
    for note in notes:
        run.print_rank0(f"note: {note}")
    return [(str(folder / found[name]), name, Path(found[name]).as_posix(), key) for key, name in images], categories


def in_threads(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any],
               pixels_of: Callable[[Any], int], ahead: int) -> Iterator[Any]:
    """function(item) of all, in order, made by the pool: at most `ahead` of them at once, and of large pictures fewer.
    """
    waiting: deque[tuple[Any, int]] = deque()
    held = 0
    for item in items:
        pixels = pixels_of(item)
        while waiting and (len(waiting) == ahead or held + pixels > PIXELS_AHEAD):
            job, size = waiting.popleft()
            held -= size
            yield job.result()
        waiting.append((pool.submit(function, item), pixels))
        held += pixels
    while waiting:
        yield waiting.popleft()[0].result()


# ==== 4. Files out ====


def coco_results(picture: Picture, categories: list[dict], names: list[str]) -> list[dict]:
    """What is found in a picture whose key is its Source. categories: with the ids to write."""
    source, found = picture.key, picture.found
    results = [{"image_id": source.id, "file_name": source.name, "category_id": categories[label]["id"],
                "category_name": names[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
               for label, (x1, y1, x2, y2), score in zip(*(found[k].tolist() for k in (
                   "labels", "boxes_xyxy", "scores")))]
    for result, mask in zip(results, picture.masks() if "masks" in found else ()):
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        result["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    return results


def csv_text(results: list[dict]) -> bytes:
    """file,label,score,x1,y1,x2,y2: a line per box, corners in pixels."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "label", "score", "x1", "y1", "x2", "y2"))
    for result in results:
        x, y, w, h = result["bbox"]
        writer.writerow((result["file_name"], result["category_name"], f"{result['score']:.4f}",
                         *(f"{v:.2f}" for v in (x, y, x + w, y + h))))
    return text.getvalue().encode("utf-8", "surrogateescape")  # a file's name need not be UTF-8


def draw(item: tuple[Picture, list[dict]]) -> None:
    """A picture at its size with what coco_results() gives of it: boxes, names, scores and masks, lines and letters in
    proportion to the picture, as JPEG."""
    picture, path, results = item[0].image, item[0].key.drawn, item[1]
    colours = [evaluation.PALETTE[i % len(evaluation.PALETTE)] for i in item[0].found["labels"].tolist()]
    for result, colour in zip(results[::-1], colours[::-1]):  # the best on top
        if "segmentation" in result:
            evaluation.draw_mask(picture, coco_mask.decode(result["segmentation"]).astype(bool), colour)
    diagonal = math.hypot(*picture.size)
    boxes = torch.tensor([r["bbox"] for r in results], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    texts = [f"{r['category_name']} {r['score']:.2f}" for r in results]
    evaluation.draw_boxes(picture, boxes, texts, colours, line=max(2, round(diagonal / 500)),
                          size=max(11, round(diagonal / 70)))
    large = max(picture.size) > 65500  # the longest side that JPEG can have
    with run.replacing(path.with_name(path.name + ".png") if large else path) as file:
        if large:
            picture.save(file, format="PNG")
        else:
            picture.save(file, format="JPEG", quality=90, subsampling=0)


def ids_of_json(categories: list[dict], names: list[str], theirs: list[dict]) -> list[dict]:
    """The categories with the ids of the json's own of the same names; what it does not list gets ids above all."""
    if not theirs:
        return categories
    positions = finetune.same_categories(categories, theirs)
    free = 1 + max([c["id"] for c in [*theirs, *categories] if isinstance(c["id"], int)], default=0)
    if new := [name for name, place in zip(names, positions) if place < 0]:
        run.print_rank0(f"note: the json does not list {finetune.listed(new)}, which get ids from {free} on")
    return [c | {"id": theirs[place]["id"] if place >= 0 else free + i}
            for i, (c, place) in enumerate(zip(categories, positions))]


# ==== 5. Main ====


def default_out(checkpoint: str, inputs: list[str]) -> str:
    path = Path(checkpoint.removeprefix("hf:")).expanduser().resolve()
    if path.is_file():
        path = path.parent if path.name in convert.OF_A_RUN else path.with_suffix("")
    paths = [Path(given).expanduser().resolve() for given in inputs]
    if len(paths) == 1:
        named = paths[0].with_suffix("") if paths[0].is_file() else paths[0]
    else:
        named = os.path.commonpath([p.parent for p in paths])
    return f"out/predict-{path.name}-{run.data_name(str(named))}"


def parse(argv: list[str] | None) -> Any:
    parser = run.Parser(prog="predict.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help="a file, the folder of a run of finetune.py, or hf:FOLDER (Hugging Face)")
    parser.add_argument("images", nargs="+", help="pictures, folders of them, .txt lists, or one COCO json")
    parser.add_argument("--threshold", type=KNOBS["threshold"],
                        help="lowest score, of all classes (default: the checkpoint's, else 0.5)")
    parser.add_argument("--out", help="output folder (default: out/predict-<run>-<images>)")
    parser.add_argument("--tile", type=KNOBS["tile"],
                        help="search larger pictures in overlapping tiles too, of this side, pixels")
    parser.add_argument("--overlap", type=KNOBS["overlap"], default=0.2,
                        help="share of a tile that the next one shows too (default: 0.2)")
    parser.add_argument("--eval_size", type=KNOBS["eval_size"],
                        help="short side of what the detector sees, pixels (default: the checkpoint's, else 800)")
    parser.add_argument("--max_size", type=KNOBS["max_size"],
                        help="its longest side, pixels (default: the checkpoint's, else 1333)")
    parser.add_argument("--data_root", help="of a json: the folder of its images, if they are not beside it")
    parser.add_argument("--no_pictures", action="store_true", help="write predictions.json and predictions.csv alone")
    parser.add_argument("--batch_size", type=KNOBS["batch_size"], default=8, help="views at once, of one size")
    parser.add_argument("--num_workers", type=KNOBS["num_workers"], default=min(8, os.cpu_count() or 1),
                        help="threads that read and draw pictures")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    return parser.parse_args(run.normalized_flags(argv))


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    common.setup_distributed(args.device)
    out = Path(args.out or default_out(args.checkpoint, args.images))
    sources, theirs = open_sources(args.images, args.data_root, out)
    detector = load(args.checkpoint, args.device, args.threshold, args.tile, args.overlap, batch_size=args.batch_size,
                    eval_size=args.eval_size, max_size=args.max_size)
    categories = ids_of_json(detector.categories, detector.names, theirs)
    run.open_folder(out)
    start = time.perf_counter()
    results, skipped = predict_all(detector, sources, categories, args.num_workers, pictures=not args.no_pictures)
    seconds = time.perf_counter() - start
    if skipped == len(sources):
        raise UserError(f"none of the {skipped} pictures can be read; give others")
    if common.rank() == 0:
        run.write_atomic(out / "predictions.csv", csv_text(results))
        run.write_json(out / "predictions.json", results)
        run.unlock_folder(out)
    found = {"images": len(sources) - skipped, "boxes": len(results), "skipped": skipped,
             "images_per_s": (len(sources) - skipped) / seconds}
    run.print_rank0(f"{found['images']} images, {len(results)} boxes, {found['images_per_s']:.3g} images/s"
                    + f", {skipped} skipped: named above" * (skipped > 0)
                    + f"; wrote {out}/predictions.json, predictions.csv" + ", pictures/" * (not args.no_pictures))
    common.barrier()
    return found


def predict_all(detector: Predictor, sources: list[Source], categories: list[dict], threads: int, pictures: bool
                ) -> tuple[list[dict], int]:
    """(COCO results of all pictures, in order; how many could not be read), on all processes, each of which does its
    share. `pictures`: draw them too."""
    mine = [sources[i] for i in evaluation.rank_slice(len(sources))]
    skips = run.SkipCount(len(sources), most=1)
    bar = run.progress(None, total=len(mine), desc="pictures")
    pool = ThreadPoolExecutor(threads)
    results: list[dict] = []

    def read(source: Source) -> Picture | data.UnreadableImage:
        try:
            return detector.prepare(source, data.decode_image(source.path))
        except data.UnreadableImage as error:
            return error

    def readable() -> Iterator[Picture]:
        for picture in in_threads(pool, read, mine, lambda source: math.prod(
                (data.image_header(source.path) or (0, 0))[:2]), threads + detector.batch_size):
            if isinstance(picture, Picture):
                yield picture
            else:
                skips.add([str(picture)])
                bar.update()

    def found() -> Iterator[tuple[Picture, list[dict]]]:
        drawn = set()
        for picture in detector.stream(readable()):
            some = coco_results(picture, categories, detector.names)
            results.extend(some)
            bar.update()
            if pictures and picture.key.drawn not in drawn:  # a json may list a file twice
                drawn.add(picture.key.drawn)
                yield picture, some

    try:
        for _ in in_threads(pool, draw, found(), lambda item: math.prod(item[0].image.size), threads):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return evaluation.gather(results), sum(evaluation.gather([len(skips.seen)]))


if __name__ == "__main__":
    run.cli(main)
