"""Evaluation sets are read like clip-benchmark reads them, and errors name the problem."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_sets import (  # noqa: F401
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
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from shared import evalsets, zeroshot
from shared.data import ToNormalizedTensor
from shared.errors import UserError
from shared.evalsets import EvalSet, set_names


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


def test_targets_are_read_without_images(classification_set, retrieval_set, monkeypatch: pytest.MonkeyPatch):
    for folder in (classification_set, retrieval_set):
        both = [(key, target) for key, _, target in EvalSet(folder, pil_to_tensor)]
        with monkeypatch.context() as patch:
            patch.setattr(evalsets, "decode_image", lambda _: pytest.fail("decoded"))
            assert list(EvalSet(folder, pil_to_tensor).targets()) == both


def first_error(folder, workers=0):
    with pytest.raises(UserError) as error:
        list(EvalSet(folder, pil_to_tensor).batches(4, workers))
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_a_set_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, hint in (("data/emoji/eval/names_id", "make data"), ("mine", "")):
        message = first_error(folder)
        assert f"{folder} does not exist" in message and hint in message, message


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


def test_files_of_windows_editors_are_read(classification_set):
    """They begin with a byte order mark, and their lines end in CR LF."""
    names = EvalSet(classification_set, pil_to_tensor).classnames
    for name in ("classnames.txt", "dataset_type.txt", "test/nshards.txt"):
        text = (classification_set / name).read_text() if name != "dataset_type.txt" else "classification\n"
        (classification_set / name).write_text(text, encoding="utf-8-sig", newline="\r\n")
    assert EvalSet(classification_set, pil_to_tensor).classnames == names


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([("k7.png", b"no image"), ("k7.cls", b"0")], ".png image"),
        ([("k7.png", image_bytes(0)[:60]), ("k7.cls", b"0")], ".png image"),
        ([("k7.png", image_bytes(0)), ("k7.cls", b"3")], "label 3"),
        ([("k7.png", image_bytes(0)), ("k7.cls", b"-1")], "label -1"),
        ([("k7.png", image_bytes(0)), ("k7.cls", b"cat")], "an integer"),
        ([("k7.png", image_bytes(0))], "no .cls file"),
        ([("k7.cls", b"0")], "no image"),
    ],
)
def test_bad_sample_is_named(tmp_path, files, expected, workers):
    good = [("k1.png", image_bytes(1)), ("k1.cls", b"1")]
    message = first_error(write_set(tmp_path / "bad", [good, files]), workers)
    assert str(tmp_path / "bad" / "test" / "1.tar") in message and "'k7'" in message and expected in message


def test_bad_captions_are_named(tmp_path):
    for i, (data, expected) in enumerate([(b" \n\n", "no caption"), (b"\xff\xfe\x00", "UTF-8")]):
        files = [("k7.png", image_bytes(0)), ("k7.txt", data)]
        message = first_error(write_set(tmp_path / f"bad{i}", [files], kind="retrieval"))
        assert "'k7'" in message and expected in message


def test_bad_multilabel_is_named(tmp_path):
    for i, (data, expected) in enumerate([(npy([1, 0]), "shape (2,)"), (b"junk", "cannot be read")]):
        files = [("k7.png", image_bytes(0)), ("k7.npy", data)]
        message = first_error(write_set(tmp_path / f"bad{i}", [files], kind="multilabel"))
        assert "'k7'" in message and expected in message


def many_shards(folder: Path, shards: int, samples: int) -> Path:
    """Numbered samples of 5 KB in several shards; the number is the label."""
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(samples)]
    contents = []
    for i, image in enumerate(noise):
        stream = io.BytesIO()
        image.save(stream, "png")
        contents.append([(f"k{i:03d}.png", stream.getvalue()), (f"k{i:03d}.cls", f"{i % 3}".encode())])
    return write_set(folder, [sum(contents[j::shards], []) for j in range(shards)])


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")
@pytest.mark.parametrize("shards", [1, 2, 4, 6])
def test_a_worker_reads_its_own_samples_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int):
    folder = many_shards(tmp_path / "set", shards, 48)
    whole = EvalSet(folder, pil_to_tensor)
    size, expected = sum(shard.stat().st_size for shard in whole.shards), sorted(key for key, _, _ in whole)
    seen = []
    for rank in range(4):
        monkeypatch.setattr(evalsets, "get_worker_info", lambda rank=rank: SimpleNamespace(id=rank, num_workers=4))
        before = bytes_read()
        own = [key for key, _, _ in EvalSet(folder, pil_to_tensor)]
        share = len(own) / 48
        assert bytes_read() - before < (share + 0.25) * size + 4096  # and headers, of all samples if shards are few
        assert abs(share - 1 / 4) < 0.1
        seen += own
    assert sorted(seen) == expected


@pytest.mark.parametrize("shards", [1, 5])
def test_pixels_are_normalised_behind_the_workers(tmp_path: Path, shards: int):
    transform = transforms.Compose([transforms.CenterCrop(32), ToNormalizedTensor((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))])
    eval_set = EvalSet(many_shards(tmp_path / "set", shards, 24), transform)
    expected = sorted((tuple(image.flatten().tolist()[:8]), label) for _, image, label in eval_set)
    for workers in (0, 2):
        found = []
        for images, labels in eval_set.batches(5, workers, "cpu"):
            assert images.dtype == torch.float32
            found += [(tuple(x.flatten().tolist()[:8]), y) for x, y in zip(images, labels.tolist(), strict=True)]
        assert sorted(found) == expected


def test_files_of_no_sample_are_passed_over(tmp_path: Path):
    files = [("._a.png", b"?"), ("README", b"?"), ("a.png", image_bytes(0)), ("a.cls", b"1"), ("a.json", b"{}")]
    assert [(key, label) for key, _, label in EvalSet(write_set(tmp_path / "s", [files]), pil_to_tensor)] == [("a", 1)]
    twice = [("a.png", image_bytes(0)), ("a.cls", b"1"), ("a.png", image_bytes(1))]
    assert "two .png files" in first_error(write_set(tmp_path / "twice", [twice]))


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_tar_is_named(classification_set, workers):
    shard = classification_set / "test" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    assert str(shard) in first_error(classification_set, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_empty_split_is_named(tmp_path, workers):
    assert "no samples" in first_error(write_set(tmp_path / "empty", [[], [], []]), workers)


def test_image_size_is_bounded(classification_set, monkeypatch):
    monkeypatch.setattr("shared.data.MAX_PIXELS", 40)
    message = first_error(classification_set)
    assert "8x8 pixels" in message and "'s0000'" in message


def test_transparent_images_show_white(tmp_path):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:] = (200, 100, 0, 255)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    files = [("a.png", stream.getvalue()), ("a.cls", b"0"), ("b.png", image_bytes(1, mode="L")), ("b.cls", b"1")]
    images, labels = next(EvalSet(write_set(tmp_path / "alpha", [files]), pil_to_tensor).batches(2))
    assert (images[0, :, :, :4] == 255).all() and images[0, :, 0, 6].tolist() == [200, 100, 0]
    assert torch.equal(images[1, 0], images[1, 2]) and labels.tolist() == [0, 1]


def test_train_split_and_names_of_sets(classification_set, tmp_path):
    write_set(tmp_path / "again" / "animals", [[("a.png", image_bytes(0)), ("a.cls", b"2")]], split="train")
    train = EvalSet(tmp_path / "again" / "animals", pil_to_tensor, split="train")
    features, labels = zeroshot.extract_image_features(TinyClip().eval().encode_image, train.batches(4))
    assert features.shape == (1, 16) and labels.tolist() == [2] and not features.requires_grad
    assert not features.is_inference()  # can be trained on
    write_set(tmp_path / "more" / "animals", [[("a.png", image_bytes(0)), ("a.cls", b"2")]])
    folders = [classification_set, tmp_path / "more" / "animals"]
    found = zeroshot.evaluate(TinyClip(), tokenizer, pil_to_tensor, folders)
    assert list(found) == [f"{tmp_path.name}-animals", "more-animals"]


@pytest.mark.parametrize("folders, names", [
    (["data/mine/eval/held_out", "data/classes"], ["held_out", "classes"]),
    (["data/a/eval/held_out", "data/b/eval/held_out", "x"], ["a-eval-held_out", "b-eval-held_out", "x"]),
    (["a/x", "b/x/"], ["a-x", "b-x"]),
    ([], []),
])  # fmt: skip
def test_sets_of_one_name_are_told_apart_by_their_folders(folders: list[str], names: list[str]):
    assert set_names(folders) == names


def test_a_set_is_named_once():
    with pytest.raises(ValueError, match="a/x is named twice"):
        set_names(["b/x", "./a/x", "a/x"])
