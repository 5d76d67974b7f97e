"""annotations.py: COCO and VOC sets built on the spot, values by hand; real ones where ../shared/data exists."""
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import annotations as A  # noqa: E402
import data as D  # noqa: E402
from common import UserError  # noqa: E402
from test_data import PARITY, REAL, make_voc, picture  # noqa: E402

# ==== COCO json ====


def make_coco(folder, boxes, override=(), size=(100, 80), files=("im/a.jpg", "b.jpg")):
    for file in files:
        picture(folder / "images" / file, size)
    content = {"images": [{"id": 20 - k, "width": size[0], "height": size[1], "file_name": f}
                          for k, f in enumerate(files)],
               "annotations": [{"id": 0, "image_id": 20, "category_id": 7, **a} for a in boxes],
               "categories": [{"id": i, "name": n} for i, n in ((7, "cat"), (3, "dog"))], **dict(override)}
    (folder / "train.json").write_text(json.dumps(content))
    return str(folder / "train.json")


def test_coco_json(tmp_path):
    file = make_coco(tmp_path, [{"bbox": [10, 20, 30, 40], "area": 600},
                                {"bbox": [-5, 70, 20, 30], "category_id": 3, "iscrowd": 1}])
    for data in (file, str(tmp_path)):
        found = A.open_detection(data, None, "train")
        assert (found.categories == [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]
                and found.image_ids == [19, 20])
        assert found.notes == [f"{file}: 1 of 2 boxes leave their image, by 20 px in the median and 20 px at most; "
                               "0 of 2 are below a pixel. What lies outside is cut off."]
        image, target = found.load(1)
        assert image.size == (100, 80) and target["orig_size"].tolist() == [80, 100] and target["image_id"] == 20
        assert (target["boxes_xyxy"].tolist() == [[10, 20, 40, 60], [0, 70, 15, 80]]
                and target["boxes_xyxy"].dtype == torch.float32)
        assert (target["labels"].tolist() == [1, 0]
                and target["ignore"].tolist() == target["crowd"].tolist() == [False, True])
        empty = found.load(0)[1]
        assert (empty["boxes_xyxy"].shape == (0, 4) and empty["labels"].dtype == torch.int64
                and empty["ignore"].dtype == torch.bool)
    truth = found.coco_ground_truth()
    assert [(a["id"], a["image_id"], a["category_id"], a["bbox"], a["area"], a["iscrowd"])
            for a in truth["annotations"]] == [
                (1, 20, 7, [10, 20, 30, 40], 600, 0), (2, 20, 3, [0, 70, 15, 10], 150, 1)]
    assert (truth["images"][1] == {"id": 20, "width": 100, "height": 80, "file_name": "a.jpg"}
            and truth["categories"] == found.categories)
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    assert len(coco.getAnnIds(imgIds=[20])) == 2
    assert all(isinstance(v, (int, float)) for a in truth["annotations"] for v in a["bbox"])
    json.dumps(truth)


def test_coco_named_and_renumbered_test(tmp_path):
    for part, ids in (("train", ((1, "a"), (5, "b"))), ("val", ((1, "b"), (2, "a")))):
        picture(tmp_path / f"{part}2017" / "1.jpg", (50, 50))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{part}2017.json").write_text(json.dumps({
            "images": [{"id": 1, "width": 50, "height": 50, "file_name": "1.jpg"}],
            "categories": [{"id": i, "name": n} for i, n in ids],
            "annotations": [{"id": 9, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "area": 1}]}))
    train = A.open_detection("coco", str(tmp_path), "train")
    test = A.open_detection("coco", str(tmp_path), "test", categories=train.categories)
    # id 1 is "b" there: names decide
    assert train.load(0)[1]["labels"].tolist() == [0] and test.load(0)[1]["labels"].tolist() == [1]
    assert test.coco_ground_truth()["annotations"][0]["category_id"] == 5
    with pytest.raises(UserError, match=r"instances_val2017.json: category 1 \(b\)"):
        A.open_detection("coco", str(tmp_path), "test", categories=[{"id": 1, "name": "a"}])


