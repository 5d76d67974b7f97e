"""The R-CNN family: torchvision's parts and what was changed in them, its losses by hand, masks, loading,
PreciseBN, and whole small runs."""
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import flags
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.ops import box_convert, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import annotations
import common
import convert
import data
import evaluation
import finetune
import rcnn
import run
import soco
from common import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
DETECTORS = ("mask_rcnn_fpn", "faster_rcnn_fpn", "mask_rcnn_c4", "faster_rcnn_c4", "retinanet_fpn", "fcos_fpn")
TINY = dict(arch="resnet18", backbone_norm="bn", fpn_channels=32, head_dim=16, anchor_size=8,
            proposals_per_image=12, rois_per_image=8)


def config(detector="faster_rcnn_fpn", **values):
    return finetune.Config(**{"detector": detector, **TINY, "backbone_weights": "random",
                              "crop_scales": (), "clip_max_norm": 0.0,
                              "scales": (64,), "max_size": 96, "num_workers": 0, "seed": 3, **values})


def build(detector="faster_rcnn_fpn", classes=3, **values):
    torch.manual_seed(0)
    return rcnn.build_rcnn(config(detector, **values), classes)


def batch_of(detector="faster_rcnn_fpn", sizes=((64, 48), (40, 64))):
    """Random images of these sizes and torchvision targets for them, with masks that fill the boxes."""
    g, images, targets = torch.Generator().manual_seed(4), [], []
    for h, w in sizes:
        images.append(torch.randn(3, h, w, generator=g))
        boxes = torch.tensor([[4.0, 6, w / 2, h - 8], [w / 3, h / 4, w - 4, h - 2]])
        masks = torch.zeros(2, h, w, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([0, 2]) + rcnn.first_label(detector), "masks": masks})
    return images, targets


# ==== Parts ========================================================================================================

def test_anchors_are_not_rounded():
    cell = rcnn.Anchors(((32,), (64, 100.5)), ((0.5, 1.0, 2.0),) * 2, (8, 16)).cell_anchors
    assert torch.allclose(cell[0], torch.tensor([[-22.627417, -11.3137085, 22.627417, 11.3137085], [-16, -16, 16, 16],
                                                 [-11.3137085, -22.627417, 11.3137085, 22.627417]]))
    w, h = (cell[1][:, 2:] - cell[1][:, :2]).unbind(1)
    assert (torch.allclose((w * h).sqrt(), torch.tensor([64, 100.5] * 3))
            and torch.allclose(h / w, torch.tensor([0.5, 0.5, 1, 1, 2, 2])))
    retina = build("retinanet_fpn", anchor_size=32)
    sides = (retina.anchor_generator.cell_anchors[1][:, 2:]
             - retina.anchor_generator.cell_anchors[1][:, :2]).prod(1).sqrt()
    assert torch.allclose(sides, torch.tensor([64 * 2 ** (k / 3) for k in range(3)] * 3))


@pytest.mark.parametrize(("detector", "strides", "pad"), (
    ("faster_rcnn_fpn", (4, 8, 16, 32, 64), 32), ("faster_rcnn_c4", (16,), 1),
    ("retinanet_fpn", (8, 16, 32, 64, 128), 32), ("fcos_fpn", (8, 16, 32, 64, 128), 32)))
