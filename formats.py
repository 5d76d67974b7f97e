"""Label files as people have them: which layout a folder has (find_layout), and the readers of COCO json, VOC xml and
YOLO txt. docs/labels.md shows the layouts. What is read here becomes a DetectionSet in annotations.py.

A reader names what is wrong, with its file, as a UserError; nothing is dropped without a note.
"""
from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

from common import UserError
from data import (EXTENSIONS, FileFinder, find_images, named_root, read_lines, unicode_form, voc_list_images, voc_lists,
                  voc_years)


class LabelledImage(NamedTuple):
    """One image as its label file tells of it; neither the image nor its size need be known."""
    file: Path
    id: int | str
    hw: tuple[int, int] | None
    rows: list[tuple]  # (x1, y1, x2, y2, empty in the file's own terms, category id, crowd, difficult, area or NaN)
    segments: list | None  # with masks: of each object, as the file has it
    where: str | Path  # for messages: its label file, or its name in a file of many


@dataclass
class Labels:
    """What a reader gives. `form`: of the boxes in the files: xywh (COCO), corners that count from 1 (VOC), centre:
    centre and size (YOLO); of the last all coordinates in the rows are shares of width and height, else px."""
    source: Path
    listed: list[dict]  # the classes: {"id": as in the rows, "name"}
    categories: list[dict]  # those of a set opened without any given
    images: list[LabelledImage]
    form: str
    notes: list[str] = field(default_factory=list)
    class_notes: list[str] = field(default_factory=list)  # on `categories`
    federated: dict[str, dict] | None = None  # of an LVIS json (read_federated)


class Layout(NamedTuple):
    """`parts`: the splits that are there, each with its reader(masks): train, val, test, or "all" where there are none.
    """
    name: str
    parts: dict[str, Callable[[bool], Labels]]
    notes: list[str]


# ==== 1. COCO json ====


def _integer(value: Any) -> int:
    """A size of a json: 7, "7" and 7.0 are 7; ValueError for all else, which int() would round or take."""
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def json_id(value: Any) -> int | str:
    """An id of a json, as it is (7.0 is the number 7): "7" is another one. ValueError for what is no id."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) not in (int, str):
        raise ValueError(f"the id {value!r} is neither a whole number nor a text")
    return value


def id_order(key: int | str) -> tuple[bool, int | str]:
    """Sorts ids: numbers, then texts."""
    return isinstance(key, str), key


def _size(height: Any, width: Any, image: str) -> tuple[int, int] | None:
    """(h, w) of an annotation, None where one of them is missing or 0; ValueError for what no image can have."""
    if height in (None, "", 0, "0") or width in (None, "", 0, "0"):
        return None
    height, width = _integer(height), _integer(width)
    if not (0 < height < 2**31 and 0 < width < 2**31):
        raise ValueError(f"{image} is {width} x {height} px")
    return height, width


def image_name(image: dict) -> str:
    """The file of an image of a json. LVIS has no file_name, but a coco_url: its last folder and file."""
    if image.get("file_name") or not image.get("coco_url"):
        return str(image["file_name"])
    return "/".join(unquote(urlsplit(str(image["coco_url"])).path).strip("/").split("/")[-2:])


FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")


def read_federated(content: dict) -> dict[str, dict] | None:
    """What tells an LVIS json: {"images": {id: the FEDERATED lists of category ids}, "frequency": {category id: r, c or
    f, where it is given}}; None for another json."""
    if not any(image.get(key) is not None for image in content["images"] for key in FEDERATED):
        return None
    return {"images": {json_id(i["id"]): {key: [json_id(c) for c in i.get(key) or ()] for key in FEDERATED}
                       for i in content["images"]},
            "frequency": {json_id(c["id"]): str(c["frequency"]) for c in content["categories"] if c.get("frequency")}}


def _coco_content(path: Path) -> tuple[dict, list[dict], list[tuple[int | str, tuple[int, int] | None, str]]]:
    """-> (the file's content, its categories sorted by id, its images (id, (h, w) or None, file name) sorted by id).
    UserError for an id that occurs twice, ValueError for a size that no image can have."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    categories = sorted(({"id": json_id(c["id"]), "name": str(c["name"])} for c in content["categories"]),
                        key=lambda c: id_order(c["id"]))
    images = sorted(((json_id(i["id"]), _size(i.get("height"), i.get("width"), f"image {image_name(i)}"),
                      image_name(i)) for i in content["images"]), key=lambda i: id_order(i[0]))
    if len({i[0] for i in images}) < len(images) or len({c["id"] for c in categories}) < len(categories):
        raise UserError(f"{path}: an image id or category id occurs twice. Give every image and category its own id.")
    return content, categories, images


