"""DUPR: self-supervised pretraining of a backbone by telling images and patches of images apart, at every depth.

Paper: Jian Ding, Enze Xie, Hang Xu, Chenhan Jiang, Zhenguo Li, Ping Luo, Gui-Song Xia. Deeply Unsupervised Patch
    Re-Identification for Pre-training Object Detectors. TPAMI 2022, arXiv 2103.04814. Its code was never released: this
    is built from the paper, on MoCo v2 (Chen et al., arXiv 2003.04297), whose numbers and checkpoints it reproduces.

Idea: Two random crops of an image overlap; the overlap, seen in both crops, is cut into S x S patches. A patch must be
    told from the patches of all other images by its features in the other crop (patch re-identification), as MoCo v2
    does with whole images. So features keep where things are, which a detector needs and a pooled vector forgets. Both
    tasks are set at several stages of the ResNet, not only at its end: a detector reads those stages too. As in MoCo,
    keys come from a slowly moving copy of the network, negatives from queues of earlier keys.

Diagram:
    image --crop, colours, flip--> view 1 [3, 224, 224], view 2; their overlap: boxes B1, B2 [4] px of each view
      view 1 --ResNet q--> conv2..conv5 --mean--> image head --> v1 [128] ------------+--> L_g, Eq. (6): v1 against v2
                             +--RoIAlign(B1) S x S--> patch head --> r1 [128, S, S] --|    and a queue, on each level
      view 2, shuffled over processes --ResNet k, a moving average of q--> v2, r2 ----+--> L_p, Eq. (5): r1 against r2
                                           at the same place and a queue, on conv4 (14 x 14) and on conv5 (7 x 7)
    a flipped view's grid is mirrored back, so that (i, j) is the same place of the image in both

Run:
    python dupr.py --preset demo                                       # CPU, nothing downloaded, about 4 minutes
    torchrun --nproc_per_node=8 dupr.py --data imagenet                # the published recipe, batch 256
    torchrun --nproc_per_node=8 finetune.py --data voc --detector faster_rcnn_c4 --init_from out/dupr-imagenet/last.pt
    python docs/annotate.py                                            # beside its equations: site/dupr.html
    Your own images, the paper's figures, the rows of its tables: docs/methods/dupr.md

Hyperparameters: in Config below, each with its place in the paper. `--preset paper`: as printed (D1, D2).

Deviations and choices where the paper is silent (paper / here; D9 to D13 are MoCo's; in full in docs/methods/dupr.md):
    D1  RoI sizes: 14 on conv5, 7 on conv4 in Implementation Details, 7 and 14 in Sec. 4.1 / the latter.
    D2  Eq. (5): sum over patches / mean, or conv4 would weigh 196 images (`--patch_reduction`).
    D3  Eq. (6): the mean of the map itself / through MoCo v2's head of two layers, per level.
    D4  Patch head: a 1x1 MLP of unsaid depth / two layers, as the image head; its own weights.
    D5  Views without overlap: - / left out by the patch loss only; patches of the whole view enter the queue.
    D6  Flips: - / a flipped view's grid is mirrored; without it half of the pairs would join wrong places.
    D7  RoIAlign: - / aligned; without it the views of a flipped pair lie half a cell apart.
    D8  A level of weight 0 has no head and no queue. The mean over valid pairs is that of all processes.
    D9  Queue sizes: a multiple of the batch / any. One process: refused / runs, without shuffling.
    D10 The shuffle: drawn on rank 0 and sent / drawn by every process from (seed, step).
    D11 BatchNorm is never synchronised: shuffling the key batch needs statistics of each process.
    D12 The patch loss's gradient: each process has that of its own queries; keys carry none, queues neither.
    D13 `--accumulate` n: n micro-batches of 32 images, MoCo's batch on a GPU, are n processes.
    D14 Large pictures: decoded whole / no finer than needed (data.ImagePyramid).

Expected: at the first step each L_g and L_p starts near ln(queue size + 1) = 11.09 (demo: 6.2) and falls once the queue
    holds real keys. Paper, Table 3 (Faster R-CNN C4, VOC, AP): 58.5; MoCo v2 57.0; supervised 53.5. Table 9 (Mask R-CNN
    FPN 1x, COCO): 40.0 / 36.2. Not rerun here.
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import contextlib
import copy
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

import convert
import data
import evaluation
import run
from common import UserError
from run import Count, Images, NonNegative, Positive, Share, Width

# ==== 1. Hyperparameters ====

PositiveShare = Annotated[float, run.Range(0, 1, open=True)]
BN_GROUP = 32  # images that share BatchNorm's statistics: a batch of 256 on MoCo's 8 GPUs (D13)


@dataclass
class Config(run.ProbeConfig, run.RunConfig):
    least_micro_batch: ClassVar[int] = BN_GROUP
    # images
    image_size: Annotated[int, run.Range(32, 2**14)] = 224  # side of a view, pixels (MoCo v2); 32: stride of conv5
    crop_area: tuple[PositiveShare, ...] = (0.2, 1.0)  # share of the image that a view shows (MoCo v2)
    # pretext
    alpha: tuple[NonNegative, ...] = (0.1, 0.4, 0.7, 1.0)  # weight of the image loss on conv2..conv5, Eq. (2) (Table 1)
    beta: tuple[NonNegative, ...] = (0.0, 0.0, 1.0, 1.0)  # weight of the patch loss on conv2..conv5, Eq. (2) (Table 2)
    roi_sizes: tuple[run.Cells, ...] = (56, 28, 14, 7)  # S on conv2..conv5 (Sec. 4.1; D1)
    patch_reduction: Literal["mean", "sum"] = "mean"  # over the patches of a pair, Eq. (5) (D2)
    min_overlap: Annotated[float, run.Range(0, 2**14)] = 1.0  # least side of the overlap in either view, pixels (D5)
    embedding_dim: Width = 128  # of images and patches (MoCo)
    temperature: Positive = 0.2  # of both losses (Implementation Details)
    queue_size: Annotated[int, run.Range(1, 10**7)] = 65536  # keys per queue (Implementation Details)
    queued_patches: Width = 4  # patches of an image that enter a queue (Implementation Details)
    ema_momentum: Share = 0.999  # of the key encoder (MoCo)
    logit_rows: Count = 2048  # queries compared with a queue at once: bounds the memory, changes nothing else
    # model
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # backbone (Implementation Details)
    backbone_weights: str = "random"  # start: random, imagenet, moco_v2_200, moco_v2_800, swav, swav_400 or a file
    # optimisation
    batch_size: Images = 256  # images per step over all processes (Implementation Details)
    epochs: Count = 200  # Implementation Details (Table 6, COCO: 2000)
    schedule: Literal["cosine", "step"] = "cosine"  # of the learning rate, changed once per epoch (MoCo)
    lr_drops: tuple[NonNegative, ...] = (120, 160)  # epochs after which the rate is x 0.1, with --schedule step (MoCo)
    lr: Positive = 0.06  # Implementation Details (ablations: 0.03)
    sgd_momentum: Share = 0.9  # MoCo
    weight_decay: NonNegative = 1e-4  # on every parameter (MoCo)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"roi_sizes": (56, 28, 7, 14), "patch_reduction": "sum"},  # D1, D2
    "demo": {
        "data": "synthetic", "image_size": 64, "roi_sizes": (16, 8, 4, 2), "embedding_dim": 64, "queue_size": 512,
        "ema_momentum": 0.99, "arch": "resnet18", "batch_size": 32, "epochs": 20, "lr": 0.01, "num_workers": 2,
        "log_every": 25, "save_every": 250, "probe_images": 200,
    },
}
LEVELS = ("conv2", "conv3", "conv4", "conv5")  # the paper's names of layer1..layer4; strides 4, 8, 16, 32


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    return {"epochs": 2000} if values["data"] == "coco" else {}  # Table 6


def check(cfg: Config) -> None:
    """What a configuration alone can be wrong in."""
    run.check_pair(cfg, "crop_area")
    for name in ("alpha", "beta", "roi_sizes"):
        values = getattr(cfg, name)
        if len(values) != len(LEVELS):
            raise UserError(f"--{name} {' '.join(map(str, values))}: give four values, for {', '.join(LEVELS)}")
    if not any(cfg.alpha) and not any(cfg.beta):
        raise UserError("--alpha and --beta are all 0: there is nothing to learn; give at least one level a weight")
    group, processes = cfg.batch_size // (common.world_size() * cfg.accumulate), common.world_size()
    if cfg.accumulate > 1 and group != BN_GROUP:
        near = max(round(cfg.batch_size / (processes * BN_GROUP)), 1)
        raise UserError(f"--accumulate {cfg.accumulate}: BatchNorm would see {group} images at a time rather than the "
                        f"published {BN_GROUP}, which is another method (D13); give --accumulate {near} with "
                        f"--batch_size {near * processes * BN_GROUP}")
    if cfg.min_overlap > cfg.image_size:
        raise UserError(f"--min_overlap {cfg.min_overlap}: no overlap is larger than a view of {cfg.image_size} pixels")
    if cfg.batch_size == common.world_size():
        raise UserError(f"--batch_size {cfg.batch_size}: one image per process, "
                        "but BatchNorm needs two; give a larger one")


# ==== 2. Data ====

COLOURS = data.Photometric(0.4, 0.4, 0.4, 0.1, p_jitter=0.8, p_gray=0.2, p_blur=0.5)  # MoCo v2


def draw_view(rng: np.random.Generator, hw: tuple[int, int], area: tuple[float, ...],
              colours: data.Photometric) -> dict[str, Any]:
    """What happens to one view: crop (x1, y1, x2, y2) px of the image, colours, flip."""
    return {"crop": data.draw_crop(rng, hw, tuple(area)), "colours": data.draw_photometric(rng, colours),
            "flip": bool(rng.random() < 0.5)}


def apply_view(image: Image.Image | data.ImagePyramid, draw: dict[str, Any], size: int) -> Tensor:
    """Crop, resize to size x size, colours, flip: MoCo v2's order. [3, size, size]"""
    view = data.cut(image, draw["crop"], (size, size))
    view = data.apply_photometric(view, draw["colours"])
    return data.to_normalized_tensor(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw["flip"] else view)