def test_strides_of_maps_and_anchors(detector, strides, pad):
    model = build(detector).eval()
    batch, _ = model.transform([torch.randn(3, 50, 70), torch.randn(3, 66, 40)])
    assert (batch.tensors.shape[2:] == (math.ceil(66 / pad) * pad, math.ceil(70 / pad) * pad)
            and batch.image_sizes == [(50, 70), (66, 40)])
    assert not batch.tensors[0, :, 50:].any() and not batch.tensors[0, :, :, 70:].any()
    maps = list(model.backbone(batch.tensors).values())
    assert ([tuple(m.shape[2:]) for m in maps]
            == [tuple(-(-side // s) for side in batch.tensors.shape[2:]) for s in strides])
    generator = model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator
    anchors = generator(batch, maps)[0]
    per_cell = generator.num_anchors_per_location()[0]
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    # the second cell of the first row, and the last cell of the coarsest map
    assert torch.allclose(centres[per_cell], torch.tensor([float(strides[0]), 0.0]), atol=1e-5)
    height, width = maps[-1].shape[2:]
    assert torch.allclose(centres[-1], strides[-1] * torch.tensor([width - 1.0, height - 1.0]), atol=1e-5)


def test_aligned_pooler():
    g = torch.Generator().manual_seed(1)
    pool = rcnn.AlignedRoIAlign({"0": 4, "1": 8, "2": 16, "3": 32}, 3)
    sides = torch.tensor([10.0, 111.9, 112, 223.9, 224, 447.9, 448, 900])
    # P2 below 112, P4 from 224
    assert pool.levels(torch.stack([sides * 0, sides * 0, sides, sides], 1)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    maps = {k: torch.randn(2, 5, 64 // 2 ** i, 64 // 2 ** i, generator=g, requires_grad=True)
            for i, k in enumerate(("0", "1", "2", "3", "pool"))}
    boxes = [torch.tensor([[3.0, 5, 40, 90], [10, 0, 250, 200]]),
             torch.tensor([[0.0, 0, 255, 255], [7, 7, 9, 11], [1, 2, 120, 140]])]
    got = pool(maps, boxes, [(256, 256)] * 2)
    for row, (image, k, level) in enumerate(((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 0), (1, 2, 1))):
        own = roi_align(maps[str(level)][image:image + 1], [boxes[image][k:k + 1]], 3, 1 / 2 ** (level + 2),
                        sampling_ratio=-1, aligned=True)
        assert torch.equal(got[row], own[0])
    got.sum().backward()
    assert maps["0"].grad.any() and maps["2"].grad.any() and maps["pool"].grad is None
    one = rcnn.AlignedRoIAlign({"0": 16}, 14)({"0": maps["0"]}, boxes, [])
    assert torch.equal(one, roi_align(maps["0"], boxes, 14, 1 / 16, -1, aligned=True))
    assert pool(maps, [boxes[0][:0], boxes[1][:0]], []).shape == (0, 5, 3, 3)


def test_rpn_loss_by_hand():
    rpn = build().rpn
    labels = [torch.tensor([1.0, 0, -1, 0]), torch.tensor([0.0, 1, 1, -1])]  # -1: neither positive nor negative
    g = torch.Generator().manual_seed(2)
    scores, deltas, wanted = (torch.randn(8, 1, generator=g), torch.randn(8, 4, generator=g),
                              torch.randn(8, 4, generator=g))
    objectness, box = rpn.compute_loss(scores, deltas, labels, list(wanted.split(4)))
    positive, used, y = [0, 5, 6], [0, 1, 3, 4, 5, 6], [1.0, 0, 0, 0, 1, 1]
    assert box.item() == pytest.approx((deltas[positive] - wanted[positive]).abs().sum().item() / 6, rel=1e-6)
    p = scores[used, 0].sigmoid()
    expected = -sum(math.log(v) if t else math.log(1 - v) for v, t in zip(p.tolist(), y)) / 6
    assert objectness.item() == pytest.approx(expected, rel=1e-5)


def test_roi_loss_by_hand():
    logits = torch.tensor([[1.0, 2, 0], [0, 0, 3], [0.5, 0, 0]])
    regression, wanted = (torch.arange(36.0).reshape(3, 12) / 10,
                          torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [9, 9, 9, 9]]))
    losses = rcnn.RCNNHeads.box_losses(logits, regression, torch.tensor([1, 2, 0]), wanted)
    # row 0, class 1: 0.4 .. 0.7 against 0; row 1, class 2: 2.0 .. 2.3 against 1; row 2 is background; three RoIs
    assert losses["loss_box_reg"].item() == pytest.approx((0.4 + 0.5 + 0.6 + 0.7 + 1.0 + 1.1 + 1.2 + 1.3) / 3, rel=1e-6)
    rows = [math.log(sum(math.exp(v) for v in row)) - row[c] for row, c in zip(logits.tolist(), (1, 2, 0))]
    assert losses["loss_classifier"].item() == pytest.approx(sum(rows) / 3, rel=1e-6)


def test_c4_runs_res5_once_in_training():
    images, targets = batch_of()
    model, calls = build("mask_rcnn_c4"), []
    model.roi_heads.box_head.res5.register_forward_hook(lambda *_: calls.append(1))
    model(images, targets)
    assert len(calls) == 1 and model.roi_heads.box_head.res5.norm.num_batches_tracked == 1
    # the same RoIs through a pass of their own: equal where BatchNorm does not look at the batch
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    heads, seen = model.roi_heads, {}
    select = heads.select_training_samples
    heads.select_training_samples = lambda *a: seen.setdefault("chosen", select(*a))
    torch.manual_seed(7)
    losses = model(images, targets)
    proposals, matched, labels, _ = seen["chosen"]
    positive = [l > 0 for l in labels]
    features = model.backbone(model.transform(images)[0].tensors)
    boxes = [p[keep] for p, keep in zip(proposals, positive)]
    assert 0 < sum(len(b) for b in boxes) < sum(len(p) for p in proposals)
    logits = heads.mask_logits(features, boxes, [])
    own = maskrcnn_loss(logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets],
                        [m[k] for m, k in zip(matched, positive)])
    assert logits.shape[1:] == (4, 14, 14) and torch.allclose(own, losses["loss_mask"], atol=1e-6)
    calls.clear()
    found = model.eval()(images)
    # in evaluation masks are predicted in the boxes found
    assert len(calls) == 2 and found[0]["masks"].shape[1:] == (1, 14, 14)


def torchvision_own(detector, width=32, dim=16, rows=4):
    """The same detector through torchvision's own constructors."""
    body = common.Backbone("resnet18", (1, 2, 3, 4), "bn", 5)
    if detector in ("retinanet_fpn", "fcos_fpn"):
        levels = {"layer2": "0", "layer3": "1", "layer4": "2"}
        c5 = 512 if detector == "retinanet_fpn" else width
        fpn = BackboneWithFPN(body.body, levels, body.num_channels[1:], width, LastLevelP6P7(c5, width), nn.BatchNorm2d)
        return (RetinaNet if detector == "retinanet_fpn" else FCOS)(fpn, rows - 1)
    fpn = BackboneWithFPN(body.body, {f"layer{i}": str(i - 1) for i in range(1, 5)}, body.num_channels, width,
                          LastLevelMaxPool(), nn.BatchNorm2d)
    head = {"box_head": FastRCNNConvFCHead((width, 7, 7), [width] * 4, [dim], nn.BatchNorm2d),
            "box_predictor": FastRCNNPredictor(dim, rows)}
    if detector == "faster_rcnn_fpn":
        return FasterRCNN(fpn, **head)
    return MaskRCNN(fpn, mask_head=MaskRCNNHeads(width, [width] * 4, 1, nn.BatchNorm2d),
                    mask_predictor=MaskRCNNPredictor(width, width, rows), **head)


@pytest.mark.parametrize("detector", [d for d in DETECTORS if not d.endswith("c4")])
def test_names_are_torchvisions(detector):
    own, ours = torchvision_own(detector).state_dict(), build(detector, box_head="4conv1fc").state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in ours.items()}


def test_names_of_c4_and_2fc():
    names = build("mask_rcnn_c4").state_dict().keys()
    assert not any(".layer4." in k for k in names if k.startswith("backbone.")) and len(set(names)) == len(names)
    assert {"backbone.body.conv1.weight", "backbone.body.layer3.1.bn2.bias",
            "roi_heads.box_head.res5.layer4.1.conv2.weight", "roi_heads.box_head.res5.norm.running_var",
            "roi_heads.box_predictor.cls_score.weight", "roi_heads.mask_predictor.conv5_mask.weight",
            "rpn.head.conv.0.0.weight"} <= names
    names = build("mask_rcnn_fpn").state_dict().keys()
    assert ("roi_heads.box_head.fc7.bias" in names and "roi_heads.mask_head.0.0.bias" in names
            and "roi_heads.mask_head.0.1.bias" not in names)
    # the pyramid has norm
    assert "backbone.fpn.inner_blocks.0.1.weight" in names and "backbone.fpn.inner_blocks.0.0.bias" not in names


@pytest.mark.parametrize(("detector", "box_head", "classes", "millions"), (
    ("mask_rcnn_fpn", "4conv1fc", 80, 45.72), ("mask_rcnn_fpn", "2fc", 80, 44.40), ("faster_rcnn_c4", "2fc", 20, 33.24),
    ("mask_rcnn_c4", "2fc", 80, 35.98), ("retinanet_fpn", "2fc", 80, 37.97), ("fcos_fpn", "2fc", 80, 32.30)))
def test_sizes_of_the_published_models(detector, box_head, classes, millions):
    with torch.device("meta"):  # shapes without memory
        model = rcnn.build_rcnn(finetune.Config(detector=detector, box_head=box_head, backbone_norm="bn"), classes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert all(p.requires_grad for p in model.parameters())


def test_settings_and_start():
    heads, rpn = (build("mask_rcnn_fpn", head_dim=512, proposals_per_image=1000, rois_per_image=512).roi_heads,
                  build(proposals_per_image=1000).rpn)
    assert ((heads.score_thresh, heads.nms_thresh, heads.detections_per_img, heads.fg_bg_sampler.batch_size_per_image)
            == (0.05, 0.5, 100, 512))
    assert heads.fg_bg_sampler.positive_fraction == 0.25 and heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0)
    assert (rpn._pre_nms_top_n, rpn._post_nms_top_n) == ({"training": 2000, "testing": 1000},
                                                         {"training": 1000, "testing": 1000})
    c4 = build("faster_rcnn_c4", proposals_per_image=1000).rpn
    assert (c4._pre_nms_top_n, c4._post_nms_top_n) == ({"training": 12000, "testing": 6000},
                                                       {"training": 2000, "testing": 1000})
    for layer, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001),
                       (heads.mask_predictor.mask_fcn_logits, 0.001)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.3) and not layer.bias.any()
    assert (heads.box_head.fc6.weight.abs().max() <= math.sqrt(3 / (32 * 49))
            and heads.box_head.fc6.weight.std() > 0.9 / math.sqrt(32 * 49))
    retina, fcos = build("retinanet_fpn"), build("fcos_fpn")
    assert (not retina.backbone.fpn.extra_blocks.use_P5 and fcos.backbone.fpn.extra_blocks.use_P5
            and fcos.score_thresh == 0.05)
    assert retina.detections_per_img == 100 and not any(isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))
                                                        for m in retina.head.modules())
    wide = build("retinanet_fpn", fpn_channels=512)  # as wide as C5: still made of C5
    assert not wide.backbone.fpn.extra_blocks.use_P5


