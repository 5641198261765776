"""Metrics, evaluation-set reader and linear probes: equality with the clip-benchmark package, properties, errors."""

import io
import json
import math
import tarfile
from itertools import chain

import clip_benchmark.metrics.linear_probe as their_probe
import clip_benchmark.metrics.zeroshot_classification as their_classification
import clip_benchmark.metrics.zeroshot_retrieval as their_retrieval
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from flame.eval import adamw_probe, log_sweep
from protoclip.eval import logistic_probe
from shared import probes, zeroshot
from shared.evalsets import EvalSet

TEMPLATES = ["a photo of a {c}.", "art of the {c}", "{c}"]


# ---------------------------------------------------------------- a tiny model and tiny evaluation sets


class TinyClip(torch.nn.Module):
    """Images (B, 3, 8, 8) uint8 and token counts (B, 128) -> 16 features through fixed random matrices."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = torch.nn.Parameter(torch.randn(192, 16, generator=generator))
        self.text = torch.nn.Parameter(torch.randn(128, 16, generator=generator))
        self.frozen = torch.nn.Dropout(0.5).eval()
        self.dropout = torch.nn.Dropout(0.5)
        self.text_calls = 0

    def encode_image(self, images):
        return self.frozen(self.dropout(images.flatten(1).float() / 255 - 0.5)) @ self.image

    def encode_text(self, tokens):
        self.text_calls += 1
        return self.dropout(tokens) @ self.text


def tokenizer(texts):
    return torch.stack(
        [torch.bincount(torch.tensor([ord(c) % 128 for c in text]), minlength=128) for text in texts]
    ).float()


def image_bytes(seed, extension="png", mode="RGB", size=(8, 8)):
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8).squeeze()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(
        stream, {"jpg": "jpeg"}.get(extension, extension), **({"lossless": True} if extension == "webp" else {})
    )
    return stream.getvalue()


def write_set(folder, shards, kind=None, classnames=("cat", "dog", "red fox"), templates=TEMPLATES, split="test"):
    """shards: for each tar file, a list of (file name, bytes)."""
    (folder / split).mkdir(parents=True)
    if kind:
        (folder / "dataset_type.txt").write_text(kind + "\n")
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("\n".join(classnames) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    (folder / split / "nshards.txt").write_text(f"{len(shards)}\n")
    for i, files in enumerate(shards):
        with tarfile.open(folder / split / f"{i}.tar", "w") as tar:
            for name, data in files:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def npy(array):
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


@pytest.fixture
def classification_set(tmp_path):
    """11 images in two shards, in every image format, three classes."""
    formats = ["png", "jpg", "jpeg", "webp"]
    samples = [
        [(f"s{i:04d}.{formats[i % 4]}", image_bytes(i, formats[i % 4])), (f"s{i:04d}.cls", str(i % 3).encode())]
        for i in range(11)
    ]
    return write_set(tmp_path / "animals", [[*chain(*samples[:6])], [*chain(*samples[6:])]])


@pytest.fixture
def retrieval_set(tmp_path):
    """14 images with one to three captions each, some not in English."""
    words = ["red fox", "blue jay", "grüner Frosch", "黒い猫", "old boat", "wet dog", "tall tree"]
    files = []
    for i in range(14):
        captions = "\n".join(f"{words[i % 7]} number {i} {'x' * j}" for j in range(1 + i % 3))
        files += [(f"s{i:04d}.webp", image_bytes(100 + i, "webp")), (f"s{i:04d}.txt", captions.encode())]
    return write_set(tmp_path / "captions", [files], kind="retrieval")


@pytest.fixture
def multilabel_set(tmp_path):
    targets = np.random.default_rng(0).integers(0, 2, (12, 3))
    files = []
    for i in range(12):
        files += [(f"s{i:04d}.png", image_bytes(i)), (f"s{i:04d}.npy", npy(targets[i]))]
    return write_set(tmp_path / "multi", [files], kind="multilabel")


def features_and_labels(seed, n=200, classes=7, dim=12, noise=1.5):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    return means[labels] + noise * torch.randn(n, dim, generator=generator), labels


# ---------------------------------------------------------------- equality with clip-benchmark


@pytest.fixture(autouse=True)
def their_accuracy_with_recent_numpy(monkeypatch):
    """clip-benchmark 1.6.2 takes `float()` of one-element arrays, which numpy 2.4 refuses; nothing else is changed."""
    one_element = lambda value: value.item() if isinstance(value, np.ndarray) else float(value)  # noqa: E731
    monkeypatch.setattr(their_classification, "float", one_element, raising=False)


def their_loader(folder, kind="classification"):
    """clip-benchmark's reader, batched."""
    dataset = build_wds_dataset("set", pil_to_tensor, data_dir=str(folder))
    collate = image_captions_collate_fn if kind == "retrieval" else None
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, collate_fn=collate)
    return dataset, loader


