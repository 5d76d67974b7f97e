"""Checkpoints of other code bases: recognised by their content, read safely, named as here.

Our names are those of the released DETR, Conditional DETR, Deformable DETR, DETReg and UP-DETR, so those files need no renaming; the released
Siamese DETR is renamed (detector_state); backbone files differ in their prefix only.
"""
from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn

import common
from common import UserError

# Where each family keeps a ResNet: name, prefix of its keys. The first that fits counts.
BACKBONES = (
    ("SwAV ResNet", "module."),
    ("MoCo encoder", "module.encoder_q."),
    ("DUPR or MoCo encoder", "encoder_q."),
    ("SoCo encoder", "module.encoder."),
    ("SoCo encoder", "encoder."),
    ("detector", "backbone.0.body."),
    ("Siamese DETR", "backbone."),
    ("torchvision detector", "backbone.body."),
    ("torchvision ResNet", ""),
)


def read_checkpoint(path: str | Path) -> dict:
    """torch.load(weights_only=True) with the one harmless container the released files hold (argparse.Namespace).

    UserError: no such file; not a PyTorch checkpoint; a pickle that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("GLOBAL ")[-1].split(" was")[0] if "GLOBAL" in str(error) else "not a PyTorch checkpoint"
        raise UserError(f"{path}: refused, because loading it would run code or it is no checkpoint ({reason.splitlines()[0]})") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable PyTorch checkpoint ({(str(error) or type(error).__name__).splitlines()[0]})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, a checkpoint is a dict of tensors")
    return checkpoint


def state_of(checkpoint: dict, path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, out of the wrappers in use: {"model": ...}, {"state_dict": ...} or none."""
    for wrapper in ("model", "state_dict"):
        if isinstance(checkpoint.get(wrapper), dict):
            checkpoint = checkpoint[wrapper]
    state = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    if not state:
        raise UserError(f"{path}: holds no tensors under 'model', 'state_dict' or at its top; its keys are {sorted(checkpoint)[:6]}")
    return state


def backbone_state(state: dict[str, Tensor], path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """(what the file is, the tensors of its ResNet as torchvision names them, without a classifier) of a checkpoint of any known family."""
    found = [(name, prefix) for name, prefix in BACKBONES if prefix + "conv1.weight" in state]
    if not found:
        raise UserError(f"{path}: no ResNet found in it; known are " + ", ".join(f"{n} ({p}conv1.weight)" for n, p in BACKBONES))
    name, prefix = found[0]
    parts, res5 = tuple(prefix + part for part in ("conv1", "bn1", "layer")), "roi_heads.box_head.res5."      # where our C4 detectors keep layer4
    trunk = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(parts)}
    return name, trunk | {k.removeprefix(res5): v for k, v in state.items() if k.startswith(res5 + "layer4.")}


def load_backbone(body: nn.Module, path: str | Path) -> None:
    """Fill a ResNet body (conv1, bn1, layer1..) from any checkpoint of BACKBONES; strict, and prints what it left."""
    name, tensors = backbone_state(state_of(read_checkpoint(path), path), path)
    stages = tuple(f"{child}." for child, _ in body.named_children())
    drop = {rf"^(?!{'|'.join(stages)})": "a later stage that is not used"} if not all(k.startswith(stages) for k in tensors) else {}
    drop[r"num_batches_tracked$"] = "a counter that only momentum-free BatchNorm reads"
    common.load_matching(body, tensors, drop=drop, source=f"{path} ({name})")


# MoCo's names -> those of dupr.py with --alpha 0 0 0 1 --beta 0 0 0 0, which is MoCo v2; a head of one layer is MoCo v1's.
MOCO = (
    (r"^module\.", ""),
    (r"^(encoder_[qk])\.fc\.(?=\d+\.)", r"\1.image_heads.conv5."),
    (r"^(encoder_[qk])\.fc\.(?=weight$|bias$)", r"\1.image_heads.conv5.0."),
    (r"^queue$", "queues.image_conv5.keys"),
    (r"^queue_ptr$", "queues.image_conv5.ptr"),
)


