"""Labelled detection sets: COCO, VOC, YOLO (formats.py reads them), drawn scenes; their splits. Classes are taken from
the files; what could not be used stands in `.notes`.

Boxes are `boxes_xyxy` in pixels of the image they come with, x2/y2 exclusive (width = x2 - x1).
"""
from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

import cityscapes
from common import UserError
from data import (SYNTHETIC_OFFSET, ImageFiles, ImagePyramid, Needs, SyntheticScenes, UnreadableImage, decode_image,
                  image_header)
from formats import LOOKED_FOR, LabelledImage, Labels, Layout, find_layout, named_layout, what_is_there
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
    # LVIS: annotated for some categories of an image only. formats.read_federated, with ids of `categories`
    federated: dict[str, dict] | None = None

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

    def load(self, i: int, needs: Needs | None = None) -> tuple[Image.Image | ImagePyramid, dict]:
        """-> (PIL RGB, target): boxes_xyxy float32 [n, 4] px, labels int64 [n], ignore (COCO crowd or VOC difficult)
        and crowd (COCO crowd alone) bool [n], image_id int or str, orig_size int64 [2] (h, w). Raises UnreadableImage,
        or UserError where the size is another one."""
        record = self.records[i]
        h, w = record.hw
        for exif in self.frames:
            drawn = isinstance(record.image, int)
            image = self.scenes.load(record.image) if drawn else decode_image(record.image, exif, needs)
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
        and "difficult": 1; pycocotools overwrites "ignore" by iscrowd, so an evaluation reads "difficult". Images and
        categories of a federated set have LVIS's fields."""
        images, annotations, federated = [], [], self.federated or {"images": {}, "frequency": {}}
        for r in self.records:
            file = Path(r.image).name if isinstance(r.image, Path) else f"{r.image:08d}"
            images.append({"id": r.id, "width": r.hw[1], "height": r.hw[0], "file_name": file,
                           **federated["images"].get(r.id, {})})
            for k, (x1, y1, x2, y2) in enumerate(r.boxes.tolist()):
                annotations.append({"id": len(annotations) + 1, "image_id": r.id,
                                    "category_id": self.categories[r.labels[k]]["id"], "area": float(r.areas[k]),
                                    "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": int(r.crowd[k])})
                if r.difficult[k]:
                    annotations[-1] |= {"ignore": 1, "difficult": 1}
                if r.segments is not None:
                    annotations[-1]["segmentation"] = segment_rle(r.segments[k], r.hw)
        frequency = federated["frequency"]
        return {"images": images, "annotations": annotations,
                "categories": [c | ({"frequency": frequency[c["id"]]} if c["id"] in frequency else {})
                               for c in self.categories]}

    def subset(self, percent: float, seed: int) -> DetectionSet:
        """The labelled `percent` of low-data fine-tuning, order as drawn by label_subset; the same on all processes."""
        drawn = label_subset(range(len(self)), percent / 100, seed)
        if not drawn:
            raise UserError(f"{percent} % of the {len(self)} images of {self.name} are no usable part; "
                            "give one that leaves 1 to all of them.")
        notes = [*self.notes, f"{len(drawn)} of {len(self)} images"]
        return replace(self, records=[self.records[i] for i in drawn], notes=notes)

    def split(self, percent: float, seed: int) -> tuple[DetectionSet, DetectionSet]:
        """-> (the rest, `percent` of the images), in the order of the set; the same on all processes. Records of one
        image file stay together."""
        files: dict[Path | int, list[int]] = {}
        for i, record in enumerate(self.records):
            files.setdefault(record.image, []).append(i)
        groups = list(files.values())
        classes = [np.unique(np.concatenate([self.records[i].labels[~self.records[i].crowd] for i in group])).tolist()
                   for group in groups]
        chosen = stratified_part(classes, percent / 100, seed)
        if not chosen:
            raise UserError(f"{percent} % of the {len(self)} images of {self.name} cannot be set apart for validation: "
                            "too few, or each holds the last object of a class. Give more labels or --val_data.")
        apart = {i for k in chosen for i in groups[k]}
        part = [r for i, r in enumerate(self.records) if i in apart]
        lacking = {k for names in classes for k in names} - {k for g in chosen for k in classes[g]}
        note = f"{len(part)} of the {len(self)} images of {self.name} are set apart for validation (seed {seed})"
        if lacking:
            names = [self.categories[k]["name"] for k in sorted(lacking)]
            note += (f"; none of them has an object of {', '.join(names[:5])}{', ...' * (len(names) > 5)}")
        rest = [r for i, r in enumerate(self.records) if i not in apart]
        return replace(self, records=rest, notes=[*self.notes, note]), replace(self, records=part, notes=[])


