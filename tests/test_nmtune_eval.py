"""Spectra and accuracies compared with numbers from the authors' code."""

import dataclasses

import pytest
import torch
from conftest import Case
from test_nmtune_model import cases
from test_nmtune_train import corpus, features_file, in_process, one_sentence  # noqa: F401

from nmtune import config
from nmtune.eval import (
    accuracy,
    balanced_accuracy,
    feature_spectrum,
    largest_singular_value_ratio,
    pmk_accuracy,
    project_logits,
    singular_value_entropy,
)
from nmtune.model import NMTuneHead


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


def test_heads_and_checkpoints_of_something_else_end_in_one_sentence(in_process, features_file, tmp_path):
    run, head, pretrained = tmp_path / "run", tmp_path / "head.pt", dataclasses.asdict(config.PretrainConfig())
    command = ["lp", "--features", features_file, "--epochs", "1", "--out", run]
    assert in_process("nmtune.train", *command)[0] == 0  # 24 features, 6 classes

    def exported(dim: int, num_classes: int) -> dict:
        state = NMTuneHead(dim, num_classes, ratio=0.5).state_dict()
        return {key if key.startswith("cl") else f"image_encoder.{key}": value for key, value in state.items()}

    torch.save(exported(24, 6), head)
    code, out, err = in_process("nmtune.eval", run, "--head", head)
    assert code == 0 and "test" in out, err
    for content, message in (
        (exported(12, 6), "12 features and 6 classes"),
        (exported(24, 5), "24 features and 5 classes"),
        ({"weight": torch.zeros(6, 24)}, "holds no head"),
        ({"epoch": 3}, "holds no weights"),
        ([1], "holds no weights"),
    ):
        torch.save(content, head)
        code, _, err = in_process("nmtune.eval", run, "--head", head)
        assert code == 2 and message in err and one_sentence(err), err
    for content, message in (({"head": {}}, "not a run of nmtune"), ({"config": pretrained}, "holds no head")):
        torch.save(content, run / "checkpoint.pt")
        code, _, err = in_process("nmtune.eval", run)
        assert code == 2 and message in err and one_sentence(err), err
    code, _, err = in_process("nmtune.eval", run, "--sets", "x")
    assert code == 2 and "is no CLIP" in err and one_sentence(err), err
    torch.save({"a": 1}, run / "checkpoint.pt")
    encoder = ["--encoder", "timm:resnet_emoji", "--data", "data/emoji:group:tune"]
    for module, *arguments in (
        ["nmtune.eval", run, "--sets", "x"],
        ["studies.nmtune_encoders", "--encoder", run],
        ["nmtune.train", *encoder, "--checkpoint", run / "checkpoint.pt", "--out", tmp_path / "new"],
    ):
        code, _, err = in_process(module, *arguments)
        assert code == 2 and str(run) in err and one_sentence(err), err
