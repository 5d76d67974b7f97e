"""LVIS v1: its json, federated AP worked out by hand, repeat factors, and a run on four pictures in the real format."""
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from conftest import SMALL, flags
from pycocotools import mask as coco_mask
from test_data import picture
from test_survive import Narrow

import annotations
import data
import evaluation
import finetune
import lvis_v1
import predict
from common import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

# ==== Federated AP =================================================================================================

A, B, FAR = [10, 10, 50, 50], [100, 100, 50, 50], [300, 300, 50, 50]


def truth(*objects, neg=(), partly=()):
    """objects: (image, category, box), of two images and three categories, one of each frequency. neg, partly: of
    image 0."""
    return {"images": [{"id": 0, "width": 500, "height": 400, "neg_category_ids": list(neg),
                        "not_exhaustive_category_ids": list(partly)}, {"id": 1, "width": 500, "height": 400}],
            "categories": [{"id": c, "name": f"c{c}", "frequency": f} for c, f in ((1, "r"), (2, "c"), (3, "f"))],
            "annotations": [{"id": i, "image_id": o[0], "category_id": o[1], "bbox": o[2],
                             "area": o[2][2] * o[2][3]} for i, o in enumerate(objects)]}


def found(*boxes):
    """boxes: (image, category, box), best first."""
    return [{"image_id": b[0], "category_id": b[1], "bbox": b[2], "score": 1 - 0.001 * i} for i, b in enumerate(boxes)]


def ap(ground_truth, *boxes, name="AP", **options):
    return lvis_v1.federated_metrics(ground_truth, found(*boxes), **options)[name]


def test_what_counts():
    wrong_first = (0, 1, FAR), (0, 1, A)
    assert ap(truth((0, 1, A)), *wrong_first) == pytest.approx(0.5)
    assert ap(truth((0, 1, A), partly=[1]), *wrong_first) == 1  # whoever matches none is no mistake,
    assert ap(truth((0, 1, A), (1, 1, A), partly=[1]), *wrong_first, (1, 1, A)) == 1  # and the matched one is right
    # image 0 says nothing of category 2, or that it has none, or that not all are annotated
    elsewhere = (0, 2, FAR), (1, 2, B)
    for lists, expected in (({}, 1), ({"neg": [2]}, 0.5), ({"neg": [2], "partly": [2]}, 1)):
        ground_truth = truth((0, 1, A), (1, 2, B), **lists)
        assert ap(ground_truth, (0, 1, A), *elsewhere) == pytest.approx((1 + expected) / 2)
        assert len(lvis_v1.listed_detections(ground_truth, found(*elsewhere))) == 2 - (not lists)
        points, curves = lvis_v1.operating_points(ground_truth, found((0, 1, A), *elsewhere))
        assert points["per_class"]["c2"]["precision"] == expected and points["all"]["threshold"] == pytest.approx(0.998)
        assert curves == {"all": [(0.5, 1)] + [(0.5, 0.5)] * (expected < 1) + [(1, 1 if expected == 1 else 2 / 3)]}


def test_three_hundred_of_an_image():
    many = [(0, 3, FAR)] * 300
    assert ap(truth((0, 1, A)), *many, (0, 1, A)) == 0  # they count although category 3 does not
    assert ap(truth((0, 1, A)), *many[1:], (0, 1, A)) == ap(truth((0, 1, A)), *many, (0, 1, A), max_dets=301) == 1
    assert ap(truth((1, 1, A)), *many, (1, 1, A)) == 1  # of each image


