"""benchmarks/compare.py: what is kept, what is run again, and what its table says."""
from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import compare  # noqa: E402
from compare import Run, UserError  # noqa: E402

# A script that takes no time: AP is its --value, halved behind a start; "fail" in its flags ends it.
FAKE = """
import json, pathlib, sys, time
Config = None
def main(argv):
    of = dict(zip(argv[::2], argv[1::2]))
    out = pathlib.Path(of["--out"])
    open(out.parent / "calls.txt", "a").write(out.name + chr(10))
    if of["--value"] == "fail":
        raise ValueError("no such value")
    if of["--value"] == "sleep":
        time.sleep(60)
    ap = (float(of["--value"]) + int(of["--seed"])) / (1 + pathlib.Path(of.get("--init_from", "nothing")).exists())
    rows = [{"step": 0, "loss": 2.0, "loss_ce": 1.0}, {"step": 1, "AP": ap / 2}, {"step": 3, "AP": ap}]
    (out / "log.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
    (out / "last.pt").touch()
    return {"steps": 4, "AP": ap}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake.py among the project's scripts; runs in forks of this process. Gives the flags of compare.py."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake", raising=False)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "PROCESSES", multiprocessing.get_context("fork"))
    monkeypatch.setattr(compare, "proposals_of", lambda script, flags: ())
    return ["--script", "fake.py", "--then", "fake.py --value 8", "--out", str(tmp_path / "out"), "--device", "cpu",
            "--jobs", "2", "--seeds", "2"]


def calls(tmp_path) -> list[str]:
    return (tmp_path / "out" / "runs" / "calls.txt").read_text().split()


def test_interval_and_table_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t_(.975, 2) = 4.30265: 2 -+ 2.484."""
    a, b = [2.0, 4.0, 6.0], [1.0, 2.0, 3.0]
    assert compare.interval(a, b) == pytest.approx((2.0, 2 - 4.302653 / 3 ** 0.5, 2 + 4.302653 / 3 ** 0.5), abs=1e-5)
    assert compare.table({"AP": {"a": a, "b": b, "c": [3.0, 4.0, 5.0]}, "AP50": {"a": [0.5], "b": [0.25]}}) == [
        "| number | arm | mean | deviation | a better by [95 %] | seed by seed |", "|---|---|---|---|---|---|",
        "| AP | a | 4.000 | 2.000 |  | 2.0000, 4.0000, 6.0000 |",
        "| AP | b | 2.000 | 1.000 | +2.000 [-0.484, +4.484] | 1.0000, 2.0000, 3.0000 |",
        "| AP | c | 4.000 | 1.000 | +0.000 [-2.484, +2.484] | 3.0000, 4.0000, 5.0000 |",
        "| AP50 | a | 0.500 |  |  | 0.5000 |", "| AP50 | b | 0.250 |  | +0.250 | 0.2500 |"]


def test_values_of_a_run():
    found = {"metrics": {"AP": 0.6, "steps": 12, "pretrained": {"AR10": 0.3}},
             "curve": [{"step": 0, "loss": 9.0}, {"step": 1, "AP": 0.1}, {"step": 2, "AP": 0.2}]
             + [{"step": 3 + i, "loss": float(i)} for i in range(9)]}
    assert compare.value(found, "AP") == 0.6 and compare.value(found, "pretrained/AR10") == 0.3
    assert compare.value(found, "mean AP") == pytest.approx(0.3)
    found["curve"].append({"step": 11, "AP": 0.6})  # the log has the last one too: it counts once
    assert compare.value(found, "mean AP") == pytest.approx(0.3)
    assert compare.value(found, "first loss") == 9 and compare.value(found, "last loss") == 7.5  # the last 2 of 10
    assert compare.numbers({"metrics": {"pretrained": {"AR10": 0.3}, "steps": 12}, "curve": []}, "AP") == {}


def test_key_follows_flags_and_inputs():
    """A run is another when its flags, or those of a run it starts from, are."""
    start, other = (Run("detreg", ("--lr", lr)) for lr in ("1e-4", "2e-4"))
    first = Run("finetune", ("--seed", "0", "--init_from", start))
    assert first.inputs == [start] and first.key == Run("finetune", tuple(first.flags)).key
    assert len({first.key, Run("finetune", ("--seed", "1", "--init_from", start)).key,
                Run("finetune", ("--seed", "0", "--init_from", other)).key}) == 3


