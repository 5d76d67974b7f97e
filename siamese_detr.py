"""Siamese DETR: self-supervised pretraining of a DETR by finding the regions of one view of an image in another view.

Paper: Zeren Chen, Gengshi Huang, Wei Li, Jianing Teng, Kun Wang, Jing Shao, Chen Change Loy, Lu Sheng.
    Siamese DETR. CVPR 2023, arXiv 2303.18144.

Idea: Take two overlapping views of an image, augmented differently, and regions that lie in both. Queries that carry
    the feature of a region in one view must find this region in the other view: where it is (boxes) and what it is (the
    feature of its crop). This goes both ways, with one detector. So its decoder learns to look for given content
    whatever the viewpoint and the colours, and its encoder, by a SimSiam loss on the pooled memories, to describe an
    image the same way in both views. The regions come from edge boxes; the backbone stays frozen.

Diagram:
    image --resize, flip--> outer box --> view 1, view 2 [3, H, W], IoU >= 0.5; edge boxes in both --> b1, b2 [n, 4]
                                         |                |
    b1 --jitter--> RoIAlign <-- frozen ResNet-50   frozen ResNet-50    crops of b1 --> frozen ResNet-50 --> p1 [n, 2048]
                      |                  |                |                                             |  Eq. (5)
            z1 [n, 2048], Eq. (4)     encoder          encoder -- mean --> c2 --> L_g with c1, Eq. (11) |
                      |                                   |                                             |
    Linear, each to Q/n queries, + q [Q, 256] --> decoder, Eq. (6)(7) --> q2_hat [Q, 256] --> p2_hat: L_r, Eq. (10)(12)
    (and the same from view 2 to view 1)                                              +--> b2_hat: L_loc, Eq. (8)(9)

Run:
    python siamese_detr.py --preset demo                               # CPU, nothing downloaded, 5.5 minutes
    python proposals.py --data imagenet --method edge_boxes --edge_model model.yml.gz --out proposals/imagenet-edges
    torchrun --nproc_per_node=8 siamese_detr.py --data imagenet --proposal_store proposals/imagenet-edges  # published
    python finetune.py --data voc --init_from out/siamese_detr-imagenet/last.pt
    python docs/annotate.py                                            # beside its equations: site/siamese_detr.html
    Your own images, one GPU, the rows of the paper's tables: docs/methods/siamese_detr.md

Hyperparameters: in Config below, each with its place in the paper; what data and detector change: recipe_of.

Deviations (paper / released code / here; in full in docs/methods/siamese_detr.md):
    D1  Regions: n random ones / the overlap and the n - 1 best edge boxes / as released (`--region_choice`).
    D2  No proposal in the overlap: - / the previous image / another image, 10 times, then random boxes, counted.
    D3  L_r and L_loc: sum over the two directions / mean / mean (L_g: a sum in both).
    D4  Weights of L_r, L_g: 3, 10, COCO 0.3, 3 / 3 or 5, 10, COCO 3, 0.3 / as released (`--preset paper`).
    D5  COCO: 60 epochs, drop at 40 / 120k steps = 65 epochs, 43.3 / as released (`--preset paper`).
    D6  L_g, Eq. (11): one MLP(c1) against c2 / projector and predictor of SimSiam / as released.
    D7  Classes, Eq. (18): 2 / 3 rows: row 0 unused, 1 = region, 2 = no object / as released, on every detector.
    D8  Queries of Deformable DETR: per image / those of image 0 / per image (`--shared_queries`).
    D9  Position code of Deformable DETR: - / DETR's, without -0.5 / as released (`--position_offset`).
    D10 Content queries of Deformable DETR: - / transformer.tgt_embed / the second half of query_embed.
    D11 Crops, Eq. (5): of the augmented view / of the view before its colours change, then changed / as released.
    D12 Box jitter: "following [33]" / width x (0.2 sigmoid(N(0, 1)) - 0.1), for the RoIs only / as released.
    D13 R-O (Table 3, c): target z1 / - / z1 of the unjittered box, without gradient.
    D14 BatchNorm in L_g: - / of all processes / so on CUDA, of each process on CPU; 2 images per process at least.
    D15 Demo only: `--aligned_start` (detectors.align_start).
    D16 Edges: - / OpenCV's structured forest, its file apart / without `--edge_model` ours, which the log says.
    D17 DAB-, DN-DAB-Deformable DETR (Table 6): - / - / regions go into the content, no denoising in pretraining.
    D18 Matching, Eq. (18): - / a query may be matched to any region / as released (`--match_own`: to its own only).
    D19 Start: - / random / as released (`--standardized_start N`: detectors.standardize; not Deformable DETR).
    D20 Large pictures: - / decoded whole / no finer than needed (data.ImagePyramid).

Expected: the demo logs, from step 0 to its end, loss 16.6 -> 4.0, loss_bbox 0.80 -> 0.22, loss_feature 1.71 -> 0.14.
    Paper, Table 2 (VOC AP): 58.1, from scratch 49.9, UP-DETR 56.9, DETReg 57.5. Not rerun here: no ImageNet.
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import copy
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_convert, roi_align

import convert
import data
import detectors
import evaluation
import proposals
import run
from common import UserError
from run import Count, Depth, Images, Natural, NonNegative, Pixels, Positive, Share, Width

# ==== 1. Hyperparameters ====


@dataclass
class Config(run.ProbeConfig, proposals.ProposalConfig, run.RunConfig):
    # proposals (more in proposals.ProposalConfig)
    proposal_method: Literal["edge_boxes", "selective_search", "random"] = "edge_boxes"  # Sec. 4.1; Table 4
    # images
    scales: tuple[Pixels, ...] = (320, 336, 352, 368, 400, 416, 432, 448, 464, 480)  # short side, px (released: no 384)
    max_size: Pixels = 600  # longest side, pixels (released)
    patch_size: Pixels = 128  # side of a region crop (released)
    # pretext
    view_iou: Annotated[float, run.Range(0.05, 1)] = 0.5  # least IoU of the two views (Sec. 3.2)
    num_regions: Width = 10  # n, regions per image (Sec. 4.1)
    region_choice: Literal["top", "random"] = "top"  # the overlap and the best n - 1, or n random ones (D1)
    min_area: Share = 0.05  # least area of a region, of the overlap's (released)
    box_jitter: Share = 0.1  # largest shift of an RoI's side, of the RoI's size (D12)
    match_own: bool = False  # a query may be matched only to the region that it carries (D18)
    multi_view: bool = True  # queries of one view look into the other; off: into their own (Table 3, single-view)
    aligned_start: bool = False  # begin with queries and keys that can be compared (demo; D15)
    standardized_start: Natural = 0  # images that say how the first weights standardise features (D19); 0 = off
    region_target: Literal["crop", "object", "none"] = "crop"  # what L_r draws to: p, z, nothing (Table 3: R-C, R-O)
    feature_target: Literal["current", "start"] = "current"  # the backbone that describes crops: as it is, or as it was
    shared_queries: bool = False  # queries of image 0 for the whole batch, as released for Deformable DETR (D8)
    # model
    detector: detectors.DETECTORS = "conditional_detr"  # what is pretrained (Tables 1 and 2)
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # backbone (Sec. 4.1)
    backbone_weights: str = "swav"  # swav, swav_400, imagenet, moco_v2_200, moco_v2_800, random or a file (Sec. 4.1)
    backbone_norm: Literal["frozen", "bn"] = "frozen"  # BatchNorm's statistics: constant (released) or learned
    stride: Literal[4, 8, 16, 32] = 32  # of the map that DETR and Conditional DETR see
    num_feature_levels: Depth = 4  # of deformable_detr, dab_ and dn_deformable_detr
    pre_norm: bool = False  # LayerNorm before each block, of detr (released: off)
    position_offset: Annotated[float, run.Range(-1, 1)] = 0.0  # of the sine code (D9)
    hidden_dim: Width = 256  # transformer width (released)
    nheads: Width = 8  # attention heads (released)
    enc_layers: Depth = 6  # encoder layers (released)
    dec_layers: Depth = 6  # decoder layers (released)
    dim_feedforward: Width = 2048  # width of the feed-forward layers (deformable: 1024)
    dropout: Share = 0.1  # in the transformer
    num_queries: Width = 100  # Q (Sec. 4.1; deformable: 300)
    with_box_refine: bool = False  # iterative box refinement of deformable_detr (released: off)
    # loss
    lambda_cls: NonNegative = 1.0  # cross-entropy and its matching cost, Eq. (18)
    lambda_l1: NonNegative = 5.0  # L1 part of L_loc and its matching cost
    lambda_giou: NonNegative = 2.0  # GIoU part of L_loc and its matching cost
    lambda_region: NonNegative = 5.0  # L_r, Eq. (13) (other detectors and COCO: 3; D4)
    lambda_global: NonNegative = 10.0  # L_g, Eq. (13) (COCO: 0.3; D4)
    eos_coef: NonNegative = 0.1  # class weight of "no object" (released)
    # optimisation
    batch_size: Images = 256  # images per step over all processes (Sec. 4.1; COCO: 64)
    epochs: Count = 60  # Sec. 4.1 (COCO: 65)
    lr_drop: NonNegative = 40  # epoch after which the rate is x 0.1 (Sec. 4.1; COCO: 43.3)
    lr: Positive = 1e-4  # Sec. 4.1
    lr_backbone: NonNegative = 0.0  # 0 = frozen backbone (Sec. 4.1)
    lr_linear_proj_mult: NonNegative = 1.0  # rate of sampling offsets and reference points (released: no difference)
    weight_decay: NonNegative = 1e-4  # on every parameter (released)
    clip_max_norm: NonNegative = 0.1  # gradient norm, 0 = not clipped (released)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"region_choice": "random", "epochs": 60, "lr_drop": 40},  # D1, D5; D4 in recipe_of
    "demo": {
        "data": "synthetic", "cache_proposals": True, "max_boxes": 300, "scales": (56, 64), "max_size": 90,
        "patch_size": 16, "num_regions": 5, "aligned_start": True, "feature_target": "start", "detector": "detr",
        "arch": "resnet18", "backbone_weights": "random", "backbone_norm": "bn", "lr_backbone": 1e-3, "stride": 4,
        "hidden_dim": 64, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 128, "dropout": 0.0,
        "num_queries": 5, "lambda_region": 1.0, "lambda_global": 0.1, "batch_size": 16, "epochs": 20,
        "lr_drop": 17, "lr": 1e-3, "num_workers": 2, "log_every": 50, "save_every": 500, "probe_images": 100,
    },
}


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """What the released configurations change with the data set and the detector; the printed loss weights with
    --preset paper (D4)."""
    recipe: dict[str, Any] = {}
    if "deformable" in values["detector"]:
        recipe = {"dim_feedforward": 1024, "num_queries": 300}
    released = {"lambda_region": 5.0 if values["detector"] == "conditional_detr" else 3.0, "lambda_global": 10.0}
    printed = {"lambda_region": 3.0, "lambda_global": 10.0}
    if values["data"] == "coco":
        recipe |= {"scales": tuple(range(480, 801, 32)), "max_size": 1333, "batch_size": 64, "epochs": 65,
                   "lr_drop": 43.3}
        released = {"lambda_region": 3.0, "lambda_global": 0.3}
        printed = {"lambda_region": 0.3, "lambda_global": 3.0}
    return recipe | (printed if values["preset"] == "paper" else released)


def check(cfg: Config) -> None:
    """What a configuration alone can be wrong in."""
    detectors.check_detector(cfg, views=2)
    if cfg.num_queries % cfg.num_regions:
        fitting = max(cfg.num_queries // cfg.num_regions, 1) * cfg.num_regions
        raise UserError(f"--num_queries {cfg.num_queries} --num_regions {cfg.num_regions}: every region needs the same "
                        f"number of queries; for example --num_queries {fitting}")
    if cfg.proposal_method == "random" and cfg.proposal_store:
        raise UserError("--proposal_method random uses no --proposal_store, its boxes are drawn where the two views "
                        "overlap: leave one out")
    if cfg.num_regions < 2 and cfg.region_choice == "top":
        raise UserError("--num_regions 1: only the overlap would be left; give at least 2")
    if cfg.lambda_global > 0 and cfg.batch_size == common.world_size() * cfg.accumulate:
        raise UserError(f"--batch_size {cfg.batch_size}: one image per process and micro-batch, but the BatchNorm of "
                        "L_g needs two; give a larger --batch_size, a smaller --accumulate, or --lambda_global 0")


# ==== 2. Data ====


def view_boxes(outer: tuple[float, ...], iou: float, u1: float, u2: float, swap: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Two boxes in `outer` with IoU >= `iou`, and their overlap; float64 [4] xyxy each (Sec. 3.2, Fig. 3).

    The overlap has side s of the outer box, in its middle, with (2 + t) s^2 - 2 t s - t = 0. One view reaches from it
    towards the top left corner, the other towards the bottom right; u1, u2 in 0..1 draw them back to the overlap.
    u1 = u2 = 0: the IoU is exactly t.
    """
    outer = torch.tensor(outer, dtype=torch.float64)
    s = (iou + math.sqrt(2 * iou ** 2 + 2 * iou)) / (2 + iou)
    margin = (outer[2:] - outer[:2]) * (1 - s) / 2
    overlap = torch.cat([outer[:2] + margin, outer[2:] - margin])
    first = torch.cat([outer[:2] + u1 * margin, overlap[2:]])
    second = torch.cat([overlap[:2], outer[2:] - u2 * margin])
    return (second, first, overlap) if swap else (first, second, overlap)


