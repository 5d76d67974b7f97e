"""figures.py: what `localize` finds is what the model says, and what it draws; DUPR's analyses by hand,
on geometry that is known, and end to end."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import SMALL
from PIL import Image
from test_updetr import picture
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import box_iou, roi_align

import annotations
import common
import data
import dupr
import evaluation
import figures
import files
import run
import siamese_detr
import updetr

pytestmark = pytest.mark.usefixtures("one_thread")
M, N, SIDE, SHORT = 2, 8, 32, 48  # patches at once, queries, side of a patch, short side of the image


def small(method, **values):
    return method.Config(**{**SMALL, "num_feature_levels": 3, "patch_size": SIDE,
                            "backbone_weights": "random", **values})


def save(path, **values):
    """A small UP-DETR whose confidences differ from query to query, as updetr.py saves it."""
    cfg = small(updetr, num_patches=M, num_queries=N, **values)
    model = updetr.build_models(cfg)[0].eval()
    torch.manual_seed(1)
    for head in [model.detector.bbox_embed, model.detector.class_embed] if "deformable" not in cfg.detector else []:
        torch.nn.init.normal_((head.layers[-1] if isinstance(head, common.MLP) else head).weight, std=0.3)
    run.save_checkpoint(path, model, None, 0, cfg, script="updetr")
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    picture(0, (80, 60)).save(folder / "image.png")
    picture(1, (50, 70)).save(folder / "other.png")
    return folder, save(folder / "last.pt")


def run_script(folder, *boxes, **values):
    out = values.pop("out", folder / "found.png")
    argv = ["localize", "--checkpoint", values.pop("checkpoint", folder / "last.pt"),
            "--image", folder / "image.png", "--patches", *boxes,
            "--size", SHORT, "--out", out, *(v for k, value in values.items() for v in (f"--{k}", value))]
    return figures.main(list(map(str, argv)))


def expected(model, image, origin, boxes, groups):
    """Directly: one pass for all `boxes`, at most M; the best of every group's queries."""
    def tensor(picture, size):
        pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR), np.float64) / 255
        return torch.from_numpy(((pixels - data.IMAGENET_MEAN) / data.IMAGENET_STD).transpose(2, 0, 1)).float()

    patches = torch.stack([tensor(origin.crop(box), (SIDE, SIDE)) for box in boxes])[None]
    with torch.no_grad():
        # 80 x 60 at 48: 64 x 48
        out = model(tensor(image, (64, SHORT))[None], torch.zeros(1, SHORT, 64, dtype=torch.bool), patches)
    logits = out["pred_logits"][0].double().numpy()
    p = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, :2].max(1).reshape(len(boxes), N // groups)
    best = p.argmax(1) + np.arange(len(boxes)) * (N // groups)
    cx, cy, w, h = out["pred_boxes"][0].double().numpy()[best].T
    return p.max(1), np.stack([(cx - w / 2) * 80, (cy - h / 2) * 60, (cx + w / 2) * 80, (cy + h / 2) * 60], 1)


def compare(found, *parts):
    scores, boxes = (np.concatenate(values) for values in zip(*parts))
    np.testing.assert_allclose(found["scores"].numpy(), scores, atol=1e-5)
    np.testing.assert_allclose(found["boxes"].numpy(), boxes, atol=2e-3)


BOXES = [(4, 6, 30, 40), (20, 10, 76, 50), (0, 0, 48, 60), (50, 5, 60, 55), (1, 30, 40, 58)]
TEXTS = [",".join(map(str, box)) for box in BOXES]


def test_localize_is_the_model(saved, capsys):
    folder, model = saved
    image, origin = (Image.open(folder / f"{name}.png") for name in ("image", "other"))
    capsys.readouterr()
    found = run_script(folder, *TEXTS[:2], threshold=0)
    compare(found, expected(model, image, image, BOXES[:2], M))
    said = capsys.readouterr().out
    for text, score, box in zip(TEXTS, found["scores"].tolist(), found["boxes"].tolist()):
        assert f"patch {text}: confidence {score:.3f} at {', '.join(f'{v:.0f}' for v in box)}\n" in said
    assert "found.png: 2 of 2 patches found with confidence > 0" in said
    # more patches than the model takes at a time
    compare(run_script(folder, *TEXTS, threshold=0),
            *(expected(model, image, image, BOXES[k:k + M], M) for k in (0, 2, 4)))
    # patches of another picture
    other = run_script(folder, *TEXTS[2:4][::-1][1:], TEXTS[0], threshold=0, patch_image=folder / "other.png")
    compare(other, expected(model, image, origin, [BOXES[2], BOXES[0]], M))
    assert np.abs(other["boxes"][1].numpy() - found["boxes"][0].numpy()).max() > 1e-4


@pytest.mark.parametrize("detector", ("conditional_detr", "deformable_detr"))
def test_other_detectors_and_no_reconstruction(saved, tmp_path, detector):
    folder, _ = saved
    model = save(tmp_path / "c.pt", detector=detector, reconstruction=False, attention_mask=False)
    image = Image.open(folder / "image.png")
    compare(run_script(folder, *TEXTS[:2], checkpoint=tmp_path / "c.pt"), expected(model, image, image, BOXES[:2], M))


def test_files_that_say_less(saved, tmp_path):
    folder, model = saved
    state = torch.load(folder / "last.pt", weights_only=True)["model"]  # a released file: neither the script nor M
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "released.pth")
    loaded, side = figures.load_updetr(str(tmp_path / "released.pth"), 4)
    assert (loaded.num_patches, side, loaded.attention_mask, loaded.training) == (4, 128, True, False)
    assert loaded.detector.transformer.encoder.layers[0].self_attn.num_heads == 8
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    assert figures.load_updetr(str(tmp_path / "released.pth"), 10)[0].num_patches == N  # one query each at most
    ours, side = figures.load_updetr(str(folder / "last.pt"), 4)
    assert (ours.num_patches, side, ours.detector.transformer.encoder.layers[0].self_attn.num_heads) == (M, SIDE, 4)
    single = {**state, "query_embed.weight": state["query_embed.weight"][:3]}
    torch.save({"model": single}, tmp_path / "single.pth")
    with pytest.raises(common.UserError, match="--num_patches 2: .*single.pth has 3 queries"):
        figures.load_updetr(str(tmp_path / "single.pth"), 2)


def test_threshold_decides_what_is_drawn(saved, tmp_path, monkeypatch, capsys):
    folder, _ = saved
    scores = run_script(folder, *TEXTS, threshold=0)["scores"]
    between = float(scores.sort().values[1:3].mean())
    drawn = []
    draw = evaluation.draw_boxes_figure
    monkeypatch.setattr(evaluation, "draw_boxes_figure", lambda *args: drawn.append(args) or draw(*args))
    capsys.readouterr()
    found = run_script(folder, *TEXTS, threshold=between, out=tmp_path / "a" / "b.png")
    path, images, columns, limit = drawn[0]
    asked, shown = columns.values()
    assert (path == tmp_path / "a" / "b.png" and len(images) == 1 and limit == 5
            and f"confidence > {between:g}" in list(columns)[1])
    assert (asked[0][0].tolist() == [list(box) for box in BOXES] and asked[0][1] == ["1", "2", "3", "4", "5"]
            and asked[0][2].size == shown[0][2].size == (80, 60))
    sure = scores > between
    assert (sure.sum() == 3 and torch.equal(shown[0][0].isnan().any(1), ~sure)
            and torch.equal(shown[0][0][sure], found["boxes"][sure]))
    assert shown[0][1] == [f"{i + 1}: {s:.2f}" for i, s in enumerate(scores.tolist())]
    said = capsys.readouterr().out
    assert ([bool(x) for x in re.findall(r"patch .*?( \(not drawn\))?\n", said)] == (~sure).tolist()
            and "3 of 5 patches found" in said)
    with Image.open(tmp_path / "a" / "b.png") as sheet:
        assert sheet.format == "PNG" and sheet.height > 200 and sheet.width > 2 * 300
    assert (run_script(folder, *TEXTS[:1], threshold=1)["scores"].shape == (1,)
            and "0 of 1 patches found" in capsys.readouterr().out)


def test_what_is_not_drawn_leaves_no_mark(tmp_path):
    grey = Image.new("RGB", (60, 40), (128, 128, 128))
    boxes = torch.tensor([[5.0, 5, 30, 30], [torch.nan] * 4])
    evaluation.draw_boxes_figure(tmp_path / "one.png", [grey], {"x": [(boxes[:1], ["1"])]})
    evaluation.draw_boxes_figure(tmp_path / "two.png", [grey], {"x": [(boxes, ["1", "2"])]})
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("one", "two")))


