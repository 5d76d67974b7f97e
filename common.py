"""What a pretraining method is made of: command line, processes, checkpoints, backbone, DETR and R-CNN family, matching, losses, schedules.

Shape legend, used in every file. B images, Q object queries, C classes, D channels, L feature levels, P sampling points per level,
M attention heads, S = sum over levels of H_l * W_l, n boxes of one image. Batch first everywhere.
Box formats: `boxes_xyxy` [n, 4] pixels; `boxes` / `pred_boxes` [..., 4] (cx, cy, w, h) as fractions of the image; masks: True = padding.
A target is a dict {"labels": int64 [n], "boxes": float32 [n, 4] cxcywh in 0..1, ...}.

Module names follow the released DETR (Carion et al., ECCV 2020, arXiv 2005.12872), Conditional DETR (Meng et al., ICCV 2021, arXiv 2108.06152) and
Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159), so that their checkpoints load by name.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import inspect
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import traceback
import types
import typing
import urllib.error
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable, Literal

# Read when torch is loaded: threads must not spin for long on cores that the loader needs; huge pages for large tensors (a DETReg step on CPU: -8 %).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import scipy.sparse
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_convert, generalized_box_iou, roi_align, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from tqdm import tqdm

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")        # of dimensions of length 1, where strides mean nothing
try:
    import deformops.registry                             # optional: see deformable_attention_for
except ImportError:
    deformops = None


# ==== Command line =================================================================================================

class UserError(Exception):
    """Bad input. The message names what was wrong, where, and what to do; a script prints it as one line and exits with 2."""


def printable(text: str) -> str:
    """One line without control codes: file names and annotations from elsewhere may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


EXIT_NOT_FINITE, EXIT_STOPPED = 3, 75                     # 75: EX_TEMPFAIL of sysexits.h, "try again later"


def cli(main: Callable[[], Any]) -> None:
    """Run a script's main() and turn how it ended into an exit code: 2 and one line on stderr, bad input; 3 and one line, a number is not finite;
    75, stopped by SIGTERM or SIGUSR1 with everything saved; 1 and a traceback, our own fault.

    One of several processes leaves word why it ended; the others, whose collectives then fail, repeat it and end with the same code.
    """
    sys.stdout.reconfigure(errors="backslashreplace")      # no name that a file can have may end a run when it is printed
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
        word = read_word() if isinstance(error, RuntimeError) else None      # RuntimeError: what a failed collective raises
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
        os._exit(code)                                                       # taking leave properly would wait for the others, who wait for this one
    sys.exit(code)


# What may differ between a run and its continuation: it changes neither the data nor the arithmetic.
RUN_ONLY = {"preset", "out", "max_steps", "save_every", "log_every", "num_workers", "device", "allow_config_change", "data_root", "eval_every"}

AT_LEAST_ONE = {"batch_size", "accumulate", "epochs", "max_prop", "num_queries", "num_feature_levels", "enc_layers",
                "dec_layers", "log_every", "save_every", "max_steps", "num_patches", "num_regions", "queue_size", "queued_patches", "logit_rows",
                "embedding_dim", "num_boxes", "iterations", "anchor_size", "proposals_per_image", "rois_per_image", "fpn_channels", "head_dim"}


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
        parser.add_argument(flag, nargs="?", const=True, default=argparse.SUPPRESS, type=_boolean, metavar="BOOL", help=text)
        parser.add_argument(f"--no_{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    elif typing.get_origin(hint) is Literal:
        parser.add_argument(flag, choices=args, type=type(args[0]), default=argparse.SUPPRESS, help=text)
    elif typing.get_origin(hint) is tuple:
        parser.add_argument(flag, nargs="+", type=args[0], default=argparse.SUPPRESS, metavar=args[0].__name__.upper(), help=text)
    else:
        convert = (lambda s, t=hint: None if s.lower() == "none" else t(s)) if optional else hint
        parser.add_argument(flag, type=convert, default=argparse.SUPPRESS, metavar=hint.__name__.upper(), help=text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def parse_config(config_class: type, presets: dict[str, dict], argv: list[str] | None, *, script: str, description: str,
                 by_data: Callable[[dict], dict] | None = None) -> Any:
    """Command line -> config dataclass. Precedence: default < data set's recipe (`by_data`) < preset < flag (decisions.md, Recipes).

    Flags spell the field's name (hyphens are accepted); the comment behind a field is its help text.
    """
    hints = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    parser = argparse.ArgumentParser(prog=f"{script}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--preset", choices=sorted(presets), default=None, help="a set of values that differ from the defaults")
    texts = _knob_help(config_class)
    for name, field in fields.items():
        if name != "preset":
            _add_knob(parser, name, hints[name], field.default, texts.get(name, ""))
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m.group()[2:].replace("-", "_"), a) for a in argv]
    flags = vars(parser.parse_args(argv))
    preset = presets.get(flags["preset"], {})
    chosen = {name: field.default for name, field in fields.items()} | preset | flags
    values = {name: field.default for name, field in fields.items()} | (by_data(chosen) if by_data else {}) | preset | flags
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name in AT_LEAST_ONE & values.keys():
        if values[name] is not None and values[name] < 1:
            raise UserError(f"--{name} {values[name]}: must be at least 1")
    if "nheads" in values and (values["hidden_dim"] % values["nheads"] or values["hidden_dim"] % 32):
        raise UserError(f"--hidden_dim {values['hidden_dim']} with --nheads {values['nheads']}: the width must be a multiple of the heads and of 32")
    if "crop_range" in values and not (len(values["crop_range"]) == 2 and values["crop_range"][0] <= values["crop_range"][1]):
        raise UserError(f"--crop_range {' '.join(map(str, values['crop_range']))}: give the smallest and the largest side, in this order")
    if values["out"] is None:
        values["out"] = f"out/{script}-{values['preset'] or Path(values['data']).stem}"
    return config_class(**values)


# ==== Processes ====================================================================================================

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def setup_distributed(device: str = "auto") -> torch.device:
    """Join the processes torchrun started (NCCL on CUDA, gloo on CPU); a plain `python script.py` is the same path with one process.

    A process waits at most $PROCESS_TIMEOUT seconds for the others, 30 minutes by default.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this PyTorch sees no CUDA device; use --device cpu")
    if "RANK" in os.environ and not dist.is_initialized():
        try:
            timeout = datetime.timedelta(seconds=float(os.environ.get("PROCESS_TIMEOUT", 1800)))
        except ValueError as error:
            raise UserError(f"PROCESS_TIMEOUT={os.environ['PROCESS_TIMEOUT']}: give a number of seconds") from error
        store, number, count = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:   # a restart by torchrun finds the addresses of the attempt before in it
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=store, rank=number, world_size=count, timeout=timeout)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return torch.device(device)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over processes, on a copy and without gradient (a normaliser or a log value, never part of the graph)."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def share_buffers(model: nn.Module) -> None:
    """Every process takes rank 0's buffers, the checkpoint's, before it measures: BatchNorm's statistics may be a process's own. Weights agree."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


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


def wrap_model(model: nn.Module, device: torch.device, *, sync_bn: bool = True, compiled: bool = False) -> nn.Module:
    """DistributedDataParallel at world size > 1, after turning trained BatchNorm into SyncBatchNorm where CUDA is (it raises on CPU).

    sync_bn False: BatchNorm keeps the statistics of each process. Buffers are never sent around: those that must agree are computed alike.
    compiled: the layers of the transformer and the blocks of a ResNet whose norms learn, by torch.compile, once for all that are alike and for images
    of any size.
    """
    if world_size() > 1 and device.type == "cuda" and sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules() if compiled else ():
        if isinstance(module, (DETREncoderLayer, ConditionalDecoderLayer, DeformableEncoderLayer, DeformableDecoderLayer, BasicBlock, Bottleneck)):
            module.compile(dynamic=True)
    if world_size() == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel
    buffers = next(k for k in ("forward_sync_buffers", "broadcast_buffers") if k in inspect.signature(ddp).parameters)  # renamed in torch 2.15
    return ddp(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True, **{buffers: False})


def gradient_sync(model: nn.Module, last_micro_batch: bool):
    """Context of one micro-batch's backward: processes average gradients only in the last one of an accumulated batch."""
    return contextlib.nullcontext() if last_micro_batch or world_size() == 1 else model.no_sync()


def autocast(device: torch.device, amp: str):
    """bf16 needs no loss scaling; boxes, sampling locations, matching and losses stay fp32 inside (practice.md 3.3)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


@functools.cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """A few numbers on the device. Copying waits for all that it has to do: so once, not in every step."""
    return torch.tensor(values, device=device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor made on the host, to the device, without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def seed_step(seed: int, step: int) -> None:
    """All randomness inside a step (dropout, sampled regions) is a function of (seed, step, rank): a resumed run draws what the unbroken one did."""
    states = np.random.SeedSequence([seed, step, rank()]).generate_state(3, np.uint64).tolist()
    torch.manual_seed(states[0] >> 1)
    np.random.seed(states[1] >> 32)
    random.seed(states[2])


# Cluster preemption; SIGUSR1 is not there on Windows.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_stop_asked: list[int] = []


def until_stopped(steps: Iterable[int]) -> Iterable[int]:
    """The steps of a run. Meanwhile SIGTERM and SIGUSR1 do not end the process: they make a checkpoint due at the end of the step (`save_due`), and
    rank 0 leaves when it is written (`save_checkpoint`). The other processes go on until they miss it: had they left first, its step would fail."""
    _stop_asked.clear()
    heard = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else []

    def ask(number: int, _: Any) -> None:
        _stop_asked.append(number)
        if rank() == 0 and hasattr(signal, "alarm"):
            signal.alarm(300)                                                # ends a process that no longer gets to the end of its step

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


def progress(iterable, **kwargs) -> tqdm:
    """A progress bar on rank 0; without a terminal it prints a line every ten seconds rather than every redraw."""
    return tqdm(iterable, disable=rank() != 0, mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True, **kwargs)


def say(text: str) -> None:
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


# ==== Log and checkpoints ==========================================================================================

class Log:
    """`log.jsonl` in the output folder: one JSON line per logged step, rank 0 only.

    Keys: step, epoch, lr, loss, every loss term (averaged over processes), grad_norm, images_per_s (all processes), memory_gib, seconds.
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
        line = {"step": step, **values, **dict(zip(terms, stacked.tolist())), "images_per_s": images * world_size() / (now - self.last),
                "memory_gib": peak_memory_gib(self.device), "seconds": now - self.start}
        self.last = now
        self.append(line)
        return line

    def append(self, line: dict[str, float]) -> None:
        """One line with its "step", on rank 0."""
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}) + "\n")
                file.flush()
                os.fsync(file.fileno())                                      # before the checkpoint that this line belongs to


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource                                    # absent on Windows
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to disk, rename: a reader sees the old file or the new one, never half of one."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None):
    """A file to write, which takes the place of `path` when it is whole and on the disk; what was there before is kept as `previous`."""
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


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, step: int, config: Any, **extra: Any) -> None:
    """{"model", "optimizer", "step", "config", ...}: plain containers only, keys without `module.`, so that weights_only=True reads it.

    step = number of finished steps. Rank 0 writes; the file appears whole or not at all, and the one before stays beside it as previous.pt. A process
    that a signal has asked to stop ends here.
    """
    if rank() != 0:
        return
    state = {"model": getattr(model, "module", model).state_dict(), "optimizer": optimizer.state_dict() if optimizer else None,
             "step": step, "config": dataclasses.asdict(config), **extra}
    try:
        with replacing(path, path.with_name("previous.pt")) as file:
            torch.save(state, file)
    except OSError as error:
        raise UserError(f"{path}: step {step} cannot be saved ({error.strerror or error}); the checkpoint before is untouched. Make room and start "
                        "the same command again") from error
    if _stop_asked:
        say(f"stopped by {signal.Signals(_stop_asked[0]).name} after step {step}, which is saved; the same command continues")
        sys.exit(EXIT_STOPPED)


