"""A-CLIP's model and losses. tests/adapters/attentive_mask_clip.py compares them with the authors' numbers."""

import math
import multiprocessing

import pytest
import timm
import torch
import torch.nn.functional as F
from attentive_mask_clip_runs import attention_as_in_training, batch, boxes_in, tiny  # noqa: F401
from authors_files import beside_weights
from conftest import leaf
from scripts import in_ranks
from torch import nn

from attentive_mask_clip.model import (
    ACLIP,
    CLIP,
    MaskedViT,
    SyncBatchNorm1d,
    aclip_loss,
    attentive_keep_ids,
    create_model,
    crop_scores,
    load_checkpoint,
    random_keep_ids,
    resize_pos_embed,
)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


# ----------------------------------------------------------------------------------------------- properties: selection


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


def test_a_tower_resizes_position_embeddings_to_the_grid_of_the_images():
    vit, other = MaskedViT(16, 4, 16, 1, 2), MaskedViT((8, 24), 4, 16, 1, 2)
    other.load_state_dict(vit.state_dict() | {"pos_embed": resize_pos_embed(vit.pos_embed, 2, 6)})
    images = torch.randn(2, 3, 8, 24)
    torch.testing.assert_close(vit(images)[0], other(images)[0], rtol=1e-5, atol=1e-5)


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


def losses_of_rank(rank: int, world_size: int, samples: int = 6) -> dict[str, torch.Tensor]:
    """Losses of A-CLIP, and their gradients, of one process's samples."""
    torch.manual_seed(0)
    views = {"image_embed": 2, "text_embed": 1, "image_ssl_embed": 2, "byol_feats": 2, "byol_feats_e": 1}
    x = {name: torch.randn(count, samples, 8).chunk(world_size, 1)[rank] for name, count in views.items()}
    x = {name: leaf(value.flatten(0, 1)) for name, value in x.items()} | {"logit_scale": leaf(torch.tensor(14.3))}
    losses = aclip_loss(x)
    losses["loss"].backward()
    grads = {name: value.grad.view(views.get(name, 1), -1) for name, value in x.items()}
    return {name: value.detach() for name, value in losses.items()} | {f"grad/{name}": g for name, g in grads.items()}


def test_losses_of_two_processes_equal_those_of_one(tmp_path):
    """The mean over processes is the loss of all samples; gradients are twice its gradients, which DDP averages."""
    one, ranks = losses_of_rank(0, 1), in_ranks(losses_of_rank, 2, tmp_path, 2)
    for name, expected in one.items():
        mean = torch.stack([rank[name] for rank in ranks]).mean(0)
        if name.startswith("grad/") and name != "grad/logit_scale":
            mean = torch.cat([rank[name] for rank in ranks], 1) / 2
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5, msg=name)


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
