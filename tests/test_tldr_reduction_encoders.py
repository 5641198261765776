"""Encoders with their k-means codebooks, and scorers: BLIP's matching head of runs and of transformers' folders, the
cosine of dual encoders. Random weights stand in for those that would be downloaded."""

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from tldr_reduction_runs import chain, folder, tiny  # noqa: F401

from shared import export
from tldr_reduction import checkpoints, encoders
from tldr_reduction.model import CodebookCaptioner

SCRIPT = "tldr_reduction.train"

IMAGE = Image.new("RGB", (40, 30), "red")


def test_lite0_is_there_offline():
    encoder = encoders.load_encoder("efficientnet_lite0")
    images = encoder.transform(IMAGE)[None]
    assert images.shape == (1, 3, 128, 128)
    assert encoder.tokens(images).shape == (1, 9, 320) and encoder.features(images).shape == (1, 1280)


def test_timm_models(monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: model)
    encoder = encoders.load_encoder("timm:resnet10t")
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
        ("lite", "'lite'"),
        ("timm:no_such_net", "timm:no_such_net"),
        ("ViT-B-32@nothing", "ViT-B-32@nothing"),
    ],
)
def test_errors_of_encoders_that_cannot_be_loaded(name, words):
    with pytest.raises(ValueError, match=words):
        encoders.load_encoder(name)


def test_codes_are_those_of_the_nearest_centroid(monkeypatch):
    """Codes are numbered along the first axis, near numbers are similar codes; equal tokens get equal codes."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(50, 9, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0]) + 5
    monkeypatch.setattr(encoders, "CODES", 16)
    monkeypatch.setattr(encoders, "CODE_DIM", 2)
    codebook = encoders.fit_codebook(tokens, seed=0)
    codes = codebook(tokens)
    assert codes.dtype == np.uint16 and codes.shape == (50, 9) and len(np.unique(codes)) == 16
    distances = torch.cdist((tokens.flatten(0, 1) - codebook.mean) @ codebook.axes, codebook.centroids)
    assert np.array_equal(codes.ravel(), distances.argmin(1).numpy())
    assert (codebook.centroids[:, 0].diff() >= 0).all() and codebook.axes.shape == (3, 2)
    again = encoders.Codebook(*(torch.from_numpy(value) for value in codebook.arrays().values()))
    assert np.array_equal(again(tokens), codes)
    assert np.array_equal(encoders.fit_codebook(tokens, seed=0)(tokens), codes)
    assert len(encoders.fit_codebook(tokens[:1], 0).centroids) == 9  # no more codes than tokens


# ------------------------------------------------------------------------------------------------------------- scorers

CPU = torch.device("cpu")
CAPTIONS = ["a red heart", "grinning face"]


def test_a_run_and_its_export_score_alike(chain, folder):
    """A folder exported for transformers, with its tokenizer, gives the same scores and captions as the run."""
    model, settings, tokenizer = checkpoints.load_run(chain["scorer"])
    checkpoints.export_blip(model, settings, tokenizer, folder / "exported")
    ours = encoders.load_scorer(str(chain["scorer"]), CPU)
    theirs = encoders.load_scorer(str(folder / "exported/retrieval"), CPU)
    images = ours.transform(Image.new("RGB", (30, 30), "red"))[None].repeat(2, 1, 1, 1)
    assert ours.matches and theirs.matches
    torch.testing.assert_close(theirs.score(images, CAPTIONS), ours.score(images, CAPTIONS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.encode_text(CAPTIONS), ours.encode_text(CAPTIONS), rtol=1e-4, atol=1e-5)
    writer, settings, words = checkpoints.load_model(str(folder / "exported/captioning"), "finetune")
    assert settings.stage == "finetune" and len(words) == len(tokenizer)
    written = writer.generate(images, words.prompt_ids(), max_length=10)
    state = model.eval()
    expected = CodebookCaptioner(state.visual_encoder, state.text_decoder, None, sep_token_id=tokenizer.sep)
    assert torch.equal(written, expected.generate(images, tokenizer.prompt_ids(), max_length=10))
    with pytest.raises(ValueError, match="cannot write captions"):
        checkpoints.load_model(str(folder / "exported/retrieval"), "finetune")


def test_cosine_of_a_dual_encoder(tmp_path):
    torch.manual_seed(0)
    clip, _, transform = open_clip.create_model_and_transforms("ViT-emoji-32")
    export.write(tmp_path, clip.eval(), export.named_config("ViT-emoji-32"), clip.state_dict(), transform)
    scorer = encoders.load_scorer(f"local-dir:{tmp_path}", CPU)
    images = torch.stack([scorer.transform(Image.new("RGB", (30, 30), colour)) for colour in ("red", "blue")])
    tokens = open_clip.get_tokenizer("ViT-emoji-32", context_length=clip.context_length)(CAPTIONS)
    expected = F.cosine_similarity(clip.encode_image(images), clip.encode_text(tokens))
    torch.testing.assert_close(scorer.score(images, CAPTIONS), expected, rtol=1e-4, atol=1e-5)
    assert not scorer.matches and scorer.encode_image(images).norm(dim=1).allclose(torch.ones(2))


def test_a_clip_of_ours_scores_by_its_cosine(chain):
    scorer = encoders.load_scorer(str(chain["clip"]), CPU)
    scores = scorer.score(torch.stack([scorer.transform(Image.new("RGB", (30, 30), "red"))] * 2), CAPTIONS)
    assert not scorer.matches and scores.shape == (2,) and (scores.abs() <= 1 + 1e-5).all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", "gone is no run folder"),
        ("/gone", "/gone is no run folder"),
        ("local-dir:/gone", "open_clip_config.json"),
        ("nobody/nothing", "nobody/nothing .*hub"),
        ("ViT-B-32@nothing", "ViT-B-32@nothing"),
    ],
)
def test_errors_of_scorers_that_cannot_be_loaded(name, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=words):
        encoders.load_scorer(name, CPU)
