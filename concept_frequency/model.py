"""No "Zero-Shot" Without Exponential Data (arXiv 2404.04125, NeurIPS 2024): how often a concept occurs in a corpus.

Authors' code: bethgelab/frequency_determines_performance@11ef009, cited below as `U:<path>:<line>`.
The paper's contribution in this file is the count of concepts:
  - in captions: noun sets, an inverted index over them, multi-word search       `noun_set`, `InvertedIndex`
  - in any partition of the captions, with equal counts                          `count_partitioned`
  - in images: an open-set tagger with descriptions, and a threshold             `OpenSetHead`, `tag_presence`
  - in both: samples with the concept in caption and image                       `matched_counts`
Concepts keep the spelling of their test set. Ids are positions in the corpus, from 0.

Shapes: B batch, K concepts, M descriptions of a concept, D embedding, L image tokens, N samples, Q queries, V terms.
Counting uses NumPy arrays (CPU tensors are also accepted); the tagger's head uses tensors.
"""

import itertools
import math
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

Ids = NDArray[np.int64]

# ---------------------------------------------------------------------------------------------------- words of captions


def clean(lemma: str) -> str:
    """Delete all characters except A-Z, a-z and space. A word of another alphabet becomes the empty string."""
    return re.sub(r"[^A-Za-z ]", "", lemma)


def noun_set(tokens: Iterable[tuple[str, str]], casefold: bool = False) -> set[str]:
    """N_i: the cleaned lemmas of nouns and proper nouns of one caption, from its (lemma, part of speech) pairs.

    Source: U:src/text_search_inverted_index_get_word_dictionaries.py:93. Lemmas keep their case but queries are in
    lower case, so the proper noun `Eagles` is never found; `casefold` corrects this. The set may contain the empty
    string.
    """
    nouns = {clean(lemma) for lemma, pos in tokens if pos in ("NOUN", "PROPN")}
    return {noun.lower() for noun in nouns} if casefold else nouns


def query_terms(
    concept: str,
    lemmas_of: Callable[[str], Sequence[str]] | None,
    last_token: bool = True,
    clean_terms: bool = False,
) -> list[str]:
    """T_c: the lower-cased words of a concept, split at `_` and white space, each lemmatised without context.

    Source: U:src/text_search_matches_inverted_index.py:57. `lemmas_of(word)` returns the lemmas of a word's tokens;
    None keeps words unchanged (upstream's `lowercased`). Two options switch quirks of upstream: `last_token` keeps only
    the last token of a word (`t-shirt` is searched as `shirt`), and without `clean_terms` terms are not cleaned like
    the index, so `crème` never matches. A word without tokens has no term.
    """
    terms: list[str] = []
    for word in filter(None, re.split(r"[_\s]+", concept.lower())):
        lemmas = [word] if lemmas_of is None else list(lemmas_of(word))
        terms += lemmas[-1:] if last_token else lemmas
    return [term for term in map(clean, terms) if term] if clean_terms else terms


def case_variants(name: str) -> list[str]:
    """All combinations of lower-case and Capitalised words of a name, joined by `_`.

    For LAION-Aesthetics, upstream uses the first one that is in the image index.
    Source: U:src/image_search_matches_inverted_index.py:10.
    """
    forms = [(word.lower(), word.capitalize()) for word in name.split()]
    return ["_".join(words) for words in itertools.product(*forms)]


# ------------------------------------------------------------------------------------------------------ inverted index


