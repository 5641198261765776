"""python -m studies.flame_recaption: captions of three lengths for the embedded corpus."""

from pathlib import Path

import numpy as np
from flame_runs import captions  # noqa: F401
from scripts import SHARDS

from flame.captions import Captions
from shared import data
from studies import flame_recaption as recaption

SCRIPT = "flame.embed"


def test_recaptions_are_the_same_for_all_drawings_of_an_emoji(captions: Path):
    lists = {kind: Captions(captions / f"{kind}.json") for kind in ("raw", "short", "long")}
    pairs = data.open_pairs(str(SHARDS / "00000.tar"))
    assert all(set(found) == set(pairs.keys.tolist()) for found in lists.values())
    by_name: dict[str, set] = {}
    for key, name in lists["raw"].items():
        by_name.setdefault(name, set()).add((lists["short"][key], lists["long"][key]))
    assert all(len(texts) == 1 for texts in by_name.values()) and len(by_name) < len(pairs)
    words = [np.mean([len(text.split()) for text in lists[kind].values()]) for kind in ("raw", "short", "long")]
    assert words[0] < words[1] < words[2]


def test_an_emoji_without_keywords_has_captions_without_gaps():
    about = {"hexcode": "1F408", "name": "cat", "tags": [], "group": "animals-nature", "subgroup": "animal-mammal"}
    raw, short, long = recaption.captions(about)
    assert (raw, short) == ("cat", "a drawing of cat") and "animals and nature" in long
    assert "It may stand for" not in long and "  " not in long and "{" not in long
    of_tags = recaption.captions(about | {"tags": ["pet", "whiskers"]})
    assert of_tags[0] == "cat" and all(word in text for word in ("pet", "whiskers") for text in of_tags[1:])
    assert of_tags == recaption.captions(about | {"tags": ["pet", "whiskers"]})
