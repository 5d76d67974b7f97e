"""docs/recipes.md: 146 rows, every command line of which the scripts' own parsers take; what a line starts from is what
another line leaves; the recipes resolve to the papers' numbers."""
import functools
import importlib
import re
import shlex
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_flags import METHODS, SCRIPTS, Caught, parse

import convert
import finetune
import probe
import rcnn
import run
import segmentation
from common import UserError

TEXT = (ROOT / "docs" / "recipes.md").read_text()
# What a detector's checkpoint says of its model, as convert.architecture reads it off the tensors.
ARCHITECTURE = ("detector", "arch", "backbone_norm", "num_queries", "hidden_dim", "enc_layers", "dec_layers",
                "dim_feedforward")


def table_rows() -> list[list[str]]:
    """The cells of every row that begins with a number."""
    lines = re.findall(r"^\| \d+ \|.*\|$", TEXT, re.M)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def unrolled(line: str) -> list[str]:
    """`for x in a b; do COMMAND; done` as its commands, another line as it is."""
    loop = re.fullmatch(r"for (\w) in ([^;]+); do (.+); done", line)
    return [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()] if loop else [line]


@functools.cache
def command_lines() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(script without .py, its arguments) of every command of the tables, in their order, each once."""
    spans = [span for *_, commands, _, _ in table_rows() for span in re.findall(r"`([^`]+)`", commands)]
    words = [shlex.split(line) for span in spans for line in unrolled(span)]
    assert all(w[0] == "python" and w[1].endswith(".py") for w in words)
    return tuple(dict.fromkeys((w[1].removesuffix(".py"), tuple(w[2:])) for w in words))


def value_of(flag: str, arguments: tuple[str, ...]) -> str | None:
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


def fake_init(configs: dict[str, tuple], path: str, keep_queries: bool = False, detector: str = ""):
    """finetune.read_init() of a checkpoint that another line leaves, from that line's configuration."""
    script, cfg = configs[path]
    init = convert.Checkpoint(path, "ours", {}, {}, {"script": script, "config": vars(cfg), "step": 1})
    if rcnn.is_rcnn(detector) or rcnn.is_rcnn(getattr(cfg, "detector", "")):
        return init, {"detector": detector, "arch": cfg.arch}
    names = [*ARCHITECTURE, *(["pre_norm"] if cfg.detector == "detr" else [])]
    free = {"num_queries"} if getattr(cfg, "num_patches", 0) == 1 and not keep_queries else set()
    return init, {name: getattr(cfg, name) for name in names if name not in free}


def parse_other(script: str, arguments: list[str]) -> Any:
    """The flags of a script whose knobs are not a Config of its own, by its own parser."""
    if script == "benchmarks/train_step":
        steps = []
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "benchmarks")
            train_step = importlib.import_module("train_step")
            patch.setattr(train_step, "method_step", lambda args, rest: steps.append((args.method, rest)))
            patch.setattr(sys, "argv", [script, *arguments])
            train_step.main()
        return parse(*steps[0])
    if script == "benchmarks/compare":
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "benchmarks")
            return importlib.import_module("compare").parse(arguments)  # by the parsers of the scripts it starts
    if script == "probe":
        task, found = probe.parse(arguments)
        return segmentation.parse(found) if task == "segment" else found

    def catch(self, argv=None):
        raise Caught(self, argv)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Parser, "parse_args", catch)
        with pytest.raises(Caught) as caught:
            importlib.import_module(script).main(arguments)
    parser, argv = caught.value.args
    return parser.parse_args(argv)


@pytest.fixture(scope="module")
def taken():
    """({(script, arguments): what its own parser makes of them}, {line: why it does not take it}); pretrainings first,
    then what starts from them."""
    configs, found, refused = {}, {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "read_init", functools.partial(fake_init, configs))
        for _ in range(3):  # few-shot: from a base training, which is from a pretraining
            for script, arguments in command_lines():
                start = value_of("--init_from", arguments)
                if (script, arguments) in found or script == "finetune" and start and start not in configs:
                    continue
                try:
                    cfg = (parse if script in SCRIPTS else parse_other)(script, list(arguments))
                except (UserError, SystemExit) as error:
                    refused[" ".join([script, *arguments])] = error
                    continue
                found[script, arguments] = cfg
                if script in SCRIPTS:
                    configs.setdefault(f"{cfg.out}/last.pt", (script, cfg))
    return found, refused


