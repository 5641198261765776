"""The index of a data set: strings as bytes and ends; built once per machine, and again after a shard changes."""

import copy
import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from shards import pair, write_tar

from shared import data, index


def test_strings_are_read_like_a_list():
    words = ["a", "", "caf\u00e9", "\udcff", "long " * 300]
    strings = index.Strings.of(words)
    assert strings.tolist() == list(strings) == words and len(strings) == 5
    assert strings[2] == strings[-3] == "caf\u00e9" and strings[np.int64(0)] == "a"
    assert strings[[4, 0]].tolist() == [words[4], "a"] and strings[::-1].tolist() == words[::-1]
    assert strings.equals(index.Strings.of(words)) and not strings.equals(index.Strings.of(words[::-1]))
    assert strings.head(2).equals(index.Strings.of(["a", ""])) and not strings.equals(strings.head(4))
    assert strings.head(2).tolist() == ["a", ""] and strings.head(None).tolist() == words
    assert strings.text.nbytes < 1600  # one long string does not make the others long
    with pytest.raises(IndexError):
        strings[5]


def test_files_are_hashed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index, "CHUNK", 4)
    for content in (b"", b"four", b"more than four"):
        (tmp_path / "file").write_bytes(content)
        assert index.file_fingerprint(tmp_path / "file") == index.fingerprint(content)


def test_rows_of_strings_are_found():
    words = [
        "",
        "a",
        "b",
        "ab",
        "ba",
        "a\0",
        "\0a",
        "caf\u00e9",
        "\udcff",
        *(f"{i:05d}" for i in range(300)),
        "long " * 300,
    ]
    lookup, wanted = index.Lookup(index.Strings.of(words)), [*words[::-1], "none", "aa", "00300", "long " * 299]
    expected = [words.index(word) if word in words else -1 for word in wanted]
    assert lookup.find(index.Strings.of(wanted)).tolist() == expected
    assert [lookup.row(word) for word in wanted] == expected and lookup.twice() is None
    assert lookup.find(index.Strings.of([])).tolist() == []
    again = index.Lookup(index.Strings.of(["x", "y", "z", "y"]))
    assert again.row("y") == 1 and again.twice() in (1, 3)
    nothing = index.Lookup(index.Strings.of([]))
    assert nothing.find(index.Strings.of(["x"])).tolist() == [-1] and nothing.row("x") == -1 and nothing.twice() is None


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(index, "LARGE", 0)
    files = [[*pair(f"{i}-{j}", f"caption {i} {j}")] for i in range(3) for j in range(4)]
    return [str(write_tar(tmp_path / f"{i}.tar", *sum(files[4 * i : 4 * i + 4], []))) for i in range(3)]


def test_an_index_is_made_once_and_mapped(shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = data.Shards(shards)
    first = data.Shards(shards, cache=tmp_path / "cache")
    monkeypatch.setattr(index, "index_shard", None)  # what follows may not read a header
    again = data.Shards(shards, cache=tmp_path / "cache")
    assert isinstance(again._spans, np.memmap) and isinstance(again.keys.text, np.memmap)
    for pairs in (first, again, copy.copy(again)):
        assert pairs.keys.tolist() == plain.keys.tolist() and pairs.fingerprint == plain.fingerprint
        assert pairs.read(7).caption == "caption 1 3" and pairs.rows_of(2) == range(8, 12)
    few = data.Shards(shards, limit=5, cache=tmp_path / "cache")
    assert len(few) == 5 and few.rows_of(1) == range(4, 5) and few.rows_of(2) == range(5, 5)
    assert few.fingerprint != plain.fingerprint


def test_a_changed_shard_is_indexed_anew_and_the_old_index_goes(shards: list[str], tmp_path: Path):
    cache = tmp_path / "cache"
    before = data.Shards(shards, cache=cache)
    write_tar(Path(shards[1]), *pair("new", "another one"))
    os.utime(shards[1], (time.time() + 5, time.time() + 5))
    (old,) = (path for path in (cache / "index").iterdir() if path.is_dir())
    os.utime(old, (0, 0))  # nobody has wanted it for long
    after = data.Shards(shards, cache=cache)
    assert len(after) == 9 and after.keys[4] == "new" and after.fingerprint != before.fingerprint
    assert len([path for path in (cache / "index").iterdir() if path.is_dir()]) == 1
    assert before.keys[4] == "1-0"  # what is mapped stays readable


def test_a_cache_that_cannot_be_written_is_done_without(shards: list[str], tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert len(data.Shards(shards, cache=tmp_path / "file")) == 12


def test_where_nothing_can_be_locked_the_index_is_made_all_the_same(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def without_locks(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    assert isinstance(data.Shards(shards, cache=tmp_path / "cache")._spans, np.memmap)


def test_small_data_sets_leave_no_index(shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index, "LARGE", 2**28)
    data.Shards(shards, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def open_and_count(shards: list[str], cache: Path, counter: Path, start) -> None:
    index.LARGE = 0
    read = index.index_shard

    def counted(path: str):
        with open(counter, "a") as file:
            file.write("x")
        time.sleep(0.05)
        return read(path)

    index.index_shard = counted
    start.wait()
    assert len(data.Shards(shards, cache=cache)) == 12


def test_processes_that_start_together_index_once(shards: list[str], tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(3)
    arguments = shards, tmp_path / "cache", tmp_path / "count", start
    processes = [fork.Process(target=open_and_count, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "xxx"  # three shards, by one process


def test_a_table_is_read_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index, "LARGE", 0)
    (tmp_path / "t.tsv").write_text("title\tfilepath\na caf\u00e9\tx.png\n\ty.png\n", encoding="utf-8")
    plain = data.TSV(str(tmp_path / "t.tsv"))
    mapped = data.TSV(str(tmp_path / "t.tsv"), cache=tmp_path / "cache")
    monkeypatch.setattr(data, "read_table", None)
    again = data.TSV(str(tmp_path / "t.tsv"), cache=tmp_path / "cache")
    for pairs in (mapped, again):
        assert isinstance(pairs.keys.text, np.memmap) and pairs.fingerprint == plain.fingerprint
        assert pairs.keys.tolist() == ["x.png", "y.png"] and [pairs.caption(i) for i in (0, 1)] == ["a caf\u00e9", ""]
