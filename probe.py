"""What features know: linear classifiers, SVMs and nearest neighbours on a ResNet that stays as it is.

Run: CHECKPOINT is a file or a run's folder, ours or of another code base, or a name (random, imagenet, moco_v2_200, ..)
    python probe.py linear CHECKPOINT --data imagenet                    # a head per stage; torchrun for several GPUs
    python probe.py linear CHECKPOINT --data imagenet --features mean    # the last layer alone, as MoCo
    python probe.py linear CHECKPOINT --data places365                   # DUPR, Table 4: feat5 and unpool
    python probe.py svm CHECKPOINT NAME=CHECKPOINT ... --data voc        # DUPR, Table 1 (b); needs scikit-learn
    python probe.py knn CHECKPOINT ... --data imagenet
    python probe.py segment CHECKPOINT --data cityscapes                 # semantic segmentation: see segmentation.py
    python probe.py linear random --preset demo                          # drawn scenes, CPU; svm and knn too

Protocols (docs/probe.md: sources, commands per table, traps):
    features  feat1..feat5: what the stem and layer1..4 give, averaged on 12, 6, 4, 3, 2 cells a side: of a ResNet-50
              9216, 9216, 8192, 9216, 8192 values. unpool: layer4 as it is, 100,352 values. mean: its mean, 2048.
    linear    OpenSelfSup's heads, one per feature, all at once; on `mean` MoCo's.
    svm       OpenSelfSup's form of FAIR's benchmark: an SVM per class and feature, C by cross-validation.
    knn       InstDisc's weighted vote of the k nearest by cosine.

Expected (DUPR, Tables 1 (b), 4), of MoCo v2, 200 epochs: 67.5 top-1 (linear, mean), 84.1 mAP (svm, feat5), 49.4 and
    46.6 top-1 (Places365, feat5 and unpool). Not rerun here.
"""
from __future__ import annotations

import common  # first: it tells OpenMP how to wait before torch is loaded

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import convert
import data
import evaluation
import run
import segmentation
from classification import LabelledImages, Sets, open_sets
from common import UserError
from run import Count, Images, NonNegative, Pixels, Positive, Share

# ==== 1. Hyperparameters ====

Feature = Literal["feat1", "feat2", "feat3", "feat4", "feat5", "unpool", "mean"]
Arch = Literal["resnet18", "resnet34", "resnet50", "resnet101"]
Side = Annotated[int, run.Range(32, 2**14)]  # stride of conv5


@dataclass
class Config(run.RunConfig):
    data: str = "imagenet"  # imagenet, imagenet100, places365, synthetic, or a folder with train/ and val/
    # images
    image_size: Side = 224  # side of a view, pixels
    views: Literal["colours", "plain", "places"] = "colours"  # of training: see draw_view
    # model
    features: tuple[Feature, ...] = ("feat1", "feat2", "feat3", "feat4", "feat5")  # what is classified: a head each
    arch: Arch = "resnet50"  # ResNet of `random` and `imagenet`
    backbone_weights: str = ""  # the CHECKPOINT
    # optimisation
    batch_size: Images = 256  # images per step over all processes
    epochs: Count = 90  # OpenSelfSup; MoCo: 100; Places365: 56 (DUPR)
    lr_drops: tuple[NonNegative, ...] = (30, 60)  # epochs after which the rate is x 0.1; MoCo: 60, 80
    lr: Positive = 0.01  # MoCo: 30
    sgd_momentum: Share = 0.9  # Nesterov's, but for MoCo
    weight_decay: NonNegative = 1e-4  # MoCo: 0
    lr_backbone = 0  # no knob: by it run.Run says that random weights stay as they are


