"""Image-text pairs for training: webdataset shards (img2dataset layout) or a TSV, read by index.

The tar headers of each shard are indexed once, so that any sample can be read by its byte offset. The order of an epoch
is then a pure function of (seed, epoch): it does not depend on the number of loader workers, is split evenly over
ranks, and a resumed run skips the samples that it has seen without reading them.

A sample's index is its position in the data set, from 0 on. Workers return uint8 pixels, which the training process
normalises on its device (`split_normalisation`).

Samples that lack an image or a caption, or that a damaged tar cuts off, have no index. A sample that proves unusable
when it is read (broken image, empty caption, wrong encoding) is replaced by the next readable one. Both are recorded as
`Broken` and reported at the end of the epoch.
"""

import array
import codecs
import csv
import errno
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor
from webdataset.shardlists import expand_urls

from shared import clip, run
from shared.errors import UserError
from shared.fetch import fetch, is_remote
from shared.index import Strings, cached, fingerprint, read_index
from shared.tars import MAX_BYTES, Broken, OpenFiles

MAX_PIXELS = 2**26  # a larger image is refused before it is decoded
MAX_CHARACTERS = 2**12  # of a caption: text towers read less, and byte-pair encoding is quadratic in a word's length
CAPTION_BYTES = 4 * MAX_CHARACTERS  # bytes of a caption that are read; a UTF-8 character has at most 4
HEADER = "its first line should be title<tab>filepath"  # of a table
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # no others, since PIL passes EPS to Ghostscript
NO_PICTURE = f"unreadable image: none of the formats {', '.join(FORMATS)}; AVIF needs Pillow 11.3"
DEEP = ("I", "F")  # modes of pictures with more than 8 bits a channel

Encoded = TypeVar("Encoded", np.ndarray, torch.Tensor)


class Pair(NamedTuple):
    key: str
    image: Image.Image  # RGB
    caption: str


class BrokenSample(Exception):
    """Raised by `read` for an unusable sample."""


def decode_image(data: bytes) -> Image.Image | torch.Tensor:
    """Bytes -> RGB image; transparency is composited on white, and 16 bits of grey become 8. BrokenSample if it is
    unreadable, of 32 bits or over MAX_PIXELS.

    Bytes of an .npy file, which are the features of a locked tower -> float32 tensor.
    """
    try:
        if data.startswith(b"\x93NUMPY"):
            return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32))
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BrokenSample(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} allowed")
        if image.mode.startswith(DEEP):  # PIL would cut at 255 what is brighter
            grey = np.array(image)
            if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
                raise BrokenSample("more than 16 bits a pixel: save it with 8 or 16")
            return Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except BrokenSample:
        raise
    except (Image.UnidentifiedImageError, KeyError) as error:  # KeyError: PIL before 11.3 has no AVIF
        raise BrokenSample(NO_PICTURE) from error
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, DecompressionBombError, struct.error ...
        raise BrokenSample(f"unreadable image: {type(error).__name__}") from error


# errno values that mean that a file is not there; other faults (of a drive, too many open files) may be temporary
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES)


def check_absent(error: Exception, path: str | Path, absent: Container[int | None] = ABSENT) -> None:
    """Raise an UserError that names `path` if `error` may be temporary: an OSError whose errno is not in `absent`."""
    if isinstance(error, OSError) and error.errno not in absent:
        raise UserError(
            f"{path} could not be read ({error.strerror}): run the command again; to leave it out, remove it"
        ) from error


def read_file(path: str | Path) -> bytes:
    """Bytes of an image file. BrokenSample if it is not a regular file (a device or pipe) or larger than MAX_BYTES.

    UserError for faults that may be temporary, so that no sample is left out for good.
    """
    try:
        if not os.path.isfile(path):
            raise BrokenSample("missing image")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL
        check_absent(error, path)
        raise BrokenSample("missing image") from error
    if len(content) > MAX_BYTES:
        raise BrokenSample(f"file of more than {MAX_BYTES} bytes")
    return content


