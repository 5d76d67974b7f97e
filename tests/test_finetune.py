"""finetune.py: what a checkpoint's head means, recipes, its step on one and two processes,
and whole runs on small labelled sets."""
import dataclasses
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, flags, small_config
from fill import fill
from PIL import Image
from pycocotools.coco import COCO
from test_detreg import pieces, same_step

import common
import convert
import data
import detectors
import detreg
import evaluation
import finetune
import run
import siamese_detr
import updetr
from common import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = 3


def tensor(name, *shape):
    return torch.from_numpy(fill(f"input:{name}", shape))


DETECTORS = ("detr", "conditional_detr", "deformable_detr_ss", "deformable_detr")


def build(rows, focal=True, **values):
    torch.manual_seed(5)
    cfg = small_config(finetune.Config, num_feature_levels=LEVELS, **values)
    return detectors.build_detector(cfg, rows, focal=focal)


# ==== Heads, architecture, recipes =================================================================================

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def init(content, state):
    """A checkpoint as finetune.build_model takes it, without a file."""
    return convert.Checkpoint("FILE", "detector", state, {}, content)


def test_categories_of_rows():
    ours = [{"id": 7, "name": "tram"}, {"id": 300, "name": "a b"}, {"id": 301, "name": "ü"}]
    own = {"categories": [{"id": 1, "name": "ü"}, {"id": 2, "name": "tram"}, {"id": 3, "name": "a b"}]}
    assert finetune.categories_of_rows(own, 3, ours) == [2, 0, 1]  # by name, whatever the ids and the order
    assert finetune.categories_of_rows({"categories": ours}, 3, ours) == [0, 1, 2]
    assert finetune.categories_of_rows({"categories": ours[:2]}, 2, ours) is None  # a category has no row
    assert finetune.categories_of_rows({"categories": [*ours[:2], {"id": 4, "name": "car"}]}, 3, ours) is None
    coco = [{"id": i, "name": f"c{i}"} for i in COCO_IDS]
    rows = finetune.categories_of_rows({}, 91, coco)
    assert len(COCO_IDS) == 80 and len(rows) == 91 and sum(r == -1 for r in rows) == 11 and rows[0] == rows[12] == -1
    assert (all(rows[i] == place for place, i in enumerate(COCO_IDS)) and rows[1] == 0
            and rows[13] == 11 and rows[90] == 79)
    voc = [{"id": i + 1, "name": f"v{i}"} for i in range(20)]
    assert finetune.categories_of_rows({}, 21, voc) == [*range(20), -1]
    for n, categories in ((91, voc), (21, coco), (20, voc), (3, ours), (91, coco[:79])):
        assert finetune.categories_of_rows({}, n, categories) is None


def test_categories_of_one_name():
    """Ids are the keys; names count where no other category has them, on either side."""
    balls = [{"id": 0, "name": "ball"}, {"id": 1, "name": "ball"}, {"id": 2, "name": "bat"}]
    rows = functools.partial(finetune.categories_of_rows, {"categories": balls}, 3)
    assert rows(balls) == [0, 1, 2] and rows(balls[::-1]) == [2, 1, 0]
    assert rows([balls[0], balls[1], {"id": 9, "name": "bat"}]) == [0, 1, 2]
    moved = [{"id": 5, "name": "ball"}, {"id": 6, "name": "ball"}, {"id": 9, "name": "bat"}]
    assert rows(moved) is None and rows(moved, partly=True) == [-1, -1, 2]
    assert rows([{"id": 5, "name": "ball"}], partly=True) is None  # which of the two?
    swapped = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    assert finetune.categories_of_rows({"categories": swapped}, 2, [{"id": 2, "name": "a"}, {"id": 1, "name": "b"}]
                                       ) == [0, 1]
    some = [{"id": 1, "name": "car"}, {"id": 2, "name": "tractor"}, {"id": 3, "name": "person"}]
    found = finetune.categories_of_rows({}, 91, some, partly=True)  # a released head, by COCO's names
    assert {row: i for row, i in enumerate(found) if i >= 0} == {1: 2, 3: 0}
    assert finetune.categories_of_rows({}, 91, some) is None and finetune.categories_of_rows({}, 5, some, True) is None


def test_adopted_architecture(tmp_path):
    model = build(3, with_box_refine=True, enc_layers=2)
    run.save_checkpoint(tmp_path / "c.pt", model, None, 0, small_config(detreg.Config, nheads=4), script="detreg")
    checkpoint, arch = finetune.read_init(tmp_path / "c.pt")
    assert (all(torch.equal(v, checkpoint.state[k]) for k, v in model.state_dict().items())
            and len(checkpoint.state) == len(model.state_dict()))
    cfg = finetune.Config(init_from="c.pt", lr=0.5)
    adopted = finetune.adopt_architecture(cfg, arch, {"lr", "data"})
    expected = dict(arch="resnet18", hidden_dim=64, nheads=4, enc_layers=2, dec_layers=2, dim_feedforward=32,
                    num_queries=8, num_feature_levels=3, with_box_refine=True, backbone_norm="frozen")
    assert adopted == dataclasses.replace(cfg, **expected)  # and nothing else has changed
    agreeing = dataclasses.replace(cfg, num_queries=8, nheads=4)
    assert finetune.adopt_architecture(agreeing, arch, {"num_queries", "nheads"}).num_queries == 8
    with pytest.raises(UserError,
                       match=r"^c\.pt .*--arch resnet50 \(it has resnet18\), --num_queries 300 \(it has 8\); leave"):
        finetune.adopt_architecture(cfg, arch, {"num_queries", "arch"})
    with pytest.raises(UserError, match=r"--nheads 8 \(it has 4\)"):
        finetune.adopt_architecture(cfg, arch, {"nheads"})


def test_heads_that_are_kept_and_made_anew(tmp_path):
    categories = [{"id": 1, "name": "a"}, {"id": 9, "name": "b"}]
    cfg = small_config(finetune.Config, num_feature_levels=LEVELS, init_from="f")
    old = build(2)
    torch.nn.init.normal_(old.class_embed[0].weight)
    state, own = old.state_dict(), {"categories": categories}
    model, mapped = finetune.build_model(cfg, init(own, state), categories)
    # the same classes: everything is kept
    assert mapped == [0, 1] and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model, mapped = finetune.build_model(cfg, init({}, state), [*categories, {"id": 10, "name": "c"}])
    assert mapped == [0, 1, 2] and model.class_embed[0].weight.shape == (3, 64)
    assert (model.class_embed[0].bias == -np.float32(np.log(99))).all()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "class_embed" not in k)
    only = dataclasses.replace(cfg, eval_only=True)
    with pytest.raises(UserError, match="classifier has 2 rows.*--class_agnostic"):
        finetune.build_model(only, init({}, state), [{"id": 1, "name": "x"}])
    model, mapped = finetune.build_model(dataclasses.replace(only, class_agnostic=True), init({}, state),
                                         [{"id": 1, "name": "x"}])
    assert mapped == [0, 1] and torch.equal(model.class_embed[0].weight, old.class_embed[0].weight)
    pretext = {**state, "feature_embed.layers.0.bias": torch.zeros(64)}
    assert finetune.build_model(dataclasses.replace(only, class_agnostic=True), init({}, pretext),
                                categories)[1] == [-1, -1]