@dataclass
class FeatureConfig:
    """What svm and knn share."""
    data: str = "imagenet"  # imagenet, imagenet100, places365, voc, synthetic, or a folder with train/ and val/
    data_root: str | None = None  # where a named data set lies; else $DATA_ROOT, else data/<name>
    synthetic_images: Images = 800  # size of a synthetic set
    synthetic_size: Pixels = 160  # side of a synthetic scene, pixels
    out: str | None = None  # folder of metrics.json; else out/probe-<task>-<data>
    preset: str | None = None  # a set of values that differ from the defaults
    seed: run.Seed = 42  # of random weights, of scenes and of the SVMs
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    num_workers: run.Workers = 8  # loader processes
    checkpoints: tuple[str, ...] = ()  # the CHECKPOINTs: a row of the table each
    arch: Arch = "resnet50"  # ResNet of `random` and `imagenet`
    image_size: Side = 224  # side of the input, pixels
    batch_size: Images = 64  # images at once; changes nothing else
    cache: str = "out/probe-features"  # folder of the features, and of finished SVMs


@dataclass
class SVMConfig(FeatureConfig):
    data: str = "voc"  # voc, imagenet, imagenet100, places365, synthetic, or a folder: VOC's, or with train/ and val/
    features: tuple[Feature, ...] = ("feat1", "feat2", "feat3", "feat4", "feat5")  # a column each
    costs: tuple[Positive, ...] = (1, 10, 100, *(0.5 ** i for i in range(4, 20)))  # C, chosen from by cross-validation
    folds: Annotated[int, run.Range(2, 100)] = 3  # of the cross-validation
    jobs: run.Processes = 4  # processes that fit SVMs, each with all training vectors twice in its memory


@dataclass
class KNNConfig(FeatureConfig):
    features: tuple[Feature, ...] = ("mean",)  # a row each
    k: tuple[Images, ...] = (10, 20, 100, 200)  # neighbours that vote, a column each
    temperature: Positive = 0.07  # a vote's weight is e^(cosine / temperature)


TASKS = {"linear": Config, "svm": SVMConfig, "knn": KNNConfig}
_SMALL = {"data": "synthetic", "arch": "resnet18", "image_size": 64, "synthetic_images": 400, "num_workers": 2}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {"demo": {  # by task
    "linear": _SMALL | {"batch_size": 40, "epochs": 10, "lr_drops": (4, 7), "log_every": 10},
    "svm": _SMALL | {"costs": (0.001, 0.01, 0.1), "jobs": 1},
    "knn": _SMALL | {"k": (5, 20)},
}}


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """Of linear."""
    places = values["data"] == "places365"
    recipe = {"epochs": 56, "lr_drops": (14, 28, 42), "views": "places",  # drops: not stated, as shares as in O's 28
              "features": (*Config.features, "unpool")} if places else {}
    if tuple(values["features"]) == ("mean",):  # MoCo
        recipe |= {"lr": 30.0, "weight_decay": 0.0, "views": "plain"}
        recipe |= {} if places else {"epochs": 100, "lr_drops": (60, 80)}
    return recipe


def parse(argv: list[str] | None) -> tuple[str, Any]:
    """The command line -> (task, its configuration, checked; of `segment` the words behind it)."""
    words = run.normalized_flags(argv)
    parser = run.Parser(prog="probe.py", description=__doc__)
    parser.add_argument("task", choices=(*TASKS, "segment"), help="`probe.py TASK --help` lists its flags")
    task = parser.parse_args(words[:1]).task
    if task == "segment":
        return task, words[1:]
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words[1:]))
    flags = words[1 + len(names):]
    if task == "linear" and len(names) > 1:
        raise UserError(f"probe.py linear {' '.join(names)}: a run has one checkpoint; start one for each")
    field = "backbone_weights" if task == "linear" else "checkpoints"
    presets = {preset: values[task] for preset, values in PRESETS.items()}
    cfg = run.parse_config(TASKS[task], presets, [f"--{field}"] * bool(names) + names + flags, script="probe",
                           description=__doc__, recipe=recipe_of if task == "linear" else None)
    if not getattr(cfg, field):
        raise UserError(f"probe.py {task}: what is to be probed? Name it right behind: probe.py {task} CHECKPOINT "
                        f"--data ..., a file, a run's folder, or {', '.join(convert.BACKBONES)}")
    if "out" not in run.given_flags(flags):
        cfg.out = cfg.out.replace("out/probe", f"out/probe-{task}", 1)
        cfg.out += f"-{run.data_name(convert.name_checkpoint(cfg.backbone_weights)[0])}" if task == "linear" else ""
    check(task, cfg)
    return task, cfg


