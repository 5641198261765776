"""Matching names of counts with names of scores: equal, respelled, renamed; unmatched names are reported."""

from concept_frequency.joining import OTHER_NAMES, fold, join, numbered


def test_spellings_of_a_name_match():
    assert fold("Polka-dotted") == fold("polka_dotted") == "polka dotted"
    counts = {"Annual Crop Land": 1, "american_bulldog": 2, "2012 Acura TL Sedan": 3, "outdoor apartment building": 4}
    scores = {
        "american bulldog": 20.0, "Acura TL Sedan 2012": 30.0, "annual crop land": 10.0,
        "apartment_building/outdoor": 40.0, "unheard of": 0.0,
    }  # fmt: skip
    found = join(counts, scores)
    assert {name: counts[other] for name, other in found.names.items()} == {
        "american bulldog": 2, "Acura TL Sedan 2012": 3, "annual crop land": 1, "apartment_building/outdoor": 4,
    }  # fmt: skip
    assert (found.respelled, found.renamed) == (4, 0)
    assert found.scores_left == ["unheard of"] and found.counts_left == []


def test_equal_names_match_first_and_ambiguous_names_do_not_match():
    found = join({"T-shirt": 5, "t-shirt": 7, "cup": 1}, {"t shirt": 1.0, "T-shirt": 2.0, "Cup": 3.0, "CUP": 4.0})
    assert found.names == {"T-shirt": "T-shirt", "t shirt": "t-shirt"}  # one is left, and has one candidate
    assert found.scores_left == ["Cup", "CUP"] and found.counts_left == ["cup"]
    assert join({"T-shirt": 5, "t-shirt": 7}, {"t shirt": 1.0}).names == {}


def test_other_names_and_aliases():
    counts = {"car": 1, "Herbaceous Vegetation Land": 2, "projectile": 3, "missile": 4, "lorry": 5}
    scores = dict.fromkeys(["automobile", "brushland or shrubland", "missile (1)", "missile (2)", "truck"], 1.0)
    found = join(counts, scores, {"truck": "lorry", "ship": "boat"})
    assert list(found.names.values()) == ["car", "Herbaceous Vegetation Land", "missile", "projectile", "lorry"]
    assert found.renamed == 4 and not found.scores_left and not found.counts_left
    assert not join({"car": 1}, {"car": 1.0, "automobile": 2.0}).names.keys() - {"car"}  # a count has one score
    assert all(fold(name) == name for pair in OTHER_NAMES.items() for name in pair)


def test_classes_that_share_a_name_are_numbered():
    assert numbered(["missile", "dog", "missile"]) == ["missile (1)", "dog", "missile (2)"]
