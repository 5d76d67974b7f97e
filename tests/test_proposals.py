"""Proposals: values by hand, seeded order, edge boxes on a known picture, the store under kills, truncation and wrong
data, and what a method gets of it."""
from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data as D  # noqa: E402
import detreg  # noqa: E402
import files  # noqa: E402
import proposals as P  # noqa: E402
import run  # noqa: E402
from common import UserError  # noqa: E402
from data import UnreadableImage  # noqa: E402


class Pictures:
    """n noisy pictures with two patches each; `bad` indices cannot be read, `slow` seconds per load."""

    def __init__(self, n: int = 12, name: str = "pictures", bad: tuple[int, ...] = (),
                 prefix: str = "a", slow: float = 0.0):
        self.n, self.name, self.bad, self.prefix, self.slow = n, name, bad, prefix, slow

    def __len__(self) -> int:
        return self.n

    def key(self, i: int) -> str:
        return f"{self.prefix}/{i:05d}.png"

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(map(self.key, range(self.n))).encode()).hexdigest()

    def load(self, i: int) -> Image.Image:
        time.sleep(self.slow)
        if i in self.bad:
            raise UnreadableImage(self.key(i), "truncated")
        rng = np.random.default_rng(i)
        image = rng.integers(100, 130, (50 + i, 70, 3), dtype=np.uint8)
        image[5:25, 8:30] = rng.integers(0, 255, 3)
        image[20:45, 35:60] = rng.integers(0, 255, 3)
        return Image.fromarray(image)


CHEAP = P.Generator(method="random", grid=128)


def same_store(a: P.ProposalStore, b: P.ProposalStore, hw=(50, 70)) -> bool:
    return len(a) == len(b) and all(np.array_equal(a.boxes(i, hw), b.boxes(i, hw)) for i in range(len(a)))


def iou(box, boxes):
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    inter = sides.clip(0).prod(1)
    return inter / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - inter)


# ==== Values by hand ====


def test_rects_to_boxes_by_hand():
    rects = np.array([[0, 0, 128, 128], [32, 64, 16, 32]])
    assert P.rects_to_boxes(rects, (100, 200), 128).tolist() == [[0, 0, 200, 100], [50, 50, 75, 75]]
    assert P.rects_to_boxes(rects, (100, 200), None).tolist() == [[0, 0, 128, 128], [32, 64, 48, 96]]
    empty = P.rects_to_boxes(np.zeros((0, 4), int), (5, 5), 128)
    assert empty.shape == (0, 4) and empty.dtype == np.float32


def test_importance_probability_closed_form():
    ln2 = math.log(2)
    assert np.allclose(detreg.importance_probability(2, 1), [1, 0])  # w = ln 2, 0
    total = math.log(4) + ln2 + math.log(4 / 3)  # n = 4: w = ln 4, ln 2, ln 4/3, 0
    assert np.allclose(detreg.importance_probability(4, 1), [2 * ln2 / total, ln2 / total, math.log(4 / 3) / total, 0])
    assert np.allclose(detreg.importance_probability(4, 2)[:2], [1, 2 * ln2 / total])  # 4 ln 2 / total = 1.18, cut to 1
    assert detreg.importance_probability(1, 30).tolist() == [1] and detreg.importance_probability(0, 30).shape == (0,)
    assert detreg.importance_probability(1000, 30).sum() == pytest.approx(30)
    released = detreg.importance_probability(400, 30, released=True)
    assert released[0] == pytest.approx(math.log(301) / 10) and released[299] == pytest.approx(math.log(301 / 300) / 10)
    assert (released[300:] == 0).all() and released.dtype == np.float64


def test_select():
    boxes = np.repeat(np.arange(100, dtype=np.float32)[:, None], 4, 1)
    rng = np.random.default_rng(0)
    assert detreg.select(boxes, "topk", 3, rng)[:, 0].tolist() == [0, 1, 2]
    chosen = detreg.select(boxes, "randomk", 30, rng)[:, 0]
    assert len(set(chosen.tolist())) == 30 and (np.diff(chosen) > 0).all()
    for policy in ("topk", "randomk", "importance"):
        assert len(detreg.select(boxes[:5], policy, 30, rng)) == 5
        assert len(detreg.select(boxes[:1], policy, 1, rng)) == 1
        assert len(detreg.select(boxes[:0], policy, 30, rng)) == 0
    for policy in ("importance", "importance_released"):
        drawn = [detreg.select(boxes, policy, 20, rng)[:, 0].astype(int) for _ in range(2000)]
        assert all((np.diff(d) > 0).all() for d in drawn if len(d) > 1)
        p = detreg.importance_probability(100, 20, released=policy.endswith("released"))
        # 5 standard deviations
        assert np.abs(np.bincount(np.concatenate(drawn), minlength=100) / 2000 - p).max() < 0.06


