"""Evaluate FLAME and its baseline: `python -m flame.eval RUN_OR_CHECKPOINT... [--report FILE]`.

The paper's evaluations (authors' code MIV-XJTU/FLAME@4d2b9a9, cited as `U:`; LAION-AI/CLIP_benchmark@48de38c, `B:`):
zero-shot classification and Crossmodal-3600 with the single prompt; COCO, Flickr30k and long captions with the long
one; linear probe on raw patch features; few-shot in the context of an LLM and the words of patches. Texts come from
the files that embed.py keeps; an LLM is loaded only for texts that are not there.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import open_clip
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from flame.bank import Bank, centred, open_bank
from flame.claims import ARMS, METRICS, compare  # noqa: F401
from flame.config import EVAL, LANGUAGE_SETS, LANGUAGES, LONG_SETS, ZERO_SHOT_SETS
from flame.config import Config as TrainConfig
from flame.embed import load_causal_lm, made_with, open_set, prompts_of, read_pairs, texts_of_bank
from flame.incontext import few_shot, few_shot_accuracy, nearest_tokens, pool_patches  # noqa: F401
from flame.longsets import LONG_SET_READERS, crossmodal3600, read_image, read_set
from flame.model import FLAME, TrainedText, create_model, load_checkpoint
from flame.probe import adamw_probe
from shared import checkpoints, cli, evaluation, run
from shared.evalsets import EvalSet
from shared.probes import Probe
from shared.zeroshot import classification_metrics, encode_texts, extract_image_features, owners, retrieval_ranks

TextFeatures = Callable[[Sequence[str], bool], Tensor]  # texts, whether with the long prompt -> (n, D) unit rows


@dataclasses.dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, or checkpoint files of the authors."""
    model: str = "ViT-B-16"
    """Image tower of checkpoint files: ViT-B-16, ViT-L-14 or ViT-L-16."""
    bank: str | None = None
    """Bank whose LLM and prompts embed the texts; None: that of the run (checkpoint files: say which)."""
    sets: tuple[str, ...] = ZERO_SHOT_SETS + LONG_SETS
    """Evaluation sets in the CLIP-benchmark webdataset layout, for classification (single prompt) or retrieval (long
    prompt, mean of its facets) as each says."""
    language_sets: tuple[str, ...] = LANGUAGE_SETS
    """Retrieval sets whose names end in _LANGUAGE; first caption, single prompt."""
    long_sets: tuple[str, ...] = ()
    """Long-context sets as their authors ship them: urban1k:FOLDER, sharegpt4v:FOLDER, docci:FOLDER, dci:FOLDER."""
    crossmodal: str | None = None
    """Folder of Crossmodal-3600 (captions.jsonl, images/): its 36 languages in the place of `language_sets`."""
    gallery: int | None = None
    """Images kept of each retrieval set, evenly spaced; None keeps all."""
    language_gallery: int | None = None
    """Images kept of each language; None keeps all."""
    probe: str | None = EVAL + "subgroups_ood"
    """Set with a train/ split for the linear probe; None leaves it out."""
    export: str | None = None
    """Refused: open_clip has no tower like FLAME's."""
    few_shot: str | None = None
    """Classification set for episodes of two classes with an example each, in the context of the bank's LLM."""
    episodes: int = 100
    """How many of them."""
    report: str | None = None
    """Also compare all runs, named ARM-seedN, and write this file with claims and verdicts."""
    batch_size: int = 256
    """Images or texts per forward pass."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """Autocast of the image tower, as in training."""


# --------------------------------------------------------------------------------------------------- metrics, pure


def zero_shot_classifier(template_embeds: Tensor) -> Tensor:
    """(C, T, D) -> (D, C): normalise each template, mean, normalise. U:open_clip/zero_shot_classifier.py:53-58."""
    return F.normalize(F.normalize(template_embeds.float(), dim=-1).mean(dim=1), dim=-1).T


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
    """Linear layer on unit `visual_only` features (N, W), percent: AdamW, cosine to 0. B:metrics/linear_probe.py.

    Without validation split there is no weight decay; with one it is chosen from 97 values of 1e-6..1e2.
    """
    train_x, test_x = F.normalize(train_x, dim=-1), F.normalize(test_x, dim=-1)
    if validation is not None:
        validation = F.normalize(validation[0], dim=-1), validation[1]
    return adamw_probe(
        train_x, train_y, test_x, test_y,
        epochs=epochs, lr=lr, batch_size=batch_size, validation=validation, seed=seed,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- texts


def text_features(
    model: FLAME, cfg: TrainConfig, device: torch.device | str = "cpu", precision: torch.dtype = torch.float32,
    bank: str | None = None, load: bool = True,
) -> TextFeatures:  # fmt: skip
    """How the texts of a run's evaluation are embedded: by its bank's LLM, or its trained text transformer.

    `load`: whether the LLM may be loaded for texts that embed.py has not seen. A run that trained on the summary facets
    alone is asked by the summary alone: its long prompt is the single one.
    """
    if isinstance(model, TrainedText):
        tokenizer = open_clip.SimpleTokenizer(context_length=cfg.max_length)

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
    single_only = bool(cfg.rows) and set(cfg.rows) <= {0, 1, 4}

    def embedded(texts: Sequence[str], multi: bool = False) -> Tensor:
        multi = multi and not single_only
        features = frozen(texts, multi)
        return features if centres is None else centred(features, centres[-1 if multi else 0])

    return embedded


def classifier_of(texts: TextFeatures, eval_set: EvalSet) -> Tensor:
    """(D, C) of a classification set, its names in its templates."""
    embeds = texts(prompts_of(eval_set), False)
    return zero_shot_classifier(embeds.unflatten(0, (len(eval_set.classnames), -1)))


# ------------------------------------------------------------------------------------------------------- evaluations


def view_of(model: FLAME):
    return open_clip.transform.image_transform(model.visual.image_size[0], is_train=False)


def image_features(
    model: FLAME, batches: Iterable, device: torch.device | str, precision: torch.dtype, visual_only: bool = False
) -> tuple[Tensor, Tensor]:
    """(N, D) float32 and labels, model in eval mode."""
    was_training = model.training
    model.eval()
    features = extract_image_features(lambda x: model.encode_image(x, visual_only), batches, device, precision)
    model.train(was_training)
    return features


def zero_shot(
    model: FLAME, classifier: Tensor, eval_set: EvalSet, device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32, batch_size: int = 256, workers: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Top-1, top-5 and mean per class, in percent; logits are 100 x . c upstream, which changes no ranking."""
    features, labels = image_features(model, eval_set.batches(batch_size, workers), device, precision)
    return classification_metrics(F.normalize(features, dim=-1), labels, classifier)


