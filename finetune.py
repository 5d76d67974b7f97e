"""Fine-tuning: any checkpoint -> a detector -> COCO and VOC numbers.

Idea: The pretrained detector loses its class head and its pretext heads, gets a class head with one row per category of
    the labelled set, and is trained as the detector's own paper trains it: DETR with softmax and "no object" (Carion et
    al., ECCV 2020, arXiv 2005.12872), Conditional DETR (Meng et al., ICCV 2021, arXiv 2108.06152) and Deformable DETR
    (Zhu et al., ICLR 2021, arXiv 2010.04159) with the focal loss; Faster and Mask R-CNN, RetinaNet and FCOS,
    torchvision's, as SoCo and DUPR train detectron2's, from what the checkpoint has: backbone, pyramid, box head.
    Detector and architecture are read off the checkpoint; the class list comes from the annotation files and is saved.

Run:
    python finetune.py --preset demo --init_from out/detreg-demo/last.pt                # 40 scenes, 2.5 minutes on CPU
    python finetune.py --preset own --data LABELLED --init_from out/detreg-own-PHOTOS   # your own labels
    torchrun --nproc_per_node=8 finetune.py --data coco --init_from FILE                # ours, or a released file
    torchrun --nproc_per_node=8 finetune.py --data coco --labels_percent 1 --init_from FILE
    torchrun --nproc_per_node=8 finetune.py --data coco --detector mask_rcnn_fpn --init_from FILE  # from SoCo, DUPR
    torchrun --nproc_per_node=8 finetune.py --data voc --detector faster_rcnn_c4 --backbone_weights imagenet
    python finetune.py --data coco --init_from FILE --eval_only                         # a fine-tuned detector
    python finetune.py --data coco --init_from FILE --class_agnostic                    # a pretrained one
    From scratch, frozen detectors, the rows of the papers' tables: docs/methods/finetune.md

Schedules (epochs / drop; with shares of labels and `--protocol` in full in docs/methods/finetune.md):
    detr                  150 / 100                      lr 1e-4, backbone 5e-5      UP-DETR, Sec. 4
    conditional_detr      50 / 40                        lr 1e-4, backbone 5e-5      Siamese DETR, Sec. 4
    deformable_detr(_ss)  50 / 40, VOC 100 / 70          lr 2e-4, backbone 2e-5      DETReg, released
    dab_, dn_deformable_detr  50 / 40                    lr 1e-4, backbone 1e-5      DAB-DETR, DN-DETR, released
    R-CNN family          COCO 90k steps, VOC 24k steps  SGD 0.02, one-stage 0.01    MoCo, SoCo, DUPR: detectron2

Deviations (released code / here; in full in docs/methods/finetune.md):
    F1  Class rows: 91 for COCO, 21 for VOC / one per category; a released head is still evaluated.
    F2  Shares of labels: each process drew its own until 2022-04 / one, from --seed alone.
    F3  VOC: one metric each / COCO-style AP and VOC07 are both printed, difficult objects ignored and counted.
    F4  DETR's cross-entropy: weighted mean of each process / over all processes and micro-batches.
    F5  UP-DETR: no VOC; batch 16, backbone rate 1e-5 or 5e-4 / the paper's 32 and 5e-5.
    F6  UP-DETR's single-query checkpoints hold 3 queries: they are made anew.
    F7  --freeze_detector: - / all but class and box head keep weights and statistics, without dropout.
    F8  R-CNN family: detectron2 / torchvision's parts with detectron2's RoIAlign, anchors, losses, C4 head, start.
    F9  RetinaNet's and FCOS's losses: detectron2's and mmdetection's / torchvision's.
    F10 R-CNN losses and BatchNorm: means of each process / and of each micro-batch.
    F11 SoCo's length on VOC, DUPR's rates on shares of COCO: not in the papers / MoCo's, those of 1x.
    F12 PreciseBN: training goes on with its statistics / they are put back, and kept after the last step.
    F13 SoCo's cutout: - / not built.
    F14 DN-DETR's denoising losses: means of each process / over all; DAB from a Deformable DETR: all but its queries.
    F15 Few shots (few_shot.py): TFA's records have one box each / those of an image together; new class head.
    F16 Large pictures: decoded whole / no finer than needed (data.ImagePyramid).

Expected: the demo from DETReg's demo checkpoint ends with AP 0.056 (AR100 0.378), from scratch with 0.022 (0.264).
    The papers' own numbers need COCO or VOC and were not rerun here.
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import copy
import dataclasses
import functools
import itertools
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

import cityscapes
import convert
import curves
import data
import detectors
import evaluation
import few_shot
import lvis_v1
import own
import rcnn
import run
from annotations import DetectionSet, Splits, open_splits
from common import UserError
from run import Count, Depth, Images, Natural, NonNegative, Pixels, Positive, Share, Width

# ==== 1. Hyperparameters ====

PROTOCOLS = Literal["released", "semi_supervised", "low_data", "updetr_long", "detr_long", "siamese", "siamese_long",
                    "soco", "dupr", "few_shot"]
Percent = Annotated[float, run.Range(0, 100, open=True)]
PartOfRun = Annotated[float, run.Range(0, 1, open=True)]


@dataclass
class Config(own.OwnConfig, few_shot.FewShotConfig, run.RunConfig):
    data: str = "coco"  # coco, lvis, voc, cityscapes, synthetic, a json, a YOLO data.yaml or a folder (docs/labels.md)
    val_data: str | None = None  # labelled set that best.pt and thresholds are chosen on; else --data's own, or test
    test_data: str | None = None  # labelled set that the final numbers are of; else --data's own, or validation
    val_percent: Annotated[float, run.Range(0, 99)] = 0.0  # of the training images that become the validation set
    exif: Literal["auto", "stored", "rotated"] = "auto"  # pixels the boxes lie on: as stored, or as EXIF rotates them
    difficult: Literal["ignore", "count"] = "ignore"  # VOC's difficult objects in AP (F3: --data voc of DETR: count)
    synthetic_images: Images = 40  # labelled synthetic images
    synthetic_test_images: Images = 100  # test images of the synthetic set
    repeat_threshold: Share = 0.0  # images with a category that a smaller share has come more often; LVIS: 0.001
    labels_percent: Percent = 100  # use this share of the training images, the same on every process (DETReg, Sec. 6.1)
    # what to do
    init_from: str | None = None  # file, folder of a run or hf:FOLDER of a detector; else --backbone_weights alone
    protocol: PROTOCOLS = "released"  # schedule (docs/methods/finetune.md)
    freeze_detector: bool = False  # train the class head and the box head only (Siamese DETR, Table 5)
    eval_only: bool = False  # only evaluate --init_from
    class_agnostic: bool = False  # evaluate the boxes of --init_from without categories (DETReg, Table 6); no training
    # images
    scales: tuple[Pixels, ...] = tuple(range(480, 801, 32))  # short side in training, pixels (Deformable DETR)
    max_size: Pixels = 1333  # longest side, pixels
    crop_scales: tuple[Pixels, ...] = (400, 500, 600)  # short side before a random crop (R-CNN family: no crop)
    crop_range: tuple[Pixels, ...] = (384, 600)  # smallest and largest side of the crop
    augment: tuple[data.Augmentation, ...] = ()  # beyond the left-right flip: flips, rotate90 (no side is up), colour
    eval_size: Pixels = 800  # short side in evaluation, pixels
    # model (read off --init_from when given)
    detector: Literal[detectors.DETECTORS, rcnn.RCNN_DETECTORS] = "deformable_detr"  # which one
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # backbone
    backbone_weights: str = "swav"  # swav, swav_400, imagenet, moco_v2_200, moco_v2_800, random or a file
    backbone_norm: Literal["frozen", "bn"] = "frozen"  # BatchNorm's statistics: constant or learned (R-CNN family: bn)
    stride: Literal[4, 8, 16, 32] = 32  # of the map that DETR and Conditional DETR see
    num_feature_levels: Depth = 4  # of deformable_detr, dab_ and dn_deformable_detr
    pre_norm: bool = False  # LayerNorm before each block, of detr (DETR: off)
    hidden_dim: Width = 256  # transformer width
    nheads: Width = 8  # attention heads
    enc_layers: Depth = 6  # encoder layers
    dec_layers: Depth = 6  # decoder layers
    dim_feedforward: Width = 1024  # width of the feed-forward layers (detr, conditional_detr: 2048)
    dropout: Share = 0.1  # in the transformer
    num_queries: Width = 300  # object queries (detr, conditional_detr: 100)
    with_box_refine: bool = False  # iterative box refinement of deformable_detr (its Sec. 4.2)
    num_patterns: Natural = 0  # dab_deformable_detr: contents that every anchor has, 0 = its own alone
    box_head: Literal["2fc", "4conv1fc"] = "2fc"  # of *_rcnn_fpn; 2fc: no norm in box and mask head, else BatchNorm
    fpn_channels: Width = 256  # width of the pyramid and of the convolutions on it
    head_dim: Width = 1024  # width behind the box head
    anchor_size: Pixels = 32  # side of the smallest of five anchors, pixels, each twice the last (fcos_fpn: none)
    proposals_per_image: Width = 1000  # that the region proposal network passes on (C4 in training: twice as many)
    rois_per_image: Width = 512  # of them that the box head learns from
    score_threshold: Share = 0.05  # R-CNN family: detections below it are left out (LVIS: 0.0001)
    detections_per_image: Width = 100  # at most (LVIS: 300; detr: one of each query)
    # loss
    lambda_f: NonNegative = 2.0  # focal loss and its matching cost (detr: cross-entropy, 1; dab_, dn_: 1, cost 2)
    lambda_l1: NonNegative = 5.0  # L1 box loss and its matching cost
    lambda_giou: NonNegative = 2.0  # GIoU loss and its matching cost
    eos_coef: NonNegative = 0.1  # class weight of "no object", of detr
    dn_groups: Width = 5  # dn_deformable_detr: how many times an image's targets are denoised in a step (F14)
    dn_label_noise: Share = 0.2  # dn_deformable_detr: share of their labels that are exchanged
    dn_box_noise: Share = 0.4  # dn_deformable_detr: largest change of a side, of the side; of the centre half of it
    # optimisation (schedules: docs/methods/finetune.md)
    batch_size: Images = 32  # images per step over all processes (released: 4 per GPU x 8; R-CNN family: 16)
    epochs: Count = 50  # length of the run
    schedule: Literal["1x", "2x", "3x", "4x", "9x"] = "1x"  # R-CNN family: how many times the length of its schedule
    lr_drop: NonNegative = 40  # epoch after which the rate is x 0.1
    lr_drops: tuple[PartOfRun, ...] = (2 / 3, 8 / 9)  # R-CNN family: shares of the run after which the rate is x 0.1
    warmup_iters: Natural = 1000  # R-CNN family: steps in which the rate rises from lr / 1000
    lr: Positive = 2e-4  # of AdamW (detr, conditional_detr: 1e-4); R-CNN family: of SGD, 0.02, one-stage 0.01
    lr_backbone: NonNegative = 2e-5  # of the backbone (detr, conditional_detr: 5e-5; R-CNN family: lr)
    lr_linear_proj_mult: NonNegative = 0.1  # rate of sampling offsets and reference points (dab_, dn_: 1)
    sgd_momentum: Share = 0.9  # R-CNN family, which is trained by SGD
    weight_decay: NonNegative = 1e-4  # on every parameter (R-CNN family: not on scale and shift of norms)
    clip_max_norm: NonNegative = 0.1  # gradient norm, 0 = not clipped
    precise_bn: Natural = 200  # R-CNN family: batches for BatchNorm's statistics before an evaluation, 0 = off
    ema: Share = 0.0  # decay of a moving average of the weights, which is what is evaluated; 0 = none
    eval_every: Natural = 10  # epochs between evaluations, 0 = only at the end
    select: Literal["last", "best"] = "last"  # weights that metrics.json is of; best: on the validation set
    patience: Natural = 0  # evaluations in a row without a better AP after which the run ends, 0 = it does not


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "data": "synthetic", "scales": (96, 112), "max_size": 144, "eval_size": 112, "arch": "resnet18",
        "backbone_weights": "random", "backbone_norm": "bn", "num_workers": 2, "log_every": 10, "save_every": 100,
        "eval_every": 0,
    },
    "own": own.PRESET | {"select": "best"},
}
# What of the demo depends on the detector.
DEMO = {
    "detr": {"crop_scales": (112, 144), "crop_range": (72, 112), "lr_backbone": 4e-4, "hidden_dim": 128,
             "enc_layers": 2, "dec_layers": 3, "dim_feedforward": 256, "dropout": 0.0, "num_queries": 100,
             "with_box_refine": True, "batch_size": 8, "epochs": 50, "lr_drop": 40, "lr": 4e-4},
    "rcnn": {"fpn_channels": 64, "head_dim": 256, "anchor_size": 8, "proposals_per_image": 200, "rois_per_image": 64,
             "batch_size": 8, "epochs": 50, "steps": None, "warmup_iters": 20, "lr": 0.02, "precise_bn": 20},
    # res5 runs on every RoI: 6 minutes in all
    "c4": {"anchor_size": 8, "proposals_per_image": 30, "rois_per_image": 8, "batch_size": 4, "epochs": 30,
           "steps": None, "warmup_iters": 20, "lr": 0.02, "precise_bn": 20},
}
# Flags of one family only.
RCNN_ONLY = {"box_head", "fpn_channels", "head_dim", "anchor_size", "proposals_per_image", "rois_per_image", "schedule",
             "score_threshold", "lr_drops", "warmup_iters", "sgd_momentum", "precise_bn"}
DETR_ONLY = {"freeze_detector", "class_agnostic", "stride", "num_feature_levels", "pre_norm", "hidden_dim", "nheads",
             "enc_layers", "dec_layers", "dim_feedforward", "dropout", "num_queries", "with_box_refine", "lambda_f",
             "lambda_l1", "lambda_giou", "eos_coef", "lr_drop", "lr_backbone", "lr_linear_proj_mult", "num_patterns",
             "dn_groups", "dn_label_noise", "dn_box_noise"}


def recipe_of(values: dict[str, Any], architecture: dict[str, Any] | None = None, method: str | None = None
              ) -> dict[str, Any]:
    """What follows from the detector, the data set and the share of its labels (docs/methods/finetune.md).

    architecture, method: of the checkpoint behind --init_from (read_init).
    """
    values = values | (architecture or {})
    if values["protocol"] == "released" and method == "soco":
        values["protocol"] = "soco"
    recipe = rcnn_recipe(values) if rcnn.is_rcnn(values["detector"]) else detr_recipe(values)
    # UP-DETR's and Siamese DETR's numbers: everything on VOC but DETReg's and the R-CNN family's (F3)
    if values["data"] == "voc" and not rcnn.is_rcnn(values["detector"]) and (
            method in ("updetr", "siamese_detr") or values["protocol"].startswith("siamese")
            or not values["detector"].startswith("deformable")):
        recipe["difficult"] = "count"
    recipe |= few_shot.recipe(values, fine_tuned=method is None and "detector" in (architecture or {}))
    if values["preset"] == "demo":
        c4 = values["detector"].endswith("_c4")
        recipe |= DEMO["c4" if c4 else "rcnn" if rcnn.is_rcnn(values["detector"]) else "detr"]
    return recipe


def rcnn_recipe(values: dict[str, Any]) -> dict[str, Any]:
    name, share, times = values["data"], values["labels_percent"], int(values["schedule"][0])
    one_stage = values["detector"] in rcnn.ONE_STAGE
    soco = values["protocol"] == "soco"
    recipe = {"lr": 0.01 if one_stage else 0.02, "batch_size": 16, "clip_max_norm": 0.0, "crop_scales": (),
              "backbone_norm": "bn", "box_head": "4conv1fc" if soco else "2fc"}
    if name == "coco" and soco and one_stage:  # mmdetection's defaults
        return recipe | {"scales": (800,), "epochs": 12 * times, "lr_drops": (8 / 12, 11 / 12), "warmup_iters": 500}
    if name == "coco":
        steps = 90000 if share == 100 or soco else 15000 if share <= 2 else 60000
        decay = {"weight_decay": 2.5e-5} if soco else {}
        if times in (3, 9):  # detectron2: the drops come 60k and 20k steps before the end
            recipe["lr_drops"] = tuple((times * 9 - before) / (times * 9) for before in (6, 2))
        return recipe | decay | {"scales": (640, 672, 704, 736, 768, 800), "steps": steps * times}
    if name == "lvis":  # detectron2's, 1x; SoCo's 1x is half as long
        recipe |= {"weight_decay": 2.5e-5} if soco else {}
        return recipe | {"scales": (640, 672, 704, 736, 768, 800), "steps": (90000 if soco else 180000) * times}
    if name == "cityscapes":  # detectron2's
        return recipe | {"lr": 0.01, "batch_size": 8, "steps": 24000 * times, "lr_drops": (3 / 4,),
                         "scales": tuple(range(800, 1025, 32)), "max_size": 2048, "eval_size": 1024}
    if name == "voc":
        return recipe | {"steps": 24000 * times, "lr_drops": (3 / 4, 11 / 12), "warmup_iters": 100}
    return recipe | {"epochs": 50 * times, "warmup_iters": 100}


def detr_recipe(values: dict[str, Any]) -> dict[str, Any]:
    detector, name, share, protocol = (values[k] for k in ("detector", "data", "labels_percent", "protocol"))
    recipe: dict[str, Any] = {}
    if detector in detectors.DAB:  # DAB-DETR, DN-DETR, released; Siamese DETR's pretraining is narrower
        recipe = {"lr": 1e-4, "lr_backbone": 1e-5, "lr_linear_proj_mult": 1.0, "lambda_f": 1.0, "dropout": 0.0,
                  "batch_size": 16, "dim_feedforward": 1024 if protocol == "siamese" else 2048}
    elif not detector.startswith("deformable"):
        recipe = {"lr": 1e-4, "lr_backbone": 5e-5, "dim_feedforward": 2048, "num_queries": 100}
    if detector == "detr":
        recipe |= {"lambda_f": 1.0, "epochs": 150, "lr_drop": 100}
    if values["eval_only"] or values["class_agnostic"]:
        return recipe
    if protocol == "updetr_long":
        return recipe | {"epochs": 300, "lr_drop": 200}
    if protocol == "detr_long":
        return recipe | {"epochs": 500, "lr_drop": 400, "batch_size": 64, "lr_backbone": 1e-5}
    if protocol.startswith("siamese"):
        long = detector == "detr" and (name == "coco" or protocol == "siamese_long")
        return recipe | ({"epochs": 150, "lr_drop": 120} if long else {"epochs": 50, "lr_drop": 40})
    if name == "voc" and detector.startswith("deformable"):
        return {"epochs": 200, "lr_drop": 150, "batch_size": 8} if share == 10 else {"epochs": 100, "lr_drop": 70}
    if name == "coco" and share < 100:
        epochs = {1: 2000, 2: 1000, 5: 500}.get(share, 400)
        epochs, drop = {"low_data": (150, 150), "semi_supervised": (200, 150) if share <= 2 else (100, 40)}.get(
            protocol, (epochs, epochs))
        return recipe | {"epochs": epochs, "lr_drop": drop, "batch_size": 24}
    return recipe


def check(cfg: Config, given: frozenset[str], init: convert.Checkpoint | None) -> None:
    """UserError for values and flags that contradict each other, or flags of the other family."""
    detectors.check_detector(cfg)
    run.check_pair(cfg, "crop_range")
    of_rcnn = rcnn.is_rcnn(cfg.detector)
    if other := sorted(given & (DETR_ONLY if of_rcnn else RCNN_ONLY)):
        raise UserError(f"--{', --'.join(other)}: not of {convert.NAMES[cfg.detector]}, "
                        f"but of the {'DETR' if of_rcnn else 'R-CNN'} family; leave it out"
                        + f", or give --detector {', '.join(typing.get_args(rcnn.RCNN_DETECTORS))}" * (not of_rcnn))
    for names, detector in (("num_patterns", "dab_deformable_detr"),
                            ("dn_groups dn_label_noise dn_box_noise", "dn_deformable_detr")):
        if cfg.detector != detector and (other := sorted(given & set(names.split()))):
            raise UserError(f"--{', --'.join(other)}: of {detector}, not of {cfg.detector}; leave it out, or give "
                            f"--detector {detector}")
    if cfg.eval_only and cfg.detector in detectors.DAB and not convert.has(init.state, convert.ANCHORS):
        raise UserError(f"--eval_only: {cfg.init_from} holds {init.what}, from which {convert.NAMES[cfg.detector]} can "
                        "only start; fine-tune it first, or leave --detector out")
    if cfg.freeze_detector and not cfg.init_from:
        raise UserError("--freeze_detector needs --init_from FILE: without one the heads would be trained on a random "
                        "detector")
    if cfg.eval_only and not cfg.init_from:
        raise UserError("--eval_only and --class_agnostic need --init_from FILE: the checkpoint to evaluate")
    if cfg.eval_only and of_rcnn and not init.rcnn:
        raise UserError(f"--eval_only: {cfg.init_from} holds no detector of the R-CNN family, only what one starts "
                        "from; fine-tune it first")
    if cfg.eval_only and (Path(cfg.out) / "last.pt").exists():
        raise UserError(f"--out {cfg.out} holds a training run, whose metrics this evaluation would overwrite; "
                        "give another --out")
    if (cfg.protocol in ("soco", "dupr")) != of_rcnn and cfg.protocol not in ("released", "few_shot"):
        raise UserError(f"--protocol {cfg.protocol} is a schedule of the {'DETR' if of_rcnn else 'R-CNN'} family, "
                        f"not of {cfg.detector}")
    if cfg.protocol in ("updetr_long", "detr_long", "siamese_long") and cfg.detector != "detr":
        raise UserError(f"--protocol {cfg.protocol} is a schedule of detr, not of {cfg.detector}")
    if cfg.protocol in ("semi_supervised", "low_data") and not (cfg.data == "coco" and cfg.labels_percent < 100):
        raise UserError(f"--protocol {cfg.protocol} is a schedule of shares of COCO: give --data coco "
                        "--labels_percent P")
    if cfg.detector == "fcos_fpn" and cfg.fpn_channels % 64:
        raise UserError(f"--fpn_channels {cfg.fpn_channels}: FCOS normalises in 32 groups of at least two channels; "
                        "give a multiple of 64")


# ==== 2. Data ====


def open_sets(cfg: Config) -> Splits:
    """Training set (the --labels_percent share of it), validation set and test set, of the same categories."""
    sets = open_splits(cfg.data, cfg.data_root, val_data=cfg.val_data, test_data=cfg.test_data,
                       val_percent=cfg.val_percent, labels_percent=cfg.labels_percent,  # F2
                       synthetic_images=cfg.synthetic_images, synthetic_test_images=cfg.synthetic_test_images,
                       synthetic_size=cfg.synthetic_size, seed=cfg.seed, masks=cfg.detector.startswith("mask"),
                       exif=cfg.exif, layout=few_shot.open_layout(cfg), choose=few_shot.sampler(cfg))
    sets = few_shot.restrict(cfg, sets)
    if rcnn.is_rcnn(cfg.detector):
        sets = sets._replace(train=sets.train.with_objects())
    notes = [note for one in sets for note in one.notes]
    most = max(one.max_objects for one in sets)
    queries = cfg.num_queries * max(cfg.num_patterns, 1)
    if not rcnn.is_rcnn(cfg.detector) and most > queries:
        notes.append(f"images have up to {most} objects, the detector has {queries} queries: more objects than "
                     "that are never found in an image (--num_queries)")
    for note in dict.fromkeys(notes):
        run.print_rank0(f"note: {note}")
    return sets


def seen_in_training(cfg: Config, init: convert.Checkpoint | None, train_set: DetectionSet, test_set: DetectionSet
                     ) -> dict[str, str]:
    """{"warning": a sentence} for metrics.json where test images are training images, else {}. Of an evaluation: where
    the checkpoint was trained on this training set, by its name or its fingerprint."""
    images = {record.image for record in train_set.records if isinstance(record.image, Path)}
    seen = sum(record.image in images for record in test_set.records)
    if cfg.eval_only and seen:
        same_name = init.config.get("data") and Path(init.config["data"]).resolve() == Path(cfg.data).resolve()
        same_set = str(init.content.get("data", "")).endswith(train_set.fingerprint()[:16])
        seen *= bool(same_name or same_set)
    if not seen:
        return {}
    warning = (f"WARNING: {seen} of the {len(test_set)} test images are TRAINING images: the numbers say what was "
               "remembered, not what is found in new images")
    if not any(note.startswith("WARNING") for note in train_set.notes):  # open_splits has said why
        run.print_rank0(warning)
    return {"warning": warning}


class LabelledDataset(torch.utils.data.Dataset):
    """Augmented training samples, random as a function of (seed, epoch, index). Crowd regions are left out, difficult
    objects are kept (released).

    A mask detector's targets also have "masks" uint8 [n, h, w]; an object that resizing leaves without a pixel is left
    out (detectron2). repeats: of data.StepSampler, which counts the copies of an image as epochs.
    """

    def __init__(self, cfg: Config, labelled: DetectionSet):
        self.cfg, self.labelled = cfg, labelled
        self.draw_geometry = functools.partial(
            data.draw_geometry, scales=cfg.scales, max_size=cfg.max_size, crop_scales=cfg.crop_scales,
            crop_range=cfg.crop_range, augment=cfg.augment)
        present = [r.labels[~r.crowd].tolist() for r in labelled.records] if cfg.repeat_threshold else []
        self.repeats = lvis_v1.repeat_factors(present, cfg.repeat_threshold) if present else None

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        cfg, (epoch, index) = self.cfg, key
        rng = data.sample_rng(cfg.seed, epoch, index)
        skipped: list[str] = []
        # drawn ahead from a copy of rng: how finely the image has to be decoded
        needs = data.Needs(lambda hw: self.draw_geometry(copy.deepcopy(rng), hw).needs())
        (image, target), index = data.load_usable(self.labelled, index, rng, skipped, needs=needs)
        objects = ~target["crowd"]
        geometry = self.draw_geometry(rng, (image.height, image.width))
        view, boxes, keep = data.apply_geometry(image, target["boxes_xyxy"][objects], geometry)
        if "colour" in cfg.augment:
            view = data.apply_photometric(view, data.draw_photometric(rng, data.COLOUR))
        target = {"boxes": data.normalized_cxcywh(boxes, (view.height, view.width)),
                  "labels": target["labels"][objects][keep]}
        if cfg.detector.startswith("mask"):
            masks = data.apply_geometry_to_masks(self.labelled.masks(index)[objects], geometry)[keep]
            visible = masks.flatten(1).sum(1) > 0
            target = {k: v[visible] for k, v in {**target, "masks": masks}.items()}
        return {"image": data.to_normalized_tensor(view), "target": target, "index": index, "skipped": skipped}


# ==== 3. Model ====

# The flags of a model of the R-CNN family, which its checkpoint holds.
RCNN_ARCHITECTURE = ("detector", "arch", "backbone_norm", "box_head", "fpn_channels", "head_dim", "anchor_size")


def read_init(path: str, keep_queries: bool = False, detector: str = "") -> tuple[convert.Checkpoint, dict[str, Any]]:
    """(checkpoint, the model flags it was made with) of --init_from. detector: the wanted one; an R-CNN also takes a
    mere backbone.

    UP-DETR's single-query variant (F6) has 3 queries: without keep_queries nothing is said of their number, and
    --num_queries is free.
    """
    init = convert.open_checkpoint(path)
    if init.rcnn:
        return init, {k: init.config[k] for k in RCNN_ARCHITECTURE}
    if rcnn.is_rcnn(detector):
        return init, rcnn_architecture(init, detector)
    architecture = init.architecture()
    if detector in detectors.DAB and architecture["detector"].startswith("deformable"):  # F14
        drawn = ("num_queries", "with_box_refine")
        return init, {k: v for k, v in architecture.items() if k not in drawn} | {"detector": detector}
    three = architecture["num_queries"] == 3 and init.method == "updetr"
    single_query = init.settings.get("num_patches", 1 if three else None) == 1
    if "patch2query.weight" in init.state and single_query and not keep_queries:
        del architecture["num_queries"]
    return init, architecture


def rcnn_architecture(init: convert.Checkpoint, detector: str) -> dict[str, Any]:
    """The flags of an R-CNN that fits a foreign checkpoint: its ResNet, and where its pyramid and head are used, their
    widths."""
    tensors = convert.rcnn_state(init, detector)[0]
    architecture = {"arch": convert.resnet_name(tensors, "backbone.body.", init.path)}
    for field, name in (("fpn_channels", "backbone.fpn.layer_blocks.0.0.weight"),
                        ("head_dim", "roi_heads.box_head.5.weight")):
        if name in tensors:
            architecture[field] = len(tensors[name])
    return architecture


def adopt_architecture(cfg: Config, architecture: dict[str, Any], given: frozenset[str]) -> Config:
    """The configuration with the model fields of the checkpoint. A flag on the command line that says otherwise is a
    UserError."""
    theirs = architecture.get("detector", cfg.detector)
    if "detector" in given and cfg.detector != theirs:
        backbone = ""
        if rcnn.is_rcnn(theirs):
            backbone = f"; for its backbone alone give it as --backbone_weights {cfg.init_from}"
        queries = f" with {architecture['num_queries']} queries" if "num_queries" in architecture else ""
        raise UserError(f"{cfg.init_from}: this is a {convert.NAMES[theirs]} checkpoint{queries}; --detector is "
                        f"{cfg.detector}. Give --detector {theirs} or leave it out{backbone}")
    wrong = [f"--{name} {getattr(cfg, name)} (it has {value})" for name, value in architecture.items()
             if name in given and getattr(cfg, name) != value]
    if wrong:
        raise UserError(f"{cfg.init_from} was trained with another architecture than {', '.join(wrong)}; leave these "
                        "flags out")
    return dataclasses.replace(cfg, **architecture)


def adopt_evaluation(cfg: Config, init: convert.Checkpoint | None, given: frozenset[str]) -> Config:
    """For an evaluation: the configuration with the image sizes and the number of proposals of the checkpoint, where no
    flag says otherwise."""
    theirs = image_sizes(init) if cfg.eval_only and init else {}
    if cfg.eval_only and init and init.rcnn:
        theirs |= {"proposals_per_image": init.config["proposals_per_image"]}
    if cfg.eval_only and init and "difficult" in init.config:
        theirs["difficult"] = init.config["difficult"]
    return dataclasses.replace(cfg, **{name: value for name, value in theirs.items() if name not in given})


def image_sizes(init: convert.Checkpoint) -> dict[str, int]:
    """The sizes of the images that a checkpoint of ours, or a Hugging Face one, is evaluated on (a pretraining's: of
    its probe)."""
    eval_size = init.settings.get("eval_size") or max(init.config.get("scales") or (0,))
    sizes = {"eval_size": eval_size, "max_size": init.settings.get("max_size")}
    return sizes if all(sizes.values()) else {}


def categories_of_rows(content: dict[str, Any], rows: int, categories: list[dict], partly: bool = False
                       ) -> list[int] | None:
    """Which category (position in `categories`) each row of a checkpoint's class head stands for, -1 = none; None when
    the head is of other classes. DETR's last row, "no object", is not counted.

    Our checkpoints and Hugging Face's carry their categories. Released heads carry none: 91 rows are COCO ids, 21 rows
    the sorted VOC names (F1). partly: some of the categories are enough.
    """
    theirs = content.get("categories")
    if not theirs and rows == 91 and {c["id"] for c in categories} == convert.COCO_NAMES.keys():
        position = {c["id"]: i for i, c in enumerate(categories)}
        return [position.get(row, -1) for row in range(rows)]
    if not theirs and rows == 21 and len(categories) == 20:
        return [*range(20), -1]
    if not theirs:
        names = {91: convert.COCO_NAMES, 21: convert.VOC_NAMES}.get(rows, {})
        theirs = [{"id": i, "name": names.get(i)} for i in range(rows)]
    label_map = same_categories(theirs, categories)
    complete = sorted(i for i in label_map if i >= 0) == list(range(len(categories)))
    return label_map if complete or partly and max(label_map, default=-1) >= 0 else None


def same_categories(theirs: list[dict], categories: list[dict]) -> list[int]:
    """Of each of their categories the position in `categories`, -1 = none: by id and name; else by a name that no other
    category has, on either side."""
    names, their_names = ([c["name"] for c in some] for some in (categories, theirs))
    position = {c["name"]: i for i, c in enumerate(categories)
                if names.count(c["name"]) == 1 == their_names.count(c["name"])}
    position |= {(c["id"], c["name"]): i for i, c in enumerate(categories)}
    return [position.get((c["id"], c["name"]), position.get(c["name"], -1)) for c in theirs]


class ClassHead(typing.NamedTuple):
    """The class head of a checkpoint of the DETR family."""
    rows: int  # without "no object"; 0: it has no head
    softmax: bool  # over its rows and a last one, "no object"; else a sigmoid on each
    pretext: bool  # of a pretraining: its rows are no categories


def class_head(init: convert.Checkpoint, detector: str) -> ClassHead:
    state = init.state
    weight = state.get("class_embed.weight", state.get("class_embed.0.weight"))
    pretext = any(name.startswith(("feature_embed.", "patch2query.", "feature_align.")) for name in state)
    # UP-DETR and Siamese DETR end in softmax over 3 rows on every detector; DETReg keeps the detector's own head
    softmax = detector == "detr" or "patch2query.weight" in state
    return ClassHead(0 if weight is None else len(weight) - softmax, softmax, pretext or weight is None)


def build_model(cfg: Config, init: convert.Checkpoint | None, categories: list[dict]) -> tuple[nn.Module, list[int]]:
    """The detector, on CPU, and its label map: for each row of its class head the position of its category, -1 = none.
    A class head that does not fit the categories is made anew; all else of a checkpoint must load."""
    torch.manual_seed(cfg.seed)
    if rcnn.is_rcnn(cfg.detector):
        return build_rcnn_model(cfg, init, categories)
    positions = list(range(len(categories)))
    if init is None:
        return detector_from_backbone(cfg, len(categories)), positions
    if cfg.class_agnostic:
        return class_agnostic_detector(cfg, init)
    head = class_head(init, cfg.detector)
    label_map = None if head.pretext else categories_of_rows(init.content, head.rows, categories, cfg.eval_only)
    if cfg.eval_only:
        check_label_map(cfg, init, label_map, head.rows, categories)
    if label_map is None:
        return detector_with_new_head(cfg, init, len(categories)), positions
    if cfg.eval_only or label_map == positions:
        return load_detector(cfg, init, init.state, head.rows, head.softmax), label_map
    return detector_with_reordered_head(cfg, init, label_map, len(categories)), positions


def check_label_map(cfg: Config, init: convert.Checkpoint, label_map: list[int] | None, rows: int,
                    categories: list[dict]) -> None:
    """Of an evaluation: UserError where no row of the class head is a category of the data; says which have none."""
    wanted = evaluation.distinct_names(categories)
    if label_map is None:
        theirs = init.content.get("categories")
        what = (f"it was trained on {listed(evaluation.distinct_names(theirs))}, and {cfg.data} has "
                f"{listed(wanted)}" if theirs else f"its classifier has {rows} rows, and nothing says which of the "
                f"{len(categories)} categories of {cfg.data} they are ({listed(wanted)})")
        boxes = "" if rcnn.is_rcnn(cfg.detector) else ", or evaluate its boxes with --class_agnostic"
        raise UserError(f"{cfg.init_from}: {what}; fine-tune it first{boxes}")
    if lacking := [name for i, name in enumerate(wanted) if i not in label_map]:
        run.print_rank0(f"WARNING: {cfg.init_from} knows nothing of {len(lacking)} of the {len(wanted)} categories, "
                        f"whose AP is 0 and counts: {listed(lacking)}")


def listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def load_detector(cfg: Config, init: convert.Checkpoint, state: dict[str, Tensor], rows: int, softmax: bool,
                  drop: dict[str, str] | None = None, position_offset: float | None = None) -> common.Detector:
    """A detector with these class rows (and "no object" where they end in softmax), filled with `state`, the
    checkpoint's tensors, strictly but for what `drop` (name: reason) leaves out."""
    drop = convert.PRETEXT | (drop or {})
    if cfg.detector in detectors.DAB:
        if not convert.has(state, convert.ANCHORS):  # F14
            state, of_queries = convert.into_dab(state)
            drop |= of_queries
    elif len(state["query_embed.weight"]) != cfg.num_queries:  # F6
        drop[r"^query_embed\."] = f"queries of a single-query checkpoint, made anew for {cfg.num_queries} queries"
    model = detectors.build_detector(cfg, rows + softmax, focal=not softmax, position_offset=position_offset,
                                     num_patterns=cfg.num_patterns)
    convert.print_unused(init.left)
    if init.assumed:
        run.print_rank0(f"note: {init.assumed}")
    convert.load_matching(model, state, drop=drop, source=f"{init.path} ({init.what})")
    return model