def test_bad_input_ends_in_one_line(fails, saved, tmp_path):
    folder, model = saved

    def fail(*boxes, **values):
        argv = {"checkpoint": folder / "last.pt", "image": folder / "image.png", "out": tmp_path / "out.png", **values}
        return fails(figures.main, ["localize", *(v for k, value in argv.items() for v in (f"--{k}", value)),
                                    "--patches", *(boxes or TEXTS[:1])])

    for text in ("1,2,3", "a,b,c,d", "1,2,3,4,5", "10,10,10,30", "30,10,10,30", "10,10,30,10.5", "1.5,1,2.5,20",
                 "nan,0,20,20", "0,0,20,inf"):
        assert f"--patches {text}: a patch is x1,y1,x2,y2 in pixels, with x1 < x2 and y1 < y2" in fail(text)
    for text in ("0,0,81,20", "0,0,20,61", "0,-1,20,20"):
        line = fail(TEXTS[0], text)
        assert f"--patches {text}: reaches out of {folder / 'image.png'}, which is 80 x 60 pixels" in line
    assert (f"reaches out of {folder / 'other.png'}, which is 50 x 70 pixels"
            in fail("0,0,60,20", patch_image=folder / "other.png"))
    assert (str(tmp_path / "nowhere.png") in fail(image=tmp_path / "nowhere.png")
            and "nowhere.png" in fail(patch_image=tmp_path / "nowhere.png"))
    assert f"{tmp_path / 'nowhere.pt'}: no such checkpoint" in fail(checkpoint=tmp_path / "nowhere.pt")
    cfg = small(siamese_detr, num_regions=2)
    run.save_checkpoint(tmp_path / "siamese.pt", siamese_detr.build_models(cfg)[0], None, 0, cfg, script="siamese_detr")
    assert ("siamese.pt: not a checkpoint of UP-DETR's pretraining but of siamese_detr.py"
            in fail(checkpoint=tmp_path / "siamese.pt"))
    run.save_checkpoint(tmp_path / "tuned.pt", model.detector, None, 0, cfg, script="finetune")
    assert ("tuned.pt: not a checkpoint of UP-DETR's pretraining (no patch2query"
            in fail(checkpoint=tmp_path / "tuned.pt"))
    assert not (tmp_path / "out.png").exists()


