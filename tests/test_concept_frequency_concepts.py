"""Files of concepts and scores; matching names of counts with names of scores: equal, respelled, renamed."""

import json

import pytest

from concept_frequency.concepts import (
    OTHER_NAMES,
    fold,
    join,
    load_json,
    numbered,
    read_concepts,
    read_descriptions,
    scores_of,
)


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
        assert scores_of(load_json(tmp_path / name), "RN50|cc3m", tmp_path / name) == {key: 3.0}
    with pytest.raises(ValueError, match="has no model backboneRN101"):
        scores_of(value, "RN101|cc3m", tmp_path / "toys_class_results.json")


def test_spellings_of_a_name_match():
    assert fold("Polka-dotted") == fold("polka_dotted") == "polka dotted"
    counts = {"Annual Crop Land": 1, "american_bulldog": 2, "2012 Acura TL Sedan": 3, "outdoor apartment building": 4}
    scores = {
        "american bulldog": 20.0, "Acura TL Sedan 2012": 30.0, "annual crop land": 10.0,
        "apartment_building/outdoor": 40.0, "unheard of": 0.0,
    }  # fmt: skip
    found = join(counts, scores, {})
    assert {name: counts[other] for name, other in found.names.items()} == {
        "american bulldog": 2, "Acura TL Sedan 2012": 3, "annual crop land": 1, "apartment_building/outdoor": 4,
    }  # fmt: skip
    assert (found.respelled, found.renamed) == (4, 0)
    assert found.scores_left == ["unheard of"] and found.counts_left == []


def test_equal_names_match_first_and_ambiguous_names_do_not_match():
    found = join({"T-shirt": 5, "t-shirt": 7, "cup": 1}, {"t shirt": 1.0, "T-shirt": 2.0, "Cup": 3.0, "CUP": 4.0}, {})
    assert found.names == {"T-shirt": "T-shirt", "t shirt": "t-shirt"}  # one is left, and has one candidate
    assert found.scores_left == ["Cup", "CUP"] and found.counts_left == ["cup"]
    assert join({"T-shirt": 5, "t-shirt": 7}, {"t shirt": 1.0}, {}).names == {}


def test_other_names_and_aliases():
    counts = {"car": 1, "Herbaceous Vegetation Land": 2, "projectile": 3, "missile": 4, "lorry": 5}
    scores = dict.fromkeys(["automobile", "brushland or shrubland", "missile (1)", "missile (2)", "truck"], 1.0)
    found = join(counts, scores, {"truck": "lorry", "ship": "boat"})
    assert list(found.names.values()) == ["car", "Herbaceous Vegetation Land", "missile", "projectile", "lorry"]
    assert found.renamed == 4 and not found.scores_left and not found.counts_left
    assert not join({"car": 1}, {"car": 1.0, "automobile": 2.0}, {}).names.keys() - {"car"}  # a count has one score
    assert all(fold(name) == name for pair in OTHER_NAMES.items() for name in pair)


def test_classes_that_share_a_name_are_numbered():
    assert numbered(["missile", "dog", "missile"]) == ["missile (1)", "dog", "missile (2)"]
