"""The controlled study of one encoder, and the comparison of several encoders."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from nmtune_runs import corpus  # noqa: F401

from nmtune import config, model
from shared import checkpoints, pictures
from studies import nmtune as study
from studies import nmtune_encoders as encoder_study
from studies.harness import runner
from studies.harness.floors import Floor


@pytest.mark.slow
def test_study_and_report(tmp_path, monkeypatch, capsys):
    """The report has the measurements of two encoders with two seeds each and random weights."""
    whole = encoder_study.open_labelled
    monkeypatch.setattr(encoder_study, "open_labelled", lambda spec: whole(spec).subset(np.arange(150)))
    tasks = ("group", "subgroup")
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
            small = encoder_study.StudyConfig(
                encoder=str(folder), tasks=tasks, seeds=1, bank=2, epochs=1, batch_size=512
            )
            encoder_study.main(dataclasses.replace(small, device="cpu"))
    encoder_study.main(dataclasses.replace(small, device="cpu"))
    assert "nothing to do" in capsys.readouterr().out
    os.utime(folder / "checkpoint.pt", ns=(1, 1))  # another checkpoint, older than the results
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="studied again"):
        patch.setattr(encoder_study, "encode_splits", lambda *_: (_ for _ in ()).throw(RuntimeError("studied again")))
        encoder_study.main(dataclasses.replace(small, device="cpu"))
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        encoder_study.main(dataclasses.replace(small, epochs=-1, device="cpu"))
    for arm in study.BLACK_BOX:  # heads that were tuned on a features file
        for seed in (0, 1):
            folder = tmp_path / f"{arm}-seed{seed}"
            folder.mkdir()
            torch.save({"epoch": 1, "config": {"epochs": 1}, "head": {}}, folder / "checkpoint.pt")
            lines = [{"step": 1, "loss": 1.0}, {"step": 2, "id/top1": 60.0 + seed + len(arm), "ood/top1": 50.0}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = tuple(str(path) for path in sorted(tmp_path.glob("*-seed?")))
    bars = (Floor("none", lambda: {"lp/id": -1.0, "lp/ood": -1.0, "blackbox/id": -1.0, "blackbox/ood": -1.0}),)
    monkeypatch.setattr(study, "STUDY", dataclasses.replace(study.STUDY, floors=bars))
    monkeypatch.chdir(tmp_path)
    runner.compare(study.STUDY, runs, study.STUDY.evaluate(runs), tmp_path / "results.json")
    shown, summary = capsys.readouterr().out, checkpoints.read_json(tmp_path / "results.json")
    assert summary["seeds"] == [0, 1] and list(summary["arms"]) == ["sup-00", "sup-30", *study.BLACK_BOX]
    kept = checkpoints.read_json(tmp_path / "sup-30-seed1/study.json")
    assert set(kept["tasks"]) == set(tasks) and "sve_id@none" in kept["spectrum"]
    both = [kept["tasks"][task]["nmtune/ood"][0] for task in tasks]
    assert summary["arms"]["sup-30"]["nmtune/ood"]["values"][1] == pytest.approx(np.mean(both))
    assert set(summary["by_picture"]["sup-30"]) == {"lp/ood by picture"}
    scores = pictures.unpacked(summary["by_picture"]["sup-30"]["lp/ood by picture"][1])
    assert scores.mean() == pytest.approx(summary["arms"]["sup-30"]["lp/ood"]["values"][1])
    assert summary["arms"]["sup-30"]["group/nmtune/ood"]["values"][1] == both[0]
    assert summary["arms"]["sup-30"]["sve_id"]["values"][1] == kept["spectrum"]["sve_id@sample"]
    assert summary["arms"]["sup-30"]["noise"]["mean"] == pytest.approx(30)
    assert summary["arms"]["lite0-mlp"]["blackbox/id"]["values"] == [69.0, 70.0]
    assert {"mlp/cov_id", "nmtune/top5_id"} <= set(kept["tasks"]["group"])
    c2 = next(claim for claim in summary["claims"] if claim["claim"] == "C2 30 % label noise lowers LP OOD")
    difference = np.subtract(*(summary["arms"][arm]["lp/ood"]["values"] for arm in ("sup-30", "sup-00"))).mean()
    assert c2["difference"] == pytest.approx(difference) and c2["scatter"] == "seeds and pictures"
    assert "C4 NMTune above MLP, encoders with 30 % label noise, OOD" in shown
    assert (tmp_path / "nmtune_noise.png").is_file() and (tmp_path / "nmtune_spectra.png").is_file()


def test_tasks_share_features_of_the_same_drawings():
    """The labels of a task belong to the features of its drawings among those of all drawings."""
    images = {split: encoder_study.open_labelled(f"data/emoji:group:{split}") for split in ("tune", "id", "ood")}
    plain = {split: torch.arange(len(each))[:, None] for split, each in images.items()}
    encoded = encoder_study.Encoded(images, plain, torch.zeros(2, len(images["tune"]), 1))
    for split in images:
        names = encoder_study.open_labelled(f"data/emoji:name:{split}")
        indices = encoded.indices(split, names)
        assert names.keys[:].tolist() == images[split].keys[indices.numpy()].tolist()
        assert (names.spans == images[split].spans[indices]).all()
