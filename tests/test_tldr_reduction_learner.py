"""The study's learner: a bag of words, views, its runs as scorers."""

import dataclasses

import pytest
import torch
from PIL import Image
from scripts import SHARDS

from shared import run
from studies import tldr_reduction_learner as learner
from studies.tldr_reduction_learner import BagOfWords
from tldr_reduction.datasets import eval_transform


def test_a_bag_of_words_has_no_order_and_no_padding():
    torch.manual_seed(0)
    bag = BagOfWords(vocab_size=20, context_length=6, embed_dim=5).eval()
    ids = torch.tensor([[18, 3, 4, 19, 0, 0], [18, 4, 3, 19, 0, 0], [18, 3, 3, 4, 19, 0], [18, 19, 0, 0, 0, 0]])
    features = bag(ids)
    mean = bag.token_embedding.weight[[3, 4]].mean(0)
    torch.testing.assert_close(features[0], mean)
    torch.testing.assert_close(features[0], features[1])
    torch.testing.assert_close(features[0], bag(ids[:1, :4])[0])
    assert not torch.allclose(features[0], features[2]) and features[3].isfinite().all()


def test_words_of_a_bag_are_dropped_in_training_only():
    torch.manual_seed(0)
    bag = BagOfWords(vocab_size=20, context_length=6, embed_dim=5, drop=0.5)
    ids = torch.tensor([[18, 3, 19]]).repeat(400, 1)
    kept = (bag(ids) - bag.eval()(ids[:1])).abs().amax(1) < 1e-5
    assert 0.4 < kept.float().mean() < 0.6  # the others have no word
    bag.train()(ids).sum().backward()
    assert bag.token_embedding.weight.grad[3].any() and not bag.token_embedding.weight.grad[[18, 19, 0]].any()


def test_a_view_is_the_whole_picture_a_crop_or_its_mirror_image():
    picture = Image.new("RGB", (64, 64), "red")
    picture.paste("blue", (32, 0, 64, 64))
    view, whole = learner.View(32, crop_scale=0.5), eval_transform(32)(picture)
    noise = torch.full((3, 10), 0.5)
    noise[:, 0], noise[:, 3] = 0.0, torch.tensor([0.9, 0.1, 0.9])  # all of the area; the second is mirrored
    noise[2, 0], noise[2, 4] = 1.0, 1.0  # half of the area, at the right
    views = view.normalise([view.pixels(picture)[0].expand(3, -1, -1, -1), noise])
    assert torch.allclose(views[0, :, :, [4, 27]], whole[:, :, [4, 27]], atol=1e-4)
    assert torch.allclose(views[1], views[0].flip(-1), atol=1e-4)
    blue = views[:, 2, 16] > 0
    assert blue.sum(1).tolist()[:2] == [16, 16] and 21 < blue[2].sum() < 25  # 0.5 of 0.71
    torch.manual_seed(0)
    assert view(picture).isfinite().all() and not torch.allclose(view(picture), view(picture))


def test_a_run_is_loaded_and_scores(embedded_corpus, tmp_path):
    """The temperature stays as it is; a loaded run has the trained weights."""
    settings = dict(data=str(SHARDS), dataset_size=40, batch_size=20, epochs=2, warmup=1, device="cpu", log_every=1)
    cfg = dataclasses.replace(learner.SETTINGS, **settings, cache=str(tmp_path / "cache"), out=str(tmp_path / "run"))
    assert learner.main(cfg) == tmp_path / "run"
    model, kept, _ = learner.load_run(tmp_path / "run")
    assert kept == cfg and not model.training
    assert [line["logit_scale"] for line in run.read_metrics(tmp_path / "run", "logit_scale")] == pytest.approx(
        [5.0] * 4
    )
    scorer = learner.load_scorer(str(tmp_path / "run"), torch.device("cpu"))
    images = torch.stack([scorer.transform(Image.new("RGB", (30, 30), colour)) for colour in ("red", "blue")])
    scores = scorer.score(images, ["a heart", "a face"])
    assert not scorer.matches and scores.shape == (2,) and (scores.abs() <= 1 + 1e-5).all()
