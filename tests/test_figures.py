"""figures.py: what `localize` finds is what the model says, and what it draws."""
import re

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from test_updetr import picture

import common
import data
import evaluation
import figures
import siamese_detr
import updetr

pytestmark = pytest.mark.usefixtures("one_thread")
M, N, SIDE, SHORT = 2, 8, 32, 48                                          # patches at once, queries, side of a patch, short side of the image


def small(method, **values):
    return method.Config(**{**SMALL, "num_feature_levels": 3, "patch_size": SIDE, "backbone_weights": "random", **values})


def save(path, **values):
    """A small UP-DETR whose confidences differ from query to query, as updetr.py saves it."""
    cfg = small(updetr, num_patches=M, num_queries=N, **values)
    model = updetr.build_models(cfg)[0].eval()
    torch.manual_seed(1)
    for head in [model.detector.bbox_embed, model.detector.class_embed] if "deformable" not in cfg.detector else []:
        torch.nn.init.normal_((head.layers[-1] if isinstance(head, common.MLP) else head).weight, std=0.3)
    common.save_checkpoint(path, model, None, 0, cfg, script="updetr")
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    picture(0, (80, 60)).save(folder / "image.png")
    picture(1, (50, 70)).save(folder / "other.png")
    return folder, save(folder / "last.pt")


def run(folder, *boxes, **values):
    out = values.pop("out", folder / "found.png")
    argv = ["localize", "--checkpoint", values.pop("checkpoint", folder / "last.pt"), "--image", folder / "image.png", "--patches", *boxes,
            "--size", SHORT, "--out", out, *(v for k, value in values.items() for v in (f"--{k}", value))]
    return figures.main(list(map(str, argv)))


def expected(model, image, origin, boxes, groups):
    """Directly: one pass for all `boxes`, at most M; the best of every group's queries."""
    def tensor(picture, size):
        pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR), np.float64) / 255
        return torch.from_numpy(((pixels - data.IMAGENET_MEAN) / data.IMAGENET_STD).transpose(2, 0, 1)).float()

    patches = torch.stack([tensor(origin.crop(box), (SIDE, SIDE)) for box in boxes])[None]
    with torch.no_grad():
        out = model(tensor(image, (64, SHORT))[None], torch.zeros(1, SHORT, 64, dtype=torch.bool), patches)           # 80 x 60 at 48: 64 x 48
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
    found = run(folder, *TEXTS[:2], threshold=0)
    compare(found, expected(model, image, image, BOXES[:2], M))
    said = capsys.readouterr().out
    for text, score, box in zip(TEXTS, found["scores"].tolist(), found["boxes"].tolist()):
        assert f"patch {text}: confidence {score:.3f} at {', '.join(f'{v:.0f}' for v in box)}\n" in said
    assert "found.png: 2 of 2 patches found with confidence > 0" in said
    # more patches than the model takes at a time
    compare(run(folder, *TEXTS, threshold=0), *(expected(model, image, image, BOXES[k:k + M], M) for k in (0, 2, 4)))
    # patches of another picture
    other = run(folder, *TEXTS[2:4][::-1][1:], TEXTS[0], threshold=0, patch_image=folder / "other.png")
    compare(other, expected(model, image, origin, [BOXES[2], BOXES[0]], M))
    assert np.abs(other["boxes"][1].numpy() - found["boxes"][0].numpy()).max() > 1e-4


@pytest.mark.parametrize("detector", ("conditional_detr", "deformable_detr"))
def test_other_detectors_and_no_reconstruction(saved, tmp_path, detector):
    folder, _ = saved
    model = save(tmp_path / "c.pt", detector=detector, reconstruction=False, attention_mask=False)
    image = Image.open(folder / "image.png")
    compare(run(folder, *TEXTS[:2], checkpoint=tmp_path / "c.pt"), expected(model, image, image, BOXES[:2], M))


def test_files_that_say_less(saved, tmp_path):
    folder, model = saved
    state = torch.load(folder / "last.pt", weights_only=True)["model"]    # a released file: neither the script nor M
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "released.pth")
    loaded, side = figures.load_updetr(str(tmp_path / "released.pth"), 4)
    assert (loaded.num_patches, side, loaded.attention_mask, loaded.training) == (4, 128, True, False)
    assert loaded.detector.transformer.encoder.layers[0].self_attn.num_heads == 8
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    assert figures.load_updetr(str(tmp_path / "released.pth"), 10)[0].num_patches == N        # one query each at most
    ours, side = figures.load_updetr(str(folder / "last.pt"), 4)
    assert (ours.num_patches, side, ours.detector.transformer.encoder.layers[0].self_attn.num_heads) == (M, SIDE, 4)
    single = {**state, "query_embed.weight": state["query_embed.weight"][:3]}
    torch.save({"model": single}, tmp_path / "single.pth")
    with pytest.raises(common.UserError, match="--num_patches 2: .*single.pth has 3 queries"):
        figures.load_updetr(str(tmp_path / "single.pth"), 2)


