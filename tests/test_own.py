"""own.py: the recipe that `--preset own` makes of the images, the labels and the device."""
import csv
import dataclasses
import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import detreg
import finetune
import own
import predict
import run
from annotations import open_detection
from common import UserError
from conftest import ROOT
from test_docs import blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize("images, wanted, micro, world, expected", (
    (1000, 8, 8, 1, (8, 1)), (20, 16, 4, 1, (16, 4)), (5, 16, 4, 1, (4, 2)), (7, 16, 16, 1, (7, 1)),
    (1, 8, 8, 1, (1, 1)), (1000, 32, 6, 1, (30, 6)), (1000, 16, 4, 8, (16, 1)), (10, 16, 4, 8, (8, 1)),
    (1000, 4, 4, 8, (8, 1))))
def test_the_batch_fits_the_set_and_the_memory(images, wanted, micro, world, expected):
    batch, accumulate = own.fit_batch(images, wanted, micro, world)
    assert (batch, accumulate) == expected
    run.check_batch_size(max(images, batch), batch, world, accumulate)
    assert batch // (world * accumulate) <= micro


def test_fewer_images_than_processes():
    with pytest.raises(UserError, match="3 images are fewer than the 8 processes"):
        own.fit_batch(3, 16, 4, 8)


def test_lengths_grow_with_the_root_of_the_number_of_images():
    assert [own.training_steps(n, 60, 300, 4000) for n in (1, 20, 100, 400, 1000, 10**6)] == [
        300, 300, 600, 1200, 1900, 4000]


def test_the_median_object_decides_the_image_size():
    assert own.short_side(np.array([0.1, 0.2, 0.9]), 256, 416) == 288  # 56 / 0.2 = 280
    assert own.short_side(np.array([0.01]), 256, 416) == 416
    assert own.short_side(np.array([0.9]), 256, 416) == own.short_side(np.zeros(0), 256, 416) == 256
    assert own.image_knobs(320) == {"scales": (240, 288, 320), "max_size": 533, "crop_scales": (320, 400),
                                    "crop_range": (192, 320)}
    sides = own.relative_sides(np.array([[0, 0, 30, 30], [10, 10, 20, 50]], np.float32), (100, 300))
    assert sides.tolist() == pytest.approx([0.3, 0.2])


