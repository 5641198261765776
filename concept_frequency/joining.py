"""Match counts with scores although class names of test sets are spelled differently from the authors' names.

The authors write `Annual Crop Land`, `american_bulldog` and `2012 Acura TL Sedan`; CLIP-benchmark's sets have
`annual crop land`, `american bulldog` and `Acura TL Sedan 2012`. Some classes have an entirely different name.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

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
    return " ".join(words(name))


def words(name: str) -> list[str]:
    """The words of a name in lower case; every character that is not a letter or digit separates words."""
    return re.findall(r"[^\W_]+", name.casefold())


def numbered(names: Sequence[str]) -> list[str]:
    """Unique keys for class names: equal names get the suffixes ` (1)`, ` (2)`, ..."""
    times, seen = Counter(names), Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if times[name] > 1 else name)
    return found


def join(counts: Mapping[str, int], scores: Mapping[str, float], aliases: Mapping[str, str] | None = None) -> Joined:
    """Find each score's count by equal names, `aliases`, spelling, word order and OTHER_NAMES, in this order.

    A count belongs to at most one score. Ambiguous spellings are not matched (`T-shirt` and `t-shirt` are two of the
    authors' concepts).
    """
    names = {name: name for name in scores if name in counts}
    for name in scores:
        other = (aliases or {}).get(name)
        if name not in names and other in counts and other not in names.values():
            names[name] = other
    exact = len(names)
    for key in (fold, lambda name: tuple(sorted(words(name)))):
        places = unmatched(counts, names, key)
        wanted = defaultdict(list)
        for name in scores:
            if name not in names:
                wanted[key(name)].append(name)
        names |= {of[0]: places[k][0] for k, of in wanted.items() if len(of) == len(places.get(k, ())) == 1}
    respelled, places = len(names) - exact, unmatched(counts, names, fold)
    for name in scores:
        other = places.get(OTHER_NAMES.get(fold(name), ""), ())
        if name not in names and len(other) == 1 and other[0] not in names.values():
            names[name] = other[0]
    taken = set(names.values())
    return Joined(
        {name: names[name] for name in scores if name in names}, respelled, len(names) - exact - respelled,
        [name for name in counts if name not in taken], [name for name in scores if name not in names],
    )  # fmt: skip


def unmatched(
    counts: Mapping[str, int], names: Mapping[str, str], key: Callable[[str], Hashable]
) -> dict[Hashable, list[str]]:
    """{key(name): names} of the counts that are not matched with a score yet."""
    taken, found = set(names.values()), defaultdict(list)
    for name in counts:
        if name not in taken:
            found[key(name)].append(name)
    return found
