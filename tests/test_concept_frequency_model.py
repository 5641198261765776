"""Counting concepts in captions and images: golden cases and properties."""

import itertools

import numpy as np
import pytest
import torch
from conftest import Case

from concept_frequency import model
from concept_frequency.model import (
    InvertedIndex,
    OpenSetHead,
    case_variants,
    controlled_counts,
    count_partitioned,
    description_weights,
    label_embedding,
    matched_counts,
    noun_set,
    query_terms,
    tag_presence,
)
from concept_frequency.statistics import misalignment

FAMILIES = ("retrieval", "image_search")


def partner(case: Case, suffix: str) -> Case:
    """The second file of a case with two files: `retrieval.npz` and `retrieval_concepts.json`."""
    stem = case.path.stem
    names = [stem.replace("_concepts", ""), f"{stem}_concepts", *(stem.replace(f, f"{f}_concepts") for f in FAMILIES)]
    path = next((p for name in names if name != stem and (p := case.path.with_name(name + suffix)).exists()), None)
    assert path is not None, f"{case.path} lacks its other file"
    return Case(path)


@pytest.mark.golden("concept_frequency", "text_search")
def test_text_search(case):
    docs = [[(lemma, pos) for _, lemma, pos in tokens] for tokens in case["tokens"]]
    nouns = [noun_set(doc) for doc in docs]
    assert [sorted(n) for n in nouns] == [sorted(n) for n in case["nouns"]]

    whole = InvertedIndex.build(nouns)
    ends = list(itertools.accumulate(case["chunk_sizes"]))
    chunks = [InvertedIndex.build(nouns[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    merged = InvertedIndex.merge(chunks)
    for index in (whole, merged):
        assert index.num_documents == len(docs)
        assert {term: index.postings(term).tolist() for term in index.terms} == case["index"]
    if "raw_posting_length_three_chunks" in case:  # what upstream's lists are too long by
        raw = {t: len(merged.postings(t)) + sum(len(c.postings(t)) > 0 for c in chunks) for t in merged.terms}
        assert raw == case["raw_posting_length_three_chunks"]

    for method, queries in case["queries"].items():
        lemma = {u: t for query in queries.values() for u, t in zip(query["unigrams"], query["terms"], strict=True)}
        lemmas_of = None if method == "lowercased" else lambda word, lemma=lemma: [lemma[word]]
        for concept, query in queries.items():
            terms = query_terms(concept, lemmas_of)
            assert terms == query["terms"], concept
            assert [t for t in terms if t in whole.place] == query["known_terms"], concept
            assert whole.search(terms).tolist() == merged.search(terms).tolist() == query["hits"], concept
        all_terms = [query["terms"] for query in queries.values()]
        counts = [query["count"] for query in queries.values()]
        assert whole.counts(all_terms).tolist() == count_partitioned(chunks, all_terms).tolist() == counts


@pytest.mark.golden("concept_frequency", "partitioned_counting")
def test_partitioned_counting(case):
    def ragged(values, offsets):
        return [values[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]

    docs = [set(map(str, terms)) for terms in ragged(case["doc_terms"], case["doc_offsets"])]
    queries = [list(map(str, terms)) for terms in ragged(case["query_terms"], case["query_offsets"])]
    shards = case["partition"].tolist()
    indexes = [InvertedIndex.build(d for d, s in zip(docs, shards, strict=True) if s == i) for i in set(shards)]
    case.close("counts", InvertedIndex.build(docs).counts(queries))
    case.close("counts", InvertedIndex.merge(indexes).counts(queries))
    case.close("counts", count_partitioned(indexes, queries))
    case.close("counts_with_partition_local_vocabulary", sum(index.counts(queries) for index in indexes))


@pytest.mark.golden("concept_frequency", "case_variants")
def test_case_variants(case):
    assert {name: case_variants(name) for name in case.json} == case.json


def pairs_of(table: torch.Tensor) -> np.ndarray:
    """0/1 matrix (N, K) -> (document, concept) pairs."""
    return np.argwhere(table.numpy() != 0)


@pytest.mark.golden("concept_frequency", "image_search")
def test_image_search(case):
    if "thresholds" not in case:
        case = partner(case, ".npz")
    concepts = partner(case, ".json").json["concepts"]
    probabilities = case["probs_half_as_float32"]
    assert len(concepts) == probabilities.shape[1]
    k = len(concepts)
    for kind in (probabilities, probabilities.half()):
        present = np.stack([tag_presence(kind, threshold) for threshold in case["thresholds"].tolist()])
        case.close("present", present.astype(np.int64))
        case.close("counts", present.sum(axis=1))
    used = (case["thresholds"] - 0.7).abs().argmin()  # the paper's
    image, text = np.argwhere(present[used]), pairs_of(case["text_hits"])
    case.close("integrated_counts", matched_counts(text, image, k))
    case.close("control_counts", controlled_counts(image, case["control_keep_ids"], k))
    single = case["single_word"].numpy() != 0
    for name, pairs in (("search", text), ("unigram", text[single[text[:, 1]]])):
        number, extracted, dataset = misalignment(pairs, image, case["dataset_size"].item())
        case.close(f"misalign_{name}_count", [number])
        case.close(f"misalign_{name}", [number, extracted, dataset], rtol=1e-7, atol=1e-7)


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
    case.close("tagged", tag_presence(case["probabilities"], threshold, half=False).astype(np.int64))
    clear = (probabilities - threshold).abs() > 1e-5  # a threshold can be one of the probabilities: rounding decides
    tagged = tag_presence(probabilities, threshold, half=False)
    assert np.array_equal(tagged[clear.numpy()], case["tagged"][clear].numpy())


@pytest.mark.golden("concept_frequency", "description_embeddings")
def test_description_embeddings(case):
    case.close("label_embedding", label_embedding(case["description_embeddings"]), atol=1e-6)


def test_index_saves_and_loads(tmp_path):
    index = InvertedIndex.build([{"", "dog"}, {"Dog", "cat"}, set(), {"dog"}])
    index.save(tmp_path / "index.npz")
    back = InvertedIndex.load(tmp_path / "index.npz")
    assert back.terms == index.terms and back.num_documents == 4
    assert back.search(["dog"]).tolist() == [0, 3] and back.postings("").tolist() == [0]
    empty = InvertedIndex.build([])
    empty.save(tmp_path / "empty.npz")
    assert InvertedIndex.load(tmp_path / "empty.npz").search(["dog"]).tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_search_is_the_set_intersection(seed):
    rng = np.random.default_rng(seed)
    docs = [{f"t{t}" for t in rng.zipf(1.5, rng.integers(0, 6)) if t < 40} for _ in range(300)]
    index = InvertedIndex.merge(
        [InvertedIndex.build(docs[:100]), InvertedIndex.build([]), InvertedIndex.build(docs[100:])]
    )
    for terms in [[f"t{t}" for t in rng.integers(1, 44, 3)] for _ in range(60)]:
        known = [t for t in terms if any(t in doc for doc in docs)]
        truth = [i for i, doc in enumerate(docs) if known and doc.issuperset(known)]
        assert index.search(terms).tolist() == truth
        assert index.search(terms, unknown="zero").tolist() == (truth if len(known) == len(terms) else [])


def test_query_quirks_have_names():
    lemmas = {"t-shirt": ["t", "-", "shirt"], "crème": ["crème"], "brûlée": ["brûlée"]}.__getitem__
    assert query_terms("T-shirt", lemmas) == ["shirt"]
    assert query_terms("T-shirt", lemmas, last_token=False, clean_terms=True) == ["t", "shirt"]
    assert query_terms("crème_brûlée", lemmas, clean_terms=True) == ["crme", "brle"]
    assert query_terms("_crème ", None) == ["crème"]
    assert noun_set([("Eagles", "PROPN"), ("run", "VERB")]) == {"Eagles"}
    assert noun_set([("Eagles", "PROPN")], casefold=True) == {"eagles"}


def test_half_precision_threshold():
    border = np.float32(np.float16(0.7))  # 0.70019531, not above itself though above 0.7
    assert not tag_presence([[border]], 0.7)[0, 0] and tag_presence([[border]], 0.7, half=False)[0, 0]


def test_controlled_counts_without_kept_images():
    assert controlled_counts([[0, 1]], [], 2).tolist() == [0, 0]
    assert controlled_counts(np.zeros((0, 2)), [3], 2).tolist() == [0, 0]
    assert controlled_counts([[3, 1], [3, 1], [9, 0]], [3, 3], 2).tolist() == [0, 2]


def test_contract_is_importable():
    """Names of the contract are in the file that it gives."""
    names = (
        "noun_set query_terms InvertedIndex count_partitioned label_embedding description_weights tag_presence "
        "matched_counts controlled_counts"
    )
    assert all(hasattr(model, name) for name in names.split())
