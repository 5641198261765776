"""The study on photographs: its arms, metrics that compare two arms, claims, measurements from cached features."""

from pathlib import Path

import numpy as np
import pytest
from test_pretrained import lite0  # noqa: F401
from test_protoclip_locked import CPU, cfg  # noqa: F401
from test_protoclip_train import corpus  # noqa: F401

from protoclip import eval as evaluation
from protoclip import train
from shared import layout, pretrained
from shared.tars import write_split
from studies import protoclip as study
from studies.harness import photos, verdicts
from studies.harness.report import Comparison


def test_arms_share_data_tower_and_steps():
    lines = {arm.name: study.PHOTOS.words(arm, 0)[0] for arm in study.PHOTOS_ARMS}
    for words in lines.values():
        assert words[words.index("--data") + 1] == study.FLICKR8K and "--lock-image" in words
        assert words[words.index("--episode-size") + 1] == "12000"
    assert lines["protoclip"][words.index("emoji") :].count("--w-external") == 0
    assert study.PHOTOS.before[-1].arms == ("protoclip",)


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
def test_cached_features_give_the_numbers_of_eval(cfg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
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
    monkeypatch.setattr(photos, "lite0_features_of_files", lambda files, side: features(files, side, tmp_path))
    features = pretrained.lite0_features_of_files
    found = study.measure_run(run)
    asked = dict(sets=(sets["retrieval_en"], sets["photo_all"]), probe=(), gap=sets["retrieval_en"])
    shown = evaluation.Config((str(run),), **asked, precision="fp32")
    expected, _ = evaluation.evaluate_run(str(run), shown, CPU)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert {"art_painting/probe_best", "cartoon/probe_best", "seconds"} <= set(found) - set(expected)
    with monkeypatch.context() as patch:  # all features are known, so nothing is decoded or encoded
        patch.setattr(pretrained.data, "decode_image", lambda _: pytest.fail("decoded again"))
        assert study.evaluate_photos([str(run)]) == [found] and (run / "results.json").is_file()
        assert study.lite0_probe()[study.PROBE] > 0
