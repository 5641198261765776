"""Zero-shot classification, and the embeddings of texts and images that all evaluations use.

FLAME (arXiv 2411.11927); authors' code MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/. Text features are
those of the language model, which are kept in files beside the bank (`Texts`), or of the baseline's text transformer.
Training loads no language model.
"""

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform
from torch import Tensor, nn

from flame.llm import FrozenLLM, Prompt, Prompts, embed_batches, llm_digest, load_llm
from flame.model import TrainedText
from shared import checkpoints, run
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.index import fingerprint
from shared.zeroshot import classification_metrics, encode_texts, extract_image_features

TextFeatures = Callable[[Sequence[str], bool], Tensor]  # (texts, use the long prompt) -> (n, D), unit length

# ------------------------------------------------------------------------------------------------------------- texts


class Texts:
    """Embeddings of evaluation texts by a frozen language model, kept in files; it is loaded only if one is missing.

    `texts(["a dog", ...])` -> (n, D), float32, of unit length, by the raw caption's prompt (class names,
    Crossmodal-3600). With `multi=True` they are the normalised mean of the long prompt's unnormalised facets (long
    captions, COCO; U:open_clip/multiprompteol_embeddings.py:123-125). about: what embeddings depend on beside prompts.
    """

    def __init__(self, folder: Path, about: dict[str, Any], prompts: Prompts, llm: Callable[[], FrozenLLM]):
        self.folder, self.about, self.prompts, self.llm = folder, about, prompts, llm

    def path(self, texts: Sequence[str], multi: bool) -> Path:
        prompt = self.prompts[2 if multi else 0]
        about = self.about | {"prompt": prompt} | ({} if len(prompt.facets) > 1 else {"mask": None})
        return self.folder / f"{fingerprint(json.dumps([about, list(texts)], sort_keys=True).encode())}.npy"

    def __call__(self, texts: Sequence[str], multi: bool = False) -> Tensor:
        path, texts = self.path(texts, multi), list(texts)
        if not path.exists():
            llm = self.llm()
            with run.counting(len(texts), "texts", "text") as tick:
                hidden = embed_batches(llm, texts, self.prompts[2 if multi else 0], tick=tick)
            self.folder.mkdir(parents=True, exist_ok=True)
            unit = F.normalize(hidden.mean(1), dim=-1).half().numpy()
            if not np.isfinite(unit).all():
                raise UserError(f"embeddings of {self.about['llm']} are not finite: use --precision bf16 or fp32")
            checkpoints.save_array(path, unit, f".{os.getpid()}.tmp")  # several evaluations may write the same texts
        return F.normalize(torch.from_numpy(np.load(path).astype(np.float32)), dim=-1)


def about_bank(bank: str | Path) -> dict[str, Any]:
    """A bank's index.json: its language model, prompts, mask and precision."""
    if not (Path(bank) / "index.json").is_file():
        raise UserError(f"{bank} has no index.json, which is needed to embed the texts of an evaluation")
    return checkpoints.read_json(Path(bank) / "index.json")


def texts_of_bank(bank: str | Path, llm: Callable[[], FrozenLLM]) -> Texts:
    """`Texts` with the language model, mask, precision and prompts of a bank."""
    index = about_bank(bank)
    prompts: Prompts = tuple(Prompt(head, tuple(facets), bos) for head, facets, bos in index["prompts"])
    about = {name: index[name] for name in ("llm", "digest", "mask", "precision")}
    return Texts(Path(bank).parent / "texts", about, prompts, llm)


def llm_of_bank(bank: str | Path, device: torch.device | str = "cpu") -> Callable[[], FrozenLLM]:
    """A function that loads the language model of a bank once. It raises UserError if it is another one by now."""

    @functools.cache
    def load() -> FrozenLLM:
        index = about_bank(bank)
        if llm_digest(name := index["llm"]) != index["digest"]:
            raise UserError(f"{name} is not the language model that made {bank}: its files are others by now")
        return load_llm(name, index["mask"] == "decoupled", index["precision"], device)

    return load


def no_llm() -> FrozenLLM:
    raise UserError(
        "the texts of this evaluation set are not embedded: name it in --sets of flame.embed, or pass --eval-every 0"
    )


def trained_texts(
    model: nn.Module, tokenizer: Callable, device: torch.device | str, precision: torch.dtype
) -> TextFeatures:
    """The function that embeds texts with a model's own text tower."""

    def embedded(texts: Sequence[str], multi: bool = False) -> Tensor:
        was_training = model.training
        model.eval()
        what = "captions" if multi else None
        features = encode_texts(model.encode_text, tokenizer, texts, 256, device, precision, what)
        model.train(was_training)
        return F.normalize(features, dim=-1)

    return embedded


