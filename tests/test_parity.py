"""Equality with the released code: one test per case, id `folder/case`.

Cases are the json files below $PARITY_DIR, else the copies in tests/parity. A case's `kind` decides how it is run; everything else (shapes, counts,
factors, tolerances) is read from it. An unknown kind fails. Weights are made from their released names (fill.py) and go through the loader of
released checkpoints.
"""
import argparse
import dataclasses
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from fill import fill

import common
import convert
import data
import detreg
import evaluation
import finetune
import proposals
import siamese_detr
import updetr

FOLDER = Path(os.environ.get("PARITY_DIR") or Path(__file__).parent / "parity")
CASES = {f"{p.parent.name}/{p.stem}": p for p in sorted(FOLDER.rglob("*.json"))}
KINDS = {}


def kind(name):
    return lambda function: KINDS.setdefault(name, function)


@pytest.mark.parametrize("case_id", CASES)
def test_case(case_id, tmp_path):
    path = CASES[case_id]
    case = json.loads(path.read_text())
    assert case.get("kind") in KINDS, f"{case_id}: no runner for kind {case.get('kind')!r}"
    arrays = dict(np.load(path.with_suffix(".npz"))) if path.with_suffix(".npz").exists() else {}
    case["arrays"] = set(arrays)                           # whatever a runner does not look at fails below
    seen = SimpleNamespace(path=path, tmp=tmp_path, used=set())
    KINDS[case["kind"]](case, Reader(arrays, seen.used), seen)
    unused = set(arrays) - seen.used
    assert not unused, f"{case_id}: arrays that were not compared: {sorted(unused)}"


class Reader(dict):
    """The arrays of a case; remembers which were read."""

    def __init__(self, arrays, used):
        super().__init__(arrays)
        self.used = used

    def __getitem__(self, name):
        self.used.add(name)
        return super().__getitem__(name)

    def tensor(self, name, dtype=None):
        value = torch.from_numpy(self[name])
        return value.to(dtype) if dtype else value


def tensor(name, shape, seed):
    return torch.from_numpy(fill(f"input:{name}", tuple(shape), seed))


def close(actual, expected, atol, rtol=0.0, what=""):
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    np.testing.assert_allclose(actual, np.asarray(expected), atol=atol, rtol=rtol, err_msg=what)


def close_samples(actual, arrays, name, atol, rtol=0.0):
    close(actual.detach().flatten()[arrays.tensor(f"{name}_index")], arrays[f"{name}_values"], atol, rtol, name)


def manifest(case, path):
    """The name list of a full model: tests/parity/statedict when the case's folder has no neighbour of that name."""
    for folder in (path.parent.parent / "statedict", path.parent, Path(__file__).parent / "parity" / "statedict"):
        if (folder / case).exists():
            return json.loads((folder / case).read_text())
    raise AssertionError(f"no {case} near {path}")


def filled(name, shape, case):
    """One released tensor with the case's factors: `gains` (regular expressions, in order) and `scale` (names)."""
    value = fill(name, tuple(shape), case.get("seed", 0))
    if value.dtype == np.float32:
        for gain in [g for pattern, g in case.get("gains", ()) if re.search(pattern, name)] + [case.get("scale", {}).get(name, 1.0)]:
            value = value * np.float32(gain)
        if not case.keys() & {"gains", "scale"} and name.startswith("class_embed."):
            value = value * np.float32(0.1)                             # fill_note of the cases without factors
    return torch.from_numpy(value)


def released_state(entries, case):
    """A released state dict: every entry from its canonical alias."""
    return {name: filled(alias[0] if alias else name, shape, case) for name, shape, *alias in entries}


def released_file(folder, state, wrapping="model"):
    """As main.py of the released code saves it, argparse.Namespace included; or as mmcv does (Siamese DETR)."""
    path = folder / "checkpoint.pth"
    if "state_dict" in wrapping:
        torch.save({"meta": {"epoch": 1}, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    else:
        torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, "lr_scheduler": {"last_epoch": 0}, "epoch": 0,
                    "args": argparse.Namespace(lr=2e-4)}, path)
    return path


def load_released(path, num_groups=1, **overrides):
    """A released detector checkpoint -> our model, through the project's loader; nothing may be left over.

    The state's own names say which model it is; num_groups: patches or regions that the queries are divided among (no tensor depends on it).
    """
    state = convert.detector_state(convert.read_checkpoint(path), path)
    cfg = dataclasses.replace(finetune.Config(dropout=0.0), **convert.architecture(state, path) | overrides)
    rows = next(v.shape[0] for name, v in state.items() if re.fullmatch(r"class_embed\.(0\.)?bias", name))
    pretext = {name.split(".")[0] for name in state} & {"feature_embed", "patch2query", "enc_head", "feature_align"}
    model = common.build_detector(cfg, rows, focal=cfg.detector != "detr" and "patch2query" not in pretext)
    if "feature_embed" in pretext:
        last = max(name for name in state if name.startswith("feature_embed.") and name.endswith("bias"))
        model = detreg.DETReg(model, embedding_dim=state[last].shape[0])
    elif "enc_head" in pretext:
        model = siamese_detr.SiameseDETR(model, num_groups, region_target="crop" if "feature_align" in pretext else "none")
    elif "patch2query" in pretext:
        model = updetr.UPDETR(model, num_groups, reconstruction="feature_align" in pretext)
    common.load_matching(model, state, drop={}, source=str(path))
    return model, state


def detector_of(model):
    return getattr(model, "detector", model)


def bare(name):
    """The released name of a parameter: inside a pretext model the detector is `detector`."""
    return name.removeprefix("detector.")


def to_batch(images):
    return {k: v for k, v in data.collate([{"image": i, "target": {}, "skipped": []} for i in images]).items() if k in ("images", "mask")}


# ==== Pieces =======================================================================================================

@kind("detreg/sine_position")
def sine_position(case, arrays, _):
    config = case["config"]
    mask = arrays.tensor("mask", torch.bool)
    for name, normalize, atol in (("", True, 1e-5), ("unnormalised_", False, 1e-4)):
        encode = common.PositionEmbeddingSine(config["num_pos_feats"], config["offset"], normalize, config["temperature"])
        close(encode(mask).flatten()[arrays.tensor(f"{name}index")], arrays[f"{name}values"], atol)


@kind("detreg/msdeform_init")
def msdeform_init(case, arrays, _):
    config = case["config"]
    module = common.MSDeformAttn(config["d_model"], config["n_levels"], config["n_heads"], config["n_points"])
    close(module.sampling_offsets.bias, arrays["sampling_offsets_bias"], 1e-6)
    close(module.attention_weights.bias, arrays["attention_weights_bias"], 1e-6)
    for zero in (module.sampling_offsets.weight, module.attention_weights.weight, module.value_proj.bias, module.output_proj.bias):
        assert not zero.any()
    bound = (6 / (2 * config["d_model"])) ** 0.5                       # xavier uniform of a square matrix
    for weight in (module.value_proj.weight, module.output_proj.weight):
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.05)


@kind("detreg/msdeform_attn")
def msdeform_attn(case, arrays, _):
    c, seed = case["config"], case["seed"]
    module = common.MSDeformAttn(c["d_model"], c["n_levels"], c["n_heads"], c["n_points"])
    module.load_state_dict({name: torch.from_numpy(fill(name, tuple(shape), seed)) * (2.0 if name.startswith("sampling_offsets.") else 1.0)
                            for name, shape in case["state_dict"]})
    shapes = [tuple(s) for s in arrays["spatial_shapes"].tolist()]
    query = tensor("query", (c["N"], c["Lq"], c["d_model"]), seed).requires_grad_()
    value = tensor("value", (c["N"], sum(h * w for h, w in shapes), c["d_model"]), seed).requires_grad_()
    padding = arrays.tensor("padding_mask", torch.bool)
    output = module(query, arrays.tensor("reference_points"), value, shapes, padding if c["masked"] else None)
    (output * tensor("grad_out", output.shape, seed)).sum().backward()
    close(output, arrays["output"], 1e-5)
    close(query.grad, arrays["grad_query"], 1e-4)
    close(value.grad, arrays["grad_value"], 1e-4)
    close(module.sampling_offsets.weight.grad, arrays["grad_sampling_offsets_weight"], 1e-4)


@kind("detreg/transformer")
def transformer(case, arrays, _):
    c, seed = case["config"], case["seed"]
    model = common.DeformableTransformer(c["d_model"], c["nhead"], c["enc"], c["dec"], c["ffn"], 0.0, c["levels"], c["points"]).eval()
    if c["box_refine"]:
        model.decoder.bbox_embed = torch.nn.ModuleList(common.MLP(c["d_model"], c["d_model"], 4, 3) for _ in range(c["dec"]))
    model.load_state_dict({name: torch.from_numpy(fill(name, tuple(shape), seed)) for name, shape in case["state_dict"]})
    masks = [arrays.tensor(f"mask{level}", torch.bool) for level in range(c["levels"])]
    sources = [tensor(f"src{level}", (len(m), c["d_model"], *m.shape[1:]), seed) for level, m in enumerate(masks)]
    positions = [tensor(f"pos{level}", s.shape, seed) for level, s in enumerate(sources)]
    hs, initial, references, memory = model(sources, masks, positions, tensor("query_embed", (c["queries"], 2 * c["d_model"]), seed))
    close(hs, arrays["hs"], 2e-5)
    close(initial, arrays["init_reference"], 2e-5)
    close(references, arrays["inter_references"], 2e-5)
    close_samples(memory, arrays, "memory", 2e-5)


