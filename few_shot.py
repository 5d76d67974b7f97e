"""Few-shot detection (DETReg, Table 3), in TFA's protocol (Wang et al., ICML 2020, arXiv 2003.06957): base and novel
classes, K shots of each class, AP of base and novel classes apart. docs/methods/finetune.md has the commands.

Shots are read from TFA's own lists (cocosplit/, vocsplit/) where they are there, else drawn by a seeded rule, which is
said; of any other labelled set they are drawn. K counts objects, not images.
"""
from __future__ import annotations

from common import UserError  # before torch: see there

import functools
import os
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

import evaluation
from annotations import DetectionSet, Splits
from convert import COCO_NAMES, VOC_NAMES
from data import named_root, read_lines, voc_years
from formats import Labels, Layout, read_coco
from rcnn import is_rcnn
from run import Natural, Range

# ==== 1. Knobs, classes, schedules ====


@dataclass
class FewShotConfig:
    """The knobs of few-shot detection."""
    classes: Literal["all", "base", "novel"] = "all"  # few-shot, of COCO and VOC: train and evaluate on these alone
    shots: Annotated[int, Range(0, 10**6)] = 0  # few-shot: train on so many objects of each class, 0 = on all images
    shot_seed: Natural = 0  # few-shot: which shots (TFA: 0 the published ones, 1..9 more of COCO, 1..29 of VOC)
    voc_split: Literal[1, 2, 3] = 1  # few-shot: which classes of VOC are the novel ones
    shot_records: Literal["merged", "single"] = "merged"  # few-shot: the shots of an image together, or each alone


COCO_NOVEL = (1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 18, 19, 20, 21, 44, 62, 63, 64, 67, 72)  # the 20 classes of VOC, as ids
VOC_NOVEL = {1: ("bird", "bus", "cow", "motorbike", "sofa"), 2: ("aeroplane", "bottle", "cow", "horse", "sofa"),
             3: ("boat", "cat", "motorbike", "sheep", "sofa")}
TFA = "TFA's lists (datasets/ of github.com/ucbdrive/few-shot-object-detection)"


def class_lists(benchmark: str, voc_split: int = 1) -> dict[str, list[str]]:
    """Names of the base, novel and all classes of coco or voc in the order of TFA's labels: of COCO as ever, of VOC the
    base classes first."""
    if benchmark == "coco":
        novel = [COCO_NAMES[i] for i in COCO_NOVEL]
        everything = list(COCO_NAMES.values())
        return {"base": [n for n in everything if n not in novel], "novel": novel, "all": everything}
    novel = list(VOC_NOVEL[voc_split])
    base = [n for n in VOC_NAMES.values() if n not in novel]
    return {"base": base, "novel": novel, "all": base + novel}


def known_classes(cfg: Any, categories: list[dict]) -> dict[str, list[str]] | None:
    """class_lists of the set whose classes these are, with those that it has; None: neither COCO's nor VOC's."""
    names = {c["name"] for c in categories}
    benchmark = cfg.data if cfg.data in ("coco", "voc") else next(
        (b for b in ("coco", "voc") if names == set(class_lists(b)["all"])), None)
    if benchmark is None:
        return None
    return {part: [n for n in some if n in names] for part, some in class_lists(benchmark, cfg.voc_split).items()}


def in_use(cfg: Any) -> bool:
    return bool(cfg.shots or cfg.classes != "all" or cfg.protocol == "few_shot")


def check(cfg: Any, given: frozenset[str]) -> None:
    """UserError for flags that contradict each other."""
    if cfg.shots and cfg.labels_percent < 100:
        raise UserError(f"--shots {cfg.shots} and --labels_percent {cfg.labels_percent:g} both say which labels are "
                        "used; leave one of them out")
    if not cfg.shots and (alone := sorted(given & {"shot_seed", "shot_records"})):
        raise UserError(f"--{alone[0]} says which shots: give --shots K too, or leave it out")
    if cfg.protocol == "few_shot" and not (cfg.eval_only or cfg.shots or cfg.classes == "base"):
        raise UserError("--protocol few_shot: give --classes base to train on the base classes, or --shots K")


