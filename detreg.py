"""DETReg: unsupervised pretraining of a whole detector with region priors.

Paper: Amir Bar, Xin Wang, Vadim Kantorov, Colorado J Reed, Roei Herzig, Gal Chechik, Anna Rohrbach,
    Trevor Darrell, Amir Globerson.
    DETReg: Unsupervised Pretraining with Region Priors for Object Detection. CVPR 2022, arXiv 2106.04550.

Idea: A detector has two jobs, to find objects and to tell them apart; DETReg gives it a label-free version of each. For
    the first, an old algorithm without learning (selective search) proposes boxes, and the detector is trained to
    output them as a set, exactly as it would be trained on annotated boxes of one class, "object". For the second, a
    frozen self-supervised network describes the pixels of every proposed box, and the query that was matched to the box
    must regress this description. All of the transformer is trained, not the backbone alone.

Diagram:
    image [3, H0, W0] --selective search--> proposals [n, 4] --crop, augment--> patches [n, 3, 128, 128] --frozen SwAV, res3 mean--> z [n, 512]
        |                                        |                                                                                    |
    flip, crop, resize                 the same flip, crop, resize                                                                    |
        |                                        |                                                                                    |
    image [3, H, W]                          b [n, 4]  ----------------- Hungarian matching, Eq. (2) --------- losses, Eq. (3) -------+-- Eq. (4)
        |                                                                  |                                        |                 |
    frozen ResNet-50 -> Deformable DETR -> v [Q, 256] -> f_cat -> p_hat [Q, C];  f_box -> b_hat [Q, 4];  f_emb -> z_hat [Q, 512] -----+

Run:
    python detreg.py --preset demo                                         # CPU, nothing downloaded, about 4 minutes
    python detreg.py --preset demo --data MY_IMAGES                        # the same small model on your own images
    torchrun --nproc_per_node=8 detreg.py --data imagenet100               # the published recipe
    python detreg.py --data coco --batch_size 192 --accumulate 16 --amp bf16     # one GPU, same global batch
    python finetune.py --data coco --init_from out/detreg-imagenet100/last.pt

Hyperparameters (default; where from):
    images        flip, random crop, short side 320..480, long side <= 600        Sec. 6; released transforms
    proposals     selective search "fast" on 128 x 128, first M = 30              Sec. 4 (Top-K), Sec. 6
    model         Deformable DETR, ResNet-50, 300 queries, 6 + 6 layers           Sec. 5, 6
    matching      2 focal + 5 L1 + 2 (1 - GIoU), embedding not in the cost        released
    losses        2 focal, 5 L1, 2 GIoU, lambda_e = 1                             Eq. (3), Table 5
    optimiser     AdamW 2e-4, weight decay 1e-4, clip 0.1, batch 24 x 8 = 192     Sec. 6; released
    schedule      50 epochs, x 0.1 after 40 (ImageNet-1k: 5 epochs, no drop)      Sec. 6; released

Deviations (paper / released code / here):
    D1  z: "SwAV descriptor" / mean of the res3 output (512-d), not normalised / as released
        (`--embedding_target swav_head`: 128-d projection).
    D2  f_emb: "2 hidden layers" / one hidden layer / as released.
    D3  f_cat: 2 outputs / 91, all targets are class 1 / as released,
        so that released checkpoints load and losses agree.
    D4  L_emb: sum of L1 norms / mean over matched pairs and channels, last decoder layer only / as released; the mean
        runs over the pairs of ALL processes and micro-batches (released: of each process, `--embedding_mean local`), so
        that it does not depend on their number.
    D5  Batch 28 per GPU / 24 per GPU / 24 x 8; `--preset paper` has 28 x 8.
    D6  OpenCV orders its boxes by rank = level x C rand(): the released order differs at every call. Here rand() is
        seeded from (seed, epoch, index): still another order each epoch, but a rerun repeats it. A proposal store
        freezes ONE order per image.
    D7  OpenCV expects BGR / RGB is passed / RGB, as released.
    D8  Importance sampling: p_i proportional to -log(i/n) / -ln(i/301)/10 / min(1, M w_i / sum w); the released rule is
        `importance_released`. Random-K, absent from the released code, is as printed.
    D9  Fewer than 2 boxes: another image is drawn, without end (released) / at most 10 times,
        then the full box jittered twice, counted.
    D10 Number of boxes below the number of processes: clamped to 1 per process (released) / 1 over all processes.
    D11 The descriptor network stops after res3 (released:
        res4 and res5 are computed and thrown away); the values are the same.
    D12 On other detectors: only Siamese DETR's tables / DETR (pre-norm, softmax over 92 rows, class weight 1, 100
        queries, 1e-4, 60 epochs) / each detector keeps its own head and loss; Conditional DETR has DETR's schedule and
        100 queries. The softmax's weighted mean covers all processes.

Expected: the demo logs, at step 0 and at its end, loss 19.4 -> 7.2, loss_ce 1.07 -> 0.23, loss_bbox 0.51 -> 0.19,
    loss_giou 0.86 -> 0.46, loss_object_embedding 0.37 -> 0.12; loss_ce falls within the first 20 steps, the box terms
    to the end. Its table stands in README.md.
    Paper, Table 6 (COCO val, class-agnostic AP / R@100): 1.0 / 12.7, selective search 0.2 / 10.9.
    Not rerun here: no ImageNet, no COCO.
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

import convert
import data
import evaluation
import proposals
import run
from annotations import open_detection
from common import UserError

# ==== 1. Hyperparameters ====


@dataclass
class Config:
    # data
    data: str = "imagenet100"  # imagenet100, imagenet, coco, voc, synthetic, a folder of images, or a .txt with one path per line (Sec. 6)
    data_root: str | None = None  # where a named data set lies; else $DATA_ROOT, else data/<name>
    synthetic_images: int = 800  # size of the synthetic pool
    synthetic_size: int = 160  # side of a synthetic scene, pixels
    out: str | None = None  # output folder; else out/detreg-<preset or data>
    preset: str | None = None  # paper, official or demo
    # proposals
    strategy: Literal["topk", "randomk", "importance", "importance_released", "other_image"] = "topk"  # which proposals are targets (Sec. 4; Table 5)
    max_prop: int = 30  # M, proposals per image (Sec. 6)
    proposal_method: Literal["selective_search", "edge_boxes", "random"] = "selective_search"  # where boxes come from (Sec. 3)
    proposal_mode: Literal["fast", "quality", "quick"] = "fast"  # selective search mode (Sec. 6)
    proposal_grid: int = 128  # side the image is squeezed to before selective search, 0 = original size (released)
    proposal_rank: Literal["opencv", "nms"] = "opencv"  # order of the boxes: OpenCV's, or size filter + seeded shuffle + NMS 0.7
    proposal_store: str | None = None  # folder filled by proposals.py; without one boxes are computed in the loader
    cache_proposals: bool = False  # fill a store in the output folder before training
    edge_model: str | None = None  # OpenCV's structured forest file, for edge_boxes
    # images
    scales: tuple[int, ...] = (320, 336, 352, 368, 400, 416, 432, 448, 464, 480)  # short side, pixels (Sec. 6; 384 is missing as released)
    max_size: int = 600  # longest side, pixels (released)
    crop_scales: tuple[int, ...] = (400, 500, 600)  # short side before a random crop (released)
    crop_range: tuple[int, ...] = (384, 600)  # smallest and largest side of the crop (released)
    patch_size: int = 128  # side of a region crop (released)
    # model
    detector: common.DETECTORS = "deformable_detr"  # what is pretrained (the others: Siamese DETR, Tables 1 and 2)
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # backbone (Sec. 6)
    backbone_weights: str = "swav"  # swav, imagenet, moco_v2, random or a file (Sec. 6)
    backbone_norm: Literal["frozen", "bn"] = "frozen"  # BatchNorm with constant or with learned statistics (released: frozen)
    stride: Literal[4, 8, 16, 32] = 32  # of the map that DETR and Conditional DETR see; below 32 the last stages are left out
    num_feature_levels: int = 4  # of deformable_detr (Sec. 5)
    pre_norm: bool = True  # LayerNorm before each block, of detr (released)
    hidden_dim: int = 256  # transformer width (Sec. 6)
    nheads: int = 8  # attention heads
    enc_layers: int = 6  # encoder layers
    dec_layers: int = 6  # decoder layers
    dim_feedforward: int = 1024  # width of the feed-forward layers (detr, conditional_detr: 2048)
    dropout: float = 0.1  # in the transformer
    num_queries: int = 300  # N (Sec. 5; detr, conditional_detr: 100)
    with_box_refine: bool = False  # iterative box refinement of deformable_detr (released: off)
    num_classes: int = 91  # rows of f_cat; targets are row 1 (D3); detr has another one, "no object"
    embedding_target: Literal["res3", "swav_head"] = "res3"  # z: mean of the res3 output, or SwAV's normalised projection (D1)
    # loss
    lambda_f: float = 2.0  # focal loss and its matching cost, Eq. (3) (detr: cross-entropy, 1)
    lambda_l1: float = 5.0  # L1 part of L_box and its matching cost, Eq. (3)
    lambda_giou: float = 2.0  # GIoU part of L_box and its matching cost, Eq. (3)
    lambda_e: float = 1.0  # object embedding, Eq. (3), Table 5
    embedding_mean: Literal["global", "local"] = "global"  # mean of L_emb over all processes, or over each (D4)
    # optimisation
    batch_size: int = 192  # images per step over all processes (released: 24 per GPU x 8)
    accumulate: int = 1  # micro-batches per step: one GPU reaches the global batch
    epochs: int = 50  # Sec. 6; ImageNet-1k 5 (released)
    lr_drop: float = 40  # epoch after which the rate is x 0.1 (Sec. 6)
    lr: float = 2e-4  # Sec. 6
    lr_backbone: float = 0.0  # 0 = frozen backbone (Table 5)
    lr_linear_proj_mult: float = 0.1  # rate of sampling offsets and reference points (released)
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
    probe_data: str | None = None  # labelled set to score class-agnostic boxes on, as finetune.py --data; else held-out images
    probe_images: int = 0  # images of the probe; unlabelled data are held out from training and scored on their own proposals


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"batch_size": 224, "num_classes": 2},                          # D5, D3
    "official": {"embedding_mean": "local"},                                 # D4
    "demo": {
        "data": "synthetic", "synthetic_images": 400, "max_prop": 20, "cache_proposals": True, "proposal_rank": "nms",
        "scales": (96, 112), "max_size": 144, "crop_scales": (112, 144), "crop_range": (72, 112), "patch_size": 32,
        "arch": "resnet18", "backbone_weights": "random", "backbone_norm": "bn", "lr_backbone": 6e-4,
        "hidden_dim": 128, "enc_layers": 2, "dec_layers": 3, "dim_feedforward": 256, "dropout": 0.0,
        "num_queries": 100, "with_box_refine": True, "num_classes": 2, "batch_size": 8, "epochs": 6, "lr_drop": 5,
        "lr": 6e-4, "num_workers": 2, "log_every": 20, "save_every": 100, "probe_images": 100,
    },
}


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """What the released configurations change with the data set and the detector (D12)."""
    recipe: dict[str, Any] = {"epochs": 5, "lr_drop": 40} if values["data"] == "imagenet" else {}
    if not values["detector"].startswith("deformable"):
        recipe |= {"epochs": 60, "lr": 1e-4, "dim_feedforward": 2048, "num_queries": 100}
    return recipe | {"lambda_f": 1.0} if values["detector"] == "detr" else recipe


# ==== 2. Data ====


class RegionDataset(torch.utils.data.Dataset):
    """One sample: an augmented image, its proposals as targets, and the augmented crop of every proposal.

    Everything random is a function of (seed, epoch, index). Keys of a sample: image [3, H, W]; target {"boxes" [n, 4]
    cxcywh, "labels" [n] = 1, "patches" [n, 3, p, p]}; skipped (unreadable files);
    fallback (1 when no image with two boxes was found, D9).
    """

    def __init__(self, cfg: Config, source, indices: np.ndarray, store: proposals.ProposalStore | None):
        self.cfg, self.source, self.indices, self.store = cfg, source, indices, store
        self.generator = proposal_generator(cfg)
        # "similar augmentations", Sec. 6
        self.photometric = data.Photometric(0.4, 0.4, 0.4, 0.1, p_jitter=0.8, p_gray=0.2, p_blur=0.5)

    def __len__(self) -> int:
        return len(self.indices)

    def propose(self, image: Image.Image, index: int, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """Policies of Sec. 4. `other_image`: the boxes of another image, stretched to this one (Table 5, first row)."""
        width, height = image.size
        if self.cfg.strategy == "other_image":
            others = self.indices[self.indices != index] if len(self) > 1 else self.indices
            other, index = data.load_usable(self.source, int(rng.choice(others)), rng, [], others)
            boxes = self.all_boxes(other, index, epoch) * np.float32([width / other.width, height / other.height] * 2)
            return proposals.select(boxes, "topk", self.cfg.max_prop, rng)
        return proposals.select(self.all_boxes(image, index, epoch), self.cfg.strategy, self.cfg.max_prop, rng)

    def all_boxes(self, image: Image.Image, index: int, epoch: int) -> np.ndarray:
        if self.store is not None:
            return self.store.boxes(index, (image.height, image.width))
        return self.generator(image, proposals.image_seed(self.cfg.seed, epoch, index))                    # D6

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, position = key
        rng = data.sample_rng(self.cfg.seed, epoch, position)
        skipped: list[str] = []
        for attempt in range(11):
            image, index = data.load_usable(self.source, int(self.indices[position]), rng, skipped, self.indices)
            boxes = torch.from_numpy(self.propose(image, index, epoch, rng))
            if attempt == 10:                                                # D9
                boxes = jittered_full_boxes((image.height, image.width), rng)
            geometry = data.draw_geometry(rng, (image.height, image.width),
                                          scales=self.cfg.scales, max_size=self.cfg.max_size,
                                          crop_scales=self.cfg.crop_scales, crop_range=self.cfg.crop_range)
            view, moved, keep = data.apply_geometry(image, boxes, geometry)
            if len(keep) >= 2 or attempt == 10:
                break
            position = int(rng.integers(len(self.indices)))
        # a box cut by the crop keeps the descriptor of the whole region; patches are not flipped (released)
        patches = [data.cut_patch(image, box, self.cfg.patch_size, data.draw_photometric(rng, self.photometric))
                   for box in boxes[keep].tolist()]
        target = {"boxes": data.normalized_cxcywh(moved, (view.height, view.width)),
                  "labels": torch.ones(len(keep), dtype=torch.int64), "patches": torch.stack(patches) if patches
                  else torch.zeros(0, 3, self.cfg.patch_size, self.cfg.patch_size)}
        return {"image": data.to_normalized_tensor(view), "target": target, "index": index, "skipped": skipped,
                "fallback": int(attempt == 10)}


def jittered_full_boxes(hw: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Two boxes that cover at least 80 % of each side. [2, 4] xyxy pixels."""
    scale = torch.tensor([hw[1], hw[0]] * 2, dtype=torch.float32)
    return torch.from_numpy(np.concatenate([rng.uniform(0, 0.1, (2, 2)), rng.uniform(0.9, 1, (2, 2))],
                                           1).astype(np.float32)) * scale


