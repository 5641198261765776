"""Learned masks, their constraint and pruning; golden numbers like in test_tinyclip_model.py."""

import pytest
import torch
from conftest import Case, leaf
from test_tinyclip_model import TEXT, VISION, clip_of, example, head_widths, some_masks, tiny, towers, variants

from tinyclip.geometry import convert_state_dict, geometry_of_weights
from tinyclip.masks import (
    BETA,
    EPSILON,
    GAMMA,
    KINDS,
    MAGIC,
    ZETA,
    L0Mask,
    eval_gate,
    expand_pruned,
    hard_concrete,
    hard_concrete_cdf,
    prune,
    sparsity_loss,
    target_sparsity,
)
from tinyclip.model import CLIP, Student


def masks_of(state: dict, model: CLIP) -> list[L0Mask]:
    masks = []
    for tower, name in (("vision", "image"), ("text", "text")):
        values = {k.removeprefix(f"{name}_mask."): v for k, v in state.items() if k.startswith(f"{name}_mask.")}
        mask = L0Mask.of(model.geometry[tower], [kind for kind in KINDS if f"{kind}_loga" in values])
        mask.load_state_dict(mask.state_dict() | values)
        masks.append(mask)
    return masks


def l0_of(case: Case, v: str) -> L0Mask:
    width, neurons, heads, layers = case[f"{v}/config"].tolist()
    types = [name.removeprefix(f"{v}/loga/") for name in case if name.startswith(f"{v}/loga/")]
    mask = L0Mask(width, neurons, heads, layers, types)
    for name in types:
        if f"{v}/init/{name}" in case:
            case.close(f"{v}/init/{name}", getattr(mask, f"{name}_loga"))
        getattr(mask, f"{name}_loga").data = torch.as_tensor(case[f"{v}/loga/{name}"]).clone()
    if f"{v}/lambda" in case:
        mask.lambda_1.data, mask.lambda_2.data = case[f"{v}/lambda"].clone()
    return mask


# ------------------------------------------------------------------------------------------- masks and their constraint


@pytest.mark.golden("tinyclip", "hard_concrete")
def test_hard_concrete(case):
    case.close("limits", [GAMMA, ZETA, EPSILON, BETA, MAGIC], rtol=1e-6)
    for i, u in enumerate(case["u"]):
        loga = leaf(case["loga"])
        z = hard_concrete(loga, u)
        (z * case[f"w{i}"]).sum().backward()
        torch.testing.assert_close(z.detach(), case["z"][i], rtol=0, atol=1e-6)
        torch.testing.assert_close(loga.grad, case["dz_w"][i], rtol=0, atol=1e-6)
    case.close("edge_z", hard_concrete(case["edge_loga"], case["edge_u"]), atol=1e-6)
    loga = leaf(case["loga"])
    score = L0Mask.open_prob(loga)
    score.sum().backward()
    case.close("score", score, atol=1e-6)
    case.close("dscore", loga.grad, atol=1e-6)
    for name in case:
        if name.startswith("cdf_at_"):
            case.close(name, hard_concrete_cdf(float(name.removeprefix("cdf_at_")), case["loga"]), atol=1e-6)
    case.close("det_mask", eval_gate(case["loga"][None])[0], atol=1e-6)
    case.close("det_soft", eval_gate(case["loga"][None], soft=False)[0], atol=1e-6)
    case.close("expected_num_zeros", len(score) - score.sum(), atol=1e-5)


