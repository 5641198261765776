"""The study's learner: a bag of words, whitening, a locked tower that is trained on views, its runs as scorers."""

import dataclasses

import torch
from PIL import Image
from scripts import SHARDS

from shared.pretrained import efficientnet_lite0
from studies import tldr_reduction_learner as learner
from studies.tldr_reduction_learner import AXES, VIEW, VIEWS, BagOfWords, Features, Whitened
from tldr_reduction.datasets import open_pairs


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


def test_whitened_features_have_no_covariance():
    """Directions with much variance get nearly unit variance; noise is added in training only."""
    torch.manual_seed(0)
    features = torch.randn(4000, 300) * torch.linspace(3, 0.01, 300) + 5
    layer = Whitened(300, noise=2.0).eval()
    layer.fit(features)
    found = layer(features)
    covariance = torch.cov(found.T)
    assert found.shape == (4000, AXES) and found.mean(0).abs().max() < 1e-3
    assert 0.9 < covariance.diagonal()[:50].min() and covariance.fill_diagonal_(0).abs().max() < 0.01
    assert 1.9 < (layer.train()(features) - found).std() < 2.1


def test_a_locked_trunk_keeps_its_weights(embedded_corpus, tmp_path):
    """The layer is trained on the trunk's features of views; the tower gives the same on images and on features."""
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
        of_trunk = model.visual.eval().trunk(images.contiguous(memory_format=torch.channels_last))
        assert torch.equal(model.visual(images), model.visual(of_trunk))
    close = torch.cosine_similarity(of_trunk, features.features)
    assert close.min() > 0.99 and len(features) == 40 and features.read(3).caption == pairs.caption(3)
    views = features.views
    assert views.shape == (40, 1 + VIEWS, 1280) and torch.equal(features.read(3).image, views[3])
    assert (views[:, 0] - views[:, 1]).abs().amax(1).min() > 0.1  # a view differs from the whole picture
    with torch.no_grad():
        assert torch.equal(model.visual.eval()(views), model.visual(features.features))
        assert not torch.equal(model.visual.train()(views), model.visual(features.features))
    assert not model.visual.train().trunk.training and not any(p.requires_grad for p in model.visual.trunk.parameters())
    scorer = learner.load_scorer(str(tmp_path / "run"), torch.device("cpu"))
    scores = scorer.score(torch.stack([VIEW(Image.new("RGB", (30, 30), "red"))] * 2), ["a heart", "a face"])
    assert not scorer.matches and scores.shape == (2,) and (scores.abs() <= 1 + 1e-5).all()