def test_rank_nms():
    big, near, other = [10, 10, 60, 60], [11, 10, 61, 60], [5, 65, 95, 95]
    unusable = [[0, 0, 100, 100], [0, 0, 5, 5], [0, 50, 100, 55]]  # > 95 %, < 0.5 %, aspect 20
    boxes = np.array([*unusable, big, near, other], np.float32)
    ranked = P.rank_nms(boxes, (100, 100), np.random.default_rng(3))
    assert len(ranked) == 2 and other in ranked.tolist() and (big in ranked.tolist()) != (near in ranked.tolist())
    again = P.rank_nms(boxes[::-1], (100, 100), np.random.default_rng(3))
    assert np.array_equal(ranked, again)  # the order that came in does not matter
    orders = {tuple(map(tuple, P.rank_nms(boxes, (100, 100), np.random.default_rng(s)).tolist())) for s in range(20)}
    assert len(orders) == 4  # (big | near) x (before | after other)
    fallen_back = P.rank_nms(boxes[:3], (100, 100), np.random.default_rng(0))
    assert sorted(fallen_back.tolist()) == sorted(boxes[:3].tolist())
    assert len(P.rank_nms(boxes[:0], (100, 100), np.random.default_rng(0))) == 0


def test_random_boxes():
    rng = np.random.default_rng(0)
    boxes = P.random_boxes(rng, (60, 200), 500)
    assert (boxes.dtype == np.float32 and boxes.shape == (500, 4) and (boxes >= 0).all()
            and (boxes <= [200, 60, 200, 60]).all())
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    pool = np.array([[0.5, 0.25], [0.1, 1.0]])
    boxes = P.random_boxes(rng, (60, 200), 500, pool)
    sizes = {tuple(s) for s in (boxes[:, 2:] - boxes[:, :2]).round().astype(int).tolist()}
    assert sizes == {(100, 15), (20, 60)} and boxes[:, 0].max() > 150


# ==== Selective search ====


def test_selective_search_order_is_seeded_and_set_is_not():
    image = np.asarray(Pictures().load(3))
    first, again, other = (P.selective_search(image, seed=s) for s in (7, 7, 8))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert sorted(first.tolist()) == sorted(other.tolist()) and len(first) > 4
    assert first.dtype == np.float32 and (first <= [70, 53, 70, 53]).all() and (first >= 0).all()


def test_quick_mode(tmp_path):
    """D6, on one scene: its order is seeded and its set is not, all objects are found, with other boxes than fast; the
    header names it."""
    image, truth, _ = D.SyntheticScenes(1, offset=4).scene(0)
    first, again, other = (P.selective_search(np.asarray(image), mode="quick", seed=s) for s in (7, 7, 8))
    assert (np.array_equal(first, again) and not np.array_equal(first, other)
            and sorted(first.tolist()) == sorted(other.tolist()))
    assert 75 < len(first) < 95 and (first >= 0).all() and (first[:, 2:] > first[:, :2]).all() and (first <= 160).all()
    assert len(truth) == 4 and all(iou(box, first).max() > 0.6 for box in truth)
    fast = P.selective_search(np.asarray(image), seed=7).tolist()
    assert 0 < sum(box in fast for box in first.tolist()) < 45  # both have the whole image and some regions
    store = P.main(["--data", "synthetic", "--limit", "2", "--mode", "quick", "--out", str(tmp_path / "s")])
    assert (store.header["mode"] == "quick" and store.header["grid"] == 128
            and "--mode quick" in P._build_command(store.header, store.path))


def test_store_of_the_synthetic_pool_of_a_script(tmp_path):
    """The same --seed and --synthetic_images as in a script's command name the same scenes."""
    store = P.main(["--data", "synthetic", "--synthetic_images", "2", "--seed", "3", "--mode", "quick",
                    "--out", str(tmp_path / "s")])
    pool = D.open_images("synthetic", None, synthetic_images=2, seed=3)
    assert len(P.ProposalStore.open(store.path, pool)) == 2
    with pytest.raises(P.UserError, match="another list of files"):
        P.ProposalStore.open(store.path, D.open_images("synthetic", None, synthetic_images=2, seed=4))


def test_selective_search_without_a_seedable_c_library(monkeypatch):
    image = np.asarray(Pictures().load(3))
    ordinary = P.selective_search(image, seed=7)
    monkeypatch.setattr(P, "_c_srand", lambda: None)
    first, again, other = (P.selective_search(image, seed=s) for s in (7, 7, 8))
    assert (np.array_equal(first, again) and not np.array_equal(first, other)
            and sorted(first.tolist()) == sorted(ordinary.tolist()))
    assert "shuffle" in P.Generator().header()["order"]


@pytest.mark.parametrize("shape", [(40, 60, 3), (1, 50, 3), (50, 1, 3), (1, 1, 3), (3, 3, 3)])
@pytest.mark.parametrize("grid", [128, None])
def test_flat_and_tiny_images_give_the_full_box(shape, grid):
    boxes = P.selective_search(np.full(shape, 9, np.uint8), grid=grid, seed=1)
    assert boxes.tolist() == [[0, 0, shape[1], shape[0]]]


