"""NMTune's heads, losses, views and encoders: tests of their properties. The authors' numbers are compared in
tests/adapters/nmtune.py.
"""

import numpy as np
import pytest
import timm
import torch
from authors_files import beside_weights
from conftest import leaf
from PIL import Image

from nmtune import gram_losses, model
from nmtune.encoders import load_encoder, split_upstream, timm_transforms
from nmtune.gram_losses import covariance_loss, dominant_singular_value_loss
from nmtune.model import NMTuneHead, head_from, nmtune_loss


def test_training_views_are_crops_of_at_least_four_fifths_and_flips():
    config = {
        "input_size": (3, 32, 32),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    crop, flip, _ = timm_transforms(config)[0].transforms
    assert crop.size == (32, 32) and crop.scale == (0.8, 1.0) and flip.p == 0.5


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("n, dim", [(6, 20), (20, 6), (7, 7), (2, 9), (6, 40), (16, 128), (40, 6)])
def test_regularisers_equal_their_definitions_in_float64(n, dim):
    torch.manual_seed(n)
    z = torch.randn(n, dim, dtype=torch.float64).float()
    s = torch.linalg.svdvals(z.double())
    share = -(s[:5] / s.sum()).mean()
    assert dominant_singular_value_loss(z).item() == pytest.approx(share.item(), rel=1e-6)
    largest = -s[0] / s.sum()
    assert dominant_singular_value_loss(z, 1).item() == pytest.approx(largest.item(), rel=1e-6)
    c = torch.cov(z.double().T)
    off = (c.square().sum() - c.diagonal().square().sum()) / dim
    assert covariance_loss(z).item() == pytest.approx(off.item(), rel=1e-5)


@pytest.mark.parametrize("n, dim", [(6, 20), (20, 6), (7, 7), (2, 9), (6, 40), (40, 6), (1, 5)])
def test_regularisers_from_gram_matrices_equal_the_equations(n, dim):
    """Values and gradients."""
    torch.manual_seed(n)
    start = torch.randn(n, dim)
    for losses in zip(model.EQUATIONS, model.FROM_GRAM_MATRIX, strict=True):
        (value, slope), (other, other_slope) = (
            (loss(z := leaf(start)), torch.autograd.grad(loss(z), z)[0]) for loss in losses
        )
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(other_slope, slope, rtol=1e-3, atol=1e-6)


def test_covariance_loss_of_nearly_uncorrelated_features_is_accurate():
    assert covariance_loss(torch.linspace(-3, 2, 8)[:, None]) == 0  # one dimension: nothing off the diagonal
    assert covariance_loss(torch.randn(1, 8)) == 0  # a last batch of one image
    torch.manual_seed(0)
    z = torch.randn(1000, 2)
    z[:, 1] += z[:, 0] * (0.02 - torch.cov(z.T)[0, 1] / z[:, 0].var())
    expected = torch.cov(z.double().T)[0, 1].square().item()  # 4e-4 of the variances
    assert covariance_loss(z).item() == pytest.approx(expected, rel=1e-5)
    z = torch.randn(4, 6) * 0.01
    z[:, 0] += torch.randn(4)  # fewer rows than dimensions, one of which outweighs the others
    c = torch.cov(z.double().T)
    expected = (c - c.diagonal().diag()).square().sum().item() / 6
    assert covariance_loss(z).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("twins", [0.5, 0.1, 0.02, 0.003])
@pytest.mark.parametrize("mean", [0, 1, 30])
@pytest.mark.parametrize("n, dim", [(32, 256), (32, 40), (200, 24)])
def test_the_gradient_of_l_svd_is_at_least_as_accurate_as_an_svds(n, dim, mean, twins):
    """Features with a large mean and pairs of similar rows, like two views: an ill-conditioned matrix."""
    torch.manual_seed(n)
    z = torch.randn(n // 2, dim)
    z = torch.cat([z, z + twins * torch.randn(n // 2, dim)]) + mean * torch.rand(dim)

    def gradient(loss, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0].double()

    def textbook(x):
        s = torch.linalg.svdvals(x)
        return -(s[:5] / s.sum()).mean()

    exact = gradient(textbook, z.double())
    ours, theirs = (
        ((gradient(loss, z) - exact).norm() / exact.norm()).item() for loss in (dominant_singular_value_loss, textbook)
    )
    assert ours < max(1.01 * theirs, 1e-4), (ours, theirs)


@pytest.mark.parametrize("n, dim", [(16, 32), (64, 24), (12, 12)])
def test_the_gradient_of_l_svd_of_a_decaying_spectrum_is_exact(n, dim):
    torch.manual_seed(0)
    z = (torch.randn(n, dim) * torch.logspace(0, -3, dim)).requires_grad_()
    dominant_singular_value_loss(z).backward()
    exact = z.detach().double().requires_grad_()
    s = torch.linalg.svdvals(exact)
    (-(s[:5] / s.sum()).mean()).backward()
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("n, dim", [(16, 128), (40, 6)])
def test_the_loss_waits_for_a_gpu_only_in_the_eigendecomposition(watch, monkeypatch, n: int, dim: int):
    monkeypatch.setattr(gram_losses, "gram_eigh", watch.within(gram_losses.gram_eigh, on=False))
    torch.manual_seed(0)
    z, feats, logits = (torch.randn(n, size, requires_grad=True) for size in (dim, dim, 5))
    loss, _ = watch.within(nmtune_loss)(logits, torch.arange(n) % 5, z, feats)
    watch.within(loss.backward)()
    assert z.grad.isfinite().all()


def test_l_svd_is_fp32_inside_autocast():
    torch.manual_seed(0)
    z = torch.randn(16, 128)
    with torch.autocast("cpu", torch.bfloat16):
        values = dominant_singular_value_loss(z), covariance_loss(z)
    assert values == (dominant_singular_value_loss(z), covariance_loss(z))


def test_singular_values_of_a_deficient_matrix_have_finite_gradients():
    torch.manual_seed(0)
    z = torch.randn(8, 12)  # of rank 6
    z[3], z[5] = z[2], 0.0
    z.requires_grad_()
    dominant_singular_value_loss(z).backward()
    assert torch.isfinite(z.grad).all() and z.grad.any()
    pair = torch.randn(2, 10, requires_grad=True)  # two rows: fewer singular values than k, so the mean is constant
    dominant_singular_value_loss(pair).backward()
    torch.testing.assert_close(pair.grad, torch.zeros(2, 10), atol=1e-7, rtol=0)


def test_encoders_are_frozen_and_unnormalised():
    torch.manual_seed(0)
    for source, name, dim, side in (("timm", "resnet_emoji", 192, 32), ("open_clip", "ViT-emoji", 128, 40)):
        images = torch.randn(3, 3, side, side)
        encoder, found, train_view, eval_view = load_encoder(source, name)
        features = encoder(images)
        assert found == dim and features.shape == (3, dim) and not features.requires_grad and not encoder.training
        assert not torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-2)
        picture = Image.fromarray(np.zeros((64, 50, 3), np.uint8))
        assert train_view(picture).shape == eval_view(picture).shape == (3, side, side)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_in_the_authors_layouts_load(tmp_path, prefix):
    """timm's model.pth.tar with classifier and command line, and open_clip's epoch_32.pt with both towers."""
    import open_clip

    model = timm.create_model("resnet18", num_classes=7)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    extras = {"arch": "resnet18", "version": 2, "metric": 71.5}  # timm's
    torch.save(beside_weights(state_dict=state, **extras), tmp_path / "m.pth.tar")
    encoder, dim, *_ = load_encoder("timm", "resnet18", str(tmp_path / "m.pth.tar"))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        encoder(images), model.eval().forward_head(model.forward_features(images), pre_logits=True)
    )
    assert dim == 512
    clip = open_clip.create_model("ViT-emoji")
    state = {prefix + key: value for key, value in clip.state_dict().items()}
    torch.save(beside_weights(state_dict=state), tmp_path / "epoch_32.pt")
    encoder, *_ = load_encoder("open_clip", "ViT-emoji", str(tmp_path / "epoch_32.pt"))
    images = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(encoder(images), clip.eval().encode_image(images))


@pytest.mark.parametrize("source, name", [("timm", "resnet_emoji"), ("open_clip", "ViT-emoji")])
def test_an_exported_classifier_of_the_authors_loads(tmp_path, source, name):
    """The state dict of the authors' ImageClassifier: a wrapped encoder with an alias of its classifier, MLP, scale,
    head."""
    import open_clip

    dim = 192 if source == "timm" else 128
    images, head = torch.randn(2, 3, 40, 40), NMTuneHead(dim, 5, ratio=2, layers=2)
    if source == "timm":
        model = timm.create_model(name, num_classes=7)
        state = {f"image_encoder.model.model.{key}": value for key, value in model.state_dict().items()}
        state |= {f"image_encoder.model.fc.{key}": value for key, value in model.head.fc.state_dict().items()}
        expected = model.eval().forward_head(model.forward_features(images), pre_logits=True)
    else:
        model = open_clip.create_model(name)
        state = {f"image_encoder.model.{key}": value for key, value in model.state_dict().items()}
        expected = model.eval().encode_image(images)
    for key, value in head.state_dict().items():
        state[key if key.startswith("classification_head.") else f"image_encoder.{key}"] = value
    torch.save(state, tmp_path / "exported.pt")
    encoder, *_ = load_encoder(source, name, str(tmp_path / "exported.pt"))
    torch.testing.assert_close(encoder(images), expected)
    loaded = head_from(split_upstream(state)[0])
    torch.testing.assert_close(loaded(expected), head.eval()(expected))


def test_wrong_checkpoints_are_named(tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="does not fit"):
        load_encoder("timm", "resnet_emoji", str(tmp_path / "wrong.pt"))
    with pytest.raises(ValueError, match="nowhere.pt"):
        load_encoder("timm", "resnet_emoji", "nowhere.pt")
    with pytest.raises(ValueError, match="not from 'clip'"):
        load_encoder("clip", "RN50")