def file_hash(content: bytes) -> bytes:
    """16-byte hash of an image's file or of its pixels."""
    return hashlib.blake2b(content, digest_size=16).digest()


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ToNormalizedTensor:
    """RGB image -> (3, H, W): bit for bit like torchvision's ToTensor and Normalize, in half their time."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        values = tuple(torch.tensor(each)[:, None, None] for each in (mean, std))
        self.values = {values[0].device: values}  # mean and std (3, 1, 1) by device

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.normalise(to_pixels(image))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) uint8 -> normalised float32 on the same device, in the same memory format."""
        if pixels.device not in self.values:
            values = next(iter(self.values.values()))
            self.values[pixels.device] = tuple(value.to(pixels.device) for value in values)
        mean, std = self.values[pixels.device]
        return pixels.float().div_(255).sub_(mean).div_(std)


def identity(pixels: torch.Tensor) -> torch.Tensor:
    return pixels


def split_normalisation(transform: Callable) -> tuple[Callable, Callable[[torch.Tensor], torch.Tensor]]:
    """Split an image transform -> (its steps up to uint8 pixels (3, H, W), its normalisation for batches).

    Loader processes run the first half, so that they transfer a quarter of the bytes; the device runs the second. A
    transform that does not end in a normalisation -> (the transform, identity). A view of its own kind has the two
    halves as attributes, `pixels` and `normalise`.
    """
    if hasattr(transform, "pixels"):
        return transform.pixels, transform.normalise
    *steps, last = getattr(transform, "transforms", [transform])
    if isinstance(last, Normalize) and steps and isinstance(steps[-1], ToTensor):  # torchvision's own
        *steps, last = *steps[:-1], ToNormalizedTensor(last.mean, last.std)
    if not isinstance(last, ToNormalizedTensor):
        return transform, identity
    return Compose([*steps, to_pixels]), last.normalise


def encode_distinct(encode: Callable[[torch.Tensor], Encoded], images: torch.Tensor, keys: Sequence) -> Encoded:
    """`encode(images)` of a batch (B, ...) -> (B, ...); images with equal `keys` (B) are encoded once."""
    rows: dict = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, row)
    place = {key: i for i, key in enumerate(rows)}
    return encode(images[list(rows.values())])[[place[key] for key in keys]]


def decode_caption(data: bytes) -> str:
    """Bytes -> stripped text of at most MAX_CHARACTERS. BrokenSample if it is empty or not UTF-8.

    Only the first CAPTION_BYTES are decoded; a character cut there is dropped.
    """
    try:
        decoder = codecs.getincrementaldecoder("utf-8")()
        caption = decoder.decode(data[:CAPTION_BYTES], final=len(data) <= CAPTION_BYTES).strip()
    except UnicodeDecodeError as error:
        raise BrokenSample("caption is not UTF-8") from error
    if not caption:
        raise BrokenSample("empty caption")
    return caption[:MAX_CHARACTERS]


def any_text(data: bytes) -> str:
    """Bytes -> stripped text of at most MAX_CHARACTERS; may be empty. Bytes that are not UTF-8 are replaced."""
    return data[:CAPTION_BYTES].decode("utf-8", errors="replace").strip()[:MAX_CHARACTERS]


# ------------------------------------------------------------------------------------------------------------ pairs


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """'a/{00000..00331}.tar::b/{0..9}.tar', or a folder of tars -> shards. UserError names a missing one."""
    if isinstance(spec, str) and os.path.isdir(spec):
        urls = sorted(str(path) for path in Path(spec).glob("*.tar"))
        if not urls:
            hint = "'python -m shared.pack' makes shards of pictures and captions"
            if any(Path(spec, "train").glob("*.tar")):
                hint = f"{Path(spec, 'train')} does"
            raise UserError(f"folder {spec} holds no .tar shard; {hint}")
        return urls
    urls = [url for part in ([spec] if isinstance(spec, str) else spec) for url in expand_urls(part)]
    for url in urls:
        if not is_remote(url) and not os.path.isfile(url.removeprefix("file:")):
            typed = "" if url == spec else f" (expanded from {spec!r})"
            raise UserError(
                f"shard {url} does not exist{typed}; shards are tar files such as 'cc3m/{{00000..00331}}.tar'"
            )
    return urls


class NoPairs(UserError):
    """Raised for shards without a readable pair; `broken` has the reasons."""

    def __init__(self, message: str, broken: list[Broken]):
        super().__init__(message)
        self.broken = broken


