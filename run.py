"""A run's life: flags, exit codes, signals, log, checkpoints and resume, the watch for numbers that are not finite.

`Run` is what the main() of every script is made of: it opens --out, counts, logs, saves and ends;
what happens in a step stands in the script.
"""
from __future__ import annotations

from common import (UserError, all_reduce_sum, barrier, broadcast_buffers, loss_scaler, rank, to_device,  # before torch
                    world_size)

import argparse
import collections
import contextlib
import dataclasses
import errno
import functools
import inspect
import json
import math
import os
import pickle
import random
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
import types
import typing
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import curves
from files import printable, replacing, write_atomic, write_json, writing

try:
    import fcntl
except ImportError:  # Windows: no lock on --out
    fcntl = None

# ==== 1. Printing ====


def progress(iterable: Iterable, **kwargs: Any) -> tqdm:
    """A progress bar on rank 0; without a terminal it prints a line every ten seconds rather than every redraw."""
    interval = 0.5 if sys.stderr.isatty() else 10
    return tqdm(iterable, disable=rank() != 0, mininterval=interval, dynamic_ncols=True, **kwargs)


def print_rank0(text: str) -> None:
    """A line on rank 0, above the progress bar."""
    if rank() == 0:
        with writing("standard output"):
            tqdm.write(text)
            sys.stdout.flush()


# ==== 2. Flags ====


@dataclass(frozen=True)
class Range:
    """The values that a number may have: low..high, finite; `open`: low itself is none of them."""
    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:  # nan compares with nothing
        return abs(value) < math.inf and self.low <= value <= self.high and not (self.open and value == self.low)

    def __str__(self) -> str:
        least = f"{'above' if self.open else 'at least'} {self.low:g}"
        return least if self.high == math.inf else f"{least} and at most {self.high:g}"


# Types of knobs: a number and its range. Every one ends: an upper limit lies far above what any run can mean, and below
# what overflows an int64 or a float32, or asks for memory that no machine has. A number beyond it is a slip.
Count = Annotated[int, Range(1, 10**9)]  # epochs, steps
Natural = Annotated[int, Range(0, 10**9)]
Images = Annotated[int, Range(1, 10**7)]  # of a set or a batch
Pixels = Annotated[int, Range(1, 2**14)]  # side of an image
Grid = Annotated[int, Range(0, 2**14)]  # side that an image is squeezed to, pixels; 0 = as it is
Cells = Annotated[int, Range(1, 2**10)]  # side of what RoIAlign makes of a region
Width = Annotated[int, Range(1, 2**16)]  # channels of a layer; queries, boxes, regions, classes
Depth = Annotated[int, Range(1, 100)]  # layers, levels, heads
Workers = Annotated[int, Range(0, 1024)]  # processes beside this one
Processes = Annotated[int, Range(1, 1024)]  # or threads
Seed = Annotated[int, Range(0, 2**63 - 1)]
Positive = Annotated[float, Range(0, 1e6, open=True)]
NonNegative = Annotated[float, Range(0, 1e6)]
Share = Annotated[float, Range(0, 1)]


@dataclass
class RunConfig:
    """The knobs of a run, the same in all scripts."""
    least_micro_batch: ClassVar[int] = 1  # images: what --accumulate may cut the batch into
    data: str = "imagenet"  # imagenet100, imagenet, coco, coco_unlabeled, voc, synthetic, a folder, or a .txt of paths
    data_root: str | None = None  # where a named data set lies; else $DATA_ROOT, else data/<name>
    synthetic_images: Images = 800  # size of the synthetic pool
    synthetic_size: Pixels = 160  # side of a synthetic scene, pixels
    out: str | None = None  # output folder; else out/<script>-<preset>-<data>
    preset: str | None = None  # a set of values that differ from the defaults
    accumulate: Images = 1  # micro-batches per step: one GPU reaches the global batch
    amp: Literal["off", "bf16", "fp16"] = "off"  # autocast; boxes, sampling, RoIAlign, losses stay fp32; fp16: old GPUs
    checkpoint_activations: bool = False  # compute layers twice rather than keep what is in them: less memory
    compile: bool = False  # torch.compile the layers (slow to start; meant for GPUs)
    seed: Seed = 42  # everything random follows from it
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    num_workers: Workers = 8  # loader processes per training process
    steps: Count | None = None  # length of the run instead of --epochs; drops and warm-up keep their shares
    max_steps: Count | None = None  # stop after this many steps
    save_every: Count = 1000  # steps between checkpoints
    log_every: Count = 50  # steps between lines of log.jsonl
    tensorboard: bool = False  # write log.jsonl's numbers as TensorBoard events too
    allow_config_change: bool = False  # continue a run although the configuration differs


@dataclass
class ProbeConfig:
    """The knobs of a pretraining's images and of its before/after table."""
    train_images: Annotated[int, Range(0, 10**9)] = 0  # train on so many images, drawn once (SoCo, Table 9); 0 = all
    probe_data: str | None = None  # other images to probe on, as --data (DETReg: a labelled set); else held-out ones
    probe_images: Annotated[int, Range(0, 10**7)] = 0  # images of the probe, held out from training; 0 = no probe
    probe_every: Natural = 0  # steps between measurements of `looking` on them, kept in memory; 0 = none


# What may differ between a run and its continuation: it changes neither the data nor the arithmetic.
RUN_ONLY = {"preset", "out", "max_steps", "save_every", "log_every", "num_workers", "device", "allow_config_change",
            "data_root", "eval_every", "tensorboard", "patience", "probe_every", "checkpoint_activations"}
# What only matters where a run starts: a continuation has the weights of its checkpoint, those of a frozen target too.
START_ONLY = {"backbone_weights", "init_from", "aligned_start", "standardized_start", "zero_init_residual"}
# What may change where it makes the run longer.
LENGTH = {"epochs", "steps", "lr_drop", "lr_drops"}


@functools.cache
def _knob_help(config_class: type) -> dict[str, str]:
    """The comment behind each field of a configuration class: what the reader reads is what --help prints."""
    pattern = re.compile(r"^\s+(\w+)\s*:[^#]*=[^#]*#\s*(.+?)\s*$", re.M)
    classes = [c for c in config_class.__mro__[::-1] if dataclasses.is_dataclass(c)]
    return {name: text for c in classes for name, text in pattern.findall(inspect.getsource(c))}


@functools.cache
def _split_hint(hint: Any) -> tuple[Any, Range | None, bool]:
    """(type, its range, whether None is allowed) of a knob's annotation; of a tuple the range of its elements."""
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    element = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
    bounds = element.__metadata__[0] if typing.get_origin(element) is Annotated else None
    if bounds:
        plain = element.__origin__
        hint = tuple[plain, ...] if typing.get_origin(hint) is tuple else plain
    return hint, bounds, optional