@pytest.mark.parametrize("workers", [0, 2])
def test_reader_equals_clip_benchmark_on_classification(classification_set, workers):
    dataset, loader = their_loader(classification_set)
    theirs = list(loader)
    ours = EvalSet(classification_set, pil_to_tensor)
    assert (ours.classnames, ours.templates, ours.kind) == (dataset.classes, dataset.templates, "classification")
    images, labels = (torch.cat(parts) for parts in zip(*ours.batches(5, workers), strict=True))
    their_images, their_labels = (torch.cat(parts) for parts in zip(*theirs, strict=True))
    if workers:  # the same samples, in an order of their own
        order, their_order = (
            sorted(range(11), key=lambda i, x=x: x[i].flatten().tolist()) for x in (images, their_images)
        )
        images, labels, their_images, their_labels = (
            images[order],
            labels[order],
            their_images[their_order],
            their_labels[their_order],
        )
    assert torch.equal(images, their_images) and torch.equal(labels, their_labels)


def test_reader_equals_clip_benchmark_on_captions(retrieval_set):
    ours = list(EvalSet(retrieval_set, pil_to_tensor).batches(5))
    theirs = list(their_loader(retrieval_set, "retrieval")[1])
    assert torch.equal(torch.cat([images for images, _ in ours]), torch.cat([images for images, _ in theirs]))
    assert [c for _, batch in ours for c in batch] == [c for _, batch in theirs for c in batch]


def test_evaluate_equals_clip_benchmark(classification_set, retrieval_set, multilabel_set, capsys):
    model = TinyClip()
    ours = zeroshot.evaluate(
        model, tokenizer, pil_to_tensor, [classification_set, retrieval_set, multilabel_set], batch_size=4
    )
    assert model.dropout.training and not model.frozen.training
    model.eval()
    dataset, loader = their_loader(classification_set)
    theirs = their_classification.evaluate(
        model, loader, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
    )
    assert ours["animals"]["top1"] == pytest.approx(100 * theirs["acc1"])
    assert math.isnan(ours["animals"]["top5"]) and math.isnan(theirs["acc5"])
    assert ours["animals"]["mean_per_class"] == pytest.approx(100 * theirs["mean_per_class_recall"])

    dataset, loader = their_loader(multilabel_set)
    theirs = their_classification.evaluate(
        model, loader, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
    )
    assert ours["multi"]["mean_average_precision"] == pytest.approx(100 * theirs["mean_average_precision"])

    ks = [1, 5, 10]
    loader = their_loader(retrieval_set, "retrieval")[1]
    theirs = their_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=ks)
    for k in ks:
        assert ours["captions"][f"image_to_text_R@{k}"] == pytest.approx(100 * theirs[f"text_retrieval_recall@{k}"])
        assert ours["captions"][f"text_to_image_R@{k}"] == pytest.approx(100 * theirs[f"image_retrieval_recall@{k}"])


def test_evaluate_is_quiet_and_plain(classification_set, capfd):
    model = TinyClip().eval()
    results = zeroshot.evaluate(model, tokenizer, pil_to_tensor, [classification_set], num_workers=2)
    assert capfd.readouterr() == ("", "")  # no progress bar where there is no terminal
    assert json.loads(json.dumps(results)).keys() == {"animals"}
    without_workers = zeroshot.evaluate(model, tokenizer, pil_to_tensor, [str(classification_set)])
    assert results["animals"] == pytest.approx(without_workers["animals"], nan_ok=True)


def test_evaluate_under_autocast_returns_float32_metrics(retrieval_set):
    results = zeroshot.evaluate(TinyClip(), tokenizer, pil_to_tensor, [retrieval_set], precision=torch.bfloat16)
    full = zeroshot.evaluate(TinyClip(), tokenizer, pil_to_tensor, [retrieval_set])
    assert results["captions"]["mean_recall"] == pytest.approx(full["captions"]["mean_recall"], abs=10)


