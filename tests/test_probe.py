"""probe.py and classification.py: pools, SVM, nearest neighbours and a head's step by hand, the cache, and the three
tasks from end to end on small sets in the formats of ImageNet, Places365 and VOC."""
import functools
import importlib.util
import json
import os
import sys
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import flags
from fill import fill
from PIL import Image

import classification
import common
import convert
import data
import probe
import run
from common import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is optional")
TINY = {"arch": "resnet18", "image_size": 32, "num_workers": 0, "device": "cpu"}
COLOURS = {"cat": (200, 60, 40), "dog": (40, 60, 200)}


def picture(path, colour, seed, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-30, 30, (*size, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """ImageNet's layout: 8 images of a class to learn from, 3 to test on."""
    root = tmp_path_factory.mktemp("folders")
    for split, count in (("train", 8), ("val", 3)):
        for name, colour in COLOURS.items():
            for i in range(count):
                picture(root / split / name / f"{i}.JPEG", colour, i + 100 * len(split))
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """VOC2007's classification task: 9 images to learn from, 6 to test on; the last of each shows a difficult cat."""
    root = tmp_path_factory.mktemp("voc")
    main = root / "VOC2007" / "ImageSets" / "Main"
    main.mkdir(parents=True)
    signs = {"trainval": [1, -1, -1, 1, -1, 1, -1, -1, 0], "test": [1, -1, -1, 1, -1, 0]}
    for split, cats in signs.items():
        names = [f"{len(split):02d}{i:04d}" for i in range(len(cats))]
        (main / f"{split}.txt").write_text("".join(f"{name}\n" for name in names[::-1]))
        for c, row in (("cat", cats), ("dog", [-1 if s == 1 else 1 for s in cats]), ("rare", [-1] * len(cats))):
            (main / f"{c}_{split}.txt").write_text("".join(f"{name} {s:2d}\n" for name, s in zip(names, row)))
        for name, s in zip(names, cats):
            picture(root / "VOC2007" / "JPEGImages" / f"{name}.jpg", COLOURS["cat" if s == 1 else "dog"], int(name))
    return root


@pytest.fixture
def places(tmp_path):
    """Places365-Standard as it is published; the list of its own order."""
    root = tmp_path / "places"
    lines = {"train": [], "val": []}
    for i, colour in enumerate((*COLOURS.values(), *COLOURS.values())):
        name = f"/a/{list(COLOURS)[i % 2]}/{i:08d}.jpg"
        picture(root / f"data_256{name}", colour, i)
        picture(root / "val_256" / f"Places365_val_{i:08d}.jpg", colour, i + 50)
        lines["train"].append(f"{name} {i % 2}\n")
        lines["val"].append(f"Places365_val_{i:08d}.jpg {i % 2}\n")
    (root / "places365_train_standard.txt").write_text("".join(lines["train"][::-1]))
    (root / "places365_val.txt").write_text("".join(lines["val"]))
    return root


def config(task, *names, **values):
    return probe.parse([task, *map(str, names or ["random"]), *flags(TINY | values)])[1]


# ==== Features and data ============================================================================================

def test_pools():
    """OpenSelfSup's values per stage of a ResNet-50, and padding that counts as zeros."""
    maps = [torch.ones(1, c, s, s) for c, s in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))]
    pooled = [probe.pool(maps[stage], feature, 224) for feature, stage in probe.STAGE.items()]
    assert [p.shape[-1] for p in pooled] == [12, 6, 4, 3, 2, 7, 1]
    assert [p[0].numel() for p in pooled] == [9216, 9216, 8192, 9216, 8192, 100352, 2048]
    assert pooled[0][0, 0, 0, :2].tolist() == pytest.approx([0.36, 0.6])
    assert torch.equal(pooled[1], torch.ones(1, 256, 6, 6))
    small = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert probe.pool(small, "feat5", 64).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert probe.pool(small[..., :1, :1], "feat1", 32).shape == (1, 1, 1, 1)


