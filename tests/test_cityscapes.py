"""cityscapes.py and segmentation.py: gtFine in its real format, Cityscapes' own AP by hand, semantic segmentation."""
import json

import numpy as np
import pytest
import torch
from conftest import flags
from PIL import Image
from pycocotools import mask as coco_mask
from test_flags import knobs

import annotations
import cityscapes
import common
import data
import finetune
import segmentation
from cityscapes import Matches
from common import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
HW = 32, 64


def rectangle(label, x1, y1, x2, y2, **more):
    """An object of a polygons.json that covers the pixels x1..x2, y1..y2."""
    return {"label": label, "polygon": [[x1, y1], [x2, y1], [x2, y2], [x1, y2]], **more}


# In the order of the file: later ones lie on top. The bus and the road make a hole in the first car.
OBJECTS = [
    rectangle("road", 0, 0, 63, 31), rectangle("ego vehicle", 0, 28, 63, 31), rectangle("license plate", 0, 0, 3, 3),
    rectangle("car", 2, 2, 21, 17), rectangle("car", 50, 2, 60, 9, deleted=1), rectangle("road", 6, 6, 9, 9),
    rectangle("bus", 16, 2, 31, 17), rectangle("car", 40, 20, 45, 23), rectangle("caravan", 40, 18, 47, 25),
    rectangle("persongroup", 34, 2, 43, 11), rectangle("person", 50, 12, 50, 20), rectangle("car", 52, 12, 59, 27),
    rectangle("polegroup", 62, 0, 63, 5),
]


def expected_map():
    """OBJECTS as detectron2 reads them: from the last to the first, each without what is taken already."""
    ids = np.zeros(HW, np.int64)
    taken = np.zeros(HW, bool)
    counts, numbers = {}, []
    for item in OBJECTS:
        name, group = item["label"], item["label"] in ("persongroup",)
        number = cityscapes.IDS[name.removesuffix("group") if group else name]
        if number >= 24 and not group and not item.get("deleted"):
            counts[number] = counts.get(number, -1) + 1
            number = number * 1000 + counts[number]
        numbers.append(number)
    for item, number in reversed(list(zip(OBJECTS, numbers))):
        (x1, y1), _, (x2, y2), _ = item["polygon"]
        if number >= 0 and not item.get("deleted"):
            part = np.zeros(HW, bool)
            part[y1:y2 + 1, x1:x2 + 1] = True
            ids[part & ~taken] = number
            taken |= part
    return ids


def write_image(root, split, city, k, form, objects=OBJECTS, ids=None):
    """One image and its labels in the real layout."""
    name = f"{city}_{k:06d}_000019"
    picture, labels = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
    for folder in (picture, labels):
        folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(k).integers(0, 255, (*HW, 3), np.uint8)
    Image.fromarray(pixels).save(picture / f"{name}_leftImg8bit.png")
    if form == "json":
        content = {"imgHeight": HW[0], "imgWidth": HW[1], "objects": objects}
        (labels / f"{name}_gtFine_polygons.json").write_text(json.dumps(content))
    else:
        ids = expected_map() if ids is None else ids
        Image.fromarray(ids.astype(np.uint16)).save(labels / f"{name}_gtFine_instanceIds.png")
        semantic = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
        Image.fromarray(semantic).save(labels / f"{name}_gtFine_labelIds.png")
    return picture / f"{name}_leftImg8bit.png"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """train: the same labels as polygons (aachen) and as png (bremen); val: png."""
    root = tmp_path_factory.mktemp("city")
    write_image(root, "train", "aachen", 0, "json")
    write_image(root, "train", "bremen", 1, "png")
    write_image(root, "val", "ulm", 2, "png")
    return root


# ==== Labels ====


