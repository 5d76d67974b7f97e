"""DAB- and DN-DAB-Deformable DETR: their queries, noise and mask, what they share with Deformable DETR, a step of every
script, and one run from a pretraining to a prediction. Numbers of the released code: tests/test_parity.py."""
import json
import math
import re

import pytest
import torch
from conftest import small_config
from test_finetune import CATEGORIES, coco_set, init, load, run_script, save_pretrained
from test_flags import first_step, small

import common
import convert
import detectors
import finetune
import predict
import run
from common import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
DAB, DN = detectors.DAB
LEVELS = 3


def build(detector, rows=5, **values):
    torch.manual_seed(5)
    cfg = small_config(finetune.Config, num_feature_levels=LEVELS, detector=detector, **values)
    return detectors.build_detector(cfg, rows, focal=True, num_patterns=cfg.num_patterns)


def target(labels, *boxes):
    return {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": torch.tensor(boxes).reshape(-1, 4)}


TARGETS = [target([1, 3], (0.5, 0.5, 0.2, 0.4), (0.95, 0.1, 0.1, 0.2)), target([]), target([2], (0.3, 0.6, 0.4, 0.2))]


def images(count=3):
    torch.manual_seed(2)
    mask = torch.zeros(count, 48, 64, dtype=torch.bool)
    mask[0, :, 50:] = True
    return torch.randn(count, 3, 48, 64), mask


# ==== Noise and mask ===============================================================================================

def test_noise():
    """By hand: the ends of the draws, what is cut, which labels change, and where the queries stand."""
    ends = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]).view(2, 1, 4).expand(2, 3, 4).reshape(6, 4)
    label_u = torch.tensor([0.19, 0.2, 0.0, 1.0, 0.1, 0.3])
    noise = detectors.Noise(label_u, torch.full((6,), 4), ends)
    noised = detectors.add_noise(TARGETS, noise, 2, 0.2, 0.4)
    assert noised.labels.tolist() == [4, 3, 4, 1, 4, 2] and noised.true_labels.tolist() == [1, 3, 2] * 2
    low = [(0.46, 0.42, 0.12, 0.24), (0.93, 0.06, 0.06, 0.12), (0.22, 0.56, 0.24, 0.12)]
    high = [(0.54, 0.58, 0.28, 0.56), (0.97, 0.14, 0.14, 0.28), (0.38, 0.64, 0.56, 0.28)]
    torch.testing.assert_close(noised.boxes, torch.tensor(low + high))
    torch.testing.assert_close(noised.true_boxes, torch.cat([t["boxes"] for t in TARGETS]).repeat(2, 1))
    assert noised.image.tolist() == [0, 0, 2] * 2 and noised.slot.tolist() == [0, 1, 0, 2, 3, 2]
    assert (noised.groups, noised.slots) == (2, 2)
    wide = detectors.add_noise(TARGETS, noise, 2, 0.0, 1.0)
    assert wide.labels.equal(wide.true_labels)
    assert wide.boxes[1].tolist() == pytest.approx([0.9, 0.0, 0.0, 0.0]) and wide.boxes[4, 0] == 1  # cut to 0..1


def test_draws():
    """Of the whole range, of the seed of a step alone."""
    run.seed_step(3, 7)
    noise = detectors.draw_noise(5, 400, 4)
    run.seed_step(3, 7)
    again = detectors.draw_noise(5, 400, 4)
    assert all(a.equal(b) for a, b in zip(noise, again)) and noise.new_label.bincount().tolist() == pytest.approx(
        [500] * 4, abs=80)
    for u in (noise.label_u, noise.box_u):
        assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1 and u.mean().item() == pytest.approx(0.5, abs=0.03)
    run.seed_step(3, 8)
    assert not detectors.draw_noise(5, 400, 4).box_u.equal(noise.box_u)


def test_mask():
    mask = detectors.denoising_mask(2, 2, 2, torch.device("cpu"))
    assert mask.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0],
                                   [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]


