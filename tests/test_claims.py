"""benchmarks/claims.py: what is claimed, and that the results beside it are those of its rows."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_flags import SCRIPTS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import claims as C  # noqa: E402
import compare  # noqa: E402


def result(run: C.Run, **metrics) -> dict:
    return {"key": run.key, "script": run.script, "argv": [], "metrics": metrics, "curve": [], "seconds": 1.0,
            "device": "cpu", "torch": "t", "commit": "c"}


def claim_of(a: str, b: str, **more) -> C.Claim:
    def arm(name: str) -> C.Arm:
        return C.Arm(name, lambda data, seed: C.run("synthetic", "finetune", seed, "--data", data, name), "AP")
    return C.Claim("x", arm(a), arm(b), **more)


def compared(a: list[float], b: list[float], **more) -> C.Comparison:
    claim = claim_of("--a", "--b", **more)
    results = {}
    for seed, values in enumerate(zip(a, b)):
        for arm, ap in zip((claim.a, claim.b), values):
            run = arm.run("synthetic", seed)
            results[run.key] = result(run, AP=ap)
    return C.compared(claim, "synthetic", range(len(a)), results)


def test_smaller_is_better():
    assert compared([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).interval[0] == 2.0
    assert compared([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], sign=-1).interval[0] == -2.0


@pytest.mark.parametrize("differences, margin, word", [
    ([0.10, 0.11, 0.12], 0.0, "holds"), ([-0.10, -0.11, -0.12], 0.0, "does not hold"),
    ([0.1, -0.1, 0.05], 0.0, "inconclusive"), ([0.001, -0.001, 0.0], 0.02, "holds"),
    ([0.05, -0.05, 0.0], 0.02, "inconclusive"), ([-0.10, -0.11, -0.12], 0.02, "does not hold"),
    ([-0.009, -0.0091, -0.0092], 0.02, "holds"), ([-0.011, -0.0111, -0.0112], 0.02, "does not hold"),
])
def test_words(differences, margin, word):
    assert compared([0.5 + d for d in differences], [0.5] * 3, margin=margin).word == f"**{word}**"
    assert compared([0.5], [0.5]).word == "one seed"


def test_only_seeds_with_both_arms_count():
    claim = claim_of("--a", "--b")
    runs = [claim.a.run("synthetic", 0), claim.b.run("synthetic", 0), claim.a.run("synthetic", 1)]
    found = C.compared(claim, "synthetic", range(5), {r.key: result(r, AP=0.5) for r in runs})
    assert found.seeds == [0] and found.a == [0.5]
    assert C.compared(claim, "synthetic", range(5), {}) is None


def test_every_claim_of_the_issue_is_there():
    judged = {c.said("text")[0] for c in C.CLAIMS if c.judged}
    assert judged == set("12345678")
    assert len({c.name for c in C.CLAIMS}) == len(C.CLAIMS)
    for claim in C.CLAIMS:
        assert claim.said("text") and claim.said("paper")
        for data in claim.data:
            a, b = claim.a.run(data, 0), claim.b.run(data, 0)
            assert a.key != b.key or claim.a.path != claim.b.path


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


def test_every_flag_is_taken():
    """By its script, whose own parser says so before hours have passed."""
    runs = [run for claim in C.CLAIMS for data in claim.data for run in C.runs_of(claim, data, range(1))]
    found = {run.script: compare.proposals_of(run.script, run.named(lambda r: "file"))
             for run in C.in_order(runs) if run.script in SCRIPTS}
    assert set(found) == set(SCRIPTS)


def test_the_report_is_that_of_the_results_beside_it(tmp_path, capsys):
    """Keys are what they were when the runs were made; nothing runs. A data set that is not there is said."""
    (tmp_path / "claims.jsonl").write_bytes((ROOT / "benchmarks" / "claims.jsonl").read_bytes())
    argv = ["--results", str(tmp_path / "claims.jsonl"), "--shared", str(tmp_path)]
    C.main([*argv, "--list", "--only", "detreg"])
    text = capsys.readouterr().out
    assert "bccd, voc07, voc07_10: not in" in text and "detreg-scratch         bccd       judged" in text
    found = C.main([*argv, "--report"])
    assert (tmp_path / "claims.md").read_text() == (ROOT / "benchmarks" / "claims.md").read_text()
    assert (found[0].claim.name, found[0].data, found[0].seeds) == ("detreg-scratch", "synthetic", [0, 1, 2, 3, 4])
    assert all((tmp_path / f"claims-{name}.png").stat().st_size > 10_000 for name in ("bars", "curves"))


def test_what_runs(tmp_path, monkeypatch):
    """Chosen claims on data sets that are there, in their places, with all that is still to come."""
    called = []
    monkeypatch.setattr(compare, "run_all", lambda runs, args, places, later: called.append((runs, places, later)))
    monkeypatch.setattr(C, "SCENES", 1)
    assert C.main(["--results", str(tmp_path / "c.jsonl"), "--work", str(tmp_path / "work"), "--shared", str(tmp_path),
                   "--only", "detreg-scratch", "--seeds", "1"]) == []
    ((runs, places, later),) = called
    assert [run.script for run in runs] == ["proposals", "dupr", "detreg", "finetune", "finetune"]
    assert places["{scenes}"] == str(tmp_path / "work" / "scenes") and (tmp_path / "work/scenes/0000.png").exists()
    assert len({run.key for run in later}) > 50


def test_unknown_name():
    with pytest.raises(C.UserError, match="no such claim; there are detreg-scratch"):
        C.main(["--only", "nothing"])
