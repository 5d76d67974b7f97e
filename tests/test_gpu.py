"""benchmarks/gpu.py: parts that end badly, what is skipped, and its report."""
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402


def args_of(folder, **values):
    return SimpleNamespace(**{"device": "cpu", "minutes": 1.0, "again": False, "commit": "abc", "tiny": False,
                              "results": folder / "gpu.jsonl", "data": folder, **values})


def test_parts_are_recorded_as_they_come(tmp_path, capsys):
    """One that fails, one that ends what it has started too late, one after them; the next call does what is left."""
    seen = f"print(open({str(tmp_path / 'gpu.jsonl')!r}).read().count(chr(10)))"
    late = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(print('told'))); time.sleep(30)"
    parts = [gpu.Part("fails", ("-c", "print('why'); raise SystemExit(3)"), 20),
             gpu.Part("late", ("-c", late), 1),
             gpu.Part("good", ("-c", f"{seen}; print('{{\"columns\": [\"a\"], \"rows\": [[1]]}}\\n{{\"rows')"), 20)]
    lines = gpu.run_all(parts, args_of(tmp_path))
    assert [(line["part"], line["rc"]) for line in lines] == [("fails", 3), ("late", 124), ("good", 0)]
    assert lines == gpu.read_lines(tmp_path / "gpu.jsonl") and lines[0]["last"] == ["why"]
    assert lines[2]["numbers"] == [{"columns": ["a"], "rows": [[1]]}] and lines[2]["seconds"] < 20
    log = (tmp_path / "gpu.log").read_text()
    assert "==== fails: -c" in log and "\ntold\n" in log and "\n2\n" in log
    with open(tmp_path / "gpu.jsonl", "a") as file:
        file.write('{"part": "cut o')
    again = gpu.run_all([parts[2], parts[0]], args_of(tmp_path, minutes=0.2))
    assert again == [] and "good                     done before" in capsys.readouterr().out
    assert [line["part"] for line in gpu.run_all(parts[:1], args_of(tmp_path))] == ["fails"]
    assert gpu.read_lines(tmp_path / "gpu.jsonl")[-1]["part"] == "fails"


def line_of(part, columns, rows, rc=0, last=(), device="NVIDIA X", **facts):
    return {"part": part, "command": f"python benchmarks/{part.split()[0]}.py", "seconds": 1.0, "rc": rc,
            "numbers": [{"columns": columns, "rows": rows, **facts}] * 2 if rows else [], "last": list(last),
            "device": device, "torch": "2.9", "commit": "abc", "date": "2026-01-01"}


@pytest.mark.parametrize("parts", (0, 4))
def test_report(parts, tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/speed.md"):
        (tmp_path / name).write_text("before <!-- gpu -->old<!-- /gpu --> after")
    lines = [line_of("tests", [], [], 1, ["FAILED a", "== 1 failed, 70 passed in 60s =="]),
             line_of("step dupr", ["way", "seconds", "images/s"], [["ours", "1 (1..1)", 2000.0], ["bf16", "1", 4000.0]],
                     batch_size=32),
             line_of("loader", ["method", "against", "ours"], [["dupr", "baseline", 198.0]]),
             line_of("memory", [], [], 124)]
    ours = line_of("step soco", ["way", "seconds", "images/s"], [["ours", "1", 2.0]], device="cpu")
    gpu.write_report([ours, *lines[:parts]], tmp_path)
    readme, speed = ((tmp_path / name).read_text() for name in ("README.md", "docs/speed.md"))
    if not parts:
        assert readme == f"before <!-- gpu -->{gpu.EMPTY}<!-- /gpu --> after" and f"\n**{gpu.EMPTY}** `python" in speed
        return
    assert "NVIDIA X; its tests do not all pass there" in readme and readme.endswith("<!-- /gpu --> after")
    assert "Did not: tests (== 1 failed, 70 passed in 60s ==); memory (out of time)." in speed
    assert "| ours | 1 (1..1) | 2000 |" in speed and "(batch_size 32)" in speed
    assert "| dupr | 4000 | 198 | 20.2 | no |" in speed and "soco" not in speed and "old" not in speed


def test_what_is_committed_is_what_was_measured(tmp_path):
    """README.md and docs/speed.md say what gpu.jsonl has."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/speed.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    gpu.write_report(gpu.read_lines(ROOT / "benchmarks" / "gpu.jsonl"), tmp_path)
    for name in ("README.md", "docs/speed.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: python benchmarks/gpu.py --report"


def test_the_plan_fits(tmp_path):
    """Every part is a command of the project, whose flags its parser has (test_docs looks at --flags the same way)."""
    parts = gpu.parts_of(args_of(tmp_path)) + gpu.parts_of(args_of(tmp_path, tiny=True))
    assert len({part.name for part in parts[:-7]}) == len(parts) - 7
    for part in parts:
        if part.command[0] != "-m":
            text = (ROOT / part.command[0]).read_text() + (ROOT / "benchmarks" / "compare.py").read_text()
            own = "".join((ROOT / f"{name}.py").read_text() for name in ("run", "data", "proposals", *gpu.METHODS))
            for flag in (word for word in part.command if word.startswith("--")):
                assert f'"{flag}"' in text or f"{flag[2:]}:" in own, (part.name, flag)
    assert json.dumps([part._asdict() for part in parts])
