"""Fine-tuning: any checkpoint -> a detector -> COCO and VOC numbers.

Idea: the pretrained detector loses its class head and its pretext heads, gets a class head with one row per category of
    the labelled set, and is trained as the detector's own paper trains it: DETR with softmax and "no object" (Carion et
    al., ECCV 2020, arXiv 2005.12872), Conditional DETR (Meng et al., ICCV 2021, arXiv 2108.06152) and Deformable DETR
    (Zhu et al., ICLR 2021, arXiv 2010.04159) with the focal loss; Faster and Mask R-CNN, RetinaNet and FCOS,
    torchvision's, as SoCo and DUPR train detectron2's, from what the checkpoint has: backbone, pyramid, box head.

Run:
    python finetune.py --preset demo --init_from out/detreg-demo/last.pt          # 40 labelled synthetic images, 2.5 minutes on 2 cores
    torchrun --nproc_per_node=8 finetune.py --data coco --init_from FILE          # DETReg, UP-DETR, Siamese DETR, or a released file of theirs
    torchrun --nproc_per_node=8 finetune.py --data coco --detector detr           # from scratch: SwAV backbone, random transformer
    torchrun --nproc_per_node=8 finetune.py --data coco --labels_percent 1 --init_from FILE
    python finetune.py --data voc --data_root VOCDEVKIT --init_from FILE          # --labels_percent 10, 30, 50, 70: Siamese DETR, Fig. 8
    python finetune.py --data voc --init_from FILE --freeze_detector              # heads only: Siamese DETR, Table 5 (AR@1, 10, 100)
    torchrun --nproc_per_node=8 finetune.py --data coco --detector mask_rcnn_fpn --init_from FILE         # SoCo, DUPR; --schedule 2x
    torchrun --nproc_per_node=8 finetune.py --data voc --detector faster_rcnn_c4 --backbone_weights imagenet   # supervised; random: from scratch
    python finetune.py --preset demo --detector faster_rcnn_fpn --init_from out/soco-demo/last.pt         # SoCo on a CPU
    python finetune.py --data coco --init_from FILE --eval_only                   # numbers of a fine-tuned detector
    python finetune.py --data coco --init_from FILE --class_agnostic              # of a pretrained one: DETReg, Table 6; Siamese DETR, Table 5

Detector and architecture are read off the checkpoint (pre- or post-norm too);
the class list comes from the annotation files and is saved.

Schedules (epochs / drop at), batch 32; learning rate, that of the backbone:
                         COCO                        VOC
    detr                 150 / 100, 1e-4, 5e-5       150 / 100                 UP-DETR, Sec. 4; `--protocol updetr_long`: 300 / 200
    conditional_detr     50 / 40, 1e-4, 5e-5         50 / 40                   Siamese DETR, Sec. 4
    deformable_detr(_ss) 50 / 40, 2e-4, 2e-5         100 / 70                  DETReg, released
    `--protocol siamese`: detr COCO 150 / 120; all detectors on VOC, or a share of it, 50 / 40 (Siamese DETR, Sec. 4)
    Shares of labels (DETReg, released for Deformable DETR): COCO, any detector: 1 % 2000 epochs, 2 % 1000, 5 % 500, 10
        % 400, never dropped, batch 24; `--protocol semi_supervised`: 1-2 % 200 / 150, 5-10 % 100 / 40 (DETReg,
        Sec. 6.1); `--protocol low_data`: 150, no drop (Fig. 3); VOC, Deformable DETR: 10 % 200 / 150, batch 8.
    R-CNN family (steps; SGD 0.02, one-stage 0.01; batch 16): COCO 90k (`--schedule 2x, 4x`: 180k, 360k), drops after
    2/3 and 8/9, warm-up 1000; VOC 24k, 3/4 and 11/12, warm-up 100; other data 50 epochs, 2/3 and 8/9, warm-up 100.
    `--protocol dupr` (DUPR, MoCo, scratch, supervised; the default): 2fc head without norm;
    1-2 % of COCO 15k, larger shares 60k.
    `--protocol soco` (default of a SoCo checkpoint): 4conv1fc, BatchNorm in the heads, weight decay 2.5e-5 on COCO;
    shares of COCO (Mini COCO 5, 10 %) 90k; RetinaNet and FCOS 12 epochs, drops after 8 and 11, warm-up 500, 800 px
    (mmdetection's defaults).

Deviations (released code / here):
    F1  One class row per category / 91 rows for COCO, 21 for VOC. A released head is still evaluated:
        its rows are mapped to category ids.
    F2  Each process drew its own x % subset until 2022-04, which invalidates DETReg's Table 4 / one
        subset, from --seed alone.
    F3  VOC: COCO-style AP and the VOC07 11-point metric are both printed (DETReg: the latter, averaged over ten IoU
        thresholds; UP-DETR and Siamese DETR: the former, with difficult objects as ordinary ones / ignored).
    F4  DETR's cross-entropy: weighted mean of each process / over all processes and micro-batches.
    F5  UP-DETR, VOC: not in the released code. Batch: 2 per GPU when its README is followed (16) / the paper's 32.
        lr_backbone: 1e-5 by default, 5e-4 in an older README / 5e-5, the paper's.
    F6  A checkpoint of UP-DETR's single-query variant holds 3 queries:
        its query_embed is dropped (not said in the paper).
    F7  --freeze_detector (no released code): all but class and box head keep their weights,
        statistics and run without dropout.
    F8  R-CNN family: detectron2 / torchvision's parts with detectron2's RoIAlign, anchors, L1 losses, C4 head, start
        and PreciseBN. What still differs: mask targets come from bitmaps; C4 pads to 16 px; short sides round down;
        batches are not grouped by aspect ratio.
    F9  RetinaNet's loss is divided by a moving average of the positives / by each image's own. FCOS (mmdetection): IoU
        loss, no centre sampling, points at half strides, bias rate x 2 / torchvision's GIoU, centre sampling 1.5,
        points at full strides, one rate.
    F10 R-CNN losses: means of each process (released) and micro-batch; --accumulate averages those,
        and BatchNorm sees micro-batches.
    F11 Not in the papers: SoCo's length on VOC / MoCo's; DUPR's rate and drops on shares of COCO / those of 1x.
        Shares are drawn from --seed.
    F12 PreciseBN: training went on with the estimated statistics / they are put back after an evaluation,
        and saved after the last one.
    F13 SoCo's cutout and its LVIS recipe (repeat-factor sampling) are not built:
        the first is broken in the released code and not in the paper.
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import dataclasses
import hashlib
import itertools
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import convert
import data
import evaluation
import rcnn
import run
from annotations import DetectionSet, open_detection
from common import UserError

# ==== 1. Hyperparameters ====


@dataclass
class Config:
    # data
    data: str = "coco"  # coco, voc, synthetic, a COCO json, or a folder in VOC layout or with train.json and test.json
    data_root: str | None = None  # where a named data set lies; else $DATA_ROOT, else data/<name>
    labels_percent: float = 100  # use this share of the training images, the same on every process (DETReg, Sec. 6.1)
    protocol: Literal["released", "semi_supervised", "low_data", "updetr_long", "siamese", "soco", "dupr"] = "released"  # schedule, see above
    synthetic_images: int = 40  # labelled synthetic images
    synthetic_test_images: int = 100  # test images of the synthetic set
    synthetic_size: int = 160  # side of a synthetic scene, pixels
    out: str | None = None  # output folder; else out/finetune-<preset or data>
    preset: str | None = None  # demo
    # what to do
    init_from: str | None = None  # checkpoint of a detector, ours or released; without one training starts from --backbone_weights
    freeze_detector: bool = False  # train the class head and the box head only (Siamese DETR, Table 5)
    eval_only: bool = False  # only evaluate --init_from
    class_agnostic: bool = False  # evaluate the boxes of --init_from without categories (DETReg, Table 6); no training
    # images
    scales: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)  # short side in training, pixels (Deformable DETR)
    max_size: int = 1333  # longest side, pixels
    crop_scales: tuple[int, ...] = (400, 500, 600)  # short side before a random crop (R-CNN family: no crop)
    crop_range: tuple[int, ...] = (384, 600)  # smallest and largest side of the crop
    eval_size: int = 800  # short side in evaluation, pixels
    # model (read off --init_from when given)
    detector: Literal[common.DETECTORS, rcnn.RCNN_DETECTORS] = "deformable_detr"  # which one
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # backbone
    backbone_weights: str = "swav"  # swav, imagenet, moco_v2, random or a file; only without --init_from (released: swav)
    backbone_norm: Literal["frozen", "bn"] = "frozen"  # BatchNorm with constant or with learned statistics (released: frozen; R-CNN family: bn)
    stride: Literal[4, 8, 16, 32] = 32  # of the map that DETR and Conditional DETR see; below 32 the last stages are left out
    num_feature_levels: int = 4  # of deformable_detr
    pre_norm: bool = False  # LayerNorm before each block, of detr (DETR: off)
    hidden_dim: int = 256  # transformer width
    nheads: int = 8  # attention heads
    enc_layers: int = 6  # encoder layers
    dec_layers: int = 6  # decoder layers
    dim_feedforward: int = 1024  # width of the feed-forward layers (detr, conditional_detr: 2048)
    dropout: float = 0.1  # in the transformer
    num_queries: int = 300  # object queries (detr, conditional_detr: 100)
    with_box_refine: bool = False  # iterative box refinement of deformable_detr (its Sec. 4.2)
    box_head: Literal["2fc", "4conv1fc"] = "2fc"  # of faster_ and mask_rcnn_fpn; 2fc: no norm in the heads, 4conv1fc: BatchNorm, in the mask head too
    fpn_channels: int = 256  # width of the pyramid and of the convolutions on it
    head_dim: int = 1024  # width behind the box head
    anchor_size: int = 32  # side of the smallest anchors, pixels; there are five sizes, each twice the last (fcos_fpn has no anchors)
    proposals_per_image: int = 1000  # that the region proposal network passes on (C4 in training: twice as many)
    rois_per_image: int = 512  # of them that the box head learns from
    # loss
    lambda_f: float = 2.0  # focal loss and its matching cost (detr: cross-entropy, 1)
    lambda_l1: float = 5.0  # L1 box loss and its matching cost
    lambda_giou: float = 2.0  # GIoU loss and its matching cost
    eos_coef: float = 0.1  # class weight of "no object", of detr
    # optimisation
    batch_size: int = 32  # images per step over all processes (released: 4 per GPU x 8)
    accumulate: int = 1  # micro-batches per step: one GPU reaches the global batch
    epochs: int = 50  # see Schedules above
    iterations: int | None = None  # R-CNN family: length of the run in steps instead of epochs
    schedule: Literal["1x", "2x", "4x"] = "1x"  # R-CNN family: how many times the length that stands above
    lr_drop: float = 40  # epoch after which the rate is x 0.1
    lr_drops: tuple[float, ...] = (2 / 3, 8 / 9)  # R-CNN family: shares of the run after which the rate is x 0.1
    warmup_iters: int = 1000  # R-CNN family: steps in which the rate rises from lr / 1000
    lr: float = 2e-4  # see Schedules above
    lr_backbone: float = 2e-5  # see Schedules above
    lr_linear_proj_mult: float = 0.1  # rate of sampling offsets and reference points
    sgd_momentum: float = 0.9  # R-CNN family, which is trained by SGD
    weight_decay: float = 1e-4  # on every parameter (R-CNN family: not on scale and shift of norms)
    clip_max_norm: float = 0.1  # gradient norm, 0 = not clipped
    precise_bn: int = 200  # R-CNN family: batches from which BatchNorm's statistics are estimated before an evaluation, 0 = off
    amp: Literal["off", "bf16"] = "off"  # autocast; boxes, sampling and losses stay fp32
    compile: bool = False  # torch.compile the layers (slow to start; meant for GPUs)
    # run
    seed: int = 42  # everything random follows from it
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    num_workers: int = 8  # loader processes per training process
    max_steps: int | None = None  # stop after this many steps
    save_every: int = 1000  # steps between checkpoints
    log_every: int = 50  # steps between lines of log.jsonl
    eval_every: int = 10  # epochs between evaluations, 0 = only at the end
    allow_config_change: bool = False  # continue a run although the configuration differs


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "data": "synthetic", "scales": (96, 112), "max_size": 144,
        "eval_size": 112, "arch": "resnet18", "backbone_weights": "random",
        "backbone_norm": "bn", "num_workers": 2, "log_every": 10, "save_every": 100, "eval_every": 0,
    },
}
DEMO = {                                                                     # what of the demo depends on the detector
    "detr": {"crop_scales": (112, 144), "crop_range": (72, 112), "lr_backbone": 4e-4, "hidden_dim": 128,
             "enc_layers": 2, "dec_layers": 3, "dim_feedforward": 256, "dropout": 0.0, "num_queries": 100,
             "with_box_refine": True, "batch_size": 8, "epochs": 50, "lr_drop": 40, "lr": 4e-4},
    "rcnn": {"fpn_channels": 64, "head_dim": 256, "anchor_size": 8, "proposals_per_image": 200, "rois_per_image": 64,
             "batch_size": 8, "epochs": 50, "iterations": None, "warmup_iters": 20, "lr": 0.02, "precise_bn": 20},
    # res5 runs on every RoI: 6 minutes in all
    "c4": {"anchor_size": 8, "proposals_per_image": 30, "rois_per_image": 8, "batch_size": 4, "epochs": 30,
           "iterations": None, "warmup_iters": 20, "lr": 0.02, "precise_bn": 20},
}
# Flags of one family only.
RCNN_ONLY = {"box_head", "fpn_channels", "head_dim", "anchor_size", "proposals_per_image", "rois_per_image",
             "iterations", "schedule", "lr_drops", "warmup_iters", "sgd_momentum", "precise_bn"}
DETR_ONLY = {"freeze_detector", "class_agnostic", "stride", "num_feature_levels", "pre_norm", "hidden_dim", "nheads",
             "enc_layers", "dec_layers", "dim_feedforward", "dropout", "num_queries", "with_box_refine", "lambda_f",
             "lambda_l1", "lambda_giou", "eos_coef", "lr_drop", "lr_backbone", "lr_linear_proj_mult"}


def is_rcnn(detector: str) -> bool:
    return detector in typing.get_args(rcnn.RCNN_DETECTORS)


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """What follows from the detector, the data set and the share of its labels (module docstring)."""
    of_rcnn = is_rcnn(values["detector"])
    recipe = rcnn_recipe(values) if of_rcnn else detr_recipe(values)
    if values["preset"] == "demo":
        recipe |= DEMO["c4" if values["detector"].endswith("_c4") else "rcnn" if of_rcnn else "detr"]
    if values["eval_only"] or values["class_agnostic"]:
        recipe |= {"out": f"out/finetune-{values['preset'] or Path(values['data']).stem}-eval"}
    return recipe


def rcnn_recipe(values: dict[str, Any]) -> dict[str, Any]:
    name, share, times = values["data"], values["labels_percent"], int(values["schedule"][0])
    one_stage, soco = values["detector"] in rcnn.ONE_STAGE, values["protocol"] == "soco"
    recipe = {"lr": 0.01 if one_stage else 0.02, "batch_size": 16, "clip_max_norm": 0.0, "crop_scales": (),
              "backbone_norm": "bn", "box_head": "4conv1fc" if soco else "2fc"}
    if name == "coco" and soco and one_stage:                                # mmdetection's defaults
        return recipe | {"scales": (800,), "epochs": 12 * times, "lr_drops": (8 / 12, 11 / 12), "warmup_iters": 500}
    if name == "coco":
        steps = 90000 if share == 100 or soco else 15000 if share <= 2 else 60000
        decay = {"weight_decay": 2.5e-5} if soco else {}
        return recipe | decay | {"scales": (640, 672, 704, 736, 768, 800), "iterations": steps * times}
    if name == "voc":
        return recipe | {"iterations": 24000 * times, "lr_drops": (3 / 4, 11 / 12), "warmup_iters": 100}
    return recipe | {"epochs": 50 * times, "warmup_iters": 100}


def detr_recipe(values: dict[str, Any]) -> dict[str, Any]:
    detector, name, share, protocol = (values[k] for k in ("detector", "data", "labels_percent", "protocol"))
    recipe: dict[str, Any] = {}
    if not detector.startswith("deformable"):
        recipe = {"lr": 1e-4, "lr_backbone": 5e-5, "dim_feedforward": 2048, "num_queries": 100}
    if detector == "detr":
        recipe |= {"lambda_f": 1.0, "epochs": 150, "lr_drop": 100}
    if values["eval_only"] or values["class_agnostic"]:
        return recipe
    if protocol == "updetr_long" and detector == "detr":
        return recipe | {"epochs": 300, "lr_drop": 200}
    if protocol == "siamese":
        return recipe | ({"epochs": 150, "lr_drop": 120} if detector == "detr" and name == "coco"
                         else {"epochs": 50, "lr_drop": 40})
    if name == "voc" and detector.startswith("deformable"):
        return {"epochs": 200, "lr_drop": 150, "batch_size": 8} if share == 10 else {"epochs": 100, "lr_drop": 70}
    if name == "coco" and share < 100:
        epochs, drop = {"low_data": (150, 150), "semi_supervised": (200, 150) if share <= 2 else (100, 40)}.get(
            protocol, ({1: 2000, 2: 1000, 5: 500}.get(share, 400),) * 2)
        return recipe | {"epochs": epochs, "lr_drop": drop, "batch_size": 24}
    return recipe


# ==== 2. Data ====


class LabelledDataset(torch.utils.data.Dataset):
    """Augmented training samples; crowd regions are left out, difficult objects are kept (released).
    Random as a function of (seed, epoch, index).

    A mask detector's targets also have "masks" uint8 [n, h, w]; an object that resizing leaves without a pixel
    is left out (detectron2)."""

    def __init__(self, cfg: Config, labelled: DetectionSet):
        self.cfg, self.labelled = cfg, labelled

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        rng = data.sample_rng(self.cfg.seed, epoch, index)
        skipped: list[str] = []
        (image, target), index = data.load_usable(self.labelled, index, rng, skipped)
        use = ~target["crowd"]
        geometry = data.draw_geometry(rng, (image.height, image.width),
                                      scales=self.cfg.scales, max_size=self.cfg.max_size,
                                      crop_scales=self.cfg.crop_scales, crop_range=self.cfg.crop_range)
        view, boxes, keep = data.apply_geometry(image, target["boxes_xyxy"][use], geometry)
        target = {"boxes": data.normalized_cxcywh(boxes, (view.height, view.width)),
                  "labels": target["labels"][use][keep]}
        if self.cfg.detector.startswith("mask"):
            masks = data.apply_geometry_to_masks(self.labelled.masks(index)[use], geometry)[keep]
            seen = masks.flatten(1).sum(1) > 0
            target = {k: v[seen] for k, v in {**target, "masks": masks}.items()}
        return {"image": data.to_normalized_tensor(view), "target": target, "index": index, "skipped": skipped}

    def __len__(self) -> int:
        return len(self.labelled)


# ==== 3. Model ====


def read_init(path: str, keep_queries: bool = False, detector: str = "") -> tuple[convert.Checkpoint, dict[str, Any]]:
    """(the file, the model flags it was made with) of --init_from. detector: the wanted one;
    an R-CNN also takes a mere backbone.

    UP-DETR's single-query variant (F6) has 3 queries: without keep_queries nothing is said of their number,
    and --num_queries is free.
    """
    found = convert.open_checkpoint(path)
    if found.rcnn:
        return found, {k: found.config[k] for k in ("detector", "arch", "backbone_norm", "box_head", "fpn_channels",
                                                    "head_dim", "anchor_size")}
    if is_rcnn(detector):
        return found, rcnn_architecture(found, detector)
    arch = convert.architecture(found.state, path)
    if "nheads" in found.config:
        arch["nheads"] = found.config["nheads"]
    single = found.config.get("num_patches", 1 if arch["num_queries"] == 3 and found.method == "updetr" else None) == 1
    if "patch2query.weight" in found.state and single and not keep_queries:
        del arch["num_queries"]
    return found, arch


def rcnn_architecture(found: convert.Checkpoint, detector: str) -> dict[str, Any]:
    """The flags of an R-CNN that fits a foreign checkpoint:
    its ResNet, and where its pyramid and head are used, their widths."""
    tensors = convert.rcnn_state(found, detector)[0]
    arch = {"arch": convert.resnet_name(tensors, "backbone.body.", found.path)}
    for field, name in (("fpn_channels", "backbone.fpn.layer_blocks.0.0.weight"),
                        ("head_dim", "roi_heads.box_head.5.weight")):
        arch |= {field: len(tensors[name])} if name in tensors else {}
    return arch


def adopt_architecture(cfg: Config, arch: dict[str, Any], given: set[str]) -> Config:
    """The configuration with the model fields of the checkpoint.
    A flag on the command line that says otherwise is a UserError."""
    if "detector" in given and cfg.detector != arch.get("detector", cfg.detector):
        backbone = (f"; for its backbone alone give it as --backbone_weights {cfg.init_from}"
                    if is_rcnn(arch["detector"]) else "")
        queries = f" with {arch['num_queries']} queries" if "num_queries" in arch else ""
        raise UserError(f"{cfg.init_from}: this is a {convert.NAMES[arch['detector']]} checkpoint{queries}; "
                        f"--detector is {cfg.detector}. Give --detector {arch['detector']} or leave it out{backbone}")
    wrong = [f"--{k} {getattr(cfg, k)} (it has {v})" for k, v in arch.items() if k in given and getattr(cfg, k) != v]
    if wrong:
        raise UserError(f"{cfg.init_from} was trained with another architecture than "
                        f"{', '.join(wrong)}; leave these flags out")
    return dataclasses.replace(cfg, **arch)


def head_rows(content: dict[str, Any], rows: int, categories: list[dict]) -> list[int] | None:
    """Which category (position in `categories`) each row of a checkpoint's class head stands for, -1 = none; None when
    the head is of other classes. DETR's last row, "no object", is not counted.

    Our checkpoints carry their categories. Released heads carry none: 91 rows are COCO ids,
    21 rows the sorted VOC names (F1).
    """
    if content.get("categories"):
        position = {c["name"]: i for i, c in enumerate(categories)}
        mapped = [position.get(c["name"], -1) for c in content["categories"]]
        return mapped if sorted(mapped) == list(range(len(categories))) else None
    if rows == 91 and len(categories) == 80 and max(c["id"] for c in categories) == 90:
        position = {c["id"]: i for i, c in enumerate(categories)}
        return [position.get(row, -1) for row in range(rows)]
    if rows == 21 and len(categories) == 20:
        return [*range(20), -1]
    return None


def build_model(cfg: Config, init: convert.Checkpoint | None,
                categories: list[dict]) -> tuple[common.Detector, list[int]]:
    """The detector on CPU and the map from its head's rows to categories. Heads that do not fit the categories are made
    anew; all else must load."""
    torch.manual_seed(cfg.seed)
    if is_rcnn(cfg.detector):
        return build_rcnn_model(cfg, init, categories)
    softmax = cfg.detector == "detr"                                         # one more row: "no object"
    if init is None:
        model = common.build_detector(cfg, len(categories) + softmax, focal=not softmax)
        convert.load_backbone_weights(model.backbone[0].body, cfg.backbone_weights, cfg.arch)
        return model, list(range(len(categories)))
    state = init.state
    head = next((k for k in ("class_embed.weight", "class_embed.0.weight") if k in state), None)
    pretext = head is None or any(k.startswith(("feature_embed.", "patch2query.", "feature_align.")) for k in state)
    # UP-DETR and Siamese DETR end in softmax over 3 rows on every detector; DETReg keeps the detector's own head
    ends_in_softmax = softmax or "patch2query.weight" in state
    rows = state[head].shape[0] - ends_in_softmax if head else 0
    mapped = None if pretext else head_rows(init.content, rows, categories)
    drop = dict(convert.PRETEXT)
    if len(state["query_embed.weight"]) != cfg.num_queries:                  # F6
        drop[r"^query_embed\."] = f"queries of a single-query checkpoint, made anew for {cfg.num_queries} queries"
    if cfg.class_agnostic:
        if head is None:
            raise UserError(f"{cfg.init_from} has no class head, so its boxes have no scores; "
                            "evaluate the file from before its conversion")
        mapped, softmax = [-1] * rows if pretext else list(range(rows)), ends_in_softmax
    elif cfg.eval_only and mapped is None:
        raise UserError(f"{cfg.init_from}: its classifier has {rows} rows, "
                        f"and nothing says which of the {len(categories)} categories of {cfg.data} "
                        "they are; fine-tune it first, or evaluate its boxes with --class_agnostic")
    elif mapped is None:
        drop[r"^class_embed\."] = f"class head, made anew for {len(categories)} categories"
        mapped, rows = list(range(len(categories))), len(categories)
    elif not cfg.eval_only and mapped != list(range(rows)):
        # labels are positions in `categories`: put the rows in that order
        order = [mapped.index(i) for i in range(len(categories))] + [rows] * softmax
        state = {k: v[order] if k.startswith("class_embed.") else v for k, v in state.items()}
        mapped, rows = list(range(len(categories))), len(categories)
        run.say(f"the class head's rows were put in the order of the {rows} categories of {cfg.data}")
    # where nothing is trained any more, positions stay those of the pretraining (Siamese DETR, D9)
    offset = init.config.get("position_offset", 0.0) if cfg.class_agnostic and init.method == "siamese_detr" else None
    model = common.build_detector(cfg, rows + softmax, focal=not softmax, position_offset=offset)
    convert.tell_left(init.left)
    convert.load_matching(model, state, drop=drop, source=f"{init.path} ({init.what})")
    return model, mapped


def build_rcnn_model(cfg: Config, init: convert.Checkpoint | None,
                     categories: list[dict]) -> tuple[nn.Module, list[int]]:
    """build_model() of the R-CNN family. A checkpoint is our fine-tuned one, which must load but for its class head,
    or any with a ResNet in it."""
    mapped = list(range(len(categories)))
    if init is None:
        model = rcnn.build_rcnn(cfg, len(categories))
        convert.load_backbone_weights(rcnn.rcnn_trunk(model), cfg.backbone_weights, cfg.arch)
        return model, mapped
    if not init.rcnn:
        model = rcnn.build_rcnn(cfg, len(categories))
        convert.load_rcnn(model, init, cfg.detector, cfg.box_head)
        return model, mapped
    theirs, drop = init.content["categories"], {}
    found = head_rows(init.content, len(theirs), categories)
    if cfg.eval_only and found is None:
        raise UserError(f"{cfg.init_from}: it was trained on {', '.join(c['name'] for c in theirs)}, "
                        f"and {cfg.data} has {', '.join(c['name'] for c in categories)}; fine-tune it first")
    if cfg.eval_only:
        mapped = found
    elif found != mapped:
        drop[convert.CLASS_LAYERS] = (f"class head, made anew for {len(categories)} other categories "
                                      "or another order of them")
    model = rcnn.build_rcnn(cfg, len(mapped))
    convert.load_matching(model, init.state, drop=drop, source=f"{init.path} ({init.what})")
    return model, mapped


# The only place where the conventions of torchvision's detectors are known:
# xyxy pixels of the network's input, and where labels start.


def freeze(model: common.Detector) -> None:
    """Only the heads learn (F7)."""
    model.requires_grad_(False)
    model.class_embed.requires_grad_(True)
    model.bbox_embed.requires_grad_(True)


def train_mode(cfg: Config, model: nn.Module) -> None:
    """model.train(), but what is frozen runs as in evaluation: no dropout, constant statistics (F7)."""
    model.train()
    if cfg.freeze_detector:
        for name, child in getattr(model, "module", model).named_children():
            child.train(name in ("class_embed", "bbox_embed"))


# ==== 4. Loss ====


def build_criterion(cfg: Config) -> common.SetCriterion | None:
    """The losses of the DETR family; the R-CNN family's detectors compute their own."""
    if is_rcnn(cfg.detector):
        return None
    matcher = common.HungarianMatcher(cfg.lambda_f, cfg.lambda_l1, cfg.lambda_giou, focal=cfg.detector != "detr")
    return common.SetCriterion(matcher, cfg.lambda_f, cfg.lambda_l1, cfg.lambda_giou, eos_coef=cfg.eos_coef)