@pytest.mark.parametrize("detector", ("mask_rcnn_fpn", "faster_rcnn_c4", "retinanet_fpn", "fcos_fpn"))
def test_bf16_leaves_boxes_in_float(detector):
    images, targets = batch_of(detector)
    model, losses = build(detector, fpn_channels=64), {}
    for amp in ("off", "bf16"):
        torch.manual_seed(1)
        with common.autocast(CPU, amp):
            losses[amp] = model(images, targets)
    assert all(v.dtype == torch.float32 for v in losses["bf16"].values())
    total = {amp: sum(v.item() for v in terms.values()) for amp, terms in losses.items()}
    assert total["bf16"] == pytest.approx(total["off"], rel=0.1) and total["bf16"] != total["off"]
    with torch.no_grad(), common.autocast(CPU, "bf16"):
        found = model.eval()(images)
    assert all(f["boxes"].dtype == torch.float32 for f in found)
    generator = model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator
    assert generator.cell_anchors[0].dtype == torch.float32


# ==== Optimisation =================================================================================================

@pytest.mark.parametrize("detector", ("mask_rcnn_c4", "mask_rcnn_fpn", "fcos_fpn"))
def test_norms_do_not_decay(detector):
    model = build(detector, box_head="4conv1fc")
    optimizer = rcnn.build_sgd(SimpleNamespace(lr=0.02, weight_decay=1e-4, sgd_momentum=0.9), model)
    decay, none = optimizer.param_groups
    assert decay["weight_decay"] == 1e-4 and none["weight_decay"] == 0 and decay["momentum"] == none["momentum"] == 0.9
    norms = {n for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))}
    assert {n.rsplit(".", 1)[0] for n in none["names"]} == norms and len(none["names"]) == 2 * len(norms)
    assert (len(decay["names"]) + len(none["names"]) == len(list(model.parameters()))
            == len({*decay["names"], *none["names"]}))
    assert not any(n.startswith("backbone.body.bn1") for n in decay["names"])
    assert any(n.endswith("bias") for n in decay["names"])  # biases of layers do decay


def test_schedule():
    def lr(step):
        return 0.02 * rcnn.warmup_step_schedule(step, 90000, 1000, (2 / 3, 8 / 9))

    values = {0: 2e-5, 500: 0.01001, 1000: 0.02, 59999: 0.02, 60000: 2e-3, 79999: 2e-3, 80000: 2e-4, 89999: 2e-4}
    assert {k: lr(k) for k in values} == pytest.approx(values, rel=1e-9)
    voc = [rcnn.warmup_step_schedule(s, 24000, 100, (3 / 4, 11 / 12)) for s in (100, 17999, 18000, 21999, 22000)]
    assert voc == pytest.approx([1, 1, 0.1, 0.1, 0.01]) and rcnn.warmup_step_schedule(0, 10, 0, ()) == 1


COCO_SIZES, WIDE = (640, 672, 704, 736, 768, 800), tuple(range(480, 801, 32))


@pytest.mark.parametrize(("values", "expected"), (
    ({"data": "coco"}, dict(steps=90000, lr_drops=(2 / 3, 8 / 9), warmup_iters=1000,
                            scales=COCO_SIZES, box_head="2fc", weight_decay=1e-4)),
    ({"data": "coco", "schedule": "2x"}, dict(steps=180000)),
    ({"data": "coco", "schedule": "4x"}, dict(steps=360000)),
    ({"data": "coco", "protocol": "soco"}, dict(steps=90000, box_head="4conv1fc", weight_decay=2.5e-5, lr=0.02)),
    ({"data": "coco", "detector": "retinanet_fpn"}, dict(steps=90000, lr=0.01, weight_decay=1e-4)),
    ({"data": "coco", "detector": "fcos_fpn", "protocol": "soco"},
     dict(steps=None, epochs=12, lr_drops=(8 / 12, 11 / 12), scales=(800,), lr=0.01, weight_decay=1e-4,
          warmup_iters=500)), ({"data": "coco", "labels_percent": 1}, dict(steps=15000)),
    ({"data": "coco", "labels_percent": 10}, dict(steps=60000)),
    ({"data": "coco", "labels_percent": 5, "protocol": "soco"}, dict(steps=90000, weight_decay=2.5e-5)),
    ({"data": "voc", "detector": "faster_rcnn_c4"},
     dict(steps=24000, lr_drops=(3 / 4, 11 / 12), warmup_iters=100, scales=WIDE)),
    ({"data": "voc", "protocol": "soco"}, dict(weight_decay=1e-4, steps=24000)),
    ({"data": "some/folder"}, dict(steps=None, epochs=50, warmup_iters=100)),
    ({"data": "some/folder", "epochs": 7}, dict(steps=None, epochs=7)),
    ({"data": "some/folder", "steps": 70}, dict(steps=70)),
    ({"data": "synthetic", "preset": "demo"}, dict(steps=None, fpn_channels=64, arch="resnet18", crop_scales=())),
    ({"preset": "demo", "detector": "faster_rcnn_c4"}, dict(steps=None, anchor_size=8, data="synthetic"))))
def test_recipes(values, expected):
    cfg = run.parse_config(finetune.Config, finetune.PRESETS, flags({"detector": "mask_rcnn_fpn", **values}),
                              script="finetune", description="", recipe=finetune.recipe_of)
    assert {k: getattr(cfg, k) for k in expected} == expected
    assert (cfg.crop_scales, cfg.clip_max_norm, cfg.backbone_norm, cfg.sgd_momentum) == ((), 0.0, "bn", 0.9)
    assert values.get("preset") or (cfg.batch_size, cfg.max_size, cfg.eval_size, cfg.precise_bn) == (16, 1333, 800, 200)


def test_demo_of_the_detr_family_is_what_it_was():
    cfg = run.parse_config(finetune.Config, finetune.PRESETS, ["--preset", "demo"], script="finetune", description="",
                           recipe=finetune.recipe_of)
    assert ((cfg.lr, cfg.lr_backbone, cfg.batch_size, cfg.crop_scales, cfg.hidden_dim, cfg.epochs)
            == (4e-4, 4e-4, 8, (112, 144), 128, 50))


# ==== Adapter ======================================================================================================

