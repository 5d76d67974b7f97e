"""Numbers and pictures of predictions: COCO, VOC07 and class-agnostic metrics, their controls, the before/after tables
of the probes, contact sheets.

Detections are COCO results, one dict per box: {"image_id", "category_id", "bbox": [x, y, w, h] in 0-based pixels,
"score"}; with masks also "segmentation", a compressed RLE. Ground truth is a COCO-format dict {"images", "annotations",
"categories"}: the images and categories it lists are evaluated, annotations outside them are left out. Metrics are
fractions 0..1, nan where there is nothing to measure.

A difficult object is an annotation with `difficult` or `ignore` = 1: it is no miss when not found, and no box on it is
a mistake. On VOC, DETReg, SoCo and DUPR print VOC07_*; UP-DETR prints COCO's AP, which differs (101 points, at most 100
boxes per image).
"""
import contextlib
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import area as mask_area
from pycocotools.mask import iou
from torch import Tensor
from torchvision.ops import box_convert

import data
import run
from annotations import DetectionSet, held_out_set, open_detection
from common import UserError, boxes_to_pixels, rank, world_size
from files import printable, save_picture
from proposals import (Generator, Proposals, add_generator_flags, compute_rects, generator_of, image_seed,
                       random_boxes, rects_to_boxes, selective_search)
from run import print_rank0, progress

DEFAULT_THRESHOLD = 0.5  # of scores, where nothing was measured
IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
PALETTE = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#42d4f4", "#f032e6", "#bfef45", "#fabed4", "#9a6bff")
DARK = ("#e6194b", "#4363d8")  # on these a label is white
TILE = 240  # of a contact sheet, pixels: height of an image,
GAP = 8  # space between images,
HEADER = 30  # title line

# ==== 1. COCO ====


class _DifficultEval(COCOeval):
    """COCOeval in which a difficult object is ignored like a crowd region, but overlaps like an object.

    pycocotools overwrites `ignore` from `iscrowd`, and `iscrowd` does two things: any number of detections may match it
    unpunished (wanted for difficult objects) and its overlap becomes intersection / detection area (not wanted). So
    `iscrowd` is the union of both flags, except while overlaps are computed, where it is the annotation's own
    (`crowd`).
    """

    def computeIoU(self, imgId, catId):
        objects = [g for c in ([catId] if self.params.useCats else self.params.catIds) for g in self._gts[imgId, c]]
        for g in objects:
            g["iscrowd"] = g["crowd"]
        ious = super().computeIoU(imgId, catId)
        for g in objects:
            g["iscrowd"] = g["ignore"]
        return ious


def _is_difficult(annotation: dict) -> bool:
    return bool(annotation.get("difficult", 0) or annotation.get("ignore", 0))


def check_detections(ground_truth: dict, detections: list[dict]) -> None:
    """UserError for detections of images that the ground truth lacks, and for boxes or scores that are not finite."""
    known = {image["id"] for image in ground_truth["images"]}
    if unknown := sorted({str(d["image_id"]) for d in detections if d["image_id"] not in known}):
        raise UserError(f"detections for {len(unknown)} image ids that the ground truth lacks, e.g. {unknown[0]}: "
                        "pass the ground truth of the images that were evaluated")
    if detections and not np.isfinite(np.array([[*d["bbox"], d["score"]] for d in detections], dtype=float)).all():
        raise UserError("a detection has a box or score that is not finite: "
                        "the model's outputs are broken (nan in its weights?)")


def distinct_names(categories: list[dict]) -> list[str]:
    """Their names, in order; where one occurs twice, with the id: no two are alike."""
    names = [c["name"] for c in categories]
    longer = [f"{c['name']} (id {c['id']})" for c in categories]
    distinct = [long if names.count(name) > 1 else name for name, long in zip(names, longer)]
    return distinct if len(set(distinct)) == len(distinct) else longer


def coco_index(ground_truth: dict, items: list[dict], class_agnostic: bool, iou_type: str) -> COCO:
    """Objects or detections as an indexed COCO, in copies, without those outside the images and categories of the
    ground truth. All ids are numbers from 1 in here: COCOeval sorts ids, which may be of any kind, and marks
    "unmatched" with 0. Images in the order of their ids, numbers first; categories as they are listed."""
    image_ids = sorted((i["id"] for i in ground_truth["images"]), key=lambda i: (isinstance(i, str), i))
    images = {image_id: i for i, image_id in enumerate(image_ids, 1)}
    categories = {1: 1} if class_agnostic else {c["id"]: i for i, c in enumerate(ground_truth["categories"], 1)}
    annotations = []
    for i, a in enumerate(items, 1):
        category = 1 if class_agnostic else categories.get(a["category_id"])
        if a["image_id"] not in images or category is None:
            continue
        is_detection = "score" in a
        if is_detection and iou_type == "segm":
            area = float(mask_area(a["segmentation"]))
        else:
            area = a["bbox"][2] * a["bbox"][3]
        if not is_detection:
            area = a.get("area", area)
        crowd = int(a.get("iscrowd", 0))
        annotations.append({"id": i, "image_id": images[a["image_id"]], "category_id": category,
                            "bbox": list(a["bbox"]), "area": area, "score": a.get("score"), "crowd": crowd,
                            "iscrowd": int(crowd or _is_difficult(a))})
        if iou_type == "segm":
            annotations[-1]["segmentation"] = a["segmentation"]
    coco = COCO()
    coco.dataset = {"images": [i | {"id": images[i["id"]]} for i in ground_truth["images"]], "annotations": annotations,
                    "categories": [{"id": i} for i in categories.values()]}
    coco.createIndex()
    return coco


def valid_mean(values: np.ndarray) -> float:
    """Mean without pycocotools' -1 (no ground truth of that kind); nan if nothing is left."""
    values = values[values > -1]
    return float(values.mean()) if values.size else math.nan


