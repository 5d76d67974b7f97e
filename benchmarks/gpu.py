"""Everything that a GPU must show, in one command of at most 8 minutes.

    python benchmarks/gpu.py                             # the parts below, those that this commit has not had
    python benchmarks/gpu.py --only step memory --again  # parts whose name begins so, once more
    python benchmarks/gpu.py --report                    # what there is, into docs/speed.md and README.md; runs nothing
    python benchmarks/gpu.py --device cpu --tiny         # does it run? without a GPU
    python benchmarks/gpu.py --pack .gpu                 # data and weights to take to another machine, in one folder

Parts stand in order of worth; each is one of the project's commands in a process of its own, with a limit of its own.
A line is added to gpu.jsonl as soon as a part ends, well or not; what it printed is in gpu.log, finished runs of
claims.py in gpu-claims.jsonl (add its lines to claims.jsonl). So a run that is cut off counts as far as it came, and
the same command goes on.

On a machine without network but with Python 3.12, PyTorch and the packages of requirements.txt except pycocotools
(the device tool of the sessions here): `--pack .gpu`, then carry .gpu, timeout_s 560, with the commit's name:

    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .gpu/pycocotools*.whl &&
    export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 && { cp benchmarks/gpu*.jsonl $OUT/; true; } &&
    python3 benchmarks/gpu.py --data .gpu --results $OUT/gpu.jsonl --commit COMMIT --minutes 8

What comes back replaces benchmarks/gpu*.jsonl; the same call again then goes on. Elsewhere: pip install -r
requirements.txt transformers, and the first command.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import claims  # first: it finds the project's files
import compare
from compare import ROOT, add_line, read_lines

import torch
from PIL import Image

from common import UserError
from run import Parser, Positive, cli, print_rank0

HERE = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "data"
WORK = Path(tempfile.gettempdir()) / "gpu-data"  # on every machine: a store of proposals knows its images' paths
EMPTY = "No GPU has been had: nothing was measured on one."
MARKS = "<!-- gpu -->", "<!-- /gpu -->"  # around what --report writes
METHODS = {"detreg": 24, "updetr": 32, "siamese_detr": 32, "soco": 128, "dupr": 32}  # images of a step: of one GPU of 8
DETECTORS = ("deformable_detr", "conditional_detr", "detr", "faster_rcnn_fpn", "retinanet_fpn", "mask_rcnn_fpn",
             "fcos_fpn")
WHEELS = ("pycocotools", "deformops")  # what the machine of the device tool has not


# ==== 1. Parts ====


class Part(NamedTuple):
    name: str
    command: tuple[str, ...]  # after "python"
    limit: int  # seconds
    path: str = ""  # a folder to import from


def parts_of(args: argparse.Namespace) -> list[Part]:
    on = ("--device", args.device)
    if args.tiny:
        return [Part("tests", ("-m", "pytest", "-m", "cuda", "tests/test_cuda.py"), 120),
                Part("step dupr", bench("train_step", "--method dupr --preset demo --rounds 1 --batch_size 2 "
                                        "--data synthetic --synthetic_size 64 --ways ours bf16", *on), 120),
                Part("step detr off", bench("train_step", "--method detr --rounds 1 --size 64 96 --batch_size 1", *on),
                     120),
                Part("attention", bench("attention", "--rounds 1 --sizes 64x96", *on), 120),
                Part("memory", bench("memory", "--methods updetr --ways bf16", *on), 120),
                Part("loader", bench("loader", "--methods dupr --rounds 1 --per_round 2 --list 0"), 120),
                Part("claims", bench("claims", "--scale gpu --only updetr-scratch --seeds 1 --list"), 120)]
    images = args.data / "imagenet_sample"
    pictures = ("--data", *((str(images),) if images.is_dir() else (
        "synthetic", "--synthetic_size", "448", "--synthetic_images", str(max(METHODS.values())))))
    sample = ("--images", str(images)) if images.is_dir() else ()
    here = args.results.resolve().parent
    fused = [("deformops", str(args.data / "deformops"))] if (args.data / "deformops").is_dir() else []
    methods = [Part(f"step {name}", bench(
        "train_step", f"--method {name} --rounds 5 --batch_size {batch} --num_workers 8", "--ways", "ours", "plain",
        "bf16", *(["compile"] if name in claims.DETR_FAMILY else []), *on, *pictures,
        *([] if name in ("updetr", "dupr") else ["--proposal_method", "random"])), 75)
        for name, batch in METHODS.items()]
    detectors = [Part(f"step {name} {amp}", bench(
        "train_step", f"--method {name} --rounds 5 --batch_size 4 --amp {amp} --size 800 1333", *on), 45)
        for name in DETECTORS for amp in ("bf16", "off")]
    attention = [Part("attention", bench("attention", "--rounds 5 --batch_sizes 2 16 --compile", *on), 60),
                 *(Part(f"attention {name}", bench("attention", "--rounds 5 --batch_sizes 2 16", *on), 45, path)
                   for name, path in fused)]
    memory = [Part(f"memory {way}", bench("memory", "--check 24 --ways", way, *on, "--methods", *METHODS,
                                          *DETECTORS[:4]), 90) for way in ("bf16", "bf16, checkpointed")]
    return [Part("tests", ("-m", "pytest", "-m", "cuda", "--tb=short", "-rf", "tests/test_cuda.py",
                           "tests/test_common.py", "tests/test_memory.py"), 150),
            *methods, *detectors[:6], *memory, *attention,
            Part("loader", bench("loader", "--rounds 3 --per_round 12 --list 0 --random_boxes", *sample), 60),
            *detectors[6:],
            *(Part(f"claims {name}", bench(  # detreg's probe searches: it needs OpenCV's contrib modules
                "claims", f"--scale gpu --jobs 4 --seeds 2 --only {name}", *on, "--shared", str(args.data), "--work",
                str(WORK / "claims"), "--results", str(here / "gpu-claims.jsonl")), 1800)
              for name in ("updetr", "siamese", "detreg"))]


def bench(script: str, flags: str, *more: str) -> tuple[str, ...]:
    return f"benchmarks/{script}.py", *flags.split(), *more


def run_part(part: Part, seconds: float, log: Path) -> dict[str, Any]:
    """Its line. One that takes longer is told to end (SIGTERM), and 10 seconds later ended with all it has started."""
    start, paths = time.time(), [p for p in (part.path, os.environ.get("PYTHONPATH")) if p]
    with open(log, "a+", errors="replace") as file:
        file.write(f"\n==== {part.name}: {' '.join(part.command)}\n")
        file.flush()
        place = file.tell()
        process = subprocess.Popen([sys.executable, *part.command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        try:
            rc = process.wait(seconds)
        except subprocess.TimeoutExpired:
            rc = 124
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        file.seek(place)
        printed = [line for line in file.read().splitlines() if line.strip()]
    numbers = [found for line in printed if line.startswith("{") and "rows" in (found := parsed(line))]
    return {"part": part.name, "command": " ".join(("python", *part.command)),
            "seconds": round(time.time() - start, 1), "rc": rc, "numbers": numbers,
            "last": [] if numbers and rc == 0 else [line[:300] for line in printed[-20:]]}


def parsed(line: str) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # cut off
        return {}


def run_all(parts: list[Part], args: argparse.Namespace) -> list[dict]:
    """Lines of the parts that there was time for. Done is what ended well for this commit on this device."""
    end = time.time() + 60 * args.minutes
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    facts = {"device": device, "torch": torch.__version__, "commit": args.commit or compare.commit()}
    done = set() if args.again else {line["part"] for line in read_lines(args.results) if line["rc"] == 0
                                     and all(line[k] == v for k, v in facts.items())}
    args.results.parent.mkdir(parents=True, exist_ok=True)  # the log is there too
    lines = []
    for part in parts:
        left = end - time.time() - 10  # what ending it may take
        if part.name in done or left < 5:
            print_rank0(f"{part.name:24} {'done before' if part.name in done else 'no time left'}")
            continue
        line = run_part(part, min(part.limit, left), args.results.with_suffix(".log"))
        lines.append({**line, **facts, "date": datetime.date.today().isoformat()})
        add_line(args.results, lines[-1])
        word = {0: "ok", 124: "out of time"}.get(line["rc"], f"exit code {line['rc']}")
        print_rank0(f"{part.name:24} {line['seconds']:6.1f} s  {word}  {line['last'][-1] if line['last'] else ''}")
    return lines


# ==== 2. What travels ====


def pack(folder: Path, shared: Path) -> None:
    """data.tar.xz: VOC's photographs (as JPEG of quality 70, 32 MiB instead of 62), ResNet-18, some pictures of
    imagenet_sample, the proposals of claims.py (OpenCV there may not find them); beside it WHEELS."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(WORK, ignore_errors=True)
    for source in (p for name in ("voc07", "weights") for p in (shared / name).rglob("*") if p.is_file()):
        path = WORK / source.relative_to(shared)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            Image.open(source).convert("RGB").save(path, quality=70, optimize=True)
        else:
            shutil.copyfile(source, path)
    (WORK / "imagenet_sample").mkdir()
    for source in sorted((shared / "imagenet_sample").rglob("*.JPEG"))[::3][:max(METHODS.values())]:
        shutil.copyfile(source, WORK / "imagenet_sample" / source.name)
    flags = argparse.Namespace(work=WORK / "claims", shared=WORK)
    flags.work.mkdir()
    claims.prepare(flags, [claims.LARGE])
    store = next(r for r in claims.runs_of(claims.CLAIMS[0], claims.LARGE, range(1)) if r.script == "proposals")
    compare.execute(store, flags.work, "cpu", 1, claims.places_of(flags))
    result = json.loads((compare.folder(store, flags.work) / "result.json").read_text())
    (flags.work / "results.jsonl").write_text(json.dumps(result) + "\n")
    with tarfile.open(folder / "data.tar.xz", "w:xz", preset=3) as tar:
        for name in ("voc07", "weights", "imagenet_sample", "claims"):
            tar.add(WORK / name, name)
    platforms = [f"--platform=manylinux{v}_x86_64" for v in ("_2_28", "_2_27", "_2_17", "2014")]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                    "--python-version=3.12", *platforms, "-d", str(folder), *WHEELS], check=True)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    print_rank0(f"{folder}: {sum(sizes.values()) / 1e6:.1f} MB in {', '.join(sizes)}")


