"""Detectors of the DETR family by name: what a configuration describes (`build_detector`), and what it may not."""
from __future__ import annotations

from typing import Any, Literal

from common import (Backbone, DeformableDETR, DeformableTransformer, Detector, DETR, DETRTransformer, UserError,
                    world_size)

DETECTORS = Literal["detr", "conditional_detr", "deformable_detr_ss", "deformable_detr"]


def build_detector(cfg: Any, num_logits: int, *, focal: bool, position_offset: float | None = None) -> Detector:
    """The detector a configuration describes (fields detector, arch, backbone_norm, lr_backbone, hidden_dim, ...),
    weights still random.

    num_logits: of the class head; focal: see Detector; position_offset: of the sine encoding, None = the detector's own
    (-0.5 in Deformable DETR, else 0). What of the backbone learns: nothing at lr_backbone 0; layer2-4 under frozen
    BatchNorm (released); all of it under ordinary BatchNorm.
    """
    trainable = 0 if cfg.lr_backbone <= 0 else 5 if cfg.backbone_norm == "bn" else 3
    deformable = cfg.detector.startswith("deformable")
    levels = cfg.num_feature_levels if cfg.detector == "deformable_detr" else 1
    stages = (2, 3, 4)[-levels:] if deformable else ({4: 1, 8: 2, 16: 3, 32: 4}[cfg.stride],)
    backbone = Backbone(cfg.arch, stages, cfg.backbone_norm, trainable)
    shared = (cfg.hidden_dim, cfg.nheads, cfg.enc_layers, cfg.dec_layers, cfg.dim_feedforward, cfg.dropout)
    options = {"num_logits": num_logits, "focal": focal, "num_queries": cfg.num_queries}
    if position_offset is not None:
        options["position_offset"] = position_offset
    if deformable:
        return DeformableDETR(backbone, DeformableTransformer(*shared, levels), with_box_refine=cfg.with_box_refine,
                              **options)
    conditional = cfg.detector == "conditional_detr"
    pre_norm = not conditional and cfg.pre_norm
    return DETR(backbone, DETRTransformer(*shared, pre_norm=pre_norm, conditional=conditional), **options)


def check_detector(cfg: Any, views: int = 1) -> None:
    """UserError for a width that the heads, or a GroupNorm of 32 groups, do not divide; for batches that may leave a
    learned BatchNorm a single value. views: how many a model sees of an image."""
    if cfg.hidden_dim % cfg.nheads or cfg.hidden_dim % 32:
        raise UserError(f"--hidden_dim {cfg.hidden_dim} with --nheads {cfg.nheads}: the width must be a multiple of "
                        "the heads and of 32")
    if cfg.detector.startswith("deformable") and cfg.hidden_dim < 64:
        raise UserError(f"--hidden_dim {cfg.hidden_dim}: Deformable DETR normalises in 32 groups of at least two "
                        "channels; give 64 or more")
    side = min(*cfg.scales, cfg.max_size)
    if not norms_see_enough(cfg, cfg.batch_size * views, side):
        raise UserError(f"--batch_size {cfg.batch_size}: one image per process and micro-batch, of which {side} pixels "
                        "may leave BatchNorm one value; give a larger --batch_size, larger --scales and --max_size, or "
                        "--backbone_norm frozen")


def norms_see_enough(cfg: Any, images: int, side: int) -> bool:
    """Does a backbone's learned BatchNorm see two values per channel, in a step on `images` images over all processes,
    of which the longer side has at least `side` pixels?"""
    learns = cfg.backbone_norm == "bn" and cfg.lr_backbone > 0
    stride = 32 if cfg.detector.startswith("deformable") else cfg.stride
    return not learns or images > world_size() * cfg.accumulate or side > stride
