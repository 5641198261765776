"""python -m tldr_reduction.eval on trained arms; recall and histograms on known numbers."""

import json
import shutil

import numpy as np
import pytest
import torch
from scripts import finished, refused
from short_runs import small_set
from tldr_reduction_runs import chain, folder, tiny  # noqa: F401

from tldr_reduction import eval as evaluation
from tldr_reduction.eval import itm_histogram, retrieval_recall

SCRIPT = "tldr_reduction.train"


def test_recall_takes_blips_dicts_and_images_without_captions():
    i2t = np.array([[0.9, 0.1, 0.2], [0.9, 0.1, 0.2], [0.0, 0.3, 0.1]], np.float32)
    own = {0: [0], 1: [], 2: [2, 1]}  # the second image has no caption, which is a miss
    of_text = {0: 0, 1: 2, 2: 2}
    metrics = retrieval_recall(i2t, i2t.T.copy(), of_text, own)
    assert metrics["txt_r1"] == metrics["txt_r10"] == pytest.approx(200 / 3)
    assert metrics == retrieval_recall(torch.tensor(i2t), torch.tensor(i2t.T.copy()), [0, 2, 2], list(own.values()))


def test_itm_histogram_is_a_density():
    scores = torch.tensor([0.0, 0.05, 0.55, 1.0])
    assert itm_histogram(scores).tolist() == [5.0, 0, 0, 0, 0, 2.5, 0, 0, 0, 2.5]


def test_a_changed_rerank_set_is_measured_again(tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pt").touch()
    monkeypatch.setattr(evaluation.evaluation, "measured_run", lambda path, cfg, sets, measure: sets)
    assert evaluation.evaluated(str(tmp_path), evaluation.Config((), ("a",), ("b",)), None) == ("a", "b")


def test_evaluation(chain, cli, folder):
    classes, pairs = (small_set(name, folder / "sets", every=16) for name in ("groups_ood", "retrieval_ood"))
    sets = ["--sets", classes, "--rerank", pairs]
    for arm, run_folder in (("tldr", chain["clip"]), ("blip-tldr", chain["blip"])):
        shutil.copytree(run_folder, folder / f"{arm}-seed0")
    runs = [folder / "tldr-seed0", folder / "blip-tldr-seed0"]
    result = finished(cli(*runs, *sets, "--k-test", "2", module="tldr_reduction.eval"))
    clip, blip = (json.loads((path / "results.json").read_text())["metrics"] for path in runs)
    assert 0 <= clip["groups_ood/top1"] <= 100 and "rerank/retrieval_ood/txt_r1" in blip
    for path, found in zip(runs, (clip, blip), strict=True):
        assert f"{path}/results.md" in result.out and f" {found['groups_ood/top1']:.2f} " in result.out
    refused(cli(chain["captioner"], *sets, module="tldr_reduction.eval"), "stage captioner")
