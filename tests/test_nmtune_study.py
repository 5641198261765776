"""The study: arms at each noise ratio, and claims between encoders and heads."""

import pytest

from nmtune import config, study


def made_up(level: int, seed: int) -> dict[str, float]:
    """An encoder's numbers: accuracy falls with noise, spectra rise; NMTune is a point above MLP, MLP two above LP."""
    numbers = {"sve_id": 4 + 0.01 * level, "sve_ood": 4 + 0.02 * level, "lsvr_id": 3 + 0.01 * level, "noise": level}
    numbers["lsvr_ood"] = 3 + 0.02 * level + 0.001 * seed * level
    for part in ("id", "ood"):
        lp = 50 - 0.2 * level - 0.01 * seed * level
        numbers |= {f"lp/{part}": lp, f"mlp/{part}": lp + 2, f"nmtune/{part}": lp + 3 + 0.01 * seed}
    return numbers | {"mlp/cov_id": 9.0, "nmtune/cov_id": 8.0 + 0.1 * seed, "mlp/top5_id": 1.0, "nmtune/top5_id": 1.0}


def compared(arms: dict[str, list[dict[str, float]]]) -> study.Comparison:
    return study.Comparison(arms=arms, seeds=[0, 1, 2], folders={}, commits={"x"}, settings={})


def test_claims_are_differences_of_encoders_and_of_heads():
    arms = {f"sup-{level:02d}": [made_up(level, seed) for seed in (0, 1, 2)] for level in config.NOISE}
    rows = {row["claim"]: row for row in study.more_rows(compared(arms))}
    assert not [claim for claim in rows if "captions" in claim or "same views" in claim or "lambda" in claim]
    c1 = rows["C1 5-10 % noise raises LP ID over 0 %"]
    assert c1["here"].startswith("-1.58") and c1["verdict"] == "not reproduced"  # mean of 5 and 10 %: 7.5 * 0.21
    c2 = rows["C2 any noise (mean of 5-30 %) lowers LP OOD"]
    assert c2["here"].startswith("-3.41") and c2["verdict"] == "reproduced"
    assert rows["C3 30 % noise raises LSVR, OOD features"]["here"].startswith("+0.63")
    assert rows["C3 higher SVE goes with higher LP ID (correlation over levels)"]["here"].startswith("-1.00")
    c4 = rows["C4 NMTune above MLP, OOD (15 encoders)"]
    assert c4["here"].startswith("+1.01") and c4["verdict"] == "reproduced" and c4["paper"] == "about +1"
    assert rows["C4 the same at 30 % noise, ID (3 encoders)"]["here"].startswith("+1.010 ± ")
    covariance = rows["mechanism: NMTune's z has lower L_COV than MLP's, ID (15 encoders)"]
    assert covariance["here"].startswith("-0.90") and covariance["verdict"] == "reproduced"
    few = {arm: arms[arm] for arm in ("sup-05", "sup-30")}
    claims = [row["claim"] for row in study.more_rows(compared(few))]
    assert not [claim for claim in claims if claim.startswith(("C1", "C2", "C3"))] and len(claims) == 9
    with pytest.raises(ValueError, match="encoder folders such as sup-30-seed0, not vit-seedN"):
        study.more_rows(compared(arms | {"vit": arms["sup-00"]}))


def test_arms_are_encoders_at_each_noise_ratio():
    arms = [arm.name for arm in study.STUDY.chosen("core")]
    assert arms == ["sup-00", "sup-05", "sup-10", "sup-20", "sup-30", "clip-00", "clip-30"]
    assert len(study.STUDY.chosen("all")) == 10
    pretraining, tuning = (words[2:] for words in study.STUDY.words(study.STUDY.arms[-1], 1))
    out = "runs/nmtune/clip-30-seed1"
    assert pretraining == ["nmtune.pretrain", "emoji-clip-30", "--seed", "1", "--out", out]
    assert tuning == ["nmtune.encoder_study", "--encoder", out]
