"""data.py: values by hand, trees built on the spot; real images where ../shared/data exists."""
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as TF

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import annotations as A  # noqa: E402
import data as D  # noqa: E402
import detreg  # noqa: E402
import finetune  # noqa: E402
import run  # noqa: E402
from common import UserError  # noqa: E402

REAL = ROOT.parent / "shared" / "data"
PARITY = ROOT.parent / "shared" / "parity" / "detreg"


def picture(path, size=(20, 10), colour=(10, 20, 30), **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **kwargs)
    return path


def make_voc(year, annotations, splits):
    """annotations: {stem: [(name, (xmin, ymin, xmax, ymax), difficult)]}"""
    (year / "Annotations").mkdir(parents=True)
    (year / "ImageSets/Main").mkdir(parents=True)
    for stem, objects in annotations.items():
        picture(year / "JPEGImages" / f"{stem}.jpg", (100, 80))
        inner = "".join(f"<object><name>{n}</name><difficult>{d}</difficult><bndbox><xmin>{b[0]}</xmin>"
                        f"<ymin>{b[1]}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
                        for n, b, d in objects)
        tag = "wrong.jpg" if stem == "b" else f"{stem}.jpg"
        size = "<size><width>100</width><height>80</height></size>"
        (year / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{tag}</filename>{size}{inner}</annotation>")
    for name, stems in splits.items():
        (year / "ImageSets/Main" / f"{name}.txt").write_text("".join(f"{s}\n" for s in stems), encoding="utf-8")


# ==== Decoding ====


def test_decode_modes(tmp_path):
    ramp = np.array([[0, 257, 257 * 200, 65535]], np.uint16)
    Image.fromarray(ramp).save(tmp_path / "i16.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "i32.tif")
    Image.fromarray(np.array([[-1.0, 0.0, 1.0, 3.0]], np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.array([[0, 1, 200, 255]], np.uint8)).save(tmp_path / "l.png")
    Image.fromarray(np.array([[0, 255, 0, 255]], np.uint8)).convert("1").save(tmp_path / "one.png")
    for name, values in (("i16.png", [0, 1, 200, 255]), ("i32.tif", [0, 1, 200, 255]), ("f.tif", [0, 64, 128, 255]),
                         ("l.png", [0, 1, 200, 255]), ("one.png", [0, 255, 0, 255])):
        image = D.decode_image(tmp_path / name)
        assert image.mode == "RGB" and np.asarray(image)[0].tolist() == [[v] * 3 for v in values], name
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "pt.png", transparency=0)
    assert np.asarray(D.decode_image(tmp_path / "p.png")).tolist() == [[[255, 0, 0], [0, 0, 200]]]
    # alpha on white
    assert np.asarray(D.decode_image(tmp_path / "pt.png")).tolist() == [[[255, 255, 255], [0, 0, 200]]]
    Image.new("RGBA", (1, 1), (100, 0, 0, 128)).save(tmp_path / "rgba.png")
    assert np.abs(np.asarray(D.decode_image(tmp_path / "rgba.png")).ravel().astype(int) - [177, 127, 127]).max() <= 1
    Image.new("LA", (1, 1), (100, 0)).save(tmp_path / "la.png")
    assert D.decode_image(tmp_path / "la.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(np.array(D.decode_image(tmp_path / "cmyk.jpg").getpixel((4, 4))) - [255, 0, 0]).max() < 8


def test_decode_exif(tmp_path):
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn by 90 degrees clockwise to view
    image.save(tmp_path / "a.png", exif=exif)
    turned = D.decode_image(tmp_path / "a.png")
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == (255, 0, 0)
    assert D.decode_image(tmp_path / "a.png", exif=False).size == (4, 2)


def test_decode_unreadable(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole, "JPEG")
    for name, content in (("cut.jpg", whole.getvalue()[:900]), ("text.png", b"hello"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(D.UnreadableImage) as error:
            D.decode_image(tmp_path / name)
        assert name in error.value.path and error.value.reason
    with pytest.raises(D.UnreadableImage):
        D.decode_image(tmp_path / "absent.jpg")


# ==== Unlabelled sets ====


def test_folder(tmp_path):
    for name in ("b/x.JPEG", "a.PNG", "b/c/y.webp", "z.bmp", "b/.hidden.jpg"):
        picture(tmp_path / "t" / name,
                format={"EG": "JPEG", "NG": "PNG", "bp": "WEBP", "mp": "BMP", "pg": "JPEG"}[name[-2:]])
    (tmp_path / "t" / "notes.txt").write_text("x")
    picture(tmp_path / "elsewhere" / "l.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "t" / "link")
    os.symlink(tmp_path / "t", tmp_path / "t" / "b" / "loop")
    images = D.open_images(str(tmp_path / "t"), None)
    assert (images.keys == ["a.PNG", "b/c/y.webp", "b/x.JPEG", "link/l.jpg", "z.bmp"] and len(images) == 5
            and images.key(1) == "b/c/y.webp")
    assert images.load(4).getpixel((0, 0)) == (10, 20, 30)
    assert (images.fingerprint() == D.ImageFiles("other", "/nowhere", images.keys[::-1]).fingerprint()
            != D.ImageFiles("t", ".", ["a"]).fingerprint())


def test_keys_are_one_row_of_bytes():
    # a line end, a byte that is no UTF-8, one character above it
    names = ["z", "ä/1.jpg", "a\nb.jpg", "\udce4.jpg", "\ue000.jpg", "a.jpg", "z"]
    images = D.ImageFiles("t", "/r", names)
    assert (images.keys == sorted(set(names))
            and [images.key(i) for i in (0, 5)] == [images.keys[0], images.keys[5]] and len(images) == 6)
    joined = "\n".join(sorted(set(names))).encode("utf-8", "surrogateescape")
    assert images.fingerprint() == hashlib.sha256(joined).hexdigest()
    assert (len(D.ImageFiles("t", "/r", [])) == 0
            and D.ImageFiles("t", "/r", []).fingerprint() == hashlib.sha256(b"").hexdigest())
    with pytest.raises((IndexError, ValueError)):
        images.key(6)
    # tensors are shared, by fork as by pickling
    copied = [v for v in vars(images).values() if not isinstance(v, (str, Path, torch.Tensor))]
    assert not copied


@pytest.mark.parametrize("name", ["nothing", "empty", "x.json", "no.txt"])
def test_folder_errors(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name.split(".")[0]):
        D.open_images(str(tmp_path / name), None)


def test_list(tmp_path):
    inside = picture(tmp_path / "l" / "im" / "a.jpg")
    outside = picture(tmp_path / "b.jpg")
    (tmp_path / "l" / "list.txt").write_text(f"# mine\n\nim/a.jpg\n{outside}\n")
    images = D.open_images(str(tmp_path / "l" / "list.txt"), None)
    assert (images.keys == sorted(["im/a.jpg", outside.as_posix()])
            and all(images.load(i).size == (20, 10) for i in range(2)))
    assert images.root == inside.parents[1]
    (tmp_path / "l" / "list.txt").write_text(f"./im//a.jpg\nim/./a.jpg\n../b.jpg\n  im/a.jpg \n{inside}\n")
    assert D.open_images(str(tmp_path / "l" / "list.txt"), None).keys == ["../b.jpg", "im/a.jpg"]
    (tmp_path / "l" / "list.txt").write_text("im/a.jpg\n\nim/gone.jpg\n")
    with pytest.raises(UserError, match=r"list.txt, line 3: .*gone.jpg"):
        D.open_images(str(tmp_path / "l" / "list.txt"), None)
    (tmp_path / "l" / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="list.txt"):
        D.open_images(str(tmp_path / "l" / "list.txt"), None)


def test_names_in_lists_that_are_spelled_otherwise(tmp_path, capsys):
    composed, apart = "caf\u00e9/\u00fc.jpg", "cafe\u0301/u\u0308.jpg"
    for name in (apart, "a/b.jpg", "a/c\\d.jpg"):
        picture(tmp_path / name)
    (tmp_path / "list.txt").write_text(f"{composed}\na\\b.jpg\na/c\\d.jpg\n", encoding="utf-8")
    images = D.open_images(str(tmp_path / "list.txt"), None)
    assert images.keys == ["a/b.jpg", "a/c\\d.jpg", apart] and images.load(0).size == images.load(2).size == (20, 10)
    assert capsys.readouterr().out == (
        f"note: {tmp_path}/list.txt: 2 of 3 names of files are spelled otherwise there (another Unicode form, or back "
        f"slashes for separators), the first: {composed!a} is {apart!a}\n")
    year = tmp_path / "VOC2007"
    make_voc(year, {"cafe\u0301": [], "b": []}, {"trainval": ["caf\u00e9", "sub\\b"]})
    (year / "JPEGImages/sub").mkdir()
    (year / "JPEGImages/b.jpg").rename(year / "JPEGImages/sub/b.jpg")
    assert D.open_images("voc", str(tmp_path)).keys == [
        "VOC2007/JPEGImages/cafe\u0301.jpg", "VOC2007/JPEGImages/sub/b.jpg"]
    assert "trainval.txt: 2 of 2 names of files are spelled otherwise" in capsys.readouterr().out
    (year / "ImageSets/Main/trainval.txt").write_text("caf\u00e9\ncafe\u0301\n", encoding="utf-8")
    with pytest.raises(UserError, match="cafe\u0301 is listed twice"):
        D.open_images("voc", str(tmp_path))


OUTPUTS = (["last.pt"], ["previous.pt"], ["damaged.pt"], ["log.jsonl"], ["metrics.json", "predictions.png"],
           ["meta.json", "boxes.bin", "offsets.npy"], ["header.partial", "boxes.partial"])


def test_our_own_output_is_no_input(tmp_path, capsys):
    root = tmp_path / "photos"
    picture(root / "a.jpg")
    picture(root / "out/sheet.png")  # not that of a run: the user's own
    before = D.open_images(str(root), None)
    assert before.keys == ["a.jpg", "out/sheet.png"] and capsys.readouterr().out == ""
    for k, marks in enumerate(OUTPUTS):
        run_folder = root / f"out/run{k}"
        picture(run_folder / "predictions.png")
        picture(run_folder / "below/x.png")
        for name in marks:
            if not name.endswith(".png"):
                (run_folder / name).write_text("")
        after = D.open_images(str(root), None)
        assert after.keys == before.keys and after.fingerprint() == before.fingerprint()
        said = capsys.readouterr().out
        assert f"note: {root}: {k + 1} folder" in said and str(root / "out/run0") in said
    # what a user names is used, but for the pictures that we write
    picture(root / "out/run0/mine.png")
    assert D.open_images(str(root / "out/run0"), None).keys == ["below/x.png", "mine.png"]
    for k, name in enumerate(("predictions.png", "metrics.json", "meta.json")):  # of which one alone says nothing
        picture(tmp_path / f"own{k}/sub/x.png")
        (tmp_path / f"own{k}/sub/{name}").touch()
        assert "sub/x.png" in D.open_images(str(tmp_path / f"own{k}"), None).keys


def test_image_header(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.png", "a.jpg", "a.webp"):
        picture(tmp_path / name, (20, 10), exif=exif)
        assert D.image_header(tmp_path / name) == (20, 10, 6)
    assert D.image_header(picture(tmp_path / "b.png")) == (20, 10, 1)
    exif[0x0112] = 77
    assert D.image_header(picture(tmp_path / "b.jpg", exif=exif)) == (20, 10, 1)
    (tmp_path / "text.png").write_bytes(b"hello")
    os.mkfifo(tmp_path / "pipe.png")
    assert [D.image_header(tmp_path / name) for name in ("text.png", "pipe.png", "absent.png", "")] == [None] * 4


def test_imagenet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(D.IMAGENET100) == len(set(D.IMAGENET100)) == 100
    picture(tmp_path / "one.jpg")
    for k, wnid in enumerate((*D.IMAGENET100, "n99999999")):
        (tmp_path / "store" / wnid).mkdir(parents=True)
        os.link(tmp_path / "one.jpg", tmp_path / "store" / wnid / "i.JPEG")
        (tmp_path / "r" / "ILSVRC/Data/CLS-LOC/train").mkdir(parents=True, exist_ok=True)
        os.symlink(tmp_path / "store" / wnid, tmp_path / "r" / "ILSVRC/Data/CLS-LOC/train" / wnid)
    images = D.open_images("imagenet100", str(tmp_path / "r"))
    assert images.keys == sorted(f"{w}/i.JPEG" for w in D.IMAGENET100) and images.load(0).size == (20, 10)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "r"))
    assert len(D.open_images("imagenet", None)) == 101
    os.remove(tmp_path / "r" / "ILSVRC/Data/CLS-LOC/train" / D.IMAGENET100[0])
    with pytest.raises(UserError, match=f"1 of the 100 class folders .*{D.IMAGENET100[0]}"):
        D.open_images("imagenet100", None)
    with pytest.raises(UserError, match="val"):
        D.open_images("imagenet", None, split="val")
    monkeypatch.delenv("DATA_ROOT")
    with pytest.raises(UserError, match=r"data/imagenet, data/imagenet/imagenet, "
                       r"data/imagenet/ILSVRC/Data/CLS-LOC .*<root>/train/<wnid>"):
        D.open_images("imagenet100", None)


def test_named_coco_voc_unlabelled(tmp_path):
    picture(tmp_path / "coco" / "train2017" / "1.jpg")
    assert D.open_images("coco", str(tmp_path)).keys == ["1.jpg"]
    make_voc(tmp_path / "VOCdevkit/VOC2007", {"a": [], "b": []}, {"trainval": "a", "test": "b"})
    make_voc(tmp_path / "VOCdevkit/VOC2012", {"c": []}, {"trainval": "c"})
    for file in tmp_path.rglob("*.xml"):
        file.unlink()  # unlabelled use never opens annotations
    assert D.open_images("voc", str(tmp_path)).keys == ["VOC2007/JPEGImages/a.jpg", "VOC2012/JPEGImages/c.jpg"]
    assert D.open_images("voc", str(tmp_path / "VOCdevkit"), split="test").keys == ["VOC2007/JPEGImages/b.jpg"]
    with pytest.raises(UserError, match="val2017"):
        D.open_images("coco", str(tmp_path), split="val")


def test_real_images():
    if not REAL.is_dir():
        pytest.skip("../shared/data is not here")
    images = D.open_images("imagenet", str(REAL / "imagenet_sample"))
    assert len(images) == 400 and images.load(3).mode == "RGB"
    with pytest.raises(UserError, match="of the 100 class folders are missing"):
        D.open_images("imagenet100", str(REAL / "imagenet_sample"))


def test_coco_with_its_unlabelled_images(tmp_path):
    for folder in ("train2017", "unlabeled2017", "val2017"):
        picture(tmp_path / folder / "0.jpg")
    images = D.open_images("coco_unlabeled", str(tmp_path))
    assert [images.key(i) for i in range(len(images))] == ["train2017/0.jpg", "unlabeled2017/0.jpg"]
    assert D.open_images("coco_unlabeled", str(tmp_path), split="val").key(0) == "val2017/0.jpg"
    (tmp_path / "unlabeled2017").rename(tmp_path / "test2017")
    with pytest.raises(UserError, match="<root>/unlabeled2017"):
        D.open_images("coco_unlabeled", str(tmp_path))


def open_sets(**values):
    """open_training_images and open_pretraining of a configuration with these values."""
    cfg = SimpleNamespace(**{"data": "synthetic", "data_root": None, "synthetic_images": 6, "synthetic_size": 40,
                             "seed": 1, "probe_data": None, "probe_images": 2, "probe_every": 0, "train_images": 0,
                             **values})
    return D.open_training_images(cfg), D.open_pretraining(cfg)


def test_images_to_train_and_to_probe_on(tmp_path):
    for i in range(6):
        picture(tmp_path / "six" / f"{i}.jpg")
    # held out from training
    (source, indices, held_out), (same, train, probe, probed) = open_sets(data=str(tmp_path / "six"))
    order = np.random.default_rng(1).permutation(6)
    assert held_out.tolist() == sorted(order[:2]) and indices.tolist() == sorted(order[2:]) and len(source) == 6
    assert probe is same and train.tolist() == indices.tolist() and probed.tolist() == held_out.tolist()
    assert open_sets(data=str(tmp_path / "six"), probe_images=0)[0][1].tolist() == list(range(6))
    # a part of them (SoCo, Table 9)
    few = open_sets(data=str(tmp_path / "six"), train_images=3)[0]
    assert few[1].tolist() == sorted(order[2:5]) and few[2].tolist() == held_out.tolist()
    few = open_sets(data=str(tmp_path / "six"), train_images=6, probe_images=0)[0]
    assert few[1].tolist() == list(range(6))
    # other images: further scenes, or --probe_data
    (_, indices, held_out), (train, _, probe, probed) = open_sets()
    assert len(indices) == 6 and len(held_out) == 0 and probed.tolist() == [0, 1] and len(probe) == 2
    assert not {train.key(i) for i in range(6)} & {probe.key(i) for i in range(2)}
    (_, indices, _), (_, _, probe, probed) = open_sets(probe_data=str(tmp_path / "six"), probe_images=9)
    assert len(indices) == 6 and probe.root == tmp_path / "six" and probed.tolist() == list(range(6))
    picture(tmp_path / "one" / "0.jpg")
    for values, message in (({"probe_images": 1}, "--probe_images 1"),
                            ({"probe_data": str(tmp_path / "one")}, "one image"),
                            ({"data": str(tmp_path / "six"), "probe_images": 3}, "6 images are too few to hold out 3"),
                            ({"data": str(tmp_path / "six"), "train_images": 5}, "has 4 images to train on")):
        with pytest.raises(UserError, match=message):
            open_sets(**values)


# ==== Synthetic scenes ====


def test_synthetic():
    scenes = D.SyntheticScenes(12, 160, seed=5)
    again = D.SyntheticScenes(4, 160, seed=5, offset=3)
    for i in range(4):
        a, b = scenes.scene(i + 3), again.scene(i)
        assert (np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and np.array_equal(a[2], b[2])
                and scenes.key(i + 3) == again.key(i))
    for i in range(12):
        image, boxes, labels = scenes.scene(i)
        assert (image.size == (160, 160) and boxes.dtype == np.float32 and labels.dtype == np.int64
                and 1 <= len(boxes) == len(labels) <= 6)
        assert (boxes.min() >= 0 and boxes.max() <= 160 and (boxes[:, 2:] > boxes[:, :2]).all()
                and labels.max() < len(scenes.CLASSES))
    assert not np.array_equal(scenes.load(0), D.SyntheticScenes(1, 160, seed=6).load(0))
    assert D.SyntheticScenes(2, 64).fingerprint() != D.SyntheticScenes(2, 64, offset=2).fingerprint()
    sets = [D.open_images("synthetic", None, synthetic_images=3, split=s) for s in ("train", "test")]
    sets += [A.open_detection("synthetic", None, s, synthetic_images=3).scenes for s in ("train", "test")]
    assert len({s.key(i) for s in sets for i in range(3)}) == 12
    assert len(D.SyntheticScenes(1, 40).scene(0)[1]) >= 1


@pytest.mark.parametrize("seed", range(4))
def test_synthetic_boxes_are_exact(seed, monkeypatch):
    """Every object painted in its own flat colour on black, without blur and noise: the boxes are those of the pixels
    of each colour."""
    painted = []

    def flat(self, rng, canvas, original=D.SyntheticScenes._object):
        label, mask, colours, full = original(self, rng, canvas)
        painted.append(mask)
        return label, mask, np.full_like(colours, len(painted)), full
    monkeypatch.setattr(D.SyntheticScenes, "_object", flat)
    monkeypatch.setattr(D.SyntheticScenes, "_background", lambda self, rng: np.zeros((160, 160, 3), np.float32))
    monkeypatch.setattr(D.cv2, "GaussianBlur", lambda canvas, *_: final.append(canvas.copy()) or canvas)
    for i in range(6):
        painted, final = [], []
        _, boxes, labels = D.SyntheticScenes(6, 160, seed).scene(i)
        ids = [int(v) for v in np.unique(final[0]) if v]
        assert len(ids) == len(boxes) == len(labels)
        for box, value in zip(boxes, ids):
            y, x = np.nonzero(final[0][..., 0] == value)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            # half of the whole shape, of which at least 60 % are in the image
            assert len(y) >= 0.3 * np.count_nonzero(painted[value - 1])


def test_selective_search_finds_objects():
    found = []
    for i in range(8):
        image, boxes, _ = D.SyntheticScenes(8).scene(i)
        search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(cv2.resize(np.asarray(image), (128, 128)))
        search.switchToSelectiveSearchFast()
        regions = torch.from_numpy(search.process()).float() * 160 / 128
        regions[:, 2:] += regions[:, :2]
        found += (box_iou(torch.from_numpy(boxes), regions).amax(1) > 0.5).tolist()
    assert np.mean(found) > 0.7


# ==== Transforms ====


def test_resized_hw():
    for hw, size, longest, expected in (((480, 640), 800, 1333, (800, 1066)), ((200, 1000), 480, 600, (120, 600)),
                                        ((100, 50), 50, None, (100, 50)), ((214, 758), 352, None, (352, 1246)),
                                        ((750, 286), 600, 600, (600, 229)), ((1, 5000), 400, 600, (1, 600)),
                                        ((5000, 2), 400, 600, (600, 1)), ((1, 5000), 400, None, (400, 2_000_000))):
        assert D.resized_hw(hw, size, longest) == expected
    if (PARITY / "box_transforms.npz").exists():
        for w, h, size, longest, new_w, new_h in np.load(PARITY / "box_transforms.npz")["resize_table"].tolist():
            assert D.resized_hw((h, w), size, longest or None) == (new_h, new_w)


def test_boxes_by_hand():
    boxes = torch.tensor([[10.0, 20, 30, 60], [0, 0, 5, 5], [50, 30, 100, 80]])
    cropped, keep = D.crop_boxes(boxes, (25, 10, 40, 60))
    assert cropped.tolist() == [[0, 0, 20, 35], [40, 5, 60, 40]] and keep.tolist() == [0, 2]
    assert D.flip_boxes(boxes, 100)[0].tolist() == [70, 20, 90, 60]
    assert D.resize_boxes(boxes, (80, 100), (160, 50))[0].tolist() == [5, 40, 15, 120]
    assert torch.allclose(D.normalized_cxcywh(boxes, (80, 100))[0], torch.tensor([0.2, 0.5, 0.2, 0.5]))
    assert D.crop_boxes(boxes[:0], (0, 0, 5, 5))[0].shape == (0, 4) and D.flip_boxes(boxes[:0], 5).shape == (0, 4)


def test_boxes_parity():
    if not (PARITY / "box_transforms.npz").exists():
        pytest.skip("parity cases are not here")
    case = np.load(PARITY / "box_transforms.npz")
    boxes = torch.from_numpy(case["boxes"])
    w, h = case["image_wh"].tolist()
    region = case["region"].tolist()
    cropped, keep = D.crop_boxes(boxes, region)
    assert keep.tolist() == case["crop_kept"].tolist() and np.abs(cropped.numpy() - case["crop_boxes"]).max() < 1e-3
    assert np.abs(D.flip_boxes(boxes, w).numpy() - case["flip_boxes"]).max() < 1e-3
    image, resized, _ = D.apply_geometry(Image.new("RGB", (w, h)), boxes,
                                         D.Geometry(False, None, None, D.resized_hw((h, w), 336, 600)))
    assert (list(image.size) == case["resized_wh"].tolist()
            and np.abs(resized.numpy() - case["resize_boxes"]).max() < 1e-3)
    assert np.abs(D.normalized_cxcywh(resized, image.size[::-1]).numpy() - case["normalised_boxes"]).max() < 1e-6


def test_apply_geometry_moves_pixels_with_boxes():
    array = np.zeros((80, 100, 3), np.uint8)
    array[20:40, 10:40] = 255
    boxes = torch.tensor([[0.0, 60, 5, 80], [10, 20, 40, 40]])
    image, moved, keep = D.apply_geometry(Image.fromarray(array), boxes,
                                          D.Geometry(True, (160, 200), (20, 100, 80, 96), (160, 192)))
    # flip: x 60..90; doubled: 120..180, 40..80; crop: 20..80, 20..60; doubled: 40..160, 40..120. The other box:
    # 190..200, 120..160 -> below the crop
    assert image.size == (192, 160) and keep.tolist() == [1] and moved.tolist() == [[40, 40, 160, 120]]
    bright = np.argwhere(np.asarray(image)[..., 0] > 127)
    assert np.abs(bright.min(0) - [40, 40]).max() <= 1 and np.abs(bright.max(0) + 1 - [120, 160]).max() <= 1
    same, _, keep = D.apply_geometry(image, moved, D.Geometry(False, None, None, (160, 192)))
    assert np.array_equal(same, image) and keep.tolist() == [0]


def test_draw_geometry():
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(400):
        g = D.draw_geometry(rng, (480, 640), scales=(320, 480), max_size=600)
        seen.append((g.flip, g.crop is not None))
        if g.crop:
            top, left, h, w = g.crop
            assert min(g.first_hw) in (400, 500, 600) and 384 <= h <= 600 and 384 <= w <= 600
            assert (0 <= top <= g.first_hw[0] - h and 0 <= left <= g.first_hw[1] - w
                    and g.hw in [D.resized_hw((h, w), s, 600) for s in (320, 480)])
        else:
            assert g.first_hw is None and g.hw in [(320, 426), (450, 600)]
    assert all(150 < sum(column) < 250 for column in zip(*seen))
    small = [D.draw_geometry(rng, (30, 40), scales=(32,), max_size=None, crop_scales=(36,), crop_range=(384, 600))
             for _ in range(20)]
    assert {g.crop for g in small} == {None, (0, 0, 36, 48)}
    strips = [D.draw_geometry(rng, (1, 5000), scales=(400,), max_size=600) for _ in range(20)]
    assert any(g.crop for g in strips)  # rounding a short side of 1.5 px to 2 stretches the long one by as much
    assert all(max(g.hw) <= 600 * 4 / 3 and max(g.first_hw or g.hw) <= 20 * 600 * 4 / 3 for g in strips)
    assert all(D.draw_geometry(rng, (30, 40), scales=(32,), max_size=None, crop_range=None, flip=0).crop
               is None for _ in range(9))
    twice = [D.draw_geometry(np.random.default_rng(1), (9, 9), scales=[8], max_size=8) for _ in range(2)]
    assert twice[0] == twice[1]


ALL = ("flips", "rotate90", "colour")  # of --augment
BOX = (10, 20, 40, 36)  # white in MARKED


def marked_picture():
    """90 x 60: noise below half of white in red, the region BOX above."""
    array = np.random.default_rng(0).integers(0, 100, (60, 90, 3), dtype=np.uint8)
    array[BOX[1]:BOX[3], BOX[0]:BOX[2]] += 150
    return array


def extent(pixels):
    """The box xyxy of what is set in an array [h, w]."""
    y, x = np.nonzero(pixels)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_boxes_and_masks_follow_the_eight_symmetries_to_the_pixel():
    array = marked_picture()
    mask = torch.zeros(2, 60, 90, dtype=torch.uint8)
    mask[1, BOX[1]:BOX[3], BOX[0]:BOX[2]] = 1
    wanted = {(False, 0): (10, 20, 40, 36), (True, 0): (50, 20, 80, 36), (False, 2): (50, 24, 80, 40),
              (True, 2): (10, 24, 40, 40), (False, 1): (20, 50, 36, 80), (True, 1): (24, 50, 40, 80),
              (False, 3): (24, 10, 40, 40), (True, 3): (20, 10, 36, 40)}  # by hand
    for (flip, turns), box in wanted.items():
        geometry = D.Geometry(flip, None, None, (90, 60) if turns % 2 else (60, 90), turns)
        view, boxes, keep = D.apply_geometry(Image.fromarray(array), torch.tensor([BOX], dtype=torch.float32), geometry)
        turned = np.rot90(array, turns)
        assert np.array_equal(view, turned[:, ::-1] if flip else turned)
        assert boxes.tolist() == [list(box)] == [extent(np.asarray(view)[..., 0] >= 150)] and keep.tolist() == [0]
        moved = D.apply_geometry_to_masks(mask, geometry)
        assert extent(moved[1].numpy()) == list(box) and moved[1].sum() == 30 * 16 and not moved[0].any()
    assert D.turn_boxes(torch.zeros(0, 4), (60, 90), 3).shape == (0, 4)


def test_boxes_and_masks_follow_turns_crops_and_resizing_together():
    array, seen = np.zeros((60, 90, 3), np.uint8), set()
    array[BOX[1]:BOX[3], BOX[0]:BOX[2]] = 255
    image, rng = Image.fromarray(array), np.random.default_rng(0)
    for _ in range(300):
        geometry = D.draw_geometry(rng, (60, 90), scales=(96, 128, 160), max_size=220, crop_scales=(90, 120),
                                   crop_range=(60, 100), augment=ALL)
        view, boxes, keep = D.apply_geometry(image, torch.tensor([BOX], dtype=torch.float32), geometry)
        mask = D.apply_geometry_to_masks(torch.from_numpy(array[None, ..., 0] // 255), geometry)[0].numpy()
        assert view.size[::-1] == geometry.hw == mask.shape
        if not len(keep) or (boxes[0, 2:] - boxes[0, :2]).min() < 8:  # as good as cut away
            continue
        bright = np.asarray(view)[..., 0] > 127
        assert np.abs(np.subtract(extent(bright), boxes[0].tolist())).max() <= 1.5
        assert np.abs(np.subtract(extent(mask), boxes[0].tolist())).max() <= 2
        assert (bright & (mask > 0)).sum() / (bright | (mask > 0)).sum() > 0.9
        seen.add((geometry.flip, geometry.turns, geometry.crop is not None))
    assert len(seen) == 16


@pytest.mark.parametrize("augment, symmetries", [(("flips",), 4), (("rotate90",), 8), (ALL, 8)])
def test_symmetries_are_drawn_alike(augment, symmetries):
    rng = np.random.default_rng(0)
    drawn = [D.draw_geometry(rng, (480, 640), scales=(320,), max_size=600, augment=augment) for _ in range(1600)]
    seen = [(g.flip, g.turns) for g in drawn]
    assert len(set(seen)) == symmetries and "rotate90" in augment or {t for _, t in seen} == {0, 2}
    assert all(abs(seen.count(s) * symmetries / 1600 - 1) < 0.2 for s in seen)
    for g in drawn:  # crop and sizes fit the turned image
        hw = (640, 480) if g.turns % 2 else (480, 640)
        if g.crop:
            assert g.first_hw in [D.resized_hw(hw, s) for s in (400, 500, 600)]
            assert g.crop[0] + g.crop[2] <= g.first_hw[0] and g.crop[1] + g.crop[3] <= g.first_hw[1]
        assert g.hw == D.resized_hw(g.crop[2:] if g.crop else hw, 320, 600)


@pytest.mark.parametrize("augment", [(), ("colour",)])
def test_without_turns_the_stream_of_random_numbers_is_what_it_was(augment):
    for seed, wanted, after in ((1, D.Geometry(False, None, None, (320, 426)), 144),  # before there was --augment
                                (2, D.Geometry(True, (500, 666), (5, 35, 436, 560), (400, 513)), 813)):
        rng = np.random.default_rng(seed)
        assert D.draw_geometry(rng, (480, 640), scales=(320, 400, 480), max_size=600, augment=augment) == wanted
        assert rng.integers(1000) == after


SAME_SIZE = {"scales": (60,), "max_size": 90, "crop_scales": ()}  # 90 x 60 as it is, but for flips and turns


def samples_of(dataset, epochs=24):
    """[(image [h, w, 3] in grey levels, boxes_xyxy of it, target)] of image 0 in these epochs."""
    for sample in (dataset[epoch, 0] for epoch in range(epochs)):
        h, w = sample["image"].shape[1:]
        levels = sample["image"].permute(1, 2, 0).numpy() * D.IMAGENET_STD + D.IMAGENET_MEAN
        cx, cy, bw, bh = sample["target"]["boxes"].unbind(-1)
        boxes = torch.stack([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], -1) * torch.tensor([w, h, w, h])
        yield (levels * 255).round().astype(np.uint8), boxes, sample["target"]


def test_labelled_samples_are_turned_and_recoloured_with_their_boxes_and_masks():
    array = marked_picture()
    mask = torch.zeros(1, 60, 90, dtype=torch.uint8)
    mask[0, BOX[1]:BOX[3], BOX[0]:BOX[2]] = 1
    target = {"boxes_xyxy": torch.tensor([BOX], dtype=torch.float32), "labels": torch.tensor([2]),
              "crowd": torch.tensor([False])}
    labelled = SimpleNamespace(load=lambda i, needs: (Image.fromarray(array), target), masks=lambda i: mask)

    def dataset(*augment):
        cfg = finetune.Config(**SAME_SIZE, detector="mask_rcnn_fpn", augment=augment)
        return list(samples_of(finetune.LabelledDataset(cfg, labelled)))

    turned, seen, recoloured = dataset("flips", "rotate90"), set(), 0
    for image, boxes, found in turned:
        box = boxes[0].round().tolist()
        seen.add((*box, image.shape[0]))
        torch.testing.assert_close(boxes[0], torch.tensor(box), rtol=0, atol=1e-3)
        assert extent(image[..., 0] >= 150) == extent(found["masks"][0].numpy()) == box
    assert len(seen) == 8
    for (image, boxes, found), (plain, plain_boxes, plain_found) in zip(dataset(*ALL), turned):
        assert torch.equal(boxes, plain_boxes) and torch.equal(found["masks"], plain_found["masks"])
        recoloured += not np.array_equal(image, plain)
    assert 14 < recoloured < 24  # p = .8
    assert [a.shape for a, _, _ in dataset()] == [(60, 90, 3)] * 24  # nothing where nothing is asked


def test_proposals_are_turned_and_patches_are_not():
    array, boxes = marked_picture(), np.float32([BOX, (50, 5, 85, 50)])
    source = SimpleNamespace(load=lambda i, needs: Image.fromarray(array))

    def dataset(*augment):
        cfg = detreg.Config(**SAME_SIZE, patch_size=16, augment=augment)
        regions = detreg.RegionDataset(cfg, source, np.arange(1), lambda image, index, epoch: boxes)
        regions.photometric = D.Photometric(0, 0, 0, 0, p_jitter=0, p_gray=0, p_blur=0)
        return list(samples_of(regions))

    turned, seen, recoloured = dataset("flips", "rotate90"), set(), 0
    patches = [D.cut_patch(Image.fromarray(array), box, 16, {"order": [], "gray": False, "blur": None,
                                                            "solarize": False}) for box in boxes.tolist()]
    for image, moved, target in turned:
        box = moved[0].round().tolist()
        seen.add((*box, image.shape[0]))
        assert extent(image[..., 0] >= 150) == box and torch.equal(target["patches"], torch.stack(patches))
        areas = (moved[:, 2:] - moved[:, :2]).prod(1)
        torch.testing.assert_close(areas, torch.tensor([30.0 * 16, 35 * 45]))
    assert len(seen) == 8
    for (image, moved, target), (plain, plain_moved, _) in zip(dataset(*ALL), turned):
        assert torch.equal(moved, plain_moved) and torch.equal(target["patches"], torch.stack(patches))
        recoloured += not np.array_equal(image, plain)
    assert 14 < recoloured < 24


@pytest.mark.parametrize("script", [finetune, detreg], ids=["finetune", "detreg"])
def test_augment_on_the_command_line(script, fails):
    def parse(*argv):
        return run.parse_config(script.Config, script.PRESETS, argv, script="x", description="")

    assert parse().augment == () and parse("--augment", "colour", "flips", "--seed", "1").augment == ("colour", "flips")
    assert "--augment: invalid choice: 'rotate45' (choose from 'flips', 'rotate90', 'colour')" in fails(
        parse_all := lambda argv: parse(*argv), ["--augment", "flips", "rotate45"])
    assert "--augment: expected at least one argument" in fails(parse_all, ["--augment"])


def test_to_normalized_tensor():
    tensor = D.to_normalized_tensor(Image.new("RGB", (3, 2), (0, 255, 51)))
    assert tensor.shape == (3, 2, 3) and tensor.dtype == torch.float32
    assert torch.allclose(tensor[:, 0, 0], torch.tensor([-0.485 / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]))


def test_hue_and_normalisation_are_torchvisions_to_the_bit():
    rng = np.random.default_rng(0)
    # with grey, black, white and pure colours
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 5, dtype=np.uint8)] * 3), -1).reshape(52, -1, 3)
    for array in (every, *rng.integers(0, 256, (5, 9, 70, 3), dtype=np.uint8)):
        image = Image.fromarray(array)
        reference = TF.normalize(TF.to_dtype(TF.pil_to_tensor(image), torch.float32, scale=True),
                                 list(D.IMAGENET_MEAN), list(D.IMAGENET_STD))
        assert torch.equal(D.to_normalized_tensor(image), reference)
        for shift in rng.uniform(-0.5, 0.5, 6):
            assert np.array_equal(D.adjust_hue(image, shift), TF.adjust_hue(image, shift))


@pytest.mark.parametrize("width, height, exact", [(140, 120, False), (400, 25, False), (99, 99, True), (1, 3, True)])
def test_blur_is_pillows(width, height, exact):
    for k, sigma in enumerate((0.31, 0.73, 1.38, 1.97, 6.1)):  # boxes of 1, 1, 1, 3 and 11 whole pixels
        noise = Image.fromarray(np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8))
        off = np.abs(np.asarray(D.blur(noise, sigma), np.int16)
                     - np.asarray(noise.filter(ImageFilter.GaussianBlur(sigma))))
        assert off.max() <= (0 if exact else 1) and (off > 0).mean() < 1e-4


@pytest.mark.parametrize("size, hw, share", [((400, 278), (480, 690), 0.01), ((400, 278), (224, 224), 0.05),
                                             ((1900, 300), (201, 603), 0.02),
                                             ((400, 278), (199, 199), 0), ((160, 160), (112, 144), 0)])
def test_resize_is_pillows(size, hw, share):
    field = cv2.resize(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8), size,
                       interpolation=cv2.INTER_CUBIC)
    image = Image.fromarray(field)
    off = np.abs(np.asarray(D.resize(image, hw), np.int16)
                 - np.asarray(image.resize(hw[::-1], Image.Resampling.BILINEAR)))
    assert off.shape == (*hw, 3) and off.max() <= (share > 0) and (off > 0).mean() <= share


def test_photometric():
    spec = D.Photometric(0.4, 0.4, 0.4, 0.1, p_jitter=0.8, p_gray=0.2, p_blur=0.5, p_solarize=0.2)
    draws = [D.draw_photometric(np.random.default_rng(k), spec) for k in range(500)]
    assert draws[3] == D.draw_photometric(np.random.default_rng(3), spec) and json.dumps(draws)
    rates = [np.mean([bool(d[k]) for d in draws]) for k in ("order", "gray", "blur", "solarize")]
    assert np.allclose(rates, [0.8, 0.2, 0.5, 0.2], atol=0.06)
    assert all(0.6 <= d["brightness"] <= 1.4 and -0.1 <= d["hue"] <= 0.1
               and 0.1 <= (d["blur"] or 1) <= 2 for d in draws)
    assert len({tuple(d["order"]) for d in draws}) == 25  # 24 orders and none
    image = Image.new("RGB", (4, 4), (100, 50, 200))
    plain = {"order": [], "gray": False, "blur": None, "solarize": False}
    assert D.apply_photometric(image, plain).getpixel((0, 0)) == (100, 50, 200)
    darker = plain | {"order": ["brightness"], "brightness": 0.5}
    assert D.apply_photometric(image, darker).getpixel((0, 0)) == (50, 25, 100)
    assert D.apply_photometric(image, plain | {"solarize": True}).getpixel((0, 0)) == (100, 50, 55)
    grey = D.apply_photometric(image, plain | {"gray": True, "blur": 1.0}).getpixel((0, 0))
    assert grey == (82, 82, 82)  # .299 R + .587 G + .114 B
    both = plain | {"brightness": 1.4, "contrast": 0.6}
    orders = (["brightness", "contrast"], ["contrast", "brightness"])
    first, other = (D.apply_photometric(image, both | {"order": order}).getpixel((0, 0)) for order in orders)
    assert first != other
    assert D.draw_photometric(np.random.default_rng(0), D.Photometric(0, 0, 0, 0, 1, 0, 0))["order"] == []


# ==== Loader ====


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_sampler_invariance(world, accumulate):
    n, batch, steps = 40, 12, 8
    one = list(D.StepSampler(n, batch, steps, seed=3))
    ranks = [list(D.StepSampler(n, batch, steps, seed=3, world=world, rank=r, accumulate=accumulate))
             for r in range(world)]
    for step in range(steps):
        pieces = [ranks[r][step * accumulate + a] for a in range(accumulate) for r in range(world)]
        assert sum(pieces, []) == one[step] and len({len(p) for p in pieces}) == 1
    assert len(ranks[0]) == len(D.StepSampler(n, batch, steps, world=world, accumulate=accumulate))
    resumed = list(D.StepSampler(n, batch, steps, seed=3, start_step=5, world=world, rank=0, accumulate=accumulate))
    assert resumed == ranks[0][5 * accumulate:]


def test_sampler_epochs():
    sampler = D.StepSampler(10, 3, 6, seed=1)
    batches = list(sampler)
    assert sampler.steps_per_epoch == 3 and [b[0][0] for b in batches] == [0, 0, 0, 1, 1, 1]
    for epoch in (batches[:3], batches[3:]):
        assert len({i for b in epoch for _, i in b}) == 9
    assert [i for b in batches[:3] for _, i in b] != [i for b in batches[3:] for _, i in b]
    assert list(D.StepSampler(4, 2, 2, shuffle=False)) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]
    assert list(D.StepSampler(10, 3, 6, seed=2)) != batches and len(D.StepSampler(10, 3, 6, start_step=9)) == 0
    with pytest.raises(UserError, match="fewer than one batch of 8"):
        D.StepSampler(7, 8, 1)
    with pytest.raises(UserError, match="8 or 12 would work"):
        D.StepSampler(100, 10, 1, world=2, accumulate=2)
    with pytest.raises(UserError, match="For example 4 "):
        D.StepSampler(100, 0, 1, world=4)


