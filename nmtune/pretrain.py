"""Pre-train an encoder on noisy supervision: `python -m nmtune.pretrain PRESET [--overrides]`.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning, `U:` = @f249dce, `U0:` = its first, @e9c5fb1.
The paper's controlled study: the same encoder at five noise ratios gamma,
  - supervised: a share gamma of the labels is flipped      `flip_labels`
  - CLIP: captions are swapped between image-text pairs     `swap_captions`
The authors trained with stock timm and OpenCLIP 2.16.0; so do we: timm's and open_clip's models, losses and optimizers.
"""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
import tyro
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from nmtune.datasets import open_labelled
from nmtune.model import create_clip, timm_transforms
from nmtune.noise import flip_labels, flip_labels_per_sample, swap_captions  # noqa: F401
from nmtune.pretrain_config import PRETRAIN_PRESETS, PretrainConfig, check_pretrain
from nmtune.train import cosine_lr
from shared import checkpoints, cli, data, run
from shared.clip import without_padding

# ---------------------------------------------------------------------------------------------------------------- data


class NoisyLabels(Dataset):
    """Training views and noisy labels: item (row) -> image (3, S, S), label, broken samples passed over."""

    def __init__(self, cfg: PretrainConfig, transform: Callable):
        self.images = open_labelled(cfg.data)
        self.images.strict = cfg.strict
        self.transform, self.seed, self.epoch = transform, cfg.seed, 0
        rng = np.random.RandomState(cfg.seed if cfg.noise_seed is None else cfg.noise_seed)
        labels = flip_labels(self.images.labels, self.images.num_classes, cfg.noise, rng, cfg.exclude_true)
        self.noisy = labels != self.images.labels
        self.images.labels = labels
        self.broken: list[data.Broken] = []  # known before anything is read
        self.fingerprint = self.images.fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int, bool, list]:
        torch.default_generator.manual_seed(data.stable_hash(self.seed, self.epoch, int(row)))
        broken: list[data.Broken] = []
        image, label = data.read_or_next(self.images, row, broken)
        return self.transform(image), label, bool(self.noisy[row]), broken


class SwappedCaptions(Dataset):
    """Training views and captions after swapping: item (row) -> image (3, S, S), tokens (L,), swapped?, broken."""

    def __init__(self, cfg: PretrainConfig, transform: Callable, tokenizer: Callable):
        path, _, rest = cfg.data.partition(":") if ":pretrain" in cfg.data else (cfg.data, "", "")
        self.pairs = data.open_pairs(f"{path}/train" if rest else path, strict=cfg.strict)
        self.broken = self.pairs.broken
        self.rows = np.arange(len(self.pairs))
        if rest:  # of the embedded corpus, the emoji that are not held out
            self.rows = np.flatnonzero(np.isin(self.pairs.keys, open_labelled(cfg.data).keys))
        self.transform, self.tokenizer, self.seed, self.epoch = transform, tokenizer, cfg.seed, 0
        rng = random.Random(cfg.seed if cfg.noise_seed is None else cfg.noise_seed)
        self.source = swap_captions(len(self.rows), int(len(self.rows) * cfg.noise / 2), rng)
        self.noisy = self.source != np.arange(len(self.rows))
        self.fingerprint = data.fingerprint(self.pairs.fingerprint.encode(), self.source.tobytes())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, bool, list]:
        torch.default_generator.manual_seed(data.stable_hash(self.seed, self.epoch, int(row)))
        broken: list[data.Broken] = []
        pair = data.read_or_next(self.pairs, self.rows[row], broken)
        caption = self.pairs.caption(self.rows[self.source[row]]) if self.noisy[row] else pair.caption
        return self.transform(pair.image), self.tokenizer([caption])[0], bool(self.noisy[row]), broken


def collate(items: list) -> tuple[Tensor, Tensor, Tensor, list]:
    images, targets, noisy, broken = zip(*items, strict=True)
    targets = torch.stack(targets) if torch.is_tensor(targets[0]) else torch.tensor(targets)
    return torch.stack(images), targets, torch.tensor(noisy), [one for each in broken for one in each]


# --------------------------------------------------------------------------------------------------------------- model


