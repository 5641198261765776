"""Train A-CLIP, or the paper's baselines SLIP and CLIP: `python -m attentive_mask_clip.train PRESET [--overrides]`.

Attentive Mask CLIP (arXiv 2212.08653); authors' code microsoft/A-CLIP@0e51942, cited as `U:`.
A training step (`train_step`) sets the learning rate, lets the EMA towers follow, masks the views by the EMA's scores
(inside the model's forward pass), takes the losses of losses.py, steps AdamW and clamps the temperature.
Settings are in config.py, boxes and augmentations in views.py.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import open_clip
import torch
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attentive_mask_clip.config import PRESETS, Config, check, check_model
from attentive_mask_clip.losses import aclip_loss, baseline_loss
from attentive_mask_clip.model import ACLIP, CLIP, create_model
from attentive_mask_clip.views import (  # noqa: F401
    ViewDataset,
    collate,
    eval_transform,
    three_crops,
    view_transform,
)
from shared import checkpoints, cli, data, run
from shared.zeroshot import quick_top1

# -------------------------------------------------------------------------------------------- schedules and optimizer


def cosine_schedule(
    base: float, final: float, steps: int, warmup_steps: int = 0, warmup_start: float = 0.0
) -> np.ndarray:
    """(steps,) float64: linear from warmup_start to base, both included, then half a cosine to final. U:utils.py:249"""
    warmup = np.linspace(warmup_start, base, warmup_steps)
    rest = steps - warmup_steps
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(rest) / max(rest, 1)))
    return np.concatenate([warmup, cosine])


def schedules(cfg: Config, per_epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Learning rate and EMA momentum of every step. U:main.py:240-243."""
    steps = per_epoch * cfg.epochs
    warmup = min(round(cfg.warmup_epochs * per_epoch), steps)
    return (
        cosine_schedule(cfg.lr, cfg.min_lr, steps, warmup, cfg.warmup_lr),
        cosine_schedule(cfg.ema_momentum, 1.0, steps),
    )


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decayed and other parameters; frozen ones and EMA copies are in neither. U:main.py:110.

    No decay for vectors and scalars and for names with "bias", "ln" or "bn". Embeddings, [CLS] and projections decay.
    """
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or any(part in name for part in ("bias", "ln", "bn"))
            (others if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


# ---------------------------------------------------------------------------------------------------------- one step


def forward_losses(model: nn.Module, images: list[Tensor], boxes: Tensor, tokens: Tensor, cfg: Config) -> dict:
    """Forward pass and losses of one micro-batch; `images` are the views as `ViewDataset` orders them."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    precision = run.resolve_precision(cfg.precision, tokens.device)
    with run.autocast(precision, tokens.device):
        if isinstance(bare, ACLIP):
            views = torch.cat(images[: cfg.views])
            outputs = model(views, images[cfg.views] if bare.needs_ema_view else None, tokens, boxes)
        else:
            outputs = model(images[0], tokens, *images[1:])
    if isinstance(bare, ACLIP):
        return aclip_loss(outputs, cfg.simclr_weight, cfg.byol_weight, cfg.temperature, cfg.simclr_pair)
    return baseline_loss(outputs, cfg.temperature, cfg.simclr_weight)


