"""dupr.py: its views, patches, losses and queues by hand, its step on one and two processes,
and whole runs on drawn images."""
import copy
import functools
import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import flags
from fill import fill
from PIL import Image
from test_detreg import same_step
from torch import nn

import common
import convert
import data
import dupr
import evaluation
import run

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(arch="resnet18", image_size=64, roi_sizes=(16, 8, 4, 2), embedding_dim=16, queue_size=40,
            queued_patches=2, num_workers=0, seed=3)
NO_COLOURS = {"order": [], "gray": False, "blur": None, "solarize": False}
WHOLE = [0.0, 0.0, 64.0, 64.0]


def tensor(name, *shape):
    return torch.from_numpy(fill(f"input:{name}", shape))


def unit(name, *shape):
    return F.normalize(tensor(name, *shape), dim=1)


def config(**values):
    return dupr.Config(**{**TINY, **values})


# ==== Views ========================================================================================================

def test_overlap_by_hand():
    first, second = (0, 0, 100, 100), (50, 20, 150, 120)                  # overlap 50..100 x 20..100
    one, two = (32.0, 12.8, 64.0, 64.0), (0.0, 0.0, 32.0, 51.2)
    flipped = {one: (0.0, 12.8, 32.0, 64.0), two: (32.0, 0.0, 64.0, 51.2)}
    for flip_one in (False, True):
        for flip_two in (False, True):
            boxes, valid = dupr.overlap_boxes([first, second], [flip_one, flip_two], 64)
            assert valid is True and boxes.dtype == torch.float32
            np.testing.assert_allclose(boxes, [flipped[one] if flip_one else one, flipped[two] if flip_two else two],
                                       atol=1e-5)
    # each side has its own scale
    boxes, _ = dupr.overlap_boxes([(10, 20, 50, 40), (30, 30, 40, 110)], [False, True], 80)
    np.testing.assert_allclose(boxes, [(40, 40, 60, 80), (0, 0, 80, 10)], atol=1e-5)
    for flips in ([False, False], [True, False], [True, True]):           # identical crops: the whole views
        boxes, valid = dupr.overlap_boxes([second, second], flips, 64)
        assert valid and boxes.tolist() == [WHOLE, WHOLE]


def test_views_without_an_overlap_are_whole_and_invalid():
    # touching; apart
    for second in ((10, 0, 20, 10), (0, 10, 10, 20), (10, 10, 20, 20), (40, 0, 50, 10), (15, 15, 20, 20)):
        for flips in ([False, False], [False, True]):
            boxes, valid = dupr.overlap_boxes([(0, 0, 10, 10), second], flips, 64, min_overlap=0.0)
            assert valid is False and boxes.tolist() == [WHOLE, WHOLE]


def test_a_sliver_is_no_overlap():
    wide, narrow = (0, 0, 100, 100), (99, 0, 119, 100)  # 1 px of each: 0.64 px of view 1, 3.2 px of view 2
    for crops, flips in (([wide, narrow], [False, True]), ([narrow, wide], [True, False])):
        boxes, valid = dupr.overlap_boxes(crops, flips, 64)
        assert not valid and boxes.tolist() == [WHOLE, WHOLE]
        assert not dupr.overlap_boxes(crops, flips, 64, min_overlap=0.65)[1]
        boxes, valid = dupr.overlap_boxes(crops, flips, 64, min_overlap=0.63)
        assert valid and sorted((boxes[:, 2] - boxes[:, 0]).tolist()) == pytest.approx([0.64, 3.2], abs=1e-4)
    assert not dupr.overlap_boxes([(0, 0, 100, 100), (0, 99, 100, 119)], [False, False], 64)[1]         # the other axis
    assert dupr.overlap_boxes([wide, wide], [False, False], 64, min_overlap=64)[1]


@pytest.mark.parametrize("flips", ((False, False), (True, False), (False, True), (True, True)))
def test_patches_are_where_the_views_show_them(flips):
    """Cells of own colours are painted into the overlap; each patch of each view shows its cell,
    and no pixel outside of the overlap is coloured."""
    crops, n, size = [(20, 30, 180, 150), (100, 66, 260, 170)], 4, 192
    left, top, right, bottom = 100, 66, 180, 150                          # their overlap: cells of 20 x 21 px
    pixels = np.full((200, 300, 3), 128, np.uint8)
    colours = np.array([[250 if i & bit else 10 for bit in (1, 2, 4)] for i in (0, 3, 5, 6)] * n, np.uint8)
    colours[:, 2] = np.linspace(0, 255, n * n).round()
    for k, colour in enumerate(colours):
        y, x = top + k // n * 21, left + k % n * 20
        pixels[y:y + 21, x:x + 20] = colour
    image = Image.fromarray(pixels)
    boxes, valid = dupr.overlap_boxes(crops, list(flips), size)
    assert valid and (right, bottom) == (left + n * 20, top + n * 21)
    for crop, flip, box in zip(crops, flips, boxes):
        view = np.asarray(evaluation.to_image(dupr.apply_view(image, {"crop": crop, "colours": NO_COLOURS,
                                                                      "flip": flip}, size)), np.int64)
        cells = dupr.patch_boxes(box, flip, n)
        assert cells.shape == (n * n, 4)
        for cell, colour in zip(cells.tolist(), colours.tolist()):
            x1, y1, x2, y2 = (round(v + 3 * s) for v, s in zip(cell, (1, 1, -1, -1)))  # resampling mixes neighbours
            assert x2 - x1 > 8 and y2 - y1 > 8 and np.abs(view[y1:y2, x1:x2] - colour).max() <= 2
        inside = np.zeros((size, size), bool)
        x1, y1, x2, y2 = box.tolist()
        inside[max(0, round(y1 - 3)):round(y2 + 3), max(0, round(x1 - 3)):round(x2 + 3)] = True
        assert np.abs(view[~inside] - 128).max() <= 1 and (~inside).any()


