"""DUPR: self-supervised pretraining of a detector's backbone by telling images apart, and patches of images,
at every depth of the network.

Paper: Jian Ding, Enze Xie, Hang Xu, Chenhan Jiang, Zhenguo Li, Ping Luo, Gui-Song Xia.
    Deeply Unsupervised Patch Re-Identification for Pre-training Object Detectors. TPAMI 2022, arXiv 2103.04814. Its
    code was never released: this is built from the paper, on MoCo v2 (Chen et al., arXiv 2003.04297), whose released
    numbers and checkpoints it reproduces.

Idea: Two random crops of an image overlap; the overlap, seen in both crops, is cut into S x S patches. A patch must be
    told from the patches of all other images by its features in the other crop (patch re-identification), as MoCo v2
    does with whole images. So features keep where things are, which a detector needs and a pooled vector forgets. Both
    tasks are set at several stages of the ResNet, not only at its end: a detector reads those stages too. As in MoCo,
    keys come from a slowly moving copy of the network, negatives from queues of earlier keys.

Diagram:
    image --crop, colours, flip--> view 1 [3, 224, 224], view 2; their overlap: boxes B1, B2 [4] px of each view
        view 1 --ResNet q--> conv2..conv5 --mean--> image head --> v1 [128] ----------------+--> L_g, Eq. (6), against v2 and a queue, each level
                              |                                                             |
                              +--RoIAlign(B1) S x S--> patch head 1x1 --> r1 [128, S, S] ---|--> L_p, Eq. (5), against r2 at the same place and a
        view 2 --ResNet k, a moving average of q, its batch shuffled over processes--> v2, r2 -+     queue; conv4 (14 x 14) and conv5 (7 x 7)
    a flipped view's grid is mirrored back, so that (i, j) is the same place of the image in both

Run:
    python dupr.py --preset demo                                           # CPU, nothing downloaded, about 4 minutes
    python dupr.py --preset demo --data MY_IMAGES                          # the same small model on your own images
    torchrun --nproc_per_node=8 dupr.py --data imagenet                    # the published recipe, batch 256
    torchrun --nproc_per_node=8 finetune.py --data voc --detector faster_rcnn_c4 --init_from out/dupr-imagenet/last.pt
    python detreg.py --data imagenet100 --backbone_weights out/dupr-imagenet/last.pt      # a backbone for the DETR family
    python figures.py iou-similarity --checkpoint dupr=out/dupr-imagenet/last.pt moco_v2 --data voc      # Fig. 5; affinity, match, neighbours too

    Tables 1 and 2 (with --lr 0.03): --alpha 0 0 0 1 --beta 0 0 0 0 is MoCo v2; --alpha 0 0 1 1 | 1 1 1 1 --beta 0 0 0
        0; --beta 0 0 0 0; --beta 0 0 0 1 --roi_sizes 56 28 14 3 | 7; --beta 0 0 0 1; patches only:
        --alpha 0 0 0 0 --beta 0 0 0 1.

Hyperparameters (default; where from):
    views         crop of 20..100 % of the area, 224 px, MoCo v2's colours        Sec. 3.2, "we follow [5]"
    levels        alpha 0.1, 0.4, 0.7, 1; beta 0, 0, 1, 1                         Implementation Details, Eq. (2)
    patches       14 x 14 on conv4, 7 x 7 on conv5; 4 per image enter the queue   Sec. 4.1; Implementation Details
    contrast      temperature 0.2, queues of 65536, 128 dimensions                Implementation Details; MoCo v2
    optimiser     SGD 0.06, momentum 0.9, weight decay 1e-4, batch 256            Implementation Details; MoCo
    schedule      200 epochs, cosine per epoch; key encoder 0.999                 Implementation Details; MoCo

Deviations and choices where the paper is silent (paper / here; the last four are MoCo's):
    D1  RoI sizes: 14 on conv5, 7 on conv4 in Implementation Details, 7 and 14 in Sec. 4.1 and Table 2 / the latter:
        equal rows of Table 2 (a), (b) and Table 3 show that the published numbers have it, and it is the size of the
        maps (`--preset paper`: the former).
    D2  Eq. (5): sum over patches / mean: with the sum conv4 would weigh 196 images and alpha would not matter, but
        Table 2 (b), (c) show that it does (`--patch_reduction sum`, `--preset paper`).
    D3  Eq. (6): the mean of the map itself / through MoCo v2's head of two layers, per level:
        Table 1's first row is MoCo v2 to the digit.
    D4  Patch head: a 1x1 MLP of unsaid depth / two layers, as the image head; its own weights.
    D5  Views without overlap (up to 1 % of pairs): not said / the patch loss leaves them out, the image loss keeps
        them; their keys are patches of the whole view and enter the queue, so that it moves by the same number on every
        process. `--min_overlap` px: what counts as overlap; the 1 % of pairs below 16 px are several patches off, as
        RoIAlign clamps at borders, all others 0.05 (conv4) and 0.09 (conv5) on average.
    D6  Flips: not said / a flipped view's grid is mirrored; without it half of the pairs would join wrong places.
    D7  RoIAlign: not said / aligned: without it the two views of a flipped pair lie half a cell
        apart in opposite directions.
    D8  A level of weight 0 has no head and no queue. The mean over valid pairs is that of all processes.
    D9  Queue sizes need not be a multiple of the batch (MoCo: asserted); one process runs too,
        without shuffling (MoCo: refused).
    D10 MoCo draws the shuffle on rank 0 and sends it / every process draws it from (seed, step).
    D11 BatchNorm is never synchronised: shuffling the key batch is MoCo's way, and needs statistics of each process.
    D12 The patch loss's gradient: each process has that of its own queries; keys carry none, queues neither.

Expected: at the first step each L_g and L_p starts near ln(queue size + 1) = 11.09 (demo:
    6.2) and falls once the queue holds real keys.
    Paper, Table 3 (Faster R-CNN C4, VOC, AP): 58.5; MoCo v2 57.0; supervised 53.5. Table 9 (Mask R-CNN FPN 1x, COCO):
    40.0 / 36.2. Not rerun here.
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
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

import convert
import data
import evaluation
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
    out: str | None = None  # output folder; else out/dupr-<preset or data>
    preset: str | None = None  # paper or demo
    # images
    image_size: int = 224  # side of a view, pixels (MoCo v2)
    crop_area: tuple[float, ...] = (0.2, 1.0)  # share of the image that a view shows (MoCo v2)
    # pretext
    alpha: tuple[float, ...] = (0.1, 0.4, 0.7, 1.0)  # weight of the image loss on conv2..conv5, Eq. (2) (Table 1)
    beta: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)  # weight of the patch loss on conv2..conv5, Eq. (2) (Table 2)
    roi_sizes: tuple[int, ...] = (56, 28, 14, 7)  # S on conv2..conv5 (Sec. 4.1; D1)
    patch_reduction: Literal["mean", "sum"] = "mean"  # over the patches of a pair, Eq. (5) (D2)
    min_overlap: float = 1.0  # least side of the overlap in either view, pixels (D5)
    embedding_dim: int = 128  # of images and patches (MoCo)
    temperature: float = 0.2  # of both losses (Implementation Details)
    queue_size: int = 65536  # keys per queue (Implementation Details)
    queued_patches: int = 4  # patches of an image that enter a queue (Implementation Details)
    ema_momentum: float = 0.999  # of the key encoder (MoCo)
    logit_rows: int = 2048  # queries compared with a queue at once: bounds the memory, changes nothing else
    # model
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # what is pretrained (Implementation Details)
    backbone_weights: str = "random"  # start: random, imagenet, moco_v2, swav or a file
    # optimisation
    batch_size: int = 256  # images per step over all processes (Implementation Details)
    accumulate: int = 1  # must stay 1: BatchNorm, queues and key encoder see whole batches
    epochs: int = 200  # Implementation Details (Table 6, COCO: 2000)
    schedule: Literal["cosine", "step"] = "cosine"  # of the learning rate, changed once per epoch (MoCo)
    lr_drops: tuple[float, ...] = (120, 160)  # epochs after which the rate is x 0.1, with --schedule step (MoCo)
    lr: float = 0.06  # Implementation Details (ablations: 0.03)
    sgd_momentum: float = 0.9  # MoCo
    weight_decay: float = 1e-4  # on every parameter (MoCo)
    amp: Literal["off", "bf16"] = "off"  # autocast; RoIAlign and losses stay fp32
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
    probe_data: str | None = None  # other images to match patches in, as --data; else held-out ones
    probe_images: int = 0  # images of the probe, held out from training; 0 = no probe


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"roi_sizes": (56, 28, 7, 14), "patch_reduction": "sum"},       # D1, D2
    "demo": {
        "data": "synthetic", "image_size": 64, "roi_sizes": (16, 8, 4, 2), "embedding_dim": 64, "queue_size": 512,
        "ema_momentum": 0.99, "arch": "resnet18", "batch_size": 32, "epochs": 20, "lr": 0.01, "num_workers": 2,
        "log_every": 25, "save_every": 250, "probe_images": 200,
    },
}
LEVELS = ("conv2", "conv3", "conv4", "conv5")  # the paper's names of layer1..layer4; strides 4, 8, 16, 32


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    return {"epochs": 2000} if values["data"] == "coco" else {}              # Table 6


# ==== 2. Data ====

COLOURS = data.Photometric(0.4, 0.4, 0.4, 0.1, p_jitter=0.8, p_gray=0.2, p_blur=0.5)                          # MoCo v2


def draw_view(rng: np.random.Generator, hw: tuple[int, int], area: tuple[float, ...],
              spec: data.Photometric) -> dict[str, Any]:
    """What happens to one view: crop (x1, y1, x2, y2) px of the image, colours, flip."""
    return {"crop": data.draw_crop(rng, hw, tuple(area)), "colours": data.draw_photometric(rng, spec),
            "flip": bool(rng.random() < 0.5)}


def apply_view(image: Image.Image, draw: dict[str, Any], size: int) -> Tensor:
    """Crop, resize to size x size, colours, flip: MoCo v2's order. [3, size, size]"""
    view = data.resize(image.crop(draw["crop"]), (size, size))
    view = data.apply_photometric(view, draw["colours"])
    return data.to_normalized_tensor(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw["flip"] else view)