def proposal_generator(cfg: Config) -> proposals.Generator:
    grid = (cfg.proposal_grid or None) if cfg.proposal_method == "selective_search" else None
    return proposals.Generator(cfg.proposal_method, cfg.proposal_mode, grid, cfg.proposal_rank,
                               cfg.edge_model, cfg.seed)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {**data.collate(samples), "fallback": sum(s["fallback"] for s in samples)}


# ==== 3. Model ====


class DETReg(common.Pretext):
    """A detector with f_emb beside its f_cat (class_embed) and f_box (bbox_embed).
    Adds pred_features [B, Q, embedding_dim]."""

    def __init__(self, detector: common.Detector, embedding_dim: int = 512):
        super().__init__(detector)
        d = detector.transformer.d_model
        self.feature_embed = common.MLP(d, d, embedding_dim, 2)              # f_emb, D2

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Any]:
        outputs = self.detector(images, mask)
        return {**outputs, "pred_features": self.feature_embed(outputs["hs"])}     # z_hat = f_emb(v), Sec. 5


class RegionDescriptor(nn.Module):
    """z of a region crop: spatial mean of the res3 output (stride 8), not normalised (D1, D11).
    patches [n, 3, p, p] -> [n, D]"""

    def __init__(self, backbone: common.Backbone):
        super().__init__()
        self.body = copy.deepcopy(backbone.body[:6])                         # conv1 to layer2
        self.dim = backbone.num_channels[-1] * 4 // 2 ** int(backbone.layers[-1][-1])  # 512 for ResNet-50

    def forward(self, patches: Tensor) -> Tensor:
        return common.run_stages(self.body.named_children(), patches, ("layer2",))[-1].mean((2, 3))


