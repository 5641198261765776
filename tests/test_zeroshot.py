"""Metrics, reader of evaluation sets and linear probes: equality with clip-benchmark, properties, errors."""

import json
import math

import clip_benchmark.metrics.zeroshot_classification as their_classification
import clip_benchmark.metrics.zeroshot_retrieval as their_retrieval
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from evaluation_sets import (  # noqa: F401
    TEMPLATES,
    TinyClip,
    classification_set,
    features_and_labels,
    image_bytes,
    npy,
    retrieval_set,
    their_accuracy_with_recent_numpy,
    their_loader,
    tokenizer,
    write_set,
)
from torchvision.transforms.functional import pil_to_tensor

from shared import clip, pictures, run, zeroshot

# ---------------------------------------------------------------- a tiny model and tiny evaluation sets


@pytest.fixture
def multilabel_set(tmp_path):
    targets = np.random.default_rng(0).integers(0, 2, (12, 3))
    files = []
    for i in range(12):
        files += [(f"s{i:04d}.png", image_bytes(i)), (f"s{i:04d}.npy", npy(targets[i]))]
    return write_set(tmp_path / "multi", [files], kind="multilabel")


# ---------------------------------------------------------------- equality with clip-benchmark


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
    scores = pictures.unpacked(ours["animals"]["top1 by picture"])
    assert scores.mean() == pytest.approx(ours["animals"]["top1"]) and set(scores) <= {0.0, 100.0}

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


# ---------------------------------------------------------------- properties of the metrics


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
    ("labels", "message"), [([0, 3], "do not fit 3"), ([-1, 0], "do not fit 3"), ([0], "1 labels do not match 2 rows")]
)
def test_wrong_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        zeroshot.classification_metrics(torch.randn(2, 3), torch.tensor(labels))


def test_a_small_set_is_decoded_once_for_a_learning_curve(tmp_path, monkeypatch):
    seen = []

    def transform(image):
        seen.append(image.size)
        return torch.zeros(3, 8, 8)

    files = [(f"{i}.{kind}", image_bytes(i) if kind == "png" else b"1") for i in range(3) for kind in ("png", "cls")]
    write_set(tmp_path, [files[:4], files[4:]])
    model = TinyClip()
    first, again = (zeroshot.quick_top1(model, tokenizer, transform, tmp_path) for _ in range(2))
    assert len(seen) == 3 and first == again and model.training
    monkeypatch.setattr(zeroshot, "SMALL", 10)
    for _ in range(2):
        assert zeroshot.quick_top1(model, tokenizer, transform, tmp_path) == first
    assert len(seen) == 9
    zeroshot._kept.clear()


def test_images_that_share_a_caption_are_counted(capsys):
    assert zeroshot.shared_captions([["a", "b"], ["c"], ["b"], ["d", "d"]]) == 2
    assert zeroshot.shared_captions([["a"], ["b"]]) == 0
    zeroshot.say_shared("mine", [["a", "b"], ["c"], ["b"], ["d", "d"]])
    assert capsys.readouterr().out.startswith("mine: 2 of 4 images share a caption with another image; ")
    zeroshot.say_shared("mine", [["a"], ["b"]])
    assert capsys.readouterr().out == ""


VIETNAMESE = "một người phụ nữ đang mỉm cười ngồi bên cửa sổ và đọc một quyển sách cũ vào buổi chiều"


def test_captions_that_are_cut_are_counted_once(monkeypatch, capsys):
    """By the evaluation, if more than one in a hundred are, and in training after the first texts."""
    monkeypatch.delenv(run.QUIET, raising=False)
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    encode = lambda tokens: torch.zeros(len(tokens), 2)  # noqa: E731
    for few, many, said in ((0, 300, ""), (2, 298, ""), (5, 295, "5 of 300 captions fill all 77 tokens")):
        zeroshot.encode_texts(encode, tokenizer, [VIETNAMESE] * few + ["a dog"] * many, desc="captions")
        assert said in (printed := capsys.readouterr().out) and bool(said) == bool(printed)
    remembering = clip.RememberingTokenizer(tokenizer)
    for start in range(0, 400, 50):
        remembering([f"{VIETNAMESE} {number}" for number in range(start, start + 50)])
    assert capsys.readouterr().out.count("200 of 200 captions") == 1
    few = clip.RememberingTokenizer(tokenizer)
    for _ in range(5):  # epochs
        few([f"{VIETNAMESE} {number}" for number in range(50)])
    assert capsys.readouterr().out.count("50 of 50 captions") == 1
