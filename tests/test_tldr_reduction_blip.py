"""BLIP's towers, queue and shared parameters; two processes against one."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scripts import in_ranks
from tldr_reduction_runs import tiny_blip

from shared.clip import set_grad_checkpointing
from tldr_reduction import blip
from tldr_reduction.blip import (
    BLIP,
    RetrievalBLIP,
    TextDecoder,
    TextTransformer,
    VisionTransformer,
    drawn,
    negative_weights,
)
from tldr_reduction.model import CodebookCaptioner


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name; a shared parameter is listed under each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


def test_blip_queue_wraps_around():
    model = tiny_blip(queue_size=6)
    for start in (0, 4, 2):
        assert int(model.queue_ptr) == start
        features = F.normalize(torch.randn(4, 8), dim=1)
        model.enqueue(features, features)
        assert torch.equal(model.image_queue[:, (start + torch.arange(4)) % 6], features.T)
    with pytest.raises(ValueError, match="queue of 6"):
        model.enqueue(torch.randn(7, 8), torch.randn(7, 8))


def test_negatives_are_drawn_as_by_multinomial():
    weights = negative_weights(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(1)
    theirs, behind = torch.multinomial(weights, 1)[:, 0], torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn(weights), theirs) and torch.equal(torch.rand(1), behind)


def test_the_loss_leaves_out_padding_and_prompt():
    ids = torch.tensor([[101, 7, 8, 9, 102], [101, 7, 102, 0, 0]])
    torch.manual_seed(0)
    decoder = TextDecoder(TextTransformer(110, 16, 1, 2, 8, 16)).eval()
    inputs = ids, (ids != 0).long(), torch.randn(2, 3, 16)
    logits = decoder(*inputs)
    whole = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 4)
    torch.testing.assert_close(decoder.loss(*inputs), whole[ids[:, 1:] != 0].mean())
    after = torch.stack([*whole[0, 1:], whole[1, 1]])  # targets from position 2 on
    torch.testing.assert_close(decoder.loss(*inputs, prompt_length=2), after.mean())


def test_decoder_shares_everything_except_self_attention():
    model = tiny_blip()
    encoder, decoder = dict(model.text_encoder.named_parameters()), dict(model.text_decoder.bert.named_parameters())
    for name, parameter in encoder.items():
        assert (decoder[name] is parameter) == (".attention." not in name), name


@pytest.mark.parametrize("stage", ["blip", "captioner"])
def test_checkpointing_changes_no_gradient(stage: str):
    """Recomputed activations have the same dropout."""
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        texts = [TextTransformer(30, 16, 2, 4, 24, 16, dropout=0.2) for _ in range(2)]
        vision = VisionTransformer(16, 8, 16, 3, 4)
        model = BLIP(vision, *texts, 8, 12) if stage == "blip" else CodebookCaptioner(vision, texts[0], None)
        set_grad_checkpointing(model.train(), on)
        ids = torch.randint(4, 28, (4, 9))
        inputs = torch.randn(4, 3, 16, 16), ids, torch.ones_like(ids)
        losses = model(*inputs, *([0.3] if stage == "blip" else []))._asdict()
        sum(loss for name, loss in losses.items() if name != "codes").backward()
        found.append(gradients(model))
    assert len(found[0]) > 20 and all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_vision_tower_is_timms():
    import timm

    tower = VisionTransformer(32, 8, 32, 2, 4).eval()
    theirs = timm.models.vision_transformer.VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=4).eval()
    state = theirs.state_dict()
    tower.load_state_dict({name: state[name] for name in tower.state_dict()})
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tower(image), theirs.forward_features(image))


def blip_rank(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Losses and averaged gradients of a tiny BLIP on this rank's share of eight pairs, with given negatives."""
    model = tiny_blip(queue_size=16)
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(8, 3, 16, 16, generator=generator)
    ids = torch.randint(4, 28, (8, 9), generator=generator)
    lengths = torch.tensor([9, 4, 6, 9, 5, 3, 5, 4])  # none in the second half is as long as the longest of all
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = ids * mask
    negatives = torch.tensor([3, 2, 7, 0, 1, 4, 5, 6]), torch.tensor([5, 6, 1, 2, 0, 7, 3, 4])
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    width = int(lengths[part].max())
    inputs = image[part], ids[part, :width], mask[part, :width]
    losses = model(*inputs, 0.3, tuple(n[part] for n in negatives))
    sum(losses).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    values = torch.stack(losses).detach()
    if world > 1:
        for tensor in (values, *gradients.values()):
            dist.all_reduce(tensor)
            tensor /= world
    return {"losses": values, "queue": model.image_queue, **gradients}