class Shards:
    """Random access to the pairs of local webdataset shards: `len`, `keys`, `read(index)`, `caption(index)`.

    `limit` keeps only the first samples; `total` is the number of all samples. With `strict`, any broken sample is a
    ValueError.
    """

    def __init__(self, paths: Sequence[str], limit: int | None = None, strict: bool = False, cache: Path | None = None):
        self.paths, self.limit, self.strict, self.cache = list(paths), limit, strict, cache
        self._files = OpenFiles(self.paths)
        self._read_index()
        if strict and self.broken:
            raise UserError(f"--strict: sample {self.broken[0].key}: {self.broken[0].reason}")
        if not len(self.keys):
            raise NoPairs(f"no readable image-text pair in {', '.join(map(str, paths[:3]))}", self.broken)

    def _read_index(self) -> None:
        found = read_index(self.paths, self.cache)
        self.keys, self.broken, self.total = found.keys.head(self.limit), found.broken, len(found.keys)
        self._starts, self._spans = found.starts, found.spans[: self.limit]
        last = self.shard_of(len(self.keys) - 1)
        self.fingerprint = fingerprint(repr((len(self.keys), found.digests[: last + 1])).encode())

    def damaged(self) -> list[str]:
        """A sentence (`damaged_shard`) for each damaged shard."""
        broken = {each.key for each in self.broken}
        ends, counts = self._starts[1:].tolist(), np.diff(self._starts).tolist()
        whole = [count for path, count in zip(self.paths, counts, strict=True) if str(path) not in broken]
        return [
            damaged_shard(path, count, self._spans[end - count : end], whole)
            for path, count, end in zip(self.paths, counts, ends, strict=True)
            if str(path) in broken
        ]

    def __len__(self) -> int:
        return len(self.keys)

    def shard_of(self, index: int) -> int:
        """Number of the shard that holds a sample."""
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def rows_of(self, shard: int) -> range:
        """Indices of the samples in the shard `paths[shard]`."""
        return range(*self._starts[shard : shard + 2].clip(max=len(self)).tolist())

    def _bytes(self, index: int, offset: int, size: int) -> bytes:
        """`size` bytes of the shard that holds a sample, from `offset` on."""
        return self._files.read(self.shard_of(index), offset, size)

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        if isinstance(self._spans, np.memmap):  # the process that unpickles this maps the file itself
            state |= {"keys": None, "_starts": None, "_spans": None}
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        if self._spans is None:
            self._read_index()

    def read(self, index: int, decode: Callable[[bytes], Any] = decode_image) -> Pair:
        """The pair of a sample, its image from `decode` of the file's bytes. BrokenSample if it is unusable."""
        offset, size, text_offset, text_size = self._spans[index].tolist()
        caption = decode_caption(self._bytes(index, text_offset, min(text_size, CAPTION_BYTES + 1)))
        return Pair(self.keys[index], decode(self._bytes(index, offset, size)), caption)

    def caption(self, index: int) -> str:
        """A sample's caption, by `any_text`."""
        _, _, offset, size = self._spans[index].tolist()
        return any_text(self._bytes(index, offset, min(size, CAPTION_BYTES)))


def damaged_shard(path: str, count: int, spans: np.ndarray, whole: Sequence[int]) -> str:
    """A sentence about a damaged shard: bytes and pairs that could be read, and the expected number of pairs.

    count: pairs that could be read; spans (count, 4): their offsets and sizes. The expected number is from
    img2dataset's FILE_stats.json, else the median of `whole`, the numbers of pairs of the undamaged shards.
    """
    read = int((spans[:, [0, 2]] + spans[:, [1, 3]]).max()) if len(spans) else 0
    size = os.path.getsize(path)
    about = f"{path} is truncated or damaged: read up to byte {read:,} of {size:,}, {count:,} pairs"
    if expected := stated_size(path):
        about += f" of the {expected:,} in its _stats.json"
    elif whole:
        about += f"; undamaged shards have {int(np.median(whole)):,}"
    return about


