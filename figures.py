"""The papers' figures and analyses, from a checkpoint; one subcommand each.

    python figures.py localize --checkpoint out/updetr-imagenet/last.pt --image IMAGE --patches 10,20,110,140 [...]
        UP-DETR, Fig. 5: where the pretrained model finds query patches, without any fine-tuning. The patches are cut
        from the image itself, or from --patch_image: the same object in another picture. Boxes below the confidence
        --threshold (paper: 0.9) are not drawn; every result is printed.

    python figures.py iou-similarity --checkpoint dupr=out/dupr-imagenet/last.pt moco_v2_200 random --data coco
        DUPR (arXiv 2103.04814), Sec. 4.7, Fig. 5: how alike the conv4 features of an object and of boxes around it are,
        by their IoU. A detector wants a steep curve.
    python figures.py affinity --checkpoint dupr=out/dupr-imagenet/last.pt moco_v2_200 --data coco
        DUPR, Fig. 9: to which place of an object in view 1 each of its places in view 2 is most alike, on conv5. Ideal:
        the identity.
    python figures.py match --checkpoint dupr=out/dupr-imagenet/last.pt moco_v2_200 --data imagenet
        DUPR, Fig. 10: which conv4 patch of view 2 is most alike to each patch of view 1, and how far that is from the
        true one.
    python figures.py neighbours --checkpoint dupr=out/dupr-imagenet/last.pt moco_v2_200 --data imagenet
        DUPR, Sec. 4.8, Fig. 6: the images whose conv5 maps are most alike to a query's, place by place.

    python figures.py slots --checkpoint supervised=FILE detreg=out/detreg-imagenet/last.pt --data coco
        DETReg (arXiv 2106.04550), Fig. 4: where each query's boxes lie, coloured by size and shape.
    python figures.py gradients --checkpoint out/detreg-imagenet/last.pt --image A.jpg B.jpg
        DETReg, Fig. 5: which pixels the predicted x, y, w, h and the embedding z depend on.
    python figures.py boxes --checkpoint detreg=FILE updetr=FILE --image A.jpg B.jpg
        DETReg, Fig. 1; Siamese DETR (arXiv 2303.18144), Figs. 5, 11: the best boxes of several checkpoints.
    python figures.py attention --checkpoint siamese=FILE updetr=FILE --image A.jpg B.jpg
        Siamese DETR, Figs. 5, 11: where the decoder's best queries look; of Deformable DETR the sampling points.
    python figures.py ap-iou siamese=out/finetune-coco updetr=out/finetune-updetr
        Siamese DETR, Fig. 4: AP of fine-tuned runs over the IoU threshold, by size of the objects.

    python figures.py curves [DETR=]out/finetune-a [UP-DETR=]out/finetune-b [--keys loss AP50] [--over labels_percent]
        Several runs side by side, from their log.jsonl: a panel per quantity, a colour per run (UP-DETR, Figs. 1, 3, 4,
        6). --over: their final metrics over a flag instead, runs of one NAME in one line (DETReg, Fig. 3).
    python figures.py mean out/finetune-seed1 out/finetune-seed2 [...]
        Mean and standard deviation of the runs' metrics, for example of seeds (DETReg, Table 4).

DUPR's four take any file with a ResNet in it, and the names of --backbone_weights (DUPR's baseline: moco_v2_200, of as
many epochs as the paper's DUPR); all see the same images and draws.
NAME=FILE names a checkpoint; else it is called as its file or, when that is last.pt, as its folder. Each command writes
a picture and, beside it, its numbers as json. What the figures of detectors choose where their papers are silent:
detector_figures.py.

Deviations of `localize` (paper / released notebook / here):
    threshold       0.9 / none / 0.9
    patches         not said / recoloured / as they are

Choices where DUPR's paper is silent (paper / here):
    images          with boxes: 1000 of ImageNet val; else not said / of any set, drawn by --seed
    iou-similarity  input: not said / short side 448 px, the long one at most twice that
                    S: not said / 14
                    RoIs: "20 with different IoUs" per image / per object, one in each IoU bin of width 0.05: its box
                    shifted and scaled until it falls into the bin, inside the image
    affinity        object: ImageNet's / the largest of an image
                    crop: keeps its box whole / and covers 20..100 % of the image, as MoCo's, or all where 100 draws cut
                    the box
                    in numbers: not done / mean of the diagonal, share of columns with their maximum on it
    match           views: "the settings in [17]", MoCo / MoCo v2's, from which DUPR learns
                    in numbers: not done / over all patches whose true place lies in view 2, the share found within
                    1 patch of it and the median distance, centre to centre (a ResNet's map lies up to half a cell to
                    the left: measured 0.3 patches in flipped pairs); `shuffled`: view 2 of the image before, what the
                    place alone gives
    neighbours      input: not said / 224 px centre, short side 256
                    "normalised conv5 map" / Eq. (8): mean over positions of the cosines
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import argparse
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_convert, box_iou, roi_align

import convert
import curves
import data
import detector_figures
import detectors
import dupr
import evaluation
import run
import updetr
from annotations import DetectionSet, open_detection
from common import UserError

NO_AUGMENTATION = {"order": [], "gray": False, "blur": None, "solarize": False}  # for data.apply_photometric
STAGES = {"conv4": (3, 16), "conv5": (4, 32)}  # DUPR's name: torchvision's layer, stride
COLOURS = dupr.COLOURS
CROP_AREA = (0.2, 1.0)  # MoCo v2
S = 14  # side of a region's grid of features
BINS = 20  # bins of IoU
MIN_SIDE = 16  # px: an image or view below it shows nothing
SHOWN = 4  # images of a picture

# ==== 1. UP-DETR, Fig. 5 ====


def load_updetr(path: str, num_patches: int) -> tuple[updetr.UPDETR, int]:
    """A pretrained UP-DETR, ours or released, and the side of its query patches. num_patches: M of a file that does not
    say it."""
    found = convert.open_checkpoint(path)
    state, config = found.state, found.config
    if "patch2query.weight" not in state or found.method != "updetr":
        what = (f" but of {found.method}.py" if "patch2query.weight" in state
                else " (no patch2query: it was fine-tuned, or is another method's)")
        raise UserError(f"{path}: not a checkpoint of UP-DETR's pretraining{what}")
    others = {"nheads": 8, "dropout": 0.0, "lr_backbone": 0.0, "num_feature_levels": 1}  # of DETR one, and not said
    cfg = SimpleNamespace(**others | found.architecture())
    num_patches = config.get("num_patches", min(num_patches, cfg.num_queries))
    if cfg.num_queries % num_patches:
        raise UserError(f"--num_patches {num_patches}: {path} has {cfg.num_queries} queries, "
                        "which do not divide into so many groups")
    detector = detectors.build_detector(cfg, 3, focal=False)
    model = updetr.UPDETR(detector, num_patches, config.get("attention_mask", True),
                          "feature_align.layers.0.weight" in state)
    convert.load_matching(model, state, drop={}, source=path)
    return model.eval(), config.get("patch_size", 128)


@torch.no_grad()
def find_patches(model: updetr.UPDETR, patch_size: int, image: Image.Image, origin: Image.Image,
                 boxes: list[tuple[float, ...]], size: int) -> tuple[Tensor, Tensor]:
    """-> (scores [n], boxes_xyxy [n, 4] px of `image`) of the patches that `boxes` (xyxy px) cut out of `origin`, at
    most M in one pass."""
    height, width = data.resized_hw((image.height, image.width), size)
    tensor = data.to_normalized_tensor(image.resize((width, height), Image.Resampling.BILINEAR))[None]
    patches = torch.stack([data.cut_patch(origin, box, patch_size, NO_AUGMENTATION) for box in boxes])
    scores, found = [], []
    for part in patches.split(model.num_patches):
        outputs = model(tensor, torch.zeros(1, height, width, dtype=torch.bool), part[None])
        score, box, _ = evaluation.most_confident(outputs["pred_logits"], outputs["pred_boxes"], len(part))
        scores.append(score[0])
        found.append(box[0])
    boxes_xyxy = box_convert(torch.cat(found), "cxcywh", "xyxy") * torch.tensor([image.width, image.height] * 2)
    return torch.cat(scores), boxes_xyxy


def parse_box(text: str) -> tuple[float, ...]:
    try:
        box = tuple(float(v) for v in text.split(","))
    except ValueError:
        box = ()
    if (len(box) != 4 or not all(map(math.isfinite, box))
        or min(round(box[2]) - round(box[0]), round(box[3]) - round(box[1])) < 1):
        raise UserError(f"--patches {text}: a patch is x1,y1,x2,y2 in pixels, with x1 < x2 and y1 < y2")
    return box


def localize(args: argparse.Namespace) -> dict[str, Any]:
    """Draw args.out; returns {"scores" [n], "boxes" [n, 4] xyxy px}."""
    pictures = detector_figures.read_pictures([path for path in (args.image, args.patch_image) if path])
    image, origin = pictures[args.image], pictures[args.patch_image or args.image]
    boxes = [parse_box(text) for text in args.patches]
    for text, (x1, y1, x2, y2) in zip(args.patches, boxes):
        if x1 < 0 or y1 < 0 or x2 > origin.width or y2 > origin.height:
            raise UserError(f"--patches {text}: reaches out of {args.patch_image or args.image}, "
                            f"which is {origin.width} x {origin.height} pixels")
    if args.num_patches < 1:
        raise UserError(f"--num_patches {args.num_patches}: must be at least 1")
    model, patch_size = load_updetr(args.checkpoint, args.num_patches)
    scores, found = find_patches(model, patch_size, image, origin, boxes, args.size)
    for text, score, box in zip(args.patches, scores.tolist(), found.tolist()):
        place = ", ".join(f"{v:.0f}" for v in box)
        drawn = "" if score > args.threshold else " (not drawn)"
        run.print_rank0(f"patch {text}: confidence {score:.3f} at {place}{drawn}")
    sure = scores > args.threshold
    shown = torch.where(sure[:, None], found, float("nan"))  # colours stay those of the patches
    names = [str(i + 1) for i in range(len(boxes))]
    labels = [f"{name}: {score:.2f}" for name, score in zip(names, scores.tolist())]
    evaluation.draw_rows(args.out, ("query patches", f"found (confidence > {args.threshold:g})"),
                         [[(origin, torch.tensor(boxes), names), (image, shown, labels)]], max_boxes=len(boxes))
    run.print_rank0(f"wrote {args.out}: {int(sure.sum())} of {len(boxes)} patches found "
                    f"with confidence > {args.threshold:g}")
    return {"scores": scores, "boxes": found}


# ==== 2. DUPR: backbones, images, equations ====


def open_backbones(args: argparse.Namespace, stage: str) -> dict[str, common.Backbone]:
    """--checkpoint -> {name: a ResNet that returns `stage`, BatchNorm with constant statistics}. `random` is as deep as
    --arch or the first file."""
    found: dict[str, tuple[str | None, dict, str]] = {}
    layer = STAGES[stage][0]
    for text in args.checkpoint:
        name, weights = convert.name_checkpoint(text)
        path = convert.backbone_file(weights, args.arch or "resnet50")
        if name in found:
            raise UserError(f"--checkpoint {text}: another one is called {name} too; "
                            f"give it a name with NAME={weights}")
        found[name] = (None, {}, "random")
        if weights != "random":
            file = convert.open_checkpoint(path)
            state = file.resnet()
            if f"layer{layer}.0.conv1.weight" not in state:
                raise UserError(f"{path}: its ResNet ends before {stage}, at which this figure looks; "
                                "give a checkpoint that has it")
            found[name] = (convert.resnet_name(state, "", path), state, f"{path} ({file.what})")
    default = args.arch or next((arch for arch, _, _ in found.values() if arch), "resnet50")
    backbones = {}
    for name, (arch, state, source) in found.items():
        torch.manual_seed(args.seed)
        backbone = common.Backbone(arch or default, (layer,), "frozen", trainable=0)
        if arch:  # later stages and the counters of batches play no part
            used = {child for child, _ in backbone.body.named_children()}
            state = {k: v for k, v in state.items()
                     if k.split(".")[0] in used and not k.endswith("num_batches_tracked")}
            convert.load_matching(backbone.body, state, drop={}, source=source)
        backbones[name] = backbone.eval().to(args.device)
    return backbones


def region_features(feature: Tensor, boxes: Sequence[Tensor], stage: str) -> Tensor:
    """RoIAlign of `boxes`, [n, 4] xyxy px of the input per image of `feature` -> [all n, C, S * S], positions row by
    row."""
    return roi_align(feature, [b.to(feature) for b in boxes], S, 1 / STAGES[stage][1], sampling_ratio=-1,
                     aligned=True).flatten(2)


def iou_similarity(q: Tensor, k: Tensor) -> Tensor:
    """Eq. (8): mean over positions of the cosines of features [..., C, P]. [...]"""
    return (F.normalize(q, dim=-2) * F.normalize(k, dim=-2)).sum(-2).mean(-1)  # Eq. (8)


def cosines(f1: Tensor, f2: Tensor) -> Tensor:
    """sim of Eq. (9): features [C, P1], [C, P2] -> [P1, P2]."""
    return F.normalize(f1, dim=0).T @ F.normalize(f2, dim=0)  # Eq. (9): sim


def affinity(f1: Tensor, f2: Tensor, tau: float) -> Tensor:
    """Eq. (9): [P1, P2]. The softmax runs over the positions of view 1: every column sums to 1."""
    return (cosines(f1, f2) / tau).softmax(0)  # Eq. (9)


def match(f1: Tensor, f2: Tensor) -> Tensor:
    """Fig. 10: the position of f2 [C, P2] that is most alike to each of f1 [C, P1]. int64 [P1]"""
    return cosines(f1, f2).argmax(1)


def sample_images(source: Any, candidates: Sequence[int], count: int, args: argparse.Namespace
                  ) -> Iterator[tuple[int, Any]]:
    """(index, what source.load gives) of up to `count` of the `candidates`, in an order drawn from the seed; unusable
    files are left out."""
    order = np.random.default_rng(args.seed).permutation(candidates).tolist()
    skipped = run.SkipCount(len(source))
    bar = run.progress(None, total=min(count, len(order)), desc=args.figure)
    for index in order:
        try:
            loaded = source.load(index)
            if isinstance(loaded, Image.Image) and min(loaded.size) < MIN_SIDE:
                raise data.UnreadableImage(source.key(index), f"{loaded.width} x {loaded.height} pixels, "
                                           f"at least {MIN_SIDE} a side are needed")
        except data.UnreadableImage as error:
            skipped.add([str(error)])
            continue
        bar.update()
        yield index, loaded
        if bar.n == bar.total:
            break
    bar.close()
    skipped.report()


def open_source(args: argparse.Namespace, least: int) -> Any:
    """Images without boxes, and at least so many."""
    split = "train" if args.split == "train" else "val"
    source = data.open_images(args.data, args.data_root, split=split, synthetic_images=args.images, seed=args.seed)
    if min(len(source), args.images) < least:
        raise UserError(f"--data {args.data}: {min(len(source), args.images)} images, at least {least} are needed; "
                        "give more, or a larger --images")
    return source


def open_objects(args: argparse.Namespace) -> tuple[DetectionSet, list[int]]:
    """A labelled set, and which of its images show an object; crowds, and what is marked as difficult, are none."""
    labelled = open_detection(args.data, args.data_root, args.split, synthetic_images=args.images, seed=args.seed,
                              exif=args.exif)
    labelled.print_notes()
    usable = [i for i, r in enumerate(labelled.records) if min(r.hw) >= MIN_SIDE and not (r.crowd | r.difficult).all()]
    if not usable:
        raise UserError(f"--data {args.data}: none of the {len(labelled)} images of its {args.split} split has a box "
                        "to look at; give another set")
    return labelled, usable


def write_numbers(args: argparse.Namespace, numbers: dict[str, Any], rows: dict[str, dict], title: str
                  ) -> dict[str, Any]:
    """Write the numbers beside the picture, print `rows`; returns what the json holds."""
    numbers = {"figure": args.figure, "data": args.data, "split": args.split, "seed": args.seed, "size": args.size,
               **numbers}
    path = args.out.with_suffix(".json")
    run.write_json(path, numbers)
    table = evaluation.metrics_table(rows, list(next(iter(rows.values()))), title)
    run.print_rank0(f"{table}\nwrote {args.out}, {path}")
    return numbers


# ==== 3. DUPR, Fig. 5: similarity by IoU ====


def sample_rois(rng: np.random.Generator, box: Tensor, hw: tuple[int, int], rounds: int = 20, tries: int = 2000
                ) -> tuple[Tensor, Tensor]:
    """One RoI in each IoU bin with `box` [4] xyxy px of an image of size hw: the box shifted and scaled, less or more,
    until it falls into the bin.

    Returns (boxes_xyxy float64 [n, 4] inside the image, their bins int64 [n]). A bin that rounds * tries draws do not
    reach is left out.
    """
    box = box.double().numpy()
    limit = np.array(hw[::-1] * 2)
    centre, side = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    found = {}
    for _ in range(rounds):
        strength = rng.uniform(0, 1, (tries, 1))  # small ones for high IoUs
        middle = centre + side * strength * rng.uniform(-1, 1, (tries, 2))
        half = side * 10 ** (strength * rng.uniform(-1, 1, (tries, 2))) / 2
        rois = np.concatenate([middle - half, middle + half], 1)
        rois = rois[(rois >= 0).all(1) & (rois <= limit).all(1)]
        ious = box_iou(torch.from_numpy(box)[None], torch.from_numpy(rois))[0].numpy()
        bins, first = np.unique((ious * BINS).astype(int).clip(max=BINS - 1), return_index=True)
        found = dict(zip(bins.tolist(), rois[first])) | found  # the first that came stays
        if len(found) == BINS:
            break
    bins = sorted(found)
    return torch.from_numpy(np.array([found[k] for k in bins]).reshape(-1, 4)), torch.tensor(bins, dtype=torch.int64)


@torch.no_grad()
def draw_iou_similarity(args: argparse.Namespace) -> dict[str, Any]:
    """{"bins": edges [21], "counts": RoIs [20], "checkpoints": {name: {"similarity" [20], "above_0.5", "below_0.3",
    "difference"}}, ...}: the paper's two ranges, means over their bins, nan where there is none."""
    labelled, usable = open_objects(args)
    backbones = open_backbones(args, "conv4")
    sums = {name: torch.zeros(BINS).double() for name in backbones}
    counts = torch.zeros(BINS).long()
    images = objects = 0
    for index, (image, target) in sample_images(labelled, usable, args.images, args):
        images += 1
        rng = data.sample_rng(args.seed, 0, index)
        hw = image.height, image.width
        size = data.resized_hw(hw, args.size, 2 * args.size)
        tensor = data.to_normalized_tensor(image.resize(size[::-1], Image.Resampling.BILINEAR))[None].to(args.device)
        maps = {name: backbone(tensor)[0] for name, backbone in backbones.items()}
        for box in target["boxes_xyxy"][~target["ignore"]].double():  # one at a time: its 21 regions of conv4 are 17 MB
            rois, bins = sample_rois(rng, box, hw)
            boxes = data.resize_boxes(torch.cat([box[None], rois]), hw, size)
            counts[bins] += 1
            objects += 1
            for name, feature in maps.items():
                regions = region_features(feature, [boxes], "conv4")
                sums[name][bins] += iou_similarity(regions[:1], regions[1:]).cpu().double()
    edges = torch.arange(BINS + 1, dtype=torch.float64) / BINS
    found, rows = {}, {}
    for name, total in sums.items():
        values = total / counts
        high = values[edges[:-1] >= 0.5].nanmean().item()
        low = values[edges[1:] <= 0.3].nanmean().item()
        rows[name] = {"above_0.5": high, "below_0.3": low, "difference": high - low}
        found[name] = {"similarity": values.tolist(), **rows[name]}
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    curves.draw_curves(args.out, {name: list(zip(middles, row["similarity"])) for name, row in found.items()},
                       x_label="IoU of RoI and object", y_label="similarity, Eq. (8)", x_range=(0, 1))
    numbers = {"images": images, "objects": objects, "bins": edges, "counts": counts, "checkpoints": found}
    return write_numbers(args, numbers, rows, "similarity of RoI and object, Eq. (8), by their IoU: conv4, "
                         f"{objects} objects of {images} images")


