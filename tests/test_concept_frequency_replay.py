"""The authors' published files, and files in their layout, replayed.

Golden cases that are derived from the published files are checked against these where they are: in
`upstream_results/` beside the case, or in the clone that --upstream names.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import Case
from scripts import one_sentence
from test_concept_frequency_curves import as_upstream

from concept_frequency import curves, replay
from concept_frequency.curves import correlation, frequency_agreement, log_linear_curve, long_tail
from concept_frequency.replay import CLASSIFICATION, IMAGENET, METHODS, RETRIEVAL, Results


def results(case: Case, request: pytest.FixtureRequest) -> Results:
    """The authors' published files."""
    beside = case.path.parent / "upstream_results"
    folder = beside if beside.is_dir() else request.config.getoption("upstream")
    if folder is None or not (Path(folder) / "search_counts").is_dir():
        pytest.skip("needs the authors' published files: upstream_results/ beside the case, or --upstream CLONE")
    return Results(folder)


@pytest.mark.golden("concept_frequency", "published_curves")
def test_published_curves(case, request):
    """From the authors' counts and scores."""
    published = results(case, request)
    for row in case.json:
        model_name = f"{row['model']}|{row['pretraining']}"
        counts, scores, _ = published.pairs(row["task"], row["search"], model_name, row["prompt_or_metric"])
        curve, bins = as_upstream(log_linear_curve(counts, scores, row["num_bins"])), slice(*row["slice"])
        assert len(counts) == row["n_pairs"]
        assert curve.size.tolist() == row["bin_counts"]
        for ours, theirs in ((curve.position, "exp_bins"), (curve.mean, "bin_means"), (curve.std, "bin_stds")):
            np.testing.assert_allclose(ours, row[theirs], rtol=1e-6, atol=1e-6)
        assert correlation(curve, bins) == pytest.approx((row["rho"], row["p"]), abs=1e-9)
        assert correlation(curve) == pytest.approx((row["rho_all_bins"], row["p_all_bins"]), abs=1e-9)
        inner = correlation(curve, slice(1, -1))
        assert inner == pytest.approx((row["rho_1_to_minus1"], row["p_1_to_minus1"]), abs=1e-9)
        flat = curves.unbinned(counts, scores)
        assert flat["pearson"] == pytest.approx(row["pearson_unbinned"], abs=1e-9)
        assert flat["spearman"] == pytest.approx(row["spearman_unbinned"], abs=1e-9)


@pytest.mark.golden("concept_frequency", "frequency_agreement")
def test_frequency_agreement(case, request):
    published = results(case, request)
    for search, values in case.json.items():
        for pair in values.keys() - {"n_common"}:
            a, b = (published.all_counts(pretraining, search) for pretraining in pair.split("|"))
            spearman, n = frequency_agreement(a, b)
            assert n == values["n_common"]
            assert spearman == pytest.approx(values[pair]["spearman"], abs=1e-9)


@pytest.mark.golden("concept_frequency", "long_tail")
def test_long_tail(case, request):
    published = results(case, request)
    for key, values in case.json.items():
        pretraining, search = key.split("|")
        assert long_tail(published.tail_counts(pretraining, search)) == pytest.approx(values, abs=1e-9)


@pytest.mark.golden("concept_frequency", "let_it_wag")
def test_let_it_wag(case, request):
    imagenet = case["external_imagenet_top1"] | case["imagenet_ensemble_top1_from_results"]
    assert len(imagenet) == case["n_models"]
    below = sum(accuracy < 50 for accuracy in imagenet.values())
    assert (below, len(imagenet) - below) == (case["n_below_50"], case["n_above_50"])
    tail = results(case, request).let_it_wag()
    found = curves.two_slopes(list(imagenet.values()), [tail[name] for name in imagenet])
    assert (found["n_below"], found["n_above"]) == (case["n_below_50"], case["n_above_50"])
    assert found["slope_below"] == pytest.approx(case["slope_imagenet_below_50"], abs=1e-9)
    assert found["slope_above"] == pytest.approx(case["slope_imagenet_above_50"], abs=1e-9)