def detection_metrics(ground_truth: dict, detections: list[dict], *, class_agnostic: bool = False,
                      max_dets: tuple = (1, 10, 100), per_class: bool = False, iou_type: str = "bbox",
                      per_iou: bool = False, groups: dict[str, list] = {}) -> dict[str, float]:
    """COCO metrics of boxes, or (iou_type "segm") of masks, then every item has a "segmentation": AP, AP50, AP75, APs,
    APm, APl, one AR<k> per k of `max_dets`, ARs, ARm, ARl. AP and the size rows use the largest k.

    class_agnostic: all categories are one (DETReg Table 6: COCOeval with useCats = 0). per_class adds "per_class":
    {name: AP}, names as in distinct_names(); per_iou "per_iou": {AP, APs, APm, APl: a value for each of
    IOU_THRESHOLDS}; groups, {prefix: category ids}, the AP rows over these categories alone, as bAP, bAP50, ...
    Ids of images are numbers or strings. A missing `area` is that of the box.
    Inputs are not modified. UserError: see check_detections.
    """
    check_detections(ground_truth, detections)
    categories = [{"id": 1, "name": "object"}] if class_agnostic else ground_truth["categories"]
    with contextlib.redirect_stdout(io.StringIO()):
        objects, found = (coco_index(ground_truth, items, class_agnostic, iou_type)
                          for items in (ground_truth["annotations"], detections))
        coco_eval = _DifficultEval(objects, found, iou_type)
        coco_eval.params.maxDets = sorted(max_dets)
        coco_eval.params.useCats = int(not class_agnostic)
        coco_eval.evaluate()
        coco_eval.accumulate()
    precision = coco_eval.eval["precision"]  # [IoU, recall, class, area, max_dets]
    recall = coco_eval.eval["recall"]  # [IoU, class, area, max_dets]
    metrics = _mean_precisions(precision)
    metrics |= {f"AR{k}": valid_mean(recall[:, :, 0, i]) for i, k in enumerate(sorted(max_dets))}
    metrics |= {f"AR{size}": valid_mean(recall[..., i, -1]) for i, size in enumerate("sml", 1)}
    if per_class:
        metrics["per_class"] = {name: valid_mean(precision[:, :, i, 0, -1])
                                for i, name in enumerate(distinct_names(categories))}
    for prefix, ids in groups.items():
        rows = [i for i, c in enumerate(categories) if c["id"] in ids]
        metrics |= {prefix + name: value for name, value in _mean_precisions(precision[:, :, rows]).items()}
    if per_iou:
        metrics["per_iou"] = {f"AP{size}": [valid_mean(one[..., i, -1]) for one in precision]
                              for i, size in enumerate(("", "s", "m", "l"))}
    return metrics


def _mean_precisions(precision: np.ndarray) -> dict[str, float]:
    """precision: COCOeval's [IoU, recall, class, area, max_dets]."""
    metrics = {f"AP{name}": valid_mean(precision[i, ..., 0, -1]) for name, i in (("", slice(None)), (50, 0), (75, 5))}
    return metrics | {f"AP{size}": valid_mean(precision[..., i, -1]) for i, size in enumerate("sml", 1)}