@pytest.mark.parametrize("detector", DETECTORS)
def test_adapter_there_and_back(detector):
    """Labels 0.. and boxes in 0..1 -> torchvision's targets; read as detections they are the original
    boxes in original pixels."""
    sizes, originals = [(60, 80), (40, 32)], [(120, 240), (20, 64)]  # network input, original
    boxes = [torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.2, 0.4]]),
             torch.tensor([[0.25, 0.75, 0.5, 0.25], [0.5, 0.5, 0.0, 0.5]])]
    padded = data.collate([{"image": torch.randn(3, *s), "target": {"boxes": b, "labels": torch.tensor([2, 0])},
                            "skipped": []} for s, b in zip(sizes, boxes)])
    images = rcnn.input_images(padded, CPU)
    assert [tuple(i.shape[1:]) for i in images] == sizes and torch.equal(images[1], padded["images"][1, :, :40, :32])
    targets = rcnn.to_rcnn(padded["targets"], images, detector)
    first = 0 if detector in ("retinanet_fpn", "fcos_fpn") else 1
    # a box without extent is left out
    assert [t["labels"].tolist() for t in targets] == [[2 + first, first], [2 + first]]
    assert torch.allclose(targets[0]["boxes"], torch.tensor([[20.0, 15, 60, 45], [0, 0, 16, 24]]), atol=1e-5)
    detections = [{**t, "scores": torch.arange(1.0, len(t["labels"]) + 1) / 4} for t in targets]
    known = [{"image_id": 7, "orig_size": torch.tensor(originals[0])},
             {"image_id": 9, "orig_size": torch.tensor(originals[1])}]
    found = rcnn.from_rcnn(detections, images, known, detector, [50, None, 70])
    assert ([(d["image_id"], d["category_id"], d["score"]) for d in found]
            == [(7, 70, 0.25), (7, 50, 0.5), (9, 70, 0.25)])
    for d, b, (h, w) in zip(found, (boxes[0][0], boxes[0][1], boxes[1][0]), (originals[0], originals[0], originals[1])):
        expected = box_convert(b * torch.tensor([w, h, w, h]), "cxcywh", "xyxy")
        assert d["bbox"] == pytest.approx([*expected[:2].tolist(), *(expected[2:] - expected[:2]).tolist()], abs=1e-3)
    dropped = rcnn.from_rcnn(detections, images, known, detector, [None, 60, 70])
    assert [d["category_id"] for d in dropped] == [70, 70]  # a row that is no category


def test_masks_are_pasted_at_the_original_size():
    detection = {"boxes": torch.tensor([[10.0, 5, 30, 25]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9]),
                 "masks": torch.ones(1, 1, 28, 28)}
    found = rcnn.from_rcnn([detection], [torch.zeros(3, 50, 40)],
                           [{"image_id": 1, "orig_size": torch.tensor([100, 80])}], "mask_rcnn_fpn", [5])
    mask = coco_mask.decode(found[0]["segmentation"])
    assert mask.shape == (100, 80) and json.dumps(found)  # 20..60 x 10..50 in the original
    inside = np.zeros((100, 80), np.uint8)
    inside[10:50, 20:60] = 1
    assert (mask == inside).all()
    half = torch.zeros(1, 1, 14, 14)
    half[..., :7] = 0.9  # the left half; outside the picture nothing is drawn
    pasted = rcnn.paste_masks(half, torch.tensor([[-4.0, 90, 24, 118]]), (100, 80))[0]
    assert pasted[90:, :10].all() and pasted.sum() == 100


# ==== Masks in the data ============================================================================================

def coco_json(folder, n=4, size=(48, 64), segmentations=True, seed=0):
    """n pictures of a bright box and a bright triangle on noise, as COCO:
    polygons, compressed and uncompressed RLE in turn."""
    rng, images, annotations = np.random.default_rng(seed), [], []
    folder.mkdir(parents=True, exist_ok=True)
    h, w = size
    for i in range(n):
        picture = rng.integers(0, 60, (h, w, 3), np.uint8)
        x, y = int(rng.integers(2, w // 2 - 12)), int(rng.integers(2, h // 2 - 4))
        box, triangle = [x, y, x + 14, y, x + 14, y + 18, x, y + 18], [x + 22, y + 2, x + 42, y + 2, x + 22, y + 22]
        for k, polygon in enumerate((box, triangle)):
            rle = coco_mask.merge(coco_mask.frPyObjects([polygon], h, w))
            mask = coco_mask.decode(rle)
            picture[mask > 0] = (250, 60 + 150 * k, 20)
            # down the columns, zeros first
            counts = [len(list(group)) for _, group in itertools.groupby(mask.T.flatten().tolist())]
            kinds = ([polygon], {"size": [h, w], "counts": rle["counts"].decode()}, {"size": [h, w], "counts": counts})
            xs, ys = polygon[::2], polygon[1::2]
            shape = {"segmentation": kinds[(i + k) % 3]} if segmentations else {}
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1,
                                "category_id": 10 + k, "iscrowd": 0, "area": float(mask.sum()),
                                "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)], **shape})
        Image.fromarray(picture).save(folder / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": h, "width": w})
    content = {"images": images, "annotations": annotations,
               "categories": [{"id": 10, "name": "box"}, {"id": 11, "name": "triangle"}]}
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "test.json").write_text(json.dumps(content))
    return folder


def test_segmentations_of_all_kinds(tmp_path):
    labelled = annotations.open_detection(str(coco_json(tmp_path / "c", 3)), None, "train", masks=True)
    raw = json.loads((tmp_path / "c" / "train.json").read_text())["annotations"]
    assert {type(a["segmentation"]["counts"]) if isinstance(a["segmentation"], dict) else list
            for a in raw} == {list, str}
    for i in range(3):
        image, target = labelled.load(i)
        masks, picture = labelled.masks(i), np.asarray(image)
        assert masks.dtype == torch.uint8 and masks.shape == (2, 48, 64) and "masks" not in target
        # exactly what was painted
        assert all((picture[m.numpy() > 0] == (250, 60 + 150 * k, 20)).all() for k, m in enumerate(masks))
        for m, box in zip(masks, target["boxes_xyxy"]):
            y, x = m.nonzero(as_tuple=True)
            assert (torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]) - box).abs().max() <= 1
    truth = labelled.coco_ground_truth()
    assert [coco_mask.area(a["segmentation"]) for a in truth["annotations"]] == [a["area"] for a in raw]
    plain = annotations.open_detection(str(tmp_path / "c"), None, "train")  # where nobody asks, nothing is kept
    assert (all(r.segments is None for r in plain.records)
            and "segmentation" not in plain.coco_ground_truth()["annotations"][0])


def test_masks_follow_flip_crop_and_resize():
    masks = torch.zeros(1, 8, 12, dtype=torch.uint8)
    masks[0, 2:5, 1:4] = 1
    flip = data.apply_geometry_to_masks(masks, data.Geometry(True, None, None, (16, 24)))
    assert torch.equal(flip[0], F.interpolate(masks[None].float(), scale_factor=2)[0, 0].flip(-1).byte())
    assert flip[0, 4:10, 16:22].all() and flip.sum() == 36
    crop = data.apply_geometry_to_masks(masks, data.Geometry(False, (16, 24), (2, 1, 6, 8), (6, 8)))
    assert crop.shape == (1, 6, 8) and crop[0, 2:, 1:7].all() and crop.sum() == 24
    image = Image.fromarray((masks[0].numpy() * 255)[..., None].repeat(3, 2))
    geometry = data.Geometry(True, (16, 24), (2, 8, 12, 14), (24, 28))  # and as the image and its boxes
    view, boxes, _ = data.apply_geometry(image, torch.tensor([[1.0, 2, 4, 5]]), geometry)
    got = data.apply_geometry_to_masks(masks, geometry)
    y, x = got[0].nonzero(as_tuple=True)
    assert (torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]) - boxes[0]).abs().max() <= 1
    bright = torch.from_numpy(np.asarray(view)[..., 0] > 127)
    assert ((got[0] > 0) & bright).sum() / ((got[0] > 0) | bright).sum() > 0.9


