"""UP-DETR: unsupervised pretraining of a DETR by finding random patches of an image in it.

Paper: Zhigang Dai, Bolun Cai, Yugeng Lin, Junying Chen.
    UP-DETR: Unsupervised Pre-training for Object Detection with Transformers. CVPR 2021, arXiv 2011.09094.

Idea: Cut patches out of an image, hand them to the detector as queries, and ask where they were. A correct answer needs
    no label, and to give it the decoder must learn to look for something in the image, which is what a detector does.
    All patches are asked for at once: the object queries are divided into one group per patch, and a mask in the
    decoder's self-attention keeps the groups apart. The backbone stays frozen, and each query must also reproduce its
    patch's backbone feature, so that localising does not destroy what tells objects apart.

Diagram:
    image [3, H0, W0] --draw M boxes--> b [M, 4], patches [M, 3, 128, 128] --augment--> frozen ResNet-50, mean of C5 --> p [M, 2048]
        |                                                                                                                |      |
      resize                                                                                 Linear, each to N/M queries, 10 % dropped
        |                                                                                                                |      |
    image [3, H, W] --> frozen ResNet-50 --> encoder --> memory                               object queries q [N, 256] + p_n   |
                                                 |                                                       |                      |
                                                 +--> decoder, groups masked from each other, Eq. (3) <--+                      |
                                                                     |                                                          |
                                     class [N, 3], boxes [N, 4], p_hat [N, 2048] -- matching, Eq. (1) -- L_rec, Eq. (2) --------+

Run:
    python updetr.py --preset demo                                         # CPU, nothing downloaded, 4.5 minutes
    python updetr.py --preset demo --data MY_IMAGES                        # the same small model on your own images
    torchrun --nproc_per_node=8 updetr.py --data imagenet                  # the published recipe
    python updetr.py --data coco --batch_size 256 --accumulate 32 --amp bf16     # one GPU, same global batch
    torchrun --nproc_per_node=8 updetr.py --data imagenet --detector conditional_detr      # as in Siamese DETR, Tables 1 and 2
    python finetune.py --data coco --init_from out/updetr-imagenet/last.pt
    python figures.py localize --checkpoint out/updetr-imagenet/last.pt --image IMAGE --patches x1,y1,x2,y2     # Fig. 5

    Tables 3 and 4, Fig. 6 (15 epochs, drop at 10, then 150 epochs on VOC): --preset single; --attention_mask false;
    --reconstruction false; --lr_backbone 1e-4.

Hyperparameters (default; where from):
    images        short side 320..480, long side <= 600, no flip                  Sec. 4; released
    patches       M = 10, any size from 8 px, 128 x 128, SimCLR-like colours      Sec. 3, 4; released
    model         DETR (pre-norm), ResNet-50 SwAV frozen, 100 queries, 6 + 6      Sec. 4
    queries       group mask, 10 % of the patch features to zero                  Sec. 3.2
    losses        1 cross-entropy, 5 L1, 2 GIoU, 1 reconstruction                 Eq. (1); released
    optimiser     AdamW 1e-4, weight decay 1e-4, clip 0.1, batch 32 x 8           Sec. 4; released
    schedule      60 epochs, x 0.1 after 40                                       Sec. 4

Deviations (paper / released code / here):
    D1  Patch feature: p is added to q, no projection / Linear(2048, 256) with bias / as released.
    D2  Where it enters: "added to the object query" / the sum is the position part of the queries in every decoder
        layer, content starts at zero / as released; on Deformable DETR the position half of the query, which the
        reference point is predicted from too.
    D3  Shuffle of the object queries: on / off, "not helpful" / off (`--query_shuffle`, in `--preset paper`).
    D4  Dropping 10 % of patches: of the patches / of each query by itself, after the projection,
        without rescaling / as released.
    D5  Class weight of "no object": M/N / 0.1 / M/N, which is 0.1 by default (`--eos_coef`).
    D6  Classes: 2 / 3 rows: row 0 unused, 1 = found, 2 = no object / as released, on every detector.
    D7  Eq. (2) prints x / ||x||^2 / x / ||x||, which makes it a mean of 2 - 2 cos / as released;
        the square in the paper is a typing error.
    D8  Group mask: released loop leaves rows without any allowed query (NaN) when M > N/M / block diagonal for every M.
    D9  The weighted mean of the cross-entropy: - / of each process / over all processes and micro-batches:
        the same, every image having M patches.
    D10 Target of Eq. (2) with a learning backbone: not said / the current feature, with gradient / as released;
        `--feature_target start`: the frozen backbone as it was (demo: its backbone starts random).
    D11 Images of at most 16 pixels a side: not said / the next image / another image is drawn,
        the file is named and counted.
    D12 Scales 320..480 in steps of 16: 384 is missing in the released list / as released.
    D13 Demo only: `--aligned_start` (common.align_start), and patches in their own colours:
        a random backbone on a CPU has 4 minutes.

Expected: at initialisation the loss of the full model is about 48 (released, random boxes). The demo logs, at step 0
    and at its end, loss 15.6 -> 8.7, loss_bbox 0.74 -> 0.52, loss_giou 0.91 -> 0.83, loss_feature 1.68 -> 0.05: boxes
    improve slowly. Its table stands in README.md. Paper, Table 1 (VOC AP after fine-tuning 150 / 300 epochs): 56.1 /
    57.2, DETR alone 49.9 / 54.1. Not rerun here: no ImageNet.
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
from torch import Tensor, nn

import convert
import data
import evaluation
import run
from common import UserError

# ==== 1. Hyperparameters ====


@dataclass
class Config:
    # data
    data: str = "imagenet"  # imagenet100, imagenet, coco, voc, synthetic, a folder of images, or a .txt with one path per line (Sec. 4)
    data_root: str | None = None  # where a named data set lies; else $DATA_ROOT, else data/<name>
    synthetic_images: int = 800  # size of the synthetic pool
    synthetic_size: int = 160  # side of a synthetic scene, pixels
    out: str | None = None  # output folder; else out/updetr-<preset or data>
    preset: str | None = None  # paper, official, single or demo
    # images
    scales: tuple[int, ...] = (320, 336, 352, 368, 400, 416, 432, 448, 464, 480)  # short side, pixels (D12)
    max_size: int = 600  # longest side, pixels (released)
    patch_size: int = 128  # side of a query patch (Sec. 4)
    # pretext
    num_patches: int = 10  # M, query patches per image (Sec. 4; Table 3)
    mask_ratio: float = 0.1  # share of patch features set to zero (Sec. 3.2)
    query_shuffle: bool = False  # permute the object queries at every step (Sec. 3.2; D3)
    attention_mask: bool = True  # keep the groups apart in the decoder, Eq. (3), Fig. 6
    reconstruction: bool = True  # L_rec, Eq. (2), Table 4
    patch_colours: bool = True  # change the colours of the query patches (Sec. 4)
    aligned_start: bool = False  # begin with queries and keys that can be compared (demo; D13)
    feature_target: Literal["current", "start"] = "current"  # whose feature is reconstructed: the backbone as it is, or as it was (D10)
    # model
    detector: common.DETECTORS = "detr"  # what is pretrained (Siamese DETR, Tables 1 and 2)
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # backbone (Sec. 4)
    backbone_weights: str = "swav"  # swav, imagenet, moco_v2, random or a file (Sec. 4)
    backbone_norm: Literal["frozen", "bn"] = "frozen"  # BatchNorm with constant or with learned statistics (released: frozen)
    stride: Literal[4, 8, 16, 32] = 32  # of the map that DETR and Conditional DETR see; below 32 the last stages are left out
    num_feature_levels: int = 4  # of deformable_detr
    pre_norm: bool = True  # LayerNorm before each block, of detr (released)
    hidden_dim: int = 256  # transformer width (Sec. 4)
    nheads: int = 8  # attention heads (Sec. 4)
    enc_layers: int = 6  # encoder layers (Sec. 4)
    dec_layers: int = 6  # decoder layers (Sec. 4)
    dim_feedforward: int = 2048  # width of the feed-forward layers (deformable: 1024)
    dropout: float = 0.1  # in the transformer
    num_queries: int = 100  # N (Sec. 4; deformable: 300)
    with_box_refine: bool = False  # iterative box refinement of deformable_detr
    # loss
    lambda_cls: float = 1.0  # cross-entropy and its matching cost (released)
    lambda_l1: float = 5.0  # L1 part of L_box and its matching cost (released)
    lambda_giou: float = 2.0  # GIoU part of L_box and its matching cost (released)
    lambda_rec: float = 1.0  # L_rec, Eq. (1)
    eos_coef: float | None = None  # class weight of "no object"; none: M/N (D5)
    # optimisation
    batch_size: int = 256  # images per step over all processes (Sec. 4)
    accumulate: int = 1  # micro-batches per step: one GPU reaches the global batch
    epochs: int = 60  # Sec. 4
    lr_drop: float = 40  # epoch after which the rate is x 0.1 (Sec. 4)
    lr: float = 1e-4  # Sec. 4
    lr_backbone: float = 0.0  # 0 = frozen backbone (Sec. 3.3; Table 4)
    lr_linear_proj_mult: float = 0.1  # rate of sampling offsets and reference points of Deformable DETR
    weight_decay: float = 1e-4  # on every parameter (Sec. 4)
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
    probe_data: str | None = None  # other images to find patches in, as --data; else held-out ones
    probe_images: int = 0  # images of the probe, held out from training; 0 = no probe


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"query_shuffle": True},                                        # D3
    "official": {"eos_coef": 0.1},                                           # D5
    "single": {"num_patches": 1, "num_queries": 3},                          # single-query patch detection, Sec. 3.1
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
    return {"dim_feedforward": 1024, "num_queries": 300} if values["detector"].startswith("deformable") else {}


# ==== 2. Data ====


def draw_patches(rng: np.random.Generator, hw: tuple[int, int], count: int, min_side: int = 8) -> np.ndarray:
    """`count` independent boxes int64 [count, 4] xyxy px: sides uniform in min_side..side - min_side, place uniform;
    no limit on aspect or overlap.

    A box never touches the right or bottom border (released: exclusive upper ends).
    Both sides of the image must exceed 2 * min_side.
    """
    # [count, 2] w, h
    sides = np.stack([rng.integers(min_side, side - min_side + 1, count) for side in (hw[1], hw[0])], 1)
    corner = rng.integers(0, np.array([hw[1], hw[0]]) - sides)
    return np.concatenate([corner, corner + sides], 1)


class PatchDataset(torch.utils.data.Dataset):
    """One sample: an image, M boxes in it, and what is in them (Sec. 3).
    Everything random is a function of (seed, epoch, index).

    Keys of a sample: image [3, H, W]; target {"boxes" [M, 4] cxcywh, "labels" [M] = 1, "patches" [M, 3, p, p], "index"
    of the image}; skipped (unusable files). augment False (probe): one scale, plain colours.
    """

    def __init__(self, cfg: Config, source, indices: np.ndarray, augment: bool = True):
        self.cfg, self.source, self.indices = cfg, source, indices
        self.scales = cfg.scales if augment else (max(cfg.scales),)
        p = (0.8, 0.2, 0.5) if augment and cfg.patch_colours else (0, 0, 0)
        # Sec. 4: as SimCLR; released strengths
        self.photometric = data.Photometric(0.4, 0.4, 0.4, 0.1, p_jitter=p[0], p_gray=p[1], p_blur=p[2])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, position = key
        rng = data.sample_rng(self.cfg.seed, epoch, position)
        skipped: list[str] = []
        image, index = data.load_usable(self.source, int(self.indices[position]), rng, skipped,
                                        self.indices, min_side=17)  # D11
        boxes = draw_patches(rng, (image.height, image.width), self.cfg.num_patches)
        # patches are cut from the original image, and neither they nor the image are flipped (released)
        patches = [data.cut_patch(image, box, self.cfg.patch_size, data.draw_photometric(rng, self.photometric))
                   for box in boxes.tolist()]
        geometry = data.draw_geometry(rng, (image.height, image.width), scales=self.scales, max_size=self.cfg.max_size,
                                      crop_scales=None, flip=0)
        view, moved, _ = data.apply_geometry(image, torch.from_numpy(boxes).float(), geometry)
        target = {"boxes": data.normalized_cxcywh(moved, (view.height, view.width)),
                  "labels": torch.ones(len(boxes), dtype=torch.int64),
                  "patches": torch.stack(patches), "index": torch.tensor(index)}
        return {"image": data.to_normalized_tensor(view), "target": target, "index": index, "skipped": skipped}


# ==== 3. Model ====


def group_mask(num_queries: int, num_patches: int, device: torch.device | str = "cpu") -> Tensor:
    """Eq. (3): [N, N] bool, True (minus infinity in the paper) where query i may not look at query j:
    they belong to different patches. D8."""
    group = torch.arange(num_queries, device=device) // (num_queries // num_patches)
    return group[:, None] != group[None]


def draw_masking(cfg: Config, batch: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The randomness of one forward pass: which queries keep their patch feature [B, N, 1] (D4),
    and the order of the object queries [N] (D3)."""
    keep = torch.rand(batch, cfg.num_queries, 1, device=device) > cfg.mask_ratio
    return keep, torch.randperm(cfg.num_queries, device=device) if cfg.query_shuffle else None