def operating_points(ground_truth: dict, detections: list[dict]) -> tuple[dict[str, Any], dict[str, list[tuple]]]:
    """Where to cut the scores: -> ({"all": point, "per_class": {name: point}}, {name: curve}), names as in
    distinct_names(), and "all".

    A point is {"threshold", "precision", "recall", "f1"} of the score of best F1 at IoU 0.5 (COCO's matching, at most
    100 detections of an image and class); "all" has one threshold for all classes. A class without objects, or of which
    none is found, has no point. A curve is [(recall, precision), ...] from the highest score down.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        objects, found = (coco_index(ground_truth, items, False, "bbox")
                          for items in (ground_truth["annotations"], detections))
        coco_eval = _DifficultEval(objects, found, "bbox")
        coco_eval.params.iouThrs, coco_eval.params.maxDets = np.array([0.5]), [100]
        coco_eval.params.areaRng, coco_eval.params.areaRngLbl = [[0, 1e10]], ["all"]
        coco_eval.evaluate()
    names = distinct_names(ground_truth["categories"])
    matches: dict[str, list[Match]] = {name: [] for name in names}
    for image in filter(None, coco_eval.evalImgs):
        counts = ~image["dtIgnore"][0].astype(bool)
        matches[names[image["category_id"] - 1]].append((
            np.array(image["dtScores"])[counts], (image["dtMatches"][0] > 0)[counts],
            int((np.array(image["gtIgnore"]) == 0).sum())))
    return points_and_curves(matches)


# Of the detections of a class in an image that count: scores [n], whether they match an object [n]; how many objects.
Match = tuple[np.ndarray, np.ndarray, int]


def points_and_curves(matches: dict[str, list[Match]]) -> tuple[dict[str, Any], dict[str, list[tuple]]]:
    """operating_points, of the matches of each class at IoU 0.5."""
    parts = {"all": [part for some in matches.values() for part in some]} | matches
    points, curves = {}, {}
    for name, some in parts.items():
        if sum(part[2] for part in some):
            points[name], curves[name] = _best_f1(some)
    empty = {"threshold": DEFAULT_THRESHOLD, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    return {"all": points.pop("all", None) or empty, "per_class": {k: v for k, v in points.items() if v}}, curves


def _best_f1(parts: list[Match]) -> tuple[dict[str, float] | None, list[tuple[float, float]]]:
    """Of the matches of images -> the point of best F1 (None: nothing is found) and the curve. The threshold lies
    half-way to the next score below: rounding elsewhere does not cross it."""
    scores, hits = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
    objects = sum(part[2] for part in parts)
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(hits[order])
    last = np.flatnonzero(np.append(scores[1:] < scores[:-1], len(scores) > 0))  # of equal scores
    precision, recall = hits[last] / (last + 1), hits[last] / objects
    curve = list(zip(recall.tolist(), precision.tolist()))
    if not len(scores) or not hits[-1]:
        return None, curve
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1.argmax())
    below = scores[last[best] + 1] if last[best] + 1 < len(scores) else scores[last[best]]
    return {"threshold": float((scores[last[best]] + below) / 2), "precision": float(precision[best]),
            "recall": float(recall[best]), "f1": float(f1[best])}, curve


def class_thresholds(points: dict[str, Any], names: list[str]) -> list[float]:
    """The score threshold of each class, of operating_points: a class without one has that of all classes. What is no
    threshold, in a checkpoint of others, is taken as DEFAULT_THRESHOLD."""
    def value(point: Any, otherwise: float) -> float:
        number = point.get("threshold") if isinstance(point, dict) else None
        return float(number) if isinstance(number, (int, float)) and math.isfinite(number) else otherwise

    of_all = value(points.get("all"), DEFAULT_THRESHOLD)
    return [value((points.get("per_class") or {}).get(name), of_all) for name in names]


def above_thresholds(detections: list[dict], points: dict[str, Any], categories: list[dict]) -> list[dict]:
    """The detections whose score reaches the threshold of their class."""
    least = dict(zip((c["id"] for c in categories), class_thresholds(points, distinct_names(categories))))
    return [d for d in detections if d["score"] >= least[d["category_id"]]]


def count_difficult(ground_truth: dict) -> dict:
    """A copy in which difficult objects are ordinary ones (UP-DETR, Table 1; Siamese DETR, Table 2)."""
    plain = [{k: v for k, v in a.items() if k not in ("difficult", "ignore")} for a in ground_truth["annotations"]]
    return ground_truth | {"annotations": plain}


# ==== 2. VOC07 ====


def _voc07_class_ap(objects: list[dict], boxes: list[dict], thresholds: tuple, rounded: bool) -> list[float]:
    """11-point AP of one class at every threshold. nan if the class has no object that counts."""
    difficult = np.array([_is_difficult(a) or bool(a.get("iscrowd", 0)) for a in objects], dtype=bool)
    positives = int((~difficult).sum())
    if positives == 0:
        return [math.nan] * len(thresholds)
    scores = np.array([d["score"] for d in boxes], dtype=float)
    boxes_xywh = np.array([d["bbox"] for d in boxes], dtype=float).reshape(-1, 4)
    if rounded:
        scores = scores.round(3)
        corners = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1).round(1)
        boxes_xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    objects_xywh = np.array([a["bbox"] for a in objects], dtype=float)
    of_image = defaultdict(list)
    for j, a in enumerate(objects):
        of_image[a["image_id"]].append(j)
    # per detection, best score first: the object it overlaps most, taken or not
    best = np.full(len(boxes), -1)
    overlap = np.zeros(len(boxes))
    for place, i in enumerate(np.argsort(-scores, kind="stable")):
        if theirs := of_image.get(boxes[i]["image_id"]):
            ious = iou(boxes_xywh[i:i + 1], objects_xywh[theirs], [0] * len(theirs))[0]
            best[place], overlap[place] = theirs[ious.argmax()], ious.max()
    results = []
    for threshold in thresholds:
        hit = np.flatnonzero(overlap > threshold)
        # the first detection of an object finds it, later ones are mistakes
        first = np.unique(best[hit], return_index=True)[1]
        true = np.zeros(len(boxes), dtype=bool)
        true[hit[first]] = True
        counts = np.ones(len(boxes), dtype=bool)
        counts[hit] = ~difficult[best[hit]]
        found, seen = np.cumsum(true & counts), np.cumsum(counts)
        precision, recall = found / np.maximum(seen, 1), found / positives
        results.append(float(np.mean([precision[recall >= i / 10].max(initial=0.0) for i in range(11)])))
    return results


def voc07_metrics(ground_truth: dict, detections: list[dict], thresholds: tuple = IOU_THRESHOLDS, *,
                  rounded: bool = False) -> dict[str, float]:
    """The VOC 2007 metric: 11-point AP, mean over the classes that have an object that counts; VOC07_AP is the mean
    over `thresholds`.

    A detection looks at the object of its class and image with the largest IoU, and finds it if IoU > threshold
    (strictly) and no better-scored one has: otherwise it is a mistake. Equal scores keep the order given. Crowd objects
    are taken as difficult ones. Recall is compared with exact tenths; the released np.arange(0, 1.1, .1) holds
    0.30000000000000004 and misses a recall of exactly .3.

    IoU: the devkit's sides are x2 - x1 + 1 between inclusive 1-based corners, which detectron2 and DETReg write as
    (x + 1, y + 1, x + w, y + h), the inverse of loading (xmin - 1, ymin - 1, xmax, ymax). The offsets cancel: it IS the
    plain IoU of the 0-based xywh boxes. rounded: scores to 3 decimals and corners to 1, as the released DETReg and
    detectron2 write them to text (this makes ties).
    """
    check_detections(ground_truth, detections)
    images = {image["id"] for image in ground_truth["images"]}
    objects, boxes = defaultdict(list), defaultdict(list)
    for a in ground_truth["annotations"]:
        if a["image_id"] in images:
            objects[a["category_id"]].append(a)
    for d in detections:
        boxes[d["category_id"]].append(d)
    per_class = np.array([_voc07_class_ap(objects[c["id"]], boxes[c["id"]], (*thresholds, 0.5, 0.75), rounded)
                          for c in ground_truth["categories"]]).reshape(-1, len(thresholds) + 2)
    means = [valid_mean(np.nan_to_num(column, nan=-1)) for column in per_class.T]
    return {"VOC07_AP": float(np.mean(means[:-2])), "VOC07_AP50": means[-2], "VOC07_AP75": means[-1]}


# ==== 3. Detections and their control ====


def class_agnostic_scores(logits: Tensor, boxes_xyxy: Tensor, object_class: int = 1) -> tuple[Tensor, Tensor]:
    """DETReg Table 6 (coco_eval_proposals.py, process_loaded): the score is the LOGIT of `object_class`, boxes are
    clamped at 0 only.

    logits [Q, C], boxes_xyxy [Q, 4] pixels -> scores [Q] descending, boxes_xywh [Q, 4] in the same order.
    """
    if not 0 <= object_class < logits.shape[1]:
        raise UserError(f"object_class {object_class} is not one of the {logits.shape[1]} outputs of the classifier")
    scores, order = logits[:, object_class].sort(descending=True, stable=True)
    return scores, box_convert(boxes_xyxy[order].clamp(min=0), "xyxy", "xywh")


def class_agnostic_detections(logits: Tensor, boxes_xyxy: Tensor, image_id: int | str, *, object_class: int = 1,
                              top: int | None = None, probability: Tensor | None = None) -> list[dict]:
    """The `top` (None: all) best detections of one image, category_id 1. Shapes: see class_agnostic_scores.

    probability: [Q], what pictures show as the "probability" of a detection rather than its score, the logit.
    """
    logits = logits.detach()
    scores, boxes_xywh = class_agnostic_scores(logits, boxes_xyxy.detach(), object_class)
    found = [{"image_id": image_id, "category_id": 1, "bbox": box, "score": score}
             for box, score in zip(boxes_xywh[:top].tolist(), scores[:top].tolist())]
    if probability is not None:
        order = logits[:, object_class].sort(descending=True, stable=True).indices
        found = [d | {"probability": p} for d, p in zip(found, probability[order].tolist())]
    return found


def boxes_as_detections(boxes_xyxy, image_id: int | str, scores=None, category_id: int = 1) -> list[dict]:
    """Boxes [n, 4] px, best first, as detections. scores None: 1, 1/2, 1/3, ..., so that over all images the first
    boxes come first.

    The released selective search baseline scores every box 1 (pass ones): the same AR, but AP then depends on the order
    of the images.
    """
    boxes_xywh = box_convert(torch.as_tensor(boxes_xyxy, dtype=torch.float64).reshape(-1, 4), "xyxy", "xywh").tolist()
    if scores is None:
        scores = [1 / (i + 1) for i in range(len(boxes_xywh))]
    else:
        scores = torch.as_tensor(scores, dtype=torch.float64).tolist()
    if len(scores) != len(boxes_xywh):
        raise UserError(f"image {image_id}: {len(scores)} scores for {len(boxes_xywh)} boxes")
    return [{"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for box, score in zip(boxes_xywh, scores)]


def matched_errors(matcher: Any, logits: Tensor, boxes_xyxy: Tensor, target: dict, label_map: list[int]) -> list[float]:
    """Of the objects of one image, each with the query that is matched to it: [objects, those whose query has another
    class, sum of the L1 distances between their boxes (cxcywh in 0..1)]. Crowds and difficult objects are left out.

    matcher: common.HungarianMatcher; logits [Q, C], boxes_xyxy [Q, 4] px; target: DetectionSet.load's; label_map: the
    label of each row of the head, -1 for none.
    """
    row_of = {label: row for row, label in enumerate(label_map) if label >= 0}
    chosen = [i for i, label in enumerate(target["labels"].tolist()) if label in row_of and not target["ignore"][i]]
    if not chosen:
        return [0, 0, 0]
    hw = tuple(target["orig_size"].tolist())
    rows = torch.tensor([row_of[label] for label in target["labels"][chosen].tolist()])
    found, true = (data.normalized_cxcywh(boxes, hw) for boxes in (boxes_xyxy.float(), target["boxes_xyxy"][chosen]))
    outputs = {"pred_logits": logits.float()[None], "pred_boxes": found[None]}
    queries, objects = matcher([outputs], [{"labels": rows, "boxes": true}])[0][0]
    wrong = logits[queries].argmax(-1) != rows[objects]
    return [len(queries), int(wrong.sum()), float((found[queries] - true[objects]).abs().sum())]


def mean_errors(errors: list[list[float]]) -> dict[str, float]:
    """DETReg's Table 5, of matched_errors of all images: class_error in percent, box_error the mean L1 distance of a
    box. Empty where there are no objects. Released: means over batches."""
    objects, wrong, distance = np.sum(errors, 0) if errors else (0, 0, 0)
    return {"class_error": 100 * float(wrong / objects), "box_error": float(distance / objects)} if objects else {}


def shuffled(detections: list[dict], image_ids: list, sizes: dict) -> list[dict]:
    """The control that knows the images' statistics but not the image: the detections of image i, scored on image
    i + 1 (cyclic).

    image_ids: all evaluated images, each once, at least 2, so that none keeps its own. sizes: id -> (h, w) px; boxes
    are rescaled.
    """
    image_ids = list(image_ids)
    if len(image_ids) < 2 or len(set(image_ids)) < len(image_ids):
        raise UserError(f"the shuffled control needs 2 or more images, each once; got {len(image_ids)}, "
                        f"{len(set(image_ids))} different")
    following = dict(zip(image_ids, image_ids[1:] + image_ids[:1]))
    if missing := {d["image_id"] for d in detections} - following.keys() | following.keys() - sizes.keys():
        raise UserError(f"the shuffled control lacks the id or size of {len(missing)} images, e.g. "
                        f"{min(map(str, missing))}")

    def move(d: dict) -> dict:
        (h, w), (new_h, new_w) = sizes[d["image_id"]], sizes[following[d["image_id"]]]
        return {**d, "image_id": following[d["image_id"]],
                "bbox": [v * s for v, s in zip(d["bbox"], (new_w / w, new_h / h) * 2)]}

    return [move(d) for d in detections]


# ==== 4. Processes: each evaluates its slice of the images ====


def rank_slice(n: int) -> range:
    """The images of 0..n-1 that this process evaluates: each once over all processes, and gather() keeps the order."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


