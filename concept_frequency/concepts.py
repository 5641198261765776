"""Lists of concepts, and the files with their counts and scores, in the authors' layout.

Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:`. Concepts are class names (classification),
nouns of test captions (retrieval) and curated nouns of prompts (generation). Names are kept raw: spaces, `_`, case.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from concept_frequency.model import clean
from shared.errors import UserError


class Concepts(NamedTuple):
    """Nouns of test captions, and the captions and images that contain them."""

    names: list[str]
    to_images: dict[str, list[int]]
    to_texts: dict[str, list[int]]


def caption_concepts(
    docs: Sequence[Iterable[tuple[str, str]]], min_images: int = 10, captions_per_image: int = 5
) -> Concepts:
    """Lower-cased nouns of the captions that occur in at least `min_images` images; caption 5i..5i+4 are of image i.

    Source: U:src/downstream_retrieval_extract_concepts.py:44; the paper's text says 5. docs: (lemma, part of speech)
    pairs of each caption. The empty string can be among the concepts, as in COCO's list.
    """
    texts: dict[str, list[int]] = defaultdict(list)
    for i, tokens in enumerate(docs):
        for noun in {clean(lemma).lower() for lemma, pos in tokens if pos in ("NOUN", "PROPN")}:
            texts[noun].append(i)
    num_images = len(docs) // captions_per_image
    images = {noun: sorted({i // captions_per_image for i in rows} - {num_images}) for noun, rows in texts.items()}
    names = sorted(noun for noun, rows in images.items() if len(rows) >= min_images)
    return Concepts(names, {noun: images[noun] for noun in names}, {noun: texts[noun] for noun in names})


def prompts_with_concept(
    prompts: Sequence[str], words: Sequence[str], plural_prefix: bool = True
) -> dict[str, list[int]]:
    """Prompts (lower case) that contain each word; words in no prompt are left out.
    U:src/text_to_image_experiments/utils.py:29.

    Punctuation is removed. A word matches an equal word of the prompt or, by upstream's plural rule, one that starts
    with it plus `s`: `car` is found in `carsick`. With `plural_prefix=False` nothing may follow the `s`.
    """
    plain = [" " + re.sub(r"[^\w\s]", "", prompt) + " " for prompt in prompts]
    plural = "s" if plural_prefix else "s "
    found = {
        word: [i for i, prompt in enumerate(plain) if f" {word} " in prompt or f" {word}{plural}" in prompt]
        for word in words
    }
    return {word: rows for word, rows in found.items() if rows}


def concept_scores(prompts_of: dict[str, list[int]], scores: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    """Scores (n, S) of each concept's prompts, from S scores of every prompt; prompts without scores are left out.

    Source: U:src/text_to_image_experiments/utils.py:71.
    """
    table = np.asarray(scores, dtype=np.float64)
    return {word: table[[i for i in rows if i < len(table)]] for word, rows in prompts_of.items()}


def mean_scores(scores: dict[str, Sequence[float]], more_than: int = 5) -> dict[str, float]:
    """A concept's score is the mean over its prompts; concepts with 5 prompts or fewer are skipped.

    Source: U:notebooks/t2i_integrated_search_results.ipynb cell 3.
    """
    return {word: float(np.mean(values)) for word, values in scores.items() if len(values) > more_than}


# ---------------------------------------------------------------------------------------------------------------- files


def read_concepts(path: str | Path) -> list[str]:
    """Names from a folder with classnames.txt, a text file (one a line), or JSON: a list, the keys of a dictionary, or
    descriptions in the authors' layout ({name: texts}, or a list of such). Order kept, repetitions dropped.
    """
    path = Path(path)
    file = path / "classnames.txt" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist: a list of concepts is a folder with classnames.txt, .txt or .json")
    if file.suffix != ".json":
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    else:
        value = load_json(file)
        if not isinstance(value, (list, dict)):
            raise UserError(f"{file} holds no list of concepts but a {type(value).__name__}")
        names = [name for entry in value for name in (entry if isinstance(entry, dict) else [entry])]
    return list(dict.fromkeys(name for name in names if name))


def read_descriptions(path: str | Path) -> dict[str, list[str]]:
    """{name: texts} from JSON in the authors' layout, a dictionary or a list of dictionaries of one entry."""
    value = load_json(path)
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} holds no descriptions: it should be a dictionary, name -> texts, or a list of these")
    return {name: list(texts) for entry in entries for name, texts in entry.items()}


def load_json(path: str | Path):
    """The content of a JSON file; UserError names the file if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def load_counts(path: str | Path) -> dict[str, int]:
    """`<set>_<pretraining>_<method>_search_counts.json`: name -> count."""
    return load_json(path)


def load_results(path: str | Path, model: str) -> dict[str, float]:
    """`<set>_<prompts>_results.json`, or a retrieval file: concept -> score of one model, e.g. `RN50|cc3m`.

    CIFAR-10's `plane` is counted as `airplane` (U:notebooks/zero_shot_integrated_search_results.ipynb cell 6). The key
    must be equal; upstream takes the first key that contains both names.
    """
    return scores_of(load_json(path), model, path)


def scores_of(value: dict[str, dict], model: str, path: str | Path) -> dict[str, float]:
    """`load_results` for the content of the file `path`."""
    key = model_key(model)
    if key not in value:
        raise UserError(f"{path} has no model {key}; it has {', '.join(value)}")
    found = value[key] if isinstance(value[key], dict) else {}
    found = found.get("classwise", found.get("conceptwise"))
    if not isinstance(found, dict):
        raise UserError(f"{path} has no scores of concepts under {key}, classwise or conceptwise")
    scores = dict(found)
    if Path(path).name.startswith("cifar10_") and "plane" in scores:
        scores["airplane"] = scores.pop("plane")
    return scores


def model_key(model: str) -> str:
    """`RN50|cc3m` -> `backboneRN50_pretrainedcc3m`, the authors' key; other names are returned unchanged."""
    backbone, bar, pretrained = model.partition("|")
    return f"backbone{backbone}_pretrained{pretrained}" if bar else model
