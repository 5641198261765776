"""ProtoCLIP against the numbers of the authors' code (tests/golden/protoclip/README.md), and properties beyond them.

One golden test per family; everything about a case is read from its file, tolerances are those of the README.
"""

import math
import re

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import Case, leaf
from open_clip.transformer import QuickGELU
from scripts import in_ranks

from protoclip.model import (
    ProtoCLIP,
    ProtoCLIPOutput,
    Prototypes,
    assignment_accuracy,
    build_prototypes,
    clip_loss,
    create_model,
    divide_gradient,
    kmeans,
    kmeans_error,
    projection_head,
    protoclip_loss,
    prototypical_back_translation,
    prototypical_loss,
)
from protoclip.train import loss_weights, parameter_groups
from shared.run import gather


def linears(state: dict[str, torch.Tensor], prefix: str = "") -> list[torch.Tensor]:
    """Weights of a projection head's Linear layers, in order."""
    numbers = {int(m[1]) for key in state if (m := re.fullmatch(prefix + r"(\d+)\.weight", key))}
    weights = [state[f"{prefix}{number}.weight"] for number in sorted(numbers)]
    return [weight for weight in weights if weight.ndim == 2]


def model_of(case: Case) -> ProtoCLIP:
    """The model with weights `param/*`.

    Sizes are read from their names and shapes; numbers of attention heads are the README's: 4 (text), 16 channels per
    head (ViT), 64 channels per head (attention pool).
    """
    state = case.group("param/")

    def blocks(pattern: str) -> int:
        return len({m[1] for key in state if (m := re.match(pattern + r"\.(\d+)\.", key))})

    def transformer(prefix: str) -> dict:
        hidden, width = state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape
        return {"width": width, "layers": blocks(rf"{prefix}transformer\.resblocks"), "mlp_ratio": hidden / width}

    height, side = case["images"].shape[-2:]
    if "visual.class_embedding" in state:
        vision = transformer("visual.") | {"patch_size": state["visual.conv1.weight"].shape[-1], "head_width": 16}
        vision["image_size"] = (height, side)
    else:
        depths = tuple(blocks(rf"visual\.layer{i}") for i in (1, 2, 3, 4))
        vision = {"layers": depths, "width": len(state["visual.conv3.weight"]), "head_width": 64, "image_size": side}
    text = transformer("") | {
        "heads": 4,
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
    }
    head = linears(state, "text_projection_head.")
    embed_dim = state["text_projection"].shape[1]
    model = ProtoCLIP(embed_dim, vision, text, True, True, len(head[0]), len(head[-1]), len(head) - 1)
    model.load_state_dict(state)
    return model


# ----------------------------------------------------------------------------------------------- golden: model, losses