@pytest.fixture
def resolved(taken):
    return taken[0]


def test_the_tables_list_146_experiments():
    rows = table_rows()
    assert [row[0] for row in rows] == [str(n) for n in range(1, 147)] and {len(row) for row in rows} == {5}
    assert all(re.search(r"`|none: \w", row[2]) and row[3] and row[4] for row in rows)
    # what stands under "here" was measured here, or nothing was
    known = (ROOT / "benchmarks" / "claims.md").read_text()
    for *_, here in rows:
        numbers = re.findall(r"\b\d+\.\d{3}\b", here)
        assert bool(numbers) != here.startswith("not rerun") and all(number in known for number in numbers), here


def test_every_command_line_is_taken(taken):
    found, refused = taken
    assert not refused and set(found) == set(command_lines()) and len(found) > 400


def test_what_a_line_reads_another_line_leaves(resolved):
    """Checkpoints, runs and proposal stores; where two lines leave one under the same name, they are the same run."""
    made = {}
    for (script, arguments), cfg in resolved.items():
        if script in SCRIPTS:
            made.setdefault(str(cfg.out), []).append((script, arguments, cfg))
    stores = {value_of("--out", arguments) for script, arguments in resolved if script == "proposals"}
    for script, arguments in resolved:
        for word in arguments:
            word = word.split("=")[-1]
            if word.startswith("out/") and word != value_of("--out", arguments):
                makers = made[word.removesuffix("/last.pt")]
                assert len(makers) == 1, (word, [m[:2] for m in makers])
                assert makers[0][0] in METHODS or word.endswith("last.pt") or script == "figures"
        assert value_of("--proposal_store", arguments) in {None, *stores}