def gather(items: list) -> list:
    """All processes' lists, of any lengths, concatenated in rank order, on every process. Items are pickled: keep them
    plain."""
    parts = [items] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def evaluation_view(image: Image.Image, size: int, max_size: int) -> Tensor:
    """What a detector sees of a picture when it is not trained: [3, h, w], the short side `size` px, but the longest at
    most max_size."""
    height, width = data.resized_hw((image.height, image.width), size, max_size)
    return data.to_normalized_tensor(image.resize((width, height), Image.Resampling.BILINEAR))


class _Resized(torch.utils.data.Dataset):
    """The images of a labelled set at evaluation size, as samples for data.collate. An unreadable image is an error."""

    def __init__(self, labelled, indices: range, size: int, max_size: int):
        self.labelled, self.indices, self.size, self.max_size = labelled, indices, size, max_size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict:
        image, target = self.labelled.load(self.indices[i])
        return {"image": evaluation_view(image, self.size, self.max_size), "target": target, "skipped": []}


def each_batch(model: torch.nn.Module, labelled, *, size: int, max_size: int, batch_size: int = 8,
               limit: int | None = None, num_workers: int = 0, text: str = "") -> Iterator[dict]:
    """data.collate's batches of this process's slice of a labelled set, at evaluation size; meanwhile the model is in
    eval mode. See predict()."""
    indices = rank_slice(min(len(labelled), limit or len(labelled)))
    keys = [list(range(i, min(i + batch_size, len(indices)))) for i in range(0, len(indices), batch_size)]
    loader = data.make_loader(_Resized(labelled, indices, size, max_size), keys, num_workers=num_workers,
                              collate=data.collate)
    training = model.training
    model.eval()
    yield from progress(loader, desc=text)
    model.train(training)