def zero_shot_top1(model: FLAME, classifier: Tensor, eval_set: EvalSet, device, precision: torch.dtype) -> float:
    return zero_shot(model, classifier, eval_set, device, precision)["top1"]


def encode(
    model: FLAME, images: Iterable[Tensor], device: torch.device | str, precision: torch.dtype, batch_size: int
) -> Tensor:
    """(I, D) features of images (3, H, H), of which no more than a batch is held."""

    def batches():
        source = iter(images)
        while batch := list(itertools.islice(source, batch_size)):
            yield torch.stack(batch), torch.zeros(0)

    return image_features(model, batches(), device, precision)[0]


def retrieval(
    features: Tensor, captions: Sequence[Sequence[str]], texts: TextFeatures, multi: bool
) -> dict[str, float]:
    """R@1, 5, 10 both ways in percent, and what chance would give at 1; features (I, D), captions of each image."""
    embeds = texts([caption for each in captions for caption in each], multi)
    recalls = retrieval_recall(features, embeds, owners(captions))
    names = {"image_retrieval_recall": "text_to_image_R", "text_retrieval_recall": "image_to_text_R"}
    named = {names[key.split("@")[0]] + "@" + key.split("@")[1]: 100 * value for key, value in recalls.items()}
    return named | {"chance": 100 / len(features)}


