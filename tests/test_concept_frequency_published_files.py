"""Reading files in the authors' layout, and pickles that are refused."""

import os
import pickle
from collections import defaultdict

import numpy as np
import pytest
from concept_frequency_runs import write_published

from concept_frequency.concepts import short
from concept_frequency.published.files import PlainUnpickler, Results, plotted_bins, read_pickle, with_table9


def test_pickles_of_plain_values_and_nothing_else(tmp_path):
    value = {"exp_bins": np.arange(3.0), np.int64(4): [1.0, 0.5], "mean": np.float64(2.5)}
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(value))
    found = read_pickle(tmp_path / "plain.pkl")
    assert found["exp_bins"].tolist() == [0, 1, 2] and found[4] == [1.0, 0.5] and found["mean"] == 2.5
    (tmp_path / "default.pkl").write_bytes(pickle.dumps(defaultdict(list, {1: [2]})))
    assert read_pickle(tmp_path / "default.pkl") == {1: [2]}

    class Call:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "code.pkl").write_bytes(pickle.dumps(Call()))
    with pytest.raises(ValueError, match="plain values"):
        read_pickle(tmp_path / "code.pkl")
    assert not (tmp_path / "made").exists()
    assert not {module for module, _ in PlainUnpickler.ALLOWED} & {"os", "posix", "subprocess"}


def test_files_of_a_clone(tmp_path):
    write_published(tmp_path)
    results = Results(tmp_path)
    assert results.has_scores(("classification", "text", "simple"))
    assert not results.has_scores(("retrieval", "text", "i2t_k=1"))
    with_sketch = results.pairs("classification", "integrated", "RN50|cc3m")
    without = results.pairs("classification", "integrated", "RN50|cc3m", sketch=False)
    assert len(with_sketch[0]) == 18 * 60 and len(without[0]) == 17 * 60
    assert len(results.pairs("classification", "text", "RN50|cc3m")[0]) == 17 * 60
    assert results.saved_curve("classification", "integrated", "RN50|cc3m", "class")["cum_means"].shape == (12,)
    assert results.saved_curve("classification", "image", "RN50|cc3m", "class") is None
    assert results.panel_image("classification", "integrated", "cc3m", "class") is not None
    assert results.panel_image("classification", "integrated", "cc3m", "simple") is None
    assert results.generation_models() == ["a_one", "b_two"] and results.generation("max_clip") == {}
    counts, judged = results.people()
    assert len(counts) == 600 and sorted(judged) == [0, 1, 2, 3, 4]
    imagenet = results.imagenet()
    assert imagenet["RN50|cc3m"] == 40 and "RN50|openai" not in imagenet
    every = with_table9(imagenet)
    assert every["RN50|openai"] == 59.82 and every["RN50|cc3m"] == 40
    with pytest.raises(ValueError, match="has no folder search_counts"):
        Results(tmp_path / "none")


def test_names_and_slices():
    assert short("backboneRN50_pretrainedcc3m") == "RN50|cc3m"
    assert plotted_bins("classification", "laion400m") == slice(2, -1)
    assert plotted_bins("classification", "cc3m") == slice(1, -1)
    assert plotted_bins("retrieval", "laion400m") == slice(3, None)