def overlap_boxes(crops: list[tuple[float, ...]], flips: list[bool], size: int,
                  min_overlap: float = 1.0) -> tuple[Tensor, bool]:
    """B1, B2 of Sec. 3.2: the overlap of two crops (x1, y1, x2, y2) of an image, as boxes [2, 4] xyxy px of the two
    views, after their flips.

    Returns (boxes, whether there is an overlap with sides of at least min_overlap px in both views). Without one the
    boxes are the whole views (D5).
    """
    crop = torch.tensor(crops, dtype=torch.float64)  # [2, 4]
    overlap = torch.cat([crop[:, :2].max(0).values, crop[:, 2:].min(0).values])  # [4]
    scale = size / (crop[:, 2:] - crop[:, :2])
    boxes = (overlap - crop[:, :2].repeat(1, 2)) * scale.repeat(1, 2)
    sides = boxes[:, 2:] - boxes[:, :2]
    if not (sides >= max(min_overlap, 1e-9)).all():
        return torch.tensor([[0.0, 0.0, size, size]] * 2), False
    return torch.stack([data.flip_boxes(b, size) if flip else b for b, flip in zip(boxes, flips)]).float(), True


def patch_boxes(box: Tensor, flip: bool, size: int) -> Tensor:
    """The size * size patches [n, 4] xyxy px of the overlap `box` [4] of a view, row by row as (i, j) counts them."""
    x = torch.linspace(float(box[0]), float(box[2]), size + 1)
    y = torch.linspace(float(box[1]), float(box[3]), size + 1)
    i, j = torch.arange(size).repeat_interleave(size), torch.arange(size).repeat(size)
    j = size - 1 - j if flip else j
    return torch.stack([x[j], y[i], x[j + 1], y[i + 1]], 1)


