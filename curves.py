"""Curves: PNGs of numbers over numbers, drawn with PIL, and curves.png of a run's log.jsonl."""
from __future__ import annotations

import common  # noqa: F401  first: it tells OpenMP how to wait before torch is loaded

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from files import printable, save_picture

Points = list[tuple[float, float]]
COLOURS = ("#4363d8", "#e6194b", "#3cb44b", "#f58231", "#9a6bff", "#42d4f4", "#f032e6", "#808000", "#800000", "#808080")
MOST_LINES = 4000  # of a log that are read for a picture: every n-th; evaluations all
MOST_POINTS = 1000  # of a curve that are drawn
PANEL = (560, 330)  # size of a panel, pixels; all is drawn at twice its size and reduced, for smooth lines
LEGEND = 130  # width of the legend, right of the axes

# ==== 1. One panel ====


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """At least two round numbers, 1, 2 or 5 x 10^n apart, from the last before `low` to the first after `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(m for m in (1, 2, 5, 10, 20) if (high - low) / (m * step) <= most)
    first, last = math.floor(round(low / step, 6)), math.ceil(round(high / step, 6))
    return [float(f"{k * step:.12g}") for k in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around low..high; if these are few, twice and five times them too."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = range(first, last + 1, max(1, math.ceil((last - first) / 7)))
    if last - first > 2:
        return [10.0 ** k for k in (*every, *([last] if every[-1] != last else []))]
    ticks = [m * 10.0 ** k for k in range(first, last) for m in (1, 2, 5)] + [10.0 ** last]
    return ([t for t in ticks if t <= low * (1 + 1e-9)][-1:] + [t for t in ticks if low < t < high]
            + [t for t in ticks if t >= high * (1 - 1e-9)][:1])


def _number(value: float) -> str:
    """Of an axis: 20000 -> "20k"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or abs(value) >= 1e6 and abs(value) >= size:
            return f"{value / size:.6g}{letter}"
    return f"{value:.6g}"


def _drawable(points: Iterable, log: bool) -> Points:
    """Without what cannot be drawn, and thinned out: of each part of a long curve its least and its largest value."""
    points = [(x, y) for x, y in points if x is not None and y is not None and abs(x) < 1e100 and abs(y) < 1e100
              and (y > 1e-100 or not log)]  # nan compares with nothing
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        kept += sorted({min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])})
    return [points[i] for i in sorted({0, *kept, len(points) - 1})]


def _cut(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    text = printable(text)
    while text and font.getlength(text) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text


def _axes(size: tuple[int, int], legend: int, title: str, x_label: str, x_range: tuple[float, float],
          x_ticks: dict[float, str], y_ticks: list[float], scale: Callable[[float], float] = float
          ) -> tuple[Image.Image, ImageDraw.ImageDraw, Callable[[float, float], tuple[float, float]]]:
    """A sheet of twice `size` with its axes, `legend` pixels beside them; what draws on it; where a point lies."""
    width, height = 2 * size[0], 2 * size[1]
    left, top, right, bottom = 120, 64, width - legend - 24, height - 84
    small, large = ImageFont.load_default(22), ImageFont.load_default(26)
    sheet = Image.new("RGB", (width, height), "white")
    draw, bounds = ImageDraw.Draw(sheet), (scale(y_ticks[0]), scale(y_ticks[-1]))

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (x - x_range[0]) / (x_range[1] - x_range[0]) * (right - left),
                bottom - (scale(y) - bounds[0]) / (bounds[1] - bounds[0]) * (bottom - top))

    for tick in y_ticks:
        draw.line([place(x_range[0], tick), place(x_range[1], tick)], "#dddddd", 2)
        draw.text((left - 12, place(x_range[0], tick)[1]), _number(tick), "black", small, anchor="rm")
    for tick, text in x_ticks.items():
        x = place(tick, y_ticks[0])[0]
        draw.line([x, bottom, x, bottom + 8], "black", 2)
        draw.text((x, bottom + 14), text, "black", small, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], "black", 3)
    draw.text((right, height - 6), _cut(x_label, small, right - left), "black", small, anchor="rb")
    draw.text((20, 12), _cut(title, large, width - 40), "black", large)
    return sheet, draw, place