# ==== 4. DUPR, Fig. 9: affinity of an object in two views ====


def draw_box_view(rng: np.random.Generator, hw: tuple[int, int], box: Tensor, size: int
                  ) -> tuple[dict[str, Any], Tensor]:
    """A view of an image of size hw that keeps `box` [4] xyxy px whole: (what dupr.apply_view does; the box in the
    view, px of its size x size)."""
    x1, y1, x2, y2 = box.tolist()
    area = max(CROP_AREA[0], (x2 - x1) * (y2 - y1) / math.prod(hw)), CROP_AREA[1]
    crops = (data.draw_crop(rng, hw, area) for _ in range(100))
    crop = next((c for c in crops if c[0] <= x1 and c[1] <= y1 and c[2] >= x2 and c[3] >= y2), (0, 0, *hw[::-1]))
    seen = data.resize_boxes(box - box.new_tensor(crop[:2] * 2), (crop[3] - crop[1], crop[2] - crop[0]), (size, size))
    return {"crop": crop, "colours": data.draw_photometric(rng, COLOURS), "flip": False}, seen


def heat_map(values: Tensor) -> Image.Image:
    """[h, w] in 0..1 -> from dark blue over green to yellow."""
    levels = (values.cpu() * 255).round().byte().numpy()
    return Image.fromarray(cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB))