def unpack(folder: Path, here: Path) -> Path:
    """Where the data is: WORK, if this is what `pack` has packed, whose proposals are then a finished run."""
    if not (folder / "data.tar.xz").exists():
        return folder
    if not (WORK / "voc07").is_dir():
        with tarfile.open(folder / "data.tar.xz") as tar:
            tar.extractall(WORK, filter="data")
        for wheel in folder.glob("deformops*.whl"):
            zipfile.ZipFile(wheel).extractall(WORK / "deformops")
    results = here / "gpu-claims.jsonl"
    for line in read_lines(WORK / "claims" / "results.jsonl"):
        if line["key"] not in compare.read_results(results):
            add_line(results, line)
    return WORK


# ==== 3. Report ====


def table(numbers: dict[str, Any], skip: tuple[str, ...] = ()) -> list[str]:
    """Markdown of what a benchmark has reported."""
    kept = [i for i, name in enumerate(numbers["columns"]) if name not in skip]
    rows = [["" if v is None else f"{v:.0f}" if isinstance(v, float) and v >= 1000 else f"{v:.3g}"
             if isinstance(v, float) else str(v) for v in (row[i] for i in kept)] for row in numbers["rows"]]
    return ["", *(f"| {' | '.join(row)} |" for row in ([numbers["columns"][i] for i in kept], ["---"] * len(kept),
                                                       *rows))]