class Ramps:
    """Pairs of views whose features are where they come from: at stride 16 (14 x 14 cells),
    maps of (x, y, 100) of the image.

    An overlap of a few pixels lies within the half cell at a map's border that RoIAlign cannot see beyond: its patches
    are off by many of their own widths (90 for a sliver of 1 px).
    One pair in 100 is narrower than 16 px and left out here.
    """

    def __init__(self, pairs=300, size=224, hw=(375, 500), min_overlap=16):
        rng, cells = np.random.default_rng(0), (torch.arange(size // 16) + 0.5) * 16 / size
        maps, boxes, flips, centres, sides = [], [], [], [], []
        while len(maps) < pairs:
            crops = [data.draw_crop(rng, hw, (0.2, 1.0)) for _ in range(2)]
            flip = (rng.random(2) < 0.5).tolist()
            box, valid = dupr.overlap_boxes(crops, flip, size, min_overlap)
            if not valid:
                continue
            views = []
            for (x1, y1, x2, y2), f in zip(crops, flip):
                x, y = x1 + (x2 - x1) * (cells.flip(0) if f else cells), y1 + (y2 - y1) * cells
                views.append(torch.stack([x.expand(14, 14), y[:, None].expand(14, 14), torch.full((14, 14), 100.0)]))
            low, high = np.maximum(crops[0][:2], crops[1][:2]), np.minimum(crops[0][2:], crops[1][2:])
            for kept, value in ((maps, torch.stack(views)), (boxes, box), (flips, torch.tensor(flip)),
                                (centres, torch.tensor(low)), (sides, torch.tensor(high - low))):
                kept.append(value)
        self.maps, self.boxes, self.flips, self.low, self.sides = (torch.stack(v)
                                                                   for v in (maps, boxes, flips, centres, sides))

    def errors(self):
        """{level: (distance of corresponding patches, distance of view 1's patches to where they
        should be), patches, [pairs]}."""
        body = nn.Sequential(OrderedDict(layer3=nn.Identity(), layer4=nn.AvgPool2d(2)))  # the mean of a ramp is a ramp
        weights = [{"conv4": w, "conv5": w} for w in (0.0, 1.0)]
        encoder = dupr.Encoder(body, {"layer3": ("conv4", 3, 16), "layer4": ("conv5", 3, 32)}, *weights,
                               {"conv4": 14, "conv5": 7}, 3)
        for level in encoder.patch_heads:
            encoder.patch_heads[level] = nn.Identity()
        found = {}
        for (kind, q), k in zip((made := dupr.DUPR(encoder, 4, 3)(self.maps, self.boxes, self.flips))[0].items(),
                                made[1].values()):
            places = [e[:, :2] / e[:, 2:] * 100 for e in (q, k)]          # undoes the normalisation
            n = q.shape[-1]
            patch = (self.sides / n)[:, :, None, None]
            index = torch.stack([torch.arange(n).expand(n, n), torch.arange(n)[:, None].expand(n, n)])
            centres = self.low[:, :, None, None] + (index + 0.5) * patch
            found[kind] = [((places[0] - other) / patch).norm(dim=1).mean((1, 2)) for other in (places[1], centres)]
        return found


def test_patches_of_both_views_are_the_same_place(monkeypatch):
    ramps = Ramps()
    differ = ramps.flips[:, 0] != ramps.flips[:, 1]
    assert 120 < differ.sum() < 180
    for kind, errors in ramps.errors().items():
        for error in errors:
            assert error.mean() < 0.1 and error[differ].mean() < 0.1, kind
    with monkeypatch.context() as patch:
        patch.setattr(dupr, "mirror_patches", lambda embeddings, flips: embeddings)
        for error, _ in ramps.errors().values():  # without the mirror: only pairs flipped alike meet
            assert error[~differ].mean() < 0.1 and error[differ].mean() > 2
    with monkeypatch.context() as patch:
        patch.setattr(dupr, "roi_align", lambda *args, **values: torch_roi_align(*args, **{**values, "aligned": False}))
        for error, _ in ramps.errors().values():
            assert error.mean() > 0.2 and error[differ].mean() > 0.4


torch_roi_align = dupr.roi_align


# ==== Samples ======================================================================================================

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


def samples_of(folder, indices=None, **values):
    source = data.open_images(str(folder), None)
    return dupr.TwoCropsDataset(config(data=str(folder), **values), source,
                                np.arange(len(source)) if indices is None else np.array(indices))


def equal(a, b):
    return (all(torch.equal(a[k], b[k]) for k in ("views", "boxes", "flips"))
            and (a["valid"], a["index"]) == (b["valid"], b["index"]))


def test_samples_are_a_function_of_seed_epoch_and_index(folder):
    dataset = samples_of(folder, [3, 1, 0, 2])
    for key in ((0, 0), (0, 3), (7, 1)):
        sample = dataset[key]
        assert (equal(sample, samples_of(folder, [3, 1, 0, 2])[key]) and sample["index"] == [3, 1, 0, 2][key[1]]
                and sample["skipped"] == [])
        assert not torch.equal(sample["views"], dataset[key[0] + 1, key[1]]["views"])
        assert not torch.equal(sample["views"], samples_of(folder, [3, 1, 0, 2], seed=4)[key]["views"])
        assert (sample["views"].shape == (2, 3, 64, 64) and sample["boxes"].shape == (2, 4)
                and not torch.equal(*sample["views"]))
        assert (sample["boxes"] >= -1e-4).all() and (sample["boxes"] <= 64 + 1e-4).all()
    here, there = ([batch for batch in data.make_loader(dataset, data.StepSampler(4, 2, 2, seed=3), num_workers=workers,
                                                        collate=dupr.collate)] for workers in (0, 1))
    for one, two in zip(here, there, strict=True):
        assert one["index"] == two["index"] and all(torch.equal(one[k], two[k])
                                                    for k in ("views", "boxes", "flips", "valid"))


def test_layout_of_a_batch(folder):
    dataset = samples_of(folder)
    batch = dupr.collate(samples := [dataset[0, i] for i in range(3)])
    assert batch["views"].shape == (3, 2, 3, 64, 64) and batch["boxes"].shape == (3, 2, 4)
    assert (batch["flips"].shape == (3, 2) and batch["valid"].shape == (3,)
            and batch["flips"].dtype == batch["valid"].dtype == torch.bool)
    assert batch["index"] == [0, 1, 2] and batch["skipped"] == []
    for i, sample in enumerate(samples):
        assert (all(torch.equal(batch[k][i], sample[k]) for k in ("views", "boxes", "flips"))
                and batch["valid"][i] == sample["valid"])


def test_a_sample_is_its_draws(folder):
    """Crop, resize, colours, flip, in this order, and boxes of the very crops and flips."""
    dataset = samples_of(folder)
    for key in ((0, 0), (1, 2), (2, 3), (3, 3)):
        sample, image, rng = dataset[key], picture(key[1], (90 - 7 * key[1], 60 + 5 * key[1])), data.sample_rng(3, *key)
        draws = [dupr.draw_view(rng, (image.height, image.width), (0.2, 1.0), dataset.photometric) for _ in range(2)]
        assert draws[0] != draws[1] and sample["flips"].tolist() == [d["flip"] for d in draws]
        boxes, valid = dupr.overlap_boxes([d["crop"] for d in draws], [d["flip"] for d in draws], 64)
        assert torch.equal(sample["boxes"], boxes) and sample["valid"] == valid
        for view, draw in zip(sample["views"], draws):
            small = (image.resize((64, 64), Image.Resampling.BILINEAR, box=draw["crop"])
                     if draw["crop"] == (0, 0, *image.size) else (
                         image.crop(draw["crop"]).resize((64, 64), Image.Resampling.BILINEAR)))
            expected = data.to_normalized_tensor(data.apply_photometric(small, draw["colours"]))
            assert torch.equal(view, expected.flip(-1) if draw["flip"] else expected)


def test_share_of_flips_colours_and_area():
    rng, spec = np.random.default_rng(0), samples_of_nothing().photometric
    draws = [dupr.draw_view(rng, (300, 400), (0.2, 1.0), spec) for _ in range(3000)]
    for share, p in ((np.mean([d["flip"] for d in draws]), 0.5),
                     (np.mean([len(d["colours"]["order"]) == 4 for d in draws]), 0.8),
                     (np.mean([d["colours"]["gray"] for d in draws]), 0.2),
                     (np.mean([d["colours"]["blur"] is not None for d in draws]), 0.5)):
        assert share == pytest.approx(p, abs=0.03)
    # 24 orders, or none
    assert not any(d["colours"]["solarize"] for d in draws) and len({tuple(d["colours"]["order"]) for d in draws}) == 25
    shares = np.array([(x2 - x1) * (y2 - y1) / 120000 for x1, y1, x2, y2 in (d["crop"] for d in draws)])
    assert 0.19 < shares.min() < 0.22 and 0.95 < shares.max() <= 1 and shares.mean() == pytest.approx(0.49, abs=0.03)
    flips = np.array([d["flip"] for d in draws]).reshape(-1, 2)
    assert (flips[:, 0] != flips[:, 1]).mean() == pytest.approx(0.5, abs=0.05)                # independent


def samples_of_nothing():
    return dupr.TwoCropsDataset(config(), None, np.arange(0))


def test_grey_and_tiny_images(folder):
    Image.new("L", (40, 30), 77).save(folder / "4.png")
    for name, size in (("5", (1, 1)), ("6", (8, 300)), ("7", (300, 8)), ("8", (2, 1))):
        picture(5, size).save(folder / f"{name}.png")
    dataset = samples_of(folder)
    valid = []
    for epoch in range(6):
        for position in range(4, 9):
            sample = dataset[epoch, position]
            assert sample["index"] == position and sample["skipped"] == [] and sample["views"].shape == (2, 3, 64, 64)
            assert sample["views"].isfinite().all() and sample["boxes"].isfinite().all()
            assert (sample["boxes"][:, 2:] > sample["boxes"][:, :2]).all()
            valid.append((position, sample["valid"]))
    assert (5, True) in valid and (5, False) not in valid and (6, True) in valid
    images = [dataset[epoch, 4]["views"] for epoch in range(6)]
    assert all(len(set(view.mean((1, 2)).mul(1e3).round().tolist())) for pair in images for view in pair)


# ==== Encoder and heads ============================================================================================

def test_levels_without_a_weight_have_no_head_and_no_queue():
    for alpha, beta, images, patches, stages in (
            ((0.1, 0.4, 0.7, 1), (0, 0, 1, 1), ["conv2", "conv3", "conv4", "conv5"], ["conv4", "conv5"], 4),
            ((0, 0, 0, 1), (0, 0, 0, 0), ["conv5"], [], 4), ((0, 0, 0, 0), (0, 0, 0, 1), [], ["conv5"], 4),
            ((0, 1, 0, 0), (1, 0, 0, 0), ["conv3"], ["conv2"], 2), ((0, 0, 1, 0), (0, 0, 0, 0), ["conv4"], [], 3)):
        model = dupr.build_model(config(alpha=alpha, beta=beta))
        encoder = model.encoder_q
        assert list(encoder.image_heads) == images and list(encoder.patch_heads) == patches
        kinds = {f"image_{level}" for level in images} | {f"patch_{level}" for level in patches}
        assert model.queues.keys() == kinds
        assert ([name for name in encoder.stages if name.startswith("layer")]
                == [f"layer{i}" for i in range(1, stages + 1)])
        with torch.no_grad():
            embeddings = encoder(tensor("images", 2, 3, 64, 64), torch.tensor([WHOLE] * 2))
        assert list(embeddings) == [f"image_{level}" for level in images] + [f"patch_{level}" for level in patches]
        for e in embeddings.values():
            assert e.shape[:2] == (2, 16) and torch.allclose(e.norm(dim=1), torch.ones(()), atol=1e-5)
        assert all(embeddings[f"patch_{level}"].shape[2:] == (n, n)
                   for level, n in zip(("conv2", "conv3", "conv4", "conv5"), (16, 8, 4, 2)) if level in patches)


def test_heads():
    encoder = dupr.build_model(config(beta=(0, 0, 0, 1))).encoder_q
    assert [tuple(p.shape) for p in encoder.image_heads["conv3"].parameters()] == [(128, 128), (128,), (16, 128), (16,)]
    assert ([tuple(p.shape) for p in encoder.patch_heads["conv5"].parameters()]
            == [(512, 512, 1, 1), (512,), (16, 512, 1, 1), (16,)])
    body = nn.Sequential(OrderedDict(layer4=nn.Identity()))
    one = dupr.Encoder(body, {"layer4": ("conv5", 8, 32)}, {"conv5": 1.0}, {"conv5": 0.0}, {}, 4, mlp=False)  # MoCo v1
    assert [tuple(p.shape) for p in one.image_heads["conv5"].parameters()] == [(4, 8), (4,)]
    images = tensor("maps", 2, 8, 3, 3)
    hand = images.mean((2, 3)) @ one.image_heads["conv5"][0].weight.T + one.image_heads["conv5"][0].bias
    torch.testing.assert_close(one(images, torch.zeros(2, 4))["image_conv5"], hand / hand.norm(dim=1, keepdim=True))


# ==== Queue ========================================================================================================

def test_queue():
    torch.manual_seed(0)
    queue = dupr.Queue(3, 5)
    torch.testing.assert_close(queue.keys.norm(dim=0), torch.ones(5))
    assert queue.keys.shape == (3, 5) and queue.ptr.tolist() == [0] and not list(queue.parameters())
    start = queue.keys.clone()
    rows = torch.arange(60.0).view(20, 3)
    queue.enqueue(rows[:3])
    assert torch.equal(queue.keys, torch.cat([rows[:3].T, start[:, 3:]], 1)) and queue.ptr.tolist() == [3]
    queue.enqueue(rows[3:7])                                              # wraps around
    assert torch.equal(queue.keys, rows[[5, 6, 2, 3, 4]].T) and queue.ptr.tolist() == [2]
    queue.enqueue(rows[7:20])  # more keys than slots: the last 5 stay, where one by one would put them
    one_by_one = dupr.Queue(3, 5)
    for row in rows:
        one_by_one.enqueue(row[None])
    assert torch.equal(queue.keys, one_by_one.keys) and queue.ptr.tolist() == one_by_one.ptr.tolist() == [0]
    queue.enqueue(rows[:5])
    assert torch.equal(queue.keys, rows[:5].T) and queue.ptr.tolist() == [0]


def identity_model(alpha=0.0, beta=1.0, n=3, dim=4, queue_size=7, stride=1):
    """Images are maps are embeddings: nothing is learnt."""
    encoder = dupr.Encoder(nn.Sequential(OrderedDict(layer4=nn.Identity())), {"layer4": ("conv5", dim, stride)},
                           {"conv5": alpha}, {"conv5": beta}, {"conv5": n}, dim)
    for heads in (encoder.image_heads, encoder.patch_heads):
        for level in heads:
            heads[level] = nn.Identity()
    return dupr.DUPR(encoder, queue_size, dim)


def test_the_given_patches_enter_the_queues():
    model = identity_model(alpha=1.0, queue_size=9)
    keys = {"image_conv5": tensor("image", 2, 4), "patch_conv5": tensor("patch", 2, 4, 3, 3)}
    positions = torch.tensor([[0, 5, 7], [8, 3, 1]])
    before = model.queues["patch_conv5"].keys.clone()
    model.enqueue(keys, {"patch_conv5": positions})
    # p = i * S + j
    wanted = [keys["patch_conv5"][b, :, p // 3, p % 3] for b in range(2) for p in positions[b].tolist()]
    assert torch.equal(model.queues["patch_conv5"].keys, torch.cat([torch.stack(wanted, 1), before[:, 6:]], 1))
    assert torch.equal(model.queues["image_conv5"].keys[:, :2], keys["image_conv5"].T)
    assert (model.queues["patch_conv5"].ptr, model.queues["image_conv5"].ptr) == (6, 2)


def test_positions_are_distinct_and_uniform():
    keys = {"image_conv5": torch.zeros(3, 4), "patch_conv4": torch.zeros(2000, 4, 4, 4),
            "patch_conv5": torch.zeros(50, 4, 2, 2)}
    torch.manual_seed(0)
    drawn = dupr.draw_positions(keys, 3)
    assert (drawn.keys() == {"patch_conv4", "patch_conv5"} and drawn["patch_conv4"].shape == (2000, 3)
            and drawn["patch_conv5"].shape == (50, 3))
    for positions, n in ((drawn["patch_conv4"], 16), (drawn["patch_conv5"], 4)):
        assert (all(len(set(row)) == 3 for row in positions.tolist())
                and set(positions.flatten().tolist()) == set(range(n)))
    counts = torch.bincount(drawn["patch_conv4"].flatten(), minlength=16) / 6000
    assert (counts - 1 / 16).abs().max() < 4 * (1 / 16 / 6000) ** 0.5
    first = torch.bincount(drawn["patch_conv4"][:, 0], minlength=16) / 2000
    assert (first - 1 / 16).abs().max() < 4 * (1 / 16 / 2000) ** 0.5
    run.seed_step(3, 5)                                                # a function of the step's seed
    one = dupr.draw_positions(keys, 3)
    run.seed_step(3, 5)
    assert all(torch.equal(a, b) for a, b in zip(one.values(), dupr.draw_positions(keys, 3).values()))
    everything = dupr.draw_positions({"patch_conv5": torch.zeros(5, 4, 2, 2)}, 9)["patch_conv5"]
    assert all(sorted(row) == [0, 1, 2, 3] for row in everything.tolist())


def test_permutation_of_a_step():
    drawn = [dupr.draw_permutation(3, step, 12) for step in range(4)]
    assert all(sorted(p.tolist()) == list(range(12)) for p in drawn) and len({tuple(p.tolist()) for p in drawn}) == 4
    assert (torch.equal(drawn[2], dupr.draw_permutation(3, 2, 12))
            and not torch.equal(drawn[2], dupr.draw_permutation(4, 2, 12)))


# ==== Losses =======================================================================================================

def cross_entropy(query, key, queue, temperature):
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long), reduction="none")


@pytest.mark.parametrize("rows", (1, 4, 9, 10, 11))
def test_info_nce_is_cross_entropy_in_pieces_too(rows):
    query, key, queue = unit("query", 10, 6).requires_grad_(), unit("key", 10, 6), unit("queue", 6, 33).T.contiguous().T
    queue = F.normalize(queue, dim=0)
    weights = tensor("weights", 10)
    results = []
    for losses in (cross_entropy(query, key, queue, 0.2), dupr.info_nce(query, key, queue, 0.2, rows),
                   dupr.info_nce(query, key, queue, 0.2)):
        results.append((losses.detach(), torch.autograd.grad((losses * weights).sum(), query)[0]))
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(dupr.info_nce(query, key, queue, 0.2, rows), results[0][0], atol=1e-6, rtol=1e-6)
    with torch.no_grad():  # no overflow, and a right answer costs nothing
        assert dupr.info_nce(query, query, torch.zeros(6, 4), 1e-3, rows).max() == 0
        assert dupr.info_nce(query, -query, query.T, 1e-3, rows) == pytest.approx(2000, rel=1e-4)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes, backward included."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_info_nce_never_holds_all_logits():
    n, K, rows, dim = 300, 400, 32, 8
    query, key, queue = (unit("many", n, dim).requires_grad_(), unit("keys", n, dim),
                         F.normalize(tensor("bank", dim, K), dim=0))
    saved = []
    for piece, bound in ((rows, rows * K), (n, n * K)):
        kept = []
        with (Largest() as largest,
              torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t)):
            dupr.info_nce(query, key, queue, 0.2, piece).mean().backward()
        assert largest.numel == bound
        saved.append(sum(kept))
    assert saved[0] < n * K / 4 < saved[1]                                # kept for the gradient: no logits, or all


def loss_case(cfg, B=3):
    queries, keys, queues = {}, {}, {}
    for level, alpha, beta, n in zip(dupr.LEVELS, cfg.alpha, cfg.beta, cfg.roi_sizes):
        for kind, weight, shape in ((f"image_{level}", alpha, ()), (f"patch_{level}", beta, (n, n))):
            if weight:
                queries[kind], keys[kind] = (unit(f"{kind}{side}", B, 16, *shape) for side in "qk")
                queues[kind] = dupr.Queue(16, 40)
                queues[kind].keys.copy_(F.normalize(tensor(f"{kind}queue", 16, 40), dim=0))
    return queries, keys, queues


def log_sum_exp_by_hand(query, key, queue, t):
    """-log(e^(q.k/t) / (e^(q.k/t) + sum e^(q.n/t))), one query at a time in float64."""
    query, key, queue = (x.numpy().astype(np.float64) for x in (query, key, queue))
    positive = np.exp(query @ key / t)
    return -np.log(positive / (positive + np.exp(query @ queue / t).sum()))


@pytest.mark.parametrize("valid", ((True, True, True), (True, False, True), (False, True, False)))
def test_loss_by_hand(valid):
    cfg = config(alpha=(0.1, 0, 0.7, 2.0), beta=(0, 0.3, 0, 1.5), roi_sizes=(4, 3, 2, 2), temperature=0.3)
    queries, keys, queues = loss_case(cfg)
    count, total = sum(valid), 0.0
    expected = {}
    for level, alpha, beta, n in zip(dupr.LEVELS, cfg.alpha, cfg.beta, cfg.roi_sizes):
        if alpha:
            kind = f"image_{level}"
            expected[kind] = np.mean([log_sum_exp_by_hand(queries[kind][b], keys[kind][b], queues[kind].keys, 0.3)
                                      for b in range(3)])
            total += alpha * expected[kind]
        if beta:
            kind = f"patch_{level}"
            expected[kind] = np.mean([log_sum_exp_by_hand(queries[kind][b, :, i, j],
                                                          keys[kind][b, :, i, j], queues[kind].keys, 0.3)
                                      for b in range(3) if valid[b] for i in range(n) for j in range(n)])
            total += beta * expected[kind]
    loss, terms = dupr.dupr_loss(cfg, queries, keys, queues, torch.tensor(valid), count)
    assert ({k: v.item() for k, v in terms.items()} == pytest.approx(expected, rel=1e-5)
            and loss.item() == pytest.approx(total, rel=1e-5))
    summed, sums = dupr.dupr_loss(config(**{**vars(cfg), "patch_reduction": "sum"}), queries, keys, queues,
                                  torch.tensor(valid), count)
    for kind, value in terms.items():                                     # Eq. (5) as printed: S * S times as much
        n = {"patch_conv3": 9, "patch_conv5": 4}.get(kind, 1)
        assert sums[kind].item() == pytest.approx(n * value.item(), rel=1e-5)
    assert summed.item() > loss.item()
    # as on each of two processes
    halves = dupr.dupr_loss(cfg, queries, keys, queues, torch.tensor(valid), count / 2)[1]
    assert (halves["patch_conv5"].item() == pytest.approx(2 * terms["patch_conv5"].item())
            and halves["image_conv5"] == terms["image_conv5"])


def test_image_only_is_moco_v2_and_patches_only():
    cfg = config(alpha=(0, 0, 0, 1), beta=(0, 0, 0, 0))
    queries, keys, queues = loss_case(cfg)
    loss, terms = dupr.dupr_loss(cfg, queries, keys, queues, torch.tensor([True, False, False]), 1.0)
    moco = cross_entropy(queries["image_conv5"], keys["image_conv5"], queues["image_conv5"].keys, 0.2).mean()
    assert (terms.keys() == {"image_conv5"} and loss == terms["image_conv5"]
            and loss.item() == pytest.approx(moco.item(), rel=1e-6))
    cfg = config(alpha=(0, 0, 0, 0), beta=(0, 0, 0, 1))
    loss, terms = dupr.dupr_loss(cfg, *loss_case(cfg), torch.tensor([True, True, True]), 3.0)
    assert terms.keys() == {"patch_conv5"} and loss == terms["patch_conv5"] > 0


def test_first_losses_are_those_of_a_guess():
    cfg = config(alpha=(1, 1, 1, 1), beta=(1, 1, 1, 1), queue_size=1024, embedding_dim=64)
    model = dupr.build_model(cfg)
    with torch.no_grad():
        queries, keys = model(*(batch_case()[k] for k in ("views", "boxes", "flips")))
    _, terms = dupr.dupr_loss(cfg, queries, keys, model.queues, torch.ones(4, dtype=torch.bool), 4.0)
    assert len(terms) == 8  # a random key is as far as the queue's random ones, or nearer
    assert all(0 < v < np.log(1025) + 1 for v in terms.values())


# ==== Step =========================================================================================================

def batch_case(B=4, size=64, valid=None):
    """Different boxes and flips for every view."""
    corners = tensor("corners", B, 2, 4).sigmoid()
    boxes = torch.stack([corners[..., 0] * 20, corners[..., 1] * 20, 30 + corners[..., 2] * 34,
                         30 + corners[..., 3] * 34], -1) * size / 64
    flips = torch.tensor([[False, True], [True, True], [True, False], [False, False]]).repeat(B // 4, 1)
    return {"views": tensor("views", B, 2, 3, size, size), "boxes": boxes, "flips": flips,
            "valid": torch.ones(B, dtype=torch.bool) if valid is None else torch.tensor(valid), "index": list(range(B))}


ALL_LEVELS = {"alpha": (0, 0, 0.7, 1), "beta": (0, 0, 1, 1)}


def small_model(cfg):
    """Three convolutions with a loss on the last two: a step takes milliseconds."""
    def stage(width, wider, stride):
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(width, wider, 3, stride, 1, bias=False),
                                         bn=nn.BatchNorm2d(wider), relu=nn.ReLU()))

    torch.manual_seed(cfg.seed)
    body = nn.Sequential(OrderedDict(layer1=stage(3, 8, 4), layer3=stage(8, 12, 4), layer4=stage(12, 16, 2)))
    per_level = (dict(zip(dupr.LEVELS, values)) for values in (cfg.alpha, cfg.beta, cfg.roi_sizes))
    return dupr.DUPR(dupr.Encoder(body, {"layer3": ("conv4", 12, 16), "layer4": ("conv5", 16, 32)}, *per_level, 16),
                     cfg.queue_size, 16)


