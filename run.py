"""A run's life: printing, command line, exit codes and signals, log, checkpoints and resume,
the watch for numbers that are not finite."""
from __future__ import annotations

# first: it tells OpenMP how to wait before torch is loaded
from common import UserError, all_reduce_sum, rank, world_size

import argparse
import collections
import contextlib
import dataclasses
import inspect
import json
import math
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
import traceback
import types
import typing
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

# ==== Printing ========================================================================================================


def printable(text: str) -> str:
    """One line without control codes: file names and annotations from elsewhere may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def progress(iterable, **kwargs) -> tqdm:
    """A progress bar on rank 0; without a terminal it prints a line every ten seconds rather than every redraw."""
    return tqdm(iterable, disable=rank() != 0, mininterval=0.5 if sys.stderr.isatty() else 10,
                dynamic_ncols=True, **kwargs)


def say(text: str) -> None:
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


# ==== Command line ====================================================================================================

# What may differ between a run and its continuation: it changes neither the data nor the arithmetic.
RUN_ONLY = {"preset", "out", "max_steps", "save_every", "log_every", "num_workers", "device", "allow_config_change",
            "data_root", "eval_every"}
AT_LEAST_ONE = {"batch_size", "accumulate", "epochs", "max_prop", "num_queries", "num_feature_levels", "enc_layers",
                "dec_layers", "log_every", "save_every", "max_steps", "num_patches", "num_regions", "queue_size",
                "queued_patches", "logit_rows", "embedding_dim", "num_boxes", "iterations", "anchor_size",
                "proposals_per_image", "rois_per_image", "fpn_channels", "head_dim"}


def _knob_help(config_class: type) -> dict[str, str]:
    """The comment behind each field of a configuration class: what the reader reads is what --help prints."""
    pattern = re.compile(r"^\s+(\w+)\s*:[^#]*=[^#]*#\s*(.+?)\s*$", re.M)
    return dict(pattern.findall(inspect.getsource(config_class)))


def _add_knob(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, text: str) -> None:
    args = typing.get_args(hint)
    optional = type(None) in args
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in args if a is not type(None))
        args = typing.get_args(hint)
    text = f"{text} (default: {default})".replace("%", "%%")
    flag = f"--{name}"
    if hint is bool:
        parser.add_argument(flag, nargs="?", const=True, default=argparse.SUPPRESS, type=_boolean,
                            metavar="BOOL", help=text)
        parser.add_argument(f"--no_{name}", dest=name, action="store_false",
                            default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    elif typing.get_origin(hint) is Literal:
        parser.add_argument(flag, choices=args, type=type(args[0]), default=argparse.SUPPRESS, help=text)
    elif typing.get_origin(hint) is tuple:
        parser.add_argument(flag, nargs="+", type=args[0], default=argparse.SUPPRESS,
                            metavar=args[0].__name__.upper(), help=text)
    else:
        convert = (lambda s, t=hint: None if s.lower() == "none" else t(s)) if optional else hint
        parser.add_argument(flag, type=convert, default=argparse.SUPPRESS, metavar=hint.__name__.upper(), help=text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def parse_config(config_class: type, presets: dict[str, dict], argv: list[str] | None, *, script: str, description: str,
                 by_data: Callable[[dict], dict] | None = None) -> Any:
    """Command line -> config dataclass. Precedence: default < data set's recipe (`by_data`) < preset
    < flag (decisions.md, Recipes).

    Flags spell the field's name (hyphens are accepted); the comment behind a field is its help text.
    """
    hints = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    parser = argparse.ArgumentParser(prog=f"{script}.py", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", choices=sorted(presets), default=None,
                        help="a set of values that differ from the defaults")
    texts = _knob_help(config_class)
    for name, field in fields.items():
        if name != "preset":
            _add_knob(parser, name, hints[name], field.default, texts.get(name, ""))
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m.group()[2:].replace("-", "_"), a) for a in argv]
    flags = vars(parser.parse_args(argv))
    preset = presets.get(flags["preset"], {})
    chosen = {name: field.default for name, field in fields.items()} | preset | flags
    values = ({name: field.default for name, field in fields.items()}
              | (by_data(chosen) if by_data else {}) | preset | flags)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name in AT_LEAST_ONE & values.keys():
        if values[name] is not None and values[name] < 1:
            raise UserError(f"--{name} {values[name]}: must be at least 1")
    if "nheads" in values and (values["hidden_dim"] % values["nheads"] or values["hidden_dim"] % 32):
        raise UserError(f"--hidden_dim {values['hidden_dim']} with "
                        f"--nheads {values['nheads']}: the width must be a multiple of the heads and of 32")
    if "crop_range" in values and not (len(values["crop_range"]) == 2
                                       and values["crop_range"][0] <= values["crop_range"][1]):
        raise UserError(f"--crop_range {' '.join(map(str, values['crop_range']))}: "
                        "give the smallest and the largest side, in this order")
    if values["out"] is None:
        values["out"] = f"out/{script}-{values['preset'] or Path(values['data']).stem}"
    return config_class(**values)


# ==== Exit codes and signals ==========================================================================================

EXIT_NOT_FINITE, EXIT_STOPPED = 3, 75                     # 75: EX_TEMPFAIL of sysexits.h, "try again later"


def cli(main: Callable[[], Any]) -> None:
    """Run a script's main() and turn how it ended into an exit code: 2 and one line on stderr, bad input; 3 and one
    line, a number is not finite; 75, stopped by SIGTERM or SIGUSR1 with everything saved;
    1 and a traceback, our own fault.

    One of several processes leaves word why it ended; the others, whose collectives then fail,
    repeat it and end with the same code.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # no name that a file can have may end a run when it is printed
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except UserError as error:
        code, text = 2, str(error)
    except FloatingPointError as error:
        code, text = EXIT_NOT_FINITE, str(error)
    except KeyboardInterrupt:
        code, text = 130, ""
    except SystemExit as error:
        code, text = error.code, "it was asked to stop" if error.code == EXIT_STOPPED else ""
    except Exception as error:
        if world_size() == 1:
            raise
        word = read_word() if isinstance(error, RuntimeError) else None  # RuntimeError: what a failed collective raises
        if word is None:
            traceback.print_exc()
        code, text = word or (1, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        if word is None and ("gloo" in text or isinstance(error, dist.DistError)):
            text = f"another process died, or kept this one waiting for more than PROCESS_TIMEOUT seconds ({text})"
    if text and code != EXIT_STOPPED:
        print(f"error{f' (process {rank()})' if rank() else ''}: {printable(text)}", file=sys.stderr, flush=True)
    if world_size() > 1:
        leave_word(code, text)
        sys.stdout.flush()
        os._exit(code)  # taking leave properly would wait for the others, who wait for this one
    sys.exit(code)


_word: list[Path] = []                                    # where: in the output folder (open_run)


def leave_word(code: int, text: str) -> None:
    """For the other processes: why this one ends. The first word stays."""
    if _word:
        with contextlib.suppress(OSError), open(_word[0], "x") as file:
            file.write(f"{code} process {rank()}: {text}")


def read_word() -> tuple[int, str] | None:
    """(exit code, "ended because of process r: why") of the process that ended first, if it said so."""
    if not _word or not _word[0].exists():
        return None
    code, text = _word[0].read_text().split(" ", 1)
    return int(code), f"ended because of {text}"


# Cluster preemption; SIGUSR1 is not there on Windows.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_stop_asked: list[int] = []


def until_stopped(steps: Iterable[int]) -> Iterable[int]:
    """The steps of a run. Meanwhile SIGTERM and SIGUSR1 do not end the process: they make a checkpoint due at the end
    of the step (`save_due`), and rank 0 leaves when it is written (`save_checkpoint`). The other processes go on until
    they miss it: had they left first, its step would fail."""
    _stop_asked.clear()
    heard = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else []

    def ask(number: int, _: Any) -> None:
        _stop_asked.append(number)
        if rank() == 0 and hasattr(signal, "alarm"):
            signal.alarm(300)  # ends a process that no longer gets to the end of its step

    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield from steps
    finally:
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if _stop_asked and rank() == 0:                                          # after the last step was saved
        sys.exit(EXIT_STOPPED)


def save_due(done: int, total_steps: int, every: int) -> bool:
    """Is a checkpoint due after `done` steps?"""
    return done % every == 0 or done == total_steps or bool(_stop_asked)


def seed_step(seed: int, step: int) -> None:
    """All randomness inside a step (dropout, sampled regions) is a function of (seed, step, rank):
    a resumed run draws what the unbroken one did."""
    states = np.random.SeedSequence([seed, step, rank()]).generate_state(3, np.uint64).tolist()
    torch.manual_seed(states[0] >> 1)
    np.random.seed(states[1] >> 32)
    random.seed(states[2])


# ==== Log =============================================================================================================


class Log:
    """`log.jsonl` in the output folder: one JSON line per logged step, rank 0 only.

    Keys: step, epoch, lr, loss, every loss term (averaged over processes), grad_norm,
    images_per_s (all processes), memory_gib, seconds.
    """

    def __init__(self, out: Path, resume_step: int, device: torch.device):
        self.path, self.device = out / "log.jsonl", device
        self.start = self.last = time.perf_counter()
        if rank() == 0:
            lines = self.path.read_text().splitlines() if self.path.exists() and resume_step else []
            write_atomic(self.path, "".join(line + "\n" for line in lines if self.step_of(line) < resume_step).encode())

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
            with open(self.path, "a") as file:
                file.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()})
                           + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that this line belongs to


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource                                    # absent on Windows
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to disk, rename:
    a reader sees the old file or the new one, never half of one."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None):
    """A file to write, which takes the place of `path` when it is whole and on the disk;
    what was there before is kept as `previous`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)                                    # the disk may be full
        raise
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)
    if os.name == "posix":                                                   # the names too, not the contents alone
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


# ==== Checkpoints =====================================================================================================

# How numpy rebuilds what was pickled.
_ARRAY, _BUFFER, _SCALAR = np.zeros(1).__reduce__()[0], np.zeros(1).__reduce_ex__(5)[0], np.float64(0).__reduce__()[0]


class ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers and numpy arrays, as detectron2's files are made of; whatever else a pickle asks for
    is an error and is not run."""

    ALLOWED = {"multiarray._reconstruct": _ARRAY, "numeric._frombuffer": _BUFFER,
               "multiarray.scalar": _SCALAR, "numpy.ndarray": np.ndarray,
               "numpy.dtype": np.dtype, "_codecs.encode": lambda text, _: text.encode("latin1"),
               "collections.OrderedDict": collections.OrderedDict}

    def find_class(self, module: str, name: str) -> Any:
        found = self.ALLOWED.get(f"{re.sub('^numpy[.]_?core[.]', '', module)}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not allowed")
        # a pickle can set attributes of what it names: of this one only
        return found if isinstance(found, type) else lambda *args: found(*args)


