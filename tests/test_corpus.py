"""Batches of a corpus by row: from memory as from the disk, with any number of processes and workers, resumed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from short_runs import small_corpus
from torchvision import transforms

from shared import corpus, data, run
from shared.data import ToNormalizedTensor
from shared.settings import RunConfig

VIEW = transforms.Compose([transforms.RandomResizedCrop(16), ToNormalizedTensor((0.5,) * 3, (0.25,) * 3)])
CPU = torch.device("cpu")
ALONE = run.Process(0, 1, CPU)


@pytest.fixture(scope="module")
def shards(embedded_corpus: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_corpus(tmp_path_factory.mktemp("corpus") / "shards", pairs=70))


def settings(shards: str, **more: Any) -> RunConfig:
    return RunConfig(data=shards, out="runs/x", batch_size=16, workers=0, **more)


def opened(cfg: RunConfig, process: run.Process = ALONE, **more: Any) -> corpus.Corpus:
    return corpus.Corpus(cfg, process, lambda pair: torch.tensor(len(pair.caption)), **more)


def same(first: Sequence, second: Sequence) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_memory_and_workers_change_nothing(shards: str):
    whole = list(opened(settings(shards)).epoch(3, VIEW))
    assert len(whole) == 4 and whole[0][1].shape == (16, 3, 16, 16) and whole[0][1].dtype == torch.float32
    assert len(set(torch.cat([rows for rows, *_ in whole]).tolist())) == 64
    assert same(list(opened(settings(shards, keep_in_memory=True)).epoch(3, VIEW)), whole)
    assert same(list(opened(dataclasses.replace(settings(shards), workers=2)).epoch(3, VIEW)), whole)
    assert not same(list(opened(settings(shards)).epoch(4, VIEW)), whole)
    short = list(opened(settings(shards)).epoch(3, VIEW, drop_last=False))
    assert len(short) == 5 and len(short[-1][0]) == 6 and same(short[:4], whole)


def test_an_epoch_can_begin_at_any_batch(shards: str):
    found = opened(settings(shards))
    assert same(list(found.epoch(1, VIEW, start=2)), list(found.epoch(1, VIEW))[2:])


def test_processes_share_the_batches_of_one(shards: str):
    ranks = [list(opened(settings(shards), run.Process(rank, 2, CPU)).epoch(0, VIEW)) for rank in range(2)]
    joined = [[torch.cat(parts) for parts in zip(*batch, strict=True)] for batch in zip(*ranks, strict=True)]
    assert same(joined, list(opened(settings(shards)).epoch(0, VIEW)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_workers_serve_several_passes_and_views(shards: str, workers: int):
    found, other = opened(dataclasses.replace(settings(shards), workers=workers)), transforms.ToTensor()
    rows = np.arange(20)
    first = list(found.batches(rows, VIEW, seed=(0, 0, 0)))
    loader = found.loader
    assert same(list(found.batches(rows, VIEW, seed=(0, 0, 0))), first) and found.loader is loader
    assert [images.shape[1:] for _, images, _ in found.batches(rows, other, seed=(0, 0, 1))] == [(3, 64, 64)] * 2


def test_no_batch_holds_a_caption_twice(shards: str):
    cfg = settings(shards, distinct_captions=True)
    captions = np.array([f"caption {row // 3}" for row in range(70)])
    found = opened(cfg)
    found.labels = np.unique(captions, return_inverse=True)[1]
    batches = [captions[rows] for rows, *_ in found.epoch(0, VIEW)]
    assert len(batches) == 4 and all(len(set(batch)) == 16 for batch in batches)


def test_distinct_batches_hold_no_label_twice_while_there_are_enough():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, 400)
    batches = corpus.distinct_batches(rng.permutation(400), labels, 32)
    assert sorted(np.concatenate(batches).tolist()) == list(range(400))
    assert {len(batch) for batch in batches[:-1]} == {32}
    assert all(len(set(labels[batch])) == len(batch) for batch in batches[:8])


def test_a_corpus_in_memory_is_read_once_and_reduced(shards: str, monkeypatch: pytest.MonkeyPatch):
    calls, read = [], data.Shards.read
    monkeypatch.setattr(data.Shards, "read", lambda self, row, *args: calls.append(row) or read(self, row, *args))
    found = opened(settings(shards, keep_in_memory=True), side=20)
    for epoch in range(2):
        list(found.epoch(epoch, VIEW))
    assert calls == list(range(70)) and {pair.image.size for pair in found.pairs.kept.values()} == {(20, 20)}


def test_a_corpus_that_does_not_fit_is_refused(shards: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus.os, "sysconf", lambda name: 500)
    with pytest.raises(ValueError, match="pass --no-keep-in-memory"):
        opened(settings(shards, keep_in_memory=True))


def test_less_than_a_batch_is_refused(shards: str):
    with pytest.raises(ValueError, match="batch of 71"):
        opened(dataclasses.replace(settings(shards), batch_size=71))


class Features:
    """Pairs whose images are features of a locked tower."""

    keys, broken, strict, fingerprint, total = [str(i) for i in range(32)], [], False, "x", 32

    def __len__(self) -> int:
        return 32

    def read(self, row: int) -> data.Pair:
        return data.Pair(str(row), torch.full((4, 1, 1), float(row)), "caption")

    def caption(self, row: int) -> str:
        return "caption"


@pytest.mark.parametrize("kept", [False, True])
def test_features_have_no_views(tmp_path: Path, kept: bool):
    found = opened(settings("features", keep_in_memory=kept), pairs=Features())
    for rows, images, _ in found.epoch(0, VIEW):
        assert images.shape == (16, 4, 1, 1) and torch.equal(images[:, 0, 0, 0], rows.float())