sgd = dupr.build_optimizer


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def test_invalid_pairs_have_no_patch_loss_but_zero_gradients():
    cfg = config(**ALL_LEVELS)
    gradients, losses = [], []
    for valid in ((True, True, False, True), (True, True, True, True), (False,) * 4):
        model = small_model(cfg).eval()
        run.seed_step(3, 0)
        losses.append(dupr.train_step(cfg, model, sgd(cfg, model), [batch_case(valid=valid)], 0, CPU))
        gradients.append({n: p.grad for n, p in model.encoder_q.named_parameters()})
        assert not [n for n, g in gradients[-1].items() if g is None]
        # keys enter all the same: the queue moves alike everywhere (D5)
        assert int(model.queues["patch_conv5"].ptr) == 4 * 2
    none = losses[2]
    assert (none["patch_conv4"] == none["patch_conv5"] == 0 and none["no_overlap"] == 1
            and losses[0]["no_overlap"] == 0.25)
    assert all(losses[i][f"image_{level}"] == none[f"image_{level}"] for i in (0, 1) for level in ("conv4", "conv5"))
    for name, gradient in gradients[2].items():
        assert gradient.any() != name.startswith("patch_heads"), name
    assert all(g.any() for n, g in gradients[0].items() if n.startswith("patch_heads"))
    assert losses[0]["patch_conv5"] != losses[1]["patch_conv5"]


