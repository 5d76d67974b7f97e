"""Semantic segmentation: a ResNet from any checkpoint -> the FCN of MoCo's appendix -> mIoU (DUPR, Table 8).

Idea: The backbone is trained on as the body of a plain fully convolutional network (He et al., CVPR 2020, arXiv
    1911.05722, appendix): layer4 (conv5) keeps the stride of layer3, its 3x3 convolutions look twice as far; two 3x3
    convolutions of dilation 6 with BatchNorm, then 1x1 to the classes; logits enlarged to the image. Trained on random
    scales and crops, all weights, BatchNorm too; tested on whole images. MoCo's code for it was not released.

Diagram:
    image [3, h, w] --scale, crop, flip--> [3, C, C] --ResNet, layer4 dilated--> [D, k + 1, k + 1], k = (C - 1) / 16
      --2 x (3x3, dilation 6, BN, ReLU)--> [256, k + 1, k + 1] --1x1--> logits --x 16--> [classes, C, C]
    cell i lies on pixel 16 i, in training and testing: images are padded to 16 k + 1 pixels a side

Run (also as `python probe.py segment ...`):
    python segmentation.py random --preset demo                               # CPU, nothing downloaded, 1.5 minutes
    torchrun --nproc_per_node=8 segmentation.py out/dupr-imagenet/last.pt --data cityscapes
    torchrun --nproc_per_node=8 segmentation.py moco_v2_200 --data voc --data_root VOCDEVKIT
    Data, numbers of the papers, choices: docs/segmentation.md
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import cityscapes
import convert
import data
import evaluation
import run
from common import UserError
from run import Count, Images, NonNegative, Positive, Share, Width

# ==== 1. Hyperparameters ====

PartOfRun = Annotated[float, run.Range(0, 1, open=True)]


@dataclass
class Config(run.RunConfig):
    data: str = "cityscapes"  # cityscapes, voc, synthetic, or a folder in the layout of the first two
    synthetic_images: Images = 80  # drawn scenes to train on
    synthetic_test_images: Images = 20  # drawn scenes to test on
    # images
    crop_size: Annotated[int, run.Range(17, 2**12)] = 769  # side of a training image, pixels (VOC: 513)
    scale_range: tuple[Annotated[float, run.Range(0.1, 4)], ...] = (0.5, 2.0)  # of an image before the crop
    # model
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"  # backbone (read off a checkpoint)
    backbone_weights: str | None = None  # file, folder of a run, hf:FOLDER, or a name: imagenet, swav, ..., random
    fcn_channels: Width = 256  # width of the head
    fcn_dilation: Annotated[int, run.Range(1, 100)] = 6  # of its two 3x3 convolutions
    # optimisation
    batch_size: Images = 16  # images per step over all processes
    epochs: Count = 50  # length of the run (Cityscapes: 90k steps, VOC: 30k steps)
    lr_drops: tuple[PartOfRun, ...] = (0.7, 0.9)  # shares of the run after which the rate is x 0.1
    lr: Positive = 0.01  # of all weights (VOC: 0.003)
    sgd_momentum: Share = 0.9  # of SGD
    weight_decay: NonNegative = 1e-4  # on every parameter


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {"data": "synthetic", "crop_size": 129, "arch": "resnet18", "fcn_channels": 64, "batch_size": 8,
             "epochs": 20, "lr": 0.02, "num_workers": 2, "log_every": 10, "save_every": 50},
}


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """The published lengths, by the name of the data."""
    return {"cityscapes": {"steps": 90000}, "voc": {"steps": 30000, "crop_size": 513, "lr": 0.003}}.get(
        values["data"], {})


def check(cfg: Config) -> None:
    run.check_pair(cfg, "scale_range")
    if not cfg.backbone_weights:
        raise UserError("no backbone: name it before the flags, a file, a run's folder, or "
                        f"{', '.join(convert.BACKBONES)}")


def parse(argv: list[str] | None) -> Config:
    """[checkpoint or name,] flags -> configuration, checked; the ResNet is that of a checkpoint."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        if "backbone_weights" in run.given_flags(argv[1:]):
            raise UserError(f"both {argv[0]} and --backbone_weights: leave one of them out")
        argv = ["--backbone_weights", *argv]
    cfg = run.parse_config(Config, PRESETS, argv, script="segmentation", description=__doc__, recipe=recipe_of)
    check(cfg)
    weights, given = cfg.backbone_weights, run.given_flags(argv)
    if "out" not in given:
        cfg.out += f"-{run.data_name(convert.name_checkpoint(weights)[0])}"
    if Path(weights.removeprefix("hf:")).exists():
        theirs = convert.resnet_name(convert.open_checkpoint(weights).resnet(), "", weights)
        if "arch" in given and cfg.arch != theirs:
            raise UserError(f"{weights}: its backbone is {theirs}, not --arch {cfg.arch}; leave the flag out")
        cfg = dataclasses.replace(cfg, arch=theirs)
    return cfg