# ==== DUPR: equations ====


def test_equations_by_hand():
    torch.manual_seed(0)
    f = torch.randn(5, 7, 9, dtype=torch.float64)  # [n, C, P]
    torch.testing.assert_close(figures.iou_similarity(f, 3 * f), torch.ones(5).double())
    torch.testing.assert_close(figures.iou_similarity(f[:1], -f[:1]), -torch.ones(1).double())
    q, k = torch.tensor([[3.0, 1, 0], [4, 0, 2]]), torch.tensor([[4.0, 0, 0], [3, 5, 1]])
    assert figures.iou_similarity(q, k).item() == pytest.approx((24 / 25 + 0 + 1) / 3)
    pairs = figures.map_similarity(f[:2], f[2:])
    assert pairs.shape == (2, 3)
    torch.testing.assert_close(pairs, figures.iou_similarity(f[:2, None], f[None, 2:]))

    eye = torch.eye(6).double()
    torch.testing.assert_close(figures.affinity(eye, 2 * eye, 0.001), eye)
    matrix = figures.affinity(f[0, :, :4], f[1], 0.1)  # [4, 9]
    assert matrix.shape == (4, 9)
    torch.testing.assert_close(matrix.sum(0), torch.ones(9).double())
    i, j = 2, 5
    sim = [float(f[0, :, a] @ f[1, :, j] / f[0, :, a].norm() / f[1, :, j].norm()) for a in range(4)]
    assert matrix[i, j].item() == pytest.approx(np.exp(sim[i] / 0.1) / np.exp(np.array(sim) / 0.1).sum())

    order = torch.randperm(9)
    assert (torch.equal(figures.match(f[0], 2 * f[0][:, order]), order.argsort())
            and figures.match(f[0, :, :4], f[1]).shape == (4,))