def detector_from_backbone(cfg: Config, rows: int) -> common.Detector:
    """No checkpoint: all but the backbone starts random."""
    softmax = cfg.detector == "detr"
    model = detectors.build_detector(cfg, rows + softmax, focal=not softmax, num_patterns=cfg.num_patterns)
    convert.load_backbone_weights(model.backbone[0].body, cfg.backbone_weights, cfg.arch)
    return model


def detector_with_new_head(cfg: Config, init: convert.Checkpoint, rows: int) -> common.Detector:
    """A pretrained detector, or one of other classes, with a class head that starts random."""
    drop = {r"^(class_embed|label_enc)\.": f"class head, made anew for {rows} categories"}
    return load_detector(cfg, init, init.state, rows, softmax=cfg.detector == "detr", drop=drop)


def detector_with_reordered_head(cfg: Config, init: convert.Checkpoint, label_map: list[int], rows: int
                                 ) -> common.Detector:
    """For training, where row i must be category i: the checkpoint's rows in this order, "no object" last."""
    softmax = cfg.detector == "detr"
    order = [label_map.index(i) for i in range(rows)] + [len(label_map)] * softmax
    state = {k: v[order] if k.startswith("class_embed.") else v[[*order, -1]] if k.startswith("label_enc.") else v
             for k, v in init.state.items()}
    run.print_rank0(f"the class head's rows were put in the order of the {rows} categories of {cfg.data}")
    return load_detector(cfg, init, state, rows, softmax)


