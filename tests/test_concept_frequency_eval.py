"""Scores of concepts, comparisons of two arms, and the command line; the study's tests evaluate runs."""

import numpy as np
import pytest
import torch.nn.functional as F
from scripts import held, one_sentence
from test_concept_frequency_model import partner

from concept_frequency import eval
from concept_frequency.eval import caption_concepts, concept_recall, per_class_accuracy, zero_shot_classifier


@pytest.mark.golden("concept_frequency", "zero_shot")
def test_zero_shot(case):
    classifier = zero_shot_classifier(case["prompt_embeddings"])
    case.close("classifier", classifier, atol=1e-5)
    features = F.normalize(case["image_features_raw"], dim=-1)
    case.close("image_features", features, atol=1e-5)
    logits = 100 * features @ classifier
    case.close("logits", logits, atol=1e-4)
    case.close("predictions", case["logits"].argmax(dim=1))  # of the file's: rounding decides between equal classes
    percent, per_class = per_class_accuracy(case["logits"], case["labels"])
    case.close("accuracy_percent", [percent], atol=1e-5)
    case.close("per_class_accuracy_percent", per_class, atol=1e-5)


@pytest.mark.golden("concept_frequency", "retrieval")
def test_retrieval(case):
    if "k" not in case:
        case = partner(case, ".npz")
    truth = partner(case, ".json").json
    images, texts = case["image_embeddings"], case["text_embeddings"]
    found = caption_concepts(truth["docs"], captions_per_image=len(texts) // len(images))
    assert found.names == sorted(truth["concepts"])
    assert found.to_images == truth["concept_to_images"] and found.to_texts == truth["concept_to_texts"]
    recalls = [concept_recall(images, texts, found, k) for k in case["k"].tolist()]
    case.close("text_to_image_recall", [r[0] for r in recalls], atol=1e-6)
    case.close("image_to_text_recall", [r[1] for r in recalls], atol=1e-6)
    for k, (_, _, t2i, i2t) in zip(case["k"].tolist(), recalls, strict=True):
        assert t2i == pytest.approx(truth["conceptwise_text_to_image"][str(k)], abs=1e-6)
        assert i2t == pytest.approx(truth["conceptwise_image_to_text"][str(k)], abs=1e-6)


def test_changes_are_of_the_same_concept():
    def table(frequency: list[int], accuracy: list[float]) -> eval.Table:
        rows = zip("abc", frequency, accuracy, strict=True)
        return {name: {"assigned": f, "accuracy": a} for name, f, a in rows}

    zipf, other = table([100, 10, 1], [50.0, 30.0, 10.0]), table([1, 10, 100], [40.0, 30.0, 20.0])
    change, gain = eval.changes([zipf], [other])
    assert change.tolist() == [[2, 0, -2]] and gain.tolist() == [[10, 0, -10]]
    found = eval.beside_zipf(other, zipf)
    assert found["within"] == pytest.approx(5) and found["slope_on_zipf"] == pytest.approx(10)
    assert found["head"] == 40 and found["change_r_log"] == pytest.approx(1)
    assert "within" not in eval.beside_zipf(zipf, zipf)


@pytest.mark.filterwarnings("error")
def test_few_classes_give_numbers_without_warnings():
    """Five classes of one's own pictures: shuffles with constant bins, and draws of a single class, are left out."""
    frequency, accuracy = np.array([438, 876, 219, 292, 175]), np.array([0.0, 99.5, 0.0, 0.6, 0.0])
    found = eval.curve_metrics(frequency, accuracy, frequency)
    assert np.isfinite([found[name] for name in ("slope", "slope_low", "slope_high", "rho_null", "r_log")]).all()


def test_command_lines_end_in_one_sentence(in_process, tmp_path):
    result = in_process(tmp_path / "none", module="concept_frequency.eval")
    assert result.code == 2 and "no checkpoint at" in result.err and one_sentence(result.err), result.err
    result = in_process(tmp_path / "none", "--views", "0", module="concept_frequency.eval")
    assert result.code == 2 and "--views must be at least 1" in result.err and one_sentence(result.err), result.err


def test_contract_is_importable():
    """Names of the contract are in the file that it gives."""
    names = (
        "zero_shot_classifier per_class_accuracy caption_concepts concept_recall log_linear_curve correlation "
        "permutation_null misalignment frequency_agreement long_tail select_tail deduplicate phash balance_classes "
        "prompts_with_concept load_counts load_results"
    )
    assert all(hasattr(eval, name) for name in names.split())


def test_a_corpus_is_counted_by_one_process(tmp_path):
    with held(tmp_path / "pairs"), pytest.raises(ValueError, match="belongs to a run that is still going"):
        eval.count_pairs(tmp_path / "pairs.parquet", ["cat"], "en_core_web_sm")