# Harmless containers that released files hold beside their tensors:
# argparse.Namespace (DETR family, SoCo), numpy's numbers.
ALLOWED = [argparse.Namespace, np.dtype, *{type(np.dtype(t)) for t in "?bBhHiIlLqQefd"},
           *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a PyTorch file or of a detectron2 pickle, read without running code from it.

    UserError: no such file; empty, cut or something else; a pickle that would run code; no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file" + (" (it is a folder)" if path.is_dir() else ""))
    if not path.stat().st_size:
        raise UserError(f"{path}: the file is empty")
    try:
        with open(path, "rb") as file:
            content = (ArrayUnpickler(file, encoding="latin1").load()
                       if file.read(1) == b"\x80" and not file.seek(0) else None)
        if not isinstance(content, dict):  # old PyTorch files start with a pickled number
            with torch.serialization.safe_globals(ALLOWED):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make a reader raise anything
        reason = (str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be read ({error.strerror or reason})") from error
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path}: refused, because loading it would run code ({code[1]}); "
                            "a file of tensors (state_dict) needs none") from error
        raise UserError(f"{path}: not a readable PyTorch checkpoint: cut, "
                        f"damaged or something else ({reason[:120]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, a checkpoint is a dict of tensors")
    return content


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, step: int,
                    config: Any, **extra: Any) -> None:
    """{"model", "optimizer", "step", "config", ...}: plain containers only, keys without `module.`,
    so that weights_only=True reads it.

    step = number of finished steps. Rank 0 writes; the file appears whole or not at all, and the one before stays
    beside it as previous.pt. A process that a signal has asked to stop ends here.
    """
    if rank() != 0:
        return
    state = {"model": getattr(model, "module", model).state_dict(),
             "optimizer": optimizer.state_dict() if optimizer else None,
             "step": step, "config": dataclasses.asdict(config), **extra}
    try:
        with replacing(path, path.with_name("previous.pt")) as file:
            torch.save(state, file)
    except OSError as error:
        raise UserError(f"{path}: step {step} cannot be saved ({error.strerror or error}); "
                        "the checkpoint before is untouched. Make room and start the same command again") from error
    if _stop_asked:
        say(f"stopped by {signal.Signals(_stop_asked[0]).name} after step {step}, which is saved; "
            "the same command continues")
        sys.exit(EXIT_STOPPED)


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
        os.replace(out / "last.pt", out / "damaged.pt")                      # it must not become the next previous.pt
        say(f"warning: {damaged[0]}; it is now damaged.pt, and {path.name} is used")
    return path, state


