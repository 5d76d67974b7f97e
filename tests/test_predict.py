"""predict.py: equality with an evaluation, tiles and how they are merged, what goes in and what comes out."""
import csv
import itertools
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import flags, small_config
from PIL import Image
from pycocotools import mask as coco_mask
from test_rcnn import coco_json

import common
import convert
import detectors
import detreg
import evaluation
import finetune
import predict
import rcnn
import run
from common import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
RED, GREEN, GREY = (255, 0, 0), (0, 255, 0), (128, 128, 128)
COLOURS = {"red": RED, "green": GREEN}


class FindColours(torch.nn.Module):
    """A "deformable_detr" that knows: every connected red or green spot is an object of that class, and the score says
    how large it is in the view."""

    def forward(self, images, mask):
        assert not mask.any()
        found = []
        for image in images:
            rgb = np.asarray(evaluation.to_image(image)).astype(int)
            h, w = rgb.shape[:2]
            rows = []
            for label, colour in enumerate(COLOURS.values()):
                near = (np.abs(rgb - colour).max(2) < 100).astype(np.uint8)
                for x, y, bw, bh, _ in cv2.connectedComponentsWithStats(near)[2][1:]:
                    rows.append((label, math.log(bw * bh / 100), (x + bw / 2) / w, (y + bh / 2) / h, bw / w, bh / h))
            found.append(rows + [(0, -50, 0.5, 0.5, 0.1, 0.1)] * (20 - len(rows)))
        rows = torch.tensor(found, dtype=torch.float32)
        logits = torch.full((*rows.shape[:2], 2), -50.0).scatter(2, rows[..., :1].long(), rows[..., 1:2])
        return {"pred_logits": logits, "pred_boxes": rows[..., 2:]}


def finder(tile=0, overlap=0.2, thresholds=(0.01, 0.01), batch_size=2, size=100):
    cfg = finetune.Config(eval_size=size, max_size=2 * size)
    categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "green"}]
    return predict.Predictor(FindColours(), cfg, [0, 1], False, categories, ["red", "green"],
                             torch.tensor(thresholds, dtype=torch.float64), CPU, tile, overlap, batch_size)


def picture(size, *spots):
    """Grey, with rectangles (colour, x1, y1, x2, y2)."""
    image = Image.new("RGB", size, GREY)
    for name, x1, y1, x2, y2 in spots:
        image.paste(COLOURS[name], (x1, y1, x2, y2))
    return image


def boxes_of(found):
    return sorted((name, *box) for name, box in zip(found["names"], found["boxes_xyxy"].tolist()))


def check_boxes(found, *expected, within=1):
    """Of found = detect(...): names and boxes are these (name, x1, y1, x2, y2), to `within` px."""
    boxes = boxes_of(found)
    assert [name for name, *_ in boxes] == [name for name, *_ in sorted(expected)]
    for (_, *box), (_, *wanted) in zip(boxes, sorted(expected)):
        assert np.abs(np.array(box) - wanted).max() <= within, (box, wanted)


@pytest.fixture
def fake_load(monkeypatch):
    """main() finds colours; returns the dict of load's arguments."""
    seen = {}

    def load(checkpoint, device, threshold, tile, overlap, **sizes):
        seen.update(threshold=threshold, tile=tile, overlap=overlap, **sizes)
        return finder(tile or 0, overlap, (threshold or 0.01,) * 2, sizes["batch_size"])

    monkeypatch.setattr(predict, "load", load)
    return seen


def files_of(out):
    lines = list(csv.DictReader((out / "predictions.csv").open(newline="", encoding="utf-8")))
    return json.loads((out / "predictions.json").read_text()), lines


# ==== As an evaluation finds them ==================================================================================