def recipe(values: dict[str, Any], fine_tuned: bool) -> dict[str, Any]:
    """The length of a few-shot training: DETReg's; of the R-CNN family on COCO and VOC TFA's. fine_tuned: --init_from
    is a detector of categories, not a pretrained one."""
    shots, name, own = values["shots"], values["data"], values["preset"] == "own"
    if (values["protocol"] not in ("released", "few_shot") or not (shots or values["classes"] == "base") or own
        or values["eval_only"] or values["class_agnostic"]):
        return {}
    if not is_rcnn(values["detector"]):
        if not shots:
            return {}  # as on all classes
        return ({"epochs": 150, "lr_drop": 140, "eval_every": 50} if fine_tuned else
                {"epochs": 1000, "lr_drop": 990, "eval_every": 250})
    if name not in ("coco", "voc"):
        return {}
    if not shots:
        return ({"steps": 110_000, "lr_drops": (85 / 110, 100 / 110)} if name == "coco" else
                {"steps": 18_000, "lr_drops": (12 / 18, 16 / 18)})
    if not fine_tuned:
        return {}
    steps = min(16_000 * shots, 240_000) if name == "coco" else 4_000 * shots
    return {"steps": steps, "lr_drops": (0.9,), "lr": 0.001}


def run_name(cfg: Any) -> str:
    """What the default --out adds to the name of the data set."""
    parts = [cfg.classes] * (cfg.classes != "all") + [f"{cfg.shots}shot"] * bool(cfg.shots)
    parts += [f"seed{cfg.shot_seed}"] * bool(cfg.shots and cfg.shot_seed)
    return "".join(f"-{part}" for part in parts + [f"split{cfg.voc_split}"] * (bool(parts) and cfg.voc_split > 1))


# ==== 2. Which shots ====

COCO_LEVELS, VOC_LEVELS = (1, 2, 3, 5, 10, 30), (1, 2, 3, 5, 10)  # K of TFA's lists


def sample_coco(counts: dict[Hashable, int], levels: Sequence[int], rng: random.Random) -> dict[int, list]:
    """TFA's prepare_coco_few_shot.py for one class -> {K: images}, the shots of a smaller K among those of a larger.

    counts: its objects in every image that has some. K images are drawn again and again; one is taken where it is new
    and all its objects still fit, until there are exactly K. Where no further image fits (TFA: an endless loop) there
    are fewer.
    """
    images, chosen, total, drawn = list(counts), {}, 0, {}
    for shots in levels:
        while any(counts[i] + total <= shots for i in images if i not in chosen):
            before = total
            while total == before:
                for image in rng.sample(images, min(shots, len(images))):
                    if image in chosen or counts[image] + total > shots:
                        continue
                    chosen[image] = None
                    total += counts[image]
                    if total == shots:
                        break
        drawn[shots] = list(chosen)
    return drawn


def sample_voc(counts: dict[Hashable, int], levels: Sequence[int], rng: random.Random) -> dict[int, list]:
    """TFA's prepare_voc_few_shot.py for one class -> {K: images}. As released: an image may come twice, and the objects
    may be more than K."""
    images, chosen, before, drawn = list(counts), [], 0, {}
    for shots in levels:
        more, found = shots - before, 0
        for image in rng.sample(images, min(more, len(images))):
            chosen.append(image)
            found += counts[image]
            if found >= more:
                break
        before = shots
        drawn[shots] = list(chosen)
    return drawn


Objects = dict[int, list[tuple[int, int]]]  # of each label: (record, object in it)


def _every_object(labelled: DetectionSet) -> dict[int, dict[int, list[int]]]:
    """Of each label {record: its objects}, in the order of the set. Crowds are none."""
    found: dict[int, dict[int, list[int]]] = {label: {} for label in range(len(labelled.categories))}
    for i, record in enumerate(labelled.records):
        for k in np.flatnonzero(~record.crowd).tolist():
            found[int(record.labels[k])].setdefault(i, []).append(k)
    return found


def _drawn(cfg: Any, labelled: DetectionSet) -> Objects:
    """By TFA's rule for COCO, the classes independently of each other. A class whose images do not add up to K gets
    some of the objects of one more image."""
    objects: Objects = {}
    levels = sorted({k for k in COCO_LEVELS if k < cfg.shots} | {cfg.shots})
    for label, of_image in _every_object(labelled).items():
        rng = random.Random(f"{cfg.shot_seed} {labelled.categories[label]['name']}")
        images = sample_coco({i: len(ks) for i, ks in of_image.items()}, levels, rng)[cfg.shots]
        rest = [i for i in of_image if i not in images]
        images += rng.sample(rest, min(1, len(rest)))
        objects[label] = [(i, k) for i in images for k in of_image[i]][:cfg.shots]
    return objects