def label_subset(ids: Sequence[int], fraction: float, seed: int) -> list[int]:
    """DETReg's rule (datasets/coco.py): default_rng(seed).choice(ids, round(n * fraction), replace=False), order kept
    as drawn."""
    count = round(len(ids) * fraction)
    if not 0 < count <= len(ids):
        return []
    return np.random.default_rng(seed).choice(np.asarray(ids), count, replace=False).tolist()


def stratified_part(classes: list[list[int]], share: float, seed: int) -> list[int]:
    """A share of the images, of each class about that share of its images, never the last one: sorted indices, some of
    them always where that can be. classes: those of each image. The rarest class is shared out first (iterative
    stratification, Sechidis et al. 2011), images without any last."""
    order = np.random.default_rng(seed).permutation(len(classes)).tolist()
    of_class: dict[int, list[int]] = {}
    for i in order:
        for k in classes[i]:
            of_class.setdefault(k, []).append(i)
    left = {k: len(images) - 1 for k, images in of_class.items()}  # so many of a class may still be taken
    taken = Counter()
    chosen: set[int] = set()
    decided: set[int] = set()

    def take(i: int) -> None:
        chosen.add(i)
        for k in classes[i]:
            left[k] -= 1
            taken[k] += 1

    for k in sorted(of_class, key=lambda k: (len(of_class[k]), k)):
        for i in of_class[k]:
            if i not in decided and taken[k] < round(share * len(of_class[k])) and all(left[c] for c in classes[i]):
                take(i)
        decided.update(of_class[k])
    wanted = min(max(1, round(share * len(classes))), len(classes) - 1)
    empty = [i for i in order if not classes[i]]
    chosen.update(empty[:round(share * len(empty))])
    # rounding may leave some to take: those of whose classes none has more than its share
    for i in order:
        if len(chosen) >= wanted:
            break
        if i not in chosen and all(left[c] and taken[c] < np.ceil(share * len(of_class[c])) for c in classes[i]):
            take(i)
    return sorted(chosen)


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
        inside = polygons and all(-far < v < far for p in polygons for v in p)
        # arrays: LVIS's 120 million numbers would take four times the memory as Python's
        return [np.array(p, np.float64) for p in polygons] if inside else None
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
    1 % of such, and one whose boxes as a whole cannot be what they claim (_check_plausible). form: Labels.form."""

    def __init__(self, form: str = "corners"):
        self.form, self.total, self.bad = form, 0, []
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

    def notes(self, source: Path) -> list[str]:
        """What was dropped and what is odd about the set, in sentences. UserError for a set to refuse."""
        odd = []
        if self.total:
            tables, sides = zip(*self.unclipped)
            sides = np.repeat(np.array(sides, np.float64), [len(t) for t in tables], axis=0)
            odd = _check_plausible(np.concatenate(tables), sides, source, self.form)
        if len(self.bad) > (0.01 * self.total if self.total >= 100 else 0):
            raise UserError(f"{source}: {len(self.bad)} of {self.total} boxes are empty or outside their image, "
                            f"the first: {self.bad[0]}. More than 1 % (below 100 boxes: any) points to a wrong format; "
                            "correct the annotations.")
        if self.bad:
            odd.insert(0, f"{source}: {len(self.bad)} of {self.total} boxes left out as empty or outside: "
                       f"{'; '.join(self.bad[:3])}")
        return odd


# What a box is in a label file, by Labels.form.
FORMS = {"xywh": "x y width height, in pixels", "corners": "xmin ymin xmax ymax, in pixels",
         "centre": "centre x, centre y, width, height, as shares of the image's width and height"}


def _check_plausible(table: np.ndarray, sides: np.ndarray, source: str | Path, form: str) -> list[str]:
    """Notes on boxes that as a whole cannot be what they claim; UserError where nearly all are wrong. table [n, 5]: x1,
    y1, x2, y2, px before clipping, and the file's own area or NaN; sides [n, 2]: width and height of the image."""
    usable = np.isfinite(table[:, :4]).all(1) & (table[:, 2:4] > table[:, :2]).all(1)
    corners, areas, sides = table[usable, :4], table[usable, 4], sides[usable]
    if not (n := len(corners)):
        return []
    # as the file gives them, but in px
    lengths = corners[:, 2:] - corners[:, :2]
    given = {"xywh": np.column_stack([corners[:, :2], lengths]), "corners": corners + [1, 1, 0, 0],
             "centre": np.column_stack([corners[:, :2] + lengths / 2, lengths])}[form]
    if (share := (abs(given) <= 1.1).all(1).mean()) >= 0.9 and form != "centre":
        raise UserError(f"{source}: all numbers of {round(share * n)} of {n} boxes lie in 0..1, as shares of the "
                        "image's width and height do. Give pixels.")
    over = np.maximum(-corners[:, :2], corners[:, 2:] - sides)  # px beyond the image, along x and y
    outside = (over > np.maximum(1, 0.01 * sides)).any(1)
    tiny = (corners[:, 2:] - corners[:, :2] < 1).any(1)
    far = over[outside].max(1)
    by = f", by {np.median(far):.4g} px in the median and {far.max():.4g} px at most" if len(far) else ""
    leave = f"{source}: {len(far)} of {n} boxes leave their image{by}; {tiny.sum()} of {n} are below a pixel"
    if reason := _other_meaning(corners, given, areas, sides, outside, form):
        raise UserError(f"{leave}. {reason}")
    for wrong in (outside, tiny):
        if wrong.sum() >= max(4, n / 2):
            raise UserError(f"{leave}. These cannot be the boxes of these images, as {FORMS[form]}; correct the "
                            "annotations.")
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
                   form: str) -> str | None:
    """What nearly all boxes of a set must be, as a good part of them leaves its image by what they claim; or None.
    given [n, 4]: the numbers as the file has them, in px."""
    n = len(corners)
    a, b, c, d = given.T
    from_corner = np.column_stack([a, b, a + c, b + d])
    if form == "xywh":
        readings = {"x1 y1 x2 y2": given, "centre x, centre y, width, height":
                    np.column_stack([a - c / 2, b - d / 2, a + c / 2, b + d / 2]),
                    "y x height width": corners[:, [1, 0, 3, 2]], "y1 x1 y2 x2": given[:, [1, 0, 3, 2]]}
    elif form == "corners":
        readings = {"ymin xmin ymax xmax": corners[:, [1, 0, 3, 2]], "x y width height": from_corner}
    else:
        readings = {"x1 y1 x2 y2": given, "x y width height": from_corner}
    slack = np.maximum(1, 0.01 * sides)
    of_corners = np.isclose(areas, (c - a) * (d - b), rtol=0.01) & ~np.isclose(areas, c * d, rtol=0.01)
    for name, box in readings.items():
        fits = ((box[:, 2:] > box[:, :2]) & (box[:, :2] >= -slack) & (box[:, 2:] <= sides + slack)).all(1)
        told_by_area = name == "x1 y1 x2 y2" and n >= 3 and bool(of_corners.mean() >= 0.98)
        if fits.mean() >= 0.98 and (outside.sum() >= max(2, 0.05 * n) or told_by_area):
            area = ", and have the areas of the file" * told_by_area
            return f"Read as {name}, {fits.sum()} of {n} lie inside{area}. Give {FORMS[form]}."
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