def read_run(out: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint of a folder: last.pt or, if that is damaged (it is moved aside) or missing, previous.pt. None: there is neither."""
    import convert                                                           # its reader turns a damaged file into one sentence
    damaged = []
    for path in (p for p in (out / "last.pt", out / "previous.pt") if p.exists()):
        try:
            with zipfile.ZipFile(path) as file:
                if part := file.testzip():                                   # checksums, which torch.load does not look at
                    raise UserError(f"{path}: damaged (checksum of {part})")
            state = convert.read_checkpoint(path)
            break
        except (UserError, OSError, zipfile.BadZipFile) as error:
            damaged.append(str(error) if isinstance(error, UserError) else f"{path}: damaged ({error})")
    else:
        if damaged:
            raise UserError(f"{'; '.join(damaged)}. There is nothing to continue from: give another --out, or remove the file to start anew")
        return None
    if damaged:
        os.replace(out / "last.pt", out / "damaged.pt")                      # it must not become the next previous.pt
        say(f"warning: {damaged[0]}; it is now damaged.pt, and {path.name} is used")
    return path, state


def identity(script: str, images: int, fingerprint: str) -> dict[str, Any]:
    """What a checkpoint says of its run beside the configuration; `fingerprint`: a hash of the list of images."""
    return {"script": script, "data": f"{images} images, sha256 {fingerprint[:16]}", "world": world_size()}


def open_run(config: Any, script: str, data: str | None = None, world: int | None = None) -> dict | None:
    """Make `--out` ready. Returns the checkpoint to continue from, or None for a new run; rank 0 decides which, for all processes.

    Refuses (UserError) a folder that holds a run of another script, another configuration or another data set, showing the difference.
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
        import convert
        state = convert.read_checkpoint(out / name)
        if state.get("step") != step:
            raise UserError(f"{out / name} is at step {state.get('step')} here and at step {step} for process 0: --out must be a folder they share")
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
        changed.append(f"{world} processes rather than {state['world']}: the same batches in the same order, but other dropout")
    say(f"continuing the run in {out} at step {state['step']}" + (f" with {'; '.join(changed)}" if changed else ""))
    return state


def restore(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer, config: Any = None, *, target: nn.Module | None = None,
            sync_bn: bool = True) -> int:
    """Put a checkpoint of this very run back. Returns the number of finished steps.

    target: the frozen network that the run learns from, saved with it because the file of --backbone_weights may be another one by now.
    Refuses (UserError) another number of processes where trained BatchNorm has the statistics of each process, as wrap_model leaves it.
    """
    local = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in m.parameters(False)) for m in model.modules())
    local = local and not (sync_bn and next(model.parameters()).is_cuda)
    before = state.get("world", world_size())
    if config and local and before != world_size() and not config.allow_config_change:
        raise UserError(f"{config.out} holds a run of {before} process(es), this one has {world_size()}: BatchNorm's statistics are those of a "
                        f"process's share of the batch, so it would train differently. Start {before}, or give --allow_config_change to go on")
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


def tell_plan(cfg: Any, images: int, what: str, steps_per_epoch: int, start: int, total_steps: int, device: torch.device) -> None:
    """One line on what is about to run; another one on a backbone that starts without weights."""
    if cfg.backbone_weights == "random" and not getattr(cfg, "init_from", None):
        learns, norm = getattr(cfg, "lr_backbone", 1) > 0, getattr(cfg, "backbone_norm", "bn")               # SoCo, DUPR: always, bn
        say("the backbone starts random: " + ("it is trained, with ordinary BatchNorm" if learns and norm == "bn" else
                                              "it is trained, with frozen BatchNorm" if learns else "and it is FROZEN"))
    pieces = world_size() * cfg.accumulate
    say(f"{images} {what}, {steps_per_epoch} steps per epoch, steps {start}..{total_steps}; batch {cfg.batch_size} = {world_size()} processes x "
        f"{cfg.accumulate} x {cfg.batch_size // pieces}; {device}")


def load_matching(model: nn.Module, state: dict[str, Tensor], *, drop: dict[str, str], source: str) -> None:
    """Strict loading with named exceptions: `drop` maps a regular expression on names to the reason they are left out.

    Prints every dropped, missing and unexpected tensor group; anything missing or unexpected that no rule of `drop` covers, and any shape
    that differs, is a UserError.
    """
    own = model.state_dict()
    reason = {k: why for k in own.keys() | state.keys() for pattern, why in drop.items() if re.search(pattern, k)}
    kept = {k: v for k, v in state.items() if k not in reason}
    missing, unexpected = sorted(own.keys() - kept.keys() - reason.keys()), sorted(kept.keys() - own.keys())
    shapes = [f"{k} {tuple(kept[k].shape)} -> {tuple(own[k].shape)}" for k in sorted(kept.keys() & own.keys()) if kept[k].shape != own[k].shape]
    if missing or unexpected or shapes:
        def some(names: list[str]) -> str:
            return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        parts = [f"{what}: {some(names)}" for what, names in
                 (("missing there", missing), ("unknown here", unexpected), ("other shapes (file -> model)", shapes)) if names]
        raise UserError(f"{source} is a checkpoint of another architecture. {'; '.join(parts)}. Give the flags it was trained with")
    model.load_state_dict(own | kept)
    for why, names in ((why, sorted(k for k in reason if reason[k] == why)) for why in dict.fromkeys(reason.values())):
        say(f"  {why}: {', '.join(names)}")
    say(f"loaded {len(kept)} tensors from {source}" + (f"; {len(reason)} named above are left out or new" if reason else ""))


# ==== Backbone =====================================================================================================

class Backbone(nn.Module):
    """ResNet-18/34/50/101 without its classifier; returns the outputs of the wanted stages.

    layers: which of layer1..layer4 (strides 4, 8, 16, 32) to return; the network stops after the last of them.
    norm: "frozen" = BatchNorm with constant statistics and affine (released DETR family), "bn" = ordinary BatchNorm.
    trainable: how many of the five stages (conv1, layer1..layer4) learn, counted from the end; 3 = layer2-4 (DETR family), 0 = none, 5 = all.
    """

    def __init__(self, arch: str = "resnet50", layers: tuple[int, ...] = (2, 3, 4), norm: str = "frozen", trainable: int = 3):
        super().__init__()
        resnet = getattr(torchvision.models, arch)(weights=None, norm_layer=FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d)
        stages = dict(resnet.named_children())
        self.body = nn.Sequential()
        for name in ("conv1", "bn1", "relu", "maxpool", *(f"layer{i}" for i in range(1, max(layers) + 1))):
            self.body.add_module(name, stages[name])
        self.arch, self.layers = arch, tuple(f"layer{i}" for i in layers)
        width = resnet.fc.in_features // 8                                    # 64 for basic blocks, 256 for bottlenecks
        self.num_channels = [width * 2 ** (i - 1) for i in layers]
        learning = ("layer4", "layer3", "layer2", "layer1", "conv1")[:trainable] + (("bn1",) if trainable == 5 else ())
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in learning)
        if norm == "frozen":
            self.body.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Backbone:
        """A backbone of which nothing learns stays in evaluation mode: its BatchNorm statistics are constant too."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def forward(self, images: Tensor) -> list[Tensor]:                       # [B, 3, H, W] -> [[B, D_l, H/s, W/s], ...]
        return run_stages(self.body.named_children(), images, self.layers)


def run_stages(stages: Iterable[tuple[str, nn.Module]], images: Tensor, layers: tuple[str, ...]) -> list[Tensor]:
    """Run a ResNet's children one after another; the outputs of those called `layers`.

    Channels last in memory, a quarter less time for frozen norms on CPU, but not for norms that learn: there the statistics of a map of 112 x 112
    would be off by 1e-4 rather than 1e-6, for an eighth less time.
    """
    stages, outputs = dict(stages), []
    frozen = isinstance(stages.get("bn1"), FrozenBatchNorm2d)
    x = images.contiguous(memory_format=torch.channels_last) if frozen or images.is_cuda else images
    for name, stage in stages.items():
        if name == "conv1":
            stem = stage                                                      # waits for its norm
        elif name == "bn1":
            x = convolve(x, stem, stage)
        elif frozen and name.startswith("layer"):
            for block in stage:
                x = frozen_block(x, block)
        else:
            x = stage(x)
        if name in layers:
            outputs.append(x)
    return outputs


def frozen_block(x: Tensor, block: nn.Module) -> Tensor:
    """torchvision's BasicBlock or Bottleneck with frozen norms: relu(x + f(x)), f of two or three convolutions; x too is convolved where its shape
    changes."""
    y, last = x, 3 if isinstance(block, Bottleneck) else 2
    for i in range(1, last + 1):
        y = convolve(y, getattr(block, f"conv{i}"), getattr(block, f"bn{i}"))
        y = F.relu(y, inplace=True) if i < last else y
    y += convolve(x, *block.downsample) if block.downsample is not None else x
    return F.relu(y, inplace=True)


def convolve(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """norm(conv(x)). A frozen norm is a scale and a shift, and goes into the convolution's weights: two passes over the map fewer."""
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return F.conv2d(x, conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale, conv.stride, conv.padding)