@pytest.mark.parametrize("change, message", [
    ({"annotations": [{"image_id": 20, "category_id": 99, "bbox": [0, 0, 5, 5]}]}, "category 99"),
    ({"annotations": [{"image_id": 77, "category_id": 7, "bbox": [0, 0, 5, 5]}]}, "KeyError 77"),
    ({"annotations": [{"image_id": 20, "category_id": 7, "bbox": [0, 0, 5]}]}, "bbox of 4 numbers"),
    ({"annotations": [{"image_id": 20, "category_id": 7, "bbox": [0, 0, 0, 5]}]}, "1 of 1 boxes .*im/a.jpg, object 1"),
    ({"annotations": [{"image_id": 20, "category_id": 7, "bbox": [200, 0, 5, 5]}]}, "outside"),
    ({"annotations": [{"image_id": 20, "category_id": 7, "bbox": [float("nan"), 0, 5, 5]}]}, "1 of 1 boxes"),
    ({"annotations": [{"image_id": 20, "category_id": 7, "bbox": [float("inf"), 0, 5, 5]}]}, "1 of 1 boxes"),
    ({"images": [{"id": 20, "width": 9, "height": 9, "file_name": "gone.jpg"}]}, "gone.jpg"),
    ({"images": [{"id": 20, "file_name": "b.jpg", "width": "wide", "height": 9}]}, "width, height"),
    ({"images": [{"id": 20, "width": 9, "height": 9, "file_name": "b.jpg"}] * 2}, "twice"),
    ({"images": []}, "0 images"), ({"categories": None}, "categories"), ({"annotations": "x"}, "no COCO")])
def test_coco_errors(tmp_path, change, message):
    file = make_coco(tmp_path, [], change)
    with pytest.raises(UserError, match=message) as error:
        A.open_detection(file, None, "train")
    assert "train.json" in str(error.value)


def test_broken_and_absent_files(tmp_path):
    (tmp_path / "x.json").write_text('{"images": [')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "latin.json").write_bytes(b'"\xff"')
    for name in ("x.json", "list.json", "latin.json", "absent.json", "nofolder"):
        with pytest.raises(UserError, match=name):
            A.open_detection(str(tmp_path / name), None, "train")
    for name in ("coco", "voc"):
        with pytest.raises(UserError, match="Expected layout"):
            A.open_detection(name, str(tmp_path), "test")


def test_one_percent_of_boxes(tmp_path):
    good = [{"bbox": [1, 1, 5, 5]}] * 199
    found = A.open_detection(make_coco(tmp_path, [*good, {"bbox": [1, 1, 0, 5]}]), None, "train")
    assert (len(found.load(1)[1]["boxes_xyxy"]) == 199 and "1 of 200" in found.notes[0]
            and "im/a.jpg, object 200" in found.notes[0])
    with pytest.raises(UserError, match="3 of 200"):
        A.open_detection(make_coco(tmp_path, good[:197] + [{"bbox": [1, 1, 0, 5]}] * 3), None, "train")


def test_size_mismatch_and_exif(tmp_path):
    found = A.open_detection(make_coco(tmp_path, [{"bbox": [1, 1, 5, 5]}]), None, "train")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "images/b.jpg", (100, 80), exif=exif)  # annotated as stored: read as stored
    assert found.load(0)[0].size == (100, 80)
    picture(tmp_path / "images/b.jpg", (80, 100), exif=exif)  # annotated as seen
    assert found.load(0)[0].size == (100, 80)
    picture(tmp_path / "images/b.jpg", (50, 40))
    with pytest.raises(UserError, match="50x40"):
        found.load(0)


# ==== A set as a whole: boxes that cannot be what they claim, ids, names, places, rotation ====


def boxes_in(n, size=(100, 80), seed=0):
    """[n, 4] x1 y1 x2 y2, whole numbers, inside an image of this size, all over it."""
    rng = np.random.default_rng(seed)
    start = np.column_stack([rng.integers(0, side - 12, n) for side in size])
    return np.column_stack([start, rng.integers(start + 8, np.array(size) + 1)])


def xywh(boxes):
    return np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])


def centred(boxes):
    return np.column_stack([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]])


