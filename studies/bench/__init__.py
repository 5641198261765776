"""What the benches share: thread settings and their merged table, two functions timed in turns, peak memory.

`python -m studies.bench.FOLDER` starts itself once for each thread setting, since OpenMP reads its waiting policy
when it is loaded. In each of these processes, our function and theirs (the authors' or open_clip's) take turns on
the same inputs; the table has each side's best setting.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from shared import run
from shared.errors import UserError
from tests.parity import check_commit

HEAD = "| what | ours | theirs | theirs/ours | min .. max | repetitions | target | threads | |\n|" + " --- |" * 9
SETTING = "PAPER_CLIPS_BENCH"  # environment variable: the thread setting of a process that measures, set by its parent
LONG = 5.0  # seconds; functions that take longer are not warmed up
CPU = run.Process(0, 1, torch.device("cpu"))


# ----------------------------------------------------------------------------------------------------------- settings


def thread_settings() -> dict[str, dict[str, str]]:
    """{name: environment variables} of the thread settings; both sides are timed under each."""
    cores, one = run.cores(), {"1 thread": {"OMP_NUM_THREADS": "1"}}
    if cores == 1:
        return one
    every = {"OMP_NUM_THREADS": str(cores)}
    return {f"{cores} threads": every, f"{cores} threads, passive": every | {"OMP_WAIT_POLICY": "PASSIVE"}} | one


def arguments(doc: str, repetitions: int, clone: tuple[str, str, str] | None = None) -> argparse.ArgumentParser:
    """A bench's command line. `clone`: the authors' repository, its commit, and a path that every clone of it has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = "clone of {} at {}".format(*clone) if clone else "not used: there is no code of the authors"
    parser.add_argument("--upstream", type=clone_of(*clone) if clone else Path, help=about)
    parser.add_argument(
        "--repetitions", type=at_least(1), default=repetitions, help="of each measurement, under each thread setting"
    )
    parser.add_argument("--results", type=Path, help="also write the table into this file, for `make readme`")
    parser.add_argument(
        "--trainings",
        type=at_least(0),
        default=1,
        help="trainings for the seconds to a floor; 0 leaves them out",
    )
    return parser


def clone_of(repository: str, commit: str, part: str) -> Callable[[str], Path]:
    def checked(text: str) -> Path:
        if not (Path(text) / part).exists():
            raise argparse.ArgumentTypeError(f"{text} is no clone of {repository}: it has no {part}")
        if SETTING not in os.environ:
            check_commit(Path(text), commit)
        return Path(text)

    return checked