def _without_dummy(content: dict, categories: list[dict]) -> tuple[list[dict], list[str]]:
    """-> (categories, notes). Roboflow's exports begin with a category that stands for all others together: id 0, no
    object, the supercategory of each. It is none to learn."""
    first, *others = categories or [None]
    above = {str(c.get("supercategory")) for c in content["categories"] if c["id"] != 0}
    if (not others or first["id"] != 0 or above != {first["name"]}
        or any(json_id(a["category_id"]) == 0 for a in content["annotations"])):
        return categories, []
    return others, [f"category 0 ({first['name']}) has no object and is the supercategory of all others: left out."]


def _coco_objects(annotations: list[dict], ids: Sequence[int | str], masks: bool) -> tuple[dict, dict]:
    """-> (LabelledImage.rows, .segments) of each image id."""
    rows, segments = {key: [] for key in ids}, {key: [] for key in ids}
    texts = {str(key) for key in ids}
    for a in annotations:
        x, y, w, h = map(float, a["bbox"] if isinstance(a["bbox"], list) else ())
        category_id, image_id = json_id(a["category_id"]), json_id(a["image_id"])
        if image_id not in rows and str(image_id) in texts:
            raise ValueError(f"the image_id {image_id!r} is a {'text' if isinstance(image_id, str) else 'number'}, "
                             "the id of the image is not")
        area = float("nan") if a.get("area") is None else float(a["area"])
        crowd = _integer(a.get("iscrowd") or 0) > 0
        rows[image_id].append((x, y, x + w, y + h, w <= 0 or h <= 0, category_id, crowd, False, area))
        segments[image_id].append(a.get("segmentation") if masks else None)
    return rows, segments


def find_files(names: list[str], folders: list[Path], source: Path, by_url: bool = False
               ) -> tuple[Path, dict[str, str], list[str]]:
    """-> (the first of `folders` that holds all `names` (may contain subfolders), {name: as it is spelled there},
    notes). by_url: the names are of coco_urls, whose folders need not be there. UserError names what is missing."""
    for n in names:
        if ".." in PureWindowsPath(n).parts or PureWindowsPath(n).root or Path(n).drive:  # both kinds of separators
            raise UserError(f"{source}: the file name {n!r} leads out of the image folder. Give names below it; "
                            "links in it may lead elsewhere.")
    best: tuple[int, Path, list[str]] | None = None
    for folder in folders:
        finder = FileFinder()
        found = {n: finder.find(folder, n) or (finder.find(folder, n.split("/")[-1]) if by_url else None)
                 for n in names}
        missing = [n for n in names if found[n] is None]
        if not missing:
            return folder, found, finder.note(source, len(names))
        best = min(best or (len(names) + 1, folder, []), (len(missing), folder, missing), key=lambda b: b[0])
    raise UserError(f"{source}: {best[0]} of {len(names)} images are not there, the first: "
                    f"{best[1] / best[2][0]}. Looked in {', '.join(map(str, folders))}; "
                    + "download train2017 and val2017 of COCO from cocodataset.org, " * by_url
                    + "put the images there or give their folder as --data_root.")


def read_coco(path: Path, image_folders: list[Path], masks: bool, place: Callable[[str], str] = str) -> Labels:
    """A COCO detection json, whose images lie in the first of the folders that holds them all. place: the name of an
    image in the json -> its name below the folder."""
    try:
        content, listed, images = _coco_content(path)
        categories, left_out = _without_dummy(content, listed)
        rows, segments = _coco_objects(content["annotations"], [image_id for image_id, *_ in images], masks)
        federated = read_federated(content)
        by_url = not all(i.get("file_name") for i in content["images"])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Give an existing COCO json.") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is no COCO detection json: {type(error).__name__} {error}. It needs images (id, "
                        "width, height, file_name or coco_url), annotations (image_id of a listed image, category_id, "
                        "bbox of 4 numbers) and categories (id, name).") from error
    if not images or not categories:
        raise UserError(f"{path} lists {len(images)} images and {len(categories)} categories. "
                        "At least one of each is needed.")
    images = [(image_id, hw, place(file)) for image_id, hw, file in images]
    folder, found, notes = find_files([file for *_, file in images], image_folders, path, by_url)
    files = len({found[file] for *_, file in images})
    if files < len(images):
        notes.append(f"{path}: {len(images) - files} of {len(images)} images name a file that another one names too; "
                     "each counts for itself.")
    named = (c for lists in (federated or {"images": {}})["images"].values() for some in lists.values() for c in some)
    if unlisted := set(named) - {c["id"] for c in listed}:
        notes.append(f"{path}: {len(unlisted)} ids of {' or '.join(FEDERATED)} are none of its categories and are left "
                     f"out, for example {min(unlisted, key=id_order)}.")
    labelled = [LabelledImage(folder / found[file], image_id, hw, rows[image_id], segments[image_id] if masks else None,
                              f"image {file}") for image_id, hw, file in images]
    return Labels(path, listed, categories, labelled, "xywh", notes, [f"{path}: {text}" for text in left_out],
                  federated)


