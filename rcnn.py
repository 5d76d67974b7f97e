"""The R-CNN family: Faster and Mask R-CNN on a pyramid (FPN) or on res4 (C4), RetinaNet, FCOS.

The detectors are put together from torchvision's parts, under torchvision's names; where detectron2 does otherwise
(exact anchors, aligned RoIAlign, L1 losses, one pass through res5, initial weights, optimiser), it is followed.
"""
from __future__ import annotations

import math
import typing
from collections import OrderedDict
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, box_convert, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from common import Backbone, can_fuse

# ==== 1. Parts ====


class PaddingTransform(GeneralizedRCNNTransform):
    """Pads images, which come resized and normalised, to a multiple of size_divisible. Detections stay in these
    pixels."""

    def __init__(self, size_divisible: int):
        super().__init__(min_size=0, max_size=0, image_mean=[], image_std=[], size_divisible=size_divisible)

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        return image, target

    def postprocess(self, result: list[dict], image_shapes: list, original_image_sizes: list) -> list[dict]:
        return result


class Anchors(AnchorGenerator):
    """Anchors [ratios (h / w) * scales, 4] with exact corners, `strides` pixels apart, as detectron2's. torchvision
    rounds corners (46 x 22 for 45.25 x 22.63) and divides the image by the map (61 for 64, where the map is rounded
    up)."""

    def __init__(self, sizes: tuple[tuple[float, ...], ...], ratios: tuple[tuple[float, ...], ...],
                 strides: tuple[int, ...]):
        super().__init__(sizes, ratios)
        self.strides = strides

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(maps[0].dtype, maps[0].device)
        steps = [(stride, stride) for stride in self.strides]
        return [torch.cat(self.grid_anchors([m.shape[-2:] for m in maps], steps))] * len(images.image_sizes)

    def generate_anchors(self, scales, aspect_ratios, dtype: torch.dtype = torch.float32,
                         device: torch.device = torch.device("cpu")) -> Tensor:
        scales = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        h = (root * scales).flatten()
        w = (1 / root * scales).flatten()
        return torch.stack([-w, -h, w, h], 1) / 2

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)  # not the maps' type: bf16 knows pixels to the next 4 only


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign with pixel centres at .5 (aligned=True) and as many samples as a bin has pixels, as detectron2's
    ROIAlignV2.

    levels: {name of a map: its stride}, finest first. A RoI is pooled from level floor(4 + log2(sqrt(area) / 224))
    (FPN, Eq. 1).
    """

    def __init__(self, levels: dict[str, int], output_size: int):
        super().__init__(list(levels), output_size, sampling_ratio=0)
        self.strides = list(levels.values())

    def levels(self, boxes_xyxy: Tensor) -> Tensor:
        """Position of each box's map in featmap_names."""
        area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
        level = (4 + (area.sqrt() / 224 + 1e-8).log2()).floor()
        first, last = (int(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        return level.clamp(first, last).long() - first

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """x: maps [B, C, H, W]; boxes: per image [n, 4] xyxy px -> [sum of n, C, S, S]."""
        joined = torch.cat(boxes)
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat([image, joined], 1)  # [sum of n, (image, x1, y1, x2, y2)]
        level = self.levels(joined)
        first = x[self.featmap_names[0]]
        pooled = first.new_zeros(len(rois), first.shape[1], *self.output_size)
        for i, (name, stride) in enumerate(zip(self.featmap_names, self.strides)):
            here = torch.nonzero(level == i)[:, 0]
            pooled[here] = roi_align(x[name], rois[here], self.output_size, 1 / stride, sampling_ratio=0,
                                     aligned=True).to(pooled)
        return pooled


class RPN(RegionProposalNetwork):
    """torchvision's, with the L1 loss on boxes (detectron2: smooth L1 with beta 0; torchvision: 1/9)."""

    def compute_loss(self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor],
                     regression_targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(chosen).bool() for chosen in self.fg_bg_sampler(labels))
        sampled = positive | negative
        wanted = torch.cat(regression_targets)[positive]
        box_loss = F.l1_loss(pred_bbox_deltas[positive], wanted, reduction="sum") / sampled.sum()
        score_loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled])
        return score_loss, box_loss


