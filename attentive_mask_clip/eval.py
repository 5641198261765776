"""Evaluate A-CLIP, SLIP and CLIP: `python -m attentive_mask_clip.eval RUN_OR_CHECKPOINT...`.

The paper's evaluations (authors' code microsoft/A-CLIP@0e51942, cited as `U:`): zero-shot classification with each
set's own metric, zero-shot retrieval, linear probe; and for emoji and scenes, foreground among kept patches. A-CLIP is
evaluated with its EMA towers, as in upstream's suite; metrics of the online towers are `online/...`.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import open_clip
import torch
import torch.nn.functional as F
import tyro
from sklearn.metrics import roc_auc_score
from torch import Tensor

from attentive_mask_clip import suite
from attentive_mask_clip.config import Config as TrainConfig
from attentive_mask_clip.crops import eval_transform
from attentive_mask_clip.export import export_model
from attentive_mask_clip.kept import images_and_objects, kept_foreground, plot_kept
from attentive_mask_clip.model import ACLIP, CLIP, Towers, create_model, load_checkpoint
from shared import checkpoints, cli, evaluation, export, run
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.probes import sgd_probe
from shared.settings import Count, Rate, Whole, check_limits
from shared.zeroshot import (
    classification_metrics,
    encode_texts,
    extract_image_features,
    mean_prompts,
    owners,
    retrieval_metrics,
    say_shared,
)

METRICS = {  # printed metrics and their headings
    "names_ood/top1": "names OOD",
    "online/names_ood/top1": "names OOD, online",
    "names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    "retrieval_ood/image_to_text_R@1": "I2T R@1 OOD",
    "retrieval_ood/text_to_image_R@1": "T2I R@1 OOD",
    "subgroups_ood/probe_final": "probe OOD",
    "kept/attentive_share": "kept foreground",
    "kept/high_drop_share": "... high drop",
    "kept/centre_share": "... centre",
    "kept/random_share": "... random",
    "seconds": "seconds",
}


@dataclasses.dataclass
class Config:
    """Evaluate runs; prints the numbers and writes all of them to RUN/results.json and RUN/results.md."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, checkpoint files in them such as checkpoint-best.pt, or the authors' (A-CLIP's, SLIP's)."""
    method: Literal["aclip", "slip", "clip"] = "aclip"
    """For the authors' checkpoint files."""
    model: str = "vit_b16"
    """vit_s16, vit_b16 or vit_l16, for the authors' checkpoint files."""
    sets: tuple[str, ...] = ()
    """Evaluation sets in the CLIP-benchmark webdataset layout, for classification or retrieval; by default the run's
    eval_set, or the pictures held out from its training data."""
    prompts: Literal["set", "slip"] = "set"
    """Class names and templates of classification sets. set: the set's own. slip: those of the paper's 26 sets."""
    slip: str | None = None
    """Clone of facebookresearch/SLIP, whose labels.json and templates.json --prompts slip reads."""
    probe: str | None = None
    """Set with a train/ split for the linear probe on frozen features of the online tower; None skips it."""
    probe_lr: Rate | None = 0.1
    """First learning rate of the probe; None: upstream's 0.00625."""
    foreground: str | None = None
    """Set of images on which the share of foreground among kept patches is measured; None skips it."""
    keep_ratio: float = 0.5
    """Share of blocks to keep for `foreground`."""
    export: str | None = None
    """Write the run as a folder that open_clip loads as `local-dir:DIR` (shared/export.py), without evaluating it."""
    times: str | None = None
    """Step times from `python -m studies.attentive_mask_clip_timing --out`, for the report."""
    batch_size: Count = 256
    """Images or captions per forward pass."""
    workers: Whole = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Autocast of the encoders, as in training."""


# ------------------------------------------------------------------------------------------------- zero-shot metrics


def roc_auc(logits: Tensor, targets: Tensor) -> float:
    """Area under the ROC curve of logit 1 - logit 0, in percent; logits (N, 2), targets 0/1. U:eval_zeroshot.py:190."""
    return 100 * float(roc_auc_score(targets.numpy(), (logits[:, 1] - logits[:, 0]).double().numpy()))


def paper_metric(name: str, metrics: dict[str, float]) -> float:
    """The metric that the paper's suite reports for a set (see `suite.reported`), in percent; NaN if not measured."""
    return metrics.get(suite.reported(name), math.nan)


