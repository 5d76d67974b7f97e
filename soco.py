"""SoCo: self-supervised pretraining of a detector by making the features of the same object equal in views of
different place and size.

Paper: Fangyun Wei, Yue Gao, Zhirong Wu, Han Hu, Stephen Lin.
    Aligning Pretraining for Detection via Object-Level Contrastive Learning. NeurIPS 2021, arXiv 2106.02637.

Idea: Selective search finds object-like boxes. Each is seen in three views of the image: whole, cropped, and cropped
    and half as large. Its RoI feature, taken from the feature pyramid and sent through the detector's own box head,
    must predict the feature of the same box in the other views, as in BYOL: against a slowly moving copy of the
    network, without negatives. A box is read from the pyramid level that fits its size in the view, so the levels learn
    to agree. Backbone, FPN and box head, all that a Mask R-CNN needs before it knows classes, are pretrained together.

Diagram:
    image --squash--> V1 [3, 224, 224]     boxes: K = 4 proposals that the crop of V2 (of V3) shows, jittered in V1, clipped to each view
      |--crop, flip--> V2 [3, 224, 224]       |
      +--crop, flip--> V3 [3, 112, 112]       v
    V --ResNet-50, FPN--> P2..P5 --RoIAlign 7 x 7--> box head --> h [1024], Eq. (1) --> projector --> predictor --> v [256], online, V1 and Vj
    V --the same, a moving average of it-----------------------> h', Eq. (3) ---> projector -------------> v' [256], target, Vj and V1
    level by the box's size in its view: V1's P4 may meet V3's P3; L = -2 cos(v, v') over matching boxes,
    both directions, Eq. (5), (6)

Run:
    python soco.py --preset demo                                           # CPU, nothing downloaded, about 5 minutes
    python soco.py --preset demo --data MY_IMAGES                          # the same small model on your own images
    python proposals.py --data imagenet --grid 0 --workers 32 --out proposals/imagenet-soco
    torchrun --nnodes=2 --nproc_per_node=8 soco.py --data imagenet --proposal_store proposals/imagenet-soco     # batch 2048
    torchrun --nproc_per_node=8 soco.py --data imagenet --star --proposal_store ...                             # SoCo*, 400 epochs
    torchrun --nproc_per_node=8 soco.py --data imagenet --arch c4 --proposal_store ...                          # for R50-C4 detectors
    torchrun --nproc_per_node=8 finetune.py --data coco --detector mask_rcnn_fpn --init_from out/soco-imagenet/last.pt
    python detreg.py --data imagenet100 --backbone_weights out/soco-imagenet/last.pt      # a backbone for the DETR family

    Table 4, each row one switch more: --proposal_method whole --num_boxes 1 --fpn false --box_head false --scale_aware
    false --jitter_prob 0 --multi_view false; --proposal_method selective_search --num_boxes 4; --fpn; --box_head;
    --scale_aware; --jitter_prob 0.5; --multi_view.
    Table 5: (a) --small_size 96..192; (b) --batch_size; (c) --num_boxes 1..16, --proposal_method random;
        (d) --ema_momentum 0.98..0.993.

Hyperparameters (default; --arch c4; where from):
    proposals     aspect 1/3..3, size 0.3..0.8 of the image's, >= 32 px           Sec. 3.2; released
    views         V1 whole 224, V2 crop of 50..100 % (c4: 60..100), V3 112        Sec. 3.2; released
    boxes         K = 4 per pair, jittered by up to 10 % with p = 0.5             Sec. 3.2; released (c4: not jittered)
    levels        P2 <= 48 px, P3 <= 96, P4 <= 192, P5 <= 224                     Sec. 3.3
    model         ResNet-50, FPN and 4conv1fc head with BatchNorm                 Sec. 3.3 (c4: RoIAlign 14 x 14 on C4, res5)
    optimiser     LARS 1.0 x batch / 256, weight decay 1e-5, batch 2048           Sec. 4.1
    schedule      100 epochs (star: 400), 10 of warm-up, cosine; EMA 0.99 -> 1    Sec. 4.1; released

Deviations (paper / released code / here):
    D1  Proposals: selective search / a Python variant of it without colour spaces / OpenCV's
        fast mode at original size.
    D2  Boxes below 32 px, and what to do when none is left (drop the size rule, then the aspect rule, then the whole
        image): not said / so / as released (`--min_side`; `--preset paper`: 0).
    D3  V3: V2 made smaller / its own crop / as released (`--v3 downsample`, `--preset paper`: as printed). SoCo* has
        both, as released: V3 is a crop at 192 px, V4 is V2 made smaller.
    D4  V2 is cut from the resized V1 / from the image / as released; its area for C4:
        50..100 % / 60..100 % / as released.
    D5  A pair's boxes: random K / K of those that overlap the pair's own crop, other boxes for V3 than for V2; fewer
        than K: copies, drawn anew in each view, so that a box counts as often as the product of
        its copies / as released.
    D6  Jitter: of the centre, one number / of the top left corner and the sides, four numbers / as released.
    D7  All boxes go through all levels and the head sees one level at a time; the loss picks / so;
        BatchNorm statistics depend on it / as released.
    D8  Eq. (5), (6): mean over boxes / mean over matching pairs of an image, then over images / as released;
        both directions, as BYOL.
    D9  LARS: not said / one-dimensional parameters get no weight decay and no trust ratio / as released.
    D10 EMA momentum: rises to 1 in the released code, whose counter starts anew on resume / follows from the step here.
    D11 Cutout of boxes: not in the paper / in two scripts, where it raises an error / not built.
    D12 Random generators of Python, NumPy and torch, unseeded / one, from (seed, epoch, index).
    D13 Table 4's rows below the full method have no released code: without FPN or head a box is the mean of its RoI;
        without scale-aware assignment a box is compared with itself on every level.
    D14 Last BatchNorm of every residual block: not said / starts at 0 / as released. 288 steps of 8 images at lr 0.03
        lifted it to 0.07 (layer1) and 0.01 (layer4) only, which leaves a network of shortcuts;
        `--zero_init_residual false` starts it at 1.

Expected: the loss falls from about 0 towards -8 (SoCo*: -12, C4: -4), which is perfect agreement; there within a few
    hundred steps, the network has collapsed. Paper, Table 1 (Mask R-CNN FPN 1x, COCO): 42.3 / 37.6 after 100 epochs,
    43.0 / 38.2 after 400, SoCo* 43.2 / 38.4. Not rerun here.
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

# ==== 1. Hyperparameters ====


@dataclass
class Config:
    # data
    data: str = "imagenet"  # imagenet100, imagenet, coco, voc, synthetic, a folder of images, or a .txt with one path per line
    data_root: str | None = None  # where a named data set lies; else $DATA_ROOT, else data/<name>
    synthetic_images: int = 800  # size of the synthetic pool
    synthetic_size: int = 160  # side of a synthetic scene, pixels
    out: str | None = None  # output folder; else out/soco-<preset or data>
    preset: str | None = None  # paper or demo
    # proposals
    proposal_method: Literal["selective_search", "edge_boxes", "random", "whole"] = "selective_search"  # where boxes come from (Tables 4, 5 c)
    proposal_mode: Literal["fast", "quality", "quick"] = "fast"  # selective search mode (D1)
    proposal_grid: int = 0  # side the image is squeezed to before selective search, 0 = original size (released)
    proposal_rank: Literal["opencv", "nms"] = "opencv"  # order of the boxes; plays no part, they are chosen at random
    proposal_store: str | None = None  # folder filled by proposals.py; without one boxes are computed in the loader, which is slow
    cache_proposals: bool = False  # fill a store in the output folder before training
    edge_model: str | None = None  # OpenCV's structured forest file, for edge_boxes
    max_aspect: float = 3.0  # of a proposal, either way (Sec. 3.2)
    size_range: tuple[float, ...] = (0.3, 0.8)  # sqrt(area) of a proposal, of the image's (Sec. 3.2)
    min_side: int = 32  # least width and height of a proposal, pixels (released; D2)
    # images
    image_size: int = 224  # side of V1 and V2, pixels (Sec. 3.2)
    small_size: int = 112  # side of V3, with --star of V4, pixels (Sec. 3.2; Table 5 a)
    star_size: int = 192  # side of V3 with --star, pixels (released)
    crop_area: tuple[float, ...] = (0.5, 1.0)  # share of the image that V2 shows (Sec. 3.2; c4: 0.6, 1)
    v3: Literal["crop", "downsample"] = "crop"  # V3 is its own crop, or V2 made smaller (D3)
    star: bool = False  # SoCo*: V3 at star_size, V4 = V2 at small_size (Table 1)
    multi_view: bool = True  # off: V1 and V2 only (Table 4; c4: off)
    # pretext
    num_boxes: int = 4  # K, boxes per image and pair of views (Sec. 3.2; Table 5 c)
    scale_aware: bool = True  # a box is read from the level of its size (Sec. 3.3; Table 4; c4: off)
    level_sizes: tuple[int, ...] = (48, 96, 192, 224)  # largest sqrt(area) of P2..P5, pixels of the view (Sec. 3.3)
    jitter_prob: float = 0.5  # of moving a box of V1 (Sec. 3.2; Table 4; c4: 0)
    jitter_ratio: float = 0.1  # by at most this share of its sides (Sec. 3.2)
    # model
    arch: Literal["fpn", "c4"] = "fpn"  # which detector it is made for (Sec. 3.3)
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # Sec. 4.1
    backbone_weights: str = "random"  # start: random, imagenet, moco_v2, swav or a file
    zero_init_residual: bool = True  # the last BatchNorm of every block starts at 0 (released; D14)
    fpn: bool = True  # off: boxes are read from C5 (Table 4)
    box_head: bool = True  # off: the mean of the RoI instead of the head (Table 4)
    fpn_channels: int = 256  # width of the pyramid and of the head's convolutions (Sec. 3.3)
    head_dim: int = 1024  # h, width behind the box head (released)
    mlp_dim: int = 4096  # hidden width of projector and predictor (Sec. 4.1)
    embedding_dim: int = 256  # of v and v' (Sec. 4.1)
    roi_size: int = 7  # of RoIAlign (c4: 14)
    ema_momentum: float = 0.99  # of the target network at the start; it rises to 1 (Sec. 4.1; Table 5 d)
    # optimisation
    batch_size: int = 2048  # images per step over all processes (Sec. 4.1; Table 5 b)
    accumulate: int = 1  # must stay 1: BatchNorm and target network see whole batches
    epochs: int = 100  # Sec. 4.1 (star: 400)
    warmup_epochs: float = 10  # linear, from lr / 100 (Sec. 4.1; released)
    lr: float = 1.0  # for 256 images; it grows with the batch (Sec. 4.1)
    lr_min: float = 1e-6  # where the cosine ends (released)
    sgd_momentum: float = 0.9  # of LARS (released)
    trust: float = 0.001  # of LARS: length of a step, of the parameter's (released)
    weight_decay: float = 1e-5  # Sec. 4.1
    amp: Literal["off", "bf16"] = "off"  # autocast; RoIAlign and loss stay fp32
    compile: bool = False  # torch.compile the layers (slow to start; meant for GPUs)
    # run
    seed: int = 42  # everything random follows from it
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    num_workers: int = 8  # loader processes per training process
    max_steps: int | None = None  # stop after this many steps
    save_every: int = 1000  # steps between checkpoints
    log_every: int = 50  # steps between lines of log.jsonl
    allow_config_change: bool = False  # continue a run although the configuration differs
    # probe
    probe_data: str | None = None  # other images to find boxes again in, as --data; else held-out ones
    probe_images: int = 0  # images of the probe, held out from training; 0 = no probe


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"v3": "downsample", "min_side": 0},                            # D2, D3
    "demo": {
        "data": "synthetic", "synthetic_images": 400, "cache_proposals": True, "min_side": 12, "image_size": 64,
        "small_size": 32, "star_size": 48, "level_sizes": (14, 28, 55, 64), "backbone": "resnet18", "fpn_channels": 32,
        "head_dim": 128, "mlp_dim": 256, "embedding_dim": 64, "ema_momentum": 0.96, "lr": 16.0, "batch_size": 16,
        "epochs": 12, "warmup_epochs": 1, "num_workers": 2, "log_every": 25, "save_every": 150, "probe_images": 200,
    },
}


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """What the released scripts change for C4 detectors and for SoCo*."""
    if values["arch"] == "c4":
        size = 7 if values["preset"] == "demo" else 14  # res5 on 14 x 14 is too much for a demo's CPU
        return {"crop_area": (0.6, 1.0), "roi_size": size, "jitter_prob": 0.0,
                "multi_view": False, "scale_aware": False}
    return {"epochs": 400} if values["star"] else {}


# ==== 2. Data ====
# Boxes of this section: float64 or integer corners (x1, y1, x2, y2), both INCLUSIVE, and an id,
# in pixels of the original image, as released.
# A crop is (x1, y1, x2, y2) with x2, y2 exclusive, as everywhere else.


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
    return np.concatenate([rects[:, :2], rects[:, :2] + rects[:, 2:] - 1, np.arange(1, len(rects) + 1)[:, None]], 1)


def usable_boxes(rects: np.ndarray, wh: tuple[int, int], cfg: Config) -> np.ndarray:
    """The proposals an image has: those that pass all rules, else the rules are given up one after another,
    else the whole image (D2). [n, 5]"""
    for aspect, size in ((cfg.max_aspect, cfg.size_range), (cfg.max_aspect, None), (math.inf, None)):
        keep = filter_rects(rects, wh, aspect, size, cfg.min_side)
        if keep.any():
            return inclusive_boxes(rects[keep])
    return inclusive_boxes(np.array([[0, 0, *wh]]))


def overlapping(boxes: np.ndarray, crop: tuple[int, ...]) -> np.ndarray:
    """The boxes [n, 5] that overlap a crop by more than a line of pixels."""
    x1, y1, x2, y2 = crop[0], crop[1], crop[2] - 1, crop[3] - 1
    return boxes[(boxes[:, 0] < x2) & (x1 < boxes[:, 2]) & (boxes[:, 1] < y2) & (y1 < boxes[:, 3])]


def jitter_boxes(boxes: np.ndarray, apply: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Box i is moved where apply[i]: its corner by r[i, :2] and its sides by r[i, 2:] of
    its sides (D6). Not clipped."""
    boxes = boxes.astype(np.float64)
    sides = boxes[:, 2:4] - boxes[:, :2] + 1
    corner = boxes[:, :2] + r[:, :2] * sides
    moved = np.concatenate([corner, corner + sides * (1 + r[:, 2:]) - 1, boxes[:, 4:]], 1)
    return np.where(apply[:, None], moved, boxes)