def overlap_boxes(crops: list[tuple[float, ...]], flips: list[bool], size: int,
                  min_overlap: float = 1.0) -> tuple[Tensor, bool]:
    """B1, B2 of Sec. 3.2: the overlap of two crops (x1, y1, x2, y2) of an image, as boxes [2, 4] xyxy px of the two
    views, after their flips.

    Returns (boxes, whether there is an overlap with sides of at least min_overlap px in both views).
    Without one the boxes are the whole views (D5).
    """
    crop = torch.tensor(crops, dtype=torch.float64)                          # [2, 4]
    both = torch.cat([crop[:, :2].max(0).values, crop[:, 2:].min(0).values])
    scale = size / (crop[:, 2:] - crop[:, :2])
    boxes = (both - crop[:, :2].repeat(1, 2)) * scale.repeat(1, 2)
    valid = bool(((boxes[:, 2:] - boxes[:, :2]) >= max(min_overlap, 1e-9)).all())
    if not valid:
        return torch.tensor([[0.0, 0.0, size, size]] * 2), False
    return torch.stack([data.flip_boxes(b, size) if flip else b for b, flip in zip(boxes, flips)]).float(), True


class TwoCropsDataset(torch.utils.data.Dataset):
    """One sample: two views of an image and their overlap in each. Random as a function of (seed, epoch, index).

    Keys: views [2, 3, S, S], boxes [2, 4] xyxy px of each view, flips bool [2], valid, index of the image,
    skipped (unreadable files).
    """

    def __init__(self, cfg: Config, source, indices: np.ndarray):
        self.cfg, self.source, self.indices, self.photometric = cfg, source, indices, COLOURS

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        cfg, (epoch, position) = self.cfg, key
        rng = data.sample_rng(cfg.seed, epoch, position)
        skipped: list[str] = []
        image, index = data.load_usable(self.source, int(self.indices[position]), rng, skipped, self.indices)
        draws = [draw_view(rng, (image.height, image.width), cfg.crop_area, self.photometric) for _ in range(2)]
        boxes, valid = overlap_boxes([d["crop"] for d in draws], [d["flip"] for d in draws],
                                     cfg.image_size, cfg.min_overlap)
        return {"views": torch.stack([apply_view(image, d, cfg.image_size) for d in draws]), "boxes": boxes,
                "flips": torch.tensor([d["flip"] for d in draws]), "valid": valid, "index": index, "skipped": skipped}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """views [B, 2, 3, S, S], boxes [B, 2, 4], flips bool [B, 2], valid bool [B], lists."""
    joined = {k: torch.stack([s[k] for s in samples]) for k in ("views", "boxes", "flips")}
    return joined | {"valid": torch.tensor([s["valid"] for s in samples]), "index": [s["index"] for s in samples],
                     "skipped": [path for s in samples for path in s["skipped"]]}


