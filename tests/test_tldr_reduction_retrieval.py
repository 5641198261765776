"""Fine-tuning for retrieval: all captions of an image match it, and hard negatives are from other images."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_tldr_reduction_model import tiny_captioner  # noqa: F401
from test_tldr_reduction_train import SCRIPT, SECONDS, chain, command, folder, refused, tiny  # noqa: F401

from tldr_reduction.blip import RetrievalBLIP, TextTransformer, VisionTransformer
from tldr_reduction.datasets import Collate, eval_transform, open_pairs, pixel_hash
from tldr_reduction.retrieval import ImageDataset


def tiny_retrieval() -> RetrievalBLIP:
    torch.manual_seed(0)
    return RetrievalBLIP(VisionTransformer(16, 8, 16, 2, 4), TextTransformer(30, 16, 2, 4, 24, 16, 0.0), 8, 12)


def test_losses_are_those_of_the_formulas():
    """In the second of two steps, the queue holds the keys of the first, among them one of an image of the batch."""
    model, generator = tiny_retrieval(), torch.Generator().manual_seed(1)
    assert not hasattr(model, "text_decoder")
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


def test_images_are_known_by_their_pixels(folder):
    pairs = open_pairs(str(folder / "pool"))
    dataset = ImageDataset(pairs, eval_transform(16), 0)
    numbers = [dataset[i][3] for i in (0, 1, 0)]
    assert numbers[0] == numbers[2] != numbers[1] and all(0 <= number < 2**63 for number in numbers)
    assert pixel_hash(Image.new("RGB", (4, 2))) != pixel_hash(Image.new("RGB", (2, 4)))
    words = lambda captions: torch.ones(len(captions), 4, dtype=torch.long)  # noqa: E731
    _, images, ids, mask, image_ids, broken = Collate(words, 4)([dataset[i] for i in range(3)])
    assert image_ids.dtype == torch.int64 and image_ids.tolist()[:2] == numbers[:2] and not broken


def test_the_run_is_evaluated_and_scores(chain, cli, folder, tiny):
    from tldr_reduction.checkpoints import load_run

    model, settings, _ = load_run(chain["retrieval"])
    assert settings.stage == "retrieval" and isinstance(model, RetrievalBLIP)
    assert (model.idx_queue >= 0).any()
    out = folder / "by-retrieval"
    words = [folder / "pool", "--select", "itm", "--keep", "0.5", "--scorer", chain["retrieval"], "--out", out]
    assert cli(*words, module="tldr_reduction.reduce").code == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [([], "--init is missing"), (["--init", "gone"], "does not exist"), (["--queue-size", "8"], "smaller than")],
)
def test_what_it_needs(in_process, tiny, flags, words):
    refused(in_process(*command("retrieval", tiny), *flags, module="tldr_reduction.retrieval"), words)
