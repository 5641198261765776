"""What the benches share: a race of two functions in turns, its row, peak memory, attention's kernel set aside."""

import contextlib
import ctypes
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

HEAD = "| what | ours | theirs | theirs/ours | min .. max | repetitions | target | |\n|" + " --- |" * 8


def race(name: str, ours: Callable, theirs: Callable, repetitions: int, per: int = 1) -> tuple[str, list]:
    """name, and seconds (ours, theirs) of each repetition, the two taking turns at going first; one repetition before
    is not counted. A call does `per` units of work.
    """
    seconds = []
    for repetition in range(-1, repetitions):
        turn = {}
        for function in (ours, theirs) if repetition % 2 else (theirs, ours):
            gc.collect()
            start = time.perf_counter()
            function()
            turn[function] = (time.perf_counter() - start) / per
        if repetition >= 0:
            seconds.append((turn[ours], turn[theirs]))
        progress(f"{name}: {repetition + 1}/{repetitions}")
    progress("")
    return name, seconds


def print_row(name: str, seconds: list, target: str = "", note: str = "") -> None:
    """Medians, the median of ratios theirs/ours with its extremes, and the number of repetitions, as a Markdown row."""
    mine, other = (statistics.median(column) for column in zip(*seconds, strict=True))
    ratios = [theirs / ours for ours, theirs in seconds]
    spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
    cells = name, shown(mine), shown(other), f"{statistics.median(ratios):.2f}", spread, str(len(ratios)), target, note
    print("| " + " | ".join(cells) + " |", flush=True)


def step_row(
    name: str,
    images: int,
    precision: str,
    ours: Callable,
    theirs: Callable,
    repetitions: int,
    per: int = 1,
    target: str = "",
    note: str = "",
) -> None:
    """The row of a training step on `images` images: besides the race, what `speed_of` says of ours."""
    name, seconds = race(name, ours, theirs, repetitions, per)
    speed = speed_of(ours, statistics.median(mine for mine, _ in seconds), images, precision, per)
    print_row(name, seconds, target, "; ".join(filter(None, (speed, note))))


def speed_of(step: Callable, seconds: float, images: int, precision: str, per: int = 1) -> str:
    """Images/s, the share of this machine's matrix-product peak that the matrix products alone reach, and peak memory
    of a step that takes `seconds`; one call of `step` is `per` steps. A fused attention's own products do not count."""
    with FlopCounterMode(display=False) as counter:
        step()
    share = counter.get_total_flops() / per / seconds / matmul_peak(precision)
    memory = peak_memory(step)
    parts = f"{images / seconds:,.0f} images/s", f"{share:.0%} of peak", f"{memory:.0f} MiB" if memory else ""
    return ", ".join(filter(None, parts))


@functools.cache
def matmul_peak(precision: str, size: int = 2048) -> float:
    """Operations per second of a matrix product of `size`, the best of ten."""
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def shown(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def progress(text: str) -> None:
    """One line on a terminal, which the next replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def attention(flash: bool):
    """With or without the flash kernel of attention, which `shared.run.setup` switches off on a CPU."""
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(flash)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


def peak_memory(step: Callable) -> float | None:
    """MiB that `step` holds at most beyond what is held before; None where the system does not tell (Linux does)."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but not given back would hide
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
        step()
        return (resident("VmHWM") - before) / 1024
    except OSError:
        return None


def resident(what: str) -> int:
    """kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(what)))
