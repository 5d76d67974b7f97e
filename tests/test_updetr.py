"""updetr.py: its patches, groups and loss by hand, its step on one and two processes,
and whole runs on drawn images."""
import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from conftest import SMALL, flags
from fill import fill
from PIL import Image
from test_detreg import pieces, same_step
from torchvision.ops import box_convert

import common
import data
import run
import updetr
from common import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
DETECTORS = ("detr", "conditional_detr", "deformable_detr_ss", "deformable_detr")
M, N, D, C = 4, 8, 64, 512  # patches, queries, width, channels of resnet18's last stage
TINY = {**SMALL, "num_patches": M, "scales": (48, 64), "max_size": 96, "patch_size": 32, "backbone_weights": "random",
        "num_workers": 0, "seed": 3}


def tensor(name, *shape):
    return torch.from_numpy(fill(f"input:{name}", shape))


def config(**values):
    return updetr.Config(**{**TINY, "num_feature_levels": 3, **values})


def build(**values):
    """A model whose boxes depend on the queries (some start at zero)."""
    model = updetr.build_models(config(**values))[0].eval()
    heads = model.detector.bbox_embed
    for head in heads if isinstance(heads, torch.nn.ModuleList) else [heads]:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.05)
    return model


# ==== Patches ======================================================================================================

def test_patches_lie_anywhere_but_at_the_right_and_bottom_border():
    for height, width in ((17, 17), (17, 200), (90, 33)):
        boxes = updetr.draw_patches(np.random.default_rng(0), (height, width), 6000)
        assert boxes.dtype == np.int64 and boxes.shape == (6000, 4)
        assert np.array_equal(boxes, updetr.draw_patches(np.random.default_rng(0), (height, width), 6000))
        for axis, side in enumerate((width, height)):
            sides = boxes[:, 2 + axis] - boxes[:, axis]
            assert ((sides.min(), sides.max()) == (8, side - 8)
                    and (boxes[:, axis].min(), boxes[:, 2 + axis].max()) == (0, side - 1))
            assert sides.mean() == pytest.approx(side / 2, rel=0.03)  # uniform in 8..side - 8
            place = boxes[:, axis] / np.maximum(side - sides - 1, 1)
            assert place.mean() == pytest.approx(0.5, abs=0.02)
    boxes = updetr.draw_patches(np.random.default_rng(1), (17, 17), 2000)
    assert {(x, x2 - x) for x, _, x2, _ in boxes.tolist()} == {(x, side) for side in (8, 9) for x in range(17 - side)}
    fine = updetr.draw_patches(np.random.default_rng(1), (10, 20), 500, min_side=2)
    assert (fine[:, 2] - fine[:, 0]).min() == 2 and (fine[:, 3] - fine[:, 1]).max() == 8


def picture(i, size=(90, 60)):
    pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        picture(i, (90 - 7 * i, 60 + 5 * i)).save(folder / f"{i}.png")
    return folder


def patches_of(folder, augment=True, **values):
    cfg = updetr.Config(**{**TINY, "data": str(folder), **values})
    source = data.open_images(str(folder), None)
    return updetr.PatchDataset(cfg, source, np.arange(len(source)), augment=augment)


def equal(a, b):
    return torch.equal(a["image"], b["image"]) and all(torch.equal(a["target"][k], b["target"][k])
                                                       for k in ("boxes", "patches", "index"))


def test_samples(folder):
    dataset = patches_of(folder)
    for key in ((0, 0), (0, 3), (7, 1)):
        sample = dataset[key]
        target = sample["target"]
        assert equal(sample, patches_of(folder)[key]) and not equal(sample, dataset[key[0] + 1, key[1]])
        assert not equal(sample, patches_of(folder, seed=4)[key])
        assert sample["skipped"] == [] and target["index"] == key[1] and target["labels"].tolist() == [1] * M
        assert target["patches"].shape == (M, 3, 32, 32) and min(sample["image"].shape[1:]) in (48, 64)
        width, height = Image.open(folder / f"{key[1]}.png").size
        drawn = updetr.draw_patches(data.sample_rng(3, *key), (height, width), M)  # pixels of the original image
        x1, y1, x2, y2 = drawn.T / np.array([width, height, width, height])[:, None]
        np.testing.assert_allclose(target["boxes"].numpy(),
                                   np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1), atol=1e-6)


def test_loader_processes_do_not_change_the_samples(folder):
    here, there = ([batch for batch in data.make_loader(patches_of(folder), data.StepSampler(4, 2, 2, seed=3),
                                                        num_workers=workers, collate=data.collate)]
                   for workers in (0, 2))
    for one, two in zip(here, there, strict=True):
        assert torch.equal(one["images"], two["images"]) and torch.equal(one["mask"], two["mask"])
        assert all(torch.equal(a[k], b[k]) for a, b in zip(one["targets"], two["targets"]) for k in a)


