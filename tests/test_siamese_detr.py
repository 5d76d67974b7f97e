"""siamese_detr.py: its views, regions and losses by hand, its step on one and two processes,
and whole runs on drawn images."""
import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import SMALL, flags
from fill import fill
from PIL import Image
from test_detreg import same_step

import common
import data
import evaluation
import proposals
import run
import siamese_detr

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
DETECTORS = ("detr", "conditional_detr", "deformable_detr_ss", "deformable_detr")
n, Q, D, C = 4, 8, 64, 512  # regions, queries, width, channels of resnet18's last stage
TINY = {**SMALL, "num_regions": n, "scales": (48, 64), "max_size": 96, "patch_size": 16, "backbone_weights": "random",
        "num_workers": 0, "seed": 3}


def tensor(name, *shape):
    return torch.from_numpy(fill(f"input:{name}", shape))


def config(**values):
    return siamese_detr.Config(**{**TINY, "num_feature_levels": 3, **values})


def build(**values):
    """A model whose boxes depend on the queries (some start at zero)."""
    model = siamese_detr.build_models(config(**values))[0].eval()
    heads = model.detector.bbox_embed
    for head in heads if isinstance(heads, torch.nn.ModuleList) else [heads]:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.05)
    return model


# ==== Views ========================================================================================================

def area(box):
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(a, b):
    inter = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    return inter / (area(a) + area(b) - inter)


@pytest.mark.parametrize("t", (0.3, 0.5, 0.7))
def test_iou_of_the_views(t):
    outer = (10, 20, 210, 80)
    s = (t + math.sqrt(2 * t * t + 2 * t)) / (2 + t)
    assert (2 + t) * s * s - 2 * t * s - t == pytest.approx(0, abs=1e-12)
    for u1, u2 in ((0, 0), (0.25, 0), (0, 0.6), (0.3, 0.9), (1, 1)):
        first, second, inter = (v.tolist() for v in siamese_detr.view_boxes(outer, t, u1, u2, False))
        a1, a2 = ((1 + s) / 2 - u * (1 - s) / 2 for u in (u1, u2))  # sides, of the outer box's
        assert (iou(first, second) == pytest.approx(s * s / (a1 * a1 + a2 * a2 - s * s), rel=1e-9)
                and iou(first, second) >= t - 1e-12)
        assert first[:2] + second[2:] == pytest.approx([10 + 200 * (1 - s) / 2 * u1, 20 + 60 * (1 - s) / 2 * u1,
                                                        210 - 200 * (1 - s) / 2 * u2, 80 - 60 * (1 - s) / 2 * u2])
        assert inter == [*second[:2], *first[2:]] and area(inter) == pytest.approx(s * s * 200 * 60)
        assert inter == pytest.approx([10 + 100 * (1 - s), 20 + 30 * (1 - s), 210 - 100 * (1 - s), 80 - 30 * (1 - s)])
        swapped = siamese_detr.view_boxes(outer, t, u1, u2, True)
        assert [v.tolist() for v in swapped] == [second, first, inter]
    assert iou(*(v.tolist() for v in siamese_detr.view_boxes(outer, t, 0, 0, False)[:2])) == pytest.approx(t, rel=1e-12)
    one, two, inter = siamese_detr.view_boxes(outer, t, 1, 1, False)
    assert torch.allclose(one, inter) and torch.allclose(two, inter)


def test_outer_box():
    for height, width in ((100, 150), (240, 160), (480, 480)):
        shares, ratios = [], []
        for i in range(400):
            x1, y1, x2, y2 = data.draw_crop(np.random.default_rng(i), (height, width), (0.5, 1.0))
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            shares.append((x2 - x1) * (y2 - y1) / (height * width))
            ratios.append((x2 - x1) / (y2 - y1))
        assert (min(shares) > 0.49 and max(shares) <= 1 and max(shares) > 0.8
                and min(ratios) > 0.74 and max(ratios) < 1.35)
    # no box of half the area fits: the largest one with an allowed aspect, in the middle
    for hw, expected in (((30, 600), (280, 0, 320, 30)), ((600, 30), (0, 280, 30, 320)), ((8, 601), (295, 0, 306, 8))):
        assert {data.draw_crop(np.random.default_rng(i), hw, (0.5, 1.0)) for i in range(5)} == {expected}


VIEWS = tuple(torch.tensor(v, dtype=torch.float64) for v in ((0, 0, 80, 40), (20, 10, 100, 50), (20, 10, 80, 40)))
HW = (80, 160)  # of each view: twice its size in the image


def test_boxes_in_a_view():
    boxes = torch.tensor([[20.0, 10, 80, 40], [30, 20, 40, 25]], dtype=torch.float64)
    assert siamese_detr.to_view(boxes, VIEWS[0], HW).tolist() == [[40, 20, 160, 80], [60, 40, 80, 50]]
    assert siamese_detr.to_view(boxes, VIEWS[1], HW).tolist() == [[0, 0, 120, 60], [20, 20, 40, 30]]
    wide = siamese_detr.to_view(boxes, VIEWS[0], (40, 160))  # the axes scale by themselves
    assert wide.tolist() == [[40, 10, 160, 40], [60, 20, 80, 25]]


def test_usable_regions():
    boxes = torch.tensor([[30, 15, 60, 30],  # inside
                          [30, 15, 36, 22],  # 12 x 14 px of the view are less than 5 % of 120 x 60
                          [0, 0, 19, 9],  # outside the overlap
                          [85, 42, 99, 49],  # outside, on the other side: both cut sides are negative
                          [5, 5, 50, 20],  # reaches out: cut
                          [30, 0, 60, 5],  # outside along one axis
                          [0, 0, 100, 50]], dtype=torch.float64)  # everything: the overlap, without its last pixel
    one, two = siamese_detr.usable_regions(boxes, VIEWS, HW, 0.05)
    assert one.tolist() == [[60, 30, 120, 60], [40, 20, 100, 40], [40, 20, 158, 78]]
    assert two.tolist() == [[20, 10, 80, 40], [0, 0, 60, 20], [0, 0, 118, 58]]
    assert (len(siamese_detr.usable_regions(boxes, VIEWS, HW, 0.02)[0]) == 4
            and len(siamese_detr.usable_regions(boxes, VIEWS, HW, 0.5)[0]) == 1)
    assert len(siamese_detr.usable_regions(boxes[:0], VIEWS, HW, 0.05)[0]) == 0