def save(path, detector, categories, **content):
    """A checkpoint of finetune.py, untrained."""
    torch.manual_seed(3)
    if rcnn.is_rcnn(detector):
        cfg = finetune.Config(detector=detector, arch="resnet18", backbone_norm="bn", fpn_channels=32, head_dim=16,
                              anchor_size=8, eval_size=48, max_size=64)
        model = rcnn.build_rcnn(cfg, len(categories))
    else:
        cfg = small_config(finetune.Config, detector=detector, num_feature_levels=3, eval_size=48, max_size=64)
        model = detectors.build_detector(cfg, len(categories) + (detector == "detr"), focal=detector != "detr")
    run.save_checkpoint(path, model, None, 5, cfg, script="finetune", categories=categories, **content)
    return path


@pytest.mark.parametrize("detector", ("deformable_detr", "detr", "faster_rcnn_fpn", "mask_rcnn_fpn"))
def test_same_detections_as_an_evaluation(detector, tmp_path):
    labelled = coco_json(tmp_path / "set", n=3)
    content = json.loads((labelled / "test.json").read_text())
    path = save(tmp_path / "run" / "last.pt", detector, content["categories"])
    finetune.main(flags({"data": labelled, "init_from": path, "eval_only": "true", "num_workers": 0,
                         "out": tmp_path / "eval"}))
    expected = json.loads((tmp_path / "eval" / "detections.json").read_text())
    del content["annotations"]
    (labelled / "new.json").write_text(json.dumps(content))
    counts = predict.main(flags({"out": tmp_path / "found", "threshold": 0, "batch_size": 2})
                          + [str(path), str(labelled / "new.json")])
    found, lines = files_of(tmp_path / "found")
    assert counts["images"] == 3 and counts["boxes"] == len(found) == len(lines) == len(expected) > 20
    expected.sort(key=lambda d: (d["image_id"], -d["score"]))
    for ours, theirs in zip(found, expected):
        assert (ours["image_id"], ours["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert ours["file_name"] == f"{ours['image_id'] - 1}.png" and ours["category_name"] in ("box", "triangle")
        x, y, w, h = theirs["bbox"]  # the DETR family's may stick out
        clipped = [max(x, 0), max(y, 0), min(x + w, 64) - max(x, 0), min(y + h, 48) - max(y, 0)]
        assert ours["bbox"] == pytest.approx(clipped, abs=1e-3)
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ("segmentation" in theirs) == ("segmentation" in ours) == (detector == "mask_rcnn_fpn")
        if "segmentation" in theirs:
            assert abs(coco_mask.area(ours["segmentation"]) - coco_mask.area(theirs["segmentation"])) <= 2
    if detector == "mask_rcnn_fpn":
        result = predict.load(path, "cpu", threshold=0)(Image.open(labelled / "0.png"))
        areas = [coco_mask.area(d["segmentation"]) for d in found if d["image_id"] == 1]
        assert result["masks"].dtype == torch.bool and result["masks"].shape[1:] == (48, 64)
        assert result["masks"].sum((1, 2)).tolist() == areas and max(areas) > 50
        assert (result["scores"].diff() <= 0).all() and result["boxes_xyxy"].dtype == torch.float32


def test_a_picture_is_found_in_whatever_company(tmp_path):
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    detect = predict.load(save(tmp_path / "last.pt", "deformable_detr", categories), "cpu", threshold=0)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (h, w, 3), np.uint8) for h, w in ((48, 64), (64, 48), (48, 64), (48, 64), (40, 90))]
    for image, found in zip(images, detect(images)):
        alone = detect(image)
        torch.testing.assert_close(found["boxes_xyxy"], alone["boxes_xyxy"], atol=1e-3, rtol=0)
        assert found["names"] == alone["names"] == [detect.names[i] for i in found["labels"]]
        h, w = image.shape[:2]
        assert (found["boxes_xyxy"] >= 0).all() and (found["boxes_xyxy"] <= torch.tensor([w, h, w, h])).all()
    assert detect([]) == []
    with pytest.raises(UserError, match="--tile 5: must be at least 32"):
        predict.load(tmp_path / "last.pt", tile=5)


# ==== Tiles ========================================================================================================


