"""detreg.py: its loss by hand, its samples, its step on one and two processes, and whole runs on drawn images."""
import dataclasses
import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, flags, small_config
from fill import fill
from PIL import Image

import common
import data
import detectors
import detreg
import proposals

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**SMALL, "num_feature_levels": 3, "scales": (48, 64), "max_size": 96,
        "crop_scales": (64, 72), "crop_range": (40, 60), "patch_size": 16,
        "max_prop": 6, "proposal_grid": 64, "backbone_weights": "random", "num_workers": 0, "seed": 3}


def tensor(name, *shape):
    return torch.from_numpy(fill(f"input:{name}", shape))


# ==== Loss =========================================================================================================

def loss_case():
    """Two images, D = 3; the assignment is prescribed: (query 2, target 0), (query 0,
    target 1) and (query 1, target 0)."""
    features = torch.arange(24.0).reshape(2, 4, 3)
    targets = [{"features": torch.tensor([[6.0, 7, 9], [0, 0, 0]])}, {"features": torch.tensor([[15.0, 13, 17]])}]
    pairs = [(torch.tensor([0, 2]), torch.tensor([1, 0])), (torch.tensor([1]), torch.tensor([0]))]
    return features, targets, pairs  # |0-0|+|1-0|+|2-0| = 3; |6-6|+|7-7|+|8-9| = 1; |15-15|+|16-13|+|17-17| = 3


def test_embedding_loss_by_hand():
    assert detreg.embedding_loss(*loss_case(), 3 * 3).item() == pytest.approx(7 / 9)
    # the normaliser of several processes
    assert detreg.embedding_loss(*loss_case(), 2.5 * 3).item() == pytest.approx(7 / 7.5)
    features, targets, _ = loss_case()
    none = [(torch.zeros(0, dtype=torch.int64),) * 2] * 2
    features.requires_grad_()
    empty = detreg.embedding_loss(features, targets, none, 3)
    empty.backward()
    assert empty.item() == 0 and not features.grad.any()


def test_detreg_loss_is_the_weighted_sum():
    features, targets, pairs = loss_case()
    boxes = tensor("boxes", 2, 4, 4).sigmoid()
    layers = [{"pred_logits": tensor(f"logits{i}", 2, 4, 2), "pred_boxes": boxes} for i in range(2)]
    targets = [{**t, "labels": torch.ones(n, dtype=torch.int64), "boxes": tensor(f"true{n}", n, 4).sigmoid()}
               for n, t in zip((2, 1), targets)]
    outputs = {**layers[1], "aux_outputs": layers[:1], "pred_features": features}
    cfg = small_config(detreg.Config, num_classes=2, lambda_f=1.5, lambda_l1=4.0, lambda_giou=3.0, lambda_e=0.7)
    criterion = detreg.build_criterion(cfg)
    assert (criterion.matcher.cost_class, criterion.matcher.cost_bbox, criterion.matcher.cost_giou) == (1.5, 4.0, 3.0)

    class Prescribed(common.HungarianMatcher):
        def __call__(self, layers, targets):
            return [pairs] * len(layers)

    criterion.matcher = Prescribed()
    # global: what all processes say; local: the pairs that are here
    for mean, count in (("global", 4.0), ("local", 3)):
        total, losses = detreg.detreg_loss(dataclasses.replace(cfg, embedding_mean=mean), criterion,
                                           outputs, targets, 3.0, 4.0)
        assert losses["loss_object_embedding"].item() == pytest.approx(7 / (3 * count), rel=1e-6)
        value = {k: v.item() for k, v in losses.items()}
        assert "loss_object_embedding_0" not in value                     # the last layer only
        assert total.item() == pytest.approx(
            1.5 * (value["loss_ce"] + value["loss_ce_0"]) + 4 * (value["loss_bbox"] + value["loss_bbox_0"])
            + 3 * (value["loss_giou"] + value["loss_giou_0"]) + 0.7 * value["loss_object_embedding"], rel=1e-6)
        l1 = sum(abs(boxes[i, q] - targets[i]["boxes"][t]).sum().item()
                 for i, (qs, ts) in enumerate(pairs) for q, t in zip(qs, ts))
        assert value["loss_bbox"] == value["loss_bbox_0"] == pytest.approx(l1 / 3, rel=1e-5)