def view_scale(view: Tensor, hw: tuple[int, int]) -> Tensor:
    """What x1, y1, x2, y2 of the image are multiplied by in the view, which is resized to hw. [4]"""
    return (torch.tensor([hw[1], hw[0]]) / (view[2:] - view[:2])).repeat(2)


def to_view(boxes: Tensor, view: Tensor, hw: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] of the image -> pixels of the view."""
    return (boxes - view[:2].repeat(2)) * view_scale(view, hw)


def from_view(boxes: Tensor, view: Tensor, hw: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] in pixels of the view -> of the image."""
    return boxes / view_scale(view, hw) + view[:2].repeat(2)


def clip_boxes(boxes: Tensor, limits: Tensor) -> Tensor:
    """boxes [..., 4] into limits (x1, y1, x2, y2)."""
    return torch.minimum(torch.maximum(boxes, limits[:2].repeat(2)), limits[2:].repeat(2))


def jitter_boxes(boxes: Tensor, normal: Tensor, ratio: float) -> Tensor:
    """Every coordinate [..., 4] moved by (w, h, w, h) * (2 ratio sigmoid(normal) - ratio): at most `ratio` of the box
    (D12). Not clipped."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes + torch.cat([sides, sides], -1) * (2 * ratio * normal.sigmoid() - ratio)


def usable_regions(boxes: Tensor, views: tuple[Tensor, Tensor, Tensor], hw: tuple[int, int], min_area: float
                   ) -> tuple[Tensor, Tensor]:
    """Proposals [m, 4] of the image, cut to the overlap -> those that stay large enough, in pixels of view 1 and of
    view 2, [k, 4] each. min_area: of the overlap's; views: see view_boxes."""
    first, second, overlap = views
    boxes = torch.cat([torch.maximum(boxes[:, :2], overlap[:2]), torch.minimum(boxes[:, 2:], overlap[2:] - 1)], 1)
    boxes1 = to_view(boxes, first, hw)
    boxes2 = to_view(boxes, second, hw)
    whole = to_view(overlap, first, hw)
    sides = boxes1[:, 2:] - boxes1[:, :2]
    large = (sides >= 0).all(1) & (sides.prod(1) >= min_area * (whole[2:] - whole[:2]).prod())
    inside = (boxes1 >= 0).all(1) & (boxes2 >= 0).all(1) & (boxes2 <= torch.tensor([hw[1], hw[0]] * 2)).all(1)
    keep = large & inside
    return boxes1[keep], boxes2[keep]


