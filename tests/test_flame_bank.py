"""Banks of caption embeddings: ours with a few embeddings, and the authors' format with one file per image."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flame.bank import AuthorsBank, Bank, centred, open_bank, sums
from shared import checkpoints
from shared.index import Strings, fingerprint


@pytest.fixture
def embeddings() -> torch.Tensor:
    """(3, 11, 4): facets of three images."""
    return F.normalize(torch.randn(3, 11, 4, generator=torch.Generator().manual_seed(0)), dim=-1).half()


@pytest.fixture
def small_bank(embeddings: torch.Tensor, tmp_path: Path) -> Path:
    """Four samples; a and c have the same captions. The first shard holds two embeddings, the second one."""
    checkpoints.write_json(tmp_path / "index.json", {"shards": 2, "shard_size": 2, "rows": 11, "dim": 4})
    keys = Strings.of(["b", "a", "d", "c"])
    np.save(tmp_path / "keys.npy", keys.text)
    np.save(tmp_path / "ends.npy", keys.ends)
    np.save(tmp_path / "rows.npy", np.array([2, 0, 1, 0]))
    for shard, part in enumerate(embeddings.split(2)):
        np.save(tmp_path / f"{shard:05d}.npy", part.numpy())
    np.save(tmp_path / "centres.npy", (sums(embeddings.numpy(), slice(4, 11)) / 3).astype(np.float32))
    return tmp_path


def test_samples_of_the_same_captions_share_embeddings(small_bank: Path, embeddings: torch.Tensor):
    opened = open_bank(small_bank)
    assert isinstance(opened, Bank) and (opened.facets, opened.dim) == (11, 4)
    for key, i in zip("abcd", (0, 2, 0, 1), strict=True):
        assert opened[key].dtype == torch.float32 and torch.equal(opened[key], embeddings[i].float())
    opened.check(Strings.of(["d", "a"]))
    with pytest.raises(ValueError, match="no embeddings of sample e"):
        opened.check(Strings.of(["a", "e"]))
    with pytest.raises(ValueError, match="no embeddings of sample aa"):
        opened["aa"]


def test_keys_that_occur_twice_are_refused(small_bank: Path):
    """A bank finds captions by key: a second sample of a key would get the first one's."""
    opened = Bank(small_bank)
    with pytest.raises(ValueError, match="sample key a occurs twice in --data"):
        opened.check(Strings.of(["a", "b", "a"]))
    keys = Strings.of(["b", "a", "d", "a"])
    np.save(small_bank / "keys.npy", keys.text)
    np.save(small_bank / "ends.npy", keys.ends)
    with pytest.raises(ValueError, match=f"sample key a occurs twice in {small_bank}"):
        Bank(small_bank).check(Strings.of(["d", "b"]))


def test_caption_files_that_have_changed_are_named(small_bank: Path, tmp_path: Path):
    """A file that is gone, as on another machine, passes."""
    file, opened = tmp_path / "long.json", Bank(small_bank)
    file.write_text("[]")
    checkpoints.write_json(small_bank / "captions.json", {str(file): fingerprint(b"[]")})
    opened.check_captions()
    file.write_text("[ ]")
    with pytest.raises(ValueError, match="long.json has changed since the bank .* was made from it: embed it again"):
        opened.check_captions()
    file.unlink()
    opened.check_captions()


@pytest.mark.parametrize("name", ["index.json", "00001.npy", "rows.npy", "keys.npy", "a shard of another width"])
def test_damaged_banks_are_named(small_bank: Path, name: str):
    if name.endswith("width"):
        np.save(small_bank / "00001.npy", np.zeros((1, 11, 5), np.float16))
        name = "00001.npy"
    else:
        (small_bank / name).write_bytes((small_bank / name).read_bytes()[:20])
    with pytest.raises(ValueError, match=name):
        Bank(small_bank)


def test_a_bank_with_too_few_embeddings_is_named(small_bank: Path):
    np.save(small_bank / "rows.npy", np.array([2, 0, 3, 0]))
    with pytest.raises(ValueError, match="is damaged: it has 3 embeddings, and rows.npy needs 4"):
        Bank(small_bank)
    np.save(small_bank / "rows.npy", np.array([2, 0, 1]))
    with pytest.raises(ValueError, match="is damaged: rows.npy is of 3 samples, keys.npy of 4"):
        Bank(small_bank)


def test_another_bank_has_another_digest(small_bank: Path):
    before = Bank(small_bank).digest
    assert Bank(small_bank).digest == before
    np.save(small_bank / "centres.npy", np.zeros((12, 4), np.float32))
    assert Bank(small_bank).digest != before


def test_older_banks_hold_arrays_of_strings(small_bank: Path, embeddings: torch.Tensor):
    np.save(small_bank / "keys.npy", np.array(["a", "b", "c", "long" * 9]))
    np.save(small_bank / "rows.npy", np.array([0, 2, 0, 1]))
    (small_bank / "ends.npy").unlink()
    opened = Bank(small_bank)
    assert torch.equal(opened["b"], embeddings[2].float()) and torch.equal(opened["long" * 9], embeddings[1].float())


def test_centres_are_means_over_images(small_bank: Path, embeddings: torch.Tensor):
    centres = Bank(small_bank).centres
    torch.testing.assert_close(centres[:11], embeddings.float().mean(0), rtol=0, atol=1e-6)
    of_long = F.normalize(embeddings[:, 4:].float().mean(1), dim=-1)  # what stands for a long caption in evaluation
    torch.testing.assert_close(centres[11], of_long.mean(0), rtol=0, atol=1e-6)
    without = centred(embeddings.float(), centres[:11])
    torch.testing.assert_close(without.norm(dim=-1), torch.ones(3, 11))
    torch.testing.assert_close(without, F.normalize(embeddings.float() - centres[:11], dim=-1))


def test_a_bank_that_was_only_begun(tmp_path: Path):
    (tmp_path / ".lock").touch()
    with pytest.raises(ValueError, match="has no embeddings yet: 'python -m flame.embed' was stopped; run it again"):
        open_bank(tmp_path)


@pytest.mark.parametrize("file, message", [("00001.npy", "shard 1 is missing"), ("centres.npy", "is not finished")])
def test_banks_that_are_not_finished_are_refused(small_bank: Path, file: str, message: str):
    (small_bank / file).unlink()
    with pytest.raises(ValueError, match=message):
        open_bank(small_bank)


def test_a_folder_without_bank_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="make it with 'python -m flame.embed'"):
        open_bank(tmp_path)


def test_authors_banks_are_read(tmp_path: Path):
    for key, home in (("000001234", "00000"), ("123_456", "123")):
        (tmp_path / home).mkdir()
        torch.save(torch.arange(22.0).view(11, 2).half(), tmp_path / home / f"{key}.pth")
    theirs = open_bank(tmp_path)
    assert isinstance(theirs, AuthorsBank) and (theirs.facets, theirs.dim) == (11, 2)
    assert theirs["000001234"].dtype == torch.float32 and torch.equal(theirs["123_456"][10], torch.tensor([20.0, 21.0]))
    with pytest.raises(ValueError, match="000009.pth is missing"):
        theirs["000009"]
    theirs.check(Strings.of(["000001234", "123_456"]))
    with pytest.raises(ValueError, match="000009.pth is missing"):
        theirs.check(Strings.of(["000001234", "000009", "123_456"]))
