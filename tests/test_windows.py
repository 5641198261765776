"""Windows of shards: each sample once per pass, unchanged by a resume; shards are prefetched, retried and removed."""

import http.server
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import pair, write_tar
from torch.utils.data import Dataset

from shared import data, index, run, windows


class Seen(Dataset):
    """(position, key, broken) of the pairs."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[int, str, list]:
        broken: list[data.Broken] = []
        return int(i), data.read_or_next(self.pairs, int(i), broken).key, broken


def collate(items: list) -> tuple[list, list, list]:
    positions, keys, broken = zip(*items, strict=True)
    return list(positions), list(keys), [each for of_item in broken for each in of_item]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Eight shards of six pairs each."""
    (tmp_path / "shards").mkdir()
    for i in range(8):
        write_tar(tmp_path / f"shards/{i}.tar", *sum(([*pair(f"{i}-{j}", f"{i} {j}")] for j in range(6)), []))
    return tmp_path / "shards"


def settings(data_: str, cache: Path, **more) -> SimpleNamespace:
    usual = dict(out="run", window_shards=2, dataset_size=48, batch_size=4, strict=False, workers=0, seed=7)
    return SimpleNamespace(data=data_, cache=str(cache), **usual | more)


def read(cfg, epochs: range, rank: int = 0, world_size: int = 1, start: int = 0):
    process = run.Process(rank, world_size, torch.device("cpu"))
    dataset = Seen(windows.open_pairs(cfg, process))
    return windows.training_batches(dataset, collate, cfg, process, epochs, start)


def one_pass(cfg, rank: int = 0, world_size: int = 1, epoch: int = 0, start: int = 0) -> list[tuple]:
    return list(read(cfg, range(epoch, epoch + 1), rank, world_size, start))


def keys_of(batches: list[tuple]) -> list[str]:
    return [key for _, keys, _ in batches for key in keys]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_seen_once_a_pass_and_a_resume_goes_on(shards: Path, tmp_path: Path, workers: int):
    cfg = settings(f"{shards}/{{0..7}}.tar", tmp_path / "cache", workers=workers)
    whole = one_pass(cfg)
    assert sorted(keys_of(whole)) == sorted(f"{i}-{j}" for i in range(8) for j in range(6))
    assert keys_of(whole) != keys_of(one_pass(cfg, epoch=1)) and len(whole) == 12
    for start in (1, 3, 7, 11):  # within windows and at their beginnings
        assert one_pass(cfg, start=start) == whole[start:]
    of_first = {key.partition("-")[0] for key in keys_of(whole[:3])}
    assert len(of_first) == 2  # a window's shards, mixed


@pytest.mark.parametrize("workers", [0, 3])
def test_epochs_follow_each_other_without_a_restart(shards: Path, tmp_path: Path, workers: int):
    """With small windows, workers read ahead over several windows and into the next epoch."""
    urls = "::".join(f"pipe:cat {shards}/{i}.tar" for i in range(8))
    cfg = settings(urls, tmp_path / "cache", window_shards=1, workers=workers)
    batches, most = [], 0
    for batch in read(cfg, range(4)):
        batches.append(batch)
        most = max(most, len(list((tmp_path / "cache").rglob("*.tar"))))
    expected = [one_pass(cfg, epoch=epoch) for epoch in range(4)]
    assert batches == sum(expected, []) and len({tuple(keys_of(of_epoch)) for of_epoch in expected}) == 4
    assert most <= 2 if not workers else most <= 8
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert list(read(cfg, range(2, 4), start=5)) == batches[2 * 12 + 5 :]


