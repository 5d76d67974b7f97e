"""What makes a step fast without changing it: the forms in section 10 of common.py against the plain ones, and what
must not creep back (reads from the device, recompilation for every size, copies of queues and averages). No times:
those are in benchmarks/."""
import copy
import dataclasses
import functools
import importlib

import numpy as np
import pytest
import test_dupr
import test_soco
import torch
import torch._dynamo.testing
import torchvision
from conftest import small_config
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import common
import detectors
import detreg
import dupr
import soco

CPU = torch.device("cpu")
SHAPES = [(6, 5), (3, 7), (1, 2)]


# ==== Deformable attention ====


def attention_case(dtype, B=2, Q=9, M=4, D=8, P=3, shapes=SHAPES):
    """Points inside, outside and far outside the maps, none on the border of a cell, where the gradient of its place
    jumps."""
    g = torch.Generator().manual_seed(3)
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    place = torch.rand(B, Q, M, len(shapes), P, 2, generator=g, dtype=torch.float64) * (size + 6) - 3
    place[0, 0, 0, 0, 0] = 1e4
    locations = (place.floor() + (place % 1).clamp(0.05, 0.95) + 0.5) / size
    weights = torch.rand(B, Q, M, len(shapes) * P, generator=g, dtype=torch.float64).softmax(-1)
    weights = weights.view(B, Q, M, len(shapes), P)
    value = torch.randn(B, sum(h * w for h, w in shapes), M, D, generator=g, dtype=torch.float64)
    direction = torch.randn(B, Q, M * D, generator=g, dtype=torch.float64)
    return value.to(dtype), locations.to(dtype), weights.to(dtype), direction.to(dtype)


