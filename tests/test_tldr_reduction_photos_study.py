"""The study on photographs: captions T_g, measurements, and the order of reductions."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from photographs import WORDS, cfg, corpus  # noqa: F401

from shared import layout, zeroshot
from studies import tldr_reduction_photos as study
from studies.harness import locked_clip, photos, report
from studies.harness.runner import in_order
from tldr_reduction.cluster import random_subset, select_fraction


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


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """MiniLM replaced by bags of words; returns the texts of each call."""
    calls: list[list[str]] = []
    words = sorted({"a", "dog", "brown", "it", "runs", "red", *WORDS})
    vocabulary = {word: column for column, word in enumerate(words)}

    def bag(texts: list[str]) -> torch.Tensor:
        calls.append(texts)
        return photos.bags(texts, vocabulary)

    monkeypatch.setattr(study, "text_embedder", lambda name, dim: bag)
    monkeypatch.setattr(study, "MINILM", len(vocabulary))
    monkeypatch.chdir(tmp_path)
    return calls


def test_predictions_are_what_others_said(pool: Path, tmp_path: Path, embedded: list[list[str]]):
    for _ in range(2):  # the second call finds the file and the features
        study.main(study.Config(data=str(pool), predictions=str(tmp_path / "said.json")))
    said = json.loads((tmp_path / "said.json").read_text())
    assert [each["caption"] for each in said[:3]] == ["A brown dog .", "It runs .", "A dog ."]
    assert said[3]["image_id"] == "000000003"
    assert [sorted(texts) for texts in embedded] == [
        [
            "A brown dog .",
            "A brown dog .; It runs .",
            "A dog .",
            "A dog .; A brown dog .",
            "It runs .",
            "It runs .; A dog .",
        ]
    ]


def test_features_of_texts_are_in_their_order(embedded: list[list[str]]):
    texts = ["a brown dog runs", "dog", "a dog"]
    found = study.minilm_features(texts)
    assert found.sum(1).tolist() == [4, 1, 2] and embedded == [["dog", "a dog", "a brown dog runs"]]
    assert study.minilm_features(["a dog", "red"]).sum(1).tolist() == [2, 1] and embedded[1:] == [["red"]]


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
    jobs = [job.name for job in in_order(study.PHOTOS.jobs(study.PHOTOS.chosen("all")))]
    assert jobs.index("reduced/codes") < jobs.index("reduced/random") < jobs.index("random")
    (words,) = study.PHOTOS.words(study.ARMS[2], 4)
    assert words[:3] == [
        "studies.tldr_reduction_photos",
        "--data",
        "runs/photos/tldr_reduction/reduced/codes-seed4/shards",
    ]


def test_arms_are_named_by_what_they_keep():
    """Every share of the copies of a cluster keeps all of its photographs; a random one misses some."""
    clusters, photograph = torch.arange(30_000) // 100, torch.arange(30_000) // 5
    for name, share in (("half", 0.5), ("quarter", 0.25)):
        kept = select_fraction(clusters, 300, share, 0)
        assert len(kept) == 30_000 * share and len(photograph[kept].unique()) == 6_000
        assert len(photograph[random_subset(30_000, share, 0)].unique()) < 5_900
        arm = "codes" if name == "quarter" else "codes-half"
        assert f"--keep {share:g}" in study.REDUCTIONS[arm] and study.HEADINGS[arm].startswith(name)
    for name, flags in study.REDUCTIONS.items():
        assert ("--no-drop-duplicates" in flags) == ("--select" not in flags), name
        assert ("full" in study.HEADINGS[name]) == ("--select all" in flags)
    core = [arm.name for arm in study.PHOTOS.chosen("core")]
    assert sorted(core) == sorted(("full", *study.CORE))
    own = [floor.arms for floor in study.FLOORS if floor.name.startswith(study.WITH_MINILM)]
    assert own == [(arm.name,) for arm in study.ARMS]  # each by a correlation on its own data


def test_the_floor_of_a_reduction_is_of_the_seeds_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("codes-seed3", "codes-seed12", "codes-seed5", "codes-half-seed3"):
        (tmp_path / study.RUNS / "reduced" / name).mkdir(parents=True)
        (tmp_path / study.RUNS / "reduced" / name / "report.csv").touch()
    seen = []
    monkeypatch.setattr(
        photos, "by_correlation", lambda sets, train, own, of_texts: seen.append((train, own)) or {"r": len(train)}
    )
    floors = {floor.arms: floor for floor in study.FLOORS}
    found = floors["codes",].values([12, 3])
    kept = [f"{study.RUNS}/reduced/codes-seed{seed}/shards" for seed in (12, 3)]
    assert seen == [(path, True) for path in kept] and found == {"r": sum(map(len, kept)) / 2}
    assert floors["full",].values([12, 3]) == {"r": len(study.POOL)} and seen[2:] == [(study.POOL, True)]
    assert len(study.PHOTOS.floor_files([12, 3])) == 3  # floors are measured again when a reduction changes


def test_runs_with_other_mlps_have_other_settings():
    """So results are not extended by them."""
    usual = dataclasses.asdict(study.Config())
    others = {"hidden_dim": 512, "embed_dim": 128, "dropout": 0.1, "noise": 0.0, "weight_decay": 0.1}
    found = {report.setting_of(usual | {name: value}) for name, value in others.items()}
    assert len(found | {report.setting_of(usual)}) == 6
    towers = study.create_towers(usual | {"hidden_dim": 8, "embed_dim": 4})
    assert towers.image[-1].weight.shape == (4, 8) and towers.text[1].std == 0.5


def test_mlps_on_locked_towers_learn_what_captions_say(cfg: locked_clip.Settings, embedded: list[list[str]]):  # noqa: F811
    settings = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(locked_clip.Settings)}
    run = locked_clip.train(study.Config(**settings), towers=study.TOWERS)
    features, _, _ = photos.test_set("retrieval")
    image, text = locked_clip.encode(run, features, [f"a {word} ." for word in WORDS], study.TOWERS)
    hits = (image @ torch.nn.functional.normalize(text, dim=-1).T).argmax(1) == torch.arange(12) % 6
    assert zeroshot.percent(hits) > 60
    with pytest.raises(ValueError, match="holds other towers"):
        locked_clip.load(run, study.TOWERS._replace(create=lambda settings: torch.nn.Linear(2, 2)))
