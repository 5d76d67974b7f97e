"""Siamese DETR: self-supervised pretraining of a DETR by finding and describing the regions of
one view in another view.

Paper: Zeren Chen, Gengshi Huang, Wei Li, Jianing Teng, Kun Wang, Jing Shao, Chen Change Loy, Lu Sheng.
    Siamese DETR. CVPR 2023, arXiv 2303.18144.

Idea: Take two overlapping views of an image, augmented differently, and regions that lie in both. Queries that carry
    the feature of a region in one view must find this region in the other view: where it is (boxes) and what it is (the
    feature of its crop). This goes both ways, with one detector. So its decoder learns to look for given content
    whatever the viewpoint and the colours, and its encoder, by a SimSiam loss on the pooled memories, to describe an
    image the same way in both views. The regions come from edge boxes; the backbone stays frozen.

Diagram:
    image --resize, flip--> outer box --> view 1 [3, H, W], view 2 [3, H, W], IoU >= 0.5; edge boxes in the overlap --> b1, b2 [n, 4]
                                              |                  |
    b1 --jitter--> RoIAlign <---- frozen ResNet-50      frozen ResNet-50                     crops of b1 --> frozen ResNet-50 --> p1 [n, 2048]
                      |                       |                  |                                                                |
            z1 [n, 2048], Eq. (4)          encoder            encoder --> c2 --mean--> L_g with c1, Eq. (11)                      |
                      |                                          |                                                                |
    Linear, each to Q/n queries, + q [Q, 256] ---------------> decoder, Eq. (6)(7) --> q2_hat [Q, 256] --> b2_hat, L_loc, Eq. (8)(9)
    (and the same from view 2 to view 1)                                                      +----------> p2_hat, L_r with p1, Eq. (10)(12)

Run:
    python siamese_detr.py --preset demo                                   # CPU, nothing downloaded, 5.5 minutes
    python siamese_detr.py --preset demo --data MY_IMAGES                  # the same small model on your own images
    python proposals.py --data imagenet --method edge_boxes --grid 0 --workers 32 --out proposals/imagenet-edges
    torchrun --nproc_per_node=8 siamese_detr.py --data imagenet --proposal_store proposals/imagenet-edges      # the published recipe
    torchrun --nproc_per_node=8 siamese_detr.py --data coco                # batch 64, larger images, other loss weights
    python siamese_detr.py --data coco --batch_size 64 --accumulate 8 --amp bf16     # one GPU, same global batch
    python finetune.py --data voc --init_from out/siamese_detr-imagenet/last.pt

    Table 3: (a) --lambda_global 0 --region_target none; (b) --region_target none;
        (c) --lambda_global 0 --region_target object;
    (d) --lambda_global 0; (e) the default; its single-view baseline --multi_view false --region_target
        object --lambda_global 0.
    Table 4: --proposal_method random | selective_search | edge_boxes. IoU of the views: --view_iou 0.3 | 0.5 | 0.7.

Hyperparameters (default; COCO; where from):
    images        short side 320..480, long <= 600; 480..800, 1333                Sec. 4.1; released
    views         outer box 50..100 % of the area, IoU of the views >= 0.5        Sec. 3.2
    regions       n = 10: the overlap and the 9 best edge boxes in it             Sec. 4.1; released
    model         Conditional DETR, ResNet-50 SwAV frozen, 100 queries, 6 + 6     Sec. 4.1
    losses        1 cross-entropy, 5 L1, 2 GIoU; L_r 5, L_g 10; COCO: 3, 0.3      Eq. (13), (18); released
    optimiser     AdamW 1e-4, weight decay 1e-4, clip 0.1, batch 256; COCO: 64    Sec. 4.1; released
    schedule      60 epochs, x 0.1 after 40; COCO: 65 (120k steps), 43.3          Sec. 4.1; released

Deviations (paper / released code / here):
    D1  Regions: n = 10 random ones / the overlap itself and the first 9 of 512 edge boxes in score order / as released,
        of 300 (`--region_choice random`: as printed).
    D2  No proposal in the overlap: not said / the previous image of the list / another image, at most 10 times,
        then random boxes in the overlap, counted.
    D3  L_r and L_loc: sum over the two directions / mean / mean (L_g is a sum in both,
        so it weighs twice as much as printed).
    D4  Loss weights L_r, L_g: 3, 10, on COCO 0.3, 3 / 3, 10, Conditional DETR 5, 10, on COCO 3,
        0.3 (swapped) / as released (`--preset paper`).
    D5  COCO: 60 epochs, drop at 40 / 120k steps = 65 epochs, drop at 43.3 / as released; printed: `--preset paper`.
    D6  L_g, Eq. (11): MLP(c1) against c2, one three-layer MLP / predictor(projector(c1)) against projector(c2)
        (SimSiam) / as released. c is the mean over all positions, padding included; on Deformable DETR over its first
        three levels, concatenated.
    D7  Classes, Eq. (18): 2 / 3 rows: row 0 unused, 1 = region, 2 = no object, on every detector / as released.
    D8  Queries of Deformable DETR: per image / those of image 0 for the whole batch / per image
        (`--shared_queries`: as released).
    D9  Position code of Deformable DETR: not said / DETR's, without -0.5;
        fine-tuning with it / as released (`--position_offset`).
    D10 Deformable DETR keeps content queries in transformer.tgt_embed / in the second half of query_embed, as
        Deformable DETR does, which is where fine-tuning needs them.
        convert.py joins them when it loads a released file.
    D11 Crops, Eq. (5): of the augmented view / of the view before its colours change,
        then changed by themselves / as released.
    D12 Box jitter: "following [33]" / width x (0.2 sigmoid(N(0, 1)) - 0.1) per coordinate,
        for the RoIs only / as released.
    D13 R-O (Table 3, c): target is z1 / not in the code / z1 of the unjittered box, without gradient.
    D14 BatchNorm in L_g: statistics of all processes on CUDA (SyncBatchNorm, released), of each process on CPU;
        at least 2 images per process.
    D15 Demo only: `--aligned_start` (common.align_start): a random backbone on a CPU has 4 minutes.

Expected: the demo logs, at step 0 and at its end, loss 16.6 -> 4.0, loss_bbox 0.80 -> 0.22, loss_giou 0.90 -> 0.34,
    loss_feature 1.71 -> 0.14. Its table stands in README.md.
    Paper, Table 2 (VOC AP after fine-tuning Conditional DETR, 50 epochs): 58.1, from scratch 49.9, UP-DETR 56.9,
    DETReg 57.5. Not rerun here.
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
from torchvision.ops import box_convert, roi_align

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
    data: str = "imagenet"  # imagenet100, imagenet, coco, voc, synthetic, a folder of images, or a .txt with one path per line (Sec. 4.1)
    data_root: str | None = None  # where a named data set lies; else $DATA_ROOT, else data/<name>
    synthetic_images: int = 800  # size of the synthetic pool
    synthetic_size: int = 160  # side of a synthetic scene, pixels
    out: str | None = None  # output folder; else out/siamese_detr-<preset or data>
    preset: str | None = None  # paper or demo
    # proposals
    proposal_method: Literal["edge_boxes", "selective_search", "random"] = "edge_boxes"  # where regions come from (Sec. 4.1; Table 4)
    proposal_mode: Literal["fast", "quality", "quick"] = "fast"  # selective search mode (released)
    proposal_grid: int = 128  # side the image is squeezed to before selective search, 0 = original size (released)
    proposal_rank: Literal["opencv", "nms"] = "opencv"  # order of the boxes: OpenCV's, or size filter + seeded shuffle + NMS 0.7
    proposal_store: str | None = None  # folder filled by proposals.py; without one boxes are computed in the loader
    cache_proposals: bool = False  # fill a store in the output folder before training
    edge_model: str | None = None  # OpenCV's structured forest file, for edge_boxes (released)
    # images
    scales: tuple[int, ...] = (320, 336, 352, 368, 400, 416, 432, 448, 464, 480)  # short side, pixels (released; 384 is missing)
    max_size: int = 600  # longest side, pixels (released)
    patch_size: int = 128  # side of a region crop (released)
    # pretext
    view_iou: float = 0.5  # least IoU of the two views (Sec. 3.2)
    num_regions: int = 10  # n, regions per image (Sec. 4.1)
    region_choice: Literal["top", "random"] = "top"  # the overlap and the best n - 1, or n random ones (D1)
    min_area: float = 0.05  # least area of a region, of the overlap's (released)
    box_jitter: float = 0.1  # largest shift of an RoI's side, of the RoI's size (D12)
    multi_view: bool = True  # queries of one view look into the other; off: into their own (Table 3, single-view)
    aligned_start: bool = False  # begin with queries and keys that can be compared (demo; D15)
    region_target: Literal["crop", "object", "none"] = "crop"  # what L_r draws to: p, z or nothing (Table 3: R-C, R-O)
    feature_target: Literal["current", "start"] = "current"  # which backbone describes the crops: as it is, or as it was at the start
    shared_queries: bool = False  # queries of image 0 for the whole batch, as released for Deformable DETR (D8)
    # model
    detector: common.DETECTORS = "conditional_detr"  # what is pretrained (Tables 1 and 2)
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # backbone (Sec. 4.1)
    backbone_weights: str = "swav"  # swav, imagenet, moco_v2, random or a file (Sec. 4.1)
    backbone_norm: Literal["frozen", "bn"] = "frozen"  # BatchNorm with constant or with learned statistics (released: frozen)
    stride: Literal[4, 8, 16, 32] = 32  # of the map that DETR and Conditional DETR see; below 32 the last stages are left out
    num_feature_levels: int = 4  # of deformable_detr
    pre_norm: bool = False  # LayerNorm before each block, of detr (released: off)
    position_offset: float = 0.0  # of the sine code (D9)
    hidden_dim: int = 256  # transformer width (released)
    nheads: int = 8  # attention heads (released)
    enc_layers: int = 6  # encoder layers (released)
    dec_layers: int = 6  # decoder layers (released)
    dim_feedforward: int = 2048  # width of the feed-forward layers (deformable: 1024)
    dropout: float = 0.1  # in the transformer
    num_queries: int = 100  # Q (Sec. 4.1; deformable: 300)
    with_box_refine: bool = False  # iterative box refinement of deformable_detr (released: off)
    # loss
    lambda_cls: float = 1.0  # cross-entropy and its matching cost, Eq. (18)
    lambda_l1: float = 5.0  # L1 part of L_loc and its matching cost
    lambda_giou: float = 2.0  # GIoU part of L_loc and its matching cost
    lambda_region: float = 5.0  # L_r, Eq. (13) (other detectors and COCO: 3; D4)
    lambda_global: float = 10.0  # L_g, Eq. (13) (COCO: 0.3; D4)
    eos_coef: float = 0.1  # class weight of "no object" (released)
    # optimisation
    batch_size: int = 256  # images per step over all processes (Sec. 4.1; COCO: 64)
    accumulate: int = 1  # micro-batches per step: one GPU reaches the global batch
    epochs: int = 60  # Sec. 4.1 (COCO: 65)
    lr_drop: float = 40  # epoch after which the rate is x 0.1 (Sec. 4.1; COCO: 43.3)
    lr: float = 1e-4  # Sec. 4.1
    lr_backbone: float = 0.0  # 0 = frozen backbone (Sec. 4.1)
    lr_linear_proj_mult: float = 1.0  # rate of sampling offsets and reference points of Deformable DETR (released: no difference)
    weight_decay: float = 1e-4  # on every parameter (released)
    clip_max_norm: float = 0.1  # gradient norm (released)
    amp: Literal["off", "bf16"] = "off"  # autocast; boxes, sampling and losses stay fp32
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
    probe_data: str | None = None  # other images to find regions in, as --data; else held-out ones
    probe_images: int = 0  # images of the probe, held out from training; 0 = no probe


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"region_choice": "random", "epochs": 60, "lr_drop": 40},       # D1, D5; D4 in recipe_of
    "demo": {
        "data": "synthetic", "cache_proposals": True, "scales": (56, 64), "max_size": 90, "patch_size": 16,
        "num_regions": 5, "aligned_start": True, "feature_target": "start", "detector": "detr",
        "arch": "resnet18", "backbone_weights": "random", "backbone_norm": "bn", "lr_backbone": 1e-3, "stride": 4,
        "hidden_dim": 64, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 128, "dropout": 0.0,
        "num_queries": 5, "lambda_region": 1.0, "lambda_global": 0.1, "batch_size": 16, "epochs": 20,
        "lr_drop": 17, "lr": 1e-3, "num_workers": 2, "log_every": 50, "save_every": 500, "probe_images": 100,
    },
}


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """What the released configurations change with the data set and the detector;
    the printed loss weights with --preset paper (D4)."""
    recipe: dict[str, Any] = ({"dim_feedforward": 1024, "num_queries": 300}
                              if values["detector"].startswith("deformable") else {})
    if values["data"] == "coco":
        recipe |= {"scales": tuple(range(480, 801, 32)), "max_size": 1333, "batch_size": 64,
                   "epochs": 65, "lr_drop": 43.3}
        printed, released = (0.3, 3.0), (3.0, 0.3)
    else:
        printed, released = (3.0, 10.0), (5.0 if values["detector"] == "conditional_detr" else 3.0, 10.0)
    region, whole = printed if values["preset"] == "paper" else released
    return recipe | {"lambda_region": region, "lambda_global": whole}


# ==== 2. Data ====


def view_boxes(outer: tuple[float, ...], iou: float, u1: float, u2: float, swap: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Two boxes in `outer` with IoU >= `iou`, and their overlap; float64 [4] xyxy each (Sec. 3.2, Fig. 3).

    The overlap has side s of the outer box, in its middle, with (2 + t) s^2 - 2 t s - t = 0. One view reaches from it
    towards the top left corner, the other towards the bottom right; u1, u2 in 0..1 draw them back to the overlap. u1
    = u2 = 0: the IoU is exactly t.
    """
    outer = torch.tensor(outer, dtype=torch.float64)
    side = outer[2:] - outer[:2]
    s = (iou + math.sqrt(2 * iou ** 2 + 2 * iou)) / (2 + iou)
    margin = side * (1 - s) / 2
    inter = torch.cat([outer[:2] + margin, outer[2:] - margin])
    first, second = torch.cat([outer[:2] + u1 * margin, inter[2:]]), torch.cat([inter[:2], outer[2:] - u2 * margin])
    return (second, first, inter) if swap else (first, second, inter)


