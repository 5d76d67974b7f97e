"""The layouts in which people have labels (formats.py), and their splits (annotations.open_splits): small sets built on
the spot, values by hand."""
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import annotations as A  # noqa: E402
from common import UserError  # noqa: E402
from test_data import make_voc, picture  # noqa: E402

NAMES = [{"id": 0, "name": "cat"}, {"id": 1, "name": "no"}]
LINE, BOX = "1 0.5 0.5 0.2 0.25\n", [40, 30, 60, 50]  # of a 100 x 80 picture


def coco(path, files, name="cat", **changed):
    """A json of these files, in each a box 10 20 40 60."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "images": [{"id": k, "width": 100, "height": 80, "file_name": f, **changed} for k, f in enumerate(files)],
        "annotations": [{"id": k + 1, "image_id": k, "category_id": 1, "bbox": [10, 20, 30, 40]}
                        for k in range(len(files))], "categories": [{"id": 1, "name": name}]}))


def pictures(folder, *names, label=None, labels=None):
    """Pictures of 100 x 80 px; label: the text of a YOLO file for each, in the folder `labels`."""
    for name in names:
        picture(folder / name, (100, 80))
        if label is not None:
            (labels or folder).mkdir(parents=True, exist_ok=True)
            ((labels or folder) / name).with_suffix(".txt").write_text(label)


def xml(path, name="cat", size="<size><width>100</width><height>80</height></size>"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{path.stem}.jpg</filename>{size}<object><name>{name}</name><bndbox>"
                    "<xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>60</ymax></bndbox></object></annotation>")


def yolo(root, yaml="names: [cat, 'no']\nnc: 2\ntrain: ../train/images\nval: ../valid/images\ntest: ../test/images\n",
         parts=("train", "valid", "test")):
    root.mkdir(parents=True, exist_ok=True)
    for part in parts:
        pictures(root / part / "images", f"{part}0.jpg", f"{part}1.jpg", label=LINE, labels=root / part / "labels")
    (root / "data.yaml").write_text(yaml)


# ==== Layouts: how each is built, and the files of train, val and test that are found ====


def yolo_roboflow(d):
    yolo(d)


def yolo_by_path(d):  # images/train, images/val, below `path`; names as a dict, in blocks
    for part in ("train", "val"):
        pictures(d / "set/images" / part, f"{part}0.jpg", label=LINE, labels=d / "set/labels" / part)
    (d / "own.yaml").write_text("path: set  # here\ntrain: images/train\nval:\n  - images/val\ntest:\nnames:\n"
                                "  0: cat\n  1: no\ndownload: |\n  import os\n  names: x\n")


def yolo_by_list(d):
    pictures(d / "images", "a.jpg", "b.jpg", "c.jpg", label=LINE, labels=d / "labels")
    (d / "train.txt").write_text(f"./images/a.jpg\n\n{d}/images/b.jpg\n")
    (d / "val.txt").write_text("images/c.jpg\n")
    (d / "data.yaml").write_text("{train: train.txt, val: val.txt, names: [cat, no]}")


def yolo_darknet(d):  # CVAT's YOLO 1.1
    pictures(d / "obj_train_data", "a.jpg", "b.jpg", label=LINE)
    pictures(d / "obj_valid_data", "c.jpg", label=LINE)
    (d / "obj.names").write_text("cat\nno\n")
    (d / "obj.data").write_text("classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n"
                                "backup = backup/\n")
    (d / "train.txt").write_text("data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n")
    (d / "valid.txt").write_text("data/obj_valid_data/c.jpg\n")


def yolo_label_studio(d):
    pictures(d / "images", "a.jpg", "b.jpg", label=LINE, labels=d / "labels")
    (d / "classes.txt").write_text("cat\nno\n")
    (d / "notes.json").write_text('{"categories": []}')


def yolo_label_img(d):
    pictures(d, "a.jpg", "b.jpg", label=LINE)
    (d / "classes.txt").write_text("cat\nno\n")


def yolo_split_folders(d):
    for part in ("train", "val"):
        pictures(d / "images" / part, f"{part}0.jpg", label=LINE, labels=d / "labels" / part)
    (d / "classes.txt").write_text("cat\nno\n")


def coco_roboflow(d):
    for part in ("train", "valid", "test"):
        pictures(d / part, f"{part}0.jpg")
        coco(d / part / "_annotations.coco.json", [f"{part}0.jpg"])


def coco_own(d):
    for part in ("train2017", "val2017"):
        pictures(d / part, f"{part}0.jpg")
        coco(d / f"annotations/instances_{part}.json", [f"{part}0.jpg"])
    coco(d / "annotations/captions_train2017.json", ["x"])


def coco_own_in_images(d):
    for part in ("Train", "Val"):
        pictures(d / "images" / part.lower(), f"{part}0.jpg")
        coco(d / f"annotations/instances_{part}.json", [f"{part}0.jpg"])


def coco_cvat(d):
    pictures(d / "images", "a.jpg")
    coco(d / "annotations/instances_default.json", ["a.jpg"])


def coco_label_studio(d):
    pictures(d / "images", "a.jpg")
    coco(d / "result.json", ["images\\a.jpg"])


def coco_three(d):
    for part in ("train", "val", "test"):
        pictures(d / part, f"{part}0.jpg")
        coco(d / f"{part}.json", [f"{part}0.jpg"])


def voc_2012(d):
    make_voc(d / "VOC2012", {s: [("cat", (11, 21, 40, 60), 0)] for s in "acd"},
             {"train": "ac", "val": "d", "trainval": "acd"})


def voc_train_val(d):
    make_voc(d, {s: [("cat", (11, 21, 40, 60), 0)] for s in "acd"}, {"train": "ac", "val": "d"})


def voc_three(d):
    make_voc(d, {s: [("cat", (11, 21, 40, 60), 0)] for s in "acd"}, {"train": "a", "val": "c", "test": "d"})


def voc_published(d):
    make_voc(d, {s: [("cat", (11, 21, 40, 60), 0)] for s in "acd"},
             {"train": "a", "val": "c", "trainval": "ac", "test": "d"})


def voc_cvat(d):
    make_voc(d, {"a": [("cat", (11, 21, 40, 60), 0)]}, {"default": "a"})


def voc_no_lists(d):
    for s in "ac":
        pictures(d / "JPEGImages", f"{s}.jpg")
        xml(d / f"Annotations/{s}.xml")


def voc_label_img(d):
    pictures(d, "a.jpg", "c.png")
    xml(d / "a.xml")
    xml(d / "c.xml")


def voc_kaggle(d):
    pictures(d / "images", "a.png")
    xml(d / "annotations/a.xml")


def voc_roboflow(d):
    for part in ("train", "valid"):
        pictures(d / part, f"{part}0.jpg")
        xml(d / f"{part}/{part}0.xml")


LAYOUTS = {
    yolo_roboflow: ("train0 train1", "valid0 valid1", "test0 test1"), yolo_by_path: ("train0", "val0", "val0"),
    yolo_by_list: ("a b", "c", "c"), yolo_darknet: ("a b", "c", "c"), yolo_label_studio: ("a b", "a b", "a b"),
    yolo_label_img: ("a b", "a b", "a b"), yolo_split_folders: ("train0", "val0", "val0"),
    coco_roboflow: ("train0", "valid0", "test0"), coco_own: ("train20170", "val20170", "val20170"),
    coco_own_in_images: ("Train0", "Val0", "Val0"), coco_cvat: ("a", "a", "a"), coco_label_studio: ("a", "a", "a"),
    coco_three: ("train0", "val0", "test0"), voc_2012: ("a c", "d", "d"), voc_train_val: ("a c", "d", "d"),
    voc_three: ("a", "c", "d"), voc_published: ("a c", "d", "d"), voc_cvat: ("a", "a", "a"),
    voc_no_lists: ("a c", "a c", "a c"), voc_label_img: ("a c", "a c", "a c"), voc_kaggle: ("a", "a", "a"),
    voc_roboflow: ("train0", "valid0", "valid0")}


def stems(found):
    return " ".join(record.image.stem for record in found.records)


@pytest.mark.parametrize("build", LAYOUTS, ids=lambda build: build.__name__)
def test_layout(build, tmp_path):
    build(tmp_path)
    sets = A.open_splits(str(tmp_path), None)
    assert tuple(map(stems, sets)) == LAYOUTS[build]
    names = NAMES if build.__name__.startswith("yolo") else [{"id": 1, "name": "cat"}]
    box = BOX if build.__name__.startswith("yolo") else [10, 20, 40, 60]
    for found in sets:
        assert found.categories == names and found.voc == build.__name__.startswith("voc")
        for i in range(len(found)):
            image, target = found.load(i)
            np.testing.assert_allclose(target["boxes_xyxy"].tolist(), [box], atol=1e-4)
            assert image.size == (100, 80) and target["labels"].tolist() == [len(names) - 1]
    notes = [note for found in sets for note in found.notes]
    same = sets.train is sets.val is sets.test
    assert any(note.startswith("WARNING: ") and "has no split" in note for note in notes) == same
    assert any("validation and test set: the best" in n for n in notes) == (sets.val is sets.test and not same)
    assert stems(A.open_detection(str(tmp_path), None, "test")) == LAYOUTS[build][2]


def test_a_folder_of_one_split_and_a_yaml_by_its_name(tmp_path):
    yolo(tmp_path / "y")
    assert stems(A.open_detection(str(tmp_path / "y/valid"), None, "train")) == "valid0 valid1"
    assert stems(A.open_splits(str(tmp_path / "y/data.yaml"), None).test) == "test0 test1"
    coco_roboflow(tmp_path / "c")
    assert stems(A.open_detection(str(tmp_path / "c/train"), None, "test")) == "train0"
    coco_own(tmp_path / "o")
    assert stems(A.open_detection(str(tmp_path / "o/annotations/instances_val2017.json"), None, "test")) == "val20170"


# ==== YOLO: what a label file may hold ====


def test_yolo_polygons_empty_and_missing_files(tmp_path):
    yolo(tmp_path, parts=("train",))
    pictures(tmp_path / "train/images", "empty.jpg", label="\n", labels=tmp_path / "train/labels")
    pictures(tmp_path / "train/images", "missing.jpg")
    (tmp_path / "train/labels/stray.txt").write_text(LINE)
    found = A.open_detection(str(tmp_path), None, "train")
    assert stems(found) == "empty missing train0 train1" and [len(r.boxes) for r in found.records] == [0, 0, 1, 1]
    assert "1 of 4 images have no label file, and the label files of 1 are empty: images without" in found.notes[0]
    assert f"1 label files without an image are not used, the first: {tmp_path}/train/labels/stray" in found.notes[1]
    for name in ("train0", "train1", "empty", "missing"):  # a rectangle and a triangle
        (tmp_path / f"train/labels/{name}.txt").write_text("0 0.1 0.25 0.5 0.25 0.5 0.75 0.1 0.75\n"
                                                           "1 0 0 1 0 0.5 1.0\n")
    found = A.open_detection(str(tmp_path), None, "train", masks=True)
    np.testing.assert_allclose(found.records[0].boxes, [[10, 20, 50, 60], [0, 0, 100, 80]], atol=1e-4)
    masks = found.masks(0)
    assert masks.shape == (2, 80, 100) and masks[0, 20:60, 10:50].all() and masks[0].sum() == 40 * 40
    assert abs(int(masks[1].sum()) - 4000) < 100 and masks[1, 0, 1] and not masks[1, 79, 0]
    (tmp_path / "train/labels/train0.txt").write_text(LINE)
    with pytest.raises(UserError, match="1 of 7 objects have no segmentation"):
        A.open_detection(str(tmp_path), None, "train", masks=True)


LINES = {  # a line of a label file, and what is wrong with it
    "2 0.5 0.5 0.2 0.2": r"class 2 is none of the 2 classes \(0..1\)", "-1 0.5 0.5 0.2 0.2": "class -1 is none",
    "0.5 0.5 0.5 0.2 0.2": "class 0.5 is none", "cat 0.5 0.5 0.2 0.2": "'cat' is no number",
    "0 50 40 20 20": "50 is not in 0..1; give shares", "0 0.5 -0.2 0.2 0.2": "-0.2 is not in 0..1",
    "0 0.5 nan 0.2 0.2": "nan is not in 0..1", "0 0.5 0.5 0.2": "4 columns; a box has 5", "0 0.5 0.5 0.2 0.2 0.9":
    "6 columns", "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4": "8 columns", "0": "1 columns"}


@pytest.mark.parametrize("line", LINES)
def test_yolo_lines_that_are_none(line, tmp_path):
    yolo(tmp_path, parts=("train",))
    file = tmp_path / "train/labels/train1.txt"
    file.write_text(f"{LINE}{line}\n")
    with pytest.raises(UserError, match=f"{re.escape(str(file))}, line 2: {LINES[line]}"):
        A.open_detection(str(tmp_path), None, "train")


YAMLS = {  # a data.yaml, and what is wrong with it
    "train: train\nval: valid\n": "it has no `names`", "names: [a, b\ntrain: train": "is no data.yaml",
    "- 1": "it has no `names`", "names: [cat]\nnc: 2\ntrain: train": "nc is 2, but there are 1 names",
    "names: []\ntrain: train": "the classes", "names: {a: b}\ntrain: train": "the classes",
    "names: cat\ntrain: train": "the classes", "names: [cat, [no]]\ntrain: train": "the classes",
    "names: [cat, no]": "lists neither train nor val nor test",
    "names: [cat, no]\ntrain: gone": "train: gone is not there. Looked for .*gone; correct the path",
    "names: [cat, no]\ntrain: data.yaml": "neither a folder nor a .txt",
    "names: [cat, no]\ntrain: {a: b}": "give a folder",
    "names: [cat, no]\ntrain: train/labels": "no images in train/labels",
    "names: [cat, no]\ntrain: list.txt": "list.txt, line 1: .*nowhere.jpg does not exist",
    "names: [cat, no]\ntrain: ../train/images": "may be .*own/../train/images or .*above/own/train/images"}


@pytest.mark.parametrize("text", YAMLS)
def test_yaml_that_is_none(text, tmp_path):
    root = tmp_path / "above/own"
    yolo(root, text, parts=("train",))
    (root / "list.txt").write_text("nowhere.jpg\n")
    if "../" in text:
        pictures(tmp_path / "above/train/images", "x.jpg")
    with pytest.raises(UserError, match=YAMLS[text]):
        A.open_detection(str(root), None, "train")


def test_yolo_sets_that_are_moved_or_lack_something(tmp_path):
    yolo(tmp_path, "names: [cat, no]\npath: /content/gone\ntrain: train/images\nval: valid/images\ntest: ../test\n",
         parts=("train", "valid"))
    sets = A.open_splits(str(tmp_path), None)
    assert tuple(map(stems, sets)) == ("train0 train1", "valid0 valid1", "valid0 valid1")
    assert any("its path /content/gone is not there; its own folder" in note for note in sets.train.notes)
    assert any("test: ../test is not there; it counts as a set without" in note for note in sets.train.notes)
    (tmp_path / "data.yaml").rename(tmp_path / "valid/data.yaml")
    found = A.open_detection(str(tmp_path / "valid/data.yaml"), str(tmp_path), "train")
    assert stems(found) == "train0 train1"
    for file in (tmp_path / "train/labels").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="none of the 2 images has a label file, the first would be .*train0.txt"):
        A.open_detection(str(tmp_path / "valid/data.yaml"), str(tmp_path), "train")
    yolo_label_studio(tmp_path / "ls")
    (tmp_path / "ls/classes.txt").unlink()
    with pytest.raises(UserError, match="nothing names their classes. Put a data.yaml there, or a classes.txt"):
        A.open_detection(str(tmp_path / "ls"), None, "train")


def test_yolo_boxes_that_are_corners(tmp_path):
    yolo(tmp_path, parts=("train",))
    rng = np.random.default_rng(0)
    start = rng.uniform(0.05, 0.6, (30, 2))
    rows = np.column_stack([start, start + rng.uniform(0.1, 0.38, (30, 2))])
    for name in ("train0", "train1"):
        (tmp_path / f"train/labels/{name}.txt").write_text("".join(f"0 {' '.join(map(str, r))}\n" for r in rows))
    with pytest.raises(UserError, match="Read as x1 y1 x2 y2, .* Give centre x, centre y, width, height, as shares"):
        A.open_detection(str(tmp_path), None, "train")


@pytest.mark.parametrize("exif, size", (("auto", (80, 60)), ("stored", (60, 80))))
def test_sizes_that_are_read_from_the_image(exif, size, tmp_path):
    """In the frame that EXIF displays; with --exif stored as stored."""
    tag = Image.Exif()
    tag[0x0112] = 6
    picture(tmp_path / "images/a.jpg", (60, 80), exif=tag)
    (tmp_path / "classes.txt").write_text("cat\nno\n")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 1 0.5\n")
    found = A.open_detection(str(tmp_path), None, "train", exif=exif)
    image, target = found.load(0)
    w, h = size
    assert image.size == size and target["boxes_xyxy"].tolist() == [[0, h / 4, w, h * 3 / 4]]
    assert "1 have an EXIF rotation" in found.notes[0]
    coco(tmp_path / "set.json", ["a.jpg"], width=None, height=0)
    found = A.open_detection(str(tmp_path / "set.json"), None, "train", exif=exif)
    assert found.load(0)[0].size == size and "the labels of 1 of 1 images do not tell its size" in found.notes[0]
    picture(tmp_path / "voc/a.jpg", (60, 80), exif=tag)
    xml(tmp_path / "voc/a.xml", size="")
    assert A.open_detection(str(tmp_path / "voc"), None, "train", exif=exif).load(0)[0].size == size


def test_an_unreadable_image_without_a_size_is_left_out_by_name(tmp_path):
    yolo_label_studio(tmp_path)
    (tmp_path / "images/a.jpg").write_bytes(b"cut")
    found = A.open_detection(str(tmp_path), None, "train")
    assert stems(found) == "b" and f"cannot be read and are left out: {tmp_path}/images/a.jpg" in found.notes[0]
    (tmp_path / "images/b.jpg").write_bytes(b"cut")
    with pytest.raises(UserError, match="none of its 2 images can be read"):
        A.open_detection(str(tmp_path), None, "train")


# ==== Refusals ====


def test_a_refusal_names_what_was_looked_for_and_what_is_there(tmp_path):
    pictures(tmp_path / "photos", "a.jpg", "b.jpg")
    (tmp_path / "README.txt").write_text("x")
    with pytest.raises(UserError) as caught:
        A.open_splits(str(tmp_path), None)
    text = str(caught.value)
    assert ("no labelled set for the train split there. Found there: photos/, README.txt; in it and below 2 images, "
            "0 .json, 0 .xml, 1 .txt, 0 .yaml. Looked for COCO (") in text
    assert all(word in text for word in ("data.yaml", "obj.data", "ImageSets/Main", "_annotations.coco.json"))
    with pytest.raises(UserError, match="There is no such file or folder"):
        A.open_splits(str(tmp_path / "gone"), None)
    coco(tmp_path / "test.json", ["photos/a.jpg"])
    with pytest.raises(UserError, match="no labelled set for the train split there .*: its labels, COCO, are for test"):
        A.open_splits(str(tmp_path), None)


@pytest.mark.parametrize("build, change, message", [
    (coco_own, lambda d: coco(d / "annotations/instances_train2014.json", ["x"]), "both instances_train2014.json"),
    (coco_roboflow, lambda d: (d / "val").mkdir(), "both val and valid may be the val split"),
    (yolo_roboflow, lambda d: (d / "dataset.yml").write_text("names: [a]"), "data.yaml or dataset.yml may describe"),
    (voc_no_lists, lambda d: (d / "JPEGImages/c.jpg").unlink(), "c.xml: no image c.jpg in .*JPEGImages. Add it or"),
    (voc_label_img, lambda d: pictures(d, "a.png"), r"a.xml: its image may be a.jpg or a.png"),
    (yolo_darknet, lambda d: (d / "valid.txt").write_text("data/x.jpg\n"), "valid.txt, line 1: .*x.jpg does not")])
def test_what_may_be_two_things_or_is_missing_is_refused(build, change, message, tmp_path):
    build(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        A.open_splits(str(tmp_path), None)


def test_images_without_xml_are_not_labelled_yet(tmp_path):
    voc_label_img(tmp_path)
    pictures(tmp_path, "later.jpg")
    found = A.open_detection(str(tmp_path), None, "train")
    assert stems(found) == "a c"
    assert any("1 of 3 images have no xml and are left out, the first: later.jpg" in note for note in found.notes)


# ==== Splits ====


def test_other_sets_for_validation_and_test(tmp_path):
    coco_three(tmp_path / "own")
    yolo_roboflow(tmp_path / "other")
    coco_cvat(tmp_path / "flat")
    own, other, flat = (str(tmp_path / name) for name in ("own", "other", "flat"))
    sets = A.open_splits(own, None, val_data=flat)
    assert tuple(map(stems, sets)) == ("train0", "a", "test0")
    sets = A.open_splits(flat, None, val_data=own, test_data=own)
    assert tuple(map(stems, sets)) == ("a", "val0", "test0") and len(sets.train.notes) == 0
    sets = A.open_splits(flat, None, test_data=own)
    assert sets.val is sets.test and stems(sets.test) == "test0" and "chosen on the test images" in sets.val.notes[-1]
    # of other classes: refused by name, with the label file
    with pytest.raises(UserError, match=r"valid0.txt: category 1 \(no\) is not one of the known: cat"):
        A.open_splits(own, None, val_data=other)
    with pytest.raises(UserError, match="--val_percent 10 and --val_data .* both give the validation set"):
        A.open_splits(own, None, val_data=flat, val_percent=10)
    with pytest.raises(UserError, match="--test_data .*gone: no labelled set for the test split"):
        A.open_splits(own, None, test_data=str(tmp_path / "gone"))
    sets = A.open_splits("synthetic", None, synthetic_images=4, synthetic_test_images=2, synthetic_size=40)
    assert (len(sets.train), len(sets.test)) == (4, 2) and sets.val is sets.test and sets.test.notes == []


def test_a_share_of_the_training_images_for_validation(tmp_path):
    files = [f"{k:02}.jpg" for k in range(10)]
    pictures(tmp_path / "images", *files)
    coco(tmp_path / "set.json", files)
    sets = [A.open_splits(str(tmp_path), None, val_percent=30, seed=seed) for seed in (0, 0, 1)]
    assert all((len(s.train), len(s.val)) == (7, 3) and s.test is s.val for s in sets)
    assert all(set(s.train.image_ids) | set(s.val.image_ids) == set(range(10)) for s in sets)
    assert sets[0].val.image_ids == sets[1].val.image_ids != sets[2].val.image_ids
    assert "3 of the 10 images of" in sets[0].train.notes[-1] and "seed 0" in sets[0].train.notes[-1]
    part = A.open_splits(str(tmp_path), None, val_percent=40, labels_percent=50)
    assert (len(part.train), len(part.val)) == (3, 2)
    part = A.open_splits(str(tmp_path), None, labels_percent=50)
    assert (len(part.train), len(part.test)) == (5, 10) and part.val is part.test
    coco_three(tmp_path / "three")
    with pytest.raises(UserError, match="30.0 % of the 1 images of three cannot be set apart|30 % of the 1 images"):
        A.open_splits(str(tmp_path / "three"), None, val_percent=30)


def test_stratification():
    rng = np.random.default_rng(0)
    frequency = [0.9, 0.4, 0.1, 0.03, 0.01]
    classes = [np.flatnonzero(rng.random(5) < frequency).tolist() for _ in range(2000)]
    chosen = A.stratified_part(classes, 0.2, 3)
    assert chosen == A.stratified_part(classes, 0.2, 3) != A.stratified_part(classes, 0.2, 4)
    whole, part = (Counter(k for i in images for k in classes[i]) for images in (range(2000), chosen))
    assert 390 <= len(chosen) <= 410
    assert all(abs(part[k] - 0.2 * whole[k]) <= max(1, 0.01 * whole[k]) for k in whole), (whole, part)
    # the last image of a class is never taken, and a small set still gives one
    assert A.stratified_part([[0], [0], [1]], 0.3, 0) in ([0], [1])
    assert A.stratified_part([[0], [1], [2]], 0.5, 0) == [] == A.stratified_part([[0]], 0.5, 0)
    assert len(A.stratified_part([[k // 2] for k in range(20)], 0.2, 0)) == 4
    assert len(A.stratified_part([[], [], [], [0], [0]], 0.4, 0)) == 2
    large = [[k % 80, 80 + (k * 7) % 90] for k in range(50_000)]
    assert abs(len(A.stratified_part(large, 0.1, 0)) - 5_000) < 50
