"""Labelled detection sets: COCO json, VOC xml, drawn scenes. Classes are taken from the files; what could not be used
stands in `.notes`.

Boxes are `boxes_xyxy` in pixels of the image they come with, x2/y2 exclusive (width = x2 - x1).
"""
from __future__ import annotations

import hashlib
import json
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from common import UserError
from data import (SYNTHETIC_OFFSET, FileFinder, ImageFiles, SyntheticScenes, UnreadableImage, decode_image,
                  image_header, named_root, unicode_form, voc_images, voc_years)
from run import print_rank0

# ==== 1. A labelled set ====


@dataclass
class _Record:
    """One labelled image: all that is known without opening it."""
    image: Path | int  # its file, or its index among the drawn scenes
    id: int | str
    hw: tuple[int, int]
    boxes: np.ndarray  # float32 [n, 4] xyxy px, clipped to the image
    labels: np.ndarray  # int64 [n], 0..K-1
    crowd: np.ndarray  # bool [n] COCO iscrowd
    difficult: np.ndarray  # bool [n] VOC difficult
    areas: np.ndarray  # float64 [n] px^2: the file's own area (COCO: of the segment), else width * height
    segments: list | None = None  # of a set opened with masks: COCO segmentation of each object, polygons or RLE


@dataclass
class DetectionSet:
    """Images with boxes. `categories`: [{"id": original id, "name": name}], a label is a position in it. `notes`: what
    was odd, as sentences."""
    name: str
    categories: list[dict]
    records: list[_Record]
    notes: list[str]
    scenes: SyntheticScenes | None = None
    voc: bool = False  # VOC annotations: the 11-point metric applies
    # May the boxes lie on the picture as its EXIF rotates it (True), as stored (False)? The first of the size that the
    # annotation says is it.
    frames: tuple[bool, ...] = (True, False)

    @property
    def image_ids(self) -> list[int | str]:
        return [record.id for record in self.records]

    @property
    def max_objects(self) -> int:
        """The largest number of objects in an image; crowds are none."""
        return max((int((~r.crowd).sum()) for r in self.records), default=0)

    def __len__(self) -> int:
        return len(self.records)

    def print_notes(self) -> None:
        for note in self.notes:
            print_rank0(f"note: {note}")

    def load(self, i: int) -> tuple[Image.Image, dict]:
        """-> (PIL RGB, target): boxes_xyxy float32 [n, 4] px, labels int64 [n], ignore (COCO crowd or VOC difficult)
        and crowd (COCO crowd alone) bool [n], image_id int or str, orig_size int64 [2] (h, w). Raises UnreadableImage,
        or UserError where the size is another one."""
        record = self.records[i]
        h, w = record.hw
        for exif in self.frames:
            drawn = isinstance(record.image, int)
            image = self.scenes.load(record.image) if drawn else decode_image(record.image, exif)
            if image.size == (w, h):
                break
        else:
            told = "" if len(self.frames) > 1 else f" with --exif {'rotated' if self.frames[0] else 'stored'}"
            raise UserError(f"{record.image} is {image.width}x{image.height} px{told}, its annotation says {w}x{h}. "
                            f"Correct the annotation or the image{', or leave --exif out' * bool(told)}.")
        return image, {"boxes_xyxy": torch.from_numpy(record.boxes.copy()),
                       "labels": torch.from_numpy(record.labels.copy()),
                       "ignore": torch.from_numpy(record.crowd | record.difficult),
                       "crowd": torch.from_numpy(record.crowd.copy()),
                       "image_id": record.id, "orig_size": torch.tensor([h, w])}

    def key(self, i: int) -> str:
        """The name of an image, for messages."""
        return str(self.records[i].image)

    def fingerprint(self) -> str:
        """sha256 over the names of the images and all their boxes and labels, in order."""
        digest = hashlib.sha256()
        for r in self.records:
            digest.update(f"{Path(str(r.image)).name} {r.id} {r.hw}".encode("utf-8", "surrogateescape"))
            for part in (r.boxes, r.labels, r.crowd):
                digest.update(part.tobytes())
        return digest.hexdigest()

    def masks(self, i: int) -> Tensor:
        """uint8 [n, h, w] in 0, 1: the objects of load(i), of a set that was opened with masks."""
        record = self.records[i]
        decoded = [coco_mask.decode(segment_rle(segment, record.hw)) for segment in record.segments]
        return torch.from_numpy(np.stack(decoded)) if decoded else torch.zeros(0, *record.hw, dtype=torch.uint8)

    def with_objects(self) -> DetectionSet:
        """Without the images that have no object to learn from, as detectron2 trains; a note says how many."""
        kept = [r for r in self.records if (~r.crowd).any()]
        if not kept:
            raise UserError(f"{self.name}: none of the {len(self)} training images has an object. "
                            "Give annotated images.")
        notes = list(self.notes)
        if len(kept) < len(self):
            notes.append(f"{len(self) - len(kept)} of {len(self)} training images have no object and are left out")
        return replace(self, records=kept, notes=notes)

    def coco_ground_truth(self) -> dict:
        """COCO-format dict for pycocotools: original category ids, annotation ids from 1 (its matching reads 0 as
        'unmatched'), the boxes of load(), RLE segmentations where there are masks. Difficult objects carry "ignore": 1
        and "difficult": 1; pycocotools overwrites "ignore" by iscrowd, so an evaluation reads "difficult"."""
        images, annotations = [], []
        for r in self.records:
            file = Path(r.image).name if isinstance(r.image, Path) else f"{r.image:08d}"
            images.append({"id": r.id, "width": r.hw[1], "height": r.hw[0], "file_name": file})
            for k, (x1, y1, x2, y2) in enumerate(r.boxes.tolist()):
                annotations.append({"id": len(annotations) + 1, "image_id": r.id,
                                    "category_id": self.categories[r.labels[k]]["id"], "area": float(r.areas[k]),
                                    "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": int(r.crowd[k])})
                if r.difficult[k]:
                    annotations[-1] |= {"ignore": 1, "difficult": 1}
                if r.segments is not None:
                    annotations[-1]["segmentation"] = segment_rle(r.segments[k], r.hw)
        return {"images": images, "annotations": annotations, "categories": [dict(c) for c in self.categories]}

    def subset(self, percent: float, seed: int) -> DetectionSet:
        """The labelled `percent` of low-data fine-tuning, order as drawn by label_subset; the same on all processes."""
        drawn = label_subset(range(len(self)), percent / 100, seed)
        if not drawn:
            raise UserError(f"{percent} % of the {len(self)} images of {self.name} are no usable part; "
                            "give one that leaves 1 to all of them.")
        notes = [*self.notes, f"{len(drawn)} of {len(self)} images"]
        return replace(self, records=[self.records[i] for i in drawn], notes=notes)