def test_both_forms_are_read_alike(tree):
    sets = annotations.open_splits(str(tree), None, masks=True)
    first, second = sets.train.records
    ids = expected_map()
    assert [r.id for r in sets.train.records] == ["aachen_000000_000019", "bremen_000001_000019"]
    assert sets.val is sets.test and sets.val.records[0].id == "ulm_000002_000019"
    names = "person rider car truck bus train motorcycle bicycle".split()
    assert sets.train.categories == [{"id": k, "name": n} for k, n in zip((24, 25, 26, 27, 28, 31, 32, 33), names)]
    # the person of one column is left out; the second car is covered, and its number stays taken
    wanted = [24, 26000, 26002, 28000]
    for record in (first, second):
        assert record.segments == first.segments and (record.boxes == first.boxes).all()
        assert record.labels.tolist() == [0, 2, 2, 4] and record.crowd.tolist() == [True, False, False, False]
        assert record.areas.tolist() == [(ids == k).sum() for k in wanted] == [100, 14 * 16 - 16, 128, 256]
    assert first.boxes[1].tolist() == [2, 2, 16, 18] and first.boxes[0].tolist() == [34, 2, 44, 12]
    for i in (0, 1):
        assert (sets.train.masks(i).numpy() == [ids == k for k in wanted]).all()
    assert any("2 objects of train are one pixel wide" in note for note in sets.train.notes)
    assert annotations.open_detection(str(tree), None, "val").records[0].segments is None
    named = annotations.open_detection("cityscapes", str(tree), "train")
    assert named.name == "cityscapes" and named.fingerprint() == sets.train.fingerprint()


