"""Reads and writes the files of a run: checkpoints and JSON.

Reading never runs code from a file (`weights_only=True`). Writing is atomic: a file is complete or unchanged.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any, BinaryIO, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from shared.errors import UserError

ROOT = Path(__file__).resolve().parent.parent  # folder of the project


def one_line(error: Exception | str, length: int) -> str:
    """A text, or the message of an exception, on one line, cut to `length` characters."""
    return " ".join(str(error).split())[:length]


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` to `path` atomically.

    UserError if a tensor is not finite, UserError if `state` cannot be written; `path` is then unchanged.
    """
    for name, tensor in tensors(state):
        if not tensor.isfinite().all():
            raise UserError(
                f"{name} is no longer finite, and {path} is left as it was: lower --lr, or use --precision fp32"
            )
    with replaced(path) as file:
        torch.save(state, file)


@contextlib.contextmanager
def replaced(path: Path, ending: str = ".tmp") -> Iterator[BinaryIO]:
    """Open a temporary file for writing; at the end, fsync it and atomically rename it to `path`.

    UserError that names `path` if it cannot be written; `path` is then unchanged. Errors of other files pass unchanged.
    """
    temporary = path.with_name(path.name + ending)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        why = error if isinstance(error, OSError) else error.__context__  # torch turns a failed write into RuntimeError
        if not isinstance(why, OSError) or why.filename not in (None, str(temporary)):
            raise
        raise UserError(f"{path} could not be written and is left as it was ({why.strerror or why})") from error


def link(source: str | Path, target: str | Path) -> None:
    """A second name for a file, so that it takes its space once; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def save_array(path: Path, array: np.ndarray, ending: str = ".tmp") -> None:
    """np.save, atomically."""
    with replaced(path, ending) as file:
        np.save(SimpleNamespace(write=file.write), array)  # np.save to a real file misses the error of a full disk


def tensors(value: Any, name: str = "state") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, str(key))


# Types in the authors' checkpoints other than plain values: a Namespace of the command line, which contains paths, and
# learning rates as NumPy numbers. The types' names depend on the version of Python or NumPy that wrote the file. They
# are harmless and therefore allowed; paths are loaded as PurePath.
_scalar = np.float64(0).__reduce__()[0]
AUTHORS_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    *((PurePath, f"{module}.{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
]


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict:
    """Load a checkpoint, ours or the authors', without running code from it (`weights_only=True`), or the tensors of a
    .safetensors file by name.

    UserError if there is no file; UserError if it cannot be read, or holds types other than tensors, plain
    values and AUTHORS_GLOBALS.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path, device=str(map_location))
        with torch.serialization.safe_globals(AUTHORS_GLOBALS):
            return torch.load(path, map_location=map_location, weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from error
    except Exception as error:
        raise UserError(
            f"{path} is not a checkpoint that loads with weights_only=True ({type(error).__name__})"
        ) from error


def trained_by(run: str | Path) -> str | None:
    """Folder name of the paper whose script wrote a run's checkpoint, or None.

    Old checkpoints do not name their paper; for these it is taken from the path.
    """
    file = Path(run) / "checkpoint.pt"
    if not file.is_file():
        return None
    try:  # mmap: weights are not read
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # reported when the checkpoint is loaded
        return None
    stated = state.get("paper") if isinstance(state, dict) else None
    return next((name for name in ([stated] if stated else file.parts) if (ROOT / name / "eval.py").is_file()), None)


def config_in(state: Any, config: type, path: str | Path) -> Any:
    """The configuration in the checkpoint `state`, as the dataclass `config`. UserError if another script wrote it, or
    if a value has another type than its field."""
    values, kinds = state.get("config") if isinstance(state, dict) else None, get_type_hints(config)
    if not isinstance(values, dict) or values.keys() - kinds.keys():
        raise UserError(f"{path} is not a run of {config.__module__.partition('.')[0]} that can be used here")
    if odd := next((name for name, value in values.items() if not fits(value, kinds[name])), None):
        raise UserError(f"the checkpoint of {path} is damaged: its {odd} is {one_line(repr(values[odd]), 80)}")
    return config(**values)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has the type of a field: a plain one, a Literal, a tuple of one type or a union of these. A whole
    number also fits float."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in kinds
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(each, kinds[0]) for each in value)
    if kinds:
        return any(fits(value, one) for one in kinds)
    return type(value) is kind or (kind is float and type(value) is int)


class State(dict):
    """Content of a run's checkpoint; UserError for a missing key."""

    def __missing__(self, key: str):
        raise UserError(f"the checkpoint has no {key!r}: another script wrote it; choose another --out")


def changes(then: dict, now: dict) -> str:
    """Settings that differ between `then` and `now`, as "lr (was 0.1, now 0.2) and 3 more"; "" if none."""
    changed = [name for name in now if now[name] != then.get(name)]
    what = ", ".join(f"{name} (was {then.get(name)!r}, now {now[name]!r})" for name in changed[:5])
    return what + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


# Fields of a configuration that may change when a run resumes, since they do not change its weights
FREE = {
    "out", "device", "workers", "save_every", "keep_every", "keep_best", "log_every", "eval_every", "eval_set", "cache",
    "strict", "dry_run",
}  # fmt: skip


def resume(folder: Path, config: Any) -> dict | None:
    """The state in `folder`/checkpoint.pt, or None if the run is new.

    UserError if the checkpoint was written with another configuration; FREE fields may differ.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    state = load_checkpoint(path)
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise UserError(f"{path} is not a checkpoint of this script: choose another --out, or remove the folder")
    now = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    then = {field.name: field.default for field in dataclasses.fields(config)}  # for fields newer than the checkpoint
    if what := changes(then | state["config"], now):
        raise UserError(
            f"{folder} holds a run with another configuration: {what}; choose another --out, or remove the folder"
        )
    return State(state)


# ------------------------------------------------------------------------------------------------------------- JSON


def read_json(path: str | Path, advice: str = "remove it, or name another folder") -> dict:
    """The JSON object in a file. UserError, which ends in `advice`, if it holds none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {advice}")
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically; creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with replaced(Path(path)) as file:
        file.write(text.encode())