def clip_to_crop(boxes: np.ndarray, crop: tuple[int, ...]) -> np.ndarray:
    """Boxes [n, 5] of the image -> pixels of the crop, cut off at its edges. No boxes: the whole crop, with id 1."""
    left, top, width, height = crop[0], crop[1], crop[2] - crop[0], crop[3] - crop[1]
    if not len(boxes):
        return np.array([[0, 0, width - 1, height - 1, 1]])
    low, high = np.array([left, top]), np.array([left + width - 1, top + height - 1])
    return np.concatenate([np.maximum(boxes[:, :2], low) - low, np.minimum(boxes[:, 2:4], high) - low, boxes[:, 4:]], 1)


def pad_boxes(boxes: np.ndarray, count: int, draws: np.ndarray) -> np.ndarray:
    """Fewer than `count` boxes: the first of draws, integers modulo the number of boxes, are added again."""
    return np.concatenate([boxes, boxes[draws[:count - len(boxes)] % len(boxes)]]) if len(boxes) < count else boxes


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
    k = cfg.num_boxes
    select = rng.choice(overlaps, k, replace=False) if overlaps >= k else np.arange(overlaps)
    return PairDraw(select, rng.random(k) < cfg.jitter_prob, rng.uniform(-cfg.jitter_ratio, cfg.jitter_ratio, (k, 4)),
                    rng.integers(2 ** 31, size=k), rng.integers(2 ** 31, size=k))


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


