"""Evaluate FLAME and its baseline: `python -m flame.eval RUN_OR_CHECKPOINT...`.

The paper's evaluations (Evaluation.md of MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/;
LAION-AI/CLIP_benchmark@48de38c, `B:` with paths under clip_benchmark/). Zero-shot classification (zeroshot.py), also of
ImageNet in five languages, and Crossmodal-3600 embed texts with the raw caption's prompt (the single prompt, of one
facet); COCO, Flickr30k, long captions, Winoground and SugarCrepe with the long one (longsets.py). The linear probe
reads raw patch features. Text embeddings are kept beside the bank; the LLM is loaded only if one is missing.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from flame.bank import Bank
from flame.config import LANGUAGES
from flame.config import Config as TrainConfig
from flame.longsets import (
    COMPOSITIONAL_READERS,
    LONG_SET_READERS,
    crossmodal3600,
    imagenet_names,
    read_image,
    read_instances,
    read_set,
)
from flame.model import FLAME, TrainedText, create_model, load_checkpoint
from flame.zeroshot import (
    TextFeatures,
    encode,
    eval_transform,
    image_features,
    llm_of_bank,
    name_classifier,
    open_set,
    texts_of_bank,
    tokenizer_of,
    trained_texts,
    zero_shot,
)
from shared import checkpoints, cli, evaluation, export, run
from shared.errors import UserError
from shared.pictures import by_picture, of_pictures
from shared.probes import Probe, fit
from shared.settings import Count, Whole, check_limits
from shared.zeroshot import owners, percent, retrieval_ranks, say_shared

METRICS = {
    "bare_names_ood/top1": "names OOD",
    "bare_names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
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
    """Image tower of checkpoint files: ViT-B-16 or ViT-L-14."""
    bank: str | None = None
    """Bank whose LLM and prompts embed the texts; None: the run's bank (checkpoint files need one)."""
    sets: tuple[str, ...] = ()
    """Evaluation sets in the CLIP-benchmark webdataset layout, for classification (single prompt) or retrieval (long
    prompt, mean of its facets); by default the run's eval_set, or the pictures held out from its training data."""
    multilingual: str | None = None
    """SET:FOLDER: ImageNet in that layout, and CLIP_benchmark's clip_benchmark/datasets with class names and templates
    of ImageNet in Arabic, English, Japanese, Italian and Chinese."""
    compositional: tuple[str, ...] = ()
    """Sets of captions that differ in a word or in word order: winoground:FOLDER, sugar_crepe:FOLDER."""
    long_sets: tuple[str, ...] = ()
    """Long-context sets as their authors ship them: urban1k:FOLDER, sharegpt4v:FOLDER, docci:FOLDER, dci:FOLDER."""
    crossmodal: str | None = None
    """Folder of Crossmodal-3600 (captions.jsonl, images/): retrieval in 36 languages, first caption, single prompt."""
    probe: str | None = None
    """Set with a train/ split for the linear probe; None skips it."""
    batch_size: Count = 256
    """Images or texts per forward pass."""
    workers: Whole = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Autocast of the image tower, as in training."""


# ------------------------------------------------------------------------------------------------------------- metrics

BOTH_WAYS = ("image_to_text_R@1", "text_to_image_R@1")


def retrieval_recall(
    image: Tensor, text: Tensor, text_image_index: Tensor | Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Shares (0-1) of queries with a true match among the k nearest, by cosine; image (I, D), text (T, D).

    image_retrieval_recall@k: texts finding their image; text_retrieval_recall@k: images finding any of their texts.
    B:metrics/zeroshot_retrieval.py; with one text an image and k = 1, the argmax of U:training/eval_urban_1k.py:123.
    """
    to_text, to_image = retrieval_ranks(image, text, torch.as_tensor(text_image_index))
    recalls = {f"image_retrieval_recall@{k}": (to_image < k).double().mean().item() for k in ks}
    return recalls | {f"text_retrieval_recall@{k}": (to_text < k).double().mean().item() for k in ks}


def retrieval(
    features: Tensor, captions: Sequence[Sequence[str]], texts: TextFeatures, multi: bool
) -> dict[str, float]:
    """R@1, 5, 10 both ways in percent, and R@1 of chance; features (I, D), captions of each image."""
    embeds, owner = texts([caption for each in captions for caption in each], multi), owners(captions)
    recalls = retrieval_recall(features, embeds, owner)
    names = {"image_retrieval_recall": "text_to_image_R", "text_retrieval_recall": "image_to_text_R"}
    named = {names[key.split("@")[0]] + "@" + key.split("@")[1]: 100 * value for key, value in recalls.items()}
    to_text, to_image = (100 * (ranks < 1) for ranks in retrieval_ranks(features, embeds, owner))
    scores = zip(BOTH_WAYS, (to_text, of_pictures(to_image, owner, len(features))), strict=True)
    named |= {key: text for metric, of_each in scores for key, text in by_picture(metric, of_each).items()}
    return named | {"chance": 100 / len(features)}