def identity(script: str, images: int, fingerprint: str) -> dict[str, Any]:
    """What a checkpoint says of its run beside the configuration; `fingerprint`: a hash of the list of images."""
    return {"script": script, "data": f"{images} images, sha256 {fingerprint[:16]}", "world": world_size()}


def open_run(config: Any, script: str, data: str | None = None, world: int | None = None) -> dict | None:
    """Make `--out` ready. Returns the checkpoint to continue from, or None for a new run;
    rank 0 decides which, for all processes.

    Refuses (UserError) a folder that holds a run of another script, another configuration or another data
    set, showing the difference.
    script, data, world: see `identity`.
    """
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make this folder ({error.strerror}); give another one") from error
    choice: list = [None, None, None]                                        # file, step, error
    state = None
    _word[:] = [out / "ended.txt"]
    if rank() == 0:
        _word[0].unlink(missing_ok=True)
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
    if name is None:
        return None
    if rank() != 0:
        state = read_checkpoint(out / name)
        if state.get("step") != step:
            raise UserError(f"{out / name} is at step {state.get('step')} here and at step {step} for process 0: "
                            "--out must be a folder they share")
    if state.get("script") != script:
        raise UserError(f"{out} holds a run of {state.get('script')}.py; give {script}.py another --out")
    now, before = dataclasses.asdict(config), state["config"]
    changed = [f"{k}: {before.get(k)} -> {now.get(k)}" for k in sorted(now.keys() | before.keys())
               if k not in RUN_ONLY and now.get(k) != before.get(k)]
    if data and state.get("data", data) != data:
        changed.append(f"data set: {state['data']} -> {data}")
    if changed and not config.allow_config_change:
        raise UserError(f"{out} holds a run with another configuration ({'; '.join(changed)}); "
                        "give another --out for a new run, or --allow_config_change to go on with the new values")
    if world and state.get("world", world) != world:
        changed.append(f"{world} processes rather than {state['world']}: "
                       "the same batches in the same order, but other dropout")
    say(f"continuing the run in {out} at step {state['step']}" + (f" with {'; '.join(changed)}" if changed else ""))
    return state