@torch.no_grad()
def test_no_query_sees_the_answer():
    """Another first group changes what this group says, and nothing else; without the mask it would."""
    model, batch = build(DN).eval(), images()
    for head in model.bbox_embed:  # an untrained one says the same of all
        torch.nn.init.normal_(head.layers[-1].weight, std=0.5)
    noise = detectors.draw_noise(3, 3, 5)
    other = detectors.Noise(noise.label_u, noise.new_label, torch.cat([noise.box_u[:3].flip(0), noise.box_u[3:]]))
    one, two = (model(*batch, noised=detectors.add_noise(TARGETS, n, 3, 0.2, 0.9)) for n in (noise, other))
    assert one["pred_boxes"].shape == (3, 8, 4) and one["dn_boxes"].shape == (3, 6, 4)
    for a, b in zip((one, *one["aux_outputs"]), (two, *two["aux_outputs"])):
        for name in ("pred_boxes", "pred_logits", "hs"):
            assert a[name].equal(b[name]), name
        assert a["dn_boxes"][:, 2:].equal(b["dn_boxes"][:, 2:])
        assert (a["dn_boxes"][[0, 2], :2] - b["dn_boxes"][[0, 2], :2]).abs().max() > 1e-3
    # what is matched in training is what an evaluation finds
    torch.testing.assert_close(model(*batch)["pred_boxes"], one["pred_boxes"], rtol=0, atol=1e-6)
    first, second = (model.detect(model.backbone[0](batch[0]), batch[1], torch.cat([
        model.denoising_queries(detectors.add_noise(TARGETS, n, 3, 0.2, 0.9), 3),
        model.queries().expand(3, -1, -1)], 1))["pred_logits"][:, 6:] for n in (noise, other))
    assert (first - second).abs().max() > 1e-5


def test_losses_of_the_denoising_queries():
    """Each with its own target, divided by groups times targets; by hand for boxes that miss by a known amount."""
    noise = detectors.Noise(torch.ones(6), torch.zeros(6, dtype=torch.int64), torch.full((6, 4), 0.5))
    noised = detectors.add_noise(TARGETS, noise, 2, 0.2, 0.4)
    boxes = torch.full((3, 4, 4), 0.5)
    boxes[noised.image, noised.slot] = noised.true_boxes + torch.tensor([0.01, 0.0, 0.0, 0.02])
    layer = {"pred_logits": torch.zeros(3, 2, 5), "pred_boxes": torch.full((3, 2, 4), 0.5),
             "dn_logits": torch.zeros(3, 4, 5), "dn_boxes": boxes}
    criterion = detectors.DenoisingCriterion(common.HungarianMatcher(), 1.0, 5.0, 2.0)
    losses, _ = criterion({**layer, "aux_outputs": [layer], "noised": noised}, TARGETS, 3.0)
    for suffix in ("", "_0"):
        assert losses[f"tgt_loss_bbox{suffix}"].item() == pytest.approx(0.03, rel=1e-4)
        # of 5 logits of 0 one is a target: focal loss -alpha (1 - p)^2 log p
        assert losses[f"tgt_loss_ce{suffix}"].item() == pytest.approx((0.25 + 4 * 0.75) * 0.25 * math.log(2), rel=1e-5)
    assert "tgt_cardinality_error" not in losses
    plain = common.SetCriterion(common.HungarianMatcher(), 1.0, 5.0, 2.0)
    added = 2 * (1.0 * losses["tgt_loss_ce"] + 5.0 * losses["tgt_loss_bbox"] + 2.0 * losses["tgt_loss_giou"])
    total = plain.total({k: v for k, v in losses.items() if not k.startswith("tgt_")})
    torch.testing.assert_close(criterion.total(losses), total + added)


# ==== Against Deformable DETR ======================================================================================