def tokenizer_of(model: TrainedText) -> Callable:
    """CLIP's tokenizer, with the baseline's number of tokens."""
    return open_clip.SimpleTokenizer(context_length=model.text.context_length)


def prompts_of(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class name in every template: (C * M) texts, class by class."""
    return [template.replace("{c}", name) for name in classnames for template in templates]


def texts_of_set(folder: str | Path) -> tuple[list[str], bool]:
    """The texts of an evaluation set, and whether the long prompt embeds them (captions, not class names)."""
    eval_set = open_set(folder, None, "classification", "retrieval")
    if eval_set.kind == "retrieval":
        return [caption for _, captions in eval_set.targets() for caption in captions], True
    return prompts_of(eval_set.classnames, eval_set.templates), False


# ------------------------------------------------------------------------------------------------------------ images


def open_set(folder: str | Path, transform: Callable | None, *kinds: str, split: str = "test") -> EvalSet:
    """Open an evaluation set. UserError if it is of none of these kinds (classification, retrieval)."""
    eval_set = EvalSet(folder, transform, split)
    if eval_set.kind not in kinds:
        raise UserError(f"{folder} is a {eval_set.kind} set, but a {' or '.join(kinds)} set is needed")
    return eval_set


def eval_transform(model: nn.Module) -> Callable:
    """open_clip's evaluation transform, PIL image -> (3, H, H), at the model's image size; another model has its
    own."""
    return getattr(model, "transform", None) or image_transform(model.visual.image_size[0], is_train=False)


def image_features(
    model: nn.Module, batches: Iterable, device: torch.device | str, precision: torch.dtype, visual_only: bool = False
) -> tuple[Tensor, Tensor | list]:
    """Features (N, D) float32 and targets of (images, targets) batches, with the model in eval mode."""
    was_training = model.training
    model.eval()
    features = extract_image_features(lambda x: model.encode_image(x, visual_only), batches, device, precision)
    model.train(was_training)
    return features


def encode(
    model: nn.Module, images: Iterable[Tensor], device: torch.device | str, precision: torch.dtype, batch_size: int
) -> Tensor:
    """(I, D) features of images (3, H, H); only one batch is in memory at a time."""

    def batches():
        source = iter(images)
        while batch := list(itertools.islice(source, batch_size)):
            yield torch.stack(batch), torch.zeros(0)

    return image_features(model, batches(), device, precision)[0]


# ----------------------------------------------------------------------------------------------- zero-shot classifier


def zero_shot_classifier(template_embeds: Tensor) -> Tensor:
    """(C, M templates, D) -> (D, C): normalise, mean, normalise. U:open_clip/zero_shot_classifier.py:52-60."""
    return F.normalize(F.normalize(template_embeds.float(), dim=-1).mean(dim=1), dim=-1).T


def name_classifier(texts: TextFeatures, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(D, C) of class names in templates, with the single prompt."""
    return zero_shot_classifier(texts(prompts_of(classnames, templates), False).unflatten(0, (len(classnames), -1)))


def zero_shot(features: Tensor, labels: Tensor, classifier: Tensor) -> dict[str, float]:
    """Top-1, top-5 and mean per-class accuracy, in percent; logits are 100 x . w upstream, which changes no ranking."""
    return classification_metrics(F.normalize(features, dim=-1), labels, classifier)


def top1_during_training(model: nn.Module, cfg: Any, process: run.Process) -> Callable[[], float]:
    """A function that measures zero-shot top-1 on `cfg.eval_set`, in percent, with the model's current weights.

    UserError, before training starts, if this is no classification set or its texts are not embedded.
    """
    device, precision = process.device, run.DTYPES[run.resolve_precision(cfg.precision, process.device)]

    def opened() -> EvalSet:
        return open_set(cfg.eval_set, eval_transform(model), "classification")

    eval_set = opened()
    if isinstance(model, TrainedText):
        texts = trained_texts(model, tokenizer_of(model), device, precision)
    else:
        texts = texts_of_bank(cfg.bank, no_llm)
        name_classifier(texts, eval_set.classnames, eval_set.templates)  # or UserError, now

    def top1() -> float:
        classifier = name_classifier(texts, eval_set.classnames, eval_set.templates)
        batches = opened().batches(256, cfg.workers, device)  # a set that has gone meanwhile is an error of its own
        return zero_shot(*image_features(model, batches, device, precision), classifier)["top1"]

    return top1
