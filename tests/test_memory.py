"""What makes a step fit: fp16 with its scaled loss, layers that are computed twice. That both are the same step, over
one process and two, and go on after an interruption."""
import copy
import dataclasses
import json
import math

import pytest
import test_finetune
import test_rcnn
import test_updetr
import torch
from conftest import ROOT, flags, small_config
from test_dupr import batch_case
from test_fast import one_step
from test_run import JobConfig, Source
from torch import nn

import common
import detectors
import dupr
import finetune

import probe
import run
import updetr

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# ==== fp16 ====


METHODS = ("detreg", "updetr", "siamese_detr", "soco", "dupr")


def test_all_scripts_step_in_one_place():
    for script in (*METHODS, "finetune", "probe", "segmentation"):
        text = (ROOT / f"{script}.py").read_text()
        assert (text.count("common.backward(loss, optimizer, cfg.amp)") == 1 == text.count("common.clip_and_step(")
                and ".backward()" not in text and "optimizer.step()" not in text), script


@pytest.mark.parametrize("method", ("detreg", "dupr"))
def test_a_scaled_loss_gives_the_same_step(method, monkeypatch):
    """In fp32 a factor of 2**16 changes no bit of a gradient, which is unscaled before it is clipped."""
    monkeypatch.setattr(common, "autocast", lambda device, amp: torch.autocast("cpu", enabled=False))
    results = []
    for amp in ("off", "fp16"):
        model, step = one_step(method, amp=amp, **{"clip_max_norm": 0.1} if method == "detreg" else {})
        run.seed_step(3, 0)
        results.append((step(), model))
    same_to_the_bit(*results)


@pytest.mark.parametrize(("method", "device"), [
    ("dupr", "cpu"), *(pytest.param(method, "cuda", marks=pytest.mark.cuda) for method in METHODS)])
def test_fp16_is_close_to_fp32(method, device):
    """The losses, and a gradient that is finite once the scale is small enough. On CPU convolutions in fp16 take a
    hundred times as long."""
    results = []
    for amp in ("off", "fp16"):
        _, step = one_step(method, torch.device(device), amp=amp)
        run.seed_step(3, 0)
        terms = step()
        results.append({name: terms[name].item() for name in terms if name.startswith(("loss", "image", "patch"))})
        for _ in range(8):
            terms = terms if terms["grad_norm"].isfinite() else step()
        assert terms["grad_norm"].isfinite()
    assert results[0] == pytest.approx(results[1], rel=0.05, abs=0.02) and results[0] != results[1]


def test_a_step_in_fp16_is_the_step_without():
    """Micro-batches add up, are unscaled before they are clipped, and an overflow changes nothing but the scale."""
    model, found = nn.Linear(3, 1), {}
    x, start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), copy.deepcopy(model.state_dict())
    for amp in ("off", "fp16"):
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
        for large in (1.0, math.inf, 1.0, 1.0):
            if amp == "off" and large > 1:
                continue
            optimizer.zero_grad()
            for i, part in enumerate(x.split(2)):
                common.backward(100 * model(part).sum() * large ** i, optimizer, amp)
            before = copy.deepcopy(model.state_dict())
            norm = common.clip_and_step(model, optimizer, amp, 0.5)
            assert norm.isfinite() == (large == 1)
            assert large == 1 or all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        found[amp] = norm, model.state_dict(), [p.grad for p in model.parameters()]
    torch.testing.assert_close(found["fp16"], found["off"])
    assert optimizer.loss_scaler.get_scale() == 2**15 and found["off"][0] > 100


