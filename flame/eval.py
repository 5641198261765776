"""Evaluate FLAME and its baseline: `python -m flame.eval RUN_OR_CHECKPOINT...`.

The paper's evaluations (authors' code MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/;
LAION-AI/CLIP_benchmark@48de38c, `B:` with paths under clip_benchmark/). Zero-shot classification (zeroshot.py), also of
ImageNet in five languages, and Crossmodal-3600 embed texts with the raw caption's prompt (the single prompt, of one
facet); COCO, Flickr30k, long captions, Winoground and SugarCrepe with the long one (longsets.py, compositionality.py).
Further evaluations are a linear probe on raw patch features and few-shot classification in the context of an LLM
(incontext.py). Text embeddings are read from embed.py's files; the LLM is loaded only if one is missing, or for
few-shot classification.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from flame.bank import Bank
from flame.compositionality import READERS, caption_selection, read_instances
from flame.config import LANGUAGES, NO_EXPORT
from flame.config import Config as TrainConfig
from flame.embed import bank_config, load_causal_lm, open_set
from flame.incontext import few_shot_accuracy
from flame.longsets import LONG_SET_READERS, crossmodal3600, imagenet_names, read_image, read_set
from flame.model import FLAME, TrainedText, create_model, load_checkpoint
from flame.zeroshot import (
    DualEncoder,
    TextFeatures,
    encode,
    eval_transform,
    image_features,
    name_classifier,
    set_classifier,
    set_features,
    text_features,
    zero_shot,
    zero_shot_classifier,  # noqa: F401  (offered here, too)
)
from shared import checkpoints, cli, evaluation, export, run
from shared.errors import UserError
from shared.probes import Probe, fit
from shared.zeroshot import classification_metrics, owners, retrieval_ranks

METRICS = {
    "bare_names_ood/top1": "names OOD",
    "bare_names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    "retrieval_long_ood/image_to_text_R@1": "long I2T",
    "retrieval_long_ood/text_to_image_R@1": "long T2I",
    "languages/image_to_text_R@1": "36 languages I2T",
    "languages/text_to_image_R@1": "36 languages T2I",
    "seconds": "seconds",
}


@dataclasses.dataclass
class Config:
    """Measure runs, print the main numbers, and write all of them to RUN/results.json and RUN/results.md."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, or checkpoint files of the authors. As baselines: another paper's run folder, local-dir:DIR written
    by --export, MODEL@TAG of open_clip."""
    model: str = "ViT-B-16"
    """Image tower of checkpoint files: ViT-B-16, ViT-L-14 or ViT-L-16."""
    bank: str | None = None
    """Bank whose LLM and prompts embed the texts; None: the run's bank (checkpoint files need one)."""
    sets: tuple[str, ...] = ()
    """Evaluation sets in the CLIP-benchmark webdataset layout, for classification (single prompt) or retrieval (long
    prompt, mean of its facets)."""
    multilingual: str | None = None
    """SET:FOLDER: ImageNet in that layout, and CLIP_benchmark's clip_benchmark/datasets with class names and templates
    of ImageNet in Arabic, English, Japanese, Italian and Chinese."""
    compositional: tuple[str, ...] = ()
    """Sets of captions that differ in a word or in word order: winoground:FOLDER, sugar_crepe:FOLDER."""
    language_sets: tuple[str, ...] = ()
    """Retrieval sets whose names end in _LANGUAGE; first caption, single prompt."""
    long_sets: tuple[str, ...] = ()
    """Long-context sets as their authors ship them: urban1k:FOLDER, sharegpt4v:FOLDER, docci:FOLDER, dci:FOLDER."""
    crossmodal: str | None = None
    """Folder of Crossmodal-3600 (captions.jsonl, images/): its 36 languages replace `language_sets`."""
    gallery: int | None = None
    """Number of images of each retrieval set, evenly spaced; None: all."""
    language_gallery: int | None = None
    """Number of images of each language; None: all."""
    centre: bool = False
    """Subtract each language's mean from its captions, since this mean also encodes the language (not in the paper)."""
    probe: str | None = None
    """Set with a train/ split for the linear probe; None skips it."""
    export: str | None = None
    """Refused: open_clip has no tower like FLAME's."""
    few_shot: str | None = None
    """Classification set for few-shot episodes: the bank's LLM classifies an image, given one example image of each of
    two classes. For runs of the flame method."""
    episodes: int = 100
    """Number of few-shot episodes."""
    batch_size: int = 256
    """Images or texts per forward pass."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Autocast of the image tower, as in training."""


