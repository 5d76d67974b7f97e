"""Region proposals without labels, and the store that keeps them: selective search, edge boxes, random boxes.

image [H, W, 3] --Generator--> rects xywh int [n, 4] --build_store--> folder --ProposalStore.boxes--> xyxy px [n, 4]

Run (the same command again continues an interrupted build):
    python proposals.py --data imagenet100 --method selective_search --workers 16         # DETReg: 128 x 128, fast
    python proposals.py --data imagenet --method selective_search --grid 0 --workers 16   # SoCo: original size
    python proposals.py --data coco --method edge_boxes [--edge_model model.yml.gz]       # Siamese DETR

Deviations:
    D1  OpenCV expects BGR; DETReg's released training hands it the RGB array, which gives other boxes, its evaluation
        of selective search (Table 6) BGR. Here: RGB; `--colours bgr`.
    D2  OpenCV ranks a box by C rand() * level, which its boxes do not tell. Released: another order in every call.
        Here: srand(seed of the image), so an order can be drawn again. A store keeps ONE order per image; DETReg's
        default (no store) draws anew in each epoch.
    D3  Importance sampling (DETReg, Sec. 4): in detreg.py, D8 there.
    D4  Edge boxes without the structured forest (EDGE_MODEL, which may not be passed on): Lab gradients, and parameters
        measured for them.
    D5  Edge boxes' last resort is a centre box w/4..3w/4 (released: converted to xyxy twice). Boxes are clipped to the
        image; those found on a resized copy are rounded to pixels of the original (released: truncated); the retry's
        upscaling is bounded (released: 1 x 500 px explodes).
    D6  Mode "quick" is ours: on the 128 grid 3.1 times the images/s of fast; held-out recall@100 (IoU 0.5) .578 for
        .434 on BCCD, .977 for .976 on 600 synthetic scenes. It gives more small boxes: recall@30 .402 for .324, but
        .796 for .868 on the scenes (benchmarks/proposals.py).
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.ops import nms
from tqdm import tqdm

import common
import run
from common import UserError
from data import ImagePyramid, UnreadableImage, open_images
from run import SkipCount

FORMAT_VERSION = 1
MAX_BOXES = {"edge_boxes": 512, "random": 300}  # of an image (released, ours); selective search: all of them
EDGE_MODEL = "testdata/cv/ximgproc/model.yml.gz of github.com/opencv/opencv_extra"


# ==== 1. Seeds and units ====


def image_seed(*parts: Any) -> int:
    """Seed in [0, 2**31) from e.g. (seed, key) or (seed, epoch, index): the same on every machine, in every process."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def rects_to_boxes(rects: np.ndarray, image_hw: tuple[int, int], grid: int | None) -> np.ndarray:
    """int [n, 4] xywh on a grid x grid copy of the image (None: its own pixels) -> float32 [n, 4] xyxy px, in
    float32 throughout, as released."""
    boxes = np.asarray(rects).reshape(-1, 4).astype(np.float32)
    if grid:
        h, w = image_hw
        boxes = boxes / np.float32(grid) * np.array([w, h, w, h], np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


# ==== 2. Selective search (DETReg, Sec. 4, SoCo Sec. 3.1) ====


def _switch_to_quick(search: Any, image: np.ndarray) -> None:
    """Ours (D6), 3 hierarchies: Lab alone; small segments (k 60, at least 60 px) stand in for the other colour space;
    no texture, no colour term."""
    cv = cv2.ximgproc.segmentation
    search.addImage(cv2.cvtColor(image, cv2.COLOR_BGR2Lab))
    for k in (60, 150, 300):  # these segmentations take nearly all of its time
        search.addGraphSegmentation(cv.createGraphSegmentation(0.8, k, 60))
    fill = cv.createSelectiveSearchSegmentationStrategyFill()
    size = cv.createSelectiveSearchSegmentationStrategySize()
    search.addStrategy(cv.createSelectiveSearchSegmentationStrategyMultiple(fill, size))


def _search(image: np.ndarray, mode: str, before: Callable[[], Any]) -> np.ndarray:
    """int [n, 4] xywh in OpenCV's order; before() is called right before its boxes are made and ranked."""
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image))
    switch = {"fast": search.switchToSelectiveSearchFast, "quality": search.switchToSelectiveSearchQuality,
              "quick": functools.partial(_switch_to_quick, search, image)}
    switch[mode]()
    before()
    return np.asarray(search.process(), np.int32).reshape(-1, 4)