def zero_shot(
    model: CLIP,
    dataset: Iterable[tuple[Tensor, Tensor]],
    class_prompts: Sequence[Tensor],
    ema: bool = True,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    name: str = "",
) -> dict:
    """Zero-shot classification in percent. U:eval_zeroshot.py:112.

    dataset yields (images, labels); class_prompts has the token ids (P_c, T) of all prompts of class c, which are
    synonyms x templates. -> top1, top5 and top1_top5 (NaN with fewer than five classes), mean_per_class, roc_auc (of
    two classes), logits (N, C) as cosines, and `metric`, the paper's choice for the set called `name`.
    """
    was_training = model.training
    model.eval()
    towers = Towers(model, ema)
    tokens = torch.cat(list(class_prompts))
    counts = torch.tensor([len(prompts) for prompts in class_prompts])
    if not len(counts) or counts.min() == 0:
        raise UserError("every class needs at least one prompt")
    encoded = encode_texts(
        towers.encode_text, lambda rows: torch.stack(rows), list(tokens), batch_size, device, precision, "prompts"
    )
    classifier = mean_prompts(encoded, counts)
    features, labels = extract_image_features(towers.encode_image, dataset, device, precision, name or None)
    model.train(was_training)
    logits = F.normalize(features, dim=-1) @ classifier
    metrics = classification_metrics(logits, labels)
    metrics["top1_top5"] = (metrics["top1"] + metrics["top5"]) / 2
    if logits.shape[1] == 2 and len(labels.unique()) == 2:
        metrics["roc_auc"] = roc_auc(logits, labels)
    return metrics | {"metric": paper_metric(name, metrics), "logits": logits}


def class_prompts(tokenizer, classnames: Sequence[str | Sequence[str]], templates: Sequence[str]) -> list[Tensor]:
    """Token ids (P_c, T) of each class. A class may have several names; `{c}` in a template is replaced by a name."""
    names = [[entry] if isinstance(entry, str) else list(entry) for entry in classnames]
    return [tokenizer([t.replace("{c}", name) for name in synonyms for t in templates]) for synonyms in names]


def retrieval(
    model: CLIP,
    pairs: Iterable[tuple[Tensor, list[list[str]]]],
    ema: bool = True,
    tokenizer=None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    name: str = "images",
) -> dict[str, float]:
    """R@1/5/10 in both directions, in percent; pairs yields (images, list of captions of each image).

    Image to text is a hit if any of the image's captions is in the top k; text to image, if the image is. `name` of the
    set is for what is printed.
    """
    was_training = model.training
    model.eval()
    towers = Towers(model, ema)
    tokenizer = tokenizer or open_clip.SimpleTokenizer(context_length=model.context_length)
    features, captions = extract_image_features(towers.encode_image, pairs, device, precision, name)
    say_shared(name, captions)
    texts = [caption for of_image in captions for caption in of_image]
    encoded = encode_texts(towers.encode_text, tokenizer, texts, batch_size, device, precision, "captions")
    model.train(was_training)
    return retrieval_metrics(features, encoded, owners(captions))


# ------------------------------------------------------------------------------------------------------ linear probe


