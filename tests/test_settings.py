"""Limits of settings, and settings that are refused together."""

import contextlib
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from shared import settings
from shared.settings import Beta, Count, Number, Positive, Rate, RunConfig, Share, Whole


@dataclasses.dataclass
class Config(RunConfig):
    data: str = "x.tar"
    batch_size: Count = 8
    lr: Rate = 0.1
    beta2: Beta | None = None
    share: Share = 0.5
    norm: Positive = 1.0
    bias: Number = -5.0
    areas: tuple[Positive, Positive] = (0.5, 1.0)
    layers: Whole = 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"beta2": 0.98}, None),
        ({"accumulate": 4}, None),
        ({"data": ""}, "--data is missing"),
        ({"data": "data/emoji/nowhere"}, "data/emoji/nowhere does not exist"),
        ({"data": "data/emoji/nowhere/{00..03}.tar::x.tar"}, "make data"),
        ({"data": "data/no-scenes/{00..03}.tar"}, "study"),
        ({"eval_every": 1}, "--eval-set is missing"),
        ({"eval_every": 1, "eval_set": "/nowhere"}, "--eval-set /nowhere does not exist"),
        ({"save_every": 0}, "--save-every must be at least 1"),
        ({"batch_size": 9}, "2 processes; 10 can"),
        ({"accumulate": 3}, "3 micro-batches in each; 12 can"),
        ({"accumulate": 0}, "--accumulate must be at least 1"),
        ({"lr": -0.1}, "--lr must be at least 0"),
        ({"lr": math.inf}, "--lr must be finite"),
        ({"beta2": 1.0}, "--beta2 must be below 1"),
        ({"share": 1.5}, "--share must be at most 1"),
        ({"norm": 0.0}, "--norm must be above 0"),
        ({"bias": math.nan}, "--bias must be finite"),
        ({"areas": (0.5, -1.0)}, "--areas must be above 0"),
        ({"layers": -1}, "--layers must be at least 0"),
        ({"stream": True}, "--stream needs --dataset-size"),
        ({"stream": True, "dataset_size": 9, "keep_in_memory": True}, "leave out --keep-in-memory"),
    ],
)
def test_settings_that_are_refused(changed: dict[str, Any], message: str | None):
    config = Config(**changed)
    with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=re.escape(message)):
        config.check(2)


def test_a_dry_run_looks_at_no_file():
    Config(data="", eval_every=1, dry_run=True).check(1)


def test_an_evaluation_set_of_another_kind_is_refused(embedded_corpus: None):
    with pytest.raises(ValueError, match="retrieval set"):
        Config(eval_every=1, eval_set="data/emoji/eval/retrieval_id").check(1)


def test_shards_of_the_embedded_corpus_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("data/emoji/train").mkdir(parents=True)
    for shards in ("data/emoji/train", "data/emoji/train/{00000..00003}.tar", "/x.tar"):
        settings.check_data(shards)
