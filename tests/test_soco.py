"""soco.py: its views, boxes, levels, losses and optimiser by hand, its step on one and two processes,
and whole runs on drawn images."""
import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import flags
from PIL import Image
from test_detreg import same_step
from test_siamese_detr import Pictures, picture
from torchvision.ops import box_iou

import common
import convert
import data
import evaluation
import proposals
import run
import soco

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"arch": "resnet18", "fpn_channels": 16, "head_dim": 24, "mlp_dim": 32, "embedding_dim": 16,
        "image_size": 64, "small_size": 32, "star_size": 48, "level_sizes": (14, 28, 55, 64), "batch_size": 4,
        "num_workers": 0, "seed": 3, "backbone_weights": "random", "proposal_method": "random"}
PLAIN = data.Photometric(0, 0, 0, 0, p_jitter=0, p_gray=0, p_blur=0)
BOXES = np.float32([[20, 16, 80, 76], [60, 40, 130, 100], [8, 50, 70, 110], [90, 10, 150, 60],
                    [40, 24, 110, 94], [70, 60, 140, 112]])


def config(**values):
    return soco.Config(**{**TINY, **values})


def parse(*argv):
    return run.parse_config(soco.Config, soco.PRESETS, list(argv), script="soco",
                            description="", recipe=soco.recipe_of)


def views_of(*images, boxes=None, plain_colours=False, separate=False, **values):
    """A dataset of these images; boxes: the proposals of all of them, xyxy."""
    cfg = config(**values)
    proposals_of = (proposals.Proposals(cfg) if boxes is None
                    else lambda image, index, epoch: np.float32(boxes).reshape(-1, 4))
    dataset = soco.ObjectViewsDataset(cfg, Pictures(*images), np.arange(len(images)), proposals_of, separate)
    if plain_colours:
        dataset.photometric = [PLAIN, PLAIN]
    return dataset


def build(**values):
    return soco.build_model(config(**values))


def batch_of(cfg, n=2, start=0, epoch=0):
    dataset = soco.ObjectViewsDataset(cfg, Pictures(*(picture(i) for i in range(start + n))), np.arange(start + n),
                                      proposals.Proposals(cfg))
    return soco.collate([dataset[epoch, i] for i in range(start, start + n)])


def optimizer_of(cfg, model):
    return soco.LARS([{**group, "base_lr": 0.1} for group in soco.lars_groups(model, cfg.weight_decay)], 0.1,
                     cfg.sgd_momentum, trust=cfg.trust)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a["views"], b["views"], strict=True)) and all(
        torch.equal(a[k], b[k]) for k in ("boxes1", "boxes", "corres", "ids1", "ids", "levels1", "levels"))


# ==== Geometry of boxes and views ==================================================================================

