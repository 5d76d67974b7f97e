"""The evaluations of a fine-tuning run: best.pt, its thresholds, early stop, moving average, and that a run that was
interrupted around an evaluation is the unbroken one."""
import collections
import functools
import itertools
import json

import pytest
import torch
import torchvision
from conftest import flags, plain
from test_survive import RUNS, Narrow, load, same

import common
import finetune
import run

STARTS = [{"detector": "deformable_detr"}, {"detector": "faster_rcnn_fpn", "precise_bn": 2}]
VALUES = {"synthetic_images": 4, "batch_size": 2, "epochs": 4, "eval_every": 1, "save_every": 3,
          "max_steps": 1000}  # 8 steps
HALVES = {"synthetic_images": 8, "val_percent": 50}  # four to train on, four to choose on


@pytest.fixture(autouse=True, scope="module")
def narrow(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet18", lambda weights, **kwargs: Narrow(**kwargs))
        patch.setattr(run.Run, "draw", lambda self: None)  # curves.png: test_curves.py
        yield


def train(out, **values):
    """A run of finetune.py on four scenes, two steps an epoch, an evaluation after each: -> its metrics."""
    method = "rcnn" if values.get("detector", "").startswith("faster") else "finetune"
    return finetune.main(flags({**RUNS[method], **VALUES, "out": out, **values}))


def evaluations(out):
    """{steps done: AP} of log.jsonl, each in one line."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = [(line["step"] + 1, line["AP"]) for line in lines if "AP" in line]
    assert len(dict(found)) == len(found)
    return dict(found)


def weights(model):
    return collections.OrderedDict((k, v.clone()) for k, v in model.state_dict().items())


@pytest.fixture
def prescribed(monkeypatch):
    """prescribed(APs): the next evaluations find these APs, and as threshold their number, from 0 up. -> a list with
    the weights and the labelled set of each."""
    evaluate, calls = finetune.evaluate, []

    def prescribe(*aps):
        calls.clear()
        left = iter(aps)

        def next_one(cfg, model, label_map, labelled, device):
            found = evaluate(cfg, model, label_map, labelled, device)
            thresholds = {"all": {"threshold": len(calls) / 100, "precision": 0.5, "recall": 0.5, "f1": 0.5},
                          "per_class": {}}
            calls.append((weights(model), labelled))
            return found._replace(metrics=found.metrics | {"AP": next(left)}, thresholds=thresholds)

        monkeypatch.setattr(finetune, "evaluate", next_one)
        return calls

    return prescribe


def threshold(state):
    return state["thresholds"]["all"]["threshold"]


# ==== The best =====================================================================================================

@pytest.mark.parametrize("values", STARTS)
def test_best_is_the_first_highest(prescribed, tmp_path, values):
    calls = prescribed(0.1, 0.3, 0.2, 0.3)
    metrics = train(tmp_path, **values)
    best, last = load(tmp_path, "best.pt"), load(tmp_path)
    assert evaluations(tmp_path) == {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.3} and len(calls) == 4
    assert (best["step"], threshold(best)) == (4, 0.01) and (last["step"], threshold(last)) == (8, 0.03)
    same(best["model"], calls[1][0])
    same(last["model"], calls[3][0])
    assert best["categories"] == last["categories"] and best["optimizer"] is None and best["config"] == last["config"]
    assert any(not torch.equal(v, last["model"][k]) for k, v in best["model"].items())
    assert (metrics["AP"], metrics["val_AP"], metrics["best_step"]) == (0.3, 0.3, 4)  # of the last weights
    assert threshold(metrics) == 0.03 and "stopped_early" not in metrics


def test_numbers_of_the_best_on_the_test_set(prescribed, tmp_path):
    """--select best: what was chosen on the validation set, on the test set, which had no part in it."""
    calls = prescribed(0.1, 0.4, 0.2, 0.3, 0.25)
    metrics = train(tmp_path, select="best", **HALVES)
    assert [len(labelled) for _, labelled in calls] == [4, 4, 4, 4, 2] and metrics["steps"] == 8
    assert len({id(labelled) for _, labelled in calls[:4]}) == 1 and calls[4][1] is not calls[0][1]
    same(calls[4][0], load(tmp_path, "best.pt")["model"])
    assert (metrics["AP"], metrics["val_AP"], metrics["best_step"], threshold(metrics)) == (0.25, 0.4, 4, 0.01)
    assert evaluations(tmp_path) == {2: 0.1, 4: 0.4, 6: 0.2, 8: 0.3}  # of the validation set alone
    last = load(tmp_path)
    same(last["model"], calls[3][0])  # the one to continue from
    assert (last["step"], threshold(last)) == (8, 0.03)
    assert json.loads((tmp_path / "metrics.json").read_text()) == plain(metrics)
    assert (tmp_path / "predictions.png").exists() and (tmp_path / "pr.png").exists()


def test_last_weights_on_the_test_set_with_thresholds_of_the_validation_set(prescribed, tmp_path):
    calls = prescribed(0.4, 0.2, 0.1)
    metrics = train(tmp_path, **HALVES, epochs=2)
    assert calls[1][1] is calls[0][1] is not calls[2][1]
    same(calls[1][0], calls[2][0])
    assert (metrics["AP"], metrics["val_AP"], metrics["best_step"], threshold(metrics)) == (0.1, 0.2, 2, 0.01)


def test_equal_values_stay_equal(prescribed, tmp_path):
    """log.jsonl has six digits of them: a continued run chooses as the unbroken one."""
    prescribed(1 / 3, 1 / 3)
    train(tmp_path, max_steps=2)
    train(tmp_path, max_steps=4)
    assert load(tmp_path, "best.pt")["step"] == 2 and evaluations(tmp_path) == {2: 0.333333, 4: 0.333333}


def test_nothing_to_find(prescribed, tmp_path):
    """AP is nan; the evaluation has been made all the same."""
    calls = prescribed(float("nan"), float("nan"))
    train(tmp_path, max_steps=2)
    assert load(tmp_path, "best.pt")["step"] == 2
    metrics = train(tmp_path, max_steps=4)
    assert len(calls) == 2 and load(tmp_path, "best.pt")["step"] == 2
    assert metrics["AP"] != metrics["AP"] and metrics["val_AP"] == 0


def test_best_of_steps_that_are_taken_again(prescribed, tmp_path):
    """The newest checkpoint is lost, and best.pt is of its step: of the steps before it nothing is left to choose."""
    prescribed(0.5, 0.9)
    train(tmp_path, max_steps=3, eval_every=0, ema=0.5)
    before = (tmp_path / "last.pt").read_bytes()
    train(tmp_path, max_steps=4, ema=0.5)
    assert load(tmp_path, "best.pt")["step"] == 4
    (tmp_path / "last.pt").write_bytes(before)
    calls = prescribed(0.2, 0.3, 0.25)  # otherwise than before, as on a GPU
    metrics = train(tmp_path, ema=0.5)
    best = load(tmp_path, "best.pt")
    assert best["step"] == metrics["best_step"] == 6
    same(best["model"], calls[1][0])
    assert evaluations(tmp_path) == {3: 0.5, 4: 0.2, 6: 0.3, 8: 0.25}


def test_best_goes_on_when_evaluations_do_not(prescribed, tmp_path):
    prescribed(0.1, 0.2)
    train(tmp_path, max_steps=2)
    train(tmp_path, eval_every=0)
    assert load(tmp_path, "best.pt")["step"] == 8


def test_a_longer_run_goes_on(prescribed, tmp_path, capsys):
    prescribed(0.4, 0.2, 0.3)
    metrics = train(tmp_path, epochs=1)
    assert metrics["steps"] == 2
    train(tmp_path, epochs=1)
    assert "this run is finished (2 steps)" in capsys.readouterr().out
    metrics = train(tmp_path, epochs=3)
    printed = capsys.readouterr().out
    assert "at step 2, which becomes 6 steps long (epochs: 1 -> 3" in printed and "steps 2..6" in printed
    assert (metrics["steps"], metrics["AP"], metrics["best_step"], metrics["val_AP"]) == (6, 0.3, 2, 0.3)
    assert load(tmp_path, "best.pt")["step"] == 2 and load(tmp_path)["step"] == 6
    assert evaluations(tmp_path) == {2: 0.4, 4: 0.2, 6: 0.3}


# ==== Early stop ===================================================================================================

def test_patience(prescribed, tmp_path, capsys):
    one, two = tmp_path / "whole", tmp_path / "parts"
    prescribed(0.3, 0.2, 0.1, 0.4)
    whole = train(one, patience=3)
    assert (whole["steps"], whole["best_step"]) == (8, 8) and "stopped_early" not in whole
    prescribed(0.3, 0.2, 0.1, 0.1)  # the last evaluation is made twice, and logged once
    metrics = train(two, patience=2)
    assert (metrics["steps"], metrics["stopped_early"], metrics["best_step"], metrics["val_AP"]) == (6, 2, 2, 0.1)
    assert load(two)["step"] == 6 and load(two, "best.pt")["step"] == 2
    assert evaluations(two) == {2: 0.3, 4: 0.2, 6: 0.1}
    capsys.readouterr()
    assert plain(train(two, patience=2)) == plain(metrics)
    assert "this run is finished (6 steps)" in capsys.readouterr().out
    calls = prescribed(0.4)
    again = train(two, patience=3)
    assert {**plain(again), "thresholds": plain(whole)["thresholds"]} == plain(whole) and len(calls) == 1
    assert evaluations(one) == evaluations(two) == {2: 0.3, 4: 0.2, 6: 0.1, 8: 0.4}
    same(load(one)["model"], load(two)["model"])
    same(load(one, "best.pt")["model"], load(two, "best.pt")["model"])


# ==== Interrupted, and without =====================================================================================

@functools.cache
def whole_run(tmp, start, ema):
    return tmp / f"{start}{ema}", train(tmp / f"{start}{ema}", **STARTS[start], ema=ema)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(start, ema) -> (folder, metrics) of the unbroken run."""
    return functools.partial(whole_run, tmp_path_factory.mktemp("whole"))


class Interrupted(Exception):
    pass


def interrupted(monkeypatch, owner, name, when, after):
    """The call number `when` of a function fails, before it begins or after it has ended."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        number = next(calls)
        if number == when and not after:
            raise Interrupted
        result = function(*args, **kwargs)
        if number == when:
            raise Interrupted
        return result

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(("start", "ema"), [(0, 0.9), (1, 0.0), (1, 0.9)])
def test_interrupted_around_its_evaluations(whole, monkeypatch, tmp_path, start, ema):
    """Before one, whose checkpoint is written; with best.pt written and its line not; after one; after the last."""
    one, metrics = whole(start, ema)
    values = {**STARTS[start], "ema": ema}
    for owner, name, when, after, step in (
            (finetune, "evaluate", 1, False, 2), (run.Run, "evaluated", 1, False, 2),
            (run.Run, "evaluated", 2, True, 4), (finetune, "write_results", 1, False, 8)):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupted(patch, owner, name, when, after)
            train(tmp_path, **values)
        assert load(tmp_path)["step"] == step and not (tmp_path / "metrics.json").exists()
    again = train(tmp_path, **values)
    assert plain(again) == plain(metrics)
    assert evaluations(one) == evaluations(tmp_path) and list(evaluations(one)) == [2, 4, 6, 8]
    for name in ("last.pt", "best.pt"):
        states = [load(folder, name) for folder in (one, tmp_path)]
        for state in states:
            del state["config"]["out"]
            for group in (state["optimizer"] or {}).get("param_groups", ()):
                del group["lr"]  # it is that of the flags and the step, never the file's
        same(*states)
    assert ("average" in load(one)) == bool(ema)
    for name in ("metrics.json", "detections.json"):
        assert (one / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.parametrize(("start", "ema"), [(0, 0.0), (0, 0.9), (1, 0.0), (1, 0.9)])
def test_evaluations_change_nothing_in_training(whole, tmp_path, start, ema):
    """Dropout, sampled regions, BatchNorm's statistics: as if there had been none. best.pt: where there is a choice."""
    metrics = train(tmp_path, **STARTS[start], ema=ema, eval_every=0)
    one, two = load(whole(start, ema)[0]), load(tmp_path)
    for part in ("model", "optimizer", "thresholds", *(["average"] if ema else [])):
        same(one[part], two[part], part)
    assert list(evaluations(tmp_path)) == [8] and (tmp_path / "best.pt").exists() == bool(ema)
    if ema:
        best = load(tmp_path, "best.pt")
        same(best["model"], two["average"])
        assert best["step"] == 8 == metrics["best_step"]
    else:
        assert "best_step" not in metrics
    if start == 1:  # PreciseBN: what was evaluated is what is saved
        assert two["average" if ema else "model"]["backbone.body.bn1.num_batches_tracked"] == 2


# ==== Moving average ===============================================================================================

@pytest.mark.parametrize("values", [{"backbone_norm": "bn", "lr": 0.01}, {**STARTS[1], "precise_bn": 0}])
def test_average_by_hand(monkeypatch, tmp_path, values):
    update, evaluate, moments, seen = finetune.update_average, finetune.evaluate, [], []

    def record(average, model, momentum):
        if not moments:
            seen.append({k: v.double() for k, v in weights(average).items()})  # the weights at the start
        update(average, model, momentum)
        moments.append(momentum)
        seen.append({k: v.double() for k, v in weights(model).items()})

    monkeypatch.setattr(finetune, "update_average", record)
    evaluated = []
    monkeypatch.setattr(finetune, "evaluate",
                        lambda cfg, model, *rest: evaluated.append(weights(model)) or evaluate(cfg, model, *rest))
    train(tmp_path, **values, ema=0.2, max_steps=3, eval_every=0)
    assert moments == pytest.approx([1 / 10, 2 / 11, 0.2])  # min(ema, (1 + step) / (10 + step))
    last, best = load(tmp_path), load(tmp_path, "best.pt")
    same(best["model"], last["average"])
    same(best["model"], evaluated[0])
    average = seen[0]
    for momentum, state in zip(moments, seen[1:]):
        average = {k: momentum * average[k] + (1 - momentum) * v for k, v in state.items()}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    statistics = [name for name in average if name.rpartition(".")[2] in buffers]
    assert statistics
    for name, value in last["average"].items():
        if name in statistics:
            assert torch.equal(value, last["model"][name]), name
        else:
            torch.testing.assert_close(value.double(), average[name], rtol=1e-4, atol=1e-6)
    name = next(name for name in average if name.endswith("layer1.0.conv1.weight"))
    assert not torch.equal(last["average"][name], last["model"][name])


# ==== Two processes ================================================================================================

def worker():
    """What one of two processes does (conftest.two_processes), in a folder that both share."""
    torchvision.models.resnet18 = lambda weights, **kwargs: Narrow(**kwargs)
    evaluate, aps, validations = finetune.evaluate, iter((0.3, 0.2, 0.2, 0.25)), []

    def next_one(*args):
        found = evaluate(*args)
        assert (found.metrics == {}) == (common.rank() != 0)  # only rank 0 knows
        return found._replace(metrics={**found.metrics, "AP": next(aps)}) if common.rank() == 0 else found

    class Recorded(finetune.Validation):
        def __init__(self, *args):
            super().__init__(*args)
            validations.append(self)

    finetune.evaluate, before = next_one, finetune.Validation
    finetune.Validation = Recorded
    try:
        metrics = train("validation", patience=1, select="best", detector="deformable_detr")
    finally:
        finetune.evaluate, finetune.Validation = evaluate, before
    return {"found": validations[0].found, "done": validations[0].job.done, "metrics": plain(metrics)}


def test_two_processes_decide_alike(two_processes):
    first, second = two_processes["test_validation"]
    assert first["found"] == second["found"] == {2: 0.3, 4: 0.2} and first["done"] == second["done"] == 4
    assert (first["metrics"]["stopped_early"], first["metrics"]["best_step"], first["metrics"]["AP"]) == (1, 2, 0.25)
    assert first["metrics"]["val_AP"] == second["metrics"]["val_AP"] == 0.3