class TwoCropsDataset(torch.utils.data.Dataset):
    """One sample: two views of an image and their overlap in each. Random as a function of (seed, epoch, index).

    Keys: views [2, 3, S, S], boxes [2, 4] xyxy px of each view, flips bool [2], valid, index of the image, skipped
    (unreadable files).
    """

    def __init__(self, cfg: Config, source, indices: np.ndarray):
        self.cfg, self.source, self.indices, self.photometric = cfg, source, indices, COLOURS
        self.needs = data.Needs(functools.partial(data.crop_needs, side=cfg.image_size, area=cfg.crop_area))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        cfg, (epoch, position) = self.cfg, key
        rng = data.sample_rng(cfg.seed, epoch, position)
        skipped: list[str] = []
        image, index = data.load_usable(self.source, int(self.indices[position]), rng, skipped, self.indices,
                                        needs=self.needs)
        draws = [draw_view(rng, (image.height, image.width), cfg.crop_area, self.photometric) for _ in range(2)]
        flips = [draw["flip"] for draw in draws]
        boxes, valid = overlap_boxes([draw["crop"] for draw in draws], flips, cfg.image_size, cfg.min_overlap)
        views = torch.stack([apply_view(image, draw, cfg.image_size) for draw in draws])
        return {"views": views, "boxes": boxes, "flips": torch.tensor(flips), "valid": valid, "index": index,
                "skipped": skipped}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """views [B, 2, 3, S, S], boxes [B, 2, 4], flips bool [B, 2], valid bool [B], lists."""
    return {**{name: torch.stack([s[name] for s in samples]) for name in ("views", "boxes", "flips")},
            "valid": torch.tensor([s["valid"] for s in samples]), "index": [s["index"] for s in samples],
            "skipped": [path for s in samples for path in s["skipped"]]}


