"""python -m attentive_mask_clip.pack_yfcc writes SLIP's YFCC15M as shards and counts damaged images."""

import errno
import io
import json
import multiprocessing
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scripts import ended, finished, kill_when, one_sentence

from attentive_mask_clip import pack_yfcc
from attentive_mask_clip.crops import title_and_description
from attentive_mask_clip.pack_yfcc import caption_file, clean, read_metadata
from shared import data
from shared.errors import UserError

SCRIPT = "attentive_mask_clip.pack_yfcc"


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8 + number % 5, 8), (number % 256, number // 256 % 256, 90)).save(file, "JPEG")
    return file.getvalue()


def tree(root: Path, rows: list[tuple], images: dict[int, bytes]) -> Path:
    """Write yfcc15m.pkl with `rows`, and zips with `images` by number, in SLIP's layout."""
    for number, content in images.items():
        path = root / f"images/{number // 10**6:02}/{number // 1000 % 1000:03}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{number % 1000:03}.jpg", content)
    (root / "yfcc15m.pkl").write_bytes(pickle.dumps(rows))
    return root


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def large(folder: Path) -> Path:
    """300 images in three zips."""
    numbers = range(71_000_900, 71_002_400, 5)
    return tree(folder / "large", [(n, f"title {n}", "more\n\nof it") for n in numbers], {n: jpeg(n) for n in numbers})


def command(root: Path, out: Path, size: int = 4, workers: int = 1) -> list:
    return [root / "yfcc15m.pkl", "--root", root, "--out", out, "--shard-size", size, "--workers", workers]


# ---------------------------------------------------------------------------------------------------------- captions

SUNSET = ("Sunset", "Taken in Rome.\n\nWith my brother...")  # unquoted, a description has line breaks


@pytest.mark.parametrize(
    ("title", "description", "captions"),
    [
        (*SUNSET, ["Sunset", "Taken in Rome. With my brother..."]),
        ("<b>Big</b> <a href='x'>sea</a>", "see http://x.y/z?a=1 or www.x.y <i>now</i>", ["Big sea", "see or now"]),
        ("", "of it\r\n", ["of it"]),
        ("of it", " \n <b></b> http://x.y", ["of it"]),
        ("two\nlines", "", ["two lines"]),
        ("", "\n\n", []),
        ("\udc80", "lone surrogate", ["?", "lone surrogate"]),
    ],
)
def test_title_and_description_survive_the_caption_file(title: str, description: str, captions: list[str]):
    text = caption_file(title, description).decode()
    assert title_and_description(text) == captions and text.count("\n") == max(len(captions) - 1, 0)


def test_cleaning_twice_is_cleaning_once():
    for text in (*SUNSET, "a < b > c", "httpx www", "<address>here</address>", "C++ & 50% off"):
        assert clean(clean(text)) == clean(text)
    assert clean("C++ & 50% off") == "C++ & 50% off"  # no second unquoting


# ---------------------------------------------------------------------------------------------------------- metadata


def test_metadata_is_sorted_by_number(tmp_path: Path):
    rows = [(12345678, "b", ""), [7, "a", "c"]]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(rows))
    assert [tuple(row) for row in read_metadata(tmp_path / "x.pkl")] == [(7, "a", "c"), (12345678, "b", "")]


