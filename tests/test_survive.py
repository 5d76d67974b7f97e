"""Runs that are killed, stopped, damaged, moved or poisoned, and go on. Every run is a process of its own that may really be killed; all come from one
server process that has imported everything already (multiprocessing's forkserver), so that a run takes a second."""
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, SMALL, flags
from torchvision.models.resnet import BasicBlock, ResNet

SCRIPTS = ("detreg", "updetr", "siamese_detr", "soco", "dupr", "finetune")
SHARED = {"synthetic_images": 10, "synthetic_size": 64, "batch_size": 4, "max_steps": 5, "save_every": 2, "log_every": 1, "num_workers": 0, "seed": 3,
          "device": "cpu", "backbone_weights": "random"}                  # two steps an epoch, checkpoints after 2, 4 and 5
DETR = {**SHARED, **SMALL, "preset": "demo", "probe_images": 0, "epochs": 9, "scales": (48, 64), "max_size": 96, "dropout": 0.1}
TUNE = {**SHARED, "data": "synthetic", "synthetic_test_images": 2, "eval_size": 48, "scales": (48, 64), "max_size": 96, "epochs": 9}
RUNS = {
    "detreg": {**DETR, "num_feature_levels": 3, "crop_scales": (64, 72), "crop_range": (40, 60), "patch_size": 16, "max_prop": 6, "proposal_grid": 64},
    "updetr": {**DETR, "patch_size": 32, "num_patches": 4, "mask_ratio": 0.1},
    "siamese_detr": {**DETR, "patch_size": 16, "num_regions": 4, "lambda_global": 2.0},
    "soco": {**SHARED, "preset": "demo", "probe_images": 0, "epochs": 9, "proposal_method": "random", "fpn_channels": 16, "head_dim": 24, "mlp_dim": 32,
             "embedding_dim": 16, "image_size": 64, "small_size": 32, "backbone": "resnet18", "level_sizes": (14, 28, 55, 64), "min_side": 8},
    "dupr": {**SHARED, "preset": "demo", "probe_images": 0, "epochs": 9, "arch": "resnet18", "image_size": 64, "roi_sizes": (16, 8, 4, 2),
             "embedding_dim": 16, "queue_size": 40, "queued_patches": 2},
    "finetune": {**TUNE, **SMALL, "detector": "deformable_detr", "dropout": 0.1, "crop_scales": (48,), "crop_range": (30, 44)},
    "rcnn": {**TUNE, "detector": "faster_rcnn_fpn", "arch": "resnet18", "backbone_norm": "bn", "fpn_channels": 32, "head_dim": 16, "anchor_size": 8,
             "proposals_per_image": 12, "rois_per_image": 8, "precise_bn": 1, "warmup_iters": 2},
}


# ==== Processes that can be killed =================================================================================