def test_training_with_the_categories_in_another_order():
    categories, old = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}], build(2)
    torch.nn.init.constant_(old.class_embed[0].bias[:1], 5.0)  # row 0 is "a"
    cfg = small_config(finetune.Config, num_feature_levels=LEVELS, init_from="f")
    model, mapped = finetune.build_model(cfg, init({"categories": categories}, old.state_dict()), categories[::-1])
    assert mapped == [0, 1] and model.class_embed[0].bias[0] < 0  # row 0 is label 0, "b", now


@pytest.mark.parametrize("eval_only", (False, True))
def test_pretext_head_of_91_rows_is_no_coco_head(eval_only):
    coco = [{"id": i, "name": f"c{i}"} for i in COCO_IDS]
    cfg = small_config(finetune.Config, num_feature_levels=LEVELS, init_from="f", eval_only=eval_only)
    torch.manual_seed(0)
    old = detreg.DETReg(detectors.build_detector(cfg, 91, focal=True), embedding_dim=16)
    torch.nn.init.constant_(old.detector.class_embed[0].bias, 7.0)
    if eval_only:
        with pytest.raises(UserError, match="fine-tune it first"):
            finetune.build_model(cfg, init({}, old.state_dict()), coco)
    else:
        model, mapped = finetune.build_model(cfg, init({}, old.state_dict()), coco)
        assert mapped == list(range(80)) and (model.class_embed[0].bias == -np.float32(np.log(99))).all()


def test_detections_of_a_permuted_head():
    logits = torch.tensor([[3.0, -9, 1], [-9, 2, -9]])
    found = finetune.category_detections(logits, torch.tensor([[1.0, 2, 5, 8], [0, 0, 4, 4]]), [1, -1, 0],
                                         [70, 300], 55, softmax=False)
    assert ([(d["category_id"], d["bbox"], d["image_id"]) for d in found[:2]]
            == [(300, [1, 2, 4, 6], 55), (70, [1, 2, 4, 6], 55)])
    assert [d["score"] for d in found[:2]] == pytest.approx([1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-1))])
    assert len(found) == 4  # row 1 is no category
    # softmax: a query has one class, the best that is not "no object"
    rows = torch.tensor([[3.0, -9, 1, 9], [-9, 2, -9, 0], [0, 0, 1, -5]])
    found = finetune.category_detections(rows, torch.tensor([[1.0, 2, 5, 8], [0, 0, 4, 4], [0, 0, 2, 2]]), [1, -1, 0],
                                         [70, 300], 55, softmax=True)
    assert [(d["category_id"], d["bbox"]) for d in found] == [(300, [1, 2, 4, 6]), (70, [0, 0, 2, 2])]
    p = np.exp(rows.numpy()) / np.exp(rows.numpy()).sum(1, keepdims=True)
    assert [d["score"] for d in found] == pytest.approx([p[0, 0], p[2, 2]])


@pytest.mark.parametrize(("values", "expected"), (
    ({"data": "coco"}, (50, 40, 32)), ({"data": "voc"}, (100, 70, 32)),
    ({"data": "voc", "labels_percent": 10}, (200, 150, 8)), ({"data": "coco", "labels_percent": 1}, (2000, 2000, 24)),
    ({"data": "coco", "labels_percent": 2}, (1000, 1000, 24)),
    ({"data": "coco", "labels_percent": 5}, (500, 500, 24)), ({"data": "coco", "labels_percent": 10}, (400, 400, 24)),
    ({"data": "coco", "labels_percent": 2, "protocol": "semi_supervised"}, (200, 150, 24)),
    ({"data": "coco", "labels_percent": 10, "protocol": "semi_supervised"}, (100, 40, 24)),
    ({"data": "coco", "labels_percent": 1, "protocol": "low_data"}, (150, 150, 24)),
    ({"data": "some/folder", "labels_percent": 1}, (50, 40, 32)),
    ({"data": "coco", "labels_percent": 1, "epochs": 3, "lr_drop": 2, "batch_size": 4}, (3, 2, 4))))
def test_recipes(values, expected):
    cfg = run.parse_config(finetune.Config, finetune.PRESETS, flags(values), script="finetune", description="",
                           recipe=finetune.recipe_of)
    assert (cfg.epochs, cfg.lr_drop, cfg.batch_size) == expected


def test_long_schedules_and_difficult_objects():
    def recipe(method=None, **values):
        return finetune.recipe_of(dataclasses.asdict(finetune.Config()) | values, method=method)

    long = recipe(data="coco", detector="detr", protocol="detr_long")
    assert [long[k] for k in ("epochs", "lr_drop", "batch_size", "lr", "lr_backbone")] == [500, 400, 64, 1e-4, 1e-5]
    for schedule, steps, drops in (("1x", 90, None), ("2x", 180, None), ("4x", 360, None), ("3x", 270, (210, 250)),
                                   ("9x", 810, (750, 790))):
        found = recipe(data="coco", detector="faster_rcnn_fpn", schedule=schedule)
        drops = drops or (steps * 2 / 3, steps * 8 / 9)
        shares = found.get("lr_drops", finetune.Config().lr_drops)
        assert found["steps"] == 1000 * steps and [share * steps for share in shares] == pytest.approx(drops)
    # Deformable DETR on VOC is DETReg's, but for the checkpoints of UP-DETR and Siamese DETR
    assert [recipe(method, data="voc").get("difficult", "ignore") for method in ("detreg", "updetr", "siamese_detr")
            ] == ["ignore", "count", "count"]
    for values in ({"data": "voc", "detector": "faster_rcnn_c4"}, {"data": "coco", "detector": "detr"}):
        assert "difficult" not in recipe("updetr", **values)


DETR, DEFORMABLE = (1e-4, 5e-5, 2048, 100), (2e-4, 2e-5, 1024, 300)  # rates, feed-forward width, queries


