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
                and found.image_ids == [19, 20] and found.notes == [])
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
    ({"images": [{"id": 20, "file_name": "b.jpg"}]}, "width, height"),
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
    assert (len(found.notes) == 2 and "VOC2012 is not there" in found.notes[0]
            and "1 annotations name another image" in found.notes[1])
    for root in (str(tmp_path / "VOCdevkit"), str(tmp_path)):
        test = A.open_detection("voc", root, "test")
        assert test.categories == found.categories and test.load(0)[1]["labels"].tolist() == [1]
    assert (len(A.open_detection(str(tmp_path), None, "train"))
            == len(A.open_detection(str(tmp_path / "VOCdevkit/VOC2007"), None, "train")) == 2)
    with pytest.raises(UserError, match=r"t.xml: category cat"):
        A.open_detection("voc", str(tmp_path), "test", categories=[{"id": 1, "name": "ant"}])
    make_voc(tmp_path / "VOCdevkit/VOC2012", {"z": [("cat", (1, 1, 2, 2), 0)]}, {"trainval": "z"})
    both = A.open_detection("voc", str(tmp_path), "train")
    assert len(both) == 3 and both.records[2].image.stem == "z" and len(both.notes) == 1


def test_voc_errors(tmp_path):
    year = tmp_path / "VOC2007"
    make_voc(year, {"a": [("cat", (1, 1, 10, 20), 0)]}, {"trainval": "a"})
    with pytest.raises(UserError, match="test.txt"):
        A.open_detection("voc", str(tmp_path), "test")
    for change, message in (("<annotation>", "a.xml is no VOC"), ("<annotation><size/></annotation>", "is no VOC"),
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
