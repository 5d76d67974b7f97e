"""Runs that are killed, stopped, damaged, moved or poisoned, and go on. Every run is a process of its own that may
really be killed; all come from one server process that has imported everything already (multiprocessing's forkserver),
so that a run takes a second."""
import ctypes
import importlib
import json
import multiprocessing
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SMALL, flags
from PIL import Image
from torchvision.models.resnet import BasicBlock, ResNet

import annotations
import common
import data
import dupr
import run
import test_detreg

SCRIPTS = ("detreg", "updetr", "siamese_detr", "soco", "dupr", "finetune")
SHARED = {"synthetic_images": 10, "synthetic_size": 64, "batch_size": 4,
          "max_steps": 5, "save_every": 2, "log_every": 1, "num_workers": 0, "seed": 3,
          "device": "cpu", "backbone_weights": "random"}  # two steps an epoch, checkpoints after 2, 4 and 5
DETR = {**SHARED, **SMALL, "preset": "demo", "probe_images": 0, "epochs": 9, "scales": (48, 64),
        "max_size": 96, "dropout": 0.1}
TUNE = {**SHARED, "data": "synthetic", "synthetic_test_images": 2, "eval_size": 48, "scales": (48, 64),
        "max_size": 96, "epochs": 9}
RUNS = {
    "detreg": {**DETR, "accumulate": 2, "num_feature_levels": 3, "crop_scales": (64, 72), "crop_range": (40, 60),
               "patch_size": 16, "max_prop": 6, "proposal_grid": 64},
    "updetr": {**DETR, "patch_size": 32, "num_patches": 4, "mask_ratio": 0.1},
    "siamese_detr": {**DETR, "patch_size": 16, "num_regions": 4, "lambda_global": 2.0},
    "soco": {**SHARED, "preset": "demo", "probe_images": 0, "epochs": 9, "proposal_method": "random",
             "fpn_channels": 16, "head_dim": 24, "mlp_dim": 32, "embedding_dim": 16, "image_size": 64, "small_size": 32,
             "arch": "resnet18", "min_side": 8, "level_sizes": (14, 28, 55, 64)},
    "dupr": {**SHARED, "preset": "demo", "probe_images": 0, "epochs": 9, "arch": "resnet18", "image_size": 64,
             "roi_sizes": (16, 8, 4, 2), "embedding_dim": 16, "queue_size": 40, "queued_patches": 2},
    "finetune": {**TUNE, **SMALL, "detector": "deformable_detr", "dropout": 0.1,
                 "crop_scales": (48,), "crop_range": (30, 44)},
    "rcnn": {**TUNE, "detector": "faster_rcnn_fpn", "arch": "resnet18",
             "backbone_norm": "bn", "fpn_channels": 32, "head_dim": 16, "anchor_size": 8,
             "proposals_per_image": 12, "rois_per_image": 8, "precise_bn": 0, "warmup_iters": 2},
}


# ==== Processes that can be killed =================================================================================

