"""The study on photographs: captions T_g, measurements, and the order of reductions."""

import json
from pathlib import Path

import pytest
import torch

from shared.corpora import layout
from shared.study.runner import in_order
from tldr_reduction import photos_study as study


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    captions = ["A dog .", "A brown dog .", "It runs ."]
    samples = (
        {
            "png": layout.png(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()),
            "txt": text,
            "json": {"file": f"{i}.jpg", "captions": captions},
        }
        for i in range(2)
        for text in captions
    )
    layout.write_pairs(tmp_path / "train", samples)
    return tmp_path / "train"


def test_predictions_are_what_others_said(pool: Path, tmp_path: Path):
    for _ in range(2):  # the second call finds the file
        study.main(study.Config(data=str(pool), predictions=str(tmp_path / "said.json")))
    said = json.loads((tmp_path / "said.json").read_text())
    assert [each["caption"] for each in said[:3]] == ["A brown dog .", "It runs .", "A dog ."]
    assert said[3]["image_id"] == "000000003"


def test_measurements_count_photographs(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "codes-seed0"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"data": str(pool)}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 3.0}) + "\n")

    class Found:
        name = "retrieval_en"

    monkeypatch.setattr(study.photos, "test_set", lambda _: (torch.zeros(2, 4), [["a", "b"], ["c", "d"]], Found))
    encoded = torch.eye(2), torch.eye(2).repeat_interleave(2, 0)
    monkeypatch.setattr(study.locked_clip, "encode", lambda *_: encoded)
    numbers = study.measure_run(folder)
    assert numbers["data/pairs"] == 6 and numbers[study.KEPT] == 2 and numbers["seconds"] == 3
    assert numbers["retrieval_en/image_to_text_R@1"] == 100


def test_reductions_wait_for_the_codes():
    jobs = [job.name for job in in_order(study.STUDY.jobs(study.STUDY.chosen("all")))]
    assert jobs.index("reduced/codes") < jobs.index("reduced/random") < jobs.index("random")
    (words,) = study.STUDY.words(study.ARMS[2], 4)
    assert words[:3] == [
        "tldr_reduction.photos_study",
        "--data",
        "runs/photos/tldr_reduction/reduced/codes-seed4/shards",
    ]
