"""Linear probes against clip-benchmark, scikit-learn and a plain training loop."""

import clip_benchmark.metrics.linear_probe as their_probe
import pytest
import torch
import torch.nn.functional as F
from evaluation_sets import features_and_labels, their_accuracy_with_recent_numpy  # noqa: F401

from flame.eval import linear_probe
from protoclip.eval import logistic_probe
from shared import probes, zeroshot


class EpochOrder(torch.utils.data.Sampler):
    """Makes clip-benchmark's loaders use the order that our probes draw from the same seed."""

    generator = torch.Generator()

    def __init__(self, dataset):
        self.size = len(dataset)

    def __iter__(self):
        return iter(torch.randperm(self.size, generator=self.generator).tolist())

    def __len__(self):
        return self.size


def test_adamw_probe_equals_clip_benchmark(monkeypatch, tmp_path):
    """clip-benchmark's evaluation on cached features; calls to CUDA are patched out."""
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
    monkeypatch.setattr(torch.nn, "DataParallel", lambda module, device_ids: module)
    monkeypatch.setattr(their_probe, "print", lambda *args: None, raising=False)
    monkeypatch.setattr(their_probe, "tqdm", lambda loader: loader)
    monkeypatch.setattr(
        their_probe,
        "DataLoader",
        lambda dataset, batch_size, **_: torch.utils.data.DataLoader(dataset, batch_size, sampler=EpochOrder(dataset)),
    )
    train = their_probe.train

    def seeded_train(*args):
        EpochOrder.generator.manual_seed(args[-1])
        return train(*args)

    monkeypatch.setattr(their_probe, "train", seeded_train)
    data = {
        name: features_and_labels(seed, n, noise=2.5)
        for seed, (name, n) in enumerate([("train", 90), ("val", 60), ("test", 150)])
    }
    (tmp_path / "model").mkdir()
    for name, (x, y) in data.items():
        data[name] = F.normalize(x, dim=-1), y
        torch.save(data[name][0], tmp_path / "model" / f"features_{name}.pt")
        torch.save(y, tmp_path / "model" / f"targets_{name}.pt")
    torch.manual_seed(5)  # they shuffle the training rows once, before their few-shot selection
    theirs = their_probe.evaluate(
        torch.nn.Identity(), None, None, -1, 32, 0, 0.1, 4, "model", 3, str(tmp_path), "cuda",
        val_dataloader=None, amp=False,
    )  # fmt: skip
    monkeypatch.undo()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(5))
    train_x, train_y = (tensor[order] for tensor in data["train"])
    probe = linear_probe(train_x, train_y, *data["test"], epochs=4, lr=0.1, batch_size=32, seed=3)
    test_x, test_y = data["test"]
    metrics = zeroshot.classification_metrics(test_x @ probe.weight.T + probe.bias, test_y)
    assert probe.weight_decay == theirs["weight_decay"] == 0
    assert probe.final == pytest.approx(100 * theirs["lp_acc1"])
    assert metrics == pytest.approx(
        {
            "top1": 100 * theirs["lp_acc1"],
            "top5": 100 * theirs["lp_acc5"],
            "mean_per_class": 100 * theirs["lp_mean_per_class_recall"],
        }
    )
    assert 30 < probe.final < 95  # neither chance nor a problem that any probe solves


def test_sgd_probe_equals_a_torch_training_loop():
    """ProtoCLIP's recipe built from torch: Linear, SGD, CosineAnnealingLR by epoch, no shuffling."""
    (train_x, train_y), (test_x, test_y) = features_and_labels(0, 250), features_and_labels(1, 100)
    layer = torch.nn.Linear(12, 7)
    init = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-6)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=0)
    accuracies = []
    for _ in range(30):
        for x, y in zip(train_x.split(64), train_y.split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(layer(x), y).backward()
            optimizer.step()
        scheduler.step()
        accuracies.append(100 * (layer(test_x).argmax(dim=1) == test_y).float().mean().item())
    probe = probes.sgd_probe(train_x, train_y, test_x, test_y, epochs=30, batch_size=64, init=init)
    torch.testing.assert_close(probe.weight, layer.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probe.bias, layer.bias.detach(), rtol=1e-4, atol=1e-6)
    assert (probe.best, probe.final) == pytest.approx((max(accuracies), accuracies[-1]))


def test_sgd_probe_is_repeatable_and_leaves_the_global_generator_alone():
    train, test = features_and_labels(0), features_and_labels(1)
    state = torch.get_rng_state()
    first, second = (probes.sgd_probe(*train, *test, epochs=5, batch_size=32, shuffle=True, seed=7) for _ in range(2))
    linear_probe(*train, *test, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, second.weight)
    other = probes.sgd_probe(*train, *test, epochs=5, batch_size=32, shuffle=True, seed=8)
    assert not torch.equal(first.weight, other.weight)
    assert first.final > 50


def test_a_test_class_that_training_lacks_is_a_miss():
    train, (test_x, test_y) = features_and_labels(0, classes=3), features_and_labels(1, n=40, classes=3)
    known, unknown = test_y < 2, torch.full_like(test_y, 9)
    for probe in (probes.sgd_probe, linear_probe):
        assert probe(*train, test_x, unknown, epochs=2).best == 0
    assert logistic_probe(*train, test_x, torch.where(known, test_y, 9)) <= 100 * known.float().mean()


def test_logistic_probe_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    (train_x, train_y), (test_x, test_y) = features_and_labels(0), features_and_labels(1)
    predictions = LogisticRegression(C=0.1, max_iter=1000).fit(train_x.numpy(), train_y.numpy()).predict(test_x.numpy())
    ours = logistic_probe(train_x, train_y, test_x, test_y, C=0.1)
    assert ours == pytest.approx(100 * (predictions == test_y.numpy()).mean())
