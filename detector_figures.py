"""The papers' figures of detectors, from checkpoints: figures.py's slots, gradients, boxes, attention, ap-iou.

A checkpoint is whatever predict.py opens: pretrained or fine-tuned, ours, released or hf:FOLDER; it sees images at its
own size. A pretrained one is asked without query patches or regions, as fine-tuning does. Of a query counts the
probability of "object", of a fine-tuned detector's that of its best class.

Choices where the papers are silent (paper / here):
    slots       boxes: not said / of every query in every image, whatever their confidence, in shares of the image
                which 10: not said / those of the highest mean confidence; all are in the json
                "large": not said / the longer side above a third of the image's; horizontal or vertical: above 1.5
                times the other; all others are green
                in numbers: not done / spread: standard deviation of a query's centres; dominance: share of its most
                frequent colour, means over queries
    gradients   z: "feature-space embedding" / the norm of its Jacobian, estimated by PROBES random directions
                in numbers: not done / share of the squared norms inside the box, beside that of its area
    attention   layer, heads: not said / the last one, mean over heads (DETR, Conditional DETR) or all sampling points
                in numbers: not done / share of the attention inside the query's box, beside that of its area
    ap-iou      thresholds: not said / COCO's ten
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import argparse
import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import convert
import curves
import data
import evaluation
import finetune
import predict
import rcnn
import run
from annotations import open_detection
from common import UserError

SHAPES = {"square": "#3cb44b", "horizontal": "#f58231", "vertical": "#4363d8"}  # DETReg, Fig. 4
LARGE, LONG = 1 / 3, 1.5  # of the image's side; of the other side
OUTPUTS = ("x", "y", "w", "h")
PROBES = 16

# ==== 1. Checkpoints, images, numbers ====


def open_detectors(args: argparse.Namespace, queries: bool = True) -> dict[str, predict.Predictor]:
    """--checkpoint -> {name: detector}. queries: they must have object queries."""
    found: dict[str, predict.Predictor] = {}
    for text in args.checkpoint:
        name, path = convert.name_checkpoint(text)
        if name in found:
            raise UserError(f"--checkpoint {text}: another one is called {name} too; give it a name with NAME={path}")
        found[name] = predict.load(path, args.device, threshold=0.0)
        if queries and rcnn.is_rcnn(found[name].cfg.detector):
            raise UserError(f"--checkpoint {text}: a {convert.NAMES[found[name].cfg.detector]} has no object queries, "
                            "which this figure shows; give a detector of the DETR family")
    return found


def read_pictures(paths: list[str]) -> dict[str, Image.Image]:
    """{path: RGB}. UserError: one is not there, or no image."""
    pictures = {}
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such image file")
        try:
            pictures[path] = data.decode_image(path)
        except data.UnreadableImage as error:
            raise UserError(str(error)) from error
    return pictures


def view_of(detector: predict.Predictor, image: Image.Image) -> Tensor:
    """[1, 3, h, w], without padding."""
    view = evaluation.evaluation_view(image, detector.cfg.eval_size, detector.cfg.max_size)
    return view[None].to(detector.device)


def look(detector: predict.Predictor, view: Tensor) -> dict[str, Tensor]:
    return detector.model(view, torch.zeros_like(view[:, 0], dtype=torch.bool))


def confidence(detector: predict.Predictor, logits: Tensor) -> Tensor:
    """[..., num_logits] -> [...], see above."""
    scores = logits.softmax(-1)[..., :-1] if detector.softmax else logits.sigmoid()
    return scores[..., min(1, scores.shape[-1] - 1)] if detector.cfg.class_agnostic else scores.amax(-1)


def best_queries(detector: predict.Predictor, outputs: dict[str, Tensor], image: Image.Image, top: int
                 ) -> list[dict[str, Any]]:
    """[{"query", "score", "box" xyxy px}], best first."""
    scores = confidence(detector, outputs["pred_logits"][0].detach()).cpu()
    size = torch.tensor([[image.height, image.width]])
    boxes = common.boxes_to_pixels(outputs["pred_boxes"].detach().cpu(), size)[0]
    return [{"query": q, "score": scores[q].item(), "box": boxes[q].tolist()}
            for q in scores.argsort(descending=True, stable=True)[:top].tolist()]


def inside(box: list[float], x: Tensor, y: Tensor) -> Tensor:
    return (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])


def pixel_centres(shape: tuple[int, ...], image: Image.Image) -> tuple[Tensor, Tensor]:
    """x [1, w], y [h, 1] in pixels of the image, of a map [h, w] that covers it."""
    h, w = shape
    return (torch.arange(w) + 0.5)[None] * image.width / w, (torch.arange(h) + 0.5)[:, None] * image.height / h


def area_share(box: list[float], image: Image.Image) -> float:
    sides = [max(0.0, min(box[k + 2], size) - max(box[k], 0.0)) for k, size in enumerate(image.size)]
    return sides[0] * sides[1] / (image.width * image.height)


def heat(image: Image.Image, values: Tensor) -> Image.Image:
    """A map [h, w], brightest at its maximum, over the darkened image."""
    levels = (values / values.max().clamp(min=1e-30) * 255).byte().numpy()
    resized = cv2.resize(levels, image.size, interpolation=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap(resized, cv2.COLORMAP_INFERNO)[..., ::-1]
    return Image.blend(image.convert("RGB"), Image.fromarray(np.ascontiguousarray(colours)), 0.7)


def write_numbers(args: argparse.Namespace, numbers: dict[str, Any], text: str = "") -> dict[str, Any]:
    """Write the numbers beside the picture, print the text; returns what the json holds."""
    numbers = {"figure": args.figure, **numbers}
    path = args.out.with_suffix(".json")
    run.write_json(path, numbers)
    run.print_rank0(f"{text}\nwrote {args.out}, {path}".lstrip())
    return numbers


# ==== 2. DETReg, Fig. 4: slots ====


def box_shapes(boxes: Tensor) -> Tensor:
    """Which of SHAPES boxes [..., 4] cxcywh are. int64 [...]"""
    w, h = boxes[..., 2], boxes[..., 3]
    large = torch.maximum(w, h) > LARGE
    return (large & (w > LONG * h)).long() + 2 * (large & (h > LONG * w))


def slot_numbers(boxes: Tensor, scores: Tensor) -> list[dict[str, float]]:
    """Of what queries predict in n images, boxes [n, Q, 4], scores [n, Q]: each one's confidence, mean box, spread of
    its centres (standard deviation) and shares of SHAPES."""
    spread = boxes[..., :2].var(0, correction=0).sum(-1).sqrt()  # [Q]
    shares = torch.nn.functional.one_hot(box_shapes(boxes), len(SHAPES)).double().mean(0)  # [Q, 3]
    return [{"query": q, "score": scores[:, q].mean().item(), **dict(zip(OUTPUTS, boxes[:, q].mean(0).tolist())),
             "spread": spread[q].item(), **dict(zip(SHAPES, shares[q].tolist()))} for q in range(boxes.shape[1])]


def draw_slot(boxes: Tensor, text: str) -> Image.Image:
    """The square of a query, whose boxes [n, 4] are points."""
    side = evaluation.TILE
    square = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(square)
    for (x, y), shape in zip((boxes[:, :2] * side).tolist(), box_shapes(boxes).tolist()):
        draw.circle((x, y), 1.5, tuple(SHAPES.values())[shape])
    draw.rectangle([0, 0, side - 1, side - 1], outline="black")
    draw.text((4, 2), run.printable(text), "black", ImageFont.load_default(12))
    return square


@torch.no_grad()
def draw_slots(args: argparse.Namespace) -> dict[str, Any]:
    """{"images", "checkpoints": {name: {"spread", "dominance", "queries": slot_numbers}}, ...}."""
    split = "train" if args.split == "train" else "val"
    source = data.open_images(args.data, args.data_root, split=split, synthetic_images=args.images, seed=args.seed)
    detectors = open_detectors(args)
    rng, skipped = np.random.default_rng(args.seed), run.SkipCount(len(source))
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in detectors}
    for index in run.progress(rng.permutation(len(source))[:args.images].tolist(), desc="slots"):
        try:
            image = source.load(index)
        except data.UnreadableImage as error:
            skipped.add([str(error)])
            continue
        for name, detector in detectors.items():
            outputs = look(detector, view_of(detector, image))
            found[name].append((outputs["pred_boxes"].cpu(), confidence(detector, outputs["pred_logits"]).cpu()))
    skipped.report()
    if not all(found.values()):
        raise UserError(f"--data {args.data}: none of its images can be read; give another set")
    numbers, rows = {}, []
    for name, seen in found.items():
        boxes, scores = (torch.cat(parts) for parts in zip(*seen))
        queries = slot_numbers(boxes, scores)
        best = sorted(queries, key=lambda row: -row["score"])[:args.slots]
        squares = [draw_slot(boxes[:, row["query"]], f"{name}: query {row['query']}") for row in best]
        blank = Image.new("RGB", squares[0].size, "white")
        rows.append([(square, (), None) for square in squares + [blank] * (args.slots - len(squares))])
        numbers[name] = {"spread": float(np.mean([row["spread"] for row in queries])),
                         "dominance": float(np.mean([max(row[shape] for shape in SHAPES) for row in queries])),
                         "queries": queries}
    evaluation.draw_rows(args.out, tuple(str(i + 1) for i in range(args.slots)), rows)
    count = len(next(iter(found.values())))
    table = evaluation.metrics_table(numbers, ["spread", "dominance"], f"queries, over {count} images")
    return write_numbers(args, {"data": args.data, "split": args.split, "seed": args.seed, "images": count,
                                "checkpoints": numbers}, table)


# ==== 3. DETReg, Fig. 5: gradients ====


def image_gradients(detector: predict.Predictor, view: Tensor, queries: list[int], embed: nn.Module | None = None
                    ) -> dict[str, Tensor]:
    """{"x", "y", "w", "h": [n, h, w]}: per pixel of a view [1, 3, h, w] the norm, over its channels, of the gradient of
    what each of the queries [n] predicts. embed: f_emb, for "z", whose norm is also over its components."""
    view = view.detach().requires_grad_()
    outputs = look(detector, view)

    def norms(value: Tensor) -> Tensor:  # [] -> [h, w]
        return torch.autograd.grad(value, view, retain_graph=True)[0][0].norm(dim=0).cpu()

    boxes = outputs["pred_boxes"][0, queries]
    found = {name: torch.stack([norms(box[k]) for box in boxes]) for k, name in enumerate(OUTPUTS)}
    if embed:
        z = embed(outputs["hs"][0, queries])  # [n, D_z]
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(PROBES, z.shape[1], generator=generator).to(z)
        # the mean of (u . J)^2 over random u is the squared norm of the Jacobian J
        found["z"] = torch.stack([torch.stack([norms(u @ one).square() for u in directions]).mean(0).sqrt()
                                  for one in z])
    return found


def embedding_head(path: str, device: torch.device) -> nn.Module | None:
    """f_emb of a pretraining by DETReg; None: there is none."""
    state = convert.open_checkpoint(path).state
    weights = {k.removeprefix("feature_embed."): v for k, v in state.items() if k.startswith("feature_embed.")}
    if not weights:
        return None
    dim, width = weights["layers.1.weight"].shape
    head = common.MLP(width, width, dim, 2)
    head.load_state_dict(weights)
    return head.to(device)


def draw_gradients(args: argparse.Namespace) -> dict[str, Any]:
    """{"images": [{"image", "found": {name: best_queries, each with "area", "norm" and "inside" of every output}}]}."""
    pictures, detectors = read_pictures(args.image), open_detectors(args)
    heads = {name: embedding_head(path, detectors[name].device) for name, path in map(convert.name_checkpoint,
                                                                                      args.checkpoint)}
    titles = ("prediction", *OUTPUTS, *["z"] * any(heads.values()))
    numbers, rows = [], []
    for path, image in pictures.items():
        found = {}
        for name, detector in detectors.items():
            view = view_of(detector, image)
            with torch.no_grad():
                best = best_queries(detector, look(detector, view), image, args.top)
            maps = image_gradients(detector, view, [row["query"] for row in best], heads[name])
            for i, row in enumerate(best):
                energy = {key: of[i].double().square() for key, of in maps.items()}
                within = inside(row["box"], *pixel_centres(view.shape[2:], image))
                row |= {"area": area_share(row["box"], image),
                        "norm": {key: e.sum().sqrt().item() for key, e in energy.items()},
                        "inside": {key: (e[within].sum() / e.sum()).item() for key, e in energy.items()}}
                box = torch.tensor([row["box"]])
                cells = [(heat(image, maps[key][i]) if key in maps else Image.new("RGB", image.size), box, None)
                         for key in titles[1:]]
                rows.append([(image, box, [f"{name}: {row['score']:.2f}"]), *cells])
            found[name] = best
        numbers.append({"image": path, "found": found})
    evaluation.draw_rows(args.out, titles, rows)
    return write_numbers(args, {"images": numbers}, shares_table(numbers, lambda row: row["inside"],
                                                                 "share of the squared gradient inside the box"))


def shares_table(images: list[dict], shares: Callable[[dict], dict[str, float]], title: str) -> str:
    """Means over all images and queries of a checkpoint, beside the share of the area."""
    found: dict[str, list[dict]] = {}
    for one in images:
        for name, best in one["found"].items():
            found.setdefault(name, []).extend({"area": row["area"]} | shares(row) for row in best)
    means = {name: {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} for name, rows in found.items()}
    return evaluation.metrics_table(means, list(dict.fromkeys(key for row in means.values() for key in row)), title)


# ==== 4. DETReg, Fig. 1; Siamese DETR, Figs. 5, 11: boxes and attention ====


def draw_found(args: argparse.Namespace) -> dict[str, Any]:
    """{"images": [{"image", "found": {name: [{"box" xyxy px, "score", "name"}]}}]}."""
    pictures, detectors = read_pictures(args.image), open_detectors(args, queries=False)
    numbers, rows = [], []
    for path, image in pictures.items():
        found = {}
        for name, detector in detectors.items():
            best = detector(image)
            found[name] = [{"box": box, "score": score, "name": label}
                           for box, score, label in zip(best["boxes_xyxy"].tolist(), best["scores"].tolist(),
                                                        best["names"]) if score >= args.threshold][:args.top]
        numbers.append({"image": path, "found": found})
        rows.append([(image, [row["box"] for row in best],
                      [f"{'' if detectors[name].cfg.class_agnostic else row['name']} {row['score']:.2f}".strip()
                       for row in best]) for name, best in found.items()])
    evaluation.draw_rows(args.out, tuple(detectors), rows, max_boxes=args.top)
    return write_numbers(args, {"images": numbers})


@contextlib.contextmanager
def recording(module: nn.Module) -> Iterator[dict[str, tuple]]:
    """What goes into and comes out of all modules in `module` while the block runs: {name: (args, kwargs, output)} of
    the last call; "": of itself."""
    seen: dict[str, tuple] = {}

    def keep(name: str, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen[name] = (args, kwargs, output)

    handles = [child.register_forward_hook(functools.partial(keep, name), with_kwargs=True)
               for name, child in module.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def attention_maps(layer: nn.Module, seen: dict[str, tuple]) -> Tensor:
    """Weights of the attention into the image of a layer of DETR's or Conditional DETR's decoder, recorded in one pass.
    [B, M, Q, S]; rows sum to 1."""
    if isinstance(layer, common.DETRDecoderLayer):
        args, kwargs, _ = seen["multihead_attn"]
        return layer.multihead_attn.forward(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})[1]
    out = {name: output for name, (*_, output) in seen.items()}
    query, key = out["ca_qcontent_proj"], out["ca_kcontent_proj"]
    if "ca_qpos_proj" in out:  # of a first layer
        query, key = query + out["ca_qpos_proj"], key + out["ca_kpos_proj"]
    query, key = (torch.cat([t.unflatten(-1, (layer.n_heads, -1)) for t in pair], -1)  # [B, Q or S, M, 2D / M]
                  for pair in ((query, out["ca_qpos_sine_proj"]), (key, out["ca_kpos_proj"])))
    logits = torch.einsum("bqmd,bsmd->bmqs", query, key) / math.sqrt(query.shape[-1])
    padding = seen[""][0][5]
    return logits.masked_fill(padding[:, None, None], -math.inf).softmax(-1)


def sampling_points(attention: common.MSDeformAttn, seen: dict[str, tuple], prefix: str = "") -> tuple[Tensor, Tensor]:
    """(places [B, Q, M, L, P, 2] as (x, y) in 0..1, weights [B, Q, M, L, P]) of a deformable attention, recorded in one
    pass under names that start with `prefix`."""
    (query, reference, _, shapes, _), *_ = seen[prefix.removesuffix(".")]
    M, L, P = attention.n_heads, attention.n_levels, attention.n_points
    offsets = seen[f"{prefix}sampling_offsets"][2].unflatten(-1, (M, L, P, 2))
    weights = seen[f"{prefix}attention_weights"][2].unflatten(-1, (M, L * P)).softmax(-1).unflatten(-1, (L, P))
    if reference.shape[-1] == 2:
        sizes = torch.tensor(shapes, device=query.device).flip(1)[:, None].to(offsets)  # [L, 1, 2] (W_l, H_l)
        return reference[:, :, None, :, None] + offsets / sizes, weights
    return reference[:, :, None, :, None, :2] + offsets / P * reference[:, :, None, :, None, 2:] * 0.5, weights


def draw_points(image: Image.Image, x: Tensor, y: Tensor, weights: Tensor) -> Image.Image:
    """Sampling points [n] in pixels on a grey copy of the image: from small and blue to large and red by weight."""
    picture = image.convert("L").convert("RGB")
    draw = ImageDraw.Draw(picture)
    level = (weights / weights.max().clamp(min=1e-30)).clamp(0, 1)
    colours = cv2.applyColorMap((level * 255).byte().numpy()[:, None], cv2.COLORMAP_TURBO)[:, 0, ::-1]
    radius = max(image.size) / 160 * (0.5 + level)
    for i in weights.argsort().tolist():
        draw.circle((x[i].item(), y[i].item()), radius[i].item(), tuple(colours[i].tolist()))
    return picture


@torch.no_grad()
def attend(detector: predict.Predictor, image: Image.Image, top: int) -> tuple[list[dict], list[Image.Image]]:
    """(best_queries, each with "area" and "inside", the share of its attention in its box; a picture of each)."""
    layer = detector.model.transformer.decoder.layers[-1]
    with recording(layer) as seen:
        outputs = look(detector, view_of(detector, image))
    best = best_queries(detector, outputs, image, top)
    deformable = isinstance(getattr(layer, "cross_attn", None), common.MSDeformAttn)
    if deformable:
        places, weights = (t[0].cpu() for t in sampling_points(layer.cross_attn, seen, "cross_attn."))
    else:
        maps = attention_maps(layer, seen)[0].mean(0).unflatten(-1, outputs["memory"][-1].shape[-2:]).cpu()  # [Q, H, W]
    pictures = []
    for row in best:
        q = row["query"]
        if deformable:
            x, y = (places[q].flatten(0, -2) * torch.tensor(image.size)).unbind(-1)
            weight = weights[q].flatten()
            pictures.append(draw_points(image, x, y, weight))
        else:
            weight, (x, y) = maps[q], pixel_centres(maps[q].shape, image)
            pictures.append(heat(image, weight))
        row |= {"area": area_share(row["box"], image),
                "inside": (weight[inside(row["box"], x, y)].sum() / weight.sum()).item()}
    return best, pictures


def draw_attention(args: argparse.Namespace) -> dict[str, Any]:
    """{"images": [{"image", "found": {name: what attend() gives of the best queries}}]}."""
    pictures, detectors = read_pictures(args.image), open_detectors(args)
    numbers, rows = [], []
    for path, image in pictures.items():
        found = {}
        for name, detector in detectors.items():
            found[name], maps = attend(detector, image, args.top)
            boxes = torch.tensor([row["box"] for row in found[name]])
            cells = [(picture, [[math.nan] * 4] * i + [row["box"]], None)  # in the colour of its rank
                     for i, (picture, row) in enumerate(zip(maps, found[name]))]
            cells += [(Image.new("RGB", image.size), (), None)] * (args.top - len(cells))
            rows.append([(image, boxes, [f"{name}: {row['score']:.2f}" for row in found[name]]), *cells])
        numbers.append({"image": path, "found": found})
    evaluation.draw_rows(args.out, ("predictions", *(f"query {i + 1}" for i in range(args.top))), rows,
                         max_boxes=args.top)
    table = shares_table(numbers, lambda row: {"inside": row["inside"]}, "share of the attention inside the box")
    return write_numbers(args, {"images": numbers}, table)


# ==== 5. Siamese DETR, Fig. 4: AP over IoU thresholds ====


def detections_of(place: str, args: argparse.Namespace) -> tuple[dict, list[dict], dict[str, Any]]:
    """(ground truth, detections, metrics.json or {}) of a run's folder; of another checkpoint, or a folder without
    detections.json, of an evaluation here. The images are those of the run's test set, or of --data."""
    folder = Path(place)
    saved = (folder / "detections.json").is_file()
    known = not saved or any((folder / name).exists() for name in convert.OF_A_RUN)
    init, cfg = predict.open_detector(place) if known else (None, finetune.Config())
    if args.data:
        labelled = open_detection(args.data, args.data_root, "test", exif=args.exif)
    elif init and init.content.get("script") == "finetune":
        labelled = finetune.open_sets(dataclasses.replace(cfg, data_root=args.data_root or cfg.data_root)).test
    else:
        raise UserError(f"{place}: nothing in it says which images it was evaluated on; give them with --data")
    ignored = labelled.coco_ground_truth()
    truth = ignored if cfg.difficult == "ignore" else evaluation.count_difficult(ignored)
    if saved:
        return truth, read_json(folder / "detections.json"), read_json(folder / "metrics.json", {})
    device = common.find_device(args.device)
    model, label_map = finetune.build_model(cfg, init, labelled.categories)
    cfg = finetune.adopt_evaluation(cfg, init, frozenset())
    return truth, finetune.evaluate(cfg, model.to(device), label_map, labelled, device).detections, {}


