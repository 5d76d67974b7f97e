"""What the methods stand on: processes, ResNet, position encodings, the DETR family, deformable attention, matching,
losses, post-processing, optimiser groups and schedules.

Shape legend, used in every file. B images, Q object queries, C classes, D channels, L feature levels, P sampling points
per level, M attention heads, S = sum over levels of H_l * W_l, n boxes of one image. Batch first everywhere.
Box formats: `boxes_xyxy` [n, 4] pixels; `boxes` and `pred_boxes` [..., 4] (cx, cy, w, h) as fractions of the image.
Masks: True = padding. A target is a dict {"labels": int64 [n], "boxes": float32 [n, 4] cxcywh in 0..1, ...}.

Module names follow the released DETR (Carion et al., ECCV 2020, arXiv 2005.12872), Conditional DETR (Meng et al., ICCV
2021, arXiv 2108.06152) and Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159), so that their checkpoints load by
name. Sections 1 to 9 have every computation in its plain form. Where a faster form of it exists, that stands in section
10, together with what it must equal.
"""
from __future__ import annotations

import contextlib
import copy
import ctypes
import datetime
import functools
import inspect
import itertools
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Callable

# Read when torch is loaded: threads must not spin for long on cores that the loader needs; huge pages for large tensors
# (a DETReg step on CPU: -8 %).
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
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d, box_convert, generalized_box_iou, sigmoid_focal_loss

try:
    import deformops.registry  # optional: see deformable_attention_for
except ImportError:
    deformops = None

# Of WeightedRows; of DistributedDataParallel, about dimensions of length 1, where strides mean nothing.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")


class UserError(Exception):
    """Bad input. The message says what was wrong, where, and what to do; a script prints it and exits with 2."""


# ==== 1. Processes ====


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def setup_distributed(device: str = "auto") -> torch.device:
    """Join the processes torchrun started (NCCL on CUDA, gloo on CPU); a plain `python script.py` is the same path with
    one process. UserError: a device that is not there, an environment that torchrun has not made.

    A process waits at most $PROCESS_TIMEOUT seconds for the others, 30 minutes by default. Where its torchrun ends, it
    is stopped as by SIGTERM (on Linux).
    """
    joins = "RANK" in os.environ and not dist.is_initialized()
    found = find_device(device, joins or dist.is_initialized())
    if joins:
        try:
            timeout = datetime.timedelta(seconds=float(os.environ.get("PROCESS_TIMEOUT", 1800)))
        except ValueError as error:
            raise UserError(f"PROCESS_TIMEOUT={os.environ['PROCESS_TIMEOUT']}: give a number of seconds") from error
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = {name: os.environ.get(name, "") for name in names}
        number, count, port = (int(v) if v.isdecimal() else -1 for v in map(values.get, (names[0], names[1], names[3])))
        if not 0 <= number < count or port < 0 or not values["MASTER_ADDR"]:
            given = ", ".join(f"{name} {value or 'not set'}" for name, value in values.items())
            raise UserError(f"the environment says that this is one of several processes, but not of which ({given}): "
                            "start them with torchrun, or `unset RANK` for a single one")
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        store, number, count = next(dist.rendezvous("env://", timeout=timeout))
        # a restart by torchrun finds the addresses of the attempt before in it
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo", store=store, rank=number, world_size=count,
                                timeout=timeout)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def find_device(name: str, one_of_several: bool = False) -> torch.device:
    """The device of --device; auto: CUDA, else Apple's GPU (one process alone: gloo cannot send its tensors), else the
    CPU. UserError: it is not there."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()),
              "xpu": torch.xpu.device_count(), "cpu": 1}
    usable = {kind: count for kind, count in counts.items() if count and not (kind == "mps" and one_of_several)}
    wanted = next(iter(usable)) if name == "auto" else name
    kind, _, index = wanted.partition(":")
    if wanted == "cuda" and one_of_several:
        index = os.environ.get("LOCAL_RANK", "")
        wanted = f"cuda:{index}" if index else wanted
    if kind not in usable or index and not (index.isdecimal() and int(index) < usable[kind]):
        there = ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in usable.items())
        of_process = f" (of this process: {wanted})" if wanted != name else ""
        raise UserError(f"--device {name}{of_process}: this PyTorch sees no such device here, but {there}; give one of "
                        "these, or auto")
    return torch.device(wanted)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over processes, on a copy and without gradient (a normaliser or a log value, never part of the graph)."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast_buffers(model: nn.Module) -> None:
    """Every process takes rank 0's buffers, those of the checkpoint, before it measures: BatchNorm's statistics may be
    a process's own. Weights agree already."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wrap_model(model: nn.Module, device: torch.device, *, sync_bn: bool = True, compiled: bool = False,
               checkpointed: bool = False) -> nn.Module:
    """DistributedDataParallel at world size > 1, after turning trained BatchNorm into SyncBatchNorm where CUDA is (it
    raises on CPU).

    sync_bn False: BatchNorm keeps the statistics of each process. Buffers are never sent around: those that must agree
    are computed alike. compiled: the layers of the transformer and the blocks of a ResNet whose norms learn, by
    torch.compile, once for all that are alike and for images of any size. checkpointed: those of these layers and of
    all blocks that learn keep for the gradient only their inputs, see `recompute`.
    """
    if world_size() > 1 and device.type == "cuda" and sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, (DETREncoderLayer, ConditionalDecoderLayer, DeformableEncoderLayer,
                               DeformableDecoderLayer, BasicBlock, Bottleneck)):
            if checkpointed and any(p.requires_grad for p in module.parameters()):
                form = type(module).forward
                module.forward = functools.partial(recompute, module,
                                                   torch.compile(form, dynamic=True) if compiled else form)
            elif compiled:
                module.compile(dynamic=True)
    if world_size() == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel
    # renamed in torch 2.15
    buffers = next(k for k in ("forward_sync_buffers", "broadcast_buffers") if k in inspect.signature(ddp).parameters)
    return ddp(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True,
               **{buffers: False})


def recompute(module: nn.Module, form: Callable[..., Tensor], *args: Any) -> Tensor:
    """form(module, *args), whose inner activations are computed once more for the gradient rather than kept (Chen et
    al., arXiv 1604.06174): the same values, dropout included, and BatchNorm counts a batch once."""
    if not torch.is_grad_enabled():
        return form(module, *args)
    passes = itertools.count()

    def run_form(*args: Any) -> Tensor:
        with kept_statistics(module) if next(passes) else contextlib.nullcontext():
            return form(module, *args)

    return checkpoint(run_form, *args, use_reentrant=False)


@contextlib.contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Meanwhile BatchNorm in training normalises as always, but its running statistics stay as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count


def gradient_sync(model: nn.Module, last_micro_batch: bool) -> contextlib.AbstractContextManager:
    """Context of a micro-batch's backward: processes average gradients in the last of an accumulated batch only."""
    return contextlib.nullcontext() if last_micro_batch or world_size() == 1 else model.no_sync()


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Boxes, sampling locations, matching and losses stay fp32 inside. fp16 needs a scaled loss, see `backward`."""
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")


@functools.cache
def constant_tensor(values: tuple, device: torch.device) -> Tensor:
    """A few numbers on the device. Copying waits for all that it has to do: so once, not in every step."""
    return torch.tensor(values, device=device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor made on the host, to the device, without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def batch_to_device(batch: Any, device: torch.device) -> Any:
    """All tensors of a loader's batch, in whatever dicts and lists, to the device, without waiting."""
    if isinstance(batch, dict):
        return {k: batch_to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, list):
        return [batch_to_device(v, device) for v in batch]
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch


# ==== 2. Backbone ====


class Backbone(nn.Module):
    """ResNet-18/34/50/101 without its classifier; returns the outputs of the wanted stages.

    layers: which of layer1..layer4 (strides 4, 8, 16, 32) to return; the network stops after the last of them.
    norm: "frozen" = BatchNorm with constant statistics and affine (released DETR family), "bn" = ordinary BatchNorm.
    trainable: how many of the five stages (conv1, layer1..layer4) learn, counted from the end; 3 = layer2-4 (DETR
    family), 0 = none, 5 = all.
    """

    def __init__(self, arch: str = "resnet50", layers: tuple[int, ...] = (2, 3, 4), norm: str = "frozen",
                 trainable: int = 3):
        super().__init__()
        norm_layer = FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
        resnet = getattr(torchvision.models, arch)(weights=None, norm_layer=norm_layer)
        stages = dict(resnet.named_children())
        self.body = nn.Sequential()
        for name in ("conv1", "bn1", "relu", "maxpool", *(f"layer{i}" for i in range(1, max(layers) + 1))):
            self.body.add_module(name, stages[name])
        self.arch = arch
        self.layers = tuple(f"layer{i}" for i in layers)
        width = resnet.fc.in_features // 8  # 64 for basic blocks, 256 for bottlenecks
        self.num_channels = [width * 2 ** (i - 1) for i in layers]
        trained = ("layer4", "layer3", "layer2", "layer1", "conv1")[:trainable] + (("bn1",) if trainable == 5 else ())
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in trained)
        if norm == "frozen":
            self.body.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Backbone:
        """A backbone of which nothing learns stays in evaluation mode: its BatchNorm statistics are constant too."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def forward(self, images: Tensor) -> list[Tensor]:  # [B, 3, H, W] -> [[B, D_l, H/s, W/s], ...]
        return run_stages(self.body.named_children(), images, self.layers)


def run_stages(stages: Iterable[tuple[str, nn.Module]], images: Tensor, layers: tuple[str, ...]) -> list[Tensor]:
    """Run a ResNet's children one after another; the outputs of those called `layers`."""
    stages = dict(stages)
    if isinstance(stages.get("bn1"), FrozenBatchNorm2d):
        return run_frozen_stages(stages, images, layers)
    # On CPU not channels last: statistics of a map of 112 x 112 would be off by 1e-4 rather than 1e-6.
    x = images.contiguous(memory_format=torch.channels_last) if images.is_cuda else images
    outputs = []
    for name, stage in stages.items():
        x = stage(x)
        if name in layers:
            outputs.append(x)
    return outputs


# ==== 3. Position encoding ====