@pytest.mark.parametrize("box", [(40, 30, 90, 70), (0, 0, 160, 120), (0, 100, 8, 120), (70.5, 3.25, 72, 115)])
def test_rois_have_the_iou_they_say(box):
    box, hw = torch.tensor(box, dtype=torch.float32), (120, 160)
    rois, bins = figures.sample_rois(np.random.default_rng(1), box, hw)
    assert rois.dtype == torch.float64 and rois.shape == (len(bins), 4) and len(set(bins.tolist())) == len(bins)
    ious = box_iou(box[None].double(), rois)[0]
    assert torch.equal((ious * 20).long(), bins) and (ious < 1).all() and len(bins) >= 19
    assert (rois >= 0).all() and (rois <= torch.tensor([160, 120, 160, 120])).all()
    again, _ = figures.sample_rois(np.random.default_rng(1), box, hw)
    other, _ = figures.sample_rois(np.random.default_rng(2), box, hw)
    assert torch.equal(again, rois) and not torch.equal(other, rois)
    # what is not reached is left out
    few, bins = figures.sample_rois(np.random.default_rng(1), box, hw, rounds=1, tries=12)
    assert len(few) == len(bins) < 13 and torch.equal((box_iou(box[None].double(), few)[0] * 20).long(), bins)


# ==== DUPR: geometry ====


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_true_places_are_those_of_the_crops(flips):
    crops, size, grid = [(10, 20, 110, 90), (45, 0, 105, 64)], 64, 4
    boxes, valid = dupr.overlap_boxes(crops, list(flips), size)
    places, inside = figures.true_places(boxes, flips, size, grid)
    assert valid and places.shape == (16, 2) and 0 < inside.sum() < 16
    for p in range(16):
        i, j = divmod(p, grid)
        seen = []
        for (x1, y1, x2, y2), flip, at in zip(crops, flips, ((j + 0.5, i + 0.5), None)):
            if at:  # view 1 -> the image
                x, y = x1 + ((grid - at[0]) if flip else at[0]) / grid * (x2 - x1), y1 + at[1] / grid * (y2 - y1)
            else:  # the image -> view 2
                seen = [(x - x1) / (x2 - x1), (y - y1) / (y2 - y1)]
                seen[0] = 1 - seen[0] if flip else seen[0]
        assert bool(inside[p]) == all(0 <= v <= 1 for v in seen)
        if inside[p]:
            assert places[p].tolist() == pytest.approx([seen[0] * grid - 0.5, seen[1] * grid - 0.5], abs=1e-4)


def test_distances_are_in_patches():
    places = torch.tensor([[0.0, 0], [3, 1], [1.5, 2]], dtype=torch.float64)
    assert figures.distances(torch.tensor([0, 4, 9]), places, 4).tolist() == pytest.approx([0, 3, 0.5])
    numbers = figures.match_numbers([torch.tensor([0.0, 1.0]), torch.tensor([1.1, 5, 7])])
    assert numbers == {"within_1": pytest.approx(0.4), "median_distance": pytest.approx(1.1)}


def test_a_view_keeps_the_box_whole():
    rng, hw, size = np.random.default_rng(0), (90, 120), 64
    crops = set()
    for box in ((30, 20, 60, 50), (0, 0, 20, 90), (100, 80, 120, 90), (0, 0, 120, 90)):
        for _ in range(10):
            draw, seen = figures.draw_box_view(rng, hw, torch.tensor(box, dtype=torch.float32), size)
            x1, y1, x2, y2 = draw["crop"]
            assert (0 <= x1 <= box[0] and 0 <= y1 <= box[1] and box[2] <= x2 <= 120
                    and box[3] <= y2 <= 90 and not draw["flip"])
            back = (seen / size * torch.tensor([x2 - x1, y2 - y1] * 2) + torch.tensor([x1, y1] * 2)).tolist()
            assert back == pytest.approx(box, abs=1e-4)
            crops.add(draw["crop"])
    assert draw["crop"] == (0, 0, 120, 90) and len(crops) > 10  # no allowed aspect fits the last box: the whole image


# ==== DUPR: the commands ====


NO_COLOURS = data.Photometric(0, 0, 0, 0, p_jitter=0, p_gray=0, p_blur=0)


