"""Image transforms against the authors' numbers, seeded augmentation, and rows of shards."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_tldr_reduction_train import folder  # noqa: F401

from shared import data
from tldr_reduction.datasets import RandomAugment, eval_transform


@pytest.mark.golden("tldr_reduction", "eval_transform")
def test_eval_transform(case):
    image = Image.fromarray(case["image_uint8_hwc"].numpy().astype(np.uint8))
    case.close("out", eval_transform(case["image_size"])(image), atol=1e-4)


def test_augmentation_is_seeded_and_keeps_size():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 30, 3)).astype(np.uint8))
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        first = RandomAugment()(image)
        torch.manual_seed(seed)
        assert first.size == (30, 24) and first.tobytes() == RandomAugment()(image).tobytes()
        seen.add(first.tobytes())
    assert len(seen) > 8


def test_rows_of_shards(folder):
    pairs = data.open_pairs(str(folder / "pool"))
    assert [pairs.rows_of(number) for number in range(3)] == [range(0, 64), range(64, 128), range(128, 160)]