def choose_regions(usable: tuple[Tensor, Tensor], views: tuple[Tensor, Tensor, Tensor], hw: tuple[int, int], n: int,
                   normal: Tensor, order: np.ndarray | None = None) -> Tensor:
    """n regions in both views, [2, n, 4] pixels, from the k >= 1 usable ones (D1). normal [n, 4]: N(0, 1) draws, used
    as far as needed.

    The overlap and the first n - 1; with `order`, a permutation of the k: the first n of it, without the overlap. Where
    k is too small, copies are added.
    """
    first, second, overlap = views
    candidates = torch.stack(usable)  # [2, k, 4]
    wanted = n - 1  # beside the overlap
    if order is not None:
        candidates = candidates[:, order]
        wanted = n
    chosen = candidates[:, :wanted]
    copies = shifted_copies(chosen, wanted - chosen.shape[1], views, hw, normal)
    regions = torch.cat([chosen, copies], 1)
    if order is not None:
        return regions
    whole = torch.stack([to_view(overlap, view, hw) for view in (first, second)])  # [2, 4]
    return torch.cat([whole[:, None], regions], 1)


def shifted_copies(regions: Tensor, count: int, views: tuple[Tensor, Tensor, Tensor], hw: tuple[int, int],
                   normal: Tensor) -> Tensor:
    """`count` copies of regions [2, k, 4], taken in turn: each coordinate is moved in view 1, by at most 10 % of the
    box, and clipped to the overlap; the same place in view 2. [2, count, 4]"""
    first, second, overlap = views
    in_turn = torch.arange(count) % regions.shape[1]
    limits = to_view(overlap, first, hw)
    limits[2:] -= 1  # as proposals are cut (usable_regions)
    copies1 = clip_boxes(jitter_boxes(regions[0, in_turn], normal[:count], 0.1), limits)
    copies2 = to_view(from_view(copies1, first, hw), second, hw)
    return torch.stack([copies1, copies2])


