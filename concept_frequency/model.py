"""No "Zero-Shot" Without Exponential Data (arXiv 2404.04125, NeurIPS 2024): how often a concept occurs in a corpus.

Authors' code: bethgelab/frequency_determines_performance@11ef009, cited below as `U:<path>:<line>`.
The paper's contribution in this file is the count of concepts:
  - in captions: noun sets, an inverted index over them, multi-word search       `noun_set`, `InvertedIndex`
  - in images: an open-set tagger with descriptions, and a threshold             `RAMPlus`, `tag_presence`
  - in both: samples with the concept in caption and image                       `matched_counts`
Concepts keep the spelling of their test set. Documents are numbered from 0.

Shapes: B batch, K concepts, M descriptions of a concept, D embedding, L image tokens, N documents, V words.
Counting uses NumPy and scipy.sparse; the tagger uses tensors.
"""

import math
import re
from array import array
from collections.abc import Callable, Container, Iterable, Sequence

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from shared.errors import UserError

Ids = NDArray[np.int64]

# ---------------------------------------------------------------------------------------------------- words of captions


def clean(lemma: str) -> str:
    """Delete all characters except A-Z, a-z and space. A word of another alphabet becomes the empty string."""
    return re.sub(r"[^A-Za-z ]", "", lemma)


def noun_set(tokens: Iterable[tuple[str, str]], corrected: bool = False) -> set[str]:
    """N_i: the cleaned lemmas of nouns and proper nouns of one caption, from its (lemma, part of speech) pairs.

    Source: U:src/text_search_inverted_index_get_word_dictionaries.py:93. Lemmas keep their case but queries are in
    lower case, so the proper noun `Eagles` is never found; `corrected` lemmas are in lower case. The set may contain
    the empty string.
    """
    nouns = {clean(lemma) for lemma, pos in tokens if pos in ("NOUN", "PROPN")}
    return {noun.lower() for noun in nouns} if corrected else nouns


def query_terms(concept: str, lemmas_of: Callable[[str], Sequence[str]] | None, corrected: bool = False) -> list[str]:
    """T_c: the lower-cased words of a concept, split at `_` and white space, each lemmatised without context.

    Source: U:src/text_search_matches_inverted_index.py:57. `lemmas_of(word)` returns the lemmas of a word's tokens;
    None keeps words unchanged (upstream's `lowercased`). A word without tokens has no term. Upstream keeps only the
    last token of a word (`t-shirt` is searched as `shirt`) and does not clean terms like the index, so `crème` never
    matches; `corrected` terms are all tokens, cleaned.
    """
    terms: list[str] = []
    for word in filter(None, re.split(r"[_\s]+", concept.lower())):
        lemmas = [word] if lemmas_of is None else list(lemmas_of(word))
        terms += lemmas if corrected else lemmas[-1:]
    return [term for term in map(clean, terms) if term] if corrected else terms


def known_terms(terms: Sequence[str], vocabulary: Container[str]) -> list[str]:
    """K_c: the terms that some caption of the *whole* corpus has; upstream drops the others, so that `unicorn dog`
    counts as `dog`. U:src/text_search_matches_inverted_index.py:20."""
    return [term for term in terms if term in vocabulary]