def train_step(
    model: nn.Module,
    batch: tuple[list[Tensor], Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    lr: float,
    momentum: float,
    cfg: Config,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """One optimizer step on (images, boxes, tokens); the losses, averaged over micro-batches. U:main.py:307-346."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    for group in optimizer.param_groups:
        group["lr"] = float(lr)  # a NumPy number would not load with weights_only
    if isinstance(bare, ACLIP):
        bare.update_ema(momentum)  # before the forward pass, and once a step whatever the number of micro-batches
    optimizer.zero_grad()
    images, boxes, tokens = batch
    total: dict[str, Tensor] = {}
    for part in range(cfg.accumulate):
        rows = slice(part * len(tokens) // cfg.accumulate, (part + 1) * len(tokens) // cfg.accumulate)
        losses = forward_losses(model, [view[rows] for view in images], boxes[rows], tokens[rows], cfg)
        loss = losses["loss"] / cfg.accumulate
        (loss if scaler is None else scaler.scale(loss)).backward()
        for name, value in losses.items():
            total[name] = total.get(name, 0.0) + value.detach() / cfg.accumulate
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    bare.clamp_logit_scale()
    return total


# -------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print what a run would be: parameters, tokens, steps, learning rates, momenta, memory of the training step."""
    check_model(cfg)
    model = create_model(cfg.method, cfg.model, **cfg.model_settings())
    n = cfg.dataset_size
    if n is None:
        n = len(data.open_pairs(cfg.data, strict=cfg.strict, cache=Path(cfg.cache))) if cfg.data else 0
    per_epoch = n // cfg.batch_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    size, grid = model.image_size, model.image_size // model.patch_size
    print(f"parameters         {trained:,} trained, {frozen:,} frozen or EMA")
    print(f"samples            {n:,} an epoch, {n * cfg.epochs:,} in {cfg.epochs} epochs")
    print(f"batch              {cfg.batch_size} ({cfg.batch_size // world_size} in each of {world_size} processes)")
    print(f"steps              {per_epoch * cfg.epochs:,} ({per_epoch:,} an epoch)")
    lrs, momenta = schedules(cfg, per_epoch)
    last = len(lrs) - 1
    for step in sorted({0, min(round(cfg.warmup_epochs * per_epoch), last), last // 2, last}) if len(lrs) else ():
        ema = f", EMA momentum {momenta[step]:.6f}" if cfg.method == "aclip" else ""
        print(f"learning rate      {lrs[step]:.3e}{ema}, at step {step:,}")
    images = [torch.zeros(2, 3, size, size)] * {"aclip": cfg.views, "slip": 3, "clip": 1}[cfg.method]
    boxes = torch.tensor([[[0, 0, size, size]] * (cfg.views + 1)] * 2)
    if isinstance(model, ACLIP) and model.needs_ema_view:
        side = cfg.ema_image_size or size
        images.append(torch.zeros(2, 3, side, side))
    tokens = torch.ones(2, model.context_length, dtype=torch.long)
    fp32 = dataclasses.replace(cfg, precision="fp32")
    activations = cli.activation_bytes(lambda: forward_losses(model, images, boxes, tokens, fp32))
    gib = 2**30
    activations = activations / 2 * cfg.batch_size / world_size / cfg.accumulate / gib
    weights = (16 * trained + 4 * frozen) / gib
    kept = ""
    if isinstance(model, ACLIP) and cfg.mask != "none":
        noise = torch.zeros(1, grid * grid)
        kept = model.keep_ids(noise, boxes[:1, -2:], noise).shape[1]
        kept = f", {kept} kept in each of {cfg.views} views"
    print(f"patches            {grid * grid}{kept}")
    print(
        f"memory estimate    {weights + activations:.1f} GiB a process in fp32 (autocast: up to half the activations):"
    )
    print(f"                   {weights:.1f} weights, gradients, AdamW, EMA; {activations:.1f} activations")


def main(cfg: Config) -> Path | None:
    """Train to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check(cfg, process.world_size)
    return train(cfg, process)


def train(cfg: Config, process: run.Process | None = None) -> Path:
    """The training loop; `main` is its command line."""
    process = process or run.setup(cfg.seed, cfg.device)
    precision = run.resolve_precision(cfg.precision, process.device)
    folder = Path(cfg.out)

    # Model, tokenizer, optimizer
    model: CLIP = create_model(cfg.method, cfg.model, **cfg.model_settings()).to(process.device)
    tokenizer = data.RememberingTokenizer(open_clip.SimpleTokenizer(context_length=model.context_length))
    betas = (cfg.beta1, cfg.beta2)
    optimizer = torch.optim.AdamW(
        param_groups(model, cfg.weight_decay), lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True
    )
    scaler = torch.amp.GradScaler(process.device.type) if precision == "fp16" else None

    # Resume
    state = checkpoints.resume(folder, cfg) or {"epoch": 0, "batch": 0, "seconds": 0.0}
    if "state_dict" in state:
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
    if state["epoch"] >= cfg.epochs:
        if process.main:
            print(f"{folder} is finished ({cfg.epochs} epochs); nothing to do")
        return folder

    # Data
    pairs = data.open_pairs(cfg.data, cfg.dataset_size, cfg.strict, Path(cfg.cache))
    data.check_pairs(pairs, cfg, state, process)
    per_epoch = len(pairs) // cfg.batch_size
    lrs, momenta = schedules(cfg, per_epoch)
    ema_view = isinstance(model, ACLIP) and model.needs_ema_view

    saved = per_epoch * state["epoch"] + state["batch"]  # step of the last checkpoint
    log = run.RunLog(folder, cfg, process, step=saved)
    ddp = DistributedDataParallel(model) if process.world_size > 1 else model
    clock, commit = run.Stopwatch(state["seconds"]), run.commit()

    def save(epoch: int, batch: int) -> None:
        if process.main:
            checkpoints.save_checkpoint(
                folder / "checkpoint.pt",
                {
                    "epoch": epoch,
                    "batch": batch,
                    "state_dict": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    **({"scaler": scaler.state_dict()} if scaler is not None else {}),
                    "seconds": clock.read(),
                    "commit": commit,
                    "data": pairs.fingerprint,
                    "config": dataclasses.asdict(cfg),
                },
            )

    for epoch in range(state["epoch"], cfg.epochs):
        model.train()
        start = state["batch"] if epoch == state["epoch"] else 0
        broken = list(pairs.broken)
        dataset = ViewDataset(pairs, cfg, model.image_size, tokenizer, (cfg.seed, epoch), ema_view)
        label = f"{folder.name} epoch {epoch + 1}/{cfg.epochs}"
        loader = data.epoch_loader(dataset, collate, cfg, process, dataset.seed, start)
        batches = run.progress(loader, per_epoch - start, label, cfg.batch_size, process)
        for batch, (images, boxes, tokens, _) in enumerate(data.watch(batches, broken), start + 1):
            step = per_epoch * epoch + batch  # from 1
            torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # of random masks: resume agrees
            images = [view.to(process.device, non_blocking=True) for view in images]
            boxes, tokens = (x.to(process.device, non_blocking=True) for x in (boxes, tokens))
            losses = train_step(ddp, (images, boxes, tokens), optimizer, lrs[step - 1], momenta[step - 1], cfg, scaler)
            if step % cfg.log_every == 0 or batch == 1:
                scale, losses = model.logit_scale.exp(), run.over_ranks(losses)
                log.write(step, epoch=epoch, seconds=clock.read(), lr=lrs[step - 1], logit_scale=scale, **losses)
                run.check_loss(losses["loss"], step)
            if step - saved >= cfg.save_every and batch < per_epoch and math.isfinite(losses["loss"]):
                save(epoch, batch)
                saved = step

        if cfg.eval_every and ((epoch + 1) % cfg.eval_every == 0 or epoch + 1 == cfg.epochs) and process.main:
            with clock.paused():
                transform = eval_transform(model.image_size)
                top1 = quick_top1(model, tokenizer, transform, cfg.eval_set, process.device, run.DTYPES[precision])
            log.write(per_epoch * (epoch + 1), epoch=epoch, seconds=clock.read(), zero_shot_top1=top1)
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if per_epoch * (epoch + 1) - saved >= cfg.save_every or epoch + 1 == cfg.epochs:
            save(epoch + 1, 0)
            saved = per_epoch * (epoch + 1)
    log.close()
    return folder


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.extras.overridable_config_cli(PRESETS)))