class RCNNHeads(RoIHeads):
    """torchvision's, with the L1 box loss, and for C4 with one pass through res5 in training, whose positive rows the
    mask branch takes (detectron2's Res5ROIHeads). There `box_head` is res5, pooling, flattening, and the mask branch
    has no pooler and head of its own."""

    def has_mask(self) -> bool:
        return self.mask_predictor is not None

    @staticmethod
    def box_losses(class_logits: Tensor, box_regression: Tensor, labels: Tensor,
                   regression_targets: Tensor) -> dict[str, Tensor]:
        """class_logits [n, C + 1], box_regression [n, 4 (C + 1)], labels [n] with 0 = background, targets [n, 4]; L1
        over all n RoIs."""
        positive = torch.nonzero(labels > 0)[:, 0]
        predicted = box_regression.unflatten(1, (-1, 4))[positive, labels[positive]]
        box_loss = F.l1_loss(predicted, regression_targets[positive], reduction="sum") / labels.numel()
        return {"loss_classifier": F.cross_entropy(class_logits, labels), "loss_box_reg": box_loss}

    def region_features(self, features: dict[str, Tensor], boxes: list[Tensor],
                        sizes: list) -> tuple[Tensor, Tensor | None]:
        """What the box predictor sees [n, D], and for C4 the maps [n, 2048, 7, 7] before pooling, which the mask
        predictor sees."""
        pooled = self.box_roi_pool(features, boxes, sizes)
        if not hasattr(self.box_head, "res5"):
            return self.box_head(pooled), None
        maps = self.box_head.res5(pooled)
        return self.box_head[1:](maps), maps

    def mask_logits(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list) -> Tensor:
        if self.mask_roi_pool is None:
            return self.mask_predictor(self.box_head.res5(self.box_roi_pool(features, boxes, sizes)))
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, sizes)))

    def losses(self, features: dict[str, Tensor], proposals: list[Tensor], sizes: list,
               targets: list[dict]) -> dict[str, Tensor]:
        proposals, matched, labels, regression_targets = self.select_training_samples(proposals, targets)
        pooled, maps = self.region_features(features, proposals, sizes)
        losses = self.box_losses(*self.box_predictor(pooled), torch.cat(labels), torch.cat(regression_targets))
        if self.has_mask():
            positive = [torch.nonzero(l > 0)[:, 0] for l in labels]
            boxes = [p[i] for p, i in zip(proposals, positive)]
            logits = (self.mask_logits(features, boxes, sizes) if maps is None
                      else self.mask_predictor(maps[torch.cat(labels) > 0]))
            matched = [m[i] for m, i in zip(matched, positive)]
            losses["loss_mask"] = maskrcnn_loss(logits, boxes, [t["masks"] for t in targets],
                                                [t["labels"] for t in targets], matched)
        return losses

    def detections(self, features: dict[str, Tensor], proposals: list[Tensor], sizes: list) -> list[dict]:
        """Per image {"boxes" [n, 4], "scores" [n], "labels" [n]} and, with masks, "masks" [n, 1, S, S] in the boxes."""
        predictions = self.box_predictor(self.region_features(features, proposals, sizes)[0])
        parts = self.postprocess_detections(*predictions, proposals, sizes)
        result = [dict(zip(("boxes", "scores", "labels"), parts_of_image)) for parts_of_image in zip(*parts)]
        if self.has_mask():
            logits = self.mask_logits(features, [r["boxes"] for r in result], sizes)
            labels = torch.cat([r["labels"] for r in result])
            # of each detection its own class alone: all 1204 of LVIS are a gigabyte
            masks = logits[torch.arange(len(labels), device=labels.device), labels][:, None].sigmoid()
            for r, some in zip(result, masks.split([len(r["labels"]) for r in result])):
                r["masks"] = some
        return result

    def forward(self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list,
                targets: list[dict] | None = None) -> tuple[list[dict], dict[str, Tensor]]:
        if self.training:
            return [], self.losses(features, proposals, image_shapes, targets)
        return self.detections(features, proposals, image_shapes), {}