# ==== 2. Data ====

IGNORED = 255  # pixels that are neither learned nor counted
VOC_CLASSES = ("background", *convert.VOC_NAMES.values())
TRAIN_AUG = ("train_aug.txt", "trainaug.txt")  # VOC's train with SBD's, 10,582 images (MoCo)


@dataclass
class SegmentationSet:
    """Images with a class for each pixel. read(item) -> (PIL RGB, uint8 [h, w]: a class, or IGNORED)."""
    name: str
    classes: tuple[str, ...]
    items: list[Path | int]
    read: Callable[[Any], tuple[Image.Image, np.ndarray]]

    def __len__(self) -> int:
        return len(self.items)

    def key(self, i: int) -> str:
        return str(self.items[i])

    def fingerprint(self) -> str:
        """sha256 over the names of the images, in order."""
        names = [item.name if isinstance(item, Path) else str(item) for item in self.items]
        return hashlib.sha256("\n".join([*self.classes, *names]).encode("utf-8", "surrogateescape")).hexdigest()

    def load(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """UnreadableImage; UserError for labels of another size or class."""
        image, labels = self.read(self.items[i])
        if labels.shape != (image.height, image.width):
            raise UserError(f"{self.key(i)} is {image.width}x{image.height} px, its labels are "
                            f"{labels.shape[1]}x{labels.shape[0]}. Give those of this image.")
        wrong = labels[(labels >= len(self.classes)) & (labels != IGNORED)]
        if wrong.size:
            raise UserError(f"{self.key(i)}: its labels hold {wrong[0]}, which is none of the {len(self.classes)} "
                            f"classes (0..{len(self.classes) - 1}; {IGNORED}: ignored). Give those of this data set.")
        return image, labels


def read_cityscapes(path: Path) -> tuple[Image.Image, np.ndarray]:
    return data.decode_image(path, exif=False), cityscapes.semantic_map(path)


def read_voc(folder: Path, path: Path) -> tuple[Image.Image, np.ndarray]:
    """folder: of the label pictures, whose pixels are numbers of colours or grey values."""
    return data.decode_image(path, exif=False), cityscapes.read_map(folder / f"{path.stem}.png", "its archive")


def read_scene(scenes: data.SyntheticScenes, i: int) -> tuple[Image.Image, np.ndarray]:
    image, seen, classes = scenes.draw(i)
    labels = np.zeros((image.height, image.width), np.uint8)
    for mask, k in zip(seen, classes.tolist()):
        labels[mask] = k + 1
    return image, labels


def open_scenes(cfg: Config, split: str, count: int) -> SegmentationSet:
    scenes = data.SyntheticScenes(count, cfg.synthetic_size, cfg.seed, data.SYNTHETIC_OFFSET[f"detection/{split}"])
    return SegmentationSet("synthetic", ("background", *scenes.CLASSES), list(range(count)),
                           partial(read_scene, scenes))


def open_cityscapes(root: Path, split: str) -> SegmentationSet:
    classes = tuple(cityscapes.LABELS[k] for k in cityscapes.TRAIN_IDS)
    return SegmentationSet("cityscapes", classes, cityscapes.list_images(root, split), read_cityscapes)


def open_voc(root: Path, split: str) -> SegmentationSet:
    """VOC2012 where it is there: train_aug, else train, or val."""
    lists = [(year, year / "ImageSets/Segmentation" / name) for year in data.voc_years(root)[::-1]
             for name in ((*TRAIN_AUG, "train.txt") if split == "train" else ("val.txt",))]
    year, file = next(((year, file) for year, file in lists if file.is_file()), (root, None))
    if file is None:
        raise UserError(f"{root}: no ImageSets/Segmentation/{split}.txt there or in VOC2012. Unpack "
                        "VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC) there.")
    augmented = file.name in TRAIN_AUG
    folder = year / "SegmentationClassAug"
    folder = folder if augmented and folder.is_dir() else year / "SegmentationClass"
    if split == "train" and not augmented:
        run.print_rank0(f"note: {file} alone is trained on, not train_aug with SBD's labels, as the papers do (put "
                        f"{TRAIN_AUG[0]} beside it, and its pictures into SegmentationClassAug/)")
    images = [year / "JPEGImages" / f"{line.strip()}.jpg" for line in data.read_lines(file, "the list") if line.strip()]
    lacking = [path for image in images for path in (image, folder / f"{image.stem}.png") if not path.is_file()]
    if lacking or not images:
        raise UserError(f"{file}: of its {len(images)} images {len(lacking)} files are not there"
                        f"{f', the first: {lacking[0]}' * bool(lacking)}. Add them or correct the list.")
    return SegmentationSet("voc", VOC_CLASSES, images, partial(read_voc, folder))


def open_sets(cfg: Config) -> tuple[SegmentationSet, SegmentationSet]:
    """Training and test set, of the same classes."""
    path = Path(cfg.data).expanduser()
    if cfg.data == "synthetic":
        return open_scenes(cfg, "train", cfg.synthetic_images), open_scenes(cfg, "test", cfg.synthetic_test_images)
    if cfg.data == "cityscapes" or cfg.data != "voc" and cityscapes.is_cityscapes(path):
        root = cityscapes.find_root(cfg.data, cfg.data_root)
        return open_cityscapes(root, "train"), open_cityscapes(root, "val")
    if cfg.data == "voc" or data.voc_years(path):
        voc = cfg.data == "voc"
        root = data.named_root("voc", cfg.data_root, "train", lambda r: bool(data.voc_years(r))) if voc else path
        return open_voc(root, "train"), open_voc(root, "val")
    raise UserError(f"--data {cfg.data}: no labels for segmentation there. Give cityscapes, voc, synthetic, or a "
                    "folder with gtFine/ and leftImg8bit/, or with VOC2012/ or JPEGImages/ and SegmentationClass/.")


class CropDataset(torch.utils.data.Dataset):
    """Training samples, random as a function of (seed, epoch, index)."""

    def __init__(self, cfg: Config, source: SegmentationSet):
        self.cfg, self.source = cfg, source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        rng = data.sample_rng(self.cfg.seed, *key)
        skipped: list[str] = []
        (image, labels), index = data.load_usable(self.source, key[1], rng, skipped)
        image, labels = random_crop(rng, image, labels, self.cfg.scale_range, self.cfg.crop_size)
        return {"image": image, "labels": labels, "index": index, "skipped": skipped}


def random_crop(rng: np.random.Generator, image: Image.Image, labels: np.ndarray, scale_range: tuple[float, ...],
                size: int) -> tuple[Tensor, Tensor]:
    """Scale by U(scale_range), cut size x size px at a uniform place, flip with p = .5; beyond the image: the mean
    colour, IGNORED. -> float32 [3, size, size], uint8 [size, size]."""
    scale = rng.uniform(*scale_range)
    h, w = (max(1, round(side * scale)) for side in labels.shape)
    top, left = (int(rng.integers(max(side - size, 0) + 1)) for side in (h, w))
    box = left, top, min(left + size, w), min(top + size, h)
    view = data.resize(image, (h, w)).crop(box)
    labels = Image.fromarray(labels).resize((w, h), Image.Resampling.NEAREST).crop(box)
    if rng.random() < 0.5:
        view, labels = (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (view, labels))
    beyond = 0, size - view.width, 0, size - view.height
    return (F.pad(data.to_normalized_tensor(view), beyond),
            F.pad(torch.from_numpy(np.array(labels)), beyond, value=IGNORED))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"images": torch.stack([s["image"] for s in samples]), "labels": torch.stack([s["labels"] for s in samples]),
            "index": [s["index"] for s in samples], "skipped": [path for s in samples for path in s["skipped"]]}