# --------------------------------------------------------------------------------------------------------- retrieval

BOTH_WAYS = ("image_to_text_R@1", "text_to_image_R@1")


def retrieval_recall(
    image: Tensor, text: Tensor, text_image_index: Tensor | Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Shares (0-1) of queries with a true match among the k nearest, by cosine; image (I, D), text (T, D).

    image_retrieval_recall@k: texts finding their image; text_retrieval_recall@k: images finding any of their texts.
    B:metrics/zeroshot_retrieval.py; with one text an image and k = 1, the argmax of U:training/eval_urban_1k.py:123.
    """
    to_text, to_image = retrieval_ranks(image, text, torch.as_tensor(text_image_index))
    recalls = {f"image_retrieval_recall@{k}": (to_image < k).float().mean().item() for k in ks}
    return recalls | {f"text_retrieval_recall@{k}": (to_text < k).float().mean().item() for k in ks}


# ------------------------------------------------------------------------------------------------------ linear probe


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    validation: tuple[Tensor, Tensor] | None = None,
    epochs: int = 20,
    lr: float = 0.1,
    batch_size: int = 512,
    seed: int = 0,
) -> Probe:
    """Accuracy in percent of a linear layer on unit `visual_only` features (N, W): AdamW, cosine to 0.

    B:metrics/linear_probe.py. With a validation split, the weight decay is chosen from 97 values of 1e-6..1e2; without,
    it is 0.
    """
    train_x, test_x = F.normalize(train_x, dim=-1), F.normalize(test_x, dim=-1)
    if validation is not None:
        validation = F.normalize(validation[0], dim=-1), validation[1]
    return adamw_probe(
        train_x, train_y, test_x, test_y,
        epochs=epochs, lr=lr, batch_size=batch_size, validation=validation, seed=seed,
    )  # fmt: skip


def adamw_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    epochs: int = 20,
    lr: float = 0.1,
    batch_size: int = 512,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> Probe:
    """AdamW on features (N, D), labels (N,), cosine by step to 0 without warm-up. B:metrics/linear_probe.py.

    validation: features and labels on which the weight decay is chosen in 1e-6..1e2 (`log_sweep`); the probe is then
    fitted to the training and validation splits together. Without it, there is no weight decay.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(train_x.shape[1], int(train_y.max()) + 1)
    init = layer.weight.detach(), layer.bias.detach()

    def probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, decay: float) -> Probe:
        def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)

        return Probe(*fit(x, y, test_x, test_y, optimizer, init, epochs, batch_size, True, seed, by_step=True), decay)

    if validation is None:
        return probe(train_x, train_y, test_x, test_y, 0.0)
    best = log_sweep(lambda decay: probe(train_x, train_y, *validation, decay).final, -6, 2)
    return probe(torch.cat([train_x, validation[0]]), torch.cat([train_y, validation[1]]), test_x, test_y, best)


def log_sweep(score: Callable[[float], float], low: int, high: int) -> float:
    """The best of 97 log-spaced values from 10^low to 10^high, by CLIP's parametric binary search (appendix A.3).

    Scores 7 of them, then four times doubles the resolution around the peak. Ties go to the smaller value.
    """
    values = np.logspace(low, high, 97).tolist()
    scores: dict[int, float] = {}

    def peak(candidates: Iterable[int]) -> int:
        for i in candidates:
            if i not in scores:
                scores[i] = score(values[i])
        return max(candidates, key=scores.__getitem__)

    best = peak(range(0, 97, 16))
    for span in (8, 4, 2, 1):
        best = peak([max(best - span, 0), best, min(best + span, 96)])
    return values[best]


# ------------------------------------------------------------------------------------------------------- evaluations


def retrieval(
    features: Tensor, captions: Sequence[Sequence[str]], texts: TextFeatures, multi: bool, centre: bool = False
) -> dict[str, float]:
    """R@1, 5, 10 both ways in percent, and R@1 of chance; features (I, D), captions of each image.

    `centre`: subtract the mean embedding of the captions.
    """
    embeds = texts([caption for each in captions for caption in each], multi)
    embeds = F.normalize(embeds - embeds.mean(0), dim=-1) if centre else embeds
    recalls = retrieval_recall(features, embeds, owners(captions))
    names = {"image_retrieval_recall": "text_to_image_R", "text_retrieval_recall": "image_to_text_R"}
    named = {names[key.split("@")[0]] + "@" + key.split("@")[1]: 100 * value for key, value in recalls.items()}
    return named | {"chance": 100 / len(features)}