def assign_levels(resized: np.ndarray, level_sizes: tuple[int, ...]) -> np.ndarray:
    """Scale-aware assignment (Sec. 3.3): boxes [n, 4] in pixels of the view -> 0 = P2 ..
    3 = P5 by sqrt(area), -1 above the last."""
    size = np.sqrt((resized[:, 2] - resized[:, 0] + 1) * (resized[:, 3] - resized[:, 1] + 1))
    level = np.searchsorted(np.array(level_sizes), size, side="left")
    return np.where(level < len(level_sizes), level, -1)


def correspondence(ids1: np.ndarray, ids2: np.ndarray, levels1: np.ndarray | None = None,
                   levels2: np.ndarray | None = None, levels: int = 1
                   ) -> np.ndarray:
    """float32 [L * K, L * K]: which rows of view 1 and of the other view are the same object; row = level * K + box.

    With levels1, levels2 [K] a box counts on its own level only, which may differ in the two views;
    without them on all L levels, with itself.
    """
    same = ids1[:, None] == ids2[None]                                       # [K, K]
    if levels1 is None:
        return np.kron(np.eye(levels), same).astype(np.float32)
    on1, on2 = (np.arange(levels)[:, None] == level for level in (levels1, levels2))                          # [L, K]
    return (same[None, :, None] & on1[:, :, None, None]
            & on2[None, None]).reshape(levels * len(ids1), -1).astype(np.float32)