# ==== 3. Model ====


class Encoder(nn.Module):
    """A ResNet with an image head and a patch head on every level that has a weight. The body keeps torchvision's names
    (conv1, bn1, layer1, ..).

    body: modules that are run one after another; levels: {name of a child of body: (level's name, channels, stride)}.
    """

    def __init__(self, body: nn.Module, levels: dict[str, tuple[str, int, int]], alpha: dict[str, float],
                 beta: dict[str, float], roi_sizes: dict[str, int], dim: int, mlp: bool = True):
        super().__init__()
        self.stages, self.levels, self.roi_sizes = [name for name, _ in body.named_children()], levels, roi_sizes
        for name, stage in body.named_children():
            self.add_module(name, stage)
        self.image_heads, self.patch_heads = nn.ModuleDict(), nn.ModuleDict()
        for level, channels, _ in levels.values():
            if alpha[level] > 0:  # D3; mlp False: MoCo v1
                hidden = [nn.Linear(channels, channels), nn.ReLU()] if mlp else []
                self.image_heads[level] = nn.Sequential(*hidden, nn.Linear(channels, dim))
            if beta[level] > 0:  # the MLP of Eq. (3) and (4); D4
                self.patch_heads[level] = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(),
                                                        nn.Conv2d(channels, dim, 1))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Maps [B, C, H/s, W/s] of the levels, f of Eq. (3)."""
        outputs = common.run_stages(((name, getattr(self, name)) for name in self.stages), images, tuple(self.levels))
        return {level: out for (level, _, _), out in zip(self.levels.values(), outputs)}

    def forward(self, images: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """images [B, 3, S, S], boxes [B, 4] xyxy px -> {"image_<level>": v [B, dim], "patch_<level>": r [B, dim, S,
        S]}, unit length, grids not mirrored."""
        maps = self.features(images)
        embeddings = {}
        for level, head in self.image_heads.items():
            embeddings[f"image_{level}"] = F.normalize(head(maps[level].mean((2, 3))).float(), dim=1)  # Eq. (6): v
        strides = {level: stride for level, _, stride in self.levels.values()}
        for level, head in self.patch_heads.items():  # MLP(RoIAlign(f, B)), Eq. (3) of view 1, Eq. (4) of view 2; D7
            patches = roi_align(maps[level].float(), list(boxes[:, None]), self.roi_sizes[level], 1 / strides[level],
                                sampling_ratio=-1, aligned=True)
            embeddings[f"patch_{level}"] = F.normalize(head(patches).float(), dim=1)
        return embeddings


def mirror_patches(embeddings: dict[str, Tensor], flips: Tensor) -> dict[str, Tensor]:
    """Grids of patches [B, dim, S, S] of flipped views, seen as if they had not been flipped (D6); flips bool [B]."""
    return {name: torch.where(flips[:, None, None, None], e.flip(-1), e) if e.dim() == 4 else e
            for name, e in embeddings.items()}


class Queue(nn.Module):
    """The last K keys, [dim, K], one per column (MoCo); random unit vectors before any has come."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """keys [n, dim] take the place of the oldest; more than K of them: the last K stay."""
        size = self.keys.shape[1]
        places = (self.ptr + torch.arange(len(keys), device=keys.device))[-size:] % size  # D9
        self.keys[:, places] = keys[-size:].T.to(self.keys)
        self.ptr[0] = (self.ptr + len(keys)) % size


class DUPR(nn.Module):
    """Query encoder, key encoder and queues. Names of the encoders as MoCo has them: encoder_q, encoder_k."""

    def __init__(self, encoder: Encoder, queue_size: int, dim: int):
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        names = [*(f"image_{level}" for level in encoder.image_heads),
                 *(f"patch_{level}" for level in encoder.patch_heads)]
        self.queues = nn.ModuleDict({name: Queue(dim, queue_size) for name in names})

    def update_key_encoder(self, momentum: float) -> None:
        """k = m k + (1 - m) q."""
        common.update_average(self.encoder_k, self.encoder_q, momentum)

    def forward(self, views: Tensor, boxes: Tensor, flips: Tensor,
                keys: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """views [B, 2, 3, S, S], boxes [B, 2, 4], flips [B, 2] of this process; keys: of view 2, if they are made.

        Returns queries of view 1 and keys of view 2, as Encoder.forward: (i, j) of both is the same place.
        """
        queries = mirror_patches(self.encoder_q(views[:, 0], boxes[:, 0]), flips[:, 0])  # Eq. (3): r_1
        return queries, self.encode_keys([views], [boxes], [flips])[0] if keys is None else keys

    @torch.no_grad()
    def encode_keys(self, views: list[Tensor], boxes: list[Tensor], flips: list[Tensor],
                    permutation: Tensor | None = None) -> list[dict[str, Tensor]]:
        """Keys of view 2 of this process's micro-batches: the key encoder on images mixed from all processes
        and micro-batches, so that its BatchNorm tells nothing about a query's batch (shuffle-BN, MoCo, Sec. 3.3).

        Boxes go with their images. With permutation None, or a single micro-batch in all, nothing is shuffled: it would
        change nothing.
        """
        images, boxes = [v[:, 1] for v in views], [b[:, 1] for b in boxes]
        shuffled = permutation is not None and common.world_size() * len(views) > 1
        if shuffled:
            images, boxes = ([all_gather(parts)[order] for order in local_parts(permutation, len(views))]
                             for parts in (images, boxes))
        made = []
        for i, pair in enumerate(zip(images, boxes)):
            with common.kept_statistics(self.encoder_k) if i else contextlib.nullcontext():  # D13
                made.append(self.encoder_k(*pair))
        if shuffled:
            whole = {name: all_gather([part[name] for part in made]) for name in made[0]}
            made = [{name: e[order] for name, e in whole.items()}
                    for order in local_parts(permutation.argsort(), len(views))]
        return [mirror_patches(part, f[:, 1]) for part, f in zip(made, flips)]  # Eq. (4): r_2

    @torch.no_grad()
    def enqueue(self, keys: dict[str, Tensor], positions: dict[str, Tensor]) -> None:
        """Keys of all processes, in rank order, so that every process has the same queues. positions {"patch_<level>":
        [B, n]}: which of the S * S patches of each image enter."""
        for name, key in keys.items():
            if name in positions:
                rows = key.flatten(2).transpose(1, 2)  # [B, S * S, dim]
                key = rows.gather(1, positions[name][..., None].expand(-1, -1, rows.shape[2])).flatten(0, 1)
            self.queues[name].enqueue(all_gather([key]))


def all_gather(parts: list[Tensor]) -> Tensor:
    """Tensors [n, ...] of all micro-batches and processes, without gradient; n is the same of all. In the order of the
    batch: micro-batch by micro-batch, of each rank by rank."""
    world = common.world_size()
    gathered = [torch.empty_like(x) for x in parts for _ in range(world)] if world > 1 else parts
    for a, x in enumerate(parts if world > 1 else ()):
        torch.distributed.all_gather(gathered[a * world:(a + 1) * world], x.contiguous())
    return torch.cat(gathered)


def local_parts(order: Tensor, micro_batches: int) -> list[Tensor]:
    """Of the images of the whole batch, in this order, those that fall to each micro-batch of this process."""
    return list(order.chunk(common.world_size() * micro_batches)[common.rank()::common.world_size()])


def draw_permutation(seed: int, step: int, n: int) -> Tensor:
    """The shuffle of the n images of a step, the same on every process (D10)."""
    return torch.from_numpy(np.random.default_rng([4, seed, step]).permutation(n))


def draw_positions(keys: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """`count` distinct patches of each image and level, uniformly, by torch's generator (run.seed_step)."""
    drawn = {}
    for name, key in keys.items():
        if key.dim() == 4:
            order = torch.rand(len(key), key[0, 0].numel()).argsort(1)  # [B, S * S]
            drawn[name] = common.to_device(order[:, :count], key.device)
    return drawn