class PositionEmbeddingSine(nn.Module):
    """Sine encoding of the pixel position, padding not counted (DETR, Sec. A.4). Output [B, 2 * num_pos_feats, H, W]:
    y block, then x block.

    offset: -0.5 puts positions on pixel centres, as Deformable DETR does; DETR has 0.
    """

    def __init__(self, num_pos_feats: int, offset: float = -0.5, normalize: bool = True, temperature: float = 10000.0):
        super().__init__()
        self.num_pos_feats, self.temperature = num_pos_feats, temperature
        self.offset, self.normalize = offset, normalize

    def forward(self, mask: Tensor) -> Tensor:  # [B, H, W] bool
        valid = (~mask).float()
        y, x = valid.cumsum(1), valid.cumsum(2)
        if self.normalize:
            y = (y + self.offset) / (y[:, -1:, :] + 1e-6) * 2 * math.pi
            x = (x + self.offset) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        i = torch.arange(self.num_pos_feats, device=mask.device)
        frequency = self.temperature ** (2 * (i // 2) / self.num_pos_feats)
        axes = []
        for angle in (y[..., None] / frequency, x[..., None] / frequency):
            # [B, H, W, feats]; even channels sin, odd cos
            axes.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(3))
        return torch.cat(axes, 3).permute(0, 3, 1, 2)


def sine_embedding(points: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Points [..., 2] (x, y) in 0..1 -> [..., channels]: y half, x half, sin and cos interleaved (Conditional DETR)."""
    half = channels // 2
    frequency = temperature ** (2 * (torch.arange(half, device=points.device) // 2) / half)
    angle = points.flip(-1)[..., None] * 2 * math.pi / frequency  # [..., 2, half]
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-3)


# ==== 4. DETR and Conditional DETR ====


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


def xavier_init(module: nn.Module) -> None:
    """All weight matrices from Xavier's uniform distribution; vectors stay as they are."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


class DETREncoderLayer(nn.Module):
    """Self-attention over all pixels, then a feed-forward network (DETR, Sec. A.3). post-norm: x = norm(x + f(x));
    pre-norm: x = x + f(norm(x)). The position is added to queries and keys only, after the norm."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_heads: int, pre_norm: bool):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)
        self.norm1, self.norm2 = (nn.LayerNorm(d_model) for _ in range(2))
        self.dropout = Dropout(dropout)
        self.pre_norm = pre_norm

    def residual(self, x: Tensor, norm: nn.LayerNorm, block: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.dropout(block(norm(x))) if self.pre_norm else norm(x + self.dropout(block(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))

    def forward(self, x: Tensor, pos: Tensor, padding: Tensor) -> Tensor:  # [B, S, D], [B, S, D], [B, S]
        def self_attention(y: Tensor) -> Tensor:
            return self.self_attn(y + pos, y + pos, y, key_padding_mask=padding, need_weights=False)[0]

        x = self.residual(x, self.norm1, self_attention)
        return self.residual(x, self.norm2, self.feed_forward)


class DETREncoder(nn.Module):
    def __init__(self, layers: int, d_model: int, d_ffn: int, dropout: float, n_heads: int, pre_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(DETREncoderLayer(d_model, d_ffn, dropout, n_heads, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model) if pre_norm else nn.Identity()

    def forward(self, x: Tensor, pos: Tensor, padding: Tensor) -> Tensor:  # [B, S, D], [B, S, D], [B, S] -> [B, S, D]
        for layer in self.layers:
            x = layer(x, pos, padding)
        return self.norm(x)


class DETRDecoderLayer(DETREncoderLayer):
    """Self-attention among queries, attention into the image, feed-forward network (DETR, Sec. A.3)."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_heads: int, pre_norm: bool):
        super().__init__(d_model, d_ffn, dropout, n_heads, pre_norm)
        self.multihead_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, query_pos: Tensor, memory: Tensor, pos: Tensor, padding: Tensor,
                self_mask: Tensor | None) -> Tensor:
        def self_attention(y: Tensor) -> Tensor:
            return self.self_attn(y + query_pos, y + query_pos, y, attn_mask=self_mask, need_weights=False)[0]

        def cross_attention(y: Tensor) -> Tensor:
            return self.multihead_attn(y + query_pos, memory + pos, memory, key_padding_mask=padding,
                                       need_weights=False)[0]

        x = self.residual(x, self.norm1, self_attention)
        x = self.residual(x, self.norm2, cross_attention)
        return self.residual(x, self.norm3, self.feed_forward)


class DETRDecoder(nn.Module):
    """query_pos [B, Q, D], memory and pos [B, S, D], padding [B, S] -> hs [layers, B, Q, D], no reference points."""

    def __init__(self, layers: int, d_model: int, d_ffn: int, dropout: float, n_heads: int, pre_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(DETRDecoderLayer(d_model, d_ffn, dropout, n_heads, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)  # on the output of every layer, the next layer sees it without

    def forward(self, query_pos: Tensor, memory: Tensor, pos: Tensor, padding: Tensor,
                self_mask: Tensor | None) -> tuple[Tensor, None]:
        x = torch.zeros_like(query_pos)
        hs = []
        for layer in self.layers:
            x = layer(x, query_pos, memory, pos, padding, self_mask)
            hs.append(self.norm(x))
        return torch.stack(hs), None


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, dropout: float, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention of [B, Q, E], [B, S, E], [B, S, D], cut into heads here; mask broadcasts to
    [B, M, Q, S], True = not seen. Returns [B, Q, D]."""
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, None if mask is None else ~mask, dropout)
    return output.transpose(1, 2).flatten(2)


class ConditionalDecoderLayer(nn.Module):
    """Decoder layer whose cross-attention compares content with content and place with place: per head, queries are
    [content; place], and so are keys (Conditional DETR, Sec. 3.3, Eq. 5). The learned position enters the content only
    in the first layer."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_heads: int, first: bool):
        super().__init__()
        self.n_heads = n_heads
        self.attention_dropout = dropout
        for name in ("sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v", "ca_qcontent", "ca_kcontent",
                     "ca_kpos", "ca_v", "ca_qpos_sine"):
            self.add_module(f"{name}_proj", nn.Linear(d_model, d_model))
        self.ca_qpos_proj = nn.Linear(d_model, d_model) if first else None
        self.self_attn, self.cross_attn = (nn.ModuleDict({"out_proj": nn.Linear(d_model, d_model)}) for _ in range(2))
        self.linear1, self.linear2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))
        self.dropout = Dropout(dropout)
        for attn in (self.self_attn, self.cross_attn):
            nn.init.zeros_(attn["out_proj"].bias)

    def forward(self, x: Tensor, query_pos: Tensor, query_sine: Tensor, memory: Tensor, pos: Tensor, padding: Tensor,
                self_mask: Tensor | None) -> Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        query = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos)
        key = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos)
        attended = attention(query, key, self.sa_v_proj(x), self.n_heads, dropout, self_mask)
        x = self.norm1(x + self.dropout(self.self_attn["out_proj"](attended)))
        query = self.ca_qcontent_proj(x)
        key = self.ca_kcontent_proj(memory)
        key_pos = self.ca_kpos_proj(pos)
        if self.ca_qpos_proj is not None:
            query = query + self.ca_qpos_proj(query_pos)
            key = key + key_pos
        # head by head, content and place side by side: [B, Q or S, 2D]
        heads = (self.n_heads, -1)
        query = torch.cat([t.unflatten(-1, heads) for t in (query, self.ca_qpos_sine_proj(query_sine))], -1).flatten(2)
        key = torch.cat([t.unflatten(-1, heads) for t in (key, key_pos)], -1).flatten(2)
        attended = attention(query, key, self.ca_v_proj(memory), self.n_heads, dropout, padding[:, None, None])
        x = self.norm2(x + self.dropout(self.cross_attn["out_proj"](attended)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class ConditionalDecoder(nn.Module):
    """Looks for each query around a reference point that follows from the query alone (Conditional DETR, Fig. 3).
    As DETRDecoder, but returns the reference points too, [B, Q, 2] in 0..1."""

    def __init__(self, layers: int, d_model: int, d_ffn: int, dropout: float, n_heads: int):
        super().__init__()
        self.layers = nn.ModuleList(ConditionalDecoderLayer(d_model, d_ffn, dropout, n_heads, first=i == 0)
                                    for i in range(layers))
        self.norm = nn.LayerNorm(d_model)
        # of the layers after the first: one layer alone has no use for it, and a file of it keeps the name
        self.query_scale = MLP(d_model, d_model, d_model, 2).requires_grad_(layers > 1)
        self.ref_point_head = MLP(d_model, d_model, 2, 2)

    def forward(self, query_pos: Tensor, memory: Tensor, pos: Tensor, padding: Tensor,
                self_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(query_pos.device.type, enabled=False):
            reference = self.ref_point_head(query_pos.float()).sigmoid()  # [B, Q, 2], the same in all layers
            sine = sine_embedding(reference, query_pos.shape[-1])
        x = torch.zeros_like(query_pos)
        hs = []
        for i, layer in enumerate(self.layers):
            query_sine = sine if i == 0 else sine * self.query_scale(x)  # Eq. (2) there: lambda_q = T * p_s
            x = layer(x, query_pos, query_sine, memory, pos, padding, self_mask)
            hs.append(self.norm(x))
        return torch.stack(hs), reference


class DETRTransformer(nn.Module):
    """Encoder over the pixels of one map, decoder over object queries: DETR's (DETR, Fig. 2), or, `conditional`,
    Conditional DETR's, whose decoder has post-norm only, as released."""

    def __init__(self, d_model: int = 256, nhead: int = 8, enc_layers: int = 6, dec_layers: int = 6,
                 dim_feedforward: int = 2048, dropout: float = 0.1, pre_norm: bool = False, conditional: bool = False):
        super().__init__()
        self.d_model = d_model
        layer = (d_model, dim_feedforward, dropout, nhead)
        self.encoder = DETREncoder(enc_layers, *layer, pre_norm)
        self.decoder = (ConditionalDecoder(dec_layers, *layer) if conditional
                        else DETRDecoder(dec_layers, *layer, pre_norm))
        xavier_init(self)

    def forward(self, source: Tensor, mask: Tensor, position: Tensor, query_embed: Tensor,
                self_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """source, position [B, D, H, W]; mask [B, H, W] True = padding; query_embed [Q, D] or, per image, [B, Q, D];
        self_mask [Q, Q] True = query i may not look at query j. Returns hs [layers, B, Q, D], reference points
        [B, Q, 2] in 0..1 or None, memory [B, D, H, W]."""
        x, pos, padding = (t.flatten(2).transpose(1, 2) for t in (source, position, mask[:, None]))
        padding = padding[..., 0]  # [B, S]
        memory = self.encoder(x, pos, padding)
        queries = query_embed.expand(len(x), *query_embed.shape[-2:])
        hs, reference = self.decoder(queries, memory, pos, padding, self_mask)
        return hs, reference, memory.transpose(1, 2).unflatten(2, source.shape[-2:])


# ==== 5. Deformable DETR ====


def multi_scale_deformable_attention(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor,
                                     weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples (Deformable DETR, Eq. 3), without a compiled operator.

    value [B, S, M, D]; shapes (H_l, W_l) per level; locations [B, Q, M, L, P, 2] as (x, y), 0..1 spans a level's map,
    outside counts as zero; weights [B, Q, M, L, P]. Returns [B, Q, M * D]. Levels are accumulated one by one: the
    samples of all levels never exist together.
    """
    B, S, M, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    value = value.permute(0, 2, 3, 1).reshape(B * M, D, S)  # one copy; a level is then a view of it
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # [B*M, Q, L, P, 2] in -1..1
    weights = weights.transpose(1, 2).reshape(B * M, 1, Q, -1, P)  # [B*M, 1, Q, L, P]
    output, start = 0.0, 0
    for level, (H, W) in enumerate(shapes):
        v = value[:, :, start:start + H * W].unflatten(2, (H, W))
        samples = F.grid_sample(v, grid[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False)
        output = output + (samples * weights[:, :, :, level]).sum(-1)  # [B*M, D, Q]
        start += H * W
    return output.view(B, M * D, Q).transpose(1, 2)


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
        """Head m looks in direction 2 pi m / M, point p at p + 1 pixels; all weights equal (Deformable DETR, A.3)."""
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.n_points + 1).view(1, 1, -1, 1)
        bias = direction.view(-1, 1, 1, 2).repeat(1, self.n_levels, 1, 1) * steps  # [M, L, P, 2]
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(bias.flatten())
            self.attention_weights.weight.zero_()
            self.attention_weights.bias.zero_()
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference_points: Tensor, source: Tensor, shapes: list[tuple[int, int]],
                mask: Tensor | None) -> Tensor:
        """query [B, Q, D]; reference_points [B, Q, L, 2 or 4] in 0..1; source [B, S, D]; mask [B, S] True = padding.
        Returns [B, Q, D]."""
        B, Q, _ = query.shape
        M, L, P = self.n_heads, self.n_levels, self.n_points
        value = self.value_proj(source)
        if mask is not None:
            value = value.masked_fill(mask[..., None], 0.0)
        with torch.autocast(query.device.type, enabled=False):  # bf16 would place samples up to a third of a pixel off
            offsets = self.sampling_offsets(query.float()).view(B, Q, M, L, P, 2)
            weights = self.attention_weights(query.float()).view(B, Q, M, L * P).softmax(-1).view(B, Q, M, L, P)
            if reference_points.shape[-1] == 2:
                size = constant_tensor(tuple(shapes), query.device).flip(1).to(offsets)  # [L, 2] (W_l, H_l)
                locations = reference_points[:, :, None, :, None] + offsets / size[:, None]
            else:  # a box: offsets are measured in half its size
                locations = (reference_points[:, :, None, :, None, :2]
                             + offsets / P * reference_points[:, :, None, :, None, 2:] * 0.5)
            attend = deformable_attention_for(value.device)  # Eq. (3) there
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

    def forward(self, x: Tensor, pos: Tensor, reference_points: Tensor, shapes: list[tuple[int, int]],
                mask: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x + pos, reference_points, x, shapes, mask)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DeformableDecoderLayer(nn.Module):
    """Self-attention among queries (norm2), deformable attention into the image (norm1), feed-forward (norm3): the
    released numbering."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_levels: int, n_heads: int, n_points: int):
        super().__init__()
        self.cross_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, query_pos: Tensor, reference_points: Tensor, memory: Tensor,
                shapes: list[tuple[int, int]], mask: Tensor, self_mask: Tensor | None) -> Tensor:
        q = x + query_pos
        x = self.norm2(x + self.dropout(self.self_attn(q, q, x, attn_mask=self_mask, need_weights=False)[0]))
        x = self.norm1(x + self.dropout(self.cross_attn(x + query_pos, reference_points, memory, shapes, mask)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DeformableTransformer(nn.Module):
    """Encoder over all pixels of all levels, decoder over object queries (Deformable DETR, Sec. 4.1).

    begin and position are what another kind of query has otherwise, logit_eps how close to 0 and 1 a reference counts.
    """
    logit_eps = 1e-5

    def __init__(self, d_model: int = 256, nhead: int = 8, enc_layers: int = 6, dec_layers: int = 6,
                 dim_feedforward: int = 1024, dropout: float = 0.1, num_feature_levels: int = 4, n_points: int = 4):
        super().__init__()
        self.d_model = d_model
        layer = (d_model, dim_feedforward, dropout, num_feature_levels, nhead, n_points)
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        self.encoder, self.decoder = nn.Module(), nn.Module()  # holders of `layers`, for the released names
        self.encoder.layers = nn.ModuleList(DeformableEncoderLayer(*layer) for _ in range(enc_layers))
        self.decoder.layers = nn.ModuleList(DeformableDecoderLayer(*layer) for _ in range(dec_layers))
        self.decoder.bbox_embed = None  # set by a detector with box refinement
        self.reference_points = nn.Linear(d_model, 2)
        xavier_init(self)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def encode(self, x: Tensor, pos: Tensor, valid_ratios: Tensor, shapes: list[tuple[int, int]],
               mask: Tensor) -> Tensor:
        """Every pixel attends from its centre, (i + .5) / its level's valid size, scaled to each level's valid part."""
        centres = []
        for level, (H, W) in enumerate(shapes):
            rows = torch.arange(H, device=x.device) + 0.5
            columns = torch.arange(W, device=x.device) + 0.5
            y, x_ = torch.meshgrid(rows, columns, indexing="ij")
            grid = torch.stack([x_.flatten() / W, y.flatten() / H], -1)  # [H*W, 2]
            centres.append(grid[None] / valid_ratios[:, None, level])
        reference_points = torch.cat(centres, 1)[:, :, None] * valid_ratios[:, None]  # [B, S, L, 2]
        for layer in self.encoder.layers:
            x = layer(x, pos, reference_points, shapes, mask)
        return x

    def begin(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, Q, 2D] -> (content [B, Q, D], position [B, Q, D], reference [B, Q, 2])."""
        position, content = queries.chunk(2, -1)
        with torch.autocast(queries.device.type, enabled=False):
            return content, position, self.reference_points(position.float()).sigmoid()

    def position(self, layer: int, content: Tensor, position: Tensor, places: Tensor) -> Tensor:
        """What is added to the content [B, Q, D] in a decoder layer. position: of `begin`; places [B, Q, L, 2 or 4]:
        the references on the map of each level."""
        return position

    def forward(self, sources: list[Tensor], masks: list[Tensor], positions: list[Tensor], query_embed: Tensor,
                self_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """sources, positions: [B, D, H_l, W_l] per level; masks [B, H_l, W_l]; query_embed [Q, 2D] or, per image,
        [B, Q, 2D]: position half, then initial content; self_mask [Q, Q] True = query i may not look at j. Returns
        hs [layers, B, Q, D], initial reference [B, Q, 2 or 4], references after each layer [layers, B, Q, 2 or 4],
        memory [B, S, D]."""
        shapes = [tuple(s.shape[-2:]) for s in sources]
        # the part of each map that is image, as (x, y) fractions, read off the first column and row: [B, L, 2]
        valid_ratios = torch.stack([torch.stack([(~m[:, 0]).float().mean(1), (~m[:, :, 0]).float().mean(1)], -1)
                                    for m in masks], 1)
        x = torch.cat([s.flatten(2).transpose(1, 2) for s in sources], 1)  # [B, S, D]
        pos = torch.cat([p.flatten(2).transpose(1, 2) + e for p, e in zip(positions, self.level_embed)], 1)
        mask = torch.cat([m.flatten(1) for m in masks], 1)  # [B, S]
        memory = self.encode(x, pos, valid_ratios, shapes, mask)

        query, query_pos, reference = self.begin(query_embed.expand(len(x), *query_embed.shape[-2:]))
        initial = reference
        hs, references = [], []
        for i, layer in enumerate(self.decoder.layers):
            scale = valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
            places = reference[:, :, None] * scale[:, None]  # [B, Q, L, 2 or 4]
            query = layer(query, self.position(i, query, query_pos, places), places, memory, shapes, mask, self_mask)
            if self.decoder.bbox_embed is not None:  # the next layer looks around this layer's box
                with torch.no_grad():
                    reference = predict_boxes(self.decoder.bbox_embed[i], query, reference, self.logit_eps)
            hs.append(query)
            references.append(reference)
        return torch.stack(hs), initial, torch.stack(references), memory


def predict_boxes(head: nn.Module, query: Tensor, reference: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Boxes [..., Q, 4] cxcywh: the head's output is an offset to the reference, if any, in logit space (Deformable
    DETR, Sec. A.4); fp32. eps: see inverse_sigmoid."""
    with torch.autocast(query.device.type, enabled=False):
        delta = head(query.float())
        if reference is None:  # DETR
            return delta.sigmoid()
        n = reference.shape[-1]  # 2: only the centre has a reference
        return torch.cat([delta[..., :n] + inverse_sigmoid(reference, eps), delta[..., n:]], -1).sigmoid()


# ==== 6. Detectors ====


class Detector(nn.Module):
    """What the detectors below share. `focal`: the class head is trained with the focal loss and has one logit per
    class (else softmax, with a last logit for "no object"), and heads start as Conditional and Deformable DETR start
    them (else PyTorch's defaults, as DETR).

    forward(images [B, 3, H, W] normalised and zero padded, mask [B, H, W] True = padding, ...) returns
    pred_logits [B, Q, num_logits], pred_boxes [B, Q, 4] cxcywh in 0..1, hs [B, Q, D]: the query embeddings behind them;
    aux_outputs: the same three of every earlier decoder layer; memory: the encoder's output as maps,
    [[B, D, H_l, W_l], ...].
    """

    def __init__(self, backbone: Backbone, transformer: nn.Module, num_queries: int, query_width: int,
                 position_offset: float):
        super().__init__()
        self.transformer = transformer
        self.query_embed = nn.Embedding(num_queries, query_width)
        self.backbone = nn.Sequential(backbone)  # released name: backbone.0.body
        self.position = PositionEmbeddingSine(transformer.d_model // 2, offset=position_offset)

    def forward(self, images: Tensor, mask: Tensor, queries: Tensor | None = None,
                self_mask: Tensor | None = None) -> dict[str, Any]:
        """queries: instead of the learned object queries, per image (see conditioned_queries); self_mask [Q, Q]:
        True = query i may not look at j. `detect` is the same after the backbone."""
        return self.detect(self.backbone[0](images), mask, queries, self_mask)

    def queries(self) -> Tensor:
        """The learned object queries [Q, query width]."""
        return self.query_embed.weight

    def conditioned_queries(self, features: Tensor, order: Tensor | None = None) -> Tensor:
        """Object queries that say what to look for: features [B, n, D] are added to the position half of the first n
        queries (of `order`), which is all of a query in DETR and Conditional DETR. Returns [B, n, query width]."""
        queries = self.queries() if order is None else self.queries()[order]
        return queries[:features.shape[1]] + F.pad(features, (0, queries.shape[1] - features.shape[2]))

    @staticmethod
    def outputs(layers: list[dict[str, Tensor]], memory: list[Tensor]) -> dict[str, Any]:
        return {**layers[-1], "aux_outputs": layers[:-1], "memory": memory}


def init_heads(class_embed: nn.Linear, bbox_embed: MLP) -> None:
    """p = .01 for every class, for the focal loss; boxes start at their reference point."""
    nn.init.constant_(class_embed.bias, -math.log((1 - 0.01) / 0.01))
    nn.init.zeros_(bbox_embed.layers[-1].weight)
    nn.init.zeros_(bbox_embed.layers[-1].bias)


class DETR(Detector):
    """DETR, or with a conditional transformer Conditional DETR: one map, one class head and one box head for all
    decoder layers."""

    def __init__(self, backbone: Backbone, transformer: DETRTransformer, *, num_logits: int, focal: bool,
                 num_queries: int = 100, position_offset: float = 0.0):
        d = transformer.d_model
        class_embed, bbox_embed = nn.Linear(d, num_logits), MLP(d, d, 4, 3)  # drawn before the object queries
        super().__init__(backbone, transformer, num_queries, d, position_offset)
        self.class_embed, self.bbox_embed = class_embed, bbox_embed
        self.input_proj = nn.Conv2d(backbone.num_channels[-1], d, 1)
        if focal:
            init_heads(self.class_embed, self.bbox_embed)

    def detect(self, features: list[Tensor], mask: Tensor, queries: Tensor | None = None,
               self_mask: Tensor | None = None) -> dict[str, Any]:
        source = self.input_proj(features[-1])  # [B, D, H, W]
        mask = F.interpolate(mask[:, None].float(), size=source.shape[-2:])[:, 0].bool()
        position = self.position(mask).to(source.dtype)
        queries = self.queries() if queries is None else queries
        hs, reference, memory = self.transformer(source, mask, position, queries, self_mask)
        layers = [{"pred_logits": self.class_embed(x).float(),
                   "pred_boxes": predict_boxes(self.bbox_embed, x, reference), "hs": x.float()} for x in hs]
        return self.outputs(layers, [memory])


class DeformableDETR(Detector):
    """Deformable DETR: multi- or single-scale, with or without iterative box refinement.

    Without refinement one class head and one box head serve all decoder layers; they appear in `state_dict` once per
    layer, as in the released checkpoints. A query is 2D wide: what gives its position and reference point, then what it
    starts from.
    """

    def __init__(self, backbone: Backbone, transformer: DeformableTransformer, *, num_logits: int, focal: bool = True,
                 num_queries: int = 300, with_box_refine: bool = False, position_offset: float = -0.5):
        d = transformer.d_model
        class_embed, bbox_embed = nn.Linear(d, num_logits), MLP(d, d, 4, 3)  # drawn before the object queries
        super().__init__(backbone, transformer, num_queries, 2 * d, position_offset)
        if focal:
            init_heads(class_embed, bbox_embed)
        layers = range(len(transformer.decoder.layers))
        own_or_shared = copy.deepcopy if with_box_refine else (lambda head: head)
        self.class_embed = nn.ModuleList(own_or_shared(class_embed) for _ in layers)
        self.bbox_embed = nn.ModuleList(own_or_shared(bbox_embed) for _ in layers)
        if focal:
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)  # small boxes first
        if with_box_refine:
            transformer.decoder.bbox_embed = self.bbox_embed
        channels = backbone.num_channels
        projections = [nn.Conv2d(c, d, 1) for c in channels]
        # further levels: stride-2 convolutions, the first on the LAST stage
        for extra in range(len(transformer.level_embed) - len(channels)):
            projections.append(nn.Conv2d(channels[-1] if extra == 0 else d, d, 3, stride=2, padding=1))
        self.input_proj = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, d)) for conv in projections)
        for conv, _ in self.input_proj:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def detect(self, features: list[Tensor], mask: Tensor, queries: Tensor | None = None,
               self_mask: Tensor | None = None) -> dict[str, Any]:
        sources = [proj(f) for proj, f in zip(self.input_proj, features)]
        for proj in list(self.input_proj)[len(sources):]:
            sources.append(proj(features[-1] if len(sources) == len(features) else sources[-1]))
        masks = [F.interpolate(mask[:, None].float(), size=s.shape[-2:])[:, 0].bool() for s in sources]
        positions = [self.position(m).to(sources[0].dtype) for m in masks]
        queries = self.queries() if queries is None else queries
        hs, initial, references, memory = self.transformer(sources, masks, positions, queries, self_mask)
        layers = []
        for i, x in enumerate(hs):  # layer i corrects the reference it was given
            boxes = predict_boxes(self.bbox_embed[i], x, initial if i == 0 else references[i - 1],
                                  self.transformer.logit_eps)
            layers.append({"pred_logits": self.class_embed[i](x).float(), "pred_boxes": boxes, "hs": x.float()})
        shapes = [s.shape[-2:] for s in sources]
        maps = [m.transpose(1, 2).unflatten(2, shape)
                for m, shape in zip(memory.split([h * w for h, w in shapes], 1), shapes)]
        return self.outputs(layers, maps)


class Pretext(nn.Module):
    """A detector together with the modules that a pretext task adds to it. Checkpoints keep the released names:
    `detector.` is not part of them."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name.removeprefix("detector."): value for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state: dict[str, Tensor], *args: Any, **kwargs: Any):
        own = {name.removeprefix("detector."): name for name in super().state_dict()}
        return super().load_state_dict({own.get(name, name): value for name, value in state.items()}, *args, **kwargs)


# ==== 7. Matching and losses ====


class HungarianMatcher:
    """One-to-one assignment of predictions to targets with the least total cost (DETR, Eq. 1).

    Class cost: minus the softmax probability of the target's class (DETR), or the focal cost (Conditional and
    Deformable DETR). A prediction that is not finite is matched first, so that the loss shows it (run.FiniteWatch).
    within_groups: the queries are n groups of consecutive ones, and target i is matched to one of group i.
    """

    def __init__(self, cost_class: float = 2.0, cost_bbox: float = 5.0, cost_giou: float = 2.0, focal: bool = True,
                 within_groups: bool = False):
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.focal, self.within_groups = focal, within_groups

    @torch.no_grad()
    def costs(self, outputs: dict[str, Tensor], targets: list[dict]) -> list[Tensor]:
        """Cost matrix [Q, n] of every image."""
        matrices = []
        for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets):
            p = (logits.sigmoid() if self.focal else logits.softmax(-1))[:, target["labels"]]  # [Q, n]
            positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
            negative = 0.75 * p ** 2 * -(1 - p + 1e-8).log()
            class_cost = positive - negative if self.focal else -p
            l1 = torch.cdist(boxes, target["boxes"], p=1)
            giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"),
                                       box_convert(target["boxes"], "cxcywh", "xyxy"))
            # DETReg, Eq. (2): L_match; Siamese DETR, Eq. (18): H
            matrices.append(self.cost_class * class_cost + self.cost_bbox * l1 - self.cost_giou * giou)
        return matrices

    def __call__(self, layers: list[dict[str, Tensor]], targets: list[dict]) -> list[list[tuple[Tensor, Tensor]]]:
        """Per decoder layer, per image: (query indices ascending, target indices), int64 on the outputs' device;
        min(Q, n) pairs.

        What a query costs does not depend on the others, so all layers' queries are compared side by side, and one
        transfer brings all costs of a step from the device, one brings all pairs back.
        """
        together = {k: torch.cat([layer[k] for layer in layers], 1) for k in ("pred_logits", "pred_boxes")}
        # per image [layers, Q, n]
        costs = [c.unflatten(0, (len(layers), len(c) // len(layers))) for c in self.costs(together, targets)]
        flat = torch.cat([c.flatten() for c in costs]).cpu().nan_to_num(-1e6, -1e6, -1e6)
        costs_on_cpu = [part.view(c.shape).numpy() for part, c in zip(flat.split([c.numel() for c in costs]), costs)]
        if self.within_groups:
            for cost in costs_on_cpu:  # [layers, Q, n]
                queries, count = cost.shape[1:]
                cost[:, np.arange(queries)[:, None] // (queries // count) != np.arange(count)] = 1e6
        # sigma: DETReg, Eq. (2); UP-DETR, Eq. (1); Siamese DETR, Eq. (18)
        solved = [indices for layer in range(len(layers)) for cost in costs_on_cpu
                  for indices in linear_sum_assignment(cost[layer])]
        indices = to_device(torch.from_numpy(np.concatenate(solved)), costs[0].device).split([len(i) for i in solved])
        pairs = list(zip(indices[0::2], indices[1::2]))
        return [pairs[i:i + len(targets)] for i in range(0, len(pairs), len(targets))]


def matched_index(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(image index, query index) of all matched predictions of a batch, ready to index [B, Q, ...]."""
    return torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)]), torch.cat([q for q, _ in pairs])


