"""curves.py: what a log is read as, what is drawn of it, and that no numbers keep a picture from being drawn."""
import json
import math
import time

import numpy as np
import pytest
from PIL import Image

import curves
import figures


def write_log(out, lines: int, start: float = 20.0, **evaluation):
    """`lines` lines of training with a falling loss, one of them nan, and an evaluation after half of them."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"step": i, "epoch": 0, "lr": 1e-4, "loss": start / (1 + i) if i != 3 else math.nan, "loss_ce": 1.0,
             "loss_ce_0": 2.0, "cardinality_error": 5.0, "images_per_s": 9.0} for i in range(lines)]
    rows.insert(lines // 2, {"step": max(lines // 2 - 1, 0), "epoch": 1, **evaluation})
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99999, "lo')
    return out


def test_a_log_is_read_as_far_as_it_is_whole(tmp_path):
    write_log(tmp_path, 6, AP=0.5)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'\n[1]\n{"loss": 1}\n\xff\xfe\n{"step": 7, "loss": 1.5, "note": "text"}\n')
    rows = curves.read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 5, 7]
    assert rows[-1] == {"step": 7, "loss": 1.5} and rows[3] == {"step": 2, "epoch": 1, "AP": 0.5}
    assert curves.curve_of(rows, "AP") == [(2, 0.5)] and curves.read_log(tmp_path / "nothing") == []


def test_a_long_log_is_thinned_out_and_drawn_at_once(tmp_path):
    write_log(tmp_path, 100_000, AP=0.5, AP50=0.7)
    start = time.perf_counter()
    assert curves.draw_run(tmp_path)
    assert time.perf_counter() - start < 5  # 0.3 s where nothing else runs
    rows = curves.read_log(tmp_path / "log.jsonl")
    assert len(rows) <= curves.MOST_LINES + 3 and curves.curve_of(rows, "AP") == [(49_999, 0.5)]
    assert (rows[0]["step"], rows[-1]["step"]) == (0, 99_999)
    points = curves._drawable([(i, float(i == 70_001)) for i in range(100_000)], log=False)
    assert len(points) <= curves.MOST_POINTS + 2 and (70_001, 1.0) in points  # a peak is kept


def test_panels_of_a_run(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(curves, "panel_of", lambda key, found, title: shown.update({title: found}))
    monkeypatch.setattr(curves, "draw_panels", lambda *_: None)
    curves.draw_run(write_log(tmp_path, 6, AP=0.5, AP50=0.7, APs=0.1, AR100=0.9, VOC07_AP50=0.8, AP75_mask=0.2,
                              looking=0.1, probe_IoU=0.3))
    assert {title: list(found) for title, found in shown.items()} == {
        "loss (weighted sum)": ["loss"], "terms of the loss": ["loss_ce"], "learning rate": ["lr"],
        "average precision of evaluations": ["AP", "AP50", "VOC07_AP50", "AP75_mask"],
        "probe: with and without looking": ["looking", "probe_IoU"], "images/s": ["images_per_s"]}


@pytest.mark.parametrize("content", ("", '{"step": 0, "loss": NaN}\n', '{"step": 0, "los'))
def test_nothing_to_draw_yet(tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    assert not curves.draw_run(tmp_path) and not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("log", (False, True))
@pytest.mark.parametrize("points", (
    [], [(0, 1.0)], [(5, 0.0)], [(1, -2.0), (2, -2.0)], [(0, math.nan), (1, math.inf), (2, None)],
    [(0, 5e-324), (1, 0)], [(10**9, 1e-30), (10**9, 1e30)], [(0, 1e308), (1, -1e308)], [(1, 3.0), (2, 3.0000000001)]))
def test_any_numbers_can_be_drawn(points, log):
    assert curves.panel({"a": points, "b": [(0, 2.0)]}, log=log, size=(200, 150)).size == (400, 300)


def test_ticks():
    assert curves._ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert curves._ticks(-0.3, 0.31) == pytest.approx([-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3, 0.4])
    assert curves._ticks(0, 99_999)[-1] == 100_000 and curves._ticks(7, 8)[0] == 7
    assert curves._log_ticks(2e-5, 2e-4) == pytest.approx([2e-5, 5e-5, 1e-4, 2e-4])
    assert curves._log_ticks(0.02, 50) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert [curves._number(v) for v in (0.0002, 500, 20_000, 1.5e6)] == ["0.0002", "500", "20k", "1.5M"]


def column_of(picture: Image.Image, colour: str, x: int) -> np.ndarray:
    """The rows in which a column of a picture has this colour."""
    rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)])
    return np.flatnonzero((np.asarray(picture)[:, x] == rgb).all(-1))


def test_a_curve_lies_where_its_values_are():
    """y 0..1 over x 0..10, with axes from 120 to width - 54 and from 64 to height - 84."""
    picture = curves.panel({"a": [(0, 0.0), (10, 1.0)]}, x_range=(0, 10), y_range=(0, 1), size=(300, 200))
    left, top, right, bottom = 120, 64, 600 - 54, 400 - 84
    for share in (0.25, 0.5, 0.75):
        rows = column_of(picture, curves.COLOURS[0], round(left + share * (right - left)))
        assert rows.mean() == pytest.approx(bottom - share * (bottom - top), abs=3)


def test_bars_and_the_values_they_are_the_mean_of():
    """Means 1 and 3 of 0..4; the values of the first group are 0 and 2; what is not finite is left out."""
    picture = curves.bars({"a": [0.0, 2.0], "b": [4.0, 2.0], "c": [math.nan, math.inf]}, title="AP", size=(300, 200))
    left, top, right, bottom = 120, 64, 600 - 54, 400 - 84
    for i, mean in enumerate((1, 3)):
        rows = column_of(picture, curves.COLOURS[i], round(left + (i + 0.25) / 3 * (right - left)))
        assert (rows[0], rows[-1]) == pytest.approx((bottom - mean / 4 * (bottom - top), bottom), abs=3)
    dots = column_of(picture, "#000000", round(left + 0.5 / 3 * (right - left)))
    assert any(abs(dots - (bottom - 0.5 * (bottom - top))) < 3)
    assert not len(column_of(picture, curves.COLOURS[2], round(left + 2.3 / 3 * (right - left)))) > 3
    assert curves.bars({"one": []}, size=(200, 150)).size == (400, 300)


def test_runs_side_by_side(tmp_path, fails, capsys):
    """One colour per run; folders of one name are told apart; the numbers lie beside the picture."""
    one, two = (write_log(tmp_path / name / "run", 8, start, AP=0.5) for name, start in (("a", 20.0), ("b", 40.0)))
    out = tmp_path / "curves.png"
    numbers = figures.main(["curves", str(one), str(two), "--out", str(out)])
    assert json.loads(out.with_suffix(".json").read_text())["runs"].keys() == {"a/run", "b/run"}
    assert numbers["runs"]["a/run"]["folder"] == str(one)
    assert numbers["runs"]["b/run"]["curves"].keys() == {"loss", "lr", "AP", "images_per_s"}
    assert numbers["runs"]["b/run"]["curves"]["AP"] == [(3, 0.5)]
    picture = Image.open(out)
    assert picture.size == (2 * curves.PANEL[0], 2 * curves.PANEL[1])
    seen = {colour: count for count, colour in picture.getcolors(1 << 20)}
    assert all(tuple(int(c[i:i + 2], 16) for i in (1, 3, 5)) in seen for c in curves.COLOURS[:2])
    assert "b/run      8     5  0.0001  0.5             9" in capsys.readouterr().out
    figures.main(["curves", str(one), "--keys", "loss_ce_0", "--out", str(out)])
    assert Image.open(out).size == curves.PANEL
    assert "--keys nothing AR: none of these runs has logged that; there is lr, loss, " in fails(
        figures.main, ["curves", one, "--keys", "nothing", "loss", "AR", "--out", out])
    for wrong in (tmp_path, tmp_path / "nowhere", out):
        assert f"{wrong}: has no log.jsonl with a line in it" in fails(figures.main, ["curves", one, wrong])
    assert "give a name that ends in .png" in fails(figures.main, ["curves", one, "--out", tmp_path / "x.jpg"])