def check(task: str, cfg: Any) -> None:
    """What a configuration alone can be wrong in."""
    for name in {"features", "k", "costs"} & vars(cfg).keys():
        values = getattr(cfg, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name} {' '.join(map(str, values))}: one of them stands there twice")
    names = [convert.name_checkpoint(text)[0] for text in getattr(cfg, "checkpoints", ())]
    if len(set(names)) < len(names):
        raise UserError(f"checkpoints called {', '.join(names)}: give names of their own to those called alike, "
                        "NAME=CHECKPOINT")
    if task == "linear" and "mean" in cfg.features and len(cfg.features) > 1:
        raise UserError("--features: mean is MoCo's protocol, with rates of its own; train it alone")
    if task == "linear" and cfg.batch_size // (common.world_size() * cfg.accumulate) < 2:
        raise UserError(f"--batch_size {cfg.batch_size}: one image per process at a time, but BatchNorm needs two; "
                        "give a larger one")


# ==== 2. Data ====


def shortened(image: Image.Image, size: int) -> Image.Image:
    """Short side to 256 pixels for an input of 224, in proportion for others."""
    side = round(size * 256 / 224)
    return data.resize(image, data.resized_hw((image.height, image.width), side, 20 * side))


def centre_view(image: Image.Image, size: int, shift: tuple[int, int] = (0, 0)) -> Image.Image:
    """size x size pixels of the middle, or `shift` (x, y) beside it (linear, knn)."""
    image = shortened(image, size)
    x, y = round((image.width - size) / 2) + shift[0], round((image.height - size) / 2) + shift[1]
    return image.crop((x, y, x + size, y + size))


def stretched_view(image: Image.Image, size: int) -> Image.Image:
    """All of it, squeezed to size x size (svm)."""
    return data.resize(shortened(image, size), (size, size))


JITTER = data.Photometric(0.4, 0.4, 0.4, 0, p_jitter=1, p_gray=0, p_blur=0)
# ImageNet's colours (0..1): their main axes, each times the standard deviation along it (AlexNet; fb.resnet.torch).
PCA = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]) * [
    0.2175, 0.0188, 0.0045]


def draw_view(rng: np.random.Generator, hw: tuple[int, int], views: str, size: int) -> dict[str, Any]:
    """What happens to a training image. "colours", "plain": a random resized crop; "places": a random piece of the
    central square; then a flip. "colours" adds jitter and noise along PCA."""
    if views == "places":
        most = (round(size * 256 / 224) - size) // 2
        return {"shift": tuple(rng.integers(-most, most + 1, 2).tolist()), "flip": bool(rng.random() < 0.5)}
    draw = {"crop": data.draw_crop(rng, hw, (0.08, 1.0)), "flip": bool(rng.random() < 0.5)}
    colours = {"colours": data.draw_photometric(rng, JITTER), "light": PCA @ rng.normal(0, 0.1, 3)}
    return draw | colours if views == "colours" else draw


def apply_view(image: Image.Image, draw: dict[str, Any], size: int) -> Tensor:  # [3, size, size]
    view = (centre_view(image, size, draw["shift"]) if "shift" in draw
            else data.resize(image.crop(draw["crop"]), (size, size)))
    view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw["flip"] else view
    if "colours" not in draw:
        return data.to_normalized_tensor(view)
    light = torch.tensor(draw["light"] / data.IMAGENET_STD, dtype=torch.float32)
    return data.to_normalized_tensor(data.apply_photometric(view, draw["colours"])) + light[:, None, None]


