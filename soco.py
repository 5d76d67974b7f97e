"""SoCo: self-supervised pretraining of a detector: an object's features agree in views of different place and size.

Paper: Fangyun Wei, Yue Gao, Zhirong Wu, Han Hu, Stephen Lin. Aligning Pretraining for Detection via Object-Level
    Contrastive Learning. NeurIPS 2021, arXiv 2106.02637.

Idea: Selective search finds object-like boxes. Each is seen in three views of the image: whole, cropped, and cropped
    and half as large. Its RoI feature, taken from the feature pyramid and sent through the detector's own box head,
    must predict the feature of the same box in the other views, as in BYOL: against a slowly moving copy of the
    network, without negatives. A box is read from the pyramid level that fits its size in the view, so the levels learn
    to agree. Backbone, FPN and box head, all that a Mask R-CNN needs before it knows classes, are pretrained together.

Diagram:
    image --squash--> V1 [3, 224, 224]        boxes: K = 4 proposals that the crop of V2 (of V3) shows,
      |--crop, flip--> V2 [3, 224, 224]         |    jittered in V1, clipped to each view
      +--crop, flip--> V3 [3, 112, 112]         v
    V --ResNet-50, FPN--> P2..P5 --RoIAlign 7 x 7--> box head --> h [1024], Eq. (1) --> projector, predictor --> v [256]
    V --its moving average, the target network-----------------> h', Eq. (3) ---------> projector ------------> v' [256]
    level by the box's size in its view: V1's P4 may meet V3's P3
    L = -2 cos(v, v') over matching boxes: v of V1 and v' of Vj, v of Vj and v' of V1, Eq. (5), (6)

Run:
    python soco.py --preset demo                                       # CPU, nothing downloaded, about 5 minutes
    torchrun --nproc_per_node=8 soco.py --data imagenet --proposal_store proposals/imagenet-soco      # the recipe
    torchrun --nproc_per_node=8 finetune.py --data coco --detector mask_rcnn_fpn --init_from out/soco-imagenet/last.pt
    python docs/annotate.py                                            # beside its equations: site/soco.html
    The store, two machines, SoCo*, C4 detectors, your own images, the rows of the paper's tables: docs/methods/soco.md

Hyperparameters: in Config below, each with its place in the paper. `--preset paper`: as printed (D2, D3).

Deviations (paper / released code / here; in full in docs/methods/soco.md):
    D1  Proposals: selective search / a Python variant without colour spaces / OpenCV's fast mode at original size.
    D2  Boxes below 32 px; none left: - / dropped; drop size, then aspect rule, then whole image / as released.
    D3  V3: V2 made smaller / its own crop / as released (`--v3`). SoCo* has both: V3 a crop, V4 V2 made smaller.
    D4  V2: cut from the resized V1, for C4 50..100 % / cut from the image, 60..100 % / as released.
    D5  A pair's boxes: random K / K that overlap its own crop, copies where there are fewer / as released.
    D6  Jitter: of the centre, one number / of the top left corner and the sides, four numbers / as released.
    D7  Levels: - / all boxes go through all levels, one at a time, and the loss picks / as released.
    D8  Eq. (5), (6): mean over boxes / over an image's matching pairs, then over images / as released.
    D9  LARS: - / one-dimensional parameters without weight decay and trust ratio / as released.
    D10 EMA momentum: - / rises to 1, by a counter that starts anew on resume / rises to 1, follows from the step.
    D11 Cutout of boxes: - / in two scripts, where it raises an error / not built.
    D12 Random generators: - / those of Python, NumPy and torch, unseeded / one, from (seed, epoch, index).
    D13 Table 4 without FPN or head: - / no code / the mean of the RoI; not scale-aware: each level with itself.
    D14 Last BatchNorm of every residual block: - / starts at 0 / as released (`--zero_init_residual`).
    D15 Large pictures: - / decoded whole / no finer than needed (data.ImagePyramid).

Expected: the loss falls from about 0 towards -8 (SoCo*: -12, C4: -4), which is perfect agreement; there within a few
    hundred steps, the network has collapsed. Paper, Table 1 (Mask R-CNN FPN 1x, COCO): 42.3 / 37.6 after 100 epochs,
    43.0 / 38.2 after 400, SoCo* 43.2 / 38.4. Not rerun here.
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import copy
import functools
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

import convert
import data
import evaluation
import proposals
import run
from common import UserError
from run import Count, Images, NonNegative, Pixels, Positive, Share, Width

# ==== 1. Hyperparameters ====

ViewSide = Annotated[int, run.Range(32, 2**14)]  # pixels; 32 is the stride of C5


@dataclass
class Config(run.ProbeConfig, proposals.ProposalConfig, run.RunConfig):
    least_micro_batch: ClassVar[int] = 10**9  # it does not accumulate
    # proposals (more in proposals.ProposalConfig)
    proposal_method: Literal["selective_search", "edge_boxes", "random", "whole"] = "selective_search"  # Tables 4, 5 c
    proposal_grid: run.Grid = 0  # side the image is squeezed to before selective search, 0 = original size (released)
    max_aspect: Annotated[float, run.Range(1, 1e6)] = 3.0  # of a proposal, either way (Sec. 3.2)
    size_range: tuple[NonNegative, ...] = (0.3, 0.8)  # sqrt(area) of a proposal, of the image's (Sec. 3.2)
    min_side: Annotated[int, run.Range(0, 2**14)] = 32  # least width and height of a proposal, pixels (released; D2)
    # images
    image_size: ViewSide = 224  # side of V1 and V2, pixels (Sec. 3.2)
    small_size: ViewSide = 112  # side of V3, with --star of V4, pixels (Sec. 3.2; Table 5 a)
    star_size: ViewSide = 192  # side of V3 with --star, pixels (released)
    crop_area: tuple[Share, ...] = (0.5, 1.0)  # share of the image that V2 shows (Sec. 3.2; c4: 0.6, 1)
    v3: Literal["crop", "downsample"] = "crop"  # V3 is its own crop, or V2 made smaller (D3)
    star: bool = False  # SoCo*: V3 at star_size, V4 = V2 at small_size (Table 1)
    multi_view: bool = True  # off: V1 and V2 only (Table 4; c4: off)
    # pretext
    num_boxes: Width = 4  # K, boxes per image and pair of views (Sec. 3.2; Table 5 c)
    scale_aware: bool = True  # a box is read from the level of its size (Sec. 3.3; Table 4; c4: off)
    level_sizes: tuple[Pixels, ...] = (48, 96, 192, 224)  # largest sqrt(area) of P2..P5, pixels of the view (Sec. 3.3)
    jitter_prob: Share = 0.5  # of moving a box of V1 (Sec. 3.2; Table 4; c4: 0)
    jitter_ratio: NonNegative = 0.1  # by at most this share of its sides (Sec. 3.2)
    # model
    pipeline: Literal["fpn", "c4"] = "fpn"  # which detector it is made for (Sec. 3.3)
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # backbone (Sec. 4.1)
    backbone_weights: str = "random"  # start: random, imagenet, moco_v2_200, moco_v2_800, swav, swav_400 or a file
    zero_init_residual: bool = True  # the last BatchNorm of every block starts at 0 (released; D14)
    fpn: bool = True  # off: boxes are read from C5 (Table 4)
    box_head: bool = True  # off: the mean of the RoI instead of the head (Table 4)
    fpn_channels: Width = 256  # width of the pyramid and of the head's convolutions (Sec. 3.3)
    head_dim: Width = 1024  # h, width behind the box head (released)
    mlp_dim: Width = 4096  # hidden width of projector and predictor (Sec. 4.1)
    embedding_dim: Width = 256  # of v and v' (Sec. 4.1)
    roi_size: run.Cells = 7  # of RoIAlign (c4: 14)
    ema_momentum: Share = 0.99  # of the target network at the start; it rises to 1 (Sec. 4.1; Table 5 d)
    # optimisation
    batch_size: Images = 2048  # images per step over all processes (Sec. 4.1; Table 5 b)
    epochs: Count = 100  # Sec. 4.1 (star: 400)
    warmup_epochs: NonNegative = 10  # linear, from lr / 100 (Sec. 4.1; released)
    lr: Annotated[float, run.Range(1e-9, 1e6)] = 1.0  # for 256 images; it grows with the batch (Sec. 4.1)
    lr_min: NonNegative = 1e-6  # where the cosine ends (released)
    sgd_momentum: Share = 0.9  # of LARS (released)
    trust: Positive = 0.001  # of LARS: length of a step, of the parameter's (released)
    weight_decay: NonNegative = 1e-5  # Sec. 4.1


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"v3": "downsample", "min_side": 0},  # D3, D2
    "demo": {
        "data": "synthetic", "synthetic_images": 400, "cache_proposals": True, "min_side": 12, "image_size": 64,
        "small_size": 32, "star_size": 48, "level_sizes": (14, 28, 55, 64), "arch": "resnet18", "fpn_channels": 32,
        "head_dim": 128, "mlp_dim": 256, "embedding_dim": 64, "ema_momentum": 0.96, "lr": 16.0, "batch_size": 16,
        "epochs": 12, "warmup_epochs": 1, "num_workers": 2, "log_every": 25, "save_every": 150, "probe_images": 200,
    },
}


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """What the released scripts change for C4 detectors and for SoCo*."""
    if values["pipeline"] == "c4":
        roi_size = 7 if values["preset"] == "demo" else 14  # res5 on 14 x 14 is too much for a demo's CPU
        return {"crop_area": (0.6, 1.0), "roi_size": roi_size, "jitter_prob": 0.0, "multi_view": False,
                "scale_aware": False}
    return {"epochs": 400} if values["star"] else {}


def check(cfg: Config) -> None:
    """What a configuration alone can be wrong in."""
    run.check_pair(cfg, "crop_area", "size_range")
    if min(cfg.crop_area[1], cfg.size_range[1]) == 0:
        raise UserError("--crop_area, --size_range: the largest share must be above 0")
    if cfg.accumulate > 1:
        raise UserError(f"--accumulate {cfg.accumulate}: SoCo's BatchNorm takes its statistics from the whole batch, "
                        "which a micro-batch has not; --checkpoint_activations and --amp take less memory, or give a "
                        "smaller --batch_size, whose rate follows it")
    if cfg.batch_size * cfg.num_boxes == common.world_size():
        raise UserError(f"--batch_size {cfg.batch_size} --num_boxes {cfg.num_boxes}: one box per process, "
                        "but BatchNorm needs two; give more")
    if min(cfg.image_size, cfg.small_size, cfg.star_size) == 32 and cfg.batch_size == common.world_size():
        raise UserError(f"--batch_size {cfg.batch_size}: one image per process, "
                        "of which a view of 32 pixels leaves BatchNorm one value; give more")
    if cfg.pipeline == "c4" and (cfg.scale_aware or not cfg.fpn or not cfg.box_head):
        raise UserError("--pipeline c4 has neither FPN nor box head: leave out --scale_aware, --fpn and --box_head")
    if cfg.scale_aware and not cfg.fpn:
        raise UserError("--scale_aware needs the levels of --fpn: leave one out, or give --scale_aware false")
    if cfg.star and not cfg.multi_view:
        raise UserError("--star is made of four views: add --multi_view")
    level_sizes = " ".join(map(str, cfg.level_sizes))
    if len(cfg.level_sizes) != 4 or list(cfg.level_sizes) != sorted(cfg.level_sizes):
        raise UserError(f"--level_sizes {level_sizes}: give four rising sizes, of P2, P3, P4 and P5")
    largest = max(cfg.image_size, cfg.small_size, cfg.star_size * cfg.star)
    if cfg.scale_aware and largest > cfg.level_sizes[-1]:
        raise UserError(f"--level_sizes {level_sizes}: a view of {largest} pixels has boxes above the last; raise it")
    if cfg.proposal_store and cfg.proposal_method in ("random", "whole"):
        raise UserError(f"--proposal_method {cfg.proposal_method} uses no --proposal_store: leave one out")
    if cfg.jitter_ratio >= 0.5:
        raise UserError(f"--jitter_ratio {cfg.jitter_ratio:g}: must be below 0.5")
    if cfg.warmup_epochs >= cfg.epochs:
        raise UserError(f"--warmup_epochs {cfg.warmup_epochs:g}: must be less than --epochs {cfg.epochs}")


# ==== 2. Data ====
# Boxes of this section: float64 or integer corners (x1, y1, x2, y2), both INCLUSIVE, and an id, in pixels of the
# original image, as released. A crop is (x1, y1, x2, y2) with x2, y2 exclusive, as everywhere else.


def filter_rects(rects: np.ndarray, wh: tuple[int, int], max_aspect: float, size_range: tuple[float, ...] | None,
                 min_side: int) -> np.ndarray:
    """bool [n]: which rects [n, 4] xywh (w, h in pixels) of an image of size wh are object-like (Sec. 3.2).
    size_range None: any size."""
    w, h = rects[:, 2], rects[:, 3]
    keep = (w >= min_side) & (h >= min_side) & (w <= max_aspect * h) & (h <= max_aspect * w)
    if size_range is not None:
        size = np.sqrt(w * h) / math.sqrt(wh[0] * wh[1])
        keep &= (size >= size_range[0]) & (size <= size_range[1])
    return keep


def inclusive_boxes(rects: np.ndarray) -> np.ndarray:
    """Rects [n, 4] xywh -> [n, 5]: inclusive corners, and an id from 1."""
    ids = np.arange(1, len(rects) + 1)[:, None]
    return np.concatenate([rects[:, :2], rects[:, :2] + rects[:, 2:] - 1, ids], 1)


def usable_boxes(rects: np.ndarray, wh: tuple[int, int], cfg: Config) -> np.ndarray:
    """The proposals an image has: those that pass all rules, else the rules are given up one after another, else the
    whole image (D2). [n, 5]"""
    for max_aspect, size_range in ((cfg.max_aspect, cfg.size_range), (cfg.max_aspect, None), (math.inf, None)):
        keep = filter_rects(rects, wh, max_aspect, size_range, cfg.min_side)
        if keep.any():
            return inclusive_boxes(rects[keep])
    return inclusive_boxes(np.array([[0, 0, *wh]]))


def without_overlaps(boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The boxes [n, 5] in random order, without those whose IoU with one before them is above 0.3."""
    scores = torch.from_numpy(rng.random(len(boxes)))
    return boxes[nms(torch.from_numpy(boxes[:, :4]).double(), scores, 0.3).numpy()]