class C4Backbone(nn.Module):
    """A ResNet up to layer3 under the name `body`; one map of stride 16."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.body = backbone.body[:-1]
        self.out_channels = backbone.num_channels[2]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"0": self.body(images)}


# ==== 2. Detectors ====

RCNN_DETECTORS = Literal["mask_rcnn_fpn", "faster_rcnn_fpn", "mask_rcnn_c4", "faster_rcnn_c4",
                         "retinanet_fpn", "fcos_fpn"]
ONE_STAGE = ("retinanet_fpn", "fcos_fpn")
RATIOS = (0.5, 1.0, 2.0)  # of anchors, h / w


def is_rcnn(detector: str) -> bool:
    return detector in typing.get_args(RCNN_DETECTORS)


def build_rcnn(cfg: Any, classes: int) -> nn.Module:
    """A detector of RCNN_DETECTORS, with torchvision's names, weights still random.

    Read from cfg: detector, arch, backbone_norm, box_head, fpn_channels, head_dim, anchor_size, rois_per_image,
    proposals_per_image, score_threshold, detections_per_image. Faster and Mask R-CNN have one more class row, the
    first, for background. All of the ResNet learns. In training forward(images, targets) gives the losses, else
    detections.
    """
    backbone = Backbone(cfg.arch, (1, 2, 3, 4), cfg.backbone_norm, trainable=5)
    sizes = [cfg.anchor_size * 2 ** i for i in range(5)]
    if cfg.detector in ONE_STAGE:
        return one_stage(cfg, backbone, classes, sizes)
    build = c4_rcnn if cfg.detector.endswith("_c4") else fpn_rcnn
    return build(cfg, backbone, classes + 1, sizes)


def one_stage(cfg: Any, backbone: Backbone, classes: int, sizes: list[int]) -> nn.Module:
    """RetinaNet, or FCOS, on P3 to P7. P6 and P7 are made of C5 for RetinaNet, of P5 for FCOS."""
    retinanet = cfg.detector == "retinanet_fpn"
    top = LastLevelP6P7(backbone.num_channels[-1] if retinanet else cfg.fpn_channels, cfg.fpn_channels)
    pyramid = BackboneWithFPN(backbone.body, {"layer2": "0", "layer3": "1", "layer4": "2"}, backbone.num_channels[1:],
                              cfg.fpn_channels, top, nn.BatchNorm2d)
    limits = {"score_thresh": cfg.score_threshold, "detections_per_img": cfg.detections_per_image}
    strides = (8, 16, 32, 64, 128)
    if retinanet:
        top.use_P5 = False  # torchvision guesses it from the widths
        anchors = Anchors(tuple((s, s * 2 ** (1 / 3), s * 2 ** (2 / 3)) for s in sizes), (RATIOS,) * 5, strides)
        model = RetinaNet(pyramid, classes, anchor_generator=anchors, **limits)
    else:
        anchors = Anchors(tuple((s,) for s in strides), ((1.0,),) * 5, strides)
        model = FCOS(pyramid, classes, anchor_generator=anchors, **limits)
    model.transform = PaddingTransform(32)
    model.head.register_forward_hook(float_output)
    return model


def fpn_rcnn(cfg: Any, backbone: Backbone, rows: int, sizes: list[int]) -> GeneralizedRCNN:
    """Faster or Mask R-CNN on P2 to P6."""
    width = cfg.fpn_channels
    strides = {"0": 4, "1": 8, "2": 16, "3": 32}
    pyramid = BackboneWithFPN(backbone.body, {f"layer{i + 1}": str(i) for i in range(4)}, backbone.num_channels, width,
                              LastLevelMaxPool(), nn.BatchNorm2d)
    norm = nn.BatchNorm2d if cfg.box_head == "4conv1fc" else None
    box_head = (FastRCNNConvFCHead((width, 7, 7), [width] * 4, [cfg.head_dim], norm) if norm
                else TwoMLPHead(width * 49, cfg.head_dim))
    mask_parts = {}
    if cfg.detector == "mask_rcnn_fpn":
        mask_parts = {"mask_roi_pool": AlignedRoIAlign(strides, 14),
                      "mask_head": MaskRCNNHeads(width, [width] * 4, 1, norm),
                      "mask_predictor": MaskRCNNPredictor(width, width, rows)}
    anchors = Anchors(tuple((s,) for s in sizes), (RATIOS,) * 5, (*strides.values(), 64))
    return two_stage(cfg, pyramid, anchors, AlignedRoIAlign(strides, 7),
                     box_head, cfg.head_dim, rows, mask_parts, size_divisible=32,
                     before_nms={"training": 2000, "testing": 1000},
                     after_nms={"training": cfg.proposals_per_image, "testing": cfg.proposals_per_image})


def c4_rcnn(cfg: Any, backbone: Backbone, rows: int, sizes: list[int]) -> GeneralizedRCNN:
    """Faster or Mask R-CNN on res4, with res5 and MoCo's extra norm as its box head."""
    width = backbone.num_channels[-1]
    res5 = nn.Sequential(OrderedDict(layer4=backbone.body.layer4, norm=nn.BatchNorm2d(width)))
    box_head = nn.Sequential(OrderedDict(res5=res5, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))
    mask_parts = {}
    if cfg.detector == "mask_rcnn_c4":
        mask_parts = {"mask_predictor": MaskRCNNPredictor(width, cfg.fpn_channels, rows)}
    anchors = Anchors((tuple(sizes),), (RATIOS,), (16,))
    return two_stage(cfg, C4Backbone(backbone), anchors, AlignedRoIAlign({"0": 16}, 14),
                     box_head, width, rows, mask_parts, size_divisible=1,
                     before_nms={"training": 12000, "testing": 6000},
                     after_nms={"training": 2 * cfg.proposals_per_image, "testing": cfg.proposals_per_image})


