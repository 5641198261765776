"""Tagging of captions and images."""

import json

import numpy as np
import pytest
import torch
from test_concept_frequency_train import PIPELINE, SHARDS, arms, folder, shards  # noqa: F401

from concept_frequency import tagging
from concept_frequency.concepts import load_counts
from concept_frequency.model import noun_set
from shared import data


def first_captions(n: int) -> list[str]:
    """Captions of the first n samples of a shard."""
    shard = data.Shards([str(SHARDS / "00000.tar")], n)
    return [shard.caption(i) for i in range(len(shard))]


def test_exact_tagging_equals_that_of_the_whole_pipeline():
    nlp, texts = tagging.load_spacy(PIPELINE), list(dict.fromkeys(first_captions(200)))
    whole = [noun_set((t.lemma_, t.pos_) for t in doc) for doc in nlp.pipe(texts)]
    assert list(tagging.tag_captions(texts + texts[:5], nlp, batch_size=64)) == whole + whole[:5]


def test_clip_tagger_prefers_the_right_concept(arms, tmp_path):
    """On a trained arm, the right concept outscores a plain picture more often than a wrong concept does."""
    names = list(load_counts(arms["zipf"] / "frequencies.json"))
    made = tagging.load_tagger("clip", names, str(arms["zipf"]), "", "", None, True, "cpu")
    shard = data.Shards([str(SHARDS / "00000.tar")], 8)
    images = torch.stack([made.transform(shard.read(i).image) for i in range(8)])
    p = tagging.tag_images(images, made.probabilities)
    assert p.shape == (8, len(names)) and p.dtype == np.float16 and 0 <= p.min() <= p.max() <= 1
    (tmp_path / "d.json").write_text(json.dumps([{name: [f"a {name}.", "an icon"]} for name in names]))
    described = tagging.load_tagger("clip", names, str(arms["zipf"]), "", "", str(tmp_path / "d.json"), True, "cpu")
    assert not np.array_equal(tagging.tag_images(images, described.probabilities), p)
    with pytest.raises(ValueError, match="but not of 'unknown'"):
        tagging.load_tagger("clip", ["unknown"], str(arms["zipf"]), "", "", str(tmp_path / "d.json"), True, "cpu")
    with pytest.raises(ValueError, match="clip, ram"):
        tagging.load_tagger("other", names, "", "", "", None, True, "cpu")


def test_ram_plus_loads_its_layout():
    """Swin-T instead of Swin-L, with the keys of Microsoft's and RAM++'s files."""
    torch.manual_seed(0)
    model = tagging.RAMPlus("swin_tiny_patch4_window7_224", 224)
    state = {}
    for key, value in model.visual_encoder.state_dict().items():
        stage = key.split(".")
        if stage[0] == "layers" and stage[2] == "downsample":  # timm has it at the start of the next stage
            key = ".".join(["layers", str(int(stage[1]) - 1), *stage[2:]])
        state[f"visual_encoder.{key}"] = torch.randn_like(value) * 0.02
    state |= {k: torch.randn_like(v) * 0.02 for k, v in model.head.state_dict().items()}
    state |= {"label_embed": torch.zeros(51, 512), "visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(1)}
    other = tagging.RAMPlus("swin_tiny_patch4_window7_224", 224).eval()
    other.load_checkpoint(state)
    moved = other.visual_encoder.layers[1].downsample.reduction.weight
    torch.testing.assert_close(moved, state["visual_encoder.layers.0.downsample.reduction.weight"])
    with torch.no_grad():
        one = torch.nn.functional.normalize(torch.randn(6, 1, 512), dim=-1)
        p = other(torch.randn(2, 3, 224, 224), one)
        q = other(torch.randn(2, 3, 224, 224), one.expand(6, 5, 512))
    assert p.shape == q.shape == (2, 6) and 0 < p.min() < p.max() < 1
    del state["fc.bias"]
    with pytest.raises(ValueError, match="not a checkpoint of RAM"):
        other.load_checkpoint(state)
