"""Caption files: JSON lists of {"__key__": sample, "caption": text}, as the authors publish MiniCPM's captions."""

import array
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from shared.errors import UserError
from shared.index import Lookup, Strings, cached

CHUNK = 2**20  # characters that are parsed at a time
BETWEEN = re.compile(r"[\s,]*")


class Captions(Mapping[str, str]):
    """{sample key: caption} of a caption file, kept as bytes; those of a large file are shared by all processes.

    The caption may have any field name (the authors': minicpm); a null caption becomes an empty string.
    """

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise UserError(f"caption file {path} does not exist")
        arrays, _ = cached([str(path)], Path("data/cache"), lambda: (read(path), {}))
        self.path, self.samples = path, Strings(arrays["keys"], arrays["key_ends"])
        self.texts = Strings(arrays["texts"], arrays["text_ends"])

    @functools.cached_property
    def lookup(self) -> Lookup:
        """Finds the position of a sample."""
        return Lookup(self.samples)

    def __getitem__(self, key: str) -> str:
        if (row := self.lookup.row(key)) < 0:
            raise KeyError(key)
        return self.texts[row]

    def __iter__(self) -> Iterator[str]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def check(self, keys: Strings, where: str) -> None:
        """UserError if a sample of `where` has no caption."""
        missing = np.flatnonzero(self.lookup.find(keys) < 0)
        if missing.size:
            raise UserError(f"{self.path} has no caption of sample {keys[int(missing[0])]}, which is in {where}")


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The keys and captions of a file, each as UTF-8 bytes and the ends of its strings."""
    texts = {"key": bytearray(), "text": bytearray()}
    ends = {name: array.array("q") for name in texts}
    try:
        with open(path, encoding="utf-8") as file:
            for entry in entries(file):
                (caption,) = (value for name, value in entry.items() if name != "__key__")
                for name, text in (("key", entry["__key__"]), ("text", "" if caption is None else caption)):
                    texts[name] += str(text).encode(errors="surrogateescape")
                    ends[name].append(len(texts[name]))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f'{path} is no caption file: it should be a JSON list of {{"__key__": sample, "caption": text}}'
        ) from error
    found = {f"{name}s": np.frombuffer(text, dtype=np.uint8) for name, text in texts.items()}
    return found | {f"{name}_ends": np.array(of, dtype=np.int64) for name, of in ends.items()}


def entries(file: TextIO) -> Iterator[Any]:
    """The entries of a JSON list, one at a time. ValueError if the file holds none."""
    decoder, text = json.JSONDecoder(), file.read(CHUNK).lstrip()
    if not text.startswith("["):
        raise ValueError("no list")
    place = 1
    while True:
        place = BETWEEN.match(text, place).end()
        if text[place : place + 1] == "]":
            return
        try:
            entry, place = decoder.raw_decode(text, place)
        except ValueError:  # perhaps cut off at the end of the chunk
            if not (more := file.read(CHUNK)):
                raise
            text, place = text[place:] + more, 0
        else:
            yield entry
