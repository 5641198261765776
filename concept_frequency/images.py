"""The concepts of images: taggers, the tags of a shard, and the caption row of each image.

A tagger is any callable f32 (B, 3, H, W) -> f32 (B, K) in 0..1. Authors' code:
bethgelab/frequency_determines_performance@11ef009, `U:`. Their tagger is RAM++ (arXiv 2310.15200); CLIP scores and
open-vocabulary detectors were worse on fine-grained names (paper, App. I.1).
  RAM++   `load_ram_plus`: Swin-L, 384 pixels squashed, `model.OpenSetHead` on descriptions; needs a checkpoint
  CLIP    `load_clip_tagger`: any open_clip model, without other files; compares it with plain captions
  yours   `package.module:function`; called with (names, device), returns a `Tagger`
"""

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as transforms
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from concept_frequency.captions import Partition, read_tar_captions
from concept_frequency.clip_models import load_model
from concept_frequency.concepts import read_descriptions
from concept_frequency.config import CountConfig
from concept_frequency.model import RAMPlus, label_embedding, tag_presence
from shared import checkpoints, data, tars
from shared.errors import UserError
from shared.run import stable_hash
from shared.zeroshot import encode_texts

BATCH = 64  # images per forward pass

# ------------------------------------------------------------------------------------------------------------- taggers


class Tagger(NamedTuple):
    """The functions of an image tagger that a count calls."""

    transform: Callable[[Image.Image], Tensor]  # image -> (3, H, W)
    probabilities: Callable[[Tensor], Tensor]  # (B, 3, H, W) -> (B, K)


def load_tagger(cfg: CountConfig, names: Sequence[str], device: str) -> Tagger:
    """Load the tagger of `cfg` for the concepts `names`: clip, ram++ or package.module:function. UserError if there is
    none."""
    if cfg.tagger == "clip":
        return load_clip_tagger(cfg, names, torch.device(device))
    if cfg.tagger == "ram++":
        if not cfg.checkpoint:
            raise UserError("--tagger ram++ needs --checkpoint, the file ram_plus_swin_large_14m.pth")
        return load_ram_plus(cfg, names, torch.device(device))
    module, colon, function = cfg.tagger.partition(":")
    if not colon:
        raise UserError(f"--tagger is clip, ram++ or package.module:function, not {cfg.tagger!r}")
    try:
        return Tagger(*getattr(importlib.import_module(module), function)(list(names), torch.device(device)))
    except (ImportError, AttributeError) as error:
        raise UserError(f"--tagger {cfg.tagger}: {error}") from error


@torch.inference_mode()
def tag_images(images: Tensor, tagger: Tagger) -> NDArray[np.float16]:
    """Images (B, 3, H, W) -> probabilities (B, K) in half precision, like the authors' files."""
    return tagger.probabilities(images).float().cpu().numpy().astype(np.float16)


def describe(names: Sequence[str], descriptions: str) -> list[list[str]]:
    """Texts of each concept: `a photo of a {c}.`, or from a file in the authors' layout (51 texts of GPT-4 each).

    Source: U:src/gpt_descriptions_for_ram.py:24: a fixed text, and 5 prompts x 10 samples at temperature 0.99.
    """
    if not descriptions:
        return [[f"a photo of a {name}."] for name in names]
    given = read_descriptions(descriptions)
    missing = [name for name in names if name not in given]
    if missing:
        raise UserError(f"{descriptions} has descriptions of {len(given)} concepts, but not of {missing[0]!r}")
    return [given[name] for name in names]


def embed(model: nn.Module, tokenizer: Callable, texts: Sequence[Sequence[str]], device: torch.device) -> Tensor:
    """The `label_embedding` (K, D) of each concept's descriptions."""
    flat = [text for each in texts for text in each]
    features = encode_texts(model.encode_text, tokenizer, flat, 256, device, desc="descriptions")
    return torch.stack([label_embedding(each) for each in features.split([len(each) for each in texts])]).to(device)


