"""run.py: flags and their ranges, exit codes, log, checkpoints, the watch for numbers that are not finite, Run."""
import contextlib
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import common
import convert
import detreg
import dupr
import files
import finetune
import run
import siamese_detr
import soco
import updetr
from common import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# ==== Flags ====


@dataclass
class Knobs:
    data: str = "x/set.json"  # what to read
    out: str | None = None  # where to write
    preset: str | None = None  # a
    box_count: int = 3  # how many, 5 % of them
    rate: float = 0.5  # speed
    limit: int | None = 7  # at most
    flag: bool = False  # on or off
    sizes: tuple[int, ...] = (1, 2)  # sides
    mode: Literal["slow", "fast"] = "slow"  # how


def parse(*argv, recipe=None):
    presets = {"a": {"rate": 2.0, "flag": True}, "demo": {"data": "own"}}
    return run.parse_config(Knobs, presets, list(argv), script="s", description="d", recipe=recipe)


def test_precedence_default_data_preset_flag():
    def recipe(values):
        assert values["data"] in ("x/set.json", "big")
        return {"box_count": 10, "rate": 10.0, "limit": 10} if values["data"] == "big" else {}

    assert parse(recipe=recipe) == Knobs(out="out/s-set")
    assert parse("--data", "big", recipe=recipe) == Knobs("big", "out/s-big", None, 10, 10.0, 10)
    assert parse("--data=big", "--preset", "a", recipe=recipe) == Knobs("big", "out/s-a-big", "a", 10, 2.0, 10, True)
    assert (parse("--data", "big", "--preset", "a", "--rate", "3", "--limit", "4", recipe=recipe)
            == Knobs("big", "out/s-a-big", "a", 10, 3.0, 4, True))


def test_flag_spellings():
    assert all(parse(*argv).box_count == 5 for argv in (["--box-count", "5"], ["--box_count=5"], ["--box-count=5"]))
    assert parse("--data", "my-set", "--out=a-b") == Knobs("my-set", "a-b")  # values keep their hyphens
    assert all(parse(*argv).flag for argv in (["--flag"], ["--flag", "true"], ["--flag=yes"]))
    assert not any(parse(*argv).flag for argv in (["--flag", "false"], ["--flag", "0"], []))
    assert parse("--preset", "a").flag
    assert not parse("--preset", "a", "--no_flag").flag and not parse("--preset", "a", "--no-flag").flag
    assert parse("--sizes", "4", "5", "6").sizes == (4, 5, 6)
    assert parse("--limit", "none").limit is None and parse("--out", "None").out == "out/s-set"
    assert parse("--mode", "fast").mode == "fast"


@pytest.mark.parametrize("argv", (["--mode", "quick"], ["--flag", "perhaps"], ["--box_count", "x"], ["--box", "5"],
                                  ["--nothing"], ["--preset", "b"]))
def test_bad_flags_end_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2 and argv[0] in capsys.readouterr().err


