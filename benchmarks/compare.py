"""Is A better than B? Arms over the same seeds: runs that are kept, a table paired by seed with 95 % t-intervals, bars
and curves.

  python benchmarks/compare.py --script detreg.py --data PHOTOS --arm "DETReg: --epochs 50" --arm "scratch: none" \\
      --then "finetune.py --data LABELLED --labels_percent 10" --number AP AP50 --seeds 5
  python benchmarks/compare.py --script finetune.py --data voc --arm "1e-4: --lr 1e-4" --arm "2e-4: --lr 2e-4"
  ... --list      # what is left to run        ... --report   # run nothing, write the table of what is there

An arm is "NAME: FLAGS" of --script; "NAME: other.py FLAGS" of another script; "none": no pretraining; behind a | stand
flags for the last --then. Every --then starts from the checkpoint before it (--init_from, or where it says {}). A run
is a call of a script's own main(argv) with a seed, in a process of its own, on a CPU with one thread. Arms share what
is equal: a pretraining, and the proposals of their images, which are searched once for all arms and seeds.

A finished run is a line of runs.jsonl in --out, found again by the hash of its script and flags (and of those of the
runs it starts from): stop it anywhere, and the same command goes on; with more seeds, arms or numbers, what is new is
run. Files that the flags name are known by their names: give a changed one another. compare.md has mean and standard
deviation of every arm, and how much better (above zero: larger) the first arm is than each other.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import measure  # noqa: F401  first: it finds the project's files

import numpy as np
import torch
from scipy import stats

import common
import curves
from common import UserError
from run import Count, Parser, Processes, Seed, cli, parse_config, print_rank0, progress, write_json

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = multiprocessing.get_context("spawn")


# ==== 1. Runs ====


class Run(NamedTuple):
    """A call of `script`.main. flags: its argv without --out, --device and --num_workers; a Run stands for the file
    (proposals: folder) it wrote and is joined to a "NAME=" before it; a "{name}" is one of the places (`execute`)."""
    script: str
    flags: tuple[Any, ...]

    @property
    def inputs(self) -> list[Run]:
        return [f for f in self.flags if isinstance(f, Run)]

    def named(self, text: Callable[[Run], str]) -> list[str]:
        return [text(f) if isinstance(f, Run) else str(f) for f in self.flags]

    @property
    @functools.lru_cache(None)
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.script, *self.named(lambda r: r.key)]).encode()).hexdigest()[:12]

    @property
    def command(self) -> str:
        return f"{self.script}.py {' '.join(self.named(lambda r: f'<{r.script} {r.key}>'))}    # {self.key}"


def folder(run: Run, work: Path) -> Path:
    return work / f"{run.script}-{run.key}"


def product(run: Run, work: Path) -> Path:
    """What the runs that start from this one read."""
    return folder(run, work) if run.script == "proposals" else folder(run, work) / "last.pt"


def execute(run: Run, work: Path, device: str, cores: int, places: dict[str, str], max_steps: int | None = None
            ) -> None:
    """result.json: the line of the file of results. In a process of its own. cores: for loader processes on a GPU."""
    out, started, kind = folder(run, work), time.time(), common.setup_distributed(device).type
    if kind == "cpu":
        torch.set_num_threads(1)  # so that it comes out the same on any number of cores
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").unlink(missing_ok=True)  # a checkpoint made again is whole when it is back
    argv = [places.get(f, f) for f in run.named(lambda r: str(product(r, work)))]
    argv = [name + value if name.endswith("=") else value
            for name, value in zip(["", *argv], argv) if not value.endswith("=")]
    workers = str(cores if kind != "cpu" else 0)
    argv += {"proposals": ["--out", str(out), "--workers", workers],
             "figures": ["--out", str(out / "figure.png"), "--device", device]}.get(
        run.script, ["--out", str(out), "--device", device, "--num_workers", workers,
                     *(["--max_steps", str(max_steps)] if max_steps else [])])
    with open(out / "printed.txt", "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            metrics = importlib.import_module(run.script).main(argv)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
    result = {"key": run.key, "script": run.script, "argv": run.named(lambda r: r.key),
              "metrics": metrics if isinstance(metrics, dict) else {},  # below: of training lines the loss alone
              "curve": [{k: line[k] for k in ("step", "loss")} if "loss" in line else line
                        for line in curves.read_log(out / "log.jsonl")],
              "seconds": round(time.time() - started, 1), "device": kind,
              "torch": torch.__version__, "commit": commit()}
    write_json(out / "result.json", result)


@functools.lru_cache(None)
def commit() -> str:
    with contextlib.suppress(OSError):
        return subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True,
                              text=True).stdout.strip()
    return ""


def read_lines(path: Path) -> list[dict]:
    """Those of a file of JSON lines that a kill has not cut in two."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def add_line(path: Path, line: dict) -> None:
    """One more, also behind a line that a kill has cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and not path.read_text().endswith("\n")
    with open(path, "a") as file:
        file.write("\n" * cut + json.dumps(line) + "\n")


def read_results(path: Path) -> dict[str, dict]:
    """Finished runs by their key."""
    return {result["key"]: result for result in read_lines(path)}


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Each run once, behind those it starts from."""
    found: dict[str, Run] = {}
    for run in runs:
        found |= {r.key: r for r in (*in_order(run.inputs), run) if r.key not in found}
    return list(found.values())


