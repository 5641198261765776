"""Code of the authors that nothing runs here, written again for golden and parity tests; files for tests of TL;DR."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from shared import data, tars
from tldr_reduction.reduce import refined
from tldr_reduction.tokenizer import PROMPT, SPECIAL, pre_caption


def refine_annotations(
    rows: Sequence[Sequence[str]], generated: Iterable[dict], annotations: Iterable[dict]
) -> list[dict]:
    """Annotations with the captions of `rows`, followed by the generated ones.
    generate_train_json_w_caption.py:33-82 of datacentric.vlp@a488102.

    rows: [caption, key] of the source; generated: {"image_id": row number, "caption"}; annotations: {"image",
    "caption"}. A row belongs to the annotation whose file name, up to its first dot, equals the end of the row's key,
    after its last "_".
    """
    captions = [row[0] for row in rows]
    for entry in generated:
        row = int(entry["image_id"])
        if 0 <= row < len(captions):
            captions[row] = refined(captions[row], entry["caption"])
    by_key = {row[1].split("_")[-1]: caption for row, caption in zip(rows, captions, strict=True)}
    keys = [entry["image"].split("/")[-1].split(".")[0] for entry in annotations]
    return [
        {"image": entry["image"], "caption": by_key.get(key, entry["caption"])}
        for key, entry in zip(keys, annotations, strict=True)
    ]


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
