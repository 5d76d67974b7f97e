"""Checkpoints in and out: files of other code bases recognised by their content, read safely, named as here; ours
written for other tools.

In: every --init_from and --backbone_weights reads its file, a run's folder or a folder of Hugging Face transformers
(hf:FOLDER) through open_checkpoint(). `python convert.py FILE` says what a file is.
Out: python convert.py FILE --to official|hf|torchvision|detectron2|mmdetection --out PATH

Names: ours are those of the released DETR, Conditional DETR, Deformable DETR, DETReg, UP-DETR and SoCo, and for the
R-CNN family torchvision's. The tables below hold all others, one per family, as rows (their name, our name): {i} stands
for a number, * for the rest, and the first row that fits counts. The same table renames in both directions.
"""
from __future__ import annotations

from common import UserError, barrier  # before torch: see there

import argparse
import functools
import io
import json
import os
import pickle
import re
import sys
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, get_weight

import evaluation
import rcnn
import run
from data import IMAGENET_MEAN, IMAGENET_STD

# ==== 1. Tables ====

Table = tuple[tuple[str, str], ...]


def below(theirs: str, ours: str, table: Table) -> Table:
    """The table with a prefix on either side."""
    return tuple((theirs + a, ours + b) for a, b in table)


@functools.cache
def _pattern(template: str) -> re.Pattern:
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(template)).replace(r"\*", "(?P<rest>.*)"))


def rename(name: str, table: Table, back: bool = False) -> str | None:
    """Our name of one of theirs, or (back) theirs of one of ours; None when no row fits."""
    for row in table:
        source, target = row[::-1] if back else row
        if match := _pattern(source).fullmatch(name):
            return target.replace("*", "{rest}").format(**match.groupdict())
    return None