@kind("detreg/box_transforms")
def box_transforms(case, arrays, _):
    for w, h, size, max_size, new_w, new_h in arrays["resize_table"].tolist():
        assert data.resized_hw((h, w), size, max_size or None) == (new_h, new_w)
    width, height = arrays["image_wh"].tolist()
    boxes, resized = arrays.tensor("boxes"), tuple(arrays["resized_wh"].tolist())[::-1]
    image = data.Image.new("RGB", (width, height))
    region = tuple(arrays["region"].tolist())

    def apply(hw=(height, width), **draws):
        return data.apply_geometry(image, boxes, data.Geometry(**{"flip": False, "first_hw": None, "crop": None, "hw": hw, **draws}))

    _, cropped, kept = apply(hw=region[2:], crop=region)
    close(cropped, arrays["crop_boxes"], 1e-3)
    close(kept, arrays["crop_kept"], 0)
    close(apply(flip=True)[1], arrays["flip_boxes"], 1e-3)
    assert data.resized_hw((height, width), 336, 600) == resized
    view, moved, _ = apply(hw=resized)
    assert view.size == resized[::-1]
    close(moved, arrays["resize_boxes"], 1e-3)
    close(data.normalized_cxcywh(moved, resized), arrays["normalised_boxes"], 1e-6)


@kind("detreg/proposals")
def proposal_boxes(case, arrays, _):
    c = case["config"]
    for i, hw in enumerate(c["images_hw"]):
        for grid in c["res_size"]:
            close(proposals.rects_to_boxes(arrays[f"rects_{i}_{grid}"], tuple(hw), grid), arrays[f"boxes_{i}_{grid}"], 1e-3)
    expected = arrays["importance_probability"]
    close(proposals.importance_probability(len(expected), 30, released=True), expected, 1e-6)


@kind("detreg/label_subset")
def label_subset(case, arrays, _):
    ids = [7 * i + 3 for i in range(case["config"]["n"])]
    for fraction in case["config"]["fractions"]:
        close(data.label_subset(ids, fraction, case["seed"]), arrays[f"subset_{fraction}"], 0)


@kind("detreg/class_agnostic_scores")
def class_agnostic_scores(case, arrays, _):
    boxes = arrays.tensor("boxes_xyxy")
    logits = tensor("logits", (len(boxes), case["config"]["num_classes"]), case["seed"])
    scores, xywh = evaluation.class_agnostic_scores(logits, boxes)
    close(scores, arrays["scores"], 1e-4)
    close(xywh, arrays["boxes_xywh"], 1e-4)


@kind("detreg/postprocess")
def postprocess(case, arrays, _):
    c = case["config"]
    logits = tensor("logits", (c["B"], c["Q"], c["C"]), case["seed"])
    results = common.post_process({"pred_logits": logits, "pred_boxes": arrays.tensor("pred_boxes")}, arrays.tensor("sizes"))
    for i, result in enumerate(results):
        close(result["scores"], arrays[f"scores{i}"], 1e-6)
        close(result["labels"], arrays[f"labels{i}"], 0)
        close(result["boxes"], arrays[f"boxes{i}"], 1e-3)


@kind("detreg/embedding_target")
def embedding_target(case, arrays, _):
    c, seed = case["config"], case["seed"]
    patches = tensor("patches", (c["n"], 3, c["patch"], c["patch"]), seed)
    descriptor = detreg.RegionDescriptor(common.Backbone("resnet50", trainable=0)).eval()
    descriptor.load_state_dict({k: torch.from_numpy(fill(k, tuple(v.shape), seed)) for k, v in descriptor.state_dict().items()})
    close(descriptor(patches), arrays["intermediate"], 1e-4)
    head = detreg.SwAVDescriptor()
    names = {k: tuple(v.shape) for k, v in head.state_dict().items()}
    assert all(names[name] == tuple(shape) for name, shape in case["head_keys"])
    head.load_state_dict({k: torch.from_numpy(fill(k, shape, seed)) for k, shape in names.items()})
    with torch.no_grad():
        close(head.train()(patches), arrays["head_train_bn"], 1e-4)
        close(head.eval()(patches), arrays["head_eval_bn"], 1e-4)       # with the statistics the pass above left


# ==== Matching and losses ==========================================================================================

@kind("detreg/criterion")
def criterion(case, arrays, _):
    c, seed = case["config"], case["seed"]
    weights, layers = c["weights"], c["aux_layers"] + 1
    matcher = common.HungarianMatcher(c["costs"]["cls"], c["costs"]["bbox"], c["costs"]["giou"])
    criterion = common.SetCriterion(matcher, weights["loss_ce"], weights["loss_bbox"], weights["loss_giou"])
    targets = [{"labels": arrays.tensor(f"target_labels{b}"), "boxes": arrays.tensor(f"target_boxes{b}")} for b in range(c["B"])]
    logits = [(1.5 * tensor(f"logits{i}", (c["B"], c["queries"], c["num_classes"]), seed) - 2.0).requires_grad_() for i in range(layers)]
    boxes = [arrays.tensor(f"boxes{i}").requires_grad_() for i in range(layers)]
    outputs = [{"pred_logits": l, "pred_boxes": b} for l, b in zip(logits, boxes)]
    for i, layer in enumerate(outputs):
        costs, pairs = matcher.costs(layer, targets), matcher(layer, targets)
        for b in range(c["B"]):
            if len(targets[b]["labels"]):
                close(costs[b], arrays[f"cost_layer{i}_image{b}"], 1e-5, 1e-5)
            close(pairs[b][0], arrays[f"src_layer{i}_image{b}"], 0)
            close(pairs[b][1], arrays[f"tgt_layer{i}_image{b}"], 0)
    outputs = {**outputs[-1], "aux_outputs": outputs[:-1]}
    num_boxes = common.normalizer(sum(len(t["labels"]) for t in targets), torch.device("cpu"))
    assert num_boxes == case["num_boxes"]
    if c["embed_dim"]:
        features = tensor("features", (c["B"], c["queries"], c["embed_dim"]), seed).requires_grad_()
        outputs["pred_features"] = features
        targets = [{**t, "features": tensor(f"target_features{b}", (len(t["labels"]), c["embed_dim"]), seed)} for b, t in enumerate(targets)]
        cfg = detreg.Config(lambda_e=weights["loss_object_embedding"])
        pairs = common.normalizer(sum(min(len(t["labels"]), c["queries"]) for t in targets), torch.device("cpu"))
        total, losses = detreg.detreg_loss(cfg, criterion, outputs, targets, num_boxes, pairs)
        for mean in ("global", "local"):                                # one process: the two means agree
            cfg.embedding_mean = mean
            close(detreg.detreg_loss(cfg, criterion, outputs, targets, num_boxes, pairs)[0], case["weighted_total"], 1e-5, 1e-5)
    else:
        losses, _ = criterion(outputs, targets, num_boxes)
        total = criterion.total(losses)
    assert set(losses) == set(case["losses"])
    for name, expected in case["losses"].items():
        close(losses[name], expected, 1e-5, 1e-5, name)
    close(total, case["weighted_total"], 1e-5, 1e-5)
    total.backward()
    for i in range(layers):
        close_samples(logits[i].grad, arrays, f"grad_logits{i}", 1e-6)
        close(boxes[i].grad, arrays[f"grad_boxes{i}"], 1e-6)
    if c["embed_dim"]:
        close_samples(features.grad, arrays, "grad_features", 1e-6)


# ==== Whole models =================================================================================================

@kind("detreg/full_model")
def full_model(case, arrays, seen):
    entries = manifest(case["manifest"], seen.path)["entries"]
    c = case["config"]
    resize = {"query_embed.weight": [c["num_queries"], 2 * c["hidden_dim"]]}
    entries = [(name, resize.get(name, shape), *alias) for name, shape, *alias in entries]
    path = released_file(seen.tmp, released_state(entries, case))
    model, _ = load_released(path, nheads=c["nheads"])
    expected = {"num_queries", "hidden_dim", "num_feature_levels", "enc_layers", "dec_layers", "dim_feedforward", "with_box_refine"}
    arch = convert.architecture(model.state_dict(), path)
    assert {k: arch[k] for k in expected} == {k: c[k] for k in expected}
    images = [tensor(f"img{i}", (3, *hw), case["seed"]) for i, hw in enumerate(case["images_hw"])]
    batch = to_batch(images)
    with torch.no_grad():
        features = detector_of(model.eval()).backbone[0](batch["images"])
        outputs = model(**batch)
    close(outputs["pred_logits"], arrays["pred_logits"], 2e-4)
    close(outputs["pred_boxes"], arrays["pred_boxes"], 2e-5)
    if "pred_features" in arrays:
        close(outputs["pred_features"], arrays["pred_features"], 2e-4)
    for i, aux in enumerate(outputs["aux_outputs"]):
        close(aux["pred_boxes"], arrays[f"aux{i}_boxes"], 2e-5)
        close_samples(aux["pred_logits"], arrays, f"aux{i}_logits", 2e-4)
    for i, feature in enumerate(features):
        close_samples(feature, arrays, f"backbone{i}", 1e-4)
        mask = torch.nn.functional.interpolate(batch["mask"][:, None].float(), size=feature.shape[-2:])[:, 0].bool()
        close(mask, arrays[f"backbone{i}_mask"].astype(bool), 0)