# What the papers and the released codes have (facts of the papers' texts and codes), by the line of the table.
DETR = {"lr": 1e-4, "lr_backbone": 5e-5, "batch_size": 32, "num_queries": 100}
DEFORMABLE = {"lr": 2e-4, "lr_backbone": 2e-5, "batch_size": 32, "num_queries": 300}
SGD = {"lr": 0.02, "batch_size": 16}
VALUES = {
    "detreg.py --data imagenet100": {"epochs": 50, "lr_drop": 40, "lr": 2e-4, "lr_backbone": 0.0, "batch_size": 192,
                                     "max_prop": 30, "lambda_e": 1.0, "num_queries": 300},
    "detreg.py --data imagenet": {"epochs": 5},
    "detreg.py --data coco": {"epochs": 50, "lr_drop": 40},
    "detreg.py --data imagenet --detector detr --out out/detreg-detr": {"epochs": 60, "lr": 1e-4, "num_queries": 100},
    "finetune.py --data voc": DEFORMABLE | {"epochs": 100, "lr_drop": 70, "difficult": "ignore"},
    "finetune.py --data voc --labels_percent 10 --init_from out/detreg-imagenet100/last.pt":
        {"epochs": 200, "lr_drop": 150, "batch_size": 8},
    "finetune.py --data coco --init_from out/detreg-imagenet100/last.pt": DEFORMABLE | {"epochs": 50, "lr_drop": 40},
    **{f"finetune.py --data coco --labels_percent {p} --init_from out/detreg-coco/last.pt":
       {"epochs": epochs, "lr_drop": epochs, "batch_size": 24} for p, epochs in ((1, 2000), (2, 1000), (5, 500),
                                                                                 (10, 400))},
    "finetune.py --data coco --labels_percent 1 --protocol semi_supervised --seed 3 --init_from out/detreg-coco/last.pt"
    " --out out/seed3": {"epochs": 200, "lr_drop": 150, "seed": 3},
    "finetune.py --data coco --labels_percent 10 --protocol low_data --out out/fig3-swav-10":
        {"epochs": 150, "lr_drop": 150},
    "updetr.py --data imagenet": {"epochs": 60, "lr_drop": 40, "lr": 1e-4, "batch_size": 256, "num_patches": 10},
    "updetr.py --data imagenet --epochs 15 --lr_drop 10 --preset single --out out/updetr15-single":
        {"epochs": 15, "lr_drop": 10, "num_patches": 1, "num_queries": 3},
    "finetune.py --data voc --detector detr --out out/voc-detr-150":
        DETR | {"epochs": 150, "lr_drop": 100, "difficult": "count"},
    "finetune.py --data voc --protocol updetr_long --init_from out/updetr-imagenet/last.pt --out out/voc-updetr-300":
        DETR | {"epochs": 300, "lr_drop": 200, "difficult": "count"},
    "finetune.py --data coco --detector detr --protocol detr_long --backbone_weights imagenet":
        {"epochs": 500, "lr_drop": 400, "lr": 1e-4, "lr_backbone": 1e-5, "batch_size": 64},
    **{f"finetune.py --data coco --detector faster_rcnn_fpn --backbone_weights imagenet --schedule {n}x":
       SGD | {"steps": 90000 * n, "lr_drops": ((90000 * n - 60000) / 90000 / n, (90000 * n - 20000) / 90000 / n)}
       for n in (3, 9)},
    "siamese_detr.py --data imagenet --proposal_store proposals/imagenet-edges":
        {"epochs": 60, "lr_drop": 40, "batch_size": 256, "lambda_region": 5.0, "lambda_global": 10.0,
         "num_queries": 100, "num_regions": 10},
    "siamese_detr.py --data coco --proposal_store proposals/coco-edges":
        {"epochs": 65, "lr_drop": 43.3, "batch_size": 64, "lambda_region": 3.0, "lambda_global": 0.3},
    "finetune.py --data coco --detector detr --protocol siamese": DETR | {"epochs": 150, "lr_drop": 120},
    "finetune.py --data voc --detector detr --protocol siamese":
        DETR | {"epochs": 50, "lr_drop": 40, "difficult": "count"},
    "finetune.py --data voc --detector detr --protocol siamese_long":
        DETR | {"epochs": 150, "lr_drop": 120, "difficult": "count"},
    "finetune.py --data voc --detector conditional_detr --protocol siamese --out out/voc-scratch":
        DETR | {"epochs": 50, "lr_drop": 40, "difficult": "count"},
    "finetune.py --data coco --detector conditional_detr --num_queries 300 --protocol siamese":
        DETR | {"epochs": 50, "lr_drop": 40, "num_queries": 300},
    "finetune.py --data voc --protocol siamese --init_from out/detreg-imagenet/last.pt":
        DEFORMABLE | {"epochs": 50, "lr_drop": 40, "difficult": "count"},
    "finetune.py --data voc --detector dab_deformable_detr --protocol siamese":
        {"epochs": 50, "lr_drop": 40, "lr": 1e-4, "num_queries": 300, "difficult": "count"},
    "soco.py --data imagenet --proposal_store proposals/imagenet-soco":
        {"epochs": 100, "warmup_epochs": 10, "lr": 1.0, "batch_size": 2048, "num_boxes": 4, "ema_momentum": 0.99},
    "soco.py --data imagenet --star --proposal_store proposals/imagenet-soco --out out/soco-star": {"epochs": 400},
    "soco.py --data coco_unlabeled --epochs 530 --proposal_store proposals/coco-soco --out out/soco-coco-530":
        {"epochs": 530, "warmup_epochs": 10},
    "soco.py --data imagenet --train_images 241690 --proposal_store proposals/imagenet-soco --out out/soco-subset":
        {"epochs": 100, "train_images": 118287 + 123403},
    **{f"finetune.py --data coco --detector mask_rcnn_fpn{flag} --init_from out/soco-star/last.pt":
       SGD | {"steps": 90000 * n, "weight_decay": 2.5e-5, "box_head": "4conv1fc", "warmup_iters": 1000}
       for flag, n in (("", 1), (" --schedule 4x", 4), (" --labels_percent 5", 1))},
    "finetune.py --data voc --detector faster_rcnn_c4 --init_from out/soco-c4/last.pt":
        SGD | {"steps": 24000, "weight_decay": 1e-4, "lr_drops": (3 / 4, 11 / 12), "difficult": "ignore"},
    "finetune.py --data lvis --detector mask_rcnn_fpn --init_from out/soco-star/last.pt":
        SGD | {"steps": 90000, "weight_decay": 2.5e-5, "box_head": "4conv1fc"},
    "finetune.py --data coco --detector retinanet_fpn --init_from out/soco-star/last.pt":
        {"epochs": 12, "lr": 0.01, "batch_size": 16, "lr_drops": (8 / 12, 11 / 12), "scales": (800,)},
    "dupr.py --data imagenet": {"epochs": 200, "lr": 0.06, "batch_size": 256, "queue_size": 65536,
                                "alpha": (0.1, 0.4, 0.7, 1.0), "beta": (0.0, 0.0, 1.0, 1.0)},
    "dupr.py --data coco": {"epochs": 2000},
    "finetune.py --data coco --detector mask_rcnn_fpn --init_from out/dupr-imagenet/last.pt --schedule 2x":
        SGD | {"steps": 180000, "weight_decay": 1e-4, "box_head": "2fc", "scales": (640, 672, 704, 736, 768, 800)},
    "finetune.py --data coco --detector retinanet_fpn --init_from out/dupr-imagenet/last.pt":
        {"steps": 90000, "lr": 0.01},
    **{f"finetune.py --data coco --detector mask_rcnn_fpn --labels_percent {p} --init_from out/dupr-imagenet/last.pt":
       SGD | {"steps": steps} for p, steps in ((1, 15000), (10, 60000))},
    **{f"finetune.py --data coco --classes all --shots {k} --shot_seed 0 --protocol few_shot --init_from out/{start}"
       "/last.pt": {"epochs": epochs, "lr_drop": drop, "lr": 2e-4, "shots": k} for k in (10, 30)
       for start, epochs, drop in (("detreg-base", 150, 140), ("detreg-imagenet100", 1000, 990))},
    "probe.py linear moco_v2_200 --data imagenet --features mean":
        {"epochs": 100, "lr": 30.0, "lr_drops": (60, 80), "weight_decay": 0.0, "batch_size": 256},
    "probe.py linear moco_v2_200 --data places365": {"epochs": 56, "lr": 0.01},
    "probe.py segment moco_v2_200 --data cityscapes": {"steps": 90000, "lr": 0.01, "batch_size": 16,
                                                       "lr_drops": (0.7, 0.9), "crop_size": 769},
    "finetune.py --data cityscapes --detector mask_rcnn_fpn --init_from out/dupr-imagenet/last.pt":
        {"steps": 24000, "lr": 0.01, "batch_size": 8, "lr_drops": (3 / 4,), "max_size": 2048, "eval_size": 1024,
         "scales": tuple(range(800, 1025, 32))},
}


