"""What the benchmarks share: ways of doing one piece of work run in turn, their medians with spread, one table and one
JSON line.

Machines drift and are shared, so the ways are never timed one after the other: every round runs each of them once, in
an order that is turned by one each round, and a ratio is the median over rounds of what two ways took in the SAME
round. Trust ratios; seconds are those of one machine on one day.
"""
from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's files, from wherever this is started
import common  # noqa: E402, F401  before torch: it tells OpenMP how to wait
import torch  # noqa: E402


def machine(device: torch.device, **sizes: Any) -> dict[str, Any]:
    """Versions, cores, threads, device, and the sizes of the work: what a number means nothing without."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"torch": torch.__version__, "python": platform.python_version(),
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device.type, **gpu, **sizes}


def finish(device: torch.device) -> None:
    """Wait for the device; a clock read before that would time the launch of its kernels only."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(ways: dict[str, Callable[[], Any]], rounds: int, device: torch.device, warmup: int = 1,
               clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of every way in every round. clock: time.process_time for the CPU time of this process, where others
    share the cores."""
    names = list(ways)
    seconds = {name: [] for name in ways}
    for i in range(-warmup, rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            finish(device)
            start = clock()
            ways[name]()
            finish(device)
            if i >= 0:
                seconds[name].append(clock() - start)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float], scale: float = 1.0, digits: int = 3) -> str:
    """'median (min..max)'."""
    low, mid, high = (f"{scale * v:.{digits}g}" for v in (min(values), median(values), max(values)))
    return f"{mid} ({low}..{high})"


def ratios(seconds: dict[str, list[float]], over: str, of: str) -> list[float]:
    """How many times as long `over` took as `of`, round by round: the speed of `of` against the baseline `over`."""
    return [a / b for a, b in zip(seconds[over], seconds[of])]


def peak_mib(work: Callable[[], Any], device: torch.device) -> float | None:
    """What `work` needs at most beyond what is held before it, MiB. CPU: pages of this process (Linux only, else
    None)."""
    finish(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: tensors above 1 MiB go back to the system when freed
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts at what is resident now
    except (OSError, AttributeError):
        return None

    def field(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    before = field("VmRSS")
    work()
    return field("VmHWM") - before


def report(title: str, columns: list[str], rows: list[list[Any]], facts: dict[str, Any]) -> None:
    """The table, then one JSON line {"benchmark", "columns", "rows", ...facts}."""
    cells = [[f"{v:.3g}" if isinstance(v, float) else "-" if v is None else str(v) for v in row] for row in rows]
    width = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    print(f"\n{title}\n" + ", ".join(f"{k} {v}" for k, v in facts.items()))
    for row in [columns, *cells]:
        print("  ".join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(row, width))).rstrip())
    print(json.dumps({"benchmark": Path(sys.argv[0]).stem, "columns": columns, "rows": rows, **facts}), flush=True)