def _choose_frames(sized: list[tuple[Path, tuple[int, int]]], source: str | Path, exif: str, rotated: bool
                   ) -> tuple[tuple[bool, ...], list[str]]:
    """sized: images and the (h, w) that their labels tell -> (DetectionSet.frames, notes). Whether boxes lie on the
    picture as stored or as its EXIF rotates it is one decision for a set (`exif`: auto; else stored or rotated, for
    all). It is told by the images that an EXIF rotation turns on their side: width and height of the annotation fit one
    of the two. Where they disagree, each of them is read as its size says, the rest as most of them; where none tells,
    as `rotated` says. Of a set above EXIF_SAMPLE files that many are asked, the same each time; only their headers are
    read."""
    if exif != "auto":
        return (exif == "rotated",), []
    chosen, of = sized, ""
    if len(sized) > EXIF_SAMPLE:
        drawn = np.random.default_rng(0).choice(len(sized), EXIF_SAMPLE, replace=False)
        chosen, of = [sized[i] for i in np.sort(drawn)], f" of {EXIF_SAMPLE} that were asked"
    votes: Counter[str] = Counter()
    for file, hw in chosen:
        width, height, orientation = image_header(file) or (0, 0, 1)
        if orientation > 1:
            stored = (height, width) == hw
            turned = ((width, height) if orientation > 4 else (height, width)) == hw
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