def test_help_shows_the_comments(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "how many, 5 % of them (default: 3)" in text and "sides (default: (1, 2))" in text


def test_names_of_output_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("--preset", "demo").out == "out/s-demo"  # the preset's own data
    assert parse("--preset", "demo", "--data", "x/cards").out == "out/s-demo-cards"
    assert parse("--preset", "a").out == "out/s-a-set" and parse("--data", "imagenet100").out == "out/s-imagenet100"
    assert parse("--preset", "a", "--out", "mine").out == "mine"


@pytest.mark.parametrize(("data", "name"), (
    ("imagenet", "imagenet"), ("voc", "voc"), ("PHOTOS", "PHOTOS"), ("a/photos/", "photos"),
    ("a/photos.v2", "photos.v2"), ("a/list.txt", "list"), ("bccd/VOCdevkit", "bccd"), ("cards/images", "cards"),
    ("cards/train/_annotations.coco.json", "cards"), ("cards/data.yaml", "cards"), ("cards/train/../val", "cards"),
    ("coco/annotations/instances_train2017.json", "coco"), ("VOC/VOCdevkit/VOC2007/JPEGImages", "VOC"),
    ("a/b\n\x1b[1m", "b__[1m"), ("a/back\\slash", "back_slash"), ("images", "here"), (".", "here"), ("", "here"),
    ("train", "train"), ("/data/images", "images"), ("x" * 300, "x" * 60)))
def test_name_of_a_data_set(data, name, tmp_path, monkeypatch):
    (tmp_path / "here" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert run.data_name(data) == name


@dataclass
class Lengths(Knobs):
    epochs: run.Count = 50  # passes
    steps: run.Count | None = None  # instead
    lr_drop: run.NonNegative = 40  # epoch
    lr_drops: tuple[run.NonNegative, ...] = (20, 43.3)  # epochs


@dataclass
class Parts(Lengths):
    lr_drops: tuple[run.Share, ...] = (0.5, 0.9)  # shares


def test_drops_keep_their_share_of_the_run():
    def lengths(*argv, config=Lengths):
        presets = {"p": {"steps": 900, "epochs": 20, "lr_drop": 17}}
        cfg = run.parse_config(config, presets, list(argv), script="s", description="d")
        return cfg.epochs, cfg.steps, cfg.lr_drop, cfg.lr_drops

    assert lengths() == lengths("--epochs", "50") == (50, None, 40, (20, 43.3))
    assert lengths("--epochs", "100") == (100, None, 80, (40, 86.6))
    assert lengths("--epochs", "2") == (2, None, 1.6, (0.8, 1.732))
    assert lengths("--epochs", "100", "--lr_drop", "40", "--lr-drops", "9") == (100, None, 40, (9,))
    assert lengths("--steps", "7") == (50, 7, 40, (20, 43.3))
    assert lengths("--epochs", "100", config=Parts) == (100, None, 80, (0.5, 0.9))
    assert lengths("--preset", "p") == (20, 900, 17, (20, 43.3))
    assert lengths("--preset", "p", "--epochs", "40")[:3] == (40, None, 34)  # they are the length
    assert lengths("--preset", "p", "--epochs", "40", "--steps", "5")[:3] == (40, 5, 34)


@dataclass
class Ranges:
    data: str = "x"  # what to read
    out: str | None = None  # where to write
    preset: str | None = None  # a
    count: run.Count = 1  # one at least
    natural: run.Natural = 0  # none at least
    positive: run.Positive = 1.0  # above zero
    non_negative: run.NonNegative = 0.0  # zero at least
    share: run.Share = 0.5  # a part of the whole
    scale: Annotated[float, run.Range(0.5, 2)] = 1.0  # between the two
    limit: run.Count | None = None  # at most
    sides: tuple[run.Count, ...] = (4, 5)  # one at least, each


def parse_ranges(*argv, preset=None, recipe=None):
    presets = {"a": preset or {}}
    return run.parse_config(Ranges, presets, list(argv), script="s", description="d", recipe=recipe)


@pytest.mark.parametrize(("name", "values", "bounds"), (
    ("count", (0, -3, 10**9 + 1, 10**400), "at least 1 and at most 1e+09"),
    ("natural", (-1,), "at least 0 and at most 1e+09"),
    ("positive", (0.0, -1.0, math.nan, math.inf, -math.inf, 1e7), "above 0 and at most 1e+06"),
    ("non_negative", (-1e-09, math.nan, math.inf, -math.inf), "at least 0 and at most 1e+06"),
    ("share", (1.01, -0.1, math.nan, math.inf), "at least 0 and at most 1"),
    ("scale", (0.49, 2.1, math.nan, math.inf, -math.inf), "at least 0.5 and at most 2"),
    ("limit", (0,), "at least 1 and at most 1e+09"),
    ("sides", (0, -2), "at least 1 and at most 1e+09")))
def test_numbers_out_of_range(name, values, bounds):
    for value in values:
        with pytest.raises(UserError, match=f"^{re.escape(f'--{name} {value}: must be {bounds}')}$"):
            parse_ranges(f"--{name}={value}")


def test_numbers_at_the_ends_of_their_range():
    cfg = parse_ranges("--positive", "1e-9", "--share", "1", "--scale", "2", "--limit", "1", "--sides", "1", "9")
    assert cfg == Ranges(out="out/s-x", positive=1e-9, share=1.0, scale=2.0, limit=1, sides=(1, 9))
    assert parse_ranges("--share", "0", "--scale", "0.5", "--limit", "none").limit is None
    with pytest.raises(UserError, match=r"^--sides 4 0: must be at least 1 and"):  # every element; all are shown
        parse_ranges("--sides", "4", "0")


def test_presets_and_recipes_have_ranges_too():
    with pytest.raises(UserError, match="^--count 0: must be at least 1 and"):
        parse_ranges("--preset", "a", preset={"count": 0})
    with pytest.raises(UserError, match="^--share 2: must be at least 0 and at most 1$"):
        parse_ranges(recipe=lambda values: {"share": 2})


def test_pairs():
    run.check_pair(Ranges(), "sides")
    for sides in ((5, 4), (4,), (4, 5, 6)):
        with pytest.raises(UserError, match=f"^--sides {' '.join(map(str, sides))}: give the smallest and the largest"):
            run.check_pair(Ranges(sides=sides), "sides")


@pytest.mark.parametrize("script", (detreg, updetr, siamese_detr, soco, dupr, finetune))
def test_every_knob_is_explained_and_read(script):
    code = "\n".join(path.read_text() for path in sorted(ROOT.glob("*.py")))
    explained = run._knob_help(script.Config)
    for field in dataclasses.fields(script.Config):
        assert explained.get(field.name), f"{field.name} has no comment"
        reads = (r"\b(cfg|config)\.NAME\b", r"""values\[["']NAME["']\]""", r'values\[k\] for k in \([^)]*"NAME"',
                 r'getattr\((self\.)?cfg, "NAME"')
        read = any(re.search(pattern.replace("NAME", field.name), code) for pattern in reads)
        assert read, f"nothing reads {script.__name__}.Config.{field.name}"
    for preset in script.PRESETS.values():
        assert preset.keys() <= explained.keys()


def test_shared_knobs_have_one_order():
    scripts = (detreg, updetr, siamese_detr, finetune)
    names = [[field.name for field in dataclasses.fields(script.Config)] for script in scripts]
    for one, two in itertools.combinations(names, 2):
        shared = set(one) & set(two)
        assert [n for n in one if n in shared] == [n for n in two if n in shared]


# ==== Exit codes and seeds ====


def test_cli_exit_codes(fails, capsys):
    def refuse(argv):
        raise UserError(f"{argv[0]} is wrong")

    assert fails(refuse, ["this"]) == "error: this is wrong"
    with pytest.raises(SystemExit) as caught:
        run.cli(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert caught.value.code == 130
    with pytest.raises(ZeroDivisionError):  # our own faults keep their traceback
        run.cli(lambda: 1 / 0)
    assert run.cli(lambda: 5) is None


def test_the_only_process_of_a_torchrun_says_why_it_ended(tmp_path, monkeypatch):
    """As torchrun's own exit code does not."""
    ended = []
    monkeypatch.setattr(run, "dist", types.SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(run.os, "_exit", ended.append)
    monkeypatch.setattr(run, "_failure_file", [tmp_path / "ended.txt"])
    with pytest.raises(SystemExit):
        run.cli(lambda: (_ for _ in ()).throw(UserError("x.png: broken")))
    assert ended == [2] and (tmp_path / "ended.txt").read_text() == "2 process 0: x.png: broken"


def test_signals_outside_training(fails, capsys):
    def send(number):
        with pytest.raises(SystemExit) as caught:
            run.cli(lambda: (os.kill(os.getpid(), number), time.sleep(9)))
        return caught.value.code, *capsys.readouterr()

    before = [signal.getsignal(number) for number in run.STOP_SIGNALS]
    assert send(signal.SIGINT) == (130, "", "error: interrupted; what was saved before is untouched\n")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        assert send(number) == (75, f"stopped by {number.name}; what was saved before is untouched\n", "")
    assert [signal.getsignal(number) for number in run.STOP_SIGNALS] == before


def test_signals_in_training(tmp_path):
    """Heard after the step, however long it takes; from its save to the next step at once."""
    def steps(*signals):
        for step in run.until_signalled(range(3)):
            if step == 1:
                for number in signals:
                    os.kill(os.getpid(), number)
                assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)  # no alarm, which would end a long step
                assert run.save_due(step + 1, 3, 100)
                run.save_checkpoint(tmp_path / "last.pt", nn.Linear(2, 3), None, step + 1, RunConfig("x"))
        raise AssertionError("not stopped")

    for number in run.STOP_SIGNALS:
        with pytest.raises(run.Stopped) as caught:
            steps(number)
        assert caught.value.code == 75 and caught.value.text == (
            f"stopped by {number.name} after step 2, which is saved; the same command continues")
    with pytest.raises(KeyboardInterrupt):
        steps(signal.SIGINT, signal.SIGINT)
    with pytest.raises(run.Stopped):
        for step in run.until_signalled(range(3)):
            run.save_checkpoint(tmp_path / "last.pt", nn.Linear(2, 3), None, step + 1, RunConfig("x"))
            os.kill(os.getpid(), signal.SIGTERM)  # in an evaluation, say
            raise AssertionError("not stopped at once")
    run._training.signals.clear()


def all_at_once(commands, **options):
    """{command: (exit code, stdout, stderr)}; the interpreters, which take seconds to start, start together."""
    started = {command: subprocess.Popen(command, shell=True, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, **options) for command in commands}
    ended = {command: process.communicate(timeout=60) for command, process in started.items()}
    return {command: (process.returncode, *ended[command]) for command, process in started.items()}


def test_nobody_reads_what_is_printed():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import run\n"
            "run.cli(lambda: [run.print_rank0(f'line {i}') for i in range(20000)])")
    streams = ("1>&-", "1>&- 2>&-", "| head -1", "2>&1 | head -1", "| true")
    done = all_at_once([f'{sys.executable} -c "$CODE" {stream}' for stream in streams],
                       env={**os.environ, "CODE": code})
    for command, result in done.items():
        assert result == (0, "line 0\n" if "head" in command else "", ""), command


def test_standard_output_of_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # has no reconfigure, no descriptor
    run.cli(lambda: run.print_rank0("done"))
    assert sys.stdout.getvalue() == "done\n"


@pytest.mark.parametrize("device", ("gpu", "0", "mps", "xpu", "cuda", "cuda:3", "cpu:1", ""))
def test_device_that_is_not_there(monkeypatch, device):
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"^--device {device}: this PyTorch sees no such device here, but cpu; give "):
        common.setup_distributed(device)


def test_device_that_is_found(monkeypatch):
    counts = {"cuda": 0, "xpu": 0, "mps": False}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counts["cuda"])
    monkeypatch.setattr(torch.xpu, "device_count", lambda: counts["xpu"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: counts["mps"])
    assert common.find_device("auto").type == "cpu"
    counts["mps"] = True
    assert common.find_device("auto").type == "mps" and common.find_device("auto", True).type == "cpu"
    counts["cuda"] = 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(common.find_device("auto", True)) == str(common.find_device("cuda:1")) == "cuda:1"
    assert str(common.find_device("cuda")) == "cuda"  # a process alone: what LOCAL_RANK says is left over
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"^--device cuda .of this process: cuda:2.: .* but cuda .2., cpu; give"):
        common.find_device("cuda", True)


