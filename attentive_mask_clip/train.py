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

from attentive_mask_clip.config import PRESETS, Config
from attentive_mask_clip.crops import Views, drawn_caption, eval_transform
from attentive_mask_clip.model import ACLIP, CLIP, Towers, create_model
from shared import cli, data, run
from shared.clip import RememberingTokenizer, set_grad_checkpointing
from shared.corpus import open_corpus
from shared.zeroshot import quick_top1

# ---------------------------------------------------------------------------------------------------------- one step


def train_step(
    model: nn.Module,
    batch: tuple[list[Tensor], Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    lr: float,
    momentum: float,
    cfg: Config,
) -> dict[str, Tensor]:
    """One optimizer step on (views, boxes (B, V+1, 4), tokens (B, T)). U:main.py:307-346.

    Returns the losses by name, averaged over micro-batches, each of which has a softmax of its own, as upstream's.
    """
    bare, (views, boxes, tokens) = run.bare(model), batch
    for group in optimizer.param_groups:
        group["lr"] = float(lr) * group.get("lr_scale", 1.0)  # a NumPy number would not load with weights_only
    bare.update_ema(momentum)  # before the forward pass, once per step for any number of micro-batches
    optimizer.zero_grad()
    total: dict[str, Tensor] = {}
    size = len(tokens) // cfg.accumulate
    for i in range(cfg.accumulate):
        micro = slice(i * size, (i + 1) * size)
        alone = isinstance(model, DistributedDataParallel) and i + 1 < cfg.accumulate  # synchronise gradients once
        with model.no_sync() if alone else contextlib.nullcontext():
            inputs = bare.inputs([view[micro] for view in views], boxes[micro], tokens[micro])
            with run.autocast(cfg.precision, tokens.device):
                outputs = model(*inputs)
            losses = bare.loss(outputs, cfg)
            scaler.scale(losses["loss"] / cfg.accumulate).backward()
        for name, value in losses.items():
            total[name] = total.get(name, 0.0) + value.detach() / cfg.accumulate
    scaler.step(optimizer)
    scaler.update()
    bare.clamp_logit_scale()
    return total


# ------------------------------------------------------------------------------------ schedules and parameter groups


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


def parameter_groups(model: nn.Module, weight_decay: float, text_lr: float = 1.0) -> list[dict]:
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


# -------------------------------------------------------------------------------------------------------- the script


def zero_shot_top1(model: CLIP, tokenizer, cfg: Config, device: torch.device) -> dict[str, float]:
    """zero_shot_top1 (percent, on `cfg.eval_set`) of the online towers, and zero_shot_top1_ema of A-CLIP's EMA towers.
    U:main.py:262-263 uses seven templates; here prompts are plain class names."""
    named = {"": Towers(model, ema=False)} | ({"_ema": Towers(model)} if isinstance(model, ACLIP) else {})
    common = eval_transform(model.image_size), cfg.eval_set, device, cfg.precision
    return {f"zero_shot_top1{name}": quick_top1(towers, tokenizer, *common) for name, towers in named.items()}


def dry_run(cfg: Config, process: run.Process, model: CLIP) -> None:
    """Print the plan of a run, with the patches that are kept."""
    samples = data.planned_size(cfg)
    lrs, momenta = schedules(cfg, samples // cfg.batch_size)

    def rates(step: int) -> dict[str, float]:
        found = {"": lrs[step]} | ({"text tower": cfg.text_lr * lrs[step]} if cfg.text_lr != 1 else {})
        return found | ({"EMA momentum": momenta[step]} if cfg.method == "aclip" else {})

    images, boxes, tokens = blank_batch(model, cfg)
    patches = (model.image_size // model.patch_size) ** 2
    kept = f"{patches}"
    if isinstance(model, ACLIP) and cfg.mask != "none":
        noise = torch.zeros(1, patches)
        kept += f", {model.keep_ids(noise, boxes[:1, -2:], noise).shape[1]} kept in each of {cfg.views} views"
    warmup = min(round(cfg.warmup_epochs * (samples // cfg.batch_size)), max(len(lrs) - 1, 0))
    rows = [("patches", kept), cli.first_loss_row(cfg.batch_size // cfg.accumulate)]
    cli.show_run(cfg, process, model, model.inputs(images, boxes, tokens), len(lrs), rates, rows, warmup=warmup)


def blank_batch(model: CLIP, cfg: Config, samples: int = 2) -> tuple[list[Tensor], Tensor, Tensor]:
    """(views, boxes, tokens) of blank samples with captions of full length, in the shapes of a training step."""
    size, count = model.image_size, cfg.views if cfg.method == "aclip" else 1
    views = [torch.zeros(samples, 3, size, size)] * (3 if cfg.method == "slip" else count)
    if isinstance(model, ACLIP) and model.needs_ema_view:
        side = cfg.ema_image_size or size
        views.append(torch.zeros(samples, 3, side, side))
    boxes = torch.tensor([[[0, 0, size, size]] * (count + 1)] * samples)
    tokens = torch.ones(samples, model.context_length, dtype=torch.long)
    tokens[:, -1] = 2  # the end token, at the end
    return views, boxes, tokens


def main(cfg: Config) -> Path | None:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    cfg.check(process.world_size)

    # Model and optimizer, with the state of the last checkpoint if there is one
    model: CLIP = create_model(cfg.method, cfg.model, **cfg.model_settings())
    if cfg.dry_run:
        return dry_run(cfg, process, model)
    set_grad_checkpointing(model.to(process.device), cfg.grad_checkpointing)
    groups = parameter_groups(model, cfg.weight_decay, cfg.text_lr)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, **cfg.adamw, fused=True)
    scaler = run.grad_scaler(cfg, process)
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first, start, best = folder.state["epoch"], folder.state["batch"], folder.state.get("best", {})

    # Data
    tokenizer = RememberingTokenizer(open_clip.SimpleTokenizer(context_length=model.context_length))
    view = Views(cfg, model.image_size, isinstance(model, ACLIP) and model.needs_ema_view)
    text = lambda pair: tokenizer(drawn_caption(pair.caption, cfg.caption_lines))[0]  # noqa: E731
    corpus = open_corpus(cfg, process, text, cut_padding=True)
    per_epoch = corpus.steps
    lrs, momenta = schedules(cfg, per_epoch)
    warmup = round(cfg.warmup_epochs * per_epoch)
    folder.start(per_epoch * first + start, per_epoch * cfg.epochs, len(corpus), warmup, data=corpus.fingerprint)
    network = run.distributed(model, process)

    for epoch in range(first, cfg.epochs):
        model.train()
        for batch, (_, (views, boxes), tokens) in enumerate(corpus.epoch(epoch, view, start), start + 1):
            step = per_epoch * epoch + batch  # from 1
            run.seed_step(cfg, step, process)  # a resumed run draws the same masks
            lr, momentum = lrs[step - 1], momenta[step - 1]
            losses = train_step(network, (views, boxes, tokens), optimizer, scaler, lr, momentum, cfg)
            if step % cfg.log_every == 0 or batch == 1:
                losses = run.over_ranks(losses)
                folder.log(step, epoch=epoch, lr=lr, logit_scale=model.logit_scale.exp(), **losses)
            if folder.due(step) and batch < per_epoch and math.isfinite(losses["loss"]):
                folder.save(step, epoch=epoch, batch=batch, best=best)

        done, start, is_best = per_epoch * (epoch + 1), 0, False
        if folder.evaluates(epoch + 1, cfg.epochs):
            with folder.evaluation(done, epoch=epoch, batch=per_epoch, best=best):
                measured = zero_shot_top1(model, tokenizer, cfg, process.device)
            folder.log(done, epoch=epoch, **measured)
            is_best = cfg.keep_best and measured["zero_shot_top1"] > best.get(cfg.eval_set, -math.inf)
            best |= {cfg.eval_set: measured["zero_shot_top1"]} if is_best else {}
        corpus.report_broken(f"epoch {epoch + 1}")
        if folder.due(done) or epoch + 1 == cfg.epochs or is_best:
            folder.save(done, is_best, epoch=epoch + 1, batch=0, best=best)
    folder.close()
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
