"""Images with a class for each: ImageNet's folders, Places365, VOC's classification task, drawn scenes.

    imagenet, imagenet100, a folder   train/<class>/*, val/<class>/*
    places365                         the same, or the lists and folders of Places365-Standard
    voc, a folder in its layout       ImageSets/Main/<class>_trainval.txt, <class>_test.txt: several classes per image;
                                      without these lists the objects of Annotations/
"""
from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import data
import run
from annotations import open_splits
from common import UserError


class LabelledImages:
    """Images and their classes. labels: of each key its class, or of VOC a list of 1, -1 and 0 = difficult, one for
    each class."""

    def __init__(self, source: Any, labels: dict[str, int | list[int]], classes: Iterable[str], split: str):
        if not len(source):
            raise UserError(f"{source.root}: no images of the {split} split; looked for {' '.join(data.EXTENSIONS)}")
        self.source, self.classes, self.split = source, tuple(classes), split
        self.load, self.key = source.load, source.key
        self.labels = np.array([labels[source.key(i)] for i in range(len(source))], np.int64)  # [n] or [n, classes]

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str:
        text = "\n".join([self.source.fingerprint(), *self.classes]).encode("utf-8", "surrogateescape")
        return hashlib.sha256(text + self.labels.tobytes()).hexdigest()

    def signs(self, c: int) -> np.ndarray:
        """[n] 1 where class c is shown, -1 where not, 0 = difficult."""
        return self.labels[:, c] if self.labels.ndim == 2 else np.where(self.labels == c, 1, -1)


Sets = tuple[LabelledImages, LabelledImages]  # to learn from, to test on


def open_sets(cfg: Any, several: bool = False) -> Sets:
    """UserError: not found, or not laid out as it is published. several: an image may have several classes."""
    folder = Path(cfg.data).expanduser()
    if cfg.data == "synthetic":
        return open_synthetic(cfg, "train"), open_synthetic(cfg, "test")
    if cfg.data == "imagenet100":
        return open_class_folders(data.open_images(cfg.data, cfg.data_root).root, data.IMAGENET100)
    if cfg.data == "imagenet":
        folder = data.named_root(cfg.data, cfg.data_root, "train", lambda place: (place / "train").is_dir())
    if cfg.data == "places365":
        folder = data.named_root(cfg.data, cfg.data_root, "train",
                                 lambda place: (place / "train").is_dir() or places_lists(place) is not None)
        if places_lists(folder):
            return open_places(folder)
    if not several and (cfg.data == "voc" or data.voc_years(folder)):
        raise UserError(f"--data {cfg.data}: an image of VOC may show several classes; that is for probe.py svm")
    if cfg.data == "voc":
        folder = data.named_root(cfg.data, cfg.data_root, "train", lambda place: bool(data.voc_years(place)))
    if years := data.voc_years(folder):
        return open_voc(years[0])
    if not (folder / "train").is_dir():
        raise UserError(f"--data {cfg.data}: no folder with train/<class>/ and val/<class>/, nor one in VOC's layout; "
                        "give such a folder, or imagenet, imagenet100, places365, voc, synthetic")
    return open_class_folders(folder / "train")


def open_synthetic(cfg: Any, split: str) -> LabelledImages:
    """Drawn scenes; the class of a scene is that of the object of which most is seen."""
    scenes = data.SyntheticScenes(cfg.synthetic_images, cfg.synthetic_size, cfg.seed,
                                  data.SYNTHETIC_OFFSET[f"detection/{split}"])
    drawn = ((scenes.key(i), *scenes.draw(i)[1:]) for i in range(len(scenes)))
    labels = {key: labels[np.argmax([np.count_nonzero(part) for part in seen])] for key, seen, labels in drawn}
    return LabelledImages(scenes, labels, scenes.CLASSES, split)


def open_class_folders(train: Path, classes: Sequence[str] | None = None) -> Sets:
    """<train>/<class>/* and, beside it, val/<class>/*. classes: those that are used, else all folders of `train`."""
    val = train.parent / "val"
    if not val.is_dir():
        raise UserError(f"{train.parent}: has train/, but no val/ to test on; add it, with the same class folders")
    folders = [{entry.name for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith(".")}
               for place in (train, val)]
    if not folders[1]:
        raise UserError(f"{val}: has no class folders; images lie there side by side as they come out of ImageNet's "
                        "archive. Sort them into folders called as those of train/ (for ImageNet: valprep.sh of "
                        "github.com/soumith/imagenetloader.torch)")
    if unknown := sorted(folders[1] - folders[0]):
        raise UserError(f"{val}: {len(unknown)} of its class folders are not in {train}, the first: {unknown[0]}; "
                        "rename or remove them")
    if len(folders[0]) < 2:
        raise UserError(f"{train}: one class, {min(folders[0])}; at least two are needed to tell apart")
    index = {name: i for i, name in enumerate(sorted(classes or folders[0]))}
    sets = []
    for place, there in zip((train, val), folders):
        labels = {key: index[key.partition("/")[0]] for key in data.find_images(place, sorted(index.keys() & there))}
        sets.append(LabelledImages(data.ImageFiles(train.parent.name, place, labels), labels, index, place.name))
    return tuple(sets)


