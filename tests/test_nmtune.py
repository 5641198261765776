"""NMTune against the numbers of the authors' code (tests/golden/nmtune/README.md), and properties beyond them.

One golden test per family; everything about a case is read from its file, tolerances are those of the README.
"""

import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import Case
from PIL import Image

from nmtune.datasets import flip_labels_per_sample
from nmtune.eval import (
    accuracy,
    balanced_accuracy,
    feature_spectrum,
    largest_singular_value_ratio,
    pmk_accuracy,
    project_logits,
    singular_value_entropy,
)
from nmtune.model import (
    NMTuneHead,
    consistency_loss,
    covariance_loss,
    dominant_singular_value_loss,
    finetune_loss,
    head_from,
    load_encoder,
    make_classifier,
    nmtune_loss,
    split_upstream,
    timm_transforms,
    transformed,
)
from nmtune.pretrain import flip_labels, swap_captions
from nmtune.train import cosine_lr, make_optimizer, subset_per_class, train_step, tune
from shared.zeroshot import zeroshot_classifier

golden = pytest.mark.golden


def leaf(x) -> torch.Tensor:
    return torch.as_tensor(x).clone().requires_grad_()


def exact(number: float) -> float:
    """Hyper-parameters are stored as float32: 0.001, not 0.0010000000475."""
    return float(f"{number:.6g}")


def cases(case: Case) -> list[tuple[str, Case]]:
    """(prefix, its arrays) of the numbered cases of a file."""
    numbers = sorted({name.split("/")[0] for name in case if name.split("/")[0].isdecimal()}, key=int)
    assert numbers
    prefixes = [f"{number}/" for number in numbers]
    return [(p, {k.removeprefix(p): v for k, v in case.items() if k.startswith(p)}) for p in prefixes]


# ------------------------------------------------------------------------------------------------------ golden: losses


@golden("nmtune", "losses")
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
        for name, term in terms.items():
            z, feats = leaf(one["mlp_feats"]), leaf(one["feats"])
            value = term(z, feats)
            value.backward()
            case.close(f"{prefix}{name}", value, rtol=1e-5)
            case.close(f"{prefix}{name}_grad", z.grad, atol=1e-6)
            assert feats.grad is None or not feats.grad.any()


@golden("nmtune", "objective")
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


@golden("nmtune", "finetune_objective")
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


@golden("nmtune", "mlp_head")
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


@golden("nmtune", "classification_head")
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