def left_to_do(runs: list[Run], results: dict[str, dict], work: Path) -> list[Run]:
    """Runs without a result, and those whose checkpoint is missing, or half made, for one of them."""
    todo: dict[str, Run] = {}

    def visit(run: Run, wanted: bool) -> None:
        there = product(run, work).exists() and (folder(run, work) / "result.json").exists()
        if run.key in todo or run.key in results and (there or not wanted):
            return
        for source in run.inputs:
            visit(source, True)
        todo.setdefault(run.key, run)
    for run in in_order(runs):
        visit(run, False)
    return list(todo.values())


def run_all(runs: list[Run], args: argparse.Namespace, places: dict[str, str] = {}, later: list[Run] | None = None
            ) -> None:
    """Run what is left, `--jobs` at a time; each result is a line of the file as soon as it is there. later: all that
    is ever to run, in which case a checkpoint that nothing of it needs any more is deleted."""
    work, results = args.work, read_results(args.results)
    todo = left_to_do(runs, results, work)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs = args.jobs or (os.cpu_count() if common.setup_distributed(args.device).type == "cpu" else 1)
    cores = max(1, os.cpu_count() // jobs)
    bar = progress(range(len(todo)), total=len(todo), desc="runs")
    waiting, running = list(todo), {}
    done = {run.key for run in in_order(todo)} - {run.key for run in todo}
    try:
        while waiting or running:
            for run in [r for r in waiting if all(source.key in done for source in r.inputs)][:jobs - len(running)]:
                waiting.remove(run)
                process = PROCESSES.Process(target=execute,
                                            args=(run, work, args.device, cores, places, args.max_steps))
                process.start()
                running[process.sentinel] = (process, run)
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, run = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise UserError(failure(run, work))
                done.add(run.key)
                bar.update()
                if run.key not in results:
                    results[run.key] = json.loads((folder(run, work) / "result.json").read_text())
                    add_line(args.results, results[run.key])
                if later is not None:
                    delete_unneeded([r for r in todo if r.key in done], work, [
                        *(r for r in todo if r.key not in done), *(r for r in later if r.key not in results)])
    finally:
        for process, _ in running.values():  # a run that is cut off saves, and continues from there
            process.terminate()
        for process, _ in running.values():
            process.join()


def delete_unneeded(runs: list[Run], work: Path, waiting: list[Run]) -> None:
    needed = {source.key for run in waiting for source in run.inputs}
    for run in runs:
        if run.key not in needed and run.script != "proposals":
            for name in ("last.pt", "previous.pt"):
                (folder(run, work) / name).unlink(missing_ok=True)


def failure(run: Run, work: Path) -> str:
    printed = folder(run, work) / "printed.txt"
    lines = printed.read_text(errors="replace").split("\n") if printed.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "it wrote nothing").strip()
    return f"{run.script} failed ({last[:300]}); {printed} has more. What is finished is kept; the same command goes on"


# ==== 2. Numbers ====


def numbers(result: dict, name: str) -> dict[int, float]:
    """{steps done: a value of the log}; the last one, which old results have in their metrics alone, is there once."""
    found, metrics = {line["step"] + 1: line[name] for line in result["curve"] if name in line}, result["metrics"]
    return found | ({metrics["steps"]: metrics[name]} if {"steps", name} <= metrics.keys() else {})


