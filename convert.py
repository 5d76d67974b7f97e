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
    parts = tuple(prefix + part for part in ("conv1", "bn1", "layer"))
    return name, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(parts)}


def load_backbone(body: nn.Module, path: str | Path) -> None:
    """Fill a ResNet body (conv1, bn1, layer1..) from any checkpoint of BACKBONES; strict, and prints what it left."""
    name, tensors = backbone_state(state_of(read_checkpoint(path), path), path)
    stages = tuple(f"{child}." for child, _ in body.named_children())
    drop = {rf"^(?!{'|'.join(stages)})": "a later stage that is not used"} if not all(k.startswith(stages) for k in tensors) else {}
    drop[r"num_batches_tracked$"] = "a counter that only momentum-free BatchNorm reads"
    common.load_matching(body, tensors, drop=drop, source=f"{path} ({name})")


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


def architecture(state: dict[str, Tensor], path: str | Path) -> dict:
    """Flags of the detector a state dict belongs to (names as in finetune.py), read off its names and shapes; UserError when it is none.

    The number of heads cannot be read off shapes; every released checkpoint has 8.
    """
    if "transformer.decoder.layers.0.linear1.weight" not in state or "query_embed.weight" not in state:
        known = next((f"a {name}" for name, prefix in BACKBONES if prefix + "conv1.weight" in state), "an unknown model's")
        hint = "; give a bare backbone with --backbone_weights" if "ResNet" in known or "MoCo" in known else ""
        raise UserError(f"{path}: this is {known} checkpoint, not one of a DETR, Conditional DETR or Deformable DETR{hint}")
    deformable = "transformer.level_embed" in state
    body = "backbone.0.body."
    stages = [_count(state, f"{body}layer{i}.") for i in (1, 2, 3) if f"{body}layer{i}.0.conv1.weight" in state]
    kinds = {(False, (2, 2, 2)): "resnet18", (False, (3, 4, 6)): "resnet34", (True, (3, 4, 6)): "resnet50", (True, (3, 4, 23)): "resnet101"}
    try:
        found = {
            "arch": next(name for (bottleneck, blocks), name in kinds.items() if bottleneck == (body + "layer1.0.conv3.weight" in state)
                         and list(blocks[:len(stages)]) == stages != []),
            "backbone_norm": "bn" if any(k.startswith("backbone.") and k.endswith("num_batches_tracked") for k in state) else "frozen",
            "num_queries": state["query_embed.weight"].shape[0],
            "hidden_dim": state["query_embed.weight"].shape[1] // (2 if deformable else 1),
            "enc_layers": _count(state, "transformer.encoder.layers."),
            "dec_layers": _count(state, "transformer.decoder.layers."),
            "dim_feedforward": state["transformer.encoder.layers.0.linear1.weight"].shape[0],
        }
    except (KeyError, ValueError, StopIteration) as error:
        raise UserError(f"{path}: a detector's checkpoint that lacks parts, or whose backbone is none of {', '.join(kinds.values())}") from error
    if deformable:
        levels = state["transformer.level_embed"].shape[0]
        return found | {"detector": "deformable_detr_ss" if levels == 1 else "deformable_detr", "num_feature_levels": levels,
                        "with_box_refine": "transformer.decoder.bbox_embed.0.layers.0.weight" in state}
    found["stride"] = 2 ** (1 + max(i for i in (1, 2, 3, 4) if f"{body}layer{i}.0.conv1.weight" in state))
    if "transformer.decoder.ref_point_head.layers.0.weight" in state:
        return found | {"detector": "conditional_detr"}
    return found | {"detector": "detr", "pre_norm": "transformer.encoder.norm.weight" in state}
