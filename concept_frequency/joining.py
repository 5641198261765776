"""Counts and scores of one concept under two spellings: class names of test sets differ from the authors' names.

They write `Annual Crop Land`, `american_bulldog` and `2012 Acura TL Sedan` where CLIP-benchmark's sets have
`annual crop land`, `american bulldog` and `Acura TL Sedan 2012`; some classes have another name altogether.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

# Folded names in CLIP-benchmark's sets and in torchvision -> in the authors' counts, where spelling is not all.
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
    "missile 1": "missile",  # ImageNet has two classes of each of these names there
    "missile 2": "projectile",
    "sunglasses 1": "sunglass",
    "sunglasses 2": "sunglasses",
}


class Joined(NamedTuple):
    """Concepts with a count and a score, and those with one of them alone."""

    names: dict[str, str]  # of a score -> of its count
    respelled: int  # how many differ in case, `_`, `-` or the order of words
    renamed: int  # how many have another name
    counts_left: list[str]
    scores_left: list[str]


def fold(name: str) -> str:
    """Lower case, words parted by one space each: `Polka-dotted` and `polka_dotted` are one."""
    return " ".join(words(name))


def words(name: str) -> list[str]:
    """Letters and digits of a name in lower case, split at everything else."""
    return re.findall(r"[^\W_]+", name.casefold())


def numbered(names: Sequence[str]) -> list[str]:
    """Names of classes, with ` (1)`, ` (2)` behind those that several classes have: they are keys of scores."""
    times, seen = Counter(names), Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if times[name] > 1 else name)
    return found


def join(counts: Mapping[str, int], scores: Mapping[str, float], aliases: Mapping[str, str] | None = None) -> Joined:
    """Find each score's count: by equal names, `aliases`, spelling, the order of words, OTHER_NAMES, in this order.

    A count is given to one score; what spelling leaves ambiguous stays apart (`T-shirt` and `t-shirt` are two concepts
    of the authors).
    """
    names = {name: name for name in scores if name in counts}
    for name in scores:
        other = (aliases or {}).get(name)
        if name not in names and other in counts and other not in names.values():
            names[name] = other
    exact = len(names)
    for key in (fold, lambda name: tuple(sorted(words(name)))):
        places = free(counts, names, key)
        wanted = defaultdict(list)
        for name in scores:
            if name not in names:
                wanted[key(name)].append(name)
        names |= {of[0]: places[k][0] for k, of in wanted.items() if len(of) == len(places.get(k, ())) == 1}
    respelled, places = len(names) - exact, free(counts, names, fold)
    for name in scores:
        other = places.get(OTHER_NAMES.get(fold(name), ""), ())
        if name not in names and len(other) == 1 and other[0] not in names.values():
            names[name] = other[0]
    taken = set(names.values())
    return Joined(
        {name: names[name] for name in scores if name in names}, respelled, len(names) - exact - respelled,
        [name for name in counts if name not in taken], [name for name in scores if name not in names],
    )  # fmt: skip


def free(
    counts: Mapping[str, int], names: Mapping[str, str], key: Callable[[str], Hashable]
) -> dict[Hashable, list[str]]:
    """Names of counts that no score has yet, by what `key` makes of them."""
    taken, found = set(names.values()), defaultdict(list)
    for name in counts:
        if name not in taken:
            found[key(name)].append(name)
    return found