@pytest.mark.golden("protoclip", "clip_loss")
def test_clip_loss(case):
    image, text, log_scale = (leaf(case[k]) for k in ("image_features", "text_features", "log_logit_scale"))
    loss = clip_loss(image, text, log_scale.exp())
    loss.backward()
    case.close("loss", loss, rtol=1e-5, atol=1e-5)
    case.close("grad_image_features", image.grad, rtol=1e-5, atol=1e-5)
    case.close("grad_text_features", text.grad, rtol=1e-5, atol=1e-5)
    case.close("grad_log_logit_scale", log_scale.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.golden("protoclip", "proto_loss")
def test_proto_loss(case):
    student, log_scale = leaf(case["student_features"]), leaf(case["log_logit_scale"])
    prototypes, labels = case["student_centroids"], case["labels"]
    teacher = case["teacher_centroids"], case["teacher_temperature"]
    loss = prototypical_loss(student, prototypes, log_scale.exp(), labels, *teacher)
    loss.backward()
    case.close("loss", loss, rtol=1e-5, atol=1e-5)
    case.close("accuracy", assignment_accuracy(student, prototypes, log_scale.exp(), labels), rtol=1e-5, atol=1e-5)
    case.close("grad_student_features", student.grad, rtol=1e-5, atol=1e-5)
    case.close("grad_log_logit_scale", log_scale.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.golden("protoclip", "projection_head")
def test_projection_head(case):
    state, x = case.group("param/"), leaf(case["x"])
    weights = linears(state)
    sizes = weights[0].shape[1], len(weights[0]), len(weights[-1]), case["n_layers"]
    head = projection_head(*sizes)
    head.load_state_dict(state)
    out = head.eval()(x)
    case.close("out_eval", out, rtol=1e-5, atol=1e-5)
    case.close("out_eval_normalized", F.normalize(out, dim=-1), rtol=1e-5, atol=1e-5)
    out = head.train()(x)
    normalized = F.normalize(out, dim=-1)
    (normalized * case["cotangent"]).sum().backward()
    case.close("out_train", out, rtol=1e-5, atol=1e-5)
    case.close("out_train_normalized", normalized, rtol=1e-5, atol=1e-5)
    case.close("grad_x", x.grad, rtol=1e-5, atol=1e-5)
    case.close_group("buffer_after_train_forward/", head.state_dict(), rtol=1e-5, atol=1e-5)
    assert heads_equal(tiny_model(*sizes)) == bool(case["heads_equal_at_init"])


@pytest.mark.golden("protoclip", "clip_vit_forward", "clip_resnet_forward")
def test_clip_forward(case):
    model = model_of(case)
    for mode in ("eval", "train"):
        model.train(mode == "train")
        with torch.no_grad():
            output = model(case["images"], case["texts"])._asdict()
            output["image_features_projected"] = output["image_projected"]
            output["text_features_projected"] = output["text_projected"]
            if mode == "eval":
                output["encode_image"] = model.encode_image(case["images"])
                output["encode_text"] = model.encode_text(case["texts"])
        case.close_group(f"{mode}/", output, rtol=1e-4, atol=1e-5)
    case.close_group("buffer_after_train_forward/", model.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.golden("protoclip", "state_dict_layout")
def test_state_dict_layout(case):
    name = case.path.stem.removeprefix("state_dict_layout_")
    with torch.device("meta"):  # no memory, no initialisation: only names and shapes matter
        layout = {key: torch.empty(shape) for key, shape in case.items()}
        head = linears(layout, "text_projection_head.")
        model = create_model(name, True, len(head[0]), len(head[-1]), len(head) - 1)
        config = open_clip.get_model_config(name)
        plain = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == dict(case)
    ours_only = {key for key in case if "projection_head" in key} | {"logit_scale_proto"}
    assert set(plain.state_dict()) == set(case) - ours_only


def prototypes_of(case: Case) -> Prototypes:
    """Prototypes of an episode, from upstream's cached arrays."""
    pbt, external = case["use_pbt"], case["use_external"]
    return Prototypes(
        case["img_labels"],
        case["text_labels"],
        case["img_centroids"],
        case["text_centroids"],
        case["img_centroids_translated_from_text_prototypes"] if pbt else None,
        case["text_centroids_translated_from_image_prototypes"] if pbt else None,
        case["external_labels"] if external else None,
        case["img_centroids_translated_from_external_prototypes"] if external else None,
        case["text_centroids_translated_from_external_prototypes"] if external else None,
    )


# external_centroids: in the teacher's space, so that no loss uses them. The others: they are also in the file without
# back translation and without a teacher; in the other files the compared losses depend on them
@pytest.mark.golden(
    "protoclip", "train_step_loss", unused=("external_centroids", "external_labels", "*_translated_from_*")
)
def test_train_step_loss(case):
    p, index, temperature = prototypes_of(case), case["index"], case["target_temperature"]
    inputs = {key: leaf(value) for key, value in case.group("in/").items()}
    output = ProtoCLIPOutput(**{key: x.exp() if "scale" in key else x for key, x in inputs.items()})
    configured = case["weights"].tolist()
    weights = loss_weights(case["epoch"], configured, case["infonce_warmup_epoch"], case["lit_start_epoch"])
    losses = protoclip_loss(output, index, p, weights, temperature)
    losses["loss"].backward()
    case.close("total_loss", losses["loss"], rtol=1e-5, atol=1e-5)
    case.close("loss_clip", losses["clip"], rtol=1e-5, atol=1e-5)
    case.close_group("grad/", {key: x.grad for key, x in inputs.items()}, rtol=1e-5, atol=1e-5)

    # Upstream's parts are there also where their weight is 0, one per direction; ours are their means.
    parts = protoclip_loss(output, index, p, (1, 1, 1), temperature)
    for part, (a, b) in {"proto": ("img2text", "text2img"), "external": ("img2external", "text2external")}.items():
        expected = (case[f"loss_{a}"] + case[f"loss_{b}"]) / 2
        torch.testing.assert_close(parts[part].item(), expected, rtol=1e-5, atol=1e-5)
    h_image, h_text, scale = output.image_projected, output.text_projected, output.logit_scale_proto
    image_targets, text_targets = (p.image_from_text, p.text_from_image) if case["use_pbt"] else (p.text, p.image)
    soft = (p.text_labels[index], p.text, temperature), (p.image_labels[index], p.image, temperature)
    case.close("loss_img2text", prototypical_loss(h_image, image_targets, scale, *soft[0]), rtol=1e-5, atol=1e-5)
    case.close("loss_text2img", prototypical_loss(h_text, text_targets, scale, *soft[1]), rtol=1e-5, atol=1e-5)
    case.close("acc_img2text", parts["accuracy_image_to_text"], rtol=1e-5, atol=1e-5)
    case.close("acc_text2img", parts["accuracy_text_to_image"], rtol=1e-5, atol=1e-5)
    if case["use_external"]:
        labels = p.external_labels[index]
        to_external = prototypical_loss(h_image, p.image_from_external, scale, labels)
        case.close("loss_img2external", to_external, rtol=1e-5, atol=1e-5)
        to_external = prototypical_loss(h_text, p.text_from_external, scale, labels)
        case.close("loss_text2external", to_external, rtol=1e-5, atol=1e-5)
        case.close("acc_img2external", parts["accuracy_image_to_external"], rtol=1e-5, atol=1e-5)
        case.close("acc_text2external", parts["accuracy_text_to_external"], rtol=1e-5, atol=1e-5)
    else:
        assert case["acc_img2external"] == case["acc_text2external"] == 0


def inputs_of_rank(rank: int, case: dict) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Prototypes]:
    """One process's rows of the features, both temperatures, and the prototypes of all processes."""
    features = "image_features", "text_features", "image_projected", "text_projected"
    inputs = {key: leaf(case[key][rank]) for key in features}
    scales = {key: leaf(case[key]) for key in ("log_logit_scale", "log_logit_scale_proto")}
    names = "img_labels text_labels img_centroids text_centroids img_student text_student ext_labels img_student_ext"
    return inputs, scales, Prototypes(*(case[name] for name in [*names.split(), "text_student_ext"]))


def losses_of_rank(rank: int, case: dict[str, torch.Tensor], with_grad: bool) -> dict:
    """Loss of one process, given the inputs of the case, and the gradients of its own rows."""
    inputs, scales, prototypes = inputs_of_rank(rank, case)
    features = [gather(x, with_grad) for x in inputs.values()]
    output = ProtoCLIPOutput(*features, *(scale.exp() for scale in scales.values()))
    index = gather(case["index"][rank])
    losses = protoclip_loss(output, index, prototypes, (1, 1, 1), case["temp"].item())
    losses["loss"].backward()
    results = {key: x.grad for key, x in (inputs | scales).items()}
    results |= {"index": index, "losses": {key: loss.detach() for key, loss in losses.items()}}
    return results


@pytest.mark.golden("protoclip", "distributed_loss")
def test_distributed_loss(case, tmp_path):
    ranks = in_ranks(losses_of_rank, case["world_size"], tmp_path, case.group("in/"), bool(case["gather_with_grad"]))
    for rank in ranks:  # every rank computes the whole loss
        case.close("gathered_index", rank["index"])
        case.close("total_loss", rank["losses"]["loss"], rtol=1e-5, atol=1e-5)
        case.close("loss_clip", rank["losses"]["clip"], rtol=1e-5, atol=1e-5)
        pairs = torch.stack([rank["losses"]["proto"], rank["losses"]["external"]])
        torch.testing.assert_close(pairs, case["loss_proto"].view(2, 2).mean(1), rtol=1e-5, atol=1e-5)
    gradients = {key: torch.stack([rank[key] for rank in ranks]) for key in case.group("local_grad/")}
    case.close_group("local_grad/", gradients, rtol=1e-5, atol=1e-5)


def own_rows_of_rank(rank: int, case: dict[str, torch.Tensor], with_grad: bool) -> dict:
    """As `losses_of_rank`, but each process computes the loss of its own rows, as train.py does."""
    inputs, scales, prototypes = inputs_of_rank(rank, case)
    output = ProtoCLIPOutput(*inputs.values(), *(scale.exp() for scale in scales.values()))
    output = output if with_grad else divide_gradient(output, dist.get_world_size())
    losses = protoclip_loss(output, case["index"][rank], prototypes, (1, 1, 1), case["temp"].item(), gather)
    losses["loss"].backward()
    return {key: x.grad for key, x in (inputs | scales).items()}


# the losses and the order of samples are those of all processes' rows: test_distributed_loss compares them
@pytest.mark.golden("protoclip", "distributed_loss", unused=("total_loss", "loss_*", "gathered_index"))
def test_loss_of_own_samples_has_the_gradients_of_the_global_batch(case, tmp_path):
    """Features' gradients are upstream's; without gradient to other ranks' features, each passes on 1/W of its own.
    Averaged over ranks, as DDP does, the temperatures' gradients are upstream's, too."""
    with_grad = bool(case["gather_with_grad"])
    ranks = in_ranks(own_rows_of_rank, case["world_size"], tmp_path, case.group("in/"), with_grad)
    for key in case.group("local_grad/"):
        ours, theirs = torch.stack([rank[key] for rank in ranks]), torch.as_tensor(case[f"local_grad/{key}"])
        if key.startswith("log_"):
            ours, theirs = ours.mean(0), theirs.mean(0)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ golden: prototypes, teacher


# last_objective: the last entry of objective_log, of the last run instead of the best
@pytest.mark.golden("protoclip", "kmeans", unused=("last_objective",))
def test_kmeans(case):
    x = case["features"]
    labels, centroids = kmeans(x, case["k"], case["niter"], case["nredo"])
    case.close("labels", labels)
    case.close("centroids", centroids, atol=1e-5)
    assert (x - centroids[labels]).square().sum() <= 1.05 * case["sq_distances"].sum()
    # ours after the last iteration of the best run, theirs before
    assert kmeans_error(x, labels, centroids) * len(x) <= case["objective_log"].min() * (1 + 1e-5)


@pytest.mark.golden("protoclip", "generate_labels_nan")
def test_generate_labels_nan(case):
    k = case["k"]
    inputs = case["img_feature_in"], case["text_feature_in"]
    p = build_prototypes(*inputs, k, niter=case["niter"], nredo=case["nredo"])
    case.close("img_labels", p.image_labels)
    case.close("text_labels", p.text_labels)
    case.close("img_centroids", p.image, atol=1e-5)
    case.close("text_centroids", p.text, atol=1e-5)
    cleaned = prototypical_back_translation(case["img_feature"], case["text_labels"], k)
    torch.testing.assert_close(p.image_from_text, cleaned, rtol=0, atol=1e-5)
    cleaned = prototypical_back_translation(case["text_feature"], case["img_labels"], k)
    torch.testing.assert_close(p.text_from_image, cleaned, rtol=0, atol=1e-5)


@pytest.mark.golden("protoclip", "pbt")
def test_pbt(case):
    centroids = prototypical_back_translation(case["student_features"], case["teacher_labels"], case["k"])
    case.close("centroids", centroids, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- properties


def tiny_model(embed_dim: int = 8, hidden_dim: int = 12, projection_dim: int = 6, num_layers: int = 1) -> ProtoCLIP:
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    sizes = {"hidden_dim": hidden_dim, "projection_dim": projection_dim, "num_layers": num_layers}
    return ProtoCLIP(embed_dim, vision, text, **sizes)


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
    hard = prototypical_loss(features, students, scale, labels)
    gaps = [prototypical_loss(features, students, scale, labels, teachers, t) - hard for t in (1.0, 0.1, 1e-3)]
    assert abs(gaps[0]) > abs(gaps[1]) > abs(gaps[2])
    torch.testing.assert_close(gaps[2], torch.tensor(0.0), rtol=0, atol=1e-5)
    for temperature in (None, 0.0, -1.0):  # these ask for hard labels
        assert torch.equal(prototypical_loss(features, students, scale, labels, teachers, temperature), hard)


def test_soft_targets_need_teacher_prototypes():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="teacher_prototypes"):
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


def test_accuracy_among_equal_prototypes_is_that_of_the_logits():
    torch.manual_seed(0)
    features, prototypes, scale = F.normalize(torch.randn(500, 5)), F.normalize(torch.randn(3, 5)), torch.tensor(14.88)
    prototypes = prototypes.repeat(3, 1)
    labels = (scale * features @ prototypes.T).argmax(1)
    assert assignment_accuracy(features, prototypes, scale, labels) == 100


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