@pytest.mark.parametrize("line", VALUES)
def test_recipes_resolve_to_the_papers_values(line, resolved):
    script, *arguments = shlex.split(line)
    cfg = resolved[script.removesuffix(".py"), tuple(arguments)]
    assert {name: getattr(cfg, name) for name in VALUES[line]} == {
        name: pytest.approx(value) if isinstance(value, (float, tuple)) and name != "scales" else value
        for name, value in VALUES[line].items()}


def test_lines_are_unrolled_as_a_shell_does():
    line = "for p in 1 10; do python finetune.py --labels_percent $p --out out/x-$p; done"
    assert unrolled(line) == [f"python finetune.py --labels_percent {p} --out out/x-{p}" for p in (1, 10)]
    assert unrolled("python a.py --b c") == ["python a.py --b c"]


@pytest.mark.parametrize("line", ("finetune.py --detector conditional_detr", "updetr.py", "siamese_detr.py"))
def test_numbers_of_parameters(line):
    """In millions, as the table has them."""
    script, _, words = line.partition(".py")
    cfg, module = parse(script, [*words.split(), "--backbone_weights", "random"]), importlib.import_module(script)
    with torch.device("meta"):
        if script == "finetune":
            model, _ = finetune.build_model(cfg, None, [{"id": i, "name": str(i)} for i in range(1, 81)])
        else:
            model = module.build_models(cfg)[0]
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or everything) for everything in (1, 0)]
    assert f"| `{line}` | {counts[0] / 1e6:.2f} | {counts[1] / 1e6:.2f} |" in TEXT