def load_model(path: str | Path, cfg: Config) -> tuple[FLAME | DualEncoder, TrainConfig]:
    """Load model (in eval mode) and configuration from a run folder, an authors' checkpoint file, or another model."""
    if export.foreign(path, "flame"):
        return DualEncoder(*export.load_model(str(path))).eval(), TrainConfig()
    path = Path(path)
    state = checkpoints.load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
    if path.is_dir() or (isinstance(state, dict) and {"config", "text_dim"} <= set(state)):
        train_cfg, text_dim = checkpoints.config_in(state, TrainConfig, path), state.get("text_dim")
        if type(text_dim) is not int:
            raise UserError(f"{path} is no run of flame.train: it does not say the width of its texts")
        index = Path(train_cfg.bank or "", "index.json")
        if state.get("bank") and not cfg.bank and index.is_file() and Bank(train_cfg.bank).digest != state["bank"]:
            raise UserError(f"{path} was trained with another bank than {train_cfg.bank} is now: pass --bank")
    else:
        train_cfg = TrainConfig(model=cfg.model, bank=cfg.bank or "")
        weights = state.get("state_dict", state) if isinstance(state, dict) else {}
        last = next((value for name, value in weights.items() if name.endswith("mm.3.weight")), None)
        if last is None:
            raise UserError(f"{path} holds no weights of FLAME: mm.3.weight is missing")
        text_dim = len(last)
    model = create_model(train_cfg, text_dim)
    load_checkpoint(model, state)
    if train_cfg.lock_image:
        model.visual.lock()
    return model.eval(), train_cfg


def check_sets(cfg: Config) -> dict[str, Any]:
    """Open all evaluation sets, so that errors come early. UserError for another kind, or for two sets of one name.

    Returns {entry: its texts} of --long-sets, --compositional and --multilingual.
    """
    lists: dict[str, Any] = {}
    nothing = lambda image: image  # noqa: E731
    languages = [Path(folder).name.rpartition("_")[2] for folder in cfg.language_sets]
    if len(set(languages)) < len(languages):
        raise UserError(f"--language-sets need different languages, not {', '.join(languages)}")
    evaluation.open_sets("sets", cfg.sets, nothing, "classification", "retrieval")
    evaluation.open_sets("language-sets", cfg.language_sets, nothing, "retrieval")
    for split in ("train", "test"):
        evaluation.open_sets("probe", filter(None, [cfg.probe]), nothing, "classification", split=split)
    evaluation.open_sets("few-shot", filter(None, [cfg.few_shot]), nothing, "classification")
    for entry in cfg.long_sets:
        name, folder = named_folder("long-sets", entry, LONG_SET_READERS)
        lists[entry] = read_set(LONG_SET_READERS[name], folder)
    for entry in cfg.compositional:
        lists[entry] = read_instances(*named_folder("compositional", entry, READERS))
    if cfg.crossmodal:
        read_set(crossmodal3600, cfg.crossmodal, LANGUAGES[0])
    if cfg.multilingual:
        folder, _, names = cfg.multilingual.rpartition(":")
        evaluation.open_sets("multilingual", [folder], nothing, "classification")
        lists[cfg.multilingual] = imagenet_names(names)
    return lists


