"""detector_figures.py: attention is that of the layer, gradients are those of finite differences, AP over thresholds is
COCOeval's; slots, means and curves by hand; every figure end to end."""
import contextlib
import copy
import dataclasses
import functools
import io
import json

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_updetr import picture

import common
import detector_figures
import detectors
import detreg
import figures
import files
import finetune
import predict
import run

pytestmark = pytest.mark.usefixtures("one_thread")
CATEGORIES = [{"id": 3, "name": "cell"}, {"id": 7, "name": "platelet"}]
SIZES = {"eval_size": 64, "max_size": 96}


def stirred(model):
    """A detector whose queries, images and padding make a difference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "backbone" not in name:
                p.add_(torch.randn(p.shape, generator=generator),
                       alpha=0.05 if p.dim() == 1 else 0.5 * float(p.std()) + 0.05)
    return model.eval()


def save(path, method=finetune, categories=CATEGORIES, **values):
    """A small detector whose queries differ, fine-tuned or pretrained by DETReg. 80 x 60 is 85 x 64 to it."""
    values = {**SMALL, "num_feature_levels": 2, "synthetic_size": 64, "seed": 3, **values}
    if method is finetune:
        cfg = dataclasses.replace(finetune.Config(), **values, **SIZES)
        softmax = cfg.detector == "detr"
        model = stirred(detectors.build_detector(cfg, len(categories) + softmax, focal=not softmax))
    else:
        cfg = dataclasses.replace(method.Config(), **values, scales=(64,), max_size=96)
        model = stirred(detreg.DETReg(detectors.build_detector(cfg, 2, focal=True), 8))
    run.save_checkpoint(path, model, None, 1, cfg, script=method.__name__,
                        **{"categories": categories} if method is finetune else {})
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    for i in range(2):
        picture(i, (80, 60)).save(folder / f"{i}.png")
    for detector in ("detr", "conditional_detr", "deformable_detr"):
        save(folder / f"{detector}.pt", detector=detector)
    save(folder / "detreg.pt", detreg)
    return folder


@pytest.fixture(autouse=True)
def opened_once(monkeypatch):
    monkeypatch.setattr(predict, "load", CACHED)


CACHED = functools.cache(predict.load)


def draw(figure, out, *argv, **flags):
    argv = [figure, *argv, *(str(v) for k, value in flags.items()
                             for v in (f"--{k}", *(value if isinstance(value, list) else [value]))), "--out", out]
    result = figures.main(list(map(str, argv)))
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and len(sheet.convert("RGB").getcolors(1 << 20)) > 20
    written = json.loads(out.with_suffix(".json").read_text())
    assert written == files.plain(result) and written["figure"] == figure
    return written


# ==== Attention ====


@pytest.mark.parametrize("values", ({"detector": "detr"}, {"detector": "conditional_detr"},
                                    {"detector": "conditional_detr", "dec_layers": 1}, {"detector": "deformable_detr"},
                                    {"detector": "deformable_detr", "with_box_refine": True},
                                    {"detector": "dab_deformable_detr", "with_box_refine": True}))
def test_attention_is_that_of_the_layer(values):
    """Rows sum to 1, padding gets nothing, and with the weights by hand the layer's own output comes out."""
    cfg = dataclasses.replace(finetune.Config(), **SMALL | {"num_feature_levels": 2, **values})
    model = stirred(detectors.build_detector(cfg, 3, focal=cfg.detector != "detr"))
    images, mask = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, :, 64:] = True
    layer = model.transformer.decoder.layers[-1]
    with torch.no_grad(), detector_figures.recording(layer) as seen:
        model(images, mask)
        if "deformable" in cfg.detector:
            attention = layer.cross_attn
            places, weights = detector_figures.sampling_points(attention, seen, "cross_attn.")
            (_, reference, source, shapes, padding), _, output = seen["cross_attn"]
            assert reference.shape[-1] == (4 if cfg.with_box_refine else 2)
            value = attention.value_proj(source).masked_fill(padding[..., None], 0).unflatten(-1, (cfg.nheads, -1))
            mine = attention.output_proj(common.multi_scale_deformable_attention(value, shapes, places, weights))
            total = weights.sum((-1, -2))
        else:
            weights = detector_figures.attention_maps(layer, seen)  # [B, M, Q, S]
            total = weights.sum(-1)
            assert (weights[1].unflatten(-1, (3, 4))[..., 2:] == 0).all() and weights[0].min() > 0
            if cfg.detector == "detr":
                (_, _, memory), _, (output, _) = seen["multihead_attn"]
                attention, width = layer.multihead_attn, cfg.hidden_dim
                value = memory @ attention.in_proj_weight[2 * width:].T + attention.in_proj_bias[2 * width:]
                out_proj = attention.out_proj
            else:
                value, output = seen["ca_v_proj"][2], seen["cross_attn.out_proj"][2]
                out_proj = layer.cross_attn["out_proj"]
            value = value.unflatten(-1, (cfg.nheads, -1))
            mine = out_proj(torch.einsum("bmqs,bsmd->bqmd", weights, value).flatten(2))
    torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(mine, output, atol=1e-5, rtol=1e-4)
    assert not any(module._forward_hooks for module in model.modules()) and weights.std() > 1e-3