def test_image_seed():
    assert P.image_seed(1, "a") == P.image_seed(1, "a") == 146712746
    seeds = {P.image_seed(s, e, i) for s in range(5) for e in range(5) for i in range(40)}
    assert len(seeds) == 1000 and all(0 <= s < 2**31 for s in seeds) and P.image_seed(1, 23) != P.image_seed(12, 3)


# ==== Edge boxes ====


@pytest.mark.parametrize("short_side", [None, 100])
def test_edge_boxes_find_a_rectangle(short_side):
    image = np.full((160, 220, 3), 40, np.uint8)
    image[40:120, 60:150] = (250, 240, 200)
    boxes = P.edge_boxes(image, short_side=short_side)
    assert iou(np.array([60, 40, 150, 120]), boxes[:10]).max() > 0.5
    assert (np.array_equal(boxes, boxes.round()) and (boxes >= 0).all()
            and (boxes <= [220, 160, 220, 160]).all() and len(boxes) <= 512)
    assert np.array_equal(boxes, P.edge_boxes(image, short_side=short_side, seed=5))


def test_edge_boxes_last_resort_is_the_centre():
    assert P.edge_boxes(np.full((80, 120, 3), 90, np.uint8)).tolist() == [[30, 20, 90, 60]]
    for shape in [(1, 50, 3), (50, 1, 3), (1, 1, 3)]:
        boxes = P.edge_boxes(np.zeros(shape, np.uint8))
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes <= [shape[1], shape[0]] * 2).all()


def test_edge_model_errors_say_where_the_file_is(tmp_path):
    (tmp_path / "broken.yml").write_text("not a forest")
    for file in ("missing.yml.gz", "broken.yml"):
        with pytest.raises(UserError, match=f"{file}.*opencv_extra"):
            P.edge_boxes(np.zeros((40, 40, 3), np.uint8), edge_model=str(tmp_path / file))


# ==== Store ====


@pytest.mark.parametrize("method,grid,dtype", [("selective_search", 128, "uint8"), ("random", 300, "uint16"),
                                               ("selective_search", None, "uint16"), ("edge_boxes", None, "uint16"),
                                               ("random", None, "uint16"), ("random", 255, "uint8")])
@pytest.mark.parametrize("rank", ["opencv", "nms"])
def test_store_returns_what_the_generator_gives(tmp_path, method, grid, dtype, rank):
    source = Pictures(3)
    generator = P.Generator(method=method, grid=grid, rank=rank)
    store = P.build_store(tmp_path / "s", source, generator, progress=False)
    assert store.header["dtype"] == dtype and len(store) == 3
    for i in range(3):
        image = source.load(i)
        boxes = generator(image, P.image_seed(42, source.key(i)))
        assert np.array_equal(store.boxes(i, image.size[::-1]), boxes) and boxes.dtype == np.float32  # bit for bit
        assert ((boxes >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
                and (boxes <= np.array([70, 50 + i] * 2) + 1e-4).all())
    with pytest.raises(IndexError):
        store.boxes(3, (50, 70))


def test_header_and_reopening(tmp_path, capsys):
    source = Pictures(4)
    store = P.build_store(tmp_path / "s", source, CHEAP, progress=False)
    assert "4 images" in capsys.readouterr().out
    meta = json.loads((tmp_path / "s/meta.json").read_text())
    assert (meta == store.header and meta["opencv"] == cv2.__version__ and meta["seed"] == 42
            and meta["fingerprint"] == source.fingerprint())
    assert {f.name for f in (tmp_path / "s").iterdir()} == {"meta.json", "boxes.bin", "offsets.npy"}
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "s").iterdir()}
    P.build_store(tmp_path / "s", source, CHEAP, progress=False)
    assert "already complete" in capsys.readouterr().out and before == {f: f.stat().st_mtime_ns for f in before}