@pytest.mark.parametrize(("detector", "data", "flag", "schedule"), (
    ("detr", "coco", {}, (150, 100)), ("detr", "voc", {}, (150, 100)), ("detr", "some/folder", {}, (150, 100)),
    ("detr", "coco", {"protocol": "updetr_long"}, (300, 200)), ("detr", "voc", {"protocol": "updetr_long"}, (300, 200)),
    ("detr", "coco", {"protocol": "siamese"}, (150, 120)), ("detr", "voc", {"protocol": "siamese"}, (50, 40)),
    ("detr", "voc", {"protocol": "siamese", "labels_percent": 30}, (50, 40)),
    ("detr", "voc", {"protocol": "siamese_long"}, (150, 120)),
    ("conditional_detr", "coco", {}, (50, 40)), ("conditional_detr", "voc", {}, (50, 40)),
    ("conditional_detr", "coco", {"protocol": "siamese"}, (50, 40)),
    ("conditional_detr", "voc", {"protocol": "siamese"}, (50, 40)), ("deformable_detr", "coco", {}, (50, 40)),
    ("deformable_detr", "voc", {}, (100, 70)), ("deformable_detr_ss", "coco", {}, (50, 40)),
    ("deformable_detr_ss", "voc", {}, (100, 70)), ("deformable_detr_ss", "voc", {"labels_percent": 10}, (200, 150)),
    ("deformable_detr", "voc", {"labels_percent": 30}, (100, 70)),
    ("deformable_detr", "coco", {"protocol": "siamese"}, (50, 40)),
    ("deformable_detr", "voc", {"protocol": "siamese"}, (50, 40)),
    ("deformable_detr_ss", "voc", {"protocol": "siamese", "labels_percent": 10}, (50, 40))))
def test_recipes_of_the_detectors(detector, data, flag, schedule):
    def parse(**values):
        return run.parse_config(finetune.Config, finetune.PRESETS, flags(values), script="finetune", description="",
                                recipe=finetune.recipe_of)

    cfg = parse(detector=detector, data=data, **flag)
    assert (cfg.epochs, cfg.lr_drop) == schedule
    assert cfg.batch_size == (8 if schedule == (200, 150) else 32)
    assert ((cfg.lr, cfg.lr_backbone, cfg.dim_feedforward, cfg.num_queries)
            == (DEFORMABLE if detector.startswith("deformable") else DETR))
    assert ((cfg.lambda_f, cfg.lambda_l1, cfg.lambda_giou, cfg.pre_norm)
            == (1.0 if detector == "detr" else 2.0, 5, 2, False))
    by_detreg = detector.startswith("deformable") and "protocol" not in flag
    assert cfg.difficult == ("count" if data == "voc" and not by_detreg else "ignore")
    only = parse(detector=detector, data=data, eval_only="true", init_from="x", **flag)
    assert (only.out == ("out/finetune-folder" if "/" in data else f"out/finetune-{data}")
            and only.num_queries == cfg.num_queries)


# ==== Checkpoints of the pretraining methods =======================================================================

METHODS = {"detreg": detreg, "updetr": updetr, "siamese_detr": siamese_detr}
PRETEXT_HEADS = {"detreg": ("feature_embed",), "updetr": ("patch2query", "feature_align"),
                 "siamese_detr": ("patch2query", "feature_align", "enc_head")}


def save_pretrained(path, method, detector, **values):
    """A small checkpoint as the script saves it; returns (its tensors, configuration)."""
    own = {"detreg": {}, "updetr": {"num_patches": 4}, "siamese_detr": {"num_regions": 4}}[method]
    cfg = small_config(METHODS[method].Config, **{"num_feature_levels": LEVELS, "detector": detector,
                                                  "backbone_weights": "random", **own, **values})
    model = METHODS[method].build_models(cfg)[0]
    heads = model.detector.class_embed
    for head in heads if isinstance(heads, torch.nn.ModuleList) else [heads]:
        torch.nn.init.normal_(head.weight, std=0.2)
    run.save_checkpoint(path, model, None, 0, cfg, script=method)
    return torch.load(path, weights_only=True)["model"], cfg


def load(path, categories, **values):
    checkpoint, arch = finetune.read_init(str(path))
    cfg = finetune.adopt_architecture(finetune.Config(init_from=str(path), **values), arch, set())
    return cfg, *finetune.build_model(cfg, checkpoint, categories)


CATEGORIES = [{"id": 7, "name": "a"}, {"id": 9, "name": "b"}, {"id": 300, "name": "c"}, {"id": 301, "name": "d"}]


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("method", METHODS)
def test_pretrained_checkpoints(method, detector, tmp_path, capsys):
    state, old = save_pretrained(tmp_path / "last.pt", method, detector)
    capsys.readouterr()
    cfg, model, mapped = load(tmp_path / "last.pt", CATEGORIES)
    printed = capsys.readouterr().out
    same = ["detector", "arch", "hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward",
            "num_queries", "backbone_norm"]
    same += (["num_feature_levels", "with_box_refine"] if detector == "deformable_detr"
             else ["pre_norm"] if detector == "detr" else [])
    assert {k: getattr(cfg, k) for k in same} == {k: getattr(old, k) for k in same}
    assert cfg.pre_norm == (method != "siamese_detr" and detector == "detr")  # read off the file
    own, dropped = model.state_dict(), [k for k in state if k.startswith((*PRETEXT_HEADS[method], "class_embed"))]
    assert (own.keys() - state.keys() == set()
            and state.keys() - own.keys() == {k for k in dropped if not k.startswith("class_embed")})
    assert all(torch.equal(v, state[k]) for k, v in own.items() if not k.startswith("class_embed"))
    for name in dropped:  # every tensor that is left out is named
        assert f" {name}," in printed or f" {name}\n" in printed, name
    for prefix in PRETEXT_HEADS[method]:
        assert any(k.startswith(prefix) for k in dropped)
    assert (f"loaded {len(state) - len(dropped)} tensors from {tmp_path / 'last.pt'}" in printed
            and f"made anew for {len(CATEGORIES)} categories" in printed)
    head = model.class_embed if isinstance(model.class_embed, torch.nn.Linear) else model.class_embed[0]
    assert mapped == [0, 1, 2, 3] and head.out_features == (5 if detector == "detr" else 4)  # DETR: and "no object"
    assert (head.bias == -np.float32(np.log(99))).all() == (detector != "detr")


@pytest.mark.parametrize("detector", ("detr", "conditional_detr"))
def test_queries_of_a_single_query_checkpoint_are_made_anew(detector, tmp_path, capsys):
    state, _ = save_pretrained(tmp_path / "last.pt", "updetr", detector, num_patches=1, num_queries=3)
    capsys.readouterr()
    cfg, model, _ = load(tmp_path / "last.pt", CATEGORIES, num_queries=100)  # what recipe_of says of these detectors
    assert cfg.num_queries == finetune.recipe_of(vars(cfg))["num_queries"] == 100
    assert model.query_embed.weight.shape == (100, 64) and 0.9 < model.query_embed.weight.std() < 1.1
    assert ("queries of a single-query checkpoint, made anew for 100 queries: query_embed.weight\n"
            in capsys.readouterr().out)
    assert all(torch.equal(v, state[k])
               for k, v in model.state_dict().items() if not k.startswith(("class_embed", "query_embed")))
    # nothing in the file speaks against another number
    cfg, model, _ = load(tmp_path / "last.pt", CATEGORIES, num_queries=7)
    assert cfg.num_queries == 7 and model.query_embed.weight.shape == (7, 64)