def _add_knob(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, text: str) -> None:
    hint, bounds, optional = _split_hint(hint)
    args, flag = typing.get_args(hint), f"--{name}"
    limits = f"{bounds}; " if bounds else ""
    shared = {"default": argparse.SUPPRESS, "help": f"{text} ({limits}default: {default})".replace("%", "%%")}
    if hint is bool:
        parser.add_argument(flag, nargs="?", const=True, type=_boolean, metavar="BOOL", **shared)
        parser.add_argument(f"--no_{name}", dest=name, action="store_false", **shared | {"help": argparse.SUPPRESS})
    elif typing.get_origin(hint) is Literal:
        parser.add_argument(flag, choices=args, type=type(args[0]), **shared)
    elif typing.get_origin(hint) is tuple:
        one = ({"choices": typing.get_args(args[0])} if typing.get_origin(args[0]) is Literal
               else {"type": args[0], "metavar": args[0].__name__.upper()})
        parser.add_argument(flag, nargs="+", **one, **shared)
    else:
        def optional_value(text: str) -> Any:
            return None if text.lower() == "none" else hint(text)

        optional_value.__name__ = hint.__name__  # in argparse's "invalid int value"
        convert = optional_value if optional else hint
        parser.add_argument(flag, type=convert, metavar=hint.__name__.upper(), **shared)


class Parser(argparse.ArgumentParser):
    """Of every script and benchmark: a wrong command line ends in one line, as all bad input; no abbreviated flags. The
    `type` of a flag may be one of the types of knobs above, whose range --help shows: UserError beyond it."""

    def __init__(self, **options: Any):
        self.hints: dict[str, Any] = {}
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def add_argument(self, *flags: str, **options: Any) -> argparse.Action:
        hint = options.get("type")
        plain, bounds, _ = _split_hint(hint)
        if bounds:
            options |= {"type": plain, "help": f"{options.get('help', '')} ({bounds})"}
        action = super().add_argument(*flags, **options)
        self.hints[action.dest] = hint
        return action

    def parse_known_args(self, *args: Any, **options: Any) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(*args, **options)
        check_ranges(vars(found), self.hints)
        _training.cfg = found
        return found, rest

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"error: {printable(message)}; {self.prog} --help lists the flags\n")


def check_ranges(values: dict[str, Any], hints: dict[str, Any]) -> None:
    """UserError for a number outside the range of its type; of a list every one counts."""
    for name, hint in hints.items():
        value, bounds = values.get(name), _split_hint(hint)[1]
        numbers = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
        if bounds and any(number not in bounds for number in numbers):
            raise UserError(f"--{name} {' '.join(map(str, numbers))}: must be {bounds}")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def normalized_flags(argv: list[str] | None) -> list[str]:
    """The command line (None: the program's), the hyphens of its flags as underscores."""
    argv = sys.argv[1:] if argv is None else argv
    return [re.sub(r"^--[\w-]+", lambda m: "--" + m.group()[2:].replace("-", "_"), a) for a in argv]


def given_flags(argv: list[str] | None) -> frozenset[str]:
    """The names of the flags on the command line."""
    return frozenset(a[2:].split("=")[0].removeprefix("no_") for a in normalized_flags(argv) if a.startswith("--"))


@functools.cache
def _config_parser(config_class: type, presets: tuple[str, ...], script: str, description: str
                   ) -> tuple[Parser, dict[str, Any], dict[str, Any]]:
    """(parser, type of each knob, default of each knob), made once: finetune.py reads its command line twice."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
    parser, texts = Parser(prog=f"{script}.py", description=description), _knob_help(config_class)
    parser.add_argument("--preset", choices=presets, default=None, help=texts["preset"])
    for name, default in defaults.items():
        if name != "preset":
            _add_knob(parser, name, hints[name], default, texts.get(name, ""))
    return parser, hints, defaults


def parse_config(config_class: type, presets: dict[str, dict], argv: list[str] | None, *, script: str,
                 description: str, recipe: Callable[[dict], dict] | None = None) -> Any:
    """Command line -> config dataclass. Precedence: default < recipe (a function of the other values) < preset < flag.

    description: the script's docstring, whose first paragraph --help shows. Flags spell the field's name (hyphens are
    accepted); the comment behind a field is its help text. A number outside its type's range is a UserError.
    """
    parser, hints, defaults = _config_parser(config_class, tuple(sorted(presets)), script, description.split("\n\n")[0])
    flags = vars(parser.parse_args(normalized_flags(argv)))
    check_ranges(flags, hints)
    preset = presets.get(flags["preset"], {})
    base = defaults | (recipe(defaults | preset | flags) if recipe else {}) | preset
    values = base | flags | _moved_drops(base, flags, hints)
    if "epochs" in flags and "steps" in values:  # they are the length, not the recipe's steps
        values["steps"] = flags.get("steps")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    check_ranges(values, hints)
    if values["out"] is None:
        values["out"] = default_out(script, values["preset"], values["data"], "data" in preset and "data" not in flags)
    _training.cfg = config_class(**values)
    return _training.cfg


def _moved_drops(base: dict[str, Any], flags: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    """With --epochs and no flag for them, the epochs after which the rate drops keep their share of the run."""
    moved = {}
    for name in {"lr_drop", "lr_drops"} & base.keys() - flags.keys() if "epochs" in flags else ():
        if _split_hint(hints[name])[1].high > 1:  # else they are shares (R-CNN family)
            drops = np.ravel(base[name]) * flags["epochs"] / base["epochs"]
            drops = tuple(int(drop) if drop == int(drop) else round(drop, 6) for drop in drops.tolist())
            moved[name] = drops if isinstance(base[name], tuple) else drops[0]
    return moved


# Names of files and folders that do not tell one data set from another: those of layouts and exports.
GENERIC = re.compile(r"_annotations\.coco|annotations?|instances_\w+|data|dataset|default|all|images?|imgs|labels?|"
                     r"train|trainval|valid|validation|val|test|obj_train_data|result|jpegimages|imagesets|main|"
                     r"vocdevkit|voc\d{4}|(train|val|test|unlabeled)\d{4}", re.I)


def data_name(data: str) -> str:
    """What an output folder calls a data set: the name of its folder or file without suffix; a generic one gives way to
    that of the folder above."""
    path = Path(data)
    if os.path.exists(data) or len(path.parts) != 1:
        path = Path(os.path.abspath(data))
    names = [re.sub(r"\.(json|txt|ya?ml)$", "", name, flags=re.I) for name in path.parts[::-1] if name != path.anchor]
    name = next((name for name in names if not GENERIC.fullmatch(name)), (names or ["data"])[0])
    return "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name)[:60]


def default_out(script: str, preset: str | None, data: str, own_data: bool) -> str:
    """--out where it is not given. own_data: `data` is the preset's own."""
    return f"out/{'-'.join([script, *([preset] if preset else []), *([] if own_data else [data_name(data)])])}"


def check_pair(cfg: Any, *names: str) -> None:
    """UserError unless each of these knobs is a smallest and a largest value, in this order."""
    for name in names:
        pair = getattr(cfg, name)
        if len(pair) != 2 or pair[0] > pair[1]:
            raise UserError(f"--{name} {' '.join(map(str, pair))}: "
                            "give the smallest and the largest value, in this order")


