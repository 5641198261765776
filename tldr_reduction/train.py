"""Pre-train on the full or the reduced data: `python -m tldr_reduction.train PRESET [--overrides]`.

TL;DR (arXiv 2305.20087), section 4: pre-training on full or reduced data. The models are stock BLIP and CLIP; a BLIP
also scores image-text matching. The paper's own stages are captioner.py, finetune.py and reduce.py; retrieval.py
fine-tunes a BLIP that was trained here. Authors' code showlab/datacentric.vlp@a488102, BLIP's salesforce/BLIP@056a169.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import accumulate, cli, data, run, windows
from shared.clip import trimmed
from shared.zeroshot import quick_top1
from tldr_reduction import training
from tldr_reduction.config import PRESETS, Config, for_steps, total_steps
from tldr_reduction.datasets import LockedPairs, PairDataset, view_of
from tldr_reduction.model import build, build_for, image_side
from tldr_reduction.tokenizer import eval_tokenizer, tokenizer_of
from tldr_reduction.training import alpha_ramp, cosine_lr, warmup_step_lr  # noqa: F401  of this file's contract

# --------------------------------------------------------------------------------------------------------------- losses


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE, a scalar: this rank's unit features (B, D) against those of all ranks, in fp32."""
    image, text, scale = image_features.float(), text_features.float(), logit_scale.float()
    labels = run.own_columns(image)
    to_text, to_image = scale * image @ run.gather(text).T, scale * text @ run.gather(image).T
    return (F.cross_entropy(to_text, labels) + F.cross_entropy(to_image, labels)) / 2


def losses_of(
    model: nn.Module, batch: Sequence[Tensor], cfg: Config, alpha: float = 0.0, precision: str = "fp32"
) -> tuple[dict[str, Tensor], Callable]:
    """Compute the losses of a batch (images, ids, mask and, for a blip, `target_places`).

    Returns a dict of the losses by name, with their sum as "loss", and the function that runs the backward pass.
    """
    images, ids, mask, places = (*batch, None)[:4]
    if cfg.objective == "clip":
        features, backward = accumulate.forward(model, (images, ids), cfg, precision)
        loss = clip_loss(*features)
        return {"loss": loss, "loss_ita": loss}, backward
    with run.autocast(precision, images.device):
        found = model(images, ids, mask, alpha, places=places)
    losses = dict(zip(("loss_ita", "loss_itm", "loss_lm"), found, strict=True))
    return {"loss": sum(losses.values()), **losses}, Tensor.backward


# ----------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print the plan of a run: sizes, steps, learning rates, memory."""
    model = build(cfg, training.vocab_size(cfg))
    clip = cfg.objective == "clip"
    batch = training.two_samples(image_side(model, cfg), model.context_length if clip else cfg.max_length)
    if cfg.lock_image:
        batch = torch.zeros(2, model.visual.trunk.num_features), *batch[1:]
    whole = dataclasses.replace(cfg, accumulate=1)
    training.show_plan(cfg, world_size, model, lambda: losses_of(model.train(), batch, whole, 0.4))


def on_device(
    inputs: list[Tensor], dataset: PairDataset, model: nn.Module, cfg: Config, device: torch.device
) -> list[Tensor]:
    """Move a batch to the device and normalise its images: images, ids, mask and, for a blip, `target_places`.

    A clip's ids are cut to the longest caption of the batch.
    """
    if cfg.objective == "blip":
        return training.on_device(inputs, dataset, device)
    images, ids, mask = inputs
    images, ids, mask = (x.to(device, non_blocking=True) for x in (images, trimmed(ids, model, device), mask))
    return [dataset.normalise(images), ids, mask]


def evaluates(cfg: Config, epoch: int) -> bool:
    """Whether there is a zero-shot evaluation after `epoch`, counted from 0."""
    return cfg.eval_every > 0 and ((epoch + 1) % cfg.eval_every == 0 or epoch + 1 == cfg.epochs)


def zero_shot(model: nn.Module, tokenizer, cfg: Config, device: torch.device, precision: str) -> float:
    """Zero-shot top-1 in percent on `eval_set`."""
    view, tokens, dtype = view_of(model, cfg), eval_tokenizer(tokenizer, cfg), run.DTYPES[precision]
    return quick_top1(model, tokens, view, cfg.eval_set, device, dtype, windows.evaluation_workers(cfg))


def train(cfg: Config, process: run.Process) -> Path:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    if cfg.steps is not None:
        cfg = for_steps(cfg, len(training.pairs_of(cfg, process)) // cfg.batch_size)
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first, start = folder.state["epoch"], folder.state["batch"]
    pairs = training.pairs_of(cfg, process)
    data.check_pairs(pairs, cfg, folder.state, process)
    per_epoch = len(pairs) // cfg.batch_size

    # Tokenizer, model, optimizer
    precision, tokenizer = run.resolve_precision(cfg.precision, process.device), tokenizer_of(cfg)
    model = build_for(cfg, tokenizer).to(process.device)
    optimizer, scaler = training.optimizer_of(model, cfg, precision, process)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if not folder.resumed:
        training.start_from_elsewhere(model, cfg)
    total = total_steps(cfg, per_epoch)
    fixed = dict(data=pairs.fingerprint, vocab=training.vocab_of(tokenizer, cfg, folder))
    folder.start(min(per_epoch * first + start, total), total, len(pairs), **fixed)
    ddp = training.parallel(model, process)
    locked = functools.partial(LockedPairs, cache=cfg.cache)
    read = dict(dataset_type=locked, view=view_of(model, cfg)) if cfg.lock_image else {}
    dataset, loader = training.training_batches(pairs, tokenizer, model, first, start, cfg, process, **read)

    for epoch in range(first, cfg.epochs):
        model.train()
        batches, broken = training.of_epoch(loader, pairs, epoch, start, cfg, process)
        for batch, (_, *inputs, _) in enumerate(batches, start):
            step, lr = per_epoch * epoch + batch + 1, training.learning_rate(cfg, epoch, batch)
            training.begin_step(optimizer, lr, step, cfg, process)
            inputs = on_device(inputs, dataset, model, cfg, process.device)
            losses, backward = losses_of(ddp, inputs, cfg, alpha_ramp(epoch, batch, per_epoch, cfg.alpha), precision)
            training.update(losses["loss"], optimizer, scaler, backward)
            if cfg.objective == "clip":
                model.logit_scale.data.clamp_(0, math.log(100))
            if step % cfg.log_every == 0 or batch == 0:
                scale = model.logit_scale.exp() if cfg.objective == "clip" else 1 / model.temp
                folder.log(step, epoch=epoch, lr=lr, logit_scale=scale, **run.over_ranks(losses))
            if step == total:
                break
            if folder.due(step) and batch + 1 < per_epoch:
                folder.save(step, epoch=epoch, batch=batch + 1)

        done, last, start = min(per_epoch * (epoch + 1), total), epoch + 1 == cfg.epochs, 0
        if process.main and evaluates(cfg, epoch):
            with folder.evaluation(done, epoch=epoch, batch=per_epoch):
                top1 = zero_shot(model, tokenizer, cfg, process.device, precision)
            folder.log(done, epoch=epoch, zero_shot_top1=top1)
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if folder.due(done) or last:
            folder.save(done, epoch=epoch + 1, batch=0)
    if cfg.window_shards:
        loader.close()  # the last step may leave batches: this removes the shards of their window
    folder.close("--sets FOLDER --rerank")
    return folder.path


def main(cfg: Config) -> Path | None:
    """`train`, or --dry-run."""
    return training.main(cfg, train, dry_run)


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