def attended(form, value, locations, weights, direction, shapes=SHAPES):
    leaves = [t.clone().requires_grad_() for t in (value, locations, weights)]
    output = form(leaves[0], shapes, *leaves[1:])
    output.backward(direction)
    return [output.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize(("dtype", "limit"), ((torch.float64, 1e-12), (torch.float32, 1e-5)))
def test_deformable_attention_on_cpu(dtype, limit):
    """Output and all three gradients; float32 against the float64 of the plain form."""
    exact = attended(common.multi_scale_deformable_attention, *attention_case(torch.float64))
    found = attended(common.deformable_attention_on_cpu, *attention_case(dtype))
    for a, b in zip(found, exact):
        assert a.dtype == dtype and a.shape == b.shape and ((a - b).abs().max() / b.abs().max()).item() < limit
    one = attention_case(dtype, B=1, Q=1, M=1, D=1, P=1, shapes=[(1, 1)])
    forms = (common.deformable_attention_on_cpu, common.multi_scale_deformable_attention)
    # fewer rows than neighbours
    for a, b in zip(*(attended(form, *one, shapes=[(1, 1)]) for form in forms)):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


def test_deformable_attention_at_a_place_that_is_nan():
    """Three heads: an index made from NaN once pointed outside the map."""
    value, locations, weights, _ = attention_case(torch.float32, M=3)
    locations[0, 0, 0, 0, 0] = torch.nan
    ours, plain = (form(value, SHAPES, locations, weights)
                   for form in (common.deformable_attention_on_cpu, common.multi_scale_deformable_attention))
    assert ours[0, 0, :8].isnan().all() and plain[0, 0, :8].isnan().all()
    torch.testing.assert_close(ours, plain, equal_nan=True, rtol=0, atol=1e-5)


def test_deformable_attention_without_a_gradient_of_the_places():
    """A frozen value, or frozen weights, ask for a part of the gradients only."""
    value, locations, weights, direction = attention_case(torch.float32)
    full = attended(common.deformable_attention_on_cpu, value, locations, weights, direction)
    for k in range(3):
        leaves = [t.clone().requires_grad_(i == k) for i, t in enumerate((value, locations, weights))]
        common.deformable_attention_on_cpu(leaves[0], SHAPES, *leaves[1:]).backward(direction)
        assert [t.grad is not None for t in leaves] == [i == k for i in range(3)]
        assert torch.equal(leaves[k].grad, full[1 + k])


def test_deformable_attention_in_bf16(monkeypatch):
    """Under autocast a module's output is within bf16's rounding of its float64 self, because places are never rounded
    to bf16."""
    torch.manual_seed(0)
    module = common.MSDeformAttn(32, len(SHAPES), 4, 3)
    nn.init.normal_(module.sampling_offsets.weight, std=0.3)
    nn.init.normal_(module.attention_weights.weight, std=0.3)
    S = sum(h * w for h, w in SHAPES)
    query, source, reference = torch.randn(2, 9, 32), torch.randn(2, S, 32), torch.rand(2, 9, len(SHAPES), 2)
    d = {name: p.detach().double() for name, p in module.named_parameters()}

    def project(x, name):
        return F.linear(x.double(), d[f"{name}.weight"], d[f"{name}.bias"])

    value = project(source, "value_proj")
    offsets = project(query, "sampling_offsets")
    weights = project(query, "attention_weights")
    size = torch.tensor([(w, h) for h, w in SHAPES], dtype=torch.float64)[:, None]
    locations = reference.double()[:, :, None, :, None] + offsets.view(2, 9, 4, len(SHAPES), 3, 2) / size
    weights = weights.view(2, 9, 4, -1).softmax(-1).view(2, 9, 4, len(SHAPES), 3)
    exact = common.multi_scale_deformable_attention(value.view(2, S, 4, 8), SHAPES, locations, weights)
    exact = F.linear(exact, d["output_proj.weight"], d["output_proj.bias"])
    seen = []
    form = common.deformable_attention_on_cpu

    def spy(value, shapes, locations, weights):
        seen.append((locations.dtype, weights.dtype))
        return form(value, shapes, locations, weights)

    monkeypatch.setattr(common, "deformable_attention_on_cpu", spy)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(query, reference, source, SHAPES, None)
    assert seen == [(torch.float32, torch.float32)]
    assert 1e-4 < ((found - exact).abs().max() / exact.std()).item() < 0.03  # rounded places: more than 0.1


def test_form_of_a_device(monkeypatch):
    """deformops is asked for on CUDA only, in its own order of arguments; without it CUDA and all other devices take
    the plain form."""
    assert common.deformable_attention_for(CPU) is common.deformable_attention_on_cpu
    for package in (None, object()):
        monkeypatch.setattr(common, "deformops", package)
        assert common.deformable_attention_for(torch.device("mps")) is common.multi_scale_deformable_attention
        expected = common.deformable_attention_by_deformops if package else common.multi_scale_deformable_attention
        assert common.deformable_attention_for(torch.device("cuda")) is expected

    class Package:
        class registry:
            @staticmethod
            def msda(value, shapes, starts, locations, weights):
                assert starts.tolist() == [0, 30, 51] and shapes.tolist() == [list(s) for s in SHAPES]
                assert not shapes.is_floating_point()
                shapes = [tuple(s) for s in shapes.tolist()]
                return common.multi_scale_deformable_attention(value, shapes, locations, weights)

    monkeypatch.setattr(common, "deformops", Package)
    *inputs, _ = attention_case(torch.float32)
    torch.testing.assert_close(common.deformable_attention_by_deformops(inputs[0], SHAPES, *inputs[1:]),
                               common.multi_scale_deformable_attention(inputs[0], SHAPES, *inputs[1:]))


# ==== Backbone, dropout, optimizer ====


@pytest.mark.parametrize("arch", ("resnet18", "resnet50"))
@pytest.mark.parametrize("norm", ("frozen", "bn"))
def test_backbone_is_torchvisions(arch, norm):
    """Norms inside the convolutions and channels last: torchvision's own forward, its gradients and its running
    statistics."""
    torch.manual_seed(1)
    backbone = common.Backbone(arch, (1, 2, 3, 4), norm, trainable=5).train()
    norm_layer = torchvision.ops.FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
    plain = getattr(torchvision.models, arch)(norm_layer=norm_layer).train()
    for module in backbone.modules():
        if isinstance(module, (torchvision.ops.FrozenBatchNorm2d, nn.BatchNorm2d)):
            for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
                getattr(module, name).data.uniform_(low, low + 1)
    assert plain.load_state_dict(backbone.body.state_dict(), strict=False).missing_keys == ["fc.weight", "fc.bias"]
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    outputs = []
    backbone, plain = backbone.double(), plain.double()  # norms of a few pixels amplify the rounding of float32
    x = plain.maxpool(plain.relu(plain.bn1(plain.conv1(images))))
    for layer in (plain.layer1, plain.layer2, plain.layer3, plain.layer4):
        x = layer(x)
        outputs.append(x)
    found = backbone(images)
    for a, b in zip(found, outputs):
        assert (a - b).abs().max() < 1e-10 * b.abs().max()
    for network in (found, outputs):
        sum(x.square().mean() / x.detach().square().mean() for x in network).backward()
    theirs = dict(plain.named_parameters())
    for name, p in backbone.body.named_parameters():
        assert (p.grad - theirs[name].grad).abs().max() < 1e-8 * theirs[name].grad.abs().max(), name
    for name, value in backbone.body.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-10, atol=1e-10)


def test_dropout():
    """Kept elements are scaled, as many are dropped as p says, gradients fall on the kept, and the draws are those of
    torch's generator."""
    x = torch.full((1000, 1001), 2.0, requires_grad=True)
    dropout = common.Dropout(0.1)
    torch.manual_seed(0)
    y = dropout(x)
    dropped = y == 0
    assert abs(dropped.float().mean().item() - 0.1) < 1e-3
    assert torch.equal(y[~dropped].unique(), torch.tensor([2.0]) * (1 / 0.9))
    assert abs(torch.corrcoef(torch.stack([dropped[:, :-1].flatten(), dropped[:, 1:].flatten()]).float())[0, 1]) < 5e-3
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(dropped, 0.0, 1 / 0.9))
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y) and not torch.equal(dropout(x), y)
    assert dropout(x.bfloat16()).dtype == torch.bfloat16 and dropout(x[:, :3].t()).shape == (3, 1000)
    assert dropout.eval()(x) is x and torch.equal(common.Dropout(1.0)(x), torch.zeros_like(x))


