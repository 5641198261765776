"""python -m tldr_reduction.eval on trained arms; recall, re-ranking and histograms on known numbers."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from scripts import finished
from short_runs import small_set
from test_tldr_reduction_blip import blip_of
from test_tldr_reduction_train import SCRIPT, SECONDS, chain, folder, refused, tiny  # noqa: F401

from shared import tars
from studies.harness import report
from studies.tldr_reduction import STUDY
from tldr_reduction import config
from tldr_reduction import eval as evaluation
from tldr_reduction.eval import itm_histogram, plain, rerank_scores, retrieval_recall


@pytest.mark.golden("tldr_reduction", "retrieval_rerank")
def test_rerank_scores(case):
    model = blip_of(case).eval()
    model.enc_token_id = case["enc_token_id"]
    inputs = case["image"], case["input_ids"], case["attention_mask"]
    for batch_size in (3, 64):
        to_text, to_image = rerank_scores(model, *inputs, case["k_test"], batch_size)
        case.close("score_i2t", to_text, atol=2e-5)
        case.close("score_t2i", to_image, atol=2e-5)


@pytest.mark.golden("tldr_reduction", "retrieval_metrics")
def test_retrieval_recall(case):
    c = case["captions_per_image"]
    n, m = case["scores_i2t"].shape
    own = torch.arange(m).view(n, c)
    metrics = retrieval_recall(case["scores_i2t"], case["scores_t2i"], torch.arange(m) // c, own)
    for name, value in metrics.items():
        case.close(name, value, atol=1e-4)
    assert set(metrics) == {name for name in case if name.startswith(("txt_r", "img_r", "r_mean"))}


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


def test_scores_are_of_the_kept_pairs_before_and_after():
    lines = [{"itm": "0.1", "itm_after": "0.3"}, {"itm": "0.6", "itm_after": "0.8"}, {"itm": "0.0", "itm_after": ""}]
    found = evaluation.score_metrics({"itm": {"before": {"cut": 0.5}}}, lines)
    assert found == pytest.approx(
        {"itm/before_mean": 35, "itm/before_below_cut": 50, "itm/after_mean": 55, "itm/after_below_cut": 50}
    )
    median = evaluation.score_metrics({"itm": {"before": {"cut": 0.2}}}, lines)  # a median, as of cosines
    assert (median["itm/before_below_cut"], median["itm/after_below_cut"]) == (50, 0)
    assert evaluation.score_metrics({}, [{"key": "a"}]) == {}


def test_quality_of_a_reduction_is_in_percent_of_cosines():
    checks = {"captions": {"samples": 9, "coverage": 0.5, "coverage_random": [0.4, 0.45]}, "another encoder": {}}
    assert evaluation.quality_metrics({"checks": checks}) == pytest.approx(
        {"captions/coverage": 50, "captions/coverage_random": 42.5}
    )
    assert evaluation.quality_metrics({"checks": {}}) == {}


def test_metrics_of_data_are_of_the_samples_that_a_run_reads(folder, tmp_path, capsys):
    """Data may be a list of shards, of which --dataset-size uses the first samples; steps follow from their number."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "seconds": 0.0}\n')
    cfg = config.Config(data=f"{folder}/pool/{{00000..00001}}.tar", batch_size=32, epochs=3)
    for size, pairs in ((None, 128), (70, 70)):
        found = evaluation.training_metrics(tmp_path, dataclasses.replace(cfg, dataset_size=size))
        assert found["data/pairs"] == pairs >= found["data/emoji"] > 0 and found["data/named"] == 100
        assert found["steps"] == 3 * (pairs // 32) and "early_loss_ita" not in found
    assert evaluation.training_metrics(tmp_path, dataclasses.replace(cfg, data="gone/{0..9}.tar")) == {}
    windows = dataclasses.replace(cfg, data="pipe:false {0..9}.tar", window_shards=1, dataset_size=320)
    assert evaluation.training_metrics(tmp_path, windows) == {"steps": 30}
    assert capsys.readouterr().out == ""


def test_a_reduction_is_measured_without_the_data_that_it_reduced(folder, tmp_path, capsys):
    """They may be gone by then; samples need no .json, either."""
    shard = tmp_path / "shards/00000.tar"
    tars.write_tar(shard, [{"__key__": key, "png": b"?", "txt": "a"} for key in ("b", "c")])
    cfg = config.Config(data=str(tmp_path / "shards"))
    assert evaluation.data_metrics(cfg) == {"data/pairs": 2}
    checks = {"captions": {"samples": 9, "coverage": 0.5}}
    (tmp_path / "report.json").write_text(json.dumps({"checks": checks}))
    (tmp_path / "config.json").write_text('{"data": "gone.tar", "captions": "original"}')
    (tmp_path / "report.csv").write_text("key,kept,cluster\nb,1,0\nc,1,1\n")
    measured = {"data/pairs": 2, "captions/coverage": 50.0}
    assert evaluation.data_metrics(cfg) == measured
    assert "metrics of the samples in gone.tar are left out: shard gone.tar does not exist" in capsys.readouterr().out
    tars.write_tar(tmp_path / "shards/00001.tar", [{"__key__": "d", "png": b"?", "txt": "a"}])
    assert evaluation.data_metrics(dataclasses.replace(cfg, data=str(shard))) == {"data/pairs": 2}  # not of all shards


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
    assert 0 <= clip["groups_ood/top1"] <= 100 and clip["data/pairs"] >= clip["data/emoji"] > 0 and clip["data/ami"] > 0
    assert clip["steps"] == 2 * (clip["data/pairs"] // 32) and 0 <= clip["data/generated_right"] <= 100
    assert plain("Piñata: T-shirt") == plain("pinata t - shirt") and "itm/auc" not in clip  # all captions here are true
    assert "rerank/retrieval_ood/txt_r1" in blip and blip["itm/before_below_cut"] <= 100 >= blip["itm/after_below_cut"]
    for path, value in ((runs[0], clip["groups_ood/top1"]), (runs[1], blip["rerank/retrieval_ood/txt_r1"])):
        assert f"all metrics: {path}/results.md" in result.out and f" {value:.2f} " in result.out
    found = report.compare_runs(list(map(str, runs)), [clip, blip], STUDY.headings)
    (folder / "report").mkdir()
    STUDY.plot(found, folder / "report")
    for plot in ("itm", "clusters", "fractions"):
        assert (folder / f"report/tldr_reduction_{plot}.png").stat().st_size > 5000
    refused(cli(chain["captioner"], *sets, module="tldr_reduction.eval"), "stage captioner")