def normalizer(count: float, device: torch.device) -> Tensor:
    """What a process divides its summed loss by, so that DDP's average of gradients is the gradient of one process on
    the whole batch: the count over all processes (at least 1) / world size. A tensor [] that stays on the device:
    nobody waits for it."""
    return all_reduce_sum(torch.full((), float(count), device=device)).clamp(min=1) / world_size()


def add_terms(terms: dict[str, Tensor], losses: dict[str, Tensor], micro_batches: int) -> None:
    """Add a micro-batch's loss terms to those of its step: losses add up, the log values `*_error` are averaged."""
    for name, value in losses.items():
        share = 1 / micro_batches if "error" in name else 1
        terms[name] = terms.get(name, 0) + share * value.detach()


class SetCriterion(nn.Module):
    """Loss of a set of predictions: matching, then classification, L1 and GIoU on the matched boxes, on every decoder
    layer.

    Classification is the focal loss, or (matcher.focal False) softmax cross-entropy with weight `eos_coef` on
    "no object", the last logit. weight_feature > 0: every layer's pred_features are also drawn to the `features` of the
    matched targets.
    forward returns (losses, pairs): unweighted terms `loss_ce`, `loss_bbox`, `loss_giou`, `loss_feature`, for earlier
    layer i with suffix `_i`, the log values `class_error` and `cardinality_error`; and the last layer's assignment.
    `total(losses)` is their weighted sum.
    """

    def __init__(self, matcher: HungarianMatcher, weight_class: float = 2.0, weight_bbox: float = 5.0,
                 weight_giou: float = 2.0, *, weight_feature: float = 0.0, eos_coef: float = 0.1):
        super().__init__()
        self.matcher = matcher
        self.eos_coef = eos_coef
        self.weight = {"loss_ce": weight_class, "loss_bbox": weight_bbox, "loss_giou": weight_giou,
                       "loss_feature": weight_feature}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum over all layers, of denoising queries too (tgt_); a name that has no weight is a log value."""
        weighted = [value * self.weight[name]
                    for key, value in losses.items() if (name := re.sub(r"^tgt_|_\d+$", "", key)) in self.weight]
        return torch.stack(weighted).sum()

    def class_weight_sum(self, counts: list[int], num_queries: int) -> float:
        """What the weighted mean of the softmax loss divides by, for images with these numbers of targets. `normalizer`
        of it makes the mean independent of how a batch is split; the released codes take the mean of each process
        (class_weight None below)."""
        return sum(min(n, num_queries) + self.eos_coef * max(num_queries - n, 0) for n in counts)

    def forward(self, outputs: dict[str, Any], targets: list[dict], num_boxes: float | Tensor,
                class_weight: float | Tensor | None = None) -> tuple[dict[str, Tensor], list]:
        layers = [outputs, *outputs.get("aux_outputs", [])]
        pairs, *aux_pairs = self.matcher(layers, targets)  # every layer is matched anew
        losses = self.losses(outputs, targets, pairs, num_boxes, class_weight)
        for i, (aux, aux_pair) in enumerate(zip(layers[1:], aux_pairs)):
            layer_losses = self.losses(aux, targets, aux_pair, num_boxes, class_weight)
            losses |= {f"{k}_{i}": v for k, v in layer_losses.items() if k != "class_error"}
        return losses, pairs

    def losses(self, outputs: dict[str, Tensor], targets: list[dict], pairs: list, num_boxes: float | Tensor,
               class_weight: float | Tensor | None = None) -> dict[str, Tensor]:
        """The terms of one layer for a given assignment."""
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]  # [B, Q, num_logits], [B, Q, 4]
        index = matched_index(pairs)
        labels = torch.cat([t["labels"][j] for t, (_, j) in zip(targets, pairs)])
        target_boxes = torch.cat([t["boxes"][j] for t, (_, j) in zip(targets, pairs)])
        matched = boxes[index]
        giou = torch.diag(generalized_box_iou(box_convert(matched, "cxcywh", "xyxy"),
                                              box_convert(target_boxes, "cxcywh", "xyxy")))
        # DETReg, Eq. (3); UP-DETR, Eq. (1); Siamese DETR, Eq. (9)
        losses = {
            "loss_ce": self.class_loss(logits, index, labels, num_boxes, class_weight),
            "loss_bbox": F.l1_loss(matched, target_boxes, reduction="sum") / num_boxes,
            "loss_giou": (1 - giou).sum() / num_boxes,
        }
        if self.weight["loss_feature"]:
            features = torch.cat([t["features"][j] for t, (_, j) in zip(targets, pairs)])
            difference = F.normalize(outputs["pred_features"][index], dim=-1) - F.normalize(features, dim=-1)
            # = mean of 2 - 2 cos: UP-DETR, Eq. (2); Siamese DETR, Eq. (12)
            losses["loss_feature"] = difference.square().sum() / num_boxes
        with torch.no_grad():
            correct = (logits[index].argmax(-1) == labels).float()
            losses["class_error"] = 100 - 100 * correct.mean() if len(labels) else logits.new_tensor(100.0)
            predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1).float()
            present = to_device(torch.tensor([float(len(t["labels"])) for t in targets]), logits.device)
            losses["cardinality_error"] = (predicted - present).abs().mean()
        return losses

    def class_loss(self, logits: Tensor, index: tuple[Tensor, Tensor], labels: Tensor, num_boxes: float | Tensor,
                   class_weight: float | Tensor | None) -> Tensor:
        """logits [B, Q, num_logits]; index: matched_index; labels [n] of its pairs."""
        if self.matcher.focal:
            onehot = torch.zeros_like(logits)
            onehot[(*index, labels)] = 1.0
            return sigmoid_focal_loss(logits, onehot, alpha=0.25, gamma=2).sum() / num_boxes  # DETReg, Eq. (3)
        target_classes = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)
        target_classes[index] = labels
        weight = logits.new_ones(logits.shape[-1])
        weight[-1] = self.eos_coef
        loss = F.cross_entropy(logits.transpose(1, 2), target_classes, weight, reduction="sum")
        return loss / (weight[target_classes].sum() if class_weight is None else class_weight)


# ==== 8. Post-processing ====


@torch.no_grad()
def top_detections(logits: Tensor, boxes_xyxy: Tensor, top: int = 100, focal: bool = True) -> dict[str, Tensor]:
    """Detections of one image: {"scores" [k], "labels" [k], "boxes" [k, 4]}; no threshold, no NMS.

    focal: the `top` best of all Q x C sigmoid scores; a query may appear more than once, with different labels.
    Softmax (DETR): every query once, in its order, with its best class that is not "no object", the last logit.
    """
    if not focal:
        scores, labels = logits.softmax(-1)[:, :-1].max(-1)
        return {"scores": scores, "labels": labels, "boxes": boxes_xyxy}
    scores, flat = logits.sigmoid().flatten().topk(min(top, logits.numel()))
    return {"scores": scores, "labels": flat % logits.shape[-1], "boxes": boxes_xyxy[flat // logits.shape[-1]]}


def boxes_to_pixels(boxes: Tensor, sizes_hw: Tensor) -> Tensor:
    """cxcywh in 0..1 [B, Q, 4] -> xyxy pixels of images of sizes_hw [B, 2] (height, width)."""
    return box_convert(boxes, "cxcywh", "xyxy") * sizes_hw.to(boxes).flip(-1).repeat(1, 2)[:, None]


def post_process(outputs: dict[str, Tensor], sizes_hw: Tensor, top: int = 100,
                 focal: bool = True) -> list[dict[str, Tensor]]:
    """Detections of a batch in pixels of the original images (released PostProcess); see top_detections."""
    boxes = boxes_to_pixels(outputs["pred_boxes"], sizes_hw)
    return [top_detections(l, b, top, focal) for l, b in zip(outputs["pred_logits"], boxes)]


# ==== 9. Optimisation ====


def param_groups(model: nn.Module, lr: float, lr_backbone: float, lr_linear_proj_mult: float = 0.1) -> list[dict]:
    """The three groups of the released DETReg / Deformable DETR: everything else, backbone, sampling offsets and
    reference points (the last has no members in DETR and Conditional DETR). Weight decay falls on all parameters,
    biases and norms included, as released. `base_lr` is what a schedule multiplies."""
    groups = [{"lr": lr}, {"lr": lr_backbone}, {"lr": lr * lr_linear_proj_mult}]
    for group in groups:
        group |= {"base_lr": group["lr"], "names": [], "params": []}
    rest, backbone, linear_proj = groups
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_linear_proj = re.search("reference_points|sampling_offsets", name)
            group = backbone if "backbone.0" in name else linear_proj if in_linear_proj else rest
            group["names"].append(name)
            group["params"].append(parameter)
    return groups


def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as released."""
    groups = param_groups(model, cfg.lr, cfg.lr_backbone, cfg.lr_linear_proj_mult)
    return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=can_fuse(model))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's base rate; returns the first group's rate, for the log."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def step_schedule(step: int, steps_per_epoch: float, drop_epochs: tuple[float, ...]) -> float:
    """Learning rate factor: x 0.1 at the start of each epoch in drop_epochs. A pure function of the step."""
    return 0.1 ** sum(step >= drop * steps_per_epoch for drop in drop_epochs)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, momentum: float) -> None:
    """average = m average + (1 - m) model, of parameters: its BatchNorm has its own statistics (MoCo; SoCo)."""
    averages = list(average.parameters())
    torch._foreach_mul_(averages, momentum)  # all at once: two kernels, not two per parameter
    torch._foreach_add_(averages, list(model.parameters()), alpha=1 - momentum)


