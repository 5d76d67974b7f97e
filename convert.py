"""Checkpoints of other code bases: recognised by their content, read safely, named as here.

Our names are the released DETReg / Deformable DETR names, so those files need no renaming; backbone files differ in their prefix only.
"""
from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

import common
from common import UserError

# Where each family keeps a ResNet: name, prefix of its keys. The first that fits counts.
BACKBONES = (
    ("SwAV ResNet", "module."),
    ("MoCo encoder", "module.encoder_q."),
    ("detector", "backbone.0.body."),
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


def load_backbone(body: nn.Module, path: str | Path) -> None:
    """Fill a ResNet body (conv1, bn1, layer1..) from a SwAV, MoCo, torchvision, DETR-family or own checkpoint; strict, and prints what it left."""
    state = state_of(read_checkpoint(path), path)
    found = [(name, prefix) for name, prefix in BACKBONES if prefix + "conv1.weight" in state]
    if not found:
        raise UserError(f"{path}: no ResNet found in it; known are " + ", ".join(f"{n} ({p}conv1.weight)" for n, p in BACKBONES))
    name, prefix = found[0]
    parts = tuple(prefix + part for part in ("conv1", "bn1", "layer"))
    tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(parts)}
    stages = tuple(f"{child}." for child, _ in body.named_children())
    drop = {r"^layer\d\.": "a later stage that is not used"} if not all(k.startswith(stages) for k in tensors) else {}
    drop = {rf"^(?!{'|'.join(stages)})": "a later stage that is not used"} if drop else {}
    drop[r"num_batches_tracked$"] = "a counter that only momentum-free BatchNorm reads"
    common.load_matching(body, tensors, drop=drop, source=f"{path} ({name})")


# Of a detector's state dict alone: how it was built. Heads cannot be read off shapes; every released checkpoint has 8.
def architecture(state: dict[str, Tensor], path: str | Path) -> dict:
    """Flags of the Deformable DETR a state dict belongs to (names as in finetune.py); UserError when it is none."""
    if "transformer.level_embed" not in state or "query_embed.weight" not in state:
        known = next((f"a {name}" for name, prefix in BACKBONES if prefix + "conv1.weight" in state), "an unknown model")
        known = "a DETR" if "query_embed.weight" in state else known
        hint = "; give a bare backbone with --backbone_weights" if "ResNet" in known or "MoCo" in known else ""
        raise UserError(f"{path}: this is {known} checkpoint, not a Deformable DETR or DETReg one (no transformer.level_embed){hint}")

    def count(prefix: str) -> int:
        return 1 + max(int(k[len(prefix):].split(".")[0]) for k in state if k.startswith(prefix))

    body = "backbone.0.body."
    kinds = {(False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34",
             (True, (3, 4, 6, 3)): "resnet50", (True, (3, 4, 23, 3)): "resnet101"}
    try:
        return {
            "arch": kinds[body + "layer1.0.conv3.weight" in state, tuple(count(f"{body}layer{i}.") for i in (1, 2, 3, 4))],
            "backbone_norm": "bn" if any(k.endswith("num_batches_tracked") for k in state) else "frozen",
            "num_queries": state["query_embed.weight"].shape[0],
            "hidden_dim": state["query_embed.weight"].shape[1] // 2,
            "num_feature_levels": state["transformer.level_embed"].shape[0],
            "enc_layers": count("transformer.encoder.layers."),
            "dec_layers": count("transformer.decoder.layers."),
            "dim_feedforward": state["transformer.encoder.layers.0.linear1.weight"].shape[0],
            "with_box_refine": "transformer.decoder.bbox_embed.0.layers.0.weight" in state,
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: a Deformable DETR checkpoint that lacks parts, or whose backbone is none of {', '.join(kinds.values())}") from error
