"""Builders write complete folders or none, and masks are read back unchanged."""

import errno
import io
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared import checkpoints, data, layout
from studies.corpora import masks


def write(folder: Path) -> dict:
    samples = [
        {"png": layout.png(np.full((4, 6, 3), i, np.uint8)), "txt": f"grey {i}", "json": {"grey": i}} for i in (7, 9)
    ]
    return {"counts": {"train": layout.write_pairs(folder / "train", samples)}}


def test_a_folder_is_made_once_with_one_setting(tmp_path: Path, capsys: pytest.CaptureFixture):
    for _ in range(2):
        layout.build(tmp_path / "corpus", {"side": (4, 6)}, write)
    built, complete = capsys.readouterr().out.splitlines()
    assert "train 2" in built and f"{tmp_path}/corpus is complete" in complete
    manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
    assert manifest["setting"] == {"side": [4, 6]} and list(manifest["sha256"]) == ["train/00000.tar"]
    with pytest.raises(ValueError, match=r"side \(was \[4, 6\], now 5\)"):
        layout.build(tmp_path / "corpus", {"side": 5}, write)
    pairs = data.open_pairs(str(tmp_path / "corpus/train"))
    assert [pairs.caption(row) for row in range(2)] == ["grey 7", "grey 9"]
    assert pairs.read(1).image.size == (6, 4) and pairs.read(1).image.getpixel((0, 0)) == (9, 9, 9)


def test_nothing_is_left_of_a_build_that_failed(tmp_path: Path):
    def fail(folder: Path) -> dict:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layout.build(tmp_path / "corpus", {}, fail)
    assert files(tmp_path) == []
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="remove .*/corpus .*another --out"):
        layout.build(tmp_path / "corpus", {}, write)
    (tmp_path / "corpus/manifest.json").write_text('{"setting": 3}')
    with pytest.raises(ValueError, match="other settings: side"):
        layout.build(tmp_path / "corpus", {"side": 5}, write)


def test_a_full_disk_is_named_with_the_corpus(tmp_path: Path):
    def fail(folder: Path) -> dict:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail_in_a_shard(folder: Path) -> dict:
        with checkpoints.replaced(folder / "0.tar"):
            fail(folder)

    for failing in (fail, fail_in_a_shard):
        with pytest.raises(ValueError, match="/corpus .*No space left"):
            layout.build(tmp_path / "corpus", {}, failing)
        assert files(tmp_path) == []


def test_a_second_process_waits_and_finds_the_corpus(tmp_path: Path, capsys: pytest.CaptureFixture):
    first = multiprocessing.get_context("fork").Process(target=layout.build, args=(tmp_path / "corpus", {}, slowly))
    first.start()
    while not (tmp_path / ".corpus-unfinished/train").exists():
        time.sleep(0.01)
    layout.build(tmp_path / "corpus", {}, write)
    first.join()
    said = capsys.readouterr().out
    assert "waiting" in said and "is complete" in said
    assert json.loads((tmp_path / "corpus/manifest.json").read_text())["counts"] == {"by the first": 1}
    assert files(tmp_path) == ["corpus"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    first = multiprocessing.get_context("fork").Process(target=layout.build, args=(tmp_path / "corpus", {}, wait))
    first.start()
    while not (tmp_path / ".corpus-unfinished/train").exists():
        time.sleep(0.01)
    first.kill()
    first.join()
    (tmp_path / ".corpus-unfinished/train/00001.tar").write_bytes(b"half")
    layout.build(tmp_path / "corpus", {}, write)
    assert files(tmp_path) == ["corpus"] and files(tmp_path / "corpus/train") == ["00000.tar"]


def files(folder: Path) -> list[str]:
    """Without the lock's file, which older versions of filelock delete."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def slowly(folder: Path) -> dict:
    write(folder)
    time.sleep(0.5)
    return {"counts": {"by the first": 1}}


def wait(folder: Path) -> dict:
    write(folder)
    time.sleep(600)


@pytest.mark.parametrize(("classes", "kind", "nothing"), [(3, np.uint8, 255), (300, np.uint16, 65535)])
def test_masks_hold_labels_and_the_largest_value_for_none(classes: int, kind: type, nothing: int):
    mask = np.asarray(Image.open(io.BytesIO(masks.mask_png(np.array([[0, -1], [classes - 1, 1]]), classes))))
    assert mask.tolist() == [[0, nothing], [classes - 1, 1]] and mask.max() <= np.iinfo(kind).max


def test_two_images_do_not_share_a_mask(tmp_path: Path):
    labels = np.zeros((4, 6), int)
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png would share"):
        masks.write_masks(tmp_path, ["dog"], [("a.jpg", b"", labels), ("b.jpg", b"", labels), ("a.png", b"", labels)])
