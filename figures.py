"""The papers' figures, from a checkpoint; one subcommand each.

    python figures.py localize --checkpoint out/updetr-imagenet/last.pt --image IMAGE --patches 10,20,110,140 200,50,320,210
        UP-DETR, Fig. 5: where the pretrained model finds query patches, without any fine-tuning. The patches are cut from the image itself, or from
        --patch_image: the same object in another picture. Boxes below the confidence --threshold (paper: 0.9) are not drawn; every result is printed.

Deviations of `localize` (paper / released notebook / here): the threshold is 0.9 / none / 0.9; patches: not said / recoloured / as they are.
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torchvision.ops import box_convert

import convert
import data
import evaluation
import updetr
from common import UserError

PLAIN = {"order": [], "gray": False, "blur": None, "solarize": False}        # colours as they are


# ==== UP-DETR, Fig. 5 ====

def load_updetr(path: str, num_patches: int) -> tuple[updetr.UPDETR, int]:
    """A pretrained UP-DETR, ours or released, and the side of its query patches. num_patches: M of a file that does not say it."""
    checkpoint = convert.read_checkpoint(path)
    state = convert.detector_state(checkpoint, path)
    config = checkpoint.get("config") if isinstance(checkpoint.get("config"), dict) else {}
    script = checkpoint.get("script", "updetr")
    if "patch2query.weight" not in state or script != "updetr":
        what = f" but of {script}.py" if "patch2query.weight" in state else " (no patch2query: it was fine-tuned, or is another method's)"
        raise UserError(f"{path}: not a checkpoint of UP-DETR's pretraining{what}")
    cfg = SimpleNamespace(**{"nheads": 8, "dropout": 0.0, "lr_backbone": 0.0, **convert.architecture(state, path)})
    cfg.nheads, num_patches = config.get("nheads", cfg.nheads), config.get("num_patches", min(num_patches, cfg.num_queries))
    if cfg.num_queries % num_patches:
        raise UserError(f"--num_patches {num_patches}: {path} has {cfg.num_queries} queries, which do not divide into so many groups")
    model = updetr.UPDETR(common.build_detector(cfg, 3, focal=False), num_patches, config.get("attention_mask", True),
                          "feature_align.layers.0.weight" in state)
    common.load_matching(model, state, drop={}, source=path)
    return model.eval(), config.get("patch_size", 128)


@torch.no_grad()
def find(model: updetr.UPDETR, patch_size: int, image: Image.Image, origin: Image.Image, boxes: list[tuple[float, ...]], size: int
         ) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (scores [n], boxes_xyxy [n, 4] px of `image`) of the patches that `boxes` (xyxy px) cut out of `origin`, at most M in one pass."""
    height, width = data.resized_hw((image.height, image.width), size)
    tensor = data.to_normalized_tensor(image.resize((width, height), Image.Resampling.BILINEAR))[None]
    patches = torch.stack([data.cut_patch(origin, box, patch_size, PLAIN) for box in boxes])
    scores, found = [], []
    for part in patches.split(model.num_patches):
        outputs = model(tensor, torch.zeros(1, height, width, dtype=torch.bool), part[None])
        score, box, _ = evaluation.most_confident(outputs["pred_logits"], outputs["pred_boxes"], len(part))
        scores.append(score[0])
        found.append(box[0])
    return torch.cat(scores), box_convert(torch.cat(found), "cxcywh", "xyxy") * torch.tensor([image.width, image.height] * 2)


def parse_box(text: str) -> tuple[float, ...]:
    try:
        box = tuple(float(v) for v in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(round(box[2]) - round(box[0]), round(box[3]) - round(box[1])) < 1:
        raise UserError(f"--patches {text}: a patch is x1,y1,x2,y2 in pixels, with x1 < x2 and y1 < y2")
    return box


def localize(args: argparse.Namespace) -> dict[str, Any]:
    """Draw args.out; returns {"scores" [n], "boxes" [n, 4] xyxy px}."""
    for path in (args.image, args.patch_image):
        if path and not Path(path).is_file():
            raise UserError(f"{path}: no such image file")
    try:
        image = data.decode_image(args.image)
        origin = data.decode_image(args.patch_image) if args.patch_image else image
    except data.UnreadableImage as error:
        raise UserError(str(error)) from error
    boxes = [parse_box(text) for text in args.patches]
    for text, (x1, y1, x2, y2) in zip(args.patches, boxes):
        if x1 < 0 or y1 < 0 or x2 > origin.width or y2 > origin.height:
            raise UserError(f"--patches {text}: reaches out of {args.patch_image or args.image}, which is {origin.width} x {origin.height} pixels")
    if args.num_patches < 1:
        raise UserError(f"--num_patches {args.num_patches}: must be at least 1")
    model, patch_size = load_updetr(args.checkpoint, args.num_patches)
    scores, found = find(model, patch_size, image, origin, boxes, args.size)
    for text, score, box in zip(args.patches, scores.tolist(), found.tolist()):
        place = ", ".join(f"{v:.0f}" for v in box)
        common.say(f"patch {text}: confidence {score:.3f} at {place}" + ("" if score > args.threshold else " (not drawn)"))
    sure = scores > args.threshold
    shown = torch.where(sure[:, None], found, float("nan"))                  # colours stay those of the patches
    names = [str(i + 1) for i in range(len(boxes))]
    columns = {"query patches": [(torch.tensor(boxes), names, origin)],
               f"found (confidence > {args.threshold:g})": [(shown, [f"{n}: {s:.2f}" for n, s in zip(names, scores.tolist())])]}
    evaluation.draw_boxes_figure(args.out, [image], columns, max_boxes=len(boxes))
    common.say(f"wrote {args.out}: {int(sure.sum())} of {len(boxes)} patches found with confidence > {args.threshold:g}")
    return {"scores": scores, "boxes": found}


# ==== Main ====

def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="figures.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="FIGURE")
    command = commands.add_parser("localize", help="UP-DETR, Fig. 5: find query patches in an image")
    command.set_defaults(run=localize)
    command.add_argument("--checkpoint", required=True, help="last.pt of updetr.py, or the released file")
    command.add_argument("--image", required=True, help="where to look")
    command.add_argument("--patches", required=True, nargs="+", metavar="X1,Y1,X2,Y2", help="what to look for: boxes in pixels")
    command.add_argument("--patch_image", "--patch-image", help="the image the patches are cut from (default: --image)")
    command.add_argument("--threshold", type=float, default=0.9, help="least confidence of a box that is drawn (default: 0.9)")
    command.add_argument("--size", type=int, default=420, help="short side the image is resized to, pixels (default: 420, released)")
    command.add_argument("--num_patches", "--num-patches", type=int, default=10, help="M of a file that does not say it (default: 10, released)")
    command.add_argument("--out", type=Path, default=Path("out/localize.png"), help="picture to write (default: out/localize.png)")
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    common.cli(main)
