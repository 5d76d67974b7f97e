"""DETReg: unsupervised pretraining of a whole detector with region priors.

Paper: Amir Bar, Xin Wang, Vadim Kantorov, Colorado J Reed, Roei Herzig, Gal Chechik, Anna Rohrbach, Trevor Darrell,
    Amir Globerson. DETReg: Unsupervised Pretraining with Region Priors for Object Detection.
    CVPR 2022, arXiv 2106.04550.

Idea: A detector has two jobs, to find objects and to tell them apart; DETReg gives it a label-free version of each. For
    the first, an old algorithm without learning (selective search) proposes boxes, and the detector is trained to
    output them as a set, exactly as on annotated boxes of one class, "object". For the second, a frozen self-supervised
    network describes the pixels of every proposed box, and the query matched to the box must regress this description.

Diagram:
    image --selective search--> proposals [n, 4] --crop, augment--> patches [n, 3, 128, 128] --SwAV, res3--> z [n, 512]
      |                            |                                                                              |
    flip, crop, resize      the same, to the boxes                                                                |
      |                            |                                                                              |
    image [3, H, W]             b [n, 4] -------- Hungarian matching, Eq. (2) ------ losses, Eq. (3) --------- Eq. (4)
      |                                              |                                  |                         |
    frozen ResNet-50 -> Deformable DETR -> v [Q, 256] -> f_cat: p_hat [Q, C]; f_box: b_hat [Q, 4]; f_emb: z_hat [Q, 512]

Run:
    python detreg.py --preset demo                                     # CPU, nothing downloaded, about 4 minutes
    torchrun --nproc_per_node=8 detreg.py --data imagenet100           # the published recipe
    python finetune.py --data coco --init_from out/detreg-imagenet100/last.pt
    python docs/annotate.py                                            # beside its equations: site/detreg.html
    Your own images, one GPU, the rows of the paper's tables: docs/methods/detreg.md

Hyperparameters: in Config below, each with its place in the paper. `--preset paper`: what is printed where the released
    values behind the published numbers differ; `--preset official`: what else the released code does.

Deviations (paper / released code / here; in full in docs/methods/detreg.md):
    D1  z: "SwAV descriptor" / mean of res3, 512-d, not normalised / as released (`--embedding_target swav_head`).
    D2  f_emb: "2 hidden layers" / one hidden layer / as released.
    D3  f_cat: 2 outputs / 91, all targets are class 1 / as released, so that released checkpoints load.
    D4  L_emb: sum / mean over pairs and channels of the last layer / so, over ALL processes and micro-batches.
    D5  Batch 28 per GPU / 24 per GPU / 24 x 8; `--preset paper` has 28 x 8.
    D6  The order of selective search's boxes is random at every call / so / seeded from (seed, epoch, index).
    D7  OpenCV expects BGR / RGB is passed / RGB, as released.
    D8  Importance sampling: p_i ~ -log(i/n) / -ln(i/301)/10 / min(1, M w_i / sum w); Random-K as printed.
    D9  Fewer than 2 boxes: - / another image, without end / at most 10 times, then the full box twice, counted.
    D10 Number of boxes below the number of processes: - / 1 per process / 1 over all processes.
    D11 The descriptor network: - / runs to the end, what follows res3 unused / stops after res3, the same values.
    D12 Other detectors: - (Siamese DETR's tables) / DETR / each keeps its own head, loss and schedule.
    D13 Large pictures: - / decoded whole / no finer than needed (data.ImagePyramid).

Expected: the demo logs, at step 0 and at its end, loss 19.4 -> 7.2, loss_ce 1.07 -> 0.23, loss_bbox 0.51 -> 0.19,
    loss_giou 0.86 -> 0.46, loss_object_embedding 0.37 -> 0.12, which is hardly less than the mean of all z would cost
    (mean_embedding_error; benchmarks/looking.md). Its table: README.md. Paper, Table 6 (COCO val, class-agnostic AP /
    R@100): 1.0 / 12.7, selective search 0.2 / 10.9. Not rerun here: no ImageNet, no COCO.
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import copy
import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

import convert
import data
import detectors
import evaluation
import own
import proposals
import run
from annotations import DetectionSet
from common import UserError
from run import Count, Depth, Images, NonNegative, Pixels, Positive, Share, Width

# ==== 1. Hyperparameters ====


@dataclass
class Config(run.ProbeConfig, proposals.ProposalConfig, own.OwnConfig, run.RunConfig):
    data: str = "imagenet100"  # imagenet100, imagenet, coco, voc, synthetic, a folder, or a .txt of paths (Sec. 6)
    exif: Literal["auto", "stored", "rotated"] = "auto"  # pixels --probe_data's boxes lie on: as stored, or as rotated
    # proposals (Sec. 3, 6; more in proposals.ProposalConfig)
    strategy: Literal["topk", "randomk", "importance", "importance_released", "other_image"] = "topk"  # Sec. 4; Table 5
    max_prop: Width = 30  # M, proposals per image (Sec. 6)
    # images
    scales: tuple[Pixels, ...] = (320, 336, 352, 368, 400, 416, 432, 448, 464, 480)  # short side, px (Sec. 6; released)
    max_size: Pixels = 600  # longest side, pixels (released)
    crop_scales: tuple[Pixels, ...] = (400, 500, 600)  # short side before a random crop (released)
    crop_range: tuple[Pixels, ...] = (384, 600)  # smallest and largest side of the crop (released)
    augment: tuple[data.Augmentation, ...] = ()  # beyond the left-right flip: flips, rotate90 (no side is up), colour
    patch_size: Pixels = 128  # side of a region crop (released)
    # model
    detector: detectors.DETECTORS = "deformable_detr"  # what is pretrained (the others: Siamese DETR, Tables 1 and 2)
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # backbone (Sec. 6)
    backbone_weights: str = "swav"  # swav, swav_400, imagenet, moco_v2_200, moco_v2_800, random or a file (Sec. 6)
    backbone_norm: Literal["frozen", "bn"] = "frozen"  # BatchNorm's statistics: constant (released) or learned
    stride: Literal[4, 8, 16, 32] = 32  # of the map that DETR and Conditional DETR see
    num_feature_levels: Depth = 4  # of deformable_detr (Sec. 5)
    pre_norm: bool = True  # LayerNorm before each block, of detr (released)
    hidden_dim: Width = 256  # transformer width (Sec. 6)
    nheads: Width = 8  # attention heads
    enc_layers: Depth = 6  # encoder layers
    dec_layers: Depth = 6  # decoder layers
    dim_feedforward: Width = 1024  # width of the feed-forward layers (detr, conditional_detr: 2048)
    dropout: Share = 0.1  # in the transformer
    num_queries: Width = 300  # N (Sec. 5; detr, conditional_detr: 100)
    with_box_refine: bool = False  # iterative box refinement of deformable_detr (released: off)
    num_classes: Width = 91  # rows of f_cat; targets are row 1 (D3); detr has another one, "no object"
    embedding_target: Literal["res3", "swav_head"] = "res3"  # z: mean of res3, or SwAV's normalised projection (D1)
    # loss
    lambda_f: NonNegative = 2.0  # focal loss and its matching cost, Eq. (3) (detr: cross-entropy, 1)
    lambda_l1: NonNegative = 5.0  # L1 part of L_box and its matching cost, Eq. (3)
    lambda_giou: NonNegative = 2.0  # GIoU part of L_box and its matching cost, Eq. (3)
    lambda_e: NonNegative = 1.0  # object embedding, Eq. (3), Table 5
    embedding_mean: Literal["global", "local"] = "global"  # mean of L_emb over all processes, or over each (D4)
    # optimisation
    batch_size: Images = 192  # images per step over all processes (released: 24 per GPU x 8)
    epochs: Count = 50  # Sec. 6; ImageNet-1k 5 (released)
    lr_drop: NonNegative = 40  # epoch after which the rate is x 0.1 (Sec. 6)
    lr: Positive = 2e-4  # Sec. 6
    lr_backbone: NonNegative = 0.0  # 0 = frozen backbone (Table 5)
    lr_linear_proj_mult: NonNegative = 0.1  # rate of sampling offsets and reference points (released)
    weight_decay: NonNegative = 1e-4  # on every parameter (released)
    clip_max_norm: NonNegative = 0.1  # gradient norm, 0 = not clipped (released)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"batch_size": 224, "num_classes": 2},  # D5, D3
    "official": {"embedding_mean": "local"},  # D4
    "own": own.PRESET,
    "demo": {
        "data": "synthetic", "synthetic_images": 400, "max_prop": 20, "cache_proposals": True, "proposal_rank": "nms",
        "scales": (96, 112), "max_size": 144, "crop_scales": (112, 144), "crop_range": (72, 112), "patch_size": 32,
        "arch": "resnet18", "backbone_weights": "random", "backbone_norm": "bn", "lr_backbone": 6e-4, "hidden_dim": 128,
        "enc_layers": 2, "dec_layers": 3, "dim_feedforward": 256, "dropout": 0.0, "num_queries": 100,
        "with_box_refine": True, "num_classes": 2, "batch_size": 8, "epochs": 6, "lr_drop": 5, "lr": 6e-4,
        "num_workers": 2, "log_every": 20, "save_every": 100, "probe_images": 100,
    },
}


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """What the released configurations change with the data set and the detector (D12)."""
    recipe: dict[str, Any] = {"epochs": 5, "lr_drop": 40} if values["data"] == "imagenet" else {}
    if "deformable" not in values["detector"]:
        recipe |= {"epochs": 60, "lr": 1e-4, "dim_feedforward": 2048, "num_queries": 100}
    return recipe | {"lambda_f": 1.0} if values["detector"] == "detr" else recipe


def check(cfg: Config) -> None:
    """What a configuration alone can be wrong in."""
    detectors.check_detector(cfg)
    run.check_pair(cfg, "crop_range")
    if cfg.num_classes < 2:
        raise UserError(f"--num_classes {cfg.num_classes}: at least 2 rows are needed, the object is row 1 (D3)")
    if cfg.embedding_target == "swav_head" and cfg.backbone_weights in set(convert.BACKBONES) - {"swav", "swav_400"}:
        raise UserError(f"--embedding_target swav_head: --backbone_weights {cfg.backbone_weights} has no such head; "
                        "give swav or a file of SwAV's")


# ==== 2. Data ====


def importance_probability(n: int, m: int, released: bool = False) -> np.ndarray:
    """float64 [n]: chance of rank i = 1..n when about `m` are wanted: p_i = min(1, m w_i / sum w), w_i = -ln(i/n).

    `released`: -ln(i/301)/10 for i <= 300 and 0 beyond, whatever n and m (D8).
    """
    rank = np.arange(1, n + 1, dtype=np.float64)
    if released:
        return np.where(rank <= 300, -np.log(np.minimum(rank, 301) / 301) / 10, 0.0)
    weight = -np.log(rank / n)
    return np.minimum(1, m * weight / weight.sum()) if n > 1 else np.ones(n)


def select(boxes: np.ndarray, policy: str, m: int, rng: np.random.Generator) -> np.ndarray:
    """Sec. 4: which of the ranked proposals [n, 4] are targets, in rank order; all where there are at most m.

    Importance draws each rank by itself, so the number varies around m and may be 0; the released variant draws however
    few there are, as released.
    """
    n = len(boxes)
    if policy == "importance_released":
        return boxes[rng.random(n) < importance_probability(n, m, released=True)]
    if n <= m or policy == "topk":
        return boxes[:m]
    if policy == "randomk":
        return boxes[np.sort(rng.choice(n, m, replace=False))]
    return boxes[rng.random(n) < importance_probability(n, m)]


class RegionDataset(torch.utils.data.Dataset):
    """One sample: an augmented image, its proposals as targets, and the augmented crop of every proposal.

    Everything random is a function of (seed, epoch, index). Keys of a sample: image [3, H, W]; target {"boxes" [n, 4]
    cxcywh, "labels" [n] = 1, "patches" [n, 3, p, p]}; skipped (unreadable files);
    fallback (1 when no image with two boxes was found, D9).
    """

    def __init__(self, cfg: Config, source, indices: np.ndarray, proposals_of: proposals.Proposals):
        self.cfg, self.source, self.indices, self.proposals_of = cfg, source, indices, proposals_of
        self.needs = data.Needs(functools.partial(data.view_needs, scales=cfg.scales, max_size=cfg.max_size,
                                                  crop_scales=cfg.crop_scales, crop_range=cfg.crop_range), whole=True)
        # "similar augmentations", Sec. 6
        self.photometric = data.Photometric(0.4, 0.4, 0.4, 0.1, p_jitter=0.8, p_gray=0.2, p_blur=0.5)

    def __len__(self) -> int:
        return len(self.indices)

    def propose(self, image: Image.Image | data.ImagePyramid, index: int, epoch: int, rng: np.random.Generator
                ) -> np.ndarray:
        """Policies of Sec. 4. `other_image`: another image's boxes, stretched to this one (Table 5, first row)."""
        cfg = self.cfg
        if cfg.strategy != "other_image":
            return select(self.proposals_of(image, index, epoch), cfg.strategy, cfg.max_prop, rng)  # D6
        others = self.indices[self.indices != index] if len(self) > 1 else self.indices
        other, index = data.load_usable(self.source, int(rng.choice(others)), rng, [], others)
        stretch = np.float32([image.width / other.width, image.height / other.height] * 2)
        return select(self.proposals_of(other, index, epoch) * stretch, "topk", cfg.max_prop, rng)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        cfg, (epoch, position) = self.cfg, key
        rng = data.sample_rng(cfg.seed, epoch, position)
        skipped: list[str] = []
        for attempt in range(11):
            image, index = data.load_usable(self.source, int(self.indices[position]), rng, skipped, self.indices,
                                            needs=self.needs)
            hw = image.height, image.width
            boxes = torch.from_numpy(self.propose(image, index, epoch, rng))
            if attempt == 10:  # D9
                boxes = jittered_full_boxes(hw, rng)
            geometry = data.draw_geometry(rng, hw, scales=cfg.scales, max_size=cfg.max_size,
                                          crop_scales=cfg.crop_scales, crop_range=cfg.crop_range, augment=cfg.augment)
            view, moved, keep = data.apply_geometry(image, boxes, geometry)
            if len(keep) >= 2 or attempt == 10:
                break
            position = int(rng.integers(len(self.indices)))
        # a box cut by the crop keeps the descriptor of the whole region; patches are not flipped (released), nor turned
        patches = [data.cut_patch(image, box, cfg.patch_size, data.draw_photometric(rng, self.photometric))
                   for box in boxes[keep].tolist()]
        if "colour" in cfg.augment:
            view = data.apply_photometric(view, data.draw_photometric(rng, data.COLOUR))
        target = {"boxes": data.normalized_cxcywh(moved, (view.height, view.width)),
                  "labels": torch.ones(len(keep), dtype=torch.int64),
                  "patches": torch.stack(patches) if patches else torch.zeros(0, 3, cfg.patch_size, cfg.patch_size)}
        return {"image": data.to_normalized_tensor(view), "target": target, "index": index, "skipped": skipped,
                "fallback": int(attempt == 10)}