@torch.no_grad()
def predict(model: torch.nn.Module, labelled, *, size: int, max_size: int, device: torch.device, batch_size: int = 8,
            limit: int | None = None, num_workers: int = 0, text: str = "") -> Iterator[tuple[dict, Tensor, Tensor]]:
    """Run a detector (in eval mode) over this process's slice of a labelled set: yields (target, logits [Q, C],
    boxes_xyxy [Q, 4] in pixels of the original image), on CPU.

    size, max_size: short and longest side the images are resized to; limit: only the first images of the set; text: of
    the progress bar.
    """
    for batch in each_batch(model, labelled, size=size, max_size=max_size, batch_size=batch_size, limit=limit,
                            num_workers=num_workers, text=text):
        outputs = model(batch["images"].to(device), batch["mask"].to(device))
        sizes = torch.stack([t["orig_size"] for t in batch["targets"]])
        boxes = boxes_to_pixels(outputs["pred_boxes"].cpu(), sizes)
        yield from zip(batch["targets"], outputs["pred_logits"].cpu(), boxes)


def probe_batches(probe_set, num_workers: int, text: str = "", size: int = 8, collate=data.collate) -> Iterator[dict]:
    """This process's share of a probe's batches, of 2 to size + 1 samples (keys (0, i)): the shuffled control needs two
    images. The batches are the same for any number of processes, and so is what is compared with what. Names files that
    it had to leave out."""
    keys = [[(0, i) for i in range(k, min(k + size, len(probe_set)))] for k in range(0, len(probe_set), size)]
    if len(keys) > 1 and len(keys[-1]) == 1:
        keys[-2:] = [keys[-2] + keys[-1]]
    keys = [keys[i] for i in rank_slice(len(keys))]
    num_workers = 0 if isinstance(probe_set, KeptSamples) else num_workers
    for batch in progress(data.make_loader(probe_set, keys, num_workers=num_workers, collate=collate), desc=text):
        for entry in batch["skipped"]:
            print_rank0(f"warning: left out of the probe: {entry}")
        yield batch


class KeptSamples(torch.utils.data.Dataset):
    """The samples of a probe, each made once and kept in memory: --probe_every asks for them again and again."""

    def __init__(self, probe_set):
        self.probe_set, self.kept = probe_set, {}

    def __len__(self) -> int:
        return len(self.probe_set)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        if key not in self.kept:
            self.kept[key] = self.probe_set[key]
        return self.kept[key]


# ==== 5. Probe: what a pretraining has learned, before and after ====


def most_confident(logits: Tensor, boxes: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best box of each group of consecutive queries (UP-DETR, Fig. 5): softmax without "no object", the last class.

    logits [B, Q, C], boxes [B, Q, 4] -> scores [B, groups], boxes [B, groups, 4], query indices [B, groups]; on CPU.
    """
    scores = logits.detach().cpu().softmax(-1)[..., :-1].max(-1).values.unflatten(1, (groups, -1))
    best, place = scores.max(-1)
    index = place + torch.arange(groups, device=place.device) * scores.shape[-1]
    return best, boxes.detach().cpu().gather(1, index[..., None].expand(-1, -1, 4)), index


def localization_metrics(rows: list[dict]) -> dict[str, float]:
    """Rows with "true" and "found" boxes [n, 4] cxcywh -> their mean IoU, and the share of IoUs >= 0.5."""
    true, found = (box_convert(torch.cat([torch.tensor(row[k]).reshape(-1, 4) for row in rows]), "cxcywh", "xyxy")
                   for k in ("true", "found"))
    sides = torch.minimum(true[:, 2:], found[:, 2:]) - torch.maximum(true[:, :2], found[:, :2])
    overlap = sides.clamp(min=0).prod(1)
    ious = overlap / ((true[:, 2:] - true[:, :2]).prod(1) + (found[:, 2:] - found[:, :2]).prod(1) - overlap)
    return {"IoU": float(ious.mean()), "recall50": float((ious >= 0.5).float().mean())}


def before_and_after(find: Callable[..., list[dict]], untrained: torch.nn.Module, pretrained: torch.nn.Module
                     ) -> dict[str, list[dict]]:
    """What find(model, other=..., text=...) finds, as rows of a probe's table: "untrained", "shuffled" (asked with the
    question of another image) and "pretrained"."""
    return {"untrained": find(untrained, text="untrained"),
            "shuffled": find(pretrained, other=True, text="shuffled"),
            "pretrained": find(pretrained, text="pretrained")}


def localization_table(rows: dict[str, list[dict]], random_boxes: Callable[[int, dict], Tensor]) -> dict[str, Any]:
    """localization_metrics of before_and_after, whose rows also hold the boxes "asked" for, and of two more controls.

    random_boxes(i, row) -> cxcywh, as many as were asked for. wrong_image: the predictions of `shuffled`, scored on the
    boxes that were asked for: what the question tells by itself, without the image that its answer lies in.
    """
    drawn = [{"true": row["true"], "found": random_boxes(i, row).tolist()} for i, row in enumerate(rows["pretrained"])]
    table = {"untrained": rows["untrained"], "random_boxes": drawn, "shuffled": rows["shuffled"],
             "wrong_image": on_asked_boxes(rows["shuffled"]), "pretrained": rows["pretrained"]}
    return {name: localization_metrics(found) for name, found in table.items()} | {"primary": "IoU"}


def on_asked_boxes(rows: list[dict]) -> list[dict]:
    return [{**row, "true": row["asked"]} for row in rows]


def probe_line(rows: dict[str, dict[str, float]], *names: str) -> dict[str, float]:
    """What --probe_every logs, of rows of a probe's table: "probe_NAME" of `pretrained`, "probe_NAME_ROW" of controls,
    and "looking": how much better the first of the names is than in the best control. With the row wrong_image that is
    what neither the question nor the image tells by itself."""
    controls = [row[names[0]] for name, row in rows.items() if name != "pretrained"]
    line = {"looking": rows["pretrained"][names[0]] - max(controls)}
    return line | {f"probe_{name}" + f"_{row}" * (row != "pretrained"): metrics[name]
                   for name in names for row, metrics in rows.items()}


def localization_line(find: Callable[..., list[dict]], model: torch.nn.Module) -> dict[str, float]:
    """probe_line of what find(model, other=..., text=...) finds; see localization_table."""
    right, other = find(model, text="probe"), find(model, other=True, text="probe")
    rows = {"pretrained": right, "wrong_image": on_asked_boxes(other), "shuffled": other}
    return probe_line({name: localization_metrics(found) for name, found in rows.items()}, "IoU", "recall50")


def retrieval_line(find: Callable[..., list[dict]], metrics_of: Callable[[list[dict]], dict], names: tuple[str, ...],
                   model: torch.nn.Module) -> dict[str, float]:
    """probe_line of metrics_of what find(model, other=..., text=...) finds."""
    rows = {"pretrained": find(model, text="probe"), "shuffled": find(model, other=True, text="probe")}
    return probe_line({name: metrics_of(found) for name, found in rows.items()}, *names)


def open_class_agnostic_probe(cfg: Any, source: Any, held_out: np.ndarray) -> DetectionSet | None:
    """What a pretraining's boxes are scored on: the labelled set of --probe_data, unseen synthetic scenes, or held-out
    images with their own proposals. cfg: DETReg's."""
    if cfg.probe_data:
        # --data_root is that of --data where this is a named set; a file or folder of the probe has its own
        named = ("imagenet", "imagenet100", "coco", "coco_unlabeled", "voc")
        other = cfg.data in named and cfg.probe_data not in ("coco", "lvis", "voc")
        root = None if other else cfg.data_root
        labelled = open_detection(cfg.probe_data, root, "test", seed=cfg.seed, exif=cfg.exif)
        labelled.print_notes()
        return labelled
    if not cfg.probe_images:
        return None
    if cfg.data == "synthetic":
        return open_detection("synthetic", None, "test", synthetic_images=cfg.probe_images,
                              synthetic_size=cfg.synthetic_size, seed=cfg.seed)
    generator = Proposals(cfg).generator
    return held_out_set(source, held_out.tolist(), lambda image, i: generator(
        image, image_seed(cfg.seed, source.key(i)))[:cfg.max_prop])


