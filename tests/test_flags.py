"""Flags of every script: values outside their range, absurd ones, the ends of a range, and combinations that once ended
in a traceback in the first step."""
import argparse
import dataclasses
import importlib
import itertools
import math
import re
import typing

import numpy as np
import pytest
import torch
from conftest import ROOT, flags

import common
import convert
import data
import detreg
import evaluation
import figures
import finetune
import predict
import proposals
import rcnn
import run
from common import UserError

CPU = torch.device("cpu")
METHODS = ("detreg", "updetr", "siamese_detr", "soco", "dupr")
SCRIPTS = (*METHODS, "finetune")
pytestmark = pytest.mark.usefixtures("one_thread")


def knobs(script: str) -> dict[str, tuple]:
    """{name: (type, range or None, whether it takes several values)} of a script's configuration."""
    hints = typing.get_type_hints(importlib.import_module(script).Config, include_extras=True)
    found = {}
    for name, hint in hints.items():
        plain, bounds, _ = run._split_hint(hint)
        several = typing.get_origin(plain) is tuple
        found[name] = typing.get_args(plain)[0] if several else plain, bounds, several
    return found


def beyond(plain: type, bounds: run.Range) -> list[str]:
    """The values just outside a range, and absurd ones."""
    low, high = bounds.low, bounds.high
    if plain is int:
        values = [low - 1, high + 1, -10**30, 10**30, 10**400, "1.5", "1e3"]
    else:
        least = low if bounds.open else np.nextafter(low, -math.inf)
        values = [repr(float(least)), repr(float(np.nextafter(high, math.inf))), "1e400", "-1e400", 10**30, 10**400]
    return [*map(str, values), "nan", "inf", "-inf", "text", ""]


def ends(plain: type, bounds: run.Range) -> list[str]:
    """The least and the largest value of a range."""
    least = np.nextafter(bounds.low, math.inf) if bounds.open else bounds.low
    return [str(plain(least)) if plain is int else repr(float(least)), repr(plain(bounds.high))]


