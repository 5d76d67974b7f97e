"""Cityscapes (Cordts et al., CVPR 2016): its fine labels (gtFine) as a labelled set and as semantic maps, and its own
AP of instance masks (cityscapesScripts' evalInstanceLevelSemanticLabeling), which DUPR's Table 8 prints.

Below its folder lie leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_instanceIds.png
or *_gtFine_polygons.json. Both forms become one map of ids: 1000 * class + number of an instance; of all else, and of
groups ("cargroup": a crowd), the class alone.
"""
from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from common import UserError
from data import named_root
from formats import LabelledImage, Labels, Layout
from run import progress

# Their id is their place; a "license plate" has -1 and is not drawn.
LABELS = ("unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground", "road",
          "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole",
          "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car",
          "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle")
IDS = {name: k for k, name in enumerate(LABELS)} | {"license plate": -1}
TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # what counts: classes 0..18
VOID = tuple(k for k in range(len(LABELS)) if k not in TRAIN_IDS)
CATEGORIES = [{"id": k, "name": LABELS[k]} for k in (24, 25, 26, 27, 28, 31, 32, 33)]  # those with instances
FORMS = ("instanceIds.png", "polygons.json")
SPLITS = ("train", "val")  # the labels of test are not published
DOWNLOADS = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com (free account)"

# ==== 1. Files ====


def is_cityscapes(place: Path) -> bool:
    return (place / "gtFine").is_dir()


def find_root(data: str, data_root: str | None) -> Path:
    """The folder of `cityscapes` (see data.named_root), or of a path."""
    return named_root(data, data_root, "train", is_cityscapes) if data == "cityscapes" else Path(data).expanduser()


def label_file(image: Path, forms: Iterable[str] = FORMS) -> Path | None:
    """The first form of the labels of leftImg8bit/SPLIT/CITY/x_leftImg8bit.png that is there; None: there is none."""
    if len(image.parts) < 4 or image.parts[-4] != "leftImg8bit":
        return None
    start = image.name.removesuffix("_leftImg8bit.png")
    folder = image.parents[3] / "gtFine" / image.parts[-3] / image.parts[-2]
    return next((path for form in forms if (path := folder / f"{start}_gtFine_{form}").is_file()), None)


def list_images(root: Path, split: str) -> list[Path]:
    """The images of a split, by city and number. UserError: none; one without labels, or labels without an image."""
    def listed(kind: str, ends: tuple[str, ...]) -> dict[str, str]:
        files = ((path, next((end for end in ends if path.name.endswith(end)), None))
                 for path in (root / kind / split).glob("*/*"))
        return {f"{path.parent.name}/{path.name.removesuffix(end)}": path.name for path, end in files if end}

    images = listed("leftImg8bit", ("_leftImg8bit.png",))
    labels = listed("gtFine", tuple(f"_gtFine_{form}" for form in FORMS))
    for there, other, lacking, kind in ((images, labels, "labels", "gtFine"), (labels, images, "image", "leftImg8bit")):
        if missing := sorted(there.keys() - other.keys()):
            raise UserError(f"{root}: {len(missing)} of {len(there)} {'images' if there is images else 'labels'} of "
                            f"{split} have no {lacking}, the first: {kind}/{split}/{missing[0]}_*. Unpack all of "
                            f"{DOWNLOADS} there, or remove what is left over.")
    if not images:
        raise UserError(f"{root}: no images leftImg8bit/{split}/CITY/*_leftImg8bit.png with labels in gtFine/{split}. "
                        f"Unpack {DOWNLOADS} there.")
    return [root / "leftImg8bit" / split / key.partition("/")[0] / images[key] for key in sorted(images)]


# ==== 2. Maps of ids ====

FAR = 2**15  # px


