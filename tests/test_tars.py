"""Shards as untrusted input: cut, damaged and hostile tars."""

import io
import multiprocessing
import os
import resource
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from shards import pair, png, read_all, three, write_tar

from shared import data, run, tars

SIZE = 512 + 512  # header and payload of a small member, each padded to blocks


CUTS = {
    "nothing left": 0,
    "in the first header": 100,
    "in the first payload": 512 + 20,
    "behind the first image": SIZE,
    "in the second sample's image header": 2 * SIZE + 100,
    "behind that header": 2 * SIZE + 512,
    "in its payload": 2 * SIZE + 512 + 20,
    "in its caption's header": 3 * SIZE + 300,
    "in its caption": 3 * SIZE + 512 + 3,
    "between two samples": 4 * SIZE,
}


@pytest.mark.parametrize("cut", CUTS)
def test_truncated_tar(tmp_path: Path, cut: str):
    content = three(tmp_path / "0.tar").read_bytes()
    assert len(png()) <= 512
    (tmp_path / "0.tar").write_bytes(content[: CUTS[cut]])
    good = three(tmp_path / "1.tar")
    shards = data.Shards([str(tmp_path / "0.tar"), str(good)])
    pairs, broken = read_all(shards)
    whole = ["a", "b", "c"][: CUTS[cut] // (2 * SIZE)]
    assert [pair.key for pair in pairs] == [*whole, "a", "b", "c"]
    assert "truncated or damaged tar" in data.broken_report(broken)
    with pytest.raises(ValueError, match="--strict: sample .*(truncated or damaged tar|missing caption)"):
        data.Shards([str(tmp_path / "0.tar"), str(good)], strict=True)


def test_damaged_header_and_no_tar_at_all(tmp_path: Path):
    content = bytearray(three(tmp_path / "0.tar").read_bytes())
    content[2 * SIZE : 2 * SIZE + 512] = b"#" * 512
    (tmp_path / "0.tar").write_bytes(content)
    (tmp_path / "1.tar").write_text("<html>404</html>" * 100)
    pairs, broken = read_all(data.Shards([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]))
    assert [pair.key for pair in pairs] == ["a"]
    assert [Path(b.key).name for b in broken] == ["0.tar", "1.tar"]
    with pytest.raises(ValueError, match="no readable .*1.tar"):
        data.Shards([str(tmp_path / "1.tar")])


def test_names_with_dots_folders_and_upper_case(tmp_path: Path):
    files = [
        ("a.b.txt", "wrong"),
        ("a.JPG", png()),
        ("a.Txt", "a"),
        ("p/q/b.PNG", png()),
        ("p/q/b.txt", "b"),
        ("a.json", "{}"),
    ]
    pairs = data.Shards([str(write_tar(tmp_path / "0.tar", *files))])
    assert pairs.keys.tolist() == ["a", "p/q/b"]  # a key ends at the first dot; a.b.txt is a's file `b.txt`
    assert [pairs.read(row).caption for row in range(2)] == ["a", "b"] and not pairs.broken


def binary_size(size: int) -> bytes:
    """A header with its size in base 256: GNU tar writes large sizes so, and tarfile also reads negative ones."""
    header = bytearray(tarfile.TarInfo("x.png").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = (size % 256**12).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax(**headers: str) -> bytes:
    info = tarfile.TarInfo("x.png")
    info.pax_headers = {key.replace("_", "."): value for key, value in headers.items()}
    return info.tobuf(tarfile.PAX_FORMAT)


HOSTILE = {
    "a size that leads back to itself": binary_size(-512),
    "a negative size": binary_size(-5),
    "a size of 2^80": binary_size(2**80),
    "a sparse map of letters": pax(GNU_sparse_map="a,b"),
    "a sparse size of letters": pax(GNU_sparse_size="abc"),
    "a size of 25 digits": pax(size="9" * 25),
    "a size that leads back, in pax": pax(size="-512"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_end_their_shard_and_are_told(name: str, tmp_path: Path):
    three(tmp_path / "good.tar")
    good = (tmp_path / "good.tar").read_bytes().rstrip(b"\0")
    good += bytes(-len(good) % 512)
    (tmp_path / "bad.tar").write_bytes(good + HOSTILE[name] + bytes(1024))
    signal.alarm(30)  # instead of going on forever
    try:
        shard = tars.index_shard(str(tmp_path / "bad.tar"))
        files = [name for name, _ in tars.read_tar(tmp_path / "bad.tar", [])]
    finally:
        signal.alarm(0)
    assert shard.keys == ["a", "b", "c"] and files[:6] == [f"{k}.{e}" for k in "abc" for e in ("png", "txt")]
    assert {b.reason for b in shard.broken} == {"truncated or damaged tar"}, shard.broken
    with pytest.raises(ValueError, match="truncated or damaged tar"):
        list(tars.descriptions([str(tmp_path / "bad.tar")]))


def test_names_and_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long, sparse = "n" * 2000, tarfile.TarInfo("s.png")
    path = write_tar(tmp_path / "a.tar", *pair("a"), *pair(long), *pair("b", "é" * 10_000))
    shards = data.Shards([str(path)])
    assert shards.keys.tolist() == ["a", "b"] and shards.keys.text.nbytes == 2
    assert {b.reason for b in shards.broken} == {"name of more than 1024 characters"}
    assert shards.read(1).caption == shards.caption(1) == "é" * 4096
    sparse.type = tarfile.GNUTYPE_SPARSE
    with tarfile.open(path, "w") as tar:
        tar.addfile(sparse)
        for name, content in pair("a"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content if isinstance(content, bytes) else content.encode()))
    assert data.Shards([str(path)]).broken == [data.Broken("s", "sparse file")]
    table = tmp_path / "t.tsv"
    table.write_text("title\tfilepath\nendless\t/dev/zero\na folder\t/\n")
    for row in range(2):
        with pytest.raises(data.BrokenSample, match="missing image"):
            data.TSV(str(table)).read(row)
    for module in (data, tars):
        monkeypatch.setattr(module, "MAX_BYTES", 20)
    assert {b.reason for b in tars.index_shard(str(three(tmp_path / "three.tar"))).broken} == {
        "file of more than 20 bytes"
    }
    (tmp_path / "i.png").write_bytes(png())
    with pytest.raises(data.BrokenSample, match="file of more than 20 bytes"):
        data.read_file(tmp_path / "i.png")


def test_a_shard_that_ends_early_is_told_of_when_it_is_opened(tmp_path, capsys):
    """The report has the readable bytes and pairs, and the number expected from undamaged shards or _stats.json."""

    class Settings:
        data, dataset_size, batch_size, out = "shards", None, 1, "run"

    for i in range(3):
        samples = ({"__key__": f"{i}-{j}", "png": png(), "txt": "a caption"} for j in range(10))
        tars.write_tar(tmp_path / f"{i}.tar", samples)
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) * 2 // 5])
    pairs = data.open_pairs(str(tmp_path))
    kept = len(pairs) - 20
    data.say_size(pairs, Settings, run.Process(0, 1, torch.device("cpu")))
    said, size = capsys.readouterr().out, len(whole) * 2 // 5
    assert all(word in said for word in ("1.tar is truncated or damaged", f" of {size:,}, {kept} pairs", "have 10"))
    (tmp_path / "1_stats.json").write_text('{"successes": 12}')
    assert f"{kept} pairs of the 12" in pairs.damaged()[0]
    data.say_left_out(pairs)  # of stages before training
    first, second = capsys.readouterr().out.splitlines()
    assert first == pairs.damaged()[0] and "1 broken sample" in second
    data.say_damaged(["a"] * 7)
    *shown, more = capsys.readouterr().out.splitlines()
    assert shown == [*"aaaaa"] and more.startswith("2 more")
    with pytest.raises(ValueError, match="--strict: sample"):
        data.open_pairs(str(tmp_path), strict=True)


@pytest.mark.parametrize(
    ("limits", "kept"),
    [((1024, 4096), 1024), ((1024, 1024), 256), ((4096, -1), 65_536), ((-1, -1), 65_536), ((2**20, 2**20), 2**18)],
)
def test_files_stay_open_as_many_as_the_system_allows(limits, kept: int, monkeypatch: pytest.MonkeyPatch):
    """Of (soft, hard) limits, the process requests a quarter of the hard limit; -1 is unlimited."""
    set_to = [limits]
    monkeypatch.setattr(resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(resource, "getrlimit", lambda which: set_to[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: set_to.append(new))
    assert tars.open_files.__wrapped__() == kept
    assert set_to[-1][1] == limits[1] and (set_to[-1][0] == -1 or set_to[-1][0] >= limits[0])


def read_all_files(files: tars.OpenFiles, count: int) -> set[bytes]:
    return {files.read(file, 0, 4) for file in range(count)}


def test_more_shards_than_were_once_kept_open_are_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """100 shards in random order, also in a forked process."""
    paths = [tmp_path / f"{i}.tar" for i in range(100)]
    for i, path in enumerate(paths):
        path.write_bytes(b"%04d" % i)
    opened, really = [], os.open
    monkeypatch.setattr(os, "open", lambda *given: opened.append(given[0]) or really(*given))
    files = tars.OpenFiles([str(path) for path in paths])
    for file in torch.randint(100, (2000,), generator=torch.Generator().manual_seed(0)).tolist():
        assert files.read(file, 0, 4) == b"%04d" % file
    assert len(opened) == len(set(opened)) == 100
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert len(pool.apply(read_all_files, (files, 100))) == 100
    assert files.read(7, 0, 4) == b"0007" and len(opened) == 100