def test_opening_maps_and_does_not_read(tmp_path):
    store = P.build_store(tmp_path / "s", Pictures(2), CHEAP, progress=False)
    assert isinstance(store._rects, np.memmap) and isinstance(store._offsets, np.memmap)
    copy = pickle.dumps(store)
    assert len(copy) < 2000 and same_store(pickle.loads(copy), store)  # a spawned worker gets the path, not the boxes
    n = 20_000_000  # 160 MB of offsets and 800 MB of boxes, as sparse files: reading them would show
    with open(tmp_path / "s/offsets.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (n + 1,)})
        file.seek(8 * n, os.SEEK_CUR)
        file.write(np.int64(10 * n).tobytes())
    os.truncate(tmp_path / "s/boxes.bin", 40 * n)
    (tmp_path / "s/meta.json").write_text(json.dumps(store.header | {"images": n}))
    began = time.perf_counter()
    assert len(P.ProposalStore.open(tmp_path / "s")) == n and time.perf_counter() - began < 0.05


def test_unreadable_images_have_no_boxes_and_are_limited(tmp_path, capsys):
    store = P.build_store(tmp_path / "s", Pictures(200, bad=(7,)), CHEAP, progress=False)
    assert (store.boxes(7, (57, 70)).shape == (0, 4) and len(store.boxes(8, (58, 70))) == 300
            and store.header["unreadable"] == 1)
    assert "a/00007.png" in capsys.readouterr().err
    with pytest.raises(UserError, match="a/0000"):
        P.build_store(tmp_path / "t", Pictures(200, bad=(3, 4, 5)), CHEAP, progress=False)
    # repaired: the tail of failures is tried again
    whole = P.build_store(tmp_path / "t", Pictures(200), CHEAP, progress=False)
    assert (same_store(whole, P.build_store(tmp_path / "u", Pictures(200), CHEAP, progress=False))
            and whole.header["unreadable"] == 0)


def test_store_of_nothing_but_empty_images(tmp_path, monkeypatch):
    monkeypatch.setattr(P.Generator, "rects", lambda *_: np.zeros((0, 4), np.int32))
    store = P.build_store(tmp_path / "s", Pictures(3), CHEAP, progress=False)
    assert [len(store.boxes(i, (50, 70))) for i in range(3)] == [0, 0, 0]


class Killed(Exception):
    pass


def interrupted(path: Path, source: Pictures, at: int) -> None:
    """A build that stops at image `at`; chunks are made one image small."""
    load = source.load
    source.load = lambda i: (_ for _ in ()).throw(Killed()) if i == at else load(i)
    with pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(P, "min", lambda *v: 1 if v[0] == 16 else min(*v), raising=False)
        P.build_store(path, source, CHEAP, progress=False)
    source.load = load


@pytest.mark.parametrize("cut_boxes,cut_counts",
                         [(0, 0), (1, 0), (1199, 0), (1200, 0), (0, 1), (0, 5), (3001, 9), (10**6, 0), (0, 10**6)])
def test_resume_after_truncation_anywhere(tmp_path, cut_boxes, cut_counts):
    whole = P.build_store(tmp_path / "whole", Pictures(10), CHEAP, progress=False)
    interrupted(tmp_path / "s", Pictures(10), 8)
    with pytest.raises(UserError, match="unfinished.*python proposals.py"):
        P.ProposalStore.open(tmp_path / "s")
    for name, cut in (("boxes.partial", cut_boxes), ("counts.partial", cut_counts)):
        file = tmp_path / "s" / name
        assert file.stat().st_size == (8 * 1200 if name[0] == "b" else 8 * 4)
        os.truncate(file, max(file.stat().st_size - cut, 0))
    source = Pictures(10)
    load = source.load
    loaded = []
    source.load = lambda i: loaded.append(i) or load(i)
    store = P.build_store(tmp_path / "s", source, CHEAP, progress=False)
    assert same_store(store, whole)
    left = max(min((9600 - cut_boxes) // 1200, (32 - cut_counts) // 4), 0)
    assert loaded == list(range(left, 10))  # finished images are not done again


def test_resume_between_the_last_steps(tmp_path, monkeypatch):
    whole = P.build_store(tmp_path / "whole", Pictures(5), CHEAP, progress=False)
    write = run.write_json
    with pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_json",
                      lambda path, v: (_ for _ in ()).throw(Killed()) if path.name == "meta.json" else write(path, v))
        P.build_store(tmp_path / "s", Pictures(5), CHEAP, progress=False)
    assert (tmp_path / "s/boxes.bin").exists()
    source = Pictures(5, bad=tuple(range(5)))  # nothing is left to load
    assert same_store(P.build_store(tmp_path / "s", source, CHEAP, progress=False), whole)


def test_sigkill_of_a_build_with_workers(tmp_path):
    code = (f"import sys; sys.path[:0] = {[str(Path(P.__file__).parent), str(Path(__file__).parent)]!r}\n"
            f"import proposals as P, test_proposals as T\n"
            f"P.build_store({str(tmp_path / 's')!r}, T.Pictures(100, slow=.01), T.CHEAP, workers=2, progress=False)")
    process = subprocess.Popen([sys.executable, "-c", code])
    counts = tmp_path / "s/counts.partial"
    deadline = time.time() + 60
    while time.time() < deadline and not (counts.exists() and counts.stat().st_size > 4 * 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 20 < counts.stat().st_size // 4 < 100
    whole = P.build_store(tmp_path / "whole", Pictures(100), CHEAP, progress=False)
    assert same_store(P.build_store(tmp_path / "s", Pictures(100), CHEAP, progress=False), whole)


# ==== Store under fire ====


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def in_another_process(job) -> multiprocessing.Process:
    """Started; forked, so that it is there at once, and without OpenCV's own threads, which no fork survives."""
    cv2.setNumThreads(0)
    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    return process


def wait_for(counts: Path, images: int) -> None:
    deadline = time.time() + 60
    while not (counts.exists() and counts.stat().st_size >= 4 * images):
        assert time.time() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("workers", (0, 2))
def test_sigkill_again_and_again(tmp_path, workers):
    P.build_store(tmp_path / "whole", Pictures(150, bad=(77,)), CHEAP, progress=False)
    slow = Pictures(150, bad=(77,), slow=0.004)
    for images in (3, 17, 18, 60, 101):
        process = in_another_process(lambda: P.build_store(tmp_path / "s", slow, CHEAP,
                                                           workers=workers, progress=False))
        wait_for(tmp_path / "s/counts.partial", images)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    # at once: the dead one's lock is gone
    P.build_store(tmp_path / "s", Pictures(150, bad=(77,)), CHEAP, workers=workers, progress=False)
    assert content(tmp_path / "s") == content(tmp_path / "whole")


def test_sigkill_before_every_system_call_that_writes(tmp_path):
    """The k-th run dies before its k-th write, flush, fsync, truncate, rename or unlink; the same command follows."""
    whole = P.build_store(tmp_path / "whole", Pictures(4), CHEAP, progress=False).path

    def die_at(k: int) -> None:
        left = [k]

        def count(frame, event, function):
            if event == "c_call" and function.__name__ in ("write", "flush", "fsync", "truncate",
                                                           "replace", "unlink", "mkdir"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        P.min = lambda *v: 1 if v[0] == 16 else min(*v)  # chunks of one image
        sys.stdout = open(os.devnull, "w")
        sys.setprofile(count)
        P.build_store(tmp_path / "s", Pictures(4), CHEAP, progress=False)

    for k in range(1, 200):
        process = in_another_process(lambda: die_at(k))
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        P.build_store(tmp_path / "s", Pictures(4), CHEAP, progress=False)
        assert content(tmp_path / "s") == content(whole), k
        shutil.rmtree(tmp_path / "s")
    assert 20 < k < 199 and content(tmp_path / "s") == content(whole)


def test_two_writers(tmp_path, capsys):
    P.build_store(tmp_path / "whole", Pictures(60), CHEAP, progress=False)
    first = in_another_process(lambda: P.build_store(tmp_path / "s", Pictures(60, slow=0.02), CHEAP,
                                                     workers=1, progress=False))
    wait_for(tmp_path / "s/counts.partial", 1)
    for _ in range(2):  # being refused takes nothing from the first
        with pytest.raises(UserError, match="is being filled by another process"):
            P.build_store(tmp_path / "s", Pictures(60), CHEAP, progress=False)
    first.join()
    assert first.exitcode == 0 and content(tmp_path / "s") == content(tmp_path / "whole")
    P.build_store(tmp_path / "s", Pictures(60), CHEAP, progress=False)
    assert "already complete, 60 images" in capsys.readouterr().out


def test_two_writers_at_the_same_moment(tmp_path):
    """Eight of them: each fills it, is refused, or finds it complete; the store is right every time."""
    whole = P.build_store(tmp_path / "whole", Pictures(8), CHEAP, progress=False).path

    def build(k: int) -> None:
        try:
            P.build_store(tmp_path / f"s{k}", Pictures(8), CHEAP, progress=False)
        except UserError as error:
            os._exit(0 if "another process" in str(error) else 1)

    for k in range(5):
        writers = [in_another_process(lambda: build(k)) for _ in range(8)]
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0] * 8 and content(tmp_path / f"s{k}") == content(whole)


class Disk:
    """`room` bytes are left; what goes beyond is cut off, as by write(2), and then refused."""

    def __init__(self, room: int, patch: pytest.MonkeyPatch):
        disk, self.room = self, room

        class File(files._File):
            def write(self, piece):
                if not disk.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
                written = super().write(memoryview(piece)[:disk.room])
                disk.room -= written
                return written

        def opened(path, mode="r", *args, **kwargs):
            return io.BufferedWriter(File(path, mode)) if mode in ("wb", "ab") else open(path, mode, *args, **kwargs)
        patch.setattr(P, "open", opened, raising=False)
        patch.setattr(files, "_File", File)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, fails):
    """Wherever it fills up: one sentence and exit code 2, and with room the same command continues."""
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Pictures().load(i).save(tmp_path / f"pictures/{i}.png")
    argv = ["--data", "pictures", "--method", "random", "--grid", "128", "--out"]
    monkeypatch.setattr(P, "min", lambda *v: 1 if v[0] == 16 else min(*v), raising=False)  # chunks of one image
    P.main([*argv, "whole"])
    total = sum(map(len, content(tmp_path / "whole").values()))
    finished = []
    for room in (0, 10, 600, 1700, 1800, 4000, 7700, 7900, 8000, total - 1):
        with monkeypatch.context() as patch:
            disk = Disk(room, patch)
            assert ": cannot be written (No space left on device); what was saved before" in fails(P.main, [*argv, "s"])
            assert disk.room == 0
        kept = (tmp_path / "s/counts.partial").stat().st_size // 4 if (tmp_path / "s/counts.partial").exists() else 0
        loaded = []
        load = D.ImageFiles.load
        with monkeypatch.context() as patch:
            patch.setattr(D.ImageFiles, "load", lambda self, i: loaded.append(i) or load(self, i))
            P.main([*argv, "s"])
        assert content(tmp_path / "s") == content(tmp_path / "whole") and loaded == list(range(kept, 6))
        finished.append(kept)
        shutil.rmtree(tmp_path / "s")
    assert finished == sorted(finished) and finished[0] == 0 and finished[-1] == 6 and len(set(finished)) > 3


@pytest.mark.parametrize("name, change", {
    "no number in the header": ("meta.json", lambda b: b.replace(b'"images": 5', b'"images": "5"')),
    "a key is missing": ("meta.json", lambda b: b.replace(b'"units"', b'"unit"')),
    "objects instead of numbers": ("meta.json", lambda b: b.replace(b'"uint8"', b'"O"')),
    "no format version": ("meta.json", lambda b: b'{"version": 1}'),
    "a later version": ("meta.json", lambda b: b.replace(b'"format_version": 1', b'"format_version": 9')),
    "a list": ("meta.json", lambda b: b"[]"), "cut": ("meta.json", lambda b: b[:99]),
    "no text": ("meta.json", lambda b: b"\xff"),
    "no offsets": ("offsets.npy", lambda b: b""), "cut offsets": ("offsets.npy", lambda b: b[:-8]),
    "an odd bracket": ("offsets.npy", lambda b: b.replace(b"}", b"[")),
    "a pickle": ("offsets.npy", lambda b: pickle.dumps([0] * 6)),
    "offsets with objects": ("offsets.npy", lambda b: npy(np.array([0] * 6, object))),
    "offsets with fractions": ("offsets.npy", lambda b: npy(np.zeros(6))),
    "one offset": ("offsets.npy", lambda b: npy(np.int64(0))),
    "negative offsets": ("offsets.npy", lambda b: npy(np.arange(-5, 1))), "boxes cut": ("boxes.bin", lambda b: b[:-1]),
    "more boxes": ("boxes.bin", lambda b: b + b[:4])}.items(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_damaged_store_is_refused(name, change, tmp_path, fails):
    P.build_store(tmp_path / "s", Pictures(5), CHEAP, progress=False)
    file, damage = change
    (tmp_path / "s" / file).write_bytes(damage((tmp_path / "s" / file).read_bytes()))
    message = fails(lambda argv: P.ProposalStore.open(*argv), [tmp_path / "s"])
    assert str(tmp_path / "s") in message and ("is damaged" in message or "cannot be read as the header" in message)


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize("damage", ("offsets", "a box without width", "a box outside"))
def test_damage_inside_is_found_where_it_is_read(damage, tmp_path):
    """Opening reads no boxes; what would train on other images' boxes, or on impossible ones, ends there."""
    store = P.build_store(tmp_path / "s", Pictures(5), CHEAP, progress=False)
    offsets = np.load(tmp_path / "s/offsets.npy")
    boxes = np.fromfile(tmp_path / "s/boxes.bin", np.uint8).reshape(-1, 4)
    del store
    if damage == "offsets":
        offsets[2] = offsets[-1] + 7
    else:
        boxes[400] = (3, 3, 0, 9) if damage == "a box without width" else (120, 3, 9, 9)
    (tmp_path / "s/offsets.npy").write_bytes(npy(offsets))
    boxes.tofile(tmp_path / "s/boxes.bin")
    store = P.ProposalStore.open(tmp_path / "s")
    assert len(store.boxes(0, (50, 70))) == 300
    with pytest.raises(UserError, match="s is damaged, or image 1 has changed since"):
        store.boxes(1, (51, 70))


def test_an_image_that_became_smaller_is_found(tmp_path):
    store = P.build_store(tmp_path / "s", Pictures(2), P.Generator(method="random", grid=None), progress=False)
    assert len(store.boxes(1, (51, 70))) == 300
    with pytest.raises(UserError, match="image 1 has changed since: its boxes are not inside its 35 x 51 px"):
        store.boxes(1, (51, 35))


def test_foreign_folders_stay_as_they_are(tmp_path):
    for file in ("boxes.bin", "meta.json"):
        (tmp_path / file).mkdir()
        (tmp_path / file / file).write_text("mine")
        with pytest.raises(UserError,
                           match="no header: nothing to continue, and maybe not ours|cannot be read as the header"):
            P.build_store(tmp_path / file, Pictures(2), CHEAP, progress=False)
        assert (tmp_path / file / file).read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match=str(out)):
            P.build_store(out, Pictures(2), CHEAP, progress=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_refusals_say_why(tmp_path):
    with pytest.raises(UserError, match="does not exist.*python proposals.py"):
        P.ProposalStore.open(tmp_path / "s")
    P.build_store(tmp_path / "s", Pictures(5), CHEAP, progress=False)
    # the files count, not the name
    assert len(P.ProposalStore.open(tmp_path / "s", Pictures(5, name="elsewhere"))) == 5
    with pytest.raises(UserError, match="made from 5 images of pictures, this has 6"):
        P.ProposalStore.open(tmp_path / "s", Pictures(6))
    with pytest.raises(UserError, match="same number of images.*another list of files"):
        P.ProposalStore.open(tmp_path / "s", Pictures(5, prefix="b"))
    with pytest.raises(UserError, match="seed: 42 there, 1 now"):
        P.build_store(tmp_path / "s", Pictures(5), P.Generator(method="random", grid=128, seed=1), progress=False)
    interrupted(tmp_path / "t", Pictures(5), 3)
    with pytest.raises(UserError, match="grid: 128 there, 64 now"):
        P.build_store(tmp_path / "t", Pictures(5), P.Generator(method="random", grid=64), progress=False)
    os.truncate(tmp_path / "s/boxes.bin", 17)
    with pytest.raises(UserError, match="damaged"):
        P.ProposalStore.open(tmp_path / "s")
    (tmp_path / "s/meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json"):
        P.ProposalStore.open(tmp_path / "s")


def test_two_workers_equal_none(tmp_path):
    source = Pictures(9)
    generator = P.Generator(grid=64)
    alone = P.build_store(tmp_path / "a", source, generator, workers=0, progress=False)
    threads = cv2.getNumThreads()
    assert (same_store(alone, P.build_store(tmp_path / "b", source, generator, workers=2, progress=False))
            and cv2.getNumThreads() == threads)
    assert (tmp_path / "a/boxes.bin").read_bytes() == (tmp_path / "b/boxes.bin").read_bytes()
    with pytest.raises(UserError, match="opencv_extra"):  # before any worker starts
        P.build_store(tmp_path / "c", source,
                      P.Generator(method="edge_boxes", grid=None, edge_model="none.yml"), workers=2)


class Dying(Pictures):
    def load(self, i: int) -> Image.Image:
        os._exit(9)


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path):
    with pytest.raises(UserError, match="fewer --workers"):
        P.build_store(tmp_path / "s", Dying(4), CHEAP, workers=1, progress=False)


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        (tmp_path / "some-pictures").mkdir(exist_ok=True)
        Pictures().load(i).save(tmp_path / f"some-pictures/{i}.png")
    for _ in range(2):
        store = P.main(["--data=some-pictures", "--method", "selective-search", "--limit", "3"])
    assert len(store) == 3 and store.path == Path("proposals/some-pictures-selective_search-128")
    assert "already complete, 3 images" in capsys.readouterr().out
    store = P.main(["--data", "some-pictures", "--data-root=x-y", "--method", "edge_boxes", "--rank",
                    "nms", "--out", "my-store", "--max-boxes", "5"])
    assert store.header["units"] == "pixels" and store.path == Path("my-store") and store.header["max_boxes"] == 5
    assert "rank nms, not opencv" in capsys.readouterr().out
    with pytest.raises(UserError, match="grid"):
        P.main(["--data", "some-pictures", "--grid", "-1"])


# ==== Number of boxes, colours, what is not as published ====


def test_number_of_boxes():
    image = np.asarray(Pictures().load(0))
    for method, most in (("edge_boxes", 512), ("random", 300), ("selective_search", None)):
        generator = P.Generator(method, grid=None if method == "edge_boxes" else 64)
        assert generator.most == generator.header()["max_boxes"] == most
        few = P.Generator(method, grid=generator.grid, max_boxes=3)
        assert few.header()["max_boxes"] == 3 and len(few(image, 5)) == 3
        if method != "random":  # that draws all coordinates at once
            assert np.array_equal(few(image, 5), generator(image, 5)[:3])
        flags = P.Proposals(Config(method, max_boxes=3)).generator
        assert flags.max_boxes == 3 and P.Proposals(Config(method)).generator.most == most


def test_stores_from_before_the_number_of_boxes_was_a_setting(tmp_path, capsys):
    source, edges = Pictures(2), P.Generator("edge_boxes", grid=None, max_boxes=300)
    P.build_store(tmp_path / "s", source, edges, progress=False)
    meta = json.loads((tmp_path / "s/meta.json").read_text())
    before = {k: v for k, v in meta.items() if k not in ("max_boxes", "colours")}
    (tmp_path / "s/meta.json").write_text(json.dumps(before))
    assert P.ProposalStore.open(tmp_path / "s", source).header == meta
    assert "--max_boxes 300" in P._build_command(meta, tmp_path) and "colours" not in P._build_command(meta, tmp_path)
    with pytest.raises(UserError, match="begun with other settings \\(max_boxes: 300 there, 512 now\\)"):
        P.build_store(tmp_path / "s", source, P.Generator("edge_boxes", grid=None), progress=False)
    capsys.readouterr()
    P.open_proposals(Config("edge_boxes", proposal_store=str(tmp_path / "s")), source)
    said = capsys.readouterr().out
    assert ", max_boxes 300, " in said and "edges are found without" in said and "max_boxes 300, not 512" in said


def test_edge_boxes_that_are_not_the_published_ones_are_said(tmp_path, capsys):
    note = "note: not the edge boxes of Siamese DETR's published recipe: "
    P.open_proposals(Config("edge_boxes", out=tmp_path), Pictures(2))
    said = capsys.readouterr().out
    assert said.startswith(f"{note}edges are found without a model") and P.EDGE_MODEL in said and said.count("\n") == 1
    head = P.Generator("edge_boxes", grid=None).header() | {"edge_model": "model.yml.gz sha256 0"}
    for changed, text in (({}, ""), ({"grid": 224}, f"{note}grid 224, not original size\n"),
                          ({"rank": "nms"}, f"{note}rank nms, not opencv\n"), ({"method": "random", "grid": 3}, "")):
        P.print_edge_note(head | changed)
        assert capsys.readouterr().out == text
    P.open_proposals(Config("random", out=tmp_path), Pictures(2))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="opencv_extra"):  # before the first batch
        P.open_proposals(Config("edge_boxes", edge_model="missing.yml.gz"), Pictures(2))


def test_colours_of_selective_search():
    image = np.asarray(Pictures().load(3))
    bgr = P.Generator(grid=64, colours="bgr")
    assert np.array_equal(bgr(image, 1), P.Generator(grid=64)(np.ascontiguousarray(image[..., ::-1]), 1))
    assert bgr.header()["colours"] == "bgr" and not np.array_equal(bgr(image, 1), P.Generator(grid=64)(image, 1))


# ==== What a method trains on ====


@dataclass
class Config(P.ProposalConfig):
    """A method's configuration, as far as proposals read it."""
    proposal_method: str = "random"
    proposal_grid: int = 0
    out: Path = Path("out")
    seed: int = 3
    num_workers: int = 0


def test_flags_become_a_generator():
    generator = P.Proposals(Config("selective_search", "quick", 64, "nms")).generator
    assert generator == P.Generator("selective_search", "quick", 64, "nms", None, 3)
    assert P.Proposals(Config("selective_search")).generator.grid is None  # 0: original size
    edges = P.Proposals(Config("edge_boxes", proposal_grid=64, edge_model="m.yml")).generator
    assert (edges.method, edges.grid, edges.edge_model) == ("edge_boxes", None, "m.yml")  # no grid


def test_computed_proposals_follow_seed_epoch_and_index():
    image = Pictures().load(1)
    found = P.Proposals(Config())
    boxes = found(image, 1, 0)
    assert boxes.dtype == np.float32 and boxes.shape == (300, 4) and (boxes <= [70, 51, 70, 51]).all()
    assert np.array_equal(boxes, found.generator(image, P.image_seed(3, 0, 1)))
    others = [found(image, 1, 1), found(image, 2, 0), P.Proposals(Config(seed=4))(image, 1, 0)]
    assert len({b.tobytes() for b in (boxes, *others)}) == 4


def test_stored_proposals_do_not_depend_on_the_epoch(tmp_path):
    source = Pictures(3)
    store = P.build_store(tmp_path / "s", source, CHEAP, progress=False)
    found = P.Proposals(Config(), store)
    for i in range(3):
        stored = store.boxes(i, (50 + i, 70))
        assert all(np.array_equal(found(source.load(i), i, epoch), stored) for epoch in (0, 7))
    assert found.store is store


def test_open_proposals(tmp_path, capsys):
    source = Pictures(3)
    assert P.open_proposals(Config(out=tmp_path), source).store is None and not list(tmp_path.iterdir())
    store = P.build_store(tmp_path / "given", source, CHEAP, progress=False)
    capsys.readouterr()
    found = P.open_proposals(Config(out=tmp_path, proposal_store=str(tmp_path / "given"), cache_proposals=True), source)
    assert same_store(found.store, store)
    assert capsys.readouterr().out == (
        f"proposals come from {tmp_path / 'given'} (method random, mode fast, grid 128, rank opencv, max_boxes 300, "
        f"seed 42, opencv {cv2.__version__}); the flags --proposal_* and --max_boxes are not used\n")
    with pytest.raises(UserError, match="does not fit these images"):
        P.open_proposals(Config(out=tmp_path, proposal_store=str(tmp_path / "given")), Pictures(4))
    found = P.open_proposals(Config(out=tmp_path, cache_proposals=True), source)
    assert found.store.path == tmp_path / "proposals" and found.store.header["seed"] == 3
    image = source.load(2)
    assert np.array_equal(found(image, 2, 5), found.generator(image, P.image_seed(3, source.key(2))))
    P.open_proposals(Config(out=tmp_path, cache_proposals=True), source)
    assert "already complete, 3 images" in capsys.readouterr().out
