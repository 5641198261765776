"""Counting concepts in captions and images: properties."""

import numpy as np
import pytest
import torch

from concept_frequency.model import (
    CrossAttention,
    InvertedIndex,
    controlled_counts,
    noun_set,
    query_terms,
    tag_presence,
)


# *_model, spacy_version: what the captions were tagged with. shard*: counts of upstream's search in shards of keys,
# which are too low where a lemma is in another shard than its word; ours has no shards of keys
@pytest.mark.parametrize("seed", range(3))
def test_search_is_the_set_intersection(seed):
    rng = np.random.default_rng(seed)
    docs = [{f"t{t}" for t in rng.zipf(1.5, rng.integers(0, 6)) if t < 40} for _ in range(300)]
    index = InvertedIndex.build(docs)
    queries = [[f"t{t}" for t in rng.integers(1, 44, 3)] for _ in range(60)]
    truth = [[i for i, doc in enumerate(docs) if doc.issuperset(terms)] for terms in queries]
    assert [index.search(terms).tolist() for terms in queries] == truth
    assert index.search([]).tolist() == InvertedIndex.build([]).search(["t1"]).tolist() == []
    assert [np.flatnonzero(column).tolist() for column in index.matches(queries).toarray().T] == truth


def test_corrected_terms():
    lemmas = {"t-shirt": ["t", "-", "shirt"], "crème": ["crème"], "brûlée": ["brûlée"]}.__getitem__
    assert query_terms("T-shirt", lemmas) == ["shirt"]
    assert query_terms("T-shirt", lemmas, corrected=True) == ["t", "shirt"]
    assert query_terms("crème_brûlée", lemmas, corrected=True) == ["crme", "brle"]
    assert query_terms("_crème ", None) == ["crème"]
    assert noun_set([("Eagles", "PROPN"), ("run", "VERB")]) == {"Eagles"}
    assert noun_set([("Eagles", "PROPN")], corrected=True) == {"eagles"}


def test_half_precision_threshold():
    border = np.float32(np.float16(0.7))  # 0.70019531, not above itself though above 0.7
    assert not tag_presence([[border]], 0.7)[0, 0] and border > np.float32(0.7)


def test_controlled_counts_without_kept_images():
    assert controlled_counts([0], [1], [], 2).tolist() == [0, 0]
    assert controlled_counts([], [], [3], 2).tolist() == [0, 0]
    assert controlled_counts([3, 9], [1, 0], [3, 3], 2).tolist() == [0, 2]


def test_a_layer_of_the_tagging_head_is_torchs_attention_with_four_heads():
    """Numbers are so small that the 1e-12 of the layer norms matters, too."""
    torch.manual_seed(0)
    layer, attention = CrossAttention(), torch.nn.MultiheadAttention(768, 4, kdim=512, vdim=512, batch_first=True)
    for parameter in layer.parameters():
        parameter.data.mul_(0.1)
    ours = layer.crossattention["self"]
    weights = {f"{name[0]}_proj_weight": linear.weight for name, linear in ours.items()}
    weights["in_proj_bias"] = torch.cat([linear.bias for linear in ours.values()])
    out = layer.crossattention["output"]["dense"]
    attention.load_state_dict(weights | {"out_proj.weight": out.weight, "out_proj.bias": out.bias})
    queries, tokens = 1e-4 * torch.randn(2, 3, 768), 30 * torch.randn(2, 5, 512)

    def normalised(x: torch.Tensor) -> torch.Tensor:  # the gains are 0.1
        x = x.double()
        return (0.1 * (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-12).sqrt()).float()

    with torch.no_grad():
        x = normalised(queries + attention(queries, tokens, tokens)[0])
        hidden = torch.nn.functional.gelu(layer.intermediate["dense"](x))
        expected = normalised(x + layer.output["dense"](hidden))
        torch.testing.assert_close(layer(queries, tokens), expected, atol=1e-5, rtol=1e-4)