def test_stages_of_the_network():
    """feat1 lies before the max pool; the rest are layer1..layer4, as torchvision computes them."""
    backbone = probe.open_backbone("random", "resnet18", 3, ("feat5",))
    images = torch.from_numpy(fill("input:x", (2, 3, 64, 64)))
    with torch.no_grad():
        x = backbone.body.relu(backbone.body.bn1(backbone.body.conv1(images)))
        expected = {"feat1": F.adaptive_avg_pool2d(x, 12)}
        x = backbone.body.layer1(backbone.body.maxpool(x))
        expected["feat2"] = F.adaptive_avg_pool2d(x, 6)
        x = backbone.body.layer4(backbone.body.layer3(backbone.body.layer2(x)))
        expected |= {"feat5": x, "unpool": x, "mean": x.mean((2, 3), keepdim=True)}
    found = probe.extract(backbone, images, list(expected))
    for feature, value in expected.items():
        torch.testing.assert_close(found[feature], value, atol=1e-5, rtol=1e-5)
    assert probe.shapes(backbone, ("feat3", "unpool"), 64) == {"feat3": (128, 4, 4), "unpool": (512, 2, 2)}


def test_views():
    ramp = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8)[:, None, None] * 3, (1, 160, 3)))  # 160 wide, 80 high
    assert probe.shortened(ramp, 56).size == (128, 64)
    assert probe.centre_view(ramp, 56).getpixel((0, 0)) == probe.shortened(ramp, 56).getpixel((36, 4))
    assert probe.stretched_view(ramp, 56).size == (56, 56)
    rng = np.random.default_rng(0)
    draws = [probe.draw_view(rng, (80, 160), "places", 56) for _ in range(200)]
    assert {d["shift"][0] for d in draws} == set(range(-4, 5)) and 60 < sum(d["flip"] for d in draws) < 140
    moved = probe.apply_view(ramp, {"shift": (4, 4), "flip": False}, 56)  # a random crop of the central 64 x 64
    assert torch.equal(moved, data.to_normalized_tensor(probe.shortened(ramp, 56).crop((40, 8, 96, 64))))
    draw = probe.draw_view(rng, (80, 160), "colours", 56)
    assert draw["colours"]["order"] and draw["colours"]["gray"] is False and len(draw["light"]) == 3
    plain = probe.apply_view(ramp, {"crop": (0, 0, 80, 80), "flip": False}, 56)
    still = {"order": [], "gray": False, "blur": None, "solarize": False}
    lit = probe.apply_view(ramp, {"crop": (0, 0, 80, 80), "flip": False, "colours": still,
                                  "light": np.array([0.1, 0, -0.2])}, 56)
    shift = (lit - plain).mean((1, 2)) * torch.tensor(data.IMAGENET_STD)
    np.testing.assert_allclose(shift, [0.1, 0, -0.2], atol=1e-6)


def test_labels_of_each_layout(folders, voc, places):
    train, val = classification.open_sets(config("knn", data=folders))
    assert train.classes == val.classes == ("cat", "dog") and len(train) == 16
    assert [(val.key(i), val.labels[i]) for i in (0, 3)] == [("cat/0.JPEG", 0), ("dog/0.JPEG", 1)]
    assert train.signs(1).tolist() == [-1] * 8 + [1] * 8
    train, val = classification.open_sets(config("knn", data="places365", data_root=places))
    assert [(train.key(i), train.labels[i]) for i in range(4)] == [
        ("a/cat/00000000.jpg", 0), ("a/cat/00000002.jpg", 0), ("a/dog/00000001.jpg", 1), ("a/dog/00000003.jpg", 1)]
    assert val.labels.tolist() == [0, 1, 0, 1] and val.key(3) == "Places365_val_00000003.jpg"
    before = train.fingerprint()
    train.labels[0] = 1
    assert train.fingerprint() != before
    for given in (voc, voc / "VOC2007"):
        train, test = classification.open_sets(config("svm", data=given), several=True)
        assert (train.classes, train.split, test.split) == (("cat", "dog", "rare"), "trainval", "test")
        assert train.signs(0).tolist() == [1, -1, -1, 1, -1, 1, -1, -1, 0] and test.signs(1).tolist()[:2] == [-1, 1]
    scenes = classification.open_synthetic(config("knn", preset="demo", synthetic_images=3), "test")
    seen = scenes.source.draw(1)[1:]
    assert scenes.labels[1] == seen[1][max(range(len(seen[0])), key=lambda i: seen[0][i].sum())]


