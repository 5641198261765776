"""One adapter a part: a class that maps a part of a paper to our function and to the authors', in golden files' names.

Golden tests (tests/test_adapters.py), parity tests with a clone (tests/parity/test_parts.py), `--write-golden DIR` and
PARITY.md are driven by them. To write those of a paper, as in protoclip.py:

1. tests/adapters/PAPER.py with CLONE = (repository, commit, a file that only this repository has) and a context manager
   `authors(path)`, which yields `up`: the authors' modules from the clone, with stand-ins for what cannot run here.
2. For each part a class(Part). `files` has {stem of a golden file: options of `inputs`}; `more` those without a file.
3. `inputs(**options)` gives {array name: value} from torch, NumPy and random, which are seeded: no clone is needed.
4. `theirs(up, case)` reads inputs as case["name"] and gives {array name: output of the authors' function}.
5. `ours(case)` gives the same names. There, `case` has their outputs, too: a stage may start from them, as in the file,
   and what is arbitrary (the sign of a component) is taken from them. If both sides call alike, write instead
   `run(function, case)`, `our(...)`, our function, and `their(up)`, which returns the authors'. Gradients have "grad"
   in their names. Names that no file has are compared with a clone only.
6. `families`: beginnings of names of files, if not those of `files`; `functions`: ours, as the README's map names them,
   all of which have to run; `only`: what of one of them is compared, if not all of it; `authors`: their path:line;
   `rtol`, `atol`, `tolerances`; `unused`: arrays that ours does not give, and why; `no_live`: why theirs cannot run.
7. A golden array that `inputs` does not make and `ours` does not return fails, also an input that `ours` does not read.
   Delete the golden and parity tests that a part replaces.
"""

import fnmatch
import functools
import importlib
import inspect
import json
import math
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def leaf(x: Any) -> Tensor:
    """A copy of an array of a case that gets a gradient."""
    return torch.as_tensor(x).clone().requires_grad_()


def gradients(loss: Tensor, leaves: dict[str, Tensor], prefix: str = "grad_") -> dict[str, Tensor]:
    """{prefix + name: gradient of the loss} of each leaf; zeros if the loss does not depend on it."""
    loss.backward()
    return {prefix + name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}


def prefixed(prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in arrays.items()}


def convert(array: np.ndarray) -> Any:
    return array.item() if array.ndim == 0 else torch.from_numpy(array) if array.dtype.kind in "biuf" else array


def stored(value: Any) -> np.ndarray:
    """An array as it is in a file: int64 or float32; float64 stays."""
    array = np.asarray(value.detach() if torch.is_tensor(value) else value)
    double = torch.is_tensor(value) and value.dtype == torch.float64
    kinds = dict.fromkeys("biu", np.int64) | ({} if double else {"f": np.float32})
    return array.astype(kinds.get(array.dtype.kind, array.dtype))


def difference(expected: Any, actual: Any, rtol: float, atol: float, name: str = "") -> tuple[float, float]:
    """The largest absolute difference, and the largest in units of atol + rtol |expected|: above 1 is too much.

    NaN equals NaN alone. AssertionError if shapes, texts or keys of dictionaries differ.
    """
    try:
        expected, actual = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (expected, actual))
    except (TypeError, ValueError, RuntimeError):  # texts, or lists of several sizes
        if isinstance(expected, dict):
            assert expected.keys() == actual.keys(), f"{name}: {sorted(expected.keys() ^ actual.keys())}"
            expected, actual = list(expected.values()), [actual[key] for key in expected]
        if not isinstance(expected, (list, tuple)):
            assert np.array_equal(expected, actual), f"{name}: {actual!r} instead of {expected!r}"
            return 0.0, 0.0
        assert len(expected) == len(actual), f"{name}: {len(actual)} entries instead of {len(expected)}"
        entries = [difference(a, b, rtol, atol, name) for a, b in zip(expected, actual, strict=True)]
        return max((gap for gap, _ in entries), default=0.0), max((error for _, error in entries), default=0.0)
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    alike = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = (actual - expected).abs().nan_to_num(nan=math.inf).masked_fill(alike, 0.0)
    error = (gap / (atol + rtol * expected.abs())).nan_to_num(nan=math.inf).masked_fill(alike, 0.0)
    return (gap.max().item(), error.max().item()) if gap.numel() else (0.0, 0.0)