def stated_size(shard: str) -> int | None:
    """Number of samples of a shard, from img2dataset's _stats.json beside it; None if there is none."""
    path = Path(shard).with_name(f"{Path(shard).stem}_stats.json")
    try:
        return int(json.loads(path.read_text())["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_table(path: str) -> tuple[dict[str, np.ndarray], dict]:
    """Columns `title` and `filepath` of a tab-separated file -> ({"captions", "files": bytes, "caption_ends",
    "file_ends": end offset of each row (N,)}, {"digest": their hash}).

    Each line is one row. A cell that begins with a quote is read as pandas writes it, which upstreams' tables come
    from: the cell ends with a quote, and quotes within it are doubled. UserError names a line where that is not so,
    or with more cells than columns: otherwise a quote that is not closed would swallow the rows below it.
    """
    captions, caption_ends, files, file_ends = bytearray(), array.array("q"), bytearray(), array.array("q")
    csv.field_size_limit(2**31 - 1)
    columns: list[str] = []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:
                cells = next(csv.reader([line], delimiter="\t", strict=True), [])
            except csv.Error as error:
                raise UserError(
                    f"{path}, line {number}: {error}; a cell that begins with a quote has to end with one on the same "
                    "line, and to double the quotes within it"
                ) from error
            if not columns:
                if missing := {"title", "filepath"} - set(cells):
                    raise UserError(f"{path} lacks the column {' and '.join(sorted(missing))}; {HEADER}")
                columns, title, name = cells, cells.index("title"), cells.index("filepath")
            elif len(cells) > len(columns):
                raise UserError(f"{path}, line {number}: {len(cells)} cells for {len(columns)} columns")
            elif cells:
                cells += [""] * (len(columns) - len(cells))
                captions += cells[title].encode("utf-8", errors="surrogateescape")
                files += cells[name].encode("utf-8", errors="surrogateescape")
                caption_ends.append(len(captions))
                file_ends.append(len(files))
    if not columns:
        raise UserError(f"{path} lacks the columns filepath and title; {HEADER}")
    if not file_ends:
        raise UserError(f"{path} has no row")
    of_bytes = {name: np.frombuffer(text, dtype=np.uint8) for name, text in (("captions", captions), ("files", files))}
    ends = {"caption_ends": np.asarray(caption_ends), "file_ends": np.asarray(file_ends)}
    return of_bytes | ends, {"digest": fingerprint(captions, files, *ends.values())}


class TSV:
    """Pairs of a tab-separated file with columns `title` and `filepath`, the csv layout of OpenCLIP and ProtoCLIP."""

    def __init__(self, path: str, limit: int | None = None, strict: bool = False, cache: Path | None = None):
        self.strict, self.broken = strict, []
        arrays, about = cached([path], cache, lambda: read_table(path))
        self.total = len(arrays["file_ends"])
        self._captions = Strings(arrays["captions"], arrays["caption_ends"]).head(limit)
        self.keys = Strings(arrays["files"], arrays["file_ends"]).head(limit)  # an image's path is its sample's key
        self.fingerprint = fingerprint(repr((len(self.keys), about["digest"])).encode())

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int, decode: Callable[[bytes], Any] = decode_image) -> Pair:
        """The pair of a sample, its image from `decode` of the file's bytes. BrokenSample if it is unusable."""
        caption = decode_caption(self._captions.bytes_of(index))
        return Pair(self.keys[index], decode(read_file(self.keys[index])), caption)

    def caption(self, index: int) -> str:
        """A sample's caption, by `any_text`."""
        return any_text(self._captions.bytes_of(index))


def local_shards(spec: str, cache: Path = Path("data/cache")) -> list[str]:
    """Local paths of brace-expanded shards; remote ones are fetched, four at a time."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda url: fetch(url, cache), expand_shards(spec)))


def open_pairs(
    spec: str, limit: int | None = None, strict: bool = False, cache: Path = Path("data/cache")
) -> Shards | TSV:
    """Pairs of brace-expanded shards or of a .tsv file. `cache` is the folder of indices and copied remote shards."""
    if spec.endswith((".tsv", ".csv")):
        if not os.path.isfile(spec):
            raise UserError(f"{spec} does not exist")
        return TSV(spec, limit, strict, cache)
    return Shards(local_shards(spec, cache), limit, strict, cache)


def planned_size(cfg) -> int:
    """Pairs per epoch for a dry run: --dataset-size, else the number in --data; 0 without --data or if it is remote
    or missing, which a printed line says.
    """
    if cfg.dataset_size or not cfg.data:
        return cfg.dataset_size or 0
    try:
        shards = expand_shards(cfg.data)
    except UserError as error:
        print(f"{error}; the dry run goes on without")
        return 0
    if any(map(is_remote, shards)):
        print(f"a dry run does not download {cfg.data}: set --dataset-size to its number of pairs")
        return 0
    return len(open_pairs(cfg.data, cache=Path(cfg.cache)))


def say_size(pairs: Shards | TSV, cfg, process: run.Process) -> None:
    """Print a sentence for each damaged shard, and one if --dataset-size is not the number of pairs."""
    if process.main and isinstance(pairs, Shards):
        say_damaged(pairs.damaged())
    total, wanted = getattr(pairs, "total", None), cfg.dataset_size
    if process.main and total is not None and wanted is not None and total != wanted:
        unlike = ", fewer than --dataset-size" if total < wanted else "; --dataset-size keeps the first"
        print(f"{cfg.data} holds {total:,} pairs{unlike} {wanted:,}")


def say_damaged(sentences: Sequence[str], most: int = 5) -> None:
    """Print the first `most` sentences of `Shards.damaged`, and the number of the others."""
    for sentence in sentences[:most]:
        print(sentence)
    if len(sentences) > most:
        print(f"{len(sentences) - most:,} more shards are truncated or damaged")


def say_left_out(pairs: Shards | TSV, more: Sequence[Broken] = ()) -> None:
    """Print a sentence for each damaged shard, and `broken_report` of the broken samples of `pairs` and of `more`."""
    say_damaged(pairs.damaged() if isinstance(pairs, Shards) else [])
    if line := broken_report([*pairs.broken, *more], "left out"):
        print(line)


# ------------------------------------------------------------------------------------------- order, reading, report


def read_or_next(
    pairs: Shards | TSV, index: int, broken: list[Broken], decode: Callable[[bytes], Any] | None = None
) -> Pair:
    """`pairs.read(index)`, or the next readable pair; broken samples on the way are appended to `broken`.

    `decode`, if passed, is used instead of `decode_image`. UserError for a broken sample if `pairs` are strict, or
    after 1000 of them.
    """
    n = len(pairs)
    for candidate in range(index, index + min(n, 1000)):
        candidate %= n
        try:
            return pairs.read(candidate) if decode is None else pairs.read(candidate, decode)
        except BrokenSample as error:
            if pairs.strict:
                raise UserError(f"--strict: sample {pairs.keys[candidate]}: {error}") from error
            broken.append(Broken(str(pairs.keys[candidate]), str(error)))
    raise UserError(f"1000 samples in a row from {pairs.keys[index % n]} on are unreadable ({broken[-1].reason})")


def batches(
    n: int, batch_size: int, seed: Sequence[int], rank: int = 0, world_size: int = 1, start: int = 0
) -> list[np.ndarray]:
    """This rank's batches of a shuffled pass over range(n), from batch `start` on: a DataLoader's `batch_sampler`.

    The permutation depends on `seed` only, for example (seed, epoch). `batch_size` is per rank. Global batch b is the
    permutation's slice from b*world_size*batch_size on, split in rank order, so that W processes together see the
    batches of one process with W times the batch size. The last global batch may be short, and empty for some ranks.
    """
    order = np.random.default_rng(seed).permutation(n)
    size = batch_size * world_size
    firsts = range(start * size, n, size)
    return [order[first : first + size][rank * batch_size : (rank + 1) * batch_size] for first in firsts]


def on_device(batch: tuple, device: torch.device, normalise: Callable, cut_padding: bool) -> tuple:
    """(positions, images, texts) on the device; images normalised, padding of tokens cut."""
    positions, images, texts = batch
    tokens, *more = texts if isinstance(texts, list) else [texts]
    tokens = clip.cut_padding(tokens, device) if cut_padding else moved(tokens, device)
    texts = [tokens, *moved(more, device)] if isinstance(texts, list) else tokens
    images = moved(images, device)
    features = (
        isinstance(images, torch.Tensor) and images.is_floating_point()
    )  # of a locked tower, or normalised already
    return moved(positions, device), images if features else normalise(images), texts


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, or lists and named tuples of tensors, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (list, tuple)):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def broken_report(broken: Iterable[Broken], fate: str = "left out or replaced") -> str | None:
    """One line with the number of distinct broken samples, the reasons and the first keys; None if there are none."""
    distinct = dict(broken)
    if not distinct:
        return None
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(distinct.values()).most_common())
    names = ", ".join(sorted(distinct)[:3]) + (", ..." if len(distinct) > 3 else "")
    return f"{len(distinct)} broken sample{'s' * (len(distinct) != 1)}, {fate}: {reasons} ({names})"


def report_broken(broken: list[Broken], process: run.Process, label: str) -> None:
    """Print a label and `broken_report` of all ranks' samples, and clear `broken`."""
    if (line := broken_report(run.gather_lists(broken, process))) and process.main:
        print(f"{label}: {line}")
    broken.clear()