def draw_polygons(path: Path) -> np.ndarray:
    """The map of ids, int32 [h, w], of a polygons.json: in its order, so that later objects lie on top. As
    cityscapesScripts draws instanceIds.png."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        size = int(content["imgWidth"]), int(content["imgHeight"])
        if not all(0 < side < FAR for side in size):
            raise ValueError(f"its image has {size[0]} x {size[1]} px")
        image = Image.new("I", size, 0)
        draw, counts = ImageDraw.Draw(image), dict.fromkeys(range(IDS["person"], len(LABELS)), 0)
        for k, item in enumerate(content["objects"]):
            if item.get("deleted"):
                continue
            name = str(item["label"])
            group = name not in IDS and name.endswith("group")
            number = IDS.get(name.removesuffix("group") if group else name)
            if number is None:
                raise ValueError(f"object {k + 1} has the unknown label {name!r}")
            if number in counts and not group:
                counts[number] += 1
                number = 1000 * number + counts[number] - 1
            points = [(float(x), float(y)) for x, y in item["polygon"]]
            if not all(abs(v) < FAR for point in points for v in point):
                raise ValueError(f"object {k + 1} has corners far outside the image")
            if number >= 0:
                draw.polygon(points, fill=number)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: these labels cannot be read: {type(error).__name__} {error}. Fetch the file again "
                        f"({DOWNLOADS}).") from error
    return np.asarray(image)


def read_map(path: Path, archive: str = DOWNLOADS) -> np.ndarray:
    """The map of ids [h, w] of an instanceIds.png, a labelIds.png (classes alone) or a polygons.json. archive: where it
    comes from, for messages."""
    if path.suffix == ".json":
        return draw_polygons(path)
    try:
        with Image.open(path, formats=("PNG",)) as image:
            ids = np.asarray(image)
        if ids.ndim != 2:
            raise ValueError(f"it has {ids.shape[2]} channels, a map of ids has one")
        if ids.dtype.kind not in "iu" or ids.size and not 0 <= ids.min() <= ids.max() < 2**16:
            raise ValueError("its values are no ids")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: these labels cannot be read: {error}. Fetch the file again ({archive}).") from error
    return ids


_TO_TRAIN_ID = np.full(2**16, 255, np.uint8)
_TO_TRAIN_ID[list(TRAIN_IDS)] = range(len(TRAIN_IDS))
_TO_TRAIN_ID[1000:34000] = _TO_TRAIN_ID[:34].repeat(1000)[1000:]


def semantic_map(image: Path) -> np.ndarray:
    """uint8 [h, w] of an image of list_images: classes 0..18 in the order of TRAIN_IDS, 255 = does not count."""
    return _TO_TRAIN_ID[read_map(label_file(image, ("labelIds.png", *FORMS)))]


class Segment(NamedTuple):
    """The pixels of one id."""
    id: int
    box: tuple[int, int, int, int]  # xyxy px, x2 and y2 exclusive
    area: int
    rle: dict | None  # compressed, as text


def segments_of(ids: np.ndarray, masks: bool = True) -> list[Segment]:
    """Of every id on a map whose class has instances, the groups among them, by their ids. From the runs of equal ids
    down the columns, which are what an RLE counts."""
    h, w = ids.shape
    flat = ids.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    values = flat[starts]
    found = []
    known = [c["id"] for c in CATEGORIES]
    for value in np.unique(values).tolist():
        if (value // 1000 or value) not in known:
            continue
        start, end = starts[values == value], ends[values == value]
        rle = None
        if masks:
            counts = np.diff(np.concatenate([[0], np.stack([start, end], 1).ravel(), [flat.size]])).tolist()
            rle = coco_mask.frPyObjects({"size": [h, w], "counts": counts}, h, w)
            rle = {"size": [h, w], "counts": rle["counts"].decode("ascii")}
        first, last = start // h, (end - 1) // h
        top, bottom = (0, h) if (first != last).any() else (start % h, (end - 1) % h + 1)
        box = int(first.min()), int(np.min(top)), int(last.max()) + 1, int(np.max(bottom))
        found.append(Segment(value, box, int((end - start).sum()), rle))
    return found


# ==== 3. A labelled set ====


def in_threads(function: Callable, items: list, text: str) -> Iterator:
    """function of each item, in order: decoding and counting run beside each other."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from progress(pool.map(function, items), total=len(items), desc=text)