def jittered_full_boxes(hw: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Two boxes that cover at least 80 % of each side. [2, 4] xyxy pixels."""
    corners = np.concatenate([rng.uniform(0, 0.1, (2, 2)), rng.uniform(0.9, 1, (2, 2))], 1).astype(np.float32)
    return torch.from_numpy(corners) * torch.tensor([hw[1], hw[0]] * 2, dtype=torch.float32)


# ==== 3. Model ====


class DETReg(common.Pretext):
    """A detector with f_emb beside its f_cat (class_embed) and f_box (bbox_embed). Adds pred_features [B, Q, D_z]."""

    def __init__(self, detector: common.Detector, embedding_dim: int = 512):
        super().__init__(detector)
        self.reset_embedding(embedding_dim)

    def reset_embedding(self, dim: int) -> None:
        width = self.detector.transformer.d_model
        self.feature_embed = common.MLP(width, width, dim, 2)  # f_emb, D2

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Any]:
        outputs = self.detector(images, mask)
        return {**outputs, "pred_features": self.feature_embed(outputs["hs"])}  # z_hat = f_emb(v), Sec. 5


class RegionDescriptor(nn.Module):
    """z of a region crop: spatial mean of the res3 output (stride 8), not normalised (D1,
    D11). [n, 3, p, p] -> [n, D]"""

    def __init__(self, backbone: common.Backbone):
        super().__init__()
        self.body = copy.deepcopy(backbone.body[:6])  # conv1 to layer2
        self.dim = self.body.layer2[0].downsample[0].out_channels  # 512 for ResNet-50

    def forward(self, patches: Tensor) -> Tensor:
        return common.run_stages(self.body.named_children(), patches, ("layer2",))[-1].mean((2, 3))


class SwAVDescriptor(nn.Module):
    """z of a region crop: SwAV's 128-d projection, L2 normalised (D1). The released code leaves BatchNorm in training
    mode; ours is in eval()."""

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
    """The detector and the frozen descriptor network, on CPU. Weights follow from the seed and --backbone_weights."""
    torch.manual_seed(cfg.seed)
    focal = cfg.detector != "detr"  # each detector keeps its own classification (D12)
    model = DETReg(detectors.build_detector(cfg, cfg.num_classes if focal else cfg.num_classes + 1, focal=focal))
    backbone = model.detector.backbone[0]
    convert.load_backbone_weights(backbone.body, cfg.backbone_weights, cfg.arch)
    if cfg.embedding_target == "swav_head":
        descriptor, path = SwAVDescriptor(), convert.backbone_file(cfg.backbone_weights, "resnet50")
        drop = {r"^prototypes\.": "not part of the descriptor", r"num_batches_tracked$": "a counter nothing reads"}
        state = convert.state_of(run.read_checkpoint(path), path)
        convert.load_matching(descriptor, state, source=str(path), drop=drop)
    else:
        if not hasattr(backbone.body, "layer2"):  # --stride 4: the detector ends before res3
            backbone = common.Backbone(cfg.arch, (2,), cfg.backbone_norm)
            convert.load_backbone_weights(backbone.body, cfg.backbone_weights, cfg.arch)
        descriptor = RegionDescriptor(backbone)
    if descriptor.dim != 512:  # the embedding is as wide as its target
        model.reset_embedding(descriptor.dim)
    return model, descriptor.requires_grad_(False).eval()


# ==== 4. Loss ====


def build_criterion(cfg: Config) -> common.SetCriterion:
    # Eq. (2): L_match, without z
    matcher = common.HungarianMatcher(cfg.lambda_f, cfg.lambda_l1, cfg.lambda_giou, focal=cfg.detector != "detr")
    return common.SetCriterion(matcher, cfg.lambda_f, cfg.lambda_l1, cfg.lambda_giou)  # Eq. (3): lambda_f, lambda_b


def embedding_loss(features: Tensor, targets: list[dict], pairs: list, num_elements: float) -> Tensor:
    """Eq. (4) over the matched pairs of the last decoder layer.

    features [B, Q, D]; targets[i]["features"] [n, D]; num_elements = pairs * D.
    """
    z_hat = features[common.matched_index(pairs)]
    z = torch.cat([t["features"][j] for t, (_, j) in zip(targets, pairs)])
    return (z_hat - z).abs().sum() / num_elements  # Eq. (4); a mean, D4


def detreg_loss(cfg: Config, criterion: common.SetCriterion, outputs: dict, targets: list[dict], num_boxes: float,
                num_pairs: float, class_weight: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (3): returns (weighted total, unweighted terms).

    num_boxes, num_pairs, class_weight: this process's normalisers (common.normalizer).
    """
    # Eq. (2): sigma; Eq. (3): lambda_f L_focal + lambda_b L_box
    losses, pairs = criterion(outputs, targets, num_boxes, class_weight)
    if cfg.embedding_mean == "local":
        num_pairs = max(sum(len(q) for q, _ in pairs), 1) * cfg.accumulate
    z_hat = outputs["pred_features"]
    losses["loss_object_embedding"] = embedding_loss(z_hat, targets, pairs, num_pairs * z_hat.shape[-1])
    return criterion.total(losses) + cfg.lambda_e * losses["loss_object_embedding"], losses  # Eq. (3)


# ==== 5. Training step ====


def train_step(cfg: Config, model: nn.Module, descriptor: nn.Module, criterion: common.SetCriterion,
               optimizer: torch.optim.Optimizer, micro_batches: list[dict], device: torch.device) -> dict[str, Tensor]:
    """One optimiser step on cfg.accumulate micro-batches. Returns the unweighted loss terms of the whole, the total,
    the gradient norm, and mean_embedding_error: what L_emb would be, were every region given the mean of all z.

    Normalisers cover all processes and micro-batches, so the gradient is that of one process on
    the whole batch (tested).
    """
    counts = [len(t["labels"]) for batch in micro_batches for t in batch["targets"]]
    num_boxes = common.normalizer(sum(counts), device)
    num_pairs = common.normalizer(sum(min(n, cfg.num_queries) for n in counts), device)
    class_weight = common.normalizer(criterion.class_weight_sum(counts, cfg.num_queries), device)
    terms: dict[str, Tensor] = {}
    optimizer.zero_grad()
    for i, batch in enumerate(micro_batches):
        batch = common.batch_to_device(batch, device)
        targets = batch["targets"]
        with common.gradient_sync(model, i == len(micro_batches) - 1), common.autocast(device, cfg.amp):
            with torch.no_grad():  # z_i of every proposal, Sec. 5
                z = descriptor(torch.cat([t["patches"] for t in targets])).float()
            mean_error = (z - z.mean(0)).abs().sum() / max(z.numel(), 1)
            z = z.split([len(t["labels"]) for t in targets])
            targets = [{**t, "features": features} for t, features in zip(targets, z)]
            outputs = model(batch["images"], batch["mask"])
            with torch.autocast(device.type, enabled=False):
                outputs["pred_features"] = outputs["pred_features"].float()
                loss, losses = detreg_loss(cfg, criterion, outputs, targets, num_boxes, num_pairs, class_weight)
            common.backward(loss, optimizer, cfg.amp)
        common.add_terms(terms, {"loss": loss, **losses, "mean_embedding_error": mean_error}, len(micro_batches))
    terms["grad_norm"] = common.clip_and_step(model, optimizer, cfg.amp, cfg.clip_max_norm)
    return terms


# ==== 6. Probe ====


def probe(cfg: Config, model: DETReg, train_set: RegionDataset, probe_set: DetectionSet, device: torch.device
          ) -> dict[str, Any]:
    """Class-agnostic AP and AR (Table 6), before and after, and predictions.png. All processes call it."""
    untrained = build_models(cfg)[0].to(device)
    table, found = evaluation.class_agnostic_table(cfg, untrained, model, train_set, probe_set, device)
    if common.rank() == 0:
        evaluation.draw_class_agnostic(cfg, probe_set, train_set.proposals_of, {"DETReg (best 10)": found})
    return table


def summary(metrics: dict[str, Any]) -> str:
    title = f"class-agnostic boxes on unseen images (ground truth: {metrics.get('ground_truth')}; "
    return evaluation.probe_table(metrics, ["AP", "AP50", "AP75", "AR1", "AR10", "AR100"], title)


# ==== 7. Main ====


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = run.parse_config(Config, PRESETS, argv, script="detreg", description=__doc__, recipe=recipe_of)
    device = common.setup_distributed(cfg.device)
    cfg = own.fit_pretraining(cfg, argv, device)
    check(cfg)
    source, indices, held_out = data.open_training_images(cfg)
    probe_set = evaluation.open_class_agnostic_probe(cfg, source, held_out)
    job = run.Run(cfg, "detreg", source, len(indices), device, summary)
    if job.metrics:
        return job.metrics
    train_set = RegionDataset(cfg, source, indices, proposals.open_proposals(cfg, source))
    model, descriptor = (m.to(device) for m in build_models(cfg))
    optimizer, criterion = common.build_optimizer(cfg, model), build_criterion(cfg)
    job.restore(model, optimizer, target=descriptor)
    wrapped = common.wrap_model(model, device, compiled=cfg.compile, checkpointed=cfg.checkpoint_activations)
    loader = data.train_loader(job, train_set, data.collate)
    for step in job.steps():
        wrapped.train()
        lr = common.set_lr(optimizer, common.step_schedule(step, job.epoch_steps, (cfg.lr_drop,)))
        micro_batches = job.next_batches(loader)
        terms = train_step(cfg, wrapped, descriptor, criterion, optimizer, micro_batches, device)
        job.check(step, terms, micro_batches)
        job.log(step, terms, "loss", "loss_bbox", "loss_object_embedding", lr=lr)
        job.probe(step, functools.partial(evaluation.class_agnostic_line, cfg, probe_set, device))
        job.save(step)
    if job.fallbacks:
        run.print_rank0(f"{int(job.fallbacks)} samples had no image with two proposals after ten draws and were "
                        "given the full box (D9)")
    common.broadcast_buffers(model)
    return job.end(probe(cfg, model, train_set, probe_set, device) if probe_set else {})


if __name__ == "__main__":
    run.cli(main)
