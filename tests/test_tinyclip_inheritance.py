"""Weights that a student inherits, and refusals."""

import pytest
import torch
from tinyclip_runs import TEXT, VISION, tiny

from tinyclip.inheritance import (
    inherit_at_random,
    inherit_weights,
    random_masks,
)
from tinyclip.model import CLIP


def test_inheritance_refuses_what_does_not_fit():
    teacher = tiny().state_dict()
    with pytest.raises(ValueError, match="4 layers"):
        inherit_weights(CLIP(12, VISION, TEXT | {"layers": 4}).state_dict(), teacher, 8)
    with pytest.raises(ValueError, match="more than"):
        inherit_weights(CLIP(13, VISION, TEXT).state_dict(), teacher, 8)
    with pytest.raises(ValueError, match="another patch grid"):
        inherit_weights(CLIP(12, VISION | {"image_size": 24}, TEXT).state_dict(), teacher, 8)
    with pytest.raises(ValueError, match="nothing to inherit"):
        inherit_weights({"strange": torch.ones(1)}, teacher)


def test_random_masks_leave_the_small_size():
    small = VISION | {"width": 16, "layers": 2}
    masks = random_masks(VISION, small, torch.Generator().manual_seed(0))
    assert masks["hidden"].sum() == 16 and masks["mha"].sum() == masks["ffn"].sum() == 2
    assert (masks["heads"].sum(1) == 2).all() and (masks["intermediate"].sum(1) == 64).all()


def test_inheriting_at_random_has_the_student_s_geometry():
    student = CLIP(12, VISION | {"width": 16, "layers": 2}, TEXT | {"width": 16, "heads": 2, "layers": 1})
    cut = inherit_at_random(tiny(), student.geometry, torch.Generator().manual_seed(0))
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (cut, student)]
    assert shapes[0] == shapes[1] and torch.equal(cut.logit_scale, tiny().logit_scale)
    resnet = student.geometry | {"vision": {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1]}}
    with pytest.raises(ValueError, match="not on a ResNet"):
        inherit_at_random(tiny(), resnet, torch.Generator())
