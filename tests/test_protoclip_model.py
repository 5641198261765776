"""Properties of ProtoCLIP's model and losses, beyond the authors' numbers (tests/adapters/protoclip.py)."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import leaf
from open_clip.transformer import QuickGELU
from protoclip_runs import tiny_model

from protoclip.model import (
    ProtoCLIP,
    build_prototypes,
    clip_loss,
    create_model,
    kmeans,
    prototypical_back_translation,
    prototypical_loss,
)
from protoclip.train import parameter_groups


def heads_equal(model: ProtoCLIP) -> bool:
    image, text = model.image_projection_head.state_dict(), model.text_projection_head.state_dict()
    return image.keys() == text.keys() and all(torch.equal(image[key], text[key]) for key in image)


def test_heads_start_equal_and_are_not_decayed():
    model = tiny_model(num_layers=2)
    assert heads_equal(model)
    assert model.image_projection_head[0].weight is not model.text_projection_head[0].weight
    assert [scale.exp().item() for scale in (model.logit_scale, model.logit_scale_proto)] == pytest.approx(
        [1 / 0.07] * 2
    )
    in_heads = {id(p) for name, p in model.named_parameters() if "projection_head" in name or "logit_scale" in name}
    decayed = {id(p) for group in parameter_groups(model, 0.5) if group["weight_decay"] for p in group["params"]}
    assert decayed and not decayed & in_heads


def test_soft_targets_become_hard_as_the_temperature_falls():
    torch.manual_seed(0)
    features, students, teachers = (F.normalize(torch.randn(n, 8), dim=-1) for n in (6, 5, 5))
    labels, scale = torch.randint(0, 5, (6,)), torch.tensor(10.0)
    inputs = features, students, scale, labels
    hard, _ = prototypical_loss(*inputs)
    gaps = [prototypical_loss(*inputs, teachers, t)[0] - hard for t in (1.0, 0.1, 1e-3)]
    assert abs(gaps[0]) > abs(gaps[1]) > abs(gaps[2])
    torch.testing.assert_close(gaps[2], torch.tensor(0.0), rtol=0, atol=1e-5)
    for temperature in (None, 0.0, -1.0):  # these ask for hard labels
        assert torch.equal(prototypical_loss(*inputs, teachers, temperature)[0], hard)


def test_soft_targets_need_teacher_centroids():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="teacher_centroids"):
        prototypical_loss(x, x, torch.tensor(1.0), torch.tensor([0, 1]), None, 0.01)


def test_back_translation_is_the_mean_of_each_cluster():
    torch.manual_seed(0)
    features, labels, k = torch.randn(40, 5), torch.randint(0, 7, (40,)), 9
    labels[0] = 8  # alone; cluster 7 is empty
    naive = torch.zeros(k, 5)
    for cluster in labels.unique():
        naive[cluster] = features[labels == cluster].mean(0)
    torch.testing.assert_close(prototypical_back_translation(features, labels, k), naive)


def test_back_translation_of_a_large_cluster():
    torch.manual_seed(0)
    features = F.normalize(torch.randn(5000, 16), dim=-1) + 0.5
    centroid = prototypical_back_translation(features, torch.zeros(5000, dtype=torch.long), 1)
    torch.testing.assert_close(centroid, features.double().mean(0, keepdim=True).float(), rtol=0, atol=1e-7)


def test_clip_loss_of_equal_pairs_at_the_largest_scale():
    torch.manual_seed(0)
    x = F.normalize(torch.randn(6, 10), dim=-1)
    x[3:] = x[:3]
    gradients = []
    for dtype in (torch.float32, torch.float64):
        image, text = leaf(x.to(dtype)), leaf(x.to(dtype))
        clip_loss(image, text, torch.tensor(100.0, dtype=dtype)).backward()
        gradients.append([image.grad.float(), text.grad.float()])
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_too_few_samples_to_cluster():
    with pytest.raises(ValueError, match="at least 5 samples"):
        kmeans(torch.randn(4, 3), 5)


def test_external_teacher_needs_back_translation():
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match="back_translate"):
        build_prototypes(x, x, 2, external=x, back_translate=False)


def test_scales_are_clamped():
    model = tiny_model()
    for value, clamped in ((9.0, math.log(100)), (-1.0, 0.0), (1.5, 1.5)):
        model.logit_scale.data.fill_(value)
        model.logit_scale_proto.data.fill_(value)
        model.clamp_logit_scale()
        torch.testing.assert_close(model.logit_scale.item(), clamped)
        torch.testing.assert_close(model.logit_scale_proto.item(), clamped)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])  # both configs ask for GELU
def test_quick_gelu_is_forced(name):
    with torch.device("meta"):
        modules = list(create_model(name).modules())
    assert not any(isinstance(module, torch.nn.GELU) for module in modules)
    assert sum(isinstance(module, QuickGELU) for module in modules) == {"RN50": 12, "ViT-B-32": 24}[name]
