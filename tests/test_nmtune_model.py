"""NMTune's functions compared with the authors' code (tests/golden/nmtune/README.md), and tests of their properties.

One golden test per family; everything about a case is read from its file, tolerances are those of the README.
"""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from authors_files import beside_weights
from conftest import Case, leaf
from PIL import Image
from scripts import mean_of_templates

from nmtune import fast_losses, model
from nmtune.fast_losses import covariance_loss, dominant_singular_value_loss
from nmtune.model import (
    NMTuneHead,
    consistency_loss,
    finetune_loss,
    head_from,
    load_encoder,
    make_classifier,
    nmtune_loss,
    split_upstream,
    timm_transforms,
)


def exact(number: float) -> float:
    """Hyper-parameters are stored as float32; this restores 0.001 from 0.0010000000475."""
    return float(f"{number:.6g}")


def cases(case: Case) -> list[tuple[str, Case]]:
    """(prefix, its arrays) for each numbered case in a file."""
    numbers = sorted({name.split("/")[0] for name in case if name.split("/")[0].isdecimal()}, key=int)
    assert numbers
    prefixes = [f"{number}/" for number in numbers]
    return [(p, {k.removeprefix(p): case[k] for k in case if k.startswith(p)}) for p in prefixes]


# ------------------------------------------------------------------------------------------------------ golden: losses


@pytest.mark.golden("nmtune", "losses")
def test_losses(case):
    for prefix, one in cases(case):
        half = len(one["feats"]) // 2
        zero_logits, labels = torch.zeros(len(one["feats"]), 1), torch.zeros(len(one["feats"]), dtype=torch.long)

        def whole(z, feats, zero_logits=zero_logits, labels=labels):
            return nmtune_loss(zero_logits, labels, z, feats)[0]

        terms = {
            "mse": lambda z, feats, half=half: consistency_loss(z[half:], feats[:half]),
            "cov": lambda z, feats: covariance_loss(z),
            "svd": lambda z, feats: dominant_singular_value_loss(z),
            "reg_default": whole,
        }
        equations = {
            "cov": lambda z, feats: model.covariance_loss(z),
            "svd": lambda z, feats: model.dominant_singular_value_loss(z),
        }
        for name, term in [*terms.items(), *equations.items()]:
            z, feats = leaf(one["mlp_feats"]), leaf(one["feats"])
            value = term(z, feats)
            value.backward()
            case.close(f"{prefix}{name}", value, rtol=1e-5)
            case.close(f"{prefix}{name}_grad", z.grad, atol=1e-6)
            assert feats.grad is None or not feats.grad.any()


@pytest.mark.golden("nmtune", "objective")
def test_objective(case):
    for prefix, one in cases(case):
        z, feats = leaf(one["mlp_feats"]), one["feats"]
        weight, bias = leaf(one["head_weight"]), leaf(one["head_bias"])
        weights = tuple(exact(x) for x in one["weights"].tolist())
        loss, parts = nmtune_loss(F.linear(z, weight, bias), one["labels"].repeat(2), z, feats, weights)
        loss.backward()
        assert [name in parts for name in ("mse", "cov", "svd")] == [w != 0 for w in weights]
        case.close(f"{prefix}loss", loss, rtol=1e-5)
        case.close(f"{prefix}grad_mlp_feats", z.grad, atol=1e-6)
        case.close(f"{prefix}grad_head_weight", weight.grad, atol=1e-6)
        case.close(f"{prefix}grad_head_bias", bias.grad, atol=1e-6)


@pytest.mark.golden("nmtune", "finetune_objective")
def test_finetune_objective(case):
    feats, state = leaf(case["features"]), case.group("param/classification_head.")
    weight, bias = leaf(state["weight"]), leaf(state["bias"])
    weights = tuple(exact(x) for x in case["weights"].tolist())
    loss, _ = finetune_loss(F.linear(feats, weight, bias), case["labels"], feats, weights)
    loss.backward()
    case.close("loss", loss, rtol=1e-5)
    case.close("grad_features", feats.grad, atol=1e-6)
    case.close("grad_weight", weight.grad, atol=1e-6)
    case.close("grad_bias", bias.grad, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- golden: heads


def head_of(state: dict[str, torch.Tensor], config: list[float], num_classes: int = 2) -> NMTuneHead:
    """config = [D, ratio, layers, residual, scale init]."""
    dim, ratio, layers, residual, scale_init = map(exact, config)
    head = NMTuneHead(int(dim), num_classes, ratio, int(layers), bool(residual), scale_init)
    missing, unexpected = head.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("classification_head.") for name in missing)
    return head