class UPDETR(common.Pretext):
    """A detector whose object queries are told what to look for. Names as released: patch2query, feature_align."""

    def __init__(self, detector: common.Detector, num_patches: int, attention_mask: bool = True,
                 reconstruction: bool = True):
        super().__init__(detector)
        d, channels = detector.transformer.d_model, detector.backbone[0].num_channels[-1]
        self.num_patches, self.attention_mask = num_patches, attention_mask
        self.patch2query = nn.Linear(channels, d)                            # D1
        self.feature_align = common.MLP(d, d, channels, 2) if reconstruction else None

    def forward(self, images: Tensor, mask: Tensor, patches: Tensor, keep: Tensor | None = None,
                order: Tensor | None = None) -> dict[str, Any]:
        """images [B, 3, H, W], mask [B, H, W], patches [B, m, 3, p, p] with m <= M (in training m = M);
        keep, order: see draw_masking.

        Returns the detector's outputs for the first m * N / M queries, with pred_features [B, n, C] of every layer,
        and patch_features [B, m, C].
        """
        total, (batch, given) = len(self.detector.query_embed.weight), patches.shape[:2]
        if given > self.num_patches:
            raise UserError(f"{given} query patches: this model was made for at most {self.num_patches} at a time")
        # [B, m, C], global average of C5
        p = self.detector.backbone[0](patches.flatten(0, 1))[-1].mean((2, 3)).unflatten(0, (batch, given))
        # [B, n, D]: query i belongs to patch i // (N / M)
        content = self.patch2query(p).repeat_interleave(total // self.num_patches, 1)
        if keep is not None:
            content = content * keep
        queries = self.detector.conditioned_queries(content, order)  # p + q, Sec. 3.1; D2
        n = content.shape[1]
        blocked = group_mask(total, self.num_patches, images.device)[:n, :n] if self.attention_mask else None
        outputs = self.detector(images, mask, queries, blocked)
        if self.feature_align is not None:
            for layer in (outputs, *outputs["aux_outputs"]):
                layer["pred_features"] = self.feature_align(layer["hs"]).float()  # p_hat, Sec. 3.3
        return {**outputs, "patch_features": p.float()}


def build_models(cfg: Config) -> tuple[UPDETR, nn.Module | None]:
    """The model, and the frozen backbone whose features are reconstructed (None: the model's own). Weights:
    from seed and --backbone_weights."""
    torch.manual_seed(cfg.seed)
    detector = common.build_detector(cfg, 3, focal=False)                    # D6
    convert.load_backbone_weights(detector.backbone[0].body, cfg.backbone_weights, cfg.arch)
    target = (copy.deepcopy(detector.backbone[0]).requires_grad_(False).eval()
              if cfg.feature_target == "start" and cfg.reconstruction else None)
    model = UPDETR(detector, cfg.num_patches, cfg.attention_mask, cfg.reconstruction and cfg.lambda_rec > 0)
    if cfg.aligned_start:
        common.align_start(detector, model.patch2query)
    return model, target


# ==== 4. Loss ====


def build_criterion(cfg: Config) -> common.SetCriterion:
    """Eq. (1): the matching ignores the groups; any query may be matched to any patch's box,
    and then reconstructs the feature of THAT patch."""
    matcher = common.HungarianMatcher(cfg.lambda_cls, cfg.lambda_l1, cfg.lambda_giou, focal=False)
    # lambda_{c_i}, D5
    return common.SetCriterion(matcher, cfg.lambda_cls, cfg.lambda_l1, cfg.lambda_giou,
                               weight_feature=cfg.lambda_rec if cfg.reconstruction else 0.0,
                               eos_coef=cfg.num_patches / cfg.num_queries if cfg.eos_coef is None else cfg.eos_coef)


def updetr_loss(criterion: common.SetCriterion, outputs: dict, targets: list[dict], num_boxes: float,
                class_weight: float | None = None
                ) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (1): returns (weighted total over all decoder layers, unweighted terms). num_boxes, class_weight:
    this process's normalisers."""
    targets = [{**t, "features": t.get("features", p)} for t, p in zip(targets, outputs["patch_features"])]
    losses, _ = criterion(outputs, targets, num_boxes, class_weight)  # sigma of Eq. (1); loss_feature is Eq. (2), D7
    return criterion.total(losses), losses


# ==== 5. Training step ====


def train_step(cfg: Config, model: nn.Module, target_backbone: nn.Module | None, criterion: common.SetCriterion,
               optimizer: torch.optim.Optimizer, micro_batches: list[dict], device: torch.device) -> dict[str, Tensor]:
    """One optimiser step on cfg.accumulate micro-batches. Returns the unweighted loss terms of the whole,
    the total and the gradient norm.

    Normalisers cover all processes and micro-batches, so the gradient is that of one process on
    the whole batch (tested).
    """
    counts = [len(t["labels"]) for batch in micro_batches for t in batch["targets"]]
    num_boxes = common.normalizer(sum(counts), device)
    class_weight = common.normalizer(criterion.class_weight_sum(counts, cfg.num_queries), device)
    optimizer.zero_grad()
    terms: dict[str, Tensor] = {}
    for i, batch in enumerate(micro_batches):
        images, mask = batch["images"].to(device, non_blocking=True), batch["mask"].to(device, non_blocking=True)
        targets = [{k: v.to(device, non_blocking=True) for k, v in t.items()} for t in batch["targets"]]
        patches = torch.stack([t["patches"] for t in targets])               # [B, M, 3, p, p]
        with common.gradient_sync(model, i == len(micro_batches) - 1), common.autocast(device, cfg.amp):
            if target_backbone is not None:
                with torch.no_grad():                                        # D10
                    features = (target_backbone(patches.flatten(0, 1))[-1].mean((2, 3)).float()
                                .split([len(t["labels"]) for t in targets]))
                targets = [{**t, "features": f} for t, f in zip(targets, features)]
            outputs = model(images, mask, patches, *draw_masking(cfg, len(images), device))
            with torch.autocast(device.type, enabled=False):
                loss, losses = updetr_loss(criterion, outputs, targets, num_boxes, class_weight)
            loss.backward()
        for name, value in {"loss": loss, **losses}.items():
            share = 1 / len(micro_batches) if "error" in name else 1  # losses add up, the log values are averaged
            terms[name] = terms.get(name, 0) + share * value.detach()
    terms["grad_norm"] = common.clip_gradients(model, cfg.clip_max_norm)
    optimizer.step()
    return terms


# ==== 6. Probe ====


@torch.no_grad()
def find_patches(cfg: Config, model: nn.Module, probe_set: PatchDataset, device: torch.device, other: bool = False,
                 text: str = "") -> list[dict]:
    """Where the model finds the query patches of unseen images: {"index", "true" [M, 4],
    "found" [M, 4] cxcywh, "score" [M]} per image.

    The most confident box of each patch's group counts. other: the queries are patches of the next image of the batch;
    "asked" are their own boxes.
    """
    model.eval()
    found = []
    for batch in evaluation.batches(probe_set, cfg.num_workers, text):
        targets, asked = batch["targets"], batch["targets"][other:] + batch["targets"][:other]
        patches = torch.stack([t["patches"] for t in asked]).to(device)
        outputs = model(batch["images"].to(device), batch["mask"].to(device), patches)
        scores, boxes, _ = evaluation.most_confident(outputs["pred_logits"], outputs["pred_boxes"], cfg.num_patches)
        found += [{"index": t["index"].item(), "true": t["boxes"].tolist(),
                   "asked": q["boxes"].tolist(), "found": b.tolist(), "score": s.tolist()}
                  for t, q, b, s in zip(targets, asked, boxes, scores)]
    return evaluation.gather(found)


def probe(cfg: Config, model: nn.Module, probe_source, held_out: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Mean IoU and recall at 0.5 of the most confident box per query patch, of the pretrained model and four
    controls, and predictions.png.

    random_boxes: another draw of the sampler; shuffled: patches of another image as queries; wrong_image: the same
    predictions, scored on the boxes those patches really have, so what a patch tells by itself, of its size for
    example, without the image it lies in.
    """
    probe_set = PatchDataset(cfg, probe_source, held_out, augment=False)
    untrained = build_models(cfg)[0].to(device)
    rows = {"untrained": find_patches(cfg, untrained, probe_set, device, text="untrained"), "random_boxes": [],
            "shuffled": find_patches(cfg, model, probe_set, device, other=True, text="shuffled"),
            "wrong_image": [], "pretrained": find_patches(cfg, model, probe_set, device, text="pretrained")}
    rows["wrong_image"] = [{**row, "true": row["asked"]} for row in rows["shuffled"]]
    for i, row in enumerate(rows["pretrained"]):
        boxes = torch.from_numpy(draw_patches(np.random.default_rng([cfg.seed, i]), (480, 640),
                                              cfg.num_patches)).float()
        rows["random_boxes"].append({"true": row["true"], "found": data.normalized_cxcywh(boxes, (480, 640)).tolist()})
    if common.rank() != 0:
        return {}
    evaluation.draw_found(Path(cfg.out) / "predictions.png", probe_source, rows["pretrained"][:6],
                          ("query patches", "UP-DETR (most confident box per patch)"))
    return {name: evaluation.found_metrics(found) for name, found in rows.items()} | {"primary": "IoU"}


# ==== 7. Main ====


def check(cfg: Config) -> None:
    """What a configuration alone can be wrong in."""
    if cfg.num_queries % cfg.num_patches:
        raise UserError(f"--num_queries {cfg.num_queries} "
                        f"--num_patches {cfg.num_patches}: every patch needs the same number of queries; for example "
                        f"--num_queries {max(cfg.num_queries // cfg.num_patches, 1) * cfg.num_patches}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = run.parse_config(Config, PRESETS, argv, script="updetr",
                           description=__doc__.split("\n\n")[0], by_data=recipe_of)
    device = common.setup_distributed(cfg.device)
    check(cfg)
    out = Path(cfg.out)
    source, indices, probe_source, held_out = data.open_pretraining(cfg)
    sampler_args = {"world": common.world_size(), "rank": common.rank(), "accumulate": cfg.accumulate, "seed": cfg.seed}
    # complains about sizes before anything is written
    data.StepSampler(len(indices), cfg.batch_size, 1, **sampler_args)
    identity = run.identity("updetr", len(source), source.fingerprint())
    state = run.open_run(cfg, **identity)
    steps_per_epoch = len(indices) // cfg.batch_size
    total_steps = min(cfg.epochs * steps_per_epoch, cfg.max_steps or sys.maxsize)
    if metrics := run.finished(out, state, total_steps):
        run.say(summary(metrics))
        return metrics

    train_set = PatchDataset(cfg, source, indices)
    model, target_backbone = build_models(cfg)
    model, target_backbone = model.to(device), target_backbone.to(device) if target_backbone else None
    optimizer = common.build_optimizer(cfg, model)
    start = run.restore(state, model, optimizer, cfg, target=target_backbone) if state else 0
    if target_backbone:
        identity["target"] = target_backbone.state_dict()
    wrapped, criterion = common.wrap_model(model, device, compiled=cfg.compile), build_criterion(cfg)
    sampler = data.StepSampler(len(indices), cfg.batch_size, total_steps, start_step=start, **sampler_args)
    batches = iter(data.make_loader(train_set, sampler, num_workers=cfg.num_workers, collate=data.collate))
    log, skipped, seen = run.Log(out, start, device), data.SkipCount(len(source)), 0
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
            seen += len(batch["targets"])
        with watch.step(step, micro_batches) as look:
            terms = train_step(cfg, wrapped, target_backbone, criterion, optimizer, micro_batches, device)
            look(terms)
        if step % cfg.log_every == 0 or step == total_steps - 1:
            watch.settle()
            line = log.write(step, terms, seen, epoch=step // steps_per_epoch, lr=lr)
            bar.set_postfix(loss=f"{line['loss']:.2f}", box=f"{line['loss_bbox']:.3f}", giou=f"{line['loss_giou']:.3f}")
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
    return evaluation.probe_table(metrics, ["IoU", "recall50"], "most confident box per query patch, unseen images (")


if __name__ == "__main__":
    run.cli(main)