def loss_scaler(optimizer: torch.optim.Optimizer, amp: str) -> torch.amp.GradScaler:
    """The optimizer's own, made when it is first asked for; it does nothing unless `amp` is fp16 (Micikevicius et al.,
    arXiv 1710.03740). It starts at 2**16, doubles after 2000 good steps and halves where a gradient overflows."""
    if not hasattr(optimizer, "loss_scaler"):
        device = optimizer.param_groups[0]["params"][0].device.type
        optimizer.loss_scaler = torch.amp.GradScaler(device, enabled=amp == "fp16")
    return optimizer.loss_scaler


def backward(loss: Tensor, optimizer: torch.optim.Optimizer, amp: str) -> None:
    """Add the gradient of a micro-batch's loss: with fp16 of the scaled loss, or most of it would be below 6e-8 = 0."""
    loss_scaler(optimizer, amp).scale(loss).backward()


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradient to max_norm (0 = do not clip); returns its norm before, [] on the device."""
    return torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_norm or math.inf)


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, amp: str, max_norm: float = 0) -> Tensor:
    """clip_gradients, then the optimizer's step; returns the norm. With fp16 the gradient is unscaled before both, and
    where it is not finite the weights stay as they are (run.FiniteWatch counts these steps)."""
    scaler = loss_scaler(optimizer, amp)
    scaler.unscale_(optimizer)
    norm = clip_gradients(model, max_norm)
    scaler.step(optimizer)
    scaler.update()
    return norm


# ==== 10. Forms that exist for speed alone ====
# Each says what it must equal; tests/test_fast.py compares, benchmarks/ has the times.


def run_frozen_stages(stages: dict[str, nn.Module], images: Tensor, layers: tuple[str, ...]) -> list[Tensor]:
    """run_stages with frozen norms: channels last in memory (a quarter less time on CPU), no pass for a norm alone."""
    x = images.contiguous(memory_format=torch.channels_last)
    outputs = []
    for name, stage in stages.items():
        if name == "conv1":
            x = convolve(x, stage, stages["bn1"])
        elif name.startswith("layer"):
            for block in stage:  # a forward of its own: wrap_model has given it one that recomputes
                x = recompute(block, frozen_block, x) if "forward" in vars(block) else frozen_block(block, x)
        elif name != "bn1":
            x = stage(x)
        if name in layers:
            outputs.append(x)
    return outputs


def frozen_block(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), torchvision's BasicBlock or Bottleneck with frozen norms: relu(x + f(x)), f of two or three
    convolutions; x too is convolved where its shape changes."""
    y = x
    last = 3 if isinstance(block, Bottleneck) else 2
    for i in range(1, last + 1):
        y = convolve(y, getattr(block, f"conv{i}"), getattr(block, f"bn{i}"))
        y = F.relu(y, inplace=True) if i < last else y
    y += convolve(x, *block.downsample) if block.downsample is not None else x
    return F.relu(y, inplace=True)


