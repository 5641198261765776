"""Concept frequency against the numbers of the authors' code (tests/golden/concept_frequency/README.md), and
properties.

One golden test per family; everything about a case is read from its file, tolerances are those of the README. Families
derived from the authors' published result files are checked against these files where they are: in `upstream_results/`
beside the case, or in the clone that --upstream names.
"""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Case
from PIL import Image

from concept_frequency import count, curves, eval, model, replay, study, train
from concept_frequency.concepts import concept_scores, mean_scores, read_concepts
from concept_frequency.eval import (
    balance_classes,
    caption_concepts,
    concept_recall,
    correlation,
    deduplicate,
    frequency_agreement,
    load_counts,
    load_results,
    log_linear_curve,
    long_tail,
    misalignment,
    per_class_accuracy,
    permutation_null,
    phash,
    prompts_with_concept,
    select_tail,
    zero_shot_classifier,
)
from concept_frequency.let_it_wag import hamming_distances
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
from concept_frequency.replay import CLASSIFICATION, IMAGENET, METHODS, RETRIEVAL, Results
from concept_frequency.train import zipf_counts

golden = pytest.mark.golden
FOLDER = "concept_frequency"


def partner(case: Case, suffix: str) -> Case:
    """The other file of a case of two: `retrieval.npz` and `retrieval_concepts.json`."""
    stem = case.path.stem
    names = [stem.replace("_concepts", ""), f"{stem}_concepts", *(stem.replace(f, f"{f}_concepts") for f in FAMILIES)]
    path = next((p for name in names if name != stem and (p := case.path.with_name(name + suffix)).exists()), None)
    assert path is not None, f"{case.path} lacks its other file"
    return Case(path)


FAMILIES = ("retrieval", "image_search")


def pairs_of(table: torch.Tensor) -> np.ndarray:
    """(N, K) 0/1 -> (document, concept) rows."""
    return np.argwhere(table.numpy() != 0)


def results(case: Case, request: pytest.FixtureRequest) -> Results:
    """The authors' published files."""
    beside = case.path.parent / "upstream_results"
    folder = beside if beside.is_dir() else request.config.getoption("upstream")
    if folder is None or not (Path(folder) / "search_counts").is_dir():
        pytest.skip("needs the authors' published files: upstream_results/ beside the case, or --upstream CLONE")
    return Results(folder)


# ----------------------------------------------------------------------------------------------------- golden: captions


@golden(FOLDER, "text_search")
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


