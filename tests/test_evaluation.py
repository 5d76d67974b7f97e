"""evaluation.py against values worked out by hand."""
import copy
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluation as ev  # noqa: E402
import run  # noqa: E402
from annotations import open_detection  # noqa: E402
from common import HungarianMatcher, UserError  # noqa: E402
from proposals import Generator, image_seed  # noqa: E402

FAR = [300, 300, 50, 50]  # overlaps no object below


def truth(*objects, images=1, categories=(1, 2)):
    """objects: (image_id, category_id, bbox, {extra}); ids from 0 on purpose: pycocotools alone would lose object 0."""
    return {"images": [{"id": i, "width": 500, "height": 400} for i in range(images)],
            "categories": [{"id": c, "name": f"class{c}"} for c in categories],
            "annotations": [{"id": i, "image_id": o[0], "category_id": o[1], "bbox": o[2], "area": o[2][2] * o[2][3],
                             "iscrowd": 0, **(o[3] if len(o) > 3 else {})} for i, o in enumerate(objects)]}


def found(*boxes):
    """boxes: (image_id, category_id, bbox), best first."""
    return [{"image_id": b[0], "category_id": b[1], "bbox": b[2], "score": 1 - 0.01 * i} for i, b in enumerate(boxes)]


A, B = [10, 10, 50, 50], [100, 100, 50, 50]


# ==== COCO ====


def test_perfect_detection_and_names():
    gt, dt = truth((0, 1, A)), found((0, 1, A))
    before = copy.deepcopy((gt, dt))
    m = ev.detection_metrics(gt, dt, per_class=True)
    assert (gt, dt) == before
    assert list(m) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs",
                       "ARm", "ARl", "per_class"]
    # 50 x 50 is medium
    assert all(m[k] == pytest.approx(1) for k in ("AP", "AP50", "AP75", "APm", "AR1", "AR10", "AR100", "ARm"))
    assert all(math.isnan(m[k]) for k in ("APs", "APl", "ARs", "ARl"))
    assert m["per_class"]["class1"] == pytest.approx(1) and math.isnan(m["per_class"]["class2"])
    json.dumps(m)


