"""Detectors of the DETR family by name: what a configuration describes (`build_detector`), and what it may not; and
those that stand on Deformable DETR: DAB-Deformable DETR and DN-DAB-Deformable DETR.

Names of their modules are those of the released code (IDEA-Research/DAB-DETR, DN-DETR), so that its files load.
"""
from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common import (MLP, Backbone, ConditionalDecoderLayer, DeformableDETR, DeformableTransformer, Detector, DETR,
                    DETRTransformer, SetCriterion, UserError, inverse_sigmoid, sine_embedding, to_device, world_size,
                    xavier_init)

DETECTORS = Literal["detr", "conditional_detr", "deformable_detr_ss", "deformable_detr", "dab_deformable_detr",
                    "dn_deformable_detr"]
DAB = ("dab_deformable_detr", "dn_deformable_detr")  # queries are anchor boxes with content

# ==== 1. By name ====


def build_detector(cfg: Any, num_logits: int, *, focal: bool, position_offset: float | None = None,
                   num_patterns: int = 0) -> Detector:
    """The detector a configuration describes (fields detector, arch, backbone_norm, lr_backbone, hidden_dim, ...),
    weights still random.

    num_logits: of the class head; focal: see Detector; position_offset: of the sine encoding, None = the detector's own
    (-0.5 in Deformable DETR and those on it, else 0); num_patterns: of DAB-Deformable DETR. What of the backbone
    learns: nothing at lr_backbone 0; layer2-4 under frozen BatchNorm (released); all of it under ordinary BatchNorm.
    """
    trainable = 0 if cfg.lr_backbone <= 0 else 5 if cfg.backbone_norm == "bn" else 3
    deformable = "deformable" in cfg.detector
    levels = 1 if cfg.detector == "deformable_detr_ss" else cfg.num_feature_levels
    stages = (2, 3, 4)[-levels:] if deformable else ({4: 1, 8: 2, 16: 3, 32: 4}[cfg.stride],)
    backbone = Backbone(cfg.arch, stages, cfg.backbone_norm, trainable)
    shared = (cfg.hidden_dim, cfg.nheads, cfg.enc_layers, cfg.dec_layers, cfg.dim_feedforward, cfg.dropout)
    options = {"num_logits": num_logits, "focal": focal, "num_queries": cfg.num_queries}
    if position_offset is not None:
        options["position_offset"] = position_offset
    if cfg.detector in DAB:
        return DABDeformableDETR(backbone, DABTransformer(*shared, levels), num_patterns=num_patterns,
                                 denoising=cfg.detector == "dn_deformable_detr", **options)
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
    if "deformable" in cfg.detector and cfg.hidden_dim < 64:
        raise UserError(f"--hidden_dim {cfg.hidden_dim}: Deformable DETR normalises in 32 groups of at least two "
                        "channels; give 64 or more")
    if "deformable" in cfg.detector and getattr(cfg, "standardized_start", 0):
        raise UserError(f"--standardized_start: of detr and conditional_detr; {cfg.detector} has a norm there")
    side = min(*cfg.scales, cfg.max_size)
    if not norms_see_enough(cfg, cfg.batch_size * views, side):
        raise UserError(f"--batch_size {cfg.batch_size}: one image per process and micro-batch, of which {side} pixels "
                        "may leave BatchNorm one value; give a larger --batch_size, larger --scales and --max_size, or "
                        "--backbone_norm frozen")


def norms_see_enough(cfg: Any, images: int, side: int) -> bool:
    """Does a backbone's learned BatchNorm see two values per channel, in a step on `images` images over all processes,
    of which the longer side has at least `side` pixels?"""
    learns = cfg.backbone_norm == "bn" and cfg.lr_backbone > 0
    stride = 32 if "deformable" in cfg.detector else cfg.stride
    return not learns or images > world_size() * cfg.accumulate or side > stride