def analyse(figure, out, **values):
    """The command's result, after a look at what it wrote."""
    values = {"checkpoint": "random", "arch": "resnet18", "data": "synthetic", **values, "out": out}
    argv = [figure] + [v for k, value in values.items()
                       for v in (f"--{k}", *(value if isinstance(value, (list, tuple)) else [value]))]
    result = figures.main(list(map(str, argv)))
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 200 and len(sheet.convert("RGB").getcolors(1 << 20)) > 20
    written = json.loads(out.with_suffix(".json").read_text())
    assert written == files.plain(result) and written["figure"] == figure
    return result


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    """Pictures whose red and green say where a pixel is."""
    folder = tmp_path_factory.mktemp("ramps")
    y, x = np.mgrid[:200, :256].astype(np.float64)
    for i in range(3):
        pixels = np.stack([x, y / 200 * 255, np.full_like(x, 40 * i)], -1)
        Image.fromarray(pixels.round().astype(np.uint8)).save(folder / f"{i}.png")
    return folder


class Places(torch.nn.Module):
    """conv4 features that say where in the picture of `ramps` a patch lies."""

    def forward(self, images):
        mean, std = (torch.tensor(v)[:, None, None] for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
        angles = F.avg_pool2d(images * std + mean, 16)[:, :2] * torch.pi / 2
        return [torch.cat([angles.cos(), angles.sin()], 1)]  # cosines fall with the distance in x and in y


def test_match_finds_what_the_features_say(ramps, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "COLOURS", NO_COLOURS)
    monkeypatch.setattr(figures, "open_backbones",
                        lambda args, stage: {"exact": Places()} if stage == "conv4" else None)
    result = analyse("match", tmp_path / "m.png", data=ramps, size=128)
    exact = result["checkpoints"]["exact"]
    assert result["grid"] == 8 and result["images"] == 3 and result["patches"] > 20
    assert exact["within_1"] == 1 and exact["median_distance"] < 0.6 and exact["shuffled"]["within_1"] < 0.5
    draw = dupr.draw_view  # a flip that is not accounted for is seen
    monkeypatch.setattr(dupr, "draw_view", lambda *a: {**draw(*a), "flip": False})
    flips = iter([False, True] * 3)
    monkeypatch.setattr(dupr, "apply_view",
                        lambda image, d, size, apply=dupr.apply_view: apply(image, {**d, "flip": next(flips)}, size))
    assert analyse("match", tmp_path / "m.png", data=ramps, size=128)["checkpoints"]["exact"]["within_1"] < 0.7


def test_match_of_another_image_is_worse(tmp_path):
    result = analyse("match", tmp_path / "m.png", images=4, size=128)
    numbers = result["checkpoints"]["random"]
    assert (numbers["within_1"] > numbers["shuffled"]["within_1"]
            and numbers["median_distance"] < numbers["shuffled"]["median_distance"])


def test_affinity_of_equal_views_is_the_identity(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    (tmp_path / "test.json").write_text(json.dumps({
        "images": [{"id": 1, "width": 80, "height": 60, "file_name": "0.png"}], "categories": [{"id": 1, "name": "x"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 80, 60]},
                        {"image_id": 1, "category_id": 1, "bbox": [5, 5, 9, 9]},
                        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 80, 60], "iscrowd": 1}]}))
    monkeypatch.setattr(figures, "COLOURS", NO_COLOURS)
    # the object is the whole image: so are its views
    result = analyse("affinity", tmp_path / "a.png", data=tmp_path / "test.json", tau=0.01)
    found = result["checkpoints"]["random"]
    assert (result["images"] == 1 and result["tau"] == 0.01 and found["accuracy"] == 1
            and 1 / 196 < found["diagonal"] < 1)


