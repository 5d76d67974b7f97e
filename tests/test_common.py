"""common.py and the readers of foreign weights in convert.py: values against float64 numpy and hand calculation."""
import dataclasses
import functools
import itertools
import math
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import small_config
from fill import fill
from torch import nn

import common
import convert
import detectors
import finetune
import updetr
from common import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def tensor(name, *shape):
    return torch.from_numpy(fill(f"input:{name}", shape))


def filled(module):
    """The module with weights that depend on their names alone."""
    module.load_state_dict({k: torch.from_numpy(fill(k, tuple(v.shape))) for k, v in module.state_dict().items()})
    return module


# ==== Processes ====


def test_what_becomes_sync_batchnorm(monkeypatch):
    """SyncBatchNorm raises on CPU process groups, so only the conversion is looked at: on CUDA every trained BatchNorm,
    but for DUPR's."""
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel",
                        lambda model, device_ids=None, broadcast_buffers=True, **_: model)
    for device, sync_bn, synced in (("cuda", True, True), ("cuda", False, False), ("cpu", True, False)):
        backbone = common.Backbone("resnet18", (1, 2, 3, 4), "bn", trainable=5)
        names = list(backbone.state_dict())
        wrapped = common.wrap_model(backbone, torch.device(device), sync_bn=sync_bn)
        norms = [m for m in wrapped.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 20 and all(isinstance(m, torch.nn.SyncBatchNorm) == synced for m in norms)
        assert list(wrapped.state_dict()) == names


def test_batches_go_to_the_device_whole():
    batch = {"images": torch.ones(2), "targets": [{"boxes": torch.ones(3), "path": "a.png"}], "index": [4, 5]}
    moved = common.batch_to_device(batch, torch.device("meta"))
    assert moved["images"].is_meta and moved["targets"][0]["boxes"].is_meta
    assert moved["targets"][0]["path"] == "a.png" and moved["index"] == [4, 5]


# ==== Deformable attention and positions ====


def sample(level, x, y):
    """float64 bilinear sample of level [H, W, D] at (x, y) in 0..1: pixel i has its centre at (i + .5) / W, outside is
    zero."""
    H, W, D = level.shape
    column, row = x * W - 0.5, y * H - 0.5
    total = np.zeros(D)
    for j in (math.floor(row), math.floor(row) + 1):
        for i in (math.floor(column), math.floor(column) + 1):
            if 0 <= j < H and 0 <= i < W:
                total += (1 - abs(row - j)) * (1 - abs(column - i)) * level[j, i]
    return total


def sampled(value, shapes, locations, weights):
    """value [B, S, M, D], locations [B, Q, M, L, P, 2], weights [B, Q, M, L, P] -> [B, Q, M * D], loop by loop."""
    B, _, M, D = value.shape
    output = np.zeros((B, locations.shape[1], M, D))
    for b, q, m, p in itertools.product(range(B), range(locations.shape[1]), range(M), range(locations.shape[4])):
        start = 0
        for l, (H, W) in enumerate(shapes):
            level = value[b, start:start + H * W, m].reshape(H, W, D)
            output[b, q, m] += weights[b, q, m, l, p] * sample(level, *locations[b, q, m, l, p])
            start += H * W
    return output.reshape(B, locations.shape[1], M * D)


SHAPES = [(3, 5), (2, 2)]


def test_deformable_sampling_against_loops():
    rng = np.random.default_rng(0)
    value = rng.standard_normal((2, 19, 2, 3))
    weights = rng.random((2, 4, 2, 2, 3))
    locations = rng.uniform(-0.4, 1.4, (2, 4, 2, 2, 3, 2))  # a good part lies outside
    locations[0, 0, 0, 0, 0] = (0.1, 0.5)  # a pixel centre
    locations[0, 0, 0, 0, 1] = (0.0, 0.0)  # the corner: a quarter of one pixel
    assert sample(np.ones((3, 5, 1)), 0.0, 0.0) == 0.25 and sample(np.arange(15.0).reshape(3, 5, 1), 0.1, 0.5) == 5.0
    inputs = [torch.from_numpy(array) for array in (value, locations, weights)]
    output = common.multi_scale_deformable_attention(inputs[0], SHAPES, *inputs[1:])
    np.testing.assert_allclose(output.numpy(), sampled(value, SHAPES, locations, weights), atol=1e-12)


@pytest.mark.parametrize("coordinates", (2, 4))
def test_deformable_attention_module(coordinates):
    module = filled(common.MSDeformAttn(8, 2, 2, 3))
    query, source = tensor("query", 2, 4, 8), tensor("source", 2, 19, 8)
    mask = torch.zeros(2, 19, dtype=torch.bool)
    mask[1, [4, 9, 14, 16, 18]] = True
    reference = torch.from_numpy(np.random.default_rng(1).uniform(0.05, 0.95, (2, 4, 2, coordinates))).float()
    w = {k: v.double().numpy() for k, v in module.state_dict().items()}
    q, s, r = query.double().numpy(), source.double().numpy(), reference.double().numpy()
    value = s @ w["value_proj.weight"].T + w["value_proj.bias"]
    value[mask.numpy()] = 0  # after the projection: its bias does not come back
    # head, level, point, (x, y)
    offsets = (q @ w["sampling_offsets.weight"].T + w["sampling_offsets.bias"]).reshape(2, 4, 2, 2, 3, 2)
    logits = np.exp(q @ w["attention_weights.weight"].T + w["attention_weights.bias"]).reshape(2, 4, 2, 6)
    weights = (logits / logits.sum(-1, keepdims=True)).reshape(2, 4, 2, 2, 3)
    locations = np.zeros((2, 4, 2, 2, 3, 2))
    for l, (H, W) in enumerate(SHAPES):
        around = r[:, :, None, l, None, :2]
        step = 1 / np.array([W, H]) if coordinates == 2 else r[:, :, None, l, None, 2:] / 2 / 3
        locations[:, :, :, l] = around + offsets[:, :, :, l] * step
    expected = sampled(value.reshape(2, 19, 2, 4), SHAPES, locations, weights)
    expected = expected @ w["output_proj.weight"].T + w["output_proj.bias"]
    np.testing.assert_allclose(module(query, reference, source, SHAPES, mask).detach().numpy(), expected, atol=2e-6)


@pytest.mark.cuda
def test_deformable_attention_is_the_same_on_cuda():
    torch.manual_seed(0)
    shapes = [(7, 9), (4, 5)]
    value = torch.randn(2, 83, 4, 8)
    locations = torch.rand(2, 11, 4, 2, 3, 2) * 1.4 - 0.2
    weights = torch.rand(2, 11, 4, 2, 3)
    here = common.multi_scale_deformable_attention(value, shapes, locations, weights)
    there = common.multi_scale_deformable_attention(value.cuda(), shapes, locations.cuda(), weights.cuda())
    torch.testing.assert_close(there.cpu(), here, atol=1e-5, rtol=1e-5)


def test_sine_position_of_one_row():
    mask = torch.tensor([[[False, False, False, True]]])
    encoded = common.PositionEmbeddingSine(4)(mask)[0, :, 0, :3].double().numpy()  # the padded column is never read
    y = math.pi  # (1 - .5) / 1 * 2 pi; frequencies 1, 1, 100, 100
    for i, x in enumerate(((k - 0.5) / 3 * 2 * math.pi for k in (1, 2, 3))):
        wanted = [math.sin(y), math.cos(y), math.sin(y / 100), math.cos(y / 100), math.sin(x), math.cos(x),
                  math.sin(x / 100), math.cos(x / 100)]
        np.testing.assert_allclose(encoded[:, i], wanted, atol=1e-5)
    unshifted = common.PositionEmbeddingSine(4, offset=0.0)(mask)[0, 4, 0, :3]
    np.testing.assert_allclose(unshifted, np.sin([2 * math.pi / 3, 4 * math.pi / 3, 2 * math.pi]), atol=1e-5)


# ==== Models ====


@pytest.mark.parametrize("norm", ("frozen", "bn"))
@pytest.mark.parametrize(("trainable", "learning"), ((0, set()), (3, {"layer2", "layer3", "layer4"}),
                                                     (5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"})))
def test_what_of_the_backbone_learns(norm, trainable, learning):
    body = common.Backbone("resnet18", norm=norm, trainable=trainable).body
    names = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    assert names == learning - ({"bn1"} if norm == "frozen" else set())  # frozen BatchNorm has buffers only
    fixed = {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
    assert not fixed & learning


@pytest.mark.parametrize(("arch", "channels"),
                         (("resnet18", (64, 128, 256, 512)), ("resnet50", (256, 512, 1024, 2048))))
def test_backbone_outputs(arch, channels):
    with torch.no_grad():
        for layers in ((1, 2, 3, 4), (2, 3)):
            backbone = common.Backbone(arch, layers).eval()
            shapes = [tuple(f.shape) for f in backbone(torch.zeros(1, 3, 32, 64))]
            assert shapes == [(1, channels[i - 1], 32 >> i + 1, 64 >> i + 1) for i in layers]  # strides 4, 8, 16, 32
            assert backbone.num_channels == [channels[i - 1] for i in layers]
            assert ([n for n, _ in backbone.body.named_children() if n.startswith("layer")]
                    == [f"layer{i}" for i in range(1, max(layers) + 1)])


def test_build_detector_follows_lr_backbone_and_norm():
    def learning(**values):
        model = detectors.build_detector(small_config(finetune.Config, **values), 3, focal=True)
        return {n.split(".")[3] for n, p in model.named_parameters() if n.startswith("backbone.0") and p.requires_grad}

    assert learning(lr_backbone=0.0) == learning(lr_backbone=0.0, backbone_norm="bn") == set()
    assert learning() == {"layer2", "layer3", "layer4"}
    assert learning(backbone_norm="bn") == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}


def batch(*sizes):
    """Images of the given (h, w), padded as data.collate does."""
    height, width = (max(s[i] for s in sizes) for i in (0, 1))
    images, mask = torch.zeros(len(sizes), 3, height, width), torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w], mask[i, :h, :w] = tensor(f"image{i}", 3, h, w), False
    return images, mask


@pytest.mark.parametrize(("hidden_dim", "nheads"), ((64, 3), (48, 4)))
def test_widths_that_do_not_divide_are_refused(hidden_dim, nheads):
    detectors.check_detector(small_config(finetune.Config))
    with pytest.raises(UserError, match=f"^--hidden_dim {hidden_dim} with --nheads {nheads}: the width must"):
        detectors.check_detector(small_config(finetune.Config, hidden_dim=hidden_dim, nheads=nheads))


@pytest.mark.parametrize("levels", (1, 2, 4, 5))
@pytest.mark.parametrize("refine", (False, True))
def test_detector_outputs_and_initial_values(levels, refine):
    torch.manual_seed(0)
    cfg = small_config(finetune.Config, num_feature_levels=levels, with_box_refine=refine)
    model = detectors.build_detector(cfg, 3, focal=True).eval()
    with torch.no_grad():
        outputs = model(*batch((64, 96), (80, 64)))
    assert set(outputs) == {"pred_logits", "pred_boxes", "aux_outputs", "hs", "memory"}
    assert len(outputs["aux_outputs"]) == 1
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_logits"].shape == (2, 8, 3) and layer["pred_boxes"].shape == (2, 8, 4)
        assert layer["hs"].shape == (2, 8, 64)
        assert ((layer["pred_boxes"] > 0) & (layer["pred_boxes"] < 1)).all()
    first = 8 << max(3 - levels, 0)  # stride of the first level; the images are 80 x 96 together
    assert ([m.shape for m in outputs["memory"]]
            == [(2, 64, -(-80 // (first << i)), -(-96 // (first << i))) for i in range(levels)])
    # the box head starts at zero: every box stands on its reference point, as large as its bias says
    references = torch.sigmoid(model.transformer.reference_points(model.query_embed.weight[:, :64]))
    size = torch.sigmoid(torch.tensor(-2.0)).item()
    for layer in (outputs, *outputs["aux_outputs"]):
        torch.testing.assert_close(layer["pred_boxes"][..., :2], references.expand(2, 8, 2), atol=1e-5, rtol=0)
        assert (layer["pred_boxes"][..., 2:] - size).abs().max() < 1e-5
    assert all((c.bias - -4.59511985).abs().max() < 1e-5 for c in model.class_embed)
    last = [b.layers[-1] for b in model.bbox_embed]
    assert not any(l.weight.any() for l in last)
    assert [l.bias.tolist() for l in last] == [[0, 0, -2, -2], [0, 0, 0, 0] if refine else [0, 0, -2, -2]]
    assert (model.class_embed[0] is model.class_embed[1]) != refine
    assert (model.bbox_embed[0] is model.bbox_embed[1]) != refine
    assert len(model.input_proj) == levels and model.transformer.level_embed.shape == (levels, 64)
    assert [p[0].in_channels for p in model.input_proj] == ({1: [512], 2: [256, 512]}.get(levels)
                                                            or [128, 256, 512, 512, 64][:levels])
    names = model.state_dict()
    assert ("transformer.decoder.bbox_embed.0.layers.0.weight" in names) == refine
    assert "bbox_embed.1.layers.2.bias" in names


@pytest.mark.parametrize("refine", (False, True))
def test_padding(refine):
    cfg = small_config(finetune.Config, with_box_refine=refine)
    model = filled(detectors.build_detector(cfg, 3, focal=True)).eval()
    images, mask = batch((32, 40), (64, 48))
    with torch.no_grad():
        both, alone = model(images, mask), model(images[:1], mask[:1])
        for key in ("pred_logits", "pred_boxes", "hs"):  # what else is in the batch plays no part
            torch.testing.assert_close(both[key][:1], alone[key], atol=2e-5, rtol=1e-5)


def pyramid():
    """Two levels, batch of two; the right third and the lower half of image 1 are padding."""
    masks = [torch.zeros(2, 4, 6, dtype=torch.bool), torch.zeros(2, 2, 3, dtype=torch.bool)]
    masks[0][1, :, 4:], masks[1][1, :, 2:] = True, True
    masks[0][1, 2:], masks[1][1, 1:] = True, True
    sources = [tensor(f"source{l}", 2, 16, *m.shape[1:]) for l, m in enumerate(masks)]
    return sources, masks, [common.PositionEmbeddingSine(8)(m) for m in masks]


def small_transformer(refine):
    model = common.DeformableTransformer(16, 2, 1, 2, 24, 0.0, 2, 2).eval()
    if refine:
        model.decoder.bbox_embed = nn.ModuleList(common.MLP(16, 16, 4, 3) for _ in range(2))
    return filled(model)


@pytest.mark.parametrize("refine", (False, True))
def test_content_of_padding_does_not_reach_the_transformer(refine):
    model, (sources, masks, positions), query = small_transformer(refine), pyramid(), tensor("query_embed", 5, 32)
    with torch.no_grad():
        first = model(sources, masks, positions, query)
        other = [torch.where(m[:, None], torch.full_like(s, 30.0), s) for s, m in zip(sources, masks)]
        second = model(other, masks, positions, query)
        for a, b in zip(first[:3], second[:3]):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        valid = ~torch.cat([m.flatten(1) for m in masks], 1)
        torch.testing.assert_close(first[3][valid], second[3][valid], atol=1e-6, rtol=0)
        # the same image without its padding: positions, centres and references are relative to the image,
        # a sample beyond its border is zero
        cut = ([s[1:, :, :h, :w] for s, (h, w) in zip(sources, ((2, 4), (1, 2)))],
               [torch.zeros(1, *hw, dtype=torch.bool) for hw in ((2, 4), (1, 2))])
        alone = model(*cut, [common.PositionEmbeddingSine(8)(m) for m in cut[1]], query)
        for a, b in zip(alone[:3], (first[0][:, 1:], first[1][1:], first[2][:, 1:])):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("refine", (False, True))
def test_queries_per_image(refine):
    model, inputs = small_transformer(refine), pyramid()
    queries = tensor("queries_per_image", 2, 5, 32)
    with torch.no_grad():
        both = model(*inputs, queries)
        for b in range(2):
            single = model(*[[t[b:b + 1] for t in part] for part in inputs], queries[b])
            for together, one in zip(both[:3], single[:3]):
                batch_axis = together.dim() - 3
                torch.testing.assert_close(together.narrow(batch_axis, b, 1), one, atol=1e-6, rtol=0)
        shared = model(*inputs, queries[0])
        repeated = model(*inputs, queries[:1].expand(2, -1, -1))
        assert all(torch.equal(a, b) for a, b in zip(shared, repeated))


DETECTORS = ("detr", "conditional_detr", "deformable_detr_ss", "deformable_detr")


@pytest.mark.parametrize("name", DETECTORS)
def test_queries_that_say_what_to_look_for(name):
    model = detectors.build_detector(small_config(updetr.Config, detector=name, num_feature_levels=3), 3,
                                  focal=False).eval()
    table, features = model.query_embed.weight.detach(), tensor("query_features", 2, 6, 64)
    assert table.shape == (8, 128 if name.startswith("deformable") else 64)
    for order, rows in ((None, table[:6]), (torch.tensor([7, 0, 1, 6, 5, 4, 3, 2]), table[[7, 0, 1, 6, 5, 4]])):
        queries = model.conditioned_queries(features, order).detach()
        assert queries.shape == (2, 6, table.shape[1])
        for b in range(2):
            assert torch.equal(queries[b, :, :64], rows[:, :64] + features[b])
            assert torch.equal(queries[b, :, 64:], rows[:, 64:])
    images, mask = tensor("query_images", 2, 3, 32, 48), torch.zeros(2, 32, 48, dtype=torch.bool)
    with torch.no_grad():  # features of zeros are the detector as it is
        one, two = model(images, mask), model(images, mask, model.conditioned_queries(torch.zeros(2, 8, 64)))
        for key in ("pred_logits", "pred_boxes", "hs"):
            torch.testing.assert_close(one[key], two[key], atol=1e-6, rtol=1e-5)
        few = model(images, mask, model.conditioned_queries(torch.zeros(2, 3, 64)), torch.zeros(3, 3, dtype=torch.bool))
        assert few["pred_boxes"].shape == (2, 3, 4) and few["aux_outputs"][0]["hs"].shape == (2, 3, 64)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_query_sees_what_the_mask_lets_it_see(name):
    """A mask that keeps the halves of the queries apart: each half is what it is alone."""
    model = detectors.build_detector(small_config(updetr.Config, detector=name, num_feature_levels=3), 3,
                                  focal=False).eval()
    images, mask = tensor("query_images", 2, 3, 32, 48), torch.zeros(2, 32, 48, dtype=torch.bool)
    half = torch.arange(8) // 4
    queries = model.query_embed.weight.detach().expand(2, -1, -1)
    with torch.no_grad():
        both, free = model(images, mask, queries, half[:, None] != half[None]), model(images, mask, queries)
        for part in (slice(0, 4), slice(4, 8)):
            alone = model(images, mask, queries[:, part])
            torch.testing.assert_close(alone["hs"], both["hs"][:, part], atol=1e-5, rtol=1e-4)
            assert (alone["hs"] - free["hs"][:, part]).abs().max() > 1e-3


@pytest.mark.parametrize("name", DETECTORS)
def test_aligned_start(name):
    model = detectors.build_detector(small_config(updetr.Config, detector=name, num_feature_levels=1), 3, focal=False)
    to_query, before = nn.Linear(512, 64), {k: v.clone() for k, v in model.state_dict().items()}
    detectors.align_start(model, to_query)
    after = model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    if name.startswith("deformable"):
        assert not changed
        return
    maps = tensor("align_maps", 2, 512, 2, 3)  # a feature enters a query as it enters the encoder
    torch.testing.assert_close(to_query(maps.mean((2, 3))), model.input_proj(maps).mean((2, 3)), atol=1e-5, rtol=1e-4)
    def scale(now, then):  # both are one tensor, but for a factor
        factor = (now.norm() / then.norm()).item()
        torch.testing.assert_close(now, factor * then)
        return factor

    assert scale(after["query_embed.weight"], before["query_embed.weight"]) < 1
    allowed = {"query_embed.weight"}
    for i, layer in enumerate(model.transformer.decoder.layers):  # keys start as queries do; nothing else has changed
        prefix = f"transformer.decoder.layers.{i}."
        if name == "conditional_detr":
            names = [prefix + f"{part}_proj.weight"
                     for part in ("ca_qcontent", "ca_kcontent", *(["ca_qpos"] if i == 0 else []))]
            assert all(torch.equal(after[k], after[names[0]]) for k in names)
            assert scale(after[names[0]], before[names[0]]) >= 1
            allowed |= set(names)
        else:
            attention = prefix + "multihead_attn.in_proj_weight"
            (query, key, value), (old, _, same) = after[attention].chunk(3), before[attention].chunk(3)
            assert torch.equal(query, key) and torch.equal(value, same) and scale(query, old) >= 1
            allowed.add(attention)
    assert {"query_embed.weight"} < changed <= allowed


def test_standardized_weights_do_to_features_what_they_did_to_standardised_ones():
    features = tensor("standardize", 50, 6).abs() * torch.arange(1.0, 7) + 3
    features[:, 5] = 2.0  # a dead channel: nothing is divided by zero
    deviation, mean = torch.std_mean(features, 0)
    standard = (features - mean) / deviation.clamp(min=0.1 * deviation.mean())
    linear, conv = nn.Linear(6, 4), nn.Conv2d(6, 4, 1)
    expected = linear(standard), conv(standard.T[None, :, :, None])
    for layer in (linear, conv):
        detectors.standardize(layer, features)
    torch.testing.assert_close(linear(features), expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(conv(features.T[None, :, :, None]), expected[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(linear(features).mean(0), linear(mean), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DETECTORS)
def test_pretext_models_keep_the_released_names(name):
    class Task(common.Pretext):
        def __init__(self, detector):
            super().__init__(detector)
            self.head = nn.Linear(2, 3)

    def make(seed):
        torch.manual_seed(seed)
        return Task(detectors.build_detector(small_config(updetr.Config, detector=name, num_feature_levels=3,
                                                       with_box_refine=True), 3, focal=False))

    one, two = make(0), make(1)
    state = one.state_dict()
    assert state.keys() == one.detector.state_dict().keys() | {"head.weight", "head.bias"}
    assert not any(k.startswith("detector.") for k in state) and "query_embed.weight" in state
    assert "backbone.0.body.conv1.weight" in state
    assert ({k for k, _ in one.named_parameters()} & {"detector.query_embed.weight", "head.weight"}
            == {"detector.query_embed.weight", "head.weight"})
    two.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in two.state_dict().items())
    assert torch.equal(two.detector.query_embed.weight, one.detector.query_embed.weight)
    with pytest.raises(RuntimeError, match="query_embed.weight"):
        two.load_state_dict({k: v for k, v in state.items() if k != "query_embed.weight"})
    cfg = small_config(updetr.Config, detector=name, num_feature_levels=3, with_box_refine=True)
    bare = detectors.build_detector(cfg, 3, focal=False)
    convert.load_matching(bare, state, drop={r"^head\.": "pretext"}, source="FILE")
    assert all(torch.equal(v, state[k]) for k, v in bare.state_dict().items())


# ==== Matching, losses, post-processing ====


@pytest.mark.parametrize(("cost", "pairs"), (
    ([[1, 2], [2, 10], [9, 9]], ([0, 1], [1, 0])),  # greedy would take (0, 0) and pay 10
    ([[5, 1], [4, 4], [1, 3]], ([0, 2], [1, 0])),
    ([[3, 1, 2], [1, 9, 9]], ([0, 1], [1, 0])),  # more targets than queries
    (np.zeros((3, 0)), ([], []))))
def test_assignment_of_a_given_cost(cost, pairs):
    matcher = common.HungarianMatcher()
    matcher.costs = lambda outputs, targets: [torch.as_tensor(np.float32(cost)), torch.tensor([[2.0], [1.0]])]
    outputs = {"pred_logits": torch.zeros(2, 1, 1), "pred_boxes": torch.zeros(2, 1, 4)}
    (query, target), other = matcher([outputs], [{}, {}])[0]
    assert (query.tolist(), target.tolist()) == pairs and query.dtype == target.dtype == torch.int64
    assert [t.tolist() for t in other] == [[1], [0]]


@pytest.mark.parametrize("focal", (True, False))
@pytest.mark.parametrize(("name", "value"), (("pred_logits", math.nan), ("pred_logits", math.inf),
                                             *(("pred_boxes", v) for v in (math.nan, math.inf, -math.inf))))
def test_predictions_that_are_not_finite_are_matched(name, value, focal):
    """So that the loss is not finite, and run.FiniteWatch ends the run."""
    outputs = {"pred_logits": torch.zeros(1, 4, 2), "pred_boxes": torch.full((1, 4, 4), 0.3)}
    outputs[name][0, 2, 0] = value
    targets = [{"labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.3)}]
    criterion = common.SetCriterion(common.HungarianMatcher(focal=focal))
    losses, ((query, target),) = criterion(outputs, targets, 1.0)
    assert (query.tolist(), target.tolist()) == ([2], [0])
    assert not criterion.total(losses).isfinite()
    nothing = {"pred_logits": torch.full((1, 2, 1), torch.nan), "pred_boxes": torch.full((1, 2, 4), torch.nan)}
    assert len(criterion.matcher([nothing], targets)[0][0][0]) == 1  # whichever: it does not raise


def giou64(a, b):
    """Generalised IoU of two cxcywh boxes, float64."""
    (ax, ay, aX, aY), (bx, by, bX, bY) = ((c[0] - c[2] / 2, c[1] - c[3] / 2, c[0] + c[2] / 2, c[1] + c[3] / 2)
                                          for c in (a, b))
    inter = max(0, min(aX, bX) - max(ax, bx)) * max(0, min(aY, bY) - max(ay, by))
    union = (aX - ax) * (aY - ay) + (bX - bx) * (bY - by) - inter
    hull = (max(aX, bX) - min(ax, bx)) * (max(aY, bY) - min(ay, by))
    return inter / union - (hull - union) / hull


def losses64(logits, boxes, targets, num_boxes, cost=(2.0, 5.0, 2.0)):
    """Focal, L1 and GIoU losses of one layer, matched by trying every assignment; plus (pairs, cost matrices)."""
    total, all_pairs, matrices = np.zeros(3), [], []
    for s, b, (labels, true) in zip(logits, boxes, targets):
        p = 1 / (1 + np.exp(-s))
        C = np.zeros((len(s), len(labels)))
        for q, (t, label) in itertools.product(range(len(s)), enumerate(labels)):
            x = p[q, label]
            focal = 0.25 * (1 - x) ** 2 * -math.log(x + 1e-8) - 0.75 * x ** 2 * -math.log(1 - x + 1e-8)
            C[q, t] = cost[0] * focal + cost[1] * np.abs(b[q] - true[t]).sum() - cost[2] * giou64(b[q], true[t])
        few = min(C.shape)
        ways = [list(zip(qs, ts)) for qs in itertools.combinations(range(C.shape[0]), few)
                for ts in itertools.permutations(range(C.shape[1]), few)]
        pairs = min(ways, key=lambda way: sum(C[q, t] for q, t in way))
        onehot = np.zeros_like(p)
        for q, t in pairs:
            onehot[q, labels[t]] = 1
            total[1] += np.abs(b[q] - true[t]).sum()
            total[2] += 1 - giou64(b[q], true[t])
        right = np.where(onehot == 1, p, 1 - p)
        total[0] += (np.where(onehot == 1, 0.25, 0.75) * (1 - right) ** 2 * -np.log(right)).sum()
        all_pairs.append(pairs)
        matrices.append(C)
    return total / num_boxes, all_pairs, matrices


def criterion_case(counts=(2, 0, 4), layers=2, Q=3, C=2):
    rng = np.random.default_rng(3)
    def boxes(*shape):
        return np.concatenate([rng.uniform(0.3, 0.7, (*shape, 2)), rng.uniform(0.1, 0.5, (*shape, 2))], -1)
    targets = [(rng.integers(0, C, n), boxes(n)) for n in counts]
    return [(rng.standard_normal((len(counts), Q, C)), boxes(len(counts), Q)) for _ in range(layers)], targets


def torch_case(predictions, targets):
    outputs = [{name: torch.tensor(value, dtype=torch.float32, requires_grad=True)
                for name, value in zip(("pred_logits", "pred_boxes"), layer)}
               for layer in predictions]
    targets = [{"labels": torch.as_tensor(l), "boxes": torch.as_tensor(b, dtype=torch.float32)} for l, b in targets]
    return outputs, {**outputs[-1], "aux_outputs": outputs[:-1]}, targets


def test_criterion_against_numpy():
    predictions, targets = criterion_case()  # an empty image, and one with more targets than queries
    layers, outputs, torch_targets = torch_case(predictions, targets)
    criterion = common.SetCriterion(common.HungarianMatcher(2, 5, 2), 1.5, 4.0, 3.0)
    losses, pairs = criterion(outputs, torch_targets, 6.0)
    assert set(losses) == {"loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error", "loss_ce_0",
                           "loss_bbox_0", "loss_giou_0", "cardinality_error_0"}
    total = 0.0
    for suffix, (logits, boxes), layer in (("", predictions[1], layers[1]), ("_0", predictions[0], layers[0])):
        expected, wanted_pairs, matrices = losses64(logits, boxes, targets, 6.0)
        for name, value in zip(("loss_ce", "loss_bbox", "loss_giou"), expected):
            assert losses[name + suffix].item() == pytest.approx(value, rel=1e-5)
        for mine, C in zip(criterion.matcher.costs(layer, torch_targets), matrices):
            np.testing.assert_allclose(mine.numpy(), C, atol=1e-5)
        total += expected @ [1.5, 4.0, 3.0]
        if not suffix:
            assert [list(zip(q.tolist(), t.tolist())) for q, t in pairs] == wanted_pairs
            hits = [logits[i, q].argmax() == targets[i][0][t] for i, image in enumerate(wanted_pairs) for q, t in image]
            assert losses["class_error"].item() == pytest.approx(100 - 100 * np.mean(hits))
            assert ([t.tolist() for t in common.matched_index(pairs)]
                    == [[0, 0, 2, 2, 2], [q for image in wanted_pairs for q, _ in image]])
    assert criterion.total(losses).item() == pytest.approx(total, rel=1e-5)


def test_criterion_without_any_target():
    predictions, targets = criterion_case(counts=(0, 0))
    layers, outputs, targets = torch_case(predictions, targets)
    criterion = common.SetCriterion(common.HungarianMatcher())
    losses, _ = criterion(outputs, targets, common.normalizer(0, CPU))
    logits = predictions[1][0]
    p = 1 / (1 + np.exp(-logits))
    assert losses["loss_ce"].item() == pytest.approx((0.75 * p ** 2 * -np.log(1 - p)).sum(), rel=1e-5)
    assert losses["loss_bbox"].item() == losses["loss_giou_0"].item() == 0 and losses["class_error"].item() == 100
    assert all(v.isfinite() for v in losses.values())
    criterion.total(losses).backward()
    for layer in layers:
        assert layer["pred_logits"].grad.abs().sum() > 0 and not layer["pred_boxes"].grad.any()


def softmax64(logits, boxes, targets, eos, cost):
    """Cross-entropy (its weighted sum, its weights), L1 and GIoU sums of one layer, matched by trying every
    assignment; and the pairs."""
    total, all_pairs = np.zeros(4), []
    for s, b, (labels, true) in zip(logits, boxes, targets):
        log_p = s - np.log(np.exp(s).sum(1, keepdims=True))
        C = np.array([[-cost[0] * np.exp(log_p[q, label]) + cost[1] * np.abs(b[q] - t).sum() - cost[2] * giou64(b[q], t)
                       for label, t in zip(labels, true)] for q in range(len(s))]).reshape(len(s), len(labels))
        few = min(C.shape)
        ways = [list(zip(qs, ts)) for qs in itertools.combinations(range(C.shape[0]), few)
                for ts in itertools.permutations(range(C.shape[1]), few)]
        pairs = min(ways, key=lambda way: sum(C[q, t] for q, t in way))
        wanted = dict(pairs)
        for q in range(len(s)):
            label, weight = (labels[wanted[q]], 1.0) if q in wanted else (s.shape[1] - 1, eos)
            total[:2] -= weight * log_p[q, label], -weight
        for q, t in pairs:
            total[2:] += np.abs(b[q] - true[t]).sum(), 1 - giou64(b[q], true[t])
        all_pairs.append(pairs)
    return total, all_pairs


def test_softmax_criterion_against_numpy():
    predictions, targets = criterion_case(C=4)  # three classes and "no object"; image 2 has more targets than queries
    targets = [(labels % 3, boxes) for labels, boxes in targets]
    layers, outputs, torch_targets = torch_case(predictions, targets)
    criterion = common.SetCriterion(common.HungarianMatcher(1.5, 4, 3, focal=False), 1.5, 4.0, 3.0, eos_coef=0.25)
    counts = [len(labels) for labels, _ in targets]
    assert criterion.class_weight_sum(counts, 3) == (2 + 0.25) + 3 * 0.25 + 3  # counts 2, 0, 4 for 3 queries
    for class_weight in (None, 5.0):
        losses, pairs = criterion(outputs, torch_targets, 6.0, class_weight)
        for suffix, (logits, boxes) in (("", predictions[1]), ("_0", predictions[0])):
            (ce, weight, l1, giou), wanted_pairs = softmax64(logits, boxes, targets, 0.25, (1.5, 4, 3))
            assert weight == criterion.class_weight_sum(counts, 3) == 6.0
            assert losses["loss_ce" + suffix].item() == pytest.approx(ce / (class_weight or weight), rel=1e-5)
            assert losses["loss_bbox" + suffix].item() == pytest.approx(l1 / 6, rel=1e-5)
            assert losses["loss_giou" + suffix].item() == pytest.approx(giou / 6, rel=1e-5)
            if not suffix:
                assert [list(zip(q.tolist(), t.tolist())) for q, t in pairs] == wanted_pairs
            some = [abs(int((l.argmax(1) != 3).sum()) - n) for l, n in zip(logits, counts)]
            assert losses["cardinality_error" + suffix].item() == pytest.approx(np.mean(some))
    by_hand = common.SetCriterion(common.HungarianMatcher(focal=False), eos_coef=0.5)
    logits = torch.log(torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.25, 0.25, 0.5]]]))
    value = by_hand.class_loss(logits, (torch.tensor([0]), torch.tensor([2])), torch.tensor([1]), 99.0, None)
    # weights 1, 1/2, 1/2
    assert value.item() == pytest.approx(-(math.log(0.25) + 0.5 * math.log(0.2) + 0.5 * math.log(0.8)) / 2)


def test_feature_loss_by_hand():
    criterion = common.SetCriterion(common.HungarianMatcher(focal=False), weight_feature=2.0)
    outputs = {"pred_logits": torch.zeros(1, 3, 3), "pred_boxes": torch.full((1, 3, 4), 0.4),
               "pred_features": torch.tensor([[[3.0, 4], [1, 0], [0, -2]]])}
    targets = [{"labels": torch.tensor([1, 1]), "boxes": torch.full((2, 4), 0.4),
                "features": torch.tensor([[0.0, 5], [2, 0]])}]
    pairs = [(torch.tensor([0, 2]), torch.tensor([1, 0]))]  # cosines 3/5 and -1
    losses = criterion.losses(outputs, targets, pairs, 4.0)
    assert losses["loss_feature"].item() == pytest.approx((2 - 2 * 0.6 + 4) / 4)
    assert losses["loss_bbox"].item() == 0
    assert criterion.total(losses).item() == pytest.approx(2 * losses["loss_ce"].item() + 2 * 4.8 / 4)
    assert ("loss_feature"
            not in common.SetCriterion(common.HungarianMatcher(focal=False)).losses(outputs, targets, pairs, 4.0))


def test_normalizer(monkeypatch):
    assert [common.normalizer(n, CPU) for n in (0, 1, 7)] == [1, 1, 7]
    monkeypatch.setattr(common, "world_size", lambda: 4)
    monkeypatch.setattr(common, "all_reduce_sum", lambda t: t + 5)  # the other three processes hold 5
    assert common.normalizer(3, CPU) == 2.0  # (3 + 5) / 4
    monkeypatch.setattr(common, "all_reduce_sum", lambda t: t)
    assert common.normalizer(0, CPU) == 0.25  # at least one box over all processes


def test_terms_of_micro_batches_add_up():
    terms = {}
    for loss, error in ((3.0, 10.0), (4.0, 30.0)):
        losses = {"loss": torch.tensor(loss, requires_grad=True), "class_error_0": torch.tensor(error)}
        common.add_terms(terms, losses, 2)
    assert terms == {"loss": 7.0, "class_error_0": 20.0} and not terms["loss"].requires_grad


def test_detections_and_pixels():
    logits = torch.tensor([[2.0, -1.0], [0.0, 3.0], [-4.0, 1.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0], [0.9, 0.1, 0.4, 0.2]])
    best = common.post_process({"pred_logits": logits[None], "pred_boxes": boxes[None]},
                               torch.tensor([[50, 100]]), top=4)[0]
    assert best["labels"].tolist() == [1, 0, 1, 0]  # 3, 2, 1, 0: query 1 appears twice
    np.testing.assert_allclose(best["scores"], 1 / (1 + np.exp([-3.0, -2.0, -1.0, 0.0])), atol=1e-6)
    pixels = [[0, 0, 50, 50], [40, 15, 60, 35], [70, 0, 110, 10], [0, 0, 50, 50]]
    np.testing.assert_allclose(best["boxes"], pixels, atol=1e-4)
    assert len(common.top_detections(logits, boxes)["scores"]) == 6  # fewer than 100 candidates


def test_softmax_detections():
    logits = torch.tensor([[1.0, 3, 0, 9], [2, 0, 0, -9], [0, 0, 5, 0]])
    boxes = torch.arange(12.0).view(3, 4)
    # every query once, whatever `top`; the last row is no class
    found = common.top_detections(logits, boxes, top=1, focal=False)
    assert found["labels"].tolist() == [1, 0, 2] and torch.equal(found["boxes"], boxes)
    p = np.exp(logits.double().numpy()) / np.exp(logits.double().numpy()).sum(1, keepdims=True)
    np.testing.assert_allclose(found["scores"], [p[0, 1], p[1, 0], p[2, 2]], rtol=1e-5)
    whole = common.post_process({"pred_logits": logits[None], "pred_boxes": torch.full((1, 3, 4), 0.5)},
                                torch.tensor([[50, 100]]), focal=False)[0]
    assert whole["labels"].tolist() == [1, 0, 2] and whole["boxes"].tolist() == [[25, 12.5, 75, 37.5]] * 3


# ==== Optimisation ====


def test_parameter_groups():
    cfg = small_config(finetune.Config, lr=1e-3, lr_backbone=1e-4, lr_linear_proj_mult=0.5, weight_decay=0.25)
    for lr_backbone in (1e-4, 0.0):
        model = detectors.build_detector(dataclasses.replace(cfg, lr_backbone=lr_backbone), 3, focal=True)
        rest, backbone, linear = common.param_groups(model, 1e-3, lr_backbone, 0.5)
        assert ([g["base_lr"] for g in (rest, backbone, linear)] == [g["lr"] for g in (rest, backbone, linear)]
                == [1e-3, lr_backbone, 5e-4])
        # 1 encoder, 2 decoder layers: weight and bias; and the reference points
        assert len(linear["names"]) == 2 * 3 + 2
        assert all("sampling_offsets" in n or "reference_points" in n for n in linear["names"])
        assert all(n.startswith("backbone.0.body.layer") for n in backbone["names"])
        assert bool(backbone["names"]) == (lr_backbone > 0)
        trained = [p for p in model.parameters() if p.requires_grad]
        # each once
        assert sorted(map(id, trained)) == sorted(id(p) for g in (rest, backbone, linear) for p in g["params"])
        assert "class_embed.0.weight" in rest["names"] and "query_embed.weight" in rest["names"]
    optimizer = common.build_optimizer(cfg, model)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.25] * 3
    assert common.set_lr(optimizer, 0.1) == pytest.approx(1e-4)
    assert common.set_lr(optimizer, 0.1) == pytest.approx(1e-4)  # of the base rate, not of the last one
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-4, 1e-5, 5e-5])


def test_schedule_and_clipping():
    values = [common.step_schedule(s, 10, (4, 6)) for s in (0, 39, 40, 59, 60, 1000)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert common.step_schedule(14, 10, (1.5,)) == 1 and common.step_schedule(15, 10, (1.5,)) == pytest.approx(0.1)
    model = nn.Linear(1, 2, bias=False)
    for limit, after in ((0, [3, 4]), (10, [3, 4]), (0.5, [0.3, 0.4])):
        model.weight.grad = torch.tensor([[3.0], [4.0]])
        assert common.clip_gradients(model, limit).item() == pytest.approx(5)
        np.testing.assert_allclose(model.weight.grad.flatten(), after, rtol=1e-5)


# ==== convert.py: foreign weights ====


def test_load_matching(capsys):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {k: torch.full_like(v, i + 1.0) for i, (k, v) in enumerate(model.state_dict().items())}
    extra = {**state, "head.a": torch.zeros(1), "head.b": torch.zeros(1), "1.bias": torch.zeros(9)}
    convert.load_matching(model, extra, drop={r"^head\.": "pretext head", r"^1\.bias": "other size"}, source="FILE")
    said = capsys.readouterr().out
    assert "loaded 3 tensors from FILE; 3 named above are left out or new\n" in said
    assert said.startswith("  pretext head: head.a, head.b\n") or "\n  pretext head: head.a, head.b\n" in said
    assert "  other size: 1.bias\n" in said
    assert (model[0].weight == 1).all() and (model[1].weight == 3).all() and not (model[1].bias == 4).any()
    convert.load_matching(model, {**state, **{f"head.{i}": torch.zeros(1) for i in range(30)}},
                          drop={r"^head\.": "pretext head"}, source="FILE")
    said = capsys.readouterr().out  # every name, however many
    assert f"  pretext head: {', '.join(sorted(f'head.{i}' for i in range(30)))}\n" in said
    assert "30 named above are left out or new" in said
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bad = {"0.weight": torch.zeros(3, 5), "0.bias": torch.zeros(3), **{f"x{i}": torch.zeros(1) for i in range(6)}}
    with pytest.raises(UserError) as caught:
        convert.load_matching(model, bad, drop={}, source="FILE")
    message = str(caught.value)
    assert message.startswith("FILE is a checkpoint of another architecture. missing there: 1.bias, 1.weight; ")
    assert "; unknown here: x0, x1, x2, x3 and 2 more; " in message
    assert "0.weight (3, 5) -> (3, 2)" in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing was loaded


@functools.cache
def random_resnet():
    return filled(torchvision.models.resnet18(weights=None)).state_dict()


FAMILIES = {
    "SwAV": lambda r: {"state_dict": {f"module.{k}": v for k, v in r.items() if not k.startswith("fc.")}
                              | {"module.projection_head.0.weight": torch.ones(2),
                                 "module.prototypes.weight": torch.ones(2)}, "epoch": 1},
    "SwAV, bare": lambda r: {f"module.{k}": v for k, v in r.items() if not k.startswith("fc.")}
    | {"module.projection_head.0.weight": torch.ones(2)},
    "MoCo v1": lambda r: {"state_dict": {f"module.encoder_q.{k}": v for k, v in r.items()}
                               | {f"module.encoder_k.{k}": v + 1 for k, v in r.items()}
                               | {"module.queue": torch.ones(2)}},
    "torchvision": lambda r: dict(r),
    "detector": lambda r: {"model": {f"backbone.0.body.{k}": v for k, v in r.items() if not k.startswith("fc.")}
                           | {"transformer.level_embed": torch.ones(2), "class_embed.0.weight": torch.ones(2)}},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ("frozen", "bn"))
def test_backbone_files(family, norm, tmp_path, capsys):
    weights = random_resnet()
    torch.save(FAMILIES[family](weights), tmp_path / "file.pth")
    body = common.Backbone("resnet18", norm=norm).body
    convert.load_backbone_weights(body, str(tmp_path / "file.pth"), "resnet18")
    own = {k: v for k, v in body.state_dict().items() if "num_batches" not in k}
    assert own.keys() == {k for k in weights if "num_batches" not in k and not k.startswith("fc.")}
    assert all(torch.equal(v, weights[k]) for k, v in own.items())
    assert f"({family.split(',')[0]}, ResNet-18)" in capsys.readouterr().out
    short = common.Backbone("resnet18", (2,), norm).body  # what lies behind the last wanted stage is left out, and said
    convert.load_backbone(short, tmp_path / "file.pth")
    assert all(torch.equal(v, weights[k]) for k, v in short.state_dict().items() if "num_batches" not in k)
    assert "a later stage that is not used" in capsys.readouterr().out


def test_backbone_files_that_do_not_fit(tmp_path):
    weights = random_resnet()
    torch.save(weights, tmp_path / "r18.pth")
    with pytest.raises(UserError, match="r18.pth.*another architecture"):
        convert.load_backbone(common.Backbone("resnet34").body, tmp_path / "r18.pth")
    torch.save({k: v for k, v in weights.items() if k != "layer3.0.conv1.weight"}, tmp_path / "hole.pth")
    with pytest.raises(UserError, match=r"missing there: layer3\.0\.conv1\.weight"):
        convert.load_backbone(common.Backbone("resnet18").body, tmp_path / "hole.pth")
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "else.pth")
    with pytest.raises(UserError, match="else.pth: no known kind of checkpoint.*a.weight.*SwAV"):
        convert.load_backbone(common.Backbone("resnet18").body, tmp_path / "else.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="empty.pth: holds no tensors.*epoch"):
        convert.load_backbone(common.Backbone("resnet18").body, tmp_path / "empty.pth")


def test_download_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def download(url, path, progress):
        asked.append((url, path))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    swav = tmp_path / "checkpoints" / "swav_800ep_pretrain.pth.tar"
    with pytest.raises(UserError) as caught:
        convert.backbone_file("swav", "resnet50")
    for part in ("--backbone_weights swav", "no route to host", convert.BACKBONE_URLS["swav"], str(swav), "random"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"download\.pytorch\.org/models/resnet18-.*put it at"):
        convert.backbone_file("imagenet", "resnet18")
    with pytest.raises(UserError, match="swav exists for resnet50 only, not for resnet18"):
        convert.backbone_file("swav", "resnet18")
    assert asked[0] == (convert.BACKBONE_URLS["swav"], str(swav)) and len(asked) == 2
    swav.write_bytes(b"")
    assert convert.backbone_file("swav", "resnet50") == swav and len(asked) == 2  # the cache is looked into first
    assert convert.backbone_file("some/file.pth", "resnet18") == Path("some/file.pth")


@pytest.mark.parametrize("values",
                         ({}, {"with_box_refine": True, "num_feature_levels": 1, "detector": "deformable_detr_ss"},
                          {"backbone_norm": "bn", "arch": "resnet34", "lr_backbone": 0.0},
                          {"arch": "resnet50", "enc_layers": 3, "dec_layers": 1,
                           "dim_feedforward": 48, "num_queries": 5},
                          {"detector": "detr"}, {"detector": "detr", "pre_norm": True, "stride": 16, "num_queries": 5},
                          {"detector": "conditional_detr", "arch": "resnet101", "enc_layers": 2},
                          {"detector": "conditional_detr", "stride": 16, "backbone_norm": "bn", "dim_feedforward": 48}))
def test_architecture_of_a_state(values):
    cfg = small_config(finetune.Config, **values)
    own = {"detr": ("stride", "pre_norm"),
           "conditional_detr": ("stride",)}.get(cfg.detector, ("num_feature_levels", "with_box_refine"))
    expected = {k: getattr(cfg, k) for k in ("detector", "arch", "backbone_norm", "num_queries", "hidden_dim",
                                             "enc_layers", "dec_layers", "dim_feedforward", *own)}
    for focal in (True, False):
        assert convert.architecture(detectors.build_detector(cfg, 3, focal=focal).state_dict(), "file") == expected


def test_architecture_refuses_by_name():
    one = torch.zeros(1)
    detr = {"query_embed.weight": one, "transformer.encoder.layers.0.self_attn.in_proj_weight": one,
            "backbone.0.body.conv1.weight": one}
    with pytest.raises(UserError, match="FILE: this is a detector checkpoint, not one of a DETR, "
                       "Conditional DETR or Deformable DETR"):
        convert.architecture(detr, "FILE")
    with pytest.raises(UserError, match="FILE: this is a torchvision checkpoint.*--backbone_weights"):
        convert.architecture(random_resnet(), "FILE")
    with pytest.raises(UserError, match="FILE: this is a MoCo v2.*--backbone_weights"):
        convert.architecture({"encoder_q.conv1.weight": one, "encoder_q.fc.0.weight": one}, "FILE")
    with pytest.raises(UserError, match="FILE: this is an unknown kind of checkpoint"):
        convert.architecture({"a": one}, "FILE")
    state = detectors.build_detector(small_config(finetune.Config), 2, focal=True).state_dict()
    for other in ({k: v for k, v in state.items() if not k.startswith("backbone")},
                  {**state, "backbone.0.body.layer2.5.conv1.weight": one}):
        with pytest.raises(UserError, match="FILE: .*lacks parts.*resnet18, resnet34"):
            convert.architecture(other, "FILE")