class InvertedIndex:
    """P_w, the ids of the documents with word w in their noun set, for all w: a sparse matrix.

    terms: V words; matrix: bool (N, V) by columns, with sorted row indices. A posting is an index (int64 in scipy 1.17)
    and a bool.
    Source: U:src/text_search_inverted_index_get_word_dictionaries.py:93 (lists of Python ints; the first id of a word
    is stored twice per chunk).
    """

    def __init__(self, terms: Sequence[str], matrix: sparse.csc_array):
        self.terms, self.matrix = list(terms), matrix
        self.place = {term: v for v, term in enumerate(self.terms)}

    @classmethod
    def build(cls, noun_sets: Iterable[set[str]]) -> "InvertedIndex":
        """Build the index of the noun sets of documents 0, 1, 2, ..."""
        place: dict[str, int] = {}
        words, ends = array("i"), array("q", [0])
        for nouns in noun_sets:
            words.extend([place.setdefault(noun, len(place)) for noun in nouns])
            ends.append(len(words))
        rows = (np.ones(len(words), dtype=bool), np.asarray(words), np.asarray(ends))
        return cls(list(place), sparse.csr_array(rows, shape=(len(ends) - 1, len(place))).tocsc())

    def postings(self, term: str) -> Ids:
        """P_w as a view of the matrix; empty for an unknown term."""
        indices, ends, v = self.matrix.indices, self.matrix.indptr, self.place.get(term)
        return indices[:0] if v is None else indices[ends[v] : ends[v + 1]]

    def search(self, terms: Sequence[str]) -> Ids:
        """Sorted ids of the documents with all of the terms; none if there are no terms.

        Source: U:src/text_search_matches_inverted_index.py:17, after `known_terms`.
        """
        lists = sorted(map(self.postings, set(terms)), key=len)  # from the rarest term to the most frequent
        hits = lists[0] if lists else self.matrix.indices[:0]
        for other in lists[1:]:
            place = np.searchsorted(other, hits)
            hits = hits[other[np.minimum(place, len(other) - 1)] == hits]
        return hits

    def matches(self, queries: Sequence[Sequence[str]]) -> sparse.csc_array:
        """bool (N, K): the documents that match each of K lists of terms."""
        hits = [self.search(terms) for terms in queries]
        ends, rows = np.cumsum([0, *map(len, hits)]), np.concatenate([np.zeros(0, dtype=np.int64), *hits])
        return sparse.csc_array((np.ones(len(rows), dtype=bool), rows, ends), (self.matrix.shape[0], len(hits)))


# ------------------------------------------------------------------------------------------------- captions and images


def tag_presence(probabilities: ArrayLike, threshold: float) -> NDArray[np.bool_]:
    """Presence (N, K): probability > threshold. U:src/image_search_inverted_index_creation.py:39.

    Upstream stores probabilities in half precision, so the threshold is rounded to half precision: 0.7 to 0.70019531.
    """
    return np.asarray(probabilities).astype(np.float16) > np.float16(threshold)


def matched_counts(text: sparse.sparray, image: sparse.sparray) -> Ids:
    """Number of documents with each concept in both caption and image, (K,), from bool (N, K) of both.

    Source: U:src/integrated_search_matches_inverted_index.py:178.
    """
    return text.multiply(image).sum(axis=0)


def controlled_counts(documents: ArrayLike, concepts: ArrayLike, keep_ids: ArrayLike, num_concepts: int) -> Ids:
    """Similarity control: number of images of each concept, (K,), whose ids are in `keep_ids`.

    documents (n,), concepts (n,): the pairs that occur, each once. An id that is twice in `keep_ids` counts twice.
    Source: U:src/image_search_matches_inverted_index.py:63.
    """
    documents, concepts, keep = (np.asarray(each, dtype=np.int64) for each in (documents, concepts, keep_ids))
    kept, times = np.unique(keep, return_counts=True)
    rows = np.isin(documents, kept)
    weights = times[np.searchsorted(kept, documents[rows])]
    return np.bincount(concepts[rows], weights, minlength=num_concepts).astype(np.int64)


# -------------------------------------------------------------------------------------------------------- image tagger


def label_embedding(descriptions: Tensor) -> Tensor:
    """Text features (..., M, D) of M descriptions -> (..., D): normalise, mean, normalise.

    Source: U:ram_model/ram/utils/openset_utils.py:336.
    """
    return F.normalize(F.normalize(descriptions.float(), dim=-1).mean(dim=-2), dim=-1)


def description_weights(cls: Tensor, descriptions: Tensor, log_scale: Tensor | float) -> Tensor:
    """w (B, K, M) = softmax over a concept's M descriptions of exp(s) <x_0 / |x_0|, d_cm>.

    cls x_0 (B, D), descriptions d (K, M, D), log_scale s. Source: U:ram_model/ram/models/ram_plus.py:346. Only the CLS
    token is normalised here. The authors pass one averaged vector per concept (M = 1), so all weights are 1; M = 51 is
    RAM++'s original rule.
    """
    scale = torch.as_tensor(log_scale).exp()
    return torch.einsum("bd,kmd->bkm", scale * F.normalize(cls, dim=-1), descriptions).softmax(dim=-1)


