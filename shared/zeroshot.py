"""Zero-shot classification and retrieval, common to all papers. All rates are in percent.

Functions take tensors (features, labels) and know nothing of a model; `evaluate` at the end puts them together for
anything with open_clip's `encode_image` / `encode_text`. Letters: N images with a label, C classes, P prompts of T
templates, I images and T captions in retrieval, D feature dimensions. Scores are computed in chunks of at most
`CHUNK` numbers, so that no N x C or I x T matrix is ever held as a whole.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.evalsets import EvalSet
from shared.run import autocast, counting, progress

CHUNK = 2**24  # 64 MB of float32


# ---------------------------------------------------------------- features


@torch.no_grad()
def extract_image_features(
    encode_image: Callable[[Tensor], Tensor],
    loader: Iterable,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    desc: str | None = None,
) -> tuple[Tensor, Tensor | list]:
    """Runs the encoder over `(images, targets)` batches -> raw features (N, D) float32 on the CPU, targets."""
    features, targets = [], []
    with counting(None, desc) as tick:
        for images, batch_targets in loader:
            with autocast(precision, torch.device(device)):
                features.append(encode_image(images.to(device)).float().cpu())
            targets.append(batch_targets)
            tick(len(images))
    if torch.is_tensor(targets[0]):
        return torch.cat(features), torch.cat(targets)
    return torch.cat(features), [target for batch in targets for target in batch]


@torch.no_grad()
def encode_texts(
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable,
    texts: Sequence[str],
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    desc: str | None = None,
) -> Tensor:
    """(P, D) float32 on the CPU, as encoded. The context length is the tokenizer's own."""
    features = []
    starts = range(0, len(texts), batch_size)
    for start in progress(starts, len(starts), desc, batch_size, unit="text"):
        tokens = tokenizer(list(texts[start : start + batch_size])).to(device)
        with autocast(precision, torch.device(device)):
            features.append(encode_text(tokens).float().cpu())
    return torch.cat(features)


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows whose (rows, columns) block has at most CHUNK numbers."""
    step = max(1, CHUNK // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


# ---------------------------------------------------------------- zero-shot classification


def zeroshot_classifier(prompt_embeddings: Tensor) -> Tensor:
    """(C, T, D) raw text embeddings -> (D, C) unit columns: normalise each prompt, mean over templates, renormalise."""
    return F.normalize(F.normalize(prompt_embeddings, dim=-1).mean(dim=1), dim=-1).T


def build_classifier(
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable,
    classnames: Sequence[str | Sequence[str]],
    templates: Sequence[str | Callable[[str], str]],
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """(D, C) classifier of all classes x templates, encoded together in batches.

    A template has the place `{c}` or is a function of the name. A class with a list of names (synonyms) has all
    names x templates as its prompts.
    """
    names = [[entry] if isinstance(entry, str) else list(entry) for entry in classnames]
    prompts = [_fill(template, name) for synonyms in names for name in synonyms for template in templates]
    counts = torch.tensor([len(synonyms) * len(templates) for synonyms in names])
    if not len(counts) or counts.min() == 0:
        raise ValueError("Every class needs at least one name and one template.")
    embeddings = encode_texts(encode_text, tokenizer, prompts, batch_size, device, precision, desc="prompts")
    return mean_prompts(embeddings, counts)


def mean_prompts(embeddings: Tensor, counts: Tensor) -> Tensor:
    """(P, D) raw embeddings of all prompts, class by class, counts (C,) prompts a class -> (D, C) unit columns."""
    total = torch.zeros(len(counts), embeddings.shape[1]).index_add_(0, owners(counts), F.normalize(embeddings, dim=-1))
    return F.normalize(total, dim=-1).T  # the mean has the direction of the sum


def owners(counts: Tensor | Sequence) -> Tensor:
    """Whose each of consecutive items is, if owner i has counts[i] of them, or counts[i] is their list -> int64."""
    if not torch.is_tensor(counts):
        counts = torch.tensor([len(items) for items in counts])
    return torch.arange(len(counts)).repeat_interleave(counts)


def _fill(template: str | Callable[[str], str], name: str) -> str:
    return template(name) if callable(template) else template.replace("{c}", name)


def label_ranks(logits: Tensor, labels: Tensor, classifier: Tensor | None = None) -> Tensor:
    """(N,) int64: how many classes are ranked before the label's class; 0 is a top-1 hit, below k a top-k hit.

    logits: (N, C), or image features (N, D) where `classifier` (D, C) is given (their norm does not matter).
    Ties: of equal logits the lower class index is ranked first, as argmax does. NaN logits count as misses.
    """
    num_classes = (logits if classifier is None else classifier).shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"Labels {int(labels.min())} to {int(labels.max())} do not fit {num_classes} classes.")
    if len(labels) != len(logits) or not len(labels):
        raise ValueError(f"{len(labels)} labels and {len(logits)} rows do not make an evaluation.")
    ranks = []
    for rows in chunks(len(labels), num_classes):
        scores = logits[rows] if classifier is None else logits[rows] @ classifier
        own_label = labels[rows, None]
        own = scores.gather(1, own_label)
        earlier = torch.arange(num_classes, device=scores.device) < own_label
        ranks.append((~(scores <= own) | ((scores == own) & earlier)).sum(dim=1))
    return torch.cat(ranks)


def per_class_accuracy(hits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C,) percent of hits (N,) bool among the samples of each class; NaN for a class without samples."""
    hits_per_class = torch.bincount(labels, hits.double(), minlength=num_classes)
    return (100 * hits_per_class / torch.bincount(labels, minlength=num_classes)).float()


