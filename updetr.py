"""UP-DETR: unsupervised pretraining of a DETR by finding random patches of an image in it.

Paper: Zhigang Dai, Bolun Cai, Yugeng Lin, Junying Chen.
    UP-DETR: Unsupervised Pre-training for Object Detection with Transformers. CVPR 2021, arXiv 2011.09094.

Idea: Cut patches out of an image, hand them to the detector as queries, and ask where they were. A correct answer needs
    no label, and to give it the decoder must learn to look for something in the image, which is what a detector does.
    All patches are asked for at once: the object queries are divided into one group per patch, and a mask in the
    decoder's self-attention keeps the groups apart. The backbone stays frozen, and each query must also reproduce its
    patch's backbone feature, so that localising does not destroy what tells objects apart.

Diagram:
    image --draw M boxes--> b [M, 4], patches [M, 3, 128, 128] --augment--> frozen ResNet-50, mean of C5 --> p [M, 2048]
      |                                                                                                       |      |
    resize                                              Linear, each to N/M queries, 10 % dropped --> p_n [N, 256]   |
      |                                                                                                       |      |
    image [3, H, W] --> frozen ResNet-50 --> encoder --> memory           object queries q [N, 256] --> q + p_n      |
                                                           |                                               |         |
                                                           +--> decoder, groups kept apart, Eq. (3) <------+         |
                                                                       |                                             |
    b -- matching, losses, Eq. (1) -- class [N, 3], boxes [N, 4], p_hat [N, 2048] ------- L_rec, Eq. (2) ------------+

Run:
    python updetr.py --preset demo                                     # CPU, nothing downloaded, 4.5 minutes
    torchrun --nproc_per_node=8 updetr.py --data imagenet              # the published recipe
    python finetune.py --data coco --init_from out/updetr-imagenet/last.pt
    python docs/annotate.py                                            # beside its equations: site/updetr.html
    Your own images, one GPU, other detectors, the rows of the paper's tables, Fig. 5: docs/methods/updetr.md

Hyperparameters: in Config below, each with its place in the paper. `--preset paper`, `official`, `single`: the printed
    values and the released ones where they differ, and one patch for three queries (Sec. 3.1).

Deviations (paper / released code / here; in full in docs/methods/updetr.md):
    D1  Patch feature: p is added to q, no projection / Linear(2048, 256) with bias / as released.
    D2  Where it enters: "added to the object query" / the queries' position part in every layer / as released.
    D3  Shuffle of the object queries: on / off, "not helpful" / off (`--query_shuffle`).
    D4  Dropping 10 %: of the patches / of the queries, after the projection, without rescaling / as released.
    D5  Class weight of "no object": M/N / 0.1 / M/N, which is 0.1 by default (`--eos_coef`).
    D6  Classes: 2 / 3 rows: row 0 unused, 1 = found, 2 = no object / as released, on every detector.
    D7  Eq. (2): x / ||x||^2, a typing error / x / ||x||, so a mean of 2 - 2 cos / as released.
    D8  Group mask: - / rows without any allowed query (NaN) when M > N/M / block diagonal for every M.
    D9  Mean of the cross-entropy: - / of each process / over all processes and micro-batches: the same.
    D10 Target of Eq. (2), backbone learning: - / the current feature, with gradient / so (`--feature_target`).
    D11 Images of at most 16 pixels a side: - / the next image / another one is drawn, the file is named and counted.
    D12 Scales 320..480 in steps of 16: - / 384 is missing / as released.
    D13 Demo only: `--aligned_start` (detectors.align_start), and patches in their own colours.
    D14 `--proposal_method` (Siamese DETR, Table 4): - / - / the first M boxes of 8 pixels a side, then random patches.
    D15 Matching, Eq. (1): - / a query may be matched to any patch / as released (`--match_own`: to its own only).
    D16 Start: - / random / as released (`--standardized_start N`: detectors.standardize; not Deformable DETR).
    D17 Large pictures: - / decoded whole / no finer than needed (data.ImagePyramid).

Expected: at initialisation the full model's loss is about 48 (released). The demo logs, at step 0 and at its end, loss
    15.6 -> 8.7, loss_bbox 0.74 -> 0.52, loss_giou 0.91 -> 0.83, loss_feature 1.68 -> 0.05. Its table: docs/demos.md.
    Paper, Table 1 (VOC AP, 150 / 300 epochs): 56.1 / 57.2, DETR alone 49.9 / 54.1. Not rerun here: no ImageNet.
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

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
    proposal_method: Literal["none", "selective_search", "edge_boxes", "random"] = "none"  # none: patches (D14)
    # images
    scales: tuple[Pixels, ...] = (320, 336, 352, 368, 400, 416, 432, 448, 464, 480)  # short side, pixels (D12)
    max_size: Pixels = 600  # longest side, pixels (released)
    patch_size: Pixels = 128  # side of a query patch (Sec. 4)
    # pretext
    num_patches: Width = 10  # M, query patches per image (Sec. 4; Table 3)
    mask_ratio: Share = 0.1  # share of patch features set to zero (Sec. 3.2)
    query_shuffle: bool = False  # permute the object queries at every step (Sec. 3.2; D3)
    attention_mask: bool = True  # keep the groups apart in the decoder, Eq. (3), Fig. 6
    match_own: bool = False  # a query may be matched only to the patch that it carries (D15)
    reconstruction: bool = True  # L_rec, Eq. (2), Table 4
    patch_colours: bool = True  # change the colours of the query patches (Sec. 4)
    aligned_start: bool = False  # begin with queries and keys that can be compared (demo; D13)
    standardized_start: Natural = 0  # images that say how the first weights standardise features (D16); 0 = off
    feature_target: Literal["current", "start"] = "current"  # L_rec's backbone: as it is, or as it was (D10)
    # model
    detector: detectors.DETECTORS = "detr"  # what is pretrained (Siamese DETR, Tables 1 and 2)
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # backbone (Sec. 4)
    backbone_weights: str = "swav"  # swav, swav_400, imagenet, moco_v2_200, moco_v2_800, random or a file (Sec. 4)
    backbone_norm: Literal["frozen", "bn"] = "frozen"  # BatchNorm's statistics: constant (released) or learned
    stride: Literal[4, 8, 16, 32] = 32  # of the map that DETR and Conditional DETR see
    num_feature_levels: Depth = 4  # of deformable_detr
    pre_norm: bool = True  # LayerNorm before each block, of detr (released)
    hidden_dim: Width = 256  # transformer width (Sec. 4)
    nheads: Width = 8  # attention heads (Sec. 4)
    enc_layers: Depth = 6  # encoder layers (Sec. 4)
    dec_layers: Depth = 6  # decoder layers (Sec. 4)
    dim_feedforward: Width = 2048  # width of the feed-forward layers (deformable: 1024)
    dropout: Share = 0.1  # in the transformer
    num_queries: Width = 100  # N (Sec. 4; deformable: 300)
    with_box_refine: bool = False  # iterative box refinement of deformable_detr
    # loss
    lambda_cls: NonNegative = 1.0  # cross-entropy and its matching cost (released)
    lambda_l1: NonNegative = 5.0  # L1 part of L_box and its matching cost (released)
    lambda_giou: NonNegative = 2.0  # GIoU part of L_box and its matching cost (released)
    lambda_rec: NonNegative = 1.0  # L_rec, Eq. (1)
    eos_coef: NonNegative | None = None  # class weight of "no object"; none: M/N (D5)
    # optimisation
    batch_size: Images = 256  # images per step over all processes (Sec. 4)
    epochs: Count = 60  # Sec. 4
    lr_drop: NonNegative = 40  # epoch after which the rate is x 0.1 (Sec. 4)
    lr: Positive = 1e-4  # Sec. 4
    lr_backbone: NonNegative = 0.0  # 0 = frozen backbone (Sec. 3.3; Table 4)
    lr_linear_proj_mult: NonNegative = 0.1  # rate of sampling offsets and reference points of Deformable DETR
    weight_decay: NonNegative = 1e-4  # on every parameter (Sec. 4)
    clip_max_norm: NonNegative = 0.1  # gradient norm, 0 = not clipped (released)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"query_shuffle": True},  # D3
    "official": {"eos_coef": 0.1},  # D5
    "single": {"num_patches": 1, "num_queries": 3},  # single-query patch detection, Sec. 3.1
    "demo": {
        "data": "synthetic", "scales": (48,), "max_size": 80, "patch_size": 16, "num_patches": 5,
        "patch_colours": False, "aligned_start": True, "feature_target": "start", "arch": "resnet18",
        "backbone_weights": "random", "backbone_norm": "bn", "lr_backbone": 1e-3, "stride": 4, "hidden_dim": 64,
        "nheads": 4, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 128, "dropout": 0.0, "num_queries": 5,
        "mask_ratio": 0.0, "batch_size": 32, "epochs": 44, "lr_drop": 38, "lr": 1e-3, "num_workers": 2, "log_every": 50,
        "save_every": 500, "probe_images": 200,
    },
}


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """What follows from the detector (Siamese DETR, Tables 1 and 2)."""
    return {"dim_feedforward": 1024, "num_queries": 300} if "deformable" in values["detector"] else {}


def check(cfg: Config) -> None:
    """What a configuration alone can be wrong in."""
    detectors.check_detector(cfg)
    if cfg.num_queries % cfg.num_patches:
        fitting = max(cfg.num_queries // cfg.num_patches, 1) * cfg.num_patches
        raise UserError(f"--num_queries {cfg.num_queries} --num_patches {cfg.num_patches}: every patch needs the same "
                        f"number of queries; for example --num_queries {fitting}")
    if not detectors.norms_see_enough(cfg, cfg.batch_size * cfg.num_patches, cfg.patch_size):
        raise UserError(f"--batch_size {cfg.batch_size} --num_patches 1: one patch per process and micro-batch, of "
                        f"which --patch_size {cfg.patch_size} leaves BatchNorm one value; give more, or larger ones")
    if cfg.proposal_method == "none" and (cfg.proposal_store or cfg.cache_proposals):
        raise UserError("--proposal_store and --cache_proposals are of no use to random patches: give a "
                        "--proposal_method too (selective_search, edge_boxes, random)")


# ==== 2. Data ====


def draw_patches(rng: np.random.Generator, hw: tuple[int, int], count: int, min_side: int = 8) -> np.ndarray:
    """`count` independent boxes int64 [count, 4] xyxy px: sides uniform in min_side..side - min_side, place uniform;
    no limit on aspect or overlap.

    A box never touches the right or bottom border (released: exclusive upper ends). Both sides of the image must exceed
    2 * min_side.
    """
    image_wh = np.array([hw[1], hw[0]])
    sides = np.stack([rng.integers(min_side, side - min_side + 1, count) for side in image_wh], 1)  # [count, 2] w, h
    corner = rng.integers(0, image_wh - sides)
    return np.concatenate([corner, corner + sides], 1)


class PatchDataset(torch.utils.data.Dataset):
    """One sample: an image, M boxes in it, and what is in them (Sec. 3).

    Everything random is a function of (seed, epoch, index). Keys of a sample: image [3, H, W]; target {"boxes" [M, 4]
    cxcywh, "labels" [M] = 1, "patches" [M, 3, p, p], "index" of the image}; index; skipped (unusable files); with
    proposals fallback (1 when they were fewer than M, D14). augment False (probe): one scale, plain colours.
    """

    def __init__(self, cfg: Config, source, indices: np.ndarray, proposals_of: proposals.Proposals | None = None,
                 augment: bool = True):
        self.cfg, self.source, self.indices, self.proposals_of = cfg, source, indices, proposals_of
        self.scales = cfg.scales if augment else (max(cfg.scales),)
        self.needs = data.Needs(functools.partial(data.view_needs, scales=self.scales, max_size=cfg.max_size,
                                                  crop_scales=None), whole=True)
        p = (0.8, 0.2, 0.5) if augment and cfg.patch_colours else (0, 0, 0)
        # Sec. 4: as SimCLR; released strengths
        self.photometric = data.Photometric(0.4, 0.4, 0.4, 0.1, p_jitter=p[0], p_gray=p[1], p_blur=p[2])

    def __len__(self) -> int:
        return len(self.indices)

    def propose(self, image: Image.Image | data.ImagePyramid, index: int, epoch: int) -> np.ndarray:
        """The first M proposals of at least 8 pixels a side, as patches have: [m, 4] xyxy px, m <= M (D14)."""
        if self.proposals_of is None:
            return np.zeros((0, 4), np.int64)
        boxes = self.proposals_of(image, index, epoch)
        return boxes[(boxes[:, 2:] - boxes[:, :2] >= 8).all(1)][:self.cfg.num_patches]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        cfg, (epoch, position) = self.cfg, key
        rng = data.sample_rng(cfg.seed, epoch, position)
        skipped: list[str] = []
        image, index = data.load_usable(self.source, int(self.indices[position]), rng, skipped, self.indices,
                                        min_side=17, needs=self.needs)  # D11
        hw = image.height, image.width
        proposed = self.propose(image, index, epoch)
        missing = cfg.num_patches - len(proposed)
        boxes = np.concatenate([proposed, draw_patches(rng, hw, missing)])
        # patches are cut from the original image, and neither they nor the image are flipped (released)
        patches = [data.cut_patch(image, box, cfg.patch_size, data.draw_photometric(rng, self.photometric))
                   for box in boxes.tolist()]
        geometry = data.draw_geometry(rng, hw, scales=self.scales, max_size=cfg.max_size, crop_scales=None, flip=0)
        view, moved, _ = data.apply_geometry(image, torch.from_numpy(boxes).float(), geometry)
        target = {"boxes": data.normalized_cxcywh(moved, (view.height, view.width)),
                  "labels": torch.ones(len(boxes), dtype=torch.int64),
                  "patches": torch.stack(patches), "index": torch.tensor(index)}
        return {"image": data.to_normalized_tensor(view), "target": target, "index": index, "skipped": skipped,
                **({} if self.proposals_of is None else {"fallback": int(missing > 0)})}


# ==== 3. Model ====


def group_mask(num_queries: int, num_patches: int, device: torch.device | str = "cpu") -> Tensor:
    """Eq. (3): [N, N] bool, True (minus infinity in the paper) where query i may not look at query j, because they
    belong to different patches (D8)."""
    group = torch.arange(num_queries, device=device) // (num_queries // num_patches)
    return group[:, None] != group[None]  # Eq. (3)


def draw_masking(cfg: Config, batch: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The randomness of one forward pass: which queries keep their patch feature [B, N, 1] (D4), and the order of the
    object queries [N] (D3)."""
    keep = torch.rand(batch, cfg.num_queries, 1, device=device) > cfg.mask_ratio
    return keep, torch.randperm(cfg.num_queries, device=device) if cfg.query_shuffle else None


