"""What a training step keeps in memory: GiB per image, and how large a batch a card takes.

    python benchmarks/memory.py [--methods detreg ...] [--ways fp32 bf16 ...] [--device cpu|cuda] [--check GB]

A step of the default recipe, its images of the largest size that the recipe has, on two small batches; from them on
the need is taken to be linear. Counted is what is held at most while gradients are computed: weights, frozen networks,
queues, activations, gradients; and the optimizer's state. CUDA: what PyTorch's allocator says. CPU: the step's tensors
without their numbers (FakeTensorMode: nothing is computed; the matcher's answer is made up), deformable attention by
grid_sample, as a GPU has it; not in it are a library's workspace, and attention with dropout keeps more than on a GPU.
SHARE of a card is taken to be usable. --check: one step more, on the batch that fits a card of so many GB; CUDA: with
no more memory than that.
"""
from __future__ import annotations

import argparse
import contextlib
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import measure  # first: it finds the project's files

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import common
import detectors
import finetune
import rcnn
import run
import train_step

CARDS = (16, 24, 40, 80)  # GB
SHARE = 0.9
WAYS = {"fp32": {}, "bf16": {"amp": "bf16"}, "fp32, checkpointed": {"checkpoint_activations": True},
        "bf16, checkpointed": {"amp": "bf16", "checkpoint_activations": True}}
# The two batches. Siamese DETR: BatchNorm needs two images; DUPR: from 11 on its logits take the same room
# (--logit_rows).
BATCHES = {"siamese_detr": (2, 3), "soco": (2, 4), "dupr": (12, 16)}
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
        batch = collate([dataset[0, i % len(dataset)] for i in range(images)])
        return train_step.resized(batch, list(hw)) if "images" in batch else batch

    def standing(self) -> int:
        """Bytes of networks, and of the optimizer's state, which its first step makes."""
        tensors = [t for network in self.networks for t in (*network.parameters(), *network.buffers())]
        state = [v for values in self.optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
        return sum(t.nbytes for t in {id(t.untyped_storage()): t for t in tensors + state}.values())


class Ledger(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are still there: now, and at most."""

    def __init__(self):
        super().__init__()
        self.held = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, result)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.held += storage.nbytes()
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def match_in_order(self, outputs: list[dict], targets: list[dict]) -> list[list[tuple]]:
    """In the place of the matcher, which reads numbers: target i and query i."""
    counts = [torch.arange(len(t["labels"])) for t in targets]
    return [[(n, n) for n in counts] for _ in outputs]


def peak_bytes(case: Case, batch: dict[str, Any]) -> int:
    """Most bytes held at once in a step, up to the optimizer's, beyond what was held before."""
    case.optimizer.zero_grad()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(case.optimizer, "step", lambda: None))
        if case.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(case.device)
            before = torch.cuda.memory_allocated(case.device)
            case.step(batch)
            return torch.cuda.max_memory_allocated(case.device) - before
        stack.enter_context(mock.patch.object(common, "deformable_attention_for",
                                              lambda device: common.multi_scale_deformable_attention))
        stack.enter_context(mock.patch.object(common.HungarianMatcher, "__call__", match_in_order))
        ledger = stack.enter_context(Ledger())
        case.step(batch)
    return ledger.most


def without_numbers(network: torch.nn.Module, fake: FakeTensorMode) -> torch.nn.Module:
    """The same network, its weights without their numbers, before its optimizer is made."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter.data, FakeTensor):
                module._parameters[name] = torch.nn.Parameter(fake.from_tensor(parameter.detach()),
                                                              parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake.from_tensor(buffer)
    return network


class Need(NamedTuple):
    """Bytes of an image, and beside the images; --check: images of that step, what it took / what was fitted."""
    each: float
    beside: float
    images: int | None = None
    ratio: float | None = None

    def fits(self, card: int) -> float:
        """Images."""
        return (SHARE * card * 1e9 - self.beside) / self.each


def measured(name: str, way: str, folder: str, device: torch.device, check: int | None) -> tuple[Case, Need]:
    fake = FakeTensorMode(allow_non_fake_inputs=True) if device.type == "cpu" else contextlib.nullcontext()
    common.constant_tensor.cache_clear()
    wrap = common.wrap_model

    def wrap_without_numbers(model: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
        return wrap(without_numbers(model, fake), *args, **options)

    with mock.patch.object(common, "wrap_model", wrap_without_numbers) if device.type == "cpu" else fake:
        case = Case(name, WAYS[way], device)
    for network in case.networks if device.type == "cpu" else ():
        without_numbers(network, fake)

    def peak(images: int) -> int:
        batch = case.batch(images, folder)
        if device.type == "cpu":  # but for what the step reads
            batch = {k: v if k == "valid" else tree_map_only(torch.Tensor, fake.from_tensor, v)
                     for k, v in batch.items()}
        with fake:
            return peak_bytes(case, batch)

    few, many = BATCHES.get(name, (1, 2))
    less, more = peak(few), peak(many)
    with fake:
        case.optimizer.step()
    each = (more - less) / (many - few)
    need = Need(each, case.standing() + less - few * each)
    if check:
        images = max(many, min(int(need.fits(check)), case.cfg.batch_size))
        with allowed(check * 1e9, device):
            taken = peak(images)
        need = need._replace(images=images, ratio=taken / (less + (images - few) * each))
    common.constant_tensor.cache_clear()
    return case, need


@contextlib.contextmanager
def allowed(size: float, device: torch.device) -> Iterator[None]:
    """CUDA: no more than so many bytes may be taken."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), device)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def fitting(batch: int, least: int, images: float) -> str:
    """batch / accumulate on one card that takes so many images at once; least: see RunConfig.least_micro_batch."""
    if 1 < least < batch:  # DUPR: groups of this size
        return f"{batch} / {batch // least}" if images >= least else "-"
    if images >= batch:
        return str(batch)
    for parts in range(2, batch + 1):
        if least == 1 and batch % parts == 0 and batch // parts <= images:
            return f"{batch} / {parts}"
    whole = int(images) if least > batch else 0  # SoCo: a smaller batch
    return f"{2 ** (whole.bit_length() - 1)} only" if whole else "-"


def main() -> None:
    parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*train_step.LOSS, *DETECTORS],
                        default=[*train_step.LOSS, *train_step.TRANSFORMERS])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS),
                        help="checkpointed: --checkpoint_activations")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", type=run.Count, metavar="GB", help="of a card: a step on as many images as fit")
    args = parser.parse_args()
    device, rows = torch.device(args.device), []
    if device.type == "cpu" and {*args.methods} & {*train_step.TORCHVISION}:
        raise common.UserError("the R-CNN family's step reads what it computes: only with --device cuda")
    columns = ["method", "way", "image", "GiB per image", "GiB beside", *(f"{card} GB" for card in CARDS),
               "checked, images", "taken / fitted"]
    for name in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            for way in args.ways:
                case, need = measured(name, way, folder, device, args.check)
                rows.append([name, way, "x".join(map(str, case.largest())), need.each / 2**30, need.beside / 2**30,
                             *(fitting(case.cfg.batch_size, case.cfg.least_micro_batch, need.fits(card))
                               for card in CARDS), need.images, need.ratio])
                print(*rows[-1], sep="  ", flush=True)
    measure.report("memory of a training step: batch / --accumulate on one card", columns, rows,
                   measure.machine(device, usable=SHARE))


if __name__ == "__main__":
    run.cli(main)