def _bare_stem(path: Path) -> str:
    """A json's name without what COCO and LVIS begin it with: instances_train2017, lvis_v1_train."""
    return re.sub(r"^(instances|lvis_v[\d.]+)_", "", path.stem)


def coco_folders(path: Path, data_root: str | None) -> list[Path]:
    """Where the images of a json may lie: --data_root, else its own folder (of COCO's annotations/ also the one above),
    or a folder in it called images, as the json (instances_train2017.json: train2017) or as its split. Those of LVIS
    are COCO's: also in a folder coco, in it or beside it."""
    roots = [Path(data_root).expanduser()] if data_root else [path.parent]
    if not data_root and path.parent.name.lower() == "annotations":
        roots.insert(0, path.parent.parent)
    stem = _bare_stem(path)
    if path.stem.startswith("lvis_"):
        roots += filter(Path.is_dir, [path for root in roots for path in (root / "coco", root.parent / "coco")])
    split = _split_of(stem)
    names = [stem, path.stem, *(name for name, part in SPLIT_NAMES.items() if split and part == split)]
    folders = []
    for root in roots:
        below = [root / above / name for name in dict.fromkeys(names) for above in ("", "images")]
        below += [root / "leftImg8bit" / name for name in (".", "train", "val")]  # jsons made from Cityscapes
        folders += [root, root / "images", *filter(Path.is_dir, below)]
    return list(dict.fromkeys(folders))


# ==== 2. VOC xml ====