class Narrow(ResNet):
    """ResNet with an eighth of the channels: what is tested does not hang on them, and a step takes milliseconds."""

    def __init__(self, **kwargs):
        super().__init__(BasicBlock, [1, 1, 1, 1], norm_layer=kwargs["norm_layer"])
        self.fc = torch.nn.Linear(64, 2)

    def _make_layer(self, block, planes, blocks, **kwargs):
        return super()._make_layer(block, planes // 8, blocks, **kwargs)


def redirect(output: Path) -> None:
    """What this process prints, to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)


def child(method: str, argv: list[str], faults: list[tuple], output: Path | None = None,
          env: dict[str, str] = {}) -> None:
    """One process of a run, as its command. faults: (what happens, at which step or checkpoint,
    counted from 1, to which process)."""
    os.environ.update(env)
    if output:
        redirect(output)
    multiprocessing.set_start_method("fork", force=True)                  # of loader processes, as in a run of its own
    torch.set_num_threads(1)
    torchvision.models.resnet18 = lambda weights, **kwargs: Narrow(**kwargs)
    script = importlib.import_module("finetune" if method == "rcnn" else method)
    calls = {"step": 0, "save": 0, "evaluate": 0}
    step, save, replace = script.train_step, torch.save, os.replace
    evaluate = getattr(script, "evaluate", None)

    def now(event: str) -> list:
        """What is to happen here."""
        return [kind for kind, when, rank in faults if when == calls[event] and rank == common.rank()]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def train_step(cfg, model, *args):  # the name by which run.in_training knows it
        calls["step"] += 1
        for kind in now("step"):
            if isinstance(kind, signal.Signals):  # as a cluster sends it: to the loader processes too
                pids = [p.pid for p in (*multiprocessing.active_children(), multiprocessing.current_process())]
                if (sender := os.fork()) == 0:  # not from their parent: PyTorch's loader processes look at that
                    for pid in pids:
                        os.kill(pid, kind)
                    os._exit(0)
                os.waitpid(sender, 0)
                time.sleep(0.2)  # a loader process that dies of it would be noticed now
            elif kind in ("nan first", "nan last"):
                [p for p in model.parameters()
                 if p.requires_grad][0 if kind == "nan first" else -1].data.fill_(torch.nan)
            elif kind in actions:
                actions[kind]()
        return step(cfg, model, *args)

    def fail(error):
        raise error

    def faulty_evaluate(*args, **kwargs):
        calls["evaluate"] += 1
        if "stop evaluating" in now("evaluate"):
            os.kill(os.getpid(), signal.SIGTERM)
        if "memory evaluating" in now("evaluate"):
            actions["memory"]()
        return evaluate(*args, **kwargs)

    def lose_agent():
        if common.rank() == 0:
            os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(0.5)

    def interrupt_twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    actions = {"kill": die, "fault": lambda: fail(ValueError("a fault of ours")),
               "bad input": lambda: fail(common.UserError("x.png: broken")),
               "memory": lambda: fail(torch.OutOfMemoryError("CUDA out of memory")), "wait": lambda: time.sleep(5),
               "lose agent": lose_agent, "interrupt twice": interrupt_twice}

    def faulty_save(state, file):
        calls["save"] += 1
        if "kill saving" in now("save"):
            file.write(b"half a checkpoint")
            file.flush()
            die()
        save(state, file)

    def faulty_replace(source, target):
        replace(source, target)
        if "kill renaming" in now("save") and Path(target).name == "previous.pt":
            die()

    script.train_step, torch.save, os.replace = train_step, faulty_save, faulty_replace
    script.evaluate = faulty_evaluate
    run.cli(lambda: script.main(argv))


@pytest.fixture(scope="module")
def start():
    """start(method, out, *faults, world=1, **values) -> (exit codes, what each process printed)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(SCRIPTS))
    path, before = f"{ROOT}{os.pathsep}{ROOT / 'tests'}", os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path  # of the server, which starts with the first process

    def run_script(method, out, *faults, world=1, patience=30, timeout=90, target=child, **values):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        argv, processes = flags({**RUNS[method], "out": out, **values}), []
        for r in range(world):
            env = {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "PROCESS_TIMEOUT": str(patience)} if world > 1 else {}
            processes.append(context.Process(target=target,
                                             args=(method, argv, faults, out.with_name(f"{out.name}-{r}.txt"), env)))
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

    yield run_script
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
    """Weights, EMA networks, queues, optimizer, logged values and metrics, bit by bit; only --out,
    --num_workers and the processes may differ."""
    states = [load(out) for out in (one, two)]
    for state in states:
        for name in ("out", "num_workers", "allow_config_change"):
            del state["config"][name]
    same(*states)
    same(logged(one), logged(two))
    for name in {"metrics.json", "detections.json"} & {file.name for file in one.iterdir()}:
        assert (one / name).read_text() == (two / name).read_text()


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """Runs that nothing happened to, each made once: unbroken(method, world)."""
    folder, made = tmp_path_factory.mktemp("unbroken"), {}

    def run_script(method, world=1):
        out = folder / f"{method}{world}"
        if (method, world) not in made:
            codes, printed = start(method, out, world=world)
            assert codes == [0] * world, printed
            made[method, world] = out
        return out

    return run_script