class Half(nn.Module):
    """Something that overflows in fp16 where it is told to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)

    def forward(self, factor, forward):
        with common.autocast(CPU, "fp16"):
            x = self.norm(self.linear(torch.randn(4, 2) * forward).float())
        return x.square().mean() * factor + self.linear.weight.sum()


def train(out, factors={}, forward={}, model=None, **values):
    """A run in fp16 whose loss is multiplied by `factors`, its input by `forward`, in these steps."""
    cfg = JobConfig(out=str(out), amp="fp16", epochs=20, **{"save_every": 4, **values})
    job = run.Run(cfg, "tiny", Source(), 10, CPU, lambda metrics: "")
    model = model or Half()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    job.restore(model, optimizer)
    for step in job.steps():
        optimizer.zero_grad()
        for _ in range(2):
            loss = model(factors.get(step, 1.0), forward.get(step, 1.0))
            common.backward(loss, optimizer, cfg.amp)
        terms = {"loss": loss.detach(), "grad_norm": common.clip_and_step(model, optimizer, cfg.amp, 1.0)}
        job.check(step, terms, [{"index": [0, 1]}])
        job.log(step, terms, "loss")
        job.save(step)
    return job


def test_skipped_steps_are_counted_over_an_interruption(tmp_path, capsys):
    factors = {1: 1e36, 2: 1e36, 5: 1e36}
    one = train(tmp_path / "one", factors, steps=8)
    for steps in (2, 8):
        train(tmp_path / "two", factors, steps=8, max_steps=steps)
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "two")]
    assert states[0]["skipped_steps"] == states[1]["skipped_steps"] == [3, 0]
    assert states[0]["scaler"] == states[1]["scaler"] and states[0]["scaler"]["scale"] == 2.0**13
    assert all(torch.equal(v, states[1]["model"][k]) for k, v in states[0]["model"].items())
    lines = [json.loads(line, parse_constant=None) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 2, 3, 3, 3]
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [1, 2, 5]
    one.end({})
    assert "3 of 8 steps were skipped: their gradient overflowed fp16" in capsys.readouterr().out
    other = run.Run(dataclasses.replace(one.cfg, amp="bf16", allow_config_change=True, steps=9), "tiny", Source(), 10,
                    CPU, lambda metrics: "")
    optimizer = torch.optim.SGD((model := Half()).parameters(), 0.1, momentum=0.9)
    other.restore(model, optimizer)  # without a scaler
    assert not common.loss_scaler(optimizer, "bf16").is_enabled()


def test_endless_skipping_ends_a_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^step 32: not finite: loss nan, grad_norm nan, as the 29 steps "
                                                 r"before, which were skipped too; images of this process: image0, "):
        train(tmp_path / "one", dict.fromkeys(range(3, 99), math.nan), steps=60)
    with pytest.raises(FloatingPointError, match=r"^step 4: .*grad_norm nan, and so is norm.running_mean now; images"):
        train(tmp_path / "two", {}, {4: 1e6}, steps=60)  # an overflow in the forward pass
    assert torch.load(tmp_path / "two/last.pt", weights_only=True)["step"] == 4
    # what is not finite though the gradient is changed weights: no step that was skipped
    watch = run.FiniteWatch(tmp_path, str, skips=True)
    watch.check(5, {"loss": torch.tensor(math.nan), "grad_norm": torch.tensor(1.0)}, [{"index": [0]}])
    with pytest.raises(FloatingPointError, match="^step 5: not finite: loss nan; images"):
        watch.settle()


# ==== Activations that are computed twice ====


def detector_step(detector, norm, checkpointed, **values):
    """(terms, network) of a step of finetune.py with dropout; the backbone learns."""
    cfg = small_config(finetune.Config, detector=detector, dropout=0.1, lr_backbone=1e-5, backbone_norm=norm,
                       num_feature_levels=3, checkpoint_activations=checkpointed, dn_groups=2, enc_layers=2, **values)
    torch.manual_seed(0)
    model = detectors.build_detector(cfg, 4 + (detector == "detr"), focal=detector != "detr").train()
    batch = test_finetune.step_case()
    if common.world_size() > 1:
        batch = {k: v[2 * common.rank():2 * common.rank() + 2] for k, v in batch.items()}
    wrapped = common.wrap_model(model, CPU, checkpointed=checkpointed)
    run.seed_step(3, 0)
    terms = finetune.train_step(cfg, wrapped, finetune.build_criterion(cfg), common.build_optimizer(cfg, model),
                                [batch], CPU)
    return terms, model


def rcnn_step(checkpointed):
    model = test_rcnn.build("faster_rcnn_fpn", fpn_channels=64).train()
    common.wrap_model(model, CPU, checkpointed=checkpointed)
    torch.manual_seed(1)
    terms = model(*test_rcnn.batch_of())
    sum(terms.values()).backward()
    return terms, model


def dupr_step(checkpointed):
    cfg = dupr.Config(arch="resnet18", image_size=64, roi_sizes=(16, 8, 4, 2), embedding_dim=16, queue_size=40)
    model = dupr.build_model(cfg).train()
    wrapped = common.wrap_model(model, CPU, checkpointed=checkpointed)
    return dupr.train_step(cfg, wrapped, dupr.build_optimizer(cfg, model), [batch_case()], 0, CPU), model


def kept_bytes(step, *args):
    """(what it gives, bytes that its graph keeps beside those of checkpoints)."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        result = step(*args)
    return result, sum(kept)


