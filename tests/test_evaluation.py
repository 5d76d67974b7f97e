"""evaluation.py against values worked out by hand."""
import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluation as ev  # noqa: E402
from common import UserError  # noqa: E402

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
    aware, agnostic = ev.detection_metrics(gt, dt), ev.detection_metrics(gt, dt, class_agnostic=True, per_class=True)
    assert aware["AP"] == pytest.approx(0.5) and aware["AR100"] == 0.5  # class 1 perfect, class 2 nothing
    assert (agnostic["AP"] == pytest.approx(1) and agnostic["AR1"] == 0.5
            and agnostic["per_class"] == {"object": pytest.approx(1)})


@pytest.mark.parametrize("flag", ["difficult", "ignore"])
def test_difficult_object_is_ignored(flag):
    gt = truth((0, 1, A, {flag: 1}), (0, 1, B))
    dt = found((0, 1, A), (0, 1, A), (0, 1, B))  # both boxes on the difficult object are no mistakes
    assert ev.detection_metrics(gt, dt)["AP"] == pytest.approx(1)
    assert ev.detection_metrics(gt, dt[2:])["AR100"] == 1  # nor is not finding it
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


def test_prints_nothing(capsys):
    ev.detection_metrics(truth((0, 1, A)), found((0, 1, A)))
    assert capsys.readouterr().out == ""


# ==== VOC07 ====

def test_voc_eleven_points_by_hand():
    m = ev.voc07_metrics(truth((0, 1, A), (0, 1, B)), found((0, 1, A), (0, 1, FAR), (0, 1, B)))
    assert list(m) == ["VOC07_AP", "VOC07_AP50", "VOC07_AP75"]
    assert m["VOC07_AP"] == m["VOC07_AP50"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_voc_mean_over_classes_and_thresholds():
    # class 1: IoU .7, found at .50 .. .65 (.7 > .7 is false); class 2 perfect;
    # class 3 has only a difficult object and does not count
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


# ==== Detections ====

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


# ==== Processes, tables, files ====

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
    (mine0, all0, uneven0, one0), (mine1, all1, uneven1, one1) = (json.loads((tmp_path / f"{r}.json").read_text())
                                                                  for r in (0, 1))
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


def test_metrics_table():
    rows = {"untrained": {"AP": 0.0, "AR100": math.nan}, "ours": {"AP": 0.12345, "AR100": 0.5, "images": 12}}
    assert ev.metrics_table(rows, ["AP", "AR100", "images"], title="probe").splitlines() == [
        "probe",
        "              AP  AR100  images",
        "untrained  0.000      -       -",
        "ours       0.123  0.500      12"]


def test_write_json(tmp_path):
    path = tmp_path / "new" / "m.json"
    numbers = [np.float32(0.5), np.int64(2), torch.tensor([1.0, math.inf])]
    ev.write_json(path, {"a": math.nan, "b": numbers, 3: {"c": (1, "x", None, True)}, "p": tmp_path})
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