def test_training_sample_with_masks(tmp_path):
    labelled = annotations.open_detection(str(coco_json(tmp_path, 3)), None, "train", masks=True)
    samples = finetune.LabelledDataset(config("mask_rcnn_fpn", scales=(48, 96)), labelled)
    batch = data.collate([samples[0, i] for i in range(3)])
    for image, target in zip(rcnn.input_images(batch, CPU), batch["targets"]):
        assert target["masks"].shape == (2, *image.shape[1:])
        boxes = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([image.shape[2], image.shape[1]] * 2)
        for m, box in zip(target["masks"], boxes):
            y, x = m.nonzero(as_tuple=True)
            assert (torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]) - box).abs().max() <= 2.1
    assert ({tuple(samples[e, 0]["target"]["masks"].shape[1:]) for e in range(8)}
            == {(48, 64), (96, 96 * 4 // 3)} - {(96, 128)} | {(72, 96)})
    assert "masks" not in finetune.LabelledDataset(config(), labelled)[0, 0]["target"]


def test_objects_without_segmentation_are_refused(tmp_path, real_data):
    folder = coco_json(tmp_path / "c", 2, segmentations=False)
    with pytest.raises(UserError,
                       match=r"4 of 4 objects have no segmentation .*first: object 1 of .*0\.png.*faster_rcnn_fpn"):
        annotations.open_detection(str(folder), None, "train", masks=True)
    content = json.loads((folder / "train.json").read_text())
    good = {"size": [48, 64], "counts": [48 * 64]}
    # a polygon of two points, another image's RLE, nothing
    bad = ([[1, 2, 3, 4]], {"size": [64, 48], "counts": [48 * 64]}, [])
    for a, segmentation in zip(content["annotations"], (good, *bad)):
        a["segmentation"] = segmentation
    (folder / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="3 of 4 objects have no segmentation"):
        annotations.open_detection(str(folder), None, "train", masks=True)
    with pytest.raises(UserError, match="objects have no segmentation"):
        annotations.open_detection(str(real_data / "bccd"), None, "train", masks=True)


def test_synthetic_masks():
    labelled = annotations.open_detection("synthetic", None, "train", synthetic_images=2, synthetic_size=64, masks=True)
    for i in range(2):
        _, target = labelled.load(i)
        boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1]
                 for y, x in (m.nonzero(as_tuple=True) for m in labelled.masks(i))]
        assert torch.equal(target["boxes_xyxy"], torch.tensor(boxes, dtype=torch.float32))


def test_images_without_objects_are_left_out(tmp_path):
    folder = coco_json(tmp_path, 3)
    content = json.loads((folder / "train.json").read_text())
    content["annotations"] = [{**a, "iscrowd": int(a["image_id"] == 2)}
                              for a in content["annotations"] if a["image_id"] != 1]
    (folder / "train.json").write_text(json.dumps(content))
    labelled = annotations.open_detection(str(folder), None, "train")
    kept = labelled.with_objects()
    assert (kept.image_ids == [3] and len(labelled) == 3
            and kept.notes[-1] == "2 of 3 training images have no object and are left out")
    with pytest.raises(UserError, match="none of the 1 training images has an object"):
        annotations.DetectionSet("x", kept.categories, labelled.records[:1], []).with_objects()


# ==== Mask metrics =================================================================================================

def test_mask_ap(tmp_path):
    labelled = annotations.open_detection(str(coco_json(tmp_path, 3)), None, "train", masks=True)
    truth = labelled.coco_ground_truth()
    perfect = [{"image_id": a["image_id"], "category_id": a["category_id"],
                "bbox": a["bbox"], "score": 0.9, "segmentation": a["segmentation"]}
               for a in truth["annotations"]]
    metrics = evaluation.detection_metrics(truth, perfect, iou_type="segm")
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 1
    # masks of which the upper 7 of 10 rows are right have IoU about .7: AP at .50, .55, .60, .65 only
    wrong = []
    for d in perfect:
        mask = coco_mask.decode(d["segmentation"])
        cells = np.flatnonzero(mask)
        mask.flat[cells[math.ceil(0.69 * len(cells)):]] = 0
        wrong.append({**d, "segmentation": coco_mask.encode(np.asfortranarray(mask))})
    metrics = evaluation.detection_metrics(truth, wrong, iou_type="segm")
    assert (metrics["AP50"], metrics["AP75"]) == (1, 0) and metrics["AP"] == pytest.approx(0.4)
    assert evaluation.detection_metrics(truth, wrong)["AP"] == 1  # the boxes are still right
    assert "segmentation" in perfect[0] and isinstance(truth["annotations"][0]["segmentation"], dict)


# ==== Checkpoints ==================================================================================================

def soco_state(prefix=""):
    torch.manual_seed(1)
    model = soco.SoCo(common.Backbone("resnet18", (1, 2, 3, 4), "bn", 5), fpn_channels=32, head_dim=16,
                      mlp_dim=24, embedding_dim=8)
    for module in model.modules():  # so that no two tensors are equal
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            for value in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                value.uniform_(0.5, 1.5)
    return {prefix + k: v for k, v in model.state_dict().items()}


def expected_of_soco(detector):
    """{our name: SoCo's}, written out."""
    names = {f"backbone.body.{k}": f"encoder.{k}"
             for k in common.Backbone("resnet18", (1, 2, 3, 4), "bn").body.state_dict()}
    if detector.endswith("c4"):
        names = {k.replace("backbone.body.layer4", "roi_heads.box_head.res5.layer4"): v for k, v in names.items()}
        return {k: v for k, v in names.items() if not k.endswith("num_batches_tracked")}
    norm = ("weight", "bias", "running_mean", "running_var")
    first = 1 if detector in ("retinanet_fpn", "fcos_fpn") else 0
    for i in range(first, 4):
        for ours, theirs in (("inner", "lateral"), ("layer", "fpn")):
            names[f"backbone.fpn.{ours}_blocks.{i - first}.0.weight"] = f"neck.{theirs}_convs.{i}.conv.weight"
            names |= {f"backbone.fpn.{ours}_blocks.{i - first}.1.{n}": f"neck.{theirs}_convs.{i}.bn.{n}" for n in norm}
    if not first:
        for j in range(4):
            names[f"roi_heads.box_head.{j}.0.weight"] = f"head.conv{j + 1}.weight"
            names |= {f"roi_heads.box_head.{j}.1.{n}": f"head.bn{j + 1}.{n}" for n in norm}
        names |= {f"roi_heads.box_head.5.{n}": f"head.fc1.{n}" for n in ("weight", "bias")}
    return {k: v for k, v in names.items() if not k.endswith("num_batches_tracked")}


CATEGORIES = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}]


def load(path, detector, **values):
    checkpoint, arch = finetune.read_init(str(path), detector=detector)
    cfg = finetune.adopt_architecture(config(detector, init_from=str(path), **values), arch, {"detector"})
    return cfg, *finetune.build_model(cfg, checkpoint, CATEGORIES)