@torch.no_grad()
def draw_affinity(args: argparse.Namespace) -> dict[str, Any]:
    """{"images", "checkpoints": {name: {"diagonal": its mean, "accuracy": share of columns whose maximum lies on it}},
    ...}, means over images."""
    if not 0 < args.tau < math.inf:
        raise UserError(f"--tau {args.tau}: must be above 0")
    labelled, usable = open_objects(args)
    backbones = open_backbones(args, "conv5")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in backbones}
    rows = []  # of the picture
    for index, (image, target) in sample_images(labelled, usable, args.images, args):
        rng = data.sample_rng(args.seed, 0, index)
        boxes = target["boxes_xyxy"][~target["ignore"]]
        box = boxes[(boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()]
        draws, rois = zip(*(draw_box_view(rng, (image.height, image.width), box, args.size) for _ in range(2)))
        views = torch.stack([dupr.apply_view(image, d, args.size) for d in draws]).to(args.device)  # [2, 3, H, W]
        matrices = {name: affinity(*region_features(b(views)[0], [r[None] for r in rois], "conv5"), args.tau)
                    for name, b in backbones.items()}
        for name, matrix in matrices.items():  # [S * S, S * S]
            right = matrix.argmax(0) == torch.arange(S * S, device=matrix.device)
            found[name].append((matrix.diagonal().mean().item(), right.float().mean().item()))
        if len(rows) < SHOWN:
            rows.append([(evaluation.to_image(view), roi, None) for roi, view in zip(rois, views.cpu())]
                        + [(heat_map(matrix), (), None) for matrix in matrices.values()])
    means = {name: dict(zip(("diagonal", "accuracy"), np.mean(values, 0).tolist())) for name, values in found.items()}
    titles = [f"{name}: {row['accuracy']:.1%} on the diagonal" for name, row in means.items()]
    evaluation.draw_rows(args.out, ("view 1", "view 2", *titles), rows)
    images = len(next(iter(found.values())))
    return write_numbers(args, {"images": images, "tau": args.tau, "checkpoints": means}, means,
                         f"affinity of an object's {S * S} places in two views, Eq. (9): conv5, {images} images")


# ==== 5. DUPR, Fig. 10: matching patches of two views ====


def true_places(boxes: Tensor, flips: Sequence[bool], size: int, grid: int) -> tuple[Tensor, Tensor]:
    """Where the grid x grid patches of view 1 lie in view 2, of size px both. boxes [2, 4] xyxy px: their overlap in
    each (dupr.overlap_boxes).

    Returns (x, y [grid * grid, 2] in patches: (j, i) is the centre of view 2's patch in row i, column j; whether they
    lie in view 2, bool).
    """
    stride = size / grid
    steps = torch.arange(grid, dtype=torch.float64)
    centres = (torch.cartesian_prod(steps, steps).flip(1) + 0.5) * stride  # x, y px of view 1, row by row
    first, second = boxes.double()
    share = (centres - first[:2]) / (first[2:] - first[:2])  # of the overlap's sides
    inside = ((share >= 0) & (share <= 1)).all(1)
    if flips[0] != flips[1]:
        share[:, 0] = 1 - share[:, 0]
    return (second[:2] + share * (second[2:] - second[:2])) / stride - 0.5, inside


def distances(best: Tensor, places: Tensor, grid: int) -> Tensor:
    """From the matched positions int64 [P] of a grid to the true places [P, 2], in patches. [P]"""
    return (torch.stack([best % grid, best // grid], 1) - places).norm(dim=1)


def match_numbers(found: list[Tensor]) -> dict[str, float]:
    joined = torch.cat(found)
    return {"within_1": (joined <= 1).double().mean().item(), "median_distance": joined.median().item()}


def draw_lines(views: Sequence[Image.Image], patches: Tensor, best: Tensor, off: Tensor, grid: int) -> Image.Image:
    """View 1 beside view 2, and lines from some `patches` to where they were found; cyan: at most 1 patch off, yellow:
    3, red: more."""
    size, gap = views[0].width, 12
    sheet = Image.new("RGB", (2 * size + gap, size), "white")
    sheet.paste(views[0], (0, 0))
    sheet.paste(views[1], (size + gap, 0))
    draw = ImageDraw.Draw(sheet)
    stride = size / grid
    for p, q, distance in zip(patches.tolist(), best[patches].tolist(), off[patches].tolist()):
        ends = [((k % grid + 0.5) * stride + shift, (k // grid + 0.5) * stride)
                for k, shift in ((p, 0), (q, size + gap))]
        colour = "#42d4f4" if distance <= 1 else "#ffe119" if distance <= 3 else "#e6194b"
        draw.line(ends, colour, 3)
        for end in ends:
            draw.circle(end, 5, colour, "black")
    return sheet


@torch.no_grad()
def draw_match(args: argparse.Namespace) -> dict[str, Any]:
    """{"images", "patches", "checkpoints": {name: {"within_1", "median_distance", "shuffled": the same with view 2 of
    another image}}, ...}."""
    source = open_source(args, least=2)
    backbones = open_backbones(args, "conv4")
    grid = args.size // STAGES["conv4"][1]
    right, wrong = ({name: [] for name in backbones} for _ in range(2))  # distances
    rows = []  # of the picture
    before: dict[str, Tensor] = {}
    for index, image in sample_images(source, range(len(source)), args.images, args):
        rng = data.sample_rng(args.seed, 0, index)
        draws = [dupr.draw_view(rng, (image.height, image.width), CROP_AREA, COLOURS) for _ in range(2)]
        flips = [d["flip"] for d in draws]
        boxes, valid = dupr.overlap_boxes([d["crop"] for d in draws], flips, args.size)
        places, inside = true_places(boxes, flips, args.size, grid)
        if not valid or not inside.any():
            continue
        views = torch.stack([dupr.apply_view(image, d, args.size) for d in draws]).to(args.device)  # [2, 3, H, W]
        shown = torch.from_numpy(rng.permutation(inside.nonzero()[:, 0].numpy())[:20])
        cells = []
        for name, backbone in backbones.items():
            f1, f2 = backbone(views)[0].flatten(2)  # [C, grid * grid]
            best = match(f1, f2).cpu()
            off = distances(best, places, grid)
            right[name].append(off[inside])
            if name in before:
                wrong[name].append(distances(match(f1, before[name]).cpu(), places, grid)[inside])
            before[name] = f2
            if len(rows) < SHOWN:
                pictures = [evaluation.to_image(view) for view in views.cpu()]
                cells.append((draw_lines(pictures, shown, best, off, grid), (), None))
        if cells:
            rows.append(cells)
    first = right[next(iter(right))]
    if len(first) < 2:
        raise UserError(f"--data {args.data}: the views of only {len(first)} images overlap, but 2 are needed; "
                        "give more --images or another --seed")
    found = {name: {**match_numbers(right[name]), "shuffled": match_numbers(wrong[name])} for name in backbones}
    titles = [f"{name}: {row['within_1']:.1%} within 1 patch (cyan; yellow: 3)" for name, row in found.items()]
    evaluation.draw_rows(args.out, tuple(titles), rows)
    patches = sum(map(len, first))
    table = {f"{name}{what}": {k: row[k] for k in ("within_1", "median_distance")}
             for name, numbers in found.items() for what, row in (("", numbers), (", shuffled", numbers["shuffled"]))}
    numbers = {"images": len(first), "patches": patches, "grid": grid, "checkpoints": found}
    return write_numbers(args, numbers, table, "patches of view 1 found in view 2 (distances in patches): conv4, "
                         f"{patches} patches of {len(first)} images")


# ==== 6. DUPR, Fig. 6: nearest neighbours ====


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central size x size of an image whose short side is 256 / 224 of it."""
    height, width = data.resized_hw((image.height, image.width), round(size * 256 / 224))
    x, y = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((x, y, x + size, y + size))


def map_similarity(q: Tensor, k: Tensor) -> Tensor:
    """Eq. (8) of all pairs of maps [Q, C, P], [K, C, P]. [Q, K]"""
    return F.normalize(q, dim=1).flatten(1) @ F.normalize(k, dim=1).flatten(1).T / q.shape[2]  # Eq. (8)


def same_folder(keys: dict[int, str], neighbours: dict[int, list[int]]) -> float | None:
    """Share of neighbours {query: indices} from the query's class folder, over queries whose folder holds other images
    too. keys: all that was searched. None where there is nothing to count, or folders are not ImageNet's (n01440764,
    ...)."""
    folders = {index: Path(key).parent.name for index, key in keys.items()}
    if not all(re.fullmatch(r"n\d{8}", folder) for folder in folders.values()):
        return None
    sizes = Counter(folders.values())
    hits = [folders[n] == folders[q] for q, near in neighbours.items() if sizes[folders[q]] > 1 for n in near]
    return sum(hits) / len(hits) if hits else None


def draw_neighbour_rows(args: argparse.Namespace, source: Any, queries: list[dict], names: list[str]) -> None:
    """Fig. 6: per query and checkpoint a row, the query and its neighbours with their similarity."""
    def cell(index: int, text: str) -> tuple:
        image = centre_crop(source.load(index), args.size).resize((evaluation.TILE,) * 2)
        draw = ImageDraw.Draw(image)
        draw.rectangle([0, image.height - 22, image.width, image.height], "black")
        draw.text((image.width / 2, image.height - 11), text, "white", ImageFont.load_default(14), anchor="mm")
        return image, (), None

    cells = [[cell(row["index"], name), *(cell(n["index"], f"{n['similarity']:.3f}") for n in row["neighbours"][name])]
             for row in queries for name in names]
    titles = ("query", *(f"neighbour {i + 1}" for i in range(args.top)))
    evaluation.draw_rows(args.out, titles, cells)


@torch.no_grad()
def draw_neighbours(args: argparse.Namespace) -> dict[str, Any]:
    """{"images", "queries": [{"index", "key", "neighbours": {name: [{"index", "key", "similarity"}]}}], "checkpoints":
    {name: {"similarity": mean of the neighbours', "same_folder"}}, ...}. Images go by in chunks, only the queries' maps
    are kept: with 100,000 numbers each, all are too many."""
    if min(args.top, args.queries) < 1:
        raise UserError(f"--top {args.top}, --queries {args.queries}: both must be at least 1")
    source = open_source(args, least=max(args.top + 1, args.queries))
    backbones = open_backbones(args, "conv5")

    def chunks(count: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        loaded = sample_images(source, range(len(source)), count, args)
        while chunk := list(itertools.islice(loaded, 16)):
            tensors = [data.to_normalized_tensor(centre_crop(image, args.size)) for _, image in chunk]
            batch = torch.stack(tensors).to(args.device)
            yield [index for index, _ in chunk], {name: b(batch)[0].flatten(2) for name, b in backbones.items()}

    maps = {name: [] for name in backbones}
    for _, features in chunks(args.queries):  # the first of those below
        for name, feature in features.items():
            maps[name].append(feature)
    indices = []
    parts = {name: [] for name in backbones}  # of the similarities [queries, images]
    for some, features in chunks(args.images):
        indices += some
        for name, feature in features.items():
            parts[name].append(map_similarity(torch.cat(maps[name]), feature).cpu())
    keys = {i: source.key(i) for i in indices}
    queries = indices[:args.queries]
    rows: list[dict[str, Any]] = [{"index": q, "key": keys[q], "neighbours": {}} for q in queries]
    means = {}
    for name in backbones:
        similarity = torch.cat(parts[name], 1).fill_diagonal_(-math.inf)  # [queries, images]; not itself
        values, places = similarity.topk(args.top)
        near = [[indices[p] for p in line] for line in places.tolist()]
        for row, found, scores in zip(rows, near, values.tolist()):
            row["neighbours"][name] = [{"index": i, "key": keys[i], "similarity": score}
                                       for i, score in zip(found, scores)]
        means[name] = {"similarity": values.mean().item(), "same_folder": same_folder(keys, dict(zip(queries, near)))}
    draw_neighbour_rows(args, source, rows[:SHOWN], list(backbones))
    numbers = {"images": len(indices), "top": args.top, "checkpoints": means, "queries": rows}
    return write_numbers(args, numbers, means, f"top-{args.top} neighbours of {len(queries)} queries among "
                         f"{len(indices)} images, means: conv5")


# ==== 7. Runs side by side ====

# Of what is logged, what says most about a run.
KEYS = ("loss", "lr", "AP", "AP50", "VOC07_AP50", "AP_mask", "looking", "images_per_s")


def open_runs(texts: list[str]) -> list[tuple[str, Path]]:
    """[NAME=]FOLDER, each once -> (name, folder); without NAME it is the folder's, with as much of the path before it
    as tells it from the others."""
    given = {Path(place).resolve(): name for name, place in map(convert.split_name, texts)}
    plain = [folder for folder, name in given.items() if not name]
    depth = next(k for k in itertools.count(1) if len({f.parts[-k:] for f in plain}) == len(plain))
    return [(name or "/".join(folder.parts[-depth:]), folder) for folder, name in given.items()]


def read_metrics(folder: Path) -> dict[str, float]:
    """All numbers with a point in a run's metrics.json; those of its tables as "ROW COLUMN", null as nan."""
    def numbers(metrics: dict, row: str = "") -> dict[str, float]:
        found = {}
        for key, value in metrics.items():
            if isinstance(value, dict):
                found |= numbers(value, f"{row}{key} ")
            elif isinstance(value, float) or value is None:
                found[row + key] = math.nan if value is None else value
        return found

    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder}: has no metrics.json; give the --out of runs that are finished")
    metrics = detector_figures.read_json(folder / "metrics.json")
    return numbers(metrics) if isinstance(metrics, dict) else {}


def choose_keys(args: argparse.Namespace, there: list[str], usual: list[str], where: str) -> list[str]:
    """--keys, else the usual ones of those that are there. UserError: one is not, or none is."""
    keys = args.keys or [key for key in usual if key in there]
    if missing := [key for key in keys if key not in there]:
        raise UserError(f"--keys {' '.join(missing)}: {where} that; there is {', '.join(there)}")
    if not keys:
        raise UserError(f"--keys: {where} {', '.join(usual)}; choose of {', '.join(there) or 'other runs'}")
    return keys


def draw_runs(args: argparse.Namespace) -> dict[str, Any]:
    """{"runs": {name: {"folder", "curves": {key: [(step, value)]}}}, ...}."""
    if args.over:
        return draw_over(args)
    runs = open_runs(args.runs)
    if twice := [name for name, count in Counter(name for name, _ in runs).items() if count > 1]:
        raise UserError(f"{twice[0]}: two runs are called so; give each a name with NAME=FOLDER, or --over KNOB")
    logs = {name: (folder, curves.read_log(folder / "log.jsonl")) for name, folder in runs}
    for folder, rows in logs.values():
        if not rows:
            raise UserError(f"{folder}: has no log.jsonl with a line in it; give the --out of runs that have begun")
    there = curves.keys_of([row for _, rows in logs.values() for row in rows], lambda key: key not in ("step", "epoch"))
    keys = choose_keys(args, there, list(KEYS), "none of these runs has logged")
    found = {name: {key: points for key in keys if (points := curves.curve_of(rows, key))}
             for name, (_, rows) in logs.items()}
    colours = {name: curves.COLOURS[i % len(curves.COLOURS)] for i, name in enumerate(found)}
    panels = [curves.panel_of(key, {name: of[key] for name, of in found.items() if key in of}, colours=colours)
              for key in keys]
    curves.draw_panels(args.out, panels)
    last = {run.printable(name): {"steps": curves.curve_of(logs[name][1], "step")[-1][1] + 1,
                                  **{key: f"{points[-1][1]:.4g}" for key, points in of.items()}}
            for name, of in found.items()}
    numbers = {"runs": {name: {"folder": str(logs[name][0]), "curves": of} for name, of in found.items()}}
    table = evaluation.metrics_table(last, ["steps", *keys], "last values")
    return detector_figures.write_numbers(args, numbers, table)


def draw_over(args: argparse.Namespace) -> dict[str, Any]:
    """curves --over: {"over", "runs": {name: {"folders", "curves": {key: [(value of the flag, mean of the metric)]}}}}.
    """
    found: dict[str, list[tuple[float, dict]]] = {}
    folders: dict[str, list[str]] = {}
    for name, folder in open_runs(args.runs):
        config = convert.open_checkpoint(folder).config
        value = config.get(args.over)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"--over {args.over}: {folder} has no number of that name among its flags")
        found.setdefault(name, []).append((value, read_metrics(folder)))
        folders.setdefault(name, []).append(str(folder))
    every = [set(metrics) for runs in found.values() for _, metrics in runs]
    keys = choose_keys(args, sorted(set.intersection(*every)), [key for key in KEYS if "AP" in key],
                       "not all of these runs have measured")

    def curve(name: str, key: str) -> list[tuple[float, float]]:
        values = sorted({value for value, _ in found[name]})
        return [(x, float(np.mean([metrics[key] for value, metrics in found[name] if value == x]))) for x in values]

    numbers = {name: {"folders": folders[name], "curves": {key: curve(name, key) for key in keys}} for name in found}
    curves.draw_panels(args.out, [curves.panel({name: of["curves"][key] for name, of in numbers.items()}, title=key,
                                               x_label=args.over) for key in keys])
    rows = {f"{run.printable(name)}, {args.over} {x:g}": {key: dict(of["curves"][key])[x] for key in keys}
            for name, of in numbers.items() for x, _ in of["curves"][keys[0]]}
    return detector_figures.write_numbers(args, {"over": args.over, "runs": numbers},
                                          evaluation.metrics_table(rows, keys))


def mean_of_runs(args: argparse.Namespace) -> dict[str, Any]:
    """{"runs": [folder], "metrics": {key: {"mean", "std": of a sample (n - 1), "values"}}}, of all metrics that the
    runs share."""
    if args.out.suffix != ".json":
        raise UserError(f"--out {args.out}: give a name that ends in .json")
    runs = open_runs(args.runs)
    if len(runs) < 2:
        raise UserError("a mean needs at least two different runs; give several output folders")
    found = [read_metrics(folder) for _, folder in runs]
    there = [key for key in found[0] if all(key in one for one in found)]
    usual = [key for key in there if " " not in key or key.startswith("pretrained ")]
    keys = choose_keys(args, there, usual, "not all of these runs have measured")
    values = {key: [one[key] for one in found] for key in (args.keys or there)}
    numbers = {key: {"mean": float(np.mean(some)), "std": float(np.std(some, ddof=1)), "values": some}
               for key, some in values.items()}
    names = [f"{i}: {run.printable(name)}" for i, (name, _) in enumerate(runs, 1)]
    rows = {key: {"mean": numbers[key]["mean"], "std": numbers[key]["std"], **dict(zip(names, values[key]))}
            for key in keys}
    run.write_json(args.out, {"figure": "mean", "runs": [str(folder) for _, folder in runs], "metrics": numbers})
    table = evaluation.metrics_table(rows, ["mean", "std", *names], f"{len(runs)} runs, std of a sample (n - 1)")
    run.print_rank0(f"{table}\nwrote {args.out}")
    return {"runs": [str(folder) for _, folder in runs], "metrics": numbers}


# ==== 8. Main ====


def add_analysis(commands: Any, figure: str, draw: Callable, text: str, images: int, size: int = 448
                 ) -> argparse.ArgumentParser:
    """A subcommand on backbones, with the flags that all of them have."""
    command = commands.add_parser(figure, help=text)
    command.set_defaults(draw=draw, figure=figure, check=check)
    command.add_argument("--checkpoint", required=True, nargs="+", metavar="[NAME=]FILE",
                         help=f"or {', '.join(convert.BACKBONES)}; any number")
    command.add_argument("--data", required=True,
                         help="as finetune.py's (iou-similarity, affinity) or dupr.py's (match, neighbours)")
    command.add_argument("--data_root", "--data-root",
                         help="where a named data set lies; else $DATA_ROOT, else data/<name>")
    command.add_argument("--exif", choices=("auto", "stored", "rotated"), default="auto",
                         help="pixels the boxes lie on: as stored, or as EXIF rotates them (default: auto)")
    command.add_argument("--split", choices=("test", "train"), default="test",
                         help="which part of a data set that has them (default: test)")
    command.add_argument("--images", type=run.Images, default=images,
                         help=f"how many images, drawn by --seed (default: {images})")
    command.add_argument("--size", type=Annotated[int, run.Range(32, 2**14)], default=size,
                         help=f"side of the input, pixels (default: {size})")
    command.add_argument("--arch", choices=("resnet18", "resnet34", "resnet50", "resnet101"),
                         help="of imagenet (default: resnet50) and random (default: as the first file)")
    command.add_argument("--seed", type=run.Seed, default=42, help="everything random follows from it (default: 42)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    command.add_argument("--out", type=Path, default=Path(f"out/{figure}.png"),
                         help=f"picture to write (default: out/{figure}.png)")
    return command


def check_out(args: argparse.Namespace) -> None:
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: give a name that ends in .png; the numbers go into the .json beside it")


def check(args: argparse.Namespace) -> None:
    """What the flags of add_analysis alone can be wrong in; the device."""
    if args.size % 32:
        raise UserError(f"--size {args.size}: must be a multiple of 32 pixels, the stride of conv5")
    check_out(args)
    args.device = common.setup_distributed(args.device)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = run.Parser(prog="figures.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="FIGURE")
    command = commands.add_parser("localize", help="UP-DETR, Fig. 5: find query patches in an image")
    command.set_defaults(draw=localize, check=lambda args: None)
    command.add_argument("--checkpoint", required=True, help="last.pt of updetr.py, or the released file")
    command.add_argument("--image", required=True, help="where to look")
    command.add_argument("--patches", required=True, nargs="+", metavar="X1,Y1,X2,Y2",
                         help="what to look for: boxes in pixels")
    command.add_argument("--patch_image", "--patch-image", help="the image the patches are cut from (default: --image)")
    command.add_argument("--threshold", type=run.Share, default=0.9,
                         help="least confidence of a box that is drawn (default: 0.9)")
    command.add_argument("--size", type=run.Pixels, default=420,
                         help="short side the image is resized to, pixels (default: 420, released)")
    command.add_argument("--num_patches", "--num-patches", type=run.Width, default=10,
                         help="M of a file that does not say it (default: 10, released)")
    command.add_argument("--out", type=Path, default=Path("out/localize.png"),
                         help="picture to write (default: out/localize.png)")
    add_analysis(commands, "iou-similarity", draw_iou_similarity,
                 "DUPR, Fig. 5: similarity of boxes to an object, by IoU", images=1000)
    command = add_analysis(commands, "affinity", draw_affinity,
                           "DUPR, Fig. 9: affinity of an object's places in two views", images=100)
    command.add_argument("--tau", type=run.Positive, default=0.001, help="temperature of Eq. (9) (default: 0.001)")
    add_analysis(commands, "match", draw_match, "DUPR, Fig. 10: patches of one view, found in another", images=100)
    command = add_analysis(commands, "neighbours", draw_neighbours,
                           "DUPR, Fig. 6: nearest neighbours of images", images=5000, size=224)
    command.add_argument("--top", type=run.Width, default=4, help="neighbours of a query (default: 4)")
    command.add_argument("--queries", type=run.Width, default=8, help="how many of the images are queries (default: 8)")
    detector_figures.add_commands(commands)
    _add_runs(commands)
    args = parser.parse_args(argv)
    getattr(args, "check", check_out)(args)
    return args.draw(args)


def _add_runs(commands: Any) -> None:
    """The subcommands on output folders."""
    command = commands.add_parser("curves", help="losses, rates and AP of several runs side by side")
    command.set_defaults(draw=draw_runs, figure="curves")
    command.add_argument("--keys", nargs="+", metavar="KEY",
                         help=f"what to draw, as log.jsonl calls it (default: of {', '.join(KEYS)} what is there)")
    command.add_argument("--over", metavar="FLAG", help="draw the final metrics over this flag of the runs, for "
                         "example labels_percent, one line per NAME; several runs at one value: their mean")
    command.add_argument("--out", type=Path, default=Path("out/curves.png"),
                         help="picture to write (default: out/curves.png)")
    mean = commands.add_parser("mean", help="mean and standard deviation of the metrics of several runs")
    mean.set_defaults(draw=mean_of_runs, check=lambda args: None)
    mean.add_argument("--keys", nargs="+", metavar="KEY", help="metrics to print and write, as metrics.json calls "
                      "them; those of a table 'ROW COLUMN' (default: all; printed are AP and the like)")
    mean.add_argument("--out", type=Path, default=Path("out/mean.json"),
                      help="file to write (default: out/mean.json)")
    for one in (command, mean):
        one.add_argument("runs", nargs="+", metavar="[NAME=]OUT", help="output folders of runs")


if __name__ == "__main__":
    run.cli(main)