def is_held_out(labelled: DetectionSet) -> bool:
    """Did nobody draw these boxes (annotations.held_out_set)?"""
    return labelled.categories == [{"id": 1, "name": "proposal"}]


def probe_truth(cfg: Any, labelled: DetectionSet) -> dict:
    """The ground truth of the first cfg.probe_images (0: all) of a labelled set."""
    ids = set(labelled.image_ids[:cfg.probe_images or len(labelled)])
    truth = labelled.coco_ground_truth()
    return truth | {"images": [i for i in truth["images"] if i["id"] in ids]}


def detect_objects(cfg: Any, model: torch.nn.Module, labelled: DetectionSet, device: torch.device, text: str
                   ) -> list[dict]:
    """The 100 best class-agnostic boxes of each image of a DETReg's probe. All processes call it and get all."""
    found = []
    count = cfg.probe_images or len(labelled)
    for target, logits, boxes_xyxy in predict(model, labelled, size=max(cfg.scales), max_size=cfg.max_size,
                                              device=device, limit=count, num_workers=cfg.num_workers, text=text):
        probability = (logits.softmax(-1) if cfg.detector == "detr" else logits.sigmoid())[:, 1]
        found += class_agnostic_detections(logits, boxes_xyxy, target["image_id"], top=100, probability=probability)
    return gather(found)


def on_next_image(detections: list[dict], truth: dict) -> list[dict]:
    """`shuffled` among the images of a ground truth."""
    sizes = {i["id"]: (i["height"], i["width"]) for i in truth["images"]}
    return shuffled(detections, list(sizes), sizes)


def class_agnostic_line(cfg: Any, labelled: DetectionSet, device: torch.device, model: torch.nn.Module
                        ) -> dict[str, float]:
    """probe_line of an image's own boxes and another image's, on rank 0; all processes call it. cfg: DETReg's."""
    truth, found = probe_truth(cfg, labelled), detect_objects(cfg, model, labelled, device, "probe")
    if rank() != 0:
        return {}
    rows = {"pretrained": found, "shuffled": on_next_image(found, truth)}
    return probe_line({name: detection_metrics(truth, some, class_agnostic=True) for name, some in rows.items()},
                      "AR10", "AR100", "AP")


def class_agnostic_table(cfg: Any, untrained: torch.nn.Module, pretrained: torch.nn.Module, train_set: Any,
                         labelled: DetectionSet, device: torch.device) -> tuple[dict[str, Any], list[dict]]:
    """Class-agnostic AP and AR (DETReg, Table 6) of a pretrained detector and of four controls on the first
    cfg.probe_images of a labelled set, and its detections. All processes call it; rank 0 alone gets a table.

    cfg: DETReg's. random_boxes have the sizes of train_set's proposals. selective_search is left out where the ground
    truth is its own.
    """
    truth = probe_truth(cfg, labelled)
    count = len(truth["images"])

    pool = relative_sizes(train_set, cfg.seed)
    searched, drawn = [], []
    of_itself = is_held_out(labelled) and cfg.proposal_method == "selective_search"
    for i in progress(rank_slice(count), desc="random boxes" if of_itself else "selective search"):
        image, target = labelled.load(i)
        if not of_itself:
            boxes = selective_search(np.asarray(image), seed=image_seed(cfg.seed, "probe", i))[:100]
            searched += boxes_as_detections(boxes, target["image_id"])
        boxes = random_boxes(np.random.default_rng([cfg.seed, i]), (image.height, image.width), 100, pool)
        drawn += boxes_as_detections(boxes, target["image_id"])
    found = {"untrained": detect_objects(cfg, untrained, labelled, device, "untrained"), "random_boxes": gather(drawn),
             "shuffled": [], "selective_search": gather(searched),
             "pretrained": detect_objects(cfg, pretrained, labelled, device, "pretrained")}
    found["shuffled"] = on_next_image(found["pretrained"], truth)
    if of_itself:
        del found["selective_search"]
    if rank() != 0:
        return {}, []
    table = {name: detection_metrics(truth, some, class_agnostic=True) for name, some in found.items()}
    drawn_by = "held-out proposals" if is_held_out(labelled) else "annotations"
    return table | {"primary": "AR100", "ground_truth": drawn_by}, found["pretrained"]


