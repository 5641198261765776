"""Text towers without padding are open_clip's."""

import open_clip
import pytest
import torch

from shared import clip


@pytest.mark.parametrize("text_cfg", [{}, {"pool_type": "last"}, {"no_causal_mask": True}, {"proj_bias": True}])
def test_text_tower_without_padding_is_open_clips(text_cfg):
    sizes = {"context_length": 20, "vocab_size": 50, "width": 8, "heads": 2, "layers": 2}
    vision = {"layers": 1, "width": 8, "head_width": 4, "patch_size": 4, "image_size": 8}
    torch.manual_seed(0)
    model = open_clip.CLIP(6, vision, sizes | text_cfg).double()
    text = torch.zeros(5, 20, dtype=torch.long)
    for row, length in enumerate((3, 9, 4, 12, 2)):
        text[row, :length] = torch.cat([torch.tensor([48]), torch.randint(1, 47, (length - 2,)), torch.tensor([49])])
    found = []
    for encode in (open_clip.CLIP.encode_text.__get__(model), clip.without_padding(model).encode_text):
        model.zero_grad()
        features = encode(text, normalize=True)
        (features * torch.arange(30.0).view(5, 6)).sum().backward()
        found.append([features, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
