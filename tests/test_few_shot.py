"""few_shot.py: class lists, shots and metrics by hand; TFA's files in their own formats, COCO 2014 and VOC; base
training, then shots, by a tiny detector."""
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, flags, small_config
from test_data import make_voc, picture

import convert
import evaluation
import few_shot
import finetune
from annotations import open_splits
from common import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = {name: i for i, name in convert.COCO_NAMES.items()}
BASE, NOVEL = (few_shot.class_lists("coco")[part] for part in ("base", "novel"))
TINY = {"scales": 32, "max_size": 64, "crop_scales": 32, "crop_range": (24, 32), "eval_size": 32, "num_workers": 0,
        "batch_size": 2, "max_steps": 1, "backbone_weights": "random", "num_feature_levels": 3, "lr_backbone": 2e-4}


def coco_json(path, images, objects):
    """images: {id: file name}; objects: [(image id, class, x, iscrowd)], boxes of 10 x 10 px."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "images": [{"id": i, "width": 48, "height": 32, "file_name": f} for i, f in images.items()],
        "annotations": [{"id": k + 1, "image_id": i, "category_id": IDS[name], "bbox": [x, 5, 10, 10], "area": 100,
                         "iscrowd": crowd} for k, (i, name, x, crowd) in enumerate(objects)],
        "categories": [{"id": i, "name": name} for name, i in IDS.items()]}))


def file_2014(i):
    return f"COCO_{'val' if i % 2 else 'train'}2014_{i:012d}.jpg"


@pytest.fixture(scope="module")
def tfa(tmp_path_factory):
    """COCO 2014 as TFA splits it: eight training images, two test images; the lists of one shot, in which image 1 has a
    truck and a person, image 2 two dogs (of which K = 1 keeps one) and image 3 all the rest."""
    root = tmp_path_factory.mktemp("datasets") / "coco"
    train, test = {i: file_2014(i) for i in range(1, 9)}, {i: file_2014(i) for i in (11, 13)}
    for files, folder in ((train, "trainval2014"), (test, "val2014")):
        for file in files.values():
            picture(root / folder / file, (48, 32))
    lists = root / "cocosplit"
    coco_json(lists / "datasplit/trainvalno5k.json", train,
              [(1, "truck", 0, 0), (1, "person", 20, 0), (2, "dog", 0, 0), (2, "dog", 20, 0), (4, "bench", 3, 0),
               (5, "person", 3, 0), (5, "bench", 3, 1), (6, "zebra", 3, 0), (8, "truck", 30, 0)])
    coco_json(lists / "datasplit/5k.json", test, [(11, "truck", 0, 0), (11, "dog", 20, 0), (13, "cat", 5, 0)])
    for name in IDS:
        image = {"truck": 1, "person": 1, "dog": 2}.get(name, 3)
        objects = [(image, name, x, 0) for x in ((0, 20) if name == "dog" else (20,) if name == "person" else (0,))]
        coco_json(lists / f"full_box_1shot_{name}_trainval.json", {image: train[image]}, objects)
    return root


def config(root, **values):
    return small_config(finetune.Config, data_root=str(root), **values)


def names_of(labelled, i):
    return [labelled.categories[k]["name"] for k in labelled.records[i].labels]


# ==== Classes, shots, metrics by hand ==============================================================================


def test_class_lists():
    assert len(BASE) == 60 and BASE[:2] == ["truck", "traffic light"] and not set(BASE) & set(NOVEL)
    assert NOVEL[0] == "person" and NOVEL[-1] == "tv" and len(NOVEL) == 20
    voc = few_shot.class_lists("voc", 3)
    assert voc["novel"] == ["boat", "cat", "motorbike", "sheep", "sofa"] and voc["all"] == voc["base"] + voc["novel"]
    cfg = finetune.Config(data="some/folder")
    names = [{"name": n} for n in few_shot.class_lists("voc")["all"][::-1]]
    assert few_shot.known_classes(cfg, names)["novel"] == ["bird", "bus", "cow", "motorbike", "sofa"]
    assert few_shot.known_classes(cfg, names[1:]) is None  # a set of one's own may have a bird and a bus


def test_k_counts_objects():
    counts = {"a": 2, "b": 1, "c": 4, "d": 1, "e": 2}
    for seed in range(20):
        drawn = few_shot.sample_coco(counts, (1, 2, 3, 5), random.Random(seed))
        assert [sum(counts[i] for i in drawn[k]) for k in (1, 2, 3, 5)] in ([1, 2, 3, 5], [1, 2, 2, 4], [1, 2, 2, 5])
        assert all(drawn[5][:len(drawn[k])] == drawn[k] and len(set(drawn[k])) == len(drawn[k]) for k in drawn)
    # none fits: an end, where TFA's loop has none
    assert few_shot.sample_coco({"a": 3, "b": 3}, (1, 5), random.Random(0)) in ({1: [], 5: ["a"]}, {1: [], 5: ["b"]})
    assert few_shot.sample_coco({}, (1,), random.Random(0)) == {1: []}
    drawn = few_shot.sample_voc({"a": 5, "b": 1}, (1, 10), random.Random(1))
    assert drawn[10][:1] == drawn[1] and len(drawn[1]) == 1 and 2 <= len(drawn[10]) <= 3  # an image may come twice


def test_metrics_of_base_and_novel_classes():
    """Of one image: the truck is found, the dog is not, a cat has no object."""
    categories = [{"id": IDS[n], "name": n} for n in ("cat", "truck", "dog")]
    truth = {"images": [{"id": 1, "width": 50, "height": 50}], "categories": categories, "annotations": [
        {"id": 1, "image_id": 1, "category_id": IDS[n], "bbox": [0, 0, 40, 40], "area": 1600}
        for n in ("truck", "dog")]}
    found = [{"image_id": 1, "category_id": IDS["truck"], "bbox": [0, 0, 40, 32], "score": 0.9}]  # IoU 0.8
    groups = few_shot.groups(finetune.Config(shots=1), SimpleNamespace(categories=categories))
    assert groups == {"b": [IDS["truck"]], "n": [IDS["dog"], IDS["cat"]]} or groups["n"] == [IDS["cat"], IDS["dog"]]
    metrics = evaluation.detection_metrics(truth, found, groups=groups)
    # right at the thresholds .50 ... .80
    assert [metrics[k] for k in ("AP", "bAP", "bAP75", "nAP", "nAP75")] == pytest.approx([0.35, 0.7, 1, 0, 0])
    assert np.isnan(metrics["bAPs"]) and metrics["bAPm"] == pytest.approx(0.7)
    voc = few_shot.voc07_metrics(truth, found, groups)
    # IoU must be above the threshold
    assert voc == {"VOC07_bAP": pytest.approx(0.6), "VOC07_bAP50": 1, "VOC07_bAP75": 1, "VOC07_nAP": 0,
                   "VOC07_nAP50": 0, "VOC07_nAP75": 0}
    assert few_shot.groups(finetune.Config(classes="base"), SimpleNamespace(categories=categories)) == {}
    table = few_shot.table_rows("detection", metrics | voc)
    assert table["novel classes"]["AP75"] == 0 and table["base classes"]["VOC07_AP50"] == 1
    assert table["detection"].keys() == {k for k in metrics if k[0] not in "bn"}


@pytest.mark.parametrize(("values", "fine_tuned", "expected"), (
    ({"classes": "base"}, False, (50, 40)), ({"shots": 10}, True, (150, 140)), ({"shots": 30}, False, (1000, 990)),
    ({"shots": 10, "protocol": "siamese"}, True, (50, 40)), ({"shots": 10, "eval_only": True}, True, (50, 40))))
def test_schedules(values, fine_tuned, expected):
    """DETReg's, by what --init_from is."""
    architecture = {"detector": "deformable_detr"}
    values = vars(finetune.Config()) | values
    recipe = finetune.recipe_of(values, architecture, None if fine_tuned else "detreg")
    assert ((values | recipe)["epochs"], (values | recipe)["lr_drop"]) == expected
    assert finetune.recipe_of(values | {"preset": "own"}, architecture).get("epochs", 50) == 50


