"""Text towers without padding equal open_clip's; recomputing blocks changes only memory."""

import open_clip
import pytest
import timm
import torch

import nmtune.encoders  # noqa: F401  (timm finds resnet_emoji)
from shared import accumulate, cli, clip


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


def towers(kind: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A model in training mode with blocks that can be recomputed, and its inputs."""
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 50, "width": 8, "heads": 2, "layers": 3}
    vision = {"layers": 3, "width": 8, "head_width": 4, "patch_size": 8, "image_size": 32}
    if kind == "resnet":
        vision = {"layers": [2, 1, 1, 1], "width": 8, "image_size": 32}
    tokens = torch.randint(1, 49, (6, 8)).scatter(1, torch.randint(2, 8, (6, 1)), 49)
    images = torch.randn(6, 3, 32, 32)
    return clip.without_padding(open_clip.CLIP(6, vision, text)), (images, tokens)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("parts", [1, 3])
def test_checkpointing_changes_neither_gradients_nor_statistics(kind: str, parts: int):
    found = []
    for on in (False, True):
        model, inputs = towers(kind)
        clip.set_grad_checkpointing(model, on)
        features = accumulate.micro_batches(model, parts)(*inputs)[:2]
        sum((x * torch.arange(x.numel()).view(x.shape)).sum() for x in features).backward()
        gradients = [p.grad for name, p in model.named_parameters() if p.grad is not None]
        found.append([*features, *gradients, *model.buffers()])
    assert len(found[0]) == len(found[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_checkpointing_keeps_less(kind: str):
    model, inputs = towers(kind)
    before = cli.activation_bytes(lambda: model(*inputs))
    estimate = cli.activation_bytes(lambda: model(*inputs), model)  # switches it on
    assert cli.activation_bytes(lambda: model(*inputs)) < estimate < before


def test_a_model_without_blocks_is_refused():
    clip.set_grad_checkpointing(torch.nn.Linear(2, 2), False)
    with pytest.raises(ValueError, match="--grad-checkpointing: Linear"):
        clip.set_grad_checkpointing(torch.nn.Linear(2, 2), True)


def test_timms_batch_norms_are_refused():
    """Their own checkpointing would count every batch twice."""
    with pytest.raises(ValueError, match="--grad-checkpointing: ByobNet"):
        clip.set_grad_checkpointing(timm.create_model("resnet_emoji", num_classes=4))


def test_groups_of_texts_change_nothing():
    torch.manual_seed(0)
    text = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    model = open_clip.CLIP(32, vision, text)
    tokens = open_clip.SimpleTokenizer(context_length=24)([f"{'very ' * (i % 9)}big cat {i}" for i in range(70)])
    with torch.no_grad():
        ours, theirs = clip.encode_text(model, tokens), open_clip.CLIP.encode_text(model, tokens)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