def shares(boxes):
    return boxes / np.array([100, 80, 100, 80])


SETS = {  # what is written as bbox for boxes x1 y1 x2 y2, and the refusal, the note, or None
    "right": (xywh, None),
    "corners": (lambda b: b, r"error: .* of 30 boxes leave their image, by .*; 0 of 30 are below a pixel. "
                "Read as x1 y1 x2 y2, 30 of 30 lie inside"),
    "centre and size": (centred, "Read as centre x, centre y, width, height, 30 of 30"),
    "x and y exchanged": (lambda b: xywh(b)[:, [1, 0, 3, 2]], "Read as y x height width, 30 of 30"),
    "corners, x and y exchanged": (lambda b: b[:, [1, 0, 3, 2]], "Read as y1 x1 y2 x2, 30 of 30"),
    "of a larger picture": (lambda b: xywh(b) * 1.5, "to the right and below only, up to 1.48 times its width and 1"),
    "of a smaller picture": (lambda b: xywh(b) / 2, "note: all 30 boxes lie in the first 50% of the width and 49% of"),
    "shares": (lambda b: xywh(shares(b)), "all numbers of 30 of 30 boxes lie in 0..1"),
    "shares, corners": (shares, "all numbers of 30 of 30 boxes lie in 0..1"),
    "to the left and above": (lambda b: xywh(b) - [60, 50, 0, 0], "cannot be the boxes of these images, as x y w"),
    "tiny": (lambda b: xywh(b) * [1, 1, 0.01, 0.01], "30 of 30 are below a pixel. These cannot be"),
    "the whole image": (lambda b: b * 0 + [0, 0, 100, 80], "note: each of the 30 boxes is its whole image"),
    "all the same": (lambda b: b * 0 + [30, 20, 40, 30], "note: all 30 boxes are the same, 30 20 40 30"),
    "two of thirty outside": (lambda b: np.concatenate([xywh(b)[2:], [[90, 10, 30, 10], [-9, 10, 20, 10]]]),
                              "note: 2 of 30 boxes leave their image, by 14.5 px in the median and 20 px at most; 0"),
}


@pytest.mark.parametrize("name", SETS)
def test_boxes_of_a_set_that_cannot_be_what_they_claim(name, tmp_path):
    written, outcome = SETS[name]
    file = make_coco(tmp_path, [{"bbox": box} for box in written(boxes_in(30)).tolist()])
    if outcome is None or outcome.startswith("note: "):
        notes = A.open_detection(file, None, "train").notes
        assert len(notes) == (outcome is not None) and all(f"{file}: {outcome[6:]}" in note for note in notes), notes
        return
    with pytest.raises(UserError, match=outcome.removeprefix("error: ")):
        A.open_detection(file, None, "train")


def test_corners_that_stay_inside_are_told_by_their_areas(tmp_path):
    boxes = boxes_in(30) // 2 + [1, 1, 1, 1]
    rows = [{"bbox": b.tolist(), "area": int((b[2:] - b[:2]).prod())} for b in boxes]
    with pytest.raises(UserError, match="0 of 30 boxes leave .* Read as x1 y1 x2 y2, 30 of 30 lie inside, and have "):
        A.open_detection(make_coco(tmp_path, rows), None, "train")


@pytest.mark.parametrize("written, message", [
    (lambda b: b[:, [1, 0, 3, 2]] + [1, 1, 0, 0], "Read as ymin xmin ymax xmax, 30 of 30"),
    (shares, "all numbers of 30 of 30 boxes lie in 0..1"), (lambda b: b * 1.5, "up to 1.48 times its width and 1.46")])
def test_voc_boxes_that_cannot_be_what_they_claim(tmp_path, written, message):
    objects = {"a": [("cat", box, 0) for box in written(boxes_in(30)).tolist()]}
    make_voc(tmp_path / "VOC2007", objects, {"trainval": "a"})
    with pytest.raises(UserError, match=message):
        A.open_detection(str(tmp_path), None, "train")


