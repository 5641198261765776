"""Zero-shot classification and retrieval, common to all papers. All metrics are in percent.

The functions take features and labels; `evaluate` at the end applies them to any model with open_clip's `encode_image`
and `encode_text`. Letters: N images with a label, C classes, P prompts, D feature dimensions; in classification T
templates; in retrieval I images and T captions. Scores are computed in chunks of at most `CHUNK` numbers, so that the
N x C or I x T matrix is never in memory as a whole.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.clip import filled, say_filled
from shared.errors import UserError
from shared.evalsets import EvalSet, set_names
from shared.pictures import by_picture
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
    """Encode `(images, targets)` batches -> (unnormalised features (N, D), float32, on the CPU; targets)."""
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
    """Texts -> unnormalised features (P, D), float32, on the CPU. The tokenizer decides the context length.

    With `desc`, the kind of texts, many that are cut are reported.
    """
    features, full = [], 0
    starts = range(0, len(texts), batch_size)
    for start in progress(starts, len(starts), desc, batch_size, unit="text"):
        tokens = tokenizer(list(texts[start : start + batch_size])).to(device)
        full += filled(tokens) if desc else 0
        with autocast(precision, torch.device(device)):
            features.append(encode_text(tokens).float().cpu())
    if full:
        say_filled(full, len(texts), tokens.shape[1], desc)
    return torch.cat(features)


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of range(rows), such that a block of a slice's rows and all columns has at most CHUNK numbers."""
    step = max(1, CHUNK // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


# ---------------------------------------------------------------- zero-shot classification


def build_classifier(
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable,
    classnames: Sequence[str | Sequence[str]],
    templates: Sequence[str | Callable[[str], str]],
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """(D, C) classifier from the prompts of all classes x templates, encoded in batches.

    A template contains `{c}` or is a function of the name. A class with a list of names (synonyms) has all
    names x templates as its prompts.
    """
    names = [[entry] if isinstance(entry, str) else list(entry) for entry in classnames]
    fill = [each if callable(each) else functools.partial(each.replace, "{c}") for each in templates]
    prompts = [template(name) for synonyms in names for name in synonyms for template in fill]
    counts = torch.tensor([len(synonyms) * len(templates) for synonyms in names])
    if not len(counts) or counts.min() == 0:
        raise UserError("Every class needs at least one name and one template.")
    embeddings = encode_texts(encode_text, tokenizer, prompts, batch_size, device, precision, desc="prompts")
    return mean_prompts(embeddings, counts)


def mean_prompts(embeddings: Tensor, counts: Tensor) -> Tensor:
    """Embeddings (P, D) of all prompts, class by class, and prompts per class (C,) -> (D, C) unit columns."""
    total = torch.zeros(len(counts), embeddings.shape[1]).index_add_(0, owners(counts), F.normalize(embeddings, dim=-1))
    return F.normalize(total, dim=-1).T  # the mean has the direction of the sum


def owners(counts: Tensor | Sequence) -> Tensor:
    """(sum of counts,) int64: 0 repeated counts[0] times, 1 counts[1] times, and so on; counts may also be lists."""
    if not torch.is_tensor(counts):
        counts = torch.tensor([len(items) for items in counts])
    return torch.arange(len(counts)).repeat_interleave(counts)


def label_ranks(logits: Tensor, labels: Tensor, classifier: Tensor | None = None) -> Tensor:
    """(N,) int64: number of classes ranked before the label's class; 0 is a top-1 hit, below k a top-k hit.

    logits: (N, C), or image features (N, D) of any norm if `classifier` (D, C) is given.
    Ties: of equal logits the lower class index is ranked first, as argmax does. NaN logits count as misses.
    """
    num_classes = (logits if classifier is None else classifier).shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise UserError(f"Labels {int(labels.min())} to {int(labels.max())} do not fit {num_classes} classes.")
    if len(labels) != len(logits) or not len(labels):
        raise UserError(f"{len(labels)} labels do not match {len(logits)} rows of logits.")
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
    """Accuracy in percent; for arguments and ties, see `label_ranks`.

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


def retrieval_ranks(image_features: Tensor, text_features: Tensor, text_to_image: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (I,) image -> text and (T,) text -> image by cosine similarity of features (I, D) and (T, D).

    text_to_image: (T,) image of each caption. Image -> text: number of other images' captions that are ranked before
    the best caption of the image. Text -> image: number of other images that are ranked before the caption's image.
    What has an equal or NaN score is ranked before. An image without captions (evaluation sets have no such image) is a
    miss at any k, as in CLIP_benchmark.
    """
    images, texts = F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1)
    shape = len(images), len(texts)
    return _ranks(lambda rows: images[rows] @ texts.T, lambda rows: texts[rows] @ images.T, shape, text_to_image)


def retrieval_ranks_from_scores(scores: Tensor, text_to_image: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks as in `retrieval_ranks`, from scores (I, T)."""
    return _ranks(lambda rows: scores[rows], lambda rows: scores.T[rows], scores.shape, text_to_image)


def _ranks(
    image_rows: Callable[[slice], Tensor],
    text_rows: Callable[[slice], Tensor],
    shape: tuple[int, int],
    text_to_image: Tensor,
) -> tuple[Tensor, Tensor]:
    num_images, num_texts = shape
    if len(text_to_image) != num_texts or not num_texts:
        raise UserError(f"{len(text_to_image)} entries of text_to_image do not fit {num_texts} texts.")
    if not 0 <= int(text_to_image.min()) <= int(text_to_image.max()) < num_images:
        raise UserError(f"text_to_image has an index beyond the {num_images} images.")
    index = torch.arange(num_images, device=text_to_image.device)
    to_text, to_image = [], []
    for rows in chunks(num_images, num_texts):
        scores, own = image_rows(rows), text_to_image == index[rows, None]
        best = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
        ranks = (~(scores < best) & ~own).sum(dim=1)
        to_text.append(ranks.masked_fill(~own.any(dim=1), torch.iinfo(ranks.dtype).max))
    for rows in chunks(num_texts, num_images):
        scores = text_rows(rows)
        to_image.append((~(scores < scores.gather(1, text_to_image[rows, None]))).sum(dim=1) - 1)
    return torch.cat(to_text), torch.cat(to_image)


def recall_metrics(to_text: Tensor, to_image: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """R@k in percent in both directions, and their mean, from the ranks (I,) and (T,) of `retrieval_ranks*`."""
    recalls = {f"image_to_text_R@{k}": percent(to_text < k) for k in ks}
    recalls |= {f"text_to_image_R@{k}": percent(to_image < k) for k in ks}
    return recalls | {"mean_recall": sum(recalls.values()) / len(recalls)}


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, text_to_image: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """R@k of cosine retrieval in percent. An image is a hit at k if any of its captions is in its top k; a caption is a
    hit if its image is. Ties count as misses, so that collapsed features score 0.
    """
    return recall_metrics(*retrieval_ranks(image_features, text_features, text_to_image), ks)


def shared_captions(captions: Sequence[Sequence[str]]) -> int:
    """Number of images, given the captions of each, that share a caption with another image."""
    images = Counter(caption for of_image in captions for caption in set(of_image))
    return sum(any(images[caption] > 1 for caption in of_image) for of_image in captions)


def say_shared(name: str, captions: Sequence[Sequence[str]]) -> None:
    """Print how many images of the set `name` share a caption with another image, if any do."""
    if shared := shared_captions(captions):
        print(f"{name}: {shared} of {len(captions)} images share a caption with another image; "
              "such ties are misses here, and in part hits in clip-benchmark")  # fmt: skip


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
    """Metrics of the test split of every evaluation set (see `shared.evalsets`), by name (`set_names`), in percent.

    model: open_clip's `encode_image(images)` and `encode_text(tokens)`; a module is put into eval mode meanwhile.
    Classification sets give `classification_metrics`, multilabel sets mean_average_precision, retrieval sets
    `retrieval_metrics` over all captions. Small classification sets also have top1 by picture (see `shared.pictures`).
    precision: torch.bfloat16 or torch.float16 runs the encoders under autocast; the metrics are computed in float32.
    """
    names = set_names(set_dirs)
    sets = [EvalSet(folder, transform) for folder in set_dirs]  # all opened first, so that errors come early
    training = [m for m in model.modules() if m.training] if isinstance(model, torch.nn.Module) else []
    for module in training:
        module.training = False
    results = {}
    try:
        for name, eval_set in zip(names, sets, strict=True):
            loader = eval_set.batches(batch_size, num_workers, device)
            features, targets = extract_image_features(model.encode_image, loader, device, precision, name)
            if eval_set.kind == "retrieval":
                captions = [caption for of_image in targets for caption in of_image]
                say_shared(name, targets)
                texts = encode_texts(model.encode_text, tokenizer, captions, batch_size, device, precision, "captions")
                results[name] = retrieval_metrics(features, texts, owners(targets))
                continue
            texts = eval_set.classnames, eval_set.templates
            classifier = build_classifier(model.encode_text, tokenizer, *texts, batch_size, device, precision)
            if eval_set.kind == "multilabel":
                scores = F.normalize(features, dim=-1) @ classifier
                results[name] = {"mean_average_precision": mean_average_precision(scores, targets)}
            else:
                results[name] = classification_metrics(features, targets, classifier)
                hits = label_ranks(features, targets, classifier) < 1
                results[name] |= by_picture("top1", 100 * hits)
    finally:
        for module in training:  # others, such as frozen towers, stay in eval mode
            module.training = True
    return results


SMALL = 2**24  # bytes: `quick_top1` keeps the images of a set with smaller shards between evaluations
_kept: dict[tuple, list] = {}  # batches of the last small set, by folder, transform and device


def quick_top1(
    model: torch.nn.Module,
    tokenizer: Callable,
    transform: Callable,
    set_dir: str | Path,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    num_workers: int = 0,
) -> float:
    """Top-1 in percent with class names as prompts, for learning curves."""
    was_training = model.training
    model.eval()
    eval_set = EvalSet(set_dir, transform)
    classifier = build_classifier(model.encode_text, tokenizer, eval_set.classnames, ["{c}"], 256, device, precision)
    batches = eval_set.batches(256, num_workers, device)
    if sum(shard.stat().st_size for shard in eval_set.shards) < SMALL:
        if (key := (str(set_dir), transform, str(device))) not in _kept:
            _kept.clear()
            _kept[key] = list(batches)
        batches = _kept[key]
    features, labels = extract_image_features(model.encode_image, batches, device, precision)
    model.train(was_training)
    return classification_metrics(features, labels, classifier)["top1"]