# ==== 4. From labels to records ====


def _match_categories(listed: list[dict], categories: list[dict]) -> dict[int | str, int]:
    """Category id of a file -> position in `categories` of the same id and name, else of the same name, where that is
    one category there and here (the test file of a set may count otherwise)."""
    exact = {(c["id"], c["name"]): k for k, c in enumerate(categories)}
    here, there = (Counter(c["name"] for c in side) for side in (categories, listed))
    unique = {c["name"]: k for k, c in enumerate(categories) if here[c["name"]] == there[c["name"]] == 1}
    matched = {c["id"]: exact.get((c["id"], c["name"]), unique.get(c["name"])) for c in listed}
    return {key: label for key, label in matched.items() if label is not None}


def _measure(images: list[LabelledImage], displayed: bool, labels: Labels) -> tuple[list[LabelledImage], list[str]]:
    """-> (the images, all with a size, notes). A size that the labels lack is read from the image's header, in the
    frame that its EXIF displays or as stored."""
    measured, unreadable, turned, lacking = [], [], 0, 0
    for image in images:
        if image.hw is None:
            lacking += 1
            if (header := image_header(image.file)) is None:
                unreadable.append(str(image.file))
                continue
            width, height, orientation = header
            turned += orientation > 1
            image = image._replace(hw=(width, height) if displayed and orientation > 4 else (height, width))
        measured.append(image)
    frame = "as its EXIF rotates it" if displayed else "as stored"
    notes = []
    if lacking and (labels.form != "centre" or turned):
        notes.append(f"{labels.source}: the labels of {lacking} of {len(images)} images do not tell its size, it is "
                     f"read from the image {frame}; {turned} have an EXIF rotation")
    if unreadable:
        notes.append(f"{labels.source}: {len(unreadable)} images whose size the labels do not tell cannot be read and "
                     f"are left out: {', '.join(unreadable[:3])}{', ...' * (len(unreadable) > 3)}")
    if not measured:
        raise UserError(f"{labels.source}: none of its {len(images)} images can be read, the first: {images[0].file}.")
    return measured, notes


def _labelled_set(labels: Labels, name: str, categories: list[dict] | None, masks: bool, exif: str, rotated: bool
                  ) -> DetectionSet:
    """What a reader gave, as a set with the classes `categories` (else its own)."""
    class_notes = [] if categories else labels.class_notes
    categories = [dict(c) for c in categories or labels.categories]
    if not labels.images or not categories:
        raise UserError(f"{labels.source}: it has {len(labels.images)} images and {len(categories)} classes. At least "
                        "one of each is needed.")
    numbers = _match_categories(labels.listed, categories)
    names = {c["id"]: c["name"] for c in labels.listed}
    frames, exif_notes = _choose_frames([(i.file, i.hw) for i in labels.images if i.hw], labels.source, exif, rotated)
    images, size_notes = _measure(labels.images, frames[0], labels)
    builder, records = _RecordBuilder(labels.form), []
    for file, image_id, hw, rows, segments, where in images:
        if unknown := [row[5] for row in rows if row[5] not in numbers]:
            raise _unknown_category(where if isinstance(where, Path) else labels.source, unknown[0],
                                    names.get(unknown[0]), categories)
        sides = (hw[1], hw[0]) * 2
        if labels.form == "centre":
            rows = [(*(v * side for v, side in zip(row, sides)), *row[4:]) for row in rows]
            segments = segments and [s and [[v * sides[k % 2] for k, v in enumerate(p)] for p in s] for s in segments]
        rows = [(*row[:5], numbers[row[5]], *row[6:]) for row in rows]
        if segments is not None:
            segments = [_usable_segment(segment, hw) for segment in segments]
        records.append(builder.record(file, image_id, hw, rows, where, segments))
    if masks:
        _check_segments(records, labels.source)
    notes = [*builder.notes(labels.source), *labels.notes, *class_notes, *size_notes, *exif_notes]
    federated = labels.federated and _renamed(labels.federated, {c: categories[k]["id"] for c, k in numbers.items()})
    return DetectionSet(name, categories, records, notes, voc=labels.form == "corners", frames=frames,
                        federated=federated)