def test_semantic_maps(tree):
    ids = expected_map()
    wanted = np.full(HW, 255)
    for k, number in enumerate(cityscapes.TRAIN_IDS):
        wanted[(ids == number) | (ids // 1000 == number)] = k
    assert (wanted[ids // 1000 == 29] == 255).all() and (wanted[ids == 24] == 11).all() and wanted[28, 0] == 255
    train, val = segmentation.open_sets(segmentation.Config(data=str(tree)))
    assert train.classes[:2] == ("road", "sidewalk") and train.classes[18] == "bicycle" and len(train.classes) == 19
    for one in (train, val):
        for i in range(len(one)):
            image, labels = one.load(i)
            assert image.size == HW[::-1] and labels.dtype == np.uint8 and (labels == wanted).all()


def test_runs_become_segments():
    ids = np.random.default_rng(0).choice([7, 24, 24000, 26001, 29000], (9, 7))
    ids[:, 2:4] = 26001  # a run over whole columns
    found = {s.id: s for s in cityscapes.segments_of(ids)}
    assert sorted(found) == [24, 24000, 26001]
    for value, s in found.items():
        mask = ids == value
        y, x = np.nonzero(mask)
        assert (coco_mask.decode(s.rle) == mask).all() and s.area == mask.sum()
        assert s.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "city"
    image = write_image(root, "train", "aachen", 0, "json", [rectangle("carr", 0, 0, 5, 5)])
    labels = cityscapes.label_file(image)

    def refused(match, data="city"):
        with pytest.raises(UserError, match=match):
            annotations.open_detection(data, None, "train", masks=True)

    refused("not found in data/cityscapes.*leftImg8bit/train/CITY", "cityscapes")
    refused("object 1 has the unknown label 'carr'.*gtFine_trainvaltest.zip")
    labels.write_text(json.dumps({"imgHeight": 4, "imgWidth": 4, "objects": [{"label": "car", "polygon": [[1, 1]]}]}))
    refused("aachen_000000_000019_gtFine_polygons.json: these labels cannot be read")
    labels.write_text(json.dumps({"imgHeight": 4, "imgWidth": 4, "objects": [rectangle("car", 0, 0, 1e30, 3)]}))
    refused("object 1 has corners far outside the image")
    labels.write_text('{"imgHeight": 4')
    refused("cannot be read: JSONDecodeError")
    Image.fromarray(np.zeros((*HW, 3), np.uint8)).save(labels.with_name("aachen_000000_000019_gtFine_instanceIds.png"))
    refused("3 channels, a map of ids has one")
    labels.with_name("aachen_000000_000019_gtFine_instanceIds.png").write_bytes(b"\x89PNG cut")
    refused("instanceIds.png: these labels cannot be read")
    image.unlink()
    refused("1 of 1 labels of train have no image, the first: leftImg8bit/train/aachen/aachen_000000_000019_")
    write_image(root, "train", "aachen", 0, "json")
    labels.unlink()
    labels.with_name("aachen_000000_000019_gtFine_instanceIds.png").unlink()
    refused("1 of 1 images of train have no labels, the first: gtFine/train/aachen")


# ==== AP ====


def matches(scores, sizes, overlaps, areas, groups=None, void=None):
    groups = np.zeros(len(areas), bool) if groups is None else np.array(groups)
    void = np.zeros(len(scores), int) if void is None else np.array(void)
    return Matches(np.array(scores), np.array(sizes), void, np.array(areas), groups,
                   np.array(overlaps, int).reshape(len(scores), len(areas)))


@pytest.mark.parametrize(("case", "threshold", "wanted"), (
    # IoU 100 / 200 = 0.5 is not above 0.5
    ((([.9], [100], [[100]], [200])), .5, ([], [.9], 1)),
    ((([.9], [101], [[101]], [200])), .5, ([.9], [], 0)),
    # a second prediction of an object is wrong, whichever comes first
    ((([.3, .8, .5], [200] * 3, [[200]] * 3, [200])), .5, ([.8], [.5, .3], 0)),
    # 99 pixels: no object; who finds it, or a group, is neither right nor wrong
    ((([.9], [99], [[99]], [99])), .5, ([], [], 0)),
    ((([.9], [500], [[500]], [500], [True])), .5, ([], [], 0)),
    # void, groups and small objects: a mistake only up to the threshold's share
    ((([.9, .8], [100, 100], [[], []], [], None, [50, 51])), .5, ([], [.9], 0)),
    ((([.9], [100], [[30, 30]], [900, 99], [True, False])), .5, ([], [], 0)),
    ((([.9], [100], [[30, 20]], [900, 99], [True, False])), .5, ([], [.9], 0)),
    ((([.9], [100], [[30, 30]], [900, 99], [True, False])), .6, ([], [.9], 0)),
))
def test_judging(case, threshold, wanted):
    assert cityscapes.judge(matches(*case), threshold) == wanted


def test_average_precision():
    # (recall, precision) from the lowest score up: (2/4, 2/4), (1/4, 1/3), (1/4, 1/2), (1/4, 1), and (0, 1)
    steps = [(.5 - .25) / 2, (.5 - .25) / 2, 0, (.25 - 0) / 2, .25 / 2]
    wanted = np.dot(steps, [2 / 4, 1 / 3, 1 / 2, 1, 1])
    assert cityscapes.average_precision([.9, .2], [.8, .5], 2) == pytest.approx(wanted)
    # equal scores are one point: (1, 1/2) and (0, 1)
    assert cityscapes.average_precision([.5], [.5], 0) == pytest.approx(.5 * .5 + 1 * .5)
    assert cityscapes.average_precision([], [.5], 3) == 0 and cityscapes.average_precision([], [], 3) == 0
    assert cityscapes.average_precision([.1, .2], [], 0) == 1


def test_instance_metrics(tmp_path):
    root = tmp_path / "city"
    ids = expected_map()
    for city, form in (("ulm", "png"), ("bonn", "json")):
        write_image(root, "train", city, 0, form)
    labelled = annotations.open_detection(str(root), None, "train", masks=True)

    def detection(number, mask, score, image=0):
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        return {"image_id": labelled.image_ids[image], "category_id": number, "score": score, "bbox": [0, 0, 1, 1],
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}

    empty = np.zeros(HW, bool)
    half = (ids == 28000) & (np.arange(64) < 26)  # 10 of 16 columns of the bus: IoU 0.625
    void = np.zeros(HW, bool)
    void[28:, :16] = True  # the ego vehicle
    found = [*(detection(26, ids == k, .9, i) for i in (0, 1) for k in (26000, 26002)), detection(26, void, .95),
             detection(28, half, .9), detection(28, half, .8, 1), detection(24, ids == 24, .9), detection(25, empty, 1)]
    metrics = cityscapes.instance_metrics(labelled, found)
    per_class = metrics["Cityscapes_per_class"]
    # persons: a group and one of 9 pixels are none; the bus counts at .5, .55, .6
    assert per_class["car"] == 1 and per_class["bus"] == pytest.approx(.3)
    assert [name for name, ap in per_class.items() if ap == ap] == ["car", "bus"]
    assert metrics["Cityscapes_AP"] == pytest.approx(.65) and metrics["Cityscapes_AP50"] == 1
    wrong = [detection(26, ids == 7, .95), *found]
    assert cityscapes.instance_metrics(labelled, wrong)["Cityscapes_AP50"] < 1
    assert cityscapes.instance_metrics(labelled, [])["Cityscapes_AP"] == 0

    # as people convert it: a COCO json, images by city
    content = labelled.coco_ground_truth()
    for image, record in zip(content["images"], labelled.records):
        image["file_name"] = f"{record.image.parent.name}/{record.image.name}"
    for a in content["annotations"]:
        a["segmentation"]["size"] = list(a["segmentation"]["size"])
    (root / "annotations").mkdir()
    path = root / "annotations" / "instancesonly_filtered_gtFine_train.json"
    path.write_text(json.dumps(content))
    converted = annotations.open_detection(str(path), None, "train", masks=True)
    assert [r.areas.tolist() for r in converted.records] == [r.areas.tolist() for r in labelled.records]
    assert cityscapes.instance_metrics(converted, found)["Cityscapes_AP"] == metrics["Cityscapes_AP"]
    scenes = annotations.open_detection("synthetic", None, "train", synthetic_images=1, masks=True)
    assert cityscapes.instance_metrics(scenes, []) == {}


# ==== Fine-tuning ====

RCNN = {"detector": "mask_rcnn_fpn", "arch": "resnet18", "backbone_weights": "random", "scales": 32, "max_size": 64,
        "eval_size": 32, "fpn_channels": 8, "head_dim": 16, "anchor_size": 4, "proposals_per_image": 10,
        "rois_per_image": 8, "batch_size": 2, "steps": 1, "precise_bn": 0, "num_workers": 0, "device": "cpu"}


def test_finetuning_a_step(tree, tmp_path):
    metrics = finetune.main(flags({"data": tree, "out": tmp_path / "run", **RCNN}))
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"AP", "AP_mask", "Cityscapes_AP", "Cityscapes_AP50", "Cityscapes_per_class"} <= written.keys()
    assert 0 <= metrics["Cityscapes_AP"] <= metrics["Cityscapes_AP50"] <= 1


def test_recipes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = finetune.parse(["--data", "cityscapes", "--detector", "mask_rcnn_fpn"])[0]
    assert (cfg.lr, cfg.batch_size, cfg.steps, cfg.lr_drops, cfg.eval_size) == (.01, 8, 24000, (.75,), 1024)
    assert (cfg.scales, cfg.max_size) == ((800, 832, 864, 896, 928, 960, 992, 1024), 2048)
    city, voc = (segmentation.parse(["moco_v2_200", "--data", name]) for name in ("cityscapes", "voc"))
    assert [(c.steps, c.lr, c.crop_size, c.batch_size, c.weight_decay, c.lr_drops) for c in (city, voc)] == [
        (90000, .01, 769, 16, 1e-4, (.7, .9)), (30000, .003, 513, 16, 1e-4, (.7, .9))]
    assert city.out == "out/segmentation-cityscapes-moco_v2_200"
    assert [common.step_schedule(step, 90000, city.lr_drops) for step in (62999, 63000, 80999, 81000)] == (
        pytest.approx([1, .1, .1, .01]))
    for name, (plain, bounds, _) in knobs("segmentation").items():
        assert plain not in (int, float) or np.isfinite([bounds.low, bounds.high]).all(), name


# ==== Semantic segmentation ====


@pytest.mark.parametrize(("arch", "device"), (("resnet18", "cpu"), ("resnet50", "meta")))
def test_the_dilated_network(arch, device):
    torch.manual_seed(0)
    with torch.device(device):
        model, plain = segmentation.FCN(arch, 3, 8).eval(), common.Backbone(arch, (3, 4), "bn", 5).eval()
        images = torch.randn(1, 3, 65, 97)
    assert list(model.backbone.body.state_dict()) == list(plain.body.state_dict())
    model.backbone.body.load_state_dict(plain.body.state_dict())
    dilated = [c for c in model.backbone.body.layer4.modules() if isinstance(c, torch.nn.Conv2d)]
    assert {(c.kernel_size, c.stride, c.dilation, c.padding) for c in dilated} >= {((3, 3), (1, 1), (2, 2), (2, 2))}
    assert all(c.stride == (1, 1) and c.dilation == ((2, 2) if c.kernel_size == (3, 3) else (1, 1)) for c in dilated)
    with torch.no_grad():
        wide, = model.backbone(images)
        third, ordinary = plain(images)
        assert wide.shape[2:] == third.shape[2:] == (5, 7) and ordinary.shape[2:] == (3, 4)
        assert wide.shape[1] == ordinary.shape[1]
        if device == "meta":
            return
        # what stands at the first block's even places is what a stride of 2 leaves
        torch.testing.assert_close(model.backbone.body.layer4[0].downsample(third)[..., ::2, ::2],
                                   plain.body.layer4[0].downsample(third))
        # a cell lies on every 16th pixel, also where the image had to be padded
        logits, cells = model(images), model.head(wide)
        torch.testing.assert_close(logits[..., ::16, ::16], cells)
        padded = torch.nn.functional.pad(images[..., :60, :90], (0, 7, 0, 5))
        torch.testing.assert_close(model(images[..., :60, :90]), model(padded)[..., :60, :90])


def test_crops():
    labels = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20) % 200
    image = Image.fromarray(np.stack([labels] * 3, -1))
    flipped = 0
    for k in range(20):
        rng = np.random.default_rng(k)
        view, cut = segmentation.random_crop(rng, image, labels, (1, 1), 17)
        assert view.shape == (3, 17, 17) and cut.shape == (17, 17) and (cut[12:] == 255).all()
        assert (view[:, 12:] == 0).all()
        known = evaluation_pixels(view)[:12]
        assert (known == cut[:12].numpy()).all()  # image and labels go together
        flipped += bool(cut[0, 0] > cut[0, 1])
        doubled = segmentation.random_crop(np.random.default_rng(k), image, labels, (2, 2), 17)[1]
        assert (doubled != 255).all() and len(np.unique(doubled)) < 17 * 17 / 2
    assert 0 < flipped < 20


def evaluation_pixels(view):
    std, mean = data.IMAGENET_STD[0], data.IMAGENET_MEAN[0]
    return ((view[0] * std + mean) * 255).round().numpy()


def test_mean_iou_by_hand():
    labels = torch.tensor([[0, 0, 1, 1], [1, 255, 255, 0]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
    matrix = segmentation.confusion_matrix(labels, predicted, 3)
    assert matrix.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    metrics = segmentation.segmentation_metrics(matrix, ("a", "b", "c"))
    assert metrics["mIoU"] == pytest.approx(.5) and metrics["pixel_accuracy"] == pytest.approx(4 / 6)
    assert metrics["per_class"]["a"] == pytest.approx(2 / 4) and np.isnan(metrics["per_class"]["c"])


class Brightness(torch.nn.Module):
    """Class 1 where a pixel is bright."""

    def forward(self, images):
        return torch.stack([-images[:, 0], images[:, 0]], 1)


def worker():
    """mIoU of five images of two sizes, with as many processes as there are."""
    maps = [np.random.default_rng(k).integers(0, 2, (4 + k % 2, 6), np.uint8) for k in range(5)]

    def read(i):
        pixels = maps[i].copy()
        pixels[0, :i] ^= 1  # so many are wrong
        return Image.fromarray(np.stack([pixels * 255] * 3, -1)), maps[i]

    source = segmentation.SegmentationSet("some", ("dark", "bright"), list(range(5)), read)
    metrics, pictures = segmentation.evaluate(segmentation.Config(num_workers=0), Brightness(), source,
                                              torch.device("cpu"))
    return {"accuracy": metrics["pixel_accuracy"], "mIoU": metrics["mIoU"], "pictures": len(pictures)}


def test_processes_share_the_images(two_processes):
    alone, (first, second) = worker(), two_processes["test_cityscapes"]
    assert alone["accuracy"] == pytest.approx(1 - 10 / (3 * 24 + 2 * 30)) and alone["pictures"] == 4
    assert first["mIoU"] == second["mIoU"] == alone["mIoU"] and first["accuracy"] == alone["accuracy"]


DEMO = {"preset": "demo", "synthetic_images": 4, "synthetic_test_images": 2, "synthetic_size": 48, "crop_size": 33,
        "fcn_channels": 8, "batch_size": 2, "accumulate": 2, "num_workers": 0, "log_every": 1, "device": "cpu"}


def test_training_and_resuming_to_the_bit(tmp_path, capsys):
    runs = {}
    for name, stops in (("whole", (2,)), ("halves", (1, 2))):
        for stop in stops:
            out = tmp_path / name
            runs[name] = segmentation.main(["random", *flags({**DEMO, "batch_size": 4, "steps": 2, "max_steps": stop,
                                                              "out": out})])
    first, second = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in runs)
    assert first["step"] == second["step"] == 2
    assert all(torch.equal(v, second["model"][k]) for k, v in first["model"].items())
    assert runs["whole"]["mIoU"] == runs["halves"]["mIoU"] and 0 <= runs["whole"]["mIoU"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and lines[0]["loss"] == pytest.approx(np.log(6), rel=.2)
    assert [c["name"] for c in first["classes"]] == ["background", *data.SyntheticScenes.CLASSES]
    assert Image.open(tmp_path / "whole" / "predictions.png").width > 200
    # it starts from its own checkpoint, whose ResNet it reads off
    cfg = segmentation.parse([str(tmp_path / "whole"), "--data", "synthetic"])
    assert cfg.arch == "resnet18" and cfg.out == "out/segmentation-synthetic-whole"
    model = segmentation.build_model(cfg, 6)
    assert torch.equal(model.backbone.body.layer4[0].conv1.weight,
                       first["model"]["backbone.body.layer4.0.conv1.weight"])
    # a finished run says so
    assert segmentation.main(["random", *flags({**DEMO, "batch_size": 4, "steps": 2, "max_steps": 2,
                                                "out": tmp_path / "whole"})])["steps"] == 2
    assert "this run is finished" in capsys.readouterr().out


def test_voc(tmp_path):
    year = tmp_path / "VOC2012"
    (year / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (year / name).mkdir()
    maps = np.random.default_rng(0).choice([0, 5, 20, 255], (3, 8, 10)).astype(np.uint8)
    for k, labels in enumerate(maps):
        Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(year / "JPEGImages" / f"2007_{k}.jpg")
        picture = Image.fromarray(labels)
        if k == 2:  # as published: numbers of colours
            picture.putpalette(segmentation.colours(256).tobytes())
            assert picture.mode == "P"
        picture.save(year / ("SegmentationClass" if k == 2 else "SegmentationClassAug") / f"2007_{k}.png")
    lists = year / "ImageSets" / "Segmentation"
    (lists / "val.txt").write_text("2007_2\n")
    (lists / "trainaug.txt").write_text("2007_0\n2007_1\n")
    train, val = segmentation.open_sets(segmentation.Config(data="voc", data_root=str(tmp_path)))
    assert len(train) == 2 and train.classes[5] == "bottle" and train.classes[20] == "tvmonitor"
    assert all((one.load(i)[1] == maps[k]).all() for one, i, k in ((train, 0, 0), (train, 1, 1), (val, 0, 2)))
    assert segmentation.colours(3).tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]  # VOC's
    (lists / "trainaug.txt").unlink()
    with pytest.raises(UserError, match="no ImageSets/Segmentation/train.txt"):
        segmentation.open_sets(segmentation.Config(data=str(tmp_path)))
    (lists / "train.txt").write_text("2007_9\n")
    with pytest.raises(UserError, match="of its 1 images 2 files are not there, the first: .*2007_9.jpg"):
        segmentation.open_sets(segmentation.Config(data=str(tmp_path)))
    Image.fromarray(np.full((8, 10), 21, np.uint8)).save(year / "SegmentationClass" / "2007_2.png")
    with pytest.raises(UserError, match="hold 21, which is none of the 21 classes"):
        val.load(0)


def test_wrong_command_lines(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no backbone: name it before the flags" in fails(segmentation.main, ["--data", "voc"])
    assert "both random and --backbone_weights" in fails(segmentation.main, ["random", "--backbone_weights", "x"])
    assert "smallest and the largest" in fails(segmentation.main, ["random", "--scale_range", "2", "1"])
    assert "not found in data/cityscapes" in fails(segmentation.main, ["random"])
    assert "--data nowhere: no labels" in fails(segmentation.main, ["random", "--data", "nowhere"])
    assert "no such checkpoint file" in fails(segmentation.main, ["nofile.pt", *flags(DEMO)])
