"""Folders as checkpoints: those of Hugging Face transformers, whose models must give the same numbers here, and a
run's."""
import dataclasses
import json
import re

import pytest
import torch

import common
import convert
import detectors
import finetune
import run
from annotations import open_detection
from common import UserError
from conftest import flags
from test_convert import CATEGORIES, detr_config, finetuned, padded_batch, same_predictions, stirred

pytestmark = pytest.mark.usefixtures("one_thread")
save_file = pytest.importorskip("safetensors.torch").save_file
NAMES = [c["name"] for c in CATEGORIES]
SMALL = dict(d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=96, decoder_ffn_dim=96, num_queries=9, init_std=0.15,
             id2label=dict(enumerate(NAMES)))


def resnet(stages=(4,), **values):
    """The configuration of transformers' own ResNet-18."""
    widths = dict(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    return {"model_type": "resnet", "out_features": [f"stage{i}" for i in stages], **widths, **values}


def timm(stages=(1, 2, 3, 4)):
    return {"model_type": "timm_backbone", "backbone": "resnet18", "features_only": True, "num_channels": 3,
            "use_pretrained_backbone": False, "out_indices": list(stages)}


# class: (what of the configuration is not SMALL, how it is saved, what it is here)
MODELS = {
    "DetrForObjectDetection": ({}, {}, "DETR"),
    "DetrForObjectDetection, own ResNet": (
        {"backbone_config": resnet()}, {"max_shard_size": "8MB"}, "DETR"),
    "DetrForObjectDetection, stride 16, in memory": (
        {"backbone_config": resnet((3,))}, {"save_original_format": False}, "DETR"),
    "DetrForSegmentation": ({"encoder_attention_heads": 8, "decoder_attention_heads": 8}, {}, "DETR"),
    "TableTransformerForObjectDetection": ({}, {}, r"DETR \(pre-norm\)"),
    "ConditionalDetrForObjectDetection": ({}, {}, "Conditional DETR"),
    "ConditionalDetrForObjectDetection, in memory": ({}, {"save_original_format": False}, "Conditional DETR"),
    "DeformableDetrForObjectDetection": ({}, {}, "Deformable DETR"),
    "DeformableDetrForObjectDetection, in memory, own ResNet": (
        {"backbone_config": resnet((2, 3, 4)), "num_feature_levels": 3}, {"save_original_format": False},
        "Deformable DETR"),
    "DeformableDetrForObjectDetection, 2 levels": (
        {"backbone_config": timm((3, 4)), "num_feature_levels": 2}, {}, "Deformable DETR"),
    "DeformableDetrForObjectDetection, one level": ({"num_feature_levels": 1}, {}, "single-scale Deformable DETR"),
    "DeformableDetrForObjectDetection, refined": (
        {"with_box_refine": True}, {}, "Deformable DETR with box refinement"),
    "DeformableDetrForObjectDetection, refined, untied": (
        {"with_box_refine": True, "tie_word_embeddings": False}, {}, "Deformable DETR with box refinement"),
}


def detector(folder, categories=CATEGORIES):
    """As finetune.py makes it of a folder that already knows the categories."""
    init, architecture = finetune.read_init(str(folder))
    cfg = finetune.adopt_architecture(finetune.Config(init_from=str(folder)), architecture, frozenset())
    model, label_map = finetune.build_model(cfg, init, categories)
    return model.eval(), label_map


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, tmp_path, capsys):
    """The same logits and boxes as the model that wrote the folder, whichever way it has been written."""
    transformers = pytest.importorskip("transformers")
    values, how, what = MODELS[name]
    cls = name.split(",")[0]
    if "backbone_config" not in values:
        pytest.importorskip("timm")
        values = values | {"use_timm_backbone": True, "backbone": "resnet18", "use_pretrained_backbone": False}
    config = getattr(transformers, re.sub("For.*", "Config", cls))(**{**SMALL, **values})
    theirs = stirred(getattr(transformers, cls)(config))
    if "untied" in name:  # of old versions: one module of two names
        theirs.model.decoder.bbox_embed = theirs.bbox_embed
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            value.mul_(5 if "query_position" in key else 1)
    theirs.save_pretrained(tmp_path, **how)
    assert ("in memory" in name) != any("conv_encoder" in k for file in tmp_path.glob("*.safetensors")
                                        for k in run.read_checkpoint(file))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or "max_shard_size" not in how
    found = convert.open_checkpoint(tmp_path)
    assert re.fullmatch(rf"{what}, 9 queries, ResNet-18", found.what) and found.assumed is None
    assert found.content["categories"] == [{"id": i, "name": n} for i, n in enumerate(NAMES)]
    ours, label_map = detector(f"hf:{tmp_path}")
    assert label_map == [0, 1, 2]
    same_predictions(ours, theirs)
    said = capsys.readouterr().out
    assert ("other modules, not needed: bbox_attention, mask_head (" in said) == ("Segmentation" in name)
    assert ("a later stage that is not used" in said) == ("stride 16" in name)


