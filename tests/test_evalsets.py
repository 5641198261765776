"""Evaluation sets, read as clip-benchmark reads them; what is wrong with one is named."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_zeroshot import (  # noqa: F401
    TEMPLATES,
    TinyClip,
    classification_set,
    image_bytes,
    npy,
    retrieval_set,
    their_accuracy_with_recent_numpy,
    their_loader,
    tokenizer,
    write_set,
)
from torchvision.transforms.functional import pil_to_tensor

from shared import zeroshot
from shared.evalsets import EvalSet


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