def check_batch_size(images: int, batch_size: int, world: int, accumulate: int) -> None:
    """UserError where a global batch cannot be cut into equal pieces, or is larger than the data set."""
    pieces = world * accumulate
    if batch_size < 1 or batch_size % pieces:
        below, above = batch_size // pieces * pieces, (max(batch_size, 0) // pieces + 1) * pieces
        near = sorted({max(pieces, below), above})
        raise UserError(f"batch_size {batch_size} (global) is no multiple of {world} processes x {accumulate} "
                        f"accumulated micro-batches = {pieces}. For example {' or '.join(map(str, near))} would work.")
    if images < batch_size:
        raise UserError(f"{images} images are fewer than one batch of {batch_size}. "
                        f"Give a batch_size of at most {images} or more images.")


# ==== 3. Exit codes and signals ====

EXIT_NOT_FINITE = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h, "try again later"
EXIT_CLOSED = 141  # 128 + SIGPIPE, as a shell says it
# In the output folder (open_folder): where a process says why it ended. Beside it stop.txt: the signal it has heard.
_failure_file: list[Path] = []


class Stopped(SystemExit):
    """A signal has asked for the end; the text says what is saved."""

    def __init__(self, text: str):
        super().__init__(EXIT_STOPPED)
        self.text = text


def cli(main: Callable[[], Any]) -> None:
    """Run a script's main() and turn how it ended into an exit code: see how_it_ended.

    One of several processes records why it ended; the others, whose collectives then fail, repeat it and end alike.
    """
    _training.cfg, _training.saves = None, False
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started it
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's cannot; no name that a file can have may end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with handling_signals(end_at_once):
            main()
        if dist.is_initialized():
            dist.destroy_process_group()
        code, text = 0, ""
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code and {"-h", "--help"} & set(sys.argv[1:]):
            sys.stdout.flush()
            os._exit(0)  # unloading torch would take a third of the time until the help is there
        code, text = how_it_ended(error)
        if code is None:
            raise
    finally:
        unlock_folders()
    if code not in (0, EXIT_CLOSED) and text:
        prefix = "" if code == EXIT_STOPPED else f"error{f' (process {rank()})' if rank() else ''}: "
        with contextlib.suppress(OSError):
            print(prefix + printable(text), file=sys.stdout if code == EXIT_STOPPED else sys.stderr, flush=True)
    if _is_closed(sys.stdout):  # what is left in its buffer would end the interpreter with another message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code and dist.is_initialized():  # by torchrun, of one process too: it ends with 1 whatever this one ends with
        record_failure(code, text)
        os._exit(code)  # leaving properly would wait for the others, who wait for this one
    if code:
        sys.exit(code)


def how_it_ended(error: BaseException) -> tuple[int | None, str]:
    """(exit code, line to print) of a main() that ended with `error`: 2, bad input; 3, a number is not finite; 75,
    stopped by a signal with everything saved; 130, Ctrl-C; 141, nobody reads what it prints; 1, our fault, with a
    traceback (None: the interpreter prints it)."""
    if isinstance(error, Stopped):
        return EXIT_STOPPED, error.text
    if isinstance(error, SystemExit):  # argparse
        return error.code or 0, ""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; what was saved before is untouched"
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, FloatingPointError):
        return EXIT_NOT_FINITE, str(error)
    if is_out_of_memory(error):
        reason = (str(error).splitlines() or ["of this machine"])[0][:160]
        return 2, f"out of memory ({reason}); {less_memory(in_training(error))}"
    if isinstance(error, BrokenPipeError) and (_is_closed(sys.stdout) or _is_closed(sys.stderr)):
        return EXIT_CLOSED, ""
    if isinstance(error, RuntimeError):
        if text := loader_failure(str(error)):
            if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler says it once more at every end of one
            return 2, text
        if world_size() > 1 and (failure := read_failure()):  # what failed is a collective
            return failure
    if world_size() == 1:
        return None, ""
    traceback.print_exception(error)
    text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if "gloo" in text or isinstance(error, dist.DistError):
        text = f"another process died, or kept this one waiting for more than PROCESS_TIMEOUT seconds ({text})"
    return 1, text


def is_out_of_memory(error: BaseException) -> bool:
    """Of the machine or of a GPU, whoever says it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or isinstance(error, RuntimeError) and bool(
        re.search(r"out of memory|can't allocate memory|DefaultCPUAllocator|_ALLOC_FAILED", str(error)))


def in_training(error: BaseException) -> bool:
    """Was it raised in a training step?"""
    return any(frame.f_code.co_name == "train_step" for frame, _ in traceback.walk_tb(error.__traceback__))


def less_memory(training: bool) -> str:
    """What would take less memory, in a training step or elsewhere: flags of the script in progress."""
    cfg, ways = _training.cfg, []
    training = training and isinstance(cfg, RunConfig)
    if training and cfg.batch_size // (world_size() * cfg.accumulate) > cfg.least_micro_batch:
        ways.append(f"a larger --accumulate (now {cfg.accumulate})")
    if training and not cfg.checkpoint_activations:
        ways.append("--checkpoint_activations")
    if training and cfg.amp == "off":
        ways.append("--amp bf16 (fp16 on GPUs before Ampere)")
    names = ["batch_size", "scales", "max_size", "crop_scales", "crop_size", "image_size"]
    if not training:  # of eight images at a time in a run's evaluations
        eight = isinstance(cfg, RunConfig) and (hasattr(cfg, "eval_size") or hasattr(cfg, "probe_images"))
        names = ["eval_size", "max_size", "image_size", "tile", *(() if eight else ("batch_size",))]
    if smaller := [f"--{name}" for name in names if getattr(cfg, name, None)]:
        ways.append(f"smaller {', '.join(smaller)}")
    text = f"give {' or '.join(ways) or 'fewer or smaller images at a time'}, or a machine with more memory"
    return text + "; what was saved goes on, with --allow_config_change" * _training.saves


def loader_failure(text: str) -> str | None:
    """The sentence for what DataLoader raises, at any moment, when a loader process has died or cannot reach it."""
    if "Too many open files" in text:
        return f"too many open files for the loader processes; raise the limit (ulimit -n {2**16}), or --num_workers 0"
    if not (found := re.match(r"DataLoader worker \(pid\S* ([\d, ]+)\) (?:is )?(.+?)(?:\.|$)", text)):
        return None
    return (f"a loader process has died (pid {found[1]}: {found[2]}); give a lower --num_workers or the machine more "
            "memory, shared memory included (docker run --shm-size=8g): the same command continues from the last "
            "checkpoint")


def _is_closed(stream: Any) -> bool:
    """Has whoever read this stream, a pipe, gone?"""
    with contextlib.suppress(ValueError, AttributeError):  # a notebook's stream; no poll on Windows
        pipe = select.poll()
        pipe.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in pipe.poll(0))
    return False


def record_failure(code: int, text: str) -> None:
    """For the other processes: why this one ends. The first record stays."""
    if _failure_file:
        with contextlib.suppress(OSError), open(_failure_file[0], "x") as file:
            file.write(f"{code} process {rank()}: {text}")


def read_failure() -> tuple[int, str] | None:
    """(exit code, "ended because of process r: why") of the process that ended first, if it recorded it."""
    if not _failure_file or not _failure_file[0].exists():
        return None
    code, text = _failure_file[0].read_text().split(" ", 1)
    return int(code), f"ended because of {text}"


# Ctrl-C; cluster preemption; SIGUSR1 is not there on Windows.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
# The signals that this training has heard; the step after which all is saved, None once the next has begun; the flags
# of the script; is it a run with checkpoints?
_training = types.SimpleNamespace(signals=[], saved=None, cfg=None, saves=False)


@contextlib.contextmanager
def handling_signals(on_signal: Callable[[int, Any], None]) -> Iterator[None]:
    """What STOP_SIGNALS do in this block; in another thread than the main one Python cannot hear them. A Ctrl-C that
    was ignored, as that of a job in the background, still is."""
    heard = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else []
    heard = [n for n in heard if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == on_signal:  # a loop that failed may be left later than its program
                signal.signal(number, handler or signal.SIG_DFL)


def end_at_once(number: int, _: Any) -> None:
    """Outside training: a proposal build and an evaluation lose nothing that the same command does not make again."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(f"stopped by {signal.Signals(number).name}; what was saved before is untouched")


