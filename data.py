"""Images in, batches out: unlabelled sources, synthetic scenes, transforms that move boxes too, the loader.

Sources     open_images(): a folder tree, a .txt list, ImageNet, ImageNet-100, COCO, VOC or drawn scenes. Annotation
            files are never opened; labelled sets are in annotations.py.
Transforms  draw_*() decides with a numpy Generator, apply_*() does it: tests put prescribed draws into the code that
            training runs.
Loader      StepSampler + sample_rng(): a sample is a pure function of (seed, epoch, index), whatever the workers,
            processes or restarts.

Boxes are `boxes_xyxy` in pixels of the image they come with, x2/y2 exclusive (width = x2 - x1), unless a name says
otherwise.
"""
from __future__ import annotations

import atexit
import hashlib
import math
import multiprocessing.queues
import os
import shutil
import signal
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageFilter, ImageOps
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as TF

from common import UserError, rank, world_size
from run import STOP_SIGNALS, Run, check_batch_size, loader_failure, print_rank0

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# What a file's content may be. Pillow reads more, for one of them through Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
# The 100 classes of "ImageNet-100" in the DETReg sense (datasets/category.txt; the list of CMC and solo-learn).
IMAGENET100 = tuple((
    "n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797 "
    "n01735189 n07831146 n07753275 n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653 "
    "n02086910 n02859443 n13040303 n03594734 n02085620 n02099849 n01558993 n04493381 n02109047 n04111531 "
    "n02877765 n04429376 n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855 "
    "n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251 n02701002 n03379051 "
    "n02259212 n07715103 n03947888 n04026417 n02326432 n03637318 n01980166 n02113799 n02086240 n03903868 "
    "n02483362 n04127249 n02089973 n03017168 n02093428 n02804414 n02396427 n04418357 n02172182 n01729322 "
    "n02113978 n03787032 n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029 "
    "n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630 n03584829 n02123045 "
    "n04229816 n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672 n02090622").split())
_LAYOUT = {"imagenet": "<root>/{split}/<wnid>/*.JPEG",
           "coco": "<root>/{split}2017/*.jpg (+ annotations/instances_{split}2017.json to fine-tune)",
           "coco_unlabeled": "<root>/train2017/*.jpg and <root>/unlabeled2017/*.jpg",
           "voc": "<root>/VOC2007|VOC2012/{{JPEGImages,Annotations,ImageSets/Main}}",
           "places365": "<root>/train/<class>/*.jpg and val/<class>/*.jpg, or places365_train_standard.txt and "
                        "places365_val.txt with data_256/ and val_256/ (from data.csail.mit.edu/places/places365)",
           "lvis": "<root>/lvis_v1_{split}.json (from lvisdataset.org) and COCO's train2017/ and val2017/ (from "
                   "cocodataset.org), in <root>, or in coco/ in it or beside it",
           "cityscapes": "<root>/leftImg8bit/{split}/CITY/*_leftImg8bit.png, <root>/gtFine/{split}/CITY/*_gtFine_* "
                         "(both from cityscapes-dataset.com)"}
# Below --data_root; the folder itself comes first: what is given wins over what is guessed.
_SUBFOLDERS = {"imagenet": ("", "imagenet", "ILSVRC/Data/CLS-LOC"), "coco": ("", "coco"),
               "cityscapes": ("", "cityscapes"), "lvis": ("", "lvis", "annotations"),
               "places365": ("", "places365_standard", "places365"),
               "voc": ("", "VOCdevkit", "voc/VOCdevkit", "voc")}
_PREDICTIONS = {"predictions.json", "predictions.csv"}  # of predict.py, which draws into pictures/ beside them
# A folder that holds all of one of these is an output of this project: a run, an evaluation, a proposal store.
_OUTPUTS = ({"last.pt"}, {"previous.pt"}, {"damaged.pt"}, {"log.jsonl"}, {"metrics.json", "predictions.png"},
            _PREDICTIONS, {"meta.json", "boxes.bin"}, {"header.partial"})
_OUTPUT_PICTURES = {"predictions.png", "pictures.png"}


# ==== 1. Image files ====