def read_split(root: Path, split: str, masks: bool) -> Labels:
    """The 8 classes with instances. Groups are crowds, those of one class in an image one of them; what is one pixel
    wide or high is left out (detectron2)."""
    def read(image: Path) -> tuple[tuple[int, int], list[Segment]]:
        ids = read_map(label_file(image))
        return ids.shape, segments_of(ids, masks)

    files, images, narrow = list_images(root, split), [], 0
    for file, (hw, segments) in zip(files, in_threads(read, files, f"gtFine of {split}")):
        wide = [s for s in segments if min(s.box[2] - s.box[0], s.box[3] - s.box[1]) > 1]
        narrow += len(segments) - len(wide)
        rows = [(*s.box, False, s.id // 1000 or s.id, s.id < 1000, False, float(s.area)) for s in wide]
        name = file.name.removesuffix("_leftImg8bit.png")
        images.append(LabelledImage(file, name, hw, rows, [s.rle for s in wide] if masks else None, label_file(file)))
    notes = [f"{root}: {narrow} objects of {split} are one pixel wide or high and left out"] if narrow else []
    return Labels(root, CATEGORIES, CATEGORIES, images, "xywh", notes)


def open_layout(data: str, data_root: str | None) -> Layout:
    """For annotations.py: train and val. UserError: see list_images and data.named_root."""
    root = find_root(data, data_root)
    parts = {split: partial(read_split, root, split) for split in SPLITS
             if any((root / kind / split).is_dir() for kind in ("leftImg8bit", "gtFine"))}
    if not parts:
        raise UserError(f"{root}: neither train nor val in its gtFine and leftImg8bit. Unpack {DOWNLOADS} there.")
    return Layout("Cityscapes, gtFine", parts, [])


# ==== 4. Its own AP ====

OVERLAPS = np.arange(0.5, 1.0, 0.05)
LEAST_PIXELS = 100  # of an object that counts


class Matches(NamedTuple):
    """Predictions [P] and labels [G] of one class in one image."""
    scores: np.ndarray  # [P]
    sizes: np.ndarray  # [P] pixels
    void: np.ndarray  # [P] of these, pixels that belong to no class
    areas: np.ndarray  # [G] pixels of the objects and groups
    groups: np.ndarray  # bool [G]
    overlaps: np.ndarray  # [P, G] common pixels


def match_image(path: Path, found: dict[int, list[dict]]) -> dict[int, Matches]:
    """found: {class: detections with a segmentation} -> {class: Matches}."""
    ids = read_map(path)
    segments = segments_of(ids)
    void = coco_mask.encode(np.asfortranarray(np.isin(ids, VOID), np.uint8))  # instances of VOID classes are none of it
    matches = {}
    for c in (category["id"] for category in CATEGORIES):
        rles = [d["segmentation"] for d in found.get(c, ())]
        sizes = coco_mask.area(rles).astype(np.int64) if rles else np.zeros(0, np.int64)
        mine = [s for s in segments if (s.id // 1000 or s.id) == c]
        common = np.zeros((len(rles), len(mine) + 1))
        if rles:  # with `iscrowd`: the share of the detection
            common = coco_mask.iou(rles, [*(s.rle for s in mine), void], [1] * (len(mine) + 1)) * sizes[:, None]
        common = common.round().astype(np.int64)
        kept = sizes > 0
        scores = np.array([d["score"] for d in found.get(c, ())], float)
        matches[c] = Matches(scores[kept], sizes[kept], common[kept, -1], np.array([s.area for s in mine], np.int64),
                             np.array([s.id < 1000 for s in mine], bool), common[kept, :-1])
    return matches


def judge(m: Matches, threshold: float) -> tuple[list[float], list[float], int]:
    """-> (scores of the hits, scores of the mistakes, objects not found) of one class in one image."""
    hit = m.overlaps / (m.areas + m.sizes[:, None] - m.overlaps) > threshold  # strictly
    small = m.areas < LEAST_PIXELS
    hits, mistakes, missed = [], [], 0
    for g in np.flatnonzero(~m.groups & ~small):
        scores = sorted(m.scores[hit[:, g]].tolist(), reverse=True)
        missed += not scores
        hits += scores[:1]
        mistakes += scores[1:]  # a second prediction of an object
    ignored = m.void + m.overlaps @ (m.groups.astype(np.int64) + small)
    alone = ~hit.any(1)  # on a group or a small object it is neither right nor wrong
    mistakes += m.scores[alone & (ignored / m.sizes <= threshold)].tolist()
    return hits, mistakes, missed


def average_precision(hits: list[float], mistakes: list[float], missed: int) -> float:
    """Scores of right and wrong predictions, objects not found -> the sum over the scores of precision times a centred
    step of recall, with the point (recall 0, precision 1): no envelope, no interpolation."""
    if not hits:
        return 0.0
    levels = np.unique(np.array(hits + mistakes))  # ascending
    true, false = (len(some) - np.searchsorted(np.sort(some), levels) for some in (hits, mistakes))
    precision = np.append(true / (true + false), 1.0)
    recall = np.append(true / (len(hits) + missed), 0.0)
    steps = np.convolve(np.concatenate([recall[:1], recall, [0.0]]), [-0.5, 0, 0.5], "valid")
    return float(precision @ steps)


def instance_metrics(labelled: Any, detections: list[dict]) -> dict[str, Any]:
    """Cityscapes' AP of masks over the overlaps .5, .55, ... .95, AP50, and AP of each class; a class without an object
    that counts is nan and left out of the means.

    labelled: a DetectionSet. {} where its images are not Cityscapes' with their labels, or its classes others.
    """
    numbers = {c["name"]: c["id"] for c in CATEGORIES}
    classes = {c["id"]: numbers.get(c["name"]) for c in labelled.categories}
    paths = [label_file(r.image) if isinstance(r.image, Path) else None for r in labelled.records]
    if None in paths or None in classes.values():
        return {}
    found: dict[Any, dict[int, list[dict]]] = {r.id: {} for r in labelled.records}
    for d in detections:
        found[d["image_id"]].setdefault(classes[d["category_id"]], []).append(d)
    images = list(in_threads(lambda item: match_image(*item), list(zip(paths, found.values())), "Cityscapes' AP"))
    table = np.full((len(CATEGORIES), len(OVERLAPS)), math.nan)
    for k, c in enumerate(category["id"] for category in CATEGORIES):
        some = [image[c] for image in images]
        if any((~m.groups & (m.areas >= LEAST_PIXELS)).any() for m in some):
            for t, threshold in enumerate(OVERLAPS):
                hits, mistakes, missed = zip(*(judge(m, threshold) for m in some))
                table[k, t] = average_precision(sum(hits, []), sum(mistakes, []), sum(missed))
    counted = ~np.isnan(table[:, 0])
    mean, mean50 = (float(part[counted].mean()) if counted.any() else math.nan for part in (table, table[:, 0]))
    return {"Cityscapes_AP": mean, "Cityscapes_AP50": mean50,
            "Cityscapes_per_class": {c["name"]: float(row.mean()) for c, row in zip(CATEGORIES, table)}}
