"""What the runs of all five methods have in common: their files, the same command again, resume, and what is refused.

A method's own numbers (terms of the loss, rows of its table) are looked at in its own test file.
"""
import importlib
import json

import pytest
import torch
from conftest import flags, plain, run_processes
from PIL import Image

METHODS = ("detreg", "updetr", "siamese_detr", "soco", "dupr")
MEASURED = {"images_per_s", "memory_gib", "seconds"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


def run_values(method: str, **values) -> dict:
    return {**importlib.import_module(f"test_{method}").RUN, **values}


def start(method: str, out, **values) -> dict:
    return importlib.import_module(method).main(flags(run_values(method, out=out, **values)))


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def is_probe(line: dict) -> bool:
    return "looking" in line


def test_files(method, finished_run):
    out, metrics = finished_run(method)
    steps = metrics["steps"]
    lines = log_of(out)
    assert [line["step"] for line in lines] == list(range(steps))
    for line in lines:
        assert {"epoch", "lr", "loss", "grad_norm"} | MEASURED <= line.keys()
        assert line["grad_norm"] > 0 and line["images_per_s"] > 0 and line["memory_gib"] > 0
    assert json.loads((out / "metrics.json").read_text()) == plain(metrics)
    assert metrics["primary"] in metrics["pretrained"]
    assert Image.open(out / "predictions.png").height > 4 * 60
    state = torch.load(out / "last.pt", weights_only=True)
    assert (state["step"], state["script"], state["config"]["out"]) == (steps, method, str(out))
    assert not any(name.startswith(("module.", "detector.")) for name in state["model"])
    assert not list(out.rglob("*.tmp"))


def test_the_same_command_again(method, finished_run, capsys):
    out, metrics = finished_run(method)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert plain(start(method, out)) == plain(metrics)
    printed = capsys.readouterr().out
    assert f"this run is finished ({metrics['steps']} steps)" in printed
    assert "pretrained" in printed and f"primary: {metrics['primary']}" in printed
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


def test_resumed_run_is_the_unbroken_one(method, finished_run, tmp_path, capsys):
    """Also where it measures meanwhile what it has learned: the last of these measurements is that of the table."""
    straight, metrics = finished_run(method)
    middle = metrics["steps"] // 2
    start(method, tmp_path, max_steps=middle)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == middle
    assert plain(start(method, tmp_path, probe_every=1)) == plain(metrics)
    probed = [line for line in log_of(tmp_path) if is_probe(line)]
    assert [line["step"] for line in probed] == list(range(middle, metrics["steps"]))
    rows = {key.removeprefix("probe_"): value for key, value in probed[-1].items() if key.startswith("probe_")}
    for row in ("pretrained", "shuffled", "wrong_image"):
        for name in metrics[row] if row in metrics else ():
            key = name if row == "pretrained" else f"{name}_{row}"
            assert rows.get(key, metrics[row][name]) == pytest.approx(metrics[row][name], rel=1e-5, nan_ok=True)
    first = next(iter(rows))
    others = [value for key, value in rows.items() if key.startswith(f"{first}_")]
    assert probed[-1]["looking"] == pytest.approx(rows[first] - max(others), abs=1e-5)
    assert f"at step {middle}" in capsys.readouterr().out
    one, two = (torch.load(p / "last.pt", weights_only=True) for p in (straight, tmp_path))
    assert one["model"].keys() == two["model"].keys() and one["step"] == two["step"]
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    for a, b in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert one.get("fallbacks") == two.get("fallbacks")
    unmeasured = [[{k: v for k, v in line.items() if k not in MEASURED} for line in log_of(p)]
                  for p in (straight, tmp_path)]
    assert unmeasured[0] == [line for line in unmeasured[1] if not is_probe(line)]


def test_a_folder_of_another_run_is_refused(method, finished_run, fails):
    out, metrics = finished_run(method)
    main = importlib.import_module(method).main
    line = fails(main, flags(run_values(method, out=out, weight_decay=0.5)))
    assert str(out) in line and "-> 0.5" in line and "weight_decay: " in line and "--allow_config_change" in line
    other = "updetr" if method != "updetr" else "detreg"
    line = fails(importlib.import_module(other).main, flags(run_values(other, out=out)))
    assert f"holds a run of {method}.py; give {other}.py another --out" in line
    assert json.loads((out / "metrics.json").read_text())["steps"] == metrics["steps"]


def test_what_all_refuse_before_anything_is_written(method, fails, tmp_path):
    main = importlib.import_module(method).main

    def fail(**values) -> str:
        return fails(main, flags(run_values(method, out=tmp_path / "out", **values)))

    images = run_values(method)["synthetic_images"]
    assert f"{images} images are fewer than one batch of 64" in fail(batch_size=64)
    assert "--batch_size 0: must be at least 1" in fail(batch_size=0)
    assert "--probe_images 1: the row `shuffled` needs at least 2 images" in fail(probe_images=1)
    assert "--probe_every 5: give --probe_images N too" in fail(probe_images=0, probe_every=5)
    assert "--accumulate 3" in (line := fail(accumulate=3)) or "3 accumulated micro-batches" in line
    assert str(tmp_path / "nowhere") in fail(data=tmp_path / "nowhere")
    for name, value in (("seed", -1), ("num_workers", -1), ("epochs", 0), ("log_every", 0), ("weight_decay", "nan"),
                        ("lr", 0), ("lr", "inf"), ("lr", -1e-3), ("synthetic_size", 0), ("save_every", -5)):
        assert f"--{name} " in (line := fail(**{name: value})) and "must be " in line
    assert "cuda" in fail(device="cuda") or torch.cuda.is_available()
    assert not (tmp_path / "out").exists()


def test_fallbacks_of_all_processes_are_counted(tmp_path):
    """D9: nothing is proposed on images of one colour; D2: no region is as large as the overlap. So every sample of
    both processes falls back."""
    for i in range(8):
        Image.new("RGB", (40, 40), (20 * i, 90, 10)).save(tmp_path / f"{i}.png")
    values = {"data": tmp_path, "probe_images": 0, "batch_size": 4, "max_steps": 2, "num_workers": 0, "log_every": 1,
              "cache_proposals": "false"}
    own = {"detreg": {"proposal_method": "selective_search"},
           "siamese_detr": {"proposal_method": "random", "min_area": 1}}
    argv = {name: flags(run_values(name, out=tmp_path / "out" / name, **values, **own[name])) for name in own}
    run_processes(f"for name, argv in {argv!r}.items(): __import__(name).main(argv)", tmp_path)
    for name in argv:
        assert [line["fallbacks"] for line in log_of(tmp_path / "out" / name)] == [4, 8]
        assert torch.load(tmp_path / "out" / name / "last.pt", weights_only=True)["fallbacks"] == 8