BACKBONE_URLS = {
    "swav": "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",
    "moco_v2": "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
}


def backbone_file(weights: str, arch: str) -> Path:
    """The file behind `--backbone_weights swav|imagenet|moco_v2|FILE`: PyTorch's hub cache is looked into first, then it is downloaded.

    A download that fails is a UserError that says what to fetch, from where, and where to put it.
    """
    if weights not in BACKBONE_URLS and weights != "imagenet":
        return Path(weights)
    if weights in BACKBONE_URLS and arch != "resnet50":
        raise UserError(f"--backbone_weights {weights} exists for resnet50 only, not for {arch}; use imagenet, random or a file")
    url = BACKBONE_URLS.get(weights) or torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except (urllib.error.URLError, OSError) as error:
            raise UserError(f"--backbone_weights {weights}: the download failed ({error}). Fetch {url} and put it at {path}, "
                            "or give a file with --backbone_weights FILE, or start from --backbone_weights random") from error
    barrier()
    return path


def load_backbone_weights(body: nn.Module, weights: str, arch: str) -> None:
    """Fill a ResNet body from `--backbone_weights swav|imagenet|moco_v2|random|FILE`."""
    if weights != "random":
        import convert                                                      # only foreign files need it
        convert.load_backbone(body, backbone_file(weights, arch))


# ==== Position encoding ============================================================================================