def rcnn_losses(cfg: Config, model: nn.Module, batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Loss terms of one micro-batch: its own means, a share of the step's (F10)."""
    images = rcnn.input_images(batch, device)
    with common.autocast(device, cfg.amp):
        losses = model(images, rcnn.to_rcnn(batch["targets"], images, cfg.detector))
    return {"loss_" + k.removeprefix("loss_"): v.float() / cfg.accumulate for k, v in losses.items()}


# ==== 5. Training step ====


def build_optimizer(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    return rcnn.build_sgd(cfg, model) if is_rcnn(cfg.detector) else common.build_optimizer(cfg, model)


def run_length(cfg: Config, steps_per_epoch: int) -> int:
    return cfg.iterations or cfg.epochs * steps_per_epoch


def lr_factor(cfg: Config, step: int, steps_per_epoch: int) -> float:
    if is_rcnn(cfg.detector):
        return rcnn.warmup_step_schedule(step, run_length(cfg, steps_per_epoch), cfg.warmup_iters, cfg.lr_drops)
    return common.step_schedule(step, steps_per_epoch, (cfg.lr_drop,))


def train_step(cfg: Config, model: nn.Module, criterion: common.SetCriterion | None, optimizer: torch.optim.Optimizer,
               micro_batches: list[dict], device: torch.device) -> dict[str, Tensor]:
    """One optimiser step on cfg.accumulate micro-batches. Returns the unweighted loss terms of the whole,
    the total and the gradient norm."""
    if criterion:
        counts = [len(t["labels"]) for batch in micro_batches for t in batch["targets"]]
        num_boxes = common.normalizer(sum(counts), device)
        class_weight = common.normalizer(criterion.class_weight_sum(counts, cfg.num_queries), device)  # F4
    optimizer.zero_grad()
    terms: dict[str, Tensor] = {}
    for i, batch in enumerate(micro_batches):
        with common.gradient_sync(model, i == len(micro_batches) - 1):
            if criterion is None:
                losses = rcnn_losses(cfg, model, batch, device)
                loss = torch.stack(list(losses.values())).sum()
            else:
                images, mask = (batch["images"].to(device, non_blocking=True),
                                batch["mask"].to(device, non_blocking=True))
                targets = [{k: v.to(device, non_blocking=True) for k, v in t.items()} for t in batch["targets"]]
                with common.autocast(device, cfg.amp):
                    outputs = model(images, mask)
                losses, _ = criterion(outputs, targets, num_boxes, class_weight)
                loss = criterion.total(losses)
            loss.backward()
        for name, value in {"loss": loss, **losses}.items():
            share = 1 / len(micro_batches) if "error" in name else 1  # losses add up, the log values are averaged
            terms[name] = terms.get(name, 0) + share * value.detach()
    terms["grad_norm"] = common.clip_gradients(model, cfg.clip_max_norm)
    optimizer.step()
    return terms


# ==== 6. Evaluation ====


@torch.no_grad()
def precise_bn(cfg: Config, model: nn.Module, train_set: DetectionSet, device: torch.device) -> dict[str, Tensor]:
    """PreciseBN (detectron2): BatchNorm's statistics become their mean over cfg.precise_bn training batches; weights
    stay. A function of the weights and the seed alone. Returns the buffers as they were; nothing happens in the DETR
    family and with --precise_bn 0."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not (is_rcnn(cfg.detector) and cfg.precise_bn and norms):
        return {}
    before, momenta = {k: v.clone() for k, v in model.named_buffers()}, [m.momentum for m in norms]
    sampler = data.StepSampler(len(train_set), cfg.batch_size, -(-cfg.precise_bn // cfg.accumulate),
                               world=common.world_size(), rank=common.rank(), accumulate=cfg.accumulate, seed=cfg.seed)
    loader = data.make_loader(LabelledDataset(cfg, train_set), sampler,
                              num_workers=cfg.num_workers, collate=data.collate)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                                                 # a cumulative mean
    model.train()
    run.seed_step(cfg.seed, 0)                                            # regions are drawn at random
    for batch in run.progress(itertools.islice(loader, cfg.precise_bn), total=cfg.precise_bn,
                              desc="BatchNorm statistics"):
        rcnn_losses(cfg, model, batch, device)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        for buffer in (norm.running_mean, norm.running_var):
            buffer.copy_(common.all_reduce_sum(buffer) / common.world_size())
    return before


@torch.no_grad()
def rcnn_detections(cfg: Config, model: nn.Module, mapped: list[int], test_set: DetectionSet,
                    device: torch.device) -> list[dict]:
    """COCO results of this process's slice, image by image, as released: nothing depends on what else is in a batch."""
    rows = [test_set.categories[i]["id"] if i >= 0 else None for i in mapped]
    found = []
    for batch in evaluation.each_batch(model, test_set, size=cfg.eval_size, max_size=cfg.max_size, batch_size=1,
                                       num_workers=cfg.num_workers, text="evaluation"):
        images = rcnn.input_images(batch, device)
        found += rcnn.from_rcnn(model(images), images, batch["targets"], cfg.detector, rows)
    return found


def detr_detections(cfg: Config, model: nn.Module, mapped: list[int], test_set: DetectionSet,
                    device: torch.device) -> list[dict]:
    found = []
    heads = model.class_embed if isinstance(model.class_embed, nn.Linear) else model.class_embed[0]
    softmax = heads.out_features > len(mapped)                               # a last row "no object"
    ids = [c["id"] for c in test_set.categories]
    for target, logits, boxes_xyxy in evaluation.predict(model, test_set, size=cfg.eval_size,
                                                         max_size=cfg.max_size, device=device, batch_size=8,
                                                         num_workers=cfg.num_workers, text="evaluation"):
        if cfg.class_agnostic:  # a pretext head's row 1 is "object"; else the best class counts
            rows = logits.log_softmax(-1)[:, :-1] if softmax else logits
            scores = rows[:, min(1, rows.shape[-1] - 1)] if mapped[0] < 0 else rows.max(-1).values
            found += evaluation.class_agnostic_detections(scores[:, None], boxes_xyxy,
                                                          target["image_id"], object_class=0)
        else:
            found += category_detections(logits, boxes_xyxy, mapped, ids, target["image_id"], softmax)
    return found


def evaluate(cfg: Config, model: nn.Module, mapped: list[int], test_set: DetectionSet, device: torch.device,
             write: bool) -> dict[str, Any]:
    """All metrics of the test set; on rank 0 also detections.json (COCO results format) and predictions.png when
    `write`. All processes call it."""
    detections = rcnn_detections if is_rcnn(cfg.detector) else detr_detections
    found = evaluation.gather(detections(cfg, model, mapped, test_set, device))
    if common.rank() != 0:
        return {}
    truth = test_set.coco_ground_truth()
    metrics = evaluation.detection_metrics(truth, found, class_agnostic=cfg.class_agnostic,
                                           per_class=not cfg.class_agnostic)
    if cfg.detector.startswith("mask"):
        masks = evaluation.detection_metrics(truth, found, iou_type="segm")
        metrics |= {f"{k}_mask": masks[k] for k in ("AP", "AP50", "AP75")}
    if test_set.voc and not cfg.class_agnostic:
        metrics |= evaluation.voc07_metrics(truth, found)
    if cfg.freeze_detector:  # Siamese DETR, Table 5: class-agnostic or not is not said, so both
        boxes_only = evaluation.detection_metrics(truth, found, class_agnostic=True)
        metrics |= {f"agnostic_AR{k}": boxes_only[f"AR{k}"] for k in (1, 10, 100)}
    if write:
        evaluation.write_json(Path(cfg.out) / "detections.json", found)
        names = {} if cfg.class_agnostic else {c["id"]: c["name"] for c in test_set.categories}
        draw_predictions(Path(cfg.out) / "predictions.png", test_set, found, truth, names)
    return metrics


def category_detections(logits: Tensor, boxes_xyxy: Tensor, mapped: list[int], category_ids: list[int], image_id: int,
                        softmax: bool) -> list[dict]:
    """The detections of one image (common.top_detections); those of rows of a released head that stand
    for no category are dropped."""
    best = common.top_detections(logits, boxes_xyxy, focal=not softmax)
    keep = [(s, mapped[l], b) for s, l, b in zip(best["scores"].tolist(), best["labels"].tolist(),
                                                 best["boxes"].tolist()) if mapped[l] >= 0]
    return [{"image_id": image_id, "category_id": category_ids[l], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": s}
            for s, l, (x1, y1, x2, y2) in keep]


def draw_predictions(path: Path, test_set, detections: list[dict], truth: dict,
                     names: dict[int, str], rows: int = 6) -> None:
    """One row per image: ground truth beside the best predictions, with category names and scores."""
    images, columns = [], {"ground truth": [], "predictions (best 10)": []}
    for i in range(min(rows, len(test_set))):
        image, target = test_set.load(i)
        images.append(image)
        true = [a for a in truth["annotations"] if a["image_id"] == target["image_id"]]
        best = sorted((d for d in detections if d["image_id"] == target["image_id"]), key=lambda d: -d["score"])[:10]
        for column, some in zip(columns.values(), (true, best)):
            boxes = torch.tensor([d["bbox"] for d in some]).reshape(-1, 4)
            labels = [names.get(d["category_id"], "") + (f" {d['score']:.2f}" if "score" in d else "") for d in some]
            column.append((torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), labels))
    evaluation.draw_boxes_figure(path, images, columns, max_boxes=30)


# ==== 7. Main ====


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    given = {a.split("=")[0].lstrip("-").replace("-", "_").removeprefix("no_") for a in argv if a.startswith("--")}
    init, arch = None, {}

    def recipe(values: dict[str, Any]) -> dict[str, Any]:
        nonlocal init, arch
        if values["init_from"]:
            init, arch = read_init(values["init_from"], values["class_agnostic"], values["detector"])
        protocol = {"protocol": "soco"} if values["protocol"] == "released" and init and init.method == "soco" else {}
        return recipe_of(values | arch | protocol) | ({"iterations": None} if "epochs" in given else {})

    cfg = run.parse_config(Config, PRESETS, argv, script="finetune",
                           description=__doc__.split("\n\n")[0], by_data=recipe)
    device = common.setup_distributed(cfg.device)
    cfg.eval_only |= cfg.class_agnostic
    if cfg.init_from:
        cfg = adopt_architecture(cfg, arch, given)
    check_flags(cfg, given, init)
    train_set, test_set = open_sets(cfg)
    if cfg.eval_only:
        if (Path(cfg.out) / "last.pt").exists():
            raise UserError(f"--out {cfg.out} holds a training run, "
                            "whose metrics this evaluation would overwrite; give another --out")
        model, mapped = build_model(cfg, init, train_set.categories)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        return finish(cfg, evaluate(cfg, model.to(device), mapped, test_set, device, write=True))

    sampler_args = {"world": common.world_size(), "rank": common.rank(), "accumulate": cfg.accumulate, "seed": cfg.seed}
    # complains about sizes before anything is written
    data.StepSampler(len(train_set), cfg.batch_size, 1, **sampler_args)
    identity = run.identity("finetune", len(train_set), fingerprint(train_set))
    out, state = Path(cfg.out), run.open_run(cfg, **identity)
    steps_per_epoch = len(train_set) // cfg.batch_size
    total_steps = min(run_length(cfg, steps_per_epoch), cfg.max_steps or sys.maxsize)
    if metrics := run.finished(out, state, total_steps):
        return finish(cfg, metrics)
    model, mapped = build_model(cfg, init, train_set.categories)
    if cfg.freeze_detector:
        freeze(model)
    model = model.to(device)
    optimizer = build_optimizer(cfg, model)
    start = run.restore(state, model, optimizer, cfg) if state else 0
    wrapped, criterion = common.wrap_model(model, device, compiled=cfg.compile), build_criterion(cfg)
    sampler = data.StepSampler(len(train_set), cfg.batch_size, total_steps, start_step=start, **sampler_args)
    batches = iter(data.make_loader(LabelledDataset(cfg, train_set), sampler,
                                    num_workers=cfg.num_workers, collate=data.collate))
    log, skipped, seen = run.Log(out, start, device), data.SkipCount(len(train_set)), 0
    watch = run.FiniteWatch(out, lambda i: str(train_set.records[i].image))
    run.tell_plan(cfg, len(train_set), f"labelled images of {len(mapped)} categories", steps_per_epoch,
                  start, total_steps, device)
    bar = run.progress(range(start, total_steps), initial=start, total=total_steps, desc="fine-tuning")
    for step in run.until_stopped(bar):
        run.seed_step(cfg.seed, step)
        train_mode(cfg, wrapped)
        lr = common.set_lr(optimizer, lr_factor(cfg, step, steps_per_epoch))
        micro_batches = [next(batches) for _ in range(cfg.accumulate)]
        for batch in micro_batches:
            skipped.add(batch["skipped"])
            seen += len(batch["targets"])
        with watch.step(step, micro_batches) as look:
            terms = train_step(cfg, wrapped, criterion, optimizer, micro_batches, device)
            look(terms)
        if step % cfg.log_every == 0 or step == total_steps - 1:
            watch.settle()
            line = log.write(step, terms, seen, epoch=step // steps_per_epoch, lr=lr)
            bar.set_postfix({k.removeprefix("loss_"): f"{line[k]:.3f}" for k in list(terms)[:3]})
            seen = 0
        if run.save_due(step + 1, total_steps, cfg.save_every):
            watch.settle()
            run.save_checkpoint(out / "last.pt", model, optimizer, step + 1, cfg, **identity,
                                categories=train_set.categories)
        epoch, rest = divmod(step + 1, steps_per_epoch)
        if cfg.eval_every and rest == 0 and epoch % cfg.eval_every == 0 and step < total_steps - 1:
            common.share_buffers(model)
            moving = precise_bn(cfg, model, train_set, device)
            metrics = evaluate(cfg, model, mapped, test_set, device, write=False)
            model.load_state_dict(moving, strict=False)  # a resumed run has not seen this evaluation
            metrics = {k: v for k, v in metrics.items() if isinstance(v, float) and v == v}
            log.append({"step": step, "epoch": epoch, **metrics})
            run.say(f"epoch {epoch}: " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
    common.share_buffers(model)
    if precise_bn(cfg, model, train_set, device):  # what was evaluated is what is saved (released)
        run.save_checkpoint(out / "last.pt", model, optimizer, total_steps, cfg, **identity,
                            categories=train_set.categories)
    skipped.tell()
    return finish(cfg, evaluate(cfg, model, mapped, test_set, device, write=True) | {"steps": total_steps})


def check_flags(cfg: Config, given: set[str], init: convert.Checkpoint | None) -> None:
    """UserError for flags that contradict each other, or belong to the other family."""
    of_rcnn = is_rcnn(cfg.detector)
    if other := sorted(given & (DETR_ONLY if of_rcnn else RCNN_ONLY)):
        raise UserError(f"--{', --'.join(other)}: not of {convert.NAMES[cfg.detector]}, "
                        f"but of the {'DETR' if of_rcnn else 'R-CNN'} family; leave it out"
                        + f", or give --detector {', '.join(typing.get_args(rcnn.RCNN_DETECTORS))}" * (not of_rcnn))
    if cfg.freeze_detector and not cfg.init_from:
        raise UserError("--freeze_detector needs "
                        "--init_from FILE: without one the heads would be trained on a random detector")
    if cfg.eval_only and not cfg.init_from:
        raise UserError("--eval_only and --class_agnostic need --init_from FILE: the checkpoint to evaluate")
    if cfg.eval_only and of_rcnn and not init.rcnn:
        raise UserError(f"--eval_only: {cfg.init_from} holds no detector of the R-CNN family, "
                        "only what one starts from; fine-tune it first")
    if (cfg.protocol in ("soco", "dupr")) != of_rcnn and cfg.protocol != "released":
        raise UserError(f"--protocol {cfg.protocol} is a schedule of the {'DETR' if of_rcnn else 'R-CNN'} family, "
                        f"not of {cfg.detector}")
    if cfg.protocol == "updetr_long" and cfg.detector != "detr":
        raise UserError(f"--protocol updetr_long is a schedule of detr, not of {cfg.detector}")
    if cfg.protocol in ("semi_supervised", "low_data") and not (cfg.data == "coco" and cfg.labels_percent < 100):
        raise UserError(f"--protocol {cfg.protocol} is a schedule of shares of COCO: give "
                        "--data coco --labels_percent P")
    if cfg.detector == "fcos_fpn" and cfg.fpn_channels % 64:
        raise UserError(f"--fpn_channels {cfg.fpn_channels}: "
                        "FCOS normalises in 32 groups of at least two channels; give a multiple of 64")
    if not all(0 < drop <= 1 for drop in cfg.lr_drops):
        raise UserError(f"--lr_drops {' '.join(map(str, cfg.lr_drops))}: shares of the run, above 0 and at most 1")


def open_sets(cfg: Config) -> tuple[DetectionSet, DetectionSet]:
    """Training set (the --labels_percent share of it) and test set, which has the training set's categories."""
    shared = {"synthetic_size": cfg.synthetic_size, "seed": cfg.seed, "masks": cfg.detector.startswith("mask")}
    train_set = open_detection(cfg.data, cfg.data_root, "train", synthetic_images=cfg.synthetic_images, **shared)
    test_set = open_detection(cfg.data, cfg.data_root, "test", categories=train_set.categories,
                                   synthetic_images=cfg.synthetic_test_images, **shared)
    if not 0 < cfg.labels_percent <= 100:
        raise UserError(f"--labels_percent {cfg.labels_percent:g}: must lie above 0 and not above 100")
    if cfg.labels_percent < 100:
        train_set = train_set.subset(cfg.labels_percent, cfg.seed)           # F2
    if is_rcnn(cfg.detector):
        train_set = train_set.with_objects()
    for note in dict.fromkeys([*train_set.notes, *test_set.notes]):
        run.say(f"note: {note}")
    return train_set, test_set


def fingerprint(labelled: DetectionSet) -> str:
    """sha256 over the names of the images and all their boxes and labels, in order."""
    digest = hashlib.sha256()
    for r in labelled.records:
        digest.update(f"{Path(str(r.image)).name} {r.id} {r.hw}".encode("utf-8", "surrogateescape"))
        for part in (r.boxes, r.labels, r.crowd):
            digest.update(part.tobytes())
    return digest.hexdigest()


def finish(cfg: Config, metrics: dict[str, Any]) -> dict[str, Any]:
    if common.rank() == 0:
        evaluation.write_json(Path(cfg.out) / "metrics.json", metrics)
        columns = [k for k in metrics if k not in ("per_class", "steps")]
        run.say(evaluation.metrics_table({"class-agnostic" if cfg.class_agnostic else "detection": metrics}, columns))
        if metrics.get("per_class"):
            shown = {name: "-" if ap is None or ap != ap else f"{ap:.3f}" for name, ap in metrics["per_class"].items()}
            run.say("AP per class: " + ", ".join(f"{name} {ap}" for name, ap in shown.items()))
        run.say(f"wrote {cfg.out}/metrics.json, detections.json, predictions.png")
    common.barrier()
    return metrics


if __name__ == "__main__":
    run.cli(main)
