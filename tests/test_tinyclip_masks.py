"""Learned masks, their constraint and pruning."""

import pytest
import torch
from tinyclip_runs import TEXT, VISION, example, some_masks, tiny

from tinyclip.masks import (
    L0Mask,
    expand_pruned,
    prune,
    sparsity_loss,
)


def test_the_paper_s_constraint_pulls_back():
    mask = L0Mask(8, 32, 2, 2, init=-2.0)
    assert sparsity_loss([mask], 0.1)[0] == 0
    loss, expected = sparsity_loss([mask], 0.1, two_sided=True)
    gap = 0.1 - expected
    torch.testing.assert_close(loss, 10 * gap + 10 * gap**2)


@pytest.mark.parametrize("seed", range(3))
def test_exact_pruning_is_the_masked_network(seed):
    model, (images, tokens) = tiny(seed), example()
    masks = some_masks(VISION, seed), some_masks(TEXT, seed + 10)
    with torch.no_grad():
        masked = model.encode_image(images, masks[0]), model.encode_text(tokens, masks[1])
        small = prune(model, *masks, exact=True)
        torch.testing.assert_close(small.encode_image(images), masked[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(small.encode_text(tokens), masked[1], rtol=1e-4, atol=1e-5)
        upstream = prune(model, *masks)
        assert not torch.allclose(upstream.encode_text(tokens), masked[1], atol=1e-3)  # it scales the projection
    heads, neurons = small.geometry["vision"]["heads"], small.geometry["vision"]["mlp_width"]
    assert heads[1] == heads[2] == 0 and heads[0] > 0 and neurons[1] is None and neurons[2] == 0
    assert small.visual.transformer.resblocks[2].mlp.c_proj.bias.any()  # an MLP without neurons keeps its bias


def test_pruning_one_tower_leaves_the_other():
    model = tiny()
    small = prune(model, None, some_masks(TEXT))
    assert all(torch.equal(small.visual.state_dict()[k], v) for k, v in model.visual.state_dict().items())
    assert small.ln_final.weight.numel() < model.ln_final.weight.numel()
    with pytest.raises(ValueError, match="no hidden dimension"):
        prune(model, some_masks(VISION) | {"hidden": torch.zeros(32)}, None)


def test_kept_params_are_those_of_the_pruned_blocks():
    model = tiny()
    mask = L0Mask.of(VISION)
    for loga in mask.logas().values():
        loga.data.normal_(0.5, 3)
    small = prune(model, mask.eval_masks(), None)
    weights = [p for n, p in small.visual.transformer.named_parameters() if n.endswith("weight") and p.ndim == 2]
    assert mask.kept_params() == sum(p.numel() for p in weights)


def test_expanding_refuses_what_does_not_fit():
    full, masks = tiny(), [L0Mask.of(VISION), L0Mask.of(TEXT)]
    state = dict(full.state_dict())
    for change, words in (
        ({"strange": torch.ones(1)}, "strange"),
        ({"text_projection": torch.ones(99, 12)}, "does not fit"),
        ({"text_projection": full.text_projection[:, 1:]}, "does not fit"),  # masks leave the embedding's width
        ({"positional_embedding": full.positional_embedding[1:]}, "does not fit"),
    ):
        with pytest.raises(ValueError, match=words):
            expand_pruned(tiny(), *masks, state | change)
    state.pop("text_projection")
    with pytest.raises(ValueError, match="lack text_projection"):
        expand_pruned(tiny(), *masks, state)