def test_captions_of_all_shards_are_read_once_and_copies_go(shards: Path, tmp_path: Path):
    urls = "::".join(f"pipe:cat {shards}/{i}.tar" for i in range(8))
    cfg, expected = settings(urls, tmp_path / "cache"), sorted(f"{i} {j}" for i in range(8) for j in range(6))
    process, most, found = run.Process(0, 1, torch.device("cpu")), 0, []
    pairs = windows.open_pairs(cfg, process)
    for caption in windows.captions(pairs):
        found.append(caption)
        most = max(most, len(list((tmp_path / "cache").rglob("*.tar"))))
    assert sorted(found) == expected and most <= windows.AHEAD + 1
    assert not list((tmp_path / "cache").rglob("*.tar"))
    by_row = data.open_pairs(f"{shards}/{{0..7}}.tar")
    for source in (pairs, by_row):
        shares = [list(windows.captions(source, rank, 3)) for rank in range(3)]
        assert sorted(sum(shares, [])) == expected and all(shares)
    write_tar(shards / "3.tar", ("x.txt", b"no image"))  # a shard without a pair is passed over
    assert sorted(windows.captions(pairs)) == [caption for caption in expected if caption[0] != "3"]


FETCHING = [0]  # how many threads of this process are in the middle of a fetch
SEEN_AT_FORK: list[int] = []
os.register_at_fork(before=lambda: SEEN_AT_FORK.append(FETCHING[0]))


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each forked process, the number of shards being fetched at that time; each fetch takes a while."""
    fetch = data.fetch

    def slow(url: str, folder: Path) -> str:
        FETCHING[0] += 1
        try:
            time.sleep(0.05)
            return fetch(url, folder)
        finally:
            FETCHING[0] -= 1

    monkeypatch.setattr(data, "fetch", slow)
    SEEN_AT_FORK.clear()
    return SEEN_AT_FORK


def test_no_worker_is_forked_in_the_middle_of_a_fetch(shards: Path, tmp_path: Path, forks: list[int]):
    cfg = settings("::".join(f"pipe:cat {shards}/{i}.tar" for i in range(8)), tmp_path / "cache", workers=2)
    assert len(list(read(cfg, range(2)))) == 24
    assert len(forks) == 2 and not any(forks)


def test_ranks_share_the_shards(shards: Path, tmp_path: Path):
    cfg = settings(f"{shards}/{{0..7}}.tar", tmp_path / "cache")
    parts = [one_pass(cfg, rank, 2) for rank in range(2)]
    assert sorted(keys_of(parts[0]) + keys_of(parts[1])) == sorted(f"{i}-{j}" for i in range(8) for j in range(6))
    shards_of = [{key.partition("-")[0] for key in keys_of(part)} for part in parts]
    assert not shards_of[0] & shards_of[1]
    positions = [position for part in parts for batch in part for position in batch[0]]
    assert sorted(positions) == list(range(48))  # what views are drawn from differs between ranks


def test_a_window_of_few_rows_repeats_them(shards: Path, tmp_path: Path):
    write_tar(shards / "0.tar", *pair("only"))
    cfg = settings(f"{shards}/0.tar", tmp_path / "cache", window_shards=1, dataset_size=8)
    assert keys_of(one_pass(cfg)) == ["only"] * 8


def test_broken_samples_are_told_once_a_window(shards: Path, tmp_path: Path):
    write_tar(shards / "3.tar", *pair("3-0"), ("3-1.png", b"?"), ("3-1.txt", b"a cat"), ("3-2.txt", b"no image"))
    batches = one_pass(settings(f"{shards}/{{0..7}}.tar", tmp_path / "cache"))
    broken = [each for *_, of_batch in batches for each in of_batch]
    assert ("3-2", "missing image") in broken and broken.count(("3-2", "missing image")) == 1
    assert any(key == "3-1" for key, _ in broken) and "3-1" not in keys_of(batches)


def test_settings_that_cannot_be(shards: Path, tmp_path: Path):
    process, cache = run.Process(0, 9, torch.device("cpu")), tmp_path / "cache"
    with pytest.raises(ValueError, match="8 shards are fewer than the 9 processes"):
        windows.open_pairs(settings(f"{shards}/{{0..7}}.tar", cache), process)
    with pytest.raises(ValueError, match="--window-shards needs --dataset-size"):
        windows.open_pairs(settings(f"{shards}/{{0..7}}.tar", cache, dataset_size=None), process)
    with pytest.raises(ValueError, match="leave it out for a .tsv file"):
        windows.open_pairs(settings("x.tsv", cache), process)


def test_ranks_with_a_shard_more_or_less(shards: Path, tmp_path: Path):
    """Seven shards, two ranks, windows of one shard: no window is empty."""
    cfg = settings(f"{shards}/{{0..6}}.tar", tmp_path / "cache", window_shards=1, dataset_size=40)
    parts = [one_pass(cfg, rank, 2) for rank in range(2)]
    assert [len(part) for part in parts] == [10, 10]


def test_an_unreadable_window_is_passed_over(shards: Path, tmp_path: Path):
    write_tar(shards / "5.tar", ("x.txt", b"no image"))
    cfg = settings(f"{shards}/{{0..7}}.tar", tmp_path / "cache", window_shards=1)
    batches = one_pass(cfg)
    assert len(batches) == 12 and ("x", "missing image") in [each for *_, of_batch in batches for each in of_batch]
    with pytest.raises(ValueError, match="--strict: sample x"):
        one_pass(settings(f"{shards}/{{0..7}}.tar", tmp_path / "cache", window_shards=1, strict=True))


def test_windows_of_many_shards_are_indexed_in_workers(shards: Path, tmp_path: Path):
    many = [str(write_tar(tmp_path / f"m{i}.tar", *pair(str(i)))) for i in range(64)]
    cfg = settings("::".join(many), tmp_path / "cache", window_shards=64, dataset_size=64, workers=1)
    assert sorted(map(int, keys_of(one_pass(cfg)))) == list(range(64))


def test_what_a_killed_run_left_goes(shards: Path, tmp_path: Path):
    cfg = settings("::".join(f"pipe:cat {shards}/{i}.tar" for i in range(8)), tmp_path / "cache")
    process = run.Process(0, 1, torch.device("cpu"))
    pairs = windows.open_pairs(cfg, process)
    pairs.cache.mkdir(parents=True)
    (pairs.cache / "old.tar").write_bytes(b"left")
    (pairs.cache / "index").mkdir()
    loader = windows.training_batches(Seen(pairs), collate, cfg, process, range(1))
    next(loader)
    assert not (pairs.cache / "old.tar").exists() and list(pairs.cache.glob("*.tar"))
    loader.close()  # as an exception would
    assert not pairs.cache.exists()


class Flaky(http.server.SimpleHTTPRequestHandler):
    """A server that cuts off the first connection for each file in the middle."""

    dropped: set[str] = set()
    asked: list[str] = []

    def do_GET(self):
        Flaky.asked.append(self.path)
        if self.path in Flaky.dropped:
            return super().do_GET()
        Flaky.dropped.add(self.path)
        content = (Path(self.directory) / self.path.strip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.connection.close()

    def log_message(self, *_):
        pass


def test_a_flaky_server_is_asked_again_and_copies_go(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shared.fetch.PAUSE", 0)
    monkeypatch.setattr(index, "LARGE", 0)
    monkeypatch.setattr(Flaky, "asked", [])
    monkeypatch.setattr(Flaky, "dropped", set())
    local = one_pass(settings(f"{shards}/{{0..7}}.tar", tmp_path / "other"))
    handler = lambda *args: Flaky(*args, directory=str(shards))  # noqa: E731
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        cache = tmp_path / "cache"
        cfg = settings(f"http://127.0.0.1:{server.server_port}/{{0..7}}.tar", cache)
        most, whole = 0, []
        for batch in read(cfg, range(1)):
            whole.append(batch)
            most = max(most, len(list(cache.rglob("*.tar"))))
    finally:
        server.shutdown()
    assert whole == local
    assert most <= 4  # this window and the next
    assert not [path for path in cache.rglob("*") if path.is_file()]  # neither shards nor indices nor locks
    assert not list(cache.glob("*/window-*"))
    assert len(Flaky.asked) == 16 and len(Flaky.dropped) == 8  # each twice
    assert np.array_equal(np.unique(Flaky.asked), sorted(Flaky.dropped))


@pytest.mark.parametrize(("read", "workers"), [("window_shards", 0), ("episode_shards", 0), ("dataset_size", 3)])
def test_an_evaluation_forks_no_loader_where_threads_fetch(read: str, workers: int):
    assert windows.evaluation_workers(SimpleNamespace(**{"workers": 3, read: 2})) == workers
