"""Large pictures (data.ImagePyramid): how far they are from pictures decoded whole, in pixels; boxes and draws are the
same."""
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import annotations  # noqa: E402
import data  # noqa: E402
import detreg  # noqa: E402
import dupr  # noqa: E402
import finetune  # noqa: E402
import siamese_detr  # noqa: E402
import soco  # noqa: E402
import updetr  # noqa: E402

BOXES = np.float32([[100, 200, 1700, 1300], [400, 301, 1203, 1001], [900, 700, 960, 777], [30, 20, 1900, 1450]])


def scene(size):
    """Smooth colours, edges, and 6 grey levels of noise, as of a camera."""
    rng = np.random.default_rng(0)
    array = cv2.resize(rng.uniform(20, 235, (6, 8, 3)).astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
    for _ in range(30):
        centre, radius = (rng.random(2) * size).astype(int).tolist(), int(rng.integers(20, size[1] // 6))
        cv2.circle(array, centre, radius, rng.uniform(0, 255, 3).tolist(), -1)
    array += cv2.randn(np.zeros_like(array), 0, 6)
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    cv2.setRNGSeed(0)
    folder = tmp_path_factory.mktemp("large")
    scene((4000, 3000)).save(folder / "camera.jpg", quality=90)
    small = scene((2001, 1503))
    small.save(folder / "small.jpg", quality=90)
    small.save(folder / "small.png", compress_level=1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    small.save(folder / "turned.jpg", quality=90, exif=exif)
    small.convert("L").save(folder / "grey.jpg", quality=90)
    small.convert("CMYK").save(folder / "cmyk.jpg", quality=90)
    small.save(folder / "progressive.jpg", quality=90, progressive=True)
    small.save(folder / "phone.jpg", format="MPO", save_all=True, append_images=[small.resize((40, 30))], quality=90)
    (folder / "cut.jpg").write_bytes((folder / "small.jpg").read_bytes()[:90000])
    return folder


def needs(*hw, whole=False):
    return data.Needs(lambda image_hw: hw, whole)


def difference(a, b):
    """Mean absolute difference, grey levels."""
    assert a.size == b.size
    return np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean()


def test_a_camera_picture(folder):
    whole = data.decode_image(folder / "camera.jpg")
    for hw, finest in (((450, 600), 4), ((800, 1066), 2), ((224, 224), 8), ((1501, 1), 1)):
        image = data.decode_image(folder / "camera.jpg", needs=needs(*hw))
        assert image.size == (4000, 3000) and getattr(image, "finest", 1) == finest
        if finest > 1:
            # shifted by 8 of 4000 pixels it would be 1.2 and more
            assert difference(data.cut(image, (0, 0, 4000, 3000), hw), data.resize(whole, hw)) < 0.4
    assert np.array_equal(image, whole)  # below twice the size: decoded as ever
    assert np.array_equal(data.decode_image(folder / "camera.jpg", needs=needs(1501, 2001)), whole)


@pytest.mark.parametrize("name", ["small.jpg", "small.png", "turned.jpg", "grey.jpg", "cmyk.jpg", "progressive.jpg",
                                  "phone.jpg"])
def test_every_kind_of_file(folder, name):
    whole = data.decode_image(folder / name)
    image = data.decode_image(folder / name, needs=needs(370, 370))
    width, height = image.size
    assert image.size == whole.size == ((1503, 2001) if name == "turned.jpg" else (2001, 1503))
    assert image.finest == (1 if name == "small.png" else 4) and image.copy(4).size == (-(-width // 4), -(-height // 4))
    for box in ((0, 0, width, height), (101, 202, 1303, 1407), (3, 1, 1000, 1001)):
        hw = (box[3] - box[1]) // 5, (box[2] - box[0]) // 5
        assert difference(data.cut(image, box, hw), data.cut(whole, box, hw)) < 0.7
    image = data.decode_image(folder / name, needs=needs(370, 370, whole=True))
    assert image.finest == 1 and np.array_equal(image.copy(1), whole)
    small = 900, 700, 1020, 900  # a small region: from the whole picture, the same
    assert np.array_equal(data.cut(image, small, (128, 128)), data.cut(whole, small, (128, 128)))


def test_exif_can_be_left_out(folder):
    image = data.decode_image(folder / "turned.jpg", False, needs(370, 370))
    assert image.size == (2001, 1503) and image.finest == 4
    turned = data.decode_image(folder / "turned.jpg", True, needs(370, 370)).copy(4)
    assert difference(turned, image.copy(4).transpose(Image.Transpose.ROTATE_270)) == 0


def test_a_damaged_file_is_told_as_before(folder):
    for wanted in (None, needs(370, 370)):
        with pytest.raises(data.UnreadableImage, match="cut.jpg: OSError: image file is truncated"):
            data.decode_image(folder / "cut.jpg", needs=wanted)


def test_geometry(folder):
    """Turns, flips and crops: boxes to the bit, the picture within a grey level."""
    whole = data.decode_image(folder / "small.jpg")
    boxes, turned = torch.from_numpy(BOXES), 0
    for seed in range(12):
        draw = data.draw_geometry(np.random.default_rng(seed), (1503, 2001), scales=(150, 180), max_size=260,
                                  crop_scales=(160, 200), crop_range=(100, 180), augment=("flips", "rotate90"))
        image = data.decode_image(folder / "small.jpg", needs=data.Needs(lambda hw: draw.needs()))
        view, moved, keep = data.apply_geometry(image, boxes, draw)
        plain = data.apply_geometry(whole, boxes, draw)
        assert image.finest == 4 or image.finest == 8
        assert torch.equal(moved, plain[1]) and torch.equal(keep, plain[2]) and difference(view, plain[0]) < 1
        turned += draw.turns % 2
    assert 0 < turned < 12


def datasets(source):
    """{method: a small data set of this source}, proposals from a stand-in for a store."""
    def proposals_of(image, index, epoch):
        return BOXES

    proposals_of.store, one = True, np.arange(len(source))
    view = {"scales": (144, 160), "max_size": 240}
    crops = {"crop_scales": (150, 170), "crop_range": (100, 160)}
    record = annotations._RecordBuilder().record(
        source.root / source.key(0), 1, (1503, 2001), [(*box, False, 0, False, False, float("nan")) for box in
                                                       BOXES.tolist()], "large")
    labelled = annotations.DetectionSet("large", [{"id": 1, "name": "thing"}], [record], [])
    return {"detreg": detreg.RegionDataset(detreg.Config(**view, **crops), source, one, proposals_of),
            "updetr": updetr.PatchDataset(updetr.Config(**view), source, one),
            "siamese_detr": siamese_detr.TwoViewDataset(siamese_detr.Config(**view, patch_size=32), source, one,
                                                        proposals_of),
            "soco": soco.ObjectViewsDataset(soco.Config(image_size=96, small_size=48), source, one, proposals_of),
            "dupr": dupr.TwoCropsDataset(dupr.Config(image_size=96), source, one),
            "finetune": finetune.LabelledDataset(finetune.Config(**view, **crops), labelled)}


def tensors(value, path=""):
    """{path: tensor} of a sample."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: v for key, part in parts for k, v in tensors(part, f"{path}/{key}").items()}


@pytest.mark.parametrize("method", ["detreg", "updetr", "siamese_detr", "soco", "dupr", "finetune"])
def test_samples(folder, method, monkeypatch):
    """Of a picture decoded whole: the same numbers but for the pixels, which differ by some hundredths of their
    deviation."""
    dataset = datasets(data.ImageFiles("large", folder, ["small.jpg"]))[method]
    kept, used, reduction = [], [], data.reduction
    for epoch in range(2):
        monkeypatch.setattr(data, "reduction", lambda *sizes: used.append(reduction(*sizes)) or used[-1])
        kept.append(tensors(dataset[epoch, 0]))
        monkeypatch.setattr(data, "reduction", lambda *sizes: 1)
        for name, value in tensors(dataset[epoch, 0]).items():
            mine = kept[-1].pop(name)
            if value.dim() >= 3 and value.shape[-3] == 3 and value.is_floating_point():
                assert mine.shape == value.shape and (mine - value).abs().mean() < 0.05, name
            else:
                assert torch.equal(mine, value), name
        assert not kept[-1] and max(used) > 1