def parse(script: str, argv: list[str]) -> typing.Any:
    """What main() does before it opens anything but a checkpoint."""
    module = importlib.import_module(script)
    if script == "finetune":
        cfg, given, init = finetune.parse(argv)
        finetune.check(cfg, given, init)
        return cfg
    cfg = run.parse_config(module.Config, module.PRESETS, argv, script=script, description=module.__doc__,
                           recipe=module.recipe_of)
    module.check(cfg)
    return cfg


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_the_recipe(method):
    """What Config says, and the annotated pages repeat, is what a run without flags does."""
    cfg, written = parse(method, []), importlib.import_module(method).Config()
    assert cfg == dataclasses.replace(written, out=cfg.out)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range_that_ends(script):
    for name, (plain, bounds, _) in knobs(script).items():
        assert plain not in (int, float) or math.isfinite(bounds.low) and math.isfinite(bounds.high), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_values_outside_are_refused_before_anything_is_written(script, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(script).main
    for name, (plain, bounds, several) in knobs(script).items():
        if plain in (int, float):
            for value in beyond(plain, bounds):
                line = fails(main, [f"--{name}={value}"])
                assert f"--{name}" in line and ("must be " in line or f"invalid {plain.__name__} value" in line), line
        elif plain is bool or typing.get_origin(plain) is typing.Literal:
            assert f"--{name}" in fails(main, [f"--{name}=nothing"])
        if several:
            assert f"--{name}: expected at least one argument" in fails(main, [f"--{name}"])
        if several and bounds:
            inside, outside = ends(plain, bounds)[0], beyond(plain, bounds)[1]
            assert f"--{name} {inside} {outside}: must be" in fails(main, [f"--{name}", inside, outside])
    for value in ("gpu", "cuda:-1", "cuda:x", "cuda:99999", ""):
        assert f"--device {value}: " in fails(main, [f"--device={value}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_ends_of_a_range_end_in_no_traceback(script):
    accepted = 0
    for preset in ([], ["--preset", "demo"]):
        for name, (plain, bounds, several) in knobs(script).items():
            for value in ends(plain, bounds) if plain in (int, float) else ():
                for values in ([value], [value] * 2, [value] * 4) if several else ([value],):
                    try:
                        cfg = parse(script, [*preset, f"--{name}", *values])
                    except UserError as error:
                        assert "--" in str(error)
                        continue
                    assert getattr(cfg, name) == (tuple(map(plain, values)) if several else plain(value))
                    accepted += 1
    assert accepted > 60


# ==== The other command lines ======================================================================================

class Caught(Exception):
    """Carries the parser of a main()."""


def parsers(main, monkeypatch) -> list[tuple[list[str], argparse.ArgumentParser]]:
    """Of a main(): (what its command line begins with, parser), one per subcommand if it has any."""
    def catch(self, argv=None):
        raise Caught(self)

    with monkeypatch.context() as patch:
        patch.setattr(run.Parser, "parse_args", catch)
        with pytest.raises(Caught) as caught:
            main([])
    parser = caught.value.args[0]
    commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [([name], own) for action in commands for name, own in action.choices.items()] or [([], parser)]


@pytest.mark.parametrize("module", (figures, convert, predict, proposals, evaluation), ids=lambda m: m.__name__)
def test_flags_of_the_other_scripts(module, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = 0
    for begin, parser in parsers(module.main, monkeypatch):
        begin = begin + [word for a in parser._actions if a.required
                         for word in (*a.option_strings[:1], "x")]
        for action in parser._actions:
            if action.type in (int, float):
                bounds = run._split_hint(parser.hints[action.dest])[1]
                assert math.isfinite(bounds.high) and str(bounds) in action.help
                for value in beyond(action.type, bounds):
                    assert f"--{action.dest}" in fails(module.main, [*begin, f"--{action.dest}={value}"])
                    tried += 1
            elif action.choices:
                assert f"--{action.dest}" in fails(module.main, [*begin, f"--{action.dest}=nothing"])
    assert tried > 40 or module is convert
    assert not list(tmp_path.iterdir())


def test_no_flag_is_a_number_without_a_range():
    """Of benchmarks too: their `type` is a type of knobs, and their parser knows its range."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")):
        text = path.read_text()
        assert not re.search(r"add_argument\([^()]*type=(int|float)\b", text), path
        assert path.name == "run.py" or "ArgumentParser(" not in text, path


# ==== Combinations =================================================================================================

DETR = {"arch": "resnet18", "hidden_dim": 64, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 16,
        "num_queries": 4, "backbone_weights": "random", "scales": 48, "max_size": 64, "lr_backbone": 1e-4}
CROPS = {"crop_scales": 64, "crop_range": (32, 48)}
TINY = {
    "detreg": {**DETR, **CROPS, "patch_size": 16, "proposal_method": "random", "max_prop": 4},
    "updetr": {**DETR, "patch_size": 16, "num_patches": 2},
    "siamese_detr": {**DETR, "patch_size": 16, "proposal_method": "random", "num_regions": 2},
    "soco": {"arch": "resnet18", "fpn_channels": 8, "head_dim": 8, "mlp_dim": 8, "embedding_dim": 8, "image_size": 64,
             "small_size": 32, "star_size": 48, "level_sizes": (14, 28, 55, 64), "proposal_method": "random",
             "roi_size": 3},
    "dupr": {"arch": "resnet18", "image_size": 64, "roi_sizes": (4, 3, 2, 2), "embedding_dim": 8, "queue_size": 16},
    "finetune": {**DETR, **CROPS},
}
R_CNN = {"arch": "resnet18", "backbone_weights": "random", "scales": 48, "max_size": 64, "fpn_channels": 64,
         "head_dim": 8, "anchor_size": 8, "proposals_per_image": 8, "rois_per_image": 4}


def small(script: str, **values) -> typing.Any:
    """The configuration of a tiny model on four drawn images, two a step."""
    base = R_CNN if values.get("detector") in typing.get_args(rcnn.RCNN_DETECTORS) else TINY[script]
    return parse(script, flags({**base, "data": "synthetic", "synthetic_images": 4, "synthetic_size": 64,
                                "batch_size": 2, "num_workers": 0, "seed": 3, **values}))


def first_step(script: str, cfg: typing.Any) -> tuple[torch.nn.Module, dict[str, float]]:
    """The first training step of a configuration: (model with its gradients, terms)."""
    module, step = importlib.import_module(script), ()
    run.seed_step(cfg.seed, 0)
    if script == "finetune":
        labelled = finetune.open_sets(cfg)[0]
        dataset, (model, _) = finetune.LabelledDataset(cfg, labelled), finetune.build_model(cfg, None,
                                                                                           labelled.categories)
        step = (module.build_criterion(cfg),)
    else:
        source, indices, _ = data.open_training_images(cfg)
        name = {"detreg": "RegionDataset", "updetr": "PatchDataset", "siamese_detr": "TwoViewDataset",
                "soco": "ObjectViewsDataset", "dupr": "TwoCropsDataset"}[script]
        boxes = () if script in ("updetr", "dupr") else (proposals.Proposals(cfg),)
        dataset = getattr(module, name)(cfg, source, indices, *boxes)
        if script in ("soco", "dupr"):
            model = module.build_model(cfg)
        else:
            model, other = module.build_models(cfg)
            step = (other, module.build_criterion(cfg))
    optimizer = getattr(module, "build_optimizer", common.build_optimizer)(cfg, model.train())
    collate = getattr(module, "collate", data.collate)
    size = cfg.batch_size // cfg.accumulate
    batches = [collate([dataset[0, i] for i in range(start, start + size)]) for start in range(0, cfg.batch_size, size)]
    if script == "soco":
        terms = module.train_step(cfg, model, optimizer, batches[0], 0.99, CPU)
    elif script == "dupr":
        terms = module.train_step(cfg, model, optimizer, batches, 0, CPU)
    else:
        terms = module.train_step(cfg, model, *step, optimizer, batches, CPU)
    return model, {name: value.item() for name, value in terms.items()}


@pytest.mark.parametrize(("script", "values"), (
    *((script, {"detector": "conditional_detr", "dec_layers": 1})
      for script in ("detreg", "updetr", "siamese_detr", "finetune")),
    ("detreg", {"detector": "detr", "stride": 4}),
    ("detreg", {"detector": "conditional_detr", "stride": 4, "backbone_norm": "bn"}),
    ("detreg", {"detector": "deformable_detr_ss", "dropout": 1, "max_prop": 30, "num_queries": 1}),
    ("detreg", {"num_feature_levels": 1, "accumulate": 2, "with_box_refine": True, "dec_layers": 1}),
    ("detreg", {"num_feature_levels": 9, "scales": 1, "max_size": 1, "patch_size": 1}),
    ("detreg", {"crop_scales": 1, "crop_range": (600, 600), "lambda_f": 0, "lambda_l1": 0, "lambda_giou": 0}),
    ("updetr", {"detector": "detr", "mask_ratio": 1, "lambda_rec": 0, "eos_coef": 0, "patch_size": 1}),
    ("updetr", {"stride": 8, "num_patches": 1, "batch_size": 1, "backbone_norm": "bn", "patch_size": 9}),
    ("siamese_detr", {"lambda_global": 0, "batch_size": 1, "scales": 1, "max_size": 1, "backbone_norm": "bn"}),
    ("siamese_detr", {"view_iou": 0.05, "scales": 16, "min_area": 1, "box_jitter": 1, "detector": "detr"}),
    ("siamese_detr", {"view_iou": 1, "num_regions": 1, "region_choice": "random", "lambda_region": 0}),
    ("soco", {"pipeline": "c4", "roi_size": 1, "star": True, "multi_view": True}),
    ("soco", {"fpn": False, "scale_aware": False, "box_head": False, "crop_area": (0, 0.001), "num_boxes": 20}),
    ("soco", {"synthetic_size": 1, "image_size": 33, "small_size": 33}),
    ("dupr", {"alpha": (1, 0, 0, 0), "beta": (0, 0, 0, 0), "queue_size": 1}),
    ("dupr", {"alpha": (0, 0, 0, 0), "beta": (0, 0, 1, 0), "queued_patches": 65536, "roi_sizes": (1, 1, 1, 1)})))
def test_what_is_accepted_takes_a_step(script, values):
    """Every parameter that learns has a gradient, without which DistributedDataParallel fails in the second step."""
    model, terms = first_step(script, small(script, **values))
    assert all(map(math.isfinite, terms.values())), terms
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(("script", "values", "text"), (
    ("detreg", {"hidden_dim": 32}, "--hidden_dim 32: Deformable DETR normalises in 32 groups"),
    ("detreg", {"nheads": 3}, "--hidden_dim 64 with --nheads 3"),
    ("detreg", {"batch_size": 1, "backbone_norm": "bn", "scales": 32}, "--batch_size 1: one image per process"),
    ("detreg", {"accumulate": 2, "backbone_norm": "bn", "max_size": 8}, "of which 8 pixels may leave BatchNorm one"),
    ("detreg", {"embedding_target": "swav_head"}, "--backbone_weights random has no such head"),
    ("detreg", {"crop_range": (48, 32)}, "--crop_range 48 32: give the smallest and the largest"),
    ("detreg", {"num_classes": 1}, "--num_classes 1: at least 2"),
    ("updetr", {"num_patches": 8}, "--num_queries 4 --num_patches 8: every patch needs"),
    ("updetr", {"num_patches": 1, "batch_size": 1, "backbone_norm": "bn"}, "--patch_size 16 leaves BatchNorm one"),
    ("siamese_detr", {"num_regions": 8}, "--num_queries 4 --num_regions 8: every region needs"),
    ("siamese_detr", {"batch_size": 1}, "the BatchNorm of L_g needs two"),
    ("finetune", {"hidden_dim": 32}, "--hidden_dim 32: Deformable DETR normalises")))
def test_what_cannot_take_a_step_is_refused(script, values, text):
    with pytest.raises(UserError, match=re.escape(text)):
        small(script, **values)


def test_a_descriptor_of_its_own_where_the_detector_ends_before_res3():
    """--stride 4: the descriptor's ResNet follows from --backbone_weights and the seed, as the detector's does."""
    cfg = small("detreg", detector="detr", stride=4)
    models = [detreg.build_models(cfg) for _ in range(2)]
    assert all(descriptor.dim == 128 and not any(p.requires_grad for p in descriptor.parameters())
               for _, descriptor in models)
    for one, two in zip(*(itertools.chain(*(m.state_dict().values() for m in pair)) for pair in models), strict=True):
        assert torch.equal(one, two)