def build_model(cfg: Config) -> DUPR:
    """Weights follow from the seed and --backbone_weights."""
    torch.manual_seed(cfg.seed)
    last = max(i for i in range(4) if cfg.alpha[i] or cfg.beta[i])  # stages behind the last loss would learn nothing
    backbone = common.Backbone(cfg.arch, tuple(range(1, last + 2)), "bn", trainable=5)
    convert.load_backbone_weights(backbone.body, cfg.backbone_weights, cfg.arch)
    levels = {f"layer{i + 1}": (LEVELS[i], backbone.num_channels[i], 4 * 2 ** i) for i in range(last + 1)}
    per_level = (dict(zip(LEVELS, values)) for values in (cfg.alpha, cfg.beta, cfg.roi_sizes))
    return DUPR(Encoder(backbone.body, levels, *per_level, cfg.embedding_dim), cfg.queue_size, cfg.embedding_dim)


# ==== 4. Loss ====


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float, rows: int = 2048) -> Tensor:
    """Eq. (1): [n] losses of queries [n, dim] whose positives are keys [n, dim] and whose negatives are the columns of
    queue [dim, K].

    The n x K logits of conv4's patches are 1.6 GB at 32 images: only `rows` queries' are held at a time, and computed
    again for the gradient.
    """
    def negatives(part: Tensor) -> Tensor:  # log of the sum over the queue, [rows]
        return (part @ queue / temperature).logsumexp(1)

    positive = (query * key).sum(1) / temperature
    chunked = len(query) > rows and torch.is_grad_enabled()
    parts = [checkpoint(negatives, part, use_reentrant=False) if chunked else negatives(part)
             for part in query.split(rows)]
    return torch.logaddexp(positive, torch.cat(parts)) - positive  # Eq. (1)


