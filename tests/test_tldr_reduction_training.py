"""Code shared by the training programs: schedules, initial weights, the plan of a dry run."""

import dataclasses

import pytest
import torch
from test_tldr_reduction_blip import tiny_blip
from test_tldr_reduction_train import folder  # noqa: F401

from tldr_reduction import config, training


def test_each_program_has_its_schedule():
    captioner = dataclasses.replace(config.CAPTIONER, warmup=10)
    assert training.learning_rate(captioner, 0, 0) == captioner.warmup_lr
    assert training.learning_rate(captioner, 0, 10) == captioner.lr
    assert training.learning_rate(captioner, 2, 5) == pytest.approx(captioner.lr * 0.81)
    for cfg in (config.FINETUNE, config.RETRIEVAL):
        rates = [training.learning_rate(cfg, epoch, 3) for epoch in range(cfg.epochs)]
        assert rates[0] == cfg.lr and rates == sorted(rates, reverse=True)
    assert [training.alpha_ramp(e, 0, 4, 0.4, epochs=1) for e in range(3)] == [0, 0.4, 0.4]
    assert [training.alpha_ramp(e, 2, 4, 0.4) for e in range(3)] == pytest.approx([0.1, 0.3, 0.4])


def test_a_blip_starts_with_equal_momentum_encoders(tmp_path, capsys):
    source, model = tiny_blip(), tiny_blip()
    state = {name: value for name, value in source.state_dict().items() if "text_decoder" not in name}
    torch.save({"model": {name: value + 1.0 for name, value in state.items()}}, tmp_path / "blip.pth")
    cfg = config.Config(objective="blip", init=str(tmp_path / "blip.pth"))
    training.start_from_elsewhere(model, cfg)
    assert "which start at random" in capsys.readouterr().out
    for online, slow in zip(model.visual_encoder.parameters(), model.visual_encoder_m.parameters(), strict=True):
        assert torch.equal(online, slow)


def test_a_plan_counts_the_pairs_of_a_list_of_shards(folder, capsys):
    """Without them it plans for --dataset-size or the paper's number, and says so."""
    model, pool = torch.nn.Linear(2, 2), f"{folder}/pool/{{00000..00001}}.tar"
    for spec, words in ((pool, "128 an epoch, 640 in 5 epochs\n"), ("gone/{0..1}.tar", "{0..1}.tar is not here\n")):
        cfg = dataclasses.replace(config.FINETUNE, data=spec, batch_size=64)
        training.show_plan(cfg, 1, model, lambda: model(torch.ones(2, 2)).sum())
        assert words in capsys.readouterr().out


def test_rows_of_a_plan_need_no_data(capsys):
    model = torch.nn.Linear(2, 2)
    cfg = dataclasses.replace(config.FINETUNE, dataset_size=1000)
    training.show_plan(cfg, 2, model, lambda: model(torch.ones(2, 2)).sum(), [("codes", "none")])
    printed = capsys.readouterr().out
    assert (
        "6 trained" in printed
        and "codes" in printed
        and "1.000e-05 in epoch 0" in printed
        and "15 (3 an epoch)" in printed
    )