class SwAVDescriptor(nn.Module):
    """z of a region crop: SwAV's 128-d projection, L2 normalised (D1).
    The released code leaves BatchNorm in training mode; ours is in eval()."""

    dim = 128

    def __init__(self):
        super().__init__()
        for name, module in torchvision.models.resnet50(weights=None).named_children():
            if name != "fc":
                self.add_module(name, module)
        self.projection_head = nn.Sequential(nn.Linear(2048, 2048), nn.BatchNorm1d(2048),
                                             nn.ReLU(), nn.Linear(2048, 128))

    def forward(self, patches: Tensor) -> Tensor:
        x = patches
        for name, module in self.named_children():
            if name != "projection_head":
                x = module(x)
        return F.normalize(self.projection_head(x.flatten(1)), dim=1)


def build_models(cfg: Config) -> tuple[DETReg, nn.Module]:
    """The detector and the frozen descriptor network, both on CPU.
    Weights are a function of the seed and of --backbone_weights."""
    torch.manual_seed(cfg.seed)
    focal = cfg.detector != "detr"  # each detector keeps its own classification (D12)
    model = DETReg(common.build_detector(cfg, cfg.num_classes if focal else cfg.num_classes + 1, focal=focal))
    backbone = model.detector.backbone[0]
    convert.load_backbone_weights(backbone.body, cfg.backbone_weights, cfg.arch)
    if cfg.embedding_target == "swav_head":
        descriptor = SwAVDescriptor()
        path = convert.backbone_file(cfg.backbone_weights, "resnet50")
        state = convert.state_of(run.read_checkpoint(path), path)
        convert.load_matching(descriptor, state, source=str(path),
                             drop={r"^prototypes\.": "not part of the descriptor",
                                   r"num_batches_tracked$": "a counter nothing reads"})
    else:
        descriptor = RegionDescriptor(backbone)
    if descriptor.dim != 512:  # the embedding's width follows the target (decisions.md)
        model.feature_embed = common.MLP(cfg.hidden_dim, cfg.hidden_dim, descriptor.dim, 2)
    return model, descriptor.requires_grad_(False).eval()