def _renamed(federated: dict[str, dict], ids: dict[int | str, int | str]) -> dict[str, dict]:
    """Labels.federated with the category ids of a set; categories that it lacks are left out."""
    return {"images": {image: {key: [ids[c] for c in some if c in ids] for key, some in lists.items()}
                       for image, lists in federated["images"].items()},
            "frequency": {ids[c]: frequency for c, frequency in federated["frequency"].items() if c in ids}}


# ==== 5. Sets whose boxes are not in a file ====


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


# ==== 6. Any set by its name ====


class Splits(NamedTuple):
    """All with the classes of `train`. Two may be one and the same object."""
    train: DetectionSet
    val: DetectionSet
    test: DetectionSet


@dataclass
class _Source:
    """A data set whose splits are not yet read."""
    data: str
    name: str
    layout: Layout
    masks: bool
    exif: str
    flag: str

    def open(self, *splits: str, categories: list[dict] | None = None, rotated: bool = True) -> DetectionSet:
        """The first of these splits that is there, else the whole of a set without splits."""
        parts = self.layout.parts
        split = next((split for split in (*splits, "all") if split in parts), None)
        if split is None:
            raise UserError(f"{self.flag} {self.data}: no labelled set for the {splits[0]} split there "
                            f"({splits[0]}.json, {splits[0]}.txt, {splits[0]}/): its labels, {self.layout.name}, are "
                            f"for {', '.join(parts)} alone. Add it, or give a set that has it.")
        labels = parts[split](self.masks)
        if categories is None and split != "train" and "train" in parts and labels.form == "corners":
            # the classes are those of the train split even where only another one is asked for
            categories = parts["train"](False).categories
        found = _labelled_set(labels, self.name, categories, self.masks, self.exif, rotated)
        found.notes += self.layout.notes
        return found


def _find_source(data: str, data_root: str | None, split: str, masks: bool, exif: str, flag: str = "--data") -> _Source:
    if data in ("coco", "lvis", "voc"):
        return _Source(data, data, named_layout(data, data_root), masks, exif, flag)
    path = Path(data).expanduser()
    if data == "cityscapes" or cityscapes.is_cityscapes(path):
        return _Source(data, path.resolve().name, cityscapes.open_layout(data, data_root), masks, exif, flag)
    if (layout := find_layout(path, data_root)) is None:
        raise UserError(f"{flag} {data}: no labelled set for the {split} split there. {what_is_there(path)}. Looked "
                        f"for {LOOKED_FOR}. Give such a folder, the json or yaml itself, or coco, "
                        "lvis, voc, cityscapes or synthetic.")
    name = path.stem if path.suffix.lower() == ".json" else path.resolve().name
    return _Source(data, name, layout, masks, exif, flag)


def open_detection(data: str, data_root: str | None, split: str, *, categories: list[dict] | None = None,
                   synthetic_images: int = 40, synthetic_size: int = 160, seed: int = 0, masks: bool = False,
                   exif: str = "auto", rotated: bool = True) -> DetectionSet:
    """`data`: coco | lvis | voc | cityscapes | synthetic | a file or folder in one of the layouts of docs/labels.md (of
    one without splits, `split` plays no part). `data_root`: where a named set, or the images of a json, lie; they are
    looked for there alone. `split`: train | val | test; val and test stand in for each other. `categories`: the train
    set's (or a checkpoint's) when opening another. masks: every object must have a segmentation (COCO, Cityscapes,
    polygons of YOLO, synthetic), which DetectionSet.masks() gives. exif: auto | stored | rotated, where boxes lie;
    rotated: what auto takes where no image tells (_choose_frames). Raises UserError for all that is wrong."""
    if data == "synthetic":
        return _open_synthetic("train" if split == "train" else "test", synthetic_images, synthetic_size, seed, masks)
    source = _find_source(data, data_root, split, masks, exif)
    splits = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}[split]
    return source.open(*splits, categories=categories, rotated=rotated)


