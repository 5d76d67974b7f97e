"""Where a training step's time goes, and what it takes against other code for the same work.

    python benchmarks/train_step.py --method detreg [--device cpu|cuda] [--rounds N] [--pixels H W] [any of its flags]
        a method's step
    python benchmarks/train_step.py --method deformable_detr    # or detr, conditional_detr
        the detector's step against Hugging Face transformers
    python benchmarks/train_step.py --method faster_rcnn_fpn    # or mask_rcnn_fpn, retinanet_fpn, fcos_fpn
        fine-tuning against torchvision's detector

A method runs its default recipe with its own data set, loader and train_step, on a few ImageNet pictures
(../shared/data) or drawn scenes as large. Its split is measured alone, as a run goes; then the ways below take the same
batches in turn:
    ours     as a run goes
    plain    fp32, eager, attention by grid_sample, norms apart from their convolutions, one optimizer kernel per
             operation
    bf16     ours with --amp bf16
    compile  ours with --compile (only where asked for: --ways ours plain compile)
"of the limit" (fp32): the time that the step's matrix products and convolutions would take at the speed of one large
product and one large convolution, timed in the same round, over the step's time; all else would take none.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import measure  # first: it finds the project's files

import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import detectors
import finetune
import proposals
import rcnn
import run

LOSS = {"detreg": "detreg_loss", "updetr": "updetr_loss", "siamese_detr": "siamese_loss",
        "soco": "soco_loss", "dupr": "dupr_loss"}
BATCH = {"detreg": 2, "updetr": 2, "siamese_detr": 2, "soco": 4, "dupr": 8}  # images; but for DUPR those of RELEASED
# Seconds of the released codes' step at that batch, with 2 threads of such a machine.
RELEASED = {"detreg": 9.7, "updetr": 1.5, "siamese_detr": 2.1, "soco": 4.6}
TRANSFORMERS = ("detr", "conditional_detr", "deformable_detr")
TORCHVISION = ("faster_rcnn_fpn", "mask_rcnn_fpn", "retinanet_fpn", "fcos_fpn")


# ==== 1. A method's own step ====


class Step:
    """One way of running a method: its own network, optimizer and train_step. Calling it takes one step on the next of
    `batches`."""

    def __init__(self, method: str, cfg: Any, device: torch.device):
        self.script = script = importlib.import_module(method)
        self.device, self.number = device, 0
        torch.manual_seed(cfg.seed)
        model, *frozen = script.build_models(cfg) if hasattr(script, "build_models") else [script.build_model(cfg)]
        model = model.to(device).train()
        frozen = [network.to(device) if network is not None else None for network in frozen]
        wrapped = common.wrap_model(model, device, compiled=cfg.compile, checkpointed=cfg.checkpoint_activations)
        optimizer = getattr(script, "build_optimizer", common.build_optimizer)(cfg, model)
        criterion = [script.build_criterion(cfg)] if hasattr(script, "build_criterion") else []
        self.arguments = cfg, wrapped, *frozen, *criterion, optimizer

    def __call__(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        batch = batch if self.script.__name__ == "soco" else [batch]
        self.number += 1
        # SoCo: momentum of the target network; DUPR: number of the step
        more = {"soco": (0.99,), "dupr": (self.number,)}.get(self.script.__name__, ())
        return self.script.train_step(*self.arguments, batch, *more, self.device)


@contextlib.contextmanager
def plain_forms():
    """What a reader would write first: the reference attention, a norm after each convolution, no fused optimizer."""
    with (mock.patch.object(common, "deformable_attention_for", lambda device: common.multi_scale_deformable_attention),
          mock.patch.object(common, "convolve", lambda x, conv, norm: norm(conv(x))),
          mock.patch.object(common, "can_fuse", lambda model: False)):
        yield


def open_data(method: str, argv: list[str], folder: str) -> tuple[Any, Any, Any]:
    """-> (the configuration, the data set, its collate). Proposals come from a store, as docs/speed.md advises for more
    than a few epochs."""
    script = importlib.import_module(method)
    sample = Path(__file__).resolve().parents[2] / "shared/data/imagenet_sample/train"
    flags = []
    if "--data" not in argv and sample.is_dir():
        (Path(folder) / "images.txt").write_text("\n".join(map(str, sorted(sample.rglob("*.*"))[::12][:24])))
        flags += ["--data", f"{folder}/images.txt"]
    elif "--data" not in argv:
        flags += ["--data", "synthetic", "--synthetic_size", "448", "--synthetic_images", "16"]
    flags += ["--backbone_weights", "random", "--batch_size", str(BATCH[method]), "--out", folder, "--num_workers", "1"]
    cfg = run.parse_config(script.Config, script.PRESETS, flags + argv, script=method, description="",
                           recipe=script.recipe_of)
    source = data.open_images(cfg.data, cfg.data_root, synthetic_images=cfg.synthetic_images,
                              synthetic_size=cfg.synthetic_size, seed=cfg.seed)
    kind = {"detreg": "RegionDataset", "updetr": "PatchDataset", "siamese_detr": "TwoViewDataset",
            "soco": "ObjectViewsDataset", "dupr": "TwoCropsDataset"}[method]
    arguments = [cfg, source, np.arange(len(source))]
    if getattr(cfg, "proposal_method", "none") != "none":
        with contextlib.redirect_stdout(None):
            store = proposals.build_store(f"{folder}/store", source, proposals.Proposals(cfg).generator, workers=2,
                                          progress=False)
        arguments.append(proposals.Proposals(cfg, store))
    return cfg, getattr(script, kind)(*arguments), getattr(script, "collate", data.collate)


def resized(batch: dict[str, Any], hw: list[int] | None) -> dict[str, Any]:
    """The same batch with images of exactly this size, as a measurement of other code has them; without padding."""
    if hw is None:
        return batch
    old = batch["images"].shape[-2:]
    scale = torch.tensor([hw[1] / old[1], hw[0] / old[0]] * 2)
    images = torch.nn.functional.interpolate(batch["images"], size=hw, mode="bilinear")
    moved = {key: batch[key] * scale for key in ("boxes", "rois") if key in batch}  # Siamese DETR's are pixels
    sizes = {"sizes": torch.tensor([hw] * len(images))} if "sizes" in batch else {}
    return {**batch, **moved, **sizes, "images": images, "mask": torch.zeros(len(images), *hw, dtype=torch.bool)}


def split(step: Step, batches: Any, steps: int) -> dict[str, list[float]]:
    """Seconds of each part of every step: data wait, forward, matching + loss, backward, optimizer (with clipping and
    the check for NaN)."""
    parts: dict[str, list[float]] = defaultdict(list)
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        measure.finish(step.device)
        now = time.perf_counter()
        parts[name].append(now - last)
        last = now

    loss = getattr(step.script, LOSS[step.script.__name__])
    backward = torch.Tensor.backward

    def timed_loss(*args: Any, **kwargs: Any) -> Any:
        lap("forward")
        value = loss(*args, **kwargs)
        lap("matching + loss")
        return value

    def timed_backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        backward(self, *args, **kwargs)
        lap("backward")

    with (mock.patch.object(step.script, loss.__name__, timed_loss),
          mock.patch.object(torch.Tensor, "backward", timed_backward)):
        for _ in range(steps + 1):
            batch = next(batches)
            lap("data wait")
            step(batch)
            lap("optimizer")
    return {name: seconds[1:] for name, seconds in parts.items()}


def yardsticks(device: torch.device) -> dict[str, Any]:
    """A matrix product and a convolution whose speed a step's are held against; larger ones were no faster on CPU."""
    matrix = torch.randn(1536, 1536, device=device)
    maps, weight = (torch.randn(2, 256, 64, 64, device=device).to(memory_format=torch.channels_last),
                    torch.randn(256, 256, 3, 3, device=device).to(memory_format=torch.channels_last))
    return {"products": lambda: matrix @ matrix,
            "convolutions": lambda: nn.functional.conv2d(maps, weight, padding=1)}


