"""Train A-CLIP, or the paper's baselines SLIP and CLIP: `python -m attentive_mask_clip.train PRESET [--overrides]`.

Attentive Mask CLIP (arXiv 2212.08653); authors' code microsoft/A-CLIP@0e51942, cited as `U:`.
A training step (`train_step`) sets the learning rate, updates the EMA towers, masks the views by the EMA's scores
(inside the model's forward pass), computes the losses, steps AdamW and clamps the temperature.
Model and losses are in model.py, settings in config.py, boxes and augmentations in crops.py.
"""

import contextlib
import math
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attentive_mask_clip.config import PRESETS, Config, check, check_model
from attentive_mask_clip.crops import ViewDataset, collate, eval_transform, three_crops  # noqa: F401
from attentive_mask_clip.model import ACLIP, CLIP, Towers, aclip_loss, baseline_loss, create_model
from shared import cli, data, run, windows
from shared.clip import cut_padding, set_grad_checkpointing
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


TEXT_TOWER = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def param_groups(model: nn.Module, weight_decay: float, text_lr: float = 1.0) -> list[dict]:
    """Parameter groups with and without weight decay; frozen parameters and EMA copies are in neither. U:main.py:110.

    No decay for vectors and scalars and for names with "bias", "ln" or "bn". Embeddings, [CLS] and projections decay.
    With a `text_lr` other than 1 the text tower has two groups of its own. `lr_scale` of a group multiplies its rate.
    """
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for scale in dict.fromkeys((1.0, text_lr)):
        found |= {(scale, False): [], (scale, True): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or any(word in name for word in ("bias", "ln", "bn"))
            found[text_lr if name.startswith(TEXT_TOWER) else 1.0, plain].append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if plain else weight_decay, "lr_scale": scale}
        for (scale, plain), parameters in found.items()
    ]


# ---------------------------------------------------------------------------------------------------------- one step


def forward_losses(
    model: nn.Module, images: list[Tensor], boxes: Tensor, tokens: Tensor, cfg: Config, precision: str
) -> dict[str, Tensor]:
    """Forward pass and losses of one micro-batch; `images` are the views in the order of `ViewDataset`."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
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
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """Run one optimizer step on (images, boxes, tokens), with the forward pass in `precision`. U:main.py:307-346.

    Returns the losses by name, averaged over micro-batches. Without `scaler` the loss is not scaled.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    images, boxes, tokens = batch
    scaler = scaler or torch.amp.GradScaler(tokens.device.type, enabled=False)
    for group in optimizer.param_groups:
        group["lr"] = float(lr) * group.get("lr_scale", 1.0)  # a NumPy number would not load with weights_only
    if isinstance(bare, ACLIP):
        bare.update_ema(momentum)  # before the forward pass, once per step for any number of micro-batches
    optimizer.zero_grad()
    total: dict[str, Tensor] = {}
    size = len(tokens) // cfg.accumulate
    for i in range(cfg.accumulate):
        micro = slice(i * size, (i + 1) * size)
        alone = isinstance(model, DistributedDataParallel) and i + 1 < cfg.accumulate  # synchronise gradients once
        with model.no_sync() if alone else contextlib.nullcontext():
            views = [view[micro] for view in images]
            losses = forward_losses(model, views, boxes[micro], tokens[micro], cfg, precision)
            scaler.scale(losses["loss"] / cfg.accumulate).backward()
        for name, value in losses.items():
            total[name] = total.get(name, 0.0) + value.detach() / cfg.accumulate
    scaler.step(optimizer)
    scaler.update()
    bare.clamp_logit_scale()
    return total


# -------------------------------------------------------------------------------------------------------- the script