def load_model(path: str | Path, cfg: Config) -> tuple[FLAME, TrainConfig]:
    """Model in eval mode and configuration of a run folder, or of an authors' checkpoint file."""
    path = Path(path)
    if path.is_dir():
        state = checkpoints.load_checkpoint(path / "checkpoint.pt")
        try:
            settings, text_dim = state["config"], state["text_dim"]
            train_cfg = TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} is no run of flame.train") from error
    else:
        state = checkpoints.load_checkpoint(path)
        train_cfg = TrainConfig(model=cfg.model, bank=cfg.bank or "")
        weights = state.get("state_dict", state) if isinstance(state, dict) else {}
        last = next((value for name, value in weights.items() if name.endswith("mm.3.weight")), None)
        if last is None:
            raise ValueError(f"{path} holds no weights of FLAME: mm.3.weight is missing")
        text_dim = len(last)
    model = create_model(train_cfg, text_dim)
    load_checkpoint(model, state)
    return model.eval(), train_cfg


def evaluate_run(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """Every measurement of one checkpoint, flat: {"names_ood/top1": ..., "languages/text_to_image_R@1": ..., ...}."""
    model, train_cfg = load_model(path, cfg)
    model = model.to(process.device)
    if not isinstance(model, TrainedText) and not (cfg.bank or train_cfg.bank):
        raise ValueError(f"{path} says no bank: name one with --bank, for its LLM and prompts")
    device, dtype = process.device, run.DTYPES[run.resolve_precision(cfg.precision, process.device)]
    texts = text_features(model, train_cfg, device, dtype, cfg.bank)
    flat: dict[str, float] = {}
    for folder in cfg.sets:
        eval_set = open_set(folder, view_of(model), "classification", "retrieval")
        if eval_set.kind == "retrieval":
            images, captions = read_pairs(eval_set, cfg.gallery)
            metrics = retrieval(encode(model, images, device, dtype, cfg.batch_size), captions, texts, True)
        else:
            classifier = classifier_of(texts, eval_set)
            metrics = zero_shot(model, classifier, eval_set, device, dtype, cfg.batch_size, cfg.workers)
        flat |= {f"{Path(folder).name}/{key}": value for key, value in metrics.items()}
    for entry in cfg.long_sets:
        name, _, folder = entry.partition(":")
        if name not in LONG_SET_READERS:
            raise ValueError(
                f"--long-sets {entry} should be one of {', '.join(LONG_SET_READERS)}, a colon and a folder"
            )
        pairs, view = read_set(LONG_SET_READERS[name], folder), view_of(model)
        images = (view(read_image(path)) for path, _ in pairs)
        features = encode(model, images, device, dtype, cfg.batch_size)
        metrics = retrieval(features, [[text] for _, text in pairs], texts, True)
        flat |= {f"{name}/{key}": value for key, value in metrics.items()}
    flat |= languages(model, texts, cfg, device, dtype)
    if cfg.probe:
        flat |= probe_metrics(model, cfg, device, dtype)
    if cfg.few_shot and not isinstance(model, TrainedText):
        eval_set = open_set(cfg.few_shot, view_of(model), "classification")
        images, labels = zip(*((image, label) for _, image, label in eval_set), strict=True)
        lm, tokenizer = load_causal_lm(made_with(cfg.bank or train_cfg.bank), device)
        flat[f"{Path(cfg.few_shot).name}/few_shot"] = few_shot_accuracy(
            model, lm, tokenizer, images, torch.tensor(labels), eval_set.classnames, count=cfg.episodes
        )
    return {name: value for name, value in flat.items() if not math.isnan(value)}


def language_sets(
    model: FLAME, cfg: Config, device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, list[list[str]]]]:
    """(language, image features (I, D), first caption of each image); Crossmodal-3600's images are the same in all."""
    view = view_of(model)
    if cfg.crossmodal:
        pairs = {language: read_set(crossmodal3600, cfg.crossmodal, language) for language in LANGUAGES}
        files = list(dict.fromkeys(path for each in pairs.values() for path, _ in each))
        features = encode(model, (view(read_image(path)) for path in files), device, dtype, cfg.batch_size)
        row = {path: i for i, path in enumerate(files)}
        for language, each in pairs.items():
            yield language, features[[row[path] for path, _ in each]], [[text] for _, text in each]
        return
    for folder in cfg.language_sets:
        images, captions = read_pairs(open_set(folder, view, "retrieval"), cfg.language_gallery)
        features = encode(model, images, device, dtype, cfg.batch_size)
        yield Path(folder).name.rpartition("_")[2], features, [of_image[:1] for of_image in captions]