class UnreadableImage(Exception):
    """An image file that cannot be decoded: `.path`, `.reason`. load_usable() replaces it and counts it."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Needs(NamedTuple):
    """How finely an image is needed. size: (h, w) of an image -> the size to which it is reduced at least. whole: its
    own pixels too, as small regions are cut from it or boxes are searched on it."""
    size: Callable[[tuple[int, int]], tuple[float, float]]
    whole: bool = False


def reduction(hw: tuple[float, float], needed_hw: tuple[float, float]) -> int:
    """The largest of 1, 2, 4, 8 by which the sides `hw` can be divided without falling below needed_hw."""
    ratio = min(side / needed for side, needed in zip(hw, needed_hw))
    return next((n for n in (8, 4, 2) if n <= ratio), 1)


class ImagePyramid:
    """A large picture as copies with 1/n of its sides, n = finest, .., 8, each made when first asked for. `size`
    (width, height) and all boxes are those of the original."""

    def __init__(self, image: Image.Image, size: tuple[int, int], finest: int):
        self.size, (self.width, self.height), self.finest, self._copies = size, size, finest, {finest: image}

    def copy(self, n: int) -> Image.Image:
        """Of finest <= n; sides are rounded up, as libjpeg does."""
        if n not in self._copies:
            self._copies[n] = self.copy(n // 2).reduce(2)
        return self._copies[n]

    def cut(self, box: tuple[int, int, int, int], hw: tuple[int, int]) -> Image.Image:
        """A region at size hw, from the smallest copy that has as many pixels."""
        n = max(self.finest, reduction((box[3] - box[1], box[2] - box[0]), hw))
        left, top, right, bottom = box[0] // n, box[1] // n, -(-box[2] // n), -(-box[3] // n)
        part = self.copy(n).crop((left, top, right, bottom))
        if all(side % n == 0 for side in box):
            return resize(part, hw)
        inside = box[0] / n - left, box[1] / n - top, box[2] / n - left, box[3] / n - top
        return part.resize(hw[::-1], Image.Resampling.BILINEAR, box=inside)


def decode_image(path: str | Path, exif: bool = True, needs: Needs | None = None) -> Image.Image | ImagePyramid:
    """A picture file (FORMATS) -> PIL RGB. EXIF rotation applied (unless `exif` is False), alpha composited on white,
    16 bit divided by 257 (not clipped), floats stretched to their range; of an animation the first frame. Raises
    UnreadableImage for what is missing, truncated, corrupt, no image, or above 179 million pixels (Pillow's limit
    against decompression bombs).

    needs: a picture of at least twice the size needed becomes an ImagePyramid; libjpeg decodes a JPEG to 1/2, 1/4 or
    1/8 of its sides at once."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a regular file")  # reading a named pipe would wait for ever
        with Image.open(path, formats=FORMATS) as image:
            wh, hw = image.size, image.size[::-1]
            n = reduction(hw, needs.size(hw)) if needs else 1
            if n > 1 and not needs.whole:
                image.draft(None, (wh[0] // n, wh[1] // n))
            finest = round(wh[0] / image.width)
            image.load()
            turned = exif and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            if exif:
                ImageOps.exif_transpose(image, in_place=True)
            rgb = to_rgb(image)
            return ImagePyramid(rgb, hw if turned else wh, finest) if n > 1 else rgb
    except Exception as error:
        # not only OSError: decoders raise SyntaxError, ValueError, struct.error, ... on corrupt bytes
        raise UnreadableImage(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture of Pillow -> RGB, see decode_image. ValueError: it holds numbers that are not finite."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F":
            if not np.isfinite(values).all():
                raise ValueError("NaN or infinite pixels")
            values = (values - values.min()) / max(values.max() - values.min(), 1e-12) * 65535
        image = Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def image_header(path: str | Path) -> tuple[int, int, int] | None:
    """(width and height as stored, EXIF orientation 1..8) of a picture file, not decoded; None for what cannot be read.
    """
    try:
        if not os.path.isfile(path):  # reading a named pipe would wait for ever
            return None
        with Image.open(path, formats=FORMATS) as image:
            # not image.getexif(): for a PNG without EXIF that decodes the whole picture
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
            return (*image.size, orientation if orientation in range(1, 9) else 1)
    except Exception:  # as in decode_image, which says what is wrong once the picture is used
        return None


class ImageFiles:
    """Image files below `root`: keys are relative posix paths, sorted and unique (absolute only for list entries
    outside `root`).

    They are kept as one row of bytes: a million strings would be copied into every loader process, for counting
    references writes to each.
    """

    def __init__(self, name: str, root: str | Path, keys: Sequence[str]):
        self.name, self.root = name, Path(root)
        keys, text = sorted(set(keys)), bytearray()
        starts = np.zeros(len(keys) + 1, np.int64)
        for first in range(0, len(keys), 2**16):  # in pieces: of nine million keys there is no second copy
            piece = [key.encode("utf-8", "surrogateescape") for key in keys[first:first + 2**16]]
            starts[first + 1:first + 1 + len(piece)] = np.cumsum([len(key) + 1 for key in piece]) + len(text)
            text += b"\n".join(piece) + b"\n"
        self._text = torch.from_numpy(np.frombuffer(text, np.uint8)[:-1])
        self._starts = torch.from_numpy(starts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def keys(self) -> list[str]:
        return [self.key(i) for i in range(len(self))]

    def load(self, i: int, needs: Needs | None = None) -> Image.Image | ImagePyramid:
        return decode_image(self.root / self.key(i), needs=needs)

    def key(self, i: int) -> str:
        first, after = self._starts[i:i + 2].tolist()
        return self._text[first:after - 1].numpy().tobytes().decode("utf-8", "surrogateescape")

    def fingerprint(self) -> str:
        """sha256 over the keys, joined by line ends: the same tree gives the same value under another name or root."""
        return hashlib.sha256(self._text.numpy()).hexdigest()


def find_images(root: Path, below: Sequence[str] = ("",)) -> list[str]:
    """Keys of all images under root/<below>, links followed, but no folder twice. No stat per file: 1.3 M files are
    found in seconds. Hidden files are no images. Our own output is no input: a folder below that holds some is left
    out, which is said; in the folder itself the pictures that we write. UserError for a folder that cannot be listed.
    """
    def unlisted(error: OSError):
        raise UserError(f"{error.filename}: this folder cannot be listed ({error.strerror}). Make it readable, "
                        "or give a .txt list of the others.")

    keys, known, outputs = [], set(), []
    for top in below:
        for folder, subfolders, files in os.walk(root / top, onerror=unlisted, followlinks=True):
            real = os.path.realpath(folder)
            if real in known:  # links that lead in circles, or to a folder that is reached otherwise
                subfolders.clear()
                continue
            known.add(real)
            if any(marks <= set(files) for marks in _OUTPUTS):
                if folder != str(root / top):
                    outputs.append(folder)
                    subfolders.clear()
                    continue
                if _PREDICTIONS <= set(files) and "pictures" in subfolders:
                    outputs.append(os.path.join(folder, "pictures"))
                    subfolders.remove("pictures")
                files = [f for f in files if f not in _OUTPUT_PICTURES]
            # lost+found is the file system's own, and closed
            subfolders[:] = sorted(d for d in subfolders if not d.startswith(".") and d != "lost+found")
            prefix = "" if (relative := Path(folder).relative_to(root).as_posix()) == "." else relative + "/"
            keys += [prefix + f for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    if outputs:
        print_rank0(f"note: {root}: {len(outputs)} folder{'s' * (len(outputs) > 1)} with output of a run left out, no "
                    f"image of it is used: {', '.join(sorted(outputs)[:3])}{', ...' * (len(outputs) > 3)}")
    return keys


def read_lines(path: Path, what: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} ({what}) cannot be read: {error}. Give an existing UTF-8 text file.") from error


def unicode_form(name: str) -> str:
    """The same for names that look the same: macOS writes an accent as a character of its own."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class FileFinder:
    """Finds files by the names that a list or a json gives them, looking once into each folder. `respelled`: those that
    are spelled otherwise there, {name: name there}."""

    def __init__(self):
        self.respelled: dict[str, str] = {}
        self._listed: dict[Path, tuple[set[str] | None, dict[str, str]]] = {}
        self._places: dict[tuple[Path, str], str | None] = {}

    def find(self, root: Path, name: str) -> str | None:
        """`name` below `root`, spelled as it is there: as given, else in another Unicode form, else with back slashes
        as separators. None: it is not there."""
        there = self._spelled(root, name)
        if there is None and "\\" in name:
            there = self._spelled(root, PurePosixPath(name.replace("\\", "/")).as_posix())
        if there not in (None, name):
            self.respelled[name] = there
        return there

    def note(self, source: str | Path, count: int) -> list[str]:
        """A sentence on what is spelled otherwise among `count` names of `source`; none where nothing is."""
        return [f"{source}: {len(self.respelled)} of {count} names of files are spelled otherwise there (another "
                f"Unicode form, or back slashes for separators), the first: {name!a} is {there!a}"
                for name, there in list(self.respelled.items())[:1]]

    def _spelled(self, root: Path, name: str) -> str | None:
        folder, file = os.path.split(name)
        if (place := self._place(root, folder)) is None:
            return None
        files, forms = self._list(root / place)
        if file in files if files is not None else os.path.isfile(root / place / file):
            return os.path.join(place, file)
        other = os.path.join(place, forms.get(unicode_form(file), ""))
        return other if os.path.isfile(root / other) else None

    def _place(self, root: Path, folder: str) -> str | None:
        """A folder below `root`, spelled as it is there."""
        if (root, folder) not in self._places:
            above, name = os.path.split(folder)
            there = folder
            if above != folder and not os.path.isdir(root / folder):
                place = self._place(root, above)
                other = None if place is None else self._list(root / place)[1].get(unicode_form(name))
                there = None if other is None else os.path.join(place, other)
            self._places[root, folder] = there
        return self._places[root, folder]

    def _list(self, folder: Path) -> tuple[set[str] | None, dict[str, str]]:
        """(names of the files there, None where they cannot be listed; names beyond ASCII by their Unicode form)."""
        if folder not in self._listed:
            files, forms = set(), {}
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.is_file():
                            files.add(entry.name)
                        if not entry.name.isascii():
                            forms[unicode_form(entry.name)] = entry.name
            except (OSError, ValueError):
                files = None if os.path.isdir(folder) else set()
            self._listed[folder] = files, forms
        return self._listed[folder]


# ==== 2. Unlabelled sets ====


def named_root(data: str, data_root: str | None, split: str, accept: Callable[[Path], bool]) -> Path:
    """The first place where a named set's layout is found: --data_root, else $DATA_ROOT, else data/<set>; UserError
    lists all tried."""
    family = data.removesuffix("100").removesuffix("_unlabeled")
    given, origin = (data_root, "--data_root") if data_root else (os.environ.get("DATA_ROOT"), "$DATA_ROOT")
    root = Path(given or f"data/{family}").expanduser()
    places = [root / s for s in _SUBFOLDERS[family]]
    for place in places:
        if accept(place):
            return place
    raise UserError(f"--data {data}: not found in {', '.join(map(str, places))} (root "
                    f"from {origin if given else 'the default'}). Expected layout: "
                    f"{_LAYOUT.get(data, _LAYOUT[family]).format(split=split)}. Set --data_root or $DATA_ROOT, or give "
                    "--data a path.")


def _open_imagenet(data: str, data_root: str | None, split: str) -> ImageFiles:
    root = named_root(data, data_root, split, lambda place: (place / split).is_dir()) / split
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if data == "imagenet100":
        missing = sorted(set(IMAGENET100) - set(classes))
        if missing:
            raise UserError(f"--data imagenet100: {len(missing)} of the 100 class folders are missing in {root} "
                            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Add them, or give "
                            f"--data {root} to use every image that is there.")
        classes = list(IMAGENET100)
    return ImageFiles(data, root, find_images(root, classes))


def voc_years(root: Path) -> list[Path]:
    """Folders in VOC layout: root/VOC2007, root/VOC2012, or `root` itself."""
    return [year for year in (root / "VOC2007", root / "VOC2012", root) if (year / "JPEGImages").is_dir()]


def _voc_files(folder: Path, stem: str, listed: dict[str, dict[str, list[str]]]) -> list[str]:
    """The images below `folder` that a line of a VOC list means, spelled as they are there; more than one: it is
    ambiguous. `listed`: what was listed so far, by subfolder, filled here."""
    for name in dict.fromkeys((stem, stem.replace("\\", "/"))):
        place, name = os.path.split(name)
        if place.startswith("/") or ".." in place.split("/"):
            continue
        if place not in listed:
            forms = listed[place] = {}
            for file in sorted(os.listdir(folder / place)) if os.path.isdir(folder / place) else ():
                if file.lower().endswith(EXTENSIONS):
                    forms.setdefault(unicode_form(os.path.splitext(file)[0]), []).append(os.path.join(place, file))
        found = listed[place].get(unicode_form(name), [])
        if found:
            return [f for f in found if os.path.splitext(os.path.basename(f))[0] == name] or found
    return []


def voc_lists(root: Path) -> dict[str, list[Path]]:
    """The lists of images that a folder in VOC layout has, by split. Where trainval is beside test, or alone, it is as
    published: trainval of every year, test of the first year that has one. Else train, val and test. "all": CVAT's
    default.txt."""
    def of(year: Path, *names: str) -> list[Path]:
        lists = [year / "ImageSets" / "Main" / f"{name}.txt" for name in names]
        return [file for file in lists if file.is_file()]

    years = voc_years(root)
    train, val, trainval, test, default = ([file for year in years for file in of(year, name)]
                                           for name in ("train", "val", "trainval", "test", "default"))
    if trainval and (test or not (train and val)):
        train = [file for year in years for file in of(year, "trainval") or of(year, "train", "val")]
        val = []
    found = {"train": train, "val": val, "test": test[:1]}
    return {split: files for split, files in found.items() if files} or ({"all": default} if default else {})


def voc_images(root: Path, split: str) -> list[tuple[Path, str]]:
    """(year folder, image file name) in list order: trainval of every year for "train", else test of the first."""
    years = voc_years(root)
    part, years = ("trainval", years) if split == "train" else ("test", years[:1])
    return voc_list_images([year / "ImageSets" / "Main" / f"{part}.txt" for year in years])


def voc_list_images(lists: Sequence[Path]) -> list[tuple[Path, str]]:
    """(year folder, image file name) of all lines of these lists, in order. What is spelled otherwise in a list is
    said."""
    found = []
    for source in lists:
        year = source.parents[2]
        folder = year / "JPEGImages"
        stems = list(filter(None, map(str.strip, read_lines(source, "the VOC image list"))))
        listed: dict[str, dict[str, list[str]]] = {}
        lines: dict[str, str] = {}  # file -> its line
        for stem in stems:
            files = _voc_files(folder, stem, listed)
            if not files:
                raise UserError(f"{source}: no image {stem}.jpg in {folder}. Add it or remove the line.")
            if len(files) > 1:
                raise UserError(f"{source}: {stem} may be {' or '.join(files)} in {folder}. Leave one of them there.")
            if files[0] in lines:
                raise UserError(f"{source}: {stem} is listed twice. Remove one of the lines.")
            lines[files[0]] = stem
        finder = FileFinder()
        finder.respelled = {stem: file for file, stem in lines.items() if os.path.splitext(file)[0] != stem}
        for note in finder.note(source, len(stems)):
            print_rank0(f"note: {note}")
        found += [(year, file) for file in lines]
    return found


def open_list(path: Path) -> ImageFiles:
    """The user's own paths: absolute or leading anywhere, to any of FORMATS. A file named twice counts once."""
    keys, finder = [], FileFinder()
    starts: dict[str, str] = {}  # of each folder named: what its keys begin with
    for number, line in enumerate(read_lines(path, "the image list"), start=1):
        if (line := line.strip()) and not line.startswith("#"):
            folder, name = os.path.split(line)
            if folder not in starts:
                place = path.parent / Path(folder).expanduser()
                start = (place.relative_to(path.parent) if place.is_relative_to(path.parent) else place).as_posix()
                starts[folder] = "" if start == "." else start.rstrip("/") + "/"
            key = starts[folder] + name
            if (there := finder.find(path.parent, key)) is None:
                raise UserError(f"{path}, line {number}: {path.parent / key} does not exist. "
                                "Paths are relative to the list's folder; correct or remove the line.")
            keys.append(there)
    for note in finder.note(path, len(keys)):
        print_rank0(f"note: {note}")
    del finder  # that memory first: the keys are joined next
    return ImageFiles(path.name, path.parent, keys)


# Where a drawn set begins in the endless row of scenes: pretraining, its held-out part, detection training and test
# never share one.
SYNTHETIC_OFFSET = {"images/train": 0, "images/val": 10_000_000, "detection/train": 20_000_000,
                    "detection/test": 30_000_000}


def open_images(data: str, data_root: str | None, *, split: str = "train", synthetic_images: int = 800,
                synthetic_size: int = 160, seed: int = 0) -> ImageFiles | SyntheticScenes:
    """`data`: imagenet100 | imagenet | coco | coco_unlabeled | voc | synthetic | a .txt with one path per line | a
    folder of images (a name wins over a folder called the same). `split`: train, or val/test = the held-out part of a
    named set. Raises UserError where nothing usable is found."""
    part = "train" if split == "train" else "val"
    if data == "synthetic":
        return SyntheticScenes(synthetic_images, synthetic_size, seed, SYNTHETIC_OFFSET[f"images/{part}"])
    if data in ("imagenet", "imagenet100"):
        images = _open_imagenet(data, data_root, part)
    elif data == "coco":
        root = named_root(data, data_root, part, lambda place: (place / f"{part}2017").is_dir()) / f"{part}2017"
        images = ImageFiles(data, root, find_images(root))
    elif data == "coco_unlabeled":  # SoCo, Table 9: both together; held out is COCO's val
        folders = ("train2017", "unlabeled2017") if part == "train" else ("val2017",)
        root = named_root(data, data_root, part, lambda place: all((place / name).is_dir() for name in folders))
        images = ImageFiles(data, root, find_images(root, folders))
    elif data == "voc":
        root = named_root(data, data_root, part, lambda place: bool(voc_years(place)))
        images = ImageFiles(data, root, [f"{year.relative_to(root).as_posix()}/JPEGImages/{name}"
                                         for year, name in voc_images(root, split)])
    elif data.lower().endswith(".txt"):
        images = open_list(Path(data).expanduser())
    elif (root := Path(data).expanduser()).is_dir():
        images = ImageFiles(root.resolve().name, root, find_images(root))
    else:
        raise UserError(f"--data {data}: no such folder. Give a folder of images, a .txt list, or imagenet100, "
                        "imagenet, coco, coco_unlabeled, voc, synthetic.")
    if not len(images):
        raise UserError(f"--data {data}: no images in {images.root}. "
                        f"Looked for {' '.join(EXTENSIONS)} in it and below; give another folder or list.")
    return images


def hold_out(source: ImageFiles | SyntheticScenes, count: int, seed: int, data: str, train_images: int = 0
             ) -> tuple[np.ndarray, np.ndarray]:
    """-> (indices to train on, `count` indices kept for the probe), both sorted. train_images: so many of the others to
    train on, 0 = all. UserError when the probe would take half or more, or there are not so many."""
    if count and len(source) <= 2 * count:
        raise UserError(f"{data}: {len(source)} images are too few to hold out {count}; give "
                        "--probe_images N below half of them, or 0")
    if train_images > len(source) - count:
        raise UserError(f"--train_images {train_images}: {data} has {len(source) - count} images to train on")
    drawn = count or train_images
    order = np.random.default_rng(seed).permutation(len(source)) if drawn else np.arange(len(source))
    return np.sort(order[count:][:train_images or None]), np.sort(order[:count])


def open_training_images(cfg: Any) -> tuple[ImageFiles | SyntheticScenes, np.ndarray, np.ndarray]:
    """-> (source, indices to train on, indices held out for the probe). `cfg`: a method's Config. Nothing is held out
    where the probe has images of its own: --probe_data, or further synthetic scenes."""
    if cfg.probe_images == 1:
        raise UserError("--probe_images 1: the row `shuffled` needs at least 2 images; 0 means no probe")
    if cfg.probe_every and not cfg.probe_images:
        raise UserError(f"--probe_every {cfg.probe_every}: give --probe_images N too, on how many images it measures")
    source = open_images(cfg.data, cfg.data_root, synthetic_images=cfg.synthetic_images,
                         synthetic_size=cfg.synthetic_size, seed=cfg.seed)
    count = 0 if cfg.probe_data or cfg.data == "synthetic" else cfg.probe_images
    return source, *hold_out(source, count, cfg.seed, cfg.data, cfg.train_images)


def open_pretraining(cfg: Any) -> tuple:
    """-> (source, indices to train on, source of the probe, its indices), for a method whose probe needs images but no
    boxes. The probe's images: of --probe_data, else unseen synthetic scenes, else held out from training."""
    source, indices, held_out = open_training_images(cfg)
    if not cfg.probe_data and cfg.data != "synthetic":
        return source, indices, source, held_out
    probe_source = open_images(cfg.probe_data or "synthetic", cfg.data_root, split="val",
                               synthetic_images=cfg.probe_images, synthetic_size=cfg.synthetic_size, seed=cfg.seed)
    if cfg.probe_images and len(probe_source) < 2:
        raise UserError(f"--probe_data {cfg.probe_data}: one image is too few, the row `shuffled` needs at least 2")
    return source, indices, probe_source, np.arange(min(cfg.probe_images, len(probe_source)))


def evenly_spread(images: int, wanted: int) -> list[int]:
    """Places of at most `wanted` of them, evenly spread: a folder lies in the order of its classes."""
    return np.linspace(0, images - 1, min(images, wanted)).round().astype(int).tolist()


# ==== 3. Synthetic scenes ====


def _star(r: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Five tips at radius 1, notches at .45: r against the straight edge from tip to notch, in each of ten sectors."""
    turn = abs((a + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    notch = 0.45 * np.exp(1j * np.pi / 5)
    return r * (np.cos(turn) * notch.imag + np.sin(turn) * (1 - notch.real)) < notch.imag


_SHAPES = {  # inside of a unit-radius shape at (u, v), r and a the same point in polar coordinates
    "disc": lambda u, v, r, a: r < 1,
    "square": lambda u, v, r, a: np.maximum(abs(u), abs(v)) < 0.78,
    "triangle": lambda u, v, r, a: r * np.cos((a + np.pi / 3) % (2 * np.pi / 3) - np.pi / 3) < 0.5,
    "star": lambda u, v, r, a: _star(r, a),
    "ring": lambda u, v, r, a: (r < 1) & (r > 0.5)}
_TEXTURES = {  # each class's own family at a frequency f: the weight of the object's second colour
    "disc": lambda u, v, r, a, f: (u + 1) / 2,  # gradient
    "square": lambda u, v, r, a, f: np.sin(f * u) * np.sin(f * v) > 0,  # checks
    "triangle": lambda u, v, r, a, f: np.sin(1.4 * f * u) > 0,  # stripes
    "star": lambda u, v, r, a, f: np.cos(1.5 * f * u) + np.cos(1.5 * f * v) > 0.6,  # dots
    "ring": lambda u, v, r, a, f: np.sin(round(f) * a) > 0}  # wedges


class SyntheticScenes:
    """`n` drawn scenes with boxes: image i is a pure function of (seed, offset + i, size). Same interface as
    ImageFiles, and scene(i).

    1-6 textured objects on a smooth colour field with clutter. Boxes are the exact extents of what can be SEEN of an
    object inside the image. An object is drawn only where 60 % of it are inside the image and every earlier one keeps
    half of its whole shape in sight.
    """

    CLASSES = tuple(_SHAPES)

    def __init__(self, n: int, size: int = 160, seed: int = 0, offset: int = 0):
        self.name, self.n, self.size, self.seed, self.offset = "synthetic", n, size, seed, offset
        self.drawn: dict[int, Image.Image] = {}  # scenes are drawn once: drawing takes longer than all that follows

    def __len__(self) -> int:
        return self.n

    def load(self, i: int, needs: Needs | None = None) -> Image.Image:
        if i not in self.drawn and len(self.drawn) * self.size ** 2 < 5e7:  # at most 150 MB
            self.drawn[i] = self.scene(i)[0]
        return self.drawn[i] if i in self.drawn else self.scene(i)[0]

    def key(self, i: int) -> str:
        return f"synthetic/{self.size}/{self.seed}/{self.offset + i:08d}"

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(map(self.key, range(self.n))).encode()).hexdigest()

    def scene(self, i: int) -> tuple[Image.Image, np.ndarray, np.ndarray]:
        """-> (PIL RGB [size, size], boxes_xyxy float32 [n, 4] px, labels int64 [n]), n >= 1."""
        image, seen, labels = self.draw(i)
        boxes = [(x.min(), y.min(), x.max() + 1, y.max() + 1) for y, x in map(np.nonzero, seen)]
        return image, np.array(boxes, np.float32).reshape(-1, 4), labels

    def draw(self, i: int) -> tuple[Image.Image, list[np.ndarray], np.ndarray]:
        """-> (PIL RGB, the visible part of each object as bool [size, size], labels int64 [n])."""
        rng = np.random.default_rng([3, self.seed, self.offset + i])
        canvas = self._background(rng)
        seen: list[np.ndarray] = []  # what is visible so far of each object, bool [size, size]
        areas, labels = [], []
        wanted = int(rng.integers(1, 7))
        for attempt in range(100):  # rejected placements are tried again, not for ever
            if len(labels) == wanted or (labels and attempt >= 4 * wanted):
                break
            label, mask, colour, full = self._object(rng, canvas)
            left = [np.count_nonzero(s & ~mask) for s in seen]
            if np.count_nonzero(mask) <= 0.6 * full or any(now < 0.5 * area for now, area in zip(left, areas)):
                continue
            canvas[mask] = colour[mask]
            seen = [s & ~mask for s in seen] + [mask]
            areas.append(full)
            labels.append(label)
        canvas = cv2.GaussianBlur(canvas, (0, 0), 0.7) + rng.normal(0, 4, canvas.shape).astype(np.float32)
        return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), seen, np.array(labels, np.int64)

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """Smooth colour field, faint blotches and lines, low-frequency noise: float32 [size, size, 3]."""
        s = self.size
        field = rng.uniform(40, 215, 3) + rng.normal(0, 25, (3, 3, 3))
        canvas = cv2.resize(field.astype(np.float32), (s, s), interpolation=cv2.INTER_CUBIC)
        clutter = canvas.copy()
        for _ in range(int(rng.integers(4, 10))):
            centre = rng.integers(0, s, 2).tolist()
            axes = (s * rng.uniform(0.02, 0.16, 2)).astype(int).tolist()
            colour = (field[1, 1] + rng.normal(0, 60, 3)).tolist()
            cv2.ellipse(clutter, centre, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1)
        for _ in range(int(rng.integers(2, 8))):
            start, end = rng.integers(0, s, (2, 2)).tolist()
            cv2.line(clutter, start, end, (field[1, 1] + rng.normal(0, 90, 3)).tolist(), int(rng.integers(1, 3)))
        noise = cv2.resize(rng.normal(0, 14, (s // 5 + 1, s // 5 + 1)).astype(np.float32), (s, s),
                           interpolation=cv2.INTER_LINEAR)
        return cv2.GaussianBlur(0.5 * canvas + 0.5 * clutter, (0, 0), 1.0) + noise[..., None]

    def _object(self, rng: np.random.Generator, canvas: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, int]:
        """-> (label, mask bool [size, size] inside the image, colours float32 [size, size, 3], pixels of the whole
        shape)."""
        s = self.size
        label = int(rng.integers(len(self.CLASSES)))
        radius = s * np.exp(rng.uniform(np.log(0.12), np.log(0.55))) / 2
        centre = rng.uniform(0.6 * radius, s - 0.6 * radius, 2)
        turn = rng.uniform(0, 2 * np.pi)
        first = centre.astype(int) - int(radius) - 1  # row, column of the first of the side x side pixels it lies in
        side = 2 * int(radius) + 4
        y, x = np.mgrid[:side, :side] + (first + 0.5 - centre)[:, None, None]
        u = (np.cos(turn) * x + np.sin(turn) * y) / radius
        v = (np.cos(turn) * y - np.sin(turn) * x) / radius
        r, a = np.hypot(u, v), np.arctan2(v, u)
        name = self.CLASSES[label]
        inside = _SHAPES[name](u, v, r, a)
        weight = _TEXTURES[name](u, v, r, a, rng.uniform(4, 6))[..., None]
        behind = canvas[int(centre[0]), int(centre[1])]
        while np.abs((colour := rng.uniform(0, 255, 3)) - behind).max() < 45:  # an object stands out from where it lies
            pass
        second = colour + rng.choice([-1, 1]) * rng.uniform(20, 130, 3)
        mask = np.zeros((s, s), bool)
        colours = np.zeros((s, s, 3), np.float32)
        low, high = np.clip([first, first + side], 0, s)
        here = np.s_[low[0]:high[0], low[1]:high[1]]
        patch = np.s_[low[0] - first[0]:high[0] - first[0], low[1] - first[1]:high[1] - first[1]]
        mask[here] = inside[patch]
        colours[here] = (colour + weight * (second - colour))[patch]
        return label, mask, colours, int(np.count_nonzero(inside))


# ==== 4. Geometry: drawn, then applied ====


def resized_hw(hw: tuple[int, int], size: int, max_size: int | None = None) -> tuple[int, int]:
    """DETR's rule: short side -> `size`, or less where the long one would pass `max_size`; the other is floored."""
    h, w = hw
    short, long = min(hw), max(hw)
    if max_size and long / short * size > max_size:
        size = int(round(max_size * short / long))
        if not size:  # a strip: with its own long side it would pad a whole batch to that
            return (1, max_size) if h < w else (max_size, 1)
    if short == size:
        return h, w
    return (int(size * h / w), size) if w < h else (size, int(size * w / h))


def view_needs(hw: tuple[int, int], *, scales: Sequence[int], max_size: int | None,
               crop_scales: Sequence[int] | None = (400, 500, 600), crop_range: tuple[int, int] | None = (384, 600)
               ) -> tuple[int, int]:
    """The largest size to which draw_geometry with these arguments first resizes an image: for Needs."""
    first = resized_hw(hw, max(crop_scales), 20 * max(crop_scales)) if crop_scales and crop_range else (1, 1)
    return tuple(map(max, resized_hw(hw, max(scales), max_size), first))


def crop_needs(hw: tuple[int, int], side: int, area: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
               ) -> tuple[float, float]:
    """The size of an image in which the smallest region of draw_crop has side x side pixels: for Needs."""
    smallest = [min(*hw, math.sqrt(area[0] * hw[0] * hw[1] * least)) for least in (1 / ratio[1], ratio[0])]
    return side * hw[0] / smallest[0], side * hw[1] / smallest[1]


Augmentation = Literal["flips", "rotate90", "colour"]  # what --augment adds; the first two are drawn by draw_geometry


@dataclass
class Geometry:
    """What is done to one image, in this order: quarter turns against the clock, flip left-right, resize to first_hw,
    crop (top, left, h, w), resize to hw."""
    flip: bool
    first_hw: tuple[int, int] | None
    crop: tuple[int, int, int, int] | None
    hw: tuple[int, int]
    turns: int = 0

    def needs(self) -> tuple[int, int]:
        """To which size the image, not yet turned, is resized first: for Needs."""
        hw = self.first_hw or self.hw
        return hw[::-1] if self.turns % 2 else hw


def draw_geometry(rng: np.random.Generator, hw: tuple[int, int], *, scales: Sequence[int], max_size: int | None,
                  crop_scales: Sequence[int] | None = (400, 500, 600), crop_range: tuple[int, int] | None = (384, 600),
                  flip: float = 0.5, augment: Sequence[Augmentation] = ()) -> Geometry:
    """DETR's augmentation: with p = .5 resize to one of `scales`; else resize to one of `crop_scales` (long side at
    most 20 times that), cut w, h ~ U{lo..min(side, hi)} at a uniform place, resize to one of `scales`. Without
    crop_scales or crop_range: never the crop branch.

    augment: "flips" flips top-bottom too, with p = .5; "rotate90" turns by 0..3 quarters, and all sizes are drawn for
    the turned image. Without them no number is drawn for them."""
    flipped = bool(rng.random() < flip)
    turns = int(rng.integers(4)) if "rotate90" in augment else 0
    if "flips" in augment and rng.random() < 0.5:  # a flip top-bottom is one left-right after half a turn
        flipped, turns = not flipped, (turns + 2) % 4
    hw = hw[::-1] if turns % 2 else hw
    first = crop = None
    if crop_scales and crop_range and rng.random() < 0.5:
        size = int(rng.choice(crop_scales))
        first = hw = resized_hw(hw, size, 20 * size)  # released: no maximum; 1 x 5000 px would be 600 x 3,000,000
        lo, hi = crop_range
        w, h = (int(rng.integers(min(lo, side), min(side, hi) + 1)) for side in (hw[1], hw[0]))
        crop = int(rng.integers(hw[0] - h + 1)), int(rng.integers(hw[1] - w + 1)), h, w
        hw = h, w
    return Geometry(flipped, first, crop, resized_hw(hw, int(rng.choice(scales)), max_size), turns)


def draw_crop(rng: np.random.Generator, hw: tuple[int, int], area: tuple[float, float],
              ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> tuple[int, int, int, int]:
    """A random box (x1, y1, x2, y2) of an image of size hw, as torchvision's RandomResizedCrop: its share of the area,
    then w / h in `ratio`."""
    height, width = hw
    for _ in range(10):
        size = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    aspect = min(max(width / height, ratio[0]), ratio[1])  # the central part with an allowed aspect
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def flip_boxes(boxes_xyxy: Tensor, width: float) -> Tensor:
    """Mirror [n, 4] in an image `width` px wide."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], -1)


def turn_boxes(boxes_xyxy: Tensor, hw: tuple[int, int], turns: int) -> Tensor:
    """[n, 4] of an image of size hw -> of the same image after that many quarter turns against the clock."""
    for _ in range(turns):
        x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
        boxes_xyxy = torch.stack([y1, hw[1] - x2, y2, hw[1] - x1], -1)
        hw = hw[::-1]
    return boxes_xyxy


def resize_boxes(boxes_xyxy: Tensor, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> Tensor:
    """[n, 4] of an image of size from_hw -> of the same image at to_hw, each axis by its own exact ratio."""
    sy, sx = to_hw[0] / from_hw[0], to_hw[1] / from_hw[1]
    return boxes_xyxy * boxes_xyxy.new_tensor([sx, sy, sx, sy])


def crop_boxes(boxes_xyxy: Tensor, region: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Shift and clip [n, 4] to region (top, left, h, w) -> (boxes [m, 4], keep int64 [m]: which are not empty)."""
    top, left, h, w = region
    boxes = boxes_xyxy - boxes_xyxy.new_tensor([left, top, left, top])
    boxes = torch.minimum(boxes, boxes.new_tensor([w, h, w, h])).clamp(min=0)
    keep = torch.nonzero((boxes[:, 2:] > boxes[:, :2]).all(1)).flatten()
    return boxes[keep], keep


def resize(image: Image.Image, hw: tuple[int, int]) -> Image.Image:
    """PIL RGB -> PIL RGB of size hw, bilinear and antialiased: Pillow, or for 200 x 200 px and more torch's kernel of
    the same rule, which takes half the time. Its weights have fewer bits: in 1 of 100 values (a quarter, where the
    ratio of the sizes makes ties) it is off by one grey level, two in pure noise. The demos are below that size."""
    if image.size == hw[::-1]:
        return image
    if hw[0] * hw[1] < 200 * 200:
        return image.resize(hw[::-1], Image.Resampling.BILINEAR)
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    planes = F.interpolate(array, size=hw, mode="bilinear", antialias=True)[0].contiguous().numpy()
    return Image.fromarray(cv2.merge(list(planes)))


def cut(image: Image.Image | ImagePyramid, box: tuple[int, int, int, int], hw: tuple[int, int]) -> Image.Image:
    """The region `box` (xyxy px of the image) squeezed to size hw, aspect not kept."""
    return image.cut(box, hw) if isinstance(image, ImagePyramid) else resize(image.crop(box), hw)


_TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


def apply_geometry(image: Image.Image | ImagePyramid, boxes_xyxy: Tensor, geometry: Geometry
                   ) -> tuple[Image.Image, Tensor, Tensor]:
    """-> (image, boxes_xyxy [m, 4] px of it, keep int64 [m]). Antialiased bilinear, as torchvision's resize of a PIL
    image."""
    boxes, keep = boxes_xyxy, torch.arange(len(boxes_xyxy))
    hw = image.height, image.width  # of the original; a pyramid's image is resized before it is turned
    if isinstance(image, ImagePyramid):
        image = image.cut((0, 0, *image.size), geometry.needs())
    if geometry.turns:
        boxes = turn_boxes(boxes, hw, geometry.turns)
        image = image.transpose(_TURNS[geometry.turns])
        hw = hw[::-1] if geometry.turns % 2 else hw
    if geometry.flip:
        boxes = flip_boxes(boxes, hw[1])
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for resized in (geometry.first_hw, geometry.hw):
        if resized is geometry.hw and geometry.crop:
            top, left, *hw = geometry.crop
            image = image.crop((left, top, left + hw[1], top + hw[0]))
            boxes, keep = crop_boxes(boxes, geometry.crop)
        if resized:
            boxes = resize_boxes(boxes, hw, resized)
            image, hw = resize(image, resized), resized
    return image, boxes, keep


def apply_geometry_to_masks(masks: Tensor, geometry: Geometry) -> Tensor:
    """uint8 [n, h, w] of the image before -> of the image after apply_geometry; resized to the nearest pixel."""
    masks = masks.rot90(geometry.turns, (-2, -1))
    masks = masks.flip(-1) if geometry.flip else masks
    for resized in (geometry.first_hw, geometry.hw):
        if resized is geometry.hw and geometry.crop:
            top, left, h, w = geometry.crop
            masks = masks[:, top:top + h, left:left + w]
        if resized:
            masks = F.interpolate(masks[:, None], size=resized, mode="nearest-exact")[:, 0]
    return masks


def normalized_cxcywh(boxes_xyxy: Tensor, hw: tuple[int, int]) -> Tensor:
    """Pixel xyxy [n, 4] -> cx, cy, w, h in 0..1 of an image of size hw."""
    return box_convert(boxes_xyxy, "xyxy", "cxcywh") / boxes_xyxy.new_tensor([hw[1], hw[0], hw[1], hw[0]])


# ==== 5. Colours: drawn, then applied ====

_LEVELS = TF.to_dtype(torch.arange(256, dtype=torch.uint8).expand(3, 1, 256), torch.float32, scale=True)
# [3, 1, 256]: what each of a channel's 256 values becomes
_NORMALIZED_LEVELS = TF.normalize(_LEVELS, list(IMAGENET_MEAN), list(IMAGENET_STD)).numpy()


def to_normalized_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> float32 [3, h, w], ImageNet mean and std: torchvision's values, looked up."""
    planes = np.empty((3, image.height, image.width), np.float32)
    for plane, channel, levels in zip(planes, cv2.split(np.asarray(image)), _NORMALIZED_LEVELS):
        cv2.LUT(channel, levels, dst=plane)
    return torch.from_numpy(planes)


@dataclass
class Photometric:
    """ColorJitter strengths and the probabilities of jitter, grey, blur and solarise, applied in this order."""
    brightness: float
    contrast: float
    saturation: float
    hue: float
    p_jitter: float
    p_gray: float
    p_blur: float
    blur_radius: tuple[float, float] = (0.1, 2.0)  # px, PIL's radius
    p_solarize: float = 0.0


# `--augment colour`: SSD's strengths, as in torchvision's RandomPhotometricDistort. MoCo v2's, those of DETReg's
# patches, wash cells out of a bright picture and make red hearts pink, where colour may tell classes apart: hence no
# grey either, and no blur, which takes small objects.
COLOUR = Photometric(0.125, 0.5, 0.5, 0.05, p_jitter=0.8, p_gray=0, p_blur=0)

_HUES = (np.array([5, 3, 1]) + np.arange(256)[:, None] * 6 / 255) % 6
# [256, 3]: the share of a hue's saturation that each of R, G, B lacks
_HUE_TO_RGB = np.minimum(_HUES, 4 - _HUES).clip(0, 1).astype(np.float32)


def adjust_hue(image: Image.Image, shift: float) -> Image.Image:
    """PIL RGB -> the same, its hue turned by `shift` of the circle in steps of 1/255: torchvision's values (Pillow's
    8-bit HSV and back) in half the time, as the way back is a table."""
    hue, saturation, value = cv2.split(np.asarray(image.convert("HSV")))
    saturation = saturation.astype(np.float32) / 255
    value = value.astype(np.float32)
    lacking = np.ascontiguousarray(np.roll(_HUE_TO_RGB, -int(shift * 255), axis=0).T)
    channels = [(value * (1 - saturation * cv2.LUT(hue, lack)) + np.float32(0.5)).astype(np.uint8) for lack in lacking]
    return Image.fromarray(cv2.merge(channels))


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Pillow's GaussianBlur(sigma) of PIL RGB, from 100 x 100 px on in a quarter of the time: three times a box along
    each axis, each time rounded to 8 bits. A box is 2 l + 1 pixels and a share of one more at each end, such that three
    have the variance of the Gaussian. To the bit for nearly all sigmas. Some make ties in the rounding: over U(0.1, 2)
    one grey level in 1 of 10,000 values; 1.0 itself up to 3. The demos stay with Pillow."""
    if image.width * image.height < 100 * 100:
        return image.filter(ImageFilter.GaussianBlur(sigma))
    variance = sigma ** 2 / 3
    l = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * l + 1) * (l * (l + 1) - 3 * variance) / (6 * (variance - (l + 1) ** 2))
    box = np.array([[end, *[1] * (2 * l + 1), end]], np.float32) / np.float32(2 * (l + end) + 1)
    array = np.asarray(image)
    for kernel in (box, box, box, box.T, box.T, box.T):
        array = cv2.filter2D(array, -1, kernel, borderType=cv2.BORDER_REPLICATE)
    return Image.fromarray(array)


_JITTER = {"brightness": TF.adjust_brightness, "contrast": TF.adjust_contrast, "saturation": TF.adjust_saturation,
           "hue": adjust_hue}


def draw_photometric(rng: np.random.Generator, spec: Photometric) -> dict:
    """Plain numbers for apply_photometric. Factors as torchvision's ColorJitter: U(max(0, 1 - s), 1 + s), hue U(-s, s),
    in a random order."""
    strength = {name: getattr(spec, name) for name in _JITTER}
    draw = {name: float(rng.uniform(-s, s) if name == "hue" else rng.uniform(max(0, 1 - s), 1 + s))
            for name, s in strength.items()}
    names = list(strength)
    order = [names[k] for k in rng.permutation(4) if strength[names[k]] > 0]
    jitter, gray, blur, solarize = (rng.random(4) < [spec.p_jitter, spec.p_gray, spec.p_blur, spec.p_solarize]).tolist()
    radius = float(rng.uniform(*spec.blur_radius))
    return draw | {"order": order if jitter else [], "gray": gray, "blur": radius if blur else None,
                   "solarize": solarize}


def apply_photometric(image: Image.Image, draw: dict) -> Image.Image:
    """PIL RGB -> PIL RGB: the jitter operations of draw["order"], grey, PIL's Gaussian blur, solarise at 128."""
    for name in draw["order"]:
        image = _JITTER[name](image, draw[name])
    if draw["gray"]:
        image = image.convert("L").convert("RGB")
    if draw["blur"] is not None:
        image = blur(image, draw["blur"])
    return ImageOps.solarize(image, 128) if draw["solarize"] else image


def cut_patch(image: Image.Image | ImagePyramid, box_xyxy: Sequence[float], size: int, draw: dict) -> Tensor:
    """A region (px, rounded as PIL does) squeezed to size x size, aspect not kept, then recoloured by
    apply_photometric. [3, size, size]"""
    region = cut(image, tuple(round(v) for v in box_xyxy), (size, size))
    return to_normalized_tensor(apply_photometric(region, draw))


# ==== 6. Loader ====


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of all randomness of one sample."""
    # [1, ...] shuffles, [3, ...] draws scenes: fixed tags keep the streams apart
    return np.random.default_rng([2, seed, epoch, index])


class StepSampler:
    """A DataLoader batch_sampler: lists of (epoch, index) for this rank, one per micro-batch, over all steps from
    start_step on. UserError: see run.check_batch_size.

    An epoch's order depends on (seed, epoch) alone; a step's global batch is the same piece of it whatever world and
    accumulate are. Micro-batch a of rank r is its piece a * world + r of world * accumulate. What is left of an epoch's
    order after its last whole batch is left out.

    repeats [n]: how often each image is in an epoch, in the mean (detectron2's RepeatFactorTrainingSampler): the whole
    part, and once more with the chance of the rest. Epochs then differ in length. The copies of an image have numbers
    of their own in place of the epoch's, from which their augmentations follow.
    """

    def __init__(self, n: int, batch_size: int, total_steps: int, *, start_step: int = 0, world: int = 1, rank: int = 0,
                 accumulate: int = 1, seed: int = 0, shuffle: bool = True, repeats: np.ndarray | None = None):
        length = images_per_epoch(n, repeats)
        check_batch_size(length, batch_size, world, accumulate)
        self.n, self.batch_size, self.total_steps, self.start_step = n, batch_size, total_steps, start_step
        self.world, self.rank, self.accumulate, self.seed, self.shuffle = world, rank, accumulate, seed, shuffle
        self.steps_per_epoch, self.repeats = length // batch_size, repeats

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size // (self.world * self.accumulate)
        # with repeats only the epochs before tell where one begins
        epoch = 0 if self.repeats is not None else self.start_step // self.steps_per_epoch
        begin = epoch * self.steps_per_epoch
        while begin < self.total_steps:
            numbers, order = self.epoch_order(epoch)
            end = begin + len(order) // self.batch_size
            for step in range(max(begin, self.start_step), min(end, self.total_steps)):
                for a in range(self.accumulate):
                    first = (step - begin) * self.batch_size + (a * self.world + self.rank) * size
                    yield list(zip(numbers[first:first + size].tolist(), order[first:first + size].tolist()))
            epoch, begin = epoch + 1, end

    def epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(what stands for the epoch, index) of each sample of an epoch, in order."""
        rng = np.random.default_rng([1, self.seed, epoch])
        if self.repeats is None:
            order = rng.permutation(self.n) if self.shuffle else np.arange(self.n)
            return np.broadcast_to(epoch, self.n), order
        whole = np.floor(self.repeats).astype(np.int64)
        counts = whole + (rng.random(self.n) < self.repeats - whole)
        copy = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        order = rng.permutation(len(copy))
        return epoch * (int(whole.max()) + 1) + copy[order], np.repeat(np.arange(self.n), counts)[order]


def images_per_epoch(n: int, repeats: np.ndarray | None = None) -> int:
    """Of n images; with StepSampler's repeats in the mean."""
    return n if repeats is None else round(float(repeats.sum()))


def collate(samples: list[dict]) -> dict:
    """[{"image" [3, h, w], "target", "skipped", "index" if known}] -> images [B, 3, H, W] zero-padded bottom/right,
    mask bool [B, H, W] True = padding, lists; "fallback", where samples have it, is their sum."""
    heights, widths = zip(*(s["image"].shape[-2:] for s in samples))
    images = samples[0]["image"].new_zeros(len(samples), 3, max(heights), max(widths))
    mask = torch.ones(len(samples), max(heights), max(widths), dtype=torch.bool)
    for k, (sample, h, w) in enumerate(zip(samples, heights, widths)):
        images[k, :, :h, :w] = sample["image"]
        mask[k, :h, :w] = False
    return {"images": images, "mask": mask, "targets": [s["target"] for s in samples],
            "skipped": [p for s in samples for p in s["skipped"]],
            **({"index": [s["index"] for s in samples]} if "index" in samples[0] else {}),
            **({"fallback": sum(s["fallback"] for s in samples)} if "fallback" in samples[0] else {})}


def load_usable(source: ImageFiles | SyntheticScenes | Any, index: int, rng: np.random.Generator, skipped: list,
                candidates: Sequence[int] | None = None, min_side: int = 1, needs: Needs | None = None) -> tuple:
    """-> (what source.load gives, index used). An unreadable image, or one with a side below min_side px, is appended
    to `skipped` ("path: reason") and another index drawn (from `candidates`, else from the whole source), at most 10
    times; then UserError."""
    for _ in range(11):
        try:
            loaded = source.load(index, needs) if needs else source.load(index)
            width, height = (loaded[0] if isinstance(loaded, tuple) else loaded).size
            if min(width, height) < min_side:
                raise UnreadableImage(source.key(index),
                                      f"{width} x {height} pixels, at least {min_side} a side are needed")
            return loaded, index
        except UnreadableImage as error:
            skipped.append(str(error))
            index = int(rng.choice(len(source) if candidates is None else candidates))
    raise UserError(f"11 images in a row cannot be used, the last: {'; '.join(skipped[-3:])}. "
                    "Repair or remove these files.")


class _ErrorsAsValues:
    """Dataset wrapper: bad input becomes a value; DataLoader would bury a worker's exception in a traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        try:
            return self.dataset[key]
        except UnreadableImage as error:
            return UserError(f"{error}. Repair or remove the file.")
        except UserError as error:
            return error


def _collate_or_error(collate: Callable, samples: list):
    if error := next((s for s in samples if isinstance(s, UserError)), None):
        return error
    batch = collate(samples)
    return _too_large(batch) or batch


class _Loader(DataLoader):
    """A DataLoader that raises a worker's UserError as it was."""

    def __iter__(self):
        message = None
        try:
            batches = super().__iter__()
        except OSError as error:
            raise UserError(f"{self.num_workers} loader processes cannot be started ({error.strerror or error}); give "
                            "a lower --num_workers, or more memory") from error
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    message = str(batch)
                    break
                yield batch
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            # PyTorch's own sentence comes too late where a worker dies while a tensor of its batch is fetched from it
            if not self.num_workers or "Caught " in str(error):  # what a worker raised itself
                raise
            raise RuntimeError(f"DataLoader worker {_first_dead(self._iterator._workers)}") from error
        if message:
            self._iterator = None  # ends the workers now; held by the traceback they would end only after a 5 s wait
            raise UserError(message)


def _first_dead(workers: list[multiprocessing.Process]) -> str:
    """As PyTorch says it."""
    for worker in workers:
        worker.join(1)  # it may not have ended entirely
        if worker.exitcode:
            reason = f"killed by signal: {signal.strsignal(-worker.exitcode)}" if worker.exitcode < 0 else "exited"
            return f"(pid {worker.pid}) is {reason}."
    return f"(pid {', '.join(str(worker.pid) for worker in workers)}) cannot be reached."


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_failure
    # a cluster, and a terminal, sends them to every process of a job, but the main process finishes its step first
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _send_failure(queue: multiprocessing.queues.Queue, error: Exception, message: tuple) -> None:
    """In place of a batch that cannot be sent, which a worker notices in another thread than its own and the main
    process not at all: why. `message`: (number of the batch, batch)."""
    reason = ExceptionWrapper(where="in a loader process, which could not send its batch")  # ours: with a traceback
    if isinstance(error, OSError) or "shared memory" in str(error) or "unable to" in str(error):
        reason = UserError(loader_failure(str(error)) or "a batch cannot be sent from its loader process "
                           f"({str(error).partition(chr(10))[0]}); {MORE_ROOM}")
    queue.put((message[0], reason))


MORE_ROOM = ("give more shared memory (docker run --shm-size=8g or --ipc=host), a lower --num_workers (0 needs none) "
             "or a smaller --batch_size")


def _too_large(batch: Any) -> UserError | None:
    """In a loader process: shared memory that can't hold a batch of every one, or has no room for this one now."""
    workers = torch.utils.data.get_worker_info()
    if workers is None or not os.path.isdir("/dev/shm"):
        return None
    size, room = _bytes(batch), shutil.disk_usage("/dev/shm")
    processes = workers.num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if size <= room.free and size * processes <= room.total:
        return None
    return UserError(f"the shared memory /dev/shm of {room.total / 2**20:.0f} MiB ({room.free / 2**20:.0f} free) is "
                     f"too small for {processes} loader processes with batches of {size / 2**20:.1f} MiB: {MORE_ROOM}")


def _bytes(batch: Any) -> int:
    """Of all tensors in whatever dicts and sequences."""
    if isinstance(batch, Tensor):
        return batch.nbytes
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return sum(map(_bytes, parts))


@atexit.register
def _kill_workers() -> None:
    """At the end of the program. multiprocessing would do it with SIGTERM and wait, for ever after an exception that
    keeps its loader alive."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would call their end a failure
    for process in multiprocessing.active_children():
        if process.daemon:  # as loader processes are; a program's others are its own affair
            process.kill()


def _raise_open_file_limit() -> None:
    """Every tensor on its way from a loader process holds an open file, hundreds per batch: where they run out (seen at
    a limit of 128) it hangs."""
    try:
        import resource  # absent on Windows
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def make_loader(dataset, sampler, *, num_workers: int, collate: Callable) -> DataLoader:
    """`sampler` gives the batches (StepSampler). Own generator: the global random state is the same with and without
    workers."""
    _raise_open_file_limit()
    return _Loader(_ErrorsAsValues(dataset), batch_sampler=sampler, num_workers=num_workers,
                   collate_fn=partial(_collate_or_error, collate), worker_init_fn=_start_worker,
                   persistent_workers=num_workers > 0, pin_memory=torch.cuda.is_available(),
                   generator=torch.Generator())


def train_loader(job: Run, dataset, collate: Callable, repeats: np.ndarray | None = None) -> Iterator[dict]:
    """The micro-batches of all steps of a run that are left, in order. repeats: see StepSampler."""
    cfg = job.cfg
    sampler = StepSampler(len(dataset), cfg.batch_size, job.total_steps, start_step=job.start, world=world_size(),
                          rank=rank(), accumulate=cfg.accumulate, seed=cfg.seed, repeats=repeats)
    return iter(make_loader(dataset, sampler, num_workers=cfg.num_workers, collate=collate))