class PositionEmbeddingSine(nn.Module):
    """Sine encoding of the pixel position, padding not counted (DETR, Sec. A.4). Output [B, 2 * num_pos_feats, H, W]: y block, then x block.

    offset: -0.5 puts positions on pixel centres, as Deformable DETR does; DETR has 0.
    """

    def __init__(self, num_pos_feats: int, offset: float = -0.5, normalize: bool = True, temperature: float = 10000.0):
        super().__init__()
        self.num_pos_feats, self.offset, self.normalize, self.temperature = num_pos_feats, offset, normalize, temperature

    def forward(self, mask: Tensor) -> Tensor:                                # [B, H, W] bool
        valid = (~mask).float()
        y, x = valid.cumsum(1), valid.cumsum(2)
        if self.normalize:
            y = (y + self.offset) / (y[:, -1:, :] + 1e-6) * 2 * math.pi
            x = (x + self.offset) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        i = torch.arange(self.num_pos_feats, device=mask.device)
        frequency = self.temperature ** (2 * (i // 2) / self.num_pos_feats)
        axes = []
        for angle in (y[..., None] / frequency, x[..., None] / frequency):    # [B, H, W, feats]; even channels sin, odd cos
            axes.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(3))
        return torch.cat(axes, 3).permute(0, 3, 1, 2)


# ==== DETR and Conditional DETR ====================================================================================

class MLP(nn.Module):
    """Linear layers with ReLU between them; keys `layers.i` as in every released DETR."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class Dropout(nn.Dropout):
    """nn.Dropout. On CPU from 16 random bits per element, as PyTorch's own draws there were a seventh of a DETReg step: p to the next 1/65536."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:x.numel()].view(x.shape)
        return torch.where(bits >= round(self.p * 2**16) - 2**15, x, 0.0).mul_(1 / (1 - self.p))


class DETREncoderLayer(nn.Module):
    """Self-attention over all pixels, then a feed-forward network (DETR, Sec. A.3).

    post-norm: x = norm(x + f(x)); pre-norm: x = x + f(norm(x)). The position is added to queries and keys only, after the norm.
    """

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_heads: int, pre_norm: bool):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout, self.pre_norm = Dropout(dropout), pre_norm

    def residual(self, x: Tensor, norm: nn.LayerNorm, block: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.dropout(block(norm(x))) if self.pre_norm else norm(x + self.dropout(block(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))

    def forward(self, x: Tensor, pos: Tensor, padding: Tensor) -> Tensor:    # [B, S, D], [B, S, D], [B, S]
        def attend(y: Tensor) -> Tensor:
            return self.self_attn(y + pos, y + pos, y, key_padding_mask=padding, need_weights=False)[0]
        return self.residual(self.residual(x, self.norm1, attend), self.norm2, self.feed_forward)


class DETRDecoderLayer(DETREncoderLayer):
    """Self-attention among queries, attention into the image, feed-forward network (DETR, Sec. A.3)."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_heads: int, pre_norm: bool):
        super().__init__(d_model, d_ffn, dropout, n_heads, pre_norm)
        self.multihead_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, query_pos: Tensor, memory: Tensor, pos: Tensor, padding: Tensor, self_mask: Tensor | None) -> Tensor:
        def among_queries(y: Tensor) -> Tensor:
            return self.self_attn(y + query_pos, y + query_pos, y, attn_mask=self_mask, need_weights=False)[0]

        def into_image(y: Tensor) -> Tensor:
            return self.multihead_attn(y + query_pos, memory + pos, memory, key_padding_mask=padding, need_weights=False)[0]
        x = self.residual(x, self.norm1, among_queries)
        x = self.residual(x, self.norm2, into_image)
        return self.residual(x, self.norm3, self.feed_forward)


class DETRTransformer(nn.Module):
    """Encoder over the pixels of one map, decoder over object queries (DETR, Fig. 2)."""

    def __init__(self, d_model: int = 256, nhead: int = 8, enc_layers: int = 6, dec_layers: int = 6, dim_feedforward: int = 2048,
                 dropout: float = 0.1, pre_norm: bool = False):
        super().__init__()
        self.d_model, layer = d_model, (d_model, dim_feedforward, dropout, nhead, pre_norm)
        self.encoder, self.decoder = nn.Module(), nn.Module()                 # holders of `layers` and `norm`, for the released names
        self.encoder.layers = nn.ModuleList(DETREncoderLayer(*layer) for _ in range(enc_layers))
        self.encoder.norm = nn.LayerNorm(d_model) if pre_norm else nn.Identity()
        self.decoder.layers = nn.ModuleList(self.decoder_layer(i, *layer) for i in range(dec_layers))
        self.decoder.norm = nn.LayerNorm(d_model)                             # on the output of every layer, the next layer sees it without
        self.further_modules()
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def decoder_layer(self, index: int, *layer: Any) -> nn.Module:
        return DETRDecoderLayer(*layer)

    def further_modules(self) -> None:
        """What a variant has besides."""

    def decode(self, query_pos: Tensor, memory: Tensor, pos: Tensor, padding: Tensor, self_mask: Tensor | None):
        x, hs = torch.zeros_like(query_pos), []
        for layer in self.decoder.layers:
            x = layer(x, query_pos, memory, pos, padding, self_mask)
            hs.append(self.decoder.norm(x))
        return torch.stack(hs), None

    def forward(self, source: Tensor, mask: Tensor, position: Tensor, query_embed: Tensor, self_mask: Tensor | None = None):
        """source, position [B, D, H, W]; mask [B, H, W] True = padding; query_embed [Q, D] or, per image, [B, Q, D]; self_mask [Q, Q] True = query i
        may not look at query j. Returns hs [layers, B, Q, D], reference points [B, Q, 2] in 0..1 or None, memory [B, D, H, W]."""
        x, pos, padding = (t.flatten(2).transpose(1, 2) for t in (source, position, mask[:, None]))
        padding = padding[..., 0]                                             # [B, S]
        for layer in self.encoder.layers:
            x = layer(x, pos, padding)
        memory = self.encoder.norm(x)
        hs, reference = self.decode(query_embed.expand(len(x), *query_embed.shape[-2:]), memory, pos, padding, self_mask)
        return hs, reference, memory.transpose(1, 2).unflatten(2, source.shape[-2:])


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, dropout: float, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention of [B, Q, E], [B, S, E], [B, S, D], cut into heads here; mask broadcasts to [B, M, Q, S], True = not seen."""
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, None if mask is None else ~mask, dropout)
    return output.transpose(1, 2).flatten(2)


class ConditionalDecoderLayer(nn.Module):
    """Decoder layer whose cross-attention compares content with content and place with place (Conditional DETR, Sec. 3.3, Eq. 5).

    Per head, queries are [content; place] and so are keys. The learned position enters the content only in the first layer.
    """

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_heads: int, first: bool):
        super().__init__()
        self.n_heads, self.attention_dropout = n_heads, dropout
        for name in ("sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v", "ca_qcontent", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine"):
            self.add_module(f"{name}_proj", nn.Linear(d_model, d_model))
        self.ca_qpos_proj = nn.Linear(d_model, d_model) if first else None
        self.self_attn, self.cross_attn = (nn.ModuleDict({"out_proj": nn.Linear(d_model, d_model)}) for _ in range(2))
        self.linear1, self.linear2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))
        self.dropout = Dropout(dropout)
        for attn in (self.self_attn, self.cross_attn):
            nn.init.zeros_(attn["out_proj"].bias)

    def forward(self, x: Tensor, query_pos: Tensor, place: Tensor, memory: Tensor, pos: Tensor, padding: Tensor, self_mask: Tensor | None) -> Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        query, key = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos), self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos)
        seen = attention(query, key, self.sa_v_proj(x), self.n_heads, dropout, self_mask)
        x = self.norm1(x + self.dropout(self.self_attn["out_proj"](seen)))
        query, key, key_place = self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory), self.ca_kpos_proj(pos)
        if self.ca_qpos_proj is not None:
            query, key = query + self.ca_qpos_proj(query_pos), key + key_place
        query, key = (torch.cat([content.unflatten(-1, (self.n_heads, -1)), where.unflatten(-1, (self.n_heads, -1))], -1).flatten(2)
                      for content, where in ((query, self.ca_qpos_sine_proj(place)), (key, key_place)))           # [B, Q or S, 2D]
        seen = attention(query, key, self.ca_v_proj(memory), self.n_heads, dropout, padding[:, None, None])
        x = self.norm2(x + self.dropout(self.cross_attn["out_proj"](seen)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


def sine_of_points(points: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Sine encoding [..., channels] of points (x, y) in 0..1: y half, then x half, sin and cos interleaved (Conditional DETR, Sec. 3.3)."""
    half = channels // 2
    frequency = temperature ** (2 * (torch.arange(half, device=points.device) // 2) / half)
    angle = points.flip(-1)[..., None] * 2 * math.pi / frequency              # [..., 2, half]
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-3)


class ConditionalTransformer(DETRTransformer):
    """DETR's encoder with a decoder that looks for each query around a reference point (Conditional DETR, Fig. 3). Post-norm only, as released."""

    def decoder_layer(self, index: int, d_model: int, d_ffn: int, dropout: float, n_heads: int, pre_norm: bool) -> nn.Module:
        return ConditionalDecoderLayer(d_model, d_ffn, dropout, n_heads, first=index == 0)

    def further_modules(self) -> None:
        self.decoder.query_scale = MLP(self.d_model, self.d_model, self.d_model, 2)
        self.decoder.ref_point_head = MLP(self.d_model, self.d_model, 2, 2)

    def decode(self, query_pos: Tensor, memory: Tensor, pos: Tensor, padding: Tensor, self_mask: Tensor | None):
        with torch.autocast(query_pos.device.type, enabled=False):
            reference = self.decoder.ref_point_head(query_pos.float()).sigmoid()              # [B, Q, 2], the same in all layers
            sine = sine_of_points(reference, self.d_model)
        x, hs = torch.zeros_like(query_pos), []
        for i, layer in enumerate(self.decoder.layers):
            place = sine if i == 0 else sine * self.decoder.query_scale(x)    # Eq. (2) there: lambda_q = T * p_s
            x = layer(x, query_pos, place, memory, pos, padding, self_mask)
            hs.append(self.decoder.norm(x))
        return torch.stack(hs), reference


# ==== Deformable DETR ==============================================================================================

def multi_scale_deformable_attention(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples (Deformable DETR, Eq. 3), without a compiled operator: what the forms below must equal.

    value [B, S, M, D]; shapes (H_l, W_l) per level; locations [B, Q, M, L, P, 2] as (x, y), 0..1 spans a level's map, outside counts as zero;
    weights [B, Q, M, L, P]. Returns [B, Q, M * D]. Levels are accumulated one by one: the samples of all levels never exist together.
    """
    B, S, M, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    value = value.permute(0, 2, 3, 1).reshape(B * M, D, S)                    # one copy; a level is then a view of it
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)                  # [B*M, Q, L, P, 2] in -1..1
    weights = weights.transpose(1, 2).reshape(B * M, 1, Q, -1, P)             # [B*M, 1, Q, L, P]
    output, start = 0.0, 0
    for level, (H, W) in enumerate(shapes):
        v = value[:, :, start:start + H * W].unflatten(2, (H, W))
        samples = F.grid_sample(v, grid[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False)
        output = output + (samples * weights[:, :, :, level]).sum(-1)         # [B*M, D, Q]
        start += H * W
    return output.view(B, M * D, Q).transpose(1, 2)


@torch.compiler.disable                                  # its sparse products are not for the compiler
def deformable_attention_on_cpu(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The same by four times the speed and half the memory (benchmarks/attention.py): bilinear samples are four neighbours each, so a query's output
    is a weighted sum of 4 L P rows of `value`, and all queries together are its product with a sparse matrix. No sample is ever written down."""
    B, S, M, D = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    height, width = (torch.tensor(side).repeat_interleave(P) for side in zip(*shapes))                   # [L*P]
    start = (torch.tensor([0] + [h * w for h, w in shapes[:-1]]).cumsum(0).repeat_interleave(P) * M).int()
    first = (torch.arange(B)[:, None, None] * (S * M) + torch.arange(M)).expand(B, Q, M).reshape(-1, 1).int()

    def neighbours(fraction: Tensor, side: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(cell, share of the sample), of the cell below a coordinate and of the one above; a cell outside has no share. [B*Q*M, L*P] each"""
        place = fraction.reshape(-1, L * P) * side - 0.5
        low = place.detach().floor()
        cells, shares = (low, low + 1), (1 - (place - low), place - low)
        inside = [cell.clamp(min=0).minimum(side - 1) for cell in cells]
        return [(i.int(), share * (i == cell)) for i, cell, share in zip(inside, cells, shares)]

    columns = neighbours(locations[..., 0], width.to(locations))
    index, weight = [], []
    for y, share_y in neighbours(locations[..., 1], height.to(locations)):
        row, share = first + start + y * (width * M).int(), share_y * weights.reshape(-1, L * P)
        for x, share_x in columns:
            index.append(row + x * M)                                         # of value as [B*S*M, D]
            weight.append(share * share_x)
    return WeightedRows.apply(value.reshape(-1, D), torch.cat(index, 1), torch.cat(weight, 1)).view(B, Q, M * D)


class WeightedRows(torch.autograd.Function):
    """output[i] = sum over k of weight[i, k] * rows[index[i, k]]: rows [N, D], index int32 [n, K], weight [n, K] -> [n, D]. On CPU.

    PyTorch's own backward of the same sum, embedding_bag's, sorts all indices and takes ten times as long.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, index, weight)
        return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, index, weight = ctx.saved_tensors
        (n, k), grad = index.shape, grad.contiguous()
        ends = torch.arange(0, n * k + 1, k, dtype=torch.int32)               # the matrix has k entries in every row
        matrix = scipy.sparse.csr_array((weight.flatten().numpy(), index.flatten().numpy(), ends.numpy()), shape=(n, len(rows)))
        if k > len(rows):                                                     # fewer rows than neighbours: sampled_addmm refuses such a matrix
            products = (grad @ rows.t()).gather(1, index.long())
        else:                                                                 # grad[i] . rows[index[i, k]] and no other pair
            pattern = torch.sparse_csr_tensor(ends, index.flatten(), torch.zeros_like(weight).flatten(), matrix.shape, check_invariants=False)
            products = torch.sparse.sampled_addmm(pattern, grad, rows.t(), beta=0.0).values().view(n, k)
        return torch.from_numpy(matrix.T @ grad.numpy()), None, products


def deformable_attention_by_deformops(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The same by the Triton kernels of the package deformops."""
    table = constant(tuple(shapes), value.device)
    return deformops.registry.msda(value, table, table.prod(1).cumsum(0) - table.prod(1), locations, weights)


def deformable_attention_for(device: torch.device) -> Callable[..., Tensor]:
    """The fastest form there is for a device. CUDA: the Triton kernels of the package deformops (MIT, Python >= 3.12) where it is installed; else, as
    on all other devices, the first form, which --compile compiles. Nothing has to be built."""
    if device.type == "cpu":
        return deformable_attention_on_cpu
    return deformable_attention_by_deformops if deformops and device.type == "cuda" else multi_scale_deformable_attention


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention module (Deformable DETR, Sec. 4.1)."""

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4):
        super().__init__()
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m looks in direction 2 pi m / M, point p at p + 1 pixels; all weights equal (Deformable DETR, Sec. A.3)."""
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.n_points + 1).view(1, 1, -1, 1)
        bias = direction.view(-1, 1, 1, 2).repeat(1, self.n_levels, 1, 1) * steps             # [M, L, P, 2]
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(bias.flatten())
            self.attention_weights.weight.zero_()
            self.attention_weights.bias.zero_()
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference_points: Tensor, source: Tensor, shapes: list[tuple[int, int]], mask: Tensor | None) -> Tensor:
        """query [B, Q, D]; reference_points [B, Q, L, 2 or 4] in 0..1; source [B, S, D]; mask [B, S] True = padding. Returns [B, Q, D]."""
        B, Q, _ = query.shape
        M, L, P = self.n_heads, self.n_levels, self.n_points
        value = self.value_proj(source)
        if mask is not None:
            value = value.masked_fill(mask[..., None], 0.0)
        with torch.autocast(query.device.type, enabled=False):                # bf16 would place samples up to a third of a pixel off
            offsets = self.sampling_offsets(query.float()).view(B, Q, M, L, P, 2)
            weights = self.attention_weights(query.float()).view(B, Q, M, L * P).softmax(-1).view(B, Q, M, L, P)
            if reference_points.shape[-1] == 2:
                size = constant(tuple(shapes), query.device).flip(1).to(offsets)           # (W_l, H_l)
                locations = reference_points[:, :, None, :, None] + offsets / size[:, None]
            else:                                                             # a box: offsets are measured in half its size
                locations = reference_points[:, :, None, :, None, :2] + offsets / P * reference_points[:, :, None, :, None, 2:] * 0.5
            attend = deformable_attention_for(value.device)
            sampled = attend(value.float().unflatten(-1, (M, -1)), shapes, locations, weights)
        return self.output_proj(sampled)


class DeformableEncoderLayer(nn.Module):
    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_levels: int, n_heads: int, n_points: int):
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, pos: Tensor, reference_points: Tensor, shapes: list[tuple[int, int]], mask: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x + pos, reference_points, x, shapes, mask)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DeformableDecoderLayer(nn.Module):
    """Self-attention among queries (norm2), deformable attention into the image (norm1), feed-forward (norm3): the released numbering."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_levels: int, n_heads: int, n_points: int):
        super().__init__()
        self.cross_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, query_pos: Tensor, reference_points: Tensor, memory: Tensor, shapes: list[tuple[int, int]],
                mask: Tensor, self_mask: Tensor | None) -> Tensor:
        q = x + query_pos
        x = self.norm2(x + self.dropout(self.self_attn(q, q, x, attn_mask=self_mask, need_weights=False)[0]))
        x = self.norm1(x + self.dropout(self.cross_attn(x + query_pos, reference_points, memory, shapes, mask)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DeformableTransformer(nn.Module):
    """Encoder over all pixels of all levels, decoder over object queries (Deformable DETR, Sec. 4.1)."""

    def __init__(self, d_model: int = 256, nhead: int = 8, enc_layers: int = 6, dec_layers: int = 6, dim_feedforward: int = 1024,
                 dropout: float = 0.1, num_feature_levels: int = 4, n_points: int = 4):
        super().__init__()
        self.d_model = d_model
        layer = (d_model, dim_feedforward, dropout, num_feature_levels, nhead, n_points)
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        self.encoder, self.decoder = nn.Module(), nn.Module()                 # holders of `layers`, for the released names
        self.encoder.layers = nn.ModuleList(DeformableEncoderLayer(*layer) for _ in range(enc_layers))
        self.decoder.layers = nn.ModuleList(DeformableDecoderLayer(*layer) for _ in range(dec_layers))
        self.decoder.bbox_embed = None                                        # set by a detector with box refinement
        self.reference_points = nn.Linear(d_model, 2)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def encode(self, x: Tensor, pos: Tensor, valid_ratios: Tensor, shapes: list[tuple[int, int]], mask: Tensor) -> Tensor:
        """Every pixel attends from its own centre: (i + .5) / valid size of its level, scaled to the valid part of each target level."""
        centres = []
        for level, (H, W) in enumerate(shapes):
            y, x_ = torch.meshgrid(torch.arange(H, device=x.device) + 0.5, torch.arange(W, device=x.device) + 0.5, indexing="ij")
            grid = torch.stack([x_.flatten() / W, y.flatten() / H], -1)       # [H*W, 2]
            centres.append(grid[None] / valid_ratios[:, None, level])
        reference_points = torch.cat(centres, 1)[:, :, None] * valid_ratios[:, None]          # [B, S, L, 2]
        for layer in self.encoder.layers:
            x = layer(x, pos, reference_points, shapes, mask)
        return x

    def forward(self, sources: list[Tensor], masks: list[Tensor], positions: list[Tensor], query_embed: Tensor, self_mask: Tensor | None = None):
        """sources, positions: [B, D, H_l, W_l] per level; masks [B, H_l, W_l]; query_embed [Q, 2D] or, per image, [B, Q, 2D]: position half, then
        initial content; self_mask [Q, Q] True = query i may not look at j. Returns hs [layers, B, Q, D], initial reference [B, Q, 2], references
        after each layer [layers, B, Q, 2 or 4], memory [B, S, D]."""
        shapes = [tuple(s.shape[-2:]) for s in sources]
        # the part of each map that is image, as (x, y) fractions, read off the first column and row: [B, L, 2]
        valid_ratios = torch.stack([torch.stack([(~m[:, 0]).float().mean(1), (~m[:, :, 0]).float().mean(1)], -1) for m in masks], 1)
        x = torch.cat([s.flatten(2).transpose(1, 2) for s in sources], 1)                     # [B, S, D]
        pos = torch.cat([p.flatten(2).transpose(1, 2) + e for p, e in zip(positions, self.level_embed)], 1)
        mask = torch.cat([m.flatten(1) for m in masks], 1)                                    # [B, S]
        memory = self.encode(x, pos, valid_ratios, shapes, mask)

        query_pos, query = query_embed.expand(len(x), *query_embed.shape[-2:]).chunk(2, -1)
        with torch.autocast(x.device.type, enabled=False):
            reference = initial = self.reference_points(query_pos.float()).sigmoid()          # [B, Q, 2]
        hs, references = [], []
        for i, layer in enumerate(self.decoder.layers):
            scale = valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
            query = layer(query, query_pos, reference[:, :, None] * scale[:, None], memory, shapes, mask, self_mask)
            if self.decoder.bbox_embed is not None:                           # the next layer looks around this layer's box
                with torch.no_grad():
                    reference = predict_boxes(self.decoder.bbox_embed[i], query, reference)
            hs.append(query)
            references.append(reference)
        return torch.stack(hs), initial, torch.stack(references), memory


def predict_boxes(head: nn.Module, query: Tensor, reference: Tensor | None) -> Tensor:
    """Boxes [..., Q, 4] cxcywh: the head's output is an offset to the reference, if any, in logit space (Deformable DETR, Sec. A.4); fp32."""
    with torch.autocast(query.device.type, enabled=False):
        delta = head(query.float())
        if reference is None:                                                 # DETR
            return delta.sigmoid()
        n = reference.shape[-1]                                               # 2: only the centre has a reference
        return torch.cat([delta[..., :n] + inverse_sigmoid(reference), delta[..., n:]], -1).sigmoid()


# ==== Detectors ====================================================================================================

class Detector(nn.Module):
    """What the detectors below share. `focal`: the class head is trained with the focal loss and has one row per class (else softmax, with a last
    row for "no object"), and heads start as Conditional and Deformable DETR start them (else PyTorch's defaults, as DETR).

    forward(images [B, 3, H, W] normalised and zero padded, mask [B, H, W] True = padding, ...) returns pred_logits [B, Q, rows],
    pred_boxes [B, Q, 4] cxcywh in 0..1, hs [B, Q, D]: the query embeddings behind them; aux_outputs: the same three of every earlier decoder
    layer; memory: the encoder's output as maps, [[B, D, H_l, W_l], ...].
    """

    def __init__(self, backbone: Backbone, transformer: nn.Module, num_queries: int, query_width: int, position_offset: float):
        super().__init__()
        self.transformer = transformer
        self.query_embed = nn.Embedding(num_queries, query_width)
        self.backbone = nn.Sequential(backbone)                               # released name: backbone.0.body
        self.position = PositionEmbeddingSine(transformer.d_model // 2, offset=position_offset)

    def forward(self, images: Tensor, mask: Tensor, queries: Tensor | None = None, self_mask: Tensor | None = None) -> dict[str, Any]:
        """queries: instead of the learned object queries, per image (see conditioned_queries); self_mask [Q, Q]: True = query i may not look at j."""
        return self.detect(self.backbone[0](images), mask, queries, self_mask)

    def conditioned_queries(self, features: Tensor, order: Tensor | None = None) -> Tensor:
        """Object queries that say what to look for: features [B, n, D] are added to the position half of the first n queries (of `order`),
        which is all of a query in DETR and Conditional DETR. Returns [B, n, query width]."""
        queries = self.query_embed.weight if order is None else self.query_embed.weight[order]
        return queries[:features.shape[1]] + F.pad(features, (0, queries.shape[1] - features.shape[2]))

    @staticmethod
    def outputs(layers: list[dict[str, Tensor]], memory: list[Tensor]) -> dict[str, Any]:
        return {**layers[-1], "aux_outputs": layers[:-1], "memory": memory}


def start_heads(class_embed: nn.Linear, bbox_embed: MLP) -> None:
    """p = .01 for every class, for the focal loss; boxes start at their reference point."""
    nn.init.constant_(class_embed.bias, -math.log((1 - 0.01) / 0.01))
    nn.init.zeros_(bbox_embed.layers[-1].weight)
    nn.init.zeros_(bbox_embed.layers[-1].bias)


class DETR(Detector):
    """DETR, or with a ConditionalTransformer Conditional DETR: one map, one class head and one box head for all decoder layers."""

    def __init__(self, backbone: Backbone, transformer: DETRTransformer, *, rows: int, focal: bool, num_queries: int = 100,
                 position_offset: float = 0.0):
        d = transformer.d_model
        class_embed, bbox_embed = nn.Linear(d, rows), MLP(d, d, 4, 3)
        super().__init__(backbone, transformer, num_queries, d, position_offset)
        self.class_embed, self.bbox_embed = class_embed, bbox_embed
        self.input_proj = nn.Conv2d(backbone.num_channels[-1], d, 1)
        if focal:
            start_heads(self.class_embed, self.bbox_embed)

    def detect(self, features: list[Tensor], mask: Tensor, queries: Tensor | None = None, self_mask: Tensor | None = None) -> dict[str, Any]:
        source = self.input_proj(features[-1])                                # [B, D, H, W]
        mask = F.interpolate(mask[:, None].float(), size=source.shape[-2:])[:, 0].bool()
        position = self.position(mask).to(source.dtype)
        queries = self.query_embed.weight if queries is None else queries
        hs, reference, memory = self.transformer(source, mask, position, queries, self_mask)
        layers = [{"pred_logits": self.class_embed(x).float(), "pred_boxes": predict_boxes(self.bbox_embed, x, reference), "hs": x.float()}
                  for x in hs]
        return self.outputs(layers, [memory])


class DeformableDETR(Detector):
    """Deformable DETR: multi- or single-scale, with or without iterative box refinement.

    Without refinement one class head and one box head serve all decoder layers; they appear in `state_dict` once per layer, as in the
    released checkpoints. A query is 2D wide: what gives its position and reference point, then what it starts from.
    """

    def __init__(self, backbone: Backbone, transformer: DeformableTransformer, *, rows: int, focal: bool = True, num_queries: int = 300,
                 with_box_refine: bool = False, position_offset: float = -0.5):
        d, channels = transformer.d_model, backbone.num_channels
        class_embed, bbox_embed = nn.Linear(d, rows), MLP(d, d, 4, 3)
        super().__init__(backbone, transformer, num_queries, 2 * d, position_offset)
        levels, layers = len(transformer.level_embed), len(transformer.decoder.layers)
        if focal:
            start_heads(class_embed, bbox_embed)
        share = copy.deepcopy if with_box_refine else (lambda module: module)
        self.class_embed = nn.ModuleList(share(class_embed) for _ in range(layers))
        self.bbox_embed = nn.ModuleList(share(bbox_embed) for _ in range(layers))
        if focal:
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)   # small boxes first
        if with_box_refine:
            transformer.decoder.bbox_embed = self.bbox_embed
        projections = [nn.Conv2d(c, d, 1) for c in channels]
        for extra in range(levels - len(channels)):                           # further levels: stride-2 convolutions, the first on the LAST stage
            projections.append(nn.Conv2d(channels[-1] if extra == 0 else d, d, 3, stride=2, padding=1))
        self.input_proj = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, d)) for conv in projections)
        for conv, _ in self.input_proj:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def detect(self, features: list[Tensor], mask: Tensor, queries: Tensor | None = None, self_mask: Tensor | None = None) -> dict[str, Any]:
        sources = [proj(f) for proj, f in zip(self.input_proj, features)]
        for proj in list(self.input_proj)[len(sources):]:
            sources.append(proj(features[-1] if len(sources) == len(features) else sources[-1]))
        masks = [F.interpolate(mask[:, None].float(), size=s.shape[-2:])[:, 0].bool() for s in sources]
        positions = [self.position(m).to(sources[0].dtype) for m in masks]
        queries = self.query_embed.weight if queries is None else queries
        hs, initial, references, memory = self.transformer(sources, masks, positions, queries, self_mask)
        layers = []
        for i, x in enumerate(hs):                                            # layer i corrects the reference it was given
            boxes = predict_boxes(self.bbox_embed[i], x, initial if i == 0 else references[i - 1])
            layers.append({"pred_logits": self.class_embed[i](x).float(), "pred_boxes": boxes, "hs": x.float()})
        shapes = [s.shape[-2:] for s in sources]
        maps = [m.transpose(1, 2).unflatten(2, shape) for m, shape in zip(memory.split([h * w for h, w in shapes], 1), shapes)]
        return self.outputs(layers, maps)


DETECTORS = Literal["detr", "conditional_detr", "deformable_detr_ss", "deformable_detr"]


def build_detector(cfg: Any, rows: int, *, focal: bool, position_offset: float | None = None) -> Detector:
    """The detector a configuration describes (fields detector, arch, backbone_norm, lr_backbone, hidden_dim, ...), weights still random.

    rows: of the class head; focal: see Detector; position_offset: of the sine encoding, None = the detector's own (-0.5 in Deformable DETR, else 0).
    What of the backbone learns: nothing at lr_backbone 0; layer2-4 under frozen BatchNorm (released); all of it under ordinary BatchNorm.
    """
    trainable = 0 if cfg.lr_backbone <= 0 else 5 if cfg.backbone_norm == "bn" else 3
    deformable = cfg.detector.startswith("deformable")
    levels = cfg.num_feature_levels if cfg.detector == "deformable_detr" else 1
    stages = (2, 3, 4)[-levels:] if deformable else ({4: 1, 8: 2, 16: 3, 32: 4}[cfg.stride],)
    backbone = Backbone(cfg.arch, stages, cfg.backbone_norm, trainable)
    shared = (cfg.hidden_dim, cfg.nheads, cfg.enc_layers, cfg.dec_layers, cfg.dim_feedforward, cfg.dropout)
    offset = {} if position_offset is None else {"position_offset": position_offset}
    if deformable:
        return DeformableDETR(backbone, DeformableTransformer(*shared, levels), rows=rows, focal=focal, num_queries=cfg.num_queries,
                              with_box_refine=cfg.with_box_refine, **offset)
    transformer = ConditionalTransformer(*shared) if cfg.detector == "conditional_detr" else DETRTransformer(*shared, cfg.pre_norm)
    return DETR(backbone, transformer, rows=rows, focal=focal, num_queries=cfg.num_queries, **offset)


def align_start(detector: Detector, to_query: nn.Linear) -> None:
    """Let a random DETR or Conditional DETR compare queries with the image from the first step: features enter queries as they enter the encoder, and
    the decoder's keys start as its queries do. Without it a model of the demos' size still answered the same for any image after 600 steps.

    Not part of any paper: for the demos. to_query: features [.., C] -> query content. Deformable DETR compares no keys and is left as it is.
    """
    if not isinstance(detector, DETR):
        return
    with torch.no_grad():
        to_query.weight.copy_(detector.input_proj.weight[:, :, 0, 0])
        to_query.bias.copy_(detector.input_proj.bias)
        detector.query_embed.weight.mul_(0.1)                                 # what a query asks for outweighs which query it is
        for layer in detector.transformer.decoder.layers:
            if isinstance(layer, ConditionalDecoderLayer):
                query, keys = layer.ca_qcontent_proj.weight.mul_(2), [layer.ca_kcontent_proj.weight]
                keys += [layer.ca_qpos_proj.weight] if layer.ca_qpos_proj is not None else []
            else:
                query, *keys = layer.multihead_attn.in_proj_weight.chunk(3)[:2]
                query.mul_(2)                                                 # attention sharp enough to see a difference
            for key in keys:
                key.copy_(query)


class Pretext(nn.Module):
    """A detector together with the modules that a pretext task adds to it. Checkpoints keep the released names: `detector.` is not part of them."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name.removeprefix("detector."): value for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state: dict[str, Tensor], *args: Any, **kwargs: Any):
        own = {name.removeprefix("detector."): name for name in super().state_dict()}
        return super().load_state_dict({own.get(name, name): value for name, value in state.items()}, *args, **kwargs)


# ==== R-CNN family =================================================================================================

RCNN_DETECTORS = Literal["mask_rcnn_fpn", "faster_rcnn_fpn", "mask_rcnn_c4", "faster_rcnn_c4", "retinanet_fpn", "fcos_fpn"]
ONE_STAGE = ("retinanet_fpn", "fcos_fpn")


class Prepared(GeneralizedRCNNTransform):
    """Images come resized and normalised: all that is left is padding to a multiple of the largest stride. Detections stay in these pixels."""

    def __init__(self, size_divisible: int):
        super().__init__(min_size=0, max_size=0, image_mean=[], image_std=[], size_divisible=size_divisible)

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        return image, target

    def postprocess(self, result: list[dict], image_shapes: list, original_image_sizes: list) -> list[dict]:
        return result


class Anchors(AnchorGenerator):
    """Anchors [ratios (h / w) * scales, 4] with exact corners, as detectron2's; torchvision rounds (46 x 22 for 45.25 x 22.63)."""

    def generate_anchors(self, scales, aspect_ratios, dtype: torch.dtype = torch.float32, device: torch.device = torch.device("cpu")) -> Tensor:
        scales, ratios = (torch.as_tensor(v, dtype=dtype, device=device) for v in (scales, aspect_ratios))
        h, w = ((root[:, None] * scales).flatten() for root in (ratios.sqrt(), 1 / ratios.sqrt()))
        return torch.stack([-w, -h, w, h], 1) / 2

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)                       # not the maps' type: bf16 knows pixels to the next 4 only


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign with pixel centres at .5 (aligned=True) and as many samples as a bin has pixels, as detectron2's ROIAlignV2.

    levels: {name of a map: its stride}, finest first. A RoI is pooled from level floor(4 + log2(sqrt(area) / 224)) (FPN, Eq. 1).
    """

    def __init__(self, levels: dict[str, int], output_size: int):
        super().__init__(list(levels), output_size, sampling_ratio=0)
        self.strides = list(levels.values())

    def levels(self, boxes_xyxy: Tensor) -> Tensor:
        """Position of each box's map in featmap_names."""
        area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
        level = (4 + (area.sqrt() / 224 + 1e-8).log2()).floor()
        first, last = (int(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        return level.clamp(first, last).long() - first

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """x: maps [B, C, H, W]; boxes: per image [n, 4] xyxy px -> [sum of n, C, S, S]."""
        joined = torch.cat(boxes)
        rois = torch.cat([torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]), joined], 1)
        level, first = self.levels(joined), x[self.featmap_names[0]]
        pooled = first.new_zeros(len(rois), first.shape[1], *self.output_size)
        for i, (name, stride) in enumerate(zip(self.featmap_names, self.strides)):
            here = torch.nonzero(level == i)[:, 0]
            pooled[here] = roi_align(x[name], rois[here], self.output_size, 1 / stride, sampling_ratio=0, aligned=True).to(pooled)
        return pooled


class RPN(RegionProposalNetwork):
    """torchvision's, with the L1 loss on boxes (detectron2: smooth L1 with beta 0; torchvision: 1/9)."""

    def compute_loss(self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
                     ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(chosen).bool() for chosen in self.fg_bg_sampler(labels))
        sampled, wanted = positive | negative, torch.cat(labels)
        box_loss = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum") / sampled.sum()
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], wanted[sampled]), box_loss