@golden(FOLDER, "partitioned_counting")
def test_partitioned_counting(case):
    def ragged(values, offsets):
        return [values[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]

    docs = [set(map(str, terms)) for terms in ragged(case["doc_terms"], case["doc_offsets"])]
    queries = [list(map(str, terms)) for terms in ragged(case["query_terms"], case["query_offsets"])]
    shards = case["partition"].tolist()
    parts = [InvertedIndex.build(d for d, s in zip(docs, shards, strict=True) if s == part) for part in set(shards)]
    case.close("counts", InvertedIndex.build(docs).counts(queries))
    case.close("counts", InvertedIndex.merge(parts).counts(queries))
    case.close("counts", count_partitioned(parts, queries))
    case.close("counts_with_partition_local_vocabulary", sum(part.counts(queries) for part in parts))


@golden(FOLDER, "case_variants")
def test_case_variants(case):
    assert {name: case_variants(name) for name in case.json} == case.json


# ------------------------------------------------------------------------------------------------------- golden: images


@golden(FOLDER, "image_search")
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


@golden(FOLDER, "ram_openset_head")
def test_ram_openset_head(case):
    class Stub(torch.nn.Module):
        """The case's stand-in for the cross-attention: q + softmax(q k^T / 8) k."""

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


@golden(FOLDER, "description_embeddings")
def test_description_embeddings(case):
    case.close("label_embedding", label_embedding(case["description_embeddings"]), atol=1e-6)


# ------------------------------------------------------------------------------------------------------- golden: models


@golden(FOLDER, "zero_shot")
def test_zero_shot(case):
    classifier = zero_shot_classifier(case["prompt_embeddings"])
    case.close("classifier", classifier, atol=1e-5)
    features = F.normalize(case["image_features_raw"], dim=-1)
    case.close("image_features", features, atol=1e-5)
    logits = 100 * features @ classifier
    case.close("logits", logits, atol=1e-4)
    case.close("predictions", case["logits"].argmax(dim=1))  # of the file's: rounding decides between equal classes
    percent, per_class = per_class_accuracy(case["logits"], case["labels"])
    case.close("accuracy_percent", [percent], atol=1e-5)
    case.close("per_class_accuracy_percent", per_class, atol=1e-5)


@golden(FOLDER, "retrieval")
def test_retrieval(case):
    if "k" not in case:
        case = partner(case, ".npz")
    truth = partner(case, ".json").json
    images, texts = case["image_embeddings"], case["text_embeddings"]
    found = caption_concepts(truth["docs"], captions_per_image=len(texts) // len(images))
    assert found.names == sorted(truth["concepts"])
    assert found.to_images == truth["concept_to_images"] and found.to_texts == truth["concept_to_texts"]
    recalls = [concept_recall(images, texts, found, k) for k in case["k"].tolist()]
    case.close("text_to_image_recall", [r[0] for r in recalls], atol=1e-6)
    case.close("image_to_text_recall", [r[1] for r in recalls], atol=1e-6)
    for k, (_, _, t2i, i2t) in zip(case["k"].tolist(), recalls, strict=True):
        assert t2i == pytest.approx(truth["conceptwise_text_to_image"][str(k)], abs=1e-6)
        assert i2t == pytest.approx(truth["conceptwise_image_to_text"][str(k)], abs=1e-6)


# ------------------------------------------------------------------------------------------------------- golden: curves

SLICES = {
    "inner": slice(1, -1),
    "laion": slice(2, -1),
    "synth": slice(0, -4),
    "tail": slice(3, None),
    "last4": slice(-4, None),
    "all": slice(None),
}


def as_upstream(curve: curves.Curve) -> curves.Curve:
    """Empty bins as upstream's arrays of fixed size have them: 0."""
    return curve._replace(mean=np.nan_to_num(curve.mean), std=np.nan_to_num(curve.std))


@golden(FOLDER, "loglinear")
def test_log_linear(case):
    curve = log_linear_curve(case["counts"], case["scores"], case["num_bins"].item())
    case.close("bin_counts", curve.size)
    assert np.isnan(curve.mean[curve.size == 0]).all()
    if "bin_index" in case:
        case.close("bin_index", curve.index)
    if "exp_bins" not in case:  # upstream itself failed
        return
    case.close("exp_bins", curve.position, rtol=1e-5, atol=1e-5)
    fixed = as_upstream(curve)
    case.close("cum_means", fixed.mean, rtol=1e-5, atol=1e-5)
    case.close("cum_stds", fixed.std, rtol=1e-5, atol=1e-5)
    for name, bins in SLICES.items():
        if f"pearson_{name}" in case:
            case.close(f"pearson_{name}", correlation(fixed, bins), rtol=1e-5, atol=1e-5)
        if f"line_{name}" in case:
            case.close(f"line_{name}", curves.line(fixed, bins), rtol=1e-5, atol=1e-5)


@golden(FOLDER, "human_eval_curve")
def test_human_eval_curve(case):
    curve = as_upstream(log_linear_curve(case["bucket_centers"], case["bucket_accuracy"], case["num_bins"].item()))
    case.close("log_bins", np.log(curve.position), rtol=1e-5, atol=1e-5)
    case.close("cum_means", curve.mean, rtol=1e-5, atol=1e-5)
    case.close("cum_stds", curve.std, rtol=1e-5, atol=1e-5)
    case.close("pearson", correlation(curve), rtol=1e-5, atol=1e-5)


@golden(FOLDER, "published_curves")
def test_published_curves_correlate(case):
    """From the bins as published."""
    for row in case.json:
        position, mean, std, size = (np.array(row[key]) for key in ("exp_bins", "bin_means", "bin_stds", "bin_counts"))
        curve = curves.Curve(position, mean, std, size, np.zeros(0, dtype=np.int64))
        bins = slice(*row["slice"])
        assert correlation(curve, bins) == pytest.approx((row["rho"], row["p"]), abs=1e-6)
        assert correlation(curve)[0] == pytest.approx(row["rho_all_bins"], abs=1e-6)
        if row["figure_legend_rho"] is not None:
            assert round(correlation(curve, bins)[0], 2) == pytest.approx(row["figure_legend_rho"])


@golden(FOLDER, "published_curves")
def test_published_curves(case, request):
    """From the authors' counts and scores."""
    published = results(case, request)
    for row in case.json:
        model_name = f"{row['model']}|{row['pretraining']}"
        counts, scores, _ = published.pairs(row["task"], row["search"], model_name, row["prompt_or_metric"])
        curve, bins = as_upstream(log_linear_curve(counts, scores, row["num_bins"])), slice(*row["slice"])
        assert len(counts) == row["n_pairs"]
        assert curve.size.tolist() == row["bin_counts"]
        for ours, theirs in ((curve.position, "exp_bins"), (curve.mean, "bin_means"), (curve.std, "bin_stds")):
            np.testing.assert_allclose(ours, row[theirs], rtol=1e-6, atol=1e-6)
        assert correlation(curve, bins) == pytest.approx((row["rho"], row["p"]), abs=1e-9)
        assert correlation(curve) == pytest.approx((row["rho_all_bins"], row["p_all_bins"]), abs=1e-9)
        inner = correlation(curve, slice(1, -1))
        assert inner == pytest.approx((row["rho_1_to_minus1"], row["p_1_to_minus1"]), abs=1e-9)
        flat = curves.unbinned(counts, scores)
        assert flat["pearson"] == pytest.approx(row["pearson_unbinned"], abs=1e-9)
        assert flat["spearman"] == pytest.approx(row["spearman_unbinned"], abs=1e-9)


@golden(FOLDER, "frequency_agreement")
def test_frequency_agreement(case, request):
    published = results(case, request)
    for search, values in case.json.items():
        for pair in values.keys() - {"n_common"}:
            a, b = (published.all_counts(pretraining, search) for pretraining in pair.split("|"))
            spearman, n = frequency_agreement(a, b)
            assert n == values["n_common"]
            assert spearman == pytest.approx(values[pair]["spearman"], abs=1e-9)


@golden(FOLDER, "long_tail")
def test_long_tail(case, request):
    published = results(case, request)
    for key, values in case.json.items():
        pretraining, search = key.split("|")
        assert long_tail(published.tail_counts(pretraining, search)) == pytest.approx(values, abs=1e-9)


@golden(FOLDER, "let_it_wag")
def test_let_it_wag(case, request):
    imagenet = case["external_imagenet_top1"] | case["imagenet_ensemble_top1_from_results"]
    assert len(imagenet) == case["n_models"]
    below = sum(accuracy < 50 for accuracy in imagenet.values())
    assert (below, len(imagenet) - below) == (case["n_below_50"], case["n_above_50"])
    tail = results(case, request).let_it_wag()
    found = curves.two_slopes(list(imagenet.values()), [tail[name] for name in imagenet])
    assert (found["n_below"], found["n_above"]) == (case["n_below_50"], case["n_above_50"])
    assert found["slope_below"] == pytest.approx(case["slope_imagenet_below_50"], abs=1e-9)
    assert found["slope_above"] == pytest.approx(case["slope_imagenet_above_50"], abs=1e-9)


# ----------------------------------------------------------------------------------- golden: tail benchmark, generation


@golden(FOLDER, "dedup")
def test_dedup(case):
    bits = np.stack([phash(image) for image in case["images"].numpy()])
    case.close("phash_bits", bits.astype(np.int64))
    case.close("hamming", hamming_distances(bits))
    truth = case.json
    if "phash_hex" in truth:
        assert [f"{int(''.join(map(str, row.astype(int))), 2):016x}" for row in bits] == truth["phash_hex"]
    for name, walk in truth["classes"].items():
        rows = [i for i, file in enumerate(truth["names"]) if file.partition("/")[0] == name]
        files = [truth["names"][i].partition("/")[2] for i in rows]
        hamming = case["hamming"][rows][:, rows]
        orders = {"removed": walk["iteration_order"], "removed_if_sorted_order": sorted(files)}
        for key, order in orders.items():
            removed = deduplicate(hamming, [files.index(file) for file in order], truth["threshold"])
            assert sorted(files[i] for i in removed) == sorted(walk[key]), (name, key)


@golden(FOLDER, "balance")
def test_balance(case):
    files = {name: [f"{i}.jpg" for i in range(n)] for name, n in case["jpg_counts"].items()}
    for name, n in case["other_file_counts"].items():
        files.setdefault(name, []).extend(f"{i}.txt" for i in range(n))
    assert case["min_exclusive"] == case["per_class"]  # the paper's is one number
    kept = balance_classes(files, case["per_class"], torch.Generator().manual_seed(0))
    assert sorted(kept) == sorted(case["kept_classes"])
    for name, rows in kept.items():
        assert len(rows) == len(set(rows)) == case["images_per_kept_class"] and set(rows) <= set(files[name])
    assert kept == balance_classes(files, case["per_class"], torch.Generator().manual_seed(0))


@golden(FOLDER, "t2i_concepts")
def test_t2i_concepts(case):
    found = prompts_with_concept(case["prompts"], case["words"])
    assert found == case["indices"]
    scores = concept_scores(found, case["scores"])
    assert {word: rows.tolist() if len(rows) else None for word, rows in scores.items()} == case["aggregated"]


# ------------------------------------------------------------------------------------------------------- properties


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


def test_misalignment_counts_documents_once():
    text, image = [[0, 0], [0, 1], [1, 0], [2, 2]], [[0, 1], [1, 3], [1, 4], [3, 0]]
    assert misalignment(text, image, 10) == (1, 1 / 3, 0.1)


def test_permutation_null():
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1], 400)
    counts = np.where(groups == 0, rng.integers(1, 100, 800), rng.integers(1000, 100_000, 800))
    scores = 40 * groups + rng.normal(20, 5, 800)  # nothing but a difference between datasets
    true = correlation(log_linear_curve(counts, scores, 8))[0]
    within = permutation_null(counts, scores, groups, 8)
    across = permutation_null(counts, scores, None, 8)
    assert len(within) == len(across) == 300
    assert true > 0.8 and within.mean() > 0.8  # the shuffle within datasets shows the confound,
    assert abs(across.mean()) < 0.1 < across.std()  # the one across everything does not
    assert np.array_equal(within, permutation_null(counts, scores, groups, 8))