def dupr_loss(cfg: Config, queries: dict[str, Tensor], keys: dict[str, Tensor], queues: dict[str, Queue],
              valid: Tensor, num_valid: float, share: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (2): returns (weighted total, unweighted terms image_<level>, patch_<level>). valid bool [B]: pairs with an
    overlap (D5); num_valid: their number over all processes and micro-batches / processes; share: the part of a
    process's images that these are, for the image loss, which is a mean."""
    total, terms = torch.zeros((), device=valid.device), {}
    for level, alpha, beta in zip(LEVELS, cfg.alpha, cfg.beta):
        if alpha > 0:
            name = f"image_{level}"
            losses = info_nce(queries[name], keys[name], queues[name].keys, cfg.temperature, cfg.logit_rows)  # [B]
            terms[name] = share * losses.mean()  # Eq. (6)
            total = total + alpha * terms[name]  # Eq. (2)
        if beta > 0:  # a patch against itself in view 2 and patches of other images
            name = f"patch_{level}"
            query, key = (e[name].permute(0, 2, 3, 1).flatten(0, 2) for e in (queries, keys))  # [B * S * S, dim]
            losses = info_nce(query, key, queues[name].keys, cfg.temperature, cfg.logit_rows)
            losses = losses.view(len(valid), -1)  # [B, S * S]
            pairs = losses.mean(1) if cfg.patch_reduction == "mean" else losses.sum(1)  # D2
            terms[name] = (pairs * valid).sum() / num_valid  # Eq. (5)
            total = total + beta * terms[name]  # Eq. (2)
    return total, terms


# ==== 5. Training step ====


def lr_factor(cfg: Config, step: int, steps_per_epoch: float) -> float:
    """MoCo's schedule: changed once per epoch, no warm-up, never 0. A pure function of the step."""
    if cfg.schedule == "step":
        return common.step_schedule(step, steps_per_epoch, cfg.lr_drops)
    epoch = step // steps_per_epoch
    return 0.5 * (1 + math.cos(math.pi * epoch / cfg.epochs))


def build_optimizer(cfg: Config, model: DUPR) -> torch.optim.Optimizer:
    groups = [{"params": list(model.encoder_q.parameters()), "base_lr": cfg.lr}]
    return torch.optim.SGD(groups, cfg.lr, momentum=cfg.sgd_momentum, weight_decay=cfg.weight_decay,
                           fused=common.can_fuse(model))


def train_step(cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[dict], step: int,
               device: torch.device) -> dict[str, Tensor]:
    """One step in MoCo's order, on n micro-batches as on n times as many processes (D13). Returns the unweighted loss
    terms, the total, the share of pairs without an overlap and the gradient norm."""
    module, share = getattr(model, "module", model), 1 / len(micro_batches)
    num_valid = common.normalizer(sum(sum(batch["valid"].tolist()) for batch in micro_batches), device)
    batches = common.batch_to_device(micro_batches, device)
    permutation = draw_permutation(cfg.seed, step, len(batches) * len(batches[0]["views"]) * common.world_size())
    module.update_key_encoder(cfg.ema_momentum)  # before the keys are made
    terms: dict[str, Tensor] = {}
    optimizer.zero_grad()
    with common.autocast(device, cfg.amp):
        all_keys = module.encode_keys(*([batch[name] for batch in batches] for name in ("views", "boxes", "flips")),
                                      common.to_device(permutation, device))
    for i, (batch, keys) in enumerate(zip(batches, all_keys)):
        with (common.gradient_sync(model, i == len(batches) - 1),
              common.kept_statistics(module.encoder_q) if i else contextlib.nullcontext()):
            with common.autocast(device, cfg.amp):
                queries, _ = model(batch["views"], batch["boxes"], batch["flips"], keys)
            # against the queues as they were
            loss, losses = dupr_loss(cfg, queries, keys, module.queues, batch["valid"], num_valid, share)
            common.backward(loss, optimizer, cfg.amp)
        no_overlap = share * (~batch["valid"]).float().mean()
        common.add_terms(terms, {"loss": loss, **losses, "no_overlap": no_overlap}, len(batches))
    for keys in all_keys:
        module.enqueue(keys, draw_positions(keys, cfg.queued_patches))
    terms["grad_norm"] = common.clip_and_step(model, optimizer, cfg.amp)
    return terms


# ==== 6. Probe ====


@torch.no_grad()
def match_patches(model: DUPR, probe_set: TwoCropsDataset, num_workers: int, device: torch.device, other: bool = False,
                  text: str = "") -> list[dict]:
    """Are the patches of view 1 found again in view 2 of unseen images? By their r, Eq. (3), from the query encoder;
    queues play no part.

    Per image with an overlap {"index", "patch_<level>", "own_<level>": shares of its S * S patches that are right,
    "image_<level>", "found" [S * S]}. patch: the most alike of all patches of the batch's images is the one at the same
    place of the same image; own, found: of those of its image; image: view 2 is the most alike of the batch's. other:
    view 1 is that of the next image, so what a patch's place gives away is left in `own`.
    """
    model.eval()
    found = []
    for batch in evaluation.probe_batches(probe_set, num_workers, text, collate=collate):
        views, boxes, flips = (batch[name].to(device) for name in ("views", "boxes", "flips"))
        first, second = (mirror_patches(model.encoder_q(views[:, i], boxes[:, i]), flips[:, i]) for i in (0, 1))
        if other:
            first = {name: e.roll(-1, 0) for name, e in first.items()}
        rows = [{"index": index, "valid": bool(v)} for index, v in zip(batch["index"], batch["valid"])]
        for name in first:
            query, key = (e[name].flatten(2).transpose(1, 2) if e[name].dim() == 4 else e[name][:, None]
                          for e in (first, second))  # [B, places, dim]; of an image there is one place
            places = torch.arange(query.shape[1])
            for i, row in enumerate(rows):
                # of each patch to every patch of every image, [places, B, places]
                similarity = torch.einsum("pc,kqc->pkq", query[i], key).cpu()
                best = similarity.flatten(1).argmax(1)
                row[name] = (best == i * len(places) + places).float().mean().item()
                if name.startswith("patch"):
                    best_own = similarity[:, i].argmax(1)  # [S * S]
                    row[name.replace("patch", "own")] = (best_own == places).float().mean().item()
                    row["found"] = best_own.tolist()
        found += [row for row in rows if row["valid"]]
    return evaluation.gather(found)


def match_metrics(rows: list[dict]) -> dict[str, float]:
    """Means over images: "patch", "own_image" over all levels and per level; "image": of the last level."""
    if not rows:
        raise UserError("no two views of any probe image overlap: give more --probe_images")
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if "_" in name}
    patch, own, image = ([mean for name, mean in means.items() if name.startswith(start)]
                         for start in ("patch_", "own_", "image_"))
    over_levels = {"patch": float(np.mean(patch)), "own_image": float(np.mean(own))} if patch else {}
    per_level = {name: mean for name, mean in means.items() if not name.startswith("image_")}
    return over_levels | per_level | ({"image": image[-1]} if image else {})


