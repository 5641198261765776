"""The study on photographs: its arms with either language model, metrics by language, claims."""

import pytest

from studies import flame_photos as photos_study
from studies import flame_recaption as recaption
from studies.harness import verdicts
from studies.harness.report import Comparison


def test_languages_are_asked_with_a_multilingual_model_alone():
    gemma, smollm2 = photos_study.study("gemma"), photos_study.study("smollm2")
    assert "4 other languages, image to text" in [claim.claim for claim in gemma.claims]
    assert "4 other languages, image to text" not in [claim.claim for claim in smollm2.claims]
    assert any("bank-gemma" in once.command for once in gemma.before)
    rows = [study.more_rows(Comparison({}, [0], {}, set())) for study in (gemma, smollm2)]
    assert [[row["primary"] for row in each] for each in rows] == [[False], [False, True]]


def test_sets_of_languages_have_the_names_of_evaluation():
    found = {
        f"retrieval_multi30k_{code}/image_to_text_R@1": value
        for code, value in zip(photos_study.MULTI30K, (9.0, 3.0, 2.0, 1.0), strict=True)
    }
    named = photos_study.of_languages(found | {"retrieval_ar/image_to_text_R@1": 2.0})
    assert named["language_en/image_to_text_R@1"] == 9 and named["language_ar/image_to_text_R@1"] == 2
    assert named["languages/other_image_to_text_R@1"] == 2
    only_english = photos_study.of_languages({"retrieval_multi30k_en/image_to_text_R@1": 9.0})
    assert set(only_english) == {"language_en/image_to_text_R@1"}


def test_a_quarter_of_the_photographs_joins_the_arm_with_all():
    top1 = photos_study.CIFAR10_TOP1
    arms = {"clip": [{top1: 40.0}] * 2, "clip-4": [{top1: 30.0}] * 2, "flame": [{top1: 50.0}, {top1: 52.0}]}
    found = Comparison(arms | {"flame-4": [{top1: 44.0}, {top1: 45.0}]}, [0, 1], {}, set())
    photos_study.derive(found)
    assert found.arms["flame"][1][photos_study.AT_4] == 45 and found.arms["clip"][0][photos_study.AT_4] == 30
    rows = {row["claim"]: row for row in verdicts.judged(photos_study.CLAIMS, found.arms, [])}
    assert rows["above a text tower, 1/4 of the pairs"]["difference"] == pytest.approx(14.5)
    assert rows["zero-shot above a trained text tower"]["primary"]


def test_captions_of_a_photograph():
    about = {"captions": ["A dog runs .", "A brown dog", "Grass ."]}
    assert recaption.captions(about) == ("A dog runs .", "A brown dog", "A dog runs. A brown dog. Grass.")
    assert recaption.captions({"captions": ["One"]}) == ("One", "One", "One.")