# ==== 3. Model ====

STRIDE = 16


class FCN(nn.Module):
    """Images [B, 3, H, W] -> logits [B, classes, H, W]. The body keeps the names of ResNets, and their weights."""

    def __init__(self, arch: str, classes: int, channels: int = 256, dilation: int = 6):
        super().__init__()
        self.backbone = common.Backbone(arch, (4,), "bn", trainable=5)
        for conv in self.backbone.body.layer4.modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (2, 2)
        layers, width = [], self.backbone.num_channels[0]
        for _ in range(2):
            layers += [nn.Conv2d(width, channels, 3, padding=dilation, dilation=dilation, bias=False),
                       nn.BatchNorm2d(channels), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
            width = channels
        self.head = nn.Sequential(*layers, nn.Conv2d(channels, classes, 1))
        nn.init.normal_(self.head[-1].weight, std=0.01)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, images: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        x = F.pad(images, (0, (1 - w) % STRIDE, 0, (1 - h) % STRIDE))
        logits = self.head(self.backbone(x)[0]).float()
        return F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=True)[..., :h, :w]


def build_model(cfg: Config, classes: int) -> FCN:
    """Weights follow from the seed and --backbone_weights."""
    torch.manual_seed(cfg.seed)
    model = FCN(cfg.arch, classes, cfg.fcn_channels, cfg.fcn_dilation)
    convert.load_backbone_weights(model.backbone.body, cfg.backbone_weights, cfg.arch)
    return model