def test_chosen_regions():
    boxes = torch.tensor([[30, 15, 60, 30], [22, 12, 70, 20], [50, 20, 79, 39]], dtype=torch.float64)
    usable = siamese_detr.usable_regions(boxes, VIEWS, HW, 0.02)
    overlap = [[[40, 20, 160, 80]], [[0, 0, 120, 60]]]
    chosen = siamese_detr.choose_regions(usable, VIEWS, HW, 3, torch.zeros(3, 4))
    assert chosen.shape == (2, 3, 4)  # the overlap, then the first two in their order
    assert chosen.tolist() == [overlap[v] + usable[v][:2].tolist() for v in (0, 1)]
    for draw, shift in ((0.0, 0.0), (50.0, 0.1), (-50.0, -0.1)):  # the copies: not moved, and moved as far as possible
        some = siamese_detr.choose_regions(usable, VIEWS, HW, 6, torch.full((6, 4), draw, dtype=torch.float64))
        for v in (0, 1):
            assert some[v, :4].tolist() == overlap[v] + usable[v].tolist()
        sides = (usable[0][:2, 2:] - usable[0][:2, :2]).repeat(1, 2)
        moved = usable[0][:2] + shift * sides
        low, high = torch.tensor([40.0, 20]), torch.tensor([159.0, 79])  # inside the overlap of view 1
        moved = torch.cat([moved[:, :2].clamp(low, high), moved[:, 2:].clamp(low, high)], 1)
        torch.testing.assert_close(some[0, 4:], moved.double())
        back = some[0, 4:] / 2  # view 1 lies at (0, 0): pixels of the image
        torch.testing.assert_close(some[1, 4:], (back - torch.tensor([20.0, 10, 20, 10])) * 2)
    drawn = siamese_detr.choose_regions(usable, VIEWS, HW, 2, torch.zeros(2, 4), np.array([2, 0, 1]))
    assert drawn.tolist() == [usable[v][[2, 0]].tolist() for v in (0, 1)]  # random ones, and no overlap (D1)
    padded = siamese_detr.choose_regions(usable, VIEWS, HW, 5,
                                         torch.zeros(5, 4, dtype=torch.float64), np.array([2, 0, 1]))
    assert padded[0].tolist() == usable[0][[2, 0, 1, 2, 0]].tolist()


def test_jitter_is_bounded():
    boxes = torch.tensor([[10.0, 20, 50, 40], [0, 0, 8, 100]])
    # sigmoid(log 3) = 3/4
    for normal, expected in ((0.0, boxes), (60.0, boxes + 0.1 * torch.tensor([[40.0, 20] * 2, [8, 100] * 2])),
                             (math.log(3), boxes + 0.05 * torch.tensor([[40.0, 20] * 2, [8, 100] * 2]))):
        torch.testing.assert_close(siamese_detr.jitter_boxes(boxes, torch.full((2, 4), normal), 0.1), expected)
    assert torch.equal(siamese_detr.jitter_boxes(boxes, torch.randn(2, 4), 0.0), boxes)
    assert siamese_detr.clip_boxes(torch.tensor([[-3.0, 5, 70, 90]]),
                                   torch.tensor([0.0, 6, 60, 80])).tolist() == [[0, 6, 60, 80]]


def test_random_regions():
    inter = torch.tensor([20.4, 10.2, 120.7, 60.9], dtype=torch.float64)
    whole, counts = 100.3 * 50.7, []
    for seed in range(30):
        boxes = siamese_detr.draw_random_regions(np.random.default_rng(seed), inter, 6, 0.05).numpy()
        sides = boxes[:, 2:] - boxes[:, :2]
        counts.append(len(boxes))
        assert (sides.prod(1) >= 0.05 * whole * (1 - 1e-9)).all()
        assert (sides[:, 0] / sides[:, 1] >= 1 / 8).all() and (sides[:, 0] / sides[:, 1] <= 8).all()
        assert (boxes[:, :2] >= (20, 10)).all() and (boxes[:, 2:] <= (119.7, 59.9)).all()
    assert max(counts) == 6 and min(counts) >= 3
    assert siamese_detr.draw_random_regions(np.random.default_rng(0),
                                            torch.tensor([3.1, 3.1, 3.9, 3.9]), 4, 0.05).shape == (0, 4)


# ==== Samples ======================================================================================================

def picture(i, size=(160, 120)):
    """Smooth noise: every place looks different."""
    pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


