"""A corpus of broken and odd inputs, each with its outcome, through main(argv) as a user's command runs them. Three
outcomes there are: the input is used, it is skipped and counted, or the run ends in one sentence that names file and
reason, with exit code 2."""
import ast
import importlib
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import annotations
import data
import detreg
import finetune
import proposals
import run
from conftest import ROOT, SMALL, flags

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**SMALL, "preset": "demo", "num_feature_levels": 3, "scales": (48,), "max_size": 96, "crop_scales": (64,),
        "crop_range": (40, 60), "patch_size": 16, "max_prop": 6, "proposal_grid": 64, "no_cache_proposals": (),
        "backbone_weights": "random", "num_workers": 0, "seed": 3, "probe_images": 0, "batch_size": 2, "max_steps": 1}
RED, WHITE, GREY = (255, 0, 0), (255, 255, 255), (90, 90, 90)


class Stop(Exception):
    """The end of a test that needs no training."""


# ==== Images: one odd file among 119 good ones, so that a single unreadable one is 0.8 % ====

def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that declares a size and has next to no pixels."""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + b"".join(more) + chunk(
                b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


def red(width: int = 40, height: int = 20) -> Image.Image:
    return Image.new("RGB", (width, height), RED)


def noise(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


def palette() -> Image.Image:
    image = Image.new("P", (40, 20))
    image.putpalette([9, 9, 9, 255, 0, 0])
    return image


def turned(form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned by 90 degrees clockwise
    return encoded(red(), form, exif=exif)


def deep(depth: int, *shape: int) -> bytes:
    return cv2.imencode(".png", np.full(shape, 90 * 257, np.uint16))[1].tobytes()


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (40, 20), (0, 0, 255))], "duration": 100}
TEXT_BOMB = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 50_000_000))
SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
# file name, its content (a str: a link to there; None: a pipe), outcome:
# "skipped", or "used" with the size and the first pixel
IMAGES = [
    ("grey.png", encoded(Image.new("L", (40, 20), 90), "PNG"), "used", (40, 20), GREY),
    ("one bit.png", encoded(Image.new("1", (40, 20), 1), "PNG"), "used", (40, 20), WHITE),
    ("16 bit.png", deep(16, 20, 40), "used", (40, 20), GREY),
    ("16 bit colour.png", deep(16, 20, 40, 3), "used", (40, 20), GREY),
    ("cmyk.jpg", encoded(Image.new("CMYK", (40, 20), (0, 255, 255, 0)), "JPEG"), "used", (40, 20), RED),
    ("palette.png", encoded(palette(), "PNG"), "used", (40, 20), (9, 9, 9)),
    ("palette, transparent.png", encoded(palette(), "PNG", transparency=0), "used", (40, 20), WHITE),
    ("alpha.png", encoded(Image.new("RGBA", (40, 20), (0, 0, 0, 0)), "PNG"), "used", (40, 20), WHITE),
    ("alpha.webp", encoded(Image.new("RGBA", (40, 20), (0, 0, 0, 0)), "WEBP", lossless=True), "used", (40, 20), WHITE),
    ("animated.webp", encoded(red(), "WEBP", lossless=True, **FRAMES), "used", (40, 20), RED),
    ("animated.png", encoded(red(), "PNG", **FRAMES), "used", (40, 20), RED),
    ("a gif.png", encoded(red(), "GIF", **FRAMES), "used", (40, 20), RED),
    ("a png.jpg", encoded(red(), "PNG"), "used", (40, 20), RED),
    ("a jpg.webp", encoded(red(), "JPEG"), "used", (40, 20), RED),
    ("a tiff.bmp", encoded(Image.new("F", (40, 20), 7.0), "TIFF"), "used", (40, 20), (0, 0, 0)),
    ("progressive.jpg", encoded(red(), "JPEG", progressive=True), "used", (40, 20), RED),
    ("EXIF.JPEG", turned("JPEG"), "used", (20, 40), RED),
    ("exif.png", turned("PNG"), "used", (20, 40), RED),
    ("broken exif.jpg", encoded(red(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), "used", (40, 20), RED),
    ("1x1.png", encoded(red(1, 1), "PNG"), "used", (1, 1), RED),
    ("1x5000.png", encoded(red(1, 5000), "PNG"), "used", (1, 5000), RED),
    ("5000x1.png", encoded(red(5000, 1), "PNG"), "used", (5000, 1), RED),
    ("flat.bmp", encoded(red(), "BMP"), "used", (40, 20), RED),  # no two proposals: detreg.py draws another image (D9)
    ("grüße 文字 🙂.png", encoded(red(), "PNG"), "used", (40, 20), RED),
    (os.fsdecode(b"not utf-8 \xff.png"), encoded(red(), "PNG"), "used", (40, 20), RED),
    ("a link.png", "000.png", "used", (48, 48), None),
    ("no end.png", encoded(red(), "PNG")[:-12], "used", (40, 20), RED),       # all pixels are there
    ("zero bytes.jpg", b"", "skipped"),
    ("zeros.jpg", bytes(1000), "skipped"),
    ("half.jpg", encoded(noise(), "JPEG")[:900], "skipped"),
    ("half.png", encoded(noise(), "PNG")[:900], "skipped"),
    ("half.webp", encoded(noise(), "WEBP", lossless=True)[:900], "skipped"),
    ("half.bmp", encoded(noise(), "BMP")[:900], "skipped"),
    ("a page.jpg", b"<!DOCTYPE html><html>404</html>", "skipped"),
    ("a drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "skipped"),
    ("a program.jpg", SCRIPT, "skipped"),                                    # EPS: Pillow would hand it to Ghostscript
    ("flipped bits.png", encoded(red(), "PNG")[:20] + b"\xff" + encoded(red(), "PNG")[21:], "skipped"),
    ("a bomb.png", png_of(50_000, 50_000), "skipped"),                       # 7.5 GB of pixels in a file of 1 kB
    ("declares more than it has.png", png_of(3000, 3000), "skipped"),
    ("0x0.png", png_of(0, 0), "skipped"),
    ("a text bomb.png", png_of(10, 10, TEXT_BOMB), "skipped"),
    ("nan.bmp", encoded(Image.new("F", (4, 4), float("nan")), "TIFF"), "skipped"),
    ("two\nlines \x1b[31m.jpg", b"", "skipped"),
    (os.fsdecode(b"no utf-8 \xff.jpg"), b"", "skipped"),
    ("link to nothing.png", "nowhere.png", "skipped"),
    ("link to itself.png", "003~link to itself.png", "skipped"),
    ("a pipe.png", None, "skipped"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """119 images, which leave the place to the fifth: that one is in the first batch."""
    folder = tmp_path_factory.mktemp("good")
    picture = data.SyntheticScenes(1, 48).load(0)
    picture.save(folder / "000.png")
    for k in range(1, 119):
        os.link(folder / "000.png", folder / f"{k:03d}.png")
    first = next(iter(data.StepSampler(120, 2, 1, seed=TINY["seed"])))
    assert 4 in [index for _, index in first]
    return folder


@pytest.fixture
def quick(monkeypatch):
    """detreg.main without its model: what remains is all that an image passes through."""
    layer = torch.nn.Linear(1, 1)
    batches = []
    monkeypatch.setattr(detreg, "build_models", lambda cfg: (layer, layer))
    monkeypatch.setattr(detreg, "train_step", lambda cfg, model, descriptor, criterion, optimizer, micro, *_:
                        batches.extend(micro) or {k: torch.zeros(())
                                                  for k in ("loss", "loss_bbox", "loss_object_embedding")})
    return batches


@pytest.mark.parametrize("case", IMAGES, ids=[ascii(case[0]) for case in IMAGES])
def test_image(case, good, quick, tmp_path, monkeypatch, capsys):
    name, content, outcome, *expected = case
    folder = tmp_path / "images"
    shutil.copytree(good, folder, copy_function=os.link)
    path = folder / f"003~{name}"
    if content is None:
        os.mkfifo(path)
    else:
        os.symlink(content, path) if isinstance(content, str) else path.write_bytes(content)
    seen, decode = {}, data.decode_image
    monkeypatch.setattr(data, "decode_image", lambda p, *a, **k: seen.setdefault(os.fspath(p), decode(p, *a, **k)))
    run.cli(lambda: proposals.main(["--data", str(folder), "--method", "random", "--out", str(tmp_path / "store")]))
    store = proposals.ProposalStore.open(tmp_path / "store")
    errors = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    run.cli(lambda: detreg.main(flags({**TINY, "data": folder, "out": tmp_path / "out"})))
    done = capsys.readouterr()
    errors += [line for line in done.err.splitlines() if "warning: " in line]
    assert len(quick) == 1 and torch.isfinite(quick[0]["images"]).all()
    if outcome == "used":
        image = seen[str(path)]
        assert image.mode == "RGB" and image.size == expected[0] and store.header["unreadable"] == 0 and errors == []
        assert expected[1] is None or np.abs(np.subtract(image.getpixel((0, 0)), expected[1])).max() <= 3
        assert len(store.boxes(4, image.size[::-1])) == 300 and "skipped" not in done.out
    else:
        assert str(path) not in seen and store.header["unreadable"] == 1 and len(store.boxes(4, (9, 9))) == 0
        # by each of the two commands
        assert len(errors) == 2 and all(f"skipped {run.printable(str(path))}: " in line for line in errors)
        assert done.out.splitlines()[-1].startswith(f"skipped 1 of 120 images: {run.printable(str(path))}: ")
        assert name != "a program.jpg" or "UnidentifiedImageError" in errors[0]  # not even looked for Ghostscript


def used(name: str) -> bytes:
    return next(content for file, content, *_ in IMAGES if file == name)


def test_one_step_on_all_of_them_at_once(tmp_path):
    """The real model, on what the table calls used: the loss is finite."""
    for k, (name, content, outcome, *_) in enumerate(IMAGES):
        if outcome == "used" and isinstance(content, bytes):
            (tmp_path / f"{k} {name}").write_bytes(content)
    count = len(list(tmp_path.iterdir()))
    assert count > 20
    detreg.main(flags({**TINY, "data": tmp_path, "out": tmp_path / "out", "batch_size": count,
                       "proposal_method": "random"}))
    line = json.loads((tmp_path / "out/log.jsonl").read_text())
    assert 0 < line["loss"] < 1e3 and 0 < line["grad_norm"] < 1e6


@pytest.mark.parametrize("script", ("updetr", "siamese_detr", "soco", "dupr"))
def test_every_method_skips_and_counts(script, good, tmp_path, capsys):
    """As detreg.py in test_image, here with the model:
    a step on three images and one drawn for the unreadable fourth."""
    folder, values = tmp_path / "images", importlib.import_module(f"test_{script}").RUN
    shutil.copytree(good, folder, copy_function=os.link)
    (folder / "003~bad.jpg").write_bytes(b"")
    values = {k: v for k, v in values.items() if k not in ("proposal_method", "cache_proposals")} | {
        "data": folder, "out": tmp_path / "out", "batch_size": 4, "max_steps": 1,
        "probe_images": 0, "seed": TINY["seed"]}
    values |= {} if script in ("updetr", "dupr") else {"proposal_method": "random", "no_cache_proposals": ()}
    run.cli(lambda: importlib.import_module(script).main(flags(values)))
    assert re.fullmatch(r"skipped 1 of 120 images: \S+/003~bad.jpg: UnidentifiedImageError: .*",
                        capsys.readouterr().out.splitlines()[-1])
    assert math.isfinite(json.loads((tmp_path / "out/log.jsonl").read_text())["loss"])


def test_an_image_that_may_not_be_read(good, quick, tmp_path, monkeypatch, capsys):
    """root may read everything: the refusal is played."""
    opened = Image.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith("004.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(data.Image, "open", refuse)
    run.cli(lambda: detreg.main(flags({**TINY, "data": good, "out": tmp_path / "out"})))
    assert re.fullmatch(r"skipped 1 of 119 images: \S+004.png: PermissionError: .*",
                        capsys.readouterr().out.splitlines()[-1])


def test_too_many_are_an_error_that_names_them(good, quick, tmp_path, fails):
    for k in range(20):
        (tmp_path / f"{k}.png").write_bytes(used("grey.png") if k != 7 else b"")
    for main, argv in ((proposals.main, ["--data", tmp_path, "--method", "random", "--out", tmp_path / "store"]),
                       (detreg.main, flags({**TINY, "data": tmp_path, "out": tmp_path / "out", "batch_size": 20,
                                            "proposal_method": "random"}))):
        message = fails(main, argv)
        assert (f"1 of 20 images cannot be read (more than 1 %), the first: {tmp_path / '7.png'}: "
                "UnidentifiedImageError" in message)


@pytest.mark.parametrize("workers", (0, 1))
def test_no_image_can_be_read(workers, tmp_path, fails, quick):
    for k in range(4):
        (tmp_path / f"{k}.png").write_bytes(b"")
    argv = flags({**TINY, "data": tmp_path, "out": tmp_path / "out", "num_workers": workers})
    assert "11 images in a row cannot be used" in fails(detreg.main, argv)


# ==== Folders and lists: which images a data set has ====

def tree(root: Path, *files: str, links: dict[str, str] = {}) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(used("grey.png"))
    for link, target in links.items():
        (root / link).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target, root / link)


FOLDERS = {  # what is in it, and which images are used, or the error
    "the same name in two folders": (dict(files=["a/x.png", "b/x.png"]), ["a/x.png", "b/x.png"]),
    "a link to the folder around it": (dict(files=["a/x.png"], links={"a/up": "..", "a/here": "."}), ["a/x.png"]),
    "links in a circle": (dict(files=["a/x.png", "b/y.png"], links={"a/b": "../b", "b/a": "../a"}),
                          ["a/b/y.png", "a/x.png"]),
    "a link to a folder that is there too": (dict(files=["a/x.png"], links={"b": "a"}), ["a/x.png"]),
    "a link that leads out": (dict(files=["x.png"], links={"out": "{good}"}), ["out/000.png", "... 120"]),
    "hidden files, other files": (dict(files=["x.png", ".y.png", "._x.png", ".git/z.png", "lost+found/z.png",
                                             "x.png.part", "x.gif", "x.tif", "x.txt"]), ["x.png"]),
    "endings in capitals": (dict(files=["a.PNG", "b.Jpeg", "c.JPG"]), ["a.PNG", "b.Jpeg", "c.JPG"]),
    "a folder named like an image": (dict(files=["x.png/y.png"]), ["x.png/y.png"]),
    "nothing but gifs": (dict(files=["x.gif"]), "no images in .*images. Looked for .jpg .jpeg .png .webp .bmp"),
    "nothing": ({}, "no images in .*images"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder(name, good, tmp_path, fails):
    content, outcome = FOLDERS[name]
    root = tmp_path / "images"
    root.mkdir()
    tree(root, *content.get("files", ()), links={k: v.format(good=good) for k, v in content.get("links", {}).items()})
    argv = ["--data", str(root), "--method", "random", "--out", str(tmp_path / "store")]
    if isinstance(outcome, str):
        assert re.search(outcome, fails(proposals.main, argv))
        return
    keys, store = data.open_images(str(root), None).keys, proposals.main(argv)
    assert len(store) == len(keys) and (keys == outcome or (keys[0], f"... {len(keys)}") == tuple(outcome))


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch, fails):
    """Leaving its images out without a word would be another data set. The refusal is played,
    as root may list everything."""
    tree(tmp_path, "a/x.png", "b/y.png")
    listed = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = fails(detreg.main, flags({**TINY, "data": tmp_path, "out": tmp_path / "out"}))
    assert f"{tmp_path / 'b'}: this folder cannot be listed (Permission denied)" in message


LISTS = {  # the text of images/list.txt, and the images used, or the error
    "below it, beside it, absolute": (b"x.png\n../y.png\n{root}/images/z.gif\n", ["../y.png", "x.png", "z.gif"]),
    "the same line twice, ./ and blanks": (b"x.png\n  x.png \n./x.png\n", ["x.png"]),
    "byte order mark, CRLF, comments, "
    "no end of line": (b"\xef\xbb\xbfx.png\r\n# mine\r\n\r\nz.gif", ["x.png", "z.gif"]),
    "names in UTF-8 with blanks": ("ü 文.png\n".encode(), ["ü 文.png"]),
    "a missing image": (b"x.png\ngone.png\n", "list.txt, line 2: .*gone.png does not exist"),
    "a folder": (b"x.png\n..\n", "list.txt, line 2: .* does not exist"),
    "a NUL byte": (b"x.png\nx\0.png\n", "list.txt, line 2: .* does not exist"),
    "not UTF-8": (b"x.png\n\xff\n", "list.txt .*cannot be read: .*Give an existing UTF-8 text file"),
    "nothing": (b"\n# nothing\n", "list.txt: no images in"),
}


@pytest.mark.parametrize("name", LISTS)
def test_list(name, tmp_path, fails):
    text, outcome = LISTS[name]
    tree(tmp_path, "images/x.png", "y.png", "images/ü 文.png")
    (tmp_path / "images/z.gif").write_bytes(used("a gif.png"))
    (tmp_path / "images/list.txt").write_bytes(text.replace(b"{root}", os.fsencode(tmp_path)))
    argv = ["--data", str(tmp_path / "images/list.txt"), "--method", "random", "--out", str(tmp_path / "store")]
    if isinstance(outcome, str):
        assert re.search(outcome, fails(proposals.main, argv))
        return
    images, store = data.open_images(argv[1], None), proposals.main(argv)
    assert images.keys == outcome and store.header["unreadable"] == 0 and len(store) == len(outcome)


@pytest.mark.parametrize("name, reason",
                         [("absent", "no such folder"), ("x.png", "no such folder"), ("absent.txt", "cannot be read")])
def test_what_is_no_data_set(name, reason, tmp_path, fails):
    tree(tmp_path, "x.png")
    for main, argv in ((proposals.main, ["--data", tmp_path / name]),
                       (detreg.main, flags({**TINY, "data": tmp_path / name, "out": tmp_path / "out"}))):
        message = fails(main, argv)
        assert name in message and reason in message


# ==== COCO files ====

NAN, INF, PENTAGON = float("nan"), float("inf"), [1, 1, 9, 1, 9, 9, 1, 9, 1, 5]
BOX = {"image_id": 20, "category_id": 7, "bbox": [1, 2, 10, 5]}              # what is right, in a.png, which is 40 x 20
RIGHT = (1, 2, 11, 7, "cat")
BOXES = {"the right box": ([BOX], [RIGHT])}  # annotations, and the boxes used, or the error
BOXES |= {f"a box {where}": ([{**BOX, "bbox": box}], outcome) for where, box, outcome in (
    ("over the edge", [-5, 15, 20, 30], [(0, 15, 15, 20, "cat")]),
    ("in words", ["1", "2", "10", "5"], [RIGHT]),
    ("without width", [1, 2, 0, 5], "1 of 1 boxes are empty or outside .*image a.png, object 1"),
    ("of negative height", [9, 9, 5, -5], "1 of 1 boxes are empty"),
    ("outside", [200, 0, 5, 5], "1 of 1 boxes are empty or outside"),
    ("with NaN", [NAN, 0, 5, 5], "1 of 1 boxes are empty"),
    ("of infinite width", [0, 0, INF, 5], "1 of 1 boxes are empty"),
    ("beyond all numbers", [0, 0, 10**400, 5], "no COCO detection json: OverflowError"),
    ("of three numbers", [1, 2, 3], "bbox of 4 numbers"), ("of five", [1, 2, 3, 4, 5], "bbox of 4 numbers"),
    ("of letters", ["a", "b", "c", "d"], "bbox of 4 numbers"), ("of one word", "1234", "bbox of 4 numbers"),
    ("of nothing", None, "bbox of 4 numbers"))}
BOXES |= {
    "no annotations": ([], []),
    "one empty box in 150": ([BOX] * 149 + [{**BOX, "bbox": [1, 2, 0, 5]}], [RIGHT] * 149),
    "two empty boxes in 150": ([BOX] * 148 + [{**BOX, "bbox": [1, 2, 0, 5]}] * 2, "2 of 150 boxes are empty"),
    "a missing image": ([{**BOX, "image_id": 77}], "KeyError 77.*image_id of a listed image"),
    "an unknown category": ([{**BOX, "category_id": 99}],
                            r"category 99 \(not listed\) is not one of the known: dog, cat"),
    "ids of 7.0": ([{**BOX, "image_id": 20.0, "category_id": 7.0}], [RIGHT]),
    "an id in words": ([{**BOX, "image_id": "20"}], "the image_id '20' is a text, the id of the image is not"),
    "a category id in words": ([{**BOX, "category_id": "7"}], r"category 7 \(not listed\) is not one of the known"),
    "an id that would be rounded": ([{**BOX, "category_id": 7.9}], "the id 7.9 is neither a whole number nor a text"),
    "an id that is a truth value": ([{**BOX, "image_id": True}], "the id True is neither a whole number nor a text"),
    "an id that is a list": ([{**BOX, "image_id": [20]}], r"the id \[20\] is neither a whole number nor a text"),
    "the same annotation id twice": ([{**BOX, "id": 1}, {**BOX, "id": 1, "category_id": 3}],
                                     [RIGHT, (1, 2, 11, 7, "dog")]),
    "no annotation ids": ([BOX, BOX], [RIGHT] * 2),
    "a crowd": ([{**BOX, "iscrowd": 1}, {**BOX, "iscrowd": "0"}, {**BOX, "iscrowd": None}],
                [(*RIGHT, "crowd"), RIGHT, RIGHT]),
    "a crowd in letters": ([{**BOX, "iscrowd": "no"}], "no COCO detection json: ValueError"),
    "no bbox": ([{"image_id": 20, "category_id": 7}], "no COCO detection json: KeyError 'bbox'"),
    "an annotation that is a list": ([[20, 7]], "no COCO detection json: TypeError"),
    "a useless area": ([{**BOX, "area": None}, {**BOX, "area": NAN}], [RIGHT] * 2),
}
FILES = [{"id": 20, "width": 40, "height": 20, "file_name": "a.png"},
         {"id": 3, "width": 40, "height": 20, "file_name": "ü b/a.png"}]


def image(**changed) -> dict:
    return {"images": [{**FILES[0], **changed}, FILES[1]], "annotations": []}


SETS = {  # what is changed in the file, or its bytes; a note or None where it is used, or the error
    "as it should be": ({}, None),
    "byte order mark": (lambda text: b"\xef\xbb\xbf" + text, None),
    "unknown keys": ({"info": None, "licenses": 5}, None),
    "huge ids": ({"images": [FILES[0], {**FILES[1], "id": 2**70}]}, None),
    "ids with gaps, the same name under two":
    ({"categories": [{"id": i, "name": n} for i, n in ((7, "cat"), (900, "cat"), (-3, "dog"))]}, None),
    "one file under two ids": ({"images": [*FILES, {**FILES[0], "id": 21}]},
                               "1 of 3 images name a file that another one names too"),
    "an image id twice": ({"images": [FILES[0]] * 2}, "an image id or category id occurs twice"),
    "a category id twice": ({"categories": [{"id": 7, "name": "cat"}, {"id": 7, "name": "dog"}]},
                            "an image id or category id occurs twice"),
    "an image that is not there": (image(file_name="gone.png"), "1 of 2 images are not there, the first: .*gone.png"),
    "no name": (image(file_name=""), "1 of 2 images are not there"),
    "a folder up": (image(file_name="../outside.png"), r"file name '\.\./outside\.png' leads out of the image folder"),
    "a folder up inside": (image(file_name="ü b/../../outside.png"), "leads out of the image folder"),
    "a folder up in Windows' way": (image(file_name="..\\outside.png"), "leads out of the image folder"),
    "an absolute name": (image(file_name="/etc/passwd"), "file name '/etc/passwd' leads out of the image folder"),
    "an absolute name in Windows' way": (image(file_name="C:\\outside.png"), "leads out of the image folder"),
    "a name with a NUL": (image(file_name="a\0.png"), "1 of 2 images are not there"),
    "a name with line ends": (image(file_name="a\nb.png"), r"1 of 2 images are not there, the first: .*a\\nb.png"),
    "half a character in a name": (image(file_name="\ud800.png"),
                                   r"1 of 2 images are not there, the first: .*\\ud800.png"),
    "no size": ({"images": [{"id": 20, "file_name": "a.png"}, FILES[1]]},
                "the labels of 1 of 2 images do not tell its size, it is read from the image as its EXIF rotates it"),
    "a size of 0": ({"images": [{**FILES[0], "width": 0}, {**FILES[1], "height": None}]},
                    "the labels of 2 of 2 images do not tell its size"),
    "a negative size": (image(height=-20), "ValueError image a.png is 40 x -20 px"),
    "a size of NaN": (image(height=NAN), "no COCO detection json: ValueError"),
    "an infinite size": (image(height=INF), "no COCO detection json: OverflowError"),
    "a size beyond all numbers": (image(height=10**400), "no COCO detection json: OverflowError"),
    "no images": ({"images": [], "annotations": []}, "lists 0 images and 2 categories"),
    "no categories": ({"categories": [], "annotations": []}, "lists 2 images and 0 categories"),
    "a category without a name": ({"categories": [{"id": 7}]}, "no COCO detection json: KeyError 'name'"),
    "images that are a dict": ({"images": {"20": "a.png"}}, "no COCO detection json: TypeError"),
    "categories that are null": ({"categories": None}, "no COCO detection json: TypeError"),
    "annotations that are a word": ({"annotations": "none"}, "no COCO detection json: TypeError"),
    "cut in the middle": (lambda text: text[:len(text) // 2], "no COCO detection json: JSONDecodeError"),
    "zero bytes": (lambda text: b"", "no COCO detection json: JSONDecodeError"),
    "a list": (lambda text: b"[" + text + b"]", "no COCO detection json: TypeError"),
    "a number": (lambda text: b"7", "no COCO detection json: TypeError"),
    "100,000 brackets": (lambda text: b"[" * 100_000, "no COCO detection json: RecursionError"),
    "10,000 digits": (lambda text: text.replace(b"[1, 2,", b"[" + b"1" * 10_000 + b", 2,"),
                      "no COCO detection json: ValueError"),
    "latin-1": (lambda text: text.replace(b'"cat"', b'"\xff"'), "no COCO detection json: UnicodeDecodeError"),
    "utf-16": (lambda text: text.decode().encode("utf-16"), "no COCO detection json: UnicodeDecodeError"),
    "detections instead of annotations": (lambda text: json.dumps([{**BOX, "score": 0.5}]).encode(),
                                          "no COCO detection json: TypeError"),
}


@pytest.fixture
def read(monkeypatch, tmp_path, capsys, fails):
    """finetune.main up to the model: the training set it would learn from, or the error."""
    def run_script(path, *argv, error=None):
        sets, opened = [], finetune.open_sets
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "open_sets", lambda cfg: sets.append(opened(cfg)) or sets[0])
            patch.setattr(finetune, "build_model", lambda *_: (_ for _ in ()).throw(Stop()))
            argv = ["--data", str(path), *argv, "--batch_size", "1", "--arch", "resnet18",
                    "--out", str(tmp_path / "run")]
            if error:
                message = fails(finetune.main, argv)
                assert re.search(error, message), message
                assert str(tmp_path) in message
                return None
            with pytest.raises(Stop):
                run.cli(lambda: finetune.main(argv))
        return sets[0][0]

    return run_script


def coco(folder: Path, **changed) -> Path:
    tree(folder, "images/a.png", "images/ü b/a.png", "outside.png")
    (folder / "set.json").write_text(json.dumps({"images": FILES, "annotations": [BOX], "categories": [
        {"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]} | changed), encoding="utf-8")
    return folder / "set.json"


def boxes_of(labelled, k: int) -> list[tuple]:
    target = labelled.load(k)[1]
    names = [labelled.categories[label]["name"] for label in target["labels"]]
    return [(*box, name, *["crowd"] * crowd)
            for box, name, crowd in zip(target["boxes_xyxy"].tolist(), names, target["crowd"].tolist())]


@pytest.mark.parametrize("name", BOXES)
def test_coco_boxes(name, tmp_path, read):
    annotations, outcome = BOXES[name]
    path = coco(tmp_path, annotations=annotations)
    if isinstance(outcome, str):
        return read(path, error=outcome)
    labelled = read(path)
    assert labelled.image_ids == [3, 20] and boxes_of(labelled, 0) == [] and boxes_of(labelled, 1) == outcome
    left_out = len(annotations) - len(outcome)
    for text, expected in ((f"{left_out} of {len(annotations)} boxes left out", left_out > 0),
                           ("1 of 1 boxes leave their image, by 25 px", name == "a box over the edge")):
        assert sum(text in note for note in labelled.notes) == expected


@pytest.mark.parametrize("name", SETS)
def test_coco_file(name, tmp_path, read, capsys):
    change, outcome = SETS[name]
    path = coco(tmp_path, **({} if callable(change) else change))
    if callable(change):
        path.write_bytes(change(path.read_bytes()))
    if outcome is not None and "another one names" not in outcome and "do not tell its size" not in outcome:
        return read(path, error=outcome)
    labelled = read(path)
    k = labelled.image_ids.index(20)
    assert boxes_of(labelled, k) == [RIGHT] and sum(len(r.boxes) for r in labelled.records) == 1
    assert "has no split: all its" in labelled.notes[-1]
    assert len(labelled.notes) == 1 + (outcome is not None) and (outcome or "") in capsys.readouterr().out


MASKS = {  # the segmentation of a 40 x 20 image, and how many pixels of it are used, or None: refused
    "a polygon": ([PENTAGON], 64), "two polygons": ([PENTAGON, [20, 1, 24, 1, 24, 5, 20, 5]], 80),
    "a polygon and a line": ([PENTAGON, [1, 2, 3, 4]], 64),
    "an RLE": ({"size": [20, 40], "counts": [20, 100, 680]}, 100),
    "an RLE in letters": ({"size": [20, 40], "counts": "d0T3XR1"}, None),
    "an RLE of another size": ({"size": [40, 20], "counts": [20, 100, 680]}, None),
    "an RLE too short": ({"size": [20, 40], "counts": [20, 100]}, None),
    "an RLE too long": ({"size": [20, 40], "counts": [20, 100, 6800]}, None),
    "a negative RLE": ({"size": [20, 40], "counts": [-20, 820]}, None),
    "an RLE of words": ({"size": [20, 40], "counts": ["20", "780"]}, None),
    "an RLE that breaks off": ({"size": [20, 40], "counts": "d0T"}, None),
    "an RLE of other letters": ({"size": [20, 40], "counts": "ü!"}, None),
    "an empty RLE": ({"size": [20, 40], "counts": ""}, None),
    "an RLE without end": ({"size": [20, 40], "counts": "o" * 1000}, None),
    "an RLE without counts": ({"size": [20, 40]}, None), "an RLE without size": ({"counts": [800]}, None),
    "no polygon": ([], None), "a line": ([[1, 2, 3, 4]], None), "an odd polygon": ([[1, 2, 3, 4, 5, 6, 7]], None),
    "words": ("everything", None), "a polygon of words": ([["a"] * 6], None),
    "a polygon with NaN": ([[NAN] + PENTAGON[1:]], None), "an infinite polygon": ([[INF] + PENTAGON[1:]], None),
    "a polygon of a light year": ([[1e16] + PENTAGON[1:]], None), "a number": (7, None), "nothing": (None, None),
}


@pytest.mark.parametrize("name", MASKS)
def test_coco_masks(name, tmp_path, read):
    segmentation, pixels = MASKS[name]
    path = coco(tmp_path, annotations=[{**BOX, "segmentation": segmentation}])
    if name == "an RLE in letters":
        segmentation["counts"], pixels = annotations.segment_rle({"size": [20, 40], "counts": [20, 100, 680]},
                                                                 (20, 40))["counts"].decode(), 100
        path = coco(tmp_path, annotations=[{**BOX, "segmentation": segmentation}])
    if pixels is None:
        return read(path, "--detector", "mask_rcnn_fpn",
                    error=r"1 of 1 objects have no segmentation .*object 1 of .*a.png")
    labelled = read(path, "--detector", "mask_rcnn_fpn")
    masks = labelled.masks(0)                                               # images without objects are left out
    assert labelled.image_ids == [20] and masks.shape == (1, 20, 40) and masks.max() == 1 and masks.sum() == pixels


# ==== VOC folders ====

def xml(size: str = "<size><width>40</width><height>20</height></size>",
        box: str = "<xmin>2</xmin><ymin>3</ymin><xmax>11</xmax><ymax>7</ymax>",
        name: str = "<name>cat</name>", more: str = "", head: str = "") -> str:
    content = f"{size}<object>{name}<bndbox>{box}</bndbox>{more}</object>"
    return f"{head}<annotation><filename>a.jpg</filename>{content}</annotation>"


def corners(*values) -> str:
    return xml(box="".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), values)))


LAUGHS = ("<!DOCTYPE a [<!ENTITY l0 'ha'>"
          + "".join(f"<!ENTITY l{k} '{f'&l{k - 1};' * 10}'>" for k in range(1, 10)) + "]>")
OUTSIDE = "<!DOCTYPE a [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>"
VOC_RIGHT = [(1, 2, 11, 7, "cat")]
XML = {  # Annotations/a.xml, and the boxes used, or the error
    # the xml's own name decides; a note says so
    "as it should be": (xml(), VOC_RIGHT),
    "with a declaration": (xml(head='<?xml version="1.0" encoding="utf-8"?>'), VOC_RIGHT),
    "numbers with fractions": (corners("2.0", "3.0", "11.0", "7.0"), VOC_RIGHT),
    "parts of an object": (xml(more="<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"), VOC_RIGHT),
    "over the edge": (corners(2, 3, 110, 70), [(1, 2, 40, 20, "cat")]),
    "no object": ("<annotation><size><width>40</width><height>20</height></size></annotation>",
                  "1 images and 0 classes"), "no size": (xml(size=""), VOC_RIGHT),
    "half a size": (xml(size="<size><width>40</width></size>"), VOC_RIGHT),
    "a size of 0": (xml(size="<size><width>0</width><height>0</height></size>"), VOC_RIGHT),
    "a negative size": (xml(size="<size><width>40</width><height>-3</height></size>"), "the image is 40 x -3 px"),
    "an infinite size": (xml(size="<size><width>1e999</width><height>9</height></size>"), "a.xml is no VOC annotation"),
    "a size in words": (xml(size="<size><width>wide</width><height>9</height></size>"), "a.xml is no VOC annotation"),
    "no box": (xml(box=""), "a.xml is no VOC annotation"), "no name": (xml(name=""), "a.xml is no VOC annotation"),
    "an empty name": (xml(name="<name> </name>"), "a.xml is no VOC annotation: an object's name"),
    "a click": (corners(2, 3, 2, 3), "1 of 1 boxes are empty"),
    "corners swapped": (corners(11, 7, 2, 3), "1 of 1 boxes are empty"),
    "outside": (corners(200, 3, 210, 7), "1 of 1 boxes are empty or outside"),
    "NaN": (corners("nan", 3, 11, 7), "1 of 1 boxes are empty"),
    "infinite": (corners(2, 3, "inf", 7), "1 of 1 boxes are empty"),
    "words": (corners("a", 3, 11, 7), "a.xml is no VOC annotation"),
    "cut in the middle": (xml()[:99], "a.xml is no VOC annotation"), "zero bytes": ("", "a.xml is no VOC annotation"),
    "two roots": (xml() * 2, "a.xml is no VOC annotation"), "a json": ('{"size": 4}', "a.xml is no VOC annotation"),
    "a billion laughs": (xml(head=LAUGHS, name="<name>&l9;</name>"), "a.xml is no VOC annotation: it defines entities"),
    "a billion laughs in UTF-16": (xml(head=LAUGHS, name="<name>&l9;</name>").encode("utf-16"),
                                   "a.xml is no VOC annotation: it defines entities"),
    "another file's text": (xml(head=OUTSIDE, name="<name>&e;</name>"),
                            "a.xml is no VOC annotation: it defines entities"),
    "an unknown entity": (xml(name="<name>&what;</name>"), "a.xml is no VOC annotation: undefined entity"),
    "an unknown encoding": (xml(head='<?xml version="1.0" encoding="klingon"?>'), "a.xml is no VOC annotation"),
    "a wrong encoding": (xml(name="<name>\ud8ff</name>"), "a.xml is no VOC annotation: not well-formed"),
    "another picture's name": (xml().replace("a.jpg", "../../../etc/passwd"), VOC_RIGHT),
    "none": (None, "a.xml cannot be read"),
}
VOC_LISTS = {  # ImageSets/Main/trainval.txt, and the error
    "a missing image": ("a\nghost\n", "no image ghost.jpg"),
    "a way out": ("../../outside\n", r"no image \.\./\.\./outside.jpg"),
    "an absolute name": ("/etc/passwd\n", "no image /etc/passwd.jpg"),
    "the same name twice": ("a\na\n", "a is listed twice"), "two files of one name": ("b\n", "b may be b.jpg or b.png"),
    "nothing": ("\n", "0 images"), "not UTF-8": ("\udcff\n", "cannot be read"),
    "none": (None, r"no labelled set for the train split there .*: its labels, VOC, are for test alone")}


def voc(folder: Path, annotation: str | bytes | None, listed: str | None = "a\n") -> Path:
    tree(folder, "VOC2007/JPEGImages/a.png", "VOC2007/JPEGImages/b.png", "VOC2007/JPEGImages/b.jpg", "outside.jpg")
    for file, text in (("Annotations/a.xml", annotation), ("ImageSets/Main/trainval.txt", listed),
                       ("ImageSets/Main/test.txt", "a\n")):
        (folder / "VOC2007" / file).parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            content = (text if isinstance(text, bytes)
                       else text.encode(errors="surrogateescape" if "\udcff" in text else "surrogatepass"))
            (folder / "VOC2007" / file).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", XML)
def test_voc_annotation(name, tmp_path, read):
    text, outcome = XML[name]
    if isinstance(outcome, str):
        return read(voc(tmp_path, text), error=outcome)
    labelled = read(voc(tmp_path, text))
    assert len(labelled) == 1 and boxes_of(labelled, 0) == outcome
    assert any("name another image" in note for note in labelled.notes) == ("passwd" in text)


@pytest.mark.parametrize("name", VOC_LISTS)
def test_voc_list(name, tmp_path, read):
    text, outcome = VOC_LISTS[name]
    read(voc(tmp_path, xml(), text), error=outcome)


# ==== Fine-tuning on what is odd, faults of our own ====

FINETUNE = {"arch": "resnet18", "hidden_dim": 64, "nheads": 4, "enc_layers": 1, "dec_layers": 1,
            "dim_feedforward": 32, "num_queries": 8, "dropout": 0.0, "num_feature_levels": 2,
            "scales": (48,), "max_size": 80, "crop_scales": (48,), "crop_range": (30, 44), "eval_size": 48,
            "num_workers": 0, "batch_size": 2, "max_steps": 1, "backbone_weights": "random"}


def test_fine_tuning_skips_and_counts(tmp_path, fails, capsys):
    """One image of 120 cannot be decoded, one object of 120 is empty: trained without them, both said;
    a test set must be whole."""
    first = next(index for _, index in next(iter(data.StepSampler(120, 2, 1, seed=42))))
    tree(tmp_path, *(f"images/{k}.png" for k in range(120)))
    (tmp_path / f"images/{first}.png").write_bytes(b"")
    images = [{**FILES[0], "id": k, "file_name": f"{k}.png"} for k in range(120)]
    annotations = [{**BOX, "image_id": k} for k in range(119)] + [{**BOX, "image_id": 119, "bbox": [1, 2, 3, 0]}]
    content = {"categories": [{"id": 7, "name": "cat \ud800\n"}]}
    for part, some in (("train", images), ("test", images[-2:] if first < 118 else images[:2])):
        ids = {i["id"] for i in some}
        (tmp_path / f"{part}.json").write_text(json.dumps(content | {"images": some, "annotations": [
            a for a in annotations if a["image_id"] in ids and (part == "train" or a["bbox"][3])]}))
    argv = flags({**FINETUNE, "data": tmp_path, "out": tmp_path / "out"})
    run.cli(lambda: finetune.main(argv))
    lines = capsys.readouterr().out.splitlines()
    assert any("1 of 120 boxes left out as empty or outside: image 119.png, object 1" in line
               for line in lines if line.startswith("note: "))
    assert [line for line in lines if line.startswith("skipped ")] == [
        f"skipped 1 of 120 images: {tmp_path}/images/{first}.png: UnidentifiedImageError: "
        f"cannot identify image file '{tmp_path}/images/{first}.png'"]
    (tmp_path / "test.json").write_text((tmp_path / "train.json").read_text())
    argv = flags({**FINETUNE, "data": tmp_path, "out": tmp_path / "out2"})
    assert f"{tmp_path}/images/{first}.png: UnidentifiedImageError" in fails(finetune.main, argv)


@pytest.mark.parametrize("fault", (RuntimeError("ours"), OSError(5, "ours"), KeyError("ours")))
def test_our_own_fault_is_none_of_the_data(fault, quick, good, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "draw_geometry", lambda *_, **__: (_ for _ in ()).throw(fault))
    with pytest.raises(type(fault), match="ours"):
        run.cli(lambda: detreg.main(flags({**TINY, "data": good, "out": tmp_path / "out"})))


def test_our_own_fault_ends_with_1_and_its_traceback(good, tmp_path):
    argv = flags({**TINY, "data": good, "out": tmp_path / "out", "num_workers": 1})
    code = f"import run, data, detreg\ndel data.draw_geometry\nrun.cli(lambda: detreg.main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 1 and "Traceback" in done.stderr
            and done.stderr.strip().splitlines()[-1].startswith("AttributeError: "))


def test_training_on_a_damaged_store(good, quick, tmp_path, fails):
    proposals.main(["--data", str(good), "--method", "random", "--grid", "64", "--out", str(tmp_path / "store")])
    boxes = np.fromfile(tmp_path / "store/boxes.bin", np.uint8)
    (boxes | 128).tofile(tmp_path / "store/boxes.bin")
    argv = flags({**TINY, "data": good, "out": tmp_path / "out", "proposal_store": tmp_path / "store"})
    assert f"{tmp_path / 'store'} is damaged, or image" in fails(detreg.main, argv)
    (tmp_path / "store/boxes.bin").write_bytes(b"")
    assert f"{tmp_path / 'store'} is damaged: its files do not have the length" in fails(detreg.main, argv)


# ==== Nothing that is read can run ====

def runs_code(source: str) -> list[int]:
    """Lines of a script that could run what a file holds. Allowed: torch's restricted reader, a class on top of
    pickle.Unpickler, which decides itself what it lets in, and yaml's loaders of plain values."""
    def name(node) -> str:
        return (f"{name(node.value)}.{node.attr}" if isinstance(node, ast.Attribute)
                else node.id if isinstance(node, ast.Name) else "?")

    def true(value) -> bool:
        return not isinstance(value, ast.Constant) or bool(value.value)

    def bad(node) -> bool:
        if isinstance(node, ast.ImportFrom):
            # what is called keeps the name it is known by
            return node.module in ("pickle", "os", "subprocess", "numpy", "builtins", "yaml", *NEVER)
        if isinstance(node, ast.Import):
            return any(a.name in NEVER or a.name in ("pickle", "os", "subprocess", "yaml") and a.asname
                       for a in node.names)
        if not isinstance(node, ast.Call):
            return False
        called, given = name(node.func), {k.arg: k.value for k in node.keywords}
        return (called in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
                or called.startswith(("os.exec", "os.spawn"))
                or called in {f"pickle.{k}" for k in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler")}
                or called in {"np.load", "numpy.load"} and true(given.get("allow_pickle", ast.Constant(False)))
                or called.startswith("yaml.") and called != "yaml.safe_load"
                and name(given.get("Loader")) not in ("yaml.BaseLoader", "yaml.SafeLoader")
                or called == "torch.load"
                and not (isinstance(given.get("weights_only"), ast.Constant) and given["weights_only"].value is True)
                or "shell" in given and true(given["shell"]) or called.startswith("subprocess.get"))

    return [node.lineno for node in ast.walk(ast.parse(source)) if bad(node)]


NEVER = ("marshal", "shelve", "dill", "cloudpickle", "joblib")


def test_no_code_is_read_from_files():
    files = sorted(ROOT.glob("*.py"))
    assert (len(files) >= 11
            and {f.name: lines for f in files if (lines := runs_code(f.read_text(encoding="utf-8")))} == {})


@pytest.mark.parametrize("line", (
    "pickle.load(f)", "pickle.loads(b)", "x = pickle.Unpickler(f).load()", "from pickle import loads",
    "import pickle as p", "import yaml as y", "from yaml import load", "yaml.load(f)", "yaml.load(f, yaml.BaseLoader)",
    "yaml.load(f, Loader=yaml.FullLoader)", "yaml.unsafe_load(f)",
    "eval(t)", "exec(t)", "__import__(t)", "np.load(f, allow_pickle=True)",
    "np.load(f, allow_pickle=x)", "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=x)",
    "os.system(t)", "os.execv(t, a)", "subprocess.run(t, shell=True)", "import joblib"))
def test_what_would_read_code_is_found(line):
    allowed = ("import pickle\nclass Reader(pickle.Unpickler):\n    def find_class(self, "
               "*a):\n        raise pickle.UnpicklingError('no')\n"
               "Reader(f).load(), model.eval(), np.load(f), np.load(f, allow_pickle=False), torch.load(f, "
               "weights_only=True), subprocess.run([t])\nimport yaml\nyaml.load(f, Loader=yaml.BaseLoader)\n")
    assert runs_code(allowed) == [] and runs_code(allowed + line) == [8]
