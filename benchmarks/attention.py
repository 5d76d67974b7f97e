"""Multi-scale deformable attention: our forms against the released core and Hugging Face transformers', in time, memory
and exactness.

    python benchmarks/attention.py [--device cpu|cuda] [--rounds N] [--batch_sizes 2 16]
                                   [--sizes 480x600 800x1333] [--compile]

The stacked core is what the released codes fall back to without their CUDA operator: samples of all levels side by
side, one weighted sum. On CPU the clock is this process's CPU time at one thread, since others share the cores;
`--threads N` takes the wall time of N.
"""
from __future__ import annotations

import itertools
import time
from typing import Any, Callable

import measure  # first: it finds the project's files

import torch
import torch.nn.functional as F
from torch import Tensor

import common
import run


def stacked_core(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The usual form without a compiled operator: all B M D Q L P samples, then their weighted sum."""
    B, S, M, D = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    samples = []
    for level, (v, (H, W)) in enumerate(zip(value.split([h * w for h, w in shapes], 1), shapes)):
        v = v.flatten(2).transpose(1, 2).reshape(B * M, D, H, W)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(v, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(B * M, 1, Q, L * P)
    return (torch.stack(samples, -2).flatten(-2) * weights).sum(-1).view(B, M * D, Q).transpose(1, 2).contiguous()


def transformers_core() -> Callable[..., Tensor] | None:
    try:
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
    except ImportError:
        return None
    module = MultiScaleDeformableAttention()

    def attend(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        table = common.constant_tensor(tuple(shapes), value.device)
        return module(value, table, shapes, table.prod(1).cumsum(0) - table.prod(1), locations, weights, 64)
    return attend


def case(batch: int, image_hw: tuple[int, int], queries: int | None, device: torch.device,
         dtype: torch.dtype = torch.float32) -> tuple:
    """Inputs as a detector has them: four levels, 8 heads of 32 channels, 4 points some pixels around each reference.
    queries None: the encoder, every pixel of every level asks. No point lies on the border of a cell, where the
    gradient of its place jumps."""
    torch.manual_seed(0)
    h, w = image_hw
    shapes = [(-(-h // stride), -(-w // stride)) for stride in (8, 16, 32, 64)]
    grids = [torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij") for h, w in shapes]
    reference = (torch.rand(queries, 2) if queries
                 else torch.cat([torch.stack([x, y], -1).view(-1, 2) for y, x in grids]))
    Q = len(reference)
    size = torch.tensor([(w, h) for h, w in shapes]).view(4, 1, 2)
    place = reference.view(1, Q, 1, 1, 1, 2) * size + torch.randn(batch, Q, 8, 4, 4, 2) * 2 - 0.5
    locations = (place.floor() + (place % 1).clamp(0.01, 0.99) + 0.5) / size
    weights = torch.randn(batch, Q, 8, 16).softmax(-1).view(batch, Q, 8, 4, 4)
    value = torch.randn(batch, sum(h * w for h, w in shapes), 8, 32)
    return value.to(device, dtype), shapes, locations.to(device), weights.to(device, dtype)


def outputs_of(attend: Callable[..., Tensor], inputs: tuple, backward: bool) -> list[Tensor]:
    """[output] or [output, gradients of value, locations, weights] of its sum."""
    value, shapes, locations, weights = inputs
    leaves = [t.detach().requires_grad_(backward) for t in (value, locations, weights)]
    with torch.set_grad_enabled(backward):
        output = attend(leaves[0], shapes, *leaves[1:])
    if backward:
        output.backward(torch.ones_like(output))
    return [output.detach(), *(t.grad for t in leaves if backward)]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest deviation from the float64 result, relative to its standard deviation, over the output and the three
    gradients."""
    return max(((a.double() - b).abs().max() / b.std()).item() for a, b in zip(found, exact))


def main() -> None:
    parser = run.Parser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=run.Count, default=5)
    parser.add_argument("--batch_sizes", type=run.Images, nargs="+", default=[2])
    parser.add_argument("--sizes", nargs="+", default=["480x600", "800x1333"], help="of the images, HxW")
    parser.add_argument("--threads", type=run.Processes, default=1, help="1: CPU time; more: wall time")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference too")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    clock = time.process_time if device.type == "cpu" and args.threads == 1 else time.perf_counter
    reference = common.multi_scale_deformable_attention
    ours = common.deformable_attention_for(device)
    ways: dict[str, Callable[..., Tensor] | None] = {
        "stacked core": stacked_core, "transformers": transformers_core(), "reference": reference,
        "ours": ours if ours is not reference else None,
        "compiled reference": torch.compile(reference, dynamic=True) if args.compile else None}
    ways = {name: way for name, way in ways.items() if way}
    rows: list[list[Any]] = []
    for batch, size, (part, queries) in itertools.product(args.batch_sizes, args.sizes,
                                                          (("encoder", None), ("decoder", 300))):
        inputs = case(batch, tuple(map(int, size.split("x"))), queries, device)
        exact = [t.double() if isinstance(t, Tensor) else t for t in inputs]
        exact = outputs_of(reference, exact, True)
        errors = {name: error(outputs_of(way, inputs, True), exact) for name, way in ways.items()}
        del exact
        forward, both = (measure.interleave({name: lambda way=way: outputs_of(way, inputs, backward)
                                             for name, way in ways.items()}, args.rounds, device, clock=clock)
                         for backward in (False, True))
        for name, way in ways.items():
            rows.append([f"{part} {size} x{batch}", name, measure.spread(forward[name], 1000),
                         measure.spread(both[name], 1000),
                         measure.spread(measure.ratios(both, name, "stacked core")),
                         measure.peak_mib(lambda: outputs_of(way, inputs, True), device), f"{errors[name]:.1e}"])
    libraries = {"transformers": __import__("transformers").__version__} if "transformers" in ways else {}
    columns = ["case", "form", "forward ms", "forward + backward ms", "time / stacked core", "peak MiB",
               "largest error / std"]
    measure.report("Multi-scale deformable attention, fp32", columns, rows,
                   measure.machine(device, clock=clock.__name__, **libraries))


if __name__ == "__main__":
    run.cli(main)