def test_schedules_of_tfa():
    def steps(name, architecture={"detector": "faster_rcnn_fpn"}, **values):
        values = vars(finetune.Config(detector="faster_rcnn_fpn", data=name)) | values
        recipe = finetune.recipe_of(values, architecture)
        return recipe.get("steps"), [round(drop * (recipe.get("steps") or 1)) for drop in recipe.get("lr_drops", ())]

    assert steps("coco", classes="base") == (110_000, [85_000, 100_000])
    assert steps("voc", classes="base") == (18_000, [12_000, 16_000])
    assert steps("coco", shots=10) == (160_000, [144_000]) and steps("coco", shots=30) == (240_000, [216_000])
    assert steps("voc", shots=10) == (40_000, [36_000])
    assert steps("coco", {"arch": "resnet50"}, shots=10)[0] == 90_000  # a backbone: no base training came before


@pytest.mark.parametrize(("line", "text"), (
    ("--shots 5 --labels_percent 10 --data nowhere", "--shots 5 and --labels_percent 10 both"),
    ("--shot_seed 3", "--shot_seed says which shots: give --shots K"),
    ("--protocol few_shot", "give --classes base to train on the base classes, or --shots K"),
    ("--data synthetic --classes novel", "known of COCO and VOC; the classes of synthetic are"),
    ("--data coco --data_root nowhere --shots 5", "<root>/cocosplit/datasplit/{trainvalno5k,5k}.json")))