def test_tile_crops():
    whole = (0, 0, 250, 80)
    assert predict.tile_crops((250, 80), 0, 0.2) == predict.tile_crops((250, 80), 250, 0.2) == [whole]
    # 250 with steps of at most 80: 0, 75, 150
    assert predict.tile_crops((250, 80), 100, 0.2) == [whole, (0, 0, 100, 80), (75, 0, 175, 80), (150, 0, 250, 80)]
    for (w, h), tile, overlap in itertools.product(((1000, 777), (101, 100), (99, 4000)), (100, 333), (0, 0.2, 0.9)):
        first, *tiles = predict.tile_crops((w, h), tile, overlap)
        covered = np.zeros((h, w), bool)
        for x1, y1, x2, y2 in tiles:
            assert (x2 - x1, y2 - y1) == (min(tile, w), min(tile, h))
            covered[y1:y2, x1:x2] = True
        assert first == (0, 0, w, h) and (not tiles or covered.all())
        starts = sorted({x1 for x1, *_ in tiles})
        assert all(b - a <= tile * (1 - overlap) + 1 for a, b in zip(starts, starts[1:]))


def test_a_picture_that_fits_into_a_tile_is_one_pass():
    spots = ("red", 10, 10, 30, 40), ("green", 60, 20, 119, 80)
    one, tiled = finder()(picture((120, 90), *spots)), finder(tile=120)(picture((120, 90), *spots))
    check_boxes(one, *spots)
    assert all(torch.equal(one[k], tiled[k]) for k in ("boxes_xyxy", "scores", "labels"))


def test_tiles_find_in_a_large_picture_what_one_pass_finds_in_the_small_one():
    spots = (("red", 10, 10, 40, 60), ("red", 60, 10, 86, 60), ("green", 90, 95, 125, 115), ("green", 150, 30, 152, 33),
             ("red", 148, 150, 190, 190))
    small, large = picture((200, 200), *spots), Image.new("RGB", (900, 700), GREY)
    large.paste(small, (413, 307))
    large.paste(RED, (20, 20, 380, 680))  # larger than any tile: the pass over the whole has it
    check_boxes(finder(size=200)(small), *spots)
    moved = [(name, x1 + 413, y1 + 307, x2 + 413, y2 + 307) for name, x1, y1, x2, y2 in spots]
    for overlap, batch_size in ((0.5, 4), (0.3, 7)):
        found = finder(tile=200, size=200, overlap=overlap, batch_size=batch_size)(large)
        check_boxes(found, *moved, ("red", 20, 20, 380, 680), within=4)  # the whole is 3.5 times coarser
    assert len(finder(size=200)(large)["names"]) < 6  # the speck is not seen there


def test_what_is_merged():
    boxes = torch.tensor([
        [0, 0, 10, 10], [0, 0, 10, 9],  # 0, 1: other passes, IoU .9: the better one stays
        [50, 0, 60, 10], [50, 0, 60, 9],  # 2, 3: the same pass: both stay
        [0, 0, 10, 9.5],  # 4: another class
        [20, 20, 30, 40], [20, 20, 60, 40],  # 5, 6: cut, of the whole one though it scores more
        [70, 70, 80, 90], [77, 70, 99, 90],  # 7, 8: cut, 30 % of it within the other
        [0, 100, 20, 110], [2, 100, 23, 110],  # 9, 10: both cut, 90 % of either within the other: the larger one stays
        [0, 50, 10, 60], [0, 54, 10, 64],  # 11, 12: IoU 6 / 14
    ], dtype=torch.float32)
    scores = torch.tensor([.8, .9, .5, .6, .1, .9, .2, .9, .1, .9, .3, .5, .4])
    labels = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    passes = torch.tensor([1, 2, 3, 3, 2, 1, 2, 1, 2, 1, 2, 1, 2])
    cut = torch.zeros(13, dtype=torch.bool)
    cut[[5, 7, 9, 10]] = True
    assert predict.merge_passes(boxes, scores, labels, passes, cut).tolist() == [1, 2, 3, 4, 6, 7, 8, 10, 11, 12]
    assert predict.merge_passes(boxes[:0], scores[:0], labels[:0], passes[:0], cut[:0]).tolist() == []
    ends = predict.is_cut(torch.tensor([[100., 10, 150, 90], [110, 0, 199.5, 90], [110, 0, 150, 100]]),
                          (100, 0, 200, 100), (0, 0, 400, 100))
    assert ends.tolist() == [True, True, False]  # its upper and lower edge are the picture's