def test_ranges_and_frequencies():
    edge = [10, 10, 32, 32]
    metrics = lvis_v1.federated_metrics(truth((0, 1, edge), (1, 2, A)), found((0, 1, edge), (1, 2, FAR), (1, 2, A)),
                                        per_class=True)
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR300", "ARs", "ARm", "ARl", "per_class"]
    assert list(metrics) == names
    assert metrics["APs"] == metrics["ARs"] == metrics["APr"] == 1  # 32 x 32 is small, and medium too
    assert metrics["APm"] == metrics["AP"] == pytest.approx(0.75) and metrics["APc"] == 0.5
    assert metrics["AR300"] == metrics["ARm"] == 1
    assert all(math.isnan(metrics[k]) for k in ("APl", "ARl", "APf"))
    assert metrics["per_class"] == pytest.approx({"c1": 1, "c2": 0.5, "c3": math.nan}, nan_ok=True)
    # a mistake outside the range is none there
    assert ap(truth((0, 1, A)), (0, 1, [300, 300, 20, 20]), (0, 1, A), name="APm") == 1
    assert ap(truth((0, 1, A)), (0, 1, [300, 300, 32, 32]), (0, 1, A), name="APm") == pytest.approx(0.5)
    # IoU .7: five of ten thresholds
    assert ap(truth((0, 1, A)), (0, 1, [10, 10, 50, 35])) == pytest.approx(0.5)
    for some in ([], found((0, 3, A))):
        assert lvis_v1.federated_metrics(truth((0, 1, A)), some)["AR300"] == 0
    assert math.isnan(lvis_v1.federated_metrics(truth(), [])["AP"])
    with pytest.raises(UserError, match="not finite"):
        ap(truth((0, 1, A)), (0, 1, [0, 0, math.nan, 1]))


def test_masks():
    left, whole = np.zeros((2, 400, 500), np.uint8)
    whole[10:60, 10:60] = left[10:60, 10:35] = 1
    ground_truth, box = truth((0, 1, A)), found((0, 1, A))
    for drawn, expected in ((whole, 1), (left, 0.1)):  # the half has IoU .5, of the box 1
        rles = [coco_mask.encode(np.asfortranarray(m)) for m in (whole, drawn)]
        for item, rle in zip((ground_truth["annotations"][0], box[0]), rles):
            item["segmentation"] = rle
        assert lvis_v1.federated_metrics(ground_truth, box, iou_type="segm")["AP"] == pytest.approx(expected)
        assert lvis_v1.federated_metrics(ground_truth, box)["AP"] == 1


# ==== Repeat factors ===============================================================================================

def test_repeat_factors_by_hand():
    categories = [[0, 0, 1], [0], [0, 2, 1], []]  # shares 3/4, 2/4, 1/4
    assert lvis_v1.repeat_factors(categories, 0.25).tolist() == [1, 1, 1, 1]
    factors = lvis_v1.repeat_factors(categories, 1.0)
    assert factors == pytest.approx([2 ** 0.5, (4 / 3) ** 0.5, 2, 1])


def test_sampler_repeats():
    repeats, steps = np.array([1, 2.5, 1, 3.25, 1, 1]), 600
    sampler = data.StepSampler(6, 4, steps, seed=3, repeats=repeats)
    assert data.images_per_epoch(6, repeats) == 10 and sampler.steps_per_epoch == 2 and len(sampler) == steps
    batches = list(sampler)
    seen = [key for batch in batches for key in batch]
    assert len(set(seen)) == len(seen) == 4 * steps  # no two copies of an image are augmented alike
    share = Counter(index for _, index in seen)
    for index, factor in enumerate(repeats):
        assert share[index] / len(seen) == pytest.approx(factor / repeats.sum(), rel=0.1)
    copies = [Counter(sampler.epoch_order(epoch)[1].tolist()) for epoch in range(20)]
    assert {c[0] for c in copies} == {1} and {c[1] for c in copies} == {2, 3} and {c[3] for c in copies} == {3, 4}
    for start in (0, 7, 300):  # a continued run, on two processes and in two micro-batches
        parts = [list(data.StepSampler(6, 4, steps, seed=3, repeats=repeats, start_step=start, world=2, rank=r,
                                       accumulate=2)) for r in (0, 1)]
        pieces = [piece for step in range(steps - start) for a in (0, 1) for r in (0, 1)
                  for piece in parts[r][2 * step + a]]
        assert pieces == seen[4 * start:]


# ==== The json =====================================================================================================

NAMES = ["train2017/1.jpg", "train2017/2.jpg", "val2017/3.jpg", "train2017/4.jpg"]