def _drawn_of_voc(cfg: Any, labelled: DetectionSet) -> Objects:
    """By TFA's rule for VOC: one stream of random numbers for all classes in the order of their names."""
    rng, levels, every = random.Random(cfg.shot_seed), sorted({*VOC_LEVELS, cfg.shots}), _every_object(labelled)
    objects: Objects = {}
    for label in sorted(every, key=lambda label: labelled.categories[label]["name"]):
        images = sample_voc({i: len(ks) for i, ks in every[label].items()}, levels, rng)[cfg.shots]
        objects[label] = [(i, k) for i in images for k in every[label][i]]
    return objects


def _listed_of_voc(files: dict[str, Path], labelled: DetectionSet) -> Objects:
    """files: TFA's list of each class, a path datasets/VOC{year}/JPEGImages/{image}.jpg a line."""
    labels = {c["name"]: label for label, c in enumerate(labelled.categories)}
    place, every = {record.image.stem: i for i, record in enumerate(labelled.records)}, _every_object(labelled)
    objects: Objects = {}
    for name, file in files.items():
        for number, line in enumerate(read_lines(file, "TFA's list of shots"), start=1):
            if not (stem := Path(line.strip()).stem):
                continue
            label, i = labels.get(name), place.get(stem)
            if label is None or i not in every[label]:
                raise UserError(f"{file}, line {number}: no image {stem} with an object of {name} is among the "
                                f"{len(labelled)} training images of --data voc. TFA's shots are of the trainval of "
                                "VOC2007 and VOC2012: put both there, or correct the line.")
            objects.setdefault(label, []).extend((i, k) for k in every[label][i])
    return objects


def draw(cfg: Any, labelled: DetectionSet) -> DetectionSet:
    """cfg.shots objects of each class of a training set, as a set of their images."""
    classes, files = known_classes(cfg, labelled.categories), shot_files(cfg)
    if files and cfg.data == "coco":  # open_layout() has read them
        objects = {label: [(i, k) for i, ks in of_image.items() for k in ks]
                   for label, of_image in _every_object(labelled).items()}
    elif files:
        objects = _listed_of_voc(files, labelled)
    else:
        objects = (_drawn_of_voc if cfg.data == "voc" else _drawn)(cfg, labelled)
    wanted = [label for label, c in enumerate(labelled.categories) if not classes or c["name"] in classes[cfg.classes]]
    chosen, lacking = [], []
    for label in wanted:
        some = objects.get(label, [])
        if cfg.shot_records == "merged":
            some = list(dict.fromkeys(some))
        if len(some) > cfg.shots:  # TFA's loader
            rng = np.random.default_rng([cfg.shot_seed, label])
            some = [some[j] for j in sorted(rng.choice(len(some), cfg.shots, replace=False))]
        chosen += some
        if len(set(some)) < cfg.shots:
            lacking.append(f"{labelled.categories[label]['name']} ({len(set(some))})")
    if not chosen:
        raise UserError(f"--shots {cfg.shots}: {labelled.name} has no object of the chosen classes. Label some.")
    drawn = _take(labelled, chosen, cfg.shot_records == "single")
    origin = f"drawn with --shot_seed {cfg.shot_seed}"
    if files:
        origin = f"from TFA's lists, {next(iter(files.values())).parent}"
    elif cfg.data in SPLIT_FOLDERS:
        rule = "other shots than the published ones" if cfg.data == "coco" else "by TFA's rule"
        origin += (f" ({rule}), as lists for this K and seed are not in {SPLIT_FOLDERS[cfg.data]}/ beside the data: "
                   f"{TFA}")
    note = (f"--shots {cfg.shots}: {len(set(chosen))} objects of {len(wanted)} classes in "
            f"{len({r.image for r in drawn.records})} images, {origin}. Other objects in them are not labelled")
    if lacking:
        note += f"; fewer of {', '.join(lacking[:8])}{', ...' * (len(lacking) > 8)}"
    return replace(drawn, notes=[*labelled.notes, note])