# ==== SVM ==========================================================================================================

def test_vectors_and_average_precision_by_hand():
    rows = probe.unit_rows(np.array([[3, 4], [0, 0]], np.float32))
    assert rows.dtype == np.float64 and rows.tolist() == [[3 / 5.00001, 4 / 5.00001], [0, 0]]
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert probe.average_precision(scores, np.array([True, False, True, False])) == pytest.approx((1 + 2 / 3) / 2)
    # precision 0, 1/2, 2/3 is made falling: 2/3 everywhere
    assert probe.average_precision(scores, np.array([False, True, True, False])) == pytest.approx(2 / 3)
    assert probe.average_precision(scores[::-1], np.array([True, False, False, False])) == 0.25


@needs_sklearn
def test_the_choice_of_C_by_hand(tmp_path):
    from sklearn.metrics import average_precision_score
    from sklearn.svm import LinearSVC
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(2, 30, 6)).astype(np.float32)
    signs, test_signs = np.where(train[:, 0] + rng.normal(size=30) > 0, 1, -1), np.where(test[:, 0] > 0, 1, -1)
    signs[:3], test_signs[:3] = 0, 0
    costs = (0.01, 10, 1)
    found = probe.fit_svm(train, signs, test, test_signs, costs, 3, 7, tmp_path / "svm.json")
    x, y = probe.unit_rows(train), np.where(signs == 1, 1, -1)  # difficult: a negative of training

    def fit(cost, rows):
        return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=7).fit(
            x[rows], y[rows])

    fold = np.zeros(30, int)  # stratified, not shuffled: of each class the first third, the second, the third
    for sign in (1, -1):
        place = np.flatnonzero(y == sign)
        fold[place] = np.repeat(np.arange(3), [len(part) for part in np.array_split(place, 3)])
    means = {cost: np.mean([average_precision_score(y[fold == k], fit(cost, fold != k).decision_function(x[fold == k]))
                            for k in range(3)]) for cost in costs}
    best = max(means, key=means.get)
    assert found["C"] == best and found["cv"] == pytest.approx(means[best], abs=1e-9)
    scores = fit(best, slice(None)).decision_function(probe.unit_rows(test))
    counts = test_signs != 0  # difficult: no part of the test
    assert found["AP"] == pytest.approx(probe.average_precision(scores[counts], test_signs[counts] == 1), abs=1e-9)
    found["AP"] = 0.5
    (tmp_path / "svm.json").write_text(json.dumps(found))  # what is finished is not made again
    assert probe.fit_svm(train, signs, test, test_signs, costs, 3, 7, tmp_path / "svm.json") == found


@needs_sklearn
def test_svm_from_end_to_end(voc, tmp_path, capsys, monkeypatch):
    line = ["svm", "random", "b=random", *flags(TINY | {
        "data": "voc", "data_root": voc, "features": ("feat1", "mean"), "costs": (0.1, 1), "jobs": 1, "out": tmp_path,
        "cache": tmp_path / "cache"})]
    found = probe.main(line)
    assert found["table"]["random"] == found["table"]["b"] == {"feat1": 1.0, "mean": 1.0}  # colours: easy
    assert list(found["classes"]["b"]["mean"]) == ["cat", "dog"]
    assert json.loads((tmp_path / "metrics.json").read_text())["table"] == found["table"]
    printed = capsys.readouterr().out
    assert "left out, with fewer than 3 images to learn from or none to test on: rare" in printed
    assert "mAP of linear SVMs, 2 classes of voc, trainval -> test" in printed
    monkeypatch.setattr(probe, "fixed_batches", None)  # everything is there
    monkeypatch.setattr(probe, "unit_rows", None)
    assert probe.main(line)["table"] == found["table"]


