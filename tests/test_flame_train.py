"""Schedules, parameter groups and steps; python -m flame.train, end to end on real emoji shards.

Every arm. Kills and several processes: test_faults.py, test_scale.py. Scripts start in processes of their own, forks
of a server that has imported torch and the rest already; they train on the bank of flame_runs.py.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flame_runs import ARMS, EVAL, IMAGES, arms, bank, captions, embed_flags, small, tiny, tiny_llm  # noqa: F401
from scripts import SHARDS, metrics

from flame import config, train, zeroshot
from flame import eval as evaluation
from flame.bank import Bank
from flame.train import sample_facets
from shared import checkpoints, data, run

SCRIPT = "flame.train"
STEPS = 15


def test_sample_facets_draws_without_replacement():
    bank = torch.arange(11.0)[:, None].expand(11, 3)
    torch.manual_seed(0)
    drawn = torch.stack([sample_facets(bank, 6)[:, 0] for _ in range(300)])
    assert drawn.shape == (300, 6) and all(len(row.unique()) == 6 for row in drawn)
    assert drawn.unique().tolist() == list(range(11))
    counts = torch.bincount(drawn.long().flatten(), minlength=11) / 300
    assert (counts - 6 / 11).abs().max() < 0.12
    assert sample_facets(bank, 11).shape == (11, 3)


NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def test_a_gradient_scaler_changes_no_step():
    steps = []
    for scaler in (NO_SCALER, torch.amp.GradScaler("cpu", init_scale=256.0)):
        torch.manual_seed(0)
        model = small(32, 16)
        optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.2), lr=1e-3)
        batch = torch.randn(4, 3, 32, 32), F.normalize(torch.randn(4, 6, 32), dim=-1)
        cfg = config.Config(precision="fp32")
        losses = [train.train_step(model, batch, optimizer, scaler, 1e-3, cfg)["loss"] for _ in range(3)]
        steps.append((torch.stack(losses), model.mm[0].weight))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(arms: dict[str, Path], arm: str):
    out = arms[arm]
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert ("logit_bias" in lines[0]) == (arm not in ("clip", "nce"))
    state = checkpoints.load_checkpoint(out / "checkpoint.pt")
    assert (state["epoch"], state["batch"]) == (3, 0)
    assert any(name.startswith("text.") for name in state["state_dict"]) == (arm == "clip")


def settings(**changes) -> config.Config:
    """A short run in this process."""
    defaults = dict(
        data=f"{SHARDS}/00000.tar", dataset_size=64, epochs=1, batch_size=32, hidden_dim=16, image_size=16,
        model="ViT-test", precision="fp32", eval_every=1, captions=(), log_every=1,
    )  # fmt: skip
    return dataclasses.replace(config.PRESETS["emoji"][1], **(defaults | changes))


def test_training_never_loads_the_language_model(folder: Path, bank: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zeroshot, "load_llm", lambda *args: pytest.fail("the language model was loaded"))
    cfg = settings(bank=str(bank), out=str(folder / "curve"), epochs=2, eval_set=str(EVAL / "groups_ood"))
    train.main(cfg)
    top1 = [line["zero_shot_top1"] for line in metrics(folder / "curve") if "zero_shot_top1" in line]
    measuring = evaluation.Config((), sets=(cfg.eval_set,), precision="fp32")
    measured = evaluation.evaluate_run(cfg.out, measuring, run.Process(0, 1, torch.device("cpu")))
    assert len(top1) == 2 and top1[-1] == measured["groups_ood/top1"]


def test_facets_are_drawn_anew_and_come_from_the_bank(bank: Path):
    opened, pairs = Bank(bank), data.open_pairs(str(SHARDS / "00000.tar"), IMAGES)
    pair = pairs.read(3)
    embeddings = opened[pair.key]
    facets = train.Facets(settings(bank=str(bank)))
    drawn, again = facets(pair), facets(pair)
    assert drawn.shape == (6, 16) and not torch.equal(drawn, again)
    assert all((embeddings == facet).all(1).any() for facet in drawn)
    raw = train.Facets(settings(bank=str(bank), facet_ids=(0,), facets=1))
    assert torch.equal(raw(pair), embeddings[:1])