class TrainingViews(torch.utils.data.Dataset):
    """One sample: a random view of an image as a function of (seed, epoch, index), and its class."""

    def __init__(self, cfg: Config, images: LabelledImages):
        self.cfg, self.images = cfg, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        rng, skipped = data.sample_rng(self.cfg.seed, *key), []
        image, index = data.load_usable(self.images, key[1], rng, skipped)
        draw = draw_view(rng, (image.height, image.width), self.cfg.views, self.cfg.image_size)
        return {"image": apply_view(image, draw, self.cfg.image_size), "label": int(self.images.labels[index]),
                "index": index, "skipped": skipped}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """images [B, 3, S, S], labels [B], lists."""
    return {"images": torch.stack([s["image"] for s in samples]),
            "labels": torch.tensor([s["label"] for s in samples]), "index": [s["index"] for s in samples],
            "skipped": [path for s in samples for path in s["skipped"]]}


class FixedViews(torch.utils.data.Dataset):
    """The images as they are looked at when nothing is learned. An unreadable one is an error."""

    def __init__(self, images: LabelledImages, view: Callable, size: int):
        self.images, self.view, self.size = images, view, size

    def __getitem__(self, i: int) -> Tensor:
        return data.to_normalized_tensor(self.view(self.images.load(i), self.size))


def fixed_batches(cfg: Any, images: LabelledImages, view: Callable, indices: range, text: str) -> Iterable[Tensor]:
    """[B, 3, S, S] of these images, in order."""
    keys = [indices[i:i + cfg.batch_size] for i in range(0, len(indices), cfg.batch_size)]
    return run.progress(data.make_loader(FixedViews(images, view, cfg.image_size), keys, num_workers=cfg.num_workers,
                                         collate=torch.stack), desc=text)


# ==== 3. Features ====

STAGE = {"feat1": 0, "feat2": 1, "feat3": 2, "feat4": 3, "feat5": 4, "unpool": 4, "mean": 4}  # 0: before the max pool
POOL = {"feat1": (10, 10, 4), "feat2": (16, 8, 0), "feat3": (13, 5, 0), "feat4": (8, 3, 0), "feat5": (6, 1, 0)}
SIDE = {"feat1": 12, "feat2": 6, "feat3": 4, "feat4": 3, "feat5": 2}  # of what these average pools leave of 224 pixels


def open_backbone(weights: str, arch: str, seed: int, features: Sequence[str]) -> common.Backbone:
    """A ResNet whose weights and statistics stay as they are, as deep as the features need. UserError: see
    convert.open_checkpoint; it ends before that."""
    deepest = max(1, *(STAGE[feature] for feature in features))
    state, source = {}, weights
    if weights != "random":
        path = convert.backbone_file(weights, arch)
        found = convert.open_checkpoint(path)
        state, source = found.resnet(), f"{path} ({found.what})"
        if f"layer{deepest}.0.conv1.weight" not in state:
            raise UserError(f"{path}: its ResNet ends before layer{deepest}; give --features of earlier stages")
        arch = convert.resnet_name(state, "", path)
    torch.manual_seed(seed)
    backbone = common.Backbone(arch, (deepest,), "frozen", trainable=0)
    if state:
        used = {name for name, _ in backbone.body.named_children()}
        state = {name: value for name, value in state.items()
                 if name.split(".")[0] in used and not name.endswith("num_batches_tracked")}
        convert.load_matching(backbone.body, state, drop={}, source=source)
    return backbone.eval()


@torch.no_grad()
def extract(backbone: common.Backbone, images: Tensor, features: Sequence[str]) -> dict[str, Tensor]:
    """images [B, 3, S, S] -> {feature: float32 [B, C, h, w]}."""
    maps = common.run_stages(backbone.body.named_children(), images, ("relu", "layer1", "layer2", "layer3", "layer4"))
    return {feature: pool(maps[STAGE[feature]].float(), feature, images.shape[-1]) for feature in features}


def pool(x: Tensor, feature: str, image_size: int) -> Tensor:
    """A stage's map [B, C, h, w] of an input of image_size pixels -> [B, C, n, n]. At another size than 224, for which
    the pools are made: as many cells, as far as the map has them."""
    if feature == "unpool":
        return x
    if feature == "mean":
        return x.mean((2, 3), keepdim=True)
    if image_size == 224:
        return F.avg_pool2d(x, *POOL[feature])
    return F.adaptive_avg_pool2d(x, min(SIDE[feature], x.shape[-1]))