# ==== 4. Training step ====


def build_optimizer(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": list(model.parameters()), "base_lr": cfg.lr}]
    return torch.optim.SGD(groups, cfg.lr, momentum=cfg.sgd_momentum, weight_decay=cfg.weight_decay,
                           fused=common.can_fuse(model))


def train_step(cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[dict],
               device: torch.device) -> dict[str, Tensor]:
    """One step: the mean cross-entropy of all pixels of the global batch that count."""
    pixels = common.normalizer(sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches), device)
    terms: dict[str, Tensor] = {}
    optimizer.zero_grad()
    for i, batch in enumerate(micro_batches):
        batch = common.batch_to_device(batch, device)
        with common.gradient_sync(model, i == len(micro_batches) - 1):
            with common.autocast(device, cfg.amp):
                logits = model(batch["images"])
            loss = F.cross_entropy(logits, batch["labels"].long(), ignore_index=IGNORED, reduction="sum") / pixels
            common.backward(loss, optimizer, cfg.amp)
        common.add_terms(terms, {"loss": loss}, len(micro_batches))
    terms["grad_norm"] = common.clip_and_step(model, optimizer, cfg.amp)
    return terms


# ==== 5. Evaluation ====


class _Whole(torch.utils.data.Dataset):
    """Whole images. An unreadable one is an error."""

    def __init__(self, source: SegmentationSet):
        self.source = source

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        image, labels = self.source.load(i)
        return {"image": data.to_normalized_tensor(image), "labels": torch.from_numpy(np.array(labels))}


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """int64 [classes, classes]: pixels of each class (row) that were given each class (column)."""
    counted = labels != IGNORED
    pairs = labels[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def segmentation_metrics(matrix: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """mIoU over the classes that are in the labels or were predicted, pixel accuracy, IoU of each class (nan)."""
    matrix = matrix.cpu().double()
    right = matrix.diag()
    ious = right / (matrix.sum(0) + matrix.sum(1) - right)  # 0 / 0 is nan
    return {"mIoU": ious.nanmean().item(), "pixel_accuracy": (right.sum() / matrix.sum()).item(),
            "per_class": dict(zip(classes, ious.tolist()))}


@torch.no_grad()
def evaluate(cfg: Config, model: nn.Module, source: SegmentationSet, device: torch.device, shown: int = 4
             ) -> tuple[dict[str, Any], list[np.ndarray]]:
    """-> (metrics of a set, whose images the processes share; what rank 0 predicts for the first `shown`)."""
    model.eval()
    classes, pictures = len(source.classes), []
    total = torch.zeros(classes, classes, dtype=torch.long, device=device)
    keys = [[i] for i in evaluation.rank_slice(len(source))]
    loader = data.make_loader(_Whole(source), keys, num_workers=cfg.num_workers, collate=collate_one)
    for sample in run.progress(loader, desc="evaluation"):
        with common.autocast(device, cfg.amp):
            predicted = model(sample["image"][None].to(device))[0].argmax(0)
        total += confusion_matrix(sample["labels"].to(device), predicted, classes)
        if len(pictures) < shown:
            pictures.append(predicted.byte().cpu().numpy())
    return segmentation_metrics(common.all_reduce_sum(total), source.classes), pictures


def collate_one(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return samples[0]


def colours(classes: int) -> np.ndarray:
    """uint8 [classes, 3]: VOC's colours, the bits of a number dealt out to red, green and blue."""
    table = np.zeros((classes, 3), np.uint8)
    for k in range(classes):
        for bit in range(8):
            table[k, bit % 3] |= (k >> bit & 1) << 7 - bit // 3
    return table


def paint(image: Image.Image, labels: np.ndarray, classes: int) -> Image.Image:
    """The classes' colours over an image, half transparent; nothing where a pixel does not count."""
    pixels = np.array(image)
    counted = labels != IGNORED
    pixels[counted] = pixels[counted] // 2 + colours(classes)[labels[counted]] // 2
    return Image.fromarray(pixels)


def draw_predictions(path: Path, source: SegmentationSet, pictures: list[np.ndarray]) -> None:
    rows = []
    for i, predicted in enumerate(pictures):
        image, labels = source.load(i)
        painted = (image, *(paint(image, some, len(source.classes)) for some in (labels, predicted)))
        rows.append([(one, [], None) for one in painted])
    evaluation.draw_rows(path, ("image", "labels", "prediction"), rows)


def summary(metrics: dict[str, Any]) -> str:
    shown = ", ".join(f"{name} {'-' if iou is None or iou != iou else f'{iou:.3f}'}"
                      for name, iou in metrics["per_class"].items())
    table = evaluation.metrics_table({"segmentation": metrics}, ["mIoU", "pixel_accuracy"])
    return f"{table}\nIoU per class: {shown}"


# ==== 6. Main ====


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = parse(argv)
    device = common.setup_distributed(cfg.device)
    train_set, test_set = open_sets(cfg)
    classes = [{"id": k, "name": name} for k, name in enumerate(train_set.classes)]
    job = run.Run(cfg, "segmentation", train_set, len(train_set), device, summary, classes=classes)
    if job.metrics:
        return job.metrics
    model = build_model(cfg, len(classes)).to(device)
    optimizer = build_optimizer(cfg, model)
    job.restore(model, optimizer)
    wrapped = common.wrap_model(model, device, compiled=cfg.compile, checkpointed=cfg.checkpoint_activations)
    loader = data.train_loader(job, CropDataset(cfg, train_set), collate)
    for step in job.steps():
        wrapped.train()
        lr = common.set_lr(optimizer, common.step_schedule(step, job.length(), cfg.lr_drops))
        micro_batches = job.next_batches(loader)
        terms = train_step(cfg, wrapped, optimizer, micro_batches, device)
        job.check(step, terms, micro_batches)
        job.log(step, terms, "loss", lr=lr)
        job.save(step)
    common.broadcast_buffers(model)
    metrics, pictures = evaluate(cfg, model, test_set, device)
    if common.rank() == 0:
        draw_predictions(Path(cfg.out) / "predictions.png", test_set, pictures)
    return job.end(metrics)


if __name__ == "__main__":
    run.cli(main)