# ==== 4. Loss ====


def build_criterion(cfg: Config) -> common.SetCriterion:
    # Eq. (2): L_match, without z
    matcher = common.HungarianMatcher(cfg.lambda_f, cfg.lambda_l1, cfg.lambda_giou, focal=cfg.detector != "detr")
    return common.SetCriterion(matcher, cfg.lambda_f, cfg.lambda_l1, cfg.lambda_giou)


def embedding_loss(features: Tensor, targets: list[dict], pairs: list, num_elements: float) -> Tensor:
    """Eq. (4) over the matched pairs of the last decoder layer. features [B, Q, D]; targets[i]["features"] [n, D];
    num_elements = pairs * D."""
    z_hat = features[common.matched_index(pairs)]
    z = torch.cat([t["features"][j] for t, (_, j) in zip(targets, pairs)])
    return (z_hat - z).abs().sum() / num_elements                            # Eq. (4); a mean, D4


def detreg_loss(cfg: Config, criterion: common.SetCriterion, outputs: dict, targets: list[dict], num_boxes: float,
                num_pairs: float, class_weight: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (3): returns (weighted total, unweighted terms). num_boxes, num_pairs, class_weight:
    this process's normalisers (common.normalizer)."""
    # sigma of Eq. (2); lambda_f L_focal + lambda_b L_box of Eq. (3)
    losses, pairs = criterion(outputs, targets, num_boxes, class_weight)
    if cfg.embedding_mean == "local":
        num_pairs = max(sum(len(q) for q, _ in pairs), 1) * cfg.accumulate
    z = outputs["pred_features"]
    losses["loss_object_embedding"] = embedding_loss(z, targets, pairs, num_pairs * z.shape[-1])
    return criterion.total(losses) + cfg.lambda_e * losses["loss_object_embedding"], losses                 # Eq. (3)


# ==== 5. Training step ====


def train_step(cfg: Config, model: nn.Module, descriptor: nn.Module, criterion: common.SetCriterion,
               optimizer: torch.optim.Optimizer, micro_batches: list[dict], device: torch.device) -> dict[str, Tensor]:
    """One optimiser step on cfg.accumulate micro-batches. Returns the unweighted loss terms of the whole,
    the total and the gradient norm.

    Normalisers cover all processes and micro-batches, so the gradient is that of one process on
    the whole batch (tested).
    """
    counts = [len(t["labels"]) for batch in micro_batches for t in batch["targets"]]
    num_boxes = common.normalizer(sum(counts), device)
    num_pairs = common.normalizer(sum(min(n, cfg.num_queries) for n in counts), device)
    class_weight = common.normalizer(criterion.class_weight_sum(counts, cfg.num_queries), device)
    optimizer.zero_grad()
    terms: dict[str, Tensor] = {}
    for i, batch in enumerate(micro_batches):
        images, mask = batch["images"].to(device, non_blocking=True), batch["mask"].to(device, non_blocking=True)
        targets = [{k: v.to(device, non_blocking=True) for k, v in t.items()} for t in batch["targets"]]
        with common.gradient_sync(model, i == len(micro_batches) - 1), common.autocast(device, cfg.amp):
            with torch.no_grad():                                            # z_i of every proposal, Sec. 5
                z = (descriptor(torch.cat([t["patches"] for t in targets])).float()
                     .split([len(t["labels"]) for t in targets]))
            targets = [{**t, "features": f} for t, f in zip(targets, z)]
            outputs = model(images, mask)
            with torch.autocast(device.type, enabled=False):
                outputs["pred_features"] = outputs["pred_features"].float()
                loss, losses = detreg_loss(cfg, criterion, outputs, targets, num_boxes, num_pairs, class_weight)
            loss.backward()
        for name, value in {"loss": loss, **losses}.items():
            share = 1 / len(micro_batches) if "error" in name else 1  # losses add up, the log values are averaged
            terms[name] = terms.get(name, 0) + share * value.detach()
    terms["grad_norm"] = common.clip_gradients(model, cfg.clip_max_norm)
    optimizer.step()
    return terms


# ==== 6. Probe ====


class HeldOut:
    """Unlabelled images kept out of training, scored on their own proposals: a stand-in where nobody drew boxes.
    Same interface as a DetectionSet."""

    def __init__(self, cfg: Config, source, indices: np.ndarray):
        self.source, self.image_ids, generator = source, [], proposal_generator(cfg)
        self.ground_truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "proposal"}]}
        for i in indices.tolist():
            try:
                image = source.load(i)
            except data.UnreadableImage as error:
                run.say(f"warning: left out of the probe: {error}")
                continue
            self.image_ids.append(i)
            boxes = generator(image, proposals.image_seed(cfg.seed, source.key(i)))[:cfg.max_prop]
            self.ground_truth["images"].append({"id": i, "width": image.width, "height": image.height,
                                                "file_name": source.key(i)})
            for x1, y1, x2, y2 in boxes.tolist():
                self.ground_truth["annotations"].append({"id": len(self.ground_truth["annotations"]) + 1, "image_id": i,
                                                         "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1],
                                                         "area": (x2 - x1) * (y2 - y1), "iscrowd": 0})

    def __len__(self) -> int:
        return len(self.image_ids)

    def load(self, i: int):
        image = self.source.load(self.image_ids[i])
        return image, {"image_id": self.image_ids[i], "orig_size": torch.tensor([image.height, image.width])}

    def coco_ground_truth(self) -> dict:
        return self.ground_truth


