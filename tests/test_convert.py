"""convert.py: files recognised, refused and written for other tools, whose own models must give our numbers."""
import argparse
import collections
import dataclasses
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
import convert
import data
import detectors
import detreg
import dupr
import finetune
import rcnn
import run
import siamese_detr
import soco
import updetr
from common import UserError
from conftest import ROOT, small_config

CATEGORIES = [{"id": 3, "name": "cell"}, {"id": 7, "name": "platelet"}, {"id": 9, "name": "cat"}]


@pytest.fixture(autouse=True)
def seeded():
    """The same starts whatever ran before: models whose outputs differ enough for same_predictions()."""
    torch.manual_seed(5)


def stirred(model, seed=0):
    """Random weights and statistics under which queries, images and padding make a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.5 * tensor.std() if tensor.dim() > 1 and tensor.std() > 0 else 0.02
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=float(noise))
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
            if "query_embed" in name:
                tensor.mul_(3)
    return model.eval()


def detr_config(**values):
    small = dict(arch="resnet18", hidden_dim=64, nheads=4, enc_layers=2, dec_layers=3, dim_feedforward=96,
                 num_queries=9, dropout=0.1, stride=32)
    return dataclasses.replace(finetune.Config(), **small | values)


def finetuned(path, **values):
    """A fine-tuned detector of the DETR family, saved as finetune.py saves it."""
    cfg = detr_config(**values)
    softmax = cfg.detector == "detr"
    model = stirred(detectors.build_detector(cfg, len(CATEGORIES) + softmax, focal=not softmax))
    run.save_checkpoint(path, model, None, 12, cfg, script="finetune", categories=CATEGORIES)
    return model


PRETRAINING = {"detreg": detreg, "updetr": updetr, "siamese_detr": siamese_detr}


def pretrained(path, method, **values):
    """A pretrained detector, saved as its script saves it."""
    cfg = small_config(PRETRAINING[method].Config, nheads=4, hidden_dim=64, **values)
    if method == "detreg":
        softmax = cfg.detector == "detr"
        model = detreg.DETReg(detectors.build_detector(cfg, 2 + softmax, focal=not softmax))
    else:
        detector = detectors.build_detector(cfg, 3, focal=False)
        model = updetr.UPDETR(detector, 2) if method == "updetr" else siamese_detr.SiameseDETR(detector, 2)
    run.save_checkpoint(path, stirred(model), None, 5, cfg, script=method)
    return model


def rcnn_checkpoint(path, detector, **values):
    """A fine-tuned detector of the R-CNN family, saved as finetune.py saves it."""
    small = dict(arch="resnet18", backbone_norm="bn", fpn_channels=64, head_dim=32, box_head="2fc", anchor_size=16)
    cfg = dataclasses.replace(finetune.Config(), detector=detector, **small | values)
    model = stirred(rcnn.build_rcnn(cfg, len(CATEGORIES)))
    run.save_checkpoint(path, model, None, 8, cfg, script="finetune", categories=CATEGORIES)
    return model


# ==== Hugging Face transformers ====================================================================================

VARIANTS = (
    dict(detector="deformable_detr"), dict(detector="deformable_detr", with_box_refine=True),
    dict(detector="deformable_detr", num_feature_levels=2), dict(detector="deformable_detr_ss", arch="resnet50"),
    dict(detector="detr"), dict(detector="detr", pre_norm=True, backbone_norm="bn"), dict(detector="detr", stride=8),
    dict(detector="conditional_detr"), dict(detector="conditional_detr", stride=16, arch="resnet34"),
)


def hugging_face(folder):
    """The model that the folder's own config.json names, loaded with nothing missing and nothing left over."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    name, = json.loads((folder / "config.json").read_text())["architectures"]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def padded_batch(seed=1):
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 60:] = mask[1, :, 90:] = True  # cells of stride 32 too
    return images.masked_fill(mask[:, None], 0.0), mask