def patch_features(backbone: nn.Module, patches: Tensor) -> Tensor:
    """p, the global average of C5 (Sec. 3.1). [B, m, 3, p, p] -> [B, m, C]"""
    return backbone(patches.flatten(0, 1))[-1].mean((2, 3)).unflatten(0, patches.shape[:2])


class UPDETR(common.Pretext):
    """A detector whose object queries are told what to look for. Names as released: patch2query, feature_align."""

    def __init__(self, detector: common.Detector, num_patches: int, attention_mask: bool = True,
                 reconstruction: bool = True):
        super().__init__(detector)
        width, channels = detector.transformer.d_model, detector.backbone[0].num_channels[-1]
        self.num_patches, self.attention_mask = num_patches, attention_mask
        self.patch2query = nn.Linear(channels, width)  # D1
        self.feature_align = common.MLP(width, width, channels, 2) if reconstruction else None

    def forward(self, images: Tensor, mask: Tensor, patches: Tensor, keep: Tensor | None = None,
                order: Tensor | None = None) -> dict[str, Any]:
        """images [B, 3, H, W], mask [B, H, W], patches [B, m, 3, p, p] with m <= M (in training m = M); keep, order:
        see draw_masking.

        Returns the detector's outputs for the first n = m * N / M queries, with pred_features [B, n, C] of every layer,
        and patch_features [B, m, C].
        """
        num_queries, given = len(self.detector.queries()), patches.shape[1]
        if given > self.num_patches:
            raise UserError(f"{given} query patches: this model was made for at most {self.num_patches} at a time")
        p = patch_features(self.detector.backbone[0], patches)
        # query i belongs to patch i // (N / M)
        content = self.patch2query(p).repeat_interleave(num_queries // self.num_patches, 1)  # [B, n, D]
        if keep is not None:
            content = content * keep
        queries = self.detector.conditioned_queries(content, order)  # p + q, Sec. 3.1; D2
        blocked = None
        if self.attention_mask:
            n = content.shape[1]
            blocked = group_mask(num_queries, self.num_patches, images.device)[:n, :n]  # Eq. (3)
        outputs = self.detector(images, mask, queries, blocked)
        if self.feature_align is not None:
            for layer in (outputs, *outputs["aux_outputs"]):
                layer["pred_features"] = self.feature_align(layer["hs"]).float()  # p_hat, Sec. 3.3
        return {**outputs, "patch_features": p.float()}


def build_models(cfg: Config) -> tuple[UPDETR, nn.Module | None]:
    """The model, and the frozen backbone whose features are reconstructed (None: the model's own), on CPU. Weights
    follow from the seed and --backbone_weights."""
    torch.manual_seed(cfg.seed)
    detector = detectors.build_detector(cfg, 3, focal=False)  # D6
    backbone, target_backbone = detector.backbone[0], None
    convert.load_backbone_weights(backbone.body, cfg.backbone_weights, cfg.arch)
    if cfg.feature_target == "start" and cfg.reconstruction:
        target_backbone = copy.deepcopy(backbone).requires_grad_(False).eval()
    model = UPDETR(detector, cfg.num_patches, cfg.attention_mask, cfg.reconstruction and cfg.lambda_rec > 0)
    if cfg.aligned_start:
        detectors.align_start(detector, model.patch2query)
    return model, target_backbone


@torch.no_grad()
def standardize_start(cfg: Config, model: UPDETR, train_set: PatchDataset, device: torch.device) -> None:
    """Let the first weights see standardised features, the map's and the patches' own (D16)."""
    backbone, maps, patches = model.detector.backbone[0].eval(), [], []
    for position in data.evenly_spread(len(train_set), cfg.standardized_start):
        sample = train_set[0, position]
        maps.append(backbone(sample["image"][None].to(device))[-1][0].flatten(1).T)  # [H*W, C]
        patches.append(patch_features(backbone, sample["target"]["patches"][None].to(device))[0])  # [M, C]
    detectors.standardize(model.detector.input_proj, torch.cat(maps))
    detectors.standardize(model.patch2query, torch.cat(patches))


# ==== 4. Loss ====


def build_criterion(cfg: Config) -> common.SetCriterion:
    """Eq. (1): the matching ignores the groups; any query may be matched to any patch's box, and then reconstructs the
    feature of THAT patch. match_own: only to the patch that it carries (D15)."""
    matcher = common.HungarianMatcher(cfg.lambda_cls, cfg.lambda_l1, cfg.lambda_giou, focal=False,
                                      within_groups=cfg.match_own)
    # Eq. (1): lambda_{c_i}, D5
    eos_coef = cfg.num_patches / cfg.num_queries if cfg.eos_coef is None else cfg.eos_coef
    return common.SetCriterion(matcher, cfg.lambda_cls, cfg.lambda_l1, cfg.lambda_giou, eos_coef=eos_coef,
                               weight_feature=cfg.lambda_rec if cfg.reconstruction else 0.0)


def updetr_loss(criterion: common.SetCriterion, outputs: dict, targets: list[dict], num_boxes: float,
                class_weight: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (1): returns (weighted total over all decoder layers, unweighted terms).

    num_boxes, class_weight: this process's normalisers (common.normalizer).
    """
    targets = [{**t, "features": t.get("features", p)} for t, p in zip(targets, outputs["patch_features"])]
    losses, _ = criterion(outputs, targets, num_boxes, class_weight)  # Eq. (2): loss_feature, D7
    return criterion.total(losses), losses  # Eq. (1)


# ==== 5. Training step ====


def train_step(cfg: Config, model: nn.Module, target_backbone: nn.Module | None, criterion: common.SetCriterion,
               optimizer: torch.optim.Optimizer, micro_batches: list[dict], device: torch.device) -> dict[str, Tensor]:
    """One optimiser step on cfg.accumulate micro-batches. Returns the unweighted loss terms of the whole, the total and
    the gradient norm.

    Normalisers cover all processes and micro-batches, so the gradient is that of one process on the whole batch
    (tested).
    """
    counts = [len(t["labels"]) for batch in micro_batches for t in batch["targets"]]
    num_boxes = common.normalizer(sum(counts), device)
    class_weight = common.normalizer(criterion.class_weight_sum(counts, cfg.num_queries), device)
    terms: dict[str, Tensor] = {}
    optimizer.zero_grad()
    for i, batch in enumerate(micro_batches):
        batch = common.batch_to_device(batch, device)
        images, targets = batch["images"], batch["targets"]
        patches = torch.stack([t["patches"] for t in targets])  # [B, M, 3, p, p]
        with common.gradient_sync(model, i == len(micro_batches) - 1), common.autocast(device, cfg.amp):
            if target_backbone is not None:  # D10
                with torch.no_grad():
                    features = patch_features(target_backbone, patches).float()
                targets = [{**t, "features": p} for t, p in zip(targets, features)]
            keep, order = draw_masking(cfg, len(images), device)
            outputs = model(images, batch["mask"], patches, keep, order)
            with torch.autocast(device.type, enabled=False):
                loss, losses = updetr_loss(criterion, outputs, targets, num_boxes, class_weight)
            common.backward(loss, optimizer, cfg.amp)
        common.add_terms(terms, {"loss": loss, **losses}, len(micro_batches))
    terms["grad_norm"] = common.clip_and_step(model, optimizer, cfg.amp, cfg.clip_max_norm)
    return terms


# ==== 6. Probe ====


@torch.no_grad()
def find_patches(cfg: Config, model: nn.Module, probe_set: PatchDataset, device: torch.device, other: bool = False,
                 text: str = "") -> list[dict]:
    """Where the model finds the query patches of unseen images: {"index", "true" [M, 4], "found" [M, 4] cxcywh,
    "score" [M]} per image. The most confident box of each patch's group counts.

    other: the queries are patches of the next image of the batch; "asked" are their own boxes.
    """
    model.eval()
    found = []
    for batch in evaluation.probe_batches(probe_set, cfg.num_workers, text):
        targets = asked = batch["targets"]
        if other:
            asked = targets[1:] + targets[:1]
        patches = torch.stack([t["patches"] for t in asked])
        outputs = model(*(x.to(device) for x in (batch["images"], batch["mask"], patches)))
        scores, boxes, _ = evaluation.most_confident(outputs["pred_logits"], outputs["pred_boxes"], cfg.num_patches)
        found += [{"index": t["index"].item(), "true": t["boxes"].tolist(), "asked": q["boxes"].tolist(),
                   "found": b.tolist(), "score": s.tolist()} for t, q, b, s in zip(targets, asked, boxes, scores)]
    return evaluation.gather(found)


def open_probe(cfg: Config, probe_source, held_out: np.ndarray) -> PatchDataset:
    proposals_of = None if cfg.proposal_method == "none" else proposals.Proposals(cfg)
    return PatchDataset(cfg, probe_source, held_out, proposals_of, augment=False)


def probe(cfg: Config, model: nn.Module, probe_source, held_out: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Mean IoU and recall at 0.5 of the most confident box per query patch, before and after, with the controls of
    evaluation.localization_table, and predictions.png. All processes call it; rank 0 alone gets a table.

    random_boxes: another draw of the sampler, or boxes of the proposals' sizes. shuffled: patches of another image as
    queries.
    """
    probe_set = open_probe(cfg, probe_source, held_out)
    untrained = build_models(cfg)[0].to(device)
    find = functools.partial(find_patches, cfg, probe_set=probe_set, device=device)
    rows = evaluation.before_and_after(find, untrained, model)
    if common.rank() != 0:
        return {}

    pool = np.concatenate([np.array(row["true"])[:, 2:] for row in rows["pretrained"]])  # relative w, h

    def random_boxes(i: int, row: dict) -> Tensor:
        rng, hw = np.random.default_rng([cfg.seed, i]), (480, 640)
        boxes = (proposals.random_boxes(rng, hw, cfg.num_patches, pool) if probe_set.proposals_of
                 else draw_patches(rng, hw, cfg.num_patches))
        return data.normalized_cxcywh(torch.from_numpy(boxes).float(), hw)

    evaluation.draw_localization(Path(cfg.out) / "predictions.png", probe_source, rows["pretrained"][:6],
                                 ("query patches", "UP-DETR (most confident box per patch)"))
    return evaluation.localization_table(rows, random_boxes)


def summary(metrics: dict[str, Any]) -> str:
    return evaluation.probe_table(metrics, ["IoU", "recall50"], "most confident box per query patch, unseen images (")


# ==== 7. Main ====


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = run.parse_config(Config, PRESETS, argv, script="updetr", description=__doc__, recipe=recipe_of)
    device = common.setup_distributed(cfg.device)
    check(cfg)
    source, indices, probe_source, held_out = data.open_pretraining(cfg)
    job = run.Run(cfg, "updetr", source, len(indices), device, summary)
    if job.metrics:
        return job.metrics
    proposals_of = None if cfg.proposal_method == "none" else proposals.open_proposals(cfg, source)
    train_set = PatchDataset(cfg, source, indices, proposals_of)
    model, target_backbone = (m.to(device) if m else None for m in build_models(cfg))
    if cfg.standardized_start and job.start == 0:
        standardize_start(cfg, model, train_set, device)
    optimizer, criterion = common.build_optimizer(cfg, model), build_criterion(cfg)
    job.restore(model, optimizer, target=target_backbone)
    wrapped = common.wrap_model(model, device, compiled=cfg.compile, checkpointed=cfg.checkpoint_activations)
    loader = data.train_loader(job, train_set, data.collate)
    kept = evaluation.KeptSamples(open_probe(cfg, probe_source, held_out))
    find = functools.partial(find_patches, cfg, probe_set=kept, device=device)
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
        run.print_rank0(f"{int(job.fallbacks)} samples had fewer than {cfg.num_patches} proposals and were filled up "
                        "with random patches (D14)")
    common.broadcast_buffers(model)
    return job.end(probe(cfg, model, probe_source, held_out, device) if len(held_out) else {})


if __name__ == "__main__":
    run.cli(main)
