"""benchmarks/claims.py: what is compared, what is kept, what is run again."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import claims as C  # noqa: E402

TINY = ("--max_steps 2 --synthetic_images 8 --synthetic_test_images 4 --epochs 2 --eval_every 1 --scales 64 "
        "--max_size 64 --eval_size 64 --enc_layers 1")


def result(run: C.Run, **metrics) -> dict:
    return {"key": run.key, "script": run.script, "argv": [], "metrics": metrics, "curve": [], "seconds": 1.0,
            "device": "cpu", "torch": "t", "commit": "c"}


def claim_of(a: str, b: str, **more) -> C.Claim:
    def arm(name: str) -> C.Arm:
        return C.Arm(name, lambda data, seed: C.run("finetune", seed, "--data", data, name), "AP")
    return C.Claim("x", "a beats b", "Table 1: 2 / 1", arm(a), arm(b), **more)


def compared(a: list[float], b: list[float], **more) -> C.Comparison:
    claim = claim_of("--a", "--b", **more)
    results = {}
    for seed, values in enumerate(zip(a, b)):
        for arm, ap in zip((claim.a, claim.b), values):
            run = arm.run("synthetic", seed)
            results[run.key] = result(run, AP=ap)
    return C.compare(claim, "synthetic", range(len(a)), results)


def test_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t_(.975, 2) = 4.30265."""
    mean, low, high = compared([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).interval
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.302653 / 3 ** 0.5, 2 + 4.302653 / 3 ** 0.5), abs=1e-5)
    assert compared([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], sign=-1).interval[0] == -2.0


@pytest.mark.parametrize("differences, margin, word", [
    ([0.10, 0.11, 0.12], 0.0, "holds"), ([-0.10, -0.11, -0.12], 0.0, "does not hold"),
    ([0.1, -0.1, 0.05], 0.0, "inconclusive"), ([0.001, -0.001, 0.0], 0.02, "holds"),
    ([0.05, -0.05, 0.0], 0.02, "inconclusive"), ([-0.10, -0.11, -0.12], 0.02, "does not hold"),
    ([-0.009, -0.0091, -0.0092], 0.02, "holds"), ([-0.011, -0.0111, -0.0112], 0.02, "does not hold"),
])
def test_words(differences, margin, word):
    assert compared([0.5 + d for d in differences], [0.5] * 3, margin=margin).word == word


def test_only_seeds_with_both_arms_count():
    claim = claim_of("--a", "--b")
    runs = [claim.a.run("synthetic", 0), claim.b.run("synthetic", 0), claim.a.run("synthetic", 1)]
    found = C.compare(claim, "synthetic", range(5), {r.key: result(r, AP=0.5) for r in runs})
    assert found.seeds == [0] and found.a == [0.5]
    assert C.compare(claim, "synthetic", range(5), {}) is None


def test_key_follows_flags_and_inputs():
    """A run is another when its flags, or those of a run it starts from, are."""
    start, other = C.run("detreg", 0, "--lr 1e-4"), C.run("detreg", 0, "--lr 2e-4")
    first = C.run("finetune", 0, "--init_from", start)
    assert first.flags == ("--preset", "demo", "--seed", "0", "--init_from", start) and first.inputs == [start]
    assert first.key == C.run("finetune", 0, "--init_from", C.run("detreg", 0, ("--lr", "1e-4"))).key
    assert len({first.key, C.run("finetune", 1, "--init_from", start).key,
                C.run("finetune", 0, "--init_from", other).key}) == 3


def test_values_of_a_run():
    found = {"metrics": {"AP": 0.6, "steps": 12, "pretrained": {"AR10": 0.3}},
             "curve": [{"step": 0, "loss": 9.0}, {"step": 1, "AP": 0.1}, {"step": 2, "AP": 0.2}]
             + [{"step": 3 + i, "loss": float(i)} for i in range(9)]}
    assert C.value(found, "AP") == 0.6 and C.value(found, "pretrained/AR10") == 0.3
    assert C.value(found, "mean AP") == pytest.approx(0.3)
    found["curve"].append({"step": 11, "AP": 0.6})  # the log has the last one too: it counts once
    assert C.value(found, "mean AP") == pytest.approx(0.3)
    assert C.value(found, "last loss") == pytest.approx(7.5)             # the last 2 of 10


