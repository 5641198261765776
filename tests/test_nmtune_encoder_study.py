"""The controlled study of one encoder, and the comparison of several."""

import dataclasses

import numpy as np
import pytest
import torch
from test_nmtune_train import corpus  # noqa: F401

from nmtune import config, encoder_study, model
from nmtune import eval as evaluation
from shared import checkpoints


def test_study_and_report(tmp_path, monkeypatch, capsys):
    """Two encoders of two seeds with random weights: what stands in the report was measured on them."""
    whole = encoder_study.open_labelled
    monkeypatch.setattr(encoder_study, "open_labelled", lambda spec: whole(spec).subset(np.arange(150)))
    for arm, noise in (("sup-00", 0.0), ("sup-30", 0.3)):
        for seed in (0, 1):
            cfg = dataclasses.replace(config.EMOJI_SUPERVISED, noise=noise, seed=seed)
            torch.manual_seed(seed + int(noise * 10))
            encoder, *_ = model.create_model(cfg, 98)
            folder = tmp_path / f"{arm}-seed{seed}"
            folder.mkdir()
            state = {
                "epoch": cfg.epochs,
                "seconds": 1.0,
                "noise": noise,
                "commit": "x",
                "config": dataclasses.asdict(cfg),
            }
            torch.save(state | {"state_dict": encoder.state_dict()}, folder / "checkpoint.pt")
            small = config.StudyConfig(encoder=str(folder), tasks=("group",), seeds=1, bank=2, epochs=1, batch_size=512)
            encoder_study.main(dataclasses.replace(small, device="cpu"))
    encoder_study.main(dataclasses.replace(small, device="cpu"))
    assert "nothing to do" in capsys.readouterr().out
    runs = tuple(str(path) for path in sorted(tmp_path.glob("sup-*")))
    evaluation.main(evaluation.Config(runs=runs, report=str(tmp_path / "results.json"), device="cpu"))
    shown, summary = capsys.readouterr().out, checkpoints.read_json(tmp_path / "results.json")
    assert summary["seeds"] == [0, 1] and list(summary["arms"]) == ["sup-00", "sup-30"]
    kept = checkpoints.read_json(tmp_path / "sup-30-seed1/study.json")["tasks"]["group"]
    assert summary["arms"]["sup-30"]["nmtune/ood"]["values"][1] == kept["nmtune/ood"][0]
    assert summary["arms"]["sup-30"]["noise"]["mean"] == pytest.approx(30)
    assert {"mlp/cov_id", "nmtune/top5_id", "sve_id@none", "lsvr_ood@sample+feature"} <= set(kept)
    c2 = next(claim for claim in summary["claims"] if claim["claim"] == "C2 30 % noise lowers LP OOD")
    difference = np.subtract(*(summary["arms"][arm]["lp/ood"]["values"] for arm in ("sup-30", "sup-00"))).mean()
    assert c2["here"].startswith(f"{difference:+.2f}") and "C4 NMTune above MLP, OOD (4 encoders)" in shown
    assert (tmp_path / "nmtune_noise.png").is_file() and (tmp_path / "nmtune_spectra.png").is_file()