def test_iou_similarity_is_that_of_the_model(tmp_path, capsys):
    result = analyse("iou-similarity", tmp_path / "i.png", images=2, size=64)
    labelled = annotations.open_detection("synthetic", None, "test", synthetic_images=2, seed=42)
    torch.manual_seed(42)
    resnet = torchvision.models.resnet18().eval()
    sums, counts = np.zeros(20), np.zeros(20, int)
    for i in range(2):
        image, target = labelled.load(i)
        x = data.to_normalized_tensor(image.resize((64, 64), Image.Resampling.BILINEAR))[None]
        with torch.no_grad():
            feature = resnet.layer3(
                resnet.layer2(resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x)))))))
        rng = data.sample_rng(42, 0, i)
        for box in target["boxes_xyxy"]:
            rois, bins = figures.sample_rois(rng, box, (160, 160))
            boxes = torch.cat([box[None], rois.float()]) * 64 / 160
            q, *k = roi_align(feature, [boxes], 14, 1 / 16, aligned=True)
            for b, other in zip(bins.tolist(), k):
                sums[b] += float(F.cosine_similarity(q, other, dim=0).mean())
                counts[b] += 1
    found = result["checkpoints"]["random"]
    assert (result["counts"].tolist() == counts.tolist() and counts.min() > 0
            and result["objects"] == sum(len(r.boxes) for r in labelled.records))
    np.testing.assert_allclose(found["similarity"], sums / counts, atol=1e-5)
    assert (found["difference"] == pytest.approx((sums / counts)[10:].mean() - (sums / counts)[:6].mean(), abs=1e-5)
            and found["difference"] > 0)
    assert re.search(rf"random +{found['above_0.5']:.3f} +{found['below_0.3']:.3f} +{found['difference']:.3f}\n",
                     capsys.readouterr().out)


def test_checkpoints_do_not_change_each_other(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "one.pth")
    both = analyse("iou-similarity", tmp_path / "i.png", checkpoint=["random", tmp_path / "one.pth"], images=2, size=64)
    alone = analyse("iou-similarity", tmp_path / "j.png",
                    checkpoint=[f"mine={tmp_path / 'one.pth'}"], images=2, size=64)
    assert list(both["checkpoints"]) == ["random", "one"] and both["checkpoints"]["one"] == alone["checkpoints"]["mine"]
    assert both["checkpoints"]["random"]["similarity"] != both["checkpoints"]["one"]["similarity"]
    other = analyse("iou-similarity", tmp_path / "j.png", checkpoint=tmp_path / "one.pth", images=2, size=64, seed=1)
    assert other["checkpoints"]["one"]["similarity"] != both["checkpoints"]["one"]["similarity"]


def test_neighbours_of_a_duplicate(tmp_path):
    """18 images in class folders of 2, 2 and 14: more than one chunk. 0 and 1 are the same picture, 2 and 3 are not."""
    keys = []
    for i in range(18):
        folder = tmp_path / "images" / f"n0000000{min(i // 2, 2)}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(0 if i == 1 else i, (70, 60)).save(folder / f"{i:02d}.png")
        keys.append(f"{folder.name}/{i:02d}.png")
    result = analyse("neighbours", tmp_path / "n.png", data=tmp_path / "images", size=64, queries=18, top=3)
    assert result["images"] == 18 and sorted(row["key"] for row in result["queries"]) == keys
    near = {row["key"]: row["neighbours"]["random"] for row in result["queries"]}
    for one, other in ((0, 1), (1, 0)):
        assert (near[keys[one]][0]["key"] == keys[other]
                and near[keys[one]][0]["similarity"] == pytest.approx(1, abs=1e-5))
    assert all(row["key"] == keys[row["index"]] and len(near[row["key"]]) == 3 for row in result["queries"])
    assert all(n["index"] != row["index"] for row in result["queries"] for n in row["neighbours"]["random"])
    assert all(a["similarity"] >= b["similarity"] for found in near.values() for a, b in zip(found, found[1:]))
    share = np.mean([n["key"][:9] == key[:9] for key, found in near.items() for n in found])
    assert result["checkpoints"]["random"]["same_folder"] == pytest.approx(share) and 0 < share < 1


def test_same_folder_needs_class_folders_with_company():
    keys = {0: "n00000001/a", 1: "n00000001/b", 2: "n00000002/c"}
    assert figures.same_folder(keys, {0: [1, 2], 2: [0, 1]}) == 0.5  # c is alone in its folder and is not counted
    assert figures.same_folder(keys, {2: [0, 1]}) is None
    assert figures.same_folder({0: "dogs/a", 1: "dogs/b"}, {0: [1]}) is None


def opened(*checkpoints, arch=None, stage="conv5"):
    return figures.open_backbones(SimpleNamespace(checkpoint=list(map(str, checkpoints)), arch=arch, seed=3,
                                                  device=torch.device("cpu")), stage)