def test_left_to_do(tmp_path):
    """A finished run is not run again, but for a checkpoint that another one needs and that is gone."""
    start = Run("detreg", ())
    tune = Run("finetune", ("--init_from", start))
    assert compare.left_to_do([tune], {}, tmp_path) == [start, tune]
    assert compare.left_to_do([tune, start], {start.key: {}, tune.key: {}}, tmp_path) == []
    assert compare.left_to_do([tune], {start.key: {}}, tmp_path) == [start, tune]
    compare.folder(start, tmp_path).mkdir(parents=True)
    compare.product(start, tmp_path).touch()
    assert compare.left_to_do([tune], {start.key: {}}, tmp_path) == [start, tune]  # stopped while it was made again
    (compare.folder(start, tmp_path) / "result.json").touch()
    assert compare.left_to_do([tune], {start.key: {}}, tmp_path) == [tune]


def test_arms_share_what_is_equal(tmp_path):
    """One store for all arms and seeds that search the same images in the same way; flags where they belong."""
    args, arms = compare.parse([
        "--data", str(tmp_path), "--arm", "a: --lambda_e 0", "--arm", "b: siamese_detr.py", "--arm", "c:",
        "--arm", "scratch: none | --detector deformable_detr", "--arm", "random: --proposal_method random",
        "--then", "finetune.py --data voc", "--then", "probe.py linear {} --data 'x y'", "--seeds", "2"])
    assert {name: len(runs) for name, runs in arms.items()} == dict.fromkeys(("a", "b", "c", "scratch", "random"), 2)
    probe = arms["a"][1]
    (tuned,) = probe.inputs
    (pretrained,) = tuned.inputs
    assert probe == ("probe", ("linear", tuned, "--data", "x y", "--seed", "1"))
    assert tuned == ("finetune", ("--data", "voc", "--seed", "1", "--init_from", pretrained))
    assert pretrained.flags[:-1] == ("--data", str(tmp_path), "--lambda_e", "0", "--seed", "1", "--proposal_store")
    stores = [run for run in compare.in_order(run for runs in arms.values() for run in runs)
              if run.script == "proposals"]
    searched = ("--data", str(tmp_path), "--method", "selective_search", "--mode", "fast", "--grid", "128", "--rank",
                "opencv", "--seed", "0")
    assert [run.flags for run in stores] == [searched, ("--data", str(tmp_path), "--method", "edge_boxes", "--mode",
                                                        "fast", "--rank", "opencv", "--seed", "0")]
    assert pretrained.inputs == [stores[0]]
    scratch = arms["scratch"][0].inputs[0]
    assert scratch == ("finetune", ("--data", "voc", "--seed", "0")) and "--detector" in arms["scratch"][0].flags
    assert args.results == Path("out/compare/runs.jsonl")


@pytest.mark.parametrize("argv, message", [
    (["--arm", "no flags"], 'give "NAME: FLAGS"'), (["--arm", "a: none"], "need a --then"),
    (["--arm", "a: --lr 1 | --lr 2"], "need a --then"), (["--arm", "a:", "--arm", "a: --lr 1"], "have the same name"),
    (["--arm", "a: other.py"], "other.py: no script"), (["--arm", "a: --lr -1"], "--lr -1.0: must be"),
    (["--arm", "a:", "--then", "finetune --data voc"], "finetune: no script"),
    (["--arm", "a:", "--then", "finetune.py --batch_size 0"], "--batch_size 0: must be"),
])
def test_wrong_arms_are_found_before_anything_runs(argv, message):
    with pytest.raises(UserError, match=message):
        compare.parse(["--data", "folder", *argv])