def test_refusals(line, text, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert text in fails(finetune.main, [*line.split(), "--synthetic_images", "4", "--synthetic_test_images", "1"])
    assert not list(tmp_path.iterdir())


# ==== TFA's files ==================================================================================================


def test_base_classes_of_coco_2014(tfa):
    sets = finetune.open_sets(config(tfa, classes="base"))
    assert [c["name"] for c in sets.train.categories] == BASE and sets.test.categories == sets.train.categories
    # images with a truck, bench, zebra; not those of a crowd or of novel classes alone
    assert sets.train.image_ids == [1, 4, 6, 8] and names_of(sets.train, 0) == ["truck"]
    assert sets.train.key(0) == str(tfa / "trainval2014" / file_2014(1))
    assert sets.test.image_ids == [11, 13] and names_of(sets.test, 0) == ["truck"] and names_of(sets.test, 1) == []
    assert any("60 of 80 classes" in note for note in sets.train.notes) and sets.val is sets.test


def test_shots_from_the_lists(tfa):
    sets = finetune.open_sets(config(tfa, shots=1))
    assert sets.train.image_ids == [1, 3, 2] and len(sets.train.categories) == 80  # as the classes come
    assert sorted(names_of(sets.train, 0)) == ["person", "truck"] and names_of(sets.train, 2) == ["dog"]
    assert len(sets.train.records[1].labels) == 77
    one, two = (sets.train.records[0].boxes[names_of(sets.train, 0).index(n)] for n in ("truck", "person"))
    assert one.tolist() == [0, 5, 10, 15] and two.tolist() == [20, 5, 30, 15]
    note, = (note for note in sets.train.notes if "--shots 1" in note)
    assert f"80 objects of 80 classes in 3 images, from TFA's lists, {tfa / 'cocosplit'}." in note
    single = finetune.open_sets(config(tfa, shots=1, shot_records="single")).train
    assert len(single) == 80 and all(len(r.labels) == 1 for r in single.records) and single.image_ids.count(1) == 2
    novel = finetune.open_sets(config(tfa, shots=1, classes="novel")).train
    assert novel.image_ids == [1, 3, 2] and [c["name"] for c in novel.categories] == NOVEL
    assert names_of(novel, 0) == ["person"]
    with pytest.raises(UserError, match="of the 0 images of coco cannot be set apart for validation"):
        finetune.open_sets(config(tfa, shots=1, val_percent=20))


def test_shots_without_lists(tfa):
    """Of K or a seed that TFA's files lack."""
    found = finetune.open_sets(config(tfa, shots=1, shot_seed=4)).train
    note, = (note for note in found.notes if "--shots 1" in note)
    assert "drawn with --shot_seed 4 (other shots than the published ones)" in note and "fewer of" in note
    names = [n for i in range(len(found)) for n in names_of(found, i)]
    assert sorted(names) == ["bench", "dog", "person", "truck", "zebra"]  # of the two dogs of image 2 one
    assert finetune.open_sets(config(tfa, shots=1, shot_seed=4)).train.fingerprint() == found.fingerprint()
    sets = finetune.open_sets(config(tfa, shots=1, shot_seed=4, val_percent=30))
    assert sets.train.fingerprint() == found.fingerprint() and not set(sets.val.image_ids) & set(found.image_ids)
    assert sets.test.image_ids == [11, 13] and len(sets.val) == 1


def test_lists_in_part_and_images_of_2017(tfa, tmp_path):
    root = tmp_path / "coco"
    shutil.copytree(tfa / "cocosplit", tmp_path / "cocosplit")  # beside the data, as TFA has it
    for i in range(1, 9):
        picture(root / f"train2017/{i:012d}.jpg", (48, 32))
    for i in (11, 13):
        picture(root / f"val2017/{i:012d}.jpg", (48, 32))
    sets = finetune.open_sets(config(root, shots=1))
    assert sets.train.key(0) == str(root / "train2017/000000000001.jpg")
    assert sets.test.key(1) == str(root / "val2017/000000000013.jpg")
    (tmp_path / "cocosplit/full_box_1shot_dog_trainval.json").unlink()
    with pytest.raises(UserError, match="1 of the 80 lists of 1 shots are missing: full_box_1shot_dog_trainval.json"):
        finetune.open_sets(config(root, shots=1))
    (tmp_path / "cocosplit/datasplit/5k.json").unlink()
    with pytest.raises(UserError, match="neither .*5k.json nor .*instances_val2017.json is there"):
        finetune.open_sets(config(root, classes="base"))


def test_voc(tmp_path):
    """The lists of split 1's novel classes; the rule where there are none; classes in TFA's order."""
    boxes = [(1, 1, 20, 20), (31, 1, 50, 20), (61, 1, 80, 20)]
    names = sorted(convert.VOC_NAMES.values())
    make_voc(tmp_path / "VOC2007", {
        "000001": [("bird", boxes[0], 0), ("bird", boxes[1], 1), ("person", boxes[2], 0)],
        "000002": [(n, boxes[k % 3], 0) for k, n in enumerate(names)],
        "000009": [("bird", boxes[0], 0), ("dog", boxes[1], 0)]},
             {"trainval": ["000001", "000002"], "test": ["000009"]})
    make_voc(tmp_path / "VOC2012", {"2008_000001": [("cow", b, 0) for b in boxes]}, {"trainval": ["2008_000001"]})
    novel = few_shot.VOC_NOVEL[1]
    (tmp_path / "vocsplit/seed3").mkdir(parents=True)
    for name in novel:
        image = {"bird": "VOC2007/JPEGImages/000001", "cow": "VOC2012/JPEGImages/2008_000001"}.get(
            name, "VOC2007/JPEGImages/000002")
        (tmp_path / f"vocsplit/seed3/box_2shot_{name}_train.txt").write_text(f"datasets/{image}.jpg\n" * 2)
    values = {"data": "voc", "shots": 2, "shot_seed": 3}
    found = finetune.open_sets(config(tmp_path, classes="novel", **values))
    assert [c["name"] for c in found.train.categories] == list(novel)
    assert [names_of(found.train, i) for i in range(3)] == [["bird"] * 2, ["bus", "motorbike", "sofa"], ["cow"] * 2]
    assert found.train.records[0].difficult.tolist() == [False, True]  # kept
    assert any("fewer of bus (1), motorbike (1), sofa (1)" in note for note in found.train.notes)
    assert [names_of(found.test, i) for i in range(1)] == [["bird"]] and len(found.test) == 1
    # an image twice, each of its objects as often, K of them
    single = finetune.open_sets(config(tmp_path, classes="novel", shot_records="single", **values)).train
    assert len(single) == 10 and [names_of(single, i) for i in range(10)] == [[n] for n in novel for _ in range(2)]
    drawn = finetune.open_sets(config(tmp_path, data="voc", shots=2, voc_split=2)).train  # no lists for all classes
    assert [c["name"] for c in drawn.categories] == few_shot.class_lists("voc", 2)["all"]
    assert any("--shot_seed 0 (by TFA's rule)" in note for note in drawn.notes)
    counts = np.bincount(np.concatenate([r.labels for r in drawn.records]), minlength=20)
    assert counts.max() == 2 and counts.min() == 1
    (tmp_path / "vocsplit/seed3/box_2shot_cow_train.txt").write_text("datasets/VOC2007/JPEGImages/000001.jpg\n")
    with pytest.raises(UserError, match="cow_train.txt, line 1: no image 000001 with an object of cow"):
        finetune.open_sets(config(tmp_path, classes="novel", **values))


def test_shots_of_any_set():
    """Drawn scenes, with masks: the smaller K among the larger; the rest of the images can be the validation set."""
    def pairs(labelled):
        return {(r.image, tuple(box)) for r in labelled.records for box in r.boxes.tolist()}

    cfg = small_config(finetune.Config, data="synthetic", synthetic_images=12, synthetic_size=64,
                       detector="mask_rcnn_fpn")
    whole = open_splits("synthetic", None, synthetic_images=12, synthetic_size=64, masks=True).train
    three, five = (few_shot.draw(finetune.dataclasses.replace(cfg, shots=k), whole) for k in (3, 5))
    assert pairs(three) < pairs(five) < pairs(whole)
    assert np.bincount(np.concatenate([r.labels for r in five.records])).tolist() == [5] * len(whole.categories)
    masks = [five.masks(i) for i in range(len(five))]
    assert [len(m) for m in masks] == [len(r.labels) for r in five.records] and all(m.flatten(1).any(1).all()
                                                                                  for m in masks)
    sets = finetune.open_sets(finetune.dataclasses.replace(cfg, shots=1, val_percent=20))
    assert not {r.image for r in sets.train.records} & {r.image for r in sets.val.records} and len(sets.val)


# ==== Base training, then shots ====================================================================================


def test_base_training_then_shots(tfa, tmp_path, monkeypatch, capsys):
    """The class head of 60 rows becomes one of 80, all else starts as it ended (F15)."""
    monkeypatch.chdir(tmp_path)
    steps = []
    step = finetune.train_step
    monkeypatch.setattr(finetune, "train_step", lambda *args: steps.append(copy_of(args[1])) or step(*args))
    base = finetune.main(flags({**SMALL, **TINY, "data_root": tfa, "classes": "base"}))
    assert base["per_class"].keys() == set(BASE) and "bAP" not in base
    metrics = finetune.main(flags({**TINY, "data_root": tfa, "shots": 1,
                                   "init_from": "out/finetune-coco-base/last.pt"}))
    before = torch.load("out/finetune-coco-base/last.pt", weights_only=True)["model"]
    assert before["class_embed.0.weight"].shape == (60, 64) and len(steps) == 2
    assert steps[1]["class_embed.0.weight"].shape == (80, 64)
    assert all(torch.equal(v, before[k]) for k, v in steps[1].items() if not k.startswith("class_embed."))
    state = torch.load("out/finetune-coco-1shot/last.pt", weights_only=True)
    assert (state["config"]["epochs"], state["config"]["lr_drop"]) == (150, 140)
    assert json.loads((tmp_path / "out/finetune-coco-1shot/metrics.json").read_text()).keys() >= {
        "AP", "AP75", "bAP", "bAP50", "bAP75", "nAP", "nAP50", "nAP75"}
    ap = {name: value for name, value in metrics["per_class"].items() if value == value}
    assert ap.keys() == {"truck", "dog", "cat"}
    assert metrics["nAP"] == pytest.approx((ap["dog"] + ap["cat"]) / 2) and metrics["bAP"] == ap["truck"]
    assert "novel classes" in capsys.readouterr().out
    again = finetune.main(flags({**TINY, "data_root": tfa, "protocol": "few_shot", "eval_only": "true",
                                 "init_from": "out/finetune-coco-1shot"}))
    assert again["nAP75"] == metrics["nAP75"] and again["nAP"] == metrics["nAP"]


def copy_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}