def zero_shot_top1(model: CLIP, tokenizer, cfg: Config, device: torch.device, precision: str) -> dict[str, float]:
    """zero_shot_top1 (percent, on `cfg.eval_set`) of the online towers, and zero_shot_top1_ema of A-CLIP's EMA towers.
    U:main.py:262-263 uses seven templates; here prompts are plain class names."""
    named = {"": Towers(model, ema=False)} | ({"_ema": Towers(model)} if isinstance(model, ACLIP) else {})
    view, workers = eval_transform(model.image_size), windows.evaluation_workers(cfg)
    common = view, cfg.eval_set, device, run.DTYPES[precision], workers
    return {f"zero_shot_top1{name}": quick_top1(towers, tokenizer, *common) for name, towers in named.items()}


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print the plan of a run: parameters, tokens, steps, learning rates, momenta, memory of the training step."""
    check_model(cfg)
    cli.check_batch(cfg, world_size)
    model = create_model(cfg.method, cfg.model, **cfg.model_settings())
    n = data.planned_size(cfg)
    per_epoch = n // cfg.batch_size
    lrs, momenta = schedules(cfg, per_epoch)
    last = len(lrs) - 1
    steps = sorted({0, min(round(cfg.warmup_epochs * per_epoch), last), last // 2, last}) if len(lrs) else ()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained

    def rates(step: int) -> str:
        text = f", text tower {cfg.text_lr * lrs[step]:.3e}" if cfg.text_lr != 1 else ""
        ema = f", EMA momentum {momenta[step]:.6f}" if cfg.method == "aclip" else ""
        return f"{lrs[step]:.3e}{text}{ema}, at step {step:,}"

    images, boxes, tokens = blank_batch(model, cfg)
    kept, patches = "", (model.image_size // model.patch_size) ** 2
    if isinstance(model, ACLIP) and cfg.mask != "none":
        noise = torch.zeros(1, patches)
        kept = f", {model.keep_ids(noise, boxes[:1, -2:], noise).shape[1]} kept in each of {cfg.views} views"
    cli.show_plan(
        [
            ("parameters", f"{trained:,} trained, {frozen:,} frozen or EMA"),
            ("samples", f"{n:,} an epoch, {n * cfg.epochs:,} in {cfg.epochs} epochs" if n else "all of --data"),
            cli.disk_row(n, trained, frozen),
            cli.batch_row(cfg, world_size),
            *([cli.step_row(per_epoch * cfg.epochs, per_epoch)] if n else []),
            *(("learning rate", rates(step)) for step in steps),
            ("patches", f"{patches}{kept}"),
            *cli.memory_rows(
                lambda: forward_losses(model, images, boxes, tokens, cfg, "fp32"),
                cfg.batch_size / world_size / cfg.accumulate,
                trained,
                4 * frozen,
                "gradients, AdamW, EMA",
                model if cfg.grad_checkpointing else None,
            ),
        ]
    )


def blank_batch(model: CLIP, cfg: Config, samples: int = 2) -> tuple[list[Tensor], Tensor, Tensor]:
    """(images, boxes, tokens) of blank samples with captions of full length, in the shapes of a training step."""
    size = model.image_size
    images = [torch.zeros(samples, 3, size, size)] * {"aclip": cfg.views, "slip": 3, "clip": 1}[cfg.method]
    if isinstance(model, ACLIP) and model.needs_ema_view:
        side = cfg.ema_image_size or size
        images.append(torch.zeros(samples, 3, side, side))
    boxes = torch.tensor([[[0, 0, size, size]] * (cfg.views + 1)] * samples)
    tokens = torch.ones(samples, model.context_length, dtype=torch.long)
    tokens[:, -1] = 2  # the end token, at the end
    return images, boxes, tokens


def main(cfg: Config) -> Path | None:
    """Train, or print the plan of a dry run. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check(cfg, process.world_size)
    return train(cfg, process)


def train(cfg: Config, process: run.Process | None = None) -> Path:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    process = process or run.setup(cfg.seed, cfg.device)
    precision = run.resolve_precision(cfg.precision, process.device)

    # Model, tokenizer, optimizer; from the checkpoint if there is one
    model: CLIP = create_model(cfg.method, cfg.model, **cfg.model_settings()).to(process.device)
    set_grad_checkpointing(model, cfg.grad_checkpointing)
    tokenizer = data.RememberingTokenizer(open_clip.SimpleTokenizer(context_length=model.context_length))
    groups, betas = param_groups(model, cfg.weight_decay, cfg.text_lr), (cfg.beta1, cfg.beta2)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first, start, best = folder.state["epoch"], folder.state["batch"], folder.state.get("best", {})

    # Data
    pairs = windows.open_pairs(cfg, process)
    data.check_pairs(pairs, cfg, folder.state, process)
    per_epoch = len(pairs) // cfg.batch_size
    lrs, momenta = schedules(cfg, per_epoch)
    ema_view = isinstance(model, ACLIP) and model.needs_ema_view
    folder.start(per_epoch * first + start, per_epoch * cfg.epochs, len(pairs), data=pairs.fingerprint)
    ddp = DistributedDataParallel(model) if process.world_size > 1 else model
    dataset = ViewDataset(pairs, cfg, model.image_size, tokenizer, cfg.seed, ema_view)
    loader = windows.training_batches(dataset, collate, cfg, process, range(first, cfg.epochs), start)

    for epoch in range(first, cfg.epochs):
        model.train()
        broken = list(pairs.broken)
        label = f"{folder.path.name} epoch {epoch + 1}/{cfg.epochs}"
        batches = run.progress(loader, per_epoch - start, label, cfg.batch_size, process)
        for batch, (images, boxes, tokens, _) in enumerate(data.collect_broken(batches, broken), start + 1):
            step = per_epoch * epoch + batch  # from 1
            torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # a resumed run draws the same masks
            images = [dataset.normalise(view.to(process.device, non_blocking=True)) for view in images]
            boxes, tokens = boxes.to(process.device, non_blocking=True), cut_padding(tokens, process.device)
            lr, momentum = lrs[step - 1], momenta[step - 1]
            losses = train_step(ddp, (images, boxes, tokens), optimizer, lr, momentum, cfg, precision, scaler)
            if step % cfg.log_every == 0 or batch == 1:
                losses = run.over_ranks(losses)
                folder.log(step, epoch=epoch, lr=lr, logit_scale=model.logit_scale.exp(), **losses)
            if folder.due(step) and batch < per_epoch and math.isfinite(losses["loss"]):
                folder.save(step, epoch=epoch, batch=batch, best=best)

        done, start, is_best = per_epoch * (epoch + 1), 0, False
        if process.main and cfg.eval_every and ((epoch + 1) % cfg.eval_every == 0 or epoch + 1 == cfg.epochs):
            with folder.evaluation(done, epoch=epoch, batch=per_epoch, best=best):
                measured = zero_shot_top1(model, tokenizer, cfg, process.device, precision)
            folder.log(done, epoch=epoch, **measured)
            is_best = cfg.keep_best and measured["zero_shot_top1"] > best.get(cfg.eval_set, -math.inf)
            best |= {cfg.eval_set: measured["zero_shot_top1"]} if is_best else {}
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if folder.due(done) or epoch + 1 == cfg.epochs or is_best:
            folder.save(done, is_best, epoch=epoch + 1, batch=0, best=best)
    folder.close("--sets FOLDER --probe None --foreground None")
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
