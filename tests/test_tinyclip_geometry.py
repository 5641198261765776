"""Layouts of weights: the authors' keys, and the geometry of a network read from its weights."""

import json
from pathlib import Path

import pytest
import torch
from tinyclip_runs import TEXT, VISION, example, some_masks, tiny

from shared.clip import STATISTICS
from tinyclip.geometry import (
    CONFIGS,
    config_beside,
    geometry_of_weights,
    open_clip_config,
    statistics_beside,
    weights_file,
)
from tinyclip.masks import prune
from tinyclip.model import CLIP, load_clip


def test_a_pruned_network_is_rebuilt_from_its_weights():
    small = prune(tiny(), some_masks(VISION), some_masks(TEXT))
    again = CLIP(**geometry_of_weights(small.state_dict(), 8))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.encode_image(example()[0]), small.encode_image(example()[0]))
    assert open_clip_config(small.geometry) is None and open_clip_config(tiny().geometry) is not None
    assert (
        open_clip_config(CONFIGS["emoji-convnet-50"]) is None
        and open_clip_config(CONFIGS["RN50"] | {"quick_gelu": True}) is not None
    )


@pytest.fixture
def their_model(tmp_path: Path, request: pytest.FixtureRequest):
    """A CLIPModel of transformers with other heads and MLP ratios in each tower, and its folder."""
    transformers = pytest.importorskip("transformers")
    text = {
        "hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "vocab_size": 30,
        "max_position_embeddings": 8, "bos_token_id": 28, "eos_token_id": 29, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 3, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    text["hidden_act"] = vision["hidden_act"] = getattr(request, "param", "gelu")
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    return model.eval(), tmp_path


@pytest.mark.parametrize("their_model", ["gelu", "quick_gelu"], indirect=True)
def test_a_folder_of_transformers(their_model):
    theirs, folder = their_model
    images, tokens = example()
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=images)
        image, text, scale = load_clip(folder)(images, tokens)
    torch.testing.assert_close(image, expected.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(text, expected.text_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(scale, theirs.logit_scale.exp())


def test_older_files_of_transformers(their_model):
    """A .bin with position ids; without its config, heads and activation are unknown."""
    theirs, folder = their_model
    new = load_clip(folder)
    weights_file(folder).unlink()
    numbers = {f"{tower}_model.embeddings.position_ids": torch.arange(8)[None] for tower in ("text", "vision")}
    torch.save(theirs.state_dict() | numbers, folder / "pytorch_model.bin")
    old = load_clip(folder)
    assert old.geometry == new.geometry
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="activation"):
        load_clip(folder, head_width=8)


def test_configurations_that_fit_no_tower_here(their_model):
    _, folder = their_model
    said = json.loads((folder / "config.json").read_text())
    for tower, key, value in (("text", "hidden_act", "relu"), ("vision", "layer_norm_eps", 1e-6)):
        other = said | {f"{tower}_config": said[f"{tower}_config"] | {key: value}}
        (folder / "config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match="config.json: .*quick_gelu"):
            load_clip(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json is not"):
        load_clip(folder)
    weights_file(folder).write_bytes(b"?")
    with pytest.raises(ValueError, match="not a complete"):
        load_clip(folder)


def test_statistics_of_images(tmp_path: Path):
    file = tmp_path / "open_clip_model.safetensors"
    assert statistics_beside(file) == STATISTICS
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')
    assert statistics_beside(file) == ((0.5,) * 3, (1.0,) * 3)
    config = tmp_path / "open_clip_config.json"
    config.write_text('{"preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}')
    assert statistics_beside(file) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    config.write_text('{"preprocess_cfg": {"mean": [0.1, 0.2], "std": [0.4, 0.5, 0.6]}}')
    with pytest.raises(ValueError, match="three means"):
        statistics_beside(file)


def test_what_transformers_leaves_out_of_a_configuration(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"text_config": {"hidden_act": "gelu"}, "vision_config": {}}')
    with pytest.raises(ValueError, match="quick_gelu"):  # the other's is quick_gelu
        config_beside(tmp_path / "model.safetensors", transformers=True)
    (tmp_path / "config.json").write_text('{"text_config": {}, "vision_config": {"hidden_size": 384}}')
    said = config_beside(tmp_path / "model.safetensors", transformers=True)
    assert said == {"quick_gelu": True, "head_width": (32, 64)}
