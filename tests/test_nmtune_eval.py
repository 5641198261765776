"""Spectra and accuracies compared with numbers from the authors' code."""

import pytest
from conftest import Case
from test_nmtune_model import cases

from nmtune.eval import (
    accuracy,
    balanced_accuracy,
    feature_spectrum,
    largest_singular_value_ratio,
    pmk_accuracy,
    project_logits,
    singular_value_entropy,
)


@pytest.mark.golden("nmtune", "feature_spectrum")
def test_feature_spectrum(case):
    for prefix, one in cases(case):
        s = feature_spectrum(one["features"])
        case.close(f"{prefix}singular_values", s, atol=1e-5)
        case.close(f"{prefix}sve", singular_value_entropy(s), atol=1e-5)
        case.close(f"{prefix}lsvr", largest_singular_value_ratio(s), atol=1e-5)
        pca = feature_spectrum(one["features"], center="sample+feature")
        case.close(f"{prefix}pca_singular_values", pca, atol=2e-5)
        raw = feature_spectrum(one["features"], normalize=False, center="none")
        case.close(f"{prefix}raw_singular_values", raw, atol=1e-5)
        case.close(f"{prefix}raw_sve", singular_value_entropy(raw), atol=1e-5)
        case.close(f"{prefix}raw_lsvr", largest_singular_value_ratio(raw), atol=1e-5)


def groups_of(case: Case, name: str) -> list[list[int]]:
    flat, offsets = case[f"{name}_flat"].tolist(), case[f"{name}_offsets"].tolist()
    return [flat[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]


@pytest.mark.golden("nmtune", "eval_metrics")
def test_eval_metrics(case):
    case.close("top1", accuracy(case["logits"], case["labels"]), atol=1e-6)
    case.close("balanced_top1", balanced_accuracy(case["logits"], case["labels"]), atol=1e-6)
    logits = case["big_logits"]
    for letter in "ar":
        groups = [[c] for c in case[f"imagenet_{letter}_classes"].tolist()]
        case.close(f"projected_{letter}", project_logits(logits, groups), atol=1e-6)
    groups = [[c] for c in case["imagenet_a_classes"].tolist()]
    case.close("top1_a", accuracy(project_logits(logits, groups), case["labels_a"]), atol=1e-6)
    groups = groups_of(case, "objectnet_groups")
    case.close("projected_objectnet", project_logits(logits, groups), atol=1e-6)
    first = groups[: case["projected_first30_groups"].shape[1]]
    case.close("projected_first30_groups", project_logits(logits, first), atol=1e-6)


@pytest.mark.golden("nmtune", "pmk_robustness")
def test_pmk_robustness(case):
    accepted = groups_of({"x_flat": case["labels_flat"], "x_offsets": case["labels_offsets"]}, "x")
    ends = case["set_offsets"].tolist()
    sets = [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    pm0, pmk = pmk_accuracy(case["logits"], accepted, sets)
    case.close("pm0", pm0, atol=1e-6)
    case.close("pmk", pmk, atol=1e-6)