def content(ids):
    """An LVIS json of these images, 64 x 48 px, with two objects in each: category 1, and 2 or 3."""
    boxes = [[4.5, 6.0, 20.0, 30.0], [30.0, 8.0, 30.5, 36.0]]
    return {"info": {}, "licenses": [], "images": [
        {"id": i, "width": 64, "height": 48, "license": 1, "date_captured": "", "flickr_url": "",
         "coco_url": f"http://images.cocodataset.org/{NAMES[i - 1]}", "neg_category_ids": [4],
         "not_exhaustive_category_ids": [1] * (i == 3)} for i in ids],
        "annotations": [{"id": 10 * i + k, "image_id": i, "category_id": 1 if k == 0 else 2 + i % 2, "area": w * h,
                         "bbox": [x, y, w, h], "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
                        for i in ids for k, (x, y, w, h) in enumerate(boxes)],
        "categories": [{"id": c, "name": f"c{c}", "synonyms": [f"c{c}"], "synset": f"c{c}.n.01", "def": "",
                        "frequency": f, "image_count": 1, "instance_count": 1} for c, f in enumerate("rccf", 1)]}


@pytest.fixture(scope="module")
def lvis(tmp_path_factory):
    """data/lvis beside data/coco."""
    root = tmp_path_factory.mktemp("data")
    for name in NAMES:
        picture(root / "coco" / name, (64, 48))
    (root / "lvis").mkdir()
    for part, ids in (("train", (1, 2)), ("val", (3, 4))):
        (root / "lvis" / f"lvis_v1_{part}.json").write_text(json.dumps(content(ids)))
    return root


def test_the_named_set(lvis, monkeypatch):
    splits = annotations.open_splits("lvis", str(lvis / "lvis"), masks=True)
    assert splits.val is splits.test and splits.train.image_ids == [1, 2] and splits.test.image_ids == [3, 4]
    assert [r.image for r in splits.test.records] == [lvis / "coco" / n for n in NAMES[2:]]  # images of both folders
    ground_truth = splits.test.coco_ground_truth()
    assert [(i["neg_category_ids"], i["not_exhaustive_category_ids"]) for i in ground_truth["images"]] == [
        ([4], [1]), ([4], [])]
    assert [c["frequency"] for c in ground_truth["categories"]] == list("rccf")
    assert splits.train.categories == [{"id": c, "name": f"c{c}"} for c in (1, 2, 3, 4)]
    assert splits.test.masks(0).sum((1, 2)).tolist() == pytest.approx([600, 1098], rel=0.05)
    assert splits.test.subset(50, 0).federated is splits.test.federated
    monkeypatch.chdir(lvis.parent)
    (lvis.parent / "data").symlink_to(lvis)  # the default place
    for name in ("lvis", "data/lvis", "data/lvis/lvis_v1_val.json"):
        assert annotations.open_detection(name, None, "val").image_ids == [3, 4]


def test_what_is_absent(lvis, tmp_path):
    with pytest.raises(UserError, match=r"--data lvis: not found in .*lvis_v1_train\.json \(from lvisdataset\.org\)"):
        annotations.open_detection("lvis", str(tmp_path), "train")
    (tmp_path / "lvis_v1_val.json").write_text(json.dumps(content((3, 4))))
    with pytest.raises(UserError, match=r"2 of 2 images are not there.*train2017 and val2017 of COCO from cocodataset"):
        annotations.open_detection("lvis", str(tmp_path), "val")


def test_other_jsons_without_file_names(lvis, tmp_path):
    """Of any name, by whatever reads a json; images without their folder; without LVIS's fields it is no LVIS."""
    some = content((1, 3))
    (tmp_path / "own.json").write_text(json.dumps(some | {"categories": some["categories"][:3]}))
    labelled = annotations.open_detection(str(tmp_path / "own.json"), str(lvis / "coco"), "train")
    assert "1 ids of neg_category_ids or not_exhaustive_category_ids are none of its" in " ".join(labelled.notes)
    assert labelled.federated["images"][3] == {"neg_category_ids": [], "not_exhaustive_category_ids": [1]}
    some["images"] = [{k: v for k, v in i.items() if "category_ids" not in k} | {"file_name": None}
                      for i in some["images"]]
    (tmp_path / "own.json").write_text(json.dumps(some))
    for folder in (lvis / "coco", tmp_path):
        labelled = annotations.open_detection(str(tmp_path / "own.json"), str(folder), "train")
        assert labelled.federated is None and "neg_category_ids" not in labelled.coco_ground_truth()["images"][0]
        files = [str(labelled.records[i].image) for i in (0, 1)]
        assert [file for file, *_ in predict.read_json(tmp_path / "own.json", str(folder))[0]] == files
        assert all(f.startswith(str(folder)) for f in files)
        for name in (NAMES[0], NAMES[2]):  # next time: without their folders
            picture(tmp_path / name.split("/")[1], (64, 48))
    with pytest.raises(UserError, match="file_name or coco_url"):
        (tmp_path / "own.json").write_text(json.dumps(some | {"images": [{"id": 1}]}))
        annotations.open_detection(str(tmp_path / "own.json"), None, "train")


# ==== A run ========================================================================================================

TINY = {"detector": "mask_rcnn_fpn", "arch": "resnet18", "backbone_weights": "random", "scales": 64, "max_size": 96,
        "eval_size": 48, "fpn_channels": 16, "head_dim": 16, "anchor_size": 8, "proposals_per_image": 30,
        "rois_per_image": 8, "precise_bn": 1, "batch_size": 2, "num_workers": 0, "device": "cpu", "seed": 3}


def test_recipes():
    parse = {"released": {}, "soco": {"protocol": "soco"}}
    resolved = {name: finetune.parse(flags({"data": "lvis", "detector": "mask_rcnn_fpn", "schedule": "2x", **more}))[0]
                for name, more in parse.items()}
    assert [(c.steps, c.weight_decay, c.box_head) for c in resolved.values()] == [
        (360000, 1e-4, "2fc"), (180000, 2.5e-5, "4conv1fc")]
    for c in resolved.values():
        assert (c.lr, c.batch_size, c.lr_drops, c.scales[0], c.scales[-1]) == (0.02, 16, (2 / 3, 8 / 9), 640, 800)


def test_a_run(lvis, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights, **kwargs: Narrow(**kwargs))
    metrics = finetune.main(flags({**TINY, "data": "lvis", "data_root": lvis / "lvis", "out": tmp_path / "a",
                                   "max_steps": 2, "repeat_threshold": 1.0}))
    said = capsys.readouterr().out
    # categories 2 and 3 are in half of the images: each comes sqrt(2) times
    assert "3 labelled images, some of the 2 repeated, of 4 categories, 1 steps per epoch" in said
    names = {"AP", "AP50", "AP75", "APs", "APr", "APc", "APf", "AR300", "AP_mask", "APr_mask", "APc_mask", "APf_mask"}
    assert names <= metrics.keys() and "AR100" not in metrics and math.isnan(metrics["APf"]) and metrics["APr"] >= 0
    detections = json.loads((tmp_path / "a" / "detections.json").read_text())
    assert max(Counter(d["image_id"] for d in detections).values()) > 100  # an untrained detector: 1/5 for each class
    saved = torch.load(tmp_path / "a" / "last.pt", weights_only=True)["config"]
    assert (saved["detections_per_image"], saved["score_threshold"], saved["repeat_threshold"]) == (300, 1e-4, 1.0)
    again = finetune.main(flags({"data": lvis / "lvis" / "lvis_v1_val.json", "init_from": tmp_path / "a",
                                 "eval_only": 1, "out": tmp_path / "b", "num_workers": 0}))
    assert {k: again[k] for k in names - {"APf", "APf_mask"}} == {k: metrics[k] for k in names - {"APf", "APf_mask"}}
    model = predict.load(tmp_path / "a", device="cpu").model
    assert (model.roi_heads.detections_per_img, model.roi_heads.score_thresh) == (300, 1e-4)


def test_the_detr_family(lvis, monkeypatch):
    """The 300 best of queries x categories; labels of a plain set leave it at 100."""
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights, **kwargs: Narrow(**kwargs))
    cfg = finetune.Config(**{**SMALL, "num_queries": 90}, data="lvis", data_root=str(lvis / "lvis"), eval_size=48,
                          max_size=64, num_workers=0, backbone_weights="random", detections_per_image=300)
    labelled = finetune.open_sets(cfg).test
    model, label_map = finetune.build_model(cfg, None, labelled.categories)
    metrics, detections, thresholds, _ = finetune.evaluate(cfg, model, label_map, labelled, torch.device("cpu"))
    assert Counter(d["image_id"] for d in detections) == {3: 300, 4: 300} and {"APr", "AR300"} <= metrics.keys()
    plain = evaluation.detection_metrics(labelled.coco_ground_truth(), detections)
    assert set(plain) - set(metrics) == {"AR1", "AR10", "AR100"} and set(thresholds) == {"all", "per_class"}
