"""Files for tests of TL;DR."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from shared import data, tars
from tldr_reduction.tokenizer import PROMPT, SPECIAL, pre_caption


def build_vocab(captions: Iterable[str]) -> list[str]:
    """A WordPiece vocabulary: special tokens, characters, words of the prompt, and words by descending frequency."""
    texts = [pre_caption(caption) for caption in (PROMPT, *captions)]
    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text))
    characters = sorted({character for word in words for character in word})
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
    return list(dict.fromkeys([*pieces, *PROMPT.split(), *sorted(words, key=lambda word: (-words[word], word))]))


def emoji_pairs(source: Path, count: int) -> list[dict]:
    """The first `count` samples of the embedded corpus, with the emoji's name as caption."""
    found = []
    for key, files in tars.samples(data.expand_shards(str(source / "train")), ("png", "json")):
        about = json.loads(files["json"])
        found.append({"__key__": key, "png": files["png"], "txt": about["name"], "json": json.dumps(about)})
        if len(found) == count:
            return found
    return found