def label_subset(ids: Sequence[int], fraction: float, seed: int) -> list[int]:
    """DETReg's rule (datasets/coco.py): default_rng(seed).choice(ids, round(n * fraction), replace=False), order kept
    as drawn."""
    count = round(len(ids) * fraction)
    if not 0 < count <= len(ids):
        return []
    return np.random.default_rng(seed).choice(np.asarray(ids), count, replace=False).tolist()


# ==== 2. Segmentations ====


def segment_rle(segmentation: list | dict, hw: tuple[int, int]) -> dict:
    """COCO polygons [[x, y, ...], ...] or RLE, compressed or not -> compressed RLE of an image of size hw."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, *hw))
    return coco_mask.frPyObjects(segmentation, *hw) if isinstance(segmentation["counts"], list) else segmentation


def _usable_segment(segmentation: Any, hw: tuple[int, int]) -> list | dict | None:
    """Polygons of at least three points, or an RLE of the image's size; None when it is neither. Checked here, as
    pycocotools does not: it fills what a short RLE leaves out with memory as found, and takes memory by the length of a
    polygon."""
    try:
        if isinstance(segmentation, dict):
            size, counts = segmentation["size"], segmentation["counts"]
            counts = counts if isinstance(counts, list) else _rle_counts(counts)
            whole = sum(counts) == hw[0] * hw[1] and all(type(n) is int and n >= 0 for n in counts)
            return segmentation if whole and list(size) == list(hw) else None
        # as detectron2 does: the polygons that are none are left out
        polygons = [p for p in segmentation or [] if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
        far = 10 * max(hw)
        return polygons if polygons and all(-far < v < far for p in polygons for v in p) else None
    except (KeyError, TypeError, ValueError):
        return None


def _rle_counts(text: str) -> list[int]:
    """The run lengths of a compressed RLE: 5 bits per character, the 6th = more to come, from the third on relative to
    the one before the last."""
    counts, value, bits = [], 0, 0
    for code in (c - 48 for c in text.encode("ascii")):
        if not 0 <= code < 64 or bits > 30:
            raise ValueError("no RLE")
        value, bits = value | (code & 31) << bits, bits + 5
        if not code & 32:
            counts.append(value - ((code & 16) << bits - 4) + (counts[-2] if len(counts) > 2 else 0))
            value = bits = 0
    if bits:
        raise ValueError("cut off")
    return counts


def _check_segments(records: list[_Record], source: str | Path) -> None:
    """UserError when an object has no usable segmentation."""
    lacking = [(r, k) for r in records
               for k, segment in enumerate(r.segments or [None] * len(r.boxes)) if segment is None]
    if lacking:
        record, k = lacking[0]
        raise UserError(f"{source}: {len(lacking)} of {sum(len(r.boxes) for r in records)} objects have no "
                        "segmentation (polygons, or an RLE of the image's size), the first: object "
                        f"{k + 1} of {record.image}. Masks need one for every object; "
                        "boxes alone are enough for --detector faster_rcnn_fpn or faster_rcnn_c4.")


# ==== 3. Records ====


class _RecordBuilder:
    """Builds the records of one set: clips boxes, drops and counts those that are empty. Refuses a set with more than
    1 % of such, and one whose boxes as a whole cannot be what they claim (_check_plausible)."""

    def __init__(self):
        self.total, self.bad = 0, []
        # of each image: x1, y1, x2, y2 and the file's own area [n, 5], before clipping; its width and height
        self.unclipped: list[tuple[np.ndarray, tuple[int, int]]] = []

    def record(self, image: Path | int, image_id: int | str, hw: tuple[int, int], rows: list[tuple], where: str | Path,
               segments: list | None = None) -> _Record:
        """`rows`: (x1, y1, x2, y2, empty in the file's own terms, label, crowd, difficult, area or NaN); `segments`:
        one per row."""
        table = np.array(rows, np.float64).reshape(-1, 9)
        boxes = table[:, :4].clip(0, [hw[1], hw[0], hw[1], hw[0]]).astype(np.float32)
        bad = (table[:, 4] > 0) | ~np.isfinite(table[:, :4]).all(1) | (boxes[:, 2:] <= boxes[:, :2]).any(1)
        self.total += len(rows)
        self.unclipped.append((table[:, [0, 1, 2, 3, 8]], hw[::-1]))
        for k in np.flatnonzero(bad):
            x1, y1, x2, y2 = table[k, :4]
            self.bad.append(f"{where}, object {k + 1}: x {x1:g}..{x2:g}, y {y1:g}..{y2:g} in a {hw[1]}x{hw[0]} image")
        boxes = boxes[~bad]
        labels, crowd, difficult, areas = table[~bad, 5:].T
        areas = np.where(np.isnan(areas), np.prod(boxes[:, 2:] - boxes[:, :2], axis=1, dtype=np.float64), areas)
        if segments is not None:
            segments = [s for s, left_out in zip(segments, bad) if not left_out]
        return _Record(image, image_id, hw, boxes, labels.astype(np.int64), crowd > 0, difficult > 0, areas, segments)

    def notes(self, source: Path, xywh: bool) -> list[str]:
        """What was dropped and what is odd about the set, in sentences. UserError for a set to refuse. xywh: so the
        file gives its boxes (COCO); else corners that count from 1 (VOC)."""
        odd = []
        if self.total:
            tables, sides = zip(*self.unclipped)
            sides = np.repeat(np.array(sides, np.float64), [len(t) for t in tables], axis=0)
            odd = _check_plausible(np.concatenate(tables), sides, source, xywh)
        if len(self.bad) > (0.01 * self.total if self.total >= 100 else 0):
            raise UserError(f"{source}: {len(self.bad)} of {self.total} boxes are empty or outside their image, "
                            f"the first: {self.bad[0]}. More than 1 % (below 100 boxes: any) points to a wrong format; "
                            "correct the annotations.")
        if self.bad:
            odd.insert(0, f"{source}: {len(self.bad)} of {self.total} boxes left out as empty or outside: "
                       f"{'; '.join(self.bad[:3])}")
        return odd


def _check_plausible(table: np.ndarray, sides: np.ndarray, source: str | Path, xywh: bool) -> list[str]:
    """Notes on boxes that as a whole cannot be what they claim; UserError where nearly all are wrong. table [n, 5]: x1,
    y1, x2, y2, px before clipping, and the file's own area or NaN; sides [n, 2]: width and height of the image."""
    usable = np.isfinite(table[:, :4]).all(1) & (table[:, 2:4] > table[:, :2]).all(1)
    corners, areas, sides = table[usable, :4], table[usable, 4], sides[usable]
    if not (n := len(corners)):
        return []
    # as the file gives them
    given = np.column_stack([corners[:, :2], corners[:, 2:] - corners[:, :2]]) if xywh else corners + [1, 1, 0, 0]
    if (share := (abs(given) <= 1.1).all(1).mean()) >= 0.9:
        raise UserError(f"{source}: all numbers of {round(share * n)} of {n} boxes lie in 0..1, as shares of the "
                        "image's width and height do. Give pixels.")
    over = np.maximum(-corners[:, :2], corners[:, 2:] - sides)  # px beyond the image, along x and y
    outside = (over > np.maximum(1, 0.01 * sides)).any(1)
    tiny = (corners[:, 2:] - corners[:, :2] < 1).any(1)
    far = over[outside].max(1)
    by = f", by {np.median(far):.4g} px in the median and {far.max():.4g} px at most" if len(far) else ""
    leave = f"{source}: {len(far)} of {n} boxes leave their image{by}; {tiny.sum()} of {n} are below a pixel"
    if reason := _other_meaning(corners, given, areas, sides, outside, xywh):
        raise UserError(f"{leave}. {reason}")
    for wrong in (outside, tiny):
        if wrong.sum() >= max(4, n / 2):
            raise UserError(f"{leave}. These cannot be the boxes of these images in pixels, as "
                            f"{'x y width height' if xywh else 'xmin ymin xmax ymax'}; correct the annotations.")
    notes = [f"{leave}. What lies outside is cut off."] if outside.any() or tiny.any() else []
    if n >= 4 and (corners[:, :2] <= 0.01 * sides).all() and (corners[:, 2:] >= 0.99 * sides).all():
        notes.append(f"{source}: each of the {n} boxes is its whole image.")
    elif n >= 10 and (given == given[0]).all():
        notes.append(f"{source}: all {n} boxes are the same, {' '.join(f'{v:g}' for v in given[0])}.")
    elif n >= 10 and (reach := (corners[:, 2:] / sides).max(0)).max() <= 0.55:
        notes.append(f"{source}: all {n} boxes lie in the first {reach[0]:.0%} of the width and {reach[1]:.0%} of the "
                     "height of their image, as those of a smaller copy, or in percent, would.")
    return notes


def _other_meaning(corners: np.ndarray, given: np.ndarray, areas: np.ndarray, sides: np.ndarray, outside: np.ndarray,
                   xywh: bool) -> str | None:
    """What nearly all boxes of a set must be, as a good part of them leaves its image by what they claim; or None.
    given [n, 4]: the numbers as the file has them."""
    n = len(corners)
    a, b, c, d = given.T
    readings = {"y x height width" if xywh else "ymin xmin ymax xmax": corners[:, [1, 0, 3, 2]]}
    if xywh:
        readings = {"x1 y1 x2 y2": given, "centre x, centre y, width, height":
                    np.column_stack([a - c / 2, b - d / 2, a + c / 2, b + d / 2]), **readings, "y1 x1 y2 x2":
                    given[:, [1, 0, 3, 2]]}
    slack = np.maximum(1, 0.01 * sides)
    of_corners = np.isclose(areas, (c - a) * (d - b), rtol=0.01) & ~np.isclose(areas, c * d, rtol=0.01)
    for name, box in readings.items():
        fits = ((box[:, 2:] > box[:, :2]) & (box[:, :2] >= -slack) & (box[:, 2:] <= sides + slack)).all(1)
        told_by_area = name == "x1 y1 x2 y2" and n >= 3 and bool(of_corners.mean() >= 0.98)
        if fits.mean() >= 0.98 and (outside.sum() >= max(2, 0.05 * n) or told_by_area):
            area = ", and have the areas of the file" * told_by_area
            return (f"Read as {name}, {fits.sum()} of {n} lie inside{area}. "
                    f"Give {'x y width height' if xywh else 'xmin ymin xmax ymax'}, in pixels.")
    before = (corners[:, :2] < -slack).any(1).mean()
    reach = np.quantile(corners[:, 2:] / sides, 0.99, axis=0)
    if outside.sum() >= max(3, 0.3 * n) and before <= 0.01 and (reach > 1.1).all():
        return (f"They leave it to the right and below only, up to {reach[0]:.3g} times its width and {reach[1]:.3g} "
                "times its height: the boxes of larger pictures, before these were resized? Scale them too.")
    return None


def _unknown_category(source: Path, key: int | str, name: str | None, categories: list[dict]) -> UserError:
    """For a class that is none of `categories`; their ids are told where one name has several."""
    names = Counter(c["name"] for c in categories)
    known = ", ".join(c["name"] if names[c["name"]] == 1 else f"{c['name']} (id {c['id']})" for c in categories)
    return UserError(f"{source}: category {key} ({name or 'not listed'}) is not one of the known: {known}. "
                     "Relabel it or train with it.")


# At most so many files of a set are asked for their EXIF rotation.
EXIF_SAMPLE = 1000


def _choose_frames(records: list[_Record], source: str | Path, exif: str, rotated: bool
                   ) -> tuple[tuple[bool, ...], list[str]]:
    """-> (DetectionSet.frames, notes). Whether boxes lie on the picture as stored or as its EXIF rotates it is one
    decision for a set (`exif`: auto; else stored or rotated, for all). It is told by the images that an EXIF rotation
    turns on their side: width and height of the annotation fit one of the two. Where they disagree, each of them is
    read as its size says, the rest as most of them; where none tells, as `rotated` says. Of a set above EXIF_SAMPLE
    files that many are asked, the same each time; only their headers are read."""
    if exif != "auto":
        return (exif == "rotated",), []
    chosen, of = records, ""
    if len(records) > EXIF_SAMPLE:
        drawn = np.random.default_rng(0).choice(len(records), EXIF_SAMPLE, replace=False)
        chosen, of = [records[i] for i in np.sort(drawn)], f" of {EXIF_SAMPLE} that were asked"
    votes: Counter[str] = Counter()
    for record in chosen:
        width, height, orientation = image_header(record.image) or (0, 0, 1)
        if orientation > 1:
            stored = (height, width) == record.hw
            turned = ((width, height) if orientation > 4 else (height, width)) == record.hw
            votes["silent" if stored == turned else "stored" if stored else "rotated"] += 1
    if not votes:
        return (True, False), []
    if votes["stored"] != votes["rotated"]:
        rotated = votes["rotated"] > votes["stored"]
    as_told = "the picture as its EXIF rotates it" if rotated else "the picture as stored"
    if votes["stored"] and votes["rotated"]:
        text = (f"rotation and annotations disagree: by their size, the boxes of {votes['rotated']} images{of} lie on "
                f"the picture as its EXIF rotates it, those of {votes['stored']} on the picture as stored. Each is "
                f"read so, and all whose size does not tell as {as_told}")
    elif votes["stored"] or votes["rotated"]:
        text = (f"boxes are taken to lie on {as_told}: so says the size of {votes['stored'] + votes['rotated']} "
                f"images{of}, and {votes['silent']} others with an EXIF rotation are read likewise")
    else:
        text = (f"{votes['silent']} images{of} have an EXIF rotation, and by no size can be told whether boxes lie on "
                f"the rotated picture or on the stored one: taken to lie on {as_told}")
    other = "stored" if rotated else "rotated"
    return (rotated, not rotated), [f"{source}: {text} (--exif {other}: all the other way)."]


# ==== 4. COCO json ====


def _integer(value: Any) -> int:
    """A size of a json: 7, "7" and 7.0 are 7; ValueError for all else, which int() would round or take."""
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _id(value: Any) -> int | str:
    """An id of a json, as it is (7.0 is the number 7): "7" is another one. ValueError for what is no id."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) not in (int, str):
        raise ValueError(f"the id {value!r} is neither a whole number nor a text")
    return value


def _order(key: int | str) -> tuple[bool, int | str]:
    """Sorts ids: numbers, then texts."""
    return isinstance(key, str), key


def _read_coco(path: Path) -> tuple[dict, list[dict], list[tuple[int | str, int, int, str]]]:
    """-> (the file's content, its categories sorted by id, its images (id, height, width, file name) sorted by id).
    UserError for an id that occurs twice, ValueError for a size that no image can have."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    categories = sorted(({"id": _id(c["id"]), "name": str(c["name"])} for c in content["categories"]),
                        key=lambda c: _order(c["id"]))
    images = sorted(((_id(i["id"]), _integer(i["height"]), _integer(i["width"]), str(i["file_name"]))
                     for i in content["images"]), key=lambda i: _order(i[0]))
    if len({i[0] for i in images}) < len(images) or len({c["id"] for c in categories}) < len(categories):
        raise UserError(f"{path}: an image id or category id occurs twice. Give every image and category its own id.")
    for _, height, width, file in images:
        if not (0 < height < 2**31 and 0 < width < 2**31):
            raise ValueError(f"image {file} is {width} x {height} px")
    return content, categories, images


def _without_dummy(content: dict, categories: list[dict]) -> tuple[list[dict], list[str]]:
    """-> (categories, notes). Roboflow's exports begin with a category that stands for all others together: id 0, no
    object, the supercategory of each. It is none to learn."""
    first, *others = categories or [None]
    above = {str(c.get("supercategory")) for c in content["categories"] if c["id"] != 0}
    if (not others or first["id"] != 0 or above != {first["name"]}
        or any(_id(a["category_id"]) == 0 for a in content["annotations"])):
        return categories, []
    return others, [f"category 0 ({first['name']}) has no object and is the supercategory of all others: left out."]


def _match_categories(listed: list[dict], categories: list[dict]) -> dict[int | str, int]:
    """Category id of a file -> position in `categories` of the same id and name, else of the same name, where that is
    one category there and here (the test file of a set may count otherwise)."""
    exact = {(c["id"], c["name"]): k for k, c in enumerate(categories)}
    here, there = (Counter(c["name"] for c in side) for side in (categories, listed))
    unique = {c["name"]: k for k, c in enumerate(categories) if here[c["name"]] == there[c["name"]] == 1}
    matched = {c["id"]: exact.get((c["id"], c["name"]), unique.get(c["name"])) for c in listed}
    return {key: label for key, label in matched.items() if label is not None}


def _coco_objects(path: Path, annotations: list[dict], images: list[tuple[int | str, int, int, str]],
                  listed: list[dict], categories: list[dict], masks: bool) -> tuple[dict, dict]:
    """-> (rows for _RecordBuilder.record, segmentations), of the objects of each image id. listed: the file's own
    categories; categories: those that the set shall have."""
    labels, names = _match_categories(listed, categories), {c["id"]: c["name"] for c in listed}
    sizes = {image_id: (height, width) for image_id, height, width, _ in images}
    rows = {image_id: [] for image_id in sizes}
    segments = {image_id: [] for image_id in sizes}
    for a in annotations:
        x, y, w, h = map(float, a["bbox"] if isinstance(a["bbox"], list) else ())
        category_id, image_id = _id(a["category_id"]), _id(a["image_id"])
        if category_id not in labels:
            raise _unknown_category(path, category_id, names.get(category_id), categories)
        if image_id not in rows and str(image_id) in map(str, rows):
            raise ValueError(f"the image_id {image_id!r} is a {'text' if isinstance(image_id, str) else 'number'}, "
                             "the id of the image is not")
        area = float("nan") if a.get("area") is None else float(a["area"])
        crowd = _integer(a.get("iscrowd") or 0) > 0
        rows[image_id].append((x, y, x + w, y + h, w <= 0 or h <= 0, labels[category_id], crowd, False, area))
        segments[image_id].append(_usable_segment(a.get("segmentation"), sizes[image_id]) if masks else None)
    return rows, segments


def _find_files(names: list[str], folders: list[Path], source: Path) -> tuple[Path, dict[str, str], list[str]]:
    """-> (the first of `folders` that holds all `names` (may contain subfolders), {name: as it is spelled there},
    notes). UserError names what is missing."""
    for n in names:
        if ".." in PureWindowsPath(n).parts or PureWindowsPath(n).root or Path(n).drive:  # both kinds of separators
            raise UserError(f"{source}: the file name {n!r} leads out of the image folder. Give names below it; "
                            "links in it may lead elsewhere.")
    best: tuple[int, Path, list[str]] | None = None
    for folder in folders:
        finder = FileFinder()
        found = {n: finder.find(folder, n) for n in names}
        missing = [n for n in names if found[n] is None]
        if not missing:
            return folder, found, finder.note(source, len(names))
        best = min(best or (len(names) + 1, folder, []), (len(missing), folder, missing), key=lambda b: b[0])
    raise UserError(f"{source}: {best[0]} of {len(names)} images are not there, the first: "
                    f"{best[1] / best[2][0]}. Looked in {', '.join(map(str, folders))}; "
                    "put the images there or give their folder as --data_root.")


def _open_coco(path: Path, image_folders: list[Path], name: str, categories: list[dict] | None,
               masks: bool) -> DetectionSet:
    try:
        content, listed, images = _read_coco(path)
        known, left_out = (categories, []) if categories else _without_dummy(content, listed)
        categories = [dict(c) for c in known]
        rows, segments = _coco_objects(path, content["annotations"], images, listed, categories, masks)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Give an existing COCO json.") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is no COCO detection json: {type(error).__name__} {error}. It needs images (id, "
                        "width, height, file_name), annotations (image_id of a listed image, category_id, "
                        "bbox of 4 numbers) and categories (id, name).") from error
    if not images or not categories:
        raise UserError(f"{path} lists {len(images)} images and {len(categories)} categories. "
                        "At least one of each is needed.")
    folder, found, respelled = _find_files([file for *_, file in images], image_folders, path)
    builder = _RecordBuilder()
    records = [builder.record(folder / found[file], image_id, (height, width), rows[image_id], f"image {file}",
                            segments[image_id] if masks else None)
               for image_id, height, width, file in images]
    if masks:
        _check_segments(records, path)
    notes = [*builder.notes(path, xywh=True), *respelled, *(f"{path}: {text}" for text in left_out)]
    files = len({found[file] for *_, file in images})
    if files < len(images):
        notes.append(f"{path}: {len(images) - files} of {len(images)} images name a file that another one names too; "
                     "each counts for itself.")
    return DetectionSet(name, categories, records, notes)