def test_runs_are_kept_and_continued(fake, tmp_path, capsys):
    """(8 + seed) / 2 behind a start; a second call runs nothing, another arm its own runs alone; what fails is named,
    and what was finished stays."""
    arms = ["--arm", "a: --value 1", "--arm", "scratch: none | --value 4"]
    with pytest.raises(UserError, match=r"fake failed \(ValueError: no such value\); .*printed.txt has more"):
        compare.main([*fake, "--arm", "bad: --value fail", *arms, "--jobs", "1"])
    assert compare.main([*fake, *arms, "--report"]) == {}
    found = compare.main([*fake, *arms, "--number", "AP", "mean AP", "last loss"])
    assert found == {"AP": {"a": [4.0, 4.5], "scratch": [4.0, 5.0]},
                     "mean AP": {"a": [3.0, 3.375], "scratch": [3.0, 3.75]},
                     "last loss": {"a": [2.0, 2.0], "scratch": [2.0, 2.0]}}
    lines = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(line["device"] == "cpu" and line["seconds"] >= 0 for line in lines)
    assert lines[-1]["curve"][0] == {"step": 0, "loss": 2.0} and lines[-1]["curve"][1]["step"] == 1
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| AP | scratch | 4.500 | 0.707 | -0.250 [-3.427, +2.927] | 4.0000, 5.0000 |" in text and "6 runs" in text
    assert text.count("fake.py --value 8 --seed 0 --init_from <fake ") == 1
    for name in ("compare-bars.png", "compare-curves.png"):
        assert np.asarray(Image.open(tmp_path / "out" / name)).std() > 5
    done = calls(tmp_path)
    assert len(done) == 7 and len(set(done)) == 7  # the six, and what failed
    with open(tmp_path / "out" / "runs.jsonl", "a") as file:
        file.write('{"key": "cut of')  # by a kill, while it was written
    assert compare.main([*fake, *arms])["AP"] == found["AP"] and calls(tmp_path) == done
    more = [*fake, *arms, "--arm", "b: --value 2"]
    capsys.readouterr()
    assert compare.main([*more, "--list"]) == {}
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == ["done "] * 6 + ["to do"] * 4
    assert compare.main(more)["AP"]["b"] == [4.0, 4.5] and len(calls(tmp_path)) == 11
    with pytest.raises(UserError, match="'AR' is no number of these runs; there is AP, steps"):
        compare.main([*more, "--number", "AR"])


def test_checkpoints_that_nothing_needs_are_deleted(fake, tmp_path):
    args, arms = compare.parse([*fake, "--arm", "a: --value 1", "--arm", "b: --value 2"])
    first, second = arms["a"][0], arms["b"][0]
    compare.run_all([first], args, later=[first, Run("fake", ("--value", "3", "--init_from", first.inputs[0])), second])
    there = [compare.product(run, args.work).exists() for run in (first.inputs[0], first)]
    assert there == [True, False]  # a run to come starts from it
    compare.run_all([second], args, later=[first, second])
    assert not compare.product(second.inputs[0], args.work).exists()


def test_a_trial_is_kept_apart(fake):
    args, _ = compare.parse([*fake, "--arm", "a: --value 1", "--max_steps", "2"])
    whole, _ = compare.parse([*fake, "--arm", "a: --value 1"])
    assert args.work == whole.work / "trial" and args.results == whole.work / "trial" / "runs.jsonl"
    assert args.max_steps == 2 and whole.max_steps is None and whole.results.parent == args.out


def test_ctrl_c_ends_the_runs(fake, tmp_path, monkeypatch):
    def interrupted(sentinels):
        while not list(tmp_path.rglob("calls.txt")) or len(calls(tmp_path)) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    others = multiprocessing.active_children()
    monkeypatch.setattr(multiprocessing.connection, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare.main([*fake, "--arm", "a: --value sleep"])
    assert multiprocessing.active_children() == others and not (tmp_path / "out" / "runs.jsonl").exists()


@pytest.mark.usefixtures("one_thread")
def test_a_real_script(tmp_path, finished_run):
    """What execute() hands to a fine-tuning, and what it keeps of it."""
    out, _ = finished_run("detreg")
    flags = ("--preset demo --seed 0 --data synthetic --synthetic_images 4 --synthetic_test_images 2 --epochs 5 "
             "--batch_size 4 --scales 64 --max_size 64 --eval_size 64 --init_from {start}")
    run = Run("finetune", tuple(flags.split()))
    compare.execute(run, tmp_path, "cpu", 1, {"{start}": str(out / "last.pt")}, max_steps=1)
    folder = compare.folder(run, tmp_path)
    result = json.loads((folder / "result.json").read_text())
    assert (result["key"], result["argv"][-1], result["device"]) == (run.key, "{start}", "cpu")
    assert [sorted(line) for line in result["curve"][:1]] == [["loss", "step"]] and "AP50" in result["curve"][1]
    assert 0 <= compare.value(result, "AP") <= 1 and list(compare.numbers(result, "AP")) == [1]
    assert compare.product(run, tmp_path).exists() and "detection" in (folder / "printed.txt").read_text()
