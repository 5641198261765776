"""Layouts of weights: the authors' keys, and a network's geometry read from its weights."""

import re

import pytest
import torch
from test_tinyclip_model import TEXT, VISION, example, some_masks, tiny

from tinyclip.geometry import convert_state_dict, geometry, open_clip_config
from tinyclip.masks import prune
from tinyclip.model import CLIP


@pytest.mark.golden("tinyclip", "checkpoint_keys")
def test_checkpoint_keys(case):
    for keys in case.values():
        theirs = {key: torch.full((), float(i)) for i, key in enumerate(keys)}
        ours = convert_state_dict(sd=theirs)
        expected = convert_state_dict({upstream: theirs[key] for key, upstream in keys.items()})
        assert ours == expected and len(ours) == len(set(keys.values()))
        for upstream in keys.values():
            assert re.sub(r"^_image_encoder\.(?=visual)|^_text_encoder\.|^_logit_scale\.", "", upstream) in ours


def test_a_pruned_network_is_rebuilt_from_its_weights():
    small = prune(tiny(), some_masks(VISION), some_masks(TEXT))
    again = CLIP(**geometry(small.state_dict(), 8))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.encode_image(example()[0]), small.encode_image(example()[0]))
    assert open_clip_config(small.geometry) is None and open_clip_config(tiny().geometry) is not None