def test_descriptor_is_the_mean_of_stage_two():
    torch.manual_seed(0)
    backbone = common.Backbone("resnet18", norm="bn")
    descriptor = detreg.RegionDescriptor(backbone).eval()
    assert descriptor.dim == 128
    patches = tensor("patches", 3, 3, 32, 32)
    with torch.no_grad():
        stage = common.Backbone("resnet18", (2,), "bn")
        stage.body.load_state_dict({k: v for k, v in backbone.body.state_dict().items()
                                    if not k.startswith(("layer3", "layer4"))})
        expected = stage.eval()(patches)[0].double().numpy().mean((2, 3))
        before = descriptor(patches)
        np.testing.assert_allclose(before.numpy(), expected, atol=1e-6)
        for parameter in backbone.parameters():  # a copy: training the backbone leaves the targets alone
            parameter.add_(1.0)
        assert torch.equal(descriptor(patches), before)


def test_models_follow_seed_and_descriptor():
    cfg = detreg.Config(**TINY)
    model, descriptor = detreg.build_models(cfg)
    again, _ = detreg.build_models(cfg)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(detreg.build_models(dataclasses.replace(cfg, seed=4))[0].detector.query_embed.weight,
                           model.detector.query_embed.weight)
    assert model.feature_embed.layers[-1].out_features == 128 and not descriptor.training
    assert not any(p.requires_grad for p in descriptor.parameters())
    assert torch.equal(descriptor.body[0].weight, model.detector.backbone[0].body.conv1.weight)


# ==== Samples ======================================================================================================