@functools.cache
def _c_srand() -> Any | None:
    """The C library's srand if it steers OpenCV's order (found out by trying), else None: a wheel with its own C
    runtime."""
    try:
        srand = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None).srand
    except (OSError, AttributeError):
        return None
    blocks = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = np.kron(blocks, np.ones((16, 16, 1), np.uint8))
    first, other, again = (_search(image, "fast", functools.partial(srand, seed)) for seed in (1, 2, 1))
    return srand if np.array_equal(first, again) and not np.array_equal(first, other) else None


def _search_rects(image: np.ndarray, grid: int | None, mode: str, seed: int) -> np.ndarray:
    if grid:
        image = cv2.resize(image, (grid, grid))  # aspect ratio ignored, bilinear: as released
    if srand := _c_srand():
        return _search(image, mode, functools.partial(srand, seed))
    # the set is right, the order has lost its preference for small regions; headers say so
    rects = _search(image, mode, lambda: None)
    return np.random.default_rng(seed).permutation(rects[np.lexsort(rects.T)])


def selective_search(image: np.ndarray, *, grid: int | None = 128, mode: str = "fast", seed: int) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> float32 [n, 4] xyxy px, in OpenCV's order for `seed` (D1, D2). One thread per process may
    call this: rand() is shared. `mode`: "fast", "quality" or "quick" (D6); `grid`: search on a grid x grid copy (None:
    original size). A flat or tiny image gives its full box."""
    return rects_to_boxes(_search_rects(image, grid, mode, seed), image.shape[:2], grid)


# ==== 3. Edge boxes (Siamese DETR Sec. 4.1) ====


@functools.cache
def _structured_forest(path: str) -> Any:
    try:
        if not Path(path).is_file():
            raise OSError("no such file")
        return cv2.ximgproc.createStructuredEdgeDetection(path)
    except (OSError, cv2.error) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--edge_model {path} cannot be used: {reason}. It is {EDGE_MODEL} (research use only, so not "
                        "included): download it, or leave --edge_model out to find edges without a model.") from error


def _edges_without_model(image: np.ndarray, radius: int = 2, border: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """uint8 RGB -> thin edges float32 [H, W] in 0..1, direction across them in [0, pi) (D4). What OpenCV offers only
    with a model, redone."""
    lab = cv2.GaussianBlur(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2Lab) / 100, (0, 0), 2)
    edges = np.hypot(cv2.Scharr(lab, cv2.CV_32F, 1, 0), cv2.Scharr(lab, cv2.CV_32F, 0, 1)).max(axis=2) / 32
    edges = np.clip(edges / max(float(np.percentile(edges, 99)), 1e-6), 0, 1).astype(np.float32)
    # computeOrientation: second derivatives of the smoothed edges
    triangle = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1], np.float32) / 25
    smooth = cv2.sepFilter2D(edges, cv2.CV_32F, triangle, triangle, borderType=cv2.BORDER_REFLECT)
    xx, xy, yy = (cv2.Sobel(smooth, cv2.CV_32F, dx, dy) for dx, dy in ((2, 0), (1, 1), (0, 2)))
    angle = np.mod(np.arctan(yy * np.sign(-xy) / (xx + 1e-5)), np.pi).astype(np.float32)
    h, w = edges.shape
    y, x = np.mgrid[:h, :w].astype(np.float32)
    keep = np.ones(edges.shape, bool)
    for d in (d for d in range(-radius, radius + 1) if d):  # edgesNms: only what is largest across the edge stays
        keep &= edges >= cv2.remap(edges, x + d * np.cos(angle), y + d * np.sin(angle), cv2.INTER_LINEAR,
                                   borderMode=cv2.BORDER_REPLICATE)
    # towards the border, where gradients are unsure, edges fade
    fade = [np.minimum(np.minimum(np.arange(n), np.arange(n)[::-1]) / max(min(border, n // 2), 1), 1) for n in (h, w)]
    return (edges * keep * np.outer(*fade)).astype(np.float32), angle


def _edge_search(image: np.ndarray, edge_model: str | None, max_boxes: int) -> np.ndarray:
    """One pass of edge boxes: uint8 RGB -> int [n, 4] xywh in score order, possibly none."""
    finder = cv2.ximgproc.createEdgeBoxes(maxBoxes=max_boxes)
    if edge_model:  # OpenCV's other parameters stay, as released
        forest = _structured_forest(edge_model)
        edges = forest.detectEdges(image.astype(np.float32) / 255)
        angle = forest.computeOrientation(edges)
        edges = forest.edgesNms(edges, angle)
    else:
        finder.setBeta(0.65)  # with Eta: fewer near-duplicates of large windows
        finder.setEta(0.9)
        finder.setMinBoxArea(1000 * image.shape[0] * image.shape[1] / 180_000)  # 1000 px suit about 490 x 367
        edges, angle = _edges_without_model(image)
    return np.asarray(finder.getBoundingBoxes(edges, angle)[0], np.int32).reshape(-1, 4)


def _edge_rects(image: np.ndarray, edge_model: str | None, max_boxes: int, short_side: int | None) -> np.ndarray:
    """Edge boxes with the released retry, as int32 [n, 4] xywh in pixels of `image`; never empty."""
    h, w = image.shape[:2]
    sharpen = np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]], np.float32)
    sharp = cv2.convertScaleAbs(cv2.filter2D(image, -1, sharpen), alpha=1.5)
    retry_scale = max(1, min(math.ceil(1000 / min(h, w)), 4000 // max(h, w)))  # bounded: D5
    for picture, scale in ((image, short_side / min(h, w) if short_side else 1), (sharp, retry_scale)):
        size = (max(round(w * scale), 1), max(round(h * scale), 1))
        if scale != 1:
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        try:
            rects = _edge_search(picture, edge_model, max_boxes)
        except cv2.error:  # the released code retries after any exception too
            continue
        corners = np.concatenate([rects[:, :2], rects[:, :2] + rects[:, 2:]], 1)
        corners = corners * (np.array([w, h, w, h]) / np.tile(size, 2))
        corners = np.rint(corners.clip(0, (w, h, w, h))).astype(np.int32)
        sides = corners[:, 2:] - corners[:, :2]
        if (sides > 0).all(1).any():
            return np.concatenate([corners[:, :2], sides], 1)[(sides > 0).all(1)]
    return np.array([[w // 4, h // 4, max(w // 2, 1), max(h // 2, 1)]], np.int32)  # D5


def edge_boxes(image: np.ndarray, *, edge_model: str | None = None, max_boxes: int = MAX_BOXES["edge_boxes"],
               short_side: int | None = None, seed: int = 0) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> float32 [n, 4] xyxy px, whole pixels, best score first; at least one box. Deterministic:
    `seed` is there so that all generators are called alike. `edge_model`: OpenCV's structured forest (None: D4);
    `short_side`: search on a resized copy. Raises UserError."""
    return rects_to_boxes(_edge_rects(image, edge_model, max_boxes, short_side), image.shape[:2], None)