def evaluate_run(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """Every measurement of one checkpoint, flat: {"names_ood/top1": ..., "languages/text_to_image_R@1": ..., ...}."""
    model, train_cfg = load_model(path, cfg)
    model = model.to(process.device)
    if not isinstance(model, TrainedText | DualEncoder) and not (cfg.bank or train_cfg.bank):
        raise UserError(f"{path} names no bank: pass --bank, its LLM and prompts embed the texts")
    device, dtype = process.device, run.DTYPES[run.resolve_precision(cfg.precision, process.device)]
    lists = check_sets(cfg)
    texts = text_features(model, train_cfg, device, dtype, cfg.bank)
    flat: dict[str, float] = {}
    for folder in cfg.sets:
        eval_set = open_set(folder, eval_transform(model), "classification", "retrieval")
        if eval_set.kind == "retrieval":
            features, captions = set_features(model, eval_set, device, dtype, cfg.batch_size, limit=cfg.gallery)
            metrics = retrieval(features, captions, texts, True)
        else:
            classifier = set_classifier(texts, eval_set)
            metrics = zero_shot(model, classifier, eval_set, device, dtype, cfg.batch_size, cfg.workers)
        flat |= {f"{Path(folder).name}/{key}": value for key, value in metrics.items()}
    if cfg.multilingual:
        flat |= multilingual_imagenet(model, texts, lists[cfg.multilingual], cfg, device, dtype)
    for entry in cfg.compositional:
        flat |= compositional(model, texts, entry.partition(":")[0], lists[entry], cfg, device, dtype)
    for entry in cfg.long_sets:
        name, pairs, view = entry.partition(":")[0], lists[entry], eval_transform(model)
        images = (view(read_image(path)) for path, _ in pairs)
        features = encode(model, images, device, dtype, cfg.batch_size)
        metrics = retrieval(features, [[text] for _, text in pairs], texts, True)
        flat |= {f"{name}/{key}": value for key, value in metrics.items()}
    flat |= languages(model, texts, cfg, device, dtype)
    if cfg.probe:
        flat |= probe_metrics(model, cfg, device, dtype)
    if cfg.few_shot and not isinstance(model, TrainedText | DualEncoder):
        eval_set = open_set(cfg.few_shot, eval_transform(model), "classification")
        images, labels = zip(*((image, label) for _, image, label in eval_set), strict=True)
        lm, tokenizer = load_causal_lm(bank_config(cfg.bank or train_cfg.bank), device)
        flat[f"{Path(cfg.few_shot).name}/few_shot"] = few_shot_accuracy(
            model, lm, tokenizer, images, torch.tensor(labels), eval_set.classnames, count=cfg.episodes
        )
    return {name: value for name, value in flat.items() if not math.isnan(value)}


def named_folder(option: str, entry: str, known: Iterable[str]) -> tuple[str, str]:
    """Split NAME:FOLDER into (name, folder). UserError if the name is unknown."""
    name, _, folder = entry.partition(":")
    if name not in known:
        raise UserError(f"--{option} {entry} should be one of {', '.join(known)}, a colon and a folder")
    return name, folder


def multilingual_imagenet(
    model: FLAME, texts: TextFeatures, named: dict[str, tuple], cfg: Config, device, dtype: torch.dtype
) -> dict[str, float]:
    """{"imagenet_LANGUAGE/METRIC": percent} of the five languages of `cfg.multilingual`, whose names are `named`."""
    folder, _, names = cfg.multilingual.rpartition(":")
    eval_set = open_set(folder, eval_transform(model), "classification")
    features, labels = set_features(model, eval_set, device, dtype, cfg.batch_size, cfg.workers)
    flat = {}
    for language, (classes, templates) in named.items():
        if len(classes) != len(eval_set.classnames):
            raise UserError(f"{folder} has {len(eval_set.classnames)} classes, but {names} names {len(classes)}")
        classifier = name_classifier(texts, classes, templates)
        metrics = classification_metrics(F.normalize(features, dim=-1), labels, classifier)
        flat |= {f"imagenet_{language}/{key}": value for key, value in metrics.items()}
    return flat


def compositional(
    model: FLAME, texts: TextFeatures, name: str, sets: dict[str, list], cfg: Config, device, dtype: torch.dtype
) -> dict[str, float]:
    """{"SET/METRIC": percent} of what `read_instances` has read: of Winoground, or of the seven sets of SugarCrepe and
    their mean."""
    view, flat = eval_transform(model), {}
    for kind, instances in sets.items():
        images = (view(read_image(path)) for one in instances for path in one.images)
        features = F.normalize(encode(model, images, device, dtype, cfg.batch_size), dim=-1)
        captions = texts([caption for one in instances for caption in one.captions], True)
        by_instance = (embeddings.unflatten(0, (len(instances), -1)) for embeddings in (features, captions))
        flat |= {f"{kind}/{key}": value for key, value in caption_selection(*by_instance).items()}
    if len(found := [value for key, value in flat.items() if key.endswith("/text_acc")]) > 1:
        flat[f"{name}/text_acc"] = sum(found) / len(found)
    return flat


def language_sets(
    model: FLAME, cfg: Config, device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, list[list[str]]]]:
    """(language, image features (I, D), first caption of each image); Crossmodal-3600 has the same images in all
    languages."""
    view = eval_transform(model)
    if cfg.crossmodal:
        pairs = {language: read_set(crossmodal3600, cfg.crossmodal, language) for language in LANGUAGES}
        files = list(dict.fromkeys(path for each in pairs.values() for path, _ in each))
        features = encode(model, (view(read_image(path)) for path in files), device, dtype, cfg.batch_size)
        row = {path: i for i, path in enumerate(files)}
        for language, each in pairs.items():
            yield language, features[[row[path] for path, _ in each]], [[text] for _, text in each]
        return
    for folder in cfg.language_sets:
        eval_set = open_set(folder, view, "retrieval")
        features, captions = set_features(model, eval_set, device, dtype, cfg.batch_size, limit=cfg.language_gallery)
        yield Path(folder).name.rpartition("_")[2], features, [of_image[:1] for of_image in captions]