# ==== 3. Model ====


class Encoder(nn.Module):
    """A ResNet with an image head and a patch head on every level that has a weight.
    The body keeps torchvision's names (conv1, bn1, layer1, ..).

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
            if alpha[level] > 0:                                             # D3; mlp False: MoCo v1
                hidden = [nn.Linear(channels, channels), nn.ReLU()] if mlp else []
                self.image_heads[level] = nn.Sequential(*hidden, nn.Linear(channels, dim))
            if beta[level] > 0:                                              # g of Eq. (3) and (4); D4
                self.patch_heads[level] = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(),
                                                        nn.Conv2d(channels, dim, 1))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Maps [B, C, H/s, W/s] of the levels, f of Eq. (3)."""
        outputs = common.run_stages(((name, getattr(self, name)) for name in self.stages), images, tuple(self.levels))
        return {level: out for (level, _, _), out in zip(self.levels.values(), outputs)}

    def forward(self, images: Tensor, boxes: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """images [B, 3, S, S], boxes [B, 4] xyxy px -> v {level: [B, dim]} and r {level:
        [B, dim, S, S]}, unit length, grids not mirrored."""
        maps = self.features(images)
        v = {level: F.normalize(head(maps[level].mean((2, 3))).float(), dim=1)
             for level, head in self.image_heads.items()}
        r = {}
        for level, _, stride in self.levels.values():
            if level in self.patch_heads:  # MLP(RoIAlign(f, B)), Eq. (3) of view 1, Eq. (4) of view 2; D7
                patches = roi_align(maps[level].float(), list(boxes[:, None]), self.roi_sizes[level], 1 / stride,
                                    sampling_ratio=-1, aligned=True)
                r[level] = F.normalize(self.patch_heads[level](patches).float(), dim=1)
        return v, r


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
        places = (self.ptr + torch.arange(len(keys), device=keys.device))[-size:] % size                      # D9
        self.keys[:, places] = keys[-size:].T.to(self.keys)
        self.ptr[0] = (self.ptr + len(keys)) % size


class DUPR(nn.Module):
    """Query encoder, key encoder and queues. Names of the encoders as MoCo has them: encoder_q, encoder_k."""

    def __init__(self, encoder: Encoder, queue_size: int, dim: int):
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        kinds = [f"{kind}_{level}"
                 for kind, heads in (("image", encoder.image_heads), ("patch", encoder.patch_heads)) for level in heads]
        self.queues = nn.ModuleDict({kind: Queue(dim, queue_size) for kind in kinds})

    def update_key_encoder(self, momentum: float) -> None:
        """k = m k + (1 - m) q."""
        common.update_average(self.encoder_k, self.encoder_q, momentum)

    def forward(self, views: Tensor, boxes: Tensor, flips: Tensor,
                permutation: Tensor | None = None) -> tuple[dict, dict]:
        """views [B, 2, 3, S, S], boxes [B, 2, 4], flips [B, 2] of this process; permutation:
        of all processes' images (see encode_keys).

        Returns queries of view 1 and keys of view 2, {"image_<level>": [B, dim], "patch_<level>": [B, dim, S, S]}:
        (i, j) of both is the same place.
        """
        queries = named(*self.encoder_q(views[:, 0], boxes[:, 0]), flips[:, 0])
        with torch.no_grad():
            keys = named(*self.encode_keys(views[:, 1], boxes[:, 1], permutation), flips[:, 1])
        return queries, keys

    def encode_keys(self, images: Tensor, boxes: Tensor, permutation: Tensor | None) -> tuple[dict, dict]:
        """The key encoder on images of mixed processes, so that its BatchNorm tells nothing about a query's batch
        (shuffle-BN, MoCo, Sec. 3.3).

        Boxes go with their images. With one process, or permutation None, nothing is shuffled: it would change nothing.
        """
        if permutation is None or common.world_size() == 1:
            return self.encoder_k(images, boxes)
        def mine(order: Tensor) -> Tensor:
            return order.view(common.world_size(), -1)[common.rank()]
        v, r = self.encoder_k(all_gather(images)[mine(permutation)], all_gather(boxes)[mine(permutation)])
        back = mine(permutation.argsort())
        return tuple({level: all_gather(e)[back] for level, e in embeddings.items()} for embeddings in (v, r))

    @torch.no_grad()
    def enqueue(self, keys: dict[str, Tensor], positions: dict[str, Tensor]) -> None:
        """Keys of all processes, in rank order, so that every process has the same queues. positions {"patch_<level>":
        [B, n]}: which of the S * S patches of each image enter."""
        for kind, key in keys.items():
            if kind in positions:
                rows = key.flatten(2).transpose(1, 2)                        # [B, S * S, dim]
                key = rows.gather(1, positions[kind][..., None].expand(-1, -1, rows.shape[2])).flatten(0, 1)
            self.queues[kind].enqueue(all_gather(key))


def mirror(grid: Tensor, flips: Tensor) -> Tensor:
    """Grids [B, C, S, S] of flipped views, seen as if they had not been flipped (D6)."""
    return torch.where(flips[:, None, None, None], grid.flip(-1), grid)


def named(v: dict[str, Tensor], r: dict[str, Tensor], flips: Tensor) -> dict[str, Tensor]:
    return {f"image_{level}": e for level, e in v.items()} | {f"patch_{level}": mirror(e, flips)
                                                              for level, e in r.items()}


def all_gather(x: Tensor) -> Tensor:
    """The tensors [n, ...] of all processes, in rank order, without gradient; n is the same on each."""
    if common.world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(common.world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def draw_permutation(seed: int, step: int, n: int) -> Tensor:
    """The shuffle of the n images of a step, the same on every process (D10)."""
    return torch.from_numpy(np.random.default_rng([4, seed, step]).permutation(n))


def draw_positions(keys: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """`count` distinct patches of each image and level, uniformly, by torch's generator (run.seed_step)."""
    drawn = {}
    for kind, key in keys.items():
        if key.dim() == 4:
            drawn[kind] = common.send(torch.rand(len(key), key[0, 0].numel()).argsort(1)[:, :count], key.device)
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
    """Eq. (1): [n] losses of queries [n, dim] whose positives are keys [n, dim] and whose negatives are the
    columns of queue [dim, K].

    The n x K logits of conv4's patches are 1.6 GB at 32 images: only `rows` queries' are held at a time,
    and computed again for the gradient.
    """
    def negatives(part: Tensor) -> Tensor:                                   # log of the sum over the queue, [rows]
        return (part @ queue / temperature).logsumexp(1)
    positive = (query * key).sum(1) / temperature
    chunked = len(query) > rows and torch.is_grad_enabled()
    parts = [checkpoint(negatives, part, use_reentrant=False) if chunked else negatives(part)
             for part in query.split(rows)]
    return torch.logaddexp(positive, torch.cat(parts)) - positive


def dupr_loss(cfg: Config, queries: dict[str, Tensor], keys: dict[str, Tensor], queues: dict[str, Queue],
              valid: Tensor, num_valid: float
              ) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (2): returns (weighted total, unweighted terms image_<level>, patch_<level>). valid bool [B]: pairs with an
    overlap (D5); num_valid: their number over all processes / processes."""
    total, terms = torch.zeros((), device=valid.device), {}
    for level, alpha, beta in zip(LEVELS, cfg.alpha, cfg.beta):
        if alpha > 0:                                                        # Eq. (6)
            kind = f"image_{level}"
            terms[kind] = info_nce(queries[kind], keys[kind], queues[kind].keys, cfg.temperature, cfg.logit_rows).mean()
            total = total + alpha * terms[kind]
        if beta > 0:  # Eq. (5): a patch against itself in view 2 and patches of other images
            kind = f"patch_{level}"
            q, k = (e[kind].permute(0, 2, 3, 1).flatten(0, 2) for e in (queries, keys))  # [B * S * S, dim]
            # [B, S * S]
            losses = info_nce(q, k, queues[kind].keys, cfg.temperature, cfg.logit_rows).view(len(valid), -1)
            pairs = losses.mean(1) if cfg.patch_reduction == "mean" else losses.sum(1)                        # D2
            terms[kind] = (pairs * valid).sum() / num_valid
            total = total + beta * terms[kind]
    return total, terms


# ==== 5. Training step ====


def lr_factor(cfg: Config, step: int, steps_per_epoch: int) -> float:
    """MoCo's schedule: changed once per epoch, no warm-up, never 0. A pure function of the step."""
    epoch = step // steps_per_epoch
    if cfg.schedule == "step":
        return common.step_schedule(step, steps_per_epoch, cfg.lr_drops)
    return 0.5 * (1 + math.cos(math.pi * epoch / cfg.epochs))


def build_optimizer(cfg: Config, model: DUPR) -> torch.optim.Optimizer:
    groups = [{"params": list(model.encoder_q.parameters()), "base_lr": cfg.lr}]
    return torch.optim.SGD(groups, cfg.lr, momentum=cfg.sgd_momentum, weight_decay=cfg.weight_decay,
                           fused=common.can_fuse(model))


def train_step(cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any],
               step: int, device: torch.device
               ) -> dict[str, Tensor]:
    """One step in MoCo's order. Returns the unweighted loss terms, the total and the gradient norm."""
    module = getattr(model, "module", model)
    views, boxes, flips, valid = (batch[k].to(device, non_blocking=True) for k in ("views", "boxes", "flips", "valid"))
    num_valid = common.normalizer(sum(batch["valid"].tolist()), device)
    module.update_key_encoder(cfg.ema_momentum)                              # before the keys are made
    permutation = common.send(draw_permutation(cfg.seed, step, len(views) * common.world_size()), device)
    with common.autocast(device, cfg.amp):
        queries, keys = model(views, boxes, flips, permutation)
    loss, terms = dupr_loss(cfg, queries, keys, module.queues, valid, num_valid)  # against the queues as they were
    optimizer.zero_grad()
    loss.backward()
    norm = common.clip_gradients(model, 0)
    module.enqueue(keys, draw_positions(keys, cfg.queued_patches))
    optimizer.step()
    return {"loss": loss.detach(), **terms, "no_overlap": (~valid).float().mean(), "grad_norm": norm}


# ==== 6. Probe ====


@torch.no_grad()
def match_patches(model: DUPR, probe_set: TwoCropsDataset, num_workers: int, device: torch.device, other: bool = False,
                  text: str = "") -> list[dict]:
    """Are the patches of view 1 found again in view 2 of unseen images? By their r, Eq. (3),
    from the query encoder; queues play no part.

    Per image with an overlap {"index", "patch_<level>", "own_<level>": shares of its S * S patches that are right,
    "image_<level>", "found" [S * S]}.
    patch: the most alike of all patches of the batch's images is the one at the same place of the same image; own,
    found: of those of its image; image: view 2 is the most alike of the batch's. other: view 1 is that of the next
    image, so what a patch's place gives away is left in `own`.
    """
    model.eval()
    found = []
    for batch in evaluation.batches(probe_set, num_workers, text, collate=collate):
        views, boxes, flips = (batch[k].to(device) for k in ("views", "boxes", "flips"))
        first, second = (named(*model.encoder_q(views[:, i], boxes[:, i]), flips[:, i]) for i in (0, 1))
        if other:
            first = {kind: e.roll(-1, 0) for kind, e in first.items()}
        rows = [{"index": index, "valid": bool(v)} for index, v in zip(batch["index"], batch["valid"])]
        for kind, q in first.items():
            # [B, S * S, dim], or [B, 1, dim]
            q, k = (e.flatten(2).transpose(1, 2) if e.dim() == 4 else e[:, None] for e in (q, second[kind]))
            places = q.shape[1]
            for i, row in enumerate(rows):
                similarity = torch.einsum("pc,kqc->pkq", q[i], k).cpu()  # of each patch to every patch of every image
                row[kind] = (similarity.flatten(1).argmax(1) == i * places + torch.arange(places)).float().mean().item()
                if kind.startswith("patch"):
                    best = similarity[:, i].argmax(1)                        # [S * S]
                    row |= {kind.replace("patch", "own"): (best == torch.arange(places)).float().mean().item(),
                            "found": best.tolist()}
        found += [row for row in rows if row["valid"]]
    return evaluation.gather(found)


def match_metrics(rows: list[dict]) -> dict[str, float]:
    """Means over images: "patch", "own_image" over all levels and per level; "image": of the last level."""
    if not rows:
        raise UserError("no two views of any probe image overlap: give more --probe_images")
    mean = {k: float(np.mean([row[k] for row in rows])) for k in rows[0] if "_" in k}
    over = {name: [v for k, v in mean.items() if k.startswith(start)]
            for name, start in (("patch", "patch_"), ("own_image", "own_"))}
    last = [v for k, v in mean.items() if k.startswith("image_")][-1:]
    return ({name: float(np.mean(v)) for name, v in over.items() if v}
            | {k: v for k, v in mean.items() if not k.startswith("image_")} | ({"image": last[0]} if last else {}))


def probe(cfg: Config, model: DUPR, probe_source, held_out: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Accuracy of finding the corresponding patch, before and after, and predictions.png. `shuffled`:
    see match_patches, other."""
    probe_set = TwoCropsDataset(cfg, probe_source, held_out)
    untrained = build_model(cfg).to(device)
    rows = {"untrained": match_patches(untrained, probe_set, cfg.num_workers, device, text="untrained"),
            "shuffled": match_patches(model, probe_set, cfg.num_workers, device, other=True, text="shuffled"),
            "pretrained": match_patches(model, probe_set, cfg.num_workers, device, text="pretrained")}
    if common.rank() != 0:
        return {}
    if any(cfg.beta):
        draw_matches(Path(cfg.out) / "predictions.png", cfg, probe_set, rows["pretrained"])
    return ({name: match_metrics(found) for name, found in rows.items()}
            | {"primary": "patch" if any(cfg.beta) else "image"})


def patch_boxes(box: Tensor, flip: bool, size: int) -> Tensor:
    """The size * size patches [n, 4] xyxy px of the overlap `box` [4] of a view, row by row as (i, j) counts them."""
    x = torch.linspace(float(box[0]), float(box[2]), size + 1)
    y = torch.linspace(float(box[1]), float(box[3]), size + 1)
    cells = torch.stack([torch.stack([x[j], y[i], x[j + 1], y[i + 1]]) for i in range(size) for j in range(size)])
    return cells.view(size, size, 4).flip(1).flatten(0, 1) if flip else cells


def draw_matches(path: Path, cfg: Config, probe_set: TwoCropsDataset, rows: list[dict],
                 count: int = 6, shown: int = 4) -> None:
    """One row per image: patches of view 1, where they are in view 2, and where the features of
    the last level found them."""
    size = next(s for s, b in zip(cfg.roi_sizes[::-1], cfg.beta[::-1]) if b > 0)
    found = {row["index"]: row["found"] for row in rows}
    images, columns = [], {"patches of view 1": [], "the same in view 2": [], "DUPR in view 2": []}
    for sample in (probe_set[0, i] for i in range(len(probe_set))):
        if sample["index"] not in found or len(images) == count:
            continue
        first, second = (evaluation.picture(view) for view in sample["views"])
        cells = [patch_boxes(box, bool(flip), size) for box, flip in zip(sample["boxes"], sample["flips"])]
        picked = np.random.default_rng([cfg.seed, sample["index"]]).permutation(size * size)[:shown]
        images.append(second)
        columns["patches of view 1"].append((cells[0][picked], None, first))
        columns["the same in view 2"].append((cells[1][picked], None))
        columns["DUPR in view 2"].append((cells[1][np.array(found[sample["index"]])[picked]], None))
    if images:
        evaluation.draw_boxes_figure(path, images, columns)


# ==== 7. Main ====


def check(cfg: Config) -> None:
    """What a configuration alone can be wrong in."""
    for name in ("alpha", "beta", "roi_sizes"):
        values = getattr(cfg, name)
        if len(values) != 4 or min(values) < (1 if name == "roi_sizes" else 0):
            raise UserError(f"--{name} {' '.join(map(str, values))}: give four values, for conv2, conv3, "
                            "conv4 and conv5, none below " + ("1" if name == "roi_sizes" else "0"))
    if not any(cfg.alpha) and not any(cfg.beta):
        raise UserError("--alpha and --beta are all 0: there is nothing to learn; give at least one level a weight")
    if cfg.accumulate > 1:
        raise UserError(f"--accumulate {cfg.accumulate}: DUPR needs the whole batch at once (BatchNorm, queues); "
                        "give a smaller --batch_size")
    if not (len(cfg.crop_area) == 2 and 0 < cfg.crop_area[0] <= cfg.crop_area[1] <= 1):
        raise UserError(f"--crop_area {' '.join(map(str, cfg.crop_area))}: give the smallest and the largest share, "
                        "0 < smallest <= largest <= 1")
    if cfg.image_size < 32:
        raise UserError(f"--image_size {cfg.image_size}: a view needs at least 32 pixels a side, the stride of conv5")
    if cfg.min_overlap > cfg.image_size:
        raise UserError(f"--min_overlap {cfg.min_overlap}: no overlap is larger than a view of {cfg.image_size} pixels")
    if not 0 <= cfg.ema_momentum <= 1 or cfg.temperature <= 0:
        raise UserError(f"--ema_momentum {cfg.ema_momentum} must lie in 0..1, --temperature {cfg.temperature} above 0")
    if cfg.batch_size == common.world_size():
        raise UserError(f"--batch_size {cfg.batch_size}: one image per process, "
                        "but BatchNorm needs two; give a larger one")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = run.parse_config(Config, PRESETS, argv, script="dupr",
                           description=__doc__.split("\n\n")[0], by_data=recipe_of)
    device = common.setup_distributed(cfg.device)
    check(cfg)
    out = Path(cfg.out)
    source, indices, probe_source, held_out = data.open_pretraining(cfg)
    sampler_args = {"world": common.world_size(), "rank": common.rank(), "accumulate": cfg.accumulate, "seed": cfg.seed}
    # complains about sizes before anything is written
    data.StepSampler(len(indices), cfg.batch_size, 1, **sampler_args)
    identity = run.identity("dupr", len(source), source.fingerprint())
    state = run.open_run(cfg, **identity)
    steps_per_epoch = len(indices) // cfg.batch_size
    total_steps = min(cfg.epochs * steps_per_epoch, cfg.max_steps or sys.maxsize)
    if metrics := run.finished(out, state, total_steps):
        run.say(summary(metrics))
        return metrics

    train_set = TwoCropsDataset(cfg, source, indices)
    model = build_model(cfg).to(device)
    optimizer = build_optimizer(cfg, model)
    start = run.restore(state, model, optimizer, cfg, sync_bn=False) if state else 0
    wrapped = common.wrap_model(model, device, sync_bn=False, compiled=cfg.compile)                # D11
    sampler = data.StepSampler(len(indices), cfg.batch_size, total_steps, start_step=start, **sampler_args)
    batches = iter(data.make_loader(train_set, sampler, num_workers=cfg.num_workers, collate=collate))
    log, skipped, seen = run.Log(out, start, device), data.SkipCount(len(source)), 0
    watch = run.FiniteWatch(out, source.key)
    run.tell_plan(cfg, len(indices), "images", steps_per_epoch, start, total_steps, device)
    bar = run.progress(range(start, total_steps), initial=start, total=total_steps, desc="pretraining")
    for step in run.until_stopped(bar):
        run.seed_step(cfg.seed, step)
        wrapped.train()
        lr = common.set_lr(optimizer, lr_factor(cfg, step, steps_per_epoch))
        batch = next(batches)
        skipped.add(batch["skipped"])
        seen += len(batch["index"])
        with watch.step(step, [batch]) as look:
            terms = train_step(cfg, wrapped, optimizer, batch, step, device)
            look(terms)
        if step % cfg.log_every == 0 or step == total_steps - 1:
            watch.settle()
            line = log.write(step, terms, seen, epoch=step // steps_per_epoch, lr=lr)
            bar.set_postfix(loss=f"{line['loss']:.2f}",
                            **{k.replace("_conv", ""): f"{v:.2f}" for k, v in line.items() if k.endswith("conv5")})
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
        drawn = ", predictions.png" if len(held_out) and any(cfg.beta) else ""
        run.say(f"{summary(metrics)}\nwrote {out}/last.pt, log.jsonl, metrics.json{drawn}")
    skipped.tell()
    common.barrier()
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    columns = next((list(row) for row in metrics.values() if isinstance(row, dict)), [])
    return evaluation.probe_table(metrics, columns, "share of patches found again in another view, "
                                  "among those of up to 9 unseen images (")


if __name__ == "__main__":
    run.cli(main)