def relative_boxes(boxes: np.ndarray, crop: tuple[int, ...], flip: bool) -> np.ndarray:
    """Boxes [n, 5] of a crop -> float32 [n, 4] in 0..1 of the view, mirrored when it is. Inclusive corners are divided
    as they are: a full box ends one pixel early (released)."""
    x1, y1, x2, y2 = (boxes[:, :4] / np.array([crop[2] - crop[0], crop[3] - crop[1]] * 2)).astype(np.float32).T
    return np.stack([1 - x2, y1, 1 - x1, y2] if flip else [x1, y1, x2, y2], 1)


class ObjectViewsDataset(torch.utils.data.Dataset):
    """One sample: views of an image and K boxes per pair (V1, Vj), j = 2, 3, (4).
    Random as a function of (seed, epoch, index).

    Keys: views, [3, s, s] each; boxes1, boxes [P, K, 4] in 0..1 of V1 and of Vj; corres [P, L * K, L * K]; ids1, ids,
    levels1, levels [P, K]; index of the image; skipped (unreadable files). separate (probe):
    proposals that overlap much are left out.
    """

    def __init__(self, cfg: Config, source, indices: np.ndarray,
                 store: proposals.ProposalStore | None = None, separate: bool = False):
        self.cfg, self.source, self.indices, self.store, self.separate = cfg, source, indices, store, separate
        self.generator = proposal_generator(cfg) if cfg.proposal_method != "whole" else None
        self.levels = 4 if cfg.arch == "fpn" and cfg.fpn else 1
        # BYOL's two pipelines; V1 has the first, all others the second (released)
        self.photometric = [data.Photometric(0.4, 0.4, 0.2, 0.1, p_jitter=0.8, p_gray=0.2, p_blur=1.0),
                            data.Photometric(0.4, 0.4, 0.2, 0.1, p_jitter=0.8, p_gray=0.2, p_blur=0.1, p_solarize=0.2)]
        small = (cfg.star_size if cfg.star else cfg.small_size,) if cfg.multi_view else ()
        self.sides = (cfg.image_size, cfg.image_size, *small, *((cfg.small_size,) if cfg.star else ()))
        # D3: 1 = V2 made smaller, with its boxes
        self.origin = (0, 1, 1 if cfg.v3 == "downsample" and not cfg.star else 2, 1)[:len(self.sides)]

    def __len__(self) -> int:
        return len(self.indices)

    def propose(self, image: Image.Image, index: int, epoch: int) -> np.ndarray:
        """[n, 5], see usable_boxes."""
        wh = image.size
        if self.generator is None:
            return inclusive_boxes(np.array([[0, 0, *wh]]))
        boxes = self.store.boxes(index, wh[::-1]) if self.store is not None else \
            self.generator(image, proposals.image_seed(self.cfg.seed, epoch, index))
        rects = np.rint(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)).astype(np.int64)
        return usable_boxes(rects, wh, self.cfg)

    def draw_crops(self, rng: np.random.Generator, boxes: np.ndarray, wh: tuple[int, int]) -> list[tuple[int, ...]]:
        """A crop per view: drawn until every pair has enough boxes, at most 5 times (released)."""
        enough = max(self.cfg.num_boxes // 2, 1)
        for _ in range(5):
            drawn = [(0, 0, *wh), *(data.draw_crop(rng, wh[::-1], tuple(self.cfg.crop_area)) for _ in range(2))]
            crops = [drawn[i] for i in self.origin]
            if min(len(overlapping(boxes, crop)) for crop in crops[1:]) >= enough:
                break
            enough = max(enough // 2, 1)
        return crops

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        cfg, (epoch, position) = self.cfg, key
        rng = data.sample_rng(cfg.seed, epoch, position)
        skipped: list[str] = []
        image, index = data.load_usable(self.source, int(self.indices[position]), rng, skipped, self.indices)
        boxes = self.propose(image, index, epoch)
        if self.separate:
            order = nms(torch.from_numpy(boxes[:, :4]).double(), torch.from_numpy(rng.random(len(boxes))), 0.3)
            boxes = boxes[order.numpy()]
        crops, flips = self.draw_crops(rng, boxes, image.size), rng.random(len(self.sides)) < 0.5
        sample: dict[str, list] = {k: [] for k in ("boxes1", "boxes", "corres", "ids1", "ids", "levels1", "levels")}
        drawn: dict[int, PairDraw] = {}
        for origin, crop, side, flip in zip(self.origin[1:], crops[1:], self.sides[1:], flips[1:]):
            if origin not in drawn:
                drawn[origin] = draw_pair(rng, len(overlapping(boxes, crop)), cfg)
            first, second = pair_boxes(boxes, crops[0], crop, drawn[origin], cfg.num_boxes)
            levels = [assign_levels(resize_boxes(b, c, s), cfg.level_sizes)
                      for b, c, s in ((first, crops[0], self.sides[0]), (second, crop, side))]
            aware = levels if cfg.scale_aware and self.levels > 1 else (None, None)
            pair = {"boxes1": relative_boxes(first, crops[0], flips[0]), "boxes": relative_boxes(second, crop, flip),
                    "corres": correspondence(first[:, 4], second[:, 4], *aware, self.levels),
                    "ids1": first[:, 4].astype(np.int64),
                    "ids": second[:, 4].astype(np.int64), "levels1": levels[0], "levels": levels[1]}
            for name, value in pair.items():
                sample[name].append(torch.from_numpy(value))
        views = [self.apply_view(rng, image, *view, int(i > 0)) for i, view in enumerate(zip(crops, self.sides, flips))]
        return {"views": views, **{k: torch.stack(v) for k, v in sample.items()}, "index": index, "skipped": skipped}

    def apply_view(self, rng: np.random.Generator, image: Image.Image, crop: tuple[int, ...], side: int, flip: bool,
                   pipeline: int) -> Tensor:
        """Crop, squash to side x side, flip, colours. [3, side, side]"""
        view = data.resize(image.crop(crop), (side, side))
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view
        return data.to_normalized_tensor(data.apply_photometric(view,
                                                                data.draw_photometric(rng, self.photometric[pipeline])))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """views: a list of [B, 3, s, s]; all else stacked, [B, P, ...]."""
    joined = {k: torch.stack([s[k] for s in samples])
              for k in ("boxes1", "boxes", "corres", "ids1", "ids", "levels1", "levels")}
    return joined | {"views": [torch.stack(view) for view in zip(*(s["views"] for s in samples))],
                     "index": [s["index"] for s in samples],
                     "skipped": [path for s in samples for path in s["skipped"]]}


def proposal_generator(cfg: Config) -> proposals.Generator:
    grid = (cfg.proposal_grid or None) if cfg.proposal_method == "selective_search" else None
    return proposals.Generator(cfg.proposal_method, cfg.proposal_mode, grid, cfg.proposal_rank,
                               cfg.edge_model, cfg.seed)


# ==== 3. Model ====


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, no activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class FPN(nn.Module):
    """C2..C5 -> P2..P5, all `channels` wide (Lin et al., CVPR 2017), with BatchNorm.
    Upsampled to the finer map's size, which need not be twice."""

    def __init__(self, in_channels: list[int], channels: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvNorm(c, channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in in_channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, maps)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, merged)]


class BoxHead(nn.Module):
    """f^H of Eq. (1): the 4conv1fc head of a Mask R-CNN with BatchNorm. RoIs [n, C, S, S] -> [n, head_dim]."""

    def __init__(self, in_channels: int, channels: int, roi_size: int, head_dim: int):
        super().__init__()
        for i in range(1, 5):
            self.add_module(f"conv{i}",
                            nn.Conv2d(in_channels if i == 1 else channels, channels, 3, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels))
        self.fc1 = nn.Linear(channels * roi_size ** 2, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2),
                         (self.conv3, self.bn3), (self.conv4, self.bn4)):
            x = F.relu(bn(conv(x)))
        return F.relu(self.fc1(x.flatten(1)))


