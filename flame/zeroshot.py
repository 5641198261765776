"""Zero-shot classification, during training (`Curve`) and for eval.py.

FLAME (arXiv 2411.11927); authors' code MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/. Text features are
those of the LLM, read from embed.py's files, or of the baseline's text transformer. Training does not load the LLM.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.bank import centred, open_bank
from flame.config import Config
from flame.embed import open_set, prompts_of, read_captions_of, read_images, texts_of_bank
from flame.inmemory import set_tokens
from flame.model import FLAME, TrainedText
from shared import memory, windows
from shared.evalsets import EvalSet
from shared.zeroshot import classification_metrics, encode_texts, extract_image_features


class DualEncoder(nn.Module):
    """Another model with its own image transform and tokenizer: a baseline for FLAME's tables."""

    def __init__(self, model: nn.Module, transform: Callable, tokenizer: Callable):
        super().__init__()
        self.model, self.transform, self.tokenizer = model, transform, tokenizer

    def encode_image(self, images: Tensor, visual_only: bool = False) -> Tensor:
        """(B, D), unit length; not normalised for probes (`visual_only`)."""
        features = self.model.encode_image(images)
        return features if visual_only else F.normalize(features.float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


TextFeatures = Callable[[Sequence[str], bool], Tensor]  # (texts, use the long prompt) -> (n, D), unit length


def text_features(
    model: FLAME, cfg: Config, device: torch.device | str = "cpu", precision: torch.dtype = torch.float32,
    bank: str | None = None, load: bool = True,
) -> TextFeatures:  # fmt: skip
    """The function that embeds texts for a run's evaluation: its bank's LLM, or a trained text transformer.

    `load`: whether the LLM may be loaded for texts that embed.py has not embedded. For a run trained only on
    facets about the whole image (0, 1, 4), long captions also use the single prompt.
    """
    if isinstance(model, TrainedText | DualEncoder):
        tokenizer = getattr(model, "tokenizer", None) or open_clip.SimpleTokenizer(context_length=cfg.max_length)

        def trained(texts: Sequence[str], multi: bool = False) -> Tensor:
            was_training = model.training
            model.eval()
            features = encode_texts(model.encode_text, tokenizer, texts, 256, device, precision)
            model.train(was_training)
            return F.normalize(features, dim=-1)

        return trained
    bank = bank or cfg.bank
    frozen = texts_of_bank(bank, device, load)
    centres = open_bank(bank).centres if cfg.centre else None
    single_only = bool(cfg.facet_ids) and set(cfg.facet_ids) <= {0, 1, 4}

    def embedded(texts: Sequence[str], multi: bool = False) -> Tensor:
        multi = multi and not single_only
        features = frozen(texts, multi)
        return features if centres is None else centred(features, centres[-1 if multi else 0])

    return embedded


def image_features(
    model: FLAME, batches: Iterable, device: torch.device | str, precision: torch.dtype, visual_only: bool = False
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels of (images, labels) batches, with the model in eval mode."""
    was_training = model.training
    model.eval()
    features = extract_image_features(lambda x: model.encode_image(x, visual_only), batches, device, precision)
    model.train(was_training)
    return features


def encode(
    model: FLAME, images: Iterable[Tensor], device: torch.device | str, precision: torch.dtype, batch_size: int
) -> Tensor:
    """(I, D) features of images (3, H, H); only one batch is in memory at a time."""

    def batches():
        source = iter(images)
        while batch := list(itertools.islice(source, batch_size)):
            yield torch.stack(batch), torch.zeros(0)

    return image_features(model, batches(), device, precision)[0]


def set_features(
    model: FLAME, eval_set: EvalSet, device: torch.device | str, precision: torch.dtype, batch_size: int = 256,
    workers: int = 0, limit: int | None = None,
) -> tuple[Tensor, Tensor | list[list[str]]]:  # fmt: skip
    """Features (N, D), and labels (N,) or captions of each image, of an evaluation set.

    `limit`: maximum number of images of a retrieval set, evenly spaced. With a locked trunk, the tokens of a set's
    images are computed once per process, for all evaluated runs.
    """
    if getattr(getattr(model, "visual", None), "locked", False):
        tokens, targets = set_tokens(eval_set, model.visual, torch.device(device), precision, limit)
        batches = ((batch.float(), torch.zeros(0)) for batch in tokens.split(batch_size))
        return image_features(model, batches, device, precision)[0], targets
    if eval_set.kind == "retrieval":
        features = encode(model, read_images(eval_set, limit), device, precision, batch_size)
        return features, read_captions_of(eval_set, limit)
    return image_features(model, eval_set.batches(batch_size, workers, device), device, precision)


def eval_transform(model: FLAME) -> Callable:
    """open_clip's evaluation transform, PIL image -> (3, H, H), at the model's image size; another model has its
    own."""
    if isinstance(model, DualEncoder):
        return model.transform
    mean, std = getattr(model.visual, "statistics", memory.CLIP_STATISTICS)
    return open_clip.transform.image_transform(model.visual.image_size[0], is_train=False, mean=mean, std=std)


def zero_shot_classifier(template_embeds: Tensor) -> Tensor:
    """(C, T, D) -> (D, C): normalise each template, mean, normalise. U:open_clip/zero_shot_classifier.py:53-58."""
    return F.normalize(F.normalize(template_embeds.float(), dim=-1).mean(dim=1), dim=-1).T


def name_classifier(texts: TextFeatures, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(D, C) of class names in templates, with the single prompt."""
    return zero_shot_classifier(texts(prompts_of(classnames, templates), False).unflatten(0, (len(classnames), -1)))


def set_classifier(texts: TextFeatures, eval_set: EvalSet) -> Tensor:
    """(D, C) of a classification set: its class names in its templates."""
    return name_classifier(texts, eval_set.classnames, eval_set.templates)


def zero_shot(
    model: FLAME, classifier: Tensor, eval_set: EvalSet, device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32, batch_size: int = 256, workers: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Top-1, top-5 and mean per-class accuracy, in percent; logits are 100 x . c upstream, which changes no ranking."""
    features, labels = set_features(model, eval_set, device, precision, batch_size, workers)
    return classification_metrics(F.normalize(features, dim=-1), labels, classifier)


class Curve:
    """Zero-shot top-1 on `cfg.eval_set` during training.

    Creating it raises UserError if this is no classification set or its texts are not embedded.
    """

    def __init__(self, model: FLAME, cfg: Config, device: torch.device, precision: torch.dtype):
        self.model, self.device, self.precision = model, device, precision
        self.workers = windows.evaluation_workers(cfg)
        self.texts = text_features(model, cfg, device, precision, load=False)
        self.eval_set = open_set(cfg.eval_set, eval_transform(model), "classification")
        self.fixed = None if isinstance(model, TrainedText) else set_classifier(self.texts, self.eval_set)

    def top1(self) -> float:
        """Percent; the baseline uses the current weights of its text transformer."""
        classifier = set_classifier(self.texts, self.eval_set) if self.fixed is None else self.fixed
        found = zero_shot(self.model, classifier, self.eval_set, self.device, self.precision, workers=self.workers)
        return found["top1"]