def class_agnostic_detector(cfg: Config, init: convert.Checkpoint) -> tuple[common.Detector, list[int]]:
    """For --class_agnostic: the head as it is. The label map is -1 throughout where its rows are no categories."""
    head = class_head(init, cfg.detector)
    if not head.rows:
        raise UserError(f"{cfg.init_from} has no class head, so its boxes have no scores; evaluate the file from "
                        "before its conversion")
    # where nothing is trained any more, positions stay those of the pretraining (Siamese DETR, D9)
    offset = init.config.get("position_offset", 0.0) if init.method == "siamese_detr" else None
    model = load_detector(cfg, init, init.state, head.rows, head.softmax, position_offset=offset)
    return model, [-1] * head.rows if head.pretext else list(range(head.rows))


def build_rcnn_model(cfg: Config, init: convert.Checkpoint | None, categories: list[dict]
                     ) -> tuple[nn.Module, list[int]]:
    """build_model of the R-CNN family. A checkpoint is our fine-tuned one, which must load but for its class head, or
    any with a ResNet in it."""
    theirs = init.content["categories"] if init and init.rcnn else []
    model = rcnn.build_rcnn(cfg, len(theirs if cfg.eval_only else categories))
    positions = list(range(len(categories)))
    if init is None:
        convert.load_backbone_weights(rcnn.whole_resnet(model), cfg.backbone_weights, cfg.arch)
        return model, positions
    if not init.rcnn:
        convert.load_rcnn(model, init, cfg.detector, cfg.box_head)
        return model, positions
    label_map = categories_of_rows(init.content, len(theirs), categories, cfg.eval_only)
    drop = {}
    if cfg.eval_only:
        check_label_map(cfg, init, label_map, len(theirs), categories)
    if label_map != positions and not cfg.eval_only:
        why = f"class head, made anew for {len(categories)} other categories or another order of them"
        label_map, drop = positions, {convert.CLASS_LAYERS: why}
    convert.load_matching(model, init.state, drop=drop, source=f"{init.path} ({init.what})")
    return model, label_map


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
    if rcnn.is_rcnn(cfg.detector):
        return None
    dab = cfg.detector in detectors.DAB
    matcher = common.HungarianMatcher((2 if dab else 1) * cfg.lambda_f, cfg.lambda_l1, cfg.lambda_giou,
                                      focal=cfg.detector != "detr")
    criterion = detectors.DenoisingCriterion if dab else common.SetCriterion
    return criterion(matcher, cfg.lambda_f, cfg.lambda_l1, cfg.lambda_giou, eos_coef=cfg.eos_coef)