@pytest.mark.parametrize("images", (20, 100, 1000))
def test_fine_tuning_needs_no_further_flag(images, capsys):
    cfg, given, _ = finetune.parse(["--preset", "own", "--data", "synthetic"])
    labelled = open_detection("synthetic", None, "train", synthetic_images=20)
    labelled = dataclasses.replace(labelled, records=(labelled.records * 50)[:images])
    fitted = own.fit_finetuning(cfg, labelled, CPU, given)
    finetune.check(fitted, given, None)
    steps = {20: 300, 100: 600, 1000: 1900}[images]
    assert (fitted.size, fitted.arch, fitted.batch_size, fitted.steps) == ("small", "resnet18", 8, steps)
    assert fitted.eval_every == max(1, round(steps / (images // 8) / 12))
    assert fitted.eval_size == max(fitted.scales) == 288 and fitted.select == "best"
    printed = capsys.readouterr().out
    assert f"small model (on cpu); {steps} steps of 8 images, for {images} images" in printed
    assert "short side of 288 px" in printed and "WARNING" not in printed


def test_flags_and_a_checkpoint_are_stronger(capsys):
    cfg, given, _ = finetune.parse(["--preset", "own", "--data", "synthetic", "--epochs", "3", "--scales", "64",
                                    "--detector", "faster_rcnn_fpn", "--arch", "resnet34", "--size", "small"])
    labelled = open_detection("synthetic", None, "train", synthetic_images=20)
    fitted = own.fit_finetuning(cfg, labelled, CPU, given)
    assert (fitted.epochs, fitted.steps, fitted.scales, fitted.arch) == (3, None, (64,), "resnet34")
    assert (fitted.anchor_size, fitted.fpn_channels, fitted.lr, fitted.eval_every, fitted.eval_size) == (
        8, 64, 0.01, 1, 64)
    assert "(as given); 3 epochs of 8" in capsys.readouterr().out


def test_tiny_objects_are_announced(capsys):
    cfg, given, _ = finetune.parse(["--preset", "own", "--data", "synthetic"])
    labelled = open_detection("synthetic", None, "train", synthetic_images=20)
    for record in labelled.records:
        record.boxes[:, 2:] = record.boxes[:, :2] + 2
    fitted = own.fit_finetuning(cfg, labelled, CPU, given)
    assert fitted.eval_size == 416
    assert "WARNING: the side of the median labelled object is 5 px, below 12 px" in capsys.readouterr().out


def test_pretraining_fits_its_images(tmp_path, capsys):
    for i in range(30):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 10, 3), np.uint8)
        Image.fromarray(pixels).resize((60, 48), Image.Resampling.NEAREST).save(tmp_path / f"{i}.png")
    argv = ["--preset", "own", "--data", str(tmp_path), "--backbone_weights", "random"]
    cfg = run.parse_config(detreg.Config, detreg.PRESETS, argv, script="detreg", description=detreg.__doc__)
    fitted = own.fit_pretraining(cfg, argv, CPU)
    detreg.check(fitted)
    assert (fitted.steps, fitted.batch_size, fitted.accumulate, fitted.probe_images) == (200, 8, 1, 3)
    assert (fitted.backbone_weights, fitted.arch, fitted.num_classes) == ("random", "resnet18", 2)
    assert 224 <= max(fitted.scales) <= 320
    assert fitted == own.fit_pretraining(cfg, argv, CPU)
    assert "median proposal" in capsys.readouterr().out
    other = dataclasses.replace(cfg, preset=None)
    assert own.fit_pretraining(other, argv, CPU) is other


def write_pictures(folder, count):
    """Pictures with two rectangles each; returns their boxes, xyxy px."""
    folder.mkdir()
    boxes = []
    for i in range(count):
        rng = np.random.default_rng(i)
        pixels = rng.integers(90, 120, (60, 80, 3)).astype(np.uint8)
        corners = [(int(x), int(y), int(x) + 24, int(y) + 20) for x, y in zip((4, 46), rng.integers(2, 36, 2))]
        for (x1, y1, x2, y2), colour in zip(corners, ((250, 30, 30), (20, 40, 240))):
            pixels[y1:y2, x1:x2] = colour
        Image.fromarray(pixels).save(folder / f"{i}.png")
        boxes.append(corners)
    return boxes


def test_the_lines_of_the_readme_chain(tmp_path, monkeypatch, capsys):
    """Word for word, with flags for a tiny model behind each; each takes what the one before wrote."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "PHOTOS", 12)
    write_pictures(tmp_path / "NEW", 3)
    boxes = write_pictures(tmp_path / "LABELLED", 8)
    content = {"categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}],
               "images": [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in range(8)],
               "annotations": [{"id": 2 * i + k, "image_id": i, "category_id": k + 1,
                                "bbox": [x1, y1, x2 - x1, y2 - y1]}
                               for i, corners in enumerate(boxes) for k, (x1, y1, x2, y2) in enumerate(corners)]}
    (tmp_path / "LABELLED" / "train.json").write_text(json.dumps(content))
    (tmp_path / "LABELLED" / "val.json").write_text(json.dumps(content))
    Image.open(tmp_path / "NEW" / "0.png").save(tmp_path / "photo.jpg")
    tiny = {"detreg": "--backbone_weights random --scales 48 --hidden_dim 64 --enc_layers 1 --dec_layers 1 --steps 2 "
                      "--proposal_mode quick --num_workers 0 --batch_size 2 --num_queries 10",
            "finetune": "--steps 2 --scales 48 --batch_size 2 --num_workers 0", "predict": "--threshold 0"}
    readme = (ROOT / "README.md").read_text()
    lines = next(block for block in blocks(readme) if "--preset own" in block).splitlines()
    assert [line.split()[1] for line in lines] == ["detreg.py", "finetune.py", "predict.py"]
    for line in lines:
        name = line.split()[1].removesuffix(".py")
        {"detreg": detreg, "finetune": finetune, "predict": predict}[name].main(shlex.split(line)[2:]
                                                                              + tiny[name].split())
    out = tmp_path / "out"
    assert {f.name for f in out.iterdir()} == {"detreg-own-PHOTOS", "finetune-own-LABELLED",
                                               "predict-finetune-own-LABELLED-NEW"}
    tuned = torch.load(out / "finetune-own-LABELLED" / "best.pt", weights_only=True)
    assert [c["name"] for c in tuned["categories"]] == ["red", "blue"] and tuned["config"]["hidden_dim"] == 64
    rows = list(csv.reader((out / "predict-finetune-own-LABELLED-NEW" / "predictions.csv").read_text().splitlines()))
    assert rows[0][0] == "file" and {row[0] for row in rows[1:]} == {"0.png", "1.png", "2.png"}
    space = {}
    code = next(block for block in blocks(readme, "python") if "predict.load" in block)
    exec(code, space)
    assert {"boxes_xyxy", "labels", "names", "scores"} <= space["found"].keys()
    assert len(code.splitlines()) == 4
