"""README.md and docs/: links lead somewhere, command lines have flags that exist, and the torchvision lines of
docs/checkpoints.md load what convert.py writes."""
import dataclasses
import functools
import importlib
import re
import shlex
import typing

import pytest
import torch

import convert
import probe
import segmentation
from conftest import ROOT
from test_convert import rcnn_checkpoint

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Those whose flags are the fields of their Config.
SCRIPTS = ("detreg", "updetr", "siamese_detr", "soco", "dupr", "finetune")
RUN = "pip install -r requirements.txt && python detreg.py --preset demo"
TEST = "pip install -r requirements.txt && python -m pytest"


def blocks(text, language=""):
    """The code blocks of a page that are marked as `language`."""
    return [code for name, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if name == language]


def prose(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def anchors(text):
    """The names under which GitHub links to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text):
    """(script without .py, its arguments) of every call in a page's code blocks, and of every `script.py --flag ...`
    between backticks."""
    lines = [line.split("#")[0] for block in blocks(text) for line in re.sub(r"\\\n", " ", block).splitlines()]
    starts = r"(python|torchrun|srun|pip|OMP_NUM_THREADS=\d+) "
    calls = [call for line in lines if re.match(starts, line) for call in line.split("&&")]
    calls += [span for span in re.findall(r"`([^`]+)`", prose(text)) if re.match(r"(.* )?[\w/]+\.py -", span)]
    found = [re.search(r"(?:^| )([\w/]+)\.py(?: (.*))?$", call.strip()) for call in calls]
    return [(call[1], call[2].split()) for call in found if call and call[2]]


@functools.cache
def knobs(script, task):
    """(module, type of each knob, their names) of a script with a Config, or of a task of probe.py."""
    module = importlib.import_module(script)
    config = probe.TASKS.get(task, segmentation.Config) if script == "probe" else module.Config
    return module, typing.get_type_hints(config), {f.name for f in dataclasses.fields(config)}


def wrong_flags(script, arguments):
    """What of a command line the script does not know: flags, presets, and values of flags that have a fixed list."""
    names = [a.removeprefix("--").split("=")[0].replace("-", "_") for a in arguments if a[:2] == "--" and a != "--help"]
    if script == "benchmarks/compare":  # what it starts is between quotes: its own parser, which has their parsers
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "benchmarks")
            importlib.import_module("compare").parse(shlex.split(" ".join(arguments)))
        return []
    if script not in (*SCRIPTS, "segmentation", "probe"):
        own = (script, "proposals") if script == "evaluation" else (script,)  # proposals.add_generator_flags
        source = "".join((ROOT / f"{name}.py").read_text() for name in own)
        return [name for name in names if f'"--{name}"' not in source]
    module, hints, fields = knobs(script, arguments[0])
    wrong = [name for name in names if name.removeprefix("no_") not in fields]
    for flag, value in zip(arguments, arguments[1:]):
        name = flag.removeprefix("--").replace("-", "_")
        known = tuple(module.PRESETS) if name == "preset" else typing.get_args(hints.get(name))
        # A capital letter, as in `--detector D`, stands for any of them.
        if known and all(isinstance(k, str) for k in known) and value not in known and not value.isupper():
            wrong.append(f"{name} {value}")
    return wrong


def test_the_front_door():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert {f"{RUN}\n", f"{TEST}\n"} <= set(blocks(text))
    picture, = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG") and (ROOT / picture).stat().st_size < 300_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_commands(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{link}: no such file"
            assert not anchor or anchor in anchors(target.read_text()), f"{link}: no such heading"
    for script, arguments in commands(text):
        assert (ROOT / f"{script}.py").is_file(), script
        assert not wrong_flags(script, arguments), f"{script}.py {' '.join(arguments)}"


def test_the_checks_see_what_is_wrong():
    text = ("```\ntorchrun --nproc_per_node=8 soco.py --data x \\\n  --preset official --nonsense 1  # --no\n```\n"
            "`detreg.py --strategy best`, `convert.py` alone")
    first, second = commands(text)
    assert first == ("soco", ["--data", "x", "--preset", "official", "--nonsense", "1"])
    assert second == ("detreg", ["--strategy", "best"])
    assert wrong_flags(*first) == ["nonsense", "preset official"]
    assert wrong_flags("detreg", ["--strategy", "best", "--no_cache_proposals"]) == ["strategy best"]
    assert wrong_flags("convert", ["FILE", "--to", "hf", "--from", "x"]) == ["from"]
    assert anchors("# A B\n## Siamese DETR's Tables 1, 2\n") == {"a-b", "siamese-detrs-tables-1-2"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_method_page_lists_all_deviations(script):
    """D1, D2, ... (F1, ... of finetune.py) in order; whatever number the script mentions is on its page."""
    letter = "F" if script == "finetune" else "D"
    page = (ROOT / "docs" / "methods" / f"{script}.md").read_text()
    listed = [int(n) for n in re.findall(rf"^- \*\*{letter}(\d+)\*\* ", page, re.M)]
    named = {int(n) for n in re.findall(rf"\b{letter}(\d+)\b", (ROOT / f"{script}.py").read_text())}
    assert listed == list(range(1, len(listed) + 1)) and named <= set(listed)


@pytest.mark.parametrize(("detector", "box_head"), (
    ("faster_rcnn_fpn", "2fc"), ("faster_rcnn_fpn", "4conv1fc"), ("mask_rcnn_fpn", "2fc"),
    ("mask_rcnn_fpn", "4conv1fc"), ("retinanet_fpn", "2fc"), ("fcos_fpn", "2fc"), ("faster_rcnn_c4", "2fc"),
    ("mask_rcnn_c4", "2fc")))
def test_torchvision_as_the_docs_load_it(detector, box_head, tmp_path, capsys, monkeypatch):
    """The lines of docs/checkpoints.md build torchvision's own detector, which takes every tensor and whose parts then
    compute what ours compute."""
    torch.manual_seed(5)
    for start in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_"):
        # 45 million draws
        monkeypatch.setattr(torch.nn.init, start, lambda tensor, *args, **kwargs: tensor.detach().zero_())
    ours = rcnn_checkpoint(tmp_path / "last.pt", detector, box_head=box_head, arch="resnet50", fpn_channels=256,
                           head_dim=1024, anchor_size=32)
    convert.main([str(tmp_path / "last.pt"), "--to", "torchvision", "--out", str(tmp_path / "tv.pth")])
    labels = "labels: 1 cell, 2 platelet, 3 cat" if "rcnn" in detector else "labels: 0 cell, 1 platelet"
    assert labels in capsys.readouterr().out
    space = {}
    code, = blocks((ROOT / "docs" / "checkpoints.md").read_text(), "python")
    exec(code, space)
    with torch.device("meta"):
        theirs = space["MODELS"][detector if box_head == "2fc" else f"{detector} --box_head {box_head}"](3)
    state = torch.load(tmp_path / "tv.pth", weights_only=True)
    # strict
    theirs.load_state_dict(state, assign=True)
    assert {k for k in state if ".mask_head.res5." not in k} == set(ours.state_dict())
    theirs.eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        mine, other = ours.backbone(image), theirs.backbone(image)
        other = other if isinstance(other, dict) else {"0": other}
        assert mine.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in mine.items())
        maps = list(mine.values())
        if "rcnn" not in detector:
            torch.testing.assert_close(theirs.head(maps)["cls_logits"], ours.head(maps)["cls_logits"])
            return
        for a, b in zip(theirs.rpn.head(maps), ours.rpn.head(maps)):
            torch.testing.assert_close(a, b)
        pooled = torch.randn(1, 1024, 6, 6) if detector.endswith("_c4") else torch.randn(1, 256, 7, 7)
        for a, b in zip(*(heads.box_predictor(heads.box_head(pooled)) for heads in (theirs.roi_heads, ours.roi_heads))):
            torch.testing.assert_close(a, b)
        if detector.startswith("mask"):
            head = theirs.roi_heads.mask_head(pooled)
            own_head = ours.roi_heads.box_head.res5 if detector.endswith("_c4") else ours.roi_heads.mask_head
            mine = own_head(pooled)
            torch.testing.assert_close(theirs.roi_heads.mask_predictor(head), ours.roi_heads.mask_predictor(mine))