class Malicious:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_nothing_but_plain_values_is_unpickled(tmp_path: Path):
    victim, path = tmp_path / "victim", tmp_path / "x.pkl"
    cases = {
        "pathlib": [(1, Malicious(victim), "")],
        "collections.OrderedDict": [OrderedDict(a=1)],
        "numpy": [(np.int64(1), "title", "")],
        "no list": {"a": 1},
        "entry 1": [(1, "a", "b"), (2, "a")],
        "entry 0": [(10**8, "a", "b")],
        "entry 2": [(1, "a", "b"), (2, "a", "b"), (3, None, "b")],
    }
    for message, rows in cases.items():
        path.write_bytes(pickle.dumps(rows))
        with pytest.raises(ValueError, match=message):
            read_metadata(path)
    for content in (b"", b"no pickle", pickle.dumps([(1, "a", "b")])[:-3], b"\x80\x04cos\nsystem\n(S'true'\ntR."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no yfcc15m.pkl"):
            read_metadata(path)
    assert not victim.exists()


# ------------------------------------------------------------------------------------------------------------ shards


def test_shards_hold_what_can_be_read_and_the_rest_is_counted(in_process, tmp_path: Path):
    broken_zip, wrong_sum = 23_000_000, 24_000_000
    images = {n: jpeg(n) for n in (0, 1, 4, 999, 12345678, 98_765_432)} | {2: b"no image", wrong_sum: jpeg(2)}
    rows = [
        (12345678, *SUNSET),
        (0, "", "a description alone"),
        (1, "<b>a title</b> alone", "http://x.y"),
        (2, "no image", ""),
        (3, "not in its zip", ""),
        (4, "", "www.x.y"),
        (999, "the last of its zip", ""),
        (broken_zip, "in a broken zip", ""),
        (wrong_sum, "its checksum is wrong", ""),
        (98_765_432, "the last", "of all"),
        (99_999_999, "its zip is missing", ""),
    ]
    root, out = tree(tmp_path / "yfcc", rows, images), tmp_path / "out"
    (root / "images/23").mkdir()
    (root / "images/23/000.zip").write_bytes(b"no zip")
    path = root / "images/24/000.zip"
    content = bytearray(path.read_bytes())
    content[60] ^= 1  # in the file's data, behind its header of 30 + 7 bytes
    path.write_bytes(content)

    result = finished(in_process(*command(root, out)))
    assert "5 pairs of 11 images" in result.out
    for line in ("images/99/999.zip", "images/23/000.zip"):
        assert line in result.out
    reasons = ("missing image", "empty caption", "damaged in its zip", "missing zip", "damaged zip")
    assert all(f"1 {reason}" in result.out for reason in reasons) and "1 unreadable image: " in result.out
    pairs = data.open_pairs(str(out), cache=tmp_path / "cache")
    assert pairs.keys.tolist() == ["00000000", "00000001", "00000999", "12345678", "98765432"] and not pairs.broken
    read = {pair.key: pair for pair in map(pairs.read, range(len(pairs)))}
    assert title_and_description(read["12345678"].caption) == ["Sunset", "Taken in Rome. With my brother..."]
    assert read["00000000"].caption == "a description alone" and read["00000001"].caption == "a title alone"
    for key, pair in read.items():
        assert np.array_equal(pair.image, Image.open(io.BytesIO(images[int(key)])))
    stats = json.loads((out / "00000_stats.json").read_text())
    assert (stats["rows"], stats["pairs"], stats["left_out"]["missing image"]) == (4, 2, 1)
    command_line = result.out.splitlines()[-1]
    assert f"--data '{out}/{{00000..00002}}.tar' --dataset-size 5" in command_line


@pytest.mark.parametrize(("place", "value"), [(6, 1), (8, 99), (8, 14)])
def test_files_that_zipfile_cannot_read_are_reported(tmp_path: Path, place: int, value: int):
    """Encrypted, of an unknown method, of a wrong method; both headers of the first file say so."""
    path = tree(tmp_path, [], {0: jpeg(0), 1: jpeg(1)}) / "images/00/000.zip"
    content = bytearray(path.read_bytes())
    for header in (0, content.index(b"PK\1\2") + 2):
        content[header + place] = value
    path.write_bytes(content)
    assert list(pack_yfcc.zipped(path, ["000.jpg", "001.jpg"])) == [(b"", "damaged in its zip"), (jpeg(1), "")]


def test_running_out_of_memory_ends_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Running out of memory ends the run; images that could be read later are not left out."""
    path = tree(tmp_path, [], {0: jpeg(0)}) / "images/00/000.zip"
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        list(pack_yfcc.zipped(path, ["000.jpg"]))


def test_temporary_read_errors_end_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A zip that a network drive could not give is neither missing nor damaged: its images are not left out."""
    path = tree(tmp_path, [], {0: jpeg(0)}) / "images/00/000.zip"
    for method in ("read", "__init__"):
        with monkeypatch.context() as patched:
            stale = OSError(errno.ESTALE, "Stale file handle")
            patched.setattr(zipfile.ZipFile, method, lambda *_, error=stale: (_ for _ in ()).throw(error))
            patched.setattr(zipfile.ZipFile, "__del__", lambda _: None)
            with pytest.raises(
                UserError, match=r"000.zip could not be read \(Stale file handle\): run the command again"
            ):
                list(pack_yfcc.zipped(path, ["000.jpg"]))


def test_packing_resumes_and_writes_missing_shards(in_process, large: Path, folder: Path):
    out = folder / "again"
    finished(in_process(*command(large, out, size=50)))
    before, times = files(out), {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "00003_stats.json").unlink()
    (out / "00004.tar").unlink()  # its statistics alone are no shard
    (out / "00005.tar").write_bytes(b"half")
    (out / "00005_stats.json").unlink()
    finished(in_process(*command(large, out, size=50)))
    assert files(out) == before
    for path in out.glob("0000[012]*"):
        assert path.stat().st_mtime_ns == times[path.name]
    assert len(data.open_pairs(str(out), cache=folder / "cache")) == 300


def test_several_processes_make_the_same_shards(large: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The processes are forks of the tests' server, which start fast; jobs are still pickled."""
    contexts = {"spawn": multiprocessing.get_context("forkserver")}
    monkeypatch.setattr(pack_yfcc, "multiprocessing", SimpleNamespace(get_context=contexts.get))
    outs = [folder / f"workers-{n}" for n in (1, 2)]
    for workers, out in enumerate(outs, 1):
        pack_yfcc.main(
            pack_yfcc.Config(str(large / "yfcc15m.pkl"), str(large), str(out), shard_size=75, workers=workers)
        )
    assert files(outs[0]) == files(outs[1]) and len(list(outs[0].glob("*.tar"))) == 4


def test_packing_resumes_after_kill(cli, start, large: Path, folder: Path):
    outs = [folder / "whole", folder / "killed"]
    finished(cli(*command(large, outs[0], size=3)))
    for shards in sorted(random.sample(range(1, 60), 2)):
        process = start(*command(large, outs[1], size=3))
        kill_when(process, lambda n=shards: len(list(outs[1].glob("*_stats.json"))) >= n)
    finished(ended(start(*command(large, outs[1], size=3))))
    whole, killed = map(files, outs)
    assert {name: content for name, content in killed.items() if not name.endswith(".tmp")} == whole


def test_command_lines_end_in_one_sentence(in_process, large: Path, folder: Path, tmp_path: Path):
    made = folder / "made"
    finished(in_process(*command(large, made, size=150)))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/00000.tar").write_bytes(b"")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/00000_stats.json").write_text('{"count": 3}')  # of img2dataset
    empty = tree(tmp_path / "empty", [(1, "a", "b")], {2: jpeg(2)})
    wrong = {
        "shard_size (was 150, now 100)": command(large, made, size=100),
        "did not write": command(large, tmp_path / "foreign"),
        "no statistics": command(large, tmp_path / "theirs"),
        "has no folder images": [large / "yfcc15m.pkl", "--root", large / "images", "--out", tmp_path / "a"],
        "make_dataset.py": [large / "x.pkl", "--root", large, "--out", tmp_path / "b"],
        "--shard-size must be at least 1": command(large, tmp_path / "c", size=0),
        "none of the images": command(empty, tmp_path / "d"),
    }
    for message, arguments in wrong.items():
        result = in_process(*arguments)
        assert result.code == 2 and message in result.err and one_sentence(result.err), (message, result.err)
    assert (tmp_path / "foreign/00000.tar").read_bytes() == b""


def test_the_size_of_a_trial(in_process, large: Path, tmp_path: Path):
    finished(in_process(*command(large, tmp_path / "out", size=10), "--dataset-size", "15"))
    stats = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*_stats.json"))]
    assert [each["pairs"] for each in stats] == [10, 5]
    assert pack_yfcc.stats_file(str(tmp_path / "out"), 1).exists()
