"""A corpus of broken and odd inputs, each with its outcome, through main(argv) as a user's command runs them. Three outcomes there are: the input is
used, it is skipped and counted, or the run ends in one sentence that names file and reason, with exit code 2."""
import ast
import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import common
import data
import detreg
import finetune
import proposals
from conftest import ROOT, SMALL, flags

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**SMALL, "preset": "demo", "num_feature_levels": 3, "scales": (48,), "max_size": 96, "crop_scales": (64,), "crop_range": (40, 60), "patch_size": 16,
        "max_prop": 6, "proposal_grid": 64, "no_cache_proposals": (), "backbone_weights": "random", "num_workers": 0, "seed": 3, "probe_images": 0,
        "batch_size": 2, "max_steps": 1}
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
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + b"".join(more) + chunk(
        b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


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
    exif[0x0112] = 6                                                         # stored on its side: to be turned by 90 degrees clockwise
    return encoded(red(), form, exif=exif)


def deep(depth: int, *shape: int) -> bytes:
    return cv2.imencode(".png", np.full(shape, 90 * 257, np.uint16))[1].tobytes()


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (40, 20), (0, 0, 255))], "duration": 100}
TEXT_BOMB = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 50_000_000))
SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch ran) (w) file\nshowpage\n"
IMAGES = [  # file name, its content (a str: a link to there; None: a pipe), outcome: "skipped", or "used" with the size and the first pixel
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
    ("flat.bmp", encoded(red(), "BMP"), "used", (40, 20), RED),              # no two proposals: detreg.py draws another image (D9)
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
    ("a program.jpg", SCRIPT, "skipped"),                                    # Pillow would hand it to Ghostscript
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
                        batches.extend(micro) or {k: torch.zeros(()) for k in ("loss", "loss_bbox", "loss_object_embedding")})
    return batches


@pytest.mark.parametrize("case", IMAGES, ids=[ascii(case[0]) for case in IMAGES])
def test_image(case, good, quick, tmp_path, monkeypatch, capsys):
    name, content, outcome, *expected = case
    os.symlink(good, tmp_path / "good")
    folder = tmp_path / "images"
    folder.mkdir()
    for file in good.iterdir():
        os.link(file, folder / file.name)
    path = folder / f"003~{name}"
    if content is None:
        os.mkfifo(path)
    else:
        os.symlink(content, path) if isinstance(content, str) else path.write_bytes(content)
    seen, decode = {}, data.decode_image
    monkeypatch.setattr(data, "decode_image", lambda p, *a: seen.setdefault(os.fspath(p), decode(p, *a)))
    common.cli(lambda: proposals.main(["--data", str(folder), "--method", "random", "--out", str(tmp_path / "store")]))
    store = proposals.ProposalStore.open(tmp_path / "store")
    errors = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    common.cli(lambda: detreg.main(flags({**TINY, "data": folder, "out": tmp_path / "out"})))
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
        assert len(errors) == 2 and all(f"skipped {common.printable(str(path))}: " in line for line in errors)      # by each of the two commands
        assert done.out.splitlines()[-1].startswith(f"skipped 1 of 120 images: {common.printable(str(path))}: ")
    assert not list(tmp_path.rglob("ran"))
