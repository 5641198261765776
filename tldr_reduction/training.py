"""Code shared by the training programs captioner.py, finetune.py, train.py and retrieval.py.

Schedules, initial weights, pairs and batches, optimizer steps, and --dry-run. Each program has its own loop and losses.
`V:` is showlab/datacentric.vlp@a488102:vq_compress_model/.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared import cli, data, run, windows
from shared.clip import set_grad_checkpointing
from shared.pretrained import efficientnet_lite0
from tldr_reduction.blip import target_places
from tldr_reduction.checkpoints import init_text, init_vision, load_blip
from tldr_reduction.config import Common, Warm, check, for_steps, total_steps
from tldr_reduction.datasets import Collate, PairDataset, local_pairs, open_pairs, train_transform
from tldr_reduction.model import image_side
from tldr_reduction.tokenizer import WordPiece

# --------------------------------------------------------------------------------------------------------- schedules


def warmup_step_lr(
    epoch: int, step: int, init_lr: float, min_lr: float, warmup_lr: float, warmup_steps: int, decay_rate: float
) -> float:
    """Epoch 0: linear from warmup_lr to init_lr over warmup_steps; then init_lr * decay^epoch, at least min_lr.

    V:utils.py:8-17, as called in V:pretrain_vq_compress.py:41,127. If epoch 0 is shorter than the warm-up, the warm-up
    ends unfinished, and the learning rate jumps at epoch 1.
    """
    if epoch == 0:
        return min(init_lr, warmup_lr + (init_lr - warmup_lr) * step / max(warmup_steps, 1))
    return max(min_lr, init_lr * decay_rate**epoch)


def cosine_lr(epoch: int, max_epoch: int, init_lr: float, min_lr: float) -> float:
    """Half a cosine from init_lr to min_lr, constant within an epoch. V:utils.py:2."""
    return (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / max_epoch)) + min_lr


def alpha_ramp(epoch: int, step: int, steps_per_epoch: int, alpha: float, epochs: int = 2) -> float:
    """Weight of the momentum targets: linear from 0 to alpha over the first `epochs`. V:pretrain_vq_compress.py:51."""
    return alpha * min(1.0, (epoch * steps_per_epoch + step) / (epochs * steps_per_epoch))


def learning_rate(cfg: Common, epoch: int, step: int) -> float:
    """The program's learning rate at a step of an epoch, both from 0: warm-up and decay, or a cosine."""
    if isinstance(cfg, Warm):
        return warmup_step_lr(epoch, step, cfg.lr, cfg.min_lr, cfg.warmup_lr, cfg.warmup, cfg.lr_decay_rate)
    return cosine_lr(epoch, cfg.epochs, cfg.lr, cfg.min_lr)


# ------------------------------------------------------------------------------------------------------ initial weights


def start_from_elsewhere(model: nn.Module, cfg: Common) -> None:
    """Load the initial weights that the settings name; print the parameters that start at random because the
    checkpoint of --init lacks them."""
    if getattr(cfg, "lock_image", False):
        model.visual.trunk.load_state_dict(efficientnet_lite0().state_dict())
    if isinstance(cfg, Warm) and cfg.vision_init:
        init_vision(model.visual_encoder, cfg.vision_init)
    if isinstance(cfg, Warm) and cfg.text_init:
        init_text(model, cfg.text_init)
    if cfg.init:
        path = Path(cfg.init)
        missing = load_blip(model, path / "checkpoint.pt" if path.is_dir() else path)
        lost = [name for name in missing if "_m." not in name and "queue" not in name]
        if lost:
            print(
                f"--init {cfg.init} lacks {len(lost)} of the parameters, which start at random: {', '.join(lost[:3])}"
            )
    if cfg.stage in ("blip", "retrieval"):  # momentum encoders start as copies
        model.momentum, kept = 0.0, model.momentum
        model.update_momentum()
        model.momentum = kept


# ------------------------------------------------------------------------------------------------------------- a step


def optimizer_of(model: nn.Module, cfg: Common, precision: str, process: run.Process) -> tuple:
    """AdamW with weight decay on all parameters, and a gradient scaler."""
    set_grad_checkpointing(model, cfg.grad_checkpointing)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True)
    return optimizer, torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")


def vocab_of(tokenizer, cfg: Common, folder: run.RunFolder) -> str | None:
    """Fingerprint of the tokenizer's vocabulary, which the checkpoint holds; None for open_clip's tokenizer. ValueError
    if the run began with another vocabulary."""
    vocab = getattr(tokenizer, "fingerprint", None)
    folder.check_same("vocab", vocab, f"with another vocabulary than {cfg.vocab} holds")
    return vocab


def parallel(model: nn.Module, process: run.Process) -> nn.Module:
    """The model itself, or its wrapper that averages gradients over processes."""
    return DistributedDataParallel(model) if process.world_size > 1 else model


def begin_step(optimizer: torch.optim.Optimizer, lr: float, step: int, cfg: Common, process: run.Process) -> None:
    """Set the learning rate, and seed dropout and negatives by the step, so that a resumed run gives equal results."""
    torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))
    for group in optimizer.param_groups:
        group["lr"] = lr