def shapes(backbone: common.Backbone, features: Sequence[str], image_size: int) -> dict[str, tuple[int, ...]]:
    """{feature: (C, h, w)}"""
    images = torch.zeros(1, 3, image_size, image_size, device=next(backbone.parameters()).device)
    return {feature: tuple(x.shape[1:]) for feature, x in extract(backbone, images, features).items()}


def fingerprint(backbone: common.Backbone) -> str:
    """Of its weights, whatever file they are from."""
    key = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        key.update(name.encode() + value.cpu().numpy().tobytes())
    return key.hexdigest()


def features_of(cfg: FeatureConfig, backbone: common.Backbone, weights: str, images: LabelledImages, view: Callable,
                text: str) -> dict[str, np.memmap]:
    """{feature: float32 [n, values]}, on disk: computed once for the same weights (their fingerprint), view and images.
    Those are the same where their names, sizes and times of change are."""
    key = hashlib.sha256(f"1 {view.__name__} {cfg.image_size} {weights} {images.source.fingerprint()}".encode())
    for name in images.source.keys if isinstance(images.source, data.ImageFiles) else ():
        with contextlib.suppress(OSError):  # the loader says what is wrong with it
            stat = os.stat(images.source.root / name)
            key.update(f"{stat.st_size} {stat.st_mtime_ns} ".encode())
    folder = Path(cfg.cache) / f"{images.split}-{key.hexdigest()[:24]}"
    shape = shapes(backbone, cfg.features, cfg.image_size)
    size = {feature: (len(images), math.prod(shape[feature])) for feature in cfg.features}
    if missing := [feature for feature in cfg.features if open_array(folder / f"{feature}.npy", size[feature]) is None]:
        run.open_folder(folder)
        with contextlib.ExitStack() as stack:
            files = {feature: stack.enter_context(run.replacing(folder / f"{feature}.npy")) for feature in missing}
            for feature, file in files.items():
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f4", "fortran_order": False, "shape": size[feature]})
            for batch in fixed_batches(cfg, images, view, range(len(images)), f"{text}, {images.split}"):
                batch = batch.to(next(backbone.parameters()).device)
                for feature, values in extract(backbone, batch, missing).items():
                    files[feature].write(values.flatten(1).cpu().numpy().astype("<f4").tobytes())
        run.unlock_folder(folder)
    run.print_rank0(f"{text}, {len(images)} images of {images.split}: {', '.join(missing) or 'nothing'} computed, in "
                    f"{folder}")
    return {feature: open_array(folder / f"{feature}.npy", size[feature]) for feature in cfg.features}


def open_array(path: Path, shape: tuple[int, int]) -> np.memmap | None:
    """None: it is not there, or damaged."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape else None


def each_checkpoint(cfg: FeatureConfig, sets: Sets, view: Callable
                    ) -> Iterator[tuple[str, list[dict[str, np.memmap]]]]:
    """(its name, features of the images to learn from and to test on) of each."""
    device = common.find_device(cfg.device)
    for name, weights in map(convert.name_checkpoint, cfg.checkpoints):
        backbone = open_backbone(weights, cfg.arch, cfg.seed, cfg.features).to(device)
        key = fingerprint(backbone)
        yield name, [features_of(cfg, backbone, key, images, view, name) for images in sets]


def report(cfg: FeatureConfig, title: str, table: dict[str, dict[str, float]], **more: Any) -> dict[str, Any]:
    """Write metrics.json and print the table, a row per checkpoint."""
    metrics = {"title": title, "config": vars(cfg), "table": table, **more}
    path = Path(cfg.out) / "metrics.json"
    run.write_json(path, metrics)
    run.print_rank0(f"{evaluation.metrics_table(table, list(next(iter(table.values()))), title)}\nwrote {path}")
    return metrics


# ==== 4. SVM ====


def unit_rows(features: np.ndarray) -> np.ndarray:
    """float64 [n, values], each row divided by (its length + 1e-5)."""
    rows = np.asarray(features, np.float64)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the precision-recall curve, precision made falling first (VOC from 2010 on). scores, positive [n]."""
    found = np.cumsum(positive[np.argsort(-scores, kind="stable")])
    precision = found / np.arange(1, len(found) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.diff(found / found[-1], prepend=0) @ precision)