def test_classes_of_voc_from_its_objects(tmp_path, capsys):
    """As its lists say them: 1 where an object counts, 0 where all are difficult, -1 where there is none."""
    year = tmp_path / "VOC2007"
    for folder in ("ImageSets/Main", "Annotations"):
        (year / folder).mkdir(parents=True)
    objects = {"a": [("cat", 0), ("cat", 1), ("dog", 1)], "b": [("dog", 0)], "c": [("cat", 1)]}
    for split, names in (("trainval", "ab"), ("test", "c")):
        (year / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            picture(year / "JPEGImages" / f"{name}.jpg", COLOURS["cat"], 1)
            corners = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
            boxes = "".join(f"<object><name>{kind}</name><difficult>{difficult}</difficult>{corners}</object>"
                            for kind, difficult in objects[name])
            (year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{boxes}</annotation>")
    train, test = classification.open_voc(year)
    assert train.classes == ("cat", "dog") and train.labels.tolist() == [[1, 0], [-1, 1]]
    assert test.labels.tolist() == [[0, -1]] and "labels are taken from the objects" in capsys.readouterr().out


def test_svm_without_scikit_learn(voc, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    assert "pip install scikit-learn" in fails(probe.main, ["svm", "random", "--data", voc])


# ==== Nearest neighbours and the cache =============================================================================

def test_nearest_and_votes_by_hand():
    train, test = fill("input:train", (23, 5)), fill("input:test", (7, 5))
    expected = F.normalize(torch.from_numpy(test)) @ F.normalize(torch.from_numpy(train)).T
    for block in (2**28, 100):  # all at once; 5 rows at once
        cosines, places = probe.nearest(train, test, 6, CPU, block)
        torch.testing.assert_close(cosines, expected.sort(descending=True).values[:, :6])
        assert torch.equal(expected.gather(1, places).round(decimals=5), cosines.round(decimals=5))
    cosines = torch.tensor([[0.9, 0.8, 0.8], [1.0, 0.5, 0.5]])
    labels = torch.tensor([[2, 0, 0], [2, 0, 0]])
    # e^(.9 / T) against 2 e^(.8 / T): at T = .07 e^(1/.7) = 4.2 against 2; at T = 1 1.1 against 2
    assert probe.vote(cosines, labels, 3, 0.07).tolist() == [2, 2]
    assert probe.vote(cosines, labels, 3, 1.0).tolist() == [0, 0]
    assert probe.vote(cosines, labels, 3, 1e-6).tolist() == [2, 2]


def test_features_are_computed_once(places, tmp_path, capsys, monkeypatch):
    """Again where the weights, the images or the file itself have changed; never half a file."""
    monkeypatch.setattr(probe, "open_backbone", functools.cache(probe.open_backbone))

    def computed(*names, **values):
        capsys.readouterr()
        found = probe.main(["knn", *map(str, names), *flags(TINY | {
            "data": "places365", "data_root": places, "features": "feat2", "k": (1, 3), "out": tmp_path,
            "cache": tmp_path / "c"} | values)])
        lines = capsys.readouterr().out.splitlines()
        return [line.split(" computed, in ")[0] for line in lines if " computed, in " in line], found

    new = ["random, 4 images of train: feat2", "random, 4 images of val: feat2"]
    old = ["random, 4 images of train: nothing", "random, 4 images of val: nothing"]
    lines, first = computed("random")
    assert lines == new and first["table"] == {"random feat2": {"k=1": 1.0, "k=3": 1.0}}
    assert computed("random") == (old, first)
    weights = common.Backbone("resnet18", (4,), "bn").body.state_dict()
    torch.save({"state_dict": weights}, tmp_path / "w.pth")
    assert computed(tmp_path / "w.pth")[0] == [line.replace("random", "w") for line in new]
    torch.save({"model": weights}, tmp_path / "v.pth")  # other bytes, the same weights
    assert computed(tmp_path / "v.pth")[0] == [line.replace("random", "v") for line in old]
    assert computed("random", image_size=64)[0] == new
    picture(places / "data_256" / "a" / "cat" / "00000000.jpg", (1, 2, 3), 9)
    assert computed("random")[0] == [new[0], old[1]]
    kept = sorted((tmp_path / "c").rglob("*.npy"), key=os.path.getmtime)
    kept[-1].write_bytes(kept[-1].read_bytes()[:-4])
    assert computed("random")[0] == [new[0], old[1]]
    assert not [path for path in (tmp_path / "c").rglob("*") if path.suffix in (".tmp", ".lock")]
    (places / "val_256" / "Places365_val_00000003.jpg").write_bytes(b"no picture")
    before = set((tmp_path / "c").rglob("*"))
    with pytest.raises(UserError, match="Repair or remove the file"):
        computed("random")
    assert not {path for path in set((tmp_path / "c").rglob("*")) - before if path.suffix == ".npy"}


# ==== Linear classifiers ===========================================================================================

def test_recipes():
    def values(*words):
        cfg = probe.parse(["linear", "random", *words])[1]
        return cfg.epochs, cfg.lr_drops, cfg.lr, cfg.weight_decay, cfg.views, cfg.features[-1], len(cfg.features)

    assert values("--data", "imagenet") == (90, (30, 60), 0.01, 1e-4, "colours", "feat5", 5)
    assert values("--features", "mean") == (100, (60, 80), 30.0, 0.0, "plain", "mean", 1)
    assert values("--data", "places365") == (56, (14, 28, 42), 0.01, 1e-4, "places", "unpool", 6)
    assert values("--epochs", "9") == (9, (3, 6), 0.01, 1e-4, "colours", "feat5", 5)
    assert probe.parse(["linear", "a/my.pth.tar", "--data", "imagenet"])[1].out == "out/probe-linear-imagenet-my"
    assert probe.parse(["svm", "x/last.pt", "imagenet"])[1].checkpoints == ("x/last.pt", "imagenet")
    cfg = probe.parse(["svm", "random"])[1]
    assert (cfg.data, cfg.out, len(cfg.costs), cfg.costs[-1]) == ("voc", "out/probe-svm-voc", 19, 0.5 ** 19)
    assert probe.parse(["segment", "random", "--data", "voc"]) == ("segment", ["random", "--data", "voc"])


def test_a_step_of_a_head_by_hand():
    """BatchNorm without affine before a pooled map, none before `unpool`; Nesterov's momentum; decay of all weights."""
    cfg = config("linear", features=("feat4", "unpool"), lr=0.1, weight_decay=0.01)
    model = probe.build_model(cfg, 3).train()
    assert not any(p.requires_grad for p in model.backbone.parameters()) and not model.backbone.training
    images, labels = torch.from_numpy(fill("input:i", (4, 3, 32, 32))), torch.tensor([0, 2, 1, 2])
    batch = {"images": images, "labels": labels}
    x = probe.extract(model.backbone, images, ["feat4", "unpool"])
    x["feat4"] = (x["feat4"] - x["feat4"].mean((0, 2, 3), keepdim=True)) / (
        x["feat4"].var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected, losses = {}, {}
    for feature, value in x.items():
        value, head = value.flatten(1), model.heads[feature]
        weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
        assert weight.std() == pytest.approx(0.01, rel=0.05) and not bias.any()
        velocity = 0, 0
        for _ in range(2):
            logits = value @ weight.T + bias
            losses[feature] = F.cross_entropy(logits, labels)
            error = (logits.softmax(1) - F.one_hot(labels, 3)) / 4
            gradient = error.T @ value + 0.01 * weight, error.sum(0) + 0.01 * bias
            velocity = [0.9 * v + g for v, g in zip(velocity, gradient)]
            weight, bias = (p - 0.1 * (g + 0.9 * v) for p, g, v in zip((weight, bias), gradient, velocity))
        expected[feature] = weight, bias
    optimizer = probe.build_optimizer(cfg, model)
    for _ in range(2):
        terms = probe.train_step(cfg, model, optimizer, [batch], CPU)
    assert terms["loss"].item() == pytest.approx(sum(losses.values()).item(), rel=1e-4)
    for feature, (weight, bias) in expected.items():
        torch.testing.assert_close(model.heads[feature].weight, weight, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(model.heads[feature].bias, bias, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(terms["loss_unpool"], losses["unpool"], atol=1e-5, rtol=1e-4)
    assert not probe.build_optimizer(config("linear", features="mean"), model).defaults["nesterov"]
    halves = [{name: value[part] for name, value in batch.items()} for part in (np.s_[:2], np.s_[2:])]
    one, two = (probe.train_step(cfg, model.eval(), torch.optim.SGD(model.heads.parameters(), 0.0), part, CPU)
                for part in ([batch], halves))
    assert one["loss"].item() == pytest.approx(two["loss"].item(), rel=1e-5)
    assert one["grad_norm"].item() == pytest.approx(two["grad_norm"].item(), rel=1e-4)


def test_accuracies_by_hand(monkeypatch):
    """Class i of 7 ranks i-th of the logits: 1 of 7 right, 5 of 7 among the first five."""
    scenes = data.SyntheticScenes(7)
    images = classification.LabelledImages(scenes, {scenes.key(i): i for i in range(7)}, "abcdefg", "test")
    monkeypatch.setattr(probe, "fixed_batches", lambda *_: (torch.zeros(n, 3, 2, 2) for n in (4, 3)))
    model = torch.nn.Module()
    model.forward = lambda x: {"mean": -torch.arange(7.0).expand(len(x), 7)}
    found = probe.accuracies(config("linear", features="mean"), model, images, CPU)
    assert found == {"mean": {"top1": pytest.approx(1 / 7), "top5": pytest.approx(5 / 7)}}


def test_linear_from_end_to_end_and_resumed(folders, tmp_path, capsys):
    """The same weights to the bit whether the run was stopped or not; what it learned is measured on val/."""
    values = TINY | {"data": folders, "features": ("feat1", "feat4"), "batch_size": 4, "epochs": 3, "save_every": 2}
    whole = probe.main(["linear", "random", *flags(values | {"out": tmp_path / "a"})])
    probe.main(["linear", "random", *flags(values | {"out": tmp_path / "b", "max_steps": 5})])
    resumed = probe.main(["linear", "random", *flags(values | {"out": tmp_path / "b"})])
    assert resumed == whole and whole["steps"] == 12 and whole["feat1"] == {"top1": 1.0, "top5": 1.0}
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in "ab")
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    printed = capsys.readouterr().out
    assert "the backbone starts random: and it is FROZEN" in printed and "continuing the run" in printed
    assert probe.main(["linear", "random", *flags(values | {"out": tmp_path / "a"})]) == json.loads(
        (tmp_path / "a" / "metrics.json").read_text())
    found = convert.open_checkpoint(tmp_path / "a")  # the backbone is in it, as it was
    assert all(torch.equal(found.resnet()[name], value) for name, value in probe.open_backbone(
        "random", "resnet18", 42, ("feat4",)).body.state_dict().items())


def test_every_number_has_a_range_that_ends():
    for config in probe.TASKS.values():
        for name, hint in typing.get_type_hints(config, include_extras=True).items():
            plain, bounds, _ = run._split_hint(hint)
            plain = typing.get_args(plain)[0] if typing.get_origin(plain) is tuple else plain
            assert plain not in (int, float) or bounds.high < 2**63, name


# ==== What is wrong ================================================================================================

@pytest.mark.parametrize(("words", "text"), (
    (["linear", "--data", "imagenet"], "what is to be probed? Name it right behind: probe.py linear CHECKPOINT"),
    (["linear", "random", "imagenet"], "a run has one checkpoint"),
    (["linear", "random", "--features", "mean", "feat5"], "mean is MoCo's protocol"),
    (["linear", "random", "--batch_size", "4", "--accumulate", "4"], "--batch_size 4: one image per process"),
    (["knn", "random", "random", "--preset", "demo"], "checkpoints called random, random: give names of their own"),
    (["knn", "random", "--k", "5", "5"], "--k 5 5: one of them stands there twice"),
    (["knn", "random", "--preset", "demo", "--synthetic_images", "3"], "--k 20: there are 3 images"),
    (["svm", "random", "--costs", "0"], "--costs 0.0: must be above 0"),
    (["knn", "random", "--temperature", "nan"], "--temperature nan: must be above 0"),
    (["knn", "random", "--data", "nowhere"], "--data nowhere: no folder with train/<class>/"),
    (["knn", "random", "--data", "voc"], "that is for probe.py svm"),
    (["linear", "random", "--data", "places365", "--data_root", "nowhere"], "places365_train_standard.txt"),
    (["colour", "random"], "invalid choice: 'colour'"),
    (["knn", "moco_v2", "--preset", "demo", "--synthetic_images", "20"], "moco_v2_200")))
def test_refused(words, text, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert text in fails(probe.main, words)
    assert not list(tmp_path.iterdir())


def test_layouts_that_are_not_as_published(folders, voc, places, tmp_path, fails, monkeypatch):
    def line(task, folder, *more):
        return fails(probe.main, [task, "random", "--data", folder, *more, *flags(TINY), "--out", tmp_path / "o"])

    flat = tmp_path / "flat"
    for name in COLOURS:
        picture(flat / "train" / name / "0.JPEG", (9, 9, 9), 0)
    assert "no val/ to test on" in line("knn", flat)
    picture(flat / "val" / "ILSVRC2012_val_00000001.JPEG", (9, 9, 9), 0)
    assert "has no class folders" in line("linear", flat) and "valprep.sh" in line("knn", flat)
    picture(flat / "val" / "bird" / "0.JPEG", (9, 9, 9), 0)
    assert "1 of its class folders are not in" in line("knn", flat)
    root = "places365", "--data_root", places
    for text, message in (("/a/x/1.jpg 0\n", "is not in"), ("/a/cat\n", "line 1: '/a/cat' is not a name and a number"),
                          ("/a/cat/00000000.jpg -1\n", "is no class")):
        (places / "places365_train_standard.txt").write_text(text)
        assert message in line("knn", *root)
    (places / "data_256").rename(places / "elsewhere")
    assert "none of data_256, data_256_standard, data_large" in line("knn", *root)
    main = voc / "VOC2007" / "ImageSets" / "Main"
    kept = (main / "dog_test.txt").read_text()
    (main / "dog_test.txt").write_text(kept.replace(" -1", "  2", 1))
    monkeypatch.setattr(probe, "svm_parts", lambda: (None, None, None))
    assert "dog_test.txt: has no line with 1, 0 or -1 for " in line("svm", voc)
    (main / "dog_test.txt").write_text(kept)
    bare = tmp_path / "bare" / "ImageSets" / "Main"
    bare.mkdir(parents=True)
    (tmp_path / "bare" / "JPEGImages").mkdir()
    assert "VOCtrainval_06-Nov-2007.tar" in line("svm", tmp_path / "bare")


def test_a_backbone_that_ends_early(tmp_path, fails):
    torch.save({"state_dict": common.Backbone("resnet18", (2,), "bn").body.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(UserError):
        probe.open_backbone(str(tmp_path / "w.pth"), "resnet18", 0, ("feat5",))


def test_one_process_for_svm_and_knn(fails, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in fails(probe.main, ["knn", "random", "--preset", "demo"])
    assert run.EXIT_STOPPED == 75  # a signal in the middle: what is in the cache stays