@kind("detreg/train_steps")
def train_steps(case, arrays, seen):
    """The project's own training step, several times on one batch; the descriptor network is replaced by the case's descriptors."""
    c, seed = case["config"], case["seed"]
    pretrain = "loss_object_embedding" in case["losses_per_step"][0]
    cfg = (detreg.Config if pretrain else finetune.Config)(
        num_queries=c["queries"], enc_layers=c["enc"], dec_layers=c["dec"], dim_feedforward=c["ffn"], hidden_dim=c["hidden"], dropout=0.0, lr=c["lr"],
        lr_backbone=c["lr_backbone"], lr_linear_proj_mult=c["linear_mult"], weight_decay=c["weight_decay"], clip_max_norm=c["clip"])
    model = common.build_detector(cfg, c["num_classes"], focal=True)
    model = detreg.DETReg(model, embedding_dim=512) if pretrain else model
    shared = {}
    for name, value in model.state_dict().items():                      # the canonical alias: shortest, then alphabetically first
        shared[value.data_ptr()] = min(shared.get(value.data_ptr(), name), name, key=lambda n: (len(n), n))
    entries = [(name, value.shape, shared[value.data_ptr()]) for name, value in model.state_dict().items()]
    model, _ = load_released(released_file(seen.tmp, released_state(entries, case)), lr_backbone=c["lr_backbone"])
    model.train()
    targets = [{"boxes": arrays.tensor(f"target_boxes{b}"), "labels": arrays.tensor(f"target_labels{b}")} for b in range(len(case["images_hw"]))]
    if pretrain:
        for b, t in enumerate(targets):
            t["patches"] = tensor(f"target_features{b}", (len(t["labels"]), 512), seed).abs()
    batch = {**to_batch([tensor(f"img{i}", (3, *hw), seed) for i, hw in enumerate(case["images_hw"])]), "targets": targets}
    optimizer = common.build_optimizer(cfg, model)
    identity = torch.nn.Identity()
    for step, expected in enumerate(case["losses_per_step"]):
        args = (cfg, model, identity, detreg.build_criterion(dataclasses.replace(cfg, num_classes=c["num_classes"]))) if pretrain \
            else (cfg, model, finetune.build_criterion(cfg))
        losses = (detreg if pretrain else finetune).train_step(*args, optimizer, [batch], step, torch.device("cpu"))
        for name, value in expected.items():
            close(losses["loss" if name == "total" else name], value, *((1e-4, 1e-6) if step == 0 else (2e-3, 2e-3)), f"step {step} {name}")
        norm = case["grad_norm_before_clip"][step]
        close(losses["grad_norm"], norm, 0, 1e-3 if step == 0 else 2e-3)
        if step == 0:
            expected_norms = case["gradient_norm_by_parameter_step0"]
            unclip = max(losses["grad_norm"] + 1e-6, c["clip"]) / c["clip"]
            norms = {bare(n): p.grad.norm() * unclip for n, p in model.named_parameters() if p.grad is not None}
            assert set(norms) == set(expected_norms)
            for name, value in expected_norms.items():
                close(norms[name], value, 1e-4 * norm, 1e-3, name)


@kind("detreg/param_groups")
def groups(case, arrays, _):
    for name, expected in case["cases"].items():
        names = {n for g in expected["groups"] for n in g["names"]} | set(expected["frozen"])
        rates = [g["lr"] for g in expected["groups"]]
        layers = {side: 1 + max(int(re.match(rf"transformer\.{side}\.layers\.(\d+)", n)[1]) for n in names if f"transformer.{side}.layers" in n)
                  for side in ("encoder", "decoder")}
        vanilla = not any("sampling_offsets" in n for n in names)
        pretrain = any(n.startswith("feature_embed") for n in names)
        argv = ["--detector", "detr" if vanilla else "deformable_detr", "--lr_backbone", rates[1], "--enc_layers", layers["encoder"],
                "--dec_layers", layers["decoder"], "--with_box_refine", any("decoder.bbox_embed" in n for n in names)]
        argv += ["--pre_norm", "transformer.encoder.norm.weight" in names] if vanilla else []
        script = detreg if pretrain else finetune
        cfg = common.parse_config(script.Config, script.PRESETS, list(map(str, argv)), script="x", description="", by_data=script.recipe_of)
        assert cfg.lr == rates[0]
        model = common.build_detector(cfg, 21 if name.endswith("voc") else 91 + vanilla, focal=not vanilla)
        model = detreg.DETReg(model, embedding_dim=512) if pretrain else model
        mine = common.param_groups(model, rates[0], rates[1], rates[2] / rates[0] if rates[0] else 0.0)
        for group, wanted, count, numel in zip(mine, expected["groups"], expected["counts"], expected["numel"], strict=True):
            assert sorted(map(bare, group["names"])) == sorted(wanted["names"]) and len(group["params"]) == count
            assert group["lr"] == pytest.approx(wanted["lr"]) and sum(p.numel() for p in group["params"]) == numel
        assert {bare(n) for n, p in model.named_parameters() if not p.requires_grad} == set(expected["frozen"])
        assert (cfg.weight_decay, cfg.clip_max_norm) == (expected["weight_decay"], expected["clip_max_norm"])
        if "loading_from_pretrain" in expected:
            rule = expected["loading_from_pretrain"]
            frozen = dataclasses.replace(cfg, lr_backbone=0.0)
            pretrained = detreg.DETReg(common.build_detector(frozen, 91, focal=True), embedding_dim=512).state_dict()
            dropped = {r"^feature_embed\.": "pretext head", r"^class_embed\.": "class head"}
            common.load_matching(model, pretrained, drop=dropped, source=name)
            own = model.state_dict()
            assert sorted(own.keys() - {k for k in pretrained if "class_embed" not in k}) == sorted(rule["missing"])
            assert sorted({k for k in pretrained if "class_embed" not in k} - own.keys()) == sorted(rule["unexpected"])


# ==== DETR and UP-DETR =============================================================================================

def recipe_shape(text):
    """'fill("input:NAME",[2, 3],SEED)' in a recipe -> (NAME, (2, 3), SEED)."""
    name, shape, seed = re.search(r'fill\("input:(\w+)",\s*\[([\d, ]+)\],\s*(\d+)\)', text).groups()
    return name, tuple(map(int, shape.split(","))), int(seed)


def relative(text):
    """'rel 1e-4' -> 1e-4"""
    return float(re.fullmatch(r"rel (\S+)", text)[1])


def weights_of(table):
    """Unsuffixed loss weights of a case, which lists them once per layer; all layers must have the same."""
    own = {name: w for name, w in table.items() if not re.search(r"_\d+$", name)}
    assert all(w == own[re.sub(r"_\d+$", "", name)] for name, w in table.items())
    return own


