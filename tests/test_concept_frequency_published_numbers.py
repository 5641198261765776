"""The paper's numbers are complete, and belong to known models."""

from concept_frequency.config import MODELS
from concept_frequency.published.files import METHODS, SETTINGS
from concept_frequency.published.numbers import CURVE_MODELS, PRINTED, TABLE3, TABLE4, TABLE6, TABLE9


def test_numbers_fit_the_models():
    assert set(CURVE_MODELS) <= set(MODELS) and set(TABLE9) <= set(MODELS) and set(TABLE6) == set(CURVE_MODELS[:10])
    assert len(TABLE9) == 40 and len(TABLE3) == 5 and len(TABLE4) == 6
    for (task, search, setting), legends in PRINTED.items():
        assert search in METHODS and setting in SETTINGS[task] and len(legends) == len(CURVE_MODELS)
        assert all(value is None or -1 <= value <= 1 for value in legends)


def test_models_do_better_on_imagenet():
    assert all(imagenet > tail for imagenet, tail in TABLE9.values())