def _voc_objects(path: Path) -> tuple[tuple[int, int] | None, str, list[tuple]]:
    """-> ((h, w) or None where it does not stand there, the file its filename tag names, [(name, difficult, xmin, ymin,
    xmax, ymax)])."""
    try:
        content = path.read_bytes()
        # in UTF-16 too; newer versions of expat find what expands without end, older ones do not
        if b"<!ENTITY" in content.replace(b"\0", b""):
            raise ValueError("it defines entities, which no annotation needs")
        tree = ElementTree.fromstring(content)
        if tree.tag != "annotation":
            raise ValueError(f"it begins with <{tree.tag[:40]}>, not with <annotation>")
        height, width = (float(tree.findtext(f"size/{side}") or 0) for side in ("height", "width"))
        hw = _size(int(height), int(width), "the image")
        objects = [(o.findtext("name").strip(), (o.findtext("difficult") or "0").strip() == "1",
                    *(float(o.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")))
                   for o in tree.findall("object")]
        if not all(o[0] for o in objects):
            raise ValueError("an object's name is empty")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Every listed image needs its annotation file.") from error
    except (ElementTree.ParseError, TypeError, ValueError, AttributeError, OverflowError, LookupError) as error:
        raise UserError(f"{path} is no VOC annotation: {error}. It needs per object a name and a bndbox of numbers, "
                        "and size/width and size/height as whole numbers where they are given.") from error
    return hw, (tree.findtext("filename") or "").strip(), objects


def _read_voc(pairs: list[tuple[Path, Path]], source: Path, notes: list[str], masks: bool) -> Labels:
    """pairs: (xml, image). The classes are the names that occur, sorted."""
    images, renamed = [], 0
    for path, image in pairs:
        hw, tag, objects = _voc_objects(path)
        # the annotation file's name decides, not its filename tag
        renamed += unicode_form(os.path.splitext(tag)[0]) != unicode_form(path.stem)
        # Corners count from 1, both inclusive. x1 = x2 would be one pixel wide; no object is: it is a click without a
        # drag, so it counts as empty.
        rows = [(x1 - 1, y1 - 1, x2, y2, x2 <= x1 or y2 <= y1, name, False, difficult, float("nan"))
                for name, difficult, x1, y1, x2, y2 in objects]
        images.append(LabelledImage(image, len(images) + 1, hw, rows, [None] * len(rows) if masks else None, path))
    names = sorted({row[5] for image in images for row in image.rows})
    if renamed:
        notes = [*notes, f"{source}: {renamed} annotations name another image in their <filename> tag; "
                 "the annotation file's own name decides."]
    return Labels(source, [{"id": n, "name": n} for n in names],
                  [{"id": k + 1, "name": n} for k, n in enumerate(names)], images, "corners", notes)


def _read_voc_lists(root: Path, lists: list[Path], masks: bool) -> Labels:
    finder, pairs = FileFinder(), []
    for year, file in voc_list_images(lists):
        name = f"{os.path.splitext(file)[0]}.xml"
        folder = year / "Annotations"
        pairs.append((folder / (finder.find(folder, name) or name), year / "JPEGImages" / file))
    return _read_voc(pairs, root, [], masks)


def _files_below(folder: Path, suffix: str) -> list[str]:
    """Names relative to `folder`, sorted, of the files below it that end so; hidden ones are none."""
    return sorted(os.path.relpath(os.path.join(place, file), folder) for place, _, files in os.walk(folder)
                  for file in files if file.lower().endswith(suffix) and not file.startswith("."))


def _by_stem(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in sorted(find_images(folder)):
        found.setdefault(unicode_form(os.path.splitext(key)[0]), []).append(key)
    return found


def _read_xml_folder(xmls: Path, images: Path, masks: bool) -> Labels:
    """xml files that no list names, each with the image of the same name; images without one are not labelled yet."""
    there = _by_stem(images)
    pairs = []
    for name in _files_below(xmls, ".xml"):
        found = there.pop(unicode_form(os.path.splitext(name)[0]), [])
        if not found:
            raise UserError(f"{xmls / name}: no image {Path(name).stem}.jpg in {images}. Add it or remove the xml.")
        if len(found) > 1:
            raise UserError(f"{xmls / name}: its image may be {' or '.join(found)} in {images}. Leave one there.")
        pairs.append((xmls / name, images / found[0]))
    notes = [f"{images}: {len(there)} of {len(there) + len(pairs)} images have no xml and are left out, the first: "
             f"{first[0]}" for first in list(there.values())[:1]]
    return _read_voc(pairs, xmls, notes, masks)


# ==== 3. YOLO txt ====

# The files in which exports without a data.yaml name the classes, one a line.
CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels")
# By how much a number of a label file may leave 0..1: rounding of the tools that wrote it.
SLACK = 0.01


def label_file(image: Path) -> Path:
    """The label file of an image: the last folder `images` of its path becomes `labels`, where that file is there; else
    beside the image."""
    beside = image.with_suffix(".txt")
    parts = list(beside.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
        if os.path.isfile(other := Path(*parts)):
            return other
    return beside


def _yolo_line(line: str, names: dict[int, str]) -> tuple[int, list[float]]:
    """-> (class, its numbers: 4 of a box, or x y of three or more corners). ValueError says what is wrong."""
    first, *texts = line.split()
    try:
        label, numbers = float(first), [float(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"{str(error).removeprefix('could not convert string to float: ')} is no number") from error
    if label not in names:
        raise ValueError(f"class {first} is none of the {len(names)} classes "
                         f"({min(names)}..{max(names)})")
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(f"{len(numbers) + 1} columns; a box has 5 (class, centre x, centre y, width, height), a "
                         "polygon 1 and an even number from 6 on")
    if wrong := [text for text, v in zip(texts, numbers) if not -SLACK <= v <= 1 + SLACK]:
        raise ValueError(f"{wrong[0]} is not in 0..1; give shares of the image's width and height, not pixels")
    return int(label), numbers


def _yolo_objects(path: Path, names: dict[int, str]) -> tuple[list[tuple], list] | None:
    """-> (rows, polygons, None for boxes) of a label file, in shares; None: there is none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Give a text file of YOLO labels.") from error
    rows, polygons = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            label, v = _yolo_line(line, names)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}. Correct the line or remove it.") from error
        if len(v) == 4:
            box = (v[0] - v[2] / 2, v[1] - v[3] / 2, v[0] + v[2] / 2, v[1] + v[3] / 2)
            polygons.append(None)
        else:
            box = (min(v[::2]), min(v[1::2]), max(v[::2]), max(v[1::2]))
            polygons.append([v])
        rows.append((*box, box[2] <= box[0] or box[3] <= box[1], label, False, False, float("nan")))
    return rows, polygons


def _read_yolo(source: Path, names: dict[int, str], find: Callable[[], tuple[list[Path], bool]], masks: bool) -> Labels:
    """names: class number -> name. find() -> (the images, do they stand for all that lies in their folders?)."""
    files, whole = find()
    images, missing, empty = [], 0, 0
    for k, image in enumerate(files):
        path = label_file(image)
        objects = _yolo_objects(path, names)
        missing += objects is None
        empty += objects == ([], [])
        rows, polygons = objects or ([], [])
        images.append(LabelledImage(image, k + 1, None, rows, polygons if masks else None, path))
    if missing == len(files):
        raise UserError(f"{source}: none of the {len(files)} images has a label file, the first would be "
                        f"{images[0].where}. Labels lie beside their images, or in a folder labels beside the folder "
                        "images.")
    notes = []
    if missing or empty:
        notes.append(f"{source}: {missing} of {len(files)} images have no label file, and the label files of {empty} "
                     "are empty: images without objects")
    if whole:
        notes += _without_image(source, [image.where for image in images])
    categories = [{"id": k, "name": name} for k, name in sorted(names.items())]
    return Labels(source, categories, [dict(c) for c in categories], images, "centre", notes)


def _without_image(source: Path, used: list[Path]) -> list[str]:
    """A note on the label files beside the used ones that belong to no image."""
    known, extra = {str(path) for path in used}, []
    for folder in sorted({path.parent for path in used}):
        for file in sorted(os.listdir(folder)) if folder.is_dir() else ():
            path = folder / file
            if (file.endswith(".txt") and str(path) not in known and file not in CLASS_FILES
                    and not file.lower().startswith("readme")):
                extra.append(path)
    return [f"{source}: {len(extra)} label files without an image are not used, the first: {extra[0]}"] if extra else []


def _class_names(content: Any, source: Path) -> dict[int, str]:
    """Class number -> name, of the `names` of a data.yaml or the lines of a class file."""
    try:
        names = dict(enumerate(content)) if isinstance(content, list) else {int(k): v for k, v in content.items()}
        if not names or min(names) < 0 or not all(isinstance(n, str) and n.strip() for n in names.values()):
            raise ValueError("a list of texts, or numbers from 0 on with a text each, is needed")
        return {k: n.strip() for k, n in names.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{source}: the classes (names) cannot be read: {error}. Give each class its name.") from error


def _class_file(path: Path) -> dict[int, str]:
    lines = [line.strip() for line in read_lines(path, "the names of the classes")]
    while lines and not lines[-1]:
        lines.pop()
    return _class_names(lines, path)


def _read_yaml(path: Path) -> dict:
    """The content of a data.yaml: all scalars are texts, so that a class may be called no or 1.0."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
        if not isinstance(content, dict) or "names" not in content:
            raise ValueError("it has no `names`")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no data.yaml of a YOLO set: {' '.join(str(error).split())}. It needs names, train "
                        "and val or test.") from error
    return content


def _yaml_keys(path: Path) -> set[str]:
    """The keys of a yaml that may be anything."""
    try:
        return set(re.findall(r"^(\w+):", path.read_text(encoding="utf-8-sig"), re.MULTILINE))
    except (OSError, UnicodeDecodeError):
        return set()


def _yaml_names(path: Path, content: dict) -> dict[int, str]:
    names = _class_names(content["names"], path)
    if content.get("nc") and content["nc"] != str(len(names)):
        raise UserError(f"{path}: nc is {content['nc']}, but there are {len(names)} names. Correct one of them.")
    return names


class _Places:
    """Resolves the paths of a data.yaml: below --data_root, else its `path:`, else its own folder."""

    def __init__(self, path: Path, content: dict, data_root: str | None):
        self.path, self.notes = path, []
        below = str(content.get("path") or "")
        self.roots = [Path(data_root).expanduser()] if data_root else [path.parent / Path(below).expanduser()]
        if not data_root and below and not self.roots[0].is_dir():
            self.notes.append(f"{path}: its path {below} is not there; its own folder is taken instead")
            self.roots = [path.parent]
        elif not data_root and below and below != ".":
            self.roots.append(path.parent)

    def find(self, key: str, text: Any) -> Path | None:
        """A folder or file; None: not there. UserError where two places fit."""
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{self.path}: {key} is {text!r}; give a folder, a .txt of image paths, or a list of "
                            "these.")
        tried = []
        for spelled in dict.fromkeys((text, text.replace("\\", "/"))):
            for root in self.roots:
                # Roboflow writes ../train/images for the train/images beside its data.yaml
                inner = re.sub(r"^(\.\./)+", "", spelled)
                near = list(dict.fromkeys((root / Path(spelled).expanduser(), root / inner)))
                there = list({os.path.realpath(p): p for p in near if p.exists()}.values())
                if len(there) > 1:
                    raise UserError(f"{self.path}: {key}: {text} may be {there[0]} or {there[1]}. Write the path from "
                                    "the root (absolute) of the one that is meant.")
                if there:
                    return there[0]
                tried += near
        self.tried = tried
        return None

    def images(self, key: str, entry: Any) -> tuple[list[Path], bool]:
        """-> (images of one split, in order, each once; whether they come from folders alone)."""
        found: dict[Path, None] = {}
        whole = True
        for text in entry if isinstance(entry, list) else [entry]:
            place = self.find(key, text)
            if place is None:
                raise UserError(f"{self.path}: {key}: {text} is not there. Looked for "
                                f"{', '.join(dict.fromkeys(map(str, self.tried)))}; correct the path, or give the "
                                "data set's folder as --data_root.")
            if place.is_dir():
                found |= dict.fromkeys(place / file for file in sorted(find_images(place)))
            elif place.suffix.lower() == ".txt":
                whole = False
                found |= dict.fromkeys(_listed_images(place, self.roots))
            else:
                raise UserError(f"{self.path}: {key}: {place} is neither a folder nor a .txt of image paths.")
        if not found:
            raise UserError(f"{self.path}: {key}: no images in {entry}. Looked for {' '.join(EXTENSIONS)} below it.")
        return list(found), whole


def _listed_images(path: Path, roots: Sequence[Path]) -> Iterator[Path]:
    """The images that a list names: absolute, or from the list's folder, or from one of `roots`, with or without the
    first folder (darknet lists begin with data/)."""
    finder = FileFinder()
    for number, line in enumerate(read_lines(path, "the image list"), start=1):
        if not (line := line.strip()):
            continue
        places = [(root, name) for root in dict.fromkeys((path.parent, *roots))
                  for name in dict.fromkeys((line, line.partition("/")[2])) if name]
        there = next(((root, name) for root, text in places if (name := finder.find(root, text)) is not None), None)
        if there is None:
            raise UserError(f"{path}, line {number}: {path.parent / line} does not exist. Paths are relative to the "
                            "list's folder or the data set's; correct or remove the line.")
        yield Path(os.path.normpath(there[0] / there[1]))


def _yolo_yaml(path: Path, data_root: str | None) -> Layout:
    content = _read_yaml(path)
    places, names = _Places(path, content, data_root), _yaml_names(path, content)
    parts = {}
    keys = {"train": "train", "val": "val", "valid": "val", "test": "test"}
    for key, split in keys.items():
        entry = content.get(key)
        if not entry or split in parts:
            continue
        # Roboflow lists a test folder in sets that have none
        if split == "test" and isinstance(entry, str) and places.find(key, entry) is None:
            places.notes.append(f"{path}: test: {entry} is not there; it counts as a set without a test split")
            continue
        parts[split] = partial(_read_yolo, path, names, partial(places.images, key, entry))
    if not parts:
        raise UserError(f"{path} lists neither train nor val nor test. Give at least train, a folder of images or a "
                        ".txt of their paths.")
    return Layout("YOLO, by its yaml", parts, places.notes)


def _yolo_darknet(path: Path) -> Layout:
    """obj.data, as darknet reads and CVAT writes it (YOLO 1.1): key = value; its paths begin at a folder `data`."""
    pairs = (line.partition("=") for line in read_lines(path, "a darknet data file"))
    values = {key.strip(): value.strip() for key, _, value in pairs if value.strip()}
    places = _Places(path, {}, None)

    def find(key: str) -> Path:
        text = values.get(key, "obj.names")
        for name in dict.fromkeys((text, text.partition("/")[2] or text, Path(text).name)):
            if (path.parent / name).is_file():
                return path.parent / name
        raise UserError(f"{path}: {key}: {path.parent / text} is not there. Correct the path.")

    def images(key: str) -> tuple[list[Path], bool]:
        return places.images(key, str(find(key).resolve()))

    names = _class_file(find("names"))
    if values.get("classes", str(len(names))) != str(len(names)):
        raise UserError(f"{path}: classes is {values['classes']}, but there are {len(names)} names. Correct one of "
                        "them.")
    parts = {split: partial(_read_yolo, path, names, partial(images, key))
             for key, split in SPLIT_NAMES.items() if key in values}
    if not parts:
        raise UserError(f"{path} lists neither train nor valid. Give train = a .txt of image paths.")
    return Layout("YOLO of darknet, by obj.data", parts, [])


def _names_near(folder: Path) -> dict[int, str] | None:
    """The class names of a folder of YOLO labels without a yaml of its own: in a class file, or in the yaml above."""
    for place in (folder, folder / "labels", folder.parent):
        for name in CLASS_FILES:
            if (place / name).is_file():
                return _class_file(place / name)
    above = folder.parent / "data.yaml"
    return _yaml_names(above, _read_yaml(above)) if above.is_file() else None


def _images_below(folder: Path) -> tuple[list[Path], bool]:
    return [folder / key for key in sorted(find_images(folder))], True


# ==== 4. Which layout is it? ====

# What tools call the splits, in lower case, years and numbers at the end left out.
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
               "test": "test", "testing": "test"}
LOOKED_FOR = ("COCO (one json; train.json, val.json, test.json; annotations/instances_*.json; train/, valid/, test/ "
              "with _annotations.coco.json), YOLO (data.yaml; obj.data; images/ + labels/, or .txt beside the images, "
              "with classes.txt) and VOC (JPEGImages + Annotations, with or without ImageSets/Main; .xml beside the "
              "images or in annotations/)")


def _split_of(name: str) -> str | None:
    return SPLIT_NAMES.get(re.sub(r"[_-]?\d*$", "", name.lower()))


def _by_split(found: list[Path], what: Callable[[Path], str]) -> dict[str, Path]:
    """Those of the files or folders that are called as a split; UserError where two stand for one."""
    parts: dict[str, Path] = {}
    for path in found:
        if (split := _split_of(what(path))) is None:
            continue
        if split in parts:
            raise UserError(f"{path.parent}: both {parts[split].name} and {path.name} may be the {split} split. Leave "
                            "one there, or give one of them as --data.")
        parts[split] = path
    return parts


def _listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """-> (folders, files) there, sorted; hidden ones are left out."""
    try:
        with os.scandir(folder) as entries:
            both = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}). Make it readable.") from error
    return [folder / n for n, is_folder in both if is_folder], [folder / n for n, is_folder in both if not is_folder]


def _coco_part(path: Path, data_root: str | None) -> Callable[[bool], Labels]:
    return partial(read_coco, path, coco_folders(path, data_root))


def _coco_jsons(files: list[Path], data_root: str | None, alone: bool) -> Layout | None:
    """train.json, val.json, ... or instances_train2017.json, ...; alone: or one of another name."""
    jsons = [f for f in files if f.suffix.lower() == ".json"]
    named = [f for f in jsons if f.stem.startswith("instances_")] or jsons
    parts = _by_split(named, _bare_stem)
    others = [f for f in named if f not in parts.values()]
    if alone and not parts and len(named) == 1:
        parts, others = {"all": named[0]}, []
    notes = [f"{first.parent}: not used: {', '.join(f.name for f in others[:3])}{', ...' * (len(others) > 3)}"
             for first in others[:1] if alone]
    return Layout("COCO", {split: _coco_part(f, data_root) for split, f in parts.items()}, notes) if parts else None


def _flat_set(folder: Path, data_root: str | None) -> Layout | None:
    """One folder of labels and images, as Roboflow, CVAT, label-studio, labelImg write it; where its images/ holds a
    folder for each split, these."""
    folders, files = _listing(folder)
    below = {f.name.lower(): f for f in folders}
    jsons = [f for f in files if f.suffix.lower() == ".json"]
    images = below.get("images") or below.get("jpegimages") or folder
    if roboflow := [f for f in jsons if f.name == "_annotations.coco.json"]:
        return Layout("COCO", {"all": _coco_part(roboflow[0], data_root)}, [])
    apart = {"images", "labels"} <= {f.name for f in folders} and bool(_files_below(folder / "labels", ".txt"))
    if apart or _txt_beside_images(files):
        if names := _names_near(folder):
            splits = _by_split(_listing(images)[0], lambda f: f.name) if apart else {}
            return Layout("YOLO", {split: partial(_read_yolo, place, names, partial(_images_below, place))
                                   for split, place in (splits or {"all": images if apart else folder}).items()}, [])
        if apart:
            raise UserError(f"{folder}: labels/ holds YOLO labels, but nothing names their classes. Put a data.yaml "
                            "there, or a classes.txt with one name a line.")
    for xmls in (below.get("annotations"), below.get("labels"), folder):
        if xmls is not None and _has_images_for(xmls, images):
            return Layout("VOC", {"all": partial(_read_xml_folder, xmls, images)}, [])
    return Layout("COCO", {"all": _coco_part(jsons[0], data_root)}, []) if len(jsons) == 1 else None


def _txt_beside_images(files: list[Path]) -> bool:
    """Has one of these images a .txt of its name?"""
    texts = {f.stem for f in files if f.suffix.lower() == ".txt"}
    return any(f.stem in texts for f in files if f.suffix.lower() in EXTENSIONS)


def _has_images_for(xmls: Path, images: Path) -> bool:
    """Has one of the xml files an image of its name?"""
    names = _files_below(xmls, ".xml")
    there = _by_stem(images) if names else {}
    return any(unicode_form(os.path.splitext(name)[0]) in there for name in names)


def _split_folders(folders: list[Path], data_root: str | None) -> Layout | None:
    """train/, valid/, test/, each a set of its own (Roboflow)."""
    sets = {split: (f, _flat_set(f, data_root)) for split, f in _by_split(folders, lambda f: f.name).items()}
    sets = {split: (f, found) for split, (f, found) in sets.items() if found and "all" in found.parts}
    if "train" not in sets:
        return None
    for f, found in sets.values():
        if found.name != sets["train"][1].name:
            raise UserError(f"{f} is in {found.name} format, {sets['train'][0]} in {sets['train'][1].name} format. "
                            "Give both in one, or one of them as --data.")
    return Layout(sets["train"][1].name, {split: found.parts["all"] for split, (_, found) in sets.items()}, [])


def _yaml_of(files: list[Path]) -> Path | None:
    """The data.yaml of a folder, whatever it is called: one alone, or data.yaml."""
    found = [f for f in files if f.suffix.lower() in (".yaml", ".yml")]
    named = [f for f in found if f.stem in ("data", "dataset")]
    if len(named or found) > 1:
        raise UserError(f"{found[0].parent}: {' or '.join(f.name for f in named or found)} may describe the set. Give "
                        "one of them as --data.")
    return (named or found or [None])[0]


def find_layout(path: Path, data_root: str | None) -> Layout | None:
    """What a file or folder of labels holds, found by looking at names alone; None for none of LOOKED_FOR. The first
    that fits counts, in the order below."""
    if path.suffix.lower() == ".json":
        return Layout("COCO", {"all": _coco_part(path, data_root)}, [])
    if path.suffix.lower() in (".yaml", ".yml"):
        return _yolo_yaml(path, data_root)
    if path.is_file() and path.suffix == ".data":
        return _yolo_darknet(path)
    if not path.is_dir():
        return None
    folders, files = _listing(path)
    if found := _coco_jsons(files, data_root, alone=False):
        return found
    for root in (path, path / "VOCdevkit"):
        if (lists := voc_lists(root)) and any((year / "Annotations").is_dir() for year in voc_years(root)):
            return Layout("VOC", {split: partial(_read_voc_lists, root, files) for split, files in lists.items()}, [])
    annotations = next((f for f in folders if f.name.lower() == "annotations"), None)
    if annotations and (found := _coco_jsons(_listing(annotations)[1], data_root, alone=True)):
        return found
    if (file := _yaml_of(files)) and (file.stem in ("data", "dataset") or "names" in _yaml_keys(file)):
        return _yolo_yaml(file, data_root)
    if path / "obj.data" in files:
        return _yolo_darknet(path / "obj.data")
    inner = [year for root in (path, path / "VOCdevkit") for year in voc_years(root) if year != path]
    return (_split_folders(folders, data_root) or _flat_set(path, data_root)
            or next(filter(None, (_flat_set(year, data_root) for year in inner)), None))


def what_is_there(path: Path) -> str:
    """What a refusal tells of a path: its first entries, and how many files of which kind lie below."""
    if not path.is_dir():
        return f"There is {'a file' if path.exists() else 'no such file or folder'}"
    folders, files = _listing(path)
    names = [*(f"{f.name}/" for f in folders), *(f.name for f in files)]
    kinds: Counter[str] = Counter()
    for _, _, below in os.walk(path):
        kinds.update("images" if file.lower().endswith(EXTENSIONS) else os.path.splitext(file)[1].lower()
                     for file in below)
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in ("images", ".json", ".xml", ".txt", ".yaml"))
    return f"Found there: {', '.join(names[:8]) or 'nothing'}{', ...' * (len(names) > 8)}; in it and below {counts}"


