"""Results of the costly passes, kept by row of the data, so that a reduction that was killed goes on from them."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shared import checkpoints, run


def cached_rows(
    folder: Path, rows: np.ndarray, size: int, process: run.Process, label: str, compute: Callable[[np.ndarray], dict]
) -> None:
    """Work out `compute(rows)`, a dict of arrays by row, for those of `rows` (ascending) that `folder` lacks.

    One file for each `size` rows of the data, replaced atomically; ranks share out the files, whatever their number was
    when the folder was begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = np.unique(rows // size)[process.rank :: process.world_size]
    for number in run.progress(chunks, len(chunks), label, size, process):
        path, wanted = folder / f"{number:06}.npz", rows_in(rows, number, size)
        kept = load_part(path)
        missing = wanted if kept is None else np.setdiff1d(wanted, kept["rows"])
        if not len(missing):
            continue
        fresh = {"rows": missing, **compute(missing)}
        if kept is not None:
            fresh = {name: np.concatenate([kept[name], fresh[name]]) for name in fresh}
        order = np.argsort(fresh["rows"])
        with checkpoints.replaced(path, f".{os.getpid()}.tmp") as file:  # reductions may share the folder
            np.savez(file, **{name: values[order] for name, values in fresh.items()})
    run.gather_lists([], process)  # until all ranks have written their chunks


def rows_in(rows: np.ndarray, number: int, size: int) -> np.ndarray:
    """Those of `rows` (ascending) that are in the file of that number."""
    return rows[slice(*np.searchsorted(rows, (number * size, (number + 1) * size)))]


def load_part(path: Path) -> dict[str, np.ndarray] | None:
    """All arrays of a file, or None if it does not exist or cannot be read: it is then made again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def read_rows(folder: Path, rows: np.ndarray, size: int, name: str) -> np.ndarray:
    """Array `name` of those rows (ascending)."""
    parts = []
    for number in np.unique(rows // size):
        with np.load(folder / f"{number:06}.npz", allow_pickle=False) as file:
            places = np.searchsorted(file["rows"], rows_in(rows, number, size))
            parts.append(file[name][places])
    return np.concatenate(parts)


def gathered_codes(folder: Path, rows: np.ndarray, size: int) -> np.ndarray:
    """Code vectors (N, L') of those rows as one memory-mapped array."""
    path = folder / "codes.npy"
    first = read_rows(folder, rows[:1], size, "codes")
    shape = (len(rows), first.shape[1])
    temporary = folder / f"codes.{os.getpid()}.tmp.npy"
    merged = np.lib.format.open_memmap(temporary, "w+", first.dtype, shape)
    done = 0
    for number in np.unique(rows // size):
        part = read_rows(folder, rows_in(rows, number, size), size, "codes")
        merged[done : done + len(part)] = part
        done += len(part)
    merged.flush()
    os.replace(temporary, path)
    return np.load(path, mmap_mode="r")