def align_start(detector: Detector, to_query: nn.Linear) -> None:
    """Let a random DETR or Conditional DETR compare queries with the image from the first step: features enter queries
    as they enter the encoder, and the decoder's keys start as its queries do. Not part of any paper: without it a model
    of the demos' size still answered the same for any image after 600 steps. Deformable DETR compares no keys and is
    left as it is. to_query: features [.., C] -> query content."""
    if not isinstance(detector, DETR):
        return
    with torch.no_grad():
        to_query.weight.copy_(detector.input_proj.weight[:, :, 0, 0])
        to_query.bias.copy_(detector.input_proj.bias)
        detector.query_embed.weight.mul_(0.1)  # what a query asks for outweighs which query it is
        for layer in detector.transformer.decoder.layers:
            if isinstance(layer, ConditionalDecoderLayer):
                query = layer.ca_qcontent_proj.weight
                keys = [layer.ca_kcontent_proj.weight]
                keys += [layer.ca_qpos_proj.weight] if layer.ca_qpos_proj is not None else []
            else:
                query, *keys = layer.multihead_attn.in_proj_weight.chunk(3)[:2]
            query.mul_(2)  # attention sharp enough to see a difference
            for key in keys:
                key.copy_(query)


@torch.no_grad()
def standardize(layer: nn.Linear | nn.Conv2d, features: Tensor) -> None:
    """Data-dependent start: change the weights of `layer` (a 1 x 1 convolution, if one) so that it does to its input
    what it did to an input of mean 0 and deviation 1 per channel. features [n, C]: a sample of that input.

    What leaves a ReLU has a mean larger than its differences: a random layer maps all of it to nearly one direction,
    and in attention every key matches every query. A channel that hardly varies is not blown up.
    """
    deviation, mean = torch.std_mean(features.float(), 0)
    weight = layer.weight.flatten(1) / deviation.clamp(min=0.1 * deviation.mean())
    layer.bias.sub_(weight @ mean)
    layer.weight.copy_(weight.view_as(layer.weight))


# ==== 2. DAB-Deformable DETR ====


class DABTransformer(DeformableTransformer):
    """Deformable DETR's, but a query is content and an anchor box: [.., D + 4], the box (cx, cy, w, h) in logit space.
    Its position is a function of the box that the layer before has left (DAB-DETR)."""
    logit_eps = 1e-3  # released

    def __init__(self, d_model: int, *shape: Any, **options: Any):
        super().__init__(d_model, *shape, **options)
        del self.reference_points
        self.decoder.ref_point_head = MLP(2 * d_model, d_model, d_model, 2)
        # of the layers after the first: one layer alone has no use for it, and a file of it keeps the name
        self.decoder.query_scale = MLP(d_model, d_model, d_model, 2).requires_grad_(len(self.decoder.layers) > 1)
        for head in (self.decoder.ref_point_head, self.decoder.query_scale):
            xavier_init(head)

    def begin(self, queries: Tensor) -> tuple[Tensor, None, Tensor]:
        content, anchors = queries.split([self.d_model, 4], -1)
        return content, None, anchors.float().sigmoid()

    def position(self, layer: int, content: Tensor, position: None, places: Tensor) -> Tensor:
        box = places[:, :, 0]  # on the first level's map (released)
        sine = torch.cat([sine_embedding(box[..., :2], self.d_model),  # y, x
                          sine_embedding(box[..., 2:].flip(-1), self.d_model)], -1)  # w, h
        position = self.decoder.ref_point_head(sine)
        return position if layer == 0 else position * self.decoder.query_scale(content)