def renamed_back(state: dict[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Our tensors under their names; those that the table does not know are left out."""
    return {theirs: value for name, value in state.items() if (theirs := rename(name, table, back=True)) is not None}


# detectron2 - torchvision: a ResNet.
RESNET_DETECTRON2: Table = (
    ("stem.conv1.norm.*", "bn1.*"), ("stem.conv1.*", "conv1.*"),
    *((f"res{i + 1}.{{b}}.{theirs}", f"layer{i}.{{b}}.{ours}") for i in (1, 2, 3, 4) for theirs, ours in (
        ("shortcut.norm.*", "downsample.1.*"), ("shortcut.*", "downsample.0.*"),
        ("conv{j}.norm.*", "bn{j}.*"), ("conv{j}.*", "conv{j}.*"))),
)


def _fpn_detectron2(first: int) -> Table:
    """detectron2 - torchvision: ResNet and pyramid, whose lowest level detectron2 calls by its stride, 2 ** first."""
    pyramid = ((f"fpn_{theirs}{i + first}.{norm}*", f"fpn.{ours}_blocks.{i}.{k}.*") for i in range(6 - first)
               for theirs, ours in (("lateral", "inner"), ("output", "layer")) for norm, k in (("norm.", 1), ("", 0)))
    return (*below("backbone.bottom_up.", "backbone.body.", RESNET_DETECTRON2),
            *below("backbone.", "backbone.", (*pyramid, ("top_block.*", "fpn.extra_blocks.*"))))


_TWO_STAGE_DETECTRON2: Table = (
    ("proposal_generator.rpn_head.conv.*", "rpn.head.conv.0.0.*"),
    ("proposal_generator.rpn_head.objectness_logits.*", "rpn.head.cls_logits.*"),
    ("proposal_generator.rpn_head.anchor_deltas.*", "rpn.head.bbox_pred.*"),
    *((f"roi_heads.{theirs}{j}.{norm}*", f"roi_heads.{ours}.{j - 1}.{k}.*")
      for theirs, ours in (("box_head.conv", "box_head"), ("mask_head.mask_fcn", "mask_head"))
      for j in (1, 2, 3, 4) for norm, k in (("norm.", 1), ("", 0))),
    ("roi_heads.box_head.fc1.*", "roi_heads.box_head.5.*"),  # 4conv1fc
    ("roi_heads.box_predictor.*", "roi_heads.box_predictor.*"),
    ("roi_heads.mask_head.deconv.*", "roi_heads.mask_predictor.conv5_mask.*"),
    ("roi_heads.mask_head.predictor.*", "roi_heads.mask_predictor.mask_fcn_logits.*"),
)
# detectron2 - torchvision: whole detectors. FCOS has other heads in detectron2: backbone and pyramid only.
RCNN_DETECTRON2: dict[str, Table] = {
    "fpn": (*_fpn_detectron2(2), *_TWO_STAGE_DETECTRON2),
    "fpn_2fc": (("roi_heads.box_head.fc1.*", "roi_heads.box_head.fc6.*"),
                ("roi_heads.box_head.fc2.*", "roi_heads.box_head.fc7.*"), *_fpn_detectron2(2), *_TWO_STAGE_DETECTRON2),
    "c4": (*below("roi_heads.", "roi_heads.box_head.res5.", RESNET_DETECTRON2[-4:]),  # the rows of res5
           ("roi_heads.res5.norm.*", "roi_heads.box_head.res5.norm.*"),
           *below("backbone.", "backbone.body.", RESNET_DETECTRON2), *_TWO_STAGE_DETECTRON2),
    "one_stage": (*_fpn_detectron2(3),
                  *((f"head.{theirs}_subnet.{2 * j}.*", f"head.{ours}_head.conv.{j}.0.*")
                    for theirs, ours in (("cls", "classification"), ("bbox", "regression")) for j in range(4)),
                  ("head.cls_score.*", "head.classification_head.cls_logits.*"),
                  ("head.bbox_pred.*", "head.regression_head.bbox_reg.*")),
}

# SoCo: what its converters write for detectron2 (whose loader completes the names: backbone.bottom_up., backbone.,
# roi_heads.) and MMDetection.
SOCO_DETECTRON2: Table = (
    *below("", "encoder.", RESNET_DETECTRON2),
    *((f"fpn_{a}{i + 2}.{theirs}*", f"neck.{b}_convs.{i}.{ours}.*") for i in range(4)
      for a, b in (("lateral", "lateral"), ("output", "fpn")) for theirs, ours in (("norm.", "bn"), ("", "conv"))),
    ("box_head.conv{j}.norm.*", "head.bn{j}.*"), ("box_head.*", "head.*"),
)
SOCO_MMDETECTION: Table = (
    ("backbone.*", "encoder.*"), ("neck.*", "neck.*"), ("roi_head.bbox_head.shared_fcs.0.*", "head.fc1.*"),
    *((f"roi_head.bbox_head.shared_convs.{j - 1}.{kind}.*", f"head.{kind}{j}.*")
      for j in (1, 2, 3, 4) for kind in ("conv", "bn")),
)
# SoCo - torchvision: the pyramid by the lowest level of the detector, which is SoCo's level 0 (C2) or, of RetinaNet and
# FCOS, its level 1, and the box head, which these do not have.
SOCO_RCNN: dict[int, Table] = {first: tuple(
    (f"neck.{theirs}_convs.{i + first}.{kind}.*", f"backbone.fpn.{ours}_blocks.{i}.{k}.*") for i in range(4 - first)
    for theirs, ours in (("lateral", "inner"), ("fpn", "layer")) for k, kind in enumerate(("conv", "bn")))
    for first in (0, 1)}
SOCO_RCNN[0] += (*((f"head.{kind}{j}.*", f"roi_heads.box_head.{j - 1}.{k}.*") for j in (1, 2, 3, 4)
                   for k, kind in enumerate(("conv", "bn"))), ("head.fc1.*", "roi_heads.box_head.5.*"))

# MoCo - dupr.py with --alpha 0 0 0 1 --beta 0 0 0 0, which is MoCo v2; MoCo v1 has a head of one layer.
MOCO: dict[str, Table] = {version: (
    *((f"encoder_{k}.fc.{theirs}*", f"encoder_{k}.image_heads.conv5.{ours}.*")
      for k in "qk" for theirs, ours in layers),
    ("queue", "queues.image_conv5.keys"), ("queue_ptr", "queues.image_conv5.ptr"), ("encoder_*", "encoder_*"),
) for version, layers in (("v1", (("", 0),)), ("v2", (("0.", 0), ("2.", 2))))}

# Siamese DETR as mmcv saves it - the DETR family.
SIAMESE_DETR: Table = (
    ("pred_head.bbox_embed.*", "bbox_embed.*"), ("pred_head.class_embed.*", "class_embed.*"),
    ("pred_head.feature_align.*", "feature_align.*"), ("backbone.*", "backbone.0.body.*"), ("*", "*"),
)


def _hugging_face(decoder: Table, rest: Table) -> Table:
    """decoder: rows of a decoder layer; rest: heads and input projection."""
    return (
        ("model.backbone.conv_encoder.model.*", "backbone.0.body.*"),
        ("model.query_position_embeddings.*", "query_embed.*"),
        *below("model.encoder.layers.{i}.", "transformer.encoder.layers.{i}.",
               (("self_attn_layer_norm.*", "norm1.*"), ("final_layer_norm.*", "norm2.*"), ("fc{j}.*", "linear{j}.*"),
                ("*", "*"))),
        *below("model.decoder.layers.{i}.", "transformer.decoder.layers.{i}.",
               (*decoder, ("final_layer_norm.*", "norm3.*"), ("fc{j}.*", "linear{j}.*"), ("*", "*"))),
        ("model.encoder.layernorm.*", "transformer.encoder.norm.*"),
        ("model.decoder.layernorm.*", "transformer.decoder.norm.*"),
        *rest, ("model.*", "transformer.*"),
    )


_DETR_NORMS: Table = (("self_attn_layer_norm.*", "norm1.*"), ("encoder_attn_layer_norm.*", "norm2.*"))
_DETR_HEADS: Table = (("class_labels_classifier.*", "class_embed.*"), ("bbox_predictor.*", "bbox_embed.*"),
                      ("model.input_projection.*", "input_proj.*"))
# Hugging Face transformers (as files have it; version 5 renames on reading and writing) - the DETR family, in_proj
# already split into q, k, v.
HUGGING_FACE: dict[str, Table] = {
    "detr": _hugging_face((("encoder_attn.*", "multihead_attn.*"), *_DETR_NORMS), _DETR_HEADS),
    "conditional_detr": _hugging_face((("encoder_attn.out_proj.*", "cross_attn.out_proj.*"), *_DETR_NORMS),
                                      _DETR_HEADS),
    # norm1 follows the attention into the image, norm2 that among queries
    "deformable_detr": _hugging_face(
        (("encoder_attn.*", "cross_attn.*"), ("encoder_attn_layer_norm.*", "norm1.*"),
         ("self_attn_layer_norm.*", "norm2.*")),
        (("class_embed.*", "class_embed.*"), ("bbox_embed.*", "bbox_embed.*"), ("model.input_proj.*", "input_proj.*"))),
}

# What a model of transformers 5 calls otherwise in memory than in its files (save_original_format=False: there too).
_IN_MEMORY = ((r"model\.backbone\.model\.", "model.backbone.conv_encoder.model."), (r"\.o_proj\.", ".out_proj."),
              (r"\.mlp\.fc", ".fc"))
_DECODER_LAYER = r"(decoder\.layers\.\d+)"
HUGGING_FACE_5 = {"detr": _IN_MEMORY, "deformable_detr": _IN_MEMORY, "conditional_detr": (*_IN_MEMORY, *(
    row for theirs, ours in (("self_attn", "sa"), ("encoder_attn", "ca")) for row in (
        (rf"{_DECODER_LAYER}\.{theirs}\.([qk])_(content|pos|pos_sine)_proj\.", rf"\1.{ours}_\2\3_proj."),
        (rf"{_DECODER_LAYER}\.{theirs}\.v_proj\.", rf"\1.{ours}_v_proj."))))}
# transformers' own ResNet - torchvision's.
RESNET_HUGGING_FACE: Table = (
    ("embedder.embedder.convolution.*", "conv1.*"), ("embedder.embedder.normalization.*", "bn1.*"),
    *((f"encoder.stages.{i}.layers.{{b}}.{theirs}", f"layer{i + 1}.{{b}}.{ours}") for i in range(4)
      for theirs, ours in (("shortcut.convolution.*", "downsample.0.*"), ("shortcut.normalization.*", "downsample.1.*"),
                           *((f"layer.{j}.{kind}.*", f"{name}{j + 1}.*") for j in range(3)
                             for kind, name in (("convolution", "conv"), ("normalization", "bn"))))),
)

# Rows of a released class head: COCO's are its category ids, VOC's the sorted names and an idle one.
COCO_NAMES = {i: name for i, name in enumerate(get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"])
              if name not in ("__background__", "N/A")}
VOC_NAMES = dict(enumerate(get_weight("FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1").meta["categories"][1:]))

# ==== 2. Reading ====


def has(state: dict[str, Tensor], marks: str) -> bool:
    """Whether all of the tensors in `marks` are there, and none of those with a minus; name* stands for any that
    starts so."""
    def there(mark: str) -> bool:
        return any(k.startswith(mark[:-1]) for k in state) if mark.endswith("*") else mark in state

    return all(there(mark.removeprefix("-")) != mark.startswith("-") for mark in marks.split())


_QUERY = "encoder_q.conv1.weight -predictor* -queue2 -queues*"
# PixPro, whose code SoCo's is made of, has more: a value_transform, with its instance branch a second projector
_SOCO_PARTS = ("encoder.conv1.weight projector.linear1.weight projector_k.linear1.weight predictor.linear1.weight "
               "-value_transform* -projector_instance*")
_BOTTOM_UP = "backbone.bottom_up.stem.conv1.weight"
# What a file is: its family, the tensors that tell it and, with a minus, those that it cannot have, the table to our
# names (None: ours). The first that fits counts. A file of none of them is a backbone if one ResNet is in it
# (resnet_prefix): a family is more than its encoder, whose names many methods share.
KNOWN: tuple[tuple[str, str, Table | None], ...] = (
    ("MoCo v1", f"{_QUERY} encoder_q.fc.weight", MOCO["v1"]),
    ("MoCo v2", f"{_QUERY} encoder_q.fc.0.weight -encoder_q.fc.1.weight -encoder_q.fc.3.weight", MOCO["v2"]),
    ("DUPR", "encoder_q.conv1.weight encoder_k.conv1.weight queues*", None),
    ("SoCo", f"{_SOCO_PARTS} -encoder.fc* neck.lateral_convs.0.conv.weight head.fc1.weight", None),
    ("SoCo", f"{_SOCO_PARTS} -encoder.fc* -neck* -head*", None),
    ("Siamese DETR", "pred_head.bbox_embed.layers.0.weight transformer.encoder*", SIAMESE_DETR),
    ("detector", "backbone.0.body.conv1.weight", None),
    ("detector", "detr.backbone.0.body.conv1.weight", (("detr.*", "*"),)),  # with a mask head around it
    ("SoCo for MMDetection", "backbone.conv1.weight neck.lateral_convs.0.bn.weight "
     "roi_head.bbox_head.shared_convs.3.bn.weight roi_head.bbox_head.shared_fcs.0.weight "
     "-roi_head.bbox_head.shared_fcs.1.weight -roi_head.bbox_head.fc_cls.weight -rpn_head*", SOCO_MMDETECTION),
    ("SoCo for detectron2", "stem.conv1.weight fpn_lateral2.norm.weight box_head.conv4.norm.weight box_head.fc1.weight "
     "-box_head.fc2.weight -box_predictor*", SOCO_DETECTRON2),
    ("detectron2", "stem.conv1.weight", SOCO_DETECTRON2),
    ("detectron2 RetinaNet", f"{_BOTTOM_UP} head.cls_subnet.0.weight head.cls_score.weight -roi_heads*",
     RCNN_DETECTRON2["one_stage"]),
    ("detectron2 R-CNN (FPN, 2fc)", f"{_BOTTOM_UP} roi_heads.box_head.fc2.weight", RCNN_DETECTRON2["fpn_2fc"]),
    ("detectron2 R-CNN (FPN)", f"{_BOTTOM_UP} roi_heads.box_predictor.cls_score.weight", RCNN_DETECTRON2["fpn"]),
    ("detectron2 R-CNN (C4)", "backbone.stem.conv1.weight roi_heads.box_predictor.cls_score.weight",
     RCNN_DETECTRON2["c4"]),
    ("detectron2", _BOTTOM_UP, _fpn_detectron2(2)),
    ("detectron2", "backbone.stem.conv1.weight", below("backbone.", "backbone.body.", RESNET_DETECTRON2)),
    ("torchvision detector", "backbone.body.conv1.weight", None),
    ("MMDetection", "backbone.conv1.weight neck*", (("backbone.*", "*"),)),
    ("SwAV", "conv1.weight projection_head.0.weight -fc.weight", None),
    ("torchvision", "conv1.weight", None),
)
# Copies that a method makes of the network that it trains: of two ResNets in a file the other one counts.
COPIES = re.compile(r"_k\.|(^|[._])(key|target|teacher|momentum|ema|old|frozen)([._]|$)")
# Whose pretraining of the DETR family a foreign file is: script, the tensors that tell it. The first that fits counts.
PRETRAININGS = (
    ("siamese_detr", "enc_head.0.projector.mlp.0.weight"),
    # as its released converter leaves it: of the added modules patch2query alone
    ("siamese_detr", "patch2query.weight -feature_align.layers.0.weight transformer.level_embed"),
    ("siamese_detr", "patch2query.weight -feature_align.layers.0.weight -class_embed.weight"),
    ("updetr", "patch2query.weight"),
    ("detreg", "feature_embed.layers.0.weight"),
)
METHODS = {"detreg": "DETReg", "updetr": "UP-DETR", "siamese_detr": "Siamese DETR", "soco": "SoCo", "dupr": "DUPR"}
NAMES = {"detr": "DETR", "conditional_detr": "Conditional DETR", "deformable_detr_ss": "single-scale Deformable DETR",
         "deformable_detr": "Deformable DETR", "dab_deformable_detr": "DAB-Deformable DETR",
         "dn_deformable_detr": "DN-DAB-Deformable DETR", "mask_rcnn_fpn": "Mask R-CNN (FPN)",
         "faster_rcnn_fpn": "Faster R-CNN (FPN)", "mask_rcnn_c4": "Mask R-CNN (C4)",
         "faster_rcnn_c4": "Faster R-CNN (C4)", "retinanet_fpn": "RetinaNet", "fcos_fpn": "FCOS"}
RESNET_BLOCKS = {"resnet18": (False, (2, 2, 2)), "resnet34": (False, (3, 4, 6)), "resnet50": (True, (3, 4, 6)),
                 "resnet101": (True, (3, 4, 23))}  # bottlenecks?, blocks of layer1..layer3
RESNET_PREFIXES = ("backbone.0.body.", "encoder_q.", "encoder.", "backbone.body.", "")  # where our names keep a ResNet
RES5 = "roi_heads.box_head.res5."  # where our C4 detectors keep its layer4
BACKBONE_COUNTERS = r"^backbone\..*num_batches_tracked$"  # FrozenBatchNorm has none
DECODER = "transformer.decoder.layers.0.linear1.weight"  # all of the DETR family have it
SOCO_PYRAMID = "neck.lateral_convs.0.conv.weight"  # SoCo has it but for C4
ENCODER_NORM = "transformer.encoder.norm.weight"  # a pre-norm DETR has it
CONDITIONAL = "transformer.decoder.ref_point_head.layers.0.weight"  # Conditional DETR has it
# DAB- and DN-DAB-Deformable DETR have them rather than query_embed
ANCHORS = ("tgt_embed.weight refpoint_embed.weight transformer.level_embed "
           "transformer.decoder.query_scale.layers.0.weight")
OFFSETS = {"enc": "transformer.encoder.layers.0.self_attn.sampling_offsets.bias",
           "dec": "transformer.decoder.layers.0.cross_attn.sampling_offsets.bias"}  # Deformable DETR has them
# Where files of other code bases keep the options that they were made with.
OPTIONS = ("args", "opt", "config", "cfg", "hparams", "hyper_parameters")


@dataclass(frozen=True)
class Checkpoint:
    """A file, recognised. family: as in KNOWN; state: its tensors under our names; left: {reason: names of others};
    content: all that it holds."""
    path: str
    family: str
    state: dict[str, Tensor]
    left: dict[str, list[str]]
    content: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The flags of our run that made it; of a foreign file none."""
        ours = "script" in self.content and isinstance(self.content.get("config"), dict)
        return self.content["config"] if ours else {}

    @property
    def settings(self) -> dict[str, Any]:
        """What the file says of how it was made: `config`, or the options of another code base; {}: nothing."""
        if "script" in self.content:
            return self.config
        options = (self.content.get(name) for name in OPTIONS)
        options = (vars(o) if isinstance(o, argparse.Namespace) else o for o in options)
        return next((o for o in options if isinstance(o, dict) and o), {})

    @property
    def not_built(self) -> str | None:
        """What its detector has that none of ours has, by its tensors or by what the file says; None: nothing."""
        settings, state = self.settings, self.state
        if "script" in self.content:
            return None
        encoder_norm, pre_norm = ENCODER_NORM in state, settings.get("pre_norm")
        dilation = settings.get("dilation", "dc5" in Path(self.path).name.lower())
        # in DAB's files of this name it is that of another detector, which the same program trains
        of_transformer = None if has(state, ANCHORS) else settings.get("transformer_activation")
        activation = settings.get("activation") or of_transformer or "relu"
        points = {part: _sampling_points(state, settings, part) for part in ("enc", "dec")}
        reasons = {
            "a dilated last stage (DC5)": dilation,
            "two stages": settings.get("two_stage") or "transformer.enc_output.weight" in state,
            "learned position embeddings": settings.get("position_embedding") in ("learned", "v3")
            or has(state, "backbone.1.row_embed.weight"),
            f"the activation {activation}": str(activation).lower() != "relu",
            **{f"{part}_n_points {n} rather than 4": n != 4 for part, n in points.items()},
            "pre-norm layers": CONDITIONAL in state and (encoder_norm or pre_norm),
            settings.get("unlike_ours"): "unlike_ours" in settings,  # Hugging Face: see _unlike_ours()
            f"pre_norm {pre_norm} by its options and {encoder_norm} by its tensors":
                pre_norm is not None and "transformer.level_embed" not in state and bool(pre_norm) != encoder_norm,
        }
        return next((what for what, there in reasons.items() if there), None)

    def architecture(self) -> dict[str, Any]:
        """architecture() of its tensors and, where the file tells them, its attention heads. UserError: it is none of
        our detectors, or has what they have not."""
        if DECODER in self.state and self.not_built:
            raise UserError(f"{self.path}: its detector has {self.not_built}, which is not built here; give another "
                            "file, or its ResNet alone with --backbone_weights")
        found = architecture(self.state, self.path)
        heads = self.settings.get("nheads")
        offsets = self.state.get(OFFSETS["enc"])
        if heads is None and offsets is not None:  # of 4 points each
            heads = len(offsets) // (8 * found["num_feature_levels"])
        if heads is None:
            return found
        if type(heads) is not int or heads < 1 or found["hidden_dim"] % heads:
            raise UserError(f"{self.path}: says nheads = {heads}, which does not divide its width of "
                            f"{found['hidden_dim']}; it is damaged, or its options are another model's")
        return found | {"nheads": heads}

    @property
    def assumed(self) -> str | None:
        """What a detector's file does not tell, and is taken to be as in most released ones; None: nothing."""
        if DECODER not in self.state or "script" in self.content:
            return None
        heads = "nheads" in self.settings or OFFSETS["enc"] in self.state
        lacking = ["how many attention heads it has (8 are taken, or --nheads)"] * (not heads)
        lacking += ["whether its last stage is dilated (taken not to be)"] * ("dilation" not in self.settings)
        return f"{self.path} does not say {' and '.join(lacking)}" if lacking else None

    @property
    def rcnn(self) -> str | None:
        """Which detector of the R-CNN family our finetune.py made of it."""
        detector = self.config.get("detector", "")
        return detector if self.content.get("script") == "finetune" and rcnn.is_rcnn(detector) else None

    @property
    def method(self) -> str | None:
        """The script whose pretraining it is; None: a supervised or fine-tuned model."""
        if "script" in self.content:
            return self.content["script"] if self.content["script"] in METHODS else None
        if self.family.startswith("SoCo"):
            return "soco"
        detector = DECODER in self.state
        return next((script for script, marks in PRETRAININGS if detector and has(self.state, marks)), None)

    @property
    def what(self) -> str:
        """What the file is, in words: model, ResNet, step. UserError: a detector's checkpoint that lacks parts."""
        queries = "query_embed.weight" in self.state or has(self.state, ANCHORS)
        if DECODER in self.state and (self.not_built or not queries):
            words = [f"detector with {self.not_built or 'other queries'}, which is not built here"]
        elif DECODER in self.state:
            arch = architecture(self.state, self.path)
            variant = (" with box refinement" if arch.get("with_box_refine") else
                       " (pre-norm)" if arch.get("pre_norm") else "")
            words = [NAMES[arch["detector"]] + variant, f"{arch['num_queries']} queries"]
            if self.method:
                words.insert(0, f"{METHODS[self.method]} pretraining")
        elif self.family == "SoCo" and SOCO_PYRAMID not in self.state:
            words = ["SoCo (C4)"]
        else:
            words = [NAMES[self.rcnn] if self.rcnn else self.family]
        if any(f"{prefix}layer1.0.conv1.weight" in self.state for prefix in RESNET_PREFIXES):
            words.append((resnet_kind(self.resnet()) or "another ResNet").replace("resnet", "ResNet-"))
        if {"script", "step"} <= self.content.keys():
            words.append(f"step {self.content['step']}")
        return ", ".join(words)

    def resnet(self) -> dict[str, Tensor]:
        """The tensors of its ResNet under torchvision's names, without a classifier. UserError: it has none."""
        prefix = next((p for p in RESNET_PREFIXES if p + "conv1.weight" in self.state), None)
        if prefix is None:
            raise UserError(f"{self.path}: no ResNet found in it; "
                            f"its tensors are called {', '.join(list(self.state)[:4])}, ...")
        parts = tuple(prefix + part for part in ("conv1", "bn1", "layer"))
        trunk = {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(parts)}
        return trunk | {k.removeprefix(RES5): v for k, v in self.state.items() if k.startswith(RES5 + "layer4.")}


def state_of(content: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, out of the wrappers in use ({"model"}, {"state_dict"}, DINO's {"teacher", "student"}, of
    which the teacher is what counts, or none) and without DistributedDataParallel's `module.`"""
    if "experiment_state" in content:
        raise UserError(f"{path}: {OF_BYOL}")
    for wrapper in ("model", "state_dict", "teacher", "student"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    arrays = {k: torch.from_numpy(np.array(v, v.dtype.newbyteorder("="))) for k, v in content.items()
              if isinstance(v, np.ndarray) and v.dtype.kind in "fiub"}
    state = {k: v for k, v in (content | arrays).items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        raise UserError(f"{path}: holds no tensors under 'model', 'state_dict' or at its top; "
                        f"its keys are {sorted(map(str, content))[:6]}")
    return {k.removeprefix("module."): v for k, v in state.items()}


def resnet_prefix(state: dict[str, Tensor], path: str | Path) -> str | None:
    """Under which prefix a file of an unknown family keeps its one ResNet, copies of it aside; None: there is none.
    UserError: there are several."""
    stages = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight")
    every = [name.removesuffix(stages[0]) for name in state if name.endswith("." + stages[0])]
    found = [p for p in every if all(p + stage in state for stage in stages)]
    found = [p for p in found if not COPIES.search(p)] or found
    if any(not torch.equal(state[p + stages[-1]], state[found[0] + stages[-1]]) for p in found[1:]):
        raise UserError(f"{path}: holds {len(found)} ResNets, called {', '.join(p + '*' for p in found)}, and nothing "
                        "says which is meant; give a file with one of them")
    return found[0] if found else None


OF_BYOL = ("BYOL's own file, a pickle of JAX modules, whose kernels lie in another order and whose convolutions pad "
           "otherwise than PyTorch's; convert it with github.com/ajtejankar/byol-convert, or give a BYOL file of "
           "PyTorch's")
OF_A_RUN = ("best.pt", "last.pt", "previous.pt")  # a run's folder stands for the first of them that is there


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file, a run's folder (OF_A_RUN) or a Hugging Face folder, with `hf:` before it or not, and recognise it by
    its content. UserError: see read_checkpoint; a file of no family in KNOWN; a folder without a checkpoint."""
    place = Path(str(path).removeprefix("hf:"))
    if str(path).startswith("hf:") or is_hugging_face(place):
        return open_hugging_face(place.parent if place.is_file() else place)
    if place.is_dir():
        path = next((place / name for name in OF_A_RUN if (place / name).exists()), None)
        if path is None:
            raise UserError(f"{place}: no checkpoint in this folder, neither {', '.join(OF_A_RUN)} of a run, nor "
                            "config.json and model.safetensors or pytorch_model.bin of Hugging Face transformers; give "
                            "a file")
    try:
        content = run.read_checkpoint(path)
    except UserError as error:
        if re.search(r"would run code \(\S*(byol|haiku|jax|dill)", str(error)):
            raise UserError(f"{path}: {OF_BYOL}") from error
        raise
    theirs = state_of(content, path)
    if any(k.startswith("model.backbone.conv_encoder.") for k in theirs) and is_hugging_face(place.parent):
        return open_hugging_face(place.parent)  # one file of the folder
    family, table = next(((family, table) for family, marks, table in KNOWN if has(theirs, marks)), (None, None))
    if family is None and (prefix := resnet_prefix(theirs, path)) is not None:
        family, table = "backbone", ((f"{prefix}*", "*"),)
    if family is None:
        raise UserError(f"{path}: no known kind of checkpoint; its tensors are called {', '.join(list(theirs)[:4])}, "
                        "... Known are ours and files of DETReg, UP-DETR, Siamese DETR, SoCo, MoCo, SwAV, DETR, "
                        "Conditional and Deformable DETR, detectron2, torchvision")
    kept, left = {}, {}
    for name, value in theirs.items():
        if name.startswith("pred_head.criterion."):
            left.setdefault("class weights of the loss", []).append(name)
        elif name in ("queue", "queue_ptr") and family == "SoCo":
            left.setdefault("a queue left over from MoCo, which SoCo's loss does not have", []).append(name)
        elif ours := rename(name, table) if table else name:
            kept[ours] = value
        else:
            left.setdefault("other modules, not needed", []).append(name)
    if family.startswith("detectron2 R"):
        kept = {k: _reorder_rows(k, v, family.endswith("(C4)"), back=False) for k, v in kept.items()}
    return Checkpoint(str(path), family, _join_siamese_detr(kept), left, content)


# model_type of a Hugging Face folder: the key of its table
HUGGING_FACE_TYPES = {"detr": "detr", "table-transformer": "detr", "conditional_detr": "conditional_detr",
                      "deformable_detr": "deformable_detr"}
# Our (DETR's) names of the options in its config.json
HUGGING_FACE_OPTIONS = {
    "dropout": "dropout", "activation": "activation_function", "position_embedding": "position_embedding_type",
    "two_stage": "two_stage", "enc_n_points": "encoder_n_points", "dec_n_points": "decoder_n_points",
    "set_cost_class": "class_cost", "set_cost_bbox": "bbox_cost", "set_cost_giou": "giou_cost",
    "bbox_loss_coef": "bbox_loss_coefficient", "giou_loss_coef": "giou_loss_coefficient",
    "eos_coef": "eos_coefficient", "focal_alpha": "focal_alpha",
}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a Hugging Face folder; in parts: NAME.index.json lists them


def is_hugging_face(folder: Path) -> bool:
    return (folder / "config.json").is_file() and bool(_weight_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            parts = _read_json(index).get("weight_map")
            if not (isinstance(parts, dict) and parts and all(isinstance(part, str) for part in parts.values())):
                raise UserError(f"{index}: names no files under 'weight_map'; it is damaged, fetch the folder again")
            return [folder / Path(part).name for part in sorted(set(parts.values()))]
    others = list(folder.glob("*.safetensors"))
    return others if len(others) == 1 else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, an object is wanted; fetch it again")
    return content


def open_hugging_face(folder: Path) -> Checkpoint:
    """The detector in a folder of transformers (save_pretrained, or fetched from the Hub), under our names; its options
    as DETR's args, its labels as categories, whose ids are the rows. UserError: no such folder, another kind of model.
    """
    if not folder.is_dir():
        raise UserError(f"hf:{folder}: no such folder, and nothing is fetched here; run `hf download {folder} "
                        "--local-dir DETECTOR` on a machine with network and give hf:DETECTOR")
    if not is_hugging_face(folder):
        raise UserError(f"hf:{folder}: lacks config.json or the weights ({' or '.join(WEIGHTS)}, whole or in parts "
                        "with .index.json); give the folder that save_pretrained wrote")
    config = _read_json(folder / "config.json")
    family = HUGGING_FACE_TYPES.get(str(config.get("model_type")))
    if family is None:
        raise UserError(f"{folder}: a Hugging Face model of the type {config.get('model_type')}; of those only DETR, "
                        "Table Transformer, Conditional DETR and Deformable DETR are read, so give one of these")
    theirs = {k: v for file in _weight_files(folder) for k, v in state_of(run.read_checkpoint(file), file).items()}
    state, left = _our_names(theirs, family, _last_stage(config, folder))
    state = _join_projections(state)
    if family == "deformable_detr" and DECODER in state:
        _fill_heads(state, bool(config.get("with_box_refine")), folder)
    content: dict[str, Any] = {"args": _settings(config, folder)}
    head = next((state[k] for k in ("class_embed.weight", "class_embed.0.weight") if k in state), None)
    if head is None:
        raise UserError(f"{folder}: a {config.get('architectures')} without class and box head; give the folder of a "
                        "...ForObjectDetection")
    if categories := _labels(config, len(head) - (family == "detr")):
        content["categories"] = categories
    return Checkpoint(str(folder), "detector", state, left, content)


def _our_names(theirs: dict[str, Tensor], family: str, last_stage: int) -> tuple[dict[str, Tensor],
                                                                                  dict[str, list[str]]]:
    """(tensors under our names, {reason: names of others}). A detector for segmentation holds one under `detr.`;
    BatchNorm is frozen there, whatever counters the file has; stages after the last that is used go."""
    state, left = {}, {}
    for name, value in theirs.items():
        plain = re.sub(r"^(detr|conditional_detr)\.", "", name)
        for pattern, target in HUGGING_FACE_5[family]:
            plain = re.sub(pattern, target, plain)
        ours = rename(plain, HUGGING_FACE[family])
        if ours and ours.startswith("backbone.0.body."):
            body = ours.removeprefix("backbone.0.body.")
            ours = f"backbone.0.body.{rename(body, RESNET_HUGGING_FACE) or body}"
        if ours is None:
            left.setdefault("other modules, not needed", []).append(name)
        elif (stage := re.match(r"backbone\.0\.body\.layer(\d)", ours)) and int(stage[1]) > last_stage:
            left.setdefault("a later stage that is not used", []).append(name)
        elif not ours.endswith("num_batches_tracked"):
            state[ours] = value
    return state, left


def _join_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What torch's attention has as one in_proj, from queries, keys and values."""
    joined = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*\.)([qkv])_proj\.(weight|bias)", name)
        parts = [f"{match[1]}{part}_proj.{match[3]}" for part in "qkv"] if match else []
        if not parts or not state.keys() >= set(parts):
            joined[name] = value
        elif match[2] == "q":
            joined[f"{match[1]}in_proj_{match[3]}"] = torch.cat([state[part] for part in parts])
    return joined


def _fill_heads(state: dict[str, Tensor], refined: bool, folder: Path) -> None:
    """Deformable DETR: a file has heads that layers share once, and with refinement the box heads as the decoder's, as
    the detector's or as both; ours has a class head and a box head per layer, and with refinement the latter again."""
    decoders = {k.removeprefix("transformer.decoder."): state.pop(k) for k in list(state)
                if k.startswith("transformer.decoder.bbox_embed.")}
    if any(k in state and not torch.equal(state[k], v) for k, v in decoders.items()):
        raise UserError(f"{folder}: the box heads of its decoder are others than those of the detector, which "
                        "transformers 5 makes of them when it loads and trains a model; train it again after "
                        "model.model.decoder.bbox_embed = model.bbox_embed")
    state |= decoders
    heads = {k: v for k, v in state.items() if re.match(r"(class|bbox)_embed\.0\.", k)}
    for i in range(_count(state, "transformer.decoder.layers.")):
        for name, value in heads.items():
            state.setdefault(name.replace("_embed.0.", f"_embed.{i}.", 1), value)
    if refined:
        state |= {f"transformer.decoder.{k}": v for k, v in state.items() if k.startswith("bbox_embed.")}


def _labels(config: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    """A category per row of the class head, of the row's number and label, LABEL_i where it has none; []: a head of
    COCO's 91 rows without any label, which is told by them."""
    labels = config.get("id2label") if isinstance(config.get("id2label"), dict) else {}
    categories = [{"id": i, "name": str(labels.get(str(i), f"LABEL_{i}"))} for i in range(rows)]
    named = any(c["name"] != f"LABEL_{c['id']}" for c in categories)
    return categories if named or rows != 91 else []


def _backbone(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(configuration of the backbone, options of timm's), {} where the file has none."""
    return tuple(config[key] if isinstance(config.get(key), dict) else {} for key in ("backbone_config",
                                                                                       "backbone_kwargs"))


def _stages(config: dict[str, Any]) -> list[int]:
    """The stages of the ResNet (1 to 4) whose maps the detector gets; []: the file does not say."""
    backbone, options = _backbone(config)
    stages = backbone.get("out_indices") or options.get("out_indices") or []
    return [i % 5 for i in stages if type(i) is int] if isinstance(stages, list) else []


def _last_stage(config: dict[str, Any], folder: Path) -> int:
    """Which stage of the ResNet is the last in use. UserError: it is another backbone, or another kind of ResNet."""
    backbone, _ = _backbone(config)
    name = str(backbone.get("backbone") or config.get("backbone") or backbone.get("model_type", "resnet"))
    known = "|".join(("", *(kind.removeprefix("resnet") for kind in RESNET_BLOCKS)))
    strange = [f"{key} {backbone[key]}" for key, ours in (
        ("downsample_in_bottleneck", False), ("downsample_in_first_stage", False), ("hidden_act", "relu"),
        ("embedding_size", 64)) if backbone.get(key, ours) != ours]
    if strange or not re.fullmatch(rf"(.*/)?resnet-?({known})(\..*)?", name):
        raise UserError(f"{folder}: its backbone is {name}{' with ' * bool(strange)}{', '.join(strange)}; read here "
                        f"are detectors on {', '.join(RESNET_BLOCKS)}, so give one of these")
    return max(_stages(config), default=4)


def _settings(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Its options as DETR's args, and the image sizes of its preprocessor_config.json as ours."""
    settings = {ours: config[theirs] for ours, theirs in HUGGING_FACE_OPTIONS.items() if theirs in config}
    backbone, options = _backbone(config)
    stride = backbone.get("output_stride") or options.get("output_stride") or 32
    settings |= {"nheads": config.get("encoder_attention_heads", 8),
                 "dilation": bool(config.get("dilation")) or stride != 32}
    file = folder / "preprocessor_config.json"
    processor = _read_json(file) if file.is_file() else {}
    size = processor.get("size")
    if type(size) is int:  # files of old versions
        size = {"shortest_edge": size, "longest_edge": processor.get("max_size")}
    if isinstance(size, dict) and processor.get("do_resize", True):  # with height and width: other proportions
        sides = {"eval_size": size.get("shortest_edge"), "max_size": size.get("longest_edge") or 1333}
        settings |= sides if all(type(side) is int and side > 0 for side in sides.values()) else {}
    if unlike := _unlike_ours(config, processor):
        settings["unlike_ours"] = unlike
    return settings


def _unlike_ours(config: dict[str, Any], processor: dict[str, Any]) -> str | None:
    """What a detector of ours has not, and the options of other code bases have not either."""
    heads = [config.get(f"{part}_attention_heads", 8) for part in ("encoder", "decoder")]
    norms = [processor.get(f"image_{name}", list(ours)) for name, ours in (("mean", IMAGENET_MEAN),
                                                                           ("std", IMAGENET_STD))]
    stages, levels = _stages(config), config.get("num_feature_levels")
    levels = levels if config["model_type"] == "deformable_detr" and type(levels) is int else 0
    reasons = {
        f"{heads[0]} attention heads in the encoder and {heads[1]} in the decoder": heads[0] != heads[1],
        f"the stages {stages} of the ResNet on {levels} levels":
            levels and stages and stages != [2, 3, 4][-levels:],
        f"images normalised with {norms[0]} and {norms[1]}": norms != [list(IMAGENET_MEAN), list(IMAGENET_STD)],
        "images that are not normalised": not processor.get("do_normalize", True),
    }
    return next((what for what, there in reasons.items() if there), None)


def _join_siamese_detr(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Siamese DETR on Deformable DETR: its position and content queries [Q, D] become one query_embed [Q, 2D] (its
    converter leaves them apart, and Deformable DETR cannot load them), and its one box head and class head become one
    entry per decoder layer. Other states come back as they are."""
    state = dict(state)
    if "transformer.level_embed" in state and "bbox_embed.layers.0.weight" in state:
        heads = {k: state.pop(k) for k in list(state) if k.startswith(("bbox_embed.", "class_embed."))}
        for i in range(_count(state, "transformer.decoder.layers.")):
            state |= {k.replace("_embed.", f"_embed.{i}.", 1): v for k, v in heads.items()}
    if "transformer.tgt_embed.weight" in state:
        queries = state["query_embed.weight"], state.pop("transformer.tgt_embed.weight")
        state["query_embed.weight"] = torch.cat(queries, 1)
    return state


def _reorder_rows(name: str, value: Tensor, c4: bool, back: bool) -> Tensor:
    """detectron2's order of rows in torchvision's, or (back) the reverse. Anchors: by size, then ratio / by ratio, then
    size. Background: the last class, without boxes and masks / the first, with boxes and masks that nothing reads."""
    of_anchors = r"^rpn\.head\.(cls_logits|bbox_pred)\." if c4 else r"^head\..*(cls_logits|bbox_reg)\."
    if re.search(of_anchors, name):
        sizes = 5 if c4 else 3
        rows = value.unflatten(0, (3, sizes, -1) if back else (sizes, 3, -1))
        return rows.transpose(0, 1).flatten(0, 2).contiguous()
    if name.startswith("roi_heads.box_predictor.cls_score."):
        return value.roll(-1 if back else 1, 0)
    if match := re.search(r"(roi_heads\.box_predictor\.bbox_pred|mask_fcn_logits)\.", name):
        extra = 1 if "mask" in match[1] else 4
        return value[extra:].contiguous() if back else torch.cat([torch.zeros_like(value[:extra]), value])
    return value


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """How many layers, numbered from 0, have names that start with `prefix`."""
    return 1 + max(int(k[len(prefix):].split(".")[0]) for k in state if k.startswith(prefix))


def _sampling_points(state: dict[str, Tensor], settings: dict[str, Any], part: str) -> int:
    """Points per head and level of Deformable DETR's encoder ("enc") or decoder ("dec"): what the file says, else by
    the heads that it says; 4, as all released files have, where neither is known."""
    points, heads = settings.get(f"{part}_n_points"), settings.get("nheads")
    if points is None and OFFSETS[part] in state and type(heads) is int and heads > 0:
        points = len(state[OFFSETS[part]]) // (2 * heads * len(state["transformer.level_embed"]))
    return 4 if points is None else points


def resnet_kind(state: dict[str, Tensor], prefix: str = "") -> str | None:
    """Which ResNet lies under the names that start with `prefix`, told by its blocks; None: none of RESNET_BLOCKS."""
    stages = [_count(state, f"{prefix}layer{i}.") for i in (1, 2, 3) if f"{prefix}layer{i}.0.conv1.weight" in state]
    bottleneck = prefix + "layer1.0.conv3.weight" in state
    return next((name for name, (deep, blocks) in RESNET_BLOCKS.items()
                 if stages and deep == bottleneck and list(blocks[:len(stages)]) == stages), None)


def resnet_name(state: dict[str, Tensor], prefix: str, path: str | Path) -> str:
    """resnet_kind(), or a UserError."""
    if name := resnet_kind(state, prefix):
        return name
    raise UserError(f"{path}: a checkpoint that lacks parts, or whose backbone is none of {', '.join(RESNET_BLOCKS)}")


def architecture(state: dict[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Flags of the detector a state dict belongs to (names as in finetune.py), read off its names and shapes, from
    which the number of heads cannot be told: see Checkpoint.architecture. UserError: it is none."""
    dab = has(state, f"{DECODER} {ANCHORS}")
    if not dab and not has(state, f"{DECODER} query_embed.weight"):
        known = next((family for family, marks, _ in KNOWN if has(state, marks)), None)
        hint = ("; give a bare backbone with --backbone_weights, or fine-tune the R-CNN family from it: "
                "--detector faster_rcnn_fpn" if known else "")
        raise UserError(f"{path}: this is {f'a {known}' if known else 'an unknown kind of'} checkpoint, not one of a "
                        f"DETR, Conditional DETR or Deformable DETR{hint}")
    deformable = "transformer.level_embed" in state
    body = "backbone.0.body."
    try:
        found = {
            "arch": resnet_name(state, body, path),
            "backbone_norm": "bn" if any(re.search(BACKBONE_COUNTERS, k) for k in state) else "frozen",
            "num_queries": state["tgt_embed.weight" if dab else "query_embed.weight"].shape[0],
            "hidden_dim": (state["transformer.level_embed"].shape[1] if dab else
                           state["query_embed.weight"].shape[1] // (2 if deformable else 1)),
            "enc_layers": _count(state, "transformer.encoder.layers."),
            "dec_layers": _count(state, "transformer.decoder.layers."),
            "dim_feedforward": state["transformer.encoder.layers.0.linear1.weight"].shape[0],
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: a detector's checkpoint that lacks parts") from error
    if deformable:
        levels = state["transformer.level_embed"].shape[0]
        if dab:
            found["num_feature_levels"] = levels
            return found | ({"detector": "dn_deformable_detr"} if "label_enc.weight" in state else
                            {"detector": "dab_deformable_detr",
                             "num_patterns": len(state.get("patterns_embed.weight", ()))})
        return found | {"detector": "deformable_detr_ss" if levels == 1 else "deformable_detr",
                        "num_feature_levels": levels,
                        "with_box_refine": "transformer.decoder.bbox_embed.0.layers.0.weight" in state}
    found["stride"] = 2 ** (1 + max(i for i in (1, 2, 3, 4) if f"{body}layer{i}.0.conv1.weight" in state))
    if CONDITIONAL in state:
        return found | {"detector": "conditional_detr"}
    return found | {"detector": "detr", "pre_norm": ENCODER_NORM in state}


# ==== 3. Into our models ====

# --backbone_weights by name: epochs of MoCo v2 in its name; swav has 800. Of SwAV's three files of 400 epochs, that of
# batch 4096 with multi-crop.
BACKBONE_URLS = {
    **{name: f"https://dl.fbaipublicfiles.com/deepcluster/swav_{epochs}ep_pretrain.pth.tar"
       for name, epochs in (("swav", 800), ("swav_400", 400))},
    **{f"moco_v2_{epochs}": "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/"
       f"moco_v2_{epochs}ep/moco_v2_{epochs}ep_pretrain.pth.tar" for epochs in (200, 800)},
}
BACKBONES = ("random", "imagenet", *BACKBONE_URLS)
# What is called so, and no name here: what to give instead.
NO_NAMES = {
    "moco_v2": "give moco_v2_200 (200 epochs, the baseline of DUPR's tables) or moco_v2_800 (800 epochs)",
    **{name: f"is not fetched here; get {file} from {project} and give the file" for name, file, project in (
        ("byol", "byol_r50_bs256_accmulate16_ep300-5df46722.pth", "github.com/open-mmlab/mmselfsup (openselfsup)"),
        ("densecl", "densecl_r50_imagenet_200ep.pth", "github.com/WXinlong/DenseCL"),
        ("pixpro", "pixpro_base_r50_100ep or _400ep", "github.com/zdaxie/PixPro"),
        ("infomin", "InfoMin_200.pth or InfoMin_800.pth", "github.com/HobbitLong/PyContrast"))},
}
COUNTERS = {r"num_batches_tracked$": "counters that only momentum-free BatchNorm reads"}


def print_unused(left: dict[str, list[str]]) -> None:
    """left: {reason: names of tensors}."""
    for why, names in left.items():
        modules = sorted({name.split(".")[0] for name in names})
        run.print_rank0(f"  {why}: {', '.join(modules)} ({len(names)} tensors)")


def load_matching(model: nn.Module, state: dict[str, Tensor], *, drop: dict[str, str], source: str) -> None:
    """Strict loading with named exceptions: `drop` maps a regular expression on names to the reason they are left out
    (the last that fits counts), which is printed. UserError: anything missing or unexpected that no rule of `drop`
    covers, and any shape that differs."""
    own = model.state_dict()
    reason = {k: why for k in own.keys() | state.keys() for pattern, why in drop.items() if re.search(pattern, k)}
    kept = {k: v for k, v in state.items() if k not in reason}
    problems = {
        "missing there": sorted(own.keys() - kept.keys() - reason.keys()),
        "unknown here": sorted(kept.keys() - own.keys()),
        "other shapes (file -> model)": [f"{k} {tuple(kept[k].shape)} -> {tuple(own[k].shape)}"
                                         for k in sorted(kept.keys() & own.keys()) if kept[k].shape != own[k].shape],
    }
    if any(problems.values()):
        parts = [f"{what}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                 for what, names in problems.items() if names]
        raise UserError(f"{source} is a checkpoint of another architecture. {'; '.join(parts)}. "
                        "Give the flags it was trained with")
    model.load_state_dict(own | kept)
    for why in dict.fromkeys(drop.values()):
        if names := sorted(k for k in reason if reason[k] == why):
            run.print_rank0(f"  {why}: {', '.join(names)}")
    new = f"; {len(reason)} named above are left out or new" if reason else ""
    run.print_rank0(f"loaded {len(kept)} tensors from {source}{new}")


def into_dab(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A Deformable DETR for DAB- or DN-DAB-Deformable DETR (Siamese DETR, Table 6): (tensors, `drop` of load_matching).
    All but the queries fits; one box head for all layers becomes the first of each layer's own."""
    heads = {f"transformer.decoder.{k}": v for k, v in state.items() if k.startswith("bbox_embed.")}
    return state | heads, {
        r"^query_embed\.|^transformer\.reference_points\.": "queries of Deformable DETR, which has no anchors",
        r"^(tgt|refpoint|patterns)_embed\.|^label_enc\.|\.(ref_point_head|query_scale)\.": "anchors and their content, "
        "made anew"}


def load_backbone_weights(body: nn.Module, weights: str, arch: str) -> None:
    """Fill a ResNet body from `--backbone_weights`, one of BACKBONES or a file."""
    if weights != "random":
        load_backbone(body, backbone_file(weights, arch))


def backbone_file(weights: str, arch: str) -> Path:
    """The file behind `--backbone_weights`, one of BACKBONES or a file: in PyTorch's hub cache, or downloaded there.
    UserError: the download failed; it says what to fetch, from where, and where to put it. A name of NO_NAMES."""
    if weights in NO_NAMES and not Path(weights).exists():
        raise UserError(f"--backbone_weights {weights}: {NO_NAMES[weights]}")
    if weights not in BACKBONE_URLS and weights != "imagenet":
        return Path(weights)
    if weights in BACKBONE_URLS and arch != "resnet50":
        raise UserError(f"--backbone_weights {weights} exists for resnet50 only, not for {arch}; "
                        "use imagenet, random or a file")
    url = BACKBONE_URLS.get(weights) or get_model_weights(arch)["IMAGENET1K_V1"].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except (urllib.error.URLError, OSError) as error:
            raise UserError(f"--backbone_weights {weights}: the download failed ({error}). Fetch {url} and put it at "
                            f"{path}, or give a file with --backbone_weights FILE, or start from "
                            "--backbone_weights random") from error
    barrier()
    return path


def split_name(text: str) -> tuple[str | None, str]:
    """[NAME=]PLACE -> (NAME or None, PLACE)."""
    return (None, text) if Path(text).exists() else re.fullmatch("(?s)(?:([^=/]+)=)?(.*)", text).groups()


def name_checkpoint(text: str) -> tuple[str, str]:
    """[NAME=]CHECKPOINT -> (what figures call it, CHECKPOINT): without NAME one of BACKBONES, else a file as itself or,
    when that is a run's (OF_A_RUN), as its folder."""
    name, what = split_name(text)
    if name or what in BACKBONES:
        return name or what, what
    path = Path(what)
    if path.name in OF_A_RUN:
        return path.resolve().parent.name, what
    return path.resolve().name if path.is_dir() else Path(path.name.removesuffix(".tar")).stem, what


def load_backbone(body: nn.Module, path: str | Path) -> None:
    """Fill a ResNet body (conv1, bn1, layer1..) from a checkpoint of any family; strict, and prints what it left."""
    found = open_checkpoint(path)
    stages = "|".join(rf"{name}\." for name, _ in body.named_children())
    drop = {f"^(?!{stages})": "a later stage that is not used"} | COUNTERS
    load_matching(body, found.resnet(), drop=drop, source=f"{path} ({found.what})")


# What of a foreign checkpoint a detector of the R-CNN family has no use for; the first that fits counts.
NOT_RCNN = (
    (r"^(encoder|neck|head|projector|predictor)_k\.|^queue", "target network or queue of the pretext task, not needed"),
    (r"^(projector|predictor|encoder_q)\.", "heads of the pretext task, not needed"),
    (r"^neck\.", "pyramid levels that this detector does not have (RetinaNet, FCOS: P2; C4: all)"),
    (r"^head\.(conv|bn|fc)", "box head, which this detector does not have"),
    (r"", "other modules, not needed"),
)
# What such a detector has and a checkpoint may lack, by the start of its names; the last that fits counts.
NEW_IN_RCNN = {
    "backbone.body.layer4.": "last stage, made anew", "backbone.fpn.": "feature pyramid, made anew",
    "backbone.fpn.extra_blocks.": "P6 and P7, made anew", "rpn.": "proposal network, made anew",
    "head.": "class and box head, made anew", "roi_heads.box_head.": "box head, made anew",
    RES5 + "layer4.": "last stage, made anew", RES5 + "norm.": "norm after res5, made anew",
    "roi_heads.box_predictor.": "class and box layers, made anew", "roi_heads.mask_": "mask head, made anew",
}
# whose rows are categories
CLASS_LAYERS = r"^roi_heads\.box_predictor\.|\.mask_fcn_logits\.|^head\.classification_head\.cls_logits\."


def rcnn_state(found: Checkpoint, detector: str) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """(tensors under the names of rcnn.build_rcnn(), {reason: names of what stays out}) of a checkpoint with a ResNet.
    SoCo also has the pyramid and the 4conv1fc box head. RetinaNet and FCOS start at C3: SoCo's level i is their i - 1.
    """
    resnet = found.resnet()
    c4 = detector.endswith("_c4")
    tensors = {(RES5 if c4 and k.startswith("layer4.") else "backbone.body.") + k: v for k, v in resnet.items()}
    table = SOCO_RCNN[int(detector in rcnn.ONE_STAGE)] if found.family.startswith("SoCo") and not c4 else ()
    used = {id(v) for v in resnet.values()}
    left = {why: list(names) for why, names in found.left.items()}
    for name, value in found.state.items():
        if id(value) in used:
            continue
        if ours := rename(name, table):
            tensors[ours] = value
        else:
            why = next(why for pattern, why in NOT_RCNN if re.search(pattern, name))
            left.setdefault(why, []).append(name)
    return tensors, left


def load_rcnn(model: nn.Module, found: Checkpoint, detector: str, box_head: str) -> None:
    """Fill a detector of rcnn.build_rcnn() from a foreign checkpoint; strict but for whole parts that it lacks, and
    prints what is new or left. From a detector of torchvision or detectron2 all but the class layers is taken where it
    is of this very architecture, else its ResNet."""
    tensors, left = rcnn_state(found, detector)
    drop = {}
    beside = rf"{CLASS_LAYERS}|num_batches_tracked$"
    there, wanted = ({k: v.shape for k, v in state.items() if not re.search(beside, k)}
                     for state in (found.state, model.state_dict()))
    if there == wanted:
        class_layers = [k for k in found.state if re.search(CLASS_LAYERS, k)]
        tensors = {k: v for k, v in found.state.items() if k not in class_layers}
        left = {"class layers, whose categories the file does not name": class_layers}
        drop = {CLASS_LAYERS: "class layers, made anew"}
    convs = [k for k in tensors if re.match(r"roi_heads\.box_head\.\d", k)]
    if box_head == "2fc" and convs:
        left["4conv1fc box head, which --box_head 2fc replaces"] = convs
        tensors = {k: v for k, v in tensors.items() if k not in convs}
    print_unused(left)
    for start, why in NEW_IN_RCNN.items():
        if not any(k.startswith(start) for k in tensors):
            drop[rf"^{re.escape(start)}"] = why
    load_matching(model, tensors, drop=drop | COUNTERS, source=f"{found.path} ({found.what})")


# ==== 4. For other tools ====

PRETEXT = {r"^feature_embed\.": "DETReg's embedding head, not needed",
           r"^patch2query\.": "projection of query patches or regions, not needed",
           r"^feature_align\.": "reconstruction head, not needed",
           r"^enc_head\.": "Siamese DETR's global head, not needed"}


def official(found: Checkpoint) -> dict[str, Any]:
    """What the released code of its method saves, for torch.save, without the optimiser. DETReg, UP-DETR, fine-tuned
    detectors: {"model"}; Siamese DETR: {"meta", "state_dict"}, as mmcv; SoCo {"model"}, MoCo {"arch", "state_dict"},
    both with `module.`. UserError: the R-CNN family, DUPR (never released), a bare ResNet; heads of Siamese DETR that
    differ among the decoder layers."""
    if found.family == "SoCo":
        return {"model": {f"module.{k}": v for k, v in found.state.items()}}
    if found.family.startswith(("MoCo", "DUPR")):
        version = "v2" if "encoder_q.image_heads.conv5.2.weight" in found.state else "v1"
        theirs = renamed_back(found.state, MOCO[version])
        if len(theirs) < len(found.state) or "queue" not in theirs or any("_heads." in k for k in theirs):
            raise UserError(f"{found.path}: DUPR's code was never released; MoCo's has image contrast at conv5 alone "
                            "(--alpha 0 0 0 1 --beta 0 0 0 0). For its ResNet give --to torchvision or detectron2")
        return {"arch": resnet_name(found.resnet(), "", found.path),
                "state_dict": {f"module.{k}": v for k, v in theirs.items()}}
    if DECODER not in found.state:
        raise UserError(f"{found.path}: this is a {found.what} checkpoint; --to official is for DETReg, UP-DETR, "
                        "Siamese DETR, SoCo, MoCo and the DETR family. For this one give --to torchvision or "
                        "detectron2")
    state = {k: v for k, v in found.state.items() if not re.search(BACKBONE_COUNTERS, k)}
    return _official_siamese_detr(found, state) if found.method == "siamese_detr" else {"model": state}


def _official_siamese_detr(found: Checkpoint, state: dict[str, Tensor]) -> dict[str, Any]:
    if has(state, ANCHORS):
        raise UserError(f"{found.path}: the released code of Siamese DETR has no DAB-Deformable DETR; fine-tune it "
                        "first, or give --to torchvision --backbone_only for its ResNet")
    if "transformer.level_embed" in state:  # position and content queries apart, as released
        position, content = state["query_embed.weight"].chunk(2, 1)
        state = state | {"query_embed.weight": position.contiguous(),
                         "transformer.tgt_embed.weight": content.contiguous()}
    if "enc_head.0.projector.mlp.0.weight" not in state:  # what the released converter writes
        return {"model": state}
    if "class_embed.0.weight" in state:  # one head for all decoder layers
        heads = {k: v for k, v in state.items() if re.match(r"(class|bbox)_embed\.\d", k)}
        one = {k.replace("_embed.0.", "_embed.", 1): v for k, v in heads.items() if "_embed.0." in k}
        if any(not torch.equal(v, one[re.sub(r"\.\d+", "", k, count=1)]) for k, v in heads.items()):
            raise UserError(f"{found.path}: its decoder layers have heads of their own (--with_box_refine), "
                            "the released code has one for all")
        state = {k: v for k, v in state.items()
                 if k not in heads and not k.startswith("transformer.decoder.bbox_embed.")} | one
    weights = torch.tensor([1, 1, found.config.get("eos_coef", 0.1)])
    return {"meta": {}, "state_dict": renamed_back(state, SIAMESE_DETR) | {"pred_head.criterion.empty_weight": weights}}


def torchvision_state(found: Checkpoint, backbone_only: bool = False) -> dict[str, Tensor]:
    """A state dict for torchvision's parts. A fine-tuned detector of the R-CNN family: whole; SoCo (FPN):
    backbone.body, backbone.fpn, roi_heads.box_head; all others, and with backbone_only: a torchvision.models.resnet
    without its classifier."""
    if backbone_only or not (found.rcnn or SOCO_PYRAMID in found.state):
        return found.resnet()
    if not found.rcnn:
        return rcnn_state(found, "faster_rcnn_fpn")[0]
    # torchvision's mask branch has res5 under a second name
    second = {k.replace("box_head", "mask_head"): v for k, v in found.state.items() if k.startswith(RES5)}
    return found.state | (second if found.rcnn == "mask_rcnn_c4" else {})


def detectron2_arrays(found: Checkpoint, backbone_only: bool = False) -> dict[str, np.ndarray]:
    """Arrays under detectron2's names. A fine-tuned detector of the R-CNN family: whole, full names (FCOS: backbone and
    pyramid); else backbone, and of SoCo (FPN) pyramid and box head, under the short names that its and MoCo's
    converters write and detectron2 completes."""
    if found.rcnn and not backbone_only:
        kind = "one_stage" if found.rcnn in rcnn.ONE_STAGE else found.rcnn.rsplit("_", 1)[1]  # fpn, c4
        if "roi_heads.box_head.fc6.weight" in found.state:
            kind = "fpn_2fc"
        state = {k: _reorder_rows(k, v, kind == "c4", back=True) for k, v in found.state.items()
                 if found.rcnn != "fcos_fpn" or k.startswith("backbone.")}
        state = renamed_back(state, RCNN_DETECTRON2[kind])
    else:
        state = {f"encoder.{k}": v for k, v in found.resnet().items()}
        if found.family.startswith("SoCo") and not backbone_only:
            state |= {k: v for k, v in found.state.items() if k.startswith(("neck.", "head."))}
        state = renamed_back(state, SOCO_DETECTRON2)
    return {k: v.numpy() for k, v in state.items()}


def mmdetection_state(found: Checkpoint) -> dict[str, Tensor]:
    """SoCo's backbone, pyramid and box head for MMDetection's Mask R-CNN with Shared4Conv1FCBBoxHead, as its converter
    writes them. UserError: another family."""
    if not found.family.startswith("SoCo"):
        raise UserError(f"{found.path}: this is a {found.what} checkpoint; --to mmdetection is for SoCo. For a ResNet "
                        "MMDetection reads torchvision's names (Pretrained, checkpoint=PATH): give --to torchvision "
                        "--backbone_only")
    parts = {k: v for k, v in found.state.items() if k.startswith(("encoder.", "neck.", "head."))}
    return renamed_back(parts, SOCO_MMDETECTION)


def class_names(found: Checkpoint, rows: int) -> dict[int, str]:
    """What the rows of a class head stand for, "no object" not counted: the categories our checkpoint carries; those of
    the released heads; of a pretraining row 1, which is every object."""
    if found.content.get("categories"):
        return dict(enumerate(evaluation.distinct_names(found.content["categories"])))
    names = {1: "object"} if found.method else {91: COCO_NAMES, 21: VOC_NAMES}.get(rows, {})
    return {i: names.get(i, f"unused {i}" if names else f"class {i}") for i in range(rows)}


def _hugging_face_tensors(found: Checkpoint, family: str) -> dict[str, Tensor]:
    unwanted = "|".join([*PRETEXT, "num_batches_tracked$"])
    state = {k: v for k, v in found.state.items() if not re.search(unwanted, k)}
    for key in [k for k in state if ".in_proj_" in k]:  # queries, keys and values have a projection each
        kind = key.rsplit("_", 1)[1]  # weight or bias
        for part, rows in zip("qkv", state.pop(key).chunk(3)):
            state[key.replace(f"in_proj_{kind}", f"{part}_proj.{kind}")] = rows
    state = renamed_back(state, HUGGING_FACE[family])
    if family == "deformable_detr" and "model.decoder.bbox_embed.0.layers.0.weight" not in state:
        # one head for all layers is one entry, or transformers does not see that they are one
        state = {k: v for k, v in state.items() if not re.match(r"(class|bbox)_embed\.[1-9]", k)}
    return {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}


def _hugging_face_config(found: Checkpoint, arch: dict[str, Any], family: str, name: str) -> dict[str, Any]:
    bias = found.state.get("class_embed.bias", found.state.get("class_embed.0.bias"))
    names = {0: "object"} if bias is None else class_names(found, len(bias) - (family == "detr"))
    levels = arch.get("num_feature_levels", 0)
    last = {4: 1, 8: 2, 16: 3, 32: 4}[arch.get("stride", 32)]
    backbone = {"use_timm_backbone": True, "backbone": arch["arch"], "use_pretrained_backbone": False}
    if levels in (2, 3) or last != 4:  # not the stages that the class wants: version 5 only
        backbone = {"backbone_config": {"model_type": "timm_backbone", "backbone": arch["arch"],
                                        "features_only": True, "num_channels": 3, "use_pretrained_backbone": False,
                                        "out_indices": [2, 3, 4][-levels:] if levels else [last]}}
    pre_norm = arch.get("pre_norm", False)
    heads = arch.get("nheads", 8)

    def setting(default: float, *names: str) -> float:
        values = (v for v in map(found.settings.get, names) if type(v) in (int, float))
        # transformers takes costs as whole numbers only
        return next((type(default)(v) for v in values if type(default)(v) == v), default)

    config = {
        "architectures": ["TableTransformerForObjectDetection" if pre_norm else f"{name}ForObjectDetection"],
        "model_type": "table-transformer" if pre_norm else family, **backbone, "num_channels": 3, "dilation": False,
        "d_model": arch["hidden_dim"], "num_queries": arch["num_queries"], "encoder_layers": arch["enc_layers"],
        "decoder_layers": arch["dec_layers"], "encoder_attention_heads": heads, "decoder_attention_heads": heads,
        "encoder_ffn_dim": arch["dim_feedforward"], "decoder_ffn_dim": arch["dim_feedforward"],
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), setting(0.1, "dropout")),
        "activation_function": "relu", "position_embedding_type": "sine", "auxiliary_loss": False,
        "is_encoder_decoder": True, "id2label": {str(i): n for i, n in names.items()},
        "label2id": {n: i for i, n in names.items()},
        "class_cost": setting(1 if family == "detr" else 2, "lambda_f", "set_cost_class"),
        "bbox_cost": setting(5, "lambda_l1", "set_cost_bbox"), "giou_cost": setting(2, "lambda_giou", "set_cost_giou"),
        "bbox_loss_coefficient": setting(5, "lambda_l1", "bbox_loss_coef"),
        "giou_loss_coefficient": setting(2, "lambda_giou", "giou_loss_coef"),
        "eos_coefficient": setting(0.1, "eos_coef"),
        "focal_alpha": setting(0.25, "focal_alpha"), "torch_dtype": "float32",
    }
    if family == "deformable_detr":
        config |= {"num_feature_levels": levels, "with_box_refine": arch["with_box_refine"], "two_stage": False,
                   "encoder_n_points": 4, "decoder_n_points": 4,
                   # True ties the class heads too, of which every layer has its own with refinement; export() says
                   # how the decoder's box heads are tied to the others again
                   "tie_word_embeddings": not arch["with_box_refine"]}
    return config


def write_hugging_face(found: Checkpoint, out: Path) -> str:
    """The folder of a detector of the DETR family for Hugging Face transformers. Returns the class that loads it:
    DeformableDetrForObjectDetection, ConditionalDetrForObjectDetection, DetrForObjectDetection, and for a pre-norm DETR
    TableTransformerForObjectDetection, which is that. Modules of the pretext task stay out. UserError: no detector of
    the DETR family."""
    arch = found.architecture()
    if has(found.state, ANCHORS):
        raise UserError(f"{found.path}: transformers has no {NAMES[arch['detector']]}; give --to official for the "
                        "released code, or --to torchvision --backbone_only for its ResNet")
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("--to hf writes the safetensors format: "
                        "pip install safetensors (transformers brings it)") from error
    family = "deformable_detr" if "deformable" in arch["detector"] else arch["detector"]
    name = family.title().replace("_", "")  # DeformableDetr
    config = _hugging_face_config(found, arch, family, name)
    size = {"shortest_edge": found.config.get("eval_size", 800), "longest_edge": found.config.get("max_size", 1333)}
    processor = {"image_processor_type": f"{name}ImageProcessor", "format": "coco_detection", "do_resize": True,
                 "size": size, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                 "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "do_pad": True}
    tensors = _hugging_face_tensors(found, family)
    run.write_atomic(out / "model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
    for file, content in (("config.json", config), ("preprocessor_config.json", processor)):
        run.write_atomic(out / file, (json.dumps(content, indent=2) + "\n").encode())
    return config["architectures"][0]


def write_file(found: Checkpoint, to: str, out: Path, backbone_only: bool) -> None:
    buffer = io.BytesIO()
    if to == "detectron2":  # __author__ tells its loader that the names are its own
        content = {"model": detectron2_arrays(found, backbone_only), "__author__": "convert.py",
                   "matching_heuristics": not found.rcnn or backbone_only}
        pickle.dump(content, buffer, protocol=4)
    elif to == "mmdetection":
        torch.save({"state_dict": mmdetection_state(found), "meta": {}}, buffer)
    else:
        torch.save(official(found) if to == "official" else torchvision_state(found, backbone_only), buffer)
    run.write_atomic(out, buffer.getvalue())


def left_out(found: Checkpoint, to: str, backbone_only: bool) -> list[str]:
    """The tensors that a target has no place for."""
    if to in ("official", "hf"):
        gone = "|".join([BACKBONE_COUNTERS, *(PRETEXT if to == "hf" else ())])
        return [k for k in found.state if re.search(gone, k)]
    if found.rcnn and not backbone_only:
        fcos = (to, found.rcnn) == ("detectron2", "fcos_fpn")
        return [k for k in found.state if fcos and not k.startswith("backbone.")]
    trunk = {id(v) for v in found.resnet().values()}
    more = () if backbone_only or not found.family.startswith("SoCo") else ("neck.", "head.")
    return [k for k, v in found.state.items() if id(v) not in trunk and not k.startswith(more)]


def export(found: Checkpoint, to: str, out: Path, backbone_only: bool) -> None:
    """Write it for another tool; prints what stays out and what the user there must know."""
    loader = None
    try:
        if to == "hf":
            loader = write_hugging_face(found, out)
        else:
            write_file(found, to, out, backbone_only)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    if names := left_out(found, to, backbone_only):
        print_unused({"no place for them there": names})
    run.print_rank0(f"wrote {out}" + (f": {loader}.from_pretrained({str(out)!r})" if loader else ""))
    if loader and found.method in ("updetr", "siamese_detr") and not loader.startswith(("Detr", "Table")):
        run.print_rank0("its class head was trained with softmax over 3 rows, of which row 1 is an object; "
                        "the transformers class applies a sigmoid")
    if to == "hf" and "transformer.decoder.bbox_embed.0.layers.0.weight" in found.state:
        run.print_rank0("to train it further with transformers 5, which loads the decoder's box heads as copies, first "
                        "model.model.decoder.bbox_embed = model.bbox_embed; model.config.tie_word_embeddings = True")
    categories = found.content.get("categories")
    if found.rcnn and not backbone_only and categories:
        first = rcnn.first_label(found.rcnn) if to == "torchvision" else 0
        labels = ", ".join(f"{i} {name}" for i, name in enumerate(evaluation.distinct_names(categories), first))
        run.print_rank0(f"labels: {labels}")


# ==== 5. Main ====


def main(argv: list[str] | None = None) -> str:
    """Returns what the file is."""
    parser = run.Parser(prog="convert.py",
                        description="Says what a checkpoint is; with --to writes it for another tool.")
    parser.add_argument("checkpoint", help="any file or folder that --init_from and --backbone_weights read")
    parser.add_argument("--to", choices=("official", "hf", "torchvision", "detectron2", "mmdetection"),
                        help="hf: a folder for Hugging Face transformers; torchvision: a state dict; detectron2: "
                        "a .pkl; mmdetection: a .pth, of SoCo; official: as the released code of its method has it")
    parser.add_argument("--out", help="file (hf: folder) to write; must not exist")
    parser.add_argument("--backbone_only", "--backbone-only", action="store_true",
                        help="torchvision, detectron2: the ResNet alone")
    args = parser.parse_args(argv)
    found = open_checkpoint(args.checkpoint)
    run.print_rank0(f"{found.path}: {found.what}; {len(found.state)} tensors")
    print_unused(found.left)
    if found.assumed:
        run.print_rank0(f"note: {found.assumed}")
    if not args.to:
        return found.what
    if not args.out:
        raise UserError(f"--to {args.to} needs --out PATH: the {'folder' if args.to == 'hf' else 'file'} to write")
    if os.path.exists(args.out):
        raise UserError(f"--out {Path(args.out)} exists already; give another name or remove it")
    if args.backbone_only and args.to not in ("torchvision", "detectron2"):
        raise UserError(f"--backbone_only is of --to torchvision and --to detectron2, not of --to {args.to}")
    export(found, args.to, Path(args.out), args.backbone_only)
    return found.what


if __name__ == "__main__":
    run.cli(main)