def linear_probe_lr(base_lr: float, batch: int, world: int, epoch: int, epochs: int) -> float:
    """An epoch's rate: base_lr * int(batch / world) / 256, along half a cosine to 0. U:main_linear.py:132,432.

    `batch` is that of one GPU; it is divided by the number of GPUs once more, as in the release (0.1, 128, 8 give
    0.00625).
    """
    return base_lr * int(batch / world) / 256 * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def linear_probe(
    model: CLIP,
    dataset: tuple[Iterable, Iterable],
    epochs: int = 90,
    lr: float | None = None,
    batch_size: int = 1024,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Top-1 (percent) of a linear head on frozen [CLS] features of the *online* tower. U:main_linear.py:118-149.

    dataset is (training batches, test batches) of (images, labels). The head starts at N(0, 0.01); SGD, momentum 0.9,
    no weight decay, 90 epochs; lr starts at linear_probe_lr(0.1, 128, 8, 0, ...) = 0.00625 unless given. Features are
    computed once per image, so that training images should come in the evaluation transform (upstream augments them).
    """
    was_training = model.training
    model.eval()
    (train_x, train_y), (test_x, test_y) = (
        extract_image_features(
            lambda images: model.visual(images, cls_only=True)[0][:, 0], loader, device, precision, "probe"
        )
        for loader in dataset
    )
    model.train(was_training)
    lr = linear_probe_lr(0.1, 128, 8, 0, epochs) if lr is None else lr
    probe = sgd_probe(
        train_x, train_y, test_x, test_y, epochs=epochs, lr=lr, weight_decay=0.0, batch_size=batch_size, shuffle=True
    )
    return {"best": probe.best, "final": probe.final}


# ------------------------------------------------------------------------------------------------- loading runs


def load_model(path: str | Path, method: str = "aclip", preset: str = "vit_b16") -> CLIP:
    """Model in eval mode from a run folder, from our checkpoint file, or from the authors' (`method`, `preset`).

    UserError if a weight is not finite.
    """
    path = Path(path)
    state = checkpoints.load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no weights")
    model = untrained(state, path) if path.is_dir() or "config" in state else create_model(method, preset)
    load_checkpoint(model, state)
    if odd := next((name for name, value in model.state_dict().items() if not value.isfinite().all()), None):
        raise UserError(f"{path} holds {odd} with numbers that are not finite: its training had diverged")
    return model.eval()


def untrained(state: dict, path: str | Path) -> CLIP:
    """A run's model before training, in eval mode; its settings come from the checkpoint `state` in folder `path`."""
    cfg = checkpoints.config_in(state, TrainConfig, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return create_model(cfg.method, cfg.model, **cfg.model_settings()).eval()


# ---------------------------------------------------------------------------------------------------- one checkpoint


def evaluate_run(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """All metrics of one checkpoint: {"names_ood/top1": ..., "online/names_ood/top1": ..., ...}.

    All sets are opened first. UserError if one is of a wrong kind, if two have the same name, or if the masks of
    --foreground do not fit.
    """
    model = load_model(path, cfg.method, cfg.model).to(process.device)
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    dtype = run.DTYPES[run.resolve_precision(cfg.precision, process.device)]
    transform = eval_transform(model.image_size)
    sets = evaluation.open_sets("sets", cfg.sets, transform, "classification", "retrieval")
    resize = eval_transform(model.image_size, round(model.image_size * 8 / 7))
    probe = [
        evaluation.open_sets("probe", (cfg.probe,), resize, "classification", split=split)[0]
        for split in (("train", "test") if cfg.probe else ())
    ]
    shown = images_and_objects(cfg.foreground, model, cfg.batch_size) if cfg.foreground else None
    labelled = [eval_set for eval_set in sets if eval_set.kind == "classification"]
    prompts = suite.read_prompts(cfg.slip, labelled) if cfg.prompts == "slip" else {}
    common = tokenizer, cfg, process.device, dtype
    flat = evaluate_sets(model, sets, prompts, True, *common)
    online = evaluate_sets(model, sets, prompts, False, *common) if isinstance(model, ACLIP) else flat
    flat |= {f"online/{key}": value for key, value in online.items()}
    if probe:
        loaders = tuple(each.batches(cfg.batch_size, cfg.workers, process.device) for each in probe)
        for name, value in linear_probe(
            model, loaders, lr=cfg.probe_lr, device=process.device, precision=dtype
        ).items():
            flat[f"{Path(cfg.probe).name}/probe_{name}"] = value
    if shown:
        images, alpha = (tensor.to(process.device) for tensor in shown)
        flat |= {f"kept/{key}": value for key, value in evaluate_kept(path, model, images, alpha, cfg).items()}
    return evaluation.without_nan(flat)


def evaluate_sets(
    model: CLIP,
    sets: Sequence[EvalSet],
    prompts: dict[str, suite.Prompts],
    ema: bool,
    tokenizer,
    cfg: Config,
    device: torch.device,
    precision: torch.dtype,
) -> dict[str, float]:
    """{"SET/METRIC": ...} of all sets and their averages, with A-CLIP's EMA or online towers.

    `prompts` replace a set's own class names and templates, by its name.
    """
    found: dict[str, float] = {}
    reported: dict[str, float] = {}
    for eval_set in sets:
        name, loader = eval_set.name, eval_set.batches(cfg.batch_size, cfg.workers, device)
        if eval_set.kind == "retrieval":
            metrics = retrieval(model, loader, ema, tokenizer, cfg.batch_size, device, precision, name)
        else:
            classnames, templates = prompts.get(name, (eval_set.classnames, eval_set.templates))
            tokens = class_prompts(tokenizer, classnames, templates)
            label = suite.suite_name(name) or name
            metrics = zero_shot(model, loader, tokens, ema, cfg.batch_size, device, precision, label)
            del metrics["logits"]
            reported[name] = metrics["metric"]
        found |= {f"{name}/{key}": value for key, value in metrics.items()}
    return found | suite.averages(reported, cfg.prompts)


def evaluate_kept(path: str, model: CLIP, images: Tensor, alpha: Tensor, cfg: Config) -> dict[str, float]:
    """`kept_foreground` of a checkpoint. For a run folder also of the untrained model; then writes kept.png, too."""
    kept = kept_foreground(model, images, alpha, cfg.keep_ratio)
    if Path(path).is_dir():
        before = untrained(checkpoints.load_checkpoint(Path(path) / "checkpoint.pt"), path).to(images.device)
        kept_before = kept_foreground(before, images, alpha, cfg.keep_ratio)
        kept |= {f"untrained_{key}": kept_before[f"attentive_{key}"] for key in ("share", "pixels")}
        few = images[torch.linspace(0, len(images) - 1, 8).long()]
        plot_kept(before.cpu(), model.cpu(), few.cpu(), Path(path) / "kept.png", cfg.keep_ratio)
    return kept


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`evaluate_run`, stored beside the checkpoint in results.json and results.md; not repeated if nothing changed."""
    other = cfg.probe or cfg.foreground
    cfg = dataclasses.replace(cfg, sets=(evaluation.sets_of if other else evaluation.needed)(path, cfg.sets))
    sets = (*cfg.sets, cfg.probe, cfg.foreground)
    files = [Path(cfg.slip) / name for name in suite.FILES] if cfg.prompts == "slip" else []
    return evaluation.measured_run(path, cfg, sets, lambda _: evaluate_run(path, cfg, process), files)


def main(cfg: Config) -> list[dict] | None:
    """Evaluate every run. Returns the metrics of each run, and under "step_times" the content of `--times`; None after
    `--export`."""
    process = run.setup(0, cfg.device)
    if (cfg.prompts == "slip") != (cfg.slip is not None):
        raise UserError("--prompts slip and --slip PATH, a clone of facebookresearch/SLIP, must be passed together")
    check_limits(cfg)
    if not 0 < cfg.keep_ratio <= 1:
        raise UserError(f"--keep-ratio must be above 0 and at most 1, not {cfg.keep_ratio}")
    if cfg.export:
        return export_model(load_model(export.single(cfg), cfg.method, cfg.model), cfg.export)
    times = {"step_times": checkpoints.read_json(cfg.times)} if cfg.times else {}
    kinds = "run folder or checkpoint file"
    results = evaluation.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), METRICS, kinds)
    if cfg.prompts == "slip":
        for path, measured in zip(cfg.runs, results, strict=True):
            if rows := suite.rows(measured):
                print(f"\n{path}, with SLIP's prompts:\n\n{evaluation.table(rows)}")
    results = [measured | times for measured in results]
    return results


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