def test_classifier_equals_clip_benchmark():
    model, names = TinyClip().eval(), [f"thing {i}" for i in range(20)]
    theirs = their_classification.zero_shot_classifier(model, tokenizer, names, TEMPLATES, "cpu", amp=False)
    model.text_calls = 0
    ours = zeroshot.build_classifier(model.encode_text, tokenizer, names, TEMPLATES, batch_size=16)
    assert model.text_calls == 4  # 60 prompts in batches, not one call a class
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    embeddings = model.encode_text(tokenizer([t.format(c=n) for n in names for t in TEMPLATES])).view(20, 3, 16)
    torch.testing.assert_close(zeroshot.zeroshot_classifier(embeddings), theirs, rtol=1e-5, atol=1e-6)
    functions = [lambda c, t=t: t.format(c=c) for t in TEMPLATES]  # as open_clip keeps its templates
    assert torch.equal(zeroshot.build_classifier(model.encode_text, tokenizer, names, functions, batch_size=16), ours)


@pytest.mark.parametrize("classes", [5, 7, 300])
def test_classification_metrics_equal_clip_benchmark(classes, monkeypatch):
    monkeypatch.setattr(zeroshot, "CHUNK", 1000)  # several chunks, the last one short
    features, labels = features_and_labels(0, n=501, classes=classes)
    classifier = F.normalize(torch.randn(12, classes, generator=torch.Generator().manual_seed(1)), dim=0)
    logits = F.normalize(features, dim=-1) @ classifier
    acc1, acc5 = their_classification.accuracy(logits, labels, topk=(1, 5))
    recall = their_classification.balanced_accuracy_score(labels, logits.argmax(dim=1))
    expected = {"top1": 100 * acc1, "top5": 100 * acc5, "mean_per_class": 100 * recall}
    assert zeroshot.classification_metrics(logits, labels) == pytest.approx(expected)
    assert zeroshot.classification_metrics(features, labels, classifier) == pytest.approx(expected)


def test_mean_average_precision_equals_clip_benchmark():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 8, generator=generator)
    targets = torch.randint(2, (60, 8), generator=generator)
    targets[:, 3] = 0
    theirs = their_classification.average_precision_per_class(scores, targets).mean().item()
    assert zeroshot.mean_average_precision(scores, targets) == pytest.approx(100 * theirs)


@pytest.mark.parametrize("chunk", [7, 2**24])
def test_retrieval_equals_clip_benchmark(chunk, monkeypatch):
    monkeypatch.setattr(zeroshot, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 8, generator=generator)
    text_to_image = torch.cat([torch.arange(40), torch.randint(40, (90,), generator=generator)])
    texts = images[text_to_image] + 1.5 * torch.randn(130, 8, generator=generator)
    scores = F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).T
    positive = F.one_hot(text_to_image, 40).bool()
    ours = zeroshot.retrieval_metrics(images, texts, text_to_image, ks=(1, 3, 10))
    from_scores = zeroshot.recall_metrics(*zeroshot.retrieval_ranks_from_scores(scores.T, text_to_image), ks=(1, 3, 10))
    assert ours == from_scores
    for k in (1, 3, 10):
        to_image = (their_retrieval.recall_at_k(scores, positive, k) > 0).float().mean().item()
        to_text = (their_retrieval.recall_at_k(scores.T, positive.T, k) > 0).float().mean().item()
        assert ours[f"text_to_image_R@{k}"] == pytest.approx(100 * to_image)
        assert ours[f"image_to_text_R@{k}"] == pytest.approx(100 * to_text)


class EpochOrder(torch.utils.data.Sampler):
    """Gives clip-benchmark's loaders the order that our probes draw from the same seed."""

    generator = torch.Generator()

    def __init__(self, dataset):
        self.size = len(dataset)

    def __iter__(self):
        return iter(torch.randperm(self.size, generator=self.generator).tolist())

    def __len__(self):
        return self.size