def ramp(width, height):
    """Red and green say where a pixel lies."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


def position_maps(view):
    """[1, 2, s, s]: of each pixel of a view of ramp(), where it lies in the image; and whether the view is mirrored."""
    pixels = view * torch.tensor(data.IMAGENET_STD)[:, None, None] + torch.tensor(data.IMAGENET_MEAN)[:, None, None]
    return 255 * pixels[None, :2], bool(pixels[0, 0, 0] > pixels[0, 0, -1])


def test_a_box_is_the_same_grid_of_places_in_every_view():
    dataset = views_of(ramp(250, 180), boxes=BOXES * 1.5, plain_colours=True, jitter_prob=0.0,
                       image_size=96, small_size=64)
    model = build()
    model.head = torch.nn.Identity()                                      # RoIs as they are cut
    seen, mirrored = 0, 0
    for epoch in range(16):
        sample = dataset[epoch, 0]
        (first, flip1), *others = (position_maps(view) for view in sample["views"])
        for pair, (second, flip2) in enumerate(others):
            boxes1, boxes = sample["boxes1"][pair], sample["boxes"][pair]
            # no side was cut off
            whole = (torch.cat([boxes1, boxes], 1) > 0.03).all(1) & (torch.cat([boxes1, boxes], 1) < 0.97).all(1)
            # [K, 2, 7, 7]
            grids = [model.object_features(m, b[None], False) for m, b in ((first, boxes1), (second, boxes))]
            side = torch.stack([grids[0][:, 0, 0, -1] - grids[0][:, 0, 0, 0],
                                grids[0][:, 1, -1, 0] - grids[0][:, 1, 0, 0]], 1).abs() / 6
            centres = [g.mean((2, 3)) for g in grids]
            assert ((centres[0] - centres[1]).abs() < 0.1 * side)[whole].all()
            if flip1 != flip2:  # SoCo does not un-mirror RoIs: the grid is the mirrored one
                assert ((grids[0] - grids[1]).abs().amax((2, 3))[:, 0] > 3 * side[:, 0]).all()
                grids[1] = grids[1].flip(3)
            assert ((grids[0] - grids[1]).abs().amax((2, 3)) < 0.1 * side)[whole].all()
            seen, mirrored = seen + int(whole.sum()), mirrored + int(whole.sum()) * (flip1 != flip2)
    assert seen > 40 and 10 < mirrored < seen - 10


def test_a_box_shows_its_object_mirrored_or_not():
    # a rectangle in a grey picture, its left half red, its right half green
    scene = Image.new("RGB", (160, 120), (90, 90, 90))
    scene.paste((255, 0, 0), (50, 30, 80, 90))
    scene.paste((0, 255, 0), (80, 30, 110, 90))
    dataset = views_of(scene, boxes=[50, 30, 110, 90], plain_colours=True, jitter_prob=0.0, image_size=96,
                       small_size=64, star=True, star_size=80)
    seen, exact, orders = 0, 0, set()
    for epoch in range(12):
        sample = dataset[epoch, 0]
        assert [v.shape[-1] for v in sample["views"]] == [96, 96, 80, 64]
        for view, box in zip(sample["views"], [sample["boxes1"][0, 0], *sample["boxes"][:, 0]]):
            pixels, side = np.asarray(evaluation.to_image(view)).astype(int), view.shape[-1]
            coloured = np.ptp(pixels, axis=2) > 60
            x1, y1, x2, y2 = (box * side).tolist()
            inside = np.zeros_like(coloured)
            inside[math.ceil(y1 + 1):math.floor(y2 - 1), math.ceil(x1 + 1):math.floor(x2 - 1)] = True
            if inside.sum() < 60:
                continue
            assert (coloured & inside).sum() > 0.97 * inside.sum()
            rows, columns = np.flatnonzero(coloured.any(1)), np.flatnonzero(coloured.any(0))
            edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            # one pixel of the image is missing on one side, see relative_boxes
            exact += np.abs(edges - (x1, y1, x2, y2)).max() < 2.5
            seen += 1
            red, green = ((pixels[..., c] - pixels[..., 1 - c] > 100).nonzero()[1] for c in (0, 1))
            orders.add(bool(red.mean() < green.mean()) if len(red) and len(green) else None)
    assert seen > 40 and exact == seen and {True, False} <= orders


def test_level_of_a_box():
    sizes = soco.Config().level_sizes
    squares = {1: 0, 47: 0, 48: 0, 49: 1, 96: 1, 97: 2, 192: 2, 193: 3, 224: 3, 225: -1}
    boxes = np.array([[5, 7, 5 + side - 1, 7 + side - 1] for side in squares])                # inclusive corners
    assert soco.assign_levels(boxes, sizes).tolist() == list(squares.values())
    # by the root of the area: 49 x 47 = 48^2 - 1, 49 x 48 is more; 24 x 96 = 48^2;
    # 112 x 112 is the most a view of 112 px has
    assert soco.assign_levels(np.array([[0, 0, 48, 46], [0, 0, 48, 47], [0, 0, 23, 95], [0, 0, 111, 111]]),
                              sizes).tolist() == [0, 1, 0, 2]
    # a box of 200 x 200 px of a 448 x 448 image: 100 px in V1 (P4), 50 in a V3 that shows all (P3),
    # 100 in one that shows a quarter
    box = np.array([[100, 100, 299, 299, 1]])
    for crop, side, resized, level in (((0, 0, 448, 448), 224, [50, 50, 149, 149], 2),
                                       ((0, 0, 448, 448), 112, [25, 25, 74, 74], 1),
                                       ((100, 100, 324, 324), 112, [0, 0, 99, 99], 2),
                                       ((100, 100, 324, 324), 224, [0, 0, 199, 199], 3)):
        ours = soco.resize_boxes(soco.clip_to_crop(box, crop), crop, side)
        assert (ours.dtype == np.int64 and ours.tolist() == [resized]
                and soco.assign_levels(ours, sizes).tolist() == [level])
    # each axis by itself, truncated
    assert soco.resize_boxes(np.array([[3, 5, 11, 13]]), (0, 0, 3, 7), 2).tolist() == [[2, 1, 7, 3]]


def test_levels_of_a_sample():
    cfg = dict(image_size=224, small_size=112, level_sizes=soco.Config().level_sizes, jitter_prob=0.5)
    dataset, crossed = views_of(*(picture(i) for i in range(3)), **cfg), 0
    for epoch in range(6):
        sample = dataset[epoch, epoch % 3]
        for pair in range(2):
            for boxes, levels, side in ((sample["boxes1"], "levels1", 224),
                                        (sample["boxes"], "levels", (224, 112)[pair])):
                pixels = (boxes[pair] * side).numpy().astype(np.float64)
                low, high = ([np.searchsorted(soco.Config().level_sizes, s)
                              for s in np.sqrt(np.prod(pixels[:, 2:] - pixels[:, :2] + d, 1))]
                             for d in (-1.1, 2.1))  # rounding to whole pixels of the view and back
                assert all(a <= level <= b for a, level, b in zip(low, sample[levels][pair].tolist(), high))
            crossed += int((sample["levels1"][pair] != sample["levels"][pair]).sum())
            corres = sample["corres"][pair].unflatten(0, (4, 4)).unflatten(2, (4, 4))         # [level, box, level, box]
            for level1, k1, level, k in corres.nonzero().tolist():
                assert sample["levels1"][pair, k1] == level1 and sample["levels"][pair, k] == level
                assert sample["ids1"][pair, k1] == sample["ids"][pair, k]
            assert corres.sum() == sum(int((sample["ids"][pair] == i).sum()) for i in sample["ids1"][pair])
        assert sample["levels"][1].max() <= 2 and sample["levels1"].min() >= 0  # a 112 px view never has P5
    assert crossed > 5


# ==== Proposals, crops and copies ==================================================================================

def test_rules_of_proposals_are_given_up_one_by_one():
    cfg = config(min_side=10)
    good, small, large, flat, tiny = [5, 5, 40, 50], [3, 3, 20, 20], [0, 0, 95, 90], [0, 0, 90, 12], [7, 7, 9, 9]
    for rects, expected in (((tiny, good, flat, small, large), [good]), ((tiny, flat, small, large), [small, large]),
                            ((tiny, flat), [flat]), ((tiny,), [[0, 0, 100, 100]]), ((), [[0, 0, 100, 100]])):
        boxes = soco.usable_boxes(np.array(rects, np.int64).reshape(-1, 4), (100, 100), cfg)
        assert boxes.tolist() == [[x, y, x + w - 1, y + h - 1, i] for i, (x, y, w, h) in enumerate(expected, 1)]
    sides = np.array([[0, 0, 30, 30], [0, 0, 29, 30], [0, 0, 80, 80], [0, 0, 81, 80], [0, 0, 90, 30],
                      [0, 0, 91, 30], [0, 0, 30, 90]])
    assert (soco.filter_rects(sides, (100, 100), 3.0, (0.3, 0.8), 0).tolist()
            == [True, False, True, False, True, False, True])  # with limits
    assert (soco.filter_rects(sides, (400, 25), 3.0, (0.3, 0.8), 0).tolist()
            == [True, False, True, False, True, False, True])  # of W * H


def test_overlap_with_a_crop_is_more_than_a_line():
    crop = (10, 20, 60, 70)
    inside = {(0, 30, 11, 40): True, (0, 30, 10, 40): False, (58, 30, 90, 40): True, (59, 30, 90, 40): False,
              (20, 0, 30, 21): True, (20, 0, 30, 20): False, (20, 68, 30, 99): True, (20, 69, 30, 99): False,
              (0, 0, 99, 99): True, (30, 30, 31, 31): True}
    boxes = np.array([[*box, i] for i, box in enumerate(inside)])
    assert soco.overlapping(boxes, crop)[:, 4].tolist() == [i for i, yes in enumerate(inside.values()) if yes]
    assert (soco.clip_to_crop(boxes[:1], crop).tolist() == [[0, 10, 1, 20, 0]]
            and soco.clip_to_crop(boxes[8:9], crop).tolist() == [[0, 0, 49, 49, 8]])
    assert soco.clip_to_crop(boxes[:0], crop).tolist() == [[0, 0, 49, 49, 1]]


@pytest.mark.parametrize("usable", (1, 2, 3))
def test_too_few_proposals_are_copied(usable):
    dataset, weights = views_of(picture(0), boxes=BOXES[:usable]), set()
    for epoch in range(6):
        sample = dataset[epoch, 0]
        for pair in range(2):
            ids1, ids, corres = sample["ids1"][pair], sample["ids"][pair], sample["corres"][pair]
            assert set(ids1.tolist()) == set(ids.tolist()) <= set(range(1, usable + 1))
            for boxes, levels, own in ((sample["boxes1"], sample["levels1"], ids1),
                                       (sample["boxes"], sample["levels"], ids)):
                same = own[:, None] == own[None]                          # copies are equal in all
                assert ((boxes[pair][:, None] == boxes[pair][None]).all(2) >= same).all() and (
                    (levels[pair][:, None] == levels[pair][None]) >= same).all()
            assert corres.sum() == sum(int((ids1 == i).sum() * (ids == i).sum()) for i in set(ids.tolist()))
            weights.add(int(corres.sum()))
    assert weights == {16} if usable == 1 else max(weights) <= 10
    assert {int(c) for c in views_of(picture(0), boxes=BOXES)[0, 0]["corres"].sum((1, 2))} <= {4, 6, 8, 10, 16}


@pytest.mark.parametrize("values", ({"boxes": []}, {"boxes": [[3, 3, 9, 9]]}, {"proposal_method": "whole"}))
def test_an_image_without_proposals_is_one_box(values):
    sample = views_of(picture(0), **values)[0, 0]
    assert sample["corres"].sum((1, 2)).tolist() == [16, 16] and set(sample["ids1"].flatten().tolist()) == {1}
    sample = views_of(picture(0), **values, jitter_prob=0.0)[0, 0]
    for boxes in (sample["boxes1"][0], sample["boxes1"][1]):
        x1, y1, x2, y2 = boxes[0].tolist()
        assert ((boxes == boxes[0]).all() and (y1, y2) == pytest.approx((0, 119 / 120))
                and x2 - x1 == pytest.approx(159 / 160))
        assert x1 == pytest.approx(0, abs=1e-6) or x2 == pytest.approx(1)  # mirrored: the pixel is missing on the left
    sides = sample["boxes"][..., 2:] - sample["boxes"][..., :2]
    assert (sides > 0.97).all() and (sides < 1).all()


def test_crops_are_drawn_until_they_show_enough(monkeypatch):
    near, far = (0, 0, 80, 80), (100, 100, 160, 120)
    boxes = soco.inclusive_boxes(np.array([[10, 10, 30, 30], [20, 20, 40, 40], [90, 80, 60, 40]]))

    def crops(*drawn, boxes=boxes, **values):
        left = list(drawn)
        monkeypatch.setattr(data, "draw_crop", lambda rng, hw, area: left.pop(0))
        found = views_of(picture(0), **values).draw_crops(None, boxes, (160, 120))
        return found[1:], len(left)

    assert crops(near, near, far) == ([near, near], 1)                    # 4 // 2 boxes in both
    assert crops(near, far, near, near, far) == ([near, near], 1)         # one box in one of them: again, both
    assert crops(near, far, far, near, far) == ([far, near], 1)           # the second time one box is enough
    assert crops(*[far] * 12, boxes=boxes[:2]) == ([far, far], 2)         # five times, then as it is
    assert (crops(near, far, near, far, num_boxes=1) == ([near, far], 2)
            and crops(*[far] * 12, boxes=boxes[:2], num_boxes=1)[1] == 2)
    assert crops(near, far, far, far, v3="downsample") == ([near, near], 2)
    assert (crops(near, near, far, star=True) == ([near, near, near], 1)
            and crops(far, near, far, near, star=True, v3="downsample")[0] == [
                far, near, far])
    assert crops(near, far, multi_view=False) == ([near], 0)  # V3, which is not there, need not show anything


def test_views_of_the_variants():
    for values, sides in (({}, [64, 64, 32]), ({"star": True}, [64, 64, 48, 32]), ({"v3": "downsample"}, [64, 64, 32]),
                          ({"multi_view": False}, [64, 64]),
                          ({"pipeline": "c4", "multi_view": False, "scale_aware": False}, [64, 64])):
        dataset = views_of(picture(0), boxes=BOXES, plain_colours=True, **values)
        for epoch in range(4):
            sample = dataset[epoch, 0]
            assert [v.shape for v in sample["views"]] == [(3, s, s) for s in sides]
            pairs, rows = len(sides) - 1, 4 if values.get("pipeline") == "c4" else 16
            assert (sample["boxes1"].shape == sample["boxes"].shape == (pairs, 4, 4)
                    and sample["corres"].shape == (pairs, rows, rows))
            twin = {"star": 2, "v3": 1}.get(next(iter(values), ""))       # the pair that shares V2's crop
            if twin:
                small = torch.nn.functional.interpolate(sample["views"][1][None], (32, 32),
                                                        mode="bilinear", antialias=True)[0]
                alike = [(small - view).abs().mean()
                         for view in (sample["views"][twin + 1], sample["views"][twin + 1].flip(2))]
                assert min(alike) < 0.02
                same, other = sample["boxes"][0], sample["boxes"][twin]
                mirrored = torch.stack([1 - other[:, 2], other[:, 1], 1 - other[:, 0], other[:, 3]], 1)
                assert torch.allclose(same, other, atol=1e-6) or torch.allclose(same, mirrored, atol=1e-6)
                for name in ("ids1", "ids", "boxes1", "levels1"):
                    assert torch.equal(sample[name][0], sample[name][twin])
            if "star" in values or not values:                            # V3 is its own crop
                assert not torch.allclose(sample["boxes"][0, :, 1::2], sample["boxes"][1, :, 1::2])


def test_jitter():
    boxes = np.array([[10, 20, 49, 39, 7], [10, 20, 49, 39, 8], [0, 0, 9, 9, 9]])
    moved = soco.jitter_boxes(boxes, np.array([True, False, True]),
                              np.array([[0.1, -0.1, 0.05, 0.1], [0.1] * 4, [-0.1, 0, 0, -0.1]]))
    # 40 x 20 at (10, 20): the corner moves by 4 and -2, the sides become 42 and 22
    np.testing.assert_allclose(moved, [[14, 18, 55, 39, 7], [10, 20, 49, 39, 8], [-1, 0, 8, 8, 9]], atol=1e-12)
    still, shaken = (views_of(picture(0), boxes=BOXES, jitter_prob=p) for p in (0.0, 1.0))
    for epoch in range(8):
        a, b = still[epoch, 0], shaken[epoch, 0]
        assert (torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["ids"], b["ids"])
                and torch.equal(a["ids1"], b["ids1"]))  # V1 only
        sides = (a["boxes1"][..., 2:] - a["boxes1"][..., :2]).repeat(1, 1, 2)
        change = (a["boxes1"] - b["boxes1"]).abs()
        assert (change <= 0.21 * sides).all() and (change.amax(2) > 1e-4).all()
        assert (b["boxes1"] >= 0).all() and (b["boxes1"] <= 1).all()
    large = views_of(picture(0), boxes=[0, 0, 160, 120], jitter_prob=1.0, size_range=(0.3, 1.0))
    for epoch in range(8):                                                # cut off at the image
        box = large[epoch, 0]["boxes1"]
        assert (box >= 0).all() and (box <= 1).all() and (box[..., 2:] - box[..., :2] < 1).all()
    draws = [soco.draw_pair(np.random.default_rng(i), 9, config(num_boxes=50, jitter_prob=0.3)) for i in range(40)]
    assert (np.mean([d.apply for d in draws]) == pytest.approx(0.3, abs=0.05)
            and max(np.abs(d.r).max() for d in draws) < 0.1)
    chosen = [soco.draw_pair(np.random.default_rng(i), 9, config()).select for i in range(200)]
    assert all(len(set(c)) == 4 for c in chosen) and set(np.concatenate(chosen)) == set(range(9))


def test_the_two_pairs_have_boxes_of_their_own():
    for image in (picture(0), Image.new("RGB", (8, 300))):                # of the second every crop is the same
        dataset = views_of(image,
                           boxes=BOXES if image.width > 8 else [[0, y, 8, y + 6] for y in range(142, 153)], min_side=1)
        different = 0
        for epoch in range(10):
            ids = dataset[epoch, 0]["ids"]
            different += set(ids[0].tolist()) != set(ids[1].tolist())
        assert different > 3


def test_boxes_of_the_probe_lie_apart():
    values = {"size_range": (0.05, 0.6), "min_side": 4, "num_boxes": 6, "jitter_prob": 0.0}
    apart, all_of_them = (views_of(*(picture(i) for i in range(4)), separate=s, **values) for s in (True, False))

    def largest(sample):
        return max(float(box_iou(b, b).masked_fill(ids[:, None] == ids[None], 0).max())
                   for b, ids in zip(sample["boxes1"], sample["ids1"]))

    assert (max(largest(apart[0, i]) for i in range(4)) <= 0.3 + 1e-5
            and max(largest(all_of_them[0, i]) for i in range(4)) > 0.4)


# ==== Samples ======================================================================================================

def test_samples_are_a_function_of_seed_epoch_and_index(tmp_path):
    images = [picture(i) for i in range(3)]
    dataset = views_of(*images)
    for key in ((0, 0), (0, 2), (5, 1)):
        sample = dataset[key]
        assert equal(sample, views_of(*images)[key]) and not equal(sample, dataset[key[0] + 1, key[1]])
        assert (not equal(sample, views_of(*images, seed=4)[key]) and sample["index"] == key[1]
                and sample["skipped"] == [])
        for boxes in (sample["boxes1"], sample["boxes"]):
            assert (boxes.dtype == torch.float32 and (boxes >= 0).all() and (boxes <= 1).all()
                    and (boxes[..., 2:] > boxes[..., :2]).all())
    scenes, cfg = data.SyntheticScenes(4, 64, seed=3), config(proposal_method="selective_search", min_side=8)
    store = proposals.build_store(tmp_path / "store", scenes, proposals.Proposals(cfg).generator, progress=False)
    for i in range(4):
        image = scenes.load(i)
        drawn = {None: proposals.Proposals(cfg).generator(image, proposals.image_seed(3, 5, i)),
                 store: store.boxes(i, image.size[::-1])}
        for kept, boxes in drawn.items():
            rects = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).astype(int)
            dataset = soco.ObjectViewsDataset(cfg, scenes, np.arange(4), proposals.Proposals(cfg, kept))
            mine = dataset.propose(image, i, 5)
            assert np.array_equal(mine, soco.usable_boxes(rects, image.size, cfg)) and len(mine) > 1
    for kept in (None, store):
        dataset = soco.ObjectViewsDataset(cfg, scenes, np.arange(4), proposals.Proposals(cfg, kept))
        here, there = ([batch for batch in data.make_loader(dataset, data.StepSampler(4, 2, 3, seed=3),
                                                            num_workers=workers, collate=soco.collate)]
                       for workers in (0, 2 if kept else 0))
        assert all(one["index"] == two["index"] and equal(one, two) for one, two in zip(here, there, strict=True))
        assert here[0]["views"][2].shape == (2, 3, 32, 32) and here[0]["corres"].shape == (2, 2, 16, 16)


def test_colours_of_the_views(monkeypatch):
    """BYOL's two pipelines: V1 is always blurred and never solarised, the others are blurred with
    .1 and solarised with .2."""
    order, apply = [], data.apply_photometric
    monkeypatch.setattr(data, "apply_photometric",
                        lambda image, draw: (order.append(draw), apply(image, {**draw, "order": [], "blur": None}))[1])
    dataset = views_of(picture(0, (24, 24)), proposal_method="whole", image_size=32, star_size=32, star=True)
    n = 250
    for epoch in range(n):
        dataset[epoch, 0]
    first, rest = order[::4], [draw for k in (1, 2, 3) for draw in order[k::4]]
    assert len(first) == n and all(d["blur"] is not None and not d["solarize"] for d in first)
    assert all(0.1 <= d["blur"] <= 2 for d in order if d["blur"] is not None)
    for draws, name, p in ((first, "order", 0.8), (first, "gray", 0.2), (rest, "order", 0.8), (rest, "gray", 0.2),
                           (rest, "blur", 0.1), (rest, "solarize", 0.2)):
        share = np.mean([d[name] is not None and d[name] != [] and d[name] is not False for d in draws])
        assert share == pytest.approx(p, abs=4 * (p * (1 - p) / len(draws)) ** 0.5), name


@pytest.mark.parametrize("size", ((1, 1), (8, 300), (300, 8), (40, 40)))
def test_odd_images(size):
    for method in ("selective_search", "random", "whole"):
        sample = views_of(Image.new("RGB", size, (90, 90, 90)), proposal_method=method, star=True)[1, 0]
        assert (all(view.isfinite().all() for view in sample["views"]) and sample["boxes"].isfinite().all()
                and sample["boxes1"].isfinite().all())
        assert (sample["corres"].sum((1, 2)) > 0).all()
    assert (sample["boxes"] >= 0).all() and (sample["boxes"] <= 1).all()


# ==== Correspondence and loss ======================================================================================

def test_correspondence():
    ids1, ids2 = np.array([5, 7]), np.array([7, 5])
    # 5: row 0 of P2 with row 1 of P3; 7: 1 of P3, 0 of P3
    aware = soco.correspondence(ids1, ids2, np.array([0, 1]), np.array([1, 1]), 3)
    assert aware.shape == (6, 6) and aware.dtype == np.float32 and np.argwhere(aware).tolist() == [[0, 3], [3, 2]]
    # above all levels
    assert np.argwhere(soco.correspondence(ids1, ids2, np.array([0, -1]), np.array([1, 1]), 3)).tolist() == [[0, 3]]
    assert not soco.correspondence(ids1, ids2, np.array([-1, -1]), np.array([-1, -1]), 3).any()
    # on every level with itself
    assert np.argwhere(soco.correspondence(ids1, ids2, levels=2)).tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]
    assert soco.correspondence(np.array([5, 5]), np.array([5, 7])).tolist() == [[1, 0], [1, 0]]


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_loss_of_perfect_agreement():
    for pairs, expected in ((2, -8), (3, -12), (1, -4)):                  # SoCo, SoCo*, C4
        v = unit(2, 16, 8)
        total, terms = soco.soco_loss([(v, v, v, v)] * pairs, torch.eye(16).expand(2, pairs, 16, 16))
        assert total == pytest.approx(expected, abs=1e-4) and len(terms) == 2 * pairs
        assert list(terms) == [f"loss_{k}" for j in range(2, 2 + pairs) for k in (f"1{j}", f"{j}1")]
        assert (soco.soco_loss([(v, v, -v, -v)] * pairs, torch.eye(16).expand(2, pairs, 16, 16))[0]
                == pytest.approx(-expected, abs=1e-4))
        assert soco.soco_loss([(v, v, v, v)] * pairs, torch.zeros(2, pairs, 16, 16))[0] == 0


def test_loss_by_hand():
    v, t = unit(3, 4, 8), unit(3, 4, 8, seed=1)
    corres = torch.zeros(3, 4, 4)
    corres[0, 0, 1] = corres[0, 2, 3] = 1
    # 5: 2 * 2, 7: 1 * 2, 8: none
    corres[1] = torch.from_numpy(soco.correspondence(np.array([5, 5, 7, 8]), np.array([5, 5, 7, 7])))
    cos = torch.einsum("bid,bjd->bij", v, t)
    first = (cos[0, 0, 1] + cos[0, 2, 3]) / 2
    second = (cos[1, :2, :2].sum() + cos[1, 2, 2:].sum()) / 6             # n1 * n2 pairs each
    assert corres[1].sum() == 6
    # the third adds 0, and counts
    torch.testing.assert_close(soco.pair_loss(v, t, corres), -2 * (first + second) / 3, atol=1e-5, rtol=0)
    w, u = unit(3, 4, 8, seed=2), unit(3, 4, 8, seed=3)
    total, terms = soco.soco_loss([(v, w, u, t)], corres[:, None])
    torch.testing.assert_close(terms["loss_12"], soco.pair_loss(v, t, corres))
    torch.testing.assert_close(terms["loss_21"], soco.pair_loss(w, u, corres.transpose(1, 2)))
    assert total == terms["loss_12"] + terms["loss_21"]
    again, swapped = soco.soco_loss([(w, v, t, u)], corres.transpose(1, 2)[:, None])          # the views change places
    torch.testing.assert_close(again, total)
    assert (swapped["loss_12"] == pytest.approx(terms["loss_21"].item())
            and swapped["loss_21"] == pytest.approx(terms["loss_12"].item()))


# ==== Networks, step, optimiser ====================================================================================

def test_target_gets_no_gradient():
    cfg = config()
    model, batch = soco.build_model(cfg), batch_of(cfg)
    seen, parts = [], {}
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    for name, part in model.named_children():
        part.register_forward_hook(lambda module, args, output, name=name: parts.update({name: parts.get(name, 0) + 1}))
    terms = soco.train_step(cfg, model, optimizer_of(cfg, model), batch, 0.99, CPU)
    (pairs,) = seen
    assert len(pairs) == 2 and all(v.shape == (2, 16, 16) for pair in pairs for v in pair)
    assert all(v1.requires_grad and vj.requires_grad and not t1.requires_grad and not tj.requires_grad
               for v1, vj, t1, tj in pairs)
    torch.testing.assert_close(torch.stack([v.norm(dim=-1) for pair in pairs for v in pair]), torch.ones(8, 2, 16))
    assert parts == {"neck": 3, "neck_k": 3, "head": 16, "head_k": 16, "projector": 16,
                     "projector_k": 16, "predictor": 16}  # no predictor_k
    for name, p in model.named_parameters():
        target = name.split(".")[0].endswith("_k")
        assert p.requires_grad != target and (p.grad is None) == target, name
        assert target or p.grad.isfinite().all()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    assert (terms["grad_norm"] == pytest.approx(norm, rel=1e-5)
            and terms["pairs"] == pytest.approx(batch["corres"].sum().item() / 4))
    assert terms["loss"] == pytest.approx(sum(v.item() for k, v in terms.items() if k.startswith("loss_")), rel=1e-5)


def test_feature_of_a_box_without_pyramid_or_head():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    # the value at a place (in cells) is 10 times its y plus its x
    feature_map = (10 * y + x + 0.5 * 11).expand(1, 512, 8, 6)
    boxes = torch.tensor([[[1 / 6, 2 / 8, 5 / 6, 6 / 8], [2 / 6, 3 / 8, 3 / 6, 5 / 8]]])
    h = build(fpn=False, box_head=False, scale_aware=False).object_features(feature_map, boxes, False)
    # the mean of the RoI
    assert h.shape == (2, 512) and h[:, 0].tolist() == pytest.approx([10 * 4 + 3, 10 * 4 + 2.5], rel=1e-5)
    c4 = build(pipeline="c4")
    c4.encoder.layer4, c4.encoder_k.layer4 = torch.nn.Identity(), torch.nn.Flatten(0, 0)
    for target in (False, True):                                          # the mean of what layer4 makes of the RoI
        torch.testing.assert_close(c4.object_features(feature_map, boxes, target), h)
    assert (len(c4.maps(torch.zeros(1, 3, 64, 64), False)) == 1
            and c4.maps(torch.zeros(1, 3, 64, 64), True)[0].shape == (1, 256, 4, 4))
    assert build(fpn=False).maps(torch.zeros(2, 3, 64, 64), False)[0].shape == (2, 512, 2, 2)
    assert ([m.shape for m in build().maps(torch.zeros(2, 3, 72, 64), True)]
            == [(2, 16, 18, 16), (2, 16, 9, 8), (2, 16, 5, 4), (2, 16, 3, 2)])


def test_names_and_start():
    model, trained = build(), build(star=True)
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {*soco.TARGET, "predictor", *(f"{n}_k" for n in soco.TARGET)}
    for name in state:
        part, _, rest = name.partition(".")
        if part in soco.TARGET:
            assert torch.equal(state[name], state[f"{part}_k.{rest}"]), name
    assert state.keys() == trained.state_dict().keys() and all(torch.equal(v, trained.state_dict()[k])
                                                               for k, v in state.items())  # from the seed
    assert not torch.equal(build(seed=4).state_dict()["neck.fpn_convs.0.conv.weight"],
                           state["neck.fpn_convs.0.conv.weight"])
    assert not state["encoder.layer1.0.bn2.weight"].any() and state["encoder.layer1.0.bn1.weight"].all()
    assert not build(arch="resnet50").state_dict()["encoder.layer3.1.bn3.weight"].any()
    c4 = build(pipeline="c4").state_dict()
    assert {name.split(".")[0] for name in c4} == {"encoder", "projector", "predictor", "encoder_k", "projector_k"}


def test_moving_average():
    model = build()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 if name.split(".")[0].endswith("_k") else 0.3)
        for name, buffer in model.named_buffers():
            buffer.add_(3 if name.split(".")[0].endswith("_k") else 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.update_target(0.75)
    parameters = {name for name, _ in model.named_parameters()}
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part.endswith("_k") and name in parameters:
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * before[f"{part[:-2]}.{rest}"])
        else:                                                             # statistics are the target's own
            assert torch.equal(value, before[name]), name
    assert soco.momentum_at(0, 0.99, 100) == pytest.approx(0.99) and soco.momentum_at(100, 0.99, 100) == 1
    assert soco.momentum_at(50, 0.98, 100) == pytest.approx(0.99) and soco.ema_steps(1281167, 2048, 100) == 62556
    rising = [soco.momentum_at(k, 0.99, 40) for k in range(41)]
    assert rising == sorted(rising)


def test_target_moves_before_it_looks():
    cfg = config()
    model, batch = soco.build_model(cfg).eval(), batch_of(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape))
    frozen, seen = copy.deepcopy(model), []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    soco.train_step(cfg, model,
                    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0), batch, 0.5, CPU)
    views, boxes1 = batch["views"], list(batch["boxes1"].unbind(1))
    with torch.no_grad():
        old = [frozen.embed(frozen.maps(views[0], True), boxes, True) for boxes in boxes1]
        frozen.update_target(0.5)
        new = [frozen.embed(frozen.maps(views[0], True), boxes, True) for boxes in boxes1]
    for pair, a, b in zip(seen[0], old, new):
        torch.testing.assert_close(pair[2], b)
        assert (pair[2] - a).abs().max() > 1e-3


def test_lars_by_hand():
    def model():
        made = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.tensor(value)) for name, value in (
            ("matrix", [[3.0, 0.0], [0.0, 4.0]]), ("bias", [2.0, -2.0]), ("zero", [[0.0, 0.0]]),
            ("still", [[1.0, 2.0]]), ("unused", [[5.0]]))})
        made["frozen"] = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
        return made

    def step(made, optimizer, scale=1.0):
        gradients = {"matrix": [[0.0, 0.6], [0.8, 0.0]], "bias": [0.5, 0.25],
                     "zero": [[0.3, 0.4]], "still": [[0.0, 0.0]]}
        for name, value in gradients.items():
            made[name].grad = scale * torch.tensor(value)
        optimizer.step()

    one = model()
    groups = soco.lars_groups(one, 0.1)
    # frozen: in none
    assert [len(g["params"]) for g in groups] == [1, 4] and [g["weight_decay"] for g in groups] == [0.0, 0.1]
    optimizer = soco.LARS(groups, 0.5, momentum=0.9, trust=0.01)
    w, buffer = np.array([[3.0, 0], [0, 4]]), 0
    bias, speed, rest = np.array([2.0, -2]), 0, np.array([[1.0, 2]])
    zero, push, slide = np.zeros((1, 2)), 0, 0
    for k, rate in enumerate((0.5, 0.5, 0.2)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        step(one, optimizer, scale=1 + k)

        def trusted(p, gradient):
            u = gradient + 0.1 * p
            return u * 0.01 * np.linalg.norm(p) / np.linalg.norm(u) if np.linalg.norm(p) and np.linalg.norm(u) else u

        buffer = 0.9 * buffer + trusted(w, (1 + k) * np.array([[0, 0.6], [0.8, 0]]))
        speed = 0.9 * speed + (1 + k) * np.array([0.5, 0.25])             # no decay, no trust
        push = 0.9 * push + trusted(zero, (1 + k) * np.array([[0.3, 0.4]]))  # the length is 0: a plain step
        slide = 0.9 * slide + trusted(rest, np.zeros((1, 2)))             # the decay alone
        w, bias, zero, rest = w - rate * buffer, bias - rate * speed, zero - rate * push, rest - rate * slide
        for name, value in (("matrix", w), ("bias", bias), ("zero", zero), ("still", rest)):
            np.testing.assert_allclose(one[name].detach(), value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert one["unused"].item() == 5 and one["frozen"].sum() == 4 and one["unused"] not in optimizer.state
    two = model()
    two.load_state_dict(one.state_dict())
    restored = soco.LARS(soco.lars_groups(two, 0.1), 0.5, momentum=0.9, trust=0.01)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for made, o in ((one, optimizer), (two, restored)):
        step(made, o)
    assert all(torch.equal(one[name], two[name]) for name in one)
    none = model()
    # neither gradient nor decay: nothing moves, nothing is divided by 0
    still = soco.LARS(soco.lars_groups(none, 0.0), 0.5)
    none["still"].grad = torch.zeros(1, 2)
    still.step()
    assert torch.equal(none["still"].detach(), torch.tensor([[1.0, 2.0]]))


def test_learning_rate():
    cfg = config(lr=8.0, batch_size=256, epochs=20, warmup_epochs=2)
    rates = [8 * soco.lr_factor(cfg, step, 10) for step in range(201)]
    assert rates[0] == pytest.approx(0.08) and rates[10] == pytest.approx(0.08 * (99 / 2 + 1)) and rates[20] == 8
    assert (rates[110] == pytest.approx((8 + 1e-6) / 2) and rates[200] == pytest.approx(1e-6)
            and rates[:21] == sorted(rates[:21]))
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 8 * soco.lr_factor(config(lr=8.0, batch_size=256, epochs=20, warmup_epochs=0), 0, 10) == 8
    assert rates[199] < 1e-3 * 8


# ==== Switches (Tables 4 and 5) ====================================================================================

TABLE_4 = ["--proposal_method whole --num_boxes 1 --fpn false --box_head false --scale_aware false --jitter_prob 0 "
           "--multi_view false", "--proposal_method selective_search --num_boxes 4", "--fpn", "--box_head",
           "--scale_aware", "--jitter_prob 0.5", "--multi_view"]
SWITCHES = [(" ".join(TABLE_4[:n + 1]), 2, 1 if n < 2 else 4) for n in range(6)] + [
    (" ".join(TABLE_4), 3, 4), ("--pipeline c4", 2, 1), ("--star", 4, 4), ("--v3 downsample", 3, 4),
    ("--preset paper", 3, 4), ("--small_size 96 --level_sizes 48 96 192 224", 3, 4),
    ("--small_size 192 --level_sizes 48 96 192 224", 3, 4), ("--num_boxes 1", 3, 4), ("--num_boxes 16", 3, 4),
    ("--num_boxes 8 --proposal_method random", 3, 4), ("--ema_momentum 0.98", 3, 4), ("--amp bf16", 3, 4),
    ("--star --fpn false --scale_aware false --box_head false", 4, 1)]


@pytest.mark.parametrize("command, views, levels", SWITCHES,
                         ids=[command.replace("--", "") for command, *_ in SWITCHES])
def test_switches(command, views, levels):
    tiny = flags({k: v for k, v in TINY.items() if k != "proposal_method"})
    cfg = parse(*tiny, *command.split())
    soco.check(cfg)
    dataset = views_of(*(picture(i) for i in range(2)),
                       boxes=BOXES if cfg.proposal_method == "selective_search" else None,
                       **{k: v for k, v in vars(cfg).items() if k != "seed"})
    model, batch = soco.build_model(cfg).train(), soco.collate([dataset[0, i] for i in range(2)])
    assert len(batch["views"]) == views and batch["corres"].shape == (2, views - 1,
                                                                      levels * cfg.num_boxes, levels * cfg.num_boxes)
    terms = soco.train_step(cfg, model, optimizer_of(cfg, model), batch, cfg.ema_momentum, CPU)
    assert terms["loss"].isfinite() and abs(terms["loss"]) <= 4 * (views - 1) + 1e-4
    assert [name for name in terms if name.startswith("loss_")] == [f"loss_{k}" for j in range(2, views + 1)
                                                                    for k in (f"1{j}", f"{j}1")]
    heads = 2 * (views - 1) * levels  # one update of the statistics per level and box set (D7)
    counts = {name: int(v) for name, v in model.state_dict().items() if name.endswith("bn1.num_batches_tracked")
              and name.count(".") == 2}
    expected = {f"{part}{k}.bn1.num_batches_tracked": views if part == "encoder" else heads
                for part in ("encoder", "head", "projector")
                for k in ("", "_k")} | {"predictor.bn1.num_batches_tracked": heads}
    assert counts == {k: v for k, v in expected.items() if cfg.box_head and cfg.pipeline == "fpn" or "head" not in k}
    # a box meets itself once, or once on every level
    same = (batch["ids1"][..., None] == batch["ids"][..., None, :]).sum((2, 3))
    assert torch.equal(batch["corres"].sum((2, 3)), same.float() * (1 if cfg.scale_aware else levels))


def test_recipes():
    cfg = parse()
    assert (cfg.data, cfg.batch_size, cfg.epochs, cfg.lr, cfg.weight_decay, cfg.num_boxes,
            cfg.jitter_prob, cfg.crop_area) == (
                "imagenet", 2048, 100, 1.0, 1e-5, 4, 0.5, (0.5, 1.0))
    assert (cfg.image_size, cfg.small_size, cfg.ema_momentum, cfg.pipeline, cfg.v3) == (224, 112, 0.99, "fpn", "crop")
    assert parse("--star").epochs == 400 and parse("--star", "--epochs", "100").epochs == 100
    c4 = parse("--pipeline", "c4")
    assert ((c4.crop_area, c4.roi_size, c4.jitter_prob, c4.multi_view, c4.scale_aware, c4.epochs)
            == ((0.6, 1.0), 14, 0.0, False, False, 100))
    assert (parse("--preset", "paper").v3, parse("--preset", "paper").min_side) == ("downsample", 0)
    for command in (*(c for c, *_ in SWITCHES), "--preset demo", "--batch_size 512", "--batch_size 4096",
                    "--num_boxes 16 --ema_momentum 0.993"):
        soco.check(parse(*command.split()))


# ==== Two processes ================================================================================================

def one_step(start, stop, mode="eval", steps=1):
    """Terms and gradients of a step on images start..stop of a batch of four;
    as DistributedDataParallel where there are two processes."""
    cfg = config(lr=1.0)
    model = soco.build_model(cfg)
    with torch.no_grad():  # blocks that do something, a target that is not the online network
        for name, p in model.named_parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
                   + (0.01 if "_k." in name else 0))
    wrapped, optimizer = common.wrap_model(model, CPU), optimizer_of(cfg, model)
    wrapped.train(mode == "train")
    for step in range(steps):
        terms = soco.train_step(cfg, wrapped, optimizer, batch_of(cfg, stop - start, start, epoch=step), 0.9, CPU)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return ({k: v.item() for k, v in terms.items()}, gradients,
            {k: v for k, v in model.state_dict().items() if "_k." in k and "encoder" not in k})


def batches(world=1, rank=0):
    cfg = config()
    dataset = soco.ObjectViewsDataset(cfg, Pictures(*(picture(i) for i in range(6))), np.arange(6),
                                      proposals.Proposals(cfg))
    return list(data.make_loader(dataset, data.StepSampler(6, 4, 3, world=world, rank=rank, seed=3),
                                 num_workers=0, collate=soco.collate))


def worker():
    """What one of two processes does (conftest.two_processes)."""
    r = common.rank()
    keys = ("boxes1", "boxes", "corres", "ids1", "ids", "index")
    return {"eval": one_step(2 * r, 2 * r + 2)[:2], "train": one_step(2 * r, 2 * r + 2, "train", 2)[::2],
            "batches": [{k: batch[k] for k in keys} for batch in batches(2, r)]}


def test_two_processes_are_one_batch(two_processes):
    """With the statistics of BatchNorm held fixed. In training they are those of each process on CPU:
    only what does not hang on them is compared."""
    results = two_processes["test_soco"]
    same_step([r["eval"] for r in results], one_step(0, 4)[:2])
    assert results[0]["eval"][0]["loss_12"] != results[1]["eval"][0]["loss_12"]               # each saw its own images
    (terms, one), (_, two) = (r["train"] for r in results)
    parameters = {k for k in one if not k.endswith(("running_mean", "running_var"))}
    assert (math.isfinite(terms["loss"]) and one.keys() == two.keys()
            and all(torch.equal(one[k], two[k]) for k in parameters))
    assert not torch.equal(one["projector_k.bn1.running_mean"], two["projector_k.bn1.running_mean"])
    for whole, *halves in zip(batches(), *(r["batches"] for r in results), strict=True):
        assert whole["index"] == halves[0]["index"] + halves[1]["index"]
        for name in ("boxes1", "boxes", "corres", "ids1", "ids"):
            assert torch.equal(whole[name], torch.cat([h[name] for h in halves]))


# ==== Probe ========================================================================================================

class Looking(torch.nn.Module):
    """h = (which image, twice; left edge of the box): an image is one colour."""

    def maps(self, images, target):
        assert not target and not self.training
        self.seen = [*getattr(self, "seen", ()), images[:, 0, 0, 0].tolist()]
        return [images]

    def object_features(self, feature_map, boxes, target):
        images = feature_map[:, 0, 0, 0].round().long().repeat_interleave(boxes.shape[1])
        places = (boxes[..., 0] * 10).round().long().flatten()
        return torch.cat([2 * torch.nn.functional.one_hot(images, 30),
                          torch.nn.functional.one_hot(places, 11)], 1).float()


class Samples(dict):
    """Three images of one colour, three boxes each at .1, .2, .3; in image 1 the third is a copy of the first."""

    def __len__(self):
        return 3

    def __missing__(self, key):
        i = key[1]
        places = torch.tensor([[0.1, 0.2, 0.1 if i == 1 else 0.3]] * 2)
        boxes = torch.stack([places, places, places + 0.5, places + 0.5], 2)
        ids = (places * 10).round().long() + 10 * i
        return {"views": [torch.full((3, 8, 8), float(i))] * 3, "boxes1": boxes,
                "boxes": boxes, "ids1": ids, "ids": ids, "levels1": 0 * ids,
                "levels": 0 * ids, "corres": torch.zeros(2, 3, 3), "index": 20 + i, "skipped": []}


def test_probe_looks_for_the_box_in_the_other_views():
    looking = Looking(), Looking()
    own, other = (soco.find_objects(model, Samples(), 0, CPU, shuffled)
                  for model, shuffled in zip(looking, (False, True)))
    # V1 once, then V2 and V3
    assert looking[0].seen == [[0, 1, 2]] * 3 and looking[1].seen == [[1, 2, 0], [0, 1, 2], [0, 1, 2]]
    # the copy is asked for once
    assert [(row["index"], row["view"], row["box"]) for row in own] == [
        (20 + i, j, k) for j in (2, 3) for i in range(3) for k in range(2 if i == 1 else 3)]
    assert all(row["all"] and row["own"] and row["best"] == [row["index"] - 20, row["box"]] for row in own)
    assert soco.retrieval_metrics(own) == {"retrieval": 1.0, "view2": 1.0, "view3": 1.0, "own_image": 1.0}
    # asked with the next image's pixels: the box is found there; within the image, the place gives it away
    assert [(row["index"], row["box"]) for row in other] == [(row["index"], row["box"]) for row in own]
    assert not any(row["all"] for row in other) and all(row["own"] for row in other)
    rows = [{"view": j, "all": a, "own": o}
            for j, a, o in ((2, True, True), (2, False, True), (2, False, False), (3, True, True))]
    assert soco.retrieval_metrics(rows) == {"retrieval": 0.5, "view2": pytest.approx(1 / 3),
                                            "view3": 1.0, "own_image": 0.75}


def test_a_box_is_read_from_its_level():
    model = SimpleNamespace(object_features=lambda m, boxes, target: (boxes.flatten(0, 1) + m))
    maps, boxes = [torch.tensor(100.0 * level) for level in range(4)], torch.arange(24.0).view(2, 3, 4)
    levels = torch.tensor([[0, 3, 1], [2, 2, -1]])
    chosen = soco.select_level(model, maps, boxes, levels)
    assert (torch.equal(chosen[0], boxes[0] + torch.tensor([[0.0], [300], [100]]))
            and torch.equal(chosen[1, :2], boxes[1, :2] + 200))
    assert torch.equal(soco.select_level(model, maps[:1], boxes, levels), boxes)  # without FPN there is one map


def test_rows_of_the_probe(monkeypatch, tmp_path):
    def find(model, probe_set, num_workers, device, other=False, text=""):
        assert probe_set.separate and (model == "trained") == (text != "untrained")
        right = {"untrained": False, "shuffled": not other, "pretrained": True}[text]
        return [{"index": i, "view": j, "all": right, "own": right, "box": 0, "best": [i, 1]}
                for i in range(2) for j in (2, 3)]

    monkeypatch.setattr(soco, "find_objects", find)
    cfg = config(out=str(tmp_path), min_side=8)
    metrics = soco.probe(cfg, "trained", data.SyntheticScenes(2, 64), np.arange(2), CPU)
    assert metrics["primary"] == "retrieval" and metrics["pretrained"] == {"retrieval": 1, "view2": 1,
                                                                           "view3": 1, "own_image": 1}
    assert metrics["untrained"]["retrieval"] == metrics["shuffled"]["retrieval"] == 0
    assert Image.open(tmp_path / "predictions.png").width > 3 * 64


# ==== Whole runs ===================================================================================================

ROWS = {"untrained", "shuffled", "pretrained"}
RUN = {**TINY, "preset": "demo", "data": "synthetic", "synthetic_images": 12, "synthetic_size": 64, "probe_images": 4,
       "epochs": 2, "min_side": 8, "lr": 1.0, "lr_min": 1e-3, "ema_momentum": 0.99, "warmup_epochs": 0.5,
       "log_every": 1, "save_every": 2, "proposal_method": "selective_search", "cache_proposals": "true",
       "max_steps": 4}


def run_script(out, **values):
    return soco.main(flags({**RUN, "out": out, **values}))


@pytest.fixture
def straight(finished_run):
    return finished_run("soco")


def test_log_and_table(straight):
    out, metrics = straight
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in lines] == [(0, 0), (1, 0), (2, 0), (3, 1)]
    base = 1.0 * 4 / 256
    for line in lines:
        assert line.keys() == {"step", "epoch", "lr", "momentum", "loss", "loss_12", "loss_21", "loss_13", "loss_31",
                               "pairs", "grad_norm", "images_per_s", "memory_gib", "seconds"}
        assert (line["loss"]
                == pytest.approx(sum(line[f"loss_{k}"] for k in ("12", "21", "13", "31")), rel=1e-3, abs=1e-4))
        cfg = config(lr=1.0, batch_size=4, epochs=2, warmup_epochs=0.5, lr_min=1e-3)
        assert line["lr"] == pytest.approx(base * soco.lr_factor(cfg, line["step"], 3), rel=1e-4)
        assert line["momentum"] == pytest.approx(soco.momentum_at(line["step"], 0.99, 6), rel=1e-5)
    assert metrics.keys() == ROWS | {"steps", "primary"} and metrics["steps"] == 4 and metrics["primary"] == "retrieval"
    for row in ROWS:
        assert (metrics[row].keys() == {"retrieval", "view2", "view3", "own_image"}
                and all(0 <= v <= 1 for v in metrics[row].values()))
    assert Image.open(out / "predictions.png").height > 4 * 60
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["step"] == 4 and state["script"] == "soco" and state["config"]["num_boxes"] == 4
    assert {"encoder.conv1.weight", "neck.lateral_convs.0.conv.weight", "head.fc1.bias", "predictor.linear2.weight",
            "encoder_k.conv1.weight"} <= state["model"].keys()
    assert (out / "proposals").is_dir()


def test_its_encoder_is_a_backbone_for_others(straight):
    state = torch.load(straight[0] / "last.pt", weights_only=True)["model"]
    assert not torch.equal(state["encoder.conv1.weight"], state["encoder_k.conv1.weight"])
    for norm, layers in (("frozen", (2, 3, 4)), ("bn", (4,)), ("frozen", (3,))):
        backbone = common.Backbone("resnet18", layers, norm)
        convert.load_backbone(backbone.body, straight[0] / "last.pt")
        own = backbone.body.state_dict()
        assert own and all(torch.equal(value, state[f"encoder.{name}"])
                           for name, value in own.items() if not name.endswith("num_batches_tracked"))
    again = soco.build_model(config(backbone_weights=str(straight[0] / "last.pt")))
    assert torch.equal(again.encoder_k.layer4[1].conv2.weight, state["encoder.layer4.1.conv2.weight"])


def test_own_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        picture(i, (90, 64)).save(folder / f"{i}.png")
    metrics = run_script(tmp_path / "out", data=folder, max_steps=1, probe_images=3, pipeline="c4",
                         proposal_method="random", cache_proposals="false")
    assert (metrics.keys() == ROWS | {"steps", "primary"}
            and metrics["pretrained"].keys() == {"retrieval", "view2", "own_image"})
    assert not (tmp_path / "out" / "proposals").exists()
    quiet = run_script(tmp_path / "quiet", data=folder, max_steps=1, probe_images=0, star="true",
                       proposal_method="whole", num_boxes=1)
    assert quiet == {"steps": 1} and not (tmp_path / "quiet" / "predictions.png").exists()


WRONG = [
    (dict(accumulate=2), "--accumulate 2: SoCo's BatchNorm takes its statistics from the whole batch"),
    (dict(batch_size=1, num_boxes=1), "--batch_size 1 --num_boxes 1: one box per process, but BatchNorm needs two"),
    (dict(pipeline="c4", scale_aware="true"), "--pipeline c4 has neither FPN nor box head"),
    (dict(pipeline="c4", fpn="false"), "--pipeline c4 has neither FPN nor box head"),
    (dict(pipeline="c4", box_head="false"), "--pipeline c4 has neither FPN nor box head"),
    (dict(fpn="false"), "--scale_aware needs the levels of --fpn"),
    (dict(star="true", multi_view="false"), "--star is made of four views"),
    (dict(level_sizes=(14, 28, 55)), "--level_sizes 14 28 55: give four rising sizes"),
    (dict(level_sizes=(14, 55, 28, 64)), "--level_sizes 14 55 28 64: give four rising sizes"),
    (dict(image_size=96), "--level_sizes 14 28 55 64: a view of 96 pixels has boxes above the last"),
    (dict(pipeline="c4", star="true"), "--star is made of four views: add --multi_view"),
    (dict(batch_size=1), "--batch_size 1: one image per process"),
    (dict(crop_area=(0.5, 1.5)), "--crop_area 0.5 1.5: must be at least 0 and at most 1"),
    (dict(crop_area=(1, 0.5)), "--crop_area 1.0 0.5: give the smallest and the largest value"),
    (dict(size_range=(0.8, 0.3)), "--size_range 0.8 0.3: give"),
    (dict(size_range=(-0.1, 0.3)), "--size_range -0.1 0.3: must be at least 0"),
    (dict(small_size=31), "--small_size 31: must be at least 32"),
    (dict(ema_momentum=1.5), "--ema_momentum 1.5: must be at least 0 and at most 1"),
    (dict(crop_area=(0, 0)), "the largest share must be above 0"),
    (dict(jitter_prob=1.1), "--jitter_prob 1.1: must be at least 0 and at most 1"),
    (dict(jitter_ratio=0.5), "--jitter_ratio 0.5: must be below 0.5"),
    (dict(proposal_method="random", proposal_store="x"), "--proposal_method random uses no --proposal_store"),
    (dict(warmup_epochs=2), "--warmup_epochs 2: must be less than --epochs 2"),
    (dict(num_boxes=0), "--num_boxes 0: must be at least 1"),
]


@pytest.mark.parametrize("values, text", WRONG, ids=[" ".join(values) for values, _ in WRONG])
def test_bad_input_ends_in_one_line(fails, tmp_path, values, text):
    assert text in fails(soco.main, flags({**RUN, "max_steps": 1, "out": tmp_path / "out", **values}))
    assert not (tmp_path / "out").exists()                                # nothing was written until here


def test_stores_and_runs_of_others_are_refused(fails, straight, tmp_path):
    line = fails(soco.main, flags({**RUN, "synthetic_images": 13, "proposal_store": straight[0] / "proposals",
                                   "out": tmp_path / "out"}))
    assert "made from 12 images" in line and "this has 13" in line
    line = fails(soco.main,
                 flags({**RUN, "seed": 4, "proposal_store": straight[0] / "proposals", "out": tmp_path / "out"}))
    assert "another list of files" in line
    line = fails(soco.main, flags({**RUN, "proposal_store": tmp_path / "nowhere", "out": tmp_path / "out"}))
    assert "does not exist; build it with: python proposals.py" in line


@pytest.mark.parametrize("zero", (True, False))
def test_start_of_residual_branches(zero):
    """D14: with zero_init_residual every block begins as its shortcut; without it as torchvision's."""
    model = soco.build_model(parse("--arch", "resnet18", "--zero_init_residual", str(zero).lower()))
    block = model.encoder.layer2[1].train()
    x = torch.rand(2, 128, 6, 6)
    assert torch.equal(block(x), x) == zero
    assert all((b.bn2.weight == (0 if zero else 1)).all()
               for layer in (model.encoder.layer1, model.encoder.layer4) for b in layer)