@pytest.mark.parametrize("augment", (False, True))
def test_patches_are_crops_of_the_original_image(folder, monkeypatch, augment):
    boxes = np.array([[10, 8, 40, 30], [0, 0, 60, 59], [50, 20, 58, 50], [3, 40, 30, 48]])
    monkeypatch.setattr(updetr, "draw_patches", lambda rng, hw, count: boxes)
    dataset = patches_of(folder, augment, scales=(48, 30, 36))
    if augment:
        dataset.photometric = data.Photometric(0, 0, 0, 0, p_jitter=0, p_gray=0, p_blur=0)
    shown = {}
    for key in ((0, 2), (1, 2), (2, 2), (3, 2)):
        sample, image = dataset[key], picture(2, (76, 70))
        for patch, box in zip(sample["target"]["patches"], boxes.tolist(), strict=True):
            crop = np.asarray(image.crop(box).resize((32, 32), Image.Resampling.BILINEAR)) / 255
            np.testing.assert_allclose(patch.numpy(),
                                       ((crop - data.IMAGENET_MEAN) / data.IMAGENET_STD).transpose(2, 0, 1), atol=1e-5)
        height, width = sample["image"].shape[1:]
        shown[height] = True
        # not flipped
        assert torch.equal(sample["image"],
                           data.to_normalized_tensor(image.resize((width, height), Image.Resampling.BILINEAR)))
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2 / 76, (boxes[:, 1] + boxes[:, 3]) / 2 / 70
        np.testing.assert_allclose(sample["target"]["boxes"][:, :2].numpy(), np.stack([x, y], 1), atol=1e-6)
    assert shown.keys() == {48} or augment and len(shown) > 1  # probe: the largest scale only


def test_augmented_patches_are_recoloured_one_by_one(folder, monkeypatch):
    monkeypatch.setattr(updetr, "draw_patches", lambda rng, hw, count: np.array([[10, 8, 40, 30]] * M))
    patches = patches_of(folder)[0, 0]["target"]["patches"]
    assert not any(torch.equal(patches[0], patch) for patch in patches[1:])
    for plain_ones in (patches_of(folder, augment=False), patches_of(folder, patch_colours=False)):
        patches = plain_ones[0, 0]["target"]["patches"]
        assert all(torch.equal(patches[0], patch) for patch in patches[1:])


def test_images_of_16_pixels_are_replaced(folder, capsys):
    for name, size in (("7", (16, 40)), ("8", (40, 16)), ("9", (17, 17))):
        picture(9, size).save(folder / f"{name}.png")
    dataset = patches_of(folder)
    count = run.SkipCount(1000)
    for position, size in ((4, "16 x 40"), (5, "40 x 16")):
        drawn = set()
        for epoch in range(6):
            sample = dataset[epoch, position]
            assert any(f"{position + 3}.png: {size} pixels, at least 17 a side" in entry for entry in sample["skipped"])
            drawn.add(sample["target"]["index"].item())
            count.add(sample["skipped"])
        assert len(drawn) > 1 and not drawn & {4, 5}
    assert len(count.seen) == 2 and capsys.readouterr().err.count("warning: skipped") == 2
    assert dataset[0, 6]["skipped"] == [] and dataset[0, 6]["target"]["index"] == 6
    only = updetr.PatchDataset(dataset.cfg, dataset.source, np.array([4, 5]))
    with pytest.raises(UserError, match="11 images in a row cannot be used.*at least 17 a side"):
        only[0, 0]


def test_proposals_in_place_of_patches(folder):
    plain = patches_of(folder)
    width, height = Image.open(folder / "1.png").size
    boxes = np.float32([[2, 3, 30, 40], [5, 5, 12, 50], [0, 0, width, height], [1, 1, 9, 9], [20, 8, 50, 60],
                        [4, 4, 40, 40]])
    large = boxes[[0, 2, 3, 4]]  # M; the second is below 8 pixels
    for given, known in ((boxes, 4), (boxes[:3], 2), (boxes[:0], 0)):
        asked = []
        dataset = updetr.PatchDataset(plain.cfg, plain.source, plain.indices,
                                      lambda image, *key: asked.append((image.size, *key)) or given)
        sample, again = dataset[5, 1], dataset[5, 1]
        assert asked == [((width, height), 1, 5)] * 2 and equal(sample, again)
        assert sample["fallback"] == int(known < M) and sample["target"]["labels"].tolist() == [1] * M
        whole = torch.tensor([width, height] * 2)
        found = torch.from_numpy(large[:known])
        assert torch.allclose(sample["target"]["boxes"][:known],
                              data.normalized_cxcywh(found, (height, width)), atol=1e-6)
        # the rest are random patches, whole pixels
        rest = box_convert(sample["target"]["boxes"][known:], "cxcywh", "xyxy") * whole
        drawn = updetr.draw_patches(data.sample_rng(3, 5, 1), (height, width), M - known)
        np.testing.assert_allclose(rest.numpy(), drawn, atol=1e-4)
    batch = data.collate([sample, {**sample, "fallback": 0}, sample])
    assert batch["fallback"] == 2 and "fallback" not in data.collate([plain[0, 0]])