def until_signalled(steps: Iterable[int]) -> Iterator[int]:
    """The steps of a run. Meanwhile STOP_SIGNALS do not end the process: they make a checkpoint due at the end of the
    step (`save_due`), and rank 0 leaves when it is written (`save_checkpoint`), however long that takes; after it, at
    once. The other processes go on until they miss it: had they left first, its step would fail. What one of them hears
    alone (its machine is taken away) it leaves in --out for rank 0. A second Ctrl-C ends at once, too."""
    _training.signals.clear()

    def on_signal(number: int, _: Any) -> None:
        if number == signal.SIGINT and number in _training.signals:
            raise KeyboardInterrupt
        _training.signals.append(number)
        if rank() == 0:
            _stop_if_saved()
            name, again = signal.Signals(number).name, "; again: at once" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # print() must not be called while it runs
                os.write(2, f"\n{name}: ends when the running step is finished and saved{again}\n".encode())
        elif _failure_file:
            with contextlib.suppress(OSError):
                _failure_file[0].with_name("stop.txt").write_text(str(int(number)))

    with handling_signals(on_signal):
        try:
            for step in steps:
                _training.saved = None
                yield step
        finally:
            _training.saved = None
    if _training.signals and rank() == 0:
        raise Stopped(f"stopped by {signal.Signals(_training.signals[0]).name} after the last step, which is saved; "
                      "the same command continues")


def _stop_if_saved() -> None:
    if _training.saved is not None and _training.signals:
        raise Stopped(f"stopped by {signal.Signals(_training.signals[0]).name} after step {_training.saved}, which is "
                      "saved; the same command continues")


def save_due(done: int, total_steps: int, every: int) -> bool:
    """Is a checkpoint due after `done` steps?"""
    if _failure_file and world_size() > 1 and rank() == 0 and not _training.signals:
        with contextlib.suppress(OSError, ValueError):  # none; not yet written
            _training.signals.append(int(_failure_file[0].with_name("stop.txt").read_text()))
    return done % every == 0 or done == total_steps or bool(_training.signals)


def seed_step(seed: int, step: int) -> None:
    """All randomness inside a step (dropout, sampled regions) is a function of (seed, step, rank): a resumed run draws
    what the unbroken one did."""
    states = np.random.SeedSequence([seed, step, rank()]).generate_state(3, np.uint64).tolist()
    torch.manual_seed(states[0] >> 1)
    np.random.seed(states[1] >> 32)
    random.seed(states[2])


# ==== 4. Log and files ====


class Log:
    """`log.jsonl` in the output folder: one JSON line per logged step, rank 0 only.

    Keys: step, epoch, lr, loss, every loss term (averaged over processes), grad_norm, images_per_s (all processes),
    memory_gib, seconds. writer: a class like SummaryWriter, to write the numbers as TensorBoard events too.
    """

    def __init__(self, out: Path, resume_step: int, device: torch.device, writer: type | None = None):
        self.path, self.device = out / "log.jsonl", device
        self.events = writer(str(out / "tensorboard"), purge_step=resume_step) if writer and rank() == 0 else None
        self.start = self.last = time.perf_counter()
        if rank() == 0:
            lines = self.path.read_text().splitlines() if self.path.exists() and resume_step else []
            kept = [line + "\n" for line in lines if self.step_of(line) < resume_step]
            write_atomic(self.path, "".join(kept).encode())

    @staticmethod
    def step_of(line: str) -> float:
        """The step of a line; a line that a kill cut in two belongs to no finished step."""
        try:
            return json.loads(line)["step"]
        except json.JSONDecodeError:
            return math.inf

    def write(self, step: int, terms: dict[str, Tensor], images: int, **values: float) -> dict[str, float]:
        """terms: scalars of this process; images: how many the process saw since the last line."""
        stacked = torch.stack([t.detach().float() for t in terms.values()])
        stacked = all_reduce_sum(stacked) / world_size()
        now = time.perf_counter()
        line = {"step": step, **values, **dict(zip(terms, stacked.tolist())),
                "images_per_s": images * world_size() / (now - self.last),
                "memory_gib": peak_memory_gib(self.device), "seconds": now - self.start}
        self.last = now
        self.append(line)
        return line

    def append(self, line: dict[str, float]) -> None:
        """One line with its "step", on rank 0."""
        if rank() == 0:
            with writing(self.path), open(self.path, "a") as file:
                rounded = {k: (float(f"{v:.6g}") if math.isfinite(v) else None) if isinstance(v, float) else v
                           for k, v in line.items()}  # JSON has no inf, the gradient of a skipped step
                file.write(json.dumps(rounded) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that this line belongs to
        if self.events:
            with writing(self.path.with_name("tensorboard")):
                for name, value in line.items():
                    if name != "step":
                        self.events.add_scalar(name, value, line["step"])
                self.events.flush()


def tensorboard_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard: the package is not here; pip install tensorboard, or leave the flag out: "
                        "log.jsonl and curves.png hold the same numbers") from error
    return SummaryWriter