class Narrow(ResNet):
    """ResNet with an eighth of the channels: what is tested does not hang on them, and a step takes milliseconds."""

    def __init__(self, **kwargs):
        super().__init__(BasicBlock, [1, 1, 1, 1], norm_layer=kwargs["norm_layer"])
        self.fc = torch.nn.Linear(64, 2)

    def _make_layer(self, block, planes, blocks, **kwargs):
        return super()._make_layer(block, planes // 8, blocks, **kwargs)


def child(method: str, argv: list[str], env: dict[str, str], fault: tuple, output: Path) -> None:
    """One process of a run, as its command. fault (kind, when, rank): see below."""
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    import common
    multiprocessing.set_start_method("fork", force=True)                  # of loader processes, as in a run of its own
    torch.set_num_threads(1)
    torchvision.models.resnet18 = lambda weights, **kwargs: Narrow(**kwargs)
    script = importlib.import_module("finetune" if method == "rcnn" else method)
    kind, when, rank = fault
    calls = {"step": 0, "save": 0}
    step, save, replace = script.train_step, torch.save, os.replace

    def die(number=signal.SIGKILL):
        os.kill(os.getpid(), number)

    def faulty_step(cfg, model, *args):
        calls["step"] += 1
        if calls["step"] == when and int(env.get("RANK", 0)) == rank:
            if kind == "kill":
                die()
            if isinstance(kind, signal.Signals):
                die(kind)
            if kind == "raise":
                raise ValueError("a fault of ours")
            if kind == "sleep":
                time.sleep(60)
            if kind == "nan":
                [p for p in model.parameters() if p.requires_grad][-1].data.fill_(torch.nan)
        return step(cfg, model, *args)

    def faulty_save(state, file):
        calls["save"] += 1
        if kind == "kill saving" and calls["save"] == when:
            file.write(b"half a checkpoint")
            file.flush()
            die()
        save(state, file)

    def faulty_replace(source, target):
        replace(source, target)
        if kind == "kill renaming" and calls["save"] == when and Path(target).name == "previous.pt":
            die()

    script.train_step, torch.save, os.replace = faulty_step, faulty_save, faulty_replace
    common.cli(lambda: script.main(argv))


@pytest.fixture(scope="module")
def start():
    """start(method, out, world=1, fault=..., **values) -> (exit codes, what each process printed)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(SCRIPTS))
    path, before = f"{ROOT}{os.pathsep}{ROOT / 'tests'}", os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path                                       # of the server, which starts with the first process

    def run(method, out, world=1, fault=("", 0, 0), timeout=60, **values):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        argv, processes = flags({**RUNS[method], "out": out, **values}), []
        for r in range(world):
            env = {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "PROCESS_TIMEOUT": "8"} if world > 1 else {}
            processes.append(context.Process(target=child, args=(method, argv, env, fault, out.with_name(f"{out.name}-{r}.txt"))))
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
        printed = [out.with_name(f"{out.name}-{r}.txt").read_text() for r in range(world)]
        assert not late, printed
        return [process.exitcode for process in processes], printed

    yield run
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def same(one, two, where="") -> None:
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two)):
            same(a, b, f"{where}[{i}]")
    else:
        assert one == two or one != one and two != two, where


def load(out: Path, name: str = "last.pt") -> dict:
    return torch.load(out / name, weights_only=True)


def logged(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "memory_gib", "seconds")} for line in lines]


def same_run(one: Path, two: Path) -> None:
    """Weights, EMA networks, queues, optimizer, logged values and metrics, bit by bit; only --out, --num_workers and the processes may differ."""
    states = [load(out) for out in (one, two)]
    for state in states:
        for name in ("out", "num_workers", "allow_config_change"):
            del state["config"][name]
    same(*states)
    same(logged(one), logged(two))
    same(*(json.loads((out / "metrics.json").read_text()) for out in (one, two)))


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """Runs that nothing happened to, each made once: unbroken(method, world)."""
    folder, made = tmp_path_factory.mktemp("unbroken"), {}

    def run(method, world=1):
        out = folder / f"{method}{world}"
        if (method, world) not in made:
            codes, printed = start(method, out, world)
            assert codes == [0] * world, printed
            made[method, world] = out
        return out

    return run


# ==== Exact resume =================================================================================================

@pytest.mark.parametrize("method", RUNS)
def test_killed_run_ends_as_the_unbroken_one(start, unbroken, tmp_path, method):
    """Killed within an epoch, while a checkpoint is written, between the two renames; continued with other loader processes."""
    out = tmp_path / "run"
    assert start(method, out, fault=("kill", 4, 0))[0] == [-signal.SIGKILL]
    assert load(out)["step"] == 2 and [line["step"] for line in logged(out)] == [0, 1, 2]
    if method == "detreg":
        assert start(method, out, fault=("kill saving", 1, 0), num_workers=1)[0] == [-signal.SIGKILL]
        assert load(out)["step"] == 2 and (out / "last.pt.tmp").read_bytes() == b"half a checkpoint"
        assert start(method, out, fault=("kill renaming", 1, 0))[0] == [-signal.SIGKILL]
        assert load(out, "previous.pt")["step"] == 2 and not (out / "last.pt").exists()
    codes, (printed,) = start(method, out, num_workers=2)
    assert codes == [0] and f"continuing the run in {out} at step 2\n" in printed
    same_run(out, unbroken(method))
