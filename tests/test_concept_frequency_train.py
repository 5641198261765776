"""Training arms on real emoji shards: assigned frequencies, a failed evaluation."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_models  # noqa: F401  (the models named test)
import torch
from concept_frequency_runs import ARMS, TINY, arms, shards  # noqa: F401
from scripts import in_turn

from concept_frequency import train
from concept_frequency.assigned import log_uniform_counts, zipf_counts
from concept_frequency.concepts import load_json
from shared import checkpoints, run

STEPS = 30
SCRIPT = "concept_frequency.train"


def test_pairs_have_the_assigned_frequencies(arms):
    for name in ARMS:
        out = arms[name]
        assigned = load_json(out / "frequencies.json")
        table = pq.read_table(out / "pairs.parquet").to_pydict()
        assert sum(assigned.values()) == len(table["key"]) == TINY.dataset_size and len(assigned) == TINY.num_concepts
        assert {c: table["concept"].count(c) for c in assigned} == assigned
        assert all(c in text for c, text in zip(table["concept"], table["caption"], strict=True))
        assert (max(assigned.values()) - min(assigned.values()) <= 1) == (name == "uniform")
        lines = run.read_metrics(out)
        assert lines[-1]["step"] == STEPS and "zero_shot_top1" in lines[-1]
        assert lines[-2]["loss"] < lines[0]["loss"]
    zipf, reassigned = (load_json(arms[arm] / "frequencies.json") for arm in ("zipf", "reassigned"))
    assert (
        zipf != reassigned and sorted(zipf.values()) == sorted(reassigned.values()) and list(zipf) == list(reassigned)
    )


def test_the_log_has_the_share_of_pictures():
    """Not the mean of the concepts' shares, 75."""
    assert train.overall(torch.tensor([100.0, 50.0, torch.nan]), torch.tensor([0, 0, 0, 1])) == 87.5


def test_a_failed_evaluation_costs_no_epoch(folder, monkeypatch):
    """The resumed run repeats the evaluation alone, also after the last epoch."""
    found = torch.ones(8)
    monkeypatch.setattr(train, "zero_shot", in_turn(found, ValueError("broken set"), found))
    cfg = dataclasses.replace(TINY, out=str(folder / "failed"), epochs=2, dataset_size=64, num_concepts=8, eval_every=1)
    with pytest.raises(ValueError, match="broken set"):
        train.main(cfg)
    state = checkpoints.load_checkpoint(folder / "failed/checkpoint.pt")
    assert (state["epoch"], state["batch"]) == (1, 2)
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step was repeated"))
    train.main(cfg)
    lines = run.read_metrics(folder / "failed")
    assert [line["step"] for line in lines if "zero_shot_top1" in line] == [2, 4]


@pytest.mark.parametrize(
    ("k", "total", "exponent"), [(400, 8000, 1.0), (50, 1000, 0.0), (300, 310, 2.0), (10, 10, 1.0)]
)
def test_zipf_counts(k, total, exponent):
    counts = zipf_counts(k, total, exponent, torch.Generator().manual_seed(3))
    assert counts.dtype == np.int64 and counts.sum() == total and counts.min() >= 1
    again, other = (zipf_counts(k, total, exponent, torch.Generator().manual_seed(s)) for s in (3, 4))
    assert np.array_equal(counts, again) and np.array_equal(np.sort(counts), np.sort(other))
    if exponent == 0:
        assert np.ptp(counts) <= 1
    if total > 5 * k:
        share = np.arange(1, k + 1) ** -exponent
        assert np.abs(np.sort(counts)[::-1] - total * share / share.sum()).max() <= 1
    with pytest.raises(ValueError, match="cannot hold"):
        zipf_counts(10, 9, exponent, None)


@pytest.mark.parametrize(("k", "total"), [(400, 8000), (50, 1000), (300, 310), (10, 10)])
def test_log_uniform_counts(k, total):
    counts = log_uniform_counts(k, total, torch.Generator().manual_seed(3))
    assert counts.dtype == np.int64 and counts.sum() == total and counts.min() == 1
    assert not np.array_equal(counts, np.sort(counts)) or k == total
    if total > 5 * k:  # the ratio of neighbours is constant, so that a decade has as many concepts as any other
        logs = np.log10(np.sort(counts))
        inner = [((low <= logs) & (logs < low + 0.5)).sum() for low in (0.75, 1.25)]
        assert inner[0] == pytest.approx(inner[1], rel=0.15)
    with pytest.raises(ValueError, match="cannot hold"):
        log_uniform_counts(10, 9, None)


def test_the_rate_rises_to_its_value_and_falls_by_half_a_cosine():
    """Ten steps, four of them warm-up; one of the other six is a sixth of half a circle."""
    cfg = dataclasses.replace(TINY, lr=0.8, warmup=4, epochs=2, dataset_size=50, batch_size=10)
    assert cfg.steps_per_epoch == 5
    found = [train.learning_rate(cfg, step) for step in range(10)]
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert found[6] == pytest.approx(0.4 * (1 + 0.5)) and found[7] == pytest.approx(0.4)
    assert found[9] == pytest.approx(0.4 * (1 - 0.75**0.5))


def test_vectors_and_the_temperature_do_not_decay_and_the_scale_is_clamped():
    model = torch.nn.Linear(3, 2)
    model.logit_scale = torch.nn.Parameter(torch.tensor(5.0))
    plain, decayed = train.parameter_groups(model, 0.2)
    assert plain["weight_decay"] == 0 and {p.shape for p in plain["params"]} == {(), (2,)}
    assert decayed["weight_decay"] == 0.2 and [p.shape for p in decayed["params"]] == [(2, 3)]
    train.clamp_logit_scale(model)
    assert model.logit_scale.exp().item() == pytest.approx(100)