@pytest.mark.parametrize("with_validation", [False, True])
def test_adamw_probe_equals_clip_benchmark(with_validation, monkeypatch, tmp_path):
    """Their whole evaluation, weight decay sweep included, on cached features; what asks for CUDA is patched out."""
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
        val_dataloader=[] if with_validation else None, amp=False,
    )  # fmt: skip
    monkeypatch.undo()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(5))
    train_x, train_y = (tensor[order] for tensor in data["train"])
    probe = adamw_probe(
        train_x, train_y, *data["test"], epochs=4, lr=0.1, batch_size=32, seed=3,
        validation=data["val"] if with_validation else None,
    )  # fmt: skip
    test_x, test_y = data["test"]
    metrics = zeroshot.classification_metrics(test_x @ probe.weight.T + probe.bias, test_y)
    assert probe.weight_decay == theirs["weight_decay"]
    assert (probe.weight_decay > 0) == with_validation
    assert probe.final == pytest.approx(100 * theirs["lp_acc1"])
    assert metrics == pytest.approx(
        {
            "top1": 100 * theirs["lp_acc1"],
            "top5": 100 * theirs["lp_acc5"],
            "mean_per_class": 100 * theirs["lp_mean_per_class_recall"],
        }
    )
    assert 30 < probe.final < 95  # neither chance nor a problem that any probe solves


# ---------------------------------------------------------------- properties of the metrics


def test_metrics_do_not_depend_on_sample_order():
    features, labels = features_and_labels(0)
    classifier = torch.randn(12, 7, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))
    assert zeroshot.classification_metrics(features, labels, classifier) == pytest.approx(
        zeroshot.classification_metrics(features[order], labels[order], classifier)
    )
    classes = torch.randperm(7, generator=torch.Generator().manual_seed(3))  # new column j is old class classes[j]
    assert zeroshot.classification_metrics(features, labels, classifier) == pytest.approx(
        zeroshot.classification_metrics(features, classes.argsort()[labels], classifier[:, classes])
    )


def test_retrieval_does_not_depend_on_order():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(20, 6, generator=generator), torch.randn(50, 6, generator=generator)
    text_to_image = torch.cat([torch.arange(20), torch.randint(20, (30,), generator=generator)])
    image_order, text_order = torch.randperm(20, generator=generator), torch.randperm(50, generator=generator)
    shuffled = image_order.argsort()[text_to_image[text_order]]
    assert zeroshot.retrieval_metrics(images, texts, text_to_image) == pytest.approx(
        zeroshot.retrieval_metrics(images[image_order], texts[text_order], shuffled)
    )


def test_classification_ties_go_to_the_lower_class():
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert zeroshot.label_ranks(logits, torch.tensor([0, 1, 2])).tolist() == [0, 1, 1]
    collapsed = zeroshot.classification_metrics(torch.zeros(6, 6), torch.arange(6))
    assert collapsed == pytest.approx({"top1": 100 / 6, "top5": 500 / 6, "mean_per_class": 100 / 6})


def test_nan_is_a_miss():
    assert zeroshot.classification_metrics(torch.full((4, 6), math.nan), torch.arange(4))["top5"] == 0
    features = torch.full((12, 3), math.nan)
    assert zeroshot.retrieval_metrics(features, features, torch.arange(12))["mean_recall"] == 0


def test_single_class():
    metrics = zeroshot.classification_metrics(torch.randn(4, 1), torch.zeros(4, dtype=torch.int64))
    assert metrics == pytest.approx({"top1": 100, "top5": math.nan, "mean_per_class": 100}, nan_ok=True)


def test_empty_class_is_left_out_of_the_mean():
    logits, labels = torch.eye(5)[[0, 0, 2, 2]], torch.tensor([0, 0, 2, 3])
    accuracy = zeroshot.per_class_accuracy(logits.argmax(dim=1) == labels, labels, 5)
    torch.testing.assert_close(accuracy, torch.tensor([100, math.nan, 100, 0, math.nan]), equal_nan=True)
    assert zeroshot.classification_metrics(logits, labels)["mean_per_class"] == pytest.approx(200 / 3)


def test_synonyms_share_one_class():
    model = TinyClip().eval()
    ours = zeroshot.build_classifier(model.encode_text, tokenizer, [["happy", "smiling", "glad"], "sad"], TEMPLATES)
    prompts = [t.format(c=c) for c in ("happy", "smiling", "glad") for t in TEMPLATES]
    happy = F.normalize(F.normalize(model.encode_text(tokenizer(prompts)), dim=-1).mean(dim=0), dim=0)
    torch.testing.assert_close(ours[:, 0], happy)
    with pytest.raises(ValueError, match="at least one name"):
        zeroshot.build_classifier(model.encode_text, tokenizer, ["a", []], TEMPLATES)