def restore(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer, config: Any = None, *,
            target: nn.Module | None = None, sync_bn: bool = True) -> int:
    """Put a checkpoint of this very run back. Returns the number of finished steps.

    target: the frozen network that the run learns from, saved with it because the file of --backbone_weights
    may be another one by now.
    Refuses (UserError) another number of processes where trained BatchNorm has the statistics of each
    process, as wrap_model leaves it.
    """
    local = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in m.parameters(False))
                for m in model.modules())
    local = local and not (sync_bn and next(model.parameters()).is_cuda)
    before = state.get("world", world_size())
    if config and local and before != world_size() and not config.allow_config_change:
        raise UserError(f"{config.out} holds a run of {before} process(es), this one has {world_size()}: "
                        "BatchNorm's statistics are those of a process's share of the batch, "
                        f"so it would train differently. Start {before}, or give --allow_config_change to go on")
    getattr(model, "module", model).load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if target is not None and "target" in state:
        target.load_state_dict(state["target"])
    return state["step"]


def finished(out: Path, state: dict | None, total_steps: int) -> dict | None:
    """The metrics of a run that has nothing left to do, else None."""
    metrics = json.loads((out / "metrics.json").read_text()) if state and (out / "metrics.json").exists() else {}
    if not state or state["step"] < total_steps or metrics.get("steps") != state["step"]:
        return None
    say(f"this run is finished ({state['step']} steps)")
    return metrics


