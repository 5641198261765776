"""Small evaluation sets, and CLIP-benchmark's functions that read and score them."""

import io
import tarfile
from itertools import chain

import clip_benchmark.metrics.zeroshot_classification as their_classification
import numpy as np
import pytest
import torch
from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

TEMPLATES = ["a photo of a {c}.", "art of the {c}", "{c}"]


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
    """Write an evaluation set; shards: for each tar, a list of (file name, bytes)."""
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


def features_and_labels(seed, n=200, classes=7, dim=12, noise=1.5):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    return means[labels] + noise * torch.randn(n, dim, generator=generator), labels


@pytest.fixture(autouse=True)
def their_accuracy_with_recent_numpy(monkeypatch):
    """Replaces only `float()` of one-element arrays in clip-benchmark 1.6.2, which numpy 2.4 refuses."""
    one_element = lambda value: value.item() if isinstance(value, np.ndarray) else float(value)  # noqa: E731
    monkeypatch.setattr(their_classification, "float", one_element, raising=False)


def their_loader(folder, kind="classification"):
    """clip-benchmark's reader with batches."""
    dataset = build_wds_dataset("set", pil_to_tensor, data_dir=str(folder))
    collate = image_captions_collate_fn if kind == "retrieval" else None
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, collate_fn=collate)
    return dataset, loader