def at_least(smallest: int) -> Callable[[str], int]:
    def checked(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {smallest} on")
        return int(text)

    return checked


def bench(
    measure: Callable[[argparse.Namespace], None],
    options: argparse.Namespace,
    left_out: str = "",
    after: Callable[[argparse.Namespace], str | None] | None = None,
    to_the_floor: Callable[[int], None] | None = None,
) -> None:
    """Run `measure(options)` in one process per thread setting and print the table of its rows; then print what
    `after(options)` measures in this process and returns. --results gets both. `left_out` names the measurements that
    need --upstream. `to_the_floor(seeds)` runs with one thread only.
    """
    if SETTING in os.environ:
        set_up()
        if to_the_floor is not None and options.trainings and one_thread():
            to_the_floor(options.trainings)
        return measure(options)
    print(f"{run.machine()}, open_clip {version('open_clip_torch')}\n\n{HEAD}", flush=True)
    lines = merged({name: rows_under(name, environment) for name, environment in thread_settings().items()})
    print("\n".join(lines), flush=True)
    if options.results is not None:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(page(lines), encoding="utf-8")
    if options.upstream is None and left_out:
        print(f"\nnot run without --upstream PATH: {left_out}")
    if after is not None:
        set_up()
        more = after(options)
        if more:
            print(f"\n{more}", flush=True)
        if more and options.results is not None:
            with options.results.open("a", encoding="utf-8") as file:
                file.write(f"\n{more}\n")


def one_thread() -> bool:
    """Whether the thread setting of this process is one thread."""
    return os.environ[SETTING] == "1 thread"


def page(lines: list[str]) -> str:
    """Text for a README: date, commit, machine, explanation and table."""
    return (
        f"Measured {date.today()} at commit `{run.commit()}` on {run.machine()}, "
        f"open_clip {version('open_clip_torch')}. theirs/ours: above 1 ours is faster; medians and extremes of turns "
        "taken on the same inputs, each side at the thread setting that suits it best.\n\n"
        + "\n".join([HEAD, *lines, ""])
    )


def set_up() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    run.setup(0, "cpu")


def rows_under(name: str, environment: dict[str, str]) -> list[dict]:
    """Rows that this command prints in a process with a thread setting; its other lines go to stderr."""
    base = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_"))}
    command, rows = [sys.executable, "-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]], []
    base |= environment | {SETTING: name}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=base) as child:
        for line in child.stdout:
            if line.startswith('{"row": '):
                rows.append(json.loads(line))
            else:
                print(line, end="", file=sys.stderr, flush=True)
    if child.returncode:
        sys.exit(f"the measurement with {name} failed (exit code {child.returncode})")
    return rows


def merged(tables: dict[str, list[dict]]) -> list[str]:
    """Rows of each setting -> rows of the Markdown table, in the order in which they first appear."""
    rows: dict[str, dict[str, dict]] = {}
    for setting, table in tables.items():
        for row in table:
            if setting in rows.setdefault(row["row"], {}):
                raise UserError(f"two rows are called {row['row']!r}")
            rows[row["row"]][setting] = row
    return [best_of(name, found) for name, found in rows.items()]


def best_of(name: str, rows: dict[str, dict]) -> str:
    """Merge a row's measurements {setting: row} into one Markdown row.

    Each side has the setting with its smallest median. The row has both medians, their ratio, the smallest and largest
    ratio of single repetitions of theirs and ours, and target and note of our setting. Theirs may be missing.
    """
    used = {}
    for side in ("ours", "theirs"):
        medians = {setting: statistics.median(row[side]) for setting, row in rows.items() if row[side]}
        if medians:
            used[side] = min(medians, key=medians.__getitem__)
    row = rows[used["ours"]]
    ours, theirs = row["ours"], rows[used["theirs"]]["theirs"] if "theirs" in used else []
    other = ratio = spread = ""
    if theirs:
        other = shown(statistics.median(theirs), row["unit"])
        ratio = f"{statistics.median(theirs) / statistics.median(ours):.2f}"
        spread = f"{min(theirs) / max(ours):.2f} .. {max(theirs) / min(ours):.2f}"
    mine, threads = shown(statistics.median(ours), row["unit"]), "; ".join(f"{a}: {b}" for a, b in used.items())
    cells = name, mine, other, ratio, spread, str(len(ours)), row["target"], threads, row["note"]
    return "| " + " | ".join(cells) + " |"


# --------------------------------------------------------------------------------------------------------------- rows


def race(name: str, ours: Callable, theirs: Callable, repetitions: int, per: int = 1) -> tuple[str, list]:
    """Time both functions in turns, in alternating order -> (name, seconds (ours, theirs) of each repetition).

    The first repetition warms up and is not counted, unless both take longer than LONG. Seconds are divided by `per`,
    the units of work per call.
    """
    seconds: list[tuple[float, float]] = []
    repetition = 0
    while len(seconds) < repetitions:
        turn = {}
        for function in (theirs, ours) if repetition % 2 else (ours, theirs):
            gc.collect()
            start = time.perf_counter()
            function()
            turn[function] = time.perf_counter() - start
        if repetition or min(turn.values()) > LONG:
            seconds.append((turn[ours] / per, turn[theirs] / per))
        repetition += 1
        progress(f"{os.environ.get(SETTING)}: {name}: {len(seconds)}/{repetitions}")
    progress("")
    return name, seconds


def print_row(name: str, values: list, target: str = "", note: str = "", unit: str = "s") -> None:
    """Print a row as JSON, for the process that merges thread settings.

    values: (ours, theirs) of each repetition, in `unit`, smaller is better; theirs is None if only ours is measured.
    """
    ours, theirs = zip(*values, strict=True)
    row = {"row": name, "ours": ours, "theirs": [value for value in theirs if value is not None]}
    print(json.dumps(row | {"target": target, "note": note, "unit": unit}), flush=True)


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
    """Race a training step on `images` images and print its row, with `speed_of` ours as a note."""
    name, seconds = race(name, ours, theirs, repetitions, per)
    speed = speed_of(ours, statistics.median(mine for mine, _ in seconds), images, precision, per)
    print_row(name, seconds, target, "; ".join(filter(None, (speed, note))))


def speed_of(step: Callable, seconds: float, images: int, precision: str, per: int = 1) -> str:
    """Speed of a step that takes `seconds`: images/s, share of peak, peak memory. A call of `step` is `per` steps.

    The share of peak is the FLOPs of the step's matrix products (without those in fused attention) per second, divided
    by `matmul_peak`.
    """
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


def shown(value: float, unit: str = "s") -> str:
    if math.isinf(value):
        return "not reached"
    if unit == "s":
        return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"


def progress(text: str) -> None:
    """Print a line on a terminal that replaces the one before."""
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
    """Run `step` -> its peak memory in MiB beyond the memory in use before; None if the system is not Linux."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is not returned to the system would hide growth
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
    except OSError:
        before = None
    step()
    return None if before is None else (resident("VmHWM") - before) / 1024


def resident(what: str, process: int | str = "self") -> int:
    """A field of a process's /proc status, such as VmRSS, in kB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(what)))
