"""Pretrained encoders, with random weights in place of those that would be downloaded, and their k-means codebooks."""

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image

from shared import checkpoints, export
from tldr_reduction import encoders

IMAGE = Image.new("RGB", (40, 30), "red")


def test_lite0_is_there_offline():
    encoder = encoders.load_encoder("efficientnet_lite0")
    images = encoder.transform(IMAGE)[None]
    assert images.shape == (1, 3, 128, 128)
    assert encoder.tokens(images).shape == (1, 9, 320) and encoder.features(images).shape == (1, 1280)


def test_timm_models_from_files(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0)
    checkpoints.save_checkpoint(tmp_path / "resnet.pt", {"state_dict": model.state_dict()})
    encoder = encoders.load_encoder(f"timm:resnet10t:{tmp_path / 'resnet.pt'}")
    images = encoder.transform(IMAGE)[None]
    assert encoder.tokens(images).shape == (1, 9, 512)
    torch.testing.assert_close(encoder.features(images), model.eval()(images))


def test_an_export_is_an_encoder(tmp_path):
    torch.manual_seed(0)
    clip, _, transform = open_clip.create_model_and_transforms("ViT-emoji-32")
    export.write(tmp_path, clip.eval(), export.named_config("ViT-emoji-32"), clip.state_dict(), transform)
    encoder = encoders.load_encoder(f"local-dir:{tmp_path}")
    images = encoder.transform(IMAGE)[None]
    torch.testing.assert_close(encoder.features(images), clip.encode_image(images))
    assert encoder.tokens(images).shape[:2] == (1, 9)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lite", "there is no encoder 'lite': it is efficientnet_lite0, timm:NAME"),
        ("timm:no_such_net", "timm:no_such_net is not on this machine"),
        ("timm:resnet10t:gone.pt", "gone.pt, the weights of timm:resnet10t, does not exist"),
        ("ViT-B-32@nothing", "ViT-B-32@nothing is not a model that can be used here"),
    ],
)
def test_errors_of_encoders_that_cannot_be_loaded(name, words):
    with pytest.raises(ValueError, match=words):
        encoders.load_encoder(name)


def test_codes_are_those_of_the_nearest_centroid():
    """Codes are numbered along the first axis, near numbers are similar codes; equal tokens get equal codes."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(50, 9, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0]) + 5
    codebook = encoders.fit_codebook(tokens, 16, 2, seed=0)
    codes = codebook(tokens)
    assert codes.dtype == np.uint16 and codes.shape == (50, 9) and len(np.unique(codes)) == 16
    distances = torch.cdist((tokens.flatten(0, 1) - codebook.mean) @ codebook.axes, codebook.centroids)
    assert np.array_equal(codes.ravel(), distances.argmin(1).numpy())
    assert (codebook.centroids[:, 0].diff() >= 0).all() and codebook.axes.shape == (3, 2)
    again = encoders.Codebook(*(torch.from_numpy(value) for value in codebook.arrays().values()))
    assert np.array_equal(again(tokens), codes)
    assert np.array_equal(encoders.fit_codebook(tokens, 16, 2, seed=0)(tokens), codes)
    assert len(encoders.fit_codebook(tokens[:1], 64, 64, 0).centroids) == 9  # no more codes than tokens