def write_published(folder: Path) -> None:
    """Files in the authors' layout: every score is linear in log frequency, counts of concepts differ by corpus."""
    (folder / "let_it_wag_datasets/evaluations").mkdir(parents=True)
    for name in ("search_counts", "zero_shot_evaluations", "retrieval_evaluations", "misalignment_metrics"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    for dataset in [*CLASSIFICATION, "imagenet-sketch", *RETRIEVAL]:
        names = [f"{dataset} {i}" for i in range(60)]
        count = dict(zip(names, (10 ** rng.uniform(0, 4, 60)).astype(int).tolist(), strict=True))
        scores = {name: 5 + 4 * math.log(n + 1) + rng.normal() for name, n in count.items()}
        for pretraining in ("cc3m", "cc12m"):
            for method in METHODS.values():
                path = folder / f"search_counts/{dataset}_{pretraining}_{method}_search_counts.json"
                path.write_text(json.dumps(count))
        models = {
            f"backbone{m.partition('|')[0]}_pretrained{m.partition('|')[2]}": {
                "full": 40.0, "classwise": scores, "conceptwise": scores,
            }
            for m in ("RN50|cc3m", "ViT-B-16|cc3m", "RN50|cc12m", "ViT-B-16|cc12m")
        }  # fmt: skip
        places = ["retrieval_evaluations"] if dataset in RETRIEVAL else ["zero_shot_evaluations"]
        prompts = ["t2i_k=10"] if dataset in RETRIEVAL else ["class", "simple", "ensemble"]
        for place in places:
            for prompt in prompts:
                (folder / place / f"{dataset}_{prompt}_results.json").write_text(json.dumps(models))
    degree = {"misalignment_degree (percent); fixed conservative dataset size": 0.1681}
    (folder / "misalignment_metrics/cc3m_misalignment_degree.json").write_text(json.dumps(degree))
    wag = {
        f"backbone{m.partition('|')[0]}_pretrained{m.partition('|')[2]}": {"full": value - 20 + 0.01 * value}
        for m, value in IMAGENET.items()
    }
    path = folder / "let_it_wag_datasets/evaluations/let_it_wag_ensemble_results.json"
    path.write_text(json.dumps(wag | {"backboneRN50_pretrainedcc3m": {"full": 10.0}}))


def test_replay_of_files_in_the_authors_layout(tmp_path, capsys):
    write_published(tmp_path / "clone")
    claims = replay.main(replay.Config(str(tmp_path / "clone"), str(tmp_path / "out")))
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert claims == found["claims"]
    rows = found["tables"]["rho, classification, integrated counts"]
    assert [(row["corpus"], row["model"]) for row in rows] == [
        ("CC-3M", "RN50"), ("CC-3M", "ViT-B-16"), ("CC-12M", "RN50"), ("CC-12M", "ViT-B-16"),
    ]  # fmt: skip
    assert all(float(row["here"]) > 0.98 and abs(float(row["shuffled"])) < 0.2 for row in rows)
    verdict = {row["claim"]: row["verdict"] for row in found["claims"]}
    assert verdict["published files: misalignment degree"] == "reproduced"
    assert verdict["published files: rho, classification, integrated counts"] != "reproduced"  # not the authors' scores
    assert verdict["published files: points lost on Let It Wag!"] == "not reproduced"
    assert (tmp_path / "out/main_figure.png").is_file() and "## agreement of counts" in capsys.readouterr().out


def test_command_lines_end_in_one_sentence(in_process, tmp_path):
    result = in_process(tmp_path, module="concept_frequency.replay")
    assert result.code == 2 and "has no folder search_counts" in result.err and one_sentence(result.err), result.err