@torch.no_grad()
def test_fixed_anchors_are_deformable_detr():
    """A checkpoint of Deformable DETR goes into DAB's; where anchors stand at its reference point, every position is
    its position and the first layer samples at the reference itself, both give the same."""
    old, new = build("deformable_detr", with_box_refine=True).eval(), build(DAB).eval()
    d, place = 64, torch.randn(64)
    old.query_embed.weight[:, :d] = place
    for head in old.bbox_embed:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    first = old.transformer.decoder.layers[0].cross_attn.sampling_offsets
    first.weight.zero_(), first.bias.zero_()
    state, drop = convert.into_dab({k: v for k, v in old.state_dict().items() if "decoder.bbox_embed" not in k})
    convert.load_matching(new, state, drop=drop, source="old")
    new.tgt_embed.weight.copy_(old.query_embed.weight[:, d:])
    new.refpoint_embed.weight[:, :2] = old.transformer.reference_points(place)
    new.refpoint_embed.weight[:, 2:] = 0
    for head, value in ((new.transformer.decoder.ref_point_head, place), (new.transformer.decoder.query_scale, 1.0)):
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.copy_(torch.as_tensor(value))
    one, two = old(*images()), new(*images())
    for a, b in zip((one, *one["aux_outputs"]), (two, *two["aux_outputs"])):
        for name in ("pred_logits", "pred_boxes", "hs"):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-6)
    assert one["pred_boxes"].std(1).max() > 1e-3  # not the same for all queries
    new.refpoint_embed.weight[:, 2:] = 0.1
    assert (new(*images())["pred_boxes"] - one["pred_boxes"]).abs().max() > 1e-3


def test_queries():
    """Patterns: pattern by pattern, all with all anchors. Features of regions go into the content alone."""
    model = build(DAB, num_patterns=2)
    queries = model.queries()
    content = model.tgt_embed.weight[3] + model.patterns_embed.weight[1]
    assert queries.shape == (16, 68) and queries[11].equal(torch.cat([content, model.refpoint_embed.weight[3]]))
    features = torch.randn(2, 8, 64)
    for detector, width in ((DAB, 64), (DN, 63)):
        model = build(detector)
        queries, asked = model.queries(), model.conditioned_queries(features)
        torch.testing.assert_close(asked[..., :width], queries[:, :width] + features[..., :width])
        assert asked[..., width:].equal(queries[:, width:].expand(2, -1, -1))
    assert not queries[:, 63].any() and model.label_enc.weight.shape == (6, 63)


# ==== Scripts ======================================================================================================

@pytest.mark.parametrize(("script", "values"), (
    ("finetune", {"detector": DN, "accumulate": 2}),
    ("finetune", {"detector": DAB, "num_patterns": 2, "dec_layers": 1, "amp": "bf16"}),
    ("siamese_detr", {"detector": DAB}), ("siamese_detr", {"detector": DN}), ("updetr", {"detector": DN}),
    ("detreg", {"detector": DAB, "num_feature_levels": 1})))
def test_a_step(script, values):
    model, terms = first_step(script, small(script, **values))
    assert all(map(math.isfinite, terms.values()))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert ("tgt_loss_giou" in terms) == (script == "finetune" and values["detector"] == DN)


def test_recipe_and_flags():
    cfg = small("finetune", detector=DN)
    assert (cfg.lr_linear_proj_mult, cfg.epochs, cfg.lr_drop) == (1.0, 50, 40)
    criterion = finetune.build_criterion(cfg)
    assert (criterion.matcher.cost_class, criterion.matcher.cost_bbox, criterion.matcher.cost_giou) == (2, 5, 2)
    assert [criterion.weight[f"loss_{name}"] for name in ("ce", "bbox", "giou")] == [1, 5, 2]
    recipes = [finetune.detr_recipe({"detector": DAB, "data": "voc", "labels_percent": 100, "protocol": protocol,
                                     "eval_only": False, "class_agnostic": False})
               for protocol in ("released", "siamese")]
    assert [recipe["dim_feedforward"] for recipe in recipes] == [2048, 1024]
    assert [{k: r[k] for k in ("lr", "lr_backbone", "batch_size")} for r in recipes] == [
        {"lr": 1e-4, "lr_backbone": 1e-5, "batch_size": 16}] * 2
    for values, text in (({"dn_groups": 3}, "--dn_groups: of dn_deformable_detr, not of deformable_detr"),
                         ({"detector": DAB, "dn_box_noise": 0.1}, "--dn_box_noise: of dn_deformable_detr"),
                         ({"detector": DN, "num_patterns": 3}, "--num_patterns: of dab_deformable_detr"),
                         ({"detector": "faster_rcnn_fpn", "dn_groups": 3}, "dn_groups: not of Faster R-CNN")):
        with pytest.raises(UserError, match=re.escape(text)):
            small("finetune", **values)


