"""TinyCLIP against the numbers of the authors' code (tests/golden/tinyclip/README.md), and properties beyond them.

One golden test per family; everything about a case is read from its file, tolerances are those of the README.
"""

import copy
import itertools
import json
import math
import re

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import Case
from PIL import Image

from shared.run import gather
from tinyclip import train
from tinyclip.config import PRESETS, RESNET, Config, Stage
from tinyclip.eval import retrieval_metrics, zero_shot_accuracy, zero_shot_classifier
from tinyclip.geometry import geometry, open_clip_config
from tinyclip.inheritance import inherit_at_random, random_masks, resize_positional_embedding
from tinyclip.masks import KINDS, eval_gate, hard_concrete, hard_concrete_cdf
from tinyclip.model import (
    CLIP,
    CONFIGS,
    L0Mask,
    Student,
    affinity_mimicking_loss,
    clip_loss,
    convert_state_dict,
    create_model,
    depth_indices,
    distillation_loss,
    expand_pruned,
    inherit_weights,
    parameter_counts,
    prune,
    sparsity_loss,
    target_sparsity,
)
from tinyclip.train import image_transform, lr_at, mask_lr_at, mask_param_groups, param_groups

golden = pytest.mark.golden


def leaf(x) -> torch.Tensor:
    return torch.as_tensor(x).clone().requires_grad_()


def variants(case: Case) -> list[str]:
    return sorted({name.partition("/")[0] for name in case})


def close_relative(case: Case, name: str, actual) -> None:
    """1e-5 of the array's largest entry; where all of a gradient is rounding (the student is the teacher), 1e-6."""
    case.close(name, actual, atol=max(1e-5 * torch.as_tensor(case[name]).abs().max().item(), 1e-6))


