"""Hard conditions, for the training script of every folder: it goes on as if nothing had been, or ends with exit code 2
and one sentence; nothing that was there before is lost.
"""

import io
import os
import pickle
import random
import shutil
import signal
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import ROOT, ended, finished, kill_at, metrics, one_sentence, same
from tiny import FOLDERS, PRELOAD, SCRIPTS, SHARDS, add_sample, commands, small_corpus  # noqa: F401

from shared import run

SCRIPT, SECONDS = "faulty", 120
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: `make test` makes it with 'python -m shared.emoji'", pytrace=False)
    path = tmp_path_factory.mktemp("faults")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def given(folder: Path) -> dict[str, list[str]]:
    """Each folder's command line, less --out."""
    (folder / "parts").mkdir()
    return commands(small_corpus(folder / "corpus"), folder / "parts")


@pytest.fixture(scope="module")
def whole(cli, given, folder: Path):
    """whole(name) -> a run that nothing disturbed, made without a network."""

    def make(name: str) -> Path:
        out = folder / name / "whole"
        if not out.exists():
            finished(cli("no_network", SCRIPTS[name], *given[name], "--out", out))
        return out

    return make


def trained(out: Path) -> dict:
    """A run's checkpoint, less what may differ from run to run."""
    state = run.load_checkpoint(out / "checkpoint.pt")
    return {key: value for key, value in state.items() if key not in ("seconds", "config", "name")}


def refused(result, *words: str) -> None:
    """Exit code 2 and one sentence with one of these words."""
    assert result.code == 2 and one_sentence(result.err) and any(word in result.err for word in words), result


# --------------------------------------------------------------------------------------------- while a run is going on


@pytest.mark.parametrize("name", FOLDERS)
def test_interrupted_at_random_it_ends_as_if_it_had_not_been(name: str, given, whole, start, folder: Path):
    """SIGTERM, SIGKILL, a full disk and a shard that vanishes, in one and the same run."""
    out, module, rng = folder / name / "run", SCRIPTS[name], random.Random(name)
    command, expected = [*given[name], "--out", out], whole(name)
    kill_at(start(*command, module=module), out, rng.randint(1, 3), how=signal.SIGTERM)
    kill_at(start(*command, module=module), out, rng.randint(4, 6))
    before = (out / "checkpoint.pt").read_bytes()
    refused(ended(start("full_disk", module, *command)), "could not be written and is left as it was (File too large)")
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob("*.tmp"))

    shard = folder / "corpus/00001.tar"
    content = shard.read_bytes()
    result = ended(start(f"vanish,1,{shard}", module, *command))
    shard.write_bytes(content)
    if result.code != 0:  # what is read but once can go
        refused(result, "00001.tar")
        finished(ended(start(*command, module=module)))
    assert metrics(out) == metrics(expected)
    assert same(trained(out), trained(expected))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_nan_never_gets_into_a_checkpoint(name: str, given, cli, folder: Path):
    """Though nobody looks at the losses. TinyCLIP leaves such a step out, as its authors do, and goes on."""
    out = folder / name / "nan"
    batch = 1 if name == "lexvla" else 7  # LexVLA encodes images but once, before training
    result = cli(f"nan,{batch}", SCRIPTS[name], *given[name], "--log-every", "1000", "--out", out)
    if name == "tinyclip":
        finished(result)
    else:
        refused(result, "no longer finite", "the loss is nan")
    assert name == "lexvla" or all(tensor.isfinite().all() for _, tensor in run.tensors(trained(out)))


# ------------------------------------------------------------------------------------------------------- hostile data


def png(width: int, height: int) -> bytes:
    """A white image of any size in a few kilobytes."""
    rows = zlib.compressobj(9)
    line = b"\0" + b"\xff" * (-(-width // 8))
    data = b"".join(rows.compress(line) for _ in range(height)) + rows.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def hostile(folder: Path) -> Path:
    """Images of 1x1 and 20,000x20,000, captions of 100,000 characters, members that lead out of the tar; a shard cut in
    the middle, one with a damaged header, one that is none."""
    out = small_corpus(folder / "hostile", shards=3)
    first, cut, damaged = (out / f"{i:05}.tar" for i in range(3))
    rng = random.Random(0)
    endless = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(100_000)).encode()
    for i in range(4):  # several, so that what draws rows at random draws some
        add_sample(first, f"dot{i}", png(1, 1), b"a dot")
        add_sample(first, f"huge{i}", png(20_000, 20_000), b"a wall")
        add_sample(first, f"words{i}", png(40, 40), b"cat " * 25_000)
    add_sample(first, "letters", png(40, 40), endless)
    add_sample(first, "../../evil", png(40, 40), b"up")
    add_sample(first, f"{folder}/evil", png(40, 40), b"absolute")
    with tarfile.open(first, "a") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("folder", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("link.txt")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"link"))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    content = bytearray(damaged.read_bytes())
    with tarfile.open(damaged) as tar:
        middle = tar.getmembers()[75].offset
    content[middle : middle + 64] = b"?" * 64
    damaged.write_bytes(content)
    (out / "00003.tar").write_bytes(b"no tar at all" * 100)
    return out