def labelled_lines(path: Path) -> Iterator[tuple[str, int]]:
    """(name, label) of lines like "/a/airfield/00000001.jpg 0"."""
    for number, line in enumerate(data.read_lines(path, "a list of names and labels"), start=1):
        if match := re.fullmatch(r"\s*(\S.*?)\s+(-?\d{1,5})\s*", line):
            yield match[1], int(match[2])
        elif line.strip():
            raise UserError(f"{path}, line {number}: {line.strip()[:80]!a} is not a name and a number")


def places_lists(root: Path) -> Path | None:
    """Where the lists of Places365-Standard lie: beside the images, or in the archive's own folder."""
    return next((place for place in (root, root / "filelist_places365-standard")
                 if (place / "places365_train_standard.txt").is_file()), None)


def open_places(root: Path) -> Sets:
    """Places365-Standard as published: lists with "name label" a line; images of 256 pixels in data_256 and val_256, or
    large ones in data_large and val_large (torchvision: data_256_standard, data_large_standard)."""
    lists, parts = places_lists(root), []
    for split, file, start in (("train", "places365_train_standard.txt", "data"), ("val", "places365_val.txt", "val")):
        names = [f"{start}_{size}{end}" for size in ("256", "large") for end in ("", "_standard")]
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is None:
            raise UserError(f"{root}: the lists of Places365 are there, but none of {', '.join(names)}, which hold the "
                            f"images of {file}; unpack train_256_places365standard.tar and val_256.tar of "
                            "data.csail.mit.edu/places/places365 there")
        labels, finder = {}, data.FileFinder()
        for name, label in labelled_lines(lists / file):
            there = finder.find(folder, name.lstrip("/"))
            if there is None or label < 0 or labels.setdefault(there, label) != label:
                raise UserError(f"{lists / file}: {name} {label}: is not in {folder}, is no class, or is listed before "
                                "with another; unpack the archives again")
        parts.append((data.ImageFiles("places365", folder, labels), labels, split))
    classes = [str(i) for i in range(1 + max(max(labels.values(), default=0) for _, labels, _ in parts))]
    return tuple(LabelledImages(images, labels, classes, split) for images, labels, split in parts)


def open_objects(year: Path) -> Sets:
    """What VOC's lists of a class say, read off the objects of the detection labels, where these lists are absent."""
    try:
        opened, sets = open_splits(str(year), None), []
    except UserError as error:
        raise UserError(f"{year}/ImageSets/Main: has no <class>_trainval.txt and <class>_test.txt, the labels of VOC's "
                        "classification (VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar have them), and "
                        f"objects that tell the classes are not there either: {error}") from error
    classes = [c["name"] for c in opened.train.categories]
    for labelled, split in ((opened.train, "train"), (opened.test, "test")):
        labels = {}
        for record in labelled.records:
            found = {label: False for label in record.labels[record.difficult].tolist()}
            found |= {label: True for label in record.labels[~record.difficult].tolist()}
            key = record.image.relative_to(year / "JPEGImages").as_posix()
            labels[key] = [int(found[k]) if k in found else -1 for k in range(len(classes))]
        labelled.print_notes()
        sets.append(LabelledImages(data.ImageFiles("voc", year / "JPEGImages", labels), labels, classes, split))
    run.print_rank0(f"note: {year}/ImageSets/Main has no lists of the classes: labels are taken from the objects")
    return tuple(sets)


def open_voc(year: Path) -> Sets:
    """VOC's classification task: ImageSets/Main/<class>_trainval.txt and <class>_test.txt (where these are absent, as
    of VOC2012: _train and _val), "name label" a line: 1, -1, and 0 where all objects of the class are difficult."""
    folder, sets = year / "ImageSets" / "Main", []
    pairs = (("trainval", "test"), ("train", "val"))
    splits = next((pair for pair in pairs if all(any(folder.glob(f"*_{split}.txt")) for split in pair)), None)
    if splits is None:
        return open_objects(year)
    classes = sorted(path.name.removesuffix(f"_{splits[0]}.txt") for path in folder.glob(f"*_{splits[0]}.txt"))
    for split in splits:
        labels = {file: [] for _, file in data.voc_list_images([folder / f"{split}.txt"])}
        for name in classes:
            path = folder / f"{name}_{split}.txt"
            signs = dict(labelled_lines(path))
            for file, row in labels.items():
                row.append(signs.get(os.path.splitext(file)[0]))
                if row[-1] not in (-1, 0, 1):
                    raise UserError(f"{path}: has no line with 1, 0 or -1 for {file}, which {split}.txt lists")
        sets.append(LabelledImages(data.ImageFiles("voc", year / "JPEGImages", labels), labels, classes, split))
    return tuple(sets)
