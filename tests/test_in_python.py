"""The lines of docs/export.md that embed a picture and a text, with small files in the layouts of the authors'."""

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import small_models  # noqa: F401  (the models named test)
import torch
from in_python import authors_weights, execute, lines_of
from torch import nn

from attentive_mask_clip.model import create_model as create_aclip
from protoclip.model import create_model as create_protoclip
from shared import export
from tinyclip.model import create_model as create_tinyclip

FILES: dict[str, tuple[Callable[[], nn.Module], tuple[str, str]]] = {  # a small model, and what names it in the lines
    "epoch_400.pt": (lambda: create_protoclip("ViT-test"), ('"RN50"', '"ViT-test"')),
    "slip_base_25ep.pt": (lambda: create_aclip("slip", "test"), ("vit_b16", "test")),
    "TinyCLIP-auto-ViT-45M-32-Text-18M-LAION400M.pt": (
        lambda: create_tinyclip("TinyCLIP-ViT-8M-16-Text-3M"),
        ("quick", "quick"),
    ),
    "cyclip_RN50_CC3M.pt": (lambda: open_clip.create_model("ViT-test"), ("RN50-quickgelu", "ViT-test")),
}


@pytest.mark.parametrize("file", FILES)
def test_files_of_the_authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    create, names = FILES[file]
    monkeypatch.chdir(tmp_path)
    torch.save(authors_weights(create()), file)
    execute(lines_of(file).replace(*names))


def test_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = open_clip.create_model("ViT-test").eval()
    view = open_clip.image_transform(open_clip.get_model_config("ViT-test")["vision_cfg"]["image_size"], is_train=False)
    export.write("exported/mine", model, open_clip.get_model_config("ViT-test"), model.state_dict(), view)
    lines = lines_of("local-dir:exported/mine")
    assert "model.eval()" in lines
    execute(lines)


def test_blip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text = sizes | dict(vocab_size=28, max_position_embeddings=24, encoder_hidden_size=16, projection_dim=8)
    vision = sizes | dict(image_size=16, patch_size=8, layer_norm_eps=1e-6)
    settings = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)
    transformers.BlipForImageTextRetrieval(settings).save_pretrained(tmp_path / "blip")
    (tmp_path / "blip/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuv"]))
    monkeypatch.chdir(tmp_path)
    execute(lines_of("Salesforce/blip-itm-base-coco").replace("Salesforce/blip-itm-base-coco", "blip"))