@pytest.mark.parametrize("name", FOLDERS)
def test_hostile_data_are_counted_and_trained_around(name: str, given, hostile: Path, cli, folder: Path):
    out = folder / name / "hostile"
    began = time.monotonic()
    result = finished(cli("no_network", SCRIPTS[name], *given[name], "--data", hostile, "--out", out))
    assert "broken samples" in result.out and "truncated or damaged tar" in result.out
    assert all(np.isfinite(value) for line in metrics(out) for value in line.values())
    assert time.monotonic() - began < 60
    assert not [path for path in (folder, folder.parent) if list(path.glob("evil*"))]


# -------------------------------------------------------------------------------------------------- hostile run folders


class Malicious:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("name", FOLDERS)
def test_checkpoints_that_are_not_its_own_are_refused(name: str, given, whole, in_process, tmp_path: Path):
    other = whole(FOLDERS[FOLDERS.index(name) - 1]) / "checkpoint.pt"
    victim, path = tmp_path / "victim", tmp_path / "run/checkpoint.pt"
    path.parent.mkdir()
    for content, words in (
        (other.read_bytes(), "holds a run with another configuration"),
        (pickle.dumps({"state_dict": Malicious(victim)}, 2), "is not a checkpoint"),
        (other.read_bytes()[:5000], "is not a checkpoint"),
        (b"", "is not a checkpoint"),
    ):
        path.write_bytes(content)
        refused(in_process(*given[name], "--out", path.parent, module=SCRIPTS[name]), words)
        assert path.read_bytes() == content and not victim.exists()
    mine = run.load_checkpoint(whole(name) / "checkpoint.pt")
    mine |= {key: 0 for key in ("epoch", "episode", "step", "batch") if key in mine}
    foreign = {"weights" if "weights" in mine else "state_dict": {"foreign": torch.zeros(1)}}
    for content, words in (
        ([1, 2], "is no checkpoint of this script"),
        ({"config": [1]}, "is no checkpoint of this script"),
        ({"config": mine["config"]}, "the checkpoint holds no '"),
        (mine | foreign, "the checkpoint (holds weights of another|does not hold the weights of the) model"),
    ):
        torch.save(content, path)
        refused(in_process(*given[name], "--out", path.parent, module=SCRIPTS[name]), words)
    torch.save({"config": Malicious(victim)}, path)
    refused(in_process(*given[name], "--out", path.parent, module=SCRIPTS[name]), "is not a checkpoint")
    assert not victim.exists() and os.listdir(path.parent) == ["checkpoint.pt"]


@pytest.mark.parametrize("name", FOLDERS)
def test_two_runs_in_one_folder(name: str, given, whole, start, cli, folder: Path):
    """The second is refused, and the first does not notice."""
    out, here = folder / name / "two", folder / name / "paused"
    first = start(f"pause,{1 if name == 'lexvla' else 3},{here}", SCRIPTS[name], *given[name], "--out", out)
    while first.is_alive() and not here.exists():
        time.sleep(0.01)
    try:
        refused(cli(*given[name], "--out", out, module=SCRIPTS[name]), "belongs to a run that is still going")
    finally:
        here.unlink()
    finished(ended(first))
    assert metrics(out) == metrics(whole(name)) and same(trained(out), trained(whole(name)))


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_cannot_be_written(name: str, given, cli, in_process, folder: Path, tmp_path: Path):
    out = folder / name / "sealed"
    refused(cli(f"read_only,{out}", SCRIPTS[name], *given[name], "--out", out), "Read-only file system")
    assert not out.exists()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file/run"):
        refused(in_process(*given[name], "--out", path, module=SCRIPTS[name]), str(path))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", FOLDERS)
def test_remote_shards_without_a_network(name: str, given, in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "")
    url = "http://127.0.0.1:9/{00000..00001}.tar"
    result = in_process(*given[name], "--data", url, "--out", tmp_path / "run", module=SCRIPTS[name])
    refused(result, "shard http://127.0.0.1:9/00000.tar")
    assert not list(tmp_path.glob("run/*"))