def draw_random_regions(rng: np.random.Generator, overlap: Tensor, count: int, min_area: float) -> Tensor:
    """Random boxes [m, 4] of the image inside the overlap, at least min_area of it, aspect 1/8..8 (released; Table 4,
    "random"). m <= count."""
    x1, y1, x2, y2 = overlap.tolist()
    least = min_area * (x2 - x1) * (y2 - y1)
    boxes = []
    for _ in range(10 * count):
        x = rng.integers(int(x1), max(int(x2), int(x1) + 1))
        y = rng.integers(int(y1), max(int(y2), int(y1) + 1))
        h = rng.uniform() * (y2 - 1 - y)
        room = x2 - 1 - x
        if h <= 0 or least / h > room or len(boxes) == count:
            continue
        w = rng.uniform(least / h, room)
        if 1 / 8 <= w / h <= 8:
            boxes.append((x, y, x + w, y + h))
    return torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)


def draw_fallback_regions(rng: np.random.Generator, views: tuple[Tensor, Tensor, Tensor], hw: tuple[int, int],
                          count: int, min_area: float) -> tuple[Tensor, Tensor]:
    """Regions of an image without a proposal in the overlap: random boxes in it, or its middle (D2), as usable_regions
    gives them."""
    overlap = views[2]
    boxes = draw_random_regions(rng, overlap, count, min_area)
    if not len(boxes):
        low, high = overlap[:2], overlap[2:]
        boxes = torch.cat([low * 0.75 + high * 0.25, low * 0.25 + high * 0.75])[None]
    return usable_regions(boxes, views, hw, 0.0)


