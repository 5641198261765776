"""Small shards, written and read without our code."""

import io
import tarfile
from pathlib import Path

from PIL import Image

from shared import data


def png(mode: str = "RGB", size: tuple[int, int] = (6, 4), colour="red", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "png", **options)
    return buffer.getvalue()


def write_tar(path: Path, *files: tuple[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pair(key: str, caption: str | None = None) -> list[tuple[str, bytes | str]]:
    return [(f"{key}.png", png()), (f"{key}.txt", caption or f"caption of {key}")]


def three(path: Path) -> Path:
    return write_tar(path, *pair("a"), *pair("b"), *pair("c"))


def read_all(pairs: data.Shards | data.TSV) -> tuple[list[data.Pair], list[data.Broken]]:
    """Read every row, with broken ones replaced; returns also all reports from opening and reading."""
    broken = list(pairs.broken)
    return [data.read_or_next(pairs, row, broken) for row in range(len(pairs))], broken
