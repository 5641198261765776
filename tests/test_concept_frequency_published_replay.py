"""The replay of the authors' published files, and of files in their layout.

Golden cases derived from the published files are compared with these files if they exist: in `upstream_results/` beside
the case, or in the clone of --upstream.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from concept_frequency_runs import write_published
from conftest import Case
from scripts import one_sentence

from concept_frequency import statistics
from concept_frequency.published import replay
from concept_frequency.published.files import BINS, Results
from concept_frequency.published.numbers import TABLE9
from concept_frequency.statistics import correlation, frequency_agreement, log_linear_curve, long_tail
from tests.adapters.concept_frequency import PeopleCurve, as_upstream


def results(case: Case, request: pytest.FixtureRequest) -> Results:
    """The authors' published files."""
    beside = case.path.parent / "upstream_results"
    folder = beside if beside.is_dir() else request.config.getoption("upstream")
    if folder is None or not (Path(folder) / "search_counts").is_dir():
        pytest.skip("needs the authors' published files: upstream_results/ beside the case, or --upstream CLONE")
    return Results(folder)


@pytest.mark.golden("concept_frequency", "published_curves")
def test_published_curves(case, request):
    """Curves computed from the authors' counts and scores, which are not in the repository: needs --upstream."""
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
        flat = statistics.unbinned(counts, scores)
        assert flat["pearson"] == pytest.approx(row["pearson_unbinned"], abs=1e-9)
        assert flat["spearman"] == pytest.approx(row["spearman_unbinned"], abs=1e-9)


@pytest.mark.golden("concept_frequency", "frequency_agreement")
def test_frequency_agreement(case, request):
    """From the authors' counts, which are not in the repository: needs --upstream."""
    published = results(case, request)
    for search, values in case.json.items():
        for pair in values.keys() - {"n_common"}:
            a, b = (published.all_counts(pretraining, search) for pretraining in pair.split("|"))
            spearman, n = frequency_agreement(a, b)
            assert n == values["n_common"]
            assert spearman == pytest.approx(values[pair]["spearman"], abs=1e-9)


@pytest.mark.golden("concept_frequency", "long_tail")
def test_long_tail(case, request):
    """From the authors' counts, which are not in the repository: needs --upstream."""
    published = results(case, request)
    for key, values in case.json.items():
        pretraining, search = key.split("|")
        assert long_tail(published.tail_counts(pretraining, search)) == pytest.approx(values, abs=1e-9)


@pytest.mark.golden("concept_frequency", "let_it_wag")
def test_let_it_wag(case):
    """From table 9, which prints two decimals."""
    check_slopes(case, {name: tail for name, (_, tail) in TABLE9.items()}, tolerance=1e-3)


@pytest.mark.golden("concept_frequency", "let_it_wag")
def test_let_it_wag_of_the_files(case, request):
    """From the authors' results, which are not in the repository: needs --upstream."""
    tail = {name: found["full"] for name, found in results(case, request).let_it_wag().items()}
    check_slopes(case, tail, tolerance=1e-9)


def check_slopes(case: Case, tail: dict[str, float], tolerance: float) -> None:
    imagenet = case["external_imagenet_top1"] | case["imagenet_ensemble_top1_from_results"]
    assert len(imagenet) == case["n_models"]
    found = statistics.two_slopes(list(imagenet.values()), [tail[name] for name in imagenet])
    assert (found["n_below"], found["n_above"]) == (case["n_below_50"], case["n_above_50"])
    assert found["slope_below"] == pytest.approx(case["slope_imagenet_below_50"], abs=tolerance)
    assert found["slope_above"] == pytest.approx(case["slope_imagenet_above_50"], abs=tolerance)


@pytest.mark.golden("concept_frequency", "human_eval_curve")
def test_people_study(case, request):
    """From the counts of all names and the participants' judgements, which are not in the repository (needs
    --upstream): number of buckets, their middles and means, and the curve."""
    if (found := results(case, request).people()) is None:
        pytest.skip("needs the judgements of the people study: --upstream CLONE")
    assert len(statistics.frequency_buckets(found[0])) == 45
    x, y = statistics.people_points(*found)
    case.close("bucket_centers", x, rtol=1e-6)
    case.close("bucket_accuracy", y, rtol=1e-6, atol=1e-6)
    assert case["num_bins"].item() == BINS["people"]
    for name, value in PeopleCurve().curve(as_upstream(log_linear_curve(x, y, BINS["people"]))).items():
        case.close(name, value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_replay_of_files_in_the_authors_layout(tmp_path):
    write_published(tmp_path / "clone")
    claims = replay.main(replay.Config(str(tmp_path / "clone"), str(tmp_path / "out")))
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert claims == found["claims"]
    rows = found["tables"]["rho, classification, matched counts, class prompts"]
    assert [(row["corpus"], row["model"]) for row in rows] == [
        ("CC-3M", "RN50"), ("CC-3M", "ViT-B-16"), ("CC-12M", "RN50"), ("CC-12M", "ViT-B-16"),
    ]  # fmt: skip
    assert all(float(row["here"]) > 0.98 and abs(float(row["shuffled"])) < 0.2 for row in rows)
    assert rows[0]["saved curve"] == rows[0]["here"] and float(rows[0]["bins differ by"]) == 0
    assert rows[1]["saved curve"] == "-"
    verdict = {row["claim"].removeprefix("published files: "): row["verdict"] for row in found["claims"]}
    assert verdict["misaligned pairs and degree (tab. 3)"] == "reproduced"
    assert verdict["bins of the curves that the authors saved"] == "reproduced"
    assert verdict["rho, classification, matched counts (fig. 2)"] != "reproduced"  # not the authors' scores
    assert verdict["points lost on Let It Wag! (sec. 6)"] == "direction only"
    assert verdict["rho, text to image, expected aesthetics"] == "reproduced"
    assert verdict["rho, text to image, max CLIP score"] == "not reproduced"
    headings = {heading.partition(",")[0] for heading in found["tables"]}
    assert headings >= {
        "main figure", "accuracy by count (concepts)", "text to image", "people study", "misaligned pairs", "long tail",
        "agreement of counts (Spearman", "Let It Wag! against ImageNet", "main figure with concepts never counted",
    }  # fmt: skip
    (row,) = found["tables"]["people study"]
    assert row["judgements"].startswith("18 ") and row["used"] == "4" and float(row["rho"]) > 0.9
    row = found["tables"]["Let It Wag! against ImageNet"][0]
    assert (row["common (1)"], row["fine-grained (2)"]) == ("30.00", "6.00")
    drawn = {path.stem for path in (tmp_path / "out/figures").iterdir()}
    assert {"classification_integrated_class", "retrieval_image_t2i_k10", "zeros", "intervals", "people", "let_it_wag",
            "long_tail", "generation_exp_aesthetics", "generation_max_clip"} <= drawn  # fmt: skip


def test_command_lines_end_in_one_sentence(in_process, tmp_path):
    result = in_process(tmp_path, module="concept_frequency.published.replay")
    assert result.code == 2 and "has no folder search_counts" in result.err and one_sentence(result.err), result.err
