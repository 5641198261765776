"""Evaluate A-CLIP, SLIP and CLIP: `python -m attentive_mask_clip.eval RUN_OR_CHECKPOINT...`.

The paper's evaluations (authors' code microsoft/A-CLIP@0e51942, cited as `U:`): zero-shot classification with each
set's own metric, zero-shot retrieval, linear probe; and for emoji and scenes, foreground among kept patches. A-CLIP is
evaluated with its EMA towers, as in upstream's suite; metrics of the online towers are `online/...`.
"""

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from attentive_mask_clip import suite
from attentive_mask_clip.config import Config as TrainConfig
from attentive_mask_clip.crops import MEAN, STD, eval_transform
from attentive_mask_clip.model import (
    ACLIP,
    CLIP,
    PRESETS,
    Towers,
    attentive_keep_ids,
    create_model,
    load_checkpoint,
)
from shared import checkpoints, cli, evaluation, export, run
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.probes import sgd_probe
from shared.settings import Count, Rate, Whole, check_limits
from shared.tars import read_tar
from shared.zeroshot import (
    classification_metrics,
    encode_texts,
    extract_image_features,
    mean_prompts,
    owners,
    retrieval_metrics,
)

EMOJI = "data/emoji/eval/"
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
    sets: tuple[str, ...] = tuple(
        EMOJI + name
        for name in ("names_id", "names_ood", "subgroups_id", "subgroups_ood", "retrieval_id", "retrieval_ood")
    )
    """Evaluation sets in the CLIP-benchmark webdataset layout, for classification or retrieval."""
    prompts: Literal["set", "slip"] = "set"
    """Class names and templates of classification sets. set: the set's own. slip: those of the paper's 26 sets."""
    slip: str | None = None
    """Clone of facebookresearch/SLIP, whose labels.json and templates.json --prompts slip reads."""
    probe: str | None = EMOJI + "subgroups_ood"
    """Set with a train/ split for the linear probe on frozen features of the online tower; None skips it."""
    probe_lr: Rate | None = 0.1
    """First learning rate of the probe; None: upstream's 0.00625."""
    foreground: str | None = EMOJI + "names_ood"
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


def mean_per_class(logits: Tensor, targets: Tensor) -> float:
    """Mean accuracy over the classes that occur in targets (N,), in percent. U:eval_zeroshot.py:182."""
    return classification_metrics(logits, targets)["mean_per_class"]


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
) -> dict[str, float]:
    """R@1/5/10 in both directions, in percent; pairs yields (images, list of captions of each image).

    Image to text is a hit if any of the image's captions is in the top k; text to image, if the image is.
    """
    was_training = model.training
    model.eval()
    towers = Towers(model, ema)
    tokenizer = tokenizer or open_clip.SimpleTokenizer(context_length=model.context_length)
    features, captions = extract_image_features(towers.encode_image, pairs, device, precision, "images")
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


# ----------------------------------------------------------------------------------------------------- kept patches


def object_masks(eval_set: EvalSet) -> Tensor | None:
    """(N, S, S) 1 where a sample's `mask.png` marks an object (sets of scenes have it); None if a set has no masks.

    UserError if a mask cannot be read, or if masks differ in size.
    """
    masks = []
    for shard in eval_set.shards:
        for name, content in read_tar(shard, [], {"mask.png"}):
            try:
                mask = np.array(Image.open(io.BytesIO(content), formats=["PNG"]))
                masks.append(torch.from_numpy(mask != np.iinfo(mask.dtype).max))
            except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error ...
                raise UserError(f"{name} in {shard} is no mask: {checkpoints.one_line(error, 100)}") from error
            if mask.shape != masks[0].shape:
                raise UserError(f"{name} in {shard} is {mask.shape}, but other masks are {tuple(masks[0].shape)}")
    return torch.stack(masks).float() if masks else None