class MLP(nn.Module):
    """Projector g and predictor q of Eq. (4)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        self.linear1, self.bn1, self.linear2 = (nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim),
                                                nn.Linear(hidden_dim, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.bn1(self.linear1(x))))


TARGET = ("encoder", "neck", "head", "projector")  # parts that have a moving average, called <part>_k


class SoCo(nn.Module):
    """Online and target network. Names as released: encoder, neck, head, projector, predictor; encoder_k,
    neck_k, head_k, projector_k.

    arch "c4": RoIs are cut from C4, the encoder's layer4 is the head. fpn, head False: Table 4 (D13).
    """

    def __init__(self, backbone: common.Backbone, *, arch: str = "fpn",
                 fpn: bool = True, head: bool = True, fpn_channels: int = 256,
                 head_dim: int = 1024, mlp_dim: int = 4096, embedding_dim: int = 256, roi_size: int = 7):
        super().__init__()
        self.arch, self.roi_size = arch, roi_size
        self.encoder = backbone.body
        width = backbone.num_channels[-1]
        self.neck = self.head = None
        if arch == "fpn" and fpn:
            self.neck, width = FPN(backbone.num_channels, fpn_channels), fpn_channels
        if arch == "fpn" and head:
            self.head, width = BoxHead(width, fpn_channels, roi_size, head_dim), head_dim
        self.projector, self.predictor = MLP(width, mlp_dim, embedding_dim), MLP(embedding_dim, mlp_dim, embedding_dim)
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
        if self.arch == "c4":
            return common.run_stages(((n, m) for n, m in encoder.named_children() if n != "layer4"), images,
                                     ("layer3",))
        outputs = common.run_stages(encoder.named_children(), images, ("layer1", "layer2", "layer3", "layer4"))
        return neck(outputs) if neck is not None else outputs[-1:]

    def object_features(self, feature_map: Tensor, boxes: Tensor, target: bool) -> Tensor:
        """h = f^H(RoIAlign(f^I(V), b)), Eq. (1)-(3), of one level:
        boxes [B, K, 4] in 0..1 of the view -> [B * K, head_dim]."""
        height, width = feature_map.shape[-2:]
        # by the map's size, not its stride: 3.5 cells are 4
        rois = list(boxes * common.constant((width, height) * 2, boxes.device))
        x = roi_align(feature_map.float(), rois, self.roi_size, 1.0, sampling_ratio=-1, aligned=True)
        if self.arch == "c4":
            return (self.encoder_k if target else self.encoder).layer4(x).mean((2, 3))
        head = self.head_k if target else self.head
        return head(x) if head is not None else x.mean((2, 3))

    def embed(self, images: Tensor, box_sets: list[Tensor], target: bool) -> list[Tensor]:
        """v = q(g(h)) of the online network, v' = g(h) of the target, Eq. (4), unit length: per box set [B, K, 4] a
        tensor [B, L * K, D], row = level * K + box. Every box on every level, one level at a time (D7)."""
        maps, embeddings = self.maps(images, target), []
        for boxes in box_sets:
            rows = []
            for feature_map in maps:
                h = self.object_features(feature_map, boxes, target)
                v = self.projector_k(h) if target else self.predictor(self.projector(h))
                rows.append(F.normalize(v.float(), dim=-1).unflatten(0, boxes.shape[:2]))
            embeddings.append(torch.cat(rows, 1))
        return embeddings

    def forward(self, views: list[Tensor], boxes1: Tensor,
                boxes: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """views: V1, V2, ... [B, 3, s, s]; boxes1, boxes [B, P, K, 4] of V1 and of Vj. Per pair (v1, vj, v1', vj'),
        [B, L * K, D]; primes: target."""
        def both(target: bool) -> tuple[list[Tensor], list[Tensor]]:
            return (self.embed(views[0], list(boxes1.unbind(1)), target),
                    [self.embed(view, [b], target)[0] for view, b in zip(views[1:], boxes.unbind(1))])
        online = both(False)                                                 # Eq. (2)
        with torch.no_grad():
            target = both(True)                                              # Eq. (3)
        return list(zip(*online, *target))


def init_resnet(body: nn.Module) -> None:
    """Released: the last BatchNorm of every block starts at 0; convolutions are N(0,
    2 / (k * k * out)), which is torchvision's."""
    for layer in (m for name, m in body.named_children() if name.startswith("layer")):
        for block in layer:
            nn.init.zeros_((block.bn3 if hasattr(block, "bn3") else block.bn2).weight)