def test_rows_of_the_label_embedding():
    """They follow the class head: reordered with it, made anew with it."""
    model = build(DN, rows=4)
    found = init({"categories": CATEGORIES[::-1]}, model.state_dict())
    cfg = small_config(finetune.Config, num_feature_levels=LEVELS, detector=DN)
    tuned, _ = finetune.build_model(cfg, found, CATEGORIES)
    for mine, theirs in ((tuned.label_enc, model.label_enc), (tuned.class_embed[1], model.class_embed[1])):
        assert mine.weight[:4].equal(theirs.weight[:4].flip(0))
    assert tuned.label_enc.weight[4].equal(model.label_enc.weight[4])
    assert finetune.build_model(cfg, found, CATEGORIES[:2])[0].label_enc.weight.shape == (3, 63)


def test_pretrained_as_what_it_is_fine_tuned_as(tmp_path):
    """All but the class head and the labels' embedding is kept."""
    state, _ = save_pretrained(tmp_path / "last.pt", "siamese_detr", DN)
    cfg, model, _ = load(tmp_path / "last.pt", CATEGORIES)
    assert (cfg.detector, cfg.num_queries, cfg.num_feature_levels) == (DN, 8, LEVELS)
    assert model.label_enc.weight.shape == (5, 63) and state["label_enc.weight"].shape == (4, 63)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(("class_embed.", "label_enc."))}
    assert {"tgt_embed.weight", "transformer.decoder.query_scale.layers.0.bias"} < own.keys() < state.keys()
    assert all(v.equal(state[k]) for k, v in own.items())


def test_from_a_pretraining_to_a_prediction(tmp_path, fails, capsys):
    """Siamese DETR on Deformable DETR -> DN-DAB-Deformable DETR, whole and resumed -> predict.py, --eval_only; what no
    other format can hold is refused."""
    state, _ = save_pretrained(tmp_path / "last.pt", "siamese_detr", "deformable_detr")
    values = {"data": coco_set(tmp_path / "set"), "init_from": tmp_path / "last.pt", "detector": DN, "num_queries": 6,
              "eval_every": 0}
    run_script(tmp_path / "one", **values)
    assert re.search(r"anchors and their content, made anew: label_enc\.weight, refpoint_embed\.weight, tgt_embed",
                     capsys.readouterr().out)
    for steps in (1, 2):
        run_script(tmp_path / "two", **values, max_steps=steps)
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("one", "two"))
    assert one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)
    line = json.loads((tmp_path / "one" / "log.jsonl").read_text().splitlines()[0])
    assert line["tgt_loss_bbox"] > 0 and one["tgt_embed.weight"].shape == (6, 63)
    kept = "transformer.decoder.layers.1.linear1.weight"  # after two steps still about what it was
    assert (one[kept] - state[kept]).abs().max() < 2e-3 < (one[kept] - torch.randn_like(one[kept])).abs().max()
    again = run_script(tmp_path / "again", data=values["data"], init_from=tmp_path / "one", eval_only="true")
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert again["AR100"] == pytest.approx(metrics["AR100"])
    assert len(predict.load(tmp_path / "one", "cpu").names) == 2
    line = fails(finetune.main, ["--data", values["data"], "--init_from", tmp_path / "last.pt", "--detector", DN,
                                 "--eval_only", "true", "--out", tmp_path / "x"])
    assert "from which DN-DAB-Deformable DETR can only start" in line
    for file, to, text in (("one", "hf", "transformers has no DN-DAB-Deformable DETR"),
                           ("dab.pt", "official", "Siamese DETR has no DAB-Deformable DETR")):
        if file == "dab.pt":
            save_pretrained(tmp_path / file, "siamese_detr", DAB)
        line = fails(convert.main, [tmp_path / file, "--to", to, "--out", tmp_path / "out"])
        assert text in line and not (tmp_path / "out").exists()
    cfg, arch = convert.open_checkpoint(tmp_path / "one"), {"detector": DN, "num_queries": 6, "num_feature_levels": 3}
    assert arch.items() <= cfg.architecture().items() and "DN-DAB-Deformable DETR, 6 queries" in cfg.what
    convert.main([str(tmp_path / "one"), "--to", "official", "--out", str(tmp_path / "official.pth")])
    assert torch.load(tmp_path / "official.pth", weights_only=True)["model"].keys() == one.keys()