class Pictures:
    """A source of given images."""
    name = "pictures"

    def __init__(self, *images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def load(self, i, needs=None):
        return self.images[i]

    def key(self, i):
        return f"{i}.png"


MANY = np.float32([[x, y, x + 30, y + 24] for y in range(4, 90, 20) for x in range(4, 120, 24)])


def views_of(*images, boxes=MANY, augment=True, **values):
    """boxes: the proposals of every image; None: those of the configuration."""
    cfg = config(**values)
    proposals_of = proposals.Proposals(cfg) if boxes is None else lambda image, index, epoch: boxes
    return siamese_detr.TwoViewDataset(cfg, Pictures(*images), np.arange(len(images)), proposals_of, augment)


def equal(a, b):
    return (all(torch.equal(x, y) for x, y in zip(a["views"], b["views"]))
            and all(torch.equal(a[k], b[k]) for k in ("boxes", "rois", "crops")))


def test_samples():
    images = [picture(i) for i in range(3)]
    dataset = views_of(*images, boxes=None, proposal_method="edge_boxes")
    for key in ((0, 0), (0, 2), (5, 1)):
        sample = dataset[key]
        assert equal(sample, views_of(*images, boxes=None)[key]) and not equal(sample, dataset[key[0] + 1, key[1]])
        assert not equal(sample, views_of(*images, boxes=None, seed=4)[key])
        assert sample["boxes"].shape == sample["rois"].shape == (2, n, 4) and sample["crops"].shape == (2, n, 3, 16, 16)
        height, width = sample["views"][0].shape[1:]
        assert (sample["views"][1].shape == (3, height, width) and sample["index"] == key[1] and sample["skipped"] == []
                and sample["fallback"] == 0)
        limit = torch.tensor([width, height] * 2)
        for boxes in (sample["boxes"], sample["rois"]):
            assert boxes.dtype == torch.float32 and (boxes >= -1e-3).all() and (boxes <= limit + 1e-3).all()
            assert (boxes[..., 2:] > boxes[..., :2]).all()
        sides = (sample["boxes"][..., 2:] - sample["boxes"][..., :2]).repeat(1, 1, 2)
        assert (((sample["rois"] - sample["boxes"]).abs() <= 0.1 * sides + 1e-3).all()
                and not torch.equal(sample["rois"], sample["boxes"]))
    probe = views_of(*images, augment=False)
    assert torch.equal(probe[0, 0]["rois"], probe[0, 0]["boxes"])
    colours = [{k: photometric[k] for k in ("p_jitter", "p_gray", "p_blur")}
               for photometric in (vars(probe.photometric), vars(dataset.photometric))]
    assert set(colours[0].values()) == {0} and list(colours[1].values()) == [0.8, 0.2, 0.5]


def test_loader_processes_do_not_change_the_samples():
    images = [picture(i) for i in range(4)]
    here, there = ([batch for batch in data.make_loader(views_of(*images), data.StepSampler(4, 2, 2, seed=3),
                                                        num_workers=workers, collate=siamese_detr.collate)]
                   for workers in (0, 2))
    for one, two in zip(here, there, strict=True):
        assert one["index"] == two["index"]
        assert all(torch.equal(one[k], two[k]) for k in ("images", "mask", "boxes", "rois", "crops", "sizes"))


def test_a_region_is_the_same_place_in_both_views():
    four = Image.new("RGB", (160, 120), (90, 90, 90))  # a square of four colours in a grey picture
    for k, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))):
        four.paste(colour, (64 + 16 * (k % 2), 40 + 16 * (k // 2), 80 + 16 * (k % 2), 56 + 16 * (k // 2)))
    dataset = views_of(four, boxes=np.float32([[64, 40, 96, 72]]), augment=False, scales=(120,), max_size=200,
                       num_regions=3, min_area=0.01, patch_size=24, num_queries=6)
    seen = whole = 0
    for epoch in range(25):
        sample = dataset[epoch, 0]
        if sample["fallback"]:
            continue
        for v in (0, 1):
            view, (x1, y1, x2, y2) = (np.asarray(evaluation.to_image(sample["views"][v])).astype(int),
                                      sample["boxes"][v, 1].tolist())
            coloured = np.ptp(view, axis=2) > 60  # not grey
            inside = np.zeros_like(coloured)
            inside[math.ceil(y1 + 2):math.floor(y2 - 2), math.ceil(x1 + 2):math.floor(x2 - 2)] = True
            assert inside.sum() > 30 and (coloured & inside).sum() > 0.9 * inside.sum()
            seen += 1
            rows, columns = np.flatnonzero(coloured.any(1)), np.flatnonzero(coloured.any(0))
            edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            whole += np.abs(edges - (x1, y1, x2, y2)).max() < 2.5  # its edges are the box; else the overlap has cut it
        first, second = (sample["crops"][v, 1] for v in (0, 1))  # the same four colours in the same corners
        assert (first - second).abs().mean() < 0.25 and (first.flip(2) - second).abs().mean() > 0.5
    assert seen > 30 and whole > 10
    smooth = views_of(picture(7), augment=False, scales=(120,), max_size=200)
    for epoch in range(5):
        crops = smooth[epoch, 0]["crops"]
        right = (crops[0] - crops[1]).abs().mean((1, 2, 3))
        wrong = (crops[0] - crops[1].roll(1, 0)).abs().mean((1, 2, 3))
        assert right.max() < 0.35 and right.max() < wrong.min()


def test_crops_are_those_of_the_plain_view():
    dataset = views_of(picture(1), augment=False)
    for epoch in range(4):
        sample = dataset[epoch, 0]
        for v in (0, 1):
            view = evaluation.to_image(sample["views"][v])
            for crop, box in zip(sample["crops"][v], sample["boxes"][v].tolist()):
                region = np.asarray(view.crop([round(c) for c in box]).resize((16, 16),
                                                                              Image.Resampling.BILINEAR)) / 255
                np.testing.assert_allclose(crop.numpy(),
                                           ((region - data.IMAGENET_MEAN) / data.IMAGENET_STD).transpose(2, 0, 1),
                                           atol=0.05)


def test_top_choice_holds_the_overlap_and_random_choice_does_not():
    for choice in ("top", "random"):
        dataset = views_of(picture(2), region_choice=choice)
        overlaps, firsts = 0, set()
        for epoch in range(12):
            sample = dataset[epoch, 0]
            height, width = sample["views"][0].shape[1:]
            one, two = sample["boxes"].numpy()
            corner = [(box[0] < 0.01 and box[1] < 0.01) and (other[2] > width - 0.01 and other[3] > height - 0.01) or
                      (other[0] < 0.01 and other[1] < 0.01) and (box[2] > width - 0.01 and box[3] > height - 0.01)
                      for box, other in zip(one, two)]
            overlaps += sum(corner)
            firsts.add(corner[0])
        assert (overlaps, firsts) == ((12, {True}) if choice == "top" else (0, {False}))


TINY_BOX = np.float32([[0, 0, 2, 2]])  # never large enough


def test_no_proposal_ends_in_random_boxes():
    greys = [Image.new("RGB", (120, 90), (80, 80, 40 * i)) for i in range(3)]
    loads = []
    for choice in ("top", "random"):
        dataset = views_of(*greys, boxes=TINY_BOX, region_choice=choice)
        dataset.source.load = lambda i, needs: loads.append(i) or greys[i]
        for epoch in range(4):
            loads.clear()
            sample = dataset[epoch, 1]
            assert sample["fallback"] == 1 and len(loads) == 11 and loads[0] == 1 and len(set(loads)) > 1
            boxes, limit = sample["boxes"], torch.tensor([*sample["views"][0].shape[:0:-1]] * 2)
            assert (boxes.shape == (2, n, 4) and (boxes[..., 2:] > boxes[..., :2]).all() and (boxes >= -1e-3).all()
                    and (boxes <= limit + 1e-3).all())
            assert equal(sample, dataset[epoch, 1])
    assert siamese_detr.collate([sample, {**sample, "fallback": 0}, sample])["fallback"] == 2


def test_another_image_stands_in():
    images = [Image.new("RGB", (160, 120), (80, 80, 80)), picture(1), picture(2)]
    dataset = views_of(*images)
    dataset.proposals_of = lambda image, index, epoch: TINY_BOX if image is images[0] else MANY
    drawn = set()
    for epoch in range(10):
        sample = dataset[epoch, 0]
        assert sample["fallback"] == 0 and sample["index"] in (1, 2)
        drawn.add(sample["index"])
    assert drawn == {1, 2}


def test_the_last_attempt_is_no_fallback():
    dataset, calls = views_of(picture(1)), []
    dataset.proposals_of = lambda *_: calls.append(1) or (MANY if len(calls) > 10 else TINY_BOX)
    sample = dataset[0, 0]
    assert len(calls) == 11 and sample["fallback"] == 0


@pytest.mark.parametrize(("size", "method"),
                         (((16, 160), "edge_boxes"), ((600, 16), "random"), ((16, 10000), "random")))
def test_narrow_images(size, method):
    dataset = views_of(*[picture(0, size)] * 2, boxes=None, proposal_method=method, scales=(320,), max_size=600)
    for epoch in range(3):
        boxes = dataset[epoch, 0]["boxes"]
        assert boxes.isfinite().all() and (boxes[..., 2:] > boxes[..., :2]).all()


def test_images_below_16_pixels_are_replaced():
    dataset = views_of(picture(0, (15, 80)), picture(1))
    sample = dataset[0, 0]
    assert sample["index"] == 1 and sample["skipped"][0] == "0.png: 15 x 80 pixels, at least 16 a side are needed"
    assert views_of(picture(0, (16, 80)), picture(1), boxes=None, proposal_method="random")[0, 0]["skipped"] == []


def test_layout_of_a_batch():
    samples = [views_of(picture(0), picture(1, (120, 150)), picture(2))[0, i] for i in range(3)]
    samples[1]["skipped"] = ["x.png: broken"]
    batch = siamese_detr.collate(samples)
    assert batch["index"] == [0, 1, 2] and batch["skipped"] == ["x.png: broken"] and batch["fallback"] == 0
    for place in range(6):
        v, i = divmod(place, 3)  # view 1 of all, then view 2 of all
        height, width = samples[i]["views"][v].shape[1:]
        assert batch["sizes"][place].tolist() == [height, width]
        assert torch.equal(batch["images"][place, :, :height, :width], samples[i]["views"][v])
        assert (not batch["mask"][place, :height, :width].any()
                and batch["mask"][place].sum() == batch["mask"][place].numel() - height * width)
        assert all(torch.equal(batch[k][place], samples[i][k][v]) for k in ("boxes", "rois", "crops"))
    assert siamese_detr.other_view(torch.arange(6)).tolist() == [3, 4, 5, 0, 1, 2]
    assert torch.equal(siamese_detr.other_view(siamese_detr.other_view(batch["boxes"])), batch["boxes"])


def test_stored_and_own_proposals(tmp_path):
    images = [picture(i) for i in range(3)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    source = data.open_images(str(tmp_path), None)
    cfg = config(proposal_method="selective_search", proposal_grid=32)
    generator = proposals.Proposals(cfg).generator
    assert ((generator.method, generator.grid) == ("selective_search", 32)
            and proposals.Proposals(config()).generator.grid is None)
    store = proposals.build_store(tmp_path / "store", source, generator, progress=False)
    stored, online = (siamese_detr.TwoViewDataset(cfg, source, np.arange(3), proposals.Proposals(cfg, s))
                      for s in (store, None))
    for epoch in (0, 1):
        assert np.array_equal(stored.proposals_of(images[1], 1, epoch),
                              generator(images[1], proposals.image_seed(3, "1.png")))
        assert np.array_equal(online.proposals_of(images[1], 1, epoch),
                              generator(images[1], proposals.image_seed(3, epoch, 1)))


# ==== Model ========================================================================================================

def batch_case(B=2, hw=(48, 64)):
    """2B images with regions of their own, the last one padded."""
    images, mask = tensor("images", 2 * B, 3, *hw), torch.zeros(2 * B, *hw, dtype=torch.bool)
    mask[-1, :, 48:] = True
    sizes = torch.tensor([hw] * (2 * B))
    sizes[-1, 1] = 48
    generator = torch.Generator().manual_seed(5)
    low, side = torch.rand(2 * B, n, 2, generator=generator) * 20, torch.rand(2 * B, n, 2, generator=generator) * 16 + 8
    boxes = torch.cat([low, low + side], -1)
    return {"images": images.masked_fill(mask[:, None], 0.0), "mask": mask, "boxes": boxes, "rois": boxes + 0.5,
            "crops": tensor("crops", 2 * B, n, 3, 16, 16), "sizes": sizes}


def outputs_of(model, batch, **values):
    with torch.no_grad():
        out = model(batch["images"], batch["mask"], values.pop("rois", batch["rois"]), **values)
    return torch.cat([out["hs"], out["pred_boxes"], out["pred_logits"]], -1)


@pytest.mark.parametrize("detector", DETECTORS)
def test_queries_look_into_the_other_view(detector):
    batch = batch_case()
    other = batch["rois"].clone()
    other[1] = other[1] + 9.0  # view 1 of image 1
    for values, touched in (({}, [3]), ({"multi_view": False, "region_target": "object"}, [1])):
        model = build(detector=detector, **values)
        difference = (outputs_of(model, batch) - outputs_of(model, batch, rois=other)).abs().amax((1, 2))
        assert ((difference > 1e-4).tolist() == [i in touched for i in range(4)]
                and difference[[i for i in range(4) if i not in touched]].max() < 1e-6)
    model = build(detector=detector)
    source = torch.tensor([1, 0, 0, 2])  # whoever is named is asked for
    difference = (outputs_of(model, batch, source=source)
                  - outputs_of(model, batch, rois=other, source=source)).abs().amax((1, 2))
    assert (difference > 1e-4).tolist() == [True, False, False, False]


def test_shared_queries_are_those_of_image_0():
    batch, model = batch_case(), build(shared_queries=True)
    seen = []
    model.detector.detect, detect = lambda *args: seen.append(args[2]) or detect(*args), model.detector.detect
    outputs_of(model, batch)
    own = build()
    own.detector.detect, detect = lambda *args: seen.append(args[2]) or detect(*args), own.detector.detect
    outputs_of(own, batch)
    shared, each = seen
    assert torch.equal(shared, each[[0, 0, 2, 2]]) and not torch.equal(each[0], each[1])
    for moved, touched in ((0, [False, False, True, True]), (1, [False] * 4)):
        rois = batch["rois"].clone()
        rois[moved] += 9.0
        assert ((outputs_of(model, batch) - outputs_of(model, batch, rois=rois)).abs().amax((1, 2))
                > 1e-6).tolist() == touched


@pytest.mark.parametrize("detector", ("conditional_detr", "deformable_detr"))
def test_what_a_query_is_made_of(detector):
    model, batch = build(detector=detector), batch_case()
    seen = []
    model.detector.detect, detect = lambda *args: seen.append(args[2]) or detect(*args), model.detector.detect
    outputs_of(model, batch)
    with torch.no_grad():
        z = model.region_features(model.detector.backbone[0](batch["images"]), batch["rois"])
        content = model.patch2query(z[[2, 3, 0, 1]]).repeat_interleave(Q // n, 1)  # of the other view
    table = model.detector.query_embed.weight.detach()
    torch.testing.assert_close(seen[0][..., :D], table[:, :D] + content)
    assert torch.equal(seen[0][..., D:], table[:, D:].expand(4, -1, -1))


def test_features_of_a_region():
    model = build(detector="deformable_detr")
    assert model.strides == [8, 16, 32]
    maps = [torch.full((2, c, 64 // s, 96 // s), 0.0) + torch.arange(c)[:, None, None]
            for c, s in ((2, 8), (3, 16), (1, 32))]
    maps[0] += torch.arange(12.0)  # grows by 1 per cell of 8 pixels
    rois = torch.tensor([[[16.0, 8, 48, 40], [32, 0, 64, 64]]] * 2)
    z = model.region_features(maps, rois)
    assert z.shape == (2, 2, 6)
    # not aligned: cell i stands for pixel 8 i, so the middle of 16..48 has the value 4
    torch.testing.assert_close(z[0], torch.tensor([[4.0, 5, 0, 1, 2, 0], [6, 7, 0, 1, 2, 0]]), atol=1e-5, rtol=0)
    crops = tensor("crops", 2, n, 3, 32, 32)
    with torch.no_grad():
        levels = model.detector.backbone[0](crops.flatten(0, 1))
        p = model.crop_features(crops, model.detector.backbone[0])
    expected = np.concatenate([level.double().numpy().mean((2, 3)) for level in levels], 1).reshape(2, n, -1)
    np.testing.assert_allclose(p.numpy(), expected, atol=1e-5)


def test_what_l_r_draws_to():
    for target, names in (("none", False), ("object", True), ("crop", True)):
        model, batch = build(region_target=target), batch_case()
        assert (model.feature_align is not None) == names == any(k.startswith("feature_align.")
                                                                 for k in model.state_dict())
        cfg = config(region_target=target, lambda_global=0.0)
        criterion = siamese_detr.build_criterion(cfg)
        with torch.no_grad():
            out = model(batch["images"], batch["mask"], batch["rois"])
            features = tensor("f", 4, n, C) if names else None
            losses = criterion(out, siamese_detr.make_targets(cfg, batch["boxes"], batch["sizes"], features), 16.0)[0]
        assert ("loss_feature" in losses, "loss_feature_0" in losses) == (names, names)


def test_targets_belong_to_the_view_of_the_queries():
    batch, features = batch_case(), tensor("f", 4, n, 5)
    for multi_view, rows in ((True, [2, 3, 0, 1]), (False, [0, 1, 2, 3])):
        targets = siamese_detr.make_targets(config(multi_view=multi_view), batch["boxes"], batch["sizes"], features)
        for i, (t, row) in enumerate(zip(targets, rows, strict=True)):
            assert t["labels"].tolist() == [1] * n and torch.equal(t["features"], features[row])
            x1, y1, x2, y2 = batch["boxes"][i].T.numpy()  # boxes: of this very view, and of its own size
            width = 48 if i == 3 else 64
            wanted = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / 48, (x2 - x1) / width, (y2 - y1) / 48]
            np.testing.assert_allclose(t["boxes"], np.stack(wanted, 1), atol=1e-6)
    assert "features" not in siamese_detr.make_targets(config(), batch["boxes"], batch["sizes"], None)[0]


class Spy(common.SetCriterion):
    """A criterion that keeps the targets it was given."""

    @classmethod
    def of(cls, cfg):
        spy = siamese_detr.build_criterion(cfg)
        spy.__class__, spy.seen = cls, []
        return spy

    def forward(self, outputs, targets, *args):
        self.seen.append(targets)
        return super().forward(outputs, targets, *args)


def test_targets_of_a_step():
    for target, start in (("crop", False), ("crop", True), ("object", False), ("object", True)):
        cfg, model, batch = step_case(region_target=target, lambda_global=0.0,
                                      feature_target="start" if start else "current")
        frozen = siamese_detr.build_models(cfg)[1]
        assert (frozen is not None) == start
        with torch.no_grad():
            if start:
                for parameter in model.detector.backbone.parameters():  # the training backbone has moved on
                    parameter.mul_(1.3)
                assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
            backbone = frozen if start else model.detector.backbone[0]
            if target == "crop":
                wanted = backbone(batch["crops"].flatten(0, 1))[-1].mean((2, 3)).unflatten(0, (8, n))
            else:  # of the box, not of the jittered RoI (D13)
                wanted = model.region_features(backbone(batch["images"]), batch["boxes"])
        spy = Spy.of(cfg)
        siamese_detr.train_step(cfg, model, frozen, spy, common.build_optimizer(cfg, model), [batch], CPU)
        for i, t in enumerate(spy.seen[0]):
            torch.testing.assert_close(t["features"], wanted[(i + 4) % 8], rtol=1e-4, atol=1e-5)
            assert not t["features"].requires_grad


# ==== Losses =======================================================================================================

def test_global_loss():
    z = tensor("z", 4, 6)
    other = z[[2, 3, 0, 1]]
    for prediction, expected in ((other, 0.0), (-other, 4.0), (3.7 * other, 0.0)):  # twice 1 - cos
        assert siamese_detr.global_loss(z, prediction).item() == pytest.approx(expected, abs=1e-6)
    basis = torch.eye(4)
    assert siamese_detr.global_loss(basis, basis).item() == pytest.approx(2.0)  # unrelated views
    assert siamese_detr.global_loss(basis, basis[[2, 3, 0, 3]]).item() == pytest.approx(0.5)  # one of four is unrelated
    p = tensor("p", 4, 6).requires_grad_()
    z.requires_grad_()
    loss = siamese_detr.global_loss(z, p)
    loss.backward()
    a, b = p.detach().double().numpy(), other.detach().double().numpy()
    cosines = (a * b).sum(1) / np.sqrt((a ** 2).sum(1) * (b ** 2).sum(1))
    assert loss.item() == pytest.approx((2 - 2 * cosines).mean(), rel=1e-5)
    assert loss.item() == pytest.approx(sum((1 - cosines[half]).mean()
                                            for half in (slice(0, 2), slice(2, 4))), rel=1e-5)  # a sum over directions
    assert z.grad is None and p.grad.any()  # stop-gradient


@pytest.mark.parametrize(("detector", "levels"),
                         (("conditional_detr", 1), ("deformable_detr_ss", 1), ("deformable_detr", 3)))
def test_descriptions_of_one_view_do_not_depend_on_the_other(detector, levels):
    model = build(detector=detector, num_feature_levels=4).train()
    assert model.enc_head[0]["projector"]["mlp"][0].in_features == levels * D
    memory = [tensor(f"m{i}", 6, D, 3 + i, 4) for i in range(max(levels, 1) + (levels == 3))]
    changed = [torch.cat([m[:3], m[3:] * 5 + 1]) for m in memory]
    with torch.no_grad():
        one, two = model.describe(memory), model.describe(changed)
        for name in ("projection", "prediction"):
            assert (one[name].shape == (6, D) and torch.equal(one[name][:3], two[name][:3])
                    and not torch.allclose(one[name][3:], two[name][3:]))
        # each normalised
        assert one["projection"][:3].mean(0).abs().max() < 1e-5 and one["projection"][3:].mean(0).abs().max() < 1e-5
        model.eval()
        fourth = [*memory[:3], *[m * 9 for m in memory[3:]]]  # Deformable DETR: its first three levels
        assert torch.equal(model.describe(memory)["projection"], model.describe(fourth)["projection"])
        pooled = torch.cat([m.double().mean((2, 3)) for m in memory[:3]], 1).float()
        torch.testing.assert_close(model.describe(memory)["projection"],
                                   model.enc_head[0]["projector"]["mlp"](pooled), atol=1e-5, rtol=1e-4)


def test_loss_is_the_weighted_sum():
    cfg = config(lambda_cls=1.5, lambda_l1=4.0, lambda_giou=3.0, lambda_region=0.7, lambda_global=0.2, eos_coef=0.3)
    model, batch, criterion = build(), batch_case(), siamese_detr.build_criterion(cfg)
    assert (criterion.matcher.cost_class, criterion.matcher.cost_bbox, criterion.matcher.cost_giou,
            criterion.eos_coef) == (1.5, 4, 3, 0.3)
    assert not criterion.matcher.within_groups  # D18
    assert siamese_detr.build_criterion(config(match_own=True)).matcher.within_groups
    with torch.no_grad():
        out = model(batch["images"], batch["mask"], batch["rois"])
        targets = siamese_detr.make_targets(cfg, batch["boxes"], batch["sizes"], tensor("f", 4, n, C))
        total, losses = siamese_detr.siamese_loss(cfg, criterion, out, targets, 16.0)
        value = {k: v.item() for k, v in losses.items()}
        assert value["loss_global"] == siamese_detr.global_loss(out["projection"], out["prediction"]).item()
        assert total.item() == pytest.approx(sum(w * value[k + s] for k, w in (("loss_ce", 1.5), ("loss_bbox", 4),
                                                                               ("loss_giou", 3), ("loss_feature", 0.7))
                                                 for s in ("", "_0")) + 0.2 * value["loss_global"], rel=1e-5)
        # every region counts once per direction: the mean over both directions (D3)
        halves = []
        for half in (slice(0, 2), slice(2, 4)):
            part = {k: v[half] for k, v in out.items() if k in ("pred_logits", "pred_boxes", "pred_features")}
            halves.append(criterion(part, targets[half], 8.0)[0])
        for name in ("loss_bbox", "loss_giou", "loss_feature", "loss_ce"):
            assert value[name] == pytest.approx(np.mean([h[name].item() for h in halves]), rel=1e-5)


# ==== The step: one process, accumulation, two processes ===========================================================

def step_case(**values):
    cfg = config(clip_max_norm=0.0, **{"lr_backbone": 2e-5, "lambda_global": 0.0, **values})
    return cfg, build(**dataclasses.asdict(cfg)).train(), batch_case(B=4)


def pieces(batch, start, stop, parts):
    """Micro-batches of the image pairs start..stop."""
    size, B = (stop - start) // parts, len(batch["images"]) // 2
    return [{k: torch.cat([v[i:i + size], v[B + i:B + i + size]]) for k, v in batch.items()}
            for i in range(start, stop, size)]


@functools.cache
def one_step(start=0, stop=4, accumulate=1, lambda_global=0.0, swap=False):
    """siamese_detr.train_step on image pairs start..stop -> (terms, gradients)."""
    cfg, model, batch = step_case(accumulate=accumulate, lambda_global=lambda_global)
    if swap:
        batch = {k: siamese_detr.other_view(v) for k, v in batch.items()}
    optimizer, wrapped = common.build_optimizer(cfg, model), common.wrap_model(model, CPU)
    terms = siamese_detr.train_step(cfg, wrapped, None, siamese_detr.build_criterion(cfg), optimizer,
                                    pieces(batch, start, stop, accumulate), CPU)
    return ({k: v.item() for k, v in terms.items()},
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def worker():
    """What one of two processes does (conftest.two_processes)."""
    r = common.rank()
    return {accumulate: one_step(2 * r, 2 * r + 2, accumulate) for accumulate in (1, 2)}


def test_accumulation_is_one_batch():
    terms, gradients = one_step()
    assert terms["loss_feature"] > 0 and any(name.startswith("detector.backbone.0.body.layer2") for name in gradients)
    for accumulate in (2, 4):
        same_step([one_step(accumulate=accumulate)], one_step())


def test_two_processes_are_one_batch(two_processes):
    results = two_processes["test_siamese_detr"]
    for accumulate in (1, 2):
        same_step([r[accumulate] for r in results], one_step())
    assert results[0][1][0]["loss_bbox"] != results[1][1][0]["loss_bbox"]  # each saw its own images


def test_global_loss_under_accumulation():
    halves = [one_step(start, start + 2, lambda_global=0.5)[0] for start in (0, 2)]
    both = one_step(accumulate=2, lambda_global=0.5)[0]
    assert both["loss_global"] == pytest.approx(np.mean([h["loss_global"] for h in halves]), rel=1e-4)
    assert both["loss"] == pytest.approx(sum(w * both[k + s] for k, w in (("loss_ce", 1), ("loss_bbox", 5),
                                                                          ("loss_giou", 2), ("loss_feature", 5))
                                             for s in ("", "_0")) + 0.5 * both["loss_global"], rel=1e-5)


def test_views_are_exchangeable():
    for lambda_global in (0.0, 0.5):
        one, two = (one_step(lambda_global=lambda_global, swap=swap) for swap in (False, True))
        assert one[0] == pytest.approx(two[0], rel=1e-4)
        largest = max(g.abs().max() for g in one[1].values())
        assert one[1].keys() == two[1].keys() and all((g - two[1][k]).abs().max() <= 2e-5 * largest
                                                      for k, g in one[1].items())


@pytest.mark.parametrize("values", ({}, {"region_target": "none"}, {"region_target": "object", "lambda_global": 0.0}))
@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_learns_with_all_its_parameters(detector, values):
    values = {"lambda_global": 1.0, **values}
    cfg, model, batch = step_case(detector=detector, **values)
    optimizer, criterion = common.build_optimizer(cfg, model), siamese_detr.build_criterion(cfg)
    terms = siamese_detr.train_step(cfg, model, None, criterion, optimizer, pieces(batch, 0, 2, 1), CPU)
    assert (("loss_global" in terms) == (cfg.lambda_global > 0)
            and ("loss_feature_0" in terms) == (cfg.region_target != "none"))
    assert all(v.isfinite() for v in terms.values())
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert (not [name for name, p in learning.items() if p.grad is None]
            and all(p.grad.isfinite().all() for p in learning.values()))
    for name in ("patch2query.weight", "detector.query_embed.weight", "detector.backbone.0.body.layer2.0.conv1.weight"):
        assert learning[name].grad.any(), name


def test_a_frozen_backbone_stays():
    cfg, model, batch = step_case(lr_backbone=0.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    siamese_detr.train_step(cfg, model, None, siamese_detr.build_criterion(cfg),
                            common.build_optimizer(cfg, model), [batch], CPU)
    after = model.state_dict()
    assert all(p.grad is None and not p.requires_grad for p in model.detector.backbone.parameters())
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith("backbone."))
    assert not any(torch.equal(before[k], after[k])
                   for k in ("patch2query.weight", "query_embed.weight", "feature_align.layers.0.weight"))


def test_standardized_start():
    """The first weights see regions and places less their mean, over their deviation; nothing else changes (D19)."""
    dataset = views_of(*(picture(i) for i in range(4)), detector="conditional_detr", stride=16, standardized_start=4)
    model = siamese_detr.build_models(dataset.cfg)[0].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        features = [model.detector.backbone[0](torch.stack(dataset[0, i]["views"])) for i in range(4)]
        z = torch.cat([model.region_features(f, dataset[0, i]["rois"]).flatten(0, 1) for i, f in enumerate(features)])
        places = torch.cat([f[-1].flatten(2).transpose(1, 2).flatten(0, 1) for f in features])
    siamese_detr.standardize_start(dataset.cfg, model, dataset, CPU)
    for layer, x in (("patch2query", z), ("input_proj", places)):
        deviation, mean = torch.std_mean(x, 0)
        standard = (x - mean) / deviation.clamp(min=0.1 * deviation.mean())
        expected = standard @ state[f"{layer}.weight"].flatten(1).T + state[f"{layer}.bias"]
        now = model.state_dict()
        torch.testing.assert_close(x @ now[f"{layer}.weight"].flatten(1).T + now[f"{layer}.bias"], expected, atol=1e-3,
                                   rtol=1e-3)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {f"{layer}.{kind}" for layer in ("input_proj", "patch2query") for kind in ("weight", "bias")}


def test_bf16_is_close_to_fp32():
    results = []
    for amp in ("off", "bf16"):
        cfg, model, batch = step_case(amp=amp, lambda_global=1.0)
        terms = siamese_detr.train_step(cfg, model, None, siamese_detr.build_criterion(cfg),
                                        common.build_optimizer(cfg, model), [batch], CPU)
        results.append({k: v.item()
                        for k, v in terms.items() if k.startswith("loss") and "global" not in k and k != "loss"})
        assert terms["loss_global"].isfinite()
    assert results[0] == pytest.approx(results[1], rel=0.05, abs=0.02) and results[0] != results[1]


# ==== Probe ========================================================================================================

class Asked(torch.nn.Module):
    """Finds the RoIs of whoever it was told to ask, in pixels / 100, with the second query of each group."""

    def forward(self, images, mask, rois, source):
        boxes = torch.full((len(images), 6, 4), 0.9)
        boxes[:, 1::2] = rois[source] / 100
        logits = torch.zeros(len(images), 6, 3)
        logits[:, 1::2, 1] = 2.0
        assert not self.training
        return {"pred_logits": logits, "pred_boxes": boxes}


@pytest.mark.parametrize("multi_view", (True, False))
@pytest.mark.parametrize("choice", ("top", "random"))
def test_probe_asks_for_own_and_for_other_regions(multi_view, choice):
    def sample(i):
        boxes = (torch.tensor([[1.0, 2, 11, 12], [3, 3, 9, 9], [5, 1, 15, 7]])
                 + torch.tensor([i, 10.0 + i])[:, None, None])  # [view, n, 4]
        return {"views": [torch.zeros(3, 40, 40)] * 2, "boxes": boxes, "rois": boxes + 50,
                "crops": torch.zeros(2, 3, 3, 4, 4), "index": 20 + i, "skipped": [], "fallback": 0}

    class Set(dict):
        def __len__(self):
            return 3

        def __missing__(self, key):
            return sample(key[1])

    cfg, skip = config(num_regions=3, num_queries=6, multi_view=multi_view, region_choice=choice), int(choice == "top")
    for other in (False, True):
        rows = siamese_detr.find_regions(cfg, Asked(), Set(), CPU, other)
        assert [(row["index"], row["view"]) for row in rows] == [(20 + i, v) for v in (0, 1) for i in range(3)]
        for row in rows:
            i, v = row["index"] - 20, row["view"]
            whose = sample((i + 1) % 3 if other else i)  # the queries carry its regions of the other view
            for key, image in (("true", sample(i)), ("asked", whose)):  # both in this view
                x1, y1, x2, y2 = image["boxes"][v, skip:].T.numpy() / 40
                np.testing.assert_allclose(row[key],
                                           np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1), atol=1e-6)
            np.testing.assert_allclose(row["found"], whose["rois"][1 - v if multi_view else v, skip:] / 100, atol=1e-6)
            np.testing.assert_allclose(row["score"], [np.exp(2) / (np.exp(2) + 2)] * (3 - skip), atol=1e-6)


# ==== Recipes ======================================================================================================

def parse(*argv):
    return run.parse_config(siamese_detr.Config, siamese_detr.PRESETS, list(argv), script="siamese_detr",
                            description="", recipe=siamese_detr.recipe_of)


def test_recipes():
    cfg = parse()
    assert ((cfg.detector, cfg.num_regions, cfg.num_queries, cfg.batch_size, cfg.epochs, cfg.lr_drop,
             cfg.lambda_region, cfg.lambda_global, cfg.dim_feedforward, cfg.region_choice)
            == ("conditional_detr", 10, 100, 256, 60, 40, 5, 10, 2048, "top"))
    assert cfg.out == "out/siamese_detr-imagenet"
    assert cfg.scales == tuple(s for s in range(320, 481, 16) if s != 384) and cfg.max_size == 600
    coco = parse("--data", "coco")
    assert ((coco.batch_size, coco.epochs, coco.lr_drop, coco.lambda_region, coco.lambda_global, coco.max_size)
            == (64, 65, 43.3, 3, 0.3, 1333))
    assert coco.scales == tuple(range(480, 801, 32)) and len(coco.scales) == 11
    for detector, weight in (("detr", 3), ("conditional_detr", 5), ("deformable_detr", 3), ("deformable_detr_ss", 3)):
        one = parse("--detector", detector)
        assert (one.lambda_region, one.lambda_global) == (weight, 10)
        assert ((one.num_queries, one.dim_feedforward)
                == ((300, 1024) if detector.startswith("deformable") else (100, 2048)))
        assert ((other := parse("--detector", detector, "--data", "coco")).lambda_region == 3
                and other.lambda_global == 0.3)
    assert proposals.Proposals(cfg).generator.most == 512 and parse("--preset", "demo").max_boxes == 300
    printed = parse("--preset", "paper")
    assert ((printed.lambda_region, printed.lambda_global, printed.region_choice, printed.epochs, printed.lr_drop)
            == (3, 10, "random", 60, 40))
    printed = parse("--preset", "paper", "--data", "coco")
    assert (printed.lambda_region, printed.lambda_global, printed.epochs, printed.lr_drop,
            printed.batch_size) == (0.3, 3, 60, 40, 64)
    demo = parse("--preset", "demo")
    assert demo.data == "synthetic" and demo.num_queries % demo.num_regions == 0
    assert parse("--data", "coco", "--lambda_region", "0.5").lambda_region == 0.5


# ==== Whole runs ===================================================================================================

ROWS = {"untrained", "random_boxes", "shuffled", "wrong_image", "pretrained"}
RUN = {**TINY, "preset": "demo", "synthetic_images": 16, "synthetic_size": 64,
       "batch_size": 4, "probe_images": 4, "log_every": 1, "save_every": 1,
       "dropout": 0.1, "stride": 16, "epochs": 4, "lambda_region": 0.5, "lambda_global": 2.0, "eos_coef": 0.2,
       "max_steps": 3}


def run_script(out, **values):
    return siamese_detr.main(flags({**RUN, "out": out, **values}))


@pytest.fixture
def straight(finished_run):
    return finished_run("siamese_detr")


def test_log_and_table(straight):
    out, metrics = straight
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    terms = ["loss_ce", "loss_bbox", "loss_giou", "loss_feature", "cardinality_error"]
    for line in lines:
        assert line.keys() == {"step", "epoch", "lr", "loss", "loss_global", "class_error",
                               *terms, *(f"{k}_0" for k in terms), "grad_norm",
                               "images_per_s", "memory_gib", "seconds", "fallbacks"}
        weighted = sum(w * line[k + s] for k, w in zip(terms, (1, 5, 2, 0.5)) for s in ("", "_0"))
        assert line["loss"] == pytest.approx(weighted + 2 * line["loss_global"], rel=1e-4)
    assert metrics.keys() == ROWS | {"steps", "primary"} and metrics["steps"] == 3 and metrics["primary"] == "IoU"
    assert all(metrics[row].keys() == {"IoU", "recall50"} and 0 <= metrics[row]["IoU"] <= 1
               and 0 <= metrics[row]["recall50"] <= 1 for row in ROWS)
    assert Image.open(out / "predictions.png").height > 4 * 200
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["step"] == 3 and state["script"] == "siamese_detr" and state["config"]["num_regions"] == n
    names = state["model"].keys()
    assert {"patch2query.weight", "feature_align.layers.1.bias", "enc_head.0.projector.mlp.0.weight",
            "query_embed.weight"} <= names
    assert not any(name.startswith("detector.") for name in names)
    assert (out / "proposals").is_dir()


def test_own_images_with_random_regions(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(9):
        picture(i, (90, 64)).save(tmp_path / "images" / f"{i}.png")
    metrics = run_script(tmp_path / "out", data=tmp_path / "images", max_steps=1,
                  probe_images=3, detector="detr", region_target="none", lambda_global=0,
                  proposal_method="random", multi_view="false", region_choice="random")
    assert metrics.keys() == ROWS | {"steps", "primary"} and not (tmp_path / "out" / "proposals").exists()
    line = json.loads((tmp_path / "out" / "log.jsonl").read_text())
    assert "loss_feature" not in line and "loss_global" not in line and line["fallbacks"] == 0
    assert run_script(tmp_path / "quiet", data=tmp_path / "images", max_steps=1, probe_images=0,
                      cache_proposals="false") == {"steps": 1}


def test_bad_input_ends_in_one_line(fails, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        picture(i).save(folder / f"{i}.png")

    def fail(**values):
        return fails(siamese_detr.main, flags({**RUN, "data": folder, "max_steps": 1, "probe_images": 0,
                                               "batch_size": 2, "out": tmp_path / "out",
                                               "cache_proposals": "false", **values}))

    line = fail(num_regions=3)
    assert ("--num_queries 8 --num_regions 3: every region needs the same number of queries; for example "
            "--num_queries 6" in line)
    assert "--num_regions 1: only the overlap would be left" in fail(num_regions=1)
    assert "random uses no --proposal_store" in fail(proposal_method="random", proposal_store="x")
    for iou in (0, 1.5):
        assert f"--view_iou {float(iou)}: must be at least 0.05 and at most 1" in fail(view_iou=iou)
    assert "the BatchNorm of L_g needs two" in fail(accumulate=2)
    assert "batch_size 2 (global)" in fail(accumulate=3)
    assert not (tmp_path / "out").exists()  # nothing was written until here
    assert "does not exist; build it with: python proposals.py" in fail(proposal_store=tmp_path / "store")