@pytest.mark.parametrize("prefix", ("", "module."))
@pytest.mark.parametrize("detector", DETECTORS)
def test_soco_checkpoint(detector, prefix, tmp_path, capsys):
    state = soco_state(prefix)
    torch.save({"model": state, "epoch": 3}, tmp_path / "s.pt")
    cfg, model, mapped = load(tmp_path / "s.pt", detector, arch="resnet50", fpn_channels=256,
                              head_dim=1024, box_head="4conv1fc")
    printed, own, names = capsys.readouterr().out, model.state_dict(), expected_of_soco(detector)
    two = detector in ("mask_rcnn_fpn", "faster_rcnn_fpn")
    assert (cfg.arch == "resnet18"
            and (cfg.fpn_channels, cfg.head_dim) == (256 if detector.endswith("c4") else 32, 16 if two else 1024))
    assert mapped == [0, 1, 2] and all(torch.equal(own[k], state[prefix + v]) for k, v in names.items())
    fresh = {k for k in own if k not in names and not k.endswith("num_batches_tracked")}
    assert all(k.startswith(("rpn.", "roi_heads.box_predictor.", "roi_heads.mask_", "head.",
                             "backbone.fpn.extra_blocks.", "roi_heads.box_head.res5.norm.")) for k in fresh)
    assert ("pyramid levels that this detector does not have" in printed) == (not two)
    assert ("heads of the pretext task, not needed: predictor, projector" in printed and "target network" in printed
            and "encoder_k, head_k, neck_k" in printed)
    assert (("proposal network, made anew: rpn" in printed) == ("rcnn" in detector)
            and f"loaded {len(names)} tensors" in printed)


@pytest.mark.parametrize(("variant", "detector", "count"), (("fpn", "mask_rcnn_fpn", 392), ("c4", "mask_rcnn_c4", 318)))
def test_names_of_the_released_soco(variant, detector, count):
    """Every tensor that the released converter to detectron2 takes out of the released file has its
    place here, and no other."""
    folder = Path(__file__).parent / "parity" / "statedict"
    released = json.loads((folder / f"statedict_soco_{variant}_pretrain.json").read_text())["entries"]
    mapping = json.loads((folder / f"statedict_soco_{variant}_detectron2.json").read_text())["mapping"]
    with torch.device("meta"):
        state = {name.removeprefix("module."): torch.empty(shape) for name, shape, *_ in released}
        own = rcnn.build_rcnn(finetune.Config(detector=detector, box_head="4conv1fc",
                                              backbone_norm="bn"), 80).state_dict()
    tensors, left = convert.rcnn_state(convert.Checkpoint("FILE", "SoCo", state, {}, {}), detector)
    assert len(tensors) == len(mapping) == count
    assert all(own[k].shape == v.shape for k, v in tensors.items())
    assert {f"module.{k}" for k in state if k not in sum(left.values(), [])} == {theirs for theirs, _ in mapping}


def test_soco_checkpoint_with_the_other_head(tmp_path, capsys):
    torch.save({"model": soco_state()}, tmp_path / "s.pt")
    _, model, _ = load(tmp_path / "s.pt", "faster_rcnn_fpn", box_head="2fc")
    printed = capsys.readouterr().out
    assert ("4conv1fc box head, which --box_head 2fc replaces: roi_heads (22 tensors)" in printed
            or "--box_head 2fc replaces: roi_heads" in printed)
    assert "box head, made anew: roi_heads.box_head.fc6.bias" in printed and hasattr(model.roi_heads.box_head, "fc6")


@pytest.mark.parametrize(("detector", "prefix"),
                         (("faster_rcnn_c4", "module.encoder_q."), ("mask_rcnn_fpn", "encoder_q."),
                          ("fcos_fpn", "backbone.0.body."), ("faster_rcnn_c4", "")))
def test_checkpoints_with_a_backbone_only(detector, prefix, tmp_path, capsys):
    torch.manual_seed(2)
    body = common.Backbone("resnet34", (1, 2, 3, 4), "bn").body.state_dict()
    other = {"transformer.level_embed": torch.ones(3), "encoder_q.fc.0.weight": torch.ones(3, 3),
             "encoder_k.conv1.weight": torch.ones(3)}
    torch.save({"state_dict": {**{prefix + k: v for k, v in body.items()}, **other}}, tmp_path / "b.pt")
    cfg, model, _ = load(tmp_path / "b.pt", detector)
    trunk = rcnn.whole_resnet(model).state_dict()
    assert cfg.arch == "resnet34" and all(torch.equal(v, trunk[k])
                                          for k, v in body.items() if not k.endswith("num_batches_tracked"))
    printed = capsys.readouterr().out
    new = ["norm after res5, made anew"] if detector.endswith("c4") else ["feature pyramid, made anew"]
    new += ["P6 and P7, made anew"] if detector == "fcos_fpn" else ["class and box layers, made anew"]
    assert all(n in printed for n in new) and "encoder_k" in printed


def test_backbone_weights_of_c4(tmp_path, capsys):
    body = common.Backbone("resnet18", (1, 2, 3, 4), "bn").body.state_dict()
    torch.save(body, tmp_path / "r18.pt")
    model, _ = finetune.build_model(config("faster_rcnn_c4", backbone_weights=str(tmp_path / "r18.pt")), None,
                                    CATEGORIES)
    trunk = model.state_dict()
    assert torch.equal(trunk["roi_heads.box_head.res5.layer4.1.conv2.weight"], body["layer4.1.conv2.weight"])
    assert torch.equal(trunk["backbone.body.conv1.weight"], body["conv1.weight"])


def test_backbone_of_an_own_c4_checkpoint(tmp_path):
    c4 = build("faster_rcnn_c4")
    run.save_checkpoint(tmp_path / "c4.pt", c4, None, 1, config("faster_rcnn_c4"),
                        script="finetune", categories=CATEGORIES)
    model, _ = finetune.build_model(config("fcos_fpn", fpn_channels=64, backbone_weights=str(tmp_path / "c4.pt")), None,
                                    CATEGORIES)
    trunk = rcnn.whole_resnet(model).state_dict()
    assert all(torch.equal(v, trunk[k])
               for k, v in rcnn.whole_resnet(c4).state_dict().items() if not k.endswith("num_batches_tracked"))