def relative_sizes(train_set: Any, seed: int) -> np.ndarray:
    """[m, 2] sides of the proposals of up to 50 training images, as shares of the image."""
    rng = np.random.default_rng(seed)
    sizes = []
    for i in rng.choice(train_set.indices, min(50, len(train_set)), replace=False):
        image, i = data.load_usable(train_set.source, int(i), rng, [], train_set.indices)
        boxes = train_set.propose(image, i, 0, rng)
        sizes.append((boxes[:, 2:] - boxes[:, :2]) / np.float32([image.width, image.height]))
    return np.concatenate(sizes)


def probe_table(metrics: dict, columns: list[str], title: str) -> str:
    """The before/after table of metrics.json, or one line when there was no probe."""
    rows = {name: row for name, row in metrics.items() if isinstance(row, dict)}
    if not rows:
        return (f"finished after {metrics['steps']} steps (no probe: give --probe_images N, "
                "and --probe_data for other images)")
    return metrics_table(rows, columns, title=f"{title}primary: {metrics['primary']})")


def metrics_table(rows: dict[str, dict], columns: list[str], title: str = "") -> str:
    """Aligned text under the line `title`: fractions with 3 decimals (as COCO logs), nan and missing as "-", integers
    and text as they are."""
    def cell(value: Any) -> str:
        if value is None or value != value:
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [["", *columns]] + [[name, *(cell(values.get(c)) for c in columns)] for name, values in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
             for line in cells]
    return "\n".join([title, *lines] if title else lines)


# ==== 6. Pictures ====