def _take(labelled: DetectionSet, chosen: list[tuple[int, int]], single: bool) -> DetectionSet:
    """These (record, object) alone. single: each as a record of its own, as TFA's loader has them; else those of an
    image together, once."""
    groups: list[list[tuple[int, int]]] = [[pair] for pair in chosen]
    if not single:
        of_image: dict[Path | int, list[tuple[int, int]]] = {}
        for pair in sorted(set(chosen)):
            of_image.setdefault(labelled.records[pair[0]].image, []).append(pair)
        groups = list(of_image.values())
    return replace(labelled, records=[_part(labelled.records, group) for group in groups])


def _part(records: list, objects: list[tuple[int, int]]) -> Any:
    """A record of these (record, object) of one image."""
    first = records[objects[0][0]]
    arrays = {name: np.stack([getattr(records[i], name)[k] for i, k in objects])
              for name in ("boxes", "labels", "crowd", "difficult", "areas")}
    segments = None if first.segments is None else [records[i].segments[k] for i, k in objects]
    return replace(first, **arrays, segments=segments)


# ==== 3. TFA's files ====

SPLIT_FOLDERS = {"coco": "cocosplit", "voc": "vocsplit"}
LIST_NAMES = {"coco": "full_box_{shots}shot_{name}_trainval.json", "voc": "box_{shots}shot_{name}_train.txt"}
COCO_2017 = "annotations/instances_{}2017.json"


def _split_folder(benchmark: str, root: Path) -> Path | None:
    """cocosplit/ or vocsplit/, in the folder of the data or beside it."""
    return next((f for place in (root, root.parent) if (f := place / SPLIT_FOLDERS[benchmark]).is_dir()), None)


def _root(benchmark: str, data_root: str | None) -> Path:
    if benchmark == "voc":
        return named_root("voc", data_root, "train", lambda place: bool(voc_years(place)))
    try:
        return named_root("coco", data_root, "train", lambda place: bool(_split_folder("coco", place))
                          or (place / COCO_2017.format("train")).is_file())
    except UserError as error:
        raise UserError(f"{error} Few-shot detection also takes COCO 2014 in {TFA}: <root>/cocosplit/datasplit/"
                        "{trainvalno5k,5k}.json, its shots in <root>/cocosplit/, and the images of cocodataset.org in "
                        "<root>/train2014/ and val2014/, or trainval2014/.") from error


def shot_files(cfg: Any) -> dict[str, Path]:
    """TFA's list of each of the chosen classes for this K and seed; {}: none of them is there. UserError: some are."""
    if cfg.data not in SPLIT_FOLDERS or not cfg.shots:
        return {}
    if (folder := _split_folder(cfg.data, _root(cfg.data, cfg.data_root))) is None:
        return {}
    folder = folder / f"seed{cfg.shot_seed}" if cfg.shot_seed else folder  # seed 0: the shots of earlier papers
    files = {name: folder / LIST_NAMES[cfg.data].format(shots=cfg.shots, name=name)
             for name in class_lists(cfg.data, cfg.voc_split)[cfg.classes]}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing and len(missing) < len(files):
        raise UserError(f"{folder}: {len(missing)} of the {len(files)} lists of {cfg.shots} shots are missing: "
                        f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}. Add them from {TFA}, or remove the "
                        "others: then shots are drawn here.")
    return {} if missing else files


def open_layout(cfg: Any) -> Layout | None:
    """Of --data coco in few-shot detection, where there is a cocosplit/: the lists of shots or trainvalno5k.json to
    train on, 5k.json to test on, in place of the jsons of COCO 2017. None: as the set is read otherwise."""
    if cfg.data != "coco" or not in_use(cfg):
        return None
    root = _root("coco", cfg.data_root)
    if (folder := _split_folder("coco", root)) is None:
        return None
    parts = {}
    for split, file, year in (("train", "trainvalno5k.json", "train"), ("test", "5k.json", "val")):
        path = folder / "datasplit" / file
        newer = next((f for place in (root, root / "coco") if (f := place / COCO_2017.format(year)).is_file()), None)
        if not (path.is_file() or newer or split == "train" and shot_files(cfg)):
            raise UserError(f"--data coco: neither {path} nor {root / COCO_2017.format(year)} is there: put the first "
                            f"there from {TFA}, or the second of cocodataset.org.")
        parts[split] = functools.partial(_read_coco, [path if path.is_file() else newer], root, year)
    if files := shot_files(cfg):
        parts["train"] = functools.partial(_read_coco, list(files.values()), root, "train")
    return Layout("COCO as TFA splits it", parts, [])