def test_best_caption_counts_and_own_captions_do_not_compete():
    text_to_image = torch.tensor([0, 0, 1, 2])
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.8, 0.7, 0.6, 0.1], [0.3, 0.3, 0.3, 0.3]])
    to_text, to_image = zeroshot.retrieval_ranks_from_scores(scores, text_to_image)
    assert to_text.tolist() == [0, 2, 3]  # equal scores of other images' captions count against
    assert to_image.tolist() == [0, 2, 0, 0]


def test_collapsed_features_score_nothing():
    metrics = zeroshot.retrieval_metrics(torch.ones(30, 4), torch.ones(30, 4), torch.arange(30))
    assert metrics["mean_recall"] == 0


def test_an_image_without_captions_is_a_miss():
    metrics = zeroshot.retrieval_metrics(torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 1]))
    assert metrics["image_to_text_R@1"] == metrics["image_to_text_R@10"] == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("text_to_image", "message"),
    [([0, 1, 5], "beyond the 3 images"), ([0, 1], "do not fit 3 texts")],
)
def test_wrong_text_to_image(text_to_image, message):
    with pytest.raises(ValueError, match=message):
        zeroshot.retrieval_metrics(torch.randn(3, 4), torch.randn(3, 4), torch.tensor(text_to_image))


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 3], "do not fit 3"), ([-1, 0], "do not fit 3"), ([0], "1 labels and 2 rows")]
)
def test_wrong_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        zeroshot.classification_metrics(torch.randn(2, 3), torch.tensor(labels))


# ---------------------------------------------------------------- linear probes


def test_sgd_probe_equals_a_torch_training_loop():
    """ProtoCLIP's recipe out of torch's own parts: Linear, SGD, CosineAnnealingLR by epoch, no shuffling."""
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
    adamw_probe(*train, *test, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, second.weight)
    other = probes.sgd_probe(*train, *test, epochs=5, batch_size=32, shuffle=True, seed=8)
    assert not torch.equal(first.weight, other.weight)
    assert first.final > 50


def test_a_test_class_that_training_lacks_is_a_miss():
    train, (test_x, test_y) = features_and_labels(0, classes=3), features_and_labels(1, n=40, classes=3)
    known, unknown = test_y < 2, torch.full_like(test_y, 9)
    for probe in (probes.sgd_probe, adamw_probe):
        assert probe(*train, test_x, unknown, epochs=2).best == 0
    assert logistic_probe(*train, test_x, torch.where(known, test_y, 9)) <= 100 * known.float().mean()


def test_logistic_probe_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    (train_x, train_y), (test_x, test_y) = features_and_labels(0), features_and_labels(1)
    predictions = LogisticRegression(C=0.1, max_iter=1000).fit(train_x.numpy(), train_y.numpy()).predict(test_x.numpy())
    ours = logistic_probe(train_x, train_y, test_x, test_y, C=0.1)
    assert ours == pytest.approx(100 * (predictions == test_y.numpy()).mean())


@pytest.mark.parametrize("peak", [-6, -5.97, -3, 0.25, 1.99, 2])
def test_log_sweep_finds_a_single_peak(peak):
    asked = []

    def score(value):
        asked.append(value)
        return -abs(math.log10(value) - peak)

    assert abs(math.log10(log_sweep(score, -6, 2)) - peak) <= 8 / 96 / 2 + 1e-9
    assert len(asked) == len(set(asked)) <= 15
    assert log_sweep(lambda value: 1.0, -6, 2) == pytest.approx(1e-6)


# ---------------------------------------------------------------- errors of evaluation sets