def build_model(cfg: Config) -> SoCo:
    """Weights follow from the seed and --backbone_weights."""
    torch.manual_seed(cfg.seed)
    backbone = common.Backbone(cfg.backbone, (1, 2, 3, 4), "bn", trainable=5)
    if cfg.zero_init_residual:
        init_resnet(backbone.body)
    convert.load_backbone_weights(backbone.body, cfg.backbone_weights, cfg.backbone)
    return SoCo(backbone, arch=cfg.arch, fpn=cfg.fpn, head=cfg.box_head, fpn_channels=cfg.fpn_channels,
                head_dim=cfg.head_dim, mlp_dim=cfg.mlp_dim, embedding_dim=cfg.embedding_dim, roi_size=cfg.roi_size)


# ==== 4. Loss ====


def pair_loss(v: Tensor, target: Tensor, corres: Tensor) -> Tensor:
    """One term of Eq. (5), (6): -2 cos(v, v') over the matching boxes of an image, mean over images;
    [B, R, D] each, corres [B, R, R].

    An image without a match adds 0 and counts in the mean (released).
    """
    similarity = v @ target.transpose(1, 2)                                  # [B, R, R]
    return -2 * ((similarity * corres).sum((1, 2)) / (corres.sum((1, 2)) + 1e-6)).mean()


def soco_loss(pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]], corres: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (6) for all pairs of views and both directions: (total, terms loss_12, loss_21, loss_13,
    ...). corres [B, P, R, R]."""
    terms = {}
    for j, ((v1, vj, target1, targetj), match) in enumerate(zip(pairs, corres.unbind(1)), start=2):
        terms[f"loss_1{j}"] = pair_loss(v1, targetj, match)
        terms[f"loss_{j}1"] = pair_loss(vj, target1, match.transpose(1, 2))
    return torch.stack(list(terms.values())).sum(), terms


# ==== 5. Training step ====


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is a fixed share of the parameter's length (You et al., arXiv 1708.03888).
    One-dimensional parameters (biases, BatchNorm) take plain steps (D9)."""

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if shaped := [i for i, p in enumerate(params) if p.dim() > 1]:
                lengths, slopes = (torch.stack(torch._foreach_norm([tensors[i] for i in shaped]))
                                   for tensors in (params, updates))
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


def build_optimizer(cfg: Config, model: nn.Module) -> LARS:
    """The rate is given for 256 images a step."""
    base_lr = cfg.lr * cfg.batch_size / 256
    return LARS([{**group, "base_lr": base_lr} for group in lars_groups(model, cfg.weight_decay)], base_lr,
                cfg.sgd_momentum, trust=cfg.trust)


def lr_at(step: int, lr: float, steps_per_epoch: int, epochs: int, warmup_epochs: float, lr_min: float = 1e-6) -> float:
    """Linear from lr / 100 to lr over the warm-up, then a cosine to lr_min. A pure function of the step."""
    warmup = warmup_epochs * steps_per_epoch
    if step <= warmup:
        return lr / 100 * (99 * step / warmup + 1) if warmup else lr
    progress = (step - warmup) / ((epochs - warmup_epochs) * steps_per_epoch)
    return lr_min + (lr - lr_min) * (1 + math.cos(math.pi * progress)) / 2


def ema_steps(images: int, batch_size: int, epochs: int) -> int:
    """Over how many steps the momentum rises: those of the run, the last incomplete batches included (released)."""
    return int(images / batch_size * epochs)