def test_checkpoint_of_another_detector(fails, tmp_path):
    for mine, wanted in (("detr", "deformable_detr"), ("conditional_detr", "detr"),
                         ("deformable_detr_ss", "conditional_detr"), ("deformable_detr", "deformable_detr_ss")):
        save_pretrained(tmp_path / "last.pt", "siamese_detr", mine)
        line = fails(finetune.main, ["--data", "synthetic", "--init_from", tmp_path / "last.pt", "--detector", wanted,
                                     "--out", tmp_path / "out"])
        assert (f"last.pt: this is a {convert.NAMES[mine]} checkpoint with 8 queries; "
                f"--detector is {wanted}. Give --detector {mine} or leave" in line)
    assert not (tmp_path / "out").exists()


def test_rows_of_a_detr_head(tmp_path):
    cfg = small_config(finetune.Config, detector="detr", backbone_weights="random")
    model, mapped = finetune.build_model(cfg, None, CATEGORIES)  # from scratch
    assert model.class_embed.weight.shape == (5, 64) and mapped == [0, 1, 2, 3]
    coco = [{"id": i, "name": f"c{i}"} for i in COCO_IDS]
    old = build(92, focal=False, detector="detr")  # a released one: 91 COCO ids and "no object"
    torch.nn.init.normal_(old.class_embed.bias)
    cfg, state = dataclasses.replace(cfg, init_from="f"), old.state_dict()
    model, mapped = finetune.build_model(dataclasses.replace(cfg, eval_only=True), init({}, state), coco)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and len(mapped) == 91
    logits = torch.full((4, 92), -5.0)
    logits[0, 13], logits[1, 12], logits[2, 91], logits[3, 90] = 4.0, 4.0, 4.0, 2.0
    logits[2, 1] = 1.0
    boxes = torch.arange(16.0).view(4, 4)
    found = finetune.category_detections(logits, boxes, mapped, COCO_IDS, 5, softmax=True)
    # id 12 is none; "no object" keeps its best class
    assert [(d["category_id"], d["bbox"][0]) for d in found] == [(13, 0), (1, 8), (90, 12)]
    p = (logits[2].double().exp() / logits[2].double().exp().sum())[1].item()
    assert found[1]["score"] == pytest.approx(p, rel=1e-5)
    # to train on: one row per category, "no object" stays last
    model, mapped = finetune.build_model(cfg, init({}, state), coco)
    assert mapped == list(range(80)) and model.class_embed.weight.shape == (81, 64)
    for mine, theirs in (*enumerate(COCO_IDS), (80, 91)):
        assert torch.equal(model.class_embed.weight[mine], old.class_embed.weight[theirs])
        assert model.class_embed.bias[mine] == old.class_embed.bias[theirs]
    ours = {"categories": CATEGORIES}
    five = build(5, focal=False, detector="detr").state_dict()
    turned = finetune.build_model(cfg, init(ours, five), CATEGORIES[::-1])[0]
    assert torch.equal(turned.class_embed.weight, five["class_embed.weight"][[3, 2, 1, 0, 4]])


# ==== The step =====================================================================================================

COUNTS = (3, 1, 7, 0)


def step_case():
    images, mask = tensor("step_images", 4, 3, 32, 48), torch.zeros(4, 32, 48, dtype=torch.bool)
    mask[1, 24:], mask[2, :, 30:] = True, True
    images = images.masked_fill(mask[:, None], 0.0)
    targets = [{"labels": torch.arange(n) % 4, "boxes": tensor(f"step_boxes{i}", n, 4).mul(0.5).sigmoid()}
               for i, n in enumerate(COUNTS)]
    return {"images": images, "mask": mask, "targets": targets}


@functools.cache
def one_step(start=0, stop=4, accumulate=1, detector="deformable_detr"):
    cfg = small_config(finetune.Config, clip_max_norm=0.0, accumulate=accumulate, num_queries=6,
                       num_feature_levels=LEVELS, detector=detector)
    model = build(4 + (detector == "detr"), focal=detector != "detr", num_queries=6,
                  with_box_refine=True, detector=detector)
    for bbox in model.bbox_embed if detector.startswith("deformable") else [model.bbox_embed]:
        torch.nn.init.normal_(bbox.layers[-1].weight, std=0.05)
    micro_batches = pieces(step_case(), start, stop, accumulate)
    wrapped = common.wrap_model(model.train(), CPU)
    terms = finetune.train_step(cfg, wrapped, finetune.build_criterion(cfg),
                                common.build_optimizer(cfg, model), micro_batches, CPU)
    return ({k: v.item() for k, v in terms.items()},
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def worker():
    """What one of two processes does (conftest.two_processes)."""
    r = common.rank()
    return {(a, detector): one_step(2 * r, 2 * r + 2, a, detector) for a in (1, 2)
            for detector in ("deformable_detr", "detr")}


@pytest.mark.parametrize("detector", ("deformable_detr", "detr"))
def test_accumulation_is_one_batch(detector):
    for accumulate in (2, 4):
        same_step([one_step(accumulate=accumulate, detector=detector)], one_step(detector=detector))


@pytest.mark.parametrize("detector", ("deformable_detr", "detr"))
def test_two_processes_are_one_batch(two_processes, detector):
    """DETR: also the weighted mean of the cross-entropy, though the images have different numbers of boxes."""
    for accumulate in (1, 2):
        same_step([r[accumulate, detector] for r in two_processes["test_finetune"]], one_step(detector=detector))


@pytest.mark.parametrize(("detector", "refine"),
                         (*((detector, False) for detector in DETECTORS), ("deformable_detr", True)))
def test_a_frozen_detector_learns_with_its_heads_only(detector, refine):
    cfg = small_config(finetune.Config, detector=detector, freeze_detector=True, backbone_norm="bn", dropout=0.3,
                       num_feature_levels=LEVELS, with_box_refine=refine, weight_decay=0.1, lr=0.01)
    model = build(5, focal=detector != "detr",
                  **{k: getattr(cfg, k) for k in ("detector", "backbone_norm", "dropout", "with_box_refine")})
    finetune.freeze(model)
    before, batch = {k: v.clone() for k, v in model.state_dict().items()}, step_case()
    finetune.train_mode(cfg, model)
    with torch.no_grad():  # no dropout, no batch statistics
        outputs = [model(batch["images"][:k], batch["mask"][:k])["hs"][:1] for k in (2, 2, 4)]
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2], atol=1e-5, rtol=1e-4)
    finetune.train_step(cfg, model, finetune.build_criterion(cfg), common.build_optimizer(cfg, model), [batch], CPU)
    after = model.state_dict()
    for name, value in after.items():
        head = name.startswith(("class_embed.", "bbox_embed.", "transformer.decoder.bbox_embed."))
        assert head or torch.equal(value, before[name]), name
    last = "bbox_embed.layers.2.weight" if not detector.startswith("deformable") else "bbox_embed.1.layers.2.weight"
    assert not torch.equal(after[last], before[last]), "the box head has not learned"
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for head in (model.class_embed, model.bbox_embed) for p in head.parameters()}
    finetune.train_mode(dataclasses.replace(cfg, freeze_detector=False), model)
    # nothing of it learns any more
    assert all(module.training == ("backbone.0" not in name) for name, module in model.named_modules())