class RCNNHeads(RoIHeads):
    """torchvision's, with the L1 box loss, and for C4 with one pass through res5 in training, whose positive rows the mask branch takes (detectron2's
    Res5ROIHeads). There `box_head` is res5, pooling, flattening, and the mask branch has no pooler and head of its own."""

    def has_mask(self) -> bool:
        return self.mask_predictor is not None

    @staticmethod
    def box_losses(class_logits: Tensor, box_regression: Tensor, labels: Tensor, regression_targets: Tensor) -> dict[str, Tensor]:
        """class_logits [n, C + 1], box_regression [n, 4 (C + 1)], labels [n] with 0 = background, targets [n, 4]; L1 over all n RoIs."""
        positive = torch.nonzero(labels > 0)[:, 0]
        predicted = box_regression.unflatten(1, (-1, 4))[positive, labels[positive]]
        box_loss = F.l1_loss(predicted, regression_targets[positive], reduction="sum") / labels.numel()
        return {"loss_classifier": F.cross_entropy(class_logits, labels), "loss_box_reg": box_loss}

    def region_features(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list) -> tuple[Tensor, Tensor | None]:
        """What the box predictor sees [n, D], and for C4 the maps [n, 2048, 7, 7] before pooling, which the mask predictor sees."""
        pooled = self.box_roi_pool(features, boxes, sizes)
        if not hasattr(self.box_head, "res5"):
            return self.box_head(pooled), None
        maps = self.box_head.res5(pooled)
        return self.box_head[1:](maps), maps

    def mask_logits(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list) -> Tensor:
        if self.mask_roi_pool is None:
            return self.mask_predictor(self.box_head.res5(self.box_roi_pool(features, boxes, sizes)))
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, sizes)))

    def forward(self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list, targets: list[dict] | None = None):
        if not self.training:
            predictions = self.box_predictor(self.region_features(features, proposals, image_shapes)[0])
            parts = self.postprocess_detections(*predictions, proposals, image_shapes)
            result = [dict(zip(("boxes", "scores", "labels"), parts_of_image)) for parts_of_image in zip(*parts)]
            if self.has_mask():
                logits = self.mask_logits(features, [r["boxes"] for r in result], image_shapes)
                for r, masks in zip(result, maskrcnn_inference(logits, [r["labels"] for r in result])):
                    r["masks"] = masks                                        # [n, 1, S, S] in the box
            return result, {}
        proposals, matched, labels, regression_targets = self.select_training_samples(proposals, targets)
        pooled, maps = self.region_features(features, proposals, image_shapes)
        losses = self.box_losses(*self.box_predictor(pooled), torch.cat(labels), torch.cat(regression_targets))
        if self.has_mask():
            positive = [torch.nonzero(l > 0)[:, 0] for l in labels]
            boxes = [p[i] for p, i in zip(proposals, positive)]
            logits = self.mask_logits(features, boxes, image_shapes) if maps is None else self.mask_predictor(maps[torch.cat(labels) > 0])
            losses["loss_mask"] = maskrcnn_loss(logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets],
                                                [m[i] for m, i in zip(matched, positive)])
        return [], losses