def read_json(path: Path, otherwise: Any = None) -> Any:
    """otherwise: where there is no such file."""
    if otherwise is not None and not path.exists():
        return otherwise
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable json file ({error}); run the evaluation again") from error


def draw_ap_iou(args: argparse.Namespace) -> dict[str, Any]:
    """{"thresholds", "runs": {name: {AP, APs, APm, APl: a value per threshold}}, ...}."""
    found = {}
    for text in args.runs:
        name, place = convert.name_checkpoint(text)
        if name in found:
            raise UserError(f"{text}: another one is called {name} too; give it a name with NAME={place}")
        truth, detections, metrics = detections_of(place, args)
        of_boxes = any("probability" in d for d in detections)  # of --class_agnostic
        now = evaluation.detection_metrics(truth, detections, class_agnostic=of_boxes, per_iou=True)
        before = metrics.get("AP")
        if isinstance(before, float) and abs(now["AP"] - before) > 5e-4:
            run.print_rank0(f"warning: {place}: AP is {now['AP']:.3f} here and {before:.3f} in its metrics.json: these "
                            "are other labels, or it is of another metric")
        found[name] = now["per_iou"]
    thresholds = evaluation.IOU_THRESHOLDS
    titles = {"AP": "AP", "APs": "AP, small objects", "APm": "AP, medium objects", "APl": "AP, large objects"}
    panels = [curves.panel({name: list(zip(thresholds, of[key])) for name, of in found.items()}, title=title,
                           x_label="IoU threshold", x_range=(thresholds[0], thresholds[-1]))
              for key, title in titles.items()]
    curves.draw_panels(args.out, panels)
    rows = {run.printable(name): dict(zip(map("{:g}".format, thresholds), of["AP"])) for name, of in found.items()}
    table = evaluation.metrics_table(rows, list(next(iter(rows.values()))), "AP by IoU threshold")
    return write_numbers(args, {"data": args.data, "thresholds": thresholds, "runs": found}, table)