def open_probe(cfg: Config, source, held_out: np.ndarray):
    """The labelled set of --probe_data, unseen synthetic scenes with their true boxes, or the held-out images;
    None when there is no probe."""
    if cfg.probe_data:
        return open_detection(cfg.probe_data, cfg.data_root, "test", seed=cfg.seed)
    if not cfg.probe_images:
        return None
    if cfg.data == "synthetic":
        return open_detection("synthetic", None, "test", synthetic_images=cfg.probe_images,
                              synthetic_size=cfg.synthetic_size, seed=cfg.seed)
    return HeldOut(cfg, source, held_out)


def probe(cfg: Config, model: nn.Module, train_set: RegionDataset, probe_set, device: torch.device) -> dict[str, Any]:
    """Class-agnostic AP and AR (Table 6) of the pretrained detector and of four controls,
    and predictions.png. All processes call it."""
    count = min(len(probe_set), cfg.probe_images or len(probe_set))
    truth = probe_set.coco_ground_truth()
    sizes = {i["id"]: (i["height"], i["width"]) for i in truth["images"]}
    ids = probe_set.image_ids[:count]
    truth = {**truth, "images": [i for i in truth["images"] if i["id"] in set(ids)],
             "annotations": [a for a in truth["annotations"] if a["image_id"] in set(ids)]}

    def detect(network: nn.Module, text: str) -> list[dict]:
        found = []
        for target, logits, boxes_xyxy in evaluation.predict(network, probe_set, size=max(cfg.scales),
                                                             max_size=cfg.max_size, device=device, batch_size=8,
                                                             limit=count, num_workers=cfg.num_workers, text=text):
            found += evaluation.class_agnostic_detections(logits, boxes_xyxy, target["image_id"], top=100)
        return evaluation.gather(found)

    rng = np.random.default_rng(cfg.seed)
    pool = []  # relative sizes of training proposals, for random boxes
    for i in rng.choice(train_set.indices, min(50, len(train_set)), replace=False):
        image, i = data.load_usable(train_set.source, int(i), rng, [], train_set.indices)
        boxes = train_set.propose(image, i, 0, rng)
        pool.append((boxes[:, 2:] - boxes[:, :2]) / np.float32([image.width, image.height]))
    pool = np.concatenate(pool)
    searched, drawn = [], []
    for i in run.progress(evaluation.rank_slice(count), desc="selective search"):
        image, target = probe_set.load(i)
        boxes = proposals.selective_search(np.asarray(image), seed=proposals.image_seed(cfg.seed, "probe", i))[:100]
        searched += evaluation.boxes_as_detections(boxes, target["image_id"])
        rng = np.random.default_rng([cfg.seed, i])
        drawn += evaluation.boxes_as_detections(proposals.random_boxes(rng, (image.height, image.width), 100, pool),
                                                target["image_id"])
    untrained = build_models(cfg)[0].to(device)
    detections = {"untrained": detect(untrained, "untrained"), "random_boxes": evaluation.gather(drawn), "shuffled": [],
                  "selective_search": evaluation.gather(searched), "pretrained": detect(model, "pretrained")}
    detections["shuffled"] = evaluation.shuffled(detections["pretrained"], ids, sizes)
    if common.rank() != 0:
        return {}
    metrics = {name: evaluation.detection_metrics(truth, found, class_agnostic=True)
               for name, found in detections.items()}
    draw_predictions(Path(cfg.out) / "predictions.png", probe_set, train_set, detections["pretrained"], truth)
    return {**metrics, "primary": "AR100",
            "ground_truth": "held-out proposals" if isinstance(probe_set, HeldOut) else "annotations"}