def momentum_at(step: int, base: float, steps: int) -> float:
    """1 - (1 - base) (cos(pi step / steps) + 1) / 2, from base to 1 (BYOL). A pure function of the step (D10)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


def train_step(cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any], momentum: float,
               device: torch.device) -> dict[str, Tensor]:
    """One step: target update, forward of both networks, loss, LARS. Returns the terms,
    the total and the gradient norm.

    Every image counts alike, so the mean of the processes' gradients is that of the whole batch, but for BatchNorm: its
    statistics are of all processes on CUDA (SyncBatchNorm), of each process on CPU.
    """
    getattr(model, "module", model).update_target(momentum)
    views = [view.to(device, non_blocking=True) for view in batch["views"]]
    boxes1, boxes, corres = (batch[k].to(device, non_blocking=True) for k in ("boxes1", "boxes", "corres"))
    with common.autocast(device, cfg.amp):
        pairs = model(views, boxes1, boxes)
    loss, terms = soco_loss(pairs, corres)
    optimizer.zero_grad()
    loss.backward()
    norm = common.clip_gradients(model, 0)
    optimizer.step()
    matched = corres.sum((1, 2, 3)).mean() / len(views[1:])
    return {"loss": loss.detach(), **terms, "pairs": matched, "grad_norm": norm}


# ==== 6. Probe ====


@torch.no_grad()
def find_objects(model: SoCo, probe_set: ObjectViewsDataset, num_workers: int, device: torch.device,
                 other: bool = False, text: str = ""
                 ) -> list[dict]:
    """Is a box of V1 found again in the other views of unseen images by its h, Eq. (1)? Rows {"index", "all", "own":
    right or not, "view": j, "best": [image, box], "box"}, one per box and pair of views.

    all: the most alike of all boxes of the batch's images is the same box; own: of those of its image. other: h of V1
    comes from the next image, at the same place, so what place and size give away is left.
    """
    model.eval()
    found = []
    for batch in evaluation.batches(probe_set, num_workers, text, collate=collate):
        views = [view.to(device) for view in batch["views"]]
        first = model.maps(views[0].roll(-1, 0) if other else views[0], False)
        for pair, view in enumerate(views[1:]):
            h = [F.normalize(select_level(model, maps, batch[b][:, pair].to(device), batch[levels][:, pair]),
                             dim=-1).flatten(0, 1)
                 for maps, b, levels in ((first, "boxes1", "levels1"), (model.maps(view, False), "boxes", "levels"))]
            ids1, ids = (batch[k][:, pair] for k in ("ids1", "ids"))         # [B, K]
            image = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
            similarity = (h[0] @ h[1].T).cpu()                               # [B * K, B * K]
            own = image[:, None] == image[None]
            best, best_own = similarity.argmax(1), similarity.masked_fill(~own, -2).argmax(1)
            for row, (i, label) in enumerate(zip(image.tolist(), ids1.flatten().tolist())):
                if label in ids1[i, :row % ids1.shape[1]]:                   # a copy, see pad_boxes
                    continue
                right = [bool(image[b] == i) and int(ids.flatten()[b]) == label for b in (best[row], best_own[row])]
                found.append({"index": batch["index"][i], "view": pair + 2,
                              "all": right[0], "own": right[1], "box": row % ids1.shape[1],
                              "best": [int(image[best_own[row]]), int(best_own[row]) % ids1.shape[1]]})
    return evaluation.gather(found)


def select_level(model: SoCo, maps: list[Tensor], boxes: Tensor, levels: Tensor) -> Tensor:
    """h [B, K, D] of every box [B, K, 4] from its own level [B, K]."""
    # [B, K, L, D]
    features = torch.stack([model.object_features(m, boxes, False).unflatten(0, boxes.shape[:2]) for m in maps], 2)
    index = levels.clamp(0, len(maps) - 1).to(boxes.device)
    return features.gather(2, index[..., None, None].expand(-1, -1, 1, features.shape[-1]))[:, :, 0]


def retrieval_metrics(rows: list[dict]) -> dict[str, float]:
    """Shares of boxes found: among all ("retrieval"), per view, and among those of their own image."""
    views = sorted({row["view"] for row in rows})
    per_view = {f"view{j}": float(np.mean([row["all"] for row in rows if row["view"] == j])) for j in views}
    return {"retrieval": float(np.mean([row["all"] for row in rows])), **per_view,
            "own_image": float(np.mean([row["own"] for row in rows]))}


def probe(cfg: Config, model: SoCo, probe_source, held_out: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Retrieval of the same box across views and scales, before and after, and predictions.png.
    `shuffled`: see find_objects, other."""
    probe_set = ObjectViewsDataset(cfg, probe_source, held_out, separate=True)
    untrained = build_model(cfg).to(device)
    rows = {"untrained": find_objects(untrained, probe_set, cfg.num_workers, device, text="untrained"),
            "shuffled": find_objects(model, probe_set, cfg.num_workers, device, other=True, text="shuffled"),
            "pretrained": find_objects(model, probe_set, cfg.num_workers, device, text="pretrained")}
    if common.rank() != 0:
        return {}
    draw_objects(Path(cfg.out) / "predictions.png", probe_set, rows["pretrained"])
    return {name: retrieval_metrics(found) for name, found in rows.items()} | {"primary": "retrieval"}


def draw_objects(path: Path, probe_set: ObjectViewsDataset, rows: list[dict], count: int = 6) -> None:
    """One row per image: boxes of V1, the same in V2, and which boxes of V2 the features of V1
    found among the image's own."""
    images, columns = [], {"boxes of V1": [], "the same in V2": [], "found in V2": []}
    for position in range(min(count, len(probe_set))):
        sample = probe_set[0, position]
        mine = [row for row in rows if row["index"] == sample["index"] and row["view"] == 2]
        if not mine:
            continue
        first, second = (evaluation.picture(view) for view in sample["views"][:2])
        ids1, ids = sample["ids1"][0].tolist(), sample["ids"][0].tolist()
        boxes1, boxes = (sample[k][0] * side for k, side in (("boxes1", first.width), ("boxes", second.width)))
        images.append(second)
        columns["boxes of V1"].append((boxes1[[row["box"] for row in mine]], None, first))
        columns["the same in V2"].append((boxes[[ids.index(ids1[row["box"]]) for row in mine]], None))
        columns["found in V2"].append((boxes[[row["best"][1] for row in mine]], None))
    evaluation.draw_boxes_figure(path, images, columns)


# ==== 7. Main ====