# ==== 6. Flags ====


def add_commands(commands: Any) -> None:
    """The subcommands of figures.py that are drawn here."""
    slots = _command(commands, "slots", draw_slots, "DETReg, Fig. 4: where each query's boxes lie")
    slots.add_argument("--data", required=True, help="images, as detreg.py's")
    slots.add_argument("--split", choices=("test", "train"), default="test",
                       help="which part of a data set that has them (default: test)")
    slots.add_argument("--images", type=run.Images, default=5000,
                       help="how many images, drawn by --seed (default: 5000)")
    slots.add_argument("--seed", type=run.Seed, default=42, help="of the draw of images (default: 42)")
    slots.add_argument("--slots", type=run.Depth, default=10, help="how many queries are drawn (default: 10)")
    gradients = _command(commands, "gradients", draw_gradients,
                         "DETReg, Fig. 5: which pixels a predicted box, and its embedding, depend on")
    boxes = _command(commands, "boxes", draw_found,
                     "DETReg, Fig. 1, Siamese DETR, Figs. 5, 11: boxes of several checkpoints side by side")
    boxes.add_argument("--threshold", type=run.Share, default=0.0, help="least score of a box (default: 0)")
    attention = _command(commands, "attention", draw_attention,
                         "Siamese DETR, Figs. 5, 11: where the best queries look in the image")
    for command, top in ((gradients, 1), (boxes, 10), (attention, 3)):
        command.add_argument("--image", required=True, nargs="+", help="pictures to look at")
        command.add_argument("--top", type=run.Depth, default=top,
                             help=f"how many of the most confident queries or boxes (default: {top})")
    ap_iou = _command(commands, "ap-iou", draw_ap_iou, "Siamese DETR, Fig. 4: AP over IoU thresholds")
    ap_iou.add_argument("runs", nargs="+", metavar="[NAME=]RUN",
                        help="output folders of finetune.py, whose detections.json is read, or checkpoints to evaluate")
    ap_iou.add_argument("--data", help="labels of the images (default: the test set of each run)")
    ap_iou.add_argument("--exif", choices=("auto", "stored", "rotated"), default="auto",
                        help="pixels the boxes of --data lie on: as stored, or as EXIF rotates them (default: auto)")
    for command in (slots, ap_iou):
        command.add_argument("--data_root", "--data-root",
                             help="where a named data set lies; else $DATA_ROOT, else data/<name>")


def _command(commands: Any, figure: str, draw: Callable, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(figure, help=text)
    command.set_defaults(draw=draw, figure=figure)
    if figure != "ap-iou":
        command.add_argument("--checkpoint", required=True, nargs="+", metavar="[NAME=]FILE",
                             help="file, folder of a run or hf:FOLDER of a detector; any number")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    command.add_argument("--out", type=Path, default=Path(f"out/{figure}.png"),
                         help=f"picture to write (default: out/{figure}.png)")
    return command