@pytest.mark.golden("nmtune", "mlp_head")
def test_mlp_head(case):
    for prefix, one in cases(case):
        head = head_of(case.group(f"{prefix}param/"), one["config"].tolist())
        for mode in ("eval", "train"):
            x = leaf(one["x"])
            out = head.train(mode == "train").transform(x)
            out.square().mean().backward()
            case.close(f"{prefix}out_{mode}", out, atol=1e-5)
            case.close(f"{prefix}grad_x_{mode}", x.grad, atol=1e-5)
        case.close_group(f"{prefix}after_train/", head.state_dict(), atol=1e-5)


@pytest.mark.golden("nmtune", "classification_head")
def test_classification_head(case):
    classes, dim = case["init_weight"].shape
    classifier = make_classifier(dim, classes)
    assert classifier.weight.abs().max() <= case["init_bound"] and not classifier.bias.any()
    assert make_classifier(dim, 1000).weight.abs().max() > 0.5 * case["init_bound"]
    with torch.no_grad():
        classifier.weight.copy_(case["init_weight"])
        case.close("logits_default", classifier(case["x"]), atol=1e-5)
        classifier.bias.copy_(case["bias"])
        case.close("logits_bias", classifier(case["x"]), atol=1e-5)
        case.close("logits_normalize", classifier(F.normalize(case["x"], dim=1)), atol=1e-5)


@pytest.mark.golden("nmtune", "zeroshot_head")
def test_zeroshot_head(case):
    weight = case["logit_scale"] * mean_of_templates(case["text_embeddings"]).T
    case.close("weight", weight, rtol=1e-5)
    case.close("logits", F.normalize(case["x"], dim=1) @ weight.T, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- golden: views


@pytest.mark.golden("nmtune", "preprocess_eval")
def test_preprocess_eval(case):
    resize, crop = case["timm_resize_crop"].tolist()
    config = {"input_size": (3, crop, crop), "interpolation": "bicubic", "crop_pct": crop / (resize - 0.5)}
    config |= {"mean": tuple(case["timm_mean"].tolist()), "std": tuple(case["timm_std"].tolist())}
    timm_view = timm_transforms(config)[1]
    assert timm_view.transforms[0].size == resize
    _, dim, _, clip_view = load_encoder("open_clip", "RN50") if not CLIP else CLIP[0]
    CLIP[:] = [(None, dim, None, clip_view)]
    assert clip_view.transforms[-1].mean == pytest.approx(case["clip_mean"].tolist(), abs=1e-6)
    assert clip_view.transforms[-1].std == pytest.approx(case["clip_std"].tolist(), abs=1e-6)
    for prefix, one in cases(case):
        image = Image.fromarray(one["image_hwc"].numpy().astype(np.uint8))
        for name, view in (("timm_eval", timm_view), ("clip_eval", clip_view)):
            case.close(f"{prefix}{name}", view(image)[:, ::4, ::4], atol=0.02)


CLIP: list = []  # RN50's transforms, built once


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
def test_the_fast_regularisers_equal_the_equations(n, dim):
    """Values and gradients."""
    torch.manual_seed(n)
    start = torch.randn(n, dim)
    for exact, fast in zip(model.EXACT, model.FAST, strict=True):
        (value, slope), (quick, quick_slope) = (
            (loss(z := leaf(start)), torch.autograd.grad(loss(z), z)[0]) for loss in (exact, fast)
        )
        torch.testing.assert_close(quick, value, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(quick_slope, slope, rtol=1e-3, atol=1e-6)


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
    monkeypatch.setattr(fast_losses, "gram_eigh", watch.within(fast_losses.gram_eigh, on=False))
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


def test_consistency_loss_is_the_papers_over_d():
    torch.manual_seed(0)
    z, f = torch.randn(5, 12), torch.randn(5, 12)
    cosine = F.cosine_similarity(z, f)
    assert 12 * consistency_loss(z, f).item() == pytest.approx((2 - 2 * cosine).mean().item(), rel=1e-5)


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
