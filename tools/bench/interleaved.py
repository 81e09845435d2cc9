"""Two ways to do the same work, timed in turn in one process, so that both meet the same machine.

Each round runs every side once, and the next round in the opposite order: a machine that slows
down, throttles or is busy with something else does so to both.
"""

import gc
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from os import sched_getaffinity
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

Side = Callable[[], object]

_PACKAGES = ("torch", "open_clip_torch", "timm", "transformers", "torchvision", "pillow")


def compare(
    sides: dict[str, Side],
    *,
    rounds: int,
    warmup: int = 1,
    work: float,
    unit: str,
    arguments: dict[str, Any],
    own_clock: bool = False,
) -> dict[str, Any]:
    """Time the sides in interleaved rounds.

    Args:
        sides: name to function; the first is the one whose speed-up over the second is told.
        rounds: timed calls of each side; a figure to be quoted takes five or more.
        warmup: calls of each side before the first that counts.
        work: units of work in one call, e.g. samples.
        unit: their name; rates are in units a second.
        arguments: what the script was asked for, repeated in the report.
        own_clock: a side gives the seconds that count of its call, instead of all of them.

    Returns:
        `sides`: {name: {median, min, max, n, rate, times}} in seconds and work / median;
        `ratio`: rate of the first side over the second's, with the least and greatest of a
        round's own two; `device`, `threads`, `versions` and `arguments`.
    """
    names = list(sides)
    for turn in range(warmup):
        for name in names:
            seconds = _time(sides[name], own_clock)
            print(f"warm-up {turn + 1}/{warmup}  {name}: {seconds:.3f} s", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(_time(sides[name], own_clock))
        figures = "  ".join(f"{name}: {times[name][-1]:.3f} s" for name in names)
        print(f"round {turn + 1}/{rounds}  {figures}", file=sys.stderr)
    report: dict[str, Any] = {
        "sides": {name: _summary(seconds, work) for name, seconds in times.items()},
        "unit": unit,
        "work": work,
    }
    if len(names) > 1:
        ours, theirs = times[names[0]], times[names[1]]
        pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
        report["ratio"] = {
            "of": f"{names[0]} / {names[1]}",
            "median": median(theirs) / median(ours),
            "min": min(pairs),
            "max": max(pairs),
        }
    return report | machine() | {"arguments": arguments}


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code: device, threads, versions."""
    device = f"{_cpu()}, {len(sched_getaffinity(0))} cores"
    if torch.cuda.is_initialized():
        device = torch.cuda.get_device_name()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"device": device, "threads": torch.get_num_threads(), "versions": versions}


def _time(side: Side, own_clock: bool) -> float:
    gc.collect()  # no side pays for the litter of the one before
    _synchronize()
    start = time.perf_counter()
    told = side()
    _synchronize()
    return cast(float, told) if own_clock else time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _summary(seconds: list[float], work: float) -> dict[str, Any]:
    return {
        "median": median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "n": len(seconds),
        "rate": work / median(seconds),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