def head_widths(state: dict, case: Case | None = None) -> tuple[int, int]:
    """(image, text); shapes do not tell them: the README's 8, or what the case's masks say."""
    widths = []
    for tower, prefix in (("image", "visual."), ("text", "")):
        loga, qkv = (
            state.get(f"{tower}_mask.heads_loga"),
            state.get(f"{prefix}transformer.resblocks.0.attn.in_proj_bias"),
        )
        widths.append(8 if loga is None or qkv is None else len(qkv) // (3 * loga.shape[1]))
    return tuple(widths)


def towers(state: dict) -> dict:
    return {key: value for key, value in state.items() if "mask." not in key}


def clip_of(state: dict, quick_gelu: bool = False, **changes) -> CLIP:
    """The CLIP of a state dict in OpenAI's layout, with its weights."""
    shape = geometry(towers(state), head_widths(state))
    shape["vision"] |= changes
    model = CLIP(**shape, quick_gelu=quick_gelu)
    model.load_state_dict(towers(state))
    return model


def masks_of(state: dict, model: CLIP) -> list[L0Mask]:
    masks = []
    for tower, name in (("vision", "image"), ("text", "text")):
        values = {k.removeprefix(f"{name}_mask."): v for k, v in state.items() if k.startswith(f"{name}_mask.")}
        mask = L0Mask.of(model.geometry[tower], [kind for kind in KINDS if f"{kind}_loga" in values])
        mask.load_state_dict(mask.state_dict() | values)
        masks.append(mask)
    return masks


# ------------------------------------------------------------------------------------------------------ golden: losses


def unit_features(case: Case, v: str) -> tuple:
    student = [leaf(case[f"{v}/{name}"]) for name in ("image", "text", "scale")]
    return student, [case[f"{v}/teacher_{name}"] for name in ("image", "text", "scale")]


def close_gradients(case: Case, prefix: str, student: list) -> None:
    for name, value in zip(("image", "text", "scale"), student, strict=True):
        close_relative(case, f"{prefix}/grad_{name}", value.grad)


@golden("tinyclip", "affinity_loss")
def test_affinity_loss(case):
    for v in variants(case):
        student, teacher = unit_features(case, v)
        i2t, t2i = affinity_mimicking_loss(*student, *teacher)
        loss = (i2t + t2i) / 2
        loss.backward()
        for name, value in (("loss_i2t", i2t), ("loss_t2i", t2i), ("loss", loss)):
            close_relative(case, f"{v}/{name}", value)
        close_gradients(case, v, student)


@golden("tinyclip", "clip_loss")
def test_clip_loss(case):
    for v in variants(case):
        student = [leaf(case[f"{v}/{name}"]) for name in ("image", "text", "scale")]
        loss = clip_loss(*student)
        loss.backward()
        close_relative(case, f"{v}/loss", loss)
        close_gradients(case, v, student)


@golden("tinyclip", "distill_loss_mix")
def test_distill_loss_mix(case):
    for prefix in sorted({name.rpartition("/")[0] for name in case if name.endswith("/loss")}):
        v, _, setting = prefix.rpartition("/")
        alpha, weight = map(float, re.fullmatch(r"alpha(.+)_weight(.+)", setting).groups())
        student, teacher = unit_features(case, v)
        with torch.no_grad():
            i2t, t2i = affinity_mimicking_loss(*student, *teacher)
            for name, value in (
                ("soft", alpha * weight * (i2t + t2i) / 2),
                ("hard", (1 - alpha) * weight * clip_loss(*student)),
            ):
                if f"{prefix}/{name}" in case:
                    close_relative(case, f"{prefix}/{name}", value)
        loss = distillation_loss(*student, *teacher, alpha=alpha, weight=weight)
        loss.backward()
        close_relative(case, f"{prefix}/loss", loss)
        close_gradients(case, prefix, student)


def one_rank(rank: int, world: int, path: str, inputs: dict, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    rows = slice(rank * len(inputs["image"]) // world, (rank + 1) * len(inputs["image"]) // world)
    results = {}
    for hard in (False, True):
        image, text, scale = leaf(inputs["image"][rows]), leaf(inputs["text"][rows]), leaf(inputs["scale"])
        if hard:
            loss = clip_loss(image, text, scale, gather)
            loss.backward()
            results |= {"hard_loss": loss.detach(), "hard_grad_image": image.grad, "hard_grad_text": text.grad}
        else:
            teacher = inputs["teacher_image"][rows], inputs["teacher_text"][rows], inputs["teacher_scale"]
            i2t, t2i = affinity_mimicking_loss(image, text, scale, *teacher, gather)
            loss = (i2t + t2i) / 2
            loss.backward()
            results |= {"loss_i2t": i2t.detach(), "loss_t2i": t2i.detach(), "loss": loss.detach()}
            results |= {"grad_image": image.grad, "grad_text": text.grad, "grad_scale": scale.grad}
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@golden("tinyclip", "affinity_loss_distributed")
def test_affinity_loss_distributed(case, tmp_path):
    world = len({name.partition("/")[0] for name in case if name.startswith("rank")})
    inputs = {name: value for name, value in case.items() if not name.startswith("rank")}
    mp.spawn(one_rank, (world, str(tmp_path / "store"), inputs, str(tmp_path)), nprocs=world)
    for rank in range(world):
        case.close_group(f"rank{rank}/", torch.load(tmp_path / f"{rank}.pt"), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- golden: towers


def pooling_widths(state: dict) -> list[int]:
    """Head widths that a ResNet's attention pool may have: a case does not say, so the one that fits best is taken."""
    pool = state.get("visual.attnpool.c_proj.weight")
    return [64] if pool is None else [width for width in (8, 16, 32, 64, 128) if pool.shape[1] % width == 0]


def close_scaled(case: Case, name: str, actual) -> None:
    """1e-5, of the largest entry where that is above 1: a ResNet's features of 400 have a resolution of 3e-5."""
    case.close(name, actual, atol=1e-5 * max(1.0, case[name].abs().max().item()))


@golden("tinyclip", "forward_vit", "forward_vit_quickgelu", "forward_resnet")
def test_forward(case):
    state = convert_state_dict(case.group("param/"))
    options = {"image_size": case["image"].shape[-1]}
    quick_gelu = "quickgelu" in case.path.name

    def error(model: CLIP) -> float:
        with torch.no_grad():
            return (model.eval().encode_image(case["image"]) - case["image_features"]).abs().max().item()

    candidates = [{"head_width": width} for width in pooling_widths(state)] if "visual.conv3.weight" in state else [{}]
    model = min((clip_of(state, quick_gelu, **options, **option) for option in candidates), key=error).eval()
    with torch.no_grad():
        features = model.encode_image(case["image"]), model.encode_text(case["text"])
        unit = *model(case["image"], case["text"])[:2], model.logit_scale.exp()
    for name, value in zip(("image_features", "text_features"), features, strict=True):
        close_scaled(case, name, value)
        case.close(f"{name}_norm", F.normalize(value, dim=-1), atol=1e-5)
    case.close("image_features_norm", unit[0], atol=1e-5)
    case.close("text_features_norm", unit[1], atol=1e-5)
    case.close("logit_scale_exp", unit[2], atol=1e-5)
    torch.testing.assert_close(model.encode_text(case["text"], normalize=True), unit[1])
    if "train/image_features" in case:
        model.train()
        with torch.no_grad():
            close_scaled(case, "train/image_features", model.encode_image(case["image"]))
        buffers = convert_state_dict(case.group("train_buffers/"))
        names = dict(zip(buffers, case.group("train_buffers/"), strict=True))
        for name in buffers:
            case.close(f"train_buffers/{names[name]}", model.state_dict()[name], atol=1e-5)


@golden("tinyclip", "param_counts")
def test_param_counts(case):
    for name in variants(case):
        embed_dim, image_size, width, patch, text_width, heads, layers, context, vocab, *depth = case[
            f"{name}/config"
        ].tolist()
        vision = {"image_size": image_size, "width": width, "head_width": 64}
        vision |= {"patch_size": patch, "layers": depth[0]} if patch else {"layers": depth}
        text = {"context_length": context, "vocab_size": vocab, "width": text_width, "heads": heads, "layers": layers}
        if name in CONFIGS:
            assert CONFIGS[name] == {"embed_dim": embed_dim, "vision": vision, "text": text}
        with torch.device("meta"):
            model = CLIP(embed_dim, vision, text)
        counts = parameter_counts(model)
        case.close(f"{name}/total", counts["total"])
        case.close(f"{name}/image", counts["image"])
        case.close(f"{name}/image_buffers", sum(b.numel() for b in model.visual.buffers()))
        case.close(f"{name}/text_with_token_embedding", counts["text_with_token_embedding"])
        case.close(f"{name}/token_embedding", model.token_embedding.weight.numel())
        case.close(f"{name}/text_transformer", sum(p.numel() for p in model.transformer.parameters()))


@golden("tinyclip", "pos_embed_resize")
def test_pos_embed_resize(case):
    for v in variants(case):
        grid = int(v.partition("to")[2])
        case.close(f"{v}/out", resize_positional_embedding(case[f"{v}/in"], grid), atol=1e-5)


@golden("tinyclip", "checkpoint_keys")
def test_checkpoint_keys(case):
    for keys in case.values():
        theirs = {key: torch.full((), float(i)) for i, key in enumerate(keys)}
        ours = convert_state_dict(sd=theirs)
        expected = convert_state_dict({upstream: theirs[key] for key, upstream in keys.items()})
        assert ours == expected and len(ours) == len(set(keys.values()))
        for upstream in keys.values():
            assert re.sub(r"^_image_encoder\.(?=visual)|^_text_encoder\.|^_logit_scale\.", "", upstream) in ours


# -------------------------------------------------------------------------------------------------- golden: inheritance


@golden("tinyclip", "inherit_depth")
def test_inherit_depth(case):
    for name in case:
        case.close(name, depth_indices(*map(int, name.split("_to_"))))


@golden("tinyclip", "inherit_vit", "inherit_resnet")
def test_inherit(case):
    teacher, student = (convert_state_dict(case.group(f"{who}/")) for who in ("teacher", "student"))
    blank = {name: torch.full_like(value, -7) for name, value in student.items()}
    inherited = {}
    for tower in ("image", "text"):
        part = {name: value for name, value in blank.items() if name.startswith("visual") == (tower == "image")}
        inherited |= inherit_weights(student_sd=part, teacher_sd=teacher, head_dim=case[f"head_dim_{tower}"])
    names = dict(zip(student, case.group("student/"), strict=True))
    assert inherited.keys() == student.keys()
    for name, value in inherited.items():
        case.close(f"student/{names[name]}", value)


@golden("tinyclip", "hard_concrete")
def test_hard_concrete(case):
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


@golden("tinyclip", "l0_module")
def test_l0_module(case):
    for v in variants(case):
        mask = l0_of(case, v)
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


@golden("tinyclip", "joint_lagrangian")
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


def mask_group(case: Case, prefix: str, tower: str, masks: dict) -> None:
    for kind, z in masks.items():
        name = f"{prefix}/{tower}_{kind}_z"
        case.close(name, z.reshape(case[name].shape), atol=1e-5)


@golden("tinyclip", "masked_clip")
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


@golden("tinyclip", "reload_pruned")
def test_reload_pruned(case):
    pruned, full = convert_state_dict(case.group("pruned/")), convert_state_dict(case.group("full/"))
    names = dict(zip(full, case.group("full/"), strict=True))
    model = CLIP(**geometry(towers(full), head_widths(full)))
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


# ----------------------------------------------------------------------------------------------------- golden: training


@golden("tinyclip", "lr_schedules")
def test_lr_schedules(case):
    for name in case:
        kind, v, what = name.split("/")
        if what != "lr":
            continue
        base, warmup, total = case[f"cosine/{v}/base_warmup_total"].tolist()
        warmup, total, steps = int(warmup), int(total), range(len(case[name]))
        if kind == "cosine":
            case.close(name, [lr_at(step, base, warmup, total) for step in steps], rtol=1e-6)
        elif kind == "after_prune":
            expected = case[name][warmup:].double()
            actual = torch.tensor(
                [lr_at(s, base, 1, total, prune_step=warmup) for s in steps[warmup:]], dtype=torch.double
            )
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-12)
        else:
            case.close(name, [mask_lr_at(step, warmup, 0.02) for step in steps], rtol=1e-6)


@golden("tinyclip", "optimizer_groups")
def test_optimizer_groups(case):
    for masked, groups in (("masked" in name, groups) for name, groups in case.items()):
        names = convert_state_dict({name: torch.tensor(0) for name in groups})
        upstream = dict(zip(names, groups, strict=True))

        def depth(pattern: str, names=names) -> int:
            return 1 + max((int(m[1]) for name in names if (m := re.match(pattern + r"\.(\d+)\.", name))), default=-1)

        vision = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8}
        vision["layers"] = depth(r"visual\.transformer\.resblocks")
        if not vision["layers"]:
            stages = [depth(rf"visual\.layer{i}") for i in (1, 2, 3, 4)]
            vision = {"image_size": 32, "width": 8, "head_width": 8, "layers": stages}
        layers = depth(r"transformer\.resblocks")
        text = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": layers}
        clip = CLIP(8, vision, text)
        recipe = Stage() if isinstance(vision["layers"], int) else RESNET
        student = Student(clip, *[L0Mask.of(clip.geometry[t]) for t in ("vision", "text")] if masked else [])
        optimizers = train.make_optimizers(student, recipe)
        of = {id(p): (o, g) for o in optimizers if o is not None for g in o.param_groups for p in g["params"]}
        ours = {n.removeprefix("clip."): of[id(p)] for n, p in student.named_parameters()}
        assert ours.keys() == names.keys()
        for name, (optimizer, group) in ours.items():
            expected = groups[upstream[name]]
            assert (optimizer is optimizers.masks) == (expected["optimizer"] == 3)
            settings = [*group["betas"], group["eps"], group["lr"], group["weight_decay"]]
            assert settings == pytest.approx([*expected["betas_eps"], expected["lr"], expected["weight_decay"]])
        assert [g["weight_decay"] for g in param_groups(clip)] == [0.0, 0.2]
        assert [g["lr"] for g in mask_param_groups(student.masks)] == [0.02, -0.02] * len(student.masks)


def stage_of(case: Case) -> tuple[Stage, list]:
    lr, wd, beta1, beta2, eps, clip = case["hparams_lr_wd_b1_b2_eps_clip"].double().tolist()
    alpha, weight, warmup, total = case["hparams_alpha_weight_warmup_total"].tolist()
    scale = None if case["logit_scale_fixed"] < 0 else case["logit_scale_fixed"]
    stage = Stage(
        steps=int(total), lr=lr, warmup=int(warmup), weight_decay=wd, beta1=beta1, beta2=beta2, eps=eps, alpha=alpha,
        max_grad_norm=None if clip < 0 else clip, weight=weight, logit_scale=scale,
    )  # fmt: skip
    if "prune_step" in case:
        start, target, ramp = case["mask_start_target_warmup"].tolist()
        stage.masks, stage.prune_step, stage.joint = True, case["prune_step"], bool(case["total_loss_flag"])
        stage.start_sparsity, stage.target_sparsity, stage.sparsity_warmup = start, target, int(ramp)
    return stage, [(case[f"image/{i}"], case[f"text/{i}"]) for i in range(len(case["loss"]))]


def networks_of_run(init: dict, teacher: dict, stage: Stage, batches: list, loss: float) -> tuple[CLIP, CLIP]:
    """Student and teacher; where one is a ResNet, with the pooling heads that give the recorded first loss."""

    def make(state: dict, width: int) -> CLIP:
        return clip_of(state, **({"head_width": width} if "visual.conv3.weight" in state else {}))

    def error(widths: tuple[int, int]) -> float:
        student, answers = make(init, widths[0]).train(), make(teacher, widths[1]).eval()
        with torch.no_grad():
            answer = train.ask_teacher(answers, *batches[0], stage)
            output = student(*batches[0])
            return abs(distillation_loss(*output, *answer, alpha=stage.alpha, weight=stage.weight).item() - loss)

    choices = list(itertools.product(pooling_widths(init), pooling_widths(teacher)))
    best = choices[0] if len(choices) == 1 else min(choices, key=error)
    return make(init, best[0]), make(teacher, best[1])


@golden("tinyclip", "train_manual", "train_auto")
def test_training_run(case, monkeypatch):
    """The whole loop, and beside it every step's loss, gradient norm and mask parameters."""
    stage, batches = stage_of(case)
    init, teacher_state = convert_state_dict(case.group("init/")), convert_state_dict(case.group("teacher/"))
    names = dict(zip(init, case.group("init/"), strict=True))
    clip, teacher = networks_of_run(init, teacher_state, stage, batches, case["loss"][0].item())
    student = Student(clip, *masks_of(init, clip) if stage.masks else [])
    losses, norms, first = [], [], {}
    step_once = train.train_step

    def watched(student, answer, images, tokens, step, *rest, **options):
        for tower in ("image", "text"):
            mask = getattr(student, f"{tower}_mask")
            for name, value in (mask.state_dict() if mask is not None else {}).items():
                key = f"l0_before_step/{step}/_{tower}_encoder.l0_module.{name}"
                if key in case:
                    case.close(key, value, atol=1e-6)
        if step == 0:  # gradients before clipping
            clip_norm = torch.nn.utils.clip_grad_norm_

            def note(parameters, *arguments):
                first.update(
                    {
                        n.removeprefix("clip."): p.grad.clone()
                        for n, p in student.named_parameters()
                        if p.grad is not None
                    }
                )
                return clip_norm(parameters, *arguments)

            with monkeypatch.context() as patch:
                patch.setattr(train.nn.utils, "clip_grad_norm_", note)
                logged = step_once(student, answer, images, tokens, step, *rest, **options)
        else:
            logged = step_once(student, answer, images, tokens, step, *rest, **options)
        losses.append(logged["loss"].item())
        norms.append(logged["gradient_norm"].item())
        for ours, theirs in (
            ("expected_sparsity", "all_expected"), ("target_sparsity", "all_target"),
            ("image_sparsity", "vision_expected"), ("text_sparsity", "text_expected"),
        ):  # fmt: skip
            key = f"log/{step}/train/{theirs}_sparsity"
            if key in case and ours in logged and stage.joint:
                case.close(key, logged[ours], atol=2e-5)
        return logged

    monkeypatch.setattr(train, "train_step", watched)
    uniforms = None
    if stage.masks:
        uniforms = [
            {t: {kind: case[f"u/{step}/{t}_{kind}"] for kind in stage.mask_types} for t in ("image", "text")}
            for step in range(len(batches))
            if f"u/{step}/image_heads" in case
        ]
    final = train.train_stage(student, teacher, batches, stage, uniforms)
    case.close("loss", losses, atol=2e-5)
    case.close("grad_norm_before_clip", norms, rtol=1e-4)
    for name, value in first.items():
        if f"step0_grad/{names[name]}" in case:
            case.close(f"step0_grad/{names[name]}", value, atol=2e-5)
    expected = convert_state_dict(case.group("final/"))
    names = dict(zip(expected, case.group("final/"), strict=True))
    assert final.state_dict().keys() == expected.keys()
    for name, value in final.state_dict().items():
        case.close(f"final/{names[name]}", value, atol=1e-4 if stage.masks else 5e-5)


# --------------------------------------------------------------------------------------------------- golden: evaluation


@golden("tinyclip", "zero_shot")
def test_zero_shot(case):
    classifier = zero_shot_classifier(case["text_features"])
    case.close("classifier", classifier, atol=1e-5)
    logits = 100 * case["image_features_norm"] @ classifier
    case.close("logits", logits, atol=1e-4)
    top = zero_shot_accuracy(logits, case["target"], (1, *case["k"].tolist()))
    case.close("top1", top[0], atol=1e-5)
    case.close("topk", top[-1], atol=1e-5)


@golden("tinyclip", "retrieval_metrics")
def test_retrieval_metrics(case):
    for v in variants(case):
        metrics = retrieval_metrics(case[f"{v}/image"], case[f"{v}/text"])
        for name in metrics:
            case.close(f"{v}/{name}", metrics[name], atol=1e-5)
        assert {f"{v}/{name}" for name in metrics} | {f"{v}/image", f"{v}/text"} == {
            n for n in case if n.startswith(f"{v}/")
        }


@golden("tinyclip", "preprocess_val")
def test_preprocess_val(case):
    transform = image_transform(case["resolution"])
    for name in case:
        if name.endswith("image_hwc_uint8"):
            image = Image.fromarray(case[name].numpy().astype(np.uint8))
            case.close(name.replace("image_hwc_uint8", "out"), transform(image), atol=1e-5)


@golden("tinyclip", "tokenizer")
def test_tokenizer(case):
    if case.path.suffix == ".json":  # the texts of the .npz beside it, which the next case tokenizes
        assert case.path.with_name(case.path.name.replace("_texts.json", ".npz")).exists()
        return
    texts = json.loads(case.path.with_name(f"{case.path.stem}_texts.json").read_text(encoding="utf-8"))
    case.close("tokens", open_clip.SimpleTokenizer(context_length=case["context_length"])(texts))


# ------------------------------------------------------------------------------------------------------- properties

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 30, "width": 24, "heads": 3, "layers": 3}


def tiny(seed: int = 0, quick_gelu: bool = False) -> CLIP:
    torch.manual_seed(seed)
    model = CLIP(12, VISION, TEXT, quick_gelu)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def some_masks(tower: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Soft masks with a layer without heads, one without attention, one without neurons and one without MLP."""
    generator = torch.Generator().manual_seed(seed)
    heads = tower["width"] // 8

    def soft(*shape):
        z = torch.rand(*shape, generator=generator)
        return torch.where(z < 0.3, 0.0, z)

    masks = {"hidden": soft(tower["width"]), "heads": soft(3, heads), "intermediate": soft(3, 4 * tower["width"])}
    masks |= {"mha": torch.tensor([0.7, 0.9, 0.0]), "ffn": torch.tensor([0.5, 0.0, 0.8])}
    if seed % 2:  # the bias that the second layer loses has only the first attention before it
        masks["ffn"][0] = 0
    masks["heads"][1] = 0
    masks["heads"][0, 0] = masks["heads"][2, 0] = 1.0
    masks["intermediate"][2] = 0
    return masks


def example(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    tokens = torch.randint(1, 29, (n, 8)).scatter(1, torch.randint(2, 8, (n, 1)), 29)
    return torch.randn(n, 3, 16, 16), tokens


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


def test_a_pruned_network_is_rebuilt_from_its_weights():
    small = prune(tiny(), some_masks(VISION), some_masks(TEXT))
    again = CLIP(**geometry(small.state_dict(), 8))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.encode_image(example()[0]), small.encode_image(example()[0]))
    assert open_clip_config(small.geometry) is None and open_clip_config(tiny().geometry) is not None


def test_pruning_one_tower_leaves_the_other():
    model = tiny()
    small = prune(model, None, some_masks(TEXT))
    assert all(torch.equal(small.visual.state_dict()[k], v) for k, v in model.visual.state_dict().items())
    assert small.ln_final.weight.numel() < model.ln_final.weight.numel()
    with pytest.raises(ValueError, match="no hidden dimension"):
        prune(model, some_masks(VISION) | {"hidden": torch.zeros(32)}, None)


def test_open_masks_change_nothing():
    model, (images, tokens) = tiny(), example()
    open_ = [{k: torch.ones_like(z) for k, z in some_masks(tower).items()} for tower in (VISION, TEXT)]
    torch.testing.assert_close(model.encode_image(images, open_[0]), model.encode_image(images))
    torch.testing.assert_close(model.encode_text(tokens, open_[1]), model.encode_text(tokens))


def test_what_stands_behind_the_end_token_does_not_matter():
    model, (_, tokens) = tiny(), example()
    end = tokens.argmax(1)[:, None]
    other = torch.where(torch.arange(8) > end, 7, tokens)
    torch.testing.assert_close(model.encode_text(other), model.encode_text(tokens))


def test_a_student_like_its_teacher_is_left_with_the_entropy():
    image, text = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    i2t, _ = affinity_mimicking_loss(image, text, 5.0, image, text, 5.0)
    p = (5 * image @ text.T).softmax(1)
    torch.testing.assert_close(i2t, -(p * p.log()).sum(1).mean())
    assert i2t > 0.1


def test_a_loss_of_weight_zero_needs_no_teacher():
    image, text = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    loss = distillation_loss(image, text, 5.0, None, None, None, alpha=0.0, weight=2.0)
    torch.testing.assert_close(loss, 2 * clip_loss(image, text, 5.0))


@pytest.mark.parametrize(
    "teacher, student, front, uniform",
    [(12, 9, range(9), [0, 1, 2, 4, 5, 6, 8, 9, 10]), (12, 6, range(0, 12, 2), range(0, 12, 2))],
)
def test_depth_rules(teacher, student, front, uniform):
    assert depth_indices(teacher, student) == list(front)
    assert depth_indices(teacher, student, "uniform") == list(uniform)


def test_inheritance_refuses_what_does_not_fit():
    teacher = tiny().state_dict()
    with pytest.raises(ValueError, match="4 layers cannot inherit from 3"):
        inherit_weights(CLIP(12, VISION, TEXT | {"layers": 4}).state_dict(), teacher, 8)
    with pytest.raises(ValueError, match="more than"):
        inherit_weights(CLIP(13, VISION, TEXT).state_dict(), teacher, 8)
    with pytest.raises(ValueError, match="another patch grid"):
        inherit_weights(CLIP(12, VISION | {"image_size": 24}, TEXT).state_dict(), teacher, 8)
    with pytest.raises(ValueError, match="nothing to inherit from"):
        inherit_weights({"strange": torch.ones(1)}, teacher)
    with pytest.raises(ValueError, match="depth rule"):
        depth_indices(3, 2, "odd")


def test_the_paper_s_constraint_pulls_back():
    mask = L0Mask(8, 32, 2, 2, init=-2.0)
    assert sparsity_loss([mask], 0.1)[0] == 0
    loss, expected = sparsity_loss([mask], 0.1, two_sided=True)
    gap = 0.1 - expected
    torch.testing.assert_close(loss, 10 * gap + 10 * gap**2)


def test_towers_may_have_constraints_of_their_own():
    masks = [L0Mask(8, 32, 2, 2, init=3.0), L0Mask(16, 64, 2, 1, init=0.0)]
    alone = [sparsity_loss([mask], 0.5)[0] for mask in masks]
    torch.testing.assert_close(sparsity_loss(masks, 0.5, joint=False)[0], sum(alone))
    assert not torch.isclose(sparsity_loss(masks, 0.5)[0], sum(alone))


def test_equal_gates_close_in_order():
    gate = eval_gate(torch.zeros(2, 5))
    closed = round(5 * (1 - L0Mask.open_prob(torch.zeros(())).item()))
    assert closed == 1 and (gate == 0).tolist() == [[True] * closed + [False] * (5 - closed)] * 2


def test_kept_params_are_those_of_the_pruned_blocks():
    model = tiny()
    mask = L0Mask.of(VISION)
    for loga in mask.logas().values():
        loga.data.normal_(0.5, 3)
    small = prune(model, mask.eval_masks(), None)
    weights = [p for n, p in small.visual.transformer.named_parameters() if n.endswith("weight") and p.ndim == 2]
    assert mask.kept_params() == sum(p.numel() for p in weights)


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
    with pytest.raises(ValueError, match="a ResNet is none"):
        inherit_at_random(tiny(), resnet, torch.Generator())


def test_expanding_refuses_what_does_not_fit():
    full, masks = tiny(), [L0Mask.of(VISION), L0Mask.of(TEXT)]
    state = dict(full.state_dict())
    for change, words in (
        ({"strange": torch.ones(1)}, "strange, which the full-size one lacks"),
        ({"text_projection": torch.ones(99, 12)}, "does not fit"),
    ):
        with pytest.raises(ValueError, match=words):
            expand_pruned(tiny(), *masks, state | change)
    state.pop("text_projection")
    with pytest.raises(ValueError, match="lack text_projection"):
        expand_pruned(tiny(), *masks, state)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for on in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(on)
        image, text, _ = model(*example())
        (image.sum() + text[:, 0].sum()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_steps_that_are_not_finite_are_skipped():
    student = Student(tiny().train())
    before = copy.deepcopy(student.state_dict())
    stage = Stage(steps=4, alpha=0.0, logit_scale=None)
    optimizers = train.make_optimizers(student, stage)
    images, tokens = example()
    logged = train.train_step(student, None, images * math.inf, tokens, 0, stage, optimizers)
    assert logged["skipped"] == 1 and all(torch.equal(before[k], v) for k, v in student.state_dict().items())
    assert train.train_step(student, None, images, tokens, 0, stage, optimizers)["skipped"] == 0


def test_every_row_of_the_model_zoo_is_a_preset():
    models = {cfg.model for _, cfg in PRESETS.values()}
    assert {name for name in CONFIGS if name.startswith("TinyCLIP")} <= models
    assert all(isinstance(stage, Config) for stage in train.STAGES.values()) and set(train.STAGES) == set(PRESETS)


def test_unknown_names():
    with pytest.raises(ValueError, match="none of"):
        create_model("ViT-nowhere")
    with pytest.raises(ValueError, match="mask type"):
        L0Mask(8, 32, 2, 2, ["layer"])
    with pytest.raises(ValueError, match="not the weights of a CLIP"):
        geometry({})
    with pytest.raises(ValueError, match="masks act on transformers"):
        resnet = CLIP(8, {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1]}, TEXT)
        resnet.encode_image(torch.zeros(1, 3, 32, 32), some_masks(VISION))