def named_layout(data: str, data_root: str | None) -> Layout:
    """The published splits of `coco` (train2017, val2017), `lvis` (v1: train, val) and `voc` (trainval of all years,
    test)."""
    if data == "voc":
        root = named_root(data, data_root, "train", lambda place: bool(voc_years(place)))
        lists = voc_lists(root) or {"train": [voc_years(root)[0] / "ImageSets/Main/trainval.txt"]}
        years = [year.name for year in voc_years(root)]

        def read_lists(split: str, masks: bool) -> Labels:
            labels = _read_voc_lists(root, lists[split], masks)
            if split == "train" and "VOC2012" not in years:
                labels.notes.append(f"{root}: VOC2012 is not there, training on the trainval of {years[0]} alone.")
            return labels

        return Layout("VOC", {split: partial(read_lists, split) for split in lists}, [])

    def read(part: str, masks: bool) -> Labels:
        file = f"lvis_v1_{part}.json" if data == "lvis" else f"annotations/instances_{part}2017.json"
        root = named_root(data, data_root, part, lambda place: (place / file).is_file())
        return read_coco(root / file, coco_folders(root / file, None) if data == "lvis" else [root / f"{part}2017"],
                         masks)

    return Layout("COCO", {"train": partial(read, "train"), "test": partial(read, "val")}, [])