def detr_entries(entries, c):
    """The name list of a DETR or UP-DETR of another size: layers, widths, queries, classes and norms as the case's config has them."""
    shapes = {name: list(shape) for name, shape, *_ in entries}
    hidden, ffn = shapes["input_proj.bias"][0], shapes["transformer.encoder.layers.0.linear1.bias"][0]
    width = {hidden: c["hidden"], 3 * hidden: 3 * c["hidden"], ffn: c["ffn"]}
    result = {}
    for name, shape in shapes.items():
        if name.startswith(("transformer.", "class_embed.", "bbox_embed.", "query_embed.")):
            shape = [width.get(n, n) for n in shape]
        elif name.startswith(("input_proj.", "patch2query.")):
            shape = [width[shape[0]], *shape[1:]]
        elif name.startswith("feature_align.layers.0."):
            shape = [width[n] for n in shape]
        elif name == "feature_align.layers.1.weight":
            shape = [shape[0], width[shape[1]]]
        layer = re.match(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.", name)
        if layer and layer[2] != "0":
            continue
        for i in range(c["enc" if layer[1] == "encoder" else "dec"]) if layer else (0,):
            result[name.replace(".layers.0.", f".layers.{i}.", 1) if layer else name] = shape
    result["query_embed.weight"][0] = c.get("num_queries") or c["N"]
    for name in ("class_embed.weight", "class_embed.bias"):
        result[name][0] = c["num_classes"] + 1
    for leaf in ("weight", "bias"):
        result.pop(f"transformer.encoder.norm.{leaf}", None)
        if c["pre_norm"]:
            result[f"transformer.encoder.norm.{leaf}"] = [c["hidden"]]
    if not c.get("feature_recon", True):
        result = {name: shape for name, shape in result.items() if not name.startswith("feature_align.")}
    return list(result.items())


def load_detr(case, seen, **overrides):
    """The model of a `detr_full`, `updetr_full` or `train_mode` case, through a file."""
    c = case["config"]
    entries = manifest(re.search(r"statedict_\w+\.json", case["keys"])[0], seen.path)["entries"]
    path = released_file(seen.tmp, released_state(detr_entries(entries, c), case))
    model, state = load_released(path, num_groups=c.get("M", 1), nheads=c["nheads"], **overrides)
    found = convert.architecture(state, path)
    expected = {"detector": "detr", "num_queries": c.get("num_queries") or c["N"], "hidden_dim": c["hidden"], "enc_layers": c["enc"],
                "dec_layers": c["dec"], "dim_feedforward": c["ffn"], "pre_norm": c["pre_norm"]}
    assert {k: found[k] for k in expected} == expected
    inputs = {name.removeprefix("input:"): tensor(name.removeprefix("input:"), shape, case["seed"]) for name, shape in case["inputs"]}
    images = [inputs[name] for name in sorted((n for n in inputs if n.startswith("image")), key=lambda n: int(n[5:]))]
    return model, to_batch(images), inputs.get("patches")


@kind("updetr/attention_mask")
def attention_mask(case, arrays, _):
    for name in case["arrays"]:
        queries, patches = map(int, re.fullmatch(r"allowed_(\d+)_(\d+)", name).groups())
        close(~updetr.group_mask(queries, patches), arrays[name], case["tolerance"], what=name)


@kind("updetr/box_ops")
def box_ops(case, arrays, _):
    """torchvision's operators are the project's own; NaN where the released ones have it."""
    b1, b2, atol = arrays.tensor("b1"), arrays.tensor("b2"), case["tolerance"]
    giou, iou = common.generalized_box_iou(b1, b2), torchvision.ops.box_iou(b1, b2)
    sides = (torch.minimum(b1[:, None, 2:], b2[:, 2:]) - torch.maximum(b1[:, None, :2], b2[:, :2])).clamp(min=0)
    union = torchvision.ops.box_area(b1)[:, None] + torchvision.ops.box_area(b2) - sides.prod(-1)
    for mine, name in ((iou, "iou"), (union, "union"), (giou, "giou")):
        close(mine, arrays[name], atol, what=name)                      # NaN equals NaN
    for mine in (iou, giou):
        assert mine.isnan().nonzero().tolist() == sorted(case["nan_positions"])
    close(common.box_convert(arrays.tensor("cxcywh"), "cxcywh", "xyxy"), arrays["xyxy"], atol)
    close(common.box_convert(b2, "xyxy", "cxcywh"), arrays["back"], atol)


@kind("updetr/sine_position")
def detr_sine_position(case, arrays, _):
    mask = arrays.tensor("mask", torch.bool)
    for name in case["arrays"]:
        if width := re.fullmatch(r"pos(\d+)", name):
            encoded = common.PositionEmbeddingSine(int(width[1]) // 2, offset=0.0)(mask)
            assert encoded.shape[1] == int(width[1])
            close(encoded[:, arrays.tensor(f"channels{width[1]}")], arrays[name], case["tolerance"], what=name)
    detector = common.DETR(common.Backbone("resnet18", (4,)), common.DETRTransformer(32, 2, 1, 1, 16, 0.0), rows=2, focal=False)
    assert detector.position.offset == 0.0                              # what a DETR is built with


@kind("updetr/transformer")
def detr_transformer(case, arrays, _):
    c = case["config"]
    model = common.DETRTransformer(c["d_model"], c["nhead"], c["enc"], c["dec"], c["ffn"], 0.0, c["normalize_before"]).eval()
    model.load_state_dict(released_state(case["keys"], case))
    inputs = {name: tensor(name.removeprefix("input:"), shape, case["seed"]) for name, shape in case["inputs"]}
    source, position, queries = inputs["input:src"], inputs["input:pos"], inputs["input:query_embed"].transpose(0, 1)        # [B, N, C]
    mask, blocked = arrays.tensor("mask", torch.bool), arrays.tensor("decoder_mask") == -torch.inf
    layers = slice(None) if c["return_intermediate"] else slice(-1, None)
    atol = case["tolerance"]
    for name, query, self_mask in (("hs", queries, None), ("hs_masked", queries, blocked), ("hs_shared", queries[0], None)):
        hs, reference, memory = model(source, mask, position, query, self_mask)
        close(hs[layers], arrays[name], atol, what=name)
        close(memory, arrays["memory"], atol)
        assert reference is None


@kind("updetr/matcher")
def matcher(case, arrays, _):
    costs = case["config"]
    matcher = common.HungarianMatcher(costs["cost_class"], costs["cost_bbox"], costs["cost_giou"], focal=False)
    for i, c in enumerate(case["cases"]):
        outputs = {"pred_logits": tensor(f"logits{i}", (c["B"], c["N"], c["K"]), case["seed"]), "pred_boxes": arrays.tensor(f"c{i}_pred_boxes")}
        targets = [{"labels": arrays.tensor(f"c{i}_labels{b}"), "boxes": arrays.tensor(f"c{i}_boxes{b}")} for b in range(c["B"])]
        assert [len(t["labels"]) for t in targets] == c["targets"]
        for b, (query, target) in enumerate(matcher(outputs, targets)):
            close(query, arrays[f"c{i}_i{b}"], 0)
            close(target, arrays[f"c{i}_j{b}"], 0)


def close_losses(losses, total, arrays, case, atol, rtol, total_name="total"):
    """Every term of the case (arrays L_<name>) and their weighted sum."""
    assert {f"L_{name}" for name in losses} == {name for name in case["arrays"] if name.startswith("L_")}
    for name, value in losses.items():
        close(value, arrays[f"L_{name}"], atol, rtol, name)
    close(total, arrays[total_name], atol, rtol, total_name)


@kind("updetr/criterion_detr")
def criterion_detr(case, arrays, _):
    c, weights, atol = case["config"], weights_of(case["config"]["weights"]), case["tolerance"]
    matcher = common.HungarianMatcher(c["cost"]["cls"], c["cost"]["bbox"], c["cost"]["giou"], focal=False)
    criterion = common.SetCriterion(matcher, weights["loss_ce"], weights["loss_bbox"], weights["loss_giou"], eos_coef=c["eos_coef"])
    (_, shape), = case["inputs"]
    logits, boxes = tensor("logits", shape, case["seed"]).requires_grad_(), arrays.tensor("pred_boxes").requires_grad_()
    layers = [{"pred_logits": l, "pred_boxes": b} for l, b in zip(logits, boxes)]
    targets = [{"labels": arrays.tensor(f"tgt_labels{b}"), "boxes": arrays.tensor(f"tgt_boxes{b}")} for b in range(shape[1])]
    counts = [len(t["labels"]) for t in targets]
    num_boxes = common.normalizer(sum(counts), torch.device("cpu"))
    # one process, one batch: the mean over all processes and the released mean of each process are the same
    for class_weight in (None, common.normalizer(criterion.class_weight_sum(counts, shape[2]), torch.device("cpu"))):
        losses, _ = criterion({**layers[-1], "aux_outputs": layers[:-1]}, targets, num_boxes, class_weight)
        total = criterion.total(losses)
        close_losses(losses, total, arrays, case, atol, atol)
        logits.grad = boxes.grad = None
        total.backward()
        close(boxes.grad, arrays["grad_boxes"], atol)
        close(logits.grad.abs().sum(-1), arrays["grad_logits_absum"], atol)


@kind("updetr/criterion_updetr")
def criterion_updetr(case, arrays, _):
    c, weights, atol, seed = case["config"], weights_of(case["config"]["weights"]), case["tolerance"], case["seed"]
    cfg = updetr.Config(num_queries=c["N"], num_patches=c["M"], eos_coef=c["eos_coef"], lambda_cls=weights["loss_ce"], lambda_l1=weights["loss_bbox"],
                        lambda_giou=weights["loss_giou"], lambda_rec=weights.get("loss_feature", 0.0), reconstruction="loss_feature" in weights)
    criterion = updetr.build_criterion(cfg)
    costs = c["cost"]
    assert (criterion.matcher.cost_class, criterion.matcher.cost_bbox, criterion.matcher.cost_giou) == (costs["cls"], costs["bbox"], costs["giou"])
    assert c["ce_class_weight"] == [1] * c["num_classes"] + [c["eos_coef"]]
    shapes = dict(case["inputs"])
    logits, features = (tensor(name, shapes[f"input:{name}"], seed).requires_grad_() for name in ("logits", "pred_feature"))
    boxes = arrays.tensor("pred_boxes").requires_grad_()
    layers = [{"pred_logits": l, "pred_boxes": b, "pred_features": f} for l, b, f in zip(logits, boxes, features)]
    assert len(layers) == c["layers"] and logits.shape[-1] == c["num_classes"] + 1
    outputs = {**layers[-1], "aux_outputs": layers[:-1],
               "patch_features": tensor("gt_feature", shapes["input:gt_feature"], seed).abs().view(c["B"], c["M"], c["C_feature"])}
    targets = [{"labels": torch.ones(c["M"], dtype=torch.int64), "boxes": b} for b in arrays.tensor("tgt_boxes")]
    counts = [c["M"]] * c["B"]
    num_boxes = common.normalizer(sum(counts), torch.device("cpu"))
    for class_weight in (None, common.normalizer(criterion.class_weight_sum(counts, c["N"]), torch.device("cpu"))):
        total, losses = updetr.updetr_loss(criterion, outputs, targets, num_boxes, class_weight)
        close_losses(losses, total, arrays, case, atol, atol)
        logits.grad = boxes.grad = features.grad = None
        total.backward()
        for value, name in ((logits, "grad_logits"), (boxes, "grad_boxes"), (features, "grad_feature")):
            close(value.grad, arrays[name], atol, what=name)


@kind("updetr/resize_sizes")
def resize_sizes(case, arrays, _):
    max_size, atol = int(re.search(r"max_size=(\d+)", case["what"])[1]), float(re.search(r"boxes (\S+)", case["tolerance"])[1])
    images = {}
    for (w, h, scale, new_w, new_h), expected in zip(arrays["rows"].tolist(), arrays["boxes"], strict=True):
        hw = data.resized_hw((h, w), scale, max_size)
        assert hw == (new_h, new_w)
        geometry = data.draw_geometry(np.random.default_rng(0), (h, w), scales=(scale,), max_size=max_size, crop_scales=None, flip=0)
        image = images.setdefault((w, h), data.Image.new("RGB", (w, h)))
        view, boxes, _ = data.apply_geometry(image, torch.tensor([[w // 4, h // 5, w // 2, h - 3]]).float(), geometry)
        assert view.size == (new_w, new_h)
        close(data.normalized_cxcywh(boxes, hw)[0], expected, atol)


def sampler_values(boxes, width, height):
    """The quantities of the sampler statistics, of boxes [n, 4] xyxy px."""
    x, y, w, h = boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return {"w_rel": w / width, "h_rel": h / height, "x_rel": x / width, "y_rel": y / height, "cx": (x + w / 2) / width, "cy": (y + h / 2) / height,
            "area": w * h / (width * height), "aspect_log": np.log(w / h), "x_free": x / (width - w), "y_free": y / (height - h)}


@kind("updetr/patch_sampler_stats")
def patch_sampler_stats(case, arrays, _):
    """The function training draws patches with, against the released sampler's statistics: means within 4 standard errors of both samples,
    distribution functions within the case's limit, at the quantiles and at the histogram's edges."""
    width, height = case["image_wh"]
    least, limit = int(re.search(r"min_pixel=(\d+)", case["official"])[1]), float(re.search(r"KS statistic < ([\d.]+)", case["tolerance"])[1])
    official = int(arrays[sorted(case["arrays"])[0]].sum())
    boxes = updetr.draw_patches(np.random.default_rng(case["seed"]), (height, width), 10 * official)
    sides = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0 and (sides >= least).all() and (sides <= [width - least, height - least]).all()
    assert (boxes[:, 2:] <= [width - 1, height - 1]).all()              # never at the right or bottom border
    assert sides.min(0).tolist() == [least] * 2 and sides.max(0).tolist() == [width - least, height - least]
    values = sampler_values(boxes, width, height)
    assert set(values) == set(case["stats"]) and {f"{k}_hist" for k in values} >= case["arrays"]
    error = 1 / np.sqrt(official) + 1 / np.sqrt(len(boxes))
    for name, mine in values.items():
        expected = case["stats"][name]
        assert abs(mine.mean() - expected["mean"]) < 4 * max(expected["std"], mine.std()) * error, name
        assert mine.std() == pytest.approx(expected["std"], rel=4 * error), name
        for q, value in expected["quantiles"].items():
            assert (mine < value).mean() - limit < float(q) < (mine <= value).mean() + limit, (name, q)
        if f"{name}_hist" in case["arrays"]:
            histogram = np.cumsum(arrays[f"{name}_hist"]) / official
            edges = np.linspace(0, 1, len(histogram) + 1)
            assert np.abs(np.cumsum(np.histogram(mine, edges)[0]) / len(mine) - histogram).max() < limit, name
    assert abs(np.corrcoef(values["w_rel"], values["h_rel"])[0, 1] - case["corr_w_h"]) < 4 * error
    assert abs(np.corrcoef(values["cx"], values["w_rel"])[0, 1] - case["corr_cx_w"]) < 4 * error
    assert values["w_rel"].mean() == pytest.approx(case["analytic"]["w_rel_mean"], abs=4 * error * case["analytic"]["w_rel_std"])


@kind("updetr/detr_full")
def detr_full(case, arrays, seen):
    model, batch, _ = load_detr(case, seen)
    model.eval()
    atol = case["tolerance"]
    with torch.no_grad():
        features, outputs = model.backbone[0](batch["images"]), model(**batch)
    close(batch["images"].shape, arrays["padded_shape"], 0)
    close(batch["mask"], arrays["mask"], 0)
    close(outputs["pred_logits"], arrays["pred_logits"], atol["pred_logits"], what="pred_logits")
    close(outputs["pred_boxes"], arrays["pred_boxes"], atol["pred_boxes"], what="pred_boxes")
    logits, boxes = (torch.stack([aux[name] for aux in outputs["aux_outputs"]]) for name in ("pred_logits", "pred_boxes"))
    close(logits[..., arrays.tensor("aux_logit_cols")], arrays["aux_logits"], atol["pred_logits"], what="aux_logits")
    close(boxes, arrays["aux_boxes"], atol["pred_boxes"], what="aux_boxes")
    close(features[-1][:, arrays.tensor("c5_channels")], arrays["c5"], atol["c5"], what="c5")
    mask = torch.nn.functional.interpolate(batch["mask"][:, None].float(), size=features[-1].shape[-2:])[:, 0].bool()
    close(mask, arrays["c5_mask"], 0)
    close(model.position(mask)[:, arrays.tensor("pos_channels")], arrays["pos"], atol["pos"], what="pos")
    sizes = arrays.tensor("target_sizes")
    for i, result in enumerate(common.post_process(outputs, sizes, focal=False)):
        close(result["scores"], arrays["pp_scores"][i], atol["pred_logits"], what="pp_scores")
        close(result["labels"], arrays["pp_labels"][i], 0)
        scale = sizes[i].flip(0).repeat(2)
        close(result["boxes"] / scale, arrays["pp_boxes"][i] / scale.numpy(), atol["pred_boxes"], what="pp_boxes")


def close_updetr(outputs, arrays, atol, groups):
    """What forward of UP-DETR returns; an array without a tolerance of its own has that of what it comes from."""
    layers = [*outputs["aux_outputs"], outputs]
    close(outputs["pred_logits"], arrays["pred_logits"], atol["pred_logits"], what="pred_logits")
    close(outputs["pred_boxes"], arrays["pred_boxes"], atol["pred_boxes"], what="pred_boxes")
    close(torch.stack([l["pred_logits"] for l in layers[:-1]]), arrays["aux_logits"], atol["pred_logits"], what="aux_logits")
    close(torch.stack([l["pred_boxes"] for l in layers[:-1]]), arrays["aux_boxes"], atol["pred_boxes"], what="aux_boxes")
    if "pred_feature" in arrays:
        channels = arrays.tensor("pred_feature_channels")
        close(outputs["pred_features"][..., channels], arrays["pred_feature"], atol["pred_feature"], what="pred_feature")
        close(outputs["pred_features"].norm(dim=-1), arrays["pred_feature_norm"], atol["pred_feature"], what="pred_feature_norm")
        some = channels[:arrays["aux_feature"].shape[-1]]
        close(torch.stack([l["pred_features"][..., some] for l in layers[:-1]]), arrays["aux_feature"], atol["pred_feature"], what="aux_feature")
    truth = outputs["patch_features"].flatten(0, 1)
    close(truth[:, arrays.tensor("gt_feature_channels")], arrays["gt_feature"], atol["gt_feature"], what="gt_feature")
    close(truth.norm(dim=-1), arrays["gt_feature_norm"], atol["gt_feature"], what="gt_feature_norm")
    if "fig5_keep" in arrays:
        scores, boxes, index = evaluation.most_confident(outputs["pred_logits"], outputs["pred_boxes"], groups)
        close(index, arrays["fig5_keep"], 0)
        close(scores, np.take_along_axis(arrays["fig5_score"], arrays["fig5_keep"], 1), atol["pred_logits"], what="fig5_score")
        close(outputs["pred_logits"].softmax(-1)[..., :-1].amax(-1), arrays["fig5_score"], atol["pred_logits"], what="fig5_score of all")
        close(boxes, np.take_along_axis(arrays["pred_boxes"], arrays["fig5_keep"][..., None], 1), atol["pred_boxes"])


def query_patches(patches, arrays):
    return patches * arrays.tensor("patch_scale") + arrays.tensor("patch_offset")


@kind("updetr/updetr_full")
def updetr_full(case, arrays, seen):
    c = case["config"]
    model, batch, patches = load_detr(case, seen, lr_backbone=0.0)
    assert patches.shape[1] == c["M_given"]
    with torch.no_grad():
        outputs = model.eval()(**batch, patches=query_patches(patches, arrays))
    assert outputs["pred_logits"].shape[1] == c["M_given"] * c["N"] // c["M"]
    close_updetr(outputs, arrays, case["tolerance"], c["M_given"])


@kind("updetr/train_mode")
def updetr_train_mode(case, arrays, seen):
    """The training path with the released draws: which queries keep their patch, and the order of the object queries."""
    c, atol = case["config"], case["tolerance"]
    weights, eos = weights_of(case["weight_dict"]), float(re.search(r"\beos (\d*\.?\d+)", case["train"])[1])
    cfg = updetr.Config(num_queries=c["N"], num_patches=c["M"], eos_coef=eos, mask_ratio=c["mask_ratio"], reconstruction="loss_feature" in weights,
                        lambda_cls=weights["loss_ce"], lambda_l1=weights["loss_bbox"], lambda_giou=weights["loss_giou"],
                        lambda_rec=weights.get("loss_feature", 0.0))
    model, batch, patches = load_detr(case, seen, lr_backbone=0.0 if case["no_grad_backbone"] else cfg.lr, dropout=float(c["dropout"]))
    model.train()
    keep = (arrays.tensor("drop_u") > cfg.mask_ratio).transpose(0, 1) if "drop_u" in arrays else None
    order = arrays.tensor("shuffle_idx") if "shuffle_idx" in arrays else None
    outputs = model(**batch, patches=query_patches(patches, arrays), keep=keep, order=order)
    close_updetr(outputs, arrays, atol, c["M_given"])
    targets = [{"labels": torch.ones(len(b), dtype=torch.int64), "boxes": b} for b in arrays.tensor("tgt_boxes")]
    criterion, counts = updetr.build_criterion(cfg), [len(t["labels"]) for t in targets]
    class_weight = common.normalizer(criterion.class_weight_sum(counts, cfg.num_queries), torch.device("cpu"))
    total, losses = updetr.updetr_loss(criterion, outputs, targets, common.normalizer(sum(counts), torch.device("cpu")), class_weight)
    close_losses(losses, total, arrays, case, 0.0, relative(atol["losses"]), "total_loss")
    total.backward()
    gradients = {bare(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    listed = [name for name in case["params_with_grad"] if name != "..."]                     # the case may give the first ones only
    assert len(gradients) == case["n_with_grad"] and sorted(gradients)[:len(listed)] == listed
    assert len(listed) == len(gradients) or "..." in case["params_with_grad"]
    assert case["no_grad_backbone"] == (not any(n.startswith("backbone.") for n in gradients))
    rel = relative(atol["grad_norms"])
    for name in case["arrays"]:
        if name.startswith("gradnorm_"):
            close(gradients[name.removeprefix("gradnorm_")].norm(), arrays[name], 0.0, rel, name)
    expected = arrays["grad_query_embed"]
    close(gradients["query_embed.weight"], expected, rel * np.abs(expected).max(), what="grad_query_embed")
    close(common.finite_gradient_norm(model, 0, total.item(), 0), arrays["grad_norm_total"], 0.0, rel, "grad_norm_total")


# ==== Conditional DETR =============================================================================================

@kind("siamese/conditional_transformer")
def conditional_transformer(case, arrays, _):
    c, tolerance = case["config"], case["tolerance"]
    model = common.ConditionalTransformer(c["d_model"], c["nhead"], c["num_encoder_layers"], c["num_decoder_layers"], c["dim_feedforward"], 0.0,
                                          c["normalize_before"]).eval()
    model.load_state_dict(released_state(case["state_dict"], case))
    source, position, queries = (tensor(*recipe_shape(case["inputs"][name])) for name in ("src", "pos", "query_embed"))
    hs, reference, _ = model(source, arrays.tensor("mask", torch.bool), position, queries)
    close(hs if c["return_intermediate_dec"] else hs[-1:], arrays["hs"], tolerance["atol"], tolerance["rtol"], "hs")
    close(reference, arrays["reference"], tolerance["atol"], tolerance["rtol"], "reference")


def repeated_image(text):
    """'g=fill(...); repeat every cell 16x16 ..., crop to [96, 128]' -> [3, 96, 128]"""
    rows, columns = map(int, re.search(r"every cell (\d+)x(\d+)", text).groups())
    height, width = map(int, re.search(r"crop to \[(\d+), (\d+)\]", text).groups())
    return tensor(*recipe_shape(text)).repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, :height, :width]


@kind("siamese/conditional_full_model")
def conditional_full_model(case, arrays, seen):
    c, tolerance = case["config"], case["tolerance"]
    path = released_file(seen.tmp, released_state(case["state_dict"], case))
    model, state = load_released(path, nheads=c["nheads"])
    arch = convert.architecture(state, path)
    assert arch["detector"] == "conditional_detr"
    assert all(arch[k] == c[k] for k in ("num_queries", "enc_layers", "dec_layers", "dim_feedforward", "hidden_dim"))
    batch = to_batch([repeated_image(text) for _, text in sorted(case["inputs"].items(), key=lambda item: int(item[0].removeprefix("img")))])
    with torch.no_grad():
        outputs = model.eval()(**batch)
    assert outputs["pred_logits"].shape[-1] == c["num_classes"]
    close(outputs["pred_logits"], arrays["pred_logits"], tolerance["logits_atol"], what="pred_logits")
    close(outputs["pred_boxes"], arrays["pred_boxes"], tolerance["boxes_atol"], what="pred_boxes")
    logits, boxes = (torch.stack([aux[name] for aux in outputs["aux_outputs"]]) for name in ("pred_logits", "pred_boxes"))
    close(logits[..., :arrays["aux_logits"].shape[-1]], arrays["aux_logits"], tolerance["logits_atol"], what="aux_logits")
    close(boxes, arrays["aux_boxes"], tolerance["boxes_atol"], what="aux_boxes")


@kind("siamese/conditional_criterion")
def conditional_criterion(case, arrays, _):
    c, rtol = case["config"], case["tolerance"]["rtol"]
    assert (c["focal_alpha"], c["gamma"]) == (0.25, 2)                  # the project knows no others
    logits = tensor(*recipe_shape(case["inputs"]["pred_logits"]))
    outputs = {"pred_logits": logits, "pred_boxes": arrays.tensor("pred_boxes")}
    targets = [{"labels": arrays.tensor(f"labels{b}"), "boxes": arrays.tensor(f"target_boxes{b}")} for b in range(len(logits))]
    assert logits.shape[-1] == c["num_classes"]
    criterion = common.SetCriterion(common.HungarianMatcher(c["cost"]["cls"], c["cost"]["l1"], c["cost"]["giou"]))
    losses, pairs = criterion(outputs, targets, common.normalizer(sum(len(t["labels"]) for t in targets), torch.device("cpu")))
    for b, (query, target) in enumerate(pairs):
        close(query, arrays[f"match_src{b}"], 0)
        close(target, arrays[f"match_tgt{b}"], 0)
    assert set(losses) == set(case["losses"])
    for name, expected in case["losses"].items():
        close(losses[name], expected, 0.0, rtol, name)


# ==== Names and shapes of released checkpoints =====================================================================

def expected_tensors(state):
    """Where the tensors of a released file must end up: {our name: tensor}, spelled out here once more, independently of convert.py."""
    deformable, layers = "transformer.level_embed" in state, {n.split(".")[3] for n in state if n.startswith("transformer.decoder.layers.")}
    wanted = {}
    for name, value in state.items():
        head = re.match(r"(?:pred_head\.)?(bbox_embed|class_embed)\.((?:layers|weight|bias).*)", name)
        if name == "pred_head.criterion.empty_weight" or name == "transformer.tgt_embed.weight":
            continue
        if name == "query_embed.weight" and "transformer.tgt_embed.weight" in state:
            wanted[name] = torch.cat([value, state["transformer.tgt_embed.weight"]], 1)      # position half, then content
        elif head and deformable:
            wanted |= {f"{head[1]}.{layer}.{head[2]}": value for layer in layers}
        elif name.startswith("backbone.") and not name.startswith("backbone.0."):
            wanted["backbone.0.body." + name.removeprefix("backbone.")] = value
        else:
            wanted[name.removeprefix("pred_head.")] = value
    return wanted


def converted_file(case, path, wanted):
    """What the released converter of Siamese DETR leaves, loaded as fine-tuning does: everything but the class head and patch2query."""
    categories = [{"id": 10 * i + 1, "name": f"class {i}"} for i in range(5)]
    checkpoint, state, arch = finetune.read_init(str(path))
    cfg = finetune.adopt_architecture(finetune.Config(init_from=str(path)), arch, set())
    model, mapped = finetune.build_model(cfg, checkpoint, state, categories)
    own, rest = model.state_dict(), {n for n in wanted if n.startswith("patch2query.")}
    assert rest and mapped == list(range(len(categories)))
    new = {n for n in own if n.startswith("class_embed.")}
    assert own.keys() - new == wanted.keys() - rest - new
    for name in own.keys() - new:
        assert torch.equal(own[name], wanted[name]), name
    softmax = cfg.detector == "detr"
    assert all(len(own[name]) == len(categories) + softmax for name in new) and new
    if not softmax:                                                     # made anew: p = .01
        assert all((own[n] == -np.float32(np.log(99))).all() for n in new if n.endswith("bias"))


@kind("statedict")
def statedict(case, arrays, seen):
    """A file with a released checkpoint's names and shapes loads with nothing left over, and our model has the same names."""
    names = [name for name, *_ in case["entries"]]
    # one head for all decoder layers appears under several names; with box refinement each layer has its own
    shared = not any(name.startswith("transformer.decoder.bbox_embed.") for name in names)
    entries = [entry if len(entry) > 2 or not shared else (*entry, re.sub(r"^(bbox_embed|class_embed)\.\d+\.", r"\1.0.", entry[0]))
               for entry in case["entries"]]
    state = released_state(entries, case)
    wanted = expected_tensors(state)
    path = released_file(seen.tmp, state, case["wrapping"])
    if "converter" in case["wrapping"]:
        return converted_file(case, path, wanted)
    pretraining = any(name.startswith(("feature_embed.", "patch2query.")) for name in state)
    model, _ = load_released(path, lr_backbone=0.0 if pretraining else 2e-5)
    own = model.state_dict()
    assert own.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(own[name], value), name
    if "may start with module." in case["wrapping"]:
        again = convert.detector_state({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
        assert again.keys() == wanted.keys() and all(torch.equal(again[k], v) for k, v in wanted.items())
    parameters = list(model.parameters())
    for key, count in (("parameters_total", parameters), ("n_params", parameters),
                       ("parameters_trainable", [p for p in parameters if p.requires_grad]),
                       ("n_trainable_with_fre_cnn", [p for p in parameters if p.requires_grad])):
        if key in case:
            assert sum(p.numel() for p in count) == case[key], key


# ==== Siamese DETR =================================================================================================

def siamese_outputs(arrays, name, value, tolerance):
    """Compare a whole array, or the samples stored for it (k__idx, k__shape)."""
    value = value.detach()
    if f"{name}__idx" in arrays:
        assert list(value.shape) == arrays[f"{name}__shape"].tolist()
        value = value.reshape(-1)[arrays.tensor(f"{name}__idx", torch.int64)]
    close(value, arrays[name], tolerance["atol"], tolerance.get("rtol", 0.0), name)


def siamese_model(case, seen, **overrides):
    """Our Siamese DETR with a case's weights, through the loader of released files; the backbone's own where the case has none."""
    c, state = case["config"], {}
    for name, shape in case["state_dict"]:
        state[name] = torch.from_numpy(fill(name, tuple(shape), case["seed"])) * case["scale"].get(name, 1.0)
        if name.endswith("criterion.empty_weight"):
            state[name] = torch.tensor([1, 1, 0.1])
    path = seen.tmp / "iter_1.pth"
    torch.save({"meta": {"iter": 1}, "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {}}, path)
    state = convert.detector_state(convert.read_checkpoint(path), path)
    variant = {"vanilla": "detr", "conditional": "conditional_detr", "deform_ss": "deformable_detr_ss", "deform_ms": "deformable_detr"}[c["variant"]]
    w = c["weights"]
    cfg = siamese_detr.Config(detector=variant, dropout=0.0, num_queries=c["num_queries"], hidden_dim=c["hidden_dim"], nheads=c["nhead"],
                              enc_layers=c["enc_layers"], dec_layers=c["dec_layers"], dim_feedforward=c["dim_feedforward"],
                              num_feature_levels=c["feature_levels"], num_regions=c["num_patches"], eos_coef=c.get("eos_coef", 0.1),
                              lambda_region=w["loss_feature"], lambda_global=w["loss_enc_global_contra"], lambda_cls=w["loss_ce"],
                              lambda_l1=w["loss_bbox"], lambda_giou=w["loss_giou"], **overrides)
    with torch.no_grad():
        detector = common.build_detector(cfg, 3, focal=False, position_offset=0.0)
        if detector.backbone[0].num_channels != c["backbone_channels"]:     # given features of other widths
            backbone = detector.backbone[0]
            backbone.num_channels = c["backbone_channels"]
            detector = rebuilt(cfg, backbone)
        model = siamese_detr.SiameseDETR(detector, cfg.num_regions, shared_queries=cfg.shared_queries)
    if not any(k.startswith("backbone.") for k in state):
        state |= {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    common.load_matching(model, state, drop={}, source=str(path))
    return cfg, model.eval()


def rebuilt(cfg, backbone):
    """common.build_detector around a backbone of prescribed widths."""
    shared = (cfg.hidden_dim, cfg.nheads, cfg.enc_layers, cfg.dec_layers, cfg.dim_feedforward, cfg.dropout)
    if cfg.detector.startswith("deformable"):
        levels = 1 if cfg.detector == "deformable_detr_ss" else cfg.num_feature_levels
        return common.DeformableDETR(backbone, common.DeformableTransformer(*shared, levels), rows=3, focal=False, num_queries=cfg.num_queries,
                                     position_offset=0.0)
    kind = common.ConditionalTransformer if cfg.detector == "conditional_detr" else common.DETRTransformer
    return common.DETR(backbone, kind(*shared), rows=3, focal=False, num_queries=cfg.num_queries)


def decoder_rounding(model, features, mask, rois):
    """How far float32 rounding of the BACKBONE alone moves the decoder's outputs: the largest change over five draws of noise of that size
    (7e-7 of a feature's spread, measured against float64 on ResNet-50). 1e-6 in a well-conditioned network; the six deformable decoder layers of
    siam_r50_deform_ms_bs1 make 1e-3 of it, which is twice that case's tolerance: there even the float64 result is 1.2e-3 from the stored one."""
    generator, moved = torch.Generator().manual_seed(0), {}
    with torch.no_grad():
        exact = model.from_features(features, mask, rois)
        for _ in range(5):
            noisy = [f + 7e-7 * f.std() * torch.randn(f.shape, generator=generator) for f in features]
            other = model.from_features(noisy, mask, rois)
            for ours, name in (("hs", "hs"), ("pred_logits", "pred_logits"), ("pred_boxes", "pred_boxes"), ("pred_features", "pred_feature")):
                change = max((a[ours] - b[ours]).abs().max().item() for a, b in zip([exact, *exact["aux_outputs"]], [other, *other["aux_outputs"]]))
                moved[name] = max(moved.get(name, 0.0), change)
    return moved


def compare_siamese(case, arrays, cfg, model, features, mask, crop_features, tolerance, rounding):
    """One pass over both directions against what is stored of each: d1 looks into view 2, the second half of our batch; d2 into view 1."""
    boxes, sizes = arrays.tensor("box"), arrays.tensor("img_size").long()
    both = torch.cat([boxes[:, 0], boxes[:, 1]])
    seen = {}
    model.detector.transformer.register_forward_hook(lambda module, args, output: seen.update(output=output))
    made = model.detector.conditioned_queries                           # before D8 puts those of image 0 everywhere
    model.detector.conditioned_queries = lambda *args: seen.setdefault("queries", made(*args))
    with torch.no_grad():
        outputs = model.from_features(features, mask, both)
    output = seen["output"]
    targets = siamese_detr.make_targets(cfg, both, sizes.repeat(2, 1), crop_features)
    criterion = siamese_detr.build_criterion(cfg)
    num_boxes = common.normalizer(sum(len(t["labels"]) for t in targets), torch.device("cpu"))
    total, losses = siamese_detr.siamese_loss(cfg, criterion, outputs, targets, num_boxes)
    layers, d = [*outputs["aux_outputs"], {k: outputs[k] for k in outputs["aux_outputs"][0]}], cfg.hidden_dim
    matches = [criterion.matcher(layer, targets) for layer in layers]
    B = len(boxes)
    for direction, half, source in (("d1", slice(B, None), slice(0, B)), ("d2", slice(0, B), slice(B, None))):
        def check(name, value, direction=direction):
            if f"{direction}_{name}" in arrays:
                exact = name == "pred_boxes" and "boxes_atol" in case["tolerance"]
                limit = {"atol": case["tolerance"]["boxes_atol"]} if exact else tolerance
                limit = {**limit, "atol": limit["atol"] + 3 * rounding.get(name, 0.0)}
                siamese_outputs(arrays, f"{direction}_{name}", value, limit)
        check("query_input", seen["queries"][half, :, :d].transpose(0, 1))
        check("roi", outputs["region_features"][source])
        check("hs", torch.stack([layer["hs"][half] for layer in layers]))
        for ours, theirs in (("pred_logits", "pred_logits"), ("pred_boxes", "pred_boxes"), ("pred_features", "pred_feature")):
            check(theirs, torch.stack([layer[ours][half] for layer in layers]))
        if output[1] is not None:
            check("ref", output[1][half])
        for level, memory in enumerate(outputs["memory"]):
            check(f"mem{level}", memory[half])
        for side, stored in ((0, "match_src"), (1, "match_tgt")):
            close(torch.stack([torch.stack([pair[side] for pair in match[half]]) for match in matches]), arrays[f"{direction}_{stored}"], 0)
    rule = case["tolerance"]["losses"]
    expected = {{"loss_enc_global_contra": "loss_global"}.get(name, name): value for name, value in case["losses"].items()}
    assert set(losses) == set(expected)
    for name, value in expected.items():
        close(losses[name], value, rule.get("atol", 1e-5), rule["rtol"], name)
    close(total, case["total"], rule.get("atol", 1e-5), rule["rtol"])
    close(total, arrays["total"], rule.get("atol", 1e-5), rule["rtol"])


def padded_mask(sizes, hw):
    """[2B, H, W], True = padding; the two views of an image have the same size."""
    mask = torch.ones(len(sizes), *hw, dtype=torch.bool)
    for row, (h, w) in zip(mask, sizes.tolist()):
        row[:h, :w] = False
    return mask.repeat(2, 1, 1)


@kind("siamese/from_features")
def siamese_from_features(case, arrays, seen):
    c, B = case["config"], len(arrays["box"])
    overrides = {"shared_queries": True} if c["variant"].startswith("deform") and B > 1 and not case["repaired_batch_bug"] else {}
    cfg, model = siamese_model(case, seen, **overrides)

    def made(text, view):                                               # '2*fill("input:feat_v1_l0",[2, 40, 3, 4],12)'
        factor, name, shape = re.match(r'(?:([\d.]+)\*)?fill\("input:(\w+)",\[([\d, ]+)\]', text).groups()
        return float(factor or 1) * tensor(name.replace("_v1", f"_v{view}"), [int(v) for v in shape.split(",")], case["seed"])

    features = [torch.cat([made(text, view) for view in (1, 2)]) for text in case["inputs"]["feat_v1"]]
    crops = torch.cat([torch.cat([made(text, view).mean((2, 3)) for text in case["inputs"]["crop"]], 1) for view in (1, 2)])
    hw = [int(v) for v in re.search(r"(\d+)x(\d+)", case["inputs"]["img_size"]).groups()]
    mask = padded_mask(arrays.tensor("img_size").long(), hw)
    compare_siamese(case, arrays, cfg, model, features, mask, crops.unflatten(0, (2 * B, -1)), case["tolerance"]["outputs"], {})


def coarse_image(name, shape, cell, seed):
    """An image of constant cells: fill of ceil(side / cell), each cell repeated, cropped to the shape."""
    c, h, w = shape
    grid = tensor(name, (c, -(-h // cell), -(-w // cell)), seed)
    return grid.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :h, :w]


@kind("siamese/end_to_end")
def siamese_end_to_end(case, arrays, seen):
    c, sizes = case["config"], arrays.tensor("img_size").long().tolist()
    cfg, model = siamese_model(case, seen)
    cell = int(re.search(r"repeated (\d+)x", case["inputs"]["img"])[1])
    samples = [{"image": coarse_image(f"img{b}_v{v}", (3, *hw), cell, case["seed"]), "target": {}, "skipped": []}
               for v in (1, 2) for b, hw in enumerate(sizes)]
    batch = data.collate(samples)
    small, cell = (int(v) for v in re.search(r"\[3,(\d+),\d+\].*repeated (\d+)x", case["inputs"]["crop"]).groups())
    crops = torch.stack([torch.stack([coarse_image(f"crop{b}_v{v}_{i}", (3, small * cell, small * cell), cell, case["seed"])
                                      for i in range(c["num_patches"])]) for v in (1, 2) for b in range(len(sizes))])
    with torch.no_grad():
        features = model.detector.backbone[0](batch["images"])
        p = model.crop_features(crops, model.detector.backbone[0])
    boxes = arrays.tensor("box")
    rounding = decoder_rounding(model, features, batch["mask"], torch.cat([boxes[:, 0], boxes[:, 1]]))
    compare_siamese(case, arrays, cfg, model, features, batch["mask"], p, case["tolerance"]["other"], rounding)


@kind("siamese/criterion")
def siamese_criterion(case, arrays, _):
    c = case["config"]
    fills = {k: re.search(r'fill\("input:(\w+)",\[([\d, ]+)\]', v) for k, v in case["inputs"].items() if v.startswith("fill")}
    logits, features, gt = (tensor(m[1], [int(v) for v in m[2].split(",")], case["seed"])
                            for m in (fills["pred_logits"], fills["pred_feature"], fills["gt_feature"]))
    boxes = arrays.tensor("target_boxes")
    matcher = common.HungarianMatcher(c["matcher"]["cls"], c["matcher"]["l1"], c["matcher"]["giou"], focal=False)
    criterion = common.SetCriterion(matcher, weight_feature=1.0, eos_coef=c["eos_coef"])
    targets = [{"labels": torch.ones(len(b), dtype=torch.int64), "boxes": b, "features": f} for b, f in zip(boxes, gt.unflatten(0, (len(boxes), -1)))]
    outputs = {"pred_logits": logits, "pred_boxes": arrays.tensor("pred_boxes"), "pred_features": features}
    num_boxes = boxes.shape[0] * boxes.shape[1]
    pairs = matcher(outputs, targets)
    close(torch.stack([p[0] for p in pairs]), arrays["match_src"], 0)
    close(torch.stack([p[1] for p in pairs]), arrays["match_tgt"], 0)
    fixed = list(zip(arrays.tensor("fixed_src"), arrays.tensor("fixed_tgt")))
    for losses, expected in ((criterion(outputs, targets, num_boxes)[0], case["losses_matched"]),
                             (criterion.losses(outputs, targets, fixed, num_boxes), case["losses_fixed_indices"])):
        assert expected.keys() <= losses.keys()
        for name, value in expected.items():
            close(losses[name], value, case["tolerance"]["atol"], case["tolerance"]["rtol"], name)


@kind("siamese/global_loss")
def siamese_global_loss(case, arrays, _):
    c, d = case["config"], case["config"]["hidden"]
    transformer = torch.nn.Module()
    transformer.d_model, transformer.level_embed = c["channels"], torch.zeros(c["levels"], c["channels"])
    detector = torch.nn.Module()
    detector.transformer, detector.backbone = transformer, [SimpleNamespace(num_channels=[8], layers=("layer4",))]
    model = siamese_detr.SiameseDETR(detector, 1, region_target="none", global_width=d)
    state = {f"enc_head.0.{n}": torch.from_numpy(fill(n, tuple(shape), case["seed"])) for n, shape in case["state_dict"]}
    model.load_state_dict({**model.state_dict(), **state})
    model.train(c["mode"].startswith("train"))
    made = {k: re.search(r"\[([\d, ]+)\]", v)[1] for k, v in case["inputs"].items()}
    maps = {k: tensor(k, [int(v) for v in shape.split(",")], case["seed"]).requires_grad_() for k, shape in made.items()}
    out = model.describe([torch.cat([maps[f"mem_v1_l{i}"], maps[f"mem_v2_l{i}"]]) for i in range(c["levels"])])
    loss = siamese_detr.global_loss(out["projection"], out["prediction"])
    loss.backward()
    close(loss, arrays["loss"], case["tolerance"]["loss"])
    rule = case["tolerance"]["grad"]
    for name, value in maps.items():                                    # the same at every position of a pooled map: one is stored
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        close(gradient.mean((2, 3)), arrays[f"grad_{name}"], rule["atol"], rule["rtol"], name)
    norms = {n: p.grad.norm() for n, p in model.enc_head[0].named_parameters()}
    assert norms.keys() == case["param_grad_norms"].keys()
    for name, value in case["param_grad_norms"].items():
        close(norms[name], value, rule["atol"], rule["rtol"], name)


@kind("siamese/view_geometry")
def view_geometry(case, arrays, _):
    for row, expected in zip(arrays["cases"].astype(np.float64), arrays["out"]):
        first, second, inter = siamese_detr.view_boxes(tuple(row[:4]), float(row[4]), float(row[5]), float(row[6]), bool(row[7]))
        iou = torchvision.ops.box_iou(first[None], second[None])[0]
        close(torch.cat([first, second, inter, iou]), expected, case["tolerance"]["atol"])


@kind("siamese/view_stats")
def view_stats(case, arrays, _):
    """Two samples of the same distribution: ours, and the released one."""
    c, n = case["config"], case["config"]["draws"]
    rng, rows = np.random.default_rng(0), []
    for _ in range(n):
        outer = data.draw_crop(rng, tuple(c["image_hw"]), tuple(c["scale"]), tuple(c["ratio"]))
        u1, u2 = rng.uniform(size=2) if c["stochastic"] else (0.0, 0.0)
        rows.append(torch.cat([torch.tensor(outer), *siamese_detr.view_boxes(outer, c["iou"], u1, u2, bool(rng.random() < 0.5))]).numpy())

    def describe(rows):
        outer, first, second, inter = (rows[:, i:i + 4] for i in (0, 4, 8, 12))
        def area(b):
            return (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
        image = np.prod(c["image_hw"])
        return {"iou_views": area(inter) / (area(first) + area(second) - area(inter)), "outer_over_image": area(outer) / image,
                "outer_aspect_w_over_h": (outer[:, 2] - outer[:, 0]) / (outer[:, 3] - outer[:, 1]), "view1_over_outer": area(first) / area(outer),
                "view2_over_outer": area(second) / area(outer), "inter_over_outer": area(inter) / area(outer),
                "inter_over_view1": area(inter) / area(first), "view1_over_image": area(first) / image}, (first[:, 0] <= second[:, 0]).mean()

    (mine, top_left), (theirs, _) = describe(np.stack(rows)), describe(arrays["rows_first_500"].astype(np.float64))
    assert set(mine) == {k for k, v in case["stats"].items() if isinstance(v, dict)}
    for name, stats in case["stats"].items():
        if isinstance(stats, dict):
            close(mine[name].mean(), stats["mean"], 4 * stats["std"] * (2 / n) ** 0.5 + 1e-6, what=name)
            close(theirs[name].mean(), stats["mean"], 4 * stats["std"] * (1 / 500 + 1 / n) ** 0.5 + 1e-6, what=name)
    assert mine["iou_views"].min() >= c["iou"] - 1e-6 and mine["iou_views"].max() <= 1 + 1e-6
    stored = np.sort(arrays["iou"])
    distance = np.abs(np.searchsorted(np.sort(mine["iou_views"]), stored) / n - np.arange(len(stored)) / len(stored)).max()
    assert distance < 0.05
    assert abs(top_left - case["stats"]["frac_view1_is_top_left"]) < 4 * (0.25 * 2 / n) ** 0.5
    assert abs(np.corrcoef(mine["view1_over_outer"], mine["view2_over_outer"])[0, 1]) < 4 / n ** 0.5


@kind("siamese/region_choice")
def region_choice(case, arrays, _):
    c, atol = case["config"], case["tolerance"]["atol"]
    views = tuple(siamese_detr.view_boxes(tuple(arrays["outer"].tolist()), c["tau"], c["u1"], c["u2"], bool(c["swap"])))
    hw = tuple(c["view_hw"])
    for view, name in zip(views, ("view1", "view2", "inter_raw")):
        close(view, arrays[name], atol, what=name)
    close(siamese_detr.to_view(views[2][None], views[0], hw)[0], arrays["inter_v1"], atol)
    close(siamese_detr.to_view(views[2][None], views[1], hw)[0], arrays["inter_v2"], atol)
    usable = siamese_detr.usable_regions(arrays.tensor("proposals", torch.float64), views, hw, c["area_min_ratio"])
    assert len(usable[0]) == case["survivors"] == len(arrays["kept_q"])
    close(usable[0], arrays["kept_q"], atol)
    close(usable[1], arrays["kept_k"], atol)
    randn = arrays.tensor("randn", torch.float64)
    if case["error"]:                                                   # no survivor: training draws another image
        assert not case["survivors"] and not len(arrays["boxes_v1"]) and not len(arrays["boxes_v2"])
        return
    chosen = siamese_detr.choose_regions(usable, views, hw, c["anchor_num"], randn)
    close(chosen[0], arrays["boxes_v1"], atol)
    close(chosen[1], arrays["boxes_v2"], atol)


@kind("siamese/box_jitter")
def box_jitter(case, arrays, _):
    h, w = arrays["img_size"].tolist()
    for view in ("v1", "v2"):
        moved = siamese_detr.jitter_boxes(arrays.tensor("boxes"), arrays.tensor(f"randn_{view}"), case["config"]["ratio"])
        close(siamese_detr.clip_boxes(moved, torch.tensor([0.0, 0.0, w, h])), arrays[f"out_{view}"], case["tolerance"]["atol"])