MARKED = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def make_rotated(folder, images, name="set"):
    """images: [(EXIF orientation, (w, h) as annotated, do the boxes lie on the stored pixels?)]. The box of each frames
    a red square."""
    rows = []
    for k, (orientation, (w, h), stored) in enumerate(images):
        picture = Image.new("RGB", (w, h), (90, 90, 90))
        picture.paste((255, 0, 0), (5, 10, 15, 20))
        if not stored and MARKED[orientation] is not None:
            picture = picture.transpose(MARKED[orientation])  # EXIF turns it back
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(folder / f"{name}{k}.png", exif=exif)
        rows.append({"id": k, "width": w, "height": h, "file_name": f"{name}{k}.png"})
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"images": rows, "categories": [{"id": 1, "name": "red"}], "annotations": [
        {"image_id": k, "category_id": 1, "bbox": [5, 10, 10, 10]} for k in range(len(rows))]}))
    return str(file)


def framed(found):
    """Of which images the box frames the red square."""
    seen = []
    for i in range(len(found)):
        image, target = found.load(i)
        x1, y1, x2, y2 = target["boxes_xyxy"][0].int().tolist()
        seen.append((np.asarray(image)[y1:y2, x1:x2] == (255, 0, 0)).all())
    return seen


@pytest.mark.parametrize("stored", (True, False))
def test_what_the_images_tell_of_exif_holds_for_the_set(tmp_path, stored):
    wide, square = (80, 60), (60, 60)
    file = make_rotated(tmp_path, [(1, wide, stored), (6, wide, stored), (8, wide, stored), (3, wide, stored),
                                   (2, wide, stored), (4, wide, stored), (6, square, stored), (8, square, stored)])
    found = A.open_detection(file, None, "train")
    place = "the picture as stored" if stored else "the picture as its EXIF rotates it"
    assert framed(found) == [True] * 8 and found.frames == (not stored, stored)
    assert len(found.notes) == 1 and f"lie on {place}: so says the size of 2 images, and 5 others" in found.notes[0]
    assert framed(found.subset(50, 0)) == [True] * 4 and framed(found.with_objects()) == [True] * 8
    told = A.open_detection(file, None, "train", exif="stored" if stored else "rotated")
    assert framed(told) == [True] * 8 and told.notes == []
    other = A.open_detection(file, None, "train", exif="rotated" if stored else "stored")
    with pytest.raises(UserError, match="is 60x80 px with --exif .*, its annotation says 80x60.* or leave --exif out"):
        other.load(1)


def test_exif_where_no_image_tells_or_they_disagree(tmp_path):
    wide, square = (80, 60), (60, 60)
    silent = make_rotated(tmp_path, [(3, wide, False), (6, square, False)], "silent")
    found = A.open_detection(silent, None, "train")
    assert framed(found) == [True] * 2
    assert "2 images have an EXIF rotation, and by no size can be told" in found.notes[0]
    # a test set that does not tell follows the training set
    stored = make_rotated(tmp_path, [(3, wide, True), (6, square, True)], "stored")
    assert framed(A.open_detection(stored, None, "test", rotated=False)) == [True] * 2
    assert framed(A.open_detection(stored, None, "test", exif="stored")) == [True] * 2
    mixed = make_rotated(tmp_path, [(6, wide, True), (8, wide, True), (6, wide, False), (3, wide, True)], "mixed")
    found = A.open_detection(mixed, None, "train")
    assert framed(found) == [True] * 4 and "disagree: by their size, the boxes of 1 images lie on the" in found.notes[0]
    assert "those of 2 on the picture as stored" in found.notes[0]


def test_of_a_large_set_a_sample_is_asked_for_exif(tmp_path, monkeypatch):
    file = make_rotated(tmp_path, [(6, (80, 60), True)] * 9)
    asked = []
    monkeypatch.setattr(A, "EXIF_SAMPLE", 4)
    monkeypatch.setattr(A, "image_header", lambda path: asked.append(path) or D.image_header(path))
    notes = [A.open_detection(file, None, "train").notes for _ in range(2)]
    assert len(set(asked[:4])) == 4 and asked[:4] == asked[4:]
    assert "size of 4 images of 4 that were asked" in notes[0][0]


