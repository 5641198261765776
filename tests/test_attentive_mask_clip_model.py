"""A-CLIP against the numbers of the authors' code (tests/golden/attentive_mask_clip/README.md), and properties beyond.

One golden test per family; everything about a case is read from its file, tolerances are those of the README.
"""

import math
import multiprocessing
import re
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from authors_files import beside_weights
from conftest import Case, leaf
from scripts import in_ranks
from torch import nn

from attentive_mask_clip.model import (
    ACLIP,
    CLIP,
    SLIP,
    MaskedViT,
    SyncBatchNorm1d,
    accuracy,
    aclip_loss,
    attentive_keep_ids,
    baseline_loss,
    byol_loss,
    clip_loss,
    create_model,
    crop_scores,
    load_checkpoint,
    random_keep_ids,
    resize_pos_embed,
    simclr_loss,
)


@pytest.fixture(autouse=True)
def attention_as_in_training():
    """Disable the flash attention kernel on the CPU, like `shared.run.setup`."""
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(before)


# ------------------------------------------------------------------------------------------------------- from a case


def vit_sizes(state: dict[str, torch.Tensor], heads: int, images: torch.Tensor | None) -> dict:
    """Arguments of `MaskedViT`, read from the names and shapes of its weights, or from the images if these fit."""
    patch_size, patches = state["patch_embed.proj.weight"].shape[-1], state["pos_embed"].shape[1] - 1
    hidden, width = state["blocks.0.mlp.fc1.weight"].shape
    shape = (0, 0) if images is None else tuple(images.shape[-2:])
    fits = shape[0] // patch_size * (shape[1] // patch_size) == patches
    return {
        "image_size": shape if fits else patch_size * math.isqrt(patches),
        "patch_size": patch_size,
        "width": width,
        "depth": 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))),
        "heads": heads,
        "mlp_ratio": hidden / width,
    }


def vit_of(case: Case) -> MaskedViT:
    state = case.group("param/")
    vit = MaskedViT(**vit_sizes(state, case["num_heads"], case["image"]))
    assert vit.patch_embed.patch_size == (case["patch_size"], case["patch_size"])
    vit.load_state_dict(state)
    return vit


def model_of(case: Case, cls: type = ACLIP, prefix: str = "param/", **settings) -> ACLIP | SLIP:
    """The model with the weights under `prefix`; the number of heads does not matter if a case does not state it."""
    state = case.group(prefix)
    images = next((case[name] for name in ("image", "images", "views") if name in case), None)
    vit = vit_sizes({k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}, 1, images)
    assert vit["patch_size"] == case.get("patch_size", vit["patch_size"])
    model = cls(
        embed_dim=state["image_projection"].shape[1],
        image_size=vit["image_size"],
        patch_size=vit["patch_size"],
        vision_width=vit["width"],
        vision_layers=vit["depth"],
        vision_heads=case.get("num_heads", 1),
        context_length=len(state["positional_embedding"]),
        vocab_size=len(state["token_embedding.weight"]),
        text_width=state["token_embedding.weight"].shape[1],
        text_heads=case.get("text_heads", 1),
        text_layers=1 + max(int(m[1]) for key in state if (m := re.match(r"transformer\.resblocks\.(\d+)\.", key))),
        ssl_hidden=len(state["image_mlp.layer1.weight"]),
        ssl_dim=len(state["image_mlp.layer3.weight"]),
        **settings,
    )
    model.load_state_dict(state)
    return model


def kept(removed: torch.Tensor) -> torch.Tensor:
    """Mask (B, N), 1 = removed -> kept patches (B, K), ascending."""
    return (removed == 0).nonzero()[:, 1].view(len(removed), -1)


def views_of(boxes: torch.Tensor) -> range:
    """Indices of the online views, from 1; the boxes (B, V+1, 4) end with the EMA view's box."""
    return range(1, boxes.shape[1])


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


# ----------------------------------------------------------------------------------------------------- golden: towers


@pytest.mark.golden("attentive_mask_clip", "attention_scores")
def test_attention_scores(case):
    tokens, scores = vit_of(case).train()(case["image"], return_scores=True)
    case.close("tokens", tokens, atol=1e-5)
    case.close("scores", scores, atol=1e-6)
    torch.testing.assert_close(scores, case["cls_row_attn"][..., 1:].mean((0, 2)), rtol=0, atol=1e-6)
    assert not scores.requires_grad


