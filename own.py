"""A recipe for one's own images, `--preset own`: model, batch, length and image size from what the data are and where
it runs. What a flag says, or a checkpoint is, stays; each choice is printed with its reason.

The numbers are ours; no paper has them. Those of the small model were tried on two sets (docs/own-images.md), those of
the papers' model are not tried: there was no GPU.
"""
from __future__ import annotations

from common import UserError, world_size  # before torch: see there

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

import data
from annotations import DetectionSet
from proposals import Proposals, image_seed
from rcnn import is_rcnn
from run import given_flags, print_rank0


@dataclass
class OwnConfig:
    """The knob of --preset own."""
    size: Literal["auto", "small", "paper"] = "auto"  # model of --preset own: for a CPU, or the paper's


PRESET: dict[str, Any] = {"num_workers": 2, "log_every": 20, "save_every": 200}
SMALL_MODEL = {  # what two CPU cores train in minutes
    "arch": "resnet18", "backbone_weights": "imagenet", "hidden_dim": 128, "enc_layers": 2, "dec_layers": 3,
    "dim_feedforward": 512, "dropout": 0.0, "num_queries": 100, "with_box_refine": True}
# A backbone that starts random must learn, with statistics of its own.
RANDOM_BACKBONE = {"backbone_norm": "bn", "lr_backbone": 4e-4}
SMALL_RCNN = {"arch": "resnet18", "backbone_weights": "imagenet", "backbone_norm": "frozen", "fpn_channels": 64,
              "head_dim": 256, "proposals_per_image": 200, "rois_per_image": 64, "precise_bn": 0}
LEAST_PIXELS = 12  # a smaller object is a matter of a few cells of the finest map, of stride 8
PIXELS = 56  # what an object's side should be in the median
MEMORY_PER_IMAGE = {"finetune": 4.0, "pretrain": 1.5}  # GiB on a GPU, estimated, of the papers' model


# ==== 1. What fits ====


def model_size(size: str, device: torch.device) -> tuple[str, str]:
    """(small or paper, why)."""
    if size != "auto":
        return size, "as given"
    return ("paper", "on a GPU") if device.type == "cuda" else ("small", f"on {device.type}")


