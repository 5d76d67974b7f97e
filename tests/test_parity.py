"""Equality with the released code: one test per case, id `folder/case`.

Cases are the json files below $PARITY_DIR, else the copies in tests/parity. A case's `kind` decides how it is run;
everything else (shapes, counts, factors, tolerances) is read from it. An unknown kind fails. Weights are made from
their released names (fill.py) and go through the loader of released checkpoints.
"""
import argparse
import dataclasses
import functools
import json
import math
import os
import pickle
import random
import re
import zlib
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import run_processes
from fill import fill

import annotations
import common
import convert
import data
import detectors
import detreg
import dupr
import evaluation
import few_shot
import figures
import finetune
import lvis_v1
import proposals
import rcnn
import run
import siamese_detr
import soco
import updetr

SLACK = 1  # times the tolerances; more on a GPU (test_cuda.py)
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
    np.testing.assert_allclose(actual, np.asarray(expected), atol=SLACK * atol, rtol=SLACK * rtol, err_msg=what)


def close_samples(actual, arrays, name, atol, rtol=0.0):
    close(actual.detach().flatten()[arrays.tensor(f"{name}_index")], arrays[f"{name}_values"], atol, rtol, name)


def manifest(case, path):
    """The name list of a full model: tests/parity/statedict when the case's folder has no neighbour of that name."""
    for folder in (path.parent.parent / "statedict", path.parent, Path(__file__).parent / "parity" / "statedict"):
        if (folder / case).exists():
            return json.loads((folder / case).read_text())
    raise AssertionError(f"no {case} near {path}")


def distinct(name, shape):
    """A tensor for a case whose numbers play no part: other numbers under every name and in every place, in a third of
    the time of fill."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    start = zlib.crc32(name.encode()) % 2**20
    return torch.arange(start, start + math.prod(shape), dtype=torch.float32).view(shape)


def filled(name, shape, case):
    """One released tensor with the case's factors: `gains` (regular expressions, in order) and `scale` (names)."""
    if case.get("kind", "").endswith("statedict"):
        return distinct(name, tuple(shape))
    value = fill(name, tuple(shape), case.get("seed", 0))
    if value.dtype == np.float32:
        for gain in ([g for pattern, g in case.get("gains", ()) if re.search(pattern, name)]
                     + [case.get("scale", {}).get(name, 1.0)]):
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
    if '"state_dict"' in wrapping:
        torch.save({"meta": {"epoch": 1}, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    else:
        torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, "lr_scheduler": {"last_epoch": 0},
                    "epoch": 0, "args": argparse.Namespace(lr=2e-4)}, path)
    return path


def load_released(path, num_groups=1, **overrides):
    """A released detector checkpoint -> our model, through the project's loader; nothing may be left over.

    The state's own names say which model it is; num_groups: patches or regions that the queries are divided among
    (no tensor depends on it).
    """
    state = convert.open_checkpoint(path).state
    cfg = dataclasses.replace(finetune.Config(dropout=0.0), **convert.architecture(state, path) | overrides)
    rows = next(v.shape[0] for name, v in state.items() if re.fullmatch(r"class_embed\.(0\.)?bias", name))
    pretext = {name.split(".")[0] for name in state} & {"feature_embed", "patch2query", "enc_head", "feature_align"}
    model = detectors.build_detector(cfg, rows, focal=cfg.detector != "detr" and "patch2query" not in pretext)
    if "feature_embed" in pretext:
        last = max(name for name in state if name.startswith("feature_embed.") and name.endswith("bias"))
        model = detreg.DETReg(model, embedding_dim=state[last].shape[0])
    elif "enc_head" in pretext:
        model = siamese_detr.SiameseDETR(model, num_groups,
                                         region_target="crop" if "feature_align" in pretext else "none")
    elif "patch2query" in pretext:
        model = updetr.UPDETR(model, num_groups, reconstruction="feature_align" in pretext)
    convert.load_matching(model, state, drop={}, source=str(path))
    return model, state


def detector_of(model):
    return getattr(model, "detector", model)


def bare(name):
    """The released name of a parameter: inside a pretext model the detector is `detector`."""
    return name.removeprefix("detector.")


def to_batch(images):
    return {k: v for k, v in data.collate([{"image": i, "target": {}, "skipped": []} for i in images]).items()
            if k in ("images", "mask")}


# ==== Pieces =======================================================================================================

@kind("detreg/sine_position")
def sine_position(case, arrays, _):
    config = case["config"]
    mask = arrays.tensor("mask", torch.bool)
    for name, normalize, atol in (("", True, 1e-5), ("unnormalised_", False, 1e-4)):
        encode = common.PositionEmbeddingSine(config["num_pos_feats"], config["offset"],
                                              normalize, config["temperature"])
        close(encode(mask).flatten()[arrays.tensor(f"{name}index")], arrays[f"{name}values"], atol)


@kind("detreg/msdeform_init")
def msdeform_init(case, arrays, _):
    config = case["config"]
    module = common.MSDeformAttn(config["d_model"], config["n_levels"], config["n_heads"], config["n_points"])
    close(module.sampling_offsets.bias, arrays["sampling_offsets_bias"], 1e-6)
    close(module.attention_weights.bias, arrays["attention_weights_bias"], 1e-6)
    for zero in (module.sampling_offsets.weight, module.attention_weights.weight, module.value_proj.bias,
                 module.output_proj.bias):
        assert not zero.any()
    bound = (6 / (2 * config["d_model"])) ** 0.5                       # xavier uniform of a square matrix
    for weight in (module.value_proj.weight, module.output_proj.weight):
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.05)