# ==== Classes and thresholds =======================================================================================


def test_thresholds_of_a_checkpoint(tmp_path):
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}]
    chosen = {"all": {"threshold": 0.3}, "per_class": {"b": {"threshold": 0.7}, "c": {"threshold": math.nan}}}
    path = save(tmp_path / "last.pt", "deformable_detr", categories, thresholds=chosen)
    assert predict.load(path, "cpu").thresholds.tolist() == [0.3, 0.7, 0.3]
    assert predict.load(path, "cpu", threshold=0.25).thresholds.tolist() == [0.25] * 3
    detect = finder(thresholds=(0.8, 0.1))
    image = picture((100, 100), ("red", 0, 0, 20, 20), ("red", 50, 0, 90, 40), ("green", 0, 60, 10, 65))
    # scores are A / (100 + A) of the area A: 0.8, 0.94 and, for green, 1 / 3
    assert sorted(np.round(detect(image)["scores"].tolist(), 2)) == [0.33, 0.8, 0.94]
    assert len(finder(thresholds=(0.81, 0.34))(image)["names"]) == 1


def test_threshold_without_one_is_said(tmp_path, capsys):
    predict.load(save(tmp_path / "last.pt", "deformable_detr", [{"id": 1, "name": "a"}]), "cpu", eval_size=40)
    assert "image size 40, at most 64; score threshold 0.5, as the checkpoint holds none" in capsys.readouterr().out


@pytest.mark.parametrize(("rows", "softmax", "name", "category_id"),
                         ((91, False, "person", 1), (91, True, "person", 1), (21, False, "aeroplane", 1)))
def test_released_heads(rows, softmax, name, category_id, tmp_path):
    cfg = small_config(finetune.Config, num_feature_levels=3, detector="detr" if softmax else "deformable_detr")
    model = detectors.build_detector(cfg, rows + softmax, focal=not softmax)
    torch.save({"model": model.state_dict(), "args": {"nheads": 4}}, tmp_path / "released.pth")
    detect = predict.load(tmp_path / "released.pth", "cpu", eval_size=40, max_size=60, threshold=0)
    assert detect.names[0] == name and detect.categories[0]["id"] == category_id
    assert len(detect.names) == {91: 80, 21: 20}[rows] and detect.label_map.count(-1) == {91: 11, 21: 1}[rows]
    found = detect(np.zeros((40, 60), np.uint8))
    assert len(found["names"]) > 0 and found["labels"].max() < len(detect.names)


def test_folders_of_a_run_and_of_hugging_face(tmp_path):
    pytest.importorskip("safetensors")
    save(tmp_path / "run" / "last.pt", "deformable_detr", [{"id": 1, "name": "old"}])
    path = save(tmp_path / "run" / "best.pt", "deformable_detr", [{"id": 5, "name": "a"}, {"id": 7, "name": "N/A"},
                                                                  {"id": 8, "name": "b"}])
    convert.main([str(path), "--to", "hf", "--out", str(tmp_path / "hf")])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    found = [predict.load(name, "cpu", 0, eval_size=48, max_size=64)(image)
             for name in (path, tmp_path / "run", f"hf:{tmp_path / 'hf'}")]
    assert sorted(found[0]["names"]) == ["a"] * 8 + ["b"] * 8  # queries
    assert all(torch.equal(one[k], found[0][k]) for one in found for k in ("boxes_xyxy", "scores", "labels"))


def test_a_pretrained_detector_finds_objects(tmp_path):
    cfg = small_config(detreg.Config, num_feature_levels=3, num_classes=2, scales=(40, 48), max_size=60)
    model = detreg.DETReg(detectors.build_detector(cfg, 2, focal=True), embedding_dim=16)
    run.save_checkpoint(tmp_path / "last.pt", model, None, 0, cfg, script="detreg")
    detect = predict.load(tmp_path / "last.pt", "cpu", threshold=0)
    found = detect(Image.new("RGB", (60, 40), RED))
    assert detect.categories == [{"id": 1, "name": "object"}] and found["names"] == ["object"] * 8  # queries
    assert (detect.cfg.eval_size, detect.cfg.max_size) == (48, 60) and 0 < found["scores"][0] < 1