class OpenSetHead(nn.Module):
    """RAM++'s tagging head: probability p = sigmoid(fc(head(relu(W sum_m w_cm d_cm + b), x))).

    x: projected image tokens; W, b: `wordvec_proj`. Source: U:ram_model/ram/models/ram_plus.py:330. `attention(queries
    (B, K, width), tokens (B, L, dim))` is the cross-attention over all image tokens. Attribute names match RAM++'s
    checkpoints.
    """

    def __init__(self, attention: nn.Module, token_dim: int = 1536, width: int = 768, dim: int = 512):
        super().__init__()
        self.image_proj = nn.Linear(token_dim, dim)
        self.wordvec_proj = nn.Linear(dim, width)
        self.tagging_head = attention
        self.fc = nn.Linear(width, 1)
        self.reweight_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, tokens: Tensor, descriptions: Tensor) -> Tensor:
        """tokens (B, L, token_dim), CLS first, descriptions (K, M, dim) -> probabilities (B, K)."""
        image = self.image_proj(tokens)
        weights = description_weights(image[:, 0], descriptions, self.reweight_scale)
        concepts = torch.einsum("bkm,kmd->bkd", weights, descriptions)
        queries = F.relu(self.wordvec_proj(concepts))
        return self.fc(self.tagging_head(queries, image)).squeeze(-1).sigmoid()


class CrossAttention(nn.Module):
    """One layer of RAM++'s tagging head: a BERT layer without self-attention. U:ram_model/ram/models/bert.py:316.

    Module names match the checkpoint.
    """

    def __init__(self, width: int = 768, dim: int = 512, heads: int = 4, hidden: int = 3072):
        super().__init__()
        self.heads = heads
        attention = nn.ModuleDict(
            {"query": nn.Linear(width, width), "key": nn.Linear(dim, width), "value": nn.Linear(dim, width)}
        )
        self.crossattention = nn.ModuleDict({"self": attention, "output": _dense_norm(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _dense_norm(hidden, width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """queries (B, K, width), tokens (B, L, dim) -> (B, K, width)."""
        attention, output = self.crossattention["self"], self.crossattention["output"]
        q, k, v = (
            attention[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, x in (("query", queries), ("key", tokens), ("value", tokens))
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        queries = output["LayerNorm"](queries + output["dense"](mixed))
        hidden = F.gelu(self.intermediate["dense"](queries))
        return self.output["LayerNorm"](queries + self.output["dense"](hidden))


def _dense_norm(width: int, out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(width, out), "LayerNorm": nn.LayerNorm(out, eps=1e-12)})


class TaggingHead(nn.Module):
    """Cross-attention layers from concepts to image tokens."""

    def __init__(self, num_layers: int = 2):
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([CrossAttention() for _ in range(num_layers)])})

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        for layer in self.encoder["layer"]:
            queries = layer(queries, tokens)
        return queries


class RAMPlus(nn.Module):
    """RAM++ (arXiv 2310.15200) for given concepts: image (B, 3, S, S), descriptions (K, M, 512) -> (B, K).

    Tokens are the outputs of Swin's last norm, preceded by their mean as CLS token
    (U:ram_model/ram/models/swin_transformer.py:560).
    """

    def __init__(self, swin: str = "swin_large_patch4_window12_384", image_size: int = 384):
        super().__init__()
        self.visual_encoder = timm.create_model(swin, num_classes=0, img_size=image_size)
        self.head = OpenSetHead(TaggingHead(), self.visual_encoder.num_features)

    def forward(self, images: Tensor, descriptions: Tensor) -> Tensor:
        tokens = self.visual_encoder.forward_features(images).flatten(1, 2)  # (B, L, C)
        return self.head(torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1), descriptions)

    def load_checkpoint(self, state: dict[str, Tensor]) -> None:
        """Load `ram_plus_swin_large_14m.pth` (entry `model`) without its own tags. UserError for any other file."""
        swin = {k.removeprefix("visual_encoder."): v for k, v in state.items() if k.startswith("visual_encoder.")}
        swin = {k: v for k, v in swin.items() if "attn_mask" not in k and "relative_position_index" not in k}
        prefixes = ("image_proj", "wordvec_proj", "tagging_head", "fc.", "reweight_scale")
        head = {k: v for k, v in state.items() if k.startswith(prefixes)}
        try:
            self.visual_encoder.load_state_dict(checkpoint_filter_fn(swin, self.visual_encoder))
            self.head.load_state_dict(head)
        except RuntimeError as error:
            raise UserError(
                f"this is not a checkpoint of RAM++: {str(error).splitlines()[-1].strip()[:200]}"
            ) from error
