"""Measure a CLIP model's score of every concept of test sets: `python -m concept_frequency.evaluate MODEL --sets SET`

    python -m concept_frequency.evaluate 'ViT-B-32|laion400m' --sets /data/wds_imagenet1k /data/wds_cifar10
    python -m concept_frequency.evaluate 'RN50|cc3m' --pretrained cyclip_RN50_CC3M.pt --sets /data/wds_mscoco_captions

Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:src/zero_shot_eval.py`, `U:src/retrieval_eval.py`.
Writes JSON files like theirs, with the paths of weights and set beside each result: `<set>_<prompts>_results.json` in
percent, `<set>_<t2i|i2t>_k=<k>_results.json` as fractions. Sets are in the CLIP-benchmark layout; datasets.py converts
those of the authors' sets that are not published in it. `ensemble` are the templates of the set, `ensemble80` OpenAI's
80 for ImageNet, which the paper's text names for all sets. Classes with the same name are numbered in the results:
`missile (1)`, `missile (2)`.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from concept_frequency.captions import load_spacy
from concept_frequency.clip_models import known, load_model
from concept_frequency.concepts import Concepts, caption_concepts, model_key, numbered
from concept_frequency.config import MODELS
from concept_frequency.datasets import TEMPLATES
from shared import checkpoints, cli, export, run, zeroshot
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.evaluation import named, open_sets
from shared.index import locked
from shared.settings import Count, Whole, check_limits
from shared.zeroshot import build_classifier, encode_texts, extract_image_features

K = (1, 5, 10)  # of recall@k
PROMPTS = {"class": ["{c}"], "simple": ["A photo of a {c}."], "ensemble80": list(TEMPLATES)}


@dataclasses.dataclass
class Config:
    """Evaluate one model on any number of sets."""

    model: Annotated[str, tyro.conf.Positional]
    """A model of the paper (`RN50|cc3m`), an open_clip name (`ViT-B-32`), a run folder of any paper, local-dir:DIR with
    what --export wrote, or MODEL@TAG of open_clip."""
    sets: tuple[str, ...] = ()
    """Evaluation sets in the CLIP-benchmark layout: classification, or retrieval (the first five captions of
    each image, or as many as the image with the fewest has)."""
    pretrained: str = ""
    """open_clip's tag or a checkpoint file in open_clip's, CyCLIP's or SLIP's layout; empty: the paper's tag."""
    label: str = ""
    """Name in the results, such as BACKBONE|CORPUS; empty: the model's name."""
    prompts: tuple[str, ...] = ("class", "simple", "ensemble")
    """class: `{c}`, simple: `A photo of a {c}.`, ensemble: the set's templates, ensemble80: ImageNet's 80 templates."""
    spacy: str = "en_core_web_lg"
    """spaCy pipeline that finds the nouns."""
    out: str = "runs/concept_frequency/scores"
    """Folder of the results; results of other models in its files are kept."""
    batch_size: Count = 256
    """Images or prompts per forward pass."""
    workers: Whole = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "authors"
    """Autocast of the encoders. authors: fp16 on a GPU, fp32 on a CPU; the other values as in training."""


# ----------------------------------------------------------------------------------------------------------- evaluation


def classify(
    model: nn.Module, tokenizer: Callable, features: Tensor, labels: Tensor, classnames: list[str],
    templates: list[str], batch_size: int, device: torch.device, dtype: torch.dtype,
) -> dict:  # fmt: skip
    """Zero-shot accuracy, {"full": percent, "classwise": {name: percent}}; classes without test images are left out."""
    classifier = build_classifier(model.encode_text, tokenizer, classnames, templates, batch_size, device, dtype)
    percent, per_class = per_class_accuracy(F.normalize(features, dim=-1) @ classifier, labels)
    named = zip(numbered(classnames), per_class.tolist(), strict=True)
    return {"full": percent, "classwise": {name: value for name, value in named if value == value}}