def test_image_ids_go_in_and_out_unchanged(tmp_path):
    ids = ["1_23", "12_3", "7", 7, "0007", 30]
    for k in range(6):
        picture(tmp_path / f"{k}.jpg", (100, 80))
    content = {"images": [{"id": i, "width": 100, "height": 80, "file_name": f"{k}.jpg"} for k, i in enumerate(ids)],
               "categories": [{"id": "c", "name": "cat"}, {"id": 2, "name": "dog"}],
               "annotations": [{"id": k + 1, "image_id": key, "category_id": "c" if k else 2, "iscrowd": 0, "area": 25,
                                "bbox": [k, 0, 5, 5]} for k, key in enumerate(ids)]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    found = A.open_detection(str(tmp_path / "set.json"), None, "train")
    assert found.image_ids == [7, 30, "0007", "12_3", "1_23", "7"]
    assert found.categories == [{"id": 2, "name": "dog"}, {"id": "c", "name": "cat"}]
    for i, key in enumerate(found.image_ids):
        k = next(k for k, other in enumerate(ids) if other == key)
        target = found.load(i)[1]
        assert target["image_id"] == key and type(target["image_id"]) is type(key)
        assert found.key(i).endswith(f"{k}.jpg") and target["boxes_xyxy"][0].tolist() == [k, 0, k + 5, 5]
    truth = found.coco_ground_truth()
    assert {i["id"] for i in truth["images"]} == set(ids) and {a["image_id"] for a in truth["annotations"]} == set(ids)
    coco = COCO(str(tmp_path / "set.json"))
    results = [{"image_id": key, "category_id": "c", "bbox": [0, 0, 5, 5], "score": 0.5} for key in found.image_ids]
    assert len(coco.loadRes(results).getAnnIds()) == 6
    for wrong in (7.5, None, True, [7]):
        content["images"][0]["id"] = wrong
        (tmp_path / "set.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="neither a whole number nor a text"):
            A.open_detection(str(tmp_path / "set.json"), None, "train")


def test_categories_of_one_name_are_told_apart_by_their_ids(tmp_path):
    def opened(categories, used, known=None):
        file = make_coco(tmp_path, [{"bbox": [1, 1, 5, 5], "category_id": c} for c in used],
                         {"categories": [dict(zip(("id", "name", "supercategory"), c)) for c in categories]})
        return A.open_detection(file, None, "train", categories=known)

    two = opened([(0, "ball", "none"), (1, "ball", "ball"), (2, "net", "x")], [1, 0, 2])
    assert [c["id"] for c in two.categories] == [0, 1, 2] and two.records[1].labels.tolist() == [1, 0, 2]
    assert opened([(1, "ball"), (0, "ball")], [0, 1], two.categories).records[1].labels.tolist() == [0, 1]
    # another id, and a name that two have
    with pytest.raises(UserError, match=r"category 5 \(ball\) is not one of the known: ball \(id 0\), ball \(id 1\)"):
        opened([(5, "ball")], [5], two.categories)
    with pytest.raises(UserError, match=r"category 6 \(net\)"):
        opened([(5, "net"), (6, "net")], [6], two.categories)
    assert opened([(5, "net")], [5], two.categories).records[1].labels.tolist() == [2]
    # Roboflow's first category stands for all others
    dummy = [(0, "things", "none"), (1, "ball", "things"), (2, "ball", "things")]
    found = opened(dummy, [1, 2, 2])
    assert [c["id"] for c in found.categories] == [1, 2] and found.records[1].labels.tolist() == [0, 1, 1]
    assert found.notes == [f"{tmp_path / 'train.json'}: category 0 (things) has no object and is the supercategory of "
                           "all others: left out."]
    assert opened(dummy, [1], found.categories).notes == []
    for kept in (opened(dummy, [0, 1]), opened([*dummy[:2], (2, "net", "x")], [1]), opened([(0, "a", "a")], [])):
        assert kept.categories[0]["id"] == 0 and kept.notes == []


def test_data_root_wins_over_what_lies_beside_the_json(tmp_path, monkeypatch):
    file = make_coco(tmp_path, [{"bbox": [1, 1, 5, 5]}])
    for k, name in enumerate(("b.jpg", "im/a.jpg")):
        picture(tmp_path / "real" / name, (100, 80), (0, 200, k))
    for data in (file, str(tmp_path)):
        found = A.open_detection(data, str(tmp_path / "real"), "train")
        assert found.key(0) == str(tmp_path / "real/b.jpg") and found.load(0)[0].getpixel((0, 0))[1] > 150
        assert A.open_detection(data, None, "train").key(0) == str(tmp_path / "images/b.jpg")
    (tmp_path / "real/b.jpg").unlink()
    with pytest.raises(UserError, match=f"1 of 2 images are not there, the first: {tmp_path}/real/b.jpg. Looked in "
                       f"{tmp_path}/real, {tmp_path}/real/images;"):
        A.open_detection(file, str(tmp_path / "real"), "train")
    # a named set: the folder given before one in it, and the flag before $DATA_ROOT
    for place, name in (("given", "cat"), ("given/VOCdevkit", "dog"), ("env", "bird")):
        make_voc(tmp_path / place / "VOC2007", {"a": [(name, (1, 1, 9, 9), 0)]}, {"trainval": "a"})
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "env"))
    for data, root, name in (("voc", "given", "cat"), ("voc", None, "bird"), (str(tmp_path / "given"), None, "cat")):
        found = A.open_detection(data, root and str(tmp_path / root), "train")
        assert [c["name"] for c in found.categories] == [name]


