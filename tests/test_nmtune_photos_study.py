"""The study on photographs: its arms, metrics, and floors on synthetic pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from nmtune_runs import compared

from shared import layout
from shared.tars import write_split
from studies import nmtune as study
from studies.harness import verdicts


def picture(label: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 90, (16, 16, 3), dtype=np.uint8)
    pixels[4 * label : 4 * label + 4] += 150
    return layout.png(pixels)


@pytest.fixture
def pacs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures with a bright band that determines the class: easy in domain, upside down out of domain."""
    for name, splits in {"photo": ("train", "test"), **{f"{name}_all": ("test",) for name in study.SHIFTED}}.items():
        for split in splits:
            labels = [i % 3 for i in range(30)]
            shown = [2 - label if name != "photo" else label for label in labels]
            samples = (
                {"png": picture(s, i + 100 * (split == "test")), "cls": str(y)}
                for i, (s, y) in enumerate(zip(shown, labels, strict=True))
            )
            write_split(tmp_path / name / split, samples)
        layout.write_classes(tmp_path / name, ["dog", "horse", "house"], ["a {c}"])
    monkeypatch.setattr(study, "PACS", str(tmp_path))
    return tmp_path


def test_an_arm_pretrains_on_cifar10_and_probes_on_pacs():
    pretraining, probing, *tuning = study.PHOTOS.words(study.PHOTOS_ARMS[2], 1)
    out = "runs/photos/nmtune/sup-10-seed1"
    assert pretraining[:2] == ["nmtune.pretrain", "small-sup"] and pretraining[-2:] == ["--out", out]
    assert "data/photos-cifar10/eval/cifar10:train" in pretraining and "0.1" in pretraining
    assert probing[:4] == ["nmtune.train", "lp", "--encoder", out] and probing[-1] == f"{out}/lp"
    for head, words in zip(("mlp", "nmtune"), tuning, strict=True):
        assert words[:4] == ["nmtune.train", head, "--encoder", out] and words[-1] == f"{out}/{head}"
    assert len(study.PHOTOS.chosen("core")) == 6 and len(study.PHOTOS.chosen("all")) == 12
    arms = {arm.name: study.PHOTOS.words(arm, 1)[0] for arm in study.PHOTOS_ARMS}
    assert arms["lite0-nmtune-no-cov"][:6] == [*arms["lite0-nmtune"][:4], "--w-cov", "0"]
    assert {each for claim in study.VARIANT_CLAIMS for each in (claim.method, claim.baseline)} <= set(arms)


def test_floors_are_measured_in_and_out_of_domain(pacs: Path):
    near, probe, chance = study.pacs_pixel_neighbour(), dict(study.PHOTOS_FLOORS[2].measure()), study.pacs_chance()
    assert near["lp/id"] == near["blackbox/id"] > 90 and near["lp/ood"] < 50
    assert set(probe) == {"lp/id", "lp/ood"} and probe["lp/id"] > probe["lp/ood"]
    assert chance["lp/ood"] == pytest.approx(100 / 3)


def test_out_of_domain_is_the_mean_of_domains(tmp_path: Path):
    folder = tmp_path / "lite0-mlp-seed0"
    folder.mkdir()
    line = {"step": 9, "id/top1": 95.0, "art_painting/top1": 60.0, "cartoon/top1": 40.0, "sketch/top1": 20.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = study.measure_run(str(folder))
    assert found["blackbox/ood"] == pytest.approx(40) and found["blackbox/sketch"] == 20 and found["blackbox/id"] == 95


def test_an_encoder_has_the_accuracies_of_all_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tests = ("id", *study.SHIFTED)
    for head, top1 in (("mlp", 70.0), ("nmtune", 72.0)):
        (tmp_path / head).mkdir()
        line = {"step": 9} | {f"{name}/top1": top1 - 10 * i for i, name in enumerate(tests)}
        (tmp_path / head / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    spectra = {f"{name}/{metric}_F": 0.5 for name in tests for metric in ("sve", "lsvr")}
    probed = {f"{name}/top1": 60.0 for name in tests} | spectra
    monkeypatch.setattr(study.evaluation, "evaluate_run", lambda *_: (probed, None))
    found = study.measure_probe(tmp_path / "lp")
    assert (found["mlp/id"], found["nmtune/id"], found["lp/id"]) == (70, 72, 60)
    assert (found["mlp/ood"], found["nmtune/ood"]) == (50, 52)
    arms = {
        f"sup-{level:02d}": [found | {"nmtune/ood": 52 + 0.01 * seed} for seed in range(3)] for level in (0, 10, 30)
    }
    compared = study.Comparison(arms, [0, 1, 2], {}, set())
    study.PHOTOS.derive(compared)
    rows = {row["claim"]: row for row in verdicts.judged(study.PHOTOS.claims, compared.arms, [])}
    claim = "C4 NMTune above MLP, encoders with 30 % label noise, OOD"
    assert rows[claim]["difference"] == pytest.approx(2.01) and rows[claim]["verdict"] == "direction only"


def test_an_encoder_with_other_weights_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = []
    monkeypatch.setattr(study, "measure_probe", lambda probe: measured.append(probe) or {"lp/id": 1.0})
    for content, times in ((b"weights", 1), (b"weights", 1), (b"other", 2)):
        if times > len(measured):
            (tmp_path / "checkpoint.pt").write_bytes(content)
        assert study.measure_run(str(tmp_path)) == {"lp/id": 1.0} and len(measured) == times


def test_claims_are_those_of_the_embedded_corpus():
    found = compared()
    study.PHOTOS.derive(found)
    rows = verdicts.judged(study.CLAIMS, found.arms, []) + study.more_rows_on_photos(found)
    claims = {row["claim"]: row["verdict"] for row in rows}
    assert claims["C1 30 % label noise lowers LP ID"] == "reproduced"
    assert "C3 higher SVE goes with lower LP ID (correlation over levels)" in claims