def draw_boxes(picture: Image.Image, boxes_xyxy, labels: list[str] | None, colours: list[str], *, line: int = 2,
               size: int = 11) -> None:
    """Draw boxes [n, 4] px and their labels into an RGB picture; the first lies on top. line: width of a line, px;
    size: of the font, px."""
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size)
    boxes = torch.as_tensor(boxes_xyxy).detach().cpu().double().reshape(-1, 4).nan_to_num().round().tolist()
    limits = (picture.width - 1, picture.height - 1) * 2
    corners = [[int(min(max(v, 0), limit)) for v, limit in zip(box, limits)] for box in boxes]
    ranked = [(i, colours[i], *box) for i, box in enumerate(corners) if box[2] > box[0] and box[3] > box[1]][::-1]
    edge = max(1, line // 2)
    for _, colour, x1, y1, x2, y2 in ranked:
        # a dark edge on both sides keeps the colour apart from the picture
        draw.rectangle([x1, y1, x2, y2], outline="black", width=line + 2 * edge)
        draw.rectangle([x1 + edge, y1 + edge, max(x2 - edge, x1 + edge), max(y2 - edge, y1 + edge)], outline=colour,
                       width=line)
    h, margin = round(size * 14 / 11), round(size * 3 / 11)
    for i, colour, x1, y1, *_ in ranked if labels is not None else ():  # after all boxes, so that none crosses a label
        text = printable(labels[i])
        w = math.ceil(draw.textlength(text, font)) + 2 * margin - 1
        x = max(0, min(x1, picture.width - w))
        y = y1 - h + 1 if y1 >= h else y1  # above the box if there is room
        draw.rectangle([x, y, x + w - 1, y + h - 1], fill=colour)
        draw.text((x + margin, y + h / 2), text, "white" if colour in DARK else "black", font, anchor="lm")


def draw_mask(picture: Image.Image, mask: np.ndarray, colour: str) -> None:
    """Lay a colour half-transparent over the pixels of `mask`, bool [h, w], of an RGB picture."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if len(rows):
        part = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        picture.paste(colour, (int(columns[0]), int(rows[0])), Image.fromarray(part * np.uint8(128)))


def _tile(image: Image.Image, boxes_xyxy, labels: list[str] | None, max_boxes: int) -> Image.Image:
    """The image at height TILE (at most 2 TILE wide) with its first `max_boxes` boxes; the first lies on top."""
    scale = min(TILE / image.height, 2 * TILE / image.width)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    tile = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    boxes = torch.as_tensor(boxes_xyxy).detach().cpu().double().reshape(-1, 4)[:max_boxes] * scale
    draw_boxes(tile, boxes, labels, [PALETTE[i % len(PALETTE)] for i in range(len(boxes))])
    return tile


def draw_boxes_figure(path, images: list, columns: dict[str, list], max_boxes: int = 10) -> None:
    """PNG contact sheet: one row per image, one column per entry of `columns`, its key as the title.

    images: PIL images. columns: title -> one (boxes_xyxy [n, 4] px of that image, labels of length n or None, and, if
    the column shows another picture than its row's, that PIL image) per image; the first `max_boxes` are drawn, boxes
    of equal rank in equal colours across columns.
    """
    if not images or any(len(entries) != len(images) for entries in columns.values()):
        raise UserError(f"a figure needs images and as many entries per column: {len(images)} images, "
                        f"columns {({title: len(entries) for title, entries in columns.items()})}")
    font = ImageFont.load_default(16)
    tiles = [[_tile((*entries[i], image)[2], *entries[i][:2], max_boxes) for entries in columns.values()]
             for i, image in enumerate(images)]
    widths = [max(math.ceil(font.getlength(title)), *(tile.width for tile in column))
              for title, column in zip(columns, zip(*tiles))]
    width = sum(widths) + GAP * (len(widths) + 1)
    height = HEADER + sum(row[0].height + GAP for row in tiles)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    x = GAP
    for c, (title, w) in enumerate(zip(columns, widths)):
        draw.text((x + w / 2, HEADER / 2), title, "black", font, anchor="mm")
        y = HEADER
        for row in tiles:
            sheet.paste(row[c], (x + (w - row[c].width) // 2, y))
            y += row[c].height + GAP
        x += w + GAP
    save_picture(sheet, path)


def to_image(tensor: Tensor) -> Image.Image:
    """data.to_normalized_tensor undone: [3, h, w] -> PIL."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    return Image.fromarray(((tensor * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def draw_rows(path, titles: tuple[str, ...], rows: list[list[tuple]], max_boxes: int = 10) -> None:
    """draw_boxes_figure by rows: a cell is (PIL image, boxes_xyxy px of it, labels or None). Nothing without rows."""
    if rows:
        columns = {title: [(boxes, labels, image) for image, boxes, labels in cells]
                   for title, cells in zip(titles, zip(*rows))}
        draw_boxes_figure(path, [row[0][0] for row in rows], columns, max_boxes)


def draw_localization(path, source, rows: list[dict], titles: tuple[str, str]) -> None:
    """What was asked for beside what was found, in equal colours.

    rows: {"index" in source, "true" and "found" cxcywh, "score"}.
    """
    cells = []
    for row in rows:
        image = source.load(row["index"])
        scale = torch.tensor([image.width, image.height] * 2)
        true, found = (box_convert(torch.tensor(row[k]), "cxcywh", "xyxy") * scale for k in ("true", "found"))
        cells.append([(image, true, None), (image, found, [f"{s:.2f}" for s in row["score"]])])
    draw_rows(path, titles, cells)


def draw_detections(path, labelled: DetectionSet, columns: dict[str, list[dict]], names: dict[int, str] = {},
                    rows: int = 6, best: int = 10) -> None:
    """The first images of a labelled set, a column per title: all of its annotations (at most 30 of an image), or the
    `best` of the detections with their probability or else score. names: category id -> name, drawn where it is there.
    """
    def label(d: dict) -> str:
        score = f"{d.get('probability', d['score']):.2f}" if "score" in d else ""
        return f"{names.get(d['category_id'], '')} {score}".strip()

    cells = []
    for i in range(min(rows, len(labelled))):
        image, target = labelled.load(i)
        row = []
        for items in columns.values():
            mine = [d for d in items if d["image_id"] == target["image_id"]]
            if mine and "score" in mine[0]:
                mine = sorted(mine, key=lambda d: -d["score"])[:best]
            boxes = box_convert(torch.tensor([d["bbox"] for d in mine]).reshape(-1, 4), "xywh", "xyxy")
            labels = list(map(label, mine))
            row.append((image, boxes, labels if any(labels) else None))
        cells.append(row)
    draw_rows(path, tuple(columns), cells, max_boxes=30)


def draw_class_agnostic(cfg: Any, labelled: DetectionSet, proposals_of: Proposals, found: dict[str, list[dict]],
                        images: int = 6) -> None:
    """predictions.png of a probe: ground truth and proposals, or held-out proposals; `found` (title: detections)."""
    truth = labelled.coco_ground_truth()["annotations"]
    if is_held_out(labelled):
        columns = {"held-out proposals": truth}
    else:
        proposed = []
        for i in range(min(images, len(labelled))):
            image, target = labelled.load(i)
            boxes = proposals_of.generator(image, image_seed(cfg.seed, i))[:10]
            proposed += boxes_as_detections(boxes, target["image_id"])
        for box in proposed:
            del box["score"]  # its rank, nothing to show
        columns = {"ground truth": truth, "proposals (first 10)": proposed}
    draw_detections(Path(cfg.out) / "predictions.png", labelled, columns | found, rows=images)


# ==== 7. Proposals by themselves ====


def proposal_detections(labelled: DetectionSet, generator: Generator, *, ones: bool = False, workers: int = 0,
                        limit: int | None = None) -> list[dict]:
    """The first 100 boxes of each image as detections. ones: see boxes_as_detections. An unreadable image is an error,
    as everywhere in an evaluation."""
    count = min(len(labelled), limit or len(labelled))
    rects = compute_rects(labelled, generator, "int32", range(count), workers)
    found = []
    for i, (some, problem) in enumerate(progress(itertools.chain.from_iterable(rects), total=count, desc="proposals")):
        if some is None:
            raise UserError(f"cannot be evaluated: {problem}")
        boxes = rects_to_boxes(some[:100], labelled.records[i].hw, generator.units)
        found += boxes_as_detections(boxes, labelled.image_ids[i], [1.0] * len(boxes) if ones else None)
    return found


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = run.Parser(prog="evaluation.py", description="Class-agnostic AP and AR of proposals on a labelled set, at "
                        "most 100 of an image (DETReg, Table 6).")
    parser.add_argument("--data", required=True, help="coco, voc, synthetic, or labels of your own; of its test part, "
                        "else the validation part")
    parser.add_argument("--data_root", "--data-root", help="where a named data set lies (default $DATA_ROOT)")
    add_generator_flags(parser)
    parser.add_argument("--scores", default="rank", choices=["rank", "ones"],
                        help="of the boxes: 1 / rank, or 1 (released: AP then hangs on the order of the images)")
    parser.add_argument("--limit", type=run.Images, help="only the first LIMIT images")
    parser.add_argument("--out", help="file for the numbers, json")
    args = parser.parse_args(argv)
    labelled = open_detection(args.data, args.data_root, "test", seed=args.seed)
    labelled.print_notes()
    detections = proposal_detections(labelled, generator_of(args), ones=args.scores == "ones", workers=args.workers,
                                     limit=args.limit)
    truth = labelled.coco_ground_truth()
    metrics = detection_metrics(truth | {"images": truth["images"][:args.limit]}, detections, class_agnostic=True)
    print(metrics_table({args.method: metrics}, ["AP", "AP50", "AP75", "AR1", "AR10", "AR100"],
                        f"class-agnostic, {labelled.name}, scores: {args.scores}"))
    if args.out:
        run.write_json(Path(args.out), metrics)
    return metrics


if __name__ == "__main__":
    run.cli(main)