def duration(seconds: float) -> str:
    """For reading: 75 -> "75 seconds"; 700 -> "12 minutes"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class SkipCount:
    """Counts distinct unreadable files on each process; warns once each on stderr; more than `most` of `total` is a
    UserError."""

    def __init__(self, total: int, most: float = 0.01):
        self.total, self.most, self.seen = total, most, []

    def add(self, skipped: list[str]) -> None:
        """`skipped`: the "path: reason" entries of data.load_usable(); a file's reason is the same every time."""
        for entry in dict.fromkeys(skipped):
            if entry not in self.seen:
                self.seen.append(entry)
                print(f"warning: skipped {printable(entry)}", file=sys.stderr, flush=True)
        if len(self.seen) > self.most * self.total:
            raise UserError(f"{len(self.seen)} of {self.total} images cannot be read (more than {100 * self.most:g} %)"
                            f", the first: {'; '.join(self.seen[:3])}. Repair or remove them.")

    def report(self) -> None:
        """The last word of a run: how many files were skipped since it began or continued, over all processes (all of
        them call this)."""
        parts = [self.seen] * world_size()
        if world_size() > 1:
            dist.all_gather_object(parts, self.seen)
        if seen := sorted({entry for part in parts for entry in part}):
            shown = printable("; ".join(seen[:3])) + ("; ..." if len(seen) > 3 else "")
            print_rank0(f"skipped {len(seen)} of {self.total} images: {shown}")


_locks: dict[Path, int] = {}  # the lock files that this process holds, and their descriptors


def lock_folder(folder: Path) -> None:
    """Keep other processes from writing into this folder until unlock_folder or the end of this process; UserError,
    naming host and process, where one does. A restart by torchrun waits a minute for the attempt before to be gone.

    Assumes POSIX locks, which the system drops when a process dies (on NFS they hold between machines); on a file
    system without them (it is said) only processes of this machine are noticed. On Windows there is no lock.
    """
    path = folder.resolve() / "writer.lock"
    if fcntl is None or path in _locks:  # by a run before in this process
        return
    patience = time.monotonic() + (60 if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else 0)
    with writing(path):
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            holder = _try_lock(file, folder)
            if not holder and os.fstat(file).st_nlink:  # else unlock_folder has removed it meanwhile
                break
            os.close(file)
            if holder and time.monotonic() > patience:
                raise UserError(f"{folder} is being filled by another process ({printable(holder)}); wait until it has "
                                "ended, or give another --out")
            time.sleep(0.1)
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _locks[path] = file


def _try_lock(file: int, folder: Path) -> str:
    """Who holds it; "" = this process now does."""
    holder = os.read(file, 999).decode(errors="replace")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # belongs to this process; what it forks does not inherit it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return holder or "just begun"
        found = re.fullmatch(rf"process (\d+) on {re.escape(socket.gethostname())}", holder)
        if found and _is_alive(int(found[1])):
            return holder
        print_rank0(f"{folder} is on a file system without locks ({error.strerror}): see to it that no other machine "
                    "writes there meanwhile")
    return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return pid != os.getpid()


def unlock_folder(folder: Path) -> None:
    """The files of this process are written."""
    path = folder.resolve() / "writer.lock"
    if path in _locks:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # while it is held: nobody can have taken it
        os.close(_locks.pop(path))


def unlock_folders() -> None:
    for path in list(_locks):
        unlock_folder(path.parent)


# ==== 5. Checkpoints ====

# How numpy rebuilds what was pickled.
_ARRAY = np.zeros(1).__reduce__()[0]
_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
_SCALAR = np.float64(0).__reduce__()[0]


class ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers and numpy arrays, as detectron2's files are made of; whatever else a pickle asks for is an
    error and is not run."""

    ALLOWED = {"multiarray._reconstruct": _ARRAY, "numeric._frombuffer": _BUFFER, "multiarray.scalar": _SCALAR,
               "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype,
               "_codecs.encode": lambda text, _: text.encode("latin1"),
               "collections.OrderedDict": collections.OrderedDict}

    def find_class(self, module: str, name: str) -> Any:
        found = self.ALLOWED.get(f"{re.sub('^numpy[.]_?core[.]', '', module)}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not allowed")
        # a pickle can set attributes of what it names: of this function only
        return found if isinstance(found, type) else lambda *args: found(*args)


# Harmless containers that released files hold beside their tensors: argparse.Namespace (DETR family, SoCo), numpy's.
ALLOWED = [argparse.Namespace, np.dtype, *{type(np.dtype(t)) for t in "?bBhHiIlLqQefd"},
           *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


# How files begin that are easily taken for a checkpoint, and what they are.
OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, which stands for the file: fetch it with `git lfs pull`",
    **dict.fromkeys((b"<!doctype", b"<html"), "a web page: fetch the file itself, not the page about it"),
    b"<?xml": "an XML file (an error of the server?): fetch it again",
    b"{": "a JSON file, which has no tensors", b"\x89hdf": "an HDF5 file (Keras): save its weights from PyTorch",
    b"\x1f\x8b": "a gzip archive: unpack it first",
}


def _read_safetensors(path: Path, start: bytes) -> dict[str, Any] | None:
    """The tensors of a file in the safetensors format; None: it is none (eight bytes of length, then JSON)."""
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or not 2 <= length <= path.stat().st_size - 8:
        return None
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path}: is in the safetensors format: pip install safetensors (transformers brings it), or "
                        "save its tensors with torch.save") from error
    return load_file(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a PyTorch file, a safetensors file or a detectron2 pickle, read without running code from it.

    UserError: no such file; empty, cut or something else; a pickle that would run code; no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file" + (" (it is a folder)" if path.is_dir() else ""))
    if not path.stat().st_size:
        raise UserError(f"{path}: the file is empty")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
            file.seek(0)
            content = _read_safetensors(path, start)
            if content is None and start.startswith(b"\x80"):
                content = ArrayUnpickler(file, encoding="latin1").load()
        if not isinstance(content, dict):  # old PyTorch files start with a pickled number
            with torch.serialization.safe_globals(ALLOWED):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make a reader raise anything
        reason = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
        reason = reason.splitlines()[0]
        if isinstance(error, UserError):
            raise
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be read ({error.strerror or reason})") from error
        if what := next((what for mark, what in OTHER_FILES.items() if start.lstrip().lower().startswith(mark)), None):
            raise UserError(f"{path}: not a readable PyTorch checkpoint but {what}") from error
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path}: refused, because loading it would run code ({code[1]}); a file of tensors "
                            "(state_dict) needs none") from error
        raise UserError(f"{path}: not a readable PyTorch checkpoint: cut, damaged or something else "
                        f"({reason[:120]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, a checkpoint is a dict of tensors")
    return content


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, step: int, config: Any,
                    **extra: Any) -> None:
    """{"model", "optimizer", "step", "config", ...}: plain containers only, keys without `module.`, so that
    weights_only=True reads it.

    step = number of finished steps. Rank 0 writes; the file appears whole or not at all. Of last.pt the one before
    stays beside it as previous.pt, and a process that a signal has asked to stop ends here.
    """
    if rank() != 0:
        return
    state = {"model": getattr(model, "module", model).state_dict(),
             "optimizer": optimizer.state_dict() if optimizer else None,
             "step": step, "config": dataclasses.asdict(config), **extra}
    if optimizer and (scaler := loss_scaler(optimizer, getattr(config, "amp", "off")).state_dict()):  # of fp16
        state["scaler"] = scaler
    continues = path.name == "last.pt"
    with replacing(path, path.with_name("previous.pt") if continues else None) as file:
        torch.save(state, file)
    if continues:
        _training.saved = step
        _stop_if_saved()


def read_run(out: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint of a folder: last.pt or, if that is damaged (it is moved aside) or missing,
    previous.pt. None: there is neither."""
    damaged = []
    for path in (p for p in (out / "last.pt", out / "previous.pt") if p.exists()):
        try:
            with zipfile.ZipFile(path) as file:
                if part := file.testzip():  # checksums, which torch.load does not look at
                    raise UserError(f"{path}: damaged (checksum of {part})")
            state = read_checkpoint(path)
            break
        except (UserError, OSError, zipfile.BadZipFile) as error:
            damaged.append(str(error) if isinstance(error, UserError) else f"{path}: damaged ({error})")
    else:
        if damaged:
            raise UserError(f"{'; '.join(damaged)}. There is nothing to continue from: give another "
                            "--out, or remove the file to start anew")
        return None
    if damaged:
        with writing(out / "damaged.pt"):
            os.replace(out / "last.pt", out / "damaged.pt")  # it must not become the next previous.pt
        print_rank0(f"warning: {damaged[0]}; it is now damaged.pt, and {path.name} is used")
    return path, state