def two_stage(cfg: Any, backbone: nn.Module, anchors: Anchors, pool: AlignedRoIAlign, box_head: nn.Module,
              features: int, rows: int, mask_parts: dict[str, nn.Module], *, size_divisible: int,
              before_nms: dict[str, int], after_nms: dict[str, int]) -> GeneralizedRCNN:
    """Proposals and heads, alike for FPN and C4.

    features: outputs of box_head; rows: of the class head; before_nms, after_nms: how many proposals are kept.
    """
    rpn = RPN(anchors, RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0]), fg_iou_thresh=0.7,
              bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5, pre_nms_top_n=before_nms,
              post_nms_top_n=after_nms, nms_thresh=0.7)
    heads = RCNNHeads(pool, box_head, FastRCNNPredictor(features, rows), fg_iou_thresh=0.5, bg_iou_thresh=0.5,
                      batch_size_per_image=cfg.rois_per_image, positive_fraction=0.25, bbox_reg_weights=None,
                      score_thresh=cfg.score_threshold, nms_thresh=0.5,
                      detections_per_img=cfg.detections_per_image, **mask_parts)
    init_heads(heads)
    for module in (rpn.head, heads.box_predictor):
        module.register_forward_hook(float_output)
    return GeneralizedRCNN(backbone, rpn, heads, PaddingTransform(size_divisible))