def test_empty_bins_are_left_out():
    curve = log_linear_curve([1, 1, 10, 1000, 1000], [0.0, 0.2, 0.3, 0.5, 0.7], 7)
    assert (curve.size == 0).sum() == 4 and np.isnan(curve.mean).sum() == 4
    rho, p = correlation(curve)
    assert 0.9 < rho < 1 and 0 < p < 1
    assert all(math.isnan(value) for value in correlation(curve, slice(1, 3)))
    with pytest.raises(ValueError, match="no curve"):
        log_linear_curve([], [], 3)
    with pytest.raises(ValueError, match="two bins or more"):
        log_linear_curve([1, 10], [0.0, 1.0], 1)  # the edge would leave the largest count out


def test_slope_per_decade():
    counts = 10 ** np.linspace(0, 3, 200)
    noise = np.random.default_rng(0).normal(0, 3, 200)
    found = curves.slope_per_decade(counts, 12 * np.log10(counts) + noise)
    assert found["low"] < 12 < found["high"] and found["high"] - found["low"] < 2


def test_within_slope_is_free_of_what_concepts_differ_in():
    """Accuracy that goes with the concept, and not with its frequency, misleads the slope between concepts alone."""
    rng = np.random.default_rng(0)
    frequency = 10 ** np.linspace(0, 3, 200)
    for effect in (0.0, 5.0):
        easy = 10 * np.log10(frequency)  # frequent concepts happen to be easy
        first, second = frequency, rng.permutation(frequency)
        scores = [
            easy + effect * np.log10(f) + rng.normal(0, 2, 200) + better for f, better in ((first, 7), (second, 0))
        ]
        between = curves.slope_per_decade(first, scores[0])
        within = curves.within_slope(np.log10(first) - np.log10(second), scores[0] - scores[1])
        assert between["low"] > effect + 8
        assert within["low"] < effect < within["high"] and within["high"] - within["low"] < 2
        two = curves.within_slope(*(np.stack([x, x]) for x in (np.log10(first / second), scores[0] - scores[1])))
        assert two == pytest.approx(within)  # the same seed twice is no more evidence