def run_length(values: dict[str, Any], steps_per_epoch: int) -> int:
    """Steps of a run with this configuration."""
    return values.get("steps") or values.get("iterations") or values["epochs"] * steps_per_epoch


def open_run(config: Any, script: str, data: str | None = None, world: int | None = None,
             steps_per_epoch: int | None = None) -> dict | None:
    """Make `--out` ready. Returns the checkpoint to continue from, or None for a new run; rank 0 decides which, for all
    processes. Its "changed" says how the configuration differs, "longer" whether the run has become longer.

    Refuses (UserError) a folder that holds a run of another script, another configuration or another data set, showing
    the difference; a longer run (LENGTH) is announced. script, data, world: what a checkpoint says of its run beside
    the configuration (Run.identity).
    """
    out = Path(config.out)
    open_folder(out)
    state = _read_run_on_all_processes(out)
    if state is None:
        return None
    if state.get("script") != script:
        raise UserError(f"{out} holds a run of {state.get('script')}.py; give {script}.py another --out")
    now = dataclasses.asdict(config)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}  # of knobs newer than the run
    before = defaults | state["config"]
    if "iterations" in before.keys() - now.keys():  # what finetune.py called `steps`
        before["steps"] = before.pop("iterations")
    changed = {k: f"{k}: {before.get(k)} -> {now.get(k)}{' (no effect: it says how a run starts)' * (k in START_ONLY)}"
               for k in sorted(now.keys() | before.keys()) if k not in RUN_ONLY and now.get(k) != before.get(k)}
    lengths = [run_length(values, steps_per_epoch) for values in (before, now)] if steps_per_epoch else [0, 0]
    state["longer"] = lengths[1] > lengths[0]
    longer = [changed.pop(k) for k in sorted(LENGTH & changed.keys())] if state["longer"] else []
    changed = list(changed.values())
    if data and state.get("data", data) != data:
        changed.append(f"data set: {state['data']} -> {data}")
    if changed and not config.allow_config_change:
        raise UserError(f"{out} holds a run with another configuration ({'; '.join(changed)}); "
                        "give another --out for a new run, or --allow_config_change to go on with the new values")
    state["changed"] = list(changed)
    if world and state.get("world", world) != world:
        changed.append(f"{world} processes rather than {state['world']}: the same batches in the same order, but other "
                       "dropout")
    difference = f", which becomes {lengths[1]} steps long ({'; '.join(longer)})" if longer else ""
    difference += f" with {'; '.join(changed)}" if changed else ""
    print_rank0(f"continuing the run in {out} at step {state['step']}{difference}")
    return state


def open_folder(out: Path) -> None:
    """Make --out and lock it (see lock_folder), rank 0 for all processes, which call this. UserError: it cannot."""
    problem = [None]
    if rank() == 0:
        try:
            with writing(f"--out {out}"):
                out.mkdir(parents=True, exist_ok=True)
                lock_folder(out)
                for name in ("ended.txt", "stop.txt"):  # of the run before
                    (out / name).unlink(missing_ok=True)
        except UserError as error:
            problem = [str(error)]
    if world_size() > 1:
        dist.broadcast_object_list(problem, 0)
    if problem[0]:
        raise UserError(problem[0])
    _failure_file[:] = [out / "ended.txt"]


def _read_run_on_all_processes(out: Path) -> dict | None:
    """read_run() on rank 0; the others read the file that it has chosen."""
    choice: list = [None, None, None]  # file, step, error
    state = None
    if rank() == 0:
        try:
            if found := read_run(out):
                path, state = found
                choice = [path.name, state.get("step"), None]
        except UserError as error:
            choice[2] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(choice, 0)
    name, step, problem = choice
    if problem:
        raise UserError(problem)
    if name and rank() != 0:
        state = read_checkpoint(out / name)
        if state.get("step") != step:
            raise UserError(f"{out / name} is at step {state.get('step')} here and at step {step} for process 0: --out "
                            "must be a folder they share")
    return state


