"""Models that can be teachers, and models that can give initial weights."""

import types
from pathlib import Path

import open_clip
import pytest
import small_models  # noqa: F401  (the models named test)
import torch
import torch.nn.functional as F
from tinyclip_runs import tiny
from torch import nn

from shared import checkpoints, data, export
from tinyclip import teacher
from tinyclip.model import create_model
from tinyclip.train import image_transform

STATISTICS = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def exported(folder: Path, name: str, side: int) -> Path:
    """A random open_clip model in --export's format."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False, force_image_size=side).eval()
    config = export.named_config(name, side)
    export.write(folder, model, config, model.state_dict(), image_transform(side))
    return folder


def test_longer_captions_end_in_the_end_token():
    tokens = torch.tensor([[7, 1, 2, 3, 9], [7, 1, 9, 0, 0], [7, 1, 2, 9, 0]])
    assert teacher.fitted(tokens, 5) is tokens
    assert teacher.fitted(tokens, 3).tolist() == [[7, 1, 9], [7, 1, 9], [7, 1, 9]]
    assert teacher.fitted(tokens, 6, whole=True).shape == (3, 6) and tokens[0, -1] == 9


def test_a_teacher_sees_its_own_size_and_statistics():
    seen = []

    class Model(nn.Module):
        logit_scale = nn.Parameter(torch.zeros(()))

        def encode_image(self, images):
            seen.append(images)
            return images.flatten(1)[:, :4]

        def encode_text(self, tokens):
            return tokens.float()

    pixels = torch.rand(2, 3, 8, 8)
    images = data.ToNormalizedTensor(*STATISTICS).normalise((255 * pixels).round().byte())
    tokens = torch.tensor([[5, 1, 2, 9], [5, 9, 0, 0]])
    asked = teacher.Teacher(Model(), 16, 3, ((0.5,) * 3, (0.25,) * 3))
    image, text, scale = asked(images, tokens)
    assert seen[0].shape == (2, 3, 16, 16) and text.shape == (2, 3) and scale == 1
    assert torch.allclose(image.norm(dim=1), torch.ones(2)) and torch.allclose(text.norm(dim=1), torch.ones(2))
    asked.side = 8
    asked(images, tokens)
    assert torch.allclose(seen[1], ((255 * pixels).round() / 255 - 0.5) / 0.25, atol=1e-5)


def test_which_models_are_taken_how(tmp_path: Path):
    """Plain transformers load as a `CLIP` if they have the student's sizes, all other models as dual encoders."""
    plain, timm = exported(tmp_path / "plain", "ViT-emoji", 24), exported(tmp_path / "timm", "ConvNet-emoji", 16)
    assert teacher.as_clip(f"local-dir:{plain}") == plain and teacher.as_clip(str(timm)) is None
    assert teacher.as_clip("ViT-B-32@openai") == "ViT-B-32@openai" and teacher.as_clip("ViT-L-14@openai") is None
    same = teacher.load_teacher(str(plain), 24, 24)
    assert type(same).__name__ == "CLIP" and not same.cuts_padding
    tokens = open_clip.SimpleTokenizer(context_length=24)(["a cat", "a red heart on white"])
    images = torch.randn(2, 3, 24, 24)
    larger = teacher.load_teacher(str(plain), 48, 24)
    expected = same(F.interpolate(images, (24, 24)), tokens)[0]
    assert torch.allclose(larger(images, tokens)[0], expected, atol=1e-5) and larger.side == 24
    other = teacher.load_teacher(str(timm), 24, 24)
    loaded, _, _ = export.load_model(f"local-dir:{timm}")
    assert torch.allclose(other(images, tokens[:, :9])[1], F.normalize(loaded.encode_text(tokens), dim=-1), atol=1e-5)
    assert (other.side, other.context) == (16, 24)
    config = checkpoints.read_json(plain / "open_clip_config.json")
    config["preprocess_cfg"] |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    checkpoints.write_json(plain / "open_clip_config.json", config)
    shifted = teacher.load_teacher(str(plain), 24, 24)
    pixels = images * torch.tensor(STATISTICS[1]).view(3, 1, 1) + torch.tensor(STATISTICS[0]).view(3, 1, 1)
    assert torch.allclose(shifted(images, tokens)[0], same((pixels - 0.5) / 0.25, tokens)[0], atol=1e-5)
    assert teacher.load_init(str(plain)).geometry["vision"]["image_size"] == 24
    with pytest.raises(ValueError, match="--init .*timm has towers"):
        teacher.load_init(str(timm))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    model = create_model("test-25")
    model.logit_scale.data.fill_(float("nan"))
    torch.save({"state_dict": model.state_dict(), "geometry": model.geometry}, tmp_path / "nan.pt")
    for load in (lambda: teacher.load_init(str(tmp_path / "nan.pt")),
                 lambda: teacher.load_teacher(str(tmp_path / "nan.pt"), 16, 24)):  # fmt: skip
        with pytest.raises(ValueError, match="holds logit_scale"):
            load()


def test_another_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model = tiny()
    torch.save({"state_dict": model.state_dict(), "geometry": model.geometry}, tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match="--init .*tiny.pt .*30 tokens"):
        teacher.load_init(str(tmp_path / "tiny.pt"))
    tokenizer = types.SimpleNamespace(vocab_size=32_000)
    monkeypatch.setattr(export, "load_model", lambda source: (nn.Identity(), None, tokenizer))
    with pytest.raises(ValueError, match="--teacher ViT-B-16-SigLIP@webli"):
        teacher.load_teacher("ViT-B-16-SigLIP@webli", 24, 24)


def test_a_run_says_whose_it_is(tmp_path: Path):
    def saved(folder: Path, **state) -> Path:
        folder.mkdir(parents=True)
        torch.save(state, folder / "checkpoint.pt")
        return folder

    assert checkpoints.trained_by(saved(tmp_path / "a", paper="protoclip")) == "protoclip"
    assert checkpoints.trained_by(saved(tmp_path / "runs/flame/b", epoch=3)) == "flame"
    assert checkpoints.trained_by(saved(tmp_path / "c", epoch=3)) is None
    assert checkpoints.trained_by(tmp_path / "runs/flame") is None
    with pytest.raises(ValueError, match="export it first"):
        export.exported(tmp_path / "c")
    assert export.foreign(tmp_path / "a", "tinyclip") and not export.foreign(tmp_path / "a", "protoclip")
    assert export.foreign("ViT-B-32@openai", "flame") and not export.foreign(tmp_path / "epoch.pt", "flame")