class Noise:
    """A dataset of augmented scenes; index 5 is bad input when asked for."""

    def __init__(self, bad=None):
        self.scenes, self.bad = D.SyntheticScenes(16, 48), bad

    def __getitem__(self, key):
        epoch, index = key
        if index == 5 and self.bad:
            raise self.bad
        rng = D.sample_rng(0, epoch, index)
        image, boxes, _ = self.scenes.scene(index)
        geometry = D.draw_geometry(rng, (48, 48), scales=(32, 40), max_size=64,
                                   crop_scales=(48, 60), crop_range=(30, 60))
        image, boxes, _ = D.apply_geometry(image, torch.from_numpy(boxes), geometry)
        image = D.apply_photometric(image, D.draw_photometric(rng, D.Photometric(0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.5)))
        return {"image": D.to_normalized_tensor(image), "target": {"boxes": boxes},
                "skipped": [f"s{index}"] if index == 1 else []}


def test_loader_is_the_same_with_workers_and_resumes():
    def run_script(workers, start=0):
        return list(D.make_loader(Noise(), D.StepSampler(16, 4, 7, start_step=start, seed=2),
                                  num_workers=workers, collate=D.collate))
    state = torch.get_rng_state()
    zero, two, resumed = run_script(0), run_script(2), run_script(0, 5)
    assert torch.equal(state, torch.get_rng_state()) and len(zero) == len(two) == 7
    for a, b in [*zip(zero, two), *zip(zero[5:], resumed)]:
        assert (torch.equal(a["images"], b["images"]) and torch.equal(a["mask"], b["mask"])
                and a["skipped"] == b["skipped"])
        assert all(torch.equal(s["boxes"], t["boxes"]) for s, t in zip(a["targets"], b["targets"]))
    assert sum((b["skipped"] for b in zero[:4]), []) == ["s1"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bad", [UserError("file x is bad."), D.UnreadableImage("x.jpg", "cut")])
def test_loader_errors_stay_one_sentence(workers, bad):
    with pytest.raises(UserError) as error:
        list(D.make_loader(Noise(bad), D.StepSampler(16, 4, 4), num_workers=workers, collate=D.collate))
    assert "x" in str(error.value) and "Traceback" not in str(error.value)


def test_collate():
    samples = [{"image": torch.ones(3, *hw), "target": {"k": k}, "skipped": s}
               for hw, k, s in (((2, 5), 1, ["a"]), ((4, 3), 2, []))]
    batch = D.collate(samples)
    assert batch["images"].shape == (2, 3, 4, 5) and batch["images"].sum((1, 2, 3)).tolist() == [30, 36]
    assert (batch["mask"].dtype == torch.bool and (~batch["mask"]).sum((1, 2)).tolist() == [10, 12]
            and not batch["mask"][0, :2].any())
    assert batch["targets"] == [{"k": 1}, {"k": 2}] and batch["skipped"] == ["a"]


def test_load_usable(tmp_path):
    picture(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"x")
    source = D.open_images(str(tmp_path), None)
    skipped = []
    image, used = D.load_usable(source, 0, np.random.default_rng(0), skipped)
    assert (used == 1 and image.size == (20, 10) and skipped
            and all(s.startswith(f"{tmp_path / 'bad.jpg'}: ") for s in skipped))
    (tmp_path / "good.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="good.jpg|bad.jpg"):
        D.load_usable(source, 0, np.random.default_rng(0), [])


def test_skip_count(capsys):
    count = run.SkipCount(200)
    count.add(["a.jpg: cut", "a.jpg: cut", "b: c.jpg: cut"])
    count.add(["a.jpg: cut"])
    assert capsys.readouterr().err.splitlines() == ["warning: skipped a.jpg: cut", "warning: skipped b: c.jpg: cut"]
    with pytest.raises(UserError, match=r"3 of 200 .*a.jpg: cut; b: c.jpg: cut"):
        count.add(["c.jpg: cut"])


def test_skip_count_is_reported_over_all_processes(capsys, monkeypatch):
    count = run.SkipCount(500)
    count.report()
    assert capsys.readouterr().out == ""
    count.add(["b.jpg: cut", "a\n.jpg: cut"])
    count.report()
    assert capsys.readouterr().out == "skipped 2 of 500 images: a\\n.jpg: cut; b.jpg: cut\n"
    monkeypatch.setattr(run, "world_size", lambda: 2)
    other = ["b.jpg: cut", "c.jpg: cut", "d: cut"]
    monkeypatch.setattr(run.dist, "all_gather_object",
                        lambda parts, mine: parts.__setitem__(slice(None), [mine, other]))
    count.report()
    assert capsys.readouterr().out == "skipped 4 of 500 images: a\\n.jpg: cut; b.jpg: cut; c.jpg: cut; ...\n"


def test_sample_rng_streams_differ():
    draws = {D.sample_rng(*k).integers(2**40) for k in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))}
    assert len(draws) == 4 and D.sample_rng(1, 2, 3).integers(2**40) == D.sample_rng(1, 2, 3).integers(2**40)