def first_error(folder, workers=0):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        list(EvalSet(folder, pil_to_tensor).batches(4, workers))
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize(
    "name", ["classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt", "test/1.tar"]
)
def test_missing_file_is_named(classification_set, name):
    (classification_set / name).unlink()
    message = first_error(classification_set)
    assert str(classification_set / name) in message and "missing" in message


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("dataset_type.txt", "video", "video"),
        ("test/nshards.txt", "two", "'two'"),
        ("test/nshards.txt", "0", "at least 1"),
        ("zeroshot_classification_templates.txt", "a photo of a cat", "lacks {c}"),
        ("classnames.txt", "cat\n\ndog", "empty line"),
        ("classnames.txt", "", "empty line"),
    ],
)
def test_wrong_text_file_is_named(classification_set, name, text, expected):
    (classification_set / name).write_text(text)
    message = first_error(classification_set)
    assert str(classification_set / name) in message and expected in message


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([("k7.png", b"no image"), ("k7.cls", b"0")], ".png image that cannot be read"),
        ([("k7.png", image_bytes(0)[:60]), ("k7.cls", b"0")], ".png image that cannot be read"),
        ([("k7.png", image_bytes(0)), ("k7.cls", b"3")], "label 3, outside of the 3 classes"),
        ([("k7.png", image_bytes(0)), ("k7.cls", b"-1")], "label -1"),
        ([("k7.png", image_bytes(0)), ("k7.cls", b"cat")], "no integer"),
        ([("k7.png", image_bytes(0))], "no .cls file"),
        ([("k7.cls", b"0")], "no image"),
    ],
)
def test_bad_sample_is_named(tmp_path, files, expected, workers):
    good = [("k1.png", image_bytes(1)), ("k1.cls", b"1")]
    message = first_error(write_set(tmp_path / "bad", [good, files]), workers)
    assert str(tmp_path / "bad" / "test" / "1.tar") in message and "'k7'" in message and expected in message


def test_bad_captions_are_named(tmp_path):
    for i, (data, expected) in enumerate([(b" \n\n", "no caption"), (b"\xff\xfe\x00", "not UTF-8")]):
        files = [("k7.png", image_bytes(0)), ("k7.txt", data)]
        message = first_error(write_set(tmp_path / f"bad{i}", [files], kind="retrieval"))
        assert "'k7'" in message and expected in message


def test_bad_multilabel_is_named(tmp_path):
    for i, (data, expected) in enumerate([(npy([1, 0]), "shape (2,) for 3 classes"), (b"junk", "cannot be read")]):
        files = [("k7.png", image_bytes(0)), ("k7.npy", data)]
        message = first_error(write_set(tmp_path / f"bad{i}", [files], kind="multilabel"))
        assert "'k7'" in message and expected in message


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_tar_is_named(classification_set, workers):
    shard = classification_set / "test" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    assert str(shard) in first_error(classification_set, workers)


def test_empty_split_is_named(tmp_path):
    assert "no samples" in first_error(write_set(tmp_path / "empty", [[]]))


def test_image_size_is_bounded(classification_set, monkeypatch):
    monkeypatch.setattr("shared.data.MAX_PIXELS", 40)
    message = first_error(classification_set)
    assert "8x8 pixels are more than the 40 allowed" in message and "'s0000'" in message


def test_transparent_images_show_white(tmp_path):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:] = (200, 100, 0, 255)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    files = [("a.png", stream.getvalue()), ("a.cls", b"0"), ("b.png", image_bytes(1, mode="L")), ("b.cls", b"1")]
    images, labels = next(EvalSet(write_set(tmp_path / "alpha", [files]), pil_to_tensor).batches(2))
    assert (images[0, :, :, :4] == 255).all() and images[0, :, 0, 6].tolist() == [200, 100, 0]
    assert torch.equal(images[1, 0], images[1, 2]) and labels.tolist() == [0, 1]


def test_train_split_and_same_names(classification_set, tmp_path):
    write_set(tmp_path / "again" / "animals", [[("a.png", image_bytes(0)), ("a.cls", b"2")]], split="train")
    train = EvalSet(tmp_path / "again" / "animals", pil_to_tensor, split="train")
    features, labels = zeroshot.extract_image_features(TinyClip().eval().encode_image, train.batches(4))
    assert features.shape == (1, 16) and labels.tolist() == [2] and not features.requires_grad
    assert not features.is_inference()  # can be trained on
    write_set(tmp_path / "more" / "animals", [[("a.png", image_bytes(0)), ("a.cls", b"2")]])
    with pytest.raises(ValueError, match="different folder names"):
        folders = [classification_set, tmp_path / "more" / "animals"]
        zeroshot.evaluate(TinyClip(), tokenizer, pil_to_tensor, folders)