def synthetic_arms(effect: float, seeds: int) -> dict[str, list[dict]]:
    """Measurements of arms in which a decade of frequency brings `effect` points."""
    rng, names = np.random.default_rng(0), [f"c{i}" for i in range(120)]
    hard = rng.normal(0, 10, len(names))
    arms = {arm.name: [] for arm in study.ARMS}
    for seed in range(seeds):
        for arm in arms:
            rank = rng.permutation(len(names)) + 1
            frequency = 1000 // rank if arm != "uniform" else np.full(len(names), 50)
            accuracy = 40 + hard + effect * np.log10(frequency) + rng.normal(0, 3, len(names))
            found = eval.curve_metrics(frequency, accuracy, frequency) if arm != "uniform" else {}
            found |= {"rest": 40.0 + seed, "tail": 30.0, "misaligned": 0.0, "misaligned_planted": 20.0 + seed}
            rows = zip(names, frequency.tolist(), accuracy.tolist(), strict=True)
            found["concepts"] = {name: {"assigned": f, "accuracy": a} for name, f, a in rows}
            arms[arm].append(found | eval.beside_zipf(found["concepts"], (arms["zipf"] + [found])[seed]["concepts"]))
    return arms


def verdicts(effect: float, seeds: int) -> dict[str, str]:
    return {row["claim"]: row["verdict"] for row in study.judged(synthetic_arms(effect, seeds))}


