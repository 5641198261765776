"""Curves of runs and the command line; the study's tests evaluate runs."""

import numpy as np
import pytest
from scripts import held, one_sentence

from concept_frequency import eval


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


def test_a_corpus_is_counted_by_one_process(tmp_path):
    with held(tmp_path / "pairs"), pytest.raises(ValueError, match="still going"):
        eval.count_pairs(tmp_path / "pairs.parquet", ["cat"], "en_core_web_sm")