def value(result: dict, path: str) -> float:
    """A number of a finished run: a path in its metrics (AP, pretrained/AR10); "mean AP": over all evaluations; "first
    looking", "last loss": of the log, the last fifth."""
    kind, _, name = path.rpartition(" ")
    if kind in ("mean", "first", "last"):
        found = list(numbers(result, name).values())
        if not found:
            raise KeyError(path)
        return float(np.mean({"mean": found, "first": found[:1], "last": found[-max(1, len(found) // 5):]}[kind]))
    found = result["metrics"]
    for part in path.split("/"):
        found = found[part]
    return float(found)


def interval(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Mean of the paired differences a - b, and its 95 % t-interval."""
    d = np.subtract(a, b)
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.inf
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half)


def in_words(mean: float, low: float, high: float) -> str:
    return f"{mean:+.3f}" + f" [{low:+.3f}, {high:+.3f}]" * math.isfinite(low)


def cost(results: list[dict]) -> str:
    """What runs took, and with which versions."""
    return (f"{len(results)} runs, {sum(r['seconds'] for r in results) / 3600:.1f} hours when added up, several at a "
            f"time (torch {', '.join(sorted({r['torch'] for r in results}))}; "
            f"commits {', '.join(sorted({r['commit'] for r in results}))})")


def draw_curves(path: Path, panels: Iterable[tuple[str, str, dict[str, list[dict]]]], columns: int = 4) -> None:
    """Of (title, number, {arm: results}): the mean over the seeds against the step, if all seeds have it at two steps
    or more."""
    found = []
    for title, name, arms in panels:
        seeds = {arm: [numbers(result, name) for result in results] for arm, results in arms.items()}
        lines = {arm: [(step, float(np.mean([one[step] for one in of])))
                       for step in sorted(set.intersection(*map(set, of)))] for arm, of in seeds.items()}
        if all(len(points) > 1 for points in lines.values()):
            xs, ys = zip(*(point for points in lines.values() for point in points))
            low = min(ys) if name == "loss" else min(0.0, *ys)
            found.append(curves.panel(lines, title=title, x_label="step", x_range=(0, max(xs)), y_range=(low, max(ys))))
    if found:
        curves.draw_panels(path, found, columns)


# ==== 3. Arms ====


def proposals_of(script: str, flags: list[str]) -> tuple[Any, ...]:
    """The --proposal_store of a run that searches real images for boxes and names none; UserError, or argparse's end,
    if its script does not take the flags."""
    module = importlib.import_module(script)
    if script == "probe" or not hasattr(module, "Config"):
        return ()
    cfg = parse_config(module.Config, module.PRESETS, flags, script=script, description=module.__doc__,
                       recipe=module.recipe_of)
    if (getattr(cfg, "proposal_method", None) not in ("selective_search", "edge_boxes") or cfg.proposal_store
            or cfg.data == "synthetic"):  # scenes are drawn anew for every seed
        return ()
    grid = cfg.proposal_grid if cfg.proposal_method == "selective_search" else None
    wanted = {"data": cfg.data, "data_root": cfg.data_root, "method": cfg.proposal_method, "mode": cfg.proposal_mode,
              "grid": grid, "rank": cfg.proposal_rank, "max_boxes": cfg.max_boxes, "edge_model": cfg.edge_model,
              "seed": 0}
    return "--proposal_store", Run("proposals", tuple(text for k, v in wanted.items() if v is not None
                                                      for text in (f"--{k}", str(v))))


def call(script: str, flags: list[str], seed: int, start: Run | None = None) -> Run:
    """script with these flags, from the checkpoint of `start`."""
    flags = [*flags, "--seed", str(seed), *proposals_of(script, flags)]
    if start and "{}" not in flags:
        flags += ["--init_from", start]
    return Run(script, tuple(start or flag if flag == "{}" else flag for flag in flags))


def arm_of(text: str, args: argparse.Namespace) -> tuple[str, Callable[[int], Run]]:
    """("NAME", the last run of each seed) of "NAME: FLAGS | FLAGS of the last --then"."""
    name, colon, rest = text.partition(":")
    first, *more = (shlex.split(part) for part in rest.split("|"))
    then = [shlex.split(line) for line in args.then]
    starts = first != ["none"]
    if not name.strip() or not colon or len(more) > 1 or (more or not starts) and not then:
        raise UserError(f'--arm "{text}": give "NAME: FLAGS"; "none" as flags and flags behind a | need a --then')
    if starts:
        script = first.pop(0) if first and first[0].endswith(".py") else args.script
        then.insert(0, [script, *(["--data", args.data] if args.data else []), *first])
    then[-1] += more[0] if more else []
    for script, *_ in then:
        if not script.endswith(".py") or not (ROOT / script).is_file():
            raise UserError(f"{script}: no script of this project; detreg.py, finetune.py, ... are")

    def run_of(seed: int) -> Run:
        run = None
        for script, *flags in then:
            run = call(script.removesuffix(".py"), flags, seed, run)
        return run
    return name.strip(), run_of


# ==== 4. Main ====


def table(values: dict[str, dict[str, list[float]]]) -> list[str]:
    """Markdown of {number: {arm: its values, one per seed}}; the first arm is set against the others."""
    first = next(iter(next(iter(values.values()))))
    lines = [f"| number | arm | mean | deviation | {first} better by [95 %] | seed by seed |", "|" + "---|" * 6]
    for number, arms in values.items():
        for arm, found in arms.items():
            deviation = f"{np.std(found, ddof=1):.3f}" if len(found) > 1 else ""
            better = "" if arm == first else in_words(*interval(arms[first], found))
            lines.append(f"| {number} | {arm} | {np.mean(found):.3f} | {deviation} | {better} | "
                         + ", ".join(f"{v:.4f}" for v in found) + " |")
    return lines


def add_flags(parser: Parser, seeds: str) -> None:
    """What claims.py has too."""
    parser.add_argument("--seeds", type=Count, help=f"that many, of each arm; default {seeds}")
    parser.add_argument("--first_seed", type=Seed, default=0, help="what is tuned is tuned on others, from 100 say")
    parser.add_argument("--device", default="auto", help="as in the scripts")
    parser.add_argument("--max_steps", type=Count, help="of every run, to try whether it works: kept apart from what "
                        "counts, in a folder trial")
    parser.add_argument("--jobs", type=Processes, help="runs at the same time; default: one per core, or one on a GPU")
    parser.add_argument("--list", action="store_true", help="what there is and what is left to run")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report")


def separate_trial(args: argparse.Namespace) -> None:
    """Of a trial (--max_steps): its own runs and results."""
    if args.max_steps:
        args.work = args.work / "trial"
        args.results = args.work / args.results.name


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, list[Run]]]:
    """(flags, {arm: the last run of each seed}); every command line has been through its script's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("--script", default="detreg.py", help="what an arm runs first (default: detreg.py)")
    parser.add_argument("--data", help="its --data, for all arms")
    parser.add_argument("--arm", action="append", required=True, metavar='"NAME: FLAGS"', help="see above; several")
    parser.add_argument("--then", action="append", default=[], metavar='"SCRIPT FLAGS"',
                        help="what every arm runs next, from the checkpoint it has; several")
    parser.add_argument("--number", nargs="+", default=["AP"], help='of the last run: AP, AP50, "mean AP", '
                        '"last loss", pretrained/AR10, ... (default: AP)')
    parser.add_argument("--out", type=Path, default=Path("out/compare"),
                        help="runs.jsonl, the runs, compare.md and its pictures (default: out/compare)")
    add_flags(parser, "3")
    args = parser.parse_args(argv)
    args.work, args.results = args.out.resolve() / "runs", args.out / "runs.jsonl"
    separate_trial(args)
    arms = dict(arm_of(text, args) for text in args.arm)
    if len(arms) < len(args.arm):
        raise UserError("--arm: two have the same name")
    seeds = range(args.first_seed, args.first_seed + (args.seeds or 3))
    return args, {name: [run_of(seed) for seed in seeds] for name, run_of in arms.items()}


def main(argv: list[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """{number: {arm: its values, one per seed}}."""
    args, arms = parse(argv)
    runs = in_order(run for of_arm in arms.values() for run in of_arm)
    if args.list:
        results = read_results(args.results)
        for run in runs:
            print_rank0(f"{'done ' if run.key in results else 'to do'} {run.command}")
        return {}
    if not args.report:
        run_all(runs, args)
    results = read_results(args.results)
    rows = [row for row in zip(*arms.values()) if all(run.key in results for run in row)]  # seeds that all arms have
    if not rows:
        print_rank0("no seed has all arms yet")
        return {}
    found = {name: [results[run.key] for run in column] for name, column in zip(arms, zip(*rows))}
    try:
        values = {n: {arm: [value(r, n) for r in of_arm] for arm, of_arm in found.items()} for n in args.number}
    except (KeyError, TypeError) as error:
        there = ", ".join(sorted(next(iter(found.values()))[0]["metrics"]))
        raise UserError(f"--number: {error} is no number of these runs; there is {there}") from None
    spent = [results[run.key] for run in runs if run.key in results]
    lines = [f"# {' / '.join(arms)}", "", *table(values), "", "![bars](compare-bars.png)", "",
             "![curves](compare-curves.png)", "", f"{cost(spent)}:", "", "```", *(run.command for run in runs), "```"]
    (args.out / "compare.md").write_text("\n".join([*lines, ""]))
    curves.draw_panels(args.out / "compare-bars.png", [curves.bars(v, title=n) for n, v in values.items()])
    names = dict.fromkeys([*(n.split()[-1] for n in args.number), "loss"])
    draw_curves(args.out / "compare-curves.png", [(n, n, found) for n in names], columns=2)
    print_rank0("\n".join([*table(values), f"wrote {args.out}/compare.md, compare-bars.png, compare-curves.png"]))
    return values


if __name__ == "__main__":
    cli(main)