def convolve(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> Tensor:
    """norm(conv(x)). A frozen norm is a scale and a shift, and goes into the convolution's weights."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return F.conv2d(x, conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale, conv.stride,
                    conv.padding)


class Dropout(nn.Dropout):
    """nn.Dropout with other draws. On CPU from 16 random bits per element, p to the next 1/65536; PyTorch's own draws
    were a seventh of a DETReg step there."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
        bits = bits.view(torch.int16)[:x.numel()].view(x.shape)
        return torch.where(bits >= round(self.p * 2**16) - 2**15, x, 0.0).mul_(1 / (1 - self.p))


def deformable_attention_for(device: torch.device) -> Callable[..., Tensor]:
    """The fastest form of multi_scale_deformable_attention for a device; all have its arguments and its result.

    CUDA: the Triton kernels of the package deformops (MIT, Python >= 3.12) where it is installed; else, as on all other
    devices but the CPU, the plain form, which --compile compiles. Nothing has to be built.
    """
    if device.type == "cpu":
        return deformable_attention_on_cpu
    return (deformable_attention_by_deformops if deformops and device.type == "cuda"
            else multi_scale_deformable_attention)


def deformable_attention_by_deformops(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor,
                                      weights: Tensor) -> Tensor:
    """multi_scale_deformable_attention by the Triton kernels of the package deformops."""
    table = constant_tensor(tuple(shapes), value.device)
    return deformops.registry.msda(value, table, table.prod(1).cumsum(0) - table.prod(1), locations, weights)


@torch.compiler.disable  # its sparse products are not for the compiler
def deformable_attention_on_cpu(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor,
                                weights: Tensor) -> Tensor:
    """multi_scale_deformable_attention at four times the speed and half the memory (benchmarks/attention.py): a
    bilinear sample has four neighbours, so a query's output is a weighted sum of 4 L P rows of `value`, and all queries
    together are its product with a sparse matrix. No sample is ever written down."""
    B, S, M, D = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    height, width = (torch.tensor(side).repeat_interleave(P) for side in zip(*shapes))  # [L*P]
    start = (torch.tensor([0] + [h * w for h, w in shapes[:-1]]).cumsum(0).repeat_interleave(P) * M).int()
    first = (torch.arange(B)[:, None, None] * (S * M) + torch.arange(M)).expand(B, Q, M).reshape(-1, 1).int()

    def neighbours(coordinate: Tensor, side: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(cell, share of the sample), of the cell below a coordinate and of the one above; a cell outside has no
        share. [B*Q*M, L*P] each"""
        place = coordinate.reshape(-1, L * P) * side - 0.5
        low = place.detach().floor()
        cells, shares = (low, low + 1), (1 - (place - low), place - low)
        zero = torch.zeros(())  # fmax: an index of a coordinate that is NaN must lie inside too; its share is NaN
        inside = [cell.fmax(zero).minimum(side - 1) for cell in cells]
        return [(i.int(), share * (i == cell)) for i, cell, share in zip(inside, cells, shares)]

    columns = neighbours(locations[..., 0], width.to(locations))
    index, weight = [], []
    for y, share_y in neighbours(locations[..., 1], height.to(locations)):
        row = first + start + y * (width * M).int()
        share = share_y * weights.reshape(-1, L * P)
        for x, share_x in columns:
            index.append(row + x * M)  # of value as [B*S*M, D]
            weight.append(share * share_x)
    return WeightedRows.apply(value.reshape(-1, D), torch.cat(index, 1), torch.cat(weight, 1)).view(B, Q, M * D)


class WeightedRows(torch.autograd.Function):
    """output[i] = sum over k of weight[i, k] * rows[index[i, k]]: rows [N, D], index int32 [n, K], weight [n, K] ->
    [n, D]. On CPU.

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
        n, k = index.shape
        grad = grad.contiguous()
        ends = torch.arange(0, n * k + 1, k, dtype=torch.int32)  # the matrix has k entries in every row
        matrix = scipy.sparse.csr_array((weight.flatten().numpy(), index.flatten().numpy(), ends.numpy()),
                                        shape=(n, len(rows)))
        if k > len(rows):  # fewer rows than neighbours: sampled_addmm refuses such a matrix
            products = (grad @ rows.t()).gather(1, index.long())
        else:  # grad[i] . rows[index[i, k]] and no other pair
            pattern = torch.sparse_csr_tensor(ends, index.flatten(), torch.zeros_like(weight).flatten(), matrix.shape,
                                              check_invariants=False)
            products = torch.sparse.sampled_addmm(pattern, grad, rows.t(), beta=0.0).values().view(n, k)
        return torch.from_numpy(matrix.T @ grad.numpy()), None, products


def can_fuse(model: nn.Module) -> bool:
    """May one kernel update all parameters of a group, as the optimizer's own loop does? 9 ms rather than 47 ms of the
    DETReg demo's step on CPU."""
    return next(model.parameters()).device.type in ("cpu", "cuda")