def float_output(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook: what a head predicts is fp32 under autocast too; torchvision decodes boxes in the type of the
    prediction."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {k: v.float() for k, v in output.items()}
    return [float_output(module, inputs, part) for part in output]


def whole_resnet(model: nn.Module) -> nn.Module:
    """The ResNet of a detector of build_rcnn: children conv1, bn1, layer1..layer4 (C4 keeps the last in its head)."""
    stages = dict(model.backbone.body.named_children())
    return nn.ModuleDict(stages if "layer4" in stages else stages | {"layer4": model.roi_heads.box_head.res5.layer4})


# ==== 3. Initial weights ====


def init_heads(heads: RCNNHeads) -> None:
    """As detectron2: class scores N(0, .01), boxes and masks N(0, .001), fully connected layers uniform by their
    inputs, no bias anywhere."""
    predictors = [(heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)]
    if heads.has_mask():
        nn.init.zeros_(heads.mask_predictor.conv5_mask.bias)
        predictors.append((heads.mask_predictor.mask_fcn_logits, 0.001))
    for layer in heads.box_head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    for layer, std in predictors:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


# ==== 4. Optimisation ====


def build_sgd(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """SGD as detectron2 trains the R-CNN family: no weight decay on the scale and shift of norms; all else decays,
    biases too."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    owner = {f"{name}.{key}": module for name, module in model.named_modules()
             for key, _ in module.named_parameters(recurse=False)}
    groups = [{"weight_decay": cfg.weight_decay, "base_lr": cfg.lr, "names": [], "params": []},
              {"weight_decay": 0.0, "base_lr": cfg.lr, "names": [], "params": []}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[isinstance(owner[name], norms)]
            group["names"].append(name)
            group["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, cfg.lr, momentum=cfg.sgd_momentum, fused=can_fuse(model))


def warmup_step_schedule(step: int, total_steps: int, warmup: int, drops: tuple[float, ...]) -> float:
    """Learning rate factor of detectron2: linear from 1/1000 over `warmup` steps, x 0.1 at each of `drops` (shares of
    total_steps)."""
    start = min(1.0, 1e-3 + (1 - 1e-3) * step / warmup) if warmup else 1.0
    return start * 0.1 ** sum(step >= round(drop * total_steps) for drop in drops)


# ==== 5. Between our boxes and torchvision's ====


def first_label(detector: str) -> int:
    """torchvision's label of our category 0; of Faster and Mask R-CNN label 0 is background."""
    return 0 if detector in ONE_STAGE else 1


def input_images(batch: dict[str, Any], device: torch.device) -> list[Tensor]:
    """The images of data.collate, [3, h, w], without their padding."""
    covered = ~batch["mask"]
    heights = covered.any(2).sum(1).tolist()
    widths = covered.any(1).sum(1).tolist()
    images = batch["images"].to(device, non_blocking=True)
    return [image[:, :h, :w] for image, h, w in zip(images, heights, widths)]


def to_rcnn(targets: list[dict], images: list[Tensor], detector: str) -> list[dict]:
    """Our targets (boxes cxcywh in 0..1, labels from 0, masks) -> torchvision's, for images [3, h, w]; boxes without
    extent are left out."""
    converted = []
    for target, image in zip(targets, images):
        h, w = image.shape[-2:]
        boxes = box_convert(target["boxes"], "cxcywh", "xyxy") * target["boxes"].new_tensor([w, h, w, h])
        fields = {"boxes": boxes, "labels": target["labels"] + first_label(detector)}
        if "masks" in target:
            fields["masks"] = target["masks"]
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        converted.append({k: v[keep].to(image.device, non_blocking=True) for k, v in fields.items()})
    return converted


def from_rcnn(detections: list[dict], images: list[Tensor], targets: list[dict], detector: str,
              rows: list[int]) -> list[dict]:
    """torchvision's detections on images [3, h, w] -> COCO results in pixels of the originals, of sizes and ids in
    `targets`.

    rows: category id of every class row, None = none. Masks become RLE of the original size.
    """
    found = []
    for detection, image, target in zip(detections, images, targets):
        h, w = image.shape[-2:]
        height, width = target["orig_size"].tolist()
        boxes = detection["boxes"].cpu() * torch.tensor([width / w, height / h] * 2)
        categories = [rows[label] for label in (detection["labels"] - first_label(detector)).tolist()]
        scores = detection["scores"].tolist()
        results = [{"image_id": target["image_id"], "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score} for category, (x1, y1, x2, y2), score in zip(categories, boxes.tolist(), scores)]
        if "masks" in detection:
            for result, mask in zip(results, paste_masks(detection["masks"].cpu(), boxes, (height, width))):
                rle = coco_mask.encode(np.asfortranarray(mask.numpy(), np.uint8))
                result["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        found += [result for result in results if result["category_id"] is not None]
    return found


def paste_masks(masks: Tensor, boxes_xyxy: Tensor, hw: tuple[int, int]) -> Tensor:
    """Probabilities [n, 1, S, S] in boxes [n, 4] px -> bool [n, h, w]: 1/2 or more at a pixel's centre (torchvision
    draws one row too many)."""
    pasted = torch.zeros(len(masks), *hw, dtype=torch.bool)
    for out, mask, (x1, y1, x2, y2) in zip(pasted, masks, boxes_xyxy.tolist()):
        left, right = max(int(x1) - 1, 0), min(math.ceil(x2) + 1, hw[1])
        top, bottom = max(int(y1) - 1, 0), min(math.ceil(y2) + 1, hw[0])
        x = (torch.arange(left, right) + 0.5 - x1) / max(x2 - x1, 1e-6) * 2 - 1
        y = (torch.arange(top, bottom) + 0.5 - y1) / max(y2 - y1, 1e-6) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # [rows, columns, (x, y)]
        out[top:bottom, left:right] = F.grid_sample(mask[None].float(), grid[None], align_corners=False)[0, 0] >= 0.5
    return pasted