def update(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> None:
    """One step of the optimizer down the gradient of the loss."""
    optimizer.zero_grad()
    backward(scaler.scale(loss))
    scaler.step(optimizer)
    scaler.update()


# ------------------------------------------------------------------------------------------------------------- batches


def pairs_of(cfg: Common, process: run.Process):
    """The training pairs; with --window-shards they are read by window, otherwise by index."""
    if cfg.window_shards:
        return windows.open_pairs(cfg, process)
    return open_pairs(cfg.data, cfg.image_root, cfg.dataset_size, cfg.strict, cfg.cache)


def training_batches(
    pairs,
    tokenizer,
    model: nn.Module,
    first: int,
    start: int,
    cfg: Common,
    process: run.Process,
    prompt: str = "",
    dataset_type: Callable[..., PairDataset] = PairDataset,
    view: Callable | None = None,
) -> tuple[PairDataset, Iterator[tuple]]:
    """The data set, and its batches by `Collate` from batch `start` of epoch `first` to the last epoch.

    `view`: transform of the images, by default the training transform of the settings. Captions follow the `prompt`.
    """
    view = view or train_transform(image_side(model, cfg), cfg.crop_scale, cfg.flip, cfg.augment)
    dataset = dataset_type(pairs, view, cfg.seed, cfg.max_words)
    collate = Collate(tokenizer, cfg.max_length, prompt)
    return dataset, windows.training_batches(dataset, collate, cfg, process, range(first, cfg.epochs), start)


def of_epoch(
    loader: Iterator[tuple], pairs, epoch: int, start: int, cfg: Common, process: run.Process
) -> tuple[Iterable, list[data.Broken]]:
    """The batches of `epoch` from batch `start` on, and the list that collects their broken samples."""
    broken, left = list(pairs.broken), len(pairs) // cfg.batch_size - start
    label = f"{Path(cfg.out).name} epoch {epoch + 1}/{cfg.epochs}"
    bar = run.progress(loader, left, label, cfg.batch_size, process)
    return data.collect_broken(bar, broken), broken


def on_device(inputs: list[Tensor], dataset: PairDataset, device: torch.device, prompt_length: int = 0) -> list[Tensor]:
    """Move a batch to the device and normalise its images: images, ids, mask, `target_places` (the positions that a
    decoder predicts), and the batch's other entries."""
    images, ids, mask, *rest = inputs
    places = run.pinned(target_places(ids, prompt_length), device)
    images, *moved = (x.to(device, non_blocking=True) for x in (images, ids, mask, places, *rest))
    return [dataset.normalise(images), *moved]


# ------------------------------------------------------------------------------------------------------------- dry run


def vocab_size(cfg: Common) -> int:
    """Size of the vocabulary; BERT's if `vocab` is not a file, since a dry run downloads nothing."""
    return len(WordPiece(cfg.vocab)) if Path(cfg.vocab).is_file() else 30524


def show_plan(
    cfg: Common, world_size: int, model: nn.Module, forward: Callable[[], Any], more: Iterable[tuple[str, str]] = ()
) -> None:
    """Print the plan of a run: parameters, samples, steps, learning rates, memory of the training step.

    `forward` runs the model on two samples; `more` are further rows of the table.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    n, where = cfg.dataset_size or cfg.expected or 0, ""
    if cfg.data and not cfg.window_shards:
        pairs = local_pairs(cfg.data, cfg.image_root, cfg.dataset_size, cfg.cache)
        n, where = (n, f"; {cfg.data} is not here") if pairs is None else (len(pairs), "")
    per_epoch = n // cfg.batch_size
    cfg = for_steps(cfg, per_epoch)
    steps = total_steps(cfg, per_epoch)
    size = f"{n:,} an epoch, {steps * cfg.batch_size:,} in {cfg.epochs} epochs{where}"
    others = "locked" if getattr(cfg, "lock_image", False) else "momentum copies"
    rows = [("parameters", f"{trained:,} trained, {frozen:,} {others}"), *more]
    rows += [("samples", size if n else "unknown: pass --data or --dataset-size"), cli.batch_row(cfg, world_size)]
    rows += [cli.disk_row(n, trained, frozen)]
    if per_epoch:
        rows += [cli.step_row(steps, per_epoch)]
    warmup = cfg.warmup if isinstance(cfg, Warm) else 0
    for epoch, step in dict.fromkeys(((0, 0), (0, warmup), (1, 0), (cfg.epochs // 2, 0), (cfg.epochs - 1, 0))):
        if not per_epoch or step <= per_epoch:
            rate = learning_rate(cfg, epoch, step)
            rows += [("learning rate", f"{rate:.3e} in epoch {epoch} at its step {step:,}")]
    samples, kept = cfg.batch_size / world_size / getattr(cfg, "accumulate", 1), "gradients, AdamW, momentum"
    checkpointed = model if cfg.grad_checkpointing else None
    cli.show_plan([*rows, *cli.memory_rows(forward, samples, trained, 4 * frozen, kept, checkpointed)])


def two_samples(side: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, ids, mask of two samples, for `show_plan`."""
    return torch.zeros(2, 3, side, side), torch.ones(2, length, dtype=torch.long), torch.ones(2, length)


def main(cfg: Common, train: Callable, dry_run: Callable) -> Path | None:
    """The programs' `main`: check the settings, then `train`, or --dry-run."""
    process = run.setup(cfg.seed, cfg.device)
    check(cfg, process.world_size)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    return train(cfg, process)