class TwoViewDataset(torch.utils.data.Dataset):
    """One sample: two overlapping views of an image and n regions that lie in both (Sec. 3.2).

    Everything random is a function of (seed, epoch, index). Keys of a sample: views 2 x [3, H, W], the same size; boxes
    [2, n, 4] xyxy px, rois: the same, jittered; crops [2, n, 3, p, p]; index of the image; skipped (unreadable files);
    fallback (1 when random boxes had to stand in, D2). augment False (probe): one scale, plain colours, no jitter.
    """

    def __init__(self, cfg: Config, source, indices: np.ndarray, proposals_of: proposals.Proposals,
                 augment: bool = True):
        self.cfg, self.source, self.indices, self.proposals_of = cfg, source, indices, proposals_of
        self.scales = cfg.scales if augment else (max(cfg.scales),)
        self.needs = data.Needs(functools.partial(data.view_needs, scales=self.scales, max_size=cfg.max_size,
                                                  crop_scales=None), whole=getattr(proposals_of, "store", None) is None)
        self.jitter = cfg.box_jitter if augment else 0.0
        p = (0.8, 0.2, 0.5) if augment else (0, 0, 0)
        # as SimSiam (released)
        self.photometric = data.Photometric(0.4, 0.4, 0.4, 0.1, p_jitter=p[0], p_gray=p[1], p_blur=p[2])

    def __len__(self) -> int:
        return len(self.indices)

    def draw_views(self, rng: np.random.Generator, image: Image.Image | data.ImagePyramid, index: int, epoch: int
                   ) -> tuple:
        """-> (the image resized and flipped, its view_boxes, size of a view, the usable_regions)."""
        cfg = self.cfg
        geometry = data.draw_geometry(rng, (image.height, image.width), scales=self.scales, max_size=cfg.max_size,
                                      crop_scales=None, flip=0.5)  # one flip for both views
        geometry.hw = max(geometry.hw[0], 16), max(geometry.hw[1], 16)  # a strip of pixels has no room for two views
        boxes = torch.zeros(0, 4)
        if cfg.proposal_method != "random":
            boxes = torch.from_numpy(self.proposals_of(image, index, epoch))
        image, boxes, _ = data.apply_geometry(image, boxes, geometry)
        outer = data.draw_crop(rng, (image.height, image.width), (0.5, 1.0))  # Sec. 3.2
        u1, u2 = rng.uniform(size=2)
        views = view_boxes(outer, cfg.view_iou, u1, u2, swap=bool(rng.random() < 0.5))
        hw = outer[3] - outer[1], outer[2] - outer[0]
        if cfg.proposal_method == "random":
            boxes = draw_random_regions(rng, views[2], cfg.num_regions, cfg.min_area)
        return image, views, hw, usable_regions(boxes.double(), views, hw, cfg.min_area)

    def cut_crops(self, rng: np.random.Generator, view: Image.Image, boxes: Tensor) -> Tensor:
        """The regions [n, 4] px of a view, each with colours of its own. [n, 3, p, p]"""
        return torch.stack([data.cut_patch(view, box, self.cfg.patch_size, data.draw_photometric(rng, self.photometric))
                            for box in boxes.tolist()])

    def recolour(self, rng: np.random.Generator, view: Image.Image) -> Tensor:
        return data.to_normalized_tensor(data.apply_photometric(view, data.draw_photometric(rng, self.photometric)))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        cfg, (epoch, position) = self.cfg, key
        rng = data.sample_rng(cfg.seed, epoch, position)
        skipped: list[str] = []
        for _ in range(11):
            original, index = data.load_usable(self.source, int(self.indices[position]), rng, skipped, self.indices,
                                               min_side=16, needs=self.needs)
            image, views, hw, usable = self.draw_views(rng, original, index, epoch)
            fallback = len(usable[0]) == 0
            if not fallback:
                break
            position = int(rng.integers(len(self.indices)))
        if fallback:
            usable = draw_fallback_regions(rng, views, hw, cfg.num_regions, cfg.min_area)
        normal = torch.from_numpy(rng.standard_normal((3, cfg.num_regions, 4)))  # for copies, and RoIs of both views
        order = rng.permutation(len(usable[0])) if cfg.region_choice == "random" else None
        boxes = choose_regions(usable, views, hw, cfg.num_regions, normal[0], order)  # b1, b2: [2, n, 4]
        rois = clip_boxes(jitter_boxes(boxes, normal[1:], self.jitter), torch.tensor([0.0, 0.0, hw[1], hw[0]]))
        plain = [cut_view(image, view, hw) for view in views[:2]]
        # crops first, then the colours of the view: a region is never recoloured twice (D11)
        crops = torch.stack([self.cut_crops(rng, view, b) for view, b in zip(plain, boxes)])
        return {"views": [self.recolour(rng, view) for view in plain], "boxes": boxes.float(), "rois": rois.float(),
                "crops": crops, "index": index, "skipped": skipped, "fallback": int(fallback)}


def cut_view(image: Image.Image, view: Tensor, hw: tuple[int, int]) -> Image.Image:
    """The box `view` of an image, resized to hw."""
    return data.resize(image.crop(tuple(round(v) for v in view.tolist())), hw)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """B samples -> 2B images: view 1 of all, then view 2 of all; boxes, rois [2B, n, 4], crops [2B, n, 3, p, p] and
    sizes [2B, 2] (height, width) alike."""
    views = [{"image": s["views"][v], "target": {}, "skipped": []} for v in (0, 1) for s in samples]
    padded = data.collate(views)
    batch = {"images": padded["images"], "mask": padded["mask"],
             "sizes": torch.tensor([view["image"].shape[-2:] for view in views])}
    for name in ("boxes", "rois", "crops"):
        batch[name] = torch.stack([s[name] for s in samples], 1).flatten(0, 1)  # [2, B, n, ...] -> [2B, n, ...]
    return {**batch, "index": [s["index"] for s in samples], "skipped": [p for s in samples for p in s["skipped"]],
            "fallback": sum(s["fallback"] for s in samples)}


# ==== 3. Model ====