# ==== Small labelled sets ==========================================================================================

NAMES = ("Zürich tram", "a/b <c>")
SIZES = ((64, 48), (48, 60), (72, 40), (64, 64))  # width, height


def drawn(i):
    """Image i and its boxes (x1, y1, x2, y2): two bright rectangles, of one class each."""
    w, h = SIZES[i % 4]
    pixels = np.random.default_rng(i).integers(0, 80, (h, w, 3), dtype=np.uint8)
    boxes = [(4 + i, 6, 24 + i, 30), (30, 12 + i, 44, 36)]
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        pixels[y1:y2, x1:x2] = (250, 60, 20) if k == 0 else (20, 90, 240)
    return Image.fromarray(pixels), boxes


def coco_set(folder):
    """train.json with images 0..3, test.json with 4 and 5; ids of images and categories have gaps."""
    folder.mkdir()
    categories = [{"id": 300, "name": NAMES[1]}, {"id": 7, "name": NAMES[0]}]
    for split, some in (("train", range(4)), ("test", range(4, 6))):
        content = {"images": [], "annotations": [], "categories": categories}
        for i in some:
            image, boxes = drawn(i)
            image.save(folder / f"{i}.png")
            content["images"].append({"id": 1000 - 90 * i, "width": image.width, "height": image.height,
                                      "file_name": f"{i}.png"})
            for category, (x1, y1, x2, y2) in zip((7, 300), boxes):
                content["annotations"].append({"id": len(content["annotations"]), "image_id": 1000 - 90 * i,
                                               "category_id": category, "iscrowd": 0,
                                               "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def voc_set(folder):
    year = folder / "VOC2007"
    for sub in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / sub).mkdir(parents=True)
    for split, some in (("trainval", range(4)), ("test", range(4, 6))):
        (year / f"ImageSets/Main/{split}.txt").write_text("".join(f"00{i}\n" for i in some))
        for i in some:
            image, boxes = drawn(i)
            image.save(year / f"JPEGImages/00{i}.jpg")
            objects = "".join(
                f"<object><name>{name.replace('<', '&lt;')}</name><difficult>{int(k == 1 and i == 5)}</difficult>"
                f"<bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"
                "</object>"
                for k, (name, (x1, y1, x2, y2)) in enumerate(zip(NAMES, boxes)))
            size = f"<size><width>{image.width}</width><height>{image.height}</height></size>"
            (year / f"Annotations/00{i}.xml").write_text(
                f"<annotation><filename>00{i}.jpg</filename>{size}{objects}</annotation>")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "last.pt"
    cfg = small_config(detreg.Config, num_feature_levels=LEVELS, num_classes=2)
    torch.manual_seed(1)
    model = detreg.DETReg(detectors.build_detector(cfg, 2, focal=True), embedding_dim=16)
    run.save_checkpoint(path, model, None, 0, cfg, script="detreg")
    return path


RUN = {"scales": (40, 48), "max_size": 80, "crop_scales": (48,), "crop_range": (30, 44), "eval_size": 48,
       "batch_size": 2, "max_steps": 2, "num_workers": 0, "dropout": 0.0, "log_every": 1, "lr_backbone": 2e-4}


OF_A_RUN = {"steps", "best_step", "val_AP"}  # of its metrics, not of an evaluation's


def run_script(out, **values):
    return finetune.main(flags({**RUN, "out": out, **values}))


def plain(value):
    """As json keeps it: nan is null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and value != value else value


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
    """A two-step run on the COCO json -> (its folder, the data, its metrics)."""
    folder = tmp_path_factory.mktemp("tuned")
    labelled = coco_set(folder / "set")
    return folder / "run", labelled, run_script(folder / "run", data=labelled, init_from=pretrained)


def check_detections(out, sizes, category_ids):
    found = json.loads((out / "detections.json").read_text())
    assert {d["image_id"] for d in found} == set(sizes) and {d["category_id"] for d in found} == set(category_ids)
    for d in found:
        assert d.keys() == {"image_id", "category_id", "bbox", "score"} and 0 <= d["score"] <= 1
        x, y, w, h = d["bbox"]
        width, height = sizes[d["image_id"]]
        # the centre is inside, as a sigmoid is
        assert w > 0 and h > 0 and 0 <= x + w / 2 <= width and 0 <= y + h / 2 <= height
    per_image = [sum(d["image_id"] == i for d in found) for i in sizes]
    assert per_image == [min(100, 8 * len(category_ids))] * len(sizes)
    return found


def test_coco_run(tuned):
    out, _, metrics = tuned
    check_detections(out, {640: SIZES[0], 550: SIZES[1]}, (7, 300))
    assert metrics["per_class"].keys() == set(NAMES) and {"AP", "AP50", "AP75", "AR100"} <= metrics.keys()
    assert 0 <= metrics["class_error"] <= 100 and 0 < metrics["box_error"] < 2  # DETReg, Table 5
    assert json.loads((out / "metrics.json").read_text()) == plain(metrics)
    assert Image.open(out / "predictions.png").height > 2 * 200
    *lines, last = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert last.pop("step") == last.pop("epoch") == 1 and last == pytest.approx({k: metrics[k] for k in last}, abs=1e-5)
    assert {"AP", "AP50", "AR100"} <= last.keys()
    assert [line["step"] for line in lines] == [0, 1] and all(line["loss"] == pytest.approx(
        sum(w * line[k + s] for k, w in (("loss_ce", 2), ("loss_bbox", 5), ("loss_giou", 2)) for s in ("", "_0")),
        rel=1e-4) for line in lines)
    state = torch.load(out / "last.pt", weights_only=True)
    assert (state["script"] == "finetune" and state["step"] == 2
            and state["model"]["class_embed.0.weight"].shape == (2, 64))
    assert state["categories"] == [{"id": 7, "name": NAMES[0]}, {"id": 300, "name": NAMES[1]}]
    assert not any(name.startswith("feature_embed") for name in state["model"])


def test_the_same_command_again(tuned, pretrained, capsys):
    out, labelled, metrics = tuned
    assert plain(run_script(out, data=labelled, init_from=pretrained)) == plain(metrics)
    assert "this run is finished (2 steps)" in capsys.readouterr().out


def test_evaluation_of_the_run(tuned, tmp_path):
    out, labelled, metrics = tuned
    again = run_script(tmp_path, data=labelled, init_from=out / "last.pt", eval_only="true")
    assert plain(again) == {k: v for k, v in plain(metrics).items() if k not in OF_A_RUN} and metrics["steps"] == 2
    assert json.loads((tmp_path / "detections.json").read_text()) == json.loads((out / "detections.json").read_text())
    assert not (tmp_path / "last.pt").exists() and not (tmp_path / "log.jsonl").exists()


def test_evaluation_on_other_classes(tuned, tmp_path, capsys, fails):
    """By the names that both have; what the detector knows nothing of is said; with none in common both lists are."""
    out, labelled, _ = tuned
    content = json.loads((labelled / "test.json").read_text())
    content["categories"] = [{"id": 300, "name": "lamp"}, {"id": 9, "name": NAMES[0]}]
    for annotation in content["annotations"]:
        annotation["category_id"] = {7: 9}.get(annotation["category_id"], annotation["category_id"])
    (labelled / "other.json").write_text(json.dumps(content))
    metrics = run_script(tmp_path / "a", data=labelled / "other.json", init_from=out / "last.pt", eval_only="true")
    assert metrics["per_class"].keys() == {NAMES[0], "lamp"} and metrics["per_class"]["lamp"] == 0
    assert {d["category_id"] for d in json.loads((tmp_path / "a" / "detections.json").read_text())} == {9}
    assert ("last.pt knows nothing of 1 of the 2 categories, whose AP is 0 and counts: lamp"
            in capsys.readouterr().out)
    content["categories"][1]["name"] = "car"
    (labelled / "other.json").write_text(json.dumps(content))
    line = fails(finetune.main, ["--data", labelled / "other.json", "--init_from", out / "last.pt", "--eval_only",
                                 "--out", tmp_path / "b"])
    assert f"it was trained on {NAMES[0]}, {NAMES[1]}, and {labelled / 'other.json'} has car, lamp" in line


def test_image_sizes_of_an_evaluation(tuned, pretrained, tmp_path, capsys):
    """Those of the checkpoint, which is said, unless a flag says otherwise."""
    def parse(path, *argv):
        cfg = finetune.parse(list(map(str, ["--data", tuned[1], "--init_from", path, *argv])))[0]
        return cfg.eval_size, cfg.max_size

    last = tuned[0] / "last.pt"
    assert parse(last, "--eval_only") == parse(last, "--class_agnostic") == (48, 80)
    assert parse(last, "--eval_only", "--eval_size", 64) == (64, 80)
    assert parse(last, "--eval_only", "--preset", "demo") == (48, 80) and parse(last) == (800, 1333)
    assert parse(pretrained, "--class_agnostic") == (480, 600)  # a pretraining's are those of its probe
    argv = ["--data", tuned[1], "--init_from", last, "--eval_only", "--num_workers", 0]
    for more, out in (([], "out/finetune-set-eval"), (["--preset", "demo"], "out/finetune-demo-set-eval"),
                      (["--out", "o"], "o")):  # not the folder of the training, which it would refuse
        assert finetune.parse(list(map(str, [*argv, *more])))[0].out == out
    metrics = finetune.main(list(map(str, [*argv, "--out", tmp_path / "a"])))
    assert "image sizes: --eval_size 48 --max_size 80 (those of the checkpoint)" in capsys.readouterr().out
    assert plain(metrics)["AR100"] == plain(tuned[2])["AR100"]
    finetune.main(list(map(str, [*argv, "--out", tmp_path / "b", "--eval_size", 56])))
    assert "--eval_size 56 --max_size 80 (the checkpoint's are 48 and 80)" in capsys.readouterr().out


def test_training_images_as_test_images_are_said(tuned, pretrained, tmp_path, capsys):
    """One json for both: loudly, above the table and in metrics.json; where the checkpoint is of other images, not."""
    single = tuned[1] / "train.json"
    said = "WARNING: 4 of the 4 test images are TRAINING images: the numbers say what was remembered"
    metrics = run_script(tmp_path / "run", data=single, init_from=pretrained)
    assert metrics["warning"].startswith(said)
    table = capsys.readouterr().out.splitlines()
    assert f"note: WARNING: {single} has no split: all its 4 images are validation and test set" in "\n".join(table)
    assert table.count(metrics["warning"]) == 1  # as the table's title; at the start stands the note
    assert "AP" in table[len(table) - table[::-1].index(metrics["warning"])]
    again = run_script(tmp_path / "again", data=single, init_from=tmp_path / "run" / "last.pt", eval_only="true")
    assert again["warning"] == metrics["warning"]
    capsys.readouterr()
    given = run_script(tmp_path / "given", data=tuned[1], test_data=single, init_from=pretrained, max_steps=1)
    assert given["warning"] == metrics["warning"]
    assert capsys.readouterr().out.splitlines().count(given["warning"]) == 2  # at the start, too
    moved = tmp_path / "moved"
    moved.symlink_to(tuned[1])  # another name for the same set
    assert "warning" in run_script(tmp_path / "m", data=moved / "train.json", init_from=tmp_path / "run" / "last.pt",
                                   eval_only="true")
    capsys.readouterr()
    other = run_script(tmp_path / "other", data=tuned[1] / "test.json", init_from=tmp_path / "run" / "last.pt",
                       eval_only="true")
    assert "warning" not in other and "warning" not in tuned[2] and "TRAINING" not in capsys.readouterr().out


def test_more_objects_than_queries_are_said(tuned, pretrained, tmp_path, capsys):
    content = json.loads((tuned[1] / "train.json").read_text())
    content["annotations"] += [{"id": 100 + i, "image_id": 1000, "category_id": 7, "bbox": [i, i, 20, 20], "area": 400,
                                "iscrowd": int(i > 8)} for i in range(12)]
    (tuned[1] / "many.json").write_text(json.dumps(content))
    run_script(tmp_path, data=tuned[1] / "many.json", init_from=pretrained, max_steps=1)
    said = "note: images have up to 11 objects, the detector has 8 queries: "
    assert capsys.readouterr().out.count(said) == 1  # a crowd is no object


def test_image_ids_that_are_strings(tuned, tmp_path):
    """They come back as they are, and pycocotools takes the detections for the user's own json."""
    content = json.loads((tuned[1] / "test.json").read_text())
    names = {640: "a/640", 550: "550"}
    for image in content["images"]:
        image["id"] = names[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = names[annotation["image_id"]]
    (tuned[1] / "strings.json").write_text(json.dumps(content))
    metrics = run_script(tmp_path, data=tuned[1] / "strings.json", init_from=tuned[0] / "last.pt", eval_only="true")
    assert plain(metrics)["AR100"] == plain(tuned[2])["AR100"]
    found = json.loads((tmp_path / "detections.json").read_text())
    assert {d["image_id"] for d in found} == {"a/640", "550"} and {d["category_id"] for d in found} == {7, 300}
    assert len(COCO(tuned[1] / "strings.json").loadRes(str(tmp_path / "detections.json")).anns) == len(found)


def test_class_agnostic_evaluation_of_a_tuned_detector(tuned, tmp_path):
    run_script(tmp_path, data=tuned[1], init_from=tuned[0] / "last.pt", class_agnostic="true")
    found, named = (json.loads((folder / "detections.json").read_text()) for folder in (tmp_path, tuned[0]))
    for image_id in (550, 640):  # a box counts as much as its best class says
        best = {}
        for d in named:
            if d["image_id"] == image_id:
                box = tuple(round(max(v, 0), 3) for v in d["bbox"][:2])
                best[box] = max(best.get(box, 0), d["score"])
        mine = [d for d in found if d["image_id"] == image_id]
        assert len(mine) == 8 and [d["score"] for d in mine] == sorted((d["score"] for d in mine), reverse=True)
        assert ([1 / (1 + np.exp(-d["score"])) for d in mine]
                == pytest.approx(sorted(best.values(), reverse=True), abs=1e-5))


def test_class_agnostic_evaluation(tuned, pretrained, tmp_path):
    metrics = run_script(tmp_path, data=tuned[1], init_from=pretrained, class_agnostic="true")
    assert not (tmp_path / "last.pt").exists()  # it is an evaluation: nothing is trained
    found = json.loads((tmp_path / "detections.json").read_text())
    assert "per_class" not in metrics and len(found) == 2 * 8 and {d["category_id"] for d in found} == {1}
    model = detectors.build_detector(small_config(finetune.Config, num_feature_levels=LEVELS), 2, focal=True).eval()
    model.load_state_dict({k: v for k, v in torch.load(pretrained, weights_only=True)["model"].items()
                           if not k.startswith("feature_embed")})
    samples = [{"image": data.to_normalized_tensor(Image.open(tuned[1] / f"{i}.png")), "target": {}, "skipped": []}
               for i in (5, 4)]
    batch = data.collate(samples)  # their short sides are 48 already
    with torch.no_grad():
        logits = model(batch["images"], batch["mask"])["pred_logits"]
    for image_id, row in zip((550, 640), logits[..., 1]):  # the score is the logit of row 1, "object"
        assert ([d["score"] for d in found if d["image_id"] == image_id]
                == pytest.approx(sorted(row.tolist(), reverse=True), abs=1e-5))


@pytest.mark.parametrize(("method", "detector", "softmax"), (
    ("updetr", "detr", True), ("updetr", "deformable_detr", True), ("siamese_detr", "conditional_detr", True),
    ("siamese_detr", "deformable_detr_ss", True), ("detreg", "detr", True),
    ("detreg", "conditional_detr", False), ("detreg", "deformable_detr", False)))
def test_class_agnostic_evaluation_of_every_method(method, detector, softmax, tuned, tmp_path):
    state, cfg = save_pretrained(tmp_path / "last.pt", method, detector)
    metrics = run_script(tmp_path / "out", data=tuned[1], init_from=tmp_path / "last.pt", class_agnostic="true")
    rows = state["class_embed.weight" if "class_embed.weight" in state else "class_embed.0.weight"].shape[0]
    assert {"AP", "AR1", "AR10", "AR100"} <= metrics.keys() and rows == (91 + softmax if method == "detreg" else 3)
    model = build(rows, focal=False, detector=detector, pre_norm=cfg.pre_norm).eval()
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith(PRETEXT_HEADS[method])})
    samples = [{"image": data.to_normalized_tensor(Image.open(tuned[1] / f"{i}.png")), "target": {}, "skipped": []}
               for i in (5, 4)]
    batch = data.collate(samples)  # their short sides are 48 already
    with torch.no_grad():
        logits = model(batch["images"], batch["mask"])["pred_logits"].double().numpy()
    scores = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)) if softmax else logits)[..., 1]  # row 1, "object"
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    for image_id, row in zip((550, 640), scores):
        assert ([d["score"] for d in found if d["image_id"] == image_id]
                == pytest.approx(sorted(row.tolist(), reverse=True), abs=1e-4))