def build(cfg: PretrainConfig, num_classes: int = 1000) -> tuple[nn.Module, Callable, int]:
    """(model, training transform, image side); open_clip's model returns a dict of features, timm's logits."""
    if cfg.kind == "clip":
        if open_clip.get_model_config(cfg.model) is None:
            raise ValueError(f"open_clip has no model {cfg.model!r}; open_clip.list_models() lists the names")
        model, transform, _ = create_clip(cfg.model)
        without_padding(model)
        size = model.visual.image_size
        return model, transform, size[0] if isinstance(size, tuple) else size
    if not timm.is_model(cfg.model):
        raise ValueError(f"timm has no model {cfg.model!r}; timm.list_models() lists the names")
    model = timm.create_model(cfg.model, num_classes=num_classes)
    return model, timm_transforms(model.pretrained_cfg, cfg.crop_scale)[0], model.pretrained_cfg["input_size"][-1]


def losses(cfg: PretrainConfig, model: nn.Module, images: Tensor, targets: Tensor, noisy: Tensor, process, precision):
    """{"loss", ...} of one batch. Supervised: cross-entropy, and how much of it noisy and clean labels have learned."""
    with run.autocast(precision, process.device):
        output = model(images, targets) if cfg.kind == "clip" else model(images)
    if cfg.kind == "clip":
        clip_loss = open_clip.ClipLoss(gather_with_grad=True, rank=process.rank, world_size=process.world_size)
        features = output["image_features"].float(), output["text_features"].float()
        return {"loss": clip_loss(*features, output["logit_scale"]), "logit_scale": output["logit_scale"].detach()}
    each = F.cross_entropy(output.float(), targets, label_smoothing=cfg.label_smoothing, reduction="none")
    parts = {"loss": each.mean()}
    with torch.no_grad():
        hit = output.argmax(dim=1) == targets
        for name, rows in (("clean", ~noisy), ("noisy", noisy)):
            if rows.any():
                parts[f"accuracy_{name}"] = 100 * hit[rows].float().mean()
    return parts


# -------------------------------------------------------------------------------------------------------------- script