# ==== Groups, masking, queries =====================================================================================

@pytest.mark.parametrize(("queries", "patches"), ((100, 10), (100, 20), (20, 10), (8, 4), (6, 6), (6, 1), (3, 1)))
def test_group_mask_is_block_diagonal(queries, patches):
    size = queries // patches
    mask = updetr.group_mask(queries, patches)
    assert mask.dtype == torch.bool and mask.tolist() == [[i // size != j // size for j in range(queries)]
                                                          for i in range(queries)]
    assert ((~mask).sum(1) == size).all()  # every query may look somewhere


INPUTS = dict(images=tensor("images", 2, 3, 48, 64), mask=torch.zeros(2, 48, 64, dtype=torch.bool),
              patches=tensor("patches", 2, M, 3, 32, 32))


def outputs_of(model, **values):
    with torch.no_grad():
        out = model(**{**INPUTS, **values})
    layers = [*out["aux_outputs"], out]
    return {k: torch.stack([layer[k] for layer in layers])
            for k in ("pred_logits", "pred_boxes", "hs", "pred_features") if k in out}


@pytest.mark.parametrize("detector", DETECTORS)
def test_groups_do_not_see_each_other(detector):
    with_mask, without = build(detector=detector), build(detector=detector, attention_mask=False)
    changed = {**INPUTS, "patches": INPUTS["patches"].clone()}
    changed["patches"][1, 2] += tensor("another patch", 3, 32, 32)  # patch 2 of image 1: queries 4 and 5
    for model in (with_mask, without):
        before, after = outputs_of(model), outputs_of(model, **changed)
        for name in before:
            assert before[name].shape[:3] == (2, 2, N) and before[name].isfinite().all()
            difference = (before[name] - after[name]).abs().flatten(3).amax(3)[-1]  # last layer: [image, query]
            assert difference[1, 4:6].min() > 1e-5 and not difference[0].any(), name
            others = difference[1, [0, 1, 2, 3, 6, 7]]
            assert others.max() < 1e-6 if model is with_mask else others.min() > 1e-7, name


@pytest.mark.parametrize(("queries", "patches"), ((20, 10), (6, 6)))
def test_more_patches_than_queries_of_a_group(queries, patches):
    model = build(num_queries=queries, num_patches=patches)
    out = outputs_of(model, patches=tensor("patches", 2, patches, 3, 32, 32))
    assert all(v.isfinite().all() for v in out.values()) and out["pred_boxes"].shape == (2, 2, queries, 4)
    # one group alone, without any mask
    alone = outputs_of(model, patches=tensor("patches", 2, patches, 3, 32, 32)[:, :1])
    for name in out:
        torch.testing.assert_close(alone[name], out[name][:, :, :queries // patches], atol=1e-5, rtol=1e-4)


def test_share_of_masked_queries():
    cfg = updetr.Config(mask_ratio=0.1, num_queries=100)
    torch.manual_seed(0)
    keep, order = updetr.draw_masking(cfg, 300, CPU)
    assert keep.shape == (300, 100, 1) and order is None
    assert 1 - keep.float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert 1 - keep.float().mean(0).max().item() > 0.03 and keep.float().mean((1, 2)).min() > 0.75
    groups = keep.view(300, 10, 10).float().mean(2)
    assert ((groups > 0) & (groups < 1)).any()  # queries of one patch are dropped one by one (D4)
    shuffling = dataclasses.replace(cfg, query_shuffle=True)
    one, two = (updetr.draw_masking(shuffling, 2, CPU)[1] for _ in range(2))
    assert sorted(one.tolist()) == list(range(100)) and not torch.equal(one, two)
    assert not updetr.draw_masking(dataclasses.replace(cfg, mask_ratio=1.0), 3, CPU)[0].any()


@pytest.mark.parametrize("detector", ("detr", "deformable_detr"))
def test_what_a_query_is_made_of(detector):
    model = build(detector=detector)
    seen = []
    model.detector.register_forward_pre_hook(lambda module, args: seen.append(args))
    keep = torch.rand(2, N, 1, generator=torch.Generator().manual_seed(1)) > 0.4
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    with torch.no_grad():
        model(**INPUTS)
        model(**INPUTS, keep=keep, order=order)
        maps = model.detector.backbone[0](INPUTS["patches"].flatten(0, 1))[-1]
        p = maps.numpy().astype(np.float64).mean((2, 3)).reshape(2, M, C)  # global average of the last stage
        weight, bias = (t.numpy().astype(np.float64) for t in (model.patch2query.weight, model.patch2query.bias))
    content = np.repeat(p @ weight.T + bias, N // M, axis=1)  # query i: patch i // (N / M)
    table = model.detector.query_embed.weight.detach()
    for (images, mask, queries, blocked), rows, factor in ((seen[0], table, np.ones((2, N, 1))),
                                                           (seen[1], table[order], keep.numpy())):
        assert images is INPUTS["images"] and mask is INPUTS["mask"] and torch.equal(blocked, updetr.group_mask(N, M))
        np.testing.assert_allclose(queries[..., :D].numpy(), rows[:, :D].numpy() + factor * content, atol=1e-5)
        # Deformable DETR: what it starts from stays
        assert torch.equal(queries[..., D:], rows[:, D:].expand(2, -1, -1))
    dropped = ~keep[..., 0]
    # exactly the object query
    assert dropped.any() and torch.equal(seen[1][2][dropped], table[order].expand(2, -1, -1)[dropped])


def test_fewer_patches_are_the_first_groups():
    for model in (build(), build(detector="conditional_detr")):
        whole = outputs_of(model)
        for given in (1, 3):
            few = outputs_of(model, patches=INPUTS["patches"][:, :given])
            for name in whole:
                torch.testing.assert_close(few[name], whole[name][:, :, :given * N // M], atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="5 query patches: .* at most 4"):
        outputs_of(model, patches=tensor("patches", 2, 5, 3, 32, 32))


# ==== Loss =========================================================================================================

class Prescribed(common.HungarianMatcher):
    """A matcher that gives the same pairs for every layer."""

    def __init__(self, pairs):
        super().__init__(focal=False)
        self.pairs = [(torch.tensor(q), torch.tensor(t)) for q, t in pairs]

    def __call__(self, layers, targets):
        return [self.pairs] * len(layers)


def test_loss_by_hand():
    cfg = updetr.Config(num_patches=2, num_queries=4, lambda_cls=1.5, lambda_l1=4.0, lambda_giou=3.0, lambda_rec=0.7)
    criterion = updetr.build_criterion(cfg)
    assert ((criterion.matcher.cost_class, criterion.matcher.cost_bbox, criterion.matcher.cost_giou) == (1.5, 4.0, 3.0)
            and not criterion.matcher.focal)
    pairs = [([0, 3], [1, 0]), ([1, 2], [0, 1])]  # image 0: the matching ignores the groups
    criterion.matcher = Prescribed(pairs)
    layers = [{"pred_logits": tensor(f"logits{i}", 2, 4, 3), "pred_boxes": tensor(f"boxes{i}", 2, 4, 4).sigmoid(),
               "pred_features": tensor(f"features{i}", 2, 4, 5)} for i in range(2)]
    p = tensor("p", 2, 2, 5)
    targets = [{"labels": torch.ones(2, dtype=torch.int64), "boxes": tensor(f"true{i}", 2, 4).sigmoid()}
               for i in range(2)]
    total, losses = updetr.updetr_loss(criterion,
                                       {**layers[1], "aux_outputs": layers[:1], "patch_features": p}, targets, 4.0)
    expected = 0.0
    for suffix, layer in (("", layers[1]), ("_0", layers[0])):
        s, cosines, l1 = layer["pred_logits"].double().numpy(), [], 0.0
        log_p = s - np.log(np.exp(s).sum(-1, keepdims=True))
        matched = np.zeros((2, 4), bool)
        for i, (queries, wanted) in enumerate(pairs):
            for q, t in zip(queries, wanted):
                a, b = layer["pred_features"][i, q].double().numpy(), p[i, t].double().numpy()
                cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
                l1 += (layer["pred_boxes"][i, q] - targets[i]["boxes"][t]).abs().sum().item()
                matched[i, q] = True
        # weight of "no object": M / N = 1/2
        ce = -np.where(matched, log_p[..., 1], 0.5 * log_p[..., 2]).sum() / (4 + 0.5 * 4)
        assert losses["loss_ce" + suffix].item() == pytest.approx(ce, rel=1e-5)
        assert losses["loss_feature" + suffix].item() == pytest.approx(np.mean([2 - 2 * c for c in cosines]), rel=1e-5)
        assert losses["loss_bbox" + suffix].item() == pytest.approx(l1 / 4, rel=1e-5)
        expected += (1.5 * ce + 4 * l1 / 4 + 3 * losses["loss_giou" + suffix].item()
                     + 0.7 * np.mean([2 - 2 * c for c in cosines]))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    # given features count before those of the model (D10)
    other = [{**t, "features": torch.zeros(2, 5) + 1} for t in targets]
    value = updetr.updetr_loss(criterion, {**layers[1], "patch_features": p}, other, 4.0)[1]["loss_feature"].item()
    unit = torch.ones(5) / 5 ** 0.5
    drawn = [torch.nn.functional.normalize(layers[1]["pred_features"][i, q], dim=0)
             for i, (queries, _) in enumerate(pairs) for q in queries]
    assert value == pytest.approx(np.mean([(d - unit).square().sum().item() for d in drawn]), rel=1e-5)


def test_matching_within_the_groups():
    """Each target with the best query of its own group, however well another one fits, in every layer; else freely."""
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.2, 0.2]]])
    layers = [{"pred_logits": torch.zeros(1, 4, 3), "pred_boxes": b} for b in (boxes, boxes.flip(1))]
    targets = [{"labels": torch.ones(2, dtype=torch.int64),
                "boxes": torch.tensor([[0.8, 0.8, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]])}]  # queries 3 and 0 fit

    def pairs(**values):
        matcher = updetr.build_criterion(updetr.Config(num_patches=2, num_queries=4, **values)).matcher
        return [list(zip(*(x.tolist() for x in layer[0]))) for layer in matcher(layers, targets)]

    assert pairs() == [[(0, 1), (3, 0)], [(0, 0), (3, 1)]]
    assert pairs(match_own=True) == [[(1, 0), (2, 1)], [(0, 0), (3, 1)]]
    layers[0]["pred_boxes"] = boxes.clone()
    layers[0]["pred_boxes"][0, 0] = float("nan")  # is matched, so that the loss shows it
    assert pairs(match_own=True)[0] == [(0, 0), (2, 1)]


def test_reconstruction_off():
    model, target = updetr.build_models(config(reconstruction=False, feature_target="start"))
    assert model.feature_align is None and target is None and not any(k.startswith("feature_align")
                                                                      for k in model.state_dict())
    criterion = updetr.build_criterion(config(reconstruction=False))
    targets = [{"labels": torch.ones(M, dtype=torch.int64), "boxes": tensor(f"b{i}", M, 4).sigmoid()} for i in range(2)]
    out = model.eval()(**INPUTS)
    total, losses = updetr.updetr_loss(criterion, out, targets, 8.0)
    assert not any(k.startswith("loss_feature") for k in losses) and "pred_features" not in out
    assert total.item() == pytest.approx(sum(w * losses[k + s].item()
                                             for k, w in (("loss_ce", 1), ("loss_bbox", 5), ("loss_giou", 2))
                                             for s in ("", "_0")), rel=1e-5)


def parse(*argv):
    return run.parse_config(updetr.Config, updetr.PRESETS, list(argv), script="updetr", description="",
                            recipe=updetr.recipe_of)


def test_recipes():
    cfg = parse()
    assert (cfg.num_patches, cfg.num_queries, cfg.mask_ratio, cfg.batch_size, cfg.epochs, cfg.lr_drop, cfg.lr,
            cfg.lr_backbone, cfg.out) == (
                10, 100, 0.1, 256, 60, 40, 1e-4, 0.0, "out/updetr-imagenet")
    assert ((cfg.lambda_cls, cfg.lambda_l1, cfg.lambda_giou, cfg.lambda_rec, cfg.dim_feedforward, cfg.pre_norm)
            == (1, 5, 2, 1, 2048, True))
    assert (cfg.scales == tuple(s for s in range(320, 481, 16) if s != 384)
            and updetr.build_criterion(cfg).eos_coef == 0.1)
    single = parse("--preset", "single")
    assert ((single.num_patches, single.num_queries) == (1, 3)
            and updetr.build_criterion(single).eos_coef == pytest.approx(1 / 3))
    assert updetr.build_criterion(parse("--num_patches", "20")).eos_coef == 0.2
    assert updetr.build_criterion(parse("--preset", "official", "--num_patches", "20")).eos_coef == 0.1
    assert parse("--preset", "paper").query_shuffle and not cfg.query_shuffle
    demo = parse("--preset", "demo")
    assert demo.data == "synthetic" and demo.num_queries % demo.num_patches == 0
    for detector in ("deformable_detr", "deformable_detr_ss"):
        wide = parse("--detector", detector)
        assert ((wide.num_queries, wide.dim_feedforward) == (300, 1024)
                and updetr.build_criterion(wide).eos_coef == pytest.approx(1 / 30))
    assert parse("--detector", "conditional_detr").num_queries == 100


# ==== The step: one process, accumulation, two processes ===========================================================

def step_case(**values):
    cfg = config(clip_max_norm=0.0, **{"lr_backbone": 2e-5, "mask_ratio": 0.0, **values})
    model = build(**{**dataclasses.asdict(cfg)}).train()
    images, mask = tensor("step_images", 4, 3, 48, 64), torch.zeros(4, 48, 64, dtype=torch.bool)
    mask[1, 24:], mask[2, :, 40:] = True, True
    images = images.masked_fill(mask[:, None], 0.0)
    targets = [{"labels": torch.ones(M, dtype=torch.int64), "boxes": tensor(f"step_boxes{i}", M, 4).mul(0.5).sigmoid(),
                "patches": tensor(f"step_patches{i}", M, 3, 32, 32)} for i in range(4)]
    return cfg, model, {"images": images, "mask": mask, "targets": targets}


@functools.cache
def one_step(start=0, stop=4, accumulate=1, detector="detr"):
    """updetr.train_step on images start..stop -> (terms, gradients)."""
    cfg, model, batch = step_case(accumulate=accumulate, detector=detector)
    optimizer, wrapped = common.build_optimizer(cfg, model), common.wrap_model(model, CPU)
    terms = updetr.train_step(cfg, wrapped, None, updetr.build_criterion(cfg), optimizer,
                              pieces(batch, start, stop, accumulate), CPU)
    return ({k: v.item() for k, v in terms.items()},
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def worker():
    """What one of two processes does (conftest.two_processes)."""
    r = common.rank()
    return {accumulate: one_step(2 * r, 2 * r + 2, accumulate) for accumulate in (1, 2)}


def test_accumulation_is_one_batch():
    terms, gradients = one_step()
    assert terms["loss_feature"] > 0 and any(n.startswith("detector.backbone.0.body.layer2") for n in gradients)
    for accumulate in (2, 4):
        same_step([one_step(accumulate=accumulate)], one_step())
    assert terms["loss"] == pytest.approx(sum(w * terms[k + s] for k, w in (("loss_ce", 1), ("loss_bbox", 5),
                                                                            ("loss_giou", 2), ("loss_feature", 1))
                                              for s in ("", "_0")), rel=1e-5)


def test_two_processes_are_one_batch(two_processes):
    results = two_processes["test_updetr"]
    for accumulate in (1, 2):
        same_step([r[accumulate] for r in results], one_step())
    assert results[0][1][0]["loss_bbox"] != results[1][1][0]["loss_bbox"]  # each saw its own images


class Spy(common.SetCriterion):
    """A criterion that keeps the targets it was given."""

    @classmethod
    def of(cls, cfg):
        spy = updetr.build_criterion(cfg)
        spy.__class__, spy.seen = cls, []
        return spy

    def forward(self, outputs, targets, *args):
        self.seen.append(targets)
        return super().forward(outputs, targets, *args)


def test_targets_of_the_reconstruction():
    cfg, model, batch = step_case(feature_target="start")
    target = updetr.build_models(cfg)[1]
    assert all(torch.equal(a, b)
               for a, b in zip(target.state_dict().values(), model.detector.backbone[0].state_dict().values()))
    with torch.no_grad():
        wanted = [target(t["patches"])[-1].mean((2, 3)) for t in batch["targets"]]
        for parameter in model.detector.backbone.parameters():  # the training backbone has moved on
            parameter.mul_(1.3)
        now = [model.detector.backbone[0](t["patches"])[-1].mean((2, 3)) for t in batch["targets"]]
    assert not target.training and not any(p.requires_grad for p in target.parameters())
    before = {k: v.clone() for k, v in target.state_dict().items()}
    for backbone, expected in ((None, now), (target, wanted)):
        spy = Spy.of(cfg)
        updetr.train_step(cfg, model, backbone, spy, common.build_optimizer(cfg, model), [batch], CPU)
        for t, e in zip(spy.seen[0], expected, strict=True):
            torch.testing.assert_close(t["features"].detach(), e, rtol=1e-4, atol=1e-5)
            assert t["features"].requires_grad == (backbone is None)  # the current feature, with gradient (D10)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_a_frozen_backbone_stays():
    cfg, model, batch = step_case(lr_backbone=0.0, mask_ratio=0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    updetr.train_step(cfg, model, None, updetr.build_criterion(cfg), common.build_optimizer(cfg, model), [batch], CPU)
    after = model.state_dict()
    assert all(p.grad is None and not p.requires_grad for p in model.detector.backbone.parameters())
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith("backbone."))
    assert not any(torch.equal(before[k], after[k])
                   for k in ("patch2query.weight", "query_embed.weight", "feature_align.layers.0.weight"))


@pytest.mark.parametrize("detector", ("detr", "conditional_detr"))
def test_standardized_start_tells_patches_apart(folder, detector):
    """As released, queries and keys of any two places point the same way (benchmarks/looking.md); D16."""
    dataset = patches_of(folder, detector=detector, stride=8, scales=(96,), max_size=192, standardized_start=4)
    model = updetr.build_models(dataset.cfg)[0].eval()
    backbone, state = model.detector.backbone[0], {k: v.clone() for k, v in model.state_dict().items()}

    def content():  # of the queries [16, D], and of the map's places [.., D]
        with torch.no_grad():
            samples = [dataset[0, i] for i in range(4)]
            queries = [model.patch2query(updetr.patch_features(backbone, s["target"]["patches"][None]))[0]
                       for s in samples]
            maps = [model.detector.input_proj(backbone(s["image"][None])[-1])[0].flatten(1).T for s in samples]
        return torch.cat(queries), torch.cat(maps)

    def alike(x):
        x = torch.nn.functional.normalize(x, dim=-1)
        return (x @ x.T).mean().item()

    before = [alike(x) for x in content()]
    updetr.standardize_start(dataset.cfg, model, dataset, CPU)
    after = [alike(x) for x in content()]
    assert min(before) > 0.7 and max(after) < 0.1, (before, after)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {f"{layer}.{kind}" for layer in ("input_proj", "patch2query") for kind in ("weight", "bias")}
    assert data.evenly_spread(10, 4) == [0, 3, 6, 9] and data.evenly_spread(3, 8) == [0, 1, 2]


@pytest.mark.parametrize("reconstruction", (True, False))
@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_learns_with_all_its_parameters(detector, reconstruction):
    cfg, model, batch = step_case(detector=detector, reconstruction=reconstruction, mask_ratio=0.1)
    terms = updetr.train_step(cfg, model, None, updetr.build_criterion(cfg), common.build_optimizer(cfg, model),
                              pieces(batch, 0, 2, 1), CPU)
    assert ("loss_feature_0" in terms) == reconstruction and all(v.isfinite() for v in terms.values())
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert (not [n for n, p in learning.items() if p.grad is None]
            and all(p.grad.isfinite().all() for p in learning.values()))
    for name in ("patch2query.weight", "detector.query_embed.weight", "detector.backbone.0.body.layer2.0.conv1.weight",
                 *(["feature_align.layers.1.weight"] if reconstruction else [])):
        assert learning[name].grad.any(), name


def test_bf16_is_close_to_fp32():
    results = []
    for amp in ("off", "bf16"):
        cfg, model, batch = step_case(amp=amp)
        terms = updetr.train_step(cfg, model, None, updetr.build_criterion(cfg), common.build_optimizer(cfg, model),
                                  pieces(batch, 0, 2, 1), CPU)
        results.append({k: v.item() for k, v in terms.items() if k.startswith("loss")})
    assert results[0] == pytest.approx(results[1], rel=0.05, abs=0.02) and results[0] != results[1]


# ==== Probe ========================================================================================================

ROWS = {"untrained", "random_boxes", "shuffled", "wrong_image", "pretrained"}


class Asked(torch.nn.Module):
    """Finds the "box" that is written in a patch, with the first query of its group."""

    def forward(self, images, mask, patches):
        boxes = patches.mean((3, 4))[..., [0, 1, 2, 2]].repeat_interleave(2, 1)
        logits = torch.zeros(*boxes.shape[:2], 3)
        logits[:, 0::2, 1] = 2.0
        boxes[:, 1::2] = 0.99
        assert not self.training and images[:, 0, 0, 0].shape == (len(patches),)
        return {"pred_logits": logits, "pred_boxes": boxes}


def test_probe_asks_for_own_and_for_other_patches():
    def sample(i):
        boxes = torch.arange(2 * 4).view(2, 4) / 100 + i / 10
        patches = torch.stack([boxes[:, 0], boxes[:, 1], boxes[:, 2]], 1)[..., None, None].expand(2, 3, 4, 4)
        return {"image": torch.zeros(3, 8, 8 + i),
                "target": {"boxes": boxes, "patches": patches, "index": torch.tensor(10 + i)}, "skipped": []}

    class Set(dict):
        def __len__(self):
            return 3

        def __missing__(self, key):
            return sample(key[1])

    cfg = updetr.Config(num_patches=2, num_queries=4, num_workers=0)
    for other in (False, True):
        rows = updetr.find_patches(cfg, Asked(), Set(), CPU, other)
        assert [row["index"] for row in rows] == [10, 11, 12]
        for i, row in enumerate(rows):
            j = (i + 1) % 3 if other else i
            asked = sample(j)["target"]["boxes"]
            # of the image that is looked into
            np.testing.assert_allclose(row["true"], sample(i)["target"]["boxes"], atol=1e-6)
            np.testing.assert_allclose(row["asked"], asked, atol=1e-6)  # of the image the patches come from
            np.testing.assert_allclose(row["found"], asked[:, [0, 1, 2, 2]], atol=1e-6)
            np.testing.assert_allclose(row["score"], np.exp(2) / (np.exp(2) + 2), atol=1e-6)


def test_rows_of_the_probe(monkeypatch, tmp_path):
    def find(cfg, model, probe_set, device, other=False, text=""):
        assert model == "trained" or text == "untrained"
        assert probe_set.scales == (64,)  # no augmentation
        own, theirs, far = [[0.2, 0.2, 0.2, 0.2]], [[0.8, 0.8, 0.2, 0.2]], [[0.5, 0.5, 0.1, 0.1]]
        found = far if text == "untrained" else theirs if other else own
        return [{"index": i, "true": own, "asked": theirs if other else own, "found": found, "score": [0.5]}
                for i in range(2)]

    monkeypatch.setattr(updetr, "find_patches", find)
    metrics = updetr.probe(config(out=str(tmp_path), num_patches=1), "trained",
                           data.SyntheticScenes(2, 32), np.arange(2), CPU)
    assert metrics.keys() == ROWS | {"primary"} and (tmp_path / "predictions.png").exists()
    # wrong_image: the prediction of `shuffled` on the patches' own boxes
    one = {"IoU": pytest.approx(1), "recall50": 1}
    assert (metrics["pretrained"], metrics["wrong_image"]) == (one, one)
    assert (metrics["shuffled"] == metrics["untrained"] == {"IoU": 0, "recall50": 0}
            and 0 <= metrics["random_boxes"]["IoU"] < 1)


# ==== Whole runs ===================================================================================================

RUN = {**TINY, "preset": "demo", "synthetic_images": 16, "synthetic_size": 64, "batch_size": 4, "probe_images": 4,
       "log_every": 1, "save_every": 1, "dropout": 0.1, "stride": 16, "epochs": 4, "mask_ratio": 0.1, "eos_coef": 0.2,
       "max_steps": 3}


def run_script(out, **values):
    return updetr.main(flags({**RUN, "out": out, **values}))


@pytest.fixture
def straight(finished_run):
    return finished_run("updetr")


def test_log_and_table(straight):
    out, metrics = straight
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    terms = ["loss_ce", "loss_bbox", "loss_giou", "loss_feature", "cardinality_error"]
    for line in lines:
        assert line.keys() == {"step", "epoch", "lr", "loss", "class_error", *terms, *(f"{k}_0" for k in terms),
                               "grad_norm", "images_per_s", "memory_gib", "seconds"}
        assert line["loss"] == pytest.approx(sum(w * line[k + s] for k, w in zip(terms, (1, 5, 2, 1))
                                                 for s in ("", "_0")), rel=1e-4)
    assert metrics.keys() == ROWS | {"steps", "primary"} and metrics["steps"] == 3 and metrics["primary"] == "IoU"
    assert all(metrics[row].keys() == {"IoU", "recall50"} and 0 <= metrics[row]["IoU"] <= 1
               and 0 <= metrics[row]["recall50"] <= 1 for row in ROWS)
    assert Image.open(out / "predictions.png").height > 4 * 200
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["step"] == 3 and state["script"] == "updetr" and state["config"]["num_patches"] == M
    names = state["model"].keys()
    assert {"patch2query.weight", "feature_align.layers.1.bias", "query_embed.weight", "class_embed.weight",
            "backbone.0.body.conv1.weight"} <= names
    assert (not any(name.startswith("detector.") for name in names)
            and state["model"]["class_embed.weight"].shape == (3, D))


def test_own_images_with_held_out_ones(folder, tmp_path):
    for i in range(4, 9):
        picture(i).save(folder / f"{i}.png")
    metrics = run_script(tmp_path / "out", data=folder, max_steps=1, probe_images=3, detector="conditional_detr",
                  reconstruction="false", num_patches=1, num_queries=3)
    assert metrics.keys() == ROWS | {"steps", "primary"} and (tmp_path / "out" / "predictions.png").exists()
    line = json.loads((tmp_path / "out" / "log.jsonl").read_text())
    assert line["epoch"] == 0 and "loss_feature" not in line
    with_boxes = run_script(tmp_path / "boxes", data=folder, max_steps=1, probe_images=3, proposal_method="random",
                            max_boxes=5, cache_proposals="true")
    assert with_boxes.keys() == ROWS | {"steps", "primary"}
    header = json.loads((tmp_path / "boxes" / "proposals" / "meta.json").read_text())
    assert (header["method"], header["max_boxes"], header["images"]) == ("random", 5, 9)
    assert 0 <= json.loads((tmp_path / "boxes" / "log.jsonl").read_text())["fallbacks"] <= 4
    quiet = run_script(tmp_path / "quiet", data=folder, max_steps=1, probe_images=0)
    assert quiet == {"steps": 1} and not (tmp_path / "quiet" / "predictions.png").exists()


def test_bad_input_ends_in_one_line(fails, folder, tmp_path):
    def fail(**values):
        return fails(updetr.main, flags({**RUN, "max_steps": 1, "probe_images": 0, "batch_size": 2,
                                         "out": tmp_path / "out", **values}))

    assert "--proposal_store and --cache_proposals are of no use to random patches" in fail(proposal_store="x")
    line = fail(data=folder, num_patches=3)
    assert ("--num_queries 8 --num_patches 3: every patch needs the same number of queries; for example "
            "--num_queries 6" in line)
    assert "for example --num_queries 16" in fail(data=folder, num_patches=16)
    assert "--num_patches 0: must be at least 1" in fail(data=folder, num_patches=0)
    assert "4 images are too few to hold out 2" in fail(data=folder, probe_images=2)
    assert "batch_size 2 (global)" in fail(data=folder, accumulate=3)
    assert "--nheads 5" in fail(data=folder, nheads=5)
    assert ("--standardized_start: of detr and conditional_detr; deformable_detr has a norm there"
            in fail(data=folder, standardized_start=4, detector="deformable_detr"))
    assert not (tmp_path / "out").exists()  # nothing was written until here
    for i in range(4):
        picture(i, (16, 60)).save(folder / f"{i}.png")
    assert ("11 images in a row cannot be used" in (line := fail(data=folder))
            and "16 x 60 pixels, at least 17 a side are needed" in line)