class DABDeformableDETR(DeformableDETR):
    """DAB-Deformable DETR (Liu et al., ICLR 2022, arXiv 2201.12329): anchor boxes as queries, refined layer by layer,
    each with learned content, in each of `num_patterns` patterns if there are any.

    denoising: DN-DAB-Deformable DETR (Li et al., CVPR 2022, arXiv 2203.01305). In training, queries that are targets
    with noise stand before the others and must give the targets back; the last channel of the content says which a
    query is. Then there are dn_logits and dn_boxes in every layer, and `noised`.
    """

    def __init__(self, backbone: Backbone, transformer: DABTransformer, *, num_logits: int, num_queries: int = 300,
                 num_patterns: int = 0, denoising: bool = False, **options: Any):
        super().__init__(backbone, transformer, num_logits=num_logits, num_queries=num_queries, with_box_refine=True,
                         **options)
        del self.query_embed
        d = transformer.d_model
        self.tgt_embed = nn.Embedding(num_queries, d - denoising)
        self.refpoint_embed = nn.Embedding(num_queries, 4)
        self.patterns_embed = nn.Embedding(num_patterns, d) if num_patterns else None
        self.label_enc = nn.Embedding(num_logits + 1, d - 1) if denoising else None  # the last row idle, as released

    def queries(self) -> Tensor:
        """[Q, D + 4], pattern by pattern; the indicator is 0."""
        content, anchors = self.tgt_embed.weight, self.refpoint_embed.weight
        if self.patterns_embed is not None:
            content = (self.patterns_embed.weight[:, None] + content).flatten(0, 1)
            anchors = anchors.repeat(len(self.patterns_embed.weight), 1)
        if self.label_enc is not None:  # has a gradient so, whether or not there are targets (released)
            indicator = (0 * self.label_enc.weight[:1, :1]).expand(len(content), 1)
            content = torch.cat([content, indicator], 1)
        return torch.cat([content, anchors], 1)

    def conditioned_queries(self, features: Tensor, order: Tensor | None = None) -> Tensor:
        """Features are added to the content; of a denoising detector's all but the last channel, the indicator."""
        return super().conditioned_queries(features if self.label_enc is None else features[..., :-1], order)

    def denoising_queries(self, noised: Noised, images: int) -> Tensor:
        """[images, groups * slots, D + 4]. A slot without target has content 0 and the anchor (.5, .5, .5, .5), and is
        seen inside its group (released)."""
        labels = self.label_enc(noised.labels)
        given = torch.cat([labels, torch.ones_like(labels[:, :1]), inverse_sigmoid(noised.boxes, 1e-3)], 1)
        queries = given.new_zeros(images, noised.groups * noised.slots, given.shape[1])
        return queries.index_put((noised.image, noised.slot), given)

    def forward(self, images: Tensor, mask: Tensor, queries: Tensor | None = None, self_mask: Tensor | None = None,
                noised: Noised | None = None) -> dict[str, Any]:
        """noised: the targets with noise, in training of a denoising detector (see denoising_input)."""
        if noised is None:
            return super().forward(images, mask, queries, self_mask)
        given, own = self.denoising_queries(noised, len(images)), self.queries()
        blocked = denoising_mask(noised.groups, noised.slots, len(own), images.device)
        outputs = super().forward(images, mask, torch.cat([given, own.expand(len(given), -1, -1)], 1), blocked)
        for layer in (outputs, *outputs["aux_outputs"]):
            for name in ("logits", "boxes"):
                layer[f"dn_{name}"], layer[f"pred_{name}"] = layer[f"pred_{name}"].tensor_split([given.shape[1]], 1)
            layer["hs"] = layer["hs"][:, given.shape[1]:]
        return outputs | {"noised": noised}


# ==== 3. Denoising ====


class Noise(NamedTuple):
    """Draws for every target of a batch in every group; entry g * N + t is target t, in image order, of group g."""
    label_u: Tensor  # [S * N] uniform in 0..1: the label is exchanged where it is below --dn_label_noise
    new_label: Tensor  # [S * N] int64, for what class
    box_u: Tensor  # [S * N, 4] uniform in 0..1: how far the centre and the sides are moved


class Noised(NamedTuple):
    """The targets of a batch with noise, in the order of Noise, and where their queries stand."""
    labels: Tensor  # [S * N]
    boxes: Tensor  # [S * N, 4] cxcywh in 0..1
    true_labels: Tensor
    true_boxes: Tensor
    image: Tensor  # [S * N]
    slot: Tensor  # [S * N]: among the image's denoising queries
    groups: int  # S
    slots: int  # of a group: the largest number of targets of an image