def operations(work: Any) -> dict[str, int]:
    """Floating-point operations of a call, under the names of the yardsticks."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    convolutions = sum(count for name, count in counts.items() if "convolution" in str(name))
    return {"products": sum(counts.values()) - convolutions, "convolutions": convolutions}


def method_step(args: argparse.Namespace, argv: list[str]) -> None:
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        cfg, dataset, collate = open_data(args.method, argv, folder)
        sampler = data.StepSampler(len(dataset), cfg.batch_size, 10**6, seed=cfg.seed)
        loader = iter(data.make_loader(dataset, sampler, num_workers=cfg.num_workers, collate=collate))
        batches = (resized(batch, args.pixels) for batch in loader)
        steps = {}
        for way in args.ways:
            changed = {"bf16": {"amp": "bf16"}, "compile": {"compile": True}}.get(way, {})
            with plain_forms() if way == "plain" else contextlib.nullcontext():
                steps[way] = Step(args.method, type(cfg)(**{**vars(cfg), **changed}), device)
        parts = split(steps["ours"], batches, args.rounds)
        kept = [next(batches) for _ in range(4)]
        del batches, loader  # its workers end: they would take a core from what is timed below
        turn = {way: 0 for way in steps}

        def take_step(way: str) -> None:
            turn[way] += 1
            with plain_forms() if way == "plain" else contextlib.nullcontext():
                steps[way](kept[turn[way] % len(kept)])

        sticks = yardsticks(device)
        calls = {way: lambda way=way: take_step(way) for way in steps}
        seconds = measure.interleave(calls | sticks, args.rounds, device)
        work = operations(lambda: take_step("ours"))
        memory = {way: measure.peak_mib(call, device) for way, call in calls.items()}
    first = kept[0].get("images", kept[0].get("views"))
    shape = tuple(first.shape) if isinstance(first, torch.Tensor) else tuple(first[0].shape)
    total = sum(measure.median(values) for values in parts.values())
    facts = measure.machine(device, batch_size=cfg.batch_size, images=str(shape))
    rows = [[name, measure.spread(values), f"{measure.median(values) / total:.0%}"] for name, values in parts.items()]
    measure.report(f"{args.method}: one step, in a loop of its own", ["part", "seconds", "share"], rows, facts)
    released = RELEASED.get(args.method) if device.type == "cpu" and cfg.batch_size == BATCH[args.method] else None
    each = {name: operations(stick)[name] for name, stick in sticks.items()}
    least = [sum(work[name] / each[name] * seconds[name][i] for name in sticks) for i in range(args.rounds)]
    rows = [[way, measure.spread(seconds[way]), cfg.batch_size / measure.median(seconds[way]),
             measure.spread(measure.ratios(seconds, "plain", way)) if "plain" in seconds else None,
             measure.spread([a / b for a, b in zip(least, seconds[way])]) if way != "bf16" else None, memory[way],
             measure.median(seconds[way]) / released if released else None] for way in steps]
    columns = ["way", "seconds", "images/s", "plain / way", "of the limit", "peak MiB", "of the released step"]
    facts |= {f"GFLOP of {name}": round(count / 1e9) for name, count in work.items()}
    facts |= {f"GFLOP/s of {name}": round(each[name] / measure.median(seconds[name]) / 1e9) for name in sticks}
    measure.report(f"{args.method}: the same batches in turn", columns, rows, facts)


# ==== 2. The detector step against other libraries ====


def boxes_of(batch: int, count: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"boxes": (torch.rand(count, 4, generator=generator) * 0.3 + 0.2).to(device),
             "labels": torch.randint(0, 90, (count,), generator=generator).to(device)} for _ in range(batch)]


def detector_steps(name: str, images: torch.Tensor, targets: list[dict], device: torch.device, amp: str
                   ) -> dict[str, Any]:
    """Forward, loss, backward, clip and AdamW of a detector with a frozen ResNet-50, 91 classes, dropout 0.1: ours, and
    theirs."""
    import transformers  # required by this comparison alone
    flags = ["--data", "coco", "--detector", name, "--backbone_weights", "random", "--lr_backbone", "0", "--amp", amp]
    cfg = run.parse_config(finetune.Config, finetune.PRESETS, flags, script="finetune", description="",
                           recipe=finetune.recipe_of)
    ours = detectors.build_detector(cfg, 91 + (name == "detr"), focal=name != "detr").to(device).train()
    criterion = finetune.build_criterion(cfg)
    mask = torch.zeros_like(images[:, 0], dtype=torch.bool)
    optimizer = common.build_optimizer(cfg, ours)
    kind = {"detr": "Detr", "conditional_detr": "ConditionalDetr", "deformable_detr": "DeformableDetr"}[name]
    stages = (2, 3, 4) if name == "deformable_detr" else (4,)
    backbone = transformers.ResNetConfig(out_features=[f"stage{i}" for i in stages])
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone, num_queries=cfg.num_queries, num_labels=91, auxiliary_loss=True,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), cfg.dropout),
        encoder_ffn_dim=cfg.dim_feedforward, decoder_ffn_dim=cfg.dim_feedforward)
    theirs = getattr(transformers, f"{kind}ForObjectDetection")(config).to(device).train()
    theirs_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 1e-4)
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]

    def our_step() -> None:
        optimizer.zero_grad()
        with common.autocast(device, amp):
            outputs = ours(images, mask)
        losses, _ = criterion(outputs, targets, float(sum(len(t["labels"]) for t in targets)))
        criterion.total(losses).backward()
        nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
        optimizer.step()

    def their_step() -> None:
        theirs_optimizer.zero_grad()
        with common.autocast(device, amp):
            loss = theirs(pixel_values=images, pixel_mask=(~mask).long(), labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        theirs_optimizer.step()

    learn = [sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6 for model in (ours, theirs)]
    print(f"parameters that learn: ours {learn[0]:.2f} M, transformers' {learn[1]:.2f} M")
    return {"ours": our_step, "transformers": their_step}


def do_our_work(model: nn.Module, ours: nn.Module) -> None:
    """torchvision's detector with what detectron2, and so ours, has otherwise: norms in the pyramid, samples of
    RoIAlign."""
    fpn, wanted = model.backbone.fpn, ours.backbone.fpn
    fpn.inner_blocks, fpn.layer_blocks = copy.deepcopy((wanted.inner_blocks, wanted.layer_blocks))
    if hasattr(model, "roi_heads"):
        model.roi_heads.box_roi_pool.sampling_ratio = ours.roi_heads.box_roi_pool.sampling_ratio


def rcnn_steps(name: str, images: torch.Tensor, targets: list[dict], device: torch.device, amp: str) -> dict[str, Any]:
    """Forward, loss, backward and SGD of a detector of the R-CNN family, ResNet-50, all BatchNorm learning: ours,
    torchvision's, and torchvision's that does our work (do_our_work)."""
    flags = ["--data", "coco", "--detector", name, "--backbone_weights", "random"]
    cfg = run.parse_config(finetune.Config, finetune.PRESETS, flags, script="finetune", description="",
                           recipe=finetune.recipe_of)
    build = {"faster_rcnn_fpn": "fasterrcnn_resnet50_fpn", "mask_rcnn_fpn": "maskrcnn_resnet50_fpn",
             "retinanet_fpn": "retinanet_resnet50_fpn", "fcos_fpn": "fcos_resnet50_fpn"}[name]
    first = rcnn.first_label(name)
    height, width = images.shape[-2:]
    theirs, same = (getattr(torchvision.models.detection, build)(
        weights=None, weights_backbone=None, num_classes=91 + first, trainable_backbone_layers=5,
        min_size=min(height, width), max_size=max(height, width)) for _ in range(2))
    ours = rcnn.build_rcnn(cfg, 91)
    do_our_work(same, ours)
    wanted = []
    for t in targets:
        centre, size = t["boxes"].split(2, 1)
        boxes = torch.cat([centre - size / 2, centre + size / 2], 1) * t["boxes"].new_tensor([width, height] * 2)
        wanted.append({"boxes": boxes, "labels": t["labels"] + first})
        if name == "mask_rcnn_fpn":
            wanted[-1]["masks"] = torch.ones(len(boxes), height, width, dtype=torch.uint8, device=device)
    steps = {}
    for way, model in (("ours", ours), ("torchvision", theirs), ("torchvision, our settings", same)):
        model = model.to(device).train()
        optimizer = (rcnn.build_sgd(cfg, model) if way == "ours"
                     else torch.optim.SGD(model.parameters(), 0.02, momentum=0.9))

        def step(model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            with common.autocast(device, amp):
                losses = model(list(images), wanted)
            sum(losses.values()).backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # random labels: nothing may run away while it is timed
            optimizer.step()
        steps[way] = step
    return steps


def library_step(args: argparse.Namespace, argv: list[str]) -> None:
    device = torch.device(args.device)
    parser = run.Parser()
    parser.add_argument("--batch_size", type=run.Images, default=2)
    parser.add_argument("--size", type=run.Pixels, nargs=2, default=(480, 600), metavar=("H", "W"))
    parser.add_argument("--amp", choices=["off", "bf16"], default="off")
    sizes = parser.parse_args(argv)
    torch.manual_seed(0)
    images = torch.randn(sizes.batch_size, 3, *sizes.size, device=device)
    targets = boxes_of(sizes.batch_size, 10, device)
    build_steps = detector_steps if args.method in TRANSFORMERS else rcnn_steps
    steps = build_steps(args.method, images, targets, device, sizes.amp)
    seconds = measure.interleave(steps, args.rounds, device)
    other = list(steps)[1]
    rows = [[way, measure.spread(seconds[way]), sizes.batch_size / measure.median(seconds[way]),
             *(measure.spread(measure.ratios(seconds, base, way)) for base in list(steps)[1:]),
             measure.peak_mib(steps[way], device)] for way in steps]
    versions = {other: importlib.import_module(other).__version__}
    measure.report(f"{args.method}: forward, loss, backward, optimizer",
                   ["way", "seconds", "images/s", *(f"{base} / way" for base in list(steps)[1:]), "peak MiB"], rows,
                   measure.machine(device, batch_size=sizes.batch_size, size=str(tuple(sizes.size)), amp=sizes.amp,
                                   **versions))


# ==== 3. Main ====


def main() -> None:
    parser = run.Parser(description=__doc__)
    parser.add_argument("--method", required=True, choices=[*LOSS, *TRANSFORMERS, *TORCHVISION])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=run.Count, default=5)
    parser.add_argument("--pixels", type=run.Pixels, nargs=2, metavar=("H", "W"),
                        help="of the DETR family's images; default: as the data set draws them")
    parser.add_argument("--ways", nargs="+", default=["ours", "plain", "bf16"],
                        choices=["ours", "plain", "bf16", "compile"])
    args, rest = parser.parse_known_args()
    (method_step if args.method in LOSS else library_step)(args, rest)


if __name__ == "__main__":
    run.cli(main)