def dupr_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a released MoCo checkpoint (query and key encoder, queue) under dupr.py's names; nothing else differs."""
    for pattern, replacement in MOCO:
        state = {re.sub(pattern, replacement, k): v for k, v in state.items()}
    return state


# SoCo's online network -> the names of detectron2 (whose loader completes them: backbone.bottom_up., backbone., roi_heads.), and of MMDetection.
SOCO_DETECTRON2 = (
    (r"^encoder\.layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
    (r"^encoder\.", "stem."),
    (r"^neck\.(lateral|fpn)_convs\.(\d)\.(conv|bn)",
     lambda m: f"fpn_{'lateral' if m[1] == 'lateral' else 'output'}{int(m[2]) + 2}{'.norm' if m[3] == 'bn' else ''}"),
    (r"^head\.", "box_head."),
    (r"downsample\.0\.", "shortcut."),
    (r"downsample\.1\.", "shortcut.norm."),
    (r"(?<=\.)bn(\d)\.", r"conv\1.norm."),
)
SOCO_MMDET = (
    (r"^encoder\.", "backbone."),
    (r"^head\.(conv|bn)(\d)\.", lambda m: f"roi_head.bbox_head.shared_convs.{int(m[2]) - 1}.{m[1]}."),
    (r"^head\.fc(\d)\.", lambda m: f"roi_head.bbox_head.shared_fcs.{int(m[1]) - 1}."),
)


def soco_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a SoCo checkpoint, released or ours, under soco.py's names, which are the released ones without `module.`."""
    state = {k.removeprefix("module."): v for k, v in state.items()}
    if unused := [k for k in state if k in ("queue", "queue_ptr")]:
        common.say(f"  a queue left over from MoCo, which SoCo's loss does not have: {', '.join(unused)}")
    return {k: v for k, v in state.items() if k not in unused}


def _renamed(state: dict[str, Tensor], parts: tuple[str, ...], table: tuple) -> dict[str, Tensor]:
    renamed = {}
    for key, value in soco_state(state).items():
        if key.startswith(parts):
            for pattern, replacement in table:
                key = re.sub(pattern, replacement, key)
            renamed[key] = value
    return renamed


def soco_detectron2(state: dict[str, Tensor], arch: str) -> dict[str, Tensor]:
    """SoCo's tensors for detectron2's R50-FPN (arch "fpn": backbone, pyramid and box head) or R50-C4 ("c4": backbone); to be saved as a pickle of
    {"model": numpy arrays, "matching_heuristics": True}. Projector, predictor and target network stay out."""
    return _renamed(state, ("encoder.",) if arch == "c4" else ("encoder.", "neck.", "head."), SOCO_DETECTRON2)


def soco_mmdet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """SoCo's tensors for MMDetection's Mask R-CNN, whose box head is Shared4Conv1FCBBoxHead with BatchNorm; to be saved as {"state_dict": ...}."""
    return _renamed(state, ("encoder.", "neck.", "head."), SOCO_MMDET)


# Siamese DETR as mmcv saves it -> the DETR family's names. None: not a tensor of the model (the class weights of its loss).
SIAMESE_DETR = (
    (r"^backbone\.(?!0\.)", "backbone.0.body."),
    (r"^pred_head\.(?=bbox_embed|class_embed|feature_align)", ""),
    (r"^pred_head\.criterion\.", None),
)


def detector_state(checkpoint: dict, path: str | Path) -> dict[str, Tensor]:
    """The tensors of a detector's checkpoint under our names. Handles DistributedDataParallel's `module.` and, of Siamese DETR, both the mmcv file
    and what its converter writes: on Deformable DETR its position and content queries [Q, D] become one query_embed [Q, 2D] (the released converter
    leaves them apart, and Deformable DETR cannot load them), and its one box head and class head become one entry per decoder layer."""
    state = {k.removeprefix("module."): v for k, v in state_of(checkpoint, path).items()}
    if "pred_head.bbox_embed.layers.0.weight" in state:
        for pattern, replacement in SIAMESE_DETR:
            state = {re.sub(pattern, replacement or "", k): v for k, v in state.items() if replacement is not None or not re.search(pattern, k)}
    if "transformer.level_embed" in state and "bbox_embed.layers.0.weight" in state:
        heads = {k: v for k, v in state.items() if k.startswith(("bbox_embed.", "class_embed."))}
        state = {k: v for k, v in state.items() if k not in heads}
        state |= {k.replace("_embed.", f"_embed.{i}.", 1): v for i in range(_count(state, "transformer.decoder.layers.")) for k, v in heads.items()}
    if "transformer.tgt_embed.weight" in state:
        state["query_embed.weight"] = torch.cat([state["query_embed.weight"], state.pop("transformer.tgt_embed.weight")], 1)
    return state


def _count(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(k[len(prefix):].split(".")[0]) for k in state if k.startswith(prefix))


def resnet_name(state: dict[str, Tensor], prefix: str, path: str | Path) -> str:
    """Which ResNet lies under the names that start with `prefix`; told by its blocks. UserError when it is none of the four."""
    kinds = {(False, (2, 2, 2)): "resnet18", (False, (3, 4, 6)): "resnet34", (True, (3, 4, 6)): "resnet50", (True, (3, 4, 23)): "resnet101"}
    stages = [_count(state, f"{prefix}layer{i}.") for i in (1, 2, 3) if f"{prefix}layer{i}.0.conv1.weight" in state]
    for (bottleneck, blocks), name in kinds.items():
        if bottleneck == (prefix + "layer1.0.conv3.weight" in state) and list(blocks[:len(stages)]) == stages != []:
            return name
    raise UserError(f"{path}: a checkpoint that lacks parts, or whose backbone is none of {', '.join(kinds.values())}")


def architecture(state: dict[str, Tensor], path: str | Path) -> dict:
    """Flags of the detector a state dict belongs to (names as in finetune.py), read off its names and shapes; UserError when it is none.

    The number of heads cannot be read off shapes; every released checkpoint has 8.
    """
    if "transformer.decoder.layers.0.linear1.weight" not in state or "query_embed.weight" not in state:
        known = next((f"a {name}" for name, prefix in BACKBONES if prefix + "conv1.weight" in state), "an unknown model's")
        hint = "" if "unknown" in known else ("; give a bare backbone with --backbone_weights, or fine-tune the R-CNN family from it: "
                                              "--detector faster_rcnn_fpn")
        raise UserError(f"{path}: this is {known} checkpoint, not one of a DETR, Conditional DETR or Deformable DETR{hint}")
    deformable = "transformer.level_embed" in state
    body = "backbone.0.body."
    try:
        found = {
            "arch": resnet_name(state, body, path),
            "backbone_norm": "bn" if any(k.startswith("backbone.") and k.endswith("num_batches_tracked") for k in state) else "frozen",
            "num_queries": state["query_embed.weight"].shape[0],
            "hidden_dim": state["query_embed.weight"].shape[1] // (2 if deformable else 1),
            "enc_layers": _count(state, "transformer.encoder.layers."),
            "dec_layers": _count(state, "transformer.decoder.layers."),
            "dim_feedforward": state["transformer.encoder.layers.0.linear1.weight"].shape[0],
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: a detector's checkpoint that lacks parts") from error
    if deformable:
        levels = state["transformer.level_embed"].shape[0]
        return found | {"detector": "deformable_detr_ss" if levels == 1 else "deformable_detr", "num_feature_levels": levels,
                        "with_box_refine": "transformer.decoder.bbox_embed.0.layers.0.weight" in state}
    found["stride"] = 2 ** (1 + max(i for i in (1, 2, 3, 4) if f"{body}layer{i}.0.conv1.weight" in state))
    if "transformer.decoder.ref_point_head.layers.0.weight" in state:
        return found | {"detector": "conditional_detr"}
    return found | {"detector": "detr", "pre_norm": "transformer.encoder.norm.weight" in state}


# What of a foreign checkpoint the R-CNN family has no use for; the first that fits counts.
NOT_RCNN = (
    (r"^(encoder|neck|head|projector|predictor)_k\.|^queue", "target network or queue of the pretext task, not needed"),
    (r"^(projector|predictor|encoder_q)\.", "heads of the pretext task, not needed"),
    (r"^neck\.", "pyramid levels that this detector does not have (RetinaNet, FCOS: P2; C4: all)"),
    (r"^head\.", "box head, which this detector does not have"),
    (r"", "other modules, not needed"),
)


def is_soco(state: dict[str, Tensor]) -> bool:
    return any(f"{prefix}encoder.conv1.weight" in state for prefix in ("", "module."))


def _of_soco(key: str, first: int) -> str | None:
    """Our name of a tensor of SoCo's pyramid or box head. first: SoCo's index of the detector's lowest level, 1: no box head either."""
    if match := re.match(r"neck\.(lateral|fpn)_convs\.(\d)\.(conv|bn)\.(.+)", key):
        level, blocks = int(match[2]) - first, "inner" if match[1] == "lateral" else "layer"
        return f"backbone.fpn.{blocks}_blocks.{level}.{int(match[3] == 'bn')}.{match[4]}" if level >= 0 else None
    if match := re.match(r"head\.(?:(conv|bn)(\d)|fc1)\.(.+)", key):
        layer = f"{int(match[2]) - 1}.{int(match[1] == 'bn')}" if match[1] else "5"
        return f"roi_heads.box_head.{layer}.{match[3]}" if first == 0 else None
    return None


def rcnn_state(state: dict[str, Tensor], detector: str, path: str | Path) -> tuple[str, dict[str, Tensor], dict[str, list[str]]]:
    """(what the file is, its tensors under the names of common.build_rcnn(), {reason: names of what stays out}) of a checkpoint of BACKBONES.

    Every one has a ResNet; SoCo also has the pyramid and the 4conv1fc box head. RetinaNet and FCOS start at C3: SoCo's level i is their i - 1.
    """
    name, trunk = backbone_state(state, path)
    c4, soco = detector.endswith("_c4"), is_soco(state)
    tensors = {("roi_heads.box_head.res5." if c4 and k.startswith("layer4.") else "backbone.body.") + k: v for k, v in trunk.items()}
    used, left = {id(v) for v in trunk.values()}, {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        if id(value) in used:
            continue
        if ours := _of_soco(key, int(detector in common.ONE_STAGE)) if soco and not c4 else None:
            tensors[ours] = value
        else:
            left.setdefault(next(why for pattern, why in NOT_RCNN if re.search(pattern, key)), []).append(key)
    return name, tensors, left


# What a detector of the R-CNN family has and a checkpoint may lack, by the start of its names; the last that fits counts.
NEW_IN_RCNN = {
    "backbone.body.layer4.": "last stage, made anew", "backbone.fpn.": "feature pyramid, made anew",
    "backbone.fpn.extra_blocks.": "P6 and P7, made anew", "rpn.": "proposal network, made anew",
    "head.": "class and box head, made anew", "roi_heads.box_head.": "box head, made anew",
    "roi_heads.box_head.res5.layer4.": "last stage, made anew", "roi_heads.box_head.res5.norm.": "norm after res5, made anew",
    "roi_heads.box_predictor.": "class and box layers, made anew", "roi_heads.mask_": "mask head, made anew",
}


def load_rcnn(model: nn.Module, state: dict[str, Tensor], detector: str, box_head: str, path: str | Path) -> None:
    """Fill a detector of common.build_rcnn() from a foreign checkpoint; strict but for whole parts that it lacks, and prints what is new or left."""
    name, tensors, left = rcnn_state(state, detector, path)
    if box_head == "2fc" and (head := {k: v for k, v in tensors.items() if re.match(r"roi_heads\.box_head\.\d", k)}):
        left["4conv1fc box head, which --box_head 2fc replaces"] = list(head)
        tensors = {k: v for k, v in tensors.items() if k not in head}
    for why, names in left.items():
        common.say(f"  {why}: {', '.join(sorted({n.split('.')[0] for n in names}))} ({len(names)} tensors)")
    drop = {rf"^{re.escape(start)}": why for start, why in NEW_IN_RCNN.items() if not any(k.startswith(start) for k in tensors)}
    drop[r"num_batches_tracked$"] = "counters that only momentum-free BatchNorm reads"
    common.load_matching(model, tensors, drop=drop, source=f"{path} ({name})")
