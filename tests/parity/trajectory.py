"""Training trajectories: the authors' loop and ours from the same weights on the same batches of a real shard."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from shared import data

from . import Table, measured

ROOT = Path(__file__).resolve().parents[2]
SHARD = ROOT / "data/emoji/train/00000.tar"
STEPS = 200
SHOWN = (1, 10, 50, 100, 200)
DTYPES = torch.float32, torch.float64
APART = 1e-4  # relative difference from which the curves count as apart


@functools.cache
def shard(side: int) -> tuple[data.Shards, torch.Tensor, list[str]]:
    """A real shard: its pairs, all images (N, 3, side, side) in -1..1, all captions. Skips the test without it."""
    if not SHARD.is_file():
        pytest.skip(f"needs {SHARD.relative_to(ROOT)}: `make data` makes it")
    pairs = data.open_pairs(str(SHARD))
    images = [pairs.read(row).image.resize((side, side)) for row in range(len(pairs))]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    return pairs, pixels / 127.5 - 1, [pairs.caption(row) for row in range(len(pairs))]


def orders(n: int, batch_size: int, steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Indices of `steps` batches: passes over n samples in random order, without short batches."""
    generator, batches = torch.Generator().manual_seed(seed), []
    while len(batches) < steps:
        batches += torch.randperm(n, generator=generator)[: n - n % batch_size].split(batch_size)
    return batches[:steps]


class Epochs:
    """A loader of given batches: each pass over it yields the next `length` of them."""

    def __init__(self, batches: Iterable, length: int, batch_size: int):
        self.batches, self.num_batches, self.num_samples = iter(batches), length, length * batch_size

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator:
        return itertools.islice(self.batches, self.num_batches)


def losses(train: Callable[[], object]) -> list[float]:
    """Losses of `train()`: those that it calls `backward` on, or the floats that it yields."""
    found, backward = [], torch.Tensor.backward

    def noted(loss, *args, **options):
        found.append(loss.item())
        backward(loss, *args, **options)

    with mock.patch.object(torch.Tensor, "backward", noted):
        for value in train() or ():  # if `train` is a generator, reading it trains
            if isinstance(value, float):
                found.append(value)
    return found


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Context in which new parameters have this dtype, for scripts that build their own models."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(theirs: Callable, ours: Callable, dtypes: Iterable[torch.dtype] = DTYPES) -> dict[str, tuple[list, list]]:
    """{dtype: (losses by step of theirs, of ours)}. Both are called with a dtype, and train when called or iterated.

    In float64, `Tensor.float`, which the code calls for half precision, is replaced by a cast to float64.
    """
    curves = {}
    for dtype in dtypes:
        with mock.patch.object(torch.Tensor, "float", lambda x, dtype=dtype: x.to(dtype)):
            curves[str(dtype).removeprefix("torch.")] = tuple(losses(partial(side, dtype)) for side in (theirs, ours))
    return curves


def compare(
    table: Table,
    folder: str,
    where,
    own_name: str,
    curves: dict,
    *,
    early: float = 1e-5,
    late: float = 0.1,
    double: float = 1e-9,
    against: str = "the authors' code",
) -> None:
    """Print, draw and check the curves.

    Relative tolerances: `early` of the first 10 steps in float32, `late` of all steps in float32, `double` of all steps
    in float64; of the first 10 steps in float64, 1e-9.
    """
    head = ["", "steps", "first loss", "last, theirs", "last, ours"]
    head += [f"largest difference to step {n}" for n in SHOWN] + [f"over {APART:g} relative from step"]
    lines = [head, ["---"] * len(head)]
    for kind, sides in curves.items():
        theirs, ours = map(np.array, sides)
        assert len(theirs) == len(ours) > 10, f"{len(theirs)} steps of theirs, {len(ours)} of ours"
        gap = np.abs(theirs - ours)
        apart = np.flatnonzero(gap > APART * np.abs(theirs))
        line = [kind, str(len(gap)), f"{theirs[0]:.4f}", f"{theirs[-1]:.4f}", f"{ours[-1]:.4f}"]
        line += [f"{gap[:n].max():.1e}" if n <= len(gap) else "-" for n in SHOWN]
        lines.append([*line, str(apart[0] + 1) if len(apart) else "never"])
    print(f"\n\n{folder}: training trajectories\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    draw(ROOT / f"runs/parity/{folder}_trajectory.png", folder, curves, against)
    for kind, (theirs, ours) in curves.items():
        parts = [(10, early), (len(ours), late)] if kind == "float32" else [(10, 1e-9), (len(ours), double)]
        for steps, rtol in parts:
            sides = theirs[:steps], ours[:steps]
            table.compare(f"trajectory: {steps} steps, {kind}", where, own_name, *sides, rtol=rtol, atol=0)
            measured[-1]["against"] = against


def draw(path: Path, folder: str, curves: dict[str, tuple[list, list]], against: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    theirs, ours = next(iter(curves.values()))
    steps = np.arange(1, len(ours) + 1)
    left.plot(steps, theirs, label=against, linewidth=3, alpha=0.4)
    left.plot(steps, ours, label="ours", linewidth=1)
    left.set(title=f"{folder}, {next(iter(curves))}", xlabel="step", ylabel="loss")
    left.legend()
    for kind, sides in curves.items():
        gap = np.abs(np.subtract(*sides))
        right.plot(steps, np.where(gap > 0, gap, np.nan), ".", markersize=4, label=kind)
    right.set(title="|difference|", xlabel="step", yscale="log")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