def per_class_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Logits (N, C) -> (percent, percent (C,) of each class, NaN if it has no samples). U:src/zero_shot_eval.py:238."""
    hits = zeroshot.label_ranks(logits, labels) < 1
    return zeroshot.percent(hits), zeroshot.per_class_accuracy(hits, labels, logits.shape[1])


def concept_recall(
    image: Tensor, text: Tensor, concepts: Concepts, k: int
) -> tuple[float, float, dict[str, float], dict[str, float]]:
    """Recall@k from text to image and from image to text, for all pairs and for each concept, as fractions.

    Source: U:src/retrieval_eval.py:164. image (I, D), text (nI, D); captions ni..ni+n-1 belong to image i. The
    text-to-image recall of a concept is the mean over its captions, its image-to-text recall the mean over its images.
    """
    text_to_image = torch.arange(len(image)).repeat_interleave(len(text) // len(image))
    to_text, to_image = (ranks < k for ranks in zeroshot.retrieval_ranks(image, text, text_to_image))
    t2i, i2t = to_image.double(), to_text.double()
    return (
        t2i.mean().item(),
        i2t.mean().item(),
        {name: t2i[rows].mean().item() for name, rows in concepts.to_texts.items()},
        {name: i2t[rows].mean().item() for name, rows in concepts.to_images.items()},
    )


def retrieve(images: Tensor, texts: Tensor, docs: list) -> dict[str, dict]:
    """Recall, {"t2i_k=1": {"full": fraction, "conceptwise": ...}, ...}; concepts are nouns of the captions."""
    concepts = caption_concepts(docs, captions_per_image=len(texts) // len(images))
    found = {}
    for k in K:
        t2i, i2t, by_text, by_image = concept_recall(images, texts, concepts, k)
        found[f"t2i_k={k}"] = {"full": t2i, "conceptwise": by_text}
        found[f"i2t_k={k}"] = {"full": i2t, "conceptwise": by_image}
    return found


def label_of(cfg: Config) -> str:
    """Name of a model: the paper's BACKBONE|CORPUS, open_clip's BACKBONE|WEIGHTS, else MODEL@TAG or its folder."""
    if "|" in cfg.model or named(cfg.model):
        return cfg.model
    if known(cfg.model):
        return Path(cfg.model.removeprefix(export.LOCAL)).resolve().name
    return f"{Path(cfg.model).name}|{Path(cfg.pretrained or 'random').stem}"


def write(folder: Path, title: str, key: str, result: dict) -> None:
    """Add the result of a model to a file in the authors' layout; processes take turns."""
    path = folder / f"{title}_results.json"
    with locked(folder / ".lock"):
        checkpoints.write_json(path, (checkpoints.read_json(path) if path.exists() else {}) | {key: result})


def check_same(folder: Path, key: str, weights: str, sets: Sequence[EvalSet]) -> None:
    """UserError if `folder` has results of `key` from other weights, or on another set of the same name."""
    places = {each.name: os.path.abspath(each.folder) for each in sets}
    for path in sorted(folder.glob("*_results.json")):
        result = checkpoints.read_json(path).get(key, {})
        weights_then, set_then = result.get("weights", weights), result.get("set", "")
        for then, now in ((weights_then, weights), (set_then, places.get(Path(set_then).name, set_then))):
            if then != now:
                raise UserError(f"{path} has {key} of {then}, not of {now}: choose another --label or --out")


def main(cfg: Config) -> None:
    """Evaluate the model on all sets; write the scores and print a line for each file."""
    check_limits(cfg)
    process = run.setup(0, cfg.device)
    if not cfg.sets:
        raise UserError("--sets is missing: it takes evaluation sets in the CLIP-benchmark layout")
    if unknown := set(cfg.prompts) - {*PROMPTS, "ensemble"}:
        raise UserError(f"--prompts are class, simple, ensemble and ensemble80, not {unknown.pop()}")
    name, tag = MODELS.get(cfg.model, (cfg.model, ""))
    if cfg.model in MODELS and not (cfg.pretrained or tag):
        raise UserError(f"{cfg.model} is not among open_clip's weights: pass its checkpoint with --pretrained FILE")
    model, transform, tokenizer = load_model(name, cfg.pretrained or tag, process.device)
    theirs = "fp16" if process.device.type == "cuda" else "fp32"
    precision = theirs if cfg.precision == "authors" else cfg.precision
    dtype = run.DTYPES[run.resolve_precision(precision, process.device)]
    label = cfg.label or label_of(cfg)
    key, out = model_key(label), Path(cfg.out)
    sets = open_sets("sets", cfg.sets, transform, "classification", "retrieval")
    weights = cfg.pretrained or tag or cfg.model
    weights = os.path.abspath(weights) if Path(weights).exists() else weights
    check_same(out, key, weights, sets)
    out.mkdir(parents=True, exist_ok=True)
    for evaluation in sets:
        about = {"weights": weights, "set": os.path.abspath(evaluation.folder)}
        tagger = load_spacy(cfg.spacy) if evaluation.kind == "retrieval" else None  # a missing one is an error at once
        loader = evaluation.batches(cfg.batch_size, cfg.workers, process.device)
        features, targets = extract_image_features(model.encode_image, loader, process.device, dtype, evaluation.name)
        if evaluation.kind == "retrieval":
            n = min(5, *map(len, targets))  # the first five of each image, as upstream
            captions = [caption for of_image in targets for caption in of_image[:n]]
            texts = encode_texts(model.encode_text, tokenizer, captions, cfg.batch_size, process.device, dtype)
            docs = [[(t.lemma_, t.pos_) for t in doc] for doc in tagger.pipe(captions, disable=["ner"])]
            for title, result in retrieve(features, texts, docs).items():
                write(out, f"{evaluation.name}_{title}", key, result | about)
                print(f"{evaluation.name} {title}: {result['full']:.3f}, {len(result['conceptwise'])} concepts")
            continue
        for prompts in cfg.prompts:
            templates = PROMPTS.get(prompts, evaluation.templates)
            result = classify(
                model, tokenizer, features, targets, evaluation.classnames, templates, cfg.batch_size, process.device,
                dtype,
            )  # fmt: skip
            write(out, f"{evaluation.name}_{prompts}", key, result | about)
            print(f"{evaluation.name} {prompts}: {result['full']:.2f} %, {len(result['classwise'])} concepts")
    print(f"all results: {out}, under {key}")


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