def test_attention_end_to_end(folder, tmp_path):
    names = ("detr", "conditional_detr", "deformable_detr")
    found = draw("attention", tmp_path / "a.png", checkpoint=[folder / f"{name}.pt" for name in names], top=2,
                 image=[folder / "0.png", folder / "1.png"])
    assert [one["image"] for one in found["images"]] == [str(folder / f"{i}.png") for i in range(2)]
    for one in found["images"]:
        assert list(one["found"]) == list(names)
        for best in one["found"].values():
            assert len(best) == 2 and best[0]["score"] >= best[1]["score"]
            assert all(0 <= row["inside"] <= 1 and 0 <= row["area"] <= 1 for row in best)
    detector = predict.load(str(folder / "detr.pt"), "auto", threshold=0.0)
    image = Image.open(folder / "0.png")
    with torch.no_grad():
        outputs = detector_figures.look(detector, detector_figures.view_of(detector, image))
    p = outputs["pred_logits"][0].softmax(-1)[:, :-1].amax(-1)
    best = found["images"][0]["found"]["detr"][0]
    assert best["query"] == int(p.argmax()) and best["score"] == pytest.approx(float(p.max()), abs=1e-6)
    cx, cy, w, h = outputs["pred_boxes"][0, best["query"]].tolist()
    assert best["box"] == pytest.approx([(cx - w / 2) * 80, (cy - h / 2) * 60, (cx + w / 2) * 80, (cy + h / 2) * 60],
                                        abs=1e-3)


# ==== Gradients ====


def test_gradients_are_finite_differences(folder, monkeypatch):
    detector = copy.deepcopy(predict.load(str(folder / "detreg.pt"), "auto", threshold=0.0))
    head = detector_figures.embedding_head(folder / "detreg.pt", torch.device("cpu"))
    view = detector_figures.view_of(detector, Image.open(folder / "0.png"))
    monkeypatch.setattr(detector_figures, "PROBES", 1)
    maps = detector_figures.image_gradients(detector, view, [5, 2], head)
    assert list(maps) == ["x", "y", "w", "h", "z"] and all(m.shape == (2, 64, 85) for m in maps.values())
    detector.model.double()
    single = torch.Tensor.float  # the detector's fp32 parts in double too
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.is_floating_point() else single(self))
    place = divmod(int(maps["x"][1].argmax()), 85)
    columns = []
    for channel in range(3):
        ends = []
        for step in (1e-6, -1e-6):
            moved = view.double()
            moved[(0, channel, *place)] += step
            with torch.no_grad():
                ends.append(detector_figures.look(detector, moved)["pred_boxes"][0, 2])
        columns.append((ends[0] - ends[1]) / 2e-6)
    expected = torch.stack(columns).norm(dim=0)  # [4]
    mine = torch.stack([maps[k][1][place] for k in "xywh"]).double()
    torch.testing.assert_close(mine, expected, rtol=2e-3, atol=1e-9)
    assert expected.min() > 1e-8


