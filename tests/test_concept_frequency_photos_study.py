"""The study on photographs: removed captions, curves by counts, changes of the same noun."""

from pathlib import Path

import numpy as np
import pytest
import torch

from concept_frequency.concepts import Concepts
from concept_frequency.config import CountConfig
from concept_frequency.count import count_corpus
from studies import concept_frequency as study
from studies import concept_frequency_nouns as nouns
from studies.harness import verdicts
from studies.harness.report import Comparison


def test_captions_with_a_rarer_noun_are_left_out():
    captions = [f"a {noun} is here" for noun in ("dog", "cat", "ball", "tree")] * 200
    kept = nouns.thinned(captions, ["dog", "cat", "ball", "tree"], 0.75, 0)
    counts = {noun: sum(noun in captions[row] for row in kept) for noun in ("dog", "cat", "ball", "tree")}
    rare = [noun for noun, count in counts.items() if count < 200]
    assert len(rare) == 2 and all(30 < counts[noun] < 75 for noun in rare)
    assert kept == nouns.thinned(captions, ["dog", "cat", "ball", "tree"], 0.75, 0)
    halves = {tuple(nouns.thinned(captions, ["dog", "cat", "ball", "tree"], 1.0, seed))[:4] for seed in range(8)}
    assert len(halves) > 1


def test_captions_are_tagged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Counts of any rows are those that counting them alone gives, and only the first call tags captions."""
    captions = [
        "A dog chases two balls .",
        "Two dogs run .",
        "A man throws a ball to his dog .",
        "The snow .",
        "It runs .",
    ]
    monkeypatch.setattr(nouns, "HOME", tmp_path)
    monkeypatch.setattr(nouns, "captions_of", lambda shards: captions)
    monkeypatch.setattr(nouns, "test_nouns", lambda: Concepts(["ball", "dog", "snow", "zebra"], {}, {}))
    nouns.nouns_of_captions.cache_clear()
    found = nouns.nouns_of_captions("shards")
    assert found.shape == (5, 4) and found.sum(0).tolist() == [2, 3, 1, 0]
    rows = [1, 2, 3]
    (tmp_path / "some.txt").write_text("".join(f"{captions[row]}\n" for row in rows))
    cfg = CountConfig(
        data=(str(tmp_path / "some.txt"),), out=str(tmp_path / "alone"), spacy=nouns.SPACY, query_spacy=nouns.SPACY,
        workers=1,
    )  # fmt: skip
    assert found[rows].sum(0).tolist() == count_corpus(cfg, nouns.test_nouns().names).text.tolist()
    monkeypatch.setattr(nouns, "tag_captions", lambda *_: pytest.fail("tagged again"))
    nouns.nouns_of_captions.cache_clear()
    assert np.array_equal(nouns.nouns_of_captions("shards"), found)
    nouns.nouns_of_captions.cache_clear()


def test_nouns_of_test_captions_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = ["A dog .", "Two dogs run .", "A cat sleeps .", "The snow ."]
    monkeypatch.setattr(nouns, "HOME", tmp_path)
    monkeypatch.setattr(nouns, "MIN_IMAGES", 1)
    monkeypatch.setattr(nouns, "test_set", lambda: nouns.TestSet(torch.zeros(2, 4), texts, 2))
    nouns.test_nouns.cache_clear()
    found = nouns.test_nouns()
    assert found.names == ["cat", "dog", "snow"] and found.to_texts["dog"] == [0, 1]
    monkeypatch.setattr(nouns, "load_spacy", lambda _: pytest.fail("tagged again"))
    nouns.test_nouns.cache_clear()
    assert nouns.test_nouns() == found
    nouns.test_nouns.cache_clear()


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """40 nouns, each in five test captions of two images, with counts that span a factor of a hundred."""
    names = [f"noun{i}" for i in range(40)]
    texts = {name: list(range(10 * i, 10 * i + 10)) for i, name in enumerate(names)}
    images = {name: [2 * i, 2 * i + 1] for i, name in enumerate(names)}
    monkeypatch.setattr(nouns, "test_nouns", lambda: Concepts(names, images, texts))
    monkeypatch.setattr(nouns, "test_set", lambda: nouns.TestSet(torch.zeros(80, 4), [""] * 400, 5))
    return np.round(np.logspace(0.3, 2.3, 40)).astype(np.int64)


def test_recall_that_rises_with_log_frequency_has_that_slope(tested: np.ndarray):
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(80, 64, generator=generator), dim=-1)
    found = torch.from_numpy(np.log10(tested) / 3).repeat_interleave(
        10
    )  # share of the captions of a noun that are right
    right = torch.rand(400, generator=generator) < found
    texts = torch.where(right[:, None], images.repeat_interleave(5, 0), torch.randn(400, 64, generator=generator) / 8)
    numbers = nouns.curve_of(images, texts.float(), tested)
    assert numbers["slope"] > 15 and numbers["r_log"] > 0.6 and numbers["rho"] > 0.8 > numbers["rho_null"]
    assert numbers["concepts"]["noun39"]["assigned"] == tested[-1]
    assert {"slope_i2t", nouns.RECALL, "retrieval_en/mean_recall"} <= set(numbers)


def test_changes_of_the_same_noun_and_claims():
    def run(gain: float, thin: bool, seed: int) -> dict:
        table = {
            f"noun{i}": {"assigned": 100 / (4 if thin and i % 2 else 1), "accuracy": 50 - gain * (thin and i % 2)}
            for i in range(20)
        }
        numbers = {"slope": 10.0 + seed, "r_log": 0.5, "r_linear": 0.3, "rho": 0.9, "rho_null": 0.1 * seed}
        return numbers | {nouns.RECALL: 30.0, "concepts": table}

    arms = {"captions": [run(6.0, False, s) for s in range(3)], "thinned": [run(6.0 + s, True, s) for s in range(3)]}
    found = Comparison(arms, [0, 1, 2], {}, set())
    study.derive_photos(found)
    assert found.arms["thinned"][0]["within"] == pytest.approx(6 / np.log10(4))
    bars = [((), {nouns.RECALL: 1.0})]
    rows = {row["claim"]: row for row in verdicts.judged(study.PHOTOS_CLAIMS, found.arms, bars)}
    assert rows["accuracy rises with log frequency (points a decade)"]["verdict"] == "direction only"
    assert rows["same concept at another frequency (points a decade)"]["verdict"] == "direction only"
    assert len(study.more_rows_on_photos(found)) == 2


def test_plot(tmp_path: Path):
    table = {f"noun{i}": {"assigned": 10 + 10 * i, "accuracy": 5.0 + i} for i in range(30)}
    other = {
        name: {"assigned": row["assigned"] / (1 + int(name[4:]) % 2), "accuracy": 4.0} for name, row in table.items()
    }
    study.plot_photos(
        Comparison({"captions": [{"concepts": table}], "thinned": [{"concepts": other}]}, [0], {}, set()), tmp_path
    )
    assert (tmp_path / "concept_frequency_photos.png").is_file()