@pytest.mark.golden("tinyclip", "l0_module")
def test_l0_module(case):
    for v in variants(case):
        mask = l0_of(case, v)
        assert [KINDS[number] for number in case[f"{v}/types"].tolist()] == list(mask.types)
        case.close(f"{v}/prunable", mask.prunable_params)
        case.close(f"{v}/params_per_head", mask.params_per_head)
        if f"{v}/params_per_intermediate" in case:
            case.close(f"{v}/params_per_intermediate", mask.params_per_mlp // mask.intermediate)
        case.close(f"{v}/expected_params", mask.expected_params(), rtol=1e-6)
        case.close(f"{v}/expected_params_no_hidden_term", mask.expected_params(hidden=False), rtol=1e-6)
        start, end, warmup = case[f"{v}/start_target_warmup"].tolist()
        rows, gradients = [], {}
        for step in case[f"{v}/steps"].tolist():
            mask.zero_grad()
            target = target_sparsity(step, start, end, int(warmup))
            loss, expected = sparsity_loss([mask], target)
            loss.backward()
            rows.append([loss.item(), expected.item(), target])
            for name, parameter in mask.named_parameters():
                gradients.setdefault(name.removesuffix("_loga"), []).append(parameter.grad.clone())
        if f"{v}/target_at_step" in case:
            case.close(f"{v}/target_at_step", [row[2] for row in rows], atol=1e-6)
        case.close(f"{v}/loss_expected_target", rows, atol=5e-6)
        for name, values in gradients.items():
            case.close(f"{v}/grad/{name}", torch.stack(values), atol=1e-6)
        for suffix, masks in (
            ("eval_mask", mask.eval_masks()),
            ("eval_soft", mask.eval_masks(soft=False)),
            ("train_mask", mask.sample({kind: case[f"{v}/u/{kind}"] for kind in mask.types})),
        ):
            for kind, z in masks.items():
                name = f"{v}/{suffix}/{kind}_z"
                case.close(name, z.reshape(case[name].shape), atol=1e-6)
        mask.clamp_()
        for kind, loga in mask.logas().items():
            case.close(f"{v}/constrained/{kind}", loga, atol=1e-6)


@pytest.mark.golden("tinyclip", "joint_lagrangian")
def test_joint_lagrangian(case):
    for v in variants(case):
        masks = [l0_of(case, f"{v}/{tower}") for tower in ("image", "text")]
        targets = []
        for tower in ("image", "text"):
            start, end, warmup = case[f"{v}/{tower}/start_target_warmup"].tolist()
            targets.append(target_sparsity(case[f"{v}/step"], start, end, int(warmup)))
        loss, expected = sparsity_loss(masks, sum(targets) / 2)
        loss.backward()
        case.close(f"{v}/target", sum(targets) / 2, atol=1e-5)
        case.close(f"{v}/expected", expected, atol=1e-5)
        case.close(f"{v}/loss", loss, atol=1e-5)
        for tower, mask in zip(("image", "text"), masks, strict=True):
            for name, parameter in mask.named_parameters():
                case.close(f"{v}/{tower}/grad/{name.removesuffix('_loga')}", parameter.grad, atol=1e-5)


def test_the_paper_s_constraint_pulls_back():
    mask = L0Mask(8, 32, 2, 2, init=-2.0)
    assert sparsity_loss([mask], 0.1)[0] == 0
    loss, expected = sparsity_loss([mask], 0.1, two_sided=True)
    gap = 0.1 - expected
    torch.testing.assert_close(loss, 10 * gap + 10 * gap**2)


# ------------------------------------------------------------------------------------------- masked and pruned networks


def mask_group(case: Case, prefix: str, tower: str, masks: dict) -> None:
    for kind, z in masks.items():
        name = f"{prefix}/{tower}_{kind}_z"
        case.close(name, z.reshape(case[name].shape), atol=1e-5)


@pytest.mark.golden("tinyclip", "masked_clip")
def test_masked_clip(case):
    state = convert_state_dict(case.group("param/"))
    names = dict(zip(state, case.group("param/"), strict=True))
    model = clip_of(state)
    image_mask, text_mask = masks = masks_of(state, model)
    for mask, tower in zip(masks, ("image", "text"), strict=True):
        mask_group(case, "eval", tower, mask.eval_masks())
    eval_masks = [mask.eval_masks() for mask in masks]
    with torch.no_grad():
        masked = model.encode_image(case["image"], eval_masks[0]), model.encode_text(case["text"], eval_masks[1])
    case.close("eval/image_features", masked[0], atol=1e-5)
    case.close("eval/text_features", masked[1], atol=1e-5)

    if "train/w_image" in case:
        student = Student(model, *masks).train()
        u = {
            t: {kind: case[f"train/u_{t}_{kind}"] for kind in m.types}
            for t, m in zip(("image", "text"), masks, strict=True)
        }
        for mask, tower in zip(masks, ("image", "text"), strict=True):
            mask_group(case, "train", tower, mask.sample(u[tower]))
        image, text, _ = student(case["image"], case["text"], u)
        case.close("train/image_features_norm", image, atol=1e-5)
        case.close("train/text_features_norm", text, atol=1e-5)
        ((image * case["train/w_image"]).sum() + (text * case["train/w_text"]).sum()).backward()
        gradients = {names[n]: p.grad for n, p in model.named_parameters()}
        for tower, mask in (("image", image_mask), ("text", text_mask)):
            gradients |= {names[f"{tower}_mask.{n}"]: p.grad for n, p in mask.named_parameters()}
        for name in case.group("train/grad/"):
            gradient = gradients[name]
            zero = torch.zeros(torch.as_tensor(case[f"train/grad/{name}"]).shape)
            case.close(f"train/grad/{name}", zero if gradient is None else gradient, atol=2e-5)

    small = prune(model, *eval_masks)
    pruned = convert_state_dict(case.group("pruned/param/"))
    upstream = dict(zip(pruned, case.group("pruned/param/"), strict=True))
    assert small.state_dict().keys() == pruned.keys()
    for name, value in small.state_dict().items():
        case.close(f"pruned/param/{upstream[name]}", value)
    with torch.no_grad():
        case.close("pruned/image_features", small.encode_image(case["image"]), atol=1e-5)
        case.close("pruned/text_features", small.encode_text(case["text"]), atol=1e-5)
        exact = prune(model, *eval_masks, exact=True)
        case.close("eval/image_features", exact.encode_image(case["image"]), atol=1e-5)
        case.close("eval/text_features", exact.encode_text(case["text"]), atol=1e-5)
    for tower, prefix in (("vision", "image"), ("text", "text")):
        for key, name in (("heads", "heads"), ("mlp_width", "ffn")):
            if f"pruned/{prefix}_{name}" in case:
                case.close(f"pruned/{prefix}_{name}", small.geometry[tower][key])


@pytest.mark.golden("tinyclip", "reload_pruned")
def test_reload_pruned(case):
    pruned, full = convert_state_dict(case.group("pruned/")), convert_state_dict(case.group("full/"))
    names = dict(zip(full, case.group("full/"), strict=True))
    model = CLIP(**geometry_of_weights(towers(full), head_widths(full)))
    masks = masks_of(full, model)
    for mask in masks:
        for parameter in mask.parameters():
            parameter.data.fill_(10.0)
    expand_pruned(model, *masks, pruned)
    actual = model.state_dict() | {f"image_mask.{k}": v for k, v in masks[0].state_dict().items()}
    actual |= {f"text_mask.{k}": v for k, v in masks[1].state_dict().items()}
    assert actual.keys() == full.keys()
    for name, value in actual.items():
        case.close(f"full/{names[name]}", value)
    eval_masks = [mask.eval_masks() for mask in masks]
    small = prune(model, *eval_masks)
    with torch.no_grad():
        case.close("full_features_image", model.encode_image(case["image"], eval_masks[0]), atol=1e-4)
        case.close("full_features_text", model.encode_text(case["text"], eval_masks[1]), atol=1e-4)
        case.close("repruned_features_image", small.encode_image(case["image"]), atol=1e-4)
        case.close("repruned_features_text", small.encode_text(case["text"]), atol=1e-4)
    shapes = case.group("repruned_shape/")
    upstream = dict(zip(convert_state_dict(shapes), shapes, strict=True))
    assert small.state_dict().keys() == upstream.keys()
    for name, value in small.state_dict().items():
        assert list(value.shape) == shapes[upstream[name]].tolist(), name


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