# ==== Exact resume =================================================================================================

@pytest.mark.parametrize("method", RUNS)
def test_killed_run_ends_as_the_unbroken_one(start, unbroken, tmp_path, method):
    """Killed within an epoch, while a checkpoint is written, between the two renames;
    continued with other loader processes."""
    out = tmp_path / "run"
    assert start(method, out, ("kill", 4, 0))[0] == [-signal.SIGKILL]
    assert load(out)["step"] == 2 and [line["step"] for line in logged(out)] == [0, 1, 2]
    if method == "detreg":
        assert start(method, out, ("kill saving", 1, 0), num_workers=1)[0] == [-signal.SIGKILL]
        assert load(out)["step"] == 2 and (out / "last.pt.tmp").read_bytes() == b"half a checkpoint"
        assert start(method, out, ("kill renaming", 1, 0))[0] == [-signal.SIGKILL]
        assert load(out, "previous.pt")["step"] == 2 and not (out / "last.pt").exists()
    codes, (printed,) = start(method, out, num_workers=2)
    assert codes == [0] and f"continuing the run in {out} at step 2\n" in printed
    same_run(out, unbroken(method))


@pytest.mark.parametrize("method", RUNS)
def test_killed_process_of_two(start, unbroken, tmp_path, method):
    """The one that stays ends by itself, and both together end as two that were never killed."""
    out = tmp_path / "run"
    codes, printed = start(method, out, ("kill", 4, 1), world=2)
    assert codes == [1, -signal.SIGKILL] and "error: another process died" in printed[0]
    assert load(out)["step"] == 2
    assert start(method, out, world=2, num_workers=1)[0] == [0, 0]
    same_run(out, unbroken(method, 2))