def test_backbones_of_any_family(tmp_path, capsys):
    torch.manual_seed(0)
    resnet, x = torchvision.models.resnet18(), torch.randn(1, 3, 64, 64)
    for name, buffer in resnet.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)  # so that training mode would be seen
    state = resnet.eval().state_dict()
    body = {k: v for k, v in state.items() if not k.startswith("fc.")}
    files = {"tv.pth": state, "moco.pth.tar": {"state_dict": {f"module.encoder_q.{k}": v for k, v in state.items()}},
             "swav.pth": {f"module.{k}": v for k, v in body.items()},
             "soco.pth": {"model": {f"module.encoder.{k}": v for k, v in body.items()}},
             "detr.pth": {"model": {f"backbone.0.body.{k}": v for k, v in body.items() if "num_batches" not in k}},
             "run/last.pt": {"model": {f"encoder_q.{k}": v for k, v in body.items()}, "script": "dupr"}}
    (tmp_path / "run").mkdir()
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    capsys.readouterr()
    found = opened(*(tmp_path / name for name in files), f"again={tmp_path / 'tv.pth'}", "random")
    assert list(found) == ["tv", "moco", "swav", "soco", "detr", "run", "again", "random"]
    assert len(capsys.readouterr().out.splitlines()) == 7  # one line per file
    with torch.no_grad():
        extract = create_feature_extractor(resnet, {"layer3": "conv4", "layer4": "conv5"})
        for name, backbone in found.items():
            assert torch.allclose(backbone(x)[0], extract(x)["conv5"], atol=1e-4) == (name != "random"), name
        torch.testing.assert_close(opened(tmp_path / "detr.pth", stage="conv4")["detr"](x)[0], extract(x)["conv4"])
    assert found["random"].arch == "resnet18" and not found["random"].training
    again = opened("random", arch="resnet18")["random"].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in found["random"].state_dict().items())
    assert opened("random", stage="conv4")["random"].arch == "resnet50"
    with pytest.raises(common.UserError, match="call.*run.*NAME="):
        opened(tmp_path / "run/last.pt", f"run={tmp_path / 'tv.pth'}")
    torch.save({k: v for k, v in body.items() if not k.startswith("layer4.")}, tmp_path / "short.pth")
    assert list(opened(tmp_path / "short.pth", stage="conv4")) == ["short"]
    with pytest.raises(common.UserError, match="short.pth: its ResNet ends before conv5"):
        opened(tmp_path / "short.pth")


def test_analyses_of_bad_input_end_in_one_line(fails, ramps, tmp_path):
    def fail(figure="match", **values):
        values = {"checkpoint": "random", "arch": "resnet18", "data": ramps, "size": 64,
                  "out": tmp_path / "out.png", **values}
        return fails(figures.main, [figure, *(v for k, value in values.items() for v in (f"--{k}", value))])

    assert ("nowhere.pt: no such checkpoint" in fail(checkpoint=tmp_path / "nowhere.pt")
            and "no such checkpoint" in fail(checkpoint="x=dpur"))
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "text.pt: " in fail(checkpoint=tmp_path / "text.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "other.pt: no known kind of checkpoint" in fail(checkpoint=tmp_path / "other.pt")
    for size in (0, 40, -32):
        assert f"--size {size}: must be {'a multiple of 32' if size > 32 else 'at least 32'}" in fail(size=size)
    assert ("--out" in fail(out=tmp_path / "out.json") and "--images 0" in fail(images=0)
            and "--seed -1" in fail(seed=-1))
    assert ("1 images, at least 2 are needed" in fail(images=1)
            and "at least 4 are needed" in fail("neighbours", top=3, queries=1))
    assert "--top 0" in fail("neighbours", top=0) and "--tau 0.0" in fail("affinity", tau=0, data="synthetic", images=1)
    assert ("nowhere" in fail(data=tmp_path / "nowhere")
            and "no images in" in fail(data=(tmp_path / "empty", (tmp_path / "empty").mkdir())[0]))
    assert "no labelled set for the test split" in fail("affinity") and "no labelled set" in fail("iou-similarity")
    (tmp_path / "small").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 30)).save(tmp_path / "small" / f"{i}.png")
    assert "8 x 30 pixels, at least 16 a side are needed" in fail(data=tmp_path / "small")
    (tmp_path / "small" / "test.json").write_text(json.dumps({
        "images": [{"id": 1, "width": 8, "height": 30, "file_name": "1.png"}],
        "categories": [{"id": 1, "name": "x"}], "annotations": []}))
    assert ("none of the 1 images of its test split has a box to look at"
            in fail("iou-similarity", data=tmp_path / "small"))
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "out.json").exists()