def pixel_values(images: Tensor) -> Tensor:
    """Normalised images (B, 3, S, S) -> values from 0 to 1."""
    mean, std = (torch.tensor(x, device=images.device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return images * std + mean


def foreground(images: Tensor) -> Tensor:
    """(B, S, S) 1 where a normalised image (B, 3, S, S) is not white: the drawing of an emoji."""
    return (pixel_values(images) < 0.98).any(dim=1).float()


@torch.no_grad()
def attention_scores(model: CLIP, images: Tensor) -> Tensor:
    """(B, N) scores of all patches of images (B, 3, S, S), by the tower that scores them in training; CLIP: its own."""
    tower = model.visual_ema if isinstance(model, ACLIP) else model.visual
    return torch.cat([tower(batch, return_scores=True)[1] for batch in images.split(256)])


def images_and_objects(folder: str, model: CLIP, batch_size: int) -> tuple[Tensor, Tensor]:
    """A set's images (N, 3, S, S) for the model, and (N, S, S) 1 where they show an object, by masks or `foreground`.

    UserError if the masks do not have the size of the images, or if blocks do not tile the model's patches.
    """
    eval_set, side = EvalSet(folder, eval_transform(model.image_size)), model.image_size // model.patch_size
    if side % model.block:
        raise UserError(
            f"--foreground {folder}: blocks of {model.block}x{model.block} patches do not tile this model's {side} "
            "patches a side; pass --foreground None"
        )
    images, masks = torch.cat([batch for batch, _ in eval_set.batches(batch_size)]), object_masks(eval_set)
    if masks is not None and masks.shape != images[:, 0].shape:
        raise UserError(
            f"--foreground {folder} has masks of shape {tuple(masks.shape)} for images of shape "
            f"{tuple(images[:, 0].shape)}: it must have a mask of the model's image size for each image"
        )
    return images, foreground(images) if masks is None else masks


@torch.no_grad()
def kept_foreground(model: CLIP, images: Tensor, alpha: Tensor, keep_ratio: float = 0.5) -> dict[str, float]:
    """Foreground among the patches that masking keeps, in percent.

    images (B, 3, S, S), alpha (B, S, S), above 0 on foreground; a patch is foreground if any of its pixels is. Returns
    three metrics for each selection X. `X_share`: share of kept patches that are foreground. `X_recall`: share of
    foreground patches that are kept. `X_pixels`: share of an image's foreground pixels that are kept, averaged over
    images. X: attentive (the model's own attention), high_drop (its low scores), centre (the blocks nearest to the
    centre) or random (expectation over random patches, as many as attentive keeps).
    """
    was_training, block = model.training, model.block
    model.eval()
    scores = attention_scores(model, images)
    model.train(was_training)
    pixels = F.avg_pool2d((alpha > 0).float()[:, None], model.patch_size).flatten(1)  # (B, N), share of each patch
    patches = (pixels > 0).float()
    grid = math.isqrt(patches.shape[1])
    axis = torch.arange(grid, device=images.device) - (grid - 1) / 2
    centre = -(axis[:, None] ** 2 + axis**2).flatten().expand(len(images), -1)
    kept = {
        "attentive": attentive_keep_ids(scores, keep_ratio, block),
        "high_drop": attentive_keep_ids(scores, keep_ratio, block, "high"),
        "centre": attentive_keep_ids(centre, keep_ratio, block),
    }
    total = patches.sum()
    results = {}
    for name, ids in kept.items():
        hits = patches.gather(1, ids).sum()
        results[f"{name}_share"] = 100 * (hits / ids.numel()).item()
        results[f"{name}_recall"] = 100 * (hits / total).item()
        results[f"{name}_pixels"] = 100 * (pixels.gather(1, ids).sum(1) / pixels.sum(1)).nanmean().item()
    count = kept["attentive"].shape[1]
    return results | {
        "random_share": 100 * patches.mean().item(),
        "random_recall": 100 * count / patches.shape[1],
        "random_pixels": 100 * count / patches.shape[1],
    }


def plot_kept(before: CLIP, after: CLIP, images: Tensor, path: Path, keep_ratio: float = 0.5) -> None:
    """Plot one row per image (B, 3, S, S): the image; patches kept by attention and by high-drop, each before and after
    training; random patches. Dropped patches are grey."""
    pixels, side = pixel_values(images).clamp(0, 1), images.shape[2] // after.patch_size
    noise = torch.rand(len(images), side**2, generator=torch.Generator().manual_seed(0))
    untrained, trained = (attention_scores(model, images) for model in (before, after))
    columns = {
        "image": None,
        "attentive,\nuntrained": attentive_keep_ids(untrained, keep_ratio, after.block),
        "attentive": attentive_keep_ids(trained, keep_ratio, after.block),
        "high drop,\nuntrained": attentive_keep_ids(untrained, keep_ratio, after.block, "high"),
        "high drop": attentive_keep_ids(trained, keep_ratio, after.block, "high"),
    }
    columns["random"] = noise.argsort(dim=1)[:, : columns["attentive"].shape[1]]
    figure, axes = plt.subplots(len(images), len(columns), figsize=(1.3 * len(columns), 1.3 * len(images) + 0.4))
    for j, (title, ids) in enumerate(columns.items()):
        shown = pixels
        if ids is not None:
            kept = torch.zeros_like(noise).scatter_(1, ids, 1.0)
            mask = F.interpolate(kept.view(-1, 1, side, side), scale_factor=after.patch_size)
            shown = pixels * mask + (0.25 * pixels + 0.55) * (1 - mask)
        for i, image in enumerate(shown):
            axes[i, j].imshow(image.permute(1, 2, 0).numpy())
            axes[i, j].axis("off")
        axes[0, j].set_title(title, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


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


# ------------------------------------------------------------------------------------------- export to open_clip

TIMM_TOWERS = {"vit_b16": "vit_base_patch16_224", "vit_l16": "vit_large_patch16_224"}  # our presets: timm's names


def open_clip_weights(model: CLIP) -> dict[str, Tensor]:
    """The evaluated towers with open_clip's key names: a timm image tower with a linear head, and CLIP's text tower."""
    ema = isinstance(model, ACLIP)
    visual, transformer = (model.visual_ema, model.transformer_e) if ema else (model.visual, model.transformer)
    image_projection, text_projection = (
        (model.image_projection_e, model.text_projection_e) if ema else (model.image_projection, model.text_projection)
    )
    return {
        **{f"visual.trunk.{name}": value for name, value in visual.state_dict().items()},
        "visual.head.proj.weight": image_projection.T,
        **{f"transformer.{name}": value for name, value in transformer.state_dict().items()},
        "token_embedding.weight": model.token_embedding.weight,
        "positional_embedding": model.positional_embedding,
        **{f"ln_final.{name}": value for name, value in model.ln_final.state_dict().items()},
        "text_projection": text_projection,
        "logit_scale": model.logit_scale,
    }


def export_model(model: CLIP, folder: str | Path) -> None:
    """Write the towers that evaluation uses as an open_clip model.

    timm knows the paper's ViT-B and ViT-L by name. For other shapes a config.json in the folder describes the tower.
    open_clip_config.json contains the folder's absolute path: change it there if you move the folder.
    """
    visual, text = model.visual, model.transformer
    shape = {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "embed_dim": visual.cls_token.shape[-1],
        "depth": len(visual.blocks),
        "num_heads": visual.blocks[0].attn.num_heads,
    }
    name = next((TIMM_TOWERS[preset] for preset in TIMM_TOWERS if same_shape(shape, PRESETS[preset])), None)
    if name is None:
        name = f"local-dir:{Path(folder).resolve()}"
        Path(folder).mkdir(parents=True, exist_ok=True)
        tower = {"architecture": "vit_base_patch16_224", "pretrained_cfg": {"num_classes": 0}, "model_args": shape}
        checkpoints.write_json(Path(folder) / "config.json", tower)
    width = model.token_embedding.embedding_dim
    config = {
        "embed_dim": model.image_projection.shape[1],
        "quick_gelu": True,  # of the text tower; timm's has GELU
        "vision_cfg": {"timm_model_name": name, "timm_pool": "token", "image_size": model.image_size},
        "text_cfg": {
            "context_length": model.context_length,
            "vocab_size": model.token_embedding.num_embeddings,
            "width": width,
            "heads": text.resblocks[0].attn.num_heads,
            "layers": len(text.resblocks),
        },
    }
    transform = eval_transform(model.image_size)
    bilinear = {"mean": MEAN, "std": STD, "interpolation": "bilinear"}
    export.write(folder, Towers(model), config, open_clip_weights(model), transform, **bilinear)


def same_shape(shape: dict, preset: dict) -> bool:
    """Whether a tower has the shape of the preset's timm model, at 224 pixels in patches of 16."""
    paper = [224, 16, *(preset[f"vision_{name}"] for name in ("width", "layers", "heads"))]
    return list(shape.values()) == paper


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
    return {name: value for name, value in flat.items() if not math.isnan(value)}


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
            metrics = retrieval(model, loader, ema, tokenizer, cfg.batch_size, device, precision)
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
    sets = (*cfg.sets, cfg.probe, cfg.foreground)
    files = [Path(cfg.slip) / name for name in suite.FILES] if cfg.prompts == "slip" else []
    return evaluation.measured_run(path, cfg, sets, lambda _: evaluate_run(path, cfg, process), files)


def main(cfg: Config) -> list[dict] | None:
    """Evaluate every run. Returns the metrics of each run, and under "step_times" the
    content of `--times`."""
    process = run.setup(0, cfg.device)
    if (cfg.prompts == "slip") != (cfg.slip is not None):
        raise UserError("--prompts slip and --slip PATH, a clone of facebookresearch/SLIP, must be passed together")
    check_limits(cfg)
    if not 0 < cfg.keep_ratio <= 1:
        raise UserError(f"--keep-ratio must be above 0 and at most 1, not {cfg.keep_ratio}")
    if not (cfg.sets or cfg.probe or cfg.foreground or cfg.export):
        raise UserError("nothing to evaluate: name --sets, --probe or --foreground")
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