def to_view(boxes: Tensor, view: Tensor, hw: tuple[int, int]) -> Tensor:
    """Boxes [n, 4] of the image -> pixels of the view, which is resized to hw."""
    scale = torch.tensor([hw[1], hw[0]]) / (view[2:] - view[:2])
    return (boxes - view[:2].repeat(2)) * scale.repeat(2)


def usable_regions(boxes: Tensor, views: tuple[Tensor, Tensor, Tensor], hw: tuple[int, int],
                   min_area: float) -> tuple[Tensor, Tensor]:
    """Proposals [m, 4] of the image, cut to the overlap -> those that stay large enough,
    in pixels of view 1 and of view 2, [k, 4] each."""
    first, second, inter = views
    boxes = torch.cat([torch.maximum(boxes[:, :2], inter[:2]), torch.minimum(boxes[:, 2:], inter[2:] - 1)], 1)
    boxes1, boxes2, whole = to_view(boxes, first, hw), to_view(boxes, second, hw), to_view(inter[None], first, hw)[0]
    sides = boxes1[:, 2:] - boxes1[:, :2]
    keep = (sides.prod(1) >= min_area * (whole[2:] - whole[:2]).prod()) & (sides >= 0).all(1) & (boxes1 >= 0).all(1)
    keep &= (boxes2 >= 0).all(1) & (boxes2 <= torch.tensor([hw[1], hw[0]] * 2)).all(1)
    return boxes1[keep], boxes2[keep]