def rcnn_losses(cfg: Config, model: nn.Module, batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Loss terms of one micro-batch: its own means, a share of the step's (F10)."""
    images = rcnn.input_images(batch, device)
    with common.autocast(device, cfg.amp):
        losses = model(images, rcnn.to_rcnn(batch["targets"], images, cfg.detector))
    return {"loss_" + k.removeprefix("loss_"): v.float() / cfg.accumulate for k, v in losses.items()}


# ==== 5. Training step ====


def build_optimizer(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    return rcnn.build_sgd(cfg, model) if rcnn.is_rcnn(cfg.detector) else common.build_optimizer(cfg, model)


def lr_factor(cfg: Config, step: int, run_length: int) -> float:
    """By which the learning rates are multiplied in this step of a run of run_length steps."""
    if rcnn.is_rcnn(cfg.detector):
        return rcnn.warmup_step_schedule(step, run_length, cfg.warmup_iters, cfg.lr_drops)
    return common.step_schedule(step, run_length / cfg.epochs, (cfg.lr_drop,))


def train_step(cfg: Config, model: nn.Module, criterion: common.SetCriterion | None, optimizer: torch.optim.Optimizer,
               micro_batches: list[dict], device: torch.device) -> dict[str, Tensor]:
    """One optimiser step on cfg.accumulate micro-batches. Returns the unweighted loss terms of the whole, the total and
    the gradient norm."""
    if criterion:
        counts = [len(t["labels"]) for batch in micro_batches for t in batch["targets"]]
        num_boxes = common.normalizer(sum(counts), device)
        class_weight = common.normalizer(criterion.class_weight_sum(counts, cfg.num_queries), device)  # F4
    terms: dict[str, Tensor] = {}
    optimizer.zero_grad()
    for i, batch in enumerate(micro_batches):
        with common.gradient_sync(model, i == len(micro_batches) - 1):
            if criterion is None:
                losses = rcnn_losses(cfg, model, batch, device)
                loss = torch.stack(list(losses.values())).sum()
            else:
                batch = common.batch_to_device(batch, device)
                with common.autocast(device, cfg.amp):
                    outputs = model(batch["images"], batch["mask"],
                                    **detectors.denoising_input(cfg, model, batch["targets"]))
                losses, _ = criterion(outputs, batch["targets"], num_boxes, class_weight)
                loss = criterion.total(losses)
            common.backward(loss, optimizer, cfg.amp)
        common.add_terms(terms, {"loss": loss, **losses}, len(micro_batches))
    terms["grad_norm"] = common.clip_and_step(model, optimizer, cfg.amp, cfg.clip_max_norm)
    return terms


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, momentum: float) -> None:
    """--ema: average = m average + (1 - m) model; BatchNorm's statistics as they are."""
    common.update_average(average, model, momentum)
    for mine, theirs in zip(average.buffers(), model.buffers()):
        mine.copy_(theirs)


# ==== 6. Evaluation ====


@torch.no_grad()
def precise_bn(cfg: Config, model: nn.Module, train_set: DetectionSet, device: torch.device) -> dict[str, Tensor]:
    """PreciseBN (detectron2): BatchNorm's statistics become their mean over cfg.precise_bn training batches; weights
    stay. A function of the weights and the seed alone. Returns the buffers as they were; nothing happens in the DETR
    family and with --precise_bn 0."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not (rcnn.is_rcnn(cfg.detector) and cfg.precise_bn and norms):
        return {}
    before = {k: v.clone() for k, v in model.named_buffers()}
    momenta = [m.momentum for m in norms]
    dataset = LabelledDataset(cfg, train_set)
    sampler = data.StepSampler(len(dataset), cfg.batch_size, -(-cfg.precise_bn // cfg.accumulate), seed=cfg.seed,
                               world=common.world_size(), rank=common.rank(), accumulate=cfg.accumulate,
                               repeats=dataset.repeats)
    loader = data.make_loader(dataset, sampler, num_workers=cfg.num_workers, collate=data.collate)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    model.train()
    run.seed_step(cfg.seed, 0)  # regions are drawn at random
    for batch in run.progress(itertools.islice(loader, cfg.precise_bn), total=cfg.precise_bn,
                              desc="BatchNorm statistics"):
        rcnn_losses(cfg, model, batch, device)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        for buffer in (norm.running_mean, norm.running_var):
            buffer.copy_(common.all_reduce_sum(buffer) / common.world_size())
    return before


@torch.no_grad()
def rcnn_detections(cfg: Config, model: nn.Module, label_map: list[int], test_set: DetectionSet, device: torch.device
                    ) -> tuple[list[dict], list]:
    """COCO results of this process's slice, image by image, as released: nothing depends on what else is in a batch."""
    category_ids = [test_set.categories[i]["id"] if i >= 0 else None for i in label_map]
    detections = []
    for batch in evaluation.each_batch(model, test_set, size=cfg.eval_size, max_size=cfg.max_size, batch_size=1,
                                       num_workers=cfg.num_workers, text="evaluation"):
        images = rcnn.input_images(batch, device)
        detections += rcnn.from_rcnn(model(images), images, batch["targets"], cfg.detector, category_ids)
    return detections, []


def detr_detections(cfg: Config, model: nn.Module, label_map: list[int], test_set: DetectionSet, device: torch.device
                    ) -> tuple[list[dict], list]:
    """COCO results of this process's slice, and evaluation.matched_errors; with --class_agnostic of one category."""
    head = model.class_embed if isinstance(model.class_embed, nn.Linear) else model.class_embed[0]
    softmax = head.out_features > len(label_map)  # a last row "no object"
    category_ids = [c["id"] for c in test_set.categories]
    detections, errors, matcher = [], [], build_criterion(cfg).matcher
    for target, logits, boxes_xyxy in evaluation.predict(model, test_set, size=cfg.eval_size, max_size=cfg.max_size,
                                                         device=device, batch_size=8, num_workers=cfg.num_workers,
                                                         text="evaluation"):
        if cfg.class_agnostic:  # a pretext head's row 1 is "object"; else the best class counts
            rows = logits.log_softmax(-1)[:, :-1] if softmax else logits
            scores = rows[:, min(1, rows.shape[-1] - 1)] if label_map[0] < 0 else rows.max(-1).values
            probability = scores.exp() if softmax else scores.sigmoid()
            detections += evaluation.class_agnostic_detections(scores[:, None], boxes_xyxy, target["image_id"],
                                                               object_class=0, probability=probability)
        else:
            detections += category_detections(logits, boxes_xyxy, label_map, category_ids, target["image_id"], softmax,
                                              cfg.detections_per_image)
            errors.append(evaluation.matched_errors(matcher, logits, boxes_xyxy, target, label_map))
    return detections, errors


def category_detections(logits: Tensor, boxes_xyxy: Tensor, label_map: list[int], category_ids: list[int],
                        image_id: int | str, softmax: bool, top: int = 100) -> list[dict]:
    """The detections of one image (common.top_detections); those of rows of a released head that stand for no category
    are dropped."""
    best = common.top_detections(logits, boxes_xyxy, top, focal=not softmax)
    return [{"image_id": image_id, "category_id": category_ids[label_map[row]], "bbox": [x1, y1, x2 - x1, y2 - y1],
             "score": score}
            for score, row, (x1, y1, x2, y2) in zip(*(best[k].tolist() for k in ("scores", "labels", "boxes")))
            if label_map[row] >= 0]


class Found(typing.NamedTuple):
    """What an evaluation has found; on other processes than rank 0 nothing."""
    metrics: dict[str, Any]
    detections: list[dict]
    thresholds: dict[str, Any]  # evaluation.operating_points; {}: of no category
    curves: dict[str, list[tuple]]  # precision over recall


def evaluate(cfg: Config, model: nn.Module, label_map: list[int], labelled: DetectionSet, device: torch.device
             ) -> Found:
    """All metrics of a labelled set. All processes call it."""
    detect = rcnn_detections if rcnn.is_rcnn(cfg.detector) else detr_detections
    detections, errors = map(evaluation.gather, detect(cfg, model, label_map, labelled, device))
    if common.rank() != 0:
        return Found({}, [], {}, {})
    ignored = labelled.coco_ground_truth()
    counted = evaluation.count_difficult(ignored)
    truth, other = (ignored, counted) if cfg.difficult == "ignore" else (counted, ignored)
    groups = {} if cfg.class_agnostic else few_shot.groups(cfg, labelled)
    measure = functools.partial(evaluation.detection_metrics, class_agnostic=cfg.class_agnostic, groups=groups)
    find_points = evaluation.operating_points
    if labelled.federated and not cfg.class_agnostic:
        measure, find_points = lvis_v1.federated_metrics, lvis_v1.operating_points
    metrics = measure(truth, detections, per_class=not cfg.class_agnostic)
    if any("difficult" in a for a in ignored["annotations"]):  # F3
        otherwise = evaluation.detection_metrics(other, detections, class_agnostic=cfg.class_agnostic)
        name = "counted" if cfg.difficult == "ignore" else "ignored"
        metrics |= {f"{k}_difficult_{name}": otherwise[k] for k in ("AP", "AP50", "AP75")}
    if cfg.detector.startswith("mask"):
        masks = measure(truth, detections, iou_type="segm")
        metrics |= {f"{k}_mask": masks[k] for k in ("AP", "AP50", "AP75", "APr", "APc", "APf") if k in masks}
        metrics |= cityscapes.instance_metrics(labelled, detections)  # {} of other sets
    if labelled.voc and not cfg.class_agnostic:
        metrics |= evaluation.voc07_metrics(ignored, detections)  # by its definition
        metrics |= few_shot.voc07_metrics(ignored, detections, groups)
    if cfg.freeze_detector:  # Siamese DETR, Table 5: class-agnostic or not is not said, so both
        boxes_only = evaluation.detection_metrics(truth, detections, class_agnostic=True)
        metrics |= {f"agnostic_AR{k}": boxes_only[f"AR{k}"] for k in (1, 10, 100)}
    points = ({}, {}) if cfg.class_agnostic else find_points(truth, detections)
    return Found(metrics | evaluation.mean_errors(errors), detections, *points)


def write_results(cfg: Config, labelled: DetectionSet, found: Found, thresholds: dict[str, Any]) -> dict[str, Any]:
    """detections.json (COCO results format), pr.png and predictions.png, at these thresholds, on rank 0. Returns the
    metrics and the thresholds."""
    if common.rank() != 0:
        return {}
    out, drawn, title, most = Path(cfg.out), found.detections, "predictions (best 10)", 10
    run.write_json(out / "detections.json", found.detections)
    if thresholds:
        drawn = evaluation.above_thresholds(drawn, thresholds, labelled.categories)
        title, most = "predictions (from the score of best F1)", 30
        curves.draw_curves(out / "pr.png", found.curves, x_label="recall", y_label="precision at IoU 0.5",
                           x_range=(0, 1), y_range=(0, 1))
    names = {} if cfg.class_agnostic else {c["id"]: c["name"] for c in labelled.categories}
    columns = {"ground truth": labelled.coco_ground_truth()["annotations"], title: drawn}
    evaluation.draw_detections(out / "predictions.png", labelled, columns, names, best=most)
    return found.metrics | ({"thresholds": thresholds} if thresholds else {})


class Validation:
    """The evaluations of a run on its validation set: the best weights (best.pt), their thresholds, when to stop.

    The run goes on as if there had been none: a continued one reads from log.jsonl what they have found. average: the
    moving average of the weights (--ema), which then is what is evaluated.
    """

    def __init__(self, cfg: Config, job: run.Run, model: nn.Module, average: nn.Module | None, label_map: list[int],
                 sets: Splits, device: torch.device):
        self.cfg, self.job, self.label_map, self.sets, self.device = cfg, job, label_map, sets, device
        self.network = average or model
        self.interval = cfg.eval_every * job.steps_per_epoch
        best = job.out / "best.pt"
        self.keeps_best = bool(cfg.eval_every or cfg.ema or cfg.select == "best" or best.exists())
        lines = curves.read_log(job.out / "log.jsonl") if best.exists() else []
        self.found = {line["step"] + 1: line.get("AP", 0.0) for line in lines  # AP of no object is nan, not logged
                      if "loss" not in line and line["step"] < job.start}
        if self.found and run.read_checkpoint(best)["step"] not in self.found:
            self.found = {}  # best.pt is of a step that is taken again, or its line was not written any more

    @property
    def best_step(self) -> int:
        """After how many steps AP was highest, the first time."""
        return max(self.found, key=lambda step: (self.found[step], -step), default=0)

    def ends_before(self, step: int) -> bool:
        """Evaluates where it is time to. True: --patience is used up, this step is not to be taken."""
        if step and self.interval and step % self.interval == 0 and step not in self.found:
            if self.job.saved != step:
                self.job.save(step - 1, again=True)  # before what may take long: a signal ends it at once
            statistics = self.estimate_statistics()
            self.evaluate(step)
            self.network.load_state_dict(statistics, strict=False)  # F12
            run.seed_step(self.cfg.seed, step)
        return 0 < self.cfg.patience <= sum(done > self.best_step for done in self.found)

    def estimate_statistics(self) -> dict[str, Tensor]:
        common.broadcast_buffers(self.network)
        return precise_bn(self.cfg, self.network, self.sets.train, self.device)

    def evaluate(self, done: int) -> Found:
        """Of the weights after `done` steps; they become best.pt where none were better."""
        found = evaluate(self.cfg, self.network, self.label_map, self.sets.val, self.device)
        known, digits = done in self.found, "{:.6g}".format  # those of log.jsonl: what is equal stays equal
        ap = torch.tensor(float(digits(found.metrics.get("AP", 0.0))), device=self.device).nan_to_num()
        self.found[done] = float(digits(common.all_reduce_sum(ap).item()))
        if self.keeps_best and self.best_step == done:
            run.save_checkpoint(self.job.out / "best.pt", self.network, None, done, self.cfg, **self.job.identity,
                                categories=self.sets.train.categories, thresholds=found.thresholds)
        if not known:  # a run that --patience ends has just been evaluated
            self.job.evaluated(done - 1, {k: v for k, v in found.metrics.items() if isinstance(v, float) and v == v})
        return found

    def conclude(self) -> dict[str, Any]:
        """The last evaluation, pictures, and the metrics of the test set: of these weights or of the best ones."""
        cfg, job, done = self.cfg, self.job, self.job.done
        self.estimate_statistics()  # what was evaluated is what is saved (released)
        found, step = self.evaluate(done), done
        thresholds = job.extra["thresholds"] = found.thresholds
        job.save(done - 1, again=True)
        if cfg.select == "best" and self.best_step != done:
            common.barrier()
            best, step = run.read_checkpoint(job.out / "best.pt"), self.best_step
            self.network.load_state_dict(best["model"])
            thresholds, found = best["thresholds"], None
        if found is None or self.sets.test is not self.sets.val:
            found = evaluate(cfg, self.network, self.label_map, self.sets.test, self.device)
        metrics = write_results(cfg, self.sets.test, found, thresholds)
        if self.keeps_best:
            metrics |= {"best_step": self.best_step, "val_AP": self.found[step]}
        return metrics | ({"stopped_early": cfg.patience} if done < job.total_steps else {})


def evaluate_checkpoint(cfg: Config, init: convert.Checkpoint, train_set: DetectionSet, test_set: DetectionSet,
                        device: torch.device) -> dict[str, Any]:
    """--eval_only and --class_agnostic."""
    model, label_map = build_model(cfg, init, train_set.categories)
    sizes = image_sizes(init)
    theirs = ("the file names none" if not sizes else "those of the checkpoint"
              if all(getattr(cfg, name) == size for name, size in sizes.items())
              else f"the checkpoint's are {sizes['eval_size']} and {sizes['max_size']}")
    run.print_rank0(f"image sizes: --eval_size {cfg.eval_size} --max_size {cfg.max_size} ({theirs})")
    warning = seen_in_training(cfg, init, train_set, test_set)
    out = Path(cfg.out)
    run.open_folder(out)
    found = evaluate(cfg, model.to(device), label_map, test_set, device)
    metrics = write_results(cfg, test_set, found, found.thresholds) | warning
    run.finish(out, metrics, summary(metrics))
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    """The table of metrics.json, and AP of every class."""
    rows = few_shot.table_rows("detection" if "per_class" in metrics else "class-agnostic", metrics)
    columns = [k for k, value in next(iter(rows.values())).items() if isinstance(value, float) or value is None]
    text = evaluation.metrics_table(rows, columns, title=metrics.get("warning", ""))
    if metrics.get("per_class"):
        shown = [f"{k} {'-' if ap is None or ap != ap else f'{ap:.3f}'}" for k, ap in metrics["per_class"].items()]
        text += f"\nAP per class: {listed(shown, 100)}"
    if metrics.get("thresholds"):
        best = metrics["thresholds"]["all"]
        text += (f"\nfrom a score of {best['threshold']:.2f} on: precision {best['precision']:.2f}, recall "
                 f"{best['recall']:.2f} (best F1, {best['f1']:.2f}, of all classes together at IoU 0.5)")
    return text


# ==== 7. Main ====


def parse(argv: list[str] | None) -> tuple[Config, frozenset[str], convert.Checkpoint | None]:
    """(configuration, names of the flags on the command line, checkpoint behind --init_from)."""
    parse_config = functools.partial(run.parse_config, Config, PRESETS, argv, script="finetune", description=__doc__)
    flags = parse_config()  # the recipe depends on the checkpoint, which these name
    given = run.given_flags(argv)
    init, architecture = None, {}
    if flags.init_from:
        init, architecture = read_init(flags.init_from, flags.class_agnostic, flags.detector)
    recipe = functools.partial(recipe_of, architecture=architecture, method=init and init.method)
    cfg = adopt_architecture(parse_config(recipe=recipe), architecture, given)
    cfg.eval_only |= cfg.class_agnostic
    if "out" not in given:
        cfg.out += few_shot.run_name(cfg) + "-eval" * cfg.eval_only
    few_shot.check(cfg, given)
    return adopt_evaluation(cfg, init, given), given | architecture.keys(), init


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg, fixed, init = parse(argv)
    device = common.setup_distributed(cfg.device)
    sets = open_sets(cfg)
    if any(one.federated for one in sets):
        cfg = own.adopt(cfg, lvis_v1.PROTOCOL, fixed)
    if not cfg.eval_only:
        cfg = own.fit_finetuning(cfg, sets.train, device, fixed)
    check(cfg, fixed, init)
    if cfg.eval_only:
        return evaluate_checkpoint(cfg, init, sets.train, sets.test, device)
    warning = seen_in_training(cfg, init, sets.train, sets.test)
    categories = sets.train.categories
    dataset = LabelledDataset(cfg, sets.train)
    images = data.images_per_epoch(len(dataset), dataset.repeats)
    job = run.Run(cfg, "finetune", sets.train, images, device, summary, categories=categories)
    if job.metrics:
        return job.metrics
    model, label_map = build_model(cfg, init, categories)
    if cfg.freeze_detector:
        freeze(model)
    model = model.to(device)
    average = copy.deepcopy(model) if cfg.ema else None
    optimizer, criterion = build_optimizer(cfg, model), build_criterion(cfg)
    job.restore(model, optimizer, average=average)
    validation = Validation(cfg, job, model, average, label_map, sets, device)
    wrapped = common.wrap_model(model, device, compiled=cfg.compile, checkpointed=cfg.checkpoint_activations)
    loader = data.train_loader(job, dataset, data.collate, dataset.repeats)
    what = "labelled images" + f", some of the {len(dataset)} repeated," * (images > len(dataset))
    for step in job.steps(what=f"{what} of {len(label_map)} categories"):
        if validation.ends_before(step):
            break
        train_mode(cfg, wrapped)
        lr = common.set_lr(optimizer, lr_factor(cfg, step, job.length()))
        micro_batches = job.next_batches(loader)
        terms = train_step(cfg, wrapped, criterion, optimizer, micro_batches, device)
        if average:
            update_average(average, model, min(cfg.ema, (1 + step) / (10 + step)))
        job.check(step, terms, micro_batches)
        job.log(step, terms, *list(terms)[:3], lr=lr)
        job.save(step)
    return job.end(validation.conclude() | warning)


if __name__ == "__main__":
    run.cli(main)