@pytest.mark.parametrize("detector", ("mask_rcnn_fpn", "retinanet_fpn"))
def test_own_checkpoint(detector, tmp_path):
    model = build(detector, classes=3, box_head="4conv1fc", anchor_size=16)
    cfg = config(detector, box_head="4conv1fc", anchor_size=16)
    run.save_checkpoint(tmp_path / "o.pt", model, None, 5, cfg, script="finetune", categories=CATEGORIES)
    checkpoint, arch = finetune.read_init(str(tmp_path / "o.pt"))  # whatever --detector says by default
    assert arch == dict(detector=detector, arch="resnet18", backbone_norm="bn", box_head="4conv1fc", fpn_channels=32,
                        head_dim=16, anchor_size=16)
    here = finetune.adopt_architecture(finetune.Config(init_from=str(tmp_path / "o.pt"), proposals_per_image=12), arch,
                                       set())
    again, mapped = finetune.build_model(here, checkpoint, CATEGORIES)
    assert mapped == [0, 1, 2] and all(torch.equal(v, checkpoint.state[k]) for k, v in again.state_dict().items())
    other, mapped = finetune.build_model(here, checkpoint, [*CATEGORIES, {"id": 4, "name": "d"}])
    changed = {k for k, v in other.state_dict().items() if v.shape != checkpoint.state[k].shape
               or not torch.equal(v, checkpoint.state[k])}
    class_head = {"retinanet_fpn": ("head.classification_head.cls_logits.",),
                  "mask_rcnn_fpn": ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")}[detector]
    assert len(mapped) == 4 and changed and all(k.startswith(class_head) for k in changed)
    only = dataclasses.replace(here, eval_only=True)
    assert finetune.build_model(only, checkpoint, CATEGORIES[::-1])[1] == [2, 1, 0]
    # of other categories those are evaluated that have a name in common
    model, mapped = finetune.build_model(only, checkpoint, [{"id": 5, "name": "x"}, {"id": 8, "name": "b"}])
    assert mapped == [-1, 1, -1] and all(torch.equal(v, checkpoint.state[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="trained on a, b, c, and coco has x; fine-tune it first"):
        finetune.build_model(only, checkpoint, [{"id": 1, "name": "x"}])
    with pytest.raises(UserError, match=r"--box_head 2fc \(it has 4conv1fc\)"):
        finetune.adopt_architecture(finetune.Config(init_from="o.pt"), arch, {"box_head"})
    with pytest.raises(UserError, match=rf"is detr\. Give "
                       rf"--detector {detector} or leave it out; for its backbone alone .*--backbone_weights o.pt"):
        finetune.adopt_architecture(finetune.Config(init_from="o.pt", detector="detr"), arch, {"detector"})


def test_recipe_depends_on_the_checkpoint(tmp_path):
    torch.save({"model": soco_state()}, tmp_path / "s.pt")
    argv = ["--data", "voc", "--detector", "faster_rcnn_fpn", "--init-from", str(tmp_path / "s.pt")]
    cfg, given, checkpoint = finetune.parse(argv)
    assert given == {"data", "detector", "init_from", "arch", "fpn_channels", "head_dim"}  # flags, and what it has
    assert checkpoint.method == "soco"
    assert ((cfg.protocol, cfg.box_head, cfg.arch, cfg.fpn_channels, cfg.steps)
            == ("released", "4conv1fc", "resnet18", 32, 24000))
    assert finetune.parse([*argv, "--protocol", "dupr"])[0].box_head == "2fc"
    by_epochs = finetune.parse([*argv, "--epochs", "3"])[0]
    assert (by_epochs.epochs, by_epochs.steps) == (3, None)
    assert finetune.parse([*argv, "--epochs", "3", "--steps", "9"])[0].steps == 9


# ==== PreciseBN ====================================================================================================

def test_precise_bn():
    cfg = config(precise_bn=3, batch_size=2, fpn_channels=32)
    train_set = annotations.open_detection("synthetic", None, "train", synthetic_images=6, synthetic_size=64)
    model, _ = finetune.build_model(cfg, None, train_set.categories)
    weights = {k: v.clone() for k, v in model.named_parameters()}
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.copy_(torch.full_like(buffer, 7))
    before = finetune.precise_bn(cfg, model, train_set, CPU)
    first = {k: v.clone() for k, v in model.state_dict().items()}
    assert all((v == 7).all() for v in before.values()) and before.keys() == {k for k, _ in model.named_buffers()}
    assert all(torch.equal(v, weights[k]) for k, v in model.named_parameters())
    assert all(m.momentum == 0.1 and m.num_batches_tracked == 3 for m in model.modules()
               if isinstance(m, nn.BatchNorm2d))
    sampler = data.StepSampler(6, 2, 3, seed=cfg.seed)
    means, variances = [], []
    for keys in sampler:  # by hand, for the first norm
        batch = data.collate([finetune.LabelledDataset(cfg, train_set)[k] for k in keys])
        padded = model.transform(rcnn.input_images(batch, CPU))[0].tensors
        assert padded.shape[2:] == (64, 64)
        out = model.backbone.body.conv1(padded)
        means.append(out.mean((0, 2, 3)))
        variances.append(out.transpose(0, 1).flatten(1).var(1))
    assert torch.allclose(first["backbone.body.bn1.running_mean"], torch.stack(means).mean(0), atol=1e-6)
    assert torch.allclose(first["backbone.body.bn1.running_var"], torch.stack(variances).mean(0), rtol=1e-5)
    torch.rand(5)  # the state of the generator plays no part
    finetune.precise_bn(cfg, model, train_set, CPU)
    assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())
    model.load_state_dict(before, strict=False)
    assert (model.backbone.body.bn1.running_mean == 7).all()
    assert finetune.precise_bn(dataclasses.replace(cfg, precise_bn=0), model, train_set, CPU) == {}


# ==== Runs =========================================================================================================

RUN = dict(data="synthetic", synthetic_images=4, synthetic_test_images=2,
           synthetic_size=64, eval_size=64, precise_bn=1, log_every=1,
           scales=(64,), max_size=96, batch_size=2, num_workers=0, warmup_iters=2, backbone_weights="random", **TINY)


def run_script(out, detector, **values):
    return finetune.main(flags({**RUN, "out": out, "detector": detector, **values}))


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_trains_and_evaluates_again(detector, tmp_path):
    values = {"data": coco_json(tmp_path / "data")} if detector.startswith("mask") else {}
    values |= {"fpn_channels": 64} if detector == "fcos_fpn" else {}  # GroupNorm of 32 groups needs two values in each
    metrics = run_script(tmp_path / "a", detector, max_steps=2, epochs=4, **values)
    *lines, last = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    parts = {"retinanet_fpn": {"classification", "bbox_regression"},
             "fcos_fpn": {"classification", "bbox_regression", "bbox_ctrness"}}.get(
                 detector, {"classifier", "box_reg", "objectness",
                            "rpn_box_reg"} | ({"mask"} if detector.startswith("mask") else set()))
    assert len(lines) == 2 and {k[5:] for k in lines[0] if k.startswith("loss_")} == parts
    assert all(math.isfinite(line["loss"])
               and line["loss"] == pytest.approx(sum(line[f"loss_{p}"] for p in parts), rel=1e-4) for line in lines)
    assert [line["lr"] for line in lines] == pytest.approx([2e-5, 0.01001] if "rcnn" in detector else [1e-5, 0.005005])
    names = {"AP", "AP50", "AP75", "AR100"} | ({"AP_mask", "AP50_mask", "AP75_mask"}
                                               if detector.startswith("mask") else set())
    assert last["step"] == 1 and {k: last[k] for k in names} == pytest.approx({k: metrics[k] for k in names}, abs=1e-5)
    assert (names <= metrics.keys() and all(0 <= metrics[k] <= 1 for k in names)
            and (tmp_path / "a" / "predictions.png").exists())
    found = json.loads((tmp_path / "a" / "detections.json").read_text())
    assert all(("segmentation" in d) == detector.startswith("mask") for d in found)
    saved = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert saved["step"] == 2 and saved["config"]["detector"] == detector
    same = ("data", "synthetic_images", "synthetic_test_images", "synthetic_size", "eval_size", "max_size",
            "num_workers", "proposals_per_image")
    again = finetune.main(flags({**{k: (RUN | values)[k] for k in same}, "init_from": tmp_path / "a" / "last.pt",
                                 "eval_only": "true", "out": tmp_path / "b"}))
    assert {k: again[k] for k in names} == {k: metrics[k] for k in names}
    assert json.loads((tmp_path / "b" / "detections.json").read_text()) == found


def test_interrupted_run_ends_as_the_unbroken_one(tmp_path):
    values = {"epochs": 3, "eval_every": 1, "lr": 0.01}
    run_script(tmp_path / "whole", "faster_rcnn_fpn", **values)
    run_script(tmp_path / "parts", "faster_rcnn_fpn", **values, max_steps=3)
    run_script(tmp_path / "parts", "faster_rcnn_fpn", **values)
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert one["step"] == two["step"] == 6 and all(torch.equal(v, two["model"][k]) for k, v in one["model"].items())
    buffers = [[s["momentum_buffer"] for s in state["optimizer"]["state"].values()] for state in (one, two)]
    assert len(buffers[0]) > 50 and all(torch.equal(a, b) for a, b in zip(*buffers))
    assert (tmp_path / "whole" / "metrics.json").read_text() == (tmp_path / "parts" / "metrics.json").read_text()


def test_accumulation_averages_micro_batches():
    train_set = annotations.open_detection("synthetic", None, "train", synthetic_images=4, synthetic_size=64)
    samples = finetune.LabelledDataset(config(), train_set)
    halves = [data.collate([samples[0, i] for i in pair]) for pair in ((0, 1), (2, 3))]
    model, _ = finetune.build_model(config(), None, train_set.categories)
    model.eval().requires_grad_(True)

    def gradient(cfg, batches):
        for module in model.modules():  # losses, but with constant statistics
            module.training = not isinstance(module, nn.BatchNorm2d)
        torch.manual_seed(0)
        finetune.train_step(cfg, model, None, torch.optim.SGD(model.parameters(), lr=0.0), batches, CPU)
        return {k: p.grad.clone() for k, p in model.named_parameters()}

    both, cfg = gradient(config(accumulate=2), halves), config()
    torch.manual_seed(0)
    one = {}
    for half in halves:
        model.zero_grad()
        sum(finetune.rcnn_losses(cfg, model, half, CPU).values()).backward()
        for k, p in model.named_parameters():
            one[k] = one.get(k, 0) + p.grad / 2
    assert all(torch.allclose(both[k], one[k], atol=1e-6, rtol=1e-4) for k in both)


def test_eight_images_are_learned(tmp_path):
    folder = coco_json(tmp_path / "data", 8, (64, 64))
    metrics = run_script(tmp_path / "o", "faster_rcnn_fpn", data=folder, epochs=40, batch_size=8, rois_per_image=16,
                  proposals_per_image=50, lr=0.05, precise_bn=4, warmup_iters=5, eval_every=0)
    lines = map(json.loads, (tmp_path / "o" / "log.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5]) and metrics["AP50"] > 0.05, (losses, metrics)


# ==== Errors =======================================================================================================

@pytest.mark.parametrize(("argv", "message"), (
    (["--detector", "fcos_fpn", "--num_queries", "5"],
     r"--num_queries: not of FCOS, but of the DETR family; leave it out$"),
    (["--detector", "detr", "--rois_per_image", "5"],
     r"--rois_per_image: not of DETR, but of the R-CNN family; leave it out, or give --detector mask_rcnn_fpn"),
    (["--detector", "faster_rcnn_c4", "--lr_drop", "5"], "--lr_drop: not of Faster R-CNN"),
    (["--detector", "faster_rcnn_c4", "--class_agnostic"], "--class_agnostic: not of Faster R-CNN"),
    (["--detector", "fcos_fpn", "--protocol", "siamese"],
     "--protocol siamese is a schedule of the DETR family, not of fcos_fpn"),
    (["--detector", "detr", "--protocol", "soco"], "--protocol soco is a schedule of the R-CNN family, not of detr"),
    (["--detector", "fcos_fpn", "--lr_drops", "8", "11"], "--lr_drops 8.0 11.0: must be above 0 and at most 1"),
    (["--detector", "fcos_fpn", "--eval_only"], "--eval_only and --class_agnostic need --init_from FILE"),
    (["--detector", "mask_rcnn_c4", "--rois_per_image", "0"], "--rois_per_image 0: must be at least 1")))
def test_flags_that_contradict(argv, message, fails, tmp_path):
    assert re.search(message, fails(finetune.main, [*argv, "--data", "synthetic", "--out", tmp_path / "o"]))


def test_checkpoints_of_the_wrong_kind(fails, tmp_path):
    torch.save({"model": soco_state()}, tmp_path / "s.pt")
    common_flags = ["--data", "synthetic", "--synthetic_images", 2, "--synthetic_test_images", 1,
                    "--init_from", tmp_path / "s.pt"]
    common_flags += ["--out", tmp_path / "o"]
    text = fails(finetune.main, common_flags)  # the default detector is Deformable DETR
    assert "a SoCo checkpoint" in text and "--backbone_weights" in text and "--detector faster_rcnn_fpn" in text
    text = fails(finetune.main, [*common_flags, "--detector", "faster_rcnn_fpn", "--eval_only"])
    assert "holds no detector of the R-CNN family" in text
    text = fails(finetune.main, [*common_flags, "--detector", "faster_rcnn_fpn", "--arch", "resnet50"])
    assert "--arch resnet50 (it has resnet18)" in text
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "s.pt")
    assert "no known kind of checkpoint" in fails(finetune.main, [*common_flags, "--detector", "faster_rcnn_fpn"])


def one_step(first=0, last=4):
    """Losses and gradients of train_step's forward and backward on images first..last - 1, statistics of BatchNorm
    fixed (they are per process)."""
    cfg = config("retinanet_fpn")  # draws no regions: its loss is a mean over images
    model = build("retinanet_fpn")
    images, targets = batch_of("retinanet_fpn", ((64, 48), (40, 64), (64, 64), (48, 48)))
    samples = [{"image": image, "target": {"boxes": data.normalized_cxcywh(t["boxes"], image.shape[-2:]),
                                           "labels": t["labels"]}, "skipped": []}
               for image, t in list(zip(images, targets))[first:last]]
    wrapped = common.wrap_model(fixed_norms(model), CPU)  # must live until the gradients are there
    losses = finetune.rcnn_losses(cfg, wrapped, data.collate(samples), CPU)
    torch.stack(list(losses.values())).sum().backward()
    return {k: v.detach() for k, v in losses.items()} | {k: p.grad
                                                         for k, p in model.named_parameters() if p.grad is not None}


def fixed_norms(model):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def worker():
    """What one of two processes does (conftest.two_processes)."""
    return one_step(2 * common.rank(), 2 * common.rank() + 2)


def test_two_processes_are_one_batch(two_processes):
    """RetinaNet, whose loss is a mean over images: the mean of two processes is one process on the whole batch, in
    losses and gradients. Faster and Mask R-CNN draw regions at random in every process, and all BatchNorm statistics
    are per process on CPU: what can be compared is compared."""
    whole, parts = one_step(), two_processes["test_rcnn"]
    for name, value in whole.items():
        found = (parts[0][name] + parts[1][name]) / 2 if name.startswith("loss") else parts[0][name]
        torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-4, msg=name)
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in whole if not name.startswith("loss"))