def svm_parts() -> tuple[Any, Any, Any]:
    try:
        from sklearn.model_selection import cross_val_score
        from sklearn.svm import LinearSVC
        from sklearn.utils import parallel
    except ImportError as error:
        raise UserError(f"probe.py svm: scikit-learn is not here ({error}); pip install scikit-learn, which nothing "
                        "else here needs, or measure with probe.py linear or knn") from error
    return parallel, cross_val_score, LinearSVC


def fit_svm(train: np.ndarray, signs: np.ndarray, test: np.ndarray, test_signs: np.ndarray, costs: Sequence[float],
            folds: int, seed: int, path: Path) -> dict[str, float]:
    """One class: {"AP", "C", "cv"} of the test vectors, with the C of the best mean average precision over stratified
    folds of the training vectors. signs: see LabelledImages.signs; what is difficult is a negative of training and no
    part of the test. The result is kept at `path`, and taken from there."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    _, cross_val_score, LinearSVC = svm_parts()
    train, signs = unit_rows(train), np.where(signs == 1, 1, -1)
    make = functools.partial(LinearSVC, class_weight={1: 2, -1: 1}, dual=True, tol=1e-4, max_iter=2000,
                             random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a large C does not converge in so many iterations: part of the protocol
        means = [cross_val_score(make(C=cost), train, signs, cv=folds, scoring="average_precision").mean()
                 for cost in costs]
        svm = make(C=costs[int(np.argmax(means))]).fit(train, signs)
    scores, counts = svm.decision_function(unit_rows(test)), test_signs != 0
    result = {"AP": average_precision(scores[counts], test_signs[counts] == 1), "C": float(svm.C),
              "cv": float(max(means))}
    run.write_json(path, result)
    return result


def svm(cfg: SVMConfig) -> dict[str, Any]:
    parallel = svm_parts()[0]  # before anything takes long
    train, test = sets = open_sets(cfg, several=True)
    usable = {name: [images.signs(c) for images in sets] for c, name in enumerate(train.classes)}
    usable = {name: (a, b) for name, (a, b) in usable.items()
              if min((a == 1).sum(), (a != 1).sum()) >= cfg.folds and (b == 1).any()}
    if not usable:
        raise UserError(f"--data {cfg.data}: no class has {cfg.folds} images to learn from and one to test on; give "
                        "more images, or fewer --folds")
    if left := [name for name in train.classes if name not in usable]:
        run.print_rank0(f"note: left out, with fewer than {cfg.folds} images to learn from or none to test on: "
                        f"{', '.join(left)}")
    table, classes = {}, {}
    for name, found in each_checkpoint(cfg, sets, stretched_view):
        for feature in cfg.features:
            vectors, jobs = [part[feature] for part in found], []
            for signs in usable.values():
                words = [*(Path(v.filename).parts[-2:] for v in vectors), *map(bytes, signs), cfg.costs, cfg.folds]
                key = hashlib.sha256(repr((words, cfg.seed)).encode()).hexdigest()[:24]
                jobs.append(parallel.delayed(fit_svm)(vectors[0], signs[0], vectors[1], signs[1], cfg.costs, cfg.folds,
                                                      cfg.seed, Path(cfg.cache) / "svm" / f"{key}.json"))
            results = parallel.Parallel(cfg.jobs, return_as="generator")(jobs)
            results = run.progress(results, total=len(jobs), desc=f"{name}, SVMs on {feature}")
            classes.setdefault(name, {})[feature] = dict(zip(usable, results))
            mean = np.mean([result["AP"] for result in classes[name][feature].values()])
            table.setdefault(name, {})[feature] = float(mean)
    return report(cfg, f"mAP of linear SVMs, {len(usable)} classes of {cfg.data}, {train.split} -> {test.split}", table,
                  classes=classes)


# ==== 5. Nearest neighbours ====


def nearest(train: np.ndarray, test: np.ndarray, k: int, device: torch.device, block: int = 2**28
            ) -> tuple[Tensor, Tensor]:
    """Cosines and places in `train` [n, values] of the k nearest to each row of `test` [m, values]: float [m, k] from
    the best down, int64 [m, k]. block: bytes of what is in memory at once of either, and of their cosines."""
    size = min(len(train), max(1, block // (4 * train.shape[1])))
    rows = max(1, min(size, block // (4 * size)))
    best, place = torch.full((len(test), k), -torch.inf), torch.zeros(len(test), k, dtype=torch.int64)

    def unit(rows: np.ndarray) -> Tensor:
        return F.normalize(torch.from_numpy(np.array(rows)).to(device), dim=1)

    for i in run.progress(range(0, len(train), size), desc="nearest neighbours"):
        known = unit(train[i:i + size])
        for j in range(0, len(test), rows):
            here = np.s_[j:j + rows]
            cosine, index = (unit(test[here]) @ known.T).topk(min(k, len(known)), dim=1)
            best[here], order = torch.cat([best[here], cosine.cpu()], 1).topk(k, dim=1)
            place[here] = torch.cat([place[here], index.cpu() + i], 1).gather(1, order)
    return best, place


def vote(cosines: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """The class of most weight among the neighbours of each row: cosines and labels [m, k] -> [m]. The weight of one
    is e^(cosine / temperature)."""
    weights = torch.exp((cosines - cosines[:, :1]) / temperature)  # of the nearest 1: nothing overflows
    return torch.zeros(len(labels), classes).scatter_add_(1, labels, weights).argmax(1)


def knn(cfg: KNNConfig) -> dict[str, Any]:
    train, test = sets = open_sets(cfg)
    if max(cfg.k) > len(train):
        raise UserError(f"--k {max(cfg.k)}: there are {len(train)} images to learn from; give smaller ones")
    labels, truth, table = torch.from_numpy(train.labels), torch.from_numpy(test.labels), {}
    for name, (known, asked) in each_checkpoint(cfg, sets, centre_view):
        for feature in cfg.features:
            found = nearest(known[feature], asked[feature], max(cfg.k), common.find_device(cfg.device))
            row = table[f"{name} {feature}"] = {}
            for k in cfg.k:
                parts = zip(*(values[:, :k].split(1024) for values in found))
                votes = [vote(cosines, labels[places], len(train.classes), cfg.temperature)
                         for cosines, places in parts]
                row[f"k={k}"] = (torch.cat(votes) == truth).double().mean().item()
    return report(cfg, f"top-1 accuracy of the k nearest neighbours, {len(train)} images of {cfg.data} -> {len(test)}",
                  table)


# ==== 6. Linear classifiers ====


class Heads(nn.Module):
    """A backbone that does not learn, and a linear classifier on each of its features; BatchNorm without affine before
    those on pooled maps (OpenSelfSup)."""

    def __init__(self, backbone: common.Backbone, sizes: dict[str, tuple[int, int, int]], classes: int):
        super().__init__()
        self.backbone, self.norms, self.heads = backbone, nn.ModuleDict(), nn.ModuleDict()
        for feature, (channels, height, width) in sizes.items():
            if feature in POOL:
                self.norms[feature] = nn.BatchNorm2d(channels, affine=False)
            self.heads[feature] = nn.Linear(channels * height * width, classes)
            nn.init.normal_(self.heads[feature].weight, std=0.01)
            nn.init.zeros_(self.heads[feature].bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # [B, 3, S, S] -> {feature: [B, classes]}
        logits = {}
        for feature, x in extract(self.backbone, images, list(self.heads)).items():
            x = self.norms[feature](x) if feature in self.norms else x
            logits[feature] = self.heads[feature](x.flatten(1))
        return logits


def build_model(cfg: Config, classes: int) -> Heads:
    backbone = open_backbone(convert.name_checkpoint(cfg.backbone_weights)[1], cfg.arch, cfg.seed, cfg.features)
    sizes = shapes(backbone, cfg.features, cfg.image_size)
    torch.manual_seed(cfg.seed)
    return Heads(backbone, sizes, classes)


def build_optimizer(cfg: Config, model: Heads) -> torch.optim.Optimizer:
    groups = [{"params": list(model.heads.parameters()), "base_lr": cfg.lr}]
    return torch.optim.SGD(groups, cfg.lr, momentum=cfg.sgd_momentum, weight_decay=cfg.weight_decay,
                           nesterov="mean" not in cfg.features and cfg.sgd_momentum > 0)


def train_step(cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict],
               device: torch.device) -> dict[str, Tensor]:
    """One step: the heads' cross-entropies, added up. Returns the terms, their sum and the gradient norm."""
    optimizer.zero_grad()
    terms: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        batch = common.batch_to_device(batch, device)
        with common.gradient_sync(model, i == len(batches) - 1):
            with common.autocast(device, cfg.amp):
                logits = model(batch["images"])
            losses = {f"loss_{feature}": F.cross_entropy(x.float(), batch["labels"]) / len(batches)
                      for feature, x in logits.items()}
            loss = sum(losses.values())
            common.backward(loss, optimizer, cfg.amp)
        common.add_terms(terms, {"loss": loss, **losses}, len(batches))
    terms["grad_norm"] = common.clip_and_step(model, optimizer, cfg.amp)
    return terms