def exported(path, labels=None, **values):
    """-> (our detector, its folder as our export writes it, with other labels if given)."""
    model = finetuned(path / "ours.pt", **values)
    convert.main([str(path / "ours.pt"), "--to", "hf", "--out", str(path / "hf")])
    if labels:
        change(path / "hf", id2label={str(i): n for i, n in enumerate(labels)})
    return model, path / "hf"


def change(folder, file="config.json", **values):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **values}))


def test_parts_of_pytorch_and_one_file(tmp_path):
    """pytorch_model.bin in parts; the file in a folder stands for the folder; half floats; a head without labels."""
    model, folder = exported(tmp_path, detector="deformable_detr")
    whole = convert.open_checkpoint(folder)
    one = convert.open_checkpoint(folder / "model.safetensors")
    assert one.path == whole.path == str(folder) and one.content == whole.content
    state = run.read_checkpoint(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for part, some in parts.items():
        torch.save({k: state[k].half() for k in some}, folder / part)
    index = {"weight_map": {k: part for part, some in parts.items() for k in some}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    change(folder, id2label=None)
    found = convert.open_checkpoint(folder)
    assert all(torch.equal(v, whole.state[k].half()) for k, v in found.state.items())
    assert found.state.keys() == model.state_dict().keys()
    assert [c["name"] for c in found.content["categories"]] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    (folder / "pytorch_model-2.bin").unlink()
    with pytest.raises(UserError, match="pytorch_model-2.bin: no such checkpoint file"):
        convert.open_checkpoint(folder)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json: names no files under 'weight_map'"):
        convert.open_checkpoint(folder)


REFUSED = (  # (changes in config.json, words of the one sentence)
    ({"model_type": "rt_detr"}, "a Hugging Face model of the type rt_detr; of those only DETR, Table Transformer"),
    ({"backbone": "resnet50d"}, "its backbone is resnet50d; read here are detectors on resnet18, resnet34"),
    ({"backbone_config": {"model_type": "swin"}, "backbone": None}, "its backbone is swin; read here"),
    ({"backbone_config": resnet(downsample_in_bottleneck=True), "backbone": None},
     "its backbone is resnet with downsample_in_bottleneck True; read here"),
)
NOT_BUILT = (
    ({"two_stage": True}, "two stages"), ({"dilation": True}, r"a dilated last stage \(DC5\)"),
    ({"backbone_kwargs": {"output_stride": 16}}, r"a dilated last stage \(DC5\)"),
    ({"position_embedding_type": "learned"}, "learned position embeddings"),
    ({"activation_function": "gelu"}, "the activation gelu"), ({"decoder_n_points": 8}, "dec_n_points 8 rather than 4"),
    ({"decoder_attention_heads": 8}, "4 attention heads in the encoder and 8 in the decoder"),
    ({"backbone_kwargs": {"out_indices": [1, 2, 3]}}, r"the stages \[1, 2, 3\] of the ResNet on 4 levels"),
)


def test_what_is_not_built_is_refused_by_name(tmp_path, fails):
    folder = exported(tmp_path, detector="deformable_detr", with_box_refine=True)[1]
    config, processor = ((folder / name).read_text() for name in ("config.json", "preprocessor_config.json"))
    for values, words in REFUSED:
        change(folder, **values)
        assert re.search(f"^error: {folder}: {words}", fails(convert.main, [folder]))
        (folder / "config.json").write_text(config)
    sentence = "hf: its detector has {}, which is not built here.*--backbone_weights"
    for values, words in NOT_BUILT:
        change(folder, **values)
        assert re.search(sentence.format(words), fails(finetune.main, ["--init_from", f"hf:{folder}"]))
        (folder / "config.json").write_text(config)
    for values, words in (({"image_std": [1, 1, 1]}, r"images normalised with \[.*\] and \[1, 1, 1\]"),
                          ({"do_normalize": False}, "images that are not normalised")):
        change(folder, "preprocessor_config.json", **values)
        assert re.search(sentence.format(words), fails(finetune.main, ["--init_from", folder]))
        (folder / "preprocessor_config.json").write_text(processor)
    convert.load_backbone(common.Backbone("resnet18").body, f"hf:{folder}")  # its ResNet is one as any other
    state = run.read_checkpoint(folder / "model.safetensors")
    box = "model.decoder.bbox_embed.1.layers.0.bias"
    save_file({**state, box: state[box] + 1}, folder / "model.safetensors")
    assert "the box heads of its decoder are others" in fails(convert.main, [folder])
    save_file({k: v for k, v in state.items() if k.startswith("model.")}, folder / "model.safetensors")
    assert "without class and box head" in fails(convert.main, [folder])
    for text, words in (("{", "not a readable JSON file"), ("[]", "holds a list, an object is wanted")):
        (folder / "config.json").write_text(text)
        assert f"{folder / 'config.json'}: {words}" in fails(convert.main, [folder])
    (folder / "config.json").unlink()
    assert "lacks config.json or the weights" in fails(convert.main, [f"hf:{folder}"])
    line = fails(finetune.main, ["--init_from", "hf:facebook/detr-resnet-50"])
    assert "no such folder, and nothing is fetched here; run `hf download facebook/detr-resnet-50 --local-dir" in line


def test_a_runs_folder(tmp_path, fails):
    """best.pt, else last.pt, else previous.pt."""
    for step, name in enumerate(("previous.pt", "last.pt", "best.pt")):
        cfg = detr_config(detector="detr")
        model = detectors.build_detector(cfg, 4, focal=False)
        (tmp_path / "x").mkdir(exist_ok=True)
        run.save_checkpoint(tmp_path / "x" / "y.pt", model, None, step, cfg, script="finetune", categories=CATEGORIES)
        (tmp_path / "x" / "y.pt").rename(tmp_path / name)
        found = convert.open_checkpoint(tmp_path)
        assert found.path == str(tmp_path / name) and found.content["step"] == step
    assert fails(convert.main, [tmp_path / "x"]).startswith(
        f"error: {tmp_path / 'x'}: no checkpoint in this folder, neither best.pt, last.pt, previous.pt of a run, nor ")


def test_the_image_sizes_of_a_folder(tmp_path):
    """As its preprocessor_config.json says them, in any version; none where images are squeezed into a square."""
    folder = exported(tmp_path, detector="detr", eval_size=96, max_size=140)[1]
    assert finetune.image_sizes(convert.open_checkpoint(folder)) == {"eval_size": 96, "max_size": 140}
    for values, sizes in (({"size": 64, "max_size": 90}, (64, 90)), ({"size": {"shortest_edge": 64}}, (64, 1333)),
                          ({"size": {"height": 64, "width": 64}}, None), ({"size": {"shortest_edge": 0}}, None),
                          ({"size": "all"}, None), ({"do_resize": False}, None)):
        change(folder, "preprocessor_config.json", size={"shortest_edge": 96}, do_resize=True)
        change(folder, "preprocessor_config.json", **values)
        found = finetune.image_sizes(convert.open_checkpoint(folder))
        assert found == (dict(zip(("eval_size", "max_size"), sizes)) if sizes else {})


COCO_LABELS = [convert.COCO_NAMES.get(i, "N/A") for i in range(91)]


def test_coco_labels():
    """Of 91 labels: data of other classes have no rows; COCO's, all or some of them, have theirs, by name."""
    content = {"categories": convert._labels({"id2label": {str(i): n for i, n in enumerate(COCO_LABELS)}}, 91)}
    coco = [{"id": i, "name": n} for i, n in convert.COCO_NAMES.items()]
    rows = finetune.categories_of_rows(content, 91, coco)
    assert [rows[i] for i in (0, 1, 12, 13, 90)] == [-1, 0, -1, 11, 79] and rows.count(-1) == 11
    assert finetune.categories_of_rows(content, 91, [{"id": 1, "name": "resistor"}, {"id": 2, "name": "N/A"}]) is None
    some = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    rows = finetune.categories_of_rows(content, 91, some)
    assert {row: i for row, i in enumerate(rows) if i >= 0} == {17: 1, 18: 0}
    other = [*some, {"id": 3, "name": "wolf"}]
    assert finetune.categories_of_rows(content, 91, other) is None
    assert sum(i >= 0 for i in finetune.categories_of_rows(content, 91, other, partly=True)) == 2
    assert convert._labels({}, 91) == [] and len(convert._labels({}, 90)) == 90  # COCO's rows without labels


TINY = dict(data="synthetic", synthetic_images=4, synthetic_test_images=2, synthetic_size=64, batch_size=2,
            scales=(48, 64), max_size=80, crop_scales=(48,), crop_range=(40, 48), num_workers=0, max_steps=2,
            device="cpu")


def test_finetune_from_a_folder(tmp_path, capsys):
    """Other classes: the class head is made anew, all else kept, and it trains; the data's classes in another order, or
    more than those: their rows."""
    shapes = open_detection("synthetic", None, "train", synthetic_images=2, synthetic_size=64).categories
    labels = [c["name"] for c in shapes]
    model, folder = exported(tmp_path / "coco", detector="detr")
    finetune.main(flags({**TINY, "init_from": f"hf:{folder}", "out": tmp_path / "out"}))
    said = capsys.readouterr().out
    assert f"class head, made anew for {len(labels)} categories: class_embed.bias, class_embed.weight" in said
    after = convert.open_checkpoint(tmp_path / "out")
    assert after.content["step"] == 2 and [c["name"] for c in after.content["categories"]] == labels
    old, new = model.state_dict(), after.state
    assert new["class_embed.weight"].shape == (len(labels) + 1, 64)
    assert all((new[k] - v).abs().max() < 0.01 for k, v in old.items() if not k.startswith("class_embed"))
    assert not torch.equal(new["bbox_embed.layers.2.bias"], old["bbox_embed.layers.2.bias"])
    folder = tmp_path / "coco" / "hf"
    order = [*labels[::-1], "N/A"][-3:]
    change(folder, id2label={str(i): n for i, n in enumerate(order)})
    wanted = [c for c in shapes if c["name"] in order]
    mine, label_map = detector(folder, wanted)
    assert label_map == list(range(len(wanted)))
    rows = [order.index(c["name"]) for c in wanted]
    assert torch.equal(mine.class_embed.weight, old["class_embed.weight"][[*rows, 3]])
    assert f"the class head's rows were put in the order of the {len(wanted)} categories" in capsys.readouterr().out
    images, mask = padded_batch()
    with torch.no_grad():
        logits, before = (m(images, mask)["pred_logits"] for m in (mine, model))
    torch.testing.assert_close(logits, before[..., [*rows, 3]])
    cfg = dataclasses.replace(finetune.Config(init_from="f", eval_only=True), **finetune.read_init(str(folder))[1])
    assert finetune.build_model(cfg, convert.open_checkpoint(folder), shapes)[1] == [
        next((i for i, c in enumerate(shapes) if c["name"] == name), -1) for name in order]