def dry_run(cfg: PretrainConfig, world_size: int) -> None:
    """Print what a run would be: parameters, steps, learning rates, memory of the training step."""
    model, _, size = build(cfg)
    parameters = sum(p.numel() for p in model.parameters())
    samples = {"supervised": 1_281_167, "clip": 15_388_848}[cfg.kind] if "emoji" not in cfg.data else 4_494
    if "cc12m" in cfg.out or cfg.model == "ViT-B-16":
        samples += 12_423_374
    per_epoch = -(-samples // cfg.batch_size)
    total = per_epoch * cfg.epochs
    print(f"parameters         {parameters:,}")
    print(f"samples            {samples:,} an epoch, {cfg.epochs} epochs")
    swaps = f", {int(samples * cfg.noise / 2):,} swaps" if cfg.kind == "clip" else ""
    print(f"noise              {cfg.noise:g}{swaps}")
    print(f"batch              {cfg.batch_size} ({cfg.batch_size // world_size} in each of {world_size} processes)")
    print(f"steps              {total:,} ({per_epoch:,} an epoch)")
    for step in sorted({0, min(cfg.warmup, total - 1), total // 2, total - 1}):
        print(f"learning rate      {cosine_lr(cfg.lr, cfg.warmup, total, step):.3e} at step {step:,}")
    inputs = [torch.zeros(2, 3, size, size)]
    if cfg.kind == "clip":
        inputs.append(torch.ones(2, model.context_length, dtype=torch.long))
    activations = cli.activation_bytes(lambda: model(*inputs)) / 2 * cfg.batch_size / world_size / 2**30
    weights = 16 * parameters / 2**30
    print(
        f"memory estimate    {weights + activations:.1f} GiB a process in fp32 (autocast: up to half the activations)"
    )


def main(cfg: PretrainConfig) -> Path | None:
    """Train to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check_pretrain(cfg, process.world_size)
    precision = run.resolve_precision(cfg.precision, process.device)
    folder = Path(cfg.out)

    # Model
    num_classes = open_labelled(cfg.data).num_classes if cfg.kind == "supervised" else 0
    torch.manual_seed(cfg.seed)
    model, transform, _ = build(cfg, num_classes)
    model = model.to(process.device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(
        model, opt={"sgd": "nesterov"}.get(cfg.optimizer, cfg.optimizer), lr=cfg.lr, weight_decay=cfg.weight_decay
    )
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")

    # Resume
    state = checkpoints.resume(folder, cfg) or {"epoch": 0, "batch": 0, "seconds": 0.0}
    if "state_dict" in state:
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    if state["epoch"] >= cfg.epochs:
        if process.main:
            print(f"{folder} is finished ({cfg.epochs} epochs); nothing to do")
        return folder

    # Data and its noise
    if cfg.kind == "clip":
        samples = SwappedCaptions(cfg, transform, data.RememberingTokenizer(open_clip.get_tokenizer(cfg.model)))
    else:
        samples = NoisyLabels(cfg, transform)
    if state.get("data", samples.fingerprint) != samples.fingerprint:
        raise ValueError(f"{folder} was trained on other data than {cfg.data} holds now: choose another --out")
    measured = float(samples.noisy.mean())
    if process.main:
        what = "captions displaced" if cfg.kind == "clip" else "labels wrong"
        print(f"noise ratio {cfg.noise:g}: {100 * measured:.2f} % of {len(samples):,} {what}")

    per_epoch = -(-len(samples) // cfg.batch_size)
    total, saved = per_epoch * cfg.epochs, per_epoch * state["epoch"] + state["batch"]
    log = run.RunLog(folder, cfg, process, step=saved)
    ddp = DistributedDataParallel(model) if process.world_size > 1 else model
    clock, commit = run.Stopwatch(state["seconds"]), run.commit()

    def save(epoch: int, batch: int) -> None:
        if process.main:
            parts = {"state_dict": model, "optimizer": optimizer, "scaler": scaler}
            values = {"epoch": epoch, "batch": batch, "seconds": clock.read(), "noise": measured, "commit": commit}
            states = {name: part.state_dict() for name, part in parts.items()}
            about = {"data": samples.fingerprint, "config": dataclasses.asdict(cfg)}
            checkpoints.save_checkpoint(folder / "checkpoint.pt", states | values | about)

    model.train()
    for epoch in range(state["epoch"], cfg.epochs):
        start = state["batch"] if epoch == state["epoch"] else 0
        samples.epoch, broken = epoch, list(samples.broken)
        order = data.batches(
            len(samples),
            cfg.batch_size // process.world_size,
            (cfg.seed, epoch),
            process.rank,
            process.world_size,
            start,
        )
        if cfg.kind == "clip" and len(samples) % cfg.batch_size:
            order = order[:-1] if per_epoch > 1 else order  # a short batch has too few negatives, as in open_clip
        loader = DataLoader(samples, batch_sampler=order, num_workers=cfg.workers, collate_fn=collate)
        bar = run.progress(loader, len(order), f"{folder.name} {epoch + 1}/{cfg.epochs}", cfg.batch_size, process)
        for i, (images, targets, noisy, _) in enumerate(data.watch(bar, broken), start):
            step = per_epoch * epoch + i
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(cfg.lr, cfg.warmup, total, step)
            torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # for dropout: a resumed run agrees
            images = images.to(process.device, non_blocking=True, memory_format=torch.channels_last)
            parts = losses(cfg, ddp, images, targets.to(process.device), noisy, process, precision)
            optimizer.zero_grad()
            scaler.scale(parts["loss"]).backward()
            scaler.step(optimizer)
            scaler.update()
            if cfg.kind == "clip":
                with torch.no_grad():
                    model.logit_scale.clamp_(0, np.log(100))
            if (step + 1) % cfg.log_every == 0:
                log.write(step + 1, epoch=epoch, seconds=clock.read(), lr=optimizer.param_groups[0]["lr"], **parts)
                run.check_loss(parts["loss"], step)
            if step + 1 - saved >= cfg.save_every:
                save(epoch, i + 1)
                saved = step + 1
        data.report_broken(broken, process, f"epoch {epoch + 1}")
    save(cfg.epochs, 0)
    log.close()
    return folder


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.extras.overridable_config_cli(PRETRAIN_PRESETS)))
