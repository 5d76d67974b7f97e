"""What a training step keeps in memory: GiB per image, and how large a batch a card takes.

    python benchmarks/memory.py [--methods detreg ...] [--ways fp32 bf16 ...] [--device cpu|cuda]

A step of the default recipe, its images of the largest size that the recipe has, on two small batches; between them
the need is taken to be linear. Counted is what PyTorch's allocator holds at most while gradients are computed: weights,
frozen networks, queues, activations, gradients; and the optimizer's state. On CPU what a GPU would do is counted,
attention by grid_sample included, but for its library's workspace and its dropout inside attention, which keeps less
there. SHARE of a card is taken to be usable.
"""
from __future__ import annotations

import argparse
import contextlib
import tempfile
from typing import Any
from unittest import mock

import measure  # first: it finds the project's files

import torch

import common
import detectors
import finetune
import rcnn
import run
import train_step

CARDS = (16, 24, 80)  # GB
SHARE = 0.9
WAYS = {"fp32": {}, "bf16": {"amp": "bf16"}, "fp32, twice": {"checkpoint_activations": True},
        "bf16, twice": {"amp": "bf16", "checkpoint_activations": True}}
# The two batches. DUPR: from 11 images on its logits take the same room (--logit_rows).
BATCHES = {"soco": (2, 4), "dupr": (12, 16)}
DETECTORS = (*train_step.TRANSFORMERS, *train_step.TORCHVISION)


class Case:
    """A method, or fine-tuning of a detector, in one way: `step` on batches of any number of images."""

    def __init__(self, name: str, values: dict[str, Any], device: torch.device):
        self.name, self.device = name, device
        if name in DETECTORS:
            flags = ["--data", "coco", "--detector", name, "--backbone_weights", "random"]
            self.cfg = self.config(finetune, flags, values)
            classes = 80 + (name == "detr")
            model = (rcnn.build_rcnn(self.cfg, classes) if rcnn.is_rcnn(name)
                     else detectors.build_detector(self.cfg, classes, focal=name != "detr")).to(device).train()
            wrapped = common.wrap_model(model, device, checkpointed=self.cfg.checkpoint_activations)
            self.optimizer = finetune.build_optimizer(self.cfg, model)
            criterion, networks = finetune.build_criterion(self.cfg), [model]
            self.step = lambda batch: finetune.train_step(self.cfg, wrapped, criterion, self.optimizer, [batch], device)
        else:
            script = __import__(name)
            self.cfg = self.config(script, ["--backbone_weights", "random"], values)
            step = train_step.Step(name, self.cfg, device)
            self.optimizer = next(a for a in step.arguments if isinstance(a, torch.optim.Optimizer))
            networks = [a for a in step.arguments if isinstance(a, torch.nn.Module)]
            self.step = step
        self.networks = [n for n in networks if not isinstance(n, common.SetCriterion)]

    @staticmethod
    def config(script: Any, flags: list[str], values: dict[str, Any]) -> Any:
        cfg = run.parse_config(script.Config, script.PRESETS, flags, script=script.__name__, description="",
                               recipe=script.recipe_of)
        return type(cfg)(**{**vars(cfg), **values})

    def largest(self) -> tuple[int, int]:
        """(height, width) of the largest picture, lying; of SoCo and DUPR the side of a view."""
        if hasattr(self.cfg, "scales"):
            return max(self.cfg.scales), self.cfg.max_size
        return (self.cfg.image_size,) * 2

    def batch(self, images: int, folder: str) -> dict[str, Any]:
        hw = self.largest()
        if self.name in DETECTORS:
            targets = train_step.boxes_of(images, 10, torch.device("cpu"))  # boxes of COCO: 7 per image
            for target in targets if self.name.startswith("mask") else ():
                target["masks"] = torch.ones(10, *hw, dtype=torch.uint8)
            return {"images": torch.randn(images, 3, *hw), "mask": torch.zeros(images, *hw, dtype=torch.bool),
                    "targets": targets}
        flags = ["--data", "synthetic", "--synthetic_size", "448", "--synthetic_images", "16",
                 "--batch_size", str(images)]
        if getattr(self.cfg, "proposal_method", "none") != "none":
            flags += ["--proposal_method", "random"]
        _, dataset, collate = train_step.open_data(self.name, flags, folder)
        batch = collate([dataset[0, i] for i in range(images)])
        return train_step.resized(batch, list(hw)) if "images" in batch else batch

    def standing(self) -> int:
        """Bytes of networks, and of the optimizer's state, which its first step makes."""
        tensors = [t for network in self.networks for t in (*network.parameters(), *network.buffers())]
        state = [v for values in self.optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
        return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors + state}.values())


def peak_bytes(case: Case, batch: dict[str, Any]) -> int:
    """Most bytes that the allocator has given out at once in a step, up to the optimizer's, beyond what was held."""
    case.optimizer.zero_grad()
    plain = case.device.type == "cpu"
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(case.optimizer, "step", lambda: None))
        if not plain:
            torch.cuda.reset_peak_memory_stats(case.device)
            before = torch.cuda.memory_allocated(case.device)
            case.step(batch)
            return torch.cuda.max_memory_allocated(case.device) - before
        stack.enter_context(mock.patch.object(common, "deformable_attention_for",
                                              lambda device: common.multi_scale_deformable_attention))
        profile = stack.enter_context(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                                             profile_memory=True))
        case.step(batch)
    held = most = 0
    for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
                        key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def fitting(batch: int, least: int, images: float) -> str:
    """batch / accumulate on one card that takes so many images at once; least: see RunConfig.least_micro_batch."""
    if images >= batch:
        return str(batch)
    for parts in range(2, batch + 1):
        if batch % parts == 0 and batch // parts <= images and batch // parts >= least:
            return f"{batch} / {parts}"
    below = int(images) if images < least > 10**6 else 0  # whole batches only: a smaller one
    return f"{2 ** (below.bit_length() - 1)} only" if below else "-"


def main() -> None:
    parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*train_step.LOSS, *DETECTORS],
                        default=[*train_step.LOSS, "deformable_detr", "faster_rcnn_fpn"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS),
                        help="twice: with --checkpoint_activations")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device, rows = torch.device(args.device), []
    columns = ["method", "way", "image", "GiB per image", "GiB beside", *(f"{card} GB" for card in CARDS)]
    for name in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            for way in args.ways:
                case, found = Case(name, WAYS[way], device), []
                for images in BATCHES.get(name, (1, 2)):
                    found.append((images, peak_bytes(case, case.batch(images, folder))))
                case.optimizer.step()
                (few, less), (many, more) = found
                each = (more - less) / (many - few)
                beside = case.standing() + less - few * each
                fits = [(SHARE * card * 1e9 - beside) / each for card in CARDS]
                rows.append([name, way, "x".join(map(str, case.largest())), each / 2**30, beside / 2**30,
                             *(fitting(case.cfg.batch_size, case.cfg.least_micro_batch, n) for n in fits)])
                print(f"{name}, {way}: {each / 2**30:.3g} GiB per image", flush=True)
                del case
    measure.report("memory of a training step: batch / --accumulate on one card", columns, rows,
                   measure.machine(device, usable=SHARE))


if __name__ == "__main__":
    run.cli(main)