def jitter_boxes(boxes: Tensor, normal: Tensor, ratio: float) -> Tensor:
    """Every coordinate [n, 4] moved by (w, h, w, h) * (2 ratio sigmoid(normal) - ratio):
    at most `ratio` of the box (D12). Not clipped."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + sides * (2 * ratio * normal.sigmoid() - ratio)


def clip_boxes(boxes: Tensor, limits: Tensor) -> Tensor:
    """boxes [n, 4] into limits (x1, y1, x2, y2)."""
    return torch.minimum(torch.maximum(boxes, limits[:2].repeat(2)), limits[2:].repeat(2))


def choose_regions(usable: tuple[Tensor, Tensor], views: tuple[Tensor, Tensor, Tensor], hw: tuple[int, int], n: int,
                   normal: Tensor, order: np.ndarray | None = None) -> Tensor:
    """n regions in both views, [2, n, 4] pixels, from the k >= 1 usable ones (D1). normal [n, 4]:
    N(0, 1) draws, used as far as needed.

    The overlap and the first n - 1; with `order`, a permutation of the k: the first n of it, without the overlap. Where
    k is too small, copies are added, each coordinate moved by at most 10 % of the box and clipped to the overlap.
    """
    first, second, inter = views
    boxes1, boxes2 = usable
    if order is not None:
        boxes1, boxes2 = boxes1[order], boxes2[order]
    wanted = n if order is not None else n - 1
    boxes1, boxes2 = boxes1[:wanted], boxes2[:wanted]
    whole1 = to_view(inter[None], first, hw)
    if missing := wanted - len(boxes1):
        copies = jitter_boxes(boxes1[torch.arange(missing) % len(boxes1)], normal[:missing], 0.1)
        copies = clip_boxes(copies, torch.cat([whole1[0, :2], whole1[0, 2:] - 1]))
        scale = torch.tensor([hw[1], hw[0]]) / (first[2:] - first[:2])
        boxes1, boxes2 = (torch.cat([boxes1, copies]),
                          torch.cat([boxes2, to_view(copies / scale.repeat(2) + first[:2].repeat(2), second, hw)]))
    if order is None:
        boxes1, boxes2 = torch.cat([whole1, boxes1]), torch.cat([to_view(inter[None], second, hw), boxes2])
    return torch.stack([boxes1, boxes2])


def draw_random_regions(rng: np.random.Generator, inter: Tensor, count: int, min_area: float) -> Tensor:
    """Random boxes [m, 4] of the image inside the overlap, at least min_area of it, aspect 1/8..8 (released;
    Table 4, "random"). m <= count."""
    x1, y1, x2, y2 = inter.tolist()
    least, boxes = min_area * (x2 - x1) * (y2 - y1), []
    for _ in range(10 * count):
        x, y = rng.integers(int(x1), max(int(x2), int(x1) + 1)), rng.integers(int(y1), max(int(y2), int(y1) + 1))
        h, room = rng.uniform() * (y2 - 1 - y), x2 - 1 - x
        if h <= 0 or least / h > room or len(boxes) == count:
            continue
        w = rng.uniform(least / h, room)
        if 1 / 8 <= w / h <= 8:
            boxes.append((x, y, x + w, y + h))
    return torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)


class TwoViewDataset(torch.utils.data.Dataset):
    """One sample: two overlapping views of an image and n regions that lie in both (Sec. 3.2).
    Random as a function of (seed, epoch, index).

    Keys: views 2 x [3, H, W], the same size; boxes [2, n, 4] xyxy px, rois: the same, jittered; crops [2, n, 3, p, p];
    index of the image; skipped (unreadable files); fallback (1 when random boxes had to stand in, D2). augment False
    (probe): one scale, plain colours, no jitter.
    """

    def __init__(self, cfg: Config, source, indices: np.ndarray,
                 store: proposals.ProposalStore | None = None, augment: bool = True):
        self.cfg, self.source, self.indices, self.store, self.augment = cfg, source, indices, store, augment
        self.generator = proposal_generator(cfg)
        p = (0.8, 0.2, 0.5) if augment else (0, 0, 0)
        # as SimSiam (released)
        self.photometric = data.Photometric(0.4, 0.4, 0.4, 0.1, p_jitter=p[0], p_gray=p[1], p_blur=p[2])

    def __len__(self) -> int:
        return len(self.indices)

    def propose(self, image: Image.Image, index: int, epoch: int) -> Tensor:
        boxes = self.store.boxes(index, (image.height, image.width)) if self.store is not None else \
            self.generator(image, proposals.image_seed(self.cfg.seed, epoch, index))
        return torch.from_numpy(boxes)

    def draw_regions(self, rng: np.random.Generator, image: Image.Image, index: int, epoch: int):
        """Views and usable regions of one image: (view image, views, size of a view, usable regions)."""
        cfg = self.cfg
        geometry = data.draw_geometry(rng, (image.height, image.width),
                                      scales=cfg.scales if self.augment else (max(cfg.scales),),
                                      max_size=cfg.max_size, crop_scales=None, flip=0.5)  # one flip for both views
        geometry.hw = max(geometry.hw[0], 16), max(geometry.hw[1], 16)  # a strip of pixels has no room for two views
        boxes = torch.zeros(0, 4) if cfg.proposal_method == "random" else self.propose(image, index, epoch)
        image, boxes, _ = data.apply_geometry(image, boxes, geometry)
        outer = data.draw_crop(rng, (image.height, image.width), (0.5, 1.0))  # Sec. 3.2
        views = view_boxes(outer, cfg.view_iou, *rng.uniform(size=2), swap=bool(rng.random() < 0.5))
        hw = outer[3] - outer[1], outer[2] - outer[0]
        if cfg.proposal_method == "random":
            boxes = draw_random_regions(rng, views[2], cfg.num_regions, cfg.min_area)
        return image, views, hw, usable_regions(boxes.double(), views, hw, cfg.min_area)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        cfg, (epoch, position) = self.cfg, key
        rng = data.sample_rng(cfg.seed, epoch, position)
        skipped: list[str] = []
        for attempt in range(11):
            original, index = data.load_usable(self.source, int(self.indices[position]), rng, skipped,
                                               self.indices, min_side=16)
            image, views, hw, usable = self.draw_regions(rng, original, index, epoch)
            if len(usable[0]):
                break
            position = int(rng.integers(len(self.indices)))
        if fallback := not len(usable[0]):                                   # D2
            inside = draw_random_regions(rng, views[2], cfg.num_regions, cfg.min_area)
            middle = torch.cat([views[2][:2] * 0.75 + views[2][2:] * 0.25,
                                views[2][:2] * 0.25 + views[2][2:] * 0.75])[None]
            usable = usable_regions(inside if len(inside) else middle, views, hw, 0.0)
        normal = torch.from_numpy(rng.standard_normal((3, cfg.num_regions, 4)))
        order = rng.permutation(len(usable[0])) if cfg.region_choice == "random" else None
        boxes = choose_regions(usable, views, hw, cfg.num_regions, normal[0], order)                          # b1, b2
        pictures = [data.resize(image.crop(tuple(round(v) for v in view.tolist())), hw) for view in views[:2]]
        jitter = cfg.box_jitter if self.augment else 0.0
        rois = torch.stack([clip_boxes(jitter_boxes(b, z, jitter), torch.tensor([0.0, 0.0, hw[1], hw[0]]))
                            for b, z in zip(boxes, normal[1:])])
        # crops first, then the colours of the view: a region is never recoloured twice (D11)
        crops = [torch.stack([data.cut_patch(picture, box, cfg.patch_size, data.draw_photometric(rng, self.photometric))
                              for box in b.tolist()]) for picture, b in zip(pictures, boxes)]
        recoloured = [data.apply_photometric(picture, data.draw_photometric(rng, self.photometric))
                      for picture in pictures]
        return {"views": [data.to_normalized_tensor(picture) for picture in recoloured],
                "boxes": boxes.float(), "rois": rois.float(),
                "crops": torch.stack(crops), "index": index, "skipped": skipped, "fallback": int(fallback)}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """B samples -> 2B images: view 1 of all, then view 2 of all; boxes, rois [2B, n, 4],
    crops [2B, n, 3, p, p] and sizes [2B, 2] alike."""
    both = [{"image": s["views"][v], "target": {}, "skipped": s["skipped"] if v == 0 else []}
            for v in (0, 1) for s in samples]
    batch = data.collate(both)
    joined = {k: torch.cat([torch.stack([s[k][v] for s in samples]) for v in (0, 1)])
              for k in ("boxes", "rois", "crops")}
    sizes = torch.tensor([s["image"].shape[-2:] for s in both])
    return {"images": batch["images"], "mask": batch["mask"], **joined,
            "sizes": sizes, "index": [s["index"] for s in samples],
            "skipped": batch["skipped"], "fallback": sum(s["fallback"] for s in samples)}


def proposal_generator(cfg: Config) -> proposals.Generator:
    grid = (cfg.proposal_grid or None) if cfg.proposal_method == "selective_search" else None
    return proposals.Generator(cfg.proposal_method, cfg.proposal_mode, grid, cfg.proposal_rank,
                               cfg.edge_model, cfg.seed)


# ==== 3. Model ====


def other_view(x: Tensor) -> Tensor:
    """[2B, ...] with the halves exchanged: what belongs to view 1 comes to lie at view 2 of the same image."""
    return x.roll(len(x) // 2, 0)


class SiameseDETR(common.Pretext):
    """A detector whose queries carry regions of the other view. Names as released:
    patch2query, feature_align, enc_head.

    region_target "none": without f_sem; global_width: of the head of L_g, None = the transformer's, 0 = without it.
    """

    def __init__(self, detector: common.Detector, num_regions: int, *, region_target: str = "crop",
                 global_width: int | None = None, multi_view: bool = True, shared_queries: bool = False):
        super().__init__(detector)
        d, channels = detector.transformer.d_model, sum(detector.backbone[0].num_channels)
        self.num_regions, self.multi_view, self.shared_queries = num_regions, multi_view, shared_queries
        self.strides = [2 ** (int(name[-1]) + 1) for name in detector.backbone[0].layers]
        self.patch2query = nn.Linear(channels, d)
        self.feature_align = common.MLP(d, d, channels, 2) if region_target != "none" else None  # f_sem, Eq. (10)
        if width := d if global_width is None else global_width:
            levels = min(len(getattr(detector.transformer, "level_embed", [0])), 3)                            # D6
            projector = nn.Sequential(nn.Linear(levels * d, width), nn.BatchNorm1d(width),
                                      nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width),
                                      nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width))
            predictor = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width),
                                      nn.ReLU(), nn.Linear(width, width))
            self.enc_head = nn.ModuleList([nn.ModuleDict({"projector": nn.ModuleDict({"mlp": projector}),
                                                          "predictor": nn.ModuleDict({"mlp": predictor})})])
        else:
            self.enc_head = None

    def region_features(self, features: list[Tensor], rois: Tensor) -> Tensor:
        """z of Eq. (4): [2B, n, C], the mean of a 7 x 7 RoIAlign, of all levels side by side. rois [2B, n, 4] px."""
        pooled = [roi_align(f.float(), list(rois), 7, 1 / stride, sampling_ratio=-1, aligned=False).mean((2, 3))
                  for f, stride in zip(features, self.strides)]
        return torch.cat(pooled, 1).unflatten(0, rois.shape[:2])

    def crop_features(self, crops: Tensor, backbone: nn.Module) -> Tensor:
        """p of Eq. (5): [2B, n, C]. crops [2B, n, 3, p, p]."""
        return torch.cat([f.mean((2, 3)) for f in backbone(crops.flatten(0, 1))], 1).unflatten(0, crops.shape[:2])

    def forward(self, images: Tensor, mask: Tensor, rois: Tensor, source: Tensor | None = None) -> dict[str, Any]:
        """images [2B, 3, H, W], mask [2B, H, W], rois [2B, n, 4]: view 1 of all images, then view 2;
        source: see from_features."""
        return self.from_features(self.detector.backbone[0](images), mask, rois, source)

    def from_features(self, features: list[Tensor], mask: Tensor, rois: Tensor,
                      source: Tensor | None = None) -> dict[str, Any]:
        """Both directions of Eq. (6)-(8), (10) at once: image i is asked for the regions of its other view,
        or of image source[i] [2B].

        Returns the detector's outputs for 2B images, pred_features [2B, Q, C] of every layer, region_features
        z [2B, n, C] by their own view, and projection, prediction [2B, D] of the memories.
        """
        z = self.region_features(features, rois)
        asked = z[source] if source is not None else other_view(z) if self.multi_view else z
        content = self.patch2query(asked)
        queries = self.detector.conditioned_queries(
            content.repeat_interleave(len(self.detector.query_embed.weight) // self.num_regions, 1))
        if self.shared_queries:                                              # D8
            queries = queries.unflatten(0, (2, -1))[:, :1].expand(-1, len(queries) // 2, -1, -1).flatten(0, 1)
        # f_q(z + phi) against f_k(c), f_v(c), Eq. (6)(7); b_hat, Eq. (8)
        outputs = self.detector.detect(features, mask, queries)
        if self.feature_align is not None:
            for layer in (outputs, *outputs["aux_outputs"]):
                layer["pred_features"] = self.feature_align(layer["hs"]).float()  # p_hat, Eq. (10)
        outputs["region_features"] = z
        return outputs | (self.describe(outputs["memory"]) if self.enc_head is not None else {})

    def describe(self, memory: list[Tensor]) -> dict[str, Tensor]:
        """Projection and prediction [2B, D] of the mean memory; BatchNorm sees one view at a time (released)."""
        head, c = self.enc_head[0], torch.cat([m.mean((2, 3)) for m in memory[:3]], 1)
        projection = [head["projector"]["mlp"](view) for view in c.chunk(2)]
        return {"projection": torch.cat(projection).float(),
                "prediction": torch.cat([head["predictor"]["mlp"](z) for z in projection]).float()}


def build_models(cfg: Config) -> tuple[SiameseDETR, nn.Module | None]:
    """The model, and the frozen backbone that describes the crops (None: the model's own).
    Weights follow from the seed and --backbone_weights."""
    torch.manual_seed(cfg.seed)
    detector = common.build_detector(cfg, 3, focal=False, position_offset=cfg.position_offset)               # D7, D9
    if cfg.detector.startswith("deformable"):
        nn.init.xavier_uniform_(detector.query_embed.weight.data[:, cfg.hidden_dim:])  # D10: as tgt_embed
    convert.load_backbone_weights(detector.backbone[0].body, cfg.backbone_weights, cfg.arch)
    target = copy.deepcopy(detector.backbone[0]).requires_grad_(False).eval() if cfg.feature_target == "start" else None
    model = SiameseDETR(detector, cfg.num_regions, region_target=cfg.region_target if cfg.lambda_region > 0 else "none",
                        global_width=cfg.hidden_dim if cfg.lambda_global > 0 else 0,
                        multi_view=cfg.multi_view, shared_queries=cfg.shared_queries)
    if cfg.aligned_start:
        common.align_start(detector, model.patch2query)
    return model, target


# ==== 4. Loss ====


def build_criterion(cfg: Config) -> common.SetCriterion:
    """Eq. (18): any query may be matched to any region. l_box and the class loss of Eq. (9), and L_r of Eq. (12)."""
    matcher = common.HungarianMatcher(cfg.lambda_cls, cfg.lambda_l1, cfg.lambda_giou, focal=False)
    return common.SetCriterion(matcher, cfg.lambda_cls, cfg.lambda_l1, cfg.lambda_giou, eos_coef=cfg.eos_coef,
                               weight_feature=cfg.lambda_region if cfg.region_target != "none" else 0.0)


def global_loss(projection: Tensor, prediction: Tensor) -> Tensor:
    """L_g, Eq. (11), for both directions; [2B, D] each. 1 - cos rather than -cos, as released:
    0 at best, 2 for unrelated views."""
    return 2 * (1 - F.cosine_similarity(prediction, other_view(projection).detach())).mean()


def siamese_loss(cfg: Config, criterion: common.SetCriterion, outputs: dict, targets: list[dict], num_boxes: float,
                 class_weight: float | None = None, share: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (13): returns (weighted total, unweighted terms). targets: 2B, view 1 first;
    the mean over them is that of both directions (D3).

    share: the part of the whole batch these images are, for L_g, which is a mean.
    """
    # L_loc, Eq. (9), and L_r, Eq. (12), on every decoder layer
    losses, _ = criterion(outputs, targets, num_boxes, class_weight)
    total = criterion.total(losses)
    if "projection" in outputs:
        losses["loss_global"] = share * global_loss(outputs["projection"], outputs["prediction"])
        total = total + cfg.lambda_global * losses["loss_global"]
    return total, losses


def make_targets(cfg: Config, boxes: Tensor, sizes: Tensor, features: Tensor | None) -> list[dict]:
    """What each of the 2B images should contain: boxes [2B, n, 4] px of its own view, as cxcywh of its size [2B, 2];
    features [2B, n, C], which belong to the view of the queries."""
    labels = torch.ones(boxes.shape[1], dtype=torch.int64, device=boxes.device)
    boxes = box_convert(boxes, "xyxy", "cxcywh") / common.send(sizes.flip(1).repeat(1, 2), boxes.device)[:, None]
    targets = [{"labels": labels, "boxes": b} for b in boxes]
    if features is None:
        return targets
    return [{**t, "features": f} for t, f in zip(targets, other_view(features) if cfg.multi_view else features)]


# ==== 5. Training step ====


def train_step(cfg: Config, model: nn.Module, target_backbone: nn.Module | None, criterion: common.SetCriterion,
               optimizer: torch.optim.Optimizer, micro_batches: list[dict], device: torch.device) -> dict[str, Tensor]:
    """One optimiser step on cfg.accumulate micro-batches. Returns the unweighted loss terms of the whole,
    the total and the gradient norm.

    Normalisers cover all processes and micro-batches, so the gradient is that of one process on the whole batch,
    but for L_g's BatchNorm (D14).
    """
    counts = [cfg.num_regions for batch in micro_batches for _ in batch["sizes"]]
    num_boxes = common.normalizer(sum(counts), device)
    class_weight = common.normalizer(criterion.class_weight_sum(counts, cfg.num_queries), device)
    module = getattr(model, "module", model)
    optimizer.zero_grad()
    terms: dict[str, Tensor] = {}
    for i, batch in enumerate(micro_batches):
        images, mask, boxes, rois, crops = (batch[k].to(device, non_blocking=True)
                                            for k in ("images", "mask", "boxes", "rois", "crops"))
        with common.gradient_sync(model, i == len(micro_batches) - 1), common.autocast(device, cfg.amp):
            outputs = model(images, mask, rois)
            features = None
            with torch.no_grad():                                            # what L_r draws to: p, Eq. (5), or z, D13
                if cfg.region_target == "crop":
                    features = module.crop_features(crops, target_backbone or module.detector.backbone[0]).float()
                elif cfg.region_target == "object":
                    features = module.region_features((target_backbone or module.detector.backbone[0])(images), boxes)
            with torch.autocast(device.type, enabled=False):
                targets = make_targets(cfg, boxes, batch["sizes"], features)
                loss, losses = siamese_loss(cfg, criterion, outputs, targets, num_boxes, class_weight,
                                            share=1 / cfg.accumulate)
            loss.backward()
        for name, value in {"loss": loss, **losses}.items():
            share = 1 / len(micro_batches) if "error" in name else 1  # losses add up, the log values are averaged
            terms[name] = terms.get(name, 0) + share * value.detach()
    terms["grad_norm"] = common.clip_gradients(model, cfg.clip_max_norm)
    optimizer.step()
    return terms


# ==== 6. Probe ====


@torch.no_grad()
def find_regions(cfg: Config, model: nn.Module, probe_set: TwoViewDataset, device: torch.device, other: bool = False,
                 text: str = "") -> list[dict]:
    """Where the model finds the regions of one view in the other view of unseen images: {"index", "true" [k, 4],
    "found" [k, 4] cxcywh, "score" [k]} per image and direction. The most confident box of each region's queries counts;
    the overlap, always there, is left out.

    other: the queries are regions of the next image of the batch; "asked" are their own boxes.
    """
    model.eval()
    found, skip = [], int(cfg.region_choice == "top")
    for batch in evaluation.batches(probe_set, cfg.num_workers, text, collate=collate):
        count = len(batch["index"])
        true = make_targets(cfg, batch["boxes"], batch["sizes"], None)
        images = torch.arange(2 * count).view(2, count)
        # whose regions; they lie in the other view, or in the same one
        asked = images.roll(-1, 1).flatten() if other else images.flatten()
        source = other_view(asked) if cfg.multi_view else asked
        outputs = model(*(batch[k].to(device) for k in ("images", "mask", "rois")), source.to(device))
        scores, boxes, _ = evaluation.most_confident(outputs["pred_logits"], outputs["pred_boxes"], cfg.num_regions)
        found += [{"index": batch["index"][i % count], "view": i // count, "true": true[i]["boxes"][skip:].tolist(),
                   "asked": true[j]["boxes"][skip:].tolist(), "found": boxes[i, skip:].tolist(),
                   "score": scores[i, skip:].tolist()} for i, j in enumerate(asked.tolist())]
    return evaluation.gather(found)


def probe(cfg: Config, model: nn.Module, probe_source, held_out: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Mean IoU and recall at 0.5 of the most confident box per region, of the pretrained model and four
    controls, and predictions.png.

    random_boxes: of the sizes that regions have; shuffled: regions of another image as queries; wrong_image: the same
    predictions, scored on the boxes those regions really have, so what a region's feature tells by itself, of its place
    for example, without the image to look into.
    """
    probe_set = TwoViewDataset(cfg, probe_source, held_out, augment=False)
    untrained = build_models(cfg)[0].to(device)
    rows = {"untrained": find_regions(cfg, untrained, probe_set, device, text="untrained"), "random_boxes": [],
            "shuffled": find_regions(cfg, model, probe_set, device, other=True, text="shuffled"),
            "wrong_image": [], "pretrained": find_regions(cfg, model, probe_set, device, text="pretrained")}
    rows["wrong_image"] = [{**row, "true": row["asked"]} for row in rows["shuffled"]]
    if common.rank() != 0:
        return {}
    # sizes of regions, relative
    pool = np.concatenate([np.array(row["true"], np.float32)[:, 2:] for row in rows["pretrained"]])
    for i, row in enumerate(rows["pretrained"]):
        boxes = torch.from_numpy(proposals.random_boxes(np.random.default_rng([cfg.seed, i]),
                                                        (1000, 1000), len(row["true"]), pool))
        rows["random_boxes"].append({"true": row["true"],
                                     "found": data.normalized_cxcywh(boxes, (1000, 1000)).tolist()})
    draw_regions(Path(cfg.out) / "predictions.png", cfg, probe_set, rows["pretrained"])
    return {name: evaluation.found_metrics(found) for name, found in rows.items()} | {"primary": "IoU"}


def draw_regions(path: Path, cfg: Config, probe_set: TwoViewDataset, rows: list[dict], count: int = 6) -> None:
    """One row per image: the regions in view 1, in view 2, and where their queries found them in view 2."""
    images, columns = [], {"regions in view 1": [], "the same in view 2": [], "Siamese DETR in view 2": []}
    found = {(row["index"], row["view"]): row for row in rows}
    skip = int(cfg.region_choice == "top")
    for position in range(min(count, len(probe_set))):
        sample = probe_set[0, position]
        first, second = (evaluation.picture(view) for view in sample["views"])
        row = found.get((sample["index"], 1))
        if row is None:
            continue
        boxes = torch.tensor(row["found"]) * torch.tensor([second.width, second.height] * 2)
        images.append(second)
        columns["regions in view 1"].append((sample["boxes"][0, skip:], None, first))
        columns["the same in view 2"].append((sample["boxes"][1, skip:], None))
        columns["Siamese DETR in view 2"].append((evaluation.box_convert(boxes, "cxcywh", "xyxy"),
                                                  [f"{s:.2f}" for s in row["score"]]))
    evaluation.draw_boxes_figure(path, images, columns)


# ==== 7. Main ====


def check(cfg: Config) -> None:
    """What a configuration alone can be wrong in."""
    if cfg.num_queries % cfg.num_regions:
        raise UserError(f"--num_queries {cfg.num_queries} "
                        f"--num_regions {cfg.num_regions}: every region needs the same number of queries; for example "
                        f"--num_queries {max(cfg.num_queries // cfg.num_regions, 1) * cfg.num_regions}")
    if cfg.num_regions < 2 and cfg.region_choice == "top":
        raise UserError("--num_regions 1: only the overlap would be left; give at least 2")
    if not 0 < cfg.view_iou <= 1:
        raise UserError(f"--view_iou {cfg.view_iou}: must lie above 0 and not above 1")
    if cfg.lambda_global > 0 and cfg.batch_size == common.world_size() * cfg.accumulate:
        raise UserError(f"--batch_size {cfg.batch_size}: one image per process and micro-batch, but the BatchNorm of "
                        "L_g needs two; give a larger --batch_size, a smaller --accumulate, or --lambda_global 0")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = run.parse_config(Config, PRESETS, argv, script="siamese_detr",
                           description=__doc__.split("\n\n")[0], by_data=recipe_of)
    device = common.setup_distributed(cfg.device)
    check(cfg)
    out = Path(cfg.out)
    source, indices, probe_source, held_out = data.open_pretraining(cfg)
    sampler_args = {"world": common.world_size(), "rank": common.rank(), "accumulate": cfg.accumulate, "seed": cfg.seed}
    # complains about sizes before anything is written
    data.StepSampler(len(indices), cfg.batch_size, 1, **sampler_args)
    identity = run.identity("siamese_detr", len(source), source.fingerprint())
    state = run.open_run(cfg, **identity)
    steps_per_epoch = len(indices) // cfg.batch_size
    total_steps = min(cfg.epochs * steps_per_epoch, cfg.max_steps or sys.maxsize)
    if metrics := run.finished(out, state, total_steps):
        run.say(summary(metrics))
        return metrics

    store = proposals.open_store(cfg, source, proposal_generator(cfg)) if cfg.proposal_method != "random" else None
    train_set = TwoViewDataset(cfg, source, indices, store)
    model, target_backbone = build_models(cfg)
    model, target_backbone = model.to(device), target_backbone.to(device) if target_backbone else None
    optimizer = common.build_optimizer(cfg, model)
    start = run.restore(state, model, optimizer, cfg, target=target_backbone) if state else 0
    if target_backbone:
        identity["target"] = target_backbone.state_dict()
    wrapped, criterion = common.wrap_model(model, device, compiled=cfg.compile), build_criterion(cfg)
    sampler = data.StepSampler(len(indices), cfg.batch_size, total_steps, start_step=start, **sampler_args)
    batches = iter(data.make_loader(train_set, sampler, num_workers=cfg.num_workers, collate=collate))
    log, skipped, fallbacks, seen = (run.Log(out, start, device), data.SkipCount(len(source)),
                                     state.get("fallbacks", 0) if state else 0, 0)
    watch = run.FiniteWatch(out, source.key)
    run.tell_plan(cfg, len(indices), "images", steps_per_epoch, start, total_steps, device)
    bar = run.progress(range(start, total_steps), initial=start, total=total_steps, desc="pretraining")
    for step in run.until_stopped(bar):
        run.seed_step(cfg.seed, step)
        wrapped.train()
        lr = common.set_lr(optimizer, common.step_schedule(step, steps_per_epoch, (cfg.lr_drop,)))
        micro_batches = [next(batches) for _ in range(cfg.accumulate)]
        for batch in micro_batches:
            skipped.add(batch["skipped"])
            fallbacks += batch["fallback"]
            seen += len(batch["index"])
        with watch.step(step, micro_batches) as look:
            terms = train_step(cfg, wrapped, target_backbone, criterion, optimizer, micro_batches, device)
            look(terms)
        if step % cfg.log_every == 0 or step == total_steps - 1:
            watch.settle()
            line = log.write(step, terms, seen, epoch=step // steps_per_epoch, lr=lr, fallbacks=fallbacks)
            bar.set_postfix(loss=f"{line['loss']:.2f}", box=f"{line['loss_bbox']:.3f}", giou=f"{line['loss_giou']:.3f}")
            seen = 0
        if run.save_due(step + 1, total_steps, cfg.save_every):
            watch.settle()
            run.save_checkpoint(out / "last.pt", model, optimizer, step + 1, cfg, **identity, fallbacks=fallbacks)

    if fallbacks:
        run.say(f"{fallbacks} samples had no image with a proposal in the overlap after ten draws and were "
                "given random boxes (D2)")
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
    return evaluation.probe_table(metrics, ["IoU", "recall50"],
                                  "most confident box per region of the other view, unseen images (")


if __name__ == "__main__":
    run.cli(main)