@pytest.mark.parametrize("detector", ("detr", "conditional_detr"))
def test_run_of_another_detector(detector, tuned, tmp_path):
    save_pretrained(tmp_path / "last.pt", "updetr", detector)
    metrics = run_script(tmp_path / "out", data=tuned[1], init_from=tmp_path / "last.pt", freeze_detector="true")
    old, state = (torch.load(tmp_path / name, weights_only=True) for name in ("last.pt", "out/last.pt"))
    assert state["config"]["detector"] == detector and state["config"]["pre_norm"] == (detector == "detr")
    assert all(torch.equal(v, old["model"][k])
               for k, v in state["model"].items() if not k.startswith(("class_embed.", "bbox_embed.")))
    assert not torch.equal(state["model"]["bbox_embed.layers.0.weight"], old["model"]["bbox_embed.layers.0.weight"])
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(found) == 2 * (8 if detector == "detr" else 16)  # DETR: every query once
    anyhow = evaluation.detection_metrics(
        finetune.open_sets(finetune.Config(data=str(tuned[1]))).test.coco_ground_truth(), found, class_agnostic=True)
    for k in (1, 10, 100):  # Siamese DETR, Table 5
        assert plain(metrics)[f"agnostic_AR{k}"] == pytest.approx(anyhow[f"AR{k}"])
    again = run_script(tmp_path / "again", data=tuned[1], init_from=tmp_path / "out" / "last.pt", eval_only="true")
    expected = {k: v for k, v in plain(metrics).items() if not k.startswith("agnostic") and k not in OF_A_RUN}
    assert plain(again) == expected | {"box_error": pytest.approx(expected["box_error"], rel=1e-5)}


