"""LVIS v1 (Gupta et al., CVPR 2019, arXiv 1908.03195): federated AP, and how often training sees an image.

An image of LVIS is annotated for some of the 1203 categories only: those with objects in it, and its
`neg_category_ids`, of which it has none. A category in its `not_exhaustive_category_ids` is annotated in part. Ground
truth and detections are those of evaluation.py; the fields of LVIS stand in the ground truth's images and categories.

The package `lvis` (0.5.3) cannot be used: its metrics fail with numpy >= 1.24 (np.float), and it needs matplotlib and
a second OpenCV. Here pycocotools computes overlaps and matches, of the pairs of image and category that count alone:
about 1 % of LVIS's 24 million, each of which COCOeval would visit, for four ranges of area.
"""
from __future__ import annotations

import contextlib
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.cocoeval import COCOeval

from evaluation import Match, check_detections, coco_index, distinct_names, points_and_curves, valid_mean

MAX_DETECTIONS = 300  # of an image
# What finetune.py sets for a federated set, where no flag does. detectron2's LVISv1 recipe, and SoCo's.
PROTOCOL: dict[str, Any] = {"detections_per_image": MAX_DETECTIONS, "score_threshold": 1e-4, "repeat_threshold": 0.001}
FREQUENCIES = ("r", "c", "f")  # rare (1..10 training images), common (11..100), frequent

# ==== 1. Federated AP ====


class _Matches(NamedTuple):
    """Of one image and category, in an area range: the detections, best first, at T thresholds of IoU."""
    scores: np.ndarray  # [D]
    found: np.ndarray  # bool [T, D] matches an object
    counts: np.ndarray  # bool [T, D] is right or wrong, not ignored
    objects: int  # that count


def listed_detections(ground_truth: dict, detections: list[dict], max_dets: int = MAX_DETECTIONS) -> list[dict]:
    """The detections that are evaluated: of the `max_dets` best of an image (equal scores: the first ones), those of
    categories that it has an object of or is verified to have none of."""
    listed = {i["id"]: set(i.get("neg_category_ids") or ()) for i in ground_truth["images"]}
    for a in ground_truth["annotations"]:
        if a["image_id"] in listed:
            listed[a["image_id"]].add(a["category_id"])
    of_image = defaultdict(list)
    for d in detections:
        of_image[d["image_id"]].append(d)
    return [d for image, some in of_image.items() for d in sorted(some, key=lambda d: -d["score"])[:max_dets]
            if d["category_id"] in listed[image]]


class _FederatedEval(COCOeval):
    """COCOeval, of which `each_category` takes the place of evaluate() and accumulate()."""

    def __init__(self, ground_truth: dict, detections: list[dict], iou_type: str, max_dets: int):
        check_detections(ground_truth, detections)
        found = listed_detections(ground_truth, detections, max_dets)
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(*(coco_index(ground_truth, items, False, iou_type)
                               for items in (ground_truth["annotations"], found)), iou_type)
            # no catIds means all; a list would be searched through for each object
            self.params.maxDets, self.params.catIds = [max_dets], []
            self._prepare()
        self.categories = [c["id"] for c in ground_truth["categories"]]

    def each_category(self) -> Iterator[list[list[_Matches]]]:
        """For each category, in their order: in each area range, the matches of its images, in the order of ids."""
        images = defaultdict(list)
        for image, category in sorted(self._gts.keys() | self._dts.keys()):
            images[category].append(image)
        for category, name in enumerate(self.categories, 1):
            areas = [[] for _ in self.params.areaRng]
            self.ious = {(image, category): self.computeIoU(image, category) for image in images[category]}
            for image in images[category]:
                partly = name in (self.cocoGt.imgs[image].get("not_exhaustive_category_ids") or ())
                for matches, area in zip(areas, self.params.areaRng):
                    matches.append(self.matches(image, category, area, partly))
            yield areas

    def matches(self, image: int, category: int, area: list[float], partly: bool) -> _Matches:
        """partly: not all objects of the category are annotated, so that what matches none is not wrong."""
        one = self.evaluateImg(image, category, area, self.params.maxDets[-1])
        found, ignored = one["dtMatches"] > 0, one["dtIgnore"].astype(bool)
        objects = int((np.array(one["gtIgnore"]) == 0).sum())
        return _Matches(np.array(one["dtScores"]), found, ~(ignored | ~found & partly), objects)


