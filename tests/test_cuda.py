"""On a GPU: the released numbers, mixed precision, --compile, a step that the host does not wait for, resume, NCCL.
Skipped without one (`pytest -m cuda`; benchmarks/gpu.py runs them)."""
import importlib
import json
import re

import pytest
import test_parity
import torch
from conftest import flags, run_processes
from test_fast import one_step

import common
import run

CUDA = torch.device("cuda")
METHODS = ("detreg", "updetr", "siamese_detr", "soco", "dupr")
pytestmark = pytest.mark.cuda

STEPS = re.compile("full|train|end_to_end|from_features|criterion|loss|infonce")
CASES = [name for name, path in test_parity.CASES.items() if STEPS.search(json.loads(path.read_text()).get("kind", ""))]


@pytest.fixture
def fp32(monkeypatch):
    """Convolutions in fp32, which by default are in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Torch:
    """torch, as test_parity.py is to see it: what it makes of an array is on the GPU, and so is its CPU."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def from_numpy(self, array):
        return torch.from_numpy(array).to(CUDA)

    def device(self, name):
        return CUDA if name == "cpu" else torch.device(name)


@pytest.mark.parametrize("case_id", CASES)
def test_released_numbers(case_id, tmp_path, monkeypatch, fp32):
    """Ten times the CPU's tolerance, for sums in another order; indices are the same. Here alone the GPU is PyTorch's
    default, so that the cases' own tensors are there."""
    numpy, array = torch.Tensor.numpy, torch.Tensor.__array__
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self, **values: numpy(self.cpu(), **values))
    monkeypatch.setattr(torch.Tensor, "__array__", lambda self, *a, **k: array(self.cpu(), *a, **k))
    monkeypatch.setattr(test_parity, "torch", Torch())
    monkeypatch.setattr(test_parity, "SLACK", 10)
    with CUDA:
        test_parity.test_case(case_id, tmp_path)
    test_parity.soco_entries.cache_clear()


def step_of(method, device, compiled=False, **values):
    """(its terms, gradients) on the host."""
    model, step = one_step(method, device, **values)
    common.wrap_model(model, device, compiled=compiled)
    run.seed_step(3, 0)
    terms = step()
    return ({name: value.item() for name, value in terms.items() if value.numel() == 1 and "error" not in name},
            {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_the_cpu(method, compiled, fp32):
    """Losses to 1e-3, gradients to 1 % of their norm; those of sampling points to 10 %: some start on the border of a
    pixel, where the gradient of a place jumps, and the CPU has another form. The steps draw no dropout."""
    torch._dynamo.reset()
    (terms, gradients), (expected, others) = step_of(method, CUDA, compiled), step_of(method, torch.device("cpu"))
    assert terms == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert gradients.keys() == others.keys()
    total = torch.stack([g.norm() for g in others.values()]).norm()
    for name, gradient in gradients.items():
        share = 0.1 if "sampling_offsets" in name else 0.01
        assert (gradient - others[name]).norm() < share * others[name].norm() + 1e-4 * total, name


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_close_to_fp32(method):
    found, expected = (step_of(method, CUDA, amp=amp)[0] for amp in ("bf16", "off"))
    found, expected = ({k: v for k, v in terms.items() if k != "grad_norm"} for terms in (found, expected))
    assert found == pytest.approx(expected, rel=0.05, abs=0.05) and found != expected


@pytest.mark.parametrize("amp", ("off", "bf16"))
@pytest.mark.parametrize("method", METHODS)
def test_the_host_does_not_wait(method, amp, monkeypatch):
    """But for the matching, whose costs travel once."""
    _, step = one_step(method, CUDA, amp=amp)
    step()  # constants are made here
    moved, cpu = [], torch.Tensor.cpu

    def wait(self):
        moved.append(self.numel())
        torch.cuda.set_sync_debug_mode("default")
        try:
            return cpu(self)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(torch.Tensor, "cpu", wait)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(moved) == (0 if method in ("soco", "dupr") else 1)


@pytest.mark.parametrize("amp", ("off", "bf16", "fp16"))
@pytest.mark.parametrize("method", ("detreg", "soco", "dupr"))
def test_resume(method, amp, tmp_path):
    """The losses are those of the run without an interruption. Not to the bit: some gradients are sums in the order in
    which threads come."""
    script, values = importlib.import_module(method), importlib.import_module(f"test_{method}").RUN
    lines = []
    for name, stops in (("one", (6,)), ("two", (3, 6))):
        for stop in stops:
            script.main(flags({**values, "probe_images": 0, "device": "cuda", "amp": amp, "out": tmp_path / name,
                               "max_steps": stop}))
        text = (tmp_path / name / "log.jsonl").read_text()
        lines.append({line["step"]: line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line})
    assert len(lines[0]) > 1 and lines[1] == pytest.approx(lines[0], rel=0.02)
    scales = [torch.load(tmp_path / name / "last.pt", weights_only=True).get("scaler") for name in ("one", "two")]
    assert scales[0] == scales[1] and bool(scales[0]) == (amp == "fp16")


def nccl_worker():
    """A backbone's gradient by DistributedDataParallel with SyncBatchNorm over NCCL, and by itself."""
    torch.manual_seed(0)
    images, gradients = torch.randn(4, 3, 64, 64, device=CUDA), []
    backbone = common.Backbone("resnet18", (4,), "bn", trainable=5).to(CUDA)
    for world in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "world_size", lambda: world)
            wrapped = common.wrap_model(backbone, CUDA)
        backbone.zero_grad(set_to_none=True)
        wrapped.train()(images)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in wrapped.modules())
    assert common.all_reduce_sum(torch.ones(2, device=CUDA)).tolist() == [1, 1]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())


def test_nccl_with_one_process(tmp_path):
    assert torch.distributed.is_nccl_available()
    run_processes("import test_cuda\ntest_cuda.nccl_worker()", tmp_path, world=1, device="cuda")