class InvertedIndex:
    """P_w, the ids of the documents with word w in their noun set, for all w in one array (8 bytes per posting).

    terms: V words; place: v of each word. ids[offsets[v]:offsets[v + 1]]: sorted, unique ids of terms[v], less than
    num_documents.
    Source: U:src/text_search_inverted_index_get_word_dictionaries.py:93 (lists of Python ints; the first id of a word
    is stored twice per chunk).
    """

    def __init__(self, terms: Sequence[str], offsets: Ids, ids: Ids, num_documents: int):
        self.terms, self.offsets, self.ids, self.num_documents = list(terms), offsets, ids, num_documents
        self.place = {term: v for v, term in enumerate(self.terms)}

    @classmethod
    def build(cls, noun_sets: Iterable[set[str]]) -> "InvertedIndex":
        """Build the index of the noun sets of documents 0, 1, 2, ..."""
        codes: dict[str, int] = {}
        postings, lengths = array("I"), array("I")
        for nouns in noun_sets:
            postings.extend([codes.setdefault(noun, len(codes)) for noun in nouns])
            lengths.append(len(nouns))
        terms = sorted(codes)
        rank = np.empty(len(terms), dtype=np.int64)
        rank[[codes[term] for term in terms]] = np.arange(len(terms))
        ranks = rank[np.frombuffer(postings, dtype=np.uint32)] if postings else np.zeros(0, dtype=np.int64)
        documents = np.repeat(np.arange(len(lengths)), np.frombuffer(lengths, dtype=np.uint32) if lengths else 0)
        offsets = np.concatenate([[0], np.bincount(ranks, minlength=len(terms)).cumsum()]).astype(np.int64)
        return cls(terms, offsets, documents[np.argsort(ranks, kind="stable")], len(lengths))

    @classmethod
    def merge(cls, parts: Sequence["InvertedIndex"]) -> "InvertedIndex":
        """Merge the indexes of consecutive partitions of a corpus; ids are shifted by the numbers of earlier documents.

        Source: U:src/text_search_inverted_index_combine_dictionaries.py:22.
        """
        terms = sorted(set().union(*(index.terms for index in parts)))
        place = {term: v for v, term in enumerate(terms)}
        ranks = [np.array([place[term] for term in index.terms], dtype=np.int64) for index in parts]
        lengths = np.zeros(len(terms), dtype=np.int64)
        for index, rank in zip(parts, ranks, strict=True):
            lengths[rank] += np.diff(index.offsets)
        offsets = np.concatenate([[0], lengths.cumsum()])
        ids, free, documents = np.empty(offsets[-1], dtype=np.int64), offsets[:-1].copy(), 0
        for index, rank in zip(parts, ranks, strict=True):
            length = np.diff(index.offsets)
            ids[np.repeat(free[rank] - index.offsets[:-1], length) + np.arange(len(index.ids))] = index.ids + documents
            free[rank] += length
            documents += index.num_documents
        return cls(terms, offsets, ids, documents)

    def postings(self, term: str) -> Ids:
        """P_w as a view of `ids`; empty for an unknown term."""
        v = self.place.get(term)
        return self.ids[:0] if v is None else self.ids[self.offsets[v] : self.offsets[v + 1]]

    def search(self, terms: Sequence[str], unknown: Literal["drop", "zero"] = "drop") -> Ids:
        """Sorted ids of the documents with all known terms; empty if no term is known.

        Source: U:src/text_search_matches_inverted_index.py:17, which drops terms that no document has (`unicorn dog`
        counts as `dog`). With unknown="zero", a query with an unknown term finds nothing.
        """
        wanted = set(terms)
        known = sorted((self.postings(term) for term in wanted if term in self.place), key=len)
        if not known or (unknown == "zero" and len(known) < len(wanted)):
            return self.ids[:0]
        hits = known[0]
        for other in known[1:]:  # from the rarest term to the most frequent
            place = np.searchsorted(other, hits)
            hits = hits[other[np.minimum(place, len(other) - 1)] == hits]
        return hits

    def counts(self, queries: Sequence[Sequence[str]], unknown: Literal["drop", "zero"] = "drop") -> Ids:
        """Number of matching documents of every query, (Q,)."""
        return np.array([len(self.search(terms, unknown)) for terms in queries], dtype=np.int64)

    def save(self, path: str | Path | BinaryIO) -> None:
        """Write the index as .npz of plain arrays, which loads without pickle."""
        encoded = [term.encode() for term in self.terms]
        np.savez(
            path,
            text=np.frombuffer(b"".join(encoded), dtype=np.uint8),
            ends=np.cumsum([len(term) for term in encoded], dtype=np.int64),
            offsets=self.offsets,
            ids=self.ids.astype(np.uint32 if self.num_documents <= 2**32 else np.int64),
            num_documents=self.num_documents,
        )

    @classmethod
    def load(cls, path: str | Path) -> "InvertedIndex":
        with np.load(path, allow_pickle=False) as file:
            text, ends = file["text"].tobytes(), file["ends"].tolist()
            terms = [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
            return cls(terms, file["offsets"], file["ids"].astype(np.int64), int(file["num_documents"]))


def count_partitioned(
    parts: Sequence[InvertedIndex], queries: Sequence[Sequence[str]], unknown: Literal["drop", "zero"] = "drop"
) -> Ids:
    """Counts of all queries, (Q,), from indexes of disjoint partitions; equal to those of one merged index.

    c matches i <=> K_c is not empty and a subset of N_i, with K_c = the terms of c that *some* document of the whole
    corpus has. So the known terms are first collected over all partitions; in a partition that lacks one of them, c has
    no match.
    (Upstream run on partitions drops the terms that are unknown in each of them, so its sums are too large.)
    """
    vocabulary = set().union(*(index.place for index in parts))
    if unknown == "drop":
        queries = [[term for term in terms if term in vocabulary] for terms in queries]
    return sum((index.counts(queries, unknown="zero") for index in parts), np.zeros(len(queries), dtype=np.int64))


# -------------------------------------------------------------------------------------------------- image tagger's head


def label_embedding(descriptions: Tensor) -> Tensor:
    """Text features (K, M, D) of M descriptions -> (K, D): normalise, mean, normalise.

    Source: U:ram_model/ram/utils/openset_utils.py:336.
    """
    return F.normalize(F.normalize(descriptions.float(), dim=-1).mean(dim=1), dim=-1)


def description_weights(cls: Tensor, descriptions: Tensor, log_scale: Tensor | float) -> Tensor:
    """w (B, K, M) = softmax over a concept's descriptions of exp(s) <e_0, L_km>; cls (B, D), descriptions (K, M, D).

    Source: U:ram_model/ram/models/ram_plus.py:346. Only the CLS token is normalised here. The authors pass one
    averaged vector per concept (M = 1), so all weights are 1; M = 51 is RAM++'s original rule.
    """
    scale = torch.as_tensor(log_scale).exp()
    return torch.einsum("bd,kmd->bkm", scale * F.normalize(cls, dim=-1), descriptions).softmax(dim=-1)


class OpenSetHead(nn.Module):
    """RAM++'s tagging head: probability p = sigmoid(fc(head(relu(W sum_m w_m L_m), image))) of each concept.

    Source: U:ram_model/ram/models/ram_plus.py:330. `attention(queries (B, K, width), tokens (B, L, dim))` is the
    cross-attention over all image tokens. Attribute names match RAM++'s checkpoints.
    """

    def __init__(self, attention: nn.Module, token_dim: int = 1536, width: int = 768, dim: int = 512):
        super().__init__()
        self.image_proj = nn.Linear(token_dim, dim)
        self.wordvec_proj = nn.Linear(dim, width)
        self.tagging_head = attention
        self.fc = nn.Linear(width, 1)
        self.reweight_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, tokens: Tensor, descriptions: Tensor) -> Tensor:
        """tokens (B, L, token_dim), CLS first, descriptions (K, M, dim) or (K, dim) -> probabilities (B, K)."""
        descriptions = descriptions[:, None] if descriptions.ndim == 2 else descriptions
        image = self.image_proj(tokens)
        weights = description_weights(image[:, 0], descriptions, self.reweight_scale)
        concepts = torch.einsum("bkm,kmd->bkd", weights, descriptions)
        queries = F.relu(self.wordvec_proj(concepts))
        return self.fc(self.tagging_head(queries, image)).squeeze(-1).sigmoid()