def cores_needed(latest: dict[str, dict]) -> list[str]:
    """Of each method: images/s of its fastest step, of a loader's core, and how many cores that takes."""
    feeds = {row[0]: row[2] for line in latest.values() if line["part"] == "loader" for n in line["numbers"]
             for row in n["rows"]}
    rows = [[name, max(row[2] for row in line["numbers"][-1]["rows"]), feeds[name]] for name in METHODS
            if name in feeds and (line := latest.get(f"step {name}")) and len(line["numbers"]) > 1]
    return table({"columns": ["method", "images/s of the fastest step", "images/s of a loader's core", "cores needed",
                              "16 are enough"],
                  "rows": [[*row, row[1] / row[2], "yes" if row[1] <= 16 * row[2] else "no"] for row in rows]}
                 ) if rows else []


def report_of(lines: list[dict]) -> tuple[str, str]:
    """(the section of docs/speed.md, the sentence of the README), of the latest line of each part on a GPU."""
    latest = {line["part"]: line for line in lines if line["device"] != "cpu"}
    if not latest:
        return f"**{EMPTY}** `python benchmarks/gpu.py` prepares all of it: 8 minutes on one.", EMPTY
    passed = [name for name, line in latest.items() if line["rc"] == 0]
    failed = [f"{name} ({'out of time' if line['rc'] == 124 else line['last'][-1] if line['last'] else line['rc']})"
              for name, line in latest.items() if line["rc"]]
    names = [" and ".join(dict.fromkeys(line[k] for line in latest.values())) for k in ("device", "torch", "commit")]
    where = f"{names[0]} (torch {names[1]}, commit {names[2]})"
    text = [f"**On a GPU**: {where}, `python benchmarks/gpu.py`. Ended well: {', '.join(passed) or 'nothing'}."
            + f" Did not: {'; '.join(failed)}." * bool(failed)]
    if tests := latest.get("tests"):
        text += ["", f"Tests on it: {tests['last'][-1].strip('= ') if tests['last'] else 'no result'}."]
    for name, line in latest.items():
        for numbers in line["numbers"][-1:]:
            sizes = ", ".join(f"{k} {numbers[k]}" for k in ("batch_size", "images", "size", "amp") if k in numbers)
            text += ["", f"`{line['command']}`" + f" ({sizes})" * bool(sizes), *table(
                numbers, ("of the released step",))]
    if cores := cores_needed(latest):
        text += ["", "Can the loader feed it?", *cores]
    ok = "its tests pass" if tests and tests["rc"] == 0 else "its tests do not all pass" if tests else "untested"
    return "\n".join(text), f"Measured on a GPU too ({names[0]}; {ok} there)."