# ==== 5. VOC xml ====


def _read_voc(year: Path, file: str, finder: FileFinder) -> tuple[Path, tuple[int, int], str, list[tuple]]:
    """-> (the image's xml, (h, w), the file its filename tag names, [(name, difficult, xmin, ymin, xmax, ymax)])."""
    name = f"{os.path.splitext(file)[0]}.xml"
    path = year / "Annotations" / (finder.find(year / "Annotations", name) or name)
    try:
        content = path.read_bytes()
        # in UTF-16 too; newer versions of expat find what expands without end, older ones do not
        if b"<!ENTITY" in content.replace(b"\0", b""):
            raise ValueError("it defines entities, which no annotation needs")
        tree = ElementTree.fromstring(content)
        hw = int(float(tree.findtext("size/height"))), int(float(tree.findtext("size/width")))
        if min(hw) < 1:
            raise ValueError(f"the image is {hw[1]} x {hw[0]} px")
        objects = [(o.findtext("name").strip(), (o.findtext("difficult") or "0").strip() == "1",
                    *(float(o.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")))
                   for o in tree.findall("object")]
        if not all(o[0] for o in objects):
            raise ValueError("an object's name is empty")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Every listed image needs its annotation file.") from error
    except (ElementTree.ParseError, TypeError, ValueError, AttributeError, OverflowError, LookupError) as error:
        raise UserError(f"{path} is no VOC annotation: {error}. It needs size/width, "
                        "size/height and per object a name and a bndbox.") from error
    return path, hw, (tree.findtext("filename") or "").strip(), objects


def _open_voc(root: Path, split: str, name: str, categories: list[dict] | None, masks: bool) -> DetectionSet:
    images, finder = voc_images(root, split), FileFinder()
    read = [_read_voc(*image, finder) for image in images]
    if categories is None:  # the classes are those of the train split even where only the test split is asked for
        classes = read if split == "train" else [_read_voc(*image, finder) for image in voc_images(root, "train")]
        found = sorted({o[0] for *_, objects in classes for o in objects})
        categories = [{"id": k + 1, "name": n} for k, n in enumerate(found)]
    labels = {c["name"]: k for k, c in enumerate(categories)}
    builder = _RecordBuilder()
    records, renamed = [], 0
    for (year, file), (path, hw, tag, objects) in zip(images, read):
        # the annotation file's name decides, not its filename tag
        renamed += unicode_form(os.path.splitext(tag)[0]) != unicode_form(path.stem)
        if unknown := [n for n, *_ in objects if n not in labels]:
            raise _unknown_category(path, unknown[0], unknown[0], categories)
        # Corners count from 1, both inclusive. x1 = x2 would be one pixel wide; no object is: it is a click without a
        # drag, so it counts as empty.
        rows = [(x1 - 1, y1 - 1, x2, y2, x2 <= x1 or y2 <= y1, labels[n], False, difficult,
                 float("nan")) for n, difficult, x1, y1, x2, y2 in objects]
        records.append(builder.record(year / "JPEGImages" / file, len(records) + 1, hw, rows, path))
    if not records or not categories:
        raise UserError(f"{root}: the VOC {split} split has {len(records)} images and {len(categories)} classes. "
                        "At least one of each is needed.")
    if masks:
        _check_segments(records, root)
    notes = builder.notes(root, xywh=False)
    if renamed:
        notes.append(f"{root}: {renamed} annotations name another image in their <filename> tag; "
                     "the annotation file's own name decides.")
    return DetectionSet(name, [dict(c) for c in categories], records, notes, voc=True)


# ==== 6. Sets whose boxes are not in a file ====


def _open_synthetic(split: str, n: int, size: int, seed: int, masks: bool) -> DetectionSet:
    scenes = SyntheticScenes(n, size, seed, SYNTHETIC_OFFSET[f"detection/{split}"])
    categories = [{"id": k + 1, "name": c} for k, c in enumerate(scenes.CLASSES)]
    builder = _RecordBuilder()
    records = []
    for i in range(n):
        _, xyxy, labels = scenes.scene(i)
        rows = [(*box, False, label, False, False, float("nan")) for box, label in zip(xyxy, labels)]
        segments = [coco_mask.encode(np.asfortranarray(m, np.uint8)) for m in scenes.draw(i)[1]] if masks else None
        records.append(builder.record(i, i + 1, (size, size), rows, scenes.key(i), segments))
    return DetectionSet("synthetic", categories, records, [], scenes)


def held_out_set(source: ImageFiles, indices: Sequence[int], boxes_of: Callable[[Image.Image, int], np.ndarray]
                 ) -> DetectionSet:
    """Unlabelled images as a labelled set of one class, "proposal": a stand-in where nobody drew boxes. boxes_of(image,
    index) -> xyxy px [n, 4]; a file that cannot be read is left out and stands in `.notes`."""
    builder = _RecordBuilder()
    records, notes = [], []
    for i in indices:
        try:
            image = source.load(i)
        except UnreadableImage as error:
            notes.append(f"left out of the probe: {error}")
            continue
        rows = [(*box, False, 0, False, False, float("nan")) for box in boxes_of(image, i).tolist()]
        records.append(builder.record(source.root / source.key(i), i, (image.height, image.width), rows, source.key(i)))
    return DetectionSet(source.name, [{"id": 1, "name": "proposal"}], records, notes)


# ==== 7. Any set by its name ====


def open_detection(data: str, data_root: str | None, split: str, *, categories: list[dict] | None = None,
                   synthetic_images: int = 40, synthetic_size: int = 160, seed: int = 0, masks: bool = False,
                   exif: str = "auto", rotated: bool = True) -> DetectionSet:
    """`data`: coco | voc | synthetic | a COCO json (then `split` plays no part) | a folder with train.json and
    test.json (or val.json), or in VOC layout. `data_root`: where a named set, or the images of a json, lie; they are
    looked for there alone. `split`: train | test. `categories`: the train set's (or a checkpoint's) when opening test.
    masks: every object must have a segmentation (COCO, synthetic), which DetectionSet.masks() gives. exif: auto |
    stored | rotated, where boxes lie; rotated: what auto takes where no image tells (_choose_frames). Raises UserError
    for all that is wrong."""
    found = _open_set(data, data_root, split, categories, synthetic_images, synthetic_size, seed, masks)
    if found.scenes is None:
        found.frames, notes = _choose_frames(found.records, data, exif, rotated)
        found.notes += notes
    return found


def _open_set(data: str, data_root: str | None, split: str, categories: list[dict] | None, synthetic_images: int,
              synthetic_size: int, seed: int, masks: bool) -> DetectionSet:
    if data == "synthetic":
        return _open_synthetic("train" if split == "train" else "test", synthetic_images, synthetic_size, seed, masks)
    part = "train" if split == "train" else "val"
    if data == "coco":
        annotations = f"annotations/instances_{part}2017.json"
        root = named_root(data, data_root, part, lambda place: (place / annotations).is_file())
        return _open_coco(root / annotations, [root / f"{part}2017"], data, categories, masks)
    if data == "voc":
        root = named_root(data, data_root, part, lambda place: bool(voc_years(place)))
        found = _open_voc(root, split, data, categories, masks)
        years = [year.name for year in voc_years(root)]
        if split == "train" and "VOC2012" not in years:
            found.notes.append(f"{root}: VOC2012 is not there, training on the trainval of {years[0]} alone.")
        return found
    path = Path(data).expanduser()
    if path.suffix.lower() == ".json":
        root = Path(data_root).expanduser() if data_root else path.parent
        return _open_coco(path, [root, root / "images"], path.stem, categories, masks)
    for file in (path / "train.json",) if split == "train" else (path / "test.json", path / "val.json"):
        if file.is_file():
            root = Path(data_root).expanduser() if data_root else path
            folders = [root, root / "images", root / file.stem]
            return _open_coco(file, folders, path.resolve().name, categories, masks)
    for root in (path, path / "VOCdevkit"):
        if voc_years(root):
            return _open_voc(root, split, path.resolve().name, categories, masks)
    wanted = "train.json" if split == "train" else "test.json or val.json"
    raise UserError(f"--data {data}: no labelled set for the {split} split there. Give coco, voc, synthetic, a COCO "
                    f"json, or a folder with {wanted} or with VOC2007/{{JPEGImages,Annotations,ImageSets/Main}}.")
