"""The study on photographs: its arms, metrics that compare two arms, claims."""

import pytest

from protoclip import photos_study as study
from shared.study import verdicts
from shared.study.report import Comparison


def test_arms_share_data_tower_and_steps():
    lines = {arm.name: study.STUDY.words(arm, 0)[0] for arm in study.ARMS}
    for words in lines.values():
        assert words[words.index("--data") + 1] == study.DATA and "--lock-image" in words
        assert words[words.index("--episode-size") + 1] == "12000"
    assert lines["protoclip"][words.index("emoji") :].count("--w-external") == 0
    assert study.STUDY.before[-1].arms == ("protoclip",)


def run(recall: float, probe: float, seconds: float) -> dict[str, float]:
    numbers = {study.RECALL: recall, study.TOP1: 50.0, "seconds": seconds}
    return numbers | {"art_painting/probe_best": probe, "cartoon/probe_best": probe + 2}


def test_claims_take_the_mean_of_both_probes():
    arms = {"clip": [run(20, 60, 10), run(21, 61, 10)], "protoclip": [run(19, 66, 15), run(20, 67.5, 15)]}
    found = Comparison(arms, [0, 1], {}, set())
    study.derive(found)
    assert found.arms["clip"][0][study.PROBE] == 61 and found.arms["protoclip"][0]["extra_time"] == pytest.approx(0.5)
    bars = [((), {study.PROBE: 70.0})]
    rows = {row["claim"]: row for row in verdicts.judged(study.CLAIMS, found.arms, bars, together=False)}
    assert rows["linear probe above CLIP, locked Lite0"]["verdict"] == "has not learned"
    assert rows["retrieval slightly lower"]["difference"] == pytest.approx(-1)