def write_report(lines: list[dict], root: Path = ROOT) -> None:
    section, sentence = report_of(lines)
    for path, text in ((root / "docs" / "speed.md", f"\n{section}\n"), (root / "README.md", sentence)):
        before, rest = path.read_text().split(MARKS[0])
        path.write_text(f"{before}{MARKS[0]}{text}{MARKS[1]}{rest.split(MARKS[1])[1]}")
    print_rank0(f"docs/speed.md, README.md: {sentence}")


# ==== 4. Main ====


def main(argv: list[str] | None = None) -> list[dict]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="all parts with tiny sizes")
    parser.add_argument("--minutes", type=Positive, default=8.0, help="of all parts together")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts whose name begins with one of these")
    parser.add_argument("--again", action="store_true", help="what this commit has had, too")
    parser.add_argument("--commit", help="its name, where there is no git")
    parser.add_argument("--results", type=Path, default=HERE / "gpu.jsonl")
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of --pack, or of voc07, weights, "
                        "imagenet_sample; parts that need what is not there do without")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="write it from the folder of --data, run nothing")
    parser.add_argument("--report", action="store_true", help="run nothing, write what there is")
    args = parser.parse_args(argv)
    if args.pack:
        pack(args.pack, args.data)
        return []
    if args.report:
        write_report(read_lines(args.results))
        return []
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("no GPU here; --device cpu --tiny tries whether it runs")
    args.data = unpack(args.data, args.results.resolve().parent)
    parts = [p for p in parts_of(args) if not args.only or p.name.startswith(tuple(args.only))]
    return run_all(parts, args)


if __name__ == "__main__":
    cli(lambda: sys.exit(any(line["rc"] for line in main())))
