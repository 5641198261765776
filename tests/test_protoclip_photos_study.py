"""The study on photographs: its arms, metrics that compare two arms, claims, measurements from cached features."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import lite0  # noqa: F401
from protoclip_runs import corpus  # noqa: F401
from short_runs import small_corpus

from protoclip import eval as evaluation
from protoclip import train
from protoclip.config import PRESETS
from shared import layout
from shared.run import Process
from shared.tars import write_split
from studies import protoclip as study
from studies.harness import features, photos, verdicts
from studies.harness.report import Comparison


def run(recall: float, probe: float, seconds: float) -> dict[str, float]:
    numbers = {study.RECALL: recall, study.TOP1: 50.0, "seconds": seconds}
    return numbers | {"art_painting/probe_best": probe, "cartoon/probe_best": probe + 2}


def test_claims_take_the_mean_of_both_probes():
    arms = {"clip": [run(20, 60, 10), run(21, 61, 10)], "protoclip": [run(19, 66, 15), run(20, 67.5, 15)]}
    found = Comparison(arms, [0, 1], {}, set())
    study.derive_photos(found)
    assert found.arms["clip"][0][study.PROBE] == 61 and found.arms["protoclip"][0]["extra_time"] == pytest.approx(0.5)
    bars = [((), {study.PROBE: 70.0})]
    rows = {row["claim"]: row for row in verdicts.judged(study.PHOTOS_CLAIMS, found.arms, bars)}
    assert rows["linear probe above CLIP, locked Lite0"]["verdict"] == "has not learned"
    assert rows["retrieval slightly lower"]["difference"] == pytest.approx(-1)
    assert [claim.metric for claim in study.PHOTOS_CLAIMS if claim.primary] == [
        study.PROBE,
        study.TOP1,
        *[study.PROBE] * 2,
    ]


@pytest.mark.usefixtures("lite0")
def test_a_head_on_features_is_measured_on_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trained and evaluated on shards of features; the study's measurement from pictures gives the same numbers."""
    shards = small_corpus(tmp_path / "shards", pairs=64, shards=1)
    features.main(features.Config((shards,), tmp_path / "features", side=32))
    cfg = dataclasses.replace(
        PRESETS["emoji"][1], data=str(tmp_path / "features/shards"), model="Lite0-features", w_external=0.0, k=4,
        episodes=2, episode_size=32, batch_size=16, hidden_dim=16, projection_dim=8, warmup=1, eval_every=0,
        precision="fp32", out=str(tmp_path / "run"),
    )  # fmt: skip
    run = train.main(cfg)
    rng = np.random.default_rng(0)
    pictures = [layout.png(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)) for _ in range(12)]
    names = [f"{part}_{i}" for i in range(4) for part in ("dog", "cat", "tree")]
    layout.write_retrieval(
        tmp_path / "retrieval_en", ({"png": p, "txt": f"{n}\na {n}"} for p, n in zip(pictures, names, strict=True))
    )
    for folder in ("photo_all", "art_painting", "cartoon"):
        for split in ("train", "test"):
            write_split(tmp_path / folder / split, ({"png": p, "cls": str(i % 3)} for i, p in enumerate(pictures)))
        layout.write_classes(tmp_path / folder, ["dog", "cat", "tree"], ["a {c}", "the {c}"])
    sets = {name: str(tmp_path / name) for name in ("retrieval_en", "photo_all", "art_painting", "cartoon")}
    monkeypatch.setattr(photos, "RETRIEVAL", sets["retrieval_en"])
    monkeypatch.setattr(photos, "SIDE", 32)
    monkeypatch.setattr(study, "ZERO_SHOT", sets["photo_all"])
    monkeypatch.setattr(study, "PROBES", (sets["art_painting"], sets["cartoon"]))
    computed = photos.lite0_features_of_files
    monkeypatch.setattr(photos, "lite0_features_of_files", lambda files, side: computed(files, side, tmp_path))
    found = study.measure_run(run)
    features.main(features.Config(tuple(map(Path, sets.values())), tmp_path / "sets", side=32))
    at = {name: str(tmp_path / "sets" / name) for name in sets}
    shown = evaluation.Config(
        (str(run),), sets=(at["retrieval_en"], at["photo_all"]), probe=(), gap=at["retrieval_en"], precision="fp32"
    )
    expected, _ = evaluation.evaluate_run(str(run), shown, Process(0, 1, torch.device("cpu")))
    del expected["photo_all/top1 by picture"]  # of twelve pictures
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert {"art_painting/probe_best", "cartoon/probe_best", "seconds"} <= set(found) - set(expected)
    study.derive_photos(Comparison({"protoclip": [found]}, [0], {}, set()))
    assert verdicts.scores_of(found, study.PROBE).shape == (24,)  # both domains