def blocks(seed, size=(96, 72)):
    """An image of coloured blocks: selective search finds a good number of boxes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        blocks(i).save(folder / f"{i}.png")
    return folder


def regions(folder, indices=None, store=None, **values):
    cfg = detreg.Config(**{**TINY, "data": str(folder), **values})
    source = data.open_images(str(folder), None)
    indices = np.arange(len(source)) if indices is None else np.asarray(indices)
    return detreg.RegionDataset(cfg, source, indices, proposals.Proposals(cfg, store))


def equal(a, b):
    return torch.equal(a["image"], b["image"]) and all(torch.equal(a["target"][k], b["target"][k])
                                                       for k in ("boxes", "labels", "patches"))


def test_samples(folder):
    dataset = regions(folder)
    for key in ((0, 0), (0, 3), (7, 1)):
        sample = dataset[key]
        target, n = sample["target"], len(sample["target"]["labels"])
        assert equal(sample, regions(folder)[key]) and not equal(sample, dataset[key[0] + 1, key[1]])
        assert (2 <= n <= 6 and target["labels"].tolist() == [1] * n and target["boxes"].shape == (n, 4)
                and target["patches"].shape == (n, 3, 16, 16))
        corners = torch.cat([target["boxes"][:, :2] - target["boxes"][:, 2:] / 2,
                             target["boxes"][:, :2] + target["boxes"][:, 2:] / 2], 1)
        assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6 and (target["boxes"][:, 2:] > 0).all()
        assert min(sample["image"].shape[1:]) in (48, 64) and max(sample["image"].shape[1:]) <= 96
        assert sample["fallback"] == 0 and sample["skipped"] == []


PLAIN = {"scales": (72,), "max_size": 96, "crop_scales": ()}  # the 96 x 72 images as they are, but for the flip


def test_patches_and_boxes_are_those_of_the_regions(folder):
    dataset = regions(folder, **PLAIN)
    dataset.photometric = data.Photometric(0, 0, 0, 0, p_jitter=0, p_gray=0, p_blur=0)
    boxes = np.float32([[10, 8, 40.4, 30.6], [0, 0, 96, 72], [50, 20, 90, 70]])
    dataset.proposals_of = lambda image, index, epoch: boxes
    for epoch in range(4):                                                # with and without the flip
        sample, image = dataset[epoch, 2], blocks(2)
        flipped = not torch.equal(sample["image"], data.to_normalized_tensor(image))
        shown = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image
        assert torch.equal(sample["image"], data.to_normalized_tensor(shown))
        x1, x2 = ((96 - boxes[:, 2], 96 - boxes[:, 0]) if flipped else (boxes[:, 0], boxes[:, 2]))
        wanted = np.stack([(x1 + x2) / 2 / 96, (boxes[:, 1] + boxes[:, 3]) / 2 / 72, (x2 - x1) / 96,
                           (boxes[:, 3] - boxes[:, 1]) / 72], 1)
        np.testing.assert_allclose(sample["target"]["boxes"].numpy(), wanted, atol=1e-6)
        for patch, box in zip(sample["target"]["patches"],
                              ((10, 8, 40, 31), (0, 0, 96, 72), (50, 20, 90, 70)), strict=True):
            # of the image as stored, not flipped
            crop = np.asarray(image.crop(box).resize((16, 16), Image.Resampling.BILINEAR)) / 255
            expected = ((crop - data.IMAGENET_MEAN) / data.IMAGENET_STD).transpose(2, 0, 1)
            np.testing.assert_allclose(patch.numpy(), expected, atol=1e-5)


def test_a_cut_box_keeps_the_descriptor_of_its_region(folder):
    dataset = regions(folder, scales=(32,), crop_scales=(72,), crop_range=(36, 36))
    dataset.photometric = data.Photometric(0, 0, 0, 0, p_jitter=0, p_gray=0, p_blur=0)
    boxes = np.float32([[0, 0, 96, 72], [2, 2, 20, 20], [70, 50, 95, 70], [30, 20, 60, 50]])
    dataset.proposals_of = lambda image, index, epoch: boxes
    counts = set()
    for epoch in range(12):
        target = dataset[epoch, 0]["target"]
        image = blocks(0)
        every = [data.cut_patch(image, b, dataset.cfg.patch_size,
                                data.draw_photometric(np.random.default_rng(0), dataset.photometric))
                 for b in boxes.tolist()]
        which = [next(k for k, e in enumerate(every) if torch.equal(e, patch)) for patch in target["patches"]]
        assert which == sorted(which) and which[0] == 0 and len(which) == len(target["boxes"])
        counts.add(len(which))
    assert len(counts) > 1  # some crops have lost boxes, and their patches with them


def test_flat_image_is_replaced(folder):
    Image.new("RGB", (96, 72), (200, 30, 60)).save(folder / "9.png")
    assert proposals.selective_search(np.asarray(Image.open(folder / "9.png")), grid=64,
                                      seed=1).tolist() == [[0, 0, 96, 72]]
    dataset = regions(folder, **PLAIN)
    drawn = set()
    for epoch in range(8):
        sample = dataset[epoch, 4]
        assert sample["fallback"] == 0 and len(sample["target"]["labels"]) >= 2
        drawn |= {i for i in range(4) for image in (blocks(i), blocks(i).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
                  if torch.equal(sample["image"], data.to_normalized_tensor(image))}
    assert len(drawn) > 1                                                 # not one and the same stand-in


def test_only_flat_images_end_in_jittered_full_boxes(tmp_path):
    for i in range(3):
        Image.new("RGB", (96, 72), (200, 30 * i, 60)).save(tmp_path / f"{i}.png")
    sample = regions(tmp_path, **PLAIN)[0, 1]
    boxes = sample["target"]["boxes"]
    assert sample["fallback"] == 1 and boxes.shape == (2, 4) and sample["target"]["patches"].shape == (2, 3, 16, 16)
    assert (boxes[:, 2:] >= 0.8).all() and (boxes[:, 2:] <= 1).all() and not torch.equal(boxes[0], boxes[1])
    assert data.collate([sample, sample, {**sample, "fallback": 0}])["fallback"] == 2
    two = detreg.jittered_full_boxes((50, 200), np.random.default_rng(0))
    low, high, end = (torch.tensor(corner) for corner in ((20, 5), (180, 45), (200, 50)))
    assert (two[:, :2] <= low).all() and (two[:, 2:] >= high).all() and (two[:, 2:] <= end).all() and (two >= 0).all()


def test_strategies(folder):
    blocks(9, (48, 120)).save(folder / "9.png")
    everything = np.float32([[i, 2 * i, i + 10, 2 * i + 20] for i in range(20)])

    def propose(strategy, indices=(0,), **values):
        dataset = regions(folder, indices, strategy=strategy, **values)
        if not values.get("real"):
            dataset.proposals_of = lambda image, *_: everything[:19] if image.size == (96, 72) else everything
        return dataset.propose(dataset.source.load(0), 0, 0, np.random.default_rng(5))

    assert np.array_equal(propose("topk"), everything[:6])
    random = propose("randomk")[:, 0].astype(int).tolist()
    assert len(random) == 6 and random == sorted(set(random)) and random != list(range(6)) and max(random) < 19
    sampled = propose("importance")[:, 0].astype(int).tolist()
    assert sampled == sorted(set(sampled)) and set(sampled) <= set(range(19))
    # the boxes of the 48 x 120 image, stretched to 96 x 72
    np.testing.assert_allclose(propose("other_image", [4]), everything[:6] * np.float32([2, 0.6, 2, 0.6]), rtol=1e-6)


def test_store_and_online_boxes(folder, tmp_path):
    online = regions(folder)
    generator = online.proposals_of.generator
    assert ((generator.method, generator.mode, generator.grid, generator.rank, generator.seed)
            == ("selective_search", "fast", 64, "opencv", 3))
    assert proposals.Proposals(dataclasses.replace(online.cfg, proposal_grid=0)).generator.grid is None
    store = proposals.build_store(tmp_path / "store", online.source, generator, progress=False)
    stored = regions(folder, store=store)
    image = online.source.load(2)
    fixed = generator(image, proposals.image_seed(3, "2.png"))
    draws = [online.proposals_of(image, 2, epoch) for epoch in (0, 1)]
    for epoch in (0, 1):
        assert np.array_equal(stored.proposals_of(image, 2, epoch), fixed)    # one frozen order
        assert np.array_equal(draws[epoch], generator(image, proposals.image_seed(3, epoch, 2)))
    assert (not np.array_equal(*draws) and sorted(map(tuple, draws[0])) == sorted(map(tuple, draws[1]))
            == sorted(map(tuple, fixed)))


# ==== The step: one process, accumulation, two processes ===========================================================

COUNTS = (3, 1, 7, 0)  # boxes per image: 4 on the first process, 7 on the second


def step_case():
    cfg = small_config(detreg.Config, num_classes=3, clip_max_norm=0.0, lr_backbone=2e-5,
                       num_queries=6, num_feature_levels=3)
    torch.manual_seed(0)
    model = detreg.DETReg(detectors.build_detector(cfg, cfg.num_classes, focal=True), embedding_dim=5)
    for bbox in model.detector.bbox_embed:  # it starts at zero: no gradient below it
        torch.nn.init.normal_(bbox.layers[-1].weight, std=0.05)
    images, mask = tensor("step_images", 4, 3, 32, 48), torch.zeros(4, 32, 48, dtype=torch.bool)
    mask[1, 24:], mask[2, :, 30:] = True, True
    images = images.masked_fill(mask[:, None], 0.0)
    targets = [{"labels": torch.ones(n, dtype=torch.int64), "boxes": tensor(f"step_boxes{i}", n, 4).mul(0.5).sigmoid(),
                "patches": tensor(f"step_z{i}", n, 5)} for i, n in enumerate(COUNTS)]
    return cfg, model, {"images": images, "mask": mask, "targets": targets}


def pieces(batch, start, stop, parts):
    size = (stop - start) // parts
    return [{k: v[i:i + size] for k, v in batch.items()} for i in range(start, stop, size)]


@functools.cache
def one_step(start=0, stop=4, accumulate=1, mean="global"):
    """detreg.train_step on images start..stop -> (terms, gradients). The descriptor is the identity:
    "patches" are the descriptors."""
    cfg, model, batch = step_case()
    cfg = dataclasses.replace(cfg, accumulate=accumulate, embedding_mean=mean)
    optimizer = common.build_optimizer(cfg, model)
    wrapped = common.wrap_model(model.train(), CPU)
    micro_batches = pieces(batch, start, stop, accumulate)
    terms = detreg.train_step(cfg, wrapped, torch.nn.Identity(), detreg.build_criterion(cfg),
                              optimizer, micro_batches, CPU)
    return ({k: v.item() for k, v in terms.items()},
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def worker():
    """What one of two processes does (conftest.two_processes)."""
    r = common.rank()
    return {accumulate: one_step(2 * r, 2 * r + 2, accumulate) for accumulate in (1, 2)}


def same_step(results, whole):
    """Terms averaged over processes and gradients are those of one process; the processes agree among themselves."""
    terms, gradients = whole
    largest = max(g.abs().max() for g in gradients.values())
    for name in terms:
        if "error" not in name:  # log values: means of means
            assert np.mean([r[0][name] for r in results]) == pytest.approx(terms[name], rel=1e-5), name
    for _, mine in results:
        assert mine.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (mine[name] - gradient).abs().max() <= 1e-5 * largest, name


def test_accumulation_is_one_batch():
    whole = one_step()
    assert whole[0]["loss_object_embedding"] > 0 and whole[0]["loss_bbox"] > 0 and len(whole[1]) > 100
    assert any(n.startswith("detector.backbone.0.body.layer2") for n in whole[1])
    z = torch.cat([t["patches"] for t in step_case()[2]["targets"]])
    assert whole[0]["mean_embedding_error"] == pytest.approx((z - z.mean(0)).abs().mean().item(), rel=1e-5)
    for accumulate in (2, 4):                                             # with 4, one micro-batch has no box at all
        same_step([one_step(accumulate=accumulate)], whole)
    norm = np.sqrt(sum(float((g.double() ** 2).sum()) for g in whole[1].values()))
    assert whole[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_two_processes_are_one_batch(two_processes):
    results, whole = two_processes["test_detreg"], one_step()
    for accumulate in (1, 2):
        same_step([r[accumulate] for r in results], whole)
    assert results[0][1][0]["loss_bbox"] != results[1][1][0]["loss_bbox"]  # each saw its own images


def test_log_values_do_not_grow_with_accumulation():
    for accumulate in (1, 2, 4):
        terms = one_step(accumulate=accumulate)[0]
        assert (terms["class_error"] <= 100
                and terms["cardinality_error"] == pytest.approx(one_step()[0]["cardinality_error"]))


def test_local_mean_under_accumulation():
    halves = [one_step(start, start + 2, mean="local")[0]["loss_object_embedding"] for start in (0, 2)]
    assert one_step(accumulate=2, mean="local")[0]["loss_object_embedding"] == pytest.approx(np.mean(halves), rel=1e-5)


def test_a_step_reports_nan():
    cfg, model, batch = step_case()
    torch.nn.init.constant_(model.feature_embed.layers[-1].weight, torch.nan)
    terms = detreg.train_step(cfg, model, torch.nn.Identity(), detreg.build_criterion(cfg),
                              common.build_optimizer(cfg, model), [batch], CPU)
    assert terms["loss"].isnan() and terms["grad_norm"].isnan() and terms["loss_bbox"].isfinite()  # for FiniteWatch


# ==== Whole runs ===================================================================================================

ROWS = {"untrained", "random_boxes", "shuffled", "selective_search", "pretrained"}
RUN = {**TINY, "preset": "demo", "synthetic_images": 16, "synthetic_size": 64, "batch_size": 4, "probe_images": 4,
       "log_every": 1, "save_every": 1, "dropout": 0.1, "max_steps": 4}


def run_script(out, **values):
    return detreg.main(flags({**RUN, "out": out, **values}))


def test_log_and_table(finished_run):
    out, metrics = finished_run("detreg")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    layers = ["loss_ce", "loss_bbox", "loss_giou", "cardinality_error"]
    for line in lines:
        assert line.keys() == {"step", "epoch", "lr", "loss", "loss_object_embedding",
                               "mean_embedding_error", "class_error", *layers, *(f"{k}_0" for k in layers),
                               "grad_norm", "images_per_s", "memory_gib", "seconds", "fallbacks"}
        weighted = sum(w * line[k + s]
                       for k, w in (("loss_ce", 2), ("loss_bbox", 5), ("loss_giou", 2)) for s in ("", "_0"))
        assert line["loss"] == pytest.approx(weighted + line["loss_object_embedding"], rel=1e-4)
        assert line["epoch"] == 0
    assert metrics.keys() == ROWS | {"steps", "primary", "ground_truth"} and metrics["steps"] == 4
    assert metrics["primary"] == "AR100" and metrics["ground_truth"] == "annotations"
    assert all({"AP", "AP50", "AP75", "AR1", "AR10", "AR100"} <= metrics[row].keys() for row in ROWS)
    assert all(0 <= metrics[row]["AR1"] <= metrics[row]["AR10"] <= metrics[row]["AR100"] <= 1 for row in ROWS)
    config = torch.load(out / "last.pt", weights_only=True)["config"]
    assert config["data"] == "synthetic" and config["scales"] == (48, 64)


def test_own_images_with_held_out_ones(folder, tmp_path):
    for i in range(4, 9):
        blocks(i).save(folder / f"{i}.png")
    metrics = run_script(tmp_path / "out", data=folder, max_steps=1, probe_images=3,
                         strategy="randomk", cache_proposals="false")
    rows = ROWS - {"selective_search"}  # it would be scored on its own output
    assert {name for name, row in metrics.items() if isinstance(row, dict)} == rows
    assert metrics["ground_truth"] == "held-out proposals" and all(0 <= metrics[row]["AR100"] <= 1 for row in rows)
    assert not (tmp_path / "out" / "proposals").exists() and (tmp_path / "out" / "predictions.png").exists()
    assert json.loads((tmp_path / "out" / "log.jsonl").read_text())["epoch"] == 0


# ==== Bad input ====================================================================================================

def test_bad_input_ends_in_one_line(fails, folder, tmp_path):
    def fail(**values):
        short = {"cache_proposals": "false", "max_steps": 1, "probe_images": 0,
                 "batch_size": 2, "out": tmp_path / "out"}
        return fails(detreg.main, flags({**RUN, **short, **values}))

    (tmp_path / "empty").mkdir()
    assert "no images" in (line := fail(data=tmp_path / "empty")) and str(tmp_path / "empty") in line
    (tmp_path / "list.txt").write_text("images/0.png\nimages/absent.png\n")
    assert "list.txt, line 2" in (line := fail(data=tmp_path / "list.txt")) and "absent.png" in line
    assert "batch_size 6" in fail(data=folder, batch_size=6, accumulate=4)
    assert "--probe_images" in fail(data=folder, probe_images=2)
    assert str(tmp_path / "labels.json") in fail(data=folder, probe_data=tmp_path / "labels.json")   # before training
    assert "--num_classes 1" in fail(data=folder, num_classes=1) and "--accumulate 0" in fail(data=folder, accumulate=0)
    assert "--crop_range 60 40" in fail(data=folder, crop_range=(60, 40))
    assert not (tmp_path / "out").exists()                                # nothing was written until here
    assert "--nheads 5" in fail(data=folder, nheads=5)
    assert str(tmp_path / "b.pth") in fail(data=folder, backbone_weights=tmp_path / "b.pth")
    store = tmp_path / "store"
    assert "does not exist; build it with: python proposals.py" in fail(data=folder, proposal_store=store)
    other = data.SyntheticScenes(4, 32)
    proposals.build_store(store, other, proposals.Generator(grid=32), progress=False)
    assert f"{store} does not fit these images" in fail(data=folder, proposal_store=store)
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"broken")
    assert "11 images in a row cannot be used" in (line := fail(data=folder)) and ".png" in line
    blocks(0).save(folder / "5.png"), blocks(1).save(folder / "6.png"), blocks(2).save(folder / "7.png")
    assert "(more than 1 %)" in (line := fail(data=folder, batch_size=7)) and ".png" in line


def test_our_own_fault_keeps_its_traceback(folder, tmp_path):
    code = ("import sys, run, detreg\n"
            "detreg.build_models = lambda cfg: {}['internal fault']\n"
            "sys.argv = ['detreg.py', *sys.argv[1:]]\n"
            "run.cli(detreg.main)")
    argv = flags({**RUN, "data": folder, "cache_proposals": "false", "probe_images": 0, "out": tmp_path / "out"})
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'internal fault'" in done.stderr
            and "error: " not in done.stderr)
