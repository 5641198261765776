"""No "Zero-Shot" Without Exponential Data (arXiv 2404.04125, NeurIPS 2024): how often a corpus holds a concept.

Authors' code: bethgelab/frequency_determines_performance@11ef009, cited below as `U:<path>:<line>`.
The paper's contribution in this file is the count itself:
  - captions: noun sets, an inverted index over them, multi-word search          `noun_set`, `InvertedIndex`
  - the same over any partition of the captions, with equal counts               `count_partitioned`
  - images: an open-set tagger on descriptions, present above a threshold        `OpenSetHead`, `tag_presence`
  - both: the samples whose caption and image agree on the concept               `matched_counts`
Spelling of a concept is kept as its test set has it. Ids are positions in the corpus, from 0.

Shapes: B batch, K concepts, M descriptions of a concept, D embedding, L image tokens, N samples, Q queries, V terms.
Counting works on NumPy arrays (CPU tensors are taken as they are), the tagger's head on tensors.
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
    """Everything outside A-Z, a-z and space is deleted: symbols, digits and other alphabets leave the empty string."""
    return re.sub(r"[^A-Za-z ]", "", lemma)


def noun_set(tokens: Iterable[tuple[str, str]], casefold: bool = False) -> set[str]:
    """N_i of one caption, from its (lemma, part of speech) pairs: cleaned lemmas of nouns and proper nouns.

    Source: U:src/text_search_inverted_index_get_word_dictionaries.py:93. Case is kept, and queries are in lower case,
    so that `Eagles`, a proper noun, is never found; `casefold` is the remedy. The empty string may be a member.
    """
    nouns = {clean(lemma) for lemma, pos in tokens if pos in ("NOUN", "PROPN")}
    return {noun.lower() for noun in nouns} if casefold else nouns


def query_terms(
    concept: str,
    lemmas_of: Callable[[str], Sequence[str]] | None,
    last_token: bool = True,
    clean_terms: bool = False,
) -> list[str]:
    """T_c: the lower-cased words of a concept, split at `_` and white space, each lemmatised by itself.

    Source: U:src/text_search_matches_inverted_index.py:57. `lemmas_of(word)` gives the lemmas of a word's tokens, None
    leaves words as they are (upstream's `lowercased`). Upstream's two quirks have names: of a word of several tokens
    only the `last_token` counts (`t-shirt` is searched as `shirt`), and terms are not cleaned as the index is, so that
    `crème` cannot match (`clean_terms` is the remedy). A word without tokens has no term.
    """
    terms: list[str] = []
    for word in filter(None, re.split(r"[_\s]+", concept.lower())):
        lemmas = [word] if lemmas_of is None else list(lemmas_of(word))
        terms += lemmas[-1:] if last_token else lemmas
    return [term for term in map(clean, terms) if term] if clean_terms else terms


def case_variants(name: str) -> list[str]:
    """Words in lower or Capitalised form, joined by `_`, in product order; the first that an image index knows is taken
    for LAION-Aesthetics only. Source: U:src/image_search_matches_inverted_index.py:10.
    """
    forms = [(word.lower(), word.capitalize()) for word in name.split()]
    return ["_".join(words) for words in itertools.product(*forms)]


# ------------------------------------------------------------------------------------------------------ inverted index


class InvertedIndex:
    """P_w = ids of the documents whose noun set holds w, for all w, in one array: 8 bytes a posting.

    terms: V words; ids[offsets[v]:offsets[v + 1]] are the sorted, unique ids of terms[v]; num_documents: ids are below.
    Source: U:src/text_search_inverted_index_get_word_dictionaries.py:93 (lists of Python ints, first id twice a chunk).
    """

    def __init__(self, terms: Sequence[str], offsets: Ids, ids: Ids, num_documents: int):
        self.terms, self.offsets, self.ids, self.num_documents = list(terms), offsets, ids, num_documents
        self.place = {term: v for v, term in enumerate(self.terms)}

    @classmethod
    def build(cls, noun_sets: Iterable[set[str]]) -> "InvertedIndex":
        """Index of the noun sets of documents 0, 1, 2, ..."""
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
        """One index of the documents of all parts, in order; the ids of a part move by the documents before it.

        Source: U:src/text_search_inverted_index_combine_dictionaries.py:22.
        """
        terms = sorted(set().union(*(part.terms for part in parts)))
        place = {term: v for v, term in enumerate(terms)}
        ranks = [np.array([place[term] for term in part.terms], dtype=np.int64) for part in parts]
        lengths = np.zeros(len(terms), dtype=np.int64)
        for part, rank in zip(parts, ranks, strict=True):
            lengths[rank] += np.diff(part.offsets)
        offsets = np.concatenate([[0], lengths.cumsum()])
        ids, free, documents = np.empty(offsets[-1], dtype=np.int64), offsets[:-1].copy(), 0
        for part, rank in zip(parts, ranks, strict=True):
            length = np.diff(part.offsets)
            ids[np.repeat(free[rank] - part.offsets[:-1], length) + np.arange(len(part.ids))] = part.ids + documents
            free[rank] += length
            documents += part.num_documents
        return cls(terms, offsets, ids, documents)

    def postings(self, term: str) -> Ids:
        """P_w, empty for an unknown term; a view."""
        v = self.place.get(term)
        return self.ids[:0] if v is None else self.ids[self.offsets[v] : self.offsets[v + 1]]

    def search(self, terms: Sequence[str], unknown: Literal["drop", "zero"] = "drop") -> Ids:
        """Sorted ids of the documents that hold all known terms; none if no term is known.

        Source: U:src/text_search_matches_inverted_index.py:17, which drops a term that no document has (`unicorn dog`
        counts as `dog`); `zero` lets such a query find nothing.
        """
        wanted = set(terms)
        known = sorted((self.postings(term) for term in wanted if term in self.place), key=len)
        if not known or (unknown == "zero" and len(known) < len(wanted)):
            return self.ids[:0]
        hits = known[0]
        for other in known[1:]:  # the rarest term first: what is left is looked up in the longer lists
            place = np.searchsorted(other, hits)
            hits = hits[other[np.minimum(place, len(other) - 1)] == hits]
        return hits

    def counts(self, queries: Sequence[Sequence[str]], unknown: Literal["drop", "zero"] = "drop") -> Ids:
        """count(c) of every query, (Q,)."""
        return np.array([len(self.search(terms, unknown)) for terms in queries], dtype=np.int64)

    def save(self, path: str | Path | BinaryIO) -> None:
        """One .npz of plain arrays: no pickle is read back."""
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
    """counts of all queries, (Q,), from indexes of disjoint parts of the documents: equal to one index of them all.

    c matches i <=> K_c is not empty and K_c within N_i, with K_c = the terms of c that *some* document of the whole
    corpus has. So the parts exchange which terms they know, and a part that lacks a known term has no hit. (With each
    part dropping its own unknown terms, as upstream does when run on parts, sums are too large.)
    """
    vocabulary = set().union(*(part.place for part in parts))
    if unknown == "drop":
        queries = [[term for term in terms if term in vocabulary] for terms in queries]
    return sum((part.counts(queries, unknown="zero") for part in parts), np.zeros(len(queries), dtype=np.int64))


# -------------------------------------------------------------------------------------------------- image tagger's head


def label_embedding(descriptions: Tensor) -> Tensor:
    """(K, M, D) text features of M descriptions -> (K, D): normalise, mean, normalise again.

    Source: U:ram_model/ram/utils/openset_utils.py:336.
    """
    return F.normalize(F.normalize(descriptions.float(), dim=-1).mean(dim=1), dim=-1)


def description_weights(cls: Tensor, descriptions: Tensor, log_scale: Tensor | float) -> Tensor:
    """w (B, K, M) = softmax over a concept's descriptions of exp(s) <e_0, L_km>; cls (B, D), descriptions (K, M, D).

    Source: U:ram_model/ram/models/ram_plus.py:346. The CLS token is normalised here, descriptions are as given. The
    authors give one averaged vector a concept (M = 1), for which all weights are 1; with M = 51 it is RAM++'s own rule.
    """
    scale = torch.as_tensor(log_scale).exp()
    return torch.einsum("bd,kmd->bkm", scale * F.normalize(cls, dim=-1), descriptions).softmax(dim=-1)


class OpenSetHead(nn.Module):
    """RAM++'s tagger on image tokens: p = sigmoid(fc(head(relu(W sum_m w_m L_m), image))), a probability a concept.

    Source: U:ram_model/ram/models/ram_plus.py:330. `attention(queries (B, K, width), tokens (B, L, dim))` is the
    cross-attention over all image tokens; attribute names are those of RAM++'s checkpoints.
    """

    def __init__(self, attention: nn.Module, token_dim: int = 1536, width: int = 768, dim: int = 512):
        super().__init__()
        self.image_proj = nn.Linear(token_dim, dim)
        self.wordvec_proj = nn.Linear(dim, width)
        self.tagging_head = attention
        self.fc = nn.Linear(width, 1)
        self.reweight_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, tokens: Tensor, descriptions: Tensor) -> Tensor:
        """tokens (B, L, token_dim) with the CLS token first, descriptions (K, M, dim) or (K, dim) -> (B, K)."""
        descriptions = descriptions[:, None] if descriptions.ndim == 2 else descriptions
        image = self.image_proj(tokens)
        weights = description_weights(image[:, 0], descriptions, self.reweight_scale)
        concepts = torch.einsum("bkm,kmd->bkd", weights, descriptions)
        queries = F.relu(self.wordvec_proj(concepts))
        return self.fc(self.tagging_head(queries, image)).squeeze(-1).sigmoid()


def tag_presence(probabilities: ArrayLike, threshold: float, half: bool = True) -> NDArray[np.bool_]:
    """(N, K): is the concept in the image, probability > threshold; U:src/image_search_inverted_index_creation.py:39.

    Upstream keeps probabilities in half precision, and the threshold becomes half in the comparison: 0.7 is 0.70019531.
    """
    dtype = np.float16 if half else np.float32
    return np.asarray(probabilities).astype(dtype) > dtype(threshold)


# ----------------------------------------------------------------------------------------------- captions and images


def pair_keys(pairs: ArrayLike, num_concepts: int) -> Ids:
    """(document, concept) rows (m, 2) -> sorted unique document * K + concept."""
    pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return np.unique(pairs[:, 0] * num_concepts + pairs[:, 1])


def matched_counts(text_pairs: ArrayLike, image_pairs: ArrayLike, num_concepts: int) -> Ids:
    """count(c) = |text_hits(c) and image_hits(c)|, (K,), from (document, concept) rows (m, 2), (n, 2) in one id space.

    Source: U:src/integrated_search_matches_inverted_index.py:178.
    """
    both = np.intersect1d(pair_keys(text_pairs, num_concepts), pair_keys(image_pairs, num_concepts), assume_unique=True)
    return np.bincount(both % num_concepts, minlength=num_concepts)


def controlled_counts(image_pairs: ArrayLike, keep_ids: ArrayLike, num_concepts: int) -> Ids:
    """Similarity control, (K,): how many of the kept ids (k,) are among a concept's images (n, 2).

    Source: U:src/image_search_matches_inverted_index.py:63; an id that the list of kept ones holds twice counts twice.
    """
    kept, times = np.unique(np.asarray(keep_ids, dtype=np.int64), return_counts=True)
    documents, concepts = np.divmod(pair_keys(image_pairs, num_concepts), num_concepts)
    place = np.searchsorted(kept, documents)
    found = place < len(kept)
    found[found] = kept[place[found]] == documents[found]
    return np.bincount(concepts[found], times[place[found]], minlength=num_concepts).astype(np.int64)