def same_to_the_bit(one, two):
    (terms, model), (other_terms, other) = one, two
    assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in other_terms.items()}
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    others = {k: p.grad for k, p in other.named_parameters() if p.grad is not None}
    assert gradients.keys() == others.keys() and all(torch.equal(g, others[k]) for k, g in gradients.items())
    state, others = model.state_dict(), other.state_dict()  # BatchNorm has counted the batch once
    assert state.keys() == others.keys() and all(torch.equal(v, others[k]) for k, v in state.items())


@pytest.mark.parametrize("step", [
    lambda on: detector_step("conditional_detr", "frozen", on), lambda on: detector_step("detr", "bn", on),
    lambda on: detector_step("dn_deformable_detr", "frozen", on), rcnn_step, dupr_step],
    ids=("conditional", "detr", "dn", "rcnn", "dupr"))
def test_layers_computed_twice_are_the_same_step(step):
    """Losses, gradients, running statistics, to the bit, dropout and denoising included."""
    (kept, more), (recomputed, less) = kept_bytes(step, False), kept_bytes(step, True)
    same_to_the_bit(kept, recomputed)
    assert less < 0.5 * more


def test_what_is_not_trained_is_computed_once():
    """Nothing of it is kept anyway; and without a gradient nothing is computed twice."""
    cfg = small_config(finetune.Config, detector="detr", lr_backbone=1e-5, backbone_norm="frozen")
    model = detectors.build_detector(cfg, 4, focal=False)
    common.wrap_model(model, CPU, checkpointed=True)
    twice = {name for name, module in model.named_modules() if "forward" in vars(module)}
    body = {f"backbone.0.body.layer{i}.{j}" for i in (2, 3, 4) for j in (0, 1)}  # layer1 is frozen
    assert twice == body | {"transformer.encoder.layers.0"} | {f"transformer.decoder.layers.{i}" for i in (0, 1)}
    other = copy.deepcopy(model)  # an average, say: its layers are its own
    layer = other.transformer.encoder.layers[0]
    assert layer.forward.args[0] is layer
    calls = []
    layer.linear1.register_forward_hook(lambda *args: calls.append(args))
    images, mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        other(images, mask)
    assert len(calls) == 1
    other(images, mask)["pred_logits"].sum().backward()
    assert len(calls) == 3


# ==== Too little ====


def test_out_of_memory_in_probes(fails, tmp_path, monkeypatch):
    """What a run has trained is saved before."""
    def run_out(*args, **values):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(updetr, "find_patches", run_out)
    line = fails(updetr.main, flags({**test_updetr.RUN, "out": tmp_path / "run", "max_steps": 1}))
    assert "error: out of memory (CUDA out of memory); give smaller --max_size, or a machine with more memory;" in line
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 1
    monkeypatch.setattr(probe, "fixed_batches", run_out)
    line = fails(probe.main, ["knn", "random", *flags({"preset": "demo", "out": tmp_path / "knn"})])
    assert line.endswith("give smaller --image_size, --batch_size, or a machine with more memory")


# ==== Two processes ====


def overflow_of_one():
    """(whether the weights stayed, scale) after each of two steps; in the first the second process overflows."""
    model = nn.Linear(2, 1)
    nn.init.ones_(model.weight)
    wrapped = common.wrap_model(model, CPU)
    optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
    for large in (math.inf, 1.0):
        before = model.weight.clone()
        optimizer.zero_grad()
        common.backward(wrapped(torch.ones(1, 2)).sum() * (large if common.rank() else 1.0), optimizer, "fp16")
        common.clip_and_step(model, optimizer, "fp16")
        found.append((torch.equal(before, model.weight), optimizer.loss_scaler.get_scale()))
    return found


def worker():
    """What one of two processes does (conftest.two_processes)."""
    steps = [detector_step("deformable_detr", "frozen", on) for on in (False, True)]
    return {"overflow": overflow_of_one(),
            "steps": [(terms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
                      for terms, model in steps]}


def test_both_skip_what_one_overflows(two_processes):
    for found in two_processes["test_memory"]:
        assert found["overflow"] == [(True, 2.0**15), (False, 2.0**15)]


def test_two_processes_compute_twice(two_processes):
    for found in two_processes["test_memory"]:
        (terms, gradients), (other_terms, others) = found["steps"]
        assert terms == other_terms and len(gradients) > 40
        assert gradients.keys() == others.keys() and all(torch.equal(g, others[n]) for n, g in gradients.items())
    assert terms["loss_bbox"] != two_processes["test_memory"][0]["steps"][0][0]["loss_bbox"]