def test_left_to_do(tmp_path):
    """A finished run is not run again, but for a checkpoint that another one needs and that is gone."""
    start = C.run("detreg", 0)
    tune = C.run("finetune", 0, "--init_from", start)
    assert C.left_to_do([tune], {}, tmp_path) == [start, tune]
    assert C.left_to_do([tune, start], {start.key: {}, tune.key: {}}, tmp_path) == []
    assert C.left_to_do([tune], {start.key: {}}, tmp_path) == [start, tune]
    C.folder(start, tmp_path).mkdir(parents=True)
    C.product(start, tmp_path).touch()
    assert C.left_to_do([tune], {start.key: {}}, tmp_path) == [tune]


def test_every_claim_of_the_issue_is_there():
    judged = {c.text[0] for c in C.CLAIMS if c.judged}
    assert judged == set("12345678")
    assert len({c.name for c in C.CLAIMS}) == len(C.CLAIMS)
    for claim in C.CLAIMS:
        for data in claim.data:
            a, b = claim.a.run(data, 0), claim.b.run(data, 0)
            assert (a.key != b.key or claim.a.path != claim.b.path) and claim.paper


def test_arms_of_a_claim_share_budget_and_schedule():
    """Fine-tunings of both arms differ only in what they start from (and in the flags that give a scratch
    detector the same architecture)."""
    budget = ("--epochs", "--batch_size", "--lr", "--lr_backbone", "--lr_drop", "--eval_every", "--synthetic_images",
              "--labels_percent", "--data", "--seed", "--scales", "--eval_size", "--max_size")
    for claim in C.CLAIMS:
        for data in claim.data:
            runs = [arm.run(data, 3) for arm in (claim.a, claim.b)]
            if runs[0].script == "finetune":
                given = [{name: r.flags[r.flags.index(name) + 1] for name in budget if name in r.flags} for r in runs]
                assert given[0] == given[1], claim.name


def test_runs_are_kept_and_continued(tmp_path, monkeypatch, capsys):
    """Two arms with one pretraining between them: what is written, and that a second call runs nothing."""
    def pretrained(data: str, seed: int) -> C.Run:
        start = C.run("detreg", seed, "--data {scenes} --max_steps 1 --probe_images 0 --cache_proposals false "
                      "--batch_size 2 --max_prop 2", "--enc_layers 1")
        return C.run("finetune", seed, "--data", data, TINY, "--init_from", start)
    claim = C.Claim("tiny", "1. a beats b", "Table 0: 2 / 1", C.Arm("pretrained", pretrained, "mean AP"),
                    C.Arm("scratch", lambda data, seed: C.run("finetune", seed, "--data", data, TINY), "mean AP"),
                    data=("synthetic",))
    monkeypatch.setattr(C, "CLAIMS", [claim])
    monkeypatch.setattr(C, "SCENES", 4)
    argv = ["--seeds", "1", "--results", str(tmp_path / "claims.jsonl"), "--work", str(tmp_path / "work"), "--data",
            "synthetic", "--jobs", "2", "--device", "cpu"]
    found = C.main(argv)
    lines = [json.loads(line) for line in (tmp_path / "claims.jsonl").read_text().splitlines()]
    assert sorted(line["script"] for line in lines) == ["detreg", "finetune", "finetune"]
    assert all(line["seconds"] > 0 and line["device"] == "cpu" and {p["step"] for p in line["curve"]} for line in lines)
    evaluations = [p for line in lines if line["script"] == "finetune" for p in line["curve"] if "AP" in p]
    assert [p["step"] for p in evaluations] == [0, 1, 0, 1]                  # after each of two epochs of one step
    assert len(found) == 1 and found[0].seeds == [0]
    text = (tmp_path / "claims.md").read_text()
    assert "1. a beats b" in text and "one seed" in text and "3 runs" in text
    for name in ("claims-bars.png", "claims-curves.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 5
    assert not list((tmp_path / "work").rglob("last.pt"))                    # nothing needs them any more
    with open(tmp_path / "claims.jsonl", "a") as file:
        file.write('{"key": "cut of')                                        # by a kill, while it was written
    monkeypatch.setattr(C, "execute", None)                                  # would fail if anything were to run
    assert C.main(argv)[0].a == found[0].a


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    bad = C.Arm("bad", lambda data, seed: C.run("finetune", seed, "--data", data, "--lr -1"), "AP")
    monkeypatch.setattr(C, "CLAIMS", [C.Claim("tiny", "1. a beats b", "-", bad, bad)])
    monkeypatch.setattr(C, "SCENES", 1)
    with pytest.raises(C.UserError, match="finetune failed.*printed.txt"):
        C.main(["--seeds", "1", "--results", str(tmp_path / "c.jsonl"), "--work",
                str(tmp_path / "work"), "--device", "cpu"])


def test_unknown_name():
    with pytest.raises(C.UserError, match="no such claim; there are detreg-scratch"):
        C.main(["--only", "nothing"])