def test_fused_optimizer_is_the_plain_one(monkeypatch):
    def trained():
        torch.manual_seed(0)
        cfg = small_config(detreg.Config, num_feature_levels=1, lr_backbone=1e-3)
        model = detectors.build_detector(cfg, 3, focal=True)
        optimizer = common.build_optimizer(cfg, model)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p) if p.requires_grad else None
            optimizer.step()
        return optimizer.defaults["fused"], model.state_dict()

    fused, weights = trained()
    monkeypatch.setattr(common, "can_fuse", lambda model: False)
    plain, expected = trained()
    assert fused and not plain
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


# ==== A step reads nothing from the device ====


class Reads(TorchDispatchMode):
    """Counts operations whose result, or its shape, the host has to wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1].split(".")[0]
        by_mask = (name in ("index", "index_put", "index_put_", "_index_put_impl_")
                   and any(t is not None and t.dtype == torch.bool for t in args[1]))
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2",
                    "repeat_interleave") or by_mask:
            if not (name == "repeat_interleave" and len(args) > 1):  # with a number of repeats the shape is known
                self.found.append(name)
        return function(*args, **(kwargs or {}))


def one_step(method, device=CPU, **values):
    """(the network, a training step of the method on a small case, with these values of its configuration)"""
    if method == "soco":
        cfg = test_soco.config(**values)
        model, batch = soco.build_model(cfg).train().to(device), test_soco.batch_of(cfg)
        optimizer = soco.build_optimizer(cfg, model)
        return model, lambda: soco.train_step(cfg, model, optimizer, batch, 0.9, device)
    if method == "dupr":
        cfg = test_dupr.config(**test_dupr.ALL_LEVELS, **values)
        model, batch = test_dupr.small_model(cfg).to(device), test_dupr.batch_case()
        optimizer = dupr.build_optimizer(cfg, model)
        return model, lambda: dupr.train_step(cfg, model, optimizer, [batch], 0, device)
    script = importlib.import_module(method)
    cfg, model, batch = importlib.import_module(f"test_{method}").step_case()
    cfg, model = dataclasses.replace(cfg, **values), model.to(device)
    frozen = nn.Identity() if method == "detreg" else None
    optimizer = common.build_optimizer(cfg, model)
    criterion = script.build_criterion(cfg)
    return model, lambda: script.train_step(cfg, model.train(), frozen, criterion, optimizer, [batch], device)


@pytest.mark.parametrize("method", ("detreg", "updetr", "siamese_detr", "soco", "dupr"))
def test_a_step_waits_for_nothing(method, monkeypatch):
    """But for the matching, whose costs travel once for all layers and images."""
    model, step = one_step(method)
    moved = []
    solve = common.linear_sum_assignment
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self.numel()) or self)
    monkeypatch.setattr(common, "linear_sum_assignment", lambda cost: moved.append(cost.shape) or solve(cost))
    step()  # constants are made here
    moved.clear()
    reads = Reads()
    with reads:
        step()
    assert reads.found == []
    if method in ("soco", "dupr"):
        assert moved == []
    else:
        # one transfer, then all that is solved
        assert isinstance(moved[0], int) and all(isinstance(m, tuple) for m in moved[1:])
        assert moved[0] == sum(int(np.prod(shape)) for shape in moved[1:]) and len(moved) > 4


@pytest.mark.parametrize("method", ("soco", "dupr"))
def test_averages_and_queues_stay_where_they_are(method):
    """Averaged networks and queues are updated in place: no step copies them."""
    model, step = one_step(method)
    kept = {n: t for n, t in (*model.named_buffers(), *model.named_parameters()) if "queues" in n or "_k." in n}
    before = {n: (t.data_ptr(), t.clone()) for n, t in kept.items()}
    assert before
    step()
    after = dict((*model.named_buffers(), *model.named_parameters()))
    assert all(after[n].data_ptr() == pointer for n, (pointer, _) in before.items())
    changed = [n for n, (_, value) in before.items() if not torch.equal(after[n], value)]
    assert any("queues" in n for n in changed) == (method == "dupr") and len(changed) > 3


# ==== torch.compile ====


def test_sizes_are_not_compiled_one_by_one(monkeypatch):
    """--compile: the layers of a kind are compiled together, after a few sizes of images no other one is, and the
    results are those without."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    cfg = small_config(detreg.Config, enc_layers=2, num_feature_levels=3)
    plain = detectors.build_detector(cfg, 3, focal=True).eval()
    counter = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    compiled = copy.deepcopy(plain)
    counts = []
    assert common.wrap_model(compiled, CPU, compiled=True) is compiled
    for h, w in ((64, 64), (64, 96), (96, 64), (128, 96), (96, 160), (160, 64)):
        images, mask = torch.randn(2, 3, h, w), torch.zeros(2, h, w, dtype=torch.bool)
        mask[0, :, w - 20:] = True
        with torch.no_grad():
            found, expected = compiled(images, mask), plain(images, mask)
        torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"], rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[3:] == counts[2:3] * 3, counts
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    torch._dynamo.reset()