class C4(nn.Module):
    """A ResNet up to layer3 under the name `body`; one map of stride 16."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.body, self.out_channels = backbone.body[:-1], backbone.num_channels[2]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"0": self.body(images)}


def build_rcnn(cfg: Any, classes: int) -> nn.Module:
    """A detector of RCNN_DETECTORS out of torchvision's parts, with torchvision's names, weights still random.

    Read from cfg: detector, arch, backbone_norm, box_head, fpn_channels, head_dim, anchor_size, rois_per_image, proposals_per_image. Faster and Mask
    R-CNN have one more class row, the first, for background. All of the ResNet learns. In training forward(images, targets)
    gives the losses, else detections.
    """
    backbone = Backbone(cfg.arch, (1, 2, 3, 4), cfg.backbone_norm, trainable=5)
    sizes = [cfg.anchor_size * 2 ** i for i in range(5)]
    if cfg.detector not in ONE_STAGE:
        return two_stage(cfg, backbone, classes + 1, sizes)
    width, norm = backbone.num_channels[-1], nn.BatchNorm2d
    c5_or_p5 = width if cfg.detector == "retinanet_fpn" else cfg.fpn_channels     # what P6 and P7 are made of
    pyramid = BackboneWithFPN(backbone.body, {"layer2": "0", "layer3": "1", "layer4": "2"}, backbone.num_channels[1:], cfg.fpn_channels,
                              LastLevelP6P7(c5_or_p5, cfg.fpn_channels), norm)
    if cfg.detector == "retinanet_fpn":
        pyramid.fpn.extra_blocks.use_P5 = False                               # torchvision guesses it from the widths
        anchors = Anchors(tuple((s, s * 2 ** (1 / 3), s * 2 ** (2 / 3)) for s in sizes), ((0.5, 1.0, 2.0),) * 5)
        model = RetinaNet(pyramid, classes, anchor_generator=anchors, detections_per_img=100)
    else:
        model = FCOS(pyramid, classes, anchor_generator=Anchors(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5), score_thresh=0.05)
    model.transform = Prepared(128)
    model.head.register_forward_hook(in_float)
    return model


def in_float(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook: what a head predicts is fp32 under autocast too; torchvision decodes boxes in the type of the prediction."""
    if isinstance(output, Tensor):
        return output.float()
    return {k: v.float() for k, v in output.items()} if isinstance(output, dict) else [in_float(module, inputs, part) for part in output]