def test_claims_follow_the_effect():
    planted, none, one = verdicts(8.0, 3), verdicts(0.0, 3), verdicts(8.0, 1)
    of_frequency = [name for name in planted if "decade" in name or "made equal" in name or "bootstrap" in name]
    assert len(of_frequency) == 4 and len(planted) == 13
    assert {planted[name] for name in of_frequency} == {"reproduced"}
    assert "reproduced" not in {none[name] for name in of_frequency}
    assert set(one.values()) == {"not resolved at this scale"}


def write_published(folder: Path) -> None:
    """Files in the authors' layout: every score is linear in log frequency, counts of concepts differ by corpus."""
    (folder / "let_it_wag_datasets/evaluations").mkdir(parents=True)
    for name in ("search_counts", "zero_shot_evaluations", "retrieval_evaluations", "misalignment_metrics"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    for dataset in [*CLASSIFICATION, "imagenet-sketch", *RETRIEVAL]:
        names = [f"{dataset} {i}" for i in range(60)]
        count = dict(zip(names, (10 ** rng.uniform(0, 4, 60)).astype(int).tolist(), strict=True))
        scores = {name: 5 + 4 * math.log(n + 1) + rng.normal() for name, n in count.items()}
        for pretraining in ("cc3m", "cc12m"):
            for method in METHODS.values():
                path = folder / f"search_counts/{dataset}_{pretraining}_{method}_search_counts.json"
                path.write_text(json.dumps(count))
        models = {
            f"backbone{m.partition('|')[0]}_pretrained{m.partition('|')[2]}": {
                "full": 40.0, "classwise": scores, "conceptwise": scores,
            }
            for m in ("RN50|cc3m", "ViT-B-16|cc3m", "RN50|cc12m", "ViT-B-16|cc12m")
        }  # fmt: skip
        places = ["retrieval_evaluations"] if dataset in RETRIEVAL else ["zero_shot_evaluations"]
        prompts = ["t2i_k=10"] if dataset in RETRIEVAL else ["class", "simple", "ensemble"]
        for place in places:
            for prompt in prompts:
                (folder / place / f"{dataset}_{prompt}_results.json").write_text(json.dumps(models))
    degree = {"misalignment_degree (percent); fixed conservative dataset size": 0.1681}
    (folder / "misalignment_metrics/cc3m_misalignment_degree.json").write_text(json.dumps(degree))
    wag = {
        f"backbone{m.partition('|')[0]}_pretrained{m.partition('|')[2]}": {"full": value - 20 + 0.01 * value}
        for m, value in IMAGENET.items()
    }
    path = folder / "let_it_wag_datasets/evaluations/let_it_wag_ensemble_results.json"
    path.write_text(json.dumps(wag | {"backboneRN50_pretrainedcc3m": {"full": 10.0}}))


def test_replay_of_files_in_the_authors_layout(tmp_path, capsys):
    write_published(tmp_path / "clone")
    claims = replay.main(replay.Config(str(tmp_path / "clone"), str(tmp_path / "out")))
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert claims == found["claims"]
    rows = found["tables"]["rho, classification, integrated counts"]
    assert [(row["corpus"], row["model"]) for row in rows] == [
        ("CC-3M", "RN50"), ("CC-3M", "ViT-B-16"), ("CC-12M", "RN50"), ("CC-12M", "ViT-B-16"),
    ]  # fmt: skip
    assert all(float(row["here"]) > 0.98 and abs(float(row["shuffled"])) < 0.2 for row in rows)
    verdict = {row["claim"]: row["verdict"] for row in found["claims"]}
    assert verdict["published files: misalignment degree"] == "reproduced"
    assert verdict["published files: rho, classification, integrated counts"] != "reproduced"  # not the authors' scores
    assert verdict["published files: points lost on Let It Wag!"] == "not reproduced"
    assert (tmp_path / "out/main_figure.png").is_file() and "## agreement of counts" in capsys.readouterr().out


def test_study_hands_on_the_claims_of_a_clone(tmp_path, monkeypatch):
    """`--upstream CLONE`: the replay's claims stand between those of the arms and what cannot be tested here."""
    write_published(tmp_path / "clone")
    monkeypatch.chdir(tmp_path)
    more = study.STUDY.upstream(tmp_path / "clone")
    kept = json.loads((tmp_path / "runs/concept_frequency/replay/results.json").read_text())
    assert more == {"replayed": kept["claims"]} and len(kept["claims"]) > 5
    arms = synthetic_arms(8.0, 2)
    found = SimpleNamespace(arms=arms)  # all of a `report.Comparison` that is read
    judged, plain = study.judged(arms), study.STUDY.more_rows(found)
    assert study.STUDY.more_rows(found, **more) == [*judged, *kept["claims"], plain[-1]]
    assert plain[:-2] == judged and {row["verdict"] for row in plain[-2:]} == {"not testable at this scale"}
    with pytest.raises(ValueError, match="needs the arm zipf"):
        study.STUDY.more_rows(SimpleNamespace(arms={"uniform": arms["uniform"]}))


def test_study_runs_the_presets_of_its_arms():
    commands = {arm.name: study.STUDY.words(arm, 3)[0][1:] for arm in study.STUDY.jobs(study.STUDY.chosen("all"))}
    presets = {"zipf": "emoji", "uniform": "emoji-uniform", "reassigned": "emoji-reassigned"}
    assert study.STUDY.chosen("core") == study.STUDY.chosen("all")
    assert commands == {
        arm: ["-m", "concept_frequency.train", preset, "--seed", "3", "--out", f"runs/concept_frequency/{arm}-seed3"]
        for arm, preset in presets.items()
    }


def test_frequency_buckets():
    counts = np.concatenate([np.repeat(7, 150), np.repeat(5, 60), np.repeat(3, 60), np.repeat(0, 500), [1] * 99])
    assert curves.frequency_buckets(counts) == [(7.0, 7.0), (3.0, 5.0)]
    assert curves.frequency_buckets(np.repeat(2, 2500)) == [(2.0, 2.0), (2.0, 2.0)]


def test_select_tail():
    assert select_tail([{"a": 0, "b": 5, "c": 1, "d": 9}, {"a": 7, "b": 0, "c": 2}], 2) == ["c", "b"]


def test_phash_takes_images():
    array = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.float32)
    assert np.array_equal(phash(array), phash(Image.fromarray(array.astype(np.uint8))))