@kind("detreg/msdeform_attn")
def msdeform_attn(case, arrays, _):
    c, seed = case["config"], case["seed"]
    module = common.MSDeformAttn(c["d_model"], c["n_levels"], c["n_heads"], c["n_points"])
    module.load_state_dict(
        {name: torch.from_numpy(fill(name, tuple(shape), seed)) * (2.0 if name.startswith("sampling_offsets.") else 1.0)
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
    model = common.DeformableTransformer(c["d_model"], c["nhead"], c["enc"], c["dec"], c["ffn"], 0.0,
                                         c["levels"], c["points"]).eval()
    if c["box_refine"]:
        model.decoder.bbox_embed = torch.nn.ModuleList(common.MLP(c["d_model"], c["d_model"], 4, 3)
                                                       for _ in range(c["dec"]))
    model.load_state_dict({name: torch.from_numpy(fill(name, tuple(shape), seed))
                           for name, shape in case["state_dict"]})
    masks = [arrays.tensor(f"mask{level}", torch.bool) for level in range(c["levels"])]
    sources = [tensor(f"src{level}", (len(m), c["d_model"], *m.shape[1:]), seed) for level, m in enumerate(masks)]
    positions = [tensor(f"pos{level}", s.shape, seed) for level, s in enumerate(sources)]
    hs, initial, references, memory = model(sources, masks, positions,
                                            tensor("query_embed", (c["queries"], 2 * c["d_model"]), seed))
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
        return data.apply_geometry(image, boxes,
                                   data.Geometry(**{"flip": False, "first_hw": None, "crop": None, "hw": hw, **draws}))

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
            close(proposals.rects_to_boxes(arrays[f"rects_{i}_{grid}"], tuple(hw), grid),
                  arrays[f"boxes_{i}_{grid}"], 1e-3)
    expected = arrays["importance_probability"]
    close(detreg.importance_probability(len(expected), 30, released=True), expected, 1e-6)


@kind("detreg/label_subset")
def label_subset(case, arrays, _):
    ids = [7 * i + 3 for i in range(case["config"]["n"])]
    for fraction in case["config"]["fractions"]:
        close(annotations.label_subset(ids, fraction, case["seed"]), arrays[f"subset_{fraction}"], 0)


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
    results = common.post_process({"pred_logits": logits, "pred_boxes": arrays.tensor("pred_boxes")},
                                  arrays.tensor("sizes"))
    for i, result in enumerate(results):
        close(result["scores"], arrays[f"scores{i}"], 1e-6)
        close(result["labels"], arrays[f"labels{i}"], 0)
        close(result["boxes"], arrays[f"boxes{i}"], 1e-3)


@kind("detreg/embedding_target")
def embedding_target(case, arrays, _):
    c, seed = case["config"], case["seed"]
    patches = tensor("patches", (c["n"], 3, c["patch"], c["patch"]), seed)
    descriptor = detreg.RegionDescriptor(common.Backbone("resnet50", trainable=0)).eval()
    descriptor.load_state_dict({k: torch.from_numpy(fill(k, tuple(v.shape), seed))
                                for k, v in descriptor.state_dict().items()})
    close(descriptor(patches), arrays["intermediate"], 1e-4)
    head = detreg.SwAVDescriptor()
    names = {k: tuple(v.shape) for k, v in head.state_dict().items()}
    assert all(names[name] == tuple(shape) for name, shape in case["head_keys"])
    head.load_state_dict({k: torch.from_numpy(fill(k, shape, seed)) for k, shape in names.items()})
    with torch.no_grad():
        close(head.train()(patches), arrays["head_train_bn"], 1e-4)
        close(head.eval()(patches), arrays["head_eval_bn"], 1e-4)       # with the statistics the pass above left


# ==== Matching and losses ==========================================================================================

FOCAL = {"alpha": 0.25, "gamma": 2}  # the project knows no others


@kind("detreg/criterion")
def criterion(case, arrays, _):
    c, seed = case["config"], case["seed"]
    weights, layers = weights_of(c["weights"]), c["aux_layers"] + 1
    assert c.get("focal", FOCAL) == FOCAL
    matcher = common.HungarianMatcher(c["costs"]["cls"], c["costs"]["bbox"], c["costs"]["giou"])
    criterion = common.SetCriterion(matcher, weights["loss_ce"], weights["loss_bbox"], weights["loss_giou"])
    targets = [{"labels": arrays.tensor(f"target_labels{b}"), "boxes": arrays.tensor(f"target_boxes{b}")}
               for b in range(c["B"])]
    logits = [(1.5 * tensor(f"logits{i}", (c["B"], c["queries"], c["num_classes"]), seed) - 2.0).requires_grad_()
              for i in range(layers)]
    boxes = [arrays.tensor(f"boxes{i}").requires_grad_() for i in range(layers)]
    outputs = [{"pred_logits": l, "pred_boxes": b} for l, b in zip(logits, boxes)]
    for i, layer in enumerate(outputs):
        costs, pairs = matcher.costs(layer, targets), matcher([layer], targets)[0]
        for b in range(c["B"]):
            if len(targets[b]["labels"]) or f"cost_layer{i}_image{b}" in arrays:
                close(costs[b], arrays[f"cost_layer{i}_image{b}"], 1e-5, 1e-5)
            close(pairs[b][0], arrays[f"src_layer{i}_image{b}"], 0)
            close(pairs[b][1], arrays[f"tgt_layer{i}_image{b}"], 0)
    outputs = {**outputs[-1], "aux_outputs": outputs[:-1]}
    num_boxes = common.normalizer(sum(len(t["labels"]) for t in targets), torch.device("cpu"))
    assert num_boxes == max(case["num_boxes"], 1)                       # a case may count none
    if c["embed_dim"]:
        features = tensor("features", (c["B"], c["queries"], c["embed_dim"]), seed).requires_grad_()
        outputs["pred_features"] = features
        targets = [{**t, "features": tensor(f"target_features{b}", (len(t["labels"]), c["embed_dim"]), seed)}
                   for b, t in enumerate(targets)]
        cfg = detreg.Config(lambda_e=weights["loss_object_embedding"])
        pairs = common.normalizer(sum(min(len(t["labels"]), c["queries"]) for t in targets), torch.device("cpu"))
        total, losses = detreg.detreg_loss(cfg, criterion, outputs, targets, num_boxes, pairs)
        for mean in ("global", "local"):                                # one process: the two means agree
            cfg.embedding_mean = mean
            close(detreg.detreg_loss(cfg, criterion, outputs, targets, num_boxes, pairs)[0],
                  case["weighted_total"], 1e-5, 1e-5)
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

# Of a released DETReg: `config` or `command_line` of a case -> fields of ours.
SAME_NAMES = ("num_queries", "hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward",
              "num_feature_levels", "with_box_refine", "lr", "lr_backbone", "weight_decay", "clip_max_norm")
FIELDS = {**dict(zip(SAME_NAMES, SAME_NAMES)), "lr_linear_proj_mult": "lr_linear_proj_mult",
          "cls_loss_coef": "lambda_f", "bbox_loss_coef": "lambda_l1", "giou_loss_coef": "lambda_giou",
          "object_embedding_coef": "lambda_e"}
# What is looked at in another place (the class count is in `config`, dropout is off), or changes nothing in a case.
ELSEWHERE = {"dataset_file", "dropout", "object_embedding_loss", "obj_embedding_head", "num_classes", "two_stage",
             "batch_size", "epochs", "lr_drop", "num_workers", "output_dir", "device", "seed"}


def fields_of(values):
    """Fields of our configuration that a case's `config` gives. Nothing is overlooked: an unknown name fails."""
    assert not values.get("two_stage")                                  # not built
    return {FIELDS[name]: value for name, value in values.items() if name not in ELSEWHERE}


def command_line_of(case):
    """{"num_queries": 20, "with_box_refine": True, ...} of a case's `command_line`."""
    words, values = case.get("command_line", []), {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            given = words[i + 1:i + 2] if not words[i + 1:i + 2] or not words[i + 1].startswith("--") else []
            values[word[2:]] = (json.loads(given[0]) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", given[0]) else given[0]
                                ) if given else True
    return values


def embedding_width(values):
    """Width of z in a pretraining case, else None."""
    if not values.get("object_embedding_loss"):
        return None
    return {"intermediate": 512, "head": 128}[values.get("obj_embedding_head", "intermediate")]


def entries_of(model):
    """A released name list of our model: every name with its shape and its canonical alias, the shortest of those
    that share the tensor, then the alphabetically first."""
    state, shared = model.state_dict(), {}
    for name, value in state.items():
        shared[value.data_ptr()] = min(shared.get(value.data_ptr(), name), name, key=lambda n: (len(n), n))
    return [(name, list(value.shape), shared[value.data_ptr()]) for name, value in state.items()]


def deformable_entries(case, listed):
    """The name list of a `full_model` case: of the size that its config says, with the names that `listed`, the
    manifest of the released model, has."""
    c = case["config"]
    cfg = finetune.Config(**fields_of(c), dropout=0.0)
    model, width = detectors.build_detector(cfg, c["num_classes"], focal=True), embedding_width(c)
    entries = entries_of(detreg.DETReg(model, embedding_dim=width) if width else model)
    kinds, theirs = ({re.sub(r"\d+", "#", name) for name, *_ in names} for names in (entries, listed))
    assert kinds == theirs
    shapes = {name: shape for name, shape, *_ in entries}
    assert all(shapes[name] == shape for name, shape, *_ in listed if name.startswith("backbone."))
    if len(entries) == len(listed):                                     # the manifest's own layers
        canonical = {name: alias[0] if alias else name for name, _, *alias in listed}
        assert {name: alias for name, _, alias in entries} == canonical
    return entries


@kind("detreg/full_model")
def full_model(case, arrays, seen):
    c = case["config"]
    given = fields_of(command_line_of(case))
    assert all(given[name] == value for name, value in fields_of(c).items() if name in given)
    entries = deformable_entries(case, manifest(case["manifest"], seen.path)["entries"])
    path = released_file(seen.tmp, released_state(entries, case))
    model, _ = load_released(path, nheads=c["nheads"])
    expected = {"num_queries", "hidden_dim", "num_feature_levels", "enc_layers", "dec_layers",
                "dim_feedforward", "with_box_refine"}
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
    """The project's own training step, several times on one batch; the descriptor network is replaced
    by the case's descriptors."""
    c, seed = case["config"], case["seed"]
    pretrain = "loss_object_embedding" in case["losses_per_step"][0]
    given = command_line_of(case)
    width = embedding_width(given | ({"object_embedding_loss": True} if pretrain else {}))
    values = fields_of(given) | {
        "num_queries": c["queries"], "enc_layers": c["enc"], "dec_layers": c["dec"], "dim_feedforward": c["ffn"],
        "hidden_dim": c["hidden"], "lr": c["lr"], "lr_backbone": c["lr_backbone"],
        "lr_linear_proj_mult": c["linear_mult"], "weight_decay": c["weight_decay"], "clip_max_norm": c["clip"]}
    cfg = (detreg.Config if pretrain else finetune.Config)(**values, dropout=0.0)
    model = detectors.build_detector(cfg, c["num_classes"], focal=True)
    model = detreg.DETReg(model, embedding_dim=width) if pretrain else model
    model, _ = load_released(released_file(seen.tmp, released_state(entries_of(model), case)),
                             lr_backbone=c["lr_backbone"], nheads=cfg.nheads)
    model.train()
    targets = [{"boxes": arrays.tensor(f"target_boxes{b}"), "labels": arrays.tensor(f"target_labels{b}")}
               for b in range(len(case["images_hw"]))]
    if pretrain:
        for b, t in enumerate(targets):
            t["patches"] = tensor(f"target_features{b}", (len(t["labels"]), width), seed).abs()
    batch = {**to_batch([tensor(f"img{i}", (3, *hw), seed) for i, hw in enumerate(case["images_hw"])]),
             "targets": targets}
    optimizer = common.build_optimizer(cfg, model)
    identity = torch.nn.Identity()
    assert len(case["losses_per_step"]) == c["steps"]
    for step, expected in enumerate(case["losses_per_step"]):
        args = (cfg, model, identity,
                detreg.build_criterion(dataclasses.replace(cfg, num_classes=c["num_classes"]))) if pretrain \
            else (cfg, model, finetune.build_criterion(cfg))
        losses = (detreg if pretrain else finetune).train_step(*args, optimizer, [batch], torch.device("cpu"))
        for name, value in expected.items():
            close(losses["loss" if name == "total" else name], value,
                  *((1e-4, 1e-6) if step == 0 else (2e-3, 2e-3)), f"step {step} {name}")
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
        layers = {side: 1 + max(int(re.match(rf"transformer\.{side}\.layers\.(\d+)", n)[1])
                                for n in names if f"transformer.{side}.layers" in n)
                  for side in ("encoder", "decoder")}
        vanilla = not any("sampling_offsets" in n for n in names)
        pretrain = any(n.startswith("feature_embed") for n in names)
        argv = ["--detector", "detr" if vanilla else "deformable_detr",
                "--lr_backbone", rates[1], "--enc_layers", layers["encoder"],
                "--dec_layers", layers["decoder"], "--with_box_refine", any("decoder.bbox_embed" in n for n in names)]
        argv += ["--pre_norm", "transformer.encoder.norm.weight" in names] if vanilla else []
        script = detreg if pretrain else finetune
        cfg = run.parse_config(script.Config, script.PRESETS, list(map(str, argv)), script="x", description="",
                               recipe=script.recipe_of)
        assert cfg.lr == rates[0]
        model = detectors.build_detector(cfg, 21 if name.endswith("voc") else 91 + vanilla, focal=not vanilla)
        model = detreg.DETReg(model, embedding_dim=512) if pretrain else model
        mine = common.param_groups(model, rates[0], rates[1], rates[2] / rates[0] if rates[0] else 0.0)
        for group, wanted, count, numel in zip(mine, expected["groups"], expected["counts"],
                                               expected["numel"], strict=True):
            assert sorted(map(bare, group["names"])) == sorted(wanted["names"]) and len(group["params"]) == count
            assert group["lr"] == pytest.approx(wanted["lr"]) and sum(p.numel() for p in group["params"]) == numel
        assert {bare(n) for n, p in model.named_parameters() if not p.requires_grad} == set(expected["frozen"])
        assert (cfg.weight_decay, cfg.clip_max_norm) == (expected["weight_decay"], expected["clip_max_norm"])
        if "loading_from_pretrain" in expected:
            rule = expected["loading_from_pretrain"]
            frozen = dataclasses.replace(cfg, lr_backbone=0.0)
            pretrained = detreg.DETReg(detectors.build_detector(frozen, 91, focal=True), embedding_dim=512).state_dict()
            dropped = {r"^feature_embed\.": "pretext head", r"^class_embed\.": "class head"}
            convert.load_matching(model, pretrained, drop=dropped, source=name)
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
    """The name list of a DETR or UP-DETR of another size: layers, widths, queries,
    classes and norms as the case's config has them."""
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
    expected = {"detector": "detr", "num_queries": c.get("num_queries") or c["N"], "hidden_dim": c["hidden"],
                "enc_layers": c["enc"], "dec_layers": c["dec"], "dim_feedforward": c["ffn"], "pre_norm": c["pre_norm"]}
    assert {k: found[k] for k in expected} == expected
    inputs = {name.removeprefix("input:"): tensor(name.removeprefix("input:"), shape, case["seed"])
              for name, shape in case["inputs"]}
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
    detector = common.DETR(common.Backbone("resnet18", (4,)),
                           common.DETRTransformer(32, 2, 1, 1, 16, 0.0), num_logits=2, focal=False)
    assert detector.position.offset == 0.0                              # what a DETR is built with


@kind("updetr/transformer")
def detr_transformer(case, arrays, _):
    c = case["config"]
    model = common.DETRTransformer(c["d_model"], c["nhead"], c["enc"], c["dec"], c["ffn"], 0.0,
                                   c["normalize_before"]).eval()
    model.load_state_dict(released_state(case["keys"], case))
    inputs = {name: tensor(name.removeprefix("input:"), shape, case["seed"]) for name, shape in case["inputs"]}
    # [B, N, C]
    source, position, queries = inputs["input:src"], inputs["input:pos"], inputs["input:query_embed"].transpose(0, 1)
    mask, blocked = arrays.tensor("mask", torch.bool), arrays.tensor("decoder_mask") == -torch.inf
    layers = slice(None) if c["return_intermediate"] else slice(-1, None)
    atol = case["tolerance"]
    for name, query, self_mask in (("hs", queries, None), ("hs_masked", queries, blocked),
                                   ("hs_shared", queries[0], None)):
        hs, reference, memory = model(source, mask, position, query, self_mask)
        close(hs[layers], arrays[name], atol, what=name)
        close(memory, arrays["memory"], atol)
        assert reference is None


@kind("updetr/matcher")
def matcher(case, arrays, _):
    costs = case["config"]
    matcher = common.HungarianMatcher(costs["cost_class"], costs["cost_bbox"], costs["cost_giou"], focal=False)
    for i, c in enumerate(case["cases"]):
        outputs = {"pred_logits": tensor(f"logits{i}", (c["B"], c["N"], c["K"]), case["seed"]),
                   "pred_boxes": arrays.tensor(f"c{i}_pred_boxes")}
        targets = [{"labels": arrays.tensor(f"c{i}_labels{b}"), "boxes": arrays.tensor(f"c{i}_boxes{b}")}
                   for b in range(c["B"])]
        assert [len(t["labels"]) for t in targets] == c["targets"]
        for b, (query, target) in enumerate(matcher([outputs], targets)[0]):
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
    criterion = common.SetCriterion(matcher, weights["loss_ce"], weights["loss_bbox"],
                                    weights["loss_giou"], eos_coef=c["eos_coef"])
    (_, shape), = case["inputs"]
    logits, boxes = tensor("logits", shape, case["seed"]).requires_grad_(), arrays.tensor("pred_boxes").requires_grad_()
    layers = [{"pred_logits": l, "pred_boxes": b} for l, b in zip(logits, boxes)]
    targets = [{"labels": arrays.tensor(f"tgt_labels{b}"), "boxes": arrays.tensor(f"tgt_boxes{b}")}
               for b in range(shape[1])]
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
    cfg = updetr.Config(num_queries=c["N"], num_patches=c["M"], eos_coef=c["eos_coef"], lambda_cls=weights["loss_ce"],
                        lambda_l1=weights["loss_bbox"], lambda_giou=weights["loss_giou"],
                        lambda_rec=weights.get("loss_feature", 0.0), reconstruction="loss_feature" in weights)
    criterion = updetr.build_criterion(cfg)
    costs = c["cost"]
    assert ((criterion.matcher.cost_class, criterion.matcher.cost_bbox, criterion.matcher.cost_giou)
            == (costs["cls"], costs["bbox"], costs["giou"]))
    assert c["ce_class_weight"] == [1] * c["num_classes"] + [c["eos_coef"]]
    shapes = dict(case["inputs"])
    logits, features = (tensor(name, shapes[f"input:{name}"], seed).requires_grad_()
                        for name in ("logits", "pred_feature"))
    boxes = arrays.tensor("pred_boxes").requires_grad_()
    layers = [{"pred_logits": l, "pred_boxes": b, "pred_features": f} for l, b, f in zip(logits, boxes, features)]
    assert len(layers) == c["layers"] and logits.shape[-1] == c["num_classes"] + 1
    outputs = {**layers[-1], "aux_outputs": layers[:-1],
               "patch_features": tensor("gt_feature", shapes["input:gt_feature"],
                                        seed).abs().view(c["B"], c["M"], c["C_feature"])}
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
    max_size, atol = (int(re.search(r"max_size=(\d+)", case["what"])[1]),
                      float(re.search(r"boxes (\S+)", case["tolerance"])[1]))
    images = {}
    for (w, h, scale, new_w, new_h), expected in zip(arrays["rows"].tolist(), arrays["boxes"], strict=True):
        hw = data.resized_hw((h, w), scale, max_size)
        assert hw == (new_h, new_w)
        geometry = data.draw_geometry(np.random.default_rng(0), (h, w), scales=(scale,), max_size=max_size,
                                      crop_scales=None, flip=0)
        image = images.setdefault((w, h), data.Image.new("RGB", (w, h)))
        view, boxes, _ = data.apply_geometry(image, torch.tensor([[w // 4, h // 5, w // 2, h - 3]]).float(), geometry)
        assert view.size == (new_w, new_h)
        close(data.normalized_cxcywh(boxes, hw)[0], expected, atol)


def sampler_values(boxes, width, height):
    """The quantities of the sampler statistics, of boxes [n, 4] xyxy px."""
    x, y, w, h = boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return {"w_rel": w / width, "h_rel": h / height, "x_rel": x / width, "y_rel": y / height, "cx": (x + w / 2) / width,
            "cy": (y + h / 2) / height, "area": w * h / (width * height), "aspect_log": np.log(w / h),
            "x_free": x / (width - w), "y_free": y / (height - h)}


@kind("updetr/patch_sampler_stats")
def patch_sampler_stats(case, arrays, _):
    """The function training draws patches with, against the released sampler's statistics: means within 4 standard
    errors of both samples, distribution functions within the case's limit,
    at the quantiles and at the histogram's edges."""
    width, height = case["image_wh"]
    least, limit = (int(re.search(r"min_pixel=(\d+)", case["official"])[1]),
                    float(re.search(r"KS statistic < ([\d.]+)", case["tolerance"])[1]))
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
    assert values["w_rel"].mean() == pytest.approx(case["analytic"]["w_rel_mean"],
                                                   abs=4 * error * case["analytic"]["w_rel_std"])


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
    logits, boxes = (torch.stack([aux[name] for aux in outputs["aux_outputs"]])
                     for name in ("pred_logits", "pred_boxes"))
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
    close(torch.stack([l["pred_logits"] for l in layers[:-1]]), arrays["aux_logits"],
          atol["pred_logits"], what="aux_logits")
    close(torch.stack([l["pred_boxes"] for l in layers[:-1]]), arrays["aux_boxes"],
          atol["pred_boxes"], what="aux_boxes")
    if "pred_feature" in arrays:
        channels = arrays.tensor("pred_feature_channels")
        close(outputs["pred_features"][..., channels], arrays["pred_feature"],
              atol["pred_feature"], what="pred_feature")
        close(outputs["pred_features"].norm(dim=-1), arrays["pred_feature_norm"], atol["pred_feature"],
              what="pred_feature_norm")
        some = channels[:arrays["aux_feature"].shape[-1]]
        close(torch.stack([l["pred_features"][..., some] for l in layers[:-1]]), arrays["aux_feature"],
              atol["pred_feature"], what="aux_feature")
    truth = outputs["patch_features"].flatten(0, 1)
    close(truth[:, arrays.tensor("gt_feature_channels")], arrays["gt_feature"], atol["gt_feature"], what="gt_feature")
    close(truth.norm(dim=-1), arrays["gt_feature_norm"], atol["gt_feature"], what="gt_feature_norm")
    if "fig5_keep" in arrays:
        scores, boxes, index = evaluation.most_confident(outputs["pred_logits"], outputs["pred_boxes"], groups)
        close(index, arrays["fig5_keep"], 0)
        close(scores, np.take_along_axis(arrays["fig5_score"], arrays["fig5_keep"], 1),
              atol["pred_logits"], what="fig5_score")
        close(outputs["pred_logits"].softmax(-1)[..., :-1].amax(-1), arrays["fig5_score"], atol["pred_logits"],
              what="fig5_score of all")
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
    """The training path with the released draws: which queries keep their patch,
    and the order of the object queries."""
    c, atol = case["config"], case["tolerance"]
    weights, eos = weights_of(case["weight_dict"]), float(re.search(r"\beos (\d*\.?\d+)", case["train"])[1])
    cfg = updetr.Config(num_queries=c["N"], num_patches=c["M"], eos_coef=eos,
                        mask_ratio=c["mask_ratio"], reconstruction="loss_feature" in weights,
                        lambda_cls=weights["loss_ce"], lambda_l1=weights["loss_bbox"], lambda_giou=weights["loss_giou"],
                        lambda_rec=weights.get("loss_feature", 0.0))
    model, batch, patches = load_detr(case, seen, lr_backbone=0.0 if case["no_grad_backbone"] else cfg.lr,
                                      dropout=float(c["dropout"]))
    model.train()
    keep = (arrays.tensor("drop_u") > cfg.mask_ratio).transpose(0, 1) if "drop_u" in arrays else None
    order = arrays.tensor("shuffle_idx") if "shuffle_idx" in arrays else None
    outputs = model(**batch, patches=query_patches(patches, arrays), keep=keep, order=order)
    close_updetr(outputs, arrays, atol, c["M_given"])
    targets = [{"labels": torch.ones(len(b), dtype=torch.int64), "boxes": b} for b in arrays.tensor("tgt_boxes")]
    criterion, counts = updetr.build_criterion(cfg), [len(t["labels"]) for t in targets]
    class_weight = common.normalizer(criterion.class_weight_sum(counts, cfg.num_queries), torch.device("cpu"))
    total, losses = updetr.updetr_loss(criterion, outputs, targets,
                                       common.normalizer(sum(counts), torch.device("cpu")), class_weight)
    close_losses(losses, total, arrays, case, 0.0, relative(atol["losses"]), "total_loss")
    total.backward()
    gradients = {bare(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    listed = [name for name in case["params_with_grad"] if name != "..."]  # the case may give the first ones only
    assert len(gradients) == case["n_with_grad"] and sorted(gradients)[:len(listed)] == listed
    assert len(listed) == len(gradients) or "..." in case["params_with_grad"]
    assert case["no_grad_backbone"] == (not any(n.startswith("backbone.") for n in gradients))
    rel = relative(atol["grad_norms"])
    for name in case["arrays"]:
        if name.startswith("gradnorm_"):
            close(gradients[name.removeprefix("gradnorm_")].norm(), arrays[name], 0.0, rel, name)
    expected = arrays["grad_query_embed"]
    close(gradients["query_embed.weight"], expected, rel * np.abs(expected).max(), what="grad_query_embed")
    close(common.clip_gradients(model, 0), arrays["grad_norm_total"], 0.0, rel, "grad_norm_total")


# ==== Conditional DETR =============================================================================================

@kind("siamese/conditional_transformer")
def conditional_transformer(case, arrays, _):
    c, tolerance = case["config"], case["tolerance"]
    model = common.DETRTransformer(c["d_model"], c["nhead"], c["num_encoder_layers"], c["num_decoder_layers"],
                                   c["dim_feedforward"], 0.0, c["normalize_before"], conditional=True).eval()
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
    batch = to_batch([repeated_image(text)
                      for _, text in sorted(case["inputs"].items(), key=lambda item: int(item[0].removeprefix("img")))])
    with torch.no_grad():
        outputs = model.eval()(**batch)
    assert outputs["pred_logits"].shape[-1] == c["num_classes"]
    close(outputs["pred_logits"], arrays["pred_logits"], tolerance["logits_atol"], what="pred_logits")
    close(outputs["pred_boxes"], arrays["pred_boxes"], tolerance["boxes_atol"], what="pred_boxes")
    logits, boxes = (torch.stack([aux[name] for aux in outputs["aux_outputs"]])
                     for name in ("pred_logits", "pred_boxes"))
    close(logits[..., :arrays["aux_logits"].shape[-1]], arrays["aux_logits"],
          tolerance["logits_atol"], what="aux_logits")
    close(boxes, arrays["aux_boxes"], tolerance["boxes_atol"], what="aux_boxes")


@kind("siamese/conditional_criterion")
def conditional_criterion(case, arrays, _):
    c, rtol = case["config"], case["tolerance"]["rtol"]
    assert (c["focal_alpha"], c["gamma"]) == (0.25, 2)                  # the project knows no others
    logits = tensor(*recipe_shape(case["inputs"]["pred_logits"]))
    outputs = {"pred_logits": logits, "pred_boxes": arrays.tensor("pred_boxes")}
    targets = [{"labels": arrays.tensor(f"labels{b}"), "boxes": arrays.tensor(f"target_boxes{b}")}
               for b in range(len(logits))]
    assert logits.shape[-1] == c["num_classes"]
    criterion = common.SetCriterion(common.HungarianMatcher(c["cost"]["cls"], c["cost"]["l1"], c["cost"]["giou"]))
    losses, pairs = criterion(outputs, targets,
                              common.normalizer(sum(len(t["labels"]) for t in targets), torch.device("cpu")))
    for b, (query, target) in enumerate(pairs):
        close(query, arrays[f"match_src{b}"], 0)
        close(target, arrays[f"match_tgt{b}"], 0)
    assert set(losses) == set(case["losses"])
    for name, expected in case["losses"].items():
        close(losses[name], expected, 0.0, rtol, name)


# ==== Names and shapes of released checkpoints =====================================================================

def expected_tensors(state):
    """Where the tensors of a released file must end up: {our name: tensor}, spelled out here once more,
    independently of convert.py."""
    deformable, layers = ("transformer.level_embed" in state,
                          {n.split(".")[3] for n in state if n.startswith("transformer.decoder.layers.")})
    wanted = {}
    for name, value in state.items():
        head = re.match(r"(?:pred_head\.)?(bbox_embed|class_embed)\.((?:layers|weight|bias).*)", name)
        if name == "pred_head.criterion.empty_weight" or name == "transformer.tgt_embed.weight":
            continue
        if name == "query_embed.weight" and "transformer.tgt_embed.weight" in state:
            wanted[name] = torch.cat([value, state["transformer.tgt_embed.weight"]], 1)  # position half, then content
        elif head and deformable:
            wanted |= {f"{head[1]}.{layer}.{head[2]}": value for layer in layers}
        elif name.startswith("backbone.") and not name.startswith("backbone.0."):
            wanted["backbone.0.body." + name.removeprefix("backbone.")] = value
        else:
            wanted[name.removeprefix("pred_head.")] = value
    return wanted


def converted_file(case, path, wanted):
    """What the released converter of Siamese DETR leaves, loaded as fine-tuning does:
    everything but the class head and patch2query."""
    categories = [{"id": 10 * i + 1, "name": f"class {i}"} for i in range(5)]
    found, arch = finetune.read_init(str(path))
    cfg = finetune.adopt_architecture(finetune.Config(init_from=str(path)), arch, set())
    model, mapped = finetune.build_model(cfg, found, categories)
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
    """A file with a released checkpoint's names and shapes loads with nothing left over,
    and our model has the same names."""
    names = [name for name, *_ in case["entries"]]
    if any(name.removeprefix("module.") == "encoder_q.conv1.weight" for name in names):
        return moco_statedict(case, seen)
    if case["model"].startswith("soco_"):
        return soco_statedict(case, seen)
    # one head for all decoder layers appears under several names; with box refinement each layer has its own
    shared = not any(name.startswith("transformer.decoder.bbox_embed.") for name in names)
    entries = [entry if len(entry) > 2 or not shared
               else (*entry, re.sub(r"^(bbox_embed|class_embed)\.\d+\.", r"\1.0.", entry[0]))
               for entry in case["entries"]]
    state = released_state(entries, case)
    wanted = expected_tensors(state)
    path = released_file(seen.tmp, state, case["wrapping"])
    # the released wrapper and names again, each tensor unchanged
    back = convert.official(convert.open_checkpoint(path))
    again = back.get("model", back.get("state_dict"))
    assert (set(back) == ({"meta", "state_dict"} if '"state_dict"' in case["wrapping"] else {"model"})
            and again.keys() == state.keys())
    for name, value in state.items():
        constant = torch.tensor([1, 1, 0.1]) if name == "pred_head.criterion.empty_weight" else value
        assert torch.equal(again[name], constant), name
    if "converter" in case["wrapping"]:
        return converted_file(case, path, wanted)
    pretraining = any(name.startswith(("feature_embed.", "patch2query.")) for name in state)
    model, _ = load_released(path, lr_backbone=0.0 if pretraining else 2e-5)
    own = model.state_dict()
    assert own.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(own[name], value), name
    if "may start with module." in case["wrapping"]:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
        again = convert.open_checkpoint(path).state
        assert again.keys() == wanted.keys() and all(torch.equal(again[k], v) for k, v in wanted.items())
    if "group_sizes" in case:                                           # all but the backbone, the backbone
        rest, backbone, linear_proj = (len(g["params"]) for g in common.param_groups(model, 1e-4, 1e-5))
        assert [rest + linear_proj, backbone] == case["group_sizes"]
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
    """Our Siamese DETR with a case's weights, through the loader of released files;
    the backbone's own where the case has none."""
    c, state = case["config"], {}
    for name, shape in case["state_dict"]:
        state[name] = torch.from_numpy(fill(name, tuple(shape), case["seed"])) * case["scale"].get(name, 1.0)
        if name.endswith("criterion.empty_weight"):
            state[name] = torch.tensor([1, 1, 0.1])
    path = seen.tmp / "iter_1.pth"
    torch.save({"meta": {"iter": 1}, "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {}}, path)
    state = convert.open_checkpoint(path).state
    variant = {"vanilla": "detr", "conditional": "conditional_detr", "deform_ss": "deformable_detr_ss",
               "deform_ms": "deformable_detr"}[c["variant"]]
    w = c["weights"]
    cfg = siamese_detr.Config(detector=variant, dropout=0.0, num_queries=c["num_queries"],
                              hidden_dim=c["hidden_dim"], nheads=c["nhead"], enc_layers=c["enc_layers"],
                              dec_layers=c["dec_layers"], dim_feedforward=c["dim_feedforward"],
                              num_feature_levels=c["feature_levels"], num_regions=c["num_patches"],
                              eos_coef=c.get("eos_coef", 0.1), lambda_region=w["loss_feature"],
                              lambda_global=w["loss_enc_global_contra"], lambda_cls=w["loss_ce"],
                              lambda_l1=w["loss_bbox"], lambda_giou=w["loss_giou"], **overrides)
    with torch.no_grad():
        detector = detectors.build_detector(cfg, 3, focal=False, position_offset=0.0)
        if detector.backbone[0].num_channels != c["backbone_channels"]:     # given features of other widths
            backbone = detector.backbone[0]
            backbone.num_channels = c["backbone_channels"]
            detector = rebuilt(cfg, backbone)
        model = siamese_detr.SiameseDETR(detector, cfg.num_regions, shared_queries=cfg.shared_queries)
    if not any(k.startswith("backbone.") for k in state):
        state |= {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    convert.load_matching(model, state, drop={}, source=str(path))
    return cfg, model.eval()


def rebuilt(cfg, backbone):
    """detectors.build_detector around a backbone of prescribed widths."""
    shared = (cfg.hidden_dim, cfg.nheads, cfg.enc_layers, cfg.dec_layers, cfg.dim_feedforward, cfg.dropout)
    if cfg.detector.startswith("deformable"):
        levels = 1 if cfg.detector == "deformable_detr_ss" else cfg.num_feature_levels
        return common.DeformableDETR(backbone, common.DeformableTransformer(*shared, levels), num_logits=3, focal=False,
                                     num_queries=cfg.num_queries, position_offset=0.0)
    transformer = common.DETRTransformer(*shared, conditional=cfg.detector == "conditional_detr")
    return common.DETR(backbone, transformer, num_logits=3, focal=False, num_queries=cfg.num_queries)


def decoder_rounding(model, features, mask, rois):
    """How far float32 rounding of the BACKBONE alone moves the decoder's outputs: the largest change over five draws of
    noise of that size (7e-7 of a feature's spread, measured against float64 on ResNet-50). 1e-6 in a well-conditioned
    network; the six deformable decoder layers of siam_r50_deform_ms_bs1 make 1e-3 of it, which is twice that case's
    tolerance: there even the float64 result is 1.2e-3 from the stored one."""
    generator, moved = torch.Generator(rois.device).manual_seed(0), {}
    with torch.no_grad():
        exact = model.from_features(features, mask, rois)
        for _ in range(5):
            noisy = [f + 7e-7 * f.std() * torch.randn(f.shape, generator=generator, device=f.device) for f in features]
            other = model.from_features(noisy, mask, rois)
            for ours, name in (("hs", "hs"), ("pred_logits", "pred_logits"), ("pred_boxes", "pred_boxes"),
                               ("pred_features", "pred_feature")):
                change = max((a[ours] - b[ours]).abs().max().item()
                             for a, b in zip([exact, *exact["aux_outputs"]], [other, *other["aux_outputs"]]))
                moved[name] = max(moved.get(name, 0.0), change)
    return moved


def compare_siamese(case, arrays, cfg, model, features, mask, crop_features, tolerance, rounding):
    """One pass over both directions against what is stored of each: d1 looks into view 2,
    the second half of our batch; d2 into view 1."""
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
    matches = criterion.matcher(layers, targets)
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
        for ours, theirs in (("pred_logits", "pred_logits"), ("pred_boxes", "pred_boxes"),
                             ("pred_features", "pred_feature")):
            check(theirs, torch.stack([layer[ours][half] for layer in layers]))
        if output[1] is not None:
            check("ref", output[1][half])
        for level, memory in enumerate(outputs["memory"]):
            check(f"mem{level}", memory[half])
        for side, stored in ((0, "match_src"), (1, "match_tgt")):
            close(torch.stack([torch.stack([pair[side] for pair in match[half]]) for match in matches]),
                  arrays[f"{direction}_{stored}"], 0)
    rule = case["tolerance"]["losses"]
    expected = {{"loss_enc_global_contra": "loss_global"}.get(name, name): value
                for name, value in case["losses"].items()}
    assert set(losses) == set(expected)
    for name, value in expected.items():  # a cross-entropy moves by at most twice what its logits move by
        moved = 2 * rounding.get("pred_logits", 0.0) if name.startswith("loss_ce") else 0.0
        close(losses[name], value, rule.get("atol", 1e-5) + moved, rule["rtol"], name)
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
    overrides = ({"shared_queries": True} if c["variant"].startswith("deform") and B > 1
                 and not case["repaired_batch_bug"] else {})
    cfg, model = siamese_model(case, seen, **overrides)

    def made(text, view):                                               # '2*fill("input:feat_v1_l0",[2, 40, 3, 4],12)'
        factor, name, shape = re.match(r'(?:([\d.]+)\*)?fill\("input:(\w+)",\[([\d, ]+)\]', text).groups()
        return float(factor or 1) * tensor(name.replace("_v1", f"_v{view}"),
                                           [int(v) for v in shape.split(",")], case["seed"])

    features = [torch.cat([made(text, view) for view in (1, 2)]) for text in case["inputs"]["feat_v1"]]
    crops = torch.cat([torch.cat([made(text, view).mean((2, 3)) for text in case["inputs"]["crop"]], 1)
                       for view in (1, 2)])
    hw = [int(v) for v in re.search(r"(\d+)x(\d+)", case["inputs"]["img_size"]).groups()]
    mask = padded_mask(arrays.tensor("img_size").long(), hw)
    compare_siamese(case, arrays, cfg, model, features, mask, crops.unflatten(0, (2 * B, -1)),
                    case["tolerance"]["outputs"], {})


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
    crops = torch.stack([torch.stack([coarse_image(f"crop{b}_v{v}_{i}",
                                                   (3, small * cell, small * cell), cell, case["seed"])
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
    fills = {k: re.search(r'fill\("input:(\w+)",\[([\d, ]+)\]', v)
             for k, v in case["inputs"].items() if v.startswith("fill")}
    logits, features, gt = (tensor(m[1], [int(v) for v in m[2].split(",")], case["seed"])
                            for m in (fills["pred_logits"], fills["pred_feature"], fills["gt_feature"]))
    boxes = arrays.tensor("target_boxes")
    matcher = common.HungarianMatcher(c["matcher"]["cls"], c["matcher"]["l1"], c["matcher"]["giou"], focal=False)
    criterion = common.SetCriterion(matcher, weight_feature=1.0, eos_coef=c["eos_coef"])
    targets = [{"labels": torch.ones(len(b), dtype=torch.int64), "boxes": b, "features": f}
               for b, f in zip(boxes, gt.unflatten(0, (len(boxes), -1)))]
    outputs = {"pred_logits": logits, "pred_boxes": arrays.tensor("pred_boxes"), "pred_features": features}
    num_boxes = boxes.shape[0] * boxes.shape[1]
    pairs = matcher([outputs], targets)[0]
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
    state = {f"enc_head.0.{n}": torch.from_numpy(fill(n, tuple(shape), case["seed"]))
             for n, shape in case["state_dict"]}
    model.load_state_dict({**model.state_dict(), **state})
    model.train(c["mode"].startswith("train"))
    made = {k: re.search(r"\[([\d, ]+)\]", v)[1] for k, v in case["inputs"].items()}
    maps = {k: tensor(k, [int(v) for v in shape.split(",")], case["seed"]).requires_grad_()
            for k, shape in made.items()}
    out = model.describe([torch.cat([maps[f"mem_v1_l{i}"], maps[f"mem_v2_l{i}"]]) for i in range(c["levels"])])
    loss = siamese_detr.global_loss(out["projection"], out["prediction"])
    loss.backward()
    close(loss, arrays["loss"], case["tolerance"]["loss"])
    rule = case["tolerance"]["grad"]
    for name, value in maps.items():  # the same at every position of a pooled map: one is stored
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        close(gradient.mean((2, 3)), arrays[f"grad_{name}"], rule["atol"], rule["rtol"], name)
    norms = {n: p.grad.norm() for n, p in model.enc_head[0].named_parameters()}
    assert norms.keys() == case["param_grad_norms"].keys()
    for name, value in case["param_grad_norms"].items():
        close(norms[name], value, rule["atol"], rule["rtol"], name)


@kind("siamese/view_geometry")
def view_geometry(case, arrays, _):
    for row, expected in zip(arrays["cases"].astype(np.float64), arrays["out"]):
        first, second, inter = siamese_detr.view_boxes(tuple(row[:4]), float(row[4]), float(row[5]),
                                                       float(row[6]), bool(row[7]))
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
        rows.append(torch.cat([torch.tensor(outer),
                               *siamese_detr.view_boxes(outer, c["iou"], u1, u2, bool(rng.random() < 0.5))]).numpy())

    def describe(rows):
        outer, first, second, inter = (rows[:, i:i + 4] for i in (0, 4, 8, 12))
        def area(b):
            return (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
        image = np.prod(c["image_hw"])
        return ({"iou_views": area(inter) / (area(first) + area(second) - area(inter)),
                 "outer_over_image": area(outer) / image,
                 "outer_aspect_w_over_h": (outer[:, 2] - outer[:, 0]) / (outer[:, 3] - outer[:, 1]),
                 "view1_over_outer": area(first) / area(outer),
                 "view2_over_outer": area(second) / area(outer), "inter_over_outer": area(inter) / area(outer),
                 "inter_over_view1": area(inter) / area(first), "view1_over_image": area(first) / image},
                (first[:, 0] <= second[:, 0]).mean())

    (mine, top_left), (theirs, _) = describe(np.stack(rows)), describe(arrays["rows_first_500"].astype(np.float64))
    assert set(mine) == {k for k, v in case["stats"].items() if isinstance(v, dict)}
    for name, stats in case["stats"].items():
        if isinstance(stats, dict):
            close(mine[name].mean(), stats["mean"], 4 * stats["std"] * (2 / n) ** 0.5 + 1e-6, what=name)
            close(theirs[name].mean(), stats["mean"], 4 * stats["std"] * (1 / 500 + 1 / n) ** 0.5 + 1e-6, what=name)
    assert mine["iou_views"].min() >= c["iou"] - 1e-6 and mine["iou_views"].max() <= 1 + 1e-6
    stored = np.sort(arrays["iou"])
    distance = np.abs(np.searchsorted(np.sort(mine["iou_views"]), stored) / n
                      - np.arange(len(stored)) / len(stored)).max()
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
        moved = siamese_detr.jitter_boxes(arrays.tensor("boxes"),
                                          arrays.tensor(f"randn_{view}"), case["config"]["ratio"])
        close(siamese_detr.clip_boxes(moved, torch.tensor([0.0, 0.0, w, h])), arrays[f"out_{view}"],
              case["tolerance"]["atol"])


# ==== SoCo =========================================================================================================

def numbers(value):
    """All numbers in a case's words, in order."""
    return [float(v) for v in re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?", json.dumps(value))]


def allowed(case, what=""):
    """A tolerance in words: the number behind `what`."""
    return float(re.search(rf"{what}\D*?([\d.]+(?:e-?\d+)?)", case["tolerance"])[1])


def soco_fill(names, seed):
    """[(released name, shape)] -> its tensors under our names, which are the released ones but for `module.` and a
    queue left over from MoCo."""
    names = [(name.removeprefix("module."), tuple(shape)) for name, shape in names]
    return {name: torch.from_numpy(fill(name, shape, seed))
            for name, shape in names if name not in ("queue", "queue_ptr")}


def soco_model(shapes, roi_size=None):
    """The SoCo that a list of names and shapes belongs to; without an encoder in the list it has a small one."""
    body = convert.resnet_name(shapes, "encoder.", "the case") if "encoder.conv1.weight" in shapes else "resnet18"
    channels, (head_dim, flat) = shapes.get("head.conv1.weight", [0])[0], shapes.get("head.fc1.weight", (0, 0))
    embedding_dim, mlp_dim = shapes["projector.linear2.weight"]
    return soco.SoCo(common.Backbone(body, (1, 2, 3, 4), "bn", trainable=5), pipeline="fpn" if channels else "c4",
                     fpn_channels=channels, head_dim=head_dim, mlp_dim=mlp_dim, embedding_dim=embedding_dim,
                     roi_size=roi_size or (round((flat / channels) ** 0.5) if channels else 14))


@kind("soco/level_assignment")
def soco_levels(case, arrays, _):
    ranges = tuple(int(v) for v in re.search(r"\[([\d, ]+)\]", json.dumps(case["config"]))[1].split(","))
    for row, resized, level in zip(arrays["box_crop_f64"], arrays["resized_int"], arrays["level"], strict=True):
        ours = soco.resize_boxes(row[None, :4], (0, 0, row[4], row[5]), row[6])
        close(ours[0], resized, 0)
        close(soco.assign_levels(ours, ranges), level[None], 0)


@kind("soco/box_jitter")
def soco_jitter(case, arrays, _):
    probability, atol = numbers(case["config"])[0], allowed(case)
    moved = soco.jitter_boxes(arrays["props_xyxy_id"], arrays["apply_f64"] < probability, arrays["r_f64"])
    close(moved, arrays["jittered_f64"], atol)
    close(soco.clip_to_crop(moved, (0, 0, *arrays["image_wh"])), arrays["clipped_f64"], atol)
    crop = re.search(r"(\d+)x(\d+) \(w x h\) crop", case["outputs"])
    close(soco.clip_to_crop(np.zeros((0, 5)), (0, 0, int(crop[1]), int(crop[2]))), arrays["empty_clip"], 0)


@kind("soco/proposal_filter")
def soco_filter(case, arrays, _):
    """Which rules a column stands for is in its name, as in the released file names:
    ratio3size0308 = aspect 3, size 0.3..0.8."""
    rects, wh, side = arrays["rects_xywh"], tuple(arrays["image_wh"].tolist()), int(numbers(case["config"])[-1])
    for name in sorted(case["arrays"]):
        if name.startswith("keep_"):
            rule = re.fullmatch(r"keep_(?:ratio(\d))?(?:size(\d\d)(\d\d))?(none)?", name)
            size = (int(rule[2]) / 10, int(rule[3]) / 10) if rule[2] else None
            close(soco.filter_rects(rects, wh, float(rule[1] or "inf"), size, side), arrays[name], 0, what=name)
    close(soco.inclusive_boxes(rects)[:, :4], arrays["converted_xyxy"], 0)


@kind("soco/box_pipeline")
def soco_box_pipeline(case, arrays, _):
    atol = float(re.search(r"floats ([\d.e-]+)", case["tolerance"])[1])
    ranges, probability = soco.Config().level_sizes, float(re.search(r"apply\[i\] < ([\d.]+)", case["inputs"])[1])
    for s, scene in enumerate(case["config"]):
        def given(name, s=s):
            return arrays[f"s{s}_{name}"]

        boxes, K, whole = soco.inclusive_boxes(given("rects_xywh")), scene["K"], (0, 0, scene["W"], scene["H"])
        assert len(boxes) == scene["n"]
        close(boxes, given("out_proposals_xyxy_id"), 0)
        for j in (int(name[-1]) for name in sorted(case["arrays"]) if re.fullmatch(rf"s{s}_params\d", name)):
            top, left, height, width, *size = given(f"params{j}").tolist()
            assert size == [scene["H"], scene["W"]]
            crop = (left, top, left + width, top + height)
            draw = soco.PairDraw(given(f"sel1{j}"), given(f"jit1{j}_apply_f64") < probability, given(f"jit1{j}_r_f64"),
                                 given(f"pad_1_1{j}"), given(f"pad_{j}"))
            chosen = soco.overlapping(boxes, crop)
            close(chosen[:, 4], given(f"out_overlap_ids_1{j}"), 0)
            chosen = chosen[draw.select] if len(chosen) >= K else chosen
            close(chosen[:, 4], given(f"out_selected_ids_1{j}"), 0)
            moved = soco.jitter_boxes(chosen, draw.apply[:len(chosen)], draw.r[:len(chosen)])
            close(moved, given(f"out_jittered_1{j}_f64").reshape(-1, 5), atol)
            first, second = soco.pair_boxes(boxes, whole, crop, draw, K)
            close(first, given(f"out_clipped_1_1{j}_f64"), atol)
            close(second, given(f"out_clipped_{j}"), 0)
            levels, flips = [], given("flips")
            for text, ours, view, side, flip, empty in ((f"1_1{j}", first, whole, scene["view"], flips[0], -1),
                                                        (f"{j}", second, crop,
                                                         scene["view" if j == 2 else f"view{j}"], flips[j - 1], -j)):
                resized = soco.resize_boxes(ours, view, side)
                close(np.concatenate([resized, ours[:, 4:]], 1), given(f"out_resized_int_{text}"), 0)
                levels.append(soco.assign_levels(resized, ranges))
                slots = np.where(np.arange(len(ranges))[:, None] == levels[-1], ours[:, 4], empty)          # [L, K]
                close(slots.flatten(), given(f"out_assigned_ids_{text}_f64"), 0)
                for name, mirrored in (("norm", False), ("final", bool(flip))):
                    relative = soco.relative_boxes(ours, view, mirrored)
                    assert relative.dtype == np.float32
                    close(np.concatenate([relative, ours[:, 4:]], 1), given(f"out_{name}_{text}"), atol)
            close(soco.correspondence(first[:, 4], second[:, 4], *levels, len(ranges)), given(f"out_corres_1{j}"), 0)
            if f"s{s}_out_plain_corres_1{j}" in case["arrays"]:
                close(soco.correspondence(first[:, 4], second[:, 4]), given(f"out_plain_corres_1{j}"), 0)


def soco_inputs(case):
    """{name: tensor} of inputs that say fill('input:C2', [2, 256, 14, 14], 0)."""
    made = {k: re.search(r"fill\('input:(\w+)', \[([\d, ]+)\], (\d+)\)", v)
            for k, v in case["inputs"].items() if "fill(" in v}
    return {k: tensor(m[1], [int(v) for v in m[2].split(",")], int(m[3])) for k, m in made.items()}


@kind("soco/fpn")
def soco_fpn(case, arrays, _):
    shapes, inputs = dict(case["state_dict"]), soco_inputs(case)
    channels = [shape[1]
                for name, shape in shapes.items() if re.fullmatch(r"neck\.lateral_convs\.\d\.conv\.weight", name)]
    for mode in ("eval", "train"):
        model = (torch.nn.ModuleDict({"neck": soco.FPN(channels, shapes["neck.fpn_convs.0.conv.weight"][0])})
                 .train(mode == "train"))
        convert.load_matching(model, soco_fill(case["state_dict"], case["seed"]), drop={}, source="the case")
        with torch.no_grad():
            outputs = model["neck"](list(inputs.values()))
        for (name, _), level in zip(inputs.items(), outputs, strict=True):
            name = f"{mode}_P{name[1:]}"
            assert list(level.shape) == arrays[f"{name}_shape"].tolist()
            within(case, level.flatten()[arrays.tensor(f"{name}_idx")], arrays[name], name)


@kind("soco/roi_head")
def soco_roi_head(case, arrays, _):
    shapes, levels = dict(case["state_dict"]), soco_inputs(case)
    model = soco_model(shapes, int(re.search(r"output_size (\d+)", case["config"])[1]))
    drop = {r"^(encoder|neck)\.|_k\.": "not in the case"}
    convert.load_matching(model, soco_fill(case["state_dict"], case["seed"]), drop=drop, source="the case")
    seen = {}
    for name in ("head", "projector", "predictor"):
        getattr(model, name).register_forward_hook(
            lambda module, args, output, name=name: seen.setdefault(name, []).append((args[0], output)))
    for mode in ("eval", "train"):
        model.train(mode == "train")
        seen.clear()
        with torch.no_grad():
            embedding = model.embed(list(levels.values()), arrays.tensor("boxes"), False)
        for i, level in enumerate(levels):
            (rois, h), (_, g), (_, v) = (seen[name][i] for name in ("head", "projector", "predictor"))
            rows = embedding.unflatten(1, (len(levels), -1))[:, i].flatten(0, 1)
            for name, value in {f"roi_{level}": rois, f"{mode}_head_{level}": h, f"{mode}_proj_{level}": g,
                                f"{mode}_pred_{level}": v, f"{mode}_predn_{level}": rows}.items():
                if f"{name}_idx" in case["arrays"]:
                    value = value.flatten()[arrays.tensor(f"{name}_idx")]
                if name in case["arrays"]:
                    within(case, value, arrays[name], name)
    for name in case["arrays"]:
        if match := re.fullmatch(r"train_(head|proj|pred)_(bn\d)_(running_\w+)_after\d", name):
            part = {"head": model.head, "proj": model.projector, "pred": model.predictor}[match[1]]
            statistics = getattr(getattr(part, match[2]), match[3])
            within(case, statistics[:arrays[name].size], arrays[name], name)


@kind("soco/loss")
def soco_losses(case, arrays, _):
    atol, width = allowed(case), case["shapes"][-1]
    n, K = arrays["ids1"].shape

    def embeddings(prefix, names, rows, joined=False):
        shape = (n * rows, width) if joined else (n, rows, width)
        return [torch.nn.functional.normalize(tensor(prefix + name, shape, case["seed"]), dim=-1).view(n, rows, width)
                for name in names]

    def pairs(matrix, *levels):
        """A case's correspondence; ours is the same, but for images whose pairs were taken out."""
        ours = np.stack([soco.correspondence(*image, levels=matrix.shape[1] // K)
                         for image in zip(arrays["ids1"], arrays["ids2"], *levels)])
        kept = matrix.any((1, 2))
        close(ours[kept], matrix[kept], 0)
        return torch.from_numpy(matrix)

    level1 = arrays["level1"]
    views = [j for j in range(2, 9) if f"corres_1{j}" in case["arrays"]]
    corres = torch.stack([pairs(arrays[f"corres_1{j}"], level1, arrays[f"level{j}"]) for j in views], 1)
    v = [embeddings("", (f"pred_1_1{j}", f"pred_{j}", f"proj_1_1{j}", f"proj_{j}"), corres.shape[2]) for j in views]
    total, terms = soco.soco_loss(v, corres)
    assert list(terms) == [f"loss_{a}" for j in views for a in (f"1{j}", f"{j}1")]
    close(torch.stack(list(terms.values())), arrays["terms"], atol)
    close(total, arrays["total"], atol)
    plain = pairs(arrays["c4_corres"])[:, None]
    total, terms = soco.soco_loss([embeddings("c4_", ("pred_1", "pred_2", "proj_1", "proj_2"), K, joined=True)], plain)
    close(torch.stack(list(terms.values())), arrays["c4_terms"], atol)
    close(total, arrays["c4_total"], atol)
    same, rows = v[0][0], torch.eye(corres.shape[2]).expand(n, -1, -1)
    close(soco.pair_loss(same, same, rows), arrays["perfect_one_term"], atol)


@kind("soco/lars")
def soco_lars(case, arrays, _):
    rtol, momentum = allowed(case), float(re.search(r"momentum ([\d.]+)", case["what"])[1])
    trust = float(re.search(r"trust_coef ([\d.]+)", case["config"])[1])
    for c in sorted(int(name[1:].split("_")[0]) for name in case["arrays"] if name.endswith("_wd_lrs_f64")):
        weight_decay, *rates = arrays[f"c{c}_wd_lrs_f64"].tolist()
        model = torch.nn.ModuleDict()
        for name, shape in case["shapes"].items():
            value = torch.from_numpy(fill(f"lars:{name}", tuple(shape), case["seed"]))
            part, leaf = name.split(".")
            if part not in model:
                model[part] = torch.nn.ParameterDict()
            model[part][leaf] = torch.nn.Parameter(torch.zeros_like(value) if part == "zero" else value)
        optimizer = soco.LARS([{**group, "base_lr": rates[0]} for group in soco.lars_groups(model, weight_decay)],
                              rates[0], momentum, trust=trust)
        for step, rate in enumerate(rates):
            for name, p in model.named_parameters():
                gradient = 0.1 * tensor(f"lars_grad{step}:{name}", p.shape, case["seed"])
                p.grad = None if "nograd" in name else torch.zeros_like(p) if "zerograd" in name else gradient
            common.set_lr(optimizer, rate / rates[0])
            optimizer.step()
            for name, p in model.named_parameters():
                expected = arrays[f"c{c}_step{step + 1}_{name}"]
                close(p, expected, rtol * np.abs(expected).max(), what=f"c{c} {name} after step {step + 1}")
        buffers = {name: optimizer.state[p]["momentum_buffer"]
                   for name, p in model.named_parameters() if p in optimizer.state}
        assert buffers.keys() == {name.split("_buf_")[1] for name in case["arrays"] if name.startswith(f"c{c}_buf_")}
        for name, value in buffers.items():
            expected = arrays[f"c{c}_buf_{name}"]
            close(value, expected, rtol * np.abs(expected).max(), what=f"c{c} buffer of {name}")


@kind("soco/schedules")
def soco_schedules(case, arrays, _):
    c, rtol = case["config"], allowed(case)
    assert c["warmup_multiplier"] == 100                                # the only one the code knows
    for i, spec in enumerate(c["lr"]):
        for step, expected in zip(arrays[f"lr{i}_steps"].tolist(), arrays[f"lr{i}_f64"], strict=True):
            cfg = soco.Config(lr=spec["lr"], batch_size=256, epochs=spec["epochs"], warmup_epochs=spec["warmup"],
                              lr_min=c["eta_min"])
            close(spec["lr"] * soco.lr_factor(cfg, step, spec["n_iter"]), expected, 0, rtol)
    for i, spec in enumerate(c["ema"]):
        for k, expected in zip(arrays[f"ema{i}_k"].tolist(), arrays[f"ema{i}_momentum_f64"], strict=True):
            close(soco.momentum_at(k, spec["base"], spec["K"]), expected, 0, rtol)
    for images, world, per_process, epochs, steps in arrays["K_examples_f64"].tolist():
        assert soco.ema_steps(int(images), int(world * per_process), int(epochs)) == steps


@functools.lru_cache(maxsize=1)
def soco_entries(file, seed, path):
    """All tensors of a released SoCo file; kept, several cases in a row share them."""
    return soco_fill(manifest(file, path)["entries"], seed)


@kind("soco/full_step")
def soco_full_step(case, arrays, seen):
    """One soco.train_step (rate 0): on small views in float64, which the float64 numbers pin
    closely, else in float32."""
    c = case["config"]
    dtype = torch.float64 if max(c["view_sizes"]) <= 128 else torch.float32
    state = soco_entries(f"statedict_soco_{'c4' if c['variant'] == 'c4' else 'fpn'}_pretrain.json", case["seed"],
                         seen.path)
    model = soco_model({name: value.shape for name, value in state.items()}, c["output_size"])
    convert.load_matching(model, state, drop={}, source="the case")
    model.to(dtype).train()
    views = [view.to(dtype) for view in soco_inputs(case).values()]
    assert [view.shape[-1] for view in views] == c["view_sizes"] and all(len(view) == c["N"] for view in views)
    others = range(2, len(views) + 1)

    def boxes(name, instead):
        return arrays.tensor(name if name in case["arrays"] else instead, dtype)[..., :4]

    batch = {"views": views, "boxes1": torch.stack([boxes(f"bboxs1_1{j}", "bboxs1_12") for j in others], 1),
             "boxes": torch.stack([boxes(f"bboxs{j}", "bboxs2") for j in others], 1),
             "corres": torch.stack([arrays.tensor("plain_12" if c["variant"] == "c4" else f"corres_1{j}", dtype)
                                    for j in others], 1)}
    assert batch["boxes1"].shape == (c["N"], len(others), c["K"], 4)
    momentum = soco.momentum_at(c["k"], c["contrast_momentum"], c["K_total"])
    assert momentum == pytest.approx(c["momentum_used"], rel=1e-9)
    found = {}
    model.register_forward_hook(lambda module, args, output: found.update(pairs=output))
    model.encoder.layer4.register_forward_hook(lambda module, args, output: found.update({"C5_view1": output} | found))
    if model.neck is not None:
        model.neck.register_forward_hook(lambda module, args, output: found.update({"P3_view1": output[1]} | found))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    single, threads = torch.Tensor.float, torch.get_num_threads()
    torch.set_num_threads(1)  # where other work shares the cores a second thread makes it slower
    with pytest.MonkeyPatch.context() as patch:  # .float() undoes bf16 in training; here it must not undo float64
        patch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else single(self))
        terms = soco.train_step(SimpleNamespace(amp="off"), model, optimizer, batch, momentum, torch.device("cpu"))
    torch.set_num_threads(threads)

    loss_atol, atol, rtol, tight = (allowed(case, what)
                                    for what in ("loss atol", "embeddings atol", "grad norms rel", "tight"))
    floor = float(m[1]) if (m := re.search(r"gradient norms with atol ([\d.e-]+)", case.get("note", ""))) else 1e-6
    parameters, double = dict(model.named_parameters()), dtype == torch.float64
    losses = torch.stack([value for name, value in terms.items() if re.fullmatch(r"loss_\d\d", name)])
    norms = torch.stack([parameters[name].grad.norm() for name in arrays["grad_names"].tolist()])
    for name, value in (("loss", terms["loss"]), ("terms", losses)):
        close(value, arrays[f"{name}_f64"], tight if double else loss_atol, what=name)
        close(value, arrays[f"{name}32"], loss_atol, what=name)
    close(norms, arrays["grad_norms_f64"], floor, tight if double else rtol, "norms")
    close(norms, arrays["grad_norms32"], floor, rtol, "norms")
    close(terms["grad_norm"], arrays["grad_total_norm_f64"], 0, tight if double else rtol, "total norm")
    values = {name: found[name] for name in ("C5_view1", "P3_view1") if name in case["arrays"]}
    for i, (v1, vj, target1, targetj) in enumerate(found["pairs"]):
        values |= {f"q{2 * i}": v1, f"k{2 * i}": targetj, f"q{2 * i + 1}": vj, f"k{2 * i + 1}": target1}
    for name, value in values.items():
        close(value.flatten()[arrays.tensor(f"{name}_idx")], arrays[name], atol, what=name)
    after = model.state_dict()
    for name in (name for name in case["arrays"] if name.startswith("after_")):
        close(after[name.removeprefix("after_")].flatten()[:arrays[name].size], arrays[name],
              tight if double else atol / 10, 1e-4, name)
    for i, name in enumerate(arrays["ema_names"].tolist()):
        close(after[name].flatten()[arrays.tensor(f"ema{i}_idx")], arrays[f"ema{i}"], tight, what=name)
    assert {name: int(after[name]) for name in case["num_batches_tracked"]} == case["num_batches_tracked"]


def soco_statedict(case, seen):
    """A released SoCo file: our model has its names, its online encoder is a backbone, and what detectron2 and
    MMDetection get from it is named."""
    arch, use = "c4" if "_c4_" in case["model"] else "fpn", case["model"].split("_")[-1]
    if use != "pretrain":
        return soco_converted(case, seen, arch, use)
    state = {name: distinct(name.removeprefix("module."), tuple(shape)) for name, shape in case["entries"]}
    path = soco_file(seen.tmp, state)
    found = convert.open_checkpoint(path)
    released = found.state
    assert found.what.startswith("SoCo (C4), ResNet-" if arch == "c4" else "SoCo, ResNet-")
    again = convert.official(found)["model"]  # the released names again; a queue that nothing reads is not kept
    assert (again.keys() == state.keys() - {"module.queue", "module.queue_ptr"}
            and all(torch.equal(v, state[k]) for k, v in again.items()))
    model = soco_model({name: value.shape for name, value in released.items()})
    convert.load_matching(model, released, drop={}, source=str(path))
    own = model.state_dict()
    assert ({f"module.{name}" for name in own} | {"module.queue", "module.queue_ptr"} >= state.keys()
            >= {f"module.{name}" for name in own})
    assert all(torch.equal(value, state[f"module.{name}"]) for name, value in own.items())
    backbone = common.Backbone(convert.resnet_name(released, "encoder.", path), (1, 2, 3, 4), "bn", trainable=5)
    convert.load_backbone(backbone.body, path)
    for name, value in backbone.body.state_dict().items():
        online = state[f"module.encoder.{name}"]
        assert torch.equal(value, online) and (value.numel() < 2
                                               or not torch.equal(value, state[f"module.encoder_k.{name}"])), name


def soco_file(folder, state):
    """As main_pretrain.py saves it."""
    path = folder / "current.pth"
    torch.save({"opt": argparse.Namespace(arch="resnet50", alternative=None),
                "model": state, "optimizer": {"state": {}, "param_groups": []},
                "scheduler": {"last_epoch": 0, "after_scheduler": {"last_epoch": 0}}, "epoch": 100}, path)
    return path


def soco_converted(case, seen, arch, use):
    """What the released converters write: we write the same names, read them, and fill a detector from them as from
    the file they were made of."""
    entries = manifest(f"statedict_soco_{arch}_pretrain.json", seen.path)["entries"]
    source = {name: distinct(name.removeprefix("module."), tuple(shape)) for name, shape in entries
              if not name.startswith(("module.encoder_k.", "module.neck_k.", "module.head_k."))}
    found = convert.open_checkpoint(soco_file(seen.tmp, source))
    content = ({"model": convert.detectron2_arrays(found)} if use == "detectron2"
               else {"state_dict": convert.mmdetection_state(found)})
    ours, = content.values()
    wanted = {new: source[old] for old, new in case["mapping"]}
    assert ([[name, list(value.shape)] for name, value in ours.items()] == case["entries"]
            and ours.keys() == wanted.keys())
    assert all(np.array_equal(ours[name], value) for name, value in wanted.items())
    path = seen.tmp / "converted.pkl"
    if use == "detectron2":
        path.write_bytes(pickle.dumps({**content, "__author__": "Yue", "matching_heuristics": True}, 2))
    else:
        torch.save({**content, "meta": {}}, path)
    detector = "mask_rcnn_c4" if arch == "c4" else "mask_rcnn_fpn"
    read = convert.open_checkpoint(path)
    tensors, left = convert.rcnn_state(read, detector)
    expected = convert.rcnn_state(found, detector)[0]
    assert not left and tensors.keys() == expected.keys() and all(torch.equal(v, expected[k])
                                                                  for k, v in tensors.items())
    with torch.device("meta"):
        own = rcnn.build_rcnn(finetune.Config(detector=detector, box_head="4conv1fc",
                                              backbone_norm="bn"), 80).state_dict()
    assert all(own[k].shape == v.shape for k, v in tensors.items())
    assert [k for k in own if k.startswith("backbone.body.") and k not in tensors] == []


# ==== MoCo and DUPR ================================================================================================

def within(case, actual, expected, what=""):
    """Compare under a tolerance in words: atol and rtol as named, a bare number is atol;
    atol "relative to max abs" grows with the array.

    "rtol 1e-4 (float32)" names no atol: entries of a unit vector that are nearly 0 keep the rounding of the
    others, 2e-6 in the fact sheet.
    """
    text, expected = str(case["tolerance"]), np.asarray(expected)
    limit = ({k: float(v) for k, v in re.findall(r"(atol|rtol) ([\d.e-]+)", text)}
             or {"atol": float(re.match(r"[\d.e-]+", text)[0])})
    limit = {"atol": 2e-6 if "(float32)" in text else 0.0, **limit}
    scale = np.abs(expected).max(initial=0) if "relative to max abs" in text else 1.0
    close(torch.as_tensor(actual).reshape(expected.shape), expected, limit["atol"] * scale,
          limit.get("rtol", 0.0), what)


def unit_queue(shape, seed, name="queue"):
    return torch.nn.functional.normalize(torch.from_numpy(fill(name, tuple(shape), seed)), dim=0)


def moco_config(case, **values):
    """MoCo v2 as a setting of DUPR: an image head on conv5 and no more."""
    c = case["config"]
    return dupr.Config(alpha=(0, 0, 0, 1), beta=(0, 0, 0, 0), embedding_dim=c["dim"], queue_size=c["K"],
                       temperature=c["T"], **values)


def moco_encoder(case, shapes):
    """The encoder of a case: a ResNet, or "Tiny": conv1 (stride 2, padding 1), bn1, relu. One head on the last stage,
    of two layers or (v1) one."""
    c, nn = case["config"], torch.nn
    cfg = moco_config(case)
    if "arch" in c:
        cfg.arch = c["arch"]
        made = dupr.build_model(cfg).encoder_q
        body, levels = nn.Sequential(OrderedDict((name, getattr(made, name)) for name in made.stages)), made.levels
    else:
        width, _, *kernel = shapes["encoder_q.conv1.weight"]
        body = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, width, kernel, stride=2, padding=1, bias=False),
                                         bn1=nn.BatchNorm2d(width), layer4=nn.ReLU()))
        levels = {"layer4": ("conv5", width, 2)}
    per_level = (dict(zip(dupr.LEVELS, values)) for values in (cfg.alpha, cfg.beta, cfg.roi_sizes))
    return dupr.Encoder(body, levels, *per_level, c["dim"], mlp=c["mlp"])


def moco_model(case, folder):
    """A released MoCo checkpoint with a case's weights -> our model, through the loader of released checkpoints;
    nothing may be left over."""
    shapes = {name.removeprefix("module."): shape for name, shape in case["keys"]}
    state = {name: torch.from_numpy(fill(name, tuple(shape), case["seed"])) for name, shape in shapes.items()}
    state |= {"queue": unit_queue(shapes["queue"], case["seed"]),
              "queue_ptr": torch.zeros(shapes["queue_ptr"], dtype=torch.long)}
    model = dupr.DUPR(moco_encoder(case, shapes), case["config"]["K"], case["config"]["dim"])
    path = moco_file(folder, state)
    convert.load_matching(model, convert.open_checkpoint(path).state, drop={}, source=str(path))
    return model


def moco_file(folder, state):
    """As main_moco.py saves it."""
    path = folder / "checkpoint_0199.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet50",
                "state_dict": {f"module.{name}": value for name, value in state.items()},
                "optimizer": {"state": {}, "param_groups": []}}, path)
    return path


def moco_stepper(cfg, model, optimizer, permutation=None):
    """step(query images, key images): dupr.train_step -> (its terms, logits [N, 1 + K] of its queries and keys
    with the queue they met)."""
    seen = {}
    model.register_forward_hook(lambda module, args, output: seen.update(output=output))
    wrapped = common.wrap_model(model.train(), torch.device("cpu"), sync_bn=False)
    if permutation is not None:
        dupr.draw_permutation = lambda seed, step, n: permutation

    def step(query_images, key_images):
        n, _, h, w = query_images.shape
        queue = model.queues["image_conv5"].keys.clone()
        batch = {"views": torch.stack([query_images, key_images], 1),
                 "boxes": torch.tensor([0.0, 0.0, w, h]).repeat(n, 2, 1),
                 "flips": torch.zeros(n, 2, dtype=torch.bool), "valid": torch.ones(n, dtype=torch.bool)}
        terms = dupr.train_step(cfg, wrapped, optimizer, [batch], 0, torch.device("cpu"))
        query, key = (e["image_conv5"].detach() for e in seen["output"])
        return terms, torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1) / cfg.temperature

    return step


@kind("dupr/encoder")
def moco_encoders(case, arrays, seen):
    model = moco_model(case, seen.tmp).eval()
    for side, encoder in (("q", model.encoder_q), ("k", model.encoder_k)):
        recipe, shape = case["inputs"][f"im_{side}"]
        images = tensor(re.search(r"input:(\w+)", recipe)[1], shape, case["seed"])
        raw = {}
        encoder.image_heads["conv5"].register_forward_hook(lambda module, args, output: raw.update(z=output))
        with torch.no_grad():
            embeddings = encoder(images, torch.tensor([[0.0, 0.0, *shape[:1:-1]]]).repeat(len(images), 1))
            maps = encoder.features(images) if side == "q" else {}
        assert embeddings.keys() == {"image_conv5"}
        within(case, raw["z"], arrays[f"z_{side}"], "z")
        within(case, embeddings["image_conv5"], arrays[side], side)
        for level, stage in maps.items():
            within(case, stage.mean((2, 3)), arrays[f"avgpool_c{level[-1]}"], level)
            within(case, stage[:, :8, :8, :8], arrays[f"slice_c{level[-1]}"], level)


@kind("dupr/infonce")
def infonce(case, arrays, _):
    c, seed = case["config"], case["seed"]
    raw_q, raw_k = (tensor(name, (c["N"], c["dim"]), seed).requires_grad_(name == "raw_q")
                    for name in ("raw_q", "raw_k"))
    query, key = torch.nn.functional.normalize(raw_q, dim=1), torch.nn.functional.normalize(raw_k, dim=1)
    queue = dupr.Queue(c["dim"], c["K"])
    queue.keys.copy_(unit_queue((c["dim"], c["K"]), seed))
    queue.ptr.copy_(arrays.tensor("ptr_before"))
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.keys], 1) / c["T"]
    within(case, logits.detach(), arrays["logits"], "logits")
    for rows in (c["N"], 3, 1):
        raw_q.grad = None
        losses = dupr.info_nce(query, key, queue.keys, c["T"], rows)
        close(losses,
              torch.nn.functional.cross_entropy(logits, arrays.tensor("labels"), reduction="none").detach(), 1e-5)
        within(case, losses.detach(), arrays["per_sample"], "per_sample")
        within(case, losses.mean().detach(), arrays["loss"], "loss")
        losses.mean().backward(retain_graph=True)
        within(case, raw_q.grad, arrays["grad_raw_q"], "grad_raw_q")
    queue.enqueue(key)
    within(case, queue.keys, arrays["queue_after"], "queue_after")
    close(queue.ptr, arrays["ptr_after"], 0)


@kind("dupr/train_steps")
def moco_train_steps(case, arrays, seen):
    c = case["config"]
    model = moco_model(case, seen.tmp)
    cfg = moco_config(case, ema_momentum=c["m"], lr=c["lr"], sgd_momentum=c["momentum"], weight_decay=c["weight_decay"])
    groups = [{"params": list(model.encoder_q.parameters()), "base_lr": cfg.lr}]
    step = moco_stepper(cfg, model, torch.optim.SGD(groups, cfg.lr, momentum=cfg.sgd_momentum,
                                                    weight_decay=cfg.weight_decay))  # as dupr.main
    last = f"image_heads.conv5.{2 if c['mlp'] else 0}.weight"
    for t in range(c["steps"]):
        terms, logits = step(*(tensor(f"im_{side}{t}", (c["N"], 3, c["hw"], c["hw"]), case["seed"]) for side in "qk"))
        assert terms["loss"] == terms["image_conv5"]
        within(case, terms["loss"], arrays[f"loss_{t}"], f"loss_{t}")
        within(case, logits[:, 0], arrays[f"logits0_{t}"], f"logits0_{t}")
        within(case, model.queues["image_conv5"].keys, arrays[f"queue_{t}"], f"queue_{t}")
        close(model.queues["image_conv5"].ptr, arrays[f"ptr_{t}"], 0)
        for side, encoder in (("q", model.encoder_q), ("k", model.encoder_k)):
            state = encoder.state_dict()
            for theirs, ours in (("fc", last), ("conv", "conv1.weight"), ("bn_running_mean", "bn1.running_mean")):
                within(case, state[ours], arrays[f"{side}_{theirs}_{t}"], f"{side}_{theirs}_{t}")


def two_process_worker(path, out):
    """One process of a dupr/two_process_step case: dupr.train_step (rate 0) under DistributedDataParallel
    with the stored permutation."""
    case, r = json.loads(Path(path).read_text()), common.rank()
    c, arrays = case["config"], np.load(Path(path).with_suffix(".npz"))
    folder = Path(out) / f"rank{r}"
    folder.mkdir()
    model = moco_model(case, folder)
    step = moco_stepper(moco_config(case, ema_momentum=c["m"]), model,
                        torch.optim.SGD(model.encoder_q.parameters(), 0.0), torch.from_numpy(arrays["idx_shuffle"]))
    terms, logits = step(*(tensor(f"im_{side}_rank{r}", (c["N_per_rank"], 3, c["hw"], c["hw"]), case["seed"])
                           for side in "qk"))
    queue = model.queues["image_conv5"]
    torch.save({"logits": logits, "loss": terms["loss"], "queue": queue.keys,
                "ptr": queue.ptr, "q_bn_mean": model.encoder_q.bn1.running_mean,
                "k_bn_mean": model.encoder_k.bn1.running_mean}, folder / "result.pt")


@kind("dupr/two_process_step")
def two_process_step(case, arrays, seen):
    run_processes(f"import test_parity\ntest_parity.two_process_worker({str(seen.path.resolve())!r}, "
                  f"{str(seen.tmp)!r})", seen.tmp, case["config"]["world_size"])
    assert (sorted(arrays["idx_shuffle"].tolist())
            == list(range(case["config"]["world_size"] * case["config"]["N_per_rank"])))
    for r in range(case["config"]["world_size"]):
        for name, value in torch.load(seen.tmp / f"rank{r}" / "result.pt").items():
            within(case, value, arrays[f"{name}_rank{r}"], f"{name}_rank{r}")


@kind("dupr/lr_schedule")
def moco_schedule(case, arrays, _):
    for item in case["items"]:
        cfg = dupr.Config(lr=item["lr"], epochs=item["epochs"], schedule="cosine" if item["cos"] else "step",
                          lr_drops=tuple(item["schedule"]))
        assert len(item["epoch"]) == len(item["value"])
        for epoch, value in zip(item["epoch"], item["value"]):
            for steps_per_epoch in (1, 7):
                for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):  # the same within an epoch
                    assert cfg.lr * dupr.lr_factor(cfg, step, steps_per_epoch) == pytest.approx(value, rel=1e-9)


@kind("dupr/augmentation")
def moco_augmentation(case, arrays, _):
    """The list of the released transforms, in order, against what a sample of dupr.py goes through;
    and the distributions of the draws."""
    order = [(re.search(r"(\w+)\(", text.removeprefix("RandomApply("))[1] if "(" in text else text, text)
             for text in case["order"]]
    assert [name for name, _ in order] == ["RandomResizedCrop", "ColorJitter", "RandomGrayscale", "GaussianBlur",
                                           "RandomHorizontalFlip", "ToTensor", "Normalize"]
    crop, jitter, gray, blur, flip, _, normalise = (
        [float(v) for v in re.findall(r"(?<![\w/])\d*\.?\d+(?![\w/])", text)] for _, text in order)
    cfg = dupr.Config()
    source = [data.Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))]
    dataset = dupr.TwoCropsDataset(cfg, SimpleNamespace(load=lambda i, needs: source[i]), np.arange(1))
    assert [cfg.image_size, *cfg.crop_area] == crop[:3]
    assert dataset.photometric == data.Photometric(*jitter[:4], p_jitter=jitter[4], p_gray=gray[0], p_blur=blur[2],
                                                   blur_radius=tuple(blur[:2]))
    assert [*data.IMAGENET_MEAN, *data.IMAGENET_STD] == pytest.approx(normalise)
    rng, hw, n = np.random.default_rng(0), (375, 500), 4000
    draws = [dupr.draw_view(rng, hw, cfg.crop_area, dataset.photometric) for _ in range(n)]
    for share, p in ((np.mean([d["flip"] for d in draws]), flip[0]),
                     (np.mean([bool(d["colours"]["order"]) for d in draws]), jitter[4]),
                     (np.mean([d["colours"]["gray"] for d in draws]), gray[0]),
                     (np.mean([d["colours"]["blur"] is not None for d in draws]), blur[2])):
        assert share == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    torch.manual_seed(0)
    ratio = re.search(r"ratio (\d)/(\d)\.\.(\d)/(\d)", case["order"][0])
    ratio = (int(ratio[1]) / int(ratio[2]), int(ratio[3]) / int(ratio[4]))
    params = torchvision.transforms.RandomResizedCrop.get_params
    # top, left, h, w
    theirs = np.array([params(torch.empty(3, *hw), list(crop[1:3]), list(ratio)) for _ in range(n)], dtype=np.float64)
    ours = np.array([(y1, x1, y2 - y1, x2 - x1) for x1, y1, x2, y2 in (d["crop"] for d in draws)], dtype=np.float64)
    for column in range(4):
        spread = theirs[:, column].std() * (2 / n) ** 0.5
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 4 * spread
        assert ours[:, column].std() == pytest.approx(theirs[:, column].std(), rel=0.06)
    functional = torchvision.transforms.functional
    for draw in draws[:20]:  # the released order of operations, with these draws
        draw = draw | {"crop": data.draw_crop(rng, (30, 40), cfg.crop_area)}
        x1, y1, x2, y2 = draw["crop"]
        view = functional.resized_crop(source[0], y1, x1, y2 - y1, x2 - x1, [32, 32],
                                       functional.InterpolationMode.BILINEAR)
        colours = draw["colours"]
        for name in colours["order"]:
            view = getattr(functional, f"adjust_{name}")(view, colours[name])
        view = functional.rgb_to_grayscale(view, 3) if colours["gray"] else view
        view = view.filter(data.ImageFilter.GaussianBlur(colours["blur"])) if colours["blur"] is not None else view
        view = functional.hflip(view) if draw["flip"] else view
        close(dupr.apply_view(source[0], draw, 32),
              functional.normalize(functional.to_tensor(view), normalise[:3], normalise[3:]), 1e-5)
    if "[q,k]" in case["views"]:                                        # drawn twice, independently
        sample = dataset[0, 0]
        assert len(sample["views"]) == 2 and not torch.equal(*sample["views"])


@kind("dupr/geometry")
def overlap_geometry(case, arrays, _):
    size = case["config"]["view_size"]
    ious = []
    for crops, flips, boxes, valid in zip(*(arrays[name].tolist() for name in ("crops", "flips", "boxes", "valid"))):
        crops = [(left, top, left + width, top + height) for top, left, height, width in crops]
        ours, overlap = dupr.overlap_boxes(crops, flips, size, case["config"].get("min_overlap", 0.0))
        assert overlap == valid
        within(case, ours, boxes)
        areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in crops]
        w, h = ((ours[0, 2:] - ours[0, :2]).double() / size).tolist()     # shares of view 1
        both = w * h * areas[0] if overlap else 0.0
        ious.append(both / (sum(areas) - both))
    close(ious, arrays["iou"], 1e-5)


@kind("dupr/patch_loss")
def patch_loss(case, arrays, _):
    """Eqs. (3)-(5) with the identity as backbone and as patch head."""
    c, seed = case["config"], case["seed"]
    side, level = -(-c["view_size"] // c["stride"]), "conv5"
    weights = ({level: 0.0}, {level: 1.0}, {level: c["S"]})
    encoder = dupr.Encoder(torch.nn.Sequential(OrderedDict(layer4=torch.nn.Identity())),
                           {"layer4": (level, c["C"], c["stride"])}, *weights, c["C"])
    encoder.patch_heads[level] = torch.nn.Identity()
    model = dupr.DUPR(encoder, c["K"], c["C"])
    model.queues[f"patch_{level}"].keys.copy_(unit_queue((c["C"], c["K"]), seed, "input:patch_queue"))
    maps = torch.stack([tensor(name, (c["N"], c["C"], side, side), seed) for name in ("f1", "f2")], 1)
    queries, keys = model(maps, arrays.tensor("boxes"), arrays.tensor("flips"))
    within(case, queries[f"patch_{level}"], arrays["r1"], "r1")
    within(case, keys[f"patch_{level}"], arrays["r2"], "r2")
    rows = [e[f"patch_{level}"].permute(0, 2, 3, 1).flatten(0, 2) for e in (queries, keys)]
    within(case, dupr.info_nce(*rows, model.queues[f"patch_{level}"].keys, c["tau"]), arrays["per_patch"], "per_patch")
    valid = arrays.tensor("valid")
    for reduction in ("sum", "mean"):
        cfg = dupr.Config(alpha=(0, 0, 0, 0), beta=(0, 0, 0, 1), temperature=c["tau"], patch_reduction=reduction)
        total, terms = dupr.dupr_loss(cfg, queries, keys, model.queues, valid,
                                      common.normalizer(int(valid.sum()), torch.device("cpu")))
        assert total == terms[f"patch_{level}"]
        within(case, total, arrays[f"loss_{reduction}"], reduction)


@kind("dupr/analysis")
def dupr_analysis(case, arrays, _):
    """Eq. (8), Eq. (9) and the matching of two views, on features [C, P]."""
    c, (own, noise) = case["config"], map(float,
                                          re.search(r"b=([\d.]+)\*a_raw\+([\d.]+)\*fill", case["inputs"]).groups())
    raw, other = (tensor(name, (c["C"], c["P"]), case["seed"]) for name in "ab")
    a, b = (torch.nn.functional.normalize(x, dim=0) for x in (raw, own * raw + noise * other))
    within(case, figures.cosines(a, b), arrays["sim"], "sim")
    within(case, figures.affinity(a, b, c["tau"]), arrays["affinity"], "affinity")
    within(case, figures.iou_similarity(a, b), arrays["iou_similarity"], "iou_similarity")
    assert (np.array_equal(figures.match(a, b), arrays["match_1_to_2"])
            and np.array_equal(figures.match(b, a), arrays["match_2_to_1"]))


def moco_statedict(case, seen):
    """A released MoCo file: our model has its names, and its query encoder is a backbone."""
    case = {**case, "keys": [(name.removeprefix("module."), shape) for name, shape in case["entries"]],
            "seed": case.get("seed", 0)}
    shapes = dict(case["keys"])
    blocks = tuple(len({name.split(".")[2] for name in shapes if name.startswith(f"encoder_q.layer{i}.")})
                   for i in (1, 2, 3, 4))
    arch = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34", (3, 4, 23, 3): "resnet101"}[blocks]
    if "encoder_q.layer1.0.conv3.weight" in shapes:
        arch = {"resnet34": "resnet50"}.get(arch, arch)
    (dim, K), mlp = shapes["queue"], "encoder_q.fc.0.weight" in shapes
    case["config"] = {"arch": arch, "dim": dim, "K": K, "T": 0.2, "mlp": mlp}
    model = moco_model(case, seen.tmp)
    own, found = model.state_dict(), convert.open_checkpoint(seen.tmp / "checkpoint_0199.pth.tar")
    assert own.keys() == found.state.keys() and len(own) == len(shapes) and not found.left
    assert found.what.startswith("MoCo v2, ResNet-" if mlp else "MoCo v1, ResNet-")
    again = convert.official(found)
    assert again["arch"] == arch and again["state_dict"].keys() == {f"module.{name}" for name in shapes}
    for name in shapes:
        if name not in ("queue", "queue_ptr"):
            assert torch.equal(again["state_dict"][f"module.{name}"],
                               torch.from_numpy(fill(name, tuple(shapes[name]), case["seed"]))), name
            assert torch.equal(own[convert.rename(name, convert.MOCO["v2" if mlp else "v1"])],
                               again["state_dict"][f"module.{name}"]), name
    assert model.queues["image_conv5"].ptr.dtype == torch.int64
    backbone = common.Backbone(arch, (1, 2, 3, 4), "bn", trainable=5)
    convert.load_backbone_weights(backbone.body, str(seen.tmp / "checkpoint_0199.pth.tar"), arch)
    for name, value in backbone.body.state_dict().items():
        assert torch.equal(value, own[f"encoder_q.{name}"]), name


# ==== detectors2: few-shot detection (TFA) ========================================================================

@kind("detectors2/tfa_classes")
def tfa_classes(case, arrays, seen):
    for split, lists in case["voc"].items():
        assert few_shot.class_lists("voc", int(split)) == lists
    lists = few_shot.class_lists("coco")
    names = {name: i for i, name in convert.COCO_NAMES.items()}
    for part in ("base", "novel"):
        assert lists[part] == case["coco"][f"{part}_names"]
        assert [names[n] for n in lists[part]] == case["coco"][f"{part}_ids"]
    assert [names[n] for n in lists["all"]] == sorted(names.values()) and len(lists["all"]) == 80


@kind("detectors2/tfa_shots_coco")
def tfa_shots_coco(case, arrays, seen):
    assert set(case["selected"]) == set(map(str, case["config"]["seeds"]))
    for seed in case["config"]["seeds"]:
        rng = random.Random(seed)
        for category in case["config"]["classes"]:
            of_image = {}
            for key, image, label, crowd in case["annotations"]:
                if label == category and not crowd:
                    of_image.setdefault(image, []).append(key)
            drawn = few_shot.sample_coco({i: len(keys) for i, keys in of_image.items()}, case["config"]["shots"], rng)
            assert {str(k): {"annotations": [key for i in images for key in of_image[i]], "images": images}
                    for k, images in drawn.items()} == case["selected"][str(seed)][str(category)]


@kind("detectors2/tfa_shots_voc")
def tfa_shots_voc(case, arrays, seen):
    assert set(case["selected"]) == set(map(str, case["config"]["seeds"]))
    for seed in case["config"]["seeds"]:
        rng = random.Random(seed)
        for name in case["config"]["classes"]:
            counts = {image: names.count(name) for _, image, names in case["files"] if name in names}
            drawn = few_shot.sample_voc(counts, case["config"]["shots"], rng)
            assert {str(k): images for k, images in drawn.items()} == case["selected"][str(seed)][name]


@kind("detectors2/tfa_eval")
def tfa_eval(case, arrays, seen):
    """The numbers of finetune.py are 0..1, nan where the released ones are -100."""
    categories = [{"id": i, "name": convert.COCO_NAMES[i]} for i in case["categories"]]
    cfg = finetune.Config(data="coco", protocol="few_shot")
    groups = few_shot.groups(cfg, SimpleNamespace(categories=categories))
    truth = {"images": case["images"], "annotations": case["annotations"], "categories": categories}
    metrics = evaluation.detection_metrics(truth, case["detections"], groups=groups)
    for name, value in case["results"].items():
        mine = -100.0 if np.isnan(metrics[name]) else 100 * metrics[name]
        assert abs(mine - value) <= float(case["tolerance"]), name
    assert {"AP", "bAP", "nAP", "nAP75"} <= case["results"].keys()


# ==== detectors2: LVIS ============================================================================================

@kind("detectors2/lvis_eval")
def lvis_eval(case, arrays, _):
    """Fractions, nan where the released ones are -1."""
    truth, config = case["annotations"], case["config"]
    sizes = {i["id"]: (i["height"], i["width"]) for i in truth["images"]}
    detections = [{"image_id": image, "category_id": category, "score": score, "bbox": [0, 0, 0, 0]}
                  for image, category, score in zip(*(arrays[f"dt_{name}"].tolist()
                                                      for name in ("image_id", "category_id", "score")))]
    for i, d in enumerate(detections):
        if "dt_bbox_xywh" in arrays:
            d["bbox"] = arrays["dt_bbox_xywh"][i].tolist()
        if "dt_polygon" in arrays:
            d["segmentation"] = annotations.segment_rle([arrays["dt_polygon"][i].tolist()], sizes[d["image_id"]])
    kept = lvis_v1.listed_detections(truth, detections, config["max_dets"])
    assert (len(detections), len(kept)) == (case["detections_total"], case["detections_evaluated"])
    metrics = lvis_v1.federated_metrics(truth, detections, **config, per_class=True)
    tolerance = float(case["tolerance"].split()[0])
    per_class = sorted(zip((c["id"] for c in truth["categories"]), metrics.pop("per_class").values()))
    close(np.nan_to_num([ap for _, ap in per_class], nan=-1), case["per_category_ap"], tolerance)
    expected = {name.replace("@", "") if name.startswith("AR@") else name.split("@")[0]: value
                for name, value in case["results"].items()}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        close(np.nan_to_num(metrics[name], nan=-1), value, tolerance, what=name)


@kind("detectors2/repeat_factors")
def repeat_factors(case, arrays, _):
    ours = lvis_v1.repeat_factors(case["categories_per_image"], case["config"]["threshold"])
    close(ours, arrays["repeat_factors"], 0, rtol=float(case["tolerance"].split()[0]))


# ==== The runners themselves =======================================================================================

@pytest.mark.parametrize("file", ("deformable_detr_full", "detreg_full", "detreg_full_refine"))
def test_a_full_model_is_as_large_as_its_case_says(file):
    """Of the size of its config, not of the manifest, whose names it keeps."""
    path = FOLDER / "detreg" / f"{file}.json"
    if not path.exists():                                               # another $PARITY_DIR
        path = Path(__file__).parent / "parity" / "detreg" / path.name
    case = json.loads(path.read_text())
    listed = manifest(case["manifest"], path)["entries"]
    refine = case["config"]["with_box_refine"]
    case["config"] |= {"enc_layers": 1, "dec_layers": 2, "dim_feedforward": 24, "hidden_dim": 64, "num_queries": 7,
                       "num_feature_levels": 2, "nheads": 4, "num_classes": 5}
    entries = deformable_entries(case, listed)
    shapes = {name: shape for name, shape, _ in entries}
    for side, layers in (("encoder", 1), ("decoder", 2)):
        assert {n.split(".")[3] for n in shapes if n.startswith(f"transformer.{side}.layers.")} == {
            str(i) for i in range(layers)}
    assert {n.split(".")[1] for n in shapes if n.startswith("class_embed.")} == {"0", "1"}
    assert shapes["class_embed.1.weight"] == [5, 64] and shapes["query_embed.weight"] == [7, 128]
    assert shapes["transformer.encoder.layers.0.linear1.weight"] == [24, 64]
    assert shapes["transformer.decoder.layers.1.cross_attn.sampling_offsets.weight"] == [4 * 2 * 4 * 2, 64]
    canonical = {name: alias for name, _, alias in entries}
    assert canonical["bbox_embed.1.layers.0.bias"] == f"bbox_embed.{int(refine)}.layers.0.bias"
    if refine:
        assert canonical["transformer.decoder.bbox_embed.1.layers.0.bias"] == "bbox_embed.1.layers.0.bias"
    with pytest.raises(AssertionError):                                 # names of another model
        deformable_entries(case, [e for e in listed if "level_embed" not in e[0]])


def test_command_lines_of_cases():
    case = {"command_line": ["--num_queries", "20", "--with_box_refine", "--lr_backbone", "2e-5", "--dataset_file",
                             "voc", "--dropout", "0"]}
    values = command_line_of(case)
    assert values == {"num_queries": 20, "with_box_refine": True, "lr_backbone": 2e-5, "dataset_file": "voc",
                      "dropout": 0}
    assert fields_of(values) == {"num_queries": 20, "with_box_refine": True, "lr_backbone": 2e-5}
    with pytest.raises(KeyError, match="mixed"):
        fields_of({"mixed": 1})


@pytest.mark.parametrize("width", (None, 6))
def test_a_criterion_case_without_any_box(width):
    """Its numbers follow from the focal loss of nothing, in numpy: the sums are divided by 1, not by 0 boxes."""
    B, Q, C, seed = 2, 5, 4, 3
    weights = {f"loss_{name}{layer}": w for name, w in (("ce", 2.0), ("bbox", 5.0), ("giou", 2.0))
               for layer in ("", "_0")}
    case = {"kind": "detreg/criterion", "seed": seed, "num_boxes": 0, "config": {
        "num_classes": C, "B": B, "queries": Q, "aux_layers": 1, "targets_per_image": [0, 0],
        "costs": {"cls": 2, "bbox": 5, "giou": 2}, "focal": {"alpha": 0.25, "gamma": 2}, "embed_dim": width,
        "weights": weights | ({"loss_object_embedding": 1.0} if width else {})}}
    arrays = {f"target_boxes{b}": np.zeros((0, 4), np.float32) for b in range(B)}
    arrays |= {f"target_labels{b}": np.zeros(0, np.int64) for b in range(B)}
    losses = {"class_error": 100.0} | ({"loss_object_embedding": 0.0} if width else {})
    for layer, suffix in enumerate(("_0", "")):
        x = 1.5 * fill(f"input:logits{layer}", (B, Q, C), seed).astype(np.float64) - 2.0
        p, softplus = 1 / (1 + np.exp(-x)), np.log1p(np.exp(x))
        gradient = 2.0 * 0.75 * (2 * p * p * (1 - p) * softplus + p ** 3)
        found = (x.argmax(-1) != C - 1).sum(1)                          # cardinality as released, for softmax
        losses |= {f"loss_ce{suffix}": (0.75 * p ** 2 * softplus).sum(), f"loss_bbox{suffix}": 0.0,
                   f"loss_giou{suffix}": 0.0, f"cardinality_error{suffix}": found.mean()}
        arrays |= {f"boxes{layer}": np.full((B, Q, 4), 0.3, np.float32), f"grad_boxes{layer}": np.zeros((B, Q, 4)),
                   f"grad_logits{layer}_index": np.arange(B * Q * C), f"grad_logits{layer}_values": gradient.flatten()}
        arrays |= {f"{name}_layer{layer}_image{b}": np.zeros(0, np.int64) for name in ("src", "tgt") for b in range(B)}
    if width:
        arrays |= {"grad_features_index": np.arange(B * Q * width), "grad_features_values": np.zeros(B * Q * width)}
    case |= {"losses": losses, "weighted_total": 2.0 * (losses["loss_ce"] + losses["loss_ce_0"])}
    criterion(case, Reader(arrays, set()), None)
    with pytest.raises(AssertionError):
        criterion(case | {"num_boxes": 2}, Reader(arrays, set()), None)


# ==== DAB- and DN-DAB-Deformable DETR: detectors2/dab_full_model, dn_full_model, dn_queries, dn_criterion, =========
# dn_full_train, dab_train_steps, dn_train_steps

DAB_SHAPE = ("hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "num_feature_levels", "num_queries")


def dab_config(case, **values):
    c = case["config"]
    detector = "dn_deformable_detr" if case["kind"].startswith("detectors2/dn_") else "dab_deformable_detr"
    values = {name: c[name] for name in DAB_SHAPE} | {"num_patterns": c.get("num_patterns", 0)} | values
    return finetune.Config(detector=detector, dropout=c["dropout"], lr_backbone=c["lr_backbone"], **values)


def dab_model(case, seen, **values):
    """(configuration, model of the case's shape, filled through a released file of it)."""
    c, cfg = case["config"], dab_config(case, **values)
    model = detectors.build_detector(cfg, c["num_classes"], focal=True, num_patterns=cfg.num_patterns)
    for layers, name, points in ((model.transformer.encoder.layers, "self_attn", c.get("enc_n_points", 4)),
                                 (model.transformer.decoder.layers, "cross_attn", c.get("dec_n_points", 4))):
        for layer in layers if points != 4 else ():                     # no flag of ours
            setattr(layer, name, common.MSDeformAttn(cfg.hidden_dim, cfg.num_feature_levels, cfg.nheads, points))
    state = released_state(entries_of(model), case)
    found = convert.open_checkpoint(released_file(seen.tmp, state))
    arch = convert.architecture(found.state, found.path)
    assert found.family == "detector" and arch["detector"] == cfg.detector
    shape = {name: getattr(cfg, name) for name in (*DAB_SHAPE, *(["num_patterns"] if "num_patterns" in arch else ()))}
    assert shape == {name: arch.get(name, cfg.nheads) for name in shape}
    convert.load_matching(model, found.state, drop={}, source=found.path)
    return cfg, model


def case_images(case):
    return to_batch([tensor(f"img{i}", (3, *hw), 0) for i, hw in enumerate(case["images_hw"])])


def case_targets(case, arrays):
    return [{"labels": arrays.tensor(f"target_labels{b}"), "boxes": arrays.tensor(f"target_boxes{b}")}
            for b in range(len(case["config"]["targets_per_image"]))]


def case_noise(arrays, step=""):
    return detectors.Noise(*(arrays.tensor(f"{name}{step}") for name in ("label_u", "new_label", "box_u")))


def dab_criterion(case):
    c, weights = case["config"], weights_of(case["weights"])
    costs = c.get("costs") or {name: c[f"cost_{theirs}"] for name, theirs in (("cls", "class"), ("bbox", "bbox"),
                                                                             ("giou", "giou"))}
    names = [f"loss_{name}" for name in ("ce", "bbox", "giou")]
    assert all(weights.get(f"tgt_{name}", weights[name]) == weights[name] for name in names)
    matcher = common.HungarianMatcher(costs["cls"], costs["bbox"], costs["giou"])
    return detectors.DenoisingCriterion(matcher, *(weights[name] for name in names))


@kind("detectors2/dab_full_model")
@kind("detectors2/dn_full_model")
def dab_full_model(case, arrays, seen):
    cfg, model = dab_model(case, seen)
    caught = {}
    model.transformer.decoder.ref_point_head.register_forward_pre_hook(
        lambda _, inputs: caught.update({"sine": inputs[0]} | caught))  # of the first layer
    model.transformer.register_forward_hook(lambda _, args, output: caught.update(transformer=output))
    with torch.no_grad():
        outputs = model.eval()(**case_images(case))
    _, _, references, memory = caught["transformer"]
    for name, layer in (("pred", outputs), *((f"aux{i}", aux) for i, aux in enumerate(outputs["aux_outputs"]))):
        close(layer["pred_logits"], arrays[f"{name}_logits"], 2e-4, what=name)
        close(layer["pred_boxes"], arrays[f"{name}_boxes"], 1e-5, what=name)
    close(references, arrays["inter_references"], 1e-5)
    close_samples(memory, arrays, "memory", 1e-4)
    close(caught["sine"][:, ::max(cfg.num_queries // 4, 1)], arrays["query_sine_layer0_query_sample"], 2e-5)


@kind("detectors2/dn_queries")
def dn_queries(case, arrays, _):
    c, seed = case["config"], case["seed"]
    q, classes, width = c["num_queries"], c["num_classes"], c["hidden_dim"] - 1
    shapes = {"tgt_embed": (q, width), "refpoint_embed": (q, 4), "label_enc": (classes + 1, width)}
    model = SimpleNamespace(patterns_embed=None, **{
        name: torch.nn.Embedding.from_pretrained(torch.from_numpy(fill(f"{name}.weight", shape, seed)))
        for name, shape in shapes.items()})
    targets, noise = case_targets(case, arrays), case_noise(arrays)
    drawn = detectors.draw_noise(c["scalar"], sum(c["targets_per_image"]), classes)
    assert [(d.shape, d.dtype) for d in drawn] == [(n.shape, n.dtype) for n in noise]
    noised = detectors.add_noise(targets, noise, c["scalar"], c["label_noise_scale"], c["box_noise_scale"])
    own = detectors.DABDeformableDETR.queries(model).expand(len(targets), -1, -1)
    given = detectors.DABDeformableDETR.denoising_queries(model, noised, len(targets))
    assert given.shape[1] == noised.groups * noised.slots == case["pad_size"]
    queries = torch.cat([given, own], 1)
    for name, found in (("", queries), ("eval_", own)):
        close(found[..., :-4], arrays[f"{name}query_label"], 1e-6)
        close(found[..., -4:], arrays[f"{name}query_box_logits"], 1e-6)
    close(detectors.denoising_mask(noised.groups, noised.slots, q, torch.device("cpu")), arrays["attn_mask"], 0)
    for name, found in (("known_labels", noised.true_labels), ("known_boxes", noised.true_boxes),
                        ("image", noised.image), ("slot", noised.slot)):
        close(found, arrays[name], 0, what=name)


@kind("detectors2/dn_criterion")
def dn_criterion(case, arrays, _):
    c, seed = case["config"], case["seed"]
    assert c.get("focal", FOCAL) == FOCAL
    targets, pad, batch = case_targets(case, arrays), c["pad_size"], len(c["targets_per_image"])
    n = c["scalar"] * sum(c["targets_per_image"])
    quiet = detectors.Noise(torch.ones(n), torch.zeros(n, dtype=torch.int64), torch.zeros(n, 4))
    noised = detectors.add_noise(targets, quiet, c["scalar"], 0.0, 0.0)
    assert noised.groups * noised.slots == pad and n == case["num_denoised"]
    logits = [(1.5 * tensor(f"logits{i}", (batch, pad + c["queries"], c["num_classes"]), seed) - 2.0).requires_grad_()
              for i in range(c["layers"])]
    boxes = [arrays.tensor(f"boxes{i}").requires_grad_() for i in range(c["layers"])]
    layers = [{"dn_logits": l[:, :pad], "pred_logits": l[:, pad:], "dn_boxes": b[:, :pad], "pred_boxes": b[:, pad:]}
              for l, b in zip(logits, boxes)]
    criterion = dab_criterion(case)
    for i, pairs in enumerate(criterion.matcher(layers, targets)):
        for b, (source, target) in enumerate(pairs):
            close(source, arrays[f"src_layer{i}_image{b}"], 0)
            close(target, arrays[f"tgt_layer{i}_image{b}"], 0)
    num_boxes = common.normalizer(sum(c["targets_per_image"]), torch.device("cpu"))
    assert num_boxes == max(case["num_boxes"], 1)
    losses, _ = criterion({**layers[-1], "aux_outputs": layers[:-1], "noised": noised}, targets, num_boxes)
    total = criterion.total(losses)
    assert set(losses) == set(case["losses"])
    for name, expected in case["losses"].items():
        close(losses[name], expected, 1e-5, 1e-5, name)
    close(total, case["weighted_total"], 1e-5, 1e-5)
    total.backward()
    for i in range(c["layers"]):
        index = arrays.tensor(f"grad_logits{i}_index")
        close(logits[i].grad.flatten()[index], arrays[f"grad_logits{i}_values"], 3e-5, 1e-4)
        close(boxes[i].grad, arrays[f"grad_boxes{i}"], 3e-5, 1e-4)


@kind("detectors2/dn_full_train")
def dn_full_train(case, arrays, seen):
    c = case["config"]
    _, model = dab_model(case, seen)
    targets, criterion = case_targets(case, arrays), dab_criterion(case)
    noised = detectors.add_noise(targets, case_noise(arrays), c["scalar"], c["label_noise_scale"], c["box_noise_scale"])
    outputs = model.train()(**case_images(case), noised=noised)
    aux = outputs["aux_outputs"]
    close(outputs["pred_logits"], arrays["pred_logits"], 2e-4)
    for name, layer in (("pred", outputs), *((f"aux{i}", layer) for i, layer in enumerate(aux))):
        close(layer["pred_boxes"], arrays[f"{name}_boxes"], 1e-5, what=name)
    close(torch.stack([layer["dn_boxes"] for layer in (*aux, outputs)]), arrays["dn_boxes"], 1e-5)
    close(outputs["dn_logits"], arrays["dn_logits_last"], 2e-4)
    num_boxes = common.normalizer(sum(c["targets_per_image"]), torch.device("cpu"))
    losses, _ = criterion(outputs, targets, num_boxes)
    total = criterion.total(losses)
    assert set(losses) == set(case["losses"])
    for name, expected in case["losses"].items():
        close(losses[name], expected, 2e-5, 1e-5, name)
    close(total, case["weighted_total"], 0, 1e-5)
    total.backward()
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    assert set(norms) == set(case["gradient_norm"])
    for name, expected in case["gradient_norm"].items():
        close(norms[name], expected, 1e-3, 2e-3, name)


@kind("detectors2/dab_train_steps")
@kind("detectors2/dn_train_steps")
def dab_train_steps(case, arrays, seen):
    """The project's own training step; the draws of each step are the case's."""
    c = case["config"]
    recipe = finetune.detr_recipe({"detector": dab_config(case).detector, "data": "coco", "labels_percent": 100,
                                   "protocol": "released", "eval_only": False, "class_agnostic": False})
    values = {"lr": c["lr"], "weight_decay": c["weight_decay"], "clip_max_norm": c["clip"],
              "lr_linear_proj_mult": recipe["lr_linear_proj_mult"]}
    if "scalar" in c:
        values |= {"dn_groups": c["scalar"], "dn_label_noise": c["label_noise_scale"],
                   "dn_box_noise": c["box_noise_scale"]}
    cfg, model = dab_model(case, seen, **values)
    model.train()
    batch = {**case_images(case), "targets": case_targets(case, arrays)}
    criterion, optimizer = dab_criterion(case), common.build_optimizer(cfg, model)
    rest, backbone, linear_proj = optimizer.param_groups
    assert rest["lr"] == linear_proj["lr"]
    assert [len(rest["params"]) + len(linear_proj["params"]), len(backbone["params"])] == case["group_sizes"]
    assert len(case["losses_per_step"]) == c["steps"]
    for step, expected in enumerate(case["losses_per_step"]):
        with pytest.MonkeyPatch.context() as patch:
            if "scalar" in c:
                patch.setattr(detectors, "draw_noise", lambda *_: case_noise(arrays, f"_step{step}"))
            losses = finetune.train_step(cfg, model, criterion, optimizer, [batch], torch.device("cpu"))
        for name, value in expected.items():
            close(losses["loss" if name == "total" else name], value, 0, 1e-4 if step == 0 else 2e-3,
                  f"step {step} {name}")
        close(losses["grad_norm"], case["grad_norm_before_clip"][step], 0, 1e-3 if step == 0 else 2e-3)