def test_names_spelled_otherwise_are_found(tmp_path):
    composed, apart = "caf\u00e9/\u00fc.jpg", "cafe\u0301/u\u0308.jpg"
    picture(tmp_path / "images" / apart, (100, 80))
    content = {"images": [{"id": 1, "width": 100, "height": 80, "file_name": composed.replace("/", "\\")}],
               "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    for name in (composed.replace("/", "\\"), composed):
        content["images"][0]["file_name"] = name
        (tmp_path / "set.json").write_text(json.dumps(content))
        found = A.open_detection(str(tmp_path / "set.json"), None, "train")
        assert found.key(0) == str(tmp_path / "images" / apart) and found.load(0)[0].size == (100, 80)
        assert found.notes == [f"{tmp_path / 'set.json'}: 1 of 1 names of files are spelled otherwise there (another "
                               f"Unicode form, or back slashes for separators), the first: {name!a} is {apart!a}"]
    picture(tmp_path / "images" / composed, (100, 80))  # the exact name comes first
    found = A.open_detection(str(tmp_path / "set.json"), None, "train")
    assert found.key(0) == str(tmp_path / "images" / composed) and found.notes == []
    year = tmp_path / "VOC2007"
    make_voc(year, {"cafe\u0301": [("cat", (1, 1, 9, 9), 0)]}, {"trainval": ["caf\u00e9"]})
    (year / "Annotations/cafe\u0301.xml").rename(year / "Annotations/caf\u00e9.xml")
    found = A.open_detection(str(tmp_path), None, "train")
    assert found.key(0) == str(year / "JPEGImages/cafe\u0301.jpg") and found.notes == []


def test_the_largest_number_of_objects(tmp_path):
    rows = [{"bbox": [k, 0, 5, 5], "iscrowd": int(k > 3)} for k in range(6)]
    found = A.open_detection(make_coco(tmp_path, [*rows, {"bbox": [1, 1, 5, 5], "image_id": 19}]), None, "train")
    assert found.max_objects == 4 and A.DetectionSet("x", [], [], []).max_objects == 0


# ==== VOC xml ====


def test_voc(tmp_path):
    objects = {"a": [("cat", (1, 1, 10, 20), 0), ("ant", (5, 6, 120, 80), 1)], "b": [], "t": [("cat", (2, 2, 9, 9), 0)]}
    make_voc(tmp_path / "VOCdevkit/VOC2007", objects, {"trainval": "ba", "test": "t"})
    found = A.open_detection("voc", str(tmp_path), "train")
    assert found.categories == [{"id": 1, "name": "ant"}, {"id": 2, "name": "cat"}] and found.image_ids == [1, 2]
    assert len(found.load(0)[1]["labels"]) == 0
    target = found.load(1)[1]
    assert target["boxes_xyxy"].tolist() == [[0, 0, 10, 20], [4, 5, 100, 80]] and target["labels"].tolist() == [1, 0]
    assert target["ignore"].tolist() == [False, True] and target["crowd"].tolist() == [False, False]
    first, second = found.coco_ground_truth()["annotations"]
    assert ("ignore" not in first
            and (second["ignore"], second["difficult"], second["iscrowd"], second["area"]) == (1, 1, 0, 96 * 75))
    assert (len(found.notes) == 3 and "1 of 2 boxes leave their image, by 20 px" in found.notes[0]
            and "1 annotations name another image" in found.notes[1] and "VOC2012 is not there" in found.notes[2])
    for root in (str(tmp_path / "VOCdevkit"), str(tmp_path)):
        test = A.open_detection("voc", root, "test")
        assert test.categories == found.categories and test.load(0)[1]["labels"].tolist() == [1]
    assert (len(A.open_detection(str(tmp_path), None, "train"))
            == len(A.open_detection(str(tmp_path / "VOCdevkit/VOC2007"), None, "train")) == 2)
    with pytest.raises(UserError, match=r"t.xml: category cat"):
        A.open_detection("voc", str(tmp_path), "test", categories=[{"id": 1, "name": "ant"}])
    make_voc(tmp_path / "VOCdevkit/VOC2012", {"z": [("cat", (1, 1, 2, 2), 0)]}, {"trainval": "z"})
    both = A.open_detection("voc", str(tmp_path), "train")
    assert len(both) == 3 and both.records[2].image.stem == "z" and len(both.notes) == 2
    # it is a folder of the user's own, in which nobody misses VOC2012
    own = A.open_detection(str(tmp_path / "VOCdevkit/VOC2007"), None, "train")
    assert len(own.notes) == 2 and "VOC2012" not in " ".join(own.notes).replace(str(tmp_path), "")


def test_voc_errors(tmp_path):
    year = tmp_path / "VOC2007"
    make_voc(year, {"a": [("cat", (1, 1, 10, 20), 0)]}, {"trainval": "a"})
    with pytest.raises(UserError, match="test.txt"):
        A.open_detection("voc", str(tmp_path), "test")
    for change, message in (("<annotation>", "a.xml is no VOC"), ("<set><size/></set>", "begins with <set>"),
                            (None, "a.xml cannot be read")):
        (year / "Annotations/a.xml").write_text(change) if change else (year / "Annotations/a.xml").unlink()
        with pytest.raises(UserError, match=message):
            A.open_detection("voc", str(tmp_path), "train")
    (year / "ImageSets/Main/trainval.txt").write_text("a\nghost\n")
    with pytest.raises(UserError, match="no image ghost"):
        A.open_detection("voc", str(tmp_path), "train")


# ==== What all sets have ====


def test_keys_and_fingerprint(tmp_path):
    for folder in ("one", "two"):
        make_coco(tmp_path / folder, [{"bbox": [10, 20, 30, 40]},
                                      {"bbox": [-5, 70, 20, 30], "category_id": 3, "iscrowd": 1}])
    found = A.open_detection(str(tmp_path / "one"), None, "train")
    assert [found.key(i) for i in range(2)] == [str(tmp_path / "one/images" / name) for name in ("b.jpg", "im/a.jpg")]
    digest = hashlib.sha256(b"b.jpg 19 (80, 100)" + b"a.jpg 20 (80, 100)")
    digest.update(np.float32([[10, 20, 40, 60], [0, 70, 15, 80]]).tobytes())
    digest.update(np.int64([1, 0]).tobytes() + np.array([False, True]).tobytes())
    assert found.fingerprint() == digest.hexdigest()
    # the files' names count, not where they lie
    assert A.open_detection(str(tmp_path / "two"), None, "train").fingerprint() == digest.hexdigest()
    seen = {digest.hexdigest(), found.subset(50, 0).fingerprint(), found.subset(50, 1).fingerprint()}
    for box in ({"bbox": [10, 20, 30, 41]}, {"bbox": [10, 20, 30, 40], "category_id": 3}, {"bbox": [10, 20, 30, 40]}):
        seen.add(A.open_detection(make_coco(tmp_path / "one", [box]), None, "train").fingerprint())
    scenes = [A.open_detection("synthetic", None, "train", synthetic_images=2, synthetic_size=40, seed=k)
              for k in (0, 1)]
    assert len(seen | {s.fingerprint() for s in scenes}) == 8 and scenes[0].key(1) == "1"


def test_label_subset():
    ids = [7 * i + 3 for i in range(2000)]
    assert A.label_subset(ids, 0.01, 42)[:5] == [10734, 10020, 2803, 13604, 11749]  # parity case detreg/label_subset
    assert A.label_subset(ids, 0.1, 42)[:3] == [4847, 6926, 6205] and len(A.label_subset(ids, 0.05, 42)) == 100
    if (PARITY / "label_subset.npz").exists():
        for key, values in np.load(PARITY / "label_subset.npz").items():
            assert A.label_subset(ids, float(key.split("_")[1]), 42) == values.tolist()
    found = A.open_detection("synthetic", None, "train", synthetic_images=10, synthetic_size=40)
    half = found.subset(50, 1)
    assert half.image_ids == A.label_subset(found.image_ids, 0.5, 1) and half.notes == ["5 of 10 images"]
    assert (np.array_equal(half.load(2)[0], found.load(half.image_ids[2] - 1)[0])
            and len(half.coco_ground_truth()["images"]) == 5)
    for percent in (1, 0, -5, 300):
        with pytest.raises(UserError):
            found.subset(percent, 0)


# ==== A set nobody labelled ====


def test_held_out_set(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png", (20 + i, 10))
    (tmp_path / "1.png").write_bytes(b"cut")
    asked = []

    def boxes_of(image, i):
        asked.append((i, image.size))
        return np.float32([[1, 2, 5, 8], [-3, 4, 90, 90], [6, 6, 6, 9]][:i])

    source = D.open_images(str(tmp_path), None)
    found = A.held_out_set(source, [1, 3, 0, 2], boxes_of)
    assert asked == [(3, (23, 10)), (0, (20, 10)), (2, (22, 10))]
    assert (found.image_ids == [3, 0, 2] and found.name == source.name and not found.voc
            and found.categories == [{"id": 1, "name": "proposal"}])
    assert len(found.notes) == 1 and found.notes[0].startswith(f"left out of the probe: {tmp_path / '1.png'}: ")
    # clipped to the image; what is empty is left out
    assert [r.boxes.tolist() for r in found.records] == [
        [[1, 2, 5, 8], [0, 4, 23, 10]], [], [[1, 2, 5, 8], [0, 4, 22, 10]]]
    image, target = found.load(0)
    assert image.size == (23, 10) and target["image_id"] == 3 and target["labels"].tolist() == [0, 0]
    assert not target["ignore"].any() and target["boxes_xyxy"].dtype == torch.float32
    truth = found.coco_ground_truth()
    assert [(a["image_id"], a["category_id"], a["bbox"], a["area"]) for a in truth["annotations"]] == [
        (3, 1, [1, 2, 4, 6], 24), (3, 1, [0, 4, 23, 6], 138), (2, 1, [1, 2, 4, 6], 24), (2, 1, [0, 4, 22, 6], 132)]
    assert [i["file_name"] for i in truth["images"]] == ["3.png", "0.png", "2.png"]


# ==== Real data ====


def test_real_data():
    if not REAL.is_dir():
        pytest.skip("../shared/data is not here")
    train, test = (A.open_detection("voc", str(REAL / "bccd"), s) for s in ("train", "test"))
    assert [c["name"] for c in train.categories] == ["Platelets", "RBC", "WBC"] == [c["name"] for c in test.categories]
    assert len(train) == 292 and len(test) == 72 and test.notes == []
    assert sum(len(r.boxes) for s in (train, test) for r in s.records) == 4888 - 2 and "2 of " in train.notes[0]
    assert train.load(0)[0].size == (640, 480)