@pytest.mark.parametrize(
    ("k", "total", "exponent"), [(400, 8000, 1.0), (50, 1000, 0.0), (300, 310, 2.0), (10, 10, 1.0)]
)
def test_zipf_counts(k, total, exponent):
    counts = zipf_counts(k, total, exponent, torch.Generator().manual_seed(3))
    assert counts.dtype == np.int64 and counts.sum() == total and counts.min() >= 1
    again, other = (zipf_counts(k, total, exponent, torch.Generator().manual_seed(s)) for s in (3, 4))
    assert np.array_equal(counts, again) and np.array_equal(np.sort(counts), np.sort(other))
    if exponent == 0:
        assert np.ptp(counts) <= 1
    if total > 5 * k:
        share = np.arange(1, k + 1) ** -exponent
        assert np.abs(np.sort(counts)[::-1] - total * share / share.sum()).max() <= 1
    with pytest.raises(ValueError, match="cannot hold"):
        zipf_counts(10, 9, exponent, None)


def test_prompts_and_scores():
    prompts = ["a carsick person", "two cars"]
    assert prompts_with_concept(prompts, ["car"]) == {"car": [0, 1]}
    assert prompts_with_concept(prompts, ["car"], plural_prefix=False) == {"car": [1]}
    assert mean_scores({"a": [1.0] * 5, "b": [2.0] * 6}) == {"b": 2.0}


