"""Lists of concepts, files with their scores in the authors' layout, and spellings of their names.

Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:`. Concepts are class names (classification),
nouns of test captions (retrieval) and curated nouns of prompts (generation). Names are kept raw: spaces, `_`, case.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
    """The content of a JSON file; UserError names the file if it does not exist or is not JSON."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def scores_of(value: dict[str, dict], model: str, path: str | Path) -> dict[str, float]:
    """Concept -> score of one model, e.g. `RN50|cc3m`, from the content of a file `<set>_<prompts>_results.json`.

    CIFAR-10's `plane` is counted as `airplane` (U:notebooks/zero_shot_integrated_search_results.ipynb cell 6). The key
    must be equal; upstream takes the first key that contains both names.
    """
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


def short(key: str) -> str:
    """`backboneRN50_pretrainedcc3m` -> `RN50|cc3m`."""
    return key.removeprefix("backbone").replace("_pretrained", "|", 1)


# ---------------------------------------------------------------------------------------------------------------- names

# Folded name in CLIP-benchmark's sets and torchvision -> name in the authors' counts, if more than spelling differs.
OTHER_NAMES = {
    "automobile": "car",  # CIFAR-10
    "plane": "airplane",
    "brushland or shrubland": "herbaceous vegetation land",  # EuroSAT
    "industrial buildings or commercial buildings": "industrial buildings",
    "residential buildings or homes or apartments": "residential buildings",
    "body of a cougar cat": "cougar body",  # Caltech-101
    "face of a cougar cat": "cougar face",
    "head of a crocodile": "crocodile head",
    "head of a flamingo": "flamingo head",
    "off center face": "face",
    "side of a car": "car side",
    "snoopy cartoon beagle": "snoopy",
    "yin and yang symbol": "yin yang",
    "air plant": "ball moss",  # Flowers-102
    "pink and yellow dahlia": "pink yellow dahlia",
    "missile 1": "missile",  # ImageNet has two classes with this name there
    "missile 2": "projectile",
    "sunglasses 1": "sunglass",
    "sunglasses 2": "sunglasses",
}


class Joined(NamedTuple):
    """Concepts with both a count and a score, and concepts with only one of them."""

    names: dict[str, str]  # name of a score -> name of its count
    respelled: int  # number of names that differ in case, `_`, `-` or word order
    renamed: int  # number of concepts with another name
    counts_left: list[str]
    scores_left: list[str]


def fold(name: str) -> str:
    """A name in lower case with single spaces between words: `Polka-dotted` and `polka_dotted` become equal."""
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


def numbered(names: Sequence[str]) -> list[str]:
    """Unique keys for class names: equal names get the suffixes ` (1)`, ` (2)`, ..."""
    times, seen = Counter(names), Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if times[name] > 1 else name)
    return found


def join(counts: Mapping[str, int], scores: Mapping[str, float], aliases: Mapping[str, str]) -> Joined:
    """Find each score's count by equal names, `aliases`, spelling, word order and OTHER_NAMES, in this order.

    Test sets spell names differently: the authors write `american_bulldog` and `2012 Acura TL Sedan`, CLIP-benchmark
    `american bulldog` and `Acura TL Sedan 2012`. Ambiguous spellings are not matched (`T-shirt` and `t-shirt` are two
    of the authors' concepts).
    """
    names: dict[str, str] = {}

    def match(of_score: Callable[[str], Hashable], of_count: Callable[[str], Hashable]) -> int:
        """Match the remaining names that have a key in common with one name alone. Returns the number of matches."""
        wanted, offered, taken = defaultdict(list), defaultdict(list), set(names.values())
        for name in scores:
            wanted[of_score(name)] += [name] if name not in names else []
        for name in counts:
            offered[of_count(name)] += [name] if name not in taken else []
        found = {of[0]: offered[key][0] for key, of in wanted.items() if len(of) == len(offered[key]) == 1}
        names.update(found)
        return len(found)

    def same(name: str) -> str:
        return name

    match(same, same)
    match(aliases.get, same)
    respelled = match(fold, fold) + match(sorted_words, sorted_words)
    renamed = match(lambda name: OTHER_NAMES.get(fold(name)), fold)
    taken = set(names.values())
    return Joined(
        {name: names[name] for name in scores if name in names}, respelled, renamed,
        [name for name in counts if name not in taken], [name for name in scores if name not in names],
    )  # fmt: skip


def sorted_words(name: str) -> str:
    """`fold` with the words in alphabetical order."""
    return " ".join(sorted(fold(name).split()))
