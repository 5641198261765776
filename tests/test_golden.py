"""Every golden case file is claimed by a test (see conftest.py)."""

from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import Case, case_files, claims, family

from shared import checkpoints, evaluation, run, zeroshot
from shared.presets import folders
from tests import adapters


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    files = [(folder, file) for folder in folders() for file in case_files(metafunc.config, folder)]
    if "file" in metafunc.fixturenames:
        metafunc.parametrize("folder, file", files, ids=[f"{folder}/{file.name}" for folder, file in files])


def test_a_test_claims_the_case(folder: str, file: Path):
    assert family(file, claims()[folder]), f"no test claims {file}: is its name that of a known family?"


def test_every_family_is_claimed_by_a_test_of_its_own_folder():
    assert set(claims()) == set(folders())


def test_arrays_that_a_test_leaves_alone_are_known(tmp_path):
    np.savez(tmp_path / "case.npz", x=np.ones(2), y=np.ones(2), **{"in/a": np.ones(1), "in/b": np.ones(1)})
    case = Case(tmp_path / "case.npz")
    assert "x" in case and list(case) == ["x", "y", "in/a", "in/b"] and len(case.items()) == 4
    assert case.left() == ["in/a", "in/b", "x", "y"]  # a name alone is not a comparison
    case.close("x", np.ones(2))
    assert case.left(("in/*",)) == ["y"] and case.left(("in/*", "y")) == []
    assert len(case.group("in/")) == 2 and case.left() == ["y"]
    assert case.get("y") is not None and case.left() == []
    assert case.compared == {"x"} and case.read == {"y", "in/a", "in/b"}
    (tmp_path / "texts.json").write_text('["a", "b"]', encoding="utf-8")
    case = Case(tmp_path / "texts.json")
    assert case.left() == ["json"] and case.json == ["a", "b"] and case.left() == []


class Sum(adapters.Part):
    files = {"case": {}}

    def inputs(self):
        return {"x": torch.ones(2), "factor": 2}

    def ours(self, case):
        return {"sum": case["x"].sum() + 0 * case["mean"]}


def test_outputs_have_to_be_compared_and_inputs_read(tmp_path: Path):
    np.savez(tmp_path / "case.npz", x=np.ones(2), factor=2, sum=2.0, mean=1.0)
    case = Case(tmp_path / "case.npz")
    Sum().compare(case)
    assert case.compared == {"sum"} and Sum().left(case) == ["factor", "mean"]


class Percent(Sum):
    files = {"case": {}}
    functions = "shared.zeroshot.percent"

    def ours(self, case):
        return {"sum": zeroshot.percent(case["x"] > 0) - 98}


class Encoded(Percent):
    files = {"case": {}}
    functions = "shared.zeroshot.percent shared.zeroshot.encode_texts shared.run.Stopwatch"


def test_functions_that_a_part_names_have_to_run(tmp_path: Path):
    np.savez(tmp_path / "case.npz", x=np.ones(2), sum=2.0)
    Percent().compare(Case(tmp_path / "case.npz"))
    with pytest.raises(AssertionError, match="encode_texts, shared.run.Stopwatch$"):
        Encoded().compare(Case(tmp_path / "case.npz"))


def test_the_largest_differences_of_a_case_are_known(tmp_path: Path):
    """Of values and gradients, each with its array and this array's largest entry; a norm of gradients is a value."""
    np.savez(tmp_path / "case.npz", x=np.array([3.0, -8]), grad_x=np.ones(2), grad_norm=4.0, dz=np.ones(2))
    case = Case(tmp_path / "case.npz")
    case.gradients = ("dz",)
    for name, gap in (("x", 0.25), ("grad_x", 0.0), ("grad_norm", 0.125), ("dz", 0.5)):
        case.close(name, torch.as_tensor(case[name]) + gap, atol=1)
    assert case.largest == {"values": 0.25, "gradients": 0.5}
    assert case.arrays == {"values": ("x", 8.0), "gradients": ("dz", 1.0)}
    assert adapters.entry({"a": ["text", [1, -2]], "b": float("nan")}) == 2


def test_differences_of_nested_values():
    theirs = {"a": [1.0, [2.0, 4.0]], "b": "text", "c": [torch.ones(2), torch.zeros(3)], "d": np.array(["x"])}
    ours = {"a": [1.0, [2.0, 4.5]], "b": "text", "c": [torch.ones(2), torch.zeros(3)], "d": np.array(["x"])}
    assert adapters.difference(theirs, ours, 0.125, 0.5) == (0.5, 0.5)
    assert adapters.difference([0.5, 1.0], [0.5, 1 + 2**-50], 0, 1)[0] == 2**-50  # lists and numbers are float64
    assert adapters.difference(1.0, 1 + 2**-50, 0, 1)[0] == 2**-50
    for number in (5.5, float("nan")):
        assert adapters.difference(theirs, ours | {"a": [1.0, [2.0, number]]}, 0.125, 0.5)[1] > 1
    for wrong in ({"b": "Text"}, {"c": [torch.ones(2)]}, {"d": np.array(["y"])}, {"e": 0}):
        with pytest.raises(AssertionError):
            adapters.difference(theirs, ours | wrong, 0.125, 0.5)


def test_a_written_case_is_read_as_it_was(tmp_path: Path):
    values = {"n": 3, "x": torch.ones(2) / 3, "lr": 0.1, "y": torch.ones(2, dtype=torch.float64), "json": ["\u732b"]}
    adapters.write(adapters.Part(), tmp_path / "case", values)
    found = Case(tmp_path / "case.npz")
    assert found.json == ["\u732b"] and found["n"] == 3 and found["lr"] == np.float32(0.1)
    assert found["x"].equal(values["x"]) and found["y"].equal(values["y"])


def helper():
    return checkpoints.State({})["a"]


def test_functions_that_a_test_uses_are_named_with_their_module():
    """Names include the module, because companion pages match them with the functions of a row and several files share
    bare names."""

    def sample():
        evaluation.table([{"a": run.Stopwatch()}])
        helper()

    used = {"shared.evaluation.table", "shared.run.Stopwatch", "shared.checkpoints.State"}
    assert conftest.functions_in(sample) == used
    names = ["run.Stopwatch.read", "table", "none", "none.such"]  # a module by its own name, a function as imported
    found = conftest.named_functions(names, {"table": evaluation.table}, "shared")
    assert found == {"shared.run.Stopwatch.read", "shared.evaluation.table"}