def entry(value: Any) -> float:
    """The largest absolute number, also in lists and dictionaries; 0 without finite numbers."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return max(map(entry, entries), default=0.0)
    return max(numbers[numbers.isfinite()].abs().flatten().tolist(), default=0.0)


class Case(dict):
    """The arrays of one case by name: 0-d arrays as Python scalars, the others as tensors.

    From a file, or from `values`. `read` has the names of the arrays that were read by name, `compared` of those that
    were compared; `in`, the names alone and `items()` do not count.
    """

    def __init__(self, path: Path, values: dict[str, Any] | None = None):
        self.path, self.fresh, companion = path, values is not None, path.with_suffix(".json")
        self.largest: dict[str, float] = {}  # largest differences that `close` has seen, of values and gradients
        self.arrays: dict[str, tuple[str, float]] = {}  # of these: name of the array, its largest entry
        self.gradients: tuple[str, ...] = ()  # patterns of gradients without "grad" in their names
        self.error: tuple[float, str] = (0.0, "")  # the largest in units of its tolerance, and its array
        self.read: set[str] = set()
        self.compared: set[str] = set()
        if values is not None:
            self.parsed = values.get("json")
            super().__init__({name: convert(x) if isinstance(x, np.ndarray) else x for name, x in values.items()})
            return
        self.parsed = json.loads(companion.read_text(encoding="utf-8")) if companion.exists() else None
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                super().__init__({name: convert(file[name]) for name in file.files})
        else:
            super().__init__(self.parsed if isinstance(self.parsed, dict) else {"json": self.parsed})

    @property
    def json(self) -> Any:
        """The whole of the .json, which is the case or stands beside its .npz; None without one."""
        if self.path.suffix == ".json":
            self.read.update(self)
        return self.parsed

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The arrays whose names start with `prefix`, as tensors, with `prefix` removed: for example a state dict."""
        return {name.removeprefix(prefix): torch.as_tensor(self[name]) for name in self if name.startswith(prefix)}

    def leaves(self, *names: str) -> dict[str, Tensor]:
        """Copies of arrays that get gradients."""
        return {name: leaf(self[name]) for name in names}

    def close(self, name: str, actual: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
        """Assert that `actual` has the shape of array `name` and differs by at most atol + rtol |expected|; by default,
        that both are equal."""
        self.compared.add(name)
        where = f"{self.path.name}, {name}"
        gap, error = difference(super().__getitem__(name), actual, rtol, atol, where)
        assert error <= 1, f"{where}: differs by {gap:.3g}, {error:.3g} times its tolerance"
        gradient = ("grad" in name and "grad_norm" not in name) or not unmatched([name], self.gradients)
        kind = "gradients" if gradient else "values"
        if gap >= self.largest.get(kind, 0.0):
            self.largest[kind], self.arrays[kind] = gap, (name, entry(super().__getitem__(name)))
        self.error = max(self.error, (error, name))

    def close_group(self, prefix: str, actual: dict[str, Any], rtol: float = 0.0, atol: float = 0.0) -> None:
        """`close` for every array under `prefix`. `actual` has names without the prefix, and may have more entries."""
        for name in [name for name in self if name.startswith(prefix)]:
            self.close(name, actual[name.removeprefix(prefix)], rtol, atol)

    def left(self, unused: tuple[str, ...] = ()) -> list[str]:
        """The arrays that were neither read nor compared, and that no pattern of `unused` matches."""
        return unmatched(self.keys() - self.read - self.compared, unused)


def unmatched(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    """The names that no pattern matches."""
    return [name for name in sorted(names) if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


class Calls:
    """Context that notes which functions are called in it."""

    def __enter__(self) -> "Calls":
        self.codes: set[CodeType] = set()
        self.before = sys.getprofile()
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_) -> None:
        sys.setprofile(self.before)

    def note(self, frame: FrameType, event: str, _) -> None:
        if event == "call":
            self.codes.add(frame.f_code)

    def missed(self, name: str) -> bool:
        """Whether a function paper.module.name, or all methods of a class, were not called.

        Constants have no calls, and those in other processes are not seen: for them, False.
        """
        paper, file, *rest = name.split(".")
        module = importlib.import_module(f"{paper}.{file}")
        found = functools.reduce(getattr, rest, module)
        methods = vars(found) | {"__init__": None} if isinstance(found, type) else {name: found}
        codes = {code for code in map(code_of, methods.values()) if code and code.co_filename == module.__file__}
        elsewhere = any(code.co_name == "in_ranks" for code in self.codes)
        return bool(codes) and not codes & self.codes and not elsewhere


def code_of(function: Any) -> CodeType | None:
    """Of a function without its decorators, or of a method; None for anything else."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    return getattr(function, "__code__", None)


class Part:
    """A part of a paper: see above."""

    files: dict[str, dict] = {}
    more: dict[str, dict] = {}
    families: tuple[str, ...] = ()
    functions = ""  # paper.module.name, apart by spaces
    only: dict[str, str] = {}  # one of `functions` -> what of it is compared, if not all
    gradients: tuple[str, ...] = ()  # patterns of gradients whose names lack "grad"
    gradient_left = False  # whether training takes a gradient of it that is not compared
    authors = ""
    no_live = ""  # why the authors' function cannot run, so that it is compared with files alone
    rtol = atol = 0.0
    tolerances: dict[str, tuple[float, float]] = {}  # pattern of names -> rtol, atol
    unused: tuple[str, ...] = ()  # patterns
    json = False  # whether the file is a .json of all values; a value "json" is the .json beside an .npz

    def __init_subclass__(cls) -> None:
        cls.families = cls.__dict__.get("families") or tuple(cls.files)
        cls.folder = cls.__module__.rpartition(".")[2]

    def ours(self, case: Case) -> dict[str, Any]:
        return self.run(self.our, case)

    def theirs(self, up: Any, case: Case) -> dict[str, Any]:
        return self.run(self.their(up), case)

    def tolerance(self, name: str, case: Case) -> tuple[float, float]:
        """(rtol, atol) of an array."""
        found = (pair for pattern, pair in self.tolerances.items() if fnmatch.fnmatchcase(name, pattern))
        return next(found, (self.rtol, self.atol))

    def called(self, case: Case) -> dict[str, Any]:
        """`ours`. AssertionError if one of `functions` did not run in it."""
        case.gradients = self.gradients
        with Calls() as calls:
            found = self.ours(case)
        missed = [name for name in self.functions.split() if calls.missed(name)]
        assert not missed, f"{type(self).__name__} did not call {', '.join(missed)}"
        assert self.only.keys() <= set(self.functions.split())
        return found

    def about(self) -> dict[str, Any]:
        """What the measurements of this part say beside the numbers."""
        about: dict[str, Any] = {"only": self.only} if self.only else {}
        return about | ({"gradient_left": True} if self.gradient_left else {})

    def compare(self, case: Case) -> None:
        """Compare all outputs of ours that the case has."""
        for name, value in self.called(case).items():
            if name in case:
                case.close(name, value, *self.tolerance(name, case))

    def left(self, case: Case) -> list[str]:
        """The arrays of a committed file that are no inputs and were not compared, and inputs that were not read."""
        inputs = seeded(functools.partial(self.inputs, **self.files[case.path.stem]))
        return unmatched(case.keys() - case.compared - (inputs.keys() & case.read), self.unused)

    def case(self, stem: str, values: dict[str, Any]) -> Case:
        """Values as they would be in a file."""
        kept = values if self.json else {name: x if name == "json" else stored(x) for name, x in values.items()}
        return Case(Path(f"{stem}.json" if self.json else f"{stem}.npz"), kept)

    def against(self, up: Any, stem: str) -> tuple[Case, dict[str, Any]]:
        """Compare ours with theirs on inputs made now -> the case, and what its file holds: inputs, their outputs."""
        inputs = seeded(functools.partial(self.inputs, **(self.files | self.more)[stem]))
        theirs = seeded(functools.partial(self.theirs, up, self.case(stem, inputs)))
        case = self.case(stem, inputs | theirs)
        ours = seeded(functools.partial(self.called, case))
        kept = set(unmatched(theirs, self.unused))
        assert kept == ours.keys(), f"{stem}: only one side has {sorted(kept ^ ours.keys())}"
        dict.update(case, theirs)  # not rounded
        for name, value in ours.items():
            case.close(name, value, *self.tolerance(name, case))
        return case, inputs | theirs


def seeded(function: Any) -> Any:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    return function()


def write(part: Part, path: Path, values: dict[str, Any]) -> None:
    """Write a case as path.npz, path.json or both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {} if part.json else {name: stored(x) for name, x in values.items() if name != "json"}
    if arrays:
        np.savez_compressed(f"{path}.npz", **arrays)
    if part.json or "json" in values:
        text = json.dumps(values if part.json else values["json"], ensure_ascii=False, indent=1)
        Path(f"{path}.json").write_text(text + "\n", encoding="utf-8")


def module(folder: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{folder}")


@functools.cache
def parts(folder: str) -> tuple[Part, ...]:
    """The parts of a paper; none if it has no adapters."""
    if not Path(__file__).with_name(f"{folder}.py").is_file():
        return ()
    found = [each for each in vars(module(folder)).values() if isinstance(each, type) and issubclass(each, Part)]
    return tuple(each() for each in found if each.files or each.more)