def same_predictions(ours, theirs):
    """-> their outputs. Ours to 1e-4 on a padded batch, on which neither queries nor images answer alike."""
    images, mask = padded_batch()
    with torch.no_grad():
        mine = ours(images, mask)
        other = theirs(pixel_values=images, pixel_mask=(~mask).long())
    assert mine["pred_logits"].std(1).min() > 1e-3
    assert (mine["pred_boxes"][0] - mine["pred_boxes"][1]).abs().max() > 1e-3
    torch.testing.assert_close(other.logits, mine["pred_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(other.pred_boxes, mine["pred_boxes"], atol=1e-4, rtol=0)
    with torch.no_grad():
        whole = ours(images, torch.zeros_like(mask))  # padding is seen by both
    assert (whole["pred_boxes"] - mine["pred_boxes"])[1].abs().max() > 1e-3
    return other


@pytest.mark.parametrize("values", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_hugging_face(values, tmp_path, capsys):
    pytest.importorskip("transformers")
    model = finetuned(tmp_path / "last.pt", **values)
    convert.main([str(tmp_path / "last.pt"), "--to", "hf", "--out", str(tmp_path / "hf")])
    theirs = hugging_face(tmp_path / "hf")
    assert theirs.config.id2label == {0: "cell", 1: "platelet", 2: "cat"}
    assert theirs.config.label2id == {"cell": 0, "platelet": 1, "cat": 2}
    back = convert.open_checkpoint(tmp_path / "hf").state  # BatchNorm is frozen there
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert back.keys() == own.keys() and all(torch.equal(v, back[k]) for k, v in own.items())
    same_predictions(model, theirs)
    name = {"deformable": "DeformableDetr", "detr": "Detr",
            "conditional": "ConditionalDetr"}[values["detector"].split("_")[0]]
    assert type(theirs).__name__ == ("TableTransformer" if values.get("pre_norm") else name) + "ForObjectDetection"
    assert f"{type(theirs).__name__}.from_pretrained('{tmp_path / 'hf'}')" in capsys.readouterr().out
    if type(theirs).__name__.startswith("Deformable"):
        check_tied_heads(theirs, values.get("with_box_refine"), tmp_path)


def check_tied_heads(theirs, refined, folder):
    """Without refinement all layers have one class head and one box head; with it each has its own, and the decoder's
    boxes are the heads' boxes: by the line that the export prints, and then in what transformers saves."""
    transformers = pytest.importorskip("transformers")
    first, second = (theirs.class_embed[i].weight for i in (0, 1))
    boxes = [theirs.bbox_embed[i].layers[0].weight for i in (0, 1)]
    if not refined:
        assert first is second and boxes[0] is boxes[1]
        return
    assert not torch.equal(first, second) and not torch.equal(*boxes)
    assert all(torch.equal(a, b) for a, b in zip(theirs.model.decoder.bbox_embed.parameters(),
                                                 theirs.bbox_embed.parameters()))
    theirs.model.decoder.bbox_embed = theirs.bbox_embed
    theirs.config.tie_word_embeddings = True
    theirs.save_pretrained(folder / "saved")
    again = transformers.DeformableDetrForObjectDetection.from_pretrained(folder / "saved")
    assert again.model.decoder.bbox_embed[1].layers[0].weight is again.bbox_embed[1].layers[0].weight
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("values", (VARIANTS[0], VARIANTS[1], VARIANTS[4], VARIANTS[5], VARIANTS[7]),
                         ids=lambda v: "-".join(map(str, v.values())))
def test_hugging_face_with_other_labels(values, tmp_path):
    """from_pretrained with another number of labels makes the class head anew and keeps all else, without a word about
    tied weights."""
    transformers = pytest.importorskip("transformers")
    finetuned(tmp_path / "last.pt", **values)
    convert.main([str(tmp_path / "last.pt"), "--to", "hf", "--out", str(tmp_path / "hf")])
    heard = []
    logger = transformers.utils.logging.get_logger("transformers.modeling_utils")
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    try:
        before = hugging_face(tmp_path / "hf")
        model, report = type(before).from_pretrained(tmp_path / "hf", num_labels=7, ignore_mismatched_sizes=True,
                                                     output_loading_info=True)
    finally:
        logger.removeHandler(handler)
    assert not any("tie" in line for line in heard) and not report["missing_keys"]
    new, old = model.state_dict(), before.state_dict()
    heads = {k for k in new if k.startswith("class_")}
    assert {new[k].shape[0] for k in heads} == {8 if values["detector"] == "detr" else 7}
    assert all(torch.equal(new[k], old[k]) for k in new.keys() - heads)
    with torch.no_grad():
        logits = model.eval()(pixel_values=padded_batch()[0]).logits
    assert logits.shape[2] == (8 if values["detector"] == "detr" else 7) and logits.isfinite().all()
    if values["detector"] == "deformable_detr":  # heads made anew are one, or each its own
        assert (model.class_embed[0].weight is model.class_embed[1].weight) == (not values.get("with_box_refine"))


def test_hugging_face_sees_what_we_see(tmp_path):
    """The image processor of the folder prepares a picture as our evaluation does, and post-processing gives our
    detections."""
    transformers = pytest.importorskip("transformers")
    model = finetuned(tmp_path / "last.pt", detector="deformable_detr", eval_size=96, max_size=140)
    convert.main([str(tmp_path / "last.pt"), "--to", "hf", "--out", str(tmp_path / "hf")])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    image = data.open_images("synthetic", None, synthetic_images=1, synthetic_size=200).load(0).resize((300, 220))
    h, w = data.resized_hw((220, 300), 96, 140)
    ours = data.to_normalized_tensor(image.resize((w, h), Image.Resampling.BILINEAR))[None]
    theirs = processor(images=image, return_tensors="pt")
    assert theirs["pixel_values"].shape == ours.shape and theirs["pixel_mask"].all()
    assert (theirs["pixel_values"] - ours).abs().max() < 0.06  # of a range of 4.8: rounding of the resize
    network = hugging_face(tmp_path / "hf")
    with torch.no_grad():
        outputs = network(pixel_values=ours)
        mine = common.post_process(model(ours, torch.zeros(1, h, w, dtype=torch.bool)),
                                   torch.tensor([[220, 300]]), top=20)[0]
    found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(220, 300)], top_k=20)[0]
    for key in ("scores", "boxes"):
        torch.testing.assert_close(found[key], mine[key], atol=1e-3, rtol=0)
    assert found["labels"].tolist() == mine["labels"].tolist()


@pytest.mark.parametrize(("method", "values"),
                         (("detreg", dict(detector="deformable_detr")), ("detreg", dict(detector="detr")),
                          ("updetr", dict(detector="detr", pre_norm=True)),
                          ("siamese_detr", dict(detector="conditional_detr")),
                          ("siamese_detr", dict(detector="deformable_detr"))))
def test_hugging_face_of_a_pretraining(method, values, tmp_path, capsys):
    """The detector without the modules of its pretext task; row 1 of its head is an object."""
    pytest.importorskip("transformers")
    pretrained(tmp_path / "last.pt", method, **values)
    convert.main([str(tmp_path / "last.pt"), "--to", "hf", "--out", str(tmp_path / "hf")])
    said = capsys.readouterr().out
    theirs = hugging_face(tmp_path / "hf")
    sigmoid = values["detector"] != "detr"
    rows = 2 if method == "detreg" or not sigmoid else 3
    assert theirs.config.id2label == {row: "object" if row == 1 else f"unused {row}" for row in range(rows)}
    found = convert.open_checkpoint(tmp_path / "last.pt")
    cfg = dataclasses.replace(finetune.Config(nheads=4), **convert.architecture(found.state, "FILE"))
    ours = detectors.build_detector(cfg, rows + (not sigmoid), focal=sigmoid).eval()
    convert.load_matching(ours, found.state, drop=convert.PRETEXT, source="FILE")
    same_predictions(ours, theirs)
    gone = {"detreg": "feature_embed", "updetr": "feature_align, patch2query",
            "siamese_detr": "enc_head, feature_align, patch2query"}[method]
    assert f"no place for them there: {gone} (" in said
    assert ("trained with softmax over 3 rows" in said) == (sigmoid and method != "detreg")


@pytest.mark.parametrize(("rows", "first", "last"),
                         ((91, "unused 0", "toothbrush"), (21, "aeroplane", "unused 20"), (5, "class 0", "class 4")))
def test_class_names_of_released_heads(rows, first, last):
    names = convert.class_names(convert.Checkpoint("FILE", "detector", {}, {}, {}), rows)
    assert list(names) == list(range(rows)) and len(set(names.values())) == rows
    assert (names[0], names[rows - 1]) == (first, last)
    if rows == 91:
        assert sum(not n.startswith("unused") for n in names.values()) == 80
        assert [names[i] for i in (1, 13, 44, 62, 84)] == ["person", "stop sign", "bottle", "chair", "book"]


# ==== torchvision and detectron2 ===================================================================================

def test_torchvision_of_soco_and_of_backbones(tmp_path, capsys):
    """SoCo's pyramid and box head for torchvision's Faster R-CNN; of all others, or when asked, a plain ResNet that
    lacks only its classifier."""
    torch.manual_seed(0)
    backbone = common.Backbone("resnet18", (1, 2, 3, 4), "bn", trainable=5)
    model = stirred(soco.SoCo(backbone, pipeline="fpn", fpn_channels=64, head_dim=32, mlp_dim=16, embedding_dim=8,
                              roi_size=7))
    run.save_checkpoint(tmp_path / "soco.pt", model, None, 5, soco.Config(), script="soco")
    convert.main([str(tmp_path / "soco.pt"), "--to", "torchvision", "--out", str(tmp_path / "parts.pth")])
    assert ("no place for them there: encoder_k, head_k, neck_k, predictor, projector, projector_k ("
            in capsys.readouterr().out)
    parts = torch.load(tmp_path / "parts.pth", weights_only=True)
    config = finetune.Config(detector="faster_rcnn_fpn", arch="resnet18", backbone_norm="bn", fpn_channels=64,
                             head_dim=32, box_head="4conv1fc")
    detector = rcnn.build_rcnn(config, 3)
    report = detector.load_state_dict(parts, strict=False)
    assert not report.unexpected_keys
    assert {".".join(k.split(".")[:2]) for k in report.missing_keys} == {"rpn.head", "roi_heads.box_predictor"}
    own = model.state_dict()
    assert torch.equal(detector.backbone.fpn.layer_blocks[2][0].weight, own["neck.fpn_convs.2.conv.weight"])
    assert torch.equal(detector.roi_heads.box_head[3][1].running_mean, own["head.bn4.running_mean"])
    convert.main([str(tmp_path / "soco.pt"), "--to", "torchvision", "--backbone_only", "--out",
                  str(tmp_path / "r18.pth")])
    finetuned(tmp_path / "detr.pt", detector="detr")
    rcnn_checkpoint(tmp_path / "c4.pt", "faster_rcnn_c4")
    convert.main([str(tmp_path / "detr.pt"), "--to", "torchvision", "--out", str(tmp_path / "r18-detr.pth")])
    convert.main([str(tmp_path / "c4.pt"), "--to", "torchvision", "--backbone_only", "--out",
                  str(tmp_path / "r18-c4.pth")])
    for name in ("r18.pth", "r18-detr.pth", "r18-c4.pth"):
        resnet = torchvision.models.resnet18()
        report = resnet.load_state_dict(torch.load(tmp_path / name, weights_only=True), strict=False)
        assert set(report.missing_keys) == {"fc.weight", "fc.bias"} and not report.unexpected_keys
    assert torch.equal(torch.load(tmp_path / "r18.pth")["layer4.1.bn2.running_var"],
                       own["encoder.layer4.1.bn2.running_var"])
    assert not torch.equal(own["encoder.conv1.weight"], own["encoder_k.conv1.weight"])


# The tables of convert.py, some rows written down once more: (detector, box_head): {detectron2's name: ours}
DETECTRON2 = {
    ("mask_rcnn_fpn", "4conv1fc"): {
        "backbone.bottom_up.stem.conv1.weight": "backbone.body.conv1.weight",
        "backbone.bottom_up.stem.conv1.norm.bias": "backbone.body.bn1.bias",
        "backbone.bottom_up.res4.1.conv2.norm.running_var": "backbone.body.layer3.1.bn2.running_var",
        "backbone.bottom_up.res5.0.shortcut.weight": "backbone.body.layer4.0.downsample.0.weight",
        "backbone.bottom_up.res5.0.shortcut.norm.weight": "backbone.body.layer4.0.downsample.1.weight",
        "backbone.fpn_lateral2.weight": "backbone.fpn.inner_blocks.0.0.weight",
        "backbone.fpn_lateral5.norm.bias": "backbone.fpn.inner_blocks.3.1.bias",
        "backbone.fpn_output4.weight": "backbone.fpn.layer_blocks.2.0.weight",
        "proposal_generator.rpn_head.conv.bias": "rpn.head.conv.0.0.bias",
        "proposal_generator.rpn_head.objectness_logits.weight": "rpn.head.cls_logits.weight",
        "proposal_generator.rpn_head.anchor_deltas.bias": "rpn.head.bbox_pred.bias",
        "roi_heads.box_head.conv4.weight": "roi_heads.box_head.3.0.weight",
        "roi_heads.box_head.conv1.norm.weight": "roi_heads.box_head.0.1.weight",
        "roi_heads.box_head.fc1.weight": "roi_heads.box_head.5.weight",
        "roi_heads.mask_head.mask_fcn2.weight": "roi_heads.mask_head.1.0.weight",
        "roi_heads.mask_head.mask_fcn4.norm.bias": "roi_heads.mask_head.3.1.bias",
        "roi_heads.mask_head.deconv.weight": "roi_heads.mask_predictor.conv5_mask.weight"},
    ("faster_rcnn_fpn", "2fc"): {"roi_heads.box_head.fc1.weight": "roi_heads.box_head.fc6.weight",
                                 "roi_heads.box_head.fc2.bias": "roi_heads.box_head.fc7.bias"},
    ("retinanet_fpn", "2fc"): {
        "backbone.fpn_lateral3.weight": "backbone.fpn.inner_blocks.0.0.weight",
        "backbone.fpn_output5.norm.weight": "backbone.fpn.layer_blocks.2.1.weight",
        "backbone.top_block.p6.weight": "backbone.fpn.extra_blocks.p6.weight",
        "head.cls_subnet.0.weight": "head.classification_head.conv.0.0.weight",
        "head.cls_subnet.6.bias": "head.classification_head.conv.3.0.bias",
        "head.bbox_subnet.4.weight": "head.regression_head.conv.2.0.weight"},
    ("mask_rcnn_c4", "2fc"): {
        "backbone.stem.conv1.weight": "backbone.body.conv1.weight",
        "backbone.res4.0.conv1.norm.bias": "backbone.body.layer3.0.bn1.bias",
        "roi_heads.res5.0.conv1.weight": "roi_heads.box_head.res5.layer4.0.conv1.weight",
        "roi_heads.res5.norm.bias": "roi_heads.box_head.res5.norm.bias",
        "roi_heads.res5.0.shortcut.norm.weight": "roi_heads.box_head.res5.layer4.0.downsample.1.weight",
        "roi_heads.mask_head.deconv.bias": "roi_heads.mask_predictor.conv5_mask.bias"},
}


@pytest.mark.parametrize(("detector", "box_head"), DETECTRON2)
def test_detectron2_and_back(detector, box_head, tmp_path, capsys):
    model = rcnn_checkpoint(tmp_path / "last.pt", detector, box_head=box_head)
    convert.main([str(tmp_path / "last.pt"), "--to", "detectron2", "--out", str(tmp_path / "d2.pkl")])
    file = pickle.loads((tmp_path / "d2.pkl").read_bytes())
    own, there = model.state_dict(), file["model"]
    assert file["matching_heuristics"] is False and file["__author__"] and len(there) == len(own)
    assert all(type(v) is np.ndarray for v in there.values())
    for theirs, ours in DETECTRON2[detector, box_head].items():
        assert np.array_equal(there[theirs], own[ours]) or "objectness" in theirs or "anchor_deltas" in theirs, theirs
    c4 = detector.endswith("_c4")
    if detector != "retinanet_fpn":
        score = "roi_heads.box_predictor.cls_score.weight"  # background, first here, is last there, and has no boxes
        assert np.array_equal(there[score][-1], own[score][0]) and np.array_equal(there[score][0], own[score][1])
        assert np.array_equal(there["roi_heads.box_predictor.bbox_pred.bias"],
                              own["roi_heads.box_predictor.bbox_pred.bias"][4:])
    if c4:  # anchor of size s, ratio r: s * 3 + r there, r * 5 + s here
        here = own["rpn.head.bbox_pred.bias"].view(3, 5, 4)
        deltas = there["proposal_generator.rpn_head.anchor_deltas.bias"].reshape(5, 3, 4)
        assert all(np.array_equal(deltas[s, r], here[r, s]) for s in range(5) for r in range(3))
        assert np.array_equal(there["roi_heads.mask_head.predictor.weight"],
                              own["roi_heads.mask_predictor.mask_fcn_logits.weight"][1:])
    if detector == "retinanet_fpn":
        here = own["head.classification_head.cls_logits.bias"].view(3, 3, 3)
        other = there["head.cls_score.bias"].reshape(3, 3, 3)
        assert np.array_equal(other.transpose(1, 0, 2), here)
        deltas = there["head.bbox_pred.bias"].reshape(3, 3, 4)
        assert np.array_equal(deltas.transpose(1, 0, 2), own["head.regression_head.bbox_reg.bias"].view(3, 3, 4))
    found = convert.open_checkpoint(tmp_path / "d2.pkl")  # and back: every tensor but rows that nothing reads
    assert found.state.keys() == own.keys() and found.what.startswith("detectron2")
    unread = {"roi_heads.box_predictor.bbox_pred": 4, "roi_heads.mask_predictor.mask_fcn_logits": 1}
    for name, value in own.items():
        skip = unread.get(name.rsplit(".", 1)[0], 0)
        assert torch.equal(found.state[name][skip:] if skip else found.state[name],
                           value[skip:] if skip else value), name
        assert not skip or not found.state[name][:skip].any(), name
    found, arch = finetune.read_init(str(tmp_path / "d2.pkl"), detector=detector)
    cfg = dataclasses.replace(finetune.Config(detector=detector, backbone_norm="bn", box_head=box_head, fpn_channels=64,
                                              head_dim=32, init_from=str(tmp_path / "d2.pkl")), **arch)
    # a start for fine-tuning: all but the class layers
    again = finetune.build_model(cfg, found, CATEGORIES)[0].state_dict()
    new = {k for k in own if re.search(convert.CLASS_LAYERS, k)}
    assert all(torch.equal(v, again[k])
               for k, v in own.items() if k not in new and not k.endswith("num_batches_tracked")) and new
    assert re.search("class (and box )?layers, made anew: ", capsys.readouterr().out)


def test_detectron2_of_backbones(tmp_path, capsys):
    """Short names, which detectron2 completes, as MoCo's and SoCo's converters write them; FCOS has other heads
    there."""
    pretrained(tmp_path / "last.pt", "detreg")
    convert.main([str(tmp_path / "last.pt"), "--to", "detectron2", "--out", str(tmp_path / "d2.pkl")])
    file = pickle.loads((tmp_path / "d2.pkl").read_bytes())
    state = convert.open_checkpoint(tmp_path / "last.pt").resnet()
    assert file["matching_heuristics"] is True and len(file["model"]) == len(state)
    assert {k.split(".")[0] for k in file["model"]} == {"stem", "res2", "res3", "res4", "res5"}
    assert np.array_equal(file["model"]["res3.0.shortcut.norm.running_mean"],
                          state["layer2.0.downsample.1.running_mean"])
    again = common.Backbone("resnet18", (2, 3, 4))
    convert.load_backbone(again.body, tmp_path / "d2.pkl")
    assert all(torch.equal(v, state[k]) for k, v in again.body.state_dict().items())
    rcnn_checkpoint(tmp_path / "fcos.pt", "fcos_fpn")
    capsys.readouterr()
    convert.main([str(tmp_path / "fcos.pt"), "--to", "detectron2", "--out", str(tmp_path / "fcos.pkl")])
    assert all(k.startswith("backbone.") for k in pickle.loads((tmp_path / "fcos.pkl").read_bytes())["model"])
    assert "no place for them there: head (" in capsys.readouterr().out


def test_a_foreign_detector_of_other_parts_gives_its_resnet(tmp_path, capsys):
    """torchvision's own Faster R-CNN has no norm in its pyramid: only the ResNet fits, and that is said."""
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    torch.save(stirred(theirs).state_dict(), tmp_path / "tv.pth")
    found, arch = finetune.read_init(str(tmp_path / "tv.pth"), detector="faster_rcnn_fpn")
    cfg = finetune.Config(detector="faster_rcnn_fpn", backbone_norm="bn", fpn_channels=32, head_dim=16,
                          init_from=str(tmp_path / "tv.pth"))
    model = finetune.build_model(dataclasses.replace(cfg, **arch), found, CATEGORIES)[0]
    said = capsys.readouterr().out
    assert torch.equal(model.backbone.body.layer3[2].bn1.running_var, theirs.backbone.body.layer3[2].bn1.running_var)
    assert "other modules, not needed: backbone, roi_heads, rpn (" in said and "feature pyramid, made anew" in said
    assert "(torchvision detector, ResNet-50)" in said


# ==== The released codes ===========================================================================================

@pytest.mark.parametrize(("method", "values"),
                         (("detreg", {}), ("detreg", dict(detector="detr")),
                          ("updetr", dict(detector="detr", pre_norm=True)),
                          ("updetr", dict(detector="deformable_detr")), ("siamese_detr", dict(detector="detr")),
                          ("siamese_detr", dict(detector="conditional_detr")),
                          ("siamese_detr", dict(detector="deformable_detr")),
                          ("siamese_detr", dict(detector="deformable_detr_ss"))))
def test_official_and_back(method, values, tmp_path):
    """Ours -> the released code's file -> ours: the same model, recognised as the same method."""
    model = pretrained(tmp_path / "last.pt", method, **values)
    convert.main([str(tmp_path / "last.pt"), "--to", "official", "--out", str(tmp_path / "official.pth")])
    file = torch.load(tmp_path / "official.pth", weights_only=True)
    assert set(file) == ({"meta", "state_dict"} if method == "siamese_detr" else {"model"})
    found = convert.open_checkpoint(tmp_path / "official.pth")
    own = {k: v for k, v in model.state_dict().items()
           if not (k.startswith("backbone.") and k.endswith("num_batches_tracked"))}
    assert found.state.keys() == own.keys() and all(torch.equal(v, found.state[k]) for k, v in own.items())
    before = convert.open_checkpoint(tmp_path / "last.pt")
    assert found.method == before.method == method and before.what == f"{found.what}, step 5"
    if method == "siamese_detr":
        names = file["state_dict"]
        assert "pred_head.bbox_embed.layers.2.weight" in names and "backbone.layer4.1.conv2.weight" in names
        assert names["pred_head.criterion.empty_weight"].tolist() == [1, 1, pytest.approx(0.1)]
        if "deformable" in values["detector"]:
            assert torch.equal(names["query_embed.weight"], own["query_embed.weight"][:, :64])
            assert torch.equal(names["transformer.tgt_embed.weight"], own["query_embed.weight"][:, 64:])


def test_official_of_what_has_no_released_code(tmp_path):
    pretrained(tmp_path / "refined.pt", "siamese_detr", detector="deformable_detr", with_box_refine=True)
    cfg = dupr.Config(arch="resnet18", backbone_weights="random", embedding_dim=8, queue_size=16)
    run.save_checkpoint(tmp_path / "dupr.pt", dupr.build_model(cfg), None, 5, cfg, script="dupr")
    rcnn_checkpoint(tmp_path / "rcnn.pt", "faster_rcnn_fpn")
    for name, reason in (("refined.pt", "heads of their own"),
                         ("dupr.pt", "DUPR's code was never released.*--to torchvision or detectron2"),
                         ("rcnn.pt",
                          r"this is a Faster R-CNN \(FPN\), ResNet-18, step 8 checkpoint; --to official is for")):
        with pytest.raises(UserError, match=reason):
            convert.main([str(tmp_path / name), "--to", "official", "--out", str(tmp_path / "o.pth")])
    with pytest.raises(UserError, match="--to hf|not one of a DETR"):
        convert.main([str(tmp_path / "rcnn.pt"), "--to", "hf", "--out", str(tmp_path / "o")])
    with pytest.raises(UserError, match="--to mmdetection is for SoCo"):
        convert.main([str(tmp_path / "rcnn.pt"), "--to", "mmdetection", "--out", str(tmp_path / "o")])
    assert not (tmp_path / "o.pth").exists() and not (tmp_path / "o").exists()


def test_every_table_renames_back():
    """A row renames there and back; no two rows of a table meet in one name."""
    families = {"d2": convert.RCNN_DETECTRON2, "hf": convert.HUGGING_FACE, "moco": convert.MOCO,
                "soco": convert.SOCO_RCNN}
    tables = {f"{family} {k}": table for family, found in families.items() for k, table in found.items()}
    tables |= {"siamese": convert.SIAMESE_DETR, "soco d2": convert.SOCO_DETECTRON2,
               "soco mmdet": convert.SOCO_MMDETECTION, "hf resnet": convert.RESNET_HUGGING_FACE}
    for name, table in tables.items():
        for theirs, ours in table:
            filled = [re.sub(r"\{\w\}", "2", side).replace("*", "weight") for side in (theirs, ours)]
            if name == "d2 fpn_2fc" and ours == "roi_heads.box_head.5.*":
                continue  # the other head's
            if theirs in ("*", "encoder_*", "model.*") or theirs.endswith(".{i}.*"):
                continue  # what is called alike
            assert convert.rename(filled[0], table) == filled[1], (name, theirs)
            assert convert.rename(filled[1], table, back=True) == filled[0], (name, theirs)


# ==== What a file is and what it says of itself ====================================================================

def resnet18(prefix="", seed=0):
    torch.manual_seed(seed)
    state = torchvision.models.resnet18(weights=None).state_dict()
    return {prefix + k: v for k, v in state.items() if not k.startswith("fc.")}


def ones(*names):
    return {name: torch.ones(2) for name in names}


NECK = ones("neck.lateral_convs.0.conv.weight", "neck.lateral_convs.0.bn.weight", "neck.fpn_convs.0.conv.weight")
MMDET_4CONV = ones("roi_head.bbox_head.shared_convs.3.bn.weight", "roi_head.bbox_head.shared_fcs.0.weight",
                   "roi_head.bbox_head.fc_cls.weight", "rpn_head.rpn_conv.weight")
# name: (tensors, family): methods that share names with those that we know
OTHER_METHODS = {
    "SimSiam": (resnet18("module.encoder.") | ones("module.encoder.fc.0.weight", "module.predictor.0.weight"),
                "backbone"),
    "SimCLR": (resnet18("encoder.") | ones("projector.0.weight"), "backbone"),
    "PixPro": (resnet18("module.encoder.") | resnet18("module.encoder_k.", 1)
               | ones("module.projector.linear1.weight", "module.projector_k.linear1.weight",
                      "module.value_transform.weight"), "backbone"),
    "BYOL": (resnet18("online_encoder.net.") | resnet18("target_encoder.net.", 1)
             | ones("online_encoder.projector.net.0.weight", "online_predictor.net.0.weight"), "backbone"),
    "BYOL, encoder_q": (resnet18("encoder_q.") | resnet18("encoder_k.", 1)
                        | ones("encoder_q.fc.0.weight", "predictor.0.weight"), "backbone"),
    "MoCo v3": (resnet18("module.base_encoder.") | resnet18("module.momentum_encoder.", 1)
                | ones("module.base_encoder.fc.0.weight", "module.predictor.0.weight"), "backbone"),
    "DenseCL": (resnet18("encoder_q.0.") | resnet18("encoder_k.0.", 1) | resnet18("backbone.")
                | ones("encoder_q.1.mlp.0.weight", "queue", "queue2"), "backbone"),
    "Barlow Twins": (resnet18("module.backbone.") | ones("module.projector.0.weight", "module.bn.running_mean"),
                     "backbone"),
    "Barlow Twins, ResNet": (resnet18(), "torchvision"),
    "DINO": (resnet18("student.backbone.") | resnet18("teacher.backbone.", 1), "backbone"),
    "MMDetection": (resnet18("backbone.") | NECK | MMDET_4CONV
                    | ones("roi_head.bbox_head.shared_fcs.1.weight"), "MMDetection"),
    "MMDetection, 4conv1fc": (resnet18("backbone.") | NECK | MMDET_4CONV, "MMDetection"),
    "SoCo without its target": (resnet18("encoder.") | ones("projector.linear1.weight", "projector_k.linear1.weight",
                                                            "predictor.linear1.weight"), "SoCo"),
    "MoCo v2's query encoder": (resnet18("encoder_q.") | ones("encoder_q.fc.0.weight", "encoder_q.fc.2.weight"),
                                "MoCo v2"),
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_other_methods_are_backbones(name, tmp_path, capsys):
    """A family is told by all that it has and by what it cannot have; in doubt a file is its online ResNet, and the
    fine-tuning protocol stays the common one."""
    state, family = OTHER_METHODS[name]
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "f.pth")
    found = convert.open_checkpoint(tmp_path / "f.pth")
    assert found.family == family and found.method == ("soco" if family == "SoCo" else None)
    backbone = common.Backbone("resnet18")
    convert.load_backbone(backbone.body, tmp_path / "f.pth")
    online = resnet18()
    assert all(torch.equal(v, online[k]) for k, v in backbone.body.state_dict().items())
    init, arch = finetune.read_init(str(tmp_path / "f.pth"), detector="faster_rcnn_fpn")
    values = vars(finetune.Config(detector="faster_rcnn_fpn", data="coco"))
    assert (finetune.recipe_of(values, arch, init.method)["box_head"] == "4conv1fc") == (family == "SoCo")


def test_two_resnets_are_not_guessed(tmp_path):
    torch.save(resnet18("first.") | resnet18("second.", 1), tmp_path / "f.pth")
    with pytest.raises(UserError, match=r"f.pth: holds 2 ResNets, called first\.\*, second\.\*, and nothing says"):
        convert.open_checkpoint(tmp_path / "f.pth")


def foreign(path, options=None, key="args", **values):
    """A detector as another code base saves it, with the options that it says."""
    cfg = detr_config(**values)
    softmax = cfg.detector == "detr"
    model = stirred(detectors.build_detector(cfg, 4 + softmax, focal=not softmax))
    torch.save({"model": model.state_dict(), **({key: options} if options else {})}, path)
    return model


@pytest.mark.parametrize("detector", ("detr", "conditional_detr", "deformable_detr"))
@pytest.mark.parametrize("kind", (argparse.Namespace, dict))
def test_what_a_foreign_detector_says(detector, kind, tmp_path, capsys):
    """Heads and dropout by its args, in our models and in the export; costs and weights of the loss too."""
    options = kind(nheads=2, dropout=0.25, dilation=False, set_cost_class=3.0, bbox_loss_coef=7, eos_coef=0.3)
    model = foreign(tmp_path / "f.pth", options, detector=detector, nheads=2)
    init, arch = finetune.read_init(str(tmp_path / "f.pth"))
    assert arch["nheads"] == 2 and init.assumed is None
    cfg = finetune.adopt_architecture(finetune.Config(init_from="f"), arch, frozenset())
    again = detectors.build_detector(cfg, 4 + (detector == "detr"), focal=detector != "detr").eval()
    again.load_state_dict(init.state)
    images, mask = padded_batch()
    with torch.no_grad():
        assert torch.equal(again(images, mask)["pred_boxes"], model(images, mask)["pred_boxes"])
    pytest.importorskip("safetensors")
    convert.main([str(tmp_path / "f.pth"), "--to", "hf", "--out", str(tmp_path / "hf")])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["encoder_attention_heads"] == config["decoder_attention_heads"] == 2
    assert (config["dropout"], config["class_cost"], config["bbox_loss_coefficient"], config["eos_coefficient"],
            config["bbox_cost"]) == (0.25, 3, 7, 0.3, 5)
    assert "does not say" not in capsys.readouterr().out


NOT_BUILT = (
    ({"dilation": True}, {}, r"a dilated last stage \(DC5\)"), ({"two_stage": True}, {}, "two stages"),
    ({"position_embedding": "learned"}, {}, "learned position embeddings"),
    ({"position_embedding": "v3"}, {}, "learned position embeddings"),
    ({"transformer_activation": "gelu"}, {}, "the activation gelu"),
    ({"enc_n_points": 8}, {"detector": "deformable_detr"}, "enc_n_points 8 rather than 4"),
    ({"nheads": 2}, {"detector": "deformable_detr"}, "enc_n_points 8 rather than 4"),  # by its tensors, of 4 heads
    ({"dec_n_points": 2}, {"detector": "deformable_detr"}, "dec_n_points 2 rather than 4"),
    ({"pre_norm": True}, {}, "pre_norm True by its options and False by its tensors"),
    ({"pre_norm": False}, {"pre_norm": True}, "pre_norm False by its options and True by its tensors"),
    ({"pre_norm": True}, {"detector": "conditional_detr"}, "pre-norm layers"),
)


@pytest.mark.parametrize(("options", "values", "reason"), NOT_BUILT)
def test_what_is_not_built_is_refused_by_name(options, values, reason, tmp_path, capsys):
    foreign(tmp_path / "f.pth", options, **{"detector": "detr", **values})
    sentence = f"f.pth: its detector has {reason}, which is not built here.*--backbone_weights"
    with pytest.raises(UserError, match=sentence):
        finetune.read_init(str(tmp_path / "f.pth"))
    with pytest.raises(UserError, match=sentence):
        convert.main([str(tmp_path / "f.pth"), "--to", "hf", "--out", str(tmp_path / "hf")])
    what = convert.main([str(tmp_path / "f.pth")])
    assert re.search(f"detector with {reason}, which is not built here, ResNet-18", what)
    convert.load_backbone(common.Backbone("resnet18").body, tmp_path / "f.pth")  # its ResNet is one as any other


def test_parts_that_tell_themselves(tmp_path):
    """Two stages, learned positions: by their tensors; DC5 by the released files' names; a mask head goes."""
    model = foreign(tmp_path / "f.pth", detector="detr").state_dict()
    table = ones("backbone.1.row_embed.weight", "backbone.1.col_embed.weight")
    torch.save({"model": model | table}, tmp_path / "learned.pth")
    torch.save({"model": model}, tmp_path / "detr-r50-dc5-e632da11.pth")
    stages = {k: v for k, v in model.items() if k != "query_embed.weight"} | ones("transformer.enc_output.weight")
    torch.save({"model": stages}, tmp_path / "two.pth")
    for name, reason in (("learned.pth", "learned position"), ("detr-r50-dc5-e632da11.pth", "DC5"),
                         ("two.pth", "two stages")):
        with pytest.raises(UserError, match=f"{name}: its detector has .*{reason}"):
            finetune.read_init(str(tmp_path / name))
    torch.save({"model": {f"detr.{k}": v for k, v in model.items()} | ones("mask_head.lay1.weight")},
               tmp_path / "masks.pth")
    found = convert.open_checkpoint(tmp_path / "masks.pth")
    assert found.state.keys() == model.keys() and found.left == {"other modules, not needed": ["mask_head.lay1.weight"]}
    assert found.what == "DETR, 9 queries, ResNet-18"


def test_what_was_assumed_is_said(tmp_path, capsys):
    foreign(tmp_path / "f.pth", detector="detr")
    convert.main([str(tmp_path / "f.pth")])
    assert ("note: " + str(tmp_path / "f.pth") + " does not say how many attention heads it has (8 are taken, or "
            "--nheads) and whether its last stage is dilated (taken not to be)") in capsys.readouterr().out
    init, arch = finetune.read_init(str(tmp_path / "f.pth"))
    assert "nheads" not in arch  # --nheads is free
    foreign(tmp_path / "d.pth", detector="deformable_detr")  # its tensors tell them
    init, arch = finetune.read_init(str(tmp_path / "d.pth"))
    assert arch["nheads"] == 4
    assert init.assumed == f"{init.path} does not say whether its last stage is dilated (taken not to be)"
    foreign(tmp_path / "n.pth", {"nheads": 7}, detector="detr")
    with pytest.raises(UserError, match="n.pth: says nheads = 7, which does not divide its width of 64"):
        finetune.read_init(str(tmp_path / "n.pth"))
    finetuned(tmp_path / "ours.pt", detector="detr")
    assert convert.open_checkpoint(tmp_path / "ours.pt").assumed is None


def test_categories_of_one_name_stay_apart(tmp_path):
    pytest.importorskip("safetensors")
    cfg = detr_config(detector="detr")
    categories = [{"id": 0, "name": "ball"}, {"id": 1, "name": "ball"}, {"id": 2, "name": "bat"}]
    model = stirred(detectors.build_detector(cfg, 4, focal=False))
    run.save_checkpoint(tmp_path / "last.pt", model, None, 1, cfg, script="finetune", categories=categories)
    convert.main([str(tmp_path / "last.pt"), "--to", "hf", "--out", str(tmp_path / "hf")])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"] == {"0": "ball (id 0)", "1": "ball (id 1)", "2": "bat"}
    assert config["label2id"] == {"ball (id 0)": 0, "ball (id 1)": 1, "bat": 2}


# ==== Files that are not what they should be =======================================================================

class Runs:
    """A pickle of it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bad_files(folder):
    """{name: (file content, words that the one sentence must have)}"""
    whole = io.BytesIO()
    torch.save({"model": {"conv1.weight": torch.zeros(100, 100)}}, whole)
    old = io.BytesIO()
    torch.save({"model": {"conv1.weight": torch.zeros(100, 100)}}, old, _use_new_zipfile_serialization=False)
    arrays = pickle.dumps({"model": {"stem.conv1.weight": np.zeros((50, 50))}}, 2)
    picture, script = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    evil, hidden, listed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"model": {"conv1.weight": torch.zeros(3)}, "args": Runs(folder / "ran")}, evil)
    torch.save({"model": Runs(folder / "ran")}, hidden, _use_new_zipfile_serialization=False)
    torch.save([torch.zeros(3)], listed)
    numbers = io.BytesIO()
    torch.save({"epoch": 4, "args": argparse.Namespace(lr=1.0)}, numbers)
    unknown = io.BytesIO()
    torch.save({"model": {"blocks.0.attn.qkv.weight": torch.zeros(3)}}, unknown)
    refused = ("refused", "would run code")
    files = {
        "empty.pth": (b"", ("empty",)), "text.pth": (b"not a checkpoint\n" * 9, ("not a readable",)),
        "picture.pth": (picture.getvalue(), ("not a readable",)),
        "torchscript.pth": (script.getvalue(), ("not a readable",)),
        "evil.pth": (evil.getvalue(), refused), "evil_old.pth": (hidden.getvalue(), refused),
        "evil.pkl": (pickle.dumps({"model": {"stem.conv1.weight": np.zeros(3)}, "x": Runs(folder / "ran")}), refused),
        "evil_0.pkl": (pickle.dumps(Runs(folder / "ran"), 0), ("evil_0.pkl",)),
        "evil_4.pkl": (pickle.dumps([Runs(folder / "ran")], 4), refused),
        "eval.pkl": (b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.", refused),
        "list.pth": (listed.getvalue(), ("holds a list",)), "list.pkl": (pickle.dumps([1, 2]), ("not a readable",)),
        "numbers.pth": (numbers.getvalue(), ("holds no tensors", "args", "epoch")),
        "unknown.pth": (unknown.getvalue(), ("no known kind of checkpoint", "blocks.0.attn.qkv.weight")),
        "numbers.pkl": (pickle.dumps({"a": 1}), ("holds no tensors",)),
    }
    for name, content in (("whole.pth", whole), ("old.pth", old), ("arrays.pkl", io.BytesIO(arrays))):
        content = content.getvalue()
        for share in (0.02, 0.3, 0.7, 0.97, 0.999):
            files[f"cut_{share}_{name}"] = (content[:int(len(content) * share)], (f"cut_{share}_{name}",))
    return files


def test_files_of_other_formats(tmp_path, fails):
    """safetensors is read where its package is; what is no checkpoint at all is named."""
    model = foreign(tmp_path / "f.pth", {"dilation": False}, detector="deformable_detr")
    safetensors = pytest.importorskip("safetensors.torch")
    state = {k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
    safetensors.save_file(state, tmp_path / "f.safetensors")
    found = convert.open_checkpoint(tmp_path / "f.safetensors")
    assert found.what == convert.open_checkpoint(tmp_path / "f.pth").what
    assert found.state.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in found.state.items())
    whole = (tmp_path / "f.safetensors").read_bytes()
    for name, content, words in (
            ("pointer.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "a Git LFS pointer"),
            ("page.pth", b"\n<!DOCTYPE html><html></html>", "a web page"), ("e.pth", b"<HTML>404", "a web page"),
            ("error.pth", b"<?xml version='1.0'?><Error/>", "an XML file"), ("c.json", b'{"a": 1}', "a JSON file"),
            ("a.tar.gz", b"\x1f\x8b\x08\x00", "a gzip archive"), ("cut.safetensors", whole[:-40], "not a readable"),
            ("head.safetensors", whole[:30], "not a readable")):
        (tmp_path / name).write_bytes(content)
        line = fails(convert.main, [tmp_path / name])
        assert line.startswith(f"error: {tmp_path / name}: not a readable PyTorch checkpoint") and words in line
        assert "operand" not in line.lower()


def test_safetensors_without_its_package(tmp_path, fails, monkeypatch):
    (tmp_path / "f.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert ("f.safetensors: is in the safetensors format: pip install safetensors"
            in fails(convert.main, [tmp_path / "f.safetensors"]))


def test_bad_files(tmp_path, fails):
    """One sentence and exit code 2 for each, wherever it is given; nothing in it is run."""
    for name, (content, words) in bad_files(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        line = fails(convert.main, [path])
        assert line.startswith(f"error: {path}: ") and len(line) < 700 and all(word in line for word in words), line
        assert fails(finetune.main, ["--data", "synthetic", "--init_from", path, "--out", tmp_path / "out"]) == line
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    small = ["--preset", "demo", "--synthetic_images", 8, "--batch_size", 2, "--max_steps", 1]
    for script, argv in ((detreg, ["--proposal_method", "random"]), (finetune, []),
                         (finetune, ["--detector", "faster_rcnn_fpn"])):
        for name in ("empty.pth", "evil.pkl", "cut_0.7_old.pth"):
            assert name in fails(script.main, [*small, *argv, "--backbone_weights", tmp_path / name, "--out",
                                               tmp_path / f"{script.__name__}-{name}"])
    pickle.loads((tmp_path / "evil.pkl").read_bytes())  # it would have run
    assert (tmp_path / "ran").exists()


def test_a_pickle_cannot_change_what_it_names(tmp_path):
    """numpy's own functions stay as they are, whatever attributes a file sets on them."""
    (tmp_path / "f.pkl").write_bytes(b"\x80\x02cnumpy.core.numeric\n_frombuffer\nN}X\x04\x00\x00\x00evilK\x01s\x86b.")
    with pytest.raises(UserError, match="f.pkl: "):
        run.read_checkpoint(tmp_path / "f.pkl")
    assert not hasattr(np.zeros(1).__reduce_ex__(5)[0], "evil")


def test_damaged_bytes(tmp_path):
    """Whatever byte is damaged, the file is read or refused with one sentence; nothing else is raised."""
    files = []
    for old in (False, True):
        buffer = io.BytesIO()
        torch.save({"state_dict": {"module.conv1.weight": torch.ones(4, 3, 2, 2)}, "args": argparse.Namespace(a=1)},
                   buffer, _use_new_zipfile_serialization=not old)
        files.append(buffer.getvalue())
    files.append(pickle.dumps({"model": {"stem.conv1.weight": np.ones((4, 3, 2, 2), np.float32)}, "__author__": "x"},
                              2))
    rng, outcomes = np.random.default_rng(0), collections.Counter()
    for content in files:
        for _ in range(120):
            damaged = bytearray(content)
            damaged[rng.integers(len(damaged))] = rng.integers(256)
            (tmp_path / "file.pth").write_bytes(bytes(damaged))
            try:
                convert.open_checkpoint(tmp_path / "file.pth")
                outcomes["read"] += 1
            except UserError as error:
                assert str(error).startswith(f"{tmp_path}/file.pth: ") and "\n" not in str(error)
                outcomes["refused"] += 1
    assert outcomes["read"] > 30 and outcomes["refused"] > 30


def test_what_released_files_hold_besides_is_read(tmp_path):
    content = {"model": {"conv1.weight": torch.ones(2), "layer1.0.conv1.weight": torch.ones(2)},
               "args": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(a=[1])),
               "best": np.float64(0.5), "epoch": np.int64(3), "milestones": collections.Counter([1]),
               "optimizer": {"state": collections.OrderedDict()}, "meta": ("a", None, True)}
    for old in (False, True):
        torch.save(content, tmp_path / "f.pth", _use_new_zipfile_serialization=not old)
        read = run.read_checkpoint(tmp_path / "f.pth")
        assert read["args"].nested.a == [1] and read["best"] == 0.5 and read["epoch"] == 3
    arrays = {"model": collections.OrderedDict({"stem.conv1.weight": np.arange(6, dtype=">f4").reshape(2, 3),
                                                "stem.conv1.norm.num_batches_tracked": np.array(7),
                                                "x.half": np.float16([1.5]), "names": np.array(["a"]), "note": "text"}),
              "lr": np.float32(0.5)}
    for protocol in (2, 3, 4, 5):
        (tmp_path / "f.pkl").write_bytes(pickle.dumps(arrays, protocol))
        state = convert.state_of(run.read_checkpoint(tmp_path / "f.pkl"), "FILE")
        assert (state["stem.conv1.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
                and state["stem.conv1.norm.num_batches_tracked"].shape == ())
        assert state["x.half"].dtype == torch.float16 and len(state) == 3


def test_command(tmp_path, fails, capsys):
    """Without --to it says what a file is; it never overwrites."""
    finetuned(tmp_path / "last.pt", detector="conditional_detr")
    assert convert.main([str(tmp_path / "last.pt")]) == "Conditional DETR, 9 queries, ResNet-18, step 12"
    assert f"{tmp_path / 'last.pt'}: Conditional DETR, 9 queries, ResNet-18, step 12; " in capsys.readouterr().out
    for argv, reason in ((["--to", "hf"], "needs --out PATH: the folder"),
                         (["--to", "official", "--out", tmp_path / "last.pt"], "exists already"),
                         (["--to", "hf", "--out", tmp_path / "o", "--backbone_only"],
                          "--backbone_only is of --to torchvision")):
        assert reason in fails(convert.main, [tmp_path / "last.pt", *argv])
    assert convert.main([str(tmp_path)]) == "Conditional DETR, 9 queries, ResNet-18, step 12"  # a run's folder
    line = fails(finetune.main, ["--data", "synthetic", "--init_from", tmp_path / "last.pt", "--detector",
                                 "deformable_detr", "--out", tmp_path / "x"])
    assert "this is a Conditional DETR checkpoint with 9 queries; --detector is deformable_detr" in line
    done = subprocess.run([sys.executable, str(ROOT / "convert.py"), str(tmp_path / "nowhere.pth")],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == f"error: {tmp_path / 'nowhere.pth'}: no such checkpoint file"


# ==== Baselines from a file: what holds their ResNet, and what lies beside it. r: its tensors ====


def under(prefix, state, by=0.0):
    return {prefix + k: v + by for k, v in state.items()}


X = torch.zeros(1)
PIXPRO_HEADS = {f"{name}.linear1.weight": X for name in ("projector", "projector_k", "predictor")}
BASELINES = {
    "MoCo v2": lambda r: {"state_dict": under("module.encoder_q.", {**r, "fc.0.weight": X})},
    "SwAV": lambda r: under("module.", {**r, "projection_head.0.weight": X, "prototypes.weight": X}),
    "SwAV, training": lambda r: {"state_dict": under("module.", {**r, "projection_head.0.weight": X}),
                                 "epoch": 400, "arch": "resnet50", "optimizer": {}},
    "BYOL": lambda r: {"state_dict": dict(r), "meta": {}},
    "BYOL, training": lambda r: {"state_dict": under("backbone.", r) | under("online_net.0.", r)
                                 | under("target_net.0.", r, 1)
                                 | {"neck.fc0.weight": X, "head.x": X, "online_net.1.fc0.weight": X}},
    "DenseCL": lambda r: {"state_dict": dict(r), "author": "DenseCL"},
    "DenseCL, training": lambda r: {"state_dict": under("backbone.", r) | under("encoder_q.0.", r)
                                    | under("encoder_k.0.", r, 1) | {"queue": X, "queue2": X}},
    "PixPro": lambda r: {"model": under("module.", under("encoder.", r) | under("encoder_k.", r, 1) | PIXPRO_HEADS
                                        | {"value_transform.weight": X})},
    "PixPro, instance branch": lambda r: {"model": under("module.", under("base.", r) | under("encoder_k.", r, 1)
                                                         | PIXPRO_HEADS)},
    "InfoMin": lambda r: {"model": under("module.encoder.", r) | {"module.head.0.weight": X},
                          "model_ema": under("encoder.", r, 1), "opt": argparse.Namespace(method="InfoMin")},
    "mmselfsup": lambda r: {"state_dict": under("backbone.", r) | {"head.fc.weight": X}, "meta": {}},
    "DINO, training": lambda r: {"student": under("module.backbone.", r, 1), "teacher": under("backbone.", r),
                                 "optimizer": {}},
}


@pytest.mark.parametrize("counters", (True, False))
@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_from_a_file(baseline, counters, tmp_path):
    """The one ResNet is found, not its copy; no file is taken for SoCo's; what is not whole is refused."""
    with torch.device("meta"):
        body = common.Backbone("resnet18", norm="bn" if counters else "frozen").body
    trunk = {k: torch.full((1,), float(i)) for i, k in enumerate(body.state_dict())}
    torch.save(BASELINES[baseline](trunk), tmp_path / "file.pth")
    found = convert.open_checkpoint(tmp_path / "file.pth")
    assert found.resnet() == trunk and found.what.endswith(", ResNet-18") and "SoCo" not in found.what
    del trunk["layer3.1.bn2.weight"]
    torch.save(BASELINES[baseline](trunk), tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"cut.pth \(.*missing there: layer3\.1\.bn2\.weight"):
        convert.load_backbone(body, tmp_path / "cut.pth")


def test_baselines_that_no_name_fetches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in (("moco_v2", "moco_v2_200.*DUPR.*moco_v2_800"), ("densecl", "densecl_r50.*WXinlong/DenseCL"),
                        ("byol", "byol_r50.*mmselfsup"), ("pixpro", "zdaxie/PixPro"), ("infomin", "PyContrast")):
        with pytest.raises(UserError, match=f"--backbone_weights {name}: .*{words}"):
            convert.backbone_file(name, "resnet50")
    for name, end in (("swav", "swav_800ep_pretrain.pth.tar"), ("swav_400", "swav_400ep_pretrain.pth.tar"),
                      *((f"moco_v2_{n}", f"moco_v2_{n}ep_pretrain.pth.tar") for n in (200, 800))):
        assert convert.BACKBONE_URLS[name].endswith(f"/{end}")
    haiku = pickle.dumps({"experiment_state": _ByolExperimentState(1), "step": 1}, protocol=4)
    for i, content in enumerate((haiku.replace(b"test_convert", b"byol_exprmnt"),
                                 pickle.dumps({"experiment_state": {"online_params": {}}}))):
        (tmp_path / f"{i}.pkl").write_bytes(content)
        with pytest.raises(UserError, match=f"{i}.pkl: BYOL's own file.*ajtejankar/byol-convert"):
            convert.open_checkpoint(tmp_path / f"{i}.pkl")


class _ByolExperimentState:
    """As DeepMind's file names it."""

    def __init__(self, params):
        self.online_params = params