def languages(model: FLAME, texts: TextFeatures, cfg: Config, device, dtype: torch.dtype) -> dict[str, float]:
    """R@1 both ways of each language and their means, by the first caption of an image."""
    flat: dict[str, float] = {}
    of_all: dict[str, dict[str, float]] = {}
    for language, features, firsts in language_sets(model, cfg, device, dtype):
        metrics = retrieval(features, firsts, texts, False)
        of_all[language] = metrics
        flat |= {f"language_{language}/{key}": metrics[key] for key in ("image_to_text_R@1", "text_to_image_R@1")}
    if of_all:
        for key in ("image_to_text_R@1", "text_to_image_R@1", "chance"):
            flat[f"languages/{key}"] = sum(metrics[key] for metrics in of_all.values()) / len(of_all)
            others = [metrics[key] for language, metrics in of_all.items() if language != "en"]
            if others:
                flat[f"languages/other_{key}"] = sum(others) / len(others)
    return flat


def probe_metrics(model: FLAME, cfg: Config, device, dtype: torch.dtype) -> dict[str, float]:
    loaders = [
        open_set(cfg.probe, view_of(model), "classification", split=split).batches(cfg.batch_size, cfg.workers)
        for split in ("train", "test")
    ]
    (train_x, train_y), (test_x, test_y) = (
        image_features(model, loader, device, dtype, visual_only=True) for loader in loaders
    )
    probe = linear_probe(train_x, train_y, test_x, test_y)
    return {f"{Path(cfg.probe).name}/probe_final": probe.final}


def facet_similarity(rows: Tensor) -> Tensor:
    """(I, T, D) unit rows of images -> (T, T) mean cosines between the facets of an image."""
    return (rows @ rows.transpose(1, 2)).mean(0)


def plot_similarity(bank: Bank, path: Path, images: int = 500) -> None:
    """Left: facets as they are; right: each less its mean over images. Of the bank's first file."""
    shard = torch.from_numpy(bank._shard(0)[:images].astype("float32"))
    less = centred(shard, bank.centres[: bank.count])
    names = [f"{kind}{k}" for kind, count in (("raw ", 1), ("short ", 3), ("long ", 7)) for k in range(1, count + 1)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8))
    for axis, rows, title in zip(axes, (shard, less), ("facets of an image", "each less its mean"), strict=True):
        cosines = facet_similarity(rows)
        shown = axis.imshow(cosines, vmin=float(cosines.min()), vmax=1.0)
        axis.set_xticks(range(len(cosines)), names[: len(cosines)], rotation=90, fontsize=7)
        axis.set_yticks(range(len(cosines)), names[: len(cosines)], fontsize=7)
        axis.set_title(f"mean cosine, {title}", fontsize=9)
        figure.colorbar(shown, ax=axis, fraction=0.046)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`evaluate_run`, kept beside the checkpoint as results.json and results.md; not repeated while nothing changed."""
    sets = (*cfg.sets, *cfg.language_sets, cfg.probe, cfg.few_shot)
    return evaluation.measured_run(path, cfg, sets, lambda _: evaluate_run(path, cfg, process))


def main(cfg: Config) -> None:
    process = run.setup(0, cfg.device)
    if cfg.export:
        raise ValueError("--export: open_clip has no image tower that averages an MLP of every patch, as FLAME's does")
    cli.check_counts(cfg, "batch_size", "episodes")
    results = evaluation.evaluate_runs(
        cfg, lambda path: evaluated(path, cfg, process), METRICS, "run folder or checkpoint file"
    )
    if cfg.report:
        compare(list(cfg.runs), results, Path(cfg.report))
        settings = [checkpoints.load_checkpoint(Path(path) / "checkpoint.pt")["config"] for path in cfg.runs]
        banks = [each["bank"] for each in settings if each["method"] == "flame"]
        if banks and isinstance(bank := open_bank(min(banks, key=len)), Bank):
            plot_similarity(bank, Path(cfg.report).parent / "flame_facets.png")


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