def test_files_that_hold_no_detector_of_known_classes(tmp_path, fails):
    import torchvision
    image = tmp_path / "a.png"
    picture((20, 20)).save(image)

    def refused(name, state, **content):
        torch.save({"model": state, **content}, tmp_path / name)
        return fails(predict.main, [tmp_path / name, image])

    resnet = torchvision.models.resnet18()
    line = refused("resnet.pt", resnet.state_dict())
    assert "resnet.pt: torchvision, ResNet-18: no detector" in line and "--detector faster_rcnn_fpn" in line
    coco = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5)
    assert "torchvision detector, ResNet-50: no detector whose classes are known" in refused(
        "frcnn.pt", coco.state_dict())
    cfg = small_config(finetune.Config, num_feature_levels=3)
    model = detectors.build_detector(cfg, 13, focal=True)
    line = refused("rows.pt", model.state_dict(), args={"nheads": 4})
    assert "its class head has 13 rows, and nothing says which classes they are; fine-tune" in line
    broken = save(tmp_path / "nan.pt", "deformable_detr", [{"id": 1, "name": "a"}])
    content = torch.load(broken)
    content["model"]["query_embed.weight"][0] = math.nan
    torch.save(content, broken)
    assert "has weights that are not finite" in fails(predict.main, [broken, image])
    assert "nowhere.pt: no such checkpoint" in fails(predict.main, [tmp_path / "nowhere.pt", image])


# ==== What goes in =================================================================================================


def test_a_picture_from_python():
    image = picture((90, 60), ("red", 10, 20, 30, 50))
    detect, box = finder(), ("red", 10, 20, 30, 50)
    transparent = image.convert("RGBA")
    transparent.paste((0, 255, 0, 0), (60, 10, 80, 50))  # green, but nothing is seen of it
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # shown a quarter turn with the clock
    for given in (image, np.asarray(image), transparent, turned, image.quantize(8)):
        check_boxes(detect(given), box)
    results = detect([np.asarray(image), picture((70, 50), ("green", 5, 5, 20, 20))])
    check_boxes(results[0], box)
    check_boxes(results[1], ("green", 5, 5, 20, 20))
    assert results[0]["labels"].tolist() == [0] and results[1]["labels"].tolist() == [1]
    grey = np.full((40, 30), 200, np.uint8)
    wide = Image.fromarray((grey.astype(np.uint16) * 257))
    assert np.array_equal(predict.to_picture(grey), predict.to_picture(wide)) and detect(grey)["names"] == []
    for bad in (np.zeros((9, 9, 3), np.float32), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 0, 3), np.uint8),
                np.zeros(9, np.uint8), np.zeros((2, 9, 9, 3), np.uint8), "a.jpg", torch.zeros(3, 9, 9), None):
        for given in (bad, [image, bad]):
            with pytest.raises(UserError, match="is no picture; give a PIL image, or a uint8 array"):
                detect(given)