def test_threshold_decides_what_is_drawn(saved, tmp_path, monkeypatch, capsys):
    folder, _ = saved
    scores = run(folder, *TEXTS, threshold=0)["scores"]
    between = float(scores.sort().values[1:3].mean())
    drawn, draw = [], evaluation.draw_boxes_figure
    monkeypatch.setattr(evaluation, "draw_boxes_figure", lambda *args, **kwargs: drawn.append((args, kwargs)) or draw(*args, **kwargs))
    capsys.readouterr()
    found = run(folder, *TEXTS, threshold=between, out=tmp_path / "a" / "b.png")
    (path, images, columns), limit = drawn[0][0], drawn[0][1]["max_boxes"]
    asked, shown = columns.values()
    assert path == tmp_path / "a" / "b.png" and len(images) == 1 and limit == 5 and f"confidence > {between:g}" in list(columns)[1]
    assert asked[0][0].tolist() == [list(box) for box in BOXES] and asked[0][1] == ["1", "2", "3", "4", "5"] and asked[0][2].size == (80, 60)
    sure = scores > between
    assert sure.sum() == 3 and torch.equal(shown[0][0].isnan().any(1), ~sure) and torch.equal(shown[0][0][sure], found["boxes"][sure])
    assert shown[0][1] == [f"{i + 1}: {s:.2f}" for i, s in enumerate(scores.tolist())]
    said = capsys.readouterr().out
    assert [bool(x) for x in re.findall(r"patch .*?( \(not drawn\))?\n", said)] == (~sure).tolist() and "3 of 5 patches found" in said
    with Image.open(tmp_path / "a" / "b.png") as sheet:
        assert sheet.format == "PNG" and sheet.height > 200 and sheet.width > 2 * 300
    assert run(folder, *TEXTS[:1], threshold=1)["scores"].shape == (1,) and "0 of 1 patches found" in capsys.readouterr().out


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
        return fails(figures.main, ["localize", *(v for k, value in argv.items() for v in (f"--{k}", value)), "--patches", *(boxes or TEXTS[:1])])

    for text in ("1,2,3", "a,b,c,d", "1,2,3,4,5", "10,10,10,30", "30,10,10,30", "10,10,30,10.5", "1.5,1,2.5,20", "nan,0,20,20", "0,0,20,inf"):
        assert f"--patches {text}: a patch is x1,y1,x2,y2 in pixels, with x1 < x2 and y1 < y2" in fail(text)
    for text in ("0,0,81,20", "0,0,20,61", "0,-1,20,20"):
        line = fail(TEXTS[0], text)
        assert f"--patches {text}: reaches out of {folder / 'image.png'}, which is 80 x 60 pixels" in line
    assert f"reaches out of {folder / 'other.png'}, which is 50 x 70 pixels" in fail("0,0,60,20", patch_image=folder / "other.png")
    assert str(tmp_path / "nowhere.png") in fail(image=tmp_path / "nowhere.png") and "nowhere.png" in fail(patch_image=tmp_path / "nowhere.png")
    assert f"{tmp_path / 'nowhere.pt'}: no such checkpoint" in fail(checkpoint=tmp_path / "nowhere.pt")
    cfg = small(siamese_detr, num_regions=2)
    common.save_checkpoint(tmp_path / "siamese.pt", siamese_detr.build_models(cfg)[0], None, 0, cfg, script="siamese_detr")
    assert "siamese.pt: not a checkpoint of UP-DETR's pretraining but of siamese_detr.py" in fail(checkpoint=tmp_path / "siamese.pt")
    common.save_checkpoint(tmp_path / "tuned.pt", model.detector, None, 0, cfg, script="finetune")
    assert "tuned.pt: not a checkpoint of UP-DETR's pretraining (no patch2query" in fail(checkpoint=tmp_path / "tuned.pt")
    assert not (tmp_path / "out.png").exists()