def test_files_of_concepts(tmp_path):
    (tmp_path / "classnames.txt").write_text("T-shirt\nt-shirt\nbald_eagle\n")
    assert read_concepts(tmp_path) == ["T-shirt", "t-shirt", "bald_eagle"]
    (tmp_path / "described.json").write_text(json.dumps([{"dog": ["a photo of a dog."]}, {"cat": ["..."]}]))
    assert read_concepts(tmp_path / "described.json") == ["dog", "cat"]
    (tmp_path / "bad.json").write_text("3")
    with pytest.raises(ValueError, match="no list of concepts"):
        read_concepts(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_concepts(tmp_path / "none.txt")
    value = {"backboneRN50_pretrainedcc3m": {"full": 1.0, "classwise": {"plane": 3.0}}}
    for name, key in (("cifar10_class_results.json", "airplane"), ("toys_class_results.json", "plane")):
        (tmp_path / name).write_text(json.dumps(value))
        assert load_results(tmp_path / name, "RN50|cc3m") == {key: 3.0}
    with pytest.raises(ValueError, match="has no model backboneRN101"):
        load_results(tmp_path / "toys_class_results.json", "RN101|cc3m")
    (tmp_path / "c.json").write_text('{"dog": 3}')
    assert load_counts(tmp_path / "c.json") == {"dog": 3}


def test_contract_is_importable():
    """Names of the contract, from the file that it gives."""
    for name in (
        "noun_set query_terms InvertedIndex count_partitioned label_embedding description_weights tag_presence "
        "matched_counts controlled_counts"
    ).split():
        assert hasattr(model, name)
    for name in (
        "zero_shot_classifier per_class_accuracy caption_concepts concept_recall log_linear_curve correlation "
        "permutation_null misalignment frequency_agreement long_tail select_tail deduplicate phash balance_classes "
        "prompts_with_concept load_counts load_results"
    ).split():
        assert hasattr(eval, name)
    assert all(hasattr(count, name) for name in ("tag_captions", "tag_images", "sample_id"))
    assert all(hasattr(train, name) for name in ("zipf_counts", "sample_pairs", "train"))