def draw_noise(groups: int, targets: int, classes: int) -> Noise:
    """By torch's generator on the CPU, which is seeded in every step (run.seed_step)."""
    n = groups * targets
    return Noise(torch.rand(n), torch.randint(classes, (n,)), torch.rand(n, 4))


def add_noise(targets: list[dict], noise: Noise, groups: int, label_noise: float, box_noise: float) -> Noised:
    """DN-DETR, as released: centres move by at most box_noise / 2 of the box, sides by box_noise of it; each
    of cx, cy, w, h is cut to 0..1. A new label may be the old one."""
    counts = [len(t["labels"]) for t in targets]
    labels = torch.cat([t["labels"] for t in targets]).repeat(groups)
    boxes = torch.cat([t["boxes"] for t in targets]).repeat(groups, 1)
    label_u, new_label, box_u = (to_device(draw, boxes.device) for draw in noise)
    reach = torch.cat([boxes[:, 2:] / 2, boxes[:, 2:]], 1)
    image = torch.tensor([b for b, n in enumerate(counts) for _ in range(n)], dtype=torch.int64).repeat(groups)
    slot = torch.tensor([i for n in counts for i in range(n)], dtype=torch.int64)
    slots = max(counts)
    slot = (torch.arange(groups)[:, None] * slots + slot).flatten()
    return Noised(torch.where(label_u < label_noise, new_label, labels),
                  (boxes + (2 * box_u - 1) * reach * box_noise).clamp(0, 1), labels, boxes,
                  to_device(image, boxes.device), to_device(slot, boxes.device), groups, slots)


def denoising_mask(groups: int, slots: int, num_queries: int, device: torch.device) -> Tensor:
    """[P + Q, P + Q], P = groups * slots: True = the query of this row may not look at that of the column. None looks
    at the denoising queries of another group, and those that are matched at none of them: they would see the
    answer."""
    group = torch.arange(groups, device=device).repeat_interleave(slots)
    group = torch.cat([group, group.new_full((num_queries,), -1)])
    return (group[None] >= 0) & (group[None] != group[:, None])


def denoising_input(cfg: Any, model: nn.Module, targets: list[dict]) -> dict[str, Noised]:
    """What a training step gives the model beside the images: {"noised"} of a denoising detector, {} of the others.
    cfg: dn_groups, dn_label_noise, dn_box_noise. A function of torch's seed."""
    encoder = getattr(getattr(model, "module", model), "label_enc", None)
    if encoder is None:
        return {}
    noise = draw_noise(cfg.dn_groups, sum(len(t["labels"]) for t in targets), encoder.num_embeddings - 1)
    return {"noised": add_noise(targets, noise, cfg.dn_groups, cfg.dn_label_noise, cfg.dn_box_noise)}


class DenoisingCriterion(SetCriterion):
    """SetCriterion, and the same three losses of the denoising queries, each with its own target: tgt_loss_* with
    suffix _i in earlier layers, divided by the number of targets times groups."""

    def forward(self, outputs: dict[str, Any], targets: list[dict], num_boxes: float | Tensor,
                class_weight: float | Tensor | None = None) -> tuple[dict[str, Tensor], list]:
        losses, pairs = super().forward(outputs, targets, num_boxes, class_weight)
        if "noised" not in outputs:
            return losses, pairs
        noised = outputs["noised"]
        place, each = (noised.image, noised.slot), torch.arange(len(noised.slot), device=noised.slot.device)
        clean = [{"labels": noised.true_labels, "boxes": noised.true_boxes}]
        for i, layer in enumerate((*outputs["aux_outputs"], outputs)):
            one = {f"pred_{name}": layer[f"dn_{name}"][place][None] for name in ("logits", "boxes")}
            terms = self.losses(one, clean, [(each, each)], noised.groups * num_boxes)
            if not len(each):  # as released
                terms["class_error"] = torch.zeros_like(terms["class_error"])
            suffix = "" if layer is outputs else f"_{i}"
            losses |= {f"tgt_{k}{suffix}": v for k, v in terms.items() if k != "cardinality_error"}
        return losses, pairs