def classification_metrics(logits: Tensor, labels: Tensor, classifier: Tensor | None = None) -> dict[str, float]:
    """Accuracy in percent; arguments as in `label_ranks`, which also states the rule for ties.

    top5 is NaN with fewer than five classes. mean_per_class averages over the classes that have samples.
    """
    num_classes = (logits if classifier is None else classifier).shape[1]
    ranks = label_ranks(logits, labels, classifier)
    return {
        "top1": percent(ranks < 1),
        "top5": percent(ranks < 5) if num_classes >= 5 else math.nan,
        "mean_per_class": per_class_accuracy(ranks < 1, labels, num_classes).nanmean().item(),
    }


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Percent; scores (N, C), targets (N, C) 0/1. A class without positives counts 0, as in clip-benchmark."""
    truth = targets.bool().gather(0, scores.argsort(dim=0, descending=True))
    precision = truth.cumsum(dim=0) / torch.arange(1, len(truth) + 1, device=truth.device)[:, None]
    return 100 * ((precision * truth).sum(dim=0) / truth.sum(dim=0).clamp(min=1)).mean().item()


def percent(hits: Tensor) -> float:
    return 100 * hits.sum().item() / len(hits)


# ---------------------------------------------------------------- retrieval, several captions an image


def text_ranks(scores: Tensor, text_to_image: Tensor, images: Tensor) -> Tensor:
    """Image -> text, (i,) int64: captions of other images ranked before the best of the image's own captions.

    scores: (i, T) of the images whose numbers are `images` (i,); text_to_image: (T,) image of each caption.
    Ties count against: another image's caption with the same score is ranked before. So does a NaN score. An image
    without captions, which no evaluation set has, is a miss at any k, as in CLIP_benchmark.
    """
    own = text_to_image == images[:, None]
    best = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
    ranks = (~(scores < best) & ~own).sum(dim=1)
    return ranks.masked_fill(~own.any(dim=1), torch.iinfo(ranks.dtype).max)


def image_ranks(scores: Tensor, image_of_text: Tensor) -> Tensor:
    """Text -> image, (t,) int64: other images ranked before the caption's image; scores (t, I), image_of_text (t,).

    Ties count against: another image with the same score is ranked before. So does a NaN score.
    """
    return (~(scores < scores.gather(1, image_of_text[:, None]))).sum(dim=1) - 1


def retrieval_ranks(image_features: Tensor, text_features: Tensor, text_to_image: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (I,) image -> text and (T,) text -> image by cosine; features (I, D), (T, D) of any norm."""
    images, texts = F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1)
    return _ranks(
        lambda rows: images[rows] @ texts.T, lambda rows: texts[rows] @ images.T, len(images), len(texts), text_to_image
    )


def retrieval_ranks_from_scores(scores: Tensor, text_to_image: Tensor) -> tuple[Tensor, Tensor]:
    """The same from scores (I, T)."""
    return _ranks(lambda rows: scores[rows], lambda rows: scores.T[rows], *scores.shape, text_to_image)


def _ranks(
    image_rows: Callable[[slice], Tensor],
    text_rows: Callable[[slice], Tensor],
    num_images: int,
    num_texts: int,
    text_to_image: Tensor,
) -> tuple[Tensor, Tensor]:
    if len(text_to_image) != num_texts or not num_texts:
        raise ValueError(f"{len(text_to_image)} entries of text_to_image do not fit {num_texts} texts.")
    if not 0 <= int(text_to_image.min()) <= int(text_to_image.max()) < num_images:
        raise ValueError(f"text_to_image goes beyond the {num_images} images.")
    index = torch.arange(num_images, device=text_to_image.device)
    to_text = [text_ranks(image_rows(r), text_to_image, index[r]) for r in chunks(num_images, num_texts)]
    to_image = [image_ranks(text_rows(r), text_to_image[r]) for r in chunks(num_texts, num_images)]
    return torch.cat(to_text), torch.cat(to_image)