def tag_presence(probabilities: ArrayLike, threshold: float, half: bool = True) -> NDArray[np.bool_]:
    """Presence (N, K): probability > threshold. U:src/image_search_inverted_index_creation.py:39.

    Upstream stores probabilities in half precision, so the threshold is rounded to half precision: 0.7 to 0.70019531.
    """
    dtype = np.float16 if half else np.float32
    return np.asarray(probabilities).astype(dtype) > dtype(threshold)


# ----------------------------------------------------------------------------------------------- captions and images


def pair_keys(pairs: ArrayLike, num_concepts: int) -> Ids:
    """(document, concept) pairs (m, 2) -> sorted, unique integers document * K + concept."""
    pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return np.unique(pairs[:, 0] * num_concepts + pairs[:, 1])


def matched_counts(text_pairs: ArrayLike, image_pairs: ArrayLike, num_concepts: int) -> Ids:
    """Number of documents with each concept in both caption and image, (K,), from (document, concept) pairs.

    text_pairs: (m, 2); image_pairs: (n, 2), with the same document ids.

    Source: U:src/integrated_search_matches_inverted_index.py:178.
    """
    both = np.intersect1d(pair_keys(text_pairs, num_concepts), pair_keys(image_pairs, num_concepts), assume_unique=True)
    return np.bincount(both % num_concepts, minlength=num_concepts)


def controlled_counts(image_pairs: ArrayLike, keep_ids: ArrayLike, num_concepts: int) -> Ids:
    """Similarity control: number of images of each concept, (K,), whose ids are in `keep_ids` (k,).

    image_pairs: (image, concept), (n, 2). Source: U:src/image_search_matches_inverted_index.py:63. An id that is twice
    in `keep_ids` counts twice.
    """
    kept, times = np.unique(np.asarray(keep_ids, dtype=np.int64), return_counts=True)
    documents, concepts = np.divmod(pair_keys(image_pairs, num_concepts), num_concepts)
    place = np.searchsorted(kept, documents)
    found = place < len(kept)
    found[found] = kept[place[found]] == documents[found]
    return np.bincount(concepts[found], times[place[found]], minlength=num_concepts).astype(np.int64)