def overlapping(boxes: np.ndarray, crop: tuple[int, ...]) -> np.ndarray:
    """The boxes [n, 5] that overlap a crop by more than a line of pixels."""
    x1, y1, x2, y2 = crop[0], crop[1], crop[2] - 1, crop[3] - 1
    return boxes[(boxes[:, 0] < x2) & (x1 < boxes[:, 2]) & (boxes[:, 1] < y2) & (y1 < boxes[:, 3])]


def jitter_boxes(boxes: np.ndarray, apply: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Box i is moved where apply[i]: its corner by r[i, :2] and its sides by r[i, 2:] of its sides (D6). Not
    clipped."""
    boxes = boxes.astype(np.float64)
    sides = boxes[:, 2:4] - boxes[:, :2] + 1
    corner = boxes[:, :2] + r[:, :2] * sides
    moved = np.concatenate([corner, corner + sides * (1 + r[:, 2:]) - 1, boxes[:, 4:]], 1)
    return np.where(apply[:, None], moved, boxes)


def clip_to_crop(boxes: np.ndarray, crop: tuple[int, ...]) -> np.ndarray:
    """Boxes [n, 5] of the image -> pixels of the crop, cut off at its edges. No boxes: the whole crop, with id 1."""
    first, last = np.array(crop[:2]), np.array(crop[2:]) - 1  # its corner pixels
    if not len(boxes):
        return np.array([[0, 0, *(last - first), 1]])
    return np.concatenate([np.maximum(boxes[:, :2], first) - first, np.minimum(boxes[:, 2:4], last) - first,
                           boxes[:, 4:]], 1)


def pad_boxes(boxes: np.ndarray, count: int, draws: np.ndarray) -> np.ndarray:
    """Fewer than `count` boxes: copies of some are added. draws: integers modulo the number of boxes say which."""
    missing = max(count - len(boxes), 0)
    return np.concatenate([boxes, boxes[draws[:missing] % len(boxes)]])


@dataclass
class PairDraw:
    """What is random in the boxes of one pair of views. select [K]: which of the overlapping proposals; apply bool [K],
    r [K, 4]: jitter; pad_first, pad_second int [K]: see pad_boxes."""
    select: np.ndarray
    apply: np.ndarray
    r: np.ndarray
    pad_first: np.ndarray
    pad_second: np.ndarray


def draw_pair(rng: np.random.Generator, overlaps: int, cfg: Config) -> PairDraw:
    """overlaps: number of proposals that overlap the second view's crop."""
    k = cfg.num_boxes
    return PairDraw(select=rng.choice(overlaps, k, replace=False) if overlaps >= k else np.arange(overlaps),
                    apply=rng.random(k) < cfg.jitter_prob,
                    r=rng.uniform(-cfg.jitter_ratio, cfg.jitter_ratio, (k, 4)),
                    pad_first=rng.integers(2 ** 31, size=k),
                    pad_second=rng.integers(2 ** 31, size=k))


def pair_boxes(boxes: np.ndarray, first: tuple[int, ...], second: tuple[int, ...], draw: PairDraw,
               count: int) -> tuple[np.ndarray, np.ndarray]:
    """Proposals [n, 5] -> `count` boxes in two crops of an image, [K, 5] each, in pixels of the crops: selected,
    jittered in the first crop only, clipped, padded. Equal ids are the same object. A selected box lies in both; parts
    that stick out are cut off."""
    chosen = overlapping(boxes, second)
    if len(chosen) >= count:
        chosen = chosen[draw.select]
    n = len(chosen)
    moved = jitter_boxes(chosen, draw.apply[:n], draw.r[:n])
    return (pad_boxes(clip_to_crop(moved, first), count, draw.pad_first),
            pad_boxes(clip_to_crop(chosen, second), count, draw.pad_second))


def resize_boxes(boxes: np.ndarray, crop: tuple[int, ...], side: int) -> np.ndarray:
    """Boxes [n, 4+] of a crop -> int64 [n, 4] in pixels of the view, truncated (released)."""
    scale = side / np.array([crop[2] - crop[0], crop[3] - crop[1]] * 2, np.float64)
    return (boxes[:, :4] * scale).astype(np.int64)


def relative_boxes(boxes: np.ndarray, crop: tuple[int, ...], flip: bool) -> np.ndarray:
    """Boxes [n, 5] of a crop -> float32 [n, 4] in 0..1 of the view, mirrored when it is. Inclusive corners are divided
    as they are: a full box ends one pixel early (released)."""
    size = np.array([crop[2] - crop[0], crop[3] - crop[1]] * 2)
    x1, y1, x2, y2 = (boxes[:, :4] / size).astype(np.float32).T
    if flip:
        x1, x2 = 1 - x2, 1 - x1
    return np.stack([x1, y1, x2, y2], 1)


def assign_levels(resized: np.ndarray, level_sizes: tuple[int, ...]) -> np.ndarray:
    """Scale-aware assignment (Sec. 3.3): boxes [n, 4] in pixels of the view -> 0 = P2 .. 3 = P5 by sqrt(area), -1 above
    the last."""
    size = np.sqrt((resized[:, 2] - resized[:, 0] + 1) * (resized[:, 3] - resized[:, 1] + 1))
    level = np.searchsorted(np.array(level_sizes), size, side="left")
    return np.where(level < len(level_sizes), level, -1)


def correspondence(ids1: np.ndarray, ids2: np.ndarray, levels1: np.ndarray | None = None,
                   levels2: np.ndarray | None = None, levels: int = 1) -> np.ndarray:
    """float32 [L * K, L * K]: which rows of view 1 and of the other view are the same object; row = level * K + box.

    With levels1, levels2 [K] a box counts on its own level only, which may differ in the two views; without them on all
    L levels, with itself.
    """
    same = np.zeros((levels, len(ids1), levels, len(ids2)), np.float32)  # level and box of view 1, of the other view
    for box1, box2 in np.argwhere(ids1[:, None] == ids2):
        if levels1 is None:
            for level in range(levels):
                same[level, box1, level, box2] = 1
        elif levels1[box1] >= 0 and levels2[box2] >= 0:  # neither is above all levels
            same[levels1[box1], box1, levels2[box2], box2] = 1
    return same.reshape(levels * len(ids1), levels * len(ids2))


@dataclass
class View:
    """A crop of the image, squashed to side x side pixels, mirrored or not."""
    crop: tuple[int, ...]
    side: int
    flip: bool


def apply_view(image: Image.Image | data.ImagePyramid, view: View, colours: dict[str, Any]) -> Tensor:
    """Crop, squash, flip, colours (data.draw_photometric). [3, side, side]"""
    cropped = data.cut(image, view.crop, (view.side, view.side))
    if view.flip:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return data.to_normalized_tensor(data.apply_photometric(cropped, colours))


def view_layout(cfg: Config) -> list[tuple[int, int]]:
    """V1, V2, ...: (side, which crop it shows). Crop 0 is the whole image; 1 and 2 are random; V2 made smaller has V2's
    crop (D3)."""
    layout = [(cfg.image_size, 0), (cfg.image_size, 1)]
    if cfg.star:
        layout += [(cfg.star_size, 2), (cfg.small_size, 1)]
    elif cfg.multi_view:
        layout += [(cfg.small_size, 2 if cfg.v3 == "crop" else 1)]
    return layout


class ObjectViewsDataset(torch.utils.data.Dataset):
    """One sample: views of an image and K boxes per pair (V1, Vj), j = 2, 3, (4). Random as a function of (seed, epoch,
    index).

    Keys: views, [3, s, s] each; boxes1, boxes [P, K, 4] in 0..1 of V1 and of Vj; corres [P, L * K, L * K]; ids1, ids,
    levels1, levels [P, K]; index of the image; skipped (unreadable files). separate (probe): proposals that overlap
    much are left out.
    """

    def __init__(self, cfg: Config, source, indices: np.ndarray, proposals_of: proposals.Proposals,
                 separate: bool = False):
        self.cfg, self.source, self.indices, self.proposals_of = cfg, source, indices, proposals_of
        self.separate = separate
        self.sides, self.crop_of_view = zip(*view_layout(cfg))
        self.needs = data.Needs(functools.partial(data.crop_needs, side=max(self.sides), area=cfg.crop_area),
                                whole=getattr(proposals_of, "store", None) is None)
        self.levels = 4 if cfg.pipeline == "fpn" and cfg.fpn else 1
        # BYOL's two pipelines; V1 has the first, all others the second (released)
        self.photometric = [data.Photometric(0.4, 0.4, 0.2, 0.1, p_jitter=0.8, p_gray=0.2, p_blur=1.0),
                            data.Photometric(0.4, 0.4, 0.2, 0.1, p_jitter=0.8, p_gray=0.2, p_blur=0.1, p_solarize=0.2)]

    def __len__(self) -> int:
        return len(self.indices)

    def propose(self, image: Image.Image | data.ImagePyramid, index: int, epoch: int) -> np.ndarray:
        """[n, 5], see usable_boxes."""
        if self.cfg.proposal_method == "whole":
            return inclusive_boxes(np.array([[0, 0, *image.size]]))
        boxes_xyxy = self.proposals_of(image, index, epoch)
        rects = np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], 1)
        return usable_boxes(np.rint(rects).astype(np.int64), image.size, self.cfg)

    def draw_crops(self, rng: np.random.Generator, boxes: np.ndarray, wh: tuple[int, int]) -> list[tuple[int, ...]]:
        """A crop per view: drawn until every pair has enough boxes, at most 5 times (released)."""
        enough = max(self.cfg.num_boxes // 2, 1)
        for _ in range(5):
            drawn = [(0, 0, *wh), *(data.draw_crop(rng, wh[::-1], tuple(self.cfg.crop_area)) for _ in range(2))]
            crops = [drawn[i] for i in self.crop_of_view]
            if min(len(overlapping(boxes, crop)) for crop in crops[1:]) >= enough:
                break
            enough = max(enough // 2, 1)
        return crops

    def pair(self, boxes: np.ndarray, first: View, second: View, draw: PairDraw) -> dict[str, np.ndarray]:
        """What a sample says of the pair (V1, Vj)."""
        cfg = self.cfg
        boxes1, boxes2 = pair_boxes(boxes, first.crop, second.crop, draw, cfg.num_boxes)
        ids1, ids2 = boxes1[:, 4].astype(np.int64), boxes2[:, 4].astype(np.int64)
        levels1 = assign_levels(resize_boxes(boxes1, first.crop, first.side), cfg.level_sizes)
        levels2 = assign_levels(resize_boxes(boxes2, second.crop, second.side), cfg.level_sizes)
        own_levels = (levels1, levels2) if cfg.scale_aware else ()
        return {"boxes1": relative_boxes(boxes1, first.crop, first.flip), "ids1": ids1, "levels1": levels1,
                "boxes": relative_boxes(boxes2, second.crop, second.flip), "ids": ids2, "levels": levels2,
                "corres": correspondence(ids1, ids2, *own_levels, levels=self.levels)}

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, position = key
        rng = data.sample_rng(self.cfg.seed, epoch, position)
        skipped: list[str] = []
        image, index = data.load_usable(self.source, int(self.indices[position]), rng, skipped, self.indices,
                                        needs=self.needs)
        boxes = self.propose(image, index, epoch)
        if self.separate:
            boxes = without_overlaps(boxes, rng)
        crops = self.draw_crops(rng, boxes, image.size)
        flips = rng.random(len(crops)) < 0.5
        views = [View(*values) for values in zip(crops, self.sides, flips)]
        draws: dict[int, PairDraw] = {}  # of each crop: views that share one have the same boxes
        pairs = []
        for crop_number, view in zip(self.crop_of_view[1:], views[1:]):
            if crop_number not in draws:
                draws[crop_number] = draw_pair(rng, len(overlapping(boxes, view.crop)), self.cfg)
            pairs.append(self.pair(boxes, views[0], view, draws[crop_number]))
        pixels = []
        for number, view in enumerate(views):
            colours = data.draw_photometric(rng, self.photometric[0 if number == 0 else 1])
            pixels.append(apply_view(image, view, colours))
        of_pairs = {name: torch.from_numpy(np.stack([pair[name] for pair in pairs])) for name in pairs[0]}
        return {"views": pixels, **of_pairs, "index": index, "skipped": skipped}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """views: a list of [B, 3, s, s]; all else stacked, [B, P, ...]."""
    tensors = [name for name, value in samples[0].items() if isinstance(value, Tensor)]
    return {**{name: torch.stack([s[name] for s in samples]) for name in tensors},
            "views": [torch.stack(view) for view in zip(*(s["views"] for s in samples))],
            "index": [s["index"] for s in samples], "skipped": [path for s in samples for path in s["skipped"]]}


# ==== 3. Model ====


def conv_norm(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Convolution without bias, BatchNorm, no activation."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


class FPN(nn.Module):
    """C2..C5 -> P2..P5, all `channels` wide (Lin et al., CVPR 2017), with BatchNorm. Upsampled to the finer map's size,
    which need not be twice."""

    def __init__(self, in_channels: list[int], channels: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(conv_norm(c, channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(conv_norm(channels, channels, 3) for _ in in_channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, maps)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, merged)]


def box_head(in_channels: int, channels: int, roi_size: int, head_dim: int) -> nn.Sequential:
    """f^H of Eq. (1): the 4conv1fc head of a Mask R-CNN with BatchNorm. RoIs [n, C, S, S] -> [n, head_dim]."""
    layers = OrderedDict()
    for i in range(1, 5):
        layers[f"conv{i}"] = nn.Conv2d(in_channels if i == 1 else channels, channels, 3, padding=1, bias=False)
        layers[f"bn{i}"] = nn.BatchNorm2d(channels)
        layers[f"relu{i}"] = nn.ReLU()
    fc = nn.Linear(channels * roi_size ** 2, head_dim)
    return nn.Sequential(layers | {"flatten": nn.Flatten(), "fc1": fc, "relu": nn.ReLU()})


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Projector g and predictor q of Eq. (4)."""
    return nn.Sequential(OrderedDict(linear1=nn.Linear(in_dim, hidden_dim), bn1=nn.BatchNorm1d(hidden_dim),
                                     relu=nn.ReLU(), linear2=nn.Linear(hidden_dim, out_dim)))


TARGET = ("encoder", "neck", "head", "projector")  # parts that have a moving average, called <part>_k


class SoCo(nn.Module):
    """Online and target network. Names as released: encoder, neck, head, projector, predictor; encoder_k, neck_k,
    head_k, projector_k.

    pipeline "c4": RoIs are cut from C4, the encoder's layer4 is the head. fpn, head False: Table 4 (D13).
    """

    def __init__(self, backbone: common.Backbone, *, pipeline: str = "fpn", fpn: bool = True, head: bool = True,
                 fpn_channels: int = 256, head_dim: int = 1024, mlp_dim: int = 4096, embedding_dim: int = 256,
                 roi_size: int = 7):
        super().__init__()
        self.pipeline, self.roi_size = pipeline, roi_size
        self.encoder = backbone.body
        self.neck = self.head = None
        width = backbone.num_channels[-1]
        if pipeline == "fpn" and fpn:
            self.neck = FPN(backbone.num_channels, fpn_channels)
            width = fpn_channels
        if pipeline == "fpn" and head:
            self.head = box_head(width, fpn_channels, roi_size, head_dim)
            width = head_dim
        self.projector = mlp(width, mlp_dim, embedding_dim)
        self.predictor = mlp(embedding_dim, mlp_dim, embedding_dim)
        for name in TARGET:
            part = getattr(self, name)
            setattr(self, f"{name}_k", copy.deepcopy(part).requires_grad_(False) if part is not None else None)

    def update_target(self, momentum: float) -> None:
        """xi = m xi + (1 - m) theta."""
        for name in TARGET:
            if getattr(self, name) is not None:
                common.update_average(getattr(self, f"{name}_k"), getattr(self, name), momentum)

    def maps(self, images: Tensor, target: bool) -> list[Tensor]:
        """f^I(V) of Eq. (1): P2..P5; C5 without FPN; C4 for C4 detectors."""
        encoder, neck = (self.encoder_k, self.neck_k) if target else (self.encoder, self.neck)
        if self.pipeline == "c4":
            stages = ((name, stage) for name, stage in encoder.named_children() if name != "layer4")
            return common.run_stages(stages, images, ("layer3",))
        outputs = common.run_stages(encoder.named_children(), images, ("layer1", "layer2", "layer3", "layer4"))
        return neck(outputs) if neck is not None else outputs[-1:]  # Eq. (1): f^I(V)

    def object_features(self, feature_map: Tensor, boxes: Tensor, target: bool) -> Tensor:
        """h = f^H(RoIAlign(f^I(V), b)), Eq. (1)-(3), of one level: boxes [B, K, 4] in 0..1 of the view
        -> [B * K, head_dim]."""
        height, width = feature_map.shape[-2:]
        # by the map's size, not its stride: 3.5 cells are 4
        rois = list(boxes * common.constant_tensor((width, height) * 2, boxes.device))
        x = roi_align(feature_map.float(), rois, self.roi_size, 1.0, sampling_ratio=-1, aligned=True)  # Eq. (1)
        if self.pipeline == "c4":
            return (self.encoder_k if target else self.encoder).layer4(x).mean((2, 3))
        head = self.head_k if target else self.head
        return head(x) if head is not None else x.mean((2, 3))

    def embed(self, maps: list[Tensor], boxes: Tensor, target: bool) -> Tensor:
        """v = q(g(h)) of the online network, v' = g(h) of the target, Eq. (4), unit length, of boxes [B, K, 4].
        [B, L * K, D], row = level * K + box: every box on every level, one level at a time (D7)."""
        embeddings = []
        for feature_map in maps:
            h = self.object_features(feature_map, boxes, target)  # Eq. (2), Eq. (3)
            v = self.projector_k(h) if target else self.predictor(self.projector(h))  # Eq. (4)
            embeddings.append(F.normalize(v.float(), dim=-1).unflatten(0, boxes.shape[:2]))  # [B, K, D]
        return torch.cat(embeddings, 1)

    def embed_views(self, views: list[Tensor], boxes1: Tensor, boxes: Tensor, target: bool
                    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per pair (V1, Vj) the embeddings of V1, and those of Vj."""
        maps1 = self.maps(views[0], target)
        first = [self.embed(maps1, b, target) for b in boxes1.unbind(1)]
        return first, [self.embed(self.maps(v, target), b, target) for v, b in zip(views[1:], boxes.unbind(1))]

    def forward(self, views: list[Tensor], boxes1: Tensor, boxes: Tensor
                ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """views: V1, V2, ... [B, 3, s, s]; boxes1, boxes [B, P, K, 4] of V1 and of Vj. Per pair (v1, vj, v1', vj'),
        [B, L * K, D]; primes: target."""
        v1, vj = self.embed_views(views, boxes1, boxes, target=False)  # Eq. (2)
        with torch.no_grad():
            target1, targetj = self.embed_views(views, boxes1, boxes, target=True)  # Eq. (3)
        return list(zip(v1, vj, target1, targetj))


def zero_last_norms(body: nn.Module) -> None:
    """The last BatchNorm of every residual block starts at 0 (released; convolutions as torchvision's)."""
    for name, layer in body.named_children():
        for block in layer if name.startswith("layer") else ():
            nn.init.zeros_((block.bn3 if hasattr(block, "bn3") else block.bn2).weight)


def build_model(cfg: Config) -> SoCo:
    """Weights follow from the seed and --backbone_weights."""
    torch.manual_seed(cfg.seed)
    backbone = common.Backbone(cfg.arch, (1, 2, 3, 4), "bn", trainable=5)
    if cfg.zero_init_residual:
        zero_last_norms(backbone.body)
    convert.load_backbone_weights(backbone.body, cfg.backbone_weights, cfg.arch)
    return SoCo(backbone, pipeline=cfg.pipeline, fpn=cfg.fpn, head=cfg.box_head, fpn_channels=cfg.fpn_channels,
                head_dim=cfg.head_dim, mlp_dim=cfg.mlp_dim, embedding_dim=cfg.embedding_dim, roi_size=cfg.roi_size)


# ==== 4. Loss ====


def pair_loss(v: Tensor, target: Tensor, corres: Tensor) -> Tensor:
    """One term of Eq. (5), (6): -2 cos(v, v') over the matching boxes of an image, mean over images (D8); [B, R, D]
    each, corres [B, R, R].

    An image without a match adds 0 and counts in the mean (released).
    """
    similarity = v @ target.transpose(1, 2)  # [B, R, R]
    of_images = (similarity * corres).sum((1, 2)) / (corres.sum((1, 2)) + 1e-6)  # Eq. (6): mean over boxes, D8
    return -2 * of_images.mean()  # Eq. (5)


def soco_loss(pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]], corres: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """All pairs of views, both directions: (total, terms loss_12, loss_21, loss_13, ...). corres [B, P, R, R]."""
    terms = {}
    for j, ((v1, vj, target1, targetj), match) in enumerate(zip(pairs, corres.unbind(1)), start=2):
        terms[f"loss_1{j}"] = pair_loss(v1, targetj, match)
        terms[f"loss_{j}1"] = pair_loss(vj, target1, match.transpose(1, 2))
    return torch.stack(list(terms.values())).sum(), terms  # Eq. (6)


# ==== 5. Training step ====


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is a fixed share of the parameter's length (You et al., arXiv 1708.03888).
    One-dimensional parameters (biases, BatchNorm) take plain steps (D9)."""

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """All parameters of a group at once: a few kernels, not a few per parameter."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            shaped = [i for i, p in enumerate(params) if p.dim() > 1]
            if shaped:
                lengths = torch.stack(torch._foreach_norm([params[i] for i in shaped]))
                slopes = torch.stack(torch._foreach_norm([updates[i] for i in shaped]))
                scales = torch.where((lengths > 0) & (slopes > 0), group["trust"] * lengths / (slopes + 1e-8), 1.0)
                torch._foreach_mul_([updates[i] for i in shaped], list(scales.unbind()))
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def lars_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters that learn: first those without weight decay, then the others (released order)."""
    learned = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
            {"params": [p for p in learned if p.dim() > 1], "weight_decay": weight_decay}]


def peak_lr(cfg: Config) -> float:
    """The rate is given for 256 images a step."""
    return cfg.lr * cfg.batch_size / 256


def build_optimizer(cfg: Config, model: nn.Module) -> LARS:
    lr = peak_lr(cfg)
    groups = [{**group, "base_lr": lr} for group in lars_groups(model, cfg.weight_decay)]
    return LARS(groups, lr, cfg.sgd_momentum, trust=cfg.trust)


def lr_factor(cfg: Config, step: int, steps_per_epoch: float) -> float:
    """Linear from 1/100 to 1 over the warm-up, then a cosine to lr_min. A pure function of the step."""
    warmup = cfg.warmup_epochs * steps_per_epoch
    if step <= warmup:
        return 0.01 * (99 * step / warmup + 1) if warmup else 1.0
    progress = (step - warmup) / ((cfg.epochs - cfg.warmup_epochs) * steps_per_epoch)
    end = cfg.lr_min / peak_lr(cfg)
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2


def ema_steps(images: int, batch_size: int, epochs: int) -> int:
    """Over how many steps the momentum rises: those of the run, the last incomplete batches included (released)."""
    return int(images / batch_size * epochs)


def momentum_at(step: int, base: float, steps: int) -> float:
    """1 - (1 - base) (cos(pi step / steps) + 1) / 2, from base to 1 (BYOL). A pure function of the step (D10)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


def train_step(cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any], momentum: float,
               device: torch.device) -> dict[str, Tensor]:
    """One step: target update, forward of both networks, loss, LARS. Returns the loss terms, the total, the matching
    pairs of boxes per image and pair of views, and the gradient norm.

    Every image counts alike, so the mean of the processes' gradients is that of the whole batch, but for BatchNorm: its
    statistics are of all processes on CUDA (SyncBatchNorm), of each process on CPU.
    """
    getattr(model, "module", model).update_target(momentum)
    batch = common.batch_to_device(batch, device)
    corres = batch["corres"]
    optimizer.zero_grad()
    with common.autocast(device, cfg.amp):
        pairs = model(batch["views"], batch["boxes1"], batch["boxes"])
    loss, losses = soco_loss(pairs, corres)
    common.backward(loss, optimizer, cfg.amp)
    terms = {"loss": loss.detach(), **losses, "pairs": corres.sum((1, 2, 3)).mean() / len(pairs)}
    terms["grad_norm"] = common.clip_and_step(model, optimizer, cfg.amp)
    return terms


# ==== 6. Probe ====


def select_level(model: SoCo, maps: list[Tensor], boxes: Tensor, levels: Tensor) -> Tensor:
    """h [B, K, D] of every box [B, K, 4] from its own level [B, K]."""
    # [B, K, L, D]
    features = torch.stack([model.object_features(m, boxes, False).unflatten(0, boxes.shape[:2]) for m in maps], 2)
    index = levels.clamp(0, len(maps) - 1).to(boxes.device)
    return features.gather(2, index[..., None, None].expand(-1, -1, 1, features.shape[-1]))[:, :, 0]


@torch.no_grad()
def find_objects(model: SoCo, probe_set: ObjectViewsDataset, num_workers: int, device: torch.device,
                 other: bool = False, text: str = "") -> list[dict]:
    """Is a box of V1 found again in the other views of unseen images by its h, Eq. (1)? Rows {"index", "all", "own":
    right or not, "view": j, "best": [image, box], "box"}, one per box and pair of views.

    all: the most alike of all boxes of the batch's images is the same box; own, best: of those of its image. other: h
    of V1 comes from the next image, at the same place, so what place and size give away is left.
    """
    model.eval()
    found = []
    for batch in evaluation.probe_batches(probe_set, num_workers, text, collate=collate):
        views = [view.to(device) for view in batch["views"]]
        maps1 = model.maps(views[0].roll(-1, 0) if other else views[0], False)
        for pair, view in enumerate(views[1:]):
            boxes1, boxes2, ids1, ids2, levels1, levels2 = (
                batch[name][:, pair] for name in ("boxes1", "boxes", "ids1", "ids", "levels1", "levels"))
            h1 = select_level(model, maps1, boxes1.to(device), levels1)  # [B, K, D]
            h2 = select_level(model, model.maps(view, False), boxes2.to(device), levels2)
            similarity = torch.einsum("ikd,jld->ikjl", F.normalize(h1, dim=-1), F.normalize(h2, dim=-1)).cpu()
            for i, k in np.ndindex(*ids1.shape):
                if ids1[i, k] in ids1[i, :k]:  # a copy, see pad_boxes
                    continue
                image, box = divmod(int(similarity[i, k].argmax()), ids2.shape[1])
                own_box = int(similarity[i, k, i].argmax())
                found.append({"index": batch["index"][i], "view": pair + 2, "box": k, "best": [i, own_box],
                              "all": image == i and bool(ids2[i, box] == ids1[i, k]),
                              "own": bool(ids2[i, own_box] == ids1[i, k])})
    return evaluation.gather(found)


def retrieval_metrics(rows: list[dict]) -> dict[str, float]:
    """Shares of boxes found: among all ("retrieval"), per view, and among those of their own image."""
    views = sorted({row["view"] for row in rows})
    per_view = {f"view{j}": float(np.mean([row["all"] for row in rows if row["view"] == j])) for j in views}
    return {"retrieval": float(np.mean([row["all"] for row in rows])), **per_view,
            "own_image": float(np.mean([row["own"] for row in rows]))}


def open_probe(cfg: Config, probe_source, held_out: np.ndarray) -> ObjectViewsDataset:
    return ObjectViewsDataset(cfg, probe_source, held_out, proposals.Proposals(cfg), separate=True)


def probe(cfg: Config, model: SoCo, probe_source, held_out: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Retrieval of the same box across views and scales, before and after, and predictions.png. All processes call it;
    rank 0 alone gets a table."""
    probe_set = open_probe(cfg, probe_source, held_out)
    untrained = build_model(cfg).to(device)
    find = functools.partial(find_objects, probe_set=probe_set, num_workers=cfg.num_workers, device=device)
    rows = evaluation.before_and_after(find, untrained, model)
    if common.rank() != 0:
        return {}
    plot_objects(Path(cfg.out) / "predictions.png", probe_set, rows["pretrained"])
    return {name: retrieval_metrics(found) for name, found in rows.items()} | {"primary": "retrieval"}


def plot_objects(path: Path, probe_set: ObjectViewsDataset, rows: list[dict], count: int = 6) -> None:
    """One row per image: boxes of V1, the same in V2, and which boxes of V2 the features of V1 found among the image's
    own."""
    cells = []
    for position in range(min(count, len(probe_set))):
        sample = probe_set[0, position]
        asked = [row for row in rows if row["index"] == sample["index"] and row["view"] == 2]
        if not asked:
            continue
        first, second = (evaluation.to_image(view) for view in sample["views"][:2])
        boxes1, boxes = sample["boxes1"][0] * first.width, sample["boxes"][0] * second.width
        ids1, ids = sample["ids1"][0].tolist(), sample["ids"][0].tolist()
        cells.append([(first, boxes1[[row["box"] for row in asked]], None),
                      (second, boxes[[ids.index(ids1[row["box"]]) for row in asked]], None),
                      (second, boxes[[row["best"][1] for row in asked]], None)])
    evaluation.draw_rows(path, ("boxes of V1", "the same in V2", "found in V2"), cells)


def summary(metrics: dict[str, Any]) -> str:
    columns = list(metrics.get("pretrained", {}))
    title = "share of boxes found again in another view, among those of up to 9 unseen images ("
    return evaluation.probe_table(metrics, columns, title)


# ==== 7. Main ====


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = run.parse_config(Config, PRESETS, argv, script="soco", description=__doc__, recipe=recipe_of)
    device = common.setup_distributed(cfg.device)
    check(cfg)
    source, indices, probe_source, held_out = data.open_pretraining(cfg)
    job = run.Run(cfg, "soco", source, len(indices), device, summary)
    if job.metrics:
        return job.metrics
    searched = cfg.proposal_method in ("selective_search", "edge_boxes")  # other boxes cost nothing: no store
    boxes = proposals.open_proposals(cfg, source) if searched else proposals.Proposals(cfg)
    train_set = ObjectViewsDataset(cfg, source, indices, boxes)
    model = build_model(cfg).to(device)
    optimizer = build_optimizer(cfg, model)
    job.restore(model, optimizer)
    wrapped = common.wrap_model(model, device, compiled=cfg.compile, checkpointed=cfg.checkpoint_activations)
    loader = data.train_loader(job, train_set, collate)
    kept = evaluation.KeptSamples(open_probe(cfg, probe_source, held_out))
    find = functools.partial(find_objects, probe_set=kept, num_workers=0, device=device)
    momentum_steps = cfg.steps or ema_steps(len(indices), cfg.batch_size, cfg.epochs)
    for step in job.steps():
        wrapped.train()
        lr = common.set_lr(optimizer, lr_factor(cfg, step, job.epoch_steps))
        momentum = momentum_at(step, cfg.ema_momentum, momentum_steps)
        (batch,) = job.next_batches(loader)
        terms = train_step(cfg, wrapped, optimizer, batch, momentum, device)
        job.check(step, terms, [batch])
        job.log(step, terms, "loss", "pairs", lr=lr, momentum=momentum)
        job.probe(step, functools.partial(evaluation.retrieval_line, find, retrieval_metrics,
                                          ("retrieval", "own_image")))
        job.save(step)
    common.broadcast_buffers(model)
    return job.end(probe(cfg, model, probe_source, held_out, device) if len(held_out) else {})


if __name__ == "__main__":
    run.cli(main)