@golden("nmtune", "zeroshot_head")
def test_zeroshot_head(case):
    weight = case["logit_scale"] * zeroshot_classifier(case["text_embeddings"]).T
    case.close("weight", weight, rtol=1e-5)
    case.close("logits", F.normalize(case["x"], dim=1) @ weight.T, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- golden: training


@golden("nmtune", "train_nmtune", "train_mlp_baseline")
def test_tuning(case):
    lr, wd, w_mse, w_cov, w_svd, ratio, layers, residual, scale, epochs, warmup, classes, dim = case["hparams"].tolist()
    lr, wd, *weights = map(exact, (lr, wd, w_mse, w_cov, w_svd))
    state = case.group("param/")
    config = [dim, ratio, layers, residual, scale]

    def head():
        return head_of(state, config, int(classes))

    batches = sorted({name.split("/")[0] for name in case if name.startswith("batch")}, key=lambda name: int(name[5:]))
    loader = [((case[f"{b}/feats_w"], case[f"{b}/feats_s"]), case[f"{b}/labels"]) for b in batches]
    # gradients of the first step, by the finer unit
    first = head().train()
    (w, s), labels = loader[0]
    train_step(first, torch.cat([w, s]), labels, torch.optim.SGD(first.parameters(), lr=0.0), weights)
    inert = {f"mlp_after.{3 * i}.bias" for i in range(int(layers))}  # feed a BatchNorm: true gradient 0
    case.close_group("grad0/", {name: p.grad for name, p in first.named_parameters()}, atol=1e-6)
    # the whole run
    tuned = head()
    history = tune("nmtune" if any(weights) else "mlp", tuned, loader, int(epochs), lr, wd, weights, int(warmup))
    case.close("loss_per_step", [line["loss"] for line in history], rtol=1e-4)
    case.close("lr_per_step", [line["lr"] for line in history], rtol=1e-5)
    for name in case.group("final/"):
        if name not in inert and "running_mean" not in name:
            case.close(f"final/{name}", tuned.state_dict()[name], atol=1e-4)


@golden("nmtune", "train_lp")
def test_linear_probe(case):
    lr, wd, epochs, warmup, classes, dim, _ = case["hparams"].tolist()
    rows = [row[row >= 0] for row in case["batch_index"]]
    steps = len(rows) // int(epochs)

    class Loader(list):
        """The recorded batches, each pass being the next epoch."""

        def __iter__(self):
            return iter([self.pop(0) for _ in range(steps)])

        def __len__(self):
            return steps

    probe = make_classifier(int(dim), int(classes))
    probe.load_state_dict(case.group("param/classification_head."))
    loader = Loader([(case["features"][row], case["labels"][row]) for row in rows])
    history = tune("lp", probe, loader, int(epochs), exact(lr), exact(wd), warmup=int(warmup))
    case.close("loss_per_step", [line["loss"] for line in history], rtol=1e-4)
    case.close("lr_per_step", [line["lr"] for line in history], rtol=1e-5)
    case.close_group("final/classification_head.", probe.state_dict(), atol=1e-5)


@golden("nmtune", "lr_schedule")
def test_lr_schedule(case):
    for i, (base, warmup, total) in enumerate(case["cases"].tolist()):
        rates = [cosine_lr(exact(base), int(warmup), int(total), step) for step in range(int(total))]
        case.close(f"{i}/lr", rates, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- golden: data


@golden("nmtune", "label_noise")
def test_label_noise(case):
    for prefix, one in cases(case):
        seed, n, classes = one["config"].tolist()
        ratio, rng = one["ratio_permille"] / 1000, np.random.RandomState(seed)
        noisy = flip_labels(one["labels"].numpy(), classes, ratio, rng, exclude_true=False)
        case.close(f"{prefix}noisy_labels", noisy)
        case.close(f"{prefix}changed", (noisy != one["labels"].numpy()).sum())
        if classes > 1:  # there is another class: the paper's noise makes all that are selected wrong
            other = flip_labels(one["labels"].numpy(), classes, ratio, np.random.RandomState(seed))
            case.close(f"{prefix}num_selected", (other != one["labels"].numpy()).sum())


@golden("nmtune", "label_flip_per_sample")
def test_label_flip_per_sample(case):
    for prefix, one in cases(case):
        seed, classes, _ = one["config"].tolist()
        probability = one["prob_permille"] / 1000
        noisy = flip_labels_per_sample(one["labels"].numpy(), classes, probability, random.Random(seed))
        case.close(f"{prefix}noisy_labels", noisy)


@golden("nmtune", "caption_swap")
def test_caption_swap(case):
    for prefix, one in cases(case):
        seed, n, swaps = one["config"].tolist()
        source = swap_captions(n, swaps, random.Random(seed))
        case.close(f"{prefix}source_index", source)
        case.close(f"{prefix}moved", (source != np.arange(n)).sum())


@golden("nmtune", "train_subset")
def test_train_subset(case):
    for prefix, one in cases(case):
        seed, n, classes = one["config"].tolist()
        rows = subset_per_class(one["labels"].numpy(), one["ratio_permille"] / 1000, np.random.RandomState(seed))
        case.close(f"{prefix}selected", rows)
        case.close(f"{prefix}selected_labels", one["labels"].numpy()[rows])


@golden("nmtune", "preprocess_eval")
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

# -------------------------------------------------------------------------------------------------- golden: evaluation


@golden("nmtune", "feature_spectrum")
def test_feature_spectrum(case):
    for prefix, one in cases(case):
        s = feature_spectrum(one["features"])
        case.close(f"{prefix}singular_values", s, atol=1e-5)
        case.close(f"{prefix}sve", singular_value_entropy(s), atol=1e-5)
        case.close(f"{prefix}lsvr", largest_singular_value_ratio(s), atol=1e-5)
        pca = feature_spectrum(one["features"], center="sample+feature")
        case.close(f"{prefix}pca_singular_values", pca, atol=2e-5)
        raw = feature_spectrum(one["features"], normalize=False, center="none")
        case.close(f"{prefix}raw_singular_values", raw, atol=1e-5)
        case.close(f"{prefix}raw_sve", singular_value_entropy(raw), atol=1e-5)
        case.close(f"{prefix}raw_lsvr", largest_singular_value_ratio(raw), atol=1e-5)


def groups_of(case: Case, name: str) -> list[list[int]]:
    flat, offsets = case[f"{name}_flat"].tolist(), case[f"{name}_offsets"].tolist()
    return [flat[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]


@golden("nmtune", "eval_metrics")
def test_eval_metrics(case):
    case.close("top1", accuracy(case["logits"], case["labels"]), atol=1e-6)
    case.close("balanced_top1", balanced_accuracy(case["logits"], case["labels"]), atol=1e-6)
    logits = case["big_logits"]
    for letter in "ar":
        groups = [[c] for c in case[f"imagenet_{letter}_classes"].tolist()]
        case.close(f"projected_{letter}", project_logits(logits, groups), atol=1e-6)
    groups = [[c] for c in case["imagenet_a_classes"].tolist()]
    case.close("top1_a", accuracy(project_logits(logits, groups), case["labels_a"]), atol=1e-6)
    groups = groups_of(case, "objectnet_groups")
    case.close("projected_objectnet", project_logits(logits, groups), atol=1e-6)
    first = groups[: case["projected_first30_groups"].shape[1]]
    case.close("projected_first30_groups", project_logits(logits, first), atol=1e-6)


@golden("nmtune", "pmk_robustness")
def test_pmk_robustness(case):
    accepted = groups_of({"x_flat": case["labels_flat"], "x_offsets": case["labels_offsets"]}, "x")
    ends = case["set_offsets"].tolist()
    sets = [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    pm0, pmk = pmk_accuracy(case["logits"], accepted, sets)
    case.close("pm0", pm0, atol=1e-6)
    case.close("pmk", pmk, atol=1e-6)


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


def test_covariance_of_nearly_uncorrelated_features_is_no_difference_of_large_numbers():
    assert covariance_loss(torch.linspace(-3, 2, 8)[:, None]) == 0  # one dimension: nothing off the diagonal
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
def test_the_gradient_of_l_svd_is_exact_or_nearer_to_it_than_an_svds(n, dim, mean, twins):
    """Features with a large mean, whose rows come in pairs of like ones as two views do: an ill-conditioned matrix."""
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


def test_swapping_never_loses_a_caption_and_moves_fewer_than_twice_the_swaps():
    source = swap_captions(2000, 300, random.Random(0))
    assert sorted(source) == list(range(2000))
    assert (source != np.arange(2000)).mean() == pytest.approx(1 - np.exp(-0.3), abs=0.02)


def test_subset_of_absent_classes_and_empty_sets():
    rng = np.random.RandomState(0)
    assert len(subset_per_class(np.zeros(0, dtype=np.int64), 0.5, rng)) == 0
    rows = subset_per_class(np.array([5, 5, 5, 5, 2, 2]), 0.5, rng)
    assert sorted(np.array([5, 5, 5, 5, 2, 2])[rows]) == [2, 5, 5]


def test_batch_norm_trains_and_the_optimizer_decays_everything():
    head = NMTuneHead(8, 3)
    optimizer = make_optimizer(head, 1e-3, 1e-4)
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["weight_decay"] == 1e-4
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in head.parameters()}
    before = head.mlp_after[1].running_var.clone()
    head.eval()
    train_step(head, torch.randn(6, 8), torch.tensor([0, 1, 2]), optimizer)
    assert head.training and not torch.equal(before, head.mlp_after[1].running_var)
    assert head.scale_after.shape == (1, 8) and NMTuneHead(8, 3, residual=False).scale_after is None


def test_encoders_are_frozen_and_unnormalised():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 40, 40)
    for source, name, dim in (("timm", "resnet_emoji", 128), ("open_clip", "ViT-emoji", 128)):
        encoder, found, train_view, eval_view = load_encoder(source, name)
        features = encoder(images)
        assert found == dim and features.shape == (3, dim) and not features.requires_grad and not encoder.training
        assert not torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-2)
        picture = Image.fromarray(np.zeros((64, 50, 3), np.uint8))
        assert train_view(picture).shape == eval_view(picture).shape == (3, 40, 40)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_in_the_authors_layouts_load(tmp_path, prefix):
    """timm's model.pth.tar with classifier and command line, open_clip's epoch_32.pt with both towers."""
    import argparse

    import open_clip

    model = timm.create_model("resnet18", num_classes=7)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save(
        {"state_dict": state, "arch": "resnet18", "epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "m.pth.tar"
    )
    encoder, dim, *_ = load_encoder("timm", "resnet18", str(tmp_path / "m.pth.tar"))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        encoder(images), model.eval().forward_head(model.forward_features(images), pre_logits=True)
    )
    assert dim == 512
    clip = open_clip.create_model("ViT-emoji")
    state = {prefix + key: value for key, value in clip.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 32, "name": "x", "optimizer": {}}, tmp_path / "epoch_32.pt")
    encoder, *_ = load_encoder("open_clip", "ViT-emoji", str(tmp_path / "epoch_32.pt"))
    images = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(encoder(images), clip.eval().encode_image(images))