def test_two_processes_give_one_blips_gradients(tmp_path):
    one, (both, _) = blip_rank(0, 1), in_ranks(blip_rank, 2, tmp_path, 2)
    for name, expected in one.items():
        torch.testing.assert_close(both[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_ranks_agree_on_widths_without_a_wait(watch, monkeypatch: pytest.MonkeyPatch):
    """Ids are padded to the longest caption of all processes, without waiting for a GPU."""
    model = tiny_blip(queue_size=16).eval()
    ids, negatives = torch.randint(4, 28, (4, 5)), (torch.tensor([4, 5, 6, 7]), torch.tensor([1, 2, 3, 0]))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(blip, "gather_lists", lambda items, process: [*items, 9])
    monkeypatch.setattr(blip, "gather", lambda x: torch.cat([x, x]))
    widths, whole = [], model.match
    monkeypatch.setattr(model, "match", lambda image, ids, mask: widths.append(ids.shape[1]) or whole(image, ids, mask))
    embeds = model.visual_encoder(torch.randn(4, 3, 16, 16))
    loss = watch.within(model.matching_loss)(embeds, ids, torch.ones_like(ids), negatives)
    assert loss.isfinite() and widths == [9]


# ----------------------------------------------------------------------------------------- fine-tuning for retrieval


def tiny_retrieval() -> RetrievalBLIP:
    torch.manual_seed(0)
    return RetrievalBLIP(VisionTransformer(16, 8, 16, 2, 4), TextTransformer(30, 16, 2, 4, 24, 16, 0.0), 8, 12)


def test_losses_are_those_of_the_formulas():
    """In the second of two steps, the queue holds the keys of the first, among them one of an image of the batch."""
    model, generator = tiny_retrieval(), torch.Generator().manual_seed(1)
    inputs = torch.randn(4, 3, 16, 16, generator=generator), torch.randint(4, 28, (4, 6), generator=generator)
    mask, ids = torch.ones(4, 6), (torch.tensor([7, 7, 8, 9]), torch.tensor([5, 8, 6, 5]))
    model(*inputs, mask, 0.0, ids[0])
    assert model.idx_queue[0].tolist() == [7, 7, 8, 9] + [-100] * 8
    queues = model.image_queue.clone(), model.text_queue.clone()
    negatives = torch.tensor([1, 0, 3, 2]), torch.tensor([2, 3, 0, 1])
    loss_ita, loss_itm = model(*inputs, mask, 0.4, ids[1], negatives)

    with torch.no_grad():  # with the momentum encoders after that step
        image_m = F.normalize(model.vision_proj_m(model.visual_encoder_m(inputs[0])[:, 0]), dim=-1)
        text_m = F.normalize(model.text_proj_m(model.text_encoder_m(inputs[1], mask)[:, 0]), dim=-1)
        image, text = model.encode_image(inputs[0]), model.encode_text(inputs[1], mask)
    same = (ids[1][:, None] == torch.cat([ids[1], ids[0], torch.full((8,), -100)])[None]).float()
    assert same.sum(1).tolist() == [2, 2, 1, 2]
    total = 0
    for own, keys, momentum in (
        (image, torch.cat([text_m.T, queues[1]], 1), image_m),
        (text, torch.cat([image_m.T, queues[0]], 1), text_m),
    ):
        targets = 0.4 * (momentum @ keys / model.temp).softmax(1) + 0.6 * same / same.sum(1, keepdim=True)
        total = total - (targets * (own @ keys / model.temp).log_softmax(1)).sum(1).mean() / 2
    torch.testing.assert_close(loss_ita, total, rtol=1e-4, atol=1e-5)
    embeds, matched = model.visual_encoder(inputs[0]), inputs[1].clone()
    matched[:, 0] = 29
    rows = ((embeds, matched), (embeds[negatives[0]], matched), (embeds, matched[negatives[1]]))
    logits = torch.cat([model.match(image, text, mask) for image, text in rows])
    torch.testing.assert_close(loss_itm, F.cross_entropy(logits, (torch.arange(12) < 4).long()))


def test_negatives_are_of_other_images(monkeypatch):
    model, drawn = tiny_retrieval(), []
    keep = model.matching_loss
    monkeypatch.setattr(model, "matching_loss", lambda *inputs: (drawn.append(inputs[3]), keep(*inputs))[1])
    image_ids = torch.tensor([1, 1, 1, 2])
    for seed in range(20):
        torch.manual_seed(seed)
        model(torch.randn(4, 3, 16, 16), torch.randint(4, 28, (4, 6)), torch.ones(4, 6), 0.4, image_ids)
    for negatives in drawn:
        for chosen in negatives:
            assert (image_ids[chosen] != image_ids).all()