def tell_plan(cfg: Any, images: int, what: str, steps_per_epoch: int, start: int, total_steps: int,
              device: torch.device) -> None:
    """One line on what is about to run; another one on a backbone that starts without weights."""
    if cfg.backbone_weights == "random" and not getattr(cfg, "init_from", None):
        learns, norm = getattr(cfg, "lr_backbone", 1) > 0, getattr(cfg, "backbone_norm", "bn")  # SoCo, DUPR: always, bn
        say("the backbone starts random: " + ("it is trained, with ordinary BatchNorm" if learns and norm == "bn" else
                                              "it is trained, with frozen BatchNorm" if learns else "and it is FROZEN"))
    pieces = world_size() * cfg.accumulate
    say(f"{images} {what}, {steps_per_epoch} steps per epoch, steps {start}..{total_steps}; "
        f"batch {cfg.batch_size} = {world_size()} processes x {cfg.accumulate} x {cfg.batch_size // pieces}; {device}")


# ==== Numbers that are not finite =====================================================================================


class FiniteWatch:
    """Ends a run whose loss or gradient is not finite, naming the terms and the images (`name_of` their batch["index"])
    and leaving the batch in the output folder. The same command goes on from the last checkpoint and, as everything is
    seeded, arrives there again.

    A step's numbers are looked at when the next has been started, so that nothing waits for the device:
    `settle` before anything is written.
    """

    def __init__(self, out: Path, name_of: Callable[[int], str]):
        self.out, self.name_of = out, name_of
        self.pending: tuple | None = None  # step, names, values, when they are copied, batches

    @contextlib.contextmanager
    def step(self, step: int, batches: list[dict]):
        """Around a training step; give its terms, which hold `loss` and `grad_norm`,
        to the function that this yields."""
        terms: dict[str, Tensor] = {}
        try:
            yield terms.update
        except FloatingPointError as error:
            self.settle()                                                    # an earlier step's fault comes first
            self.fail(step, str(error), batches, error)
        values, copied = torch.stack([value.detach().float() for value in terms.values()]), None
        if values.is_cuda:
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.settle()
        self.pending = (step, list(terms), values, copied, batches)

    def settle(self) -> None:
        """FloatingPointError if a number of the last step was not finite."""
        if self.pending:
            (step, names, values, copied, batches), self.pending = self.pending, None
            if copied:
                copied.synchronize()
            if bad := [f"{name} {value}" for name, value in zip(names, values.tolist()) if not math.isfinite(value)]:
                self.fail(step, "not finite: " + ", ".join(bad), batches)

    def fail(self, step: int, reason: str, batches: list[dict], cause: Exception | None = None) -> None:
        files = [self.name_of(int(i)) for batch in batches for i in batch["index"]]
        path = self.out / f"nonfinite-step{step}-rank{rank()}.pt"
        with replacing(path) as file:
            torch.save({"step": step, "error": reason, "files": files, "batches": batches}, file)
        shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        raise FloatingPointError(f"step {step}: {reason}; images of this process: {shown}; "
                                 f"its batch is kept in {path}, and the last checkpoint is untouched") from cause