def test_precision_recall_by_hand():
    # right, wrong, right on 2 objects: precision 1 up to recall .5 (51 of 101 points), 2/3 beyond (50 points)
    m = ev.detection_metrics(truth((0, 1, A), (0, 1, B)), found((0, 1, A), (0, 1, FAR), (0, 1, B)))
    assert m["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101) and m["AR1"] == 0.5 and m["AR10"] == 1


def test_iou_thresholds():
    # IoU = 35 / 50 = .7: found at .50 .. .70, five of ten thresholds
    m = ev.detection_metrics(truth((0, 1, A)), found((0, 1, [10, 10, 50, 35])))
    assert (m["AP"], m["AP50"], m["AP75"], m["AR1"]) == pytest.approx((0.5, 1, 0, 0.5))


def test_class_agnostic_and_aware():
    gt, dt = truth((0, 1, A), (0, 2, B)), found((0, 1, A), (0, 1, B))
    aware = ev.detection_metrics(gt, dt)
    agnostic = ev.detection_metrics(gt, dt, class_agnostic=True, per_class=True)
    assert aware["AP"] == pytest.approx(0.5) and aware["AR100"] == 0.5  # class 1 perfect, class 2 nothing
    assert (agnostic["AP"] == pytest.approx(1) and agnostic["AR1"] == 0.5
            and agnostic["per_class"] == {"object": pytest.approx(1)})


@pytest.mark.parametrize("flag", ["difficult", "ignore"])
def test_difficult_object_is_ignored(flag):
    gt = truth((0, 1, A, {flag: 1}), (0, 1, B))
    dt = found((0, 1, A), (0, 1, A), (0, 1, B))  # both boxes on the difficult object are no mistakes
    assert ev.detection_metrics(gt, dt)["AP"] == pytest.approx(1)
    assert ev.detection_metrics(gt, dt[2:])["AR100"] == 1  # nor is not finding it
    assert ev.detection_metrics(ev.count_difficult(gt), dt[2:])["AR100"] == 0.5  # where it is an ordinary object
    assert gt["annotations"][0][flag] == 1
    gt["annotations"][0][flag] = 0
    assert ev.detection_metrics(gt, dt)["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_difficult_overlap_is_that_of_an_object_not_of_a_crowd():
    small = [30, 30, 10, 10]  # inside A: IoU 1/25, but wholly inside for a crowd region
    gt = truth((0, 1, A, {"difficult": 1}), (0, 1, B))
    assert ev.detection_metrics(gt, found((0, 1, small), (0, 1, B)))["AP"] == pytest.approx(0.5)
    gt = truth((0, 1, A, {"iscrowd": 1}), (0, 1, B))
    assert ev.detection_metrics(gt, found((0, 1, small), (0, 1, [12, 12, 9, 9]), (0, 1, B)))["AP"] == pytest.approx(1)
    gt = truth((0, 1, A, {"iscrowd": 1, "difficult": 1}), (0, 1, B))
    assert ev.detection_metrics(gt, found((0, 1, small), (0, 1, B)))["AP"] == pytest.approx(1)


def test_no_detections_and_no_ground_truth():
    m = ev.detection_metrics(truth((0, 1, A)), [])
    assert m["AP"] == m["AP50"] == m["AR100"] == 0
    for gt, dt in ((truth(), found((0, 1, A))), (truth(), []), (truth(images=0), []),
                   (truth(categories=()), found((0, 1, A)))):
        for agnostic in (False, True):
            assert all(math.isnan(v) for v in ev.detection_metrics(gt, dt, class_agnostic=agnostic).values())
        assert all(math.isnan(v) for v in ev.voc07_metrics(gt, dt).values())


def test_more_than_100_detections():
    dt = found(*[(0, 1, FAR)] * 100, (0, 1, A))
    m = ev.detection_metrics(truth((0, 1, A)), dt)
    assert m["AP"] == m["AR100"] == 0
    m = ev.detection_metrics(truth((0, 1, A)), dt, max_dets=(100, 300, 10))
    assert m["AR300"] == 1 and m["AR100"] == m["AR10"] == 0 and m["AP"] == pytest.approx(1 / 101) and "AR1" not in m


def test_missing_area_and_unlisted_annotations():
    gt = truth((0, 1, A), (7, 1, B), (0, 9, B))  # an image and a category that are not evaluated
    for a in gt["annotations"]:
        del a["area"], a["iscrowd"]
    assert ev.detection_metrics(gt, found((0, 1, A)))["APm"] == pytest.approx(1)
    assert ev.voc07_metrics(gt, found((0, 1, A)))["VOC07_AP"] == pytest.approx(1)


@pytest.mark.parametrize("metric", [ev.detection_metrics, ev.voc07_metrics])
def test_bad_detections(metric):
    with pytest.raises(UserError, match="image ids"):
        metric(truth((0, 1, A)), found((5, 1, A)))
    with pytest.raises(UserError, match="not finite"):
        metric(truth((0, 1, A)), found((0, 1, [0, 0, math.nan, 1])))


def renamed(gt, dt, image_ids, category_ids):
    """The same with other ids."""
    gt, dt = copy.deepcopy((gt, dt))
    for image in gt["images"]:
        image["id"] = image_ids[image["id"]]
    for category in gt["categories"]:
        category["id"] = category_ids[category["id"]]
    for item in (*gt["annotations"], *dt):
        item |= {"image_id": image_ids[item["image_id"]], "category_id": category_ids[item["category_id"]]}
    return gt, dt


@pytest.mark.parametrize("image_ids", (("b/2", "7", "a"), (7, "7", "x"), ("z", 3, 0), (9, 5, 1)))
def test_ids_of_any_kind(image_ids):
    """Numbers, strings, and both: the same numbers, and inputs that stay as they are."""
    gt = truth((0, 1, A), (1, 2, B), (2, 1, A), (2, 2, B, {"difficult": 1}), images=3)
    dt = found((0, 1, A), (1, 1, FAR), (1, 2, [100, 100, 50, 35]), (2, 1, FAR), (2, 1, A), (2, 2, B))
    other = renamed(gt, dt, image_ids, {1: 40, 2: 3})
    before = copy.deepcopy(other)
    for agnostic in (False, True):
        wanted, mine = (ev.detection_metrics(*pair, class_agnostic=agnostic, per_class=True)
                        for pair in ((gt, dt), other))
        assert mine.pop("per_class") == pytest.approx(wanted.pop("per_class"), nan_ok=True)
        assert mine == pytest.approx(wanted, nan_ok=True)
    assert str(ev.voc07_metrics(*other)) == str(ev.voc07_metrics(gt, dt)) and other == before
    sizes = {i: (10, 10) for i in image_ids}
    moved = ev.shuffled(other[1], list(image_ids), sizes)
    assert [d["image_id"] for d in moved][:2] == [image_ids[1], image_ids[2]]


def test_two_categories_of_one_name_have_an_ap_each():
    gt, dt = truth((0, 0, A), (0, 1, B), categories=(0, 1, 5)), found((0, 1, B), (0, 0, FAR))
    for category in gt["categories"][:2]:
        category["name"] = "ball"
    per_class = ev.detection_metrics(gt, dt, per_class=True)["per_class"]
    assert list(per_class) == ["ball (id 0)", "ball (id 1)", "class5"]
    assert per_class["ball (id 0)"] == 0 and per_class["ball (id 1)"] == pytest.approx(1)
    odd = [{"id": 0, "name": "ball"}, {"id": 1, "name": "ball"}, {"id": 2, "name": "ball (id 0)"}]
    assert len(set(ev.distinct_names(odd))) == 3


def test_prints_nothing(capsys):
    ev.detection_metrics(truth((0, 1, A)), found((0, 1, A)))
    assert capsys.readouterr().out == ""


# ==== VOC07 ====


def test_voc_eleven_points_by_hand():
    m = ev.voc07_metrics(truth((0, 1, A), (0, 1, B)), found((0, 1, A), (0, 1, FAR), (0, 1, B)))
    assert list(m) == ["VOC07_AP", "VOC07_AP50", "VOC07_AP75"]
    assert m["VOC07_AP"] == m["VOC07_AP50"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_voc_mean_over_classes_and_thresholds():
    # class 1: IoU .7, found at .50 .. .65 (.7 > .7 is false); class 2 perfect; class 3 has only a difficult object and
    # does not count
    gt = truth((0, 1, A), (1, 2, B), (1, 3, A, {"difficult": 1}), images=2, categories=(1, 2, 3))
    m = ev.voc07_metrics(gt, found((0, 1, [10, 10, 50, 35]), (1, 2, B), (1, 3, FAR)))
    assert (m["VOC07_AP"], m["VOC07_AP50"], m["VOC07_AP75"]) == pytest.approx(((0.4 + 1) / 2, 1, 0.5))
    assert ev.voc07_metrics(gt, found((0, 1, [10, 10, 50, 35]), (1, 2, B)),
                            thresholds=(0.7, 0.6))["VOC07_AP"] == pytest.approx(0.75)


def test_voc_overlap_is_the_devkits():
    """The devkit's inclusive corners and + 1, written out, decide like our plain overlap on either side of it."""
    box = [11.5, 14.0, 47.0, 40.5]
    x1, y1, x2, y2 = max(11, 12.5), max(11, 15), min(60, 58.5), min(60, 54.5)  # of (x + 1, y + 1, x + w, y + h)
    inter = (x2 - x1 + 1) * (y2 - y1 + 1)
    iou = inter / ((60 - 11 + 1) ** 2 + (58.5 - 12.5 + 1) * (54.5 - 15 + 1) - inter)
    for threshold, ap in ((iou - 1e-9, 1), (iou + 1e-9, 0)):
        assert ev.voc07_metrics(truth((0, 1, A)), found((0, 1, box)),
                                thresholds=(threshold,))["VOC07_AP"] == pytest.approx(ap)


def test_voc_taken_object_makes_a_mistake_where_coco_takes_the_next():
    a2 = [14, 10, 50, 50]  # IoU with A 46/54
    # the second is nearer to A than to a2
    gt, dt = truth((0, 1, A), (0, 1, a2)), found((0, 1, A), (0, 1, [11, 10, 50, 50]))
    assert ev.voc07_metrics(gt, dt)["VOC07_AP50"] == pytest.approx(6 / 11)
    assert ev.detection_metrics(gt, dt)["AP50"] == pytest.approx(1)


def test_voc_difficult_neither_counts_nor_penalises():
    gt = truth((0, 1, A, {"difficult": 1}), (0, 1, B))
    assert ev.voc07_metrics(gt, found((0, 1, A), (0, 1, A), (0, 1, B)))["VOC07_AP"] == pytest.approx(1)
    assert ev.voc07_metrics(gt, found((0, 1, FAR), (0, 1, B)))["VOC07_AP"] == pytest.approx(0.5)
    assert ev.voc07_metrics(gt, found((0, 1, A)))["VOC07_AP"] == 0


def test_voc_ties_keep_the_order_given_and_rounding_makes_ties():
    gt, right, wrong = truth((0, 1, A)), found((0, 1, A))[0], found((0, 1, FAR))[0]
    assert (ev.voc07_metrics(gt, [right, wrong])["VOC07_AP"] == 1
            and ev.voc07_metrics(gt, [wrong, right])["VOC07_AP"] == 0.5)
    dt = [{**wrong, "score": 0.5001}, {**right, "score": 0.5004}]
    assert ev.voc07_metrics(gt, dt)["VOC07_AP"] == 1 and ev.voc07_metrics(gt, dt, rounded=True)["VOC07_AP"] == 0.5
    dt = found((0, 1, [10.04, 10.04, 49.98, 49.98]))  # rounds to the object itself
    assert ev.voc07_metrics(gt, dt, thresholds=(0.999,))["VOC07_AP"] == 0
    assert ev.voc07_metrics(gt, dt, thresholds=(0.999,), rounded=True)["VOC07_AP"] == 1


@pytest.mark.parametrize("tenths", range(11))
def test_voc_recall_of_exact_tenths(tenths):
    objects = [(0, 1, [40 * i, 0, 30, 30]) for i in range(10)]
    m = ev.voc07_metrics(truth(*objects), found(*objects[:tenths]))
    assert m["VOC07_AP"] == pytest.approx((tenths + 1) / 11 if tenths else 0)


# ==== Detections and their control ====


def test_class_agnostic_scores():
    logits = torch.tensor([[9.0, -1, 5], [0, 2, 0], [0, -1, 8], [0, 3, 0]])
    boxes = torch.tensor([[1.0, 2, 4, 8], [-5, -6, 10, 20], [0, 0, 900, 900], [-9, 1, -3, 5]])
    scores, boxes_xywh = ev.class_agnostic_scores(logits, boxes)
    assert scores.tolist() == [3, 2, -1, -1]  # logits of class 1, equal ones in the order of the queries
    # clamped at 0, not at the image's size
    assert boxes_xywh.tolist() == [[0, 1, 0, 4], [0, 0, 10, 20], [1, 2, 3, 6], [0, 0, 900, 900]]
    d = ev.class_agnostic_detections(logits.requires_grad_(), boxes, 7, object_class=0, top=2)
    assert d == [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 6], "score": 9},
                 {"image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 20], "score": 0}]
    # 2 outputs: the released slice has step 0 there
    assert ev.class_agnostic_scores(logits[:, :2], boxes)[0].tolist() == [3, 2, -1, -1]
    with pytest.raises(UserError, match="object_class"):
        ev.class_agnostic_scores(logits[:, :1], boxes)


def test_boxes_as_detections():
    boxes = np.array([[1, 2, 4, 8], [0, 0, 5, 5], [3, 3, 9, 9]], dtype=np.uint16)
    dt = ev.boxes_as_detections(boxes, 3)
    assert [d["bbox"] for d in dt] == [[1, 2, 3, 6], [0, 0, 5, 5], [3, 3, 6, 6]] and {d["image_id"] for d in dt} == {3}
    assert (dt[0]["score"] > dt[1]["score"] > dt[2]["score"]
            and dt[1]["score"] == ev.boxes_as_detections(boxes[:2], 4)[1]["score"])
    assert [d["score"] for d in ev.boxes_as_detections(boxes, 3, scores=np.ones(3), category_id=5)] == [1, 1, 1]
    assert ev.boxes_as_detections([], 3) == []
    with pytest.raises(UserError, match="2 scores for 3 boxes"):
        ev.boxes_as_detections(boxes, 3, scores=[1, 2])


def test_shuffled_moves_every_detection_to_another_image():
    sizes = {4: (100, 200), 9: (50, 400), 2: (100, 100)}
    dt = [{"image_id": i, "category_id": 6, "bbox": [10, 20, 30, 40], "score": 0.1 * i} for i in (4, 4, 9, 2)]
    before = copy.deepcopy(dt)
    moved = ev.shuffled(dt, [4, 9, 2], sizes)
    assert dt == before and [d["image_id"] for d in moved] == [9, 9, 2, 4]
    assert [d["bbox"] for d in moved] == [[20, 10, 60, 20], [20, 10, 60, 20], [2.5, 40, 7.5, 80], [20, 20, 60, 40]]
    assert [(d["score"], d["category_id"]) for d in moved] == [(d["score"], 6) for d in dt]
    for bad in ([4], [4, 4], [4, 9], [4, 9, 2, 5]):
        with pytest.raises(UserError, match="shuffled control"):
            ev.shuffled(dt, bad, sizes)


# ==== Processes ====


def _worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    try:
        seen = [list(ev.rank_slice(7)), ev.gather([{"i": i} for i in ev.rank_slice(7)]),
                ev.gather([rank] * rank), list(ev.rank_slice(1))]
        (folder / f"{rank}.json").write_text(json.dumps(seen))
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(_worker, (tmp_path,), nprocs=2)
    results = [json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1)]
    (mine0, all0, uneven0, one0), (mine1, all1, uneven1, one1) = results
    assert mine0 + mine1 == list(range(7)) and abs(len(mine0) - len(mine1)) == 1 and one0 + one1 == [0]
    assert all0 == all1 == [{"i": i} for i in range(7)] and uneven0 == uneven1 == [1]


def test_one_process():
    assert list(ev.rank_slice(3)) == [0, 1, 2] and list(ev.rank_slice(0)) == [] and ev.gather([3, 1]) == [3, 1]


@pytest.mark.parametrize("n, world", [(0, 3), (2, 3), (7, 3), (9, 3), (100, 7)])
def test_every_image_exactly_once(monkeypatch, n, world):
    slices = []
    for r in range(world):
        monkeypatch.setattr(ev, "rank", lambda r=r: r)
        monkeypatch.setattr(ev, "world_size", lambda: world)
        slices.append(list(ev.rank_slice(n)))
    assert sum(slices, []) == list(range(n)) and max(map(len, slices)) - min(map(len, slices)) <= 1


@pytest.mark.parametrize(("n", "world"), ((2, 2), (3, 2), (9, 2), (10, 3), (17, 2), (33, 4), (5, 8)))
def test_batches_of_a_probe_are_those_of_one_process(monkeypatch, n, world):
    """No process gets a single image, which the shuffled control would compare with itself."""
    class Probe(torch.utils.data.Dataset):
        def __len__(self):
            return n

        def __getitem__(self, key):
            return key[1]

    def batches(count):
        seen = []
        for r in range(count):
            monkeypatch.setattr(ev, "rank", lambda r=r: r)
            monkeypatch.setattr(ev, "world_size", lambda: count)
            seen += [b["index"] for b in ev.probe_batches(Probe(), 0, collate=lambda s: {"index": s, "skipped": []})]
        return seen

    alone = batches(1)
    assert sum(alone, []) == list(range(n)) and min(map(len, alone)) >= 2 and max(map(len, alone)) <= 9
    assert batches(world) == alone


# ==== Probe ====


A01, B01, FAR01 = [0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.2, 0.4], [0.1, 0.9, 0.1, 0.1]  # cxcywh, apart from each other


def test_localization_metrics_by_hand():
    shifted = [0.4, 0.3, 0.2, 0.2]  # half of A01: IoU .02 / .06
    half = [0.7, 0.6, 0.1, 0.4]  # inside B01: IoU .5, though float32 may say a little less
    rows = [{"true": [A01, B01], "found": [A01, half]}, {"true": [A01], "found": [shifted]}, {"true": [], "found": []},
            {"true": [A01], "found": [FAR01]}]
    numbers = ev.localization_metrics(rows)
    assert numbers["IoU"] == pytest.approx((1 + 0.5 + 1 / 3 + 0) / 4) and numbers["recall50"] in (0.25, 0.5)


def test_before_and_after():
    asked = []

    def find(model, other=False, text=""):
        asked.append((model, other, text))
        return [{"row": len(asked)}]

    assert ev.before_and_after(find, "before", "after") == {
        "untrained": [{"row": 1}], "shuffled": [{"row": 2}], "pretrained": [{"row": 3}]}
    assert asked == [("before", False, "untrained"), ("after", True, "shuffled"), ("after", False, "pretrained")]


def test_localization_table_by_hand():
    """Two images, one box each. "true": where what was asked for lies; "asked": where it lies in its own image."""
    rows = {"untrained": [{"true": [A01], "found": [FAR01], "asked": [A01]},
                          {"true": [B01], "found": [FAR01], "asked": [B01]}],
            "shuffled": [{"true": [B01], "found": [A01], "asked": [A01]},
                         {"true": [A01], "found": [A01], "asked": [A01]}],
            "pretrained": [{"true": [A01], "found": [A01], "asked": [A01]},
                           {"true": [B01], "found": [A01], "asked": [B01]}]}
    before = copy.deepcopy(rows)
    drawn = []

    def random_boxes(i, row):
        drawn.append((i, row["true"]))
        return torch.tensor([[A01, B01][i]])

    table = ev.localization_table(rows, random_boxes)
    assert rows == before and drawn == [(0, [A01]), (1, [B01])]
    assert list(table) == ["untrained", "random_boxes", "shuffled", "wrong_image", "pretrained", "primary"]
    assert table.pop("primary") == "IoU"
    wanted = {"untrained": 0, "random_boxes": 1, "shuffled": 0.5, "wrong_image": 1, "pretrained": 0.5}
    assert {name: row["recall50"] for name, row in table.items()} == wanted
    assert {name: row["IoU"] for name, row in table.items()} == pytest.approx(wanted, abs=1e-6)


class Scenes:
    """A train set of ten flat images of 20 x 10 px, for relative_sizes; file 3 cannot be read."""

    def __init__(self, indices):
        self.indices, self.source, self.asked = np.array(indices), self, []

    def __len__(self):
        return len(self.indices)

    def key(self, i):
        return str(i)

    def load(self, i):
        if i == 3:
            raise ev.data.UnreadableImage("3", "cut")
        return Image.new("RGB", (20, 10))

    def propose(self, image, i, epoch, rng):
        self.asked.append((i, epoch))
        return np.float32([[0, 0, 5, 5], [10, 0, 20, 10]])[:1 + i % 2]


def test_relative_sizes():
    train_set = Scenes([1, 2, 3, 4])
    sizes = ev.relative_sizes(train_set, seed=0)
    asked = [i for i, _ in train_set.asked]
    assert set(asked) <= {1, 2, 4} and len(asked) == 4 and {epoch for _, epoch in train_set.asked} == {0}
    assert sizes.tolist() == [size for i in asked for size in [[0.25, 0.5], [0.5, 1.0]][:1 + i % 2]]
    many = Scenes(range(4, 104))
    ev.relative_sizes(many, seed=0)
    assert len(many.asked) == len(set(many.asked)) == 50


class Knows(torch.nn.Module):
    """A detector that finds the boxes of a labelled set, whose images come in order, or always one far corner."""

    def __init__(self, labelled, right):
        super().__init__()
        self.boxes = iter([torch.from_numpy(r.boxes) / 64 for r in labelled.records] if right else ())

    def forward(self, images, mask):
        boxes = torch.full((len(images), 9, 4), 0.01)
        logits = torch.full((len(images), 9, 2), -5.0)
        for i, found in enumerate(itertools.islice(self.boxes, len(images))):
            boxes[i, :len(found)] = torch.cat([(found[:, :2] + found[:, 2:]) / 2, found[:, 2:] - found[:, :2]], 1)
            logits[i, :len(found), 1] = 3.0
        return {"pred_logits": logits, "pred_boxes": boxes}


def test_class_agnostic_table():
    labelled = open_detection("synthetic", None, "test", synthetic_images=4, synthetic_size=64)
    cfg = SimpleNamespace(probe_images=3, scales=(48, 64), max_size=96, num_workers=0, seed=1,
                          detector="deformable_detr", proposal_method="selective_search")
    untrained, pretrained = (Knows(labelled, right) for right in (False, True))
    table, best = ev.class_agnostic_table(cfg, untrained, pretrained, Scenes([1, 2]), labelled, torch.device("cpu"))
    assert list(table) == ["untrained", "random_boxes", "shuffled", "selective_search", "pretrained", "primary",
                           "ground_truth"]
    assert (table["primary"], table["ground_truth"]) == ("AR100", "annotations")
    assert table["untrained"]["AR100"] == 0 and table["pretrained"]["AR100"] == table["pretrained"]["AP50"] == 1
    assert all(0 <= table[name]["AR100"] < 1 for name in ("random_boxes", "shuffled", "selective_search"))
    assert table["selective_search"]["AR100"] > 0 and {d["image_id"] for d in best} == {1, 2, 3}
    assert all(d["probability"] == pytest.approx(1 / (1 + math.exp(-d["score"]))) for d in best)
    labelled.categories = [{"id": 1, "name": "proposal"}]
    for record in labelled.records:
        record.labels[:] = 0
    cfg.detector = "detr"  # softmax over its rows and "no object"
    table, best = ev.class_agnostic_table(cfg, untrained, pretrained, Scenes([1, 2]), labelled, torch.device("cpu"))
    assert table["ground_truth"] == "held-out proposals"
    assert "selective_search" not in table and "random_boxes" in table  # it would be scored on its own output
    # its other logit is -5
    assert all(d["probability"] == pytest.approx(1 / (1 + math.exp(-5 - d["score"]))) for d in best)
    cfg.proposal_method = "random"
    table, _ = ev.class_agnostic_table(cfg, untrained, pretrained, Scenes([1, 2]), labelled, torch.device("cpu"))
    assert "selective_search" in table


def test_what_a_probe_shows(tmp_path, monkeypatch):
    """Boxes that nobody drew are not called ground truth; scores are probabilities, ranks of proposals are none."""
    drawn = []
    monkeypatch.setattr(ev, "draw_rows", lambda path, titles, rows, **_: drawn.append((titles, rows[0])))
    labelled = open_detection("synthetic", None, "test", synthetic_images=1, synthetic_size=64)
    boxes = np.float32([[k, 0, k + 9, 9] for k in range(12)])
    proposals = SimpleNamespace(generator=lambda image, seed: boxes)
    found = {"ours": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": -1.0, "probability": 0.27}]}
    cfg = SimpleNamespace(out=tmp_path, seed=1)
    ev.draw_class_agnostic(cfg, labelled, proposals, found)
    labelled.categories = [{"id": 1, "name": "proposal"}]
    labelled.records[0].labels[:] = 0
    ev.draw_class_agnostic(cfg, labelled, proposals, found)
    (titles, row), (held_out_titles, held_out) = drawn
    assert titles == ("ground truth", "proposals (first 10)", "ours")
    assert held_out_titles == ("held-out proposals", "ours")
    assert [labels for _, _, labels in row] == [None, None, ["0.27"]] and held_out[1][2] == ["0.27"]
    assert row[1][1].tolist() == boxes[:10].tolist() and len(held_out[0][1]) == len(labelled.records[0].boxes)


def test_metrics_table():
    rows = {"untrained": {"AP": 0.0, "AR100": math.nan}, "ours": {"AP": 0.12345, "AR100": 0.5, "images": 12}}
    assert ev.metrics_table(rows, ["AP", "AR100", "images"], title="probe").splitlines() == [
        "probe",
        "              AP  AR100  images",
        "untrained  0.000      -       -",
        "ours       0.123  0.500      12"]


def test_probe_table():
    assert ev.probe_table({"steps": 7}, ["AP"], "title (") == (
        "finished after 7 steps (no probe: give --probe_images N, and --probe_data for other images)")
    metrics = {"steps": 7, "untrained": {"AP": 0.25}, "pretrained": {"AP": 0.5}, "primary": "AP"}
    assert ev.probe_table(metrics, ["AP"], "title (").splitlines() == [
        "title (primary: AP)", "               AP", "untrained   0.250", "pretrained  0.500"]


def test_write_json(tmp_path):
    path = tmp_path / "new" / "m.json"
    numbers = [np.float32(0.5), np.int64(2), torch.tensor([1.0, math.inf])]
    run.write_json(path, {"a": math.nan, "b": numbers, 3: {"c": (1, "x", None, True)}, "p": tmp_path})
    assert json.loads(path.read_text()) == {"a": None, "b": [0.5, 2, [1.0, None]],
                                            "3": {"c": [1, "x", None, True]}, "p": str(tmp_path)}
    assert [p.name for p in path.parent.iterdir()] == ["m.json"]


# ==== Pictures ====


def test_figure_pixels(tmp_path):
    images = [Image.new("RGB", (240, 480), "gray"), Image.new("L", (360, 240), 128)]
    columns = {"true": [(torch.tensor([[20.0, 40, 100, 200], [40, 240, 200, 440]]), None), (np.zeros((0, 4)), None)],
               "a long title for one column": [([[20, 40, 100, 200]] * 12, [f"{i}" for i in range(12)]),
                                               ([[-50, 100, 900, 200]], ["cell"])]}
    ev.draw_boxes_figure(tmp_path / "new" / "f.png", images, columns)
    sheet = np.asarray(Image.open(tmp_path / "new" / "f.png"))
    # columns as wide as their widest image
    assert sheet.shape == (ev.HEADER + 2 * (240 + ev.GAP), 3 * ev.GAP + 360 + 360, 3)
    assert (sheet[:ev.HEADER] < 100).any() and (sheet[:, :ev.GAP] == 255).all()
    left, top = ev.GAP + 120, ev.HEADER  # the portrait image is scaled by 1/2 to 120 x 240 and centred in its column
    colours = [tuple(int(c[i:i + 2], 16) for i in (1, 3, 5)) for c in ev.PALETTE]
    # first box, its left edge x = 20 / 2
    assert tuple(sheet[top + 60, left + 11]) == colours[0] and tuple(sheet[top + 60, left + 10]) == (0, 0, 0)
    assert tuple(sheet[top + 170, left + 21]) == colours[1] and tuple(sheet[top + 60, left + 30]) == (128, 128, 128)
    second = sheet[top + 240 + ev.GAP:, 2 * ev.GAP + 360:]  # the box leaves the image: its edges are clamped into it
    assert tuple(second[150, 1]) == colours[0] and (second[:, 360:] == 255).all()
    only_top = sheet[top:top + 240, 2 * ev.GAP + 360:]
    assert tuple(only_top[60, 131]) == colours[0]  # the best of equal boxes lies on top


def test_figure_labels_have_a_background(tmp_path):
    image = Image.new("RGB", (240, 240), "gray")
    for name, labels in (("with", ["cat"]), ("without", None)):
        ev.draw_boxes_figure(tmp_path / f"{name}.png", [image], {"t": [([[50, 50, 150, 150]], labels)]})
    w, wo = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("with", "without"))
    y, x = np.nonzero((w != wo).any(-1))
    assert y.min() >= ev.HEADER + 30 and y.max() <= ev.HEADER + 52 and x.min() == ev.GAP + 50
    assert tuple(w[ev.HEADER + 38, ev.GAP + 50]) == (0xE6, 0x19, 0x4B)


def test_figure_needs_entries_for_every_image(tmp_path):
    with pytest.raises(UserError, match="figure"):
        ev.draw_boxes_figure(tmp_path / "f.png", [Image.new("RGB", (9, 9))] * 2, {"t": [([], None)]})
    with pytest.raises(UserError, match="figure"):
        ev.draw_boxes_figure(tmp_path / "f.png", [], {})


def pixels(path):
    return np.asarray(Image.open(path))


def coloured(size, colour):
    return Image.new("RGB", size, colour)


def test_draw_rows(tmp_path):
    ev.draw_rows(tmp_path / "none.png", ("a", "b"), [])
    assert not (tmp_path / "none.png").exists()
    images = [coloured((240, 240), colour) for colour in ("gray", "navy", "olive", "teal")]
    boxes = [[[20 + 30 * k, 40, 120 + 30 * k, 200]] * 2 for k in range(4)]
    cells = [(image, box, ["x", "y"] if k == 2 else None) for k, (image, box) in enumerate(zip(images, boxes))]
    ev.draw_rows(tmp_path / "rows.png", ("a", "b"), [cells[:2], cells[2:]], max_boxes=1)
    columns = {"a": [(boxes[0], None), (boxes[2], ["x", "y"])],
               "b": [(boxes[1], None, images[1]), (boxes[3], None, images[3])]}
    ev.draw_boxes_figure(tmp_path / "columns.png", images[::2], columns, max_boxes=1)
    assert np.array_equal(pixels(tmp_path / "rows.png"), pixels(tmp_path / "columns.png"))


def test_draw_localization(tmp_path):
    source = SimpleNamespace(load=lambda i: [coloured((200, 100), "gray"), coloured((100, 200), "navy")][i])
    rows = [{"index": 1, "true": [A01, B01], "found": [B01, FAR01], "score": [0.987, 0.1]},
            {"index": 0, "true": [A01, B01], "found": [A01, B01], "score": [0.5, 1.0]}]
    ev.draw_localization(tmp_path / "f.png", source, rows, ("asked", "found"))

    def on(width, height, *boxes):
        return [[(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
                for cx, cy, w, h in boxes]

    ev.draw_boxes_figure(tmp_path / "same.png", [source.load(1), source.load(0)], {
        "asked": [(on(100, 200, A01, B01), None), (on(200, 100, A01, B01), None)],
        "found": [(on(100, 200, B01, FAR01), ["0.99", "0.10"]), (on(200, 100, A01, B01), ["0.50", "1.00"])]})
    assert np.array_equal(pixels(tmp_path / "f.png"), pixels(tmp_path / "same.png"))
    ev.draw_localization(tmp_path / "none.png", source, [], ("asked", "found"))
    assert not (tmp_path / "none.png").exists()


def test_draw_detections(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(ev, "draw_boxes_figure", lambda *args: drawn.append(args))
    labelled = open_detection("synthetic", None, "test", synthetic_images=3, synthetic_size=64)
    annotations = labelled.coco_ground_truth()["annotations"]
    detections = [{"image_id": 2, "category_id": 1 + k % 2, "bbox": [k, 0, 10, 20], "score": k / 20} for k in range(13)]
    columns = {"true": annotations, "found": detections}
    ev.draw_detections(tmp_path / "f.png", labelled, columns, rows=2)
    ev.draw_detections(tmp_path / "f.png", labelled, columns, {1: "disc"}, rows=9, best=3)
    (path, images, cells, limit), (_, all_images, named, more) = drawn
    assert path == tmp_path / "f.png" and list(cells) == list(named) == ["true", "found"]
    assert (len(images), len(all_images), limit, more) == (2, 3, 30, 30)
    for i in range(2):  # all annotations, no names
        boxes, labels, image = cells["true"][i]
        assert boxes.tolist() == labelled.records[i].boxes.tolist() and labels is None
        assert np.array_equal(image, labelled.load(i)[0])
    assert len(cells["found"][0][0]) == 0
    # the ten best, best first, xyxy
    assert cells["found"][1][0].tolist() == [[k, 0, k + 10, 20] for k in range(12, 2, -1)]
    assert named["found"][1][0][:, 0].tolist() == [12, 11, 10]
    assert named["found"][1][1] == ["disc 0.60", "0.55", "disc 0.50"]
    assert cells["found"][1][1][:2] == ["0.60", "0.55"]
    wanted = ["disc" if label == 0 else "" for label in labelled.records[0].labels]
    assert named["true"][0][1] == (wanted if any(wanted) else None)


def test_operating_points_by_hand():
    """Two classes, two images; scores .9 .8 .7 .6 of class a: hit, miss, hit, miss, of three objects."""
    truth = {"images": [{"id": i, "width": 100, "height": 100} for i in (1, 2)],
             "categories": [{"id": 7, "name": "a"}, {"id": 9, "name": "b"}, {"id": 11, "name": "none"}],
             "annotations": [{"id": k + 1, "image_id": i, "category_id": c, "bbox": [x, 0, 10, 10]}
                             for k, (i, c, x) in enumerate(((1, 7, 0), (1, 7, 20), (2, 7, 0), (2, 9, 50)))]}
    found = [{"image_id": i, "category_id": c, "bbox": [x, 0, 10, 10], "score": s} for i, c, x, s in
             ((1, 7, 0, 0.9), (1, 7, 70, 0.8), (2, 7, 0, 0.7), (2, 7, 80, 0.6), (2, 9, 51, 0.2))]
    points, curves = ev.operating_points(truth, found)
    expected = [(1 / 3, 1), (1 / 3, 1 / 2), (2 / 3, 2 / 3), (2 / 3, 2 / 4)]
    assert np.array(curves["a"]) == pytest.approx(np.array(expected))
    assert points["per_class"].keys() == {"a", "b"}
    assert points["per_class"]["a"] == pytest.approx({"threshold": 0.65, "precision": 2 / 3, "recall": 2 / 3,
                                                      "f1": 2 / 3})
    assert points["per_class"]["b"] == pytest.approx({"threshold": 0.2, "precision": 1, "recall": 1, "f1": 1})
    assert points["all"] == pytest.approx({"threshold": 0.2, "precision": 3 / 5, "recall": 3 / 4, "f1": 2 / 3})
    kept = ev.above_thresholds(found, points, truth["categories"])
    assert [d["score"] for d in kept] == [0.9, 0.8, 0.7, 0.2]
    nothing = ev.operating_points(truth, [])[0]
    assert nothing == {"all": {"threshold": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0}, "per_class": {}}


def test_a_difficult_object_is_no_mistake_at_a_threshold():
    truth = {"images": [{"id": 1, "width": 100, "height": 100}], "categories": [{"id": 1, "name": "a"}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]},
                             {"id": 2, "image_id": 1, "category_id": 1, "bbox": [50, 0, 10, 10], "difficult": 1}]}
    found = [{"image_id": 1, "category_id": 1, "bbox": [x, 0, 10, 10], "score": s} for x, s in ((50, 0.9), (0, 0.8))]
    points, _ = ev.operating_points(truth, found)
    assert points["all"] == {"threshold": 0.8, "precision": 1.0, "recall": 1.0, "f1": 1.0}


# ==== Proposals by themselves; DETReg's Tables 5 and 6 ====


def test_proposals_of_a_labelled_set(tmp_path, monkeypatch, capsys):
    """The boxes of the generator, in their order, with the scores that are asked for."""
    monkeypatch.setattr(ev, "open_detection", lambda data, root, split, **_: open_detection(
        data, root, split, synthetic_images=4, synthetic_size=96))
    command = ["--data", "synthetic", "--grid", "48", "--colours", "bgr", "--limit", "3"]
    metrics = {scores: ev.main([*command, "--scores", scores, "--out", str(tmp_path / f"{scores}.json")])
               for scores in ("rank", "ones")}
    said = capsys.readouterr().out
    assert said.count("colours bgr") == 2 and "class-agnostic, synthetic" in said and "scores: ones" in said
    labelled = open_detection("synthetic", None, "test", synthetic_images=4, synthetic_size=96)
    ground_truth = labelled.coco_ground_truth()
    ground_truth["images"] = ground_truth["images"][:3]
    boxes = []
    for i in range(3):
        image, target = labelled.load(i)
        generator = Generator(grid=48, colours="bgr")
        boxes.append((generator(image, image_seed(42, labelled.key(i)))[:100], target["image_id"]))
    for scores, by_hand in metrics.items():
        expected = [d for b, key in boxes
                    for d in ev.boxes_as_detections(b, key, None if scores == "rank" else [1] * len(b))]
        assert by_hand == ev.detection_metrics(ground_truth, expected, class_agnostic=True)
        assert json.loads((tmp_path / f"{scores}.json").read_text())["AP"] == by_hand["AP"]
    assert metrics["rank"]["AR100"] == metrics["ones"]["AR100"] > 0 and metrics["rank"]["AP"] != metrics["ones"]["AP"]


def test_line_of_a_probe():
    """`looking`: what is found beyond both controls; wrong_image: what is found, against what is asked."""
    own, theirs = [[0.2, 0.2, 0.2, 0.2]], [[0.8, 0.8, 0.2, 0.2]]

    def find(model, other=False, text=""):
        return [{"true": own, "asked": theirs if other else own, "found": theirs if other else own}]

    line = ev.localization_line(find, None)
    one = pytest.approx(1)
    assert line == {"looking": 0, "probe_IoU": one, "probe_IoU_wrong_image": one, "probe_IoU_shuffled": 0,
                    "probe_recall50": 1, "probe_recall50_wrong_image": 1, "probe_recall50_shuffled": 0}
    line = ev.retrieval_line(find, lambda rows: {"a": rows[0]["found"][0][0], "b": 3.0}, ("a",), None)
    assert line == {"looking": pytest.approx(-0.6), "probe_a": 0.2, "probe_a_shuffled": 0.8}


def test_kept_samples_are_made_once():
    made = []

    class Set(list):
        def __getitem__(self, key):
            made.append(key)
            return {"x": key[1], "skipped": []}

    def collate(samples):
        return {"x": [s["x"] for s in samples], "skipped": []}

    kept = ev.KeptSamples(Set(range(5)))
    one, two = (list(ev.probe_batches(kept, 2, size=2, collate=collate)) for _ in range(2))
    assert one == two and [b["x"] for b in one] == [[0, 1], [2, 3, 4]] and made == [(0, i) for i in range(5)]


def test_class_and_box_error_by_hand():
    """Queries 0, 1, 3 lie on the objects; the last object is ignored; row 2 of the head stands for label 0."""
    matcher = HungarianMatcher(focal=False)
    objects = torch.tensor([[0.0, 0, 40, 20], [50, 10, 90, 40], [10, 50, 30, 90], [60, 60, 99, 99]])
    target = {"labels": torch.tensor([0, 1, 0, 1]), "boxes_xyxy": objects, "orig_size": torch.tensor([100, 200]),
              "ignore": torch.tensor([False, False, False, True])}
    boxes = objects[[2, 0, 3, 1]] + torch.tensor([[0.0, 0, 0, 0], [2, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 5]])
    logits = torch.full((4, 4), -3.0)
    logits[[0, 1, 3], [2, 0, 1]] = 3.0  # right, of the row without a label, right
    errors = ev.matched_errors(matcher, logits, boxes, target, [-1, 1, 0])
    # 2 px of 200 sideways; 5 px of 100 higher: the centre by 2.5
    assert errors[:2] == [3, 1] and errors[2] == pytest.approx(2 / 200 + (5 + 2.5) / 100)
    nothing = ev.matched_errors(matcher, logits, boxes, target, [-1, -1, -1])
    assert ev.mean_errors([errors, nothing, errors]) == {"class_error": pytest.approx(100 / 3),
                                                        "box_error": pytest.approx(errors[2] / 3)}
    assert ev.mean_errors([nothing]) == ev.mean_errors([]) == {}
