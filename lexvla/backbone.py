"""A small ViT in DINOv2's place, for the embedded corpus: `python -m lexvla.backbone`. Ours; the paper takes DINOv2.

Like DINOv2 it has seen images alone, and stays frozen afterwards: drawings of one emoji, in different styles where
there are several, are each other's positives among a batch of other emoji (InfoNCE of [CLS], and of the mean patch).
No word is used, and every arm and seed of the experiment reads the same weights.
"""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import Dataset

from lexvla.build import small_vit, train_transform
from lexvla.train import cosine_lr, param_groups
from shared import data, run


@dataclasses.dataclass
class Config:
    data: str = "data/emoji/train"
    """Shards of the embedded corpus, whose .json says which emoji is drawn."""
    dataset_size: int | None = None
    """Keep the first so many rows of the data; None keeps all."""
    out: str = "data/lexvla/backbone.pt"
    """File to write; a finished one is left as it is."""
    image_size: int = 40
    """Image side in pixels; a patch has 8."""
    crop_scale: float = 0.5
    """Smallest share of the image's area in a crop."""
    epochs: int = 24
    """Passes over the emoji, two drawings of each at a time."""
    batch_size: int = 64
    """Emoji per step."""
    temperature: float = 0.1
    """Of the contrastive loss."""
    lr: float = 1e-3
    """Peak learning rate; linear over 50 steps, then half a cosine."""
    weight_decay: float = 0.05
    """AdamW's decay of matrices."""
    workers: int = 0
    """Loader processes."""
    seed: int = 0
    """Seed of weights, pairs and crops. One backbone serves all seeds of the experiment."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto, bf16, fp16 or fp32."""


def drawings(spec: str, keys: list[str]) -> list[list[int]]:
    """Rows of each emoji: which of `keys` are drawings of the same one, by the `hexcode` in a sample's .json."""
    emoji_of = {}
    for key, about in data.descriptions(data.expand_shards(spec)):
        emoji_of[key] = about.get("hexcode")
    rows: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        if emoji_of.get(key) is None:
            raise ValueError(f"sample {key} of {spec} has no .json with a hexcode: this is for the embedded corpus")
        rows.setdefault(emoji_of[key], []).append(row)
    return list(rows.values())


class Views(Dataset):
    """Item i: crops (2, 3, S, S) of two drawings of emoji i, a function of (seed, i); of one twice where it has one."""

    def __init__(self, pairs, rows: list[list[int]], transform, seed: tuple[int, ...]):
        self.pairs, self.rows, self.transform, self.seed = pairs, rows, transform, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        torch.default_generator.manual_seed(data.stable_hash(*self.seed, int(i)))
        rows = self.rows[i]
        chosen = [rows[j] for j in torch.randperm(len(rows))[:2]]
        images = [data.read_or_next(self.pairs, row, []).image for row in (chosen * 2)[:2]]
        return torch.stack([self.transform(image) for image in images])


def drawing_loss(tokens: Tensor, temperature: float) -> Tensor:
    """InfoNCE of [CLS], and of the mean patch, between two drawings of each emoji; tokens (2, B, n, D)."""
    loss = tokens.new_zeros(())
    for features in (tokens[:, :, 0], tokens[:, :, 1:].mean(2)):
        a, b = F.normalize(features.float(), dim=-1)
        logits = a @ b.T / temperature
        labels = torch.arange(len(logits), device=logits.device)
        loss = loss + (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return loss


def train(cfg: Config, process: run.Process) -> nn.Module:
    pairs = data.open_pairs(cfg.data, cfg.dataset_size)
    rows = drawings(cfg.data, list(pairs.keys))
    per_epoch = len(rows) // cfg.batch_size
    if not per_epoch:
        raise ValueError(f"{cfg.data} draws {len(rows)} emoji, less than one batch of {cfg.batch_size}")
    vit = small_vit(cfg.image_size).to(process.device).train()
    optimizer = torch.optim.AdamW(param_groups(vit, cfg.weight_decay), lr=cfg.lr, fused=True)
    transform = train_transform(cfg.out, cfg.image_size, cfg.crop_scale)
    precision = run.resolve_precision(cfg.precision, process.device)
    for epoch in range(cfg.epochs):
        seed, losses = (cfg.seed, epoch), []
        loader = data.epoch_loader(Views(pairs, rows, transform, seed), torch.stack, cfg, process, seed)
        label = f"backbone epoch {epoch + 1}/{cfg.epochs}"
        for step, views in enumerate(run.progress(loader, per_epoch, label, 2 * cfg.batch_size), epoch * per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(step, cfg.lr, per_epoch * cfg.epochs, 50)
            pixels = views.to(process.device).transpose(0, 1)  # (2, B, 3, S, S)
            with run.autocast(precision, process.device):
                tokens = vit.forward_features(pixels.flatten(0, 1)).unflatten(0, (2, -1))
            loss = drawing_loss(tokens, cfg.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"backbone epoch {epoch + 1}: loss {sum(losses) / per_epoch:.3f}", flush=True)
    return vit


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    if out.suffix != ".pt":
        raise ValueError(f"--out {out} has to end in .pt: by that a backbone of this script is known")
    if out.exists():
        return print(f"{out} is there already")
    vit = train(cfg, run.setup(cfg.seed, cfg.device))
    out.parent.mkdir(parents=True, exist_ok=True)
    run.save_checkpoint(out, {"weights": vit.cpu().state_dict(), "config": dataclasses.asdict(cfg)})
    print(f"{out} written")


if __name__ == "__main__":
    run.command_line(lambda: main(tyro.cli(Config)))