def caption_selection(images: Tensor, captions: Tensor) -> dict[str, float]:
    """Percent of instances whose captions and images are matched correctly, by cosine.

    images (N, I, D), captions (N, C, D), of unit length. text_acc: each of the first min(I, C) images is nearest to its
    own caption; image_acc: each of these captions is nearest to its own image; acc: both.
    B:metrics/image_caption_selection.py. Ties count as wrong.
    """
    scores = images @ captions.transpose(1, 2)  # (N, I, C)
    own = scores.diagonal(dim1=1, dim2=2)  # (N, min(I, C))
    k = own.shape[1]
    others = scores.clone()
    others.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    text = (others[:, :k].amax(dim=2) < own).all(dim=1)
    image = (others[:, :, :k].amax(dim=1) < own).all(dim=1)
    return {"text_acc": percent(text), "image_acc": percent(image), "acc": percent(text & image)}


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    epochs: int = 20,
    lr: float = 0.1,
    batch_size: int = 512,
    seed: int = 0,
) -> Probe:
    """A linear layer on unit features (N, W), labels (N,): AdamW without decay, cosine by step to 0.

    B:metrics/linear_probe.py, as the authors' command calls it: without a validation split.
    """
    train_x, test_x = F.normalize(train_x, dim=-1), F.normalize(test_x, dim=-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(train_x.shape[1], int(train_y.max()) + 1)
    init = layer.weight.detach(), layer.bias.detach()

    def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    found = fit(train_x, train_y, test_x, test_y, optimizer, init, epochs, batch_size, True, seed, by_step=True)
    return Probe(*found, 0.0)


# -------------------------------------------------------------------------------------------------------------- models


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
    return model.eval(), train_cfg


def text_features(
    model: nn.Module, bank: str, path: str | Path, device: torch.device, precision: torch.dtype
) -> TextFeatures:
    """The function that embeds texts for a model: the bank's language model, or the model's own text tower."""
    if isinstance(model, DualEncoder):
        return trained_texts(model, model.tokenizer, device, precision)
    if isinstance(model, TrainedText):
        return trained_texts(model, tokenizer_of(model), device, precision)
    if not bank:
        raise UserError(f"{path} names no bank: pass --bank, its LLM and prompts embed the texts")
    return texts_of_bank(bank, llm_of_bank(bank, device))


# ------------------------------------------------------------------------------------------------------- evaluations


def check_sets(cfg: Config) -> dict[str, Any]:
    """Open all evaluation sets, so that errors come early. UserError for another kind, or for two sets of one name.

    Returns {entry: its texts} of --long-sets, --compositional and --multilingual.
    """
    lists: dict[str, Any] = {}
    evaluation.open_sets("sets", cfg.sets, None, "classification", "retrieval")
    for split in ("test", "train"):
        evaluation.open_sets("probe", filter(None, [cfg.probe]), None, "classification", split=split)
    for entry in cfg.long_sets:
        name, folder = named_folder("long-sets", entry, LONG_SET_READERS)
        lists[entry] = read_set(LONG_SET_READERS[name], folder)
    for entry in cfg.compositional:
        lists[entry] = read_instances(*named_folder("compositional", entry, COMPOSITIONAL_READERS))
    if cfg.crossmodal:
        read_set(crossmodal3600, cfg.crossmodal, LANGUAGES[0])
    if cfg.multilingual:
        folder, _, names = cfg.multilingual.rpartition(":")
        evaluation.open_sets("multilingual", [folder], None, "classification")
        lists[cfg.multilingual] = imagenet_names(names)
    return lists


def named_folder(option: str, entry: str, known: Iterable[str]) -> tuple[str, str]:
    """Split NAME:FOLDER into (name, folder). UserError if the name is unknown."""
    name, _, folder = entry.partition(":")
    if name not in known:
        raise UserError(f"--{option} {entry} should be one of {', '.join(known)}, a colon and a folder")
    return name, folder


def evaluate_run(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """Every measurement of one checkpoint, flat: {"names_ood/top1": ..., "languages/text_to_image_R@1": ..., ...}."""
    model, train_cfg = load_model(path, cfg)
    model, device = model.to(process.device), process.device
    dtype = run.DTYPES[run.resolve_precision(cfg.precision, device)]
    texts = text_features(model, cfg.bank or train_cfg.bank, path, device, dtype)
    return measure(model, texts, cfg, device, dtype)


def measure(model: nn.Module, texts: TextFeatures, cfg: Config, device, dtype: torch.dtype) -> dict[str, float]:
    """Every measurement that `cfg` names, of a model and the function that embeds texts for it."""
    lists = check_sets(cfg)
    flat: dict[str, float] = {}
    for eval_set in evaluation.open_sets("sets", cfg.sets, eval_transform(model), "classification", "retrieval"):
        batches = eval_set.batches(cfg.batch_size, cfg.workers, device)
        features, targets = image_features(model, batches, device, dtype)
        if eval_set.kind == "retrieval":
            say_shared(eval_set.name, targets)
            metrics = retrieval(features, targets, texts, True)
        else:
            classifier = name_classifier(texts, eval_set.classnames, eval_set.templates)
            metrics = zero_shot(features, targets, classifier)
        flat |= {f"{eval_set.name}/{key}": value for key, value in metrics.items()}
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
    if cfg.crossmodal:
        flat |= languages(model, texts, cfg, device, dtype)
    if cfg.probe:
        flat |= probe_metrics(model, cfg, device, dtype)
    return evaluation.without_nan(flat)


def multilingual_imagenet(
    model: nn.Module, texts: TextFeatures, named: dict[str, tuple], cfg: Config, device, dtype: torch.dtype
) -> dict[str, float]:
    """{"imagenet_LANGUAGE/METRIC": percent} of the five languages of `cfg.multilingual`, whose names are `named`."""
    folder, _, names = cfg.multilingual.rpartition(":")
    eval_set = open_set(folder, eval_transform(model), "classification")
    batches = eval_set.batches(cfg.batch_size, cfg.workers, device)
    features, labels = image_features(model, batches, device, dtype)
    flat = {}
    for language, (classes, templates) in named.items():
        if len(classes) != len(eval_set.classnames):
            raise UserError(f"{folder} has {len(eval_set.classnames)} classes, but {names} names {len(classes)}")
        metrics = zero_shot(features, labels, name_classifier(texts, classes, templates))
        flat |= {f"imagenet_{language}/{key}": value for key, value in metrics.items()}
    return flat


def compositional(
    model: nn.Module, texts: TextFeatures, name: str, sets: dict[str, list], cfg: Config, device, dtype: torch.dtype
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


def languages(model: nn.Module, texts: TextFeatures, cfg: Config, device, dtype: torch.dtype) -> dict[str, float]:
    """R@1 both ways on Crossmodal-3600 in each language, by an image's first caption, and their means."""
    view = eval_transform(model)
    pairs = {language: read_set(crossmodal3600, cfg.crossmodal, language) for language in LANGUAGES}
    files = list(dict.fromkeys(path for each in pairs.values() for path, _ in each))  # the same in all languages
    features = encode(model, (view(read_image(path)) for path in files), device, dtype, cfg.batch_size)
    row = {path: i for i, path in enumerate(files)}
    flat = {}
    for language, each in pairs.items():
        metrics = retrieval(features[[row[path] for path, _ in each]], [[text] for _, text in each], texts, False)
        flat |= {f"language_{language}/{way}": metrics[way] for way in BOTH_WAYS}
    return flat | {
        f"languages/{way}": sum(flat[f"language_{each}/{way}"] for each in pairs) / len(pairs) for way in BOTH_WAYS
    }


def probe_metrics(model: nn.Module, cfg: Config, device, dtype: torch.dtype) -> dict[str, float]:
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
    other = cfg.multilingual or cfg.compositional or cfg.long_sets or cfg.crossmodal or cfg.probe
    cfg = dataclasses.replace(cfg, sets=(evaluation.sets_of if other else evaluation.needed)(path, cfg.sets))
    imagenet = cfg.multilingual.rpartition(":")[0] if cfg.multilingual else None
    folders = [entry.partition(":")[2] for entry in (*cfg.long_sets, *cfg.compositional)]
    folders += [cfg.crossmodal] if cfg.crossmodal else []
    files = [file for folder in folders for file in Path(folder).rglob("*") if file.is_file()]
    config = Path(path) / "config.json"
    if bank := cfg.bank or (checkpoints.read_json(config).get("bank") if config.is_file() else None):
        files.append(Path(bank) / "index.json")
    measured = lambda _: evaluate_run(path, cfg, process)  # noqa: E731
    return evaluation.measured_run(path, cfg, (*cfg.sets, imagenet, cfg.probe), measured, files)


def main(cfg: Config) -> list[dict[str, float]]:
    """Measure every run. Returns the measurements of each."""
    process = run.setup(0, cfg.device)
    check_limits(cfg)
    kinds = "run folder or checkpoint file"
    return evaluation.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), METRICS, kinds, foreign=True)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