def languages(model: FLAME, texts: TextFeatures, cfg: Config, device, dtype: torch.dtype) -> dict[str, float]:
    """R@1 both ways of each language and their means, by the first caption of an image."""
    found: dict[str, dict[str, float]] = {}
    for language, features, firsts in language_sets(model, cfg, device, dtype):
        metrics = retrieval(features, firsts, texts, False, cfg.centre)
        found[language] = {key: metrics[key] for key in (*BOTH_WAYS, "chance")}
    flat = {f"language_{language}/{way}": metrics[way] for language, metrics in found.items() for way in BOTH_WAYS}
    return flat | language_means(found, all_and_other(found))


def all_and_other(languages: Iterable[str]) -> dict[str, list[str]]:
    """Two groups for `language_means`: all languages, and all but English."""
    languages = list(languages)
    return {"languages/": languages, "languages/other_": [language for language in languages if language != "en"]}


def language_means(found: dict[str, dict[str, float]], groups: dict[str, Sequence[str]]) -> dict[str, float]:
    """Means of {language: {metric: value}} over groups {prefix: languages} -> {PREFIX + METRIC: mean of the group}.

    Groups without languages, or with a language that `found` lacks, are left out.
    """
    return {
        prefix + metric: sum(found[language][metric] for language in languages) / len(languages)
        for prefix, languages in groups.items()
        if languages and found.keys() >= set(languages)
        for metric in found[languages[0]]
    }


def probe_metrics(model: FLAME, cfg: Config, device, dtype: torch.dtype) -> dict[str, float]:
    """`linear_probe` on `cfg.probe`: test accuracy in percent after the last epoch."""
    view = eval_transform(model)
    loaders = [
        open_set(cfg.probe, view, "classification", split=split).batches(cfg.batch_size, cfg.workers, device)
        for split in ("train", "test")
    ]
    (train_x, train_y), (test_x, test_y) = (
        image_features(model, loader, device, dtype, visual_only=True) for loader in loaders
    )
    probe = linear_probe(train_x, train_y, test_x, test_y)
    return {f"{Path(cfg.probe).name}/probe_final": probe.final}


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`evaluate_run`, saved beside the checkpoint as results.json and results.md; reused while nothing has changed."""
    imagenet = cfg.multilingual.rpartition(":")[0] if cfg.multilingual else None
    sets = (*cfg.sets, imagenet, *cfg.language_sets, cfg.probe, cfg.few_shot)
    folders = [entry.partition(":")[2] for entry in (*cfg.long_sets, *cfg.compositional)]
    folders += [cfg.crossmodal] if cfg.crossmodal else []
    files = [file for folder in folders for file in Path(folder).rglob("*") if file.is_file()]
    config = Path(path) / "config.json"
    if bank := cfg.bank or (checkpoints.read_json(config).get("bank") if config.is_file() else None):
        files += [Path(bank) / name for name in ("index.json", "centres.npy")]
    return evaluation.measured_run(path, cfg, sets, lambda _: evaluate_run(path, cfg, process), files)


def main(cfg: Config) -> list[dict[str, float]]:
    """Measure every run. Returns the measurements of each."""
    process = run.setup(0, cfg.device)
    if cfg.export:
        raise UserError(NO_EXPORT)
    cli.check_counts(cfg, "batch_size", "episodes", "gallery", "language_gallery")
    cli.check_counts(cfg, "workers", least=0)
    kinds = "run folder or checkpoint file"
    results = evaluation.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), METRICS, kinds, foreign=True)
    return results


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