def recall_metrics(to_text: Tensor, to_image: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """R@k both ways in percent, and the mean of all; from the ranks (I,) and (T,) of `retrieval_ranks*`."""
    recalls = {f"image_to_text_R@{k}": percent(to_text < k) for k in ks}
    recalls |= {f"text_to_image_R@{k}": percent(to_image < k) for k in ks}
    return recalls | {"mean_recall": sum(recalls.values()) / len(recalls)}


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, text_to_image: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """R@k of cosine retrieval in percent. An image is a hit at k if any of its captions is in its top k; a caption is a
    hit if its image is. Equal scores count against (see `text_ranks`), so that collapsed features score 0.
    """
    return recall_metrics(*retrieval_ranks(image_features, text_features, text_to_image), ks)


# ---------------------------------------------------------------- all together


def evaluate(
    model: Any,
    tokenizer: Callable,
    transform: Callable,
    set_dirs: Sequence[str | Path],
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    precision: torch.dtype = torch.float32,
    num_workers: int = 0,
) -> dict[str, dict[str, float]]:
    """Metrics of the test split of every evaluation set (see `shared.evalsets`), by folder name, in percent.

    model: open_clip's `encode_image(images)` and `encode_text(tokens)`; a module is put into eval mode and back.
    Classification sets give `classification_metrics`, multilabel sets mean_average_precision, retrieval sets
    `retrieval_metrics` over all captions.
    precision: torch.bfloat16 or torch.float16 runs the encoders under autocast; the metrics are computed in float32.
    """
    sets = [EvalSet(folder, transform) for folder in set_dirs]  # all of them opened first, so that errors come early
    if len({eval_set.name for eval_set in sets}) < len(sets):
        raise ValueError(f"Evaluation sets need different folder names, not {[eval_set.name for eval_set in sets]}.")
    training = [m for m in model.modules() if m.training] if isinstance(model, torch.nn.Module) else []
    for module in training:
        module.training = False
    results = {}
    try:
        for eval_set in sets:
            loader = eval_set.batches(batch_size, num_workers, device)
            features, targets = extract_image_features(model.encode_image, loader, device, precision, eval_set.name)
            if eval_set.kind == "retrieval":
                captions = [caption for of_image in targets for caption in of_image]
                texts = encode_texts(model.encode_text, tokenizer, captions, batch_size, device, precision, "captions")
                results[eval_set.name] = retrieval_metrics(features, texts, owners(targets))
                continue
            names, templates = eval_set.classnames, eval_set.templates
            classifier = build_classifier(model.encode_text, tokenizer, names, templates, batch_size, device, precision)
            if eval_set.kind == "multilabel":
                scores = F.normalize(features, dim=-1) @ classifier
                results[eval_set.name] = {"mean_average_precision": mean_average_precision(scores, targets)}
            else:
                results[eval_set.name] = classification_metrics(features, targets, classifier)
    finally:
        for module in training:  # each as it was: a frozen tower stays in eval mode
            module.training = True
    return results


KEPT_BYTES = 2**27  # of images that `quick_top1` keeps from one evaluation to the next
_kept: dict[tuple, list] = {}  # batches of the last small set, by folder and transform


def kept_batches(eval_set: EvalSet, key: tuple, num_workers: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a set; one of at most KEPT_BYTES is decoded once while its `key` stays the same."""
    if key in _kept:
        yield from _kept[key]
        return
    _kept.clear()
    batches, size = [], 0
    for images, labels in eval_set.batches(256, num_workers):
        size += images.nbytes
        if size <= KEPT_BYTES:
            batches.append((images, labels))
        yield images, labels
    if size <= KEPT_BYTES:
        _kept[key] = batches


def quick_top1(
    model: torch.nn.Module,
    tokenizer: Callable,
    transform: Callable,
    set_dir: str | Path,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    num_workers: int = 0,
) -> float:
    """Top-1 (percent) with bare class names as prompts: a point of a learning curve, not a result."""
    was_training = model.training
    model.eval()
    eval_set = EvalSet(set_dir, transform)
    classifier = build_classifier(model.encode_text, tokenizer, eval_set.classnames, ["{c}"], 256, device, precision)
    batches = kept_batches(eval_set, (str(set_dir), transform), num_workers)
    features, labels = extract_image_features(model.encode_image, batches, device, precision)
    model.train(was_training)
    return classification_metrics(features, labels, classifier)["top1"]