def test_the_norm_of_a_jacobian(monkeypatch):
    """Of a linear model z = A image: every pixel's norm is that of its columns of A."""
    class Linear(torch.nn.Module):
        def forward(self, view, mask):
            return {"pred_boxes": view.new_zeros(1, 1, 4) + view.sum() * 2, "hs": view.flatten()[None, None]}

    monkeypatch.setattr(detector_figures, "PROBES", 1000)
    matrix = torch.randn(5, 3 * 2 * 2)
    found = detector_figures.image_gradients(predict.Predictor(Linear(), *[None] * 10), torch.randn(1, 3, 2, 2), [0],
                                             lambda hs: hs @ matrix.T)
    torch.testing.assert_close(found["h"], torch.full((1, 2, 2), 12 ** 0.5))
    expected = matrix.square().sum(0).view(3, 2, 2).sum(0).sqrt()
    torch.testing.assert_close(found["z"][0], expected, rtol=0.15, atol=0)


def test_gradients_end_to_end(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(detector_figures, "PROBES", 1)
    places = [f"a={folder / 'detreg.pt'}", folder / "deformable_detr.pt"]
    found = draw("gradients", tmp_path / "g.png", checkpoint=places, image=[folder / "0.png"],
                 top=2)["images"][0]["found"]
    assert list(found["a"][0]["norm"]) == ["x", "y", "w", "h", "z"]
    assert list(found["deformable_detr"][1]["norm"]) == ["x", "y", "w", "h"]
    assert all(row["norm"]["x"] > 0 and 0 <= row["inside"]["x"] <= 1 for best in found.values() for row in best)


# ==== Slots and boxes ====


def test_slots_by_hand(folder, tmp_path):
    boxes = torch.tensor([[[0.2, 0.5, 0.6, 0.2], [0.5, 0.5, 0.1, 0.3]], [[0.6, 0.5, 0.5, 0.4], [0.5, 0.5, 0.1, 0.9]]])
    assert detector_figures.box_shapes(boxes).tolist() == [[1, 0], [0, 2]]
    one, two = detector_figures.slot_numbers(boxes, torch.tensor([[0.25, 0.5], [0.75, 0.5]]))
    assert one == pytest.approx({"query": 0, "score": 0.5, "x": 0.4, "y": 0.5, "w": 0.55, "h": 0.3, "spread": 0.2,
                                 "square": 0.5, "horizontal": 0.5, "vertical": 0})
    assert two["spread"] == 0 and (two["square"], two["horizontal"], two["vertical"]) == (0.5, 0, 0.5)
    square = detector_figures.draw_slot(boxes[:, 0], "q")
    assert square.getpixel((48, 120)) == (245, 130, 49) and square.getpixel((144, 120)) == (60, 180, 75)

    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(i, (80, 60)).save(tmp_path / "images" / f"{i}.png")
    found = draw("slots", tmp_path / "s.png", checkpoint=[folder / "detr.pt", f"self={folder / 'detreg.pt'}"],
                 data=tmp_path / "images", images=2, slots=9)
    assert found["images"] == 2 and list(found["checkpoints"]) == ["detr", "self"]
    for numbers in found["checkpoints"].values():
        queries = numbers["queries"]
        assert len(queries) == 8 and numbers["spread"] == pytest.approx(np.mean([q["spread"] for q in queries]))
        assert numbers["dominance"] == pytest.approx(np.mean([max(q[s] for s in detector_figures.SHAPES)
                                                              for q in queries]))


def test_boxes_side_by_side(folder, tmp_path):
    found = draw("boxes", tmp_path / "b.png", checkpoint=[folder / "detreg.pt", folder / "detr.pt"],
                 image=[folder / "0.png"], top=3)["images"][0]["found"]
    for name in found:
        expected = predict.load(str(folder / f"{name}.pt"), "auto", threshold=0.0)(Image.open(folder / "0.png"))
        assert [row["box"] for row in found[name]] == expected["boxes_xyxy"][:3].tolist()
        assert [row["score"] for row in found[name]] == expected["scores"][:3].tolist()
    assert found["detreg"][0]["name"] == "object" and found["detr"][0]["name"] in ("cell", "platelet")
    least = found["detr"][1]["score"]
    some = draw("boxes", tmp_path / "b.png", checkpoint=[folder / "detr.pt"], image=[folder / "0.png"],
                threshold=least)["images"][0]["found"]["detr"]
    assert some == found["detr"][:2]


# ==== Runs ====


def test_ap_over_thresholds_is_cocos(tmp_path, monkeypatch, capsys):
    """A run's detections.json against the labels that its checkpoint names; the same by evaluating."""
    out = tmp_path / "run"
    labelled = finetune.open_sets(dataclasses.replace(finetune.Config(), data="synthetic", synthetic_images=4,
                                                      synthetic_test_images=6, synthetic_size=64, seed=3)).test
    save(out / "last.pt", categories=labelled.categories, data="synthetic", synthetic_images=4, synthetic_test_images=6)
    truth, rng = labelled.coco_ground_truth(), np.random.default_rng(0)
    detections = [{"image_id": a["image_id"], "category_id": a["category_id"], "score": float(rng.random()),
                   "bbox": (np.array(a["bbox"]) + rng.normal(0, 0.1, 4) * a["bbox"][2]).tolist()}
                  for a in truth["annotations"]]
    (out / "detections.json").write_text(json.dumps(detections))
    (out / "metrics.json").write_text(json.dumps({"AP": 0.999}))
    found = draw("ap-iou", tmp_path / "i.png", out)
    said = capsys.readouterr().out
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {**truth, "annotations": [{"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0, **a, "id": i}
                                                 for i, a in enumerate(truth["annotations"], 1)]}
        coco.createIndex()
        reference = COCOeval(coco, coco.loadRes([dict(d) for d in detections]), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    precision = reference.eval["precision"]
    assert found["thresholds"] == [round(t, 2) for t in reference.params.iouThrs.tolist()]
    for i, key in enumerate(("AP", "APs", "APm", "APl")):
        expected = [p[p > -1].mean() if (p > -1).any() else None for p in (precision[k, :, :, i, 2] for k in range(10))]
        assert [v and round(v, 6) for v in found["runs"]["run"][key]] == [v and round(v, 6) for v in expected]
    assert 0.05 < reference.stats[0] < 0.95
    assert f"AP is {reference.stats[0]:.3f} here and 0.999 in its metrics.json" in said
    (out / "detections.json").unlink()  # now the checkpoint is evaluated, on the same labels and at its own size

    def evaluate(cfg, model, label_map, test_set, device):
        assert (cfg.eval_size, cfg.max_size, label_map) == (64, 96, [0, 1, 2, 3, 4])
        assert test_set.coco_ground_truth() == truth
        return finetune.Found({}, detections, {}, {})

    monkeypatch.setattr(finetune, "evaluate", evaluate)
    assert draw("ap-iou", tmp_path / "i.png", f"now={out}")["runs"]["now"] == found["runs"]["run"]


def test_ap_of_labels_that_are_given(tmp_path):
    """A folder of detections alone, as --eval_only leaves it, against --data: all boxes are found."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in range(2)]
    objects = [{"id": 2 * i + k, "image_id": i, "category_id": 3 + 4 * k, "bbox": [10 + i, 20, 30, 20], "area": 600}
               for i in range(2) for k in range(2)]
    for i in range(2):
        picture(i, (80, 60)).save(tmp_path / f"{i}.png")
    labels = {"images": images, "categories": CATEGORIES, "annotations": objects}
    (tmp_path / "test.json").write_text(json.dumps(labels))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "detections.json").write_text(json.dumps([d | {"score": 0.5} for d in objects]))
    found = draw("ap-iou", tmp_path / "i.png", tmp_path / "eval", data=tmp_path / "test.json")
    assert found["runs"]["eval"] == {"AP": [1] * 10, "APs": [1] * 10, "APm": [None] * 10, "APl": [None] * 10}


def write_metrics(folder, metrics):
    run.write_json(folder / "metrics.json", metrics)
    return folder


def test_mean_of_runs_by_hand(tmp_path, fails, capsys):
    runs = [write_metrics(tmp_path / name, {"AP": ap, "APs": None, "steps": 5, "per_class": {"cat": ap / 2},
                                            "warning": "x"})
            for name, ap in (("a", 0.25), ("b", 0.5), ("c", 0.375), ("d", 0.5))]
    found = figures.main(["mean", *map(str, runs), str(runs[0]), "--out", str(tmp_path / "mean.json")])
    assert found["metrics"]["AP"] == {"mean": 0.40625, "std": pytest.approx(0.11967839), "values": [.25, .5, .375, .5]}
    assert found["metrics"]["per_class cat"]["mean"] == 0.203125 and "steps" not in found["metrics"]
    written = json.loads((tmp_path / "mean.json").read_text())
    assert written["runs"] == list(map(str, runs)) and written["metrics"]["APs"]["mean"] is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["AP", "0.406", "0.120", "0.250", "0.500", "0.375", "0.500"]
    assert lines[3].split() == ["APs", *"------"] and "per_class" not in lines[4]
    only = figures.main(["mean", *map(str, runs), "--keys", "per_class cat", "--out", str(tmp_path / "mean.json")])
    assert list(only["metrics"]) == ["per_class cat"]
    assert "at least two different runs" in fails(figures.main, ["mean", runs[0], runs[0]])
    assert "--keys AR: not all of these runs have measured that; there is AP, APs" in fails(
        figures.main, ["mean", *runs, "--keys", "AR"])
    assert "nowhere: has no metrics.json" in fails(figures.main, ["mean", runs[0], tmp_path / "nowhere"])
    (tmp_path / "d" / "metrics.json").write_text("{")
    assert "metrics.json: not a readable json file" in fails(figures.main, ["mean", *runs])
    assert "ends in .json" in fails(figures.main, ["mean", *runs, "--out", tmp_path / "x.png"])


def test_curves_over_a_flag(tmp_path, fails):
    """Runs of one name are one line; where two have the same value, their mean counts."""
    runs = []
    for name, percent, ap in (("a", 10, 0.5), ("a", 1, 0.25), ("a", 10, 0.25), ("b", 1, 0.125)):
        folder = write_metrics(tmp_path / str(len(runs)), {"AP": ap})
        torch.save({"model": {"conv1.weight": torch.zeros(1)}, "script": "finetune",
                    "config": {"labels_percent": percent, "data": "coco"}}, folder / "last.pt")
        runs.append(f"{name}={folder}")
    found = draw("curves", tmp_path / "c.png", *runs, over="labels_percent")
    assert found["over"] == "labels_percent"
    assert found["runs"]["a"]["curves"] == {"AP": [[1, 0.25], [10, 0.375]]}
    assert found["runs"]["b"]["curves"] == {"AP": [[1, 0.125]]} and len(found["runs"]["a"]["folders"]) == 3
    for knob in ("data", "nothing"):
        assert f"--over {knob}: " in fails(figures.main, ["curves", *runs, "--over", knob])
    (tmp_path / "0" / "log.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    assert draw("curves", tmp_path / "c.png", runs[0])["runs"]["a"]["curves"] == {"loss": [[0, 1.0]]}
    assert "two runs are called so" in fails(figures.main, ["curves", runs[0], runs[1]])


def test_bad_input_ends_in_one_line(folder, fails, tmp_path):
    def fail(figure, *argv):
        return fails(figures.main, [figure, *argv, "--out", tmp_path / "x.png"])

    image, detr = ["--image", folder / "0.png"], ["--checkpoint", folder / "detr.pt"]
    assert "called detr too" in fail("boxes", *detr, folder / "detr.pt", *image)
    assert "no such image file" in fail("attention", *detr, "--image", tmp_path / "nowhere.png")
    torch.save({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    assert "no detector whose classes are known" in fail("gradients", "--checkpoint", tmp_path / "resnet.pth", *image)
    assert "give a name that ends in .png" in fails(figures.main, ["boxes", *detr, *image, "--out", tmp_path / "x.jpg"])
    write_metrics(tmp_path / "eval", {})
    (tmp_path / "eval" / "detections.json").write_text("[]")
    assert "give them with --data" in fail("ap-iou", tmp_path / "eval")
    assert "no such folder" in fail("slots", *detr, "--data", tmp_path / "nowhere")
    assert not (tmp_path / "x.png").exists()