@torch.no_grad()
def accuracies(cfg: Config, model: Heads, images: LabelledImages, device: torch.device) -> dict[str, dict[str, float]]:
    """{feature: {"top1", "top5"}} of the images, each once over all processes, which all call it."""
    model.eval()
    indices = evaluation.rank_slice(len(images))
    right = torch.zeros(len(cfg.features), 2, device=device)
    start = indices.start
    for batch in fixed_batches(cfg, images, centre_view, indices, "testing"):
        labels = torch.from_numpy(images.labels[start:start + len(batch)]).to(device)
        start += len(batch)
        with common.autocast(device, cfg.amp):
            logits = model(batch.to(device))
        for i, feature in enumerate(cfg.features):
            hits = logits[feature].float().topk(min(5, len(images.classes)), dim=1).indices == labels[:, None]
            right[i] += torch.stack([hits[:, 0].sum(), hits.sum()])
    shares = (common.all_reduce_sum(right) / len(images)).tolist()
    return {feature: dict(zip(("top1", "top5"), row)) for feature, row in zip(cfg.features, shares)}


def summary(metrics: dict[str, Any]) -> str:
    rows = {name: row for name, row in metrics.items() if isinstance(row, dict)}
    return evaluation.metrics_table(rows, ["top1", "top5"], "accuracy of linear classifiers on images not learned from")