def test_torchrun_restarts_and_is_gone(start, unbroken, tmp_path):
    """A process that dies is started again. Then torchrun ends alone, by SIGUSR1, which it is not told to handle: its
    processes save and end."""
    out, worker = tmp_path / "run", tmp_path / "worker.py"
    argv = flags({**RUNS["updetr"], "out": out, "num_workers": 1})
    worker.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport test_survive\n"
                      f"first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\ntest_survive.child('updetr', {argv}, "
                      "[('kill', 4, 1)] if first else [('lose agent', 1, 0), ('lose agent', 1, 1)])\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=1", str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240,  # its end: all have closed the pipes
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert f"continuing the run in {out} at step 2" in done.stdout, done.stderr
    assert done.returncode == -signal.SIGUSR1 and "stopped by SIGTERM after step 3, which is saved" in done.stdout
    ending = done.stderr.rpartition("SIGTERM: ends when the running step is finished and saved")[2]
    assert load(out)["step"] == 3 and ending and "Traceback" not in ending, done.stderr
    assert start("updetr", out, world=2)[0] == [0, 0]
    same_run(out, unbroken("updetr", 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_stopped_by_a_signal(start, unbroken, tmp_path, number):
    out = tmp_path / "run"
    codes, (printed,) = start("detreg", out, (number, 3, 0), num_workers=1)
    assert (codes == [75] and f"stopped by {number.name} after step 3, which is saved" in printed
            and "Traceback" not in printed)
    assert load(out)["step"] == 3 and load(out, "previous.pt")["step"] == 2
    assert start("detreg", out)[0] == [0]
    same_run(out, unbroken("detreg"))


def test_a_second_interrupt_ends_at_once(start, tmp_path):
    codes, (printed,) = start("updetr", tmp_path / "run", ("interrupt twice", 4, 0), num_workers=1)
    assert codes == [130] and "SIGINT: ends when the running step is finished and saved; again: at once\n" in printed
    assert "error: interrupted; what was saved before is untouched\n" in printed and "Traceback" not in printed
    assert load(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize(("when", "step"), [(1, 2), (3, 5)])  # two steps an epoch; the last is not one of training
def test_stopped_while_it_is_evaluated(start, tmp_path, when, step):
    """At once, and nothing that was trained is lost."""
    one, two = tmp_path / "one", tmp_path / "two"
    values = {"eval_every": 1, "save_every": 100}
    codes, (printed,) = start("rcnn", one, ("stop evaluating", when, 0), **values)
    said = f"after step {step}, which is saved; the same command continues" if step < 5 else "; what was saved before"
    assert codes == [75] and f"stopped by SIGTERM{' ' * (step < 5)}{said}" in printed and "Traceback" not in printed
    assert load(one)["step"] == step
    assert start("rcnn", one, **values)[0] == [0] and start("rcnn", two, **values)[0] == [0]
    same(load(one)["model"], load(two)["model"])


@pytest.mark.parametrize("first", [0, 1])
def test_two_processes_hear_a_signal_at_different_steps(start, unbroken, tmp_path, first):
    out = tmp_path / "run"
    codes, printed = start("dupr", out, (signal.SIGTERM, 3, first),
                           (signal.SIGTERM, 4, 1 - first), world=2, num_workers=1)
    assert codes == [75, 75] and not any("Traceback" in text for text in printed), printed
    assert load(out)["step"] == 3  # whoever hears it first: its machine may be the only one to be taken away
    assert start("dupr", out, world=2)[0] == [0, 0]
    same_run(out, unbroken("dupr", 2))


def flip(path: Path) -> None:
    """One bit, in the middle of the file: of a weight."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_checkpoint(start, unbroken, tmp_path):
    out = tmp_path / "run"
    start("soco", out, ("kill", 5, 0))
    assert load(out)["step"] == 4
    flip(out / "last.pt")
    assert load(out)["step"] == 4                                         # torch.load notices nothing
    codes, (printed,) = start("soco", out)
    assert (codes == [0] and f"warning: {out}/last.pt: damaged" in printed and "at step 2" in printed
            and (out / "damaged.pt").exists())
    same_run(out, unbroken("soco"))
    flip(out / "last.pt")
    (out / "previous.pt").write_bytes(b"")
    codes, (printed,) = start("soco", out)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert codes == [2] and len(errors) == 1 and "Traceback" not in printed
    assert "last.pt: damaged" in errors[0] and "previous.pt: damaged" in errors[0]


def test_full_disk(tmp_path):
    """A file may have 20 kB here: torch.save then reports a fault of its own."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.save_checkpoint(tmp_path / "last.pt", torch.nn.Linear(2, 3), None, 1, dupr.Config())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
        with pytest.raises(common.UserError, match="/last.pt: cannot be written .File too large.; what was saved "
                           "before is untouched. Make room or mend the permissions, and start the same command again"):
            run.save_checkpoint(tmp_path / "last.pt", torch.nn.Linear(200, 300), None, 2, dupr.Config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"] and load(tmp_path)["step"] == 1


# ==== Changed flags ================================================================================================

@pytest.mark.parametrize(("method", "values", "group"), [
    ("detreg", {"lr": 3e-4, "lr_backbone": 1e-6, "weight_decay": 0.5},
     [{"base_lr": 3e-4, "weight_decay": 0.5}, {"base_lr": 1e-6, "weight_decay": 0.5},
      {"base_lr": 3e-5, "weight_decay": 0.5}]),
    ("dupr", {"lr": 0.02, "weight_decay": 0.5, "sgd_momentum": 0.1},
     [{"base_lr": 0.02, "weight_decay": 0.5, "momentum": 0.1}]),
    ("soco", {"lr": 0.64, "weight_decay": 0.5, "sgd_momentum": 0.1, "trust": 0.2},
     [{"base_lr": 0.01, "weight_decay": decay, "momentum": 0.1, "trust": 0.2} for decay in (0, 0.5)]),
    ("rcnn", {"lr": 0.03, "weight_decay": 0.5, "sgd_momentum": 0.1},
     [{"base_lr": 0.03, "weight_decay": decay, "momentum": 0.1} for decay in (0.5, 0)])])
def test_changed_rates_are_used(start, tmp_path, method, values, group):
    out = tmp_path / "run"
    assert start(method, out, max_steps=2)[0] == [0]
    before = load(out)["optimizer"]
    codes, (printed,) = start(method, out, max_steps=3, allow_config_change="true", **values)
    assert codes == [0] and all(f"{name}: " in printed and f" -> {value}" in printed for name, value in values.items())
    after = load(out)["optimizer"]
    for found, wanted in zip(after["param_groups"], group, strict=True):
        assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert after["state"].keys() == before["state"].keys()
    if method == "detreg":  # the moments are those of the file
        assert {float(state["step"]) for state in after["state"].values()} == {3}


def test_changed_flags_that_cannot_have_an_effect(start, tmp_path):
    out, file = tmp_path / "run", tmp_path / "resnet.pt"
    torch.save(Narrow(norm_layer=torch.nn.BatchNorm2d).state_dict(), file)
    assert start("updetr", out, max_steps=2)[0] == [0]
    changed = {"max_steps": 3, "allow_config_change": "true", "backbone_weights": file, "aligned_start": "false"}
    codes, (printed,) = start("updetr", out, **changed)
    assert codes == [0] and "aligned_start: True -> False (no effect: it says how a run starts)" in printed
    assert f"backbone_weights: random -> {file} (no effect: it says how a run starts)" in printed
    codes, (printed,) = start("updetr", out, **{**changed, "lr": 5e-5})
    assert codes == [0] and "this run is finished (3 steps; nothing that was changed has an effect on it)" in printed


@pytest.mark.parametrize(("method", "values"), [
    ("detreg", {"num_queries": 9}), ("finetune", {"lr_backbone": 0.0}), ("dupr", {"queue_size": 44})])
def test_changed_architecture_is_refused(start, tmp_path, method, values):
    """Other shapes, another number of parameters that learn, another queue."""
    out = tmp_path / "run"
    assert start(method, out, max_steps=2)[0] == [0]
    codes, (printed,) = start(method, out, max_steps=3, allow_config_change="true", **values)
    (name, value), = values.items()
    assert codes == [2] and "Traceback" not in printed
    assert "its checkpoint does not fit the model that these changes make" in printed and f" -> {value}" in printed


@pytest.mark.parametrize("method", ["detreg", "updetr", "siamese_detr"])
def test_frozen_target_is_that_of_the_start(start, tmp_path, method):
    """--backbone_weights names a file that another run goes on writing."""
    file, one, two = tmp_path / "resnet.pt", tmp_path / "one", tmp_path / "two"
    values = {"backbone_weights": file, "max_steps": 3}
    torch.save(Narrow(norm_layer=torch.nn.BatchNorm2d).state_dict(), file)
    assert (start(method, one, **values)[0] == [0]
            and start(method, two, ("kill", 3, 0), **values)[0] == [-signal.SIGKILL])
    torch.save(Narrow(norm_layer=torch.nn.BatchNorm2d).state_dict(), file)
    assert start(method, two, **values)[0] == [0]
    same_run(one, two)


def test_everything_random_is_seeded(monkeypatch):
    def draws(rank=0, step=7):
        monkeypatch.setattr(run, "rank", lambda: rank)
        run.seed_step(3, step)
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    assert draws() == draws()
    for other in (draws(1), draws(0, 8)):
        assert all(a != b for a, b in zip(draws(), other))


# ==== Changed world ================================================================================================

FROZEN = {"backbone_norm": "frozen", "dropout": 0}  # nothing in it depends on how a batch is split


def test_another_number_of_processes(start, tmp_path):
    """The same batches in the same order: the losses are those of one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert start("updetr", one, **FROZEN, mask_ratio=0)[0] == [0]
    assert start("updetr", two, **FROZEN, mask_ratio=0, max_steps=2)[0] == [0]
    codes, printed = start("updetr", two, world=2, **FROZEN, mask_ratio=0)
    assert (codes == [0, 0]
            and "at step 2 with 2 processes rather than 1: the same batches in the same order" in printed[0])
    for a, b in zip(logged(one), logged(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3) and b["step"] == a["step"]
    assert load(two)["world"] == 2


def test_another_number_of_processes_is_refused_with_batchnorm(start, tmp_path):
    assert start("dupr", tmp_path / "run", max_steps=2)[0] == [0]
    codes, printed = start("dupr", tmp_path / "run", world=2)
    assert (codes == [2, 2] and "holds a run of 1 process(es), this one has 2: BatchNorm" in printed[0]
            and "--allow_config_change" in printed[0])
    assert start("dupr", tmp_path / "run", world=2, allow_config_change="true")[0] == [0, 0]


def test_another_data_set_is_shown(start, tmp_path):
    for i in range(11):
        Image.new("RGB", (64, 64), (20 * i, 0, 90)).save(tmp_path / f"{i}.png")
    aside = (tmp_path / "10.png").rename(tmp_path / "10.txt")
    values = {"data": tmp_path, "max_steps": 2}
    assert start("updetr", tmp_path / "run", **values)[0] == [0]
    aside.rename(tmp_path / "10.png")
    codes, (printed,) = start("updetr", tmp_path / "run", **{**values, "max_steps": 3})
    assert codes == [2] and "data set: 10 images, sha256 " in printed and " -> 11 images, sha256 " in printed
    codes, (printed,) = start("updetr", tmp_path / "run", **{**values, "max_steps": 3}, allow_config_change="true")
    assert codes == [0] and "at step 2 with data set: 10 images" in printed


def test_labels_are_part_of_the_data_set():
    one, two = (annotations.open_detection("synthetic", None, "train", synthetic_images=4, synthetic_size=64, seed=3)
                for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    two.records[2].boxes[0, 2] += 1
    assert one.fingerprint() != two.fingerprint()


# ==== Several processes ============================================================================================

@pytest.mark.parametrize(("method", "fault", "failing", "code", "text"), [
    ("updetr", "fault", 1, 1, "ValueError: a fault of ours"), ("updetr", "bad input", 0, 2, "x.png: broken"),
    ("updetr", "memory", 1, 2, "out of memory (CUDA out of memory); give a larger --accumulate (now 1) or "
     "--checkpoint_activations or --amp bf16 (fp16 on GPUs before Ampere) or smaller --batch_size, --scales, --max"),
    ("rcnn", "memory evaluating", 0, 2, "out of memory (CUDA out of memory); give smaller --eval_size, --max_size")])
def test_error_of_one_process_ends_all(start, tmp_path, method, fault, failing, code, text):
    began = time.monotonic()
    codes, printed = start(method, tmp_path / "run", (fault, 2, failing), world=2,
                           **{"eval_every": 1} if method == "rcnn" else {})
    assert codes == [code, code] and time.monotonic() - began < 30
    assert ("Traceback" in printed[failing]) == (code == 1) and text in printed[failing]
    assert (f"ended because of process {failing}: {text}" in printed[1 - failing]
            and "Traceback" not in printed[1 - failing])


def test_process_that_hangs(start, tmp_path):
    """The other one waits PROCESS_TIMEOUT seconds, 3 here."""
    codes, printed = start("updetr", tmp_path / "run", ("wait", 2, 1), world=2, patience=3)
    assert codes == [1, 1] and "kept this one waiting for more than PROCESS_TIMEOUT seconds" in printed[0]


def one_step(method: str, argv: list[str], faults: list, output: Path, env: dict[str, str] = {}) -> None:
    """A training step of a fine-tuned or DETReg model whose second process has images without any box."""
    os.environ.update(env)
    torch.set_num_threads(1)
    common.setup_distributed("cpu")
    output.touch()
    case = importlib.import_module(f"test_{method}")
    cfg, model, batch = case.step_case()
    first = 2 * common.rank()
    stop = first + 2 if common.world_size() > 1 else 4
    targets = [t if i < 2 else {k: v[:0] for k, v in t.items()} for i, t in enumerate(batch["targets"])]
    batch = {k: v[first:stop] for k, v in {**batch, "targets": targets}.items()}
    wrapped = common.wrap_model(model.train(), torch.device("cpu"))
    script, given = importlib.import_module(method), [torch.nn.Identity()] if method == "detreg" else []
    optimizer = common.build_optimizer(cfg, model)
    terms = script.train_step(cfg, wrapped, *given, script.build_criterion(cfg), optimizer,
                              [batch], torch.device("cpu"))
    torch.save(({k: v.item() for k, v in terms.items()},
                {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), f"{output}.pt")


def test_process_without_a_box(start, tmp_path):
    """Two processes, one of which has images but nothing to find in them, are one process on the whole batch."""
    out = tmp_path / "step"
    for world in (1, 2):
        assert start("detreg", out.with_name(f"step{world}"), world=world, target=one_step)[0] == [0] * world
    results = [torch.load(tmp_path / name) for name in ("step1-0.txt.pt", "step2-0.txt.pt", "step2-1.txt.pt")]
    test_detreg.same_step(results[1:], results[0])
    assert results[2][0]["loss_bbox"] == 0 < results[1][0]["loss_bbox"]


# ==== Numbers that are not finite ==================================================================================

@pytest.mark.parametrize(("method", "where", "named"), [
    ("detreg", "nan first", "loss nan, loss_ce nan, loss_bbox nan, loss_giou nan"),
    ("detreg", "nan last", "loss nan, loss_object_embedding nan"),
    ("soco", "nan first", "loss nan, loss_12 nan, loss_21 nan, loss_13 nan, loss_31 nan, grad_norm nan")])
def test_not_finite(start, tmp_path, method, where, named):
    out = tmp_path / "run"
    codes, (printed,) = start(method, out, (where, 4, 0))
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert codes == [3] and "Traceback" not in printed and len(errors) == 1
    assert (errors[0].startswith("error: step 3: ") and named in errors[0]
            and f"{out}/nonfinite-step3-rank0.pt" in errors[0])
    kept = load(out, "nonfinite-step3-rank0.pt")
    index = [i for batch in kept["batches"] for i in batch["index"]]
    assert (kept["step"] == 3 and kept["files"] == [f"synthetic/64/3/{i:08d}" for i in index]
            and all(file in errors[0] for file in kept["files"]))
    images = [batch["images"] if method == "detreg" else batch["views"][0] for batch in kept["batches"]]
    # detreg accumulates two micro-batches
    assert [x.shape[:2] for x in images] == ([(2, 3)] * 2 if method == "detreg" else [(4, 3)])
    assert load(out)["step"] == 2 and all(v.isfinite().all() for v in load(out)["model"].values())


def test_not_finite_on_one_of_two_processes(start, tmp_path):
    out = tmp_path / "run"
    codes, printed = start("updetr", out, ("nan last", 3, 1), world=2)
    assert codes == [3, 3] and "error (process 1): step 2: " in printed[1] and "loss_feature nan" in printed[1]
    # its own loss is finite; the gradient is everyone's
    assert "error: step 2: not finite: grad_norm nan; images" in printed[0]
    files = [load(out, f"nonfinite-step2-rank{r}.pt")["files"] for r in (0, 1)]
    assert len(set(files[0] + files[1])) == 4 and load(out)["step"] == 2


# ==== Loader =======================================================================================================

def test_loader_may_open_many_files():
    """At the usual limit of 1024 it hangs: UP-DETR's batch of 32 images on its way through 8 loader
    processes is some 3000 of them."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        data.make_loader([], [], num_workers=0, collate=list)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert hard == before[1] and soft == (65536 if hard == resource.RLIM_INFINITY else min(hard, 65536))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Unsendable:
    """What no loader process can send."""

    def __reduce__(self):
        raise TypeError("this has no pickle")


class Faulty:
    """Forty samples, of which the tenth is `fault`."""

    def __init__(self, fault):
        self.fault = fault

    def __getitem__(self, key):
        if key[1] == 10 and self.fault == "unsendable":
            return Unsendable()
        if key[1] == 10 and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(3, 500, 500) if self.fault == "large" else torch.ones(3)


def iterate(fault: str) -> None:
    batches = [[(0, 2 * i), (0, 2 * i + 1)] for i in range(20)]
    for _ in data.make_loader(Faulty(fault), batches, num_workers=2, collate=list):
        time.sleep(0.01)


def iterate_alone(method: str, argv: list[str], faults: list[str], output: Path, env: dict[str, str]) -> None:
    redirect(output)
    multiprocessing.set_start_method("fork", force=True)
    run.cli(lambda: iterate(*faults))


def test_killed_loader_process(start, tmp_path):
    began = time.monotonic()
    codes, (printed,) = start("updetr", tmp_path / "run", "killed", target=iterate_alone)
    assert codes == [2] and time.monotonic() - began < 60
    assert re.fullmatch(r"error: a loader process has died "
                        r"\(pid \d+: (killed by signal: Killed|exited unexpectedly)\); "
                        r"give a lower --num_workers or .*: the same command continues from the last checkpoint\n",
                        printed)


def test_process_that_dies_while_its_batch_is_fetched(monkeypatch):
    """Rare on an idle machine: the batch has come, its tensors are still with the process."""
    def reset(self):
        os.kill(self._workers[0].pid, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_next_data", reset)
    with pytest.raises(RuntimeError) as error:
        iterate("none")
    assert re.match(r"a loader process has died \(pid \d+: (killed by|exited)", run.loader_failure(str(error.value)))
    data._kill_workers()


def test_batch_that_cannot_be_sent():
    with pytest.raises(TypeError, match="(?s)in a loader process, which could not send its batch.*this has no pickle"):
        iterate("unsendable")
    data._kill_workers()  # else they are waited for


@pytest.mark.parametrize(("error", "text"), [
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
     "a batch cannot be sent from its loader process .unable to allocate.*--shm-size=8g"),
    (OSError(24, "Too many open files"), "too many open files for the loader processes; raise the limit .ulimit")])
def test_what_a_loader_process_sends_in_place_of_a_batch(error, text):
    sent = queue.SimpleQueue()
    try:
        raise error
    except Exception as caught:
        data._send_failure(sent, caught, (7, "batch"))
    number, reason = sent.get()
    assert number == 7 and isinstance(reason, common.UserError) and re.match(text, str(reason))


def iterate_with_little_memory(method: str, argv: list[str], mounts: list[str], output: Path, env: dict[str, str]
                               ) -> None:
    redirect(output)
    ctypes.CDLL(None).unshare(0x00020000)  # CLONE_NEWNS
    for command in ("mount --make-rprivate /", *mounts):
        subprocess.run(command.split(), check=True)
    multiprocessing.set_start_method("fork", force=True)
    run.cli(lambda: iterate("large"))


@pytest.mark.parametrize(("megabytes", "text"), [
    (8, r"the shared memory /dev/shm of 8 MiB \(8 free\) is too small for 2 loader processes with batches of 5.7 MiB"),
    # room for one batch of each, not for two: seen before the second is sent, or, if both loaders look at once, after
    (16, r"of 16 MiB \(|a batch cannot be sent from its loader process")])
def test_little_shared_memory(start, tmp_path, megabytes, text):
    mount = f"mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs a mount of its own")
    codes, (printed,) = start("updetr", tmp_path / "run", mount, target=iterate_with_little_memory)
    assert codes == [2] and re.search(text, printed) and "Traceback" not in printed
    assert "give more shared memory (docker run --shm-size=8g or --ipc=host), a lower --num_workers" in printed