@pytest.mark.parametrize("source, name", [("timm", "resnet_emoji"), ("open_clip", "ViT-emoji")])
def test_an_exported_classifier_of_the_authors_loads(tmp_path, source, name):
    """The state dict of their ImageClassifier: a wrapped encoder with an alias of its classifier, MLP, scale, head."""
    import open_clip

    images, head = torch.randn(2, 3, 40, 40), NMTuneHead(128, 5, ratio=2, layers=2)
    if source == "timm":
        model = timm.create_model(name, num_classes=7)
        state = {f"image_encoder.model.model.{key}": value for key, value in model.state_dict().items()}
        state |= {f"image_encoder.model.fc.{key}": value for key, value in model.fc.state_dict().items()}
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
    with pytest.raises(ValueError, match="does not fit timm resnet_emoji"):
        load_encoder("timm", "resnet_emoji", str(tmp_path / "wrong.pt"))
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_encoder("timm", "resnet_emoji", "nowhere.pt")
    with pytest.raises(ValueError, match="not from 'clip'"):
        load_encoder("clip", "RN50")


def test_each_regulariser_alone_does_to_the_spectrum_what_it_is_for():
    """From the same start, on the same batches: the parts of z after tuning with one term, and with none."""
    torch.manual_seed(0)
    feats, labels = torch.randn(64, 24).relu(), torch.arange(64) % 3
    start, parts = NMTuneHead(24, 3).state_dict(), {}
    for name, weights in {"none": (0, 0, 0), "mse": (10, 0, 0), "cov": (0, 1, 0), "svd": (0, 0, 20)}.items():
        head = NMTuneHead(24, 3)
        head.load_state_dict(start)
        tune("nmtune", head, [(feats, labels)], 40, 1e-3, 1e-4, weights)
        with torch.no_grad():
            z, logits = transformed(head.eval(), feats)
            parts[name] = nmtune_loss(logits, labels, z, feats, (1, 1, 1))[1]
    for name in ("mse", "cov", "svd"):
        assert parts[name][name] < parts["none"][name] - 0.05 * abs(parts["none"][name]), name