def linear(cfg: Config) -> dict[str, Any]:
    device = common.setup_distributed(cfg.device)
    check("linear", cfg)  # again: now the number of processes is known
    train, test = open_sets(cfg)
    job = run.Run(cfg, "probe", train, len(train), device, summary)
    if job.metrics:
        return job.metrics
    model = build_model(cfg, len(train.classes)).to(device)
    optimizer = build_optimizer(cfg, model)
    job.restore(model, optimizer)
    wrapped = common.wrap_model(model, device, compiled=cfg.compile, checkpointed=cfg.checkpoint_activations)
    loader = data.train_loader(job, TrainingViews(cfg, train), collate)
    for step in job.steps():
        wrapped.train()
        lr = common.set_lr(optimizer, common.step_schedule(step, job.epoch_steps, cfg.lr_drops))
        batches = job.next_batches(loader)
        terms = train_step(cfg, wrapped, optimizer, batches, device)
        job.check(step, terms, batches)
        job.log(step, terms, "loss", lr=lr)
        job.save(step)
    common.broadcast_buffers(model)
    return job.end(accuracies(cfg, model, test, device))


# ==== 7. Main ====


def main(argv: list[str] | None = None) -> dict[str, Any]:
    task, cfg = parse(argv)
    if task in ("svm", "knn") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"probe.py {task} is one process: start it without torchrun")
    return {"linear": linear, "svm": svm, "knn": knn, "segment": segmentation.main}[task](cfg)


if __name__ == "__main__":
    run.cli(main)
