"""Counting concepts in captions and images: golden cases and properties."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Case
from scipy import sparse

from concept_frequency import count
from concept_frequency.captions import Partition
from concept_frequency.config import CountConfig
from concept_frequency.model import (
    CrossAttention,
    InvertedIndex,
    OpenSetHead,
    controlled_counts,
    description_weights,
    known_terms,
    label_embedding,
    matched_counts,
    noun_set,
    query_terms,
    tag_presence,
)
from concept_frequency.statistics import misaligned, misalignment_degrees

FAMILIES = ("retrieval", "image_search")


def both(case: Case) -> tuple[Case, Case]:
    """The .npz and the .json of a case with two files, `retrieval.npz` and `retrieval_concepts.json`."""
    stem, suffix = case.path.stem, {".npz": ".json", ".json": ".npz"}[case.path.suffix]
    names = [stem.replace("_concepts", ""), f"{stem}_concepts", *(stem.replace(f, f"{f}_concepts") for f in FAMILIES)]
    path = next((p for name in names if name != stem and (p := case.path.with_name(name + suffix)).exists()), None)
    assert path is not None, f"{case.path} lacks its other file"
    return (Case(path), case) if suffix == ".npz" else (case, Case(path))


def counts_of(parts: list[list[set[str]]], queries: list[list[str]], folder: Path, monkeypatch) -> list[int]:
    """Counts from indexes of partitions, with `count.index_partition` and `count.sum_partitions`; nothing is tagged."""
    texts, cfg = [], CountConfig(workers=1)
    for i, nouns in enumerate(parts):
        monkeypatch.setattr(count, "read_captions", lambda *_: ())
        monkeypatch.setattr(count, "tag_captions", lambda *_, nouns=nouns: nouns)
        texts.append(count.index_partition(count.Job(Partition("", ".txt", "", 0), cfg, str(folder / f"{i}.npz"))))
    return count.sum_partitions(cfg, queries, texts, []).text.tolist()


# *_model, spacy_version: what the captions were tagged with. shard*: counts of upstream's search in shards of keys,
# which are too low where a lemma is in another shard than its word; ours has no shards of keys
@pytest.mark.golden("concept_frequency", "text_search", unused=("*_model", "spacy_version", "shard*"))
def test_text_search(case, tmp_path, monkeypatch):
    for caption, tokens in zip(case["captions"], case["tokens"], strict=True):
        assert "".join("".join(text for text, *_ in tokens).split()) == "".join(caption.split())
    docs = [[(lemma, pos) for _, lemma, pos in tokens] for tokens in case["tokens"]]
    nouns = [noun_set(doc) for doc in docs]
    assert [sorted(n) for n in nouns] == [sorted(n) for n in case["nouns"]]

    index = InvertedIndex.build(nouns)
    ends = list(itertools.accumulate(case["chunk_sizes"]))
    chunks = [nouns[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert index.matrix.shape == (len(docs), len(index.terms))
    assert {term: index.postings(term).tolist() for term in index.terms} == case["index"]
    for name, parts in (("single_chunk", [nouns]), ("three_chunks", chunks)):
        if f"raw_posting_length_{name}" in case:  # what upstream's lists are too long by
            found = [set(InvertedIndex.build(part).terms) for part in parts]
            raw = {t: len(index.postings(t)) + sum(t in terms for terms in found) for t in index.terms}
            assert raw == case[f"raw_posting_length_{name}"]

    for method, queries in case["queries"].items():
        assert list(queries) == case["concepts"]
        lemma = {u: t for query in queries.values() for u, t in zip(query["unigrams"], query["terms"], strict=True)}
        lemmas_of = None if method == "lowercased" else lambda word, lemma=lemma: [lemma[word]]
        for concept, query in queries.items():
            terms = query_terms(concept, lemmas_of)
            assert terms == query["terms"], concept
            known = known_terms(terms, index.place)
            assert known == query["known_terms"], concept
            assert index.search(known).tolist() == query["hits"], concept
        all_terms = [query["terms"] for query in queries.values()]
        counts = [query["count"] for query in queries.values()]
        assert counts_of([nouns], all_terms, tmp_path, monkeypatch) == counts
        assert counts_of(chunks, all_terms, tmp_path, monkeypatch) == counts


@pytest.mark.golden("concept_frequency", "partitioned_counting")
def test_partitioned_counting(case, tmp_path, monkeypatch):
    def ragged(values, offsets):
        return [values[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]

    docs = [set(map(str, terms)) for terms in ragged(case["doc_terms"], case["doc_offsets"])]
    queries = [list(map(str, terms)) for terms in ragged(case["query_terms"], case["query_offsets"])]
    assert max(map(int, set.union(*docs))) < case["vocabulary_size"]
    shards = case["partition"].tolist()
    parts = [[d for d, s in zip(docs, shards, strict=True) if s == i] for i in set(shards)]
    case.close("counts", counts_of([docs], queries, tmp_path, monkeypatch))
    case.close("counts", counts_of(parts, queries, tmp_path, monkeypatch))
    local = [counts_of([part], queries, tmp_path, monkeypatch) for part in parts]
    case.close("counts_with_partition_local_vocabulary", np.sum(local, axis=0))


@pytest.mark.golden("concept_frequency", "image_search")
def test_image_search(case):
    case, truth = both(case)
    concepts = truth["concepts"]
    probabilities = case["probs_half_as_float32"]
    assert len(concepts) == probabilities.shape[1]
    k = len(concepts)
    for kind in (probabilities, probabilities.half()):
        present = np.stack([tag_presence(kind, threshold) for threshold in case["thresholds"].tolist()])
        case.close("present", present.astype(np.int64))
        case.close("counts", present.sum(axis=1))
        shards = [tag_presence(kind[a:b], 0.7) for a, b in itertools.pairwise(case["shard_bounds"].tolist())]
        assert np.array_equal(np.concatenate(shards), tag_presence(kind, 0.7))
    used = (case["thresholds"] - 0.7).abs().argmin()  # the paper's
    image, text = sparse.csr_array(present[used]), sparse.csr_array(case["text_hits"].numpy() != 0)
    case.close("integrated_counts", matched_counts(text, image))
    case.close("control_counts", controlled_counts(*np.nonzero(present[used]), case["control_keep_ids"], k))
    single = case["single_word"].numpy() != 0
    for name, found in (("search", text), ("unigram", text.multiply(single[None]).tocsr())):
        number = misaligned(found, image)
        documents = [int((of.sum(axis=1) > 0).sum()) for of in (found, image)]
        degrees = misalignment_degrees(number, *documents, case["dataset_size"].item())
        case.close(f"misalign_{name}_count", [number])
        case.close(f"misalign_{name}", [number, *degrees], rtol=1e-7, atol=1e-7)


@pytest.mark.golden("concept_frequency", "ram_openset_head")
def test_ram_openset_head(case):
    class Stub(torch.nn.Module):
        """The case's replacement of the cross-attention: q + softmax(q k^T / 8) k."""

        def __init__(self, dim: int, width: int):
            super().__init__()
            self.kv = torch.nn.Linear(dim, width)

        def forward(self, q, tokens):
            k = self.kv(tokens)
            return q + (q @ k.transpose(1, 2) / 8).softmax(dim=-1) @ k

    state = case.group("param/")
    label_embed = state.pop("label_embed")
    state = {key.replace("kv.", "tagging_head.kv."): value for key, value in state.items()}
    (dim, token_dim), (width, _) = state["image_proj.weight"].shape, state["wordvec_proj.weight"].shape
    head = OpenSetHead(Stub(dim, width), token_dim, width, dim)
    head.load_state_dict(state)
    descriptions, tokens = case["label_embeddings"], case["image_tokens"]
    torch.testing.assert_close(label_embed.view_as(descriptions), descriptions, rtol=0, atol=0)
    with torch.no_grad():
        cls = head.image_proj(tokens)[:, 0]
        weights = description_weights(cls, descriptions, head.reweight_scale)
        probabilities = head(tokens, descriptions)
    case.close("description_weights", weights, rtol=1e-5, atol=1e-5)
    reweighted = torch.einsum("bkm,kmd->bkd", weights, descriptions)
    case.close("label_embeddings_reweighted", reweighted, rtol=1e-5, atol=1e-5)
    case.close("probabilities", probabilities, rtol=1e-5, atol=1e-5)
    threshold = case["threshold"].item()
    clear = (probabilities - threshold).abs() > 1e-3  # the case compares in single precision, `tag_presence` in half
    assert clear.float().mean() > 0.9
    assert np.array_equal(tag_presence(probabilities, threshold)[clear.numpy()], case["tagged"][clear].numpy())


@pytest.mark.golden("concept_frequency", "description_embeddings")
def test_description_embeddings(case):
    case.close("label_embedding", label_embedding(case["description_embeddings"]), atol=1e-6)


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
