"""The study's learner: a bag of words, a locked tower that is trained on its features, its runs as scorers."""

import dataclasses

import torch
from PIL import Image
from scripts import SHARDS

from shared.pretrained import efficientnet_lite0
from studies import tldr_reduction_learner as learner
from studies.tldr_reduction_learner import VIEW, BagOfWords, Features
from tldr_reduction.datasets import open_pairs


def test_a_bag_of_words_has_no_order_and_no_padding():
    torch.manual_seed(0)
    bag = BagOfWords(vocab_size=20, context_length=6, width=8, embed_dim=5).eval()
    ids = torch.tensor([[18, 3, 4, 19, 0, 0], [18, 4, 3, 19, 0, 0], [18, 3, 3, 4, 19, 0], [18, 19, 0, 0, 0, 0]])
    features = bag(ids)
    mean = bag.token_embedding.weight[[3, 4]].mean(0)
    torch.testing.assert_close(features[0], bag.projection(mean) + bag.mlp(mean))
    torch.testing.assert_close(features[0], features[1])
    torch.testing.assert_close(features[0], bag(ids[:1, :4])[0])
    assert not torch.allclose(features[0], features[2]) and features[3].isfinite().all()


def test_words_of_a_bag_are_dropped_in_training_only():
    torch.manual_seed(0)
    bag = BagOfWords(vocab_size=20, context_length=6, width=8, embed_dim=5, drop=0.5)
    ids = torch.tensor([[18, 3, 19]]).repeat(400, 1)
    kept = (bag(ids) - bag.eval()(ids[:1])).abs().amax(1) < 1e-5
    assert 0.4 < kept.float().mean() < 0.6  # the others have no word
    bag.train()(ids).sum().backward()
    assert bag.token_embedding.weight.grad[3].any() and not bag.token_embedding.weight.grad[[18, 19, 0]].any()


def test_a_locked_trunk_keeps_its_weights(embedded_corpus, tmp_path):
    """The projection is trained on features of whole images, on which it gives what the tower gives on the images."""
    settings = dict(data=str(SHARDS), dataset_size=40, batch_size=20, epochs=2, warmup=1, device="cpu", log_every=1)
    cfg = dataclasses.replace(learner.SETTINGS, **settings, cache=str(tmp_path / "cache"), out=str(tmp_path / "run"))
    assert learner.main(cfg) == tmp_path / "run"
    model, kept, _ = learner.load_run(tmp_path / "run")
    assert kept == cfg
    loaded = efficientnet_lite0().state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.visual.trunk.state_dict().items())
    pairs = open_pairs(cfg.data, limit=40)
    features = Features(pairs, tmp_path / "cache")
    images = torch.stack([VIEW(pairs.read(row).image) for row in range(40)])
    with torch.no_grad():
        close = torch.cosine_similarity(model.visual.eval()(images), model.visual(features.features))
    assert close.min() > 0.99 and len(features) == 40 and features.read(3).caption == pairs.caption(3)
    assert not model.visual.train().trunk.training and not any(p.requires_grad for p in model.visual.trunk.parameters())
    scorer = learner.load_scorer(str(tmp_path / "run"), torch.device("cpu"))
    scores = scorer.score(torch.stack([VIEW(Image.new("RGB", (30, 30), "red"))] * 2), ["a heart", "a face"])
    assert not scorer.matches and scores.shape == (2,) and (scores.abs() <= 1 + 1e-5).all()
