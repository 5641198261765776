"""Banks of caption embeddings: how samples find their embeddings, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from short_runs import write_bank

from flame.bank import Bank
from shared import checkpoints
from shared.index import Strings


@pytest.fixture
def embeddings() -> torch.Tensor:
    """(3, 11, 4): facets of three images."""
    return F.normalize(torch.randn(3, 11, 4, generator=torch.Generator().manual_seed(0)), dim=-1).half()


@pytest.fixture
def small_bank(embeddings: torch.Tensor, tmp_path: Path) -> Path:
    """Four samples; a and c have the same captions."""
    return write_bank(tmp_path, embeddings, ["b", "a", "d", "c"], [2, 0, 1, 0])


def test_samples_of_the_same_captions_share_embeddings(small_bank: Path, embeddings: torch.Tensor):
    opened = Bank(small_bank)
    assert (opened.facets, opened.dim) == (11, 4)
    for key, i in zip("abcd", (0, 2, 0, 1), strict=True):
        assert opened[key].dtype == torch.float32 and torch.equal(opened[key], embeddings[i].float())
    opened.check(Strings.of(["d", "a"]), "--data")
    with pytest.raises(ValueError, match="no embeddings of sample e"):
        opened.check(Strings.of(["a", "e"]), "--data")
    with pytest.raises(ValueError, match="no embeddings of sample aa"):
        opened["aa"]


def test_keys_that_occur_twice_are_refused(small_bank: Path):
    """A bank finds captions by key: a second sample of a key would get the first one's."""
    opened = Bank(small_bank)
    with pytest.raises(ValueError, match="key a occurs twice in --data"):
        opened.check(Strings.of(["a", "b", "a"]), "--data")
    keys = Strings.of(["b", "a", "d", "a"])
    np.save(small_bank / "keys.npy", keys.text)
    np.save(small_bank / "ends.npy", keys.ends)
    with pytest.raises(ValueError, match=f"sample key a occurs twice in {small_bank}"):
        Bank(small_bank).check(Strings.of(["d", "b"]), "--data")


@pytest.mark.parametrize("name", ["index.json", "rows.npy", "keys.npy", "embeddings.npy"])
def test_damaged_banks_are_named(small_bank: Path, name: str):
    (small_bank / name).write_bytes((small_bank / name).read_bytes()[:9])
    with pytest.raises(ValueError, match=name):
        Bank(small_bank)


@pytest.mark.parametrize("rows", [[2, 0, 3, 0], [2, 0, 1]], ids=["too few embeddings", "too few rows"])
def test_files_that_do_not_fit_each_other_are_refused(small_bank: Path, rows: list[int]):
    np.save(small_bank / "rows.npy", np.array(rows))
    with pytest.raises(ValueError, match="is damaged"):
        Bank(small_bank)


def test_another_bank_has_another_digest(small_bank: Path):
    before = Bank(small_bank).digest
    assert Bank(small_bank).digest == before
    checkpoints.write_json(small_bank / "index.json", {"llm": "b"})
    assert Bank(small_bank).digest != before


def test_a_bank_that_was_only_begun_or_is_none(small_bank: Path, tmp_path: Path):
    np.save(small_bank / "done.npy", np.array([True, False]))
    with pytest.raises(ValueError, match="is not finished"):
        Bank(small_bank)
    (begun := tmp_path / "begun").mkdir()
    with pytest.raises(ValueError, match="flame.embed"):
        Bank(begun)
    (begun / ".lock").touch()
    with pytest.raises(ValueError, match="no embeddings yet"):
        Bank(begun)