def restore(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer, config: Any = None, *,
            target: nn.Module | None = None, average: nn.Module | None = None, sync_bn: bool = True) -> int:
    """Put a checkpoint of this very run back. Returns the number of finished steps.

    target: the frozen network that the run learns from, saved with it because the file of --backbone_weights may be
    another one by now. average: the moving average of the model. Refuses (UserError) another number of processes where
    trained BatchNorm has the statistics of each process, as wrap_model leaves it.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    local = any(p.requires_grad for m in norms for p in m.parameters(False))
    local = local and not (sync_bn and next(model.parameters()).is_cuda)
    before = state.get("world", world_size())
    if config and local and before != world_size() and not config.allow_config_change:
        raise UserError(f"{config.out} holds a run of {before} process(es), this one has {world_size()}: BatchNorm's "
                        "statistics are those of a process's share of the batch, so it would train differently. Start "
                        f"{before}, or give --allow_config_change to go on")
    try:
        getattr(model, "module", model).load_state_dict(state["model"])
        _restore_optimizer(state["optimizer"], optimizer)
        if "scaler" in state and getattr(config, "amp", "off") == "fp16":
            loss_scaler(optimizer, config.amp).load_state_dict(state["scaler"])
        if target is not None and "target" in state:
            target.load_state_dict(state["target"])
        if average is not None:
            average.load_state_dict(state.get("average", state["model"]))
    except (RuntimeError, ValueError, KeyError) as error:
        if not state.get("changed") or is_out_of_memory(error):  # the fault of no flag
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{config.out}: its checkpoint does not fit the model that these changes make "
                        f"({'; '.join(state['changed'])}); take back those of the model, or give another --out for a "
                        f"new run ({reason})") from error
    return state["step"]


def _restore_optimizer(saved: dict, optimizer: torch.optim.Optimizer) -> None:
    """The moments of each parameter. Rates, decay and the like are those of this run's flags, not of the file's.
    ValueError where the groups hold other parameters."""
    own = optimizer.state_dict()["param_groups"]
    before, now = ([group.get("names", len(group["params"])) for group in groups]
                   for groups in (saved["param_groups"], own))
    if before != now:
        raise ValueError("the optimizer has groups of other parameters")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


# ==== 6. Numbers that are not finite ====


MOST_SKIPPED = 30  # steps in a row: the loss's scale has fallen from 2**16 to 2**-14


class FiniteWatch:
    """Ends a run whose loss or gradient is not finite, naming the terms and the images (`name_of` their batch["index"])
    and leaving the batch in the output folder. The same command goes on from the last checkpoint and, as everything is
    seeded, arrives there again.

    A step's numbers are looked at when the next has been started, so that nothing waits for the device: `settle` before
    anything is written. skips: with --amp fp16 a step whose gradient is not finite has changed no weight
    (common.clip_and_step) and is counted; the run ends at MOST_SKIPPED in a row, or where such a step has left its mark
    on a buffer of `model`.
    """

    def __init__(self, out: Path, name_of: Callable[[int], str], skips: bool = False):
        self.out, self.name_of, self.skips = out, name_of, skips
        self.skipped = [0, 0]  # steps: in all, the last in a row
        self.model: nn.Module | None = None
        self.pending: tuple | None = None  # step, names, values, when they are copied, batches

    def check(self, step: int, terms: dict[str, Tensor], batches: list[dict]) -> None:
        """After a training step: its terms, which hold `loss` and `grad_norm`, and its micro-batches."""
        values, copied = torch.stack([value.detach().float() for value in terms.values()]), None
        if values.is_cuda:
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.settle()
        self.pending = (step, list(terms), values, copied, batches)

    def settle(self) -> None:
        """FloatingPointError if a number of the last step was not finite and the step not skipped."""
        if self.pending:
            (step, names, values, copied, batches), self.pending = self.pending, None
            if copied:
                copied.synchronize()
            bad = {name: value for name, value in zip(names, values.tolist()) if not math.isfinite(value)}
            reason = "not finite: " + ", ".join(f"{name} {value}" for name, value in bad.items())
            if not bad:
                self.skipped[1] = 0
            elif not self.skips or "grad_norm" not in bad:
                self.fail(step, reason, batches)
            else:
                self.skip(step, reason, batches)

    def skip(self, step: int, reason: str, batches: list[dict]) -> None:
        self.skipped = [count + 1 for count in self.skipped]
        if self.skipped[1] == MOST_SKIPPED:
            self.fail(step, f"{reason}, as the {MOST_SKIPPED - 1} steps before, which were skipped too", batches)
        for name, buffer in self.model.named_buffers() if self.model is not None else ():
            if not buffer.isfinite().all():
                self.fail(step, f"{reason}, and so is {name} now", batches)

    def fail(self, step: int, reason: str, batches: list[dict]) -> None:
        files = [self.name_of(int(i)) for batch in batches for i in batch["index"]]
        path = self.out / f"nonfinite-step{step}-rank{rank()}.pt"
        kept = f"its batch is kept in {path}"
        try:
            with replacing(path) as file:
                torch.save({"step": step, "error": reason, "files": files, "batches": batches}, file)
        except UserError as error:
            kept = f"its batch is not kept ({error})"
        shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        raise FloatingPointError(f"step {step}: {reason}; images of this process: {shown}; "
                                 f"{kept}, and the last checkpoint is untouched")


# ==== 7. Run ====


class Run:
    """One training run: what comes before its steps, between them and after them, the same in every script.

    cfg: a RunConfig; script: its name; source: what it trains on (len, key(i), fingerprint()); images: how many of them
    are trained on; summary: metrics -> the text printed at the end. `metrics` is not None where the run in --out was
    finished before: then there is nothing to do. UserError: see check_batch_size and open_run.
    """

    def __init__(self, cfg: RunConfig, script: str, source: Any, images: int, device: torch.device,
                 summary: Callable[[dict], str], **extra: Any):
        check_batch_size(images, cfg.batch_size, world_size(), cfg.accumulate)  # before anything is written
        self.cfg, self.images, self.device, self.summary, self.out = cfg, images, device, summary, Path(cfg.out)
        self.writer = tensorboard_writer() if cfg.tensorboard else None
        data = f"{len(source)} images, sha256 {source.fingerprint()[:16]}"
        self.identity = {"script": script, "data": data, "world": world_size()}
        self.extra = extra  # further entries of the checkpoint
        self.steps_per_epoch = images // cfg.batch_size
        self.state = open_run(cfg, **self.identity, steps_per_epoch=self.steps_per_epoch)
        self.start = self.done = self.saved = self.state["step"] if self.state else 0
        self.total_steps = min(self.length(), cfg.max_steps or sys.maxsize)
        self.metrics = self._metrics_of_finished_run()
        self.skipped, self.watch = SkipCount(len(source)), FiniteWatch(self.out, source.key, cfg.amp == "fp16")
        self.watch.skipped = list(self.state.get("skipped_steps", [0, 0])) if self.state else [0, 0]
        self.fallbacks = torch.tensor(float(self.state.get("fallbacks", 0)) if self.state else 0.0, device=device)
        self.counts_fallbacks = False  # do the script's batches say how many samples had to fall back?
        self.seen = 0  # images of this process since the last line of the log
        _training.cfg, _training.saves = cfg, True

    def length(self) -> int:
        """Steps of the whole run, --max_steps aside."""
        return run_length(vars(self.cfg), self.steps_per_epoch)

    @property
    def epoch_steps(self) -> float:
        """Steps of an epoch of the schedule: with --steps, of so many equal parts of the run as there are epochs."""
        return self.length() / self.cfg.epochs

    def _metrics_of_finished_run(self) -> dict | None:
        """Of a run that has come to its length, or has stopped early with the patience that it has now."""
        path = self.out / "metrics.json"
        metrics = json.loads(path.read_text()) if self.state and path.exists() else {}
        if not self.state or metrics.get("steps") != self.start:
            return None
        patience = metrics.get("stopped_early")
        stopped = bool(patience) and patience == getattr(self.cfg, "patience", None) and not self.state["longer"]
        if self.start < self.total_steps and not stopped:
            return None
        changes = "; nothing that was changed has an effect on it" if self.state["changed"] else ""
        print_rank0(f"this run is finished ({self.start} steps{changes})\n{self.summary(metrics)}")
        unlock_folder(self.out)
        return metrics

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, target: nn.Module | None = None,
                average: nn.Module | None = None, sync_bn: bool = True) -> None:
        """Put the checkpoint back, if there is one; from now on these are what is saved. See the function `restore`."""
        if self.state:
            restore(self.state, model, optimizer, self.cfg, target=target, average=average, sync_bn=sync_bn)
        self.model, self.optimizer, self.state = model, optimizer, None
        self.watch.model = model
        others = {"target": target, "average": average}
        self.extra |= {name: other.state_dict() for name, other in others.items() if other is not None}

    def steps(self, what: str = "images") -> Iterator[int]:
        """The steps that are left, each seeded; see until_signalled."""
        cfg, world = self.cfg, world_size()
        if cfg.backbone_weights == "random" and not getattr(cfg, "init_from", None):
            learns = getattr(cfg, "lr_backbone", 1) > 0  # SoCo, DUPR: always, with ordinary BatchNorm
            norm = "ordinary" if getattr(cfg, "backbone_norm", "bn") == "bn" else "frozen"
            how = f"it is trained, with {norm} BatchNorm" if learns else "and it is FROZEN"
            print_rank0(f"the backbone starts random: {how}")
        pieces = f"{world} processes x {cfg.accumulate} x {cfg.batch_size // (world * cfg.accumulate)}"
        print_rank0(f"{self.images} {what}, {self.steps_per_epoch} steps per epoch, steps {self.start}.."
                    f"{self.total_steps}; batch {cfg.batch_size} = {pieces}; {self.device}")
        parameters, buffers = list(self.model.parameters()), list(self.model.buffers())
        print_rank0(f"model: {sum(p.numel() for p in parameters):,} parameters, "
                    f"{sum(p.numel() for p in parameters if p.requires_grad):,} of them trained; "
                    f"{sum(t.nbytes for t in parameters + buffers) / 2**20:.1f} MiB")
        self.log_file = Log(self.out, self.start, self.device, self.writer)
        remaining = range(self.start, self.total_steps)
        self.bar = progress(remaining, initial=self.start, total=self.total_steps, desc="training")
        times = [time.perf_counter()]
        for step in until_signalled(self.bar):
            seed_step(cfg.seed, step)
            yield step
            self.done = step + 1
            if len(times) <= 10:
                times.append(time.perf_counter())
                if len(times) == 11 and self.done < self.total_steps:
                    self._print_estimate(times)

    def _print_estimate(self, times: list[float]) -> None:
        """times: the start, and the ends of the first ten steps, of which the first is slow."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            times[-1] = time.perf_counter()
        a_step, left = (times[-1] - times[1]) / (len(times) - 2), self.total_steps - self.done
        whole = times[-1] - times[0] + left * a_step
        print_rank0(f"{len(times) - 1} steps took {times[-1] - times[0]:.1f} s ({self.cfg.batch_size / a_step:.3g} "
                    f"images/s, peak memory {peak_memory_gib(self.device):.1f} GiB): {self.total_steps - self.start} "
                    f"steps take about {duration(whole)}")

    def next_batches(self, loader: Iterator[dict]) -> list[dict]:
        """The micro-batches of a step; counts their images, unreadable files, and samples that had to fall back."""
        batches = [next(loader) for _ in range(self.cfg.accumulate)]
        for batch in batches:
            self.skipped.add(batch["skipped"])
            self.seen += len(batch["index"])
        self.counts_fallbacks = "fallback" in batches[0]
        if self.counts_fallbacks:
            count = torch.tensor(float(sum(batch["fallback"] for batch in batches)))
            self.fallbacks = self.fallbacks + all_reduce_sum(to_device(count, self.device))
        return batches

    def check(self, step: int, terms: dict[str, Tensor], batches: list[dict]) -> None:
        """FloatingPointError, soon, if a number of this step is not finite; see FiniteWatch."""
        self.watch.check(step, terms, batches)

    def log(self, step: int, terms: dict[str, Tensor], *shown: str, **values: float) -> None:
        """A line of log.jsonl where one is due; the terms in `shown` stand in the progress bar too."""
        if step % self.cfg.log_every and step != self.total_steps - 1:
            return
        self.watch.settle()
        if self.counts_fallbacks:
            values["fallbacks"] = int(self.fallbacks)
        if self.watch.skips:
            values["skipped_steps"] = self.watch.skipped[0]
        line = self.log_file.write(step, terms, self.seen, epoch=step // self.steps_per_epoch, **values)
        self.bar.set_postfix({name.removeprefix("loss_"): f"{line[name]:.3f}" for name in shown})
        self.seen = 0

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Log and print the metrics of an evaluation after this step, and redraw curves.png."""
        epoch, rest = divmod(step + 1, self.steps_per_epoch)
        self.log_file.append({"step": step, "epoch": epoch, **metrics})
        print_rank0(f"step {step + 1}: " * bool(rest) + f"epoch {epoch}: " * (not rest)
                    + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
        self.draw()

    def probe(self, step: int, measure: Callable[[nn.Module], dict[str, float]]) -> None:
        """Log what `measure` finds the model to have learned, after the first step and every --probe_every. It must
        draw from generators of its own; the model's mode comes back, and the rate of images leaves its time out."""
        every = self.cfg.probe_every
        if every and (step == 0 or (step + 1) % every == 0):
            self.watch.settle()
            start, training = time.perf_counter(), self.model.training
            broadcast_buffers(self.model)
            found = measure(self.model)
            self.model.train(training)
            self.evaluated(step, {k: v for k, v in found.items() if v == v})
            self.log_file.last += time.perf_counter() - start

    def draw(self) -> None:
        """curves.png; a run does not end for want of it."""
        if rank() == 0:
            try:
                curves.draw_run(self.out)
            except UserError as error:
                print_rank0(f"warning: {error}")

    def save(self, step: int, again: bool = False) -> None:
        """last.pt after this step where one is due; `again`: in any case, as before an evaluation between two steps, in
        which a signal then ends the run at once."""
        due = save_due(step + 1, self.total_steps, self.cfg.save_every) and _training.saved != step + 1
        if again or due:
            self.watch.settle()
            self.saved = step + 1
            counts = {"fallbacks": int(self.fallbacks)} if self.counts_fallbacks else {}
            counts |= {"skipped_steps": self.watch.skipped} if self.watch.skips else {}
            save_checkpoint(self.out / "last.pt", self.model, self.optimizer, step + 1, self.cfg, **self.identity,
                            **self.extra, **counts)

    def end(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write metrics.json and print the summary and what was skipped. All processes call it; returns the metrics.

        A run that its metrics call "stopped_early" (its patience, in evaluations) is finished all the same.
        """
        metrics = {"steps": self.done} | metrics
        self.draw()
        finish(self.out, metrics, self.summary(metrics))
        self.skipped.report()
        if self.watch.skipped[0]:
            print_rank0(f"{self.watch.skipped[0]} of {self.done} steps were skipped: their gradient overflowed fp16")
        return metrics


def finish(out: Path, metrics: dict[str, Any], text: str) -> None:
    """metrics.json, the text, and the names of what lies in the output folder."""
    if rank() == 0:
        write_json(out / "metrics.json", metrics)
        unlock_folder(out)
        names = ("best.pt", "last.pt", "log.jsonl", "metrics.json", "detections.json", "predictions.png", "curves.png",
                 "pr.png")
        print_rank0(f"{text}\nwrote {out}/" + ", ".join(name for name in names if (out / name).exists()))
    barrier()