def panel(curves: dict[str, Iterable], *, title: str = "", x_label: str = "", y_label: str = "",
          x_range: tuple[float, float] | None = None, y_range: tuple[float, float] | None = None, log: bool = False,
          size: tuple[int, int] = PANEL, colours: dict[str, str] | None = None) -> Image.Image:
    """A picture of {name: [(x, y), ...]} at twice `size`, its legend right of the axes. Values that are nan, infinite
    or None (log: or not positive) are left out; a curve of few points shows them as dots.

    x_range, y_range: of the axes; None: of the values. log: the y axis is logarithmic. colours: by name.
    """
    shown = {name: _drawable(points, log) for name, points in curves.items()}
    xs, ys = ([point[k] for points in shown.values() for point in points] for k in (0, 1))
    x_low, x_high = x_range or (min(xs, default=0.0), max(xs, default=1.0))
    if x_high - x_low <= 1e-9 * abs(x_high) + 1e-100:  # one point
        x_high = x_low + max(1.0, abs(x_low) / 10)
    y_low, y_high = y_range or (min(ys, default=0.1), max(ys, default=1.0))
    if y_high - y_low <= 1e-9 * max(abs(y_low), abs(y_high)) + 1e-100:  # a constant
        y_low, y_high = y_low - (abs(y_low) / 10 or 0.1), y_high + (abs(y_high) / 10 or 0.1)
    x_ticks = {tick: _number(tick) for tick in _ticks(x_low, x_high) if x_low <= tick <= x_high}
    y_ticks, scale = (_log_ticks(y_low, y_high), math.log10) if log else (_ticks(y_low, y_high), float)
    sheet, draw, place = _axes(size, 2 * LEGEND if len(shown) > 1 else 30, title or y_label, x_label, (x_low, x_high),
                               x_ticks, y_ticks, scale)
    of = {name: (colours or {}).get(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(shown)}
    for name, points in shown.items():
        places = [place(x, y) for x, y in points]
        if len(places) > 1:
            draw.line(places, of[name], 4, joint="curve" if len(places) < 200 else None)
        for at in places if len(places) <= 30 else ():
            draw.circle(at, 6, of[name])
    if len(shown) > 1:
        right, top = map(round, place(x_high, y_ticks[-1]))
        bottom = round(place(x_high, y_ticks[0])[1])
        _draw_legend(draw, of, right + 20, top, bottom, sheet.width, ImageFont.load_default(22))
    return sheet


def bars(groups: dict[str, list[float]], *, title: str = "", size: tuple[int, int] = PANEL) -> Image.Image:
    """A picture at twice `size` of {name: values}: a bar to the mean, a dot per value; values of one index (a seed),
    where all are finite, are joined."""
    finite = [[y for y in values if abs(y) < 1e100] for values in groups.values()]
    ys = [0.0, *(y for values in finite for y in values)]
    y_ticks = _ticks(min(ys), max(*ys, min(ys) + 1e-6))
    font, room = ImageFont.load_default(22), (2 * size[0] - 180) / max(1, len(groups))
    names = {i + 0.5: _cut(name, font, room) for i, name in enumerate(groups)}
    sheet, draw, place = _axes(size, 30, title, "", (0, max(1, len(groups))), names, y_ticks)
    for i, values in enumerate(finite):
        (x0, y0), (x1, y1) = place(i + 0.2, sum(values) / max(1, len(values))), place(i + 0.8, 0)
        draw.rectangle([x0, min(y0, y1), x1, max(y0, y1)], COLOURS[i % len(COLOURS)])
    for row in zip(*groups.values()):
        at = [place(i + 0.5, y) for i, y in enumerate(row) if abs(y) < 1e100]
        if 1 < len(at) == len(row):
            draw.line(at, "black", 2)
        for point in at:
            draw.circle(point, 6, "black")
    return sheet


def _draw_legend(draw: ImageDraw.ImageDraw, colours: dict[str, str], x: int, top: int, bottom: int, right: int,
                 font: ImageFont.FreeTypeFont) -> None:
    fit = max(1, (bottom - top) // 32)
    names = list(colours)
    names = names if len(names) <= fit else names[:fit - 1]
    for i, name in enumerate(names):
        y = top + 16 + 32 * i
        draw.line([x, y, x + 30, y], colours[name], 6)
        draw.text((x + 38, y), _cut(name, font, right - x - 42), "black", font, anchor="lm")
    if len(names) < len(colours):
        draw.text((x, top + 16 + 32 * len(names)), f"and {len(colours) - len(names)} more", "black", font, anchor="lm")


def draw_curves(path: str | Path, curves: dict[str, Iterable], *, x_label: str, y_label: str,
                x_range: tuple[float, float] | None = None, y_range: tuple[float, float] | None = None) -> None:
    """PNG of {name: [(x, y), ...]}, one line per name. See panel."""
    sheet = panel(curves, x_label=x_label, y_label=y_label, x_range=x_range, y_range=y_range, size=(830, 530))
    save_picture(sheet.reduce(2), path)


def draw_panels(path: str | Path, panels: list[Image.Image], columns: int = 2) -> None:
    """PNG of panels of one size, row by row."""
    width, height = panels[0].size
    sheet = Image.new("RGB", (width * min(columns, len(panels)), height * math.ceil(len(panels) / columns)), "white")
    for i, one in enumerate(panels):
        sheet.paste(one, (i % columns * width, i // columns * height))
    save_picture(sheet.reduce(2), path)


# ==== 2. Logs ====

# What stands in a line of training beside the terms of the loss.
BESIDE = ("step", "epoch", "lr", "momentum", "fallbacks", "grad_norm", "images_per_s", "memory_gib", "seconds")


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The lines of a log.jsonl, those of training thinned out to MOST_LINES; what a kill has cut is left out."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError:  # not there
        return []
    training = [i for i, line in enumerate(lines) if b'"loss"' in line]
    every = math.ceil(len(training) / MOST_LINES) or 1
    left_out = set(training) - set(training[::every]) - set(training[-1:])
    rows = []
    for i, line in enumerate(lines):
        if i not in left_out:
            try:
                row = json.loads(line)
            except ValueError:  # also of bytes that are no text
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append({k: v for k, v in row.items() if isinstance(v, (int, float))})
    return rows


def curve_of(rows: list[dict[str, float]], key: str) -> Points:
    return [(row["step"], row[key]) for row in rows if key in row]


def keys_of(rows: list[dict[str, float]], wanted: Callable[[str], bool] = lambda key: True) -> list[str]:
    """The names of the values in these lines, in the order in which they occur."""
    return [key for key in dict.fromkeys(key for row in rows for key in row) if wanted(key)]


def is_log_scaled(key: str, curves: Iterable[Points]) -> bool:
    """Rates always; losses and norms that span more than a factor of 30."""
    values = [y for points in curves for _, y in points if abs(y) < math.inf]
    if key == "lr":
        return any(y > 0 for y in values)
    return (key.startswith("loss") or key == "grad_norm") and bool(values) and 0 < 30 * min(values) < max(values)


def panel_of(key: str, curves: dict[str, Points], *, title: str = "", colours: dict[str, str] | None = None
             ) -> Image.Image:
    """A panel over the steps from 0 on; key: what says how it is scaled."""
    steps = [x for points in curves.values() for x, _ in points]
    return panel(curves, title=title or key, x_label="step", x_range=(0, max(steps, default=1)), colours=colours,
                 log=is_log_scaled(key, curves.values()))


def draw_run(out: Path) -> bool:
    """curves.png of the log.jsonl in a run's folder: the loss, its terms of the last layer, the learning rate, AP of
    evaluations, --probe_every, images/s. False: there is nothing to draw yet."""
    rows = read_log(out / "log.jsonl")
    training = [row for row in rows if "loss" in row]
    terms = keys_of(training, lambda k: k not in (*BESIDE, "loss") and not k.startswith(("class_error", "cardinality"))
                    and not k[-2:-1] == "_")  # loss_ce_0: of another layer of the decoder
    evaluated = keys_of(rows, lambda k: bool(re.fullmatch(r"(VOC07_)?AP(50|75)?(_mask)?", k)))
    probed = keys_of(rows, lambda k: k == "looking" or k.startswith("probe_"))
    groups = {"loss": ["loss"], "loss: terms": terms, "lr": ["lr"], "AP": evaluated, "looking": probed,
              "images_per_s": ["images_per_s"]}
    titles = {"loss": "loss (weighted sum)", "loss: terms": "terms of the loss", "lr": "learning rate",
              "AP": "average precision of evaluations", "looking": "probe: with and without looking",
              "images_per_s": "images/s"}
    panels = []
    for name, keys in groups.items():
        curves = {key: curve_of(rows, key) for key in keys}
        curves = {key: points for key, points in curves.items() if any(abs(y) < math.inf for _, y in points)}
        if curves:
            panels.append(panel_of(name, curves, title=titles[name]))
    if panels:
        draw_panels(out / "curves.png", panels)
    return bool(panels)