@pytest.mark.parametrize("values", (
    {"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    {"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}))
def test_environment_that_torchrun_has_not_made(monkeypatch, values):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="^the environment says that this is one of several processes, but not of which "
                       rf"\(RANK {values['RANK']}, WORLD_SIZE {values.get('WORLD_SIZE', 'not set')}, .*`unset RANK`"):
        common.setup_distributed("cpu")


def test_step_seed(monkeypatch):
    draws = []
    for seed, step, rank in ((1, 5, 0), (1, 5, 0), (1, 6, 0), (2, 5, 0), (1, 5, 1)):
        monkeypatch.setattr(run, "rank", lambda r=rank: r)
        run.seed_step(seed, step)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1] and len(set(draws)) == 4


# ==== Log and files ====


@dataclass
class RunConfig:
    out: str
    lr: float = 1.0
    scales: tuple[int, ...] = (1, 2)
    max_steps: int | None = None
    allow_config_change: bool = False


def test_files_appear_whole(tmp_path):
    run.write_atomic(tmp_path / "a.json", b"one")
    run.write_atomic(tmp_path / "a.json", b"two")
    model = nn.Linear(2, 3)
    wrapped = nn.Sequential()
    wrapped.module = model  # as DistributedDataParallel names it
    optimizer = torch.optim.AdamW(model.parameters())
    run.save_checkpoint(tmp_path / "last.pt", wrapped, optimizer, 7, RunConfig("x"), script="s", categories=[{"id": 3}])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "last.pt"]
    assert (tmp_path / "a.json").read_bytes() == b"two"
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert set(state) == {"model", "optimizer", "step", "config", "script", "categories"} and state["step"] == 7
    assert set(state["model"]) == {"weight", "bias"} and torch.equal(state["model"]["weight"], model.weight)
    assert state["config"] == {"out": "x", "lr": 1.0, "scales": (1, 2), "max_steps": None, "allow_config_change": False}


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = nn.Linear(2, 3)
    run.save_checkpoint(tmp_path / "last.pt", model, None, 1, RunConfig("x"))
    monkeypatch.setattr(torch, "save", lambda state, file: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        run.save_checkpoint(tmp_path / "last.pt", model, None, 2, RunConfig("x"))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize("write", (
    lambda path: run.write_json(path, {}),
    lambda path: files.save_picture(Image.new("RGB", (2, 2)), path),
    lambda path: run.Log(path.parent, 0, CPU),
    lambda path: run.open_folder(path.parent)))
def test_what_cannot_be_written(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file[\w/.]*: cannot be written \((Not a directory|File exists)\); what was "
                       "saved before is untouched. Make room or mend the permissions, and start the same command "
                       "again$"):
        write(tmp_path / "file" / "log.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_full_disk_of_what_is_not_replaced(tmp_path):
    log = run.Log(tmp_path, 0, CPU)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="^.*/log.jsonl: cannot be written .No space left on device.; what was saved"):
        log.append({"step": 1})
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        with pytest.raises(UserError, match="^standard output: cannot be written .No space left on device."):
            run.print_rank0("x" * 100000)


def test_other_faults_of_the_system_stay_faults(tmp_path):
    with pytest.raises(FileNotFoundError):
        run.cli(lambda: open(tmp_path / "nothing"))


# ==== One process writes into a folder ====


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds the lock of tmp_path: (its id, a function that kills it)."""
    pytest.importorskip("fcntl")
    ready, pid = tmp_path / "ready", os.fork()
    if not pid:
        run.lock_folder(tmp_path)
        ready.touch()
        time.sleep(60)
        os._exit(0)

    def kill():
        if not killed:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    killed = []
    while not ready.exists():
        time.sleep(0.01)
    yield pid, kill
    kill()


def test_second_process_is_refused(tmp_path, other_process):
    pid, kill = other_process
    for _ in range(2):  # being refused takes nothing from the first
        with pytest.raises(UserError) as caught:
            open_job(tmp_path)
        assert str(caught.value) == (f"{tmp_path} is being filled by another process (process {pid} on "
                                     f"{socket.gethostname()}); wait until it has ended, or give another --out")
    kill()
    assert (tmp_path / "writer.lock").exists()  # of a dead process: taken over
    train(open_job(tmp_path))
    open_job(tmp_path)  # a process does not refuse itself
    run.unlock_folders()
    assert not (tmp_path / "writer.lock").exists()


def test_restart_by_torchrun_waits_for_the_attempt_before(tmp_path, other_process, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    threading.Timer(0.5, other_process[1]).start()
    open_job(tmp_path)
    run.unlock_folders()


def test_file_system_without_locks(tmp_path, other_process, monkeypatch, capsys):
    def lockf(file, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run.fcntl, "lockf", lockf)
    with pytest.raises(UserError, match=f"another process .process {other_process[0]} on "):
        open_job(tmp_path)
    other_process[1]()
    open_job(tmp_path)
    assert "is on a file system without locks (No locks available): see to it that no other" in capsys.readouterr().out
    run.unlock_folders()


# ==== Log ====


def test_log_is_cut_back(tmp_path):
    log = run.Log(tmp_path, 0, CPU)
    for step in range(6):
        terms = {"loss": torch.tensor(1.0 / 3), "loss_ce": torch.tensor(2.0)}
        log.write(step, terms, images=4, lr=0.1, epoch=step // 2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    first = json.loads(lines[3])
    assert [json.loads(l)["step"] for l in lines] == list(range(6))
    assert first["loss"] == 0.333333 and first["loss_ce"] == 2 and first["epoch"] == 1
    assert first.keys() == {"step", "lr", "epoch", "loss", "loss_ce", "images_per_s", "memory_gib", "seconds"}
    assert first["images_per_s"] > 0 and first["memory_gib"] > 0
    log = run.Log(tmp_path, 4, CPU)  # the checkpoint knows 4 finished steps: 0..3
    log.write(4, {"loss": torch.tensor(5.0)}, images=4)
    kept = (tmp_path / "log.jsonl").read_text().splitlines()
    assert kept[:4] == lines[:4] and [json.loads(l)["step"] for l in kept] == [0, 1, 2, 3, 4]
    assert json.loads(kept[4])["loss"] == 5
    run.Log(tmp_path, 0, CPU)
    assert (tmp_path / "log.jsonl").read_text() == ""  # a new run begins a new log


def test_log_with_a_line_cut_short(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    run.Log(tmp_path, 2, CPU)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


# ==== Checkpoints ====


def test_open_run(tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    cfg = RunConfig(str(out))
    assert run.open_run(cfg, "s") is None and out.is_dir()
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run.save_checkpoint(out / "last.pt", model, optimizer, 7, cfg, script="s")
    state = run.open_run(dataclasses.replace(cfg, max_steps=9), "s")  # how long a run lasts is no part of what it is
    assert "at step 7" in capsys.readouterr().out
    other = nn.Linear(2, 3)
    restored = torch.optim.AdamW(other.parameters())
    assert run.restore(state, other, restored) == 7 and torch.equal(other.weight, model.weight)
    assert torch.equal(restored.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert restored.param_groups[0]["lr"] == 0.001  # of this run, not of the file
    changed = dataclasses.replace(cfg, lr=2.0, scales=(1, 3))
    difference = r"lr: 1.0 -> 2.0; scales: \(1, 2\) -> \(1, 3\).*--allow_config_change"
    with pytest.raises(UserError, match=difference) as caught:
        run.open_run(changed, "s")
    assert str(out) in str(caught.value)
    assert run.open_run(dataclasses.replace(changed, allow_config_change=True), "s")["step"] == 7
    with pytest.raises(UserError, match=r"holds a run of s\.py"):
        run.open_run(cfg, "t")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*file"):
        run.open_run(RunConfig(str(tmp_path / "file" / "below")), "s")


def test_a_checkpoint_cannot_run_code(tmp_path):
    victim = tmp_path / "ran"

    class System:
        def __reduce__(self):
            return os.system, (f"touch {victim}",)

    torch.save({"model": System()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"model": System()}))
    for name in ("zip.pth", "plain.pkl"):
        with pytest.raises(UserError, match=rf"{name}: refused") as caught:
            run.read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not victim.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)  # it would have run
    assert victim.exists()


@pytest.mark.parametrize("content", (b"", b"not a checkpoint", b"PK\x03\x04 cut", bytes(range(256)) * 4))
def test_what_is_no_checkpoint(content, tmp_path):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(UserError, match="file.pth") as caught:
        run.read_checkpoint(tmp_path / "file.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ([1, 2], torch.zeros(3)))
def test_a_file_of_something_else(content, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match="file.pth"):
        convert.state_of(run.read_checkpoint(tmp_path / "file.pth"), tmp_path / "file.pth")


def test_no_such_checkpoint_and_a_cut_one(tmp_path):
    with pytest.raises(UserError, match="nowhere.pth: no such checkpoint"):
        run.read_checkpoint(tmp_path / "nowhere.pth")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:2000])
    with pytest.raises(UserError, match="cut.pth"):
        run.read_checkpoint(tmp_path / "cut.pth")



# ==== Numbers that are not finite ====


def test_watch_looks_one_step_late(tmp_path):
    """Nothing waits for a step's numbers before the next has been started; whatever came of that, the first bad step is
    named, with its batch."""

    def run_script(*losses):
        watch = run.FiniteWatch(tmp_path, lambda i: f"image{i}")
        for step, loss in enumerate(losses):
            terms = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(1.0)}
            watch.check(step, terms, [{"index": [10 * step]}])
        terms = {"loss": torch.tensor(0.0), "grad_norm": torch.tensor(math.inf)}
        watch.check(len(losses), terms, [{"index": [99]}])
        return watch

    with pytest.raises(FloatingPointError, match=r"^step 2: not finite: grad_norm inf; images of this process: "
                       r"image99; its batch .*step2-rank0"):
        run_script(1.0, 2.0).settle()
    assert torch.load(tmp_path / "nonfinite-step2-rank0.pt")["batches"] == [{"index": [99]}]
    with pytest.raises(FloatingPointError, match=r"^step 1: not finite: loss nan; images of this process: image10"):
        run_script(1.0, math.nan)  # seen at the end of step 2


def test_watch_whose_batch_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("")
    watch = run.FiniteWatch(tmp_path / "file", lambda i: f"image{i}")
    watch.check(5, {"loss": torch.tensor(math.nan)}, [{"index": [0]}])
    with pytest.raises(FloatingPointError, match="^step 5: not finite: loss nan; .*; its batch is not kept .*cannot"):
        watch.settle()


def test_watch_names_every_term_and_eight_images(tmp_path):
    watch = run.FiniteWatch(tmp_path, lambda i: f"image{i}")
    terms = {"loss": math.nan, "loss_bbox": 1.0, "loss_ce": -math.inf, "grad_norm": math.inf}
    watch.check(5, {name: torch.tensor(value) for name, value in terms.items()}, [{"index": [0, 1, 2]}] * 4)
    with pytest.raises(FloatingPointError, match=r"^step 5: not finite: loss nan, loss_ce -inf, grad_norm inf; images "
                       r"of this process: (image[012], ){7}image1 and 4 more; its batch is kept in"):
        watch.settle()
    watch.settle()  # said once


# ==== Run ====


@dataclass
class JobConfig(run.RunConfig):
    backbone_weights: str = "random"  # where the backbone starts
    batch_size: run.Count = 4  # images per step
    epochs: run.Count = 2  # passes over the data
    accumulate: run.Count = 2  # micro-batches
    log_every: run.Count = 1  # steps
    save_every: run.Count = 1  # steps
    lr_drop: run.NonNegative = 3  # epoch
    patience: run.Natural = 0  # evaluations
    probe_every: run.Natural = 0  # steps


class Source:
    """Ten images."""

    def __len__(self):
        return 10

    def key(self, i):
        return f"image{i}"

    def fingerprint(self):
        return "0123456789abcdef" * 4


def open_job(out, source=Source(), **values):
    return run.Run(JobConfig(out=str(out), **values), "tiny", source, len(source), CPU,
                   lambda metrics: f"score {metrics.get('score')}", categories=[{"id": 3}])


def train(job, fallback=1, losses={}):
    """All steps that are left, of a model that does not learn; `losses`: of a step, else 1."""
    model = nn.Linear(2, 1)
    job.restore(model, torch.optim.SGD(model.parameters(), lr=0.1))
    sample = {"index": [0, 1], "skipped": []} | ({} if fallback is None else {"fallback": fallback})
    for step in job.steps():
        batches = job.next_batches(itertools.repeat(sample))
        terms = {"loss": torch.tensor(losses.get(step, 1.0)), "grad_norm": torch.tensor(2.0)}
        job.check(step, terms, batches)
        job.log(step, terms, "loss", lr=0.5)
        job.save(step)
    return job


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("batch_size", "reason"), (
    (3, "batch_size 3 .global. is no multiple of 1 processes x 2 accumulated micro-batches = 2.*2 or 4 would work"),
    (12, "10 images are fewer than one batch of 12")))
def test_a_refused_batch_size_leaves_nothing_behind(tmp_path, batch_size, reason):
    with pytest.raises(UserError, match=reason):
        open_job(tmp_path / "run", batch_size=batch_size)
    assert not list(tmp_path.iterdir())


def test_a_run_from_its_plan_to_its_end(tmp_path, capsys):
    out = tmp_path / "run"
    job = open_job(out)
    assert job.metrics is None and (job.start, job.total_steps, job.steps_per_epoch) == (0, 4, 2)
    train(job)
    assert job.end({"score": 7}) == {"steps": 4, "score": 7} == json.loads((out / "metrics.json").read_text())
    printed = capsys.readouterr().out
    assert "10 images, 2 steps per epoch, steps 0..4; batch 4 = 1 processes x 2 x 2; cpu\n" in printed
    assert f"score 7\nwrote {out}/last.pt, log.jsonl, metrics.json, curves.png\n" in printed
    assert [(line["step"], line["epoch"], line["loss"], line["lr"]) for line in log_of(out)] == [
        (0, 0, 1, 0.5), (1, 0, 1, 0.5), (2, 1, 1, 0.5), (3, 1, 1, 0.5)]
    state = torch.load(out / "last.pt", weights_only=True)
    assert (state["step"], state["script"], state["world"], state["categories"]) == (4, "tiny", 1, [{"id": 3}])
    assert state["data"] == "10 images, sha256 0123456789abcdef"


@pytest.mark.parametrize(("values", "line"), (
    ({}, "it is trained, with ordinary BatchNorm"),
    ({"lr_backbone": 0.0, "backbone_norm": "bn"}, "and it is FROZEN"),
    ({"lr_backbone": 0.1, "backbone_norm": "frozen"}, "it is trained, with frozen BatchNorm"),
    ({"init_from": "last.pt"}, None),
    ({"backbone_weights": "swav"}, None)))
def test_how_the_backbone_starts_is_told(tmp_path, capsys, values, line):
    job = open_job(tmp_path)
    for name, value in values.items():
        setattr(job.cfg, name, value)
    job.restore(nn.Linear(2, 1), None)
    next(job.steps())
    printed = capsys.readouterr().out
    assert (f"the backbone starts random: {line}\n" if line else "steps per epoch") in printed
    assert ("starts random" in printed) == (line is not None)


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    train(open_job(tmp_path, max_steps=2)).end({"score": 1})
    capsys.readouterr()
    assert open_job(tmp_path, max_steps=2).metrics == {"steps": 2, "score": 1}
    assert "this run is finished (2 steps)\nscore 1\n" in capsys.readouterr().out
    longer = open_job(tmp_path)  # its metrics are those of half the run
    assert longer.metrics is None and (longer.start, longer.total_steps) == (2, 4)
    train(longer)
    assert "10 images, 2 steps per epoch, steps 2..4; " in capsys.readouterr().out
    unmeasured = open_job(tmp_path)  # killed after its last step, before it was measured
    assert unmeasured.metrics is None and unmeasured.start == 4
    assert train(unmeasured).end({"score": 2}) == {"steps": 4, "score": 2} == open_job(tmp_path).metrics
    assert [line["step"] for line in log_of(tmp_path)] == [0, 1, 2, 3]


def test_a_run_may_become_longer(tmp_path, capsys):
    train(open_job(tmp_path, lr_drop=1.5)).end({"score": 1})
    capsys.readouterr()
    for values, text in (({"lr_drop": 1.0}, "lr_drop: 1.5 -> 1.0"), ({"epochs": 1, "lr_drop": 1.5}, "epochs: 2 -> 1"),
                         ({"steps": 3, "lr_drop": 1.5}, "steps: None -> 3"),
                         ({"steps": 4, "lr_drop": 1.5}, "steps: None -> 4"),
                         ({"epochs": 4, "seed": 1}, "configuration (seed: 42 -> 1)")):  # the rest is refused
        with pytest.raises(UserError, match=re.escape(text)):
            open_job(tmp_path, **values)
    job = open_job(tmp_path, epochs=4, lr_drop=3.0)
    assert job.metrics is None and (job.start, job.total_steps, job.epoch_steps) == (4, 8, 2)
    assert (f"continuing the run in {tmp_path} at step 4, which becomes 8 steps long (epochs: 2 -> 4; lr_drop: 1.5 -> "
            "3.0)\n") == capsys.readouterr().out
    assert train(job).end({"score": 2}) == {"steps": 8, "score": 2} == open_job(tmp_path, epochs=4, lr_drop=3.0).metrics
    job = open_job(tmp_path, steps=9, epochs=4, lr_drop=3.0)
    assert (job.start, job.total_steps, job.epoch_steps) == (8, 9, 9 / 4)


def test_what_finetune_called_iterations(tmp_path):
    cfg = JobConfig(out=str(tmp_path), steps=4)
    old = {k: v for k, v in vars(cfg).items() if k != "steps"} | {"iterations": 4}
    torch.save({"script": "s", "step": 2, "config": old}, tmp_path / "last.pt")
    assert not run.open_run(cfg, "s", steps_per_epoch=2)["longer"]
    assert run.open_run(dataclasses.replace(cfg, steps=5), "s", steps_per_epoch=2)["longer"]


def test_a_run_that_stops_early_is_finished(tmp_path, capsys):
    def stop_after_three(**values):
        job = open_job(tmp_path, **values)
        model = nn.Linear(2, 1)
        job.restore(model, None)
        for step in job.steps():
            if step == 3:
                break
            job.save(step)
        assert run._training.saved is None
        job.save(job.done - 1, again=True)
        return job.end({"stopped_early": job.cfg.patience})

    assert stop_after_three(patience=5) == {"steps": 3, "stopped_early": 5} == open_job(tmp_path, patience=5).metrics
    assert "this run is finished (3 steps)" in capsys.readouterr().out
    for values in ({"patience": 9}, {"patience": 5, "epochs": 3}):  # others
        job = open_job(tmp_path, **values)
        assert job.metrics is None and job.start == 3 < job.total_steps


@pytest.mark.parametrize("values", ({}, {"steps": 10}))
def test_schedules_keep_their_shares_of_the_steps(tmp_path, values):
    """SoCo's and DUPR's cosine, a drop after 3 of 4 epochs; epochs of 2 steps, or 10 steps in all."""
    job = open_job(tmp_path, epochs=4, **values)
    length = job.total_steps
    assert length == (10 if values else 8) and job.epoch_steps == length / 4
    drops = [common.step_schedule(step, job.epoch_steps, (3,)) for step in range(length)]
    assert drops.count(1) == math.ceil(0.75 * length)
    rates = [soco.lr_factor(soco.Config(epochs=4, warmup_epochs=1, lr=8.0), step, job.epoch_steps)
             for step in range(length + 1)]
    assert rates[0] == 0.01 and max(rates) == pytest.approx(1, abs=0.03) and rates[-1] == pytest.approx(0, abs=1e-3)
    rates = [dupr.lr_factor(dupr.Config(epochs=4), step, job.epoch_steps) for step in range(length)]
    assert sorted(set(rates)) == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 4)) for k in (3, 2, 1, 0)])


def test_what_a_start_says(tmp_path, capsys, monkeypatch):
    """Size of the model at once; after ten steps, of which the first is slow, how long all will take."""
    job = open_job(tmp_path, steps=1000)
    clock = itertools.chain([0.0, 5.0], itertools.count(5.5, 0.5))
    monkeypatch.setattr(run, "Log", lambda *_: None)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))  # 16 + 8 parameters, 8 floats and a counter beside
    model[0].requires_grad_(False)
    job.restore(model, None)
    steps = job.steps()
    next(steps)
    assert f"model: 24 parameters, 8 of them trained; {(32 * 4 + 8) / 2**20:.1f} MiB\n" in capsys.readouterr().out
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(run, "peak_memory_gib", lambda device: 1.25)
    steps.close()
    next(clock)
    steps = run.Run.steps(job)
    for _ in range(11):
        next(steps)
    printed = capsys.readouterr().out
    assert re.search(r"10 steps took [\d.]+ s \(\d+ images/s, peak memory 1.2 GiB\): 1000 steps take about \d", printed)
    for _ in range(20):
        next(steps)
    assert "steps took" not in capsys.readouterr().out
    steps.close()


def test_durations():
    assert [run.duration(s) for s in (5.4, 119, 130, 1200, 9000, 90000, 400000)] == [
        "5 seconds", "119 seconds", "2.2 minutes", "20 minutes", "2.5 hours", "25 hours", "4.6 days"]


@pytest.mark.parametrize("error", (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), MemoryError(),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), OSError(errno.ENOMEM, "Cannot allocate memory")))
def test_out_of_memory_names_flags(tmp_path, error, fails):
    def train_step():
        raise error

    def main(argv):
        if argv:
            cfg = open_job(tmp_path, **({"amp": "bf16"} if argv[0] == "bf16" else {})).cfg
            cfg.scales, cfg.eval_size, cfg.least_micro_batch = (1, 2), 800, 1 + (argv[0] == "bf16")
        if argv == ["in an evaluation"]:
            raise error
        train_step()

    machine = ", or a machine with more memory"
    saved = f"{machine}; what was saved goes on, with --allow_config_change"
    assert fails(main, ["in an evaluation"]).endswith(f"); give smaller --eval_size{saved}")
    assert re.match(rf"error: out of memory \(.+\); give fewer or smaller images at a time{machine}$", fails(main, []))
    assert fails(main, ["in a step"]).endswith(
        "); give a larger --accumulate (now 2) or --checkpoint_activations or --amp bf16 (fp16 on GPUs before Ampere) "
        f"or smaller --batch_size, --scales{saved}")
    assert fails(main, ["bf16"]).endswith(f"); give --checkpoint_activations or smaller --batch_size, --scales{saved}")


def test_memory_of_the_machine_in_a_step(tmp_path, fails):
    """A real one: the CPU allocator's."""
    assert "out of memory (" in fails(lambda argv: torch.empty(2**60, dtype=torch.uint8), [])


def test_curves_and_events_of_a_run(tmp_path, monkeypatch):
    """curves.png at each evaluation and at the end; --tensorboard: the numbers of log.jsonl as events, and where a run
    continues what was written behind that step is purged."""
    events = []

    class Writer:
        def __init__(self, folder, purge_step):
            events.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def flush(self):
            pass

    monkeypatch.setattr(run, "tensorboard_writer", lambda: Writer)
    job = train(open_job(tmp_path, tensorboard=True, max_steps=2))
    job.evaluated(1, {"AP50": 0.25})
    assert Image.open(tmp_path / "curves.png").width > 500
    assert log_of(tmp_path)[-1] == {"step": 1, "epoch": 1, "AP50": 0.25}
    assert events[0] == (str(tmp_path / "tensorboard"), 0)
    assert ("loss", 1.0, 0) in events and ("AP50", 0.25, 1) in events
    assert not any(event[0] == "step" for event in events)
    (tmp_path / "curves.png").unlink()
    train(open_job(tmp_path, tensorboard=True)).end({})
    assert (str(tmp_path / "tensorboard"), 2) in events and (tmp_path / "curves.png").exists()


def test_what_is_measured_during_training(tmp_path):
    """After the first step and every second one; the model is in training mode again, nan is left out, and neither the
    rate of images nor a run without --probe_every knows of it."""
    job = train(open_job(tmp_path / "on", probe_every=2))
    seen = []

    def measure(model):
        seen.append(model.training)
        model.eval()
        time.sleep(0.05)
        return {"looking": 0.125, "probe_AR10": math.nan}

    before, last = torch.get_rng_state(), job.log_file.last
    for step in range(4):
        job.probe(step, measure)
        assert job.model.training
    assert seen == [True] * 3 and torch.equal(before, torch.get_rng_state())
    assert log_of(tmp_path / "on")[4:] == [{"step": s, "epoch": (s + 1) // 2, "looking": 0.125} for s in (0, 1, 3)]
    assert job.log_file.last - last >= 0.15
    train(open_job(tmp_path / "off")).probe(0, measure)
    assert len(seen) == 3


def test_tensorboard_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="^--tensorboard: the package is not here; pip install tensorboard"):
        open_job(tmp_path / "out", tensorboard=True)
    assert not (tmp_path / "out").exists()


def test_fallbacks_are_counted_and_restored(tmp_path):
    assert train(open_job(tmp_path, max_steps=2), fallback=3).fallbacks == 12  # two micro-batches a step
    assert torch.load(tmp_path / "last.pt", weights_only=True)["fallbacks"] == 12
    job = open_job(tmp_path)
    assert job.fallbacks == 12
    assert train(job, fallback=1).fallbacks == 16
    assert [line["fallbacks"] for line in log_of(tmp_path)] == [6, 12, 14, 16]
    train(open_job(tmp_path / "other"), fallback=None)  # a script that has none
    assert not any("fallbacks" in line for line in log_of(tmp_path / "other"))


def test_a_step_that_is_not_finite_is_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="^step 2: not finite: loss nan; images of this process: image0, "):
        train(open_job(tmp_path), losses={2: math.nan})
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2
    assert [line["step"] for line in log_of(tmp_path)] == [0, 1]
    job = train(open_job(tmp_path))  # the same command goes on
    assert job.start == 2 and [line["step"] for line in log_of(tmp_path)] == [0, 1, 2, 3]


def test_unreadable_images_end_a_run(tmp_path):
    job = open_job(tmp_path)
    batch = {"index": [0, 1], "skipped": ["3.png: cut", "3.png: cut"]}
    with pytest.raises(UserError, match=r"^1 of 10 images cannot be read .more than 1 %., the first: 3\.png: cut"):
        job.next_batches(iter([batch, batch]))


def test_another_data_set_is_refused(tmp_path):
    train(open_job(tmp_path, max_steps=2))
    other = Source()
    other.fingerprint = lambda: "f" * 64
    with pytest.raises(UserError, match="data set: 10 images, sha256 0123456789abcdef -> 10 images, sha256 f{16}"):
        open_job(tmp_path, other)


def test_help():
    flags = {"detreg": "--lr_drop", "finetune": "--labels_percent", "proposals": "--grid", "convert": "--to",
             "predict": "--tile"}
    done = all_at_once([f"{sys.executable} {script}.py --help" for script in flags])
    for (command, (code, out, errors)), flag in zip(done.items(), flags.values()):
        assert code == 0 and out.startswith("usage: ") and flag in out and not errors, command