def open_splits(data: str, data_root: str | None, *, val_data: str | None = None, test_data: str | None = None,
                val_percent: float = 0.0, labels_percent: float = 100.0, synthetic_images: int = 40,
                synthetic_test_images: int = 40, synthetic_size: int = 160, seed: int = 0, masks: bool = False,
                exif: str = "auto", layout: Layout | None = None,
                choose: Callable[[DetectionSet], DetectionSet] | None = None) -> Splits:
    """Training, validation and test set of `data`; see open_detection for the arguments that both have. val_data,
    test_data: another set, of which the split of that name is taken where there is one. labels_percent: the share of
    the training images that counts as labelled (DetectionSet.subset). val_percent: so much of these become the
    validation set (DetectionSet.split). layout: of `data`, where it is known. choose: takes the labelled part of the
    training set (few shots); val_percent then counts images that it leaves. Where one of validation and test is neither
    given nor there, it is the other; where both are not, both are the training set, which is said."""
    if val_percent and val_data:
        raise UserError(f"--val_percent {val_percent:g} and --val_data {val_data} both give the validation set; leave "
                        "one of them out.")
    if not 0 <= val_percent < 100:
        raise UserError(f"--val_percent {val_percent:g}: give at least 0 and less than 100.")
    drawn = {"synthetic_size": synthetic_size, "seed": seed, "masks": masks, "exif": exif}
    if data == "synthetic":
        source, own = None, {"test"}
        train = open_detection(data, None, "train", synthetic_images=synthetic_images, **drawn)
    else:
        source = (_Source(data, data, layout, masks, exif, "--data") if layout else
                  _find_source(data, data_root, "train", masks, exif))
        own = {"val", "test"} & set(source.layout.parts)
        train = source.open("train")
    shared = {"categories": train.categories, "rotated": train.frames[0]}

    def open_own(split: str) -> DetectionSet:
        if source is None:
            return open_detection(data, None, "test", synthetic_images=synthetic_test_images, **drawn)
        return source.open(split, **shared)

    def given(other: str | None, flag: str, *splits: str) -> DetectionSet | None:
        if not other:
            return None
        if other == "synthetic":
            return open_detection(other, None, "test", synthetic_images=synthetic_test_images, **drawn, **shared)
        return _find_source(other, data_root, splits[0], masks, exif, flag).open(*splits, **shared)

    val = given(val_data, "--val_data", "val", "test", "train")
    test = given(test_data, "--test_data", "test", "val", "train")
    whole = train
    if choose:
        train = choose(train)
    if labels_percent < 100:
        train = train.subset(labels_percent, seed)
    if val_percent and choose:
        taken = {record.image for record in train.records}
        rest, val = replace(whole, records=[r for r in whole.records if r.image not in taken]).split(val_percent, seed)
        train.notes.append(rest.notes[-1])
    elif val_percent:
        train, val = train.split(val_percent, seed)
    if val is None and "val" in own:
        val = open_own("val")
        own.discard("val")
    if test is None and own:
        test = open_own("test" if "test" in own else "val")
    elif val is None and own:
        val = open_own("test")
    return _fill_splits(train, val, test, data, whole)


def _fill_splits(train: DetectionSet, val: DetectionSet | None, test: DetectionSet | None, data: str,
                 whole: DetectionSet) -> Splits:
    """whole: the training images before --labels_percent."""
    if val is None and test is None:
        train.notes.append(f"WARNING: {data} has no split: all its {len(whole)} images are validation and test set, "
                           f"{len(train)} of them the training set. Give --val_percent 20, --val_data or --test_data")
        return Splits(train, whole, whole)
    if val is not None and test is not None:
        return Splits(train, val, test)
    if data not in ("coco", "lvis", "voc", "cityscapes", "synthetic"):
        one = test if val is None else val
        one.notes.append("one set is validation and test set: the best checkpoint and the score thresholds are chosen "
                         "on the test images (--val_percent, --val_data or --test_data give another)")
    return Splits(train, test if val is None else val, val if test is None else test)