def _read_coco(files: list[Path], root: Path, year: str, masks: bool) -> Labels:
    """These jsons as one set, an image for each time that one lists it. Images lie where COCO 2014 has them, or where
    2017 has those of the same id."""
    def place(name: str) -> str:
        folder = "val2014" if "val2014" in name else "train2014"
        places = (f"trainval2014/{name}", f"{folder}/{name}", f"{year}2017/{name.rpartition('_')[2]}")
        places += tuple(f"coco/{p}" for p in places)
        return next((p for p in places if os.path.isfile(root / p)), places[1])

    first, *others = [read_coco(file, [root], masks, place) for file in files]
    for file, labels in zip(files[1:], others):
        if labels.categories != first.categories:
            raise UserError(f"{file} has other categories than {files[0]}. Give lists of one set.")
        first.images += labels.images
        first.notes += labels.notes
    return first


# ==== 4. Sets and numbers ====


def sampler(cfg: Any) -> Callable[[DetectionSet], DetectionSet] | None:
    return functools.partial(draw, cfg) if cfg.shots else None


def restrict(cfg: Any, sets: Splits) -> Splits:
    """The chosen classes alone, in TFA's order. Training images without an object of them are left out, test images are
    not. UserError: nobody knows which those are."""
    if not in_use(cfg):
        return sets
    categories = sets.train.categories
    known = known_classes(cfg, categories)
    if known is None and cfg.classes == "all":
        return sets
    if not known or not known[cfg.classes]:
        theirs = ", ".join(c["name"] for c in categories[:12]) + ", ..." * (len(categories) > 12)
        raise UserError(f"--classes {cfg.classes}: base and novel classes are known of COCO and VOC; the classes of "
                        f"{cfg.data} are {theirs}. Leave it out, or give labels of the wanted classes alone.")
    names = known[cfg.classes]
    if names == [c["name"] for c in categories]:
        return sets
    restricted = {id(one): _of_classes(one, names) for one in sets}
    sets = Splits(*(restricted[id(one)] for one in sets))
    if cfg.classes == "all":
        return sets
    sets.train.notes.append(f"--classes {cfg.classes}: {len(names)} of {len(categories)} classes")
    return sets._replace(train=sets.train.with_objects())


def _of_classes(labelled: DetectionSet, names: list[str]) -> DetectionSet:
    categories = {c["name"]: c for c in labelled.categories}
    label = np.array([names.index(c["name"]) if c["name"] in names else -1 for c in labelled.categories])
    records = []
    for record in labelled.records:
        kept = np.flatnonzero(label[record.labels] >= 0)
        arrays = {name: getattr(record, name)[kept] for name in ("boxes", "crowd", "difficult", "areas")}
        segments = None if record.segments is None else [record.segments[k] for k in kept]
        records.append(replace(record, labels=label[record.labels[kept]], segments=segments, **arrays))
    return replace(labelled, categories=[categories[n] for n in names], records=records, notes=list(labelled.notes))


def groups(cfg: Any, labelled: DetectionSet) -> dict[str, list]:
    """{"b": ids of the base classes, "n": of the novel ones} where AP of both is to be told apart, else {}."""
    known = known_classes(cfg, labelled.categories) if in_use(cfg) and cfg.classes == "all" else None
    ids = {c["name"]: c["id"] for c in labelled.categories}
    return {part[0]: [ids[n] for n in known[part]] for part in ("base", "novel")} if known else {}


def voc07_metrics(ground_truth: dict, detections: list[dict], parts: dict[str, list]) -> dict[str, float]:
    """evaluation.voc07_metrics of each of groups(): VOC07_bAP, VOC07_nAP50, ..."""
    return {key.replace("_", f"_{prefix}"): value for prefix, ids in parts.items()
            for key, value in evaluation.voc07_metrics(
                ground_truth | {"categories": [c for c in ground_truth["categories"] if c["id"] in ids]}, detections
            ).items()}


def table_rows(title: str, metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows for evaluation.metrics_table: base and novel classes below all."""
    rows = {title: {k: v for k, v in metrics.items() if not k.startswith(("bAP", "nAP", "VOC07_b", "VOC07_n"))}}
    for prefix, name in (("b", "base classes"), ("n", "novel classes")):
        of_group = {k.replace(f"{prefix}AP", "AP", 1): v for k, v in metrics.items()
                    if k.removeprefix("VOC07_").startswith(f"{prefix}AP")}
        rows |= {name: of_group} if of_group else {}
    return rows