def two_stage(cfg: Any, backbone: Backbone, rows: int, sizes: list[int]) -> GeneralizedRCNN:
    """Faster or Mask R-CNN on a pyramid (FPN) or on res4, with res5 as the head (C4)."""
    masks, ratios, passed = cfg.detector.startswith("mask"), (0.5, 1.0, 2.0), cfg.proposals_per_image
    mask_pool = mask_head = mask_predictor = None
    if cfg.detector.endswith("_c4"):
        body, width = C4(backbone), backbone.num_channels[-1]
        anchors, top_n, pad = Anchors((tuple(sizes),), (ratios,)), (12000, 6000, 2 * passed, passed), 16
        pool, features = AlignedRoIAlign({"0": 16}, 14), width
        res5 = nn.Sequential(OrderedDict(layer4=backbone.body.layer4, norm=nn.BatchNorm2d(width)))         # MoCo's extra norm
        head = nn.Sequential(OrderedDict(res5=res5, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))
    else:
        width, features, norm = cfg.fpn_channels, cfg.head_dim, nn.BatchNorm2d if cfg.box_head == "4conv1fc" else None
        body = BackboneWithFPN(backbone.body, {f"layer{i + 1}": str(i) for i in range(4)}, backbone.num_channels, width, LastLevelMaxPool(),
                               nn.BatchNorm2d)
        anchors, top_n, pad = Anchors(tuple((s,) for s in sizes), (ratios,) * 5), (2000, 1000, passed, passed), 64
        pool, mask_pool = (AlignedRoIAlign({"0": 4, "1": 8, "2": 16, "3": 32}, size) for size in (7, 14))
        head = TwoMLPHead(width * 49, features) if norm is None else FastRCNNConvFCHead((width, 7, 7), [width] * 4, [features], norm)
        mask_head = MaskRCNNHeads(width, [width] * 4, 1, norm) if masks else None
    if masks:
        mask_predictor = MaskRCNNPredictor(width, cfg.fpn_channels, rows)
    pre_nms, post_nms = ({"training": top_n[i], "testing": top_n[i + 1]} for i in (0, 2))
    rpn = RPN(anchors, RPNHead(body.out_channels, anchors.num_anchors_per_location()[0]), 0.7, 0.3, 256, 0.5, pre_nms, post_nms, 0.7)
    heads = RCNNHeads(pool, head, FastRCNNPredictor(features, rows), 0.5, 0.5, cfg.rois_per_image, 0.25, None, 0.05, 0.5, 100,
                      mask_pool if masks else None, mask_head, mask_predictor)
    start_predictors(heads)
    for module in (rpn.head, heads.box_predictor):
        module.register_forward_hook(in_float)
    return GeneralizedRCNN(body, rpn, heads, Prepared(pad))


def start_predictors(heads: RCNNHeads) -> None:
    """detectron2's start: class scores N(0, .01), boxes and masks N(0, .001), fully connected layers uniform by their inputs, no bias anywhere."""
    last = [(heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)]
    if heads.has_mask():
        nn.init.zeros_(heads.mask_predictor.conv5_mask.bias)
        last.append((heads.mask_predictor.mask_fcn_logits, 0.001))
    for layer in (m for m in heads.box_head.modules() if isinstance(m, nn.Linear)):
        nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.zeros_(layer.bias)
    for layer, std in last:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def paste_masks(masks: Tensor, boxes_xyxy: Tensor, hw: tuple[int, int]) -> Tensor:
    """Probabilities [n, 1, S, S] in boxes [n, 4] px -> bool [n, h, w]: 1/2 or more at a pixel's centre (torchvision draws one row too many)."""
    pasted = torch.zeros(len(masks), *hw, dtype=torch.bool)
    for out, mask, (x1, y1, x2, y2) in zip(pasted, masks, boxes_xyxy.tolist()):
        left, top, right, bottom = max(int(x1) - 1, 0), max(int(y1) - 1, 0), min(math.ceil(x2) + 1, hw[1]), min(math.ceil(y2) + 1, hw[0])
        x = (torch.arange(left, right) + 0.5 - x1) / max(x2 - x1, 1e-6) * 2 - 1
        y = (torch.arange(top, bottom) + 0.5 - y1) / max(y2 - y1, 1e-6) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)           # [rows, columns, (x, y)]
        out[top:bottom, left:right] = F.grid_sample(mask[None].float(), grid[None], align_corners=False)[0, 0] >= 0.5
    return pasted


def rcnn_trunk(model: nn.Module) -> nn.Module:
    """The whole ResNet of a detector of build_rcnn: children conv1, bn1, layer1..layer4 (C4 keeps the last in its head)."""
    stages = dict(model.backbone.body.named_children())
    return nn.ModuleDict(stages if "layer4" in stages else stages | {"layer4": model.roi_heads.box_head.res5.layer4})


# ==== Matching, losses, post-processing ============================================================================