@pytest.mark.golden("attentive_mask_clip", "masked_vit")
def test_masked_vit(case):
    vit, images, keep_ids = vit_of(case).train(), leaf(case["image"]), kept(case["removed"])
    case.close("kept_ids_sorted", keep_ids)
    tokens, scores = vit(images, keep_ids)
    case.close("cls_out", tokens[:, 0], rtol=1e-5, atol=2e-5)
    case.close("patch_out_sorted", tokens[:, 1:], rtol=1e-5, atol=2e-5)
    assert scores is None
    loss = (tokens[:, 0] * case["cotangent_cls"]).sum()
    loss.backward()
    case.close("loss", loss, rtol=1e-5, atol=2e-5)
    case.close("grad_image", images.grad, rtol=1e-5, atol=2e-5)
    case.close_group("grad/", gradients(vit), rtol=1e-5, atol=2e-5)
    assert gradients(vit).keys() == case.group("grad/").keys()  # none for the frozen patch projection
    with torch.no_grad():
        tokens, _ = vit.eval()(images, keep_ids)
    case.close("eval_cls_out_unmasked", tokens[:, 0], rtol=1e-5, atol=2e-5)
    case.close("eval_num_tokens", tokens.shape[1])


@pytest.mark.golden("attentive_mask_clip", "pos_embed_resize")
def test_pos_embed_resize(case):
    resized = resize_pos_embed(case["pos_embed"], case["grid_out"], case["grid_out"])
    case.close("pos_embed_resized", resized, atol=1e-6)
    # and that a tower uses it on images of that grid
    _, tokens, width = case["pos_embed"].shape
    assert tokens == 1 + case["grid_in"] ** 2
    vit = MaskedViT(2 * case["grid_in"], 2, width, depth=1, heads=1)
    other = MaskedViT(2 * case["grid_out"], 2, width, depth=1, heads=1)
    vit.pos_embed.data = case["pos_embed"]
    other.load_state_dict(vit.state_dict() | {"pos_embed": case["pos_embed_resized"]})
    images = torch.randn(2, 3, 2 * case["grid_out"], 2 * case["grid_out"])
    torch.testing.assert_close(vit(images)[0], other(images)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.golden("attentive_mask_clip", "encode")
def test_encode(case):
    model = model_of(case).eval()
    with torch.no_grad():
        case.close("image_embed", model.encode_image(case["image"]), atol=1e-5)
        case.close("image_embed_ema", model.encode_image(case["image"], ema=True), atol=1e-5)
        case.close("text_embed", model.encode_text(case["text"]), atol=1e-5)
        case.close("text_embed_ema", model.encode_text(case["text"], ema=True), atol=1e-5)


@pytest.mark.golden("attentive_mask_clip", "ema_update")
def test_ema_update(case):
    model, step = model_of(case, prefix="before/"), 0
    while f"momentum_{step}" in case:
        model.update_ema(case[f"momentum_{step}"])
        state = model.state_dict()
        case.close_group(f"after_{step}/", state, atol=1e-6)
        for name, before in case.group("before/").items():
            assert f"after_{step}/{name}" in case or torch.equal(state[name], before), name
        step += 1
    assert step


# ------------------------------------------------------------------------------------------- golden: token selection


@pytest.mark.golden("attentive_mask_clip", "crop_attention")
def test_crop_attention(case):
    boxes = case["boxes"]
    for v in views_of(boxes):
        grid = math.isqrt(case[f"scores_view{v}"].shape[1])
        case.close(f"scores_view{v}", crop_scores(case["scores"], boxes[:, v - 1], boxes[:, -1], grid), atol=1e-6)


@pytest.mark.golden("attentive_mask_clip", "select_tokens")
def test_select_tokens(case):
    scores, blocks = case["scores"], case["block_scores"]
    side, block = math.isqrt(blocks.shape[1]), math.isqrt(scores.shape[1] // blocks.shape[1])

    def scores_of(ids: torch.Tensor) -> torch.Tensor:
        """The scores of the patches' blocks, in ascending order."""
        row, column = (x // block for x in (ids // (side * block), ids % (side * block)))
        return blocks.gather(1, row * side + column).sort(dim=1).values

    for name, removed in case.group("removed_ratio_").items():
        keep_ids, expected = attentive_keep_ids(scores, float(name), block), kept(removed)
        assert keep_ids.shape == expected.shape and torch.equal(keep_ids, keep_ids.sort(dim=1).values)
        assert torch.equal(scores_of(keep_ids), scores_of(expected)), name  # of blocks that tie, theirs keeps any
        count = expected.shape[1] // block**2
        ranked = blocks.sort(dim=1, descending=True).values
        clear = ranked[:, count - 1] > ranked[:, count] if count < ranked.shape[1] else torch.ones(len(ranked)) > 0
        assert torch.equal(keep_ids[clear], expected[clear]), name
    for count in range(1, blocks.shape[1] + 1):  # the blocks that each number of blocks keeps are the first ones
        ours = scores_of(attentive_keep_ids(scores, (count - 0.5) / blocks.shape[1], block))[:, :: block**2]
        assert torch.equal(ours.flip(1), blocks.gather(1, case["block_order"][:, :count])), count


@pytest.mark.golden("attentive_mask_clip", "random_masking")
def test_random_masking(case):
    x, noise, ratio = case["x"], case["noise"], case["mask_ratio"]
    keep_ratio = case["x_kept"].shape[1] / noise.shape[1]
    assert abs(1 - ratio - keep_ratio) < 1 / noise.shape[1] + 1e-6  # a float32 in the file, too coarse for `int` of it
    keep_ids = random_keep_ids(noise, keep_ratio + 1e-9)
    case.close("x_kept", x.gather(1, keep_ids[..., None].expand(-1, -1, x.shape[2])))
    case.close("removed", torch.ones_like(noise).scatter(1, keep_ids, 0))
    order = torch.arange(keep_ids.shape[1]).expand_as(keep_ids)
    assert torch.equal(case["ids_restore"].gather(1, keep_ids), order)


# ----------------------------------------------------------------------------------------------------- golden: losses


@pytest.mark.golden("attentive_mask_clip", "losses")
def test_losses(case):
    tolerance = dict(rtol=1e-5, atol=1e-5)

    def differentiated(function: Callable) -> tuple:
        inputs = {key: leaf(value) for key, value in case.group("in/").items()}
        value = function(inputs)
        (value["loss"] if isinstance(value, dict) else value).backward()
        return value, {key: torch.zeros_like(x) if x.grad is None else x.grad for key, x in inputs.items()}

    for pairing, pair in (("released", "same"), ("twoview", "cross")):
        losses, grads = differentiated(lambda outputs, pair=pair: aclip_loss(outputs, simclr_pair=pair))
        for name in case.group(f"{pairing}/").keys() - {"ssl_acc"}:  # which nobody logs
            case.close(f"{pairing}/{name}", losses[name], **tolerance)
        case.close_group(f"{pairing}_grad/", grads, **tolerance)

    B = len(case["in/text_embed"])
    for name, second in (("simclr_only_grad/", slice(B, None)), ("simclr_same_view_grad/", slice(B))):
        _, grads = differentiated(
            lambda x, second=second: simclr_loss(x["image_ssl_embed"][:B], x["image_ssl_embed"][second])
        )
        case.close_group(name, grads, **tolerance)
    views = len(case["in/image_embed"]) // B
    # SimSiam's form of BYOL's loss is the negative cosine
    byol, grads = differentiated(
        lambda x: byol_loss(x["byol_feats"], x["byol_feats_e"].detach().repeat(views, 1)) / 2 - 1
    )
    case.close("simsiam_loss", byol, **tolerance)
    case.close_group("simsiam_grad/", grads, **tolerance)
    for v, view in enumerate(case["in/image_embed"].split(B), 1):
        loss = clip_loss(view, case["in/text_embed"], torch.as_tensor(case["in/logit_scale"]))
        case.close(f"released/contra_loss_{v}", loss, **tolerance)
    case.close("released/clip_acc", accuracy(view, case["in/text_embed"]), **tolerance)


def losses_of_rank(rank: int, path) -> dict[str, torch.Tensor]:
    case, results = Case(path), {}
    for name in ("released", "simclr_twoview"):
        inputs = {key: leaf(value) for key, value in case.group(f"rank{rank}/in/").items()}
        if name == "released":
            losses = aclip_loss(inputs, simclr_pair="same")
            results |= {f"released/{key}": value.detach() for key, value in losses.items()}
            losses["loss"].backward()
        else:
            first, second = inputs["image_ssl_embed"].split(len(inputs["text_embed"]))
            loss = simclr_loss(first, second)
            results["simclr_twoview"] = loss.detach()
            loss.backward()
        results |= {f"{name}_grad/{key}": x.grad for key, x in inputs.items() if x.grad is not None}
    return results


@pytest.mark.golden("attentive_mask_clip", "losses_distributed")
def test_losses_distributed(case, tmp_path):
    tolerance, world_size = dict(rtol=1e-5, atol=1e-5), case["world_size"]
    ranks = in_ranks(losses_of_rank, world_size, tmp_path, case.path)
    for rank, results in enumerate(ranks):
        for name in case.keys():
            part = name.removeprefix(f"rank{rank}/")
            if part != name and not part.startswith("in/"):
                result = results[part if part in results else f"{part}/image_ssl_embed"]
                case.close(name, result, **tolerance)
    # One process with all samples: the mean over ranks is its loss, the gradients are 1/world_size of theirs
    inputs = {}
    for name in case.group("rank0/in/"):
        parts = [torch.as_tensor(case[f"rank{rank}/in/{name}"]) for rank in range(world_size)]
        views = len(parts[0]) // len(case["rank0/in/text_embed"]) if parts[0].ndim else 0
        inputs[name] = leaf(torch.cat([x.chunk(views)[v] for v in range(views) for x in parts]) if views else parts[0])
    losses = aclip_loss(inputs, simclr_pair="same")
    losses["loss"].backward()
    for name, loss in losses.items():
        mean = torch.stack([results[f"released/{name}"] for results in ranks]).mean()
        torch.testing.assert_close(mean, loss.detach(), **tolerance)
    for name, x in inputs.items():
        parts = [results[f"released_grad/{name}"] for results in ranks]
        views = len(parts[0]) // len(case["rank0/in/text_embed"]) if x.ndim else 0
        whole = torch.cat([p.chunk(views)[v] for v in range(views) for p in parts]) if views else sum(parts)
        torch.testing.assert_close(whole / world_size, x.grad, **tolerance)


# ------------------------------------------------------------------------------------------- golden: whole forward pass


def check_forward(case: Case, mask: str) -> None:
    boxes, momentum = case["boxes"], case["momentum"]
    model = model_of(case, mask=mask).train()
    seen = {}

    def keep_ids(scores, boxes, noise):
        """Check the selection, then return the authors' selection for the later steps."""
        seen["scores"] = scores
        grid = math.isqrt(noise.shape[1])
        of_views = [crop_scores(seen["scores"], boxes[:, v - 1], boxes[:, -1], grid) for v in views_of(boxes)]
        for v, of_view in enumerate(of_views, 1):
            case.close(f"view{v}_scores", of_view, atol=1e-6)
        theirs = torch.cat([kept(case[f"view{v}_removed"]) for v in views_of(boxes)])
        ours = ACLIP.keep_ids(model, seen["scores"], boxes, noise)
        if mask == "none":
            assert ours is None
            theirs, ours = None, attentive_keep_ids(torch.cat(of_views))
        if case["selection_margin"].min() > 1e-5:
            assert torch.equal(ours, torch.cat([kept(case[f"view{v}_removed"]) for v in views_of(boxes)]))
        return theirs

    def forward() -> dict[str, torch.Tensor]:
        return model(case["views"], case["ema_view"], case["text"], boxes)

    model.update_ema(momentum)
    with torch.no_grad():
        _, scores = model.visual_ema(case["ema_view"], return_scores=True)
    case.close("ema_scores", scores, atol=1e-6)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if mask == "none":  # then the scores are not needed
        keep_ids(scores, boxes, torch.zeros(len(case["views"]), case["view1_removed"].shape[1]))
    else:
        model.keep_ids = keep_ids
    outputs = forward()
    case.close_group("out/", outputs, atol=2e-5)
    losses = aclip_loss(outputs, simclr_pair="same")
    case.close_group("loss/", losses, atol=2e-5)
    case.close_group("after/", model.state_dict(), atol=2e-5)
    losses["loss"].backward()
    case.close_group("grad/", gradients(model), rtol=1e-4, atol=1e-4)
    assert gradients(model).keys() == case.group("grad/").keys()

    # and as training does it, undisturbed (unless blocks tie) and with the pair of two views
    if case["selection_margin"].min() > 1e-5:
        vars(model).pop("keep_ids", None)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    losses = aclip_loss(forward(), simclr_pair="cross")
    case.close_group("loss_twoview/", losses, atol=2e-5)


@pytest.mark.golden("attentive_mask_clip", "full_forward")
def test_full_forward(case):
    check_forward(case, "attentive")


@pytest.mark.golden("attentive_mask_clip", "full_forward_unmasked")
def test_full_forward_unmasked(case):
    check_forward(case, "none")


# loss/ssl_acc: an accuracy that nobody logs
@pytest.mark.golden("attentive_mask_clip", "slip_full_forward", unused=("loss/ssl_acc",))
def test_slip_full_forward(case):
    model = model_of(case, SLIP).train()
    outputs = model(case["image"], case["text"], case["aug1"], case["aug2"])
    case.close_group("out/", outputs, atol=2e-5)
    losses = baseline_loss(outputs)
    for name in [name for name in case if name.startswith("loss/") and name != "loss/ssl_acc"]:
        case.close(name, losses[name.removeprefix("loss/")], atol=2e-5)
    losses["loss"].backward()
    case.close_group("grad/", gradients(model), rtol=1e-4, atol=1e-4)
    assert gradients(model).keys() == case.group("grad/").keys()  # the patch projection is trained


# ----------------------------------------------------------------------------------------------- properties: selection


def boxes_in(height: int, width: int, count: int) -> torch.Tensor:
    """Random boxes (count, 4)."""
    tops, lefts = torch.randint(0, height - 1, (count,)), torch.randint(0, width - 1, (count,))
    heights = [int(torch.randint(1, height - top + 1, ())) for top in tops.tolist()]
    widths = [int(torch.randint(1, width - left + 1, ())) for left in lefts.tolist()]
    return torch.stack([tops, lefts, torch.tensor(heights), torch.tensor(widths)], dim=1)


def test_close_blocks_are_ordered_as_upstreams_resize_rounds_them():
    torch.manual_seed(0)
    scores = 1 + 1e-6 * torch.rand(200, 196)  # so that a rounding decides
    blocks = F.interpolate(scores.view(-1, 1, 14, 14), (7, 7), mode="bilinear").flatten(1)
    keep_ids = attentive_keep_ids(scores)
    ours = blocks.gather(1, (keep_ids // 28 * 7 + keep_ids % 14 // 2)).sort(dim=1).values[:, ::4]
    assert torch.equal(ours, blocks.sort(dim=1).values[:, -25:])


@pytest.mark.parametrize("n, grid", [(14, 14), (7, 14), (8, 8), (4, 6), (1, 2), (5, 3)])
@pytest.mark.parametrize("size", [(375, 500), (40, 40), (9, 5)])
def test_crop_scores_equal_a_loop_over_images(n, grid, size):
    torch.manual_seed(n + grid)
    scores, boxes, ref_boxes = torch.rand(30, n * n), boxes_in(*size, 30), boxes_in(*size, 30)
    ref_boxes[0] = torch.tensor([0, 0, *size])  # all of the image, and a box beside it
    boxes[1], ref_boxes[1] = torch.tensor([[0, 0, 2, 2], [size[0] - 2, size[1] - 2, 2, 2]])

    def reference(score, box, ref):
        top, left, height, width = (box - torch.cat([ref[:2], torch.zeros(2, dtype=torch.long)])).tolist()
        resize = dict(mode="bilinear", align_corners=False)
        large = F.interpolate(score.view(1, 1, n, n), ref[2:].tolist(), **resize)
        bottom, right = top + height - large.shape[2], left + width - large.shape[3]
        padded = F.pad(large, (max(-left, 0), max(right, 0), max(-top, 0), max(bottom, 0)))
        cut = padded[:, :, max(top, 0) :, max(left, 0) :][:, :, :height, :width]
        return F.interpolate(cut, (grid, grid), **resize).flatten()

    expected = torch.stack([reference(*item) for item in zip(scores, boxes, ref_boxes, strict=True)])
    torch.testing.assert_close(crop_scores(scores, boxes, ref_boxes, grid), expected, rtol=0, atol=1e-6)


def test_a_view_equal_to_the_ema_view_keeps_its_scores():
    scores, box = torch.rand(3, 36), torch.tensor([[3, 5, 60, 90]]).expand(3, 4)
    torch.testing.assert_close(crop_scores(scores, box, box, 6), scores, rtol=0, atol=0.05)  # twice resampled
    exact = torch.tensor([[3, 5, 6, 6]]).expand(3, 4)
    torch.testing.assert_close(crop_scores(scores, exact, exact, 6), scores)
    outside = torch.tensor([[100, 5, 60, 90]]).expand(3, 4)
    assert not crop_scores(scores, outside, box, 6).any()


@pytest.mark.parametrize("grid, block", [(14, 2), (8, 2), (8, 4), (9, 3), (6, 1)])
@pytest.mark.parametrize("keep_ratio", [0.0, 0.3, 0.5, 1.0])
def test_whole_blocks_of_extreme_scores_are_kept(grid, block, keep_ratio):
    torch.manual_seed(0)
    scores, blocks = torch.rand(5, grid * grid), (grid // block) ** 2
    count = min(int(blocks * keep_ratio) + 1, blocks)
    means = F.avg_pool2d(scores.view(5, 1, grid, grid), block).flatten(1)
    for drop, largest in (("low", True), ("high", False)):
        keep_ids = attentive_keep_ids(scores, keep_ratio, block, drop)
        mask = torch.zeros(5, grid * grid).scatter(1, keep_ids, 1).view(5, 1, grid, grid)
        chosen = F.avg_pool2d(mask, block).flatten(1)
        assert keep_ids.shape == (5, count * block**2) and set(chosen.unique().tolist()) <= {0.0, 1.0}
        expected = torch.zeros_like(chosen).scatter(1, means.topk(count, largest=largest).indices, 1)
        assert torch.equal(chosen, expected)


def test_ties_are_broken_the_same_way_every_time():
    scores = torch.zeros(2, 16)
    assert attentive_keep_ids(scores).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13]] * 2
    assert torch.equal(attentive_keep_ids(scores, drop="high"), attentive_keep_ids(scores))


@pytest.mark.parametrize("patches, block", [(15, 2), (25, 2), (16, 3)])
def test_a_grid_that_blocks_do_not_tile_is_refused(patches, block):
    with pytest.raises(ValueError, match=f"{patches} patches .*{block} x {block}"):
        attentive_keep_ids(torch.rand(1, patches), block=block)


def test_random_masks_keep_any_patch_alike():
    torch.manual_seed(0)
    keep_ids = random_keep_ids(torch.rand(4000, 16), 0.5)
    assert keep_ids.shape == (4000, 8) and all(len(set(row)) == 8 for row in keep_ids[:50].tolist())
    share = keep_ids.flatten().bincount(minlength=16) / 4000
    assert (share - 0.5).abs().max() < 0.05


# --------------------------------------------------------------------------------------------------- properties: model

TINY = dict(
    embed_dim=12, image_size=16, patch_size=4, vision_width=16, vision_layers=2, vision_heads=2, context_length=6,
    vocab_size=30, text_width=16, text_heads=2, text_layers=1,
)  # fmt: skip


def tiny(method: str = "aclip", **settings) -> ACLIP | SLIP | CLIP:
    torch.manual_seed(0)
    ssl = {} if method == "clip" else dict(ssl_hidden=10, ssl_dim=8)
    return {"aclip": ACLIP, "slip": SLIP, "clip": CLIP}[method](**{**TINY, **ssl, **settings})


def batch(B: int = 3, views: int = 2, side: int = 16, ema_side: int = 16) -> tuple[torch.Tensor, ...]:
    """views (V*B, 3, H, W), EMA view, tokens, boxes (B, V+1, 4); the EMA view is the whole 40 x 30 image."""
    torch.manual_seed(1)
    boxes = torch.stack([*(boxes_in(40, 30, B) for _ in range(views)), torch.tensor([[0, 0, 40, 30]]).expand(B, 4)])
    images, ema_view = torch.randn(views * B, 3, side, side), torch.randn(B, 3, ema_side, ema_side)
    return images, ema_view, torch.randint(1, 30, (B, 6)), boxes.transpose(0, 1)


@pytest.mark.parametrize("mask", ["attentive", "high", "random", "none"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("ssl", [True, False])
def test_masks_drop_tokens_in_training_only(mask, views, ssl):
    model, counts, ema_counts = tiny(mask=mask, ssl=ssl), [], []
    for tower, seen in ((model.visual, counts), (model.visual_ema, ema_counts)):
        tower.blocks[0].norm1.register_forward_hook(lambda m, inputs, output, seen=seen: seen.append(output.shape[1]))
    inputs = batch(views=views)
    outputs = model.train()(*inputs)
    losses = aclip_loss(outputs)
    losses["loss"].backward()
    assert outputs["image_embed"].shape == (3 * views, 12) and ("byol_feats" in outputs) == ssl
    assert [f"contra_loss_{v}" in losses for v in (1, 2, 3)] == [v <= views for v in (1, 2, 3)]
    assert (losses["simclr_loss"] != 0) == (ssl and views > 1) and (losses["im_byol_loss"] != 0) == ssl
    model.eval()(*inputs)
    model.encode_image(inputs[0])
    model.encode_image(inputs[0], torch.zeros(3 * views, 2, dtype=torch.long))
    kept_tokens = {"attentive": 13, "high": 13, "random": 9, "none": 17}[mask]  # 3 of 4 blocks, or 8 of 16 patches
    assert counts == [kept_tokens, 17, 17, 17]
    assert all(count == 17 for count in ema_counts)


def test_high_drops_what_attentive_keeps():
    scores, noise, boxes = torch.rand(3, 64), torch.rand(6, 64), batch()[3]
    low, high = (tiny(mask=mask, keep_ratio=0.4).keep_ids(scores, boxes, noise) for mask in ("attentive", "high"))
    of_views = torch.cat([crop_scores(scores, boxes[:, v], boxes[:, 2], 8) for v in range(2)])
    assert (of_views.gather(1, low).mean(1) >= of_views.gather(1, high).mean(1)).all()
    assert torch.equal(low, attentive_keep_ids(of_views, 0.4))
    assert torch.equal(high, attentive_keep_ids(-of_views, 0.4))


def test_gradients_reach_what_is_trained_and_nothing_else():
    model = tiny()
    aclip_loss(model(*batch()))["loss"].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert trained | frozen == {name for name, _ in model.named_parameters()} and not trained & frozen
    ema = ("visual_ema.", "transformer_e.", "im_proj_byol_e.", "image_projection_e", "text_projection_e")
    assert frozen == {name for name in frozen if name.startswith(ema) or "patch_embed.proj" in name}
    assert all(parameter.requires_grad for parameter in tiny(freeze_patch_proj=False).visual.parameters())
    assert all(parameter.requires_grad for parameter in tiny("clip").parameters())
    assert all(parameter.requires_grad for parameter in tiny("slip").parameters())


def test_the_target_of_byol_has_no_gradient():
    outputs = tiny()(*batch())
    assert not outputs["byol_feats_e"].requires_grad and outputs["byol_feats"].requires_grad


def test_ema_starts_equal_and_follows():
    model = tiny()
    pairs = model._pairs()
    assert all(torch.equal(ema, online) and ema is not online for ema, online in pairs)
    before = [ema.clone() for ema, _ in pairs]
    with torch.no_grad():
        for _, online in pairs:
            online += torch.randn_like(online)
    model.update_ema(1.0)
    assert all(torch.equal(ema, old) for (ema, _), old in zip(pairs, before, strict=True))
    model.update_ema(0.0)
    assert all(torch.equal(ema, online) for ema, online in pairs)
    shared = {"token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias", "logit_scale"}
    online = {id(x) for _, x in pairs}
    left = {name for name, x in model.named_parameters() if x.requires_grad and id(x) not in online}
    assert left == shared | {n for n, _ in model.named_parameters() if n.startswith(("image_mlp.", "im_pred_byol."))}


def test_half_size_ema_view():
    """A-CLIP-eff: the EMA tower reads a smaller image with resized position embeddings."""
    model, inputs = tiny(image_size=32), batch(side=32, ema_side=16)
    seen = []
    model.keep_ids = lambda *args: seen.append(ACLIP.keep_ids(model, *args)) or seen[-1]
    scores = []
    model.visual_ema.register_forward_hook(lambda module, inputs, output: scores.append(output[1]))
    outputs = model(*inputs)
    assert scores[0].shape == (3, 16) and seen[0].shape == (6, 36) and outputs["byol_feats_e"].shape == (3, 8)


def test_images_of_another_size_and_shape():
    with pytest.raises(ValueError, match="patches of 4 pixels"):
        MaskedViT((16, 18), 4, 16, 1, 2)
    wide = MaskedViT((16, 24), 4, 16, 1, 2)
    assert wide(torch.randn(2, 3, 16, 24))[0].shape == (2, 25, 16)
    vit = MaskedViT(16, 4, 16, 1, 2)
    for height, width in ((16, 16), (8, 8), (24, 24), (8, 20)):
        tokens, scores = vit(torch.randn(2, 3, height, width), return_scores=True)
        assert tokens.shape == (2, 1 + height * width // 16, 16) and scores.shape == (2, height * width // 16)
        assert torch.equal(resize_pos_embed(vit.pos_embed, 4, 4), vit.pos_embed)


def test_scores_do_not_change_the_tokens():
    vit, images = MaskedViT(16, 4, 16, 3, 2).eval(), torch.randn(2, 3, 16, 16)
    tokens, scores = vit(images, return_scores=True)
    torch.testing.assert_close(tokens, vit(images)[0], rtol=1e-5, atol=1e-6)
    assert (scores > 0).all() and (scores.sum(1) < 1).all()  # of a softmax, less the [CLS] column


@pytest.mark.parametrize("masked", [True, False])
def test_cls_alone_is_the_same(masked):
    torch.manual_seed(0)
    vit, images, cotangent = MaskedViT(16, 4, 16, 3, 2), leaf(torch.randn(2, 3, 16, 16)), torch.randn(2, 16)
    keep_ids, results = torch.arange(16).view(2, 8) if masked else None, []
    for cls_only in (True, False):
        tokens, scores = vit(images, keep_ids, return_scores=True, cls_only=cls_only)
        assert tokens.shape[1] == (1 if cls_only else 9 if masked else 17)
        vit.zero_grad()
        (tokens[:, 0] * cotangent).sum().backward()
        results.append([tokens[:, 0], scores, images.grad, *gradients(vit).values()])
        images.grad = None
    for alone, among_all in zip(*results, strict=True):
        torch.testing.assert_close(alone, among_all, rtol=1e-4, atol=1e-5)


def test_padding_of_texts_can_be_left_out():
    model, tokens = tiny().eval(), torch.tensor([[28, 5, 29, 0, 0, 0], [28, 29, 0, 0, 0, 0]])
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(tokens[:, :3]))


def test_bf16_autocast_keeps_scores_and_losses_in_fp32():
    model, inputs = tiny(), batch()
    _, exact = model.visual_ema(inputs[1], return_scores=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, scores = model.visual_ema(inputs[1], return_scores=True)
        of_view = crop_scores(scores, inputs[3][:, 0], inputs[3][:, 2], 4)
        outputs = model(*inputs)
    losses = aclip_loss(outputs)
    assert scores.dtype == of_view.dtype == torch.float32 and scores.unique().numel() > 16  # not rounded to bf16
    torch.testing.assert_close(scores, exact, rtol=0.02, atol=1e-3)
    expected = crop_scores(scores, inputs[3][:, 0], inputs[3][:, 2], 4)
    assert torch.equal(of_view, expected)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    losses["loss"].backward()


def test_logit_scale_is_clamped():
    model = tiny("clip")
    for value, clamped in ((9.0, 4.6052), (-1.0, 0.0), (1.5, 1.5)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        torch.testing.assert_close(model.logit_scale.item(), clamped)


@pytest.mark.parametrize(
    "preset, timm_name", [("vit_s16", "vit_small"), ("vit_b16", "vit_base"), ("vit_l16", "vit_large")]
)
def test_towers_have_the_shape_of_timms(preset, timm_name):
    with torch.device("meta"):
        ours = create_model("clip", preset)
        theirs = timm.create_model(f"{timm_name}_patch16_224", num_classes=0)
    shapes = {name: value.shape for name, value in ours.visual.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


def test_visual_loads_into_timm_and_gives_the_same():
    vit = MaskedViT(32, 8, 24, 2, 3).eval()
    theirs = timm.models.VisionTransformer(32, 8, embed_dim=24, depth=2, num_heads=3, num_classes=0).eval()
    theirs.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(images)[0], theirs.forward_features(images))


def test_initialisation():
    torch.manual_seed(0)
    model = create_model("aclip", "emoji")
    expected = {"visual.cls_token": 0.02, "visual.pos_embed": 0.02, "visual.blocks.1.attn.qkv.weight": 0.02,
                "visual.blocks.2.mlp.fc2.weight": 0.02, "token_embedding.weight": 0.02, "positional_embedding": 0.01,
                "transformer.resblocks.0.attn.in_proj_weight": 128**-0.5, "image_projection": 128**-0.5,
                "transformer.resblocks.1.mlp.c_fc.weight": 256**-0.5, "text_projection": 128**-0.5,
                "transformer.resblocks.0.mlp.c_proj.weight": 128**-0.5 * 4**-0.5,
                "transformer.resblocks.0.attn.out_proj.weight": 128**-0.5 * 4**-0.5}  # fmt: skip
    state = model.state_dict()
    for name, std in expected.items():
        assert 0.8 * std < state[name].std() < 1.2 * std, name
    assert not any(value.any() for name, value in state.items() if name.startswith("visual.blocks") and ".bias" in name
                   and "norm" not in name)  # fmt: skip
    torch.testing.assert_close(model.logit_scale.item(), math.log(1 / 0.07))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'low'"):
        tiny(mask="low")
    with pytest.raises(ValueError, match="'vit_b32'"):
        create_model("aclip", "vit_b32")
    with pytest.raises(ValueError, match="patches of 5 pixels"):
        tiny(patch_size=5)


# ---------------------------------------------------------------------------------- properties: several processes


def batch_norm_of_rank(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x, weights = torch.randn(12, 5) * 3 + 1, torch.randn(12, 5)
    layer = SyncBatchNorm1d(5)
    nn.init.normal_(layer.weight)
    x = leaf(x.chunk(world_size)[rank])
    y = layer(x)
    (y * weights.chunk(world_size)[rank]).sum().backward()
    buffers = {name: value for name, value in layer.state_dict().items() if name not in ("weight", "bias")}
    return {"y": y.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad} | buffers


@pytest.mark.parametrize("world_size", [2, 3])
def test_batch_norm_of_processes_equals_that_of_one(world_size, tmp_path):
    one = batch_norm_of_rank(0, 1)
    ranks = in_ranks(batch_norm_of_rank, world_size, tmp_path, world_size)
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), one[name], rtol=1e-5, atol=1e-5)
    for name in ("weight", "bias"):
        torch.testing.assert_close(sum(rank[name] for rank in ranks), one[name], rtol=1e-5, atol=1e-5)
    for rank in ranks:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(rank[name], one[name], rtol=1e-5, atol=1e-6)


def test_batch_norm_of_one_process_is_torchs():
    x, ours, theirs = torch.randn(8, 5), SyncBatchNorm1d(5), nn.BatchNorm1d(5)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.running_var, theirs.running_var)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


# ------------------------------------------------------------------------------------------ properties: checkpoints


def authors_file(model: CLIP, path, prefix: str = "module.") -> None:
    """A checkpoint in the format of upstream's main.py."""
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save(beside_weights(state_dict=state, best_acc=43.9), path)


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("source, target", [("aclip", "aclip"), ("slip", "slip"), ("slip", "clip"), ("clip", "clip")])
def test_authors_checkpoints_load(tmp_path, prefix, source, target):
    theirs, ours = tiny(source), tiny(target)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    authors_file(theirs, tmp_path / "checkpoint_best.pt", prefix)
    load_checkpoint(ours, tmp_path / "checkpoint_best.pt")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    load_checkpoint(ours, str(tmp_path / "checkpoint_best.pt"))
    load_checkpoint(ours, theirs.state_dict())  # and plain weights


# *: only the weights are of interest; test_encode compares the rest
@pytest.mark.golden("attentive_mask_clip", "encode", unused=("*",))
def test_the_names_of_weights_are_upstreams(case):
    model = model_of(case)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in case.group("param/").items()}


def test_wrong_weights_are_refused_in_one_sentence(tmp_path):
    authors_file(tiny("clip", embed_dim=10), tmp_path / "other.pt")
    (tmp_path / "none.pt").write_bytes(b"no checkpoint")
    torch.save({"state_dict": {}, "run": multiprocessing.Value}, tmp_path / "code.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"state_dict": torch.zeros(3)}, tmp_path / "nested.pt")
    for name, message in {
        "other.pt": "does not hold the weights",
        "none.pt": "none.pt is not a checkpoint",
        "code.pt": "code.pt is not a checkpoint",
        "tensor.pt": "tensor.pt holds no weights",
        "nested.pt": "nested.pt holds no weights",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            load_checkpoint(tiny("clip"), tmp_path / name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_checkpoint(tiny("clip"), tmp_path / "absent.pt")