def federated_metrics(ground_truth: dict, detections: list[dict], *, iou_type: str = "bbox",
                      max_dets: int = MAX_DETECTIONS, per_class: bool = False) -> dict[str, Any]:
    """LVIS's metrics of boxes, or (iou_type "segm") of masks, as evaluation.detection_metrics: AP, AP50, AP75, APs,
    APm, APl; APr, APc, APf, of the categories of each `frequency`; AR<max_dets>, ARs, ARm, ARl. nan: no category has
    objects of that kind. per_class adds "per_class": {name: AP}. UserError: see check_detections."""
    run = _FederatedEval(ground_truth, detections, iou_type, max_dets)
    thresholds, recalls, categories = run.params.iouThrs, run.params.recThrs, ground_truth["categories"]
    shape = len(categories), len(run.params.areaRng)
    precision = np.full((len(thresholds), len(recalls), *shape), -1.0)  # -1: no object
    recall = np.full((len(thresholds), *shape), -1.0)
    for k, areas in enumerate(run.each_category()):
        for a, matches in enumerate(areas):
            if sum(m.objects for m in matches):
                precision[:, :, k, a], recall[:, k, a] = _precision_recall(matches, recalls)
    metrics = {f"AP{name}": valid_mean(precision[i, ..., 0]) for name, i in (("", slice(None)), (50, 0), (75, 5))}
    metrics |= {f"AP{size}": valid_mean(precision[..., i]) for i, size in enumerate("sml", 1)}
    frequency = np.array([c.get("frequency") for c in categories], dtype=object)
    metrics |= {f"AP{name}": valid_mean(precision[:, :, frequency == name, 0]) for name in FREQUENCIES}
    metrics |= {f"AR{name}": valid_mean(recall[..., i]) for i, name in enumerate((max_dets, *"sml"))}
    if per_class:
        metrics["per_class"] = {name: valid_mean(precision[:, :, k, 0])
                                for k, name in enumerate(distinct_names(categories))}
    return metrics


def _precision_recall(matches: list[_Matches], recalls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> (the highest precision at each of these recalls or above [T, R], the last recall [T])."""
    scores, found, counts = (np.concatenate([m[i] for m in matches], -1) for i in range(3))
    order = np.argsort(-scores, kind="stable")
    true, false = (np.cumsum((hit & counts)[:, order], 1) for hit in (found, ~found))
    recall = true / sum(m.objects for m in matches)
    highest = np.maximum.accumulate((true / np.maximum(true + false, 1))[:, ::-1], 1)[:, ::-1]
    precision = np.zeros((len(found), len(recalls) + 1))
    for row, values, reached in zip(precision, highest, recall):
        # beyond the last recall it is 0
        row[:-1] = np.append(values, 0)[np.searchsorted(reached, recalls)]
    return precision[:, :-1], recall[:, -1] if len(scores) else np.zeros(len(found))


def operating_points(ground_truth: dict, detections: list[dict]) -> tuple[dict[str, Any], dict[str, list[tuple]]]:
    """evaluation.operating_points, of the detections that count in federated_metrics; the curve of "all" alone."""
    run = _FederatedEval(ground_truth, detections, "bbox", MAX_DETECTIONS)
    run.params.iouThrs, run.params.areaRng = np.array([0.5]), [[0, 1e10]]
    matches: dict[str, list[Match]] = {
        name: [(m.scores[m.counts[0]], m.found[0][m.counts[0]], m.objects) for m in of_category]
        for name, (of_category,) in zip(distinct_names(ground_truth["categories"]), run.each_category())}
    points, curves = points_and_curves(matches)
    return points, {name: curve for name, curve in curves.items() if name == "all"}


# ==== 2. Repeat factors ====


def repeat_factors(categories: Sequence[Sequence[int]], threshold: float) -> np.ndarray:
    """How often an epoch shows each image, in the mean [n], from the categories of its objects: the largest over them
    of max(1, sqrt(threshold / share of the images that have the category)) (LVIS, Sec. 6; detectron2)."""
    present = [set(some) for some in categories]
    images = Counter(c for some in present for c in some)
    factor = {c: max(1.0, math.sqrt(threshold * len(present) / count)) for c, count in images.items()}
    return np.array([max((factor[c] for c in some), default=1.0) for some in present])