class HungarianMatcher:
    """One-to-one assignment of predictions to targets with the least total cost (DETR, Eq. 1).

    Class cost: minus the softmax probability of the target's class (DETR), or the focal cost (Conditional and Deformable DETR).
    """

    def __init__(self, cost_class: float = 2.0, cost_bbox: float = 5.0, cost_giou: float = 2.0, focal: bool = True):
        self.cost_class, self.cost_bbox, self.cost_giou, self.focal = cost_class, cost_bbox, cost_giou, focal

    @torch.no_grad()
    def costs(self, outputs: dict[str, Tensor], targets: list[dict]) -> list[Tensor]:
        """Cost matrix [Q, n] of every image."""
        matrices = []
        for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets):
            p = (logits.sigmoid() if self.focal else logits.softmax(-1))[:, target["labels"]]             # [Q, n]
            positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
            negative = 0.75 * p ** 2 * -(1 - p + 1e-8).log()
            class_cost = positive - negative if self.focal else -p
            l1 = torch.cdist(boxes, target["boxes"], p=1)
            giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(target["boxes"], "cxcywh", "xyxy"))
            matrices.append(self.cost_class * class_cost + self.cost_bbox * l1 - self.cost_giou * giou)
        return matrices

    def __call__(self, layers: list[dict[str, Tensor]], targets: list[dict]) -> list[list[tuple[Tensor, Tensor]]]:
        """Per decoder layer, per image: (query indices ascending, target indices), int64 on the outputs' device; min(Q, n) pairs.

        What a query costs does not depend on the others, so all layers' queries are compared side by side, and one transfer brings all costs of a
        step from the device, one brings all pairs back.
        """
        costs = self.costs({k: torch.cat([layer[k] for layer in layers], 1) for k in ("pred_logits", "pred_boxes")}, targets)
        costs = [cost.unflatten(0, (len(layers), len(cost) // len(layers))) for cost in costs]   # per image [layers, Q, n]
        flat = torch.cat([c.flatten() for c in costs]).cpu()
        if not np.isfinite(flat.numpy()).all():
            raise FloatingPointError("the matching cost is not finite: the model's outputs have become NaN or infinite")
        costs_on_cpu = [part.view(c.shape).numpy() for part, c in zip(flat.split([c.numel() for c in costs]), costs)]
        solved = [indices for layer in range(len(layers)) for cost in costs_on_cpu for indices in linear_sum_assignment(cost[layer])]
        moved = send(torch.from_numpy(np.concatenate(solved)), costs[0].device).split([len(indices) for indices in solved])
        pairs = list(zip(moved[0::2], moved[1::2]))
        return [pairs[i:i + len(targets)] for i in range(0, len(pairs), len(targets))]


def normalizer(count: float, device: torch.device) -> Tensor:
    """What a process divides its summed loss by, so that DDP's average of gradients is the gradient of one process on the whole batch:
    the count over all processes (at least 1) / world size. A tensor [] that stays on the device: nobody waits for it."""
    return all_reduce_sum(torch.full((), float(count), device=device)).clamp(min=1) / world_size()


class SetCriterion(nn.Module):
    """Loss of a set of predictions: matching, then classification, L1 and GIoU on the matched boxes, on every decoder layer.

    Classification is the focal loss, or (matcher.focal False) softmax cross-entropy with weight `eos_coef` on "no object", the last row.
    weight_feature > 0: every layer's pred_features are also drawn to the `features` of the matched targets.
    forward returns (losses, pairs): unweighted terms `loss_ce`, `loss_bbox`, `loss_giou`, `loss_feature`, for earlier layer i with suffix `_i`, the
    log values `class_error` and `cardinality_error`; and the last layer's assignment. `total(losses)` is their weighted sum.
    """

    def __init__(self, matcher: HungarianMatcher, weight_class: float = 2.0, weight_bbox: float = 5.0, weight_giou: float = 2.0, *,
                 weight_feature: float = 0.0, eos_coef: float = 0.1):
        super().__init__()
        self.matcher, self.eos_coef = matcher, eos_coef
        self.weight = {"loss_ce": weight_class, "loss_bbox": weight_bbox, "loss_giou": weight_giou, "loss_feature": weight_feature}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum over all layers; a name that has no weight is a log value."""
        weighted = [value * self.weight[name] for key, value in losses.items() if (name := re.sub(r"_\d+$", "", key)) in self.weight]
        return torch.stack(weighted).sum()

    def class_weight_sum(self, counts: list[int], num_queries: int) -> float:
        """What the weighted mean of the softmax loss divides by, for images with these numbers of targets. `normalizer` of it makes the mean
        independent of how a batch is split; the released codes take the mean of each process (class_weight None below)."""
        return sum(min(n, num_queries) + self.eos_coef * max(num_queries - n, 0) for n in counts)

    def forward(self, outputs: dict[str, Any], targets: list[dict], num_boxes: float | Tensor, class_weight: float | Tensor | None = None
                ) -> tuple[dict[str, Tensor], list]:
        layers = [outputs, *outputs.get("aux_outputs", [])]
        pairs, *aux_pairs = self.matcher(layers, targets)                     # every layer is matched anew
        losses = self.losses(outputs, targets, pairs, num_boxes, class_weight)
        for i, (aux, matched) in enumerate(zip(layers[1:], aux_pairs)):
            layer_losses = self.losses(aux, targets, matched, num_boxes, class_weight)
            losses |= {f"{k}_{i}": v for k, v in layer_losses.items() if k != "class_error"}
        return losses, pairs

    def losses(self, outputs: dict[str, Tensor], targets: list[dict], pairs: list, num_boxes: float, class_weight: float | None = None
               ) -> dict[str, Tensor]:
        """The terms of one layer for a given assignment."""
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]         # [B, Q, rows], [B, Q, 4]
        index = matched_index(pairs)
        labels = torch.cat([t["labels"][j] for t, (_, j) in zip(targets, pairs)])
        target_boxes = torch.cat([t["boxes"][j] for t, (_, j) in zip(targets, pairs)])
        matched = boxes[index]
        giou = torch.diag(generalized_box_iou(box_convert(matched, "cxcywh", "xyxy"), box_convert(target_boxes, "cxcywh", "xyxy")))
        losses = {
            "loss_ce": self.class_loss(logits, index, labels, num_boxes, class_weight),
            "loss_bbox": F.l1_loss(matched, target_boxes, reduction="sum") / num_boxes,
            "loss_giou": (1 - giou).sum() / num_boxes,
        }
        if self.weight["loss_feature"]:
            features = torch.cat([t["features"][j] for t, (_, j) in zip(targets, pairs)])
            difference = F.normalize(outputs["pred_features"][index], dim=-1) - F.normalize(features, dim=-1)
            losses["loss_feature"] = difference.square().sum() / num_boxes    # = mean of 2 - 2 cos: UP-DETR, Eq. (2); Siamese DETR, Eq. (12)
        with torch.no_grad():
            right = (logits[index].argmax(-1) == labels).float()
            losses["class_error"] = 100 - 100 * right.mean() if len(labels) else logits.new_tensor(100.0)
            counted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1).float()
            given = send(torch.tensor([float(len(t["labels"])) for t in targets]), logits.device)
            losses["cardinality_error"] = (counted - given).abs().mean()
        return losses

    def class_loss(self, logits: Tensor, index: tuple[Tensor, Tensor], labels: Tensor, num_boxes: float, class_weight: float | None) -> Tensor:
        if self.matcher.focal:
            onehot = torch.zeros_like(logits)
            onehot[(*index, labels)] = 1.0
            return sigmoid_focal_loss(logits, onehot, alpha=0.25, gamma=2).sum() / num_boxes
        wanted = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)
        wanted[index] = labels
        weight = logits.new_ones(logits.shape[-1])
        weight[-1] = self.eos_coef
        loss = F.cross_entropy(logits.transpose(1, 2), wanted, weight, reduction="sum")
        return loss / (weight[wanted].sum() if class_weight is None else class_weight)


def matched_index(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(image index, query index) of all matched predictions of a batch, ready to index [B, Q, ...]."""
    return torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)]), torch.cat([q for q, _ in pairs])


@torch.no_grad()
def top_detections(logits: Tensor, boxes_xyxy: Tensor, top: int = 100, focal: bool = True) -> dict[str, Tensor]:
    """Detections of one image: {"scores" [k], "labels" [k], "boxes" [k, 4]}; no threshold, no NMS.

    focal: the `top` best of all Q x C sigmoid scores; a query may appear more than once, with different labels.
    Softmax (DETR): every query once, in its order, with its best class that is not "no object", the last row.
    """
    if not focal:
        scores, labels = logits.softmax(-1)[:, :-1].max(-1)
        return {"scores": scores, "labels": labels, "boxes": boxes_xyxy}
    scores, flat = logits.sigmoid().flatten().topk(min(top, logits.numel()))
    return {"scores": scores, "labels": flat % logits.shape[-1], "boxes": boxes_xyxy[flat // logits.shape[-1]]}


def boxes_to_pixels(boxes: Tensor, sizes_hw: Tensor) -> Tensor:
    """cxcywh in 0..1 [B, Q, 4] -> xyxy pixels of images of sizes_hw [B, 2] (height, width)."""
    return box_convert(boxes, "cxcywh", "xyxy") * sizes_hw.to(boxes).flip(-1).repeat(1, 2)[:, None]


def post_process(outputs: dict[str, Tensor], sizes_hw: Tensor, top: int = 100, focal: bool = True) -> list[dict[str, Tensor]]:
    """Detections of a batch in pixels of the original images (released PostProcess); see top_detections."""
    boxes = boxes_to_pixels(outputs["pred_boxes"], sizes_hw)
    return [top_detections(l, b, top, focal) for l, b in zip(outputs["pred_logits"], boxes)]


# ==== Optimisation =================================================================================================

def param_groups(model: nn.Module, lr: float, lr_backbone: float, lr_linear_proj_mult: float = 0.1) -> list[dict]:
    """The three groups of the released DETReg / Deformable DETR: everything else, backbone, sampling offsets and reference points (the last has
    no members in DETR and Conditional DETR).

    Weight decay falls on all parameters, biases and norms included, as released. `base_lr` is what a schedule multiplies.
    """
    groups = [{"lr": lr}, {"lr": lr_backbone}, {"lr": lr * lr_linear_proj_mult}]
    for group in groups:
        group |= {"base_lr": group["lr"], "names": [], "params": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[1 if "backbone.0" in name else 2 if re.search("reference_points|sampling_offsets", name) else 0]
            group["names"].append(name)
            group["params"].append(parameter)
    return groups


def can_fuse(model: nn.Module) -> bool:
    """May one kernel update all parameters of a group? 9 ms rather than 47 ms of the DETReg demo's step on CPU."""
    return next(model.parameters()).device.type in ("cpu", "cuda")


def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as released."""
    groups = param_groups(model, cfg.lr, cfg.lr_backbone, cfg.lr_linear_proj_mult)
    return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=can_fuse(model))


def build_sgd(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """SGD as detectron2 trains the R-CNN family: no weight decay on the scale and shift of norms, all else decays, biases too."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    owner = {f"{name}.{key}": module for name, module in model.named_modules() for key, _ in module.named_parameters(recurse=False)}
    groups = [{"weight_decay": cfg.weight_decay, "base_lr": cfg.lr, "names": [], "params": []},
              {"weight_decay": 0.0, "base_lr": cfg.lr, "names": [], "params": []}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[isinstance(owner[name], norms)]
            group["names"].append(name)
            group["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, cfg.lr, momentum=cfg.sgd_momentum, fused=can_fuse(model))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's base rate; returns the first group's rate, for the log."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def step_schedule(step: int, steps_per_epoch: int, drop_epochs: tuple[float, ...]) -> float:
    """Learning rate factor: x 0.1 at the start of each epoch in drop_epochs. A pure function of the step: nothing to save, nothing to lose."""
    return 0.1 ** sum(step >= drop * steps_per_epoch for drop in drop_epochs)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, momentum: float) -> None:
    """average = m average + (1 - m) model, of parameters only: the average's BatchNorm statistics are its own (MoCo; SoCo, released)."""
    averages = list(average.parameters())
    torch._foreach_mul_(averages, momentum)                                  # all at once: two kernels, not two per parameter
    torch._foreach_add_(averages, list(model.parameters()), alpha=1 - momentum)


def warmup_step_schedule(step: int, total_steps: int, warmup: int, drops: tuple[float, ...]) -> float:
    """Learning rate factor of detectron2: linear from 1/1000 over `warmup` steps, x 0.1 at each of `drops` (shares of total_steps)."""
    start = min(1.0, 1e-3 + (1 - 1e-3) * step / warmup) if warmup else 1.0
    return start * 0.1 ** sum(step >= round(drop * total_steps) for drop in drops)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradient to max_norm (0 = do not clip); returns its norm before, [] on the device."""
    return torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_norm or math.inf)


class FiniteWatch:
    """Ends a run whose loss or gradient is not finite, naming the terms and the images (`name_of` their batch["index"]) and leaving the batch in the
    output folder. The same command goes on from the last checkpoint and, as everything is seeded, arrives there again.

    A step's numbers are looked at when the next has been started, so that nothing waits for the device: `settle` before anything is written.
    """

    def __init__(self, out: Path, name_of: Callable[[int], str]):
        self.out, self.name_of = out, name_of
        self.pending: tuple | None = None                                    # step, names, values, when they are copied, batches

    @contextlib.contextmanager
    def step(self, step: int, batches: list[dict]):
        """Around a training step; give its terms, which hold `loss` and `grad_norm`, to the function that this yields."""
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
        raise FloatingPointError(f"step {step}: {reason}; images of this process: {shown}; its batch is kept in {path}, and the last checkpoint is "
                                 "untouched") from cause