def draw_predictions(path: Path, probe_set, train_set: RegionDataset, detections: list[dict],
                     truth: dict, rows: int = 6) -> None:
    """One row per image: ground truth, proposals, and the ten best predictions."""
    images, columns = [], {"ground truth": [], "proposals (first 10)": [], "DETReg (best 10)": []}
    for i in range(min(rows, len(probe_set))):
        image, target = probe_set.load(i)
        images.append(image)
        mine = sorted((d for d in detections if d["image_id"] == target["image_id"]), key=lambda d: -d["score"])
        true = [a for a in truth["annotations"] if a["image_id"] == target["image_id"]]
        boxes = train_set.generator(image, proposals.image_seed(train_set.cfg.seed, i))
        for title, some in zip(columns, (true, None, mine)):
            some = boxes[:10] if some is None else np.float32([d["bbox"] for d in some[:10]]).reshape(-1, 4)
            if title != "proposals (first 10)":
                some = np.concatenate([some[:, :2], some[:, :2] + some[:, 2:]], 1)
            columns[title].append((some, None))
    evaluation.draw_boxes_figure(path, images, columns)


# ==== 7. Main ====


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = run.parse_config(Config, PRESETS, argv, script="detreg",
                           description=__doc__.split("\n\n")[0], by_data=recipe_of)
    if cfg.num_classes < 2:
        raise UserError(f"--num_classes {cfg.num_classes}: at least 2 rows are needed, the object is row 1 (D3)")
    if cfg.probe_images == 1:
        raise UserError("--probe_images 1: the row `shuffled` needs at least 2 images; 0 means no probe")
    device = common.setup_distributed(cfg.device)
    out = Path(cfg.out)
    source = data.open_images(cfg.data, cfg.data_root, synthetic_images=cfg.synthetic_images,
                              synthetic_size=cfg.synthetic_size, seed=cfg.seed)
    indices, held_out = data.hold_out(source, cfg.probe_images if cfg.data != "synthetic" and not cfg.probe_data else 0,
                                      cfg.seed, cfg.data)
    sampler_args = {"world": common.world_size(), "rank": common.rank(), "accumulate": cfg.accumulate, "seed": cfg.seed}
    # complains about sizes before anything is written
    data.StepSampler(len(indices), cfg.batch_size, 1, **sampler_args)
    identity = run.identity("detreg", len(source), source.fingerprint())
    state = run.open_run(cfg, **identity)
    steps_per_epoch = len(indices) // cfg.batch_size
    total_steps = min(cfg.epochs * steps_per_epoch, cfg.max_steps or sys.maxsize)
    if metrics := run.finished(out, state, total_steps):
        run.say(summary(metrics))
        return metrics

    store = proposals.open_store(cfg, source, proposal_generator(cfg))
    train_set = RegionDataset(cfg, source, indices, store)
    model, descriptor = build_models(cfg)
    model, descriptor = model.to(device), descriptor.to(device)
    optimizer = common.build_optimizer(cfg, model)
    start = run.restore(state, model, optimizer, cfg, target=descriptor) if state else 0
    identity["target"] = descriptor.state_dict()
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
            seen += len(batch["targets"])
        with watch.step(step, micro_batches) as look:
            terms = train_step(cfg, wrapped, descriptor, criterion, optimizer, micro_batches, device)
            look(terms)
        if step % cfg.log_every == 0 or step == total_steps - 1:
            watch.settle()
            line = log.write(step, terms, seen, epoch=step // steps_per_epoch, lr=lr, fallbacks=fallbacks)
            bar.set_postfix(loss=f"{line['loss']:.2f}", box=f"{line['loss_bbox']:.3f}",
                            z=f"{line['loss_object_embedding']:.3f}")
            seen = 0
        if run.save_due(step + 1, total_steps, cfg.save_every):
            watch.settle()
            run.save_checkpoint(out / "last.pt", model, optimizer, step + 1, cfg, **identity, fallbacks=fallbacks)

    if fallbacks:
        run.say(f"{fallbacks} samples had no image with two proposals after ten draws and were given the full box (D9)")
    common.share_buffers(model)
    metrics = {"steps": total_steps}
    probe_set = open_probe(cfg, source, held_out)
    if probe_set is not None:
        metrics |= probe(cfg, model, train_set, probe_set, device)
    if common.rank() == 0:
        evaluation.write_json(out / "metrics.json", metrics)
        run.say(summary(metrics) + f"\nwrote {out}/last.pt, log.jsonl, metrics.json"
                + (", predictions.png" if probe_set else ""))
    skipped.tell()
    common.barrier()
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    title = f"class-agnostic boxes on unseen images (ground truth: {metrics.get('ground_truth')}; "
    return evaluation.probe_table(metrics, ["AP", "AP50", "AP75", "AR1", "AR10", "AR100"], title)


if __name__ == "__main__":
    run.cli(main)