def test_voc_run(pretrained, tmp_path):
    labelled = voc_set(tmp_path / "set")
    metrics = run_script(tmp_path / "run", data=labelled, init_from=pretrained, with_box_refine="false")
    check_detections(tmp_path / "run", {1: SIZES[0], 2: SIZES[1]}, (1, 2))
    assert {"AP", "VOC07_AP", "VOC07_AP50"} <= metrics.keys() and metrics["per_class"].keys() == set(NAMES)
    assert (tmp_path / "run" / "predictions.png").exists()
    other = run_script(tmp_path / "eval", data=labelled, init_from=tmp_path / "run", eval_only="true",
                       difficult="count")
    for k in ("AP", "AP50", "AP75"):  # both are printed, whichever is asked for
        assert other[k] == metrics[f"{k}_difficult_counted"] and other[f"{k}_difficult_ignored"] == metrics[k]
    assert other["VOC07_AP"] == metrics["VOC07_AP"]


def test_resumed_run_is_the_unbroken_one(tuned, pretrained, tmp_path):
    for steps in (1, 2):
        run_script(tmp_path, data=tuned[1], init_from=pretrained, max_steps=steps)
    one, two = (torch.load(p / "last.pt", weights_only=True)["model"] for p in (tuned[0], tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [(0, True), (0, False), (1, True), (1, False)]


def test_run_killed_before_its_evaluation(tuned, pretrained, tmp_path, monkeypatch):
    run_script(tmp_path, data=tuned[1], init_from=pretrained, max_steps=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        run_script(tmp_path, data=tuned[1], init_from=pretrained, max_steps=2)
    run_script(tmp_path, data=tuned[1], init_from=pretrained, max_steps=2)
    assert (tmp_path / "detections.json").read_text() == (tuned[0] / "detections.json").read_text()


def test_share_of_the_labels_depends_on_the_seed_alone(monkeypatch, tmp_path):
    coco_set(tmp_path / "set")
    def drawn_ids(seed, rank):
        monkeypatch.setattr(common, "rank", lambda: rank)
        torch.manual_seed(rank), np.random.seed(rank)
        return finetune.open_sets(finetune.Config(data=str(tmp_path / "set"),
                                                  labels_percent=50, seed=seed)).train.image_ids

    every = sorted(1000 - 90 * i for i in range(4))
    for seed in range(4):
        wanted = [every[i] for i in np.random.default_rng(seed).choice(np.arange(4), 2, replace=False)]
        assert drawn_ids(seed, 0) == drawn_ids(seed, 1) == wanted


def test_samples_leave_crowds_out_and_keep_difficult_objects():
    boxes = torch.tensor([[4.0, 6, 24, 30], [0, 0, 60, 40], [30, 12, 44, 36]])
    target = {"boxes_xyxy": boxes, "labels": torch.tensor([1, 0, 2]), "crowd": torch.tensor([False, True, False]),
              "ignore": torch.tensor([False, True, True])}
    labelled = SimpleNamespace(load=lambda i, needs: (drawn(0)[0], target), __len__=lambda: 1)
    cfg = finetune.Config(scales=(48,), max_size=100, crop_scales=())
    seen = set()
    for epoch in range(6):
        sample = finetune.LabelledDataset(cfg, labelled)[epoch, 0]
        flipped = not torch.equal(sample["image"], data.to_normalized_tensor(drawn(0)[0]))
        seen.add(flipped)
        assert sample["target"]["labels"].tolist() == [1, 2]
        centres = torch.tensor([[14 / 64, 18 / 48], [37 / 64, 24 / 48]])
        if flipped:
            centres[:, 0] = 1 - centres[:, 0]
        torch.testing.assert_close(sample["target"]["boxes"],
                                   torch.cat([centres, torch.tensor([[20 / 64, 24 / 48], [14 / 64, 24 / 48]])], 1))
    assert seen == {True, False}


# ==== Bad input ====================================================================================================

def test_bad_input_ends_in_one_line(fails, tuned, pretrained, tmp_path):
    out, labelled, _ = tuned

    def fail(**values):
        return fails(finetune.main,
                     flags({**RUN, "data": labelled, "init_from": pretrained, "out": tmp_path / "out", **values}))

    def edited(name, change):
        content = json.loads((labelled / "train.json").read_text())
        change(content)
        (labelled / name).write_text(json.dumps(content))
        return labelled / name

    assert str(tmp_path / "nowhere") in fail(data=tmp_path / "nowhere")
    assert "batch_size 2 (global)" in fail(accumulate=3)
    assert "--labels_percent 0" in fail(labels_percent=0) and "101" in fail(labels_percent=101)
    assert ("absent.png"
            in (line := fail(data=edited("gap.json", lambda c: c["images"][2].update(file_name="absent.png"))))
            and "gap.json" in line)
    assert ("999" in (line := fail(data=edited("unknown.json", lambda c: c["annotations"][0].update(category_id=999))))
            and "unknown.json" in line)
    assert "size.json" in (line := fail(data=edited("size.json", lambda c: [i.update(width=333)
                                                                            for i in c["images"]]))) or "333x" in line
    assert str(tmp_path / "nowhere.pt") in fail(init_from=tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert str(tmp_path / "text.pt") in fail(init_from=tmp_path / "text.pt")
    torch.save({"model": {"query_embed.weight": torch.zeros(1)}}, tmp_path / "detr.pt")
    assert "detr.pt: no known kind of checkpoint" in fail(init_from=tmp_path / "detr.pt")
    assert f"{pretrained} was trained with another architecture than --enc_layers 5 (it has 1)" in fail(enc_layers=5)
    state = torch.load(pretrained, weights_only=True)
    state["model"]["transformer.extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "more.pt")
    assert ("is a checkpoint of another architecture. unknown here: transformer.extra.weight"
            in fail(init_from=tmp_path / "more.pt"))
    assert f"--out {out} holds a training run" in fail(eval_only="true", init_from=out / "last.pt", out=out)
    torch.save({"model": build(2, with_box_refine=True).state_dict()}, tmp_path / "refine.pt")
    line = fails(finetune.main, ["--data", labelled, "--init_from", tmp_path / "refine.pt", "--no-with-box-refine"])
    assert "--with_box_refine False (it has True)" in line
    torch.save([1, 2], tmp_path / "list.pt")
    assert "list.pt: holds a list" in fail(init_from=tmp_path / "list.pt")
    assert ("--class_agnostic" in fail(eval_only="true")
            and "--eval_only" in fails(finetune.main, ["--eval_only", "--data", labelled]))
    assert f"{out} holds a run with another configuration (lr: 0.0002 -> 0.5)" in fail(out=out, lr=0.5)
    other = flags({**SMALL, "data": "synthetic", "synthetic_images": 4, "batch_size": 2, "out": out})
    assert f"{out} holds a run of finetune.py" in fails(detreg.main, other)
