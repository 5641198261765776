"""A CLIP trained by open_clip's own loop, open_clip_train.train.train_one_epoch, on batches in memory."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import open_clip
import torch
from open_clip_train.train import train_one_epoch

AUTOCAST = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}  # open_clip's names


class Batches(list):
    """Batches with the attributes that the loop reads."""

    num_batches = property(len)
    num_samples = property(lambda self: sum(len(images) for images, _ in self))


def open_clip_loop(
    network: torch.nn.Module,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: Callable[[int], None],
    precision: str,
    max_grad_norm: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    device: str = "cpu",
) -> Callable[[], None]:
    """A function that trains `network`, which returns a dict, on batches of images (B, 3, S, S) and tokens (B, L)."""
    flags = SimpleNamespace(
        device=device, precision=AUTOCAST[precision], distill=False, accum_freq=1, rank=0, local_rank=0, world_size=1,
        horovod=False, distributed=False, skip_scheduler=False, log_every_n_steps=100, grad_clip_norm=max_grad_norm,
        batch_size=len(batches[0][0]), wandb=False,
    )  # fmt: skip
    data = {"train": SimpleNamespace(dataloader=Batches(batches), set_epoch=lambda _: None)}
    loss = open_clip.ClipLoss(cache_labels=True)
    return lambda: train_one_epoch(network, data, loss, 1, optimizer, scaler, scheduler, None, flags)