def probe(cfg: Config, model: DUPR, probe_source, held_out: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Accuracy of finding the corresponding patch, before and after, and predictions.png. All processes call it; rank 0
    alone gets a table."""
    probe_set = TwoCropsDataset(cfg, probe_source, held_out)
    untrained = build_model(cfg).to(device)
    find = functools.partial(match_patches, probe_set=probe_set, num_workers=cfg.num_workers, device=device)
    rows = evaluation.before_and_after(find, untrained, model)
    if common.rank() != 0:
        return {}
    if any(cfg.beta):
        plot_matches(Path(cfg.out) / "predictions.png", cfg, probe_set, rows["pretrained"])
    table = {name: match_metrics(found) for name, found in rows.items()}
    return table | {"primary": "patch" if any(cfg.beta) else "image"}


def plot_matches(path: Path, cfg: Config, probe_set: TwoCropsDataset, rows: list[dict],
                 count: int = 6, shown: int = 4) -> None:
    """One row per image: patches of view 1, where they are in view 2, and where the features of the last level found
    them."""
    size = next(s for s, b in zip(cfg.roi_sizes[::-1], cfg.beta[::-1]) if b > 0)
    found = {row["index"]: np.array(row["found"]) for row in rows}
    cells = []
    for position in range(len(probe_set)):
        sample = probe_set[0, position]
        index = sample["index"]
        if index not in found or len(cells) == count:
            continue
        first, second = (evaluation.to_image(view) for view in sample["views"])
        patches1, patches2 = (patch_boxes(box, bool(flip), size) for box, flip in zip(sample["boxes"], sample["flips"]))
        picked = np.random.default_rng([cfg.seed, index]).permutation(size * size)[:shown]
        cells.append([(first, patches1[picked], None), (second, patches2[picked], None),
                      (second, patches2[found[index][picked]], None)])
    evaluation.draw_rows(path, ("patches of view 1", "the same in view 2", "DUPR in view 2"), cells)


def summary(metrics: dict[str, Any]) -> str:
    columns = list(metrics.get("pretrained", {}))
    title = "share of patches found again in another view, among those of up to 9 unseen images ("
    return evaluation.probe_table(metrics, columns, title)


# ==== 7. Main ====


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = run.parse_config(Config, PRESETS, argv, script="dupr", description=__doc__, recipe=recipe_of)
    device = common.setup_distributed(cfg.device)
    check(cfg)
    source, indices, probe_source, held_out = data.open_pretraining(cfg)
    job = run.Run(cfg, "dupr", source, len(indices), device, summary)
    if job.metrics:
        return job.metrics
    train_set = TwoCropsDataset(cfg, source, indices)
    model = build_model(cfg).to(device)
    optimizer = build_optimizer(cfg, model)
    job.restore(model, optimizer, sync_bn=False)
    wrapped = common.wrap_model(model, device, sync_bn=False, compiled=cfg.compile,  # D11
                                checkpointed=cfg.checkpoint_activations)
    loader = data.train_loader(job, train_set, collate)
    kept = evaluation.KeptSamples(TwoCropsDataset(cfg, probe_source, held_out))
    find = functools.partial(match_patches, probe_set=kept, num_workers=0, device=device)
    for step in job.steps():
        wrapped.train()
        lr = common.set_lr(optimizer, lr_factor(cfg, step, job.epoch_steps))
        micro_batches = job.next_batches(loader)
        terms = train_step(cfg, wrapped, optimizer, micro_batches, step, device)
        job.check(step, terms, micro_batches)
        job.log(step, terms, "loss", *(name for name in terms if name.endswith("conv5")), lr=lr)
        job.probe(step, functools.partial(evaluation.retrieval_line, find, match_metrics,
                                          ("patch", "own_image") if any(cfg.beta) else ("image",)))
        job.save(step)
    common.broadcast_buffers(model)
    return job.end(probe(cfg, model, probe_source, held_out, device) if len(held_out) else {})


if __name__ == "__main__":
    run.cli(main)