def fit_batch(images: int, wanted: int, micro: int, world: int = 1) -> tuple[int, int]:
    """(global batch, accumulate): at most `wanted` and at most the set, in equal pieces of at most `micro` images on
    each of `world` processes. UserError: fewer images than processes."""
    if images < world:
        raise UserError(f"{images} images are fewer than the {world} processes; start fewer")
    share = max(min(images, wanted) // world, 1)  # of a process
    pieces = -(-share // micro)
    return share // pieces * pieces * world, pieces


def micro_batch(job: str, size: str, device: torch.device) -> int:
    """Images that go through the model at once."""
    if device.type != "cuda" or size == "small":
        return 8
    return max(1, int(torch.cuda.get_device_properties(device).total_memory / 2**30 / MEMORY_PER_IMAGE[job]))


def training_steps(images: int, factor: float, least: int, most: int) -> int:
    """Steps grow with the root of the number of images: of ten times as many, each is seen a third as often."""
    return int(min(max(round(factor * math.sqrt(images), -1), least), most))


def short_side(relative: np.ndarray, least: int, most: int) -> int:
    """The short side of a picture at which the median object has PIXELS. relative: see relative_sides."""
    median = float(np.median(relative)) if len(relative) else 1
    return min(max(round(PIXELS / max(median, 1e-6) / 32) * 32, least), most)


def image_knobs(side: int) -> dict[str, Any]:
    """The knobs of the augmentation in the proportions of the papers, for a largest short side."""
    return {"scales": tuple(round(side * share / 16) * 16 for share in (0.75, 0.875, 1.0)),
            "max_size": round(side * 5 / 3), "crop_scales": (side, round(side * 1.25)),
            "crop_range": (round(side * 0.6), side)}


def relative_sides(boxes_xyxy: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Root of the area of boxes [n, 4], as a share of the image's short side."""
    return np.sqrt(np.prod(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], axis=1, dtype=np.float64)) / min(hw)


# ==== 2. The recipes ====


def adopt(cfg: Any, values: dict[str, Any], fixed: Collection[str]) -> Any:
    """cfg with those of the values that nothing fixes: a flag, or what a checkpoint is. A length in epochs is one."""
    fixed = {*fixed, "steps"} if "epochs" in fixed else fixed
    return dataclasses.replace(cfg, **{k: v for k, v in values.items() if k not in fixed})


def fit_pretraining(cfg: Any, argv: list[str] | None, device: torch.device) -> Any:
    """cfg of detreg.py with the recipe for its images; as it is without --preset own."""
    if cfg.preset != "own":
        return cfg
    fixed = given_flags(argv)
    source = data.open_images(cfg.data, cfg.data_root, synthetic_images=cfg.synthetic_images,
                              synthetic_size=cfg.synthetic_size, seed=cfg.seed)
    images, (size, why) = len(source), model_size(cfg.size, device)
    relative = sample_proposals(cfg, source)
    wanted, least, most = (8, 192, 320) if size == "small" else (32, 480, 800)
    batch, accumulate = fit_batch(images, wanted, micro_batch("pretrain", size, device), world_size())
    side = max(cfg.scales) if "scales" in fixed else short_side(relative, least, most)
    values = image_knobs(side) | {
        "size": size, "batch_size": batch, "accumulate": accumulate, "num_classes": 2, "cache_proposals": True,
        "proposal_rank": "nms", "probe_images": min(50, images // 10) if images >= 20 else 0,
        "steps": training_steps(images, *((20, 200, 3000) if size == "small" else (200, 2000, 30000)))}
    if size == "small":
        values |= SMALL_MODEL | {"lr": 4e-4, "max_prop": 20, "patch_size": 64}
    if cfg.backbone_weights == "random":
        values |= RANDOM_BACKBONE
    chosen = adopt(cfg, values, fixed)
    say(chosen, images, why, relative, "proposal")
    return chosen


def sample_proposals(cfg: Any, source: Any, count: int = 20) -> np.ndarray:
    """relative_sides of the proposals of some images."""
    rng, generator = np.random.default_rng(cfg.seed), Proposals(cfg).generator
    found = []
    for i in rng.choice(len(source), min(count, len(source)), replace=False):
        image, i = data.load_usable(source, int(i), rng, [])
        boxes = generator(image, image_seed(cfg.seed, source.key(i)))[:cfg.max_prop]
        found.append(relative_sides(boxes, (image.height, image.width)))
    return np.concatenate(found)


def fit_finetuning(cfg: Any, train_set: DetectionSet, device: torch.device, fixed: frozenset[str]) -> Any:
    """cfg of finetune.py with the recipe for its labelled images; as it is without --preset own. fixed: the knobs that
    flags or the checkpoint decide."""
    if cfg.preset != "own":
        return cfg
    images, of_rcnn, (size, why) = len(train_set), is_rcnn(cfg.detector), model_size(cfg.size, device)
    relative = np.concatenate([relative_sides(r.boxes[~r.crowd], r.hw) for r in train_set.records])
    least, most = (224, 416) if size == "small" else (800, 1200)
    side = max(cfg.scales) if "scales" in fixed else short_side(relative, least, most)
    batch, accumulate = fit_batch(images, 8 if size == "small" else 16, micro_batch("finetune", size, device),
                                  world_size())
    steps = training_steps(images, *((60, 300, 4000) if size == "small" else (300, 1500, 60000)))
    values = image_knobs(side) | {"size": size, "batch_size": batch, "accumulate": accumulate, "steps": steps,
                                  "eval_size": side}
    if size == "small":
        values |= SMALL_RCNN if of_rcnn else SMALL_MODEL | {"lr": 4e-4, "lr_backbone": 4e-5}
    if cfg.backbone_weights == "random" and not cfg.init_from:
        values |= RANDOM_BACKBONE
    if of_rcnn:
        smallest = float(np.quantile(relative, 0.05)) * side if len(relative) else 32
        values |= {"crop_scales": (), "warmup_iters": min(100, steps // 5), "lr": cfg.lr * batch / 16,
                   "anchor_size": min(max(2 ** round(math.log2(smallest)), 8), 32)}
    chosen = adopt(cfg, values, fixed)
    steps_per_epoch = images // chosen.batch_size
    length = chosen.steps or chosen.epochs * max(steps_per_epoch, 1)
    chosen = adopt(chosen, {"eval_every": max(1, round(length / max(steps_per_epoch, 1) / 12))}, fixed)
    say(chosen, images, why, relative, "labelled object")
    return chosen


def say(cfg: Any, images: int, why: str, relative: np.ndarray, what: str) -> None:
    """Print the recipe and what is to be feared of it."""
    side, length = max(cfg.scales), f"{cfg.steps} steps" if cfg.steps else f"{cfg.epochs} epochs"
    median = f"{np.median(relative) * side:.0f} px" if len(relative) else "unknown"
    print_rank0(f"--preset own: {cfg.size} model ({why}); {length} of {cfg.batch_size} images, for {images} images; "
                f"pictures at a short side of {side} px, where the side of the median {what} is {median}")
    if len(relative) and np.median(relative) * side < LEAST_PIXELS:
        print_rank0(f"WARNING: the side of the median {what} is {median}, below {LEAST_PIXELS} px: most will be "
                    "missed. Give larger --scales (fine-tuning: --eval_size too) and --max_size, or cut the pictures "
                    "into tiles before training and use predict.py --tile")
