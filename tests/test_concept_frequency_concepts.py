"""Concepts of captions and prompts, and files of concepts, counts and scores."""

import json

import pytest

from concept_frequency.concepts import (
    concept_scores,
    load_counts,
    load_results,
    mean_scores,
    prompts_with_concept,
    read_concepts,
    read_descriptions,
)


@pytest.mark.golden("concept_frequency", "t2i_concepts")
def test_t2i_concepts(case):
    found = prompts_with_concept(case["prompts"], case["words"])
    assert found == case["indices"]
    scores = concept_scores(found, case["scores"])
    assert {word: rows.tolist() if len(rows) else None for word, rows in scores.items()} == case["aggregated"]


def test_prompts_and_scores():
    prompts = ["a carsick person", "two cars"]
    assert prompts_with_concept(prompts, ["car"]) == {"car": [0, 1]}
    assert prompts_with_concept(prompts, ["car"], plural_prefix=False) == {"car": [1]}
    assert mean_scores({"a": [1.0] * 5, "b": [2.0] * 6}) == {"b": 2.0}


def test_files_of_concepts(tmp_path):
    (tmp_path / "classnames.txt").write_text("T-shirt\nt-shirt\nbald_eagle\n")
    assert read_concepts(tmp_path) == ["T-shirt", "t-shirt", "bald_eagle"]
    (tmp_path / "described.json").write_text(json.dumps([{"dog": ["a photo of a dog."]}, {"cat": ["..."]}]))
    assert read_concepts(tmp_path / "described.json") == ["dog", "cat"]
    (tmp_path / "bad.json").write_text("3")
    with pytest.raises(ValueError, match="no list of concepts"):
        read_concepts(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="does not exist"):
        read_concepts(tmp_path / "none.txt")
    (tmp_path / "bad.json").write_text('["dog"]')
    with pytest.raises(ValueError, match="holds no descriptions"):
        read_descriptions(tmp_path / "bad.json")
    value = {"backboneRN50_pretrainedcc3m": {"full": 1.0, "classwise": {"plane": 3.0}}}
    for name, key in (("cifar10_class_results.json", "airplane"), ("toys_class_results.json", "plane")):
        (tmp_path / name).write_text(json.dumps(value))
        assert load_results(tmp_path / name, "RN50|cc3m") == {key: 3.0}
    with pytest.raises(ValueError, match="has no model backboneRN101"):
        load_results(tmp_path / "toys_class_results.json", "RN101|cc3m")
    (tmp_path / "c.json").write_text('{"dog": 3}')
    assert load_counts(tmp_path / "c.json") == {"dog": 3}