PLAIN = ("a photo.", "an image.", "a picture of something.")  # captions that a concept must outscore


def load_clip_tagger(cfg: CountConfig, names: Sequence[str], device: torch.device) -> Tagger:
    """p = sigmoid(exp(s) (<x, t_c> - max_plain <x, t_plain>)) compares the concept with captions that name nothing.

    t_c is the `label_embedding` of the concept's descriptions. p equals CLIP's softmax over these two captions.
    """
    model, transform, tokenizer = load_model(cfg.model, cfg.pretrained, device)
    concepts = embed(model, tokenizer, describe(names, cfg.descriptions), device)
    plain = embed(model, tokenizer, [[text] for text in PLAIN], device)
    scale = model.logit_scale.detach().exp().float()

    def probabilities(images: Tensor) -> Tensor:
        x = F.normalize(model.encode_image(images).float(), dim=-1)
        return (scale * (x @ concepts.T - (x @ plain.T).amax(dim=1, keepdim=True))).sigmoid()

    return Tagger(transform, probabilities)


def load_ram_plus(cfg: CountConfig, names: Sequence[str], device: torch.device, image_size: int = 384) -> Tagger:
    """Load RAM++ with one averaged description per concept, like the authors; `cfg.model`, in the paper ViT-B-16 of
    OpenAI's CLIP, embeds the descriptions."""
    state = checkpoints.load_checkpoint(cfg.checkpoint)
    model = RAMPlus(image_size=image_size)
    model.load_checkpoint(state.get("model", state))
    model.to(device).eval()
    clip, _, tokenizer = load_model(cfg.model, cfg.pretrained, device)
    vectors = embed(clip, tokenizer, describe(names, cfg.descriptions), device)[:, None]
    transform = transforms.Compose(
        [
            transforms.Resize((image_size, image_size)),  # squashed, not cropped
            data.ToNormalizedTensor((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def probabilities(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            return model(images, vectors)

    return Tagger(transform, probabilities)


# ------------------------------------------------------------------------------------------------------ tags of a shard


class Tags(NamedTuple):
    """Concepts that an image may show: document, concept and probability of each, (n,)."""

    document: NDArray[np.int64]
    concept: NDArray[np.int32]
    probability: NDArray[np.float16]


def tag_shard(
    partition: Partition, cfg: CountConfig, tagger: Tagger, rows: "CaptionRows | None", device: str, decoders: int
) -> tuple[Tags, int, list[data.Broken]]:
    """(tags with probabilities above 0.5, or above a lower threshold; number of images; broken samples) of a tar.

    `decoders` processes decode the images and send uint8 to this process; with 0 this process decodes them.
    """
    if partition.kind != ".tar":
        raise UserError(f"--tagger needs image shards, but {partition.path} is not a .tar")
    broken, found = [], [(np.zeros(0),) * 3]
    pixels, normalise = data.split_normalisation(tagger.transform)
    with partition.local() as file, open(file, "rb", buffering=0) as tar:
        shard = ShardImages(tar, partition.number, cfg.ids, rows, pixels)
        loader = DataLoader(
            shard, BATCH, num_workers=decoders, collate_fn=collate, pin_memory=device.startswith("cuda"),
            multiprocessing_context="fork" if decoders else None,
        )  # fmt: skip
        for documents, images, passed_over in loader:
            broken += passed_over
            if len(documents):
                probabilities = tag_images(normalise(images.to(device, non_blocking=True)), tagger)
                row, concept = np.nonzero(tag_presence(probabilities, min(0.5, cfg.threshold)))
                found.append((documents[row], concept, probabilities[row, concept]))
    document, concept, probability = (np.concatenate(column) for column in zip(*found, strict=True))
    tags = Tags(document.astype(np.int64), concept.astype(np.int32), probability.astype(np.float16))
    return tags, len(shard), broken + shard.index.broken * bool(cfg.images)


class ShardImages(Dataset):
    """Row i of an image shard: (document, image (3, H, W)), or Broken. `tar` is the opened shard."""

    def __init__(self, tar: FileIO, number: int, ids: str, rows: "CaptionRows | None", transform: Callable):
        self.tar, self.number, self.ids, self.rows, self.transform = tar, number, ids, rows, transform
        self.index = tars.index_shard(tar.name)
        self.wanted = list(self.index.keys)  # what `sample_id` looks up
        if ids == "cc12m":
            self.wanted = [text.strip() for text in read_tar_captions(tar.name, [])]
        elif ids == "yfcc15m":
            about = dict(tars.descriptions([tar.name]))
            self.wanted = [about.get(key, {}).get("url", "") for key in self.index.keys]

    def __len__(self) -> int:
        return len(self.index.keys)

    def __getitem__(self, row: int) -> tuple[int, Tensor] | data.Broken:
        offset, size, *_ = self.index.spans[row].tolist()
        try:
            document = row if self.ids == "row" else sample_id(self.ids, self.wanted[row], self.number, self.rows)
            return document, self.transform(data.decode_image(os.pread(self.tar.fileno(), size, offset)))
        except data.BrokenSample as error:
            return data.Broken(self.index.keys[row], str(error))
        except (KeyError, ValueError):
            return data.Broken(self.index.keys[row], "not among the captions")


def collate(items: list) -> tuple[NDArray[np.int64], Tensor | None, list[data.Broken]]:
    """(documents (B,), images (B, 3, H, W) or None if there are none, broken samples)."""
    broken = [item for item in items if isinstance(item, data.Broken)]
    whole = [item for item in items if not isinstance(item, data.Broken)]
    documents = np.array([document for document, _ in whole], dtype=np.int64)
    return documents, torch.stack([image for _, image in whole]) if whole else None, broken


# ------------------------------------------------------------------------------------------ the caption row of an image


def sample_id(corpus: str, key: str, shard: int = 0, rows: "CaptionRows | None" = None) -> int:
    """The caption row of an image, from its key in the image shards; KeyError if there is none.

    Sources: U:ram_model/image_search_run_rampp.py:93-104, U:src/utils/map_cc12m_shard_to_tsv_indices.py:50-73,
    U:src/image_search_inverted_index_creation.py:46-52. CC-3M and LAION-400M: the number in the key; SynthCI-30M: the
    number behind the slash; LAION-Aesthetics: number + 10,000 x shard; CC-12M and YFCC-15M: `key` is the exact
    caption or url, and `rows` finds its row (the last row of equal captions).
    """
    if corpus in ("cc12m", "yfcc15m"):
        return rows.find(key)
    number = int(Path(key).name.partition(".")[0])
    return number + 10_000 * shard if corpus == "laion_aesthetics" else number


class CaptionRows:
    """Finds a text's row by 64-bit hashes, 16 bytes per row; equal texts give the last row."""

    def __init__(self, hashes: NDArray[np.int64], rows: NDArray[np.int64]):
        self.hashes, self.rows = hashes, rows  # sorted by hash

    @classmethod
    def build(cls, texts: Iterable[str]) -> "CaptionRows":
        hashes = np.fromiter(map(stable_hash, texts), dtype=np.int64)
        rows = np.argsort(hashes, kind="stable")
        return cls(hashes[rows], rows)

    def save(self, path: str) -> None:
        with checkpoints.replaced(Path(path)) as file:
            np.savez(file, hashes=self.hashes, rows=self.rows)

    @classmethod
    def load(cls, path: str) -> "CaptionRows":
        with np.load(path, allow_pickle=False) as file:
            return cls(file["hashes"], file["rows"])

    def find(self, text: str) -> int:
        """The row of a text; KeyError if there is none."""
        place = np.searchsorted(self.hashes, hash_ := stable_hash(text), side="right") - 1
        if place < 0 or self.hashes[place] != hash_:
            raise KeyError(text)
        return int(self.rows[place])