# ==== 4. Random boxes; our ranking ====


def random_boxes(rng: np.random.Generator, image_hw: tuple[int, int], n: int,
                 size_pool: np.ndarray | None = None) -> np.ndarray:
    """float32 [n, 4] xyxy px, placed uniformly inside the image. Sizes come from `size_pool` ([m, 2] relative w, h),
    else uniform in (0, 1]."""
    if size_pool is not None and len(size_pool):
        size = np.clip(np.asarray(size_pool)[rng.integers(len(size_pool), size=n)], 0, 1)
    else:
        size = 1 - rng.random((n, 2))
    start = rng.random((n, 2)) * (1 - size)
    h, w = image_hw
    return (np.concatenate([start, start + size], 1) * (w, h, w, h)).astype(np.float32)


def _nms_order(boxes: np.ndarray, image_hw: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    order = rng.permutation(np.lexsort(boxes.T))  # sorted: the draw depends on the set of boxes, not on their order
    w, h = (boxes[order, 2:] - boxes[order, :2]).T
    area = w * h / (image_hw[0] * image_hw[1])
    usable = order[(area >= 0.005) & (area <= 0.95) & (np.maximum(w, h) <= 4 * np.minimum(w, h))]
    if not len(usable):
        return order
    falling = torch.arange(len(usable), 0, -1, dtype=torch.float32)
    return usable[nms(torch.from_numpy(boxes[usable]), falling, 0.7).numpy()]


def rank_nms(boxes: np.ndarray, image_hw: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Our ranking from the boxes alone (--rank nms): area 0.5..95 %, aspect <= 4, seeded shuffle, greedy NMS 0.7. xyxy
    px in and out. Where no box passes the size filter, all of them are returned, shuffled."""
    return boxes[_nms_order(np.asarray(boxes, np.float32), image_hw, rng)] if len(boxes) else boxes


# ==== 5. Image -> boxes ====


@dataclass(frozen=True)
class Generator:
    """Image -> boxes, with every setting that the result depends on."""
    method: str = "selective_search"  # selective_search | edge_boxes | random
    mode: str = "fast"  # selective search: fast (12 hierarchies) | quality (100) | quick (3; D6)
    grid: int | None = 128  # side of the copy that is searched (edge boxes: its short side); None: original size
    rank: str = "opencv"  # opencv: the generator's own order | nms: rank_nms
    edge_model: str | None = None  # OpenCV's structured forest file
    seed: int = 42  # build_store draws with (seed, key of the image)
    max_boxes: int | None = None  # of an image; None: MAX_BOXES
    colours: str = "rgb"  # order in which selective search gets the channels: rgb | bgr (D1)

    @property
    def units(self) -> int | None:
        """What integer rects count: cells of a units x units grid over the image, or its pixels (None)."""
        return None if self.method == "edge_boxes" else self.grid

    @property
    def most(self) -> int | None:
        """How many boxes an image has at most; None: no limit."""
        return self.max_boxes or MAX_BOXES.get(self.method)

    def rects(self, image: np.ndarray, seed: int) -> np.ndarray:
        """uint8 RGB [H, W, 3] -> int32 [n, 4] xywh in `units`, ranked."""
        hw = image.shape[:2]
        rng = np.random.default_rng(seed)
        if self.method == "selective_search":
            channels = image if self.colours == "rgb" else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            rects = _search_rects(channels, self.grid, self.mode, seed)
        elif self.method == "edge_boxes":
            rects = _edge_rects(image, self.edge_model, self.most, self.grid)
        elif self.method == "random":
            side = np.array((self.units, self.units) if self.units else hw)
            corners = np.rint(random_boxes(rng, tuple(side), self.most)).astype(np.int32)
            start = np.minimum(corners[:, :2], side[::-1] - 1)  # room for one cell at least
            rects = np.concatenate([start, np.maximum(corners[:, 2:] - start, 1)], 1)
        else:
            raise ValueError(f"unknown method {self.method}")
        if self.rank == "nms" and len(rects):
            rects = rects[_nms_order(rects_to_boxes(rects, hw, self.units), hw, rng)]
        return rects[:self.most]

    def __call__(self, image: Any, seed: int) -> np.ndarray:
        """PIL image or uint8 RGB [H, W, 3] -> float32 [n, 4] xyxy px. `seed`: image_seed(...) of this draw."""
        array = np.asarray(image if isinstance(image, np.ndarray) else image.convert("RGB"))
        return rects_to_boxes(self.rects(array, seed), array.shape[:2], self.units)

    def header(self) -> dict[str, Any]:
        """All that the boxes depend on, for a store's header. UserError where the edge model cannot be used."""
        head = asdict(self) | {"opencv": cv2.__version__, "units": self.units or "pixels", "max_boxes": self.most}
        if self.method == "selective_search":
            head["order"] = ("C rand(), seeded per image" if _c_srand()
                             else "own shuffle (OpenCV's order cannot be seeded here)")
        if self.method == "edge_boxes" and self.edge_model:
            _structured_forest(self.edge_model)
            digest = hashlib.sha256(Path(self.edge_model).read_bytes()).hexdigest()
            head["edge_model"] = f"{Path(self.edge_model).name} sha256 {digest[:16]}"
            head["edges"] = "structured forest, OpenCV's parameters"
        elif self.method == "edge_boxes":
            head["edges"] = "no model: Lab, Gaussian 2, Scharr, 99th percentile; Beta .65, Eta .9, MinBoxArea scaled"
        return head


def print_edge_note(header: dict[str, Any]) -> None:
    """A line where these are edge boxes, but not those of Siamese DETR's published recipe. header: Generator.header."""
    published = {"max_boxes": MAX_BOXES["edge_boxes"], "grid": None, "rank": "opencv"}
    differences = [f"{k} {header[k]}, not {v or 'original size'}" for k, v in published.items() if header[k] != v]
    if not header["edge_model"]:
        differences.insert(0, f"edges are found without a model (with it: --edge_model FILE, {EDGE_MODEL})")
    if header["method"] == "edge_boxes" and differences:
        run.print_rank0(f"note: not the edge boxes of Siamese DETR's published recipe: {'; '.join(differences)}")


# ==== 6. A store, read ====

_HEADER_KEYS = {*(f.name for f in fields(Generator)), "opencv", "units", "dtype", "images", "source", "source_images",
                "fingerprint"}


def _read_header(path: Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises UserError for one that is no store header."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {value['format_version']}, this program reads {FORMAT_VERSION}")
        # what stores older than these settings were made with
        value = {"max_boxes": None if value.get("method") == "selective_search" else 300, "colours": "rgb"} | value
        if missing := _HEADER_KEYS - value.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
        units = value["units"] == "pixels" or 0 < int(value["units"]) < 65536
        if type(value["images"]) is not int or value["dtype"] not in ("uint8", "uint16") or not units:
            raise ValueError(f"images {value['images']}, dtype {value['dtype']}, units {value['units']}")
        return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the header of a proposal store ({error!r}). "
                        "Delete the folder and build it again.") from error


def _build_command(head: dict[str, Any] | None, path: Path) -> str:
    """What to type; the header knows the data only by name, and the edge model by its hash."""
    if not head:
        return f"python proposals.py --data DATA --method METHOD --out {path}"
    flags = "".join(f" --{k} {head[k] or 0}" for k in ("method", "grid", "mode", "rank", "seed"))
    flags += f" --max_boxes {head['max_boxes']}" if head["max_boxes"] else ""
    flags += " --colours bgr" if head["colours"] == "bgr" else ""
    flags += " --edge_model FILE" if head["edge_model"] else ""
    flags += f" --limit {head['images']}" if head["images"] < head["source_images"] else ""
    return f"python proposals.py --data DATA{flags} --out {path} (DATA: where {head['source']} lies)"


class ProposalStore:
    """A finished store, memory-mapped: opening it costs the same for any number of images; workers share the pages."""

    def __init__(self, path: Path, header: dict[str, Any], rects: np.ndarray, offsets: np.ndarray):
        self.path, self.header, self._rects, self._offsets = path, header, rects, offsets
        self._grid = None if header["units"] == "pixels" else int(header["units"])

    @classmethod
    def open(cls, path: str | Path, source: Any = None) -> ProposalStore:
        """UserError, saying what to do: there is no such store, it is unfinished or damaged, or it was made from other
        images than those of `source` (len, name, fingerprint())."""
        path = Path(path)
        header = _read_header(path / "meta.json")
        if header is None:
            head = _read_header(path / "header.partial")
            state = ("is unfinished; continue it with" if head
                     else "holds no proposals; build them with" if path.exists() else "does not exist; build it with")
            raise UserError(f"{path} {state}: {_build_command(head, path)}")
        if source is not None:
            cls._check_source(path, header, source)
        try:
            offsets = np.load(path / "offsets.npy", mmap_mode="r", allow_pickle=False)
            file = path / "boxes.bin"
            total = int(offsets[-1]) if offsets.dtype == np.int64 and offsets.shape == (header["images"] + 1,) else -1
            if file.stat().st_size != total * 4 * np.dtype(header["dtype"]).itemsize:
                raise ValueError("its files do not have the length its header says")
            rects = (np.memmap(file, header["dtype"], "r", shape=(total, 4)) if total
                     else np.zeros((0, 4), header["dtype"]))
        except Exception as error:
            # not only OSError and ValueError: numpy's reader of headers raises what its tokenizer does
            raise UserError(f"{path} is damaged: {error}. Delete the folder and build it again: "
                            f"{_build_command(header, path)}") from error
        return cls(path, header, rects, offsets)

    @staticmethod
    def _check_source(path: Path, header: dict[str, Any], source: Any) -> None:
        if header["images"] != len(source):
            reason = (f"made from {header['images']} images of {header['source']}, "
                      f"this has {len(source)} ({source.name})")
        elif header["fingerprint"] != source.fingerprint():
            reason = (f"made from the same number of images ({len(source)}), "
                      f"but another list of files ({header['source']}, this is {source.name})")
        else:
            return
        raise UserError(f"{path} does not fit these images: {reason}. Give the store of these images, "
                        "or build one with --out elsewhere.")

    def __reduce__(self):  # a worker started afresh maps the files itself instead of receiving a copy of them
        return ProposalStore.open, (self.path,)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def boxes(self, i: int, image_hw: tuple[int, int]) -> np.ndarray:
        """Image i of the source, of original size `image_hw` -> float32 [n, 4] xyxy px in the stored order; n = 0 for
        an unreadable image."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        first, last = int(self._offsets[i]), int(self._offsets[i + 1])
        rects = self._rects[first:last].astype(np.int64)
        width, height = (self._grid, self._grid) if self._grid else image_hw[::-1]
        if (not 0 <= first <= last <= len(self._rects) or (rects[:, 2:] < 1).any()
            or (rects[:, :2] + rects[:, 2:] > (width, height)).any()):
            raise UserError(f"{self.path} is damaged, or image {i} has changed since: "
                            f"its boxes are not inside its {image_hw[1]} x {image_hw[0]} px. "
                            f"Delete the folder and build it again: {_build_command(self.header, self.path)}")
        return rects_to_boxes(rects, image_hw, self._grid)


# ==== 7. A store, filled ====

_WORKER: dict[str, Any] = {}  # source, generator and dtype of a worker process


def _start_worker(source: Any, generator: Generator, dtype: str, own_process: bool) -> None:
    cv2.setNumThreads(0)
    _WORKER.update(source=source, generator=generator, dtype=np.dtype(dtype))
    if own_process:
        for number in run.STOP_SIGNALS:  # the main process, which hears them too, stops the pool: by SIGTERM
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphans when the main process is killed


def _rects_of(indices: range) -> list[tuple[np.ndarray | None, str]]:
    """Per image (rects, "") or (None, "path: reason")."""
    source, generator, dtype = (_WORKER[name] for name in ("source", "generator", "dtype"))
    results = []
    for i in indices:
        try:
            loaded = source.load(i)  # a labelled set gives (image, target)
            image = np.asarray((loaded[0] if isinstance(loaded, tuple) else loaded).convert("RGB"))
            if generator.units is None and max(image.shape) > np.iinfo(dtype).max:
                raise UnreadableImage(source.key(i), f"a side above {np.iinfo(dtype).max} px")
            rects = generator.rects(image, image_seed(generator.seed, source.key(i)))
            results.append((rects.astype(dtype), ""))
        except UnreadableImage as error:
            results.append((None, f"{error.path}: {error.reason}"))
    return results


def compute_rects(source: Any, generator: Generator, dtype: str, todo: range, workers: int
                  ) -> Iterator[list[tuple[np.ndarray | None, str]]]:
    """Of the images `todo` in order, in chunks: (Generator.rects, ""), or (None, "path: reason") where one cannot be
    read. An executor: a Pool waits for ever on a worker that the system killed."""
    # small, or all wait at the end for one process with a whole chunk to do
    size = max(1, min(16, len(todo) // (32 * workers or 1)))
    chunks = (todo[a:a + size] for a in range(0, len(todo), size))
    cv2.setNumThreads(0)  # here too: forking beside OpenCV's own threads can hang the child
    if not workers:
        _start_worker(source, generator, dtype, False)
        yield from map(_rects_of, chunks)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (source, generator, dtype, True)) as pool:
            try:
                waiting = collections.deque()  # not pool.map: it makes all its futures first, one for each chunk
                for chunk in chunks:
                    waiting.append(pool.submit(_rects_of, chunk))
                    if len(waiting) > 8 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:  # a signal, say: nobody waits for what is being computed
                for process in list((pool._processes or {}).values()):
                    process.kill()
                raise
    except BrokenProcessPool as error:
        raise UserError(f"a worker process was killed (memory?): {error}. Run the same command with fewer "
                        "--workers: it continues.") from error


def _recover(path: Path, itemsize: int) -> np.ndarray:
    """Cut both partial files back to the last complete image -> its counts int32 [done], -1 for unreadable."""
    if (path / "boxes.bin").exists():  # stopped while finishing
        os.replace(path / "boxes.bin", path / "boxes.partial")
    for name in ("boxes.partial", "counts.partial"):
        (path / name).touch()
    raw = (path / "counts.partial").read_bytes()
    counts = np.frombuffer(raw[:len(raw) // 4 * 4], np.int32)
    ends = np.cumsum(counts.clip(0), dtype=np.int64) * 4 * itemsize
    done = int(np.searchsorted(ends, (path / "boxes.partial").stat().st_size, side="right"))
    while done and counts[done - 1] < 0:  # a share that was away for a while: try those images again
        done -= 1
    os.truncate(path / "counts.partial", 4 * done)
    os.truncate(path / "boxes.partial", int(ends[done - 1]) if done else 0)
    return counts[:done]


def _is_complete(path: Path, head: dict[str, Any]) -> bool:
    """UserError for a folder with other parameters, naming the difference."""
    finished = _read_header(path / "meta.json")
    old = finished or _read_header(path / "header.partial")
    changed = [f"{k}: {old.get(k)} there, {v} now" for k, v in head.items() if old.get(k) != v] if old else []
    if changed:
        raise UserError(f"{path} was begun with other settings ({'; '.join(changed)}). Use the same settings, another "
                        "--out, or delete the folder.")
    return finished is not None


def build_store(path: str | Path, source: Any, generator: Generator, *, workers: int = 0, limit: int | None = None,
                progress: bool = True) -> ProposalStore:
    """Proposals of every image of `source` (the first `limit`) -> the opened store. A finished store is opened, an
    interrupted build continues.

    A build killed at any moment, or stopped by a full disk, loses only images in flight. Unreadable images get no boxes
    and are named. Raises UserError for a folder with other parameters (naming the difference), one that another process
    fills, and past 1 % unreadable images.
    """
    path = Path(path)
    total = min(limit or len(source), len(source))
    dtype = "uint8" if generator.units and generator.units <= 255 else "uint16"
    head = {"format_version": FORMAT_VERSION, **generator.header(), "dtype": dtype, "images": total,
            "source": source.name, "source_images": len(source), "fingerprint": source.fingerprint()}
    if not _is_complete(path, head):
        try:
            with run.writing(path):
                path.mkdir(parents=True, exist_ok=True)
                run.lock_folder(path)
                if not _is_complete(path, head):  # as another process may have made it meanwhile
                    _fill(path, head, source, generator, workers, progress)
                    return ProposalStore.open(path)
        finally:
            run.unlock_folder(path)
    for name in ("counts.partial", "header.partial", "writer.lock"):  # of a build killed after its last file
        with contextlib.suppress(OSError):
            (path / name).unlink()
    print(f"{path}: already complete, {total} images", flush=True)
    return ProposalStore.open(path)


def _fill(path: Path, head: dict[str, Any], source: Any, generator: Generator, workers: int, progress: bool) -> None:
    began = time.perf_counter()
    total, dtype = head["images"], head["dtype"]
    foreign = [n for n in ("boxes.bin", "offsets.npy", "boxes.partial", "counts.partial") if (path / n).exists()]
    if foreign and not (path / "header.partial").exists():
        raise UserError(f"{path} holds {', '.join(foreign)}, but no header: nothing to continue, "
                        "and maybe not ours. Give another --out.")
    run.write_json(path / "header.partial", head)
    counts = _recover(path, np.dtype(dtype).itemsize)
    start = len(counts)
    skips = SkipCount(total)
    skips.add([f"{source.key(int(i))}: unreadable in the interrupted build" for i in np.flatnonzero(counts < 0)])
    threads = cv2.getNumThreads()
    try:
        with (open(path / "boxes.partial", "ab") as boxes_file, open(path / "counts.partial", "ab") as counts_file,
              contextlib.closing(compute_rects(source, generator, dtype, range(start, total), workers)) as computed,
              tqdm(total=total, initial=start, unit="image", disable=not progress,
                   mininterval=0.5 if sys.stderr.isatty() else 30) as bar):
            for results in computed:
                skips.add([reason for rects, reason in results if rects is None])
                boxes_file.write(b"".join(rects.tobytes() for rects, _ in results if rects is not None))
                boxes_file.flush()  # before the count: a count stands for boxes that are there
                lengths = [-1 if rects is None else len(rects) for rects, _ in results]
                counts_file.write(np.array(lengths, np.int32).tobytes())
                counts_file.flush()
                bar.update(len(results))
            os.fsync(boxes_file.fileno())
    finally:
        cv2.setNumThreads(threads)
    counts = np.fromfile(path / "counts.partial", np.int32)
    offsets = io.BytesIO()
    np.save(offsets, np.concatenate([[0], np.cumsum(counts.clip(0), dtype=np.int64)]))
    run.write_atomic(path / "offsets.npy", offsets.getvalue())
    os.replace(path / "boxes.partial", path / "boxes.bin")
    unreadable = int((counts < 0).sum())
    run.write_json(path / "meta.json", head | {"unreadable": unreadable})
    for name in ("counts.partial", "header.partial"):
        (path / name).unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    size = sum(f.stat().st_size for f in path.iterdir())
    print(f"{path}: {total} images, {counts.clip(0).sum() / max(total, 1):.1f} boxes per image, {unreadable} "
          f"unreadable, {seconds:.1f} s ({(total - start) / seconds:.1f} images/s), {size / 1e6:.2f} MB", flush=True)


# ==== 8. What a method trains on ====


@dataclass
class ProposalConfig:
    """The knobs of the proposals that a method trains on."""
    proposal_method: Literal["selective_search", "edge_boxes", "random"] = "selective_search"  # where boxes come from
    proposal_mode: Literal["fast", "quality", "quick"] = "fast"  # selective search mode
    proposal_grid: run.Grid = 128  # side the image is squeezed to before selective search, 0 = original size
    proposal_rank: Literal["opencv", "nms"] = "opencv"  # order: OpenCV's, or size filter + seeded shuffle + NMS 0.7
    proposal_store: str | None = None  # folder filled by proposals.py; without one boxes are computed in the loader
    cache_proposals: bool = False  # fill a store in the output folder before training
    edge_model: str | None = None  # OpenCV's structured forest file, for edge_boxes
    max_boxes: run.Width | None = None  # kept of an image; none: 512 edge boxes (released), 300 random, all searched


class Proposals:
    """The boxes of an image: from a store where there is one, else computed, seeded by (seed, epoch, index).

    cfg: a ProposalConfig with a seed.
    """

    def __init__(self, cfg: ProposalConfig, store: ProposalStore | None = None):
        grid = (cfg.proposal_grid or None) if cfg.proposal_method == "selective_search" else None
        self.generator = Generator(cfg.proposal_method, cfg.proposal_mode, grid, cfg.proposal_rank, cfg.edge_model,
                                   cfg.seed, cfg.max_boxes)
        self.seed, self.store = cfg.seed, store

    def __call__(self, image: Image.Image | ImagePyramid, index: int, epoch: int) -> np.ndarray:
        """float32 [n, 4] xyxy px."""
        if self.store is not None:
            return self.store.boxes(index, (image.height, image.width))
        return self.generator(image.copy(1) if isinstance(image, ImagePyramid) else image,
                              image_seed(self.seed, epoch, index))


def open_proposals(cfg: ProposalConfig, source: Any) -> Proposals:
    """The proposals a method trains on: from --proposal_store, from a store filled now in the output folder (rank 0
    fills, the others wait), or computed in the loader."""
    if cfg.proposal_store:
        store = ProposalStore.open(cfg.proposal_store, source)
        names = ("method", "mode", "grid", "rank", "max_boxes", "seed", "opencv")
        made = ", ".join(f"{k} {store.header[k]}" for k in names if store.header[k] is not None)
        run.print_rank0(f"proposals come from {cfg.proposal_store} ({made}); the flags --proposal_* and --max_boxes "
                        "are not used")
        print_edge_note(store.header)
        return Proposals(cfg, store)
    generator = Proposals(cfg).generator
    if generator.method == "edge_boxes":
        print_edge_note(generator.header())
    if not cfg.cache_proposals:
        return Proposals(cfg)
    folder = Path(cfg.out) / "proposals"
    if common.rank() == 0:
        build_store(folder, source, generator, workers=cfg.num_workers)
    common.barrier()
    return Proposals(cfg, ProposalStore.open(folder, source))


# ==== 9. Main ====


def add_generator_flags(parser: run.Parser) -> None:
    """The flags of which generator_of makes a Generator."""
    parser.add_argument("--method", default="selective_search", type=lambda s: s.replace("-", "_"),
                        choices=["selective_search", "edge_boxes", "random"], help="what makes the boxes")
    parser.add_argument("--workers", type=run.Workers, default=0,
                        help="processes; one per CPU core is fastest, 0 works in this one")
    parser.add_argument("--mode", default="fast", choices=["fast", "quality", "quick"],
                        help="selective search: quality takes 3 to 7 times as long, quick (not released) a third")
    parser.add_argument("--grid", type=run.Grid,
                        help="search on a GRID x GRID copy (edge_boxes: short side GRID), 0 = original size; "
                        "default 128 for selective_search, else 0. With OpenCV's order and few boxes, "
                        "128 is not only faster but better")
    parser.add_argument("--rank", default="opencv", choices=["opencv", "nms"],
                        help="nms: size filter, seeded shuffle, NMS 0.7; covers more per box")
    parser.add_argument("--max_boxes", "--max-boxes", type=run.Width,
                        help="boxes kept of an image; default 512 for edge_boxes (Siamese DETR), 300 for random, all "
                        "for selective_search")
    parser.add_argument("--colours", default="rgb", choices=["rgb", "bgr"],
                        help="selective search: order of the channels, rgb as DETReg trains, bgr as it evaluates (D1)")
    parser.add_argument("--edge_model", "--edge-model",
                        help=f"OpenCV's structured forest, {EDGE_MODEL}; without it edges are found without a model")
    parser.add_argument("--seed", type=run.Seed, default=42, help="everything random follows from it")


def generator_of(args: argparse.Namespace) -> Generator:
    """What the command line asks for; it is printed."""
    grid = (128 if args.method == "selective_search" else 0) if args.grid is None else args.grid
    generator = Generator(args.method, args.mode, grid or None, args.rank, args.edge_model, args.seed, args.max_boxes,
                          args.colours)
    header = generator.header()
    print("boxes: " + ", ".join(f"{k} {v}" for k, v in header.items() if v is not None), flush=True)
    print_edge_note(header)
    return generator


def main(argv: list[str] | None = None) -> ProposalStore:
    parser = run.Parser(
        prog="proposals.py",
        description="Fill a proposal store; the same command again continues an interrupted build.")
    parser.add_argument("--data", required=True,
                        help="folder of images, .txt list, imagenet100, imagenet, coco, voc or synthetic")
    parser.add_argument("--data_root", "--data-root", help="where a named data set lies (default $DATA_ROOT)")
    add_generator_flags(parser)
    parser.add_argument("--synthetic_images", type=run.Images, default=800,
                        help="with --data synthetic: size of the pool, which --seed draws")
    parser.add_argument("--limit", type=run.Images,
                        help="only the first LIMIT images, to measure the speed; such a store fits no whole data set")
    parser.add_argument("--out", help="folder (default proposals/<data>-<method>-<grid>)")
    args = parser.parse_args(argv)
    source = open_images(args.data, args.data_root, synthetic_images=args.synthetic_images, seed=args.seed)
    generator = generator_of(args)
    name = f"{source.name}-{args.method}-{generator.grid or 'original'}"
    return build_store(args.out or Path("proposals") / name, source, generator, workers=args.workers, limit=args.limit)


if __name__ == "__main__":
    run.cli(main)