def other_view(x: Tensor) -> Tensor:
    """[2B, ...] with the halves exchanged: what belongs to view 1 comes to lie at view 2 of the same image."""
    return x.roll(len(x) // 2, 0)


class SiameseDETR(common.Pretext):
    """A detector whose queries carry regions of the other view. Names as released: patch2query, feature_align,
    enc_head.

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
        width = d if global_width is None else global_width
        levels = min(len(getattr(detector.transformer, "level_embed", [0])), 3)  # D6
        self.enc_head = nn.ModuleList([simsiam_head(levels * d, width)]) if width else None

    def region_features(self, features: list[Tensor], rois: Tensor) -> Tensor:
        """z of Eq. (4): [2B, n, C], the mean of a 7 x 7 RoIAlign, of all levels side by side. rois [2B, n, 4] px."""
        pooled = [roi_align(f.float(), list(rois), 7, 1 / stride, sampling_ratio=-1, aligned=False).mean((2, 3))
                  for f, stride in zip(features, self.strides)]
        return torch.cat(pooled, 1).unflatten(0, rois.shape[:2])  # Eq. (4)

    def crop_features(self, crops: Tensor, backbone: nn.Module) -> Tensor:
        """p of Eq. (5): [2B, n, C]. crops [2B, n, 3, p, p]."""
        # Eq. (5)
        return torch.cat([f.mean((2, 3)) for f in backbone(crops.flatten(0, 1))], 1).unflatten(0, crops.shape[:2])

    def forward(self, images: Tensor, mask: Tensor, rois: Tensor, source: Tensor | None = None) -> dict[str, Any]:
        """images [2B, 3, H, W], mask [2B, H, W], rois [2B, n, 4]: view 1 of all images, then view 2; source: see
        from_features."""
        return self.from_features(self.detector.backbone[0](images), mask, rois, source)

    def from_features(self, features: list[Tensor], mask: Tensor, rois: Tensor,
                      source: Tensor | None = None) -> dict[str, Any]:
        """Both directions of Eq. (6)-(8), (10) at once: image i is asked for the regions of its other view, or of image
        source[i] [2B].

        Returns the detector's outputs for 2B images, pred_features [2B, Q, C] of every layer, region_features z
        [2B, n, C] by their own view, and projection, prediction [2B, D] of the memories.
        """
        z = self.region_features(features, rois)
        if source is not None:
            asked = z[source]
        else:
            asked = other_view(z) if self.multi_view else z
        queries_per_region = len(self.detector.queries()) // self.num_regions
        content = self.patch2query(asked).repeat_interleave(queries_per_region, 1)  # [2B, Q, D]
        queries = self.detector.conditioned_queries(content)  # Eq. (7): z + phi_q
        if self.shared_queries:  # D8
            of_image_0 = queries.unflatten(0, (2, -1))[:, :1]  # [2, 1, Q, D]
            queries = of_image_0.expand(-1, len(queries) // 2, -1, -1).flatten(0, 1)
        # Eq. (6), Eq. (7): f_q(z + phi_q) against f_k(c), f_v(c); Eq. (8): b_hat
        outputs = self.detector.detect(features, mask, queries)
        if self.feature_align is not None:
            for layer in (outputs, *outputs["aux_outputs"]):
                layer["pred_features"] = self.feature_align(layer["hs"]).float()  # p_hat, Eq. (10)
        outputs["region_features"] = z
        return outputs | (self.describe(outputs["memory"]) if self.enc_head is not None else {})

    def describe(self, memory: list[Tensor]) -> dict[str, Tensor]:
        """Projection and prediction [2B, D] of the mean memory; BatchNorm sees one view at a time (released)."""
        head = self.enc_head[0]
        c = torch.cat([m.mean((2, 3)) for m in memory[:3]], 1)  # Eq. (11): c
        projection = [head["projector"]["mlp"](view) for view in c.chunk(2)]
        return {"projection": torch.cat(projection).float(),
                "prediction": torch.cat([head["predictor"]["mlp"](z) for z in projection]).float()}


def simsiam_head(channels: int, width: int) -> nn.ModuleDict:
    """Projector (three layers) and predictor (two) of L_g (D6)."""
    projector = nn.Sequential(nn.Linear(channels, width), nn.BatchNorm1d(width), nn.ReLU(),
                              nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(),
                              nn.Linear(width, width), nn.BatchNorm1d(width))
    predictor = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
    return nn.ModuleDict({"projector": nn.ModuleDict({"mlp": projector}),
                          "predictor": nn.ModuleDict({"mlp": predictor})})


def build_models(cfg: Config) -> tuple[SiameseDETR, nn.Module | None]:
    """The model, and the frozen backbone that describes the crops (None: the model's own), on CPU. Weights follow from
    the seed and --backbone_weights."""
    torch.manual_seed(cfg.seed)
    detector = detectors.build_detector(cfg, 3, focal=False, position_offset=cfg.position_offset)  # D7, D9
    if cfg.detector.startswith("deformable"):
        nn.init.xavier_uniform_(detector.query_embed.weight.data[:, cfg.hidden_dim:])  # D10: as tgt_embed
    backbone, target_backbone = detector.backbone[0], None
    convert.load_backbone_weights(backbone.body, cfg.backbone_weights, cfg.arch)
    if cfg.feature_target == "start":
        target_backbone = copy.deepcopy(backbone).requires_grad_(False).eval()
    model = SiameseDETR(detector, cfg.num_regions, region_target=cfg.region_target if cfg.lambda_region > 0 else "none",
                        global_width=cfg.hidden_dim if cfg.lambda_global > 0 else 0,
                        multi_view=cfg.multi_view, shared_queries=cfg.shared_queries)
    if cfg.aligned_start:
        detectors.align_start(detector, model.patch2query)
    return model, target_backbone


@torch.no_grad()
def standardize_start(cfg: Config, model: SiameseDETR, train_set: TwoViewDataset, device: torch.device) -> None:
    """Let the first weights see standardised features, the map's and the regions' own (D19)."""
    backbone, maps, regions = model.detector.backbone[0].eval(), [], []
    for position in data.evenly_spread(len(train_set), cfg.standardized_start):
        sample = train_set[0, position]
        features = backbone(torch.stack(sample["views"]).to(device))
        maps.append(features[-1].flatten(2).transpose(1, 2).flatten(0, 1))  # [2*H*W, C]
        regions.append(model.region_features(features, sample["rois"].to(device)).flatten(0, 1))  # [2n, C]
    detectors.standardize(model.detector.input_proj, torch.cat(maps))
    detectors.standardize(model.patch2query, torch.cat(regions))


# ==== 4. Loss ====


def build_criterion(cfg: Config) -> common.SetCriterion:
    """Eq. (18): any query may be matched to any region, or (D18) to its own only. l_box and the class loss of Eq. (9),
    and L_r of Eq. (12)."""
    matcher = common.HungarianMatcher(cfg.lambda_cls, cfg.lambda_l1, cfg.lambda_giou, focal=False,
                                      within_groups=cfg.match_own)  # Eq. (18)
    return common.SetCriterion(matcher, cfg.lambda_cls, cfg.lambda_l1, cfg.lambda_giou, eos_coef=cfg.eos_coef,
                               weight_feature=cfg.lambda_region if cfg.region_target != "none" else 0.0)  # Eq. (13)


def make_targets(cfg: Config, boxes: Tensor, sizes: Tensor, features: Tensor | None) -> list[dict]:
    """What each of the 2B images should contain: boxes [2B, n, 4] px of its own view, as cxcywh of its size [2B, 2];
    features [2B, n, C], which belong to the view of the queries."""
    labels = torch.ones(boxes.shape[1], dtype=torch.int64, device=boxes.device)
    sizes_whwh = sizes.flip(1).repeat(1, 2)[:, None]  # [2B, 1, 4]
    targets = [{"labels": labels, "boxes": b} for b in box_convert(boxes, "xyxy", "cxcywh") / sizes_whwh]
    if features is None:
        return targets
    if cfg.multi_view:
        features = other_view(features)  # Eq. (12): p_1 for p2_hat
    return [{**t, "features": f} for t, f in zip(targets, features)]


def global_loss(projection: Tensor, prediction: Tensor) -> Tensor:
    """L_g, Eq. (11), for both directions; [2B, D] each. 1 - cos rather than -cos, as released: 0 at best, 2 for
    unrelated views."""
    return 2 * (1 - F.cosine_similarity(prediction, other_view(projection).detach())).mean()  # Eq. (11)


def siamese_loss(cfg: Config, criterion: common.SetCriterion, outputs: dict, targets: list[dict], num_boxes: float,
                 class_weight: float | None = None, share: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (13): returns (weighted total, unweighted terms). targets: 2B, view 1 first; the mean over them is that of
    both directions (D3).

    num_boxes, class_weight: this process's normalisers (common.normalizer); share: the part of the whole batch that
    these images are, for L_g, which is a mean.
    """
    # Eq. (9): L_loc, and Eq. (12): L_r, on every decoder layer
    losses, _ = criterion(outputs, targets, num_boxes, class_weight)
    total = criterion.total(losses)
    if "projection" in outputs:
        losses["loss_global"] = share * global_loss(outputs["projection"], outputs["prediction"])
        total = total + cfg.lambda_global * losses["loss_global"]  # Eq. (13)
    return total, losses


# ==== 5. Training step ====


@torch.no_grad()
def target_features(cfg: Config, model: SiameseDETR, backbone: nn.Module, batch: dict) -> Tensor | None:
    """What L_r draws to, [2B, n, C] by their own view: p of the crops, Eq. (5), or z of the unjittered boxes (D13)."""
    if cfg.region_target == "crop":
        return model.crop_features(batch["crops"], backbone).float()
    if cfg.region_target == "object":
        return model.region_features(backbone(batch["images"]), batch["boxes"])
    return None


def train_step(cfg: Config, model: nn.Module, target_backbone: nn.Module | None, criterion: common.SetCriterion,
               optimizer: torch.optim.Optimizer, micro_batches: list[dict], device: torch.device) -> dict[str, Tensor]:
    """One optimiser step on cfg.accumulate micro-batches. Returns the unweighted loss terms of the whole, the total and
    the gradient norm.

    Normalisers cover all processes and micro-batches, so the gradient is that of one process on the whole batch, but
    for L_g's BatchNorm (D14).
    """
    counts = [cfg.num_regions for batch in micro_batches for _ in batch["images"]]
    num_boxes = common.normalizer(sum(counts), device)
    class_weight = common.normalizer(criterion.class_weight_sum(counts, cfg.num_queries), device)
    module = getattr(model, "module", model)
    backbone = module.detector.backbone[0] if target_backbone is None else target_backbone
    terms: dict[str, Tensor] = {}
    optimizer.zero_grad()
    for i, batch in enumerate(micro_batches):
        batch = common.batch_to_device(batch, device)
        with common.gradient_sync(model, i == len(micro_batches) - 1), common.autocast(device, cfg.amp):
            outputs = model(batch["images"], batch["mask"], batch["rois"])
            features = target_features(cfg, module, backbone, batch)
            with torch.autocast(device.type, enabled=False):
                targets = make_targets(cfg, batch["boxes"], batch["sizes"], features)
                loss, losses = siamese_loss(cfg, criterion, outputs, targets, num_boxes, class_weight,
                                            share=1 / cfg.accumulate)
            common.backward(loss, optimizer, cfg.amp)
        common.add_terms(terms, {"loss": loss, **losses}, len(micro_batches))
    terms["grad_norm"] = common.clip_and_step(model, optimizer, cfg.amp, cfg.clip_max_norm)
    return terms


# ==== 6. Probe ====


@torch.no_grad()
def find_regions(cfg: Config, model: nn.Module, probe_set: TwoViewDataset, device: torch.device, other: bool = False,
                 text: str = "") -> list[dict]:
    """Where the model finds the regions of one view in the other view of unseen images: {"index", "view", "true"
    [k, 4], "found" [k, 4] cxcywh, "score" [k]} per image and direction. The most confident box of each region's queries
    counts; the overlap, always there, is left out.

    other: the queries are regions of the next image of the batch; "asked" are their own boxes.
    """
    model.eval()
    found, skip = [], int(cfg.region_choice == "top")
    for batch in evaluation.probe_batches(probe_set, cfg.num_workers, text, collate=collate):
        count = len(batch["index"])
        true = [t["boxes"][skip:].tolist() for t in make_targets(cfg, batch["boxes"], batch["sizes"], None)]
        images = torch.arange(2 * count).view(2, count)  # [view, image]
        # whose regions; they lie in the other view, or in the same one
        asked = images.roll(-1, 1).flatten() if other else images.flatten()
        source = other_view(asked) if cfg.multi_view else asked
        outputs = model(*(x.to(device) for x in (batch["images"], batch["mask"], batch["rois"], source)))
        scores, boxes, _ = evaluation.most_confident(outputs["pred_logits"], outputs["pred_boxes"], cfg.num_regions)
        found += [{"index": batch["index"][i % count], "view": i // count, "true": true[i], "asked": true[j],
                   "found": boxes[i, skip:].tolist(), "score": scores[i, skip:].tolist()}
                  for i, j in enumerate(asked.tolist())]
    return evaluation.gather(found)


def open_probe(cfg: Config, probe_source, held_out: np.ndarray) -> TwoViewDataset:
    return TwoViewDataset(cfg, probe_source, held_out, proposals.Proposals(cfg), augment=False)


def probe(cfg: Config, model: nn.Module, probe_source, held_out: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Mean IoU and recall at 0.5 of the most confident box per region, before and after, with the controls of
    evaluation.localization_table, and predictions.png. All processes call it; rank 0 alone gets a table.

    random_boxes: of the sizes that regions have. shuffled: regions of another image as queries.
    """
    probe_set = open_probe(cfg, probe_source, held_out)
    untrained = build_models(cfg)[0].to(device)
    find = functools.partial(find_regions, cfg, probe_set=probe_set, device=device)
    rows = evaluation.before_and_after(find, untrained, model)
    if common.rank() != 0:
        return {}
    pool = np.concatenate([np.array(row["true"], np.float32)[:, 2:] for row in rows["pretrained"]])  # relative w, h

    def random_boxes(i: int, row: dict) -> Tensor:
        rng = np.random.default_rng([cfg.seed, i])
        boxes = proposals.random_boxes(rng, (1000, 1000), len(row["true"]), pool)
        return data.normalized_cxcywh(torch.from_numpy(boxes), (1000, 1000))

    draw_regions(Path(cfg.out) / "predictions.png", cfg, probe_set, rows["pretrained"])
    return evaluation.localization_table(rows, random_boxes)


def draw_regions(path: Path, cfg: Config, probe_set: TwoViewDataset, rows: list[dict], count: int = 6) -> None:
    """One row per image: the regions in view 1, in view 2, and where their queries found them in view 2."""
    found = {row["index"]: row for row in rows if row["view"] == 1}
    cells, skip = [], int(cfg.region_choice == "top")
    for position in range(min(count, len(probe_set))):
        sample = probe_set[0, position]
        if row := found.get(sample["index"]):
            first, second = (evaluation.to_image(view) for view in sample["views"])
            boxes1, boxes2 = sample["boxes"][:, skip:]
            boxes = box_convert(torch.tensor(row["found"]), "cxcywh", "xyxy")
            boxes = boxes * torch.tensor([second.width, second.height] * 2)
            cells.append([(first, boxes1, None), (second, boxes2, None),
                          (second, boxes, [f"{score:.2f}" for score in row["score"]])])
    evaluation.draw_rows(path, ("regions in view 1", "the same in view 2", "Siamese DETR in view 2"), cells)


def summary(metrics: dict[str, Any]) -> str:
    title = "most confident box per region of the other view, unseen images ("
    return evaluation.probe_table(metrics, ["IoU", "recall50"], title)


# ==== 7. Main ====


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = run.parse_config(Config, PRESETS, argv, script="siamese_detr", description=__doc__, recipe=recipe_of)
    device = common.setup_distributed(cfg.device)
    check(cfg)
    source, indices, probe_source, held_out = data.open_pretraining(cfg)
    job = run.Run(cfg, "siamese_detr", source, len(indices), device, summary)
    if job.metrics:
        return job.metrics
    online = cfg.proposal_method == "random"  # regions are drawn in the overlap, there is nothing to store
    proposals_of = proposals.Proposals(cfg) if online else proposals.open_proposals(cfg, source)
    train_set = TwoViewDataset(cfg, source, indices, proposals_of)
    model, target_backbone = (m.to(device) if m else None for m in build_models(cfg))
    if cfg.standardized_start and job.start == 0:
        standardize_start(cfg, model, train_set, device)
    optimizer, criterion = common.build_optimizer(cfg, model), build_criterion(cfg)
    job.restore(model, optimizer, target=target_backbone)
    wrapped = common.wrap_model(model, device, compiled=cfg.compile, checkpointed=cfg.checkpoint_activations)
    loader = data.train_loader(job, train_set, collate)
    kept = evaluation.KeptSamples(open_probe(cfg, probe_source, held_out))
    find = functools.partial(find_regions, cfg, probe_set=kept, device=device)
    for step in job.steps():
        wrapped.train()
        lr = common.set_lr(optimizer, common.step_schedule(step, job.epoch_steps, (cfg.lr_drop,)))
        micro_batches = job.next_batches(loader)
        terms = train_step(cfg, wrapped, target_backbone, criterion, optimizer, micro_batches, device)
        job.check(step, terms, micro_batches)
        job.log(step, terms, "loss", "loss_bbox", "loss_giou", lr=lr)
        job.probe(step, functools.partial(evaluation.localization_line, find))
        job.save(step)
    if job.fallbacks:
        run.print_rank0(f"{int(job.fallbacks)} samples had no image with a proposal in the overlap after ten draws and "
                        "were given random boxes (D2)")
    common.broadcast_buffers(model)
    return job.end(probe(cfg, model, probe_source, held_out, device) if len(held_out) else {})


if __name__ == "__main__":
    run.cli(main)