def check(cfg: Config) -> None:
    """What a configuration alone can be wrong in."""
    if cfg.accumulate > 1:
        raise UserError(f"--accumulate {cfg.accumulate}: SoCo needs the whole batch at once (BatchNorm, "
                        "target network); give a smaller --batch_size")
    if cfg.batch_size * cfg.num_boxes == common.world_size():
        raise UserError(f"--batch_size {cfg.batch_size} --num_boxes {cfg.num_boxes}: one box per process, "
                        "but BatchNorm needs two; give more")
    if cfg.arch == "c4" and (cfg.scale_aware or not cfg.fpn or not cfg.box_head):
        raise UserError("--arch c4 has neither FPN nor box head: leave out --scale_aware, --fpn and --box_head")
    if cfg.scale_aware and not cfg.fpn:
        raise UserError("--scale_aware needs the levels of --fpn: leave one out, or give --scale_aware false")
    if cfg.star and not cfg.multi_view:
        raise UserError("--star is made of four views: "
                        + ("add --multi_view" if cfg.arch == "c4" else "leave out --multi_view false"))
    if len(cfg.level_sizes) != 4 or list(cfg.level_sizes) != sorted(cfg.level_sizes):
        raise UserError(f"--level_sizes {' '.join(map(str, cfg.level_sizes))}: "
                        "give four rising sizes, of P2, P3, P4 and P5")
    for name, low, high in (("crop_area", 0, 1), ("size_range", 0, math.inf)):
        pair = getattr(cfg, name)
        if not (len(pair) == 2 and low <= pair[0] <= pair[1] <= high and pair[1] > 0):
            raise UserError(f"--{name} {' '.join(map(str, pair))}: "
                            "give the smallest and the largest share, in this order")
    if (least := min(cfg.image_size, cfg.small_size, cfg.star_size)) < 32:
        raise UserError("--image_size, --small_size, "
                        f"--star_size: {least} is too small, a view needs at least 32 pixels a side")
    if least == 32 and cfg.batch_size == common.world_size():
        raise UserError(f"--batch_size {cfg.batch_size}: one image per process, "
                        "of which a view of 32 pixels leaves BatchNorm one value; give more")
    if (cfg.scale_aware
        and (largest := max(cfg.image_size, cfg.small_size, cfg.star_size * cfg.star)) > cfg.level_sizes[-1]):
        raise UserError(f"--level_sizes {' '.join(map(str, cfg.level_sizes))}: "
                        f"a view of {largest} pixels has boxes above the last; raise it")
    if cfg.proposal_store and cfg.proposal_method in ("random", "whole"):
        raise UserError(f"--proposal_method {cfg.proposal_method} uses no --proposal_store: leave one out")
    if not (0 <= cfg.jitter_prob <= 1 and 0 <= cfg.jitter_ratio < 0.5 and cfg.roi_size > 0):
        raise UserError(f"--jitter_prob {cfg.jitter_prob} must lie in 0..1, "
                        f"--jitter_ratio {cfg.jitter_ratio} in 0..0.5, --roi_size {cfg.roi_size} above 0")
    if cfg.lr <= 0:
        raise UserError(f"--lr {cfg.lr:g}: must be above 0")
    if not 0 <= cfg.ema_momentum <= 1:
        raise UserError(f"--ema_momentum {cfg.ema_momentum}: must lie in 0..1")
    if not 0 <= cfg.warmup_epochs < cfg.epochs:
        raise UserError(f"--warmup_epochs {cfg.warmup_epochs:g}: must be less than --epochs {cfg.epochs}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = run.parse_config(Config, PRESETS, argv, script="soco",
                           description=__doc__.split("\n\n")[0], by_data=recipe_of)
    device = common.setup_distributed(cfg.device)
    check(cfg)
    out = Path(cfg.out)
    source, indices, probe_source, held_out = data.open_pretraining(cfg)
    sampler_args = {"world": common.world_size(), "rank": common.rank(), "accumulate": cfg.accumulate, "seed": cfg.seed}
    # complains about sizes before anything is written
    data.StepSampler(len(indices), cfg.batch_size, 1, **sampler_args)
    identity = run.identity("soco", len(source), source.fingerprint())
    state = run.open_run(cfg, **identity)
    steps_per_epoch = len(indices) // cfg.batch_size
    total_steps = min(cfg.epochs * steps_per_epoch, cfg.max_steps or sys.maxsize)
    if metrics := run.finished(out, state, total_steps):
        run.say(summary(metrics))
        return metrics

    store = (proposals.open_store(cfg, source, proposal_generator(cfg))
             if cfg.proposal_method not in ("random", "whole") else None)
    train_set = ObjectViewsDataset(cfg, source, indices, store)
    model = build_model(cfg).to(device)
    optimizer = build_optimizer(cfg, model)
    base_lr = optimizer.defaults["lr"]
    start = run.restore(state, model, optimizer, cfg) if state else 0
    wrapped = common.wrap_model(model, device, compiled=cfg.compile)
    sampler = data.StepSampler(len(indices), cfg.batch_size, total_steps, start_step=start, **sampler_args)
    batches = iter(data.make_loader(train_set, sampler, num_workers=cfg.num_workers, collate=collate))
    log, skipped, seen = run.Log(out, start, device), data.SkipCount(len(source)), 0
    watch = run.FiniteWatch(out, source.key)
    run.tell_plan(cfg, len(indices), "images", steps_per_epoch, start, total_steps, device)
    momentum_steps = ema_steps(len(indices), cfg.batch_size, cfg.epochs)
    bar = run.progress(range(start, total_steps), initial=start, total=total_steps, desc="pretraining")
    for step in run.until_stopped(bar):
        run.seed_step(cfg.seed, step)
        wrapped.train()
        lr = common.set_lr(optimizer,
                           lr_at(step, 1.0, steps_per_epoch, cfg.epochs, cfg.warmup_epochs, cfg.lr_min / base_lr))
        momentum = momentum_at(step, cfg.ema_momentum, momentum_steps)
        batch = next(batches)
        skipped.add(batch["skipped"])
        seen += len(batch["index"])
        with watch.step(step, [batch]) as look:
            terms = train_step(cfg, wrapped, optimizer, batch, momentum, device)
            look(terms)
        if step % cfg.log_every == 0 or step == total_steps - 1:
            watch.settle()
            line = log.write(step, terms, seen, epoch=step // steps_per_epoch, lr=lr, momentum=momentum)
            bar.set_postfix(loss=f"{line['loss']:.2f}", pairs=f"{line['pairs']:.1f}")
            seen = 0
        if run.save_due(step + 1, total_steps, cfg.save_every):
            watch.settle()
            run.save_checkpoint(out / "last.pt", model, optimizer, step + 1, cfg, **identity)

    common.share_buffers(model)
    metrics = {"steps": total_steps}
    if len(held_out):
        metrics |= probe(cfg, model, probe_source, held_out, device)
    if common.rank() == 0:
        evaluation.write_json(out / "metrics.json", metrics)
        run.say(summary(metrics) + f"\nwrote {out}/last.pt, log.jsonl, metrics.json"
                + (", predictions.png" if len(held_out) else ""))
    skipped.tell()
    common.barrier()
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    columns = next((list(row) for row in metrics.values() if isinstance(row, dict)), [])
    return evaluation.probe_table(metrics, columns,
                                  "share of boxes found again in another view, among those of up to 9 unseen images (")


if __name__ == "__main__":
    run.cli(main)