def test_what_lies_in_an_invalid_pair_does_not_matter():
    cfg, results = config(alpha=(0, 0, 0, 0)), []
    for noise in (0.0, 1.0):
        model, batch = small_model(cfg).eval(), batch_case(valid=(True, False, True, True))
        batch["views"][1] += noise
        terms = dupr.train_step(cfg, model, sgd(cfg, model), [batch], 0, CPU)
        results.append(({k: v.item() for k, v in terms.items()},
                        {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    same_step(results[1:], results[0])


def test_key_encoder_is_a_moving_average_of_parameters():
    cfg = config(ema_momentum=0.75, lr=0.0)
    model = dupr.build_model(cfg).train()
    assert all(torch.equal(v, model.encoder_k.state_dict()[k]) for k, v in model.encoder_q.state_dict().items())
    with torch.no_grad():
        for p in model.encoder_k.parameters():
            p.add_(0.5)
        for buffer in model.encoder_k.buffers():
            buffer.add_(3)
    q, k = snapshot(model.encoder_q), snapshot(model.encoder_k)
    model.update_key_encoder(0.75)
    parameters = {n for n, _ in model.encoder_q.named_parameters()}
    assert ("image_heads.conv2.0.weight" in parameters and "patch_heads.conv5.2.bias" in parameters
            and "bn1.weight" in parameters)
    for name, value in model.encoder_k.state_dict().items():
        if name in parameters:
            torch.testing.assert_close(value, 0.75 * k[name] + 0.25 * q[name], atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(value, k[name]), name  # BatchNorm statistics are the key encoder's own
    assert all(torch.equal(v, q[n]) for n, v in model.encoder_q.state_dict().items())
    for momentum, other in ((1.0, snapshot(model.encoder_k)), (0.0, q)):
        model.update_key_encoder(momentum)
        assert all(torch.equal(p, other[n]) for n, p in model.encoder_k.named_parameters())
    dupr.train_step(cfg, model, sgd(cfg, model), [batch_case()], 0, CPU)
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert all(p.grad is not None and p.requires_grad for p in model.encoder_q.parameters())
    assert model.encoder_q.bn1.num_batches_tracked == 1 and model.encoder_k.bn1.num_batches_tracked == 4
    assert not torch.equal(model.encoder_q.bn1.running_mean, model.encoder_k.bn1.running_mean - 2.7)


def test_order_of_a_step(monkeypatch):
    cfg = config(ema_momentum=0.5)
    model = dupr.build_model(cfg).train()
    with torch.no_grad():
        for p in model.encoder_k.parameters():
            p.mul_(1.1)
    optimizer, seen, events = sgd(cfg, model), {}, []

    def watch(owner, name, event, before=lambda *args: None):
        inner = getattr(owner, name)

        def wrapped(*args, **values):
            events.append(event)
            before(*args)
            return inner(*args, **values)
        monkeypatch.setattr(owner, name, wrapped)

    watch(model, "update_key_encoder", "ema")
    watch(model, "encode_keys", "keys", lambda *args: seen.update(k=snapshot(model.encoder_k)))
    watch(dupr, "dupr_loss", "loss",
          lambda cfg, q, k, queues, *rest: seen.update(queries=q, keys=k, queues=snapshot(queues)))
    watch(torch.Tensor, "backward", "backward")
    watch(model, "enqueue", "enqueue", lambda keys, positions: seen.update(enqueued=keys, positions=positions))
    watch(optimizer, "step", "sgd")
    start, batch = snapshot(model), batch_case()
    run.seed_step(3, 0)
    terms = dupr.train_step(cfg, model, optimizer, [batch], 0, CPU)
    assert events == ["ema", "keys", "loss", "backward", "enqueue", "sgd"]
    after = model.state_dict()
    # keys are made by the average of the query weights before SGD moved them
    for name, p in model.encoder_q.named_parameters():
        torch.testing.assert_close(seen["k"][name], 0.5 * start[f"encoder_k.{name}"] + 0.5 * start[f"encoder_q.{name}"])
        assert (torch.equal(after[f"encoder_k.{name}"], seen["k"][name])
                and not torch.equal(after[f"encoder_q.{name}"], start[f"encoder_q.{name}"]))
    for name, value in seen["queues"].items():                            # logits with the old queues
        assert torch.equal(value, start[f"queues.{name}"])
    q, k = seen["queries"]["image_conv5"], seen["keys"]["image_conv5"]
    assert (terms["image_conv5"].item()
            == pytest.approx(cross_entropy(q, k, start["queues.image_conv5.keys"], 0.2).mean().item(), rel=1e-5))
    assert (not any(e.requires_grad for e in seen["keys"].values())
            and all(e.requires_grad for e in seen["queries"].values()))
    assert (seen["enqueued"] is seen["keys"] and all(p.shape == (4, 2) for p in seen["positions"].values())
            and len(seen["positions"]) == 2)
    assert torch.equal(after["queues.image_conv5.keys"][:, :4], k.T)
    assert torch.equal(after["queues.image_conv5.keys"][:, 4:], start["queues.image_conv5.keys"][:, 4:])
    assert (terms["loss"].item()
            == pytest.approx(sum(w * terms[f"image_{level}"] for level, w in zip(dupr.LEVELS, cfg.alpha)).item()
                             + (terms["patch_conv4"] + terms["patch_conv5"]).item(), rel=1e-5))
    assert "conv2" not in str([kind for kind in terms if kind.startswith("patch")])


def test_keys_of_a_flipped_view_are_mirrored():
    model = identity_model()
    maps = tensor("maps", 3, 2, 4, 3, 3)
    flips = torch.tensor([[False, True], [True, False], [True, True]])
    queries, keys = (e["patch_conv5"] for e in model(maps, torch.tensor([0.0, 0.0, 3.0, 3.0]).expand(3, 2, 4), flips))
    for e, view in ((queries, 0), (keys, 1)):
        wanted = F.normalize(maps[:, view], dim=1)
        for b in range(3):
            torch.testing.assert_close(e[b], wanted[b].flip(-1) if flips[b, view] else wanted[b])


def test_bf16_is_close_to_fp32():
    results = []
    for amp in ("off", "bf16"):
        cfg = config(amp=amp)
        model = dupr.build_model(cfg).train()
        run.seed_step(3, 0)
        terms = dupr.train_step(cfg, model, sgd(cfg, model), [batch_case()], 0, CPU)
        assert all(q.keys.dtype == torch.float32 for q in model.queues.values())
        results.append({k: v.item() for k, v in terms.items() if k != "grad_norm"})
    assert results[0] == pytest.approx(results[1], rel=0.05, abs=0.02) and results[0] != results[1]


# ==== Two processes ================================================================================================

WORLD_BATCHES = {"all": (True,) * 8, "unequal": (True, True, True, False, False, False, True, False),
                 "one side": (False,) * 4 + (True, False, True, True), "none": (False,) * 8}


@functools.cache
def one_step(start=0, stop=8, batch="all", train=False, micro_batches=1):
    """dupr.train_step on pairs start..stop, cut into micro-batches as data.StepSampler cuts them -> (terms, gradients,
    state, keys): one process with all, or one of two with half."""
    cfg = config(**ALL_LEVELS, lr=0.0)
    model = small_model(cfg)
    with torch.no_grad():
        for p in model.encoder_k.parameters():
            p.mul_(1.05)
    model.train(train)
    seen = {}
    model.register_forward_hook(lambda module, args, output: seen.update(keys=output[1]))
    pairs, size, world = batch_case(8, valid=WORLD_BATCHES[batch]), (stop - start) // micro_batches, common.world_size()
    starts = [start] if micro_batches == 1 else [(a * world + common.rank()) * size for a in range(micro_batches)]
    run.seed_step(3, 0)
    terms = dupr.train_step(cfg, common.wrap_model(model, CPU, sync_bn=False), sgd(cfg, model),
                            [{k: v[i:i + size] for k, v in pairs.items()} for i in starts], 0, CPU)
    return ({k: v.item() for k, v in terms.items()},
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model.state_dict(), seen["keys"])


def worker():
    """What one of two processes does (conftest.two_processes)."""
    r = common.rank()
    gathered = dupr.all_gather([torch.tensor([[r, 10 * r]]), torch.tensor([[r, 7]])])
    return {"gathered": gathered, "train": one_step(4 * r, 4 * r + 4, train=True),
            "accumulated": one_step(4 * r, 4 * r + 4, "unequal", True, 2),
            "halves": one_step(4 * r, 4 * r + 4, "unequal", True),
            **{batch: one_step(4 * r, 4 * r + 4, batch) for batch in WORLD_BATCHES}}


@pytest.mark.parametrize("batch", WORLD_BATCHES)
def test_two_processes_are_one_batch(two_processes, batch):
    """In evaluation mode an image's embedding depends on no other's: whatever is shuffled must come back, losses and
    gradients are the whole batch's, whichever process has the valid pairs."""
    results = [r[batch] for r in two_processes["test_dupr"]]
    whole = one_step(batch=batch)
    same_step([r[:2] for r in results], whole[:2])
    assert results[0][0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-4)
    for kind, keys in whole[3].items():
        torch.testing.assert_close(torch.cat([r[3][kind] for r in results]), keys, atol=1e-5, rtol=1e-4)
    if batch == "one side":
        assert results[0][0]["patch_conv5"] == 0 != results[1][0]["patch_conv5"]


def test_boxes_are_shuffled_with_their_images(two_processes):
    """The comparison above would notice: with the boxes in another order the keys of the patches differ,
    those of the images do not."""
    model, batch = small_model(config(**ALL_LEVELS)).eval(), batch_case(8)
    order = dupr.draw_permutation(3, 0, 8)
    # it does cross the processes
    assert not torch.equal(order, torch.arange(8)) and set(order[:4].tolist()) != {0, 1, 2, 3}
    with torch.no_grad():
        right = model.encoder_k(batch["views"][:, 1], batch["boxes"][:, 1])
        wrong = model.encoder_k(batch["views"][:, 1], batch["boxes"][order, 1])
    assert torch.equal(right["image_conv5"], wrong["image_conv5"])
    change = (right["patch_conv5"] - wrong["patch_conv5"]).abs().amax((1, 2, 3))
    assert change[order != torch.arange(8)].min() > 1e-3


def test_queues_are_the_same_on_every_process(two_processes):
    one, two = (r["train"] for r in two_processes["test_dupr"])
    assert two_processes["test_dupr"][1]["gathered"].tolist() == [[0, 0], [1, 10], [0, 7], [1, 7]]
    names = [n for n in one[2] if n.startswith("queues.")]
    assert len(names) == 8 and all(torch.equal(one[2][n], two[2][n]) for n in names)
    assert torch.equal(one[2]["queues.image_conv5.keys"][:, :8],
                       torch.cat([one[3]["image_conv5"], two[3]["image_conv5"]]).T)  # rank order
    assert (one[2]["queues.image_conv5.ptr"], one[2]["queues.patch_conv5.ptr"]) == (8, 16)
    patches = one[2]["queues.patch_conv5.keys"][:, :16].T  # rank order, image by image: two distinct patches of each
    rows = torch.cat([one[3]["patch_conv5"], two[3]["patch_conv5"]]).flatten(2).transpose(1, 2)  # [8, 4, dim]
    equal = (patches.view(8, 2, 1, 16) == rows[:, None]).all(-1)
    assert (equal.sum(-1) == 1).all() and (equal.float().argmax(-1)[:, 0] != equal.float().argmax(-1)[:, 1]).all()
    parameters = [n for n in one[2] if n.startswith("encoder_k.")
                  and not n.rsplit(".", 1)[1].startswith(("running", "num_batches"))]
    assert all(torch.equal(one[2][n], two[2][n]) for n in parameters) and parameters


def test_batchnorm_of_the_keys_sees_mixed_batches(two_processes):
    results = [r["train"] for r in two_processes["test_dupr"]]
    cfg, batch = config(**ALL_LEVELS), batch_case(8)
    order = dupr.draw_permutation(cfg.seed, 0, 8).view(2, 4)
    for r, (_, _, state, keys) in enumerate(results):
        for images, name in ((batch["views"][4 * r:4 * r + 4, 0], "encoder_q"),
                             (batch["views"][order[r], 1], "encoder_k")):
            model = small_model(cfg).train()
            weights = {n.removeprefix(f"{name}."): v for n, v in state.items() if n.startswith(f"{name}.")}
            encoder = model.encoder_q
            encoder.load_state_dict({n: v for n, v in weights.items() if "running" not in n and "num_batches" not in n},
                                    strict=False)  # rate 0
            with torch.no_grad():
                encoder(images, batch["boxes"][:4, 0])
            for n, v in encoder.state_dict().items():
                if "running" in n:
                    torch.testing.assert_close(v, weights[n], atol=1e-4, rtol=1e-4)
    whole = one_step(train=True)
    mean = "encoder_k.layer1.bn.running_mean"                              # D11: never synchronised
    assert (not torch.equal(whole[2][mean], results[0][2][mean])
            and not torch.equal(results[0][2][mean], results[1][2][mean]))


def test_one_process_shuffles_nothing():
    model, batch = small_model(config(**ALL_LEVELS)).train(), batch_case()
    other = copy.deepcopy(model)
    given = [[batch[k]] for k in ("views", "boxes", "flips")]
    (one,), (two,) = model.encode_keys(*given, torch.tensor([2, 0, 3, 1])), other.encode_keys(*given)
    assert (all(torch.equal(one[k], two[k]) for k in one)
            and torch.equal(*(m.encoder_k.layer1.bn.running_mean for m in (model, other))))


@pytest.mark.parametrize(("name", "micro_batches"), (("halves", 2), ("accumulated", 4)))
def test_micro_batches_are_processes(two_processes, name, micro_batches):
    """D13: with BatchNorm in training, queries and shuffled keys of 2 (4) micro-batches of one process are those of two
    processes with 1 (2): losses, gradients, queues of images, and the running statistics, which are rank 0's."""
    results = [r[name] for r in two_processes["test_dupr"]]
    terms, gradients, state, keys = one_step(0, 8, "unequal", True, micro_batches)
    same_step([r[:2] for r in results], (terms, gradients))
    assert terms["no_overlap"] == pytest.approx(0.5) and terms != pytest.approx(one_step(0, 8, "unequal", True)[0])
    for kind, key in keys.items():  # of the last micro-batch: rank 1's last
        torch.testing.assert_close(key, results[1][3][kind], atol=1e-5, rtol=1e-4)
    drawn_per_process = "queues.patch"
    for kind, value in results[0][2].items():
        if not kind.startswith(drawn_per_process) or kind.endswith("ptr"):
            torch.testing.assert_close(value, state[kind], atol=1e-5, rtol=1e-4, msg=lambda text: f"{kind}: {text}")
    counts = [state[f"encoder_{side}.layer1.bn.num_batches_tracked"] for side in "qk"]
    assert counts == [1, 1]


# ==== Schedule =====================================================================================================

def test_learning_rate():
    cfg = config(epochs=10)
    factors = [dupr.lr_factor(cfg, step, 4) for step in range(40)]
    for epoch in range(10):
        # changed once per epoch
        assert factors[4 * epoch:4 * epoch + 4] == [pytest.approx(0.5 * (1 + np.cos(np.pi * epoch / 10)))] * 4
    assert factors[0] == 1 and min(factors) > 0
    cfg = config(epochs=10, schedule="step", lr_drops=(3, 7))
    assert ([dupr.lr_factor(cfg, step, 4) for step in (0, 11, 12, 27, 28, 39)]
            == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01]))


# ==== Probe ========================================================================================================

class Codes:
    """The query encoder of a perfect model: views are the embeddings of their patches, side by side."""

    def eval(self):
        self.evaluated = True

    def encoder_q(self, images, boxes):
        assert self.evaluated and boxes.shape == (len(images), 4)
        maps = {"conv4": images, "conv5": images.roll(1, 2)}
        return {"image_conv5": F.normalize(images.mean((2, 3)), dim=1),
                **{f"patch_{level}": F.normalize(e, dim=1) for level, e in maps.items()}}


SHARES = ("patch_conv4", "own_conv4", "patch_conv5", "own_conv5")


def probe_set(count=3, valid=(True, True, True), mistakes=(), size=2):
    class Set(dict):
        def __len__(self):
            return count

        def __missing__(self, key):
            first = tensor(f"codes{key[1]}", 3, size, size)
            second = first.clone()
            if key[1] in mistakes:  # the upper row is exchanged: half of the places are wrong
                second[:, 0] = first[:, 0].flip(-1)
            return {"views": torch.stack([first, second.flip(-1)]), "boxes": torch.zeros(2, 4),
                    "flips": torch.tensor([False, True]), "valid": valid[key[1]], "index": 10 + key[1], "skipped": []}
    return Set()


def test_probe_counts_right_places():
    rows = dupr.match_patches(Codes(), probe_set(), 0, CPU)
    assert [row["index"] for row in rows] == [10, 11, 12]
    assert all(row == {"index": row["index"], "valid": True, "found": [0, 1, 2, 3], "image_conv5": 1}
               | dict.fromkeys(SHARES, 1) for row in rows)
    rows = dupr.match_patches(Codes(), probe_set(mistakes=(1,), valid=(True, True, False)), 0, CPU)
    assert [(row["index"], row["patch_conv4"]) for row in rows] == [(10, 1), (11, 0.5)]
    metrics = dupr.match_metrics(rows)
    assert metrics == {"patch": 0.75, "own_image": 0.75, "image": 1} | dict.fromkeys(SHARES, 0.75)
    others = dupr.match_patches(Codes(), probe_set(), 0, CPU, other=True)  # patches of the next image are looked for
    assert [row["index"] for row in others] == [10, 11, 12]
    # found, in the image they are from
    assert all(row["image_conv5"] == row["patch_conv4"] == row["patch_conv5"] == 0 for row in others)
    for i, row in enumerate(others):
        asked, there = (F.normalize(tensor(f"codes{j}", 3, 2, 2), dim=0).roll(1, 1).flatten(1)
                        for j in ((i + 1) % 3, i))
        assert row["found"] == (asked.T @ there).argmax(1).tolist()       # where the place alone leads
        assert row["own_conv5"] == np.mean([p == i for i, p in enumerate(row["found"])])


def test_probe_of_one_patch_per_image():
    """S = 1 (--roi_sizes on views of 32 px): the patch is all of the overlap, and there is nothing to draw wrong."""
    rows = dupr.match_patches(Codes(), probe_set(size=1), 0, CPU)
    assert all(row["found"] == [0] and row["patch_conv4"] == row["own_conv4"] == row["image_conv5"] == 1
               for row in rows)


def test_probe_without_any_overlap_says_so():
    rows = dupr.match_patches(Codes(), probe_set(valid=(False,) * 3), 0, CPU)
    assert rows == []
    with pytest.raises(common.UserError, match="no two views of any probe image overlap"):
        dupr.match_metrics(rows)


# ==== Whole runs ===================================================================================================

RUN = {**TINY, "preset": "demo", "synthetic_images": 16, "synthetic_size": 64, "batch_size": 4, "probe_images": 4,
       "log_every": 1, "save_every": 1, "epochs": 2, "lr": 0.03, "temperature": 0.2,
       "max_steps": 3}
ROWS = {"untrained", "shuffled", "pretrained"}


def run_script(out, **values):
    return dupr.main(flags({**RUN, "out": out, **values}))


@pytest.fixture
def straight(finished_run):
    return finished_run("dupr")


def test_log_and_table(straight):
    out, metrics = straight
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    terms = ({f"image_{level}": w for level, w in zip(dupr.LEVELS, (0.1, 0.4, 0.7, 1))}
             | {"patch_conv4": 1, "patch_conv5": 1})
    for line in lines:
        assert line.keys() == {"step", "epoch", "lr", "loss", "no_overlap", *terms, "grad_norm",
                               "images_per_s", "memory_gib", "seconds"}
        assert line["loss"] == pytest.approx(sum(w * line[k] for k, w in terms.items()),
                                             rel=1e-4) and line["lr"] == 0.03
    assert metrics.keys() == ROWS | {"steps", "primary"} and metrics["steps"] == 3 and metrics["primary"] == "patch"
    for row in ROWS:
        assert (metrics[row].keys() == {*SHARES, "patch", "own_image", "image"}
                and all(0 <= v <= 1 for v in metrics[row].values()))
        for name, level in (("patch", "patch"), ("own_image", "own")):
            assert (metrics[row][name]
                    == pytest.approx((metrics[row][f"{level}_conv4"] + metrics[row][f"{level}_conv5"]) / 2))
    assert Image.open(out / "predictions.png").height > 2 * 150
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["step"] == 3 and state["script"] == "dupr" and state["config"]["queue_size"] == 40
    assert ({"encoder_q.layer4.1.bn2.running_var", "encoder_k.conv1.weight", "encoder_q.image_heads.conv2.2.bias",
             "encoder_k.patch_heads.conv5.0.weight", "queues.patch_conv4.keys", "queues.image_conv2.ptr"}
            <= state["model"].keys())
    assert state["model"]["queues.patch_conv5.ptr"] == 3 * 4 * 2 and state["model"]["queues.image_conv5.ptr"] == 12


@pytest.mark.parametrize("values",
                         ({"alpha": (0, 0, 0, 1), "beta": (0, 0, 0, 0)}, {"alpha": (0, 0, 0, 0), "beta": (0, 0, 1, 0)}))
def test_own_images_with_one_loss_only(folder, tmp_path, capsys, values):
    for i in range(4, 9):
        picture(i).save(folder / f"{i}.png")
    out = tmp_path / "out"
    metrics = run_script(out, data=folder, max_steps=1, probe_images=3, **values)
    image_only = not any(values["beta"])
    assert metrics.keys() == ROWS | {"steps", "primary"} and metrics["primary"] == ("image" if image_only else "patch")
    assert metrics["pretrained"].keys() == ({"image"} if image_only
                                            else {"patch_conv4", "own_conv4", "patch", "own_image"})
    assert (out / "predictions.png").exists() != image_only
    said = capsys.readouterr().out
    assert ("predictions.png" in said) != image_only and f"primary: {metrics['primary']}" in said
    line = json.loads((out / "log.jsonl").read_text())
    only, = (k for k in line if k.startswith(("image_", "patch_")))
    assert line["loss"] == line[only] and only == ("image_conv5" if image_only else "patch_conv4")
    weights = torch.load(out / "last.pt", weights_only=True)["model"]
    assert (any(k.startswith("encoder_q.layer4.") for k in weights) == image_only
            and sum(k.startswith("queues.") for k in weights) == 2)


def test_one_patch_on_the_last_level(tmp_path):
    metrics = run_script(tmp_path, max_steps=1, image_size=32, roi_sizes=(8, 4, 2, 1), beta=(0, 0, 0, 1))
    assert metrics["pretrained"]["own_conv5"] == 1 and (tmp_path / "predictions.png").exists()


def test_a_checkpoint_is_a_backbone(straight, capsys):
    weights = torch.load(straight[0] / "last.pt", weights_only=True)["model"]
    assert not torch.equal(weights["encoder_q.conv1.weight"], weights["encoder_k.conv1.weight"])
    for backbone in (common.Backbone("resnet18", trainable=0),
                     common.Backbone("resnet18", (1, 2, 3, 4), "bn", trainable=5),
                     common.Backbone("resnet18", (3,), "bn")):
        convert.load_backbone_weights(backbone.body, str(straight[0] / "last.pt"), "resnet18")
        assert "(DUPR, ResNet-18, step" in capsys.readouterr().out
        for name, value in backbone.body.state_dict().items():
            assert torch.equal(value, weights[f"encoder_q.{name}"]) or name.endswith("num_batches_tracked"), name
    state = convert.open_checkpoint(straight[0] / "last.pt").resnet()
    assert not any("head" in k or "queue" in k for k in state)
    # and a start for another pretraining
    again = dupr.build_model(config(backbone_weights=str(straight[0] / "last.pt")))
    for encoder in (again.encoder_q, again.encoder_k):
        assert torch.equal(encoder.layer4[1].bn2.running_var, weights["encoder_q.layer4.1.bn2.running_var"])


def test_presets():
    def parse(*argv):
        return run.parse_config(dupr.Config, dupr.PRESETS, list(argv), script="dupr",
                                description="", recipe=dupr.recipe_of)

    cfg = parse()
    assert (cfg.alpha, cfg.beta, cfg.roi_sizes, cfg.patch_reduction) == ((0.1, 0.4, 0.7, 1.0),
                                                                         (0, 0, 1, 1), (56, 28, 14, 7), "mean")
    assert (cfg.lr, cfg.batch_size, cfg.epochs, cfg.schedule, cfg.temperature, cfg.queue_size, cfg.ema_momentum) == (
        0.06, 256, 200, "cosine", 0.2, 65536, 0.999)
    assert (cfg.sgd_momentum, cfg.weight_decay, cfg.image_size, cfg.crop_area, cfg.queued_patches,
            cfg.embedding_dim, cfg.arch) == (
                0.9, 1e-4, 224, (0.2, 1.0), 4, 128, "resnet50")
    paper = parse("--preset", "paper")
    changed = {k: v for k, v in vars(paper).items() if v != vars(cfg)[k] and k not in ("preset", "out")}
    assert changed == {"roi_sizes": (56, 28, 7, 14), "patch_reduction": "sum"}
    assert parse("--data", "coco").epochs == 2000 and parse("--preset", "demo").arch == "resnet18"
    ablation = parse("--alpha", "0", "0", "0", "1", "--beta", "0", "0", "0", "0", "--lr", "0.03")
    assert ablation.alpha == (0, 0, 0, 1) and ablation.beta == (0, 0, 0, 0) and ablation.lr == 0.03
    for preset in ({}, dupr.PRESETS["paper"], dupr.PRESETS["demo"]):
        dupr.check(dupr.Config(**preset))


def test_bad_input_ends_in_one_line(fails, folder, tmp_path):
    def fail(**values):
        return fails(dupr.main, flags({**RUN, "data": folder, "max_steps": 1, "probe_images": 0, "batch_size": 2,
                                       "out": tmp_path / "out", **values}))

    for name in ("alpha", "beta", "roi_sizes"):
        low = 1 if name == "roi_sizes" else 0
        assert f"--{name} 1 1 1: give four values" in fail(**{name: (1, 1, 1)}).replace(".0", "")
        assert f": must be at least {low}" in fail(**{name: (1, 1, 1, low - 1)})
        assert "give four values" in fail(**{name: (1, 1, 1, 1, 1)})
    assert "--alpha and --beta are all 0: there is nothing to learn" in fail(alpha=(0, 0, 0, 0), beta=(0, 0, 0, 0))
    assert ("--accumulate 2: BatchNorm would see 1 images at a time rather than the published 32" in fail(accumulate=2)
            and "--accumulate 2 with --batch_size 64" in fail(accumulate=4, batch_size=68))
    for area in ((0.5,), (0, 1), (0.6, 0.5), (0.5, 1.1), (0.1, 0.2, 0.3)):
        assert "--crop_area" in fail(crop_area=area)
    assert "--image_size 31: must be at least 32" in fail(image_size=31)
    assert "--ema_momentum 1.01: must be at least 0 and at most 1" in fail(ema_momentum=1.01)
    assert "--ema_momentum -0.1: must be at least 0 and at most 1" in fail(ema_momentum=-0.1)
    assert "--temperature 0.0: must be above 0" in fail(temperature=0)
    assert "--batch_size 1: one image per process, but BatchNorm needs two" in fail(batch_size=1)
    for name in ("queue_size", "embedding_dim", "queued_patches", "logit_rows"):
        assert f"--{name} 0: must be at least 1" in fail(**{name: 0})
    assert "--min_overlap 65.0: no overlap is larger than a view of 64 pixels" in fail(min_overlap=65)
    assert "4 images are too few to hold out 2" in fail(probe_images=2)
    assert not (tmp_path / "out").exists()                                # nothing was written until here