def folder_of_pictures(tmp_path):
    photos = tmp_path / "photos"
    (photos / "in, side").mkdir(parents=True)
    picture((80, 60), ("red", 10, 20, 30, 50)).save(photos / "b.png")
    image = picture((60, 80), ("green", 20, 10, 50, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(photos / "in, side" / "ä.jpg", exif=exif, quality=95, subsampling=0)
    Image.fromarray(np.full((50, 50), 9000, np.uint16)).save(photos / "deep.png")
    picture((50, 50)).convert("RGBA").save(photos / "alpha.png")
    (photos / "broken.jpg").write_bytes(b"no picture")
    return photos


def test_a_folder(tmp_path, fake_load, capsys):
    photos, out = folder_of_pictures(tmp_path), tmp_path / "out"
    counts = predict.main(["checkpoint", str(photos), str(photos / "b.png"), str(tmp_path / "photos" / "in, side"),
                           "--out", str(out), "--batch-size", "3"])
    printed = capsys.readouterr()
    assert "warning: skipped" in printed.err and "broken.jpg: UnidentifiedImageError" in printed.err
    assert (counts["images"], counts["boxes"], counts["skipped"]) == (4, 2, 1)
    assert "4 images, 2 boxes, " in printed.out and f"wrote {out}/predictions.json, predictions.csv" in printed.out
    results, lines = files_of(out)
    # alpha.png, b.png, broken.jpg, deep.png, in, side/ä.jpg; shown a quarter turn with the clock, 80 x 60
    assert [(r["image_id"], r["file_name"], r["category_id"], r["category_name"]) for r in results] == [
        (2, "b.png", 7, "red"), (5, "in, side/ä.jpg", 3, "green")]
    assert results[0]["bbox"] == pytest.approx([10, 20, 20, 30], abs=1)
    assert results[1]["bbox"] == pytest.approx([50, 20, 20, 30], abs=1)
    assert [line["file"] for line in lines] == ["b.png", "in, side/ä.jpg"]
    for line, result in zip(lines, results):
        x, y, w, h = result["bbox"]
        assert list(line) == ["file", "label", "score", "x1", "y1", "x2", "y2"] and line["label"] in ("red", "green")
        assert [float(line[k]) for k in ("x1", "y1", "x2", "y2", "score")] == pytest.approx(
            [x, y, x + w, y + h, result["score"]], abs=6e-3)
    drawn = sorted(p.relative_to(out / "pictures").as_posix() for p in (out / "pictures").rglob("*") if p.is_file())
    assert drawn == ["alpha.png.jpg", "b.png.jpg", "deep.png.jpg", "in, side/ä.jpg"]
    with Image.open(out / "pictures" / "in, side" / "ä.jpg") as image:
        assert image.size == (80, 60) and image.getpixel((60, 35))[1] > 200 > 100 > image.getpixel((60, 35))[0]
    assert not (out / "writer.lock").exists()
    # its output is none of its pictures the next time, even where it lies among them
    kept = (out / "predictions.json").read_text()
    predict.main(["checkpoint", str(tmp_path), "--out", str(out), "--no_pictures"])
    again = json.loads((out / "predictions.json").read_text())
    assert [r["file_name"] for r in again] == [f"photos/{r['file_name']}" for r in json.loads(kept)]
    assert "output of a run left out" in capsys.readouterr().out


def test_two_names_that_would_be_drawn_alike(tmp_path, fake_load):
    for name in ("a.png", "a.png.jpg"):
        picture((40, 40)).save(tmp_path / name)
    (tmp_path / "list.txt").write_text("a.png\na.png.jpg\na.png\n")
    assert predict.main(["checkpoint", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out")])["images"] == 2
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2


def test_a_json_brings_its_ids(tmp_path, fake_load, capsys, fails):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "test2017").mkdir()
    for name in "ba":
        picture((80, 60), ("red", 10, 20, 30, 50), ("green", 40, 5, 60, 15)).save(tmp_path / "test2017" / f"{name}.png")
    path = tmp_path / "annotations" / "image_info_test2017.json"
    images = [{"id": 31, "file_name": "b.png"}, {"id": 4, "file_name": "a.png", "width": 80, "height": 60}]
    content = {"images": images, "categories": [{"id": 90, "name": "green"}, {"id": 8, "name": "blue"}]}
    path.write_text(json.dumps(content))
    predict.main(["checkpoint", str(path), "--out", str(tmp_path / "out")])
    results, _ = files_of(tmp_path / "out")
    # the json has no red: an id that none has
    assert [(r["image_id"], r["file_name"], r["category_name"], r["category_id"]) for r in results] == [
        (4, "a.png", "red", 91), (4, "a.png", "green", 90), (31, "b.png", "red", 91), (31, "b.png", "green", 90)]
    assert "the json does not list red" in capsys.readouterr().out

    def refused(content):
        (tmp_path / "x.json").write_text(json.dumps(content))
        return fails(predict.main, ["checkpoint", tmp_path / "x.json", "--data_root", tmp_path / "test2017"])

    assert "is no COCO json: KeyError" in refused({"images": [{"id": 1}]})
    assert "an image id occurs twice" in refused({"images": [images[0], images[0]]})
    assert "lists no images" in refused({"images": []})
    assert "1 of 1 images are not there, the first" in refused({"images": [{"id": 1, "file_name": "c.png"}]})
    assert "leads out of the image folder" in refused({"images": [{"id": 1, "file_name": "../test2017/a.png"}]})
    assert "give it alone" in fails(predict.main, ["checkpoint", path, tmp_path / "test2017"])


def test_what_is_refused(tmp_path, fake_load, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty: no pictures in it or below it; looked for .jpg" in fails(predict.main, ["checkpoint", "empty"])
    assert "gone: no such file or folder" in fails(predict.main, ["checkpoint", "gone"])
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "bad.jpg").write_bytes(b"x")
    assert "none of the 2 pictures can be read" in fails(predict.main, ["checkpoint", "bad.png", "set"])
    for flag, value in (("threshold", "1.5"), ("threshold", "nan"), ("tile", "5"), ("overlap", "0.95"),
                        ("batch_size", "0"), ("num_workers", "0"), ("eval_size", "-1")):
        assert f"--{flag} " in fails(predict.main, ["checkpoint", "set", f"--{flag}={value}"])
    assert "required: images" in fails(predict.main, ["checkpoint"])
    (tmp_path / "out" / "pictures").mkdir(parents=True)
    picture((40, 40)).save(tmp_path / "out" / "pictures" / "a.jpg")
    assert "where the pictures are drawn; give another --out" in fails(
        predict.main, ["checkpoint", "out", "--out", "out"])


def test_default_out(tmp_path, monkeypatch):
    (tmp_path / "out" / "finetune-own-cards").mkdir(parents=True)
    (tmp_path / "PHOTOS").mkdir()
    for name in ("out/finetune-own-cards/last.pt", "released.pth", "PHOTOS/a.jpg", "PHOTOS/b.jpg"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for checkpoint in ("out/finetune-own-cards", "out/finetune-own-cards/last.pt", "hf:out/finetune-own-cards"):
        assert predict.default_out(checkpoint, ["PHOTOS"]) == "out/predict-finetune-own-cards-PHOTOS"
    assert predict.default_out("released.pth", ["PHOTOS/a.jpg", "PHOTOS/b.jpg"]) == "out/predict-released-PHOTOS"
    assert predict.default_out("released.pth", ["PHOTOS/a.jpg"]) == "out/predict-released-a"


def predictions_of_some(folder):
    folder.mkdir()
    path = save(folder / "last.pt", "deformable_detr", [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}])
    return [str(path), str(folder_of_pictures(folder)), "--threshold", "0", "--device", "cpu", "--out",
            str(folder / "out")]


def worker():
    """In each of two processes (conftest.two_processes): the files that they write together."""
    folder = Path("predict")
    argv = [predictions_of_some(folder) if common.rank() == 0 else None]
    torch.distributed.broadcast_object_list(argv, 0)
    counts = predict.main(argv[0])
    return counts["boxes"], *files_of(folder / "out"), len(list((folder / "out" / "pictures").rglob("*.jpg")))


def test_processes_share_the_pictures(two_processes, tmp_path):
    predict.main(predictions_of_some(tmp_path / "one"))
    expected, _ = files_of(tmp_path / "one" / "out")
    for boxes, found, lines, drawn in two_processes["test_predict"]:
        assert (boxes, len(found), len(lines), drawn) == (64, 64, 64, 4)  # 4 pictures, 8 queries with 2 classes
        assert [(r["image_id"], r["file_name"]) for r in found] == [(r["image_id"], r["file_name"]) for r in expected]
        assert np.allclose([r["score"] for r in found], [r["score"] for r in expected], atol=1e-5)
